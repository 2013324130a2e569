"""Evaluating, judging and exporting as a user does it: commands, files, resuming, other test turns, bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_server import Server, says
from runs import ITERATE, finished, records, world  # noqa: F401  (fixtures)
from transformers import AutoModelForCausalLM

from selfevo.dialogue import Example, Turn
from selfevo.evaluation import compare
from selfevo.evaluation.folder import read_answers, read_examples, write_examples
from selfevo.evaluation.score import compare_models, missing_scores, score_answers
from selfevo.files import FileError, read_json, read_jsonl, write_jsonl
from selfevo.lora import inject_lora, load_adapter, save_adapter
from selfevo.models import load_model


def example(name: str, *arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ITERATE.with_name(f"{name}.py")), *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, input=said, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A copy of a finished run, to be written to."""
    return shutil.copytree(finished, tmp_path / "run")


def turn(number: int, dialogue: int) -> Example:
    context = (Turn("seeker", f"I am sad, {number}."),)
    return Example(f"d{dialogue}", number, context, Turn("supporter", f"Tell me more of {number}."))


def folder_with(path: Path, **replies: list[str | None]) -> Path:
    write_examples(path, [turn(i, i // 2) for i in range(len(next(iter(replies.values()))))])
    for name, texts in replies.items():
        write_jsonl(
            path / f"{name}.replies.jsonl",
            [{"index": i, "text": t, "tokens": 3, "cut": False, "turns_dropped": 0} for i, t in enumerate(texts)],
        )
    return path


# --- the evaluation folder --------------------------------------------------------------------------------------------


def test_test_turns_come_back_as_they_were_and_others_are_refused(tmp_path: Path) -> None:
    examples = [turn(i, 0) for i in range(3)]
    write_examples(tmp_path, examples)
    assert read_examples(tmp_path) == examples
    write_examples(tmp_path, examples)
    with pytest.raises(FileError, match="other test turns"):
        write_examples(tmp_path, examples[:2])


def test_a_turn_that_did_not_fit_is_left_out_and_counted(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, A=["Tell me more.", None, "No."])
    assert [text for _, text in read_answers(folder, "A")] == ["Tell me more.", "No."]
    score_answers(folder, "A")
    report = read_json(folder / "A.json")
    assert (report["replies"], report["left_out_too_long"]) == (2, 1)
    assert [record["id"] for record in read_jsonl(folder / "A.values.jsonl")] == ["d0#0", "d1#2"]


def test_models_are_compared_on_the_turns_that_both_answered(tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path, A=["Tell me more.", None, "No.", "Why of 3?"], B=["Tell me more of 0.", "x", None, "Tell me of 3."]
    )
    for name in ("A", "B"):
        score_answers(folder, name)
    rows = {name: {r["id"]: r for r in read_jsonl(folder / f"{name}.values.jsonl")} for name in ("A", "B")}
    shared = ["d0#0", "d1#3"]
    expected = compare([rows["A"][i]["BLEU-2"] for i in shared], [rows["B"][i]["BLEU-2"] for i in shared], ["d0", "d1"])
    found = compare_models(folder, "A", "B")
    assert found["BLEU-2"] == expected
    assert "Distinct-2 (corpus)" not in found


def test_an_unfinished_rollout_is_not_scored(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, A=["one", "two"])
    write_jsonl(folder / "A.replies.jsonl", read_jsonl(folder / "A.replies.jsonl")[:1])
    with pytest.raises(FileError, match="holds 1 of 2 replies"):
        score_answers(folder, "A")


def test_what_was_once_computed_stays_as_long_as_the_replies_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_with(tmp_path, A=["one", "two"])
    score_answers(folder, "A")
    report = read_json(folder / "A.json")
    assert "METEOR" not in report["scores"]
    assert "downloader wordnet" in report["missing"]["METEOR"]
    assert missing_scores(folder, ["A"])[0] == f"{report['missing']['METEOR']}."
    monkeypatch.setattr("selfevo.evaluation.columns._meteor", lambda hyps, refs: ([10.0, 20.0], "meteor|mine"))
    score_answers(folder, "A", extras=["METEOR"])
    monkeypatch.undo()
    assert score_answers(folder, "A")["METEOR"] == 15.0
    assert "METEOR" not in read_json(folder / "A.json")["missing"]
    assert [record["METEOR"] for record in read_jsonl(folder / "A.values.jsonl")] == [10.0, 20.0]
    folder_with(tmp_path, A=["one", "three"])
    assert "METEOR" not in score_answers(folder, "A")
    assert "METEOR" not in read_jsonl(folder / "A.values.jsonl")[0]


def test_scoring_again_keeps_what_was_counted_while_answering(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, A=["one", "two"])
    first = score_answers(folder, "A", counts={"refined": 2})
    assert score_answers(folder, "A") == first
    assert read_json(folder / "A.json")["refined"] == 2


# --- examples/evaluate.py ---------------------------------------------------------------------------------------------


def test_a_run_is_scored_again_without_its_models(run: Path) -> None:
    before = read_json(run / "eval" / "M1.json")
    for name in ("M0", "M1", "M2"):
        shutil.rmtree(run / name)
    done = example("evaluate", str(run))
    assert done.returncode == 0, done.stderr
    assert read_json(run / "eval" / "M1.json") == before
    assert "| M2 - vanilla |" in done.stdout
    assert (run / "eval" / "table-paper.md").read_text().strip() in done.stdout


def test_any_checkpoint_answers_the_runs_turns_or_a_files(run: Path, world: Path, tmp_path: Path) -> None:  # noqa: F811
    backbone = world / "backbone"
    again = f"again={backbone}@{run / 'M1'}"
    done = example("evaluate", str(run), "--model", again, "--prompts", "vanilla")
    assert done.returncode == 0, done.stderr
    assert records(run / "eval" / "again.replies.jsonl") == records(run / "eval" / "M1.replies.jsonl")
    other = tmp_path / "other"
    flags = ["--test", str(world / "test.json"), "--max-new-tokens", "12", "--reflection-tokens", "16", "--tries", "1"]
    done = example("evaluate", str(other), *flags, "--model", f"m={backbone}", "--prompts", "self-reflection", "refine")
    assert done.returncode == 0, done.stderr
    assert read_examples(other / "eval") == read_examples(run / "eval")
    assert "| m-self-reflection - m-refine |" in done.stdout
    sampled = (other / "eval" / "m-refine.replies.jsonl").stat().st_mtime_ns
    assert example("evaluate", str(other), *flags, "--model", f"m={backbone}", "--prompts", "self-reflection", "refine")
    assert (other / "eval" / "m-refine.replies.jsonl").stat().st_mtime_ns == sampled


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "holds no replies of a model"),
        (["nowhere", "--model", "a=b"], "examples.jsonl: there is no such file"),
        (["RUN", "--model", "backbone"], "expected NAME=BACKBONE"),
        (["RUN", "--test", "test.json"], "--test has no effect here"),
        (["RUN", "--model", "a=nowhere"], "nowhere"),
        (["RUN", "--extras", "METEOR"], "nltk.downloader wordnet"),
    ],
)
def test_bad_input_is_one_sentence(run: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = example("evaluate", *[{"RUN": str(run)}.get(a, a) for a in arguments])
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# --- examples/judge.py ------------------------------------------------------------------------------------------------


def test_a_run_is_judged_and_compared_with_people_and_the_second_time_is_free(run: Path, server: Server) -> None:
    def by_length(handler: Any) -> None:
        asked = server.requests[-1]["messages"][1]["content"]
        says(json.dumps({"explanation": "e", "score": 1 + len(asked) % 5}))(handler)

    server.script = [by_length]
    people = run / "people.jsonl"
    examples = read_examples(run / "eval")
    scores = [{"Empathy": 1 + i % 2, "Overall": 3} for i in range(len(examples))]
    write_jsonl(people, [{"model": "M1", "id": e.id, "scores": s} for e, s in zip(examples, scores)])
    arguments = [str(run), "--judge-url", server.url, "--judge", "j", "--human", str(people)]
    done = example("judge", *arguments)
    assert done.returncode == 0, done.stderr
    asked = len(server.requests)
    assert 0 < asked <= 4 * 7 * len(examples)
    assert {request["top_k"] for request in server.requests} == {50}
    head, _, *rows, correlations = [
        line.strip("| ").split(" | ") for line in done.stdout.split("\n\n")[0].splitlines() if "|" in line
    ]
    names = ["Coherence", "Understanding", "Empathy", "Engagement", "Informativeness", "Helpfulness", "Overall"]
    assert head == ["model", *names, "judged", "failures"]
    assert [(row[0], row[8:]) for row in rows] == [
        (name, [str(len(examples)), "none"]) for name in ("vanilla", "M0", "M1", "M2")
    ]
    (judging,) = (run / "eval" / "judged").iterdir()
    judged = {record["id"]: record for record in read_jsonl(judging / "M1.jsonl")}
    expected = np.corrcoef([judged[e.id]["scores"]["Empathy"] for e in examples], [s["Empathy"] for s in scores])[0, 1]
    assert correlations[0] == "Pearson r"
    assert correlations[3].startswith(f"{expected:.2f} (")
    assert correlations[3].endswith(f", {len(examples)})")
    assert correlations[7] == "–"  # people without variation
    assert {record["reasons"]["Overall"] for record in judged.values()} == {"e"}
    assert example("judge", *arguments).stdout == done.stdout
    assert len(server.requests) == asked


def test_contexts_are_drawn_at_random_and_are_the_same_for_every_model(run: Path, server: Server) -> None:
    server.script = [says(json.dumps({"explanation": "e", "score": 3}))]
    drawn = []
    for seed in "0", "0", "1":
        arguments = ["--judge", "j", "--contexts", "3", "--seed", seed, "--aspects", "personalisation"]
        assert example("judge", str(run), "--judge-url", server.url, *arguments).returncode == 0
        judging = max((run / "eval" / "judged").iterdir(), key=lambda path: (path / "M2.json").stat().st_mtime_ns)
        ids = [[r["id"] for r in read_jsonl(judging / f"M{i}.jsonl")] for i in range(3)]
        assert ids[0] == ids[1] == ids[2]
        drawn.append(ids[0])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 3
    assert drawn[0] != [e.id for e in read_examples(run / "eval")[:3]]


def test_a_judge_of_whom_nothing_can_be_used_is_an_error(run: Path, server: Server) -> None:
    server.script = [says("no JSON")]
    arguments = ["--judge", "j", "--contexts", "2", "--aspects", "personalisation", "--models", "M1"]
    done = example("judge", str(run), "--judge-url", server.url, *arguments)
    assert done.returncode == 1
    assert "| M1 | – | 0 | given_up 2, not_json 6 |" in done.stderr
    assert "no reply could be judged" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--judge", "j", "--judge-url", "http://127.0.0.1:9/v1"], "is the server running"),
        (["RUN", "--judge", "j", "--judge-url", "127.0.0.1"], "should begin with http"),
        (["RUN", "--judge", "nowhere"], "nowhere"),
        (["nowhere", "--judge", "j", "--judge-url", "http://127.0.0.1:9/v1"], "holds no replies"),
        (["RUN", "--judge", "j", "--judge-url", "http://127.0.0.1:9/v1", "--human", "BAD"], "record 0"),
    ],
)
def test_a_judge_that_cannot_work_is_one_sentence(
    run: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "bad.json").write_text('[{"model": "M1"}]')
    names = {"RUN": str(run), "BAD": str(tmp_path / "bad.json")}
    timeout = ["--timeout", "1"] if "--judge-url" in arguments else []
    done = example("judge", *[names.get(a, a) for a in arguments], *timeout)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# --- examples/export.py -----------------------------------------------------------------------------------------------


def test_an_exported_model_has_our_logits_in_transformers(run: Path, world: Path, tmp_path: Path) -> None:  # noqa: F811
    arguments = ["--backbone", str(world / "backbone"), "--adapter", str(run / "M2"), "--out", str(tmp_path / "out")]
    done = example("export", *arguments)
    assert done.returncode == 0, done.stderr
    ours = load_model(world / "backbone")
    bare = ours(torch.arange(5, 45)[None])
    load_adapter(ours, run / "M2")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(5, 45)[None]
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-4, rtol=1e-4)
    assert (ours(tokens) - bare).abs().max() > 1e-3  # the adapter is in it
    again = example("export", *arguments)
    assert again.returncode == 1
    assert "is not empty" in again.stderr


def test_an_export_trains_in_trl_as_it_is(tmp_path: Path, run: Path) -> None:
    """The embedded backbone with the adapters of a run of it, on pairs of ours."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    root = ITERATE.parents[1]
    arguments = ["--backbone", str(root / "examples" / "embedded" / "backbone"), "--out", str(tmp_path / "out")]
    adapter = tmp_path / "adapter"
    model = load_model(root / "examples" / "embedded" / "backbone")
    inject_lora(model)
    save_adapter(model, adapter)
    done = example("export", *arguments, "--adapter", str(adapter))
    assert done.returncode == 0, done.stderr
    data = load_dataset("json", data_files=str(run / "M1" / "pairs.jsonl"), split="train", cache_dir=str(tmp_path))
    config = DPOConfig(
        output_dir=str(tmp_path / "trl"), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        bf16=False, save_strategy="no",
    )  # fmt: skip
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), args=config,
        train_dataset=data.select_columns(["prompt", "chosen", "rejected"]),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "out"),
    )  # fmt: skip
    assert np.isfinite(trainer.train().training_loss)


def test_pairs_are_exported_by_the_rules_of_llama_factorys_converter(run: Path, tmp_path: Path) -> None:
    """Of ranking data in sharegpt form: an odd number of turns, humans and models in turn, two answers."""
    files = [str(run / stage / "pairs.jsonl") for stage in ("M1", "M2")]
    done = example("export", "pairs", *files, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    ((name, description),) = read_json(tmp_path / "out" / "dataset_info.json").items()
    assert description["ranking"] is True
    assert description["formatting"] == "sharegpt"
    pairs = [pair for file in files for pair in records(Path(file))]
    exported = read_json(tmp_path / "out" / description["file_name"])
    assert len(exported) == len(pairs)
    assert f"dataset: {name}" in done.stdout
    for record, pair in zip(exported, pairs):
        assert set(record) == set(description["columns"].values())
        turns = record["conversations"]
        assert len(turns) % 2 == 1
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2) + ["human"]
        assert [record[side]["from"] for side in ("chosen", "rejected")] == ["gpt", "gpt"]
        texts = [pair["prompt"][0]["content"], *(message["content"] for message in pair["prompt"][1:])]
        assert [record["system"], *(turn["value"] for turn in turns)] == texts
        assert record["chosen"]["value"] == pair["chosen"][0]["content"]
    assert "is not empty" in example("export", "pairs", *files, "--out", str(tmp_path / "out")).stderr


# --- examples/chat.py -------------------------------------------------------------------------------------------------


def test_a_trained_model_answers_in_the_terminal_and_reflects(run: Path) -> None:
    done = example("chat", str(run), "--reflect", said="I am sad.\nNobody calls.\n\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("M2: ") == 2
    assert done.stdout.count("(the reflection cannot be read)") == 2  # by a model of random weights
    assert example("chat", str(run), "--reflect", said="I am sad.\nNobody calls.\n\n").stdout == done.stdout
    other = example("chat", str(run), "--model", "M0", "--seed", "1", said="I am sad.\nNobody calls.")
    assert (other.returncode, other.stdout.count("M0: ")) == (0, 2)


def test_a_script_is_played_to_several_models_side_by_side_and_kept(run: Path, tmp_path: Path) -> None:
    script = tmp_path / "case.txt"
    script.write_text("I am sad.\n\nNobody calls.\n", encoding="utf-8")
    done = example("chat", str(run), "--script", str(script), "--models", "vanilla", "M0", "M2")
    assert done.returncode == 0, done.stderr
    kept = (run / "chats" / "case.md").read_text(encoding="utf-8")
    assert kept.count("**user:** ") == done.stdout.count("you: ") == 2
    for name in ("vanilla", "M0", "M2"):
        said = [line.removeprefix(f"{name}: ") for line in done.stdout.splitlines() if line.startswith(f"{name}: ")]
        assert len(said) == 2
        assert all(f"**{name}:** {text}" in kept for text in said)
    alone = example("chat", str(run), "--model", "M2", said="I am sad.\nNobody calls.\n\n")
    second = [line for line in alone.stdout.splitlines() if "M2: " in line][1]
    assert second.split("M2: ")[1] in kept  # a conversation of its own, whoever else answers
    missing = example("chat", str(run), "--script", str(tmp_path / "no.txt"))
    assert (missing.returncode, "there is no such file" in missing.stderr) == (1, True)


def test_a_run_without_that_model_is_told(run: Path) -> None:
    done = example("chat", str(run), "--model", "M7")
    assert (done.returncode, done.stdout) == (1, "")
    assert "has no model M7; it has vanilla, M0, M1, M2" in done.stderr
