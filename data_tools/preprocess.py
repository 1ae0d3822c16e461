"""Corpora to a memory-mapped token dataset: the first program of the flow, and the only one that tokenises.

    python data_tools/preprocess.py --input corpus.jsonl.zst --tokenizer vocab.txt --output-prefix data/corpus

writes data/corpus.bin, .idx and .json and the folder data/corpus.tokenizer. Training reads nothing else. The output is
the same, byte for byte, for any number of workers. `taco data preprocess` is the same program.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pretrain.cli import MultiValueCommand, new_program, run_program
from pretrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from data_tools.encode import EncodedChunk, EncodeOptions
    from pretrain.data.indexed_dataset import IndexedDatasetWriter
    from pretrain.data.manifest import Dropped, Manifest
    from pretrain.data.tokenizer import Tokenizer

app = new_program()


@app.command(cls=MultiValueCommand)
def main(
    input: Annotated[list[str], typer.Option(help="corpus: .jsonl or .txt, plain, .gz or .zst", metavar="FILE...")],
    tokenizer: Annotated[str, typer.Option(help="vocab.txt, SentencePiece .model, tokenizer.json, or a saved folder")],
    output_prefix: Annotated[str, typer.Option(help="the dataset is PREFIX.bin, PREFIX.idx, PREFIX.json")],
    workers: Annotated[int, typer.Option(help="processes that tokenise; 0 or 1: this one", min=0)] = 1,
    json_key: Annotated[str, typer.Option(help="where the text stands in a JSON line")] = "text",
    cased: Annotated[bool, typer.Option("--cased", help="keep capitals and accents (vocab.txt only)")] = False,
    hash_range: Annotated[str, typer.Option(help="keep documents whose hash lies in LO:HI of 0:1, for splits")] = "0:1",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a dataset of the same prefix")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="report as JSON on standard output")] = False,
) -> None:
    """Tokenise corpora into a dataset that training maps into memory.

    Example: python data_tools/preprocess.py --input books.jsonl.zst wiki.txt.gz --tokenizer vocab.txt
    --output-prefix data/train --workers 8 --hash-range 0:0.95

    JSON lines hold one document each; in text files, blank lines separate documents. Memory does not grow with the
    corpus, only with the number of workers and the longest document.
    """
    from data_tools.encode import EncodeOptions, parse_hash_range

    options = EncodeOptions(tokenizer, cased, json_key, parse_hash_range(hash_range))
    report = preprocess(input, options, output_prefix, workers=workers, overwrite=overwrite)
    print(json.dumps(asdict(report)) if as_json else _summary(report))


@dataclass
class Report:
    """What one run did; `dropped` by reason. Bytes are those of the decompressed text."""

    prefix: str
    input_files: int
    input_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    seconds: float = 0.0
    mb_per_second: float = 0.0
    tokens_per_second: float = 0.0
    files: list[str] = field(default_factory=list)
    tokenizer: dict[str, Any] = field(default_factory=dict)


def preprocess(
    inputs: list[str], options: EncodeOptions, prefix: str, *, workers: int = 1, overwrite: bool = False
) -> Report:
    """Writes the dataset `prefix` from the files `inputs`, in their order, and returns what was done.

    Raises:
        ConfigError: the prefix names a folder.
        DataError: a mistake in input, tokenizer or output; nothing that looks finished is left.
        TacoError: a worker process was killed.
    """
    from data_tools.encode import Encoder, encode_chunks
    from data_tools.progress import ProgressMeter
    from data_tools.readers import expand_inputs, read_chunks, total_progress
    from pretrain.data.indexed_dataset import IndexedDatasetWriter, best_dtype
    from pretrain.data.tokenizer import load_tokenizer

    sources = expand_inputs(inputs, options.reading)
    tokenizer = load_tokenizer(options.tokenizer, cased=options.cased)
    _prepare_output(prefix)
    report = Report(prefix, len(sources), tokenizer=asdict(tokenizer.info))
    writer = IndexedDatasetWriter(prefix, best_dtype(tokenizer.vocab_size), overwrite=overwrite)
    with _tokenizer_folder(tokenizer, prefix) as publish_tokenizer, writer:
        chunks = total_progress(sources, read_chunks(sources, options.reading))
        with ProgressMeter("tokenising", sum(source.num_bytes for source in sources)) as meter:
            for encoded in encode_chunks(chunks, Encoder(tokenizer, options), workers):
                _append(writer, encoded, report)
                meter.update(encoded.progress, _words(report, meter.seconds))
        _require_tokens(inputs, report)
        publish_tokenizer()
        manifest = writer.finalize(
            tokenizer=tokenizer.info, dropped=report.dropped, command=_command(inputs, options, prefix)
        )
    _complete(report, manifest, meter.seconds)
    return report


def _append(writer: IndexedDatasetWriter, encoded: EncodedChunk, report: Report) -> None:
    from data_tools.encode import add_dropped

    end = 0
    for length in encoded.lengths.tolist():
        writer.add_document([encoded.tokens[end : end + length]])
        end += length
    report.documents += len(encoded.lengths)
    report.tokens += end
    report.input_bytes += encoded.text_bytes
    add_dropped(report.dropped, encoded.dropped)


def _require_tokens(inputs: list[str], report: Report) -> None:
    if report.tokens == 0:
        reasons = ", ".join(f"{item.documents} {reason}" for reason, item in report.dropped.items()) or "none at all"
        raise DataError(
            f"{', '.join(inputs)}: no document gave a token (documents: {reasons}); "
            "check the corpus, --json-key and --hash-range"
        )


def _prepare_output(prefix: str) -> None:
    from pretrain.data.tokenizer_folder import MARKER

    path, tokenizer = Path(prefix), Path(f"{prefix}.tokenizer")
    if tokenizer.exists() and not (tokenizer / MARKER).exists():
        raise DataError(f"{tokenizer}: is in the way and not of our making; choose another --output-prefix")
    if prefix.endswith("/") or path.is_dir() or not path.name:
        raise ConfigError(f"--output-prefix {prefix}: is a folder; give a name inside it, like {path / 'train'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path.parent}: cannot be created: {error.strerror}; choose another --output-prefix") from None


@contextmanager
def _tokenizer_folder(tokenizer: Tokenizer, prefix: str) -> Iterator[Callable[[], None]]:
    """Writes PREFIX.tokenizer under a temporary name at once, since some tokenizers cannot be saved.

    The function that it gives puts the folder in its place; an error after that brings the old one back.
    """
    final, new, old = (Path(f"{prefix}.tokenizer{suffix}") for suffix in ("", ".tmp", ".old"))
    is_published = False

    def publish() -> None:
        nonlocal is_published
        try:
            if final.exists():
                final.rename(old)
            is_published = True
            new.rename(final)
        except OSError as error:
            raise DataError(f"{final}: cannot be written: {error.strerror}; choose another --output-prefix") from None

    _remove(new, old)
    try:
        tokenizer.save_pretrained(new)
        yield publish
    except BaseException:
        if is_published:
            _remove(final)
            if old.exists():
                old.rename(final)
        raise
    finally:
        _remove(new, old)


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _command(inputs: list[str], options: EncodeOptions, prefix: str) -> list[str]:
    """The command that makes this dataset again: what decides its content, so not the number of workers."""
    command = [
        "taco",
        "data",
        "preprocess",
        "--input",
        *inputs,
        "--tokenizer",
        options.tokenizer,
        "--output-prefix",
        prefix,
    ]
    command += ["--json-key", options.json_key] if options.json_key != "text" else []
    command += ["--cased"] if options.cased else []
    if options.hash_range != (Fraction(0), Fraction(1)):
        command += ["--hash-range", ":".join(map(str, options.hash_range))]
    return command


def _complete(report: Report, manifest: Manifest, seconds: float) -> None:
    report.dropped = dict(manifest.dropped)
    report.seconds = seconds
    report.mb_per_second = report.input_bytes / 1e6 / seconds
    report.tokens_per_second = report.tokens / seconds
    report.files = [f"{report.prefix}{suffix}" for suffix in (".bin", ".idx", ".json", ".tokenizer")]


def _words(report: Report, seconds: float) -> str:
    megabytes = report.input_bytes / 1e6
    speed = megabytes / max(seconds, 1e-9)
    return f"{megabytes:,.1f} MB, {speed:.1f} MB/s, {report.documents:,} documents, {report.tokens:,} tokens"


def _summary(report: Report) -> str:
    lines = [f"{report.documents:,} documents, {report.tokens:,} tokens from {report.input_files} files"]
    lines += [f"dropped: {item.documents:,} {reason} ({item.bytes:,} bytes)" for reason, item in report.dropped.items()]
    speed = f"{report.mb_per_second:.1f} MB/s, {report.tokens_per_second:,.0f} tokens/s"
    lines.append(f"{report.input_bytes / 1e6:.1f} MB of input in {report.seconds:.1f} s: {speed}")
    return "\n".join([*lines, f"wrote {' '.join(report.files)}"])


if __name__ == "__main__":
    run_program(app)
