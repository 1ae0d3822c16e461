"""Learns vocabularies: WordPiece, byte-level BPE, SentencePiece. The same texts give the same file, byte for byte.

The same libraries learn and tokenise (`tokenizers`, `sentencepiece`); where they are not deterministic, this module
makes them so. Special tokens come first in every vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from data_tools.sizes import SMALLEST_VOCABULARY
from pretrain.errors import ConfigError, DataError, VocabularySizeError

# Longer lines are cut: SentencePiece's time grows with them, and it skips very long ones.
_LINE_CHARACTERS = 4000
# Longer words are cut: a merge takes time for every character of every word. Real ones are shorter.
_WORD_CHARACTERS = 1000
_LONG_WORD = re.compile(rf"\S{{{_WORD_CHARACTERS + 1},}}")
_MIN_FREQUENCY = 2
_NUM_CODES = 0x110000
_COUNTED_AT_ONCE = 1 << 20  # characters
_WORD, _BLANK, _ALONE = 1, 2, 3
NOTHING_LEARNT = "the text has no word; check the corpus, --json-key and --hash-range"


def learn_wordpiece(texts: Sequence[str], vocab_size: int, cased: bool) -> bytes:
    """The bytes of a vocab.txt of exactly `vocab_size` pieces: special ones, characters in order, then merges.

    Characters take at most half of the vocabulary, or the share (up to 7/8) of words of one character, such as
    ideographs, in the text. Space that merges do not use goes to further characters.

    The library numbers characters inside words in the order of a hash table, which differs from run to run and decides
    between equally frequent merges. So the characters are counted first and passed to it as fixed pieces.

    Raises:
        VocabularySizeError: the texts have too few different words.
        DataError: they have no word.
    """
    from tokenizers import trainers

    from pretrain.data.tokenizer.load import WORDPIECE_SPECIAL, wordpiece_pipeline

    special = {piece: index for index, piece in enumerate(WORDPIECE_SPECIAL)}
    counts = _count_characters(wordpiece_pipeline(special, cased), texts)
    room = vocab_size - len(WORDPIECE_SPECIAL)
    ranked = _rank_characters(counts)
    # Little text may have too few merges with half of its characters: then all of them take part. So any size up to
    # the largest that a text gives can be had.
    for share in (counts.share_of_vocabulary, 1.0):
        fixed = [*WORDPIECE_SPECIAL, *_choose_alphabet(ranked, int(room * share))]
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=fixed,
            limit_alphabet=0,
            show_progress=False,
            min_frequency=_MIN_FREQUENCY,
        )
        pipeline = wordpiece_pipeline(special, cased)  # a new one: learning makes characters its special tokens
        pipeline.train_from_iterator(_without_long_words(texts), trainer)
        vocab = pipeline.get_vocab()
        pieces = sorted(vocab, key=lambda piece: vocab[piece])
        further = (piece for group in ranked for piece in group if piece not in vocab)
        pieces += islice(further, vocab_size - len(pieces))
        if len(pieces) == vocab_size or len(fixed) == len(special) + sum(map(len, ranked)):
            break
    _check_size(len(pieces), vocab_size)
    return "".join(f"{piece}\n" for piece in pieces).encode()


def learn_byte_bpe(texts: Sequence[str], vocab_size: int, cased: bool) -> bytes:
    """The bytes of a tokenizer.json: byte-level BPE over NFC, lowercased unless `cased`, without unknown tokens.

    Raises:
        ConfigError: `vocab_size` has no room for the special tokens and the 256 bytes.
        VocabularySizeError: the texts have too few different words.
        DataError: they have no word.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    from pretrain.data.tokenizer.load import WORDPIECE_SPECIAL

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(WORDPIECE_SPECIAL) + len(alphabet)
    if vocab_size < smallest:
        raise ConfigError(
            f"--vocab-size {vocab_size}: bpe needs {smallest} or more, for 256 bytes and the special tokens"
        )
    if not any(text.strip() for text in texts):
        raise DataError(NOTHING_LEARNT)
    pipeline = Tokenizer(models.BPE())
    steps = [normalizers.NFC()] if cased else [normalizers.NFC(), normalizers.Lowercase()]
    pipeline.normalizer = normalizers.Sequence(steps)
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    # A mask stands for a piece with the space before it, so in a text it takes that space.
    special = [
        AddedToken(token, special=True, normalized=False, lstrip=token == "[MASK]") for token in WORDPIECE_SPECIAL
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        min_frequency=_MIN_FREQUENCY,
        show_progress=False,
    )
    pipeline.train_from_iterator(_without_long_words(texts), trainer)
    _check_size(pipeline.get_vocab_size(), vocab_size)
    frame = [(token, pipeline.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    pipeline.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=frame
    )
    return pipeline.to_str(pretty=True).encode()


def learn_sentencepiece(texts: Sequence[str], vocab_size: int, cased: bool, algorithm: str) -> bytes:
    """The bytes of a SentencePiece model with <pad> <unk> [CLS] [SEP] [MASK] as its first pieces.

    `algorithm` is "unigram" or "bpe".

    Raises:
        VocabularySizeError: `vocab_size` does not suit the texts; it names a size that does.
        DataError: no size does, or the texts have no word.
    """
    from pretrain.data.tokenizer.load import train_sentencepiece

    def learn(size: int) -> bytes:
        return train_sentencepiece(
            _lines(texts),
            vocab_size=size,
            model_type=algorithm,
            normalization_rule_name="nmt_nfkc" if cased else "nmt_nfkc_cf",
        )

    try:
        return learn(vocab_size)
    except VocabularySizeError as error:
        raise _size_that_works(error, learn) from None


def _size_that_works(error: VocabularySizeError, learn: Callable[[int], bytes]) -> DataError:
    """The same error with a size that was tried: the one that SentencePiece names may be refused in its turn."""
    what, asked, tried = error.what, error.asked, {error.asked}
    while error.suggested not in tried and error.suggested >= SMALLEST_VOCABULARY:
        tried.add(error.suggested)
        try:
            learn(error.suggested)
        except VocabularySizeError as next_error:
            error = next_error
        else:
            return VocabularySizeError(what, asked, error.suggested)
    return DataError(f"{what}, and no other size suits it; give more text")


def _check_size(num_pieces: int, vocab_size: int) -> None:
    if num_pieces >= vocab_size:
        return
    what = f"this text gives {num_pieces} pieces, not {vocab_size}"
    if num_pieces < SMALLEST_VOCABULARY:
        raise DataError(f"{what}; give more text: a vocabulary has {SMALLEST_VOCABULARY} pieces at least")
    raise VocabularySizeError(what, vocab_size, num_pieces)


@dataclass(frozen=True)
class _Counts:
    """How often each code point begins a word, and how often it is inside one (int64 [0x110000] each).

    `alone`: how many words are of characters that always form a word alone.
    """

    first: np.ndarray
    inside: np.ndarray
    alone: int

    @property
    def share_of_vocabulary(self) -> float:
        """The share of the vocabulary that characters may take."""
        total = int(self.first.sum() + self.inside.sum())
        return min(max(0.5, self.alone / total), 0.875)


def _count_characters(pipeline: Any, texts: Sequence[str]) -> _Counts:
    first, inside = np.zeros(_NUM_CODES, np.int64), np.zeros(_NUM_CODES, np.int64)
    kinds = np.zeros(_NUM_CODES, np.uint8)
    for codes in _normal_codes(pipeline, texts):
        for code in np.unique(codes[kinds[codes] == 0]).tolist():
            kinds[code] = _kind_of(pipeline, chr(code))
        is_word = kinds[codes] == _WORD
        goes_on = is_word & np.concatenate([[False], is_word[:-1]])
        begins = (kinds[codes] != _BLANK) & ~goes_on
        first += np.bincount(codes[begins], minlength=_NUM_CODES)
        inside += np.bincount(codes[goes_on], minlength=_NUM_CODES)
    if not first.any():
        raise DataError(NOTHING_LEARNT)
    return _Counts(first, inside, int(first[kinds == _ALONE].sum()))


def _normal_codes(pipeline: Any, texts: Sequence[str]) -> Iterator[np.ndarray]:
    """Code points of the normalised texts, separated by line feeds, many texts at once."""
    batch: list[str] = []
    num_characters = 0
    for number, text in enumerate(texts, start=1):
        batch.append(pipeline.normalizer.normalize_str(text))
        num_characters += len(text)
        if num_characters >= _COUNTED_AT_ONCE or number == len(texts):
            yield np.frombuffer(("\n".join(batch) + "\n").encode("utf-32-le"), np.uint32)
            batch, num_characters = [], 0


def _kind_of(pipeline: Any, character: str) -> int:
    """Whether the tokenizer treats it as part of a word, as a space between words, or as a word of one character."""
    words = [word for word, _ in pipeline.pre_tokenizer.pre_tokenize_str(f"a{character}a")]
    return {1: _WORD, 2: _BLANK}.get(len(words), _ALONE)


def _rank_characters(counts: _Counts) -> list[list[str]]:
    """Characters, most frequent first, each as its pieces: alone or first in a word, and inside one."""
    total = counts.first + counts.inside
    codes = np.flatnonzero(total)
    ranked = codes[np.argsort(-total[codes], kind="stable")].tolist()
    # The bare form is needed even if the character never begins a word: the library requires it.
    return [[chr(code)] + ([f"##{chr(code)}"] if counts.inside[code] else []) for code in ranked]


def _choose_alphabet(ranked: Sequence[Sequence[str]], room: int) -> list[str]:
    """The most frequent characters that fit into `room` pieces, sorted; the others become [UNK]."""
    chosen: list[str] = []
    for pieces in ranked:
        if len(chosen) + len(pieces) > room:
            break
        chosen += pieces
    return sorted(chosen, key=lambda piece: (piece.startswith("##") and len(piece) > 2, piece))


def _without_long_words(texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        start = 0
        for match in _LONG_WORD.finditer(text):
            for cut in range(match.start() + _WORD_CHARACTERS, match.end(), _WORD_CHARACTERS):
                yield text[start:cut]
                start = cut
        yield text[start:]


def _lines(texts: Sequence[str]) -> Iterator[str]:
    """Lines short enough for SentencePiece, cut at spaces if possible."""
    for text in texts:
        for line in text.split("\n"):
            start = 0
            while len(line) - start > _LINE_CHARACTERS:
                cut = line.rfind(" ", start + 1, start + _LINE_CHARACTERS)
                end = cut if cut > 0 else start + _LINE_CHARACTERS
                yield line[start:end]
                start = end
            yield line[start:]
