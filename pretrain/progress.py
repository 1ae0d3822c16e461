"""What a run says of itself: a line on the console and a record in metrics.jsonl, of logged steps and validations."""

from __future__ import annotations

from pretrain.config.sections import RunConfig
from pretrain.engine.engine import EvalResult, StepResult
from pretrain.metrics import MetricsLog, Throughput
from pretrain.optim import learning_rate
from pretrain.runlog import Eta, format_count, format_seconds, get_logger

log = get_logger(__name__)


class Progress:
    """Counts steps and tells of them; every rank has one, and rank 0's is heard."""

    def __init__(self, config: RunConfig, metrics: MetricsLog) -> None:
        self._config = config
        self._metrics = metrics
        self._throughput = Throughput()
        self._num_skipped = 0
        self.start_from(0)

    def start_from(self, step: int) -> None:
        """Training begins there, now."""
        self._eta = Eta(step, self._config.train.steps)
        self._throughput.restart()

    def count(self, result: StepResult) -> None:
        """Take notice of a step that is done."""
        self._num_skipped += result.is_skipped
        self._throughput.add(self._config.train.global_batch_size * self._config.data.seq_length)

    def restart_clock(self) -> None:
        """Leave the time since the last logged step out of the throughput: it was not spent on steps."""
        self._throughput.restart()

    def report_step(self, step: int, result: StepResult, *, consumed_samples: int, unsaved_seconds: float) -> None:
        """Tell of `step`, if it is one of every `train.log_every` or the last."""
        total = self._config.train.steps
        if step % self._config.train.log_every and step != total:
            return
        rate = self._throughput.restart()
        lr = learning_rate(step - 1, self._config.optim, total)
        self._metrics.write(
            {
                "step": step,
                "loss": result.loss,
                "mlm_loss": result.mlm_loss,
                "contrastive_loss": result.contrastive_loss,
                "lr": lr,
                "grad_norm": result.grad_norm,
                "tokens_per_second": rate,
                "consumed_samples": consumed_samples,
                "skipped_steps": self._num_skipped,
            }
        )
        fields = (
            f"step {step:>{len(str(total))}}/{total}",
            f"loss {result.loss:.4f}",
            f"mlm {result.mlm_loss:.4f}",
            f"taco {result.contrastive_loss:.4f}",
            f"lr {lr:.2e}",
            f"grad norm {result.grad_norm:.3f}",
            f"{format_count(rate)} tokens/s",
            f"skipped {self._num_skipped}",
            f"unsaved {format_seconds(unsaved_seconds)}",
            f"eta {format_seconds(self._eta.remaining(step))}",
        )
        log.info("%s", " | ".join(fields))

    def report_validation(self, step: int, result: EvalResult) -> None:
        """Tell what a validation after `step` has found."""
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
