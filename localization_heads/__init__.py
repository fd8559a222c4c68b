"""Find the attention heads of a vision-language model that localize objects, and ground expressions with them.

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
    from localization_heads.attention import AttentionMaps as AttentionMaps
    from localization_heads.data.address import Address as Address
    from localization_heads.data.samples import Sample as Sample
    from localization_heads.data.samples import load_samples as load_samples
    from localization_heads.data.sources import Together as Together
    from localization_heads.errors import UsageError as UsageError
    from localization_heads.errors import WorkError as WorkError
    from localization_heads.evaluating import evaluate as evaluate
    from localization_heads.finding import find_heads as find_heads
    from localization_heads.grounder import make_segmenter as make_segmenter
    from localization_heads.grounding.ground import Grounding as Grounding
    from localization_heads.heads.head import Head as Head
    from localization_heads.heads.record import HeadRanking as HeadRanking
    from localization_heads.hub import load_heads as load_heads
    from localization_heads.hub import push_heads as push_heads
    from localization_heads.interop.detections import to_supervision as to_supervision
    from localization_heads.interop.pipeline import pipeline as pipeline
    from localization_heads.located import Located as Located
    from localization_heads.located import to_coco as to_coco
    from localization_heads.locating import ground as ground
    from localization_heads.locating import ground_all as ground_all
    from localization_heads.lvlm.checkpoints.loading import load_model as load_model
    from localization_heads.lvlm.interventions.steering import steer as steer
    from localization_heads.lvlm.interventions.switching import switch_off as switch_off
    from localization_heads.options.groups import CriteriaOptions as CriteriaOptions
    from localization_heads.options.groups import GroundingOptions as GroundingOptions
    from localization_heads.options.groups import SegmenterOptions as SegmenterOptions


# Public name -> module. Names are imported on first use, so that `import localization_heads` and `--help` take
# milliseconds and never import torch.
_MODULES = {
    "Address": "data.address",
    "AttentionMaps": "attention",
    "CriteriaOptions": "options.groups",
    "Grounding": "grounding.ground",
    "GroundingOptions": "options.groups",
    "Head": "heads.head",
    "HeadRanking": "heads.record",
    "Located": "located",
    "Sample": "data.samples",
    "SegmenterOptions": "options.groups",
    "Together": "data.sources",
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

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'localization_heads' has no attribute '{name}'")
    check_versions()
    return getattr(import_module(f"localization_heads.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
