"""The house: imports run down only, there is no circle, the corridor stays short and files stay readable.

Looks at every import statement, those inside functions and those for types only included.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from project import ROOT

# From the bottom up; a room imports itself and the rooms before it. docs/architecture.md says what each holds.
PRETRAIN = (
    "errors", "step", "config", "console", "cli", "runlog", "durable", "parallel",
    "objectives", "data", "kernels", "planner", "meters", "model", "hf_reading", "optim",
    "metrics", "run_folder", "checkpoint", "hf_writing", "resilience", "engine", "saving", "progress",
    "trainer", "build_run",
    "launcher", "init", "train", "preflight", "export", "import_hf", "evaluate", "report", "bench",
)  # fmt: skip
DATA = ("native_build", "native", "sentences", "order", "masking", "tokenizer", "special_ids", "index_cache", "dataset")
DATA_TOOLS = (
    "reading_flags", "sizes", "stop_signals", "progress", "own_files", "readers", "vocabulary", "encoding", "output",
    "views",
)  # fmt: skip
MOST_MODULES = 16
MOST_LINES = 420


def modules(package: str) -> dict[str, Path]:
    """Every module of a package by its dotted name; a package goes by the name of its folder."""
    paths = sorted((ROOT / package).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


MODULES = modules("pretrain") | modules("data_tools")


def imports_of(path: Path) -> Iterator[str]:
    """The modules of this project that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                full_name = f"{node.module}.{alias.name}"
                target = full_name if full_name in MODULES else node.module
                if target in MODULES:
                    yield target


GRAPH = {name: set(imports_of(path)) - {name} for name, path in MODULES.items()}


def room_of(module: str, package: str) -> str:
    """The first name below `package`; nothing for the package itself."""
    return module.removeprefix(package).lstrip(".").split(".")[0]


def upward_imports(package: str, rooms: tuple[str, ...]) -> list[str]:
    """Imports from a room into one that comes later in `rooms`; rooms that are not named come last, side by side."""
    level = {room: number for number, room in enumerate(rooms)}
    upward = []
    for module, targets in GRAPH.items():
        for target in targets:
            if not (module.startswith(f"{package}.") and target.startswith(f"{package}.")):
                continue
            here, there = room_of(module, package), room_of(target, package)
            if here != there and level.get(there, len(rooms)) >= level.get(here, len(rooms)):
                upward.append(f"{module} imports {target}")
    return sorted(upward)


def test_imports_run_down_only() -> None:
    assert {room_of(module, "pretrain") for module in MODULES if module.startswith("pretrain.")} == set(PRETRAIN)
    assert upward_imports("pretrain", PRETRAIN) == []


def test_imports_of_the_data_tools_run_down_only() -> None:
    assert upward_imports("data_tools", DATA_TOOLS) == []
    assert [module for module in GRAPH if module.startswith("pretrain")
            for target in GRAPH[module] if target.startswith("data_tools")] == []  # fmt: skip


def test_tokenizers_and_datasets_know_nothing_of_rows_and_batches() -> None:
    upward = [line for line in upward_imports("pretrain.data", DATA) if line.split(" imports ")[0].count(".") > 2]
    assert upward == []


def test_there_is_no_circle_of_imports() -> None:
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for target in sorted(GRAPH[module]):
            visit(target)
        path.pop()
        done.add(module)

    for module in GRAPH:
        visit(module)


def test_the_corridor_is_short_and_files_are_readable() -> None:
    assert len(list((ROOT / "pretrain").glob("*.py"))) <= MOST_MODULES
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}
