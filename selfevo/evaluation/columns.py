"""The columns of the score tables: which measures, over which tokens, at which level, and how sure each number is.

A convention is a set of columns. Ours (``paper``) has the scores of Tables 2 and 6, utterance by utterance. The others
reproduce how published work on emotional support conversation counts, since numbers under different conventions cannot
be compared: ``esconv`` is the metric script of ESConv (Liu et al. 2021), ``decoupledesc`` that of Zhang et al. (2025).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import fmean
from typing import Any

from selfevo import metrics
from selfevo.evaluation.significance import SAMPLES, bootstrap_interval

CONVENTIONS = ("paper", "esconv", "decoupledesc")
EXTRAS = ("METEOR", "BERTScore")
BERT_MODEL = "roberta-large"  # bert-score's own choice for English
Texts = Sequence[str]


class ScoreError(ValueError):
    """A score that cannot be computed here; the message says what to install or to give."""


@dataclass(frozen=True)
class Column:
    """A measure of (hypotheses, references); with ``per_reply`` its score is the mean of what it gives each reply."""

    name: str
    signature: str
    measure: Callable[[Texts, Texts], float]
    per_reply: bool = True


@dataclass(frozen=True)
class Score:
    """One cell: its value (0..100, or tokens for the length), how it was computed, and where it is a mean over replies,
    its bootstrap interval (95 %, dialogues drawn whole) and the value of each reply."""

    value: float
    signature: str
    interval: tuple[float, float] | None = None
    values: tuple[float, ...] | None = None


def score_replies(
    hypotheses: Texts,
    references: Texts,
    dialogues: Sequence[Hashable] | None = None,
    *,
    convention: str = "paper",
    extras: Sequence[str] = (),
    bert_model: str = BERT_MODEL,
) -> dict[str, Score]:
    """The scores of N sampled replies against N golden ones under a convention; ``dialogues`` (N,) names their sources.

    ``extras`` adds METEOR (nltk) and BERTScore (bert-score). Raises ValueError: unusable lists, an unknown convention
    or extra, and ScoreError where a package or its data are missing.
    """
    hyps, refs = list(hypotheses), list(references)
    scores: dict[str, Score] = {}
    for column in columns(convention):
        if column.per_reply:
            values = [column.measure([hyp], [ref]) for hyp, ref in zip(hyps, refs, strict=True)]
            scores[column.name] = _mean_score(values, column.signature, dialogues)
        else:
            scores[column.name] = Score(column.measure(hyps, refs), column.signature)
    for name in extras:
        if name not in EXTRAS:
            raise ValueError(f"an extra score should be one of {', '.join(EXTRAS)}, not {name!r}")
        values, signature = _meteor(hyps, refs) if name == "METEOR" else _bert_score(hyps, refs, bert_model)
        scores[name] = _mean_score(values, signature, dialogues)
    return scores


def columns(convention: str) -> list[Column]:
    """The columns of a convention; raises ValueError for one that is not in ``CONVENTIONS``."""
    if convention == "paper":
        return _paper_columns()
    if convention == "esconv":
        return _esc_columns(_nltk_words, per_reply=False, drop_last=True)
    if convention == "decoupledesc":
        return _esc_columns(_nltk_words, per_reply=True, drop_last=False)
    raise ValueError(f"the convention should be one of {', '.join(CONVENTIONS)}, not {convention!r}")


def _paper_columns() -> list[Column]:
    """BLEU and ROUGE-L are means over replies (the paper scores utterances); Distinct-n is given at both levels."""
    found = [_column(f"BLEU-{n}", metrics.bleu, max_n=n, level="sentence", smoothing="epsilon") for n in (2, 3)]
    found.append(_column("ROUGE-L", metrics.rouge_l))
    found += [_alone(f"Distinct-{n}", metrics.distinct_n, n=n, level="utterance") for n in (1, 2, 3)]
    found += [
        _alone(f"Distinct-{n} (corpus)", metrics.distinct_n, per_reply=False, n=n, level="corpus") for n in (1, 2, 3)
    ]
    return [*found, _alone("Length", metrics.mean_length)]


def _esc_columns(words: Callable[[str], list[str]], *, per_reply: bool, drop_last: bool) -> list[Column]:
    """The columns of ESConv's script, over lower-cased nltk words: BLEU with nltk's ``method3``, ROUGE-L with beta 1.2.

    ESConv pools BLEU and Distinct over the corpus and leaves out every reply's last n-gram of Distinct; DecoupledESC
    scores each reply by itself, with all its n-grams, and averages.
    """
    seen = partial(_all_but_last, words) if drop_last else words
    level = "utterance" if per_reply else "corpus"
    found = [_alone("Length", metrics.mean_length, tokenize=words)]
    found += [
        _alone(f"Distinct-{n}", metrics.distinct_n, per_reply=per_reply, n=n, level=level, tokenize=seen)
        for n in (1, 2, 3)
    ]
    bleu = partial(_column, metric=metrics.bleu, per_reply=per_reply, smoothing="nist", tokenize=words)
    found += [bleu(f"BLEU-{n}", max_n=n, level="sentence" if per_reply else "corpus") for n in (1, 2, 3, 4)]
    found.append(_column("F1", metrics.unigram_f1, tokenize=words))
    return [*found, _column("ROUGE-L", metrics.rouge_l, tokenize=words, beta=1.2)]


def support_columns() -> list[Column]:
    """The columns of Decoupled ESC over our own tokens, means over replies (``decoupledesc`` has them as published)."""
    found = [_column(f"BLEU-{n}", metrics.bleu, max_n=n, level="sentence", smoothing="epsilon") for n in (1, 2, 3, 4)]
    found += [_column("ROUGE-L", metrics.rouge_l), _column("F1", metrics.unigram_f1)]
    found += [_alone(f"Distinct-{n}", metrics.distinct_n, n=n, level="utterance") for n in (1, 2, 3)]
    return [*found, _alone("Length", metrics.mean_length)]


def _column(name: str, metric: Callable[..., float], *, per_reply: bool = True, **how: Any) -> Column:
    return Column(name, _signature(metric, how), partial(metric, **how), per_reply)


def _alone(name: str, metric: Callable[..., float], *, per_reply: bool = True, **how: Any) -> Column:
    """A column that looks at the replies only."""
    return Column(name, _signature(metric, how), lambda hypotheses, _: metric(hypotheses, **how), per_reply)


def _signature(metric: Callable[..., float], how: dict[str, Any]) -> str:
    tokenize = how.get("tokenize")
    named = how if tokenize is None else how | {"tokenize": _TokenizerName(tokenize)}
    return metrics.signature(metric.__name__, **named)


class _TokenizerName:
    """Prints as the tokenizer's name and the version of the package behind it."""

    def __init__(self, tokenize: Callable[[str], Any]) -> None:
        self.dropped = isinstance(tokenize, partial)

    def __str__(self) -> str:
        return f"nltk-{_version('nltk')}-lower" + ("-but-last" if self.dropped else "")


def _all_but_last(words: Callable[[str], list[str]], text: str) -> list[str]:
    return words(text)[:-1]


def _nltk_words(text: str) -> list[str]:
    try:
        import nltk
    except ImportError as error:
        raise ScoreError("this convention counts nltk's words: pip install 'selfevo[scores]'") from error
    try:
        return list(nltk.word_tokenize(text.lower()))
    except LookupError as error:
        raise ScoreError(
            "nltk's word tokenizer needs its data: run python -m nltk.downloader punkt_tab (or set NLTK_DATA)"
        ) from error


def _meteor(hypotheses: Texts, references: Texts) -> tuple[list[float], str]:
    """nltk's METEOR (alpha 0.9, beta 3, gamma 0.5; Porter stems, WordNet), 0..100, over our ``tokenize_13a`` tokens."""
    try:
        from nltk.translate.meteor_score import single_meteor_score
    except ImportError as error:
        raise ScoreError("METEOR comes from nltk: pip install 'selfevo[scores]'") from error
    pairs = [(metrics.tokenize_13a(ref), metrics.tokenize_13a(hyp)) for hyp, ref in zip(hypotheses, references)]
    try:
        values = [100 * single_meteor_score(ref, hyp) for ref, hyp in pairs]
    except LookupError as error:
        raise ScoreError(
            "METEOR needs nltk's WordNet: run python -m nltk.downloader wordnet (or set NLTK_DATA)"
        ) from error
    return values, f"meteor|tok:13a|stem:porter|synonyms:wordnet|nltk:{_version('nltk')}"


def _bert_score(hypotheses: Texts, references: Texts, model: str) -> tuple[list[float], str]:
    """bert-score's F1 without rescaling, 0..100. ``model`` is a name that it knows, or a folder."""
    try:
        from bert_score import BERTScorer
        from bert_score.utils import model2layers
        from transformers import AutoConfig
    except ImportError as error:
        raise ScoreError("BERTScore comes from bert-score: pip install 'selfevo[scores]'") from error
    try:
        layers = model2layers.get(model) or AutoConfig.from_pretrained(model).num_hidden_layers
        scorer = BERTScorer(model_type=model, num_layers=layers, idf=False)
    except OSError as error:
        raise ScoreError(
            f"BERTScore's model {model} cannot be loaded ({str(error).splitlines()[0]}); give a folder that holds one"
        ) from error
    _, _, f1 = scorer.score(list(hypotheses), list(references), verbose=True)
    signature = f"bert_score|model:{model}|layer:{layers}|idf:no|rescaled:no|bert-score:{_version('bert-score')}"
    return [100 * float(value) for value in f1], signature


def _mean_score(values: Sequence[float], signature: str, dialogues: Sequence[Hashable] | None) -> Score:
    interval = bootstrap_interval(values, dialogues)
    drawn = "reply" if dialogues is None else "dialogue"
    return Score(fmean(values), f"{signature}|bs:{SAMPLES}|by:{drawn}", interval, tuple(values))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
