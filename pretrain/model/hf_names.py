"""Under which names a file holds the tensors of a BERT, and which of its encoder layers are there.

A model that was wrapped when it was saved has the wrapper's name before or between the usual names: `module.bert...`
(data-parallel wrappers), `_orig_mod.bert...` (torch.compile), `model.bert...` (a class of one's own). A `BertModel`
saved alone lacks `bert.`. Where the embeddings are tells which it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from pretrain.errors import DataError

# Parts of names that wrappers of torch add; no module of BERT is called so.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_TABLE = re.compile(r"((?:.+\.)?)embeddings\.(?:word|position|token_type)_embeddings\.weight")
_LAYER = re.compile(r"bert\.encoder\.layer\.(\d+)\.")
_ENCODER_PARTS = ("embeddings.", "encoder.", "pooler.")


@dataclass(frozen=True)
class NamedTensors:
    """The tensors of a file under the names of `BertForMaskedLM`."""

    tensors: dict[str, Tensor]
    example: tuple[str, str] | None
    """One name in the file and what it was read as; None where the file uses the usual names."""


def name_tensors(state: Mapping[str, Tensor]) -> NamedTensors:
    """The tensors of `state` under the names of `BertForMaskedLM`, whatever wrapped the model; others keep theirs.

    LayerNorm's names of the first releases (gamma, beta) are understood, too.

    Raises:
        DataError: there is no BERT among the tensors, or more than one, or two names mean the same tensor.
    """
    plain = {name: _without_wrappers(name) for name in state}
    prefixes = sorted({match[1] for name in plain.values() if (match := _TABLE.fullmatch(name))})
    if len(prefixes) != 1:
        raise DataError(_explain_prefixes(prefixes, list(state)))
    tensors: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, tensor in state.items():
        known = _usual_name(plain[name], prefixes[0])
        if known in origin:
            raise DataError(f"{origin[known]} and {name} both mean {known}; keep one of them and save the file again")
        origin[known], tensors[known] = name, tensor
    renamed = ((old, new) for new, old in origin.items() if new.startswith("bert.") and old != _modern(new, old))
    return NamedTensors(tensors, next(renamed, None))


def check_layers(names: Iterable[str], num_layers: int) -> None:
    """Refuse tensors of another number of encoder layers than `num_layers`, or with a layer left out.

    Raises:
        DataError: with both numbers, or with the layers that are missing.
    """
    found = {int(match[1]) for name in names if (match := _LAYER.match(name))}
    if found == set(range(num_layers)):
        return
    highest = max(found, default=-1) + 1
    gaps = sorted(set(range(highest)) - found)
    if gaps:
        raise DataError(
            f"weights of encoder layer {listing([str(gap) for gap in gaps])} are missing, those of layer {highest - 1} "
            f"are there (config.json says num_hidden_layers {num_layers}); save the whole model again"
        )
    raise DataError(
        f"config.json says num_hidden_layers {num_layers}, the weights have {highest} encoder layers; take the "
        "config.json that was saved with these weights, or set num_hidden_layers to what they have"
    )


def listing(entries: list[str]) -> str:
    """The first five entries, and how many more there are."""
    rest = f" and {len(entries) - 5} more" if len(entries) > 5 else ""
    return ", ".join(entries[:5]) + rest


def _without_wrappers(name: str) -> str:
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _usual_name(name: str, prefix: str) -> str:
    """`name` with `bert.` in place of the encoder's `prefix`, and without what stands before `bert.` or the head."""
    outer = prefix.removesuffix("bert.") if re.fullmatch(r"(.+\.)?bert\.", prefix) else prefix
    inner = name.removeprefix(prefix)
    if name.startswith(prefix) and inner.startswith(_ENCODER_PARTS):
        return f"bert.{inner}"
    if name.startswith(prefix) and inner.startswith("cls."):
        return inner
    return name.removeprefix(outer)


def _modern(usual: str, old: str) -> str:
    """`usual` as a file of the first releases spells it, if `old` is such a name."""
    for modern, first in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
        if old.endswith(first):
            return usual.replace(modern, first)
    return usual


def _explain_prefixes(prefixes: list[str], names: list[str]) -> str:
    if prefixes:
        places = listing([f"{prefix}embeddings" for prefix in prefixes])
        return f"holds {len(prefixes)} models ({places}); keep the tensors of one of them and save the file again"
    if not names:
        return "holds no tensors; save the model again"
    return (
        f"holds no BERT: none of its {len(names)} tensors is bert.embeddings.word_embeddings.weight ({listing(names)})"
    )
