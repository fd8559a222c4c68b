"""Questions about the object that an expression means, whose answers are known, as the embedded model learnt them.

They are made from an expression and the answer that describes its object, so entries that were written before can be
asked as well.
"""

from __future__ import annotations

from typing import NamedTuple

from localization_heads.scenes.artwork import NAMES, PALETTE

SIZES = ("small", "big")


class Question(NamedTuple):
    """A question about an image with its known answer.

    Args:
        kind: `description` (the expression by itself), `colour`, `size` or `name`.
    """

    kind: str
    text: str
    answer: str


def questions(expression: str, answer: str) -> tuple[Question, ...]:
    """What can be asked about the object of an expression, of which `answer` says colour, size and name.

    What the expression itself says is not asked. An answer of another form is asked as a description alone.

    >>> for question in questions("the dog on the left", "red small dog"):
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
