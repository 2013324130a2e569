"""Scores of generated replies: BLEU, ROUGE-L, METEOR, unigram F1, Distinct-n, mean length. Standard library only.

Every function takes ``hypotheses``, a list of N replies, and most also ``references``, a list of N entries, each one
string or a list of one or more strings (they need not be equally many). Scores are floats in 0..100, except
``mean_length``. Lists that are unusable (empty, of unequal lengths, a string for a list, an item that is no string, a
reply without a reference) and settings that do not exist raise ``ValueError``.

``tokenize`` is any function from a text to a list of hashable tokens: ``tokenize_13a``, ``tokenize_words``,
``str.split``, or a model's own ``tokenizer.encode``. It changes every score: print ``signature(...)`` next to one.
"""

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple, TypeVar

__all__ = [
    "Tokenizer",
    "Tokens",
    "bleu",
    "distinct_n",
    "mean_length",
    "meteor",
    "ngrams",
    "rouge_l",
    "signature",
    "tokenize_13a",
    "tokenize_words",
    "unigram_f1",
]

Tokens = Sequence[Hashable]
Tokenizer = Callable[[str], Tokens]
_WORD = re.compile(r"[^\W_]+")
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_SYMBOL = re.compile(r"([!-&(-+/:-@\[-`{-~])")  # ASCII punctuation but ' , - .
# These two consume the neighbour they look at, so in a run of marks some stay joined: "5...5" is 5 . . .5 for mteval.
_MARK_AFTER_NON_DIGIT = re.compile(r"([^0-9])([.,])")
_MARK_BEFORE_NON_DIGIT = re.compile(r"([.,])([^0-9])")
_HYPHEN_AFTER_DIGIT = re.compile(r"([0-9])-")


def tokenize_13a(text: str) -> list[str]:
    """Tokens of WMT's mteval-v13a script, the default of sacreBLEU. Case is kept, punctuation becomes tokens.

    Apostrophes and hyphens stay inside words (``don't``, ``well-being``), as do points and commas between digits.
    Equal to sacreBLEU's ``Tokenizer13a``. (Its BLEU first strips the end of a line; that tells only after ``-\\n``.)
    """
    return list(_tokens_13a(text))


@lru_cache(maxsize=2**16)  # a table of scores sees the same replies and references a dozen times
def _tokens_13a(text: str) -> tuple[str, ...]:
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    if "&" in text:
        for entity, character in _ENTITIES:
            text = text.replace(entity, character)
    text = _SYMBOL.sub(r" \1 ", f" {text} ")
    text = _MARK_AFTER_NON_DIGIT.sub(r"\1 \2 ", text)
    text = _MARK_BEFORE_NON_DIGIT.sub(r" \1 \2", text)
    text = _HYPHEN_AFTER_DIGIT.sub(r"\1 - ", text)
    return tuple(text.split())


def tokenize_words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits, of any script; all else separates: ``Don't!`` gives ``don``, ``t``.

    On ASCII text these are the tokens of Google's rouge-score without its stemmer (which drops other letters).
    """
    return _WORD.findall(text.lower())


def ngrams(tokens: Tokens, n: int) -> Iterator[tuple[Hashable, ...]]:
    """The n-grams of a text, in order; none where it has fewer than n tokens."""
    return zip(*(tokens[start:] for start in range(n)), strict=False)


References = Sequence[str] | Sequence[Sequence[str]]
TextMap = Callable[[str], str]
Synonyms = Callable[[str], Iterable[str]]
Smoothing = Literal["epsilon", "add-k", "exp", "nist"]
Token = TypeVar("Token", bound=Hashable)
_SCORES_SINCE = "0.1.0"  # the release that last changed a score; signatures end with it
_SHORT_NAMES = {"max_n": "n", "smoothing": "smooth", "effective_order": "eff", "tokenize": "tok"}
_METEOR_ALPHA, _METEOR_BETA, _METEOR_GAMMA = 0.9, 3, 0.5


class _Counts(NamedTuple):
    """What BLEU needs to know of one reply. Lists have one entry per n-gram order."""

    length: int  # tokens of the reply
    reference_length: int  # of the reference closest in length
    matches: list[int]  # n-grams also found in a reference, each at most as often as in the one that has most of it
    totals: list[int]  # n-grams of the reply


def bleu(
    hypotheses: Sequence[str],
    references: References,
    *,
    max_n: int = 4,
    level: Literal["corpus", "sentence"] = "corpus",
    smoothing: Smoothing | None = None,
    effective_order: bool | None = None,
    tokenize: Tokenizer = tokenize_13a,
) -> float:
    """BLEU with uniform weights over 1..max_n-grams (Papineni et al. 2002), 0..100.

    ``level="corpus"`` pools the counts of all replies into one score; ``"sentence"`` is the mean of the replies' own
    scores, which is another number. The brevity penalty takes the reference closest in length; of two equally close
    ones the shorter, as nltk and sacreBLEU do.

    ``smoothing`` (Chen and Cherry 2014) says what an order without a match counts as:

    - ``None``: nothing, the score is 0. Equals sacreBLEU's ``none`` and nltk's default.
    - ``"epsilon"``: 0.1 matches. Equals nltk's ``method1``.
    - ``"add-k"``: every order above 1 gets one more match and one more n-gram. Equals nltk's ``method2``.
    - ``"exp"``: 1/2 match for the first such order, 1/4 for the next, and so on. Equals sacreBLEU's ``exp``.
    - ``"nist"``: the same, as nltk's ``method3`` has it.

    The two packages differ on replies shorter than max_n tokens. For an order in which a reply has no n-gram, nltk
    counts one unmatched n-gram and sacreBLEU none: ``"epsilon"``, ``"add-k"`` and ``"nist"`` follow nltk, ``None`` and
    ``"exp"`` sacreBLEU and the paper (so on a corpus with such replies ``None`` is not nltk's default; on single
    replies it is).

    ``effective_order=True`` averages only over the orders in which the reply (the corpus) has n-grams, so that an exact
    two-word reply scores 100 in BLEU-4 rather than 0. ``None`` does as the smoothing's source: sacreBLEU's
    ``sentence_bleu`` does so, hence ``"exp"`` at sentence level; in all other cases it is False.

    Degenerate: without one common word the score is 0 whatever the smoothing, so for empty replies and references too.
    Raises ValueError: unusable lists, an unknown level or smoothing, max_n < 1.
    """
    _check_choice("level", level, ("corpus", "sentence"))
    _check_choice("smoothing", smoothing, (None, "epsilon", "add-k", "exp", "nist"))
    _check_order("max_n", max_n)
    if effective_order is None:
        effective_order = _effective_order_by_default(level, smoothing)
    least_total = 1 if smoothing in ("epsilon", "add-k", "nist") else 0
    counts = [_count(reply, goldens, max_n, least_total) for reply, goldens in _pairs(hypotheses, references, tokenize)]
    groups = [counts] if level == "corpus" else [[one] for one in counts]
    return 100 * _mean(_bleu_of(group, max_n, smoothing, effective_order) for group in groups)


def _effective_order_by_default(level: object, smoothing: object) -> bool:
    return level == "sentence" and smoothing == "exp"


def _count(reply: Tokens, goldens: Sequence[Tokens], max_n: int, least_total: int) -> _Counts:
    matches = [0] * max_n
    for n in range(1, max_n + 1):
        matches[n - 1] = _matches(reply, goldens, n)
        if not matches[n - 1]:
            break  # without a common n-gram there is no longer one either; most pairs stop at n = 2 or 3
    length = len(reply)
    closest = min((abs(len(golden) - length), len(golden)) for golden in goldens)[1]
    totals = [max(length - n + 1, least_total) for n in range(1, max_n + 1)]
    return _Counts(length, closest, matches, totals)


def _matches(reply: Tokens, goldens: Sequence[Tokens], n: int) -> int:
    golden, *others = goldens
    if not others:
        found_once, allowed_once = set(ngrams(reply, n)), set(ngrams(golden, n))
        if len(found_once) == len(reply) - n + 1 or len(allowed_once) == len(golden) - n + 1:
            return len(found_once & allowed_once)  # one side repeats nothing, so nothing matches twice
    allowed = Counter(ngrams(golden, n))
    for other in others:
        allowed |= Counter(ngrams(other, n))
    found = Counter(ngrams(reply, n))
    return sum(min(found[ngram], allowed[ngram]) for ngram in found.keys() & allowed.keys())


def _bleu_of(group: Sequence[_Counts], max_n: int, smoothing: Smoothing | None, effective_order: bool) -> float:
    """BLEU (0..1) of the pooled counts of a group of replies."""
    length = sum(one.length for one in group)
    reference_length = sum(one.reference_length for one in group)
    orders = min(max_n, max(one.length for one in group)) if effective_order else max_n
    matches = [sum(column) for column in zip(*(one.matches[:orders] for one in group), strict=True)]
    totals = [sum(column) for column in zip(*(one.totals[:orders] for one in group), strict=True)]
    if not any(matches):
        return 0.0
    precisions = _smoothed_precisions(matches, totals, smoothing)
    if not all(precisions):
        return 0.0
    brevity_penalty = math.exp(min(0.0, 1 - reference_length / length))
    return brevity_penalty * math.exp(math.fsum(map(math.log, precisions)) / orders)


def _smoothed_precisions(matches: list[int], totals: list[int], smoothing: Smoothing | None) -> list[float]:
    precisions = []
    pseudo_match = 1.0
    for n, (match, total) in enumerate(zip(matches, totals, strict=True), start=1):
        if smoothing == "add-k" and n > 1:
            precisions.append((match + 1) / (total + 1))
        elif match:
            precisions.append(match / total)
        elif smoothing == "epsilon":
            precisions.append(0.1 / total)
        elif smoothing in ("exp", "nist") and total:
            pseudo_match /= 2
            precisions.append(pseudo_match / total)
        else:
            precisions.append(0.0)
    return precisions


def distinct_n(
    hypotheses: Sequence[str],
    n: int,
    *,
    level: Literal["corpus", "utterance"] = "corpus",
    tokenize: Tokenizer = tokenize_13a,
) -> float:
    """Distinct-n: the share of n-grams that are not repetitions (Li et al. 2016), 0..100.

    ``level="corpus"`` is the paper's: distinct n-grams of all replies together / all their n-grams. It falls as the
    corpus grows, so compare equally many replies. ``"utterance"`` is the mean of the replies' own ratios: it sees
    repetition inside a reply only and is near 100 for any fluent model.

    Degenerate: a reply of fewer than n tokens adds nothing at corpus level. At utterance level it counts as 0, so that
    the mean is over the same N replies for every model and empty replies cannot raise it. No n-gram at all scores 0.
    Raises ValueError: an unusable list, an unknown level, n < 1.
    """
    _check_choice("level", level, ("corpus", "utterance"))
    _check_order("n", n)
    replies = (list(ngrams(tokenize(text), n)) for text in _texts("hypotheses", hypotheses))
    if level == "utterance":
        return 100 * _mean(len(set(own)) / max(1, len(own)) for own in replies)
    distinct: set[tuple[Hashable, ...]] = set()
    total = 0
    for own in replies:
        distinct.update(own)
        total += len(own)
    return 100 * (len(distinct) / max(1, total))


def mean_length(hypotheses: Sequence[str], *, tokenize: Tokenizer = tokenize_13a) -> float:
    """Mean number of tokens per reply (0 and up). Raises ValueError: an unusable list."""
    return _mean(len(tokenize(text)) for text in _texts("hypotheses", hypotheses))


def unigram_f1(hypotheses: Sequence[str], references: References, *, tokenize: Tokenizer = tokenize_words) -> float:
    """Mean F1 of the words that reply and reference share, each as often as in both, 0..100; of several the best.

    Degenerate: an empty reply or an empty reference scores 0. Raises ValueError: unusable lists.
    """
    pairs = _pairs(hypotheses, references, tokenize)
    return 100 * _mean(max(_overlap_f1(reply, golden) for golden in goldens) for reply, goldens in pairs)


def _overlap_f1(reply: Tokens, golden: Tokens) -> float:
    common = (Counter(reply) & Counter(golden)).total()
    return 2 * common / (len(reply) + len(golden)) if common else 0.0


def rouge_l(
    hypotheses: Sequence[str], references: References, *, tokenize: Tokenizer = tokenize_words, beta: float = 1.0
) -> float:
    """Mean F of the longest common subsequence (Lin 2004, section 3.1), 0..100; of several references the best.

    F = (1 + beta²)·P·R / (R + beta²·P), P and R being the subsequence's share of the reply and of the reference.
    ``beta=1`` equals the ``rougeL`` F-measure of Google's rouge-score on the same tokens; the default tokenizer gives
    its tokens on ASCII text. (COCO's caption scorer and its heirs use ``beta=1.2``.)

    Degenerate: an empty reply or an empty reference scores 0.
    Raises ValueError: unusable lists, beta negative or not finite.
    """
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be a finite number of at least 0, not {beta}")
    pairs = _pairs(hypotheses, references, tokenize)
    return 100 * _mean(max(_lcs_f(reply, golden, beta * beta) for golden in goldens) for reply, goldens in pairs)


def _lcs_f(reply: Tokens, golden: Tokens, beta_squared: float) -> float:
    common = _lcs_length(reply, golden)
    return (1 + beta_squared) * common / (len(reply) + beta_squared * len(golden)) if common else 0.0


def _lcs_length(a: Tokens, b: Tokens) -> int:
    """Length of the longest common subsequence, a whole row of the usual table per step (Hyyrö 2004).

    Bit j of ``row`` is 0 where the row's value rises from column j to j + 1. One addition moves, in every run of ones,
    the rise to the first match; so each token of ``a`` costs a few operations on an integer of len(b) bits.
    """
    places: dict[Hashable, int] = {}
    for j, token in enumerate(b):
        places[token] = places.get(token, 0) | 1 << j
    full = (1 << len(b)) - 1
    row = full
    for token in a:
        matching = row & places.get(token, 0)
        if matching:
            row = (row + matching | row - matching) & full
    return len(b) - row.bit_count()


def meteor(
    hypotheses: Sequence[str],
    references: References,
    *,
    tokenize: Callable[[str], Sequence[str]] = tokenize_13a,
    stem: TextMap | None = None,
    synonyms: Synonyms | None = None,
) -> float:
    """Mean METEOR (Lavie and Agarwal 2007: alpha 0.9, beta 3, gamma 0.5), 0..100; of several references the best.

    By default lower-cased words match only if equal: *no stemmer and no WordNet*, so the score is below that of the
    usual METEOR and not comparable with it. ``stem`` adds a round of matches between equal stems of the words left
    over; ``synonyms``, given a word (or its stem, if ``stem`` is given), adds a round in which one of the words it
    returns is in the reference. With nltk's own parts this is nltk's ``meteor_score``::

        stem=PorterStemmer().stem
        synonyms=lambda word: {l.name() for s in wordnet.synsets(word) for l in s.lemmas() if "_" not in l.name()}

    Words are matched as nltk does, from the last word back, each to the last free place in the reference. That is not
    always the alignment with the fewest chunks which the paper asks for. Score = Fmean·(1 − 0.5·(chunks / matches)³),
    Fmean = P·R / (0.9·P + 0.1·R).

    Degenerate: an empty reply, an empty reference or no match scores 0. A perfect reply of m words scores
    100·(1 − 0.5/m³), not 100.
    Raises ValueError: unusable lists.
    """

    def lower_cased(text: str) -> list[str]:
        return list(map(str.lower, tokenize(text)))

    pairs = _pairs(hypotheses, references, lower_cased)
    return 100 * _mean(max(_meteor_of(reply, golden, stem, synonyms) for golden in goldens) for reply, goldens in pairs)


def _meteor_of(reply: Sequence[str], golden: Sequence[str], stem: TextMap | None, synonyms: Synonyms | None) -> float:
    unmatched, free = dict(enumerate(reply)), dict(enumerate(golden))
    pairs = _match(unmatched, free)
    if stem is not None:
        unmatched = {place: stem(word) for place, word in unmatched.items()}
        free = {place: stem(word) for place, word in free.items()}
        pairs += _match(unmatched, free)
    if synonyms is not None:
        pairs += _match(unmatched, free, synonyms)
    if not pairs:
        return 0.0
    pairs.sort()
    chunks = 1 + sum((i + 1, j + 1) != after for (i, j), after in pairwise(pairs))
    f_mean = len(pairs) / (_METEOR_ALPHA * len(golden) + (1 - _METEOR_ALPHA) * len(reply))
    return f_mean * (1 - _METEOR_GAMMA * (chunks / len(pairs)) ** _METEOR_BETA)


def _match(unmatched: dict[int, str], free: dict[int, str], synonyms: Synonyms | None = None) -> list[tuple[int, int]]:
    """Pairs of places (in the reply, in the reference) with equal or synonymous words; takes them out of both dicts."""
    places: dict[str, list[int]] = {}
    for place, word in free.items():
        places.setdefault(word, []).append(place)
    pairs = []
    for place, word in reversed(list(unmatched.items())):
        spots = places.get(word)
        if synonyms is not None:
            spots = max((places.get(other, []) for other in {word, *synonyms(word)}), key=lambda found: found[-1:])
        if spots:
            pairs.append((place, spots.pop()))
    for place, golden_place in pairs:
        del unmatched[place], free[golden_place]
    return pairs


def signature(metric_name: str, **settings: object) -> str:
    """How a score was computed, in one line to print next to it.

    ``signature("bleu", max_n=2, level="sentence", smoothing="epsilon")`` gives
    ``bleu|n:2|level:sentence|smooth:epsilon|eff:no|tok:13a|selfevo:0.1.0``. For this file's metrics, settings that are
    not given appear with their defaults; for any other name exactly the given ones appear.

    Raises ValueError: a setting that this file's metric does not have, or the ``n`` of ``distinct_n`` missing.
    """
    metrics = {f.__name__: f for f in _METRICS}
    if metric_name in metrics:
        settings = _all_settings(metric_name, metrics[metric_name], settings)
    fields = (f"{_SHORT_NAMES.get(name, name)}:{_printed(value)}" for name, value in settings.items())
    return "|".join([metric_name, *fields, f"selfevo:{_SCORES_SINCE}"])


_METRICS: tuple[Callable[..., float], ...] = (bleu, distinct_n, mean_length, meteor, rouge_l, unigram_f1)


def _all_settings(metric_name: str, metric: Callable[..., float], given: dict[str, object]) -> dict[str, object]:
    parameters = inspect.signature(metric).parameters
    known = {name: p.default for name, p in parameters.items() if name not in ("hypotheses", "references")}
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise ValueError(f"{metric_name} has no setting {unknown[0]!r}; it has {', '.join(known)}")
    settings = {**known, **given}
    missing = [name for name, value in settings.items() if value is inspect.Parameter.empty]
    if missing:
        raise ValueError(f"the signature of {metric_name} needs a value for {missing[0]!r}")
    if settings.get("effective_order", False) is None:
        settings["effective_order"] = _effective_order_by_default(settings["level"], settings["smoothing"])
    return settings


def _printed(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if callable(value):
        return str(getattr(value, "__qualname__", type(value).__qualname__)).removeprefix("tokenize_")
    return "none" if value is None else str(value)


def _mean(values: Iterable[float]) -> float:
    """Exactly rounded sum, so that the order of the replies cannot change a score."""
    listed = list(values)
    return math.fsum(listed) / len(listed)


def _check_choice(name: str, value: object, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(map(repr, choices))}")


def _check_order(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _texts(name: str, texts: Sequence[str]) -> Sequence[str]:
    if not _is_list(texts) or not texts:
        raise ValueError(f"{name} must be a list of at least one string, not {texts!r:.60}")
    wrong = [index for index, text in enumerate(texts) if not isinstance(text, str)]
    if wrong:
        raise ValueError(f"{name}[{wrong[0]}] must be a string, not {texts[wrong[0]]!r:.60}")
    return texts


def _pairs(
    hypotheses: Sequence[str], references: References, tokenize: Callable[[str], Sequence[Token]]
) -> Iterator[tuple[Sequence[Token], list[Sequence[Token]]]]:
    """Checks both lists and gives each reply's tokens with those of its references, one pair at a time."""
    replies = _texts("hypotheses", hypotheses)
    if not _is_list(references):
        raise ValueError(f"references must be a list, not {references!r:.60}")
    if len(references) != len(replies):
        raise ValueError(f"{len(replies)} hypotheses need as many entries in references, not {len(references)}")
    entries = [[entry] if isinstance(entry, str) else entry for entry in references]
    goldens = [_texts(f"references[{index}]", entry) for index, entry in enumerate(entries)]
    return ((tokenize(reply), list(map(tokenize, own))) for reply, own in zip(replies, goldens, strict=True))
