"""One decoder-only transformer for the Llama, Qwen2 and Mistral families.

Notation: B batch, T tokens of this call, S keys (cached and new), D hidden size, H heads, K key-value heads,
E head size, F intermediate size, V vocabulary. Parameter names are those of Hugging Face checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from selfevo.models.attention import Mask, SharedPrefixes, attend, attend_shared, attention_mask
from selfevo.models.elementwise import rms_norm, rotate, swiglu
from selfevo.products import Linear


@dataclass(frozen=True)
class Llama3RopeScaling:
    """The ``llama3`` rotary scaling of Llama 3.1 and later."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class ModelConfig:
    """Everything the forward pass depends on; the family modules build it from a checkpoint's ``config.json``."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    windows: tuple[int | None, ...]  # one per layer: keys a token may see, itself included; None is no limit
    rope_scaling: Llama3RopeScaling | None = None
    qkv_bias: bool = False
    output_bias: bool = False  # bias of o_proj
    mlp_bias: bool = False
    tied: bool = False  # the output head is the embedding

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, not {self.head_dim}")
        if len(self.windows) != self.num_layers:
            raise ValueError(f"windows must name one window per layer, {self.num_layers}, not {len(self.windows)}")


class KVCache(Protocol):
    """What the model asks of a cache: take a layer's new keys and values, hand back all that may be attended to."""

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, T, E) twice -> (B, K, S, E) twice."""
        ...


def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Angular frequency of each pair of head dimensions: (E/2,) float32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    share = scaling.original_max_positions / wavelengths
    smooth = (share - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)  # 0: long waves, divided by the factor; 1: short waves, kept
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def rope_tables(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positions (B, T) -> cosines and sines, each (B, 1, T, E), computed in float32 and rounded once."""
    angles = positions[..., None].float() * rope_frequencies(config, positions.device)
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


Joint = Callable[[Tensor], Sequence[Tensor]]


class Attention(nn.Module):
    siblings = ("q_proj", "k_proj", "v_proj")  # layers of one input
    joint: Joint | None = None  # used instead of them for one token a row, see selfevo.folding

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, wide, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, narrow, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, narrow, bias=config.qkv_bias)
        self.o_proj = Linear(wide, config.hidden_size, bias=config.output_bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: KVCache | None) -> Tensor:
        batch, length, _ = x.shape
        if self.joint and length == 1:
            projected = self.joint(x)
        else:
            projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        queries, keys, values = (y.view(batch, length, -1, self.config.head_dim).transpose(1, 2) for y in projected)
        queries, keys = rotate(queries, *rope), rotate(keys, *rope)
        if cache is not None:
            keys, values = cache.extend(self.layer, keys, values)
        if isinstance(mask, SharedPrefixes):
            mixed = attend_shared(queries, keys, values, mask, self.layer)
        else:
            mixed = attend(queries, keys, values, mask)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    siblings = ("gate_proj", "up_proj")
    joint: Joint | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.joint(x) if self.joint and x.shape[1] == 1 else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(swiglu(gate, up))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Embedding, blocks and final norm: everything but the output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Transformer(nn.Module):
    """A causal language model. ``checkpoint_activations`` trades one more forward pass for activation memory."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        self.model = Backbone(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    def hidden_states(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Mask = None,
        *,
        cache: KVCache | None = None,
        key_positions: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, T) -> final normed hidden states (B, T, D); ``lm_head`` turns them into logits.

        ``positions`` (B, T) default to 0..T-1. ``mask`` (T, S) or (B, T, S) is boolean, True where a token may attend;
        None is causal in the order of the row; a packed trie brings its own kind. With a ``cache`` the mask and
        ``key_positions`` (B, S) describe the keys that the cache returns. Sliding windows of the configuration are laid
        over the mask by position.
        """
        if tokens.dim() != 2:
            raise ValueError(f"tokens must have shape (batch, seq), not {tuple(tokens.shape)}")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        if key_positions is None:
            key_positions = positions
        x = self.model.embed_tokens(tokens)
        rope = rope_tables(self.config, positions, x.dtype)
        masks = {w: attention_mask(positions, key_positions, mask, w) for w in set(self.config.windows)}
        for block, window in zip(self.model.layers, self.config.windows):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, masks[window], cache, use_reentrant=False)
            else:
                x = block(x, rope, masks[window], cache)
        return self.model.norm(x)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Tokens (B, T) -> logits (B, T, V); see :meth:`hidden_states` for ``positions`` and ``mask``."""
        return self.lm_head(self.hidden_states(tokens, positions, mask))
