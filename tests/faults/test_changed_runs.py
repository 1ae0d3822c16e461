"""A run that is continued with other settings or other data than it was begun with."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_records import FaultRecorder
from live_ranks import last_step, live_ranks
from small_runs import write_cyclic_dataset, write_small_run

from pretrain.config.load import load_config
from pretrain.errors import ConfigError
from pretrain.run_folder import RunFolder

DANGEROUS = {
    "optim.lr": "0.5",
    "optim.betas": "[0.9, 0.98]",
    "optim.weight_decay": "0.1",
    "optim.name": "lamb",
    "run.seed": "8",
    "data.seq_length": "16",
    "data.row_mode": "document",
    "data.train": "[elsewhere]",
    "model.hidden_size": "64",
    "model.hidden_dropout": "0.2",
    "objective.temperature": "0.1",
    "objective.mask_rate": "0.2",
    "mlm.average": "micro_batch",
    "train.global_batch_size": "32",
    "train.micro_batch_size": "2",
    "train.steps": "9",
    "precision": "bf16",
}


def test_what_changes_training_is_refused_with_both_values_unless_it_is_allowed(
    tmp_path: Path, fault: FaultRecorder
) -> None:
    path = write_small_run(tmp_path)
    config, run = load_config(path), RunFolder(tmp_path / "run")
    run.claim()
    run.write_description(config, {}, {})
    for key, value in DANGEROUS.items():
        changed = load_config(path, [f"{key}={value}"])
        with pytest.raises(ConfigError, match=rf"{key}: .* -> ") as caught:
            run.check_config(changed)
        assert "--allow-change KEY" in str(caught.value)
        assert len(run.check_config(changed, allowed=[key])) == 1
    fault.record("changed-run", injected=len(DANGEROUS), survived=len(DANGEROUS))


@pytest.mark.slow
@pytest.mark.fault("changed-run")
def test_other_data_under_the_same_name_is_refused(tmp_path: Path) -> None:
    config = write_small_run(tmp_path, train__steps=2, optim__warmup_steps=1, checkpoint={"every_steps": 1})
    with live_ranks(1, config) as ranks:
        assert ranks.wait() == [0], ranks.output()
    more = ("train.steps=4", "--allow-change=train.steps")
    write_cyclic_dataset(tmp_path / "train", seed=9)
    with live_ranks(1, config, *more) as ranks:
        assert ranks.wait() == [1], ranks.output()
    (line,) = ranks.errors(0)
    assert f"{tmp_path / 'train'} holds other data" in line
    assert last_step(ranks.run) == 2
    write_cyclic_dataset(tmp_path / "more", seed=9)
    named = (f"data.train=[{tmp_path / 'more'}]", "--allow-change=data.train")
    with live_ranks(1, config, *more, *named) as ranks:
        assert ranks.wait() == [0], ranks.output()
    assert last_step(ranks.run) == 4
