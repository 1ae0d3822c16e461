"""Which ids of a dataset are no ordinary text, so that masking neither predicts nor draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pretrain.data.tokenizer.info import TokenizerInfo
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
    from pretrain.data.tokenizer.load import find_dataset_tokenizer

    for prefix in prefixes:
        if (found := find_dataset_tokenizer(prefix, tokenizer)) is not None:
            return found.special_ids()
    log.warning(
        "%s.tokenizer is missing: masks know five special tokens of %s only",
        ", ".join(map(str, prefixes)),
        tokenizer.name,
    )
    return the_five
