"""Several ranks: whatever their number they do the work of one, to the same result; one that dies ends all, and the run
goes on with another number."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import decoupled
import faulty
import iterate
import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from processes import Fault, deal_a_broken_part, deal_a_part_that_waits, launch, load_within, refuse, run
from runs import ITERATE, configuration, flags
from safetensors.torch import load_file

from selfevo.evolve import evolve
from selfevo.kernels import ranks, watch
from selfevo.kernels.mirror import Original, follow, transfer
from selfevo.lora import disable_adapters, freeze_adapter, inject_lora, lora_parameters, remove_adapters
from selfevo.models import load_tokenizer, save_pretrained

# Every item is a pack of its own, so that there is something to deal; dropout, as its draws must not depend on ranks.
DEALT: dict[str, Any] = {"max_tokens": 8, "accumulation": 2, "iterations": 1, "lora_dropout": 0.1, "limit": 4}
RESULTS = ("M1/replies.jsonl", "M1/pairs.jsonl", "M1/filter.json", "eval/M1.replies.jsonl", "eval/table.md")


# Sharing out


@given(costs=st.lists(st.integers(0, 1000), max_size=40), size=st.integers(1, 9))
def test_every_job_is_dealt_once_and_no_rank_has_a_job_more_than_it_should(costs: list[int], size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "size", lambda: size)
        shares = ranks.share_out(costs)
    assert sorted(number for share in shares for number in share) == list(range(len(costs)))
    loads = [sum(costs[number] for number in share) for share in shares]
    for share, load in zip(shares, loads):
        assert all(load - costs[number] <= min(loads) for number in share[-1:] if costs[number] == min(costs))
    assert max(loads) <= sum(costs) / size + max(costs, default=0)


# Mirrors


class Line:
    """What rank 0 sends, for one mirror to receive; counts the bytes."""

    def __init__(self) -> None:
        self.original, self.mirror, self.bytes = Original(), None, 0

    def update(self, model: torch.nn.Module) -> Any:
        sent: list[torch.Tensor] = []
        changes, tensors = self.original.changes(model)
        transfer(tensors, lambda whole: sent.append(whole.clone()), first=True)
        self.bytes = sum(len(whole) for whole in sent)
        self.mirror, fresh = follow(self.mirror, changes, torch.device)
        transfer(fresh, lambda whole: whole.copy_(sent.pop(0)), first=False)
        assert not sent
        return self.mirror


@pytest.mark.parametrize("tied", [False, True])
def test_a_mirror_follows_its_model_through_adapters_that_come_go_and_change(tied: bool) -> None:
    model, line, tokens = tiny_model(tied=tied), Line(), torch.arange(40)[None]

    def assert_equal() -> Any:
        mirror = line.update(model)
        assert mirror is not model
        assert torch.equal(mirror(tokens), model(tokens))
        names = [name for name, _ in model.named_parameters()]
        assert [name for name, _ in mirror.named_parameters() if not (tied and name == "lm_head.weight")] == names
        assert mirror.training == model.training
        return mirror

    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    assert_equal()
    assert line.bytes == weights
    assert_equal()
    assert line.bytes == 0  # nothing has changed
    inject_lora(model, rank=2, dropout=0.5, seed=3)
    adapter = sum(4 * parameter.numel() for parameter in lora_parameters(model))
    mirror = assert_equal()
    assert line.bytes == adapter  # the weights are known
    optimiser = torch.optim.SGD(lora_parameters(model), lr=0.1)
    for parameter in lora_parameters(model):
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    assert assert_equal() is mirror
    assert line.bytes == adapter
    model.train()
    assert line.update(model).training
    model.eval()
    with disable_adapters(model):
        assert_equal()
    freeze_adapter(model, seed=1)
    assert_equal()
    remove_adapters(model)
    assert_equal()
    assert line.bytes == 0
    assert not any(parameter.requires_grad for parameter in line.mirror.parameters())


def test_a_tokenizer_goes_to_another_process_by_its_folder(world: Path) -> None:
    import pickle

    tokenizer = load_tokenizer(world / "backbone")
    other = pickle.loads(pickle.dumps(tokenizer))
    assert other is not tokenizer
    messages = [{"role": "user", "content": "I am sad."}]
    assert other.encode_chat(messages) == tokenizer.encode_chat(messages)
    assert other.stop_ids == tokenizer.stop_ids


# Runs


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    return evolve(configuration(world, tmp_path_factory.mktemp("ranks") / "whole", **DEALT))


def assert_same(run: Path, whole: Path) -> None:
    for stage in ("M0", "M1"):
        ours, theirs = (load_file(folder / stage / "adapter_model.safetensors") for folder in (run, whole))
        assert ours.keys() == theirs.keys()
        for name, values in theirs.items():
            torch.testing.assert_close(ours[name], values, rtol=1e-6, atol=1e-6 * float(values.abs().max()))
    for name in RESULTS:
        assert (run / name).read_text() == (whole / name).read_text(), name
    ours, theirs = ({path.relative_to(folder) for path in folder.rglob("*")} for folder in (run, whole))
    assert ours == theirs  # no rank but the first has left anything


@pytest.mark.parametrize("shard", [False, True], ids=["replicated", "sharded"])
@pytest.mark.parametrize("size", [2, 3])
def test_several_ranks_give_the_adapters_pairs_replies_and_table_of_one(
    size: int,
    shard: bool,
    world: Path,
    whole: Path,
    tmp_path: Path,
) -> None:
    ended = launch(size, tmp_path, run, configuration(world, tmp_path / "run", shard=shard, **DEALT))
    assert ended.codes == [0] * size, ended.errors
    assert_same(tmp_path / "run", whole)
    assert all("it/s" not in text and "reply" not in text for text in ended.errors[1:])  # one shows progress


# In the order of a run. Of two calls the second is in the middle: a rank has something of its own on disk.
STAGES = [
    (3, Fault(2, "selfevo.training.step", "_gradients", 2)),
    (2, Fault(1, "selfevo.generate.replies", "append_jsonl", 2)),
    (2, Fault(0, "selfevo.generate.replies", "append_jsonl", 3)),
    (3, Fault(1, "selfevo.training.reference", "_reference_part")),
    (2, Fault(1, "selfevo.training.step", "_gradients", 2)),
    (3, Fault(2, "selfevo.generate.replies", "append_jsonl", 2)),
]


@pytest.mark.parametrize("shards", [(True, False), (False, True)], ids=["shared first", "whole first"])
def test_after_a_rank_was_killed_in_each_stage_another_number_of_ranks_goes_on_to_the_same_result(
    shards: tuple[bool, bool],
    world: Path,
    whole: Path,
    tmp_path: Path,
) -> None:
    """``shards``: whether they share the weights in the first, third .. and in the second, fourth .. of the calls."""
    for place, (size, fault) in enumerate(STAGES):
        config = configuration(world, tmp_path / "run", shard=shards[place % 2], **DEALT)
        ended = launch(size, tmp_path / str(place), run, config, fault=fault)
        assert ended.codes[fault.rank] == -signal.SIGKILL, (place, ended)
        assert all(code == 1 for rank, code in enumerate(ended.codes) if rank != fault.rank)
        (sentence,) = ended.sentences
        assert "died" in sentence or "no sign of life" in sentence
        assert "--resume" in sentence
    assert run(config) == 0
    assert_same(tmp_path / "run", whole)


def test_one_process_cannot_share_weights(world: Path, tmp_path: Path) -> None:
    says = ("--shard has no effect here: there is one process",)
    for main in (iterate.main, decoupled.main):
        given = ["--backbone", world / "backbone", "--esconv", world / "esconv.json", "--out", tmp_path / "run"]
        faulty.assert_program_refuses(main, *given, "--shard", mentions=says, kind="requests")
    assert not (tmp_path / "run").exists()


def test_a_rank_reads_no_more_of_the_weights_than_it_keeps(world: Path, tmp_path: Path) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_layers": 12, "num_heads": 8, "head_dim": 64}
    save_pretrained(tiny_model(**wide), None, tmp_path / "model")
    ended = launch(2, tmp_path / "ranks", load_within, world / "backbone", tmp_path / "model")
    assert ended.codes == [0, 0], ended.errors


def test_a_rank_that_hangs_ends_all_with_one_sentence(world: Path, tmp_path: Path) -> None:
    assert watch.LIMIT + 31 < 60  # torchrun waits 30 s for a process that it asks to end
    fault = Fault(1, "selfevo.training.step", "_gradients", 1, signal.SIGSTOP)
    ended = launch(2, tmp_path, run, configuration(world, tmp_path / "run", **DEALT), fault=fault)
    assert ended.codes[0] == 1
    (sentence,) = ended.sentences
    assert "rank 1 has given no sign of life" in sentence
    assert "--resume" in sentence


@pytest.mark.parametrize(
    ("main", "sentence"),
    [(refuse, "error: this file is wrong; mend it"), (deal_a_broken_part, "error: the memory does not suffice; ")],
)
def test_the_rank_that_fails_says_why_and_the_others_are_silent(tmp_path: Path, main: Any, sentence: str) -> None:
    ended = launch(3, tmp_path, main)
    assert ended.codes == [1, 1, 1]
    (said,) = ended.sentences
    assert said.startswith(sentence)


def test_ranks_that_wait_for_one_another_end_with_one_sentence(tmp_path: Path) -> None:
    ended = launch(2, tmp_path, deal_a_part_that_waits)
    assert ended.codes == [1, 1]
    (sentence,) = ended.sentences
    assert "error:" in sentence


def test_the_command_runs_under_torchrun(world: Path, whole: Path, tmp_path: Path) -> None:
    config = configuration(world, tmp_path / "run", **DEALT)
    given = [*flags(config), "--max-tokens", "8", "--iterations", "1", "--lora-dropout", "0.1", "--limit", "4"]
    given[given.index("--accumulation") + 1] = "2"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ITERATE)]
    done = subprocess.run([*command, *given], capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("| M1 |") == 1
    (tmp_path / "run" / "report.html").unlink()
    assert_same(tmp_path / "run", whole)
    again = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=300, env=os.environ)
    assert again.returncode == 0
    assert again.stdout.count("usage:") == 1
