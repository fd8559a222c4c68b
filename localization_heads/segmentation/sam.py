"""SAM, SAM 2 and SAM 3's tracker from transformers, any size: a mask from a box, points, the map, or all of them.

Notable choices: pictures are prepared here (PIL's bilinear resizing, the checkpoint's mean and deviation), because
the image processors of SAM 2 and 3 cannot be imported without torchvision; tests hold the result against the
processors' own. A picture goes through the encoder once, however many expressions ask about it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from localization_heads.grounding.maps import Grounding
from localization_heads.segmentation.checkpoint import FAMILIES, Family, load_checkpoint
from localization_heads.segmentation.options import Prompt, SegmenterOptions
from localization_heads.segmentation.prompts import Frame, interior_points, map_logits

if TYPE_CHECKING:
    from PIL import Image

ENCODED_PICTURES = 4
"""Pictures whose embeddings are kept: 4 MB each for SAM, about 17 MB for SAM 2."""


def load_sam(options: SegmenterOptions) -> Sam:
    """The model of `options.name`, of the family `options.kind`, on its device. Raises as `load_checkpoint` does."""
    from localization_heads.lvlm.loading import pick_device

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
    )


@dataclass(eq=False)
class Sam:
    """A promptable segmenter.

    Args:
        model: a `SamModel`, `Sam2Model` or `Sam3TrackerModel`.
        mean, std: of the colours, 0 to 1, red, green and blue.
        prompt, num_points, multimask: as in `SegmenterOptions`.
    """

    model: Any
    family: Family
    mean: tuple[float, ...]
    std: tuple[float, ...]
    prompt: tuple[Prompt, ...] = ("box",)
    num_points: int = 3
    multimask: bool = False
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
        """Where a picture lies in that square."""
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

    def prompts(self, grounding: Grounding, frame: Frame) -> dict[str, torch.Tensor]:
        """The model's arguments: box and points in pixels of its square, the map as logits."""
        across, down = frame.scale
        told: dict[str, Any] = {}
        if "box" in self.prompt:
            told["input_boxes"] = np.array(grounding.box) * (across, down, across, down)
            told["input_boxes"] = told["input_boxes"][None, None]  # (picture, object, 4)
        if "points" in self.prompt:
            points = np.array(interior_points(grounding, self.num_points)) * (across, down)
            told["input_points"] = points[None, None]  # (picture, object, point, 2)
            told["input_labels"] = np.ones((1, 1, len(points)), dtype=np.int32)  # all are foreground
        if "map" in self.prompt:
            side = 4 * self.model.prompt_encoder.image_embedding_size[0]
            told["input_masks"] = map_logits(grounding, frame, side)[None, None]
        return {name: self._tensor(value) for name, value in told.items()}

    def _tensor(self, value: NDArray[Any]) -> torch.Tensor:
        kind = torch.int32 if value.dtype.kind == "i" else self.model.dtype
        return torch.from_numpy(value).to(self.model.device, kind)

    def encode(self, image: Image.Image) -> Any:
        """The picture's embeddings; those of the last few pictures are kept."""
        key = hashlib.blake2b(image.tobytes(), person=f"{image.width}x{image.height}".encode()[:16]).digest()
        if key not in self._encoded:
            pixels = self._tensor(self.pixel_values(image))
            self._encoded[key] = self.model.get_image_embeddings(pixels)
            if len(self._encoded) > ENCODED_PICTURES:
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(key)
        return self._encoded[key]

    def pixel_values(self, image: Image.Image) -> NDArray[np.float32]:
        """The picture as the encoder takes it, `[1, 3, side, side]`; padding is 0 after normalising, as SAM's."""
        from PIL.Image import Resampling

        width, height = self.frame(image.size).inner
        resized = image.convert("RGB").resize((width, height), Resampling.BILINEAR)
        colours = (np.asarray(resized, dtype=np.float32) / 255 - self.mean) / self.std
        square = np.zeros((1, 3, self.side, self.side), dtype=np.float32)
        square[0, :, :height, :width] = colours.transpose(2, 0, 1)
        return square


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
