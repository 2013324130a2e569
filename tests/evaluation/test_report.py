"""The report of a run: a whole, valid, self-contained page that shows what is there and escapes what models wrote."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import tiny_model

from selfevo.datasets import Pair
from selfevo.datasets.prompts import reply_prompt
from selfevo.dialogue import Example, to_messages
from selfevo.evaluation.folder import read_examples, read_replies, stage_order, write_examples
from selfevo.evaluation.report import add_table, write_report
from selfevo.evaluation.report.analysis import TfIdf
from selfevo.evaluation.report.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    TEXT,
    phrases_figure,
    training_figures,
)
from selfevo.evaluation.report.samples import telling_case
from selfevo.evaluation.score import score_answers
from selfevo.evolve import BackboneSettings, DataSettings, EvolveConfig, read_corpus
from selfevo.evolve.run_folder import open_run
from selfevo.files import read_json, read_jsonl, write_json, write_jsonl
from selfevo.generate import Reply
from selfevo.models import save_pretrained

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "report.py"
ATTACK = "<script>alert('x')</script> & \"so\" </div>"
VOID = {"meta", "img"}
SVG = "data:image/svg+xml;base64,"


class Page(HTMLParser):
    """The elements of a page in order, its text, and what is wrong with its nesting."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.wrong: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.wrong.append(f"<{tag}/>")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    @property
    def content(self) -> str:
        return "".join(self.text)


def dialogue(number: int) -> dict[str, Any]:
    said = []
    for turn in range(5):
        said.append({"speaker": "seeker", "annotation": {}, "content": f"User {number} says {turn} {ATTACK}"})
        said.append({"speaker": "supporter", "annotation": {"strategy": "Question"}, "content": f"Why {turn}?"})
    return {"dialog": said, "emotion_type": "sadness", "problem_type": "job", "situation": "s"}


def metrics(stage: str) -> list[dict[str, Any]]:
    names = ["loss"] if stage == "M0" else ["loss", "dpo", "sft", "accuracy", "chosen_reward", "rejected_reward"]
    names += [] if stage == "M0" else ["chosen_logp_per_token", "rejected_logp_per_token"]
    records: list[dict[str, Any]] = []
    for step in range(12):
        values = {name: 1 / (step + 1 + index) for index, name in enumerate(names)}
        records.append({"step": step, **values, "seconds": 0.5} | ({"held_out": values} if step % 4 == 3 else {}))
    return records


def write_stage(run: Path, stage: str, examples: list[Example]) -> None:
    """A stage as the loop leaves it; M0's replies are shorter than those of the others."""
    write_jsonl(run / stage / "metrics.jsonl", metrics(stage))
    more = "" if stage == "M0" else " How is that for you?"
    texts = [f"{stage} answers {index}: I hear you {ATTACK}{more}" for index in range(len(examples))]
    replies = [{"index": index, **vars(Reply(text))} for index, text in enumerate(texts)]
    write_jsonl(run / "eval" / f"{stage}.replies.jsonl", replies)
    score_answers(run / "eval", stage)
    if stage == "M0":
        return
    thought = {"understanding": {"profile": ATTACK, "emotion": "fear"}, "score": 2, "feedback": "vague", "refined": "x"}
    pairs = [
        Pair(f"d{i}#1", f"d{i}", reply_prompt(to_messages(one.context), "Kind."), f"User {i} {ATTACK}", "No.", "Why?",
             "refined", thought) for i, one in enumerate(examples)
    ]  # fmt: skip
    write_jsonl(run / stage / "pairs.jsonl", [pair.as_record() for pair in pairs])
    write_json(run / stage / "filter.json", {"examples": 9, "kept_refined": len(pairs)})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for name, count in (("human.json", 10), ("test.json", 8)):
        (folder / name).write_text(json.dumps([dialogue(number) for number in range(count)]))
    data = DataSettings(str(folder / "human.json"), str(folder / "test.json"))
    config = EvolveConfig(
        backbone=BackboneSettings(str(folder / "backbone" / "tiny")), data=data, out=str(folder / "run")
    )
    save_pretrained(tiny_model(), None, folder / "backbone" / "tiny")
    with open_run(config) as run:
        corpus = read_corpus(config)
        write_json(run / "data.json", corpus.report())
        write_examples(run / "eval", corpus.test)
        for stage in ("M0", "M1", "M2"):
            write_stage(run, stage, corpus.test)
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture(scope="module")
def html(made: Path) -> str:
    """The page of a whole run."""
    return write_report(made).read_text(encoding="utf-8")


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def read_page(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def drawings(page: Page) -> list[str]:
    """The SVG of every image of a page."""
    sources = [str(attributes["src"]) for attributes in page.tags("img")]
    assert all(source.startswith(SVG) for source in sources)
    return [base64.b64decode(source.removeprefix(SVG), validate=True).decode() for source in sources]


def headings(page: Page) -> list[str]:
    names = ["scores", "more-scores", "one-case", "judge", "training", "preference-pairs", "phrases"]
    names += ["replies-side-by-side"]
    names += ["from-reply-to-refinement", "data", "settings"]
    found = [str(attributes["id"]) for attributes in page.tags("h2")]
    assert set(found) <= set(names)
    return found


def test_a_whole_run_gives_every_section_and_every_figure(html: str) -> None:
    found = Page(html)
    assert headings(found) == [
        "scores", "one-case", "training", "preference-pairs", "phrases", "replies-side-by-side",
        "from-reply-to-refinement", "data", "settings",
    ]  # fmt: skip
    assert len(found.tags("img")) == 1 + 4 + 4 + 2 + 2
    assert len(found.tags("figure")) == len(found.tags("figcaption")) == len(found.tags("img"))
    assert "unfinished" not in found.content


def test_the_page_is_well_formed_and_needs_nothing_else(html: str) -> None:
    found = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert not found.wrong
    assert not found.open
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in found.elements}
    for tag, attributes in found.elements:
        for name, value in attributes.items():
            if (tag, name) != ("img", "src"):
                assert not re.search(r"https?:|//|data:|@import", value or ""), (tag, name, value)
            assert not name.startswith("on")
    assert not re.search(r"@import|url\(", str(re.search("<style>(.*?)</style>", html, re.DOTALL)))


def references(elements: list[tuple[str, dict[str, Any]]]) -> set[str]:
    """What the attributes of a document refer to; its ids are unique, and each reference finds one of them."""
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set()
    for _, attributes in elements:
        for name, value in attributes.items():
            if name.endswith("href"):
                assert value.startswith("#")
                used.add(value[1:])
            used |= set(re.findall(r"url\(#(.*?)\)", value or ""))
            assert len(re.findall(r"url\(", value or "")) == len(re.findall(r"url\(#", value or ""))
    assert used <= set(ids)
    return used


def test_ids_are_unique_and_every_reference_finds_its_target(html: str) -> None:
    found = Page(html)
    assert references(found.elements) == set(headings(found))
    for drawing in drawings(found):
        root = ElementTree.fromstring(drawing)
        assert references([(element.tag, element.attrib) for element in root.iter()])
        assert "script" not in {element.tag.rpartition("}")[2] for element in root.iter()}
        assert "@import" not in drawing


def test_the_page_can_be_read_without_looking(html: str) -> None:
    found = Page(html)
    assert found.tags("html")[0]["lang"] == "en"
    assert len(found.tags("h1")) == 1
    levels = [int(tag[1]) for tag, _ in found.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(next_one <= level + 1 for level, next_one in pairwise(levels))
    for drawing in found.tags("img"):
        assert drawing["alt"]
    for box in found.tags("div"):
        if box.get("class") == "scroll":
            assert box["aria-label"]
            assert box["tabindex"] == "0"
    assert all(cell["scope"] in ("col", "row") for cell in found.tags("th"))


def test_what_users_and_models_wrote_is_text_and_never_markup(html: str) -> None:
    found = Page(html)
    assert not found.tags("script")
    assert re.search(rf"M2 answers \d+: I hear you {re.escape(ATTACK)}", found.content)  # as it was written
    assert re.search(rf"User \d+ says \d+ {re.escape(ATTACK)}", found.content)
    assert found.content.count(f"profile{ATTACK}") == 2


def test_the_same_run_gives_the_same_page(made: Path, html: str) -> None:
    assert write_report(made).read_text(encoding="utf-8") == html


def row(found: Page, model: str) -> str:
    """The text of a model's row in the first table."""
    return found.content.split("(corpus)Length")[1].split(model)[1].split("M")[0]


@pytest.mark.usefixtures("no_figures")
def test_a_cell_has_the_value_its_change_and_its_interval_and_a_star_for_a_proven_change(run: Path) -> None:
    scores = {stage: read_json(run / "eval" / f"{stage}.json")["scores"]["Length"] for stage in ("M0", "M1", "M2")}
    found = read_page(run)
    for stage, compared in (("M0", False), ("M1", True), ("M2", True)):
        value, (low, high) = scores[stage]["value"], scores[stage]["interval"]
        change = f"{100 * (value / scores['M0']['value'] - 1):+.2f} % *" if compared else ""
        assert f"{value:.2f}{change}{low:.2f} to {high:.2f}" in row(found, stage)
    assert scores["M1"]["signature"] in found.content
    assert "its change against M0 in %" in found.content
    beside = Page(write_report(run, baseline="M2").read_text(encoding="utf-8"))
    assert "+0.00 %32.00 to" in row(beside, "M1")  # no star: nothing differs
    assert "%32.00 to" not in row(beside, "M2")
    (run / "eval" / "M0.values.jsonl").unlink()  # nothing left to test with
    assert " *" not in row(read_page(run), "M1")


@pytest.mark.usefixtures("no_figures")
def test_another_convention_has_a_table_of_its_own(run: Path) -> None:
    report = {"model": "M0", "replies": 3, "scores": {"F1": {"value": 12.5, "signature": "f1|tok:other"}}}
    write_json(run / "eval" / "M0.esconv.json", report)
    write_json(run / "eval" / "scores.json", {"M0": {"BLEU-2": 1.0}})
    found = read_page(run).content
    assert found.index("(convention: paper)") < found.index("(convention: esconv)")
    assert found.count("(convention: ") == 2
    assert "modelF1M012.50" in found


@pytest.mark.usefixtures("no_figures")
def test_a_judges_scores_are_shown_with_what_went_wrong(run: Path) -> None:
    judged = {"judge": "a <judge>", "answered": 11, "failures": {"no JSON": 2, "refused": 0}}
    judged["scores"] = {"Empathy": {"mean": 3.25, "interval": [3, 3.5]}}
    write_json(run / "eval" / "M1.judge.json", judged)
    found = read_page(run)
    assert headings(found)[:3] == ["scores", "one-case", "judge"]
    assert "by the judge a <judge>" in found.content
    assert "M13.253.00 to 3.5011no JSON 2" in found.content


@pytest.mark.usefixtures("no_figures")
def test_an_unfinished_run_is_reported_as_far_as_it_is(run: Path) -> None:
    for stage in ("M1", "M2"):
        shutil.rmtree(run / stage)
    shutil.rmtree(run / "eval")
    found = read_page(run)
    assert headings(found) == ["training", "data", "settings"]
    assert "This run is unfinished: M0, M1, M2 not scored yet; there is a folder of M0." in found.content
    shutil.rmtree(run / "M0")
    (run / "data.json").unlink()
    found = read_page(run)
    assert headings(found) == ["settings"]
    assert "no stage has begun" in found.content


@pytest.mark.usefixtures("no_figures")
def test_a_run_of_decoupled_esc_has_its_page(run: Path) -> None:
    config = read_json(run / "config.json")
    del config["settings"]["iterations"], config["settings"]["chosen"], config["settings"]["control"]
    config["settings"]["planning"] = "likeliest"
    write_json(run / "config.json", config)
    for old, new in (("M0", "joint-sft"), ("M1", "planner-dpo"), ("M2", "generator-dpo")):
        (run / old).rename(run / new)
    for stage in ("M0", "M1", "M2"):
        (run / "eval" / f"{stage}.json").unlink()
    (run / "eval" / "M0.replies.jsonl").rename(run / "eval" / "joint-sft.replies.jsonl")
    strategies = {"majority": {"accuracy": 27.4}, "planner-dpo": {"accuracy": 62.7, "bias": 1.35}}
    write_json(run / "eval" / "scores.json", {"strategies": strategies, "replies": {"joint-sft": {"F1": 1.5}}})
    write_json(run / "data.json", {"turns": {"train": 9}, "statistics": {}, "rules": {}})
    found = read_page(run)
    assert "Decoupled ESC: backbone" in found.content
    assert "majority27.40–\nplanner-dpo62.701.35" in found.content
    assert headings(found)[0] == "more-scores"
    assert "turns, train9" in found.content
    assert not found.wrong


def test_tables_of_other_commands_are_shown_and_replaced_by_name(run: Path) -> None:
    add_table(run / "eval", "abilities", "Abilities.", {"M0": {"gsm8k": 1.0}}, digits=2)
    add_table(run / "eval", "abilities", "Abilities.", {"M0": {"gsm8k": 71.5}}, digits=2)
    add_table(run / "eval", "other", "Other.", {"M0": {"a": 5.0}})
    found = read_page(run).content
    assert re.search(r"Abilities\.\s*modelgsm8k\s*M071\.50", found)
    assert re.search(r"Other\.\s*modela\s*M05\.0", found)


def test_the_case_shown_is_the_one_whose_replies_have_the_least_in_common(run: Path) -> None:
    count = len(read_examples(run / "eval"))
    same = [{"index": i, **vars(Reply("all the same words"))} for i in range(count)]
    for stage, text in (("M0", "one"), ("M1", "two"), ("M2", "three")):
        other = {"index": 7, **vars(Reply(text))}
        write_jsonl(run / "eval" / f"{stage}.replies.jsonl", [*same[:7], other, *same[8:]])
    replies = {stage: read_replies(run / "eval" / f"{stage}.replies.jsonl") for stage in ("M0", "M1", "M2")}
    case = telling_case(run / "eval", replies)
    assert case is not None
    assert case["heading"].startswith("Test turn 8 of")
    assert list(case["answers"].values())[:3] == ["one", "two", "three"]
    assert len(case["turns"]) == len(read_examples(run / "eval")[7].context)  # the whole of it


def test_a_stage_that_has_just_begun_is_reported_too(run: Path) -> None:
    for name in ("metrics.jsonl", "pairs.jsonl"):
        write_jsonl(run / "M2" / name, [])
    (run / "M2" / "filter.json").unlink()
    (run / "eval" / "M2.json").unlink()
    write_jsonl(run / "eval" / "M2.replies.jsonl", read_jsonl(run / "eval" / "M2.replies.jsonl")[:1])
    found = read_page(run)
    assert "unfinished: M2 not scored yet" in found.content
    assert re.search(r"M1 answers \d", found.content)
    assert not re.search(r"M2 answers \d", found.content)


def test_without_matplotlib_everything_but_the_figures_is_there(
    run: Path, html: str, request: pytest.FixtureRequest
) -> None:
    full = Page(html)
    request.getfixturevalue("no_figures")
    found = read_page(run)
    assert headings(found) == headings(full)
    assert not found.tags("img")
    assert not found.tags("figure")
    assert len(found.tags("table")) == len(full.tags("table"))
    assert found.content.count("matplotlib is not installed") == 1
    with pytest.raises(ValueError, match=r"pip install 'selfevo\[report\]'"):
        training_figures("M0", metrics("M0"))


def test_embeddings_add_a_table_and_figures_of_their_own(run: Path) -> None:
    import numpy as np

    def embed(texts: list[str]) -> np.ndarray:
        return np.ones((len(texts), 3))  # all alike: a histogram without any width

    found = Page(write_report(run, embed=embed).read_text())
    assert len(found.tags("img")) == 15
    assert "mean hidden states" in found.content
    assert "1.0001.000 to 1.000median 1.000" in found.content


@pytest.mark.usefixtures("no_figures")
def test_a_control_is_called_one(run: Path) -> None:
    config = read_json(run / "config.json")
    config["settings"]["control"] = "swapped"
    write_json(run / "config.json", config)
    found = read_page(run).content
    assert "control experiment (swapped)" in found
    assert "before the control changed them" in found


def test_drawings_are_transparent_and_use_colours_for_both_grounds(html: str) -> None:
    for drawing in drawings(Page(html)):
        colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", drawing)) - {"none"}
        assert TEXT in colours
        assert colours <= {TEXT, BLUE, ORANGE, GREY, GREEN, PURPLE}
        assert "<text" not in drawing  # paths, so that it looks the same with any font


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_lines_and_text_have_contrast_on_both_grounds(html: str) -> None:
    style = re.findall(r"--(\w+): (#[0-9a-f]+);", html)
    light, dark = dict(style[: len(style) // 2]), dict(style[len(style) // 2 :])
    assert light.keys() == dark.keys()
    for palette in (light, dark):
        ground = palette["ground"].replace("#fff", "#ffffff")
        for name in ("ink", "soft", "accent"):
            assert contrast(palette[name], ground) >= 4.5
            assert contrast(palette[name], palette["raised"]) >= 4.5
        for colour in (BLUE, ORANGE, GREY, GREEN, PURPLE):
            assert contrast(colour, ground) >= 3, colour
        assert contrast(TEXT, ground) >= 4.2  # no colour has more than 4.21 on both


def test_phrases_in_scripts_that_no_font_here_has_are_drawn_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shares = {"M0": [0.5, 0.1], "M1": [0.0, 0.2]}
        drawn = phrases_figure("Phrases & more", ["пять 五 五", "x < y"], shares)
    assert drawn["caption"] == "Phrases & more"
    assert ElementTree.fromstring(base64.b64decode(drawn["source"].removeprefix(SVG))).tag.endswith("svg")


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("text", [ATTACK, "\x00\x1b[31m", "\ud800", "a\nb\tc"])
def test_text_is_escaped_and_cleared_of_what_html_cannot_hold(run: Path, text: str) -> None:
    replies = read_jsonl(run / "eval" / "M2.replies.jsonl")
    for reply in replies:
        reply["text"] = text
    # Not by write_jsonl, which replaces halves of surrogate pairs itself.
    (run / "eval" / "M2.replies.jsonl").write_text("".join(json.dumps(reply) + "\n" for reply in replies))
    (run / "eval" / "M2.json").unlink()  # which has scores of the replies before
    write_json(run / "eval" / "M1.judge.json", {"judge": text, "answered": 1, "failures": {}, "scores": {}})
    found = read_page(run)
    assert not found.wrong
    shown = re.sub("[\x00\x1b\ud800]", "\ufffd", text)
    assert found.content.count(f"M2{shown}") == 1 + 4
    assert f"Mean scores by the judge {shown}. Under each" in found.content


@pytest.mark.usefixtures("no_figures")
def test_attributes_are_escaped(run: Path) -> None:
    judge = "\"><script>'&lt;"
    write_json(run / "eval" / "M1.judge.json", {"judge": judge, "answered": 1, "failures": {}, "scores": {}})
    found = read_page(run)
    assert not found.tags("script")
    assert [box["aria-label"] for box in found.tags("table")].count(f"Mean scores by the judge {judge}") == 1


def test_without_scikit_learn_pairs_are_not_compared(
    run: Path, html: str, no_figures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    found = read_page(run)
    assert headings(found) == headings(Page(html))
    assert "relevance of chosen" not in found.content
    assert found.content.count("scikit-learn is not installed (pip install 'selfevo[report]')") == 1
    with pytest.raises(ValueError, match=r"pip install 'selfevo\[report\]'"):
        TfIdf(["a text"])


def test_without_jinja_no_page_is_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match=r"needs Jinja2.*pip install 'selfevo\[report\]'"):
        write_report(run)


def test_importing_the_evaluation_loads_none_of_the_extras() -> None:
    extras = "{'jinja2', 'matplotlib', 'sklearn'}"
    code = f"import sys; import selfevo.evaluation.report; sys.exit(bool({extras} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_stages_come_by_number_and_before_other_names() -> None:
    names = ["M10", "other", "M2", "vanilla", "M0", "M1-x"]
    assert sorted(names, key=stage_order) == ["vanilla", "M0", "M2", "M10", "M1-x", "other"]


def test_the_example_says_where_the_report_is_and_what_is_no_run(run: Path, html: str, tmp_path: Path) -> None:
    good = subprocess.run([sys.executable, str(EXAMPLE), str(run)], capture_output=True, text=True, check=True)
    assert Path(good.stdout.strip()) == run / "report.html"
    assert (run / "report.html").read_text(encoding="utf-8") == html  # another process, the same page
    bad = subprocess.run([sys.executable, str(EXAMPLE), str(tmp_path / "nothing")], capture_output=True, text=True)
    assert bad.returncode == 1
    assert bad.stderr.startswith("error: ")
    assert len(bad.stderr.splitlines()) == 1
