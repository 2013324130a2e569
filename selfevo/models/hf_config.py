"""Reading and writing ``config.json``: the keys that the three families have in common.

Every key is either read, or known to have no effect on the logits, or refused by name: a feature that is not
implemented is never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from selfevo.models.model_config import ModelConfig
from selfevo.models.rope import DynamicRope, LinearRope, Llama3Rope, RopeScaling, YarnRope

# Keys for bookkeeping, training and generation, which do not change the logits. So are those that end in _token_id,
# _token_ids or _version, or begin with an underscore or with unsloth.
HARMLESS = frozenset(
    """architectures attention_dropout attn_implementation auto_map chunk_size_feed_forward dtype embd_pdrop
    finetuning_task id2label initializer_range is_decoder is_encoder_decoder is_llama_config keys_to_ignore_at_inference
    label2id mlp_dropout model_type output_attentions output_hidden_states pretraining_tp problem_type resid_pdrop
    return_dict tokenizer_class torch_dtype torchscript transformers.js_config use_bfloat16 use_cache use_return_dict
    begin_suppress_tokens bad_words_ids diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature tf_legacy_loss top_k top_p
    typical_p""".split()
)
# Keys that name a feature, with the values under which it is not in use.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "rope_interleaved": (False,), "tie_encoder_decoder": (False,), "cross_attention_hidden_size": (None,),
    "add_cross_attention": (False,), "pruned_heads": ({},), "use_mrope": (False,), "attention_multiplier": (1.0,),
    "residual_multiplier": (1.0,), "embedding_multiplier": (1.0,), "logits_scaling": (1.0,),
}  # fmt: skip
_REQUIRED = object()


class ConfigError(ValueError):
    """A ``config.json`` that cannot be loaded; the message names the file and the key."""


class ConfigReader:
    """Takes values out of a parsed ``config.json``, checks their types, and refuses what is left at the end."""

    def __init__(self, values: Mapping[str, Any], source: str, allowed: Collection[str] = ()) -> None:
        self.source = source
        self._values = {key: value for key, value in values.items() if key not in allowed}

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

    def take_layer_types(self, num_layers: int, default: Sequence[str]) -> list[str]:
        """The kind of attention of each layer: full_attention or sliding_attention."""
        kinds: list[str] = self.take("layer_types", list, list(default))
        if len(kinds) != num_layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
            known = "full_attention or sliding_attention"
            raise self.fail(f"'layer_types' should name {known} {num_layers} times: {kinds}")
        return kinds

    def require(self, key: str, allowed: tuple[Any, ...]) -> None:
        """Refuses ``key`` unless it is absent or has one of the allowed values."""
        value = self._values.pop(key, None)
        if value is not None and value not in allowed:
            raise self.fail(f"{key!r} is {value!r}; only {' or '.join(map(repr, allowed))} is implemented")

    def finish(self) -> None:
        """Refuses the keys that were not taken, unless they are harmless or switched off."""
        for key, value in self._values.items():
            harmless = key in HARMLESS or key.startswith(("_", "unsloth"))
            harmless = harmless or key.endswith(("_version", "_token_id", "_token_ids"))
            if not harmless and value not in (None, False, 0, [], {}, *WITHOUT_EFFECT.get(key, ())):
                raise self.fail(
                    f"{key!r} ({value!r}) is not implemented here, and ignoring it could change the model; if you know "
                    f"that it does not, load_model(..., allow_unknown=({key!r},)) leaves it out"
                )


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
    scaling = _read_scaling(kind, settings, original or max_positions)
    settings.finish()
    return {"rope_theta": theta, "rope_scaling": scaling, "max_positions": max_positions}


def _read_scaling(kind: str, settings: ConfigReader, original: int) -> RopeScaling | None:
    """``original`` is the window before the scaling."""
    if kind == "default":
        return None
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        raise settings.fail(f"the scaling {kind!r} is not implemented; default, linear, dynamic, llama3 and yarn are")
    factor = settings.take("factor", float)
    if kind == "llama3":
        low, high = settings.take("low_freq_factor", float), settings.take("high_freq_factor", float)
        return Llama3Rope(factor, low, high, original)
    if kind == "yarn":
        given = settings.take("attention_factor", float, None)
        mscale, everywhere = settings.take("mscale", float, 0.0), settings.take("mscale_all_dim", float, 0.0)
        size = _yarn_size(factor, mscale) / _yarn_size(factor, everywhere) if mscale and everywhere else None
        return YarnRope(
            factor, original, settings.take("beta_fast", float, 32.0), settings.take("beta_slow", float, 1.0),
            given if given is not None else _yarn_size(factor) if size is None else size,
            settings.take("truncate", bool, True),
        )  # fmt: skip
    if kind == "dynamic":
        return DynamicRope(factor)
    return None if factor == 1.0 else LinearRope(factor)


def _yarn_size(factor: float, scale: float = 1.0) -> float:
    """By how much YaRN enlarges the embeddings, unless the configuration says so."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


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
        fields = vars(scaling) | {"rope_type": type(scaling).__name__.removesuffix("Rope").lower()}
        if "original_max_positions" in fields:
            fields["original_max_position_embeddings"] = fields.pop("original_max_positions")
        values["rope_scaling"] = fields
    return values
