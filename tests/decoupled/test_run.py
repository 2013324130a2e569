"""Planner, generator and joint baseline: what they read and write, exact plans, mining, and a run from end to end."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decoupled import parse
from runs import ITERATE, records, world  # noqa: F401  (a fixture)
from safetensors.torch import load_file

from selfevo.datasets import load_dialogues, read_pairs
from selfevo.decoupled import DecoupledConfig, decouple
from selfevo.decoupled.mining import ERRORS, Case, error_prompt, find_errors, generator_pairs, planner_pairs
from selfevo.decoupled.planner import (
    Labelled,
    Plan,
    PlanSettings,
    draw_plans,
    generator_prompt,
    joint_prompt,
    joint_reply,
    labelled_turns,
    planner_prompt,
    read_joint,
    respond,
    sample_plans,
    score_plans,
)
from selfevo.dialogue import ESCONV_STRATEGIES, Dialogue, Example, Turn, clean_dialogue
from selfevo.evaluation.ask_json import Answer, Messages
from selfevo.evolve.run_folder import open_run
from selfevo.evolve.settings import change, compose
from selfevo.files import FileError
from selfevo.generate import Sampling
from selfevo.generate.replies import Reply, ReplySettings, sample_replies
from selfevo.lora import inject_lora, lora_parameters, remove_adapters, save_adapter
from selfevo.models import ChatTokenizer, Transformer, load_model, load_tokenizer
from selfevo.trie.trie import as_ids, shared_prefix

EXAMPLE = ITERATE.with_name("decoupled.py")
GREEDY = Sampling(0.0, 1.0, 0, 1.0)
CONTEXT = (
    Turn("seeker", "I lost my job."),
    Turn("supporter", "How did it happen?", ("Question",)),
    Turn("seeker", "They said nothing."),
)


@pytest.fixture(scope="module")
def backbone(world: Path) -> tuple[Transformer, ChatTokenizer]:  # noqa: F811
    return load_model(world / "backbone"), load_tokenizer(world / "backbone")


def turn(strategies: Sequence[str] = ("Question",), text: str = "Why?", number: int = 0) -> Labelled:
    golden = Turn("supporter", text, tuple(strategies))
    return Labelled(Example(f"file/{number}", 3, CONTEXT, golden), strategies[0])


def records_of(count: int) -> list[dict[str, Any]]:
    """Dialogues in ESConv's schema whose strategies go round."""
    made = []
    for number in range(count):
        said = []
        for place in range(4):
            name = ESCONV_STRATEGIES[(number + place) % 8]
            said.append({"speaker": "seeker", "annotation": {}, "content": f"It is {number} and {place}."})
            said.append({"speaker": "supporter", "annotation": {"strategy": name}, "content": f"Hm, {place}: {name}."})
        made.append({"dialog": said})
    return made


def test_turns_are_labelled_by_the_first_of_the_eight() -> None:
    turns = (
        Turn("seeker", "a"), Turn("supporter", "b", ("Chatter", "Others", "Question")),
        Turn("seeker", "c"), Turn("supporter", "d"),
        Turn("seeker", "e"), Turn("supporter", "f", ("Information",)),
    )  # fmt: skip
    counts: Counter[str] = Counter()
    found = labelled_turns([Dialogue("x", turns)], counts)
    assert [(one.strategy, one.example.golden.text) for one in found] == [("Others", "b"), ("Information", "f")]
    assert counts == {"labelled": 2, "without_strategy_left_out": 1, "several_strategies": 1}


def test_the_published_messages_have_the_strategies_of_esconv(shared: Path) -> None:
    """Both files hold the same 130 dialogues, one with [Strategy] before the text, one with annotations."""
    sides = []
    for name in ("ESC_sft_val.json", "esconv_sample.json"):
        dialogues = [clean_dialogue(dialogue, Counter()) for dialogue in load_dialogues(shared / "data" / name)]
        sides.append([(t.strategy, t.example.golden.text) for t in labelled_turns(dialogues, Counter())])
    assert sides[0] == sides[1]
    assert len(sides[0]) > 1000
    assert {strategy for strategy, _ in sides[0]} == set(ESCONV_STRATEGIES)


def test_prompts_of_all_strategies_share_the_conversation(backbone: tuple[Transformer, ChatTokenizer]) -> None:
    tokenizer = backbone[1]
    ids = [as_ids(tokenizer.encode_chat(generator_prompt(CONTEXT, name))) for name in ESCONV_STRATEGIES]
    without = len(tokenizer.encode_chat(generator_prompt(CONTEXT[:-1], "x"), add_generation_prompt=False))
    assert all(shared_prefix(ids[0], other) > without for other in ids[1:])
    assert generator_prompt(CONTEXT, "Question")[-1] == {"role": "user", "content": "They said nothing.\n[Question]"}


def test_the_joint_baseline_sees_what_it_writes_and_the_others_see_plain_text() -> None:
    assert joint_prompt(CONTEXT)[2]["content"] == "[Question] How did it happen?"
    assert planner_prompt(CONTEXT)[2]["content"] == generator_prompt(CONTEXT, "x")[2]["content"] == "How did it happen?"
    assert [message["role"] for message in planner_prompt(CONTEXT)] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize("strategy", ESCONV_STRATEGIES)
def test_a_joint_reply_is_read_back(strategy: str) -> None:
    assert read_joint(joint_reply(strategy, "I see [it].")) == (Plan(strategy), "I see [it].")


@pytest.mark.parametrize(
    ("text", "plan", "known", "reply"),
    [
        (" [questions]Why?", "Question", "Question", "Why?"),
        ("Why? [Question]", "", "Others", "Why? [Question]"),
        ("[Chatter] Well.", "Chatter", "Others", "Well."),
        ("[Question", "", "Others", "[Question"),
    ],
)
def test_untidy_joint_replies(text: str, plan: str, known: str, reply: str) -> None:
    found, rest = read_joint(text)
    assert (found.strategy, found.known, rest) == (plan, known, reply)


@pytest.mark.parametrize("joint", [False, True])
def test_scored_plans_are_the_softmax_over_whole_answers(
    backbone: tuple[Transformer, ChatTokenizer], joint: bool
) -> None:
    model, tokenizer = backbone
    prompts = [planner_prompt(CONTEXT[:1]), planner_prompt(CONTEXT)]
    plans = score_plans(model, tokenizer, prompts, joint=joint)
    for prompt, plan in zip(prompts, plans):
        ids, sums = tokenizer.encode_chat(prompt), []
        for name in ESCONV_STRATEGIES:
            answer = tokenizer.encode(f"[{name}]") if joint else tokenizer.encode_reply(name)
            with torch.no_grad():
                logps = model(torch.tensor([[*ids, *answer]])).log_softmax(-1)[0, len(ids) - 1 : -1]
            sums.append(float(logps.gather(1, torch.tensor(answer)[:, None]).sum()))
        wanted = torch.tensor(sums).log_softmax(0)
        assert plan is not None
        assert plan.logps == pytest.approx(wanted.tolist(), abs=1e-4)
        assert plan.strategy == ESCONV_STRATEGIES[int(wanted.argmax())]


def test_drawn_plans_have_the_scored_probabilities_and_depend_on_their_place_alone() -> None:
    probabilities = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.03, 0.01, 0.01])
    scored: list[Plan | None] = [Plan("Question", tuple(probabilities.log().tolist()))] * 4000
    scored[7] = None
    drawn = draw_plans(scored, Sampling(1.0, 1.0, 0, 1.3, seed=3))
    counts = Counter(plan.strategy for plan in drawn if plan)
    for name, probability in zip(ESCONV_STRATEGIES, probabilities.tolist()):
        assert counts[name] / 4000 == pytest.approx(probability, abs=4 * math.sqrt(probability / 4000))
    assert drawn[7] is None
    assert draw_plans(scored[:50], Sampling(1.0, 1.0, 0, 1.0, seed=3)) == drawn[:50]
    assert draw_plans(scored, Sampling(0.0)) == scored  # at temperature 0 the likeliest
    assert draw_plans([None], GREEDY) == [None]


def test_a_prompt_beyond_the_window_has_no_plan(backbone: tuple[Transformer, ChatTokenizer], tmp_path: Path) -> None:
    model, tokenizer = backbone
    long = planner_prompt([Turn("seeker", "no " * 3000)])
    plans = score_plans(model, tokenizer, [long, planner_prompt(CONTEXT)])
    assert plans[0] is None
    assert plans[1] is not None
    sampled = sample_plans(model, tokenizer, [long, planner_prompt(CONTEXT)], tmp_path / "p.jsonl", sampling=GREEDY)
    assert sampled[0] is None
    assert sampled[1] is not None
    assert sampled[1].logps is None
    assert sampled[1].known in ESCONV_STRATEGIES


def adapter(model: Transformer, folder: Path, seed: int) -> Path:
    """A random adapter that changes what the model says."""
    inject_lora(model, 4, 8.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for factor in lora_parameters(model):
        torch.nn.init.normal_(factor, std=0.5, generator=generator)
    save_adapter(model, folder)
    remove_adapters(model)
    return folder


def test_two_adapters_take_turns_on_one_backbone(world: Path, tmp_path: Path) -> None:  # noqa: F811
    model, tokenizer = load_model(world / "backbone"), load_tokenizer(world / "backbone")
    planner, generator = adapter(model, tmp_path / "p", 1), adapter(model, tmp_path / "g", 2)
    weights = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}

    def answer(folder: Path, planner: Path, generator: Path) -> list[tuple[Plan | None, Reply]]:
        return respond(
            model, tokenizer, [CONTEXT[:1], CONTEXT], folder / "plans.jsonl", folder / "replies.jsonl",
            PlanSettings(), planner=planner, generator=generator, replies=ReplySettings(GREEDY, max_new_tokens=8),
        )  # fmt: skip

    answers = answer(tmp_path / "a", planner, generator)
    assert {n: t.data_ptr() for n, t in model.named_parameters() if "lora" not in n} == weights
    prompts = [generator_prompt(c, plan.known) for c, (plan, _) in zip((CONTEXT[:1], CONTEXT), answers) if plan]
    alone = sample_replies(model, tokenizer, prompts, tmp_path / "alone", sampling=GREEDY, max_new_tokens=8)
    assert [reply.text for _, reply in answers] == [reply.text for reply in alone]
    assert answer(tmp_path / "a", planner, generator) == answers  # from disk
    changed = answer(tmp_path / "b", generator, planner)
    assert [plan.logps for plan, _ in changed if plan] != [plan.logps for plan, _ in answers if plan]
    assert [reply.text for _, reply in changed] != [reply.text for _, reply in answers]


def test_only_wrong_plans_become_pairs() -> None:
    counts: Counter[str] = Counter()
    turns = [turn(number=n) for n in range(4)] + [turn(("Question", "Others"), number=4), turn(number=5)]
    plans = [Plan("Question"), Plan("Others"), None, Plan("Chatter"), Plan("Others"), Plan("")]
    pairs = planner_pairs(turns, plans, counts)
    assert [(p.dialogue, p.chosen, p.rejected) for p in pairs] == [
        ("file/1", "Question", "Others"), ("file/3", "Question", "Chatter"),
    ]  # fmt: skip
    assert pairs[0].prompt == planner_prompt(CONTEXT)
    assert counts == {
        "agreed": 2, "pairs": 2, "prompt_too_long_dropped": 1, "unknown_rejected": 1, "empty_dropped": 1,
    }  # fmt: skip


def by_words(cases: Sequence[Case], counts: Counter[str]) -> list[frozenset[str] | None]:
    """A filter for tests: a reply names its own errors; "?" has no verdict."""
    return [None if case.reply == "?" else frozenset(e for e in ERRORS if e in case.reply) for case in cases]


def test_only_faulty_replies_against_faultless_human_ones_become_pairs() -> None:
    counts: Counter[str] = Counter()
    turns = [turn(text=t, number=n) for n, t in enumerate(["good"] * 5 + ["template_like", "?", "same", "good"])]
    texts = [
        "early_advice template_like",
        "fine",
        None,
        "",
        "?",
        "early_advice",
        "early_advice",
        "same",
        "early_advice",
    ]
    pairs = generator_pairs(turns, [Reply(text) for text in texts], by_words, counts)
    assert [(p.dialogue, p.chosen, p.rejected) for p in pairs] == [
        ("file/0", "good", "early_advice template_like"), ("file/8", "good", "early_advice"),
    ]  # fmt: skip
    assert pairs[0].prompt == generator_prompt(CONTEXT, "Question")
    assert counts == {
        "pairs": 2, "early_advice_rejected": 2, "template_like_rejected": 1, "no_error_dropped": 1,
        "prompt_too_long_dropped": 1, "empty_dropped": 1, "no_verdict_dropped": 2, "human_error_dropped": 1,
        "identical_dropped": 1,
    }  # fmt: skip


class Script:
    """A responder that gives each conversation the next of its answers."""

    name = "script"

    def __init__(self, answers: list[list[Answer]]) -> None:
        self.answers, self.asked = answers, []  # type: tuple[list[list[Answer]], list[tuple[int, int]]]

    def answer(self, conversations: Sequence[Messages], *, attempt: int = 1, label: str = "") -> list[Answer]:
        self.asked.append((attempt, len(conversations)))
        return self.answers.pop(0)


def verdict(**found: Any) -> Answer:
    return Answer(json.dumps(dict.fromkeys(ERRORS, False) | found))


def test_the_filter_reads_strict_json_and_asks_again() -> None:
    wrong = [Answer("It lacks empathy."), verdict(early_advice="yes"), verdict(rudeness=True), Answer(None, "http_500")]
    again = [verdict(template_like=True), verdict(), verdict(early_advice=True), Answer("{}")]
    script = Script([[verdict(lack_of_empathy=True), *wrong], again, [Answer("[]")]])
    counts: Counter[str] = Counter()
    cases = [Case([{"role": "user", "content": "Hi"}], "Question", str(n)) for n in range(5)]
    found = find_errors(script, cases, counts, tries=3)
    expected = [{"lack_of_empathy"}, {"template_like"}, set(), {"early_advice"}, None]
    assert found == [None if one is None else frozenset(one) for one in expected]
    assert script.asked == [(1, 5), (2, 4), (3, 1)]
    assert counts["answered"] == 4
    assert counts["given_up"] == counts["http_500"] == 1


def test_the_filter_is_shown_the_conversation_the_strategy_and_the_reply() -> None:
    messages = [{"role": "system", "content": "secret"}, *({"role": "user", "content": "I lost my cat."},)]
    asked = error_prompt(Case(messages, "Self-disclosure", "Me too."))[-1]["content"]
    assert all(text in asked for text in ("I lost my cat.", "Self-disclosure", "Me too.", *ERRORS))
    assert "secret" not in asked


def configuration(world: Path, out: Path, **changes: Any) -> DecoupledConfig:  # noqa: F811
    data = out.parent / "labelled.json"
    data.parent.mkdir(parents=True, exist_ok=True)
    if not data.exists():
        data.write_text(json.dumps(records_of(12)))
    values: dict[str, Any] = {
        "backbone": str(world / "backbone"), "esconv": str(data), "out": str(out), "epochs": 1, "max_new_tokens": 8,
        "sft_learning_rate": 1e-3, "learning_rate": 1e-3, "batch_size": 4, "accumulation": 1,
    }  # fmt: skip
    return compose(DecoupledConfig, values | changes)


def faulty(cases: Sequence[Case], counts: Counter[str]) -> list[frozenset[str] | None]:
    """Every reply but the human ones makes an error."""
    return [frozenset() if case.reply.startswith("Hm, ") else frozenset({"template_like"}) for case in cases]


class Approving:
    """A judge that gives everything a 4."""

    name = "approving"

    def answer(self, conversations: Sequence[Messages], *, attempt: int = 1, label: str = "") -> list[Answer]:
        return [Answer(json.dumps(dict.fromkeys(("Empathy", "Fluency", "Helpfulness", "Professionalism"), 4)))] * len(
            conversations
        )


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    return decouple(configuration(world, tmp_path_factory.mktemp("runs") / "run"), faulty, judge=Approving())


STAGES = ("planner-sft", "planner-dpo", "generator-sft", "generator-dpo", "joint-sft")


def test_a_run_leaves_every_stage_and_both_tables(finished: Path) -> None:
    for stage in STAGES:
        assert (finished / stage / "adapter_config.json").is_file()
    strategies, replies = ((finished / "eval" / f"{name}.md").read_text() for name in ("strategies", "replies"))
    rows = [line.split("|")[1].strip() for line in strategies.splitlines()[2:]]
    models = [f"{name} {how}" for name in STAGES if "gen" not in name for how in ("likeliest", "drawn")]
    assert sorted(rows) == sorted(["majority", "joint-sft written", *models])
    header, _, *rows = replies.splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["joint-sft", "decoupled-sft", "decoupled-dpo"]
    wanted = ["BLEU-1", "BLEU-4", "ROUGE-L", "F1", "Distinct-3", "errors, %", "Empathy", "Professionalism"]
    assert all(f" {name} |" in header for name in wanted)
    report = json.loads((finished / "eval" / "decoupled-dpo.support.json").read_text())
    assert report["scores"]["Empathy"] == 4
    assert report["scores"]["errors, %"] == 100


@pytest.mark.parametrize("name", ["planner", "generator"])
def test_the_reference_of_dpo_is_exactly_the_sft_adapter(finished: Path, name: str) -> None:
    sft, dpo = (load_file(finished / f"{name}-{stage}" / "adapter_model.safetensors") for stage in ("sft", "dpo"))
    for key, factor in sft.items():
        frozen = dpo[key][:8] if key.endswith("lora_A.weight") else dpo[key][:, :8]
        scale = 1 if key.endswith("lora_A.weight") else 2  # alpha / rank, folded into B
        assert torch.equal(frozen, factor * scale)
    first = records(finished / f"{name}-dpo" / "metrics.jsonl")[0]
    assert first["dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["loss"] == first["dpo"]  # no SFT term by default


def test_mined_pairs_are_what_the_sft_models_did_wrong(finished: Path) -> None:
    plans = records(finished / "planner-dpo" / "plans.jsonl")
    pairs = read_pairs(finished / "planner-dpo" / "pairs.jsonl")
    counts = json.loads((finished / "planner-dpo" / "filter.json").read_text())
    assert counts["agreed"] + counts["pairs"] == len(plans)
    assert len(pairs) == counts["pairs"] > 0
    assert all(pair.rejected in ESCONV_STRATEGIES and pair.chosen != pair.rejected for pair in pairs)
    pairs = read_pairs(finished / "generator-dpo" / "pairs.jsonl")
    replies = [record["text"] for record in records(finished / "generator-dpo" / "replies.jsonl")]
    assert pairs
    assert {pair.rejected for pair in pairs} <= set(replies)
    assert all(pair.chosen.startswith("Hm, ") for pair in pairs)


def test_an_interrupted_run_ends_as_the_whole_one(finished: Path, world: Path, tmp_path: Path) -> None:  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.copy(finished.parent / "labelled.json", tmp_path)  # the same file in another place
    config = configuration(world, run)
    for gone in ("planner-dpo/adapter_config.json", "generator-dpo/filter.json", "generator-dpo/adapter_config.json"):
        (run / gone).unlink()
    shutil.rmtree(run / "eval")
    shutil.rmtree(run / "joint-sft")
    decouple(config, faulty, judge=Approving(), resume=True)
    for stage in STAGES:
        name = f"{stage}/adapter_model.safetensors"
        assert (run / name).read_bytes() == (finished / name).read_bytes(), stage
    for name in ("strategies.md", "replies.md", "planner-dpo.plans.jsonl", "decoupled-dpo.replies.jsonl"):
        assert (run / "eval" / name).read_text() == (finished / "eval" / name).read_text(), name


def test_out_and_resume_alone_take_the_settings_from_the_run_also_of_several_seeds(
    world: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    config = configuration(world, tmp_path / "run")
    with open_run(config):
        pass
    assert parse(["--out", config.out, "--resume"]) == (config, [], True, "")
    with open_run(replace(config, out=str(tmp_path / "many" / "seed-3"), seed=3)):
        pass
    found, seeds, *_ = parse(["--out", str(tmp_path / "many"), "--resume", "--seeds", "3", "4", "--slots", "5"])
    assert seeds == [3, 4]
    assert replace(found, seed=0, out=config.out) == change(config, slots=5)
    with pytest.raises(FileError, match="holds no run to continue"):
        parse(["--out", str(tmp_path / "many"), "--resume"])


def test_plans_can_be_written_token_by_token(world: Path, tmp_path: Path) -> None:  # noqa: F811
    run = decouple(configuration(world, tmp_path / "run", planning="written"), faulty)
    assert "| planner-dpo written |" in (run / "eval" / "strategies.md").read_text()
    written = records(run / "eval" / "planner-dpo.written.jsonl")
    assert len(written) == len(records(run / "eval" / "examples.jsonl"))
    counts = json.loads((run / "planner-dpo" / "filter.json").read_text())
    assert counts["unknown_rejected"] > 0  # a random model rarely writes a name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"planning": "guess"}, "planning"),
        ({"judge_url": "http://localhost/v1"}, "needs judge"),
        ({"beta": 0.0}, "beta"),
    ],
)
def test_settings_are_checked_where_they_are_made(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        configuration(tmp_path, tmp_path / "run", **changes)


def test_dialogues_without_strategies_and_pairs_that_nobody_finds_are_told(world: Path, tmp_path: Path) -> None:  # noqa: F811
    plain = records_of(12)
    for record in plain:
        for said in record["dialog"]:
            said["annotation"] = {}
    (tmp_path / "labelled.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=r"labelled\.json: no supporter turn to train on"):
        decouple(configuration(world, tmp_path / "run"), faulty)
    assert not (tmp_path / "run").exists()
    (tmp_path / "labelled.json").write_text(json.dumps(records_of(12)))

    def nothing(cases: Sequence[Case], counts: Counter[str]) -> list[frozenset[str] | None]:
        return [frozenset() for _ in cases]

    with pytest.raises(FileError, match=r"generator-dpo: no preference pair was left"):
        decouple(configuration(world, tmp_path / "run"), nothing)
    assert (tmp_path / "run" / "eval" / "strategies.md").is_file()


def example(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(EXAMPLE), *arguments], capture_output=True, text=True, timeout=240)


def test_the_embedded_default_runs_to_the_tables_and_over_seeds(tmp_path: Path) -> None:
    small = ["--limit", "4", "--epochs", "1", "--out", str(tmp_path / "runs")]
    result = example(*small, "--seeds", "0", "1")
    assert result.returncode == 0, result.stderr[-2000:]
    table = (tmp_path / "runs" / "table.md").read_text()
    assert table in result.stdout
    assert "| planner-dpo drawn |" in table
    assert " to " in table
    refused = example(*small, "--seeds", "0", "1", "--beta", "0.3", "--resume")
    assert refused.returncode == 1
    assert "other settings" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_bad_input_is_one_sentence(world: Path, tmp_path: Path) -> None:  # noqa: F811
    bad = tmp_path / "bad.json"
    bad.write_text("<html>404</html>")
    data, folder = str(bad), str(world / "backbone")
    real = ["--backbone", folder, "--esconv", data, "--out", str(tmp_path / "run")]
    for arguments, code, named in (
        (["--backbone", folder], 2, "--esconv is needed"),
        (real, 2, "need a judge"),
        ([*real, "--judge", folder], 1, "bad.json"),
        ([*real, "--judge", "m", "--judge-url", "localhost"], 1, "http://"),
        (["--seed", "1", "--seeds", "2"], 2, "exclude"),
    ):
        result = example(*arguments)
        assert result.returncode == code, result.stderr
        assert named in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "run").exists()
