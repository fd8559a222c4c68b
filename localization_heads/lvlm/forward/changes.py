"""What may be changed in a loaded model for a while: the protocol of a change, and the heads that one is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from localization_heads.data.sources import PromptImages
from localization_heads.errors import UsageError, shown
from localization_heads.heads.head import Head


class Change(Protocol):
    """A change of a model that is in force, one of `LVLM.changes`.

    Attributes:
        why_not_shared: why no prompt may share an image's encoding while it is; None if they may.
    """

    why_not_shared: str | None

    def on_inputs(self, lvlm: Any, images: Sequence[PromptImages], inputs: Mapping[str, Any]) -> None:
        """Called with all that the processor has made ready, one per sample."""


def resolve_heads(heads: Iterable[Any], lvlm: Any, what: str) -> tuple[Head, ...]:
    """The heads, each once, as `Head`s, from `Head`s, pairs or texts such as `14-24`.

    Args:
        lvlm: the model that should have them.
        what: the beginning of the error's message.

    Raises:
        UsageError: the model does not have one of them, it does not see the image, or it is no head.
    """
    known, found = sorted(lvlm.attention_modules), dict.fromkeys(_head(head, what) for head in heads)
    for head in found:
        if not (0 <= head.layer < lvlm.num_layers and 0 <= head.head < lvlm.num_heads):
            raise UsageError(
                f"{what}: there is no {head}; the layers are 0 to {lvlm.num_layers - 1} and the heads 0 to "
                f"{lvlm.num_heads - 1}"
            )
        if head.layer not in known:
            raise UsageError(
                f"{what}: there is no {head}; layer {head.layer} has no heads that see the image, choose from "
                f"{', '.join(map(str, known))}"
            )
    return tuple(found)


def _head(value: Any, what: str) -> Head:
    try:
        if isinstance(value, str):
            return Head.parse(value)
        layer, head = value
        return Head(int(layer), int(head))
    except (TypeError, ValueError):
        raise UsageError(
            f"{what}: {shown(str(value))} names no head; give a list such as [(14, 24), (14, 13)]"
        ) from None
