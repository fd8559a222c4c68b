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
from localization_heads.store.paths import check_id, from_home

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""`true` is no number, "3" is not 3, infinity is nothing."""

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


@dataclass_transform(frozen_default=True, kw_only_default=False)
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


def _check_kinds(chosen: Options) -> None:
    """What is named is meant: an option that this kind would pass over in silence is an error."""
    for name, field in type(chosen).__pydantic_fields__.items():
        kinds, value = extra(field).get("kinds"), getattr(chosen, name)
        if kinds and value != field.default and (kind := getattr(chosen, "kind", "")) not in kinds:
            raise OptionError(name, f"{shown(value)}: only {' or '.join(kinds)} reads it, and not {kind}")


def as_read(chosen: Options) -> dict[str, Any]:
    """The values of a group by name, without those that its kind does not read."""
    fields = type(chosen).__pydantic_fields__
    kind = getattr(chosen, "kind", "")
    return {
        name: getattr(chosen, name) for name, f in fields.items() if kind in (extra(f).get("kinds") or [kind])
    }


def _one_line(kind: type[Options], error: ValidationError) -> Exception:
    first = error.errors()[0]
    if isinstance(
        own := first.get("ctx", {}).get("error"), OptionError
    ):  # of a check of several options together
        return own
    place, value = first["loc"][0] if first["loc"] else "", first["input"]
    name = list(kind.__pydantic_fields__)[place] if isinstance(place, int) else place
    if name not in kind.__pydantic_fields__:
        return TypeError(f"{kind.__name__}: {first['msg']}: {name}")
    if len(first["loc"]) > 1 and isinstance(first["loc"][1], int):
        value = f"... {value} ..."  # an item of a list
    field = kind.__pydantic_fields__[name]
    return OptionError(name, f"{shown(value)}: {wants(field, value)}")


@dataclasses.dataclass(frozen=True)
class Wants:
    """What a value must be, in words, where the type alone does not say it."""

    sentence: str


@dataclasses.dataclass(frozen=True)
class Reads:
    """How the command line reads an option whose value Hydra's grammar must not read.

    A `text` is taken as it was typed, a `path` as well, with `~` for the home folder; `texts` and `paths` are a list
    `[A,B]` of them, or one. What has no such mark is read by Hydra's grammar.
    """

    kind: Literal["text", "path", "texts", "paths"]


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


def _folder_name(value: str) -> str:
    check_id(value)
    return value


def _head_choice(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(from_home(str(item)) for item in value)
    listed = isinstance(value, str) and ("," in value or value[:1] == "[") and not value.endswith(".json")
    if listed or isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ValueError("no heads")
    return from_home(str(value))


Word = Annotated[str, BeforeValidator(_as_text), AfterValidator(_not_blank)]
"""A text of a few words that Hydra's grammar can read, so that a sweep can go over it."""
Text = Annotated[str, BeforeValidator(_as_text), AfterValidator(_not_blank), Reads("text")]
"""Not blank; a number is taken as it is written."""
Sentence = Annotated[str, Reads("text")]
"""Also an empty one."""
PathText = Annotated[Text, AfterValidator(from_home), Reads("path")]
"""A path, or an address or a name where the sentence says so; `~` stands for a home folder."""
FolderPath = Annotated[PathText, Wants("give a folder")]
FolderName = Annotated[Text, AfterValidator(_folder_name), Wants("give a plain folder name")]
"""One plain name: files are written into it."""
Share = Annotated[float, Field(gt=0, le=1), Wants("give a number above 0 and at most 1")]
Odd = Annotated[int, Field(ge=1, le=63), AfterValidator(_odd), Wants("give an odd number from 1 to 63")]
Several = BeforeValidator(_as_tuple)
"""Of a tuple: a list is one as well."""
Item = TypeVar("Item")
OneOrSeveral = Annotated[tuple[Item, ...], BeforeValidator(_one_or_several), Reads("paths")]
HeadChoice = Annotated[
    Any,
    AfterValidator(_head_choice),
    Reads("paths"),
    Wants("write auto, greedy, a heads.json, a hub repository user/repo, or a list such as [14-24,14-13]"),
]
"""A name, or a tuple of heads' names; `grounder.choose_heads` knows what they stand for."""


def option(
    default: Any,
    sentence: str,
    *,
    section: str | None = None,
    choice: str | None = None,
    stages: tuple[str, ...] = (),
    kinds: tuple[str, ...] = (),
    **limits: Any,
) -> Any:
    """A field: its default, the sentence that explains it, and `ge`, `gt`, `le`, `lt` as pydantic knows them.

    Args:
        section: heads this option and those after it in `--help` and the docs.
        choice: of a group: the preset that is taken unless another is named.
        stages: the only ones that read it.
        kinds: of a group with a `kind`: the only ones that read it.
    """
    said: dict[str, Any] = {
        "section": section,
        "choice": choice,
        "stages": list(stages),
        "kinds": list(kinds),
    }
    extra = {name: value for name, value in said.items() if value}
    return Field(default, description=sentence, json_schema_extra=extra, **limits)


def extra(field: FieldInfo) -> dict[str, Any]:
    """What `option` says of a field besides its sentence and limits."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def marks(field: FieldInfo) -> list[Any]:
    """What `Annotated` says of a field, also of the parts of a union."""
    found = list(field.metadata)
    parts = get_args(field.annotation) if get_origin(field.annotation) in (Union, types.UnionType) else ()
    return found + [
        mark for kind in parts if get_origin(kind) is Annotated for mark in _spread(get_args(kind)[1:])
    ]


class Options:
    """What classes of options have in common. Each is a frozen pydantic dataclass."""

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
        for name in values:
            if name not in known:
                raise UsageError(f"{prefix}{name} is no option")
        given = {name: _nested(known[name], value, f"{prefix}{name}.") for name, value in values.items()}
        try:
            return cls(**given)
        except OptionError as error:
            raise OptionError(f"{prefix}{error.name}", error.advice) from None


def _nested(field: FieldInfo, value: Any, prefix: str) -> Any:
    group = group_of(field)
    return group.of(value, prefix) if group is not None and isinstance(value, Mapping) else value


def group_of(field: FieldInfo) -> type[Options] | None:
    """The class of a group of options; None for a single one."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Options) else None


def shown(value: Any) -> str:
    """A value as it is written on the command line, on one line and not too long for a message."""
    if isinstance(value, int) and abs(value) >= 10**100:
        return "a huge number"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return printable(text, 200)


def wants(field: FieldInfo, value: Any = None) -> str:
    """What a value must be, as advice: `give a whole number of at least 1, or null`."""
    advice = _wants(field.annotation, field.metadata)
    near = did_you_mean(value, literals(field)) if isinstance(value, str) else ""
    return near + advice


def did_you_mean(written: str, choices: Iterable[str]) -> str:
    """A question to begin a hint with, or nothing.

    >>> did_you_mean("LLaVa", ["tiny", "llava"]), did_you_mean("x", ["tiny"])
    ('did you mean llava? ', '')
    """
    near = difflib.get_close_matches(written[:100].lower(), list(choices), 1)
    return f"did you mean {near[0]}? " if near else ""


def literals(field: FieldInfo) -> list[str]:
    """The words that an option takes."""
    kinds = [field.annotation, *get_args(field.annotation)]
    return [str(word) for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]


def reads(field: FieldInfo) -> str:
    """How the command line reads an option: `value`, or what its mark says."""
    found = [mark.kind for mark in marks(field) if isinstance(mark, Reads)]
    return found[-1] if found else "value"


def _wants(kind: Any, metadata: Any = ()) -> str:
    for mark in metadata:
        if isinstance(mark, Wants):
            return mark.sentence
    origin = get_origin(kind)
    if origin is Annotated:
        inner, *marks = get_args(kind)
        return _wants(inner, [*_spread(marks), *metadata])
    if origin in (Union, types.UnionType):
        return _wants_one_of(get_args(kind), metadata)
    if origin is Literal:
        return f"choose one of {', '.join(map(str, get_args(kind)))}"
    if origin is tuple:
        return f"give a list such as [A,B]; in it, {_wants(get_args(kind)[0])}"
    if kind is bool:
        return "give true or false"
    if kind in (int, float):
        return f"give a {'whole ' if kind is int else ''}number{_range(metadata)}"
    return "give a text"


def _spread(marks: Any) -> Iterator[Any]:
    for mark in marks:
        yield from mark.metadata if isinstance(mark, FieldInfo) else (mark,)


def _wants_one_of(kinds: tuple[Any, ...], metadata: Any) -> str:
    words = [get_args(kind)[0] for kind in kinds if get_origin(kind) is Literal and len(get_args(kind)) == 1]
    is_word = [get_origin(kind) is Literal and get_args(kind)[0] in words for kind in kinds]
    others = [
        kind for kind, known in zip(kinds, is_word, strict=True) if kind is not type(None) and not known
    ]
    parts = [_wants(kind, metadata) for kind in others]
    parts += [f"or write {word}" for word in words]
    return ", ".join([*parts, *(["or null"] if type(None) in kinds else [])])


def _range(metadata: Any) -> str:
    least = next((m.ge for m in metadata if isinstance(m, annotated_types.Ge)), None)
    most = next((m.le for m in metadata if isinstance(m, annotated_types.Le)), None)
    above = next((m.gt for m in metadata if isinstance(m, annotated_types.Gt)), None)
    bounds = [
        f"of at least {least}" if least is not None else f"above {above}" if above is not None else "",
        f"at most {most}" if most is not None else "",
    ]
    text = " and ".join(bound for bound in bounds if bound)
    return f" {text}" if text else ""
