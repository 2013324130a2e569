"""Mistral: its ``config.json`` as a ``ModelConfig`` and back, and the chat format of Mistral-7B-Instruct-v0.3."""

from __future__ import annotations

from typing import Any

from selfevo.dialogue import Messages
from selfevo.models.chat import ChatError, ChatFormat, Codec
from selfevo.models.hf_config import ConfigReader, read_common, write_common
from selfevo.models.model_config import ModelConfig


def read_config(reader: ConfigReader) -> ModelConfig:
    common = read_common(reader, default_kv_heads=8, max_positions=131072)
    window = reader.take_window("sliding_window", absent=4096)
    layers = common["num_layers"]
    kinds = reader.take_layer_types(layers, ["sliding_attention" if window else "full_attention"] * layers)
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return ModelConfig(family="mistral", windows=windows, **common)


def write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": next((window for window in config.windows if window is not None), None),
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in config.windows],
        **write_common(config),
    }


class MistralChat(ChatFormat):
    """``<s>[INST] user[/INST] assistant</s>``; the system text and two newlines come before the last user message.

    So the system text moves as a dialogue grows. It is also written if the conversation ends with an assistant turn,
    as by Mistral's own encoder; the published template drops it there.
    """

    name = "mistral"
    markers = ("<s>", "</s>", "[INST]", "[/INST]")
    jinja = (
        "{% set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
        "{% set spoken = messages[1:] if system else messages %}{{ '<s>' }}"
        "{% set last = (spoken | length - 1) // 2 * 2 %}{% for m in spoken %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + (system if loop.index0 == last else '') + m['content'] + '[/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
    )
    templates = frozenset({"cafb64e0e9e5fd2503054b3479593fae39cbdfd52338ce8af9bb4664a8eb05bd"})

    def __call__(self, codec: Codec, messages: Messages, add_generation_prompt: bool) -> list[int]:
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        spoken = [message for message in messages if message["role"] != "system"]
        for index, message in enumerate(spoken):
            if message["role"] != ("user", "assistant")[index % 2]:
                raise ChatError("in the mistral format user and assistant alternate, and a user begins")
        if add_generation_prompt and len(spoken) % 2 == 0:
            raise ChatError("the mistral format writes a generation prompt only after a user message")
        last_user = (len(spoken) - 1) // 2 * 2
        ids = [codec.special_id("<s>")]
        for index, message in enumerate(spoken):
            if message["role"] == "assistant":
                ids += self.reply(codec, message["content"])
                continue
            text = f"{system}\n\n{message['content']}" if system and index == last_user else message["content"]
            ids += [codec.special_id("[INST]"), *codec.encode(text), codec.special_id("[/INST]")]
        return ids

    def reply(self, codec: Codec, text: str) -> list[int]:
        text = text.rstrip(" ")
        return [*(codec.encode(text) if text else codec.encode_run(" ", first=False)), codec.special_id("</s>")]

    def stop_ids(self, codec: Codec) -> tuple[int, ...]:
        return (codec.special_id("</s>"),)
