"""Mistral: how its configuration maps onto the transformer, and the chat format of Mistral-7B-Instruct-v0.3."""

from __future__ import annotations

from typing import Any

from selfevo.dialogue import Messages
from selfevo.models.chat import ChatError, Codec, check_messages
from selfevo.models.hf_config import ConfigReader, read_common, write_common
from selfevo.models.model_config import ModelConfig


def read_config(reader: ConfigReader) -> ModelConfig:
    common = read_common(reader, default_kv_heads=8, max_positions=131072)
    window = reader.take_window("sliding_window", absent=4096)
    return ModelConfig(family="mistral", windows=(window,) * common["num_layers"], **common)


def write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": config.windows[0],
        **write_common(config),
    }


class MistralChat:
    """``<s>[INST] user[/INST] assistant</s>``; the system text stands before the last user message, two newlines apart.

    It therefore moves as a dialogue grows. Where an assistant turn ends the conversation it stays before the last user
    message (the published template drops it there; the makers' own encoder does not).
    """

    name = "mistral"
    markers = ("<s>", "</s>", "[INST]", "[/INST]")
    templates = frozenset({"cafb64e0e9e5fd2503054b3479593fae39cbdfd52338ce8af9bb4664a8eb05bd"})

    def __call__(self, codec: Codec, messages: Messages, add_generation_prompt: bool) -> list[int]:
        check_messages(messages, format_name=self.name)
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        spoken = [message for message in messages if message["role"] != "system"]
        for index, message in enumerate(spoken):
            if message["role"] != ("user", "assistant")[index % 2]:
                raise ChatError("in the mistral format user and assistant alternate, and a user begins")
        if add_generation_prompt and len(spoken) % 2 == 0:
            raise ChatError(
                "in the mistral format [/INST] is the generation prompt: it needs a user message at the end"
            )
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
        if not text:
            raise ChatError("the mistral format has no way to write an empty assistant message")
        return [*codec.encode(text), codec.special_id("</s>")]

    def stop_ids(self, codec: Codec) -> tuple[int, ...]:
        return (codec.special_id("</s>"),)
