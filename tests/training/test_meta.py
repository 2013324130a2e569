"""The road of a GPU, walked without one: published shapes in full on the ``meta`` device, whose tensors have no values.

What asks such a tensor for a value, as a hidden wait for a GPU would, or mixes it with a tensor of the host, fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from selfevo.generate import generate
from selfevo.lora import freeze_adapter, inject_lora, lora_parameters
from selfevo.models import ModelConfig, Transformer
from selfevo.training import DPOObjective, PairIds, SFTObjective, TrainSettings, reference_logps
from selfevo.training.step import evaluate_held_out, train_step

COMMON: dict[str, Any] = {"num_kv_heads": 8, "num_heads": 32, "num_layers": 32, "head_dim": 128, "hidden_size": 4096}
SHAPES = {
    "Llama-3-8B": ModelConfig(
        **COMMON, family="llama", vocab_size=128256, intermediate_size=14336, norm_eps=1e-5, rope_theta=5e5,
        max_positions=8192, windows=(None,) * 32,
    ),
    "Qwen2-7B": ModelConfig(
        **COMMON | {"num_kv_heads": 4, "num_heads": 28, "num_layers": 28, "hidden_size": 3584}, family="qwen2",
        vocab_size=152064, intermediate_size=18944, norm_eps=1e-6, rope_theta=1e6, max_positions=32768,
        windows=(None,) * 28, qkv_bias=True,
    ),
    "Mistral-7B-v0.1": ModelConfig(  # with the sliding window, which later versions lack
        **COMMON, family="mistral", vocab_size=32000, intermediate_size=14336, norm_eps=1e-5, rope_theta=1e4,
        max_positions=32768, windows=(4096,) * 32,
    ),
}  # fmt: skip
SHORT, LONG = (  # below and above what a GPU attends to in one piece
    [PairIds(list(range(1, length)), list(range(5, 60)), list(range(70))) for length in lengths]
    for lengths in ((200, 400), (300, 700, 1500))
)
COPIES = ("_to_copy", "to", "copy_")


class Device(TorchDispatchMode):
    """Takes the meta device for a GPU: counts the copies from and to it, and refuses to mix it with the host."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named, name = named or {}, function.overloadpacket.__name__
        given = [value for value in arguments if isinstance(value, torch.Tensor)]
        kinds = {value.is_meta for value in given if value.dim()}  # numbers of the host may go anywhere
        if name in COPIES:
            target = given[0].device if name == "copy_" else named.get("device") or given[0].device
            source = given[-1]
            if source.is_meta and target.type == "cpu":
                self.counts["waits"] += 1
                return torch.zeros(source.shape, dtype=named.get("dtype") or source.dtype)
            self.counts["uploads"] += not source.is_meta and target.type == "meta" and bool(source.dim())
        elif len(kinds) > 1:
            raise AssertionError(f"{name} mixes devices: {[(value.device, tuple(value.shape)) for value in given]}")
        return function(*arguments, **named)


def adapted(config: ModelConfig) -> Transformer:
    """In bfloat16, with the adapter of an earlier iteration under the one to train."""
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
    inject_lora(model)
    freeze_adapter(model)
    return model


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


def two_layers(shape: str) -> ModelConfig:
    return replace(SHAPES[shape], num_layers=2, windows=SHAPES[shape].windows[:2])


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
