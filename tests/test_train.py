"""Objectives and the one loop: configurations that must agree, early stopping, exact resume."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from test_trie import dialogue_examples, one_at_a_time
from torch import Tensor

from selfevo.lora import disable_adapters, freeze_adapter, inject_lora, lora_parameters
from selfevo.models import Transformer
from selfevo.objectives import DPOObjective, PairIds, SFTObjective, both_sides, fingerprint, reference_logps
from selfevo.scoring import response_logps
from selfevo.train import TrainSettings, _batch, train
from selfevo.trie import Ids

FAST = TrainSettings(learning_rate=0.01, epochs=2, batch_size=2, accumulation=2, checkpoint_every=2)


def pair_ids() -> list[PairIds]:
    """Six pairs over two dialogues; both sides of unequal length."""
    examples = dialogue_examples()[:12]
    return [PairIds(prompt, chosen, rejected) for (prompt, chosen), (_, rejected) in zip(examples[::2], examples[1::2])]


def adapted(dropout: float = 0.0) -> Transformer:
    model = tiny_model()
    inject_lora(model, rank=2, alpha=4, dropout=dropout, seed=1)
    return model


def dpo(model: Transformer, max_tokens: int = 4096) -> DPOObjective:
    pairs = pair_ids()
    groups = ["a", "a", "a", "b", "b", "b"]
    return DPOObjective(pairs, reference_logps(model, pairs, max_tokens), groups, max_tokens, beta=0.5)


def sft(max_tokens: int = 4096) -> SFTObjective:
    examples = dialogue_examples()
    return SFTObjective(examples, [str(index // 4) for index in range(len(examples))], max_tokens)


def state(model: Transformer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in lora_parameters(model)])


def run(folder: Path, settings: TrainSettings, *, max_tokens: int = 4096, checkpointed: bool = False) -> Tensor:
    model = adapted()
    model.checkpoint_activations = checkpointed
    train(model, dpo(model, max_tokens), folder, replace(settings, max_tokens=max_tokens))
    return state(model)


def test_configurations_that_must_agree_do_over_a_trajectory(tmp_path: Path) -> None:
    expected = run(tmp_path / "0", FAST)
    start = state(adapted())
    assert (expected - start).abs().max() > 0.01
    for number, (batch, accumulation) in enumerate(((4, 1), (1, 4)), 1):
        other = run(tmp_path / f"{number}", replace(FAST, batch_size=batch, accumulation=accumulation))
        torch.testing.assert_close(other, expected, rtol=0, atol=0)
    torch.testing.assert_close(run(tmp_path / "3", FAST, max_tokens=1), expected, rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(run(tmp_path / "4", FAST, checkpointed=True), expected, rtol=1e-3, atol=2e-4)


def test_the_sft_loss_is_the_mean_over_items_of_the_mean_over_tokens() -> None:
    model, objective = adapted(), sft()
    lengths = torch.tensor([len(response) for _, response in objective.examples])
    assert len(set(lengths.tolist())) > 2
    expected = -(one_at_a_time(model, list(objective.examples)) / lengths).sum()
    for max_tokens in (4096, 1):
        loss, statistics = sft(max_tokens).loss(model, range(len(objective)))
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-4)
        assert statistics["loss"] == pytest.approx(loss.item())
        assert statistics["tokens"] == int(lengths.sum())


def test_the_dpo_loss_equals_a_pair_by_pair_computation_in_float64() -> None:
    model = adapted()
    objective = dpo(model)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.2)
    total = 0.0
    with torch.no_grad():
        for index, pair in enumerate(objective.pairs):
            chosen, rejected = one_at_a_time(model, [(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)]).tolist()
            reference = objective.reference[index].double().tolist()
            margin = 0.5 * ((chosen - reference[0]) - (rejected - reference[1]))
            total += math.log1p(math.exp(-margin)) - chosen / len(pair.chosen)
    loss, statistics = objective.loss(model, range(len(objective)))
    assert loss.item() == pytest.approx(total, rel=1e-4)
    assert statistics["dpo"] + statistics["sft"] == pytest.approx(total, rel=1e-4)


def test_the_first_step_has_loss_log_2_and_moves_the_adapter_only(tmp_path: Path) -> None:
    model = adapted()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    before = state(model)
    metrics = train(model, dpo(model), tmp_path, replace(FAST, epochs=10))
    assert metrics[0]["dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics[-1]["dpo"] < metrics[0]["dpo"]
    assert not torch.equal(before, state(model))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in base.items())


def test_the_learning_rate_rises_over_the_warm_up_and_then_stays(tmp_path: Path) -> None:
    settings = replace(FAST, batch_size=1, accumulation=1, epochs=2, warmup=1 / 3)
    rates = [record["learning_rate"] for record in train(adapted(), dpo(adapted()), tmp_path, settings)]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075] + [0.01] * 9)


@pytest.mark.parametrize("shuffle", ["dialogues", "pairs"])
def test_every_epoch_takes_each_item_once_in_a_seeded_order(shuffle: str) -> None:
    groups = [str(index // 5) for index in range(23)]
    settings = replace(FAST, shuffle=shuffle)
    epochs = [[_batch(groups, epoch * 6 + step, 6, settings) for step in range(6)] for epoch in range(2)]
    orders = [[index for batch in epoch for index in batch] for epoch in epochs]
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert orders[0] != orders[1]
    assert [len(batch) for batch in epochs[0]] == [4, 4, 4, 4, 4, 3]
    other = [index for step in range(6) for index in _batch(groups, step, 6, replace(settings, seed=1))]
    assert other != orders[0]
    changes = sum(groups[a] != groups[b] for a, b in zip(orders[0], orders[0][1:]))
    assert (changes == len(set(groups)) - 1) == (shuffle == "dialogues")


@dataclass
class Scripted:
    """A held-out objective whose losses are given."""

    losses: list[float]
    groups: Sequence[str] = ("x",)
    seen: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return 1

    def sequences(self, index: int) -> list[Ids]:
        return sft().sequences(0)

    def loss(self, model: Transformer, indices: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        value = self.losses[len(self.seen)]
        self.seen.append(state(model))
        return torch.tensor(value), {"loss": value}


def test_training_stops_after_the_patience_and_keeps_the_best_adapter(tmp_path: Path) -> None:
    model = adapted()
    held_out = Scripted([3.0, 2.0, 2.5, 2.0, 2.1, 0.1, 0.0])
    settings = replace(FAST, batch_size=1, accumulation=1, evaluations_per_epoch=6, patience=3, epochs=3)
    metrics = train(model, dpo(model), tmp_path, settings, held_out=held_out)
    assert len(held_out.seen) == 5 == len(metrics)
    assert torch.equal(state(model), held_out.seen[1])
    assert not torch.equal(held_out.seen[1], held_out.seen[4])


@dataclass
class Interrupted:
    """Passes everything on, and fails at a given call."""

    inner: Any
    calls: int

    @property
    def groups(self) -> Sequence[str]:
        return list(self.inner.groups)

    def __len__(self) -> int:
        return len(self.inner)

    def sequences(self, index: int) -> list[Ids]:
        return list(self.inner.sequences(index))

    def loss(self, model: Transformer, indices: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        result: tuple[Tensor, dict[str, float]] = self.inner.loss(model, indices)
        return result


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_interrupted_training_resumes_to_the_same_bits(tmp_path: Path, dropout: float) -> None:
    settings = replace(FAST, batch_size=1, accumulation=1)
    whole = adapted(dropout)
    train(whole, dpo(whole), tmp_path / "whole", settings, held_out=dpo(whole))
    again = adapted(dropout)
    with pytest.raises(KeyboardInterrupt):
        train(again, Interrupted(dpo(again), 7), tmp_path / "again", settings, held_out=dpo(again))
    assert (tmp_path / "again" / "checkpoint.pt").is_file()
    fresh = adapted(dropout)
    reference = dpo(fresh)
    train(fresh, reference, tmp_path / "again", settings, held_out=reference)
    assert torch.equal(state(fresh), state(whole))
    names = ("adapter_model.safetensors", "adapter_config.json")
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    steps = [json.loads(line)["step"] for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(12))
    assert not (tmp_path / "again" / "checkpoint.pt").exists()


def test_a_gradient_that_is_not_finite_stops_the_training_with_the_step(tmp_path: Path) -> None:
    model = adapted()
    objective = dpo(model)
    broken = replace(objective, reference=torch.full_like(objective.reference, float("nan")))
    with pytest.raises(FloatingPointError, match="step 0"):
        train(model, broken, tmp_path, FAST)


def test_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no items"):
        train(adapted(), SFTObjective([], [], 4096), tmp_path, FAST)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"warmup": 2.0}, {"shuffle": "x"}, {"patience": 0},
        {"weight_decay": -1.0}, {"max_grad_norm": 0.0},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        TrainSettings(**changes)


@pytest.mark.parametrize("max_tokens", [4096, 30])
def test_the_reference_is_the_model_with_the_frozen_stack_and_without_the_trainable_adapter(max_tokens: int) -> None:
    model, pairs = adapted(), pair_ids()
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(0.1)
        started_from, _ = response_logps(model, both_sides(pairs))
    freeze_adapter(model, seed=2)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(0.1)
    reference = reference_logps(model, pairs, max_tokens)
    torch.testing.assert_close(reference, started_from.view(2, -1).T, rtol=1e-5, atol=1e-4)
    with torch.no_grad(), disable_adapters(model):
        torch.testing.assert_close(response_logps(model, both_sides(pairs))[0], started_from, rtol=1e-5, atol=1e-4)
    assert (response_logps(model, both_sides(pairs))[0] - started_from).abs().max() > 0.1


def test_the_fingerprint_knows_base_frozen_adapters_and_pairs_but_not_the_trainable_adapter() -> None:
    model, pairs = adapted(), pair_ids()
    mark = fingerprint(model, pairs)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(0.1)
    assert fingerprint(model, pairs) == mark
    assert fingerprint(model, pairs[:-1]) != mark
    assert fingerprint(model, [*pairs[:-1], replace(pairs[-1], chosen=[1])]) != mark
    assert fingerprint(model, [*pairs[:-1], PairIds(pairs[-1].prompt, pairs[-1].rejected, pairs[-1].chosen)]) != mark
    freeze_adapter(model)
    assert fingerprint(model, pairs) != mark
    other = adapted()
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    assert fingerprint(other, pairs) != mark
