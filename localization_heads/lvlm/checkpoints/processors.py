"""Loading of processors: without their video part, with Pillow for resizing, and completed where settings are missing.

The video part is never used, but would need torchvision and settings that many checkpoints lack.
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

MAX_TOKENIZER_CONFIG_BYTES = 16 << 20
MAX_SIDE = 16_384
"""Largest side, in pixels, to which a processor may resize an image."""
_CLASS_TOKEN_TOWERS = ("clip_vision_model", "vit", "dinov2", "deit")
"""Vision towers whose features begin with a class token."""

_UNLISTED_PROCESSORS = {
    "cosmos3_omni": "Qwen3VLProcessor",
    "glm_ocr": "Glm46VProcessor",
    "glmga": "Glm46VProcessor",
    "qwen2_5_omni_thinker": "Qwen2_5OmniProcessor",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeProcessor",
}
"""Processor classes by model type, where transformers has no entry for the model type."""

_TORCHVISION_ONLY = ("FuyuImageProcessor", "PixtralImageProcessor")
"""Image processors that keep their torchvision backend, without which their families do not work."""


def processor_class(model_type: str) -> Any:
    """Return the class that loads a family's processor: `AutoProcessor`, or one without its video part.

    Families that need torchvision for images as well are left to `AutoProcessor`, whose error says so.
    """
    kind = processor_class_from_name(
        PROCESSOR_MAPPING_NAMES.get(model_type) or _UNLISTED_PROCESSORS.get(model_type, "")
    )
    try:
        has_video = kind is not None and any("video" in name for name in kind.get_attributes())
    except ImportError:  # a placeholder for a class that cannot be imported
        has_video = False
    return without_video(kind) if has_video else AutoProcessor


def without_video(kind: Any) -> Any:
    """Derive a processor class that neither loads nor needs a video part.

    Args:
        kind: a subclass of `ProcessorMixin`. The new class takes the other parts, in the same order.
    """
    attributes = [name for name in kind.get_attributes() if "video" not in name]
    members = {"get_attributes": classmethod(lambda _: attributes)}
    return _WithoutVideoMeta(kind.__name__, (kind, _DropsVideo), members)


class _NoVideo:
    """Stands in for the video processor: every setting is None."""

    def __init__(self) -> None:
        self.model_input_names: list[str] = []

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _DropsVideo(ProcessorMixin):
    """Sits between a processor and `ProcessorMixin` in the MRO, and drops the video processor argument."""

    video_processor = _NoVideo()

    def __init__(self, *args: Any, **options: Any) -> None:
        options.pop("video_processor", None)
        parts = [part for part in args if part is not None]
        super().__init__(*parts, **options)  # type: ignore[no-untyped-call]


class _WithoutVideoMeta(type):
    """Passes None for the video processor, which some classes require.

    `__init__` itself stays as it is, because transformers inspects its parameter names.
    """

    def __call__(cls, *args: Any, **options: Any) -> Any:
        names = list(inspect.signature(cls.__init__).parameters)[1:]  # type: ignore[misc]
        position = names.index("video_processor") if "video_processor" in names else len(args)
        if position < len(args):  # a class whose video processor is not its last part
            args = (*args[:position], None, *args[position:])
        elif "video_processor" in names:
            options.setdefault("video_processor", None)  # has no default in SmolVLM and Gemma 4
        with _without_num2words(cls.__mro__[1]):
            return super().__call__(*args, **options)


@contextmanager
def _without_num2words(kind: Any) -> Iterator[None]:
    """Let SmolVLM's processor be created without num2words, which it needs only for the times of video frames."""
    module = sys.modules[kind.__module__]
    missing = getattr(module, "num2words", str) is None
    if missing:
        module.num2words = str  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if missing:
            module.num2words = None  # type: ignore[attr-defined]


def use_pillow(image_processor: Any, kind: str | None = None, **changes: Any) -> Any:
    """Return the image processor with the backend that resizes with Pillow, if transformers has one.

    If torchvision is installed, transformers loads that backend instead, which rounds resized pixels differently:
    results would depend on which packages are installed.

    Args:
        kind: the name of another image processor class for the same settings; by default its own.
        changes: settings to change, by name.
    """
    kind = kind or type(image_processor).__name__.removesuffix("Pil")
    pillow_class = None if kind in _TORCHVISION_ONLY else getattr(transformers, f"{kind}Pil", None)
    if pillow_class is None or (type(image_processor) is pillow_class and not changes):
        return image_processor
    settings = image_processor.to_dict() | changes
    for name in ("image_processor_type", "processor_class"):
        settings.pop(name, None)
    return pillow_class(**settings)


def fill_in_missing(processor: Any, config: Any) -> None:
    """Fill in what a checkpoint's processor files leave out, from its configuration or tokenizer.

    Older versions of transformers saved neither the patch size nor the feature selection of the vision tower with the
    processor (both are in `config.json`), kept the chat template with the tokenizer, or set no padding token.

    Args:
        processor: the loaded processor, changed in place.
        config: the model's configuration, which the weights must match.
    """
    for name, value in _settings_from_config(config).items():
        if hasattr(processor, name) and not getattr(processor, name):
            setattr(processor, name, value)
    if "mm_token_type_ids" in processor.model_input_names:
        processor.return_mm_token_type_ids = True  # the model needs them, but some return them only on request
    tokenizer = processor.tokenizer
    if not getattr(processor, "chat_template", None):
        processor.chat_template = getattr(tokenizer, "chat_template", None)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _padding_token(tokenizer, config)


def _settings_from_config(config: Any) -> dict[str, Any]:
    """Return the processor attributes that follow from the model's configuration, by name."""
    vision = getattr(config, "vision_config", None)
    side, patch = (first_of(getattr(vision, name, None)) for name in ("image_size", "patch_size"))
    values = {
        "patch_size": patch,
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", "default"),
        # A processor that says 0 is wrong for a tower with a class token, which cannot be switched off.
        "num_additional_image_tokens": int(getattr(vision, "model_type", None) in _CLASS_TOKEN_TOWERS),
        "num_image_tokens": side and patch and (side // patch) ** 2,
    }
    return {name: value for name, value in values.items() if value}


def _padding_token(tokenizer: Any, config: Any) -> str:
    """Return the configuration's padding token, or else the end of text. Padding is masked: any but the image's do."""
    text, size = config.get_text_config(), len(tokenizer)
    for part in (config, text):
        index = getattr(part, "pad_token_id", None)
        if isinstance(index, int) and 0 <= index < size and index != image_token_id(config):
            return str(tokenizer.convert_ids_to_tokens(index))
    return str(tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0))


def check_image_sizes(image_processor: Any, option: str) -> None:
    """Refuse settings under which any image would be resized to one that exhausts memory.

    Args:
        option: the option and its value, with which the message begins.

    Raises:
        UsageError: names the setting.
    """
    # Processors of Qwen's kind put areas into the fields in which others put sides.
    limit = MAX_PREPARED_PIXELS if hasattr(image_processor, "merge_size") else MAX_SIDE
    settings = {name: getattr(image_processor, name, None) for name in ("size", "crop_size", "pad_size")}
    sizes = [(name, *item) for name, size in settings.items() for item in dict(size or {}).items()]
    for name, key, value in [*sizes, ("min_pixels", "", getattr(image_processor, "min_pixels", None))]:
        if isinstance(value, int | float) and value > limit:
            setting = f"{name}.{key}".rstrip(".")
            raise UsageError(
                f"{option}: its image processor is set to {setting}={value:.3g}, more than {limit:,} pixels"
            )


def bos_mismatch(tokenizer: Any, folder: Path | None) -> str | None:
    """Describe how a tokenizer's use of the BOS token contradicts its settings; None if it does not.

    Not every tokenizer class reads `add_bos_token` from `tokenizer_config.json`; `tokenizer.json` decides.

    Args:
        folder: the checkpoint's; None if its files are unknown.
    """
    path = folder and folder / "tokenizer_config.json"
    if not path or not path.is_file() or path.stat().st_size > MAX_TOKENIZER_CONFIG_BYTES:
        return None
    if tokenizer.bos_token_id is None:
        return None
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None  # transformers has loaded the tokenizer without this file
    setting = settings.get("add_bos_token") if isinstance(settings, dict) else None
    adds_bos = tokenizer.bos_token_id in tokenizer("a")["input_ids"][:1]
    if not isinstance(setting, bool) or setting == adds_bos:
        return None
    behaviour = "begins every prompt with" if adds_bos else "leaves out"
    return (
        f"tokenizer_config.json says add_bos_token={str(setting).lower()}, and the tokenizer {behaviour} "
        f"{tokenizer.bos_token}, as tokenizer.json has it: prompts may differ from those of its training"
    )
