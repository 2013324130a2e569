"""Our BLEU, ROUGE-L and Distinct-n beside sacreBLEU, nltk and rouge-score, on the same pairs: equal, and how fast.

    python benchmarks/scores.py --data ESConv.json [--pairs 20000]

Hypotheses are real supporter turns of which a fifth of the words was dropped, references the whole turns; they are
repeated up to the number of pairs. Both sides get texts and do their own tokenizing. Rounds alternate; the first is not
counted.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

from contest import spread
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from selfevo import metrics
from selfevo.datasets import load_dialogues
from selfevo.metrics import tokenize_13a

Texts = list[str]
Measure = Callable[[Texts, Texts], float]


def real_pairs(path: str, count: int) -> tuple[Texts, Texts]:
    """Damaged replies and the replies they were."""
    turns = [turn.text for d in load_dialogues(path) for turn in d.turns if turn.speaker == "supporter"]
    references = [text for text in turns if text.strip()]
    references = (references * (1 + count // len(references)))[:count]
    draw = random.Random(0)
    hypotheses = [" ".join(word for word in text.split() if draw.random() < 0.8) for text in references]
    return hypotheses, references


def sacrebleu_corpus(hypotheses: Texts, references: Texts) -> float:
    return float(BLEU(smooth_method="exp").corpus_score(hypotheses, [references]).score)


def nltk_sentence(hypotheses: Texts, references: Texts) -> float:
    smooth = SmoothingFunction().method1
    scores = [
        sentence_bleu([tokenize_13a(r)], tokenize_13a(h), weights=[0.5, 0.5], smoothing_function=smooth)
        for h, r in zip(hypotheses, references)
    ]
    return 100 * sum(scores) / len(scores)


def google_rouge_l(hypotheses: Texts, references: Texts) -> float:
    scorer = RougeScorer(["rougeL"])
    return 100 * sum(scorer.score(r, h)["rougeL"].fmeasure for h, r in zip(hypotheses, references)) / len(hypotheses)


def plain_distinct(hypotheses: Texts, _: Texts) -> float:
    """There is no package to compare with: the few lines that papers use."""
    grams = [tuple(t[i : i + 2]) for t in map(tokenize_13a, hypotheses) for i in range(len(t) - 1)]
    return 100 * len(set(grams)) / len(grams)


CONTESTS: dict[str, tuple[Measure, Measure]] = {
    "corpus BLEU-4, sacreBLEU": (lambda h, r: metrics.bleu(h, r, smoothing="exp"), sacrebleu_corpus),
    "sentence BLEU-2, nltk": (
        lambda h, r: metrics.bleu(h, r, max_n=2, level="sentence", smoothing="epsilon"),
        nltk_sentence,
    ),
    "ROUGE-L, rouge-score": (metrics.rouge_l, google_rouge_l),
    "Distinct-2, plain Python": (lambda h, _: metrics.distinct_n(h, 2), plain_distinct),
}


def timed(measure: Measure, hypotheses: Texts, references: Texts) -> tuple[float, float]:
    started = time.perf_counter()
    value = measure(hypotheses, references)
    return value, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dialogues, e.g. ESConv.json")
    parser.add_argument("--pairs", type=int, default=20_000, help="pairs to score (default: 20000)")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (default: 3)")
    options = parser.parse_args()
    hypotheses, references = real_pairs(options.data, options.pairs)
    print("| score, against | ours, s | theirs, s | we are times as fast | difference |\n|---|---|---|---|---|")
    for name, (own, other) in CONTESTS.items():
        rounds = [
            (timed(own, hypotheses, references), timed(other, hypotheses, references))
            for _ in range(options.rounds + 1)
        ][1:]
        ours, theirs = [a[1] for a, _ in rounds], [b[1] for _, b in rounds]
        ratios = [b / a for a, b in zip(ours, theirs)]
        difference = max(abs(a[0] - b[0]) for a, b in rounds)
        print(f"| {name} | {spread(ours)} | {spread(theirs)} | {spread(ratios)} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    main()
