"""Predictions as a COCO data set, for annotation tools, FiftyOne and pycocotools."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from localization_heads.data.images import image_size
from localization_heads.data.samples import Sample
from localization_heads.errors import shown
from localization_heads.store.results import Instance, Prediction

CATEGORY = {"id": 1, "name": "object", "supercategory": ""}


def to_coco(predictions: Iterable[Prediction], samples: Mapping[str, Sample]) -> dict[str, Any]:
    """Convert predictions to the dict `{"info", "images", "annotations", "categories"}` of a COCO data set.

    There is one annotation per expression with a box or, with `instances=all`, one per box. Boxes are
    `[x, y, width, height]` in pixels, masks are COCO RLE. An annotation also has `score`, `expression` and
    `sample_id`. Expressions of one image share its image entry.

    Args:
        predictions: as from `read_predictions`; failed ones are skipped.
        samples: by id; predictions with other ids are skipped, since their image is unknown.

    Raises:
        ImageError: an image whose size is needed cannot be read.
        MaskError: a mask cannot be decoded; the message names the prediction.
    """
    images: dict[str, dict[str, Any]] = {}
    used_ids: set[int] = set()
    annotations: list[dict[str, Any]] = []
    for prediction in predictions:
        sample = samples.get(prediction.id)
        if sample is None or prediction.bbox is None:
            continue
        sample = sample.at(prediction.image_index)
        key = sample.image_key or prediction.id
        if key not in images:
            images[key] = _image_entry(_image_id(sample, used_ids), sample, prediction)
        image = images[key]
        for instance in [prediction] if prediction.boxes is None else prediction.boxes:
            annotations.append(_annotation(len(annotations) + 1, image["id"], sample, prediction.id, instance))
    return {
        "info": {"description": "localization-heads predictions"},
        "images": list(images.values()),
        "annotations": annotations,
        "categories": [CATEGORY],
    }


def results_of(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The annotations as the list of results that pycocotools' `loadRes` takes.

    Args:
        data: a data set from `to_coco`.
    """
    keys = ("image_id", "category_id", "bbox", "score", "segmentation", "sample_id")
    return [
        {key: annotation[key] for key in keys if key != "segmentation" or annotation[key]}
        for annotation in data["annotations"]
    ]


COCO_NAME = re.compile(r"coco:(\d{1,12})|.*COCO_\w+_(\d{12})\.\w+")
"""Names that contain the image's id in COCO."""


def _image_id(sample: Sample, used_ids: set[int]) -> int:
    """The image's id in COCO if its file name or `picture` contains it, else an unused number; added to `used_ids`."""
    matches = (COCO_NAME.fullmatch(name) for name in (sample.picture, sample.image_file))
    official = [int(match[1] or match[2]) for match in matches if match]
    unused = range(len(used_ids) + 1, 2 * len(used_ids) + 2)  # of these at least one is free
    image_id: int = next(id for id in (*official, *unused) if id not in used_ids)
    used_ids.add(image_id)
    return image_id


def _image_entry(image_id: int, sample: Sample, prediction: Prediction) -> dict[str, Any]:
    if prediction.mask is not None:
        height, width = (int(n) for n in prediction.mask["size"])
    else:
        width, height = image_size(sample.single)
    name = sample.image_file or prediction.id
    return {"id": image_id, "file_name": name, "width": width, "height": height}


def _annotation(
    annotation_id: int, image_id: int, sample: Sample, sample_id: str, instance: Prediction | Instance
) -> dict[str, Any]:
    assert instance.bbox is not None
    x0, y0, x1, y1 = instance.bbox
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": CATEGORY["id"],
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": _area(sample_id, instance),
        "segmentation": instance.mask if instance.mask is not None else [],
        "iscrowd": 0,
        "score": instance.score,
        "expression": sample.expression,
        "sample_id": sample_id,
    }


def _area(sample_id: str, instance: Prediction | Instance) -> float:
    """Area of the mask, or of the box without one, in pixels."""
    if instance.mask is None:
        assert instance.bbox is not None
        x0, y0, x1, y1 = instance.bbox
        return (x1 - x0) * (y1 - y0)
    from localization_heads.data.masks import MaskError, read_mask

    height, width = instance.mask["size"]
    try:
        return float(read_mask(instance.mask, (width, height)).sum())
    except MaskError as error:
        raise MaskError(f"the prediction of {shown(sample_id)}: {error}") from error
