"""Dropout as a function of (seed, micro-batch, place in the model, element): nothing is drawn from a running generator.

So neither the number of ranks nor the split into tensors, tokens or pipeline stages changes which units drop. A layer
that is recomputed in the backward pass drops the same units, no mask is stored, a resumed run needs no random state.
The one exception is attention on a GPU, where torch's own kernels draw: `DropoutKey.seed_generator`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.kernels.dropout_mask import NUM_WORDS, keep_mask
from pretrain.objectives.philox import MASK_32, split_words

__all__ = ["AFTER_ATTENTION", "AFTER_FFN", "ATTENTION_WEIGHTS", "DropoutKey", "keep_mask"]

# The places of one layer; the embedding layer has the first of them only.
AFTER_ATTENTION, AFTER_FFN, ATTENTION_WEIGHTS = range(3)
_NUM_PLACES = 4
# Separates the words drawn here from those that the pairs and the data draw with the same seed.
_DOMAIN = 0x44524F50


@dataclass(eq=False)
class DropoutKey:
    """Determines, together with the element, which units drop in one micro-batch, at every place of the model.

    A kernel reads the words from the device's memory, so a captured CUDA graph can take another micro-batch, and
    torch.compile sees a tensor like any other.
    """

    seed: int
    micro_batch_index: int
    """Number of the micro-batch over all data-parallel ranks and steps."""
    words_IPW: Tensor
    """int64 [layers + 2, places of a layer, NUM_WORDS]."""

    @classmethod
    def of(cls, seed: int, micro_batch_index: int, num_layers: int, device: torch.device) -> DropoutKey:
        """The key of a micro-batch for a model of `num_layers` encoder layers."""
        # Page-locked for a GPU: a copy from other memory would hold the host up.
        shape = (num_layers + 2, _NUM_PLACES, NUM_WORDS)
        words = torch.zeros(shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        key_low, key_high = split_words(seed)
        place_IP = torch.arange(words.shape[0] * _NUM_PLACES).view(-1, _NUM_PLACES)
        words[..., 2] = place_IP << 16
        for number, word in zip(
            (0, 1, 3, 4), (key_low, key_high ^ _DOMAIN, *split_words(micro_batch_index)), strict=True
        ):
            words[..., number] = word
        return cls(seed, micro_batch_index, words.to(device, non_blocking=True))

    @classmethod
    def draw(cls, num_layers: int, device: torch.device) -> DropoutKey:
        """A random key, from torch's generator of the CPU."""
        seed, micro_batch_index = torch.randint(MASK_32, (2,)).tolist()
        return cls.of(seed, micro_batch_index, num_layers, device)

    def at(self, index: int) -> Tensor:
        """The words of a layer, [places of a layer, NUM_WORDS], a view; layer 1 is the embedding layer."""
        return self.words_IPW[index]

    def seed_generator(self, *numbers: int) -> None:
        """Seed the generator from which torch's own attention on a GPU draws, once for all layers held here.

        `numbers` tell apart the ranks that hold other parts of the model.
        """
        device = self.words_IPW.device
        if device.type == "cuda":
            torch.cuda.default_generators[device.index].manual_seed(_hash(self.seed, self.micro_batch_index, *numbers))


def _hash(*numbers: int) -> int:
    text = f"dropout {' '.join(map(str, numbers))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
