"""The `taco` console script: which verb is which program, and how every program ends.

Only the asked verb's module is imported, so `--help` costs what that verb's imports cost and no more: verb modules
import torch, DeepSpeed and pydantic inside their functions. Each verb module has a typer `app` with one command and is
a program of its own: `taco train`, `python -m pretrain.train` and, for corpora, `python data_tools/preprocess.py`.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import shlex
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

try:
    import typer
    from typer.core import TyperCommand
except ModuleNotFoundError as error:
    if error.name != "typer":
        raise
    sys.exit(f"error: taco needs the package typer, which is not installed: {sys.executable} -m pip install typer")

from pretrain import __version__
from pretrain.console.machine_faults import explain_machine_fault
from pretrain.console.streams import standard_streams
from pretrain.errors import TacoError, cut_to_screen, leave_reason


class Verb(NamedTuple):
    """A verb of the console script: the module that holds its `app`, and one line of help."""

    module: str
    summary: str


# Named, not imported: `pretrain` stays importable without data_tools, and a verb's imports are paid only when it runs.
VERBS = {
    "init": Verb("pretrain.init.__main__", "lay out a new project: configurations, job scripts, what to type next"),
    "data preprocess": Verb("data_tools.preprocess", "corpora to memory-mapped token datasets"),
    "data merge": Verb("data_tools.merge", "join the parts of a corpus, or several datasets"),
    "data train-tokenizer": Verb("data_tools.train_tokenizer", "a WordPiece, BPE or SentencePiece vocabulary"),
    "data inspect": Verb("data_tools.peek", "documents and training rows of a dataset, as training sees them"),
    "data index": Verb("data_tools.build_index", "build the index of datasets ahead of training; fill rates"),
    "data stats": Verb("data_tools.dataset_stats", "lengths, vocabulary use and rows of datasets, with a picture"),
    "data verify": Verb("data_tools.verify", "check datasets against their hashes, locate damage"),
    "train": Verb("pretrain.train", "pretrain BERT with the TACO objective, on one process or several (--processes)"),
    "preflight": Verb(
        "pretrain.preflight.__main__", "check machines before a run: GPUs, host names, disks, data, network"
    ),
    "checkpoint": Verb("pretrain.checkpoint.__main__", "list, verify, prune and reshape the checkpoints of a run"),
    "export": Verb("pretrain.export", "checkpoint to a Hugging Face folder"),
    "import-hf": Verb("pretrain.import_hf", "Hugging Face BERT folder to a checkpoint to start from"),
    "fill-mask": Verb("pretrain.evaluate.fill_mask", "what an exported model predicts for [MASK]"),
    "report": Verb("pretrain.report.__main__", "curves of a run as a picture and a page"),
    "bench data": Verb("pretrain.bench.data", "text per CPU second of preprocessing against three peers"),
    "bench host": Verb(
        "pretrain.bench.host", "what a training step costs the host, with any number of pretended ranks"
    ),
    "bench index": Verb("pretrain.bench.index", "CPU time and memory of the sample index against megatron-core"),
    "bench loader": Verb("pretrain.bench.loader", "CPU time of a masked row against megatron-core and Hugging Face"),
    "bench loss": Verb("pretrain.bench.loss", "the contrastive loss and its pairs against the authors' way"),
    "bench step": Verb("pretrain.bench.step", "a training step against Hugging Face and the authors' loss"),
    "bench optimizer": Verb("pretrain.bench.optimizer", "an optimizer step against torch and a loop over parameters"),
    "bench gpu": Verb("pretrain.bench.gpu", "BERT-large's step on one GPU in many settings, within minutes"),
}

# Packages of others by the module that is imported: what pip calls them. Where some are not installed, as on a machine
# that only makes datasets, the verbs that do without them still run.
PACKAGES = {
    "backports": "backports.zstd",
    "backports.zstd": "backports.zstd",
    "datasets": "datasets",
    "deepspeed": "deepspeed",
    "google": "protobuf",
    "google.protobuf": "protobuf",
    "matplotlib": "matplotlib",
    "megatron": "megatron-core",
    "megatron.core": "megatron-core",
    "numpy": "numpy",
    "orjson": "orjson",
    "pyarrow": "pyarrow",
    "pydantic": "pydantic",
    "rich": "rich",
    "safetensors": "safetensors",
    "sentencepiece": "sentencepiece",
    "tensorboard": "tensorboard",
    "tokenizers": "tokenizers",
    "torch": "torch",
    "transformers": "transformers",
    "typer": "typer",
    "xxhash": "xxhash",
    "yaml": "PyYAML",
}


class MultiValueCommand(TyperCommand):
    """Lets `--input A B C` stand for `--input A --input B --input C`, as shells expand globs that way."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the flag of every `multiple` option before each of its values, then parse as usual."""
        repeatable = {flag for p in self.params if getattr(p, "multiple", False) for flag in p.opts}
        expanded: list[str] = []
        flag = None
        for argument in args:
            if argument.startswith("-") and argument != "-":
                flag = argument if argument in repeatable else None
            elif flag is not None and expanded[-1] != flag:
                expanded.append(flag)
            expanded.append(argument)
        return super().parse_args(ctx, expanded)


def new_program() -> typer.Typer:
    """A typer application with the settings that every program shares."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def run_program(app: typer.Typer, argv: Sequence[str] | None = None, name: str | None = None) -> NoReturn:
    """Run a program and leave the process: 0 done, 1 error, 2 usage or configuration; a user's mistake is one line."""
    os.umask(os.umask(0o077) | stat.S_IWOTH)  # what a program writes, only its user and their group may change
    with standard_streams(), _errors_in_one_line(name or Path(sys.argv[0]).name):
        app(args=None if argv is None else list(argv), prog_name=name)
    sys.exit(0)


@contextmanager
def _errors_in_one_line(name: str) -> Iterator[None]:
    """Turns a user's mistake, and a package that `name` lacks, into a line and an exit code; bugs stay tracebacks."""
    try:
        yield
    except TacoError as error:
        _end(str(error), error.exit_code, is_consequence=error.is_consequence)
    except ModuleNotFoundError as error:
        package = PACKAGES.get(error.name or "")
        if package is None:  # a module of our own, or one that an installed package should hold
            raise
        install = f"{sys.executable} -m pip install {shlex.quote(_requirement(package))}"
        _end(f"{name} needs the package {package}, which is not installed: {install}", 1)
    except Exception as error:
        explained = explain_machine_fault(error)
        if explained is None:
            raise
        _end(explained, 1)


def _end(message: str, exit_code: int, *, is_consequence: bool = False) -> NoReturn:
    message = cut_to_screen(message)
    if not leave_reason(f"error: {message}", is_consequence=is_consequence):
        rank = os.environ.get("RANK", "0")
        who = "" if rank == "0" else f"[rank {rank}] "
        print(f"{who}error: {message}", file=sys.stderr)
    sys.exit(exit_code)


def _requirement(package: str) -> str:
    """The package with the range of versions that this project asks for; the name alone in a checkout not installed."""
    try:
        requirements = metadata.requires("taco-pretrain") or []
    except metadata.PackageNotFoundError:
        return package
    ranges = (text.partition(";")[0].strip() for text in requirements)
    return next((text for text in ranges if re.split(r"[^\w.-]", text, maxsplit=1)[0] == package), package)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `taco` console script."""
    with standard_streams(), _errors_in_one_line("taco"):
        _main(list(sys.argv[1:] if argv is None else argv))


def _main(arguments: list[str]) -> NoReturn:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(__version__)
        sys.exit(0)
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in VERBS:
            with _errors_in_one_line(f"taco {name}"):
                module = importlib.import_module(VERBS[name].module)
            run_program(module.app, arguments[words:], f"taco {name}")
    _refuse(arguments)


def _overview() -> str:
    width = max(len(name) for name in VERBS)
    rows = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    return f"usage: taco VERB [ARGUMENTS]     taco VERB --help     taco --version\n\n{rows}"


def _refuse(arguments: list[str]) -> NoReturn:
    """Say which verbs there are; exit code 2."""
    group = [name for name in VERBS if name.split()[0] == arguments[0]]
    if group:
        asked_help = arguments[1:2] in (["-h"], ["--help"])
        if len(arguments) > 1 and not asked_help:
            _complain_of_verb(" ".join(arguments[:2]), group, "these are there:")
        print(
            "\n".join(f"  taco {name}  {VERBS[name].summary}" for name in group),
            file=sys.stdout if asked_help else sys.stderr,
        )
        sys.exit(0 if asked_help else 2)
    words = sorted({word for name in VERBS for word in (name, name.split()[0])})
    _complain_of_verb(arguments[0], words, "`taco --help` lists the verbs")
    sys.exit(2)


def _complain_of_verb(unknown: str, verbs: Sequence[str], otherwise: str) -> None:
    near = difflib.get_close_matches(unknown, verbs, n=1)
    hint = f"did you mean `taco {near[0]}`?" if near else otherwise
    print(f"error: unknown verb {unknown!r}; {hint}", file=sys.stderr)


if __name__ == "__main__":
    main()
