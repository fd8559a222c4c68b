"""What turns maps into a box and a mask: heads, criteria, read-out and segmenter."""

from __future__ import annotations

from localization_heads.options.groups import SegmenterOptions
from localization_heads.segmentation.segmenter import Segmenter


def make_segmenter(options: SegmenterOptions) -> Segmenter | None:
    """The segmenter, its weights loaded; None for `kind="none"`.

    Raises:
        UsageError: an extra is missing, or there is no such model.
        WorkError: the weights cannot be had or read.
    """
    if options.kind == "none":
        return None
    if options.kind == "grabcut":
        from localization_heads.segmentation.grabcut import GrabCut

        return GrabCut(options.iterations)
    from localization_heads.segmentation.sam import load_sam

    return load_sam(options)
