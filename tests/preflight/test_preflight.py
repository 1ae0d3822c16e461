"""Checks before a run: what a machine says of itself, who stands out among several, whether all ranks meet."""

from __future__ import annotations

import inspect
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from project import ROOT
from small_runs import write_small_run

from pretrain import train
from pretrain.config.load import load_config
from pretrain.preflight import __main__ as preflight
from pretrain.preflight import node_checks
from pretrain.preflight.node_checks import NodeReport, find_failing
from pretrain.run_folder import RunFolder, describe_environment

GOOD_GPU = "NVIDIA A100-SXM4-80GB, 550.54, 3, 0, No, No, No"


def run_preflight(*words: object, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pretrain.preflight", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        command, input=stdin, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


# -- one machine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("NVIDIA A100, 550.54, 40000, 0, No, No, No", "GPU 1: 40000 MiB in use before the run"),
        ("NVIDIA A100, 550.54, 3, 2, No, No, No", "GPU 1: 2 uncorrected memory errors"),
        ("NVIDIA A100, 550.54, 3, 0, Yes, No, No", "GPU 1: retired_pages.pending is set"),
        ("NVIDIA A100, 550.54, 3, 0, No, 1, No", "GPU 1: remapped_rows.pending is set"),
        ("NVIDIA A100, 550.54, 3, 0, No, No, Yes", "GPU 1: remapped_rows.failure is set"),
    ],
)
def test_a_faulty_gpu_is_named(row: str, words: str) -> None:
    _, problems = node_checks.read_gpu_table(f"{GOOD_GPU}\n{row}\n", expected=2)
    assert len(problems) == 1
    assert words in problems[0]


def test_good_gpus_and_fields_that_a_gpu_lacks_are_no_problem() -> None:
    names, problems = node_checks.read_gpu_table(f"{GOOD_GPU}\nTesla V100, 550.54, 3, [N/A], [N/A], [N/A], [N/A]\n", 2)
    assert (names[0], problems) == ("NVIDIA A100-SXM4-80GB, driver 550.54", [])


def test_a_missing_gpu_is_counted() -> None:
    _, problems = node_checks.read_gpu_table(f"{GOOD_GPU}\n", expected=8)
    assert "8 asked for, 1 there" in problems[0]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (f"echo '{GOOD_GPU}'", []),
        (
            "echo 'Unable to determine the device handle: GPU is lost'; exit 15",
            ["ends with code 15: Unable", "is lost"],
        ),
        (None, ["there is no nvidia-smi here"]),
    ],
)
def test_nvidia_smi_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, words: list[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    names, problems = node_checks.inspect_gpus(1)
    assert len(names) == (not words)
    assert len(problems) == bool(words)
    assert all(word in problems[0] for word in words)


def test_a_full_disk_is_told_with_both_figures(tmp_path: Path) -> None:
    (problem,) = node_checks.find_disk_problems(tmp_path / "not" / "there yet", 10**18)
    assert "GB free, about 1000000000.0 GB needed" in problem
    assert node_checks.find_disk_problems(tmp_path / "not" / "there yet", 1) == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told() -> None:
    (problem,) = node_checks.find_disk_problems(Path("/proc/run"), 1)
    assert "cannot be written here" in problem


def test_a_host_name_without_address_is_told() -> None:
    _, address, problems = node_checks.inspect_names("no-such-host.invalid")
    assert address is None
    assert "'no-such-host.invalid' has no address here" in problems[-1]


def test_one_changed_byte_at_either_end_or_in_the_manifest_shows(tmp_path: Path) -> None:
    write_small_run(tmp_path)
    before, problems = node_checks.fingerprint_data([str(tmp_path / "train")])
    assert problems == []
    assert len(before) == 3
    for name, position in (("train.bin", 0), ("train.bin", -1), ("train.idx", -1), ("train.json", 40)):
        path = tmp_path / name
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)
        after, _ = node_checks.fingerprint_data([str(tmp_path / "train")])
        assert [key for key in before if before[key] != after[key]] == [str(path)]
        before = after
    (tmp_path / "train.idx").unlink()
    _, problems = node_checks.fingerprint_data([str(tmp_path / "train")])
    assert f"{tmp_path}/train.idx: cannot be read here: No such file" in problems[0]


def test_the_program_for_people(tmp_path: Path) -> None:
    config = write_small_run(tmp_path)
    done = run_preflight("machine", "--config", config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no GPU asked for" in done.stdout
    assert f"{tmp_path}/train.bin: " in done.stdout
    (tmp_path / "train.bin").unlink()
    done = run_preflight("machine", "--config", config)
    assert done.returncode == 1
    assert "problem: " in done.stdout


# -- several -----------------------------------------------------------------------------------------------------------


def reports(count: int = 4, **of_the_second: object) -> list[NodeReport]:
    found = []
    for number in range(1, count + 1):
        fields: dict[str, object] = {"address": f"10.0.0.{number}", "gpus": ["A100, driver 5"], "data": {"d": "1 byte"}}
        fields |= of_the_second if number == 2 else {}
        found.append(NodeReport(node=f"n{number}", host=f"n{number}", **fields))  # type: ignore[arg-type]
    return found


NODES = ["n1", "n2", "n3", "n4"]


def test_machines_that_agree_are_well() -> None:
    assert find_failing(reports(), NODES) == {}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"data": {"d": "2 bytes"}}, "d: has 2 bytes, most have 1 byte"),
        ({"gpus": ["A100, driver 4"]}, "GPUs: has A100, driver 4, most have A100, driver 5"),
        ({"problems": ["GPU 3: hot"]}, "GPU 3: hot"),
    ],
)
def test_the_machine_that_stands_out_is_named(fields: dict[str, object], words: str) -> None:
    failing = find_failing(reports(**fields), NODES)
    assert list(failing) == ["n2"]
    assert words in failing["n2"][0]


def test_a_machine_that_says_nothing_is_named() -> None:
    assert list(find_failing(reports(3), NODES)) == ["n4"]


def test_where_nobody_is_right_everybody_fails() -> None:
    failing = find_failing(reports(2, data={"d": "2 bytes"}), NODES[:2])
    assert set(failing) == {"n1", "n2"}
    assert "the machines do not agree" in failing["n1"][0]


def test_hosts_that_take_one_address_for_their_own_are_named() -> None:
    """127.0.1.1 in /etc/hosts: every machine meets itself."""
    failing = find_failing(reports(address="10.0.0.1"), NODES)
    assert set(failing) == {"n1", "n2"}
    assert "mend /etc/hosts" in failing["n1"][0]


def lines_of(found: list[NodeReport]) -> list[str]:
    return [line for report in found for line in report.to_lines()]


def test_reports_are_read_whatever_order_their_lines_come_in() -> None:
    """srun mixes the lines of its tasks, and cuts those of 1024 bytes and more."""
    long = {f"/data/{number}": "x y  z " * 30 for number in range(20)}
    found = reports(data=long)
    lines = lines_of(found)
    assert max(map(len, lines)) < 1024 - 255  # a node's name at its longest
    random.Random(3).shuffle(lines)
    assert sorted(NodeReport.from_lines(line + "\n" for line in lines), key=lambda report: report.node) == found
    without = [line for line in lines if not line.startswith("report n2 3/")]
    assert [report.node for report in NodeReport.from_lines(sorted(without))] == ["n1", "n3", "n4"]
    for damaged in ("report n5 0/1 {", "report n5 0/x {}", "report n5 0/1 [1]", 'report n5 0/1 {"other": 1}', "report"):
        assert NodeReport.from_lines([damaged]) == []


def test_compare_tells_people_and_the_script(tmp_path: Path) -> None:
    lines = ["noise of a library", *lines_of(reports(problems=["GPU 3: hot"]))]
    done = run_preflight("compare", "--nodes", " ".join(NODES), stdin="\n".join(lines))
    assert (done.returncode, done.stdout) == (1, "n2\n")
    assert "preflight: n2: GPU 3: hot" in done.stderr
    lines = lines_of(reports())
    done = run_preflight("compare", "--nodes", " ".join(NODES), stdin="\n".join(lines))
    assert (done.returncode, done.stdout) == (0, "")
    assert "4 machines are well: n1 10.0.0.1" in done.stderr
    done = run_preflight("compare", "--nodes", "n1 n2", stdin="")
    assert (done.returncode, done.stdout) == (2, "")
    assert "all 2 machines: did not answer" in done.stderr


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_the_plan_is_steps_and_folder_whatever_its_name(tmp_path: Path) -> None:
    config = write_small_run(tmp_path)
    folder = tmp_path / "a $(b)\n"
    done = run_preflight("plan", "--config", config, f"run.output_dir={json.dumps(str(folder))}", "--processes", "2")
    assert (done.returncode, done.stdout) == (0, f"8 {folder}/\n"), done.stderr
    assert not folder.exists()


def test_the_plan_refuses_a_configuration_a_stranger_and_a_folder_in_use(tmp_path: Path) -> None:
    config_path = write_small_run(tmp_path)
    config = load_config(config_path)
    plan = ("plan", "--config", config_path)
    done = run_preflight(*plan, "--processes", "3")
    assert done.returncode == 2
    assert "train.global_batch_size" in done.stderr
    config.run.output_dir.mkdir()
    (config.run.output_dir / "thesis.tex").touch()
    assert "holds thesis.tex" in run_preflight(*plan).stderr
    (config.run.output_dir / "thesis.tex").unlink()
    holder = RunFolder(config.run.output_dir)
    holder.claim()
    done = run_preflight(*plan, SLURM_JOB_ID="8")
    assert done.returncode == 2
    assert f"in use by host {socket.gethostname()}, process {os.getpid()}" in done.stderr
    holder.release()
    holder.write_description(config, {}, describe_environment(1, "cpu"))
    assert run_preflight(*plan).returncode == 0
    done = run_preflight(*plan, "optim.lr=1")
    assert done.returncode == 2
    assert "optim.lr: 0.003 -> 1.0" in done.stderr
    assert run_preflight(*plan, "optim.lr=1", "--allow-change=optim.lr").returncode == 0


def test_what_this_job_still_holds_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(write_small_run(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    holder = RunFolder(config.run.output_dir)
    holder.claim()
    RunFolder(config.run.output_dir).check_free(config)


@pytest.mark.parametrize("command", [preflight.plan, preflight.report, preflight.all_reduce])
def test_what_training_accepts_its_checks_accept(command: Callable[..., None]) -> None:
    """The job script hands the same words to all of them; it starts the ranks itself."""
    wanted = set(inspect.signature(train.train).parameters) - {"dry_run", "processes", "nodes"}
    assert wanted <= set(inspect.signature(command).parameters)


# -- all ranks ---------------------------------------------------------------------------------------------------------


def start_ranks(config: Path, ranks: list[int], world_size: int, **options: object) -> list[tuple[int, str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pretrain.preflight", "all-reduce", "--config", str(config)]
    command += [f"--{name}={value}" for name, value in options.items()]
    processes = []
    for rank in ranks:
        place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = {**os.environ, "PYTHONPATH": str(ROOT), **{key: str(value) for key, value in place.items()}}
        processes.append(
            subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    ends = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *end) for process, end in zip(processes, ends, strict=True)]


@pytest.mark.slow
def test_all_ranks_meet_and_sum(tmp_path: Path) -> None:
    first, second = start_ranks(write_small_run(tmp_path), [0, 1], 2, nodes="n1 n2")
    assert (first[0], first[1], second[0]) == (0, "", 0), first[2] + second[2]
    assert "all-reduce over 2 ranks" in first[2]


@pytest.mark.slow
def test_a_rank_that_does_not_come_has_a_node(tmp_path: Path) -> None:
    first, _ = start_ranks(write_small_run(tmp_path), [0, 1], 3, nodes="n1 n2 n3", timeout=8)
    assert (first[0], first[1]) == (1, "n3\n"), first[2]
    assert "1 of 3 ranks missing after 8 s: 2 on n3" in first[2]


@pytest.mark.slow
def test_a_meeting_point_that_nobody_keeps_is_told(tmp_path: Path) -> None:
    (second,) = start_ranks(write_small_run(tmp_path), [1], 2, timeout=3)
    assert second[0] == 1
    assert "cannot be reached" in second[2]
    assert "TACO_MASTER_ADDR" in second[2]
