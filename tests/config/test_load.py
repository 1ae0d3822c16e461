"""The configuration: what it accepts, and how it explains what it does not."""

from __future__ import annotations

from pathlib import Path

import project
import pytest
import yaml

from pretrain.config.checks import check_world_size, legal_layouts
from pretrain.config.load import dump_config, load_config
from pretrain.config.sections import RunConfig
from pretrain.errors import ConfigError

CONFIGS = sorted(project.CONFIGS.glob("*.yaml"))
MINIMAL = {"run": {"output_dir": "runs/x"}, "data": {"train": ["data/train"]}}


def write(folder: Path, tree: object, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(tree))
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_load_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    again = tmp_path / "resolved.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


def test_shipped_sizes() -> None:
    sizes = {path.stem: load_config(path).model for path in CONFIGS}
    assert (sizes["taco_small"].num_layers, sizes["taco_small"].hidden_size) == (4, 512)
    assert (sizes["taco_base"].num_layers, sizes["taco_base"].hidden_size) == (12, 768)
    assert (sizes["taco_large"].num_layers, sizes["taco_large"].hidden_size) == (24, 1024)


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_twins_differ_only_in_the_objective_and_the_folder(size: str) -> None:
    folder = CONFIGS[0].parent
    taco, mlm = (load_config(folder / f"{kind}_{size}.yaml").model_dump() for kind in ("taco", "mlm"))
    assert taco["objective"].pop("contrastive_weight") == 1.0
    assert mlm["objective"].pop("contrastive_weight") == 0.0
    assert taco["run"].pop("output_dir") != mlm["run"].pop("output_dir")
    assert taco == mlm


def test_overrides_win_and_are_typed(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), ["optim.lr=1e-3", "train.steps=20000", "data.train=[a, b]"])
    assert config.optim.lr == 1e-3
    assert config.train.steps == 20000
    assert config.data.train == ("a", "b")


def test_extends_changes_only_what_it_names(tmp_path: Path) -> None:
    write(tmp_path, {**MINIMAL, "optim": {"lr": 0.5, "eps": 0.25}}, "base.yaml")
    config = load_config(write(tmp_path, {"extends": "base.yaml", "optim": {"lr": 0.125}}))
    assert (config.optim.lr, config.optim.eps) == (0.125, 0.25)


def test_extends_takes_several_files_and_the_later_one_wins(tmp_path: Path) -> None:
    write(tmp_path, {**MINIMAL, "optim": {"lr": 0.5, "eps": 0.25}}, "base.yaml")
    write(tmp_path, {"optim": {"lr": 0.75}, "zero": {"stage": 3}}, "preset.yaml")
    config = load_config(write(tmp_path, {"extends": ["base.yaml", "preset.yaml"], "optim": {"eps": 0.125}}))
    assert (config.optim.lr, config.optim.eps, config.zero.stage) == (0.75, 0.125, 3)
    assert "a file name or a list of them" in refusal(write(tmp_path, {"extends": {"base": 1}}))


def test_extends_in_a_circle_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"extends": "run.yaml"}, "other.yaml")
    assert "circle" in refusal(write(tmp_path, {"extends": "other.yaml"}))


@pytest.mark.fault("bad-config")
def test_unknown_keys_suggest_the_near_name_or_the_right_section(tmp_path: Path) -> None:
    path = write(tmp_path, {**MINIMAL, "train": {"micro_batch_sise": 4, "lr": 1.0}})
    message = refusal(path)
    assert "did you mean train.micro_batch_size?" in message
    assert "did you mean optim.lr?" in message


@pytest.mark.fault("bad-config")
def test_all_problems_are_told_together(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, {"run": {}, "data": {"train": []}, "train": {"steps": "many"}}))
    assert "run.output_dir: is required" in message
    assert "data.train" in message
    assert "train.steps: expected a whole number, found 'many'" in message
    assert "'many'" in message


@pytest.mark.fault("bad-config")
def test_files_arguments_types_and_contradictions_are_told_together_each_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run: {output_dir: x}\ndata: {train: [d]}\nmodel:\n  num_layers: twelve\n  hidden_size: 100\n")
    message = refusal(path, "optim.lr", "optim.lrr=3", "train.steps=many", "optim.warmup_steps=5", "parallel.tensor=5")
    tensor = f"{path} with parallel.tensor=5: model"
    assert message.split("\n") == [
        f"{path}: 7 problems",
        "  - command line: optim.lr: expected section.key=value, for example optim.lr=1e-4",
        f"  - {path}:4: model.num_layers: expected a whole number, found 'twelve'",
        "  - command line: optim.lrr=3: optim.lrr: unknown key; did you mean optim.lr?",
        "  - command line: train.steps=many: train.steps: expected a whole number, found 'many'",
        f"  - {path}: model.hidden_size (100) must be a multiple of model.num_attention_heads (12); try 10 heads",
        f"  - {tensor}.num_attention_heads (12) must be a multiple of parallel.tensor (5); try parallel.tensor=4 or 15",
        f"  - {tensor}.ffn_hidden_size (3072) must be a multiple of parallel.tensor (5); try parallel.tensor=4 or 3075",
    ]
    assert "optim.warmup_steps" not in message  # nothing is known of it while train.steps is not


@pytest.mark.fault("bad-config")
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr", "expected section.key=value"),
        ("train.micro_batch_size=1", "must be at least 2"),
        ("model.num_attention_heads=7", "try 6 heads"),
        ("train.global_batch_size=1001", "x data-parallel size (1) = 8; try 1000"),
        ("data.seq_length=1024", "raise the latter to 1024"),
        ("optim.warmup_steps=100000", "must be smaller than train.steps"),
        ("optim.decay_steps=10", "belongs to optim.schedule=wsd"),
        ("optim.betas=[0.9, 1.5]", "must lie in [0, 1)"),
        ("parallel.tensor=5", "try parallel.tensor=4 or"),
        ("parallel.sequence=true", "parallel.tensor is 1"),
        ("parallel.pipeline=13", "try parallel.pipeline=12"),
        ("parallel={pipeline: 2, stage_layers: [5, 5]}", "with the sum 12"),
        ("precision=fp4", "'fp32', 'bf16', 'fp16' or 'fp8'"),
        ("optim.lr=.inf", "finite number"),
        ("deepspeed={train_batch_size: 8}", "deepspeed.train_batch_size is set by train.global_batch_size"),
        ("data.train=data/books", "write 'data.train=[data/books]'"),
    ],
)
def test_contradictions_name_key_value_and_remedy(tmp_path: Path, override: str, words: str) -> None:
    assert words in refusal(write(tmp_path, MINIMAL), override)


def test_micro_batch_of_one_is_fine_without_the_contrastive_loss(tmp_path: Path) -> None:
    load_config(write(tmp_path, MINIMAL), ["train.micro_batch_size=1", "objective.contrastive_weight=0"])


def test_file_problems_name_the_file(tmp_path: Path) -> None:
    assert "no such configuration file" in refusal(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: [")
    assert "not valid YAML" in refusal(broken)
    broken.write_text("- just\n- a list\n")
    assert "expected sections" in refusal(broken)


@pytest.mark.fault("malicious")
def test_yaml_cannot_construct_objects(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text(f"run: !!python/object/apply:os.mkdir ['{tmp_path / 'canary'}']\n")
    assert "not valid YAML" in refusal(path)
    assert not (tmp_path / "canary").exists()


def config_with(**parallel: object) -> RunConfig:
    return RunConfig.model_validate({**MINIMAL, "parallel": parallel})


def test_world_size_arithmetic() -> None:
    assert check_world_size(config_with(), 4) == []
    (problem,) = check_world_size(config_with(), 3)
    assert "x data-parallel size (3) = 24; try 264" in problem


def test_one_process_where_the_configuration_says_two() -> None:
    (problem,) = check_world_size(config_with(data=2), 1)
    assert "= 2 processes, but 1 was started" in problem
    assert "torchrun --nproc-per-node 2" in problem
    assert "parallel.data=1" in problem


@pytest.mark.fault("bad-config")
def test_every_problem_of_a_layout_is_told_at_once_with_the_layouts_that_fit(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    overrides = ["parallel.tensor=5", "parallel.pipeline=13", "parallel.sequence=true", "zero.stage=2"]
    overrides += ["train.micro_batch_size=1", "train.global_batch_size=255"]
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, world_size=6)
    message = str(caught.value)
    for words in (
        "7 problems",
        f"{path} with train.micro_batch_size=1: train.micro_batch_size (1) must be at least 2",
        "train.micro_batch_size (1) must be at least 2",
        "model.num_attention_heads (12) must be a multiple of parallel.tensor (5); try parallel.tensor=4 or 15",
        "model.ffn_hidden_size (3072) must be a multiple of parallel.tensor (5)",
        "train.micro_batch_size x data.seq_length (512) must be a multiple of parallel.tensor (5)",
        "parallel.pipeline (13) must not exceed model.num_layers (12)",
        "zero.stage (2) with parallel.pipeline (13)",
        "parallel.tensor (5) x parallel.pipeline (13) = 65 does not divide the number of started processes (6)",
    ):
        assert words in message, message


@pytest.mark.parametrize(
    ("world_size", "overrides", "words"),
    [
        (8, ["parallel.tensor=3"], "that fit 8 processes: (2, 1, 4), (4, 1, 2), (1, 1, 8), (2, 2, 2)"),
        (8, ["parallel.tensor=3", "zero.stage=3"], "that fit 8 processes: (2, 1, 4), (4, 1, 2), (1, 1, 8)"),
        (8, ["parallel.data=3"], "= 3 processes, but 8 were started"),
        (13, [], "no layout fits 13 processes; the nearest number that one fits is 12: "),
        (4, ["parallel.sequence=true"], "that fit 4 processes: (2, 1, 2), (2, 2, 1), (4, 1, 1)"),
        (4, ["train.global_batch_size=24"], "that fit 4 processes: (2, 2, 1), (1, 4, 1), (4, 1, 1)"),
    ],
)
def test_the_last_problem_ends_with_what_fits(
    tmp_path: Path, world_size: int, overrides: list[str], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, MINIMAL), overrides, world_size=world_size)
    assert words in str(caught.value)


def test_whatever_is_called_legal_is_accepted(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    for world_size in range(1, 33):
        for tensor, pipeline, data in legal_layouts(load_config(path), world_size):
            assert tensor * pipeline * data == world_size
            sizes = f"parallel={{tensor: {tensor}, pipeline: {pipeline}, data: {data}}}"
            load_config(path, [sizes], world_size=world_size)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.weights=[0.5,0.5]"], "data.weights has 2 entries for 1 dataset of data.train"),
        (["data.weights=[0]"], "data.weights: 0.0 must be positive"),
        (["data.train=[a,b]", "data.weights=[1,1e-7]"], "at least 2^-20 of their sum"),
        (["data.splits={train: 0.9, validation: 0.05}"], "must be 1, found 0.95; try train=0.95"),
        (["data.splits={train: 0.9, validatio: 0.1}"], "did you mean data.splits.validation?"),
        (["data.splits={train: 0.9, validation: 0.1}", "data.validation=[x]"], "data.validation must be empty"),
        (["data.splits={validation: 1.5}"], "data.splits.train: is required"),
        (["data.row_mode=packed"], "data.row_mode: "),
    ],
)
def test_weights_and_splits_that_say_nothing_are_refused(tmp_path: Path, overrides: list[str], words: str) -> None:
    assert words in refusal(write(tmp_path, MINIMAL), *overrides)


def test_weights_and_splits_survive_a_round_trip(tmp_path: Path) -> None:
    given = ["data.train=[a,b]", "data.weights=[3,1]", "data.splits={train: 0.98, validation: 0.01, test: 0.01}"]
    config = load_config(write(tmp_path, MINIMAL), given)
    again = tmp_path / "resolved.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config
    assert config.data.splits is not None
    assert config.data.splits.validation == 0.01


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.recompute=layer:3"], r"train.recompute \(layer:3\) must be none, elementwise, layers:all or layers:N"),
        (["train.recompute=3"], r"train.recompute \(3\) must be"),
        (["train.recompute=layers:-1"], "must be none"),
        (["train.recompute=none", "train.recompute_layers=2"], r"\(2\) contradict .* set train.recompute_layers=0"),
        (["train.recompute=layers:3", "train.recompute_layers=all"], "contradict"),
    ],
)
def test_wrong_recomputation_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, MINIMAL), overrides)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], (0, False)),
        (["train.recompute_layers=2"], (2, False)),
        (["train.recompute_layers=all"], (12, False)),
        (["train.recompute=none"], (0, False)),
        (["train.recompute=elementwise"], (0, True)),
        (["train.recompute=layers:2", "train.recompute_layers=2"], (2, False)),
        (["train.recompute=layers:99"], (12, False)),
        (["train.recompute=layers:all"], (12, False)),
    ],
)
def test_recomputation_by_either_key(tmp_path: Path, overrides: list[str], expected: tuple[int, bool]) -> None:
    config = load_config(write(tmp_path, MINIMAL), overrides)
    assert (config.recompute_layers, config.recomputes_elementwise) == expected
