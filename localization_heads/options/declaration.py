"""How options are declared and validated: types of values, the decorator `options`, and error messages.

An option is a typed field with a default and a sentence. Validation, error messages, `--help`, the tables of the docs
and Hydra's config are all generated from that one declaration. Needs neither torch nor numpy.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import wraps
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
    TypeVar,
    Union,
    cast,
    dataclass_transform,
    get_args,
    get_origin,
)

import annotated_types
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo

from localization_heads.errors import UsageError, printable
from localization_heads.store.paths import check_id, expand_home

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""No coercion: `true` is not 1 and "3" is not 3. Infinities and NaN are rejected."""

Kind = TypeVar("Kind", bound="type[Options]")


class OptionError(UsageError, ValueError):
    """An option has an invalid value.

    Args:
        name: the option's name in its class.
        advice: its value, and what it accepts.
    """

    def __init__(self, name: str, advice: str) -> None:
        super().__init__(f"{name}={advice}")
        self.name, self.advice = name, advice


@dataclass_transform(frozen_default=True)
def options(kind: Kind) -> Kind:
    """Class decorator: a frozen, strict pydantic dataclass that raises OptionError with a message of one line."""
    decorated: Any = pydantic_dataclass(frozen=True, config=_STRICT)(kind)
    validating_init = decorated.__init__

    @wraps(validating_init)
    def init(self: Any, *values: Any, **named: Any) -> None:
        try:
            validating_init(self, *values, **named)
        except ValidationError as error:
            raise _one_line_error(type(self), error) from None
        _check_kinds(self)

    decorated.__init__ = init
    return cast(Kind, decorated)


def _check_kinds(values: Any) -> None:
    """Raise OptionError for an option that is set although the selected `kind` ignores it."""
    for name, field in type(values).__pydantic_fields__.items():
        value = getattr(values, name)
        if value != field.default and not _is_active(values, field):
            kinds = " or ".join(option_metadata(field)["kinds"])
            raise OptionError(name, f"{format_value(value)}: only {kinds} reads it, and not {values.kind}")


def _is_active(values: Any, field: FieldInfo) -> bool:
    kinds = option_metadata(field).get("kinds")
    return not kinds or values.kind in kinds


def active_values(values: Options) -> dict[str, Any]:
    """The values of a group by name, without those that its `kind` ignores."""
    fields = type(values).__pydantic_fields__
    return {name: getattr(values, name) for name, field in fields.items() if _is_active(values, field)}


def first_changed_option(name: str, value: Any) -> str:
    """`name` for a single option; for a group, the first option in it that is not at its default."""
    fields = type(value).__pydantic_fields__ if isinstance(value, Options) else {}
    return next((f"{name}.{own}" for own, f in fields.items() if getattr(value, own) != f.default), name)


def measured_values(values: Options) -> dict[str, Any]:
    """The values of a group that stored statistics depend on, by name."""
    fields = type(values).__pydantic_fields__
    return {name: getattr(values, name) for name, field in fields.items() if option_metadata(field).get("measured")}


def _one_line_error(kind: type[Options], error: ValidationError) -> Exception:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, OptionError):  # raised by a validator of several options together
        return cause
    location, value = first["loc"][0] if first["loc"] else "", first["input"]
    name = list(kind.__pydantic_fields__)[location] if isinstance(location, int) else location
    if name not in kind.__pydantic_fields__:
        return TypeError(f"{kind.__name__}: {first['msg']}: {name}")
    if len(first["loc"]) > 1 and isinstance(first["loc"][1], int):
        value = f"... {value} ..."  # an item of a list
    field = kind.__pydantic_fields__[name]
    return OptionError(name, f"{format_value(value)}: {describe_requirement(field, value)}")


@dataclasses.dataclass(frozen=True)
class Requirement:
    """What a value must be, in words, if the type alone does not express it."""

    sentence: str


@dataclasses.dataclass(frozen=True)
class ReadAs:
    """How the command line parses an option instead of by Hydra's grammar.

    A `text` is taken literally; so is a `path`, with `~` expanded. `texts` and `paths` are one or a list `[A,B]`.
    Options without this mark are parsed by Hydra's grammar.
    """

    kind: Literal["text", "texts", "path", "paths"]


def _as_text(value: Any) -> Any:
    """Accept a number for an option that takes text."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if is_number else value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("blank")
    return value


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("even")
    return value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _one_or_several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _as_tuple(value)


def _template(text: str) -> str:
    """ValueError unless a paraphrase has exactly one place for the expression."""
    if text.count("{}") != 1:
        raise ValueError
    return text


def _image_choice(value: Any) -> Any:
    """One image, or a tuple of two or more."""
    is_list = isinstance(value, (list, tuple))
    texts = [_as_text(item) for item in (value if is_list else [value])]
    if (is_list and len(texts) < 2) or not all(isinstance(text, str) for text in texts):
        raise ValueError
    images = tuple(expand_home(_not_blank(text)) for text in texts)
    return images if is_list else images[0]


def _head_choice(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(expand_home(str(item)) for item in value)
    looks_like_list = isinstance(value, str) and ("," in value or value[:1] == "[") and not value.endswith(".json")
    if looks_like_list or isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ValueError("no heads")
    return expand_home(str(value))


Word = Annotated[str, BeforeValidator(_as_text), AfterValidator(_not_blank)]
"""A short text in Hydra's grammar, so that it can be swept over."""
Text = Annotated[str, BeforeValidator(_as_text), AfterValidator(_not_blank), ReadAs("text")]
"""A literal text that is not blank."""
Sentence = Annotated[str, ReadAs("text")]
"""A literal text that may be empty."""
PathText = Annotated[Text, AfterValidator(expand_home), ReadAs("path")]
"""A path with `~` expanded; or an address or a name if the option's sentence says so."""
FolderPath = Annotated[PathText, Requirement("give a folder")]
FolderName = Annotated[Text, AfterValidator(check_id), Requirement("give a plain folder name")]
"""A single path component, since files are written into the folder."""
Fraction = Annotated[float, Field(gt=0, le=1), Requirement("give a number above 0 and at most 1")]
OddInt = Annotated[int, Field(ge=1, le=63), AfterValidator(_odd), Requirement("give an odd number from 1 to 63")]
FromList = BeforeValidator(_as_tuple)
"""For a field of type tuple: also accepts a list, as Hydra gives it."""
Item = TypeVar("Item")
OneOrMore = Annotated[tuple[Item, ...], BeforeValidator(_one_or_several), ReadAs("paths")]
Paraphrases = Annotated[
    tuple[Annotated[Text, AfterValidator(_template)], ...],
    BeforeValidator(_one_or_several),
    ReadAs("texts"),
    Field(min_length=1, max_length=8),
    Requirement("write one to eight templates, each with one {}, such as [the {},a {}]"),
]
"""Templates that the expression is inserted into."""
ImageChoice = Annotated[
    Any,
    AfterValidator(_image_choice),
    ReadAs("paths"),
    Requirement("give an image, or a list of two or more, such as [a.jpg,b.jpg]"),
]
"""The path or address of an image, or a tuple of several."""
HeadChoice = Annotated[
    Any,
    AfterValidator(_head_choice),
    ReadAs("paths"),
    Requirement("write auto, greedy, a heads.json, a hub repository user/repo, or a list such as [14-24,14-13]"),
]
"""A name, or a tuple of heads; resolved by `head_choice.choose_heads`."""


def option(
    default: Any,
    sentence: str,
    *,
    section: str = "",
    choice: str = "",
    stages: tuple[str, ...] = (),
    kinds: tuple[str, ...] = (),
    measured: bool = False,
    **limits: Any,
) -> Any:
    """Declare an option: its default, the sentence that explains it, and pydantic's limits `ge`, `gt`, `le`, `lt`.

    Args:
        section: heading, in `--help` and the docs, of this option and those after it.
        choice: for a group: the default preset.
        stages: the stages that use the option; empty for all.
        kinds: for an option of a group with a `kind`: the kinds that use it; empty for all.
        measured: for a criterion: whether a sample's statistics depend on it, so that a new value needs the maps again.
    """
    metadata: dict[str, Any] = {
        "section": section,
        "choice": choice,
        "stages": list(stages),
        "kinds": list(kinds),
        "measured": measured,
    }
    return Field(default, description=sentence, json_schema_extra=metadata, **limits)


def option_metadata(field: FieldInfo) -> dict[str, Any]:
    """The arguments of `option` other than default, sentence and limits."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


class Options:
    """Base class of all option classes, which are frozen pydantic dataclasses."""

    __pydantic_fields__: ClassVar[dict[str, FieldInfo]]
    EXTRA_GROUPS: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Groups whose presets set options of the program itself: name -> (default choice, sentence)."""

    @classmethod
    def of(cls, values: Mapping[str, Any], prefix: str = "") -> Self:
        """Create from plain values, as Hydra composes them; missing options keep their defaults.

        Raises:
            UsageError: an unknown option or an invalid value; the message names the first one and what it accepts.
        """
        known = cls.__pydantic_fields__
        given = {}
        for name, value in values.items():
            if name not in known:
                raise UsageError(f"{prefix}{name} is no option")
            group = option_group(known[name])
            if group and isinstance(value, Mapping):
                value = group.of(value, f"{prefix}{name}.")
            given[name] = value
        try:
            return cls(**given)
        except OptionError as error:
            raise OptionError(f"{prefix}{error.name}", error.advice) from None


def option_group(field: FieldInfo) -> type[Options] | None:
    """The class of a group of options; None for a single option."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Options) else None


def format_value(value: Any) -> str:
    """A value in the syntax of the command line, on one line and truncated for messages."""
    if isinstance(value, int) and abs(value) >= 10**100:
        return "a huge number"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return printable(text, 200)


def did_you_mean(written: str, choices: Iterable[str]) -> str:
    """`did you mean X? ` if one of the choices is similar to what was written, else an empty string.

    >>> did_you_mean("LLaVa", ["tiny", "llava"]), did_you_mean("x", ["tiny"])
    ('did you mean llava? ', '')
    """
    near = difflib.get_close_matches(written[:100].lower(), list(choices), 1)
    return f"did you mean {near[0]}? " if near else ""


def read_as(field: FieldInfo) -> str:
    """How the command line parses an option: the kind of its `ReadAs` mark, or `value` for Hydra's grammar."""
    parts = get_args(field.annotation) if _is_union(field.annotation) else ()
    marks = [*field.metadata, *(mark for part in parts for mark in _marks(part))]
    return next((mark.kind for mark in reversed(marks) if isinstance(mark, ReadAs)), "value")


def describe_requirement(field: FieldInfo, value: Any = None) -> str:
    """What an option accepts, as advice: `give a whole number of at least 1, or null`."""
    alternatives = [field.annotation, *get_args(field.annotation)]
    known = [str(word) for alternative in alternatives for word in _literals(alternative)]
    near = did_you_mean(value, known) if isinstance(value, str) else ""
    return near + _advice(field.annotation, field.metadata)


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _literals(kind: Any) -> tuple[Any, ...]:
    """The words of a Literal; empty for another type."""
    return get_args(kind) if get_origin(kind) is Literal else ()


def _marks(kind: Any) -> Iterator[Any]:
    """The metadata of an `Annotated` type; pydantic wraps some of it in a FieldInfo."""
    for mark in getattr(kind, "__metadata__", ()):
        yield from mark.metadata if isinstance(mark, FieldInfo) else (mark,)


def _advice(kind: Any, marks: Iterable[Any] = ()) -> str:
    marks = list(marks)
    if sentence := next((mark.sentence for mark in marks if isinstance(mark, Requirement)), ""):
        return sentence
    if get_origin(kind) is Annotated:
        return _advice(get_args(kind)[0], [*_marks(kind), *marks])
    if _is_union(kind):
        return _union_advice(get_args(kind), marks)
    if words := _literals(kind):
        return f"choose one of {', '.join(map(str, words))}"
    if get_origin(kind) is tuple:
        return f"give a list such as [A,B]; in it, {_advice(get_args(kind)[0])}"
    if kind is bool:
        return "give true or false"
    if kind in (int, float):
        return f"give a {'whole ' if kind is int else ''}number{_range(marks)}"
    return "give a text"


def _union_advice(kinds: tuple[Any, ...], marks: list[Any]) -> str:
    """Advice for a union: single words come last, as alternatives to a value."""
    others = [kind for kind in kinds if kind is not type(None) and len(_literals(kind)) != 1]
    parts = [_advice(kind, marks) for kind in others]
    parts += [f"or write {words[0]}" for kind in kinds if len(words := _literals(kind)) == 1]
    parts += ["or null"] if type(None) in kinds else []
    return ", ".join(parts)


def _range(marks: Iterable[Any]) -> str:
    keywords = {annotated_types.Ge: "ge", annotated_types.Gt: "gt", annotated_types.Le: "le"}
    limits = {name: getattr(m, name) for m in marks for kind, name in keywords.items() if isinstance(m, kind)}
    words = {"ge": "of at least", "gt": "above", "le": "at most"}
    text = " and ".join(f"{phrase} {limits[name]}" for name, phrase in words.items() if name in limits)
    return f" {text}" if text else ""
