"""Adapters: PEFT as the oracle for targets, outputs and files, and the properties that iterated training relies on."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from selfevo.lora import (
    LoRALinear,
    disable_adapters,
    freeze_adapter,
    inject_lora,
    load_adapter,
    lora_parameters,
    merge_adapters,
    remove_adapters,
    save_adapter,
)

TOKENS = torch.tensor([[1, 5, 9, 2, 30, 7], [8, 8, 0, 3, 4, 6]])
SIZES: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "tie_word_embeddings": False,
}  # fmt: skip


def llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3))
    return model.to(dtype).eval()


class Toy(nn.Module):
    """No transformer: a nested layer, one without bias, a head, and one layer that sits in two places."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(5, 7, dtype=dtype)
        self.block = nn.Sequential(nn.Linear(7, 7, bias=False, dtype=dtype), nn.Tanh())
        self.shared = self.block[0]
        self.norm = nn.LayerNorm(7, dtype=dtype)
        self.lm_head = nn.Linear(7, 3, dtype=dtype)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.norm(self.shared(self.block(self.first(x)))))
        return out


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randomise(model: nn.Module, seed: int = 0, std: float = 0.2) -> None:
    """Stands in for training: every trainable factor becomes random."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=std, generator=generator)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model(TOKENS).logits
    return out


def largest_difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def layer(
    rank: int = 2, alpha: float = 3, dropout: float = 0.0, dtype: torch.dtype = torch.float32, bias: bool = True
) -> LoRALinear:
    """A lone adapted layer, 4 -> 3, on a frozen base, its B random."""
    base = nn.Linear(4, 3, bias=bias, dtype=dtype).requires_grad_(False)
    with torch.no_grad():
        for seed, parameter in enumerate(base.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed + 5))
    adapted = LoRALinear(base, rank, alpha, dropout, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(adapted.lora_B, generator=torch.Generator().manual_seed(1))
    return adapted


# --- injection --------------------------------------------------------------------------------------------------------


def test_targets_are_those_of_pefts_all_linear() -> None:
    names = inject_lora(ours := llama())
    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(target_modules="all-linear"))
    theirs = [n for n, m in wrapped.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert names == theirs
    assert names == [n for n, m in ours.named_modules() if isinstance(m, LoRALinear)]
    assert type(ours.lm_head) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit_of_the_output(dtype: torch.dtype) -> None:
    model = llama(dtype=dtype)
    before = logits(model)
    inject_lora(model)
    assert torch.equal(logits(model), before)


def test_base_parameters_keep_their_names_and_identity_and_are_frozen() -> None:
    model = llama()
    before = dict(model.named_parameters())
    names = inject_lora(model)
    after = dict(model.named_parameters())
    assert after.keys() - before.keys() == {f"{name}.lora_{letter}" for name in names for letter in "AB"}
    assert all(after[name] is parameter for name, parameter in before.items())
    assert {name for name, parameter in after.items() if parameter.requires_grad} == after.keys() - before.keys()
    assert [id(p) for p in lora_parameters(model)] == [id(after[f"{n}.lora_{x}"]) for n in names for x in "AB"]


def test_a_training_step_moves_the_adapters_and_nothing_else() -> None:
    model = llama()
    inject_lora(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # A has no gradient until B has left zero
        optimiser.zero_grad()
        model(TOKENS).logits.square().mean().backward()
        optimiser.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_a_is_drawn_as_peft_draws_it_and_b_is_zero() -> None:
    """Kaiming with a = sqrt(5) is uniform within 1 / sqrt(fan_in)."""
    model = nn.Sequential(nn.Linear(400, 9))
    inject_lora(model, rank=50)
    a, b = lora_parameters(model)
    bound = 1 / math.sqrt(400)
    assert 0.99 * bound < a.abs().max() <= bound
    assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not b.any()


def test_the_draw_follows_the_seed_and_leaves_the_global_generator_alone() -> None:
    models = [Toy() for _ in range(3)]
    state = torch.get_rng_state()
    for model, seed in zip(models, (3, 3, 4), strict=True):
        inject_lora(model, seed=seed)
    one, same, other = (torch.cat([p.flatten() for p in lora_parameters(model)]) for model in models)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    freeze_adapter(models[0])
    merge_adapters(models[0])
    remove_adapters(models[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (["layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        ({"model.layers.0.self_attn.o_proj"}, ["model.layers.0.self_attn.o_proj"]),
        (("1.mlp.up_proj", "0.self_attn.k_proj"), ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"]),
        ("v_proj", ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]),
    ],
)
def test_targets_are_names_or_endings_of_names(targets: Any, expected: list[str]) -> None:
    model = llama()
    assert inject_lora(model, targets=targets) == expected
    assert [n for n, m in model.named_modules() if isinstance(m, LoRALinear)] == expected
    wrapped = peft.get_peft_model(
        llama(), peft.LoraConfig(target_modules=[targets] if isinstance(targets, str) else targets)
    )
    assert wrapped.base_model.targeted_module_names == expected


def test_a_layer_in_two_places_gets_one_adapter() -> None:
    model = Toy()
    assert inject_lora(model) == ["first", "block.0"]
    assert model.shared is model.block[0]
    assert isinstance(model.shared, LoRALinear)
    merge_adapters(model)
    assert model.shared is model.block[0]
    assert type(model.shared) is nn.Linear


def test_a_qwen2_model_with_biases_is_adapted_like_any_other() -> None:
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()
    before = logits(model)
    inject_lora(model)
    randomise(model)
    changed = logits(model)
    assert largest_difference(changed, before) > 1e-3
    merge_adapters(model)
    assert largest_difference(logits(model), changed) < 1e-5


def test_bad_injections_are_refused_and_leave_the_model_alone() -> None:
    class Special(nn.Linear):
        pass

    cases: list[tuple[nn.Module, dict[str, Any], str]] = [
        (Toy(), {"targets": ["first", "frist"]}, "'frist' matches no linear layer"),
        (Toy(), {"targets": ["irst"]}, "'irst' matches no linear layer"),
        (Toy(), {"targets": ["norm"]}, "'norm' matches no linear layer"),
        (Toy(), {"targets": []}, "no linear layer to adapt"),
        (Toy(), {"targets": ["first", "lm_head"]}, "lm_head is the output head"),
        (nn.Sequential(nn.ReLU()), {}, "no linear layer to adapt"),
        (nn.Sequential(nn.Linear(2, 2), Special(2, 2)), {}, "1 is a Special"),
        (nn.Linear(2, 2), {}, "itself a linear layer"),
        *((Toy(), {"rank": rank}, "rank") for rank in (0, -1, 2.0, True)),
        *((Toy(), {"alpha": alpha}, "alpha") for alpha in (0, -1, math.nan, math.inf)),
        *((Toy(), {"dropout": dropout}, "dropout") for dropout in (-0.1, 1.0, math.nan)),
    ]
    for model, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            inject_lora(model, **arguments)
        assert not any(isinstance(module, LoRALinear) for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_injecting_twice_is_refused() -> None:
    inject_lora(model := Toy(), targets=["first"])
    with pytest.raises(ValueError, match="adapters already"):
        inject_lora(model, targets=["block.0"])


def test_a_model_without_adapters_has_no_reference() -> None:
    with pytest.raises(ValueError, match="no adapters"), disable_adapters(Toy()):
        pass
    with pytest.raises(ValueError, match="no adapters"):
        freeze_adapter(Toy())
    with pytest.raises(ValueError, match="no adapters"):
        save_adapter(Toy(), "/nonexistent")
    assert lora_parameters(Toy()) == []


# --- the layer --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    rank=st.integers(1, 9), frozen=st.integers(0, 5), alpha=st.floats(0.1, 64), inputs=st.integers(1, 8),
    outputs=st.integers(1, 8), leading=st.lists(st.integers(0, 3), max_size=3), bias=st.booleans(),
)  # fmt: skip
def test_forward_and_gradients_equal_those_of_the_explicit_weight(
    rank: int, frozen: int, alpha: float, inputs: int, outputs: int, leading: list[int], bias: bool
) -> None:
    base = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64).requires_grad_(False)
    adapted = LoRALinear(base, rank, alpha, generator=torch.Generator().manual_seed(0))
    adapted.frozen_A = normal(frozen, inputs, seed=1, dtype=torch.float64)
    adapted.frozen_B = normal(outputs, frozen, seed=2, dtype=torch.float64)
    nn.init.normal_(adapted.lora_B, generator=torch.Generator().manual_seed(3))
    x = normal(*leading, inputs, seed=4, dtype=torch.float64).requires_grad_()
    weight = base.weight + adapted.frozen_B @ adapted.frozen_A + alpha / rank * adapted.lora_B @ adapted.lora_A
    inputs_of_both = (x, adapted.lora_A, adapted.lora_B)
    results = []
    for out in (adapted(x), F.linear(x, weight, base.bias)):
        results.append((out.detach(), *torch.autograd.grad(out.sin().sum(), inputs_of_both)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("stacked", [False, True])
def test_the_layer_passes_gradcheck(stacked: bool) -> None:
    adapted = layer(dtype=torch.float64)
    if stacked:
        model = nn.Sequential(adapted)
        freeze_adapter(model, rank=3)
        nn.init.normal_(adapted.lora_B, generator=torch.Generator().manual_seed(1))

    def call(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(adapted, {"lora_A": a, "lora_B": b}, x)
        return out

    x = normal(2, 5, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(call, (x, adapted.lora_A, adapted.lora_B))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_float32_adapters_and_round_the_sum_once(dtype: torch.dtype) -> None:
    adapted = layer(dtype=dtype)
    model = nn.Sequential(adapted)
    freeze_adapter(model)
    nn.init.normal_(adapted.lora_B, generator=torch.Generator().manual_seed(1))
    assert {adapted.lora_A.dtype, adapted.lora_B.dtype, adapted.frozen_A.dtype, adapted.frozen_B.dtype} == {
        torch.float32
    }
    x = normal(50, 4, dtype=dtype).requires_grad_()
    out = adapted(x)
    a, b = adapted.stacked()
    exact = F.linear(x, adapted.weight, adapted.bias).float() + x.float() @ a.T @ b.T
    assert out.dtype == dtype
    # One rounding is at most half a step; the float32 sums may differ just enough to turn a tie.
    torch.testing.assert_close(out.float(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)
    out.float().sum().backward()
    assert adapted.lora_A.grad is not None
    assert adapted.lora_A.grad.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == dtype


def test_outputs_and_gradients_equal_pefts_in_bfloat16() -> None:
    """Same base, same factors: PEFT too computes the adapter in float32 and rounds the sum once."""
    ours, theirs = llama(dtype=torch.bfloat16), llama(dtype=torch.bfloat16)
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    inject_lora(ours, rank=4, alpha=6)
    randomise(ours, std=0.05)
    mirrored = [p for n, p in wrapped.named_parameters() if "lora_" in n]
    with torch.no_grad():
        for theirs_p, ours_p in zip(mirrored, lora_parameters(ours), strict=True):
            theirs_p.copy_(ours_p)
    outputs = [model(TOKENS).logits.float() for model in (ours, wrapped)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0.02, atol=0.02)
    for out in outputs:
        out.square().mean().backward()
    for theirs_p, ours_p in zip(mirrored, lora_parameters(ours), strict=True):
        assert ours_p.grad is not None
        scale = ours_p.grad.abs().max().item()
        torch.testing.assert_close(ours_p.grad, theirs_p.grad, rtol=0.05, atol=0.05 * scale)


def test_the_input_is_kept_for_backward_in_its_own_dtype_and_once() -> None:
    """Three layers reading one bfloat16 input keep that tensor, not three float32 copies of it."""
    layers = [layer(dtype=torch.bfloat16) for _ in range(3)]
    x = normal(1000, 4, dtype=torch.bfloat16).requires_grad_()
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for adapted in layers:
            adapted(x)
    large = [tensor for tensor in kept.values() if tensor.numel() >= x.numel()]
    assert [tensor.dtype for tensor in large] == [torch.bfloat16]


def test_autocast_leaves_the_adapter_in_float32() -> None:
    adapted = layer()
    x = normal(6, 4).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = adapted(x)
        base = F.linear(x, adapted.weight, adapted.bias)
    assert out.dtype == torch.bfloat16
    a, b = adapted.stacked()
    torch.testing.assert_close(out, (base + x @ a.T @ b.T).bfloat16(), rtol=0.01, atol=1e-6)
    out.float().sum().backward()
    assert adapted.lora_A.grad is not None
    torch.testing.assert_close(adapted.lora_A.grad, torch.outer(1.5 * adapted.lora_B.sum(0), x.detach().sum(0)))


def test_dropout_acts_on_the_trainable_adapter_in_training_mode_only() -> None:
    adapted = layer(rank=4, alpha=4, dropout=0.5, bias=False)
    model = nn.Sequential(adapted)
    x = torch.ones(4000, 4)
    with torch.no_grad():
        base, whole = F.linear(x, adapted.weight), adapted.eval()(x)
        with disable_adapters(model):
            assert torch.equal(adapted.train()(x), base)
        torch.manual_seed(0)
        noisy = adapted.train()(x)
        assert torch.equal(adapted.eval()(x), whole)
        assert len(noisy.unique(dim=0)) == 2**4  # every subset of the four inputs, each scaled by 2
        torch.testing.assert_close(noisy.mean(0), whole.mean(0), rtol=0.1, atol=0.1)
        freeze_adapter(model)
        adapted.train()
        torch.testing.assert_close(adapted(x), whole)  # the frozen stack sees no dropout, the fresh one is zero


def test_dropout_scales_a_half_precision_input_in_float32() -> None:
    """Kept inputs are divided by 1 - p = 0.9, which bfloat16 could only round: the sum would be rounded twice."""
    adapted = layer(dropout=0.1, dtype=torch.bfloat16, bias=False)
    nn.init.zeros_(adapted.weight)
    x = normal(200, 4, dtype=torch.bfloat16)
    torch.manual_seed(0)
    out = adapted.train()(x)
    torch.manual_seed(0)
    a, b = adapted.stacked()
    exact = F.dropout(x.float(), 0.1) @ a.T @ b.T
    torch.testing.assert_close(out.float(), exact, rtol=0.51 * torch.finfo(torch.bfloat16).eps, atol=1e-6)


def test_weights_do_not_depend_on_the_mode() -> None:
    inject_lora(model := llama())
    randomise(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = logits(model.train())
    assert torch.equal(logits(model.eval()), trained)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- the reference ----------------------------------------------------------------------------------------------------


def test_disabled_adapters_are_exactly_the_base() -> None:
    model = llama(dtype=torch.bfloat16)
    before = logits(model)
    inject_lora(model)
    randomise(model)
    assert largest_difference(logits(model), before) > 0.1
    with disable_adapters(model):
        assert torch.equal(logits(model), before)


def test_leaving_the_context_restores_the_state_before_it() -> None:
    inject_lora(model := llama())
    randomise(model)
    policy = logits(model)
    with disable_adapters(model):
        reference = logits(model)
        with disable_adapters(model):
            assert torch.equal(logits(model), reference)
        assert torch.equal(logits(model), reference)
    assert torch.equal(logits(model), policy)
    with pytest.raises(KeyError), disable_adapters(model):
        raise KeyError
    assert torch.equal(logits(model), policy)


def test_layers_that_were_off_before_stay_off() -> None:
    inject_lora(model := Toy())
    assert isinstance(model.first, LoRALinear)
    model.first.adapter_enabled = False
    with disable_adapters(model):
        pass
    states = [m.adapter_enabled for m in model.modules() if isinstance(m, LoRALinear)]
    assert states == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_freezing_the_reference_is_the_frozen_model_and_the_fresh_policy_equals_it(
    dtype: torch.dtype,
) -> None:
    model = llama(dtype=dtype)
    inject_lora(model, rank=3, alpha=5)
    for seed in range(3):
        randomise(model, seed, std=0.1)
        trained = logits(model)
        freeze_adapter(model, seed=seed)
        policy = logits(model)
        with disable_adapters(model):
            assert torch.equal(logits(model), policy)
        # The stack is one product of another shape, whose sums may round in another order.
        assert largest_difference(policy, trained) < (1e-4 if dtype == torch.float32 else 0.1)
        randomise(model, seed + 10)
        assert largest_difference(logits(model), policy) > 0.1
        with disable_adapters(model):
            assert torch.equal(logits(model), policy)


def test_freezing_starts_a_fresh_adapter_of_new_parameters() -> None:
    inject_lora(model := Toy(), rank=3, alpha=6, dropout=0.1)
    randomise(model)
    first = lora_parameters(model)
    freeze_adapter(model)
    second = lora_parameters(model)
    assert not {id(p) for p in first} & {id(p) for p in second}
    assert [p.shape for p in first] == [p.shape for p in second]
    assert not any(b.any() for b in second[1::2])
    assert isinstance(model.first, LoRALinear)
    assert (model.first.rank, model.first.alpha, model.first.dropout) == (3, 6, 0.1)
    freeze_adapter(model, rank=2, alpha=1, dropout=0.0)
    assert (model.first.rank, model.first.alpha, model.first.dropout) == (2, 1, 0.0)
    assert model.first.frozen_A.shape == (6, 5)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.lora_{letter}" for name in ("first", "block.0") for letter in "AB"
    }


def test_a_fresh_adapter_is_drawn_anew_by_seed_and_height_of_the_stack() -> None:
    def a_after(freezes: int, seed: int) -> Tensor:
        inject_lora(model := Toy(), rank=2, seed=seed)
        for _ in range(freezes):
            freeze_adapter(model, seed=seed)
        return lora_parameters(model)[0].detach()

    draws = [a_after(freezes, seed) for freezes in range(3) for seed in range(2)]
    assert len({tuple(a.flatten().tolist()) for a in draws}) == len(draws)
    assert torch.equal(a_after(2, 1), draws[-1])


def test_a_refused_freeze_changes_nothing() -> None:
    inject_lora(model := llama())
    randomise(model)
    before = logits(model)
    for bad in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            freeze_adapter(model, **bad)  # type: ignore[arg-type]
        assert torch.equal(logits(model), before)
        assert all(not m.frozen_A.numel() for m in model.modules() if isinstance(m, LoRALinear))


def test_gradients_do_not_reach_the_frozen_stack() -> None:
    inject_lora(model := Toy())
    randomise(model)
    freeze_adapter(model)
    model(normal(2, 5)).sum().backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None}
    assert grads == {f"{name}.lora_{letter}" for name in ("first", "block.0") for letter in "AB"}
    assert not any(b.requires_grad for b in model.buffers())


# --- merging and removing ---------------------------------------------------------------------------------------------


def test_merging_keeps_the_outputs_and_leaves_plain_layers() -> None:
    model = llama()
    names = [name for name, _ in model.named_parameters()]
    before = logits(model)
    inject_lora(model, rank=3, alpha=5)
    randomise(model, 0)
    freeze_adapter(model)
    randomise(model, 1)
    stacked = logits(model)
    assert largest_difference(stacked, before) > 0.1
    with disable_adapters(model):  # merging folds what there is, on or off
        assert merge_adapters(model) == 0.0
    assert largest_difference(logits(model), stacked) < 1e-5
    assert not any(isinstance(module, LoRALinear) or module.training for module in model.modules())
    assert [name for name, _ in model.named_parameters()] == names
    merged = logits(model)
    assert merge_adapters(model) == 0.0
    assert torch.equal(logits(model), merged)


def test_merging_into_bfloat16_reports_the_loss_of_its_rounding() -> None:
    """Next to 1.0 bfloat16 has steps of 1/128: an update of 2^-12 vanishes, one of 1/8 fits, 1.5 steps lose a third."""
    for update, lost in ((2.0**-12, 1.0), (2.0**-3, 0.0), (1.5 * 2.0**-7, 1 / 3)):
        model = nn.Sequential(nn.Linear(1, 1, bias=False, dtype=torch.bfloat16))
        nn.init.ones_(model[0].weight)  # type: ignore[arg-type]
        inject_lora(model, rank=1, alpha=1)
        a, b = lora_parameters(model)
        nn.init.constant_(a, update)
        nn.init.ones_(b)
        assert merge_adapters(model) == pytest.approx(lost)
        assert model[0].weight.dtype == torch.bfloat16


def test_merging_a_fresh_adapter_changes_nothing() -> None:
    model = Toy(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    inject_lora(model)
    assert merge_adapters(model) == 0.0
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_merged_tied_weight_does_not_reach_the_other_module() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "out": nn.Linear(4, 6, bias=False)})
    model["out"].weight = model["embedding"].weight  # type: ignore[assignment]
    before = model["embedding"].weight.detach().clone()  # type: ignore[operator,union-attr]
    inject_lora(model)
    randomise(model)
    merge_adapters(model)
    assert torch.equal(model["embedding"].weight, before)  # type: ignore[arg-type]
    assert not torch.equal(model["out"].weight, before)  # type: ignore[arg-type]


def test_removing_gives_the_bare_base_back() -> None:
    model = llama()
    before, parameters = logits(model), dict(model.named_parameters())
    inject_lora(model)
    randomise(model)
    freeze_adapter(model)
    randomise(model, 1)
    remove_adapters(model)
    assert torch.equal(logits(model), before)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    remove_adapters(model)
    assert torch.equal(logits(model), before)
    inject_lora(model)


# --- files ------------------------------------------------------------------------------------------------------------


def peft_saved(folder: Path, model: nn.Module | None = None, **config: Any) -> Tensor:
    """Has PEFT write an adapter with random factors for ``llama()``; returns PEFT's logits."""
    config = {"target_modules": "all-linear", "r": 8, "lora_alpha": 16} | config
    wrapped = peft.get_peft_model(model or llama(), peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    wrapped.save_pretrained(folder)
    return logits(wrapped)


def rewrite_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("freezes", [0, 1, 2])
@pytest.mark.parametrize(("rank", "alpha"), [(8, 16), (3, 5)])
def test_peft_loads_what_we_save_and_gives_the_same_logits(
    tmp_path: Path, rank: int, alpha: float, freezes: int
) -> None:
    inject_lora(model := llama(), rank=rank, alpha=alpha)
    randomise(model)
    for seed in range(1, freezes + 1):
        freeze_adapter(model)
        randomise(model, seed)
    save_adapter(model, tmp_path / "new" / "folder", base_model="somebody/llama")
    wrapped = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "new" / "folder"))
    assert wrapped.peft_config["default"].r == rank * (freezes + 1)
    assert wrapped.peft_config["default"].base_model_name_or_path == "somebody/llama"
    assert largest_difference(logits(wrapped), logits(model)) < 1e-5
    with wrapped.disable_adapter():
        assert largest_difference(logits(wrapped), logits(model)) > 0.1


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"r": 3, "lora_alpha": 5},
        {"r": 5, "lora_alpha": 4, "use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": r"model\.layers\.1\..*(k|up)_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": ["v_proj"]},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
    ],
)
def test_we_load_what_peft_saves_and_give_the_same_logits(tmp_path: Path, config: dict[str, Any]) -> None:
    expected = peft_saved(tmp_path, **config)
    model = llama()
    names = load_adapter(model, tmp_path)
    assert names == [n for n, m in model.named_modules() if isinstance(m, LoRALinear)]
    assert len(names) == len(load_file(tmp_path / "adapter_model.safetensors")) // 2
    assert largest_difference(logits(model), expected) < 1e-5
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())
    assert model.get_submodule(names[0]).dropout == config.get("lora_dropout", 0.0)


def test_a_configuration_that_still_says_all_linear_is_understood(tmp_path: Path) -> None:
    expected = peft_saved(tmp_path)
    rewrite_config(tmp_path, target_modules="all-linear")
    model = llama()
    load_adapter(model, tmp_path)
    assert largest_difference(logits(model), expected) < 1e-5


def test_peft_reads_back_what_we_read_from_peft(tmp_path: Path) -> None:
    expected = peft_saved(tmp_path / "theirs", r=5, lora_alpha=4, use_rslora=True)
    model = llama()
    load_adapter(model, tmp_path / "theirs")
    save_adapter(model, tmp_path / "ours")
    wrapped = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "ours"))
    assert largest_difference(logits(wrapped), expected) < 1e-5


@pytest.mark.parametrize("alpha", [16, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_from_a_saved_stack_computes_the_same_bits(tmp_path: Path, alpha: float, dtype: torch.dtype) -> None:
    """In memory M0 -> M1 -> freeze, or M1 saved, loaded into a bare base and frozen: one and the same reference."""
    inject_lora(model := llama(dtype=dtype), rank=3, alpha=alpha)
    randomise(model, 0)
    freeze_adapter(model)
    randomise(model, 1)
    save_adapter(model, tmp_path)
    trained = logits(model)
    load_adapter(resumed := llama(dtype=dtype), tmp_path)
    assert largest_difference(logits(resumed), trained) < (1e-5 if dtype == torch.float32 else 0.1)
    freeze_adapter(model)
    freeze_adapter(resumed, rank=3, alpha=alpha)
    assert torch.equal(logits(resumed), logits(model))
    for ours, other in zip(lora_parameters(model), lora_parameters(resumed), strict=True):
        assert torch.equal(ours, other)


def test_a_lone_adapter_round_trips_unchanged(tmp_path: Path) -> None:
    inject_lora(model := Toy(), rank=3, alpha=5, dropout=0.25)
    randomise(model)
    save_adapter(model, tmp_path)
    load_adapter(loaded := Toy(), tmp_path)
    for ours, other in zip(lora_parameters(model), lora_parameters(loaded), strict=True):
        assert torch.equal(ours, other)
    assert isinstance(loaded.first, LoRALinear)
    assert (loaded.first.rank, loaded.first.alpha, loaded.first.dropout) == (3, 5, 0.25)


def test_names_that_end_in_other_names_round_trip(tmp_path: Path) -> None:
    """``0`` is also the ending of ``1.0``, which is not adapted."""

    def nested() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))

    model = nested()
    adapted = model[0] = LoRALinear(model[0], 2, 2, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type,index,operator]
    save_adapter(model, tmp_path)
    loaded = nested()
    assert load_adapter(loaded, tmp_path) == ["0"]
    assert torch.equal(lora_parameters(loaded)[0], adapted.lora_A)


def test_the_files_are_what_peft_writes(tmp_path: Path) -> None:
    peft_saved(tmp_path / "theirs", task_type="CAUSAL_LM")
    inject_lora(model := llama())
    save_adapter(model, tmp_path / "ours")
    tensors = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert {k: (v.shape, v.dtype) for k, v in tensors[0].items()} == {
        k: (v.shape, v.dtype) for k, v in tensors[1].items()
    }
    ours, theirs = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    assert ours.keys() <= theirs.keys()
    assert sorted(ours.pop("target_modules")) == sorted(theirs.pop("target_modules"))
    assert {key: theirs[key] for key in ours} == ours
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_failed_save_leaves_the_old_adapter_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inject_lora(model := llama())
    randomise(model)
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    randomise(model, 1)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: cannot be written \(no space"):
        save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_layers_with_different_settings_cannot_share_a_file(tmp_path: Path) -> None:
    inject_lora(model := Toy())
    assert isinstance(model.first, LoRALinear)
    model.first.alpha = 1
    with pytest.raises(ValueError, match="layers differ"):
        save_adapter(model, tmp_path)


def test_loading_into_a_model_with_adapters_is_refused(tmp_path: Path) -> None:
    peft_saved(tmp_path)
    inject_lora(model := llama())
    with pytest.raises(ValueError, match="adapters already"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"some_future_variant": {"on": 1}}, "some_future_variant"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": None}, "'r' is missing"),
        ({"lora_alpha": 0}, "'lora_alpha' should be a number from"),
        ({"lora_alpha": "16"}, "'lora_alpha' should be a number from"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    peft_saved(tmp_path)
    rewrite_config(tmp_path, **changes)
    model = llama()
    before = logits(model)
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model, tmp_path)
    assert "adapter_config.json" in str(error.value)
    assert torch.equal(logits(model), before)
    assert not lora_parameters(model)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "q_proj.lora_B.weight is missing"),
        (lambda t: t.pop(f"{Q}.lora_A.weight"), "q_proj.lora_A.weight is missing"),
        (lambda t: (t.pop(f"{Q}.lora_A.weight"), t.pop(f"{Q}.lora_B.weight")), "q_proj.lora_A.weight is missing"),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(16)}), "lora_magnitude_vector belongs to no"),
        (lambda t: t.update({f"{Q}.lora_A.default.weight": torch.ones(8, 16)}), "lora_A.default.weight belongs to no"),
        (lambda t: t.update({f"{Q}x.lora_A.weight": torch.ones(8, 16)}), "q_projx.lora_A.weight belongs to no"),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(8, 31)}),
            "embed_tokens.lora_embedding_A belongs to no",
        ),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(7, 16)}), r"shape \(7, 16\), not \(8, 16\)"),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(8, 16)}), r"shape \(8, 16\), not \(16, 8\)"),
        (
            lambda t: t.update(
                {
                    "base_model.model.lm_head.lora_A.weight": torch.ones(8, 16),
                    "base_model.model.lm_head.lora_B.weight": torch.ones(31, 8),
                }
            ),
            "lm_head is the output head",
        ),
    ],
)
def test_every_tensor_of_the_file_is_accounted_for(tmp_path: Path, change: Any, message: str) -> None:
    peft_saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    model = llama()
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)
    assert not lora_parameters(model)


def test_embeddings_that_a_file_holds_too_must_be_those_of_the_model(tmp_path: Path) -> None:
    """PEFT writes them where it thinks that the vocabulary has grown."""
    expected = peft_saved(tmp_path)
    path, name = tmp_path / "adapter_model.safetensors", "base_model.model.model.embed_tokens.weight"
    own = llama().get_parameter("model.embed_tokens.weight").detach().clone()
    save_file(load_file(path) | {name: own}, path)
    model = llama()
    load_adapter(model, tmp_path)
    assert largest_difference(logits(model), expected) < 1e-5
    save_file(load_file(path) | {name: own + 1}, path)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight differs from the model's: it was trained too"):
        load_adapter(llama(), tmp_path)


def test_a_hub_id_works_as_a_folder_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = peft_saved(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda source, revision, allow_patterns: str(tmp_path))
    model = llama()
    load_adapter(model, "somebody/some-adapter")
    assert largest_difference(logits(model), expected) < 1e-5


def test_a_pickled_adapter_is_named_with_the_way_to_convert_it(tmp_path: Path) -> None:
    peft_saved(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle, which is not read; .*save_pretrained"):
        load_adapter(llama(), tmp_path)


def test_auto_peft_loads_an_adapter_and_its_base(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    inject_lora(model := llama())
    randomise(model)
    save_adapter(model, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    wrapped = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    assert largest_difference(logits(wrapped), logits(model)) < 1e-5


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter_config\.json: there is no such file"):
        load_adapter(llama(), tmp_path)
    peft_saved(tmp_path)
    weights = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: is cut in the tensor base_model"):
        load_adapter(llama(), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: there is no such file"):
        load_adapter(llama(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json: the JSON ends too early"):
        load_adapter(llama(), tmp_path)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    inject_lora(model := Toy())
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="belongs to no linear layer"):
        load_adapter(llama(), tmp_path)
