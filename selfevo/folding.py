"""Adapters folded into the weights for as long as a rollout lasts, where that is exact enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from selfevo.lora import LoRALinear

MAX_BYTES = 4 * 2**30  # of the folded copies, which are held beside the weights


@contextmanager
def folded_adapters(model: nn.Module) -> Iterator[bool]:
    """Inside, adapted layers of float32 (or float64) weights are plain products with ``W + s B A``; says whether.

    A low-rank product of one token costs nearly as many calls as the layer itself. The sum is rounded as every float32
    product is, about 1e-7 of the weights. A bfloat16 weight would swallow most of an adapter, so there, and where the
    copies would take more than ``MAX_BYTES``, nothing is folded. Afterwards every tensor is the one it was before.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    size = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    narrow = any(layer.weight.dtype not in (torch.float32, torch.float64) for layer in layers)
    if not layers or narrow or size > MAX_BYTES:
        yield False
        return
    before = [(layer.weight.data, layer.frozen_A, layer.frozen_B, layer.adapter_enabled) for layer in layers]
    try:
        for layer in layers:
            layer.weight.data = _folded(layer)
            layer.frozen_A, layer.frozen_B = layer.frozen_A[:0], layer.frozen_B[:, :0]
            layer.adapter_enabled = False
        yield True
    finally:
        for layer, (weight, a, b, enabled) in zip(layers, before, strict=True):
            layer.weight.data, layer.frozen_A, layer.frozen_B, layer.adapter_enabled = weight, a, b, enabled


@torch.no_grad()
def _folded(layer: LoRALinear) -> Tensor:
    """The weight that acts as the layer does now, its adapter switched on or off."""
    a, b = layer.stacked() if layer.adapter_enabled else (layer.frozen_A, layer.frozen_B)
    return layer.weight + b @ a
