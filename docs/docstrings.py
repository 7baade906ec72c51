"""How this house's docstrings read as numpy's: a griffe extension for the page of the public names (see mkdocs.yml).

Ours give no types, which the signature has: an entry is ``name : what it is``, and *Returns* is plain text.
"""

from __future__ import annotations

import re
from textwrap import indent
from typing import Any

from griffe import Extension

SECTION = re.compile(
    r"^(?P<title>Parameters|Attributes|Returns|Yields)\n-+\n(?P<body>(?:.*\n?)*?)(?=^\w[\w ]*\n---|\Z)", re.MULTILINE
)


def numpy_style(docstring: str) -> str:
    """Return a docstring in which no description stands where numpy has a type."""

    def rewritten(found: re.Match[str]) -> str:
        title, body = found["title"], found["body"]
        if title in ("Returns", "Yields"):
            return f"{title}\n{'-' * len(title)}\n:\n{indent(body.strip(), '    ')}\n\n"
        entries = re.sub(r"^([\w*][\w*, ]*?) : (.*)$", r"\1\n    \2", body, flags=re.MULTILINE)
        return f"{title}\n{'-' * len(title)}\n{entries}"

    return SECTION.sub(rewritten, docstring)


class HouseStyle(Extension):
    """Rewrites every docstring ahead of its being read."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = numpy_style(obj.docstring.value)
