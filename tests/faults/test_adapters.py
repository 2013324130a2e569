"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, loaded directly and by the commands."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faulty
import pytest
import torch
from conftest import tiny_model
from runs import configuration, world  # noqa: F401
from safetensors.torch import load_file, save_file

from selfevo.evolve.settings import flatten
from selfevo.lora import LoRALinear, inject_lora, load_adapter, lora_parameters, remove_adapters, save_adapter
from selfevo.models import Transformer, load_model

KIND = "adapters"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
TOKENS = torch.tensor([[5, 4, 3, 2]])
# Fields, and those of faulty.WRONG_VALUES that are right or none, with the scale alpha / r and the dropout that follow.
NONE = ("null", "false", "zero", "empty text", "list", "object")
SAME, ALL = (4.0, 0.0), tuple(faulty.WRONG_VALUES)
FIELDS: dict[str, dict[str, tuple[float, float]]] = {
    "peft_type": {},
    "r": {},
    "lora_alpha": {"half": (0.125, 0.0)},
    "lora_dropout": {"null": SAME, "zero": SAME, "half": (4.0, 0.5), "tiny": (4.0, 1e-320)},
    "use_rslora": {"null": SAME, "false": SAME, "true": (8.0, 0.0)},
    # a text is a regular expression, which is not matched: the tensors decide
    "target_modules": dict.fromkeys(
        ("null", "empty text", "text", "path", "newline", "surrogate", "number as text", "list"), SAME
    ),
    "exclude_modules": dict.fromkeys(ALL, SAME),
    "layers_to_transform": dict.fromkeys(ALL, SAME),
    "bias": {},
    "init_lora_weights": dict.fromkeys(("true", "false", "zero"), SAME),
    "task_type": dict.fromkeys(ALL, SAME),
    **{
        name: dict.fromkeys(NONE, SAME)
        for name in ("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "fan_in_fan_out", "of_tomorrow")
    },
}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model()


@pytest.fixture(scope="module")
def adapter(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of rank 4 and alpha 16 on all linear layers."""
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(tiny_model(), folder)
    return folder


def write_adapter(model: Transformer, folder: Path) -> None:
    inject_lora(model, rank=4, alpha=16)
    generator = torch.Generator().manual_seed(0)
    for factor in lora_parameters(model):
        torch.nn.init.normal_(factor, std=0.1, generator=generator)
    save_adapter(model, folder)


@pytest.fixture(scope="module")
def logits(model: Transformer, adapter: Path) -> torch.Tensor:
    with torch.no_grad():
        load_adapter(model, adapter)
        found = model(TOKENS)
        remove_adapters(model)
        assert not torch.equal(found, model(TOKENS))
        return found


def loads(
    model: Transformer, folder: Path, *mentions: str, check: Callable[[Transformer], object] | None = None
) -> str:
    """Loads an adapter and takes it off again; where it is refused, the model has to be as it was."""

    def call() -> Transformer:
        load_adapter(model, folder)
        return model

    try:
        said = faulty.assert_one_sentence(call, str(folder), *mentions, kind=KIND, check=check)
        assert not said or not any(isinstance(module, LoRALinear) for module in model.modules())
        return said
    finally:
        remove_adapters(model)


@pytest.fixture
def same(logits: torch.Tensor) -> Callable[[Transformer], bool]:
    @torch.no_grad()
    def check(model: Transformer) -> bool:
        return torch.equal(model(TOKENS), logits)

    return check


@pytest.mark.parametrize("name", faulty.WRONG_VALUES)
@pytest.mark.parametrize("field", FIELDS)
def test_every_entry_of_the_configuration_is_checked(
    field: str, name: str, model: Transformer, adapter: Path, tmp_path: Path
) -> None:
    folder = faulty.copy_of(adapter, tmp_path / "a")
    texts = {key: json.dumps(value) for key, value in json.loads((folder / CONFIG).read_text()).items()}
    texts[field] = faulty.WRONG_VALUES[name]
    (folder / CONFIG).write_text("{" + ",".join(f'"{key}": {text}' for key, text in texts.items()) + "}")
    right = {} if name in ("too long", "deep") else FIELDS[field]  # json itself does not read these

    def check(model: Transformer) -> None:
        layer = model.get_submodule("model.layers.0.self_attn.q_proj")
        assert isinstance(layer, LoRALinear)
        assert (layer.alpha / layer.rank, layer.dropout) == right[name]

    mentions = (CONFIG,) if name in ("too long", "deep") else (field,)
    if (field, name) == ("r", "large"):
        mentions = ("lora_A", "shape", str(10**9))
    said = loads(model, folder, *mentions, check=check if name in right else None)
    assert bool(said) == (name not in right)


PATTERNS = [
    "(a+)+$", "(.*)*x", "(.*.*)*y", "(x+x+)+y", "(.*a){20}", "(a|a)*b", "(|)(|)" * 50, ".*" * 50 + "!",
    r"([a-z._0-9]+)+\1!", "(", "[", "*", "(?P<", "a{2,1}", "(" * 1000 + ")" * 1000, "a" * 10**6,
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern[:12])
def test_a_pattern_of_layers_never_takes_for_ever(
    pattern: str, model: Transformer, adapter: Path, tmp_path: Path, same: Callable[[Transformer], bool]
) -> None:
    folder = faulty.copy_of(adapter, tmp_path / "a")
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | {"target_modules": pattern}))
    assert not loads(model, folder, check=same)


def test_very_many_targets_take_little_time(model: Transformer, adapter: Path, tmp_path: Path, same: Any) -> None:
    folder = faulty.copy_of(adapter, tmp_path / "a")
    values = json.loads((folder / CONFIG).read_text())
    values["target_modules"] += [f"layer{number}" for number in range(30_000)]
    (folder / CONFIG).write_text(json.dumps(values))
    assert not loads(model, folder, check=same)


@pytest.mark.parametrize("damage", faulty.BROKEN)
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_is_none(name: str, damage: str, model: Transformer, adapter: Path, tmp_path: Path) -> None:
    folder = faulty.copy_of(adapter, tmp_path / "a")
    path = folder / name
    if name == WEIGHTS and damage == "UTF-16":
        path.write_bytes(path.read_bytes().hex().encode("utf-16"))
    else:
        faulty.BROKEN[damage](path)
    loads(model, folder, name)


@pytest.mark.parametrize("damage", faulty.ODD)
def test_a_configuration_that_is_odd(
    damage: str, model: Transformer, adapter: Path, tmp_path: Path, same: Callable[[Transformer], bool]
) -> None:
    folder = faulty.copy_of(adapter, tmp_path / "a")
    faulty.ODD[damage](folder / CONFIG)
    assert not loads(model, folder, check=same)


FLAT = torch.zeros(4, 32)
TENSORS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no A": ({f"{Q}.lora_A.weight": None}, ("q_proj.lora_A", "missing")),
    "no B": ({f"{Q}.lora_B.weight": None}, ("q_proj.lora_B", "missing")),
    "neither": ({f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None}, ("q_proj.lora_A", "missing")),
    "NaN in A": ({f"{Q}.lora_A.weight": FLAT * torch.nan}, ("q_proj.lora_A", "NaN")),
    "infinite A": ({f"{Q}.lora_A.weight": FLAT + torch.inf}, ("q_proj.lora_A", "infinite")),
    "infinite B": ({f"{Q}.lora_B.weight": FLAT.T.contiguous() - torch.inf}, ("q_proj.lora_B", "infinite")),
    "beyond 32 bits": ({f"{Q}.lora_A.weight": FLAT.double() + 1e300}, ("q_proj.lora_A", "infinite")),
    "higher rank": ({f"{Q}.lora_A.weight": torch.zeros(5, 32)}, ("(5, 32)", "(4, 32)")),
    "transposed": ({f"{Q}.lora_B.weight": FLAT}, ("(4, 32)", "(32, 4)")),
    "flat": ({f"{Q}.lora_A.weight": torch.zeros(128)}, ("(128,)",)),
    "a number": ({f"{Q}.lora_A.weight": torch.tensor(0.0)}, ("()",)),
    "one more": ({"base_model.model.x.weight": FLAT}, ("x.weight", "belongs to no")),
    "a layer too many": ({Q.replace("0", "9") + ".lora_A.weight": FLAT}, ("layers.9", "belongs to no")),
    "no prefix": ({"model.layers.0.self_attn.q_proj.lora_A.weight": FLAT}, ("belongs to no",)),
    "named adapter": ({f"{Q}.lora_A.default.weight": FLAT}, ("default", "belongs to no")),
    "magnitudes": ({f"{Q}.lora_magnitude_vector": torch.ones(32)}, ("magnitude", "belongs to no")),
    "head": (
        {f"base_model.model.lm_head.lora_{k}.weight": torch.zeros(s) for k, s in (("A", (4, 32)), ("B", (61, 4)))},
        ("lm_head", "output head"),
    ),
    "trained weight": ({"base_model.model.model.norm.weight": torch.zeros(32)}, ("norm.weight", "trained too")),
    "NaN weight": ({"base_model.model.model.norm.weight": torch.full((32,), torch.nan)}, ("norm.weight", "differs")),
    "longer weight": ({"base_model.model.model.norm.weight": torch.ones(33)}, ("norm.weight", "(33,)")),
    "a long name": ({"x" * 10**5: FLAT}, ("xxx", "belongs to no")),
    "control characters": ({"a\n\x1b[31m": FLAT}, ("belongs to no",)),
    "empty": ({"all": None}, ("missing",)),
    **{
        f"{kind}": ({f"{Q}.lora_A.weight": FLAT.to(kind)}, ("q_proj.lora_A", str(kind)))
        for kind in (torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    },
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(case: str, model: Transformer, adapter: Path, tmp_path: Path) -> None:
    changes, mentions = TENSORS[case]
    folder = faulty.copy_of(adapter, tmp_path / "a")
    tensors = {} if "all" in changes else load_file(folder / WEIGHTS) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)
    loads(model, folder, WEIGHTS, *mentions)


@pytest.mark.parametrize("targets", [None, [], "q_proj|v_proj"])
def test_a_file_without_tensors_is_no_adapter(targets: Any, model: Transformer, adapter: Path, tmp_path: Path) -> None:
    folder = faulty.copy_of(adapter, tmp_path / "a")
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | {"target_modules": targets}))
    save_file({}, folder / WEIGHTS)
    loads(model, folder, WEIGHTS, "no linear layer")


def test_a_truncated_file_names_the_tensor_that_is_cut(model: Transformer, adapter: Path, tmp_path: Path) -> None:
    folder = faulty.copy_of(adapter, tmp_path / "a")
    path = folder / WEIGHTS
    data = path.read_bytes()
    for kept in range(len(data) - 1, len(data) // 2, -len(data) // 9):
        path.write_bytes(data[:kept])
        loads(model, folder, WEIGHTS, "cut in the tensor base_model.model.model.layers.")


def test_a_pickle_is_not_read(model: Transformer, adapter: Path, tmp_path: Path) -> None:
    folder = faulty.copy_of(adapter, tmp_path / "a")
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "adapter_model.bin")
    loads(model, folder, "adapter_model.bin", "pickle")


def test_bit_flips(model: Transformer, adapter: Path, tmp_path: Path, same: Callable[[Transformer], bool]) -> None:
    folder = faulty.copy_of(adapter, tmp_path / "a")
    path = folder / WEIGHTS
    whole = path.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    for rng in faulty.rounds(4, 60):
        path.write_bytes(faulty.flip_bits(whole[:size], rng, rng.choice((1, 1, 2, 8))) + whole[size:])
        loads(model, folder, check=same)


def test_mutations_of_the_configuration(model: Transformer, adapter: Path, tmp_path: Path) -> None:
    """Whatever is loaded is on all layers, and finite."""
    folder = faulty.copy_of(adapter, tmp_path / "a")
    values = json.loads((folder / CONFIG).read_text())

    @torch.no_grad()
    def whole(model: Transformer) -> bool:
        return len(lora_parameters(model)) == 28 and bool(model(TOKENS).isfinite().all())

    for rng in faulty.rounds(5, 100):
        (folder / CONFIG).write_text(faulty.mutate_json(values, rng))
        loads(model, folder, check=whole)


# The commands


@pytest.fixture(scope="module")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """As much of a run folder as examples/chat.py asks for: settings, and the adapter of M0."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_adapter(load_model(world / "backbone"), folder / "M0")
    settings = flatten(configuration(world, folder))
    (folder / "config.json").write_text(json.dumps({"settings": settings}))
    return folder


def break_config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(values | changes))

    return damage


def break_tensor(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        changed = change(tensors.pop(f"{Q}.lora_B.weight"))
        save_file(tensors | ({} if changed is None else {f"{Q}.lora_B.weight": changed}), folder / WEIGHTS)

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "rank": (break_config(r=3), "lora_A"),
    "rank as text": (break_config(r="4"), "'r'"),
    "alpha": (break_config(lora_alpha=1e300), "lora_alpha"),
    "dropout": (break_config(lora_dropout=1.5), "lora_dropout"),
    "rank pattern": (break_config(rank_pattern={"q_proj": 2}), "rank_pattern"),
    "targets": (break_config(target_modules=[[]]), "target_modules"),
    "NaN": (break_tensor(lambda b: b * torch.nan), "NaN"),
    "infinite": (break_tensor(lambda b: b + torch.inf), "infinite"),
    "missing": (break_tensor(lambda b: None), "missing"),
    "shape": (break_tensor(lambda b: b[:-1].contiguous()), "shape"),
    "cut": (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5]) and None, "cut in"),
    "fifo": (lambda folder: faulty.BROKEN["fifo"](folder / WEIGHTS), "pipe"),
}


@pytest.mark.parametrize("command", ["export", "evaluate", "chat"])
@pytest.mark.parametrize("case", DAMAGE)
def test_commands_refuse_a_broken_adapter_before_anything_is_written(
    case: str,
    command: str,
    world: Path,  # noqa: F811
    run: Path,
    tmp_path: Path,
) -> None:
    damage, mention = DAMAGE[case]
    broken = faulty.copy_of(run, tmp_path / "run")
    damage(broken / "M0")
    (tmp_path / "said.txt").write_text("I am sad.\n")
    backbone, out = world / "backbone", tmp_path / "out"
    arguments = {
        "export": ["--backbone", backbone, "--adapter", broken / "M0", "--out", out],
        "evaluate": [out, "--test", world / "test.json", "--model", f"a={backbone}@{broken / 'M0'}"],
        "chat": [broken, "--models", "M0", "--script", tmp_path / "said.txt", "--save", out],
    }
    main = importlib.import_module(command).main
    said = faulty.assert_program_refuses(main, *arguments[command], mentions=(mention, "M0"), kind=KIND)
    assert "learning rate" not in said
    assert not [path for path in (out, *out.rglob("*")) if path.is_file()]


@pytest.mark.parametrize("damage", ["not UTF-8", "UTF-16", "binary", "a zip"])
def test_chat_refuses_a_script_that_is_no_text(damage: str, run: Path, tmp_path: Path) -> None:
    script = tmp_path / "said.txt"
    script.write_text("I am sad.\n")
    if damage == "a zip":
        script.write_bytes(b"PK\x03\x04\xff")
    else:
        faulty.BROKEN[damage](script)
    main = importlib.import_module("chat").main
    arguments = (run, "--models", "M0", "--script", script, "--save", tmp_path / "out")
    faulty.assert_program_refuses(main, *arguments, mentions=(str(script), "UTF-8"), kind="chat scripts")
