"""Rounding to FP8 in Triton against its twin."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from pretrain.kernels.fp8_cast import FORWARD_DTYPE, GRADIENT_DTYPE, cast_to_fp8


def exact_values(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Numbers of the format, the largest among them, times a power of 2: the cast need not round them."""
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    value = codes.view(dtype).float().nan_to_num(1.0, 1.0, 1.0)
    value[0, 0] = -torch.finfo(dtype).max
    return (value / 8).bfloat16()


@pytest.mark.parametrize("dtype", [FORWARD_DTYPE, GRADIENT_DTYPE])
@pytest.mark.parametrize("shape", [(1, 16), (70, 48), (130, 80)])
def test_equals_its_twin(dtype: torch.dtype, shape: tuple[int, int], device: torch.device) -> None:
    values = [exact_values(shape, dtype)]
    if device.type == "cuda":  # Triton's interpreter rounds otherwise than a GPU
        values.append(torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16())
    for value in values:
        found, expected = (
            cast_to_fp8(value.to(device), dtype, columns=True, kernels=kernels) for kernels in ("triton", "torch")
        )
        assert_close(found.scale, expected.scale, rtol=1e-6, atol=0)
        assert found.columns_FQ is not None
        assert found.rows_NF is not None
        assert expected.rows_NF is not None
        assert found.columns_FQ.shape == (shape[1], -(-shape[0] // 16) * 16)
        assert torch.equal(found.columns_FQ.float()[:, : shape[0]], found.rows_NF.float().t())
        assert not found.columns_FQ.float()[:, shape[0] :].any()
        assert torch.equal(found.rows_NF.float(), expected.rows_NF.float())


@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(kernels: str, bad: float, device: torch.device) -> None:
    value = torch.ones(3, 16, device=device)
    value[1, 2] = bad
    found = cast_to_fp8(value, GRADIENT_DTYPE, kernels=kernels)  # type: ignore[arg-type]
    assert found.rows_NF is not None
    assert not found.rows_NF.float()[1, 2].isfinite()


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_zeros_stay_zeros(kernels: str, device: torch.device) -> None:
    found = cast_to_fp8(torch.zeros(2, 16, device=device), FORWARD_DTYPE, rows=False, columns=True, kernels=kernels)  # type: ignore[arg-type]
    assert found.rows_NF is None
    assert found.columns_FQ is not None
    assert found.scale > 0
    assert not found.columns_FQ.float().any()
