"""The flags that say how files become documents, as the programs on corpora declare them.

Each is named as a field of `ReadOptions`, where its meaning stands; `--no-header` turns `has_header` off.
"""

from __future__ import annotations

from typing import Annotated

import typer

JsonKey = Annotated[
    str,
    typer.Option("--json-key", "--text-column", help="where the text stands; a.b: key b in a"),
]
InputFormat = Annotated[str | None, typer.Option(help="kind of every input, such as jsonl or txt.gz")]
TextDocuments = Annotated[
    str, typer.Option(help="what separates documents of plain text", metavar="blank-line|line|file")
]
Delimiter = Annotated[str | None, typer.Option(help="between fields of csv and tsv files")]
Quoting = Annotated[str, typer.Option(help="of csv and tsv files", metavar="auto|rfc4180|none")]
NoHeader = Annotated[bool, typer.Option("--no-header", help="tables begin with data; --json-key 3")]
OnError = Annotated[str, typer.Option(help="at a document that cannot be read", metavar="stop|skip|replace")]
