"""Llama: its ``config.json`` as a ``ModelConfig`` and back, and the Llama-3 chat format."""

from __future__ import annotations

from typing import Any

from selfevo.dialogue import Messages
from selfevo.models.chat import ChatFormat, Codec
from selfevo.models.hf_config import ConfigReader, read_common, write_common
from selfevo.models.model_config import ModelConfig


def read_config(reader: ConfigReader) -> ModelConfig:
    common = read_common(reader, default_kv_heads=None, max_positions=2048)
    attention_bias = reader.take("attention_bias", bool, False)
    full = ["full_attention"] * common["num_layers"]
    if reader.take_layer_types(common["num_layers"], full) != full:
        raise reader.fail("'layer_types' names sliding windows, which a llama has not")
    return ModelConfig(
        family="llama",
        windows=(None,) * common["num_layers"],
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=reader.take("mlp_bias", bool, False),
        **common,
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        **write_common(config),
    }


class Llama3Chat(ChatFormat):
    """``<|start_header_id|>role<|end_header_id|>``, two newlines, the stripped content, ``<|eot_id|>``; one BOS."""

    name = "llama3"
    markers = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    jinja = (
        "{{ '<|begin_of_text|>' }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    templates = frozenset({"ba03a121d097859c7b5b9cd03af99aafe95275210d2876f642ad9929a150f122"})

    def __call__(self, codec: Codec, messages: Messages, add_generation_prompt: bool) -> list[int]:
        ids = [codec.special_id("<|begin_of_text|>")]
        for message in messages:
            ids += self._header(codec, message["role"]) + self.reply(codec, message["content"])
        return ids + self._header(codec, "assistant") if add_generation_prompt else ids

    def _header(self, codec: Codec, role: str) -> list[int]:
        start, end = codec.special_id("<|start_header_id|>"), codec.special_id("<|end_header_id|>")
        return [start, *codec.encode(role), end, *codec.encode("\n\n")]

    def reply(self, codec: Codec, text: str) -> list[int]:
        return [*codec.encode(text.strip()), codec.special_id("<|eot_id|>")]

    def stop_ids(self, codec: Codec) -> tuple[int, ...]:
        return codec.special_ids("<|eot_id|>", "<|end_of_text|>")
