"""The one optimisation loop, used for SFT and DPO alike: an objective is passed in, an adapter comes out.

A step averages over exactly ``batch_size * accumulation`` items however they are packed. The state is checkpointed
whole, so a killed run resumes to the same adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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

_DIVERGED = "nothing was saved as finished; a lower learning rate may help"


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
    evaluations without improvement. Writes ``metrics.jsonl`` as it goes, ``checkpoint.safetensors`` from time to time
    (and continues from one that is there), then the adapter in PEFT's format, noting ``base_model`` in it; the
    checkpoint is then removed.
    """
    if len(objective) == 0:
        raise ValueError(f"{label}: there are no items to train on")
    parameters = lora_parameters(model)
    optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps_per_epoch = math.ceil(len(objective) / (settings.batch_size * settings.accumulation))
    total = steps_per_epoch * settings.epochs
    evaluate_every = max(1, steps_per_epoch // settings.evaluations_per_epoch)
    folder.mkdir(parents=True, exist_ok=True)
    progress = load_checkpoint(folder, parameters, optimiser, total)
    write_jsonl(folder / "metrics.jsonl", progress.metrics)
    with tqdm(total=total, initial=progress.step, desc=label, unit="step") as bar:
        while progress.step < total and not progress.stopped:
            batch = batch_indices(objective.groups, progress.step, steps_per_epoch, settings)
            record = train_step(model, objective, batch, parameters, optimiser, progress.step, total, settings)
            progress.step += 1
            if held_out is not None and (progress.step % evaluate_every == 0 or progress.step == total):
                record["held_out"] = evaluate_held_out(model, held_out, settings)
                if not math.isfinite(record["held_out"]["loss"]):
                    raise FloatingPointError(
                        f"{label}, step {progress.step}: the held-out loss is not finite; {_DIVERGED}"
                    )
                _remember_best(progress, record["held_out"]["loss"], parameters, settings.patience)
            progress.metrics.append(record)
            append_jsonl(folder / "metrics.jsonl", record)
            if "held_out" in record or progress.step % settings.checkpoint_every == 0:
                save_checkpoint(folder, progress, parameters, optimiser)
            bar.update()
            bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
    if progress.best_adapter is not None:
        _assign(parameters, progress.best_adapter)
    if not all(all_finite(parameter) for parameter in parameters):
        raise FloatingPointError(f"{label}: the adapter is not finite after the last step; {_DIVERGED}")
    save_adapter(model, folder, base_model=base_model)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return progress.metrics


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
