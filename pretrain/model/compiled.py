"""Functions that torch.compile makes one graph of, and that stay one graph: anything else ends the run, in words.

All encoder layers share one compiled function. Their parameters are inputs of its graph, so it is compiled once in
training and once for evaluation, whatever the number of layers. torch would otherwise compile again for whatever looks
new to it, and after a few times run the rest uncompiled without a word: that is how a run loses its speed and nobody
sees it. So the graphs are counted as torch asks for them, and one too many is an error that names the guard.

Nothing of TorchDynamo is imported before something is compiled: it takes as long to load as torch itself.
"""

from __future__ import annotations

import math
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pretrain.errors import ConfigError, counted
from pretrain.runlog import get_logger

log = get_logger(__name__)

# Sizes that vary have a few special values, 1 above all, of which torch makes constants.
_MOST_DYNAMIC_GRAPHS = 4
# Where Inductor keeps what it has compiled; its own default is lost with /tmp.
_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


class CompiledFunction:
    """A function that runs as one compiled graph in training and as another without gradients.

    Args:
        function: what to compile.
        what: names it in errors: "the encoder layer".
        covers: what is computed by it, in the line that says how long compiling took: "24 encoder layers".
        key: the configuration that asked for it: "train.compile=layers".
        is_whole: a break of the graph is an error. Without, as many graphs as the first call needs are right.
        dynamic: sizes of the inputs vary from call to call, and are not part of the graph; up to four graphs are right.
        is_kept: backward runs with `retain_graph`, so it must not write into what forward has kept.
        backend: compiles a graph; torch's Inductor if left out.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        what: str,
        covers: str,
        key: str,
        is_whole: bool = True,
        dynamic: bool = False,
        is_kept: bool = False,
        backend: Callable[..., Any] | None = None,
    ) -> None:
        self.what, self.covers, self.key = what, covers, key
        self.num_graphs = 0
        """Compiled so far, with and without gradients."""
        self.seconds = 0.0
        """Spent on compiling so far, backward included."""
        self.backend = backend
        # By mode, with gradients (True) or without: how many graphs it has, and had when its first call ended.
        self._graphs = Counter[bool]()
        self._graphs_at_first: dict[bool, int] = {}
        self._told: tuple[int, float] = (0, 0.0)
        self._is_compiling_since: float | None = None
        self._function, self._is_whole, self._dynamic, self._is_kept = function, is_whole, dynamic, is_kept
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns.

        Raises:
            ConfigError: it cannot be compiled here, or not as one graph.
        """
        if self._compiled is None:
            self._compiled = self._prepare()
        try:
            result = self._compiled(*arguments)
            mode = torch.is_grad_enabled()
            self._graphs_at_first.setdefault(mode, self._graphs[mode])
            return result
        except Exception as error:
            explained = self._explain(error, arguments)
            if explained is None:
                raise
            raise ConfigError(explained) from error

    def news(self) -> str | None:
        """What has been compiled since the last call, and how long it took; None for nothing."""
        graphs, seconds = self.num_graphs - self._told[0], self.seconds - self._told[1]
        if graphs == 0:
            return None
        purpose = "" if self._graphs[True] and self._told[0] == 0 else " for evaluation"
        self._told = (self.num_graphs, self.seconds)
        return f"compiled {self.covers} as {counted(graphs, 'graph')}{purpose} in {seconds:.0f} s"

    def _prepare(self) -> Callable[..., Any]:
        choose_cache_folder()
        self._measure_time()
        if self._is_kept:
            from torch._functorch import config

            config.donated_buffer = False
        if self._dynamic:
            from torch.fx.experimental import _config

            _config.use_duck_shape = False  # sizes that are equal at first need not stay so
        return torch.compile(
            self._function, fullgraph=self._is_whole, dynamic=self._dynamic, backend=self._compile_graph
        )

    def _compile_graph(self, graph: Any, inputs: Any) -> Any:
        """The backend: torch calls it for every graph that it wants compiled."""
        mode = torch.is_grad_enabled()
        if self._graphs[mode] >= self._most_graphs(mode):
            raise _OneTooManyError
        self._graphs[mode] += 1
        self.num_graphs += 1
        if self.backend is not None:
            return self.backend(graph, inputs)
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs)

    def _most_graphs(self, mode: bool) -> float:
        most = 1.0 if self._is_whole else self._graphs_at_first.get(mode, math.inf)
        return most * _MOST_DYNAMIC_GRAPHS if self._dynamic else most

    def _measure_time(self) -> None:
        """Add up the time of compilations. Backward may be compiled when it runs first, outside of any call here."""
        from torch._dynamo.callback import callback_handler

        def start(_: Any) -> None:
            self._is_compiling_since = time.perf_counter()

        def end(_: Any) -> None:
            if self._is_compiling_since is not None:
                self.seconds += time.perf_counter() - self._is_compiling_since
                self._is_compiling_since = None

        callback_handler.register_start_callback(start)
        callback_handler.register_end_callback(end)

    def _explain(self, error: Exception, arguments: tuple[Any, ...]) -> str | None:
        """One line for what the user can change; None if the error is another one."""
        from torch._dynamo import config, exc

        instead = f"set train.compile=off instead of {self.key.partition('=')[2]}"
        inner = getattr(error, "inner_exception", error)
        if isinstance(inner, _OneTooManyError):
            assert self._compiled is not None
            try:
                with config.patch(error_on_recompile=True):  # says which guards failed
                    self._compiled(*arguments)
            except exc.RecompileError as reasons:
                return f"{self.key}: {self.what} would be compiled again ({_guards(str(reasons))}); {instead}"
            return f"{self.key}: {self.what} would be compiled again; {instead}"
        if isinstance(error, exc.Unsupported):
            return f"{self.key}: {self.what} cannot be compiled as one graph: {_untraced(error)}; {instead}"
        if isinstance(inner, exc.TorchDynamoException) or type(error).__module__.startswith("torch._"):
            return f"{self.key}: {self.what} cannot be compiled here: {_untraced(inner)}; {instead}"
        return None


def compiled_parts(model: Any) -> list[CompiledFunction]:
    """The compiled functions of a model or pipeline stage."""
    parts: list[CompiledFunction] = getattr(model, "compiled_parts", [])
    return parts


def choose_cache_folder() -> None:
    """Let compiled code outlive the machine's restart, in a folder that nobody else can write to.

    The cache holds code that is run, so a folder that others can change is not used: torch's default applies.
    """
    if os.environ.get(_CACHE_VARIABLE):
        return
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(root) / "taco" / "inductor"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        is_private = found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        problem = None if is_private else "others can write to it"
    except OSError as error:
        problem = error.strerror or str(error)
    if problem is not None:
        log.warning("%s: cannot keep compiled code: %s; set %s to a private folder", folder, problem, _CACHE_VARIABLE)
        return
    os.environ[_CACHE_VARIABLE] = str(folder)


class _OneTooManyError(Exception):
    """torch asks for a graph that should be there already."""


def _guards(message: str) -> str:
    """What has changed since an earlier compilation, without the modes, which differ on purpose."""
    lines = [line.strip(" -") for line in message.splitlines()[2:]]
    reasons = [line.partition(": ")[2] or line for line in lines if line]
    return "; ".join([reason for reason in reasons if "grad_mode" not in reason] or reasons or ["no guard is named"])


def _untraced(error: BaseException) -> str:
    """What TorchDynamo cannot trace, why, and where it stands."""
    message = str(error)
    why = re.search(r"Explanation: *(.+)", message)
    places = re.findall(r'File "([^"]+)", line (\d+)', message)
    where = f" ({Path(places[-1][0]).name}:{places[-1][1]})" if places else ""
    return _first_line(error) + (f": {why[1].rstrip('.')}" if why else "") + where


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__
