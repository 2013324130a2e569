"""One optimiser step: schedule, batch order, loss over packs."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from selfevo.datasets.seeds import derive_seed
from selfevo.kernels import ranks
from selfevo.lora import lora_parameters
from selfevo.models.transformer import Transformer
from selfevo.training.objectives import Objective, Statistics
from selfevo.training.settings import TrainSettings
from selfevo.trie.packing import pack


@dataclass(frozen=True)
class _Part:
    """What one rank computes: packs of items of an objective, each with its number among the packs of all ranks."""

    objective: Objective
    packs: list[tuple[int, list[int]]]
    items: int = 0  # of all ranks together, over which gradients are averaged
    seed: int = 0
    step: int = 0


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

    The packs are dealt to the ranks. Their gradients are added up in float64, so that the sum does not depend on who
    computed what. Raises FloatingPointError, before the step is taken, where the loss or the gradient is not finite.
    """
    started = time.perf_counter()
    rate = learning_rate(step, total, settings)
    for group in optimiser.param_groups:
        group["lr"] = rate
    model.train()
    dealt = _parts(objective, batch, settings.max_tokens)
    parts = [replace(part, items=len(batch), seed=settings.seed, step=step) for part in dealt]
    sums = _in_order(parts, ranks.deal(_gradients, model, parts))
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
    found = _read({**sums, "gradient_norm": norm}, model.device)
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


def _parts(objective: Objective, batch: Sequence[int], max_tokens: int) -> list[_Part]:
    """The packs of a batch, dealt to the ranks by their tokens."""
    sequences = [objective.sequences(i) for i in batch]
    packs = [[batch[member] for member in members] for members in pack(sequences, max_tokens)]
    if ranks.size() == 1:
        return [_Part(objective, list(enumerate(packs)))]
    costs = {index: sum(map(len, own)) for index, own in zip(batch, sequences)}
    parts = []
    for share in ranks.share_out([sum(costs[index] for index in members) for members in packs]):
        places = iter(range(len(batch)))  # in the part's own objective
        own = [(number, [next(places) for _ in packs[number]]) for number in share]
        parts.append(_Part(objective.part([index for number in share for index in packs[number]]), own))
    return parts


def _in_order(parts: Sequence[_Part], found: Sequence[list[Statistics]]) -> Statistics:
    """The sums over all packs, added up in the order of their numbers whoever computed them."""
    numbered = {n: own for part, rows in zip(parts, found) for (n, _), own in zip(part.packs, rows)}
    first, *rest = (numbered[number] for number in sorted(numbered))
    return {name: sum((other[name] for other in rest), value) for name, value in first.items()}


def _gradients(model: Transformer, part: _Part) -> list[Statistics]:
    """One rank's part of a step: the statistics of its packs. The gradient of all ranks is left on the parameters of
    rank 0; it is float64 until it is complete, but for a single pack, which needs no sum."""
    parameters = lora_parameters(model)
    found, total = [], None
    alone = ranks.size() == 1 and len(part.packs) == 1
    for parameter in parameters:
        parameter.grad = None
    with torch.random.fork_rng():
        for number, members in part.packs:
            # Dropout depends on nothing else, so a resumed run, and any rank, repeats it.
            torch.manual_seed(derive_seed(part.seed, "dropout", part.step, number))
            loss, statistics = part.objective.loss(model, members)
            (loss / part.items).backward()
            found.append(statistics)
            if not alone:
                total = _moved_gradient(parameters, total)
        model.keep_pace()
    if not alone:
        if total is None:  # this rank has no pack
            total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64, device=model.device)
        ranks.sum_on_first(total)
        for parameter, values in zip(parameters, total.split([p.numel() for p in parameters])):
            parameter.grad = values.view_as(parameter).to(parameter.dtype)
    return _for_first(found, model.device)


def _moved_gradient(parameters: Sequence[torch.nn.Parameter], total: Tensor | None) -> Tensor:
    """``total`` (N,) float64 with the gradients of all parameters added, which are then removed from these."""
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return flat.double() if total is None else total.add_(flat)


def _for_first(found: list[Statistics], device: torch.device) -> list[Statistics]:
    """Statistics as rank 0 needs them: its own as they are, not waited for, those of others as numbers."""
    return found if ranks.rank() == 0 else [dict(_read(statistics, device)) for statistics in found]


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


def evaluate_held_out(model: Transformer, held_out: Objective, settings: TrainSettings) -> dict[str, float]:
    """Statistics on held-out items, averaged; their packs are dealt to the ranks."""
    model.eval()
    parts = _parts(held_out, range(len(held_out)), settings.max_tokens)
    sums = _in_order(parts, ranks.deal(_statistics, model, parts))
    return {name: value / len(held_out) for name, value in _read(sums, model.device).items()}


@torch.no_grad()
def _statistics(model: Transformer, part: _Part) -> list[Statistics]:
    found = [part.objective.loss(model, members)[1] for _, members in part.packs]
    model.keep_pace()
    return _for_first(found, model.device)
