"""Attention over a trie against a softmax over the dense mask in float64: values and gradients."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selfevo.models import attention as model_attention
from selfevo.trie import TokenTrie, build_trie
from selfevo.trie import mask as mask_room
from selfevo.trie.attention import attend_tree
from selfevo.trie.mask import TreeMask

sequences_of_ids = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8)


def mask_of(trie: TokenTrie) -> TreeMask:
    return TreeMask(trie, torch.device("cpu"))


def inputs(
    trie: TokenTrie, groups: int, each: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0
) -> list[Tensor]:
    """Queries, keys and values, laid out as the layers lay them out, a node's heads side by side."""
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int) -> Tensor:
        x = torch.randn(1, len(trie), heads, 4, generator=generator, dtype=torch.float64) * scale
        return x.to(dtype).transpose(1, 2).requires_grad_()

    return [normal(groups * each), normal(groups), normal(groups)]


def dense(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    each = queries.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(each, dim=1) for x in (keys, values))
    scores = queries @ keys.transpose(2, 3) / queries.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values


@settings(deadline=None, max_examples=40)
@given(
    sequences=sequences_of_ids, groups=st.sampled_from([1, 2]), each=st.sampled_from([1, 3]),
    forest=st.sampled_from([1, 3, 96]), scale=st.sampled_from([0.1, 1.0, 30.0]),
)  # fmt: skip
def test_values_and_gradients_are_those_of_the_dense_mask(
    sequences: list[list[int]], groups: int, each: int, forest: int, scale: float
) -> None:
    trie = build_trie(sequences)
    x = inputs(trie, groups, each, torch.float64, scale=scale)
    with mock.patch.object(mask_room, "DENSE_FOREST", forest):
        found = attend_tree(*x, mask_of(trie))
        slopes = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad(found, x, slopes)
    expected = dense(*x, mask_of(trie).dense)
    torch.testing.assert_close(found, expected)
    for gradient, truth in zip(gradients, torch.autograd.grad(expected, x, slopes)):
        torch.testing.assert_close(gradient, truth)


def test_bfloat16_is_right_to_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64 from the same rounded inputs."""
    monkeypatch.setattr(mask_room, "DENSE_FOREST", 5)
    trunk = torch.arange(40).tolist()
    trie = build_trie([trunk, *([*trunk[:n], 50, *range(n)] for n in (3, 20, 33))])
    x = inputs(trie, 2, 3, torch.bfloat16)
    found = attend_tree(*x, mask_of(trie))
    assert found.dtype == torch.bfloat16
    slopes = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    gradients = torch.autograd.grad(found, x, slopes)
    exact = [a.detach().double().requires_grad_() for a in x]
    expected = dense(*exact, mask_of(trie).dense)
    for value, truth in zip((found, *gradients), (expected, *torch.autograd.grad(expected, exact, slopes.double()))):
        assert (value.double() - truth).abs().max() <= 0.02 * truth.abs().max()


def test_no_gradient_is_wanted_and_none_is_prepared() -> None:
    trie = build_trie([[1, 2, 3], [1, 2, 4]])
    x = inputs(trie, 1, 2, torch.float32)
    with torch.no_grad():
        found = attend_tree(*x, mask_of(trie))
    assert not found.requires_grad
    torch.testing.assert_close(found, dense(*x, mask_of(trie).dense).detach())


@pytest.mark.parametrize("masked", [False, True])
def test_a_gpu_is_given_no_mask_beside_shared_keys(masked: bool) -> None:
    """On the meta device, which computes shapes alone: the fused kernels there take a mask or shared keys, not both."""
    queries, keys = (torch.empty(1, heads, 5, 8, device="meta") for heads in (6, 2))
    mask = torch.ones(5, 5, dtype=torch.bool, device="meta") if masked else None
    with mock.patch.object(
        model_attention.F, "scaled_dot_product_attention", wraps=model_attention.F.scaled_dot_product_attention
    ) as kernel:
        assert model_attention.fused_attention(queries, keys, keys, mask).shape == queries.shape
    assert kernel.call_args.args[1].shape[1] == (6 if masked else 2)
    assert kernel.call_args.kwargs["enable_gqa"] is not masked
