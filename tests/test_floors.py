"""The house stands: imports run strictly downward, and what other people import stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "selfevo"
# From the ground up. A room may import rooms of lower floors only; within a room imports run in no circle.
FLOORS = """
    kernels metrics dialogue files
    models lora losses
    trie datasets
    generate scoring
    training evaluation
    evolve
    decoupled study
"""
FLOOR = {room: number for number, line in enumerate(FLOORS.strip().splitlines(), 1) for room in line.split()}


def module(path: Path) -> str:
    """The dotted name below ``selfevo``; that of a package is its folder's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {module(path): path for path in PACKAGE.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """The modules of ours that a file imports, inside functions too; names are taken out of the module they are in."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        ours = [name.removeprefix("selfevo.") for name in names if name.startswith("selfevo.")]
        found |= {name if name in FILES else name.rpartition(".")[0] for name in ours}
    return found - {""}


def test_the_top_is_six_files_and_ten_folders() -> None:
    entries = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert entries == {*FLOOR, "__init__", "py.typed"}
    assert len([room for room in FLOOR if (PACKAGE / f"{room}.py").is_file()]) == 6
    assert len([room for room in FLOOR if (PACKAGE / room).is_dir()]) == 10


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_run_downward(name: str) -> None:
    room = name.split(".")[0]
    others = {other.split(".")[0] for other in imported(FILES[name])} - {room}
    if not room:
        assert not others  # `import selfevo` loads nothing
    upward = {other for other in others if FLOOR[other] >= FLOOR[room]}
    assert not upward, f"{name} (floor {FLOOR[room]}) imports {upward}"


def test_there_is_no_circle() -> None:
    """A package's __init__ hands its modules on, so a module of a package may not import that package itself."""
    graph = {name: imported(path) for name, path in FILES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_private_operators_of_pytorch_are_in_one_file() -> None:
    private = re.compile(r"torch\.ops|torch\._[a-z]")
    found = {name for name, path in FILES.items() if private.search(path.read_text(encoding="utf-8"))}
    assert found == {"kernels.private_ops"}


def loaded_by(statement: str) -> set[str]:
    """Top-level modules (and rooms of ours) in a fresh process after a statement."""
    code = f"import sys; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name if name.startswith("selfevo") else name.split(".")[0] for name in result.stdout.split()}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import selfevo") == {"selfevo"}


@pytest.mark.parametrize("name", ["losses", "lora"])
def test_losses_and_lora_need_torch_alone(name: str) -> None:
    own = {module for module in loaded_by(f"import torch, selfevo.{name}") if module.startswith("selfevo")}
    rooms = {module.split(".")[1] for module in own if "." in module}
    assert rooms <= {name, "kernels", "files"}
    third_party = loaded_by(f"import selfevo.{name}") - loaded_by("import torch, torch.utils.checkpoint") - own
    assert not third_party & {"safetensors", "tokenizers", "huggingface_hub", "transformers", "tqdm"}


@pytest.mark.parametrize("name", ["metrics", "dialogue", "files"])
def test_metrics_and_records_need_the_standard_library_alone(name: str) -> None:
    loaded = {module.split(".")[0] for module in loaded_by(f"import selfevo.{name}")}
    assert loaded - sys.stdlib_module_names == {"selfevo"}


def test_the_public_contract_imports() -> None:
    names = {
        "losses": "sequence_logps dpo_loss dpo_sft_loss linear_logps",
        "lora": "inject_lora disable_adapters lora_parameters freeze_adapter save_adapter load_adapter merge_adapters",
        "models": "load_model load_tokenizer save_pretrained Transformer ChatTokenizer",
        "scoring": "response_logps",
        "generate": "generate Sampling",
        "metrics": "bleu distinct_n rouge_l meteor",
        "dialogue": "Turn Dialogue Example",
        "datasets": "load_esconv load_extes load_serveforemo load_alpaca",
        "evolve": "EvolveConfig evolve",
    }
    for room, listed in names.items():
        loaded_by("; ".join(f"from selfevo.{room} import {name}" for name in listed.split()))
