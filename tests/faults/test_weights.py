"""Weights and their index: truncated, mutilated, of another model, elsewhere, or not numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faulty
import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file

from selfevo.models import Transformer, load_model, save_pretrained

KIND = "weights"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, Q, EMBEDDING, HEAD = (
    "model.norm.weight", "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "lm_head.weight",
)  # fmt: skip
TOKENS = torch.tensor([[5, 4, 3, 2]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_pretrained(tiny_model(), None, folder)
    return folder


@pytest.fixture(scope="module")
def sharded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in two shards."""
    folder = faulty.copy_of(checkpoint, tmp_path_factory.mktemp("sharded") / "a")
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    places = {name: f"model-{1 + ('layers.1' in name)}.safetensors" for name in tensors}
    for shard in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.fixture(scope="module")
def logits(checkpoint: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(checkpoint)(TOKENS)


@pytest.fixture
def same(logits: torch.Tensor) -> Callable[[Transformer], bool]:
    @torch.no_grad()
    def check(model: Transformer) -> bool:
        return torch.equal(model(TOKENS), logits)

    return check


def refused(folder: Path, *mentions: str) -> None:
    faulty.assert_one_sentence(lambda: load_model(folder), *mentions, kind=KIND)


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what follows it."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(path: Path, header: dict[str, Any] | str | bytes, rest: bytes, size: int | None = None) -> None:
    text = header if isinstance(header, (str, bytes)) else json.dumps(header)
    head = text if isinstance(text, bytes) else text.encode()
    path.write_bytes((len(head) if size is None else size).to_bytes(8, "little") + head + rest)


@pytest.mark.parametrize("damage", faulty.BROKEN)
def test_a_file_that_holds_no_weights(damage: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = faulty.copy_of(checkpoint, tmp_path / "a")
    path = folder / WEIGHTS
    if damage == "UTF-16":
        path.write_bytes(path.read_bytes().hex().encode("utf-16"))
    elif damage == "twice":
        path.write_bytes(path.read_bytes() * 2)
    else:
        faulty.BROKEN[damage](path)
    refused(folder, str(folder))


@pytest.mark.parametrize("damage", faulty.BROKEN)
def test_an_index_that_is_none(damage: str, sharded: Path, tmp_path: Path) -> None:
    folder = faulty.copy_of(sharded, tmp_path / "a")
    faulty.BROKEN[damage](folder / INDEX)
    refused(folder, INDEX)


@pytest.mark.parametrize("damage", faulty.BROKEN)
def test_a_shard_that_is_none(damage: str, sharded: Path, tmp_path: Path) -> None:
    folder = faulty.copy_of(sharded, tmp_path / "a")
    path = folder / "model-2.safetensors"
    if damage == "UTF-16":
        path.write_bytes(path.read_bytes().hex().encode("utf-16"))
    else:
        faulty.BROKEN[damage](path)
    refused(folder, "model-2.safetensors")


@pytest.mark.parametrize("damage", ["symlink"])
def test_a_link_within_the_folder_is_followed(damage: str, checkpoint: Path, tmp_path: Path, same: Any) -> None:
    folder = faulty.copy_of(checkpoint, tmp_path / "a")
    faulty.ODD[damage](folder / WEIGHTS)
    assert not faulty.assert_one_sentence(lambda: load_model(folder), kind=KIND, check=same)


def test_a_truncated_file_names_the_tensor_that_is_cut(checkpoint: Path, tmp_path: Path) -> None:
    folder = faulty.copy_of(checkpoint, tmp_path / "a")
    path = folder / WEIGHTS
    data = path.read_bytes()
    header, rest = split(path)
    places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    for name, (begin, end) in places.items():
        for kept in (begin, (begin + end) // 2, end - 1):
            path.write_bytes(data[: len(data) - len(rest) + kept])
            refused(folder, str(path), f"cut in the tensor {name},")
    for kept in (0, 1, 7, 8, 9, 100, len(data) - len(rest) - 1):
        path.write_bytes(data[:kept])
        refused(folder, str(path), "cut near its beginning")


def entry_changes() -> dict[str, Callable[[dict[str, Any], int], Any]]:
    """What a header may say of one tensor, given its right entry and how long all tensors are."""

    def with_(**changes: Any) -> Callable[[dict[str, Any], int], Any]:
        return lambda entry, size: {key: value for key, value in (entry | changes).items() if value is not None}

    cases: dict[str, Callable[[dict[str, Any], int], Any]] = {
        f"{key} is {name}": with_(**{key: json.loads(text)})
        for key in ("dtype", "shape", "data_offsets")
        for name, text in faulty.WRONG_VALUES.items()
        if name not in ("too long", "deep", "surrogate")
    }
    cases |= {
        f"entry is {name}": lambda entry, size, text=text: json.loads(text)  # type: ignore[misc]
        for name, text in faulty.WRONG_VALUES.items()
        if name not in ("too long", "deep", "surrogate")
    }
    return cases | {
        "another dtype": with_(dtype="F64"),
        "a narrower dtype": with_(dtype="F16"),
        "unknown dtype": with_(dtype="Q4_K"),
        "shape with a zero": with_(shape=[0]),
        "negative shape": with_(shape=[-32]),
        "shape that overflows": with_(shape=[2**62, 4]),
        "a thousand dimensions": with_(shape=[2**62] * 1000),
        "swapped offsets": lambda entry, size: entry | {"data_offsets": entry["data_offsets"][::-1]},
        "three offsets": lambda entry, size: entry | {"data_offsets": [*entry["data_offsets"], 0]},
        "overlapping": lambda entry, size: entry | {"data_offsets": [at - 4 for at in entry["data_offsets"]]},
        "beyond the file": lambda entry, size: entry | {"data_offsets": [at + size for at in entry["data_offsets"]]},
    }


@pytest.mark.parametrize("case", entry_changes())
def test_headers_that_say_something_else(case: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = faulty.copy_of(checkpoint, tmp_path / "a")
    header, rest = split(folder / WEIGHTS)
    header[NORM] = entry_changes()[case](header[NORM], len(rest))
    join(folder / WEIGHTS, header, rest)
    refused(folder, WEIGHTS, NORM)


@pytest.mark.parametrize("name", faulty.WRONG_VALUES)
def test_metadata_of_the_wrong_type(name: str, checkpoint: Path, tmp_path: Path, same: Any) -> None:
    folder = faulty.copy_of(checkpoint, tmp_path / "a")
    header, rest = split(folder / WEIGHTS)
    del header["__metadata__"]
    join(folder / WEIGHTS, f'{{"__metadata__": {faulty.WRONG_VALUES[name]}, {json.dumps(header)[1:]}', rest)
    check = same if name == "object" else None
    faulty.assert_one_sentence(lambda: load_model(folder), WEIGHTS, kind=KIND, check=check)


def test_headers_whose_length_lies(checkpoint: Path, tmp_path: Path) -> None:
    folder = faulty.copy_of(checkpoint, tmp_path / "a")
    path = folder / WEIGHTS
    header, rest = split(path)
    size = len(json.dumps(header))
    for wrong in (0, 1, size // 2, size - 1, size + 1, size + 8, 10**6, 99_999_999, 2**31, 2**63, 2**64 - 1):
        join(path, header, rest, size=wrong)
        refused(folder, str(path))


def test_headers_that_are_no_text(checkpoint: Path, tmp_path: Path) -> None:
    folder = faulty.copy_of(checkpoint, tmp_path / "a")
    path = folder / WEIGHTS
    header, rest = split(path)
    text = json.dumps(header)
    deep = text[:-1] + ', "x": ' + "[" * 10**5 + "]" * 10**5 + "}"
    for wrong in (b"{\xff" + text.encode()[2:], b" " + text.encode(), deep.encode(), b"{}", b"[]", b"{", text[:-1]):
        join(path, wrong, rest)
        refused(folder, str(path))


def test_bit_flips_in_the_header(checkpoint: Path, tmp_path: Path, same: Callable[[Transformer], bool]) -> None:
    """A flip in the metadata changes nothing; anywhere else it is noticed."""
    folder = faulty.copy_of(checkpoint, tmp_path / "a")
    path = folder / WEIGHTS
    whole = path.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    for rng in faulty.rounds(1, 200):
        path.write_bytes(faulty.flip_bits(whole[:size], rng, rng.choice((1, 1, 1, 2, 8))) + whole[size:])
        faulty.assert_one_sentence(lambda: load_model(folder), str(folder), kind="header bit flips", check=same)


def test_mutated_headers(checkpoint: Path, tmp_path: Path, same: Callable[[Transformer], bool]) -> None:
    folder = faulty.copy_of(checkpoint, tmp_path / "a")
    header, rest = split(folder / WEIGHTS)
    for rng in faulty.rounds(2, 150):
        join(folder / WEIGHTS, faulty.mutate_json(header, rng), rest)
        faulty.assert_one_sentence(lambda: load_model(folder), str(folder), kind=KIND, check=same)


def test_bit_flips_among_the_numbers_never_load_what_is_not_finite(checkpoint: Path, tmp_path: Path) -> None:
    folder = faulty.copy_of(checkpoint, tmp_path / "a")
    path = folder / WEIGHTS
    header, rest = split(path)

    def finite(model: Transformer) -> bool:
        return all(bool(parameter.isfinite().all()) for parameter in model.parameters())

    for rng in faulty.rounds(3, 20):
        join(path, header, faulty.flip_bits(rest, rng, 200))
        faulty.assert_one_sentence(lambda: load_model(folder), str(path), kind=KIND, check=finite)


TENSORS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "missing": ({Q: None}, (Q, "missing")),
    "missing embedding": ({EMBEDDING: None}, (EMBEDDING, "missing")),
    "extra": ({"model.layers.7.mlp.up_proj.weight": torch.ones(2)}, ("model.layers.7.mlp.up_proj.weight", "no place")),
    "long name": ({"x" * 10**5: torch.ones(2)}, ("no place",)),
    "control characters": ({"a\nb\x1b[31m": torch.ones(2)}, ("no place",)),
    "transposed": ({"model.layers.0.mlp.up_proj.weight": torch.ones(32, 48)}, ("up_proj", "(32, 48)", "(48, 32)")),
    "flat": ({NORM: torch.ones(1, 32)}, (NORM, "(1, 32)", "(32,)")),
    "a number": ({NORM: torch.tensor(1.0)}, (NORM, "()")),
    "no numbers": ({NORM: torch.ones(0)}, (NORM, "(0,)")),
    **{
        f"{kind}": ({NORM: torch.ones(32).to(kind)}, (NORM, str(kind)))
        for kind in (torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64)
    },
    "NaN": ({NORM: torch.full((32,), torch.nan)}, (NORM, "NaN")),
    "one NaN": ({Q: torch.cat((torch.zeros(1023), torch.full((1,), torch.nan))).view(32, 32)}, (Q, "NaN")),
    "infinite": ({Q: torch.full((32, 32), torch.inf)}, (Q, "infinite")),
    "beyond the other dtype": (
        {EMBEDDING: torch.full((61, 32), 1e300, dtype=torch.float64), HEAD: torch.ones(61, 32)}, ("infinite",)
    ),
    "nothing": ({"all": None}, ("0 tensors",)),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(case: str, checkpoint: Path, tmp_path: Path) -> None:
    changes, mentions = TENSORS[case]
    folder = faulty.copy_of(checkpoint, tmp_path / "a")
    tensors = {} if "all" in changes else load_file(folder / WEIGHTS) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)
    refused(folder, *mentions)


def test_a_tied_head_of_another_dtype_or_shape(tmp_path: Path) -> None:
    save_pretrained(tiny_model(tied=True), None, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    for other in (torch.ones(61, 32).bfloat16(), torch.ones(60, 32), torch.ones(61, dtype=torch.int8), torch.zeros(0)):
        save_file(stored | {HEAD: other}, tmp_path / WEIGHTS)
        with pytest.warns(UserWarning, match="tie_word_embeddings"):
            faulty.assert_one_sentence(
                lambda: load_model(tmp_path), kind=KIND, check=lambda model: bool((model.lm_head.weight == 1).all())
            )


# The index


def index_changes() -> dict[str, tuple[Callable[[dict[str, str]], Any], tuple[str, ...]]]:
    def at(name: str, value: Any) -> Callable[[dict[str, str]], Any]:
        return lambda places: places | {name: value}

    elsewhere = ("which is no shard",)
    cases: dict[str, tuple[Callable[[dict[str, str]], Any], tuple[str, ...]]] = {
        f"shard is {name}": (at(NORM, json.loads(text)), (NORM,))
        for name, text in faulty.WRONG_VALUES.items()
        if name not in ("too long", "deep")
    }
    return cases | {
        "above": (at(NORM, "../outside.safetensors"), elsewhere),
        "above, hidden": (at(NORM, "a/../../outside.safetensors"), elsewhere),
        "absolute": (at(NORM, "/tmp/outside.safetensors"), elsewhere),
        "not there": (at(NORM, "model-3.safetensors"), ("model-3.safetensors", "not there")),
        "null byte": (at(NORM, "a\0.safetensors"), (NORM,)),
        "long": (at(NORM, "a" * 5000 + ".safetensors"), (NORM,)),
        "in the other one": (at(NORM, "model-2.safetensors"), (NORM,)),
        "one more": (at("model.more.weight", "model-1.safetensors"), ("model.more.weight", "not in the file")),
        "one fewer": (lambda places: {k: v for k, v in places.items() if k != NORM}, (NORM, "not in the index")),
        "none": (lambda places: {}, ("0 tensors",)),
        "a list": (lambda places: list(places), ("weight_map",)),
        "a text": (lambda places: "model-1.safetensors", ("weight_map",)),
        "nothing": (lambda places: None, ("weight_map",)),
    }


@pytest.mark.parametrize("case", index_changes())
def test_an_index_that_does_not_fit(case: str, sharded: Path, tmp_path: Path) -> None:
    folder = faulty.copy_of(sharded, tmp_path / "a")
    save_file({NORM: torch.ones(32)}, tmp_path / "outside.safetensors")
    change, mentions = index_changes()[case]
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / INDEX).write_text(json.dumps({"weight_map": change(places)}))
    refused(folder, *mentions)


def test_a_tensor_in_two_shards(sharded: Path, tmp_path: Path) -> None:
    folder = faulty.copy_of(sharded, tmp_path / "a")
    second = folder / "model-2.safetensors"
    save_file(load_file(second) | {NORM: torch.zeros(32)}, second)
    refused(folder, str(second), NORM, "not in the index")


def test_links_out_of_the_folder_are_followed_in_the_cache_of_the_hub_alone(
    sharded: Path, tmp_path: Path, same: Callable[[Transformer], bool]
) -> None:
    hub = tmp_path / "hub"
    for place, allowed in [("models--a--b/blobs/0f", True), ("blobs/0f/00", True), ("other/0f", False)]:
        folder = faulty.copy_of(sharded, hub / "models--a--b" / "snapshots" / "c0ffee")
        target = hub / place
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "model-2.safetensors").rename(target)
        (folder / "model-2.safetensors").symlink_to(target)
        said = faulty.assert_one_sentence(
            lambda: load_model(folder), "outside of its folder", kind=KIND, check=same if allowed else None  # noqa: B023
        )  # fmt: skip
        assert bool(said) != allowed
    folder = faulty.copy_of(sharded, tmp_path / "a")
    (folder / "model-2.safetensors").unlink()
    (folder / "model-2.safetensors").symlink_to(target)
    refused(folder, "model-2.safetensors", "outside of its folder")


def test_a_folder_reached_through_a_link_is_as_good(
    sharded: Path, tmp_path: Path, same: Callable[[Transformer], bool]
) -> None:
    (tmp_path / "link").symlink_to(sharded)
    assert not faulty.assert_one_sentence(lambda: load_model(tmp_path / "link"), kind=KIND, check=same)
