"""Every command of the documentation can be pasted into bash and zsh, has options that exist, and does what it says.

Commands on data, checkpoints and models are carried out on small ones that have the documented names; those that train
are read with `--dry-run`; of benchmarks and checks of machines, which have tests of their own, the options are checked.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import gzip
import importlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from backports import zstd
from documented_commands import PAGES, Documented, commands_of, shrunken, taco_words, unquoted
from project import ROOT, SAMPLE
from pyarrow import parquet as pq
from read_texts import texts_of
from small_runs import write_small_run

from pretrain import cli
from pretrain.cli import VERBS

COMMANDS = {page: list(commands_of(page)) for page in PAGES if any(commands_of(page))}


def name_of(value: object) -> str:
    return value.name if isinstance(value, Path) else str(value)


@pytest.mark.parametrize("page", COMMANDS, ids=name_of)
def test_a_command_can_be_pasted_into_bash_and_zsh(page: Path) -> None:
    """zsh takes brackets for patterns and, at its prompt, `#` for a word."""
    problems = []
    for command in COMMANDS[page]:
        bare = unquoted(command.text)
        if re.search(r"[\[\]]", bare):
            problems.append(f"{command.place}: zsh takes unquoted brackets for a pattern; quote the argument")
        if re.search(r"\s#", bare):
            problems.append(f"{command.place}: a comment behind a command; zsh passes it on as arguments")
        if subprocess.run(["bash", "-n", "-c", command.text], capture_output=True, check=False).returncode:
            problems.append(f"{command.place}: bash cannot read it")
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize("page", COMMANDS, ids=name_of)
def test_options_exist(page: Path) -> None:
    problems = []
    for command in COMMANDS[page]:
        words = command.words
        if words[0] == "make":
            rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            problems += [
                f"{command.place}: no rule {word}" for word in words[1:] if "=" not in word and word not in rules
            ]
        arguments = taco_words(words)
        problem = None if arguments is None else problem_of_options(arguments)
        if problem and not (command.text.endswith("...") and problem.startswith("Missing")):
            problems.append(f"{command.place}: {problem}")
    assert not problems, "\n" + "\n".join(problems)


def problem_of_options(arguments: list[str]) -> str | None:
    """What the verb's parser says to the arguments, without running anything."""
    import typer

    for count in (2, 1):
        name = " ".join(arguments[:count])
        if name in VERBS:
            command, rest = typer.main.get_command(importlib.import_module(VERBS[name].module).app), arguments[count:]
            if hasattr(command, "commands"):
                command, rest = command.commands[rest[0]], rest[1:]
            try:
                command.make_context(name, list(rest))
            except Exception as error:
                if not hasattr(error, "format_message"):  # typer brings its own copy of click
                    raise
                return str(error.format_message())
            return None
    return f"no verb {' '.join(arguments[:2])}"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the documented names exist: corpora, vocabularies, datasets, a run, an export, a download."""
    folder = tmp_path_factory.mktemp("documented")
    for name in ("configs", "slurm", "data_tools"):
        (folder / name).symlink_to(ROOT / name)
    write_corpora(folder, texts_of(SAMPLE)[:60])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        learn = ["data", "train-tokenizer", "--input", "books.jsonl.zst", "--vocab-size", "300", "--output"]
        carry_out([*learn, "vocab.txt"])
        carry_out([*learn, "spm.model", "--kind", "sentencepiece-unigram"])
        for name in ("books", "data/books", "data/web", "data/wiki", "data/train", "data/valid", "data/validation"):
            words = ["--tokenizer", "vocab.txt", "--output-prefix", name, "--split-sentences"]
            carry_out(["data", "preprocess", "--input", "all.jsonl", *words])
    changes = {"data__train": ["data/train"], "data__validation": [], "run__output_dir": "runs/taco_base"}
    config = write_small_run(folder, **changes)
    done = subprocess.run([sys.executable, "-m", "pretrain.train", "--config", config], cwd=folder, check=False)
    assert done.returncode == 0
    return folder


def write_corpora(folder: Path, texts: list[str]) -> None:
    for name in ("corpus", "data", "dumps/2024", "CoLA", "downloads"):
        (folder / name).mkdir(parents=True)
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    for name, part in (("books", lines), ("corpus/a", lines[:30]), ("corpus/b", lines[30:])):
        (folder / f"{name}.jsonl.zst").write_bytes(zstd.compress("".join(part).encode()))
    (folder / "all.jsonl").write_text("".join(lines))
    (folder / "corpus" / "more.jsonl").write_text("".join(lines[:3]))
    (folder / "more.txt").write_text("corpus/more.jsonl\n")
    (folder / "wiki.txt.gz").write_bytes(gzip.compress("\n\n".join(texts).encode()))
    pq.write_table(pa.table({"text": texts[:5]}), folder / "dumps" / "2024" / "x.parquet")
    with gzip.open(folder / "part-0001", "wt", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts[:9])])
    (folder / "CoLA" / "train.tsv").write_text("gj04\t1\t\tthe cat sat on the mat .\n" * 9)


def carry_out(arguments: list[str]) -> None:
    """Runs `taco` in this process. Fails with its output if it does."""
    captured = io.StringIO()
    with contextlib.redirect_stdout(captured), contextlib.redirect_stderr(captured), pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code in (0, None), f"taco {shlex.join(arguments)}\n{captured.getvalue()}"


# Pages whose commands make what those of later pages read.
FIRST = ("data-tutorial.md", "data-merge.md", "export.md", "import-hf.md")
ORDER = sorted(COMMANDS, key=lambda page: (FIRST.index(page.name) if page.name in FIRST else len(FIRST), page.name))


@pytest.mark.slow
@pytest.mark.parametrize("page", ORDER, ids=name_of)
def test_commands_do_what_they_say(page: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    if page.name == "import-hf.md":
        shutil.copytree("exported/taco_base", "downloads/bert-base-uncased")
    for command in COMMANDS[page]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in launched_as(command).items():
                patch.setenv(name, value)
            for arguments in small_forms(command):
                carry_out(arguments)


def launched_as(command: Documented) -> dict[str, str]:
    """The environment of rank 0 of a launcher, which `--dry-run` reads the number of processes from."""
    if command.words[0] != "torchrun":
        return {}
    size = command.words[command.words.index("--nproc-per-node") + 1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return {**ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def small_forms(command: Documented) -> list[list[str]]:
    """What is carried out for a command: for the array of a job script, the command of every task."""
    arguments = taco_words(command.words)
    if arguments is None or (words := shrunken(arguments)) is None:
        return []
    words = [
        path for word in words for path in (sorted(glob.glob(word)) if "*" in word and " " not in word else [word])
    ]
    words = [word.replace("step-0050000", "step-0000008") for word in words]
    if words[:2] in (["data", "preprocess"], ["data", "train-tokenizer"], ["data", "merge"]):
        words.append("--overwrite")
    if words[:2] == ["data", "preprocess"]:
        words += [] if "--tokenizer" in words else ["--tokenizer", "vocab.txt"]
        words += [] if "--output-prefix" in words else ["--output-prefix", "data/other"]
        words += [] if "--input" in words else ["--input", "all.jsonl"]
    if command.words[0] != "sbatch" or words[0] != "data":
        return [words]
    prefix = words.index("--output-prefix") + 1
    name = words[prefix]
    parts = [(f"{name}.part-{part:05d}-of-00016", f"{part}/16") for part in range(16)]
    return [[*words[:prefix], part, *words[prefix + 1 :], "--shard", shard] for part, shard in parts]
