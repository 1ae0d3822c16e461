"""`taco import-hf`: turns a Hugging Face BERT folder into a checkpoint that training starts from and export reads.

taco import-hf bert-base-uncased imported/bert
taco train --config configs/taco_base.yaml run.init_from=imported/bert
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pretrain.cli import new_program, run_program

if TYPE_CHECKING:
    import torch

app = new_program()

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "spiece.model",
    "added_tokens.json",
)


@app.command(epilog="Example: taco import-hf downloads/bert-base-uncased imported/bert_base")
def import_hf(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder: config.json and model.safetensors")],
    out: Annotated[Path, typer.Argument(help="folder for the checkpoint; must not exist")],
    fresh_head: Annotated[
        bool, typer.Option("--fresh-head", help="draw missing weights (the MLM head) from --seed")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="seed of a fresh head")] = 1234,
) -> None:
    """Convert a Hugging Face `BertForMaskedLM` to a weights checkpoint; the exact inverse of `taco export`."""
    from pretrain.errors import DataError

    if out.exists():
        raise DataError(f"{out}: exists; choose a new folder")
    missing, unused = import_folder(folder, out, fresh_head=fresh_head, seed=seed)
    typer.echo(f"imported {folder} to {out}")
    if missing:
        typer.echo(f"drawn from seed {seed}, not in the folder: {', '.join(missing)}")
    if unused:
        typer.echo(f"left out, not part of BERT pretraining: {', '.join(unused)}")


def import_folder(
    folder: Path, out: Path, *, fresh_head: bool = False, seed: int = 0
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write the checkpoint; returns our parameters that were missing and their tensors that are not used.

    Raises:
        DataError: not a BERT folder, a model that post-LN BERT cannot express, or a missing head without `fresh_head`.
    """
    from pretrain.errors import DataError
    from pretrain.model.hf import WORD, from_hf_state_dict, model_section_from_hf

    hf_config = _read_config(folder)
    section = model_section_from_hf(hf_config)
    converted = from_hf_state_dict(_read_state(folder), section)
    if converted.missing and not fresh_head:
        raise DataError(
            f"{folder}: has no weights for {', '.join(converted.missing)}; "
            "import a BertForMaskedLM, or add --fresh-head to draw them at random"
        )
    vocab_size = int(hf_config["vocab_size"])
    weights = converted.state | _fresh(section, vocab_size, seed, converted.missing)
    if (num_words := weights[WORD].shape[0]) != vocab_size:
        raise DataError(
            f"{folder}: config.json says vocab_size {vocab_size}, the word embeddings have {num_words} rows; "
            "set it to what the weights have, or save the model again"
        )
    _write(folder, out, section, hf_config, weights)
    return converted.missing, converted.unused


def _read_config(folder: Path) -> dict[str, Any]:
    from pretrain.errors import DataError

    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: is missing; give the folder of a saved Hugging Face model") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("vocab_size"), int):
        raise DataError(f"{path}: expected the configuration of a BERT model with its vocab_size")
    return config


def _read_state(folder: Path) -> dict[str, torch.Tensor]:
    """The folder's tensors; pytorch_model.bin is read as tensors only, never as a pickle that runs code."""
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from pretrain.errors import DataError

    safe, old = folder / "model.safetensors", folder / "pytorch_model.bin"
    try:
        if safe.is_file():
            return load_file(safe)
        if old.is_file():
            state = torch.load(old, map_location="cpu", weights_only=True)
            if isinstance(state, dict) and all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
                return state
            raise DataError(f"{old}: expected a table of tensors by name; save the model again with save_pretrained")
    except (SafetensorError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise DataError(f"{safe if safe.is_file() else old}: cannot be read as tensors: {error}") from None
    raise DataError(f"{folder}: has neither model.safetensors nor pytorch_model.bin (shards are not supported yet)")


def _fresh(section: Any, vocab_size: int, seed: int, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    if not names:
        return {}
    from pretrain.model.bert import Bert
    from pretrain.model.layer_spec import plain_layers

    parameters = dict(Bert(section, vocab_size, plain_layers(), seed=seed).named_parameters())
    return {name: parameters[name].detach() for name in names}


def _write(folder: Path, out: Path, section: Any, hf_config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    """One checkpoint of step 0 in `out`, committed like any other."""
    from pretrain.checkpoint.manifest import CheckpointManifest, Layout
    from pretrain.checkpoint.store import CheckpointStore
    from pretrain.checkpoint.weights import write_weights
    from pretrain.errors import DataError

    config_sha256 = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    manifest = CheckpointManifest(
        kind="weights",
        step=0,
        consumed_samples=0,
        layout=Layout(data=1, tensor=1, pipeline=1, zero_stage=0, precision="fp32"),
        model=section.model_dump(mode="json"),
        vocab_size=int(hf_config["vocab_size"]),
        tokenizer_sha256=hashlib.sha256(files[0].read_bytes()).hexdigest() if files else "",
        config_sha256=config_sha256,
        pad_token_id=int(hf_config.get("pad_token_id") or 0),
    )
    gathered = out.with_name(f".{out.name}.tokenizer") / "tokenizer"
    try:
        gathered.mkdir(parents=True)
        for file in files:
            shutil.copyfile(file, gathered / file.name)
        store = CheckpointStore(out, keep=1)
        store.prepare()
        store.save(manifest, lambda target: [write_weights(target, weights)], (gathered,) if files else ())
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error}; free space or choose another folder") from None
    finally:
        shutil.rmtree(gathered.parent, ignore_errors=True)
        with contextlib.suppress(OSError):  # holds the checkpoint, if all went well
            out.rmdir()


if __name__ == "__main__":
    run_program(app, name="python -m pretrain.import_hf")
