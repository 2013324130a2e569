"""The one optimisation loop, used for SFT and DPO alike: an objective is passed in, an adapter comes out.

A step averages over exactly ``batch_size * accumulation`` items however they are packed. The state is checkpointed
whole, so a killed run resumes to the same adapter.
"""

from __future__ import annotations

import ctypes
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from selfevo.files import replace_file, write_jsonl
from selfevo.lora import lora_parameters, save_adapter
from selfevo.models.transformer import Transformer
from selfevo.objectives import Objective
from selfevo.trie import pack

SHUFFLES = ("dialogues", "pairs")


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that its tensors free, for the next ones; says whether that could be arranged.

    On Linux a large block goes back to the system when it is freed, and every page of the next one is mapped afresh,
    which costs a training step on a processor some 6 %. It is a setting of the whole process (glibc's ``mallopt``), so
    programs make it, not the library.
    """
    trim_threshold, mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))


@dataclass(frozen=True)
class TrainSettings:
    """The paper's values are the defaults."""

    learning_rate: float = 5e-6
    epochs: int = 2
    batch_size: int = 4
    accumulation: int = 2
    warmup: float = 0.01  # share of all steps over which the learning rate rises linearly; constant afterwards
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    evaluations_per_epoch: int = 4
    patience: int = 3  # evaluations without improvement before training stops early
    checkpoint_every: int = 50  # steps; every evaluation writes one too
    max_tokens: int = 4096
    shuffle: str = "dialogues"  # keeps a dialogue's items together, which shares their context; "pairs" does not
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulation", "evaluations_per_epoch", "patience", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        rates_fit = 0 < self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf  # NaN fits nowhere
        if not (rates_fit and self.max_grad_norm > 0 and 0 <= self.warmup <= 1):
            raise ValueError(
                "learning_rate and max_grad_norm must be positive, weight_decay not negative, warmup within [0, 1]: "
                f"{self.learning_rate}, {self.max_grad_norm}, {self.weight_decay}, {self.warmup}"
            )
        if self.shuffle not in SHUFFLES:
            raise ValueError(f"shuffle should be one of {', '.join(SHUFFLES)}, not {self.shuffle!r}")


@dataclass
class Progress:
    """All that changes while training; what a checkpoint holds besides the adapter and the optimiser."""

    step: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    best_loss: float = math.inf
    best_adapter: list[Tensor] | None = None
    bad_evaluations: int = 0
    stopped: bool = False


def train(
    model: Transformer,
    objective: Objective,
    folder: Path,
    settings: TrainSettings,
    *,
    held_out: Objective | None = None,
    base_model: str = "",
    label: str = "training",
) -> list[dict[str, Any]]:
    """Trains the adapters of ``model`` in place and writes them to ``folder``; returns the metrics of every step.

    With ``held_out`` items the adapter of the best evaluation is kept, and training stops after ``patience``
    evaluations without improvement. Writes ``metrics.jsonl`` as it goes, ``checkpoint.pt`` from time to time (and
    continues from one that is there), then the adapter in PEFT's format, noting ``base_model`` in it; the checkpoint
    is then removed.
    """
    if len(objective) == 0:
        raise ValueError(f"{label}: there are no items to train on")
    parameters = lora_parameters(model)
    optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps_per_epoch = math.ceil(len(objective) / (settings.batch_size * settings.accumulation))
    total = steps_per_epoch * settings.epochs
    evaluate_every = max(1, steps_per_epoch // settings.evaluations_per_epoch)
    folder.mkdir(parents=True, exist_ok=True)
    progress = _load_checkpoint(folder, parameters, optimiser)
    write_jsonl(folder / "metrics.jsonl", progress.metrics)
    with tqdm(total=total, initial=progress.step, desc=label, unit="step") as bar:
        while progress.step < total and not progress.stopped:
            batch = _batch(objective.groups, progress.step, steps_per_epoch, settings)
            record = _step(model, objective, batch, parameters, optimiser, progress.step, total, settings)
            progress.step += 1
            if held_out is not None and (progress.step % evaluate_every == 0 or progress.step == total):
                record["held_out"] = _evaluate(model, held_out, settings)
                _remember_best(progress, record["held_out"]["loss"], parameters, settings.patience)
            _log(folder, progress, record)
            if "held_out" in record or progress.step % settings.checkpoint_every == 0:
                _save_checkpoint(folder, progress, parameters, optimiser)
            bar.update()
            bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
    if progress.best_adapter is not None:
        _assign(parameters, progress.best_adapter)
    save_adapter(model, folder, base_model=base_model)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return progress.metrics


def _step(
    model: Transformer,
    objective: Objective,
    batch: Sequence[int],
    parameters: list[torch.nn.Parameter],
    optimiser: torch.optim.Optimizer,
    step: int,
    total: int,
    settings: TrainSettings,
) -> dict[str, Any]:
    """One optimiser step over one batch, packed to the token budget; returns the statistics, averaged over items."""
    started = time.perf_counter()
    rate = settings.learning_rate * min(1.0, (step + 1) / max(1.0, settings.warmup * total))
    for group in optimiser.param_groups:
        group["lr"] = rate
    model.train()
    optimiser.zero_grad(set_to_none=True)
    sums: dict[str, float] = {}
    with torch.random.fork_rng():  # dropout draws depend on the step alone, so a resumed run repeats them
        torch.manual_seed(settings.seed * 1_000_003 + step)
        for members in pack([objective.sequences(i) for i in batch], settings.max_tokens):
            loss, statistics = objective.loss(model, [batch[m] for m in members])
            (loss / len(batch)).backward()
            for name, value in statistics.items():
                sums[name] = sums.get(name, 0.0) + value
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
    if not torch.isfinite(norm):
        raise FloatingPointError(f"step {step}: the gradient is not finite; a lower learning rate may help")
    optimiser.step()
    record: dict[str, Any] = {"step": step, "learning_rate": rate, "items": len(batch)}
    record |= {name: value / len(batch) for name, value in sums.items()}
    record |= {"gradient_norm": float(norm), "seconds": round(time.perf_counter() - started, 4)}
    return record


def _batch(groups: Sequence[str], step: int, steps_per_epoch: int, settings: TrainSettings) -> list[int]:
    """The items of one step: the epoch's order depends on the seed and the epoch alone."""
    epoch, place = divmod(step, steps_per_epoch)
    generator = random.Random(settings.seed * 1_000_003 + epoch)
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
def _evaluate(model: Transformer, held_out: Objective, settings: TrainSettings) -> dict[str, float]:
    """Statistics on held-out items, averaged."""
    model.eval()
    sums: dict[str, float] = {}
    for members in pack([held_out.sequences(i) for i in range(len(held_out))], settings.max_tokens):
        _, statistics = held_out.loss(model, members)
        for name, value in statistics.items():
            sums[name] = sums.get(name, 0.0) + value
    return {name: value / len(held_out) for name, value in sums.items()}


def _remember_best(progress: Progress, loss: float, parameters: Sequence[Tensor], patience: int) -> None:
    if loss < progress.best_loss:
        progress.best_loss, progress.bad_evaluations = loss, 0
        progress.best_adapter = [parameter.detach().clone() for parameter in parameters]
    else:
        progress.bad_evaluations += 1
        progress.stopped = progress.bad_evaluations >= patience


def _log(folder: Path, progress: Progress, record: dict[str, Any]) -> None:
    progress.metrics.append(record)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


@torch.no_grad()
def _assign(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values):
        parameter.copy_(value)


def _save_checkpoint(
    folder: Path, progress: Progress, parameters: Sequence[Tensor], optimiser: torch.optim.Optimizer
) -> None:
    adapter = [parameter.detach() for parameter in parameters]
    state = {"progress": vars(progress), "adapter": adapter, "optimiser": optimiser.state_dict()}
    with replace_file(folder / "checkpoint.pt") as partial:
        torch.save(state, partial)


def _load_checkpoint(folder: Path, parameters: Sequence[Tensor], optimiser: torch.optim.Optimizer) -> Progress:
    path = folder / "checkpoint.pt"
    if not path.is_file():
        return Progress()
    state = torch.load(path, map_location="cpu", weights_only=True)
    _assign(parameters, state["adapter"])
    optimiser.load_state_dict(state["optimiser"])
    return Progress(**state["progress"])
