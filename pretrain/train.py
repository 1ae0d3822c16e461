"""`taco train`: one rank of a training run, which builds the parts and hands them to the trainer; or all its ranks.

    taco train --config configs/taco_tiny.yaml optim.lr=3e-4
    taco train --processes 2 --config configs/taco_tiny.yaml
    torchrun --nproc-per-node 2 -m pretrain.train --config configs/taco_tiny.yaml

The same command continues an interrupted run and says so when the run is complete. Everything that can be wrong is
checked before any process group exists, cheapest first: configuration, launch, data, device.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pretrain.cli import new_program, run_program
from pretrain.runlog import get_logger

if TYPE_CHECKING:
    import torch

    from pretrain.config.sections import RunConfig
    from pretrain.data.batches import RowSource
    from pretrain.parallel.launch import Launch
    from pretrain.parallel.nodes import Nodes
    from pretrain.resilience.stop_request import StopRequest
    from pretrain.run_folder import RunFolder
    from pretrain.trainer import Trainer

app = new_program()
log = get_logger(__name__)


@app.command(epilog="Example: taco train --config configs/taco_tiny.yaml --processes 2 train.steps=100")
def train(
    config: Annotated[Path, typer.Option(help="YAML file that describes the run; configs/ holds examples")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, any number of them")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print configuration, size and needs, and stop")] = False,
    allow_change: Annotated[
        list[str] | None, typer.Option(help="key that may have changed since the run began")
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="begin at step 0 if every checkpoint is damaged or gone")
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="ranks to start on this machine, one per GPU; without it, one in this process"),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="machines on each of which this command is started: by srun (one task per node, which gives the "
            "number), or with NODE_RANK, MASTER_ADDR and MASTER_PORT set",
        ),
    ] = None,
) -> None:
    """Pretrain BERT: in this process, in several (--processes), or as one process that torchrun or srun has started.

    Exit codes: 0 done, 1 error, 2 configuration, 75 stopped by a signal with everything saved, 124 the run hung.
    """
    from pretrain.checkpoint.run_record import ALLOWS_OTHER_RUN
    from pretrain.config.keys import find_unknown
    from pretrain.config.load import find_repeated, load_config
    from pretrain.launcher.rank_side import join_launcher
    from pretrain.parallel.launch import read_launch, warn_of_idle_tasks
    from pretrain.resilience.machine_limits import machine_limits_explained
    from pretrain.resilience.stop_request import StopRequest
    from pretrain.runlog import start_logging

    started = _nodes_of(processes, nodes)
    launch = read_launch() if started is None else started.launch(processes or 1)
    if dry_run:
        if launch.rank == 0:
            _print_plan(config, overrides or [], launch, allow_change or [])
        return
    if started is not None and launch.world_size > 1:
        resolved = load_config(config, overrides or (), world_size=launch.world_size)
        start_logging(None, 0)
        options = [f"--allow-change={key}" for key in allow_change or ()] + ["--from-scratch"] * from_scratch
        arguments = ["--config", str(config), *options, "--", *(overrides or ())]
        with machine_limits_explained(resolved, launch):
            raise typer.Exit(_start_ranks(launch, started, resolved, arguments))
    join_launcher()
    stop = StopRequest(launch.rank)
    stop.install()
    start_logging(None, launch.rank)
    warn_of_idle_tasks(launch)
    resolved = load_config(config, overrides or (), world_size=launch.world_size)
    notes = [*find_repeated(overrides or ()), *find_unknown(allow_change or (), (ALLOWS_OTHER_RUN,))]
    for line in notes if launch.rank == 0 else ():
        typer.echo(f"note: {line}", err=True)
    with machine_limits_explained(resolved, launch):
        _run(resolved, launch, stop, allow_change or [], from_scratch=from_scratch)


def _nodes_of(processes: int | None, nodes: int | None) -> Nodes | None:
    """The machines of a run whose ranks this process starts; None if it is a rank itself."""
    from pretrain.errors import ConfigError
    from pretrain.parallel.nodes import read_nodes

    if processes is not None:
        return read_nodes(nodes)
    if nodes is not None:
        raise ConfigError(f"--nodes {nodes} goes with --processes, the number of ranks on each of them; add it")
    return None


def _start_ranks(launch: Launch, nodes: Nodes, config: RunConfig, arguments: list[str]) -> int:
    """Start the ranks of this machine as `taco train ARGUMENTS`; the exit code of the whole."""
    from datetime import timedelta

    from pretrain.errors import counted

    _check_data_is_here(config)  # each rank would find that after a start of its own
    typer.echo(f"starting {counted(launch.local_world_size, 'rank')}", err=True)
    from pretrain.launcher.agent import launch_ranks

    timeout = timedelta(seconds=config.watchdog.collective_seconds)
    return launch_ranks(launch.local_world_size, nodes, arguments, timeout)


def _print_plan(path: Path, overrides: list[str], launch: Launch, allowed: list[str]) -> None:
    """Print the resolved configuration, what it amounts to, and what it lacks; as YAML, all but the keys in comments.

    Ends with exit code 2 if the run cannot work; that data is missing on this machine need not mean that.
    """
    from pretrain.checkpoint.run_record import ALLOWS_OTHER_RUN
    from pretrain.checkpoint.start_check import find_problems_of_start
    from pretrain.config.keys import find_unknown
    from pretrain.config.load import dump_config, find_repeated, load_config
    from pretrain.planner.plan import make_plan
    from pretrain.run_folder import RunFolder

    config = load_config(path, overrides)
    config = RunFolder(config.run.output_dir).keep_average(config)
    plan = make_plan(config, launch.world_size)
    plan.problems += [f"does not fit: {text}" for text in find_problems_of_start(config, plan.tokenizer, allowed)]
    typer.echo(dump_config(config), nl=False)
    notes = [*find_repeated(overrides), *find_unknown(allowed, (ALLOWS_OTHER_RUN,))]
    for line in [*notes, *plan.lines, *plan.missing, *plan.problems]:
        typer.echo(f"# {line}".encode(errors="backslashreplace").decode())  # names of files need not be UTF-8
    if plan.problems:
        raise typer.Exit(2)


def _run(config: RunConfig, launch: Launch, stop: StopRequest, allowed: list[str], *, from_scratch: bool) -> None:
    from datetime import timedelta

    from pretrain.parallel.launch import (
        choose_device,
        is_lost_contact,
        make_deterministic,
        start_process_group,
        stop_process_group,
    )
    from pretrain.parallel.mesh import start_mesh
    from pretrain.resilience.heartbeat import Heartbeat
    from pretrain.resilience.watchdog import lost_contact, start_watchdog
    from pretrain.run_folder import RunFolder
    from pretrain.runlog import start_logging

    train_rows, validation_rows = _open_rows(config)
    device = choose_device(config.run.device, launch)
    if config.train.deterministic:
        make_deterministic()
    _check_device(config, device, launch)
    folder = RunFolder(config.run.output_dir)
    start_process_group(launch, device, timedelta(seconds=config.watchdog.collective_seconds))
    stop.connected()
    heartbeat, watchdog = Heartbeat(), None
    try:
        token, config = _claim(folder, config, allowed)
        watchdog = start_watchdog(config.watchdog, folder, heartbeat, launch, token)
        if launch.rank == 0:
            stop.watch(folder.stop_file)
        start_logging(folder.logs, launch.rank)
        mesh = start_mesh(config.parallel, device)
        from pretrain.build_run import build_trainer

        trainer = build_trainer(
            config,
            folder,
            train_rows,
            validation_rows,
            device,
            mesh,
            stop,
            heartbeat,
            allowed=allowed,
            from_scratch=from_scratch,
        )
        _train(trainer, config.train.steps, folder, stop, allowed, from_scratch=from_scratch)
    except RuntimeError as error:
        if not is_lost_contact(error):
            raise
        if watchdog is not None:
            watchdog.wait_for_verdict()
        raise lost_contact(error, heartbeat, folder.checkpoints) from error
    finally:
        heartbeat.kind = "end"
        heartbeat.enter("end")
        folder.release()
        stop_process_group()
        if watchdog is not None:
            watchdog.stop()


def _train(
    trainer: Trainer, steps: int, folder: RunFolder, stop: StopRequest, allowed: list[str], *, from_scratch: bool
) -> None:
    """Continue the run from where it stands, to its end or until a signal stops it."""
    from pretrain.parallel import collectives
    from pretrain.resilience.stop_request import PreemptedError

    trainer.resume(from_scratch=from_scratch, allowed=allowed)
    if trainer.state.step >= steps:
        _mark_done(folder, trainer.state.step)
        log.info("done: all %d steps were there already; checkpoints are in %s", steps, folder.checkpoints)
        return
    if any(collectives.gather_objects(stop.is_set)):
        trainer.progress.close()
        log.info("stopped before step %d; there is nothing to save", trainer.state.step + 1)
        raise typer.Exit(PreemptedError.exit_code)
    stopped: PreemptedError | None = None
    try:
        if collectives.rank() == 0:
            folder.clear_done()
        trainer.run()
    except PreemptedError as request:
        stopped = request
    finally:
        trainer.progress.close()
    if stopped is not None:
        log.info("%s", stopped)
        # Launchers end all ranks as soon as one has ended with such a code, and rank 0 has the most to write.
        collectives.gather_objects(None)
        raise typer.Exit(PreemptedError.exit_code)
    _mark_done(folder, steps)
    log.info("done: %d steps; checkpoints are in %s", steps, folder.checkpoints)


def _mark_done(folder: RunFolder, step: int) -> None:
    """Rank 0 writes the mark that tells job scripts that a run needs no further start."""
    from pretrain.errors import TacoError
    from pretrain.parallel import collectives

    if collectives.rank() != 0:
        return
    try:
        folder.mark_done(step)
    except OSError as error:
        raise TacoError(
            f"run.output_dir {folder.path}: done, but that cannot be written: {error}; free space"
        ) from None


def _check_data_is_here(config: RunConfig) -> None:
    """Raises DataError: datasets are missing; names all of them."""
    from pretrain.errors import DataError
    from pretrain.planner.plan import missing_data

    if missing := missing_data(config):
        raise DataError("\n".join(missing))


def _open_rows(config: RunConfig) -> tuple[RowSource, RowSource | None]:
    """Training and validation rows, checked against each other and the configuration."""
    from pretrain.data.batches import open_source
    from pretrain.errors import DataError

    data = config.data
    _check_data_is_here(config)
    train_rows = open_source(config, "train")
    _check_tokenizer(config, train_rows)
    if not (data.splits.validation if data.splits else data.validation):
        return train_rows, None
    validation_rows = open_source(config, "validation")
    ours, theirs = train_rows.tokenizer, validation_rows.tokenizer
    if ours.sha256 != theirs.sha256:
        raise DataError(
            f"data.validation was made with tokenizer {theirs.name} (sha256 {theirs.sha256[:12]}, {theirs.vocab_size} "
            f"tokens), data.train with {ours.name} (sha256 {ours.sha256[:12]}, {ours.vocab_size} tokens); "
            "preprocess both with the same one"
        )
    return train_rows, validation_rows


def _check_tokenizer(config: RunConfig, rows: RowSource) -> None:
    """The tokenizer beside the data goes into every checkpoint and export, so it must be the one that made the ids."""
    from pretrain.data.tokenizer.load import load_dataset_tokenizer

    load_dataset_tokenizer(config.data.train[0], rows.tokenizer)


def _check_device(config: RunConfig, device: torch.device, launch: Launch) -> None:
    from pretrain.config.zero_checks import check_zero_device
    from pretrain.errors import ConfigError

    problems = check_zero_device(config, device.type, num_nodes=launch.world_size // launch.local_world_size)
    if problems:
        raise ConfigError("; ".join(problems))


def _claim(folder: RunFolder, config: RunConfig, allowed: list[str]) -> tuple[str, RunConfig]:
    """Rank 0 claims the folder; every rank ends with its error if it cannot.

    Returns:
        A name for this start, and the configuration with the `mlm.average` of the folder's run if none was given.
    """
    from pretrain.config.sections import MlmSection
    from pretrain.errors import ConfigError, TacoError
    from pretrain.parallel import collectives

    problem: tuple[int, str] | None = None
    changes: list[str] = []
    given = config.mlm.average
    if collectives.rank() == 0:
        try:
            folder.claim()
            changes = folder.check_config(config, allowed)
            config = folder.keep_average(config)
            folder.clear_heartbeats()
        except TacoError as error:
            problem = (error.exit_code, str(error))
    problem, token, mlm = collectives.gather_objects((problem, uuid.uuid4().hex, config.mlm.model_dump()))[0]
    if problem is not None:
        code, message = problem
        raise (ConfigError if code == ConfigError.exit_code else TacoError)(message)
    for change in changes:
        log.info("changed since this run was started: %s", change)
    kept = MlmSection.model_validate(mlm)
    if kept.average != given:
        log.info("mlm.average=%s is kept: this run was started so; %s is the default of a new run", kept.average, given)
    return token, config.model_copy(update={"mlm": kept})


if __name__ == "__main__":
    run_program(app, name="python -m pretrain.train")
