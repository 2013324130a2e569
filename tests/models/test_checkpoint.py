"""Parity of models and loading with transformers, on checkpoints that transformers wrote, and on a real one."""

from __future__ import annotations

import fnmatch
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from selfevo.files import FileError
from selfevo.models import CheckpointError, load_model, save_pretrained
from selfevo.models.hf_config import ConfigError

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN_ROPE = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
CASES: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "llama_tied": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama_rope": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}),
    "llama_linear": (
        transformers.LlamaConfig, transformers.LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
    ),
    "llama_dynamic": (
        transformers.LlamaConfig, transformers.LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 3.0}},
    ),
    "qwen2_yarn": (
        transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {"rope_parameters": YARN_ROPE},
    ),
    "llama_yarn_scales": (
        transformers.LlamaConfig, transformers.LlamaForCausalLM,
        {"rope_parameters": YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 20.0, "truncate": False}},
    ),
    "llama_yarn_attention": (
        transformers.LlamaConfig, transformers.LlamaForCausalLM,
        {"rope_parameters": YARN_ROPE | {"attention_factor": 0.8}},
    ),
    "llama_head_dim": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"head_dim": 16}),
    "llama_biases": (
        transformers.LlamaConfig, transformers.LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True},
    ),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen2_tied": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen2_window_unused": (
        transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {"sliding_window": 5, "use_sliding_window": False},
    ),
    "qwen2_window": (
        transformers.Qwen2Config, transformers.Qwen2ForCausalLM,
        {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": None}),
    "mistral_window": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": 7}),
    "mistral_head_dim": (
        transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": None, "head_dim": 12},
    ),
}  # fmt: skip


def make_peer(case: str) -> Any:
    """A random transformers model whose weights and biases are large enough to matter."""
    config_class, model_class, changes = CASES[case]
    torch.manual_seed(0)
    peer = model_class(config_class(**(SIZES | changes)))
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, mean=0.02, std=0.2)
    return peer.eval()


def tokens(length: int = 40, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    make_peer("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("shard_size", ["5GB", "30KB"])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, shard_size: str, tmp_path: Path) -> None:
    peer = make_peer(case)
    peer.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shard_size == "30KB")
    model = load_model(tmp_path)
    with torch.no_grad():
        difference = (model(tokens()) - peer(tokens()).logits).abs().max()
    assert difference < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_what_we_save_transformers_loads_with_equal_logits(case: str, tmp_path: Path) -> None:
    peer = make_peer(case)
    peer.save_pretrained(tmp_path / "theirs")
    save_pretrained(load_model(tmp_path / "theirs"), None, tmp_path / "ours")
    again, report = CASES[case][1].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(tokens()).logits, peer(tokens()).logits, rtol=0, atol=1e-6)
        torch.testing.assert_close(load_model(tmp_path / "ours")(tokens()), load_model(tmp_path / "theirs")(tokens()))


def test_the_window_case_tells_a_window_from_none(tmp_path: Path) -> None:
    make_peer("mistral_window").save_pretrained(tmp_path)
    windowed = load_model(tmp_path)
    edit_config(tmp_path, sliding_window=None)
    with torch.no_grad():
        assert (windowed(tokens()) - load_model(tmp_path)(tokens())).abs().max() > 1e-2


def test_older_spelling_of_rope_settings_gives_the_same_model(tmp_path: Path) -> None:
    make_peer("llama_rope").save_pretrained(tmp_path)
    expected = load_model(tmp_path)(tokens())
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key not in ("rope_theta", "rope_type")}
    edit_config(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling=scaling | {"type": "llama3"})
    torch.testing.assert_close(load_model(tmp_path)(tokens()), expected, rtol=0, atol=0)


def test_the_real_checkpoint_gives_the_reference_logits_and_greedy_path(shared: Path) -> None:
    reference = json.loads((shared / "reference" / "story_greedy.json").read_text())
    model = load_model(shared / "models" / "story")
    ids = reference["prompt_ids"] + reference["greedy_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0]
    stored = torch.from_numpy(np.load(shared / "reference" / "story_logits.npy"))
    assert (logits[: len(stored)] - stored).abs().max() < 1e-4
    start = len(reference["prompt_ids"])
    assert logits[start - 1 : -1].argmax(-1).tolist() == reference["greedy_ids"]


def test_bfloat16_is_loaded_on_request_and_stays_near_float32(checkpoint: Path) -> None:
    narrow, wide = load_model(checkpoint, dtype=torch.bfloat16), load_model(checkpoint)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        reference = wide(tokens())
        assert (narrow(tokens()).float() - reference).norm() < 0.05 * reference.norm()


def test_explicit_positions_and_mask_reproduce_the_plain_causal_pass(checkpoint: Path) -> None:
    model, ids = load_model(checkpoint), tokens()
    length = ids.shape[1]
    positions = torch.arange(length).expand_as(ids)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    with torch.no_grad():
        expected = model(ids)
        torch.testing.assert_close(model(ids, positions, causal), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(ids, positions, causal.expand(2, -1, -1)), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(ids, positions + 9), expected, rtol=1e-4, atol=1e-4)  # rotary is relative


def test_activation_checkpointing_changes_no_gradient(checkpoint: Path) -> None:
    gradients = []
    for switched_on in (False, True):
        model = load_model(checkpoint)
        model.checkpoint_activations = switched_on
        model(tokens()).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)


# Every tensor is accounted for


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"missing.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(checkpoint)


def test_an_extra_tensor_is_named(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_norm\.weight has no place"):
        load_model(checkpoint)


def test_a_misshaped_tensor_is_named_with_both_shapes(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \(3,\).*\(48,\)"):
        load_model(checkpoint)


def test_a_quantised_tensor_is_refused_by_name(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is stored as torch\.int8"):
        load_model(checkpoint)


def test_shards_and_index_must_agree(tmp_path: Path) -> None:
    make_peer("llama").save_pretrained(tmp_path, max_shard_size="30KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is not in the index"):
        load_model(tmp_path)
    (tmp_path / shard).unlink()
    with pytest.raises(CheckpointError, match="is not there"):
        load_model(tmp_path)


@pytest.mark.parametrize("stored", ["embedding", "head", "both"])
def test_a_tied_head_may_be_stored_under_either_name(stored: str, tmp_path: Path) -> None:
    make_peer("llama_tied").save_pretrained(tmp_path)
    expected = load_model(tmp_path)(tokens())

    def change(tensors: dict[str, torch.Tensor]) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        if stored != "embedding":
            tensors["lm_head.weight"] = embedding.clone()
        if stored == "head":
            del tensors["model.embed_tokens.weight"]

    rewrite(tmp_path, change)
    model = load_model(tmp_path)
    torch.testing.assert_close(model(tokens()), expected, rtol=0, atol=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_flagged_tied_that_differs_is_loaded_as_stored_with_a_warning(tmp_path: Path) -> None:
    peer = make_peer("llama")
    peer.save_pretrained(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match=r"tie_word_embeddings is true, but lm_head\.weight differs"):
        model = load_model(tmp_path)
    torch.testing.assert_close(model(tokens()), peer(tokens()).logits, rtol=1e-4, atol=1e-4)
    assert not model.config.tied


HARMLESS: list[dict[str, Any]] = [
    {"is_llama_config": True},
    {"rope_interleaved": False},
    {"transformers.js_config": {"dtype": "q4"}},
    {"unsloth_fixed": True, "unsloth_version": "2024.9"},
    {"mask_token_id": 5, "pad_token_id": 7, "some_other_token_id": [1, 2]},
    {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "max_length": 4096},
    {"layer_types": ["full_attention"] * 3},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 1.0}},
    {"rope_scaling": {"type": "linear", "factor": 1.0}},
    {"_attn_implementation_autoset": True, "attn_implementation": "flash_attention_2"},
    {"auto_map": {"AutoModelForCausalLM": "modeling.X"}, "tokenizer_class": "LlamaTokenizer"},
    {"logits_scaling": 1.0, "residual_multiplier": 1.0},
]


@pytest.mark.parametrize("changes", HARMLESS, ids=lambda changes: next(iter(changes)))
def test_fields_without_effect_do_not_stop_a_published_checkpoint(checkpoint: Path, changes: dict[str, Any]) -> None:
    expected = load_model(checkpoint)(tokens())
    if "rope_scaling" in changes:
        edit_config(checkpoint, rope_parameters=None, rope_theta=1e4)
    edit_config(checkpoint, **changes)
    torch.testing.assert_close(load_model(checkpoint)(tokens()), expected, rtol=0, atol=0)


def test_a_user_can_vouch_for_a_field(checkpoint: Path) -> None:
    expected = load_model(checkpoint)(tokens())
    edit_config(checkpoint, house_style="warm")
    with pytest.raises(ConfigError, match=r"'house_style' .* allow_unknown=\('house_style',\)"):
        load_model(checkpoint)
    model = load_model(checkpoint, allow_unknown=("house_style",))
    torch.testing.assert_close(model(tokens()), expected, rtol=0, atol=0)


def test_all_weights_have_one_dtype(checkpoint: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "norm" not in name:
                tensors[name] = tensors[name].bfloat16()

    rewrite(checkpoint, change)
    assert len({p.dtype for p in load_model(checkpoint).parameters()}) == 1


def test_weights_that_are_not_finite_are_refused_by_name(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors["model.norm.weight"].__setitem__(3, float("nan")))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN"):
        load_model(checkpoint)


def test_saving_leaves_no_weights_of_another_model(tmp_path: Path) -> None:
    make_peer("llama").save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = load_model(tmp_path)
    save_pretrained(model, None, tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    torch.testing.assert_close(load_model(tmp_path)(tokens()), model(tokens()), rtol=0, atol=0)


# A feature that is not implemented is refused by name


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}}, "longrope"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"sliding_window": 16}, "sliding_window"),
        ({"logits_scaling": 2.0}, "logits_scaling"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary",
        ),
        ({"model_type": "gpt_neox"}, "gpt_neox"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"num_key_value_heads": 4}, "num_kv_heads"),
    ],
)
def test_a_config_that_we_do_not_implement_is_refused_by_name(
    checkpoint: Path, changes: dict[str, Any], named: str
) -> None:
    edit_config(checkpoint, **changes)
    with pytest.raises(ConfigError, match=named):
        load_model(checkpoint)


def test_a_missing_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FileError, match=r"config\.json: there is no such file"):
        load_model(tmp_path)


def test_only_the_weights_that_are_needed_are_fetched(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral's repository holds its weights twice, the second time as consolidated.safetensors."""
    asked: list[list[str]] = []

    def fetch(source: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    load_model("somebody/some-model")
    files = ["config.json", "model.safetensors", "model-00001-of-00003.safetensors", "model.safetensors.index.json"]
    others = ["consolidated.safetensors", "pytorch_model.bin", "original/consolidated.00.pth", "README.md"]
    wanted = [file for file in files + others if any(fnmatch.fnmatch(file, pattern) for pattern in asked[0])]
    assert wanted == files


def test_a_hub_id_that_cannot_be_fetched_gives_the_hubs_own_words() -> None:
    with pytest.raises(FileError, match=r"somebody/some-model: no such folder here, and the hub says: .+"):
        load_model("somebody/some-model")


# Memory

PEAK = """
import sys, torch
from selfevo.models import load_model
def status(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) * 1024
load_model(sys.argv[3], dtype=getattr(torch, sys.argv[2]))  # code that is imported on first use is not the question
before = status("VmHWM")
model = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
sizes = [p.numel() * p.element_size() for p in model.parameters()]
print(status("VmHWM") - before, sum(sizes), max(p.numel() for p in model.parameters()) * 4)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_while_loading_is_the_weights_and_one_tensor(dtype: str, tmp_path: Path, checkpoint: Path) -> None:
    sizes = SIZES | {"vocab_size": 4000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / "large")
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "large"), dtype, str(checkpoint)],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, weights, largest = map(int, result.stdout.split())
    assert grown < weights + largest + 8 * 2**20
