"""The code blocks of a Markdown page, and how each of them is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: .+? -->\s*\Z")
COMMANDS = {
    "localization_heads_finder.py": "finder",
    "visualize_attention.py": "visualize",
    "cli_llava.py": "chat",
}
SET_UP = ("pip install", "make ", "mkdocs ", "git clone", "hf ")
"""Commands that set things up: a test must not run them."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line of its page where it begins, and whether it is to be run."""

    language: str
    text: str
    line: int
    is_run: bool


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page. One that cannot be run has `<!-- not run: why -->` before it."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        yield Block(match[1], match[2], before.count("\n") + 1, NOT_RUN.search(before) is None)


def commands(block: Block) -> Iterator[tuple[str, list[str]]]:
    """(front door, options) of each command in a shell block: `finder`, `visualize` or `chat`; or a line for the shell.

    Blocks that show output mark their commands with `$`.
    """
    lines = block.text.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    for line in lines:
        words = shlex.split(line, comments=True)
        if not words or line.startswith(SET_UP):
            continue
        if words[0] == "python" and words[1] in COMMANDS:
            yield COMMANDS[words[1]], words[2:]
        elif words[0] == "locheads":
            yield "finder", words[1:]
        else:
            raise AssertionError(f"line {block.line}: the tests do not know how to run {line!r}")
