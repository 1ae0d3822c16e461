"""From the tree of a configuration's texts to the values of its sections; what is wrong is collected."""

from __future__ import annotations

import contextlib
import difflib
import re
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pretrain.config.deepspeed_keys import read_table
from pretrain.config.keys import all_keys, is_optional, section_at, section_type
from pretrain.config.problems import Problems, show
from pretrain.config.sections import IS_PATH, RunConfig, Switch
from pretrain.config.values import WrongValueError, found, is_null, read, read_switch
from pretrain.config.yaml_tree import Node, Scalar, Table

# What other programs call the keys.
_OTHER_NAMES = {
    "batch_size": "train.micro_batch_size",
    "dropout": "model.hidden_dropout",
    "epochs": "train.steps",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "optim.clip_grad_norm",
    "learning_rate": "optim.lr",
    "logging_steps": "train.log_every",
    "max_grad_norm": "optim.clip_grad_norm",
    "max_seq_length": "data.seq_length",
    "max_steps": "train.steps",
    "mlm_probability": "objective.mask_rate",
    "num_epochs": "train.steps",
    "num_heads": "model.num_attention_heads",
    "num_hidden_layers": "model.num_layers",
    "intermediate_size": "model.ffn_hidden_size",
    "optimizer": "optim.name",
    "per_device_train_batch_size": "train.micro_batch_size",
    "save_steps": "checkpoint.every_steps",
    "scheduler": "optim.schedule",
}


def convert_tree(tree: Table, problems: Problems) -> dict[str, Any]:
    """The values of a configuration, without those that are wrong, which go to `problems`."""
    return _read_section(tree, RunConfig, "", problems)


def _read_section(node: Node, section: type[BaseModel], path: str, problems: Problems) -> dict[str, Any]:
    if isinstance(node, Scalar) and node.is_null:
        return {}
    if not isinstance(node, Table):
        problems.add(
            node.place, f"{path}: expected a section, found {found(node)}{_section_hint(node, path)}", key=path
        )
        return {}
    values: dict[str, Any] = {}
    for name, entry in node.entries.items():
        key = f"{path}.{name}" if path else name
        field = section.model_fields.get(name)
        if field is None:
            _refuse_unknown(entry, section, path, name, problems)
        elif (child := section_type(field.annotation)) and not (is_optional(field.annotation) and is_null(entry)):
            values[name] = _read_section(entry, child, key, problems)
        elif key == "deepspeed":
            values[name] = read_table(entry, problems)
        else:
            try:
                values[name] = _read_value(entry, field, key)
            except WrongValueError as error:
                problems.add(entry.place, f"{key}: {error}", key=key)
    return values


def _read_value(node: Node, field: FieldInfo, key: str) -> Any:
    for mark in field.metadata:
        if isinstance(mark, Switch) and isinstance(node, Scalar) and node.text not in get_args(field.annotation):
            with contextlib.suppress(WrongValueError):
                return mark.option(read_switch(node))
    return read(node, field.annotation, key, is_path=IS_PATH in field.metadata)


def _section_hint(node: Node, path: str) -> str:
    if isinstance(node, Scalar) and re.match(r"\w+:\S", node.text):
        return "; write a space after the colon"
    section = section_at(path)
    name = next(iter(section.model_fields)) if section else "KEY"
    return f"; write keys below it, or set one as {path}.{name}=VALUE"


def _refuse_unknown(node: Node, section: type[BaseModel], path: str, name: str, problems: Problems) -> None:
    near = _suggest(node, section, path, name) if problems.count < 100 else None
    key = f"{path}.{name}" if path else name
    problems.add(node.place, lambda: f"{show(key)}: unknown key{_hint(node, section, name, near)}", key=near or key)


def _suggest(node: Node, section: type[BaseModel], path: str, name: str) -> str | None:
    """The key that was probably meant: a similar one of the section, or that of another section."""
    if section_at(name.rpartition(".")[0]) and "." in name:
        parent, _, last = name.rpartition(".")
        owner = section_at(parent)
        if owner and last in owner.model_fields:
            return name
    name = name[:80].lower().replace("-", "_")
    if name in _OTHER_NAMES and not isinstance(node, Table):
        return _OTHER_NAMES[name]
    near = difflib.get_close_matches(name, section.model_fields, n=1)
    if near:
        return f"{path}.{near[0]}" if path else near[0]
    paths = list(all_keys())
    same = [candidate for candidate in paths if candidate.rpartition(".")[2] == name]
    if same:
        return same[0]
    close = difflib.get_close_matches(name, [candidate.rpartition(".")[2] for candidate in paths], n=1, cutoff=0.8)
    return next((candidate for candidate in paths if close and candidate.rpartition(".")[2] == close[0]), None)


def _hint(node: Node, section: type[BaseModel], name: str, near: str | None) -> str:
    if name == "extends":
        return "; it stands at the top level of a file, and names files relative to that"
    if ":" in name and isinstance(node, Scalar) and node.is_null:
        return "; write a space after the colon"
    if near == name and "." in name:  # `optim.lr: 1` in a file
        parent, _, last = name.rpartition(".")
        return f"; write {last} below {parent}:, dots are for the command line"
    if near:
        return f"; did you mean {near}?"
    return f"; known keys here: {', '.join(section.model_fields)}"
