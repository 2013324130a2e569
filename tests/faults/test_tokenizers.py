"""Tokenizers: files that are none, tokens and ids that do not go together, panics of the libraries that read them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faulty
import pytest
import sentencepiece
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import MARKERS, world  # noqa: F401 (a fixture)

from selfevo.models import ChatTokenizer, load_tokenizer, save_pretrained

KIND = "tokenizers"
TALK = [{"role": "user", "content": "I am sad <|eot_id|>."}]
TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"


@pytest.fixture(scope="module")
def folder(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A byte-level tokenizer with the control tokens of Llama-3."""
    target = tmp_path_factory.mktemp("tokenizer") / "a"
    target.mkdir()
    for name in (TOKENIZER, SETTINGS):
        (target / name).write_bytes((world / "backbone" / name).read_bytes())
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 4]}))
    return target


@pytest.fixture(scope="module")
def words(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same vocabulary as vocab.json and merges.txt, with the control tokens in added_tokens.json."""
    target = tmp_path_factory.mktemp("words") / "a"
    target.mkdir()
    model = json.loads((folder / TOKENIZER).read_text())["model"]
    plain = {token: id_ - len(MARKERS) for token, id_ in model["vocab"].items() if token not in MARKERS}
    (target / "vocab.json").write_text(json.dumps(plain))
    (target / "merges.txt").write_text("#version: 0.2\n")
    added = {token: len(plain) + index for index, token in enumerate(MARKERS)}
    (target / "added_tokens.json").write_text(json.dumps(added))
    (target / SETTINGS).write_bytes((folder / SETTINGS).read_bytes())
    return target


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sentencepiece model."""
    target = tmp_path_factory.mktemp("pieces") / "a"
    target.mkdir()
    texts = iter(["the cat sat on the mat", "I am sad today", "why is that so hard"] * 20)
    with open(target / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts, model_writer=file, vocab_size=300, model_type="bpe", byte_fallback=True,
            minloglevel=2,
        )  # fmt: skip
    (target / SETTINGS).write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return target


def ids(tokenizer: ChatTokenizer) -> list[int]:
    return tokenizer.encode_chat(TALK) + list(tokenizer.stop_ids)


@pytest.fixture(scope="module")
def right(folder: Path, words: Path, pieces: Path) -> dict[Path, list[int]]:
    return {path: ids(load_tokenizer(path)) for path in (folder, words, pieces)}


def loads(folder: Path, *mentions: str, expected: list[int] | None = None) -> str:
    """Nothing is written on stderr either: the libraries print panics there themselves."""
    read, write = os.pipe()
    saved = os.dup(2)
    os.dup2(write, 2)
    try:
        check = None if expected is None else (lambda tokenizer: ids(tokenizer) == expected)
        return faulty.assert_one_sentence(
            lambda: load_tokenizer(folder), str(folder), *mentions, kind=KIND, check=check
        )
    finally:
        os.dup2(saved, 2)
        for descriptor in (saved, write):
            os.close(descriptor)
        with open(read, "rb") as said:
            assert not said.read()


@pytest.mark.parametrize("damage", faulty.BROKEN)
@pytest.mark.parametrize("name", [TOKENIZER, SETTINGS, "generation_config.json"])
def test_a_file_that_is_none(name: str, damage: str, folder: Path, tmp_path: Path) -> None:
    copy = faulty.copy_of(folder, tmp_path / "a")
    faulty.BROKEN[damage](copy / name)
    if damage == "missing":
        said = {TOKENIZER: ("neither",), SETTINGS: (), "generation_config.json": ()}[name]
        loads(copy, *said, expected=None if said else ids(load_tokenizer(copy)))
    else:
        loads(copy, name)


@pytest.mark.parametrize("damage", faulty.BROKEN)
@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "added_tokens.json"])
def test_words_and_merges_that_are_none(name: str, damage: str, words: Path, tmp_path: Path) -> None:
    """Where the control tokens are not known, the plain format cannot end a turn, and says so."""
    copy = faulty.copy_of(words, tmp_path / "a")
    faulty.BROKEN[damage](copy / name)
    content_is_lost = name != "merges.txt" or damage not in ("empty", "blank", "half", "first byte", "twice")
    if content_is_lost:
        loads(copy)


@pytest.mark.parametrize("damage", faulty.BROKEN)
def test_sentencepiece_models_that_are_none(damage: str, pieces: Path, tmp_path: Path) -> None:
    copy = faulty.copy_of(pieces, tmp_path / "a")
    path = copy / "tokenizer.model"
    if damage in ("UTF-16", "not UTF-8", "trailing"):
        path.write_bytes(b"\xff\xfe" + path.read_bytes().hex().encode("utf-16"))
    elif damage == "twice":  # protobufs may be put one after the other: every piece is there twice
        path.write_bytes(path.read_bytes() * 2)
    else:
        faulty.BROKEN[damage](path)
    loads(copy, str(copy))


def test_bits_flipped_in_a_sentencepiece_model(pieces: Path, tmp_path: Path) -> None:
    copy = faulty.copy_of(pieces, tmp_path / "a")
    whole = (copy / "tokenizer.model").read_bytes()
    for rng in faulty.rounds(6, 60):
        (copy / "tokenizer.model").write_bytes(faulty.flip_bits(whole, rng, rng.choice((1, 5, 50))))

        def works(tokenizer: ChatTokenizer) -> bool:
            found = tokenizer.encode_chat(TALK)
            return all(0 <= id_ < tokenizer.vocab_size for id_ in found) and bool(tokenizer.stop_ids)

        faulty.assert_one_sentence(lambda: load_tokenizer(copy), str(copy), kind=KIND, check=works)


# Fields, and those of faulty.WRONG_VALUES under which the ids stay as they are.
UNCHANGED: dict[str, tuple[str, ...]] = {
    "eos_token": ("null", "empty text", "text", "path", "newline", "surrogate", "number as text"),
    "bos_token": ("null", "empty text", "text", "path", "newline", "surrogate", "number as text"),
    "pad_token": ("null", "empty text", "text", "path", "newline", "surrogate", "number as text"),
    "chat_template": ("null", "list"),
    "tokenizer_class": ("null", "empty text", "text", "path", "newline", "surrogate", "number as text"),
    "added_tokens_decoder": ("null", "object"),
    "clean_up_tokenization_spaces": tuple(faulty.WRONG_VALUES),
}


@pytest.mark.parametrize("name", faulty.WRONG_VALUES)
@pytest.mark.parametrize("field", UNCHANGED)
def test_settings_of_the_wrong_type(
    field: str, name: str, folder: Path, right: dict[Path, list[int]], tmp_path: Path
) -> None:
    copy = faulty.copy_of(folder, tmp_path / "a")
    texts = {key: json.dumps(value) for key, value in json.loads((copy / SETTINGS).read_text()).items()}
    texts[field] = faulty.WRONG_VALUES[name]
    (copy / SETTINGS).write_text("{" + ",".join(f'"{key}": {text}' for key, text in texts.items()) + "}")
    if name in ("too long", "deep"):
        loads(copy, SETTINGS)
    else:
        same = right[folder] if name in UNCHANGED[field] else None
        loads(copy, SETTINGS, *(() if field == "chat_template" else (field,)), expected=same)


@pytest.mark.parametrize("name", faulty.WRONG_VALUES)
def test_stops_of_the_wrong_type(name: str, folder: Path, right: dict[Path, list[int]], tmp_path: Path) -> None:
    copy = faulty.copy_of(folder, tmp_path / "a")
    (copy / "generation_config.json").write_text(f'{{"eos_token_id": {faulty.WRONG_VALUES[name]}}}')
    if name in ("null", "list", "zero"):
        assert not loads(copy, expected=right[folder] + [0] * (name == "zero"))
    else:
        loads(copy, "generation_config.json", *(() if name in ("too long", "deep") else ("eos_token_id",)))


@pytest.mark.parametrize("name", faulty.WRONG_VALUES)
@pytest.mark.parametrize("field", ["id", "content", "special"])
def test_added_tokens_of_the_wrong_type(
    field: str, name: str, folder: Path, right: dict[Path, list[int]], tmp_path: Path
) -> None:
    """What the library itself checks is named by it, without the place."""
    copy = faulty.copy_of(folder, tmp_path / "a")
    values = json.loads((copy / TOKENIZER).read_text())
    values["added_tokens"][4][field] = "\ufdd0"
    text = json.dumps(values).replace('"\\ufdd0"', faulty.WRONG_VALUES[name])
    (copy / TOKENIZER).write_text(text)
    kept = field == "special" and name in ("true", "false", "null")  # a control token of a format is one, in any case
    loads(copy, TOKENIZER, expected=right[folder] if kept else None)


def change_model(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], None]:
    return lambda values: change(values["model"]) and None


def part(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.update({name: value})


PARTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no model": (lambda values: values.pop("model") and None, ""),
    "no words": (change_model(lambda model: model.update(vocab={})), ""),
    "a word without an id": (change_model(lambda model: model["vocab"].update(a="x")), ""),
    "a vast id": (change_model(lambda model: model["vocab"].update(a=10**9)), "only"),
    "a negative id": (change_model(lambda model: model["vocab"].update(a=-1)), ""),
    "an id twice": (change_model(lambda model: model["vocab"].update(zz=7)), "the id 7 has two tokens"),
    "another id of a control token": (
        lambda values: values["added_tokens"][4].update(id=99), "'<|eot_id|>' is given two ids, 99 and 4"
    ),
    "an empty control token": (lambda values: values["added_tokens"].append({"id": 400, "content": ""}), "empty"),
    "a merge of unknown words": (change_model(lambda model: model.update(merges=[["qqq", "a"]])), "qqq"),
    "a merge of three": (change_model(lambda model: model.update(merges=[["a", "b", "c"]])), ""),
    "merges that are none": (change_model(lambda model: model.update(merges="a b")), ""),
    "unknown kind of model": (change_model(lambda model: model.update(type="x")), ""),
    "a panic on reading": (
        part("normalizer", {"type": "Precompiled", "precompiled_charsmap": "QQ=="}), "cannot parse precompiled_charsmap"
    ),
    "a panic on other letters": (
        part("normalizer", {"type": "Precompiled", "precompiled_charsmap": ""}), ""
    ),
    "a pattern that is none": (
        part("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}), ""
    ),
    "pretokenizers that are none": (part("pre_tokenizer", {"type": "Sequence", "pretokenizers": 3}), ""),
    "pretokenizer that is a number": (part("pre_tokenizer", 3), ""),
    "words only": (
        part("model", {"type": "WordLevel", "vocab": {token: id_ for id_, token in enumerate(MARKERS)},
                       "unk_token": "<unk>"}),
        "cannot write",
    ),
    "pieces without scores": (part("model", {"type": "Unigram", "unk_id": 0, "vocab": [["a", "b"]]}), ""),
    "unknown piece out of range": (part("model", {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}), ""),
    "no pieces": (part("model", {"type": "Unigram", "unk_id": None, "vocab": []}), ""),
    "unknown decoder": (part("decoder", {"type": "x"}), ""),
    "unknown post-processor": (part("post_processor", {"type": "x"}), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS)
def test_parts_that_do_not_go_together(case: str, folder: Path, tmp_path: Path) -> None:
    copy = faulty.copy_of(folder, tmp_path / "a")
    values = json.loads((copy / TOKENIZER).read_text())
    change, mention = PARTS[case]
    change(values)
    (copy / TOKENIZER).write_text(json.dumps(values))
    assert mention.lower() in loads(copy, TOKENIZER).lower()


def test_mutations(folder: Path, tmp_path: Path) -> None:
    """Whatever is loaded writes control tokens only where the format puts them, with ids that it has."""
    copy = faulty.copy_of(folder, tmp_path / "a")
    values = json.loads((copy / TOKENIZER).read_text())
    vocabulary = values["model"].pop("vocab")
    values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [values["pre_tokenizer"]]}
    values["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "."}]}
    whole = json.dumps(vocabulary)

    def works(tokenizer: ChatTokenizer) -> bool:
        found = tokenizer.encode_chat(TALK)
        tokenizer.pieces()
        controls = [id_ for id_ in found if id_ in range(len(MARKERS))]
        return controls == [0, 2, 3, 4, 2, 3] and max(found) < tokenizer.vocab_size

    for rng in faulty.rounds(7, 100):
        text = faulty.mutate_json(values, rng)
        (copy / TOKENIZER).write_text(text.replace('"merges":', f'"vocab": {whole}, "merges":'))
        faulty.assert_one_sentence(lambda: load_tokenizer(copy), str(copy), kind=KIND, check=works)


def test_a_tokenizer_with_more_ids_than_the_model_is_not_written_with_it(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    faulty.assert_one_sentence(
        lambda: save_pretrained(tiny_model(), tokenizer, tmp_path / "a"), "the model 61", kind=KIND
    )
    assert not (tmp_path / "a").exists()


# Hostile texts


def spelt() -> st.SearchStrategy[str]:
    """Texts made of control tokens, parts of them and what looks like them."""
    names = (*MARKERS, "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<s>", "</s>", "<unk>")
    parts = [part for name in names for part in (name, name[:-1], name[1:], name.upper(), name + " ", "\n" + name)]
    return st.lists(st.one_of(st.sampled_from(parts), st.text(max_size=5)), max_size=8).map("".join)


FORMATS = {
    "llama3": list(MARKERS),
    "qwen2": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]", "<unk>"],
}


@pytest.fixture(scope="module")
def formats(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTokenizer]:
    found = {}
    for name, controls in FORMATS.items():
        copy = faulty.copy_of(folder, tmp_path_factory.mktemp("formats") / name)
        values = json.loads((copy / TOKENIZER).read_text())
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        size = max(values["model"]["vocab"].values())
        values["added_tokens"] += [
            {"id": size + 1 + index, "content": token, **flags}
            for index, token in enumerate(token for token in controls if token not in MARKERS)
        ]
        (copy / TOKENIZER).write_text(json.dumps(values))
        found[name] = load_tokenizer(copy, chat_format=name)
    return found


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(spelt(), min_size=1, max_size=5))
def test_no_text_becomes_a_control_token(name: str, formats: dict[str, ChatTokenizer], texts: list[str]) -> None:
    """The control tokens of a conversation are those of one with harmless texts."""
    faulty.COUNTS["hostile conversations"] += 1
    tokenizer = formats[name]
    special = set(tokenizer.special_ids(*MARKERS, *FORMATS[name])) - set(tokenizer.special_ids("<unk>"))
    roles = ("user", "assistant") * 3

    def controls(contents: list[str]) -> list[int]:
        talk = [{"role": role, "content": content} for role, content in zip(roles, contents)]
        return [id_ for id_ in tokenizer.encode_chat(talk, add_generation_prompt=len(talk) % 2 == 1) if id_ in special]

    assert controls(texts) == controls(["x"] * len(texts))
    assert not special & set(tokenizer.encode_reply(texts[0])[:-1])
