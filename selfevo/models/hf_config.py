"""Reading and writing ``config.json``: the keys that the three families have in common.

Every key is either read, or known to have no effect on the logits, or refused by name: a feature that is not
implemented is never ignored.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Sequence
from typing import Any

from selfevo.files import Fields, FileError
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
# Far beyond what there is, and far below what a mutilated file may say: sizes of one dimension, layers, positions.
LARGEST_SIZE, MOST_LAYERS, MOST_POSITIONS = 2**24, 2**12, 2**31


class ConfigError(FileError):
    """A ``config.json`` that cannot be loaded; the message names the file and the key."""


class ConfigReader(Fields):
    """Takes values out of a parsed ``config.json`` and refuses what is left at the end; ``allowed`` are left out."""

    error = ConfigError

    def __init__(self, values: Any, where: str, allowed: Collection[str] = ()) -> None:
        super().__init__(values, where)
        self.values = {key: value for key, value in self.values.items() if key not in allowed}

    def take_window(self, key: str, absent: int) -> int | None:
        """A sliding window: null and 0 mean none, and a missing key means ``absent``, the family's default."""
        if key not in self.values:
            return absent
        return self.take(key, int, 0, low=0, high=MOST_POSITIONS) or None

    def take_layer_types(self, num_layers: int, default: Sequence[str]) -> list[str]:
        """The kind of attention of each layer: full_attention or sliding_attention."""
        kinds: list[str] = self.take_list("layer_types", str, list(default))
        if len(kinds) != num_layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
            known = "full_attention or sliding_attention"
            raise self.fail(f"'layer_types' should name {known} {num_layers} times: {reprlib.repr(kinds)}")
        return kinds

    def require(self, key: str, allowed: tuple[Any, ...]) -> None:
        """Refuses ``key`` unless it is absent or has one of the allowed values."""
        self.taken.add(key)
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise self.fail(f"{key!r} is {reprlib.repr(value)}; only {' or '.join(map(repr, allowed))} is implemented")

    def finish(self) -> None:
        """Refuses the keys that were not taken, unless they are harmless or switched off."""
        for key, value in self.values.items():
            harmless = key in self.taken or key in HARMLESS or key.startswith(("_", "unsloth"))
            harmless = harmless or key.endswith(("_version", "_token_id", "_token_ids"))
            if not harmless and value not in (None, False, 0, [], {}, *WITHOUT_EFFECT.get(key, ())):
                raise self.fail(
                    f"{key!r} ({reprlib.repr(value)}) is not implemented here, and ignoring it could change the model; "
                    f"if you know that it does not, load_model(..., allow_unknown=({key!r},)) leaves it out"
                )


def read_rope(reader: ConfigReader, default_max_positions: int) -> dict[str, Any]:
    """Rotary settings, in the older form (``rope_theta``, ``rope_scaling``) or the newer (``rope_parameters``)."""
    max_positions = reader.take(
        "max_position_embeddings", int, default_max_positions, low=1, high=MOST_POSITIONS
    )  # fmt: skip
    older = reader.take("rope_scaling", dict, {})
    settings = ConfigReader(reader.take("rope_parameters", dict, older), f"{reader.where}, rotary settings")
    kind = settings.take("rope_type", str, settings.take("type", str, "default"))
    theta = reader.take("rope_theta", float, 10000.0, low=10, high=1e12)
    theta = settings.take("rope_theta", float, theta, low=10, high=1e12)
    settings.require("partial_rotary_factor", (1.0,))
    name = "original_max_position_embeddings"
    original = reader.take(name, int, None, low=1, high=MOST_POSITIONS)
    original = settings.take(name, int, original, low=1, high=MOST_POSITIONS)
    scaling = _read_scaling(kind, settings, original or max_positions)
    settings.finish()
    return {"rope_theta": theta, "rope_scaling": scaling, "max_positions": max_positions}


def _read_scaling(kind: str, settings: ConfigReader, original: int) -> RopeScaling | None:
    """``original`` is the window before the scaling."""
    if kind == "default":
        return None
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        raise settings.fail(f"the scaling {kind!r} is not implemented; default, linear, dynamic, llama3 and yarn are")
    factor = settings.take("factor", float, low=1, high=1e6)
    if kind == "llama3":
        low = settings.take("low_freq_factor", float, low=1e-3, high=1e3)
        high = settings.take("high_freq_factor", float, low=1e-3, high=1e3)
        if not low < high:
            raise settings.fail(f"'low_freq_factor' ({low:g}) should be below 'high_freq_factor' ({high:g})")
        return Llama3Rope(factor, low, high, original)
    if kind == "yarn":
        given = settings.take("attention_factor", float, None, low=1e-3, high=1e3)
        mscale, everywhere = (settings.take(key, float, 0.0, low=0, high=1e3) for key in ("mscale", "mscale_all_dim"))
        fast = settings.take("beta_fast", float, 32.0, low=1e-3, high=1e6)
        slow = settings.take("beta_slow", float, 1.0, low=1e-3, high=1e6)
        if not slow < fast:
            raise settings.fail(f"'beta_slow' ({slow:g}) should be below 'beta_fast' ({fast:g})")
        size = _yarn_size(factor, mscale) / _yarn_size(factor, everywhere) if mscale and everywhere else None
        return YarnRope(
            factor, original, fast, slow,
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

    def size(key: str, default: Any = ..., high: int = LARGEST_SIZE) -> Any:
        return reader.take(key, int, *(() if default is ... else (default,)), low=1, high=high)

    hidden_size, num_heads = size("hidden_size"), size("num_attention_heads")
    head_dim = size("head_dim", None)
    if head_dim is None:
        if hidden_size % num_heads:
            raise reader.fail(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
        head_dim = hidden_size // num_heads
    if num_heads * head_dim > LARGEST_SIZE:
        raise reader.fail(f"{num_heads} heads of size {head_dim} are more than the {LARGEST_SIZE} there may be")
    reader.require("hidden_act", ("silu",))
    return {
        "vocab_size": size("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": size("intermediate_size"),
        "num_layers": size("num_hidden_layers", high=MOST_LAYERS),
        "num_heads": num_heads,
        "num_kv_heads": size("num_key_value_heads", default_kv_heads or num_heads),
        "head_dim": head_dim,
        "norm_eps": reader.take("rms_norm_eps", float, 1e-6, low=1e-12, high=1e-2),
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
