"""The saved folder gives the ids of the file given, special tokens inside the text included, in every class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece_models import train_sentencepiece
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Pipeline

from data_tools.vocabulary.learn_vocabulary import learn_byte_bpe
from pretrain.data.tokenizer.casing import casing_mismatch
from pretrain.data.tokenizer.load import load_tokenizer

transformers = pytest.importorskip("transformers")
TEXTS = ["the tax will be made of it", "the house of lords said that the tax was made"] * 20
ROBERTA, BERT = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def lines(cls: str, sep: str, mask: str) -> list[str]:
    return [
        f"the tax {mask} be made",
        f"the tax{mask}, {mask} made ",
        f"{cls} the {sep}",
        f" {mask}{mask}\tof\u3000it",
        "The HOUSE é ﬁ ",
        "",
    ]


def train(kind: str, tokens: list[str], **flags: bool) -> Pipeline:
    """A pipeline with special `tokens`, the last of which is the mask with `flags`."""
    added = [AddedToken(token, special=True, normalized=False) for token in tokens[:-1]]
    added.append(AddedToken(tokens[-1], special=True, **{"normalized": False, **flags}))
    if kind == "byte-level":
        pipeline = Pipeline(models.BPE())
        pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        pipeline.post_processor = processors.ByteLevel(trim_offsets=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=320, special_tokens=added, initial_alphabet=alphabet)
    else:
        pipeline = Pipeline(models.Unigram())
        pipeline.normalizer = normalizers.NFKC()
        pipeline.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        unk = next(token for token in tokens if "unk" in token.lower())
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=added, unk_token=unk)
    pipeline.train_from_iterator(TEXTS, trainer)
    return pipeline


def roberta_like() -> Pipeline:
    pipeline = train("byte-level", ROBERTA, lstrip=True)
    pipeline.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    pipeline.enable_truncation(4)
    pipeline.enable_padding(length=64, pad_id=1, pad_token="<pad>")
    return pipeline


def prefixed_byte_level() -> Pipeline:
    pipeline = train("byte-level", ROBERTA, lstrip=True)
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return pipeline


def with_dropout() -> Pipeline:
    pipeline = train("byte-level", ROBERTA, lstrip=True)
    pipeline.model.dropout = 0.5
    return pipeline


def albert_like() -> Pipeline:
    pipeline = train("unigram", BERT, lstrip=True, normalized=True)
    pipeline.add_special_tokens([AddedToken("<extra>", single_word=True, rstrip=True)])
    return pipeline


KINDS = {
    "roberta": (roberta_like, ROBERTA),
    "byte-level": (lambda: train("byte-level", ROBERTA), ROBERTA),
    "byte-level, prefixed": (prefixed_byte_level, ROBERTA),
    "byte-level, dropout": (with_dropout, ROBERTA),
    "unigram": (lambda: train("unigram", BERT, rstrip=True), BERT),
    "albert": (albert_like, BERT),
    "xlm-roberta": (lambda: train("unigram", ROBERTA, lstrip=True), ROBERTA),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_json_stays_what_it_was(kind: str, tmp_path: Path) -> None:
    make, names = KINDS[kind]
    make().save(str(tmp_path / "given.json"))
    given = Pipeline.from_file(str(tmp_path / "given.json"))
    given.no_truncation()
    given.no_padding()
    if kind == "byte-level, dropout":
        given.model.dropout = None
    tokenizer = load_tokenizer(tmp_path / "given.json")
    tokenizer.save_pretrained(tmp_path / "saved", max_length=16)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    cls, sep, mask = (next(name for name in names if name in pair) for pair in (("[CLS]", "<s>"), ("[SEP]", "</s>"), (
        "[MASK]", "<mask>")))  # fmt: skip
    for line in [*lines(cls, sep, mask), "a <extra>b <extra> c", "the tax " * 40]:
        ids = given.encode(line, add_special_tokens=False).ids
        assert saved(line, add_special_tokens=False).input_ids == ids, line
        assert saved(line).input_ids == [saved.cls_token_id, *ids, saved.sep_token_id], line
        assert tokenizer.encode_batch([line]) == [ids]
    assert len(saved("the tax " * 40, truncation=True).input_ids) == 16
    flags = {token.content: repr(token) for token in given.get_added_tokens_decoder().values()}
    kept = Pipeline.from_file(str(tmp_path / "saved" / "tokenizer.json")).get_added_tokens_decoder().values()
    assert {token.content: repr(token) for token in kept} == flags


def test_a_post_processor_with_another_frame_gives_way_to_that_of_training_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = train("unigram", ROBERTA)
    pipeline.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    pipeline.save(str(tmp_path / "given.json"))
    load_tokenizer(tmp_path / "given.json").save_pretrained(tmp_path / "saved")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = saved("the tax").input_ids
    assert (ids[0], ids[-1], len(ids)) == (0, 2, len(saved.tokenize("the tax")) + 2)
    assert "given.json: its post-processor" in caplog.text


@pytest.mark.parametrize("cased", [False, True])
def test_every_class_of_bert_gives_the_same_ids(cased: bool, tmp_path: Path) -> None:
    pieces = [*BERT, "The", "the", "tax", "made", "é", "e", "##s", "HOUSE", "house"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    tokenizer = load_tokenizer(tmp_path / "vocab.txt", cased=cased)
    tokenizer.save_pretrained(tmp_path / "saved", max_length=7)
    for name in ("AutoTokenizer", "BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast"):
        saved = getattr(transformers, name).from_pretrained(tmp_path / "saved")
        assert saved.model_max_length == 7
        for line in lines("[CLS]", "[SEP]", "[MASK]"):
            (ids,) = tokenizer.encode_batch([line])
            assert saved(line, add_special_tokens=False).input_ids == ids, (name, line)
            assert saved(line).input_ids == [tokenizer.special.cls, *ids, tokenizer.special.sep], (name, line)


def test_a_mask_takes_the_space_that_belongs_to_its_piece(tmp_path: Path) -> None:
    (tmp_path / "bpe.json").write_bytes(learn_byte_bpe(TEXTS, 300, cased=True))
    trained = {
        token["content"]: token["lstrip"] for token in json.loads((tmp_path / "bpe.json").read_text())["added_tokens"]
    }
    assert [token for token, lstrip in trained.items() if lstrip] == ["[MASK]"]
    paths = [tmp_path / "bpe.json"]
    for name, options in (("plain", {}), ("spaces", {"remove_extra_whitespaces": False})):
        (tmp_path / name).mkdir()
        paths.append(train_sentencepiece(tmp_path / name, "unigram", **options))
    for path in paths:
        tokenizer = load_tokenizer(path)
        tokenizer.save_pretrained(tmp_path / "saved")
        saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
        for text, masked in (("the cat sat", "the cat [MASK] sat"), ("the cat, the", "the cat [MASK], the")):
            before, after = tokenizer.encode_batch(["the cat", text])
            ids = saved(masked, add_special_tokens=False).input_ids
            if path.parent.name != "spaces" or "," not in text:  # there a dummy prefix follows the mask
                assert ids == [*before, saved.mask_token_id, *after[len(before) :]], (path, masked)


@pytest.mark.parametrize(
    ("pieces", "cased", "words"),
    [
        (["The", "the", "##X", "é"], False, ["looks cased: 3 of its 4 pieces (75.0 %)", "The, ##X, é", "add --cased"]),
        (["a", "b", "é"], False, ["1 of its 3 pieces", "have accents (é)", "tokenizer.json"]),
        (["a", "b", "the"], True, ["looks uncased: of its 2 letters 2 have no capital (A, B)", "leave out --cased"]),
        (["a", "b", "the", "[unused1]", "中"], False, []),
        (["a", "A", "b", "B", "The"], True, []),
    ],
)
def test_a_vocabulary_of_the_other_casing_is_noticed(
    pieces: list[str], cased: bool, words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*BERT, *pieces]) + "\n")
    tokenizer = load_tokenizer(tmp_path / "vocab.txt", cased=cased)
    message = casing_mismatch(tokenizer)
    assert (message is None) == (not words)
    assert all(word in (message or "") for word in words), message
    tokenizer.save_pretrained(tmp_path / "saved")
    message = casing_mismatch(load_tokenizer(tmp_path / "saved" / "tokenizer.json"))  # strips accents by itself
    assert (message is None) == (not words or pieces == ["a", "b", "é"])
    assert message is None or '"lowercase" of its normalizer' in message
