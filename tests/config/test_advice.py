"""What a message advises is done here, word for word, and then the problem is gone."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pretrain.config.convert import _OTHER_NAMES
from pretrain.config.keys import all_keys, find_unknown
from pretrain.config.load import load_config
from pretrain.errors import ConfigError

START = (
    "run: {output_dir: x, device: cuda}\ndata: {train: [d]}\nmodel: {num_layers: 4}\n"
    "train: {steps: 100, global_batch_size: 8}\noptim: {warmup_steps: 1}\n"
)
_ADVICE = re.compile(r"\b(?:try|write|set|use|raise|change)\b ")
# As a shell takes it: brackets and spaces in quotes.
_SETTING = re.compile(r"[a-z_0-9]+(?:\.[a-z_0-9]+)*=(?:\[[^\]]*\]|[^\s,;:()\[\]]+)")
_PLACEHOLDER = re.compile(r"VALUE|FIRST|SECOND|\bX\b")

# Overrides that are wrong and whose message names settings that mend it.
CASES = [
    ["train.micro_batch_size=1"],
    ["optim.warmup_steps=100000"],
    ["optim.betas=[0.9]"],
    ["optim.betas.1=0.9"],
    ["optim.betas=0.9"],
    ["data.train=books"],
    ["data.validation=books"],
    ["data.train=data/a, data/b"],
    ["parallel.tensor=5"],
    ["parallel.pipeline=13"],
    ["parallel.sequence=true"],
    ["spike.policy=rollback", "checkpoint.every_steps=null"],
    ["data.splits={train: 0.9, validation: 0.1}", "data.validation=[v]"],
    ["zero.stage=0", "zero.reduce_bucket_size=1000"],
    ["zero.offload_param={device: cpu}"],
    ["zero.stage=3", "zero.allgather_bucket_size=1000"],
    ["zero.stage=2", "zero.offload_optimizer={device: nvme, nvme_path: /n}"],
    ["zero.stage=2", "parallel.pipeline=2"],
    ["zero.stage=3", "train.compile=true"],
    ["train.compile=full", "parallel.pipeline=2"],
    ["optim.implementation=deepspeed", "optim.name=lamb"],
    ["precision=bf16", "zero.grad_accum_dtype=fp32"],
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(START)
    return path


def refusal(path: Path, overrides: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def advised(message: str) -> list[str]:
    """The settings that follow the first word of advice in each line of a message."""
    settings = []
    for line in message.split("\n"):
        match = _ADVICE.search(line)
        advice = line[match.start() :] if match else ""
        settings += [word for word in shlex.split(advice.replace("`", " ")) for word in _SETTING.findall(word)]
    return [setting for setting in settings if not _PLACEHOLDER.search(setting)]


def about(message: str) -> set[str]:
    """The lines of a message without values and places."""
    lines = [line.partition("yaml")[2].partition(": ")[2] or line for line in message.split("\n")]
    return {re.sub(r"'[^']*'|\([^)]*\)|=\S+|\d+", "", line) for line in lines} - {" problems"}


def outcome(path: Path, overrides: list[str]) -> str:
    """What is refused; empty if nothing is."""
    try:
        load_config(path, overrides)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_the_setting_that_a_message_advises_mends_it(path: Path, overrides: list[str]) -> None:
    message = refusal(path, overrides)
    settings = advised(message)
    assert settings, message
    for setting in settings:
        key = setting.partition("=")[0]
        kept = [override for override in overrides if not override.startswith((f"{key}=", f"{key}."))]
        still = outcome(path, [*kept, setting])
        assert about(message) - about(still), f"{setting} does not mend: {message}\nstill: {still}"


@pytest.mark.parametrize("overrides", [
    ["deepspeed.prescale_gradients=true"], ["deepspeed.zzz=1"], ["deepspeed.nebula={}"], ["fp16.hysteresis=3"],
    ["zero.stage=3", "zero.round_robin_gradients=true"], ["parallel.pipeline=2", "zero.overlap_comm=true"],
])  # fmt: skip
def test_what_a_message_says_to_leave_out_is_left_out(path: Path, overrides: list[str]) -> None:
    assert re.search(r"leave (it|\w+) out", refusal(path, overrides))
    assert outcome(path, overrides[:-1]) == ""


@pytest.mark.parametrize("override", [
    "train.stepz=5", "optim.lrr=5", "lr=5", "train.lr=5", "optim.zero.stage=1", "precission=bf16", "seed=5",
    "deepspeed.dump_stat=true", "deepspeed.flops_profiler.profil_step=1", "run.micro_batch_size=4",
    "data.splits.validatio=0.1", "zero.offload_optimiser.pin_memory=true",
    "optim.LR=5", "train.micro-batch-size=4", "train.max_steps=5", "learning_rate=5", "optimizer=lamb",
    "model.num_heads=4", "optimizer={lr: 5}",
])  # fmt: skip
def test_the_key_that_a_message_means_exists(path: Path, override: str) -> None:
    message = refusal(path, [override])
    meant = re.search(r"did you mean ([\w.]+)\?", message)
    assert meant is not None, message
    assert "unknown key" not in outcome(path, [f"{meant[1]}={override.partition('=')[2]}"])


def test_every_name_that_other_programs_use_leads_to_a_key() -> None:
    assert set(_OTHER_NAMES.values()) <= set(all_keys())
    assert not set(_OTHER_NAMES) & set(all_keys())


@pytest.mark.parametrize(
    ("override", "mended"),
    [
        ("train.steps=0100", "train.steps={}"),
        ("run.seed=-0_1", None),
        ("optim.lr=00.5", "optim.lr={}"),
        ("train.steps=1,000", "train.steps={}"),
        ("checkpoint.every_steps=none", "checkpoint.every_steps={}"),
        ("train.recompute_layers=al", "train.recompute_layers={}"),
    ],
)
def test_the_value_that_a_message_writes_is_accepted(path: Path, override: str, mended: str | None) -> None:
    message = refusal(path, [override])
    if mended is not None:
        written = re.search(r"write '?([\w.]+)", message)
        assert written is not None, message
        load_config(path, [mended.format(written[1])])


def test_names_that_are_no_key_are_told_with_the_one_that_was_meant() -> None:
    fine = ["optim", "train.steps", "checkpoint.run", "deepspeed.anything"]
    wrong = {
        "train.stepz": "did you mean train.steps?",
        "train.steps=8": "write --allow-change train.steps, without a value",
        "train.steps,optim.lr": "write --allow-change once for each key",
        "no": "name keys as the refusal lists them",
    }
    expected = [f"--allow-change {name}: there is no such key; {remedy}" for name, remedy in wrong.items()]
    assert find_unknown([*fine, *wrong], ["checkpoint.run"]) == expected
