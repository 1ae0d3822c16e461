"""What a configuration amounts to, and what it lacks to start, told before anything is built; imports no torch.

The dry run of `taco train` prints it; a run tells its epochs in the same words. Nothing is written: row tables that
would have to be built are replaced by an estimate.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.config.checks import check_world_size
from pretrain.config.deepspeed import zero_stage
from pretrain.config.problems import show
from pretrain.config.sections import RunConfig
from pretrain.data.dataset.dataset_format import dataset_path
from pretrain.data.dataset.manifest import Manifest
from pretrain.data.tokenizer.info import TokenizerInfo
from pretrain.errors import DataError, counted
from pretrain.planner.memory import count_parameters, estimate_memory, parameters_per_rank

_SUFFIXES = (".bin", ".idx", ".json")
_BERT_VOCABULARY = 30_522
_MOST_SHOWN = 10


@dataclass
class Plan:
    """Lines for people, what cannot work, what is not on this machine, and which tokenizer made the training data."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    tokenizer: TokenizerInfo | None = None


def make_plan(config: RunConfig, num_started: int) -> Plan:
    """The plan for the processes that parallel.data asks for, or else the `num_started` ones."""
    parallel = config.parallel
    model_parallel = parallel.tensor * parallel.pipeline
    processes = model_parallel * parallel.data if parallel.data else num_started
    plan = Plan(problems=[f"does not fit: {problem}" for problem in check_world_size(config, processes)])
    absent = missing_data(config)
    plan.missing += [f"missing: {text}" for text in (*absent[:_MOST_SHOWN], *_missing_start(config))]
    if len(absent) > _MOST_SHOWN:
        plan.missing.append(f"missing: ... and {counted(len(absent) - _MOST_SHOWN, 'more dataset')}")
    manifests = {} if absent else _load_manifests(config, plan)
    if not plan.problems:
        plan.lines += _describe_steps(config, processes, model_parallel)
    plan.lines += _describe_model(config, processes, manifests)
    if manifests:
        plan.tokenizer = manifests[config.data.train[0]].tokenizer
        plan.lines += _describe_data(config, manifests, plan)
    return plan


def missing_data(config: RunConfig) -> list[str]:
    """The datasets of a run that are not here, each with the remedy."""
    data = config.data
    problems = []
    for prefix in dict.fromkeys((*data.train, *data.validation)):
        absent = [suffix for suffix in _SUFFIXES if _is_absent(dataset_path(prefix, suffix))]
        if absent and not _names_a_file_of_a_dataset(prefix):
            key = "data.train" if prefix in data.train else "data.validation"
            names = show(prefix + " ".join(absent))
            problems.append(
                f"{key}: {names}: no such file; name the prefix of a dataset that is here, or "
                "make it: taco data preprocess --input CORPUS --tokenizer VOCABULARY "
                f"--output-prefix {shlex.quote(prefix)}"
            )
    return problems


def _missing_start(config: RunConfig) -> list[str]:
    """The weights to start from, if they are not here and the run has no checkpoint of its own."""
    start = config.run.init_from
    if start is None or not _is_absent(start) or any((config.run.output_dir / "checkpoints").glob("step-*")):
        return []
    return [
        f"run.init_from: {start}: no such checkpoint; name one that is here, or make it: "
        f"taco import-hf MODEL {shlex.quote(str(start))}"
    ]


def describe_epochs(config: RunConfig, rows: Sequence[tuple[str, int]], shares: Sequence[float] | None) -> list[str]:
    """How often the run goes through its rows: name and number of rows of each dataset, and its share of a blend."""
    steps = config.train.steps
    num_samples = steps * config.train.global_batch_size
    if shares is None:
        epochs = num_samples / sum(num_rows for _, num_rows in rows)
        return [f"train.steps={steps:,} are {_number(epochs)} epochs of the training rows"]
    return [
        f"{name}: {share:.4%} of the samples; train.steps={steps:,} are "
        f"{_number(num_samples * share / num_rows)} epochs of its {counted(num_rows, 'row')}"
        for (name, num_rows), share in zip(rows, shares, strict=True)
    ]


def _number(epochs: float) -> str:
    return f"{epochs:,.2f}" if epochs >= 0.1 else f"{epochs:.2g}"


def _names_a_file_of_a_dataset(prefix: str) -> bool:
    """True for data/train.bin in place of data/train, which opening it explains."""
    path = Path(prefix)
    return path.suffix in _SUFFIXES and not _is_absent(path)


def _is_absent(path: Path) -> bool:
    """True if there is no such file; one that may not be looked at is there, and opening it says why it cannot be."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _load_manifests(config: RunConfig, plan: Plan) -> dict[str, Manifest]:
    manifests = {}
    for prefix in dict.fromkeys((*config.data.train, *config.data.validation)):
        try:
            manifests[prefix] = Manifest.load(dataset_path(prefix, ".json"))
        except DataError as error:
            plan.problems.append(f"data: {error}")
    return {} if plan.problems else manifests


def _describe_steps(config: RunConfig, processes: int, model_parallel: int) -> list[str]:
    train = config.train
    accum = config.grad_accum_steps(processes // model_parallel)
    tokens = train.global_batch_size * config.data.seq_length
    batches = f"{counted(accum, 'micro-batch', 'micro-batches')} of {counted(train.micro_batch_size, 'row')}"
    return [
        f"plan: {counted(processes, 'process', 'processes')}, ZeRO-{zero_stage(config)}, {batches} per rank and step,",
        f"      {tokens:,} tokens per step, {tokens * train.steps:,} tokens in {counted(train.steps, 'step')}",
    ]


def _describe_model(config: RunConfig, processes: int, manifests: dict[str, Manifest]) -> list[str]:
    vocab_size, source = _BERT_VOCABULARY, "BERT's; that of the data is not known"
    if manifests:
        first = config.data.train[0]
        vocab_size, source = manifests[first].tokenizer.vocab_size, f"of {first}"
    return [
        f"model: {counted(count_parameters(config, vocab_size), 'parameter')}, "
        f"{parameters_per_rank(config, vocab_size):,} of them on a rank; vocabulary {vocab_size:,} ({source})",
        f"memory: {estimate_memory(config, vocab_size, processes)}",
    ]


def _describe_data(config: RunConfig, manifests: dict[str, Manifest], plan: Plan) -> list[str]:
    data = config.data
    lines = [
        f"data: {prefix}: {counted(manifest.tokens, 'token')} in {counted(manifest.documents, 'document')}"
        for prefix, manifest in manifests.items()
    ]
    try:
        rows, is_exact = _count_rows(config, manifests)
    except DataError as error:
        plan.problems.append(f"data: {error}")
        return lines
    if not all(num_rows for _, num_rows in rows):
        return lines
    shares = None if data.weights is None else [weight / sum(data.weights) for weight in data.weights]
    total = sum(num_rows for _, num_rows in rows)
    lines.append(
        f"data: {'' if is_exact else 'about '}{counted(total, 'row')} of {data.seq_length} tokens to train on"
        + ("" if is_exact else ", by the number of tokens; `taco data index` counts them")
    )
    return lines + [f"data: {line}" for line in describe_epochs(config, rows, shares)]


def _count_rows(config: RunConfig, manifests: dict[str, Manifest]) -> tuple[list[tuple[str, int]], bool]:
    """Training rows of each dataset, and whether they were counted; an index that must be built is not built here."""
    data = config.data
    if data.row_mode in ("pack", "sentence") or data.splits is not None:
        share = data.splits.train if data.splits else 1.0
        return [(name, int(manifests[name].tokens * share) // (data.seq_length - 2)) for name in data.train], False
    from pretrain.data.batches import open_source

    source = open_source(config, "train")
    rows = [(dataset.prefix, index.num_rows) for dataset, index in zip(source.datasets, source.indexes, strict=True)]
    return rows, True
