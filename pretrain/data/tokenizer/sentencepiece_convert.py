"""A SentencePiece model as a `tokenizers` pipeline, so that transformers loads it without sentencepiece.

Used when a tokenizer is saved beside a dataset or an exported model. Models that `tokenizers` cannot express are
refused, and the result is compared with sentencepiece on sample lines. Three differences are inherent: in transformers,
a text that spells a special token ("[MASK]", "<s>") contains that token; if two segmentations have scores equal to six
digits, sentencepiece's 32-bit sums may choose the other one; and NFKC composes combining marks that follow a ligature
or are not in canonical order, which sentencepiece leaves unchanged.

transformers' own `SpmConverter` supports neither BPE nor character models, gives other ids for unigram models (spaces,
dummy prefix, symbols, characters joined by the character map), and takes two seconds to import.
`test_sentencepiece_convert.py` fails when that changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pretrain.errors import DataError

# ModelProto.SentencePiece.Type and TrainerSpec.ModelType of sentencepiece_model.proto.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE, WORD, CHAR = range(1, 5)
# Far below any log probability, so that no path of known pieces ever chooses a control piece.
_NEVER = -1000.0
# Characters hidden from NFKC are replaced by private-use ones; if there are more, the model does not use NFKC at all.
_PRIVATE_USE, _MOST_HIDDEN = 0x10FF00, 64

SAMPLE_LINES = (
    "The quick brown fox jumps over the lazy dog.",
    "  Two  spaces,\ttabs\u00a0and other\u3000blanks \n at both ends  ",
    'It\'s 1,234.50 € – or £ 17 (about 25 %)! "Really?" <yes> {no} [maybe] a_b@c.de',
    "Straße, Ægir, naïve, déjà vu, Łódź, ÿ, İstanbul, e\u0301",
    "ＡＢｃ １２ ① ﬁne ½ ™ ㎥",
    "Москва — столица. Αθήνα",
    "東富山站是鐵路車站，位於富山縣。",
    "吾輩は猫である。名前はまだ無い。ｶﾞﾗｽ",
    "한국어 हिन्दी ไทย עברית العربية",
    "👩\u200d👧 😀\u2581\u2581x \U00020000 \ufffd",
    "",
    " ",
)


def convert(model: Any, appended: Sequence[str], processor: Any, name: str) -> Any:
    """The `tokenizers.Tokenizer` with the same ids as `processor`, whose parsed ModelProto is `model`.

    `appended` are pieces after the model's own; `name` is used in errors.

    Raises:
        DataError: the model has a feature that `tokenizers` cannot express, or ids differ on a sample line.
    """
    from tokenizers import Tokenizer, pre_tokenizers

    _refuse_unsupported(model, name)
    build = _unigram if model.trainer_spec.model_type == UNIGRAM else _bpe
    tokenizer = Tokenizer(build(model, appended))
    spec = model.normalizer_spec
    tokenizer.normalizer = _normalizer(spec, processor)
    if _is_prefixed_once(spec):
        # Only the beginning of a text is prefixed, not what follows a special token inside it: in "a [MASK]." the full
        # stop is the piece that training shows after a word.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = _decoder(spec.add_dummy_prefix)
    _check(tokenizer, model, processor.encode, name)
    return tokenizer


def _refuse_unsupported(model: Any, name: str) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    is_unigram = trainer.model_type == UNIGRAM
    reasons = {
        "words as pieces (model_type word)": trainer.model_type == WORD,
        "treat_whitespace_as_suffix": trainer.treat_whitespace_as_suffix,
        "escape_whitespaces off": not normalizer.escape_whitespaces,
        "unused pieces": any(piece.type == UNUSED for piece in model.pieces),
        "user-defined symbols of several characters in a BPE model": not is_unigram
        and any(piece.type == USER_DEFINED and len(piece.piece) > 1 for piece in model.pieces),
    }
    unsupported = [reason for reason, is_present in reasons.items() if is_present]
    if unsupported:
        raise _conversion_error(name, f"it uses {', '.join(unsupported)}")


def _conversion_error(name: str, reason: str) -> DataError:
    return DataError(
        f"{name}: this SentencePiece model cannot be saved for transformers with the same ids: {reason}; "
        "train one with `taco data train-tokenizer`, or use a WordPiece vocabulary"
    )


def _unigram(model: Any, appended: Sequence[str]) -> Any:
    from tokenizers import models

    normal = [piece.score for piece in model.pieces if piece.type == NORMAL]
    lowest, highest = min(normal), max(normal)

    def score(piece: Any) -> float:
        if piece.type == USER_DEFINED:  # sentencepiece's own bonus, so that it is preferred to any split
            return len(piece.piece.encode()) * highest - 0.1
        return piece.score if piece.type in (NORMAL, BYTE) else lowest + _NEVER

    vocab = [(piece.piece, score(piece)) for piece in model.pieces]
    vocab += [(piece, lowest + _NEVER) for piece in appended]
    has_bytes = any(piece.type == BYTE for piece in model.pieces)
    return models.Unigram(vocab, unk_id=_unk_id(model), byte_fallback=has_bytes)


def _bpe(model: Any, appended: Sequence[str]) -> Any:
    """BPE whose merges are all ways to make a piece from two pieces, best score first; no merges for a CHAR model."""
    from tokenizers import models

    vocab = {piece.piece: index for index, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    merges = []
    if model.trainer_spec.model_type == BPE:
        for piece in sorted(scores, key=lambda text: -scores[text]):
            splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            merges += [(left, right) for left, right in splits if left in scores and right in scores]
    vocab |= {piece: len(vocab) + index for index, piece in enumerate(appended)}
    unk_token, has_bytes = model.pieces[_unk_id(model)].piece, any(piece.type == BYTE for piece in model.pieces)
    return models.BPE(vocab, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=has_bytes)


def _unk_id(model: Any) -> int:
    return next(index for index, piece in enumerate(model.pieces) if piece.type == UNKNOWN)


def _normalizer(spec: Any, processor: Any) -> Any:
    """The normalisation of sentencepiece's normalizer.cc: character map, spaces, dummy prefix, escaped spaces."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps += [*_compose(processor.normalize), normalizers.Precompiled(spec.precompiled_charsmap)]
    if _is_prefixed_once(
        spec
    ):  # Metaspace prefixes no text that begins with a space; a \u2581 of its own counts as one
        steps += [normalizers.Replace(Regex("\\A\u2581"), "\u2581\u2581"), normalizers.Replace(Regex(" {2,}"), " ")]
    elif spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix and not _is_prefixed_once(spec):
        steps.append(normalizers.Prepend("\u2581"))
    steps.append(normalizers.Replace(" ", "\u2581"))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex("\u2581+\\z"), ""))
    return normalizers.Sequence(steps)


def _is_prefixed_once(spec: Any) -> bool:
    """Whether a text gets a dummy prefix in place of the spaces that it begins with: the default of SentencePiece."""
    return bool(spec.add_dummy_prefix and spec.remove_extra_whitespaces)


def _compose(normalize: Callable[[str], str]) -> list[Any]:
    """Steps that compose pairs that the `tokenizers` character map leaves apart, as it reads one character at a time.

    It misses pairs such as half-width KA and its voicing mark. NFKC composes them, and is correct wherever the model's
    own map agrees; the few characters where it does not (the full-width tilde) are hidden from it.
    """
    from tokenizers import normalizers

    nfkc = normalizers.NFKC()
    changed = ((char, nfkc.normalize_str(char)) for char in map(chr, _characters()))
    hidden = [char for char, new in changed if new != char and normalize(f"x{char}x") != normalize(f"x{new}x")]
    if len(hidden) > _MOST_HIDDEN:  # not NFKC
        return []
    there = [normalizers.Replace(char, chr(_PRIVATE_USE + number)) for number, char in enumerate(hidden)]
    back = [normalizers.Replace(chr(_PRIVATE_USE + number), char) for number, char in enumerate(hidden)]
    return [*there, nfkc, *back]


def _characters() -> Iterator[int]:
    """Code points that a compatibility mapping may change: no surrogates, ideographs, syllables or private use."""
    for first, last in ((0x80, 0x3400), (0xA000, 0xAC00), (0xF900, 0x10000), (0x10000, 0x12000), (0x1D000, 0x20000)):
        yield from range(first, last)


def _decoder(has_dummy_prefix: bool) -> Any:
    from tokenizers import decoders

    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _check(tokenizer: Any, model: Any, encode: Callable[[str], list[int]], name: str) -> None:
    pieces = [piece.piece.replace("\u2581", " ") for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED)]
    symbols = [f"a {piece.piece}b" for piece in model.pieces if piece.type == USER_DEFINED]
    step = max(1, len(pieces) // 500)
    for line in (*SAMPLE_LINES, *pieces[::step], *symbols[:500]):
        expected, actual = encode(line), tokenizer.encode(line, add_special_tokens=False).ids
        if expected != actual:
            raise _conversion_error(name, f"{line!r} gives {expected} with sentencepiece and {actual} after conversion")
