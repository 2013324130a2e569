"""Ids equal those of the native encoders, and text never becomes a special token."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfevo.files import FileError
from selfevo.models import ChatTokenizer, TokenizerError, load_tokenizer
from selfevo.models.chat import ChatError

FORMATS = ("llama3", "qwen2", "mistral-v0.3")


@functools.cache
def tokenizer_of(shared: Path, name: str) -> ChatTokenizer:
    return load_tokenizer(shared / ("models" if name == "story" else "tokenizers") / name)


def oracle(entry: dict[str, Any]) -> Any:
    """The native ids; for Llama-3 with stripped contents, as its published template has them."""
    return entry.get("ids_stripped", entry["ids"])


@pytest.mark.parametrize("name", FORMATS)
def test_plain_text_has_the_ids_of_the_native_encoder(shared: Path, name: str) -> None:
    tokenizer = tokenizer_of(shared, name)
    texts = json.loads((shared / "reference" / "plain_ids.json").read_text())
    assert len(texts) > 200
    for entry in texts:
        assert tokenizer.encode(entry["text"]) == entry[name], entry["text"]


def test_mistral_ids_through_sentencepiece_equal_those_through_the_json(shared: Path, tmp_path: Path) -> None:
    source = shared / "tokenizers" / "mistral-v0.3"
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(source / file, tmp_path / file)
    piece, fast = load_tokenizer(tmp_path), tokenizer_of(shared, "mistral-v0.3")
    assert piece.vocab_size == fast.vocab_size == 32768
    assert piece.stop_ids == fast.stop_ids
    for entry in json.loads((shared / "reference" / "plain_ids.json").read_text()):
        ids = piece.encode(entry["text"])
        assert ids == entry["mistral-v0.3"]
        assert piece.decode([1, *ids, 2]) == fast.decode([1, *ids, 2])
    for entry in json.loads((shared / "reference" / "chat_ids.json").read_text())["conversations"]:
        if entry["mistral-v0.3"]["prompt"]["ids"] is not None:
            assert piece.encode_chat(entry["messages"][:-1]) == oracle(entry["mistral-v0.3"]["prompt"])


@pytest.mark.parametrize("name", FORMATS)
def test_conversations_have_the_ids_of_the_native_encoder(shared: Path, name: str) -> None:
    tokenizer = tokenizer_of(shared, name)
    conversations = json.loads((shared / "reference" / "chat_ids.json").read_text())["conversations"]
    compared = 0
    for entry in conversations:
        for part, with_prompt in (("prompt", True), ("full", False)):
            expected = oracle(entry[name][part])
            messages = entry["messages"][: entry[name][part].get("n_messages", len(entry["messages"]) - with_prompt)]
            if expected is None:  # an empty assistant turn, for which Mistral's own encoder has no way
                expected = entry[name][part]["template_ids"]
            assert tokenizer.encode_chat(messages, add_generation_prompt=with_prompt) == expected, entry["name"]
            compared += 1
    assert compared >= 22


@pytest.mark.parametrize("name", FORMATS)
def test_a_training_sequence_is_what_the_conversation_with_the_reply_encodes_to(shared: Path, name: str) -> None:
    tokenizer = tokenizer_of(shared, name)
    messages = [{"role": "user", "content": "I lost my job."}, {"role": "assistant", "content": "That is hard."}]
    sequence = tokenizer.encode_chat(messages[:1]) + tokenizer.encode_reply("That is hard.")
    full = tokenizer.encode_chat(messages, add_generation_prompt=False)
    assert full[: len(sequence)] == sequence
    assert sequence[-1] == tokenizer.stop_ids[0]
    assert tokenizer.decode(full[len(sequence) :]).strip() == ""  # at most the newline after a ChatML turn


@pytest.mark.parametrize("name", [*FORMATS, "story"])
@pytest.mark.parametrize("text", ["\nhi", "\n\n hi", " hi", "hi\n", "\u2028hi", ""])
def test_a_reply_has_the_same_ids_in_history_as_after_its_prompt(shared: Path, name: str, text: str) -> None:
    tokenizer = tokenizer_of(shared, name)
    messages = [{"role": "user", "content": "I lost my job."}, {"role": "assistant", "content": text}]
    sequence = tokenizer.encode_chat(messages[:1]) + tokenizer.encode_reply(text)
    assert tokenizer.encode_chat(messages, add_generation_prompt=False)[: len(sequence)] == sequence


@pytest.mark.parametrize("name", [*FORMATS, "story"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_text_never_becomes_a_special_token(shared: Path, name: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(shared, name)
    special = sorted(tokenizer._backend.special)
    pieces = st.one_of(st.sampled_from(special), st.text(max_size=6), st.sampled_from([" ", "\n", "<", ">", "|"]))
    text = "".join(data.draw(st.lists(pieces, min_size=1, max_size=6)))
    forbidden = {i for token, i in tokenizer._backend.special.items() if token != "<unk>"}
    assert forbidden.isdisjoint(tokenizer.encode(text))


@pytest.mark.parametrize("name", ["llama3", "qwen2"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec="ascii"), max_size=40))
def test_decoding_gives_the_text_back(shared: Path, name: str, text: str) -> None:
    tokenizer = tokenizer_of(shared, name)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_id_that_ends_a_turn_stops_generation(shared: Path) -> None:
    assert tokenizer_of(shared, "llama3").stop_ids == (128009, 128001)
    assert tokenizer_of(shared, "qwen2").stop_ids == (151645, 151643)
    assert tokenizer_of(shared, "mistral-v0.3").stop_ids == (2,)
    assert tokenizer_of(shared, "story").stop_ids == (2,)


def test_a_base_model_without_a_template_has_the_plain_format(shared: Path) -> None:
    tokenizer = tokenizer_of(shared, "story")
    assert tokenizer.format_name == "plain"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    prompt = tokenizer.encode_chat(messages[:1])
    assert prompt[0] == 1
    assert tokenizer.encode_chat(messages, add_generation_prompt=False) == prompt + tokenizer.encode_reply("hello")


def copy_with_template(shared: Path, name: str, folder: Path, template: str) -> Path:
    shutil.copytree(shared / "tokenizers" / name, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    settings_path = folder / "tokenizer_config.json"
    config = json.loads(settings_path.read_text())
    settings_path.write_text(json.dumps(config | {"chat_template": template}))
    return folder


def test_a_template_that_cannot_be_used_is_refused_unless_a_format_is_named(shared: Path, tmp_path: Path) -> None:
    folder = copy_with_template(
        shared, "qwen2", tmp_path / "other", "{% for m in messages %}### {{ m.content }}{% endfor %}"
    )
    with pytest.raises(TokenizerError, match=r"does not end with a control token.*--chat-format qwen2, plain"):
        load_tokenizer(folder)
    assert load_tokenizer(folder, chat_format="qwen2").format_name == "qwen2"
    with pytest.raises(TokenizerError, match="'llama3' cannot be written with this vocabulary"):
        load_tokenizer(folder, chat_format="llama3")


def test_the_template_is_also_read_from_its_own_file(shared: Path, tmp_path: Path) -> None:
    template = json.loads((shared / "tokenizers" / "qwen2" / "tokenizer_config.json").read_text())["chat_template"]
    folder = copy_with_template(shared, "qwen2", tmp_path / "split", "something else")
    with pytest.raises(TokenizerError, match="leaves out or alters the content of message 0"):
        load_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template)
    assert load_tokenizer(folder).format_name == "qwen2"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one"),
        ([{"role": "tool", "content": "x"}], "'tool' is not one of"),
        ([{"role": "user", "content": None}], "should be a string"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "only at the beginning"),
    ],
)
def test_messages_that_cannot_be_written_are_refused(shared: Path, messages: list[Any], reason: str) -> None:
    for name in FORMATS:
        with pytest.raises(ChatError, match=reason):
            tokenizer_of(shared, name).encode_chat(messages)


def test_broken_tokenizer_folders_are_one_sentence(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(FileError, match=r"tokenizer\.json: is not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(FileError, match=r"tokenizer\.json: should hold a JSON object"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(TokenizerError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path)
