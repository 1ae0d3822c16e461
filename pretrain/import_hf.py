"""`taco import-hf`: turns a Hugging Face BERT folder into a checkpoint that training starts from and export reads.

taco import-hf bert-base-uncased imported/bert
taco train --config configs/taco_base.yaml run.init_from=imported/bert
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pretrain.cli import new_program, run_program

if TYPE_CHECKING:
    import torch

    from pretrain.config.sections import ModelSection
    from pretrain.data.tokenizer.base import Tokenizer
    from pretrain.model.hf import HfWeights

app = new_program()


@app.command(epilog="Example: taco import-hf downloads/bert-base-uncased imported/bert_base")
def import_hf(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Hugging Face folder: config.json, and model.safetensors or pytorch_model.bin, whole or in shards"
        ),
    ],
    out: Annotated[Path, typer.Argument(help="folder for the checkpoint; must not exist")],
    fresh_head: Annotated[
        bool, typer.Option("--fresh-head", help="draw the MLM head from --seed if the folder lacks it; nothing else")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="seed of a fresh head")] = 1234,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="the model's vocab.txt, .model, tokenizer.json or their folder, instead of FOLDER's"),
    ] = None,
    cased: Annotated[bool, typer.Option("--cased", help="--tokenizer is a vocab.txt that keeps case")] = False,
) -> None:
    """Convert a Hugging Face `BertForMaskedLM` to a weights checkpoint; the exact inverse of `taco export`."""
    from pretrain.data.tokenizer.load import load_tokenizer
    from pretrain.errors import ConfigError, DataError
    from pretrain.model.hf_names import listing

    if out.exists():
        raise DataError(f"{out}: exists; choose a new folder")
    if cased and tokenizer is None:
        raise ConfigError("--cased says how to read --tokenizer, which is not given; name the vocab.txt with it")
    given = None if tokenizer is None else load_tokenizer(tokenizer, cased=cased)
    missing, unused = import_folder(
        folder, out, fresh_head=fresh_head, seed=seed, tokenizer=given, say=lambda line: typer.echo(line)
    )
    typer.echo(f"imported {folder} to {out}")
    if missing:
        typer.echo(f"drawn from seed {seed}, not in the folder: {', '.join(missing)}")
    if unused:
        typer.echo(f"left out, not part of BERT pretraining ({len(unused)}): {listing(list(unused))}")


def import_folder(
    folder: Path,
    out: Path,
    *,
    fresh_head: bool = False,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write the checkpoint; returns the tensors of the head that were drawn, and those that are not used.

    Args:
        tokenizer: the model's, if the folder lacks it.
        say: is told in one line each what was read, renamed, converted and cut.

    Raises:
        DataError: not a BERT folder, a model that post-LN BERT cannot express, tensors that cannot be its weights, or
            a missing head without `fresh_head`.
    """
    from pretrain.errors import DataError
    from pretrain.hf_reading.tensor_files import read_tensors
    from pretrain.hf_reading.tokenizer import load_folder_tokenizer
    from pretrain.model.hf import hf_name

    try:
        config = _read_config(folder)
        section = _section(folder, config)
        own_tokenizer = load_folder_tokenizer(folder) if tokenizer is None else None
        tensors, source = read_tensors(folder)
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be read: {error.strerror or error}") from None
    tokenizer = tokenizer or own_tokenizer
    try:
        converted, notes = _convert(tensors, section, tokenizer)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    drawn = tuple(hf_name(name, section) for name in converted.missing)
    if drawn and not fresh_head:
        raise DataError(
            f"{source}: has no head for masked words, {', '.join(drawn)} missing; import a BertForMaskedLM, or add "
            "--fresh-head to draw these tensors at random"
        )
    vocab_size = _vocab_size(folder, config, converted, tokenizer)
    for note in (_describe(source, tensors, section, vocab_size), *notes):
        say(note)
    if tokenizer is None:
        say(
            f"{folder} holds no tokenizer: nothing can check that the data fits it, and padding rows stay; "
            "--tokenizer names one"
        )
    weights = converted.state | _fresh(section, vocab_size, seed, converted.missing)
    _write(folder, out, section, config, tokenizer, weights, copies_tokenizer=own_tokenizer is not None)
    return drawn, converted.unused


def _convert(
    tensors: dict[str, torch.Tensor], section: ModelSection, tokenizer: Tokenizer | None
) -> tuple[HfWeights, list[str]]:
    """Our weights, and what was renamed, converted and cut on the way."""
    from pretrain.hf_reading.values import as_weights, without_padding
    from pretrain.model.hf import from_hf_state_dict, used_hf_names
    from pretrain.model.hf_names import check_layers, name_tensors

    named = name_tensors(tensors)
    check_layers(named.tensors, section.num_layers)
    notes = [] if named.example is None else [f"{named.example[0]} is read as {named.example[1]}, and so on"]
    weights, converted = as_weights(named.tensors, used_hf_names(section))
    cut: list[str] = []
    if tokenizer is not None:
        weights, cut = without_padding(weights, tokenizer)
    return from_hf_state_dict(weights, section), [*notes, *converted, *cut]


def _describe(source: str, tensors: dict[str, torch.Tensor], section: ModelSection, vocab_size: int) -> str:
    return (
        f"{source}: {len(tensors)} tensors; {section.num_layers} layers, hidden size {section.hidden_size}, "
        f"{section.num_attention_heads} heads, {vocab_size:,} words"
    )


def _vocab_size(folder: Path, config: dict[str, Any], converted: HfWeights, tokenizer: Tokenizer | None) -> int:
    from pretrain.errors import DataError
    from pretrain.model.hf import WORD

    stated, num_words = config["vocab_size"], converted.state[WORD].shape[0]
    if stated != num_words and tokenizer is None:
        raise DataError(
            f"{folder}: config.json says vocab_size {stated}, the word embeddings have {num_words} rows; "
            "set it to what the weights have, or name the model's tokenizer with --tokenizer"
        )
    return num_words


def _pad_id(config: dict[str, Any], vocab_size: int) -> int:
    """The id of the padding token, 0 where config.json gives none that there is."""
    stated = config.get("pad_token_id")
    return stated if type(stated) is int and 0 <= stated < vocab_size else 0


def _read_config(folder: Path) -> dict[str, Any]:
    from pretrain.errors import DataError
    from pretrain.hf_reading.what_it_is import check_is_content, explain_no_config

    path = folder / "config.json"
    if not (path.exists() or path.is_symlink()):
        raise DataError(explain_no_config(folder))
    check_is_content(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; fetch it again") from None
    size = config.get("vocab_size") if isinstance(config, dict) else None
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise DataError(f"{path}: expected the configuration of a BERT model with its vocab_size, found {size!r}")
    return config


def _section(folder: Path, config: dict[str, Any]) -> ModelSection:
    from pretrain.errors import DataError
    from pretrain.model.hf import model_section_from_hf

    try:
        return model_section_from_hf(config)
    except DataError as error:
        raise DataError(f"{folder}: {error}") from None


def _fresh(section: ModelSection, vocab_size: int, seed: int, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The initial values that a run would give these parameters."""
    from pretrain.model.hf import full_shape
    from pretrain.model.initialise import initial_value

    shapes = {name: full_shape(name, section, vocab_size=vocab_size) for name in names}
    return {name: initial_value(name, shape, section.initializer_range, seed) for name, shape in shapes.items()}


def _write(
    folder: Path,
    out: Path,
    section: ModelSection,
    config: dict[str, Any],
    tokenizer: Tokenizer | None,
    weights: dict[str, torch.Tensor],
    *,
    copies_tokenizer: bool,
) -> None:
    """One checkpoint of step 0 in `out`, committed like any other."""
    from pretrain.checkpoint.manifest import CheckpointManifest, Layout
    from pretrain.checkpoint.store import CheckpointStore
    from pretrain.checkpoint.weights import write_weights
    from pretrain.errors import DataError
    from pretrain.hf_reading.tokenizer import copy_tokenizer
    from pretrain.model.hf import WORD

    manifest = CheckpointManifest(
        kind="weights",
        step=0,
        consumed_samples=0,
        layout=Layout(data=1, tensor=1, pipeline=1, zero_stage=0, precision="fp32"),
        model=section.model_dump(mode="json"),
        vocab_size=weights[WORD].shape[0],
        tokenizer_sha256=tokenizer.info.sha256 if tokenizer else "",
        config_sha256=hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        pad_token_id=tokenizer.special.pad if tokenizer else _pad_id(config, weights[WORD].shape[0]),
    )
    gathered = out.with_name(f".{out.name}.tokenizer") / "tokenizer"
    try:
        shutil.rmtree(gathered.parent, ignore_errors=True)
        gathered.parent.mkdir(parents=True)
        if tokenizer is not None:
            copy_tokenizer(
                folder if copies_tokenizer else None, tokenizer, gathered, max_length=section.max_position_embeddings
            )
        store = CheckpointStore(out, keep=1)
        store.prepare()
        store.save(manifest, lambda target: [write_weights(target, weights)], (gathered,) if tokenizer else ())
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error}; free space or choose another folder") from None
    finally:
        shutil.rmtree(gathered.parent, ignore_errors=True)
        with contextlib.suppress(OSError):  # holds the checkpoint, if all went well
            out.rmdir()


if __name__ == "__main__":
    run_program(app, name="python -m pretrain.import_hf")
