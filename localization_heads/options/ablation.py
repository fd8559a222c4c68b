"""The options of `stage=ablate`: heads switched off, or steered."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from localization_heads.options.kinds import Options, Several, option, options


@options
class AblateOptions(Options):
    """Heads switched off, or steered (stage=ablate)."""

    counts: Annotated[tuple[Annotated[int, Field(ge=0, le=10_000)], ...], Several, Field(min_length=1)] = (
        option((0, 1, 2, 3, 5, 10), "How many heads of the list are switched off at a time.")
    )
    draws: int = option(5, "Random sets of as many heads of the same layers.", ge=1, le=100)
    measure: Literal["answers", "boxes", "maps", "all"] = option(
        "all",
        "What is measured: answers (those that are right), boxes (that the model writes itself), maps (of the heads "
        "that stay on), or all that the entries and the model allow.",
    )
    how: Literal["zero", "mean"] = option(
        "zero", "What a head that is switched off writes: zero, or its mean over the prompt."
    )
    answer_tokens: int = option(8, "Tokens of an answer that are read, at most.", ge=1, le=256)
    steer: bool = option(
        False,
        "Steer the heads towards regions instead of switching them off: does the answer name what is there? Entries "
        "have regions, each with its answer; of data=scenes, scenes of two objects are drawn.",
    )
    strength: float = option(
        4.0, "Of steering: what is added to the heads' logits on the region.", ge=-100, le=100
    )
