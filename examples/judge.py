"""An LLM judges the replies of a run's models on seven aspects from 1 to 5 (the paper's Table 7).

    python examples/judge.py RUN --judge-url https://api.openai.com/v1 --judge gpt-4o-mini
    python examples/judge.py RUN --judge-url http://localhost:8000/v1 --judge Qwen/Qwen2.5-72B-Instruct
    python examples/judge.py RUN --judge Qwen/Qwen2-7B-Instruct          a local backbone, without a server

RUN is a folder as iterate.py or evaluate.py makes it. As in the paper, 100 test contexts are drawn at random, the same
ones for every model, and each aspect is a request of its own; decoding is the paper's too. An endpoint needs
pip install 'selfevo[judge]'; its key is read from SELFEVO_API_KEY or OPENAI_API_KEY. Answers are cached in
RUN/eval/judge-cache, so a killed command continues and a second one costs nothing. Answers are parsed strictly,
requested again up to three times, and every failure is reported. --human adds a last row to the table, Pearson's
correlation with people's scores: JSON lines {"model": "M1", "id": "...", "scores": {"Empathy": 4, ...}}, ids as in
RUN/eval/examples.jsonl.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from random import Random

from program import program

from selfevo.datasets.seeds import derive_seed
from selfevo.dialogue import Example
from selfevo.evaluation import pearson
from selfevo.evaluation.ask_json import Responder
from selfevo.evaluation.endpoint import Endpoint, EndpointSettings, read_parameters
from selfevo.evaluation.folder import answered_models, read_answers, read_examples
from selfevo.evaluation.judge import Aspect, Judgement, judge_replies, load_aspects, summarise
from selfevo.evaluation.local_responder import LocalResponder
from selfevo.evaluation.tables import markdown_table
from selfevo.evolve import BackboneSettings, load_backbone
from selfevo.evolve.reflection import FREE, GUIDED, WAYS
from selfevo.files import FileError, read_json, read_records, write_json, write_jsonl, write_text
from selfevo.generate import Sampling

Scores = Mapping[tuple[str, str], Mapping[str, float]]  # (model, id of the test turn) -> aspect -> score


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


def judge_model(
    responder: Responder, folder: Path, name: str, turns: Collection[str], aspects: Sequence[Aspect], joint: bool
) -> dict[tuple[str, str], Mapping[str, float]]:
    """Judges one model's replies; writes ``NAME.judge.json`` and ``NAME.judge.jsonl``, returns the scores by turn."""
    answers = [(example, text) for example, text in read_answers(folder, name) if example.id in turns]
    counts: Counter[str] = Counter()
    label = f"{responder.name} judges {name}"
    judged = judge_replies(responder, answers, counts, aspects=aspects, joint=joint, label=label)
    records = [record(example, judgement) for (example, _), judgement in zip(answers, judged)]
    write_jsonl(folder / f"{name}.judge.jsonl", records)
    summary = summarise(judged, [example.dialogue for example, _ in answers], counts)
    write_json(folder / f"{name}.judge.json", {"judge": responder.name, "replies": len(answers), **summary})
    return {(name, example.id): j.scores for (example, _), j in zip(answers, judged)}


def record(example: Example, judgement: Judgement) -> dict[str, object]:
    return {
        "id": example.id,
        "dialogue": example.dialogue,
        "scores": judgement.scores or None,
        "reasons": judgement.reasons or None,
    }


def read_human(path: str) -> Scores:
    """People's scores; several records for one reply are averaged."""
    found: dict[tuple[str, str], list[Mapping[str, float]]] = {}
    for where, entry in read_records(path):
        try:
            key, scores = (entry["model"], entry["id"]), {n: float(s) for n, s in entry["scores"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileError(f'{where}: expected "model", "id" and "scores" of numbers by aspect ({error!r})') from error
        found.setdefault(key, []).append(scores)
    return {
        key: {n: sum(s[n] for s in many) / len(many) for n in many[0] if all(n in s for s in many)}
        for key, many in found.items()
    }


def table(folder: Path, names: Sequence[str], aspects: Sequence[Aspect], judged: Scores, human: Scores) -> str:
    """Markdown: a row per model, the mean of each aspect, how many replies were judged and what failed; with people's
    scores a last row of Pearson's r, its 95 % interval and the number of replies."""
    rows = {}
    for name in names:
        report = read_json(folder / f"{name}.judge.json")
        means = [f"{report['scores'][a.name]['mean']:.2f}" if a.name in report["scores"] else "–" for a in aspects]
        failed = report["failures"] | report.get("mended", {})
        failures = ", ".join(f"{reason} {count}" for reason, count in failed.items() if count) or "none"
        rows[name] = [*means, str(report["answered"]), failures]
    if human:
        rows["Pearson r"] = [_correlation(aspect.name, judged, human) for aspect in aspects] + ["", ""]
    return markdown_table(["model", *(aspect.name for aspect in aspects), "judged", "failures"], rows)


def _correlation(aspect: str, judged: Scores, human: Scores) -> str:
    both = [
        (scores[aspect], human[key][aspect])
        for key, scores in judged.items()
        if aspect in scores and aspect in human.get(key, {})
    ]
    r, low, high = pearson([a for a, _ in both], [b for _, b in both])
    return "–" if math.isnan(r) else f"{r:.2f} ({low:.2f} to {high:.2f}, {len(both)})".replace("nan", "–")


@program(memory="lower --max-tokens, or take a smaller judge", interrupted="the same command continues")
def main() -> int:
    options = parse()
    folder = Path(options.run) / "eval"
    aspects = [aspect for source in options.aspects for aspect in load_aspects(source)]
    human = read_human(options.human) if options.human else {}
    names = options.models or answered_models(folder)
    turns = draw_turns(folder, names, options.contexts, options.seed)
    responder = make_responder(options, folder)
    judged: dict[tuple[str, str], Mapping[str, float]] = {}
    for name in names:
        judged |= judge_model(responder, folder, name, turns, aspects, options.joint)
    text = table(folder, names, aspects, judged, human)
    write_text(folder / "judge.md", text + "\n")
    if isinstance(responder, Endpoint):
        print("", *responder.remarks(), sep="\n", file=sys.stderr)
    if not any(judged.values()):
        print(f"\n{text}\n\nerror: no reply could be judged by {responder.name}", file=sys.stderr)
        return 1
    print(f"\n{text}\n\njudged by {responder.name}; single scores and reasons are in {folder}/*.judge.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
