"""A dataset that can be learnt and a model that trains in seconds, for tests of whole runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import yaml

from pretrain.data.dataset.dataset_writer import IndexedDatasetWriter
from pretrain.data.tokenizer.load import load_tokenizer

VOCAB_SIZE = 64


def write_cyclic_dataset(prefix: Path, *, num_documents: int = 60, seed: int = 0, words: str = "word") -> None:
    """Documents that count upwards from a random start: a masked token follows from its neighbours.

    The vocabulary is made of `words`; datasets with other words have another tokenizer.
    """
    generator = np.random.default_rng(seed)
    vocabulary = prefix.with_name(f"{words}.txt")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    ordinary = [f"{words}{index}" for index in range(VOCAB_SIZE - len(special))]
    vocabulary.write_text("\n".join([*special, *ordinary]) + "\n")
    tokenizer = load_tokenizer(vocabulary)
    shutil.rmtree(f"{prefix}.tokenizer", ignore_errors=True)
    tokenizer.save_pretrained(Path(f"{prefix}.tokenizer"))
    with IndexedDatasetWriter(prefix, "uint16", overwrite=True) as writer:
        for _ in range(num_documents):
            length, start = int(generator.integers(8, 60)), int(generator.integers(0, VOCAB_SIZE))
            ids = len(special) + (start + np.arange(length)) % len(ordinary)
            writer.add_document([ids.astype(np.uint16)])
        writer.finalize(tokenizer=tokenizer.info, command=["test"])


def small_config(folder: Path, **changes: object) -> dict[str, dict[str, object]]:
    """The tree of a run of seconds in `folder`; `changes` are `section__key=value`."""
    tree: dict[str, dict[str, object]] = {
        "run": {"output_dir": str(folder / "run"), "seed": 7, "device": "cpu", "tensorboard": False},
        "data": {
            "train": [str(folder / "train")],
            "validation": [str(folder / "validation")],
            "seq_length": 24,
        },
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "ffn_hidden_size": 64,
            "max_position_embeddings": 32,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
        },
        "objective": {"num_negatives": 8},
        "train": {
            "steps": 8,
            "micro_batch_size": 4,
            "global_batch_size": 16,
            "log_every": 1,
            "eval_every": 4,
            "eval_batches": 3,
        },
        "optim": {"lr": 3e-3, "warmup_steps": 2, "clip_grad_norm": 0.5},
        "checkpoint": {"every_steps": 3},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            tree.setdefault(section, {})[key] = value
        else:
            tree[name] = value  # type: ignore[assignment]
    return tree


def write_small_run(folder: Path, **changes: object) -> Path:
    """Datasets and configuration of a small run in `folder`; the configuration's path."""
    if not (folder / "train.json").exists():
        write_cyclic_dataset(folder / "train", seed=1)
        write_cyclic_dataset(folder / "validation", num_documents=20, seed=2)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(small_config(folder, **changes)))
    return path
