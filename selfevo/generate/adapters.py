"""Adapted layers made cheap for decoding, where a low-rank product of one token costs nearly as much as its layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from selfevo.kernels.linear import Linear, linear
from selfevo.kernels.mirror import is_shared_out
from selfevo.lora import LoRALinear, exchange

MAX_BYTES = 4 * 2**30  # of merged copies, which are held beside the weights


@contextmanager
def decoding_layers(model: nn.Module) -> Iterator[None]:
    """Inside, every adapted layer is replaced by one that computes the same without gradients; then it is put back.

    Layers of float32 (or float64) weights become plain products with a copy of ``W + s B A``; the sum is rounded as
    every float32 product is, about 1e-7 of the weights. A bfloat16 weight would round most of an adapter away. There,
    where the copies would take more than ``MAX_BYTES``, and where ranks share the weights, the adapters stay apart,
    stacked into one in the dtype of the weights: two small products, whose rounding is below that of the layer's own
    result.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    size = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    narrow = any(layer.weight.dtype not in (torch.float32, torch.float64) for layer in layers)
    shared = any(is_shared_out(layer.weight) for layer in layers)
    make = _StackedLinear if narrow or shared or size > MAX_BYTES else _merged
    others = [make(layer) for layer in layers]
    for layer, other in zip(layers, others):
        exchange(layer, other)
    try:
        yield
    finally:
        for layer, other in zip(layers, others):
            exchange(layer, other)


def _factors(layer: LoRALinear) -> tuple[Tensor, Tensor]:
    return layer.stacked() if layer.adapter_enabled else (layer.frozen_A, layer.frozen_B)


def _merged(layer: LoRALinear) -> nn.Module:
    a, b = _factors(layer)
    plain = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(torch.addmm(layer.weight, b, a), requires_grad=False) if len(a) else layer.weight
    plain.bias = layer.bias
    return plain


class _StackedLinear(nn.Module):
    """``W x + bias + B A x``, all in the dtype of W, without gradients."""

    def __init__(self, layer: LoRALinear) -> None:
        super().__init__()
        a, b = _factors(layer)
        self.weight, self.bias = layer.weight, layer.bias
        self.a, self.b = a.t().to(layer.weight.dtype), b.t().to(layer.weight.dtype)  # (I, R), (R, O)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return linear(rows, self.weight, self.bias).addmm_(rows @ self.a, self.b).view(*x.shape[:-1], -1)
