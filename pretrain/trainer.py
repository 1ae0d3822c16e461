"""The training loop: the page to read first.

Everything random in a step is a function of (seed, step): which rows, which masks, which TACO pairs, which units drop.
So the state of a run is its weights, its optimizer and one number, and a resumed run repeats the uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pretrain.checkpoint.identity import check_configuration, check_identity
from pretrain.checkpoint.manifest import CheckpointManifest, step_named
from pretrain.checkpoint.models import compare_models, explain_refused
from pretrain.checkpoint.store import CheckpointStore, NoGoodCheckpointError
from pretrain.checkpoint.tokenizers import compare_tokenizers
from pretrain.config.sections import RunConfig
from pretrain.data.batches import Batch, BatchSource, prefetch
from pretrain.engine.engine import Engine, EvalResult
from pretrain.errors import CheckpointError, ConfigError
from pretrain.optim import learning_rate
from pretrain.parallel.collectives import ask_rank_0
from pretrain.progress import Progress
from pretrain.resilience.replicas import ReplicaDriftError, describe_drift
from pretrain.resilience.spikes import Spikes
from pretrain.resilience.stop_request import PreemptedError
from pretrain.runlog import get_logger
from pretrain.saving import Saver
from pretrain.step import Action, DoneStep, StepPlan, Watcher

log = get_logger(__name__)


@dataclass(frozen=True)
class TrainState:
    """The progress of a run: optimizer steps done and rows of the training stream consumed."""

    step: int = 0
    consumed_samples: int = 0


class Trainer:
    """Trains to `train.steps`, validating, saving and reporting on the way.

    Args:
        description: the manifest that all checkpoints of the run share.
        saved_step: of the newest checkpoint that the run says to have saved; 0 if it never did.
        on_resume: called on every rank once the run is known to fit its folder and its checkpoint.
        watchers: in the order in which they see each step; `spikes`, `progress` and `saver` are among them.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        train_source: BatchSource,
        validation_source: BatchSource | None,
        store: CheckpointStore,
        description: CheckpointManifest,
        saved_step: int,
        on_resume: Callable[[], None],
        saver: Saver,
        spikes: Spikes,
        progress: Progress,
        watchers: Sequence[Watcher],
    ) -> None:
        self.config = config
        self.engine = engine
        self.train_source = train_source
        self.validation_source = validation_source
        self.store = store
        self.description = description
        self.saved_step = saved_step
        self.on_resume = on_resume
        self.saver = saver
        self.spikes = spikes
        self.progress = progress
        self.watchers = watchers
        self.heartbeat = engine.heartbeat
        self.state = TrainState()
        self._compared_at = 0

    def resume(self, *, from_scratch: bool = False, allowed: Collection[str] = ()) -> None:
        """Continue from the newest good checkpoint, if there is one.

        Args:
            allowed: keys that may have changed; `checkpoint.run` admits a checkpoint of another run.

        Raises:
            NoGoodCheckpointError: there are only bad ones, or none although the run has saved, and `from_scratch` is
                False.
            CheckpointError: the checkpoint is of another run, tokenizer or data, or it cannot be read.
            ConfigError: it is of another model or configuration.
        """
        folder = None
        try:
            folder = self._find_newest()
        except NoGoodCheckpointError as error:
            if not from_scratch:
                raise
            log.warning("beginning at step 0, as asked (--from-scratch): %s", error)
        if folder is not None:
            manifest = CheckpointManifest.load(folder)
            check_identity(folder, manifest, self.description, self.config, allowed)
            self._check_fits(folder, manifest, allowed)
            check_configuration(folder, manifest, self.description, self.config, allowed)
            self._load_checkpoint(folder, manifest)
            self.spikes.restore(manifest.spikes)
            log.info("continuing from %s", folder)
        self.on_resume()

    def _find_newest(self) -> Path | None:
        """The newest good checkpoint; None if there is none and the run never had one."""
        step = self.saved_step
        is_there = step == 0 or self.store.wait_for(step)
        folder = self.store.newest_good()
        if folder is None and step:
            raise NoGoodCheckpointError(
                f"{self.store.root}: holds no checkpoint, but the run has saved step {step}; mount or restore the "
                "folder, or train from step 0 with --from-scratch"
            )
        if folder is not None and not is_there and step_named(folder) < step:
            log.warning("the run has saved step %d, which is not in %s; continuing without it", step, self.store.root)
        return folder

    def _load_checkpoint(self, folder: Path, manifest: CheckpointManifest) -> None:
        self.engine.load_state(folder)
        self.state = TrainState(manifest.step, manifest.consumed_samples)
        self.saver.start_from(manifest.step)

    def _check_fits(self, folder: Path, manifest: CheckpointManifest, allowed: Collection[str]) -> None:
        """Refuse a checkpoint that does not belong to this run."""
        expected = self.description
        if refused := explain_refused(compare_models(manifest.model, self.config.model), allowed):
            raise ConfigError(f"{folder}: belongs to another model: {refused}")
        tokenizer, prefix = self.train_source.rows.tokenizer, self.config.data.train[0]
        other = ask_rank_0(lambda: compare_tokenizers(folder, manifest, tokenizer, prefix))
        if other is not None:
            raise CheckpointError(f"{folder}: {other.text}; use the run's own data")
        if changed := _changed_data(manifest, expected):
            raise CheckpointError(
                f"{folder}: {changed} holds other data than this run was trained on; restore it, or give the new data "
                "a prefix of its own, name that in data.train, and add --allow-change data.train"
            )
        if manifest.layout != expected.layout:
            log.info("saved with %s, continued with %s", manifest.layout, expected.layout)
        if manifest.consumed_samples % self.config.train.micro_batch_size:
            raise ConfigError(
                f"{folder}: has consumed {manifest.consumed_samples} rows, not a multiple of train.micro_batch_size "
                f"({self.config.train.micro_batch_size}); choose one that divides it"
            )

    def run(self) -> TrainState:
        """Train until `train.steps`.

        Raises:
            PreemptedError: a signal or file asked the run to stop; everything is saved.
            NonFiniteLossError: too many losses in a row were non-finite; none of them is saved.
            ReplicaDriftError: ranks hold copies of a parameter that differ; nothing is saved.
            CheckpointError: a save failed, or was refused because of non-finite values.
            TooManySpikesError: the loss spikes, and the run was rolled back too often; nothing is saved.
        """
        try:
            with self.progress.shown_from(self.state.step):
                self._train()
        finally:
            self.saver.settle()
        return self.state

    def _train(self) -> None:
        total = self.config.train.steps
        micro_batches = self._open_stream()
        while self.state.step < total:
            done = self._take_step(micro_batches)
            action = self._ask_watchers(done)
            if action is Action.ROLL_BACK:
                micro_batches.close()
                micro_batches = self._open_stream()
                continue
            self._check_and_save(action)

    def _take_step(self, micro_batches: Iterator[Batch]) -> DoneStep:
        """One optimizer step: the same rows, masks, pairs and dropout for a step number in every layout."""
        plan = StepPlan(self.state.step + 1)
        self.heartbeat.begin_step(plan.number)
        for watcher in self.watchers:
            watcher.before_step(plan)
        num_micro_batches = self.config.grad_accum_steps(self.engine.mesh.dp_size)
        own_batches = [next(micro_batches) for _ in range(num_micro_batches)]
        result = self.engine.train_step(
            own_batches,
            learning_rate=learning_rate(self.state.step, self.config.optim, self.config.train.steps),
            requests=plan.requests,
            work_seconds=plan.work_seconds,
            may_not_update=plan.may_not_update,
        )
        self.heartbeat.end_step()
        self.progress.count(own_batches)
        first_row = self.state.consumed_samples
        return DoneStep(plan.number, first_row, first_row + self.config.train.global_batch_size, result)

    def _ask_watchers(self, done: DoneStep) -> Action:
        """Show a step to the watchers; returns what the trainer must do. A rollback has happened by then."""
        actions = [Action.CONTINUE]
        for watcher in self.watchers:
            action = watcher.after_step(done)
            if action is not Action.ROLL_BACK:
                actions.append(action)
            elif self._roll_back(done):
                return Action.ROLL_BACK
        self.state = TrainState(done.number, done.end_row)
        return max(actions)

    def _open_stream(self) -> Generator[Batch, None, None]:
        return prefetch(self.train_source, self._micro_batch_indices(), self.config.data.prefetch)

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

    def _roll_back(self, done: DoneStep) -> bool:
        """Return to the last checkpoint and leave out the rows since; False if there is none.

        It must be a regular one, which a run that was stopped and continued in between has too.
        """
        self.saver.wait()  # the pending save may be the one to return to, and votes through the store's group
        with self.heartbeat.during("checkpoint"):
            folder = self.store.newest_good(self.config.checkpoint.every_steps)
            if folder is None:
                self.spikes.report(action="warn", reason="there is no checkpoint to return to")
                return False
            manifest = CheckpointManifest.load(folder)
            self._load_checkpoint(folder, manifest)
        left_out = [end for _, end in self.spikes.history.skipped_rows]
        skipped = (max([manifest.consumed_samples, *left_out]), done.end_row)
        self.spikes.roll_back(manifest.spikes, skipped)
        self.spikes.report(continued_from=manifest.step, skipped_rows=list(skipped))
        self.state = TrainState(manifest.step, done.end_row)
        self._compared_at = 0
        self.progress.go_back_to(manifest.step)
        return True

    # -- validating and saving -----------------------------------------------------------------------------------------

    def _check_and_save(self, action: Action) -> None:
        """After a step, compare replicas, validate, save and stop, as each is due."""
        step, train = self.state.step, self.config.train
        is_last = step == train.steps
        if train.replica_check_every is not None and step % train.replica_check_every == 0:
            self.compare_replicas()
        if self.validation_source is not None and (step % train.eval_every == 0 or is_last):
            self.validate()
        if is_last or action >= Action.SAVE:
            self.save()
        if is_last or action is Action.STOP:
            self.saver.wait()
        if action is Action.STOP and not is_last:
            raise PreemptedError(
                f"stopped at step {step} of {train.steps} as asked; everything is saved, "
                "the same command continues from here"
            )

    def validate(self) -> EvalResult:
        """Both losses and the masked-token accuracy on a fixed sample of the validation rows."""
        with self.heartbeat.during("evaluation"):
            result = self.engine.evaluate(self._validation_batches())
        self.progress.report_validation(self.state.step, result)
        self.progress.restart_clock()
        return result

    def _validation_batches(self) -> Iterator[Batch]:
        """This rank's share of the same rows at every validation and for any number of ranks; no row counts twice."""
        source = self.validation_source
        assert source is not None
        num_rows, size = source.rows.num_rows, source.micro_batch_size
        num_batches = min(self.config.train.eval_batches, math.ceil(num_rows / size))
        dp_size, rank = self.engine.mesh.dp_size, self.engine.mesh.dp_rank
        for first in range(0, num_batches, dp_size):
            index = first + rank
            # Under ZeRO-3 every forward is a collective: ranks without a share take part with an empty batch.
            batch = source.micro_batch(index if index < num_batches else 0)
            # The stream goes on with the next epoch behind the last row.
            num_counted = min(max(num_rows - index * size, 0), size) if index < num_batches else 0
            yield batch if num_counted == size else batch.counting_rows(num_counted)

    def compare_replicas(self) -> None:
        """End the run if ranks hold different copies of a parameter, unless they have just been compared."""
        if self._compared_at == self.state.step or self.config.train.replica_check_every is None:
            return
        drifts = self.engine.find_drift()
        if drifts:
            self.saver.settle()
            raise ReplicaDriftError(describe_drift(drifts, self.state.step, self.saver.committed_step))
        self._compared_at = self.state.step

    def save(self) -> None:
        """Save the current state, unless it was just captured; the save may still be pending afterwards."""
        if self.saver.captured_step == self.state.step:
            return
        self.compare_replicas()
        manifest = replace(
            self.description,
            step=self.state.step,
            consumed_samples=self.state.consumed_samples,
            spikes=asdict(self.spikes.history),
        )
        self.saver.save(manifest)
        self.progress.restart_clock()


def _changed_data(old: CheckpointManifest, new: CheckpointManifest) -> str | None:
    """The first prefix that both manifests name and whose tokens differ."""
    old_digests = {dataset["prefix"]: dataset["digest"] for dataset in old.data}
    changed = (
        dataset["prefix"]
        for dataset in new.data
        if old_digests.get(dataset["prefix"], dataset["digest"]) != dataset["digest"]
    )
    return next(changed, None)
