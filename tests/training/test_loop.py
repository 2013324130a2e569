"""Objectives and the one loop: configurations that must agree, early stopping, exact resume."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from oracles import dialogue_examples, one_at_a_time
from safetensors import safe_open
from torch import Tensor
from transformers import get_scheduler

from selfevo import scoring
from selfevo.lora import disable_adapters, freeze_adapter, inject_lora, load_adapter, lora_parameters
from selfevo.models import Transformer, transformer
from selfevo.scoring import packed_logps, response_logps
from selfevo.training import DPOObjective, PairIds, SFTObjective, TrainSettings, both_sides, reference_logps, train
from selfevo.training import loop as train_room
from selfevo.training.reference import fingerprint
from selfevo.training.step import batch_indices, learning_rate
from selfevo.trie.trie import Ids

FAST = TrainSettings(learning_rate=0.01, epochs=2, batch_size=2, accumulation=2, checkpoint_every=2)
ONE_BY_ONE = replace(FAST, batch_size=1, accumulation=1)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


def pair_ids() -> list[PairIds]:
    """Six pairs over two dialogues; both sides of unequal length."""
    examples = dialogue_examples()[:12]
    return [PairIds(prompt, chosen, rejected) for (prompt, chosen), (_, rejected) in zip(examples[::2], examples[1::2])]


def adapted(dropout: float = 0.0, *, moved: float = 0.0) -> Transformer:
    """With ``moved`` both factors of every adapter are away from their start, so that no gradient is zero."""
    model = tiny_model()
    inject_lora(model, rank=2, alpha=4, dropout=dropout, seed=1)
    move(model, moved)
    return model


@torch.no_grad()
def move(model: Transformer, size: float) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in lora_parameters(model):
        parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def dpo(model: Transformer, max_tokens: int = 4096, beta: float = 0.5, gamma: float = 1.0) -> DPOObjective:
    pairs = pair_ids()
    groups = ["a", "a", "a", "b", "b", "b"]
    return DPOObjective(pairs, reference_logps(model, pairs, max_tokens), groups, beta=beta, gamma=gamma)


def sft() -> SFTObjective:
    examples = dialogue_examples()
    return SFTObjective(examples, [str(index // 4) for index in range(len(examples))])


def state(model: Transformer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in lora_parameters(model)])


@dataclass
class Watched:
    """Passes everything on, notes the items of every call, and fails or turns the loss bad at a given call."""

    inner: Any
    fail_at: int | None = None
    spoil_at: int | None = None
    factor: float = math.nan
    calls: list[list[int]] = field(default_factory=list)

    @property
    def groups(self) -> Sequence[str]:
        return list(self.inner.groups)

    def __len__(self) -> int:
        return len(self.inner)

    def sequences(self, index: int) -> list[Ids]:
        return list(self.inner.sequences(index))

    def loss(self, model: Transformer, indices: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        call = len(self.calls)
        if call == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append(list(indices))
        loss, statistics = self.inner.loss(model, indices)
        return (loss * self.factor if call == self.spoil_at else loss), statistics


def watched(kind: str, model: Transformer, max_tokens: int = 4096) -> Watched:
    return Watched(dpo(model, max_tokens) if kind == "dpo" else sft())


# Configurations that must agree


Trajectory = tuple[Tensor, list[dict[str, Any]], list[list[int]]]


def trajectory(folder: Path, kind: str, settings: TrainSettings, *, checkpointed: bool, dropout: float) -> Trajectory:
    """The adapters at the end, the metrics of every step, the calls of the objective."""
    model = adapted(dropout)
    objective = watched(kind, model, settings.max_tokens)
    model.checkpoint_activations = checkpointed
    metrics = train(model, objective, folder, settings)
    return state(model), metrics, objective.calls


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize(
    ("changes", "checkpointed", "dropout"),
    [
        ({"batch_size": 4, "accumulation": 1}, False, 0.0),
        ({"batch_size": 1, "accumulation": 4}, False, 0.0),
        ({"batch_size": 1, "accumulation": 4}, False, 0.3),
        ({"max_tokens": 1}, False, 0.0),
        ({}, True, 0.0),
        ({}, True, 0.3),
        ({"batch_size": 4, "accumulation": 1, "max_tokens": 1}, True, 0.0),
    ],
)
def test_configurations_that_must_agree_do_over_a_trajectory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    changes: dict[str, int],
    checkpointed: bool,
    dropout: float,
) -> None:
    recomputed = []
    checkpoint = transformer.checkpoint
    monkeypatch.setattr(transformer, "checkpoint", lambda *a, **k: (recomputed.append(1), checkpoint(*a, **k))[1])
    expected, plain, together = trajectory(tmp_path / "0", kind, FAST, checkpointed=False, dropout=dropout)
    assert not recomputed
    settings = replace(FAST, **changes)
    ours, metrics, calls = trajectory(tmp_path / "1", kind, settings, checkpointed=checkpointed, dropout=dropout)
    assert bool(recomputed) == checkpointed
    assert len(together) == len(plain) > 2  # a step is one pack
    items = sum(record["items"] for record in metrics)
    assert len(calls) == (items if settings.max_tokens == 1 else len(plain))
    # Adam and clipping hide a wrong factor from the adapters; losses and gradient norms do not.
    for name in ("loss", "gradient_norm", "learning_rate", "items"):
        assert [record[name] for record in metrics] == pytest.approx([record[name] for record in plain], rel=1e-3), name
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=2e-4)
    assert (expected - state(adapted(dropout))).abs().max() > 0.01


def plain_losses(kind: str, model: Transformer) -> Tensor:
    """The naive oracle: the loss of every item, each sequence by itself."""
    if kind == "sft":
        examples = list(sft().examples)
        lengths = torch.tensor([len(response) for _, response in examples])
        return -one_at_a_time(model, examples) / lengths
    pairs = pair_ids()
    chosen, rejected = one_at_a_time(model, both_sides(pairs)).view(2, -1)
    with disable_adapters(model), torch.no_grad():
        reference_chosen, reference_rejected = one_at_a_time(model, both_sides(pairs)).view(2, -1)
    margin = 0.5 * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return torch.log1p(torch.exp(-margin)) - chosen / torch.tensor([len(pair.chosen) for pair in pairs])


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_trajectory_is_that_of_a_plain_loop_over_single_sequences(tmp_path: Path, kind: str) -> None:
    settings = replace(FAST, epochs=3, warmup=0.4, weight_decay=0.1, max_grad_norm=0.7)
    model = adapted(moved=0.2)
    objective = watched(kind, model)
    metrics = train(model, objective, tmp_path, settings)
    plain = adapted(moved=0.2)
    optimiser = torch.optim.AdamW(lora_parameters(plain), weight_decay=0.1)
    assert len(objective.calls) == len(metrics)
    for step, (batch, record) in enumerate(zip(objective.calls, metrics)):
        optimiser.param_groups[0]["lr"] = 0.01 * min(1, (step + 1) / (0.4 * len(metrics)))
        optimiser.zero_grad()
        loss = plain_losses(kind, plain)[batch].mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(lora_parameters(plain), 0.7)
        optimiser.step()
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-3)
        assert record["gradient_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert max(record["gradient_norm"] for record in metrics) > 0.7
    torch.testing.assert_close(state(model), state(plain), rtol=1e-3, atol=2e-4)


# Objectives


@pytest.mark.parametrize("max_tokens", [4096, 1])
def test_the_sft_loss_is_the_mean_over_items_of_the_mean_over_tokens(max_tokens: int) -> None:
    model, objective = adapted(), sft()
    lengths = [len(response) for _, response in objective.examples]
    assert len(set(lengths)) > 2
    expected = plain_losses("sft", model)
    loss, statistics = objective.loss(model, range(len(objective)))
    torch.testing.assert_close(loss.double(), expected.sum(), rtol=1e-5, atol=1e-4)
    assert statistics == {"loss": pytest.approx(loss.item()), "tokens": sum(lengths)}
    alone = torch.stack([objective.loss(model, [index])[0] for index in range(len(objective))])
    torch.testing.assert_close(alone.double(), expected, rtol=1e-5, atol=1e-4)
    by_tokens = (expected * torch.tensor(lengths)).sum() / sum(lengths)
    assert abs(by_tokens - expected.mean()) > 0.01  # the mean over all tokens would be another number


@pytest.mark.parametrize(("beta", "gamma"), [(0.1, 1.0), (0.5, 0.0), (0.5, 0.3)])
def test_the_dpo_loss_and_its_statistics_equal_a_pair_by_pair_computation(beta: float, gamma: float) -> None:
    model = adapted()
    objective = dpo(model, beta=beta, gamma=gamma)
    move(model, 0.2)
    expected = dict.fromkeys(("loss", "dpo", "sft", "accuracy", "chosen_reward", "rejected_reward", "tokens"), 0.0)
    expected |= {"chosen_logp_per_token": 0.0, "rejected_logp_per_token": 0.0}
    for pair, reference in zip(objective.pairs, objective.reference.double().tolist()):
        with torch.no_grad():
            chosen, rejected = one_at_a_time(model, [(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)]).tolist()
        rewards = beta * (chosen - reference[0]), beta * (rejected - reference[1])
        dpo_term, sft_term = math.log1p(math.exp(rewards[1] - rewards[0])), -chosen / len(pair.chosen)
        found = {
            "loss": dpo_term + gamma * sft_term, "dpo": dpo_term, "sft": sft_term, "accuracy": rewards[0] > rewards[1],
            "chosen_reward": rewards[0], "rejected_reward": rewards[1], "tokens": len(pair.chosen + pair.rejected),
            "chosen_logp_per_token": -sft_term, "rejected_logp_per_token": rejected / len(pair.rejected),
        }  # fmt: skip
        expected = {name: value + found[name] for name, value in expected.items()}
    assert 0 < expected["accuracy"] < len(objective)
    loss, statistics = objective.loss(model, range(len(objective)))
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-4)
    assert statistics == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("max_tokens", [4096, 30])
def test_the_reference_is_the_model_with_the_frozen_stack_and_without_the_trainable_adapter(max_tokens: int) -> None:
    model, pairs = adapted(dropout=0.3), pair_ids()
    move(model, 0.1)
    with torch.no_grad():
        started_from, _ = response_logps(model, both_sides(pairs))
    freeze_adapter(model, seed=2)
    move(model, 0.1)
    model.train()  # dropout acts on the trainable adapter only, so the reference has none
    reference = reference_logps(model, pairs, max_tokens)
    assert not reference.requires_grad
    torch.testing.assert_close(reference, started_from.view(2, -1).T, rtol=1e-5, atol=1e-4)
    model.eval()
    with torch.no_grad(), disable_adapters(model):
        torch.testing.assert_close(response_logps(model, both_sides(pairs))[0], started_from, rtol=1e-5, atol=1e-4)
    assert (response_logps(model, both_sides(pairs))[0] - started_from).abs().max() > 0.1  # and it is on again


def test_the_fingerprint_does_not_know_the_trainable_adapter() -> None:
    model, pairs = adapted(), pair_ids()
    mark = fingerprint(model, pairs)
    move(model, 0.1)
    assert fingerprint(model, pairs) == mark == fingerprint(adapted(), pair_ids())


def test_the_fingerprint_knows_every_pair_and_their_order() -> None:
    model, pairs = adapted(), pair_ids()
    last = pairs[-1]
    changed = [
        pairs[:-1],
        [pairs[1], pairs[0], *pairs[2:]],
        [*pairs[:-1], replace(last, chosen=[1])],
        [*pairs[:-1], replace(last, rejected=[*last.rejected[:-1], 60])],
        [*pairs[:-1], replace(last, prompt=[0, *last.prompt])],
        [*pairs[:-1], PairIds(last.prompt, last.rejected, last.chosen)],
        [*pairs[:-1], PairIds([*last.prompt, last.chosen[0]], last.chosen[1:], last.rejected)],
    ]
    marks = [fingerprint(model, version) for version in (pairs, *changed)]
    assert len(set(marks)) == len(marks)


def test_the_fingerprint_knows_every_base_weight_and_frozen_adapter_to_the_last_number() -> None:
    model, pairs = tiny_model(), pair_ids()
    inject_lora(model, rank=64, alpha=4)
    marks = [fingerprint(model, pairs)]
    freeze_adapter(model)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    assert any("frozen_B" in name and tensor.numel() > 2048 for name, tensor in tensors.items())
    marks.append(fingerprint(model, pairs))
    for tensor in tensors.values():
        tensor.view(-1)[-1] += 1
        marks.append(fingerprint(model, pairs))
    assert len(set(marks)) == len(tensors) + 2


# Steps


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_first_step_has_loss_log_2_and_moves_the_adapter_only(
    tmp_path: Path, stacked: bool, dropout: float
) -> None:
    model = adapted(dropout)
    if stacked:
        move(model, 0.1)
        freeze_adapter(model, seed=2)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    assert any("frozen_A" in name and len(tensor) for name, tensor in base.items()) == stacked
    before = state(model)
    metrics = train(model, dpo(model), tmp_path, replace(FAST, epochs=10))
    assert metrics[0]["dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics[0]["chosen_reward"] == pytest.approx(0, abs=1e-5)
    assert metrics[-1]["dpo"] < metrics[0]["dpo"]
    assert not torch.equal(before, state(model))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in base.items())


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize(("warmup", "total"), [(0.0, 5), (0.2, 10), (0.5, 4), (1.0, 3)])
def test_schedules_fall_as_in_transformers_after_the_warm_up(name: str, warmup: float, total: int) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([weight], lr=2.0)
    theirs = get_scheduler(name, optimiser, num_warmup_steps=int(warmup * total), num_training_steps=total)
    settings = TrainSettings(learning_rate=2.0, warmup=warmup, schedule=name)
    for step in range(total):
        found = learning_rate(step, total, settings)
        if step < warmup * total:  # theirs begins with a rate of 0
            assert found == pytest.approx(2.0 * (step + 1) / max(1, warmup * total))
        else:
            assert found == pytest.approx(theirs.get_last_lr()[0])
        optimiser.step()
        theirs.step()


def test_the_sft_term_is_a_mean_or_a_sum_over_tokens() -> None:
    model = adapted(moved=0.3)
    mean, total = (replace(dpo(model), sft_term=term) for term in ("mean", "sum"))
    pairs = pair_ids()
    sums, lengths = response_logps(model, [(pair.prompt, pair.chosen) for pair in pairs])
    for objective, expected in ((mean, -(sums / lengths).mean()), (total, -sums.mean())):
        loss, statistics = objective.loss(model, range(len(pairs)))
        assert statistics["sft"] / len(pairs) == pytest.approx(expected.item(), rel=1e-4)
        assert loss.item() == pytest.approx(float(statistics["dpo"] + statistics["sft"]), rel=1e-5)


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        (1 / 3, [0.0025, 0.005, 0.0075] + [0.01] * 9),
        (0.0, [0.01] * 12),
        (0.01, [0.01] * 12),
        (1.0, [0.01 * step / 12 for step in range(1, 13)]),
    ],
)
def test_the_learning_rate_rises_over_the_warm_up_and_then_stays(
    tmp_path: Path, warmup: float, expected: list[float]
) -> None:
    metrics = train(adapted(), dpo(adapted()), tmp_path, replace(ONE_BY_ONE, warmup=warmup))
    assert [record["learning_rate"] for record in metrics] == pytest.approx(expected)


@pytest.mark.parametrize("shuffle", ["dialogues", "pairs"])
def test_single_items_are_spread_over_an_epoch_as_dialogues_are(shuffle: str) -> None:
    """Replayed instructions are groups of one; drawn by their items, the longer dialogues would come before them."""
    groups = [f"dialogue {i}" for i in range(60) for _ in range(8)] + [f"instruction {i}" for i in range(120)]
    settings = replace(FAST, batch_size=8, accumulation=1, shuffle=shuffle)
    thirds = []
    for epoch in range(20):
        order = [index for step in range(75) for index in batch_indices(groups, epoch * 75 + step, 75, settings)]
        thirds.append([sum(index >= 480 for index in order[place : place + 200]) / 120 for place in (0, 200, 400)])
    assert [sum(third) / 20 for third in zip(*thirds)] == pytest.approx([1 / 3] * 3, abs=0.06)


@pytest.mark.parametrize("shuffle", ["dialogues", "pairs"])
def test_every_epoch_takes_each_item_once_in_a_seeded_order(shuffle: str) -> None:
    groups = [str(index // 5) for index in range(23)]
    settings = replace(FAST, shuffle=shuffle)
    epochs = [[batch_indices(groups, epoch * 6 + step, 6, settings) for step in range(6)] for epoch in range(2)]
    orders = [[index for batch in epoch for index in batch] for epoch in epochs]
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert orders[0] != orders[1]
    assert [len(batch) for batch in epochs[0]] == [4, 4, 4, 4, 4, 3]
    other = [index for step in range(6) for index in batch_indices(groups, step, 6, replace(settings, seed=1))]
    assert other != orders[0]
    changes = sum(groups[a] != groups[b] for a, b in itertools.pairwise(orders[0]))
    assert (changes == len(set(groups)) - 1) == (shuffle == "dialogues")


@given(
    groups=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=30),
    size=st.integers(1, 7),
    epoch=st.integers(0, 3),
    shuffle=st.sampled_from(["dialogues", "pairs"]),
)
def test_any_epoch_takes_each_item_once_and_can_keep_dialogues_together(
    groups: list[str], size: int, epoch: int, shuffle: str
) -> None:
    settings = replace(FAST, batch_size=size, accumulation=1, shuffle=shuffle)
    steps = math.ceil(len(groups) / size)
    batches = [batch_indices(groups, epoch * steps + step, steps, settings) for step in range(steps)]
    assert all(len(batch) == size for batch in batches[:-1])
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(groups)))
    if shuffle == "dialogues":
        assert sum(groups[a] != groups[b] for a, b in itertools.pairwise(order)) == len(set(groups)) - 1


def test_the_loop_takes_each_item_once_an_epoch_in_an_order_of_the_seed(tmp_path: Path) -> None:
    def taken(name: str, seed: int) -> list[list[int]]:
        objective = watched("sft", adapted())
        train(adapted(), objective, tmp_path / name, replace(FAST, seed=seed))
        half = len(objective.calls) // 2
        return [list(itertools.chain(*epoch)) for epoch in (objective.calls[:half], objective.calls[half:])]

    epochs = taken("a", 0)
    assert [sorted(epoch) for epoch in epochs] == [list(range(14))] * 2
    assert epochs[0] != epochs[1]
    assert taken("b", 0) == epochs != taken("c", 1)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_the_training_before_it_is_used(tmp_path: Path, factor: float) -> None:
    model = adapted()
    with pytest.raises(FloatingPointError, match="step 3: the gradient is not finite"):
        train(model, Watched(dpo(model), spoil_at=3, factor=factor), tmp_path, ONE_BY_ONE)
    assert bool(state(model).isfinite().all())
    assert not (tmp_path / "adapter_model.safetensors").exists()


class Spoilt:
    """An objective whose loss is another number than it should be."""

    def __init__(self, objective: SFTObjective | DPOObjective, loss: float) -> None:
        self.objective, self.value, self.groups = objective, loss, objective.groups

    def __len__(self) -> int:
        return len(self.objective)

    def sequences(self, index: int) -> Any:
        return self.objective.sequences(index)

    def loss(self, model: Any, indices: Any) -> Any:
        loss, statistics = self.objective.loss(model, indices)
        return loss, statistics | {"loss": self.value}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_not_saved_as_good(tmp_path: Path, value: float) -> None:
    model = adapted()
    with pytest.raises(FloatingPointError, match=r"step 0: the loss is (nan|inf)"):
        train(model, Spoilt(dpo(model), value), tmp_path / "a", ONE_BY_ONE)
    said = rf"M1, step 0: the held-out loss is {value}; the weights or the data are damaged"
    with pytest.raises(FloatingPointError, match=said):
        train(model, dpo(model), tmp_path / "b", ONE_BY_ONE, held_out=Spoilt(dpo(model), value), label="M1")
    for folder in ("a", "b"):
        assert not (tmp_path / folder / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("call", "advice"), [(0, "the weights or the data are damaged"), (4, "a lower learning rate")])
def test_a_statistic_that_is_not_finite_ends_the_training_and_is_not_written(
    tmp_path: Path, call: int, advice: str, value: float
) -> None:
    """A lower learning rate is no advice before a step was taken."""
    model = adapted()
    objective, settings = Watched(dpo(model)), replace(ONE_BY_ONE, checkpoint_every=3)
    real = objective.loss

    def loss(model: Transformer, indices: Sequence[int]) -> tuple[Tensor, dict[str, Any]]:
        found, statistics = real(model, indices)
        return found, statistics | ({"chosen_reward": torch.tensor(value)} if len(objective.calls) > call else {})

    objective.loss = loss  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match=rf"M1, step {call}: the chosen_reward is {value}; {advice}"):
        train(model, objective, tmp_path, settings, label="M1")
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in written] == list(range(call))
    assert (tmp_path / "checkpoint.safetensors").exists() == (call > 3)
    fresh = adapted()
    assert len(train(fresh, dpo(fresh), tmp_path, settings)) == 12  # what was kept is good


def test_the_held_out_loss_is_also_taken_before_the_first_step(tmp_path: Path) -> None:
    model, held_out = adapted(), Scripted([5.0, 3.0, 4.0])
    before = state(model)
    metrics = train(model, dpo(model), tmp_path, replace(FAST, epochs=1, evaluations_per_epoch=2), held_out=held_out)
    assert torch.equal(held_out.seen[0], before)
    assert metrics[0]["held_out_before"] == {"loss": 5.0}
    assert [record.get("held_out", {}).get("loss") for record in metrics] == [3.0, 4.0]


def test_an_adapter_that_is_not_finite_is_in_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = adapted(), itertools.count(1)
    real = torch.optim.AdamW.step

    def broken(self: torch.optim.AdamW, closure: Any = None) -> Any:
        real(self, closure)
        if next(steps) == 4:
            with torch.no_grad():
                self.param_groups[0]["params"][0].view(-1)[0] = math.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(FloatingPointError, match="M1, step 4: the adapter is not finite"):
        train(model, dpo(model), tmp_path, replace(ONE_BY_ONE, checkpoint_every=2), label="M1")
    with safe_open(tmp_path / "checkpoint.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["progress"])["step"] == 2


def test_an_adapter_that_the_last_step_broke_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    real = torch.optim.AdamW.step

    def broken(self: torch.optim.AdamW, closure: Any = None) -> Any:
        real(self, closure)
        with torch.no_grad():
            self.param_groups[0]["params"][0].view(-1)[0] = math.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(FloatingPointError, match="M1, step 1: the adapter is not finite; a lower"):
        train(model, dpo(model), tmp_path, TrainSettings(batch_size=100, epochs=1), label="M1")
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="M0: there are no items to train on"):
        train(adapted(), SFTObjective([], []), tmp_path / "M0", FAST, label="M0")
    assert not (tmp_path / "M0").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0}, {"batch_size": 0}, {"accumulation": 0}, {"evaluations_per_epoch": 0}, {"patience": 0},
        {"checkpoint_every": 0}, {"shuffle": "x"}, {"warmup": 2.0}, {"warmup": -0.1}, {"warmup": math.nan},
        {"schedule": "x"},
        {"learning_rate": 0.0}, {"learning_rate": math.nan}, {"learning_rate": math.inf}, {"weight_decay": -1.0},
        {"weight_decay": math.nan}, {"max_grad_norm": 0.0}, {"max_grad_norm": math.nan},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        TrainSettings(**changes)


def test_an_infinite_bound_clips_no_gradient(tmp_path: Path) -> None:
    states = []
    for bound in (math.inf, 1e9):
        model = adapted()
        records = train(model, dpo(model), tmp_path / str(bound), replace(FAST, max_grad_norm=bound))
        states.append(state(model))
    assert max(record["gradient_norm"] for record in records) > 1
    assert torch.equal(*states)


# Early stopping


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
        assert not model.training
        value = self.losses[len(self.seen)]
        self.seen.append(state(model))
        return torch.tensor(value), {"loss": value}


@pytest.mark.parametrize(
    ("losses", "evaluations", "best"),
    [
        ([3.0, 2.0, 2.5, 2.0, 2.1, 0.1, 0.0], 5, 1),
        ([3.0, 3.1, 3.2, 2.0, 2.1, 2.2, 2.0, 0.0], 7, 3),  # an improvement gives new patience
        ([1.0, 1.0, 1.0, 1.0, 0.0], 4, 0),  # standing still is no improvement
        ([loss for number in range(9) for loss in (2 - number / 10, 3.0)], 18, 16),  # to the very end
    ],
)
def test_training_stops_after_the_patience_and_keeps_the_best_adapter(
    tmp_path: Path, losses: list[float], evaluations: int, best: int
) -> None:
    model, held_out = adapted(), Scripted([9.0, *losses])  # the first is of the model before any step
    settings = replace(ONE_BY_ONE, evaluations_per_epoch=6, patience=3, epochs=3)
    metrics = train(model, dpo(model), tmp_path, settings, held_out=held_out)
    held_out.seen.pop(0)
    assert len(held_out.seen) == evaluations == len(metrics)
    assert torch.equal(state(model), held_out.seen[best])
    assert not torch.equal(held_out.seen[best], held_out.seen[-1])
    saved = tiny_model()
    load_adapter(saved, tmp_path)
    assert torch.equal(state(saved), held_out.seen[best])


def test_held_out_statistics_are_means_over_the_items_however_they_are_packed(tmp_path: Path) -> None:
    model = adapted()
    held_out = watched("sft", model, max_tokens=1)
    settings = replace(FAST, epochs=1, evaluations_per_epoch=1, max_tokens=1)
    metrics = train(model, dpo(model), tmp_path, settings, held_out=held_out)
    assert [("held_out" in record) for record in metrics] == [False, True]
    assert len(held_out.calls) == 2 * len(held_out)  # before the first step and at the end
    model.eval()
    with torch.no_grad():
        expected = plain_losses("sft", model).mean().item()
    assert metrics[-1]["held_out"]["loss"] == pytest.approx(expected, rel=1e-4)


# Resume


def held_out_or_none(model: Transformer, held_out: bool) -> DPOObjective | None:
    return dpo(model) if held_out else None


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("calls", [(1,), (7,), (4, 2, 5)], ids=str)
def test_an_interrupted_training_resumes_to_the_same_bits(
    tmp_path: Path, calls: tuple[int, ...], dropout: float, held_out: bool
) -> None:
    """Interrupted before the first checkpoint, between two (some steps are taken again), and several times."""
    settings = replace(ONE_BY_ONE, checkpoint_every=3, evaluations_per_epoch=2)
    model = adapted(dropout)
    expected = train(model, dpo(model), tmp_path / "whole", settings, held_out=held_out_or_none(model, held_out))
    whole = state(model)
    for call in calls:
        again = adapted(dropout)
        interrupted = Watched(dpo(again), fail_at=call)
        other = held_out_or_none(again, held_out)
        with pytest.raises(KeyboardInterrupt):
            train(again, interrupted, tmp_path / "again", settings, held_out=other)
        assert not (tmp_path / "again" / "adapter_model.safetensors").exists()
    fresh = adapted(dropout)
    rest = Watched(dpo(fresh))
    metrics = train(fresh, rest, tmp_path / "again", settings, held_out=held_out_or_none(fresh, held_out))
    done = {(1,): 0, (7,): 6, (4, 2, 5): 6}[calls]  # 4 reach a checkpoint at 3; 2 more none; 5 more one at 6
    assert len(rest.calls) == len(expected) - done
    assert torch.equal(state(fresh), whole)
    for name in ADAPTER_FILES:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    written = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert written == metrics
    assert [record["step"] for record in written] == list(range(12))
    assert [record | {"seconds": 0} for record in metrics] == [record | {"seconds": 0} for record in expected]
    assert not (tmp_path / "again" / "checkpoint.safetensors").exists()


def test_dropout_makes_a_difference(tmp_path: Path) -> None:
    states = []
    for dropout in (0.0, 0.3):
        model = adapted(dropout)
        train(model, dpo(model), tmp_path / str(dropout), FAST)
        states.append(state(model))
    assert (states[0] - states[1]).abs().max() > 1e-3


def test_a_training_interrupted_in_an_evaluation_keeps_its_best_adapter_and_patience(tmp_path: Path) -> None:
    losses = [4.0, 3.0, 2.0, 2.5, 2.6, 2.7]
    settings = replace(ONE_BY_ONE, evaluations_per_epoch=3, patience=3)
    model, script = adapted(), Scripted(losses)
    train(model, dpo(model), tmp_path / "whole", settings, held_out=script)
    assert len(script.seen) == 6
    again = adapted()
    with pytest.raises(IndexError):  # the script ends in the fourth evaluation
        train(again, dpo(again), tmp_path / "again", settings, held_out=Scripted(losses[:4]))
    fresh, rest = adapted(), Scripted(losses[4:])
    train(fresh, dpo(fresh), tmp_path / "again", settings, held_out=rest)
    assert len(rest.seen) == 2
    assert torch.equal(state(fresh), state(model))


def test_a_training_that_had_stopped_early_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(ONE_BY_ONE, evaluations_per_epoch=6, patience=1)
    model, script = adapted(), Scripted([4.0, 2.0, 3.0])
    with monkeypatch.context() as patch:
        patch.setattr(train_room, "save_adapter", lambda *_, **__: pytest.fail("the power is gone"))
        with pytest.raises(pytest.fail.Exception):
            train(model, dpo(model), tmp_path, settings, held_out=script)
    fresh = adapted()
    never = Watched(dpo(fresh), fail_at=0)
    metrics = train(fresh, never, tmp_path, settings, held_out=never)
    assert len(metrics) == 2
    assert torch.equal(state(fresh), script.seen[1])


# Packing


def test_packed_log_probabilities_are_those_of_one_row_and_of_any_number_of_rows() -> None:
    model, examples = tiny_model(), dialogue_examples()
    sums, lengths = packed_logps(model, examples)
    torch.testing.assert_close(sums, response_logps(model, examples, max_tokens=20)[0], rtol=1e-5, atol=1e-5)
    assert lengths.tolist() == [len(response) for _, response in examples]
    with pytest.raises(ValueError, match="example 1: its response has no tokens"):
        packed_logps(model, [([1], [2]), ([1], [])])


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_pack_is_one_row_of_the_model_and_is_not_packed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("packed a second time")

    monkeypatch.setattr(scoring, "pack", never)
    model, rows = adapted(), []
    objective = watched(kind, model, max_tokens=20)
    model.model.embed_tokens.register_forward_hook(lambda _, arguments, __: rows.append(arguments[0].shape))
    train(model, objective, tmp_path, replace(FAST, max_tokens=20))
    assert len(rows) == len(objective.calls) > 2
    assert all(shape[0] == 1 for shape in rows)
