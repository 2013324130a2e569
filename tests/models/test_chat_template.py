"""A checkpoint's own template: the ids of transformers, contents that stay text, and what is refused.

The templates write the formats of Qwen2.5 and Hermes (ChatML), Llama-3.1 and 3.2, TinyLlama and Zephyr, and Mistral.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, LLAMA31, MISTRAL, ZEPHYR
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from selfevo.models import ChatTokenizer, TokenizerError, load_tokenizer, save_pretrained
from selfevo.models.chat import ChatError
from selfevo.models.chat_template import TemplateChat

CASES = {
    "chatml": ("qwen2", CHATML), "llama-3.1": ("llama3", LLAMA31), "zephyr": ("mistral-v0.3", ZEPHYR),
    "mistral": ("mistral-v0.3", MISTRAL),
}  # fmt: skip
TALK = [
    {"role": "user", "content": "I lost my job."},
    {"role": "assistant", "content": "That is hard.\nWhat happened?"},
    {"role": "user", "content": " They said 2,000 of us … are too many "},
    {"role": "assistant", "content": "Très dur 😔"},
    {"role": "user", "content": "Yes"},
]


def with_template(shared: Path, folder: Path, name: str, template: str, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared / "tokenizers" / name / file, folder / file)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template} | changes))
    return folder


@pytest.fixture(scope="module")
def folders(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("templates")
    return {case: with_template(shared, root / case, *CASES[case]) for case in CASES}


@pytest.fixture(scope="module")
def tokenizers(folders: dict[str, Path]) -> dict[str, ChatTokenizer]:
    return {case: load_tokenizer(folder) for case, folder in folders.items()}


@functools.cache
def reference(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def theirs(folder: Path, messages: list[dict[str, str]], add_generation_prompt: bool) -> list[int]:
    tokenizer = reference(folder)
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt, date_string="26 Jul 2024"
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_transformers(
    folders: dict[str, Path], tokenizers: dict[str, ChatTokenizer], case: str
) -> None:
    tokenizer = tokenizers[case]
    assert tokenizer.format_name == "template"
    system = [] if case == "mistral" else [{"role": "system", "content": "Be kind. "}]
    for start in ([], system):
        for count in (1, 3, 5):
            messages = start + TALK[:count]
            assert tokenizer.encode_chat(messages) == theirs(folders[case], messages, True), (start, count)
        whole = start + TALK[:4]
        assert tokenizer.encode_chat(whole, add_generation_prompt=False) == theirs(folders[case], whole, False)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=40, deadline=None)
@given(text=st.text(st.sampled_from("ab \n\té.,5"), max_size=12))
def test_a_reply_has_the_same_ids_in_history_as_after_its_prompt(
    tokenizers: dict[str, ChatTokenizer], case: str, text: str
) -> None:
    tokenizer = tokenizers[case]
    messages = [*TALK[:3], {"role": "assistant", "content": text}]
    reply = tokenizer.encode_reply(text)
    sequence = tokenizer.encode_chat(messages[:3]) + reply
    assert tokenizer.encode_chat(messages, add_generation_prompt=False)[: len(sequence)] == sequence
    assert reply[-1] == tokenizer.stop_ids[0]


@pytest.mark.parametrize("case", CASES)
def test_no_content_becomes_a_control_token(tokenizers: dict[str, ChatTokenizer], case: str) -> None:
    tokenizer = tokenizers[case]
    special = list(tokenizer._backend.special)
    plain = tokenizer.encode_chat([{"role": "user", "content": "x"}])
    controls = set(tokenizer._backend.special.values())
    for attack in (*special[:20], "".join(special[:40]), "{{ bos_token }}{% endfor %}", "\ue0000\ue001"):
        ids = tokenizer.encode_chat([{"role": "user", "content": f"x {attack} y"}])
        assert [i for i in ids if i in controls] == [i for i in plain if i in controls], attack


def test_stops_are_the_templates_those_of_generation_config_and_the_eos(shared: Path, tmp_path: Path) -> None:
    folder = with_template(shared, tmp_path / "a", "llama3", LLAMA31, eos_token="<|end_of_text|>")
    assert load_tokenizer(folder).stop_ids == (128009, 128001)
    (folder / "generation_config.json").write_text('{"eos_token_id": [128008, 128009]}')
    assert load_tokenizer(folder).stop_ids == (128009, 128008, 128001)


def test_a_later_system_message_works_where_the_template_writes_it(tokenizers: dict[str, ChatTokenizer]) -> None:
    messages = [TALK[0], {"role": "system", "content": "Be brief."}]
    assert tokenizers["chatml"].encode("Be brief.")[0] in tokenizers["chatml"].encode_chat(messages)
    with pytest.raises(ChatError, match="cannot write these messages: user and assistant take turns"):
        tokenizers["mistral"].encode_chat([TALK[0], TALK[2]])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", "leaves out or alters the content"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}<|im_end|>{% endfor %}", "leaves out or alters"),
        ("{% for m in messages %}{{ m.content[:3] }}<|im_end|>{% endfor %}", "leaves out or alters the content"),
        ("{% for m in messages %}{{ m.content }}{% endfor", "not valid Jinja"),
        ("{{ messages[0].content.__class__.__mro__ }}", "cannot write these messages"),
        ("{{ messages.clear() }}", "cannot write these messages"),
        ("{{ raise_exception('no') }}", "cannot write these messages: no"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "does not end with a control token"),
        (
            "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>think{% endif %}",
            "does not begin as its generation prompt does",
        ),
    ],
)
def test_templates_that_cannot_be_used_are_refused_with_the_reason(
    tokenizers: dict[str, ChatTokenizer], template: str, reason: str
) -> None:
    with pytest.raises(ChatError, match=reason):
        TemplateChat(template, {"eos_token": "<|im_end|>"}, tokenizers["chatml"]._backend.special)


def test_the_refusal_names_the_flag_that_helps(shared: Path, tmp_path: Path) -> None:
    folder = with_template(shared, tmp_path / "a", "qwen2", "{{ raise_exception('no') }}")
    with pytest.raises(TokenizerError, match=r"cannot be used \(.*: no\); --chat-format qwen2, plain forces another"):
        load_tokenizer(folder)
    assert load_tokenizer(folder, chat_format="qwen2").format_name == "qwen2"


def test_our_coded_formats_give_the_ids_of_the_published_templates(shared: Path) -> None:
    for name in ("llama3", "qwen2", "mistral-v0.3"):
        coded = load_tokenizer(shared / "tokenizers" / name)
        config = json.loads((shared / "tokenizers" / name / "tokenizer_config.json").read_text())
        named = {key: config[key] for key in ("bos_token", "eos_token") if isinstance(config.get(key), str)}
        own = TemplateChat(config["chat_template"], named, coded._backend.special)
        rendered = ChatTokenizer(coded._backend, own)
        for messages in (TALK[:1], TALK[:3], [{"role": "system", "content": "Be kind."}, *TALK]):
            assert rendered.encode_chat(messages) == coded.encode_chat(messages), name
        assert rendered.encode_reply("That is hard.") == coded.encode_reply("That is hard.")


@pytest.mark.parametrize("source", ["llama3", "qwen2", "mistral-v0.3", "plain", "embedded"])
def test_an_export_chats_in_transformers_in_the_format_trained_on(shared: Path, tmp_path: Path, source: str) -> None:
    folder = shared / "tokenizers" / ("qwen2" if source == "plain" else source)
    if source == "embedded":
        folder = Path(__file__).resolve().parents[2] / "examples" / "embedded" / "backbone"
    (tmp_path / "in").mkdir()
    for path in folder.iterdir():
        if "tokenizer" in path.name:
            shutil.copyfile(path, tmp_path / "in" / path.name)
    path = tmp_path / "in" / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    ours = load_tokenizer(tmp_path / "in", chat_format="plain" if source == "plain" else None)
    save_pretrained(tiny_model(vocab_size=ours.vocab_size), ours, tmp_path / "out")
    for messages in (TALK[:1], TALK[:3], [{"role": "system", "content": "Be kind."}, *TALK]):
        assert theirs(tmp_path / "out", messages, True) == ours.encode_chat(messages)
    again = load_tokenizer(tmp_path / "out")
    assert again.encode_chat(TALK) == ours.encode_chat(TALK)
    assert again.encode_reply("That is hard.") == ours.encode_reply("That is hard.")
    assert again.stop_ids == ours.stop_ids
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == list(ours.stop_ids)
    assert settings.get("bos_token_id") == json.loads((tmp_path / "out" / "config.json").read_text()).get(
        "bos_token_id"
    )


def test_vocab_and_merges_give_the_ids_of_the_tokenizer_json(shared: Path, tmp_path: Path) -> None:
    whole = json.loads((shared / "tokenizers" / "qwen2" / "tokenizer.json").read_text())
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["model"]["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    added = {token["content"]: token["id"] for token in whole["added_tokens"]}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, reference = load_tokenizer(tmp_path), load_tokenizer(shared / "tokenizers" / "qwen2")
    assert ours.vocab_size == reference.vocab_size
    for entry in json.loads((shared / "reference" / "plain_ids.json").read_text()):
        assert ours.encode(entry["text"]) == entry["qwen2"]
    assert ours.encode_chat(TALK) == reference.encode_chat(TALK)


def test_ids_beyond_the_vocabulary_are_decoded_as_nothing(shared: Path, tmp_path: Path) -> None:
    shutil.copyfile(shared / "tokenizers" / "mistral-v0.3" / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": 32768, "<|im_end|>": 32770}')
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 32771  # the largest id counts, not the number of ids
    ids = tokenizer.encode_chat(TALK[:1])
    assert (ids[0], ids.count(32770)) == (32768, 2)
    assert tokenizer.stop_ids == (32770, 2)
    assert tokenizer.decode([*tokenizer.encode("Hello"), 32769, 40000]) == "Hello"
    fast = load_tokenizer(shared / "tokenizers" / "qwen2")
    assert fast.decode([*fast.encode("Hello"), 152000]) == "Hello"
