"""Which ids of a dataset are no ordinary text, so that masking neither predicts nor draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pretrain.data.tokenizer.info import TokenizerInfo
from pretrain.errors import DataError
from pretrain.runlog import get_logger

log = get_logger(__name__)


def special_ids(prefixes: Sequence[str | Path], tokenizer: TokenizerInfo) -> list[int]:
    """Ids, ascending, that the tokenizer beside the datasets `prefixes` (PREFIX.tokenizer) marks as special.

    A vocab.txt has no others than the five of BERT, and its folder is not read. Without any folder these five are
    returned too, and a warning says so.

    Raises:
        DataError: a folder is damaged, or holds another tokenizer than wrote the datasets.
    """
    the_five = sorted(set(asdict(tokenizer.special).values()))
    if tokenizer.kind == "wordpiece":
        return the_five
    folders = [folder for prefix in prefixes if (folder := Path(f"{prefix}.tokenizer")).is_dir()]
    if not folders:
        log.warning(
            "%s.tokenizer is missing: masks know five special tokens of %s only",
            ", ".join(map(str, prefixes)),
            tokenizer.name,
        )
        return the_five
    from pretrain.data.tokenizer.load import load_tokenizer

    found = load_tokenizer(folders[0])
    if found.info.sha256 != tokenizer.sha256:
        raise DataError(
            f"{folders[0]}: holds tokenizer {found.info.name} ({found.info.sha256[:12]}), but the dataset was written "
            f"with {tokenizer.name} ({tokenizer.sha256[:12]}); restore the folder from where the dataset was made"
        )
    return found.special_ids()
