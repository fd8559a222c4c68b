"""The families of SAMs that transformers knows, and how their checkpoints are read."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localization_heads.errors import UsageError, WorkError
from localization_heads.lvlm.checkpoint_files import (
    check_counts,
    check_files,
    check_size,
    checkpoint_folder,
    first_line,
    loading_reason,
    weights_in,
    written_config,
)
from localization_heads.lvlm.loading import hub_answers, hub_trouble
from localization_heads.lvlm.spec import local_path

Colours = tuple[float, float, float]

IMAGENET_MEAN: Colours = (0.485, 0.456, 0.406)
IMAGENET_STD: Colours = (0.229, 0.224, 0.225)
HALF: Colours = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Family:
    """What tells one generation of SAM from the next.

    Args:
        kind: the value of `segmenter.kind`.
        model_class: in transformers.
        model_types: of the checkpoints that it reads.
        squashes: whether pictures are squashed to a square; else they are padded right or below.
        mean, std: of the colours, where the checkpoint's folder does not say.
    """

    kind: str
    model_class: str
    model_types: tuple[str, ...]
    squashes: bool
    mean: Colours = IMAGENET_MEAN
    std: Colours = IMAGENET_STD


FAMILIES = {
    family.kind: family
    for family in (
        Family("sam", "SamModel", ("sam",), squashes=False),
        # the video checkpoints hold the image model, and so do SAM 3's
        Family("sam2", "Sam2Model", ("sam2", "sam2_video"), squashes=True),
        Family(
            "sam3",
            "Sam3TrackerModel",
            ("sam3_tracker", "sam3_tracker_video", "sam3_video", "sam3"),
            squashes=True,
            mean=HALF,
            std=HALF,
        ),
    )
}


def load_checkpoint(family: Family, name: str) -> tuple[Any, Colours, Colours]:
    """The model in float32 on the CPU, and the mean and deviation of its colours.

    Raises:
        UsageError: no such folder, a folder that holds no model, or a model of another family.
        WorkError: the checkpoint cannot be had from the hub, or cannot be read, or lacks weights.
    """
    import transformers

    source = _source(name)
    settings: dict[str, Any] = {"local_files_only": _only_here(source), "trust_remote_code": False}
    try:
        check_counts(written_config(source, **settings), f"segmenter.name={name}")
        config = transformers.AutoConfig.from_pretrained(source, **settings)
        found = config.model_type
        if found not in family.model_types:
            raise UsageError(f"segmenter.name={name}: it is a {found}, not a {family.kind}{_meant(found)}")
        check_size(config.to_dict(), weights_in(checkpoint_folder(source)), f"segmenter.name={name}")
        kind = getattr(transformers, family.model_class)
        model, info = kind.from_pretrained(source, output_loading_info=True, dtype="float32", **settings)
    except UsageError:
        raise
    except (OSError, ConnectionError, TimeoutError) as error:
        raise WorkError(_why(name, error)) from error
    except Exception as error:  # broken weights and configs raise anything
        raise WorkError(f"segmenter.name={name} cannot be loaded: {loading_reason(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise WorkError(
            f"segmenter.name={name}: its checkpoint lacks {len(missing)} tensors, such as {missing[0]}"
        )
    return model, *_colours(family, source, settings)


def _source(name: str) -> str:
    """A local folder, or a hub id."""
    folder = local_path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(
                f"segmenter.name={name}: the folder holds no config.json, so it is no saved model"
            )
        check_files(folder, f"segmenter.name={name}")
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UsageError(
            f"segmenter.name={name}: no such folder, and no Hugging Face id (owner/name) either; "
            "segmenter=grabcut needs no weights"
        )
    return name


def _only_here(source: str) -> bool:
    return Path(source).is_dir() or not hub_answers()


def _meant(found: str) -> str:
    """The choice that takes such a model."""
    fitting = [kind for kind, family in FAMILIES.items() if found in family.model_types]
    return f"; write segmenter={fitting[0]}" if fitting else ""


def _why(name: str, error: Exception) -> str:
    if local_path(name).is_dir():
        return f"segmenter.name={name} cannot be read: {first_line(error)}"
    return (
        f"segmenter.name={name} is neither a folder here nor to be had from the Hugging Face hub "
        f"({hub_trouble() or first_line(error)}). Without a network: segmenter=grabcut, "
        "or segmenter.name=/path/to/folder"
    )


def _colours(family: Family, source: str, settings: dict[str, Any]) -> tuple[Colours, Colours]:
    """The checkpoint's mean and deviation, or its family's where it does not say."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        facts, _ = ImageProcessingMixin.get_image_processor_dict(
            source, local_files_only=settings["local_files_only"]
        )
    except (OSError, ValueError) as error:
        logging.getLogger(__name__).debug("%s: no preprocessor_config.json (%s)", source, error)
        return family.mean, family.std
    return _three(facts.get("image_mean"), family.mean), _three(facts.get("image_std"), family.std)


def _three(values: Any, default: Colours) -> Colours:
    """Three positive numbers, or else the default."""
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError):
        return default
    return (red, green, blue) if min(red, green, blue) > 0 else default
