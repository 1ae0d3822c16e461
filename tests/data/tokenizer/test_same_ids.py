"""Tokenizers from different files are the same if they give the same ids."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpora import write_vocab

from pretrain.data.tokenizer.load import load_tokenizer
from pretrain.data.tokenizer.same_ids import find_difference


@pytest.fixture
def vocab(tmp_path: Path) -> Path:
    return write_vocab(tmp_path)


def test_the_same_pieces_from_other_bytes_are_the_same(vocab: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(vocab)
    (tmp_path / "crlf.txt").write_bytes(vocab.read_bytes().replace(b"\n", b"\r\n"))
    tokenizer.save_pretrained(tmp_path / "saved")
    for path in (vocab, tmp_path / "crlf.txt", tmp_path / "saved" / "tokenizer.json"):
        assert find_difference(tokenizer, load_tokenizer(path)) is None


def test_differences_are_shown_by_an_example(vocab: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(vocab)
    pieces = vocab.read_text(encoding="utf-8").split("\n")[:-1]
    (tmp_path / "other.txt").write_text("\n".join([*pieces[:-2], pieces[-1], pieces[-2]]), encoding="utf-8")
    (tmp_path / "more.txt").write_text("\n".join([*pieces, "##yy"]), encoding="utf-8")
    swapped = find_difference(tokenizer, load_tokenizer(tmp_path / "other.txt"))
    assert swapped == f"id {len(pieces) - 2} is '##y' in one and '##z' in the other"
    assert find_difference(tokenizer, load_tokenizer(tmp_path / "more.txt")) == "one has 64 pieces, the other 65"
    cased = find_difference(tokenizer, load_tokenizer(vocab, cased=True))
    assert cased is not None
    assert "'The Quick brown" in cased


def test_the_order_of_merges_is_seen(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = {piece: index for index, piece in enumerate([*special, "a", "b", "c", "ab", "bc"])}
    for name, merges in (("left", [("a", "b"), ("b", "c")]), ("right", [("b", "c"), ("a", "b")])):
        pipeline = Tokenizer(models.BPE(pieces, merges, unk_token="[UNK]"))
        pipeline.pre_tokenizer = pre_tokenizers.Whitespace()
        pipeline.save(str(tmp_path / f"{name}.json"))
    left, right = load_tokenizer(tmp_path / "left.json"), load_tokenizer(tmp_path / "right.json")
    difference = find_difference(left, right)
    assert difference is not None
    assert "ab c" in difference.partition(" in one and ")[0]
