"""`taco export`: turns a checkpoint into a Hugging Face folder, which is checked before it appears.

Weights are read from the verified checkpoint, written beside the target, loaded back by Hugging Face's own classes and
compared with our model's forward pass. Only a folder that passed is renamed to its final name.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pretrain.cli import new_program, run_program

if TYPE_CHECKING:
    import torch

    from pretrain.checkpoint.manifest import CheckpointManifest
    from pretrain.config.sections import ModelSection
    from pretrain.hf_writing.target import Target
    from pretrain.hf_writing.training import Training

app = new_program()

# fp32 sums in another order differ by about 1e-7 of the largest logit per layer.
LOGITS_TOLERANCE = 1e-5


@app.command(epilog="Example: taco export runs/taco_base exported/taco_base")
def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="run folder (its newest checkpoint) or a step-NNNNNNN folder", readable=False)
    ],
    out: Annotated[Path, typer.Argument(help="Hugging Face folder to write")],
    max_positions: Annotated[
        int | None, typer.Option(min=2, help="keep only the first positions, such as those that were trained")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace the files of an earlier export in OUT; others stay")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
) -> None:
    """Write a checkpoint as a Hugging Face `BertForMaskedLM` folder: safetensors, config, tokenizer, model card.

    At the end, the logits of the exported folder are compared with those of the training model; a folder that differs
    is removed.
    """
    from pretrain.checkpoint.run_record import find_own_checkpoint

    source = find_own_checkpoint(checkpoint)
    result = export_checkpoint(source, out, overwrite=overwrite, max_positions=max_positions)
    for warning in result["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    elif result["is_new"]:
        typer.echo(
            f"exported {source} to {out}\n"
            f"largest difference of logits, Hugging Face against the training model: {result['logits_difference']:.2e}"
        )
    else:
        typer.echo(f"{out}: holds the export of {source} already")


def export_checkpoint(
    source: Path, out: Path, *, overwrite: bool = False, max_positions: int | None = None
) -> dict[str, Any]:
    """Export the checkpoint folder `source` to `out`; returns the record, `is_new` and `warnings`.

    `max_positions` leaves out the later rows of the position embeddings.

    Raises:
        CheckpointError: the checkpoint is damaged, or the written folder does not give the same logits.
        ConfigError: the model has fewer positions than `max_positions`.
        DataError: `out` holds something that may not be replaced, or it cannot be written.
    """
    from safetensors import SafetensorError

    from pretrain.checkpoint.manifest import MANIFEST, CheckpointManifest
    from pretrain.config.sections import ModelSection
    from pretrain.errors import ConfigError
    from pretrain.hf_writing.target import Target
    from pretrain.hf_writing.training import read_training
    from pretrain.run_folder import revision

    manifest = CheckpointManifest.load(source)
    section = ModelSection.model_validate(manifest.model)
    positions = section.max_position_embeddings
    if max_positions is not None and max_positions > positions:
        raise ConfigError(f"--max-positions {max_positions}: the model has {positions}; choose at most as many")
    record = {
        "checkpoint": str(source),
        "step": manifest.step,
        "manifest_sha256": hashlib.sha256((source / MANIFEST).read_bytes()).hexdigest(),
        "config_sha256": manifest.config_sha256,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "data": list(manifest.data),
        "max_position_embeddings": max_positions or positions,
        "revision": revision(),
    }
    target = Target(out, source)
    if (old := _find_same(target, record, overwrite)) is not None:
        return {**old, "is_new": False, "warnings": []}
    try:
        training = read_training(source, manifest)
        record = _write(source, manifest, training, target, record)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors reports a full disk
        raise target.unwritable(error) from None
    return {**record, "is_new": True, "warnings": _warnings(training, target, record)}


def _find_same(target: Target, record: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The record of the export in the folder if it is the one asked for, and whole; None if one is to be written.

    Raises:
        DataError: there is another export, or a damaged one, and `overwrite` is not given.
    """
    from pretrain.errors import DataError

    earlier = target.earlier
    if earlier is None:
        return None
    old, key = earlier.record, "max_position_embeddings"
    if old is None:
        found = "holds an export whose taco_export.json is damaged"
    elif old["manifest_sha256"] != record["manifest_sha256"]:
        found = f"holds the export of step {old['step']} ({old.get('checkpoint', 'another checkpoint')})"
    elif old.get(key, record[key]) != record[key]:
        found = f"holds the export of this checkpoint with {old[key]} positions, not {record[key]}"
    elif (damage := earlier.find_damage(target.path)) is None:
        found = "holds the export of this checkpoint by an earlier release, which cannot be verified"
    elif damage:
        more = f" and {len(damage) - 1} more" if len(damage) > 1 else ""
        found = f"holds the export of this checkpoint, but not as it was written: {damage[0]}{more}"
    else:
        return old
    if not overwrite:
        raise DataError(f"{target.named}: {found}; add --overwrite to write it anew, or choose another folder")
    return None


def _warnings(training: Training, target: Target, record: dict[str, Any]) -> list[str]:
    warnings = []
    positions = record["max_position_embeddings"]
    trained = training.trained_positions(positions)
    if trained is not None and trained < positions and not training.start:
        warnings.append(
            f"positions {trained} to {positions - 1} were never trained (data.seq_length {trained}); the tokenizer "
            f"truncates at {trained}, and --max-positions {trained} leaves the others out"
        )
    if target.card_name != "README.md":
        warnings.append(
            f"{target.named}/README.md was edited and is kept; the new card is {target.card_name} beside it"
        )
    return warnings


def _write(
    source: Path, manifest: CheckpointManifest, training: Training, target: Target, record: dict[str, Any]
) -> dict[str, Any]:
    """Write elsewhere, check, then put in place; whatever fails leaves the target as it was."""
    from pretrain import durable
    from pretrain.checkpoint.manifest import load_verified
    from pretrain.checkpoint.weights import read_weights
    from pretrain.config.sections import ModelSection
    from pretrain.hf_writing.card import model_card
    from pretrain.hf_writing.target import EXPORT_RECORD
    from pretrain.hf_writing.tokenizer_files import write_tokenizer
    from pretrain.model.hf import first_positions

    load_verified(source)
    section = ModelSection.model_validate(manifest.model)
    weights, section = first_positions(read_weights(source), section, record["max_position_embeddings"])
    positions = section.max_position_embeddings
    try:
        folder = target.prepare()
        write_model(weights, section, folder, vocab_size=manifest.vocab_size, pad_token_id=manifest.pad_token_id)
        trained = training.trained_positions(positions)
        record = {
            **record,
            "trained_positions": trained,
            "model_max_length": write_tokenizer(source, manifest, folder, trained, positions),
            "logits_difference": _compare_logits(weights, section, manifest.vocab_size, folder),
        }
        card = model_card(manifest, section, training, record)
        (folder / target.card_name).write_text(card, encoding="utf-8")
        for path in folder.iterdir():
            durable.follow_umask(path)
            durable.sync_file(path)
        record["files"] = [asdict(file) for file in durable.folder_records(folder)]
        durable.write_text(folder / EXPORT_RECORD, json.dumps(record, indent=1) + "\n")
        target.publish()
    finally:
        target.discard()
    return record


def write_model(
    weights: dict[str, torch.Tensor], section: ModelSection, folder: Path, *, vocab_size: int, pad_token_id: int
) -> None:
    """Write config.json and model.safetensors with transformers itself, which handles tied weights."""
    from transformers import BertConfig, BertForMaskedLM
    from transformers.utils import logging as transformers_logging

    from pretrain.model.hf import hf_config, to_hf_state_dict

    transformers_logging.disable_progress_bar()  # a bar per file, for a second each
    config = hf_config(section, vocab_size, pad_token_id=pad_token_id)
    model = BertForMaskedLM(BertConfig(**config))
    model.load_state_dict(to_hf_state_dict(weights, section), strict=True)
    model.save_pretrained(folder)


def _compare_logits(weights: dict[str, torch.Tensor], section: ModelSection, vocab_size: int, folder: Path) -> float:
    """The largest difference of any logit between the written folder and the training model, relative to the largest.

    Raises:
        CheckpointError: it is larger than rounding explains.
    """
    import torch
    from transformers import AutoModelForMaskedLM

    from pretrain.errors import CheckpointError
    from pretrain.model.bert import Bert
    from pretrain.model.layer_spec import plain_layers

    ours = Bert(section, vocab_size, plain_layers()).eval()
    ours.load_state_dict(weights)
    theirs = AutoModelForMaskedLM.from_pretrained(str(folder), local_files_only=True, use_safetensors=True).eval()
    generator = torch.Generator().manual_seed(0)
    length = min(64, section.max_position_embeddings)
    ids_BL = torch.randint(0, vocab_size, (2, length), generator=generator)
    segment_BL = torch.ones_like(ids_BL)
    segment_BL[1, length // 2 :] = 0
    with torch.no_grad():
        expected = ours.logits(ids_BL, segment_BL)[segment_BL > 0]
        exported = theirs(input_ids=ids_BL, attention_mask=segment_BL).logits[segment_BL > 0]
    difference = float((exported - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    if not difference <= LOGITS_TOLERANCE:
        raise CheckpointError(
            f"{folder}: not exported: its logits differ from the training model's by {difference:.2e} of the largest "
            f"logit, more than {LOGITS_TOLERANCE:.0e}; please report this with the checkpoint's manifest.json"
        )
    return difference


if __name__ == "__main__":
    run_program(app, name="python -m pretrain.export")
