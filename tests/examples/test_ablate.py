"""Variants of the loop: what controls and preference sources change, and the tables over seeds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import ITERATE, configuration, finished, flags, records, world  # noqa: F401  (fixtures)
from safetensors.torch import load_file

from selfevo.datasets import read_pairs
from selfevo.evolve import evolve

ABLATE = ITERATE.with_name("ablate.py")


def ablate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ABLATE), *arguments], capture_output=True, text=True, timeout=300)


def variant(world: Path, tmp_path: Path, **changes: Any) -> Path:  # noqa: F811
    return evolve(configuration(world, tmp_path / "run", iterations=1, **changes))


def test_golden_pairs_need_no_reflection(world: Path, tmp_path: Path) -> None:  # noqa: F811
    run = variant(world, tmp_path, chosen="golden")
    assert not list((run / "M1").glob("reflections-*"))
    pairs = read_pairs(run / "M1" / "pairs.jsonl")
    assert pairs
    assert all(pair.chosen == pair.golden and pair.source == "golden" for pair in pairs)
    counts = json.loads((run / "M1" / "filter.json").read_text())
    assert counts["kept_golden"] == len(pairs)
    assert counts["golden_for_missing_reflection"] == 0


def test_swapped_pairs_raise_what_the_loop_would_lower(world: Path, tmp_path: Path) -> None:  # noqa: F811
    """By the pairs as they were made, accuracy falls below a half where it rises without the control."""
    accuracy = {}
    for control in ("none", "swapped"):
        run = variant(world, tmp_path / control, control=control, gamma=0.0, epochs=4, chosen="golden")
        made = [(pair.chosen, pair.rejected) for pair in read_pairs(run / "M1" / "pairs.jsonl")]
        assert all(chosen != rejected for chosen, rejected in made)
        accuracy[control] = records(run / "M1" / "metrics.jsonl")[-1]
    assert accuracy["none"]["chosen_logp_per_token"] > accuracy["swapped"]["rejected_logp_per_token"]
    assert accuracy["swapped"]["chosen_reward"] > accuracy["swapped"]["rejected_reward"]


def test_sft_only_has_no_dpo_term(world: Path, tmp_path: Path) -> None:  # noqa: F811
    run = variant(world, tmp_path, control="sft-only", chosen="golden")
    metrics = records(run / "M1" / "metrics.jsonl")
    assert metrics
    assert all("dpo" not in record for record in metrics)
    assert any(float(t.abs().max()) > 0 for t in load_file(run / "M1" / "adapter_model.safetensors").values())


ROWS = {
    "baselines": ["vanilla", "SFT-ESConv", "SFT-SynESC", "M0", "M1"],
    "preferences": ["vanilla", "HM-P M1", "HL-P M1", "SR-P M1"],
    "prompts": [
        f"{m}, {k}" for m in ("vanilla", "M0", "M1") for k in ("vanilla", "strategy", "self-reflection", "refine")
    ],
}


@pytest.mark.parametrize("what", ROWS)
def test_a_table_over_seeds_and_its_runs_are_kept(world: Path, tmp_path: Path, what: str) -> None:  # noqa: F811
    options = flags(configuration(world, tmp_path / "unused"))
    options = [flag for i, flag in enumerate(options) if "--out" not in (flag, options[i - 1])]
    seeds = ["0", "1"] if what == "preferences" else ["0"]
    command = [what, "--out", str(tmp_path / "a"), "--seeds", *seeds, "--iterations", "1", *options]
    result = ablate(*command)
    assert result.returncode == 0, result.stderr[-2000:]
    table = (tmp_path / "a" / f"{what}.md").read_text()
    assert table in result.stdout
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert [line.split(" | ")[0].strip("| ") for line in lines] == ROWS[what]
    assert (" to " in lines[0]) == (len(seeds) > 1)
    assert (" %)" in table) == (what == "preferences")
    assert ("METEOR needs" in table) == (what == "baselines")  # WordNet is not here
    stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.jsonl")}
    assert ablate(*command).returncode == 0
    assert stored == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.jsonl")}
    refused = ablate(*command, "--beta", "0.3")
    assert refused.returncode == 1
    assert "other settings" in refused.stderr
    assert "Traceback" not in refused.stderr
