"""The files that a run reads back, where no ledger tells of the damage: each is read with its types checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import faulty
import pytest
import torch
from conftest import tiny_model

from selfevo.datasets import Pair, read_pairs
from selfevo.decoupled.planner import Plan, PlanSettings, plan
from selfevo.dialogue import ESCONV_STRATEGIES
from selfevo.evolve import EvolveConfig, read_settings
from selfevo.evolve.settings import compose, flatten
from selfevo.files import append_jsonl, read_json, read_jsonl, write_json, write_jsonl
from selfevo.generate import Reply, Sampling
from selfevo.generate.replies import sample_replies
from selfevo.lora import inject_lora
from selfevo.training import PairIds
from selfevo.training.reference import stored_reference

NO_FILE = ("missing", "dangling", "device", "terminal", "fifo", "folder", "loop")  # is made again, in its place
REPLIES = [Reply("Why is that?", 5), Reply(None, turns_dropped=4), Reply("It is hard", 3, cut=True)]
PLANS = [Plan(ESCONV_STRATEGIES[2], tuple(-2.0 - place for place in range(8))), None]
IDS = [PairIds([1, 2], [3, 4], [5]), PairIds([1, 7], [8], [9, 10])]
PAIRS = [
    Pair("a#1", "a", [{"role": "user", "content": "Hi"}], "Good.", "Bad.", "Gold.", "refined", {"score": 3}, True),
    Pair("b#3", "b", [{"role": "user", "content": "Oh"}], "Gold.", "Bad.", "Gold.", "golden"),
]
CONFIG = compose(EvolveConfig, {"backbone": "b", "esconv": "e.json", "synthetic": ("s.json",), "out": "o"})


def replies(path: Path) -> list[Reply]:
    prompts: Any = [[{"role": "user", "content": "x"}]] * 3
    nothing: Any = None  # neither a model nor a tokenizer is asked
    return sample_replies(nothing, nothing, prompts, path, sampling=Sampling(), max_new_tokens=9)


def unfinished(path: Path) -> list[Reply]:
    """All are there, but not yet under their final name."""
    final = path.with_name("other.jsonl")
    final.unlink(missing_ok=True)
    if path.exists():  # a pipe too
        path.rename(final.with_name("other.jsonl.unfinished"))
    return replies(final)


def plans(path: Path) -> list[Plan | None]:
    nothing: Any = None
    settings = PlanSettings("likeliest", Sampling())
    return plan(nothing, nothing, [[{"role": "user", "content": "x"}]] * 2, path, settings)


MODEL = tiny_model()
inject_lora(MODEL, rank=2)


def reference(path: Path) -> list[list[float]]:
    found: list[list[float]] = stored_reference(MODEL, IDS, path, 100).tolist()
    return found


def settings(path: Path) -> dict[str, Any]:
    return flatten(read_settings(path.parent, EvolveConfig))


def write_replies(path: Path) -> None:
    write_jsonl(path, [{"index": index, **vars(reply)} for index, reply in enumerate(REPLIES)])


FILES: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "replies.jsonl": (write_replies, replies),
    "plans.jsonl": (lambda path: write_jsonl(path, [one and vars(one) for one in PLANS]), plans),
    "pairs.jsonl": (lambda path: write_jsonl(path, [pair.as_record() for pair in PAIRS]), read_pairs),
    "reference.json": (lambda path: reference(path) and None, reference),
    "config.json": (lambda path: write_json(path, {"settings": flatten(CONFIG)}), settings),
}


@pytest.fixture(params=FILES)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Callable[[Path], Any], Any]:
    write, read = FILES[request.param]
    path = tmp_path / str(request.param)
    write(path)
    return path, read, read(path)


def test_what_was_written_is_read(file: tuple[Path, Callable[[Path], Any], Any]) -> None:
    path, _, found = file
    wanted: dict[str, Any] = {
        "replies.jsonl": REPLIES, "plans.jsonl": PLANS, "pairs.jsonl": PAIRS, "config.json": flatten(CONFIG),
    }  # fmt: skip
    assert found == wanted.get(path.name, found)
    if path.name == "reference.json":
        stored = read_json(path)
        assert [list(pair) for pair in zip(stored["chosen"], stored["rejected"])] == found


def test_files_that_are_none(file: tuple[Path, Callable[[Path], Any], Any]) -> None:
    """Without its reference a run computes it again, without its replies it would ask the model."""
    path, read, found = file
    whole = path.read_bytes()
    for name, damage in faulty.BROKEN.items():
        if name in NO_FILE and path.name in ("replies.jsonl", "plans.jsonl"):
            continue
        path.write_bytes(whole)
        damage(path)
        again = name in NO_FILE and path.name == "reference.json"
        harmless = name == "twice" and path.name == "pairs.jsonl"  # without a ledger, as many again are as good
        harmless |= name in ("empty", "blank") and path.name == "pairs.jsonl"
        faulty.assert_one_sentence(
            lambda: read(path), path.name, kind="run folder",
            check=lambda value: harmless or (again and value == found),  # noqa: B023
        )  # fmt: skip
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)


def test_values_of_the_wrong_type_or_size(file: tuple[Path, Callable[[Path], Any], Any]) -> None:
    path, read, found = file
    lines = path.suffix == ".jsonl"
    whole = read_jsonl(path) if lines else read_json(path)
    for rng in faulty.rounds(0, 120):
        text = faulty.mutate_json(whole, rng)
        if lines:  # a list again
            text = "\n".join(_members(text))
        path.write_text(text)

        def usable(value: Any) -> bool:
            """What is read has the types of what was written; a text or a number may be another one."""
            return same_types(value, found)

        faulty.assert_one_sentence(lambda: read(path), path.name, kind="run folder", check=usable)


def _members(text: str) -> list[str]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return [text]
    return [json.dumps(one) for one in value] if isinstance(value, list) else [text]


def same_types(value: Any, like: Any) -> bool:
    if isinstance(value, list):
        return all(same_types(one, like[0] if like[0] is not None else one) or one in like for one in value)
    if hasattr(value, "__dict__"):
        return set(vars(value)) == set(vars(like)) and all(
            isinstance(one, (type(vars(like)[name]), type(None), str, tuple, list, dict))
            for name, one in vars(value).items()
        )
    return type(value) is type(like)


def test_replies_in_another_order_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    records = [{"index": index, **vars(reply)} for index, reply in enumerate(REPLIES)]
    for changed in (records[::-1], records[:2], [*records, records[2]], [records[0]] * 3):
        write_jsonl(path, changed)
        faulty.assert_one_sentence(lambda: replies(path), "replies.jsonl", "another order", kind="run folder")


def test_replies_that_are_not_finished_are_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl.unfinished"
    for record in ([], {"index": "0"}, {"index": 3, "text": "x"}, {"index": -1}, {"index": 0, "text": 3}, "x"):
        path.unlink(missing_ok=True)
        append_jsonl(path, record)
        faulty.assert_one_sentence(
            lambda: replies(tmp_path / "replies.jsonl"), "replies.jsonl.unfinished", kind="run folder"
        )


def test_a_reference_of_another_length_or_of_other_pairs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "reference.json"
    reference(path)
    stored = read_json(path)
    for change in ({"chosen": stored["chosen"][:1]}, {"rejected": [*stored["rejected"], 0.5]}, {"fingerprint": "0"}):
        write_json(path, stored | change)
        faulty.assert_one_sentence(lambda: reference(path), "reference.json", "remove it", kind="run folder")
    write_json(path, stored)
    others = [replace(IDS[0], chosen=[3, 5]), IDS[1]]
    faulty.assert_one_sentence(
        lambda: stored_reference(MODEL, others, path, 100), "other pairs; remove it", kind="run folder"
    )
    assert torch.is_tensor(stored_reference(MODEL, IDS, path, 100))
