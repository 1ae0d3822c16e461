"""Files that are no configuration, and keys that are there twice: one line each, with the line of the file."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from pretrain.config import yaml_tree
from pretrain.config.load import load_config
from pretrain.errors import ConfigError

START = "run: {output_dir: x}\ndata: {train: [d]}\n"


def refusal(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value)


@pytest.mark.fault("bad-config")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (START + "optim:\n  lr: 1\ntrain: {steps: 5}\noptim: {}\n", "optim: is there twice, on lines 3 and 6; join"),
        (START + "train: {steps: 20, steps: 2000}\n", "train.steps: is there twice, on line 3 (20 and 2000)"),
        (START + "zero:\n  offload_param: {device: cpu, device: cpu}\n", "zero.offload_param.device: is there twice"),
        (START + "deepspeed: {aio: {a: 1, a: 2}}\n", "deepspeed.aio.a: is there twice"),
        (START + "precision: bf16\n'precision': fp16\n", "precision: is there twice, on lines 3 and 4"),
        (START + "optim.lr: 1\n", "yaml:3: optim.lr: unknown key; write lr below optim:"),
        (START + "optim:\n  lr:3\n", "yaml:3: optim: expected a section, found 'lr:3'; write a space after the colon"),
        (START + "optim: {lr:3}\n", "write a space after the colon"),
        (START + "optim: [lr]\n", "yaml:3: optim: expected a section, found a list of 1"),
        (START + "optim:\n\tlr: 1\n", "yaml:4: is not valid YAML"),
        (START + "optim:\n\tlr: 1\n", "indent with spaces, YAML allows no tabs there"),
        (START + "---\nrun: {}\n", "yaml:3: holds a second document"),
        (START + "optim: {lr: !!float 3}\n", "yaml:3: is not valid YAML for a configuration: the tag tag:"),
        (START + "optim: !mine {}\n", "the tag !mine is not allowed"),
        (START + "? [a]\n: b\n", "yaml:3: is not valid YAML for a configuration: a key must be a name"),
        (START + "zero: {<<: 3}\n", "yaml:3: `<<` takes a table"),
        (START + "x: &x [*x]\n", "yaml:3: the alias *x has no anchor that ends before it"),
        (START + "x: *nothing\n", "the alias *nothing has no anchor"),
        ("run: [\n", "is not valid YAML"),
        ("run: {output_dir: \x07}\n", "yaml:1: is not valid YAML: the character U+0007 is not allowed"),
        ("[" * 100_000, "is nested more than 32 levels deep"),
        ("a: " + "{a: " * 100_000, "is nested more than 32 levels deep"),
        ("".join(f"{' ' * depth}a:\n" for depth in range(5000)), "is nested more than 32 levels deep"),
        ("a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{f'*a{n},' * 9}]\n" for n in range(20)), "aliases repeat"),
        ("- a\n", "expected sections (run:, data:, ...) at the top level, found a list"),
        ("text\n", "expected sections (run:, data:, ...) at the top level, found 'text'"),
        ("", "run.output_dir: is required; set it in the file or as run.output_dir=VALUE"),
        ("# only a comment\n", "data.train: is required; set it in the file or as 'data.train=[FIRST, SECOND]'"),
        ("run:\ndata:\n", "run.output_dir: is required"),
        ("true: 1\n", "yaml:1: true: unknown key"),
        ('"\\x1b[31mred": 1\n', r"yaml:1: '\x1b[31mred': unknown key"),
        (b"run: \xe9\n", "yaml:1: cannot be read: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        ("run: {}\n".encode("utf-16"), "it is UTF-16, and must be UTF-8; iconv -f UTF-16 -t UTF-8 converts it"),
        ("extends: absent.yaml\n", "absent.yaml: no such file; a relative name starts at the folder"),
        ("extends: .\n", "it is a folder; name a YAML file in it"),
        ("extends: {base: 1}\n", "yaml:1: extends must be a file name or a list of them"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_configuration(tmp_path: Path, content: str | bytes, words: str) -> None:
    start = time.monotonic()
    message = refusal(tmp_path / "own.yaml", content)
    assert words in message
    assert message.isprintable() or "problems\n" in message
    assert time.monotonic() - start < 20


def test_a_key_that_is_there_twice_in_a_file_that_is_extended(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(START + "train: {steps: 1}\ntrain: {steps: 2}\n")
    message = refusal(tmp_path / "own.yaml", "extends: base.yaml\ntrain: {steps: 5}\n")
    assert message == f"{tmp_path / 'base.yaml'}: train: is there twice, on lines 3 and 4; join them"


def test_a_missing_file_is_met_with_a_near_name_or_with_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for remedy in (
        "`taco init FOLDER` lays out examples",
        "configs/ holds examples",
        "did you mean configs/tiny.yaml?",
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(Path("configs/tinny.yaml"))
        assert str(caught.value) == f"configs/tinny.yaml: no such configuration file; {remedy}"
        if Path("configs").exists():
            Path("configs/tiny.yaml").touch()
        Path("configs").mkdir(exist_ok=True)


def test_anchors_and_merge_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        START + "zero:\n  offload_optimizer: &cpu {device: cpu, pin_memory: off}\n"
        "  offload_param: {<<: *cpu, pin_memory: true}\n  stage: 3\n"
    )
    zero = load_config(path).zero
    assert (zero.offload_optimizer.device, zero.offload_optimizer.pin_memory) == ("cpu", False)
    assert (zero.offload_param.device, zero.offload_param.pin_memory) == ("cpu", True)


def test_a_byte_order_mark_and_a_directive_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + f"%YAML 1.1\n---\n{START}...\n".encode())
    assert load_config(path).data.train == ("d",)


@pytest.mark.fault("bad-config")
def test_ten_thousand_problems_fit_a_screen(tmp_path: Path) -> None:
    content = START + "optim:\n" + "".join(f"  lr{number}: 1\n" for number in range(10_000))
    lines = refusal(tmp_path / "own.yaml", content).split("\n")
    assert lines[0] == f"{tmp_path / 'own.yaml'}: 10,000 problems"
    assert lines[1] == f"  - {tmp_path / 'own.yaml'}:4: optim.lr0: unknown key; did you mean optim.lr?"
    assert lines[-1] == "  ... and 9,980 more"
    assert len(lines) == 22
    assert len(refusal(tmp_path / "own.yaml", START + f"? {'k' * 10_000}\n: 1\n")) < 1000


@pytest.mark.parametrize(
    "content", ["run: {output_dir: \x07}\n", START + "optim:\n\tlr: 1\n", "run: [\n", "[" * 99, "x: *y"]
)
def test_without_libyaml_the_same_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    with_libyaml = refusal(tmp_path / "own.yaml", content)
    monkeypatch.setattr(yaml_tree, "_LOADER", yaml.SafeLoader)
    assert refusal(tmp_path / "own.yaml", content).split(": ")[:2] == with_libyaml.split(": ")[:2]
