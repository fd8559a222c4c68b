"""Processors for pictures only: transformers cannot load the video half of one without torchvision."""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor, ProcessorMixin
from transformers.models.auto.processing_auto import (  # type: ignore[attr-defined]  # imported there, not declared
    PROCESSOR_MAPPING_NAMES,
    processor_class_from_name,
)
from transformers.utils.import_utils import is_torchvision_available


class _WithoutVideo(ProcessorMixin):
    """Stands between a processor and `ProcessorMixin`, and drops the video processor that is handed on."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.pop("video_processor", None)
        super().__init__(*args, **options)  # type: ignore[no-untyped-call]


def images_only(kind: Any) -> Any:
    """A processor class without its video part, which it then neither loads nor needs.

    Args:
        kind: a subclass of `ProcessorMixin` that takes its video processor last or by name.
    """
    attributes = [name for name in kind.get_attributes() if "video" not in name]
    members = {"get_attributes": classmethod(lambda _: attributes)}
    return type(kind.__name__, (kind, _WithoutVideo), members)


def processor_kind(model_type: str) -> Any:
    """What loads a family's processor: `AutoProcessor`, or without torchvision, the class less its video part.

    Families that need torchvision for pictures as well are left to `AutoProcessor`, whose error says so.
    """
    if is_torchvision_available():
        return AutoProcessor
    kind = processor_class_from_name(PROCESSOR_MAPPING_NAMES.get(model_type, ""))
    try:
        has_video = kind is not None and any("video" in name for name in kind.get_attributes())
    except ImportError:  # a placeholder for a class that cannot be imported
        has_video = False
    return images_only(kind) if has_video else AutoProcessor
