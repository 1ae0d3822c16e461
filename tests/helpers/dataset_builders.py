"""Small datasets and tokenizer facts that the data tests share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pretrain.data.dataset.dataset_writer import IndexedDatasetWriter
from pretrain.data.dataset.manifest import Manifest
from pretrain.data.tokenizer.info import SpecialIds, TokenizerInfo

SPECIAL = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
NUM_SPECIAL = 5


def tokenizer_info(vocab_size: int = 100, sha256: str = "ab" * 32) -> TokenizerInfo:
    return TokenizerInfo("wordpiece", "vocab.txt", sha256, vocab_size, False, SPECIAL)


def write_dataset(
    prefix: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: str = "uint16", vocab_size: int = 100, **options
) -> Manifest:
    """Documents of sequences of token ids -> a finished dataset."""
    with IndexedDatasetWriter(prefix, dtype, **options) as writer:
        for document in documents:
            writer.add_document([np.array(sequence, np.int64) for sequence in document])
        return writer.finalize(tokenizer=tokenizer_info(vocab_size), command=["preprocess", "--workers", "1"])


def write_lengths(prefix: Path, lengths: Sequence[int], vocab_size: int = 100, seed: int = 0) -> Manifest:
    """One-sequence documents of these lengths, filled with ordinary ids."""
    generator = np.random.default_rng(seed)
    return write_dataset(
        prefix, [[generator.integers(NUM_SPECIAL, vocab_size, length)] for length in lengths], vocab_size=vocab_size
    )
