"""The commands of the documentation: where they stand, their words, and the same in a form that takes seconds."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from project import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a documented command begins with; prompts and output are told from commands by it.
PROGRAMS = ("taco", "torchrun", "python", "make", "sbatch", "srun", "pip", ".venv/bin/python", ".venv/bin/taco")
_PROGRAM = re.compile(r"\$ |(?:[A-Z_]+=\S+ )*(?:" + "|".join(map(re.escape, PROGRAMS)) + r")(?:\s|$)")
_NOT_CARRIED_OUT = ("bench", "preflight")
_SIZES = {"--vocab-size": "300", "--sentences": "1000", "--workers": "1", "--max-tokens": "30", "--threads": "1"}


@dataclass(frozen=True)
class Documented:
    """A command as a reader sees it: `place` is FILE:LINE, `text` one line without the prompt."""

    place: str
    text: str

    @property
    def words(self) -> list[str]:
        """The words as a shell passes them, from the program on."""
        words = shlex.split(self.text)
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        return [word for word in words if word != "..."]


def commands_of(page: Path) -> Iterator[Documented]:
    """The commands in fenced blocks of a page, continued lines joined."""
    is_fenced, pending, place = False, "", ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```"):
            is_fenced = not is_fenced and line[3:].strip() in ("", "sh", "bash")
            continue
        if not is_fenced:
            continue
        if not pending:
            if not _PROGRAM.match(line.strip()):
                continue
            place = f"{page.relative_to(ROOT)}:{number}"
        pending += line.strip().removeprefix("$ ")
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        yield Documented(place, pending)
        pending = ""


def unquoted(text: str) -> str:
    """What of a command a shell would expand: everything outside quotes."""
    return re.sub(r"'[^']*'|\"[^\"]*\"", "''", text)


def taco_words(words: list[str]) -> list[str] | None:
    """The arguments of `taco` that a command amounts to; None if it runs another program."""
    name = Path(words[0]).name
    if name == "srun":
        first = next(i for i, word in enumerate(words) if i and not word.startswith("-"))
        return taco_words(words[first:])
    if name == "torchrun":
        return ["train", *words[words.index("pretrain.train") + 1 :]]
    if name == "sbatch":
        first = next(i for i, word in enumerate(words) if word.startswith("slurm/"))
        job = Path(words[first]).stem
        rest = words[first + 1 :]
        return (
            ["data", "preprocess", *rest]
            if job == "preprocess"
            else ["train", "--config", f"configs/{job}.yaml", *rest]
        )
    return words[1:] if name == "taco" else None


def shrunken(arguments: list[str]) -> list[str] | None:
    """The same command on small data, without real training; None for one of which only the options are checked."""
    if arguments[0] in _NOT_CARRIED_OUT:
        return None
    words = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        word = _SIZES.get(before, word)
        words += ["corpus/a.jsonl.zst", "corpus/b.jsonl.zst"] if word == "CORPUS" else [word]
    if "bpe" in words:
        words[words.index("--vocab-size") + 1] = "400"
    if words[0] == "train" and "--dry-run" not in words:
        words.append("--dry-run")
    return words
