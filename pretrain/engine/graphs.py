"""The encoder's forward and backward as two CUDA graphs: the host starts each of them with one call.

A graph repeats the very kernels that were recorded, over the same memory. So whatever changes from one micro-batch to
the next lies in buffers that are filled before a replay: token ids, segments, and the words that key dropout. Head,
losses, gradient hooks and optimizer run as ever: a replay is one node of autograd, which takes the gradients of its
outputs and hands on those of the parameters.

The parameters that are recorded are aliases of the model's own, on the same memory. DeepSpeed holds the nodes that
accumulate gradients of the model's parameters, and these belong to the default stream: recording would have to wait
for it, which CUDA forbids. The aliases have nodes of their own, and DeepSpeed's hooks see gradients arrive after the
replay as after any backward.

What draws attention dropout is torch's generator of the device. Every graph is registered with it, and takes seed and
offset from it at each replay; it is seeded before, once per micro-batch, and so the bits are those of an eager pass.

Evaluation, and rows of another shape, run eagerly.

Shape letters: B rows, L tokens per row, T = B * L, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pretrain.config.compile_checks import why_no_graphs
from pretrain.config.deepspeed import zero_stage
from pretrain.config.sections import RunConfig
from pretrain.model.dropout import DropoutKey
from pretrain.model.pretraining import BertForPretraining
from pretrain.model.token_rows import TokenRows
from pretrain.runlog import get_logger

log = get_logger(__name__)

_WARM_UP_RUNS = 3
Tensors = tuple[Tensor, ...]


def use_graphs(config: RunConfig, model: BertForPretraining, device: torch.device, dp_size: int) -> None:
    """Let the encoder of `model` be replayed as `train.cuda_graphs` says, or say why it is not."""
    reason = why_no_graphs(config, device.type)
    if reason is not None:
        log.warning("train.cuda_graphs=true has no effect: %s", reason)
    elif config.train.cuda_graphs:
        # Without ZeRO, and where micro-batches add up, gradients stay in `.grad` beyond the next replay.
        copies = zero_stage(config) == 0 or config.grad_accum_steps(dp_size) > 1
        record_encoder(model, CudaRecorder(), copies_gradients=copies)


def record_encoder(model: BertForPretraining, recorder: Recorder, *, copies_gradients: bool) -> None:
    """Replace the encoder of `model`, for rows without padding in training, by graphs that the first call records."""
    encode_tokens = model.encode_tokens

    def encode(
        input_ids_BL: Tensor, segment_BL: Tensor, words_IPW: Tensor, bound_N1: Tensor, block_K3: Tensor
    ) -> Tensors:
        num_rows, length = input_ids_BL.shape
        rows = TokenRows(num_rows, length, bound_N1=bound_N1, block_K3=block_K3)
        # Of the key only the words are read here.
        return encode_tokens(input_ids_BL, segment_BL, rows, key=DropoutKey(0, 0, words_IPW))

    graphed = GraphedEncoder(model, encode, model.encoder_parameters(), recorder, copies_gradients=copies_gradients)

    def replayed(
        input_ids_BL: Tensor,
        segment_BL: Tensor,
        rows: TokenRows,
        token_type_BL: Tensor | None = None,
        key: DropoutKey | None = None,
    ) -> tuple[Tensor, Tensor]:
        bound_N1, block_K3 = rows.bound_N1, rows.block_K3
        is_other = token_type_BL is not None or rows.place_T is not None
        if is_other or key is None or bound_N1 is None or block_K3 is None:
            return encode_tokens(input_ids_BL, segment_BL, rows, token_type_BL, key)
        hidden_TD, embedding_TD = graphed(input_ids_BL, segment_BL, key.words_IPW, bound_N1, block_K3)
        return hidden_TD, embedding_TD

    model.encode_tokens = replayed  # type: ignore[method-assign]


class Recorder(Protocol):
    """Records what a function does on the device; `CudaRecorder`, or in tests one that calls the function again."""

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Run what will be recorded, so that libraries allocate, choose kernels and compile before."""

    def record(self, run: Callable[[], Tensors], memory: Iterable[Tensor]) -> tuple[Tensors, Callable[[], None]]:
        """The outputs of `run`, and what fills the same memory with those for other contents of its inputs.

        `memory` is all that it reads besides what it and earlier recordings have made.
        """


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory, on a stream of their own."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool: Any = None

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Run it a few times on the stream that will be recorded."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP_RUNS):
                run()
        current.wait_stream(self._stream)

    def record(self, run: Callable[[], Tensors], memory: Iterable[Tensor]) -> tuple[Tensors, Callable[[], None]]:
        """Record a graph; the memory that it makes stays reserved for it."""
        graph = torch.cuda.CUDAGraph()
        # By default calls of other threads end a recording, too: the one that prepares batches locks memory.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = run()
        self._pool = graph.pool()
        return outputs, graph.replay


class GraphedEncoder:
    """Stands in for the `encode` of a model: replays it in training, calls it in evaluation.

    Args:
        encode: takes tensors only and returns a tuple of tensors; a method of `model`.
        parameters: those that `encode` reads, by their names in `model`.
        copies_gradients: hand out gradients in memory of their own. Without, a replay overwrites those of the one
            before: right where DeepSpeed has consumed them by then, and wrong where micro-batches add up in `.grad`.
    """

    def __init__(
        self,
        model: nn.Module,
        encode: Callable[..., Tensors],
        parameters: dict[str, nn.Parameter],
        recorder: Recorder,
        *,
        copies_gradients: bool,
    ) -> None:
        self._module = _Encoder(model, encode)
        self._encode, self._recorder, self._copies_gradients = encode, recorder, copies_gradients
        self._parameters = parameters
        self._recording: _Recording | None = None

    def __call__(self, *inputs: Tensor) -> Tensors:
        """The outputs of `encode`; in training they are overwritten by the next call."""
        if not torch.is_grad_enabled():
            return self._encode(*inputs)
        if self._recording is None or self._recording.is_stale():
            self._recording = _Recording(self._module, self._parameters, inputs, self._recorder)
        if not self._recording.fits(inputs):
            return self._encode(*inputs)
        outputs: Tensors = _Replay.apply(self._recording, self._copies_gradients, inputs, *self._parameters.values())
        return outputs


class _Encoder(nn.Module):
    """Lets `functional_call` exchange the parameters of a model while a method of it runs."""

    def __init__(self, model: nn.Module, encode: Callable[..., Tensors]) -> None:
        super().__init__()
        self.model = model
        self.encode = encode

    def forward(self, *inputs: Tensor) -> Tensors:
        """What the method returns."""
        return self.encode(*inputs)


class _Recording:
    """Both graphs, and the memory that they read and write."""

    def __init__(
        self, module: _Encoder, parameters: dict[str, nn.Parameter], inputs: Tensors, recorder: Recorder
    ) -> None:
        self._originals = list(parameters.values())
        self._places = [parameter.data_ptr() for parameter in self._originals]
        aliases: dict[str, Tensor] = {
            f"model.{name}": nn.Parameter(parameter.detach()) for name, parameter in parameters.items()
        }
        self._inputs = [tensor.clone() for tensor in inputs]
        self._is_waiting_for_backward = False
        live: Tensors = ()

        def forward() -> Tensors:
            nonlocal live
            live = torch.func.functional_call(module, aliases, tuple(self._inputs))
            return live

        def backward() -> Tensors:
            return torch.autograd.grad(live, tuple(aliases.values()), self._gradients_of_outputs)

        def both() -> None:
            outputs = forward()
            self._gradients_of_outputs = [torch.zeros_like(output) for output in outputs]
            backward()

        # What was drawn on the way is not to count: a first replay draws what an eager pass would.
        devices = [tensor.device for tensor in self._inputs[:1] if tensor.is_cuda]
        with torch.enable_grad(), torch.random.fork_rng(devices):
            recorder.warm_up(both)
            self._outputs, self._replay_forward = recorder.record(forward, [*self._inputs, *aliases.values()])
            self._gradients_of_outputs = [torch.zeros_like(output) for output in self._outputs]
            self._gradients, self._replay_backward = recorder.record(backward, self._gradients_of_outputs)
        log.info("train.cuda_graphs: recorded forward and backward of the encoder")

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the graphs are for inputs of these shapes and types."""
        pairs = zip(self._inputs, inputs, strict=True)
        return all(kept.shape == given.shape and kept.dtype == given.dtype for kept, given in pairs)

    def is_stale(self) -> bool:
        """Whether a parameter lies in other memory than the one that was recorded."""
        return [parameter.data_ptr() for parameter in self._originals] != self._places

    def run_forward(self, inputs: Sequence[Tensor]) -> Tensors:
        """The outputs, in memory that the next call overwrites."""
        if self._is_waiting_for_backward:
            raise RuntimeError("a second forward pass before the backward pass of the first: their memory is one")
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given, non_blocking=True)
        self._replay_forward()
        self._is_waiting_for_backward = True
        return tuple(output.detach() for output in self._outputs)

    def run_backward(self, gradients_of_outputs: Sequence[Tensor], *, copies: bool) -> Tensors:
        """The gradients of the parameters; without `copies` in memory that the next call overwrites."""
        for kept, given in zip(self._gradients_of_outputs, gradients_of_outputs, strict=True):
            kept.copy_(given)
        self._replay_backward()
        self._is_waiting_for_backward = False
        if not copies:
            # Fresh tensors over the same memory, which autograd takes as they are instead of copying them.
            return tuple(gradient.detach() for gradient in self._gradients)
        fresh = [torch.empty_like(gradient) for gradient in self._gradients]
        torch._foreach_copy_(fresh, list(self._gradients))
        return tuple(fresh)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: _Recording, copies: bool, inputs: Tensors, *parameters: Tensor) -> Tensors:
        ctx.recording, ctx.copies = recording, copies
        return recording.run_forward(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, *ctx.recording.run_backward(gradients, copies=ctx.copies))
