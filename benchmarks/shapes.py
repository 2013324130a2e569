"""Model shapes and random checkpoints for the benchmarks, and the turns of real dialogues as preference pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from selfevo.datasets import load_dialogues
from selfevo.datasets.prompts import prompts_of, reply_prompt
from selfevo.dialogue import Messages, clean_dialogue, reply_examples, to_messages
from selfevo.models import ChatTokenizer, ModelConfig, Transformer, save_pretrained
from selfevo.training import PairIds

SMALL = ModelConfig(
    family="qwen2", vocab_size=151936, hidden_size=512, intermediate_size=1408, num_layers=12, num_heads=8,
    num_kv_heads=2, head_dim=64, norm_eps=1e-6, rope_theta=1e6, max_positions=32768, windows=(None,) * 12,
    qkv_bias=True, tied=True,
)  # fmt: skip
QWEN2_05B = replace(
    SMALL, hidden_size=896, intermediate_size=4864, num_layers=24, num_heads=14, windows=(None,) * 24
)  # fmt: skip
LLAMA3_8B = ModelConfig(
    family="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128, norm_eps=1e-5, rope_theta=5e5, max_positions=8192, windows=(None,) * 32,
)  # fmt: skip
SMOLLM2_135M = ModelConfig(
    family="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
    num_kv_heads=3, head_dim=64, norm_eps=1e-5, rope_theta=1e5, max_positions=8192, windows=(None,) * 30, tied=True,
)  # fmt: skip
TINY = replace(SMALL, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, head_dim=16, windows=(None,) * 2)
SHAPES = {
    "tiny": TINY,
    "small": SMALL,
    "smollm2-135m": SMOLLM2_135M,
    "qwen2-0.5b": QWEN2_05B,
    "llama3-8b": LLAMA3_8B,
}
T = TypeVar("T")


@torch.no_grad()
def write_random(shape: str, folder: Path, tokenizer: ChatTokenizer, dtype: torch.dtype) -> None:
    """A checkpoint with random weights in Hugging Face layout, so that every contender loads the same."""
    torch.manual_seed(0)
    config = replace(SHAPES[shape], vocab_size=tokenizer.vocab_size + 16) if shape == "tiny" else SHAPES[shape]
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Transformer(config).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.02)
    save_pretrained(model.cpu(), tokenizer, folder)


@dataclass(frozen=True)
class TurnPair:
    """A supporter turn as a pair: the conversation before it, its golden reply, and that of the dialogue's next turn,
    which stands for the rejected one."""

    messages: Messages
    chosen: str
    rejected: str

    def ids(self, tokenizer: ChatTokenizer) -> PairIds:
        prompt = tokenizer.encode_chat(self.messages)
        return PairIds(prompt, tokenizer.encode_reply(self.chosen), tokenizer.encode_reply(self.rejected))


def dialogue_turns(path: str, first: int, count: int) -> list[list[TurnPair]]:
    """The supporter turns of ``count`` dialogues from number ``first`` on, by dialogue."""
    result = []
    for dialogue in load_dialogues(path)[first : first + count]:
        turns = reply_examples(clean_dialogue(dialogue, Counter()), Counter(), skip_first=0, skip_last=0)
        result.append(
            [
                TurnPair(
                    reply_prompt(to_messages(turn.context), prompts_of("strategy").system),
                    turn.golden.text,
                    other.golden.text,
                )
                for turn, other in zip(turns, turns[1:] + turns[:1])
            ]
        )
    return result


def dialogue_pairs(path: str, tokenizer: ChatTokenizer, first: int, count: int) -> list[list[PairIds]]:
    """``dialogue_turns`` as ids."""
    return [[turn.ids(tokenizer) for turn in turns] for turns in dialogue_turns(path, first, count)]


def evenly(items: Sequence[T], count: int, length: Callable[[T], int]) -> list[T]:
    """``count`` items in order of length, from the middles of as many equal stretches of that order."""
    ordered = sorted(items, key=length)
    return [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)]
