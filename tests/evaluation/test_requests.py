"""Old numbers never stand under a new name: what was computed from something else is refused, or computed beside it."""

# ruff: noqa: F401, F811  (fixtures are imported, and named as arguments)
from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import abilities
import ablate
import chat
import describe
import evaluate
import faulty
import judge
import pytest
import report
from chat_server import Server, says, server  # a fixture
from faulty import output
from runs import world  # a fixture
from safetensors.torch import load_file, save_file

from selfevo.decoupled.evaluate import score_replies_of
from selfevo.decoupled.planner import Labelled
from selfevo.dialogue import Example, Turn
from selfevo.evaluation import columns, score
from selfevo.evaluation.folder import check_name, write_examples
from selfevo.evaluation.judgements import read_judgings
from selfevo.evaluation.local_responder import LocalResponder
from selfevo.evaluation.score import missing_scores, read_report, score_answers
from selfevo.evaluation.tables import markdown_table
from selfevo.files import FileError, read_json, read_jsonl, write_json, write_jsonl
from selfevo.generate import Sampling
from selfevo.lora import inject_lora, save_adapter
from selfevo.models import load_model, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def _no_extras() -> Iterator[None]:
    """METEOR and BERTScore are computed where a test says so, and no figures are drawn: their packages take long to
    load."""
    with mock.patch.object(score, "EXTRAS", ()), mock.patch.dict(sys.modules, {"matplotlib": None, "sklearn": None}):
        yield


def refuses(main: Callable[[], int], *argv: object, says: str = "") -> None:
    faulty.assert_program_refuses(main, *argv, mentions=(says,), kind="requests")


@pytest.fixture(scope="module")
def answered(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the backbone has answered under the name ``a``."""
    folder = tmp_path_factory.mktemp("answered")
    for seed in range(2):
        model = load_model(world / "backbone")
        inject_lora(model, rank=1 + seed)
        save_adapter(model, folder / f"adapter-{seed}")
    output(evaluate.main, folder, "--test", world / "test.json", "--max-new-tokens", 8, "--model", own(world))
    return folder


def own(world: Path, name: str = "a") -> str:
    return f"{name}={world / 'backbone'}"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["--model", "a=BACKBONE@ADAPTER"], "now 'BACKBONE@ADAPTER'"),
        (["--model", "a=BACKBONE", "--temperature", "0.5"], "temperature was 0.9, now 0.5"),
        (["--model", "a=BACKBONE", "--seed", "3"], "seed was"),
        (["--model", "a=BACKBONE", "--top-p", "0.5"], "top p was 0.8, now 0.5"),
        (["--model", "a=BACKBONE", "--repetition-penalty", "1"], "repetition penalty was 1.2, now 1.0"),
        (["--model", "a=BACKBONE", "--style", "vanilla"], "style was 'strategy', now 'vanilla'"),
        (["--model", "a=BACKBONE", "--prompts", "refine"], "refining was False, now True"),
        (["--model", "a=BACKBONE", "--prompts-file", "PROMPTS"], "prompts was"),
        (["--model", "a=BACKBONE", "--chat-format", "plain"], "chat format was '', now 'plain'"),
        (["--model", "a=BACKBONE", "--dtype", "bfloat16"], "dtype was 'float32', now 'bfloat16'"),
        (["--model", "a=BACKBONE", "--test", "OTHER"], "holds other test turns"),
        (["--model", "a=BACKBONE", "--test", "TEST", "--limit", "1"], "holds other test turns"),
        (["--model", "a=BACKBONE", "--test", "TEST", "--skip-greetings"], "holds other test turns"),
        (["--model", "a=CHANGED"], "now 'CHANGED'"),
    ],
)
def test_another_request_under_a_name_is_refused(
    answered: Path, world: Path, tmp_path: Path, changes: list[str], told: str
) -> None:  # fmt: skip
    changed = shutil.copytree(world / "backbone", tmp_path / "changed")
    settings = read_json(changed / "config.json")
    write_json(changed / "config.json", settings | {"rms_norm_eps": 1e-5})
    (tmp_path / "prompts.json").write_text('{"strategy": "Be kind."}')
    (tmp_path / "other.json").write_text(json.dumps(read_json(world / "esconv.json")[2:4]))
    names = {"BACKBONE": world / "backbone", "ADAPTER": answered / "adapter-0", "PROMPTS": tmp_path / "prompts.json"}
    names |= {"OTHER": tmp_path / "other.json", "TEST": world / "test.json", "CHANGED": changed}
    for word, path in names.items():
        changes, told = [argument.replace(word, str(path)) for argument in changes], told.replace(word, str(path))
    before = contents(answered)
    refuses(
        evaluate.main,
        answered,
        *([] if "--max-new-tokens" in changes else ["--max-new-tokens", "8"]),
        *changes,
        says=told,
    )
    assert contents(answered) == before


def test_the_same_files_at_another_place_are_the_same_model(answered: Path, world: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(world / "backbone", tmp_path / "moved")
    before = contents(answered / "eval")
    output(evaluate.main, answered, "--max-new-tokens", 8, "--model", f"a={moved}")
    assert contents(answered / "eval") == before | {
        str(answered / "eval" / "table-paper.md"): (answered / "eval" / "table-paper.md").read_bytes()
    }


def test_what_changed_in_its_place_is_another_model(answered: Path, world: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(answered / "adapter-0", tmp_path / "adapter")
    backbone = shutil.copytree(world / "backbone", tmp_path / "backbone")
    arguments = [tmp_path, "--test", world / "test.json", "--max-new-tokens", 8, "--model", f"a={backbone}@{adapter}"]
    output(evaluate.main, *arguments)
    weights = load_file(backbone / "model.safetensors")
    first = sorted(weights)[0]
    save_file(weights | {first: 1.001 * weights[first]}, backbone / "model.safetensors")
    refuses(evaluate.main, *arguments, says="backbone sha256 was")
    shutil.copy(world / "backbone" / "model.safetensors", backbone)
    output(evaluate.main, *arguments)
    shutil.rmtree(adapter)
    shutil.copytree(answered / "adapter-1", adapter)
    refuses(evaluate.main, *arguments, says="adapter sha256 was")


def test_replies_whose_request_is_unknown_are_not_taken_over(answered: Path, world: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(answered, tmp_path / "copy")
    (folder / "eval" / "a.request.json").unlink()
    arguments = [folder, "--max-new-tokens", 8, "--model", own(world)]
    refuses(evaluate.main, *arguments, says="holds a.json and a.replies.jsonl without a note of the request")
    (folder / "eval" / "a.json").unlink()
    refuses(evaluate.main, *arguments, says="holds a.replies.jsonl without")
    (folder / "eval" / "a.replies.jsonl").rename(folder / "eval" / "a.replies.jsonl.unfinished")
    refuses(evaluate.main, *arguments, says="holds a.replies.jsonl.unfinished without")


NAMES = (
    "meta/x", "a|b", "", ".", "..", "../a", "a\tb", "a\nb", "a\x1b[31m", " a", "a ", "a.", "+a", "x" * 300, "é" * 60,
    "scores", "Tables", "examples", "golden", "judge-cache", "a.judge", "a.request", "a.esconv", "a.values",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_cannot_be_one_is_refused_before_anything_is_sampled(
    name: str, tmp_path: Path, world: Path
) -> None:
    arguments = ["--test", world / "test.json", "--model", own(world), "--model", f"{name}={world / 'backbone'}"]
    refuses(evaluate.main, tmp_path / "new", *arguments, says="name")
    assert not (tmp_path / "new").exists()


def test_names_as_people_give_them_are_names() -> None:
    for name in ("base", "M2", "Qwen2-7B-Instruct", "Qwen2.5-7B", "our model +SFT", "模型", "llama_3.1"):
        check_name(name)


@pytest.mark.parametrize(
    ("models", "told"),
    [
        (["a=BACKBONE", "b=nowhere"], "nowhere"),
        (["a=BACKBONE", "a=BACKBONE@ADAPTER"], "give the name a twice"),
        (["a=BACKBONE", "b=BACKBONE@nowhere"], "nowhere"),
        (["a=BACKBONE", "b=BACKBONE@"], "expected NAME=BACKBONE"),
        (["a=BACKBONE", "b="], "expected NAME=BACKBONE"),
        (["a=BACKBONE", "BACKBONE"], "expected NAME=BACKBONE"),
    ],
)
def test_nothing_is_sampled_where_a_later_model_is_impossible(
    answered: Path, world: Path, tmp_path: Path, models: list[str], told: str
) -> None:  # fmt: skip
    given = [
        m.replace("BACKBONE", str(world / "backbone")).replace("ADAPTER", str(answered / "adapter-0")) for m in models
    ]
    flags = [argument for model in given for argument in ("--model", model)]
    refuses(evaluate.main, tmp_path / "new", "--test", world / "test.json", *flags, says=told)
    assert not (tmp_path / "new").exists()


# --- flags without effect ---------------------------------------------------------------------------------------------

ASKING = ["--test", "T", "--prompts", "vanilla", "--limit", "1", "--first-speaker", "seeker", "--skip-greetings",
          "--style", "vanilla", "--prompts-file", "P", "--temperature", "0.5", "--top-p", "0.5", "--top-k", "3",
          "--repetition-penalty", "1", "--max-new-tokens", "8", "--reflection-tokens", "9", "--reflection", "guided",
          "--tries", "2", "--slots", "2", "--seed", "1", "--dtype", "float32", "--device", "cpu", "--revision", "main",
          "--chat-format", "plain"]  # fmt: skip


def split(arguments: list[str]) -> list[list[str]]:
    flags: list[list[str]] = []
    for argument in arguments:
        if argument.startswith("--"):
            flags.append([])
        flags[-1].append(argument)
    return flags


@pytest.mark.parametrize("flag", split(ASKING), ids=" ".join)
def test_a_flag_for_models_that_answer_needs_one(answered: Path, flag: list[str]) -> None:
    refuses(evaluate.main, answered, *flag, says=f"{flag[0]} has no effect here")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "b=BACKBONE", "--limit=1"],
        ["--model", "b=BACKBONE", "--first-speaker", "seeker"],
        ["--model", "b=BACKBONE", "--skip-greetings"],
        ["--model", "b=BACKBONE", "--tries", "2"],
        ["--model", "b=BACKBONE", "--reflection", "guided"],
        ["--model", "b=BACKBONE", "--reflection-tokens", "9"],
        ["--model", "b=BACKBONE", "--style", "vanilla", "--prompts", "strategy"],
        ["--model", "b=BACKBONE", "--max-new-tokens", "9", "--prompts", "self-reflection"],
        ["--model", "b=BACKBONE", "--revision", "main"],
        ["--model", "b=BACKBONE", "--top-k", "3", "--temperature", "0"],
        ["--model", "b=BACKBONE", "--seed", "3", "--temperature", "0"],
        ["--bert-model", "x", "--convention", "characters"],
        ["--bert-model", "x", "--extras", "METEOR"],
        ["--bert-model", "x", "--extras"],
        ["--baseline", "a"],
    ],
    ids=" ".join,
)
def test_a_flag_that_changes_nothing_in_this_call_is_an_error(
    answered: Path, world: Path, arguments: list[str]
) -> None:
    given = [argument.replace("BACKBONE", str(world / "backbone")) for argument in arguments]
    refuses(evaluate.main, answered, *given, says="has no effect here")
    assert not (answered / "eval" / "b.request.json").exists()


@pytest.mark.parametrize(
    ("main", "arguments", "told"),
    [
        (judge.main, ["FOLDER", "--judge", "j", "--concurrency", "2"], "--concurrency has no effect"),
        (judge.main, ["FOLDER", "--judge", "j", "--timeout=3"], "--timeout has no effect"),
        (judge.main, ["FOLDER", "--judge", "j", "--contexts", "0", "--seed", "1"], "--seed has no effect"),
        (judge.main, ["FOLDER", "--judge", "j", "--contexts", "-1"], "--contexts should be"),
        (judge.main, ["FOLDER", "--judge", "j", "--joint", "--aspects", "personalisation"], "--joint has no effect"),
        (judge.main, ["FOLDER", "--judge", "j", "--aspects", "paper", "paper"], "two of one name"),
        (chat.main, ["--backbone", "b", "--models", "vanilla", "vanilla"], "given twice"),
        (chat.main, ["--backbone", "b", "--models", "M3"], "b: has no model M3"),
        (chat.main, ["DECOUPLED", "--reflect"], "--reflect has no effect"),
        (describe.main, ["x.json", "x.json"], "given twice"),
        (describe.main, ["x.json", "--ra"], "--ra"),
        (report.main, ["RUN", "--baseline", "M7"], "the baseline M7 has no scores"),
        (report.main, ["RUN", "--base", "M1"], "--base"),
        (ablate.main, ["seeds", "--out", "OUT", "--seed", "3"], "--seed has no effect"),
        (ablate.main, ["seeds", "--out", "OUT", "--seeds", "1", "1"], "given twice"),
        (ablate.main, ["seeds", "--out", "OUT", "--resume"], "--resume has no effect"),
        (ablate.main, ["seeds", "--out", "OUT", "--memory"], "--memory has no effect"),
        (ablate.main, ["controls", "--out", "OUT", "--control", "swapped"], "--control has no effect"),
        (ablate.main, ["preferences", "--out", "OUT", "--chosen", "golden"], "--chosen has no effect"),
        (ablate.main, ["baselines", "--out", "OUT", "--sft-data", "synthetic"], "--sft-data has no effect"),
        (abilities.main, ["RUN", "RUN"], "given twice"),
        (abilities.main, ["RUN", "--tasks", "a", "a"], "given twice"),
        (abilities.main, ["RUN", "--limit", "-1"], "--limit and --shots"),
    ],
)
def test_flags_of_the_other_commands(
    answered: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    main: Callable[[], int],
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", mock.Mock())
    run = shutil.copytree(ROOT / "tests" / "data" / "run-0.1", tmp_path / "run")
    pair = tmp_path / "decoupled" / "joint-sft"
    pair.mkdir(parents=True)
    (pair / "adapter_config.json").write_text("{}")
    settings = {"backbone": "b", "esconv": "e", "out": "o", "planning": "likeliest"}
    write_json(pair.parent / "config.json", {"settings": settings})
    names = {"FOLDER": answered, "RUN": run, "OUT": tmp_path / "out", "DECOUPLED": pair.parent}
    refuses(main, *(names.get(argument, argument) for argument in arguments), says=told)
    assert not (tmp_path / "out").exists()


# --- a baseline -------------------------------------------------------------------------------------------------------


def turn(number: int) -> Example:
    return Example(
        f"d{number // 2}", number, (Turn("seeker", f"I am sad, {number}."),), Turn("supporter", f"Tell me {number}.")
    )


def folder_with(path: Path, golden: str = "Tell me", **replies: list[str]) -> Path:
    count = len(next(iter(replies.values())))
    write_examples(
        path, [Example(f"d{n // 2}", n, turn(n).context, Turn("supporter", f"{golden} {n}.")) for n in range(count)]
    )
    for name, texts in replies.items():
        write_jsonl(
            path / f"{name}.replies.jsonl", [{"index": i, "text": t, "turns_dropped": 0} for i, t in enumerate(texts)]
        )
    return path


def test_every_row_is_compared_with_the_baseline(tmp_path: Path) -> None:
    texts = {name: [f"{name} tells me {n}" for n in range(6)] for name in ("b", "M0", "M1", "a")}
    folder_with(tmp_path / "eval", **texts)
    rows = [line.split(" | ")[0] for line in output(evaluate.main, tmp_path).splitlines() if " - " in line]
    assert rows == ["| M1 - M0", "| a - M0", "| b - M0"]
    rows = [
        line.split(" | ")[0]
        for line in output(evaluate.main, tmp_path, "--baseline", "a").splitlines()
        if " - " in line
    ]
    assert rows == ["| M0 - a", "| M1 - a", "| b - a"]
    refuses(evaluate.main, tmp_path, "--baseline", "c", says="has no such model; it has M0, M1, a, b")
    (tmp_path / "eval" / "vanilla.replies.jsonl").write_bytes((tmp_path / "eval" / "b.replies.jsonl").read_bytes())
    assert "| M0 - vanilla |" in output(evaluate.main, tmp_path)


def test_a_cell_cannot_break_a_table() -> None:
    assert markdown_table(["a|b", "c"], {"x\ny": ["1 | 2"]}) == "| a\\|b | c |\n|---|---|\n| x y | 1 \\| 2 |"


# --- columns that are there stay --------------------------------------------------------------------------------------


def test_meteor_of_version_0_1_stays_while_the_replies_are_the_same(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ROOT / "tests" / "data" / "run-0.1" / "eval", tmp_path / "eval"))
    stored, rows = read_json(folder / "M1.json"), read_jsonl(folder / "M1.values.jsonl")
    assert "replies_sha256" not in stored
    stored["scores"]["METEOR"] = {"value": 7.5, "signature": "meteor|mine"}
    write_json(folder / "M1.json", stored)
    write_jsonl(folder / "M1.values.jsonl", [row | {"METEOR": 7.5} for row in rows])
    assert score_answers(folder, "M1")["METEOR"] == 7.5
    replies = read_jsonl(folder / "M1.replies.jsonl")
    write_json(folder / "M1.json", stored)
    write_jsonl(folder / "M1.replies.jsonl", [replies[0] | {"text": "Tell me more."}, *replies[1:]])
    assert "METEOR" not in score_answers(folder, "M1")


def test_all_bertscores_of_a_folder_are_of_one_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def scores(hypotheses: list[str], references: list[str], model: str) -> tuple[list[float], str]:
        asked.append(model)
        return [50.0] * len(hypotheses), f"bert_score|model:{model}|layer:2"

    monkeypatch.setattr(columns, "_bert_score", scores)
    folder_with(tmp_path / "eval", a=["one", "two"])
    output(evaluate.main, tmp_path, "--bert-model", "X", "--extras", "BERTScore")
    folder_with(tmp_path / "eval", b=["one", "two"])
    refuses(
        evaluate.main, tmp_path, "--bert-model", "Y", "--extras", "BERTScore", says="its BERTScore is of X, not of Y"
    )
    shown = output(evaluate.main, tmp_path, "--extras", "BERTScore")
    assert shown.count(" 50.00 (50.00 to 50.00) |") == 2
    assert set(asked) == {"X"}
    before = len(asked)
    output(evaluate.main, tmp_path)
    assert len(asked) == before  # what is there is not computed again


def test_scores_given_in_different_ways_are_not_compared(tmp_path: Path) -> None:
    folder_with(tmp_path / "eval", M0=["one me", "two"], M1=["one", "me two"])
    output(evaluate.main, tmp_path)
    path = tmp_path / "eval" / "M1.json"
    stored = read_json(path)
    stored["scores"]["ROUGE-L"]["signature"] = stored["scores"]["ROUGE-L"]["signature"].replace("0.2.0", "0.1.0")
    write_json(path, stored)
    found = evaluate.compare_with(tmp_path / "eval", ["M0", "M1"], "M0", "paper")
    assert "ROUGE-L" not in found
    assert "BLEU-2" in found


def test_scores_of_other_replies_or_golden_ones_are_not_shown(tmp_path: Path) -> None:
    run = Path(shutil.copytree(ROOT / "tests" / "data" / "run-0.1", tmp_path / "run"))
    output(evaluate.main, run)
    replies = read_jsonl(run / "eval" / "M1.replies.jsonl")
    write_jsonl(run / "eval" / "M1.replies.jsonl", [replies[0] | {"text": "Tell me more."}, *replies[1:]])
    refuses(report.main, run, says="M1.json: has scores of another M1.replies.jsonl")


def test_words_of_a_script_without_spaces_are_told_and_characters_counted(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "eval", "你为什么难过", a=["你为什么这么难过", "请你告诉我"])
    told = output(evaluate.main, tmp_path)
    assert "score them with --convention characters" in told
    assert read_report(folder / "a.json")["scores"]["ROUGE-L"]["value"] < 1
    assert "score them" in missing_scores(folder, ["a"])[0]
    output(evaluate.main, tmp_path, "--convention", "characters")
    assert read_report(folder / "a.characters.json")["scores"]["ROUGE-L"]["value"] > 30
    assert read_report(folder / "a.characters.json")["missing"] == {}


# --- judges -----------------------------------------------------------------------------------------------------------


def judging(run: Path, server: Server, *changes: object) -> str:
    arguments = ["--judge-url", server.url, "--contexts", 3, "--aspects", "personalisation", *changes]
    return output(judge.main, run, *([] if "--judge" in changes else ["--judge", "j"]), *arguments)


def test_every_judge_has_a_table_of_its_own(tmp_path: Path, server: Server) -> None:
    run = Path(shutil.copytree(ROOT / "tests" / "data" / "run-0.1", tmp_path / "run"))
    server.script = [says(json.dumps({"explanation": "e", "score": 3}))]
    criteria = tmp_path / "mine.json"
    criteria.write_text('[{"name": "Personalisation", "levels": {"1": "no", "5": "yes"}}]')
    ways = [["--models", "M0"], ["--judge", "other/k"], ["--temperature", "0.1"], ["--seed", 1], ["--contexts", 4],
            ["--aspects", criteria], ["--judge-parameter", "x=1"]]  # fmt: skip
    for way in ways:
        judging(run, server, *way)
    judging(run, server, "--models", "M1")  # beside M0, by the same judge
    found = read_judgings(run / "eval")
    assert len(found) == len(ways)
    assert sorted(len(one["reports"]) for one in found) == [2] * len(ways)
    output(report.main, run)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("Mean scores by the judge j") == 3 * (len(ways) - 1)  # a caption and two labels
    assert page.count("Mean scores by the judge other/k") == 3
    replies = read_jsonl(run / "eval" / "M1.replies.jsonl")
    write_jsonl(run / "eval" / "M1.replies.jsonl", [replies[0] | {"text": "Tell me more."}, *replies[1:]])
    with pytest.raises(FileError, match="judges other replies than"):
        read_judgings(run / "eval")


def test_judges_of_version_0_1_have_their_tables_too(tmp_path: Path) -> None:
    one = {"answered": 2, "failures": {}, "scores": {"Empathy": {"mean": 3.0, "interval": [2, 4]}}}
    for name, judge_ in (("M0", "j"), ("M1", "j"), ("M2", "k")):
        write_json(tmp_path / f"{name}.judge.json", one | {"judge": judge_})
    assert [(one["judge"], list(one["reports"])) for one in read_judgings(tmp_path)] == [
        ("j", ["M0", "M1"]),
        ("k", ["M2"]),
    ]


def test_a_local_judge_that_changed_in_its_place_is_asked_again(tmp_path: Path, world: Path) -> None:
    model, tokenizer = load_model(world / "backbone"), load_tokenizer(world / "backbone")
    asked = [[{"role": "user", "content": "Say 3."}]]
    for content in ("1", "1", "2"):
        responder = LocalResponder(
            model, tokenizer, "j", tmp_path, sampling=Sampling(), max_new_tokens=4, content=content
        )
        responder.answer(asked)
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_decoupled_replies_that_changed_or_another_judge_are_scored_anew(tmp_path: Path) -> None:
    turns = [Labelled(turn(n), "Question") for n in range(2)]
    asked = []

    def errors(cases: list[object], counts: object) -> list[set[str]]:
        asked.append(cases)
        return [set() for _ in cases]

    for replies in (["one", "two"], ["one", "two"], ["one", "me"]):
        score_replies_of(turns, [("Question", text) for text in replies], tmp_path / "x.json", errors, None)
    assert len(asked) == 2


# --- abilities --------------------------------------------------------------------------------------------------------


def test_abilities_are_bound_to_what_they_were_measured_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "lm_eval", mock.Mock())
    monkeypatch.setattr(abilities, "checkpoint", lambda *_: contextlib.nullcontext(tmp_path))
    measured = []

    def measure(folder: Path, tasks: list[str], options: object) -> dict[str, dict[str, object]]:
        measured.append(tasks)
        return {task: {"metric": "acc,none", "value": float(len(measured)), "stderr": None} for task in tasks}

    monkeypatch.setattr(abilities, "measure", measure)
    runs = [Path(shutil.copytree(ROOT / "tests" / "data" / "run-0.1", tmp_path / name / "run")) for name in "ab"]
    shown = output(abilities.main, *runs, "--tasks", "t")
    assert len(measured) == 5  # one backbone, two models of each run
    assert [line.split(" | ")[0] for line in shown.splitlines() if "| t" not in line and line.startswith("| ")] == [
        "| vanilla", "| M0", "| M1", f"| {runs[1]} M0", f"| {runs[1]} M1"
    ]  # fmt: skip
    assert shown.endswith(output(abilities.main, *runs, "--tasks", "t"))
    assert len(measured) == 5
    refuses(abilities.main, runs[0], "--tasks", "t", "--limit", "3", says="limit was 0, now 3")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "t.yaml").write_text("task: t")
    refuses(abilities.main, runs[0], "--tasks", "t", "--include-path", tasks, says="include sha256 was")
    shutil.copy(runs[0] / "M0" / "adapter_model.safetensors", runs[0] / "M1" / "adapter_model.safetensors")
    refuses(abilities.main, runs[0], "--tasks", "t", says="M1 was measured on t otherwise (adapter sha256 was")
