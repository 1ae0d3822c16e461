"""`taco export`: turns a checkpoint into a Hugging Face folder, which is checked before it appears.

Weights are read from the verified checkpoint, written beside the target, loaded back by Hugging Face's own classes and
compared with our model's forward pass. Only a folder that passed is renamed to its final name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pretrain.cli import new_program, run_program

if TYPE_CHECKING:
    import torch

    from pretrain.checkpoint.manifest import CheckpointManifest
    from pretrain.config.sections import ModelSection

app = new_program()

EXPORT_RECORD = "taco_export.json"
# fp32 sums in another order differ by about 1e-7 of the largest logit per layer.
LOGITS_TOLERANCE = 1e-5


@app.command(epilog="Example: taco export runs/taco_base exported/taco_base")
def export(
    checkpoint: Annotated[Path, typer.Argument(help="run folder (its newest checkpoint) or a step-NNNNNNN folder")],
    out: Annotated[Path, typer.Argument(help="Hugging Face folder to write")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier export in OUT")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
) -> None:
    """Write a checkpoint as a Hugging Face `BertForMaskedLM` folder: safetensors, config, tokenizer, model card.

    At the end, the logits of the exported folder are compared with those of the training model; a folder that differs
    is removed.
    """
    from pretrain.checkpoint.manifest import find_checkpoint

    source = find_checkpoint(checkpoint)
    result = export_checkpoint(source, out, overwrite=overwrite)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    elif result["is_new"]:
        typer.echo(
            f"exported {source} to {out}\n"
            f"largest difference of logits, Hugging Face against the training model: {result['logits_difference']:.2e}"
        )
    else:
        typer.echo(f"{out}: holds the export of {source} already")


def export_checkpoint(source: Path, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Export the checkpoint folder `source` to `out`; returns whether it is new and how far the logits differ.

    Raises:
        CheckpointError: the checkpoint is damaged, or the written folder does not give the same logits.
        DataError: `out` holds something that may not be replaced, or it cannot be written.
    """
    from safetensors import SafetensorError

    from pretrain.checkpoint.manifest import MANIFEST, CheckpointManifest
    from pretrain.errors import DataError

    manifest = CheckpointManifest.load(source)
    record = {
        "checkpoint": str(source),
        "step": manifest.step,
        "manifest_sha256": hashlib.sha256((source / MANIFEST).read_bytes()).hexdigest(),
        "config_sha256": manifest.config_sha256,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "data": list(manifest.data),
    }
    _tidy(out)
    if out.exists():
        old = _read_record(out)
        if old is not None and old["manifest_sha256"] == record["manifest_sha256"]:
            return {**old, "is_new": False}
        # An export may be replaced; a folder of something else never is.
        if old is None or not overwrite:
            reason = (
                "is no export; remove it" if old is None else f"holds the export of step {old['step']}; add --overwrite"
            )
            raise DataError(f"{out}: exists and {reason}, or choose another folder")
    try:
        return {**_write(source, manifest, out, record), "is_new": True}
    except (OSError, SafetensorError) as error:  # the latter is how safetensors reports a full disk
        raise DataError(f"{out}: cannot be written: {error}; free space or choose another folder") from None


def _read_record(out: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((out / EXPORT_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"manifest_sha256", "step"} <= record.keys() else None


def _write(source: Path, manifest: CheckpointManifest, out: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write beside `out`, check, then rename; whatever fails leaves `out` as it was."""
    from pretrain import durable
    from pretrain.checkpoint.manifest import load_verified
    from pretrain.checkpoint.weights import read_weights
    from pretrain.config.sections import ModelSection

    load_verified(source)
    section = ModelSection.model_validate(manifest.model)
    weights = read_weights(source)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write_model(weights, section, temporary, vocab_size=manifest.vocab_size, pad_token_id=manifest.pad_token_id)
        for name in _tokenizer_files(manifest):
            shutil.copyfile(source / name, temporary / Path(name).name)
        difference = _compare_logits(weights, section, manifest.vocab_size, temporary)
        record = {**record, "logits_difference": difference}
        (temporary / "README.md").write_text(_model_card(manifest, record), encoding="utf-8")
        (temporary / EXPORT_RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for path in temporary.iterdir():
            durable.sync_file(path)
        _replace(temporary, out)
        durable.sync_folder(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return record


def _tokenizer_files(manifest: CheckpointManifest) -> list[str]:
    """The files that the manifest lists; anything else in the folder, a link for example, is ignored."""
    return [record.name for record in manifest.files if Path(record.name).parent == Path("tokenizer")]


def _replace(new: Path, out: Path) -> None:
    """Put `new` in the place of `out`; the older export goes only when the new one is there."""
    old = _replaced(out)
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    try:
        new.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _replaced(out: Path) -> Path:
    """Where an older export waits until the new one is in its place."""
    return out.with_name(f".{out.name}.old")


def _tidy(out: Path) -> None:
    """Clean up after a kill within `_replace`: restore the older export if there is no newer one, else remove it."""
    old = _replaced(out)
    if old.exists() and not out.exists():
        old.rename(out)
    shutil.rmtree(old, ignore_errors=True)


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


def _model_card(manifest: CheckpointManifest, record: dict[str, Any]) -> str:
    data = "\n".join(
        f"| `{dataset['prefix']}` | {dataset['documents']:,} | {dataset['tokens']:,} | `{dataset['digest'][:16]}` |"
        for dataset in manifest.data
    )
    model = manifest.model
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
tags: [bert, masked-language-modeling, taco]
---
# BERT, step {manifest.step:,}

Post-LN BERT pretrained with masked language modelling and the TACO token-level contrastive loss: {model["num_layers"]}
layers, hidden size {model["hidden_size"]}, {model["num_attention_heads"]} heads, vocabulary {manifest.vocab_size:,};
{manifest.consumed_samples:,} rows seen.

| data | documents | tokens | digest |
|---|---|---|---|
{data}

| hash | sha256 |
|---|---|
| configuration of the run | `{manifest.config_sha256}` |
| tokenizer | `{manifest.tokenizer_sha256}` |
| manifest of the checkpoint | `{record["manifest_sha256"]}` |

The exported logits were compared with the training model's: largest difference {record["logits_difference"]:.2e}
relative to the largest logit.

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer
model, tokenizer = AutoModelForMaskedLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
```
"""


if __name__ == "__main__":
    run_program(app, name="python -m pretrain.export")
