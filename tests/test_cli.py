"""The console script: what it lists, what it refuses, and how fast it answers."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from pretrain.cli import VERBS, MultiValueCommand, main, new_program, run_program
from pretrain.errors import ConfigError

HEAVY = ("torch", "deepspeed", "megatron", "transformers", "datasets", "matplotlib", "scipy")


def taco(*arguments: str) -> tuple[int, None]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code, None  # type: ignore[return-value]


def test_overview_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert taco("--help")[0] == 0
    text = capsys.readouterr().out
    assert all(name in text for name in VERBS)


def test_unknown_verb_suggests_a_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert taco("trian")[0] == 2
    assert "did you mean `taco train`?" in capsys.readouterr().err


def test_group_without_verb_lists_its_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert taco("data")[0] == 2
    assert "taco data preprocess" in capsys.readouterr().err
    assert taco("data", "--help")[0] == 0
    assert "taco data preprocess" in capsys.readouterr().out


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_of_every_verb_shows_an_example_and_imports_nothing_heavy(verb: str) -> None:
    code = (
        "import sys\nfrom pretrain.cli import main\n"
        f"try: main({[*verb.split(), '--help']!r})\n"
        f"finally: sys.stderr.write('HEAVY ' + ' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    )
    start = time.monotonic()
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    assert "Example:" in answer.stdout
    assert answer.stderr.endswith("HEAVY "), answer.stderr
    # Half a second is the promise on a quiet machine; what is asserted here is that nothing heavy was imported.
    assert time.monotonic() - start < 10


def test_an_error_is_one_line_and_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    app = new_program()

    @app.command()
    def fail() -> None:
        raise ConfigError("file.yaml: no such key")

    with pytest.raises(SystemExit) as ended:
        run_program(app, [])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: file.yaml: no such key\n"


def test_one_flag_takes_several_values() -> None:
    import typer

    app = new_program()
    seen: list[tuple[list[str], str]] = []

    @app.command(cls=MultiValueCommand)
    def collect(input: list[str] = typer.Option(...), output: str = typer.Option(...)) -> None:
        seen.append((input, output))

    for arguments in (["--input", "a", "b", "--output", "o"], ["--input", "a", "--input", "b", "--output", "o"]):
        with pytest.raises(SystemExit) as ended:
            run_program(app, arguments)
        assert ended.value.code == 0
    assert seen == [(["a", "b"], "o")] * 2
