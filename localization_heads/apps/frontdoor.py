"""What the three front doors share: help without imports, options from Hydra, errors for people."""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

from localization_heads.errors import UsageError, WorkError

FREE_TEXT = (
    "query",
    "image_file",
    "attention_file",
    "data_file",
    "output_dir",
    "save_id",
    "model.name",
    "model.system",
)
"""Options whose value is any text. Hydra's grammar would trip over their commas, quotes and equals signs."""


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
    _log_to_stderr()
    try:
        return _run_hydra(main, config_name, program, [quote_free_text(a) for a in arguments])
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
    groups = re.findall(r"^  - (\w+): (\w+)$", text, re.MULTILINE)
    text = re.sub(r"\n  - (_self_|override [^\n]*)", "", text)
    parts = [f"usage: {program} [NAME=VALUE ...]", text, *(_group_help(*group) for group in groups)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _group_help(group: str, choice: str) -> str:
    """The options of a group, under the names that the command line knows them by."""
    text = re.sub(r"^(?=\w)", f"{group}.", _config_text(f"{group}/{choice}"), flags=re.MULTILINE)
    return f"# --- {group}={choice} {'-' * (100 - len(group) - len(choice))}\n{text}"


def quote_free_text(argument: str) -> str:
    """Quote the value of a free-text option for Hydra, so that users need only quote for their shell.

    >>> quote_free_text("query=the dog, on the left")
    "query='the dog, on the left'"
    """
    name, equals, value = argument.partition("=")
    if not equals or name not in FREE_TEXT or value in ("", "null"):
        return argument
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return argument  # already quoted for Hydra
    value = re.sub(r"(\\+)(?='|$)", r"\1\1", value)  # backslashes before a quote would escape it
    value = value.replace("'", "\\'").replace("${", "\\${")
    return f"{name}='{value}'"


def plain_options(cfg: Any) -> dict[str, Any]:
    """The composed options as plain values, interpolations resolved."""
    from omegaconf import OmegaConf

    options = OmegaConf.to_container(cfg, resolve=True)
    return {str(name): value for name, value in options.items()} if isinstance(options, dict) else {}


def _run_hydra(main: Callable[[Any], int], config_name: str, program: str, arguments: list[str]) -> int:
    import hydra

    for argument in arguments:
        if argument.startswith("+") and not argument.lstrip("+").startswith("hydra"):
            raise UsageError(unknown_option(argument.lstrip("+").partition("=")[0], config_name))
    statuses: list[int] = []
    problems: list[BaseException] = []

    def job(cfg: Any) -> None:
        try:
            statuses.append(main(cfg))
        except BaseException as error:  # Hydra would print a line of its own about it
            problems.append(error)

    saved, sys.argv = sys.argv, [program, *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and exiting: we print
    try:
        hydra.main(
            version_base="1.3", config_path="pkg://localization_heads.config", config_name=config_name
        )(job)()
    finally:
        sys.argv = saved
    if problems:
        raise problems[0]
    return max(statuses, default=0)


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


def _config_text(config_name: str) -> str:
    return (files("localization_heads") / "config" / f"{config_name}.yaml").read_text(encoding="utf-8")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    sys.stderr.write(f"error: {message}\n")
    return status


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("note: %(message)s"))
    package = logging.getLogger("localization_heads")
    package.handlers[:] = [handler]
    package.propagate = False
