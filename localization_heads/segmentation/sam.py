"""The families of SAMs that transformers knows, and how their checkpoints are read."""

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
    """What tells one generation of SAM from the next.

    Args:
        kind: the value of `segmenter.kind`.
        model_class: in transformers.
        model_types: of the checkpoints that it reads.
        squashes: whether images are squashed to a square; else they are padded right or below.
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

    shown = f"segmenter.name={name}"
    source = resolve_source(name, shown, "segmenter=grabcut needs no weights")
    settings: dict[str, Any] = {
        "local_files_only": reads_local_files_only(source),
        "trust_remote_code": False,
    }
    with checkpoint_errors(source, shown, "segmenter=grabcut, or segmenter.name=/path/to/folder"):
        check_counts(raw_config(source, **settings), shown)
        config = transformers.AutoConfig.from_pretrained(source, **settings)
        found = config.model_type
        if found not in family.model_types:
            raise UsageError(f"{shown}: it is a {found}, not a {family.kind}{_meant(found)}")
        check_size(config.to_dict(), weights_in(checkpoint_folder(source)), shown)
        kind = getattr(transformers, family.model_class)
        model, info = kind.from_pretrained(source, output_loading_info=True, dtype="float32", **settings)
    if missing := sorted(info["missing_keys"]):
        raise WorkError(
            f"segmenter.name={name}: its checkpoint lacks {len(missing)} tensors, such as {missing[0]}"
        )
    return model, *_colours(family, source, settings)


def _meant(found: str) -> str:
    """The choice that takes such a model."""
    fitting = [kind for kind, family in FAMILIES.items() if found in family.model_types]
    return f"; write segmenter={fitting[0]}" if fitting else ""


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


FOREGROUND, BACKGROUND = 1, 0
"""Labels of points, as all SAMs were trained with."""
ENCODED_IMAGES = 4
"""Images whose embeddings are kept: 4 MB each for SAM, about 17 MB for SAM 2."""


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


GRID = 16
"""Points across and down that proposals start from; half as many as SAM's own generator of masks has."""
SURE = 0.7
"""The IoU that a SAM predicts for its mask from which on it is proposed: less than SAM's own .88, for the map decides.
Not tuned, as no weights were at hand."""


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
        """Of the square that the model sees, in its pixels."""
        encoder = self.model.prompt_encoder
        size = encoder.input_image_size
        return int(size if isinstance(size, int) else size[0])

    def frame(self, image_size: tuple[int, int]) -> Frame:
        """Where an image lies in that square."""
        make = Frame.squashed if self.family.squashes else Frame.padded
        return make(image_size, self.side)

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
        """Masks of what the image shows, bool `[n, h, w]`: of each point of a grid the three that the model gives.

        Those that the model itself scores below `SURE` are left out, and masks that are equal.
        """
        frame, size = self.frame(image.size), proposal_size(image.size)
        drawn, encoded = replace(frame, image_size=size), self.encode(image)
        found: dict[bytes, NDArray[np.bool_]] = {}
        for points in np.split(_grid(frame.inner), GRID):
            output = self.model(
                image_embeddings=encoded,
                multimask_output=True,
                input_points=self._tensor(points[None, :, None]),  # (image, object, point, 2)
                input_labels=self._tensor(np.full((1, GRID, 1), FOREGROUND, dtype=np.int32)),
            )
            for logits in output.pred_masks[0][output.iou_scores[0] >= SURE]:
                mask = on_image(logits.float(), drawn).cpu().numpy()
                if mask.any():
                    found.setdefault(np.packbits(mask).tobytes(), mask)
        return np.array([*found.values()], dtype=bool).reshape(-1, size[1], size[0])

    def prompts(self, grounding: Grounding, frame: Frame) -> dict[str, torch.Tensor]:
        """The model's arguments: box and points in pixels of its square, the map as logits."""
        across, down = frame.scale
        told: dict[str, Any] = {}
        if "box" in self.prompt:
            told["input_boxes"] = np.array(grounding.box) * (across, down, across, down)
            told["input_boxes"] = told["input_boxes"][None, None]  # (image, object, 4)
        if "points" in self.prompt:
            inner = interior_points(grounding, self.num_points)
            outer = background_points(grounding, self.num_points) if self.points == "signed" else []
            points = np.array(inner + outer) * (across, down)
            told["input_points"] = points[None, None]  # (image, object, point, 2)
            labels = np.array([FOREGROUND] * len(inner) + [BACKGROUND] * len(outer), dtype=np.int32)
            told["input_labels"] = labels[None, None]
        if "map" in self.prompt:
            side = 4 * self.model.prompt_encoder.image_embedding_size[0]
            told["input_masks"] = map_logits(grounding, frame, side)[None, None]
        return {name: self._tensor(value) for name, value in told.items()}

    def _tensor(self, value: NDArray[Any]) -> torch.Tensor:
        kind = torch.int32 if value.dtype.kind == "i" else self.model.dtype
        return torch.from_numpy(value).to(self.model.device, kind)

    def encode(self, image: Image.Image) -> Any:
        """The image's embeddings; those of the last few images are kept."""
        key = hashlib.blake2b(image.tobytes(), person=f"{image.width}x{image.height}".encode()[:16]).digest()
        if key not in self._encoded:
            pixels = self._tensor(self.pixel_values(image))
            self._encoded[key] = self.model.get_image_embeddings(pixels)
            if len(self._encoded) > ENCODED_IMAGES:
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(key)
        return self._encoded[key]

    def pixel_values(self, image: Image.Image) -> NDArray[np.float32]:
        """The image as the encoder takes it, `[1, 3, side, side]`; padding is 0 after normalising, as SAM's."""
        from PIL.Image import Resampling

        width, height = self.frame(image.size).inner
        resized = image.convert("RGB").resize((width, height), Resampling.BILINEAR)
        colours = (np.asarray(resized, dtype=np.float32) / 255 - self.mean) / self.std
        square = np.zeros((1, 3, self.side, self.side), dtype=np.float32)
        square[0, :, :height, :width] = colours.transpose(2, 0, 1)
        return square


def _grid(inner: tuple[int, int]) -> NDArray[np.float64]:
    """The centres of `GRID` x `GRID` parts of `(width, height)` pixels, row by row: `[GRID * GRID, 2]`."""
    middles = (np.arange(GRID) + 0.5) / GRID
    x, y = np.meshgrid(middles * inner[0], middles * inner[1])
    return np.stack([x.ravel(), y.ravel()], axis=-1)


def on_image(logits: torch.Tensor, frame: Frame) -> torch.Tensor:
    """A mask of the whole square, logits `[h, w]`, on the pixels of the image: bool `[H, W]`.

    As the families' processors do it: SAM's goes through the square, whose padding it cuts off.
    """
    W, H = frame.image_size
    masks = logits[None, None]
    if not frame.squashes:
        masks = _resized(masks, (frame.side, frame.side))[..., : frame.inner[1], : frame.inner[0]]
    return _resized(masks, (H, W))[0, 0] > 0


def _resized(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return torch.nn.functional.interpolate(masks, size, mode="bilinear", align_corners=False)
