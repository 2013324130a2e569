"""Scores of generated replies: BLEU, ROUGE-L, METEOR, unigram F1, Distinct-n, mean length. Standard library only.

``hypotheses`` is a list of N replies; ``references`` is a list of N entries, each a string or a list of one or more
strings. Scores are floats in 0..100, except ``mean_length``. ValueError is raised for lists that are empty, of unequal
lengths or hold anything but strings, and for unknown settings.

``tokenize`` is any function from a text to a list of hashable tokens: ``tokenize_13a``, ``tokenize_words``,
``tokenize_characters`` for scripts that do not space their words, ``str.split``, or a model's own ``tokenizer.encode``.
It changes every score: print ``signature(...)`` next to one.
"""

import math
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import cache, lru_cache, reduce
from itertools import chain, pairwise
from statistics import fmean
from typing import Any, Literal, NamedTuple, TypeVar

Tokens = Sequence[Hashable]
Tokenizer = Callable[[str], Tokens]
References = Sequence[str] | Sequence[Sequence[str]]
Smoothing = Literal["epsilon", "add-k", "exp", "nist"]
Synonyms = Callable[[str], Iterable[str]]
_Text = TypeVar("_Text", bound=Tokens)

_SIMPLE_WORD = re.compile(r"[^\W_]+")
# What is neither Latin nor common punctuation: only such texts have combining marks, joiners or unspaced scripts.
_NOT_SIMPLE = re.compile("[^\x00-\u012f\u0131-\u02ff\u2010-\u203f\u20a0-\u20bf]")
_JOINERS = "\u200c\u200d"  # inside words of Persian, Hindi and others
# Thai, Lao, Burmese, Khmer, kana and bopomofo, Chinese characters
_UNSPACED = re.compile(
    "[\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u312f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U000323af]"
)
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_SYMBOL = re.compile(r"([!-&(-+/:-@\[-`{-~])")  # ASCII punctuation except ' , - .
# These two also consume the character next to the mark, so some marks of a run stay joined: "5...5" gives 5 . . .5
_MARK_AFTER_NON_DIGIT = re.compile(r"([^0-9])([.,])")
_MARK_BEFORE_NON_DIGIT = re.compile(r"([.,])([^0-9])")
_HYPHEN_AFTER_DIGIT = re.compile(r"([0-9])-")


def tokenize_13a(text: str) -> list[str]:
    """Tokens of WMT's mteval-v13a script, the default of sacreBLEU. Case is kept, punctuation becomes tokens.

    Apostrophes and hyphens stay inside words (``don't``, ``well-being``), as do periods and commas between digits.
    Equal to sacreBLEU's ``Tokenizer13a``. Warns as ``tokenize_words`` does.
    """
    if not text.isascii():
        _warn_of_unspaced(text)
    return list(_tokens_13a(text))


@lru_cache(maxsize=2**16)  # a table of scores tokenizes the same replies and references a dozen times
def _tokens_13a(text: str) -> tuple[str, ...]:
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    text = _SYMBOL.sub(r" \1 ", f" {text} ")
    text = _MARK_AFTER_NON_DIGIT.sub(r"\1 \2 ", text)
    text = _MARK_BEFORE_NON_DIGIT.sub(r" \1 \2", text)
    text = _HYPHEN_AFTER_DIGIT.sub(r"\1 - ", text)
    return tuple(text.split())


def tokenize_words(text: str) -> list[str]:
    """Lower-cased words of any script: letters and digits with their combining marks (vowel signs, diacritics), in NFC.

    Other characters separate words: ``Don't!`` gives ``don``, ``t``. On ASCII text these are the tokens of Google's
    rouge-score without its stemmer (which drops other letters). A joiner (U+200C, U+200D) inside a word belongs to it.
    Warns (UserWarning) of a text in a script that does not space its words, where a whole clause would be one word.
    """
    if _is_simple(text):
        return _SIMPLE_WORD.findall(text.lower())
    _warn_of_unspaced(text)
    return _words().findall(_plain(text))


def tokenize_characters(text: str) -> list[str]:
    """Lower-cased letters and digits, each with its combining marks, in NFC: for Chinese, Japanese, Thai and others."""
    return _characters().findall(_plain(text))


def is_unspaced(text: str) -> bool:
    """Whether most of a text is in a script that does not space its words, such as Chinese, Japanese or Thai."""
    return not _is_simple(text) and 2 * len(_UNSPACED.findall(text)) > len(text)


def _is_simple(text: str) -> bool:
    return text.isascii() or _NOT_SIMPLE.search(text) is None


def _warn_of_unspaced(text: str) -> None:
    if is_unspaced(text):
        warnings.warn(
            "texts without spaces between words are scored by tokenize_characters, not by words", stacklevel=4
        )


def _plain(text: str) -> str:
    """NFC, lower case, without the one separator that Python takes for a letter."""
    return unicodedata.normalize("NFC", text).lower().replace("_", " ")


@cache
def word_pattern() -> str:
    """A regular expression for the words of ``tokenize_words``, in a text without underscores."""
    return rf"\w[\w{_marks()}]*(?:[{_JOINERS}]+[\w{_marks()}]+)*"


@cache
def _words() -> re.Pattern[str]:
    return re.compile(word_pattern())


@cache
def _characters() -> re.Pattern[str]:
    return re.compile(rf"\w[{_marks()}]*")


@cache
def _marks() -> str:
    """All combining marks, for a class of characters; beyond the second plane there are only variation selectors."""
    codes = (*range(0x300, 0x20000), *range(0xE0100, 0xE01F0))
    return "".join(char for char in map(chr, codes) if unicodedata.category(char).startswith("M"))


def ngrams(tokens: Tokens, n: int) -> Iterator[tuple[Hashable, ...]]:
    """The n-grams of a text, in order; none if it has fewer than n tokens."""
    return zip(*(tokens[start:] for start in range(n)), strict=False)


class _Counts(NamedTuple):
    """The sufficient statistics of BLEU for one reply. Lists have one entry per n-gram order."""

    length: int  # tokens of the reply
    reference_length: int  # of the reference closest in length
    matches: list[int]  # n-grams also found in a reference, each at most as often as in the reference with most of it
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
    scores. The brevity penalty uses the reference closest in length; of two equally close ones the shorter, as nltk and
    sacreBLEU do.

    ``smoothing`` (Chen and Cherry 2014) sets what an order without a match counts as:

    - ``None``: nothing, the score is 0. Equals sacreBLEU's ``none`` and nltk's default.
    - ``"epsilon"``: 0.1 matches. Equals nltk's ``method1``.
    - ``"add-k"``: every order above 1 gets one more match and one more n-gram. Equals nltk's ``method2``.
    - ``"exp"``: 1/2 match for the first such order, 1/4 for the next, and so on. Equals sacreBLEU's ``exp``.
    - ``"nist"``: the same, as implemented in nltk's ``method3``.

    For an order in which a reply has no n-gram, nltk counts one unmatched n-gram and sacreBLEU none: ``"epsilon"``,
    ``"add-k"`` and ``"nist"`` follow nltk, ``None`` and ``"exp"`` sacreBLEU (so at corpus level ``None`` differs from
    nltk's default if a reply has fewer than max_n tokens).

    ``effective_order=True`` averages only over the orders in which the reply (the corpus) has n-grams: an exact
    two-word reply then scores 100 in BLEU-4 rather than 0. ``None`` means True for ``"exp"`` at sentence level, as in
    sacreBLEU's ``sentence_bleu``, and False otherwise.

    Degenerate: without a common word the score is 0 under every smoothing, also for empty replies and references.
    Raises ValueError: unusable lists, an unknown level or smoothing, max_n < 1.
    """
    _check_choice("level", level, ("corpus", "sentence"))
    _check_choice("smoothing", smoothing, (None, "epsilon", "add-k", "exp", "nist"))
    _check_order("max_n", max_n)
    if effective_order is None:
        effective_order = level == "sentence" and smoothing == "exp"
    least_total = _least_total(smoothing)
    counts = [_count(reply, goldens, max_n, least_total) for reply, goldens in _pairs(hypotheses, references, tokenize)]
    groups = [counts] if level == "corpus" else [[one] for one in counts]
    return 100 * fmean(_bleu_of(group, max_n, smoothing, effective_order) for group in groups)


def _least_total(smoothing: Smoothing | None) -> int:
    return 1 if smoothing in ("epsilon", "add-k", "nist") else 0  # as nltk


def _count(reply: Tokens, goldens: Sequence[Tokens], max_n: int, least_total: int) -> _Counts:
    length = len(reply)
    matches = [0] * max_n
    for n in range(1, max_n + 1):
        matches[n - 1] = _matches(reply, goldens, n)
        if not matches[n - 1]:
            break  # without a common n-gram there is no longer one either; most pairs stop at n = 2 or 3
    closest = min((abs(len(golden) - length), len(golden)) for golden in goldens)[1]
    totals = [max(length - n + 1, least_total) for n in range(1, max_n + 1)]
    return _Counts(length, closest, matches, totals)


def _matches(reply: Tokens, goldens: Sequence[Tokens], n: int) -> int:
    found = Counter(ngrams(reply, n))
    allowed = Counter(ngrams(goldens[0], n))
    for other in goldens[1:]:
        allowed |= Counter(ngrams(other, n))
    return sum(min(found[ngram], allowed[ngram]) for ngram in found.keys() & allowed.keys())


def _bleu_of(group: Sequence[_Counts], max_n: int, smoothing: Smoothing | None, effective_order: bool) -> float:
    """BLEU (0..1) of the pooled counts of some replies."""
    if not any(one.matches[0] for one in group):
        return 0.0
    length = sum(one.length for one in group)
    orders = min(max_n, max(one.length for one in group)) if effective_order else max_n
    log_precisions = []
    pseudo_match = 1.0
    for n in range(orders):
        matches: float = sum(one.matches[n] for one in group)
        total = sum(one.totals[n] for one in group)
        if smoothing == "add-k" and n > 0:
            matches, total = matches + 1, total + 1
        elif not matches and smoothing == "epsilon":
            matches = 0.1
        elif not matches and smoothing in ("exp", "nist"):
            pseudo_match /= 2
            matches = pseudo_match
        if not matches or not total:
            return 0.0
        log_precisions.append(math.log(matches / total))
    brevity_penalty = math.exp(min(0.0, 1 - sum(one.reference_length for one in group) / length))
    return brevity_penalty * math.exp(math.fsum(log_precisions) / orders)


def distinct_n(
    hypotheses: Sequence[str],
    n: int,
    *,
    level: Literal["corpus", "utterance"] = "corpus",
    tokenize: Tokenizer = tokenize_13a,
) -> float:
    """Distinct-n: the number of different n-grams divided by the number of n-grams (Li et al. 2016), 0..100.

    ``level="corpus"`` is the paper's: over the n-grams of all replies together. It falls as the corpus grows, so
    compare equally many replies. ``"utterance"`` is the mean of the replies' own ratios: it measures repetition inside
    a reply only and is near 100 for any fluent model.

    Degenerate: a reply of fewer than n tokens adds nothing at corpus level. At utterance level it counts as 0, so that
    empty replies cannot raise the mean. Without any n-gram the score is 0.
    Raises ValueError: an unusable list, an unknown level, n < 1.
    """
    _check_choice("level", level, ("corpus", "utterance"))
    _check_order("n", n)
    replies = (list(ngrams(tokenize(text), n)) for text in _texts("hypotheses", hypotheses))
    groups = [list(chain.from_iterable(replies))] if level == "corpus" else replies
    return 100 * fmean(len(set(group)) / max(1, len(group)) for group in groups)


def without_each_group(
    metric: Callable[..., float],
    hypotheses: Sequence[str],
    references: References,
    groups: Sequence[Hashable],
    **settings: Any,
) -> list[float]:
    """The corpus-level ``bleu`` or ``distinct_n`` of the replies that are left without each group: what a jackknife
    needs. ``groups`` names the group of each of the N replies; the result follows the order in which they occur.

    Equals the metric on the remaining replies, and 0 where none remain, but takes the time of few calls, not of one for
    each group. Raises ValueError as the metric does, for another level, and for ``effective_order``.
    """
    if metric not in (bleu, distinct_n) or settings.pop("level", "corpus") != "corpus" or "effective_order" in settings:
        raise ValueError("only corpus-level bleu and distinct_n, without effective_order, are sums over groups")
    places: dict[Hashable, int] = {}
    owners = [places.setdefault(group, len(places)) for group in groups]
    tokenize = settings.get("tokenize", tokenize_13a)
    if metric is bleu:
        return _bleu_without(
            hypotheses, references, owners, tokenize, settings.get("max_n", 4), settings.get("smoothing")
        )
    n = settings["n"]
    _check_order("n", n)
    sizes, found = [0] * len(places), dict[Hashable, int]()  # an n-gram's group, or -1 where several have it
    for owner, text in zip(owners, _texts("hypotheses", hypotheses), strict=True):
        own = list(ngrams(tokenize(text), n))
        sizes[owner] += len(own)
        for ngram in own:
            found[ngram] = owner if found.get(ngram, owner) == owner else -1
    lost = Counter(found.values())
    return [100 * (len(found) - lost[g]) / max(1, sum(sizes) - sizes[g]) for g in range(len(places))]


def _bleu_without(
    hypotheses: Sequence[str], references: References, owners: Sequence[int], tokenize: Tokenizer, max_n: int,
    smoothing: Smoothing | None,
) -> list[float]:  # fmt: skip
    least_total = _least_total(smoothing)
    sums = [_Counts(0, 0, [0] * max_n, [0] * max_n)] * (max(owners) + 1)
    for owner, (reply, goldens) in zip(owners, _pairs(hypotheses, references, tokenize), strict=True):
        sums[owner] = _plus(sums[owner], _count(reply, goldens, max_n, least_total), 1)
    whole = reduce(lambda a, b: _plus(a, b, 1), sums)
    return [100 * _bleu_of([_plus(whole, own, -1)], max_n, smoothing, False) for own in sums]


def _plus(a: _Counts, b: _Counts, sign: int) -> _Counts:
    def add(left: list[int], right: list[int]) -> list[int]:
        return [x + sign * y for x, y in zip(left, right)]

    length, reference_length = add([a.length, a.reference_length], [b.length, b.reference_length])
    return _Counts(length, reference_length, add(a.matches, b.matches), add(a.totals, b.totals))


def mean_length(hypotheses: Sequence[str], *, tokenize: Tokenizer = tokenize_13a) -> float:
    """Mean number of tokens per reply (0 and up). Raises ValueError: an unusable list."""
    return fmean(len(tokenize(text)) for text in _texts("hypotheses", hypotheses))


def unigram_f1(hypotheses: Sequence[str], references: References, *, tokenize: Tokenizer = tokenize_words) -> float:
    """Mean F1 of the words common to reply and reference (as multisets), 0..100; the best of several references.

    Degenerate: an empty reply or an empty reference scores 0. Raises ValueError: unusable lists.
    """

    def f1(reply: Tokens, golden: Tokens) -> float:
        common = (Counter(reply) & Counter(golden)).total()
        return 2 * common / (len(reply) + len(golden)) if common else 0.0

    return _mean_of_best(f1, _pairs(hypotheses, references, tokenize))


def rouge_l(
    hypotheses: Sequence[str], references: References, *, tokenize: Tokenizer = tokenize_words, beta: float = 1.0
) -> float:
    """Mean F of the longest common subsequence (Lin 2004, section 3.1), 0..100; the best of several references.

    F = (1 + beta²)·P·R / (R + beta²·P), where P and R are the subsequence's share of the reply and of the reference.
    ``beta=1`` equals the ``rougeL`` F-measure of Google's rouge-score on the same tokens; the default tokenizer gives
    its tokens on ASCII text. (COCO's caption scorer and scripts derived from it use ``beta=1.2``.)

    Degenerate: an empty reply or an empty reference scores 0. Raises ValueError: unusable lists, beta < 0 or infinite.
    """
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be a finite number of at least 0, not {beta}")

    def f_measure(reply: Tokens, golden: Tokens) -> float:
        common = _lcs_length(reply, golden)
        return (1 + beta * beta) * common / (len(reply) + beta * beta * len(golden)) if common else 0.0

    return _mean_of_best(f_measure, _pairs(hypotheses, references, tokenize))


def _lcs_length(a: Tokens, b: Tokens) -> int:
    """Length of the longest common subsequence, one row of the dynamic-programming table per step (Hyyrö 2004).

    Bit j of ``row`` is 0 if the row's value rises from column j to j + 1. One addition moves, in every run of ones, the
    rise to the first match; so each token of ``a`` costs a few operations on an integer of len(b) bits.
    """
    places: dict[Hashable, int] = {}
    for j, token in enumerate(b):
        places[token] = places.get(token, 0) | 1 << j
    row = full = (1 << len(b)) - 1
    for token in a:
        matching = row & places.get(token, 0)
        row = (row + matching | row - matching) & full
    return len(b) - row.bit_count()


def meteor(
    hypotheses: Sequence[str],
    references: References,
    *,
    tokenize: Callable[[str], Sequence[str]] = tokenize_13a,
    stem: Callable[[str], str] | None = None,
    synonyms: Synonyms | None = None,
) -> float:
    """Mean METEOR (Lavie and Agarwal 2007: alpha 0.9, beta 3, gamma 0.5), 0..100; the best of several references.

    By default lower-cased words match only if equal: *no stemmer and no WordNet*, so the score is below that of the
    usual METEOR and not comparable with it. ``stem`` adds a round of matches between equal stems of the unmatched
    words; ``synonyms``, given a word (or its stem, if ``stem`` is given), adds a round in which one of the words it
    returns is in the reference. With nltk's stemmer and WordNet this is nltk's ``meteor_score``; the score tables use
    these (``selfevo.evaluation.columns``).

    Words are matched as nltk does, from the last word back, each to the last free place in the reference. That is not
    always the alignment with the fewest chunks, which the paper uses. Score = Fmean·(1 − 0.5·(chunks / matches)³),
    Fmean = P·R / (0.9·P + 0.1·R).

    Degenerate: an empty reply, an empty reference or no match scores 0. A perfect reply of m words scores
    100·(1 − 0.5/m³), not 100. Raises ValueError: unusable lists.
    """

    def score(reply: Sequence[str], golden: Sequence[str]) -> float:
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
        chunks = 1 + sum((i + 1, j + 1) != after for (i, j), after in pairwise(sorted(pairs)))
        f_mean = len(pairs) / (0.9 * len(golden) + (1 - 0.9) * len(reply))
        return f_mean * (1 - 0.5 * (chunks / len(pairs)) ** 3)

    pairs = _pairs(hypotheses, references, lambda text: [token.lower() for token in tokenize(text)])
    return _mean_of_best(score, pairs)


def _match(unmatched: dict[int, str], free: dict[int, str], synonyms: Synonyms | None = None) -> list[tuple[int, int]]:
    """Removes equal or synonymous words from both dicts; returns their places (in the reply, in the reference)."""
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


_SCORES_SINCE = "0.1.0"  # the release that last changed a score; signatures end with it
_TOKENS_SINCE = {tokenize_words: "0.2.0", tokenize_characters: "0.2.0"}  # or a later one that changed its tokens
_SHORT_NAMES = {"max_n": "n", "smoothing": "smooth", "effective_order": "eff", "tokenize": "tok"}
_METRICS = (bleu, distinct_n, mean_length, meteor, rouge_l, unigram_f1)
_SETTINGS: dict[str, dict[str, object]] = {metric.__name__: metric.__kwdefaults__ or {} for metric in _METRICS}
_SETTINGS["distinct_n"] = {"n": None} | _SETTINGS["distinct_n"]  # the one setting without a default


def signature(metric_name: str, **settings: object) -> str:
    """How a score was computed, in one line to print next to it.

    ``signature("bleu", max_n=2, level="sentence", smoothing="epsilon")`` gives
    ``bleu|n:2|level:sentence|smooth:epsilon|eff:no|tok:13a|selfevo:0.1.0``. For a metric of this file, settings that
    are not given appear with their defaults; for any other name exactly the given ones appear.

    Raises ValueError: a setting that this file's metric does not have, or the ``n`` of ``distinct_n`` missing.
    """
    if metric_name in _SETTINGS:
        known = _SETTINGS[metric_name]
        if unknown := sorted(settings.keys() - known.keys()):
            raise ValueError(f"{metric_name} has no setting {unknown[0]!r}; it has {', '.join(known)}")
        settings = known | settings
        if metric_name == "distinct_n" and settings["n"] is None:
            raise ValueError("the signature of distinct_n needs a value for 'n'")
        if metric_name == "bleu" and settings["effective_order"] is None:
            settings["effective_order"] = settings["level"] == "sentence" and settings["smoothing"] == "exp"
    fields = (f"{_SHORT_NAMES.get(name, name)}:{_printed(value)}" for name, value in settings.items())
    since = next((s for tokens, s in _TOKENS_SINCE.items() if settings.get("tokenize") is tokens), _SCORES_SINCE)
    return "|".join([metric_name, *fields, f"selfevo:{since}"])


def _printed(value: object) -> str:
    if callable(value):
        return str(getattr(value, "__qualname__", type(value).__qualname__)).removeprefix("tokenize_")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _check_choice(name: str, value: object, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(map(repr, choices))}")


def _check_order(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


def _texts(name: str, texts: Sequence[str]) -> Sequence[str]:
    if not isinstance(texts, Sequence) or isinstance(texts, str) or not texts:
        raise ValueError(f"{name} must be a list of at least one string, not {texts!r:.60}")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{index}] must be a string, not {text!r:.60}")
    return texts


def _pairs(
    hypotheses: Sequence[str], references: References, tokenize: Callable[[str], _Text]
) -> Iterator[tuple[_Text, list[_Text]]]:
    """Checks both lists and gives each reply's tokens with those of its references, one pair at a time."""
    replies = _texts("hypotheses", hypotheses)
    if not isinstance(references, Sequence) or isinstance(references, str):
        raise ValueError(f"references must be a list, not {references!r:.60}")
    if len(references) != len(replies):
        raise ValueError(f"{len(replies)} hypotheses need as many entries in references, not {len(references)}")
    goldens = [[own] if isinstance(own, str) else _texts(f"references[{i}]", own) for i, own in enumerate(references)]
    return ((tokenize(reply), list(map(tokenize, own))) for reply, own in zip(replies, goldens, strict=True))


def _mean_of_best(score: Callable[[_Text, _Text], float], pairs: Iterator[tuple[_Text, list[_Text]]]) -> float:
    """The mean over replies, times 100, of a reply's best score against one of its references."""
    return 100 * fmean(max(score(reply, golden) for golden in goldens) for reply, goldens in pairs)
