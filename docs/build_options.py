"""The tables of `docs/options.md`: `python docs/build_options.py` prints them as Markdown."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

from pydantic.fields import FieldInfo

from localization_heads.options.compose import (
    PROGRAMS,
    choices_of,
    default_choices,
    format_yaml,
    option_names,
)
from localization_heads.options.declaration import Options, describe_requirement, option_group
from localization_heads.options.programs import FinderOptions

COMMANDS = {
    "finder": "localization_heads_finder.py",
    "visualize": "visualize_attention.py",
    "chat": "cli_llava.py",
    "demo": "python -m localization_heads.apps.demo",
}


def markdown() -> str:
    """Every option of the finder by group, then the options that only the other programs have."""
    parts = [_presets(), _table("Options of the run", _plain_options(FinderOptions))]
    for name, field in FinderOptions.__pydantic_fields__.items():
        if group := option_group(field):
            options = [(f"{name}.{key}", option) for key, option in _plain_options(group)]
            parts.append(_table(f"`{name}`", options))
    finder_names = option_names("finder")
    for program, kind in PROGRAMS.items():
        additional = [(name, field) for name, field in _plain_options(kind) if name not in finder_names]
        if additional:
            parts.append(_table(f"`{COMMANDS[program]}` besides", additional))
    return "\n\n".join(parts) + "\n"


def _presets() -> str:
    """The table of the groups of presets."""
    fields, extra = FinderOptions.__pydantic_fields__, FinderOptions.EXTRA_GROUPS
    rows = []
    for name, default in default_choices("finder").items():
        description = extra[name][1] if name in extra else str(fields[name].description)
        choices = ", ".join(f"`{choice}`" for choice in choices_of(name))
        rows.append(f"| `{name}` | `{default}` | {choices} | {description} |")
    head = "### Presets\n\n| group | default | choices | what it chooses |\n| --- | --- | --- | --- |\n"
    return head + "\n".join(rows)


def _plain_options(kind: type[Options]) -> Iterator[tuple[str, FieldInfo]]:
    """The names and fields of the options that are not groups."""
    return ((name, field) for name, field in kind.__pydantic_fields__.items() if option_group(field) is None)


def _table(title: str, options: Iterator[tuple[str, FieldInfo]] | list[tuple[str, FieldInfo]]) -> str:
    rows = [
        f"| `{name}` | `{format_yaml(field.default)}` | {_allowed_values(field)} | {field.description} |"
        for name, field in options
    ]
    return f"### {title}\n\n| option | default | takes | what it means |\n| --- | --- | --- | --- |\n" + "\n".join(rows)


def _allowed_values(field: FieldInfo) -> str:
    """The allowed values, worded as in the hint of the error message."""
    return re.sub(r"^(give|write|choose one of|choose) |, choose one of(?= )", "", describe_requirement(field))


if __name__ == "__main__":
    sys.stdout.write(markdown())
