"""Generate referring expressions for the synthetic scenes, and questions about the objects they refer to.

An expression is a noun (a name, a kind, a property, "thing") and at most one modifier (place, size, colour, relation).
`find_referents` lists the objects that a phrase could refer to. Only phrases with exactly one referent are used, or, as
in generalized referring expression comprehension, those with none or several. An expression without a target is a hard
negative: an object that is not in the scene, a colour that no object of that name has, or a place or relation that the
only object of that name does not have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from localization_heads.scenes.artwork import NAMES, PALETTE, VOCABULARY

MARGIN = 0.08  # in sides of the image: closer centres are neither left nor right of each other
PLACES = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}  # word -> axis, sign
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
USES = {"food": "eat", "vehicle": "ride", "clothing": "wear", "instrument": "play"}
# How often each kind of expression is drawn, among those that a scene offers.
KIND_WEIGHTS = {
    "name": 0.30, "place": 0.15, "colour": 0.15, "size": 0.10, "kind": 0.10, "property": 0.10, "relation": 0.10,
}  # fmt: skip


@dataclass(frozen=True)
class Expression:
    """An expression that refers to one object of a scene, and the answer (colour, size, name) that describes it."""

    kind: str  # name, place, size, colour, kind, property or relation
    text: str  # without the final full stop
    answer: str
    object_index: int

    @property
    def targets(self) -> tuple[int, ...]:
        """The object as a tuple, as in `GeneralizedExpression`."""
        return (self.object_index,)


@dataclass(frozen=True)
class Thing:
    """The attributes of an object that expressions are made of; the centre is in sides of the image."""

    name: str
    colour: str  # a tint, or "plain"
    size_word: str  # "small" or "big"
    centre: tuple[float, float]  # x, y
    colours: frozenset[str]  # every colour word that could describe it

    @property
    def kind(self) -> str:
        return VOCABULARY[self.name][0]

    @property
    def feature(self) -> str | None:
        return VOCABULARY[self.name][1]


@dataclass(frozen=True)
class Phrase:
    """A noun `(attribute of Thing, value)` and a modifier `(kind, word[, name of the other object])`."""

    noun: tuple[str, str]
    modifier: tuple[str, ...] = ()


def find_referents(phrase: Phrase, things: Sequence[Thing]) -> list[int]:
    """Indices of the objects that a phrase could refer to."""
    attribute, value = phrase.noun
    candidates = [i for i, thing in enumerate(things) if attribute == "any" or getattr(thing, attribute) == value]
    match phrase.modifier:
        case ("place", word):
            return _filter_by_place(candidates, things, *PLACES[word])
        case ("size", word):
            return [i for i in candidates if things[i].size_word == word]
        case ("colour", word):
            return [i for i in candidates if word in things[i].colours]
        case ("relation", word, other):
            return _filter_by_relation(candidates, things, *RELATIONS[word], other)
    return candidates


def _filter_by_place(candidates: list[int], things: Sequence[Thing], axis: int, sign: int) -> list[int]:
    """The outermost of several candidates; a single candidate must be in that half of the image."""
    offset = {i: sign * things[i].centre[axis] for i in candidates}
    if len(candidates) == 1:
        return [i for i in candidates if offset[i] > sign * 0.5 + MARGIN]
    return [i for i in candidates if offset[i] > max(offset.values()) - MARGIN]


def _filter_by_relation(candidates: list[int], things: Sequence[Thing], axis: int, sign: int, other: str) -> list[int]:
    """Candidates on the given side of the only object named `other`, mostly along that axis."""
    anchors = [thing for thing in things if thing.name == other]
    if len(anchors) != 1:
        return []
    (anchor,) = anchors

    def clearance(thing: Thing) -> float:
        along = sign * (thing.centre[axis] - anchor.centre[axis])
        return along - abs(thing.centre[1 - axis] - anchor.centre[1 - axis]) / 2

    plausible = [i for i in candidates if clearance(things[i]) > -MARGIN]
    return [i for i in plausible if len(plausible) > 1 or clearance(things[i]) > MARGIN]


def _candidate_phrases(index: int, things: Sequence[Thing]) -> Iterator[tuple[str, Phrase]]:
    """Yield (kind of expression, phrase) for an object, not yet checked to be unambiguous."""
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


def verbalize(phrase: Phrase, rng: Random, kind: str = "thing") -> str:
    """A random wording of a phrase; `kind` is that of the object."""
    noun = _noun_text(phrase, kind, rng)
    match phrase.modifier:
        case ("place", word):
            postmodified = f"{noun} {'at' if word in ('top', 'bottom') else 'on'} the {word}"
            return f"the {rng.choice((f'{word} {noun}', postmodified))}"
        case ("relation", word, other):
            return f"the {noun} {word} the {other}"
        case (_, word):
            return f"{rng.choice(('the ', ''))}{word} {noun}"
    if phrase.noun[0] == "kind" and noun in USES and rng.random() < 0.5:
        return f"something to {USES[noun]}"
    return f"{rng.choice(('the ', 'the ', ''))}{noun}"


def describe_object(thing: Thing, phrase: Phrase) -> str:
    """The answer: colour, size and name; if the expression names the colour, the rest comes first."""
    colour, size, name = thing.colour, thing.size_word, thing.name
    if phrase.modifier[:1] != ("colour",):
        return f"{colour} {size} {name}"
    return f"{size} {colour} {name}" if phrase.noun[0] == "name" else f"{name} {size} {colour}"


def generate_expressions(things: Sequence[Thing], rng: Random) -> tuple[Expression, ...]:
    """All unambiguous expressions for a scene, each in a random wording."""
    expressions = []
    for index, thing in enumerate(things):
        for kind, phrase in _candidate_phrases(index, things):
            if find_referents(phrase, things) == [index]:
                text = verbalize(phrase, rng, thing.kind)
                expressions.append(Expression(kind, text, describe_object(thing, phrase), index))
    return tuple(expressions)


def draw_expression(expressions: Sequence[Expression], rng: Random) -> Expression:
    """Draw an expression; its kind is drawn with KIND_WEIGHTS among those available."""
    kinds = [kind for kind in KIND_WEIGHTS if any(e.kind == kind for e in expressions)]
    kind = rng.choices(kinds, [KIND_WEIGHTS[k] for k in kinds])[0]
    return rng.choice([e for e in expressions if e.kind == kind])


ABSENT_WEIGHTS = {"name": 0.4, "colour": 0.2, "place": 0.2, "relation": 0.2}
"""How often each kind of expression without a target is drawn, among those that a scene offers."""
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top",
            "left of": "right of", "right of": "left of", "above": "below", "below": "above"}  # fmt: skip
PLURALS = {"bus": "buses", "grapes": "grapes", "scissors": "scissors", "glasses": "glasses", "cactus": "cacti",
           "fish": "fish", "butterfly": "butterflies", "octopus": "octopuses",
           "strawberry": "strawberries", "dress": "dresses", "cheese": "cheeses",
           "clothing": "clothes", "teddy": "teddies"}  # fmt: skip


@dataclass(frozen=True)
class GeneralizedExpression:
    """An expression that refers to no object, or to two or more.

    Args:
        kind: as in `Expression`; without targets, the attribute that no object has.
        targets: indices of the objects.
    """

    kind: str
    text: str
    targets: tuple[int, ...] = ()


def draw_absent_expression(things: Sequence[Thing], rng: Random) -> GeneralizedExpression:
    """Draw an expression that refers to nothing in the scene; its kind is drawn with ABSENT_WEIGHTS."""
    candidates = list(_absent_phrases(things, rng))
    kinds = [kind for kind in ABSENT_WEIGHTS if any(kind == other for other, _ in candidates)]
    kind = rng.choices(kinds, [ABSENT_WEIGHTS[kind] for kind in kinds])[0]
    phrase = rng.choice([phrase for other, phrase in candidates if other == kind])
    return GeneralizedExpression(kind, verbalize(phrase, rng))


def _absent_phrases(things: Sequence[Thing], rng: Random) -> Iterator[tuple[str, Phrase]]:
    """Yield (kind, phrase) for phrases without a referent, not even a borderline one."""
    names = Counter(thing.name for thing in things)
    yield "name", Phrase(("name", rng.choice([name for name in NAMES if name not in names])))
    for name, count in names.items():
        noun = ("name", name)
        for colour in PALETTE:
            if not find_referents(Phrase(noun, ("colour", colour)), things):
                yield "colour", Phrase(noun, ("colour", colour))
        if count > 1:
            continue
        (single,) = (thing for thing in things if thing.name == name)
        for word, (axis, sign) in PLACES.items():
            if sign * (single.centre[axis] - 0.5) < -MARGIN:
                yield "place", Phrase(noun, ("place", word))
        for other in names:
            for word in RELATIONS if other != name and names[other] == 1 else ():
                if find_referents(Phrase(noun, ("relation", OPPOSITE[word], other)), things):
                    yield "relation", Phrase(noun, ("relation", word, other))


def draw_plural_expression(things: Sequence[Thing], rng: Random) -> GeneralizedExpression | None:
    """Draw an expression for two or more objects ("the dogs", "the red things", "the animals"); None if there is none.

    A colour is used only if every object that could be described by it certainly has it.
    """
    candidates = [plural for plural in _plural_expressions(things) if len(plural.targets) > 1]
    if not candidates:
        return None
    kind = rng.choice(sorted({plural.kind for plural in candidates}))
    return rng.choice([plural for plural in candidates if plural.kind == kind])


def _plural_expressions(things: Sequence[Thing]) -> Iterator[GeneralizedExpression]:
    def make(kind: str, text: str, phrase: Phrase) -> GeneralizedExpression:
        return GeneralizedExpression(kind, text, tuple(find_referents(phrase, things)))

    for name in dict.fromkeys(thing.name for thing in things):
        yield make("name", f"the {pluralize(name)}", Phrase(("name", name)))
    for kind in dict.fromkeys(thing.kind for thing in things):
        yield make("kind", f"the {pluralize(kind)}", Phrase(("kind", kind)))
    for colour in PALETTE:
        if all(thing.colour == colour for thing in things if colour in thing.colours):
            yield make("colour", f"the {colour} things", Phrase(("any", ""), ("colour", colour)))


def pluralize(noun: str) -> str:
    """The plural of a name or kind.

    >>> pluralize("dog"), pluralize("bus"), pluralize("fish")
    ('dogs', 'buses', 'fish')
    """
    return PLURALS.get(noun, f"{noun}s")


SIZES = ("small", "big")


class Question(NamedTuple):
    """A question about an image, and its answer.

    Args:
        kind: `description` (the expression alone), `colour`, `size` or `name`.
    """

    kind: str
    text: str
    answer: str


def make_questions(expression: str, answer: str) -> tuple[Question, ...]:
    """Questions about the object of an expression, whose `answer` gives colour, size and name.

    Attributes that the expression mentions are not asked for. Any other form of answer gives only a description.

    >>> for question in make_questions("the dog on the left", "red small dog"):
    ...     print(question.kind, "|", question.text, "|", question.answer)
    description | the dog on the left | red small dog
    colour | what colour is the dog on the left ? | red
    size | how big is the dog on the left ? | small
    """
    questions = [Question("description", expression, answer)]
    words = answer.split()
    colour = next((word for word in words if word in (*PALETTE, "plain")), None)
    size = next((word for word in words if word in SIZES), None)
    name = next((word for word in words if word in NAMES), None)
    if len(words) != 3 or colour is None or size is None or name is None:
        return tuple(questions)
    expression_words = expression.split()
    phrase = expression if expression_words[0] in ("the", "something") else f"the {expression}"
    if colour not in expression_words:
        questions.append(Question("colour", f"what colour is {phrase} ?", colour))
    if size not in expression_words:
        questions.append(Question("size", f"how big is {phrase} ?", size))
    if name not in expression_words:
        questions.append(Question("name", f"what is {phrase} ?", name))
    return tuple(questions)
