"""The house stands: imports run strictly downward, and what other people import stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "selfevo"
# Each room may import only rooms named before it.
ORDER = [
    "files", "markup", "salvage", "dialogue", "prompts", "trie", "sampling", "losses", "products", "lowrank", "lora",
    "tokens", "metrics", "significance", "scores", "strategy",
    "models.elementwise", "models.tree_attention", "models.attention", "models.transformer",
    "models.memory", "models.config", "models.chat", "models.hub", "models.llama", "models.qwen2", "models.mistral",
    "models.tokenizer", "models.loading", "models",
    "datasets", "scoring", "folding", "caches", "graphs", "generate", "replies", "endpoint",
    "objectives", "train", "corpus", "refine", "evaluate", "judge", "analysis", "figures",
    "stages", "evolve", "samples", "scoreboard", "report",
    "decoupled", "mining", "support_scores", "decoupled_run",
]  # fmt: skip


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path: Path) -> set[str]:
    """The rooms that a file imports, names taken from a package included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if any(name.removeprefix("selfevo.") not in ORDER for name in names):
                names.append(str(node.module))  # not a package that rooms are taken out of
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("selfevo.") for name in names if name.startswith("selfevo.")}
    return {name for name in found if name in ORDER or (PACKAGE / f"{name.replace('.', '/')}.py").is_file()}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=room)
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    name = room(path)
    if not name:
        assert not imported(path)  # `import selfevo` loads nothing
        return
    assert name in ORDER, f"give {name} its floor"
    above = {other for other in imported(path) if ORDER.index(other) >= ORDER.index(name)}
    assert not above, f"{name} imports {above} from its own floor or above"


def test_every_room_of_the_order_exists() -> None:
    assert sorted(ORDER) == sorted(room(path) for path in PACKAGE.rglob("*.py") if room(path))


def loaded_by(statement: str) -> set[str]:
    """Top-level modules (and rooms of ours) in a fresh process after a statement."""
    code = f"import sys; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name if name.startswith("selfevo") else name.split(".")[0] for name in result.stdout.split()}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import selfevo") == {"selfevo"}


@pytest.mark.parametrize("name", ["losses", "lora"])
def test_losses_and_lora_need_torch_alone(name: str) -> None:
    below = {"selfevo.lowrank", "selfevo.products"} if name == "lora" else set()
    own = {module for module in loaded_by(f"import torch, selfevo.{name}") if module.startswith("selfevo")}
    assert own == {"selfevo", f"selfevo.{name}"} | below
    third_party = loaded_by(f"import selfevo.{name}") - loaded_by("import torch, torch.utils.checkpoint") - own
    assert not third_party & {"safetensors", "tokenizers", "huggingface_hub", "transformers", "tqdm"}


@pytest.mark.parametrize("name", ["metrics", "strategy"])
def test_metrics_need_the_standard_library_alone(name: str) -> None:
    loaded = {module.split(".")[0] for module in loaded_by(f"import selfevo.{name}")}
    assert loaded - sys.stdlib_module_names == {"selfevo"}


def test_no_room_has_outgrown_its_walls() -> None:
    sizes = {room(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert max(sizes.values()) <= 430, max(sizes, key=lambda name: sizes[name])
