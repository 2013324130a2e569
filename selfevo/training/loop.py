"""The one optimisation loop, used for SFT and DPO alike: an objective is passed in, an adapter comes out.

A step averages over exactly ``batch_size * accumulation`` items however they are packed. The state is checkpointed
whole, so a killed run resumes to the same adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from selfevo.files import append_jsonl, write_jsonl
from selfevo.kernels.elementwise import all_finite
from selfevo.lora import lora_parameters, save_adapter
from selfevo.models.transformer import Transformer
from selfevo.training.checkpoint import NAME as CHECKPOINT
from selfevo.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from selfevo.training.objectives import Objective
from selfevo.training.settings import TrainSettings
from selfevo.training.step import batch_indices, evaluate_held_out, train_step


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
    evaluations without improvement; the first record also has their loss before any step (``held_out_before``). Writes
    ``metrics.jsonl`` as it goes, ``checkpoint.safetensors`` from time to time (and continues from one that is there),
    then the adapter in PEFT's format, noting ``base_model`` in it; the checkpoint is then removed.

    Raises FloatingPointError, which names ``label`` and the step, where a loss, a gradient, a statistic or the adapter
    is not finite; what was saved before stays, and nothing of that step is saved.
    """
    if len(objective) == 0:
        raise ValueError(f"{label}: there are no items to train on")
    parameters = lora_parameters(model)
    optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps_per_epoch = math.ceil(len(objective) / (settings.batch_size * settings.accumulation))
    total = steps_per_epoch * settings.epochs
    evaluate_every = max(1, steps_per_epoch // settings.evaluations_per_epoch)
    progress = load_checkpoint(folder, parameters, optimiser, total)
    write_jsonl(folder / "metrics.jsonl", progress.metrics, grows=True)
    with tqdm(total=total, initial=progress.step, desc=label, unit="step") as bar:
        while progress.step < total and not progress.stopped:
            batch = batch_indices(objective.groups, progress.step, steps_per_epoch, settings)
            before = {}
            with _named(label, progress.step):
                if held_out is not None and progress.step == 0:
                    before["held_out_before"] = _finite(evaluate_held_out(model, held_out, settings), "held-out ")
                record = train_step(model, objective, batch, parameters, optimiser, progress.step, total, settings)
                record = _finite(record) | before
            progress.step += 1
            with _named(label, progress.step):
                if held_out is not None and (progress.step % evaluate_every == 0 or progress.step == total):
                    record["held_out"] = _finite(evaluate_held_out(model, held_out, settings), "held-out ")
                    _remember_best(progress, record["held_out"]["loss"], parameters, settings.patience)
                saved = "held_out" in record or progress.step % settings.checkpoint_every == 0
                if saved or progress.step == total:
                    _check_finite(parameters)
            progress.metrics.append(record)
            append_jsonl(folder / "metrics.jsonl", record)
            if saved:
                save_checkpoint(folder, progress, parameters, optimiser)
            bar.update()
            bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
    if progress.best_adapter is not None:
        _assign(parameters, progress.best_adapter)
    write_jsonl(folder / "metrics.jsonl", progress.metrics)
    save_adapter(model, folder, base_model=base_model)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return progress.metrics


@contextmanager
def _named(label: str, step: int) -> Iterator[None]:
    """Says of numbers that are not finite in which stage and after how many steps they were found, and what to do."""
    try:
        yield
    except FloatingPointError as error:
        advice = "a lower learning rate may help" if step else "the weights or the data are damaged"
        raise FloatingPointError(f"{label}, step {step}: {error}; {advice} (nothing of this step was saved)") from error


def _finite(record: dict[str, Any], where: str = "") -> dict[str, Any]:
    for name, value in record.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"the {where}{name} is {value}")
    return record


def _check_finite(parameters: Sequence[Tensor]) -> None:
    if not all(map(all_finite, parameters)):
        raise FloatingPointError("the adapter is not finite")


def _remember_best(progress: Progress, loss: float, parameters: Sequence[Tensor], patience: int) -> None:
    if loss < progress.best_loss:
        progress.best_loss, progress.bad_evaluations = loss, 0
        progress.best_adapter = [parameter.detach().clone() for parameter in parameters]
    else:
        progress.bad_evaluations += 1
        progress.stopped = progress.bad_evaluations >= patience


@torch.no_grad()
def _assign(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values):
        parameter.copy_(value)
