"""Compiles the step's kernels for a GPU with Triton's compiler, where there is none: the interpreter accepts more.

The launchers themselves run, with fake tensors on a fake GPU; instead of a launch, the kernel is compiled for the types
and the constants that the launcher gave. So what is compiled here is what a run compiles, also after a change.

A process of its own, since a kernel is for the interpreter or for the compiler from its definition on. Its argument is
a compute capability, 80 or 90. Prints a JSON object: for every kernel of every case below what a program takes, as
`Program` has it, and how often it was compiled.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, MockTensor

from pretrain.kernels import (
    adamw,
    add_norm_triton,
    attention,
    contrast,
    cross_entropy,
    dropout_triton,
    lamb,
    norm,
    pairs,
)
from pretrain.kernels import fp8_cast_triton as fp8
from pretrain.kernels.dropout_mask import NUM_WORDS, HiddenDropout

LIMITS = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a program may take, by compute capability."""
FIRST_WITH_FP8 = 89
GPU = torch.device("cuda", 0)
# Two micro-batches; the lengths and widths of the second are no powers of two.
BERT_LARGE = {"rows": 64, "length": 256, "width": 1024, "heads": 16}
RAGGED = {"rows": 3, "length": 77, "width": 200, "heads": 2}


class Program(NamedTuple):
    """What a program of a compiled kernel takes."""

    shared: int
    """Bytes."""
    registers: int
    """Of a thread."""
    spills: int
    """Bytes of a thread that do not fit into its registers."""


class Compiled:
    """Compiles what is launched, and notes it."""

    def __init__(self, capability: int) -> None:
        self.programs: dict[str, Program] = {}
        self.variants: dict[str, set[str]] = {}
        """How often a kernel is compiled for one case, whose numbers of tokens differ."""
        self._target = GPUTarget("cuda", capability, 32)
        self._case = ""

    @contextmanager
    def launches(self, case: str) -> Iterator[None]:
        """Here kernels are compiled instead of launched, and noted under a case."""
        self._case = case
        driver.set_active(
            SimpleNamespace(
                get_current_device=lambda: 0,
                get_current_stream=lambda _: 0,
                get_current_target=lambda: self._target,
            )
        )
        multiprocessors = SimpleNamespace(multi_processor_count=132)
        launch = JITFunction.run

        def run(kernel: Any, *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
            values = tuple(_described(value) for value in values)
            named = {name: _described(value) for name, value in named.items()}
            log = io.StringIO()
            with redirect_stdout(log):
                compiled = launch(kernel, *values, grid=grid, warmup=True, **named)
            self._note(kernel, compiled, log.getvalue())

        with (
            FakeTensorMode(),
            mock.patch.object(JITFunction, "run", run),
            # The two methods in use here that torch without CUDA refuses for the tensors of a fake GPU.
            mock.patch.object(FakeTensor, "__getitem__", lambda tensor, number: tensor.select(0, number)),
            mock.patch.object(FakeTensor, "contiguous", lambda tensor: _tensor(*tensor.shape, dtype=tensor.dtype)),
            mock.patch.object(torch.cuda, "get_device_properties", return_value=multiprocessors),
        ):
            yield

    def _note(self, kernel: Any, compiled: Any, log: str) -> None:
        name = f"{kernel.module.rpartition('.')[2]}.{kernel.fn.__name__}: {self._case}"
        self.variants.setdefault(name, set()).add(compiled.hash)
        registers = re.search(r"Used (\d+) registers", log)
        if registers is None:  # compiled before, for another case
            return
        spills = re.search(r"(\d+) bytes spill stores", log)
        self.programs[name] = Program(
            compiled.metadata.shared, int(registers.group(1)), 0 if spills is None else int(spills.group(1))
        )


def _described(value: Any) -> Any:
    return MockTensor(value.dtype, list(value.shape)) if isinstance(value, Tensor) else value


def _tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU)


def _long(*shape: int) -> Tensor:
    return _tensor(*shape, dtype=torch.int64)


def contrastive(
    shape: dict[str, int], dtype: torch.dtype, *, num_tokens: int | None = None, needs_gradient: bool = True
) -> None:
    """The loss and its gradients; with `num_tokens` over the tokens of some places only."""
    num_places = shape["rows"] * shape["length"]
    place_T = None if num_tokens is None else _long(num_tokens)
    token_G = None if num_tokens is None else _long(num_places)
    hidden_TD = _tensor(num_tokens or num_places, shape["width"], dtype=dtype)
    valid_BL, key_2 = _tensor(shape["rows"], shape["length"], dtype=torch.bool), _long(2)
    table = pairs.tabulate_pairs(valid_BL, _long(*valid_BL.shape), key_2, window=2, token_G=token_G)
    context = _Context()
    function = contrast._DrawnContrast
    own = range(len(hidden_TD))
    function.forward(context, hidden_TD, hidden_TD, valid_BL, place_T, table, 50, 0.07, own, needs_gradient)
    if needs_gradient:
        function.backward(context, _tensor(dtype=torch.float32))


def negatives(shape: dict[str, int]) -> None:
    """The negatives, written out."""
    valid_BL = _tensor(shape["rows"], shape["length"], dtype=torch.bool)
    pairs.draw_pairs(valid_BL, window=2, num_negatives=50, seed=1, micro_batch_index=2)


def add_norm(num_tokens: int, width: int, dtype: torch.dtype, *, drops: bool = True, has_lines: bool = False) -> None:
    """Dropout, residual and LayerNorm, both ways."""
    drop = _hidden_dropout(num_tokens, has_lines) if drops else None
    hidden_ND, weight_D = _tensor(num_tokens, width, dtype=dtype), _tensor(width, dtype=dtype)
    out_ND, rstd_N = add_norm_triton.forward_triton(hidden_ND, hidden_ND, weight_D, weight_D, 1e-12, drop)
    add_norm_triton.backward_triton(hidden_ND, out_ND, rstd_N, weight_D, weight_D, drop)


def dropout(num_tokens: int, width: int, dtype: torch.dtype, *, has_lines: bool = False) -> None:
    """Dropout alone."""
    dropout_triton.drop_triton(_tensor(num_tokens, width, dtype=dtype), _hidden_dropout(num_tokens, has_lines))


def _hidden_dropout(num_tokens: int, has_lines: bool) -> HiddenDropout:
    return HiddenDropout(0.1, _long(NUM_WORDS), 0, _long(num_tokens) if has_lines else None)


def words(num_rows: int, num_words: int, dtype: torch.dtype, *, has_bias: bool = True) -> None:
    """Cross-entropy over the vocabulary, both ways."""
    context, function = _Context(), cross_entropy._FusedCrossEntropy
    bias_V = _tensor(num_words, dtype=dtype) if has_bias else None
    function.forward(context, _tensor(num_rows, num_words, dtype=dtype), bias_V, _long(num_rows), None, num_words)
    function.backward(context, _tensor(dtype=torch.float32))


def attend(num_tokens: int, heads: int, size: int, dtype: torch.dtype, *, drops: bool, has_places: bool) -> None:
    """Attention, both ways."""
    qkv_TX, grad_TY = _tensor(num_tokens, heads * 3 * size, dtype=dtype), _tensor(num_tokens, heads * size, dtype=dtype)
    block_K3 = _tensor(-(-num_tokens // 64), 3, dtype=torch.int32)
    place_T = _long(num_tokens) if has_places else None
    settings = (0.1, _long(NUM_WORDS), 0, heads, 512) if drops else (0.0, None, 0, 1, 0)
    out_TY, log_sum_HT = attention._forward(qkv_TX, size, block_K3, place_T, *settings)
    attention._backward(grad_TY, out_TY, log_sum_HT, qkv_TX, size, block_K3, place_T, *settings)


def update(num_elements: int, gradients: torch.dtype, copies: torch.dtype | None, *, scales: bool) -> None:
    """AdamW, LAMB and the norm over a flat buffer."""
    buffers = [_tensor(num_elements, dtype=torch.float32) for _ in range(3)]
    gradient_N, step = _tensor(num_elements, dtype=gradients), _tensor(dtype=torch.float32)
    copy_N = None if copies is None else _tensor(num_elements, dtype=copies)
    scale, skip = (_tensor(dtype=torch.float32), _tensor(dtype=torch.bool)) if scales else (None, None)
    settings = {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01}
    adamw.fused_adamw(
        buffers[0], gradient_N, *buffers[1:], step, copy_N, lr=1e-4, gradient_scale=scale, skip=skip, **settings
    )
    blocks = (_long(9), _long(9), *(_tensor(count, dtype=torch.int32) for count in (9, 4, 3)))
    table, squares_P2 = lamb.BlockTable(*blocks), _tensor(3, 2, dtype=torch.float64)
    lamb.fused_moments(
        buffers[0], gradient_N, *buffers[1:], step, squares_P2, table, gradient_scale=scale, skip=skip, **settings
    )
    lamb.fused_weights(*buffers, step, copy_N, squares_P2, table, lr=1e-4, skip=skip, **settings)
    norm.block_sums(gradient_N)


def cast(num_rows: int, width: int, dtype: torch.dtype, *, rows: bool, columns: bool) -> None:
    """The rounding to FP8."""
    num_columns = -(-num_rows // 16) * 16 if columns else None
    fp8.cast_to_fp8(_tensor(num_rows, width), dtype, rows=rows, num_columns=num_columns, smallest=2.0**-100)


class _Context:
    """In place of autograd's own, which differentiates real tensors only."""

    needs_input_grad = (True,) * 9

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


def cases(capability: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is compiled: its name, and the launchers. A name comes again where only the number of tokens differs."""
    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    num_tokens = BERT_LARGE["rows"] * BERT_LARGE["length"]
    yield "bf16", lambda: contrastive(BERT_LARGE, bfloat16)
    yield "fp32", lambda: contrastive(BERT_LARGE, float32)
    yield "fp16, ragged", lambda: contrastive(RAGGED, float16, num_tokens=101)
    yield "bf16, forward only", lambda: contrastive(BERT_LARGE, bfloat16, needs_gradient=False)
    yield "written out", lambda: negatives(RAGGED)
    yield "fp32, no dropout", lambda: add_norm(num_tokens, 1024, float32, drops=False)
    yield "fp16, ragged", lambda: add_norm(231, 200, float16)
    yield "fp32, ragged", lambda: dropout(231, 200, float32)
    yield "fp32", lambda: words(2464, 30_592, float32)
    yield "fp16, ragged, no bias", lambda: words(35, 1001, float16, has_bias=False)
    for count in (num_tokens, 11_113, 1):
        yield "bf16, some places", partial(contrastive, BERT_LARGE, bfloat16, num_tokens=count)
        yield "bf16, some places", partial(add_norm, count, 1024, bfloat16, has_lines=True)
        yield "bf16, some places", partial(dropout, count, 1024, bfloat16, has_lines=True)
        yield "bf16", partial(words, count, 30_592, bfloat16)
        for size in (64, 128):
            yield f"bf16, heads of {size}", partial(_attend, count, size, bfloat16)
        if capability >= FIRST_WITH_FP8 and count > 2048:  # fewer rows have fewer parts, a constant
            yield "e4m3, both orders", partial(cast, 15 + count, 1024, torch.float8_e4m3fn, rows=True, columns=True)
            yield "e4m3, rows only", partial(cast, 15 + count, 1024, torch.float8_e4m3fn, rows=True, columns=False)
    if capability >= FIRST_WITH_FP8:
        yield "e5m2, transposed, ragged", partial(cast, 231, 208, torch.float8_e5m2, rows=False, columns=True)
    # On an A100 16 bits are 16 bits.
    for name, dtype in (("fp32", float32), ("fp16", float16))[: 2 if capability >= FIRST_WITH_FP8 else 1]:
        for size in (64, 128):
            yield f"{name}, heads of {size}", partial(_attend, num_tokens, size, dtype)
    yield "bf16, ragged, no dropout", lambda: attend(231, 2, 40, bfloat16, drops=False, has_places=False)
    yield "bf16 gradients and copy", lambda: update(335_141_888, bfloat16, bfloat16, scales=True)
    yield "fp32 gradients, ragged", lambda: update(1001, float32, None, scales=False)


def _attend(num_tokens: int, size: int, dtype: torch.dtype) -> None:
    attend(num_tokens, 16, size, dtype, drops=True, has_places=True)


if __name__ == "__main__":
    wanted = int(sys.argv[1])
    knobs.nvidia.dump_ptxas_log = True
    compiled = Compiled(wanted)
    for case, launch in cases(wanted):
        with compiled.launches(case):
            launch()
    programs = {
        name: {**program._asdict(), "variants": len(compiled.variants[name])}
        for name, program in compiled.programs.items()
    }
    print(json.dumps({"limit": LIMITS[wanted], "programs": programs}))
