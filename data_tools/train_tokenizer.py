"""Text to a vocabulary: WordPiece (`vocab.txt`) or SentencePiece (`.model`), for corpora that no published one fits.

    python data_tools/train_tokenizer.py --input corpus.jsonl.zst --output vocab.txt --vocab-size 8000

The same input gives the same file. Training holds the distinct words of the text in memory (WordPiece) or all of it
(SentencePiece): give a sample of a large corpus with --max-bytes or --hash-range.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from pretrain.cli import MultiValueCommand, new_program, run_program
from pretrain.errors import ConfigError, DataError

app = new_program()
# Longer lines are cut: SentencePiece's time grows with them, and it leaves out very long ones.
_LINE_CHARACTERS = 4000
_NOTHING_LEARNT = "the text has no word; check the corpus, --json-key and --hash-range"


class Kind(str, Enum):
    """Which algorithm learns the pieces."""

    wordpiece = "wordpiece"
    unigram = "sentencepiece-unigram"
    bpe = "sentencepiece-bpe"


@app.command(cls=MultiValueCommand)
def main(
    input: Annotated[list[str], typer.Option(help="corpus: .jsonl or .txt, plain, .gz or .zst", metavar="FILE...")],
    output: Annotated[Path, typer.Option(help="the file to write: NAME.txt for wordpiece, NAME.model otherwise")],
    vocab_size: Annotated[int, typer.Option(help="number of pieces, special ones included", min=8)],
    kind: Annotated[Kind, typer.Option(help="what to learn")] = Kind.wordpiece,
    json_key: Annotated[str, typer.Option(help="where the text stands in a JSON line")] = "text",
    cased: Annotated[bool, typer.Option("--cased", help="tell capitals and accents apart")] = False,
    hash_range: Annotated[str, typer.Option(help="learn from documents whose hash lies in LO:HI of 0:1")] = "0:1",
    max_bytes: Annotated[int | None, typer.Option(help="stop reading after so many bytes of text", min=1)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the output file")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="report as JSON on standard output")] = False,
) -> None:
    """Learn a vocabulary from text.

    Example: taco data train-tokenizer --input books.jsonl.zst --output vocab.txt --vocab-size 8000
    """
    from data_tools.encode import parse_hash_range

    _check_output(output, kind, overwrite)
    start = time.monotonic()
    corpus = Corpus(input, json_key, parse_hash_range(hash_range), max_bytes)
    if kind is Kind.wordpiece:
        data = learn_wordpiece(corpus, vocab_size, cased)
    else:
        data = learn_sentencepiece(corpus, vocab_size, cased, "unigram" if kind is Kind.unigram else "bpe")
    _write(output, data)
    report = {"output": str(output), "kind": kind.value, "vocab_size": vocab_size, "seconds": time.monotonic() - start}
    print(json.dumps(report) if as_json else f"wrote {output}: {vocab_size:,} pieces in {report['seconds']:.1f} s")


class Corpus:
    """The chosen texts of some files; every iteration reads them again, with a progress meter of its own."""

    def __init__(self, paths: list[str], json_key: str, hash_range: Any, max_bytes: int | None) -> None:
        from data_tools.readers import ReadOptions, expand_inputs

        self.options = ReadOptions(json_key=json_key)
        self.sources = expand_inputs(paths, self.options)
        self.total_bytes = sum(source.num_bytes for source in self.sources)
        self.paths, self.max_bytes = paths, max_bytes
        self.hash_range = hash_range

    def texts(self, title: str) -> Iterator[str]:
        """Texts in order, at most `max_bytes` of them in all; `title` stands before the progress."""
        from data_tools.encode import HashRange
        from data_tools.progress import ProgressMeter
        from data_tools.readers import parse_chunk, read_chunks, total_progress

        chosen, num_bytes = HashRange(self.hash_range), 0
        with ProgressMeter(title, self.total_bytes) as meter:
            for chunk in total_progress(self.sources, read_chunks(self.sources, self.options)):
                for text in parse_chunk(chunk, self.options).texts:
                    if text in chosen:
                        num_bytes += len(text.encode())
                        yield text
                    if self.max_bytes is not None and num_bytes >= self.max_bytes:
                        return
                meter.update(chunk.progress, f"{num_bytes / 1e6:,.1f} MB of text")


def learn_wordpiece(corpus: Corpus, vocab_size: int, cased: bool) -> bytes:
    """The bytes of a vocab.txt of exactly `vocab_size` pieces: special ones, characters in order, then merges.

    The library numbers characters inside words in the order of a hash table, which differs from run to run and decides
    between equally frequent merges. So the characters are counted first and given to it as fixed pieces.

    Raises:
        DataError: the corpus is damaged, or holds too few different words.
    """
    from tokenizers import trainers

    from pretrain.data.tokenizer import WORDPIECE_SPECIAL, wordpiece_pipeline

    pipeline = wordpiece_pipeline({piece: index for index, piece in enumerate(WORDPIECE_SPECIAL)}, cased)
    first, inside = _count_characters(pipeline, corpus)
    alphabet = _choose_alphabet(first, inside, (vocab_size - len(WORDPIECE_SPECIAL)) // 2)
    fixed = [*WORDPIECE_SPECIAL, *alphabet]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=fixed, limit_alphabet=0, show_progress=False, min_frequency=2
    )
    pipeline.train_from_iterator(corpus.texts("learning pieces"), trainer)
    vocab = pipeline.get_vocab()
    if len(vocab) < vocab_size:
        raise DataError(
            f"{', '.join(corpus.paths)}: this text gives {len(vocab)} pieces, not {vocab_size}; "
            f"ask for --vocab-size {len(vocab)} or fewer, or give more text"
        )
    return "".join(f"{piece}\n" for piece in sorted(vocab, key=lambda piece: vocab[piece])).encode()


def _count_characters(pipeline: Any, corpus: Corpus) -> tuple[Counter[str], Counter[str]]:
    """How often each character begins a word, and how often it stands inside one."""
    words: Counter[str] = Counter()
    for text in corpus.texts("counting characters"):
        normal = pipeline.normalizer.normalize_str(text)
        words.update(word for word, _ in pipeline.pre_tokenizer.pre_tokenize_str(normal))
    if not words:
        raise DataError(f"{', '.join(corpus.paths)}: {_NOTHING_LEARNT}")
    first: Counter[str] = Counter()
    inside: Counter[str] = Counter()
    for word, count in words.items():
        first[word[0]] += count
        for character in word[1:]:
            inside[character] += count
    return first, inside


def _choose_alphabet(first: Counter[str], inside: Counter[str], room: int) -> list[str]:
    """Pieces of one character, as they stand at the start of a word and inside one.

    At most `room` pieces, so that half the vocabulary is left for longer ones: rare characters become [UNK].
    """
    total = first + inside
    chosen: list[str] = []
    for character in sorted(total, key=lambda character: (-total[character], character)):
        # The bare form is needed even where the character never begins a word: the library asks for it.
        pieces = [character] + ([f"##{character}"] if character in inside else [])
        if len(chosen) + len(pieces) > room:
            break
        chosen += pieces
    return sorted(chosen, key=lambda piece: (piece.startswith("##") and len(piece) > 2, piece))


def learn_sentencepiece(corpus: Corpus, vocab_size: int, cased: bool, algorithm: str) -> bytes:
    """The bytes of a SentencePiece model with <pad> <unk> [CLS] [SEP] [MASK] as its first pieces.

    Raises:
        DataError: the corpus is damaged, or `vocab_size` does not suit it.
    """
    from pretrain.data.tokenizer import train_sentencepiece

    return train_sentencepiece(
        _lines(corpus),
        vocab_size=vocab_size,
        model_type=algorithm,
        normalization_rule_name="nmt_nfkc" if cased else "nmt_nfkc_cf",
    )


def _lines(corpus: Corpus) -> Iterator[str]:
    """Lines short enough for SentencePiece, cut at blanks where there are any."""
    for text in corpus.texts("reading"):
        for line in text.split("\n"):
            start = 0
            while len(line) - start > _LINE_CHARACTERS:
                cut = line.rfind(" ", start + 1, start + _LINE_CHARACTERS)
                end = cut if cut > 0 else start + _LINE_CHARACTERS
                yield line[start:end]
                start = end
            yield line[start:]


def _check_output(output: Path, kind: Kind, overwrite: bool) -> None:
    suffix = ".txt" if kind is Kind.wordpiece else ".model"
    if output.suffix != suffix:
        raise ConfigError(f"--output {output}: {kind.value} writes a {suffix} file, by which other programs know it")
    if output.exists() and not overwrite:
        raise DataError(f"{output}: exists already; choose another --output, or pass --overwrite")


def _write(output: Path, data: bytes) -> None:
    temporary = output.with_name(output.name + ".tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(output)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise DataError(f"{output}: cannot be written: {error.strerror}; choose another --output") from None


if __name__ == "__main__":
    run_program(app)
