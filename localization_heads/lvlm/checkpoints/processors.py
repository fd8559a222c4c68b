"""Processors without their video half, which is never used; and values that a checkpoint's processor lacks.

The video half would need torchvision, and settings that not every checkpoint has.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoProcessor, ProcessorMixin
from transformers.models.auto.processing_auto import (  # type: ignore[attr-defined]  # imported there, not declared
    PROCESSOR_MAPPING_NAMES,
    processor_class_from_name,
)

from localization_heads.errors import UsageError
from localization_heads.lvlm.families.geometry import MAX_PREPARED_PIXELS, first_of, image_token_id

MAX_SETTINGS = 16 << 20
"""Bytes of a tokenizer's settings."""
MAX_SIDE = 16_384
"""Pixels of an image's side that a processor may ask for."""
_CLASS_TOKEN = ("clip_vision_model", "vit", "dinov2", "deit")
"""Vision towers whose features begin with a class token."""


_BORROWED = {
    "cosmos3_omni": "Qwen3VLProcessor",
    "glm_ocr": "Glm46VProcessor",
    "glmga": "Glm46VProcessor",
    "qwen2_5_omni_thinker": "Qwen2_5OmniProcessor",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeProcessor",
}
"""Processors of families that transformers lists none for."""


_WITH_TORCHVISION = ("FuyuImageProcessor", "PixtralImageProcessor")
"""Image processors that are used as torchvision has them: their families cannot do without it."""


class _NoVideo:
    """Stands where processors ask their video part for its settings."""

    def __init__(self) -> None:
        self.model_input_names: list[str] = []

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _WithoutVideo(ProcessorMixin):
    """Stands between a processor and `ProcessorMixin`, and drops the video processor that is handed on."""

    video_processor = _NoVideo()

    def __init__(self, *args: Any, **options: Any) -> None:
        options.pop("video_processor", None)
        parts = [part for part in args if part is not None]
        super().__init__(*parts, **options)  # type: ignore[no-untyped-call]


class _ImagesOnly(type):
    """Makes such processors without what their classes insist on. `__init__` stays: transformers reads its names."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        names = list(inspect.signature(cls.__init__).parameters)[1:]  # type: ignore[misc]
        position = names.index("video_processor") if "video_processor" in names else len(args)
        if position < len(args):  # the other parts come in order, and some classes name it before them
            args = (*args[:position], None, *args[position:])
        elif "video_processor" in names:
            options.setdefault("video_processor", None)  # SmolVLM and Gemma 4 have no default
        with _spelling_numbers(cls.__mro__[1]):
            return super().__call__(*args, **options)


def without_video(kind: Any) -> Any:
    """A processor class without its video part, which it then neither loads nor needs.

    Args:
        kind: a subclass of `ProcessorMixin`. The one that is made takes its other parts, in their order.
    """
    attributes = [name for name in kind.get_attributes() if "video" not in name]
    members = {"get_attributes": classmethod(lambda _: attributes)}
    return _ImagesOnly(kind.__name__, (kind, _WithoutVideo), members)


@contextmanager
def _spelling_numbers(kind: Any) -> Iterator[None]:
    """SmolVLM's processor cannot be made without num2words, with which it spells the times of a video's frames."""
    module = sys.modules[kind.__module__]
    missing = getattr(module, "num2words", str) is None
    if missing:
        module.num2words = str  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if missing:
            module.num2words = None  # type: ignore[attr-defined]


def processor_kind(model_type: str) -> Any:
    """The class that loads a family's processor: `AutoProcessor`, or one without its video part.

    Videos need torchvision, and settings that a checkpoint may lack; images need neither. Families that need
    torchvision for images as well are left to `AutoProcessor`, whose error says so.
    """
    kind = processor_class_from_name(PROCESSOR_MAPPING_NAMES.get(model_type) or _BORROWED.get(model_type, ""))
    try:
        has_video = kind is not None and any("video" in name for name in kind.get_attributes())
    except ImportError:  # a placeholder for a class that cannot be imported
        has_video = False
    return without_video(kind) if has_video else AutoProcessor


def with_pillow(image_processor: Any, kind: str | None = None, **changes: Any) -> Any:
    """The image processor in the form that resizes with Pillow, where transformers has one.

    With torchvision installed transformers loads another form, whose resized pixels differ by the rounding: what a
    checkpoint sees, and so its results, would depend on the packages beside it.

    Args:
        kind: a class of image processors that is to take its settings; by default its own.
        changes: settings by name.
    """
    kind = kind or type(image_processor).__name__.removesuffix("Pil")
    form = None if kind in _WITH_TORCHVISION else getattr(transformers, f"{kind}Pil", None)
    if form is None or (type(image_processor) is form and not changes):
        return image_processor
    settings = image_processor.to_dict() | changes
    return form(**{k: v for k, v in settings.items() if k not in ("image_processor_type", "processor_class")})


def complete(processor: Any, config: Any) -> None:
    """Fill in what a checkpoint's processor files leave out, from its configuration or tokenizer.

    Checkpoints saved by older versions of transformers say neither the patch size nor how the tower's features are
    chosen (both stand in `config.json`), keep the chat template with the tokenizer, or have no padding token.

    Args:
        processor: as loaded; it is changed.
        config: the model's configuration, which the weights must fit.
    """
    for name, value in _configured(config).items():
        if hasattr(processor, name) and not getattr(processor, name):
            setattr(processor, name, value)
    if (
        "mm_token_type_ids" in processor.model_input_names
    ):  # some give what the model needs only where it is asked
        processor.return_mm_token_type_ids = True
    tokenizer = processor.tokenizer
    if not getattr(processor, "chat_template", None):
        processor.chat_template = getattr(tokenizer, "chat_template", None)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _padding(tokenizer, config)


def check_image_sizes(image_processor: Any, shown: str) -> None:
    """Refuse settings under which any image would be resized to one that fills the memory.

    Args:
        shown: option and value, which the message begins with.

    Raises:
        UsageError: names the setting.
    """
    # Qwen's kind writes areas into the same fields where others write sides
    limit = MAX_PREPARED_PIXELS if hasattr(image_processor, "merge_size") else MAX_SIDE
    settings = {name: getattr(image_processor, name, None) for name in ("size", "crop_size", "pad_size")}
    sizes = [(name, *item) for name, size in settings.items() for item in dict(size or {}).items()]
    for name, key, value in [*sizes, ("min_pixels", "", getattr(image_processor, "min_pixels", None))]:
        if isinstance(value, int | float) and value > limit:
            setting = f"{name}.{key}".rstrip(".")
            raise UsageError(
                f"{shown}: its image processor is set to {setting}={value:.3g}, more than {limit:,} pixels"
            )


def bos_trouble(tokenizer: Any, folder: Path | None) -> str | None:
    """What a checkpoint says about the token that begins a text, where its tokenizer does otherwise; else None.

    The setting `add_bos_token` of `tokenizer_config.json` is not read by every class of tokenizers: what
    `tokenizer.json` says holds.

    Args:
        folder: of the checkpoint; None where its files are not known.
    """
    path = folder and folder / "tokenizer_config.json"
    if not path or not path.is_file() or path.stat().st_size > MAX_SETTINGS or tokenizer.bos_token_id is None:
        return None
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None  # transformers has read the tokenizer all the same
    asked = settings.get("add_bos_token") if isinstance(settings, dict) else None
    added = tokenizer.bos_token_id in tokenizer("a")["input_ids"][:1]
    if not isinstance(asked, bool) or asked == added:
        return None
    does = "begins every prompt with" if added else "leaves out"
    return (
        f"tokenizer_config.json says add_bos_token={str(asked).lower()}, and the tokenizer {does} "
        f"{tokenizer.bos_token}, as tokenizer.json has it: prompts may differ from those of its training"
    )


def _configured(config: Any) -> dict[str, Any]:
    """Attributes of processors by name, as the configuration of the model has them."""
    vision = getattr(config, "vision_config", None)
    side, patch = (first_of(getattr(vision, name, None)) for name in ("image_size", "patch_size"))
    values = {
        "patch_size": patch,
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", "default"),
        # A tower with a class token has it always, and a processor that says 0 does not fit it.
        "num_additional_image_tokens": int(getattr(vision, "model_type", None) in _CLASS_TOKEN),
        "num_image_tokens": side and patch and (side // patch) ** 2,
    }
    return {name: value for name, value in values.items() if value}


def _padding(tokenizer: Any, config: Any) -> str:
    """A token to pad with: the configuration's, else the end of a text. It is masked; any but the image's will do."""
    text, size = config.get_text_config(), len(tokenizer)
    for part in (config, text):
        index = getattr(part, "pad_token_id", None)
        if isinstance(index, int) and 0 <= index < size and index != image_token_id(config):
            return str(tokenizer.convert_ids_to_tokens(index))
    return str(tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0))
