"""Captured decode steps: what is recorded once gives the replies of steps that are run call by call."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from torch.fx.experimental.proxy_tensor import make_fx

from selfevo.generate import cache as caches
from selfevo.generate import decoder as generate_room
from selfevo.generate import generate
from selfevo.generate.cache import SlotCache
from selfevo.generate.graphs import Graphs, Step, step_graphs

TRUNK = list(range(1, 50))
PROMPTS = [[*TRUNK[:n], 50 + n % 10] for n in (5, 20, 31, 48, 31)] + [[60, *range(3, 30)], [2], [60, 3, 4, 5], TRUNK]


def ends(reply: list[int]) -> bool:
    return sum(reply) % 5 == 0


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of GPUs, with steps in a few small shapes."""
    monkeypatch.setattr(caches, "_ROWS", 2)
    monkeypatch.setattr(caches, "_KEYS", 16)
    monkeypatch.setattr(
        generate_room, "row_cache", lambda model, slots, longest, new, tail: SlotCache(model, slots, longest + new)
    )


@pytest.mark.parametrize("windows", [(None, None), (6, 6)])
@pytest.mark.parametrize("batch_size", [1, 4, 9])
@pytest.mark.usefixtures("slots")
def test_a_recorded_step_gives_the_same_replies(
    windows: tuple[int | None, ...], batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operations of a step are recorded the first time its shape comes, as a CUDA graph records them, and later
    steps repeat just these on the same buffers: rows that come, go and move, idle slots and longer keys included."""
    model = tiny_model(windows=windows)
    expected = generate(model, PROMPTS, max_new_tokens=12, batch_size=batch_size, stop_when=ends)
    recorded: list[Step] = []
    replayed = [0]

    def capture(step: Step) -> Step:
        recorded.append(step)
        trace = make_fx(lambda _: step())(torch.zeros(()))

        def replay() -> torch.Tensor:
            replayed[0] += 1
            result: torch.Tensor = trace(torch.zeros(()))
            return result

        return replay

    monkeypatch.setattr(generate_room, "step_graphs", lambda device: Graphs(capture))
    found = generate(model, PROMPTS, max_new_tokens=12, batch_size=batch_size, stop_when=ends, cuda_graphs=True)
    assert found == expected
    assert len(recorded) < replayed[0]


@pytest.mark.usefixtures("slots")
def test_a_failed_capture_is_said_once_and_steps_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    expected = generate(model, PROMPTS, max_new_tokens=5)

    def fails(step: Step) -> Step:
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(generate_room, "step_graphs", lambda device: Graphs(fails))
    with pytest.warns(UserWarning, match="CUDA graphs are not used: no graphs here") as seen:
        assert generate(model, PROMPTS, max_new_tokens=5, cuda_graphs=True) == expected
    assert len(seen) == 1


def test_there_are_no_graphs_on_a_cpu() -> None:
    assert step_graphs(torch.device("cpu")) is None
