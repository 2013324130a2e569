"""The columns of the score tables: which metrics, over which tokens, at which level, with which uncertainty.

A convention is a set of columns. Ours (``paper``) has the scores of Tables 2 and 6, as means over replies;
``characters`` has them over characters, for languages that do not space their words. The others reproduce the metric
scripts of published work on emotional support conversation, since numbers under different conventions cannot be
compared: ``esconv`` is that of Liu et al. (2021), ``decoupledesc`` that of Zhang et al. (2025).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from statistics import fmean
from typing import Any

from selfevo import metrics
from selfevo.evaluation.significance import SAMPLES, bootstrap_interval, jackknife_interval

CONVENTIONS = ("paper", "characters", "esconv", "decoupledesc")
EXTRAS = ("METEOR", "BERTScore")
BERT_MODEL = "roberta-large"  # bert-score's own choice for English
Texts = Sequence[str]


class ScoreError(ValueError):
    """A score that cannot be computed here; the message says what to install or to give."""


@dataclass(frozen=True)
class Column:
    """A measure of (hypotheses, references). Its score is the mean of the single replies' scores, or with ``without``,
    which gives (hypotheses, references, groups) without each group, one score of the whole corpus."""

    name: str
    signature: str
    measure: Callable[[Texts, Texts], float]
    without: Callable[[Texts, Texts, Sequence[Hashable]], list[float]] | None = None


@dataclass(frozen=True)
class Score:
    """One cell: its value (0..100, or tokens for the length), how it was computed, and its 95 % interval: of a mean
    over replies by bootstrap, of a score of the whole corpus by the jackknife, whole dialogues drawn or left out.
    ``values`` has that of each reply."""

    value: float
    signature: str
    interval: tuple[float, float]
    values: tuple[float, ...] | None = None


def score_replies(
    hypotheses: Texts,
    references: Texts,
    dialogues: Sequence[Hashable] | None = None,
    *,
    convention: str = "paper",
) -> dict[str, Score]:
    """The scores of N sampled replies against N human ones, by column; ``dialogues`` (N,) names the dialogue of each.

    Raises ValueError for unusable lists and an unknown convention, ScoreError where a package or its data are missing.
    """
    scores: dict[str, Score] = {}
    drawn = "reply" if dialogues is None else "dialogue"
    for column in columns(convention):
        if column.without is None:
            values = [column.measure([hyp], [ref]) for hyp, ref in zip(hypotheses, references, strict=True)]
            scores[column.name] = _mean_score(values, column.signature, dialogues)
        else:
            value = column.measure(hypotheses, references)
            groups = range(len(hypotheses)) if dialogues is None else dialogues
            interval = jackknife_interval(value, column.without(hypotheses, references, groups))
            scores[column.name] = Score(value, f"{column.signature}|jackknife|by:{drawn}", interval)
    return scores


def extra_score(
    name: str,
    hypotheses: Texts,
    references: Texts,
    dialogues: Sequence[Hashable] | None = None,
    *,
    bert_model: str = "",
) -> Score:
    """METEOR (with nltk's stemmer and WordNet) or BERTScore (bert-score), which need packages and data beyond ours.

    Without a ``bert_model``, a name or a folder, BERTScore takes ``BERT_MODEL`` if that was downloaded before. Raises
    ScoreError that says what is missing, ValueError for another name.
    """
    if name not in EXTRAS:
        raise ValueError(f"an extra score should be one of {', '.join(EXTRAS)}, not {name!r}")
    if name == "METEOR":
        return _mean_score(*_meteor(hypotheses, references), dialogues)
    return _mean_score(*_bert_score(hypotheses, references, bert_model), dialogues)


def in_order(names: Iterable[str]) -> list[str]:
    """Columns as Table 2 has them: METEOR and BERTScore after ROUGE-L, the others as they come."""
    own = [name for name in dict.fromkeys(names) if name not in EXTRAS]
    place = own.index("ROUGE-L") + 1 if "ROUGE-L" in own else len(own)
    return [*own[:place], *(name for name in EXTRAS if name in names), *own[place:]]


def columns(convention: str) -> list[Column]:
    """The columns of a convention; raises ValueError for one that is not in ``CONVENTIONS``."""
    if convention not in CONVENTIONS:
        raise ValueError(f"the convention should be one of {', '.join(CONVENTIONS)}, not {convention!r}")
    if convention in ("esconv", "decoupledesc"):
        return _script_columns(pooled=convention == "esconv")
    how: dict[str, Any] = {"tokenize": metrics.tokenize_characters} if convention == "characters" else {}
    rouge, length = _column("ROUGE-L", metrics.rouge_l, **how), _column("Length", metrics.mean_length, **how)
    return [
        *_bleu(2, 3, **how), rouge, *_distinct("utterance", **how), *_distinct("corpus", " (corpus)", **how), length,
    ]  # fmt: skip


def support_columns() -> list[Column]:
    """The columns of Decoupled ESC over our own tokens, means over replies (``decoupledesc`` has them as published)."""
    f1, length = _column("F1", metrics.unigram_f1), _column("Length", metrics.mean_length)
    return [*_bleu(1, 2, 3, 4), _column("ROUGE-L", metrics.rouge_l), f1, *_distinct("utterance"), length]


def _script_columns(*, pooled: bool) -> list[Column]:
    """The columns of ESConv's script, over lower-cased nltk words: BLEU with nltk's ``method3``, ROUGE-L with beta 1.2.

    ESConv pools BLEU and Distinct over the corpus, and its Distinct leaves out every reply's last n-gram; DecoupledESC
    scores each reply by itself, with all its n-grams, and averages.
    """
    with _optional_package("this convention", data="punkt_tab"):
        import nltk

        nltk.word_tokenize("")  # raises LookupError if its data are missing

    def tokenize(text: str) -> list[str]:
        return list(nltk.word_tokenize(text.lower()))

    words: dict[str, Any] = {"tokenize": tokenize, "tokens": f"nltk-{nltk.__version__}-lower"}
    but_last: dict[str, Any] = {"tokenize": lambda text: tokenize(text)[:-1], "tokens": f"{words['tokens']}-but-last"}
    return [
        _column("Length", metrics.mean_length, **words),
        *(_distinct("corpus", **but_last) if pooled else _distinct("utterance", **words)),
        *_bleu(1, 2, 3, 4, level="corpus" if pooled else "sentence", smoothing="nist", **words),
        _column("F1", metrics.unigram_f1, **words),
        _column("ROUGE-L", metrics.rouge_l, beta=1.2, **words),
    ]


def _bleu(*orders: int, level: str = "sentence", smoothing: str = "epsilon", **how: Any) -> list[Column]:
    return [_column(f"BLEU-{n}", metrics.bleu, max_n=n, level=level, smoothing=smoothing, **how) for n in orders]


def _distinct(level: str, suffix: str = "", **how: Any) -> list[Column]:
    return [_column(f"Distinct-{n}{suffix}", metrics.distinct_n, n=n, level=level, **how) for n in (1, 2, 3)]


def _column(name: str, metric: Callable[..., float], *, tokens: str = "", **settings: Any) -> Column:
    """A column of a metric under its ``settings``; ``tokens`` is the name of its tokenizer in the signature."""
    signature = metrics.signature(metric.__name__, **settings | ({"tokenize": tokens} if tokens else {}))
    measure = partial(metric, **settings)
    without = None
    if settings.get("level") == "corpus":
        without = partial(metrics.without_each_group, metric, **settings)
    if metric in (metrics.distinct_n, metrics.mean_length):  # which take no references
        return Column(name, signature, lambda hypotheses, _: measure(hypotheses), without)
    return Column(name, signature, measure, without)


def _meteor(hypotheses: Texts, references: Texts) -> tuple[list[float], str]:
    """METEOR with nltk's Porter stemmer and WordNet, 0..100, over ``tokenize_13a`` tokens: equals nltk's METEOR."""
    with _optional_package("METEOR", data="wordnet"):
        import nltk

        def synonyms(word: str) -> set[str]:
            return {lemma.name() for synset in nltk.corpus.wordnet.synsets(word) for lemma in synset.lemmas()}

        measure = partial(metrics.meteor, stem=nltk.PorterStemmer().stem, synonyms=synonyms)
        values = [measure([hyp], [ref]) for hyp, ref in zip(hypotheses, references)]
    return values, f"meteor|tok:13a|stem:porter|synonyms:wordnet|nltk:{nltk.__version__}"


def _bert_score(hypotheses: Texts, references: Texts, chosen: str) -> tuple[list[float], str]:
    """bert-score's F1 without rescaling, 0..100."""
    model = chosen or BERT_MODEL
    with _optional_package("BERTScore"):
        import bert_score
        from transformers import AutoConfig
    try:
        config = AutoConfig.from_pretrained(model, local_files_only=not chosen)
        layers = bert_score.utils.model2layers.get(model) or config.num_hidden_layers
        scorer = bert_score.BERTScorer(model_type=model, num_layers=layers, idf=False)
    except OSError as error:
        raise ScoreError(
            f"BERTScore's model {model} is not on this machine, or cannot be loaded: give its name to fetch it, or a "
            "folder that holds one (--bert-model)"
        ) from error
    _, _, f1 = scorer.score(list(hypotheses), list(references), verbose=True)
    signature = f"bert_score|model:{model}|layer:{layers}|idf:no|rescaled:no|bert-score:{version('bert-score')}"
    return [100 * float(value) for value in f1], signature


@contextmanager
def _optional_package(purpose: str, *, data: str = "") -> Iterator[None]:
    """If a package or nltk's ``data`` are missing, raises ScoreError that says how to install them."""
    try:
        yield
    except ImportError as error:
        raise ScoreError(f"{purpose} needs {error.name or 'a package'}: pip install 'selfevo[scores]'") from error
    except LookupError as error:
        raise ScoreError(
            f"{purpose} needs nltk's data: run python -m nltk.downloader {data} (or set NLTK_DATA)"
        ) from error
    except OSError as error:
        raise ScoreError(
            f"{purpose} cannot read nltk's data ({' '.join(str(error).split())}): download them again, by "
            f"python -m nltk.downloader {data}"
        ) from error


def _mean_score(values: Sequence[float], signature: str, dialogues: Sequence[Hashable] | None) -> Score:
    drawn = "reply" if dialogues is None else "dialogue"
    interval = bootstrap_interval(values, dialogues)
    return Score(fmean(values), f"{signature}|bs:{SAMPLES}|by:{drawn}", interval, tuple(values))
