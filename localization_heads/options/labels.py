"""The options of `stage=find` that rank heads by labels instead of by the criteria of the paper."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from localization_heads.errors import UsageError
from localization_heads.options.kinds import Options, option, options

HeadsBy = Literal["criteria", "mass", "iou", "pointing", "vrh"]
Shrink = Literal["none", "ranks", "scores"]


@options
class LabelOptions(Options):
    """What ranks the heads."""

    heads_by: HeadsBy = option(
        "criteria",
        "What ranks the heads: criteria (without labels, as the paper does); or, on entries with boxes or masks, the "
        "mean over these of the attention mass in the truth (mass), of the IoU of a head's own map with it (iou), of "
        "the share of hits of its strongest cell (pointing), or of the attention of the box that the model writes "
        "itself on the patches that the true one touches (vrh, for families with a native box).",
        section="heads from labels (stage=find, rank; docs/find-heads.md)",
        stages=("find", "rank"),
    )
    num_labels: Annotated[int, Field(ge=1)] | None = option(
        None,
        "For heads_by=mass, iou, pointing and vrh: labelled entries that are drawn for the ranking, by random_seed; "
        "null takes all. num_trials draws show its spread.",
        stages=("find", "rank"),
    )
    shrink: Shrink = option(
        "none",
        "Mix the label-free ranking into one from few labels, with weight n0 / (n + n0): not at all (none), by the "
        "heads' places (ranks), or by scores and selection frequencies, each divided by its highest (scores).",
        stages=("find", "rank"),
    )
    shrink_n0: float = option(
        10.0,
        "For shrink: as many labels weigh as much as the label-free ranking (n0).",
        gt=0,
        stages=("find", "rank"),
    )

    def check_labels(self) -> None:
        """UsageError for options of labels where the heads are ranked without any."""
        fields = type(self).__pydantic_fields__
        for name in ("num_labels", "shrink"):
            if self.heads_by == "criteria" and getattr(self, name) != fields[name].default:
                raise UsageError(
                    f"{name}=: heads_by=criteria takes no labels; write heads_by=mass, iou, pointing or vrh"
                )
