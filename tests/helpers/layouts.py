"""The one list of layouts that are held against one plain process, by the tests and by the table in the documentation.

A case is a grid of at most four processes, a ZeRO stage, how many layers run again in backward, a precision and a
setting. Cases of one grid can run one after another in the same processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Recompute = int | Literal["all", "elementwise"]

NUM_LAYERS = 4
NO_DROPOUT = ("model.hidden_dropout=0", "model.attention_dropout=0")
SETTING = (*NO_DROPOUT, f"model.num_layers={NUM_LAYERS}")

PLAIN = "stream, AdamW"
DROPOUT = "dropout"
DOCUMENT = "row_mode document"
PACK = "row_mode pack"
MASKED = "anchors masked"
UNMASKED = "anchors unmasked"
MICRO_BATCH = "document, mean of micro-batches"
LAMB = "LAMB"
SETTINGS: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    DROPOUT: ("model.hidden_dropout=0.1", "model.attention_dropout=0.1"),
    DOCUMENT: ("data.row_mode=document",),
    PACK: ("data.row_mode=pack",),
    MASKED: ("objective.anchors=masked",),
    UNMASKED: ("objective.anchors=unmasked",),
    MICRO_BATCH: ("data.row_mode=document", "mlm.average=micro_batch"),
    LAMB: ("optim.name=lamb",),
}


@dataclass(frozen=True)
class Grid:
    """Sizes of a process grid."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    has_split_tokens: bool = False
    stage_layers: tuple[int, ...] | None = None

    @property
    def num_processes(self) -> int:
        """How many processes it takes."""
        return self.tensor * self.pipeline * self.data

    @property
    def overrides(self) -> tuple[str, ...]:
        """Of the configuration."""
        layers = () if self.stage_layers is None else (f"parallel.stage_layers={list(self.stage_layers)}",)
        return (
            f"parallel.tensor={self.tensor}",
            f"parallel.pipeline={self.pipeline}",
            f"parallel.sequence={str(self.has_split_tokens).lower()}",
            *layers,
        )

    def __str__(self) -> str:
        uneven = "" if self.stage_layers is None else f" ({' + '.join(map(str, self.stage_layers))} layers)"
        sizes = ((f"PP{self.pipeline}{uneven}", self.pipeline), (self._tensor_name, self.tensor))
        parts = [name for name, size in (*sizes, (f"DP{self.data}", self.data)) if size > 1]
        return " x ".join(parts) or "one process"

    @property
    def _tensor_name(self) -> str:
        return f"TP{self.tensor} + SP" if self.has_split_tokens else f"TP{self.tensor}"


@dataclass(frozen=True)
class Case:
    """One layout in one setting."""

    grid: Grid
    zero: int = 1
    recompute: Recompute = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    setting: str = PLAIN

    @property
    def overrides(self) -> tuple[str, ...]:
        """Of the configuration, those of the setting included."""
        return (
            *SETTING,
            *SETTINGS[self.setting],
            *self.grid.overrides,
            f"zero.stage={self.zero}",
            f"train.recompute={self._recompute}",
            f"precision={self.precision}",
        )

    @property
    def _recompute(self) -> str:
        if self.recompute == "elementwise":
            return "elementwise"
        return f"layers:{self.recompute}" if self.recompute else "none"

    def __str__(self) -> str:
        recompute = f", {self._recompute} again" if self.recompute else ""
        return f"{self.grid} ZeRO-{self.zero} {self.precision}{recompute}, {self.setting}"


ONE, DP2, DP4 = Grid(), Grid(data=2), Grid(data=4)
TP2, TP4, TP2_DP2 = Grid(tensor=2), Grid(tensor=4), Grid(tensor=2, data=2)
TP2_SP, TP4_SP = Grid(tensor=2, has_split_tokens=True), Grid(tensor=4, has_split_tokens=True)
TP2_SP_DP2 = Grid(tensor=2, data=2, has_split_tokens=True)
PP2, PP3, PP4, PP2_DP2 = Grid(pipeline=2), Grid(pipeline=3), Grid(pipeline=4), Grid(pipeline=2, data=2)
PP2_UNEVEN = Grid(pipeline=2, stage_layers=(3, 1))
PP2_TP2, PP2_TP2_SP = Grid(pipeline=2, tensor=2), Grid(pipeline=2, tensor=2, has_split_tokens=True)
GRIDS = (
    ONE, DP2, DP4, TP2, TP4, TP2_DP2, TP2_SP, TP4_SP, TP2_SP_DP2,
    PP2, PP2_UNEVEN, PP3, PP4, PP2_DP2, PP2_TP2, PP2_TP2_SP,
)  # fmt: skip
RECOMPUTED: tuple[Recompute, ...] = (0, 3, "all")
# With a pipeline DeepSpeed has ZeRO-1 only, and stage 0 runs as 1.
STAGES: dict[Grid, tuple[int, ...]] = {grid: (0, 1) if grid.pipeline > 1 else (0, 1, 2, 3) for grid in GRIDS}
STAGES |= {TP4: (1, 3), TP4_SP: (1, 3)}
DROPPING_GRIDS = (ONE, TP2, TP2_SP, PP2, PP2_TP2_SP)


def all_cases() -> list[Case]:
    """Every case, those of one grid beside each other."""
    cases = [Case(grid, zero) for grid in GRIDS for zero in STAGES[grid]]
    cases += [Case(grid, recompute=recompute) for grid in GRIDS for recompute in RECOMPUTED if recompute]
    cases += [Case(grid, 3, "all") for grid in (DP2, TP2, TP2_DP2, TP2_SP, TP2_SP_DP2)]
    return sorted(cases + _cases_in_bf16() + _cases_in_other_settings(), key=lambda case: GRIDS.index(case.grid))


def cases_of(grid: Grid) -> list[Case]:
    """Every case of one grid."""
    return [case for case in all_cases() if case.grid == grid]


def is_left_to_the_table(case: Case) -> bool:
    """True where the tests leave a case to `make parity`, to stay quick: cases near it are tested."""
    if case.grid in (DP4, TP4_SP, PP3) or (case.grid != PP2 and case.grid.pipeline > 1 and case.zero == 0):
        return True
    if case.grid.num_processes == 4 and case.grid.tensor > 1:  # a second each, and more
        return not _is_tested_on_large_grids(case)
    # test_zero_parity.py has the others
    is_dropping = case.setting == DROPOUT and case.grid.pipeline == 1 and case.grid.tensor == 1
    is_partial = case.recompute == 3 and case.grid not in (TP2, PP2)
    is_double = case.setting in (DOCUMENT, UNMASKED, MASKED) and case.grid in (TP2, TP2_SP)
    is_like_fp32 = case.precision == "bf16" and (case.zero == 2 or case.recompute != 0)
    return is_dropping or is_partial or is_double or is_like_fp32


def _is_tested_on_large_grids(case: Case) -> bool:
    if case.precision == "bf16":
        return case.grid.pipeline > 1
    if case.recompute:
        return case.zero == max(STAGES[case.grid]) and case.recompute == "all"
    return case.zero in (1, 3) if case.setting == PLAIN else (case.zero == 1 and case.setting in (LAMB, PACK))


def dropping_cases(grid: Grid) -> list[Case]:
    """With all dropout on, each way to recompute: to be compared with each other, to the bit."""
    return [Case(grid, recompute=recompute, setting=DROPOUT) for recompute in (*RECOMPUTED, "elementwise")]  # type: ignore[arg-type]


def _cases_in_bf16() -> list[Case]:
    stages = {
        DP2: (1, 2, 3), TP2: (1, 2, 3), TP4: (1,), TP2_DP2: (1, 3), TP2_SP: (1, 2, 3), PP2: (1,), PP4: (1,),
        PP2_DP2: (1,), PP2_TP2: (1,), PP2_TP2_SP: (1,),
    }  # fmt: skip
    cases = [Case(grid, zero, precision="bf16") for grid, numbers in stages.items() for zero in numbers]
    return cases + [Case(grid, recompute="all", precision="bf16") for grid in (TP2, TP2_SP, PP2, PP2_TP2_SP)]


def _cases_in_other_settings() -> list[Case]:
    of_each_kind = (TP2, TP2_SP, PP2, PP2_TP2_SP)
    grids = {
        DROPOUT: (TP2, TP4, TP2_SP, PP2, PP4, PP2_DP2, PP2_TP2, PP2_TP2_SP),
        DOCUMENT: (DP2, *of_each_kind, TP2_DP2, PP2_DP2),  # rows of uneven length: every rank masks another number
        **dict.fromkeys((PACK, MASKED, UNMASKED), of_each_kind),
        MICRO_BATCH: (DP2, PP2_DP2),
        LAMB: (TP2_SP, TP2_DP2, PP2, PP2_DP2, PP2_TP2),
    }
    cases = [Case(grid, setting=setting) for setting, chosen in grids.items() for grid in chosen]
    cases += [Case(grid, zero, setting=DROPOUT) for grid in (ONE, DP2) for zero in (0, 1, 2, 3)]
    return cases + [Case(grid, 3, setting=LAMB) for grid in (DP2, TP2, TP2_DP2)]
