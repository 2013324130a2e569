"""The benchmarks run to their tables, on a tiny shape and the embedded dialogues."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "examples" / "embedded"


REAL = ["--data", str(EMBEDDED / "data" / "test.json"), "--tokenizer", str(EMBEDDED / "backbone")]
REAL += ["--rounds", "1", "--dialogues", "2"]


def run(script: str, *arguments: str) -> str:
    shape = [] if script == "reflections.py" else ["--shape", "tiny"]
    command = [sys.executable, str(ROOT / "benchmarks" / script), *shape, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def ratios(report: str) -> dict[str, float]:
    """The last column of the table, of every row that has one."""
    rows = re.findall(r"^\| ([^|]+) \|.*\| ([\d.e+]+) \(one round\) \|$", report, re.MULTILINE)
    return {name: float(value) for name, value in rows}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_beside_the_peers(dtype: str) -> None:
    report = run("train.py", *REAL, "--dtype", dtype)
    found = ratios(report)
    assert set(found) == {"plain loop", "TRL + PEFT"}
    assert all(ratio > 0 for ratio in found.values())
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", report)]
    assert max(losses) - min(losses) < 0.3  # random weights: each token costs log of the vocabulary
    assert len(losses) == 6


def test_rollouts_beside_the_peers() -> None:
    report = run("rollout.py", *REAL, "--new", "4", "--peer-batch", "2", "--adapters", "--beside")
    alone, beside = report.split("beside one busy process:")
    assert set(ratios(alone)) == set(ratios(beside)) == {"transformers, batch 2"}
    assert "computed / distinct 1.000" in report


def test_a_whole_iteration_beside_the_peers() -> None:
    lengths = ("--new", "2", "--reflection-new", "3")
    report = run("iteration.py", *REAL, *lengths, "--sample", "4", "--peer-batch", "2", "4", "--peer-pairs", "2")
    assert {"whole", "replies", "reflections", "reference", "training", "answers"} == set(ratios(report))
    ours, theirs = [float(loss) for loss in re.findall(r"loss ([\d.]+)$", report, re.MULTILINE)]
    assert abs(ours - theirs) < 0.3  # as above
    assert "tried (4, False)" in report


def test_reflections_both_ways(tmp_path: Path) -> None:
    seeds = str(EMBEDDED / "data" / "synthetic.json")
    settings = ("--max-new-tokens", "16", "--reflection-tokens", "128", "--tries", "1", "--turns", "2")
    report = run(
        "reflections.py", "--backbone", REAL[3], "--synthetic", seeds, "--out", str(tmp_path / "both"), *settings
    )
    assert re.findall(r"^\| (free|guided) \| \d of 2 \|", report, re.MULTILINE) == ["free", "guided"]
    assert "| guided | 2 of 2 |" in report
    assert (tmp_path / "both" / "guided" / "pairs.jsonl").is_file()


def test_longer_dialogues() -> None:
    report = run("turns.py", "--turns", "2", "--tries", "1")
    assert re.findall(r"^(\d+) turns", report, re.MULTILINE) == ["2", "4", "8"]


def test_the_table_of_what_bounds_a_step_is_that_of_the_documentation() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert printed in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert printed.count("| training |") == printed.count("| decoding") == 6
