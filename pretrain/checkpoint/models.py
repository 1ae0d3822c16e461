"""Whether the weights of a checkpoint belong to a run's model section; shapes alone do not show it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pretrain.config.sections import ModelSection

# Keys of the model section that say how weights were trained or drawn, and not what is computed with them.
_FREE_KEYS = ("hidden_dropout", "attention_dropout", "initializer_range")
# Keys that no shape shows: another value computes something else with the same weights.
_HIDDEN_KEYS = ("num_attention_heads", "layer_norm_eps")


def compare_models(saved: dict[str, Any], model: ModelSection) -> dict[str, tuple[Any, Any]]:
    """Keys of the model section in which a checkpoint differs from a run, with both values; how it trained is free.

    Keys that the checkpoint does not know have the default, those that this program does not know None.
    """
    there = {name: field.default for name, field in ModelSection.model_fields.items()} | saved
    here = model.model_dump(mode="json")
    return {key: (there[key], here.get(key)) for key in there if key not in _FREE_KEYS and there[key] != here.get(key)}


def explain_refused(different: Mapping[str, tuple[Any, Any]], allowed: Collection[str]) -> str:
    """The keys of `compare_models` that may not differ, with both values and what to set; empty if there are none.

    Only keys that no shape depends on can be `allowed`.
    """
    different = {
        key: pair for key, pair in different.items() if key not in _HIDDEN_KEYS or not is_allowed("model", key, allowed)
    }
    if not different:
        return ""
    values = ", ".join(f"model.{key} is {there!r} there and {here!r} here" for key, (there, here) in different.items())
    unknown = [key for key, (_, here) in different.items() if key not in ModelSection.model_fields]
    if unknown:
        return f"{values}; this program does not know {', '.join(unknown)}: use the release that wrote the checkpoint"
    settings = " ".join(f"model.{key}={there}" for key, (there, _) in different.items())
    hidden = " ".join(f"--allow-change model.{key}" for key in different if key in _HIDDEN_KEYS)
    return f"{values}; set {settings}" + (f" (to compute something else on purpose: {hidden})" if hidden else "")


def is_allowed(section: str, key: str, allowed: Collection[str]) -> bool:
    """Whether `--allow-change` names a key, or its whole section."""
    return section in allowed or f"{section}.{key}" in allowed
