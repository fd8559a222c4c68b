"""Parse a command line into checked options, and turn every error into one line and an exit status.

Hydra composes the options. Before that, free text is quoted for Hydra's grammar, and mistakes get error messages of
our own. `-q` and `-v` set how much a command prints; errors are always printed.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partialmethod
from typing import Any, NamedTuple

from localization_heads.errors import UsageError, WorkError, printable
from localization_heads.version import __version__

QUIET, VERBOSE = {"-q", "--quiet"}, {"-v", "--verbose"}
HELP = """\
-q, --quiet    no progress bars, no tables, no notes: errors and the exit status alone
-v, --verbose  also what was loaded and how long it took"""

is_quiet = False


class _NoteFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextmanager
def verbosity(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Apply `-q` and `-v` while the block runs; yields the other arguments."""
    global is_quiet
    given = set(arguments)
    is_quiet = bool(given & QUIET)
    level = logging.ERROR if is_quiet else logging.INFO if given & VERBOSE else logging.WARNING
    handler = logging.StreamHandler()
    handler.setFormatter(_NoteFormatter("note: %(message)s"))
    package = logging.getLogger("localization_heads")
    package.handlers[:], package.propagate = [handler], False
    package.setLevel(level)
    try:
        with _no_progress_bars() if is_quiet else nullcontext():
            yield [argument for argument in arguments if argument not in QUIET | VERBOSE]
    finally:
        is_quiet = False


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Disable tqdm's progress bars, including those of libraries."""
    from tqdm import tqdm

    before = tqdm.__init__
    tqdm.__init__ = partialmethod(before, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = before


SETUP_HINT = (
    "lacks what this needs: `make setup`, then `source .venv/bin/activate`; "
    "or `pip install -r requirements.txt` in an environment of your own"
)

_QUOTED_FOR_HYDRA = re.compile(r"""'[^'\\]+'|"[^"\\]+\"""")  # quoted by the user, for Hydra
_LIST_ITEM = re.compile(r"""\s*('[^'\\]+'|"[^"\\]+"|[^,]*?)\s*(?:,|\Z)""")  # one item of a list


class CommandLine(NamedTuple):
    """A parsed command line: the checked options, the selected model preset, and the overrides as written."""

    options: Any
    model_choice: str
    overrides: tuple[str, ...]


def run(main: Callable[[CommandLine], int], config_name: str, program: str, argv: Sequence[str] | None = None) -> int:
    """Compose and check the options of `config_name`, call `main` with them, and return the exit status.

    The status is 0 for success, 1 if some work failed and 2 for wrong use. An error is one line on standard error; a
    traceback is shown only with `debug=true` or `HYDRA_FULL_ERROR=1`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "-h"} & set(arguments):
        sys.stdout.write(help_text(config_name, program))
        return 0
    if "--version" in arguments:
        sys.stdout.write(f"localization-heads {__version__}\n")
        return 0
    debug = "debug=true" in [a.lower() for a in arguments] or os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        with verbosity(arguments) as options:
            return _run_hydra(main, config_name, program, options)
    except KeyboardInterrupt:
        return _report_error(
            "interrupted; what was finished is kept, and the same command goes on from there", 130, debug
        )
    except (UsageError, WorkError) as error:
        return _report_error(str(error), error.exit_status, debug)
    except Exception as error:
        if (message := _option_error(error, config_name)) is not None:
            return _report_error(message, UsageError.exit_status, debug)
        return _report_error(f"{type(error).__name__}: {_one_line(error)} (debug=true shows where)", 1, debug)


def called_as() -> str:
    """The command as typed: `python x.py`, `python -m package` or the name of a console script."""
    name = os.path.basename(sys.argv[0])  # noqa: PTH119  (Path("").name is not "")
    if not name.endswith(".py"):
        return name
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else f"python {name}"


def help_text(config_name: str, program: str) -> str:
    """The usage line and every option of a program."""
    try:
        from localization_heads.options.compose import help_text as options_text
    except ModuleNotFoundError:
        return f"{sys.executable} {SETUP_HINT}\n"
    return f"usage: {program} [-q | -v] [--version] [NAME=VALUE ...]\n\n{HELP.strip()}\n\n{options_text(config_name)}"


def quote_free_text(argument: str, sweeps: bool = False, config_name: str = "finder") -> str:
    """Quote the value of a free-text option for Hydra, so that users need only quote for their shell.

    Args:
        argument: `NAME=VALUE`; returned unchanged if the option takes no free text.
        sweeps: whether this is a multirun, in which Hydra reads a list of values as a sweep.

    >>> quote_free_text("query=the dog, on the left"), quote_free_text("exclude=[a b.jsonl,c=d.jsonl]")
    ("query='the dog, on the left'", "exclude=['a b.jsonl','c=d.jsonl']")
    """
    from localization_heads.options.compose import option_names
    from localization_heads.options.declaration import read_as

    name, equals, value = argument.partition("=")
    kind = read_as(field) if (field := option_names(config_name).get(name)) else "value"
    if not equals or kind == "value" or value in ("", "null"):
        return argument
    if kind in ("texts", "paths"):
        if sweeps or value == "[]":
            return argument
        if value[0] == "[" and value[-1] == "]":
            items = [item for item in _LIST_ITEM.findall(value[1:-1] + ",")[:-1] if item]
            return f"{name}=[{','.join(map(_quoted, items))}]"
    return f"{name}={_quoted(value)}"


def _quoted(value: str) -> str:
    if _QUOTED_FOR_HYDRA.fullmatch(value):
        return value
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # no OmegaConf interpolation
    value = re.sub(r"(\\+)(?='|\Z)", r"\1\1", value)  # backslashes before a quote would escape it
    value = value.replace("'", "\\'")
    return f"'{value}'"


def _run_hydra(main: Callable[[CommandLine], int], config_name: str, program: str, arguments: list[str]) -> int:
    try:
        import hydra
        from hydra.core.hydra_config import HydraConfig

        from localization_heads.options.compose import implied_overrides, register, validate
    except ModuleNotFoundError:
        raise UsageError(f"{sys.executable} {SETUP_HINT}") from None
    register(config_name)
    flags, overrides, sweeps = _split_flags(arguments)
    for index, word in enumerate(overrides):
        if word[:1] == "-" or ("=" not in word and word[:1] not in ("+", "~")):
            raise UsageError(_stray_word_error(overrides, index, config_name))
    if config_name == "finder":
        overrides = [re.sub("^steer=", "ablate.steer=", override) for override in overrides]
    overrides = [quote_free_text(override, sweeps, config_name) for override in overrides]
    only_our_presets = not any(
        argument.startswith(("-cd", "--config-d", "hydra.searchpath=")) for argument in arguments
    )
    _check_grammar(overrides, config_name, sweeps, only_our_presets)
    overrides += implied_overrides(config_name, overrides)
    statuses: list[int] = []
    errors: list[BaseException] = []
    main_process = _process_id()

    def job(cfg: Any) -> None:
        try:
            options = validate(config_name, cfg)  # first, since an override may hold an invalid interpolation
            hydra_config = HydraConfig.get()
            model = hydra_config.runtime.choices.get("model", "")
            status = main(CommandLine(options, model, tuple(hydra_config.overrides.task)))
        except BaseException as error:  # Hydra would print another line about it
            if _process_id() != main_process:
                raise
            errors.append(error)
            return
        if _process_id() != main_process and status:
            raise WorkError(f"a job of the sweep ended with status {status}; its log says why")
        statuses.append(status)

    entry = hydra.main(version_base="1.3", config_path="pkg://localization_heads.config", config_name=config_name)(job)
    with _hydra_environment([program, *flags, *overrides]):
        try:
            entry()
        except Exception as error:
            if not type(error).__module__.startswith("submitit"):
                raise
            raise WorkError(_job_error(error)) from error
    if errors:
        raise errors[0]
    return max(statuses, default=0)


def _process_id() -> tuple[str, int]:
    """Host and process: a Hydra launcher may run the jobs of a sweep elsewhere, from where only errors come back."""
    return platform.node(), os.getpid()


def _job_error(error: Exception) -> str:
    """The message of the last exception in the traceback that submitit returns."""
    matches = re.findall(r"^[\w.]*?(\w+): (.+)$", str(error).split("You can check full logs")[0], re.MULTILINE)
    name, reason = matches[-1] if matches else ("", _one_line(error))
    return reason if name in ("UsageError", "WorkError") else f"a job of the sweep failed: {name}: {reason}"


def _split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """Hydra's flags with their values, the overrides (`NAME=VALUE`), and whether the flags request a multirun."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        known, unknown = parser.parse_known_intermixed_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(f"{_one_line(error)}; --help lists all options") from None
    overrides = [word for word in arguments if word in known.overrides or word in unknown]
    return [flag for flag in arguments if flag not in overrides], overrides, bool(known.multirun)


def _stray_word_error(words: Sequence[str], index: int, config_name: str) -> str:
    """The error for a word that is not `NAME=VALUE`: part of an unquoted text, or an option without its value."""
    from localization_heads.options.compose import option_names
    from localization_heads.options.declaration import did_you_mean, read_as

    word, previous = words[index], words[index - 1] if index else ""
    previous_option = option_names(config_name).get(previous.partition("=")[0])
    if previous_option is not None and read_as(previous_option) != "value":
        rest = [previous, *words[index:]]
        stop = next((i for i, other in enumerate(rest) if i and "=" in other), len(rest))
        quoted = shlex.quote(" ".join(rest[:stop]))
        return f"{word[:200]} belongs to no option; a text with spaces needs quotes: {quoted[:400]}"
    if word in _option_and_group_names(config_name):
        return f"{word} has no value: write {word}=VALUE; --help lists all options"
    hint = did_you_mean(word[:200], _option_and_group_names(config_name))
    return f"{word[:200]}: write NAME=VALUE; {hint}--help lists all options"


def _check_grammar(overrides: Sequence[str], config_name: str, sweeps: bool, only_our_presets: bool) -> None:
    """Raise UsageError for the first override that Hydra cannot read or would misinterpret.

    Args:
        only_our_presets: whether the groups have no presets from a config folder of the user's.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from localization_heads.options.compose import choices_of, default_choices

    parser, groups = OverridesParser.create(), default_choices(config_name)
    for override in overrides:
        try:
            parsed = parser.parse_override(override)
        except (HydraException, RecursionError, ValueError) as error:  # ValueError: a number of 5,000 digits
            raise UsageError(_grammar_error(override, error, groups, config_name)) from error
        name = parsed.key_or_group
        if not name or (override[0] in "+~" and not name.startswith("hydra")):
            raise UsageError(_unknown_option_error(override.partition("=")[0], config_name))
        if parsed.is_sweep_override():
            if not sweeps:
                raise UsageError(f"{override[:200]}: give one value; a list is written [A,B]")
        elif name in groups and only_our_presets and parsed.value() not in choices_of(name):
            raise UsageError(_unknown_choice_error(name, override.partition("=")[2], config_name))
        elif (name in groups or "/" in name) and not isinstance(parsed.value(), str):
            raise UsageError(f"{override[:200]}: name one choice of {name}")


def _grammar_error(argument: str, error: Exception, groups: Mapping[str, str], config_name: str) -> str:
    """The error for an override that Hydra's grammar refuses, with what the option takes if it is known."""
    from localization_heads.options.compose import option_names
    from localization_heads.options.declaration import describe_requirement

    name, _, value = argument.partition("=")
    if name in groups:
        return _unknown_choice_error(name, value, config_name)
    if field := option_names(config_name).get(name):
        return f"{argument[:200]}: {describe_requirement(field, value)}"
    return f"{argument[:200]}: cannot be read as NAME=VALUE ({_one_line(error)})"


def _unknown_choice_error(group: str, value: str, config_name: str) -> str:
    """The error for a preset that a group does not have."""
    from localization_heads.options.compose import choices_of, option_names
    from localization_heads.options.declaration import did_you_mean, read_as

    choices = choices_of(group)
    name = option_names(config_name).get(f"{group}.name")
    takes_path = name is not None and read_as(name) == "path"
    hint = did_you_mean(value, choices)
    if "/" in value and takes_path:
        hint = f"write {group}.name= for a Hugging Face id or a folder, or "
    return f"{group}={value[:200]}: {hint}choose one of {', '.join(choices)}"


@contextmanager
def _hydra_environment(argv: list[str]) -> Iterator[None]:
    """Set `sys.argv`, which Hydra reads, and HYDRA_FULL_ERROR, with which it raises instead of exiting."""
    before = sys.argv
    sys.argv = argv
    try:
        with environment(HYDRA_FULL_ERROR="1"):
            yield
    finally:
        sys.argv = before


@contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Set environment variables while the block runs; None removes one."""
    before = {name: os.environ.get(name) for name in values}
    _set_environment(values)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _option_error(error: Exception, config_name: str) -> str | None:
    """A one-line message for an error of Hydra or OmegaConf, None if the error is not about an option."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        return None
    text = str(error)
    if match := re.search(r"Could not override '([^']*)'", text):
        return _unknown_option_error(match[1], config_name)
    if match := re.match(r"Interpolation key '([^']*)' not found\s+full_key: (\S+)", text):
        return f"{match[2]}=${{{match[1]}}}: there is no option {match[1]}"
    if match := re.match(r"Error merging override (.*)", text):
        return f"{match[1][:200]}: it takes no value of this form; --help shows one that fits"
    return f"the options cannot be read: {_one_line(error)}"


def _unknown_option_error(name: str, config_name: str) -> str:
    """The error for an option that does not exist, with the most similar one."""
    from localization_heads.options.declaration import did_you_mean

    near = did_you_mean(name, [f"{option}=" for option in _option_and_group_names(config_name)])
    return f"{name[:200]}= is no option: {near}--help lists all"


def _option_and_group_names(config_name: str) -> list[str]:
    """The names of all options and groups on the command line."""
    from localization_heads.options.compose import default_choices, option_names

    return sorted({*option_names(config_name), *default_choices(config_name)})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\nSee ")[0].split())[:400]


def _report_error(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    sys.stderr.write(printable(f"error: {message}\n"))
    return status
