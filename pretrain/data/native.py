"""The only importer of the C++ extension `pretrain.data._native`; explains a missing or stale build."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path
from typing import Any

from pretrain.data.native_build import sources_digest
from pretrain.errors import MissingExtensionError

_SOURCES = Path(__file__).parents[2] / "csrc"
_BUILD = (
    "build it in the project's root with `python -m pip install -e . --no-build-isolation` "
    "or `python setup.py build_ext --inplace`"
)


@cache
def native() -> Any:
    """The extension module, imported at the first call.

    Raises:
        MissingExtensionError: it has not been built for this interpreter, or was built from other sources than those
            beside it; names the interpreter and the build command.
    """
    try:
        module = importlib.import_module("pretrain.data._native")
    except ImportError as error:
        raise MissingExtensionError(
            f"the C++ extension pretrain.data._native cannot be loaded by {sys.executable} ({error}); {_BUILD}"
        ) from error
    # Beside an installed package there may be another project's csrc.
    in_checkout = sources_digest(_SOURCES) if (_SOURCES / "include" / "taco").is_dir() else ""
    compiled_in = getattr(module, "sources", "unknown")
    if in_checkout and in_checkout != compiled_in:
        raise MissingExtensionError(
            f"the C++ extension {module.__file__} was built from other sources ({compiled_in}) than those in "
            f"{_SOURCES} ({in_checkout}); {_BUILD}"
        )
    return module
