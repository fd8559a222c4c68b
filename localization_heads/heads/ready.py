"""How heads were found, and ready lists: heads of known models that others have published, with their source.

Heads that were found with other weights, or asked in another way, may not be the best. The lists are the files of
`config/lists/`; `lists` in a file of `config/model/` names those of that model. A list is taken by itself (heads=auto)
only with the prompt and the query token that it was found with; by its name, under any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from localization_heads.errors import UsageError
from localization_heads.heads.head import Head
from localization_heads.options.compose import choices_of, preset
from localization_heads.options.groups import CriteriaOptions
from localization_heads.options.kinds import did_you_mean

FoundWith = Mapping[str, str | None]
"""`found_with` of `heads.json`: its keys are `KEYS`, those of other tools and older files may be fewer."""

NATIVE_BOX = "native_box"
"""The `conv_mode` of heads that were found while the model wrote a box of its own: the prompt that asks it for one."""

KEYS = (
    "conv_mode", "system", "query_token", "paraphrases", "weights", "criteria", "heads_by", "num_labels", "shrink",
    "library",
)  # fmt: skip


def asked(
    conv_mode: str, system: str, query_token: str, weights: str, paraphrases: Sequence[str] | None = None
) -> dict[str, str | None]:
    """How a model is asked. The system sentence is a part of the paper's prompt only.

    Heads are found in the maps of the last prompt token whether the answer's tokens are read beside it or not.
    """
    return {
        "conv_mode": conv_mode,
        "system": system if conv_mode == "referseg" else None,
        "query_token": "last" if query_token == "last_and_answer" else query_token,
        "paraphrases": "; ".join(paraphrases) if paraphrases else None,
        "weights": weights,
    }


def found_with(asked: FoundWith, options: CriteriaOptions, labels: FoundWith | None = None) -> FoundWith:
    """What `heads.json` says of the model, of how it was asked (`LVLM.asked`), and of the recipe.

    Args:
        labels: `heads_by` and what else is known of a ranking by labels, which then take the place of the criteria.
    """
    from localization_heads.version import __version__

    library = f"localization-heads {__version__}"
    recipe = {"criteria": preset_of(options)} if labels is None else labels
    known = {**asked, **recipe, "library": library}
    return {name: value for name, value in known.items() if value is not None}


def preset_of(options: CriteriaOptions) -> str | None:
    """The file of `config/criteria/` that holds these options; None for others.

    >>> preset_of(CriteriaOptions()), preset_of(CriteriaOptions(tau=0.5))
    ('paper', None)
    """
    return next((name for name, preset in _presets().items() if preset == options), None)


@cache
def _presets() -> dict[str, CriteriaOptions]:
    return {name: CriteriaOptions.of(preset("criteria", name)) for name in choices_of("criteria")}


def difference(found: FoundWith, asked: FoundWith) -> str | None:
    """In words, what is not now as it was when heads were found; None if all that is known of it is the same.

    >>> difference({"conv_mode": "chat", "weights": "1a"}, {"conv_mode": "plain", "weights": "1a"})
    'found with conv_mode=chat (here: plain)'
    """
    others = [
        name
        for name in ("conv_mode", "query_token", "paraphrases", "weights")
        if _differs(name, found, asked)
    ]
    parts = [f"{name}={_short(found[name])} (here: {_short(asked[name])})" for name in others]
    if "conv_mode" not in others and _differs("system", found, asked):
        parts.append("another system sentence")
    return f"found with {', '.join(parts)}" if parts else None


def _differs(name: str, found: FoundWith, asked: FoundWith) -> bool:
    return found.get(name) is not None and asked.get(name) is not None and found[name] != asked[name]


def _short(value: str | None) -> str:
    """Of a file from anywhere: one line, not too long."""
    return " ".join(str(value).split())[:40]


MAX_COMPARED = 20
"""Heads of a list, at most, that a new ranking is compared with."""


@dataclass(frozen=True)
class ReadyList:
    """A published list of heads, best first.

    Args:
        name: the file's.
        source: whose it is, and where it was published.
        model: the checkpoint, in the source's words.
        conv_mode, query_token: prompt and query token that it was found with; with `native_box`, the span is that of
            the box that the model writes itself (answer_span=box).
        language_model: which models may share it.
        counts: how often each head was selected, where that was published.
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

    def misfit(self, conv_mode: str | None, query_token: str | None) -> str | None:
        """In words, what is not as when it was found; None if all is, as far as it is known.

        Args:
            conv_mode: None where it follows the heads, or is not known.

        >>> ready_list("paper-llava").misfit("chat", "last_and_answer")
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
    """Every list, by its name."""
    return {name: _read(name) for name in choices_of("lists")}


def _read(name: str) -> ReadyList:
    values = dict(preset("lists", name))
    heads = tuple(Head.parse(head) for head in values.pop("heads"))
    return ReadyList(name=name, heads=heads, counts=tuple(values.pop("counts", ())), **values)


def ready_list(name: str) -> ReadyList:
    """UsageError for a name that no list has."""
    if name not in ready_lists():
        hint = did_you_mean(name, ready_lists()).strip()
        known = ", ".join(ready_lists())
        raise UsageError(f"there is no ready list of heads named {name}; {hint or f'there are {known}'}")
    return ready_lists()[name]


class ReadyHeads(NamedTuple):
    """What heads=auto takes of a model's known heads.

    Attributes:
        heads: none if no list fits.
        of: the list that they are of; None for heads that the user gave to the model.
        why_not: why the lists before it were not taken.
    """

    heads: tuple[Head, ...] = ()
    of: ReadyList | None = None
    why_not: tuple[str, ...] = ()

    @property
    def advice(self) -> str:
        """One line: why no list was taken, and what to do; "" where one was, or there is none."""
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
    """The first of a model's lists that was found with this prompt and query token.

    Args:
        own: `ModelSpec.heads`. Heads that are no list's are the user's, and taken as they are.
        names: `ModelSpec.lists`.
        conv_mode: as of `ReadyList.misfit`.

    Raises:
        UsageError: a name that no list has.
    """
    lists = [ready_list(name) for name in names]
    if own and all(one.heads != tuple(own) for one in lists):
        return ReadyHeads(tuple(own))
    why_not: list[str] = []
    for one in lists:
        misfit = one.misfit(conv_mode, query_token)
        if misfit is None:
            return ReadyHeads(one.heads, one, tuple(why_not))
        why_not.append(f"{one} was {misfit}")
    return ReadyHeads(why_not=tuple(why_not))


def mismatch_warning(heads: str, found: FoundWith | None, asked: FoundWith | None) -> str | None:
    """One sentence where heads were found with other weights, another prompt or query token, as far as that is known.

    >>> mismatch_warning("heads=a.json", {"query_token": "last"}, {"query_token": "answer_mean"})  # doctest: +ELLIPSIS
    'heads=a.json: found with query_token=last (here: answer_mean); others may be better here: ...'
    """
    if not found or not asked or (how := difference(found, asked)) is None:
        return None
    return f"{heads}: {how}; others may be better here: find them with stage=find, or ask as it did"


class SharedHeads(NamedTuple):
    """How many of a list's first heads a ranking has among as many first ones, and how many chance would have."""

    found: int
    of: int
    chance: float


def shared_heads(published: Sequence[Head], ranked: Sequence[Head], num_heads: int) -> SharedHeads:
    """Compare the first `MAX_COMPARED` heads of a list, or as many as both have, with the first ones of a ranking.

    `chance` is what a random order of the model's `num_heads` heads would share on average: `n^2 / num_heads`.

    >>> shared_heads([Head(1, 1), Head(1, 2)], [Head(1, 2), Head(0, 0), Head(1, 1)], 8)
    SharedHeads(found=1, of=2, chance=0.5)
    """
    n = min(MAX_COMPARED, len(published), len(ranked))
    found = len(set(published[:n]) & set(ranked[:n]))
    return SharedHeads(found, n, n * n / num_heads if num_heads else 0.0)
