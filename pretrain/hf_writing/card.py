"""The model card of an export: README.md. It says what the checkpoint says, and claims nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.checkpoint.manifest import CheckpointManifest
from pretrain.config.sections import ModelSection
from pretrain.hf_writing.training import Training


def model_card(
    manifest: CheckpointManifest, section: ModelSection, training: Training, record: Mapping[str, Any]
) -> str:
    """The text of the card; `section` is the exported model's shape, `record` the contents of taco_export.json."""
    tags = ["bert", "masked-language-modeling", *(["taco"] if training.is_trained and training.has_contrast else [])]
    shape = (
        f"{section.num_layers} layers, hidden size {section.hidden_size}, {section.num_attention_heads} heads, "
        f"vocabulary {manifest.vocab_size:,}, {section.max_position_embeddings} positions"
    )
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: fill-mask\ntags: [{', '.join(tags)}]\n---",
        f"# {_title(training)}\n\nPost-LN BERT ({shape}). {_history(training)}",
        _length(section, training, record),
        _data(manifest) if training.is_trained else "",
        _hashes(manifest, training, record),
        "The exported logits were compared with those of the checkpoint's model: largest difference "
        f"{record['logits_difference']:.2e}\nrelative to the largest logit.",
        _usage(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(training: Training) -> str:
    if training.is_trained:
        return f"BERT, step {training.steps:,}"
    return "BERT, imported weights" if training.is_imported else "BERT, untrained"


def _history(training: Training) -> str:
    if training.is_imported:
        return (
            "The weights were imported from elsewhere and have not been trained since;\n"
            "what they learnt, and from which text, their origin says."
        )
    if not training.is_trained:
        start = f" from the weights of `{training.start}`" if training.start else ""
        return f"Its run has taken no step yet: the weights are as the run began{start}."
    losses = "masked language modelling" + (
        " and the TACO token-level contrastive loss" if training.has_contrast else ""
    )
    amount = f"{training.steps:,} steps, {training.rows:,} rows"
    if training.seq_length is not None:
        amount += f" of {training.seq_length} tokens"
    if training.start:
        return f"Continued from the weights of `{training.start}`\nwith {losses}: {amount}."
    return f"Pretrained with {losses}: {amount}."


def _length(section: ModelSection, training: Training, record: Mapping[str, Any]) -> str:
    """Which positions were trained, where that is known."""
    positions = section.max_position_embeddings
    trained = training.trained_positions(positions)
    limit = record["model_max_length"]
    text = "" if limit is None else f"The tokenizer truncates at {limit} tokens (`model_max_length`)."
    if trained is None or trained == positions:
        return text
    last = positions - 1
    if training.start:
        return (
            f"Rows had {trained} tokens, so positions {trained} to {last} were in none: they have the embeddings of\n"
            f"the starting weights, less weight decay, with layers that were trained on without them. {text}"
        )
    return (
        f"**Only positions 0 to {trained - 1} were trained**, since rows had {trained} tokens. Positions {trained} to "
        f"{last} were never in a row:\ntheir embeddings are random. Do not give the model longer texts without "
        f"training them. {text}\n`taco export --max-positions {trained}` leaves them out."
    )


def _data(manifest: CheckpointManifest) -> str:
    rows = [
        f"| `{dataset['prefix']}` | {dataset['documents']:,} | {dataset['tokens']:,} | `{dataset['digest'][:16]}` |"
        for dataset in manifest.data
    ]
    return "\n".join(["| data | documents | tokens | digest |", "|---|---|---|---|", *rows]) if rows else ""


def _hashes(manifest: CheckpointManifest, training: Training, record: Mapping[str, Any]) -> str:
    configuration = "imported config.json" if training.is_imported else "configuration of the run"
    hashes = {
        configuration: manifest.config_sha256,
        "tokenizer": manifest.tokenizer_sha256,
        "manifest of the checkpoint": record["manifest_sha256"],
    }
    rows = [f"| {name} | `{digest}` |" for name, digest in hashes.items() if digest]
    return "\n".join(["| hash | sha256 |", "|---|---|", *rows])


def _usage(record: Mapping[str, Any]) -> str:
    if record["model_max_length"] is None:
        return (
            "The checkpoint has no tokenizer.\n\n```python\nfrom transformers import AutoModelForMaskedLM\n"
            'model = AutoModelForMaskedLM.from_pretrained(".")\n```'
        )
    return (
        "```python\n"
        "from transformers import AutoModelForMaskedLM, AutoTokenizer\n"
        'model, tokenizer = AutoModelForMaskedLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")\n'
        'inputs = tokenizer("a text", truncation=True, return_tensors="pt")\n'
        "```"
    )
