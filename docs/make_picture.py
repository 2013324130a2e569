"""Draws the picture of README.md from what ``make run`` prints.

    make run | tee /dev/stderr | python docs/make_picture.py docs/run.svg
    python -m examples.embedded.show RUN | python docs/make_picture.py docs/run.svg

The bars are the share of a user's facts that replies take up; the replies are those to the last of the sample users
whose lines fit.
"""

from __future__ import annotations

import re
import sys
from html import escape
from pathlib import Path

WIDTH, HEIGHT, LEFT, TOP, BAR, FULL = 960, 316, 28, 104, 30, 220
WIDEST = 80  # characters of a line
COLOURS = ("#8c959f", "#54aeff", "#0969da")
TEXT, FAINT, TRACK = "#1f2328", "#59636e", "#eaeef2"


def read(printed: str) -> tuple[dict[str, float], str, str, dict[str, str]]:
    """Rates in % by model; of the last sample that fits what the user has told, what they say, and every reply."""
    rates = {
        name: float(value)
        for name, value in re.findall(r"^\| (M\d+) \| ([\d.]+) \| [\d.]+ \| [\d.]+ \|$", printed, re.MULTILINE)
    }
    samples = []
    for sample in re.split(r"^the user has told: ", printed, flags=re.MULTILINE)[1:]:
        told, said = re.match(r"(.*)\nuser: (.*)\n", sample + "\n").groups()  # type: ignore[union-attr]
        replies = dict(re.findall(r"^  (M\d+): (.*)$", sample, re.MULTILINE))
        samples.append((told, said, replies))
    fitting = [one for one in samples if max(map(len, (one[0], one[1], *one[2].values()))) <= WIDEST]
    if not rates or not samples or any(replies.keys() != rates.keys() for _, _, replies in samples):
        raise ValueError("this is not what a run on the embedded default prints")
    return (rates, *(fitting or samples)[-1])


def text(x: float, y: float, content: str, *, size: int = 14, fill: str = TEXT, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}"{more}>{escape(content)}</text>'


def draw(rates: dict[str, float], told: str, said: str, replies: dict[str, str]) -> str:
    """An SVG image with a background of its own, so that it can be read on any page."""
    bold, right = ' font-weight="600"', 370
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        "<title>What make run gives</title>",
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8" fill="#ffffff" stroke="#d0d7de"/>',
        text(LEFT, 36, "Personalisation", size=15, more=bold),
        text(LEFT, 58, "facts told so far that replies take up, %", size=13, fill=FAINT),
        text(right, 36, "Replies to one user", size=15, more=bold),
        text(right, 58, f"has told: {told}", size=13, fill=FAINT),
        text(right, 86, f"user: {said}", more=' font-style="italic"'),
    ]
    for row, (colour, (name, rate)) in enumerate(zip(COLOURS, rates.items())):
        y, x = TOP + 58 * row, LEFT + 38
        middle = y + BAR / 2 + 5
        parts += [
            text(LEFT, middle, name, more=bold),
            f'<rect x="{x}" y="{y}" width="{FULL}" height="{BAR}" rx="3" fill="{TRACK}"/>',
            f'<rect x="{x}" y="{y}" width="{FULL * rate / 100:.1f}" height="{BAR}" rx="3" fill="{colour}"/>',
            text(x + FULL + 8, middle, f"{rate:.1f}"),
            f'<rect x="{right}" y="{y + 8}" width="4" height="{BAR + 14}" rx="2" fill="{colour}"/>',
            text(right + 14, y + 20, name, size=13, fill=FAINT),
            text(right + 14, y + 42, replies[name], size=13),
        ]
    note = "M0: trained on human dialogues. M1, M2: after one and two rounds of reflecting on its own replies."
    parts += [text(LEFT, HEIGHT - 18, note, size=13, fill=FAINT), "</svg>"]
    return "\n".join(parts) + "\n"


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        Path(sys.argv[1]).write_text(draw(*read(sys.stdin.read())), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
