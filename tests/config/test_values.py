"""What is written, from a file and from the command line: read as people mean it, or refused with the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.config.load import dump_config, find_repeated, load_config
from pretrain.config.paths import escape, expand
from pretrain.errors import ConfigError

START = "run: {output_dir: x}\ndata: {train: [d]}\noptim: {warmup_steps: 0}\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(START)
    return path


def extend(base: Path, key: str, text: str) -> Path:
    """A file that extends `base` and sets one key."""
    own = base.with_name("own.yaml")
    section, _, name = key.rpartition(".")
    change = f"{section}:\n  {name}: {text}\n" if section else f"{key}: {text}\n"
    own.write_text(f"extends: base.yaml\n{change}")
    return own


def value_of(path: Path, key: str, *overrides: str) -> Any:
    value: Any = load_config(path, overrides)
    for name in key.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("spike.policy", "off", "off"),
        ("run.tensorboard", "off", False),
        ("run.tensorboard", "Yes", True),
        ("train.compile", "'on'", "layers"),
        ("train.compile", "true", "layers"),
        ("train.compile", "False", "off"),
        ("train.compile", "off", "off"),
        ("train.compile", "full", "full"),
        ("optim.lr", "1e-4", 1e-4),
        ("optim.lr", "1.0e-4", 1e-4),
        ("optim.lr", ".5", 0.5),
        ("optim.lr", "5.", 5.0),
        ("optim.lr", "0.01", 0.01),
        ("optim.lr", "3", 3.0),
        ("train.steps", "1e5", 100_000),
        ("train.steps", "4.0", 4),
        ("train.steps", "1_000", 1000),
        ("train.steps", "0x10", 16),
        ("train.steps", "0o17", 15),
        ("train.steps", '"12"', 12),
        ("train.steps", "+12", 12),
        ("run.seed", "0", 0),
        ("run.seed", "9223372036854775807", 2**63 - 1),
        ("zero.stage", "2", 2),
        ("train.recompute_layers", "all", "all"),
        ("train.recompute_layers", "3", 3),
        ("train.recompute", "none", "none"),
        ("train.recompute", "layers:3", "layers:3"),
        ("train.recompute", "", None),
        ("run.output_dir", "0123", Path("0123")),
        ("run.output_dir", "2026-01-01", Path("2026-01-01")),
        ("run.output_dir", "1:30", Path("1:30")),
        ("run.output_dir", "a#b", Path("a#b")),
        ("run.output_dir", "true", Path("true")),
        ("run.output_dir", "' x '", Path(" x ")),
        ("data.train", "[0123, 1e5, off]", ("0123", "1e5", "off")),
        ("checkpoint.every_steps", "null", None),
        ("checkpoint.every_steps", "~", None),
        ("checkpoint.every_steps", "", None),
        ("data.weights", "", None),
        ("data.validation", "", ()),
        ("deepspeed", "", {}),
        ("deepspeed", "{dump_state: on, aio: {block_size: 1e6}}", {"dump_state": True, "aio": {"block_size": 10**6}}),
    ],
)  # fmt: skip
def test_a_file_and_the_command_line_say_the_same(base: Path, key: str, text: str, value: Any) -> None:
    own = extend(base, key, text)
    for found in (value_of(own, key), value_of(base, key, f"{key}={text}"), value_of(base, key, f"{key}= {text} ")):
        assert (found, type(found)) == (value, type(value))


@pytest.mark.fault("bad-config")
@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("train.steps", "0100", "expected a whole number, found '0100': a leading zero is octal to some"),
        ("train.steps", "0100", "write 100"),
        ("run.seed", "0777", "write 777"),
        ("run.seed", "-01", "write -1"),
        ("run.seed", "00", "write 0"),
        ("optim.lr", "00.5", "write 0.5"),
        ("optim.lr", "01e-4", "write 1e-4"),
        ("train.steps", "1:30", "expected a whole number, found '1:30'"),
        ("optim.lr", "1:30", "expected a number, found '1:30'"),
        ("optim.lr", "true", "expected a number, found 'true'"),
        ("optim.weight_decay", "yes", "expected a number, found 'yes'"),
        ("train.log_every", "on", "expected a whole number, found 'on'"),
        ("train.steps", "4.5", "found '4.5'"),
        ("train.steps", "1e99", "found '1e99'"),
        ("train.steps", "1e30", "expected a whole number below 2^63, found '1e30'"),
        ("train.steps", "9223372036854775808", "below 2^63"),
        ("train.steps", "1e-3", "found '1e-3'"),
        ("train.steps", "100k", "found '100k'"),
        ("train.steps", "'1,000'", "found '1,000'; write 1000"),
        ("train.steps", "1" * 5000, "found '1111"),
        ("train.steps", "٣", "expected a whole number"),
        ("train.steps", "", "expected a whole number, found nothing"),
        ("optim.lr", "inf", "expected a finite number"),
        ("optim.lr", "-.Inf", "expected a finite number"),
        ("optim.lr", "NaN", "expected a finite number"),
        ("optim.lr", "1e999", "which is too large"),
        ("optim.lr", "-1", "greater than 0, found '-1'"),
        ("run.tensorboard", "1", "expected true or false, found '1'"),
        ("run.output_dir", "~", "~ alone is nothing in YAML; write ~/"),
        ("run.output_dir", "''", "expected a path, found ''"),
        ("data.train", "[]", "data.train: is empty; write 'data.train=[FIRST, SECOND]'"),
        ("data.train", "a, b", "write 'data.train=[a, b]'"),
        ("data.train", "[[a]]", "expected text, found a list of 1"),
        ("data.train", "['']", "expected a path"),
        ("data.train", "{a: 1}", "expected a list, found keys; write the whole list, 'data.train=[FIRST, SECOND]'"),
        ("optim.betas", "[0.9]", "expected a list of 2, found 1; write 'optim.betas=[0.9, 0.999]'"),
        ("optim.betas", "{1: 0.9}", "write the whole list, 'optim.betas=[0.9, 0.999]'"),
        ("checkpoint.every_steps", "none", "write null for nothing"),
        ("precision", "BF16", "did you mean bf16?"),
        ("zero.stage", "true", "expected 0, 1, 2 or 3, found 'true'"),
        ("spike.policy", "false", "expected 'off', 'warn', 'skip' or 'rollback', found 'false'"),
        ("optim", "fast", "optim: expected a section, found 'fast'; write keys below it, or set one as optim.name="),
        ("data.train", "!!python/tuple [a]", "the tag tag:yaml.org,2002:python/tuple is not allowed"),
    ],
)  # fmt: skip
def test_what_can_be_misread_is_refused(base: Path, key: str, text: str, words: str) -> None:
    own = extend(base, key, text)
    in_file, in_argument = refusal(own), refusal(base, f"{key}={text}")
    assert words in in_file
    assert words in in_argument
    assert in_file.startswith(f"{own}:{3 if '.' in key else 2}: ")
    assert in_argument.startswith("command line: ")
    assert max(len(in_file), len(in_argument)) < 800


def test_the_text_of_an_override_is_taken_as_it_is(base: Path) -> None:
    for text in ("#a", "a #b", "a: b", "*a", "&a", "@a", "%a", "- a", "a, b", "|", "[a", "{a"):
        if text[0] not in "[{":
            assert value_of(base, "run.output_dir", f"run.output_dir={text}") == Path(text)
        else:
            assert "the value is not valid YAML" in refusal(base, f"run.output_dir={text}")


def test_a_table_changes_only_what_it_names(base: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("extends: base.yaml\nmodel: {num_layers: 3, hidden_size: 96}\nobjective:\n#  mask_rate: 0.2\n")
    assert value_of(own, "model.hidden_size", "model={num_layers: 4}") == 96
    assert value_of(own, "objective.mask_rate") == 0.15
    third = tmp_path / "third.yaml"
    third.write_text("extends: own.yaml\nmodel:\n#  num_layers: 5\n")
    assert value_of(third, "model.num_layers") == 3  # nothing is named
    assert value_of(third, "model.num_layers", "model=") == 3
    assert value_of(third, "model.num_layers", "model=null") == 12  # the defaults


def test_the_last_of_several_overrides_counts_and_is_named(base: Path) -> None:
    overrides = ["train.steps=5", "optim.lr=1", "train.steps=7"]
    assert value_of(base, "train.steps", *overrides) == 7
    assert find_repeated(overrides) == [
        "train.steps is given 2 times on the command line; the last one counts: train.steps=7"
    ]


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HOME": "/home/me", "SCRATCH": "/scratch", "EMPTY": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("UNSET", raising=False)


@pytest.mark.usefixtures("variables")
@pytest.mark.parametrize("key", [
    "run.output_dir", "run.init_from", "data.index_cache", "zero.offload_optimizer.nvme_path",
    "zero.offload_param.nvme_path", "deepspeed.tensorboard.output_path", "data.train", "data.validation",
])  # fmt: skip
def test_home_and_variables_are_expanded_in_every_path(base: Path, key: str) -> None:
    offloads = [f"zero.{name}={{device: nvme, nvme_path: /n}}" for name in ("offload_optimizer", "offload_param")]
    is_list = key in ("data.train", "data.validation")
    for text, path in {"~/a": "/home/me/a", "$SCRATCH/a": "/scratch/a", "${SCRATCH}a$$b": "/scratcha$b"}.items():
        override = f"{key}=[{text}]" if is_list else f"{key}={text}"
        found = value_of(base, key, "zero.stage=3", *offloads, override)
        assert (found[0] if isinstance(found, tuple) else str(found)) == path


@pytest.mark.usefixtures("variables")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("$UNSET/a", "the variable UNSET is not set; export UNSET=..."),
        ("${UNSET}", "the variable UNSET is not set"),
        ("$EMPTY/a", "the variable EMPTY is empty"),
        ("${SCRATCH:-a}", "is no variable; write ${NAME}, or $$ for a dollar"),
        ("~nobody-of-this-name/a", "there is no home folder for ~nobody-of-this-name"),
    ],
)
def test_what_cannot_be_expanded_is_named(base: Path, text: str, words: str) -> None:
    message = refusal(base, f"run.output_dir={text}")
    assert words in message
    assert f"run.output_dir: found '{text}'" in message


@pytest.mark.usefixtures("variables")
def test_other_dollars_and_tildes_stay(base: Path) -> None:
    assert [expand(text) for text in ("a~b", "./~", "a$", "$5", "a/~/b")] == ["a~b", "./~", "a$", "$5", "a/~/b"]
    assert [expand(escape(path)) for path in ("a$b", "$$HOME", "a$", "${x", "$")] == ["a$b", "$$HOME", "a$", "${x", "$"]
    assert expand(escape("~x")) == "./~x"
    assert value_of(base, "spike.policy", "spike.policy=off") == "off"


@pytest.mark.usefixtures("variables")
def test_the_resolved_configuration_names_the_same_paths_again(base: Path, tmp_path: Path) -> None:
    config = load_config(base, ["run.output_dir=$SCRATCH/a$$HOME", "data.train=[~/$$b]"])
    assert (str(config.run.output_dir), config.data.train) == ("/scratch/a$HOME", ("/home/me/$b",))
    again = tmp_path / "config.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.usefixtures("variables")
def test_extends_and_the_name_of_the_file_are_expanded(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(base.parent))
    own = base.with_name("own.yaml")
    own.write_text("extends: ~/base.yaml\n")
    assert load_config(Path("~/own.yaml")) == load_config(base) == load_config(Path("$HOME/own.yaml"))
    own.write_text("extends: $UNSET/base.yaml\n")
    assert refusal(own).startswith(f"{own}:1: extends: the variable UNSET is not set; export UNSET=...")
    base.rename(base.with_name("$UNSET.yaml"))  # what is there is taken as it is
    assert load_config(base.with_name("$UNSET.yaml")).data.train == ("d",)
