"""The loop end to end on a tiny backbone: its files, its numbers, resuming after SIGKILL, and bad input."""

# ruff: noqa: F811  (fixtures are imported)

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from iterate import parse
from runs import ITERATE, configuration, dialogue, finished, flags, records, world  # noqa: F401
from safetensors.torch import load_file

from selfevo.datasets import read_pairs
from selfevo.datasets.encoding import fit_prompt
from selfevo.evaluation.folder import diverged_stages
from selfevo.evaluation.report import write_report
from selfevo.evolve import BackboneSettings, DataSettings, EvolveConfig, RefineSettings, RunError, TrainSettings, evolve
from selfevo.evolve.settings import flatten, leaves
from selfevo.files import FileError, write_jsonl
from selfevo.generate import Sampling
from selfevo.lora import load_adapter
from selfevo.models import load_model, load_tokenizer
from selfevo.scoring import response_logps


def test_a_run_leaves_every_file_of_the_layout(finished: Path) -> None:
    stored = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    expected = {"config.json", "data.json", "eval/examples.jsonl", "eval/table.md", "eval/scores.json", "M0/sft.json"}
    expected |= {"ledger.jsonl", "lock"}
    for name in ("M0", "M1", "M2"):
        expected |= {f"{name}/adapter_config.json", f"{name}/adapter_model.safetensors", f"{name}/metrics.jsonl"}
    for name in ("vanilla", "M0", "M1", "M2"):
        kinds = ("json", "replies.jsonl", "values.jsonl", "request.json")
        expected |= {f"eval/{name}.{kind}" for kind in kinds}
    for name in ("M1", "M2"):
        expected |= {f"{name}/{file}" for file in ("pairs.jsonl", "filter.json", "reference.json", "replies.jsonl")}
        expected |= {f"{name}/reflections-{attempt}.jsonl" for attempt in (1, 2)}
    assert stored == expected
    ordinary = (finished / "config.json").stat().st_mode
    assert all((finished / file).stat().st_mode == ordinary for file in stored)


def test_the_first_dpo_step_of_every_iteration_has_loss_log_2(finished: Path) -> None:
    for name in ("M1", "M2"):
        first = records(finished / name / "metrics.jsonl")[0]
        assert first["dpo"] == pytest.approx(math.log(2), abs=1e-5)
        assert first["chosen_reward"] == pytest.approx(0, abs=1e-4)


def test_adapters_grow_by_the_rank_and_every_stage_moved(finished: Path) -> None:
    tensors = [load_file(finished / name / "adapter_model.safetensors") for name in ("M0", "M1", "M2")]
    ranks = [next(t.shape[0] for n, t in stage.items() if n.endswith("lora_A.weight")) for stage in tensors]
    assert ranks == [8, 16, 24]
    for stage in tensors:
        assert all(float(t[:, -8:].abs().max()) > 0 for n, t in stage.items() if n.endswith("lora_B.weight"))


def test_the_stored_reference_is_the_model_of_the_iteration_before(finished: Path, world: Path) -> None:
    tokenizer = load_tokenizer(world / "backbone")
    model = load_model(world / "backbone")
    load_adapter(model, finished / "M1")
    stored = json.loads((finished / "M2" / "reference.json").read_text())
    pairs = read_pairs(finished / "M2" / "pairs.jsonl")
    assert len(pairs) == len(stored["chosen"]) > 0
    for side in ("chosen", "rejected"):
        replies = [tokenizer.encode_reply(getattr(pair, side)) for pair in pairs]
        if side == "rejected":  # one that the limit cut has no end
            replies = [reply[:-1] if pair.rejected_cut else reply for reply, pair in zip(replies, pairs)]
        examples = [(fit_prompt(tokenizer, pair.prompt, 1800).ids or [], reply) for pair, reply in zip(pairs, replies)]
        with torch.no_grad():
            sums, _ = response_logps(model, examples)
        torch.testing.assert_close(sums, torch.tensor(stored[side]), rtol=1e-5, atol=1e-4)


def test_pairs_are_counted_for_by_the_rules(finished: Path) -> None:
    for name in ("M1", "M2"):
        counts = json.loads((finished / name / "filter.json").read_text())
        pairs = records(finished / name / "pairs.jsonl")
        assert counts["pairs"] == len(pairs) == counts.get("kept_golden", 0) + counts.get("kept_refined", 0)
        dropped = sum(count for rule, count in counts.items() if rule.endswith("_dropped"))
        assert counts["examples"] == counts["pairs"] + dropped
        assert all(pair["chosen"][0]["content"] != pair["rejected"][0]["content"] for pair in pairs)
        assert all(pair["prompt"][-1]["role"] == "user" for pair in pairs)


def test_pairs_load_in_trls_own_reader(finished: Path) -> None:
    from datasets import load_dataset
    from trl.data_utils import is_conversational

    path = str(finished / "M1" / "pairs.jsonl")
    dataset = load_dataset("json", data_files=path, split="train", cache_dir=str(finished.parent / "cache"))
    assert {"prompt", "chosen", "rejected"} <= set(dataset.column_names)
    assert is_conversational(dataset[0])


def test_the_table_has_a_row_per_model_and_the_change_per_iteration(finished: Path) -> None:
    table = (finished / "eval" / "table.md").read_text()
    scores = json.loads((finished / "eval" / "scores.json").read_text())
    _, _, *rows = [line for line in table.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows] == ["vanilla", "M0", "M1", "M2"] == list(scores)
    for column, value in scores["M2"].items():
        before = scores["M1"][column]
        change = f" ({100 * (value / before - 1):+.2f} %)" if before else ""
        assert f"| {value:.2f}{change} |" in rows[-1]


def test_a_run_from_the_vanilla_backbone_has_no_m0(finished: Path, world: Path, tmp_path: Path) -> None:
    config = configuration(world, tmp_path / "run", start="vanilla", iterations=1, chosen="golden")
    run = evolve(config)
    assert not (run / "M0").exists()
    assert list(json.loads((run / "eval" / "scores.json").read_text())) == ["vanilla", "M1"]
    replies = [record["text"] for record in records(run / "M1" / "replies.jsonl")]
    assert replies != [record["text"] for record in records(finished / "M1" / "replies.jsonl")]  # the backbone's own
    first = records(run / "M1" / "metrics.jsonl")[0]
    assert first["dpo"] == pytest.approx(math.log(2), abs=1e-5)  # the reference is the backbone
    tensors = load_file(run / "M1" / "adapter_model.safetensors")
    assert {t.shape[0] for n, t in tensors.items() if n.endswith("lora_A.weight")} == {8}
    html = write_report(run).read_text()
    assert "M1 starts from the vanilla backbone" in html
    assert "unfinished" not in html


def test_without_iterations_a_run_ends_with_m0(world: Path, tmp_path: Path) -> None:
    run = evolve(configuration(world, tmp_path / "run", iterations=0, replay="", sft_data="synthetic"))
    assert list(json.loads((run / "eval" / "scores.json").read_text())) == ["vanilla", "M0"]
    sizes = json.loads((run / "data.json").read_text())["sizes"]
    assert (sizes["train_dialogues"], sizes["seed_examples"], sizes["replay_instructions"]) == (18, [], 0)


def test_table_and_report_say_that_the_reflections_of_a_random_model_failed(finished: Path) -> None:
    table = (finished / "eval" / "table.md").read_text()
    for stage in ("M1", "M2"):
        counts = json.loads((finished / stage / "filter.json").read_text())
        unusable = counts["golden_for_missing_reflection"]
        assert f"\n{stage}: {unusable} of {unusable} reflections were unusable: most of its pairs" in table
    page = write_report(finished).read_text(encoding="utf-8")
    assert page.count("reflections were unusable") == 2


def test_the_screen_says_how_reflections_went(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A random model writes no JSON freely, and nothing else in a form."""
    few: dict[str, Any] = {"iterations": 1, "limit": 4, "start": "vanilla"}
    evolve(configuration(world, tmp_path / "free", **few))
    screen = capsys.readouterr().err
    pairs = len(records(tmp_path / "free" / "M1" / "pairs.jsonl"))
    told = f"M1: 0 of {pairs} reflections usable; the chosen reply is the golden one in {pairs} of {pairs} pairs\n"
    assert told in screen
    assert f"warning: M1: {pairs} of {pairs} reflections were unusable" in screen
    assert "--reflection guided has the decoder write the JSON." in screen
    run = evolve(configuration(world, tmp_path / "guided", reflection="guided", reflection_tokens=300, **few))
    written = records(run / "M1" / "reflections-1.jsonl")
    assert len(written) == pairs
    for record in written:
        assert list(json.loads(record["text"])) == ["understanding", "evaluation_score", "feedback", "refined_response"]
        assert record["tokens"] <= 300
    assert f"M1: {pairs} of {pairs} reflections usable" in capsys.readouterr().err
    cut = sum(record["cut"] for record in written)
    counts = json.loads((run / "M1" / "filter.json").read_text())
    assert counts.get("refinement_cut_at_limit", 0) == cut
    assert counts.get("unusable_json_try_1", 0) <= cut  # only for want of a whole sentence


def iterate(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """The example in a process of its own; with KILL_AT it kills itself around the writing of that file."""
    code = KILLER if environment else "import runpy, sys; runpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", START + code, str(ITERATE), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


START = f"import sys; del sys.argv[0]; sys.path.insert(0, {str(ITERATE.parent)!r})\n"  # as ``python iterate.py`` does
KILLER = """
import os, runpy, signal
put = os.replace
def replace(source, target):
    at = str(target).endswith(os.environ["KILL_AT"])
    if at and os.environ["KILL_WHEN"] == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    put(source, target)
    if at:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_killed_in_every_stage_ends_with_the_same_adapters_and_pairs(
    finished: Path, world: Path, tmp_path: Path
) -> None:
    config = configuration(world, tmp_path / "killed")
    run = Path(config.out)
    moments = [
        ("/config.json", "after"), ("M0/checkpoint.safetensors", "after"), ("M0/adapter_model.safetensors", "before"),
        ("M0/adapter_model.safetensors", "after"), ("eval/M0.replies.jsonl", "before"), ("M1/replies.jsonl", "after"),
        ("M1/reflections-2.jsonl", "before"), ("M1/pairs.jsonl", "after"), ("M1/reference.json", "after"),
        ("M1/checkpoint.safetensors", "after"), ("M1/adapter_config.json", "after"), ("eval/M1.json", "before"),
        ("M2/checkpoint.safetensors", "after"), ("eval/table.md", "before"),
    ]  # fmt: skip
    for file, when in moments:
        result = iterate([*flags(config), "--resume"], KILL_AT=file, KILL_WHEN=when)
        assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]
    assert list(run.rglob("*.partial"))
    result = iterate([*flags(config), "--resume"])
    assert result.returncode == 0, result.stderr[-2000:]
    for name in ("M0", "M1", "M2"):
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (run / name / file).read_bytes() == (finished / name / file).read_bytes(), f"{name}/{file}"
    for file in ("M1/pairs.jsonl", "M2/pairs.jsonl", "M1/reference.json", "eval/table.md", "eval/M2.replies.jsonl"):
        assert (run / file).read_text() == (finished / file).read_text(), file
    assert not list(run.rglob("*.partial"))


def test_the_embedded_default_runs_to_the_tables(tmp_path: Path) -> None:
    result = iterate(["--limit", "8", "--epochs", "1", "--iterations", "1", "--out", str(tmp_path / "run")])
    assert result.returncode == 0, result.stderr[-2000:]
    row = next(line for line in result.stdout.splitlines() if line.startswith("| M1 |"))
    assert row.count("|") == 14
    assert "facts of this user taken up" in result.stdout
    counts = json.loads((tmp_path / "run" / "M1" / "filter.json").read_text())
    assert counts["kept_refined"] > 0  # the backbone does reflect


def test_a_finished_run_is_not_touched_by_resuming_it(finished: Path, world: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("adapter_*")}
    evolve(configuration(world, finished), resume=True)
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("adapter_*")}


def test_a_stage_that_diverges_is_told_on_the_screen_in_the_table_and_in_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the embedded backbone: the tiny random one gains by whatever it is made to forget."""
    few = ["--limit", "3", "--epochs", "1", "--iterations", "0", "--max-new-tokens", "4"]
    config, *_ = parse([*few, "--out", str(tmp_path / "run"), "--sft-learning-rate", "0.3"])
    run = evolve(config)
    first = records(run / "M0" / "metrics.jsonl")[0]["loss"]
    sentence = f"M0: diverged: its training loss was {first:.3f} at the start and"  # three dialogues, none held out
    assert f"warning: {sentence}" in capsys.readouterr().err
    assert sentence in (run / "eval" / "table.md").read_text()
    assert sentence in write_report(run).read_text()


def test_training_that_goes_well_is_not_said_to_diverge(finished: Path) -> None:
    assert "diverged" not in (finished / "eval" / "table.md").read_text()


def test_the_held_out_loss_or_without_one_the_training_loss_tells_of_divergence(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    rows = records(run / "M2" / "metrics.jsonl")
    best = min(row["held_out"]["loss"] for row in rows if "held_out" in row)
    for before, told in ((best - 0.01, True), (best + 0.01, False)):
        rows[0]["held_out_before"]["loss"] = before
        (run / "M2" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert ("M2: diverged: its held-out loss was" in " ".join(diverged_stages(run))) == told
    for last, told in ((3.1, True), (2.9, False)):
        steps = [{"step": i, "loss": loss, "seconds": 0.1} for i, loss in enumerate([2.0, *[9.0] * 18, last, last])]
        (run / "M1" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in steps))
        assert ("M1: diverged: its training loss was 2.000" in " ".join(diverged_stages(run))) == told


def test_a_reference_of_other_pairs_is_refused(finished: Path, world: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(finished, run)
    (run / "M2" / "adapter_config.json").unlink()
    write_jsonl(run / "M2" / "pairs.jsonl", records(run / "M2" / "pairs.jsonl")[:-1])  # as our code would
    with pytest.raises(FileError, match=r"reference\.json: was computed with another model or other pairs"):
        evolve(configuration(world, run), resume=True)


@pytest.mark.parametrize(
    ("changes", "resume", "reason"),
    [
        ({}, False, "already holds a run; continue it with --resume"),
        ({"beta": 0.2}, True, r"other settings \(beta was 0.1, now 0.2\)"),
    ],
)
def test_another_runs_folder_is_left_alone(
    finished: Path, world: Path, changes: dict[str, Any], resume: bool, reason: str
) -> None:
    before = (finished / "config.json").read_bytes()
    with pytest.raises(RunError, match=reason):
        evolve(configuration(world, finished, **changes), resume=resume)
    assert (finished / "config.json").read_bytes() == before


def test_a_folder_with_other_things_in_it_is_left_alone(world: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="not a run folder"):
        evolve(configuration(world, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def break_file(world: Path, tmp_path: Path, what: str) -> dict[str, Any]:
    """One thing wrong with the input; the changed settings."""
    bad = tmp_path / "bad.json"
    if what == "not JSON":
        bad.write_text("<html>404</html>")
        return {"esconv": str(bad)}
    if what == "no dialog":
        bad.write_text(json.dumps([dialogue(0), {"situation": "s"}]))
        return {"esconv": str(bad)}
    if what == "missing file":
        return {"test": str(tmp_path / "nowhere.json")}
    folder = tmp_path / "backbone"
    shutil.copytree(world / "backbone", folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        config.write_text(config.read_text().replace('"llama"', '"gpt_neox"'))
    return {"backbone": str(folder)}


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("not JSON", "bad.json"),
        ("no dialog", "record 1"),
        ("missing file", "nowhere.json"),
        ("truncated", "is cut in the tensor"),
        ("unknown family", "gpt_neox"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(
    world: Path, tmp_path: Path, what: str, named: str
) -> None:
    config = configuration(world, tmp_path / "run", **break_file(world, tmp_path, what))
    result = iterate(flags(config))
    message = result.stderr.strip()
    assert result.returncode == 1
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    assert named in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"iterations": -1}, "iterations"),
        ({"iterations": 0, "start": "vanilla"}, "iterations must be at least 1"),
        ({"start": "M1"}, "start should be one of M0, vanilla"),
        ({"sft_data": "mine"}, "sft_data should be one of"),
        ({"sft_data": "synthetic", "synthetic": ()}, "needs synthetic dialogues"),
        ({"first_speaker": "swap"}, "first_speaker should be drop or seeker"),
        ({"beta": 0.0}, "beta"),
        ({"top_p": 2.0}, "top_p"),
        ({"style": "x"}, "style"),
    ],
)
def test_settings_are_checked_where_they_are_made(world: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        configuration(world, Path("unused"), **changes)


def test_a_run_has_one_seed() -> None:
    base = {"backbone": BackboneSettings("b"), "data": DataSettings("e"), "out": "o"}
    for part in ({"training": TrainSettings(seed=1)}, {"replies": RefineSettings(Sampling(seed=1))}):
        with pytest.raises(ValueError, match="a run has one seed"):
            EvolveConfig(**(base | part))


def test_the_papers_values_are_the_defaults() -> None:
    config = flatten(EvolveConfig(backbone=BackboneSettings("b"), data=DataSettings("e"), out="o"))
    paper = {
        "iterations": 2, "rank": 8, "alpha": 16.0, "learning_rate": 5e-6, "epochs": 2, "batch_size": 4,
        "accumulation": 2, "warmup": 0.01, "patience": 3, "beta": 0.1, "gamma": 1.0, "replay_count": 500,
        "temperature": 0.9, "top_p": 0.8, "top_k": 50, "repetition_penalty": 1.2, "tries": 3,
    }  # fmt: skip
    assert {name: config[name] for name in paper} == paper


def test_every_setting_is_a_documented_flag() -> None:
    result = subprocess.run([sys.executable, str(ITERATE), "--help"], capture_output=True, text=True, check=True)
    for name in leaves(EvolveConfig):
        assert f"--{name.replace('_', '-')}" in result.stdout
    assert "--resume" in result.stdout
