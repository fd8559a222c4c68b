"""Referring expressions for the synthetic scenes, each checked to refer to exactly one object.

An expression is a noun (a name, a kind, a property, "thing") and at most one modifier (place, size, colour,
relation). `meant_by` lists the objects that a phrase could refer to; only phrases with a single one are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from localization_heads.scenes.artwork import VOCABULARY

MARGIN = 0.08  # two centres closer than this share of the image's side are neither left nor right
PLACES = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}  # word -> axis, sign
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
USES = {"food": "eat", "vehicle": "ride", "clothing": "wear", "instrument": "play"}
# How often the benchmark asks for each kind of expression, where a scene offers it.
KIND_WEIGHTS = {
    "name": 0.30, "place": 0.15, "colour": 0.15, "size": 0.10, "kind": 0.10, "property": 0.10, "relation": 0.10,
}  # fmt: skip


@dataclass(frozen=True)
class Expression:
    """A phrase that refers to one object of a scene, and the answer (colour, size, name) that describes it."""

    kind: str  # name, place, size, colour, kind, property or relation
    text: str  # without the final full stop
    answer: str
    object_index: int

    @property
    def targets(self) -> tuple[int, ...]:
        """The objects that it refers to: this one."""
        return (self.object_index,)


@dataclass(frozen=True)
class Thing:
    """The properties of an object that expressions use; the centre is relative to the image's sides."""

    name: str
    colour: str  # a tint, or "plain"
    size_word: str  # "small" or "big"
    centre: tuple[float, float]  # x, y
    colours: frozenset[str]  # every colour word that could fit

    @property
    def kind(self) -> str:
        return VOCABULARY[self.name][0]

    @property
    def feature(self) -> str | None:
        return VOCABULARY[self.name][1]


@dataclass(frozen=True)
class Phrase:
    """Noun `(attribute of Thing, value)` and modifier `(kind, word[, name of the other object])`."""

    noun: tuple[str, str]
    modifier: tuple[str, ...] = ()


def meant_by(phrase: Phrase, things: Sequence[Thing]) -> list[int]:
    """Indices of the objects that a phrase could refer to."""
    attribute, value = phrase.noun
    found = [i for i, thing in enumerate(things) if attribute == "any" or getattr(thing, attribute) == value]
    match phrase.modifier:
        case ("place", word):
            return _at_place(found, things, *PLACES[word])
        case ("size", word):
            return [i for i in found if things[i].size_word == word]
        case ("colour", word):
            return [i for i in found if word in things[i].colours]
        case ("relation", word, other):
            return _in_relation(found, things, *RELATIONS[word], other)
    return found


def _at_place(found: list[int], things: Sequence[Thing], axis: int, sign: int) -> list[int]:
    """The outermost of several candidates; a single one must lie in that half of the image."""
    offset = {i: sign * things[i].centre[axis] for i in found}
    if len(found) == 1:
        return [i for i in found if offset[i] > sign * 0.5 + MARGIN]
    return [i for i in found if offset[i] > max(offset.values()) - MARGIN]


def _in_relation(found: list[int], things: Sequence[Thing], axis: int, sign: int, other: str) -> list[int]:
    """Candidates that lie on the given side of the one other object of that name, mostly along that axis."""
    anchors = [thing for thing in things if thing.name == other]
    if len(anchors) != 1:
        return []
    (anchor,) = anchors

    def clearness(thing: Thing) -> float:
        along = sign * (thing.centre[axis] - anchor.centre[axis])
        return along - abs(thing.centre[1 - axis] - anchor.centre[1 - axis]) / 2

    possible = [i for i in found if clearness(things[i]) > -MARGIN]
    return [i for i in possible if len(possible) > 1 or clearness(things[i]) > MARGIN]


def _phrases(index: int, things: Sequence[Thing]) -> Iterator[tuple[str, Phrase]]:
    """(kind of expression, phrase) candidates for one object; not yet checked."""
    thing = things[index]
    name = ("name", thing.name)
    yield "name", Phrase(name)
    yield "kind", Phrase(("kind", thing.kind))
    if thing.feature:
        yield "property", Phrase(("feature", thing.feature))
    for word in PLACES:
        yield "place", Phrase(name, ("place", word))
    yield "size", Phrase(name, ("size", thing.size_word))
    if thing.colour != "plain":
        for noun in (name, ("kind", thing.kind), ("any", "")):
            yield "colour", Phrase(noun, ("colour", thing.colour))
    for other in dict.fromkeys(other.name for other in things if other.name != thing.name):
        for word in RELATIONS:
            yield "relation", Phrase(name, ("relation", word, other))


def _noun_text(phrase: Phrase, kind: str, rng: Random) -> str:
    attribute, value = phrase.noun
    if attribute == "any":
        return rng.choice(("thing", "object"))
    if attribute == "feature":
        return f"{rng.choice((kind, 'object', 'thing'))} {rng.choice(('which has', 'with'))} {value}"
    return value


def say(phrase: Phrase, rng: Random, kind: str = "thing") -> str:
    """One of the ways to say a phrase, of an object of that kind."""
    noun = _noun_text(phrase, kind, rng)
    match phrase.modifier:
        case ("place", word):
            said = f"{noun} {'at' if word in ('top', 'bottom') else 'on'} the {word}"
            return f"the {rng.choice((f'{word} {noun}', said))}"
        case ("relation", word, other):
            return f"the {noun} {word} the {other}"
        case (_, word):
            return f"{rng.choice(('the ', ''))}{word} {noun}"
    if phrase.noun[0] == "kind" and noun in USES and rng.random() < 0.5:
        return f"something to {USES[noun]}"
    return f"{rng.choice(('the ', 'the ', ''))}{noun}"


def describe(thing: Thing, phrase: Phrase) -> str:
    """The answer: colour, size and name; if the expression names the colour, it begins with what was left out."""
    colour, size, name = thing.colour, thing.size_word, thing.name
    if phrase.modifier[:1] != ("colour",):
        return f"{colour} {size} {name}"
    return f"{size} {colour} {name}" if phrase.noun[0] == "name" else f"{name} {size} {colour}"


def refer(things: Sequence[Thing], rng: Random) -> tuple[Expression, ...]:
    """Every unambiguous expression of a scene, each in one of its wordings."""
    expressions = []
    for index, thing in enumerate(things):
        for kind, phrase in _phrases(index, things):
            if meant_by(phrase, things) == [index]:
                text = say(phrase, rng, thing.kind)
                expressions.append(Expression(kind, text, describe(thing, phrase), index))
    return tuple(expressions)


def pick(expressions: Sequence[Expression], rng: Random) -> Expression:
    """One expression, its kind drawn with KIND_WEIGHTS from the kinds available."""
    kinds = [kind for kind in KIND_WEIGHTS if any(e.kind == kind for e in expressions)]
    kind = rng.choices(kinds, [KIND_WEIGHTS[k] for k in kinds])[0]
    return rng.choice([e for e in expressions if e.kind == kind])
