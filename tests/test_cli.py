"""The console script: what it lists, what it refuses, and how fast it answers."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from corpora import write_jsonl, write_vocab
from project import ROOT
from reading_rights import unreadable

from pretrain.cli import PACKAGES, VERBS, MultiValueCommand, main, new_program, run_program
from pretrain.console.machine_faults import explain_machine_fault
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
    assert taco("data", "preproces", "--input", "x")[0] == 2
    assert capsys.readouterr().err.startswith(
        "error: unknown verb 'data preproces'; did you mean `taco data preprocess`?"
    )


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


@pytest.mark.parametrize("message", ["x" * 10**7, "\n".join(["line"] * 10**6), f"{'x' * 5000}\n" * 9, "\n" * 10**5])
def test_an_error_text_fits_a_screen(message: str, capsys: pytest.CaptureFixture[str]) -> None:
    app = new_program()

    @app.command()
    def fail() -> None:
        raise ConfigError(f"begin {message}; remedy")

    with pytest.raises(SystemExit):
        run_program(app, [])
    text = capsys.readouterr().err
    assert text.startswith("error: begin ")
    assert text.endswith("; remedy\n")
    assert len(text) < 6500
    assert text.count("\n") <= 41


def run_shell(words: str, folder: Path) -> tuple[int, str, str]:
    """Exit code, output and errors of a command, in which {taco} stands for the program."""
    code = "import sys; from pretrain.cli import main; main(sys.argv[1:])"
    words = words.format(taco=f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", words], capture_output=True, text=True, cwd=folder, env=environment, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        ("{taco} --help >/dev/full", 1, "error: standard output: cannot be written: No space left on device\n"),
        ("{taco} data index --help >/dev/full", 1, "error: standard output: cannot be written: No space left"),
        ("{taco} data index nothing >/dev/full", 1, "error: nothing"),
        ("{taco} data inspect --help | true; exit ${{PIPESTATUS[0]}}", 141, ""),
        ("{taco} --help >&-", 0, ""),
        ("{taco} data index nothing 2>/dev/full", 1, ""),
        ("{taco} data index nothing <&- >&- 2>&-", 1, ""),
    ],
)
def test_standard_streams_that_are_full_gone_or_closed(tmp_path: Path, words: str, code: int, error: str) -> None:
    found, _, errors = run_shell(words, tmp_path)
    assert (found, errors.count("\n")) == (code, bool(error)), errors
    assert errors.startswith(error)


def test_an_ascii_terminal_ends_no_program_in_a_traceback(tmp_path: Path) -> None:
    code, _, errors = run_shell("PYTHONIOENCODING=ascii {taco} data index caf\u00e9", tmp_path)
    assert (code, errors.count("\n")) == (1, 1)
    assert errors.startswith("error: caf\\xe9")


def test_an_unbuffered_process_says_each_line_at_once(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pretrain.console.streams import standard_streams\nwith standard_streams():\n"
        " print('out'); print('err', file=sys.stderr); os._exit(0)"
    )
    words = f"PYTHONUNBUFFERED=1 {shlex.quote(sys.executable)} -c {shlex.quote(code)}"
    assert run_shell(words, tmp_path) == (0, "out\n", "err\n")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory (MemoryError); "),
        (ImportError("x.so: failed to map segment from shared object\n"), "out of memory (x.so: failed to map segment"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "out of memory (DefaultCPUAllocator"),
        (PermissionError(13, "Permission denied", "a/b"), "a/b: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device; free space"),
        (ValueError("a bug"), None),
        (OSError("a bug"), None),
    ],
)
def test_what_a_machine_refuses_is_one_line_and_a_bug_a_traceback(error: Exception, words: str | None) -> None:
    found = explain_machine_fault(error)
    assert (found is None) == (words is None)
    assert words is None or (found is not None and found.startswith(words) and "\n" not in found)


def test_a_closed_standard_input_is_no_file_of_ours(tmp_path: Path) -> None:
    write_vocab(tmp_path)
    words = "{taco} data preprocess --input - --input-format txt --tokenizer vocab.txt --output-prefix out"
    assert run_shell(f"{words} <&-", tmp_path) == (1, "", "error: -: standard input is closed\n")
    assert [path.name for path in tmp_path.iterdir()] == ["vocab.txt"]
    code, _, errors = run_shell(f"echo the cat | {words} >&- 2>&-", tmp_path)
    assert (code, errors) == (0, "")
    assert (tmp_path / "out.bin").stat().st_size == 4


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


# -- packages that are not installed -----------------------------------------------------------------------------------

# Imported by every Python process that is started, workers among them: names in ABSENT are not there.
ABSENT = """import os, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in os.environ["ABSENT"].split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""
LEARN = "data train-tokenizer --input x.jsonl --vocab-size 12"


def taco_without(folder: Path, absent: str, *words: object, **variables: str) -> tuple[int, str]:
    """Exit code and standard error of `taco WORDS` in `folder`, where the modules `absent` are not installed."""
    (folder / "sitecustomize.py").write_text(ABSENT)
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "ABSENT": absent, **variables}
    command = [sys.executable, "-m", "pretrain.cli", *map(str, words)]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    return ended.returncode, ended.stderr


def test_every_package_of_the_project_has_a_name_to_install() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {re.match(r"[\w.-]+", text)[0] for text in project["dependencies"]} == set(PACKAGES.values())  # type: ignore[index]


@pytest.mark.parametrize(
    ("absent", "package", "words"),
    [
        ("torch", "torch", "fill-mask model [MASK]"),
        ("xxhash", "xxhash", "data verify out"),  # imported at the top of a module
        ("typer", "typer", "data verify out"),
        ("backports", "backports.zstd", "data preprocess --input x.jsonl --tokenizer vocab.txt --output-prefix out"),
        ("datasets", "datasets", "data preprocess --input hf://books --tokenizer vocab.txt --output-prefix out"),
        ("tokenizers", "tokenizers", f"{LEARN} --output v.txt --kind wordpiece"),
        ("google", "protobuf", f"{LEARN} --output v.model --kind sentencepiece-bpe"),
    ],
)
def test_a_verb_names_the_package_that_it_lacks(tmp_path: Path, absent: str, package: str, words: str) -> None:
    write_vocab(tmp_path)
    write_jsonl(tmp_path / "x.jsonl", ["the cat sat"] * 9)
    (tmp_path / "model").mkdir()
    code, message = taco_without(tmp_path, absent, *words.split())
    verb = "taco" if package == "typer" else "taco " + " ".join(words.split()[: 2 if words.startswith("data") else 1])
    command = re.escape(f"{sys.executable} -m pip install ")
    assert re.fullmatch(
        rf"error: {verb} needs the package {package}, which is not installed: {command}'?{package}\S*\n", message
    ), message
    assert code == 1


def test_each_rank_says_who_it_is(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    _, message = taco_without(tmp_path, "torch", "fill-mask", "model", "[MASK]", RANK="3")
    assert message.startswith("[rank 3] error: taco fill-mask needs the package torch")


@pytest.mark.parametrize(
    "absent",
    [
        "pretrain.data.dataset.verification",  # of our own
        "data_tools",
        "pydantic.main",  # of a package that is there
    ],
)
def test_a_missing_module_that_no_installation_mends_stays_a_traceback(tmp_path: Path, absent: str) -> None:
    code, message = taco_without(tmp_path, absent, "data", "verify", "out")
    assert code == 1
    assert message.startswith("Traceback")
    assert f"No module named {absent!r}" in message
    assert "pip install" not in message


@pytest.mark.parametrize("name", ["model.safetensors", "."])
def test_an_export_that_may_not_be_read_is_not_called_incomplete(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / file).touch()
    with unreadable(folder / name):
        assert taco("fill-mask", str(folder), "a [MASK]")[0] == 1
    assert capsys.readouterr().err == f"error: {folder / name}: cannot be read: Permission denied\n"
