"""What a user gets wrong at the start of a run: one clear message, the right exit code, nothing lost."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import pytest
from forked import run_ranks
from small_runs import write_cyclic_dataset, write_small_run

from pretrain.cli import main
from pretrain.data import native


def taco(*arguments: str) -> tuple[int, str]:
    """Exit code and standard error of `taco ARGUMENTS`, in a process of its own."""

    def program() -> tuple[int, str]:
        output = io.StringIO()
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            try:
                main(arguments)
            except SystemExit as ended:
                return int(ended.code or 0), output.getvalue()

    return run_ranks(1, program)[0]


def refused(*arguments: str, code: int = 2) -> str:
    found, message = taco("train", *arguments)
    assert found == code, message
    assert "Traceback" not in message
    return message


@pytest.mark.fault("bad-config")
def test_missing_configuration_and_missing_option(tmp_path: Path) -> None:
    assert "no such configuration file" in refused("--config", str(tmp_path / "absent.yaml"))
    assert "Missing option '--config'" in refused()


@pytest.mark.fault("bad-config")
def test_unknown_key_wrong_type_and_impossible_batch(tmp_path: Path) -> None:
    config = str(write_small_run(tmp_path))
    assert "did you mean train.steps?" in refused("--config", config, "train.stepz=3")
    assert "found 'soon'" in refused("--config", config, "train.steps=soon")
    message = refused("--config", config, "train.global_batch_size=18")
    assert "train.global_batch_size (18) must be a multiple of train.micro_batch_size (4)" in message
    assert "try 16" in message


def test_missing_dataset_names_the_file(tmp_path: Path) -> None:
    config = str(write_small_run(tmp_path))
    message = refused("--config", config, f"data.train=[{tmp_path / 'absent'}]", code=1)
    assert f"data.train: {tmp_path / 'absent'}.bin .idx .json: no such file" in message
    assert (
        f"taco data preprocess --input CORPUS --tokenizer VOCABULARY --output-prefix {tmp_path / 'absent'}" in message
    )


def test_dataset_without_a_complete_row(tmp_path: Path) -> None:
    write_cyclic_dataset(tmp_path / "train", num_documents=1)
    write_cyclic_dataset(tmp_path / "validation", num_documents=1)
    message = refused("--config", str(write_small_run(tmp_path)), "data.seq_length=512",
                      "model.max_position_embeddings=512", code=1)  # fmt: skip
    assert "a smaller data.seq_length" in message


@pytest.mark.fault("tokenizer")
def test_validation_made_with_another_vocabulary(tmp_path: Path) -> None:
    write_cyclic_dataset(tmp_path / "train")
    write_cyclic_dataset(tmp_path / "validation", words="other")
    message = refused("--config", str(write_small_run(tmp_path)), code=1)
    assert "preprocess both with the same one" in message


@pytest.mark.fault("tokenizer")
def test_resume_on_data_of_another_vocabulary(tmp_path: Path) -> None:
    config = str(write_small_run(tmp_path, train__steps=2, optim__warmup_steps=1, checkpoint__every_steps=1))
    assert taco("train", "--config", config)[0] == 0
    for name in ("train", "validation"):
        write_cyclic_dataset(tmp_path / name, words="other")
    message = refused("--config", config, "train.steps=3", "--allow-change", "train.steps", code=1)
    assert "use the run's own data" in message
    assert (tmp_path / "run" / "checkpoints" / "step-0000002").is_dir()


@pytest.mark.fault("tokenizer")
def test_tokenizer_beside_the_data_is_missing_or_another_one(tmp_path: Path) -> None:
    config = str(write_small_run(tmp_path))
    beside = tmp_path / "train.tokenizer"
    beside.rename(tmp_path / "away")
    assert "train.tokenizer: is missing" in refused("--config", config, code=1)
    write_cyclic_dataset(tmp_path / "else", words="other")
    (tmp_path / "else.tokenizer").rename(beside)
    assert "holds another tokenizer" in refused("--config", config, code=1)


@pytest.mark.fault("changed-run")
def test_output_folder_of_another_run(tmp_path: Path) -> None:
    config = str(write_small_run(tmp_path, train__steps=2, optim__warmup_steps=1))
    assert taco("train", "--config", config)[0] == 0
    message = refused("--config", config, "optim.lr=0.5")
    assert "belongs to a run with another configuration" in message
    assert "optim.lr: 0.003 -> 0.5" in message
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "data.csv").write_text("1")
    assert "holds data.csv" in refused("--config", config, f"run.output_dir={tmp_path / 'else'}")


@pytest.mark.fault("bad-config")
def test_a_gpu_where_there_is_none_and_fp16_on_the_cpu(tmp_path: Path) -> None:
    config = str(write_small_run(tmp_path))
    assert "torch sees no GPU here" in refused("--config", config, "run.device=cuda")
    assert "needs a CUDA GPU" in refused("--config", config, "precision=fp16")


@pytest.mark.fault("bad-config")
def test_one_process_where_the_configuration_says_two(tmp_path: Path) -> None:
    message = refused("--config", str(write_small_run(tmp_path)), "parallel.data=2")
    assert "torchrun --nproc-per-node 2" in message


def test_missing_extension_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = str(write_small_run(tmp_path))
    monkeypatch.setitem(sys.modules, "pretrain.data._native", None)
    native.native.cache_clear()
    message = refused("--config", config, code=1)
    native.native.cache_clear()
    assert "python setup.py build_ext --inplace" in message


@pytest.mark.fault("bad-config")
def test_a_deepspeed_key_that_is_ours(tmp_path: Path) -> None:
    message = refused("--config", str(write_small_run(tmp_path)), "deepspeed={gradient_clipping: 1.0}")
    assert "deepspeed.gradient_clipping is set by optim.clip_grad_norm" in message


def test_dry_run_prints_configuration_and_plan_and_makes_nothing(tmp_path: Path) -> None:
    code, output = taco("train", "--config", str(write_small_run(tmp_path)), "--dry-run", "parallel.data=2")
    assert code == 0
    assert "micro_batch_size: 4" in output
    assert "plan: 2 processes, ZeRO-1, 2 micro-batches of 4 rows per rank and step" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_configuration_errors_do_not_pay_for_torch(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys\nfrom pretrain.cli import main\n"
        f"try: main(['train', '--config', {str(tmp_path / 'absent.yaml')!r}])\n"
        "finally: sys.stderr.write('torch' if 'torch' in sys.modules else 'light')"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 2
    assert answer.stderr.endswith("light")
