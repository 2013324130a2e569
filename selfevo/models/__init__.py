"""Backbones: one transformer for three model families, their tokenizers and chat formats."""

from selfevo.models.checkpoint import CheckpointError, load_model, save_pretrained
from selfevo.models.model_config import ModelConfig
from selfevo.models.tokenizer import ChatTokenizer, TokenizerError, load_tokenizer
from selfevo.models.transformer import Transformer

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
