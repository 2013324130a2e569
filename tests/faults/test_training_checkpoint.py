"""A checkpoint of a training run that is damaged, of another run or a pickle is refused, and nothing changes."""

from __future__ import annotations

import json
from pathlib import Path

import faulty
import pytest
import torch
from safetensors.torch import load_file, save_file

from selfevo.files import FileError
from selfevo.training.checkpoint import NAME, Progress, load_checkpoint, save_checkpoint

TOTAL = 9


def state() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(2, 3)), torch.nn.Parameter(torch.randn(3, 2).bfloat16())]
    return parameters, torch.optim.AdamW(parameters, lr=0.1)


def written(folder: Path, steps: int = 2) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer, Progress]:
    parameters, optimiser = state()
    for _ in range(steps):
        sum(parameter.float().square().sum() for parameter in parameters).backward()  # type: ignore[union-attr]
        optimiser.step()
    records = [{"step": step, "loss": 0.1 * step} for step in range(steps)]
    progress = Progress(steps, records, 0.3, [2 * parameter.detach() for parameter in parameters], 1)
    save_checkpoint(folder, progress, parameters, optimiser)
    return parameters, optimiser, progress


def test_all_of_it_comes_back_bit_for_bit(tmp_path: Path) -> None:
    parameters, optimiser, progress = written(tmp_path)
    fresh, other = state()
    found = load_checkpoint(tmp_path, fresh, other, TOTAL)
    assert found.best_adapter is not None
    assert progress.best_adapter is not None
    assert all(map(torch.equal, found.best_adapter, progress.best_adapter))
    assert vars(found) | {"best_adapter": 0} == vars(progress) | {"best_adapter": 0}
    assert all(map(torch.equal, fresh, parameters))
    for mine, yours in zip(other.state_dict()["state"].values(), optimiser.state_dict()["state"].values()):
        assert all(torch.equal(mine[key], yours[key]) for key in yours)
        assert {key: value.dtype for key, value in mine.items()} == {key: value.dtype for key, value in yours.items()}
    assert other.state_dict()["param_groups"] == optimiser.state_dict()["param_groups"]


def refused(folder: Path) -> None:
    fresh, optimiser = state()
    before = [parameter.detach().clone() for parameter in fresh]
    faulty.assert_one_sentence(
        lambda: load_checkpoint(folder, fresh, optimiser, TOTAL), NAME, "remove it", kind="run folder"
    )
    assert all(map(torch.equal, fresh, before))
    assert not optimiser.state_dict()["state"]


def rewrite(folder: Path, progress: object = None, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / NAME) | changes  # type: ignore[operator]
    from safetensors import safe_open

    with safe_open(folder / NAME, framework="pt") as file:
        known = file.metadata()
    text = known["progress"] if progress is None else json.dumps(progress)
    kept = {name.replace("_dot_", "."): tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / NAME, metadata={"progress": text})


@pytest.mark.parametrize(
    "progress",
    [
        [], {}, "x", {"step": 2},
        {"step": 10**9, "metrics": [], "best_loss": 1, "bad_evaluations": 0, "stopped": False},
        {"step": 2, "metrics": [], "best_loss": 1, "bad_evaluations": 0, "stopped": False},
        {"step": "2", "metrics": [{}] * 2, "best_loss": 1, "bad_evaluations": 0, "stopped": False},
        {"step": 2, "metrics": 2, "best_loss": 1, "bad_evaluations": 0, "stopped": False},
        {"step": 1, "metrics": [{}], "best_loss": 1, "bad_evaluations": 0, "stopped": False},
        {"step": -1, "metrics": [], "best_loss": 1, "bad_evaluations": 0, "stopped": False},
        {"step": 2, "metrics": [{}] * 2, "best_loss": 1, "bad_evaluations": 0, "stopped": False, "more": 1},
    ],
)  # fmt: skip
def test_progress_that_cannot_be(tmp_path: Path, progress: object) -> None:
    written(tmp_path)
    rewrite(tmp_path, progress)
    refused(tmp_path)


@pytest.mark.parametrize("name", ["adapter.0", "adapter.1", "best.1", "exp_avg.0", "exp_avg_sq.1", "step.0"])
@pytest.mark.parametrize("change", ["missing", "NaN", "shape", "infinite"])
def test_tensors_that_cannot_be(tmp_path: Path, name: str, change: str) -> None:
    written(tmp_path)
    tensor = load_file(tmp_path / NAME)[name]
    values = {
        "missing": None, "NaN": tensor * torch.nan, "infinite": tensor + torch.inf, "shape": torch.zeros(7),
    }  # fmt: skip
    rewrite(tmp_path, **{name: values[change]})
    refused(tmp_path)


def test_one_tensor_too_many_and_an_empty_adapter(tmp_path: Path) -> None:
    written(tmp_path)
    rewrite(tmp_path, **{"adapter.2": torch.zeros(2)})
    refused(tmp_path)
    save_file({}, tmp_path / NAME, metadata={"progress": json.dumps(vars(Progress(step=1, metrics=[{}])))})
    refused(tmp_path)


@pytest.mark.parametrize("damage", sorted(set(faulty.BROKEN) - {"missing", "UTF-16"}))
def test_files_that_are_none(tmp_path: Path, damage: str) -> None:
    written(tmp_path)
    faulty.BROKEN[damage](tmp_path / NAME)
    refused(tmp_path)


def test_bit_flips_in_the_header(tmp_path: Path) -> None:
    written(tmp_path)
    whole = (tmp_path / NAME).read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    for rng in faulty.rounds(0, 24):
        (tmp_path / NAME).write_bytes(faulty.flip_bits(whole[:size], rng) + whole[size:])
        fresh, optimiser = state()
        faulty.assert_one_sentence(
            lambda: load_checkpoint(tmp_path, fresh, optimiser, TOTAL),  # noqa: B023
            NAME, kind="run folder", check=lambda found: found.step == 2,
        )  # fmt: skip


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    torch.save({"step": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(FileError, match=r"checkpoint\.pt: an earlier version wrote it, and it is not read; remove it"):
        load_checkpoint(tmp_path, *state(), TOTAL)
