"""Pair analysis: TF-IDF against scikit-learn, invariants, intervals, and reading a run folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from transformers import BertConfig, BertModel, BertTokenizerFast

from selfevo.datasets import Pair
from selfevo.evaluation import bootstrap_interval
from selfevo.evaluation.folder import read_replies, stage_names
from selfevo.evaluation.report.analysis import (
    TfIdf,
    analyse_pairs,
    cosines,
    hidden_state_embedder,
    kept_analyses,
    sentence_embedder,
    summarise,
    user_statements,
)
from selfevo.files import FileError, write_json, write_jsonl
from selfevo.metrics import tokenize_words
from selfevo.models import load_model, load_tokenizer

WORDS = ["I", "you", "feel", "Sad", "exam", "don't", "très", "dog", "42", "--", "…"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)
CORPORA = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8)


def sklearn_cosines(documents: list[str], left: list[str], right: list[str]) -> np.ndarray:
    vectorizer = TfidfVectorizer(tokenizer=tokenize_words, lowercase=False, token_pattern=None)
    vectorizer.fit(documents)
    return np.asarray(vectorizer.transform(left).multiply(vectorizer.transform(right)).sum(axis=1)).ravel()


@settings(max_examples=60, deadline=None)
@given(CORPORA)
def test_tf_idf_cosines_are_scikit_learns(corpus: list[tuple[str, str]]) -> None:
    left, right = ["known words", *(a for a, _ in corpus)], ["words", *(b for _, b in corpus)]
    expected = sklearn_cosines(left + right, left, right)
    np.testing.assert_allclose(TfIdf(left + right)(left, right), expected, atol=1e-12)


def test_words_outside_the_documents_are_ignored_as_by_scikit_learn() -> None:
    documents, left, right = ["my exam went badly", "your dog"], ["my cat ran badly"], ["badly, my horse"]
    np.testing.assert_allclose(TfIdf(documents)(left, right), sklearn_cosines(documents, left, right), atol=1e-12)
    assert TfIdf(documents)(["cat"], ["cat"]) == 0


@settings(max_examples=60, deadline=None)
@given(CORPORA, st.randoms(use_true_random=False))
def test_tf_idf_is_a_cosine_of_bags_of_words(corpus: list[tuple[str, str]], random: object) -> None:
    left, right = [a for a, _ in corpus], [b for _, b in corpus]
    compare = TfIdf(left + right)
    values = compare(left, right)
    assert ((values >= 0) & (values <= 1)).all()
    np.testing.assert_allclose(values, compare(right, left), atol=1e-12)
    shuffled = [" ".join(random.sample(text.split(), len(text.split()))) for text in left]  # type: ignore[attr-defined]
    np.testing.assert_allclose(values, compare(shuffled, right), atol=1e-12)
    np.testing.assert_allclose(compare(left, left), [float(bool(tokenize_words(text))) for text in left], atol=1e-12)
    shared = [bool(set(tokenize_words(a)) & set(tokenize_words(b))) for a, b in corpus]
    assert ((values > 0) == shared).all()


def test_empty_texts_are_similar_to_nothing() -> None:
    assert TfIdf([])(["a word"], ["a word"]).tolist() == [0]
    assert TfIdf(["a word", ""])(["", "?!", "a word"], ["a word", "", "A WORD"]).tolist() == [0, 0, 1]
    assert TfIdf(["a"])([], []).shape == (0,)


def test_texts_must_come_in_pairs() -> None:
    with pytest.raises(ValueError, match="there are 2 and 1"):
        TfIdf(["a"])(["a", "b"], ["a"])


def test_cosines_of_rows_are_numpys_and_zero_for_zero_rows() -> None:
    generator = np.random.default_rng(0)
    left, right = generator.normal(size=(5, 7)), generator.normal(size=(5, 7))
    expected = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(left, right)]
    np.testing.assert_allclose(cosines(left, right), expected, atol=1e-12)
    left[2] = 0
    assert cosines(left, right)[2] == 0


def test_hidden_state_embeddings_are_the_means_of_each_text_alone(shared: Path) -> None:
    folder = shared / "models" / "story"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    long = "Once upon a time there was a dog. " * 200
    texts = ["I feel sad.", "", "My dog is ill, and I have an exam on Monday.", long, "No."]
    embedded = hidden_state_embedder(model, tokenizer, batch_size=2, progress=False)(texts)
    assert embedded.shape == (5, model.config.hidden_size)
    assert not embedded[1].any()
    for index in (0, 2, 3, 4):
        ids = tokenizer.encode(texts[index])[-model.config.max_positions :]
        with torch.no_grad():
            alone = model.hidden_states(torch.tensor([ids]))[0].mean(0)
        np.testing.assert_allclose(embedded[index], alone.numpy(), atol=1e-4)


def test_a_summary_has_the_interval_by_dialogue() -> None:
    values = np.random.default_rng(2).normal(size=150)
    groups = [str(index // 5) for index in range(150)]
    summary = summarise(values, groups)
    assert (summary.low, summary.high) == bootstrap_interval(values, groups) != bootstrap_interval(values)
    assert summary.mean == pytest.approx(values.mean())
    assert summary.median == pytest.approx(np.median(values))


def test_a_sentence_encoder_embeds_by_its_mean_and_a_missing_one_is_named(tmp_path: Path) -> None:
    """On a small BERT of random weights, against transformers."""
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] i am so sorry that is hard".split()
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=len(words), **shape)).eval()
    model.save_pretrained(tmp_path)
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=64)
    tokenizer.save_pretrained(tmp_path)
    texts = ["i am so sorry", "that is hard"]
    found = sentence_embedder(str(tmp_path))(texts)
    for text, vector in zip(texts, found):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, expected.numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="nowhere: no encoder that sentence-transformers can load"):
        sentence_embedder(str(tmp_path / "nowhere"))


def pair(index: int, chosen: str, rejected: str) -> Pair:
    prompt = [
        {"role": "system", "content": "Answer the exam."},
        {"role": "user", "content": "I failed my exam."},
        {"role": "assistant", "content": "Tell me about your dog."},
        {"role": "user", "content": "It was chemistry."},
    ]
    return Pair(f"d{index}#1", f"d{index}", prompt, chosen, rejected, "One two three", "refined", None)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_json(tmp_path / "config.json", {"settings": {}})
    for stage in ("M0", "M1", "M2", "M10"):
        (tmp_path / stage).mkdir()
    pairs = [pair(index, "That chemistry exam hurts.", "Your dog is fine.") for index in range(4)]
    write_jsonl(tmp_path / "M1" / "pairs.jsonl", [one.as_record() for one in pairs])
    write_jsonl(tmp_path / "M2" / "pairs.jsonl", [])
    return tmp_path


def test_stages_come_in_order_and_other_folders_are_none(run: Path) -> None:
    (run / "eval").mkdir()
    (run / "M01").mkdir()
    assert stage_names(run) == ["M0", "M1", "M2", "M10"]


def test_a_folder_without_a_configuration_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no run folder"):
        stage_names(tmp_path)


def test_only_what_the_user_said_makes_a_reply_relevant(run: Path) -> None:
    assert user_statements(pair(0, "", "")) == "I failed my exam.\nIt was chemistry."
    (analysis,) = analyse_pairs(run)
    assert analysis.stage == "M1"
    assert analysis.rejected_relevance.mean == 0  # the dog is the supporter's
    assert 0 < analysis.chosen_relevance.mean < 1
    assert analysis.relevance_gain.mean == pytest.approx(analysis.chosen_relevance.mean)
    assert analysis.similarity.mean == 0
    assert [s.mean for s in (analysis.chosen_length, analysis.rejected_length, analysis.golden_length)] == [4, 4, 3]


def test_embeddings_take_the_place_of_words(run: Path) -> None:
    def embed(texts: list[str]) -> np.ndarray:  # an angle of 90 degrees where the dog comes in
        return np.array([[0.0, 1.0] if "dog" in text else [2.0, 0.0] for text in texts])

    (analysis,) = analyse_pairs(run, embed=embed)
    assert analysis.chosen_relevance.values.tolist() == [1] * 4
    assert analysis.rejected_relevance.values.tolist() == analysis.similarity.values.tolist() == [0] * 4
    with pytest.raises(ValueError, match=r"embed should give \(N, D\)"):
        analyse_pairs(run, embed=lambda texts: np.zeros(len(texts)))


def test_replies_of_another_kind_are_named(tmp_path: Path) -> None:
    path = tmp_path / "M0.replies.jsonl"
    write_jsonl(path, [{"index": 0, "text": "Hello."}, {"index": 1, "text": None}])
    assert read_replies(path) == ["Hello.", None]
    write_jsonl(path, [{"reply": "Hello."}])
    with pytest.raises(ValueError, match=r"M0\.replies\.jsonl, record 0: holds no reply"):
        read_replies(path)
    with pytest.raises(FileError):
        read_replies(tmp_path / "none.jsonl")


def test_what_was_embedded_once_stays_with_the_pairs_that_it_was_computed_from(run: Path) -> None:
    def embed(texts: list[str]) -> np.ndarray:
        return np.array([[len(text), 1.0] for text in texts])

    first = analyse_pairs(run, embed=embed, keep_as="lengths")
    analyse_pairs(run, embed=lambda texts: np.ones((len(texts), 2)), keep_as="ones")
    kept = kept_analyses(run)
    assert list(kept) == ["lengths", "ones"]
    assert kept["lengths"][0].similarity.values.tolist() == first[0].similarity.values.tolist()
    assert kept["lengths"][0].relevance_gain.mean == first[0].relevance_gain.mean
    path = run / "M1" / "pairs.jsonl"
    path.write_text(path.read_text().replace("chemistry", "physics"))
    with pytest.raises(FileError, match=r"embedded-pairs.json, 'lengths', M1: is of other pairs than"):
        kept_analyses(run)
