"""Groundings as `supervision.Detections` and predictions as a FiftyOne data set. Both libraries are optional extras."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import Box
from localization_heads.data.images import image_size
from localization_heads.data.masks import read_mask
from localization_heads.data.samples import Sample
from localization_heads.errors import UsageError
from localization_heads.grounding.ground import Grounding
from localization_heads.store.results import Prediction


def to_supervision(groundings: Sequence[Grounding], expressions: Sequence[str] | None = None) -> Any:
    """Convert the groundings of one image to `supervision.Detections`, one detection each, in the same order.

    Boxes are xyxy in pixels, masks bool `[n, H, W]`, confidences the groundings' scores. `class_id` counts from 0, and
    `data["class_name"]` holds the expressions if they are given.

    Raises:
        UsageError: supervision is not installed, or the groundings are of images of different sizes.
        ValueError: the numbers of expressions and groundings differ.
    """
    sv = _import_extra("supervision")
    if len({grounding.image_size for grounding in groundings}) > 1:
        raise UsageError("supervision.Detections holds one image: these groundings are of several")
    if expressions is not None and len(expressions) != len(groundings):
        raise ValueError(f"{len(expressions)} expressions for {len(groundings)} groundings")
    if not groundings:
        return sv.Detections.empty()
    return sv.Detections(
        xyxy=np.array([grounding.box for grounding in groundings], dtype=np.float32),
        mask=np.stack([grounding.mask for grounding in groundings]),
        confidence=np.array([grounding.score for grounding in groundings], dtype=np.float32),
        class_id=np.arange(len(groundings)),
        data={} if expressions is None else {"class_name": np.array(expressions)},
    )


def to_fiftyone(predictions: Iterable[Prediction], samples: Mapping[str, Sample], name: str | None = None) -> Any:
    """Convert predictions to a `fiftyone.Dataset`: one sample per image with `predictions` and any `ground_truth`.

    Boxes are relative to the image, masks are cropped to their box, labels are the expressions.

    Args:
        samples: by id; predictions with other ids and failed ones are skipped.
        name: name of the data set; by default FiftyOne chooses one.

    Raises:
        UsageError: FiftyOne is not installed.
        ImageError: an image whose size is needed cannot be read.
    """
    fo = _import_extra("fiftyone")
    dataset = fo.Dataset(name)
    dataset.add_samples(fiftyone_samples(predictions, samples))
    return dataset


def fiftyone_samples(predictions: Iterable[Prediction], samples: Mapping[str, Sample]) -> list[Any]:
    """The `fiftyone.Sample`s of `to_fiftyone`, to add to an existing data set; needs no database."""
    fo = _import_extra("fiftyone")
    images: dict[str, Any] = {}
    for prediction in predictions:
        sample = samples.get(prediction.id)
        if sample is None or prediction.bbox is None or not sample.image_file:
            continue
        sample = sample.at(prediction.image_index)
        if sample.image_key not in images:
            image = images[sample.image_key] = fo.Sample(filepath=sample.image_file)
            image["predictions"] = fo.Detections(detections=[])
            image["ground_truth"] = fo.Detections(detections=[])
        image = images[sample.image_key]
        image["predictions"].detections.append(_detection(fo, sample, prediction))
        if sample.bbox is not None:
            box = _relative(sample.bbox, image_size(sample.single))
            image["ground_truth"].detections.append(fo.Detection(label=sample.expression, bounding_box=box))
    return list(images.values())


def _detection(fo: Any, sample: Sample, prediction: Prediction) -> Any:
    assert prediction.bbox is not None
    size = image_size(sample.single)
    mask = None
    if prediction.mask is not None:
        mask = _crop(read_mask(prediction.mask, size), prediction.bbox)
    return fo.Detection(
        label=sample.expression,
        bounding_box=_relative(prediction.bbox, size),
        mask=mask,
        confidence=prediction.score,
        sample_id=prediction.id,
    )


def _relative(box: Box, size: tuple[int, int]) -> list[float]:
    """`[x, y, width, height]` relative to the image."""
    (x0, y0, x1, y1), (width, height) = box, size
    return [x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height]


def _crop(mask: NDArray[np.bool_], box: Box) -> NDArray[np.bool_]:
    """The part of a mask `[H, W]` in the pixels that a box overlaps."""
    x0, y0, x1, y1 = (int(edge) for edge in (*np.floor(box[:2]), *np.ceil(box[2:])))
    return mask[y0:y1, x0:x1]


def _import_extra(module: str) -> Any:
    """Import an optional dependency, which is also the name of its extra. UsageError if it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UsageError(f"{module} is not installed: pip install 'localization-heads[{module}]' ({error})") from None
