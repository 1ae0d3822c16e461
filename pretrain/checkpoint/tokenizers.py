"""Whether the ids of a checkpoint and of a run's data mean the same words: by the ids, not by the bytes of a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpoint.manifest import CheckpointManifest
from pretrain.data.tokenizer.base import Tokenizer
from pretrain.data.tokenizer.info import TokenizerInfo
from pretrain.data.tokenizer.load import load_dataset_tokenizer
from pretrain.data.tokenizer.same_ids import find_difference
from pretrain.hf_reading.tokenizer import load_folder_tokenizer

_AGAIN = "import its Hugging Face folder again with --tokenizer FILE, the tokenizer that the model was trained with"


@dataclass(frozen=True)
class OtherTokenizer:
    """What differs between the tokenizers of a checkpoint and of a run's data.

    Attributes:
        text: both of them, and an example.
        remedy: what to do so that they agree.
        is_unknown: the checkpoint does not say which tokenizer it had; there are as many ids.
        has_same_size: as many pieces, some of them other ones, so that the weights could be used.
    """

    text: str
    remedy: str
    is_unknown: bool = False
    has_same_size: bool = False


def compare_tokenizers(
    folder: Path, manifest: CheckpointManifest, ours: TokenizerInfo, prefix: str
) -> OtherTokenizer | None:
    """How the tokenizer of a verified checkpoint folder differs from `ours`, which made the dataset `prefix`.

    None if they give the same ids.

    Raises:
        DataError: a tokenizer is damaged.
    """
    same_size = manifest.vocab_size == ours.vocab_size
    if manifest.tokenizer_sha256 == ours.sha256 and same_size:
        return None
    data = f"data.train was made with {_describe(ours)}"
    theirs = _tokenizer_of(folder, manifest)
    if theirs is None:
        hash_there = manifest.tokenizer_sha256[:12]
        if not same_size:
            text = f"has {manifest.vocab_size:,} word embeddings and no tokenizer, {data}"
        elif hash_there:
            text = f"was trained with another tokenizer (sha256 {hash_there}), which {folder} does not hold, {data}"
        else:
            text = f"holds no tokenizer, so nothing shows that its ids mean the same words: {data}"
        return OtherTokenizer(text, _AGAIN, is_unknown=same_size and not hash_there)
    if theirs.vocab_size != manifest.vocab_size:  # of a release that kept padding rows
        return OtherTokenizer(
            f"has {manifest.vocab_size:,} word embeddings for the {theirs.vocab_size:,} pieces of its tokenizer",
            "import its Hugging Face folder again with `taco import-hf`, which leaves out padding rows",
        )
    difference = find_difference(theirs, load_dataset_tokenizer(prefix, ours))
    if difference is None:
        return None
    return OtherTokenizer(
        f"was trained with {_describe(theirs.info)}, {data}: {difference}",
        f"preprocess the data with --tokenizer {folder / 'tokenizer'}",
        has_same_size=same_size,
    )


def _tokenizer_of(folder: Path, manifest: CheckpointManifest) -> Tokenizer | None:
    """The tokenizer in a checkpoint; files that the manifest does not name do not count."""
    is_named = any(record.name.startswith("tokenizer/") for record in manifest.files)
    return load_folder_tokenizer(folder / "tokenizer") if is_named else None


def _describe(info: TokenizerInfo) -> str:
    return f"tokenizer {info.name} (sha256 {info.sha256[:12]}, {info.vocab_size:,} pieces)"
