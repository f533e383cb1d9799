"""What mkdocs changes in the pages: README.md is the first page, and links to code become names of files."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)#]+)\)")
"""A link to a file that is not in docs/: the site does not have it."""
ROLE = re.compile(r":(?:class|func|mod|meth|data|attr):<code>~?([^<]+)</code>")
"""A name in a docstring, as Sphinx writes it."""


def on_files(files: Files, config: Any) -> Files:
    """Add README.md as index.md; it stands one folder above the pages."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\((?!https?:|#|docs/)", "](../", text).replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Name the files that the site does not have."""
    return OUTSIDE.sub(r"\1 (`\2`)", markdown.replace("](../README.md", "](index.md"))


def on_page_content(html: str, **_: Any) -> str:
    """Names in docstrings without Sphinx's roles and without their modules."""
    return ROLE.sub(lambda match: f"<code>{match[1].rpartition('.')[2]}</code>", html)
