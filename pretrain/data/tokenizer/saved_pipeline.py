"""What makes a `tokenizers` pipeline one that transformers loads: special tokens, their place around a text, settings.

Whatever the given tokenizer says is kept: flags of its added tokens (`lstrip` and others), its post-processor, its
normalizer. Only what it lacks is added, so that the saved folder gives the ids of training rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pretrain.data.tokenizer.info import SpecialIds
from pretrain.runlog import get_logger

log = get_logger(__name__)


def complete_pipeline(pipeline: Any, name: str, tokens: Mapping[str, str], special: SpecialIds) -> None:
    """Give `pipeline` the special tokens and the frame [CLS] text [SEP] that it lacks; truncation and padding go.

    `tokens` are the special tokens by role, `special` their ids, `name` that of the tokenizer in messages.
    """
    from tokenizers import AddedToken

    pipeline.no_truncation()
    pipeline.no_padding()
    known = {token.content: token for token in pipeline.get_added_tokens_decoder().values()}
    takes = _spaces_of_a_mask(pipeline)
    for role, token in tokens.items():
        if token not in known:
            flags = takes if role == "mask" else {}
            pipeline.add_special_tokens([AddedToken(token, special=True, normalized=False, **flags)])
        elif role == "mask" and takes["lstrip"] and not known[token].lstrip:
            log.warning(
                '%s: %s has "lstrip": false among its added_tokens, so a space before it becomes a piece of its own, '
                "which no training row shows; it is kept as given: for good predictions set it to true in the file "
                "and make the dataset again",
                name,
                token,
            )
    _frame(pipeline, name, tokens, special)


def _spaces_of_a_mask(pipeline: Any) -> dict[str, bool]:
    """Which spaces beside a mask belong to it, as flags of an added token.

    In training a mask takes the place of a whole piece, of which the space before it is a part. So where a space at the
    end of a text becomes a piece, the mask takes it. The space after it belongs to the next piece, which some pipelines
    give it even without a space; then the mask takes that space too, or there would be two.
    """

    def pieces(text: str) -> list[str]:
        if pipeline.normalizer is not None:
            text = pipeline.normalizer.normalize_str(text)
        if pipeline.pre_tokenizer is None:
            return [text]
        return [piece for piece, _ in pipeline.pre_tokenizer.pre_tokenize_str(text)]

    is_prefixed = "".join(pieces("a")) != "a"
    return {"lstrip": pieces("a ") != pieces("a"), "rstrip": is_prefixed and pieces(" a") != pieces("a")}


def _frame(pipeline: Any, name: str, tokens: Mapping[str, str], special: SpecialIds) -> None:
    """Put [CLS] and [SEP] around a text where special tokens are asked for, as they are in every training row."""
    from tokenizers import processors

    text = pipeline.encode("a", add_special_tokens=False).ids
    framed = pipeline.encode("a").ids
    if framed == [special.cls, *text, special.sep]:
        return
    cls, sep = tokens["cls"], tokens["sep"]
    frame: Any = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, special.cls), (sep, special.sep)],
    )
    if framed != text:
        log.warning(
            "%s: its post-processor makes ids %s of a text of ids %s; the saved one makes %s, as in training rows",
            name,
            framed,
            text,
            [special.cls, *text, special.sep],
        )
    elif pipeline.post_processor is not None:  # one that only moves offsets, such as ByteLevel
        frame = processors.Sequence([pipeline.post_processor, frame])
    pipeline.post_processor = frame


def settings_of(pipeline_json: str) -> dict[str, Any]:
    """The fields of tokenizer_config.json that repeat what the pipeline does, for classes that build their own.

    transformers' BertTokenizer and BertTokenizerFast replace the normalizer by one of these settings, and versions
    before 5 set `add_prefix_space` of the pre-tokenizer from them.
    """
    fields = json.loads(pipeline_json)
    normalizer, pre_tokenizer = fields.get("normalizer") or {}, fields.get("pre_tokenizer") or {}
    # Rows are padded on the right, and positions count from their first token.
    settings: dict[str, Any] = {
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    if normalizer.get("type") == "BertNormalizer":
        settings["do_lower_case"] = normalizer["lowercase"]
        settings["strip_accents"] = normalizer.get("strip_accents")
        settings["tokenize_chinese_chars"] = normalizer["handle_chinese_chars"]
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    prefixed = [step["add_prefix_space"] for step in steps if "add_prefix_space" in step]
    if prefixed:
        settings["add_prefix_space"] = any(prefixed)
    return settings
