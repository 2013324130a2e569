"""Private operators of PyTorch against their public formulas, and what runs where they are missing."""

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


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_a_softmax_agrees_with_the_formula(dtype: torch.dtype) -> None:
    scores, grad = normal(4, 7, 33, dtype=dtype), normal(4, 7, 33, dtype=dtype, seed=1)
    probabilities = scores.softmax(-1)
    exact = scores.double().requires_grad_()
    (expected,) = torch.autograd.grad(exact.softmax(-1), exact, grad.double())
    for backward in (private_ops.softmax_backward, private_ops.softmax_backward_formula):
        assert_near(backward(grad, probabilities), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_silu_agrees_with_the_formula(dtype: torch.dtype) -> None:
    x, grad = 4 * normal(9, 33, dtype=dtype), normal(9, 33, dtype=dtype, seed=1)
    exact = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(F.silu(exact), exact, grad.double())
    assert_near(private_ops.silu_backward_formula(grad, x), expected, dtype)
    written = grad.clone()
    assert private_ops.silu_backward_(written, x) is written
    assert_near(written, expected, dtype)


def test_the_formulas_stand_in_where_an_operator_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, grad = normal(3, 5, dtype=torch.float32), normal(3, 5, dtype=torch.float32, seed=1)
    queries = normal(1, 2, 3, 8, dtype=torch.float32)
    before = (
        private_ops.softmax_backward(grad, x.softmax(-1)),
        private_ops.silu_backward_(grad.clone(), x),
        *private_ops.attention_and_logsumexp(queries, queries, queries, None),
    )
    monkeypatch.setattr(private_ops, "_operator", lambda name: None)
    monkeypatch.delattr(torch, "_softmax_backward_data")
    after = (
        private_ops.softmax_backward(grad, x.softmax(-1)),
        private_ops.silu_backward_(grad.clone(), x),
        *private_ops.attention_and_logsumexp(queries, queries, queries, None),
    )
    for one, other in zip(before, after):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
