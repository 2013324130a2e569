"""README.md and docs/ keep their word: files, links, flags and imports that they name are there."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "api").glob("*.md"))]
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SCRIPT = re.compile(r"(?:python )?((?:(?:examples|benchmarks|docs)/)(?:\w+/)*\w+\.py)\b(.*)")
PAGE_IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
TREES = ["README.md", "docs/architecture.md"]


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def inline(page: Path) -> list[str]:
    """The code spans of a page, those of its tables included."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8")))


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """The scripts that a page calls, with the flags it gives them, a comment's included."""
    found = []
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    for line in [*lines, *inline(page)]:
        call = SCRIPT.match(line.strip())
        if call:
            found.append((call[1], re.findall(r"(?<![\w-])--[a-z][\w-]*", call[2])))
    return found


@functools.cache
def flags(script: str) -> frozenset[str]:
    result = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, f"{script} --help: {result.stderr}"
    return frozenset(re.findall(r"(?<![\w-])--[a-z][\w-]*", result.stdout))


def test_the_readme_can_be_read_in_one_sitting() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, heading = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target} is not there"
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
            assert heading in slugs, f"{page.name}: {target} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_files_of_the_repository_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w./-])(?:selfevo|examples|benchmarks|tests|docs)/[\w./-]*\w\.(?:py|md|svg)\b", text))
    named |= set(re.findall(r"(?<![\w./-])(?:selfevo|examples|benchmarks|tests|docs)/[\w/]*(?=`)", text))
    missing = sorted(name for name in named if not (ROOT / name).exists() and name != "docs/_build")
    assert not missing, f"{page.name} names {missing}"


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_commands_name_scripts_and_flags_that_exist(page: Path) -> None:
    for script, given in commands(page):
        assert (ROOT / script).is_file(), f"{page.name}: {script} is not there"
        if not given:
            continue
        known = flags(script)
        if script == "examples/ablate.py":  # which hands all other flags on
            known |= flags("examples/iterate.py")
        assert set(given) <= known | {"--help"}, f"{page.name}: {script} has no {sorted(set(given) - known)}"


def test_the_commands_of_the_pages_are_found() -> None:
    """The test above would pass, too, if it found none."""
    scripts = {script for page in PAGES for script, _ in commands(page)}
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").glob("*.py")} <= scripts | {
        "examples/__init__.py",
        "examples/program.py",
    }


def paper_rows() -> list[list[str]]:
    """The cells of every row of docs/paper.md."""
    lines = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in rows if row[0] != "paper" and not set(row[0]) <= set("-")]


def test_the_page_of_the_paper_has_a_row_for_each_of_its_parts_and_none_is_empty() -> None:
    rows = paper_rows()
    assert all(cell for row in rows for cell in row)
    assert not any("not yet" in cell.lower() for row in rows for cell in row)
    named = " ".join(row[0] for row in rows)
    numbers: dict[str, set[int]] = {}
    for kind, first, last in re.findall(r"(Eq|Table|Figure)s?\.? (\d+)(?: (?:to|and) (\d+))?", named):
        numbers.setdefault(kind, set()).update(range(int(first), int(last or first) + 1))
    assert numbers == {"Eq": set(range(1, 9)), "Table": set(range(1, 8)), "Figure": set(range(1, 14))}
    assert set(re.findall(r"\b([A-F])(?:\.\d)?, ", named)) == set("ABCDEF")


def paper_commands() -> list[str]:
    spans = inline(ROOT / "docs" / "paper.md")
    return sorted({span for span in spans if span.startswith("python examples/") and len(span.split()) > 2})


@pytest.mark.parametrize("command", paper_commands())
def test_the_commands_of_the_page_of_the_paper_parse(command: str, tmp_path: Path) -> None:
    """Where none of the files exists, each ends with a sentence about a file, not about its flags."""
    _, script, *arguments = shlex.split(command)
    if "--backbone" not in arguments and script.endswith(("ablate.py", "iterate.py")):
        arguments += ["--backbone", "BACKBONE", "--esconv", "ESConv.json"]  # else the embedded default would run
    result = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1, result.stderr
    assert re.fullmatch(r"error: .*\n", result.stderr), result.stderr


@pytest.mark.parametrize("name", TREES)
def test_the_tree_is_that_of_the_package(name: str) -> None:
    (tree,) = (body for body in blocks(ROOT / name, "text") if body.startswith("selfevo/"))
    top = set(re.findall(r"^  ([\w./]+)", tree, re.MULTILINE))
    package = ROOT / "selfevo"
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert top == modules | folders
    files = {path.name for path in package.rglob("*.py")}
    named = set(re.findall(r"\b\w+\.py\b", tree))
    assert named <= files, f"{name} names {sorted(named - files)}"


def test_the_machine_constants_stand_where_the_table_says() -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").split("## Machine constants")[1]
    rows = re.findall(r"^\| (.*?) \| `(selfevo/[\w/]+\.py)` \|", text, re.MULTILINE)
    assert len(rows) >= 15
    for names, file in rows:
        code = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(?:def |[\w, ]*)\b{name}\b", code, re.MULTILINE), f"{file} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_the_imports_of_python_blocks_run(page: Path) -> None:
    lines = "\n".join(blocks(page, "python")).splitlines()
    imports = [line for line in lines if re.match(r"(from|import) ", line)]
    if not imports:
        return
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(imports)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


def test_the_picture_is_drawn_from_what_a_run_prints(tmp_path: Path) -> None:
    printed = """
| M0 | 15.9 | 34.0 | 0.4 |
| M1 | 52.1 | 94.4 | 1.4 |

the user has told: job florist
user: I am a florist by <trade>.
  M0: Take your time.
  M1: Not everyone could be a florist.
"""
    script, image = ROOT / "docs" / "make_picture.py", tmp_path / "run.svg"
    subprocess.run(shlex.split(f"{sys.executable} {script} {image}"), input=printed, text=True, check=True, timeout=60)
    drawn = image.read_text(encoding="utf-8")
    assert all(part in drawn for part in ("15.9", "52.1", "florist by &lt;trade&gt;", "Take your time."))
    empty = subprocess.run([sys.executable, script, image], input="nothing", capture_output=True, text=True, timeout=60)
    assert empty.returncode == 1
    assert "error:" in empty.stderr
