"""`report.html`: one self-contained page about one run, for readers who did not run it."""

from localization_heads.report.content import Card, Gallery, HeadFacts, Report, outline, thumbnail, tiny_map
from localization_heads.report.page import render

__all__ = ["Card", "Gallery", "HeadFacts", "Report", "outline", "render", "thumbnail", "tiny_map"]
