"""Turns corpora into a memory-mapped token dataset: the first program of the flow, and the only one that tokenises.

    python data_tools/preprocess.py --input corpus.jsonl.zst --tokenizer vocab.txt --output-prefix data/corpus

writes data/corpus.bin, .idx and .json and the folder data/corpus.tokenizer. Training reads nothing else. The output is
byte for byte the same for any number of workers and interruptions. `taco data preprocess` is the same program.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_tools.reading_flags import Delimiter, InputFormat, JsonKey, NoHeader, OnError, Quoting, TextDocuments
from pretrain.cli import MultiValueCommand, new_program, run_program
from pretrain.errors import DataError, counted

if TYPE_CHECKING:
    from data_tools.encoding.encode import EncodeOptions
    from data_tools.output.resumable import ResumableRun
    from data_tools.readers import Source
    from pretrain.data.dataset.manifest import Dropped, InputRecord, Manifest
    from pretrain.data.tokenizer.load import Tokenizer

app = new_program()
MAX_REJECTS = 1000
DEFAULT_MEMORY = 1 << 30


@app.command(cls=MultiValueCommand)
def main(
    input: Annotated[
        list[str], typer.Option(help="files, folders, patterns, @list.txt, or - (standard input)", metavar="INPUT...")
    ],
    tokenizer: Annotated[str, typer.Option(help="vocab.txt, SentencePiece .model, tokenizer.json, or a saved folder")],
    output_prefix: Annotated[str, typer.Option(help="the dataset is PREFIX.bin, PREFIX.idx, PREFIX.json")],
    workers: Annotated[
        int, typer.Option(help="processes that tokenise, at most one per core; 0 or 1: only this one", min=0)
    ] = 1,
    json_key: JsonKey = "text",
    input_format: InputFormat = None,
    text_documents: TextDocuments = "blank-line",
    delimiter: Delimiter = None,
    quoting: Quoting = "auto",
    no_header: NoHeader = False,
    cased: Annotated[bool, typer.Option("--cased", help="keep case and accents (vocab.txt only)")] = False,
    hash_range: Annotated[str, typer.Option(help="keep documents whose hash is in LO:HI of 0:1, for splits")] = "0:1",
    split_sentences: Annotated[
        bool, typer.Option("--split-sentences", help="one sequence per sentence, for sentence rows")
    ] = False,
    dedup: Annotated[bool, typer.Option("--dedup", help="keep only the first document with the same ids")] = False,
    normalize: Annotated[str, typer.Option(help="Unicode normalisation of the text", metavar="none|nfc|nfkc")] = "none",
    control_characters: Annotated[
        str, typer.Option(help="keep them, replace them by spaces, or drop the document", metavar="keep|space|drop")
    ] = "keep",
    fold_whitespace: Annotated[
        bool, typer.Option("--fold-whitespace", help="replace every run of whitespace by one space")
    ] = False,
    min_chars: Annotated[int, typer.Option(help="drop shorter documents")] = 0,
    max_chars: Annotated[int | None, typer.Option(help="drop longer documents")] = None,
    min_tokens: Annotated[int, typer.Option(help="drop documents with fewer tokens")] = 0,
    max_tokens: Annotated[int | None, typer.Option(help="drop documents with more tokens")] = None,
    on_error: OnError = "stop",
    max_rejects: Annotated[
        int, typer.Option(help="stop after more rejects than this; -1: never", min=-1)
    ] = MAX_REJECTS,
    max_document_bytes: Annotated[str | None, typer.Option(help="longer documents are errors; default: 1G")] = None,
    max_ratio: Annotated[int | None, typer.Option(help="largest ratio of decompressed to compressed size")] = None,
    shard: Annotated[
        str, typer.Option(help="process only part I of N, I from 0; `taco data merge` joins them")
    ] = "0/1",
    memory: Annotated[str, typer.Option(help="limit for queued text, and for the table of --dedup")] = "1G",
    journal_seconds: Annotated[float, typer.Option(help="seconds between entries of the journal", min=0.0)] = 5.0,
    restart: Annotated[bool, typer.Option("--restart", help="discard the work of an unfinished run")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a dataset with the same prefix")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="report as JSON on standard output")] = False,
) -> None:
    """Tokenise corpora into a dataset that training maps into memory.

    Example: taco data preprocess --input books.jsonl.zst wiki.txt.gz --tokenizer vocab.txt
    --output-prefix data/train --workers 8 --hash-range 0:0.95

    An interrupted run resumes where its journal ends: start the same command again, with any number of workers. Exit
    code 75 means that SIGTERM or SIGHUP ended it and that it can be resumed.

    Memory use does not grow with the corpus: about 100 MB for this process and for each worker, plus several times the
    longest document, plus --memory.
    """
    from data_tools.encoding.cleaning import CleaningOptions
    from data_tools.encoding.encode import EncodeOptions, parse_hash_range
    from data_tools.readers import ReadOptions
    from data_tools.sizes import parse_shard, parse_size

    reading = ReadOptions.parse(
        json_key=json_key,
        input_format=input_format,
        text_documents=text_documents,
        delimiter=delimiter,
        quoting=quoting,
        has_header=not no_header,
        on_error=on_error,
        max_document_bytes=max_document_bytes,
        max_ratio=max_ratio,
    )
    cleaning = CleaningOptions(
        normalize=normalize,  # type: ignore[arg-type]
        control_characters=control_characters,  # type: ignore[arg-type]
        fold_whitespace=fold_whitespace,
        min_chars=min_chars,
        max_chars=max_chars,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        split_sentences=split_sentences,
    )
    report = preprocess(
        input,
        EncodeOptions(tokenizer, cased, parse_hash_range(hash_range), reading, cleaning),
        output_prefix,
        dedup=dedup,
        workers=_usable_workers(workers),
        overwrite=overwrite,
        restart=restart,
        shard=parse_shard(shard),
        max_rejects=None if max_rejects < 0 else max_rejects,
        memory=parse_size("--memory", memory),
        journal_seconds=journal_seconds,
    )
    print(json.dumps(asdict(report)) if as_json else _summary(report))


def _usable_workers(workers: int) -> int:
    """As many as this process may have cores: more only take turns, and each costs a start and its memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers > cores:
        print(f"note: --workers {workers}: there are {cores} cores, so {cores} are used", file=sys.stderr)
    return min(workers, cores)


@dataclass
class Report:
    """What one run did; `dropped` counts by reason. Bytes are of decompressed text.

    Counts are those of the dataset, including the work of an interrupted run (`resumed_documents`); speeds are those of
    this run only.
    """

    prefix: str
    input_files: int
    input_bytes: int = 0
    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    rejects: int = 0
    replaced: int = 0
    resumed_documents: int = 0
    seconds: float = 0.0
    mb_per_second: float = 0.0
    tokens_per_second: float = 0.0
    files: list[str] = field(default_factory=list)
    tokenizer: dict[str, Any] = field(default_factory=dict)


def preprocess(
    inputs: list[str],
    options: EncodeOptions,
    prefix: str,
    *,
    workers: int = 1,
    overwrite: bool = False,
    restart: bool = False,
    dedup: bool = False,
    shard: tuple[int, int] = (0, 1),
    max_rejects: int | None = MAX_REJECTS,
    memory: int = DEFAULT_MEMORY,
    journal_seconds: float = 5.0,
) -> Report:
    """Writes the dataset `prefix` from `inputs`, in order, or resumes writing it, and returns what was done.

    Raises:
        ConfigError: the prefix is a folder, or an option is invalid.
        DataError: a fault in input, tokenizer or output; no output that looks complete is left behind.
        StoppedError: SIGTERM, SIGHUP or Ctrl-C; finished work is kept.
        TacoError: a chunk of the corpus killed three workers.
    """
    from data_tools.output.output_files import TokenizerFolder, prepare_output
    from data_tools.output.protection import dataset_files, refuse_inputs
    from data_tools.output.recorded_options import command_words, record_options
    from data_tools.output.resumable import ResumableRun
    from data_tools.readers import expand_inputs, named_files, require_unchanged
    from pretrain.data.tokenizer.base import best_dtype
    from pretrain.data.tokenizer.casing import casing_mismatch
    from pretrain.data.tokenizer.load import load_tokenizer

    sources = expand_inputs(inputs, options.reading, tokenizer=options.tokenizer)
    refuse_inputs(dataset_files(prefix), [*named_files(inputs), *(source.path for source in sources)])
    refuse_inputs(dataset_files(prefix), [options.tokenizer], what="the tokenizer")
    tokenizer = load_tokenizer(options.tokenizer, cased=options.cased)
    if mismatch := casing_mismatch(tokenizer):
        print(f"warning: {options.tokenizer}: {mismatch}", file=sys.stderr)
    prepare_output(prefix)
    report = Report(prefix, len(sources), tokenizer=asdict(tokenizer.info))
    record = record_options(inputs, options, dedup=dedup)
    run = ResumableRun(
        prefix,
        best_dtype(tokenizer.vocab_size),
        _header(sources, options, tokenizer, shard) | {"dedup": dedup},
        overwrite=overwrite,
        restart=restart,
        is_raw=dedup,
        commit_seconds=None if any(source.path == "-" for source in sources) else journal_seconds,
    )
    with run:
        if run.published is not None:
            return _complete(report, run, run.published)
        with TokenizerFolder(tokenizer, prefix) as folder:
            if not run.state.is_complete:
                _encode_all(run, report, sources, options, tokenizer, workers, shard, max_rejects, memory)
            require_unchanged(sources)
            _require_tokens(inputs, run, shard)

            def publish_beside(manifest: Manifest) -> None:
                run.announce(manifest)
                folder.publish()
                run.publish_rejects()

            run.commit(is_complete=True)
            with run.final_writer(memory, max(workers, 1)) as (writer, dropped):
                manifest = writer.finalize(
                    tokenizer=tokenizer.info,
                    dropped=dict(sorted(dropped.items())),
                    command=command_words(record, prefix),
                    replaced=run.state.replaced,
                    shard=shard if shard[1] > 1 else None,
                    preprocessing=record,
                    shard_inputs=_input_records(sources) if shard[1] > 1 else None,
                    publish_beside=publish_beside,
                )
    return _complete(report, run, manifest)


def _encode_all(
    run: ResumableRun,
    report: Report,
    sources: list[Source],
    options: EncodeOptions,
    tokenizer: Tokenizer,
    workers: int,
    shard: tuple[int, int],
    max_rejects: int | None,
    memory: int,
) -> None:
    """Appends the tokens of every chunk that is not done yet."""
    from data_tools.encoding.encode import Encoder, encode_chunks
    from data_tools.progress import ProgressMeter
    from data_tools.readers import read_chunks
    from data_tools.stop_signals import StopSignals

    before = [0]
    for source in sources:
        before.append(before[-1] + source.num_bytes)
    first, text_bytes, tokens = before[-1] * shard[0] // shard[1], run.state.text_bytes, run.writer.num_tokens
    report.resumed_documents = run.writer.num_documents
    if run.start is not None:
        print(f"continuing an unfinished run: {report.resumed_documents:,} documents are done", file=sys.stderr)
    chunks = read_chunks(sources, options.reading, shard=shard, start=run.start)
    encoder = Encoder(tokenizer, options)
    # The size of standard input and of hub datasets is unknown.
    total = before[-1] // shard[1] if all(source.num_bytes for source in sources) else 0
    meter = ProgressMeter("tokenising", total, run.state.disk_bytes)
    with StopSignals() as stop, meter:
        for encoded in encode_chunks(chunks, encoder, workers, max_bytes_ahead=memory // 2, check_stop=stop.check):
            run.append(encoded, max(before[encoded.source] + encoded.progress - first, 0))
            if max_rejects is not None and run.state.rejects > max_rejects:
                run.commit()
                raise DataError(_too_many(run, max_rejects))
            new = run.state.text_bytes - text_bytes
            meter.update(run.state.disk_bytes, *_words(run, new, run.writer.num_tokens - tokens, meter.seconds))
    report.seconds = meter.seconds
    report.mb_per_second = (run.state.text_bytes - text_bytes) / 1e6 / max(meter.seconds, 1e-9)
    report.tokens_per_second = (run.writer.num_tokens - tokens) / max(meter.seconds, 1e-9)


def _header(
    sources: list[Source], options: EncodeOptions, tokenizer: Tokenizer, shard: tuple[int, int]
) -> dict[str, Any]:
    """The settings that a run must share with the one that it resumes."""
    from pretrain import __version__

    return {
        "version": __version__,
        "tokenizer": tokenizer.info.sha256,
        "hash_range": ":".join(map(str, options.hash_range)),
        "reading": asdict(options.reading),
        "cleaning": asdict(options.cleaning),
        "shard": f"{shard[0]}/{shard[1]}",
        "inputs": {source.path: list(source.identity[1:]) for source in sources},
        "order": [source.path for source in sources],
    }


def _input_records(sources: list[Source]) -> list[InputRecord]:
    from pretrain.data.dataset.manifest import InputRecord

    return [InputRecord(source.path, source.name, source.num_bytes, source.mtime_ns) for source in sources]


def _too_many(run: ResumableRun, max_rejects: int) -> str:
    reasons = ", ".join(f"{item.documents} {reason}" for reason, item in sorted(run.state.dropped.items()))
    return (
        f"{run.state.rejects} documents could not be read, more than --max-rejects {max_rejects} ({reasons}); they are "
        f"listed in {run.rejects_path}; look at them, then give a larger --max-rejects to continue"
    )


def _require_tokens(inputs: list[str], run: ResumableRun, shard: tuple[int, int]) -> None:
    if run.writer.num_tokens:
        return
    reasons = ", ".join(f"{item.documents} {reason}" for reason, item in run.state.dropped.items()) or "none at all"
    if shard[1] > 1:
        print(f"warning: part {shard[0]} of {shard[1]} gave no token (documents: {reasons})", file=sys.stderr)
        return
    raise DataError(
        f"{', '.join(inputs)}: no document gave a token (documents: {reasons}); "
        "check the corpus, --json-key and --hash-range"
    )


def _complete(report: Report, run: ResumableRun, manifest: Manifest) -> Report:
    report.documents, report.sequences, report.tokens = manifest.documents, manifest.sequences, manifest.tokens
    report.dropped, report.replaced = dict(manifest.dropped), manifest.replaced
    report.input_bytes, report.rejects = run.state.text_bytes, run.state.rejects
    report.files = [f"{report.prefix}{suffix}" for suffix in (".bin", ".idx", ".json", ".tokenizer")]
    report.files += [f"{report.prefix}.rejects.jsonl"] if report.rejects else []
    return report


def _words(run: ResumableRun, text_bytes: int, tokens: int, seconds: float) -> tuple[str, ...]:
    """Speeds of this run, which added `text_bytes` and `tokens`, then totals."""
    seconds = max(seconds, 1e-9)
    return (
        f"{text_bytes / 1e6 / seconds:.1f} MB/s",
        f"{tokens / seconds:,.0f} tokens/s",
        f"{run.state.text_bytes / 1e6:,.1f} MB",
        f"{run.writer.num_documents:,} documents",
        f"{run.writer.num_tokens:,} tokens",
    )


def _summary(report: Report) -> str:
    documents, tokens = counted(report.documents, "document"), counted(report.tokens, "token")
    lines = [f"{documents}, {tokens} from {counted(report.input_files, 'file')}"]
    lines += [f"dropped: {item.documents:,} {reason}{_size(item)}" for reason, item in report.dropped.items()]
    speed = f"{report.mb_per_second:.1f} MB/s, {report.tokens_per_second:,.0f} tokens/s"
    lines.append(f"{report.input_bytes / 1e6:.1f} MB of input in {report.seconds:.1f} s: {speed}")
    return "\n".join([*lines, f"wrote {' '.join(report.files)}"])


def _size(item: Dropped) -> str:
    """The known sizes of dropped documents: bytes for those without ids, tokens for duplicates."""
    sizes = [f"{number:,} {unit}" for number, unit in ((item.bytes, "bytes"), (item.tokens, "tokens")) if number]
    return f" ({', '.join(sizes)})" if sizes else ""


if __name__ == "__main__":
    run_program(app)
