"""The flags that define how files become documents, shared by the programs that read corpora.

Each is named after the field of `ReadOptions` that documents it; `--no-header` turns `has_header` off.
"""

from __future__ import annotations

from typing import Annotated

import typer

JsonKey = Annotated[
    str,
    typer.Option("--json-key", "--text-column", help="key or column of the text; a.b: key b in a"),
]
InputFormat = Annotated[str | None, typer.Option(help="kind of every input, such as jsonl, txt.gz or csv.plain")]
TextDocuments = Annotated[
    str, typer.Option(help="what separates documents of plain text", metavar="blank-line|line|file")
]
Delimiter = Annotated[str | None, typer.Option(help="character between fields of csv and tsv files")]
Quoting = Annotated[str, typer.Option(help="quoting in csv and tsv files", metavar="auto|rfc4180|none")]
NoHeader = Annotated[bool, typer.Option("--no-header", help="tables have no header; give a number: --json-key 3")]
OnError = Annotated[str, typer.Option(help="what to do with unreadable documents", metavar="stop|skip|replace")]
