"""An LLM judges the replies of a run's models on seven aspects from 1 to 5 (the paper's Table 7).

    python examples/judge.py RUN --judge-url https://api.openai.com/v1 --judge gpt-4o-mini
    python examples/judge.py RUN --judge-url http://localhost:8000/v1 --judge Qwen/Qwen2.5-72B-Instruct
    python examples/judge.py RUN --judge Qwen/Qwen2-7B-Instruct          a local backbone, without a server

RUN is a folder as iterate.py or evaluate.py makes it. As in the paper, 100 test contexts are drawn at random, the same
ones for every model, and each aspect is a request of its own; decoding is the paper's too. An endpoint needs
pip install 'selfevo[judge]'; its key is read from SELFEVO_API_KEY or OPENAI_API_KEY. Answers are cached in
RUN/eval/judge-cache, so a killed command continues and a second one costs nothing. Answers are parsed strictly,
requested again up to three times, and every failure is reported. Another judge, or the same one asked otherwise, has a
table of its own: each keeps its scores in a folder of RUN/eval/judged. --human adds a last row to the table, Pearson's
correlation with people's scores: JSON lines {"model": "M1", "id": "...", "scores": {"Empathy": 4, ...}}, ids as in
RUN/eval/examples.jsonl; several records for a reply are averaged, and what could not be joined is told.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from program import program, refuse_idle

from selfevo.datasets.seeds import derive_seed
from selfevo.evaluation.ask_json import Responder, request_hash
from selfevo.evaluation.endpoint import Endpoint, EndpointSettings, read_parameters
from selfevo.evaluation.folder import answered_models, read_answers, read_examples
from selfevo.evaluation.judge import Aspect, check_aspects, judge_replies, load_aspects, summarise
from selfevo.evaluation.judgements import describe_aspects, judging_folder, read_judge_report, write_judgements
from selfevo.evaluation.local_responder import LocalResponder
from selfevo.evaluation.origin import backbone_hash
from selfevo.evaluation.people import Reply, Scores, correlation, join_ratings, read_ratings
from selfevo.evaluation.tables import markdown_table
from selfevo.evolve import BackboneSettings, load_backbone
from selfevo.evolve.reflection import FREE, GUIDED, WAYS
from selfevo.files import write_text
from selfevo.generate import Sampling


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, or one that evaluate.py made")
    parser.add_argument("--judge", required=True, metavar="MODEL", help="the endpoint's model, or a backbone's folder")
    parser.add_argument(
        "--judge-url", metavar="URL", help="an OpenAI-compatible endpoint; without it the judge is a local backbone"
    )
    parser.add_argument("--models", nargs="+", metavar="NAME", help="models to judge (default: all that answered)")
    parser.add_argument("--contexts", type=int, default=100, help="test turns to draw; 0 takes all (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawn test turns (default: 0)")
    parser.add_argument(
        "--aspects", nargs="+", default=["paper"], metavar="SET",
        help="sets of aspects: paper (the default), personalisation, decoupled, or a JSON file like those in "
        "selfevo/evaluation/aspects",
    )  # fmt: skip
    parser.add_argument("--joint", action="store_true", help="one request for all aspects, which costs a seventh")
    parser.add_argument("--human", metavar="FILE", help="people's scores, to correlate with")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the judge (default: 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="of the judge (default: 0.95)")
    parser.add_argument("--top-k", type=int, default=50, help="of the judge, where the server takes it (default: 50)")
    parser.add_argument("--max-tokens", type=int, default=768, help="longest judgement (default: 768)")
    parser.add_argument(
        "--judge-parameter", action="append", default=[], metavar="NAME=VALUE",
        help="send the endpoint this parameter too, or in place of ours (temperature, top_p, top_k, max_tokens); "
        "NAME=omit leaves one out that a model refuses; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--judge-answers", choices=WAYS, default=FREE,
        help="how a local judge's answers come to be JSON: free, as it writes it, where what is none is requested "
        "again (the default), or guided, the decoder writing keys and punctuation, where every answer is a judgement",
    )  # fmt: skip
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time (default: 8)")
    parser.add_argument("--timeout", type=float, default=120, help="seconds to wait for an answer (default: 120)")
    return parser.parse_args()


def make_responder(options: argparse.Namespace, folder: Path) -> Responder:
    cache = folder / "judge-cache"
    if options.judge_url:
        if options.judge_answers == GUIDED:
            raise ValueError("--judge-answers guided is for a local judge: leave out --judge-url")
        settings = EndpointSettings(
            options.judge_url, options.judge, options.temperature, options.top_p, options.top_k, options.max_tokens,
            options.concurrency, timeout=options.timeout, parameters=read_parameters(options.judge_parameter),
        )  # fmt: skip
        return Endpoint(settings, cache / "answers.jsonl")
    if options.judge_parameter:
        raise ValueError("--judge-parameter is for an endpoint: give --judge-url, or leave it out")
    model, tokenizer = load_backbone(BackboneSettings(options.judge))
    sampling = Sampling(options.temperature, options.top_p, options.top_k, 1.0, 0)
    return LocalResponder(
        model, tokenizer, options.judge, cache, sampling=sampling, max_new_tokens=options.max_tokens,
        guided=options.judge_answers == GUIDED,
        content=backbone_hash(options.judge),
    )  # fmt: skip


def draw_turns(folder: Path, names: Sequence[str], count: int, seed: int) -> list[str]:
    """The ids of ``count`` test turns (0: all) that every model has answered, drawn at random, in the file's order.

    Where there are none, as in the conversations of a study, each of which is with one model, any model will do."""
    answered = [{example.id for example, _ in read_answers(folder, name)} for name in names]
    examples = [example.id for example in read_examples(folder)]
    ids = [id_ for id_ in examples if all(id_ in own for own in answered)]
    ids = ids or [id_ for id_ in examples if any(id_ in own for own in answered)]
    if not 0 < count < len(ids):
        return ids
    drawn = set(Random(derive_seed(seed, "judge", "contexts")).sample(range(len(ids)), count))
    return [id_ for index, id_ in enumerate(ids) if index in drawn]


def judging_request(
    options: argparse.Namespace, responder: Responder, aspects: Sequence[Aspect], turns: Sequence[str]
) -> dict[str, Any]:
    """All that judgements depend on besides the replies."""
    asked: dict[str, Any] = {"judge": options.judge, "url": None}
    if isinstance(responder, Endpoint):
        asked |= {"url": responder.url, **responder.settings.body}
    else:
        names = ("temperature", "top_p", "top_k", "max_tokens")
        asked |= {name: getattr(options, name) for name in names}
        asked |= {"answers": options.judge_answers, "content": backbone_hash(options.judge)}
    return asked | {
        "joint": options.joint,
        "aspects": describe_aspects(aspects),
        "contexts": len(turns),
        "turns_sha256": request_hash({"turns": list(turns)}),
    }


def judge_model(
    responder: Responder, judging: Path, name: str, turns: Collection[str], aspects: Sequence[Aspect], joint: bool
) -> Scores:
    """Judges one model's replies, keeps the judgements in a folder and returns the scores by turn."""
    answers = [(example, text) for example, text in read_answers(judging.parents[1], name) if example.id in turns]
    counts: Counter[str] = Counter()
    label = f"{responder.name} judges {name}"
    judged = judge_replies(responder, answers, counts, aspects=aspects, joint=joint, label=label)
    summary = summarise(judged, [example.dialogue for example, _ in answers], counts)
    write_judgements(judging, name, [(e.id, e.dialogue) for e, _ in answers], judged, summary)
    return {(name, example.id): j.scores for (example, _), j in zip(answers, judged)}


def table(judging: Path, names: Sequence[str], aspects: Sequence[Aspect], judged: Scores, people: Scores) -> str:
    """Markdown: a row per model, the mean of each aspect, how many replies were judged and what failed; with people's
    scores a last row of Pearson's r, its 95 % interval and the number of replies."""
    rows = {}
    for name in names:
        report = read_judge_report(judging / f"{name}.json")
        means = [f"{report['scores'][a.name]['mean']:.2f}" if a.name in report["scores"] else "–" for a in aspects]
        failed = report["failures"] | report["mended"]
        failures = ", ".join(f"{reason} {count}" for reason, count in failed.items() if count) or "none"
        rows[name] = [*means, str(report["answered"]), failures]
    if people:
        rows["Pearson r"] = [correlation(aspect.name, judged, people) for aspect in aspects] + ["", ""]
    return markdown_table(["model", *(aspect.name for aspect in aspects), "judged", "failures"], rows)


def check_flags(options: argparse.Namespace, aspects: Sequence[Aspect]) -> None:
    """Refuses flags that would change nothing, and numbers that mean nothing."""
    if not options.judge_url:
        refuse_idle(["--judge-parameter", "--concurrency", "--timeout"], "it is for an endpoint (--judge-url)")
    if options.contexts < 0:
        raise ValueError(f"--contexts should be a number of test turns, or 0 for all, not {options.contexts}")
    if options.contexts == 0:
        refuse_idle(["--seed"], "--contexts 0 takes all test turns, none is drawn")
    if len(aspects) == 1:
        refuse_idle(["--joint"], f"{aspects[0].name} is the only aspect")


@program(memory="lower --max-tokens, or take a smaller judge", interrupted="the same command continues")
def main() -> int:
    options = parse()
    folder = Path(options.run) / "eval"
    aspects = [aspect for source in options.aspects for aspect in load_aspects(source)]
    check_aspects(aspects, "--aspects")
    check_flags(options, aspects)
    names = list(dict.fromkeys(options.models or answered_models(folder)))
    turns = draw_turns(folder, names, options.contexts, options.seed)
    people: Scores = {}
    sentences: list[str] = []
    if options.human:
        replies = {(name, id_) for name in names for id_ in turns}
        ratings = read_ratings(options.human)
        people, sentences = join_ratings(ratings, replies, [aspect.name for aspect in aspects], options.human)
    responder = make_responder(options, folder)
    judging = judging_folder(folder, judging_request(options, responder, aspects, turns))
    judged: dict[Reply, Mapping[str, float]] = {}
    for name in names:
        judged |= judge_model(responder, judging, name, turns, aspects, options.joint)
    text = "\n\n".join([table(judging, names, aspects, judged, people), *sentences])
    write_text(judging / "table.md", text + "\n")
    if isinstance(responder, Endpoint):
        print(*responder.remarks(), sep="\n", file=sys.stderr)
    if not any(judged.values()):
        print(f"\n{text}\n\nerror: no reply could be judged by {responder.name}", file=sys.stderr)
        return 1
    print(f"\n{text}\n\njudged by {responder.name}; single scores and reasons are in {judging}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
