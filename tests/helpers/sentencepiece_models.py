"""Small SentencePiece models, learnt on the spot, so that tests need no shared data."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

LINES = [
    "the cat sat on the mat, unable to see " + "".join(chr(97 + (i * j) % 26) for j in range(9)) for i in range(60)
]


def train_sentencepiece(folder: Path, kind: str = "unigram", lines: Sequence[str] = LINES, **options: object) -> Path:
    """small.model in `folder`; `options` are those of the library."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    options = {"vocab_size": 70, "hard_vocab_limit": False, **options}
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type=kind, minloglevel=4, **options
    )
    path = folder / "small.model"
    path.write_bytes(model.getvalue())
    return path
