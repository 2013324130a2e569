"""The one operator of PyTorch without a public name that the library calls, and the public formula that replaces it.

Nothing else in the library calls a private operator, so this file is all that a new version of PyTorch can break.
"""

from __future__ import annotations

import torch
from torch import Tensor

_OPERATOR = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def attention_and_logsumexp(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention (B, K, T, E) of queries (B, K, T, E) to keys and values (B, K, S, E), and the log-sum-exps (B, K, T) of
    the scores, which PyTorch's public function does not return.

    ``bias``, added to the scores, broadcasts to (B, K, T, S). The last dimension of each tensor must be contiguous.
    """
    if _OPERATOR is None or queries.device.type != "cpu":
        return attention_and_logsumexp_formula(queries, keys, values, bias)
    mixed, sums = _OPERATOR(queries, keys, values, attn_mask=bias)
    return mixed, sums


def attention_and_logsumexp_formula(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`attention_and_logsumexp` by public operations."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    scores = queries.to(wide) @ keys.to(wide).transpose(-1, -2) * queries.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(-1) @ values.to(wide)).to(queries.dtype), scores.logsumexp(-1)
