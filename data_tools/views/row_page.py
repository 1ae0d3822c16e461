"""The text output of `taco data inspect`: in colour on a terminal, with the same marks in brackets elsewhere."""

from __future__ import annotations

import shlex
import sys
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from data_tools.views.row_view import Anchor, RowView, Token
    from pretrain.config.sections import RunConfig
    from pretrain.data.tokenizer.load import Tokenizer

_STYLES = {
    "masked": "black on yellow",
    "random": "white on red",
    "kept": "black on green",
    "special": "bold cyan",
    "padding": "dim",
    "anchor": "bold magenta",
    "text": "",
}
_LEGEND = (
    (
        "masked",
        "{[MASK]|word}",
        "masked: the model sees the part before the bar and must predict the part after it",
    ),
    ("random", "{other|word}", "replaced by a random token"),
    ("kept", "{word|word}", "kept unchanged, but predicted, too"),
    ("anchor", "<7:word>", "column 7, whose pairs are listed below"),
)
_COLUMNS_OFF_A_TERMINAL = 120
_NEGATIVES_SHOWN = 10


def show(report: dict[str, Any], tokenizer: Tokenizer | None, view: RowView | None, config: RunConfig | None) -> None:
    """Prints the summary, the documents and the row, if there are any."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _COLUMNS_OFF_A_TERMINAL)
    _show_summary(console, report["dataset"])
    for document in report["documents"]:
        _show_document(console, document)
    if view is not None and config is not None:
        _show_row(console, view, config)


def _show_summary(console: Console, item: dict[str, Any]) -> None:
    manifest = item["manifest"]
    counts = ", ".join(f"{item[name]:,} {name}" for name in ("documents", "sequences", "tokens"))
    lines = [
        f"{item['prefix']}: {counts}",
        f"  files      {item['bin_bytes']:,} bytes of {item['dtype']} in .bin, {item['idx_bytes']:,} bytes in .idx",
    ]
    if manifest is None:
        lines.append("  manifest   none, so tokenizer and special tokens are unknown")
    else:
        tokenizer = manifest["tokenizer"]
        special = ", ".join(f"{role} {index}" for role, index in tokenizer["special"].items())
        dropped = ", ".join(f"{count['documents']:,} {why}" for why, count in manifest["dropped"].items()) or "nothing"
        casing = "cased" if tokenizer["cased"] else "uncased"
        lines += [
            f"  tokenizer  {tokenizer['kind']} {tokenizer['name']}, {tokenizer['vocab_size']:,} pieces, {casing}, "
            f"sha256 {tokenizer['sha256'][:12]}",
            f"  special    {special}",
            f"  dropped    {dropped}",
            f"  written by {manifest['created_by']}: {shlex.join(manifest['command'])}",
        ]
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _show_document(console: Console, item: dict[str, Any]) -> None:
    lengths = item["sequence_lengths"]
    sentences = f" in {len(lengths)} sequences" if len(lengths) > 1 else ""
    console.print()
    console.print(Text(f"document {item['document']}: {item['tokens']:,} tokens{sentences}", "bold"))
    if item["text"] is not None:
        console.print(Text(item["text"]))
    pieces = item["pieces"] or [str(token_id) for token_id in item["ids"]]
    ends = {sum(lengths[: number + 1]) for number in range(len(lengths) - 1)}
    line = Text("tokens: ", "dim")
    for number, piece in enumerate(pieces):
        line.append((" ║ " if number in ends else " ") if number else "", "cyan").append(piece, "dim")
    console.print(line)
    if item["tokens"] > len(pieces):
        console.print(Text(f"... and {item['tokens'] - len(pieces):,} more", "dim"))


def _show_row(console: Console, view: RowView, config: RunConfig) -> None:
    console.print()
    console.print(
        Text(
            f"row {view.row} in epoch {view.epoch}: place {view.place} of micro-batch {view.micro_batch} "
            f"({config.data.row_mode} rows of {config.data.seq_length} tokens, seed {config.run.seed}, "
            f"{config.objective.masking} masking)",
            "bold",
        )
    )
    for kind, sample, words in _LEGEND if view.anchors else _LEGEND[:-1]:
        console.print(Text("  ").append(f"{sample:<14}", _STYLES[kind]).append(words))
    anchors = {anchor.column for anchor in view.anchors or ()}
    for document, group in groupby(view.tokens, key=lambda token: token.document):
        console.print(_line(list(group), document, anchors))
    for anchor in view.anchors or ():
        console.print(_pairs(anchor, view))
    if view.anchors is None:
        console.print(Text("TACO's pairs are not shown: torch, which draws them as in training, is not installed"))


def _line(tokens: list[Token], document: int, anchors: set[int]) -> Text:
    """One document of the row; words are joined from their pieces."""
    line = Text().append(f"{tokens[0].column:>5}  ", "dim")
    if document == 0:
        return line.append(f"{tokens[0].piece} x {len(tokens)}", _STYLES["padding"])
    before: Token | None = None
    for token in tokens:
        is_marked = token.kind in ("masked", "random", "kept")
        # A row may begin inside a word; its first piece then keeps its continuation mark.
        is_joined = token.continues_word and not is_marked and before is not None and before.kind != "special"
        text = token.label_piece.removeprefix("##") if is_joined else _surface(token)
        text = f"{{{token.piece}|{token.label_piece}}}" if is_marked else text
        style = _STYLES[token.kind]
        if token.column in anchors:
            text, style = f"<{token.column}:{text}>", style or _STYLES["anchor"]
        line.append("" if before is None or is_joined else " ")
        line.append(text, style)
        before = token
    return line


def _surface(token: Token) -> str:
    """The piece without the mark of a preceding space, unless it is only that mark."""
    return token.label_piece.lstrip("\u2581\u0120") or token.label_piece


def _pairs(anchor: Anchor, view: RowView) -> Text:
    """An anchor with its positive, a nearby token of the same row, and negatives from other rows."""
    line = Text(f"TACO, column {anchor.column} ")
    line.append(anchor.piece, _STYLES["anchor"])
    if not anchor.is_anchor:
        line.append(" (no anchor of this run)")
    if anchor.positive is None:
        return line.append(": has no positive")
    distance = anchor.positive.column - anchor.column
    line.append(f": positive at column {anchor.positive.column} ({distance:+d}) ")
    line.append(anchor.positive.piece, "green")
    line.append(f"; {len(anchor.negatives)} negatives (row.column):")
    for other in anchor.negatives[:_NEGATIVES_SHOWN]:
        line.append(f" {other.row}.{other.column} ").append(other.piece, "red")
    if len(anchor.negatives) > _NEGATIVES_SHOWN:
        line.append(f" and {len(anchor.negatives) - _NEGATIVES_SHOWN} more")
    return line
