"""Ids equal those of the reference libraries on hostile text; damaged vocabularies are refused with file and line."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from project import SHARED
from sentencepiece_models import train_sentencepiece

from pretrain.data.tokenizer import wordpiece as wordpiece_module
from pretrain.data.tokenizer.base import best_dtype
from pretrain.data.tokenizer.load import (
    OtherTokenizerError,
    Tokenizer,
    find_dataset_tokenizer,
    load_dataset_tokenizer,
    load_tokenizer,
)
from pretrain.data.tokenizer.sentencepiece_convert import SAMPLE_LINES
from pretrain.errors import DataError

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared corpora; set TACO_SHARED_DATA")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "cat", "sat", "un", "##able", "##s", "a", "e", "é", "The", ",", ".", "'", "##e", "中", "##a", "ss", "1"]
# Letters of many scripts, combining marks, blanks, controls, emoji, private use: what breaks normalizers.
HOSTILE = st.lists(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(
            "aeAÉßİıſ\u0301\u0327\u0345\u1a16ﾞ \t\r\n\x00\x0b\u00a0\u00ad\u200b\u2028\u3000\ufeff中가ガｶ~～ﬁ👩\u200d"
        ),
        st.sampled_from(["[MASK]", "##s", " the", "[unk", "\u2581", "</s>", "unable"]),
    ),
    max_size=40,
).map("".join)


def write_vocab(folder: Path, pieces: list[str], ending: str = "\n") -> Path:
    path = folder / "vocab.txt"
    path.write_bytes("".join(piece + ending for piece in pieces).encode())
    return path


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of each text by `Tokenizer.encode`."""
    ids, lengths = tokenizer.encode(texts)
    assert (ids.dtype, lengths.dtype) == (best_dtype(tokenizer.vocab_size), np.int64)
    assert (ids.ndim, lengths.shape, ids.size) == (1, (len(texts),), lengths.sum())
    return [part.tolist() for part in np.split(ids, lengths.cumsum()[:-1])] if texts else []


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_vocab(tmp_path_factory.mktemp("wordpiece"), SPECIAL + WORDS))


@pytest.fixture(scope="module")
def references() -> tuple[object, object]:
    transformers = pytest.importorskip("transformers")
    vocab = {piece: index for index, piece in enumerate(SPECIAL + WORDS)}
    build = transformers.BertTokenizerFast
    return build(vocab=vocab, do_lower_case=True), build(vocab=vocab, do_lower_case=False)


@settings(max_examples=400, deadline=None)
@given(text=HOSTILE)
def test_wordpiece_ids_equal_bert_tokenizer_fast(
    text: str, references: tuple, tmp_path_factory: pytest.TempPathFactory
):
    path = write_vocab(tmp_path_factory.mktemp("vocab"), SPECIAL + WORDS)
    for cased, reference in zip((False, True), references, strict=True):
        expected = reference(text, add_special_tokens=False).input_ids
        tokenizer = load_tokenizer(path, cased=cased)
        assert tokenizer.encode_batch([text]) == encode(tokenizer, [text]) == [expected]


@pytest.mark.slow
@needs_shared
@settings(max_examples=400, deadline=None)
@given(texts=st.lists(HOSTILE, min_size=1, max_size=4))
@pytest.mark.parametrize("name", ["bert-base-uncased", "bert-base-chinese"])
def test_published_vocabularies(name: str, texts: list[str]):
    path = SHARED / "vocab" / name / "vocab.txt"
    ours, reference = published(path)
    expected = [reference(text, add_special_tokens=False).input_ids for text in texts]
    assert ours.encode_batch(texts) == encode(ours, texts) == expected


_CACHE: dict[Path, tuple] = {}


def published(path: Path) -> tuple:
    transformers = pytest.importorskip("transformers")
    if path not in _CACHE:
        vocab = {line: index for index, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"))}
        _CACHE[path] = load_tokenizer(path), transformers.BertTokenizerFast(vocab=vocab, do_lower_case=True)
    return _CACHE[path]


@needs_shared
@settings(max_examples=300, deadline=None)
@given(texts=st.lists(HOSTILE, max_size=4))
@pytest.mark.parametrize("name", ["spm_albert_like/30k-clean", "spm_google_test/test_ja_model", "spm_yeast/spiece"])
def test_sentencepiece_ids_equal_sentencepiece(name: str, texts: list[str]):
    from sentencepiece import SentencePieceProcessor

    path = SHARED / "vocab" / f"{name}.model"
    if path not in _CACHE:
        _CACHE[path] = load_tokenizer(path), SentencePieceProcessor(model_file=str(path))
    ours, reference = _CACHE[path]
    assert ours.encode_batch(texts) == encode(ours, texts) == [reference.encode(text) for text in texts]


def test_long_texts_are_cut_where_ids_do_not_change(wordpiece: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    text = "The cat\u0301s sat, unable\n \u0301中é1  中中sats [MASK] " * 50
    whole = wordpiece.encode_batch([text])
    for size in (1, 7, 64, 1000):
        monkeypatch.setattr(wordpiece_module, "_PART_CHARACTERS", size)
        assert wordpiece.encode_batch([text, ""]) == [*whole, []]


def test_endless_word_is_one_unknown_token(wordpiece: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wordpiece_module, "_PART_CHARACTERS", 100)
    assert wordpiece.encode_batch(["a" * 10_000]) == [[wordpiece.special.unk]]


def test_wordpiece_face(wordpiece: Tokenizer):
    assert wordpiece.vocab_size == len(SPECIAL + WORDS)
    assert wordpiece.special_ids() == [0, 1, 2, 3, 4]
    assert [(SPECIAL + WORDS)[i] for i in np.flatnonzero(wordpiece.continues_word())] == ["##able", "##s", "##e", "##a"]
    ids = wordpiece.encode_batch(["The cats, unable"])[0]
    assert wordpiece.decode([2, *ids, 3]) == "[CLS] the cats, unable [SEP]"


def test_hash_is_that_of_the_file_and_cased_enters_it(tmp_path: Path):
    path = write_vocab(tmp_path, SPECIAL + WORDS)
    assert load_tokenizer(path).info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_tokenizer(path, cased=True).info.sha256 != load_tokenizer(path).info.sha256


def test_windows_line_ends_and_odd_pieces_keep_their_ids(tmp_path: Path):
    pieces = [*SPECIAL, "a", "\u2028", "##\u2028", "\x85", "b"]
    tokenizer = load_tokenizer(write_vocab(tmp_path, pieces, ending="\r\n"))
    assert tokenizer.vocab_size == len(pieces)
    assert tokenizer.encode_batch(["a b"]) == [[5, 9]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\na\n", ["vocab.txt:8", "'a'", "line 6"]),
        ("[PAD]\n[UNK]\n\n[CLS]\n[SEP]\n[MASK]\n", ["vocab.txt:3", "empty line"]),
        ("[PAD]\n[UNK]\n[CLS]\na\n", ["vocab.txt", "[SEP], [MASK]", "train-tokenizer"]),
        ("", ["vocab.txt", "empty"]),
        ("\ufeff[PAD]\n[UNK]\n", ["byte-order mark", "tail -c +4 ", "> vocab.new.txt"]),
        (b"[PAD]\n\xff\n", ["vocab.txt", "byte 6", "UTF-8"]),
    ],
)
def test_bad_vocabularies_are_refused(tmp_path: Path, content: str | bytes, words: list[str]):
    path = tmp_path / "vocab.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        load_tokenizer(path)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("index", "words"),
    [(2**27, "'zzz' has the id 134,217,728"), (-1, "has the id -1"), (5, "'the' and 'zzz' share the id 5")],
)
@pytest.mark.parametrize("place", ["vocab", "added_tokens"])
def test_ids_that_would_make_huge_or_torn_tables_are_refused(
    tmp_path: Path, wordpiece: Tokenizer, index: int, words: str, place: str
):
    wordpiece.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    if place == "vocab":
        fields["model"]["vocab"]["zzz"] = index
    else:
        fields["added_tokens"].append({**fields["added_tokens"][0], "content": "zzz", "id": index})
    (tmp_path / "other.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(DataError, match=words):
        load_tokenizer(tmp_path / "other.json")


@pytest.mark.parametrize(
    "name", ["missing.txt", "missing.model", "tokenizer.json", "x.model", "y.json", "z.bin", "folder"]
)
def test_missing_damaged_or_unknown_files_are_refused(tmp_path: Path, name: str):
    for damaged in ("x.model", "y.json", "z.bin"):
        (tmp_path / damaged).write_bytes(b"\x0a\x03damaged")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=name):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("kind", ["unigram", "bpe", "char"])
def test_sentencepiece_without_special_pieces_gets_them_at_the_end(tmp_path: Path, kind: str):
    path = train_sentencepiece(tmp_path, kind)
    tokenizer = load_tokenizer(path)
    size, special = tokenizer.vocab_size, tokenizer.special
    assert (special.unk, special.pad, special.cls, special.sep, special.mask) == (
        0,
        size - 4,
        size - 3,
        size - 2,
        size - 1,
    )
    assert tokenizer.special_ids() == [0, 1, 2, size - 4, size - 3, size - 2, size - 1]
    assert tokenizer.continues_word().shape == (size,)
    ids = tokenizer.encode_batch(["the cat [MASK]"])[0]
    assert special.mask not in ids
    assert (
        tokenizer.decode([special.cls, *tokenizer.encode_batch(["the cat"])[0], special.sep]) == "[CLS] the cat [SEP]"
    )


@pytest.mark.parametrize("kind", ["unigram", "bpe", "char"])
@pytest.mark.parametrize(
    "options", [{}, {"byte_fallback": True, "vocab_size": 330}, {"user_defined_symbols": ["@", "€"]}]
)
def test_saved_sentencepiece_agrees_in_transformers(tmp_path: Path, kind: str, options: dict):
    if kind == "char" and "byte_fallback" in options:
        pytest.skip("sentencepiece trains no character model with bytes")
    path = train_sentencepiece(tmp_path, kind, **options)
    assert_saved_agrees(load_tokenizer(path), tmp_path / "saved")


@needs_shared
@pytest.mark.parametrize("name", ["30k-clean", "test_model", "test_ja_model", "spiece"])
def test_saved_published_models_agree_in_transformers(tmp_path: Path, name: str):
    path = next((SHARED / "vocab").glob(f"*/{name}.model"))
    assert_saved_agrees(load_tokenizer(path), tmp_path / "saved")


@pytest.mark.parametrize("cased", [False, True])
def test_saved_wordpiece_agrees_in_transformers(tmp_path: Path, cased: bool):
    tokenizer = load_tokenizer(write_vocab(tmp_path, SPECIAL + WORDS), cased=cased)
    assert_saved_agrees(tokenizer, tmp_path / "saved", "The cats, UNABLE é [MASK] e\u0301")


def assert_saved_agrees(tokenizer: Tokenizer, folder: Path, *more_lines: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save_pretrained(folder, max_length=77)
    theirs, special = transformers.AutoTokenizer.from_pretrained(folder), tokenizer.special
    for line in (*SAMPLE_LINES, "the cat sat @ the mat", "ｶﾞ か\u3099 ４\u0326 Ａ\u0301 ～", *more_lines):
        assert theirs.encode(line, add_special_tokens=False) == tokenizer.encode_batch([line])[0], line
    a, b = tokenizer.encode_batch(["the cat", "sat"])
    assert theirs("the cat", "sat").input_ids == [special.cls, *a, special.sep, *b, special.sep]
    assert theirs("the cat", "sat").token_type_ids == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert theirs.encode("the [MASK]").count(special.mask) == 1
    assert (theirs.pad_token_id, theirs.unk_token_id, theirs.mask_token_id) == (special.pad, special.unk, special.mask)
    assert (theirs.cls_token_id, theirs.sep_token_id, theirs.model_max_length) == (special.cls, special.sep, 77)
    assert len(theirs) == tokenizer.vocab_size
    again = load_tokenizer(folder)
    assert again.info == tokenizer.info
    assert again.encode_batch(["the cat"]) == [a]


def test_model_that_cannot_be_converted_is_refused_at_saving(tmp_path: Path):
    tokenizer = load_tokenizer(train_sentencepiece(tmp_path, treat_whitespace_as_suffix=True))
    with pytest.raises(DataError, match="small.model.*treat_whitespace_as_suffix"):
        tokenizer.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_conversion_that_changes_ids_is_refused(tmp_path: Path):
    tokenizer = load_tokenizer(train_sentencepiece(tmp_path))
    max(tokenizer._model.pieces, key=lambda piece: len(piece.piece)).score = -99.0
    with pytest.raises(DataError, match="gives .* with sentencepiece and .* after conversion"):
        tokenizer.save_pretrained(tmp_path / "saved")


def test_tokenizer_json_is_read_without_its_truncation(tmp_path: Path, wordpiece: Tokenizer):
    from tokenizers import Tokenizer as Pipeline

    wordpiece.save_pretrained(tmp_path)
    pipeline = Pipeline.from_file(str(tmp_path / "tokenizer.json"))
    pipeline.enable_truncation(4)
    pipeline.enable_padding(length=16)
    pipeline.save(str(tmp_path / "other.json"))
    tokenizer = load_tokenizer(tmp_path / "other.json")
    assert tokenizer.info.kind == "tokenizer.json"
    assert not tokenizer.info.cased
    assert tokenizer.special == wordpiece.special
    assert tokenizer.encode_batch(["the cat " * 20]) == wordpiece.encode_batch(["the cat " * 20])
    assert encode(tokenizer, ["the cat " * 20, "", "cats"]) == wordpiece.encode_batch(["the cat " * 20, "", "cats"])
    assert (tokenizer.continues_word() == wordpiece.continues_word()).all()
    assert_saved_agrees(tokenizer, tmp_path / "saved", "The cats, UNABLE")
    with pytest.raises(DataError, match="folds case"):
        load_tokenizer(tmp_path / "other.json", cased=True)


def test_a_saved_folder_that_folds_case_cannot_be_read_as_cased(tmp_path: Path, wordpiece: Tokenizer):
    wordpiece.save_pretrained(tmp_path / "saved")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "tokenizer.json").write_bytes((tmp_path / "saved" / "tokenizer.json").read_bytes())
    for name in ("saved", "plain"):
        assert not load_tokenizer(tmp_path / name).info.cased
        with pytest.raises(DataError, match="`cased` was asked for"):
            load_tokenizer(tmp_path / name, cased=True)


def test_the_tokenizer_beside_a_dataset_is_the_one_that_made_it(tmp_path: Path, wordpiece: Tokenizer):
    prefix = tmp_path / "data.v1"
    assert find_dataset_tokenizer(prefix, wordpiece.info) is None
    with pytest.raises(DataError, match=r"data\.v1\.tokenizer: is missing; copy it"):
        load_dataset_tokenizer(prefix, wordpiece.info)
    wordpiece.save_pretrained(f"{prefix}.tokenizer")
    for open_it in (find_dataset_tokenizer, load_dataset_tokenizer):
        tokenizer = open_it(prefix, wordpiece.info)
        assert tokenizer is not None
        assert tokenizer.info == wordpiece.info
        other = replace(wordpiece.info, sha256="ab" * 32, name="other.txt")
        with pytest.raises(OtherTokenizerError, match=r"expected .* abab\w+ \(other\.txt, .*found \w+ \(vocab\.txt, "):
            open_it(prefix, other)


def test_a_folder_of_transformers_with_only_a_vocabulary_is_read_with_its_casing(tmp_path: Path):
    write_vocab(tmp_path, [*SPECIAL, *WORDS])
    assert load_tokenizer(tmp_path).info.cased is False
    assert load_tokenizer(tmp_path, cased=True).info.cased is True
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}', encoding="utf-8")
    assert load_tokenizer(tmp_path).encode_batch(["The"]) == [[5 + WORDS.index("The")]]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}', encoding="utf-8")
    with pytest.raises(DataError, match="folds case"):
        load_tokenizer(tmp_path, cased=True)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["a.model", "b.model"], "holds 2 SentencePiece models; name one, such as .*a.model"),
        (["vocab.json", "merges.txt"], "save_pretrained"),
        (["model.safetensors"], "holds no tokenizer.json, vocab.txt or SentencePiece .model"),
    ],
)
def test_a_folder_without_a_tokenizer_says_what_it_holds(tmp_path: Path, files: list[str], words: str):
    for name in files:
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=words) as caught:
        load_tokenizer(tmp_path)
    assert "damaged" not in str(caught.value)


def test_a_pipeline_that_fails_at_unknown_text_is_refused(tmp_path: Path, wordpiece: Tokenizer):
    wordpiece.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    fields["model"]["unk_token"] = "<none>"
    (tmp_path / "other.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(DataError, match=r"other.json: cannot encode text outside its vocabulary .*unk_token"):
        load_tokenizer(tmp_path / "other.json")


@pytest.mark.parametrize("name", ["bert-base-uncased", "google/electra-small"])
def test_a_name_of_the_hub_says_how_to_fetch_it(name: str):
    with pytest.raises(DataError, match=f"no such file or folder.*hf download {name} --local-dir FOLDER"):
        load_tokenizer(name)


def test_the_prefix_of_a_dataset_leads_to_its_tokenizer(tmp_path: Path, wordpiece: Tokenizer):
    wordpiece.save_pretrained(tmp_path / "train.tokenizer")
    with pytest.raises(DataError, match=r"the tokenizer of that dataset is .*train\.tokenizer$"):
        load_tokenizer(tmp_path / "train")


def test_unwritable_folder_is_an_error(tmp_path: Path, wordpiece: Tokenizer):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        wordpiece.save_pretrained(tmp_path / "file" / "saved")


def test_half_a_surrogate_pair_is_refused_by_every_kind(tmp_path: Path, wordpiece: Tokenizer):
    wordpiece.save_pretrained(tmp_path / "saved")
    others = [tmp_path / "saved" / "tokenizer.json", train_sentencepiece(tmp_path)]
    for tokenizer in (wordpiece, *map(load_tokenizer, others)):
        with pytest.raises(DataError, match=r"text 1 of 2: character 4 is U\+D83D, half of a surrogate pair"):
            tokenizer.encode(["the cat", "the \ud83d cat"])
        with pytest.raises(TypeError):
            tokenizer.encode(["the cat", 7])
        assert encode(tokenizer, []) == []
        assert encode(tokenizer, ["", " "]) == [[], []]
