"""What `taco import-hf` makes of a folder: exactly its weights, said in words, or a refusal that names the tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import write_vocab
from hf_folders import random_bert
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertForSequenceClassification, BertModel
from typer.testing import CliRunner

from pretrain.checkpoint.manifest import CheckpointManifest, find_checkpoint
from pretrain.checkpoint.weights import read_weights
from pretrain.data.tokenizer.load import load_tokenizer
from pretrain.errors import ConfigError, DataError
from pretrain.import_hf import app, import_folder
from pretrain.model.initialise import initial_value

WORD = "bert.embeddings.word_embeddings.weight"
FFN = "bert.encoder.layer.0.output.dense.weight"


def change_tensors(folder: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: change(name, tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def imported(folder: Path, out: Path, **options: Any) -> tuple[CheckpointManifest, dict[str, Tensor], list[str]]:
    said: list[str] = []
    import_folder(folder, out, say=said.append, **options)
    checkpoint = find_checkpoint(out)
    return CheckpointManifest.load(checkpoint), read_weights(checkpoint), said


# -- names and heads ---------------------------------------------------------------------------------------------------


def test_what_is_read_is_said(tmp_path: Path) -> None:
    folder = random_bert(tmp_path / "hf")
    tensors = {f"module.{name}": tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    torch.save({"model": tensors}, folder / "pytorch_model.bin")
    _, weights, said = imported(folder, tmp_path / "out")
    assert said[0] == f"{folder}/pytorch_model.bin: 42 tensors; 2 layers, hidden size 24, 3 heads, 50 words"
    assert "module.bert." in said[1]
    assert said[2] == "float16 is converted to fp32, exactly"
    assert "holds no tokenizer" in said[3]
    assert torch.equal(weights["tied_modules.word.weight"], tensors[f"module.{WORD}"].float())


@pytest.mark.parametrize("kind", [BertModel, BertForSequenceClassification])
def test_only_the_head_is_drawn_and_named(kind: Any, tmp_path: Path) -> None:
    folder = random_bert(tmp_path / "hf", kind=kind)
    with pytest.raises(DataError, match=r"no head .*cls.predictions.transform.dense.weight.*--fresh-head"):
        import_folder(folder, tmp_path / "out")
    drawn, unused = import_folder(folder, tmp_path / "out", fresh_head=True, seed=3)
    assert len(drawn) == 5
    assert all(name.startswith("cls.predictions.") for name in drawn)
    assert any("pooler" in name for name in unused)
    weights = read_weights(find_checkpoint(tmp_path / "out"))
    theirs = {name.removeprefix("bert."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    assert torch.equal(weights["tied_modules.word.weight"], theirs["embeddings.word_embeddings.weight"])
    assert torch.equal(weights["4.dense.weight"], initial_value("4.dense.weight", (24, 24), 0.02, 3))


@pytest.mark.parametrize("fresh_head", [False, True])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_wrong_number_of_layers_is_an_error_with_any_flag(num_layers: int, fresh_head: bool, tmp_path: Path) -> None:
    folder = random_bert(tmp_path / "hf")
    change_config(folder, num_hidden_layers=num_layers)
    with pytest.raises(DataError, match=rf"num_hidden_layers {num_layers}, the weights have 2 encoder layers"):
        import_folder(folder, tmp_path / "out", fresh_head=fresh_head)
    assert not (tmp_path / "out").exists()


def test_layers_that_share_their_memory_are_read(tmp_path: Path) -> None:
    folder = random_bert(tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shared = {name: tensors[name.replace("layer.1.", "layer.0.")] for name in tensors}
    torch.save(shared, folder / "pytorch_model.bin")
    _, weights, _ = imported(folder, tmp_path / "out")
    assert torch.equal(weights["2.ffn_in.weight"], weights["3.ffn_in.weight"])


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [(float("nan"), "1 of 960 values are NaN or infinite"), (float("-inf"), "1 of 960 values are NaN or infinite")],
)
def test_values_that_are_not_finite_are_counted(value: float, words: str, tmp_path: Path) -> None:
    folder = random_bert(tmp_path / "hf")
    at_5 = torch.arange(960).view(24, 40) == 5
    change_tensors(folder, lambda name, tensor: tensor.masked_fill(at_5, value) if name == FFN else tensor)
    with pytest.raises(DataError, match=rf"not finite \(1\): {FFN}: {words}"):
        import_folder(folder, tmp_path / "out")


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_types_that_no_weight_has_are_named(kind: torch.dtype, tmp_path: Path) -> None:
    folder = random_bert(tmp_path / "hf")
    change_tensors(folder, lambda name, tensor: tensor.to(kind) if name == FFN else tensor)
    shown = str(kind).removeprefix("torch.")
    with pytest.raises(DataError, match=rf"cannot be weights \(1\): {FFN} is {shown}; quantised"):
        import_folder(folder, tmp_path / "out")


def test_the_empty_tensors_of_a_partitioned_model_are_named(tmp_path: Path) -> None:
    folder = random_bert(tmp_path / "hf")
    change_tensors(folder, lambda name, tensor: tensor if name == FFN else tensor[:0])
    with pytest.raises(DataError, match=r"without values \(\d+\): .*saved under ZeRO-3 .*zero_to_fp32\.py"):
        import_folder(folder, tmp_path / "out")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_are_converted_and_said(kind: torch.dtype, tmp_path: Path) -> None:
    folder = random_bert(tmp_path / "hf")
    change_tensors(folder, lambda _, tensor: tensor.to(kind))
    _, weights, said = imported(folder, tmp_path / "out")
    assert any(str(kind).removeprefix("torch.") in line and "fp32" in line for line in said)
    expected = load_file(folder / "model.safetensors")[WORD].float()
    assert torch.equal(weights["tied_modules.word.weight"], expected)


def test_a_value_beyond_fp32_is_not_finite(tmp_path: Path) -> None:
    folder = random_bert(tmp_path / "hf")
    change_tensors(folder, lambda name, tensor: tensor.double() * 1e300 if name == FFN else tensor)
    with pytest.raises(DataError, match=r"960 of 960 values are NaN or infinite"):
        import_folder(folder, tmp_path / "out")


# -- words -------------------------------------------------------------------------------------------------------------


def with_tokenizer(folder: Path, num_rows: int) -> Path:
    """A random model of `num_rows` rows in `folder`/hf, with a tokenizer of 64 pieces."""
    random_bert(folder / "hf", vocab_size=num_rows)
    load_tokenizer(write_vocab(folder)).save_pretrained(folder / "hf")
    return folder / "hf"


@pytest.mark.parametrize("has_decoder", [False, True])
def test_padding_rows_are_cut_and_counted(has_decoder: bool, tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path, 72)
    before = load_file(folder / "model.safetensors")
    if has_decoder:
        decoder = {
            "cls.predictions.decoder.weight": before[WORD],
            "cls.predictions.decoder.bias": before["cls.predictions.bias"],
        }
        save_file(
            {**before, **{name: tensor.clone() for name, tensor in decoder.items()}}, folder / "model.safetensors"
        )
    manifest, weights, said = imported(folder, tmp_path / "out")
    assert manifest.vocab_size == 64
    assert torch.equal(weights["tied_modules.word.weight"], before[WORD][:64])
    assert torch.equal(weights["6.bias"], before["cls.predictions.bias"][:64])
    (line,) = [line for line in said if line.startswith("padding rows left out")]
    assert f"8 of 72 of {WORD}" in line
    assert "the tokenizer has 64 pieces" in line
    assert line.count("8 of 72") == (4 if has_decoder else 2)


def test_padding_rows_stay_where_no_tokenizer_counts_words(tmp_path: Path) -> None:
    manifest, _, said = imported(random_bert(tmp_path / "hf", vocab_size=72), tmp_path / "out")
    assert manifest.vocab_size == 72
    assert manifest.tokenizer_sha256 == ""
    assert "holds no tokenizer" in said[-1]


def test_a_tokenizer_that_is_given_counts_words_and_is_kept(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_vocab(tmp_path))
    manifest, _, _ = imported(random_bert(tmp_path / "hf", vocab_size=72), tmp_path / "out", tokenizer=tokenizer)
    assert manifest.vocab_size == 64
    assert manifest.tokenizer_sha256 == tokenizer.info.sha256
    assert load_tokenizer(find_checkpoint(tmp_path / "out") / "tokenizer").info.sha256 == tokenizer.info.sha256


def test_a_tokenizer_that_is_given_replaces_one_that_cannot_be_read(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_vocab(tmp_path))
    folder = random_bert(tmp_path / "hf", vocab_size=64)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: is not a tokenizer\.json"):
        import_folder(folder, tmp_path / "out")
    imported(folder, tmp_path / "out", tokenizer=tokenizer)
    kept = load_tokenizer(find_checkpoint(tmp_path / "out") / "tokenizer")
    assert kept.info.sha256 == tokenizer.info.sha256


def test_more_pieces_than_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"has 63 rows, the tokenizer \(vocab.txt\) 64 pieces: no row for id 63 \('##z'\)"
    ):
        import_folder(with_tokenizer(tmp_path, 63), tmp_path / "out")


def test_more_rows_than_padding_explains_are_of_another_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1,025 more rows of words than the 64 pieces .*--tokenizer"):
        import_folder(with_tokenizer(tmp_path, 64 + 1025), tmp_path / "out")


@pytest.mark.parametrize("is_cased", [False, True])
def test_a_bare_vocabulary_is_a_tokenizer(is_cased: bool, tmp_path: Path) -> None:
    folder = random_bert(tmp_path / "hf", vocab_size=64)
    vocab = shutil.copy(write_vocab(tmp_path), folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": not is_cased}))
    manifest, _, _ = imported(folder, tmp_path / "out")
    kept = load_tokenizer(find_checkpoint(tmp_path / "out") / "tokenizer")
    assert kept.info.cased == is_cased
    assert manifest.tokenizer_sha256 == kept.info.sha256 == load_tokenizer(vocab, cased=is_cased).info.sha256


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("added_tokens.json", '{"[NEW]": 64}', "has 64 pieces, and an added one with id 64 is in another file"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"70": {"content": "x"}}}', "an added one with id 70"),
        ("tokenizer_config.json", "[", "tokenizer_config.json: cannot be read"),
        ("vocab.txt", "version https://git-lfs.github.com/spec/v1\n", "vocab.txt: is a pointer of Git LFS"),
    ],
)
def test_a_tokenizer_that_is_not_whole_is_refused(name: str, text: str, words: str, tmp_path: Path) -> None:
    folder = random_bert(tmp_path / "hf", vocab_size=72)
    shutil.copy(write_vocab(tmp_path), folder)
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=words):
        import_folder(folder, tmp_path / "out")


# -- folders and configurations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta' .*only 'bert' is supported"),
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new' .*only 'gelu' or 'gelu_python'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"quantization_config": {"bits": 4}}, "quantization_config .*none is supported"),
        ({"num_attention_heads": "many", "hidden_size": -1}, "hidden_size is -1: .*num_attention_heads is 'many'"),
        ({"vocab_size": None}, "expected the configuration of a BERT model with its vocab_size, found None"),
        ({"vocab_size": True}, "found True"),
    ],
)
def test_configurations_are_refused_in_one_line(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = random_bert(tmp_path / "hf")
    change_config(folder, **changes)
    with pytest.raises(DataError, match=words) as caught:
        import_folder(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_what_is_no_folder_of_a_model_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def refusal(name: str) -> str:
        with pytest.raises(DataError) as caught:
            import_folder(Path(name), tmp_path / "out")
        return str(caught.value)

    assert "hf download google-bert/bert-base-uncased --local-dir" in refusal("google-bert/bert-base-uncased")
    assert "hf download" not in refusal("/data/models/bert")
    random_bert(tmp_path / "hf")
    assert "is a file; give the folder" in refusal("hf/model.safetensors")
    import_folder(tmp_path / "hf", tmp_path / "imported")
    assert "name it in run.init_from as it is" in refusal(str(find_checkpoint(tmp_path / "imported")))
    (tmp_path / "models--bert" / "snapshots").mkdir(parents=True)
    shutil.copytree(tmp_path / "hf", tmp_path / "models--bert" / "snapshots" / "0a")
    assert "models--bert/snapshots/0a has one" in refusal("models--bert")
    (tmp_path / "tf").mkdir()
    (tmp_path / "tf" / "bert_config.json").write_text("{}")
    assert "a checkpoint of TensorFlow" in refusal("tf")
    (tmp_path / "hf" / "config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "config.json: is a pointer of Git LFS" in refusal("hf")


# -- the verb ----------------------------------------------------------------------------------------------------------


def test_the_verb_says_what_it_did_and_refuses_what_contradicts_itself(tmp_path: Path) -> None:
    folder = random_bert(tmp_path / "hf", vocab_size=64, kind=BertModel)
    (tmp_path / "words").mkdir()
    write_vocab(tmp_path / "words")
    out, tokenizer = str(tmp_path / "out"), str(tmp_path / "words")
    done = CliRunner().invoke(app, [str(folder), out, "--fresh-head", "--tokenizer", tokenizer])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].endswith("heads, 64 words")
    assert "is read as bert." in lines[1]
    assert lines[2] == f"imported {folder} to {out}"
    assert lines[3].startswith("drawn from seed 1234, not in the folder: cls.predictions.")
    assert lines[4].startswith("left out, not part of BERT pretraining (2): bert.pooler.dense")
    for arguments, error in (([out], DataError), ([str(tmp_path / "more"), "--cased"], ConfigError)):
        assert isinstance(CliRunner().invoke(app, [str(folder), *arguments]).exception, error)
