"""selfevo.metrics against nltk, sacreBLEU and rouge-score, against numbers worked out by hand, and its properties."""

import ast
import functools
import json
import math
import random
import re
import sys
import unicodedata
import warnings
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu, sentence_bleu
from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize as google_tokenize
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

import selfevo.metrics
from selfevo.metrics import (
    bleu,
    distinct_n,
    is_unspaced,
    mean_length,
    meteor,
    rouge_l,
    signature,
    tokenize_13a,
    tokenize_characters,
    tokenize_words,
    unigram_f1,
    without_each_group,
)

NLTK_SMOOTHING = {None: "method0", "epsilon": "method1", "add-k": "method2", "nist": "method3"}
SACREBLEU_SMOOTHING = {None: "none", "exp": "exp"}
LEVELS = ("corpus", "sentence")
SMOOTHINGS = (None, "epsilon", "add-k", "exp", "nist")

pytestmark = pytest.mark.filterwarnings(
    r"ignore:\s*The hypothesis contains 0 counts", "ignore:texts without spaces between words"
)


def given(*args, **kwargs):
    """hypothesis.given without its time limit per example, which a busy machine breaks."""
    return lambda test: hypothesis.settings(deadline=None)(hypothesis.given(*args, **kwargs)(test))


def close(value: float):
    return pytest.approx(value, abs=1e-6, rel=0)


# --- what the tests score ---------------------------------------------------------------------------------------------


def texts(min_tokens: int = 0, max_tokens: int = 12):
    """Texts of few words, so that replies and references share n-grams."""
    words = st.sampled_from(["a", "b", "c", "A", "cats", "cat", ",", "!", "5", "é", "世界"])
    return st.lists(words, min_size=min_tokens, max_size=max_tokens).map(" ".join)


def corpora(min_tokens: int = 0):
    """(hypotheses, references), with one to three references each."""
    pair = st.tuples(texts(min_tokens), st.lists(texts(), min_size=1, max_size=3))
    return st.lists(pair, min_size=1, max_size=6).map(lambda pairs: ([h for h, _ in pairs], [r for _, r in pairs]))


@pytest.fixture(scope="module")
def esconv(shared) -> tuple[list[str], list[list[str]]]:
    """600 real replies: some vary one of their references a little, the others belong to other dialogues."""
    dialogues = json.loads((shared / "data" / "esconv_test.json").read_text(encoding="utf-8"))
    utterances = [turn["content"] for dialogue in dialogues for turn in dialogue["dialog"]]
    random_ = random.Random(0)
    hypotheses, references = [], []
    for utterance in utterances[:600]:
        kept = " ".join(word for word in utterance.split(" ") if random_.random() < 0.8)
        hypotheses.append(random_.choice([kept, utterance, random_.choice(utterances)]))
        references.append([utterance, *random_.sample(utterances, random_.randrange(3))])
    return hypotheses, references


def split_all(corpus):
    hypotheses, references = corpus
    return [h.split() for h in hypotheses], [[r.split() for r in own] for own in references]


def nltk_bleu(corpus, max_n, level, smoothing) -> float:
    hypotheses, references = split_all(corpus)
    how = {
        "weights": (1 / max_n,) * max_n,
        "smoothing_function": getattr(SmoothingFunction(), NLTK_SMOOTHING[smoothing]),
    }
    if level == "corpus":
        return 100 * corpus_bleu(references, hypotheses, **how)
    pairs = zip(references, hypotheses, strict=True)
    return 100 * sum(sentence_bleu(own, h, **how) for own, h in pairs) / len(hypotheses)


def sacre_bleu(corpus, max_n, level, smooth_method, effective_order, tokenize="13a") -> float:
    hypotheses, references = corpus
    scorer = BLEU(
        max_ngram_order=max_n,
        smooth_method=smooth_method,
        effective_order=effective_order,
        tokenize=tokenize,
        force=True,
    )
    if level == "corpus":
        streams = [list(stream) for stream in zip_longest(*references)]
        return scorer.corpus_score(hypotheses, streams).score
    pairs = zip(hypotheses, references, strict=True)
    return sum(scorer.sentence_score(h, own).score for h, own in pairs) / len(hypotheses)


# --- tokenizers -------------------------------------------------------------------------------------------------------

ODD_TEXT = st.one_of(
    st.text(),
    st.text(st.sampled_from("ab5.,-!'\"\\]^_`{}~@/:;<>&|$ \n\t\r\x1c\xa0é—…٣")),
    st.lists(st.sampled_from(["&quot;", "&amp;", "lt;", "&lt;", "<skipped>", "-\n", "...", "1,000.5", "5-3", " "])).map(
        "".join
    ),
)


@given(ODD_TEXT)
def test_tokenize_13a_equals_sacrebleu_on_arbitrary_text(text):
    assert tokenize_13a(text) == Tokenizer13a()(text).split()


@pytest.mark.parametrize("around", ["x{}y", "5{}5", "x{}5", "5{}x", "{0}{0}.5", "5.{0}{0}", "x {} y", "{}"])
def test_tokenize_13a_equals_sacrebleu_on_every_character_in_context(around):
    for code in [*range(0x250), *map(ord, "٣۴’“…—\u2028\u3000世😀")]:
        text = around.format(chr(code))
        assert tokenize_13a(text) == Tokenizer13a()(text).split(), repr(text)


def test_tokenize_13a_equals_sacrebleu_on_real_text(esconv):
    for text in esconv[0]:
        assert tokenize_13a(text) == Tokenizer13a()(text).split()


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("I'm so-so, thanks!", ["I'm", "so-so", ",", "thanks", "!"]),
        ("It is 1,000.50 (or 5-3).", ["It", "is", "1,000.50", "(", "or", "5", "-", "3", ")", "."]),
        ("&lt;b&gt; &amp;quot;", ["<", "b", ">", "&", "quot", ";"]),
        ("5...5", ["5", ".", ".", ".5"]),
        ("well-\nbeing\nnow", ["wellbeing", "now"]),
        (" \n\t ", []),
    ],
)
def test_tokenize_13a_gives_the_tokens_worked_out_by_hand(text, tokens):
    assert tokenize_13a(text) == tokens


@given(st.text(st.characters(max_codepoint=127)))
def test_tokenize_words_equals_rouge_score_on_ascii(text):
    assert tokenize_words(text) == google_tokenize(text, None)


def test_tokenize_words_keeps_letters_of_any_script_and_drops_the_rest():
    assert tokenize_words("Don't, fiancé_42! 你好…") == ["don", "t", "fiancé", "42", "你好"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("मैं बहुत दुखी हूँ।", ["मैं", "बहुत", "दुखी", "हूँ"]),  # vowel signs, anusvara and candrabindu are marks
        ("நான் வருத்தமாக இருக்கிறேன்!", ["நான்", "வருத்தமாக", "இருக்கிறேன்"]),
        ("আমি খুব দুঃখিত", ["আমি", "খুব", "দুঃখিত"]),
        ("السَّلامُ عليكم، صديقي", ["السَّلامُ", "عليكم", "صديقي"]),
        ("שָׁלוֹם לך", ["שָׁלוֹם", "לך"]),
        ("می\u200cخواهم بروم\u200c.", ["می\u200cخواهم", "بروم"]),  # a joiner inside a word, and one after it
        ("Ça_va cafe\u0301 ÉTÉ", ["ça", "va", "café", "été"]),
        ("I'm fine ❤️ 👩\u200d💻, you’re not", ["i", "m", "fine", "you", "re", "not"]),  # marks of no letter
    ],
)
def test_tokenize_words_keeps_words_of_every_script_whole(text, words):
    assert tokenize_words(text) == [unicodedata.normalize("NFC", word) for word in words]


@given(st.text(alphabet=st.characters(codec="utf-8") | st.sampled_from("eéा்َ_ \u0301\u200d")))
def test_composed_and_decomposed_texts_have_the_same_words_and_characters(text):
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert tokenize_words(composed) == tokenize_words(decomposed)
    assert tokenize_characters(composed) == tokenize_characters(decomposed)
    letters = sum(char.isalnum() for char in composed.lower())
    assert len(tokenize_characters(composed)) == letters == sum(c.isalnum() for c in "".join(tokenize_words(composed)))


@given(st.text(alphabet=st.characters(max_codepoint=0x2FF) | st.sampled_from("’“”…—–€İ\u2029")))
def test_texts_in_latin_letters_have_the_words_they_always_had(text):
    if "İ" not in text:  # whose lower case has a combining mark
        assert tokenize_words(text) == re.findall(r"[^\W_]+", text.lower())
    assert tokenize_words(f"{text} मैं")[:-1] == tokenize_words(text)  # the short way and the long one


def test_characters_carry_their_marks():
    assert tokenize_characters("ฉันเศร้า, 你好 Ab1é!") == [
        *"ฉ น เ ศ ร า 你 好 a b 1 é".replace("ฉ", "ฉั").replace("ร", "ร้").split()
    ]


@pytest.mark.parametrize(
    "text", ["你好，我很难过。", "今日はとても悲しいです", "ฉันเศร้ามาก", "ខ្ញុំពិបាកចិត្ត", "ຂ້ອຍເສົ້າໃຈ", "ကျွန်တော်ဝမ်းနည်းတယ်"]
)
@pytest.mark.parametrize("metric", [bleu, rouge_l, unigram_f1, meteor])
def test_words_of_scripts_without_spaces_are_a_warning_not_a_silent_zero(metric, text):
    assert is_unspaced(text)
    with pytest.warns(UserWarning, match="tokenize_characters"):
        metric([text], [text[:-2]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metric([text], [text[:-2]], tokenize=tokenize_characters) > 50
        metric(["I met 王芳 today; ça va? मैं ठीक हूँ"], ["I met 李 and नमस्ते"])


# --- BLEU against its oracles -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", NLTK_SMOOTHING)
@given(corpus=corpora(), max_n=st.integers(1, 5))
def test_sentence_bleu_is_the_mean_of_nltks(smoothing, corpus, max_n):
    ours = bleu(*corpus, max_n=max_n, level="sentence", smoothing=smoothing, tokenize=str.split)
    assert ours == close(nltk_bleu(corpus, max_n, "sentence", smoothing))


@pytest.mark.parametrize("smoothing", ["epsilon", "add-k", "nist"])
@given(corpus=corpora(), max_n=st.integers(1, 5))
def test_smoothed_corpus_bleu_equals_nltk_also_with_replies_shorter_than_n(smoothing, corpus, max_n):
    ours = bleu(*corpus, max_n=max_n, smoothing=smoothing, tokenize=str.split)
    assert ours == close(nltk_bleu(corpus, max_n, "corpus", smoothing))


@given(corpus=corpora(min_tokens=4), max_n=st.integers(1, 4))
def test_unsmoothed_corpus_bleu_equals_nltk_where_no_reply_is_shorter_than_n(corpus, max_n):
    assert bleu(*corpus, max_n=max_n, tokenize=str.split) == close(nltk_bleu(corpus, max_n, "corpus", None))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("smoothing", SACREBLEU_SMOOTHING)
@given(corpus=corpora(), max_n=st.integers(1, 5), effective_order=st.booleans())
def test_bleu_equals_sacrebleu(level, smoothing, corpus, max_n, effective_order):
    ours = bleu(*corpus, max_n=max_n, level=level, smoothing=smoothing, effective_order=effective_order)
    assert ours == close(sacre_bleu(corpus, max_n, level, SACREBLEU_SMOOTHING[smoothing], effective_order))


@given(corpus=corpora(), max_n=st.integers(1, 5))
def test_epsilon_with_effective_order_equals_sacrebleus_floor_on_single_replies(corpus, max_n):
    ours = bleu(*corpus, max_n=max_n, level="sentence", smoothing="epsilon", effective_order=True, tokenize=str.split)
    assert ours == close(sacre_bleu(corpus, max_n, "sentence", "floor", True, tokenize="none"))


@given(corpus=corpora())
def test_exp_has_the_effective_order_of_sacrebleus_own_functions_by_default(corpus):
    assert bleu(*corpus, smoothing="exp") == close(sacre_bleu(corpus, 4, "corpus", "exp", False))
    assert bleu(*corpus, smoothing="exp", level="sentence") == close(sacre_bleu(corpus, 4, "sentence", "exp", True))


@pytest.mark.parametrize("max_n", [1, 2, 3, 4])
@pytest.mark.parametrize("level", LEVELS)
def test_bleu_equals_its_oracles_on_real_text(esconv, level, max_n):
    for smoothing in NLTK_SMOOTHING:
        if smoothing is None and level == "corpus":
            continue
        ours = bleu(*esconv, max_n=max_n, level=level, smoothing=smoothing, tokenize=str.split)
        assert ours == close(nltk_bleu(esconv, max_n, level, smoothing))
    for smoothing, method in SACREBLEU_SMOOTHING.items():
        for effective_order in (False, True):
            ours = bleu(*esconv, max_n=max_n, level=level, smoothing=smoothing, effective_order=effective_order)
            assert ours == close(sacre_bleu(esconv, max_n, level, method, effective_order))


def test_unsmoothed_corpus_bleu_follows_sacrebleu_where_nltk_counts_ngrams_that_short_replies_do_not_have():
    corpus = (["a b c d", "e"], [["a b c d"], ["e"]])
    assert bleu(*corpus, max_n=2) == 100
    assert sacre_bleu(corpus, 2, "corpus", "none", False) == close(100)
    assert nltk_bleu(corpus, 2, "corpus", None) == close(100 * math.sqrt(3 / 4))


# --- BLEU by hand and by property -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hypothesis", "references", "how", "expected"),
    [
        ("the the the the the the the", ["the cat is on the mat"], {"max_n": 1}, 100 * 2 / 7),
        ("a b c d", ["a b d c"], {"max_n": 2}, 100 * math.sqrt(1 / 3)),
        ("a b", ["a b c d"], {"max_n": 2}, 100 * math.exp(-1)),
        ("a a b", ["a b", "a a"], {"max_n": 1}, 100),  # counts are clipped at the best reference, not at their sum
        ("a a a", ["a b", "a a"], {"max_n": 1}, 100 * 2 / 3),
        ("a b c", ["a b c d", "a b"], {"max_n": 1}, 100),  # 2 and 4 are equally close to 3: the shorter counts
        ("a b c", ["a b c d", "a"], {"max_n": 1}, 100 * math.exp(-1 / 3)),
        ("a b c d", ["a x c y"], {"max_n": 2}, 0),
        ("a b c d", ["a x c y"], {"max_n": 2, "smoothing": "epsilon"}, 100 * math.sqrt(2 / 4 * 0.1 / 3)),
        ("a b c d", ["a x c y"], {"max_n": 2, "smoothing": "add-k"}, 100 * math.sqrt(2 / 4 * 1 / 4)),
        ("a b c d", ["a x c y"], {"max_n": 3, "smoothing": "exp"}, 100 * (2 / 4 * 1 / 6 * 1 / 8) ** (1 / 3)),
        ("a b", ["a b"], {}, 0),
        ("a b", ["a b"], {"effective_order": True}, 100),
        ("a b", ["a b"], {"smoothing": "epsilon"}, 100 * (0.1 * 0.1) ** (1 / 4)),
        ("a b", ["a b"], {"smoothing": "add-k"}, 100 * (1 * 1 * 1 / 2 * 1 / 2) ** (1 / 4)),
    ],
)
@pytest.mark.parametrize("level", LEVELS)
def test_bleu_of_one_reply_is_the_number_worked_out_by_hand(level, hypothesis, references, how, expected):
    how = {"effective_order": False, **how}
    assert bleu([hypothesis], [references], level=level, tokenize=str.split, **how) == close(expected)


def test_corpus_bleu_pools_counts_and_sentence_bleu_averages_scores():
    corpus = (["a b c d", "x"], ["a b c d", "y"])
    assert bleu(*corpus, max_n=1, level="corpus") == close(100 * 4 / 5)
    assert bleu(*corpus, max_n=1, level="sentence") == close(100 * 1 / 2)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@given(reply=texts(), own=st.lists(texts(), min_size=1, max_size=3), effective_order=st.booleans())
def test_corpus_and_sentence_bleu_agree_on_one_reply(smoothing, reply, own, effective_order):
    how = {"smoothing": smoothing, "effective_order": effective_order}
    assert bleu([reply], [own], level="corpus", **how) == bleu([reply], [own], level="sentence", **how)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("level", LEVELS)
@given(replies=st.lists(texts(min_tokens=1), min_size=1, max_size=5))
def test_bleu_of_identical_texts_is_100_with_effective_order(smoothing, level, replies):
    how = {"level": level, "effective_order": True, "tokenize": str.split}
    if smoothing in ("epsilon", "add-k", "nist") and level == "corpus":  # nltk's extra n-grams of short replies
        replies = [reply + " a b c" for reply in replies]
    assert bleu(replies, replies, smoothing=smoothing, **how) == close(100)


def test_bleu_of_integer_tokens_equals_that_of_their_names():
    hypotheses, references = ["1 2 3 4", "5 6 5 6"], ["1 2 4 3", "5 6 5"]
    as_ids = bleu(hypotheses, references, max_n=2, tokenize=lambda text: [int(word) for word in text.split()])
    assert as_ids == bleu(hypotheses, references, max_n=2, tokenize=str.split) > 0


# --- Distinct-n and length --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hypotheses", "n", "corpus", "utterance"),
    [
        (["a b a b"], 1, 100 * 2 / 4, 100 * 2 / 4),
        (["a b a b"], 2, 100 * 2 / 3, 100 * 2 / 3),
        (["a b c", "a b d"], 2, 100 * 3 / 4, 100),
        (["a b c", "a a a"], 1, 100 * 3 / 6, 100 * (1 + 1 / 3) / 2),
        (["a", "a b"], 2, 100, 50),  # a reply without a bigram: nothing to count, and 0 in the mean
        (["a b", "c"], 3, 0, 0),
        (["", " "], 1, 0, 0),
        (["é 世 é 世"], 2, 100 * 2 / 3, 100 * 2 / 3),
    ],
)
def test_distinct_n_is_the_number_worked_out_by_hand(hypotheses, n, corpus, utterance):
    assert distinct_n(hypotheses, n, tokenize=str.split) == close(corpus)
    assert distinct_n(hypotheses, n, level="utterance", tokenize=str.split) == close(utterance)


@given(st.lists(texts(), min_size=1, max_size=6), st.integers(1, 4))
def test_distinct_n_equals_a_naive_count(replies, n):
    tokens = [reply.split() for reply in replies]
    grams = [[" ".join(t[i : i + n]) for i in range(len(t) - n + 1)] for t in tokens]
    pooled = Counter(gram for own in grams for gram in own)
    corpus = 100 * len(pooled) / pooled.total() if pooled else 0
    utterance = 100 * sum(len(set(own)) / len(own) if own else 0 for own in grams) / len(grams)
    assert distinct_n(replies, n, tokenize=str.split) == close(corpus)
    assert distinct_n(replies, n, level="utterance", tokenize=str.split) == close(utterance)


@given(st.lists(texts(), min_size=1, max_size=6), st.integers(1, 3))
def test_doubling_the_corpus_halves_corpus_distinct_and_leaves_utterance_distinct(replies, n):
    assert distinct_n(replies * 2, n) == close(distinct_n(replies, n) / 2)
    assert distinct_n(replies * 2, n, level="utterance") == close(distinct_n(replies, n, level="utterance"))


@given(texts(), st.integers(1, 3))
def test_corpus_and_utterance_distinct_agree_on_one_reply(reply, n):
    assert distinct_n([reply], n) == distinct_n([reply], n, level="utterance")


@given(corpora(), st.data(), st.integers(1, 4), st.sampled_from((None, "epsilon", "add-k", "nist")))
def test_scores_without_each_group_are_those_of_the_other_replies(corpus, data, n, smoothing):
    hypotheses, references = corpus
    groups = data.draw(st.lists(st.sampled_from("abc"), min_size=len(hypotheses), max_size=len(hypotheses)))
    calls = [(distinct_n, {"n": n}), (bleu, {"max_n": n, "smoothing": smoothing, "tokenize": str.split})]
    for metric, how in calls:
        expected = []
        for group in dict.fromkeys(groups):
            rest = [i for i, own in enumerate(groups) if own != group]
            own = [hypotheses[i] for i in rest], [references[i] for i in rest]
            taken = own[:1] if metric is distinct_n else own
            expected.append(metric(*taken, **how) if rest else 0.0)
        assert without_each_group(metric, hypotheses, references, groups, **how) == [close(e) for e in expected]


def test_only_sums_over_groups_are_left_out():
    for metric, how in ((rouge_l, {}), (bleu, {"level": "sentence"}), (bleu, {"effective_order": True})):
        with pytest.raises(ValueError, match="only corpus-level bleu and distinct_n"):
            without_each_group(metric, ["a"], ["a"], ["x"], **how)


def test_mean_length_counts_tokens_of_the_given_tokenizer():
    assert mean_length(["Hi, you!", ""]) == 2
    assert mean_length(["Hi, you!", ""], tokenize=tokenize_words) == 1
    assert mean_length(["Hi, you!", ""], tokenize=list) == 4


# --- ROUGE-L ----------------------------------------------------------------------------------------------------------


class _Split:
    def tokenize(self, text):
        return text.split()


def google_rouge_l(corpus, scorer) -> float:
    pairs = list(zip(*corpus, strict=True))
    return 100 * sum(scorer.score_multi(own, h)["rougeL"].fmeasure for h, own in pairs) / len(pairs)


@given(corpora())
def test_rouge_l_equals_rouge_score_on_the_same_tokens(corpus):
    expected = google_rouge_l(corpus, RougeScorer(["rougeL"], tokenizer=_Split()))
    assert rouge_l(*corpus, tokenize=str.split) == close(expected)


@given(texts(max_tokens=200), texts(max_tokens=200))
def test_rouge_l_equals_rouge_score_on_texts_longer_than_a_machine_word(hypothesis, reference):
    corpus = ([hypothesis], [[reference]])
    expected = google_rouge_l(corpus, RougeScorer(["rougeL"], tokenizer=_Split()))
    assert rouge_l(*corpus, tokenize=str.split) == close(expected)


def test_rouge_l_with_its_default_tokenizer_equals_rouge_score_on_real_ascii_text(esconv):
    ascii_only = [(h, own) for h, own in zip(*esconv, strict=True) if "".join([h, *own]).isascii()]
    assert len(ascii_only) > 500
    corpus = ([h for h, _ in ascii_only], [own for _, own in ascii_only])
    assert rouge_l(*corpus) == close(google_rouge_l(corpus, RougeScorer(["rougeL"])))


@pytest.mark.parametrize(
    ("hypothesis", "references", "beta", "expected"),
    [
        ("police kill the gunman", ["police killed the gunman"], 1.0, 75),
        ("the gunman kill police", ["police killed the gunman"], 1.0, 50),
        ("a b", ["a x b y"], 1.0, 100 * 2 / 3),  # P = 1, R = 1/2
        ("a b", ["a x b y"], 0.0, 100),
        ("a b", ["a x b y"], 1.2, 100 * 2.44 * 0.5 / (0.5 + 1.44)),
        ("a b", ["x", "a x b y", "b"], 1.0, 100 * 2 / 3),
        ("a a a", ["a"], 1.0, 50),
    ],
)
def test_rouge_l_is_the_number_worked_out_by_hand(hypothesis, references, beta, expected):
    assert rouge_l([hypothesis], [references], beta=beta) == close(expected)


# --- METEOR -----------------------------------------------------------------------------------------------------------


class _NoStem:
    def stem(self, word):
        return word


class _Lemma:
    def __init__(self, name):
        self._name = name

    def name(self):
        return self._name


class _Synset:
    def __init__(self, names):
        self._names = names

    def lemmas(self):
        return [_Lemma(name) for name in self._names]


class _WordNet:
    """nltk's interface over a dictionary of synonyms."""

    def __init__(self, synonyms):
        self._synonyms = synonyms

    def synsets(self, word):
        return [_Synset(self._synonyms[word])] if word in self._synonyms else []


SYNONYMS = {"a": ["b", "c"], "b": ["a", "cat"], "cat": ["b"], "5": ["é", "5"]}


def nltk_meteor(corpus, stemmer, synonyms) -> float:
    hypotheses, references = split_all(corpus)
    pairs = zip(references, hypotheses, strict=True)
    return (
        100
        * sum(meteor_score(own, h, stemmer=stemmer, wordnet=_WordNet(synonyms)) for own, h in pairs)
        / len(hypotheses)
    )


@given(corpora())
def test_meteor_equals_nltk_without_stemmer_and_wordnet(corpus):
    assert meteor(*corpus, tokenize=str.split) == close(nltk_meteor(corpus, _NoStem(), {}))


@given(corpora())
def test_meteor_with_a_stem_equals_nltk_with_that_stemmer(corpus):
    stemmer = PorterStemmer()
    assert meteor(*corpus, tokenize=str.split, stem=stemmer.stem) == close(nltk_meteor(corpus, stemmer, {}))


@given(corpora())
def test_meteor_with_synonyms_equals_nltk_with_that_wordnet(corpus):
    def synonyms(word):
        return SYNONYMS.get(word, [])

    ours = meteor(*corpus, tokenize=str.split, synonyms=synonyms)
    assert ours == close(nltk_meteor(corpus, _NoStem(), SYNONYMS))
    stemmer = PorterStemmer()
    ours = meteor(*corpus, tokenize=str.split, stem=stemmer.stem, synonyms=synonyms)
    assert ours == close(nltk_meteor(corpus, stemmer, SYNONYMS))


def test_meteor_equals_nltk_on_real_text(esconv):
    stemmer = PorterStemmer()
    assert meteor(*esconv, tokenize=str.split) == close(nltk_meteor(esconv, _NoStem(), {}))
    assert meteor(*esconv, tokenize=str.split, stem=stemmer.stem) == close(nltk_meteor(esconv, stemmer, {}))


@pytest.mark.parametrize(
    ("hypothesis", "references", "how", "expected"),
    [
        ("a", ["a"], {}, 50),  # one chunk of one match: the penalty is 0.5
        ("A b C d", ["a B c D"], {}, 100 * (1 - 0.5 / 64)),
        ("a b", ["a x b y"], {}, 100 * 2 / (0.9 * 4 + 0.1 * 2) * (1 - 0.5)),
        ("a x", ["q", "x y", "a x"], {}, 100 * (1 - 0.5 / 8)),
        ("the cat sat on the mat", ["on the mat sat the cat"], {}, 50),  # 6 chunks as matched, where 3 are possible
        # of the places of all synonyms the last is taken, so that "x q" is one chunk
        ("w q", ["x y x q"], {"synonyms": lambda word: ["x", "y"] if word == "w" else []}, 100 * 2 / 3.8 * 15 / 16),
        ("cats", ["cat"], {}, 0),
        ("cats", ["cat"], {"stem": lambda word: word.rstrip("s")}, 50),
        ("sad day", ["blue day"], {"synonyms": lambda word: {"sad": ["blue", "down"]}.get(word, [])}, 100 * 15 / 16),
    ],
)
def test_meteor_is_the_number_worked_out_by_hand(hypothesis, references, how, expected):
    assert meteor([hypothesis], [references], tokenize=str.split, **how) == close(expected)


# --- all metrics ------------------------------------------------------------------------------------------------------

AGAINST_REFERENCES = {
    **{
        f"bleu-{level}-{smoothing}": lambda h, r, level=level, smoothing=smoothing, **how: bleu(
            h, r, max_n=2, level=level, smoothing=smoothing, **how
        )
        for level in LEVELS
        for smoothing in SMOOTHINGS
    },
    "rouge_l": rouge_l,
    "meteor": meteor,
    "unigram_f1": unigram_f1,
}
ALONE = {
    "distinct-corpus": lambda h, **how: distinct_n(h, 2, **how),
    "distinct-utterance": lambda h, **how: distinct_n(h, 2, level="utterance", **how),
    "mean_length": mean_length,
}
ALL = {**AGAINST_REFERENCES, **{name: lambda h, _, f=f, **how: f(h, **how) for name, f in ALONE.items()}}


@pytest.mark.parametrize("name", [name for name in ALL if name != "mean_length"])
@given(corpus=corpora())
def test_scores_lie_between_0_and_100(name, corpus):
    assert 0 <= ALL[name](*corpus) <= 100 + 1e-9


@pytest.mark.parametrize("name", ALL)
@given(corpus=corpora(), seed=st.integers(0, 1000))
def test_the_order_of_replies_and_of_references_does_not_change_a_score(name, corpus, seed):
    pairs = [(h, own[::-1]) for h, own in zip(*corpus, strict=True)]
    random.Random(seed).shuffle(pairs)
    assert ALL[name](*corpus) == ALL[name]([h for h, _ in pairs], [own for _, own in pairs])


@pytest.mark.parametrize("name", ["rouge_l", "meteor"])
@given(reply=texts(), own=st.lists(texts(), min_size=1, max_size=3), more=texts())
def test_another_reference_never_lowers_a_best_of_references_score(name, reply, own, more):
    assert ALL[name]([reply], [[*own, more]]) >= ALL[name]([reply], [own])


@given(st.lists(texts(min_tokens=4), min_size=1, max_size=4))
def test_identical_texts_score_100_but_for_the_chunk_penalty_of_meteor(replies):
    assert rouge_l(replies, replies, tokenize=str.split) == close(100)
    assert bleu(replies, replies, tokenize=str.split) == close(100)
    penalties = [0.5 / len(reply.split()) ** 3 for reply in replies]
    assert meteor(replies, replies, tokenize=str.split) == close(100 * (1 - sum(penalties) / len(penalties)))


@pytest.mark.parametrize("name", AGAINST_REFERENCES)
@pytest.mark.parametrize(
    ("hypothesis", "reference"), [("", "a b"), ("a b", ""), ("", ""), (" \n", "a"), ("a b", "c d")]
)
def test_a_pair_without_a_common_word_scores_0(name, hypothesis, reference):
    assert AGAINST_REFERENCES[name]([hypothesis], [reference]) == 0


@pytest.mark.parametrize("name", AGAINST_REFERENCES)
@given(corpus=corpora())
def test_a_string_as_reference_means_a_list_of_one(name, corpus):
    hypotheses, references = corpus
    firsts = [own[0] for own in references]
    metric = AGAINST_REFERENCES[name]
    assert metric(hypotheses, firsts) == metric(hypotheses, [[first] for first in firsts])


@pytest.mark.parametrize("name", AGAINST_REFERENCES)
def test_unicode_words_match_as_others_do(name):
    metric = AGAINST_REFERENCES[name]
    unicode_score = metric(["é 世界 ñ 😀 x"], ["é 世界 y 😀 x"], tokenize=str.split)
    assert unicode_score == metric(["a b c d e"], ["a b q d e"], tokenize=str.split) > 0


@pytest.mark.parametrize("name", ALL)
def test_every_text_goes_through_the_given_tokenizer(name):
    seen = set()

    def tokenize(text):
        seen.add(text)
        return ["a", "a"]

    score = ALL[name](["one", "two"], [["three", "four"], "five"], tokenize=tokenize)
    assert seen == ({"one", "two"} if name in ALONE else {"one", "two", "three", "four", "five"})
    assert score == ALL[name](["a a", "a a"], [["a a", "a a"], "a a"], tokenize=str.split)


@given(corpus=corpora())
def test_unigram_f1_is_the_best_harmonic_mean_of_precision_and_recall(corpus):
    def f1(reply, golden):
        left = list(golden)
        common = sum(1 for word in reply if word in left and left.remove(word) is None)
        precision, recall = common / max(1, len(reply)), common / max(1, len(golden))
        return 2 * precision * recall / (precision + recall) if common else 0.0

    hypotheses, references = split_all(corpus)
    best = [max(f1(h, own) for own in goldens) for h, goldens in zip(hypotheses, references, strict=True)]
    assert unigram_f1(*corpus, tokenize=str.split) == close(100 * sum(best) / len(best))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("hypotheses", "message"),
    [
        ([], "hypotheses must be a list of at least one string, not []"),
        ("hello", "hypotheses must be a list of at least one string, not 'hello'"),
        (None, "hypotheses must be a list of at least one string, not None"),
        ({"a": "b"}, "hypotheses must be a list of at least one string, not {'a': 'b'}"),
        (["a", None], "hypotheses[1] must be a string, not None"),
        ([["a"]], "hypotheses[0] must be a string, not ['a']"),
    ],
)
def test_unusable_hypotheses_are_refused(name, hypotheses, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ALL[name](hypotheses, ["a"])


@pytest.mark.parametrize("name", AGAINST_REFERENCES)
@pytest.mark.parametrize(
    ("references", "message"),
    [
        ("ab", "references must be a list, not 'ab'"),
        (None, "references must be a list, not None"),
        ([], "2 hypotheses need as many entries in references, not 0"),
        (["a", "b", "c"], "2 hypotheses need as many entries in references, not 3"),
        (["a", []], "references[1] must be a list of at least one string, not []"),
        (["a", None], "references[1] must be a list of at least one string, not None"),
        ([["a", 3], "b"], "references[0][1] must be a string, not 3"),
    ],
)
def test_unusable_references_are_refused(name, references, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        AGAINST_REFERENCES[name](["a", "b"], references)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: bleu(["a"], ["a"], level="utterance"),
            "unknown level 'utterance'; choose one of 'corpus', 'sentence'",
        ),
        (lambda: bleu(["a"], ["a"], smoothing="floor"), "unknown smoothing 'floor'; choose one of None, 'epsilon'"),
        (lambda: bleu(["a"], ["a"], max_n=0), "max_n must be a whole number of at least 1, not 0"),
        (lambda: bleu(["a"], ["a"], max_n=2.0), "max_n must be a whole number of at least 1, not 2.0"),
        (lambda: distinct_n(["a"], 0), "n must be a whole number of at least 1, not 0"),
        (lambda: distinct_n(["a"], True), "n must be a whole number of at least 1, not True"),
        (
            lambda: distinct_n(["a"], 2, level="sentence"),
            "unknown level 'sentence'; choose one of 'corpus', 'utterance'",
        ),
        (lambda: rouge_l(["a"], ["a"], beta=-1), "beta must be a finite number of at least 0, not -1"),
        (lambda: rouge_l(["a"], ["a"], beta=math.inf), "beta must be a finite number of at least 0, not inf"),
        (lambda: rouge_l(["a"], ["a"], beta=math.nan), "beta must be a finite number of at least 0, not nan"),
        (lambda: signature("bleu", maxn=2), "bleu has no setting 'maxn'; it has max_n, level"),
        (lambda: signature("distinct_n"), "the signature of distinct_n needs a value for 'n'"),
    ],
)
def test_unusable_settings_are_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# --- signatures and imports -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "how", "expected"),
    [
        (
            "bleu",
            {"max_n": 2, "level": "sentence", "smoothing": "epsilon"},
            "bleu|n:2|level:sentence|smooth:epsilon|eff:no|tok:13a",
        ),
        ("bleu", {}, "bleu|n:4|level:corpus|smooth:none|eff:no|tok:13a"),
        ("bleu", {"smoothing": "exp"}, "bleu|n:4|level:corpus|smooth:exp|eff:no|tok:13a"),
        ("bleu", {"smoothing": "exp", "level": "sentence"}, "bleu|n:4|level:sentence|smooth:exp|eff:yes|tok:13a"),
        ("bleu", {"effective_order": True}, "bleu|n:4|level:corpus|smooth:none|eff:yes|tok:13a"),
        (
            "distinct_n",
            {"n": 3, "level": "utterance", "tokenize": str.split},
            "distinct_n|n:3|level:utterance|tok:str.split",
        ),
        ("rouge_l", {"tokenize": str.split}, "rouge_l|tok:str.split|beta:1.0"),
        ("meteor", {}, "meteor|tok:13a|stem:none|synonyms:none"),
        ("meteor", {"stem": PorterStemmer().stem}, "meteor|tok:13a|stem:PorterStemmer.stem|synonyms:none"),
        ("mean_length", {"tokenize": functools.partial(str.split)}, "mean_length|tok:partial"),
        ("bert_score", {"model": "roberta-large", "rescaled": False}, "bert_score|model:roberta-large|rescaled:no"),
    ],
)
def test_a_signature_names_every_setting_given_or_not(name, how, expected):
    assert signature(name, **how) == expected + "|selfevo:0.1.0"


def test_a_signature_tells_the_words_of_today_from_those_that_ended_at_a_vowel_sign():
    assert signature("rouge_l") == "rouge_l|tok:words|beta:1.0|selfevo:0.2.0"
    assert signature("unigram_f1") == "unigram_f1|tok:words|selfevo:0.2.0"
    characters = signature("bleu", tokenize=tokenize_characters)
    assert characters == "bleu|n:4|level:corpus|smooth:none|eff:no|tok:characters|selfevo:0.2.0"
    assert signature("mean_length", tokenize=[].append).endswith("tok:list.append|selfevo:0.1.0")  # one without a hash


def test_metrics_imports_only_the_standard_library():
    tree = ast.parse(Path(selfevo.metrics.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {"math", "collections"} <= imported
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names
