"""What `taco bench gpu` measures, the most important first, on BERT-large or, to try the script, a tiny model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pretrain.bench.step_contenders import Shape

BERT_LARGE = Shape(
    rows=64, seq_length=256, num_layers=24, hidden_size=1024, device="cuda", precision="bf16",
    settings=("zero.stage=1",),
)  # fmt: skip
TINY = replace(
    BERT_LARGE, rows=4, seq_length=32, num_layers=2, hidden_size=64, num_negatives=4, device="cpu", precision="fp32"
)


@dataclass(frozen=True)
class Experiment:
    """One contender with some settings; `limit` is the most seconds that it may take.

    A contender `loss NAME` is one of `taco bench loss`: the contrastive loss alone, on vectors of the same size.
    `rows` and `row_mode` replace those of the base; `settings` are keys of the configuration. One that does not exist
    is not an error: the experiment is left out, with the reason.
    """

    name: str
    contender: str = "taco"
    rows: float = 1.0  # times those of the base
    row_mode: str = "stream"
    settings: tuple[str, ...] = ()
    limit: float = 40.0

    def shape(self, base: Shape) -> Shape:
        """What it computes, as a change of `base`."""
        settings = (*base.settings, *self.settings)
        return replace(base, rows=max(2, round(base.rows * self.rows)), row_mode=self.row_mode, settings=settings)


_GRAPHS = ("train.cuda_graphs=true",)

# Without settings: what a run does by itself on this device, compiled layers included.
EXPERIMENTS = (
    Experiment("taco", limit=80),
    Experiment("mlm", contender="mlm", limit=60),
    Experiment("graphs", settings=_GRAPHS, limit=60),
    Experiment("graphs, mlm", contender="mlm", settings=_GRAPHS, limit=60),
    Experiment("compile=off", settings=("train.compile=off",)),
    Experiment("128 rows", rows=2, limit=50),
    Experiment("32 rows", rows=0.5, limit=50),
    Experiment("32 rows, graphs", rows=0.5, settings=_GRAPHS, limit=50),
    Experiment("peer", contender="peer"),
    Experiment("peer_best", contender="peer_best", limit=80),
    Experiment("loss alone, triton", contender="loss triton"),
    Experiment("loss alone, torch", contender="loss taco"),
    Experiment("recompute=elementwise", settings=("train.recompute=elementwise",), limit=50),
    Experiment("recompute=layers:12", settings=("train.recompute=layers:12",), limit=50),
    Experiment("recompute=layers:24", settings=("train.recompute=layers:24",), limit=50),
    Experiment("pack rows", row_mode="pack", limit=50),
    Experiment("document rows", row_mode="document", limit=50),
    Experiment("compile=full", settings=("train.compile=full",), limit=90),
    Experiment("compile=full, graphs", settings=("train.compile=full", *_GRAPHS), limit=60),
    Experiment("fp8", settings=("precision=fp8",), limit=80),
    Experiment("kernels=torch", settings=("train.kernels=torch",), limit=50),
    Experiment("LAMB", settings=("optim.name=lamb",), limit=50),
    Experiment("ZeRO-0", settings=("zero.stage=0",), limit=50),
    Experiment("ZeRO-2", settings=("zero.stage=2",), limit=50),
    Experiment("ZeRO-3", settings=("zero.stage=3",), limit=50),
)
