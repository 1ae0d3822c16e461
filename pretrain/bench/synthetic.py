"""A synthetic corpus for benchmarks: documents of sentences of random words, with their vocabulary.

Sentence lengths are lognormal (about 26 tokens), documents have about 25 sentences, words follow Zipf's law, and a
quarter of the pieces continue a word. Everything is a function of the seed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCAB_SIZE = 30_522
SENTENCES_PER_DOCUMENT = 25


def sentence_lengths(num_sentences: int, seed: int) -> np.ndarray:
    """Tokens of each sentence, int32 [num_sentences], 2 to 480."""
    lengths = np.random.default_rng(seed).lognormal(3.1, 0.6, num_sentences)
    return np.clip(lengths, 2, 480).astype(np.int32)


def document_starts(num_sentences: int, seed: int) -> np.ndarray:
    """First sentence of each document, then `num_sentences`; int64, strictly ascending from 0."""
    inner = np.random.default_rng(seed).integers(1, num_sentences, max(num_sentences // SENTENCES_PER_DOCUMENT - 1, 0))
    return np.unique(np.concatenate(([0], inner, [num_sentences]))).astype(np.int64)


def document_offsets(num_documents: int, seed: int) -> np.ndarray:
    """First token of each document of about 900 tokens (lognormal), then the end; int64 [num_documents + 1]."""
    lengths = np.clip(np.random.default_rng(seed).lognormal(6.3, 1.0, num_documents), 2, 1_000_000)
    return np.concatenate(([0], np.cumsum(lengths.astype(np.int64))))


def write_corpus(folder: Path, num_tokens: int, seed: int = 0) -> Path:
    """Writes a dataset of about `num_tokens` tokens, a sequence per sentence, and its tokenizer; returns the prefix."""
    from pretrain.data.dataset.dataset_writer import IndexedDatasetWriter
    from pretrain.data.tokenizer.base import best_dtype
    from pretrain.data.tokenizer.load import load_tokenizer

    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join(_pieces()) + "\n", encoding="utf-8")
    tokenizer = load_tokenizer(vocab)
    lengths = sentence_lengths(max(num_tokens // 26, 2), seed)
    starts = document_starts(len(lengths), seed)
    generator = np.random.default_rng(seed)
    prefix = folder / "corpus"
    with IndexedDatasetWriter(prefix, best_dtype(VOCAB_SIZE)) as writer:
        writer.add_documents(_random_ids(generator, int(lengths.sum())), lengths, np.diff(starts))
        writer.finalize(tokenizer=tokenizer.info)
    tokenizer.save_pretrained(Path(f"{prefix}.tokenizer"))
    return prefix


def _pieces() -> list[str]:
    words = [f"##{number}" if number % 4 == 0 else f"word{number}" for number in range(len(SPECIAL), VOCAB_SIZE)]
    return [*SPECIAL, *words]


def _random_ids(generator: np.random.Generator, count: int) -> np.ndarray:
    """Ids of ordinary pieces, the r-th of them about proportional to 1 / r; uint16 [count]."""
    ordinary = VOCAB_SIZE - len(SPECIAL)
    return (len(SPECIAL) + np.floor(ordinary ** generator.random(count)) - 1).astype(np.uint16)
