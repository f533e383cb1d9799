"""The fenced blocks of README.md and docs/*.md, made small enough to run: `python tests/pages.py` lists them.

A comment in the line before a block: `<!-- not run: REASON -->`, or `<!-- slow -->`: not run in the gate.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
RUN = ("python", "sh", "diff", "toml")
SLOW = "<!-- slow -->"
SHRINK = 8
"""Tiny models are made for images of 128 px, SDXL and FLUX for 1024 px: all sizes are divided by this."""

SKIPPED_COMMANDS = {
    "pip": "installs; tests/test_release.py installs the wheel",
    "make": "the Makefile's targets take from a minute to hours",
    "git": "needs the address of a repository",
    "tiledcore view": "serves until Ctrl-C; tests/cli/test_view*.py run it",
    "python -m bench": "benchmarks: tests/test_suite.py, test_modes.py, test_oracle.py run them",
    ". .venv/bin/activate": "nothing to see",
    ".venv/bin/python": "tests/golden/outputs.py runs for a minute",
    "nsys": "NVIDIA's profiler, needs a GPU",
    "ncu": "NVIDIA's profiler, needs a GPU",
}
"""Commands of `sh` blocks that are not run, and why."""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int  # Of its first line of text, from 1
    language: str
    text: str
    reason: str | None  # Why it is not run
    slow: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def python(self) -> str:
        """The code at a small size, on a CPU; its lines keep their numbers. Of a diff, the new side."""
        text = self.text
        if self.language == "diff":
            text = "".join("\n" if line[0] == "-" else line[2:] for line in text.splitlines(keepends=True))
        text = text.replace("enable_model_cpu_offload()", 'to("cpu")').replace('"cuda"', '"cpu"')
        text = re.sub(r"\bb?float16\b", "float32", text)
        return "\n" * (self.line - 1) + smaller(text)

    def commands(self) -> list[list[str]]:
        """The words of each command of a `sh` block, at a small size."""
        lines = self.text.replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True) for line in lines]
        return [[re.sub(r"\d+(?=x\d)|(?<=\dx)\d+", divided, word) for word in line] for line in words if line]


def divided(match: re.Match[str]) -> str:
    number = int(match[0])
    return str(number // SHRINK if number >= 16 and number % SHRINK == 0 else number)


def smaller(text: str) -> str:
    """A text in which every integer from 16 on that can be is divided by SHRINK: sizes, boxes, tiles."""
    return re.sub(r"(?<![\w.\-])\d+(?![\w.])", divided, text)


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in a language of RUN."""
    found, lines = [], page.read_text(encoding="utf-8").splitlines()
    fences = [i for i, line in enumerate(lines) if line.startswith("```")]
    assert len(fences) % 2 == 0, f"{page}: a fence is not closed"
    for start, end in zip(fences[::2], fences[1::2], strict=True):
        language = lines[start][3:].strip()
        note = re.fullmatch(r"<!-- not run: (.+) -->", lines[start - 1]) if start else None
        text = "".join(f"{line}\n" for line in lines[start + 1 : end])
        if language in RUN:
            found.append(Block(page, start + 2, language, text, note[1] if note else None, lines[start - 1] == SLOW))
    return found


def skipped(words: list[str]) -> str | None:
    """Why a command is not run; None: it is run."""
    said = " ".join(words)
    return next((why for start, why in SKIPPED_COMMANDS.items() if said.startswith(start)), None)


def main() -> None:
    run = 0
    for block in [block for page in PAGES for block in blocks(page)]:
        commands = block.commands() if block.language == "sh" and block.reason is None else []
        reasons = (
            [block.reason] if block.reason else [f"{words[0]}: {why}" for words in commands if (why := skipped(words))]
        )
        run += len(commands) - len(reasons) if commands else not block.reason
        for reason in reasons:
            print(f"{block}: not run: {reason}")
    print(f"{run} blocks and commands are run")


if __name__ == "__main__":
    main()
