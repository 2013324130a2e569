"""The road of a GPU, walked without one: published shapes in full on the ``meta`` device, whose tensors have no values.

What asks such a tensor for a value, as a hidden wait for a GPU would, or mixes it with a tensor of the host, fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from meta_device import LONG, SHAPES, SHORT, Device, adapted, two_layers

from selfevo.generate import generate
from selfevo.lora import lora_parameters
from selfevo.models import Transformer
from selfevo.training import DPOObjective, PairIds, SFTObjective, TrainSettings, reference_logps
from selfevo.training.step import evaluate_held_out, train_step


def check_a_step(model: Transformer, objective: DPOObjective | SFTObjective) -> None:
    parameters = lora_parameters(model)
    optimiser = torch.optim.AdamW(parameters)
    batch = list(range(len(objective)))
    with Device() as device:
        record = train_step(model, objective, batch, parameters, optimiser, 0, 9, TrainSettings())
    assert device.counts["waits"] == 1
    assert record["items"] == len(batch)
    assert all(parameter.grad is not None and parameter.grad.is_meta for parameter in parameters)


def check_the_reference(model: Transformer, pairs: list[PairIds]) -> None:
    with Device() as device:
        assert reference_logps(model, pairs, 4096).shape == (len(pairs), 2)
    assert device.counts["waits"] == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_and_the_reference_at_a_published_shape_wait_for_the_device_once(shape: str) -> None:
    model = adapted(SHAPES[shape])
    check_the_reference(model, SHORT)
    check_a_step(model, DPOObjective(SHORT, torch.zeros(len(SHORT), 2), ["a"] * len(SHORT)))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_so_do_both_objectives_on_long_rows_in_a_model_of_two_layers(shape: str, checkpointed: bool) -> None:
    model = adapted(two_layers(shape))
    model.checkpoint_activations = checkpointed
    pairs = DPOObjective(LONG, torch.zeros(len(LONG), 2), ["a"] * len(LONG))
    check_a_step(model, pairs)
    check_a_step(model, SFTObjective([(pair.prompt, pair.chosen) for pair in LONG], ["a"] * len(LONG)))
    check_the_reference(model, LONG)
    with Device() as device:
        evaluate_held_out(model, pairs, TrainSettings(max_tokens=1))  # three rows
    assert device.counts["waits"] == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_decode_step_waits_for_the_device_once_for_its_tokens(shape: str) -> None:
    """And a prefill not at all. Every phase but the first follows one in which prompts enter."""
    found: list[tuple[str, int, int]] = []
    with Device() as device:

        def observer(phase: str, rows: int, waiting: int) -> AbstractContextManager[None]:
            before = device.counts.copy()

            @contextmanager
            def observed() -> Iterator[None]:
                yield
                found.append((phase, *((device.counts - before)[name] for name in ("waits", "uploads"))))

            return observed()

        generate(adapted(two_layers(shape)), [p.prompt for p in LONG], max_new_tokens=5, observer=observer)
        total = device.counts["waits"]
    steps = [("decode", 0, 0), ("logits", 0, 0), ("sample", 1, 0)]
    assert [(phase, waits) for phase, waits, _ in found[:3]] == [("prefill", 0), ("logits", 0), ("sample", 1)]
    assert found[3:] == steps * 4  # the first token came with the prefill
    assert total == 5


def test_a_wait_and_a_mixed_up_device_are_found() -> None:
    """The tests above would pass, too, if nothing were noticed."""
    numbers = torch.ones(3, device="meta")
    with Device() as device:
        numbers.tolist()
        numbers.cpu()
        assert device.counts["waits"] == 2
        with pytest.raises(RuntimeError):
            bool(numbers.any())
        with pytest.raises(AssertionError, match="mixes devices"):
            numbers + torch.ones(3)
