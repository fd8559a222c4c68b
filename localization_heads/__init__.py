"""Find the attention heads of a vision-language model that know where things are, and ground with them.

>>> import localization_heads as lh
>>> lvlm = lh.load_model(device="cpu")
>>> result = lh.ground(lvlm, "examples/images/octopus_14.png", "the animal")
>>> len(result.box), result.mask.shape == result.heatmap.shape
(4, True)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from localization_heads.packages import check_versions
from localization_heads.version import __version__ as __version__

if TYPE_CHECKING:
    from localization_heads.attention import AttentionMaps
    from localization_heads.data.address import Address
    from localization_heads.data.samples import Sample, load_samples
    from localization_heads.data.together import Together
    from localization_heads.errors import UsageError, WorkError
    from localization_heads.evaluating import evaluate
    from localization_heads.finding import find_heads
    from localization_heads.grounder import make_segmenter
    from localization_heads.grounding.ground import Grounding
    from localization_heads.heads.head import Head
    from localization_heads.heads.ranking import HeadRanking
    from localization_heads.hub import load_heads, push_heads
    from localization_heads.interop.detections import to_supervision
    from localization_heads.interop.pipeline import pipeline
    from localization_heads.located import Located, to_coco
    from localization_heads.locating import ground, ground_all
    from localization_heads.lvlm.checkpoints.loading import load_model
    from localization_heads.lvlm.interventions.steering import steer
    from localization_heads.lvlm.interventions.switching import switch_off
    from localization_heads.options.groups import CriteriaOptions, GroundingOptions, SegmenterOptions


# The public names and where they live. They are imported on first use, so that `import localization_heads`
# and `--help` take milliseconds and never load torch.
_HOMES = {
    "Address": "data.address",
    "AttentionMaps": "attention",
    "CriteriaOptions": "options.groups",
    "Grounding": "grounding.ground",
    "GroundingOptions": "options.groups",
    "Head": "heads.head",
    "HeadRanking": "heads.ranking",
    "Located": "located",
    "Sample": "data.samples",
    "SegmenterOptions": "options.groups",
    "Together": "data.together",
    "UsageError": "errors",
    "WorkError": "errors",
    "evaluate": "evaluating",
    "find_heads": "finding",
    "ground": "locating",
    "ground_all": "locating",
    "load_heads": "hub",
    "load_model": "lvlm.checkpoints.loading",
    "load_samples": "data.samples",
    "make_segmenter": "grounder",
    "pipeline": "interop.pipeline",
    "push_heads": "hub",
    "steer": "lvlm.interventions.steering",
    "switch_off": "lvlm.interventions.switching",
    "to_coco": "located",
    "to_supervision": "interop.detections",
}

__all__ = [
    "Address",
    "AttentionMaps",
    "CriteriaOptions",
    "Grounding",
    "GroundingOptions",
    "Head",
    "HeadRanking",
    "Located",
    "Sample",
    "SegmenterOptions",
    "Together",
    "UsageError",
    "WorkError",
    "evaluate",
    "find_heads",
    "ground",
    "ground_all",
    "load_heads",
    "load_model",
    "load_samples",
    "make_segmenter",
    "pipeline",
    "push_heads",
    "steer",
    "switch_off",
    "to_coco",
    "to_supervision",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'localization_heads' has no attribute '{name}'")
    check_versions()
    return getattr(import_module(f"localization_heads.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
