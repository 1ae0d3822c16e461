"""Statistics of a dataset: document lengths, use of the vocabulary, number of rows.

    taco data stats data/train --plot train.png

One pass over the mapped file; hashes are not checked (`taco data verify` does that).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from pretrain.cli import new_program, run_program

if TYPE_CHECKING:
    from data_tools.views.dataset_tally import LengthTally, TokenTally
    from pretrain.data.dataset.indexed_dataset import IndexedDataset
    from pretrain.data.tokenizer.load import Tokenizer

app = new_program()
_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_TOP_RANKS = (1, 10, 100, 1000, 10_000)


@app.command()
def main(
    prefixes: Annotated[list[str], typer.Argument(help="dataset prefixes, with or without .bin, .idx or .json")],
    seq_length: Annotated[
        int, typer.Option(help="tokens per row when counting rows, [CLS] and [SEP] included", min=8)
    ] = 512,
    top: Annotated[int, typer.Option(help="how many of the most frequent tokens to list", min=0)] = 20,
    plot: Annotated[Path | None, typer.Option(help="draw a PNG plot of all datasets", metavar="FILE.png")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="report as JSON on standard output")] = False,
) -> None:
    """Count documents, tokens, vocabulary use and rows of datasets.

    Example: taco data stats data/train --seq-length 128 --plot train.png
    """
    from data_tools.views.stats_page import describe

    if plot is not None:
        from data_tools.views.stats_plot import check_picture

        check_picture(plot)
    reports = gather(prefixes, seq_length, top)
    if plot is not None:
        from data_tools.views.stats_plot import draw

        draw(reports, plot)
    print(json.dumps(reports) if as_json else "\n\n".join(map(describe, reports)))
    if plot is not None and not as_json:
        print(f"\npicture: {plot}")


def gather(prefixes: list[str], seq_length: int, top: int) -> list[dict[str, Any]]:
    """One report per dataset, with one progress meter over all of them.

    Raises:
        DataError: a dataset is damaged, or a token id is not in its vocabulary.
    """
    from data_tools.progress import ByteCounter, ProgressMeter
    from pretrain.data.dataset.indexed_dataset import IndexedDataset

    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    with ProgressMeter("counting", sum(dataset.tokens.nbytes for dataset in datasets)) as meter:
        advance = ByteCounter(meter)
        return [report_on(dataset, seq_length, top, advance) for dataset in datasets]


def report_on(
    dataset: IndexedDataset, seq_length: int, top: int, on_progress: Callable[[int], None] = lambda num_bytes: None
) -> dict[str, Any]:
    """The report on one dataset, as printed with `--json`."""
    from data_tools.views.dataset_tally import (
        TokenTally,
        counts_of_files,
        has_sentences,
        tally_documents,
        tally_sequences,
    )

    manifest = dataset.manifest
    tokens = TokenTally(manifest.tokenizer.vocab_size if manifest else None)
    tokens.add(dataset, on_progress)
    documents = tally_documents(dataset)
    return {
        **counts_of_files(dataset),
        "tokens_per_document": _lengths(documents),
        "tokens_per_sequence": _lengths(tally_sequences(dataset)) if has_sentences(dataset) else None,
        "vocabulary": _vocabulary(dataset, tokens, top),
        "rows": _rows(dataset, seq_length),
        "dropped": {reason: asdict(item) for reason, item in manifest.dropped.items()} if manifest else {},
    }


def _lengths(tally: LengthTally) -> dict[str, Any]:
    lengths, counts = tally.table()
    number = int(counts.sum())
    return {
        "mean": float((lengths * counts).sum() / number) if number else 0.0,
        "min": tally.percentile(0),
        "max": tally.percentile(100),
        "empty": int(counts[lengths == 0].sum()),
        "percentiles": {str(share): tally.percentile(share) for share in _PERCENTILES},
        "histogram": [asdict(bar) for bar in tally.histogram()],
        "fine_histogram": [asdict(bar) for bar in tally.histogram(bins_per_doubling=4)],
    }


def _vocabulary(dataset: IndexedDataset, tally: TokenTally, top: int) -> dict[str, Any]:
    import numpy as np

    tokenizer, manifest, total = _find_tokenizer(dataset), dataset.manifest, max(dataset.num_tokens, 1)
    ids = np.argsort(-tally.counts, kind="stable")[:top]
    special = asdict(manifest.tokenizer.special) if manifest else {}
    frequencies = tally.frequencies()
    return {
        "tokenizer": manifest.tokenizer.name if manifest else None,
        "size": manifest.tokenizer.vocab_size if manifest else None,
        "used": len(frequencies),
        "used_once": int((frequencies == 1).sum()),
        "special_tokens": {role: int(tally.counts[index]) for role, index in special.items()},
        "unknown_share": float(tally.counts[special["unk"]] / total) if special else None,
        "pieces_per_word": _pieces_per_word(tokenizer, tally),
        "entropy_bits": tally.entropy(),
        "zipf_exponent": tally.zipf_exponent(),
        "top_share": {str(rank): tally.top_share(rank) for rank in _TOP_RANKS},
        "ids_for_share": {str(share): tally.ids_for_share(share / 100) for share in (50, 90, 99)},
        "top": [
            {
                "id": index,
                "piece": tokenizer.piece(index) if tokenizer else None,
                "count": int(tally.counts[index]),
                "share": float(tally.counts[index] / total),
            }
            for index in ids.tolist()
            if tally.counts[index]
        ],
        "frequencies": _sampled(frequencies),
    }


def _sampled(frequencies: Any) -> list[tuple[int, int]]:
    """Rank and count at a few hundred ranks, evenly spaced in logarithms: enough for a curve."""
    import numpy as np

    if not len(frequencies):
        return []
    ranks = np.unique(np.geomspace(1, len(frequencies), 300).round().astype(np.int64))
    return list(zip(ranks.tolist(), frequencies[ranks - 1].tolist(), strict=True))


def _find_tokenizer(dataset: IndexedDataset) -> Tokenizer | None:
    """The tokenizer beside the dataset, for the names of pieces; None if it is missing or not the dataset's."""
    from pretrain.data.tokenizer.load import OtherTokenizerError, find_dataset_tokenizer

    try:
        return find_dataset_tokenizer(dataset.prefix, dataset.manifest.tokenizer) if dataset.manifest else None
    except OtherTokenizerError:
        return None


def _pieces_per_word(tokenizer: Tokenizer | None, tally: TokenTally) -> float | None:
    """Tokens divided by tokens that begin a word, without special ones."""
    if tokenizer is None:
        return None
    counts = tally.counts.copy()
    counts[tokenizer.special_ids()] = 0
    num_words = int(counts[~tokenizer.continues_word()].sum())
    return float(counts.sum() / num_words) if num_words else None


def _rows(dataset: IndexedDataset, seq_length: int) -> dict[str, Any]:
    """Per row mode: the number of rows, and the share of their positions that holds text; 0 if there is no row."""
    from pretrain.config.sections import RowMode
    from pretrain.data.batches import RowSource
    from pretrain.errors import TacoError

    report: dict[str, Any] = {"seq_length": seq_length, "modes": {}}
    if dataset.manifest is None:
        return report
    for mode in get_args(RowMode):
        try:
            rows = RowSource([dataset.prefix], mode, seq_length)
        except TacoError:
            report["modes"][mode] = {"rows": 0, "text_share": 0.0, "left_out": dataset.num_tokens}
            continue
        text = (dataset.num_tokens - rows.num_left_out) / (rows.num_rows * seq_length)
        report["modes"][mode] = {"rows": rows.num_rows, "text_share": text, "left_out": rows.num_left_out}
    return report


if __name__ == "__main__":
    run_program(app)
