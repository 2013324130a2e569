"""The state of a training run on disk, in safetensors and JSON: nothing in it is unpickled."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from selfevo.files import FileError, replace_file
from selfevo.kernels.elementwise import all_finite

NAME = "checkpoint.safetensors"
EARLIER = "checkpoint.pt"  # a pickle, which version 0.1 wrote


@dataclass
class Progress:
    """All that changes while training; what a checkpoint holds besides the adapter and the optimiser."""

    step: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    best_loss: float = math.inf
    best_adapter: list[Tensor] | None = None
    bad_evaluations: int = 0
    stopped: bool = False


def save_checkpoint(
    folder: Path, progress: Progress, parameters: Sequence[Tensor], optimiser: torch.optim.Optimizer
) -> None:
    """Writes all of it to one file in ``folder``, or nothing. Tensors are numbered in the order of ``parameters``."""
    plain = {key: value for key, value in vars(progress).items() if key != "best_adapter"}
    tensors = {f"adapter.{index}": parameter.detach() for index, parameter in enumerate(parameters)}
    tensors |= {f"best.{index}": tensor for index, tensor in enumerate(progress.best_adapter or ())}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"{key}.{index}": tensor for key, tensor in state.items()}
    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with replace_file(folder / NAME) as partial:
        save_file(stored, partial, metadata={"progress": json.dumps(plain)})


@torch.no_grad()
def load_checkpoint(
    folder: Path, parameters: Sequence[Tensor], optimiser: torch.optim.Optimizer, total: int
) -> Progress:
    """Puts back what ``save_checkpoint`` wrote; without a checkpoint nothing changes and training is at its start.

    Raises ``FileError`` for a file that is damaged or of another training run (``total`` steps), before anything has
    been changed.
    """
    path = folder / NAME
    if (folder / EARLIER).is_file():
        raise FileError(f"{folder / EARLIER}: an earlier version wrote it, and it is not read; remove it to train anew")
    if not path.is_file():
        if os.path.lexists(path):
            raise FileError(f"{path}: is not a file that can be read; remove it to train anew")
        return Progress()
    try:
        with safe_open(path, framework="pt") as file:
            plain = json.loads((file.metadata() or {})["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        best = [tensors.pop(f"best.{i}") for i in range(len(parameters))] if "best.0" in tensors else None
        progress = Progress(**plain, best_adapter=best)
        if plain.keys() != {known.name for known in fields(Progress)} - {"best_adapter"}:
            raise ValueError("its progress has other fields")
        if not all(isinstance(plain[name], int) for name in ("step", "bad_evaluations", "stopped")):
            raise ValueError("its counts are no whole numbers")
        if not (0 < progress.step <= total and len(progress.metrics) == progress.step):
            raise ValueError(f"it is at step {progress.step} of {total} with {len(progress.metrics)} records")
        state: dict[int, dict[str, Tensor]] = {}
        for index, parameter in enumerate(parameters):
            state[index] = {key: tensors.pop(f"{key}.{index}") for key in ("step", "exp_avg", "exp_avg_sq")}
            own = [tensors[f"adapter.{index}"], *state[index].values(), *(best[index : index + 1] if best else ())]
            if any(tensor.dim() and tensor.shape != parameter.shape for tensor in own):
                raise ValueError(f"the tensors of parameter {index} have other shapes")
            if not all(map(all_finite, own)) or state[index]["step"] != progress.step:
                raise ValueError(f"the tensors of parameter {index} are not those of step {progress.step}")
        if len(tensors) != len(parameters):
            raise ValueError(f"it holds {len(tensors)} tensors of an adapter that has {len(parameters)}")
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = f" ({error})" if type(error) is ValueError else ""  # those above
        raise FileError(f"{path}: is damaged or of another run{why}; remove it to train anew") from error
    for index, parameter in enumerate(parameters):
        parameter.copy_(tensors[f"adapter.{index}"])
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return progress
