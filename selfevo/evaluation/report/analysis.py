"""What a run's pairs look like: similarities (Figure 5, Section 5.2) and lengths.

Notation: N pairs or texts, D the size of an embedding. A similarity is a cosine; by default of TF-IDF vectors, so 0..1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from selfevo.datasets.pairs import Pair, read_pairs
from selfevo.evaluation.folder import stage_names
from selfevo.evaluation.significance import bootstrap_interval
from selfevo.files import Fields, file_hash, read_object, write_json
from selfevo.metrics import tokenize_words
from selfevo.models.tokenizer import ChatTokenizer
from selfevo.models.transformer import Transformer

PAIRS = "pairs.jsonl"
KEPT = "embedded-pairs.json"
Values = NDArray[np.float64]
Embed = Callable[[Sequence[str]], Values]  # N texts -> (N, D)


@dataclass(frozen=True)
class Summary:
    """A sample (N,), its mean, median, and the bootstrap interval of the mean (95 %): ``low`` to ``high``."""

    values: Values
    mean: float
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class PairAnalysis:
    """The pairs of one iteration. The first four are cosines or differences of them, the lengths count words."""

    stage: str
    chosen_relevance: Summary  # of the chosen replies to what the user has said
    rejected_relevance: Summary
    relevance_gain: Summary  # chosen minus rejected, pair by pair
    similarity: Summary  # between chosen and rejected
    chosen_length: Summary
    rejected_length: Summary
    golden_length: Summary


class TfIdf:
    """Cosines between texts as bags of words, rare words weighing more.

    A text's weight for a word is its count in the text times ln((1 + M) / (1 + m)) + 1, where m of the M ``documents``
    hold the word; words are those of ``tokenize_words`` (lower-cased). A word that no document holds is ignored.
    Raises ValueError where scikit-learn is not installed.
    """

    def __init__(self, documents: Sequence[str]) -> None:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ImportError as error:
            raise ValueError("TF-IDF comes from scikit-learn: pip install 'selfevo[report]'") from error
        vectorizer = TfidfVectorizer(tokenizer=tokenize_words, token_pattern=None, lowercase=False)
        # It refuses documents without any word.
        self._vectorizer = vectorizer.fit(documents) if any(map(tokenize_words, documents)) else None

    def __call__(self, left: Sequence[str], right: Sequence[str]) -> Values:
        """N texts and N texts -> (N,) cosines, 0..1; 0 where one of the two has no known word."""
        if len(left) != len(right):
            raise ValueError(f"texts should come in pairs; there are {len(left)} and {len(right)}")
        if self._vectorizer is None or not left:
            return np.zeros(len(left))
        products = self._vectorizer.transform(left).multiply(self._vectorizer.transform(right))
        return np.minimum(np.asarray(products.sum(axis=1)).ravel(), 1.0)  # rounding may exceed it


def hidden_state_embedder(
    model: Transformer, tokenizer: ChatTokenizer, *, batch_size: int = 16, progress: bool = True
) -> Embed:
    """Embeds a text as the mean of its final hidden states, (N, D) with D the model's hidden size.

    The text is read alone, without chat markers; one longer than the window keeps its last tokens, one without tokens
    is a zero vector. Cosines of such means lie close together and near 1: only their order and differences tell.
    """

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Values:
        ids = [tokenizer.encode(text)[-model.config.max_positions :] for text in texts]
        order = sorted((index for index in range(len(ids)) if ids[index]), key=lambda index: len(ids[index]))
        result = np.zeros((len(texts), model.config.hidden_size))
        for start in tqdm(range(0, len(order), batch_size), desc="embedding texts", unit="batch", disable=not progress):
            members = order[start : start + batch_size]
            # Pads come last and attention is causal, so no text sees them.
            rows = pad_sequence([torch.tensor(ids[index]) for index in members], batch_first=True)
            states = model.hidden_states(rows.to(model.device)).float().cpu()
            for index, row in zip(members, states):
                result[index] = row[: len(ids[index])].mean(0).numpy()
        return result

    return embed


def sentence_embedder(source: str) -> Embed:
    """Embeds texts by a sentence encoder, a folder or a hub id; one without pooling of its own takes the mean.

    Raises ValueError where sentence-transformers is not installed, or cannot load ``source``.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ValueError("an encoder needs sentence-transformers: pip install 'selfevo[embed]'") from error
    try:
        encoder = SentenceTransformer(source)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{source}: no encoder that sentence-transformers can load ({reason})") from error

    def embed(texts: Sequence[str]) -> Values:
        vectors = encoder.encode(list(texts), convert_to_numpy=True, show_progress_bar=True)
        return np.asarray(vectors, dtype=np.float64)

    return embed


def cosines(left: Values, right: Values) -> Values:
    """Row by row: (N, D), (N, D) -> (N,) in -1..1; 0 where a row is all zeros."""
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    products = (left * right).sum(axis=1)
    return np.clip(np.divide(products, norms, out=np.zeros_like(products), where=norms > 0), -1, 1)


def summarise(values: Values, groups: Sequence[str]) -> Summary:
    """Mean, median and interval of (N,) values; whole ``groups`` (dialogues) are drawn: their pairs share context.

    Raises ValueError for no values, or another number of groups.
    """
    low, high = bootstrap_interval(values, groups)
    return Summary(values, float(values.mean()), float(np.median(values)), low, high)


def analyse_pairs(run: Path, *, embed: Embed | None = None, keep_as: str = "") -> list[PairAnalysis]:
    """Figure 5: the preference pairs of every iteration of a run that has some.

    A reply is compared with the user's statements, all user turns of its prompt read as one text. Without ``embed``
    the measure is ``TfIdf``; its documents are the statements, the chosen and the rejected reply of every pair of all
    iterations (a text counts as often as it occurs). Under the name ``keep_as`` the cosines are kept in the run, for
    ``kept_analyses``.
    """
    stages = _stages(run)
    measure: Callable[..., Values] = cosines
    if embed is None:
        every = [pair for pairs in stages.values() for pair in pairs]
        measure = TfIdf([text for pair in every for text in (user_statements(pair), pair.chosen, pair.rejected)])
    found = {stage: _cosines(pairs, measure, embed) for stage, pairs in stages.items()}
    if keep_as:
        kept = {
            stage: {"pairs_sha256": file_hash(run / stage / PAIRS)} | {name: v.tolist() for name, v in own.items()}
            for stage, own in found.items()
        }
        write_json(run / KEPT, _kept(run) | {keep_as: kept})
    return [_analysis(stage, pairs, found[stage]) for stage, pairs in stages.items()]


def kept_analyses(run: Path) -> dict[str, list[PairAnalysis]]:
    """What ``analyse_pairs`` has kept, by name. Raises FileError where it is of other pairs than the run has today."""
    stages, analyses = _stages(run), dict[str, list[PairAnalysis]]()
    for name, value in _kept(run).items():
        measured = Fields(value, f"{run / KEPT}, {name!r}")
        analyses[name] = []
        for stage, pairs in stages.items():
            own = Fields(measured.take(stage, dict), f"{measured.where}, {stage}")
            found = {key: np.array(own.take_list(key, float)) for key in ("chosen", "rejected", "similarity")}
            if own.take("pairs_sha256", str) != file_hash(run / stage / PAIRS) or {*map(len, found.values())} != {
                len(pairs)
            }:
                raise own.fail(
                    f"is of other pairs than {run / stage / PAIRS} holds today; remove the file, embed again"
                )
            analyses[name].append(_analysis(stage, pairs, found))
    return analyses


def _stages(run: Path) -> dict[str, list[Pair]]:
    # A planner's pairs are of names of strategies.
    stored = {stage: run / stage / PAIRS for stage in stage_names(run) if not stage.startswith("planner")}
    return {stage: pairs for stage, path in stored.items() if path.is_file() and (pairs := read_pairs(path))}


def _kept(run: Path) -> dict[str, Any]:
    return read_object(run / KEPT).values if (run / KEPT).exists() else {}


def user_statements(pair: Pair) -> str:
    """All that the user has said up to the reply, a turn a line."""
    return "\n".join(message["content"] for message in pair.prompt if message["role"] == "user")


def _cosines(pairs: Sequence[Pair], measure: Callable[..., Values], embed: Embed | None) -> dict[str, Values]:
    """``measure`` compares embeddings, (N, D) and (N, D), or without ``embed`` texts, N and N."""
    users: Any = [user_statements(pair) for pair in pairs]
    chosen: Any = [pair.chosen for pair in pairs]
    rejected: Any = [pair.rejected for pair in pairs]
    if embed is not None:
        embedded = embed([*users, *chosen, *rejected])
        if embedded.ndim != 2 or len(embedded) != 3 * len(pairs):
            raise ValueError(f"embed should give (N, D) for N texts, not {embedded.shape} for {3 * len(pairs)}")
        users, chosen, rejected = np.split(embedded, 3)
    found = {"chosen": measure(users, chosen), "rejected": measure(users, rejected)}
    return found | {"similarity": measure(chosen, rejected)}


def _analysis(stage: str, pairs: Sequence[Pair], found: Mapping[str, Values]) -> PairAnalysis:
    groups = [pair.dialogue for pair in pairs]

    def lengths(texts: Iterable[str]) -> Summary:
        return summarise(np.array([len(text.split()) for text in texts], dtype=np.float64), groups)

    return PairAnalysis(
        stage=stage,
        chosen_relevance=summarise(found["chosen"], groups),
        rejected_relevance=summarise(found["rejected"], groups),
        relevance_gain=summarise(found["chosen"] - found["rejected"], groups),
        similarity=summarise(found["similarity"], groups),
        chosen_length=lengths(pair.chosen for pair in pairs),
        rejected_length=lengths(pair.rejected for pair in pairs),
        golden_length=lengths(pair.golden for pair in pairs),
    )
