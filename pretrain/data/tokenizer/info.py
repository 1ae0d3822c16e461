"""What a manifest records about a tokenizer: kind, name, hash, size, casing and special ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class SpecialIds:
    """Token ids of the five special tokens of BERT."""

    pad: Count
    unk: Count
    cls: Count
    sep: Count
    mask: Count


@dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer made the ids; equal `sha256` means equal ids."""

    kind: Literal["wordpiece", "sentencepiece", "tokenizer.json"]
    name: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    vocab_size: Annotated[int, Field(ge=1)]
    cased: bool
    special: SpecialIds
