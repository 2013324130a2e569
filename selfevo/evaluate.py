"""Objective scores of a model's replies on test dialogues, each answered in its ground-truth context, and the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from selfevo import metrics
from selfevo.dialogue import Example, to_messages
from selfevo.files import read_json, write_json, write_jsonl
from selfevo.models.tokenizer import ChatTokenizer
from selfevo.models.transformer import Transformer
from selfevo.prompts import reply_prompt
from selfevo.refine import RefineSettings, reflect
from selfevo.replies import sample_replies


@dataclass(frozen=True)
class Score:
    """One column of the table: its value (0..100, or tokens for the length) and how it was computed."""

    value: float
    signature: str


def score_replies(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Score]:
    """The scores of Tables 2 and 6 that need no outside model: sampled replies against golden ones.

    BLEU and ROUGE-L are means over replies (the paper scores utterances); Distinct-n is given at both levels.
    """
    hyps, refs = list(hypotheses), list(references)
    scores: dict[str, Score] = {}
    for n in (2, 3):
        options = {"max_n": n, "level": "sentence", "smoothing": "epsilon"}
        value = metrics.bleu(hyps, refs, max_n=n, level="sentence", smoothing="epsilon")
        scores[f"BLEU-{n}"] = Score(value, metrics.signature("bleu", **options))
    scores["ROUGE-L"] = Score(metrics.rouge_l(hyps, refs), metrics.signature("rouge_l"))
    for level, suffix in (("utterance", ""), ("corpus", " (corpus)")):
        for n in (1, 2, 3):
            value = metrics.distinct_n(hyps, n, level=level)  # type: ignore[arg-type]
            scores[f"Distinct-{n}{suffix}"] = Score(value, metrics.signature("distinct_n", n=n, level=level))
    scores["Length"] = Score(metrics.mean_length(hyps), metrics.signature("mean_length"))
    return scores


def evaluate_model(
    model: Transformer,
    tokenizer: ChatTokenizer,
    examples: Sequence[Example],
    folder: Path,
    name: str,
    settings: RefineSettings,
    *,
    reflecting: bool = False,
) -> dict[str, float]:
    """Answers every example and scores the answers; writes ``NAME.replies.jsonl`` and ``NAME.json`` into ``folder``.

    A test context that does not fit into the window loses its oldest turns; where that is not enough the example is
    left out for every model alike, and counted. ``reflecting`` scores what the model makes of its replies when asked to
    reflect on them (Table 3); a reply whose reflection cannot be used stays as it is.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        prompts = [reply_prompt(to_messages(example.context), settings.style) for example in examples]
        first = folder / name / "first_replies.jsonl" if reflecting else folder / f"{name}.replies.jsonl"
        replies = sample_replies(
            model, tokenizer, prompts, first,
            sampling=settings.sampling, max_new_tokens=settings.max_new_tokens,
            slots=settings.slots, label=f"{name} answers the test dialogues",
        )  # fmt: skip
        counts: Counter[str] = Counter()
        if reflecting:
            reflections = reflect(model, tokenizer, prompts, replies, folder / name, settings, counts)
            replies = [
                r if thought is None else replace(r, text=thought.refined) for r, thought in zip(replies, reflections)
            ]
            counts["refined"] = sum(thought is not None for thought in reflections)
            write_jsonl(folder / f"{name}.replies.jsonl", [{"index": i, **vars(r)} for i, r in enumerate(replies)])
        answered = [(r.text, e.golden.text) for r, e in zip(replies, examples) if r.text is not None]
        if not answered:
            raise ValueError(f"none of the {len(examples)} test contexts fits into the model's window")
        scores = score_replies([text for text, _ in answered], [golden for _, golden in answered])
        report = {
            "model": name,
            "replies": len(answered),
            "left_out_too_long": len(examples) - len(answered),
            "contexts_cut": sum(bool(reply.turns_dropped) for reply in replies if reply.text is not None),
            "scores": {key: vars(score) for key, score in scores.items()},
        } | dict(sorted(counts.items()))
        write_json(path, report)
    return {key: score["value"] for key, score in read_json(path)["scores"].items()}


def comparison_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown in the form of Tables 2 and 6: a row per model, its values and the change against the row before."""
    columns = list(next(iter(scores.values())))
    lines = ["| model | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    before: Mapping[str, float] | None = None
    for name, values in scores.items():
        cells = [f"{values[c]:.2f}" + ("" if before is None else f" ({values[c] - before[c]:+.2f})") for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        before = values
    return "\n".join(lines)
