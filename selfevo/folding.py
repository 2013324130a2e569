"""Adapters folded into the weights for as long as a rollout lasts, where that is exact enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from selfevo.lora import LoRALinear

MAX_BYTES = 4 * 2**30  # of the folded copies, which are held beside the weights


@contextmanager
def folded_adapters(model: nn.Module) -> Iterator[bool]:
    """Inside, adapted layers cost little more than plain ones; gradients are not to be asked for. Says whether they are
    folded.

    Layers of float32 (or float64) weights become plain products with ``W + s B A``, as a low-rank product of one token
    costs nearly as many calls as the layer itself. The sum is rounded as every float32 product is, about 1e-7 of the
    weights. A bfloat16 weight would swallow most of an adapter. There, and where the copies would take more than
    ``MAX_BYTES``, the adapters stay apart, stacked into one in the dtype of the weights: two small products, whose
    rounding is below that of the layer's own result. Afterwards every tensor is the one it was before.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    size = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    narrow = any(layer.weight.dtype not in (torch.float32, torch.float64) for layer in layers)
    folds = bool(layers) and not narrow and size <= MAX_BYTES
    before = [(layer.weight.data, layer.frozen_A, layer.frozen_B, layer.adapter_enabled) for layer in layers]
    try:
        for layer in layers:
            a, b = layer.stacked() if layer.adapter_enabled else (layer.frozen_A, layer.frozen_B)
            if folds:
                layer.weight.data = torch.addmm(layer.weight.data, b, a)
                layer.frozen_A, layer.frozen_B = layer.frozen_A[:0], layer.frozen_B[:, :0]
                layer.adapter_enabled = False
            elif len(a):
                layer.prepared = a.t().to(layer.weight.dtype), b.t().to(layer.weight.dtype)
        yield folds
    finally:
        for layer, (weight, a, b, enabled) in zip(layers, before, strict=True):
            layer.weight.data, layer.frozen_A, layer.frozen_B, layer.adapter_enabled = weight, a, b, enabled
            layer.prepared = None
