"""Temporary changes of a loaded model (heads switched off, heads steered): their protocol, and their heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from localization_heads.data.sources import PromptImages
from localization_heads.errors import UsageError, shown
from localization_heads.heads.head import Head, check_heads


class Change(Protocol):
    """An active change, one of `LVLM.changes`.

    Attributes:
        why_not_shared: why prompts may not share an image's encoding while it is active; None if they may.
    """

    why_not_shared: str | None

    def on_inputs(self, lvlm: Any, images: Sequence[PromptImages], inputs: Mapping[str, Any]) -> None:
        """Called for every batch with its images, one entry per sample, and the processor's output."""


def validate_heads(heads: Iterable[Any], lvlm: Any, what: str) -> tuple[Head, ...]:
    """Return the heads without duplicates, from `Head`s, pairs or texts such as `14-24`.

    Args:
        lvlm: the model that has them.
        what: the beginning of error messages.

    Raises:
        UsageError: an entry is no head, or the model has no such head that attends to the image.
    """
    layers, resolved = sorted(lvlm.attention_modules), dict.fromkeys(_as_head(head, what) for head in heads)
    for head in resolved:
        check_heads((head,), lvlm.num_layers, lvlm.num_heads, what)
        if head.layer not in layers:
            raise UsageError(
                f"{what}: there is no {head}; layer {head.layer} has no heads that see the image, choose from "
                f"{', '.join(map(str, layers))}"
            )
    return tuple(resolved)


def _as_head(value: Any, what: str) -> Head:
    try:
        if isinstance(value, str):
            return Head.parse(value)
        layer, head = value
        return Head(int(layer), int(head))
    except (TypeError, ValueError):
        raise UsageError(
            f"{what}: {shown(str(value))} names no head; give a list such as [(14, 24), (14, 13)]"
        ) from None
