"""One optimiser step: schedule, batch order, loss over packs."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from typing import Any

import torch

from selfevo.datasets.seeds import derive_seed
from selfevo.models.transformer import Transformer
from selfevo.training.objectives import Objective, Statistics
from selfevo.training.settings import TrainSettings
from selfevo.trie.packing import pack


def train_step(
    model: Transformer,
    objective: Objective,
    batch: Sequence[int],
    parameters: list[torch.nn.Parameter],
    optimiser: torch.optim.Optimizer,
    step: int,
    total: int,
    settings: TrainSettings,
) -> dict[str, Any]:
    """One optimiser step over one batch, packed to the token budget; returns the statistics, averaged over items.

    Raises FloatingPointError, before the step is taken, where the loss or the gradient is not finite.
    """
    started = time.perf_counter()
    rate = learning_rate(step, total, settings)
    for group in optimiser.param_groups:
        group["lr"] = rate
    model.train()
    optimiser.zero_grad(set_to_none=True)
    sums: Statistics = {}
    with torch.random.fork_rng():  # dropout draws depend on the step alone, so a resumed run repeats them
        torch.manual_seed(derive_seed(settings.seed, "dropout", step))
        for members in pack([objective.sequences(i) for i in batch], settings.max_tokens):
            loss, statistics = objective.loss(model, [batch[m] for m in members])
            (loss / len(batch)).backward()
            sums = _added(sums, statistics)
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
    found = _read(sums | {"gradient_norm": norm}, model.device)
    norm_found = found.pop("gradient_norm")
    if not math.isfinite(found["loss"]):
        raise FloatingPointError(f"the loss is {found['loss']}")
    if not math.isfinite(norm_found):
        raise FloatingPointError("the gradient is not finite")
    optimiser.step()
    record: dict[str, Any] = {"step": step, "learning_rate": rate, "items": len(batch)}
    record |= {name: value / len(batch) for name, value in found.items()}
    record |= {"gradient_norm": norm_found, "seconds": round(time.perf_counter() - started, 4)}
    return record


def _added(sums: Statistics, statistics: Statistics) -> Statistics:
    return {name: sums[name] + value for name, value in statistics.items()} if sums else statistics


def _read(statistics: Statistics, device: torch.device) -> dict[str, float]:
    """The numbers themselves: the one time that a step waits for the device."""
    numbers = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in statistics.values()]
    return dict(zip(statistics, torch.stack(numbers).tolist()))


def learning_rate(step: int, total: int, settings: TrainSettings) -> float:
    """The rate of a step, counted from 0, of ``total``: a linear warm-up, then the schedule.

    "linear" and "cosine" fall over the steps after the warm-up as in transformers; their last step is the one before 0.
    """
    warmup = settings.warmup * total
    if step + 1 <= warmup or settings.schedule == "constant":
        return settings.learning_rate * min(1.0, (step + 1) / max(1.0, warmup))
    passed = (step - int(warmup)) / max(1, total - int(warmup))  # 0 to 1
    share = 1 - passed if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * passed))
    return settings.learning_rate * share


def batch_indices(groups: Sequence[str], step: int, steps_per_epoch: int, settings: TrainSettings) -> list[int]:
    """The items of one step: the epoch's order depends on the seed and the epoch alone."""
    epoch, place = divmod(step, steps_per_epoch)
    generator = random.Random(derive_seed(settings.seed, "order", epoch))
    order = list(range(len(groups)))
    if settings.shuffle == "dialogues":
        names = list(dict.fromkeys(groups))
        generator.shuffle(names)
        rank = {name: place for place, name in enumerate(names)}
        order.sort(key=lambda index: rank[groups[index]])  # turns stay in order: a step's share of one context
    else:
        generator.shuffle(order)
    size = settings.batch_size * settings.accumulation
    return order[place * size : (place + 1) * size]


@torch.no_grad()
def evaluate_held_out(model: Transformer, held_out: Objective, settings: TrainSettings) -> dict[str, float]:
    """Statistics on held-out items, averaged."""
    model.eval()
    sums: Statistics = {}
    for members in pack([held_out.sequences(i) for i in range(len(held_out))], settings.max_tokens):
        sums = _added(sums, held_out.loss(model, members)[1])
    return {name: value / len(held_out) for name, value in _read(sums, model.device).items()}
