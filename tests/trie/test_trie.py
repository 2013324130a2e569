"""The trie computes every distinct prefix once, and scoring through it equals one sequence at a time."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from selfevo.lora import inject_lora, lora_parameters
from selfevo.models import Transformer
from selfevo.scoring import response_logps
from selfevo.trie import TokenTrie, build_trie, pack
from selfevo.trie import mask as mask_room
from selfevo.trie.mask import Tile, TreeMask
from selfevo.trie.trie import as_ids, private_tails

ids = st.lists(st.integers(0, 2), min_size=1, max_size=9)
FAMILIES = {
    "full": {},
    "window": {"family": "mistral", "windows": (4, 4)},
    "mixed_windows": {"family": "qwen2", "windows": (None, 3), "qkv_bias": True},
    "tied": {"tied": True},
}


def tree_mask(trie: TokenTrie) -> TreeMask:
    return TreeMask(trie, torch.device("cpu"))


def dense(trie: TokenTrie) -> torch.Tensor:
    return tree_mask(trie).dense


@pytest.mark.parametrize("kind", ["equal", "random", "one-token replies", "nested"])
def test_tries_and_packs_of_very_many_sequences_are_built_without_recursion(kind: str) -> None:
    generator = np.random.default_rng(0)
    sequences = {
        "equal": [np.arange(20)] * 20_000,
        "random": list(generator.integers(0, 50, (20_000, 20))),
        "one-token replies": [np.array([1, 2, 3, last]) for last in range(20_000)],
        "nested": [np.arange(length) for length in range(1, 2001)],
    }[kind]
    trie = build_trie(sequences)
    distinct = {tuple(sequence[: n + 1]) for sequence in sequences[:50] for n in range(len(sequence))}
    assert len(trie) >= len(distinct)
    for index in (0, 7, len(sequences) - 1):
        assert trie.tokens[torch.from_numpy(trie.paths[index])].tolist() == list(sequences[index])
    packs = pack([[sequence] for sequence in sequences], 4096)
    assert sorted(index for members in packs for index in members) == list(range(len(sequences)))


@given(sequences=st.lists(ids, min_size=1, max_size=12))
def test_every_distinct_prefix_is_one_node(sequences: list[list[int]]) -> None:
    trie = build_trie(sequences)
    prefixes = {tuple(sequence[: end + 1]) for sequence in sequences for end in range(len(sequence))}
    assert len(trie) == len(prefixes)
    mask = dense(trie)
    for sequence, path in zip(sequences, trie.paths):
        assert trie.tokens[path].tolist() == sequence
        assert trie.positions[path].tolist() == list(range(len(sequence)))
        for depth, node in enumerate(path):
            assert mask[node].nonzero().flatten().tolist() == path[: depth + 1].tolist()


def test_a_small_trie_written_out() -> None:
    trie = build_trie([[5, 6, 7], [5, 6], [5, 8]])
    assert trie.tokens.tolist() == [5, 6, 7, 8]
    assert trie.positions.tolist() == [0, 1, 2, 1]
    assert trie.ends.tolist() == [4, 3, 3, 4]
    assert [path.tolist() for path in trie.paths] == [[0, 1, 2], [0, 1], [0, 3]]
    assert dense(trie).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]


def test_a_single_chain_is_one_causal_tile() -> None:
    (tile,) = tree_mask(build_trie([[1, 2, 3], [1, 2], [1, 2, 3]])).tiles
    assert (tile.rows, tile.seen, tile.mask) == (slice(0, 3), (slice(0, 3),), None)


def assert_tiles_are_the_dense_mask(trie: TokenTrie, tiles: list[Tile]) -> None:
    """Together they allow what the dense mask allows, each node in one of them, each key once."""
    rebuilt = torch.zeros(len(trie), len(trie), dtype=torch.bool)
    for tile in tiles:
        count = tile.rows.stop - tile.rows.start
        columns = torch.cat([torch.arange(len(trie))[part] for part in tile.seen])
        assert len(set(columns.tolist())) == len(columns)
        assert columns[-count:].tolist() == list(range(len(trie)))[tile.rows]
        mask = torch.ones(count, count, dtype=torch.bool).tril() if tile.mask is None else tile.mask
        rebuilt[tile.rows, columns] = mask
        assert mask[:, : len(columns) - count].all()  # a whole chain of ancestors
        assert torch.equal(mask[:, -count:], ~tile.blocked)
    assert [row for tile in tiles for row in range(len(trie))[tile.rows]] == list(range(len(trie)))
    assert torch.equal(rebuilt, dense(trie))


@given(sequences=st.lists(ids, min_size=1, max_size=12), forest=st.sampled_from([1, 2, 5]))
def test_tiles_allow_what_the_dense_mask_allows_and_little_more(sequences: list[list[int]], forest: int) -> None:
    trie = build_trie(sequences)
    with mock.patch.object(mask_room, "DENSE_FOREST", forest):
        tiles = tree_mask(trie).tiles
    assert_tiles_are_the_dense_mask(trie, tiles)
    for tile in tiles:
        count = tile.rows.stop - tile.rows.start
        assert count <= forest or not tile.blocked.tril().any()  # a chain wastes nothing


@given(sequences=st.lists(ids, min_size=1, max_size=12))
def test_below_every_node_the_longest_sequence_comes_first(sequences: list[list[int]]) -> None:
    trie = build_trie(sequences)
    for node in range(len(trie)):
        depths = trie.positions[node : int(trie.ends[node])]
        first = int((depths.diff() != 1).nonzero()[0]) if (depths.diff() != 1).any() else len(depths) - 1
        assert depths[first] == depths.max()


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=6))
def test_a_tail_is_what_no_other_sequence_has(sequences: list[list[int]]) -> None:
    for place, (own, tail) in enumerate(zip(sequences, private_tails([as_ids(sequence) for sequence in sequences]))):
        others = sequences[:place] + sequences[place + 1 :]
        shared = [n for n in range(len(own) + 1) if any(other[:n] == own[:n] and len(other) >= n for other in others)]
        assert tail == len(own) - max(shared, default=0)


@pytest.mark.parametrize("bad", [[], [[1], []]])
def test_nothing_to_merge_is_refused(bad: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one sequence"):
        build_trie(bad)


@given(items=st.lists(st.lists(ids, min_size=1, max_size=3), min_size=1, max_size=10), budget=st.integers(1, 40))
def test_packs_hold_every_item_once_and_keep_to_the_budget(items: list[list[list[int]]], budget: int) -> None:
    arrays = [[as_ids(sequence) for sequence in item] for item in items]
    packs = pack(arrays, budget)
    assert sorted(index for members in packs for index in members) == list(range(len(items)))
    for members in packs:
        distinct = len(build_trie([sequence for index in members for sequence in items[index]]))
        assert distinct <= budget or len(members) == 1


def test_a_full_pack_ends_between_families() -> None:
    """Three families of 60, 40 and 60 tokens that share 10: a budget of 120 splits the third off, whole."""
    system = list(range(10))
    families = [[[*system, *range(100 * n, 100 * n + length)] for length in range(10, size, 10)]
                for n, size in ((1, 61), (2, 41), (3, 61))]  # fmt: skip
    items = [[as_ids(sequence)] for family in families for sequence in family]
    packs = pack(items, 120)
    sizes = [len(family) for family in families]
    assert packs == [list(range(sizes[0] + sizes[1])), list(range(sizes[0] + sizes[1], sum(sizes)))]


Examples = list[tuple[list[int], list[int]]]


def dialogue_examples(seed: int = 0, vocab: int = 61) -> Examples:
    """Two dialogues whose contexts grow turn by turn, two replies after each, one pair of replies equal, one stray."""
    generator = torch.Generator().manual_seed(seed)

    def some(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(0, vocab, (length,), generator=generator).tolist()

    examples: Examples = []
    system = some(5, 6)
    for _ in range(2):
        context = list(system)
        for _ in range(3):
            context = context + some(2, 6)
            chosen, rejected = some(1, 7), some(1, 7)
            examples += [(context, chosen), (context, rejected)]
            context = context + chosen
    return [*examples, examples[3], (some(1, 2), some(1, 3))]


def one_at_a_time(model: Transformer, examples: Examples) -> torch.Tensor:
    """The naive oracle: full logits of each sequence by itself."""
    sums = []
    for prompt, response in examples:
        logits = model(torch.tensor([[*prompt, *response]]))[0].double()
        logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
        sums.append(logps.gather(1, torch.tensor(response)[:, None]).sum())
    return torch.stack(sums)


def adapted(**changes: object) -> Transformer:
    model = tiny_model(**changes)
    inject_lora(model, rank=3, alpha=6, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("max_tokens", [4096, 40, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_equal_one_sequence_at_a_time(
    family: str, max_tokens: int, tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tiled:
        monkeypatch.setattr(mask_room, "DENSE_FOREST", 4)
    model, examples = adapted(**FAMILIES[family]), dialogue_examples()
    weights = torch.linspace(-1, 1, len(examples), dtype=torch.float64)
    sums, lengths = response_logps(model, examples, max_tokens=max_tokens)
    assert lengths.tolist() == [len(response) for _, response in examples]
    (sums.double() * weights).sum().backward()
    gradients = [parameter.grad.clone() for parameter in lora_parameters(model) if parameter.grad is not None]
    model.zero_grad()
    expected = one_at_a_time(model, examples)
    (expected * weights).sum().backward()
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-4)
    assert len(gradients) == len(lora_parameters(model))
    for ours, parameter in zip(gradients, lora_parameters(model)):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-4)


def test_a_trainable_head_and_embedding_get_the_gradient_of_one_at_a_time() -> None:
    model, examples = tiny_model(tied=True), dialogue_examples()
    response_logps(model, examples)[0].sum().backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    one_at_a_time(model, examples).sum().backward()
    assert len(gradients) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=2e-3)


@settings(max_examples=25, deadline=None)
@given(examples=st.lists(st.tuples(ids, ids), min_size=1, max_size=8), budget=st.sampled_from([1, 7, 4096]))
def test_any_examples_score_as_they_do_alone(examples: Examples, budget: int) -> None:
    model = tiny_model(vocab_size=3)
    with torch.no_grad():
        together, _ = response_logps(model, examples, max_tokens=budget)
        torch.testing.assert_close(together.double(), one_at_a_time(model, examples), rtol=1e-5, atol=1e-4)


def test_bfloat16_stays_as_near_to_float32_as_one_at_a_time_does() -> None:
    examples = dialogue_examples()
    with torch.no_grad():
        exact = one_at_a_time(tiny_model(), examples)
        narrow = tiny_model().to(torch.bfloat16)
        alone, together = one_at_a_time(narrow, examples), response_logps(narrow, examples)[0].double()
    assert together.dtype == torch.float64
    assert (together - exact).abs().max() < 2 * (alone - exact).abs().max() + 0.1


@pytest.mark.parametrize(
    ("examples", "reason"),
    [
        ([], "no examples"),
        ([([1], [])], "example 0: its response has no tokens"),
        ([([1], [2]), ([], [2])], "example 1: its prompt has no tokens"),
        ([([1], [61])], r"example 0: token ids should lie in 0\.\.60"),
        ([([-1], [1])], "example 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(examples: Examples, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        response_logps(tiny_model(), examples)
