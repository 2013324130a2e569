"""A finished run that version 0.1 wrote, flat settings and other draws included, is still of use.

tests/data/run-0.1 was made from the repository's root by examples/iterate.py of that version on the embedded default,
its paths relative: --limit 6 --epochs 1 --rank 1 --iterations 1.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from selfevo.evolve import BackboneSettings, EvolveConfig, RunError, evolve, read_settings
from selfevo.evolve.settings import change, leaves

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy; its data and its backbone are named as they are seen from the root."""
    monkeypatch.chdir(ROOT)
    return Path(shutil.copytree(ROOT / "tests" / "data" / "run-0.1", tmp_path / "run"))


def configuration(run: Path, **changes: Any) -> EvolveConfig:
    return change(read_settings(run, EvolveConfig), out=str(run), **changes)


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def example(name: str, *arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    return subprocess.run(command, input=said, capture_output=True, text=True, timeout=240, cwd=ROOT)


def test_its_settings_are_read_into_their_parts(run: Path) -> None:
    stored = json.loads((run / "config.json").read_text())["settings"]
    assert set(stored) <= set(leaves(EvolveConfig))  # the names of settings, and of flags, stay
    config = read_settings(run, EvolveConfig)
    assert (config.adapter.rank, config.data.limit, config.training.epochs, config.iterations) == (1, 6, 1, 1)
    assert config.data.synthetic == ("examples/embedded/data/synthetic.json",)
    assert config.replies.reflection_tokens == 160
    assert config.replies.sampling.repetition_penalty == 1.0
    assert config.backbone == BackboneSettings("examples/embedded/backbone")


def test_resuming_it_leaves_it_as_it_is(run: Path) -> None:
    before = contents(run)
    assert evolve(configuration(run), resume=True) == run
    assert contents(run) == before


def test_other_settings_are_refused_and_new_ones_must_have_their_defaults(run: Path) -> None:
    with pytest.raises(RunError, match=r"other settings \(rank was 1, now 2\)"):
        evolve(configuration(run, rank=2), resume=True)
    stamp = json.loads((run / "config.json").read_text())
    del stamp["settings"]["patience"]  # as if this version had introduced it
    (run / "config.json").write_text(json.dumps(stamp))
    evolve(configuration(run), resume=True)
    with pytest.raises(RunError, match=r"other settings \(patience was 3, now 4\)"):
        evolve(configuration(run, patience=4), resume=True)
    stamp["settings"]["later"] = True
    (run / "config.json").write_text(json.dumps(stamp))
    assert read_settings(run, EvolveConfig).adapter.rank == 1  # to look at it, unknown ones do not matter
    with pytest.raises(RunError, match=r"settings unknown to this version \(later\)"):
        evolve(configuration(run), resume=True)
    stamp["settings"]["later"] = False  # a later version's, and not in use
    (run / "config.json").write_text(json.dumps(stamp))
    evolve(configuration(run), resume=True)
    assert example("report", str(run)).returncode == 0
    assert example("chat", str(run), said="I lost my job.\n\n").returncode == 0


def test_unfinished_it_is_not_continued_because_other_dialogues_would_be_held_out(run: Path) -> None:
    (run / "M1" / "adapter_config.json").unlink()
    with pytest.raises(
        RunError, match=r"was begun by selfevo 0\.1\.0, which splits data and draws replies differently"
    ):
        evolve(configuration(run), resume=True)


def test_it_is_scored_again_to_the_same_numbers(run: Path) -> None:
    before = {name: json.loads((run / "eval" / f"{name}.json").read_text())["scores"] for name in ("M0", "M1")}
    result = example("evaluate", str(run))
    assert result.returncode == 0, result.stderr[-2000:]
    for name, scores in before.items():
        again = json.loads((run / "eval" / f"{name}.json").read_text())["scores"]
        assert {k: v["value"] for k, v in again.items()} == pytest.approx({k: v["value"] for k, v in scores.items()})


def test_its_report_is_written(run: Path) -> None:
    result = example("report", str(run))
    assert result.returncode == 0, result.stderr[-2000:]
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "1 iterations, seed 0" in html


def test_its_models_answer_in_the_terminal(run: Path) -> None:
    result = example("chat", str(run), "--models", "M0", "M1", "--reflect", said="I lost my job.\n\n")
    assert result.returncode == 0, result.stderr[-2000:]
    for name in ("M0", "M1"):
        (answer,) = [line for line in result.stdout.splitlines() if f"{name}: " in line]
        assert answer.split(f"{name}: ")[1].strip()
    assert "has no model M2; it has vanilla, M0, M1" in example("chat", str(run), "--model", "M2").stderr
