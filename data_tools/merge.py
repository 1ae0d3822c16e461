"""Merges datasets into one: parts of one corpus that several jobs preprocessed, or several corpora.

    taco data merge data/train data/part-*.json

The result is byte for byte what a single run over all inputs would have written.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from pretrain.cli import new_program, run_program
from pretrain.errors import DataError, counted

if TYPE_CHECKING:
    from data_tools.output.merge_inputs import MergeInput
    from data_tools.stop_signals import StopSignals
    from pretrain.data.dataset.dataset_writer import IndexedDatasetWriter
    from pretrain.data.dataset.manifest import Dropped

app = new_program()


@app.command()
def main(
    output: Annotated[str, typer.Argument(help="prefix of the dataset to write")],
    inputs: Annotated[
        list[str], typer.Argument(help="prefixes, with or without .json; of a sharded corpus, all parts")
    ],
    dedup: Annotated[bool, typer.Option("--dedup", help="keep only the first document with the same ids")] = False,
    mixed: Annotated[bool, typer.Option("--mixed", help="join datasets that were made with different options")] = False,
    memory: Annotated[str, typer.Option(help="limit for the table of --dedup")] = "1G",
    threads: Annotated[int, typer.Option(help="threads for --dedup", min=1)] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a dataset with the same prefix")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="report as JSON on standard output")] = False,
) -> None:
    """Join datasets into one.

    Example: taco data merge data/train data/part-0 data/part-1 data/part-2

    The parts of one corpus (--shard) are joined in their order, and none may be missing; other datasets are joined in
    the order given. Every hash is checked while copying. Memory use does not grow with the datasets.
    """
    from data_tools.sizes import parse_size

    size = parse_size("--memory", memory)
    report = merge(output, inputs, dedup=dedup, is_mixed=mixed, memory=size, threads=threads, overwrite=overwrite)
    print(json.dumps(asdict(report)) if as_json else _summary(report))


@dataclass
class MergeReport:
    """What was joined; `dropped` counts by reason, over all inputs."""

    prefix: str
    inputs: list[str]
    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    seconds: float = 0.0
    files: list[str] = field(default_factory=list)


def merge(
    output: str,
    inputs: list[str],
    *,
    dedup: bool = False,
    is_mixed: bool = False,
    memory: int = 1 << 30,
    threads: int = 1,
    overwrite: bool = False,
) -> MergeReport:
    """Writes the dataset `output` from the datasets `inputs`.

    Raises:
        ConfigError: the output is a folder or one of the inputs.
        DataError: an input is damaged, a part is missing or given twice, or the inputs are incompatible; no output that
            looks complete is left behind.
        StoppedError: SIGTERM, SIGHUP or Ctrl-C.
    """
    from data_tools.output.merge_inputs import merged_command, merged_options, open_inputs
    from data_tools.output.output_files import TokenizerFolder, prepare_output
    from data_tools.output.run_lock import RunLock
    from pretrain.data.dataset.manifest import Manifest
    from pretrain.data.tokenizer.load import load_dataset_tokenizer

    begin = time.monotonic()
    datasets = open_inputs(inputs, output, dedup=dedup, is_mixed=is_mixed)
    prepare_output(output)
    record = merged_options(datasets, dedup=dedup)
    tokenizer = load_dataset_tokenizer(datasets[0].prefix, datasets[0].manifest.tokenizer)
    with RunLock(output), TokenizerFolder(tokenizer, output) as folder, _Rejects(datasets, output) as rejects:

        def publish_beside(manifest: Manifest) -> None:
            folder.publish()
            rejects.publish()

        with _joined(datasets, output, dedup, memory, threads, overwrite) as (writer, dropped):
            if not writer.num_tokens:
                raise DataError(f"{', '.join(item.prefix for item in datasets)}: hold no token")
            manifest = writer.finalize(
                tokenizer=datasets[0].manifest.tokenizer,
                dropped=dict(sorted(dropped.items())),
                command=merged_command(datasets, output, record, dedup=dedup),
                replaced=sum(item.manifest.replaced for item in datasets),
                preprocessing=record,
                publish_beside=publish_beside,
            )
    report = MergeReport(output, [item.prefix for item in datasets], manifest.documents, manifest.sequences)
    report.tokens, report.dropped, report.seconds = manifest.tokens, dict(manifest.dropped), time.monotonic() - begin
    report.files = [f"{output}{suffix}" for suffix in (".bin", ".idx", ".json", ".tokenizer")]
    return report


@contextmanager
def _joined(
    datasets: list[MergeInput], output: str, dedup: bool, memory: int, threads: int, overwrite: bool
) -> Iterator[tuple[IndexedDatasetWriter, dict[str, Dropped]]]:
    """A writer with the documents of all inputs, and what was left out."""
    import numpy as np

    from data_tools.encoding.encode import add_dropped
    from data_tools.output.duplicates import RawDocuments, copy_unique
    from data_tools.stop_signals import StopSignals
    from pretrain.data.dataset.dataset_writer import IndexedDatasetWriter

    dropped: dict[str, Dropped] = {}
    for item in datasets:
        add_dropped(dropped, dict(item.manifest.dropped))
    dtype = np.dtype(datasets[0].manifest.dtype).newbyteorder("<")
    with StopSignals() as stop, IndexedDatasetWriter(output, dtype, overwrite=overwrite) as writer:
        if not dedup:
            _copy(datasets, writer, stop)
        else:
            with IndexedDatasetWriter(f"{output}.raw", dtype, overwrite=True) as raw_writer:
                _copy(datasets, raw_writer, stop)
                raw_writer.checkpoint()
                raw = RawDocuments.open(f"{output}.raw", dtype)
                left_out = copy_unique(raw, writer, memory=memory, threads=threads, check_stop=stop.check)
            if left_out.documents:
                add_dropped(dropped, {"duplicate": left_out})
        yield writer, dropped


def _copy(datasets: list[MergeInput], writer: IndexedDatasetWriter, stop: StopSignals) -> None:
    from data_tools.progress import ProgressMeter

    total = sum(item.manifest.bin_bytes for item in datasets)
    with ProgressMeter("merging", total) as meter:

        def advance() -> None:
            stop.check()
            speed = writer.num_bytes / 1e6 / max(meter.seconds, 1e-9)
            meter.update(writer.num_bytes, f"{speed:.0f} MB/s", f"{writer.num_documents:,} documents")

        for item in datasets:
            item.copy_to(writer, advance)


class _Rejects:
    """OUTPUT.rejects.jsonl: the rejects of all inputs, concatenated. Use it as a context manager."""

    def __init__(self, datasets: list[MergeInput], output: str) -> None:
        self._sources = [path for item in datasets if (path := Path(f"{item.prefix}.rejects.jsonl")).exists()]
        self._final, self._new = Path(f"{output}.rejects.jsonl"), Path(f"{output}.rejects.jsonl.tmp")

    def __enter__(self) -> _Rejects:
        from pretrain.data.dataset.dataset_writer import explain_os_errors

        with explain_os_errors(self._new), self._new.open("wb") as file:
            for source in self._sources:
                with source.open("rb") as more:
                    shutil.copyfileobj(more, file, 1 << 20)
                    if more.tell() and not _ends_line(more):
                        file.write(b"\n")  # or the next file's first line would be lost with a torn last one
            file.flush()
            os.fsync(file.fileno())
        return self

    def __exit__(self, *error: object) -> None:
        self._new.unlink(missing_ok=True)

    def publish(self) -> None:
        """Publishes the file, or removes that of an older dataset. Raises OSError."""
        if self._sources:
            self._new.replace(self._final)
        else:
            self._final.unlink(missing_ok=True)


def _ends_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _summary(report: MergeReport) -> str:
    documents, tokens = counted(report.documents, "document"), counted(report.tokens, "token")
    counts = f"{documents}, {tokens} from {counted(len(report.inputs), 'dataset')}"
    lines = [f"dropped: {item.documents:,} {reason}" for reason, item in report.dropped.items()]
    return "\n".join([counts, *lines, f"wrote {' '.join(report.files)} in {report.seconds:.1f} s"])


if __name__ == "__main__":
    run_program(app)
