"""Learns a vocabulary: WordPiece (`vocab.txt`), byte-level BPE (`tokenizer.json`) or SentencePiece (`.model`).

    python data_tools/train_tokenizer.py --input corpus.jsonl.zst --output vocab.txt --vocab-size 8000

For corpora that no published vocabulary suits. It learns from a sample chosen by document hashes and kept in memory, so
a corpus of any size is read once; the same corpus gives the same file. The file is loaded and tested before it is
published.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_tools.reading_flags import Delimiter, InputFormat, JsonKey, NoHeader, OnError, Quoting, TextDocuments
from data_tools.sizes import SMALLEST_VOCABULARY
from pretrain.cli import MultiValueCommand, new_program, run_program
from pretrain.errors import ConfigError, DataError, counted

if TYPE_CHECKING:
    from data_tools.vocabulary.text_sample import TextSample
    from pretrain.data.tokenizer.load import Tokenizer

app = new_program()
DEFAULT_SAMPLE = "256M"
# Characters of the sample on which the finished vocabulary is tested.
_TRIED_CHARACTERS = 500_000


class Kind(StrEnum):
    """Which algorithm learns the pieces."""

    wordpiece = "wordpiece"
    bpe = "bpe"
    sentencepiece_unigram = "sentencepiece-unigram"
    sentencepiece_bpe = "sentencepiece-bpe"

    @property
    def suffix(self) -> str:
        """The suffix of the file's name, by which other programs identify its kind."""
        return {Kind.wordpiece: ".txt", Kind.bpe: ".json"}.get(self, ".model")


@app.command(cls=MultiValueCommand)
def main(
    input: Annotated[
        list[str], typer.Option(help="files, folders, patterns, @list.txt, or - (standard input)", metavar="INPUT...")
    ],
    output: Annotated[
        Path, typer.Option(help="output file: NAME.txt (wordpiece), NAME.json (bpe), NAME.model (others)")
    ],
    vocab_size: Annotated[int, typer.Option(help="number of pieces, special ones included", min=SMALLEST_VOCABULARY)],
    kind: Annotated[Kind, typer.Option(help="kind of vocabulary to learn")] = Kind.wordpiece,
    json_key: JsonKey = "text",
    input_format: InputFormat = None,
    text_documents: TextDocuments = "blank-line",
    delimiter: Delimiter = None,
    quoting: Quoting = "auto",
    no_header: NoHeader = False,
    on_error: OnError = "stop",
    cased: Annotated[bool, typer.Option("--cased", help="keep case (wordpiece: and accents)")] = False,
    hash_range: Annotated[str, typer.Option(help="learn from documents whose hash is in LO:HI of 0:1")] = "0:1",
    sample_bytes: Annotated[
        str, typer.Option(help="amount of text to learn from, chosen by hash; or `all`")
    ] = DEFAULT_SAMPLE,
    max_documents: Annotated[int | None, typer.Option(help="documents to learn from, chosen by hash", min=1)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the output file")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="report as JSON on standard output")] = False,
) -> None:
    """Learn a vocabulary from text.

    Example: taco data train-tokenizer --input books.jsonl.zst --output vocab.txt --vocab-size 8000
    """
    from data_tools.encoding.encode import parse_hash_range
    from data_tools.readers import ReadOptions
    from data_tools.sizes import parse_size
    from data_tools.vocabulary.text_sample import draw_sample

    _check_output(output, kind, overwrite, input)
    start = time.monotonic()
    reading = ReadOptions.parse(
        json_key=json_key,
        input_format=input_format,
        text_documents=text_documents,
        delimiter=delimiter,
        quoting=quoting,
        has_header=not no_header,
        on_error=on_error,
    )
    limit = None if sample_bytes == "all" else parse_size("--sample-bytes", sample_bytes)
    bounds = parse_hash_range(hash_range)
    sample = draw_sample(input, reading, hash_range=bounds, sample_bytes=limit, max_documents=max_documents)
    report = train(sample, output, kind, vocab_size, cased, inputs=", ".join(input))
    report.seconds = time.monotonic() - start
    print(json.dumps(asdict(report)) if as_json else _summary(report))


@dataclass
class Report:
    """What was learnt from which text; `unknown_share` and `bytes_per_token` are measured on the sample."""

    output: str
    kind: str
    vocab_size: int
    cased: bool
    documents: int
    bytes: int
    read_documents: int
    rejects: int
    is_whole_corpus: bool
    bytes_per_token: float
    unknown_share: float
    seconds: float = 0.0


def train(sample: TextSample, output: Path, kind: Kind, vocab_size: int, cased: bool, *, inputs: str) -> Report:
    """Learns a vocabulary of `kind` from `sample`, loads and tests it, and writes it to `output`.

    Raises:
        ConfigError: `vocab_size` is impossible for this kind.
        DataError: the texts do not give such a vocabulary (`inputs` names their source), or the file cannot be written.
    """
    from data_tools.progress import PatientLine

    texts = _CountedTexts(sample.texts)
    title = f"learning {vocab_size:,} pieces from {sample.num_bytes / 1e6:,.0f} MB"
    try:
        with PatientLine(title, texts.describe):
            data = _learn(texts, kind, vocab_size, cased)
    except DataError as error:
        raise DataError(f"{inputs}: {error}") from None
    with _replacing(output, data) as temporary:
        num_bytes, unknown, tokens = _try_out(temporary, vocab_size, cased, sample)
    return Report(
        output=str(output),
        kind=kind.value,
        vocab_size=vocab_size,
        cased=cased,
        documents=len(sample.texts),
        bytes=sample.num_bytes,
        read_documents=sample.read_documents,
        rejects=sample.rejects,
        is_whole_corpus=sample.is_whole,
        bytes_per_token=num_bytes / max(tokens, 1),
        unknown_share=unknown / max(tokens, 1),
    )


class _CountedTexts(Sequence[str]):
    """The texts of a sample, which knows how much of them a library has taken: learning itself reports nothing."""

    def __init__(self, texts: list[str]) -> None:
        self._texts, self._taken = texts, 0

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: Any) -> Any:
        return self._texts[index]

    def __iter__(self) -> Iterator[str]:
        for taken, text in enumerate(self._texts):
            self._taken = taken
            yield text
        self._taken = len(self._texts)

    def describe(self) -> str:
        """How far the library is, in words."""
        if self._taken < len(self._texts):
            return f"{self._taken / len(self._texts):.0%} of the text read"
        return "looking for pieces"


def _learn(texts: Sequence[str], kind: Kind, vocab_size: int, cased: bool) -> bytes:
    from data_tools.vocabulary.learn_vocabulary import learn_byte_bpe, learn_sentencepiece, learn_wordpiece

    if kind is Kind.wordpiece:
        return learn_wordpiece(texts, vocab_size, cased)
    if kind is Kind.bpe:
        return learn_byte_bpe(texts, vocab_size, cased)
    algorithm = "unigram" if kind is Kind.sentencepiece_unigram else "bpe"
    return learn_sentencepiece(texts, vocab_size, cased, algorithm)


def _try_out(path: Path, vocab_size: int, cased: bool, sample: TextSample) -> tuple[int, int, int]:
    """Loads the vocabulary as other programs will; bytes that it was tested on, unknown tokens, tokens."""
    from pretrain.data.tokenizer.load import load_tokenizer

    tokenizer = load_tokenizer(path, cased=cased)
    _check_ids(tokenizer, vocab_size)
    num_bytes = unknown = tokens = characters = 0
    for text in sample.texts:
        part = text[: _TRIED_CHARACTERS - characters]
        ids = tokenizer.encode_batch([part])[0]
        num_bytes += len(part.encode())
        tokens += len(ids)
        unknown += ids.count(tokenizer.special.unk)
        characters += len(part)
        if characters >= _TRIED_CHARACTERS:
            break
    return num_bytes, unknown, tokens


def _check_ids(tokenizer: Tokenizer, vocab_size: int) -> None:
    special = list(asdict(tokenizer.special).values())
    if tokenizer.vocab_size != vocab_size or special != list(range(len(special))):
        raise AssertionError(f"learnt {tokenizer.vocab_size} pieces with special ids {special}, asked for {vocab_size}")


def _check_output(output: Path, kind: Kind, overwrite: bool, inputs: list[str]) -> None:
    from data_tools.output.protection import in_the_way, refuse_inputs
    from data_tools.own_files import head_of, is_sentencepiece_model, is_tokenizer_json, is_wordpiece_vocabulary
    from data_tools.readers import named_files

    if output.suffix != kind.suffix:
        raise ConfigError(
            f"--output {output}: {kind.value} writes a {kind.suffix} file, by which other programs know it"
        )
    if output.exists():
        refuse_inputs([output], [*named_files(inputs), *(["-"] if "-" in inputs else [])], remedy="--output")
        is_vocabulary = {".txt": is_wordpiece_vocabulary, ".json": is_tokenizer_json}.get(
            output.suffix, is_sentencepiece_model
        )
        try:
            data = head_of(output)
        except OSError as error:
            raise DataError(f"{output}: cannot be read: {error.strerror}; choose another --output") from None
        is_ours = not data or is_vocabulary(data)
        if not overwrite:
            remedy = ", or pass --overwrite" if is_ours else f"; it is no {kind.value} vocabulary to --overwrite"
            raise DataError(f"{output}: exists already; choose another --output{remedy}")
        if not is_ours:
            raise in_the_way(output, f"it is no {kind.value} vocabulary, so choose another --output or move it away")


@contextmanager
def _replacing(output: Path, data: bytes) -> Iterator[Path]:
    """Writes `data` to a temporary file with the same suffix, and renames it to `output` if the block succeeds."""
    temporary = output.with_name(f".{output.stem}.tmp{output.suffix}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        temporary.replace(output)
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error.strerror}; choose another --output") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def _summary(report: Report) -> str:
    whole = "the whole corpus" if report.is_whole_corpus else "a sample of the corpus"
    return (
        f"wrote {report.output}: {report.vocab_size:,} pieces in {report.seconds:.1f} s, learnt from "
        f"{counted(report.documents, 'document')} ({report.bytes / 1e6:,.1f} MB, {whole})\n"
        f"on that text: {report.bytes_per_token:.2f} bytes per token, {report.unknown_share:.4%} unknown"
    )


if __name__ == "__main__":
    run_program(app)
