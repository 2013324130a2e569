"""What a longer dialogue costs: forward + backward over all its pairs, with 1, 2 and 4 times the turns.

    python benchmarks/turns.py [--shape small] [--turns 14]

Random ids in the proportions of ESConv: a system prompt of 250 tokens, 45 tokens of context a turn, two replies of 25.
Attention over one dialogue is quadratic in its turns, everything else is linear. A plain batch is quadratic throughout.
"""

from __future__ import annotations

import argparse
import time

import torch
from shapes import SHAPES

from selfevo.lora import inject_lora
from selfevo.models import Transformer
from selfevo.scoring import Example, response_logps

SYSTEM, TURN, REPLY = 250, 45, 25


def dialogue(turns: int, vocab: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (SYSTEM + turns * (TURN + 2 * REPLY),), generator=generator).tolist()
    said, replies = ids[: SYSTEM + turns * TURN], ids[SYSTEM + turns * TURN :]
    contexts = [said[: SYSTEM + turn * TURN] for turn in range(1, turns + 1) for _ in range(2)]
    return [(context, replies[i * REPLY : (i + 1) * REPLY]) for i, context in enumerate(contexts)]


def seconds(model: Transformer, examples: list[Example], tries: int) -> float:
    best = float("inf")
    for _ in range(tries + 1):
        started = time.perf_counter()
        response_logps(model, examples, max_tokens=10**6)[0].sum().backward()
        model.zero_grad(set_to_none=True)
        best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="small", help="model shape (default: small)")
    parser.add_argument("--turns", type=int, default=14, help="turns of the shortest dialogue (default: 14)")
    parser.add_argument("--tries", type=int, default=3, help="the best of so many (default: 3)")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Transformer(SHAPES[options.shape])
    inject_lora(model)
    first = 0.0
    for factor in (1, 2, 4):
        took = seconds(model, dialogue(factor * options.turns, SHAPES[options.shape].vocab_size), options.tries)
        first = first or took
        print(f"{factor * options.turns} turns: {took:.2f} s, {took / first:.2f} times the shortest", flush=True)


if __name__ == "__main__":
    main()
