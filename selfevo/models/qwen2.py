"""Qwen2: its ``config.json`` as a ``ModelConfig`` and back, and its chat format, ChatML."""

from __future__ import annotations

from typing import Any

from selfevo.dialogue import Messages
from selfevo.models.chat import ChatFormat, Codec
from selfevo.models.hf_config import ConfigReader, read_common, write_common
from selfevo.models.model_config import ModelConfig


def read_config(reader: ConfigReader) -> ModelConfig:
    common = read_common(reader, default_kv_heads=32, max_positions=32768)
    return ModelConfig(family="qwen2", windows=_windows(reader, common["num_layers"]), qkv_bias=True, **common)


def _windows(reader: ConfigReader, num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer: only with ``use_sliding_window``, and in the upper layers or those listed."""
    in_use = reader.take("use_sliding_window", bool, False)
    size = reader.take_window("sliding_window", absent=4096)
    first = reader.take("max_window_layers", int, 28, low=0)
    own = ["sliding_attention" if in_use and layer >= first else "full_attention" for layer in range(num_layers)]
    kinds = reader.take_layer_types(num_layers, own)
    return tuple(size if in_use and kind == "sliding_attention" else None for kind in kinds)


def write_config(config: ModelConfig) -> dict[str, Any]:
    sizes = [window for window in config.windows if window is not None]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": bool(sizes),
        "sliding_window": sizes[0] if sizes else None,
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in config.windows],
        **write_common(config),
    }


class Qwen2Chat(ChatFormat):
    """``<|im_start|>role``, a newline, the untouched content, ``<|im_end|>`` and a newline; no BOS."""

    name = "qwen2"
    markers = ("<|im_start|>", "<|im_end|>")
    templates = frozenset({"793202280c0910ab26bc6eb57c8212c2417324c6d8c4efd0d10d59092ab3e3eb"})
    default_system = "You are a helpful assistant."  # as in the published template, if none is given
    jinja = (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
        + default_system
        + "<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )

    def __call__(self, codec: Codec, messages: Messages, add_generation_prompt: bool) -> list[int]:
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        start, end = codec.special_id("<|im_start|>"), codec.special_id("<|im_end|>")
        newline = codec.encode("\n")
        ids: list[int] = []
        for message in messages:
            # A reply is encoded apart from its header, as it is when a model writes it.
            header, content = f"{message['role']}\n", message["content"]
            parts = [header, content] if message["role"] == "assistant" else [header + content]
            ids += [start, *(id_ for part in parts for id_ in codec.encode(part)), end, *newline]
        return [*ids, start, *codec.encode("assistant\n")] if add_generation_prompt else ids

    def reply(self, codec: Codec, text: str) -> list[int]:
        return [*codec.encode(text), codec.special_id("<|im_end|>")]

    def stop_ids(self, codec: Codec) -> tuple[int, ...]:
        return codec.special_ids("<|im_end|>", "<|endoftext|>")
