"""Shows the content of a dataset: its manifest, documents as text and tokens, and rows exactly as training reads them.

taco data inspect data/train --document 17
taco data inspect data/train --row 5 --config configs/taco_base.yaml
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pretrain.cli import new_program, run_program

if TYPE_CHECKING:
    from data_tools.views.row_view import RowView
    from pretrain.config.sections import RunConfig
    from pretrain.data.dataset.indexed_dataset import IndexedDataset
    from pretrain.data.tokenizer.load import Tokenizer

app = new_program()
# The longest row without a configuration file: no model limits it.
_MOST_POSITIONS = 1 << 20


@app.command(
    epilog="Example: taco data inspect data/train --row 5 --row-mode stream --seq-length 128 objective.masking=span"
)
def main(
    prefix: Annotated[str, typer.Argument(help="dataset prefix, with or without .bin, .idx or .json")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value of the configuration, for rows")
    ] = None,
    documents: Annotated[
        int | None, typer.Option(help="show this many documents from the beginning; default: 1", min=0)
    ] = None,
    document: Annotated[
        list[int] | None, typer.Option(help="show this document (from 0); may be repeated", min=0)
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="tokens shown per document", min=1)] = 200,
    row: Annotated[int | None, typer.Option(help="show this training row (from 0)", min=0)] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="instead of --row: show a row of this micro-batch", min=0)
    ] = None,
    place: Annotated[int, typer.Option(help="with --micro-batch: number of the row in it", min=0)] = 0,
    epoch: Annotated[int, typer.Option(help="with --row: use masks and order of this epoch", min=0)] = 0,
    config: Annotated[
        Path | None, typer.Option(help="configuration of the run (YAML); without it, the defaults apply")
    ] = None,
    row_mode: Annotated[str | None, typer.Option(help="short for data.row_mode=...")] = None,
    seq_length: Annotated[int | None, typer.Option(help="short for data.seq_length=...")] = None,
    seed: Annotated[int | None, typer.Option(help="short for run.seed=...")] = None,
    anchor: Annotated[
        list[int] | None, typer.Option(help="show the TACO pairs of this column; may be repeated")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Show the manifest, documents and training rows of a dataset."""
    from pretrain.data.dataset.dataset_format import prefix_of
    from pretrain.data.dataset.indexed_dataset import IndexedDataset
    from pretrain.data.tokenizer.load import find_dataset_tokenizer

    short = {"data.row_mode": row_mode, "data.seq_length": seq_length, "run.seed": seed}
    changes = [*(overrides or ()), *(f"{key}={value}" for key, value in short.items() if value is not None)]
    prefix = prefix_of(prefix)
    dataset = IndexedDataset(prefix)
    manifest = dataset.manifest
    tokenizer = find_dataset_tokenizer(dataset.prefix, manifest.tokenizer) if manifest else None
    wants_row = row is not None or micro_batch is not None
    number = documents if documents is not None else 0 if wants_row or document else 1
    indices = [*range(min(number, dataset.num_documents)), *(document or ())]
    report: dict[str, Any] = {
        "dataset": _summary(dataset),
        "documents": [_document(dataset, tokenizer, index, max_tokens) for index in indices],
    }
    view, settings = None, None
    if wants_row:
        settings = _settings(prefix, config, changes)
        view = _view(settings, row, epoch, micro_batch, place, anchor)
        report |= {"row": asdict(view), "settings": _relevant(settings)}
    if as_json:
        print(json.dumps(report))
        return
    from data_tools.views.row_page import show

    show(report, tokenizer, view, settings)


def _summary(dataset: IndexedDataset) -> dict[str, Any]:
    """Counts of the files, and the manifest without its hashes."""
    from data_tools.views.dataset_tally import counts_of_files

    counts = {**counts_of_files(dataset), "idx_bytes": dataset.idx_path.stat().st_size}
    if dataset.manifest is None:
        return {**counts, "manifest": None}
    hashes = ("bin_xxh64", "idx_xxh64", "tokenizer_files", "shard_inputs", *counts)
    return {**counts, "manifest": {key: v for key, v in asdict(dataset.manifest).items() if key not in hashes}}


def _document(dataset: IndexedDataset, tokenizer: Tokenizer | None, index: int, max_tokens: int) -> dict[str, Any]:
    from pretrain.errors import ConfigError

    if index >= dataset.num_documents:
        raise ConfigError(f"--document {index}: {dataset.prefix} has documents 0 to {dataset.num_documents - 1}")
    all_ids = dataset.document(index)
    ids = all_ids[:max_tokens].tolist()
    first, end = dataset.document_indices[index : index + 2]
    lengths = dataset.sequence_lengths[first:end].tolist()
    return {
        "document": index,
        "tokens": len(all_ids),
        "sequence_lengths": lengths,
        "ids": ids,
        "pieces": [_piece(tokenizer, token_id) for token_id in ids] if tokenizer else None,
        "text": tokenizer.decode(ids) if tokenizer else None,
    }


def _piece(tokenizer: Tokenizer, token_id: int) -> str:
    # A damaged file may hold any id, and the user must see it here.
    return tokenizer.piece(token_id) if 0 <= token_id < tokenizer.vocab_size else f"<{token_id}?>"


def _settings(prefix: str, path: Path | None, changes: list[str]) -> RunConfig:
    """The rows' configuration: the run's if it trains on this dataset, else the same with this dataset alone."""
    from pretrain.config.load import load_config, resolve_config
    from pretrain.config.paths import escape

    if path is None:
        tree = {
            "run": {"output_dir": "."},
            "data": {"train": [prefix]},
            "model": {"max_position_embeddings": _MOST_POSITIONS},
        }
        return resolve_config(Path("taco data inspect"), tree, changes)
    config = load_config(path, changes)
    if prefix in config.data.train:
        return config
    return load_config(path, [*changes, f"data.train={json.dumps([escape(prefix)], ensure_ascii=False)}"])


def _view(
    config: RunConfig, row: int | None, epoch: int, micro_batch: int | None, place: int, anchors: list[int] | None
) -> RowView:
    from data_tools.progress import ProgressMeter
    from data_tools.views.row_view import find_place, view_row
    from pretrain.data.batches import open_source
    from pretrain.data.tokenizer.load import load_tokenizer

    rows = open_source(config, "train")
    tokenizer = load_tokenizer(f"{config.data.train[0]}.tokenizer")
    if micro_batch is None:
        with ProgressMeter("looking for the row", rows.num_rows) as meter:
            done = 0

            def advance(places: int) -> None:
                nonlocal done
                done += places
                meter.update(done, f"{done:,} places of the order")

            micro_batch, place = find_place(config, rows, row or 0, epoch, advance)
    return view_row(config, rows, tokenizer, micro_batch, place, anchors or None)


def _relevant(config: RunConfig) -> dict[str, Any]:
    """The settings that determine a row, its masks and its pairs."""
    objective = config.objective.model_dump()
    return {
        "data.train": list(config.data.train),
        "data.row_mode": config.data.row_mode,
        "data.seq_length": config.data.seq_length,
        "run.seed": config.run.seed,
        "train.micro_batch_size": config.train.micro_batch_size,
        **{f"objective.{key}": value for key, value in objective.items()},
    }


if __name__ == "__main__":
    run_program(app)
