"""Norm, rotation, gate and adapted layer against their formulas in plain operations, values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selfevo.kernels.elementwise import all_finite, rms_norm, rotate, swiglu
from selfevo.kernels.lowrank import adapted_linear

Step = Callable[..., Tensor]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, dtype=torch.float64, generator=generator)).to(dtype)


def tables(length: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = normal(1, 1, length, size // 2, seed=9)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def plain_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def steps(dtype: torch.dtype, rows: int, size: int) -> dict[str, tuple[Step, Step, tuple[Tensor, ...]]]:
    """Ours, the plain formula, and the inputs to differentiate."""
    x, other = normal(2, rows, size, seed=1, dtype=dtype), normal(2, rows, size, seed=2, dtype=dtype)
    heads = normal(2, 3, rows, 2 * size, seed=3, dtype=dtype)
    cos, sin = tables(rows, 2 * size, dtype)
    return {
        "norm": (lambda x, w: rms_norm(x, w, 1e-6), plain_norm, (x, normal(size, seed=4, dtype=dtype))),
        "rotation": (lambda x: rotate(x, cos, sin), lambda x: plain_rotation(x, cos, sin), (heads,)),
        "gate": (swiglu, lambda gate, up: F.silu(gate) * up, (x, other)),
    }


@pytest.mark.parametrize("name", ["norm", "rotation", "gate"])
def test_values_and_gradients_pass_gradcheck_and_equal_the_formula(name: str) -> None:
    ours, plain, inputs = steps(torch.float64, 3, 4)[name]
    inputs = tuple(x.requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(ours, inputs)
    torch.testing.assert_close(ours(*inputs), plain(*inputs))


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(0, 9), size=st.integers(8, 40), exponent=st.integers(-12, 12))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["norm", "rotation", "gate"])
def test_rounding_is_that_of_the_formula(name: str, dtype: torch.dtype, rows: int, size: int, exponent: int) -> None:
    """Against the formula in float64, from the same rounded inputs: a few roundings, whatever the shape and scale."""
    ours, plain, inputs = steps(dtype, rows, size)[name]
    inputs = tuple((x * 2.0**exponent).requires_grad_() for x in inputs)
    exact_inputs = tuple(x.detach().double().requires_grad_() for x in inputs)
    out, exact = ours(*inputs), plain(*exact_inputs)
    assert out.dtype == dtype
    slope = normal(*out.shape, seed=8, dtype=dtype)
    gradients = torch.autograd.grad(out, inputs, slope)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, slope.double())
    for value, truth in zip((out, *gradients), (exact, *exact_gradients)):
        bound = 8 * torch.finfo(dtype).eps * (truth.abs().max().item() if truth.numel() else 0.0)
        torch.testing.assert_close(value.double(), truth, rtol=8 * torch.finfo(dtype).eps, atol=bound + 1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["norm", "rotation"])
def test_a_rollout_rounds_as_scoring_does(name: str, dtype: torch.dtype) -> None:
    ours, _, inputs = steps(dtype, 5, 96)[name]
    expected = ours(*inputs)
    with torch.no_grad():
        assert torch.equal(ours(*inputs), expected)
    with torch.inference_mode():
        torch.testing.assert_close(ours(*inputs), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_the_gate_is_overwritten_only_where_no_gradient_is_wanted() -> None:
    gate, up = normal(3, 4), normal(3, 4, seed=1)
    before = gate.clone()
    out = swiglu(gate, up)
    assert torch.equal(gate, before)
    with torch.no_grad():
        assert torch.equal(swiglu(gate, up), out)


def test_kept_tensors_are_the_inputs_in_their_own_dtype() -> None:
    """Nothing of the inputs' size beside them: no float32 copies, no intermediate results."""
    for ours, _, inputs in steps(torch.bfloat16, 50, 32).values():
        inputs = tuple(x.requires_grad_() for x in inputs)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):  # type: ignore[misc]
            ours(*inputs)
        large = {t.data_ptr() for t in kept if t.numel() >= inputs[0].numel()}
        assert large <= {x.data_ptr() for x in inputs}


# --- the adapted layer, also at sizes where bfloat16 is not widened ---------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [7, 200])
def test_the_adapted_layer_equals_the_explicit_weight(rows: int, dtype: torch.dtype) -> None:
    """Values and all gradients, of weight and bias too where they are asked for, few rows and many."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs, outputs = 96, 80
    x = normal(2, rows, inputs, dtype=dtype).requires_grad_()
    weight = normal(outputs, inputs, seed=1, dtype=dtype, scale=0.1).requires_grad_()
    bias = normal(outputs, seed=2, dtype=dtype).requires_grad_()
    frozen_a, a = (normal(n, inputs, seed=n, dtype=wide) for n in (3, 5))
    frozen_b, b = (normal(outputs, n, seed=n + 10, dtype=wide, scale=0.1) for n in (3, 5))
    inputs_of_both = (x, weight, bias, a.requires_grad_(), b.requires_grad_())
    slope = normal(2, rows, outputs, seed=6, dtype=dtype)
    out = adapted_linear(x, weight, bias, frozen_a, frozen_b, a, b)
    found = (out, *torch.autograd.grad(out, inputs_of_both, slope))
    exact_inputs = tuple(t.detach().double().requires_grad_() for t in inputs_of_both)
    ex, ew, ebias, ea, eb = exact_inputs
    exact = F.linear(ex, ew + frozen_b.double() @ frozen_a.double() + eb @ ea, ebias)
    truth = (exact, *torch.autograd.grad(exact, exact_inputs, slope.double()))
    for value, expected in zip(found, truth):
        scale = expected.abs().max().item()
        # In 16 bits W x is rounded before the adapter is added, A and B alone are float32 throughout.
        eps = torch.finfo(torch.float32 if value.dtype == torch.float32 and dtype != torch.float32 else dtype).eps
        tolerance = 2**-13 if value.dtype == torch.float32 and dtype == torch.bfloat16 else 8 * eps
        assert ((value.double() - expected).abs().max() / scale) < tolerance
        assert value.dtype in (dtype, wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [7, 200])
def test_a_zero_factor_adds_exact_zeros(rows: int, dtype: torch.dtype) -> None:
    x, weight = normal(rows, 96, dtype=dtype), normal(80, 96, seed=1, dtype=dtype)
    none_a, none_b = torch.empty(0, 96), torch.empty(80, 0)
    a, b = normal(8, 96, seed=2, dtype=torch.float32), torch.zeros(80, 8)
    assert torch.equal(adapted_linear(x, weight, None, none_a, none_b, a, b), F.linear(x, weight))


@given(
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.integers(0, 11),
)
def test_one_number_that_is_not_finite_is_found(dtype: torch.dtype, bad: float, place: int) -> None:
    values = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype)
    values[0] = torch.finfo(dtype).min
    assert all_finite(values)
    values.view(-1)[place] = bad
    assert not all_finite(values)
