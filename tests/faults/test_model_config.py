"""config.json of a checkpoint: every value is typed, finite and in range before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import faulty
import pytest
import torch
from conftest import tiny_config, tiny_model

from selfevo.models import ModelConfig, Transformer, load_model, save_pretrained
from selfevo.models.checkpoint import FAMILIES, read_config
from selfevo.models.rope import rope_tables

KIND = "config.json"
LARGE = 10**9
# The fields, and those of faulty.WRONG_VALUES that are right or mean none, with the setting that follows. All others
# are refused, and the field is named.
FIELDS: dict[str, dict[str, tuple[str, Any]]] = {
    "vocab_size": {}, "hidden_size": {}, "intermediate_size": {}, "num_hidden_layers": {}, "num_attention_heads": {},
    "model_type": {},
    "num_key_value_heads": {"null": ("num_kv_heads", 4)},
    "head_dim": {"null": ("head_dim", 8)},
    "max_position_embeddings": {"null": ("max_positions", 2048), "large": ("max_positions", LARGE)},
    "rms_norm_eps": {"null": ("norm_eps", 1e-6)},
    "rope_theta": {"null": ("rope_theta", 1e4), "large": ("rope_theta", 1e9)},
    "tie_word_embeddings": {"null": ("tied", False), "true": ("tied", True), "false": ("tied", False)},
    "hidden_act": {"null": ("family", "llama")},
    "architectures": {"null": ("family", "llama"), "list": ("family", "llama")},
    "layer_types": {"null": ("windows", (None, None))},
    "rope_scaling": {"null": ("rope_scaling", None), "object": ("rope_scaling", None)},
    "rope_parameters": {"null": ("rope_scaling", None), "object": ("rope_scaling", None)},
    "original_max_position_embeddings": {"null": ("rope_scaling", None), "large": ("rope_scaling", None)},
    "attention_bias": {"null": ("qkv_bias", False), "true": ("output_bias", True), "false": ("output_bias", False)},
    "mlp_bias": {"null": ("mlp_bias", False), "true": ("mlp_bias", True), "false": ("mlp_bias", False)},
    "a_feature_of_tomorrow": dict.fromkeys(("null", "false", "zero", "list", "object"), ("family", "llama")),
}  # fmt: skip
NONE, WIDE = ("windows", (None, None)), ("windows", (LARGE, LARGE))
WINDOWS = {
    ("mistral", "sliding_window"): {"null": NONE, "zero": NONE, "large": WIDE},
    ("mistral", "layer_types"): {"null": ("windows", (7, 7))},
    ("qwen2", "use_sliding_window"): {"null": NONE, "false": NONE, "true": ("windows", (7, 7))},
    ("qwen2", "sliding_window"): {"null": NONE, "zero": NONE, "large": WIDE},
    ("qwen2", "max_window_layers"): {"null": NONE, "zero": ("windows", (7, 7)), "large": NONE},
    ("qwen2", "layer_types"): {"null": ("windows", (7, 7))},
}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    },
    "yarn": {
        "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.1, "beta_fast": 32.0,
        "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": True,
    },
}  # fmt: skip
# The values that are right; where null is, the key has a default.
RIGHT = {
    "original_max_position_embeddings": {"null", "large"}, "low_freq_factor": {"half"},
    "attention_factor": {"null", "half"}, "beta_fast": {"null"}, "beta_slow": {"null", "half"},
    "mscale": {"null", "zero", "half", "tiny"}, "mscale_all_dim": {"null", "zero", "half", "tiny"},
    "truncate": {"null", "true", "false"},
}  # fmt: skip
RELATIONS: dict[str, tuple[dict[str, str | None], tuple[str, ...]]] = {
    "heads that do not divide": ({"num_attention_heads": "5", "head_dim": None}, ("hidden_size 32", "heads 5")),
    "keys that do not divide": ({"num_key_value_heads": "3"}, ("num_heads (4)", "num_kv_heads (3)")),
    "more keys than heads": ({"num_key_value_heads": "8"}, ("num_kv_heads (8)",)),
    "odd head": ({"head_dim": "7"}, ("head_dim", "7")),
    "odd head that follows": ({"hidden_size": "28", "head_dim": None}, ("head_dim", "7")),
    "more than can be": ({"num_attention_heads": "65536", "head_dim": "65536"}, ("65536 heads",)),
    "no size": ({"hidden_size": None}, ("hidden_size", "missing")),
    "no family": ({"model_type": None}, ("model_type", "missing")),
    "another family": ({"model_type": '"mamba"'}, ("mamba", "llama, mistral, qwen2")),
    "no language model": ({"architectures": '["LlamaForSequenceClassification"]'}, ("LlamaForSequenceClassification",)),
    "too few kinds": ({"layer_types": '["full_attention"]'}, ("layer_types", "2 times")),
    "too many kinds": ({"layer_types": json.dumps(["full_attention"] * 3)}, ("layer_types", "2 times")),
    "unknown kind": ({"layer_types": '["full_attention", "linear_attention"]'}, ("layer_types", "linear_attention")),
    "windows of a llama": ({"layer_types": json.dumps(["sliding_attention"] * 2)}, ("layer_types", "llama")),
    "a million layers": ({"num_hidden_layers": "1000000"}, ("num_hidden_layers", "4096")),
    "part of a head": ({"rope_parameters": '{"partial_rotary_factor": 0.5}'}, ("partial_rotary_factor", "0.5")),
    "unknown scaling": ({"rope_scaling": '{"type": "longrope", "factor": 2}'}, ("rotary settings", "longrope")),
    "no factor": ({"rope_scaling": '{"type": "linear"}'}, ("rotary settings", "factor", "missing")),
    "unknown setting": ({"rope_scaling": '{"type": "linear", "factor": 2, "fine": 3}'}, ("rotary settings", "fine")),
    "frequencies that cross": (
        {"rope_scaling": json.dumps(SCALINGS["llama3"] | {"type": "llama3", "low_freq_factor": 4.0})},
        ("low_freq_factor", "high_freq_factor"),
    ),
    "betas that cross": (
        {"rope_scaling": json.dumps(SCALINGS["yarn"] | {"type": "yarn", "beta_slow": 32.0})}, ("beta_slow", "beta_fast")
    ),
    "quantised": ({"quantization_config": '{"bits": 4}'}, ("quantization_config", "allow_unknown")),
}  # fmt: skip


def written(folder: Path, family: str = "llama", **changes: str | None) -> Path:
    """A config.json whose values at these keys are these JSON texts; None removes one."""
    window = None if family == "llama" else 7
    config = tiny_config(family=family, windows=(window,) * 2, qkv_bias=family == "qwen2")
    values = {key: json.dumps(value) for key, value in FAMILIES[family].write_config(config).items()}
    values = {key: text for key, text in (values | changes).items() if text is not None}
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text("{" + ",".join(f"{json.dumps(key)}: {text}" for key, text in values.items()) + "}")
    return folder


def refused(folder: Path, *mentions: str) -> None:
    faulty.assert_one_sentence(lambda: read_config(folder), str(folder / "config.json"), *mentions, kind=KIND)


def gives(folder: Path, setting: str, expected: Any) -> None:
    def check(config: Any) -> None:
        assert getattr(config, setting) == expected

    assert not faulty.assert_one_sentence(lambda: read_config(folder), kind=KIND, check=check)


@pytest.mark.parametrize("name", faulty.WRONG_VALUES)
@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_checked(field: str, name: str, tmp_path: Path) -> None:
    written(tmp_path, **{field: faulty.WRONG_VALUES[name]})
    if name in FIELDS[field]:
        gives(tmp_path, *FIELDS[field][name])
    elif name in ("too long", "deep"):
        refused(tmp_path)  # json itself does not read them
    elif name == "nested object" and field in ("rope_scaling", "rope_parameters"):
        refused(tmp_path, "rotary settings", "'a'")
    else:
        refused(tmp_path, field)


@pytest.mark.parametrize("name", faulty.WRONG_VALUES)
@pytest.mark.parametrize(("family", "field"), WINDOWS)
def test_windows_are_checked(family: str, field: str, name: str, tmp_path: Path) -> None:
    changes: dict[str, str | None] = {"max_window_layers": "0"} if family == "qwen2" else {}
    if field != "layer_types":
        changes["layer_types"] = None
    written(tmp_path, family, **(changes | {field: faulty.WRONG_VALUES[name]}))
    right = WINDOWS[family, field]
    if name in right:
        gives(tmp_path, *right[name])
    else:
        refused(tmp_path, *(() if name in ("too long", "deep") else (field,)))


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind, fields in SCALINGS.items() for field in fields])
def test_scalings_are_checked(kind: str, field: str, place: str, tmp_path: Path) -> None:
    def finite(config: ModelConfig) -> bool:
        positions = torch.arange(4)[None]
        tables = rope_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling, torch.float32)
        return config.rope_scaling is not None and all(bool(table.isfinite().all()) for table in tables)

    for name, text in faulty.WRONG_VALUES.items():
        texts = {key: json.dumps(value) for key, value in SCALINGS[kind].items()} | {field: text}
        inner = ", ".join(f'"{key}": {value}' for key, value in texts.items())
        written(tmp_path, **{place: f'{{"rope_type": "{kind}", {inner}}}'})
        if name in RIGHT.get(field, ()):
            assert not faulty.assert_one_sentence(lambda: read_config(tmp_path), kind=KIND, check=finite), name
        else:
            refused(tmp_path, *(() if name in ("too long", "deep") else (field,)))


@pytest.mark.parametrize("case", RELATIONS)
def test_settings_have_to_fit_each_other(case: str, tmp_path: Path) -> None:
    changes, mentions = RELATIONS[case]
    refused(written(tmp_path, **changes), *mentions)


@pytest.mark.parametrize("damage", faulty.BROKEN)
def test_a_file_that_is_none(damage: str, tmp_path: Path) -> None:
    faulty.BROKEN[damage](written(tmp_path) / "config.json")
    refused(tmp_path)


@pytest.mark.parametrize("damage", faulty.ODD)
def test_a_file_that_is_odd(damage: str, tmp_path: Path) -> None:
    faulty.ODD[damage](written(tmp_path) / "config.json")
    gives(tmp_path, "vocab_size", 61)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_pretrained(tiny_model(), None, folder)
    return folder


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "intermediate_size", "num_key_value_heads", "head_dim"])
@pytest.mark.parametrize("factor", [2, 10**4])
def test_sizes_that_are_not_those_of_the_weights(field: str, factor: int, checkpoint: Path, tmp_path: Path) -> None:
    """Nothing is allocated for them."""
    folder = faulty.copy_of(checkpoint, tmp_path / "a")
    values = json.loads((folder / "config.json").read_text())
    values |= {field: values[field] * factor}
    (folder / "config.json").write_text(json.dumps(values))
    faulty.assert_one_sentence(lambda: load_model(folder), str(folder), kind=KIND)


@pytest.mark.parametrize("layers", [1, 3, 4096])
def test_layers_that_are_not_those_of_the_weights(layers: int, checkpoint: Path, tmp_path: Path) -> None:
    folder = faulty.copy_of(checkpoint, tmp_path / "a")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"num_hidden_layers": layers}))
    faulty.assert_one_sentence(lambda: load_model(folder), str(folder), kind=KIND)


def test_mutations(checkpoint: Path, tmp_path: Path) -> None:
    """Whatever is loaded computes finite logits of the right shape."""
    folder = faulty.copy_of(checkpoint, tmp_path / "a")
    values = json.loads((folder / "config.json").read_text())
    values["rope_parameters"] = SCALINGS["yarn"] | {"rope_type": "yarn", "rope_theta": 500.0}

    def works(model: Transformer) -> bool:
        logits = model(torch.tensor([[1, 2, 3]]))
        return logits.shape == (1, 3, 61) and bool(logits.isfinite().all())

    for rng in faulty.rounds(0, 150):
        (folder / "config.json").write_text(faulty.mutate_json(values, rng))
        faulty.assert_one_sentence(lambda: load_model(folder), str(folder), kind=KIND, check=works)
