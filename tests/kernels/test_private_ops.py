"""The private operator of PyTorch against its public formula, and what runs where it is missing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from selfevo.kernels import private_ops

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
CLOSE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_attention_and_its_logsumexp_agree_with_the_formula(dtype: torch.dtype, biased: bool) -> None:
    queries = normal(2, 3, 5, 8, dtype=dtype)
    keys, values = normal(2, 3, 37, 8, dtype=dtype, seed=1), normal(2, 3, 37, 8, dtype=dtype, seed=2)
    bias = normal(2, 1, 5, 37, dtype=dtype, seed=3) if biased else None
    found = private_ops.attention_and_logsumexp(queries, keys, values, bias)
    formula = private_ops.attention_and_logsumexp_formula(queries, keys, values, bias)
    exact = F.scaled_dot_product_attention(
        queries.double(), keys.double(), values.double(), attn_mask=None if bias is None else bias.double()
    )
    for mixed, sums in (found, formula):
        assert mixed.dtype == dtype
        assert_near(mixed, exact, dtype)
        assert_near(sums, formula[1], dtype)


def test_the_formula_stands_in_where_the_operator_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(1, 2, 3, 8, dtype=torch.float32)
    before = private_ops.attention_and_logsumexp(x, x, x, None)
    monkeypatch.setattr(private_ops, "_OPERATOR", None)
    for one, other in zip(before, private_ops.attention_and_logsumexp(x, x, x, None)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
