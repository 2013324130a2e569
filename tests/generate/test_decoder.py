"""The decoder: transformers is the oracle for the greedy path and for the sampling distribution."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.generation import logits_process as processors

from selfevo.generate import Sampling, generate, shared_cache
from selfevo.generate import adapters as adapters_room
from selfevo.generate import decoder as generate_room
from selfevo.generate.adapters import decoding_layers
from selfevo.generate.cache import Prefix, SlotCache
from selfevo.generate.sampling import _mix_int, draw, logits_to_probs, remember, topk_by_groups, uniform_noise
from selfevo.generate.shared_cache import RowGroups, attend_shared, attention_bias, similar_runs
from selfevo.lora import LoRALinear, disable_adapters, freeze_adapter, inject_lora, lora_parameters, remove_adapters
from selfevo.models import Transformer, load_model, save_pretrained
from selfevo.models.attention import fused_attention
from selfevo.scoring import response_logps
from selfevo.trie import build_trie

PROMPTS = [[3, 1, 4, 1, 5], [3, 1, 4], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9], [3, 1, 4, 1, 5], [2], [3, 1, 9, 9]]


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Random checkpoints with and without a sliding window, and the transformers models that wrote them."""
    sizes = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 7,
    }  # fmt: skip
    made = {}
    for name, window in (("full", None), ("window", 6)):
        torch.manual_seed(4)
        peer = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, sliding_window=window)).eval()
        for parameter in peer.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.3)
        folder = tmp_path_factory.mktemp(name)
        peer.save_pretrained(folder)
        made[name] = (folder, peer)
    return made


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("name", ["full", "window"])
def test_greedy_replies_equal_those_of_transformers(peers: dict[str, Any], name: str, penalty: float) -> None:
    folder, peer = peers[name]
    ours = generate(
        load_model(folder), PROMPTS, max_new_tokens=24, stop_ids=[7], temperature=0, repetition_penalty=penalty
    )
    for prompt, reply in zip(PROMPTS, ours):
        full = peer.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
            max_new_tokens=24, repetition_penalty=penalty, pad_token_id=0,
        )[0].tolist()  # fmt: skip
        theirs = full[len(prompt) :]
        assert reply == (theirs[: theirs.index(7)] if 7 in theirs else theirs)
    assert any(len(reply) < 24 for reply in ours) or penalty < 1  # some replies do stop


def test_greedy_path_of_the_real_checkpoint(shared: Path) -> None:
    reference = json.loads((shared / "reference" / "story_greedy.json").read_text())
    model = load_model(shared / "models" / "story")
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0, "repetition_penalty": 1.0}
    assert generate(model, [reference["prompt_ids"]], **options) == [reference["greedy_ids"]]


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6), temperature=st.sampled_from([0.3, 0.9, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 10, 50]), top_p=st.sampled_from([0.1, 0.5, 0.8, 0.95, 1.0]),
    penalty=st.sampled_from([1.0, 1.2, 3.0]), ties=st.booleans(), more=st.integers(0, 2),
)  # fmt: skip
def test_the_sampling_distribution_equals_that_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, penalty: float, ties: bool, more: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 40, generator=generator) * 3
    if ties:
        logits = logits.round()
    seen = torch.randint(0, 40, (3, 12), generator=generator)
    expected = logits.clone()
    chain: list[Any] = [processors.RepetitionPenaltyLogitsProcessor(penalty)]
    chain.append(processors.TemperatureLogitsWarper(temperature))
    chain += [processors.TopKLogitsWarper(top_k)] if top_k else []
    chain += [processors.TopPLogitsWarper(top_p)] if top_p < 1 and not ties else []
    for processor in chain:
        expected = processor(seen, expected)
    noted = seen[:, :1].repeat(1, 12)
    for place in range(1, 12):
        remember(noted, torch.full((3,), place), seen[:, place])
    chosen = {"temperature": temperature, "top_k": top_k, "top_p": 1.0 if ties else top_p}
    columns = F.pad(logits, (0, 0, 0, more)).t().contiguous()
    probs, ids = logits_to_probs(columns, noted, penalty=penalty, **chosen)
    dense = torch.zeros(3, 40).scatter_add(1, ids, probs)
    torch.testing.assert_close(dense, expected.softmax(1), rtol=1e-4, atol=1e-6)


def test_scores_that_tie_with_the_kth_survive_top_k() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0]]).t()
    probs, ids = logits_to_probs(logits, temperature=1.0, top_k=2, top_p=1.0)
    assert sorted(ids[0][probs[0] > 0].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("ties", [1, 16, 17, 18, 33, 100, 400])
def test_ties_with_the_kth_are_followed_to_their_end_and_no_further(ties: int) -> None:
    """More ties than are looked at at first; what is just below them stays out."""
    logits = torch.full((600,), -5.0)
    logits[100], logits[200 : 200 + ties], logits[150] = 3.0, 1.0, 0.999
    probs, ids = logits_to_probs(logits[:, None], temperature=1.0, top_k=2, top_p=1.0)
    kept = sorted(ids[0][probs[0] > 0].tolist())
    assert kept == [100, *range(200, 200 + ties)]


def test_the_random_draws_are_those_of_splitmix64_for_all_versions() -> None:
    """The published first outputs of the generator from seed 1234567, and a few numbers of our own: the same seed gives
    the same reply in every version."""
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [_mix_int(1234567 + place * golden) & mask for place in range(4)] == published
    noise = uniform_noise(0, torch.tensor([0, 1, 7]), torch.tensor([0, 0, 3]))
    assert noise.tolist() == [0.1296456182997474, 0.8193382636014529, 0.7793716443715984]
    assert uniform_noise(123456789, torch.tensor([5]), torch.tensor([2])).item() == 0.7652857527442385
    assert uniform_noise(2**63 - 1, torch.tensor([2**40]), torch.tensor([9])).item() == 0.9839944622417396


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-12, 1e-6])
def test_temperatures_near_0_are_greedy(temperature: float) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "repetition_penalty": 1.0}
    greedy = generate(tiny_model(), PROMPTS, temperature=0.0, **options)
    assert generate(tiny_model(), PROMPTS, temperature=temperature, **options) == greedy


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_end_in_one_sentence(bad: float) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[5, 3] = bad
    with pytest.raises(FloatingPointError, match="the model's logits are not finite"):
        generate(model, PROMPTS, max_new_tokens=3)


@pytest.mark.parametrize("stops", [(1, 2, 3), {1, 2, 3}, torch.tensor([1, 2, 3]), np.array([3, 2, 1]), range(1, 4)])
def test_any_container_of_integers_stops(stops: Any) -> None:
    expected = generate(tiny_model(), PROMPTS, max_new_tokens=20, stop_ids=[1, 2, 3], seed=3)
    assert generate(tiny_model(), PROMPTS, max_new_tokens=20, stop_ids=stops, seed=3) == expected


def test_a_prompt_may_be_given_thousands_of_times() -> None:
    replies = generate(tiny_model(), [[1, 2, 3]] * 3000, max_new_tokens=1, batch_size=512)
    assert len(replies) == 3000
    assert len({tuple(reply) for reply in replies}) > 5


def test_top_p_keeps_the_smallest_set_that_reaches_p_and_at_least_one() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().t()
    for p, kept in ((0.01, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (0.99, 4)):
        probs, _ = logits_to_probs(logits.double(), temperature=1.0, top_k=0, top_p=p)
        assert int((probs > 0).sum()) == kept, p


def test_draws_follow_the_probabilities() -> None:
    probs = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).expand(40000, -1)
    ids = torch.tensor([[7, 3, 5, 1]]).expand(40000, -1)
    count = torch.arange(40000)
    drawn = draw(probs, ids, uniform_noise(0, count, torch.zeros_like(count)))
    for token, share in ((7, 0.5), (3, 0.25), (5, 0.25), (1, 0.0)):
        assert abs(float((drawn == token).double().mean()) - share) < 0.01


def test_noise_is_uniform_and_depends_on_seed_key_and_step() -> None:
    count, zero = torch.arange(100_000), torch.zeros(100_000, dtype=torch.int64)
    streams = [uniform_noise(5, count, zero), uniform_noise(5, zero, count), uniform_noise(6, count, zero)]
    for stream in streams:
        assert abs(float(stream.mean()) - 0.5) < 0.005
        assert abs(float(stream.var()) - 1 / 12) < 0.001
        assert 0 <= float(stream.min()) <= float(stream.max()) < 1
    for other in streams[1:]:
        correlation = torch.corrcoef(torch.stack((streams[0], other)))[0, 1]
        assert abs(float(correlation)) < 0.02
    torch.testing.assert_close(streams[0], uniform_noise(5, count, zero), rtol=0, atol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_a_sampled_reply_does_not_depend_on_the_batch(batch_size: int) -> None:
    model = tiny_model()
    options: dict[str, Any] = {"max_new_tokens": 20, "stop_ids": [1, 2, 3], "seed": 11}
    together = generate(model, PROMPTS, **options)
    assert generate(model, PROMPTS, batch_size=batch_size, **options) == together
    for key in (0, 3, 5):
        assert generate(model, [PROMPTS[key]], keys=[key], **options) == [together[key]]
    assert together[0] != together[3]  # equal prompts, different keys
    assert generate(model, PROMPTS, **(options | {"seed": 12})) != together


def test_prompts_spread_over_several_prefill_packs_give_the_same_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(windows=(None, 5))
    options: dict[str, Any] = {"max_new_tokens": 12, "stop_ids": [1, 2], "seed": 3}
    expected = generate(model, PROMPTS, **options)
    monkeypatch.setattr("selfevo.generate.decoder.MAX_PREFILL_TOKENS", 6)
    assert generate(model, PROMPTS, batch_size=2, **options) == expected


def test_what_was_generated_greedily_is_the_argmax_when_scored_in_one_pass() -> None:
    model = tiny_model()
    replies = generate(model, PROMPTS, max_new_tokens=9, temperature=0, repetition_penalty=1.0)
    for prompt, reply in zip(PROMPTS, replies):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *reply]]))[0, len(prompt) - 1 : -1]
            sums, _ = response_logps(model, [(prompt, reply)])
        assert logits.argmax(-1).tolist() == reply
        torch.testing.assert_close(sums[0], logits.log_softmax(-1).max(-1).values.sum(), rtol=1e-5, atol=1e-5)


def test_the_stop_id_is_not_part_of_the_reply_and_the_callers_condition_ends_it() -> None:
    model = tiny_model()
    free = generate(model, PROMPTS, max_new_tokens=15, temperature=0)
    stop = free[2][4]
    stopped = generate(model, PROMPTS, max_new_tokens=15, temperature=0, stop_ids=[stop])
    assert stopped[2] == free[2][: free[2].index(stop)]
    ended = generate(model, PROMPTS, max_new_tokens=15, temperature=0, stop_when=lambda ids: len(ids) == 6)
    assert ended == [reply[:6] for reply in free]


def test_every_reply_is_told_once_when_it_is_finished() -> None:
    told: dict[int, list[int]] = {}

    def tell(index: int, ids: list[int]) -> None:
        assert index not in told
        told[index] = list(ids)

    replies = generate(
        tiny_model(), PROMPTS, max_new_tokens=15, batch_size=2, stop_when=lambda ids: ids[-1] % 5 == 0, on_reply=tell
    )
    assert [told[index] for index in range(len(PROMPTS))] == replies
    assert list(told) != sorted(told)  # the shorter ones came first


@pytest.mark.parametrize("windows", [(None, None), (None, 7), (3, 40)])
def test_shared_trunks_give_the_replies_of_rows_that_keep_their_own_prompts(
    windows: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relatives, strangers, one prompt twice and a lone short one; replies end at different times, so rows move."""
    model = tiny_model(windows=windows)
    trunk = list(range(1, 50))
    prompts = [[*trunk[:n], 50 + n % 10] for n in (5, 20, 31, 48, 31)] + [
        [60, *range(3, 30)],
        [2],
        [60, 3, 4, 5],
        trunk,
    ]

    def ends(reply: list[int]) -> bool:
        return sum(reply) % 5 == 0

    expected: list[list[int]] | None = None
    for spread, tail in ((1.0, 0.0), (1.5, 1.5), (1.0, 100.0), (100.0, 1.5), (100.0, 100.0)):
        monkeypatch.setattr(shared_cache, "SPREAD", spread)
        monkeypatch.setattr(generate_room, "_TAIL", tail)
        for slots in (1, 4, 9):
            found = generate(model, prompts, max_new_tokens=12, batch_size=slots, stop_when=ends)
            expected = expected or found
            assert found == expected
    assert len({len(reply) for reply in expected or ()}) > 2
    with monkeypatch.context() as patch:
        patch.setattr(
            generate_room, "row_cache", lambda model, slots, longest, new, tail: SlotCache(model, slots, longest + new)
        )
        for slots in (1, 4, 9):
            assert generate(model, prompts, max_new_tokens=12, batch_size=slots, stop_when=ends) == expected


def test_relatives_share_a_trunk_and_strangers_do_not() -> None:
    trunk = list(range(100))
    prompts = [[*trunk[:n], 200 + n] for n in (60, 80, 99)] + [[7, *range(150, 190)], [7, *range(150, 180), 9]]
    trie = build_trie(prompts)
    groups = similar_runs(trie.paths)
    assert [len(group) for group in groups] == [3, 2]
    assert all(len(set().union(*map(list, group))) <= 1.5 * max(map(len, group)) for group in groups)


@settings(deadline=None, max_examples=20)
@given(
    rows=st.integers(1, 5), groups=st.sampled_from([1, 2]), each=st.sampled_from([1, 3]), own=st.integers(1, 4),
    shared=st.sampled_from([6, 600]), scale=st.sampled_from([0.1, 1.0, 30.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_attention_in_two_parts_is_attention_over_all_keys(
    rows: int, groups: int, each: int, own: int, shared: int, scale: float, dtype: torch.dtype, seed: int
) -> None:
    """Against one softmax over trunk and own keys together, in float64, also where scores are extreme or a whole trunk
    is hidden."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    queries = scale * normal(8, 1, groups * each, rows).permute(3, 2, 1, 0)  # laid out as a product from the left is
    keys, values = normal(rows, groups, own, 8), normal(rows, groups, own, 8)
    prefixes, blocked = [], []
    sizes = [rows] if rows < 3 else [2, rows - 2]
    for size in sizes:
        hidden = torch.rand(size, shared, generator=generator) < 0.4
        hidden[0] = True
        sides = [normal(2, groups, shared, 8) for _ in range(2)]
        prefixes.append(Prefix(sides[0], sides[1], torch.arange(shared)))
        blocked.append(hidden)
    order = torch.randperm(rows, generator=generator)
    unseen = torch.rand(rows, own, generator=generator) < 0.4
    unseen[:, 0] = False
    groups_of_rows = RowGroups(prefixes, sizes, blocked, order, order.argsort())
    biases = [attention_bias(hidden, dtype).repeat_interleave(each, dim=0) for hidden in blocked]
    found = attend_shared(queries, keys, values, 1, groups_of_rows, attention_bias(unseen, dtype), biases)
    assert found.dtype == dtype
    place = 0
    for prefix, size, hidden in zip(prefixes, sizes, blocked):
        for offset in range(size):
            row = int(order[place + offset])
            whole = (torch.cat(x, dim=1) for x in ((prefix.keys[1], keys[row]), (prefix.values[1], values[row])))
            wide = (x.double().repeat_interleave(each, dim=0) for x in whole)
            allowed = torch.cat((~hidden[offset], ~unseen[row]))[None]
            expected = F.scaled_dot_product_attention(queries[row].double(), *wide, attn_mask=allowed)
            # Scores of float32 are rounded by their size, which grows with the scale, and so are their exponentials.
            close = {torch.float64: 1e-10, torch.float32: 1e-5 * max(1.0, scale), torch.bfloat16: 2e-2}[dtype]
            torch.testing.assert_close(found[row].double(), expected, rtol=close, atol=close)
        place += size


def test_bfloat16_rollouts_are_near_those_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states near those of float64 weights with the same numbers."""
    model = tiny_model().bfloat16()
    exact = copy.deepcopy(model).double()
    checked = 0

    def compared(self: Any) -> torch.Tensor:
        nonlocal checked
        hidden = decode(self)
        for row, sequence in zip(hidden, self.running):
            expected = exact.hidden_states(torch.tensor([[*sequence.prompt.tolist(), *sequence.reply]]))[0, -1]
            assert float((row.double() - expected).norm()) < 0.03 * float(expected.norm())
            checked += 1
        return hidden

    decode = generate_room._Decoder.decode_one_token
    monkeypatch.setattr(generate_room._Decoder, "decode_one_token", compared)
    for slots in (1, 3):
        replies = generate(model, PROMPTS[:3], max_new_tokens=5, batch_size=slots)
        assert [len(reply) for reply in replies] == [5, 5, 5]
    assert checked == 24


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 4), size=st.integers(1, 3000), width=st.integers(1, 9), levels=st.sampled_from([3, 50, 10**6]),
    lowest=st.sampled_from([-(10**6), -25, -1, 0]), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_the_largest_by_sets_are_those_of_topk(
    rows: int, size: int, width: int, levels: int, lowest: int, dtype: torch.dtype, seed: int
) -> None:
    """Ties, negative numbers and all: the same values in the same order, at places that hold them, each once."""
    width = min(width, size)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(lowest, lowest + levels, (size, rows), generator=generator).to(dtype)
    found, places = topk_by_groups(scores, width)
    assert torch.equal(found, scores.float().topk(width, dim=0).values.t())
    assert torch.equal(scores.float().gather(0, places.t()).t(), found)
    assert all(len(set(row)) == width for row in places.tolist())


def test_a_penalty_is_not_rounded_to_the_dtype_of_the_logits() -> None:
    """transformers penalises in float32: 2 / 1.25 is 1.6, not its neighbour in bfloat16."""
    logits = torch.tensor([[2.0, 1.5, -1.0]], dtype=torch.bfloat16).t()
    probs, ids = logits_to_probs(logits, torch.tensor([[0, 0]]), penalty=1.25, temperature=1.0, top_k=0, top_p=1.0)
    expected = torch.tensor([1.6, 1.5, -1.0]).softmax(0)
    torch.testing.assert_close(torch.zeros(3).scatter_add(0, ids[0], probs[0]), expected)


def test_training_mode_is_restored_and_an_empty_list_is_an_empty_list() -> None:
    model = tiny_model().train()
    assert generate(model, [], max_new_tokens=3) == []
    generate(model, PROMPTS[:1], max_new_tokens=1)
    assert model.training


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompts": [[1], []]}, "prompt 1 has no tokens"),
        ({"prompts": [[61]]}, "prompt 0: token ids"),
        ({"prompts": [1, 2, 3], "keys": [1, 2, 3]}, "prompt 0 should be a list of token ids, not 1"),
        ({"prompts": [[[1, 2], [3, 4]]]}, "prompt 0 should be a list of token ids"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": float("nan")}, "top_p"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"prompts": [[1] * 250]}, "prompt 0: 250 tokens and 10 new ones do not fit"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"keys": [1, 2]}, "1 prompts but 2 keys"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], reason: str) -> None:
    arguments: dict[str, Any] = {"prompts": [[1]], "max_new_tokens": 10} | changes
    with pytest.raises(ValueError, match=reason):
        generate(tiny_model(), arguments.pop("prompts"), **arguments)


def test_the_papers_decoding_settings_are_the_defaults() -> None:
    assert Sampling() == Sampling(temperature=0.9, top_p=0.8, top_k=50, repetition_penalty=1.2, seed=0)


# Adapters and the head in a rollout


def stacked_model() -> Transformer:
    """Two frozen adapters and a trainable one, all of them felt."""
    model = tiny_model()
    inject_lora(model, rank=2, alpha=4, seed=1)
    torch.manual_seed(5)
    for _ in range(2):
        for parameter in lora_parameters(model):
            torch.nn.init.normal_(parameter, std=0.2)
        freeze_adapter(model, seed=3)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("room", [2**20, 0])
def test_merged_adapters_act_as_the_layers_do_and_leave_them_as_they_were(
    enabled: bool, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without room for the copies they stay apart, in the dtype of the weights."""
    monkeypatch.setattr(adapters_room, "MAX_BYTES", room)
    model = stacked_model()
    tokens = torch.tensor([[1, 5, 9, 2]])
    switch = contextlib.nullcontext() if enabled else disable_adapters(model)
    with torch.no_grad(), switch:
        expected, before = model(tokens), {name: t.clone() for name, t in model.state_dict().items()}
        with decoding_layers(model):
            layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
            assert not any(isinstance(layer, LoRALinear) for layer in layers)
            assert len(layers) == (15 if room else 1)  # all are plain products, or none but the head
            torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(tokens), expected)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rollout_leaves_the_users_weights_alone(dtype: torch.dtype, tmp_path: Path) -> None:
    """The same modules, the same memory, nothing shared between them; what follows can be trained and saved."""
    model = tiny_model(family="qwen2", qkv_bias=True).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inject_lora(model, rank=2, alpha=4, targets=["q_proj", "up_proj", "down_proj"])
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.2)
    modules = dict(model.named_modules())
    places = {name: parameter.untyped_storage().data_ptr() for name, parameter in model.named_parameters()}
    generate(model, PROMPTS, max_new_tokens=3)
    assert dict(model.named_modules()) == modules
    assert {name: p.untyped_storage().data_ptr() for name, p in model.named_parameters()} == places
    assert len(set(places.values())) == len(places)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    gradients = [p.grad.abs().sum() for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert len(gradients) == len(lora_parameters(model))
    assert all(gradients)
    remove_adapters(model)
    save_pretrained(model, None, tmp_path)
    found = load_model(tmp_path, dtype=dtype).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.items())


def test_bfloat16_adapters_stay_apart_and_are_as_exact_as_float32_ones() -> None:
    """Against float32 from the same rounded weights: what errs is the layers' own rounding."""
    exact, tokens = stacked_model(), torch.randint(0, 60, (4, 40), generator=torch.Generator().manual_seed(0))
    model = copy.deepcopy(exact)
    for layer, wide in zip(model.modules(), exact.modules()):
        for name, parameter in layer.named_parameters(recurse=False):
            if not name.startswith("lora_"):
                parameter.data = parameter.data.bfloat16()
                getattr(wide, name).data = parameter.data.float()
    with torch.no_grad():
        truth, apart = exact(tokens), model(tokens).float()
        with decoding_layers(model):
            prepared = model(tokens).float()
    assert not torch.equal(prepared, apart)
    assert (prepared - truth).norm() <= 1.2 * (apart - truth).norm()
    assert (prepared - truth).norm() <= 0.03 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_keys_attend_like_repeated_ones(dtype: torch.dtype) -> None:
    """One token or several, a mask or none, against attention over keys repeated for every head, in float64."""
    torch.manual_seed(0)
    for length, masked in ((1, True), (1, False), (4, True), (4, False)):
        queries = torch.randn(2, 6, length, 8, dtype=dtype)
        keys, values = torch.randn(2, 2, 2, 9 if masked else length, 8, dtype=dtype).unbind()
        mask = torch.rand(2, 1, length, keys.shape[2]) < 0.6 if masked else None
        if mask is not None:
            mask[..., 0] = True
        seen = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask
        wide = [x.double().repeat_interleave(3, dim=1) for x in (keys, values)]
        scores = queries.double() @ wide[0].transpose(2, 3) / 8**0.5
        expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ wide[1]
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(
            fused_attention(queries, keys, values, mask).double(), expected, rtol=tolerance, atol=tolerance
        )
