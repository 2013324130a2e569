"""One decoder-only transformer for the Llama, Qwen2 and Mistral families.

Notation: B batch, T tokens of this call, D hidden size, H query heads, K key-value heads, E head size, F intermediate
size, V vocabulary. Parameter names are those of Hugging Face checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from selfevo.kernels import ranks
from selfevo.kernels.elementwise import rms_norm, rotate, swiglu
from selfevo.kernels.linear import Linear
from selfevo.models.attention import AttentionContext, Causal, Masked
from selfevo.models.model_config import ModelConfig
from selfevo.models.rope import rope_tables


class Transformer(nn.Module):
    """A causal language model. ``checkpoint_activations`` saves memory in training by a second forward pass; ``shared``
    says that the ranks share its weights (``sharded.py``), so that all of them have to make the same passes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        self.shared = False
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

    def forward(self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Tokens (B, T) -> logits (B, T, V).

        ``positions`` (B, T) default to 0..T-1. ``mask`` (T, T) or (B, T, T) is boolean, True where a token may attend;
        None means causal in the order of the row. Sliding windows, by position, restrict both.
        """
        context = None if mask is None else Masked(mask, _positions(tokens, positions))
        return self.lm_head(self.hidden_states(tokens, positions, context))

    def hidden_states(
        self, tokens: Tensor, positions: Tensor | None = None, context: AttentionContext | None = None
    ) -> Tensor:
        """Tokens (B, T) -> final normed hidden states (B, T, D); ``lm_head`` turns them into logits.

        ``positions`` (B, T) default to 0..T-1. ``context`` decides what a token attends to, which may include a cache;
        None means causal in the order of the row. Raises ValueError for tokens of another shape.
        """
        positions = _positions(tokens, positions)
        if self.shared:
            ranks.any_rank(True)
        return self._pass(tokens, positions, context or Causal(positions))

    def keep_pace(self) -> None:
        """Ends a rank's part of some work: where weights are shared, each pass of any rank gathers them from all, so as
        long as another rank computes this one does too, over one token, backward as well where gradients are on."""
        while self.shared and ranks.any_rank(False):
            token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
            hidden = self._pass(token, token, Causal(token))
            if hidden.requires_grad:
                hidden.sum().backward()

    def _pass(self, tokens: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        x = self.model.embed_tokens(tokens)
        config = self.config
        rope = rope_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling, x.dtype)
        for block in self.model.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, context, use_reentrant=False)
            else:
                x = block(x, rope, context)
        return self.model.norm(x)


def _positions(tokens: Tensor, positions: Tensor | None) -> Tensor:
    if tokens.dim() != 2:
        raise ValueError(f"tokens must have shape (batch, seq), not {tuple(tokens.shape)}")
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens) if positions is None else positions


class Backbone(nn.Module):
    """Embedding, blocks and final norm: everything except the output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], context: AttentionContext) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.window = layer, config.head_dim, config.windows[layer]
        query_size, key_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.o_proj = Linear(query_size, config.hidden_size, bias=config.output_bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], context: AttentionContext) -> Tensor:
        batch, length, _ = x.shape
        queries, keys, values = (
            projection(x).view(batch, length, -1, self.head_dim).transpose(1, 2)  # (B, H or K, T, E)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = context.attend(self.layer, rotate(queries, *rope), rotate(keys, *rope), values, self.window)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
