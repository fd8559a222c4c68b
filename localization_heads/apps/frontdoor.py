"""From the words of a command line to checked options, and from whatever goes wrong to one line and an exit status.

Hydra composes the options; in front of it, free text is quoted for its grammar and mistakes are named in our words.
`-q` and `-v` say how much a command prints; what went wrong is always printed.
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


class _Notes(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextmanager
def verbosity(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Obey `-q` and `-v` while the block runs; gives the other arguments."""
    global is_quiet
    given = set(arguments)
    is_quiet = bool(given & QUIET)
    level = logging.ERROR if is_quiet else logging.INFO if given & VERBOSE else logging.WARNING
    handler = logging.StreamHandler()
    handler.setFormatter(_Notes("note: %(message)s"))
    package = logging.getLogger("localization_heads")
    package.handlers[:], package.propagate = [handler], False
    package.setLevel(level)
    try:
        with _no_bars() if is_quiet else nullcontext():
            yield [argument for argument in arguments if argument not in QUIET | VERBOSE]
    finally:
        is_quiet = False


@contextmanager
def _no_bars() -> Iterator[None]:
    """Switch progress bars off, also those of libraries."""
    from tqdm import tqdm

    before = tqdm.__init__
    tqdm.__init__ = partialmethod(before, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = before


NOT_SET_UP = (
    "lacks what this needs: `make setup`, then `source .venv/bin/activate`; "
    "or `pip install -r requirements.txt` in an environment of your own"
)

_QUOTED = re.compile(r"""'[^'\\]+'|"[^"\\]+\"""")  # by a user who knows Hydra
_ITEM = re.compile(r"""\s*('[^'\\]+'|"[^"\\]+"|[^,]*?)\s*(?:,|\Z)""")  # of a list


class Given(NamedTuple):
    """What a command line says: its options, the model preset that was chosen, and the words as they were written."""

    options: Any
    model_choice: str
    overrides: tuple[str, ...]


def run(
    main: Callable[[Given], int], config_name: str, program: str, argv: Sequence[str] | None = None
) -> int:
    """Compose and check the options of `config_name` and call `main` with them; returns the exit status.

    0 all went well, 1 some work failed, 2 wrong use; an error is one line on standard error. A traceback is
    shown only with `debug=true` or `HYDRA_FULL_ERROR=1`.
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
        return _fail(
            "interrupted; what was finished is kept, and the same command goes on from there", 130, debug
        )
    except (UsageError, WorkError) as error:
        return _fail(str(error), error.exit_status, debug)
    except Exception as error:
        if (message := _option_error(error, config_name)) is not None:
            return _fail(message, UsageError.exit_status, debug)
        return _fail(f"{type(error).__name__}: {_one_line(error)} (debug=true shows where)", 1, debug)


def called_as() -> str:
    """The command as it was typed: `python x.py`, `python -m package` or the name of a console script."""
    name = os.path.basename(sys.argv[0])  # noqa: PTH119  (Path("") has a name of its own)
    if not name.endswith(".py"):
        return name
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else f"python {name}"


def help_text(config_name: str, program: str) -> str:
    """How the program is called, and every option of it."""
    try:
        from localization_heads.options.compose import help_text as options_text
    except ModuleNotFoundError:
        return f"{sys.executable} {NOT_SET_UP}\n"
    return f"usage: {program} [-q | -v] [--version] [NAME=VALUE ...]\n\n{HELP.strip()}\n\n{options_text(config_name)}"


def quote_free_text(argument: str, sweeps: bool = False, config_name: str = "finder") -> str:
    """Quote the value of a free-text option for Hydra, so that users need only quote for their shell.

    Args:
        argument: `NAME=VALUE`; what is no text stays as it is.
        sweeps: whether a list of options may be swept over: those that take lists are then Hydra's to read.

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
            items = [item for item in _ITEM.findall(value[1:-1] + ",")[:-1] if item]
            return f"{name}=[{','.join(map(_quoted, items))}]"
    return f"{name}={_quoted(value)}"


def _quoted(value: str) -> str:
    if _QUOTED.fullmatch(value):
        return value
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # text, not an interpolation of OmegaConf's
    value = re.sub(r"(\\+)(?='|\Z)", r"\1\1", value)  # backslashes before a quote would escape it
    value = value.replace("'", "\\'")
    return f"'{value}'"


def _run_hydra(main: Callable[[Given], int], config_name: str, program: str, arguments: list[str]) -> int:
    try:
        import hydra
        from hydra.core.hydra_config import HydraConfig

        from localization_heads.options.compose import implied_overrides, register, validate
    except ModuleNotFoundError:
        raise UsageError(f"{sys.executable} {NOT_SET_UP}") from None
    register(config_name)
    flags, words, sweeps = _flags_and_words(arguments)
    for place, word in enumerate(words):
        if word[:1] == "-" or ("=" not in word and word[:1] not in ("+", "~")):
            raise UsageError(_loose_word(words, place, config_name))
    if config_name == "finder":
        words = [re.sub("^steer=", "ablate.steer=", word) for word in words]
    words = [quote_free_text(word, sweeps, config_name) for word in words]
    own_choices = not any(word.startswith(("-cd", "--config-d", "hydra.searchpath=")) for word in arguments)
    _check_grammar(words, config_name, sweeps, own_choices)
    words += implied_overrides(config_name, words)
    statuses: list[int] = []
    problems: list[BaseException] = []
    here = _process()

    def job(cfg: Any) -> None:
        try:
            options = validate(config_name, cfg)  # first: the overrides may hold what cannot be resolved
            chosen = HydraConfig.get()
            model, overrides = chosen.runtime.choices.get("model", ""), tuple(chosen.overrides.task)
            status = main(Given(options, model, overrides))
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
    with _as_hydra_wants_it([program, *flags, *words]):
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


def _flags_and_words(arguments: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """Hydra's own flags with their values, the words (`NAME=VALUE`), and whether the flags ask for a sweep."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        known, unknown = parser.parse_known_intermixed_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(f"{_one_line(error)}; --help lists all options") from None
    words = [word for word in arguments if word in known.overrides or word in unknown]
    return [flag for flag in arguments if flag not in words], words, bool(known.multirun)


def _loose_word(words: Sequence[str], place: int, config_name: str) -> str:
    """The error for a word that the shell has cut off a text, or that lacks its value."""
    from localization_heads.options.compose import option_names
    from localization_heads.options.declaration import did_you_mean, read_as

    word, before = words[place], words[place - 1] if place else ""
    cut_off = option_names(config_name).get(before.partition("=")[0])
    if cut_off is not None and read_as(cut_off) != "value":
        rest = [before, *words[place:]]
        stop = next((i for i, other in enumerate(rest) if i and "=" in other), len(rest))
        whole = shlex.quote(" ".join(rest[:stop]))
        return f"{word[:200]} belongs to no option; a text with spaces needs quotes: {whole[:400]}"
    if word in _names(config_name):
        return f"{word} has no value: write {word}=VALUE; --help lists all options"
    word = word[:200]
    return f"{word}: write NAME=VALUE; {did_you_mean(word, _names(config_name))}--help lists all options"


def _check_grammar(words: Sequence[str], config_name: str, sweeps: bool, own_choices: bool) -> None:
    """Raises UsageError for the first word that Hydra could not read, or would take as another command.

    Args:
        own_choices: whether the groups have our choices alone, and not those of another folder as well.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from localization_heads.options.compose import choices_of, default_choices

    parser, groups = OverridesParser.create(), default_choices(config_name)
    for word in words:
        try:
            override = parser.parse_override(word)
        except (HydraException, RecursionError, ValueError) as error:  # of 5,000 digits
            raise UsageError(_unreadable(word, error, groups, config_name)) from error
        name = override.key_or_group
        if not name or (word[0] in "+~" and not name.startswith("hydra")):
            raise UsageError(unknown_option(word.partition("=")[0], config_name))
        if override.is_sweep_override():
            if not sweeps:
                raise UsageError(f"{word[:200]}: give one value; a list is written [A,B]")
        elif name in groups and own_choices and override.value() not in choices_of(name):
            raise UsageError(_no_choice(name, word.partition("=")[2], config_name))
        elif (name in groups or "/" in name) and not isinstance(override.value(), str):
            raise UsageError(f"{word[:200]}: name one choice of {name}")


def _unreadable(argument: str, error: Exception, groups: Mapping[str, str], config_name: str) -> str:
    """The error for an argument that Hydra's grammar refuses: what the option takes, where that is the trouble."""
    from localization_heads.options.compose import option_names
    from localization_heads.options.declaration import describe_requirement

    name, _, value = argument.partition("=")
    if name in groups:
        return _no_choice(name, value, config_name)
    if field := option_names(config_name).get(name):
        return f"{argument[:200]}: {describe_requirement(field, value)}"
    return f"{argument[:200]}: cannot be read as NAME=VALUE ({_one_line(error)})"


def _no_choice(group: str, value: str, config_name: str) -> str:
    """The error for a choice that a group does not have."""
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
def _as_hydra_wants_it(argv: list[str]) -> Iterator[None]:
    """Hydra reads `sys.argv`, and told so by the environment it raises instead of printing and exiting."""
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
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _option_error(error: Exception, config_name: str) -> str | None:
    """One line for what Hydra or OmegaConf refused, or None if the error is not about an option."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        return None
    text = str(error)
    if match := re.search(r"Could not override '([^']*)'", text):
        return unknown_option(match[1], config_name)
    if match := re.match(r"Interpolation key '([^']*)' not found\s+full_key: (\S+)", text):
        return f"{match[2]}=${{{match[1]}}}: there is no option {match[1]}"
    if match := re.match(r"Error merging override (.*)", text):
        return f"{match[1][:200]}: it takes no value of this form; --help shows one that fits"
    return f"the options cannot be read: {_one_line(error)}"


def unknown_option(name: str, config_name: str) -> str:
    """The error for an option that does not exist, with the nearest one that does."""
    from localization_heads.options.declaration import did_you_mean

    near = did_you_mean(name, [f"{option}=" for option in _names(config_name)])
    return f"{name[:200]}= is no option: {near}--help lists all"


def _names(config_name: str) -> list[str]:
    """Every option and every group, as the command line knows them."""
    from localization_heads.options.compose import default_choices, option_names

    return sorted({*option_names(config_name), *default_choices(config_name)})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\nSee ")[0].split())[:400]


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    sys.stderr.write(printable(f"error: {message}\n"))
    return status
