"""The contenders of `taco bench loader`, each in its own process: this project's batches and two peers.

Each answers with CPU seconds per masked row, and whether its rows hold the dataset's tokens: masks are undone with the
labels, and the result is compared with the dataset.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.bench.contest import peak_bytes, seconds_per_call, versions

if TYPE_CHECKING:
    from pretrain.data.batches import Batch, BatchSource
    from pretrain.data.masking import Masking

MASK_RATE = 0.15
SEED = 1234
ARROW_ROWS = 4096  # rows of the peer's arrow file; too many for the caches of any processor
_CHECKED_ROWS = 32
_MEGATRON_ROWS = 10_000  # its index of them is built before the clock starts


def measure(
    contender: str, prefix: str, folder: Path, seq_length: int, batch: int, min_seconds: float
) -> dict[str, Any]:
    """The answer of one contender: seconds_per_row, is_equal, peak_bytes, versions of what it uses."""
    contenders: dict[str, Callable[[], dict[str, Any]]] = {
        "taco": lambda: _ours("token", prefix, seq_length, batch, min_seconds),
        "taco-whole-word": lambda: _ours("whole_word", prefix, seq_length, batch, min_seconds),
        "taco-tensors": lambda: _tensors(prefix, seq_length, batch, min_seconds),
        "megatron": lambda: _megatron(prefix, folder, seq_length, min_seconds),
        "huggingface": lambda: _huggingface(prefix, folder, seq_length, batch, min_seconds),
        "memory": lambda: _memory(seq_length, min_seconds),
    }
    return {**contenders[contender](), "peak_bytes": peak_bytes()}


# -- this project ------------------------------------------------------------------------------------------------------


def _source(
    masking: Masking, prefix: str, seq_length: int, batch: int, *, shuffle: bool, device: str = "cpu"
) -> BatchSource:
    from pretrain.data.batches import BatchSource, RowSource
    from pretrain.data.pinned import memory_for
    from pretrain.data.tokenizer.load import load_tokenizer

    return BatchSource(
        RowSource([prefix], "stream", seq_length),
        micro_batch_size=batch,
        seed=SEED,
        mask_rate=MASK_RATE,
        masking=masking,
        mean_span_length=3.0,
        exclude_special=False,
        shuffle=shuffle,
        continues_word=load_tokenizer(f"{prefix}.tokenizer").continues_word() if masking == "whole_word" else None,
        allocate=memory_for(device),
    )


def _ours(masking: Masking, prefix: str, seq_length: int, batch: int, min_seconds: float) -> dict[str, Any]:
    source = _source(masking, prefix, seq_length, batch, shuffle=True)
    seconds = seconds_per_call(source.micro_batch, min_seconds) / batch
    first = _source(masking, prefix, seq_length, _CHECKED_ROWS, shuffle=False).micro_batch(0)
    is_equal = np.array_equal(_without_masks(first), _stream_rows(prefix, seq_length))
    return {"seconds_per_row": seconds, "is_equal": is_equal, "versions": versions("numpy")}


def _tensors(prefix: str, seq_length: int, batch: int, min_seconds: float) -> dict[str, Any]:
    """As whole_word, and on to torch tensors, on the GPU if there is one."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = _source("whole_word", prefix, seq_length, batch, shuffle=True, device=device.type)

    held: deque[Batch] = deque(maxlen=64)  # a copy from page-locked memory must end before its batch is released

    def fetch(number: int) -> list[torch.Tensor]:
        micro_batch = source.micro_batch(number)
        held.append(micro_batch)
        arrays = (
            micro_batch.input_ids_BL,
            micro_batch.segment_BL,
            micro_batch.valid_BL,
            micro_batch.masked_index_M,
            micro_batch.masked_label_M,
        )
        return [torch.from_numpy(array).to(device, non_blocking=True) for array in arrays]

    is_equal = np.array_equal(fetch(0)[0].cpu().numpy(), source.micro_batch(0).input_ids_BL)
    seconds = seconds_per_call(fetch, min_seconds) / batch
    return {
        "seconds_per_row": seconds,
        "is_equal": is_equal,
        "device": device.type,
        "versions": versions("torch"),
    }


def _without_masks(batch: Batch) -> np.ndarray:
    ids_BL = batch.input_ids_BL.copy()
    is_used = batch.masked_label_M >= 0
    ids_BL.ravel()[batch.masked_index_M[is_used]] = batch.masked_label_M[is_used]
    return ids_BL


def _stream_rows(prefix: str, seq_length: int) -> np.ndarray:
    """The first rows of stream mode in plain Python: documents, [SEP] after each, cut every seq_length - 2 tokens."""
    from pretrain.data.dataset.indexed_dataset import IndexedDataset

    dataset, capacity = IndexedDataset(prefix), seq_length - 2
    assert dataset.manifest is not None
    special = dataset.manifest.tokenizer.special
    line: list[int] = []
    for number in range(len(dataset)):
        document = dataset.document(number).tolist()
        line += [*document, special.sep] if document else []
        if len(line) >= _CHECKED_ROWS * capacity:
            break
    rows = [line[first : first + capacity] for first in range(0, _CHECKED_ROWS * capacity, capacity)]
    return np.array([[special.cls, *row, special.sep] for row in rows])


# -- megatron-core -----------------------------------------------------------------------------------------------------


class _VocabForMegatron:
    """What megatron-core's BERT dataset needs of a tokenizer."""

    unique_identifiers = {"class": "bench"}

    def __init__(self, prefix: str) -> None:
        from pretrain.data.dataset.manifest import Manifest

        special = Manifest.load(Path(f"{prefix}.json")).tokenizer.special
        pieces = Path(f"{prefix}.tokenizer", "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
        self.vocab = {piece: number for number, piece in enumerate(pieces)}
        self.inv_vocab = dict(enumerate(pieces))
        self.vocab_size = len(pieces)
        self.cls, self.sep, self.mask, self.pad = special.cls, special.sep, special.mask, special.pad
        self.eod, self.pad_id = special.sep, special.pad


def _megatron(prefix: str, folder: Path, seq_length: int, min_seconds: float) -> dict[str, Any]:
    """Its BERT dataset with full words, n-grams up to 3 and no next-sentence task, which is less work."""
    import torch
    from megatron.core.datasets.bert_dataset import BERTMaskedWordPieceDataset, BERTMaskedWordPieceDatasetConfig
    from megatron.core.datasets.utils import Split

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / f"store-{os.getpid()}"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    config = BERTMaskedWordPieceDatasetConfig(
        random_seed=SEED,
        sequence_length=seq_length,
        split="1,0,0",
        path_to_cache=str(folder / f"cache-{os.getpid()}"),
        tokenizer=_VocabForMegatron(prefix),
        masking_probability=MASK_RATE,
        short_sequence_probability=0.0,
        masking_max_ngram=3,
        masking_do_full_word=True,
        masking_do_permutation=False,
        masking_use_longer_ngrams=False,
        masking_use_geometric_distribution=False,
        classification_head=False,
    )
    dataset_class = BERTMaskedWordPieceDataset
    low_level = dataset_class.build_low_level_dataset(prefix, config)
    documents = np.arange(dataset_class.numel_low_level_dataset(low_level) - 1)
    rows = dataset_class(low_level, prefix, documents, _MEGATRON_ROWS, Split.train, config)
    order = np.random.default_rng(SEED).permutation(len(rows))
    seconds = seconds_per_call(lambda number: rows[int(order[number % len(order)])], min_seconds)
    return {
        "seconds_per_row": seconds,
        "is_equal": _is_megatron_equal(rows, prefix),
        "tokens_per_row": float(np.mean([rows[int(i)]["padding_mask"].sum() for i in order[:_CHECKED_ROWS]])),
        "versions": versions("megatron-core", "torch"),
    }


def _is_megatron_equal(rows: Any, prefix: str) -> bool:
    """Whether untruncated items, with masks undone, are [CLS] sentences [SEP] as we read the same files."""
    from pretrain.data.dataset.indexed_dataset import IndexedDataset

    dataset, num_checked = IndexedDataset(prefix), 0
    assert dataset.manifest is not None
    special = dataset.manifest.tokenizer.special
    for number in range(min(len(rows), 20 * _CHECKED_ROWS)):
        item, (first, last, _) = rows[number], rows.sample_index[number]
        if item["truncated"]:
            continue
        ids = np.where(item["loss_mask"] > 0, item["labels"], item["text"])[: int(item["padding_mask"].sum())]
        ends = dataset.sequence_pointers[[first, last - 1]] // dataset.dtype.itemsize
        tokens = dataset.tokens[ends[0] : ends[1] + dataset.sequence_lengths[last - 1]]
        if ids.tolist() != [special.cls, *tokens.tolist(), special.sep]:
            return False
        num_checked += 1
    return num_checked > 0


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def _huggingface(prefix: str, folder: Path, seq_length: int, batch: int, min_seconds: float) -> dict[str, Any]:
    """Rows of an arrow file, fetched a batch at a time as its DataLoader does, through the masking collator."""
    import torch
    from datasets import Dataset, load_from_disk
    from transformers import BertTokenizerFast, DataCollatorForLanguageModeling

    torch.set_num_threads(1)
    source = _source("token", prefix, seq_length, 1, shuffle=False)
    arrow = folder / f"arrow-{seq_length}"
    ids_BL, _ = source.rows.fill(np.arange(min(ARROW_ROWS, source.rows.num_rows)))
    if not arrow.exists():
        special = list(vars(source.rows.tokenizer.special).values())
        columns: dict[str, np.ndarray] = {
            "input_ids": ids_BL.astype(np.int32),
            "token_type_ids": np.zeros_like(ids_BL, dtype=np.int8),
            "attention_mask": np.ones_like(ids_BL, dtype=np.int8),
            "special_tokens_mask": np.isin(ids_BL, special).astype(np.int8),
        }
        Dataset.from_dict({name: list(column) for name, column in columns.items()}).save_to_disk(str(arrow))
    rows = load_from_disk(str(arrow))
    tokenizer = BertTokenizerFast(str(Path(f"{prefix}.tokenizer", "vocab.txt")))
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASK_RATE)
    order = np.random.default_rng(SEED).permutation(len(rows))

    def fetch(number: int) -> Any:
        return collate(rows.__getitems__(order[np.arange(number * batch, (number + 1) * batch) % len(order)].tolist()))

    seconds = seconds_per_call(fetch, min_seconds) / batch
    first = fetch(0)
    unmasked = torch.where(first["labels"] >= 0, first["labels"], first["input_ids"]).numpy()
    is_equal = np.array_equal(unmasked, ids_BL[order[np.arange(batch) % len(order)]])
    return {
        "seconds_per_row": seconds,
        "is_equal": is_equal,
        "versions": versions("datasets", "transformers", "torch"),
    }


# -- the machine -------------------------------------------------------------------------------------------------------


def _memory(seq_length: int, min_seconds: float) -> dict[str, Any]:
    """The time of memory traffic alone for a row: 2 bytes read per token, and the five arrays of a batch written."""
    block = np.zeros(32 << 20, np.uint64)  # 256 MiB, more than any cache
    other = np.ones_like(block)
    seconds = seconds_per_call(lambda number: np.copyto(other, block), min_seconds)
    bytes_per_second = 2 * block.nbytes / seconds
    predictions = round(MASK_RATE * (seq_length - 2))
    row_bytes = seq_length * (2 + 8 + 8 + 1) + predictions * (8 + 8)
    return {
        "seconds_per_row": row_bytes / bytes_per_second,
        "is_equal": True,
        "row_bytes": row_bytes,
        "bytes_per_second": bytes_per_second,
        "versions": versions("numpy"),
    }
