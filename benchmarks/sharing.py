"""What the token trie saves: forward + backward over a dialogue's preference pairs, packed and as padded batches.

Real dialogues, random weights, one pair per supporter turn: the golden reply is chosen, the next turn's is rejected.
Both sides run the same model, adapters and chunked head in one process, alternating; the first round is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from selfevo.datasets import load_dialogues
from selfevo.dialogue import clean_dialogue, reply_examples, to_messages
from selfevo.lora import inject_lora, lora_parameters
from selfevo.losses import linear_logps
from selfevo.models import ModelConfig, Transformer, load_tokenizer
from selfevo.prompts import reply_prompt
from selfevo.scoring import Example, response_logps
from selfevo.trie import build_trie

SMALL = ModelConfig(
    family="qwen2", vocab_size=151936, hidden_size=512, intermediate_size=1408, num_layers=12, num_heads=8,
    num_kv_heads=2, head_dim=64, norm_eps=1e-6, rope_theta=1e6, max_positions=32768, windows=(None,) * 12,
    qkv_bias=True, tied=True,
)  # fmt: skip


def dialogue_pairs(path: str, tokenizer_folder: str, count: int) -> list[list[Example]]:
    """For each of ``count`` dialogues its (prompt, reply) sequences, two per pair."""
    tokenizer = load_tokenizer(tokenizer_folder)
    result = []
    for dialogue in load_dialogues(path)[:count]:
        turns = reply_examples(clean_dialogue(dialogue, Counter()), Counter(), skip_first=0, skip_last=0)
        sequences: list[Example] = []
        for turn, other in zip(turns, turns[1:] + turns[:1]):
            prompt = tokenizer.encode_chat(reply_prompt(to_messages(turn.context)))
            sequences += [(prompt, tokenizer.encode_reply(reply.golden.text)) for reply in (turn, other)]
        result.append(sequences)
    return result


def padded_logps(model: Transformer, examples: list[Example]) -> Tensor:
    """The usual way: one right-padded batch, the head at reply positions."""
    rows = pad_sequence([torch.tensor([*p, *r][:-1]) for p, r in examples], batch_first=True)
    hidden = model.hidden_states(rows)
    scored = torch.cat([hidden[i, len(p) - 1 : len(p) + len(r) - 1] for i, (p, r) in enumerate(examples)])
    logps = linear_logps(scored, model.lm_head.weight, torch.tensor([t for _, r in examples for t in r]))
    return torch.stack([part.sum() for part in logps.split([len(r) for _, r in examples])])


def train_packed(model: Transformer, examples: list[Example], batch: int) -> Tensor:
    sums, _ = response_logps(model, examples)
    sums.sum().backward()
    return sums.detach()


def train_padded(model: Transformer, examples: list[Example], batch: int) -> Tensor:
    """Backward batch by batch, as training would."""
    parts = []
    for start in range(0, len(examples), batch):
        part = padded_logps(model, examples[start : start + batch])
        part.sum().backward()
        parts.append(part.detach())
    return torch.cat(parts)


Trainer = Callable[[Transformer, list[Example], int], Tensor]


def timed(trainer: Trainer, model: Transformer, examples: list[Example], batch: int) -> tuple[float, Tensor]:
    model.zero_grad(set_to_none=True)
    started = time.perf_counter()
    sums = trainer(model, examples, batch)
    return time.perf_counter() - started, sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dialogues, e.g. ESConv.json")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id of a tokenizer")
    parser.add_argument("--dialogues", type=int, default=3, help="rounds, one dialogue each (default: 3)")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a padded batch (default: 8, 4 pairs)")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Transformer(SMALL)
    inject_lora(model)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.02)
    dialogues = dialogue_pairs(options.data, options.tokenizer, options.dialogues + 1)
    ratios = []
    for number, examples in enumerate(dialogues):
        packed_seconds, packed = timed(train_packed, model, examples, options.batch)
        plain_seconds, expected = timed(train_padded, model, examples, options.batch)
        tokens = sum(len(p) + len(r) for p, r in examples)
        distinct = len(build_trie([[*p, *r] for p, r in examples]))
        ratio = plain_seconds / packed_seconds
        note = "  (not counted)" if number == 0 else ""
        print(
            f"{len(examples) // 2:3d} pairs, {tokens:6d} tokens, {distinct:5d} distinct ({tokens / distinct:4.1f}x): "
            f"padded {plain_seconds:6.2f} s, trie {packed_seconds:5.2f} s, {ratio:4.1f} times faster, "
            f"largest difference {float((packed - expected).abs().max()):.1e}{note}",
            flush=True,
        )
        if number:
            ratios.append(ratio)
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"times faster: median {middle:.1f}, from {low:.1f} to {high:.1f} over {len(ratios)} dialogues")


if __name__ == "__main__":
    main()
