"""Reading and writing ``config.json``: the keys that the three families have in common.

Every key is either read, or known to have no effect on the logits, or refused by name: a feature that is not
implemented is never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selfevo.models.model_config import Llama3RopeScaling, ModelConfig

# Keys for bookkeeping, training and generation, which do not change the logits.
HARMLESS = frozenset(
    """architectures attention_dropout bos_token_id chunk_size_feed_forward dtype eos_token_id finetuning_task id2label
    initializer_range is_encoder_decoder keys_to_ignore_at_inference label2id model_type output_attentions
    output_hidden_states pad_token_id pretraining_tp problem_type return_dict torch_dtype transformers_version
    unk_token_id use_cache use_return_dict""".split()
)
_REQUIRED = object()


class ConfigError(ValueError):
    """A ``config.json`` that cannot be loaded; the message names the file and the key."""


class ConfigReader:
    """Takes values out of a parsed ``config.json``, checks their types, and refuses what is left at the end."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.source = source
        self._values = dict(values)

    def fail(self, message: str) -> ConfigError:
        return ConfigError(f"{self.source}: {message}")

    def take(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Removes and returns the value of ``key``; null means absent; a key without a default is required."""
        value = self._values.pop(key, None)
        if value is None:
            if default is _REQUIRED:
                raise self.fail(f"the key {key!r} is missing")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.fail(f"{key!r} should be of type {kind.__name__}, not {value!r}")
        return value

    def take_window(self, key: str, absent: int) -> int | None:
        """A sliding window: null and 0 mean none, and a missing key means ``absent``, the family's default."""
        if key not in self._values:
            return absent
        return self.take(key, int, 0) or None

    def require(self, key: str, allowed: tuple[Any, ...]) -> None:
        """Refuses ``key`` unless it is absent or has one of the allowed values."""
        value = self._values.pop(key, None)
        if value is not None and value not in allowed:
            raise self.fail(f"{key!r} is {value!r}; only {' or '.join(map(repr, allowed))} is implemented")

    def finish(self) -> None:
        """Refuses the keys that were not taken, unless they are harmless or switched off."""
        for key, value in self._values.items():
            harmless = key in HARMLESS or key.startswith("_") or key.endswith("_version")
            if not harmless and value not in (None, False, 0, [], {}):
                raise self.fail(f"{key!r} ({value!r}) is not implemented here, and ignoring it could change the model")


def read_rope(reader: ConfigReader, default_max_positions: int) -> dict[str, Any]:
    """Rotary settings, in the older form (``rope_theta``, ``rope_scaling``) or the newer (``rope_parameters``)."""
    max_positions = reader.take("max_position_embeddings", int, default_max_positions)
    older = reader.take("rope_scaling", dict, {})
    settings = ConfigReader(reader.take("rope_parameters", dict, older), f"{reader.source}, rotary settings")
    kind = settings.take("rope_type", str, settings.take("type", str, "default"))
    theta = settings.take("rope_theta", float, reader.take("rope_theta", float, 10000.0))
    settings.require("partial_rotary_factor", (1.0,))
    original = reader.take("original_max_position_embeddings", int, None)
    original = settings.take("original_max_position_embeddings", int, original)
    scaling = None
    if kind == "llama3":
        scaling = Llama3RopeScaling(
            factor=settings.take("factor", float),
            low_freq_factor=settings.take("low_freq_factor", float),
            high_freq_factor=settings.take("high_freq_factor", float),
            original_max_positions=original or max_positions,
        )
    elif kind != "default":
        raise reader.fail(f"rotary scaling {kind!r} is not implemented; only 'default' and 'llama3' are")
    settings.finish()
    return {"rope_theta": theta, "rope_scaling": scaling, "max_positions": max_positions}


def read_common(reader: ConfigReader, *, default_kv_heads: int | None, max_positions: int) -> dict[str, Any]:
    """The settings that every family names alike; ``default_kv_heads`` None stands for the number of heads."""
    hidden_size, num_heads = reader.take("hidden_size", int), reader.take("num_attention_heads", int)
    head_dim = reader.take("head_dim", int, None)
    if head_dim is None:
        if hidden_size % num_heads:
            raise reader.fail(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
        head_dim = hidden_size // num_heads
    reader.require("hidden_act", ("silu",))
    return {
        "vocab_size": reader.take("vocab_size", int),
        "hidden_size": hidden_size,
        "intermediate_size": reader.take("intermediate_size", int),
        "num_layers": reader.take("num_hidden_layers", int),
        "num_heads": num_heads,
        "num_kv_heads": reader.take("num_key_value_heads", int, default_kv_heads or num_heads),
        "head_dim": head_dim,
        "norm_eps": reader.take("rms_norm_eps", float, 1e-6),
        "tied": reader.take("tie_word_embeddings", bool, False),
        **read_rope(reader, max_positions),
    }


def write_common(config: ModelConfig) -> dict[str, Any]:
    """The inverse of :func:`read_common`, in the form that every version of transformers reads."""
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied,
    }
    if (scaling := config.rope_scaling) is not None:
        values["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return values
