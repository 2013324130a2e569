"""How much memory a run needs on each device, from the configuration alone: exact but for activations."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch

from selfevo.generate.decoder import MAX_PREFILL_TOKENS, SLOTS
from selfevo.kernels.head import GPU_CHUNK_BYTES as HEAD_BYTES
from selfevo.models.model_config import ModelConfig
from selfevo.models.transformer import Transformer
from selfevo.scoring import MAX_TOKENS
from selfevo.training.settings import AdapterSettings

GIB = 2.0**30


@dataclass(frozen=True)
class Memory:
    """Bytes on one device; training and rollouts take turns, so a run needs the larger of the two sums."""

    weights: int
    adapters: int  # trainable adapter in float32, its gradient twice, AdamW's moments; the frozen ones
    activations: int  # of one packed row: what is kept for the backward pass, and the most that it needs beside that
    cache: int  # keys and values of the rollout's slots
    prefill: int  # keys and values of one prefill pass, and what it needs beside them

    @property
    def training(self) -> int:
        return self.weights + self.adapters + self.activations

    @property
    def rollout(self) -> int:
        return self.weights + self.adapters + self.cache + self.prefill


def estimate_memory(
    config: ModelConfig,
    *,
    iterations: int,
    dtype: torch.dtype = torch.bfloat16,
    rank: int = AdapterSettings.rank,
    row_tokens: int = MAX_TOKENS,
    slots: int = SLOTS,
    context: int = 2048,
    checkpointed: bool = False,
    shared_by: int = 1,
) -> Memory:
    """Memory for training adapters of ``rank``, stacked ``iterations`` high, on packed rows of ``row_tokens``, and for
    ``slots`` replies of ``context`` tokens each. Weights, adapters and cache are exact; activations are counted from
    what each step of a block keeps, where two branches of a row are taken to see each key. ``shared_by`` so many
    processes (``--shard``), blocks of weights are divided by that number, and two are gathered at a time."""
    with torch.device("meta"):
        model = Transformer(config)
    size = dtype.itemsize
    layers = [
        module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    adapter = sum(rank * (layer.in_features + layer.out_features) for layer in layers)
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    # Per token. Norms keep their inputs and results; attention queries, results, their copy for the next product, and
    # keys and values, repeated for all query heads, once in each branch; the MLP both factors and their product.
    block = size * (4 * config.hidden_size + 7 * queries + 3 * config.intermediate_size)
    kept = config.num_layers * (size * config.hidden_size if checkpointed else block)
    passing = 10 * config.intermediate_size  # a product of the MLP with its adapter, widened to float32
    head = min(row_tokens, HEAD_BYTES // (size * config.vocab_size)) * config.vocab_size * (size + 4)
    weights = [sum(p.numel() for p in module.parameters()) * size for module in (model, model.model.layers)]
    gathered = 2 * weights[1] // config.num_layers if shared_by > 1 else 0  # the one computed, and the next
    stored = 2 * config.num_layers * keys * size
    return Memory(
        weights=weights[0] - weights[1] + math.ceil(weights[1] / shared_by) + gathered,
        adapters=adapter * (4 * (4 + iterations) + 8),  # gradients are added up in float64
        activations=row_tokens * kept + max(row_tokens * (passing + (block if checkpointed else 0)), head),
        cache=slots * context * stored,
        prefill=MAX_PREFILL_TOKENS * (stored + passing),
    )


def describe_memory(memory: Memory) -> str:
    """One readable paragraph."""
    parts = {
        "weights": memory.weights,
        "adapters with optimiser": memory.adapters,
        "activations of a packed row": memory.activations,
        "rollout cache": memory.cache,
        "prefill of prompts": memory.prefill,
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
