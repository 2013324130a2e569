"""The other programs under two ranks that share the weights: their files are those of one process."""

from __future__ import annotations

from pathlib import Path

from processes import call, launch
from runs import configuration, flags


def test_models_are_evaluated_and_compared(world: Path, finished: Path, tmp_path: Path) -> None:
    """By ``evaluate.py``, whose models come with adapters and without, and by ``ablate.py``."""
    source = f"{world / 'backbone'}"
    asked = ["--test", str(world / "test.json"), "--limit", "1", "--max-new-tokens", "8", "--tries", "1"]
    asked += ["--prompts", "vanilla", "refine"]
    asked += ["--model", f"plain={source}", "--model", f"M0={source}@{finished / 'M0'}"]
    for size in (1, 2):
        ended = launch(
            size, tmp_path / f"ranks-{size}", call, "evaluate", str(tmp_path / str(size)), *asked, *SHARD[size]
        )
        assert ended.codes == [0] * size, ended.errors
    assert_same_files(tmp_path / "2" / "eval", tmp_path / "1" / "eval")
    given = flags(configuration(world, tmp_path / "ablation"))
    quick = ["--seeds", "0", "--iterations", "1", "--limit", "4"]
    ended = launch(2, tmp_path / "ranks", call, "ablate", "seeds", *given, *quick, "--shard")
    assert ended.codes == [0, 0], ended.errors
    assert "| M1 |" in (tmp_path / "ablation" / "seeds.md").read_text()


def test_the_decoupled_system_is_trained_and_evaluated(world: Path, tmp_path: Path) -> None:
    given = ["--backbone", str(world / "backbone"), "--esconv", str(world / "esconv.json"), "--epochs", "1"]
    given += ["--max-new-tokens", "8", "--learning-rate", "1e-3", "--batch-size", "4", "--max-tokens", "999"]
    given += ["--limit", "8", "--judge", str(world / "backbone"), "--judge-answers", "guided"]
    for size in (1, 2):
        out = ["--out", str(tmp_path / str(size))]
        ended = launch(size, tmp_path / f"ranks-{size}", call, "decoupled", *given, *out, *SHARD[size])
        assert ended.codes == [0] * size, ended.errors
    assert_same_files(tmp_path / "2" / "eval", tmp_path / "1" / "eval")


SHARD: dict[int, list[str]] = {1: [], 2: ["--shard"]}


def assert_same_files(ours: Path, theirs: Path) -> None:
    names = sorted(path.relative_to(theirs) for path in theirs.rglob("*") if path.suffix in (".jsonl", ".md"))
    assert names
    for name in names:
        assert (ours / name).read_text() == (theirs / name).read_text(), name
