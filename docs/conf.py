"""Settings of the documentation, which ``make docs`` builds with warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from docutils.nodes import Element

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from selfevo import __version__

project = "selfevo"
author = "the authors of selfevo"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "selfevo"

autodoc_member_order = "bysource"
autodoc_mock_imports = ["jinja2", "matplotlib", "nltk", "sklearn"]  # extras, which a description does not need
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 100

# A reference written in a text must lead somewhere. Nothing here reaches for the network, so the names of other
# packages do not.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(torch|numpy|typing|collections|pathlib|builtins)\..*")]


def plain_annotation(app: Any, env: Any, node: Element, content: Element) -> Element | None:
    """A type in a signature is plain text where it is not documented; such references have no role of their own."""
    return None if "refexplicit" in node else content


def setup(app: Any) -> None:
    app.connect("missing-reference", plain_annotation)
