"""Segment Anything models (SAM, SAM 2, SAM 3) from transformers, prompted by box, by points and by the map itself."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from localization_heads.errors import UsageError, WorkError
from localization_heads.grounding.ground import Grounding
from localization_heads.lvlm.checkpoints.files import check_counts, check_size, raw_config, weights_in
from localization_heads.lvlm.checkpoints.sources import (
    checkpoint_errors,
    checkpoint_folder,
    reads_local_files_only,
    resolve_source,
)
from localization_heads.options.groups import Points, SegmenterOptions, SegmenterPrompt
from localization_heads.segmentation.segmenter import (
    Frame,
    background_points,
    interior_points,
    map_logits,
    proposal_size,
)

if TYPE_CHECKING:
    from PIL import Image


Colours = tuple[float, float, float]

IMAGENET_MEAN: Colours = (0.485, 0.456, 0.406)
IMAGENET_STD: Colours = (0.229, 0.224, 0.225)
HALF: Colours = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Family:
    """What differs between the generations of SAM.

    Args:
        kind: the value of `segmenter.kind`.
        model_class: in transformers.
        model_types: of the checkpoints that it loads.
        squashes: whether images are squashed to a square; else they are padded at the right or the bottom.
        mean, std: of the colours, if the checkpoint does not state them.
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
        # video checkpoints contain the image model, and so do those of SAM 3
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


FOREGROUND, BACKGROUND = 1, 0
"""Labels of point prompts, as in the training of all SAMs."""
CACHED_IMAGES = 4
"""Images whose embeddings are cached: 4 MB each for SAM, about 17 MB for SAM 2."""
GRID_SIZE = 16
"""Point prompts per side for proposals; half as many as SAM's automatic mask generator has."""
MIN_PREDICTED_IOU = 0.7
"""Predicted IoU from which on a mask is proposed. Below the .88 of SAM's automatic mask generator, as the map makes the
selection. Not tuned, as no weights were available."""


def load_sam(options: SegmenterOptions) -> Sam:
    """The model of `options.name`, of the family `options.kind`, on its device. Raises as `load_checkpoint` does."""
    from localization_heads.lvlm.checkpoints.loading import pick_device

    family = FAMILIES[options.kind]
    model, mean, std = load_checkpoint(family, options.name)
    model.to(pick_device(options.device)).eval()
    return Sam(
        model,
        family,
        mean=mean,
        std=std,
        prompt=options.prompt,
        num_points=options.num_points,
        multimask=options.multimask,
        points=options.points,
    )


@dataclass(eq=False)
class Sam:
    """A promptable segmenter.

    Args:
        model: a `SamModel`, `Sam2Model` or `Sam3TrackerModel`.
        mean, std: of the colours, 0 to 1, red, green and blue.
        prompt, num_points, multimask, points: as in `SegmenterOptions`.
    """

    model: Any
    family: Family
    mean: tuple[float, ...]
    std: tuple[float, ...]
    prompt: tuple[SegmenterPrompt, ...] = ("box",)
    num_points: int = 3
    multimask: bool = False
    points: Points = "positive"
    _encoded: OrderedDict[bytes, Any] = field(default_factory=OrderedDict, repr=False)

    @property
    def name(self) -> str:
        return self.family.kind

    @property
    def side(self) -> int:
        """Side of the model's square input, in pixels."""
        encoder = self.model.prompt_encoder
        size = encoder.input_image_size
        return int(size if isinstance(size, int) else size[0])

    def frame(self, image_size: tuple[int, int]) -> Frame:
        """How an image of this size is fitted into the square input."""
        fit = Frame.squashed if self.family.squashes else Frame.padded
        return fit(image_size, self.side)

    @torch.inference_mode()
    def segment(self, image: Image.Image, grounding: Grounding) -> NDArray[np.bool_]:
        """The mask, bool `[H, W]`."""
        frame = self.frame(grounding.image_size)
        output = self.model(
            image_embeddings=self.encode(image),
            multimask_output=self.multimask,
            **self.prompts(grounding, frame),
        )
        masks, scores = output.pred_masks[0, 0], output.iou_scores[0, 0]  # (masks, h, w), (masks,)
        best = masks[int(scores.argmax())]
        return on_image(best.float(), frame).cpu().numpy()

    @torch.inference_mode()
    def propose(self, image: Image.Image) -> NDArray[np.bool_]:
        """Masks of the objects in the image, bool `[n, h, w]`: the model's three masks for each point of a grid.

        Masks with a predicted IoU below `MIN_PREDICTED_IOU` and duplicates are left out.
        """
        frame, size = self.frame(image.size), proposal_size(image.size)
        small_frame, embeddings = replace(frame, image_size=size), self.encode(image)
        masks: dict[bytes, NDArray[np.bool_]] = {}
        for points in np.split(_grid_points(frame.inner), GRID_SIZE):
            output = self.model(
                image_embeddings=embeddings,
                multimask_output=True,
                input_points=self._tensor(points[None, :, None]),  # (image, object, point, 2)
                input_labels=self._tensor(np.full((1, GRID_SIZE, 1), FOREGROUND, dtype=np.int32)),
            )
            for logits in output.pred_masks[0][output.iou_scores[0] >= MIN_PREDICTED_IOU]:
                mask = on_image(logits.float(), small_frame).cpu().numpy()
                if mask.any():
                    masks.setdefault(np.packbits(mask).tobytes(), mask)
        return np.array([*masks.values()], dtype=bool).reshape(-1, size[1], size[0])

    def prompts(self, grounding: Grounding, frame: Frame) -> dict[str, torch.Tensor]:
        """The model's prompt arguments: box and points in pixels of its square input, the map as logits."""
        x_scale, y_scale = frame.scale
        prompts: dict[str, Any] = {}
        if "box" in self.prompt:
            box = np.array(grounding.box) * (x_scale, y_scale, x_scale, y_scale)
            prompts["input_boxes"] = box[None, None]  # (image, object, 4)
        if "points" in self.prompt:
            foreground = interior_points(grounding, self.num_points)
            background = background_points(grounding, self.num_points) if self.points == "signed" else []
            points = np.array(foreground + background) * (x_scale, y_scale)
            prompts["input_points"] = points[None, None]  # (image, object, point, 2)
            labels = np.array([FOREGROUND] * len(foreground) + [BACKGROUND] * len(background), dtype=np.int32)
            prompts["input_labels"] = labels[None, None]
        if "map" in self.prompt:
            side = 4 * self.model.prompt_encoder.image_embedding_size[0]
            prompts["input_masks"] = map_logits(grounding, frame, side)[None, None]
        return {name: self._tensor(value) for name, value in prompts.items()}

    def _tensor(self, value: NDArray[Any]) -> torch.Tensor:
        dtype = torch.int32 if value.dtype.kind == "i" else self.model.dtype
        return torch.from_numpy(value).to(self.model.device, dtype)

    def encode(self, image: Image.Image) -> Any:
        """The image's embeddings, from a cache of the last few images."""
        key = hashlib.blake2b(image.tobytes(), person=f"{image.width}x{image.height}".encode()[:16]).digest()
        if key not in self._encoded:
            pixels = self._tensor(self.pixel_values(image))
            self._encoded[key] = self.model.get_image_embeddings(pixels)
            if len(self._encoded) > CACHED_IMAGES:
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(key)
        return self._encoded[key]

    def pixel_values(self, image: Image.Image) -> NDArray[np.float32]:
        """The image as the encoder's input, `[1, 3, side, side]`; padding is 0 after normalisation, as in SAM."""
        from PIL.Image import Resampling

        width, height = self.frame(image.size).inner
        resized = image.convert("RGB").resize((width, height), Resampling.BILINEAR)
        colours = (np.asarray(resized, dtype=np.float32) / 255 - self.mean) / self.std
        square = np.zeros((1, 3, self.side, self.side), dtype=np.float32)
        square[0, :, :height, :width] = colours.transpose(2, 0, 1)
        return square


def _grid_points(inner: tuple[int, int]) -> NDArray[np.float64]:
    """The centres of a grid of parts of `(width, height)` pixels, row by row: `[GRID_SIZE * GRID_SIZE, 2]`."""
    centres = (np.arange(GRID_SIZE) + 0.5) / GRID_SIZE
    x, y = np.meshgrid(centres * inner[0], centres * inner[1])
    return np.stack([x.ravel(), y.ravel()], axis=-1)


def on_image(logits: torch.Tensor, frame: Frame) -> torch.Tensor:
    """Mask logits `[h, w]` of the whole square, as a mask on the pixels of the image: bool `[H, W]`.

    As in the families' processors: SAM's resizes to the square first and cuts off its padding.
    """
    W, H = frame.image_size
    masks = logits[None, None]
    if not frame.squashes:
        masks = _resize(masks, (frame.side, frame.side))[..., : frame.inner[1], : frame.inner[0]]
    return _resize(masks, (H, W))[0, 0] > 0


def _resize(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return torch.nn.functional.interpolate(masks, size, mode="bilinear", align_corners=False)


def load_checkpoint(family: Family, name: str) -> tuple[Any, Colours, Colours]:
    """The model in float32 on the CPU, and the mean and standard deviation of its colours.

    Raises:
        UsageError: no such folder, a folder without a model, or a model of another family.
        WorkError: the checkpoint cannot be downloaded or read, or lacks weights.
    """
    import transformers

    shown = f"segmenter.name={name}"
    source = resolve_source(name, shown, "segmenter=grabcut needs no weights")
    settings: dict[str, Any] = {
        "local_files_only": reads_local_files_only(source),
        "trust_remote_code": False,
    }
    with checkpoint_errors(source, shown, "segmenter=grabcut, or segmenter.name=/path/to/folder"):
        check_counts(raw_config(source, **settings), shown)
        config = transformers.AutoConfig.from_pretrained(source, **settings)
        model_type = config.model_type
        if model_type not in family.model_types:
            raise UsageError(f"{shown}: it is a {model_type}, not a {family.kind}{_suggestion(model_type)}")
        check_size(config.to_dict(), weights_in(checkpoint_folder(source)), shown)
        model_class = getattr(transformers, family.model_class)
        model, info = model_class.from_pretrained(source, output_loading_info=True, dtype="float32", **settings)
    if missing := sorted(info["missing_keys"]):
        raise WorkError(f"segmenter.name={name}: its checkpoint lacks {len(missing)} tensors, such as {missing[0]}")
    return model, *_colour_statistics(family, source, settings)


def _suggestion(model_type: str) -> str:
    """The option that loads a model of this type."""
    kinds = [kind for kind, family in FAMILIES.items() if model_type in family.model_types]
    return f"; write segmenter={kinds[0]}" if kinds else ""


def _colour_statistics(family: Family, source: str, settings: dict[str, Any]) -> tuple[Colours, Colours]:
    """The checkpoint's mean and standard deviation, or its family's if it has no preprocessor_config.json."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        config, _ = ImageProcessingMixin.get_image_processor_dict(source, local_files_only=settings["local_files_only"])
    except (OSError, ValueError) as error:
        logging.getLogger(__name__).debug("%s: no preprocessor_config.json (%s)", source, error)
        return family.mean, family.std
    return _as_colours(config.get("image_mean"), family.mean), _as_colours(config.get("image_std"), family.std)


def _as_colours(values: Any, default: Colours) -> Colours:
    """The values if they are three positive numbers, else the default."""
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError):
        return default
    return (red, green, blue) if min(red, green, blue) > 0 else default
