"""Says on the console what torch.compile has compiled, and how long it took: minutes of silence look like a hang."""

from __future__ import annotations

from torch import nn

from pretrain.model.compiled import compiled_parts
from pretrain.runlog import get_logger
from pretrain.step import Action, DoneStep, Watcher

log = get_logger(__name__)


class CompileNews(Watcher):
    """Looks after every step at the compiled functions of this rank's model."""

    def __init__(self, model: nn.Module) -> None:
        self._parts = compiled_parts(model)

    def after_step(self, step: DoneStep) -> Action:
        """Report what is new, an evaluation's graph after the step that follows it."""
        for part in self._parts:
            news = part.news()
            if news is not None:
                log.info("%s", news)
        return Action.CONTINUE
