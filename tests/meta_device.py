"""The ``meta`` device in place of a GPU: its tensors have shapes and no values. Published shapes, and two watchers."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selfevo.lora import freeze_adapter, inject_lora
from selfevo.models import ModelConfig, Transformer
from selfevo.training import PairIds

COMMON: dict[str, Any] = {"num_kv_heads": 8, "num_heads": 32, "num_layers": 32, "head_dim": 128, "hidden_size": 4096}
SHAPES = {
    "Llama-3-8B": ModelConfig(
        **COMMON, family="llama", vocab_size=128256, intermediate_size=14336, norm_eps=1e-5, rope_theta=5e5,
        max_positions=8192, windows=(None,) * 32,
    ),
    "Qwen2-7B": ModelConfig(
        **COMMON | {"num_kv_heads": 4, "num_heads": 28, "num_layers": 28, "hidden_size": 3584}, family="qwen2",
        vocab_size=152064, intermediate_size=18944, norm_eps=1e-6, rope_theta=1e6, max_positions=32768,
        windows=(None,) * 28, qkv_bias=True,
    ),
    "Mistral-7B-v0.1": ModelConfig(  # with the sliding window, which later versions lack
        **COMMON, family="mistral", vocab_size=32000, intermediate_size=14336, norm_eps=1e-5, rope_theta=1e4,
        max_positions=32768, windows=(4096,) * 32,
    ),
}  # fmt: skip
SHORT, LONG = (  # below and above what a GPU attends to in one piece
    [PairIds(list(range(1, length)), list(range(5, 60)), list(range(70))) for length in lengths]
    for lengths in ((200, 400), (300, 700, 1500))
)


def adapted(config: ModelConfig) -> Transformer:
    """In bfloat16, with the adapter of an earlier iteration under the one to train."""
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
    inject_lora(model)
    freeze_adapter(model)
    return model


def two_layers(shape: str) -> ModelConfig:
    return replace(SHAPES[shape], num_layers=2, windows=SHAPES[shape].windows[:2])


COPIES = ("_to_copy", "to", "copy_")


class Device(TorchDispatchMode):
    """Takes the meta device for a GPU: counts the copies from and to it, and refuses to mix it with the host."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named, name = named or {}, function.overloadpacket.__name__
        given = [value for value in arguments if isinstance(value, torch.Tensor)]
        kinds = {value.is_meta for value in given if value.dim()}  # numbers of the host may go anywhere
        if name in COPIES:
            target = given[0].device if name == "copy_" else named.get("device") or given[0].device
            source = given[-1]
            if source.is_meta and target.type == "cpu":
                self.counts["waits"] += 1
                return torch.zeros(source.shape, dtype=named.get("dtype") or source.dtype)
            self.counts["uploads"] += not source.is_meta and target.type == "meta" and bool(source.dim())
        elif len(kinds) > 1:
            raise AssertionError(f"{name} mixes devices: {[(value.device, tuple(value.shape)) for value in given]}")
        return function(*arguments, **named)


class Allocations(TorchDispatchMode):
    """The bytes of all tensors that operations have made and that somebody still holds, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        return result

    def see(self, tensor: Tensor, count: bool = True) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            size = storage.nbytes() if count else 0
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, storage._cdata, size)

    def forget(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.live -= size
