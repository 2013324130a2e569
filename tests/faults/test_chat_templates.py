"""Chat templates: none runs for ever or fills the memory, and what goes wrong is named with the template's file."""

from __future__ import annotations

import json
from pathlib import Path

import faulty
import pytest
from chat_templates import CHATML
from runs import world  # noqa: F401 (a fixture)

from selfevo.models import ChatTokenizer, load_tokenizer

KIND = "chat templates"
TALK = [{"role": "user", "content": "I am sad."}]
# A template of Llama-3's kind, with a place for what is wrong.
TEMPLATE = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>' }}{{ m['content'] }}"
    "{{ '<|eot_id|>' }}{% endfor %}#"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}{% endif %}"
)
LOOP = "{% for i in range(99999) %}"
HOSTILE: dict[str, str] = {
    "nested loops": LOOP * 2 + "{% endfor %}" * 2,
    "five loops": LOOP * 5 + "{% endfor %}" * 5,
    "loops that write": LOOP * 2 + "xxxxxxxxxx{% endfor %}" * 2,
    "loop over a list": "{% set a = range(99999) | list %}{% for i in a %}{% for j in a %}{% endfor %}{% endfor %}",
    "loop of its own": "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "broad loop of its own": "{% for i in range(999) recursive %}"
    "{% if loop.depth < 9 %}{{ loop(range(999)) }}{% endif %}{% endfor %}",
    "with a length": "{% for i in range(99999) %}{% for j in range(99999) %}{{ loop.length }}{% endfor %}{% endfor %}",
    "macro that calls itself": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "doubling": "{% set ns = namespace(x='xx') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling by joining": "{% set ns = namespace(x='xx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}",
    "doubling of a block": "{% set ns = namespace(x='xx') %}{% for i in range(60) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}"
    "{% endset %}{% endfor %}",
    "doubling of a list": "{% set ns = namespace(x=[1, 2]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}",
    "a long text": "{% set x = 'x' * 9999999999 %}",
    "a long list": "{% set x = [0] * 9999999999 %}",
    "many long texts": LOOP + "{% set x = 'x' * 999999 %}{% endfor %}",
    "a large power": "{% set x = 10 ** 10 ** 10 %}",
    "a power of powers": "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x ** 9 %}{% endfor %}",
    "a wide format": "{{ '%9999999999d' % 1 }}",
    "a wide format by a filter": "{{ '%9999999999d' | format(1) }}",
    "a wide format by a method": "{{ '{:>9999999999}'.format(1) }}",
    "centred": "{{ 'x' | center(9999999999) }}",
    "justified": "{{ 'x'.ljust(9999999999) }}",
    "indented": "{{ 'x\n' | indent(9999999999) }}",
    "in batches": "{{ [1] | batch(9999999999, 0) | list }}",
    "much Latin": "{{ lipsum(9999999) }}",
    "a long range": "{% for i in range(9999999999) %}{% endfor %}",
    "insides": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a file": "{% include '/etc/passwd' %}",
    "another template": "{% extends 'x' %}",
    "change of the messages": "{{ messages.append(messages[0]) }}",
    "division by zero": "{{ 1 / 0 }}",
    "unknown name": "{{ nothing.of.it }}",
    "unknown filter": "{{ 'x' | shout }}",
    "unknown key": "{{ messages[99]['content'] }}",
    "wrong types": "{{ 1 + 'x' }}",
    "an error of its own": "{{ raise_exception('not\nthis') }}",
    "unclosed": "{% for m in messages %}",
    "unopened": "{% endfor %}",
    "unfinished": "{{ ",
    "no tag": "{% frobnicate %}",
    "deep brackets": "{{ " + "(" * 10**4 + "1" + ")" * 10**4 + " }}",
    "deep lists": "{{ " + "[" * 10**4 + "]" * 10**4 + " }}",
    "deep conditions": "{% if true %}" * 3000 + "{% endif %}" * 3000,
    "deep loops": "{% for m in messages %}" * 100 + "{% endfor %}" * 100,
    "deep negation": "{{ " + "not " * 10**4 + "1 }}",
    "many braces": "{" * 10**4,
    "content twice": "{{ messages[0]['content'] }}",
    "content of a secret": "{{ messages | tojson }}",
}
WHOLE: dict[str, str] = {
    "empty": "",
    "blank": " \n",
    "only text": "hello",
    "no content": "{% for m in messages %}{{ m['role'] }}{% endfor %}",
    "upper case": TEMPLATE.replace("m['content']", "m['content'] | upper"),
    "reversed": TEMPLATE.replace("m['content']", "m['content'] | reverse"),
    "cut": TEMPLATE.replace("m['content']", "m['content'][:9]"),
    "no end": TEMPLATE.replace("{{ '<|eot_id|>' }}", ""),
    "another prompt": TEMPLATE.replace("assistant<|end", "model<|end"),
    "prompt for good": TEMPLATE.replace("{% if add_generation_prompt %}", "{% if true %}"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    target = tmp_path_factory.mktemp("template") / "a"
    target.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((world / "backbone" / name).read_bytes())
    return target


def loads(folder: Path, template: str, place: str) -> str:
    if place == "chat_template.jinja":
        (folder / place).write_text(template, encoding="utf-8")
    else:
        settings = json.loads((folder / place).read_text())
        (folder / place).write_text(json.dumps(settings | {"chat_template": template}))
    return faulty.assert_one_sentence(lambda: load_tokenizer(folder), str(folder / place), kind=KIND)


@pytest.mark.parametrize("case", HOSTILE)
def test_what_a_template_may_not_do(case: str, folder: Path, tmp_path: Path) -> None:
    copy = faulty.copy_of(folder, tmp_path / "a")
    loads(copy, TEMPLATE.replace("#", HOSTILE[case]), "chat_template.jinja")


@pytest.mark.parametrize("case", WHOLE)
def test_what_a_template_has_to_do(case: str, folder: Path, tmp_path: Path) -> None:
    loads(faulty.copy_of(folder, tmp_path / "a"), WHOLE[case], "tokenizer_config.json")


@pytest.mark.parametrize("damage", sorted(set(faulty.BROKEN) - {"missing"}))
def test_a_template_that_is_no_text(damage: str, folder: Path, tmp_path: Path) -> None:
    copy = faulty.copy_of(folder, tmp_path / "a")
    path = copy / "chat_template.jinja"
    path.write_text(TEMPLATE)
    faulty.BROKEN[damage](path)
    faulty.assert_one_sentence(
        lambda: load_tokenizer(copy), str(path), kind=KIND,
        check=lambda tokenizer: damage == "trailing" and tokenizer.encode_chat(TALK),
    )  # fmt: skip


def test_a_template_that_goes_wrong_later_is_named_then(folder: Path, tmp_path: Path) -> None:
    """By what it is asked to write, and not before."""
    for number, wrong in enumerate(
        ("{{ 1 / 0 }}", HOSTILE["five loops"], HOSTILE["macro that calls itself"], "x" * 50)
    ):
        copy = faulty.copy_of(folder, tmp_path / "a")
        late = "{% if messages | length > 3 %}" + wrong + "{% endif %}"
        late = late if number < 3 else "{% if messages | length > 3 %}{{ messages[0]['content'] }}{% endif %}"
        (copy / "chat_template.jinja").write_text(TEMPLATE.replace("#", late))
        tokenizer = load_tokenizer(copy)
        assert tokenizer.encode_chat(TALK)
        faulty.assert_one_sentence(
            lambda: tokenizer.encode_chat(TALK * 4), str(copy / "chat_template.jinja"), kind=KIND  # noqa: B023
        )  # fmt: skip


def test_a_long_conversation_is_within_the_bounds(folder: Path, tmp_path: Path) -> None:
    """800 turns, each of 2,000 characters, in published templates and our own."""
    talk = [{"role": role, "content": "word " * 400} for role in ("user", "assistant") * 400]
    for template in (TEMPLATE.replace("#", ""), CHATML.replace("<|im_start|>", "<|start_header_id|>")):
        copy = faulty.copy_of(folder, tmp_path / "a")
        (copy / "chat_template.jinja").write_text(template.replace("<|im_end|>", "<|eot_id|>"))
        tokenizer: ChatTokenizer = load_tokenizer(copy)
        assert tokenizer.format_name == "template"
        assert len(tokenizer.encode_chat(talk)) > 800 * 400
