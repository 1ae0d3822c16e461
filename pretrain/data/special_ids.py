"""Which ids of a dataset are not ordinary text, so that masking neither predicts nor draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pretrain.data.tokenizer.info import TokenizerInfo
from pretrain.runlog import get_logger

log = get_logger(__name__)


def special_ids(prefixes: Sequence[str | Path], tokenizer: TokenizerInfo) -> list[int]:
    """Ids, ascending, that the tokenizer beside the datasets `prefixes` (PREFIX.tokenizer) marks as special.

    A vocab.txt has only BERT's five, so its folder is not read. If there is no folder, these five are returned with a
    warning.

    Raises:
        DataError: a folder is damaged, or does not hold the tokenizer that wrote the datasets.
    """
    bert_special = sorted(set(asdict(tokenizer.special).values()))
    if tokenizer.kind == "wordpiece":
        return bert_special
    from pretrain.data.tokenizer.load import find_dataset_tokenizer

    for prefix in prefixes:
        if (dataset_tokenizer := find_dataset_tokenizer(prefix, tokenizer)) is not None:
            return dataset_tokenizer.special_ids()
    log.warning(
        "%s.tokenizer is missing: masking treats only the five BERT tokens of %s as special",
        ", ".join(map(str, prefixes)),
        tokenizer.name,
    )
    return bert_special
