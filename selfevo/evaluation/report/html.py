"""HTML from escaped pieces: whatever is not already ``Html`` is text, and is escaped where it enters an element."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

_VOID = frozenset({"meta"})
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Html(str):
    """Markup: elements, in which all text has been escaped."""

    __slots__ = ()


def element(name: str, *content: str, attributes: Mapping[str, str] | None = None) -> Html:
    """One element. ``name`` may bring classes, ``"td.number"``; content that is not ``Html`` is text."""
    tag, *classes = name.split(".")
    given = ({"class": " ".join(classes)} if classes else {}) | dict(attributes or {})
    opening = "".join(f' {key}="{escape(value)}"' for key, value in given.items())
    if tag in _VOID:
        return Html(f"<{tag}{opening}>")
    return Html(f"<{tag}{opening}>{join(*content)}</{tag}>")


def join(*content: str) -> Html:
    """The pieces one after another."""
    return Html("".join(piece if isinstance(piece, Html) else escape(printable(piece)) for piece in content))


def printable(text: str) -> str:
    """The text without what no HTML file may hold: control characters and halves of surrogate pairs."""
    return _UNPRINTABLE.sub("\ufffd", text)


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    """A caption and, in a box of its own to scroll in, a table; the first cell of a row is its heading."""
    top = element("tr", *(element("th", cell, attributes={"scope": "col"}) for cell in head))
    body = [
        element("tr", element("th", row[0], attributes={"scope": "row"}), *(element("td", cell) for cell in row[1:]))
        for row in rows
    ]
    name = {"aria-label": caption.split(". ")[0].rstrip(".")}
    whole = element("table", element("thead", top), element("tbody", *body), attributes=name)
    # A box that scrolls must be reachable by keyboard, and so needs a role and a name.
    box = element("div.scroll", whole, attributes={"role": "region", "tabindex": "0"} | name)
    return element("div.table", element("p.caption", caption), box)


def details(summary: str, *content: str) -> Html:
    """Content that is folded away under its summary."""
    return element("details", element("summary", summary), *content)


def section(heading: str, *content: str) -> Html:
    """A section under a heading of the second level, which ``contents`` links to."""
    return element("section", element("h2", heading, attributes={"id": _anchor(heading)}), *content)


def contents(headings: Sequence[str]) -> Html:
    """Links to the sections of these headings."""
    links = [element("a", heading, attributes={"href": f"#{_anchor(heading)}"}) for heading in headings]
    return element("nav", *links, attributes={"aria-label": "Sections"})


def _anchor(heading: str) -> str:
    return "-".join(heading.lower().split())


def page(title: str, *content: str) -> Html:
    """A whole document: no script, nothing loaded from elsewhere, light or dark as the reader's system is."""
    head = element(
        "head",
        element("meta", attributes={"charset": "utf-8"}),
        element("meta", attributes={"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", attributes={"name": "color-scheme", "content": "light dark"}),
        element("title", title),
        element("style", Html(_STYLE)),
    )
    body = element("body", element("main", *content))
    return Html("<!DOCTYPE html>\n" + element("html", head, body, attributes={"lang": "en"}) + "\n")


_STYLE = """
:root { --ink: #1c2024; --soft: #5b6570; --line: #d9dee3; --ground: #fff; --raised: #f5f7f9; --accent: #1f6aa5;
  --bad: #b3401a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #9aa6b2; --line: #343c45; --ground: #14181d; --raised: #1d2329; --accent: #6fb3e8;
    --bad: #f0946c; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif;
  overflow-wrap: anywhere; }
main { max-width: 75rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; }
a { color: var(--accent); }
nav { margin: 1rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .9rem; }
.soft, small, .caption, figcaption, summary { color: var(--soft); }
small { font-size: .8em; }
.notice { border-left: 3px solid var(--bad); padding: .3rem .8rem; background: var(--raised); }
.table { margin: 1.2rem 0; min-width: 0; }
.caption { font-size: .88rem; margin: 0; }
.tables { display: flex; flex-wrap: wrap; gap: 0 3.5rem; }
.scroll { overflow-x: auto; }
.scroll:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .35rem .55rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
td > small { display: block; white-space: nowrap; color: var(--soft); }
tbody th { font-weight: 500; }
td:has(> code) { text-align: left; }
details { margin: .8rem 0; }
summary { cursor: pointer; font-size: .9rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem 2rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: .5rem 1.5rem; }
figure { margin: .6rem 0; min-width: 0; }
figcaption { font-size: .88rem; }
svg { display: block; width: 100%; height: auto; max-width: 29rem; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.talk > h3 { margin-top: 0; }
.talk { border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem 1rem; margin: 1rem 0; }
.turn { margin: .35rem 0; max-width: 42rem; white-space: pre-line; }
.who { color: var(--soft); font-size: .78rem; font-weight: 600; margin-right: .5rem; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: .7rem;
  margin-top: .8rem; }
.answer { background: var(--raised); border-radius: .5rem; padding: .5rem .8rem .7rem; white-space: pre-line; }
.answer > .who { display: block; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; margin: 0; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; white-space: pre-line; }
code { font-size: .88em; }
"""
