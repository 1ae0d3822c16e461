"""The training loop: the page to read first.

Everything random in a step is a function of (seed, step): which rows, which masks, which TACO pairs, which units drop.
So the state of a run is its weights, its optimizer and one number, and a resumed run repeats the uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.checkpoint.manifest import CheckpointManifest
from pretrain.checkpoint.store import CheckpointStore, NoGoodCheckpointError
from pretrain.config.sections import RunConfig
from pretrain.data.batches import Batch, BatchSource, prefetch
from pretrain.engine.engine import Engine, EvalResult, StepResult
from pretrain.errors import CheckpointError, ConfigError
from pretrain.metrics import MetricsLog
from pretrain.optim import learning_rate
from pretrain.parallel import collectives
from pretrain.progress import Progress
from pretrain.resilience.bad_steps import BadSteps
from pretrain.resilience.replicas import ReplicaDriftError, describe_drift
from pretrain.resilience.spikes import Spikes
from pretrain.resilience.stop_request import PreemptedError, StopRequest
from pretrain.resilience.stragglers import Stragglers
from pretrain.runlog import get_logger, progress_bar
from pretrain.saving import Saver, best_save_interval

log = get_logger(__name__)


@dataclass(frozen=True)
class TrainState:
    """Where a run stands: optimizer steps done and rows of the training stream consumed."""

    step: int = 0
    consumed_samples: int = 0


class Trainer:
    """Trains to `train.steps`, validating, saving and reporting on the way."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        train_source: BatchSource,
        validation_source: BatchSource | None,
        store: CheckpointStore,
        description: CheckpointManifest,
        checkpoint_extras: tuple[Path, ...],
        metrics: MetricsLog,
        stop: StopRequest,
        stragglers: Stragglers | None = None,
    ) -> None:
        self.config = config
        self.engine = engine
        self.train_source = train_source
        self.validation_source = validation_source
        self.store = store
        self.description = description
        self.metrics = metrics
        self.stop = stop
        self.bad_steps = BadSteps(config.run.output_dir, config.train.max_bad_steps, config.precision == "fp16")
        self.heartbeat = engine.heartbeat
        self.stragglers = stragglers
        self.spikes = Spikes(config.spike, config.run.output_dir)
        self.state = TrainState()
        self.saver = Saver(engine, store, checkpoint_extras, metrics, is_asynchronous=config.checkpoint.asynchronous)
        self._compared_at = 0
        self._progress = Progress(config, metrics)

    def resume(self, *, from_scratch: bool = False) -> None:
        """Continue from the newest good checkpoint, if there is one.

        Raises:
            NoGoodCheckpointError: there are only bad ones, and nobody has said to begin `from_scratch` then.
        """
        try:
            folder = self.store.newest_good()
        except NoGoodCheckpointError as error:
            if not from_scratch:
                raise
            log.warning("beginning at step 0, as asked (--from-scratch): %s", error)
            return
        if folder is None:
            return
        manifest = CheckpointManifest.load(folder)
        self._check_fits(folder, manifest)
        self._take_up(folder, manifest)
        self.spikes.restore(manifest.spikes)
        log.info("continuing from %s", folder)

    def _take_up(self, folder: Path, manifest: CheckpointManifest) -> None:
        self.engine.load_state(folder)
        self.state = TrainState(manifest.step, manifest.consumed_samples)
        self.saver.start_from(manifest.step)

    def _check_fits(self, folder: Path, manifest: CheckpointManifest) -> None:
        """Refuse what would continue something else than what was saved."""
        own = self.description
        if manifest.tokenizer_sha256 != own.tokenizer_sha256 or manifest.vocab_size != own.vocab_size:
            raise CheckpointError(
                f"{folder}: was trained with tokenizer {manifest.tokenizer_sha256[:12]} ({manifest.vocab_size} "
                f"tokens), data.train was made with {own.tokenizer_sha256[:12]} ({own.vocab_size} tokens); "
                "use the run's own data"
            )
        if changed := _changed_data(manifest, own):
            raise CheckpointError(
                f"{folder}: {changed} holds other data than this run was trained on; restore it, or give the new data "
                "a prefix of its own, name that in data.train, and add --allow-change data.train"
            )
        if manifest.layout != own.layout:
            log.info("saved with %s, continued with %s", manifest.layout, own.layout)
        if manifest.consumed_samples % self.config.train.micro_batch_size:
            raise ConfigError(
                f"{folder}: has consumed {manifest.consumed_samples} rows, no multiple of train.micro_batch_size "
                f"({self.config.train.micro_batch_size}); choose one that divides it"
            )

    def run(self) -> TrainState:
        """Train until `train.steps`.

        Raises:
            PreemptedError: a signal asked for the end; everything is saved.
            NonFiniteLossError: too many losses in a row were no numbers; nothing of them is saved.
            ReplicaDriftError: ranks hold copies of a parameter that differ; nothing of it is saved.
            CheckpointError: a save failed, or was refused because of values that are no numbers.
            TooManySpikesError: the loss spikes, and the run was rolled back too often; nothing of it is saved.
        """
        try:
            self._train()
        finally:
            with self.heartbeat.during("checkpoint"):
                self.saver.settle()
        return self.state

    def _train(self) -> None:
        total = self.config.train.steps
        micro_batches = self._open_stream()
        accum = self.config.grad_accum_steps(self.engine.mesh.dp_size)
        self._progress.start_from(self.state.step)
        with progress_bar("training", self.state.step, total, is_shown=collectives.rank() == 0) as bar:
            while self.state.step < total:
                self.heartbeat.begin_step(self.state.step + 1)
                work_seconds, step_seconds = self._take_work()
                result = self.engine.train_step(
                    [next(micro_batches) for _ in range(accum)],
                    learning_rate=learning_rate(self.state.step, self.config.optim, total),
                    requests=(self.stop.is_set, self._is_save_due_by_time(), self.saver.has_failed),
                    work_seconds=work_seconds,
                    may_not_update=self.spikes.is_spike if self.config.spike.policy == "skip" else None,
                )
                self.heartbeat.end_step()
                self._advance(result)
                if self.stragglers is not None and result.work_seconds and collectives.rank() == 0:
                    self.stragglers.note(self.state.step, result.work_seconds, step_seconds)
                if self._is_rolled_back(result):
                    micro_batches.close()
                    micro_batches = self._open_stream()
                    continue
                bar.update(self.state.step)
                self._progress.report_step(
                    self.state.step,
                    result,
                    consumed_samples=self.state.consumed_samples,
                    unsaved_seconds=self.saver.unsaved_seconds,
                )
                self._validate_and_save(result)

    def _open_stream(self) -> Generator[Batch, None, None]:
        return prefetch(self.train_source, self._micro_batch_indices(), self.config.data.prefetch)

    def _take_work(self) -> tuple[float | None, float]:
        """What this rank tells the others of its work in the last steps, on the steps that are logged."""
        if self.stragglers is None or (self.state.step + 1) % self.config.train.log_every:
            return None, 0.0
        return self.heartbeat.take_work()

    def _micro_batch_indices(self) -> Iterator[int]:
        """Global numbers of this rank's micro-batches from the current state on.

        Micro-step a of data rank r takes number a * dp_size + r of the step, so any layout sees the same stream.
        """
        train = self.config.train
        dp_size, rank = self.engine.mesh.dp_size, self.engine.mesh.dp_rank
        first = self.state.consumed_samples // train.micro_batch_size
        for _ in range(self.state.step, train.steps):
            yield from range(first + rank, first + train.global_batch_size // train.micro_batch_size, dp_size)
            first += train.global_batch_size // train.micro_batch_size

    def _advance(self, result: StepResult) -> None:
        step, loss, norm = self.state.step + 1, result.loss, result.grad_norm
        if self.bad_steps.note(step, loss, norm, is_skipped=result.is_skipped):
            self._wait_for_save()  # so that all ranks know the same last checkpoint
            suspects = self._suspects(result)
            if collectives.rank() == 0:
                self.bad_steps.write_down(step, loss, norm, suspects)
            self.bad_steps.check_limit(step, self.saver.committed_step)
        self.state = TrainState(step, self.state.consumed_samples + self.config.train.global_batch_size)
        self._progress.count(result)

    def _is_rolled_back(self, result: StepResult) -> bool:
        """Compare the loss with those before, act as the policy says, and tell whether that changed the state."""
        step, loss, bound = self.state.step, result.loss, self.spikes.bound
        is_spike, policy = self.spikes.is_spike(loss), self.config.spike.policy
        self.spikes.add(loss)
        if not is_spike:
            return False
        rows = [self.state.consumed_samples - self.config.train.global_batch_size, self.state.consumed_samples]
        record: dict[str, Any] = {"step": step, "loss": loss, "bound": bound, "rows": rows, "action": policy}
        if policy == "rollback":
            record |= self._roll_back(loss)
        log.warning("step %d: loss %.4f is a spike (bound %.4f): %s", step, loss, bound, _describe_action(record))
        if collectives.rank() == 0:
            self.spikes.write_down(record)
        return "continued_from" in record

    def _roll_back(self, loss: float) -> dict[str, Any]:
        """Return to the last checkpoint and leave out the rows since; what spikes.jsonl says about it.

        A checkpoint of the regular ones, which a run that was stopped and continued in between has too.
        """
        self.spikes.check_limit(self.state.step, loss)
        consumed = self.state.consumed_samples
        self._wait_for_save()  # it may be the one to return to, and votes through the store's group
        with self.heartbeat.during("checkpoint"):
            folder = self.store.newest_good(self.config.checkpoint.every_steps)
            if folder is None:
                return {"action": "warn", "reason": "there is no checkpoint to return to"}
            manifest = CheckpointManifest.load(folder)
            self._take_up(folder, manifest)
        left_out = [end for _, end in self.spikes.history.skipped_rows]
        skipped = (max([manifest.consumed_samples, *left_out]), consumed)
        self.spikes.roll_back(manifest.spikes, skipped)
        self.state = TrainState(manifest.step, consumed)
        self._compared_at = 0
        self._progress.restart_clock()
        return {"continued_from": manifest.step, "skipped_rows": list(skipped)}

    def _suspects(self, result: StepResult) -> list[tuple[int, int]]:
        """First and last + 1 of the rows whose loss was not finite, or of all rows of the step where none was."""
        size = self.config.train.micro_batch_size
        found = sorted({number for share in collectives.gather_objects(result.bad_micro_batches) for number in share})
        if found:
            return [(number * size, (number + 1) * size) for number in found]
        first = self.state.consumed_samples
        return [(first, first + self.config.train.global_batch_size)]

    # -- validating and saving -----------------------------------------------------------------------------------------

    def _validate_and_save(self, result: StepResult) -> None:
        step, train, every = self.state.step, self.config.train, self.config.checkpoint.every_steps
        stop_requested, save_requested, save_failed = result.requests
        is_last = step == train.steps
        if save_failed:
            self._wait_for_save()  # raises on every rank
        self.saver.poll()
        if train.replica_check_every is not None and step % train.replica_check_every == 0:
            self.compare_replicas()
        if self.validation_source is not None and (step % train.eval_every == 0 or is_last):
            self.validate()
        if is_last or stop_requested or save_requested or (every is not None and step % every == 0):
            self.save()
        if is_last or stop_requested:
            self._wait_for_save()
        if stop_requested and not is_last:
            raise PreemptedError(
                f"stopped at step {step} of {train.steps} as asked; everything is saved, "
                "the same command continues from here"
            )

    def validate(self) -> EvalResult:
        """Both losses and the masked-token accuracy on a fixed sample of the validation rows."""
        with self.heartbeat.during("evaluation"):
            result = self.engine.evaluate(self._validation_batches())
        self._progress.report_validation(self.state.step, result)
        self._progress.restart_clock()
        return result

    def _validation_batches(self) -> Iterator[Batch]:
        """This rank's share of the same micro-batches at every validation and for any number of ranks."""
        source = self.validation_source
        assert source is not None
        wanted = min(self.config.train.eval_batches, math.ceil(source.rows.num_rows / source.micro_batch_size))
        dp_size, rank = self.engine.mesh.dp_size, self.engine.mesh.dp_rank
        for first in range(0, wanted, dp_size):
            index = first + rank
            # Under ZeRO-3 every forward is a collective: ranks without a share take part with an empty batch.
            yield source.micro_batch(index) if index < wanted else _without_targets(source.micro_batch(0))

    def compare_replicas(self) -> None:
        """End the run if ranks hold different copies of a parameter, unless they have just been compared."""
        if self._compared_at == self.state.step or self.config.train.replica_check_every is None:
            return
        drifts = self.engine.find_drift()
        if drifts:
            with self.heartbeat.during("checkpoint"):
                self.saver.settle()
            raise ReplicaDriftError(describe_drift(drifts, self.state.step, self.saver.committed_step))
        self._compared_at = self.state.step

    def _is_save_due_by_time(self) -> bool:
        section = self.config.checkpoint
        limits = [] if section.every_minutes is None else [60 * section.every_minutes]
        if section.hours_between_failures is not None:
            limits.append(best_save_interval(self.saver.stall_seconds, section.hours_between_failures))
        # Never before the last one is written: a save that begins then would only stop training.
        return not self.saver.is_writing and any(self.saver.seconds_since_capture >= limit for limit in limits)

    def _wait_for_save(self) -> None:
        """Stand still until the save on its way, if there is one, is committed."""
        with self.heartbeat.during("checkpoint"):
            self.saver.wait()

    def save(self) -> None:
        """Save the current state, unless it was just captured; it may still be on its way to the disk afterwards."""
        if self.saver.captured_step == self.state.step:
            return
        self.compare_replicas()
        manifest = replace(
            self.description,
            step=self.state.step,
            consumed_samples=self.state.consumed_samples,
            spikes=asdict(self.spikes.history),
        )
        with self.heartbeat.during("checkpoint"):
            self.saver.save(manifest)
        self._progress.restart_clock()


def _describe_action(record: Mapping[str, Any]) -> str:
    if "continued_from" in record:
        first, stop = record["skipped_rows"]
        return f"back to the checkpoint of step {record['continued_from']}, leaving out rows {first} to {stop - 1}"
    if record["action"] == "skip":
        return "no weight has changed"
    return str(record.get("reason", "the run goes on with it (spike.policy)"))


def _without_targets(batch: Batch) -> Batch:
    """The same rows with nothing to predict and no token for the contrastive loss."""
    nothing = np.full_like(batch.masked_label_M, -100)
    return replace(batch, valid_BL=np.zeros_like(batch.valid_BL), masked_label_M=nothing)


def _changed_data(old: CheckpointManifest, new: CheckpointManifest) -> str | None:
    """The first prefix that both name and whose tokens differ."""
    before = {item["prefix"]: item["digest"] for item in old.data}
    changed = (item["prefix"] for item in new.data if before.get(item["prefix"], item["digest"]) != item["digest"])
    return next(changed, None)
