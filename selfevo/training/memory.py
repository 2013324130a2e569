"""How much memory a run needs, from the configuration alone: exact for what is counted, estimated where said."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from selfevo.generate.decoder import SLOTS
from selfevo.models.model_config import ModelConfig
from selfevo.models.transformer import Transformer
from selfevo.scoring import MAX_TOKENS
from selfevo.training.settings import AdapterSettings

GIB = 2.0**30


@dataclass(frozen=True)
class Memory:
    """Bytes on the device; training and rollouts take turns, so a run needs the larger of the two sums."""

    weights: int
    adapters: int  # trainable adapter in float32 with its gradient and AdamW's moments, and the frozen ones
    activations: int  # estimate: one packed row under activation checkpointing
    cache: int  # keys and values of the rollout's slots

    @property
    def training(self) -> int:
        return self.weights + self.adapters + self.activations

    @property
    def rollout(self) -> int:
        return self.weights + self.adapters + self.cache


def estimate_memory(
    config: ModelConfig,
    *,
    iterations: int,
    dtype: torch.dtype = torch.bfloat16,
    rank: int = AdapterSettings.rank,
    row_tokens: int = MAX_TOKENS,
    slots: int = SLOTS,
    context: int = 2048,
) -> Memory:
    """Memory for training adapters of ``rank``, stacked ``iterations`` high, on packed rows of ``row_tokens``, and for
    ``slots`` replies of ``context`` tokens each."""
    with torch.device("meta"):
        model = Transformer(config)
    size = dtype.itemsize
    layers = [
        module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    adapter = sum(rank * (layer.in_features + layer.out_features) for layer in layers)
    # between blocks one hidden state a token is kept; inside the block that is recomputed, about 20 of the hidden and
    # 6 of the intermediate size
    per_token = config.num_layers * config.hidden_size + 20 * config.hidden_size + 6 * config.intermediate_size
    head_chunk = 256 * 2**20
    return Memory(
        weights=sum(parameter.numel() for parameter in model.parameters()) * size,
        adapters=adapter * 4 * (4 + iterations),
        activations=row_tokens * per_token * size + row_tokens**2 + head_chunk,
        cache=2 * config.num_layers * config.num_kv_heads * config.head_dim * slots * context * size,
    )


def describe_memory(memory: Memory) -> str:
    """One readable paragraph."""
    parts = {
        "weights": memory.weights,
        "adapters with optimiser": memory.adapters,
        "activations of a packed row (estimate, --checkpoint-activations)": memory.activations,
        "rollout cache": memory.cache,
        "training together": memory.training,
        "rollout together": memory.rollout,
    }
    return "\n".join(f"{value / GIB:8.2f} GiB  {name}" for name, value in parts.items())


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that its tensors free, for the next ones; says whether that could be arranged.

    On Linux a large block goes back to the system when it is freed, and every page of the next one is mapped afresh,
    which costs a training step on a CPU some 6 %. It is a setting of the whole process (glibc's ``mallopt``), so
    programs make it, not the library.
    """
    trim_threshold, mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))
