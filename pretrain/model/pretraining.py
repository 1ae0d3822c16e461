"""BERT with both objectives: a masked micro-batch in, its losses out. This is the module that DeepSpeed wraps.

Shape letters: B rows, L tokens per row, T = B * L, D hidden, M masked positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.config.sections import ModelSection, ObjectiveSection
from pretrain.errors import counted
from pretrain.model.bert import Bert
from pretrain.model.compiled import CompiledFunction
from pretrain.model.dropout import DropoutKey
from pretrain.model.layer_spec import LayerSpec
from pretrain.model.token_rows import TokenRows
from pretrain.objectives.mlm import IGNORED_LABEL, masked_lm_loss
from pretrain.objectives.taco import anchor_mask, has_pairs, sample_pairs, token_contrastive_loss


class PretrainingLosses(NamedTuple):
    """The losses of one micro-batch, scalars; a tuple, because DeepSpeed looks for a loss tensor in tuples only.

    The first two have a gradient: a step that weighs the MLM losses of its micro-batches changes both.
    """

    total: Tensor
    """mlm + contrastive_weight * contrastive."""
    mlm: Tensor
    """Mean over the masked tokens."""
    contrastive: Tensor
    num_correct: Tensor
    """Masked positions whose top prediction is correct."""
    num_labels: Tensor


@dataclass(frozen=True)
class LossHead:
    """Both losses from the outputs of the last layer; it has no parameters. `seed` keys the pairs."""

    objective: ObjectiveSection
    vocab_size: int
    layers: LayerSpec
    seed: int

    def __call__(
        self,
        logits_MV: Tensor,
        bias_V: Tensor,
        hidden_TD: Tensor,
        embedding_TD: Tensor | None,
        *,
        segment_BL: Tensor,
        valid_BL: Tensor,
        masked_index_M: Tensor,
        masked_label_M: Tensor,
        micro_batch_index: int,
        rows: TokenRows,
    ) -> PretrainingLosses:
        """The losses of a micro-batch, see `BertForPretraining.forward`; e may be None if the weight is 0.

        The hidden states are those of the tokens of `rows`, the other arguments count places of the grid.
        `logits_MV` and `bias_V` are `VocabularyBias`'s; the memory of the logits is used up.
        """
        mlm, num_correct, num_labels = self._mlm_loss(
            logits_MV,
            masked_label_M,
            self.layers.vocabulary_shard(self.vocab_size),
            bias_V=bias_V,
            num_words=logits_MV.shape[1] - self.layers.num_unused_words(self.vocab_size),
        )
        if self.objective.contrastive_weight == 0 or embedding_TD is None:
            return PretrainingLosses(mlm, mlm, torch.zeros_like(mlm.detach()), num_correct, num_labels)
        anchor_BL = self._anchors(valid_BL, masked_index_M, masked_label_M)
        contrastive = self._contrast(hidden_TD, embedding_TD, valid_BL, segment_BL, anchor_BL, micro_batch_index, rows)
        total = mlm + self.objective.contrastive_weight * contrastive
        return PretrainingLosses(total, mlm, contrastive.detach(), num_correct, num_labels)

    @property
    def _mlm_loss(self) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        if self.layers.kernels == "torch":
            return masked_lm_loss
        from pretrain.kernels import cross_entropy

        return cross_entropy.masked_lm_loss

    def _anchors(self, valid_BL: Tensor, masked_index_M: Tensor, masked_label_M: Tensor) -> Tensor:
        if self.objective.anchors == "all":
            return valid_BL
        # Unused entries all point at token 0, so labels are counted: assigning could overwrite a real one there.
        is_label_M = (masked_label_M != IGNORED_LABEL).to(torch.int32)
        count_T = is_label_M.new_zeros(valid_BL.numel()).index_add_(0, masked_index_M, is_label_M)
        return anchor_mask(self.objective.anchors, (count_T > 0).view_as(valid_BL), valid_BL)

    def _contrast(
        self,
        hidden_TD: Tensor,
        embedding_TD: Tensor,
        valid_BL: Tensor,
        segment_BL: Tensor,
        anchor_BL: Tensor,
        micro_batch_index: int,
        rows: TokenRows,
    ) -> Tensor:
        hidden_TD, embedding_TD = self.layers.share_contrast(hidden_TD, embedding_TD)
        contrast = self._contrast_in_triton if self.layers.kernels == "triton" else self._contrast_in_torch
        loss = contrast(hidden_TD, embedding_TD, valid_BL, segment_BL, anchor_BL, micro_batch_index, rows)
        return self.layers.sum_contrast(loss)

    def _contrast_in_torch(
        self,
        hidden_TD: Tensor,
        embedding_TD: Tensor,
        valid_BL: Tensor,
        segment_BL: Tensor,
        anchor_BL: Tensor,
        micro_batch_index: int,
        rows: TokenRows,
    ) -> Tensor:
        positive_BL, negative_BLK = sample_pairs(
            valid_BL,
            window=self.objective.positive_window,
            num_negatives=self.objective.num_negatives,
            seed=self.seed,
            micro_batch_index=micro_batch_index,
            segment_BL=segment_BL,
        )
        own_anchor_BL, share = anchor_BL, None
        if self.layers.tp_size > 1:
            own = self.layers.own_tokens(len(hidden_TD))
            is_own_T = anchor_BL.new_zeros(len(hidden_TD))
            is_own_T[own.start : own.stop] = True
            anchor_BL = anchor_BL & has_pairs(positive_BL, negative_BLK)
            own_anchor_BL = anchor_BL & rows.spread(is_own_T).view_as(anchor_BL)
            share = own_anchor_BL.sum() / anchor_BL.sum().clamp(min=1)
        # Padding is no anchor and no candidate, so the zeros that stand for it are never read.
        loss = token_contrastive_loss(
            rows.spread(hidden_TD).view(*valid_BL.shape, -1),
            rows.spread(embedding_TD).view(*valid_BL.shape, -1),
            positive_BL,
            negative_BLK,
            temperature=self.objective.temperature,
            anchor_mask_BL=own_anchor_BL,
        )
        return loss if share is None else loss * share

    def _contrast_in_triton(
        self,
        hidden_TD: Tensor,
        embedding_TD: Tensor,
        valid_BL: Tensor,
        segment_BL: Tensor,
        anchor_BL: Tensor,
        micro_batch_index: int,
        rows: TokenRows,
    ) -> Tensor:
        from pretrain.kernels.contrast import drawn_contrastive_loss
        from pretrain.kernels.pairs import pair_key

        return drawn_contrastive_loss(
            hidden_TD,
            embedding_TD,
            valid_BL,
            segment_BL,
            anchor_BL,
            pair_key(self.seed, micro_batch_index, valid_BL.device),
            window=self.objective.positive_window,
            num_negatives=self.objective.num_negatives,
            temperature=self.objective.temperature,
            place_T=rows.place_T,
            token_G=rows.token_G,
            own_tokens=self.layers.own_tokens(len(hidden_TD)),
        )


class BertForPretraining(Bert):
    """`Bert` with the MLM and the token contrastive loss; the same parameters under the same names.

    Args:
        objective: weight, temperature, pairs and anchors of the contrastive loss.
        seed: for the initial weights, the pairs and dropout.
    """

    def __init__(
        self,
        config: ModelSection,
        vocab_size: int,
        layers: LayerSpec,
        objective: ObjectiveSection,
        *,
        seed: int,
        recompute_layers: int = 0,
        has_padding: bool = True,
        separate_documents: bool = False,
    ) -> None:
        super().__init__(
            config,
            vocab_size,
            layers,
            seed=seed,
            recompute_layers=recompute_layers,
            has_padding=has_padding,
            separate_documents=separate_documents,
        )
        self.head = LossHead(objective, vocab_size, layers, seed)
        self.seed = seed
        self.run_model: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _encode_and_predict

    def compile_whole(self, key: str) -> None:
        """Let torch.compile make one graph from the embedding to the logits at the first call; `key` asked for it."""
        covers = f"{counted(self.config.num_layers, 'encoder layer')} with embedding and head"
        self.run_model = CompiledFunction(
            _encode_and_predict, what="the model", covers=covers, key=key, dynamic=self.has_varying_sizes
        )
        self.compiled_parts = [self.run_model]

    def forward(
        self,
        input_ids_BL: Tensor,
        segment_BL: Tensor,
        valid_BL: Tensor,
        masked_index_M: Tensor,
        masked_label_M: Tensor,
        micro_batch_index: int,
        rows: TokenRows | None = None,
    ) -> PretrainingLosses:
        """Both losses of a micro-batch as `data.batches.Batch` holds it.

        Args:
            valid_BL: bool, the tokens that may take part in the contrastive loss.
            masked_index_M: flat positions row * L + column to predict.
            masked_label_M: the words there, -100 in unused entries.
            micro_batch_index: number of the micro-batch over all data-parallel ranks; keys pairs and dropout.
            rows: `plan_rows` of the segments, on their device; made from them if left out, which waits for a GPU.
        """
        if rows is None:
            rows = self._rows_of(segment_BL)
        key = None
        if self.training:
            key = DropoutKey.of(self.seed, micro_batch_index, self.config.num_layers, input_ids_BL.device)
            key.seed_generator(self.layers.tp_rank)
        logits_MV, bias_V, hidden_TD, embedding_TD = self.run_model(
            self, input_ids_BL, segment_BL, rows, masked_index_M, key
        )
        return self.head(
            logits_MV,
            bias_V,
            hidden_TD,
            embedding_TD,
            segment_BL=segment_BL,
            valid_BL=valid_BL,
            masked_index_M=masked_index_M,
            masked_label_M=masked_label_M,
            micro_batch_index=micro_batch_index,
            rows=rows,
        )


def _encode_and_predict(
    model: Bert,
    input_ids_BL: Tensor,
    segment_BL: Tensor,
    rows: TokenRows,
    masked_index_M: Tensor,
    key: DropoutKey | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [M, V] without their bias, the bias [V], h and e [T, D]."""
    hidden_TD, embedding_TD = model.encode_tokens(input_ids_BL, segment_BL, rows, key=key)
    return (*model.decode(hidden_TD.index_select(0, rows.find(masked_index_M))), hidden_TD, embedding_TD)
