"""Every move between layouts, as a table: `python tests/distributed/moves_table.py` writes it into docs/parallelism.md.

Each layout of `test_moves.py` is saved once and continued in every other one, with the checks of that test: all weights
and moments to the bit, then the figures of the steps that follow against one plain process, which is what the table
shows. The model.safetensors that an export would write is hashed before and after. About six minutes on two cores.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import megatron.core.tensor_parallel  # noqa: E402, F401  # once, before ranks fork
from forked import run_ranks  # noqa: E402
from layouts import SETTING  # noqa: E402
from moves import LAYOUTS, SAVED_AT, begin, go_on, read_all  # noqa: E402
from parity import STEPS, deviation, load, plain_process  # noqa: E402
from small_runs import VOCAB_SIZE  # noqa: E402

from pretrain.checkpoint.state_files import WEIGHT  # noqa: E402
from pretrain.export import write_model  # noqa: E402

State = dict[tuple[str, str], torch.Tensor]
PAGE = ROOT / "docs" / "parallelism.md"
BEGIN, END = "<!-- moves: written by make moves -->", "<!-- end of moves -->"


def measure(folder: Path) -> tuple[dict[tuple[str, str], float], dict[str, str]]:
    """Largest relative deviation of any figure after each move; the hash of the model that each layout exports."""
    reference = run_ranks(1, plain_process, load(folder, *SETTING))[0][0][SAVED_AT:STEPS]
    found, exports = {}, {}
    for source, (world_size, *layout) in LAYOUTS.items():
        origin = folder / source
        origin.mkdir()
        run_ranks(world_size, begin, load(folder, *SETTING, *layout), origin)
        state = read_all(origin)
        exports[source] = export_hash(folder, state)
        for target in LAYOUTS:
            found[source, target] = move(folder, origin, state, exports[source], target, reference)
        print(f"{source}: continued in {len(LAYOUTS)} layouts", flush=True)
    return found, exports


def export_hash(folder: Path, state: State) -> str:
    """sha256 of the model.safetensors that `taco export` makes of a state."""
    config = load(folder, *SETTING)
    weights = {name: values for (name, kind), values in state.items() if kind == WEIGHT}
    with tempfile.TemporaryDirectory(dir=folder) as name:
        write_model(weights, config.model, Path(name), vocab_size=VOCAB_SIZE, pad_token_id=0)
        return hashlib.sha256((Path(name) / "model.safetensors").read_bytes()).hexdigest()


def move(folder: Path, origin: Path, state: State, export: str, target: str, reference: Any) -> float:
    """The deviation of one move, after the state and its export have been found unchanged."""
    world_size, *layout = LAYOUTS[target]
    with tempfile.TemporaryDirectory(dir=folder) as again:
        results = run_ranks(world_size, go_on, load(folder, *SETTING, *layout), origin, Path(again))
        after = read_all(Path(again))
    changed = [key for key, values in state.items() if not torch.equal(values, after[key])]
    if changed or after.keys() != state.keys():
        raise SystemExit(f"{origin.name} -> {target}: {changed[:3]} changed")
    if export_hash(folder, after) != export:
        raise SystemExit(f"{origin.name} -> {target}: another model is exported")
    return max(deviation(figures, reference) for figures in results)


def table(found: dict[tuple[str, str], float], exports: dict[str, str]) -> str:
    """Markdown: a row for where the run was saved and what it exports there, a column for where it went on."""
    numbers = range(1, len(LAYOUTS) + 1)
    lines = [
        "| saved in | export | " + " | ".join(f"to {number}" for number in numbers) + " |",
        "|---" * (len(LAYOUTS) + 2) + "|",
    ]
    for number, source in zip(numbers, LAYOUTS, strict=True):
        cells = " | ".join(f"{found[source, target]:.0e}" for target in LAYOUTS)
        lines.append(f"| {number} {source} | {exports[source][:8]} | {cells} |")
    return "\n".join(lines)


def write(text: str) -> None:
    """Put the table between its marks."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        moves, exported = measure(Path(name))
    write(table(moves, exported))
    print(f"{len(moves)} moves, largest deviation {max(moves.values()):.1e}; table in {PAGE}")
