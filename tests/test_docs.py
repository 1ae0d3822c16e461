"""The documentation names what exists: links and their anchors, paths, verbs of `taco`; and every page is in the index.

Failures are listed as FILE:LINE: what is wrong.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import ROOT
from test_architecture import PRETRAIN

from pretrain.cli import VERBS

INDEX = ROOT / "docs" / "index.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TOP_FOLDERS = "pretrain|data_tools|docs|configs|slurm|tests|csrc"
SUFFIXES = "py|md|yaml|sh|hpp|cpp|npz|svg|png|zst"

LINK = re.compile(r"\]\((?!https?:)([^)\s#]*)(?:#([^)\s]*))?\)")
PATH = re.compile(rf"(?<![\w./-])(?:{TOP_FOLDERS})/[\w./*-]*")
BARE_NAME = re.compile(rf"`([\w*-]+\.(?:{SUFFIXES}))`")
INLINE_CODE = re.compile(r"`([^`]+)`")
COMMAND = re.compile(r"(?:^|\s)(?:\.venv/bin/)?taco ((?:[a-z][a-z-]*)(?: [a-z][a-z-]*)?)")

# Files that a reader makes, that a program writes, or that another project has; NAME stands for a name to be chosen.
NOT_IN_THE_TREE = {
    "configs/my_run.yaml", "vocab.txt", "config.yaml", "loss_curves.png", "preprocess_data.py", "run_mlm.py",
}  # fmt: skip


def lines_of(page: Path) -> Iterator[tuple[str, str]]:
    """Each line of a page, with the FILE:LINE that failures are listed by."""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        yield f"{page.relative_to(ROOT)}:{number}", line


def code_of(page: Path) -> Iterator[tuple[str, str]]:
    """Fenced lines and inline code, each with its FILE:LINE."""
    is_fenced = False
    for place, line in lines_of(page):
        if line.startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced:
            yield place, line
        else:
            yield from ((place, code) for code in INLINE_CODE.findall(line))


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = (line for _, line in lines_of(page) if re.match(r"#{1,6} ", line))
    return {re.sub(r"[^\w -]", "", line.lstrip("#").strip().lower()).replace(" ", "-") for line in headings}


def exists(name: str) -> bool:
    """Whether a path from the root is there; a pattern must match something."""
    if "*" in name:
        return any(ROOT.glob(name))
    return (ROOT / name).exists()


def check(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize("page", [*TOP, *PAGES], ids=lambda page: page.name)
def test_relative_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    problems = []
    for place, line in lines_of(page):
        for target, anchor in LINK.findall(line):
            path = page.parent / target if target else page
            if not path.exists():
                problems.append(f"{place}: {target} does not exist")
            elif anchor and anchor not in anchors_of(path):
                problems.append(f"{place}: {target or page.name} has no heading #{anchor}")
    check(problems)


@pytest.mark.parametrize("page", [*TOP, *PAGES], ids=lambda page: page.name)
def test_named_paths_exist(page: Path) -> None:
    problems = []
    for place, line in lines_of(page):
        for found in PATH.findall(line):
            name = found.rstrip(".")
            if "NAME" not in name and name not in NOT_IN_THE_TREE and not exists(name):
                problems.append(f"{place}: {name} does not exist")
    check(problems)


@pytest.mark.parametrize("page", [*TOP, *PAGES], ids=lambda page: page.name)
def test_files_named_without_a_folder_exist_somewhere(page: Path) -> None:
    folders = [ROOT / name for name in TOP_FOLDERS.split("|")]
    names = {path.name for folder in folders for path in folder.rglob("*")} | {path.name for path in ROOT.iterdir()}
    problems = [
        f"{place}: no file is called {name}"
        for place, line in lines_of(page)
        for name in BARE_NAME.findall(line)
        if "*" not in name and "NAME" not in name and name not in names | NOT_IN_THE_TREE
    ]
    check(problems)


def test_every_page_is_in_the_index() -> None:
    linked = {INDEX.parent / target for _, line in lines_of(INDEX) for target, _ in LINK.findall(line)}
    check([f"docs/index.md:1: {page.name} is not linked" for page in PAGES if page not in linked | {INDEX}])


def test_the_readme_leads_to_the_index() -> None:
    assert any(target == "docs/index.md" for _, line in lines_of(TOP[0]) for target, _ in LINK.findall(line))


def test_the_levels_of_the_architecture_are_those_that_imports_are_checked_by() -> None:
    _, _, table = ARCHITECTURE.read_text(encoding="utf-8").partition("| level | parts |")
    rows = [line.split("|")[2] for line in table.partition("\n\n")[0].splitlines()[2:]]
    levels = {part: level for level, parts in enumerate(reversed(rows)) for part in re.findall(r"`(\w+)`", parts)}
    check([f"docs/architecture.md:1: no level has {part}" for part in PRETRAIN if part not in levels])
    check([f"docs/architecture.md:1: {part} does not exist" for part in levels if part not in PRETRAIN])
    from_the_bottom = [levels[part] for part in PRETRAIN]
    assert from_the_bottom == sorted(from_the_bottom), "docs/architecture.md and test_architecture.PRETRAIN differ"


@pytest.mark.parametrize("page", [*TOP, *PAGES], ids=lambda page: page.name)
def test_commands_name_verbs_that_exist(page: Path) -> None:
    problems = [
        f"{place}: taco {words}: no such verb"
        for place, code in code_of(page)
        for words in COMMAND.findall(code)
        if not is_verb(words)
    ]
    check(problems)


def is_verb(words: str) -> bool:
    """Whether `taco WORDS` names a verb, or a group of verbs; of a verb with commands of its own, one of these."""
    first, _, second = words.partition(" ")
    if words in VERBS or any(name.startswith(f"{words} ") for name in VERBS):
        return True
    if first not in VERBS:
        return False
    app = importlib.import_module(VERBS[first].module).app
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    return not second or len(commands) == 1 or second in commands
