"""What to say of names on the command line that are no files: hub datasets, addresses, brackets in names."""

from __future__ import annotations

import glob
import os
import re

from data_tools.readers.hub import PREFIX

_HUB_ADDRESS = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/datasets/([\w.-]+(?:/[\w.-]+)?)/?")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")


def missing(name: str) -> str:
    """What may be meant by a name that is no file, as a continuation of the message; empty if nothing is known."""
    if match := _HUB_ADDRESS.fullmatch(name):
        return f"; for this dataset of the Hugging Face hub give {PREFIX}{match[1]}"
    if "://" in name:
        return "; it is an address, not a file: fetch it first, or give its content to standard input, -"
    if name.startswith("~"):
        return "; the shell replaces ~ only at the beginning of a word without quotes: write the folder's whole name"
    if re.search(r"\{.*(,|\.\.).*\}", name):
        return "; the shell replaces braces only outside quotes: write one name or pattern for each"
    parent, last = os.path.split(name)
    is_name = _HUB_NAME.fullmatch(name) and not os.path.splitext(last)[1]
    if is_name and not (parent and os.path.isdir(parent)):
        return f"; for a dataset of the Hugging Face hub give {PREFIX}{name}"
    return ""


def no_match(pattern: str) -> str:
    """How to write a pattern in which brackets belong to the name of a folder that exists; empty if none does."""
    parts = pattern.split("/")
    for number in range(len(parts) - 1, 0, -1):
        folder, rest = "/".join(parts[:number]), "/".join(parts[number:])
        if os.path.isdir(folder):
            escaped = glob.escape(folder)
            return f"; its folder has brackets in its name, so write {escaped}/{rest}" if escaped != folder else ""
    return ""
