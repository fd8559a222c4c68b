"""How an option is declared: kinds of values, the sentence for a wrong one, and a class of options from plain values.

An option is a typed field with a default and a sentence. Everything that is said about it is made from that one place:
the check, the error, `--help`, the tables of the docs, and what Hydra composes. Neither torch nor numpy is needed.
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
"""`true` is no number, "3" is not 3, infinities and NaN are refused."""

Kind = TypeVar("Kind", bound="type[Options]")


class OptionError(UsageError, ValueError):
    """An option has a value that it does not take.

    Args:
        name: the option's, in its class.
        advice: its value, and what it takes.
    """

    def __init__(self, name: str, advice: str) -> None:
        super().__init__(f"{name}={advice}")
        self.name, self.advice = name, advice


@dataclass_transform(frozen_default=True)
def options(kind: Kind) -> Kind:
    """Makes options of a class with `option` fields: a frozen pydantic dataclass whose errors are one line."""
    made: Any = pydantic_dataclass(frozen=True, config=_STRICT)(kind)
    checked = made.__init__

    @wraps(checked)
    def init(self: Any, *values: Any, **named: Any) -> None:
        try:
            checked(self, *values, **named)
        except ValidationError as error:
            raise _one_line(type(self), error) from None
        _check_kinds(self)

    made.__init__ = init
    return cast(Kind, made)


def _check_kinds(chosen: Any) -> None:
    """An option that is set although this kind ignores it is an error."""
    for name, field in type(chosen).__pydantic_fields__.items():
        value = getattr(chosen, name)
        if value != field.default and not _is_read(chosen, field):
            kinds = " or ".join(option_metadata(field)["kinds"])
            raise OptionError(name, f"{format_value(value)}: only {kinds} reads it, and not {chosen.kind}")


def _is_read(chosen: Any, field: FieldInfo) -> bool:
    kinds = option_metadata(field).get("kinds")
    return not kinds or chosen.kind in kinds


def active_values(chosen: Options) -> dict[str, Any]:
    """The values of a group by name, without those that its kind does not read."""
    fields = type(chosen).__pydantic_fields__
    return {name: getattr(chosen, name) for name, field in fields.items() if _is_read(chosen, field)}


def first_changed_option(name: str, value: Any) -> str:
    """The name of an option; of a group, that of the first in it that has another value than its default."""
    fields = type(value).__pydantic_fields__ if isinstance(value, Options) else {}
    return next((f"{name}.{own}" for own, f in fields.items() if getattr(value, own) != f.default), name)


def measured_values(chosen: Options) -> dict[str, Any]:
    """The values of a group, by name, that stored statistics depend on."""
    fields = type(chosen).__pydantic_fields__
    return {
        name: getattr(chosen, name)
        for name, field in fields.items()
        if option_metadata(field).get("measured")
    }


def _one_line(kind: type[Options], error: ValidationError) -> Exception:
    first = error.errors()[0]
    own = first.get("ctx", {}).get("error")
    if isinstance(own, OptionError):  # of a check of several options together
        return own
    place, value = first["loc"][0] if first["loc"] else "", first["input"]
    name = list(kind.__pydantic_fields__)[place] if isinstance(place, int) else place
    if name not in kind.__pydantic_fields__:
        return TypeError(f"{kind.__name__}: {first['msg']}: {name}")
    if len(first["loc"]) > 1 and isinstance(first["loc"][1], int):
        value = f"... {value} ..."  # an item of a list
    field = kind.__pydantic_fields__[name]
    return OptionError(name, f"{format_value(value)}: {describe_requirement(field, value)}")


@dataclasses.dataclass(frozen=True)
class Requirement:
    """The requirement on a value, in words, where the type alone does not express it."""

    sentence: str


@dataclasses.dataclass(frozen=True)
class ReadAs:
    """How the command line reads an option whose value Hydra's grammar must not read.

    A `text` is taken as it was typed, a `path` as well, with `~` for the home folder; `texts` and `paths` are a list
    `[A,B]` of them, or one. What has no such mark is read by Hydra's grammar.
    """

    kind: Literal["text", "texts", "path", "paths"]


def _as_text(value: Any) -> Any:
    """A number on the command line is text as it is written."""
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
    """Of a paraphrase. ValueError unless it has one place for the expression."""
    if text.count("{}") != 1:
        raise ValueError
    return text


def _image_choice(value: Any) -> Any:
    """One name, or a tuple of two or more."""
    names = value if isinstance(value, (list, tuple)) else [value]
    texts = [_as_text(name) for name in names]
    if len(texts) < 1 + isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise ValueError
    found = tuple(expand_home(_not_blank(text)) for text in texts)
    return found if isinstance(value, (list, tuple)) else found[0]


def _head_choice(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(expand_home(str(item)) for item in value)
    listed = isinstance(value, str) and ("," in value or value[:1] == "[") and not value.endswith(".json")
    if listed or isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ValueError("no heads")
    return expand_home(str(value))


Word = Annotated[str, BeforeValidator(_as_text), AfterValidator(_not_blank)]
"""A text of a few words that Hydra's grammar can read, so that a sweep can go over it."""
Text = Annotated[str, BeforeValidator(_as_text), AfterValidator(_not_blank), ReadAs("text")]
"""Not blank; a number is taken as it is written."""
Sentence = Annotated[str, ReadAs("text")]
"""Also an empty one."""
PathText = Annotated[Text, AfterValidator(expand_home), ReadAs("path")]
"""A path, or an address or a name where the sentence says so; `~` stands for a home folder."""
FolderPath = Annotated[PathText, Requirement("give a folder")]
FolderName = Annotated[Text, AfterValidator(check_id), Requirement("give a plain folder name")]
"""One plain name: files are written into it."""
Fraction = Annotated[float, Field(gt=0, le=1), Requirement("give a number above 0 and at most 1")]
OddInt = Annotated[
    int, Field(ge=1, le=63), AfterValidator(_odd), Requirement("give an odd number from 1 to 63")
]
FromList = BeforeValidator(_as_tuple)
"""Of a tuple: a list is one as well."""
Item = TypeVar("Item")
OneOrMore = Annotated[tuple[Item, ...], BeforeValidator(_one_or_several), ReadAs("paths")]
Paraphrases = Annotated[
    tuple[Annotated[Text, AfterValidator(_template)], ...],
    BeforeValidator(_one_or_several),
    ReadAs("texts"),
    Field(min_length=1, max_length=8),
    Requirement("write one to eight templates, each with one {}, such as [the {},a {}]"),
]
"""Templates that an expression is put into."""
ImageChoice = Annotated[
    Any,
    AfterValidator(_image_choice),
    ReadAs("paths"),
    Requirement("give an image, or a list of two or more, such as [a.jpg,b.jpg]"),
]
"""An image's path or address, or a tuple of several."""
HeadChoice = Annotated[
    Any,
    AfterValidator(_head_choice),
    ReadAs("paths"),
    Requirement(
        "write auto, greedy, a heads.json, a hub repository user/repo, or a list such as [14-24,14-13]"
    ),
]
"""A name, or a tuple of heads' names; `head_choice.choose_heads` knows what they stand for."""


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
    """A field: its default, the sentence that explains it, and `ge`, `gt`, `le`, `lt` as pydantic knows them.

    Args:
        section: heads this option and those after it in `--help` and the docs.
        choice: of a group: the preset that is taken unless another is named.
        stages: the only ones that read it.
        kinds: of a group with a `kind`: the only ones that read it.
        measured: of a criterion: the statistics of a sample depend on it, so that another value needs the maps again.
    """
    said: dict[str, Any] = {
        "section": section,
        "choice": choice,
        "stages": list(stages),
        "kinds": list(kinds),
        "measured": measured,
    }
    return Field(default, description=sentence, json_schema_extra=said, **limits)


def option_metadata(field: FieldInfo) -> dict[str, Any]:
    """The arguments of `option` besides the sentence and the limits."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


class Options:
    """Base of the classes of options, each of which is a frozen pydantic dataclass."""

    __pydantic_fields__: ClassVar[dict[str, FieldInfo]]
    EXTRA_GROUPS: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Groups whose choices set options of the program itself: the default choice and the sentence of each."""

    @classmethod
    def of(cls, values: Mapping[str, Any], prefix: str = "") -> Self:
        """From plain values, as Hydra composes them; what is not there keeps its default.

        Raises:
            UsageError: names the first wrong option, its value, and what it takes.
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
    """The class of a group of options; None for a single one."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Options) else None


def format_value(value: Any) -> str:
    """A value as it is written on the command line, on one line and not too long for a message."""
    if isinstance(value, int) and abs(value) >= 10**100:
        return "a huge number"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return printable(text, 200)


def did_you_mean(written: str, choices: Iterable[str]) -> str:
    """A question to begin a hint with, or nothing.

    >>> did_you_mean("LLaVa", ["tiny", "llava"]), did_you_mean("x", ["tiny"])
    ('did you mean llava? ', '')
    """
    near = difflib.get_close_matches(written[:100].lower(), list(choices), 1)
    return f"did you mean {near[0]}? " if near else ""


def read_as(field: FieldInfo) -> str:
    """How the command line reads an option: `value`, or what its mark says."""
    parts = get_args(field.annotation) if _is_union(field.annotation) else ()
    marks = [*field.metadata, *(mark for part in parts for mark in _marks(part))]
    return next((mark.kind for mark in reversed(marks) if isinstance(mark, ReadAs)), "value")


def describe_requirement(field: FieldInfo, value: Any = None) -> str:
    """The requirement on a value as advice: `give a whole number of at least 1, or null`."""
    kinds = [field.annotation, *get_args(field.annotation)]
    known = [str(word) for kind in kinds for word in _words(kind)]
    near = did_you_mean(value, known) if isinstance(value, str) else ""
    return near + _wants(field.annotation, field.metadata)


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _words(kind: Any) -> tuple[Any, ...]:
    """The words of a Literal; none of another kind."""
    return get_args(kind) if get_origin(kind) is Literal else ()


def _marks(kind: Any) -> Iterator[Any]:
    """What `Annotated` says of a kind; pydantic keeps a part of it inside a field's info."""
    for mark in getattr(kind, "__metadata__", ()):
        yield from mark.metadata if isinstance(mark, FieldInfo) else (mark,)


def _wants(kind: Any, marks: Iterable[Any] = ()) -> str:
    marks = list(marks)
    if said := next((mark.sentence for mark in marks if isinstance(mark, Requirement)), ""):
        return said
    if get_origin(kind) is Annotated:
        return _wants(get_args(kind)[0], [*_marks(kind), *marks])
    if _is_union(kind):
        return _wants_one_of(get_args(kind), marks)
    if words := _words(kind):
        return f"choose one of {', '.join(map(str, words))}"
    if get_origin(kind) is tuple:
        return f"give a list such as [A,B]; in it, {_wants(get_args(kind)[0])}"
    if kind is bool:
        return "give true or false"
    if kind in (int, float):
        return f"give a {'whole ' if kind is int else ''}number{_range(marks)}"
    return "give a text"


def _wants_one_of(kinds: tuple[Any, ...], marks: list[Any]) -> str:
    """Single words come last, as alternatives to a value."""
    others = [kind for kind in kinds if kind is not type(None) and len(_words(kind)) != 1]
    parts = [_wants(kind, marks) for kind in others]
    parts += [f"or write {words[0]}" for kind in kinds if len(words := _words(kind)) == 1]
    parts += ["or null"] if type(None) in kinds else []
    return ", ".join(parts)


def _range(marks: Iterable[Any]) -> str:
    named = {annotated_types.Ge: "ge", annotated_types.Gt: "gt", annotated_types.Le: "le"}
    limits = {name: getattr(m, name) for m in marks for kind, name in named.items() if isinstance(m, kind)}
    words = {"ge": "of at least", "gt": "above", "le": "at most"}
    text = " and ".join(f"{said} {limits[name]}" for name, said in words.items() if name in limits)
    return f" {text}" if text else ""
