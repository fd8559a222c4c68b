"""What the three front doors share: help without imports, options from Hydra, errors for people."""

from __future__ import annotations

import difflib
import os
import platform
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

from localization_heads.apps.printable import printable
from localization_heads.apps.verbosity import HELP, verbosity
from localization_heads.errors import UsageError, WorkError

FREE_TEXT = (
    "query",
    "image_file",
    "attention_file",
    "data_file",
    "output_dir",
    "save_id",
    "scenes.folder",
    "dataset_path",
    "dataset_folder",
    "images",
    "model.name",
    "model.label",
    "model.system",
    "segmenter.name",
    "phrases.model",
    "engine.address",
)
"""Options whose value is any text. Hydra's grammar would trip over their commas, quotes and equals signs."""

NOT_SET_UP = (
    "lacks what this needs: `make setup`, then `source .venv/bin/activate`; "
    "or `pip install -r requirements.txt` in an environment of your own"
)

_GLOBAL = "# @package _global_\n"

_QUOTED = re.compile(r"""'[^'\\]+'|"[^"\\]+\"""")  # by a user who knows Hydra


def run(main: Callable[[Any], int], config_name: str, program: str, argv: Sequence[str] | None = None) -> int:
    """Compose the options of `config_name` and call `main(cfg)`; returns the exit status.

    0 all went well, 1 some work failed, 2 wrong use; an error is one line on standard error. A traceback is
    shown only with `debug=true` or `HYDRA_FULL_ERROR=1`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "-h"} & set(arguments):
        sys.stdout.write(help_text(config_name, program))
        return 0
    debug = "debug=true" in [a.lower() for a in arguments] or os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        with verbosity(arguments) as options:
            return _run_hydra(main, config_name, program, [quote_free_text(a) for a in options])
    except KeyboardInterrupt:
        return _fail(
            "interrupted; what was finished is kept, and the same command goes on from there", 130, debug
        )
    except (UsageError, WorkError) as error:
        return _fail(str(error), error.exit_status, debug)
    except Exception as error:
        if (message := _option_error(error, config_name)) is not None:
            return _fail(message, UsageError.exit_status, debug)
        return _fail(f"{type(error).__name__}: {_one_line(error)} (debug=true shows where)", 1, debug)


def help_text(config_name: str, program: str) -> str:
    """The config files themselves, whose comments explain every option, without what only Hydra reads."""
    text = _config_text(config_name).split("\nhydra:\n")[0]
    groups = _groups(config_name)
    text = re.sub(r"\n  - (_self_|override [^\n]*)", "", text)
    parts = [
        f"usage: {program} [-q | -v] [NAME=VALUE ...]\n\n{HELP}",
        text,
        *(_group_help(*group) for group in groups),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _group_help(group: str, choice: str) -> str:
    """The options of a group, under the names that the command line knows them by."""
    text = _config_text(f"{group}/{choice}")
    if "  - base\n" in text:  # the file says what is special, the base explains every option
        special = re.findall(r"^((?!defaults)\w+:).*$", text, re.MULTILINE)
        lines = {name: line for name in special for line in text.splitlines() if line.startswith(name)}
        base = _config_text(f"{group}/base").splitlines()
        text = "\n".join(lines.get(line.partition(" ")[0], line) for line in base)
    if text.startswith(_GLOBAL):  # its options stand beside those above
        text = text.removeprefix(_GLOBAL)
    else:
        text = re.sub(r"^(?=\w)", f"{group}.", text, flags=re.MULTILINE)
    return f"# --- {group}={choice} {'-' * (100 - len(group) - len(choice))}\n{text}"


def quote_free_text(argument: str) -> str:
    """Quote the value of a free-text option for Hydra, so that users need only quote for their shell.

    >>> quote_free_text("query=the dog, on the left")
    "query='the dog, on the left'"
    """
    name, equals, value = argument.partition("=")
    is_file = name == "heads" and value.endswith(".json")
    if not equals or value in ("", "null") or not (name in FREE_TEXT or is_file) or _QUOTED.fullmatch(value):
        return argument
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # text, not an interpolation of OmegaConf's
    value = re.sub(r"(\\+)(?='|\Z)", r"\1\1", value)  # backslashes before a quote would escape it
    value = value.replace("'", "\\'")
    return f"{name}='{value}'"


def plain_options(cfg: Any) -> dict[str, Any]:
    """The composed options as plain values, interpolations resolved."""
    from omegaconf import OmegaConf

    options = OmegaConf.to_container(cfg, resolve=True)
    return {str(name): value for name, value in options.items()} if isinstance(options, dict) else {}


def _run_hydra(main: Callable[[Any], int], config_name: str, program: str, arguments: list[str]) -> int:
    try:
        import hydra
    except ModuleNotFoundError:
        raise UsageError(f"{sys.executable} {NOT_SET_UP}") from None
    _check_grammar(arguments, config_name)
    statuses: list[int] = []
    problems: list[BaseException] = []
    here = _process()

    def job(cfg: Any) -> None:
        try:
            status = main(cfg)
        except BaseException as error:  # Hydra would print a line of its own about it
            if _process() != here:
                raise
            problems.append(error)
            return
        if _process() != here and status:
            raise WorkError(f"a job of the sweep ended with status {status}; its log says why")
        statuses.append(status)

    entry = hydra.main(
        version_base="1.3", config_path="pkg://localization_heads.config", config_name=config_name
    )(job)
    with _as_hydra_wants_it([program, *arguments]):
        try:
            entry()
        except Exception as error:
            if not type(error).__module__.startswith("submitit"):
                raise
            raise WorkError(_why_a_job_failed(error)) from error
    if problems:
        raise problems[0]
    return max(statuses, default=0)


def _process() -> tuple[str, int]:
    """Where this runs: a launcher of Hydra's runs the jobs of a sweep elsewhere, and only errors come back."""
    return platform.node(), os.getpid()


def _why_a_job_failed(error: Exception) -> str:
    """The last line of the traceback that submitit sends home."""
    found = re.findall(r"^[\w.]*?(\w+): (.+)$", str(error).split("You can check full logs")[0], re.MULTILINE)
    name, reason = found[-1] if found else ("", _one_line(error))
    return reason if name in ("UsageError", "WorkError") else f"a job of the sweep failed: {name}: {reason}"


def _check_grammar(arguments: Sequence[str], config_name: str) -> None:
    """Raises UsageError for the first argument that Hydra could not read, or would take as another command."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, sweeps = OverridesParser.create(), {"-m", "--multirun"} & set(arguments)
    for argument in arguments:
        if argument[:1] == "-" or not ("=" in argument or argument[:1] in "+~"):
            continue
        try:
            override = parser.parse_override(argument)
        except HydraException as error:
            raise UsageError(f"{argument}: cannot be read as NAME=VALUE ({_one_line(error)})") from error
        name = override.key_or_group
        if not name or (argument[0] in "+~" and not name.startswith("hydra")):
            raise UsageError(unknown_option(argument.partition("=")[0], config_name))
        if override.is_sweep_override() and not sweeps:
            raise UsageError(f"{argument}: give one value; a list is written [A,B]")
        if override.value() is None and name in dict(_groups(config_name)):
            raise UsageError(f"{name}=null: choose one of {', '.join(_choices(name))}")


@contextmanager
def _as_hydra_wants_it(argv: list[str]) -> Iterator[None]:
    """Hydra reads `sys.argv`, and told so by the environment it raises instead of printing and exiting."""
    saved_argv, saved_setting = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = argv, "1"
    try:
        yield
    finally:
        sys.argv = saved_argv
        del os.environ["HYDRA_FULL_ERROR"]
        if saved_setting is not None:
            os.environ["HYDRA_FULL_ERROR"] = saved_setting


def _option_error(error: Exception, config_name: str) -> str | None:
    """One line for what Hydra or OmegaConf refused, or None if the error is not about an option."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        return None
    text = str(error)
    if match := re.search(r"Could not override '([^']*)'", text):
        return unknown_option(match[1], config_name)
    if match := re.search(r"(?:Could not find|In '[^']*': Could not find) '([^'/]*)/([^']*)'", text):
        choices = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        return f"{match[1]}={match[2]}: choose one of {', '.join(choices) or '(nothing)'}"
    return f"the options cannot be read: {_one_line(error)}"


def unknown_option(name: str, config_name: str) -> str:
    """The error for an option that does not exist, with the nearest one that does."""
    known = re.findall(r"^([\w.]+):|^  - (\w+):", help_text(config_name, ""), re.MULTILINE)
    names = {option or group for option, group in known} - {"defaults"}
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]}=? " if near else ""
    return f"{name}= is no option: {hint}--help lists all"


def _groups(config_name: str) -> list[tuple[str, str]]:
    """The groups of a config, each with its default choice."""
    return re.findall(r"^  - (\w+): (\w+)$", _config_text(config_name), re.MULTILINE)


def _choices(group: str) -> list[str]:
    names = (file.name for file in (files("localization_heads") / "config" / group).iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def _config_text(config_name: str) -> str:
    return (files("localization_heads") / "config" / f"{config_name}.yaml").read_text(encoding="utf-8")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\nSee ")[0].split())[:400]


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    sys.stderr.write(printable(f"error: {message}\n"))
    return status
