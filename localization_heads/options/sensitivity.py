"""The options of the third criterion, which are a part of `criteria=`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from localization_heads.options.kinds import Options, Several, Wants, Word, option, options

Sensitivity = Literal["none", "siblings"]
KIND_WORDS = ("animal", "thing", "vehicle")


@options
class SensitivityOptions(Options):
    """The third criterion: a head that localizes moves when the expression changes."""

    sensitivity: Sensitivity = option(
        "none",
        "Third criterion: nothing (paper), or rank the heads that criterion 1 keeps by how far their maps move when "
        "other expressions of the same image are asked (siblings, criteria=robust). A sample that picks its own heads "
        "goes by its other expressions alone, without the mirrored image.",
        kw_only=True,
    )
    siblings: Annotated[
        tuple[Word, ...],
        Several,
        Field(min_length=1, max_length=8),
        Wants("write one to eight words such as [animal,thing,vehicle]"),
    ] = option(
        KIND_WORDS,
        "For criteria.sensitivity: words that are asked beside the other expressions which the data have of an image; "
        "two of those, filled up to three with words that the expression does not contain.",
        kw_only=True,
    )
    mirrored: int = option(
        10,
        "For criteria.sensitivity: of so many images the mirrored image is asked as well, with left and right swapped "
        "in the expression: a head whose map does not follow wanders and does not localize. 0 asks none.",
        ge=0,
        le=1_000_000,
        kw_only=True,
    )
