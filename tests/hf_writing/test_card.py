"""The card claims what the checkpoint says, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pretrain.checkpoint.manifest import CheckpointManifest, Layout
from pretrain.config.sections import ModelSection
from pretrain.hf_writing.card import model_card
from pretrain.hf_writing.training import Training

TRAINED = Training(1000, 64_000, 128, start=None, is_imported=False, has_contrast=True)
DATASET = {"prefix": "data/train", "documents": 10, "tokens": 9000, "digest": "d1" * 32}


def card(training: Training, **record: Any) -> str:
    manifest = CheckpointManifest(
        kind="training",
        step=training.steps,
        consumed_samples=training.rows,
        layout=Layout(1, 1, 1, 0, "fp32"),
        model={},
        vocab_size=1000,
        tokenizer_sha256="",
        config_sha256="c0" * 32,
        pad_token_id=0,
        data=(DATASET,),
    )
    values = {"model_max_length": 128, "logits_difference": 1e-7, "manifest_sha256": "m0" * 32, **record}
    return model_card(manifest, ModelSection(max_position_embeddings=512), training, values)


@pytest.mark.parametrize(
    ("training", "said", "not_said"),
    [
        (
            TRAINED,
            [
                "# BERT, step 1,000",
                "TACO token-level contrastive loss: 1,000 steps, 64,000 rows of 128 tokens",
                "Only positions 0 to 127 were trained",
                "Positions 128 to 511 were never",
                "--max-positions 128",
                "data/train",
            ],
            ["Continued"],
        ),
        (replace(TRAINED, seq_length=512), ["rows of 512 tokens"], ["Only positions", "--max-positions"]),
        (replace(TRAINED, has_contrast=False), ["with masked language modelling: 1,000"], ["TACO", "taco]"]),
        (
            replace(TRAINED, start="imported/bert"),
            ["Continued from the weights of `imported/bert`", "1,000 steps", "positions 128 to 511 were in none"],
            ["Only positions", "random", "Pretrained with"],
        ),
        (replace(TRAINED, seq_length=None), ["1,000 steps, 64,000 rows."], ["positions 128"]),
        (
            replace(TRAINED, steps=0, rows=0, is_imported=True),
            ["# BERT, imported weights", "imported from elsewhere and have not been trained since"],
            ["step ", "rows", "TACO", "taco]", "Pretrained", "data/train", "of the run"],
        ),
        (
            replace(TRAINED, steps=0, rows=0),
            ["# BERT, untrained", "has taken no step yet"],
            ["rows", "TACO", "Pretrained with", "data/train", "0 steps"],
        ),
    ],
)
def test_the_card_says_what_is_known(training: Training, said: list[str], not_said: list[str]) -> None:
    text = card(training)
    assert [words for words in said if words not in text] == [], text
    assert [words for words in not_said if words in text] == [], text


def test_without_a_tokenizer_none_is_loaded() -> None:
    assert "AutoTokenizer" not in card(TRAINED, model_max_length=None)
