"""Small corpora, vocabularies and program calls for the tests of data_tools."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import zstandard
from project import ROOT

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = ["the cat sat", "a cat\n\nand the mat", "sat " * 700, "café 中文 \u2028 a", "mat"]


def write_vocab(folder: Path) -> Path:
    """A vocab.txt of a few words and all the letters."""
    words = [
        "the",
        "cat",
        "sat",
        "mat",
        "and",
        *"abcdefghijklmnopqrstuvwxyz中文",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    path = folder / "vocab.txt"
    path.write_text("\n".join(SPECIAL + words) + "\n", encoding="utf-8")
    return path


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    """One JSON object per text, compressed as the name says."""
    return write_bytes(path, "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)).encode())


def write_bytes(path: Path, data: bytes) -> Path:
    """`data` in the file `path`, compressed as the name says."""
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    elif path.suffix == ".zst":
        data = zstandard.compress(data)
    elif path.suffix == ".bz2":
        data = bz2.compress(data)
    elif path.suffix == ".xz":
        data = lzma.compress(data, preset=0)
    path.write_bytes(data)
    return path


def run_program(name: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs data_tools/NAME.py in a process of its own."""
    command = [sys.executable, str(ROOT / "data_tools" / f"{name}.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **options)  # type: ignore[call-overload,no-any-return]
