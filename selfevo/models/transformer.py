"""One decoder-only transformer for the Llama, Qwen2 and Mistral families.

Notation: B batch, T tokens of this call, S keys (cached and new), D hidden size, H heads, K key-value heads,
E head size, F intermediate size, V vocabulary. Parameter names are those of Hugging Face checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from selfevo.models.elementwise import rms_norm, rotate, swiglu
from selfevo.trie import TreeMask


@dataclass(frozen=True)
class RaggedMask:
    """Rows of unequal length that are decoded together: a mask (B, T, S), and ``parts`` of neighbouring rows, each with
    the number of keys that its longest row has. A part attends to no more than those."""

    mask: Tensor
    parts: tuple[tuple[slice, int], ...]


Mask = Tensor | TreeMask | RaggedMask | None
# See _attend_by_products: the longest plain causal row whose probabilities are kept; up to how many queries PyTorch's
# fused kernel takes longer backward whatever the dtype.
_CAUSAL_PRODUCTS, _FEW_ROWS = 1024, 16


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


def attention_mask(positions: Tensor, key_positions: Tensor, mask: Mask, window: int | None) -> Mask:
    """The boolean mask (B, 1, T, S), True where a token may attend; None stands for plain causal attention.

    ``mask`` is the caller's (T, S) or (B, T, S); the window is laid over it by position, as a packed row needs. A tree
    mask stays as it is where the window leaves nothing out; a ragged one keeps its parts.
    """
    if isinstance(mask, RaggedMask):
        whole = attention_mask(positions, key_positions, mask.mask, window)
        assert isinstance(whole, Tensor)
        return replace(mask, mask=whole)
    if isinstance(mask, TreeMask):
        if window is None or window > int(mask.trie.positions.max()):
            return mask
        mask = mask.dense
    if mask is None:
        if window is None or window >= positions.shape[1]:
            return None
        length = positions.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=positions.device).tril()
    if mask.dim() == 2:
        mask = mask[None]
    if window is not None:
        mask = mask & (positions[:, :, None] - key_positions[:, None, :] < window)
    return mask[:, None]


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Mask) -> Tensor:
    """Attention (B, H, T, E) of queries to the keys and values (B, K, S, E) that the mask allows."""
    heads, groups = queries.shape[1], keys.shape[1]
    if queries.shape[2] == 1 and heads != groups and isinstance(mask, Tensor):
        # one token a row: the heads that share keys become queries of one head, which reads its keys once
        return attend(queries.unflatten(1, (groups, -1)).squeeze(3), keys, values, mask).view_as(queries)
    length, narrow = queries.shape[2], queries.dtype == torch.bfloat16 and queries.device.type == "cpu"
    if narrow and mask is None and 1 < length <= _CAUSAL_PRODUCTS:
        mask = torch.ones(length, length, dtype=torch.bool).tril()
    few = 1 < length <= _FEW_ROWS and torch.is_grad_enabled()
    if isinstance(mask, Tensor) and (few or (narrow and length > _FEW_ROWS)):
        return _attend_by_products(queries, keys, values, mask)
    if isinstance(mask, RaggedMask):
        return torch.cat([
            attend(queries[rows], keys[rows, :, :span], values[rows, :, :span], mask.mask[rows, ..., :span])
            for rows, span in mask.parts
        ])  # fmt: skip
    if not isinstance(mask, TreeMask):
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None and length > 1,
            enable_gqa=heads != groups,
        )  # fmt: skip
    sizes, attended = mask.pieces  # split, rather than sliced, the parts' gradients come together in one pass
    each = queries.split([stretch.nodes.stop - stretch.nodes.start for stretch in mask.stretches], dim=2)
    key_pieces, value_pieces = keys.split(sizes, dim=2), values.split(sizes, dim=2)
    mixed = []
    for own, stretch, seen in zip(each, mask.stretches, attended):
        own_keys, own_values = (torch.cat([pieces[n] for n in seen], dim=2) for pieces in (key_pieces, value_pieces))
        mixed.append(attend(own, own_keys, own_values, stretch.mask))
    return torch.cat(mixed, dim=2)


def _attend_by_products(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """The same in plain products, which keep the probabilities but use a processor's bfloat16 units: PyTorch's fused
    kernel does not, and takes nearly three times as long forward and backward."""
    batch, heads, length, size = queries.shape
    groups = (batch * keys.shape[1], -1)  # the heads that share keys, one below the other
    scaled = (queries * size**-0.5).reshape(*groups, size)
    scores = torch.bmm(scaled, keys.flatten(0, 1).transpose(1, 2)).view(batch, heads, length, -1)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    mixed = torch.bmm(weights.view(*groups, keys.shape[2]), values.flatten(0, 1))
    return mixed.view(batch, heads, length, size)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=config.qkv_bias)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=config.output_bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: KVCache | None) -> Tensor:
        batch, length, _ = x.shape
        queries, keys, values = (
            projection(x).view(batch, length, -1, self.config.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = rotate(queries, *rope), rotate(keys, *rope)
        if cache is not None:
            keys, values = cache.extend(self.layer, keys, values)
        mixed = attend(queries, keys, values, mask)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


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
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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
