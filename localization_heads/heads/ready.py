"""How heads were found, and ready lists: heads of known models that others have published, with their source.

The lists are the files of `config/lists/`; `lists` in a file of `config/model/` names those of that model. Heads that
were found with other weights or another prompt may not be the best, so `heads=auto` takes a list only with the prompt
and the query token that it was found with; named explicitly, a list is taken under any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from localization_heads.errors import UsageError
from localization_heads.heads.head import Head
from localization_heads.options.compose import choices_of, load_preset
from localization_heads.options.declaration import did_you_mean
from localization_heads.options.groups import CriteriaOptions

FoundWith = Mapping[str, str | None]
"""`found_with` of `heads.json`: values by the names in `KEYS`; other tools and older files may lack some."""

NATIVE_BOX = "native_box"
"""The `conv_mode` of heads found while the model wrote a box itself: the prompt that asks for one."""

KEYS = (
    "conv_mode", "system", "query_token", "paraphrases", "weights", "criteria", "heads_by", "num_labels", "shrink",
    "library",
)  # fmt: skip


def asked_conditions(
    conv_mode: str, system: str, query_token: str, weights: str, paraphrases: Sequence[str] | None = None
) -> dict[str, str | None]:
    """How a model is asked, as `found_with` states it. Only the paper's prompt has a system sentence.

    With `last_and_answer`, heads are found in the maps of the last prompt token, as with `last`.
    """
    return {
        "conv_mode": conv_mode,
        "system": system if conv_mode == "referseg" else None,
        "query_token": "last" if query_token == "last_and_answer" else query_token,
        "paraphrases": "; ".join(paraphrases) if paraphrases else None,
        "weights": weights,
    }


def found_with(asked: FoundWith, options: CriteriaOptions, labels: FoundWith | None = None) -> FoundWith:
    """The `found_with` of `heads.json`: the model and how it was asked (`LVLM.asked`), and the recipe.

    Args:
        labels: the recipe of a ranking by labels, `heads_by` and others, in place of the criteria.
    """
    from localization_heads.version import __version__

    library = f"localization-heads {__version__}"
    recipe = {"criteria": preset_of(options)} if labels is None else labels
    known = {**asked, **recipe, "library": library}
    return {name: value for name, value in known.items() if value is not None}


def preset_of(options: CriteriaOptions) -> str | None:
    """The preset in `config/criteria/` with these options; None if there is none.

    >>> preset_of(CriteriaOptions()), preset_of(CriteriaOptions(tau=0.5))
    ('paper', None)
    """
    return next((name for name, preset in _presets().items() if preset == options), None)


@cache
def _presets() -> dict[str, CriteriaOptions]:
    return {name: CriteriaOptions.of(load_preset("criteria", name)) for name in choices_of("criteria")}


def describe_difference(found: FoundWith, asked: FoundWith) -> str | None:
    """In words, the conditions that differ between finding the heads and now; None if all known ones agree.

    >>> describe_difference({"conv_mode": "chat", "weights": "1a"}, {"conv_mode": "plain", "weights": "1a"})
    'found with conv_mode=chat (here: plain)'
    """
    names = ("conv_mode", "query_token", "paraphrases", "weights")
    different = [name for name in names if _differs(name, found, asked)]
    parts = [f"{name}={_shorten(found[name])} (here: {_shorten(asked[name])})" for name in different]
    if "conv_mode" not in different and _differs("system", found, asked):
        parts.append("another system sentence")
    return f"found with {', '.join(parts)}" if parts else None


def _differs(name: str, found: FoundWith, asked: FoundWith) -> bool:
    return found.get(name) is not None and asked.get(name) is not None and found[name] != asked[name]


def _shorten(value: str | None) -> str:
    """A value from an untrusted file, on one line and not too long."""
    return " ".join(str(value).split())[:40]


MAX_COMPARED = 20
"""Heads of a list that a new ranking is compared with, at most."""


@dataclass(frozen=True)
class ReadyList:
    """A published list of heads, best first.

    Args:
        name: the file's.
        source: its authors, and where it was published.
        model: the checkpoint, as the source names it.
        conv_mode, query_token: prompt and query token that it was found with; with `native_box`, the answer span is
            the box that the model writes itself (answer_span=box).
        language_model: which models may share it.
        counts: how often each head was selected, if that was published.
    """

    name: str
    source: str
    model: str
    heads: tuple[Head, ...]
    conv_mode: str
    query_token: str
    language_model: str = ""
    counts: tuple[int, ...] = ()

    @property
    def found_with(self) -> FoundWith:
        return {"conv_mode": self.conv_mode, "query_token": self.query_token}

    def __str__(self) -> str:
        return f"{self.name} ({self.source})"

    def describe_mismatch(self, conv_mode: str | None, query_token: str | None) -> str | None:
        """In words, the conditions that differ from those it was found with; None if all known ones agree.

        Args:
            conv_mode: None if it follows the heads, or is unknown.

        >>> ready_list("paper-llava").describe_mismatch("chat", "last_and_answer")
        'found with conv_mode=referseg (here: chat)'
        """
        token = "last" if query_token == "last_and_answer" else query_token
        here = {"conv_mode": conv_mode, "query_token": token}
        parts = [
            f"{name}={was} (here: {here[name]})"
            for name, was in self.found_with.items()
            if here[name] is not None and here[name] != was
        ]
        if parts and self.conv_mode == NATIVE_BOX:
            return f"found with query_token=answer_span answer_span=box (here: query_token={query_token})"
        return f"found with {', '.join(parts)}" if parts else None


@cache
def ready_lists() -> dict[str, ReadyList]:
    """All ready lists, by name."""
    return {name: _read(name) for name in choices_of("lists")}


def _read(name: str) -> ReadyList:
    values = dict(load_preset("lists", name))
    heads = tuple(Head.parse(head) for head in values.pop("heads"))
    return ReadyList(name=name, heads=heads, counts=tuple(values.pop("counts", ())), **values)


def ready_list(name: str) -> ReadyList:
    """The ready list of that name. UsageError if there is none."""
    if name not in ready_lists():
        hint = did_you_mean(name, ready_lists()).strip()
        known = ", ".join(ready_lists())
        raise UsageError(f"there is no ready list of heads named {name}; {hint or f'there are {known}'}")
    return ready_lists()[name]


class ReadyHeads(NamedTuple):
    """The heads that heads=auto takes from a model's ready lists.

    Attributes:
        heads: empty if no list fits.
        of: the list that they are from; None for heads that the user gave to the model.
        why_not: the reasons why the lists before it were not taken.
    """

    heads: tuple[Head, ...] = ()
    of: ReadyList | None = None
    why_not: tuple[str, ...] = ()

    @property
    def advice(self) -> str:
        """One line: why no list was taken, and what to do; "" if one was taken, or there is none."""
        if self.heads or not self.why_not:
            return ""
        first = self.why_not[0].partition(" ")[0]
        return (
            f"no ready list of heads fits: {'; '.join(self.why_not)}; ask as it was found, find heads with stage=find, "
            f"or take it all the same with heads={first}"
        )


NONE_READY = ReadyHeads()


def choose_ready(
    own: Sequence[Head], names: Sequence[str], conv_mode: str | None, query_token: str | None
) -> ReadyHeads:
    """The first of a model's ready lists that was found with this prompt and query token.

    Args:
        own: `ModelSpec.heads`. Heads that are in no list are the user's own, and taken as they are.
        names: `ModelSpec.lists`.
        conv_mode: as of `ReadyList.describe_mismatch`.

    Raises:
        UsageError: a name that no list has.
    """
    lists = [ready_list(name) for name in names]
    if own and all(candidate.heads != tuple(own) for candidate in lists):
        return ReadyHeads(tuple(own))
    why_not: list[str] = []
    for candidate in lists:
        mismatch = candidate.describe_mismatch(conv_mode, query_token)
        if mismatch is None:
            return ReadyHeads(candidate.heads, candidate, tuple(why_not))
        why_not.append(f"{candidate} was {mismatch}")
    return ReadyHeads(why_not=tuple(why_not))


def mismatch_warning(heads: str, found: FoundWith | None, asked: FoundWith | None) -> str | None:
    """One sentence if heads were found with other weights, another prompt or query token; None if all known ones agree.

    >>> mismatch_warning("heads=a.json", {"query_token": "last"}, {"query_token": "answer_mean"})  # doctest: +ELLIPSIS
    'heads=a.json: found with query_token=last (here: answer_mean); others may be better here: ...'
    """
    if not found or not asked or (difference := describe_difference(found, asked)) is None:
        return None
    return f"{heads}: {difference}; others may be better here: find them with stage=find, or ask as it did"


class SharedHeads(NamedTuple):
    """How many heads are in the first n of both a list and a ranking, and how many would be by chance."""

    shared: int
    compared: int
    chance: float


def shared_heads(published: Sequence[Head], ranked: Sequence[Head], num_heads: int) -> SharedHeads:
    """Compare the first n heads of a list and of a ranking: n is `MAX_COMPARED`, or as many as both have.

    `chance` is the mean over random orders of the model's `num_heads` heads: `n^2 / num_heads`.

    >>> shared_heads([Head(1, 1), Head(1, 2)], [Head(1, 2), Head(0, 0), Head(1, 1)], 8)
    SharedHeads(shared=1, compared=2, chance=0.5)
    """
    n = min(MAX_COMPARED, len(published), len(ranked))
    shared = len(set(published[:n]) & set(ranked[:n]))
    return SharedHeads(shared, n, n * n / num_heads if num_heads else 0.0)
