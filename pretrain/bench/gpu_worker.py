"""A process that carries out experiments of `taco bench gpu` one after the other, and says how each went.

What it says are lines of JSON on standard output. A setting that does not exist, and memory that is not enough, end one
experiment; anything else ends the process, and another one goes on with the next experiment.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from typing import Any

from pretrain.bench.gpu_experiments import BERT_LARGE, EXPERIMENTS, TINY, Experiment
from pretrain.bench.step_contenders import Shape, config_of, measure
from pretrain.errors import ConfigError, TacoError

_MOST_LEFT_BYTES = 200_000_000
LEAVES_MEMORY = 10
"""Exit code: the last experiment was carried out, but left memory behind; the next one needs another process."""


def main(arguments: Sequence[str]) -> None:
    """`gpu_worker tiny|large STEPS NAME...`"""
    size, steps, *names = arguments
    by_name = {experiment.name: experiment for experiment in EXPERIMENTS}
    for name in names:
        say(event="begin", name=name)
        _carry_out(by_name[name], is_tiny=size == "tiny", steps=int(steps))
        if _held_bytes() > _MOST_LEFT_BYTES:
            sys.exit(LEAVES_MEMORY)


def say(**message: Any) -> None:
    """One line for the parent."""
    print(json.dumps(message), flush=True)


def _carry_out(experiment: Experiment, *, is_tiny: bool, steps: int) -> None:
    import torch

    shape = experiment.shape(TINY if is_tiny else BERT_LARGE)
    try:
        config_of(shape, is_contrastive=True)
    except ConfigError as error:
        say(event="end", name=experiment.name, status="skipped", reason=" ".join(str(error).split()))
        return
    try:
        if experiment.contender.startswith("loss "):
            answer = _measure_loss(experiment.contender.removeprefix("loss "), shape, steps)
        else:
            answer = measure(
                experiment.contender,
                shape,
                threads=1 if is_tiny else 8,
                steps=steps,
                say=lambda stage: say(event="stage", name=experiment.name, stage=stage),
            )
    except (TacoError, torch.OutOfMemoryError) as error:
        say(event="end", name=experiment.name, status="failed", reason=str(error).splitlines()[0])
    else:
        say(event="end", name=experiment.name, status="done", **answer)
    _release()


def _measure_loss(contender: str, shape: Shape, repeats: int) -> dict[str, Any]:
    """The contrastive loss with its gradients, drawn pairs included where they are drawn with it."""
    from pretrain.bench import loss_contenders

    if contender == "triton" and shape.device == "cpu":
        raise ConfigError("Triton's kernels need a GPU")
    keys = ("rows", "seq_length", "hidden_size", "num_negatives", "device", "precision")
    found = loss_contenders.measure(contender, {key: getattr(shape, key) for key in keys}, 8, repeats)
    return {**found, "seconds": found["loss_seconds"]}


def _release() -> None:
    """Give memory back before the next experiment: engines hold themselves in circles."""
    import torch

    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _held_bytes() -> int:
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


if __name__ == "__main__":
    main(sys.argv[1:])
