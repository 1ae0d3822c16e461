"""Masks know every special id of the dataset's tokenizer, not only the five of BERT."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.batches import BatchSource, RowSource
from pretrain.data.dataset.dataset_writer import IndexedDatasetWriter
from pretrain.data.special_ids import special_ids
from pretrain.data.tokenizer.load import Tokenizer, load_tokenizer, wordpiece_pipeline
from pretrain.errors import DataError

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "[SPEAKER]", "[TURN]"]


def save_json(path: Path, pieces: list[str]) -> Path:
    """A tokenizer.json with [SPEAKER] and [TURN] among its special tokens."""
    pipeline = wordpiece_pipeline({piece: number for number, piece in enumerate(pieces)}, False)
    pipeline.add_special_tokens([piece for piece in pieces if piece in ("[SPEAKER]", "[TURN]")])
    pipeline.save(str(path))
    return path


def write(prefix: Path, tokenizer: Tokenizer) -> Path:
    ids = np.random.default_rng(0).integers(5, tokenizer.vocab_size, 600)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        writer.add_document([ids])
        writer.finalize(tokenizer=tokenizer.info)
    return prefix


def make_source(prefix: Path, exclude_special: bool = False) -> BatchSource:
    options = {"micro_batch_size": 4, "seed": 1, "mask_rate": 0.5, "masking": "token", "mean_span_length": 3.0}
    rows = RowSource([prefix], "stream", 32)
    return BatchSource(rows, **options, exclude_special=exclude_special, shuffle=True)  # type: ignore[arg-type]


def test_special_tokens_of_a_tokenizer_json_are_never_masked_nor_drawn(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_json(tmp_path / "tokenizer.json", PIECES))
    prefix = write(tmp_path / "a", tokenizer)
    tokenizer.save_pretrained(f"{prefix}.tokenizer")
    source, strict = make_source(prefix), make_source(prefix, exclude_special=True)
    extra = [PIECES.index("[SPEAKER]"), PIECES.index("[TURN]")]
    assert special_ids([prefix], tokenizer.info) == [0, 1, 2, 3, 4, *extra]
    for index in range(30):
        batch = source.micro_batch(index)
        used = batch.masked_label_M >= 0
        assert used.sum() > 4 * 8
        assert not np.isin(batch.masked_label_M[used], extra).any()
        masked_to = batch.input_ids_BL.ravel()[batch.masked_index_M[used]]
        assert not np.isin(masked_to, extra).any()
        valid = strict.micro_batch(index).valid_BL
        assert not valid[np.isin(batch.input_ids_BL, [2, 3, *extra])].any()


def test_without_the_folder_the_five_are_known_and_a_warning_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(save_json(tmp_path / "tokenizer.json", PIECES))
    prefix = write(tmp_path / "a", tokenizer)
    with caplog.at_level(logging.WARNING, logger="taco"):
        logging.getLogger("taco").propagate = True
        assert special_ids([prefix], tokenizer.info) == [0, 1, 2, 3, 4]
    assert "a.tokenizer is missing" in caplog.text


def test_a_folder_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_json(tmp_path / "tokenizer.json", PIECES))
    other = load_tokenizer(save_json(tmp_path / "other.json", [*PIECES, "z"]))
    prefix = write(tmp_path / "a", tokenizer)
    other.save_pretrained(f"{prefix}.tokenizer")
    with pytest.raises(
        DataError,
        match=r"a\.tokenizer: holds another tokenizer .*expected .*\(tokenizer\.json, .*found .*\(other\.json, ",
    ):
        make_source(prefix)


def test_a_vocabulary_file_needs_no_folder(tmp_path: Path) -> None:
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    tokenizer = load_tokenizer(vocab)
    assert special_ids([write(tmp_path / "a", tokenizer)], tokenizer.info) == [0, 1, 2, 3, 4]
