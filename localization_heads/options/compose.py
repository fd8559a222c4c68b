"""Hydra's configuration and the text of `--help`, both generated from the option classes.

The classes (`programs`, `groups`) define every group and default. Presets, which change a few values under a name, are
the files of `config/<group>/` and the tables in `experiments`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from pydantic.fields import FieldInfo

from localization_heads.heads.head import Head
from localization_heads.options.declaration import Options, format_value, option_group, option_metadata
from localization_heads.options.experiments import TABLES
from localization_heads.options.groups import DEFAULT_GROUNDING, GroundingOptions
from localization_heads.options.programs import ChatOptions, DemoOptions, FinderOptions, VisualizeOptions

PROGRAMS: dict[str, type[Options]] = {
    "finder": FinderOptions,
    "visualize": VisualizeOptions,
    "chat": ChatOptions,
    "demo": DemoOptions,
}
BASE = "base"
"""The choice that every preset of a group inherits from: the defaults of its class."""
_WIDTH = 118


def default_choices(program: str) -> dict[str, str]:
    """The groups of a program, each with its default choice."""
    fields = PROGRAMS[program].__pydantic_fields__
    groups = {name: choice for name, field in fields.items() if (choice := option_metadata(field)["choice"])}
    return {**groups, **{name: choice for name, (choice, _) in PROGRAMS[program].EXTRA_GROUPS.items()}}


def choices_of(group: str) -> list[str]:
    """The choices of `group=`: files of `config/<group>/` and rows of `TABLES`."""
    folder = files("localization_heads") / "config" / group
    stems = [file.name.removesuffix(".yaml") for file in folder.iterdir()] if folder.is_dir() else []
    return sorted([stem for stem in stems if not stem.startswith("_")] + list(TABLES.get(group, ())))


def option_names(program: str) -> dict[str, FieldInfo]:
    """The options of a program by their names on the command line, such as `criteria.tau`."""
    return dict(_leaves(PROGRAMS[program]))


def _leaves(kind: type[Options], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in kind.__pydantic_fields__.items():
        if (group := option_group(field)) is None:
            yield prefix + name, field
        else:
            yield from _leaves(group, f"{prefix}{name}.")


def to_plain(value: Any) -> Any:
    """A value as the plain types of YAML."""
    if isinstance(value, Options):
        return {name: to_plain(getattr(value, name)) for name in type(value).__pydantic_fields__}
    if isinstance(value, Head):
        return f"{value.layer}-{value.head}"
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    return value


def register(program: str) -> None:
    """Register all options with Hydra: the program's own as its main config, a group's as the `base` of its presets."""
    from hydra.core.config_store import ConfigStore

    store, kind = ConfigStore.instance(), PROGRAMS[program]
    groups = default_choices(program)
    values = {name: to_plain(f.default) for name, f in kind.__pydantic_fields__.items() if name not in groups}
    # These groups also set options of the program itself, so they come after its defaults.
    overriding = {*kind.EXTRA_GROUPS, *TABLES}
    before = [{name: choice} for name, choice in groups.items() if name not in overriding]
    after = [{name: choice} for name, choice in groups.items() if name in overriding]
    quiet = [{"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]
    store.store(name=program, node={"defaults": [*before, "_self_", *after, *quiet], **values, "hydra": _HYDRA})
    for name, field in kind.__pydantic_fields__.items():
        if name in groups and (group := option_group(field)):
            store.store(group=name, name=BASE, node=to_plain(group()))
    for group_name, table in TABLES.items():
        for choice, node in table.items():
            store.store(group=group_name, name=choice, **_row(group_name, node))


def _row(group: str, node: dict[str, Any]) -> dict[str, Any]:
    """A row of `TABLES` as a Hydra config on top of the group's base; a rung also sets options of the program."""
    if group == "rung" or "hydra" in node:
        base = [f"{BASE}@{group}", *node.get("defaults", []), "_self_"]
        return {"node": {**node, "defaults": base}, "package": "_global_"}
    return {"node": {"defaults": [BASE, "_self_"], **node}, "package": group}


_HYDRA = {
    "output_subdir": None,
    "run": {"dir": "."},
    "sweep": {"dir": "${output_dir}/multirun", "subdir": "."},
    "job": {"chdir": False},
}


def help_text(program: str) -> str:
    """Every option with its default and sentence; the groups that have presets come last."""
    kind, groups = PROGRAMS[program], default_choices(program)
    lines: list[str] = []
    preset_sections: dict[str, list[str]] = {}
    fields = kind.__pydantic_fields__.items()
    # The program's own options come before inherited ones.
    for name, field in sorted(fields, key=lambda item: item[0] not in kind.__annotations__):
        if section := option_metadata(field)["section"]:
            lines += ["", _rule(section)]
        group = option_group(field)
        if name in groups and group:
            lines += _entry(name, groups[name], field.description)
            preset_sections[name] = _section(f"{name}={groups[name]}", name, group, load_preset(name, groups[name]))
        elif group:
            lines += _section(str(field.description).rstrip("."), name, group, {})
        else:
            lines += _entry(name, field.default, field.description)
    for name, (choice, sentence) in kind.EXTRA_GROUPS.items():
        lines += _entry(name, choice, sentence)
    for name in groups:
        lines += preset_sections.get(name, [])
    return "\n".join(lines).strip() + "\n"


def _section(title: str, name: str, group: type[Options], values: Mapping[str, Any]) -> list[str]:
    """The options of a group under a heading, with the values of a preset."""
    lines = ["", _rule(title)]
    for key, field in _leaves(group):
        lines += _entry(f"{name}.{key}", values.get(key, field.default), field.description)
    return lines


def _rule(title: str) -> str:
    return f"# --- {title} {'-' * (_WIDTH - 7 - len(title))}"


def _entry(name: str, value: Any, sentence: str | None) -> list[str]:
    comment = textwrap.wrap(sentence or "", _WIDTH - 2, break_long_words=False, break_on_hyphens=False)
    return [*(f"# {line}" for line in comment), f"{name}: {format_yaml(value)}"]


def format_yaml(value: Any) -> str:
    """A value in the syntax of YAML and the command line."""
    value = to_plain(value)
    return f"[{', '.join(map(format_yaml, value))}]" if isinstance(value, list) else format_value(value)


@cache
def load_preset(group: str, choice: str) -> Mapping[str, Any]:
    """The values that a preset changes in its group, read without Hydra."""
    if choice in TABLES.get(group, ()):
        return TABLES[group][choice]
    import yaml

    text = (files("localization_heads") / "config" / group / f"{choice}.yaml").read_text(encoding="utf-8")
    return {str(name): value for name, value in yaml.safe_load(text).items() if name != "defaults"}


def flatten(values: Options, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every option with its value, in the syntax of the command line."""
    for name in type(values).__pydantic_fields__:
        value = getattr(values, name)
        if isinstance(value, Options):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", format_yaml(value)


@cache
def default_grounding() -> GroundingOptions:
    """The read-out of the preset `DEFAULT_GROUNDING`."""
    return GroundingOptions(**load_preset("grounding", DEFAULT_GROUNDING))


def implied_overrides(program: str, words: Sequence[str]) -> list[str]:
    """`grounding=paper` for a command line that reproduces the paper or the published code and names no `grounding=`.

    >>> implied_overrides("finder", ["criteria=published"])
    ['grounding=paper']
    >>> implied_overrides("finder", ["criteria=published", "grounding=sharp"])
    []
    """
    given = dict(word.lstrip("+").partition("=")[::2] for word in words)
    if "grounding" in given or "grounding" not in default_choices(program):
        return []
    experiment = given.get("experiment", "none")
    if experiment == "ladder":  # each rung sets its own read-out
        return []
    reproduces = (
        experiment != "none" or given.get("criteria", "").startswith("published") or given.get("stage") == "experiment"
    )
    return ["grounding=paper"] if reproduces else []


def describe_preset(group: str, options: Options) -> str:
    """The preset that equals a group's options, or the most similar one and how they differ from it.

    >>> describe_preset("grounding", GroundingOptions(sigma=0.5))
    'paper with sigma=0.5'
    """
    values = {name: to_plain(getattr(options, name)) for name in type(options).__pydantic_fields__}
    base = to_plain(type(options)())
    presets = {choice: {**base, **load_preset(group, choice)} for choice in choices_of(group)}
    changes = {
        choice: [name for name, value in values.items() if preset_values[name] != value]
        for choice, preset_values in presets.items()
    }
    nearest = min(changes, key=lambda choice: len(changes[choice]))
    changed = ", ".join(f"{name}={format_yaml(getattr(options, name))}" for name in changes[nearest])
    return f"{nearest} with {changed}" if changed else nearest


def compose_options(program: str, *overrides: str) -> Any:
    """The options of a program for a command line with these overrides, as an object of its class.

    Raises:
        UsageError: an invalid value. Hydra's own errors are raised unchanged.
    """
    from hydra import compose, initialize_config_module

    register(program)
    with initialize_config_module("localization_heads.config", version_base="1.3"):
        return validate(program, compose(program, [*overrides, *implied_overrides(program, overrides)]))


def validate(program: str, cfg: Any) -> Any:
    """Convert Hydra's composed config to an object of the program's class. UsageError for an invalid value."""
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(cfg, resolve=True)
    return PROGRAMS[program].of(values)
