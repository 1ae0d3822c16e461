"""An optimizer whose step can be held."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Holdable:
    """A mixin before an optimizer class, with which its step can be held.

    DeepSpeed does more in a step than update: it unscales, clips, counts, clears gradients. With the optimizer held,
    all of that happens but no weight or moment changes.
    """

    _is_held = False

    @contextmanager
    def held(self, is_held: bool) -> Iterator[None]:
        """While this context lasts, `step` changes nothing if `is_held`."""
        self._is_held = is_held
        try:
            yield
        finally:
            self._is_held = False

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One update, unless the optimizer is held."""
        return None if self._is_held else super().step(*args, **kwargs)  # type: ignore[misc]
