"""Checkpoint -> Hugging Face folder -> checkpoint: exact, verified, and never half there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_ranks
from hf_folders import random_bert
from safetensors import SafetensorError
from safetensors.torch import load_file
from small_runs import write_small_run
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertModel

from pretrain import export as export_module
from pretrain.checkpoint import weights as weights_module
from pretrain.checkpoint.manifest import CheckpointManifest, find_checkpoint
from pretrain.checkpoint.weights import read_weights
from pretrain.config.sections import ModelSection
from pretrain.data.tokenizer.load import load_tokenizer
from pretrain.errors import CheckpointError, ConfigError, DataError, TacoError
from pretrain.evaluate.fill_mask import predict
from pretrain.export import export_checkpoint
from pretrain.import_hf import import_folder
from pretrain.train import train


def train_once(config: Path, *overrides: str) -> None:
    train(config=config, overrides=list(overrides), dry_run=False, allow_change=None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run_ranks(1, train_once, write_small_run(folder))
    return folder / "run"


def test_trained_checkpoint_exports_and_records_where_it_came_from(run: Path, tmp_path: Path) -> None:
    result = export_checkpoint(find_checkpoint(run), tmp_path / "out")
    assert result["is_new"]
    assert result["logits_difference"] <= 1e-5
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "out").config.vocab_size == 64
    card = (tmp_path / "out" / "README.md").read_text()
    manifest = CheckpointManifest.load(find_checkpoint(run))
    assert manifest.config_sha256 in card
    assert manifest.data[0]["digest"][:16] in card


def test_an_export_has_the_length_of_the_training_rows(run: Path, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(run)  # rows of 24 tokens, 32 positions
    result = export_checkpoint(checkpoint, tmp_path / "out")
    assert (result["trained_positions"], result["model_max_length"], result["max_position_embeddings"]) == (24, 24, 32)
    assert "positions 24 to 31 were never trained" in " ".join(result["warnings"])
    with pytest.raises(DataError, match="with 32 positions, not 24; add --overwrite"):
        export_checkpoint(checkpoint, tmp_path / "out", max_positions=24)
    cut = export_checkpoint(checkpoint, tmp_path / "out", max_positions=24, overwrite=True)
    assert (cut["max_position_embeddings"], cut["warnings"]) == (24, [])
    tokenizer, model = (kind.from_pretrained(tmp_path / "out") for kind in (AutoTokenizer, AutoModelForMaskedLM))
    assert (model.config.max_position_embeddings, tokenizer.padding_side) == (24, "right")
    inputs = tokenizer("word1 word2 [MASK] " * 30, truncation=True, return_tensors="pt")
    assert model(**inputs).logits.shape == (1, 24, 64)
    with pytest.raises(ConfigError, match="--max-positions 33: the model has 32"):
        export_checkpoint(checkpoint, tmp_path / "out", max_positions=33)


def test_export_gives_the_weights_that_were_trained(run: Path, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(run)
    export_checkpoint(checkpoint, tmp_path / "out")
    import_folder(tmp_path / "out", tmp_path / "back")
    before, after = read_weights(checkpoint), read_weights(find_checkpoint(tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = export_checkpoint(find_checkpoint(tmp_path / "back"), tmp_path / "again")
    assert (again["trained_positions"], again["model_max_length"]) == (None, 24)  # the folder's own
    assert "imported weights" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_on_two_ranks_exports(stage: int, tmp_path: Path) -> None:
    config = write_small_run(tmp_path, train__steps=3, optim__warmup_steps=1)
    run_ranks(2, train_once, config, f"zero.stage={stage}")
    assert export_checkpoint(find_checkpoint(tmp_path / "run"), tmp_path / "out")["logits_difference"] <= 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_hugging_face_round_trip_is_exact(seed: int, tmp_path: Path) -> None:
    shapes: list[dict[str, Any]] = [{}, {"num_hidden_layers": 1, "num_attention_heads": 1}, {"intermediate_size": 17}]
    source = random_bert(tmp_path / "hf", seed, **shapes[seed])
    import_folder(source, tmp_path / "checkpoint")
    export_checkpoint(find_checkpoint(tmp_path / "checkpoint"), tmp_path / "again")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "layout",
    [
        (1,),
        pytest.param((2, "parallel.tensor=2", "parallel.sequence=true"), marks=pytest.mark.slow),
        pytest.param((2, "parallel.pipeline=2"), marks=pytest.mark.slow),
        pytest.param((2, "zero.stage=3"), marks=pytest.mark.slow),
    ],
)
def test_training_starts_from_imported_weights_in_any_layout(layout: tuple[Any, ...], tmp_path: Path) -> None:
    world_size, *overrides = layout
    shape = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    import_folder(random_bert(tmp_path / "hf", **shape), tmp_path / "start")
    config = write_small_run(tmp_path, train__steps=1, optim__warmup_steps=0, optim__lr=1e-12)
    run_ranks(world_size, train_once, config, f"run.init_from={tmp_path / 'start'}", *overrides)
    start = read_weights(find_checkpoint(tmp_path / "start"))
    trained = read_weights(find_checkpoint(tmp_path / "run"))
    assert all(torch.allclose(start[name], trained[name], rtol=0, atol=1e-9) for name in start)


def test_weights_of_another_shape_are_refused_with_the_parameters(tmp_path: Path) -> None:
    import_folder(random_bert(tmp_path / "hf"), tmp_path / "start")
    config = write_small_run(tmp_path)
    with pytest.raises(
        AssertionError, match=r"model.hidden_size is 24 there and 32 here, .*; set model.hidden_size=24 model.num_att"
    ):
        run_ranks(1, train_once, config, f"run.init_from={tmp_path / 'start'}")


def test_second_export_says_that_it_is_there(run: Path, tmp_path: Path) -> None:
    export_checkpoint(find_checkpoint(run), tmp_path / "out")
    marker = tmp_path / "out" / "notes.txt"
    marker.write_text("mine")
    assert not export_checkpoint(find_checkpoint(run), tmp_path / "out", overwrite=True)["is_new"]
    assert marker.exists()


def test_a_folder_of_something_else_is_never_replaced(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="exists and is no export"):
        export_checkpoint(find_checkpoint(run), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_another_checkpoints_export_needs_overwrite(run: Path, tmp_path: Path) -> None:
    import_folder(random_bert(tmp_path / "hf"), tmp_path / "other")
    export_checkpoint(find_checkpoint(tmp_path / "other"), tmp_path / "out")
    with pytest.raises(DataError, match="add --overwrite"):
        export_checkpoint(find_checkpoint(run), tmp_path / "out")
    assert export_checkpoint(find_checkpoint(run), tmp_path / "out", overwrite=True)["is_new"]


@pytest.mark.fault("export")
def test_a_failed_replacement_keeps_the_older_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_folder(random_bert(tmp_path / "hf"), tmp_path / "other")
    export_checkpoint(find_checkpoint(tmp_path / "other"), tmp_path / "out")
    before = (tmp_path / "out" / "taco_export.json").read_text()
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.parent.name == "new" and self.name == "model.safetensors":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises((OSError, TacoError), match="Input/output error"):
        export_checkpoint(find_checkpoint(run), tmp_path / "out", overwrite=True)
    monkeypatch.undo()
    assert (tmp_path / "out" / "taco_export.json").read_text() == before
    assert not [*tmp_path.glob(".out*"), *(tmp_path / "out").glob(".*")]


@pytest.mark.fault("damaged-checkpoint")
def test_a_damaged_checkpoint_is_not_exported(run: Path, tmp_path: Path) -> None:
    import_folder(random_bert(tmp_path / "hf"), tmp_path / "start")
    checkpoint = find_checkpoint(tmp_path / "start")
    weights = checkpoint / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="content differs"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_conversion_is_caught_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pretrain.model.hf as hf

    right = hf.to_hf_state_dict

    def swapped(weights: dict[str, torch.Tensor], section: ModelSection) -> dict[str, torch.Tensor]:
        state = right(weights, section)
        query, key = (f"bert.encoder.layer.0.attention.self.{name}.weight" for name in ("query", "value"))
        state[query], state[key] = state[key], state[query]
        return state

    monkeypatch.setattr(hf, "to_hf_state_dict", swapped)
    with pytest.raises(CheckpointError, match="its logits differ"):
        export_checkpoint(find_checkpoint(run), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("export")
def test_a_full_disk_during_export_leaves_no_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> float:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "_compare_logits", full)
    with pytest.raises(DataError, match="No space"):
        export_checkpoint(find_checkpoint(run), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_head_needs_a_word(tmp_path: Path) -> None:
    source = random_bert(tmp_path / "hf", kind=BertModel)
    with pytest.raises(DataError, match="add --fresh-head"):
        import_folder(source, tmp_path / "out")
    missing, unused = import_folder(source, tmp_path / "out", fresh_head=True, seed=3)
    assert missing
    assert any("pooler" in name for name in unused)


@pytest.mark.parametrize(
    ("change", "words"), [({"hidden_act": "relu"}, "hidden_act"), ({"model_type": "gpt2"}, "gpt2")]
)
def test_what_post_ln_bert_cannot_express_is_refused(tmp_path: Path, change: dict[str, str], words: str) -> None:
    source = random_bert(tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(DataError, match=words):
        import_folder(source, tmp_path / "out")


def test_missing_and_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.json: is missing"):
        import_folder(tmp_path / "absent", tmp_path / "out")
    source = random_bert(tmp_path / "hf")
    (source / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(DataError, match=r"model\.safetensors: cannot be read"):
        import_folder(source, tmp_path / "out")


def test_tables_that_are_none_and_a_wrong_vocabulary_size_are_refused(tmp_path: Path) -> None:
    source = random_bert(tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 51}))
    with pytest.raises(DataError, match="says vocab_size 51, the word embeddings have 50 rows"):
        import_folder(source, tmp_path / "out")
    (source / "model.safetensors").unlink()
    torch.save([1, 2], source / "pytorch_model.bin")
    with pytest.raises(DataError, match="expected a table of tensors"):
        import_folder(source, tmp_path / "out")


def test_a_target_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    source = random_bert(tmp_path / "hf")
    with pytest.raises(DataError, match="cannot be written"):
        import_folder(source, tmp_path / "file" / "out")
    import_folder(source, tmp_path / "checkpoint")
    with pytest.raises(DataError, match="cannot be written"):
        export_checkpoint(find_checkpoint(tmp_path / "checkpoint"), tmp_path / "file" / "out")

    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(weights_module, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        import_folder(source, tmp_path / "full")
    assert not (tmp_path / "full").exists()


def test_what_fill_mask_cannot_answer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no config\.json"):
        predict(tmp_path, ["[MASK]"], 1)
    broken = random_bert(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not tensors")
    (broken / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be loaded"):
        predict(broken, ["[MASK]"], 1)


def test_fill_mask_answers_within_the_vocabulary_and_the_length(tmp_path: Path) -> None:
    folder = random_bert(tmp_path / "hf")
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("".join(f"{piece}\n" for piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a")))
    load_tokenizer(vocab).save_pretrained(folder)
    (answer,) = predict(folder, ["a [MASK]"], 1000)
    assert len(answer) == 50
    with pytest.raises(DataError, match="has 43 tokens, the model reads 32"):
        predict(folder, ["[MASK]" + " a" * 40], 1)
    with pytest.raises(DataError, match="expected one .MASK., found 0; write"):
        predict(folder, ["a"], 1)
