"""A converted SentencePiece model gives sentencepiece's ids on texts where transformers' own converter does not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from project import SHARED
from sentencepiece_models import train_sentencepiece

from pretrain.data.tokenizer.load import load_tokenizer
from pretrain.data.tokenizer.sentencepiece_convert import SAMPLE_LINES

LINES = [
    "the cat sat on the mat",
    "the  cat\tsat   on <sep> the mat ",
    " unable  to see 25 % @ home",
    "ｶﾞﾗｽ ﬁne ½ ™ ÉCOLE ☃ \u3053",
    "東富山站是鐵路車站。 吾輩は猫である。",
    "é e\u0301 \u00a0 \u200b 👩\u200d👧 \ufffd",
    *SAMPLE_LINES,
]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{kind}-{name}": (kind, options)
    for kind in ("unigram", "bpe", "char")
    for name, options in {
        "plain": {},
        "bytes": {"byte_fallback": True, "vocab_size": 640},
        "symbols": {"user_defined_symbols": ["@", "€"]},
        "no-prefix": {"add_dummy_prefix": False},
        "blanks": {"remove_extra_whitespaces": False},
        "identity": {"normalization_rule_name": "identity"},
        "nfkc": {"normalization_rule_name": "nfkc"},
        "folded": {"normalization_rule_name": "nmt_nfkc_cf"},
    }.items()
    if (kind, name) != ("char", "bytes")  # sentencepiece trains no such model
}
MODELS["unigram-words"] = ("unigram", {"user_defined_symbols": ["cat", "<sep>"]})
# What transformers' converter does as well, on these lines.
AS_GOOD = {"unigram-identity"}


def ids_by_transformers(path: Path, has_prefix: bool) -> list[list[int]] | None:
    """The ids of transformers' converter, None where it fails."""
    converters = pytest.importorskip("transformers.convert_slow_tokenizer")

    class WithBytes(converters.SpmConverter):  # type: ignore[misc, name-defined]
        handle_byte_fallback = True

    try:
        pipeline = WithBytes(SimpleNamespace(vocab_file=str(path), add_prefix_space=has_prefix)).converted()
    except Exception:  # noqa: BLE001 - it raises plain Exception for what it does not know
        return None
    return [pipeline.encode(line, add_special_tokens=False).ids for line in LINES]


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_sentencepiece_and_those_of_transformers_are_not(tmp_path: Path, name: str) -> None:
    kind, options = MODELS[name]
    lines = [line for line in LINES if line.strip()] * 20
    path = train_sentencepiece(tmp_path, kind, lines, **{"vocab_size": 300, **options})
    tokenizer = load_tokenizer(path)
    expected, pipeline = tokenizer.encode_batch(LINES), tokenizer._to_tokenizers()
    assert [pipeline.encode(line, add_special_tokens=False).ids for line in LINES] == expected
    # Where this fails, transformers has caught up: let it convert, and remove what is ours.
    theirs = ids_by_transformers(path, options.get("add_dummy_prefix", True))
    assert (theirs == expected) == (name in AS_GOOD)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared corpora; set TACO_SHARED_DATA")
@pytest.mark.parametrize("name", ["30k-clean", "test_model", "test_ja_model", "spiece"])
def test_published_models(name: str) -> None:
    path = next((SHARED / "vocab").glob(f"*/{name}.model"))
    tokenizer = load_tokenizer(path)
    pipeline = tokenizer._to_tokenizers()
    assert [pipeline.encode(line, add_special_tokens=False).ids for line in LINES] == tokenizer.encode_batch(LINES)
