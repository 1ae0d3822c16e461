"""What `train.compile` and `train.cuda_graphs` come to, and what they do not go with. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pretrain.config.deepspeed import zero_stage
from pretrain.config.sections import RunConfig

CompileMode = Literal["off", "layers", "full"]


def check_compile(config: RunConfig) -> list[str]:
    """Contradictions between `train.compile` and the layout, for any number of processes."""
    mode = config.train.compile
    if mode not in ("layers", "full"):
        return []
    problems = []
    if config.zero.stage == 3:
        problems.append(
            f"train.compile={mode} with zero.stage=3: hooks that gather parameters split a layer into dozens of "
            "graphs; use zero.stage=2 or train.compile=off"
        )
    if mode == "full" and config.parallel.tensor > 1:
        problems.append(
            f"train.compile=full with parallel.tensor ({config.parallel.tensor}): the ranks exchange activations "
            "inside of every layer; use train.compile=layers or parallel.tensor=1"
        )
    if mode == "full" and config.parallel.pipeline > 1:
        problems.append(
            f"train.compile=full with parallel.pipeline ({config.parallel.pipeline}): the stages exchange what "
            "one graph would hold; use train.compile=layers or parallel.pipeline=1"
        )
    return problems


def compile_mode(config: RunConfig, device_type: str) -> CompileMode:
    """What `train.compile` comes to on a device of this type ("cpu", "cuda")."""
    mode = config.train.compile
    if mode != "auto":
        return mode
    return "layers" if device_type == "cuda" and zero_stage(config) < 3 else "off"


def why_no_graphs(config: RunConfig, device_type: str) -> str | None:
    """Why `train.cuda_graphs` cannot be honoured here; None if it can, or is not asked for."""
    if not config.train.cuda_graphs:
        return None
    zero, parallel = config.zero, config.parallel
    reasons = {
        "the run is on the CPU": device_type != "cuda",
        "zero.stage=3 gathers parameters into other memory each time": zero_stage(config) == 3,
        "zero.offload_optimizer moves gradients from hooks": zero.offload_optimizer.device != "none",
        f"stages of parallel.pipeline ({parallel.pipeline}) wait for each other": parallel.pipeline > 1,
        f"ranks of parallel.tensor ({parallel.tensor}) exchange activations": parallel.tensor > 1,
        "train.compile=full makes one graph of the encoder and the head; train.compile=layers goes with it": (
            compile_mode(config, device_type) == "full"
        ),
        f"rows of data.row_mode={config.data.row_mode} have varying shapes": config.data.row_mode != "stream",
        "layers that are recomputed draw attention dropout a second time (model.attention_dropout=0 would do)": (
            config.recompute_layers > 0 and config.model.attention_dropout > 0
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
