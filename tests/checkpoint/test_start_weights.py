"""`run.init_from`: weights are compared with the run by key and by the ids of its tokenizer; read at step 0 only."""

from __future__ import annotations

import contextlib
import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_ranks
from hf_folders import random_bert
from safetensors.torch import load_file, save_file
from small_runs import VOCAB_SIZE, write_cyclic_dataset, write_small_run

from pretrain.checkpoint.manifest import CheckpointManifest, find_checkpoint, list_checkpoints
from pretrain.checkpoint.models import compare_models
from pretrain.checkpoint.reshape import reshape_checkpoint
from pretrain.checkpoint.start_check import check_start, find_start
from pretrain.checkpoint.tokenizers import compare_tokenizers
from pretrain.checkpoint.weights import read_weights
from pretrain.cli import main
from pretrain.config.load import load_config
from pretrain.config.sections import ModelSection
from pretrain.data.tokenizer.info import TokenizerInfo
from pretrain.data.tokenizer.load import load_tokenizer
from pretrain.durable import record_of
from pretrain.errors import ConfigError
from pretrain.import_hf import import_folder
from pretrain.train import train

SHAPE = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
ONE_STEP = {"train__steps": 1, "optim__warmup_steps": 0, "optim__lr": 1e-12, "data__validation": []}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.yaml with its data, imported/ (its tokenizer in it), bare/ (no tokenizer), trained/ (a run)."""
    folder = tmp_path_factory.mktemp("place")
    write_small_run(folder, **ONE_STEP)
    random_bert(folder / "hf", **SHAPE)
    import_folder(folder / "hf", folder / "bare")
    import_folder(folder / "hf", folder / "imported", tokenizer=load_tokenizer(folder / "train.tokenizer"))
    write_cyclic_dataset(folder / "other", words="other")
    run_ranks(1, train_once, folder, f"run.output_dir={folder / 'trained'}")
    return folder


def train_once(place: Path, *overrides: str, **options: Any) -> None:
    settings = {"dry_run": False, "allow_change": None, "from_scratch": False} | options
    train(config=place / "run.yaml", overrides=list(overrides), **settings)


def taco_train(place: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and output of `taco train`, in a process of its own."""

    def program() -> tuple[int, str]:
        output = io.StringIO()
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            try:
                main(["train", "--config", str(place / "run.yaml"), *arguments])
            except SystemExit as ended:
                return int(ended.code or 0), output.getvalue()

    return run_ranks(1, program)[0]


def check(place: Path, source: Path, *overrides: str, data: str = "train", allowed: tuple[str, ...] = ()) -> list[str]:
    """`check_start` of a run that begins from `source`, with the data of a prefix in `place`."""
    words = [f"run.init_from={source}", f"data.train=[{place / data}]", *overrides]
    return check_start(
        find_checkpoint(source), load_config(place / "run.yaml", words), tokenizer_of(place / data), allowed
    )


def tokenizer_of(prefix: Path) -> TokenizerInfo:
    return load_tokenizer(Path(f"{prefix}.tokenizer")).info


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["imported", "trained"])
@pytest.mark.parametrize(
    ("key", "value", "there", "is_hidden"),
    [
        ("num_attention_heads", "2", "4", True),
        ("num_attention_heads", "8", "4", True),
        ("layer_norm_eps", "1e-05", "1e-12", True),
        ("num_layers", "3", "2", False),
        ("hidden_size", "16", "32", False),
        ("ffn_hidden_size", "48", "64", False),
        ("max_position_embeddings", "24", "32", False),
        ("type_vocab_size", "3", "2", False),
    ],
)
def test_another_model_is_refused_with_both_values_and_what_to_set(
    place: Path, source: str, key: str, value: str, there: str, is_hidden: bool
) -> None:
    change, allowed = f"model.{key}={value}", (f"model.{key}",)
    with pytest.raises(ConfigError) as caught:
        check(place, place / source, change)
    message = str(caught.value)
    assert f"run.init_from {place / source}: " in message
    assert f"model.{key} is {there} there and {value} here; set model.{key}={there}" in message
    assert ("--allow-change" in message) == is_hidden
    assert check(place, place / source, f"model.{key}={there}") == []
    if is_hidden:
        assert check(place, place / source, change, allowed=allowed) == [
            f"model.{key} is {there} in the checkpoint and {value} in this run, as allowed"
        ]
    else:
        with pytest.raises(ConfigError):
            check(place, place / source, change, allowed=allowed)


def test_what_only_training_used_may_differ(place: Path) -> None:
    changes = ("model.hidden_dropout=0.3", "model.attention_dropout=0.0", "model.initializer_range=0.5")
    assert check(place, place / "imported", *changes) == []
    assert check(place, place / "trained", *changes, "precision=bf16", "run.seed=99") == []


def test_keys_of_other_releases_are_compared_with_their_defaults() -> None:
    model = ModelSection()
    older = {key: value for key, value in model.model_dump().items() if key != "layer_norm_eps"}
    assert compare_models(older, model) == {}
    assert compare_models(older, ModelSection(layer_norm_eps=0.1)) == {"layer_norm_eps": (1e-12, 0.1)}
    assert compare_models({**older, "activation": "relu"}, model) == {"activation": ("relu", None)}


def test_a_reshaped_checkpoint_is_compared_too(place: Path, tmp_path: Path) -> None:
    reshape_checkpoint(find_checkpoint(place / "trained"), tmp_path / "weights", num_files=1, weights_only=True)
    assert check(place, tmp_path / "weights") == []
    with pytest.raises(ConfigError, match="model.num_attention_heads is 4 there and 1 here"):
        check(place, tmp_path / "weights", "model.num_attention_heads=1")


# -- tokenizers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["imported", "trained"])
def test_other_pieces_are_refused_with_both_tokenizers_and_an_example(place: Path, source: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(place, place / source, data="other")
    message = str(caught.value)
    for info in (tokenizer_of(place / "train"), tokenizer_of(place / "other")):
        assert info.sha256[:12] in message
    assert "id 5 is 'word0' in one and 'other0' in the other" in message
    remedy = find_checkpoint(place / source) / "tokenizer"
    assert f"preprocess the data with --tokenizer {remedy} " in message
    assert load_tokenizer(remedy).info == replace(tokenizer_of(place / "train"), name=load_tokenizer(remedy).info.name)
    (note,) = check(place, place / source, data="other", allowed=("data.train",))
    assert note.endswith("as allowed")


def test_a_run_and_its_data_agree_if_ids_do_whatever_the_bytes(place: Path, tmp_path: Path) -> None:
    """As data does that was preprocessed again on a machine with other line ends."""
    vocab = tmp_path / "word.txt"
    vocab.write_bytes((place / "word.txt").read_bytes().replace(b"\n", b"\r\n"))
    load_tokenizer(vocab).save_pretrained(tmp_path / "again.tokenizer")
    again = tokenizer_of(tmp_path / "again")
    assert again.sha256 != tokenizer_of(place / "train").sha256
    checkpoint = find_checkpoint(place / "trained")
    manifest = CheckpointManifest.load(checkpoint)
    assert compare_tokenizers(checkpoint, manifest, again, str(tmp_path / "again")) is None
    other = compare_tokenizers(checkpoint, manifest, tokenizer_of(place / "other"), str(place / "other"))
    assert other is not None
    assert other.has_same_size


def test_the_same_ids_from_another_file_are_the_same(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "train.tokenizer", tmp_path / "kept")
    tokenizer = load_tokenizer(tmp_path / "kept" / "tokenizer.json")
    import_folder(place / "hf", tmp_path / "imported", tokenizer=tokenizer)
    assert CheckpointManifest.load(find_checkpoint(tmp_path / "imported")).tokenizer_sha256 != tokenizer_of(
        place / "train"
    )
    assert check(place, tmp_path / "imported") == []


def test_a_checkpoint_without_a_tokenizer_is_said_to_be_unknown(place: Path, tmp_path: Path) -> None:
    (note,) = check(place, place / "bare")
    assert "holds no tokenizer, so nothing shows that its ids mean the same words" in note
    import_folder(random_bert(tmp_path / "hf", **{**SHAPE, "vocab_size": 72}), tmp_path / "padded")
    with pytest.raises(ConfigError, match=r"has 72 word embeddings and no tokenizer, .*import .* --tokenizer FILE"):
        check(place, tmp_path / "padded")


def test_an_older_import_with_padding_is_to_be_imported_again(place: Path, tmp_path: Path) -> None:
    """Earlier releases kept padding rows beside a tokenizer."""
    checkpoint = Path(shutil.copytree(find_checkpoint(place / "imported"), tmp_path / "older"))
    rewrite_manifest(checkpoint, vocab_size=72)
    with pytest.raises(ConfigError, match=r"has 72 word embeddings for the 64 pieces of its tokenizer; import"):
        check(place, checkpoint)


def test_an_unknown_tokenizer_with_another_hash_is_refused(place: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(find_checkpoint(place / "bare"), tmp_path / "older"))
    rewrite_manifest(checkpoint, tokenizer_sha256="ab" * 32)
    with pytest.raises(ConfigError, match=r"another tokenizer \(sha256 abababababab\), which .* does not hold"):
        check(place, checkpoint)


def rewrite_manifest(checkpoint: Path, **changes: Any) -> None:
    manifest = replace(CheckpointManifest.load(checkpoint), **changes)
    (checkpoint / "manifest.json").write_text(manifest.to_json())


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent", "is not there; give a checkpoint"),
        ("hf", "is a Hugging Face folder; make a checkpoint of it with `taco import-hf"),
        ("run.yaml", "is a file; give the folder of a checkpoint"),
        ("train.tokenizer", "no checkpoint here"),
    ],
)
def test_what_is_no_checkpoint_is_explained(place: Path, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        find_start(place / name)
    assert str(caught.value).startswith(f"run.init_from {place / name}: ")


def test_the_log_says_what_is_read_and_a_refusal_is_a_wrong_configuration(place: Path, tmp_path: Path) -> None:
    arguments = (f"run.init_from={place / 'trained'}", f"run.output_dir={tmp_path / 'run'}")
    code, output = taco_train(place, *arguments, "model.num_attention_heads=2")
    assert code == 2, output
    assert "error: run.init_from" in output
    code, output = taco_train(place, *arguments)
    assert code == 0, output
    folder = place / "trained" / "checkpoints" / "step-0000001"
    assert f"starts from the weights of {folder} (34 tensors, kind training, step 1), with a new optimizer" in output


def test_a_dry_run_finds_the_same_and_needs_no_data(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def dry_run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["train", "--config", str(place / "run.yaml"), "--dry-run", *arguments])
        return int(ended.value.code or 0), capsys.readouterr().out

    start, out = f"run.init_from={place / 'imported'}", f"run.output_dir={tmp_path / 'run'}"
    assert dry_run(start, out)[0] == 0
    for change in ("model.layer_norm_eps=0.1", f"data.train=[{place / 'other'}]", f"run.init_from={place / 'hf'}"):
        code, output = dry_run(start, out, change)
        assert code == 2, output
        assert "# does not fit: run.init_from" in output
    assert dry_run(start, out, "model.layer_norm_eps=0.1", "--allow-change=model.layer_norm_eps")[0] == 0
    elsewhere = f"data.train=[{tmp_path / 'elsewhere'}]"
    assert dry_run(start, out, elsewhere)[0] == 0
    assert dry_run(start, out, elsewhere, "model.num_attention_heads=2")[0] == 2
    assert dry_run(f"run.init_from={place / 'hf'}", f"run.output_dir={place / 'trained'}")[0] == 0  # is not read


@pytest.mark.slow
def test_a_run_with_a_checkpoint_does_not_read_other_weights_any_more(place: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(place / "imported", tmp_path / "start"))
    arguments = (f"run.init_from={source}", f"run.output_dir={tmp_path / 'run'}")
    run_ranks(1, train_once, place, *arguments)
    shutil.rmtree(source)
    code, output = taco_train(place, *arguments, "train.steps=2", "--allow-change=train.steps")
    assert code == 0, output
    assert f"run.init_from {source} is not read: the run continues from its own checkpoints" in output
    code, output = taco_train(place, *arguments, "--from-scratch", "train.steps=3", "--allow-change=train.steps")
    assert code == 0, output  # there is a good checkpoint, so the option has no effect
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")][0] == "step-0000003"


@pytest.mark.slow
def test_a_run_from_scratch_starts_from_them_again(place: Path, tmp_path: Path) -> None:
    arguments = (f"run.init_from={place / 'imported'}", f"run.output_dir={tmp_path / 'run'}")
    run_ranks(1, train_once, place, *arguments)
    (state,) = (tmp_path / "run" / "checkpoints" / "step-0000001" / "state").glob("*.safetensors")
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    run_ranks(1, train_once, place, *arguments, from_scratch=True)
    start, trained = (read_weights(find_checkpoint(folder)) for folder in (place / "imported", tmp_path / "run"))
    assert all(torch.allclose(start[name], trained[name], rtol=0, atol=1e-9) for name in start)


@pytest.mark.slow
def test_a_run_is_not_continued_with_other_heads_where_only_its_checkpoint_knows_them(
    place: Path, tmp_path: Path
) -> None:
    """As after `--allow-change checkpoint.run`, or without the run's own config.yaml."""
    run = Path(shutil.copytree(place / "trained", tmp_path / "run"))
    (run / "config.yaml").unlink()
    arguments = (f"run.output_dir={run}", "train.steps=2", "model.num_attention_heads=2", "--allow-change=train.steps")
    code, output = taco_train(place, *arguments)
    assert code == 2, output
    assert "model.num_attention_heads is 4 there and 2 here; set model.num_attention_heads=4" in output
    code, output = taco_train(place, *arguments, "--allow-change=model.num_attention_heads")
    assert code == 0, output


@pytest.mark.slow
def test_weights_that_are_not_finite_end_all_ranks(place: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(find_checkpoint(place / "imported"), tmp_path / "start"))
    path = checkpoint / "weights.safetensors"
    tensors = load_file(path)
    tensors["2.ffn_in.bias"][3] = float("inf")
    save_file(tensors, path)
    files = [record for record in CheckpointManifest.load(checkpoint).files if record.name != path.name]
    rewrite_manifest(checkpoint, files=(*files, record_of(path, checkpoint)))
    with pytest.raises(AssertionError, match=r"2.ffn_in.bias: 1 of 64 values are NaN or infinite"):
        run_ranks(2, train_once, place, f"run.init_from={checkpoint}", f"run.output_dir={tmp_path / 'run'}")
