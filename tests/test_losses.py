"""Losses: closed forms, gradcheck, the plain computation and TRL as oracles, and the properties they must have."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from trl.trainer.dpo_trainer import DPOTrainer

from selfevo.kernels.head import linear_logps
from selfevo.losses import dpo_loss, dpo_sft_loss, sequence_logps

Row = tuple[float, ...]  # policy and reference log-probabilities of one pair, in the order of the arguments
Quartet = tuple[Tensor, Tensor, Tensor, Tensor]

logps = st.floats(-500.0, 0.0, width=32)
pairs = st.lists(st.tuples(logps, logps, logps, logps), min_size=1, max_size=7)
betas = st.floats(0.01, 2.0)
gammas = st.floats(0.0, 3.0)


def draw(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def columns(rows: list[Row], dtype: torch.dtype = torch.float64) -> Quartet:
    chosen, rejected, reference_chosen, reference_rejected = torch.tensor(rows, dtype=dtype).unbind(1)
    return chosen, rejected, reference_chosen, reference_rejected


# --- sequence_logps ---------------------------------------------------------------------------------------------------


def naive_sequence_logps(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    sums = []
    for row, ids in zip(logits.double(), labels.tolist(), strict=True):
        sums.append(
            sum(
                (row[t - 1, ids[t]] - row[t - 1].logsumexp(0) for t in range(1, len(ids)) if ids[t] != ignore_index),
                start=row.new_zeros(()),
            )
        )
    return torch.stack(sums)


@pytest.mark.parametrize(("batch", "length", "vocab"), [(3, 47, 31), (1, 2, 123), (5, 1, 7)])
def test_sequence_logps_equal_the_sum_over_shifted_labels(batch: int, length: int, vocab: int) -> None:
    logits = draw((batch, length, vocab))
    labels = torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(1))
    labels[:, : length // 3] = -100
    expected = naive_sequence_logps(logits, labels)
    torch.testing.assert_close(sequence_logps(logits, labels).double(), expected, rtol=1e-6, atol=1e-5)


def test_sequence_logps_have_a_closed_form_for_uniform_logits() -> None:
    """Every token costs log 8; the first label is never predicted: 4 tokens, then 2, then none."""
    labels = torch.tensor([[1, 2, 3, 4, 5], [-100, -100, 7, 0, -100], [6, -100, -100, -100, -100]])
    expected = torch.tensor([-4 * math.log(8), -2 * math.log(8), 0.0])
    torch.testing.assert_close(sequence_logps(torch.zeros(3, 5, 8), labels), expected)


def test_token_zero_counts_like_any_other() -> None:
    logits = draw((1, 2, 5))
    assert sequence_logps(logits, torch.tensor([[3, 0]])).item() == pytest.approx(
        logits[0, 0].log_softmax(-1)[0].item(), rel=1e-6
    )


def test_right_padding_changes_nothing() -> None:
    lengths = (9, 4, 6)
    logits = draw((3, 9, 11))
    labels = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate(lengths):
        labels[row, length:] = -100
    alone = [sequence_logps(logits[i : i + 1, :n], labels[i : i + 1, :n]) for i, n in enumerate(lengths)]
    torch.testing.assert_close(sequence_logps(logits, labels), torch.cat(alone))


def test_logits_of_ignored_positions_are_never_read() -> None:
    logits = draw((1, 4, 5))
    logits[0, 2:] = float("nan")
    logits.requires_grad_()
    total = sequence_logps(logits, torch.tensor([[1, 2, 3, -100]]))
    total.sum().backward()
    assert total.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[0, 2:] == 0).all()


def test_another_ignore_index_is_honoured() -> None:
    logits, labels = draw((2, 6, 9)), torch.randint(1, 9, (2, 6), generator=torch.Generator().manual_seed(1))
    labels[:, 3] = 0
    renamed = labels.masked_fill(labels == 0, -100)
    torch.testing.assert_close(sequence_logps(logits, labels, ignore_index=0), sequence_logps(logits, renamed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sequence_logps_sum_in_float32_under_a_half_precision_model(dtype: torch.dtype) -> None:
    logits = draw((2, 257, 64)).to(dtype)
    labels = torch.randint(64, (2, 257), generator=torch.Generator().manual_seed(1))
    sums = sequence_logps(logits, labels)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), naive_sequence_logps(logits, labels), rtol=1e-6, atol=0)


def test_sequence_logps_pass_gradcheck() -> None:
    labels = torch.tensor([[0, 2, -100, 4, 0], [-100, 1, 1, 3, -100]])
    logits = draw((2, 5, 6), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sequence_logps(x, labels), logits)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [((2, 3, 4), (2, 4)), ((2, 3, 4), (3, 3)), ((3, 4), (3, 4)), ((2, 3, 4), (2, 3, 1)), ((2, 3, 4), (6,))],
)
def test_sequence_logps_refuse_mismatched_shapes(logits: tuple[int, ...], labels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected logits"):
        sequence_logps(torch.zeros(logits), torch.zeros(labels, dtype=torch.long))


def test_sequence_logps_refuse_labels_outside_the_vocabulary() -> None:
    for label in (-1, 4):
        with pytest.raises(ValueError, match=f"found {label}"):
            sequence_logps(torch.zeros(1, 2, 4), torch.tensor([[0, label]]))


# --- linear_logps -----------------------------------------------------------------------------------------------------


def plain_linear_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def head_inputs(rows: int, size: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(2))
    return draw((rows, size), 0, dtype), draw((vocab, size), 1, dtype), targets


SHAPES = [(3, 47, 31), (47, 31, 123), (1, 1, 1), (31, 3, 47)]
CHUNKS = [None, 1, 2, 7, 10_000]


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize(("rows", "size", "vocab"), SHAPES)
@pytest.mark.parametrize("trainable_head", [False, True])
def test_linear_logps_and_gradients_equal_the_plain_computation(
    rows: int, size: int, vocab: int, chunk_size: int | None, trainable_head: bool
) -> None:
    hidden, weight, targets = head_inputs(rows, size, vocab)
    upstream = draw((rows,), 3)
    results = []
    for function in (lambda *xs: linear_logps(*xs, chunk_size=chunk_size), plain_linear_logps):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable_head)
        out = function(h, w, targets)
        (out * upstream).sum().backward()
        results.append((out.detach(), h.grad, w.grad))
    torch.testing.assert_close(results[0], results[1], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 99])
@pytest.mark.parametrize("trains", ["hidden", "weight", "both"])
def test_linear_logps_pass_gradcheck(trains: str, chunk_size: int) -> None:
    hidden, weight, targets = head_inputs(5, 3, 7, torch.float64)
    hidden.requires_grad_(trains != "weight")
    weight.requires_grad_(trains != "hidden")
    assert torch.autograd.gradcheck(lambda h, w: linear_logps(h, w, targets, chunk_size=chunk_size), (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trainable_head", [False, True])
def test_half_precision_rounds_where_the_plain_computation_does(dtype: torch.dtype, trainable_head: bool) -> None:
    hidden, weight, targets = head_inputs(37, 16, 123, dtype)
    results = []
    for function in (lambda *xs: linear_logps(*xs, chunk_size=5), plain_linear_logps):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable_head)
        out = function(h, w, targets)
        out.sum().backward()
        results.append((out.detach(), h.grad, w.grad))
    (ours, ours_h, ours_w), (plain, plain_h, plain_w) = results
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-5)
    # Both round the residual to the head's dtype; what is left is the order of summation, a few last places.
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(ours_h, plain_h, rtol=2 * step, atol=4 * step)
    if trainable_head:
        torch.testing.assert_close(ours_w, plain_w, rtol=2 * step, atol=8 * step)


def test_half_precision_keeps_the_gradient_of_a_nearly_certain_target() -> None:
    """p = sigmoid(7.5) = 0.99945 is 1 in bfloat16, yet the slope of its log-probability is 1 - p = 5.5e-4, not 0."""
    hidden = torch.tensor([[7.5]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)
    linear_logps(hidden, weight, torch.tensor([0])).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.item() == pytest.approx(1 / (1 + math.exp(7.5)), rel=2**-8)


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    out = linear_logps(hidden, torch.tensor([[1.0], [0.0], [-1.0]]), torch.tensor([2, 2]))
    out.sum().backward()
    torch.testing.assert_close(out.detach(), torch.tensor([-2e4, 0.0]))
    torch.testing.assert_close(hidden.grad, torch.tensor([[-2.0], [0.0]]))


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation handed back."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable_head", [False, True])
def test_logits_of_all_rows_are_never_held_at_once(trainable_head: bool, dtype: torch.dtype) -> None:
    rows, size, vocab, chunk_size = 64, 4, 256, 8
    hidden, weight, targets = head_inputs(rows, size, vocab, dtype)
    hidden.requires_grad_()
    weight.requires_grad_(trainable_head)
    with LargestTensor() as largest:
        linear_logps(hidden, weight, targets, chunk_size=chunk_size).sum().backward()
    assert largest.numel == chunk_size * vocab
    with LargestTensor() as largest:
        plain_linear_logps(hidden, weight, targets)
    assert largest.numel == rows * vocab  # the probe sees what it is there to see


def test_default_chunks_stay_within_their_byte_budget() -> None:
    rows, vocab = 1400, 40_000
    hidden, weight, targets = head_inputs(rows, 1, vocab)
    with LargestTensor() as largest:
        linear_logps(hidden, weight, targets)
    assert vocab < largest.numel <= 128 * 2**20 // 4


@pytest.mark.parametrize("needs", [(False, False), (True, False), (False, True), (True, True)])
def test_only_gradients_that_are_asked_for_are_computed(needs: tuple[bool, bool]) -> None:
    hidden, weight, targets = head_inputs(6, 3, 5)
    hidden.requires_grad_(needs[0])
    weight.requires_grad_(needs[1])
    out = linear_logps(hidden, weight, targets)
    assert out.requires_grad == any(needs)
    if any(needs):
        out.sum().backward()
    assert (hidden.grad is not None, weight.grad is not None) == needs


class CountProducts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


def test_a_frozen_head_costs_two_products_per_chunk_and_none_in_the_backward_pass() -> None:
    hidden, weight, targets = head_inputs(6, 3, 5)
    hidden.requires_grad_()
    with CountProducts() as forward:
        total = linear_logps(hidden, weight, targets, chunk_size=2).sum()
    with CountProducts() as backward:
        total.backward()
    with CountProducts() as without_gradient, torch.no_grad():
        linear_logps(hidden, weight, targets, chunk_size=2)
    assert (forward.count, backward.count, without_gradient.count) == (6, 0, 3)


def test_every_argument_of_linear_logps_matters() -> None:
    hidden, weight, targets = head_inputs(6, 3, 5)
    before = linear_logps(hidden, weight, targets)
    for changed in ((hidden + 1, weight, targets), (hidden, weight * 2, targets), (hidden, weight, (targets + 1) % 5)):
        assert not torch.isclose(linear_logps(*changed), before).any()


def test_no_rows_give_an_empty_result_and_zero_gradients() -> None:
    hidden, weight = torch.zeros(0, 3, requires_grad=True), draw((5, 3)).requires_grad_()
    out = linear_logps(hidden, weight, torch.zeros(0, dtype=torch.long))
    out.sum().backward()
    assert out.shape == (0,)
    torch.testing.assert_close(hidden.grad, torch.zeros(0, 3))
    torch.testing.assert_close(weight.grad, torch.zeros(5, 3))


def test_linear_logps_agree_with_sequence_logps() -> None:
    hidden, weight = draw((2, 6, 4)), draw((9, 4), 1)
    labels = torch.randint(9, (2, 6), generator=torch.Generator().manual_seed(3))
    rows = linear_logps(hidden[:, :-1].reshape(-1, 4), weight, labels[:, 1:].reshape(-1)).view(2, 5)
    torch.testing.assert_close(rows.sum(1), sequence_logps(hidden @ weight.T, labels))


def test_a_second_backward_pass_gives_the_same_gradient() -> None:
    hidden, weight, targets = head_inputs(6, 3, 5)
    hidden.requires_grad_()
    total = linear_logps(hidden, weight, targets).sum()
    first, second = (torch.autograd.grad(total, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_linear_logps_refuse_bad_input() -> None:
    hidden, weight, targets = head_inputs(6, 3, 5)
    for bad in ((hidden[None], weight, targets), (hidden, weight[:, :2], targets), (hidden, weight, targets[:5])):
        with pytest.raises(ValueError, match="expected hidden"):
            linear_logps(*bad)
    for label in (-100, 5):
        with pytest.raises(ValueError, match=f"found {label}"):
            linear_logps(hidden, weight, targets.index_fill(0, torch.tensor([2]), label))
    with pytest.raises(ValueError, match="integers"):
        linear_logps(hidden, weight, targets.float())
    with pytest.raises(ValueError, match="one floating dtype"):
        linear_logps(hidden, weight.double(), targets)
    with pytest.raises(ValueError, match="chunk_size"):
        linear_logps(hidden, weight, targets, chunk_size=0)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 12), st.integers(1, 11), st.integers(0, 99))
def test_the_chunk_size_never_changes_the_result(rows: int, size: int, vocab: int, chunk: int, seed: int) -> None:
    hidden = draw((rows, size), seed, torch.float64).requires_grad_()
    weight = draw((vocab, size), seed + 1, torch.float64).requires_grad_()
    targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(seed))
    whole, parts = linear_logps(hidden, weight, targets), linear_logps(hidden, weight, targets, chunk_size=chunk)
    torch.testing.assert_close(parts, whole)
    expected = torch.autograd.grad(whole.square().sum(), (hidden, weight))
    torch.testing.assert_close(torch.autograd.grad(parts.square().sum(), (hidden, weight)), expected)


# --- dpo_loss and dpo_sft_loss ----------------------------------------------------------------------------------------


def closed_form(rows: list[Row], lengths: list[int] | None, beta: float, gamma: float) -> float:
    dpo = sft = 0.0
    for i, (pc, pr, rc, rr) in enumerate(rows):
        margin = beta * ((pc - rc) - (pr - rr))
        dpo += math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0)
        sft += -pc / (lengths[i] if lengths else 1)
    return (dpo + gamma * sft) / len(rows)


@settings(deadline=None, max_examples=40)
@given(pairs, betas, gammas, st.booleans(), st.data())
def test_the_loss_equals_its_closed_form(
    rows: list[Row], beta: float, gamma: float, per_token: bool, data: st.DataObject
) -> None:
    size = len(rows)
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=size, max_size=size)) if per_token else None
    tensor = None if lengths is None else torch.tensor(lengths)
    result = dpo_sft_loss(*columns(rows), tensor, beta=beta, gamma=gamma)
    assert result.loss.item() == pytest.approx(closed_form(rows, lengths, beta, gamma), rel=1e-9, abs=1e-9)


def test_worked_example() -> None:
    """Pair 1: margin 0.1 * ((-10 + 12) - (-20 + 19)) = 0.3; pair 2: 0.1 * ((-8 + 7) - (-5 + 9)) = -0.5.

    -log sigmoid: 0.5543552, 0.9740770; mean 0.7642161. SFT: (10 / 5 + 8 / 2) / 2 = 3. Loss with gamma 0.5: 2.2642161.
    """
    logp = columns([(-10.0, -20.0, -12.0, -19.0), (-8.0, -5.0, -7.0, -9.0)], torch.float32)
    result = dpo_sft_loss(*logp, torch.tensor([5, 2]), beta=0.1, gamma=0.5)
    assert result.dpo.item() == pytest.approx(0.7642161, abs=1e-6)
    assert result.sft.item() == pytest.approx(3.0)
    assert result.loss.item() == pytest.approx(2.2642161, abs=1e-6)
    torch.testing.assert_close(result.chosen_rewards, torch.tensor([0.2, -0.1]))
    torch.testing.assert_close(result.rejected_rewards, torch.tensor([-0.1, 0.4]))


def trl_loss(logp: tuple[Tensor, ...], lengths: Tensor, beta: float, gamma: float) -> Tensor:
    """TRL's own ``DPOTrainer._compute_loss`` on a model that answers with given log-probabilities.

    Each reply's log-probability is spread evenly over its tokens. The trainer is a bag of the attributes the method
    reads, as a real one would need a checkpoint and could not be handed log-probabilities.
    """
    chosen, rejected, ref_chosen, ref_rejected = logp
    width = int(lengths.max())
    mask = (torch.arange(width) < lengths[:, None]).repeat(2, 1)
    per_token = torch.cat((chosen / lengths, rejected / lengths))[:, None] * mask
    zeros = torch.zeros_like(per_token)
    outputs = SimpleNamespace(log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=mask)
    completion = torch.cat((torch.zeros(len(mask), 1, dtype=torch.long), mask.long()), dim=1)
    inputs = {
        "input_ids": completion,
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=["sigmoid", "sft"],
        loss_weights=[1.0, gamma], use_weighting=False, beta=beta, _tp_size=1, _total_train_tokens=0,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    loss: Tensor = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    return loss


@pytest.mark.parametrize(("beta", "gamma"), [(0.1, 1.0), (0.1, 0.0), (0.7, 2.5)])
def test_loss_and_gradients_equal_trl(beta: float, gamma: float) -> None:
    """TRL's SFT term is the mean over all tokens of the micro-batch: ours for equal lengths, so those are used."""
    values = (-60 * draw((4, 9), 5, torch.float64).abs()).unbind(0)
    lengths = torch.full((9,), 13)
    gradients = []
    for function in (
        lambda *xs: trl_loss(xs, lengths, beta, gamma),
        lambda *xs: dpo_sft_loss(*xs, lengths, beta=beta, gamma=gamma).loss,
    ):
        policy = [x.clone().requires_grad_() for x in values[:2]]
        loss = function(*policy, *values[2:])
        gradients.append((loss.detach(), *torch.autograd.grad(loss, policy)))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_dpo_equals_trl_for_replies_of_any_length() -> None:
    logp = (-60 * draw((4, 9), 6, torch.float64).abs()).unbind(0)
    lengths = torch.tensor([1, 2, 3, 5, 8, 13, 21, 34, 55])
    torch.testing.assert_close(dpo_loss(*logp, beta=0.3), trl_loss(logp, lengths, 0.3, 0.0))


@settings(deadline=None, max_examples=40)
@given(pairs, betas)
def test_policy_equal_to_reference_gives_log_two(rows: list[Row], beta: float) -> None:
    chosen, rejected = columns(rows, torch.float32)[:2]
    assert dpo_loss(chosen, rejected, chosen, rejected, beta=beta).item() == pytest.approx(math.log(2), rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(pairs, betas)
def test_swapping_chosen_and_rejected_flips_the_margin(rows: list[Row], beta: float) -> None:
    """-log sigmoid(m) + log sigmoid(-m) = -m, pair by pair; and the rewards change places."""
    pc, pr, rc, rr = columns(rows)
    one, other = dpo_sft_loss(pc, pr, rc, rr, beta=beta), dpo_sft_loss(pr, pc, rr, rc, beta=beta)
    margins = one.chosen_rewards - one.rejected_rewards
    torch.testing.assert_close(one.dpo - other.dpo, -margins.mean())
    assert torch.equal(one.chosen_rewards, other.rejected_rewards)


@settings(deadline=None, max_examples=40)
@given(pairs, st.floats(-100, 100), st.floats(-100, 100))
def test_dpo_sees_only_ratios_to_the_reference(rows: list[Row], a: float, b: float) -> None:
    pc, pr, rc, rr = columns(rows)
    torch.testing.assert_close(dpo_loss(pc + a, pr + b, rc + a, rr + b), dpo_loss(pc, pr, rc, rr), rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(pairs, betas)
def test_without_gamma_the_loss_is_dpo(rows: list[Row], beta: float) -> None:
    result = dpo_sft_loss(*columns(rows), beta=beta, gamma=0.0)
    assert result.loss == result.dpo == dpo_loss(*columns(rows), beta=beta)


@settings(deadline=None, max_examples=40)
@given(pairs, gammas, st.randoms(use_true_random=False))
def test_the_order_of_pairs_does_not_matter(rows: list[Row], gamma: float, random: Any) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)
    lengths = torch.arange(1, len(rows) + 1)
    shuffled = dpo_sft_loss(*columns([rows[i] for i in order]), lengths[order], gamma=gamma)
    torch.testing.assert_close(shuffled.loss, dpo_sft_loss(*columns(rows), lengths, gamma=gamma).loss)


@settings(deadline=None, max_examples=40)
@given(pairs, pairs, st.booleans())
def test_the_loss_does_not_depend_on_how_pairs_are_batched(
    first: list[Row], second: list[Row], per_token: bool
) -> None:
    def loss(rows: list[Row], lengths: Tensor) -> Tensor:
        return dpo_sft_loss(*columns(rows), lengths if per_token else None).loss

    n, m = len(first), len(second)
    lengths = torch.arange(1, n + m + 1) * 7 % 50 + 1
    parts = (n * loss(first, lengths[:n]) + m * loss(second, lengths[n:])) / (n + m)
    torch.testing.assert_close(loss(first + second, lengths), parts)


def test_each_reply_weighs_the_same_however_long_it_is() -> None:
    """Per-token means 1 and 3 average to 2, not to the token mean (100 * 1 + 1 * 3) / 101."""
    chosen, zeros = torch.tensor([-100.0, -3.0]), torch.zeros(2)
    for lengths in (torch.tensor([100, 1]), torch.tensor([100.0, 1.0])):
        assert dpo_sft_loss(chosen, zeros, chosen, zeros, lengths).sft.item() == pytest.approx(2.0)
    assert dpo_sft_loss(chosen, zeros, chosen, zeros).sft.item() == pytest.approx(51.5)


@pytest.mark.parametrize("per_token", [False, True])
def test_losses_pass_gradcheck(per_token: bool) -> None:
    policy = [(3 * draw((5,), seed, torch.float64)).requires_grad_() for seed in (1, 2)]
    reference = [3 * draw((5,), seed, torch.float64) for seed in (3, 4)]
    lengths = torch.tensor([1, 2, 3, 4, 50]) if per_token else None
    assert torch.autograd.gradcheck(lambda c, r: dpo_loss(c, r, *reference, beta=0.4), policy)
    for field in ("loss", "dpo", "sft"):

        def scalar(c: Tensor, r: Tensor, field: str = field) -> Tensor:
            value: Tensor = getattr(dpo_sft_loss(c, r, *reference, lengths, beta=0.4, gamma=0.7), field)
            return value + 0 * (c.sum() + r.sum())  # the SFT term alone does not reach the rejected side

        assert torch.autograd.gradcheck(scalar, policy)


def test_no_gradient_flows_into_the_reference_or_out_of_the_rewards() -> None:
    logp = [(-draw((3,), seed).abs()).requires_grad_() for seed in range(4)]
    result = dpo_sft_loss(*logp)
    (result.loss + dpo_loss(*logp)).backward()
    assert [x.grad is not None for x in logp] == [True, True, False, False]
    assert [x.requires_grad for x in result] == [True, True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("signs", [(1, -1, -1, 1), (-1, 1, 1, -1), (1, 1, -1, -1)])
def test_enormous_log_probabilities_give_finite_losses_and_gradients(
    dtype: torch.dtype, signs: tuple[int, ...]
) -> None:
    pc, pr, rc, rr = (torch.full((2,), sign * 1e4, dtype=dtype) for sign in signs)
    pc.requires_grad_()
    pr.requires_grad_()
    result = dpo_sft_loss(pc, pr, rc, rr, torch.tensor([1, 200]))
    result.loss.backward()
    for x in (*result, pc.grad, pr.grad):
        assert x is not None
        assert torch.isfinite(x).all()
    margin = 0.1 * (pc - rc - pr + rr).double()
    torch.testing.assert_close(result.dpo.double(), -F.logsigmoid(margin).mean())


def test_half_precision_is_raised_before_it_is_subtracted() -> None:
    """1000 - 1.5 = 998.5 does not exist in bfloat16 (spacing 4): the difference must be taken in float32."""
    one = torch.tensor([-1000.0], dtype=torch.bfloat16)
    other = torch.tensor([-1.5], dtype=torch.bfloat16)
    result = dpo_sft_loss(one, one, other, one)
    assert result.chosen_rewards.dtype == torch.float32
    assert result.chosen_rewards.item() == pytest.approx(-99.85, rel=1e-6)
    both = torch.cat((one, other))
    assert dpo_sft_loss(both, both, both, both).sft.item() == 500.75


def test_every_argument_of_the_loss_matters() -> None:
    base: dict[str, Any] = {
        "policy_chosen": torch.tensor([-3.0]), "policy_rejected": torch.tensor([-4.0]),
        "reference_chosen": torch.tensor([-5.0]), "reference_rejected": torch.tensor([-7.0]),
        "chosen_lengths": torch.tensor([2]), "beta": 0.3, "gamma": 0.5,
    }  # fmt: skip
    before = dpo_sft_loss(**base).loss
    for name, value in base.items():
        assert dpo_sft_loss(**{**base, name: value + 1}).loss != before, name
    plain = {name: base[name] for name in list(base)[:4]}
    assert dpo_loss(**plain, beta=0.3) != dpo_loss(**plain) == dpo_loss(**plain, beta=0.1)


def test_the_defaults_are_the_papers() -> None:
    """beta 0.1 and gamma 1; labels of -100 are left out; without lengths the SFT term is a sum (Eq. 7 as printed)."""
    rows = [torch.tensor(row) for row in ([-4.0, -6.0], [-5.0, -3.0], [-4.5, -5.0], [-5.0, -4.0])]
    dpo, sft = F.softplus(-0.1 * torch.tensor([0.5 - 0.0, -1.0 - 1.0])).mean(), torch.tensor(5.0)
    torch.testing.assert_close(dpo_sft_loss(*rows).loss, dpo + sft)
    torch.testing.assert_close(dpo_loss(*rows), dpo)
    logits, labels = torch.randn(1, 4, 7), torch.tensor([[1, 2, -100, 3]])
    expected = logits.log_softmax(2)[0, 0, 2] + logits.log_softmax(2)[0, 2, 3]
    torch.testing.assert_close(sequence_logps(logits, labels)[0], expected)


def test_bad_input_is_refused() -> None:
    good = [torch.zeros(3) for _ in range(4)]
    for index in range(4):
        for bad in (torch.zeros(2), torch.zeros(3, 1), torch.zeros(()), torch.zeros(0)):
            arguments = [bad if i == index else x for i, x in enumerate(good)]
            for function in (dpo_loss, dpo_sft_loss):
                with pytest.raises(ValueError, match="shape"):
                    function(*arguments)
    with pytest.raises(ValueError, match="at least one pair"):
        dpo_loss(*[torch.zeros(0)] * 4)
    with pytest.raises(ValueError, match="chosen_lengths"):
        dpo_sft_loss(*good, torch.ones(2))
    for lengths in (torch.tensor([1, 0, 2]), torch.tensor([1.0, 0.5, 2.0]), torch.tensor([1.0, math.nan, 2.0])):
        with pytest.raises(ValueError, match="at least 1"):
            dpo_sft_loss(*good, lengths)
    for beta in (0.0, -0.1, math.nan, math.inf):
        for function in (dpo_loss, dpo_sft_loss):
            with pytest.raises(ValueError, match="beta"):
                function(*good, beta=beta)
    for gamma in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="gamma"):
            dpo_sft_loss(*good, gamma=gamma)
