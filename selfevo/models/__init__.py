"""Backbones: one transformer, three families, their tokenizers and chat formats."""

from selfevo.models.hub import CheckpointError
from selfevo.models.loading import load_model, save_pretrained
from selfevo.models.tokenizer import ChatTokenizer, TokenizerError, load_tokenizer
from selfevo.models.transformer import ModelConfig, Transformer

__all__ = [
    "ChatTokenizer",
    "CheckpointError",
    "ModelConfig",
    "TokenizerError",
    "Transformer",
    "load_model",
    "load_tokenizer",
    "save_pretrained",
]
