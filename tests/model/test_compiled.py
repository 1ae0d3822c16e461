"""How many graphs torch.compile is asked for, that results are those of eager layers, and what is said if not.

The graphs run as torch traced them: Inductor takes long, `tests/distributed/test_zero_options.py` runs it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pretrain.config.sections import ModelSection, ObjectiveSection
from pretrain.errors import ConfigError
from pretrain.model import compiled
from pretrain.model.compiled import CompiledFunction
from pretrain.model.layer_spec import plain_layers
from pretrain.model.pretraining import BertForPretraining

LENGTH = 12


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs run as they were traced, compiled code goes nowhere, and nothing stays compiled."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unused")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def as_traced(graph: Any, inputs: Any) -> Any:
    return graph.forward


def make_model(num_layers: int = 2, *, is_padded: bool = False, recompute_layers: int = 0) -> BertForPretraining:
    config = ModelSection(
        num_layers=num_layers,
        hidden_size=16,
        num_attention_heads=2,
        ffn_hidden_size=32,
        max_position_embeddings=LENGTH,
    )
    return BertForPretraining(
        config,
        40,
        plain_layers(),
        ObjectiveSection(num_negatives=4),
        seed=1,
        has_padding=is_padded,
        separate_documents=is_padded,
        recompute_layers=recompute_layers,
    )


def compiled_model(mode: str, **options: Any) -> BertForPretraining:
    model = make_model(**options)
    (model.compile_layers if mode == "layers" else model.compile_whole)(f"train.compile={mode}")
    model.compiled_parts[0].backend = as_traced
    return model


def losses_of(model: BertForPretraining, index: int, num_rows: int = 4) -> Tensor:
    """The loss of a micro-batch with documents of other lengths each time, if the model expects them."""
    generator = torch.Generator().manual_seed(index)
    ids_BL = torch.randint(0, 40, (num_rows, LENGTH), generator=generator)
    segment_BL = torch.ones_like(ids_BL)
    if model.separate_documents:
        length_B1 = torch.randint(5, LENGTH, (num_rows, 1), generator=generator)
        column_L = torch.arange(LENGTH)
        segment_BL = torch.where(column_L < length_B1 // 2, 1, torch.where(column_L < length_B1, 2, 0))
    label_M = torch.arange(5)
    losses = model(ids_BL, segment_BL, segment_BL > 0, label_M, label_M, index)
    return torch.stack([losses.total, losses.mlm])


def evaluated(model: BertForPretraining, index: int) -> Tensor:
    model.eval()
    with torch.no_grad():
        losses = losses_of(model, index)
    model.train()
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("num_layers", [2, 12])
def test_all_layers_share_one_graph(num_layers: int) -> None:
    """One in training and one for evaluation, more layers than torch would compile one by one (8)."""
    eager, model = make_model(num_layers), compiled_model("layers", num_layers=num_layers)
    for index in range(3):
        assert_close(losses_of(model, index), losses_of(eager, index))
    assert model.compiled_parts[0].num_graphs == 1
    for index in range(2):
        assert_close(evaluated(model, index), evaluated(eager, index))
    losses_of(model, 3)[0].backward()
    assert model.compiled_parts[0].num_graphs == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "is_padded", "recompute_layers"),
    [("layers", True, 1), ("full", True, 0)],
)
def test_one_graph_in_every_setting(mode: str, is_padded: bool, recompute_layers: int) -> None:
    """With dropout (eager layers add in another order, in C++), and other numbers of tokens and documents each time."""
    options: dict[str, Any] = {"is_padded": is_padded, "recompute_layers": recompute_layers}
    eager, model = make_model(**options), compiled_model(mode, **options)
    for index in range(3):
        for either in (eager, model):
            losses_of(either, index)[0].backward()
    pairs = zip(eager.parameters(), model.parameters(), strict=True)
    for one, other in pairs:
        assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)
    assert_close(evaluated(model, 5), evaluated(eager, 5))
    assert model.compiled_parts[0].num_graphs == 2


def plus_one(value: Tensor, number: int = 1) -> Tensor:
    return value + number


def function_of(function: Any, **options: Any) -> CompiledFunction:
    settings: dict[str, Any] = {"what": "the layer", "covers": "3 layers", "key": "train.compile=layers", **options}
    return CompiledFunction(function, backend=as_traced, **settings)


@pytest.mark.parametrize(
    ("arguments", "guard"),
    [((torch.ones(3), 1), "size mismatch at index 0. expected 2, actual 3"), ((torch.ones(2), 5), "number == 1")],
)
def test_one_graph_too_many_ends_the_run_and_names_the_guard(arguments: tuple[Any, ...], guard: str) -> None:
    function = function_of(plus_one)
    function(torch.ones(2), 1)
    with torch.no_grad():
        function(torch.ones(2), 1)
    with pytest.raises(ConfigError, match=r"train\.compile=layers: the layer would be compiled again") as caught:
        function(*arguments)
    assert guard in str(caught.value)
    assert str(caught.value).endswith("; set train.compile=off instead of layers")
    assert torch.equal(function(torch.ones(2), 1), torch.full((2,), 2.0))


def both(one: Tensor, other: Tensor) -> Tensor:
    return torch.cat([one + 1, other])


def test_varying_sizes_need_no_other_graph() -> None:
    """Not even if two of them were equal by chance at first."""
    function = function_of(both, dynamic=True)
    for one, other in ((3, 3), (2, 5), (7, 4)):
        assert len(function(torch.ones(one), torch.ones(other))) == one + other
    assert function.num_graphs == 1


def test_special_sizes_may_need_a_few_more() -> None:
    """torch makes a constant of a size of 1; a run must not end because of a micro-batch with a single document."""
    function = function_of(both, dynamic=True)
    for one in range(1, 5):
        assert len(function(torch.ones(one), torch.ones(2))) == one + 2
    assert function.num_graphs == 2


def breaks_off(value: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return value * 2


def test_a_break_of_the_graph_ends_the_run_and_is_located() -> None:
    with pytest.raises(ConfigError, match=r"the layer cannot be compiled as one graph: .*\(test_compiled\.py:\d+\)"):
        function_of(breaks_off)(torch.ones(2))


def test_where_breaks_are_right_the_first_call_counts() -> None:
    """Tensor parallelism: linears stay outside of the graphs."""

    def in_parts(value: Tensor) -> Tensor:
        value = value + 1
        torch._dynamo.graph_break()
        return value * 2

    function = function_of(in_parts, is_whole=False)
    function(torch.ones(2))
    assert function.num_graphs == 2
    with pytest.raises(ConfigError, match="would be compiled again"):
        function(torch.ones(3))


def test_a_compiler_that_is_missing_is_named() -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    def missing(graph: Any, inputs: Any) -> Any:
        raise InvalidCxxCompiler

    function = function_of(plus_one)
    function.backend = missing
    with pytest.raises(ConfigError, match=r"cannot be compiled here: No working C\+\+ compiler found"):
        function(torch.ones(2))


def test_news_are_told_once() -> None:
    function = function_of(plus_one)
    assert function.news() is None
    function(torch.ones(2))
    assert str(function.news()).startswith("compiled 3 layers as 1 graph in ")
    assert function.news() is None
    with torch.no_grad():
        function(torch.ones(2))
    assert str(function.news()).startswith("compiled 3 layers as 1 graph for evaluation in ")


def test_compiled_code_is_kept_in_a_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.choose_cache_folder()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "unused"  # the user's own choice
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compiled.choose_cache_folder()
    folder = tmp_path / "taco" / "inductor"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    folder.chmod(0o770)
    compiled.choose_cache_folder()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
