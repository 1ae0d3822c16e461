"""Compiles kernels for a GPU with Triton's own compiler, where there is no GPU: the interpreter accepts more than it.

A process of its own, since a kernel is for the interpreter or for the compiler from its definition on. Prints a JSON
object: for every kernel below the bytes of shared memory that a program takes.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Launch:
    """A kernel with the types of its arguments as some launch gives them; the others are constants, or left out."""

    module: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4

    def compile(self) -> Any:
        """The compiled kernel; its pointers are aligned to 16 bytes, as torch's are."""
        function = getattr(importlib.import_module(f"pretrain.kernels.{self.module}"), self.kernel)
        place = {name: (number,) for number, name in enumerate(function.arg_names)}
        source = ASTSource(
            fn=function,
            signature={name: self.types.get(name, "constexpr") for name in function.arg_names},
            constexprs={place[name]: self.constants.get(name) for name in function.arg_names if name not in self.types},
            attrs={place[name]: [["tt.divisibility", 16]] for name, kind in self.types.items() if kind[0] == "*"},
        )
        return triton.compile(source, target=HOPPER, options={"num_warps": self.num_warps})


_TABLE = {"positive": "*i32", "listed": "*i32", "before": "*i32", "key": "*i64", "num_rows": "i32"}
_TOKENS = {"valid": "*u8", "segment": "*i64", "numbers": "*i64"}


def _contrast(size: int, block: int, vectors: str, table: str) -> Launch:
    types = {"hidden": vectors, "embedding": vectors, "unit": table, "anchor": "*u8", "places": "*i64", **_TABLE}
    types |= {"loss": "*fp32", "is_anchor": "*fp32", "gradient": "*fp32", "inverse_temperature": "fp32"}
    types |= {"own_first": "i32", "own_end": "i32", "num_tokens": "i32"}
    constants = {"LENGTH": 256, "NUM_NEGATIVES": 50, "SIZE": size, "BLOCK": block}
    constants |= {"ANCHORS": 1, "NEEDS_GRADIENT": True}
    return Launch("contrast", "_contrast_kernel", types, constants, num_warps=1)


LAUNCHES = {
    "positives": Launch("pairs", "_tabulate_kernel", _TOKENS | _TABLE, {"LENGTH": 500, "WINDOW": 2, "BLOCK": 64}),
    "negatives": Launch(
        "pairs",
        "_write_negatives_kernel",
        {"valid": "*u8", "listed": "*i32", "before": "*i32", "key": "*i64", "negative": "*i64", "num_rows": "i32"},
        {"LENGTH": 256, "NUM_NEGATIVES": 50, "BLOCK": 64},
    ),
    "unit vectors": Launch(
        "contrast",
        "_unit_kernel",
        {"hidden": "*bf16", "embedding": "*bf16", "unit": "*fp16", "num_tokens": "i32"},
        {"SIZE": 768, "VECTORS": 2, "BLOCK": 1024},
    ),
    "contrast of 1,024 features in bf16": _contrast(1024, 1024, "*bf16", "*fp16"),
    "contrast of 1,024 features in fp32": _contrast(1024, 1024, "*fp32", "*fp32"),
    "mean": Launch(
        "contrast",
        "_mean_kernel",
        {"loss": "*fp32", "is_anchor": "*fp32", "mean": "*fp32", "num_tokens": "i32"},
        {"BLOCK": 2048},
        num_warps=8,
    ),
    "gradients": Launch(
        "contrast",
        "_scale_kernel",
        {
            "gradient": "*fp32",
            "mean": "*fp32",
            "grad_loss": "*fp32",
            "grad_hidden": "*bf16",
            "grad_embedding": "*bf16",
            "num_elements": "i32",
        },
        {"BLOCK": 2048},
    ),
}

if __name__ == "__main__":
    print(json.dumps({name: launch.compile().metadata.shared for name, launch in LAUNCHES.items()}))
