"""Expressions of a scene that refer to nothing in it, or to several objects at once.

An expression with no target is as close to the scene as can be told for certain: an object that is not there, a colour
that no object of that name has, a place or a relation that the only object of that name does not have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from localization_heads.scenes.artwork import NAMES, PALETTE
from localization_heads.scenes.expressions import MARGIN, PLACES, RELATIONS, Phrase, Thing, meant_by, say

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
