"""What one step moves and computes on one GPU or many, and what bounds it: from shapes alone, nothing is measured.

    python benchmarks/scaling.py

Training: every GPU has one packed row, the 8 pairs of a step of the paper with contexts shared: 915 distinct tokens, of
which 455 are of replies (means over ESConv's test dialogues with the tokenizer of Llama 3). Decoding: one token for
each of the replies that a GPU has under way, in contexts of 512 tokens. Peaks are those that NVIDIA gives for the H100
(SXM): 989 TFLOP/s in bfloat16, 3.35 TB/s of memory, 450 GB/s each way between the 8 GPUs of a machine, and 50 GB/s a
GPU between machines. Real kernels reach a part of them: the figures say what limits a step, not how long it takes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from contest import GIB
from shapes import LLAMA3_8B

from selfevo.models import ModelConfig, Transformer
from selfevo.training import estimate_memory

FLOPS, MEMORY, INSIDE, BETWEEN, MACHINE = 989e12, 3.35e12, 450e9, 50e9, 8
TOKENS, SCORED, CONTEXT = 915, 455, 512
LLAMA3_70B = replace(
    LLAMA3_8B, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, windows=(None,) * 80
)


@dataclass(frozen=True)
class Case:
    name: str
    config: ModelConfig
    gpus: int
    shard: bool
    slots: int  # replies under way on each GPU


CASES = (
    Case("8B", LLAMA3_8B, 1, False, 128),
    Case("8B", LLAMA3_8B, 8, False, 128),
    Case("8B", LLAMA3_8B, 8, True, 128),
    Case("8B", LLAMA3_8B, 64, False, 128),
    Case("70B", LLAMA3_70B, 8, True, 128),
    Case("70B", LLAMA3_70B, 64, True, 128),
)


@dataclass(frozen=True)
class Step:
    """What one GPU does in a step: floating-point operations, bytes of its own memory, bytes that it receives."""

    flops: float
    moved: float
    received: float
    link: float  # bytes a second

    @property
    def milliseconds(self) -> dict[str, float]:
        seconds = {"compute": self.flops / FLOPS, "memory": self.moved / MEMORY, "network": self.received / self.link}
        return {name: 1000 * value for name, value in seconds.items()}

    @property
    def told(self) -> str:
        times = self.milliseconds
        bound = max(times, key=lambda name: times[name])
        amounts = (self.flops / 1e12, self.moved / 1e9, self.received / 1e9)
        return " | ".join(f"{amount:.1f}" for amount in amounts) + f" | {bound}, {times[bound]:.1f} ms"


def steps(case: Case) -> tuple[Step, Step]:
    """A training step and a decode step."""
    config = case.config
    with torch.device("meta"):
        model = Transformer(config)
    blocks = sum(parameter.numel() for parameter in model.model.layers.parameters())
    head = config.vocab_size * config.hidden_size
    layers = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    adapters = 8 * sum(layer.in_features + layer.out_features for layer in layers)
    link = INSIDE if case.gpus <= MACHINE else BETWEEN
    others = (case.gpus - 1) / case.gpus
    # Weights are frozen: a forward product, and one for the gradient of its input. Adapters have both factors' as well.
    training = Step(
        flops=TOKENS * (4 * blocks + 6 * adapters) + SCORED * 4 * head,
        moved=2 * 2 * (blocks + head),
        # Adapters are sent out in float32 and their gradients collected in float64; blocks are gathered twice.
        received=(case.gpus > 1) * 12 * adapters + case.shard * others * 2 * 2 * blocks,
        link=link,
    )
    stored = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2  # bytes of a token's keys and values
    decoding = Step(
        flops=case.slots * 2 * (blocks + head + adapters),
        moved=2 * (blocks + head) + case.slots * CONTEXT * stored,
        received=case.shard * others * 2 * blocks,
        link=link,
    )
    return training, decoding


def main() -> None:
    names = [
        "model",
        "GPUs",
        "weights",
        "training, GiB",
        "rollout, GiB",
        "step",
        "TFLOP",
        "GB of memory",
        "GB received",
    ]
    print(f"| {' | '.join(names)} | bound by |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for case in CASES:
        shared_by = case.gpus if case.shard else 1
        needed = estimate_memory(
            case.config, iterations=2, slots=case.slots, context=CONTEXT, checkpointed=True, shared_by=shared_by
        )
        way = "shared" if case.shard else "whole"
        training, decoding = steps(case)
        room = f"{needed.training / GIB:.1f} | {needed.rollout / GIB:.1f}"
        print(f"| {case.name} | {case.gpus} | {way} | {room} | training | {training.told} |")
        print(f"| | | | | | decoding, {case.gpus * case.slots} replies | {decoding.told} |")


if __name__ == "__main__":
    main()
