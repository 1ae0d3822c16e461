"""The dry run: size, memory, epochs and what is missing, once per launch, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import VOCAB_SIZE, write_cyclic_dataset, write_small_run

from pretrain import train
from pretrain.cli import run_program
from pretrain.config.load import load_config
from pretrain.planner.memory import count_parameters
from pretrain.planner.plan import describe_epochs, make_plan, missing_data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a small run with its datasets."""
    return write_small_run(tmp_path_factory.mktemp("plan"))


def dry_run(capsys: pytest.CaptureFixture[str], path: Path, *overrides: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        run_program(train.app, ["--config", str(path), "--dry-run", *overrides])
    return int(ended.value.code or 0), capsys.readouterr().out


def test_the_plan_tells_size_memory_and_epochs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(run.parent.rglob("*"))
    code, output = dry_run(capsys, run, "train.steps=20", "train.steps=2000", "parallel.data=2")
    assert code == 0
    config = load_config(run, ["train.steps=2000"])
    tokens, rows = (json.loads((run.parent / "train.json").read_text())[key] for key in ("tokens", "documents"))
    lines = output.split("\n# ")
    assert lines[1] == "train.steps is given 2 times on the command line; the last one counts: train.steps=2000"
    assert lines[2] == "plan: 2 processes, ZeRO-1, 2 micro-batches of 4 rows per rank and step,"
    parameters = f"{count_parameters(config, VOCAB_SIZE):,}"
    assert f"\n# model: {parameters} parameters, {parameters} of them on a rank; vocabulary {VOCAB_SIZE} (of " in output
    assert "GiB per rank" in output
    assert f"{tokens:,} tokens in {rows} documents" in output
    assert "train.steps=2,000 are " in output
    assert sorted(run.parent.rglob("*")) == before


def test_a_row_mode_with_tables_is_estimated_and_builds_none(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(run.parent.rglob("*"))
    for override in ("data.row_mode=pack", "data.splits={train: 0.5, validation: 0.5}"):
        code, output = dry_run(capsys, run, "data.validation=[]", override)
        assert code == 0, output
        assert "# data: about " in output
        assert "`taco data index` counts them" in output
    assert sorted(run.parent.rglob("*")) == before


def test_missing_data_is_named_with_the_command_that_makes_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = dry_run(capsys, run, "data.train=[no where]", "run.init_from=absent")
    assert code == 0  # a plan for another machine
    assert "# plan: 1 process, ZeRO-1, 4 micro-batches" in output
    assert "vocabulary 30,522 (BERT's; that of the data is not known)" in output
    assert "# missing: data.train: no where.bin .idx .json: no such file" in output
    assert "taco data preprocess --input CORPUS --tokenizer VOCABULARY --output-prefix 'no where'" in output
    assert "# missing: run.init_from: absent: no such checkpoint" in output


def test_a_part_of_a_dataset_is_named_and_a_name_with_suffix_left_to_the_reader(run: Path, tmp_path: Path) -> None:
    write_cyclic_dataset(tmp_path / "part")
    (tmp_path / "part.json").unlink()
    config = load_config(run, [f"data.train=[{tmp_path / 'part'}]"])
    (problem,) = missing_data(config)
    assert problem.startswith(f"data.train: {tmp_path / 'part'}.json: no such file")
    assert missing_data(load_config(run, [f"data.train=[{run.parent / 'train.bin'}]"])) == []


def test_what_does_not_fit_or_is_damaged_ends_with_code_2(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output = dry_run(capsys, run, "parallel.tensor=2")
    assert code == 2
    assert "# does not fit: parallel.tensor (2) x parallel.pipeline (1) = 2 does not divide" in output
    assert "# model: " in output
    write_cyclic_dataset(tmp_path / "bad")
    (tmp_path / "bad.json").write_text("{}")
    code, output = dry_run(capsys, run, f"data.train=[{tmp_path / 'bad'}]")
    assert code == 2
    assert f"# data: {tmp_path / 'bad.json'}" in output


def test_one_rank_of_a_launch_speaks(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = []
    for rank in ("0", "1"):
        for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        outputs.append(dry_run(capsys, run))
    assert outputs[0][0] == 0
    assert "# plan: 2 processes" in outputs[0][1]
    assert outputs[1] == (0, "")


def test_epochs_have_separators_and_words_in_their_number(run: Path) -> None:
    config = load_config(run, ["train.steps=100000"])
    assert describe_epochs(config, [("a", 1)], None) == [
        "train.steps=100,000 are 1,600,000.00 epochs of the training rows"
    ]
    (line,) = describe_epochs(config, [("a", 10**12)], None)
    assert line == "train.steps=100,000 are 1.6e-06 epochs of the training rows"
    assert describe_epochs(config, [("a", 1), ("b", 2000)], [0.25, 0.75]) == [
        "a: 25.0000% of the samples; train.steps=100,000 are 400,000.00 epochs of its 1 row",
        "b: 75.0000% of the samples; train.steps=100,000 are 600.00 epochs of its 2,000 rows",
    ]


def test_a_blend_tells_the_share_of_each_dataset(run: Path) -> None:
    prefix = load_config(run).data.train[0]
    config = load_config(run, [f"data.train=[{prefix}, {run.parent / 'validation'}]", "data.weights=[3, 1]"])
    lines = make_plan(config, 1).lines
    assert any(f"{prefix}: 75.0000% of the samples" in line for line in lines), lines
