"""On a GPU: losses, gradients and replies against the CPU's, CUDA graphs against single steps, and what ``--memory``
says against what is allocated. None of it has run yet on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_model
from meta_device import two_layers

from selfevo.generate import generate
from selfevo.generate.decoder import row_cache
from selfevo.lora import freeze_adapter, inject_lora, lora_parameters
from selfevo.models import Transformer
from selfevo.training import DPOObjective, PairIds, estimate_memory, reference_logps

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"family": "mistral", "windows": (12, 12)},
    "qwen2": {"family": "qwen2", "qkv_bias": True, "tied": True},
}
SHARED = list(range(1, 41))  # a context that all prompts begin with
PAIRS = [PairIds(SHARED[: 9 + 7 * n], [n + 3, 5, 8, 1], [n, 2, 60]) for n in range(4)]


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """Float32 products in float32, not in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def adapted(family: str, device: str, dtype: torch.dtype = torch.float32) -> Transformer:
    """With a frozen adapter and one in training, neither of which is zero."""
    model = tiny_model(**FAMILIES[family]).to(dtype)
    for seed in range(2):
        if seed:
            freeze_adapter(model, seed=seed)
        else:
            inject_lora(model, rank=2, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for factor in lora_parameters(model):
            factor.data += 0.1 * torch.randn(factor.shape, generator=generator)
    return model.to(device)


def step(model: Transformer) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss of all pairs and the gradients of the adapters, on the CPU."""
    reference = reference_logps(model, PAIRS, 64)
    loss, _ = DPOObjective(PAIRS, reference, list("aabb")).loss(model, range(len(PAIRS)))
    gradients = torch.autograd.grad(loss, lora_parameters(model))
    return loss.detach().cpu(), [gradient.cpu() for gradient in gradients]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_has_the_loss_and_the_gradients_of_the_cpu(family: str) -> None:
    (expected, gradients), (loss, found) = step(adapted(family, "cpu")), step(adapted(family, DEVICE))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_as_near_to_float32_as_on_the_cpu(family: str) -> None:
    exact, _ = step(adapted(family, "cpu"))
    errors = [
        abs(float(step(adapted(family, device, torch.bfloat16))[0] - exact)) / float(exact)
        for device in ("cpu", DEVICE)
    ]
    assert errors[1] <= 2 * errors[0] + 0.02


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"top_p": 0.9, "repetition_penalty": 1.2}])
@pytest.mark.parametrize("family", FAMILIES)
def test_replies_are_those_of_the_cpu(family: str, sampling: dict[str, float]) -> None:
    """A draw depends on its seed and key alone, on every device."""
    prompts = [pair.prompt for pair in PAIRS]
    settings: dict[str, Any] = {"max_new_tokens": 12, "batch_size": 3, "seed": 5, **sampling}
    expected, found = (generate(adapted(family, device), prompts, **settings) for device in ("cpu", DEVICE))
    assert found == expected
    assert generate(adapted(family, DEVICE), prompts, cuda_graphs=True, **settings) == expected


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("shape", ["Llama-3-8B", "Qwen2-7B"])
def test_memory_is_within_a_tenth_of_what_is_said(shape: str, checkpointed: bool) -> None:
    config = two_layers(shape)
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
    model.to_empty(device=DEVICE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    inject_lora(model)
    freeze_adapter(model)
    model.checkpoint_activations = checkpointed
    pairs = [PairIds(list(range(n, 1000 + n)), list(range(500)), list(range(9, 400))) for n in range(2)]
    objective = DPOObjective(pairs, torch.zeros(2, 2), ["a", "a"])
    tokens: list[int] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, given: tokens.append(given[0].numel()))
    optimiser = torch.optim.AdamW(lora_parameters(model))
    for number in range(2):  # the second has the optimiser's moments from the beginning
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        objective.loss(model, range(2))[0].backward()
        if number == 0:
            optimiser.step()
            optimiser.zero_grad()
    said = estimate_memory(config, iterations=1, row_tokens=tokens[0], checkpointed=checkpointed)
    assert torch.cuda.max_memory_allocated() == pytest.approx(said.training, rel=0.1)
    del optimiser, objective
    before = torch.cuda.memory_allocated()
    cache = row_cache(model, 24, 900, 100)
    said = estimate_memory(config, iterations=1, slots=24, context=1000)
    assert torch.cuda.memory_allocated() - before == pytest.approx(said.cache, rel=0.1)
    del cache
