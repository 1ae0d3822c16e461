"""Builds the parts of a run, on every rank alike, and hands them to the trainer.

Imported once the process group exists: DeepSpeed must know its device by then.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pretrain.checkpoint.manifest import CheckpointManifest, Layout
from pretrain.checkpoint.run_record import RunRecord, note_saved, recorded_step
from pretrain.checkpoint.start_weights import load_start
from pretrain.checkpoint.store import CheckpointStore, NoGoodCheckpointError
from pretrain.config.deepspeed import zero_stage
from pretrain.config.load import dump_config
from pretrain.config.sections import RunConfig
from pretrain.data.batches import BatchSource, RowSource, open_batches
from pretrain.data.dataset.indexed_dataset import IndexedDataset
from pretrain.data.dataset.spot_check import find_damage_on_nodes
from pretrain.data.pinned import memory_for
from pretrain.data.tokenizer.folder import read_verified
from pretrain.engine.compile_news import CompileNews
from pretrain.engine.engine import Engine
from pretrain.engine.plain import PlainEngine
from pretrain.errors import DataError, TacoError, counted
from pretrain.meters.speed import SpeedMeter
from pretrain.metrics import MetricsLog
from pretrain.model.build import build_model
from pretrain.model.pretraining import BertForPretraining
from pretrain.parallel import collectives
from pretrain.parallel.mesh import Mesh
from pretrain.planner.memory import count_parameters
from pretrain.planner.plan import describe_epochs
from pretrain.progress import Progress
from pretrain.resilience.bad_steps import BadSteps, BadStepWatcher
from pretrain.resilience.heartbeat import Heartbeat
from pretrain.resilience.spikes import Spikes
from pretrain.resilience.stop_request import StopRequest
from pretrain.resilience.stragglers import Stragglers
from pretrain.run_folder import RunFolder, describe_environment
from pretrain.runlog import get_logger
from pretrain.saving import Saver
from pretrain.trainer import Trainer

if TYPE_CHECKING:
    from pretrain.model.pipeline import BertPipeline

log = get_logger(__name__)

# Validation rows and masks are the same in every run, whatever its seed, so that MLM losses and accuracies can be
# compared between runs; the contrastive pairs keep the run's own seed.
VALIDATION_SEED = 0


def build_trainer(
    config: RunConfig,
    folder: RunFolder,
    train_rows: RowSource,
    validation_rows: RowSource | None,
    device: torch.device,
    mesh: Mesh,
    stop: StopRequest,
    heartbeat: Heartbeat,
    *,
    allowed: Sequence[str] = (),
    from_scratch: bool = False,
) -> Trainer:
    """The trainer of this rank, with all that it needs; collective.

    Args:
        allowed: keys that may differ from the checkpoint in `run.init_from`, see `load_start`.
        from_scratch: begin at step 0 if every checkpoint of the run is damaged.

    Raises:
        TacoError: the run's folder cannot be written, or parts do not fit together.
    """
    extras = _look_at_data(config, train_rows, validation_rows)
    vocab_size = train_rows.tokenizer.vocab_size
    model = build_model(config, vocab_size, mesh, device)
    run_id, saved_step = _identify(folder)
    store = _build_store(config, folder, run_id)
    if config.run.init_from is not None:
        if _begins(store, saved_step, from_scratch=from_scratch):
            load_start(model, config, train_rows.tokenizer, mesh, device, allowed)
        else:
            log.info(
                "run.init_from %s is not read: the run continues from its own checkpoints; to start from other "
                "weights, choose another run.output_dir",
                config.run.init_from,
            )
    log.info("model: %s parameters, vocabulary %s", f"{count_parameters(config, vocab_size):,}", f"{vocab_size:,}")
    for name, rows in (("train", train_rows), ("validation", validation_rows)):
        if rows is not None:
            log.info("%s: %s", name, _describe_rows(rows))
    if (positions := config.model.max_position_embeddings) > train_rows.seq_length:
        log.info(
            "positions %d to %d of the model are in no row (data.seq_length %d), so they are not trained",
            train_rows.seq_length,
            positions - 1,
            train_rows.seq_length,
        )
    train_source = _batches(config, train_rows, config.run.seed, device.type, config.data.weights)
    for line in _describe_epochs(config, train_source):
        log.info("%s", line)
    engine = _build_engine(config, model, device, mesh, heartbeat)
    metrics = MetricsLog(folder.path, is_active=collectives.rank() == 0, use_tensorboard=config.run.tensorboard)
    saver = Saver(engine, store, extras, metrics, config.checkpoint)
    spikes = Spikes(config.spike, folder.path)
    meter = SpeedMeter(config, vocab_size, mesh, device, engine.step_clock)
    progress = Progress(config, metrics, meter, lambda: saver.unsaved_seconds)
    return Trainer(
        config=config,
        engine=engine,
        train_source=train_source,
        validation_source=(
            _batches(config, validation_rows, VALIDATION_SEED, device.type) if validation_rows else None
        ),
        store=store,
        description=_describe_checkpoint(config, train_rows, run_id),
        saved_step=saved_step,
        on_resume=partial(_describe_run, config, folder, engine.ds_config, device, extras),
        saver=saver,
        spikes=spikes,
        progress=progress,
        # In this order: a step that is rolled back is neither reported nor saved.
        watchers=(
            _watch_bad_steps(config, folder, saver, engine),
            *_watch_stragglers(config, mesh, metrics, heartbeat),
            CompileNews(model),
            spikes,
            progress,
            saver,
            stop,
        ),
    )


def _watch_bad_steps(config: RunConfig, folder: RunFolder, saver: Saver, engine: Engine) -> BadStepWatcher:
    def settle_saves() -> int:
        saver.wait()
        return saver.committed_step

    is_scaled = config.precision == "fp16"
    counter = BadSteps(folder.path, config.train.max_bad_steps, is_scaled, engine.other_counts)
    return BadStepWatcher(counter, config.train.micro_batch_size, settle_saves)


def _build_store(config: RunConfig, folder: RunFolder, run_id: str) -> CheckpointStore:
    """The run's checkpoints, tidied up; ranks that save beside training need a separate group for it."""
    section = config.checkpoint
    group = collectives.start_side_group() if section.asynchronous else None
    store = CheckpointStore(
        folder.checkpoints,
        keep=section.keep,
        keep_every=section.keep_every,
        group=group,
        run_id=run_id,
        on_commit=partial(note_saved, folder.path, run_id),
    )
    store.prepare()
    return store


def _begins(store: CheckpointStore, saved_step: int, *, from_scratch: bool) -> bool:
    """Whether the run has no checkpoint to continue from, and so needs weights to start from; collective."""
    has_any = saved_step > 0 or any(store.root.glob("step-*"))
    if not collectives.gather_objects(has_any)[0]:
        return True
    if not from_scratch:
        return False  # continues, or refuses to start
    try:
        return store.newest_good() is None
    except NoGoodCheckpointError:
        return True


def _watch_stragglers(
    config: RunConfig, mesh: Mesh, metrics: MetricsLog, heartbeat: Heartbeat
) -> tuple[Stragglers, ...]:
    """The watcher that names slow ranks, if there are several and it is enabled; collective."""
    share = config.watchdog.slow_share
    if share is None or not config.watchdog.enabled or collectives.world_size() == 1:
        return ()
    hosts = collectives.gather_objects(socket.gethostname())
    return (Stragglers(share, hosts, mesh.pp_size, metrics, heartbeat, config.train.log_every),)


def _describe_rows(rows: RowSource) -> str:
    return (
        f"{counted(rows.num_rows, 'row')} of {rows.seq_length} tokens out of {counted(rows.num_tokens, 'token')} in "
        f"{counted(sum(dataset.num_documents for dataset in rows.datasets), 'document')}"
        f" ({rows.num_left_out:,} left out after the last complete row, {rows.fill_rate:.2%} of all places filled)"
    )


def _build_engine(
    config: RunConfig,
    model: BertForPretraining | BertPipeline,
    device: torch.device,
    mesh: Mesh,
    heartbeat: Heartbeat,
) -> Engine:
    if isinstance(model, BertForPretraining):
        return PlainEngine(config, model, device, mesh, heartbeat)
    from pretrain.engine.pipelined import PipelinedEngine

    return PipelinedEngine(config, model, device, mesh, heartbeat)


def _describe_epochs(config: RunConfig, source: BatchSource) -> list[str]:
    """How often the run goes through each dataset."""
    rows, blend = source.rows, source.blend
    counts = [(dataset.prefix, index.num_rows) for dataset, index in zip(rows.datasets, rows.indexes, strict=True)]
    return describe_epochs(config, counts, None if blend is None else [w / blend.PERIOD for w in blend.weights])


def _batches(
    config: RunConfig, rows: RowSource, seed: int, device_type: str, weights: tuple[float, ...] | None = None
) -> BatchSource:
    return open_batches(config, rows, seed=seed, weights=weights, allocate=memory_for(device_type))


def _identify(folder: RunFolder) -> tuple[str, int]:
    """The run's own name and the step that it says to have saved, from rank 0; collective.

    Raises:
        TacoError: on all ranks, if the record of the run cannot be read or written.
    """
    found: tuple[str, int] = ("", 0)
    problem = None
    if collectives.rank() == 0:
        try:
            found = (RunRecord.of(folder.path).run_id, recorded_step(folder.path))
        except TacoError as error:
            problem = str(error)
        except OSError as error:
            problem = _cannot_be_written(folder, str(error))
    found, problem = collectives.gather_objects((found, problem))[0]
    if problem is not None:
        raise TacoError(problem)
    return found


def _look_at_data(config: RunConfig, train_rows: RowSource, validation_rows: RowSource | None) -> dict[str, bytes]:
    """Check the content of the data on every node; returns what goes into every checkpoint beside the state.

    That is, on rank 0, the configuration and the files of the tokenizer that made the data. Collective.

    Raises:
        DataError: on all ranks, if a dataset or its tokenizer is not what was written.
    """
    datasets = [*train_rows.datasets, *(validation_rows.datasets if validation_rows else ())]
    problem = find_damage_on_nodes(datasets)
    extras = {"config.yaml": dump_config(config).encode()}
    if problem is None and collectives.rank() == 0:
        manifest = train_rows.datasets[0].manifest
        try:
            files = read_verified(config.data.tokenizer_folder, manifest.tokenizer_files if manifest else ())
            extras |= {f"tokenizer/{name}": files[name] for name in sorted(files)}
        except DataError as error:
            problem = str(error)
    problem = collectives.gather_objects(problem)[0]
    if problem is not None:
        raise DataError(problem)
    return extras


def _describe_run(
    config: RunConfig, folder: RunFolder, ds_config: dict[str, Any], device: torch.device, extras: dict[str, bytes]
) -> None:
    """Rank 0 saves the description of the run; every rank ends with its error if the disk refuses."""
    problem = None
    if collectives.rank() == 0:
        try:
            folder.write_description(config, ds_config, describe_environment(collectives.world_size(), str(device)))
            names = [name for name in extras if name.startswith("tokenizer/")]
            if folder.keep_tokenizer({name.removeprefix("tokenizer/"): extras[name] for name in names}):
                log.warning("%s: was not the tokenizer of data.train, and is replaced by it", folder.tokenizer)
        except TacoError as error:
            problem = str(error)
        except OSError as error:
            problem = _cannot_be_written(folder, str(error))
    problem = collectives.gather_objects(problem)[0]
    if problem is not None:
        raise TacoError(problem)


def _cannot_be_written(folder: RunFolder, reason: str) -> str:
    return f"run.output_dir {folder.path}: cannot be written: {reason}; free space or choose another"


def _describe_checkpoint(config: RunConfig, rows: RowSource, run_id: str) -> CheckpointManifest:
    """The manifest of every checkpoint of this run; step and files are filled in when it is saved."""
    size = config.parallel
    layout = Layout(
        data=collectives.world_size() // (size.tensor * size.pipeline),
        tensor=size.tensor,
        pipeline=size.pipeline,
        zero_stage=zero_stage(config),
        precision=config.precision,
    )
    return CheckpointManifest(
        kind="training",
        step=0,
        consumed_samples=0,
        layout=layout,
        model=config.model.model_dump(mode="json"),
        vocab_size=rows.tokenizer.vocab_size,
        tokenizer_sha256=rows.tokenizer.sha256,
        config_sha256=hashlib.sha256(dump_config(config).encode()).hexdigest(),
        pad_token_id=rows.tokenizer.special.pad,
        data=tuple(_describe_dataset(dataset) for dataset in rows.datasets),
        run_id=run_id,
    )


def _describe_dataset(dataset: IndexedDataset) -> dict[str, Any]:
    """The data that a checkpoint has seen; the digest covers the hashes of all chunks of the .bin file."""
    manifest = dataset.manifest
    assert manifest is not None  # RowSource refuses datasets without one
    digest = hashlib.sha256("".join(manifest.bin_xxh64).encode()).hexdigest()
    return {
        "prefix": str(dataset.prefix),
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "digest": digest,
    }
