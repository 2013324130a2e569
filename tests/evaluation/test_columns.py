"""The columns of every convention against the packages and formulas they claim to follow."""

from __future__ import annotations

import json
import random
import sys
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import bert_score
import nltk
import pytest
import torch
from nltk.tokenize.punkt import PunktParameters, save_punkt_params
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
from nltk.translate.meteor_score import single_meteor_score
from transformers import BertConfig, BertModel, BertTokenizerFast

from selfevo import metrics
from selfevo.evaluation import columns, score_replies
from selfevo.evaluation.columns import CONVENTIONS, ScoreError, extra_score, in_order
from selfevo.evaluation.tables import mean_table

HYPOTHESES = ["I am so sorry. That is hard!", "What happened then?", "Yes."]
REFERENCES = ["I am sorry to hear that.", "And what happened?", "I see, yes."]


@pytest.fixture
def nltk_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of nltk data with a sentence splitter that was trained on nothing."""
    folder = tmp_path / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    save_punkt_params(PunktParameters(), folder)
    return tmp_path


@pytest.fixture(scope="module")
def real(shared: Path) -> tuple[list[str], list[str], list[str]]:
    """Real replies, some of them damaged, against other real replies of the same dialogues."""
    generator = random.Random(0)
    hypotheses, references, dialogues = [], [], []
    for number, dialogue in enumerate(json.loads((shared / "data" / "esconv_test.json").read_text())[:20]):
        turns = [t["content"] for t in dialogue["dialog"] if t["speaker"] == "supporter" and t["content"].strip()]
        for own, other in pairwise(turns):
            words = own.split()
            hypotheses.append(" ".join(w for w in words if generator.random() < 0.7))
            references.append(generator.choice([own, other]))
            dialogues.append(str(number))
    return hypotheses, references, dialogues


def test_our_scores_are_those_of_the_metrics_with_their_signatures() -> None:
    scores = score_replies(HYPOTHESES, REFERENCES)
    bleu = metrics.bleu(HYPOTHESES, REFERENCES, max_n=2, level="sentence", smoothing="epsilon")
    assert scores["BLEU-2"].value == pytest.approx(bleu, abs=1e-9)
    assert scores["ROUGE-L"].value == pytest.approx(metrics.rouge_l(HYPOTHESES, REFERENCES), abs=1e-9)
    assert scores["Distinct-2"].value == pytest.approx(metrics.distinct_n(HYPOTHESES, 2, level="utterance"), abs=1e-9)
    assert scores["Distinct-2 (corpus)"].value == metrics.distinct_n(HYPOTHESES, 2, level="corpus")
    assert "level:utterance" in scores["Distinct-2"].signature
    assert scores["Distinct-2"].signature.endswith("|bs:2000|by:reply")
    own = metrics.signature("distinct_n", n=2, level="corpus")
    assert scores["Distinct-2 (corpus)"].signature == f"{own}|jackknife|by:reply"


def test_an_interval_surrounds_its_mean_and_is_wider_by_dialogue(real: tuple[list[str], list[str], list[str]]) -> None:
    hypotheses, references, dialogues = real
    for column, score in score_replies(hypotheses, references, dialogues).items():
        assert score.interval[0] < score.value < score.interval[1], column
        assert score.values is None or fmean(score.values) == score.value
    one = score_replies(hypotheses, references, ["the same"] * len(hypotheses))["ROUGE-L"]
    assert one.interval == (pytest.approx(one.value), pytest.approx(one.value))


def words(text: str) -> list[str]:
    return list(nltk.word_tokenize(text.lower()))


def oracle_rouge_l(hypothesis: list[str], reference: list[str]) -> float:
    row = [0] * (len(reference) + 1)
    for token in hypothesis:
        before = row[:]
        for j, other in enumerate(reference):
            row[j + 1] = before[j] + 1 if token == other else max(before[j + 1], row[j])
    if not row[-1]:
        return 0.0
    precision, recall = row[-1] / len(hypothesis), row[-1] / len(reference)
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)


def test_the_esconv_convention_equals_nltk_on_pooled_counts(
    real: tuple[list[str], list[str], list[str]], nltk_data: Path
) -> None:
    hypotheses, references, dialogues = real
    scores = score_replies(hypotheses, references, dialogues, convention="esconv")
    hyps, refs = [words(h) for h in hypotheses], [words(r) for r in references]
    smooth = SmoothingFunction().method3
    for n in (1, 2, 3, 4):
        expected = corpus_bleu([[r] for r in refs], hyps, weights=[1 / n] * n, smoothing_function=smooth)
        assert scores[f"BLEU-{n}"].value == pytest.approx(100 * expected, abs=1e-6)
    for n in (1, 2, 3):
        grams = [tuple(h[i : i + n]) for h in hyps for i in range(len(h) - n)]  # the script stops one short
        assert scores[f"Distinct-{n}"].value == pytest.approx(100 * len(set(grams)) / len(grams))
    assert scores["ROUGE-L"].value == pytest.approx(100 * fmean(map(oracle_rouge_l, hyps, refs)), abs=1e-6)
    assert scores["Length"].value == pytest.approx(fmean(map(len, hyps)))
    assert f"tok:nltk-{nltk.__version__}-lower-but-last" in scores["Distinct-2"].signature


def test_the_decoupledesc_convention_averages_over_replies(
    real: tuple[list[str], list[str], list[str]], nltk_data: Path
) -> None:
    hypotheses, references, dialogues = real
    scores = score_replies(hypotheses, references, dialogues, convention="decoupledesc")
    hyps, refs = [words(h) for h in hypotheses], [words(r) for r in references]
    smooth = SmoothingFunction().method3
    for n in (1, 2, 3, 4):
        each = [
            corpus_bleu([[r]], [h], weights=[1 / n] * n, smoothing_function=smooth) if h else 0.0
            for h, r in zip(hyps, refs)
        ]
        assert scores[f"BLEU-{n}"].value == pytest.approx(100 * fmean(each), abs=1e-6)
    for n in (1, 2, 3):
        ratios = []
        for h in hyps:
            grams = [tuple(h[i : i + n]) for i in range(len(h) - n + 1)]
            ratios.append(len(set(grams)) / len(grams) if grams else 0.0)
        assert scores[f"Distinct-{n}"].value == pytest.approx(100 * fmean(ratios))


def test_conventions_disagree_which_is_why_they_are_named(nltk_data: Path) -> None:
    by_convention = {c: score_replies(HYPOTHESES, REFERENCES, convention=c) for c in CONVENTIONS}
    assert len({scores["BLEU-2"].value for scores in by_convention.values()}) == len(CONVENTIONS)
    assert len({scores["BLEU-2"].signature for scores in by_convention.values()}) == len(CONVENTIONS)


def test_meteor_is_nltks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Lemma:
        def __init__(self, name: str) -> None:
            self.name = lambda: name

    class Synset:
        def lemmas(self) -> list[Lemma]:
            return [Lemma("hear"), Lemma("see"), Lemma("set_about")]

    class WordNet:
        def synsets(self, word: str) -> list[Synset]:
            calls.append(word)
            return [Synset()] if word == "hard" else []

    monkeypatch.setattr(nltk.corpus, "wordnet", WordNet())
    found = extra_score("METEOR", HYPOTHESES, REFERENCES)
    assert "hard" in calls
    pairs = [(metrics.tokenize_13a(r), metrics.tokenize_13a(h)) for h, r in zip(HYPOTHESES, REFERENCES)]
    expected = [100 * single_meteor_score(r, h, wordnet=WordNet()) for r, h in pairs]
    assert found.values == pytest.approx(expected)


def test_bert_score_is_that_of_the_package(tmp_path: Path) -> None:
    """On a small BERT of random weights; the package's own models cannot be had here."""
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] i am so sorry that is hard what happened then yes see . , ? !".split()
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(tmp_path)
    BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=64).save_pretrained(tmp_path)
    score = extra_score("BERTScore", HYPOTHESES, REFERENCES, bert_model=str(tmp_path))
    _, _, f1 = bert_score.score(HYPOTHESES, REFERENCES, model_type=str(tmp_path), num_layers=2)
    assert score.values == pytest.approx([100 * float(value) for value in f1], abs=1e-4)
    assert f"model:{tmp_path}|layer:2|idf:no|rescaled:no" in score.signature
    with pytest.raises(ScoreError, match="nowhere is not on this machine, or cannot be loaded"):
        extra_score("BERTScore", HYPOTHESES, REFERENCES, bert_model=str(tmp_path / "nowhere"))


def test_missing_data_and_packages_are_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    nltk.tokenize._get_punkt_tokenizer.cache_clear()
    with pytest.raises(ScoreError, match="downloader punkt_tab"):
        score_replies(["other words"], ["than before"], convention="esconv")
    with pytest.raises(ScoreError, match="downloader wordnet"):
        extra_score("METEOR", HYPOTHESES, REFERENCES)
    monkeypatch.setitem(sys.modules, "nltk", None)
    monkeypatch.setitem(sys.modules, "bert_score", None)
    with pytest.raises(ScoreError, match=r"selfevo\[scores\]"):
        score_replies(HYPOTHESES, REFERENCES, convention="esconv")
    with pytest.raises(ScoreError, match=r"selfevo\[scores\]"):
        extra_score("BERTScore", HYPOTHESES, REFERENCES)


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="should be one of"):
        score_replies(HYPOTHESES, REFERENCES, convention="mine")
    with pytest.raises(ValueError, match="should be one of"):
        extra_score("CIDEr", HYPOTHESES, REFERENCES)


def test_columns_come_as_in_table_2() -> None:
    assert in_order(["BLEU-2", "ROUGE-L", "Distinct-2", "BERTScore", "METEOR"]) == [
        "BLEU-2", "ROUGE-L", "METEOR", "BERTScore", "Distinct-2"
    ]  # fmt: skip
    assert in_order(["A", "METEOR"]) == ["A", "METEOR"]


def test_a_table_of_means_has_the_range_of_several_runs_and_a_dash_without_a_score() -> None:
    rows = {"one": [{"a": 1.0, "b": 2.0}], "two": [{"a": 1.0}, {"a": 2.0}]}
    lines = ["| model | a | b |", "|---|---|---|", "| one | 1.0 | 2.0 |", "| two | 1.5 (1.0 to 2.0) | – |"]
    assert mean_table(rows, digits=1) == "\n".join(lines)
    compared = mean_table(rows, columns=("a",), digits=1, before={"two": "one"})
    assert compared.splitlines()[-1] == "| two | 1.5 (1.0 to 2.0) (+50.00 %) |"


def test_nltks_data_with_a_file_missing_are_told_as_missing() -> None:
    told = r"METEOR cannot read nltk's data .*lexnames.*download them again"
    with pytest.raises(ScoreError, match=told), columns._optional_package("METEOR", data="wordnet"):
        raise OSError("No such file or directory: 'wordnet/lexnames'")
