"""The encoder replayed: everything but the recording itself, which needs a GPU (`tests/gpu/test_gpu_graphs.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from called_again import CalledAgain
from engine_runs import Run, engine_ranks
from forked import run_ranks
from parity import STEPS, load

from pretrain.config.sections import ModelSection, ObjectiveSection, RunConfig
from pretrain.engine import graphs
from pretrain.model.layer_spec import plain_layers
from pretrain.model.pretraining import BertForPretraining

SHAPE = (4, 12)


def make_model(*, is_replayed: bool = False, recompute_layers: int = 0) -> tuple[BertForPretraining, CalledAgain]:
    config = ModelSection(
        num_layers=2, hidden_size=16, num_attention_heads=2, ffn_hidden_size=32, max_position_embeddings=SHAPE[1]
    )
    model = BertForPretraining(
        config,
        40,
        plain_layers(),
        ObjectiveSection(num_negatives=4),
        seed=1,
        has_padding=False,
        recompute_layers=recompute_layers,
    )
    recorder = CalledAgain()
    if is_replayed:
        graphs.record_encoder(model, recorder, copies_gradients=True)
    return model, recorder


def loss_of(model: BertForPretraining, index: int, shape: tuple[int, int] = SHAPE) -> torch.Tensor:
    ids_BL = torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(index))
    segment_BL = torch.ones_like(ids_BL)
    label_M = torch.arange(5)
    return model(ids_BL, segment_BL, segment_BL.bool(), label_M, label_M, index).total


def gradients_of(model: BertForPretraining) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("recompute_layers", [0, 1])
def test_replays_have_the_bits_of_eager_passes(recompute_layers: int) -> None:
    """With dropout, with another micro-batch each time, with weights that change, and with gradients that add up."""
    eager, _ = make_model(recompute_layers=recompute_layers)
    replayed, recorder = make_model(is_replayed=True, recompute_layers=recompute_layers)
    for index in range(4):
        for model in (eager, replayed):
            loss_of(model, index).backward()
        assert all(map(torch.equal, gradients_of(eager), gradients_of(replayed)))
        if index == 1:
            for model in (eager, replayed):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.sub_(parameter.grad)
                        parameter.grad = None
    assert len(gradients_of(replayed)) == len(list(replayed.parameters()))
    assert (recorder.num_recorded, recorder.num_replays) == (2, 8)
    assert recorder.foreign_reads == []


def test_the_random_state_is_that_of_an_eager_pass() -> None:
    """A GPU's attention draws from torch's generator, which is seeded before the first, recording, call."""
    model, _ = make_model(is_replayed=True)
    state = torch.get_rng_state()
    loss_of(model, 0).backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_and_other_shapes_run_eagerly() -> None:
    eager, _ = make_model()
    replayed, recorder = make_model(is_replayed=True)
    loss_of(replayed, 0).backward()
    recorded = recorder.num_replays
    assert torch.equal(loss_of(replayed, 1, (2, 12)), loss_of(eager, 1, (2, 12)))
    for model in (eager, replayed):
        model.eval()
    with torch.no_grad():
        assert torch.equal(loss_of(replayed, 2), loss_of(eager, 2))
    assert recorder.num_replays == recorded


def test_parameters_that_move_are_recorded_again() -> None:
    eager, _ = make_model()
    replayed, recorder = make_model(is_replayed=True)
    loss_of(replayed, 0).backward()
    for parameter in replayed.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(loss_of(replayed, 1), loss_of(eager, 1))
    assert recorder.num_recorded == 4


def test_a_second_forward_before_backward_is_refused() -> None:
    model, _ = make_model(is_replayed=True)
    loss_of(model, 0)
    with pytest.raises(RuntimeError, match="their memory is one"):
        loss_of(model, 1)


def test_a_tensor_from_elsewhere_is_noticed() -> None:
    """What the stand-in is for: a graph would go on reading the tensor that was there when it was recorded."""
    weight, elsewhere = torch.nn.Parameter(torch.ones(3)), torch.ones(3)
    module = torch.nn.Module()
    module.weight = weight
    recorder = CalledAgain()

    def read_both(inputs: torch.Tensor) -> tuple[torch.Tensor]:
        return (inputs * module.weight * elsewhere,)

    encoder = graphs.GraphedEncoder(module, read_both, {"weight": weight}, recorder, copies_gradients=True)
    encoder(torch.ones(3))
    assert any("mul" in read for read in recorder.foreign_reads)


# -- under DeepSpeed ---------------------------------------------------------------------------------------------------

LAYOUTS = {
    "0": ("zero.stage=0",),
    "0, micro-batches add up": ("zero.stage=0", "train.global_batch_size=8"),
    "1": ("zero.stage=1",),
    "1, micro-batches add up": ("zero.stage=1", "train.global_batch_size=8"),
    "2, micro-batches add up": ("zero.stage=2", "train.global_batch_size=8"),
    "2, bf16": ("zero.stage=2", "precision=bf16"),
    "1, recomputing": ("zero.stage=1", "train.recompute_layers=all"),
}


@dataclass(frozen=True)
class Replayed:
    """What one rank found, and what its recorder saw."""

    runs: dict[str, Run]
    num_replays: int
    foreign_reads: list[str]


def replayed_ranks(configs: dict[str, RunConfig], folder: Path) -> Replayed:
    """`engine_ranks` with the stand-in for graphs, whatever the device."""
    recorder = CalledAgain()
    changes: dict[str, Any] = {"CudaRecorder": lambda: recorder, "why_no_graphs": lambda config, device: None}
    for name, value in changes.items():
        setattr(graphs, name, value)
    runs = engine_ranks(configs, folder)
    return Replayed(runs, recorder.num_replays, recorder.foreign_reads)


def in_process(function: Callable[..., Any], folder: Path, *overrides: str) -> Any:
    small = ("train.micro_batch_size=4", "train.global_batch_size=4", *overrides)
    folder.mkdir(exist_ok=True)
    configs = {name: load(folder, *small, *layout) for name, layout in LAYOUTS.items()}
    return run_ranks(1, function, configs, folder, timeout=280)[0]


@pytest.mark.slow
def test_engines_with_and_without_replays_have_the_same_bits(tmp_path: Path, subtests: pytest.Subtests) -> None:
    expected: dict[str, Run] = in_process(engine_ranks, tmp_path / "eager")
    found: Replayed = in_process(replayed_ranks, tmp_path / "replayed", "train.cuda_graphs=true")
    for name in LAYOUTS:
        with subtests.test(name):
            assert found.runs[name][0] == expected[name][0]
            weights = expected[name][1]
            assert all(torch.equal(found.runs[name][1][key], weight) for key, weight in weights.items())
    # Forward and backward of each micro-batch of training.
    assert found.num_replays == 2 * STEPS * (len(LAYOUTS) + 3)
    assert found.foreign_reads == []
