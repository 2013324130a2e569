"""Layers made ready for a rollout: adapters folded into the weights where that is exact enough, and layers of one input
joined into one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn

from selfevo.lora import LoRALinear
from selfevo.models.transformer import MLP, Attention
from selfevo.products import linear

MAX_BYTES = 4 * 2**30  # of the folded copies, which are held beside the weights


@contextmanager
def ready_layers(model: nn.Module) -> Iterator[bool]:
    """Inside, adapted layers cost little more than plain ones; gradients are not to be asked for. Says whether adapters
    are folded.

    Layers of float32 (or float64) weights become plain products with ``W + s B A``, as a low-rank product of one token
    costs nearly as many calls as the layer itself. The sum is rounded as every float32 product is, about 1e-7 of the
    weights. A bfloat16 weight would swallow most of an adapter. There, and where the copies would take more than
    ``MAX_BYTES``, the adapters stay apart, stacked into one in the dtype of the weights: two small products, whose
    rounding is below that of the layer's own result.

    The ``siblings`` of a module, layers of one input, are computed as one where there is one token a row, unless only
    some of them are folded: fewer calls, and longer reads. Their weights are moved to lie side by side, and stay there.
    Afterwards every tensor holds what it held before.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    size = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    narrow = any(layer.weight.dtype not in (torch.float32, torch.float64) for layer in layers)
    folds = bool(layers) and not narrow and size <= MAX_BYTES
    before = [(layer.frozen_A, layer.frozen_B, layer.adapter_enabled) for layer in layers]
    weights = [layer.weight.data for layer in layers] if folds else []
    families = [module for module in model.modules() if isinstance(module, (Attention, MLP))]
    try:
        for layer in layers:
            a, b = layer.stacked() if layer.adapter_enabled else (layer.frozen_A, layer.frozen_B)
            if folds:
                layer.weight.data = torch.addmm(layer.weight.data, b, a)
                layer.frozen_A, layer.frozen_B = layer.frozen_A[:0], layer.frozen_B[:, :0]
                layer.adapter_enabled = False
            elif len(a):
                layer.prepared = a.t().to(layer.weight.dtype), b.t().to(layer.weight.dtype)
        for family in families:
            siblings: list[nn.Linear] = [getattr(family, name) for name in family.siblings]
            if not folds or all(isinstance(layer, LoRALinear) for layer in siblings):
                family.joint = _Joint(siblings)
        yield folds
    finally:
        for family in families:
            family.joint = None
        for layer, (a, b, enabled) in zip(layers, before, strict=True):
            layer.frozen_A, layer.frozen_B, layer.adapter_enabled = a, b, enabled
            layer.prepared = None
        for layer, weight in zip(layers, weights):
            layer.weight.data = weight


class _Joint:
    """Layers of one input as one: (..., I) -> (..., O) for each."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.sizes = [layer.out_features for layer in layers]
        self.weight = _side_by_side([layer.weight for layer in layers])
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias.data for layer in layers])
        self.factors: tuple[Tensor, Tensor] | None = None  # of adapters that stay apart, with zeros between the layers'
        factors = [layer.prepared if isinstance(layer, LoRALinear) else None for layer in layers]
        if any(factors):
            empty = self.weight.new_empty
            none = [(empty(layer.in_features, 0), empty(0, layer.out_features)) for layer in layers]
            a, b = zip(*(own or nothing for own, nothing in zip(factors, none)))
            self.factors = torch.cat(a, dim=1), torch.block_diag(*b)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        result = linear(rows, self.weight, self.bias)
        if self.factors is not None:
            result.addmm_(rows @ self.factors[0], self.factors[1])
        return result.view(*x.shape[:-1], -1).split(self.sizes, dim=-1)


@torch.inference_mode(False)  # the weights are to be trained on later
def _side_by_side(weights: Sequence[Tensor]) -> Tensor:
    """Weights (O, I), moved in memory unless they lie one behind the other, as parts of one (sum of O, I)."""
    first, storages = weights[0], {weight.untyped_storage().data_ptr() for weight in weights}
    sizes = [weight.numel() for weight in weights]
    places = [first.storage_offset() + before for before in accumulate(sizes[:-1], initial=0)]
    behind = len(storages) == 1 and places == [weight.storage_offset() for weight in weights]
    if behind and all(weight.is_contiguous() for weight in weights):
        return first.data.as_strided((sum(map(len, weights)), first.shape[1]), first.stride())
    whole = torch.cat([weight.data for weight in weights])
    for weight, part in zip(weights, whole.split([len(weight) for weight in weights])):
        weight.data = part
    return whole
