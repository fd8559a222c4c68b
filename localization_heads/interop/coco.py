"""Predictions as a COCO data set, which labelling tools, FiftyOne and pycocotools can open."""

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
    """`{"info", "images", "annotations", "categories"}`: one annotation per expression that has a box, or per box.

    Boxes are `[x, y, width, height]` in pixels, masks COCO run lengths. Besides COCO's own keys, an annotation
    has `score`, `expression` and the sample's `sample_id`. Expressions about one image share its image entry. Where all
    objects were asked for (`instances=all`), each of its boxes is an annotation.

    Args:
        predictions: as `read_predictions` gives them; those that failed are left out.
        samples: by id; predictions with other ids are left out, since their image is unknown.

    Raises:
        ImageError: an image whose size is needed cannot be read.
        MaskError: a mask cannot be decoded; it names the prediction.
    """
    images: dict[str, dict[str, Any]] = {}
    taken: set[int] = set()
    annotations: list[dict[str, Any]] = []
    for prediction in predictions:
        sample = samples.get(prediction.id)
        if sample is None or prediction.bbox is None:
            continue
        sample = sample.at(prediction.image_index)
        key = sample.image_key or prediction.id
        if key not in images:
            images[key] = _image(_free_id(sample, taken), sample, prediction)
        image = images[key]
        for one in [prediction] if prediction.boxes is None else prediction.boxes:
            annotations.append(_annotation(len(annotations) + 1, image["id"], sample, prediction.id, one))
    return {
        "info": {"description": "localization-heads predictions"},
        "images": list(images.values()),
        "annotations": annotations,
        "categories": [CATEGORY],
    }


def results_of(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The annotations as the bare list of results that pycocotools' `loadRes` takes.

    Args:
        data: of `to_coco`.
    """
    kept = ("image_id", "category_id", "bbox", "score", "segmentation", "sample_id")
    return [
        {name: one[name] for name in kept if name != "segmentation" or one[name]}
        for one in data["annotations"]
    ]


OFFICIAL = re.compile(r"coco:(\d{1,12})|.*COCO_\w+_(\d{12})\.\w+")


def _free_id(sample: Sample, taken: set[int]) -> int:
    """COCO's own id of the image, where its name or its `picture` says it, else a number that is free.

    Args:
        taken: the ids so far, to which this one is added.
    """
    names = (OFFICIAL.fullmatch(name) for name in (sample.picture, sample.image_file))
    own = [int(found[1] or found[2]) for found in names if found]
    free = range(len(taken) + 1, 2 * len(taken) + 2)
    number: int = next(one for one in (*own, *free) if one not in taken)
    taken.add(number)
    return number


def _image(number: int, sample: Sample, prediction: Prediction) -> dict[str, Any]:
    if prediction.mask is not None:
        height, width = (int(n) for n in prediction.mask["size"])
    else:
        width, height = image_size(sample.single)
    name = sample.image_file or prediction.id
    return {"id": number, "file_name": name, "width": width, "height": height}


def _annotation(
    number: int, image_id: int, sample: Sample, id: str, found: Prediction | Instance
) -> dict[str, Any]:
    assert found.bbox is not None
    x0, y0, x1, y1 = found.bbox
    return {
        "id": number,
        "image_id": image_id,
        "category_id": CATEGORY["id"],
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": _area(id, found),
        "segmentation": found.mask if found.mask is not None else [],
        "iscrowd": 0,
        "score": found.score,
        "expression": sample.expression,
        "sample_id": id,
    }


def _area(id: str, found: Prediction | Instance) -> float:
    """Pixels of the mask, or of the box where there is none."""
    if found.mask is None:
        assert found.bbox is not None
        x0, y0, x1, y1 = found.bbox
        return (x1 - x0) * (y1 - y0)
    from localization_heads.data.masks import MaskError, read_mask

    height, width = found.mask["size"]
    try:
        return float(read_mask(found.mask, (width, height)).sum())
    except MaskError as error:
        raise MaskError(f"the prediction of {shown(id)}: {error}") from error
