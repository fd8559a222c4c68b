"""Referring expressions for the synthetic scenes, each checked to refer to what it should; questions about the object.

An expression is a noun (a name, a kind, a property, "thing") and at most one modifier (place, size, colour,
relation). `meant_by` lists the objects that a phrase could refer to; only phrases with a single one are used, or, where
that is asked for, with none or several. An expression with no target is as close to the scene as can be told for
certain: an object that is not there, a colour that no object of that name has, a place or a relation that the only
object of that name does not have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from localization_heads.scenes.artwork import NAMES, PALETTE, VOCABULARY

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


ABSENT_WEIGHTS = {"name": 0.4, "colour": 0.2, "place": 0.2, "relation": 0.2}
"""How often each kind of expression with no target is drawn, where a scene offers it."""
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top",
            "left of": "right of", "right of": "left of", "above": "below", "below": "above"}  # fmt: skip
PLURALS = {"bus": "buses", "grapes": "grapes", "scissors": "scissors", "glasses": "glasses", "cactus": "cacti",
           "fish": "fish", "butterfly": "butterflies", "octopus": "octopuses",
           "strawberry": "strawberries", "dress": "dresses", "cheese": "cheeses",
           "clothing": "clothes", "teddy": "teddies"}  # fmt: skip


@dataclass(frozen=True)
class ManyTargets:
    """An expression with the objects that it refers to: none, or two or more.

    Args:
        kind: as of `Expression`; of an expression with no target, what is wrong with it.
        targets: indices of the objects.
    """

    kind: str
    text: str
    targets: tuple[int, ...] = ()


def absent(things: Sequence[Thing], rng: Random) -> ManyTargets:
    """An expression that refers to nothing in the scene, its kind drawn with ABSENT_WEIGHTS."""
    found = list(_absent_phrases(things, rng))
    kinds = [kind for kind in ABSENT_WEIGHTS if any(kind == other for other, _ in found)]
    kind = rng.choices(kinds, [ABSENT_WEIGHTS[kind] for kind in kinds])[0]
    phrase = rng.choice([phrase for other, phrase in found if other == kind])
    return ManyTargets(kind, say(phrase, rng))


def _absent_phrases(things: Sequence[Thing], rng: Random) -> Iterator[tuple[str, Phrase]]:
    """What is wrong, and the phrase. Every one is certain: no object is a borderline case of it."""
    names = Counter(thing.name for thing in things)
    yield "name", Phrase(("name", rng.choice([name for name in NAMES if name not in names])))
    for name, count in names.items():
        noun = ("name", name)
        for colour in PALETTE:
            if not meant_by(Phrase(noun, ("colour", colour)), things):
                yield "colour", Phrase(noun, ("colour", colour))
        if count > 1:
            continue
        (one,) = (thing for thing in things if thing.name == name)
        for word, (axis, sign) in PLACES.items():
            if sign * (one.centre[axis] - 0.5) < -MARGIN:
                yield "place", Phrase(noun, ("place", word))
        for other in names:
            for word in RELATIONS if other != name and names[other] == 1 else ():
                if meant_by(Phrase(noun, ("relation", OPPOSITE[word], other)), things):
                    yield "relation", Phrase(noun, ("relation", word, other))


def plural(things: Sequence[Thing], rng: Random) -> ManyTargets | None:
    """An expression for two objects or more ("the dogs", "the red things", "the animals"); None if none fits.

    Colours are those that the objects certainly have; what could be of that colour is never left out.
    """
    found = [one for one in _plurals(things) if len(one.targets) > 1]
    if not found:
        return None
    kind = rng.choice(sorted({one.kind for one in found}))
    return rng.choice([one for one in found if one.kind == kind])


def _plurals(things: Sequence[Thing]) -> Iterator[ManyTargets]:
    for name in dict.fromkeys(thing.name for thing in things):
        yield _all(things, "name", f"the {pluralised(name)}", Phrase(("name", name)))
    for kind in dict.fromkeys(thing.kind for thing in things):
        yield _all(things, "kind", f"the {pluralised(kind)}", Phrase(("kind", kind)))
    for colour in PALETTE:
        if all(thing.colour == colour for thing in things if colour in thing.colours):
            yield _all(things, "colour", f"the {colour} things", Phrase(("any", ""), ("colour", colour)))


def _all(things: Sequence[Thing], kind: str, text: str, phrase: Phrase) -> ManyTargets:
    return ManyTargets(kind, text, tuple(meant_by(phrase, things)))


def pluralised(noun: str) -> str:
    """
    >>> pluralised("dog"), pluralised("bus"), pluralised("fish")
    ('dogs', 'buses', 'fish')
    """
    return PLURALS.get(noun, f"{noun}s")


SIZES = ("small", "big")


class Question(NamedTuple):
    """A question about an image with its known answer.

    Args:
        kind: `description` (the expression by itself), `colour`, `size` or `name`.
    """

    kind: str
    text: str
    answer: str


def make_questions(expression: str, answer: str) -> tuple[Question, ...]:
    """What can be asked about the object of an expression, of which `answer` says colour, size and name.

    What the expression itself says is not asked. An answer of another form is asked as a description alone.

    >>> for question in make_questions("the dog on the left", "red small dog"):
    ...     print(question.kind, "|", question.text, "|", question.answer)
    description | the dog on the left | red small dog
    colour | what colour is the dog on the left ? | red
    size | how big is the dog on the left ? | small
    """
    found = [Question("description", expression, answer)]
    words = answer.split()
    colour = next((word for word in words if word in (*PALETTE, "plain")), None)
    size = next((word for word in words if word in SIZES), None)
    name = next((word for word in words if word in NAMES), None)
    if len(words) != 3 or colour is None or size is None or name is None:
        return tuple(found)
    said = expression.split()
    phrase = expression if said[0] in ("the", "something") else f"the {expression}"
    if colour not in said:
        found.append(Question("colour", f"what colour is {phrase} ?", colour))
    if size not in said:
        found.append(Question("size", f"how big is {phrase} ?", size))
    if name not in said:
        found.append(Question("name", f"what is {phrase} ?", name))
    return tuple(found)
