"""Reports on a run: a line on the console and a record in metrics.jsonl, for logged steps and validations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from pretrain.config.sections import RunConfig
from pretrain.data.batches import Batch
from pretrain.engine.engine import EvalResult
from pretrain.meters.speed import SpeedMeter, describe_speed
from pretrain.metrics import MetricsLog
from pretrain.optim import learning_rate
from pretrain.parallel import collectives
from pretrain.runlog import Eta, ProgressLine, format_count, format_seconds, get_logger, progress_bar
from pretrain.step import Action, DoneStep, Watcher

log = get_logger(__name__)


class Progress(Watcher):
    """Counts steps and reports them; every rank has one, but only rank 0's reports appear.

    Args:
        meter: measures the speed of the run.
        unsaved_seconds: gives the work that a crash would lose now.
    """

    def __init__(
        self, config: RunConfig, metrics: MetricsLog, meter: SpeedMeter, unsaved_seconds: Callable[[], float]
    ) -> None:
        self._config = config
        self._metrics = metrics
        self._unsaved_seconds = unsaved_seconds
        self._meter = meter
        self._bar = ProgressLine(None, None)
        self._eta = Eta(0, config.train.steps)

    @contextmanager
    def shown_from(self, step: int) -> Iterator[None]:
        """Training begins at `step`, now; while this context lasts a terminal shows a progress bar."""
        self._meter.measure_device()
        self.go_back_to(step)
        with progress_bar("training", step, self._config.train.steps, is_shown=collectives.rank() == 0) as self._bar:
            yield

    def go_back_to(self, step: int) -> None:
        """Training goes on from the state of `step`, now; reports on later steps are replaced by those to come."""
        self._eta = Eta(step, self._config.train.steps)
        self._metrics.begin(step)
        self._meter.restart()

    def count(self, micro_batches: Sequence[Batch]) -> None:
        """This rank has taken a step on these micro-batches."""
        self._meter.count(micro_batches)

    def after_step(self, step: DoneStep) -> Action:
        """Report the step if it is one of every `train.log_every` or the last."""
        self._bar.update(step.number)
        if step.number % self._config.train.log_every == 0 or step.number == self._config.train.steps:
            self._report_step(step)
        return Action.CONTINUE

    def close(self) -> None:
        """Write out what the metrics still buffer."""
        self._metrics.close()

    def restart_clock(self) -> None:
        """Leave the time since the last logged step out of the throughput: it was not spent on steps."""
        self._meter.restart()

    def _report_step(self, done: DoneStep) -> None:
        step, result, total = done.number, done.result, self._config.train.steps
        speed = self._meter.take()
        lr = learning_rate(step - 1, self._config.optim, total)
        self._metrics.write(
            {
                "step": step,
                "loss": result.loss,
                "mlm_loss": result.mlm_loss,
                "contrastive_loss": result.contrastive_loss,
                "lr": lr,
                "grad_norm": result.grad_norm,
                **speed,
                "consumed_samples": done.end_row,
                "skipped_steps": result.num_skipped,
            }
        )
        fields = (
            f"step {step:>{len(str(total))}}/{total}",
            f"loss {result.loss:.4f}",
            f"mlm {result.mlm_loss:.4f}",
            f"taco {result.contrastive_loss:.4f}",
            f"lr {lr:.2e}",
            f"grad norm {result.grad_norm:.3f}",
            f"{format_count(speed['tokens_per_second'])} tokens/s",
            describe_speed(speed),
            f"skipped {result.num_skipped}",
            f"unsaved {format_seconds(self._unsaved_seconds())}",
            f"eta {format_seconds(self._eta.remaining(step))}",
        )
        log.info("%s", " | ".join(fields))

    def report_validation(self, step: int, result: EvalResult) -> None:
        """Report a validation that was made after `step`."""
        self._metrics.write(
            {
                "step": step,
                "validation_mlm_loss": result.mlm_loss,
                "validation_contrastive_loss": result.contrastive_loss,
                "validation_accuracy": result.accuracy,
                "validation_baseline_accuracy": result.baseline_accuracy,
            }
        )
        log.info(
            "step %d | validation mlm %.4f | taco %.4f | masked-token accuracy %.2f %% (most frequent token: %.2f %%)",
            step,
            result.mlm_loss,
            result.contrastive_loss,
            100 * result.accuracy,
            100 * result.baseline_accuracy,
        )
