"""Matrix products in every layout are the plain ones, to the rounding of their dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from selfevo.kernels.head import allocate_logits, head_logits
from selfevo.kernels.linear import Linear, linear
from selfevo.kernels.lowrank import add_product, product
from selfevo.lora import inject_lora, merge_adapters


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("size", "width"), [(50, 24), (100, 24), (24, 50), (24, 24)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 16, 17, 25, 39, 40, 50, 99, 100, 200])
def test_any_number_of_rows_is_multiplied_like_any_other(
    rows: int, biased: bool, size: int, width: int, dtype: torch.dtype
) -> None:
    """One row, a few, some, and many."""
    x, weight = normal(rows, width, dtype=dtype), normal(size, width, seed=1, dtype=dtype)
    bias = normal(size, seed=2, dtype=dtype) if biased else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    close = {"rtol": 2**-7, "atol": 2**-5} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for inference in (False, True):
        with torch.inference_mode(inference):
            found = linear(x, weight, bias)
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), exact, **close)
            torch.testing.assert_close(linear(x[None, :, None], weight, bias), found[None, :, None])
            turned = linear(x.t().contiguous().t(), weight.t().contiguous().t(), bias)
            torch.testing.assert_close(turned.double(), exact, **close)


@pytest.mark.parametrize("wanted", [0, 1, 2])
@pytest.mark.parametrize("rows", [1, 3, 50])
def test_a_gradient_is_there_when_it_is_wanted(rows: int, wanted: int) -> None:
    inputs = [normal(*shape, dtype=torch.bfloat16) for shape in ((rows, 8), (50, 8), (50,))]
    inputs[wanted].requires_grad_()
    linear(*inputs).sum().backward()
    (gradient,) = torch.autograd.grad(F.linear(*inputs).sum(), inputs[wanted])
    assert torch.equal(inputs[wanted].grad, gradient)


def test_layers_keep_their_kind_when_adapters_come_and_go() -> None:
    model = nn.Sequential(nn.Linear(8, 6), Linear(6, 5))
    inject_lora(model, rank=2, alpha=4)
    merge_adapters(model)
    assert [type(layer) for layer in model] == [nn.Linear, Linear]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_has_a_column_of_logits_for_each_row(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(70, 5, dtype=dtype), torch.randn(23, 5, dtype=dtype)
    out = allocate_logits(70, weight).fill_(torch.nan)
    for rows in (70, 64, 49, 48, 7, 4, 3, 2, 1):
        found = head_logits(hidden[:rows], weight, out)
        assert found.is_contiguous()
        assert found.data_ptr() == out.data_ptr()
        assert not found.isnan().any()
        torch.testing.assert_close(found[:, :rows], weight @ hidden[:rows].t())


@settings(deadline=None, max_examples=15)
@given(
    rows=st.integers(64, 150), size=st.integers(64, 150), rank=st.integers(1, 9), exponent=st.integers(-20, 20),
)  # fmt: skip
def test_products_of_bfloat16_with_float32_factors_are_float32(rows: int, size: int, rank: int, exponent: int) -> None:
    wide = normal(rows, size, dtype=torch.bfloat16)
    narrow = normal(size, rank, seed=1, dtype=torch.float32) * 2.0**exponent
    other = normal(rank, rows, seed=2, dtype=torch.float32) * 2.0**exponent
    for first, second in ((wide, narrow), (wide.t(), other.t()), (other, wide), (narrow.t(), wide.t())):
        exact = first.double() @ second.double()
        terms = first.double().abs() @ second.double().abs()  # what the rounding of the sums goes by
        found = product(first, second)
        assert found.dtype == torch.float32
        assert ((found - exact).abs() <= 1e-5 * terms).all()
    left, target = normal(rows, rank, seed=3, dtype=torch.float32), normal(rows, size, seed=4, dtype=torch.bfloat16)
    right = normal(rank, size, seed=5, dtype=torch.float32)
    exact = target.double() + left.double() @ right.double()
    terms = left.double().abs() @ right.double().abs()
    found = add_product(target.clone(), left, right)
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= 0.51 * 2**-7 * exact.abs() + 1e-5 * terms).all()
