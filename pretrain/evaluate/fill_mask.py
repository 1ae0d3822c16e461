"""`taco fill-mask`: what an exported model puts in place of [MASK]; it is loaded by Hugging Face alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pretrain.cli import new_program, run_program

app = new_program()


@app.command(epilog='Example: taco fill-mask runs/quickstart/export "He looked at the [MASK] and smiled."')
def fill_mask(
    model: Annotated[Path, typer.Argument(help="exported Hugging Face folder", readable=False)],
    texts: Annotated[list[str], typer.Argument(help="sentences, each with one [MASK]")],
    top: Annotated[int, typer.Option(min=1, help="candidates per mask")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
) -> None:
    """Show the likeliest tokens for [MASK] in each text."""
    answers = predict(model, texts, top)
    if as_json:
        rows = [{"text": text, "candidates": predictions} for text, predictions in zip(texts, answers, strict=True)]
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    for text, predictions in zip(texts, answers, strict=True):
        candidates = ", ".join(f"{c['token']} {100 * c['probability']:.1f} %" for c in predictions)
        typer.echo(f"{text}\n    {candidates}")


def predict(model: Path, texts: list[str], top: int) -> list[list[dict[str, Any]]]:
    """For each text the `top` likeliest tokens of its mask with their probabilities.

    Raises:
        DataError: the folder is not an exported model, or a text is too long or does not have exactly one mask.
    """
    _check_readable(model)
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForMaskedLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    from pretrain.errors import DataError

    if not (model / "config.json").is_file():
        raise DataError(f"{model}: no config.json; give a folder that `taco export` wrote")
    transformers_logging.disable_progress_bar()
    try:
        # Explicit, because transformers would otherwise ask at a terminal whether it may run the folder's own code.
        options = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(str(model), **options)
        network = AutoModelForMaskedLM.from_pretrained(str(model), **options, use_safetensors=True).eval()
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{model}: cannot be loaded ({error}); write it again with `taco export`") from None
    num_tokens = network.config.vocab_size
    # The tokenizer of an export knows how long training rows were; other folders may say nothing.
    max_tokens = int(min(network.config.max_position_embeddings, tokenizer.model_max_length))
    if tokenizer.mask_token_id is None:
        raise DataError(f"{model}: its tokenizer has no mask token; export a checkpoint with the tokenizer of its data")
    if len(tokenizer) > num_tokens:
        raise DataError(
            f"{model}: its tokenizer has {len(tokenizer)} pieces, the model only {num_tokens}; take both of one model"
        )
    answers = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
        masks = (ids[0] == tokenizer.mask_token_id).nonzero()
        if len(masks) != 1:
            mask = tokenizer.mask_token
            raise DataError(f"text {text!r}: expected one {mask}, found {len(masks)}; write {mask} for one word of it")
        if ids.shape[1] > max_tokens:
            raise DataError(f"text {text!r}: has {ids.shape[1]} tokens, the model reads {max_tokens}; shorten it")
        with torch.no_grad():
            probabilities = network(input_ids=ids).logits[0, int(masks[0])].softmax(-1).topk(min(top, num_tokens))
        tokens = tokenizer.convert_ids_to_tokens(probabilities.indices.tolist())
        pairs = zip(tokens, probabilities.values.tolist(), strict=True)
        answers.append([{"token": token, "probability": value} for token, value in pairs])
    return answers


def _check_readable(folder: Path) -> None:
    """Name a file that may not be read; the libraries call it missing or damaged."""
    from pretrain.errors import DataError

    try:
        for path in folder.iterdir():
            if path.is_file():
                path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be read: {error.strerror or error}") from None


if __name__ == "__main__":
    run_program(app, name="python -m pretrain.evaluate.fill_mask")
