"""The configuration of the transformer."""

from __future__ import annotations

from dataclasses import dataclass

from selfevo.models.rope import RopeScaling


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
    windows: tuple[int | None, ...]  # per layer: how many keys a token sees, including its own; None: no limit
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    output_bias: bool = False  # bias of o_proj
    mlp_bias: bool = False
    tied: bool = False  # the output head is the embedding

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, not {self.head_dim}")
        if len(self.windows) != self.num_layers:
            raise ValueError(f"windows must have one entry per layer, {self.num_layers}, not {len(self.windows)}")
