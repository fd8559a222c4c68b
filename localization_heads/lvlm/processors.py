"""Processors for pictures only: transformers cannot load the video half of one without torchvision."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin


class _WithoutVideo(ProcessorMixin):
    """Stands between a processor and `ProcessorMixin`, and drops the video processor that is handed on."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.pop("video_processor", None)
        super().__init__(*args, **options)


def images_only(kind: Any) -> Any:
    """A processor class without its video part, which it then neither loads nor needs.

    Args:
        kind: a subclass of `ProcessorMixin` that takes its video processor last or by name.
    """
    attributes = [name for name in kind.get_attributes() if "video" not in name]
    members = {"get_attributes": classmethod(lambda _: attributes)}
    return type(kind.__name__, (kind, _WithoutVideo), members)
