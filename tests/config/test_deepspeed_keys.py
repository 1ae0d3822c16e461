"""The keys that the `deepspeed:` table takes are those that the installed DeepSpeed looks up, with its types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from forked import run_ranks

from pretrain.config.deepspeed import OWNED_DEEPSPEED_KEYS
from pretrain.config.deepspeed_keys import ANY, DEEPSPEED_KEYS, PATH, REMOVED_DEEPSPEED_KEYS
from pretrain.config.load import resolve_config
from pretrain.config.sections import RunConfig
from pretrain.errors import ConfigError


class Asked(dict[str, Any]):
    """A table that remembers which keys it was asked for."""

    def __init__(self, tables: dict[str, Any] | None = None) -> None:
        super().__init__(tables or {})
        self.keys_asked: set[str] = set()

    def __copy__(self) -> Asked:
        return self

    def __deepcopy__(self, memo: object) -> Asked:
        return self

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self


def asked_of(kinds: dict[str, Any], tables: dict[str, Asked], path: str = "") -> Asked:
    """A table with those below it, each entered in `tables` by its dotted name."""
    below = {
        name: asked_of(kind, tables, f"{path}.{name}".strip("."))
        for name, kind in kinds.items()
        if isinstance(kind, dict)
    }
    tables[path] = Asked(below)
    return tables[path]


def look_ups_and_models() -> tuple[dict[str, set[str]], dict[str, dict[str, str]]]:
    """What DeepSpeed looks up in each table, and the fields of its pydantic models with their types."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.inference.config import WeightQuantConfig
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig, HybridEngineConfig
    from deepspeed.runtime.tensor_parallel.config import TPConfig, TPTrainingConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    read_one_by_one = {
        name: DEEPSPEED_KEYS[name]
        for name in ("activation_checkpointing", "aio", "autotuning", "data_efficiency", "flops_profiler")
    }
    tables: dict[str, Asked] = {}
    table = asked_of({**read_one_by_one, "timers": {}}, tables)
    dict.__setitem__(table, "train_batch_size", 1)
    DeepSpeedConfig(table)
    looked_up = {path: asked.keys_asked for path, asked in tables.items()}
    experts = Asked({"enabled": False})
    parse_autoep_config(experts)
    looked_up["expert_parallel"] = experts.keys_asked
    looked_up["removed"] = set(_REMOVED_TOP_LEVEL_CONFIG_KEYS)
    models = {
        "comms_logger": CommsLoggerConfig,
        "weight_quantization": WeightQuantConfig,
        "comet": CometConfig,
        "csv_monitor": CSVConfig,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "hybrid_engine": HybridEngineConfig,
        "tensor_parallel": TPTrainingConfig,
        "tensor_parallel.tp": TPConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }
    fields = {
        path: {
            key: str(field.annotation)
            for name, field in model.model_fields.items()
            for key in {name, field.alias or name}
        }
        for path, model in models.items()
    }
    return looked_up, fields


@pytest.mark.slow
def test_the_table_is_that_of_the_installed_deepspeed() -> None:
    looked_up, models = run_ranks(1, look_ups_and_models)[0]
    removed = looked_up.pop("removed")
    assert removed == {*REMOVED_DEEPSPEED_KEYS, "amp"}  # amp is set by `precision`
    top = looked_up.pop("")
    ours = {*DEEPSPEED_KEYS, *OWNED_DEEPSPEED_KEYS, *REMOVED_DEEPSPEED_KEYS}
    assert top - ours == set()
    read_elsewhere = {"data_parallel_size", "sequence_parallel_size", "vocabulary_size"}
    assert set(DEEPSPEED_KEYS) - top <= read_elsewhere
    for path, keys in looked_up.items():
        assert keys <= set(at(path)), path
        # What is read only where data efficiency is enabled is not looked up here.
        assert keys == set(at(path)) or path.startswith("data_efficiency"), path
    kinds = {bool: "bool", int: "int", float: "float", str: "str", PATH: "str", list: "list"}
    for path, fields in models.items():
        table = at(path)
        assert set(table) == set(fields), path
        for key, kind in table.items():
            assert isinstance(kind, dict | tuple) or kind == ANY or kinds[kind] in fields[key], (path, key)


def at(path: str) -> dict[str, Any]:
    table = DEEPSPEED_KEYS
    for name in path.split("."):
        table = table[name]
    return table


def config(*overrides: str) -> RunConfig:
    return resolve_config(Path("run.yaml"), {"run": {"output_dir": "x"}, "data": {"train": ["d"]}}, overrides)


@pytest.mark.fault("bad-config")
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("deepspeed.gradient_cliping=0.1", "; gradient_clipping, if you mean that, is set by optim.clip_grad_norm"),
        ("deepspeed.dump_stat=true", "which would ignore it; did you mean deepspeed.dump_state?"),
        ("deepspeed={zzz: 1}", "deepspeed.zzz: unknown key of DeepSpeed, which would ignore it; leave it out"),
        ("deepspeed.flops_profiler.profil_step=1", "did you mean deepspeed.flops_profiler.profile_step?"),
        ("deepspeed.data_efficiency.data_sampling.num_epoch=1", "deepspeed.data_efficiency.data_sampling.num_epochs?"),
        ("deepspeed.nebula={}", "deepspeed.nebula: was removed from DeepSpeed"),
        ("deepspeed.amp={}", "deepspeed.amp is set by precision"),
        ("deepspeed.dump_state=1", "deepspeed.dump_state: expected true or false, found '1'"),
        ("deepspeed.flops_profiler.profile_step=01", "write 1"),
        ("deepspeed.gradient_allreduce_op=average", "expected 'mean' or 'sum', found 'average'"),
        ("deepspeed.comms_logger.prof_ops=all", "write 'deepspeed.comms_logger.prof_ops=[FIRST, SECOND]'"),
        ("deepspeed.aio=1", "deepspeed.aio: expected a table; write 'deepspeed.aio={block_size: VALUE}'"),
        ("deepspeed=fast", "deepspeed: expected a table of DeepSpeed's keys"),
        ("deepspeed.zero_optimisation={}", "zero_optimization, if you mean that, is set by zero.*"),
    ],
)  # fmt: skip
def test_what_deepspeed_would_ignore_or_misread_is_refused(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(override)
    assert words in str(caught.value)


def test_what_deepspeed_knows_is_passed_through_typed() -> None:
    table = config(
        "deepspeed.wall_clock_breakdown=on",
        "deepspeed.gradient_predivide_factor=1",
        "zero.stage=0",
        "deepspeed.comms_logger={enabled: yes, prof_ops: [all_reduce]}",
        "deepspeed.autotuning.arg_mappings={a: --b, c: [1, 1e-3, off]}",
        "deepspeed.aio=null",
        "deepspeed.dump_state=null",
    ).deepspeed
    assert table == {
        "wall_clock_breakdown": True,
        "gradient_predivide_factor": 1.0,
        "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
        "autotuning": {"arg_mappings": {"a": "--b", "c": [1, 1e-3, "off"]}},
    }
