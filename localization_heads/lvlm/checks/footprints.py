"""Footprints: which pixels of the original image feed an image token, traced without knowledge of the geometry.

An image whose colours encode positions goes through the real processor. The gradient of a token's features selects the
processed pixels that feed it, and their colours say where in the original image those come from. Attention in the
vision tower is replaced by the identity, so that a token sees only its own patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from localization_heads.data.sources import PromptImages, images_of
from localization_heads.lvlm.families.geometry import View
from localization_heads.lvlm.forward.capture import decoder_layers
from localization_heads.lvlm.model import LVLM

NUM_SAMPLED = 8
"""Cells of a view that are traced, in addition to its corners."""
LIMIT = 0.25
"""Largest accepted distance of a footprint from the centre of its cell, in cells."""
UNTRACEABLE = {
    **dict.fromkeys(("fast_vlm", "gemma3n", "perception_lm"), "its vision tower is timm's, and mixes the whole image"),
    **dict.fromkeys(
        ("got_ocr2", "pp_chart2table", "unlimited_ocr"),
        "its vision tower computes attention in a way of its own",
    ),
}
"""Model types whose attention in the vision tower cannot be switched off, and why."""
BLENDING = (
    *("deepseek_vl_hybrid", "fast_vlm", "florence2", "gemma3n", "got_ocr2", "llava_onevision"),
    *("pp_chart2table", "unlimited_ocr"),
)
"""Model types whose tokens also see neighbouring cells, with less weight (convolutions, resampling)."""
CUT_AT_THE_BORDER = ("fast_vlm", "florence2", "got_ocr2", "pp_chart2table", "unlimited_ocr")
"""Model types whose convolutions are so wide that footprints at the border of an image or tile are one-sided."""

Point = tuple[float, float]
PIXEL_INPUTS = (
    "pixel_values",
    "pixel_values_images",
    "pixel_values_local",
    "pixel_values_videos",
    "image_patches",
)
"""Processor outputs that hold pixels."""
CHANNELS_LAST = ("Cosmos3Edge", "Fuyu", "Gemma4", "Inkling", "Lfm2Vl", "Molmo2")
"""Image processors (by the start of their name) whose flattened patches end with the colour channel."""
TIME_FIRST = ("Muse",)
"""Image processors whose flattened patches begin with the frame instead of the colour channel."""


def footprint_errors(lvlm: LVLM, image_size: tuple[int, int]) -> dict[str, NDArray[np.float64]]:
    """By view, `[n, 2]`: offsets (x, y) of sampled tokens' footprints from the centres of their cells, in cells."""
    return view_errors(lvlm, image_size, views_seen(lvlm, coordinate_image(*image_size)))


def view_errors(
    lvlm: LVLM, image_size: tuple[int, int], views: Sequence[View], shown: PromptImages | None = None
) -> dict[str, NDArray[np.float64]]:
    """`footprint_errors` for some views.

    Args:
        shown: as for `footprint_centres`.
    """
    skip_border = lvlm.model.config.model_type in CUT_AT_THE_BORDER
    cells = {view.name: sampled_cells(view, skip_border=skip_border) for view in views}
    keys = [int(view.index[cell]) for view in views for cell in cells[view.name]]
    centres = footprint_centres(lvlm, image_size, keys, shown)
    return {view.name: np.array(list(_errors(view, cells[view.name], centres))).reshape(-1, 2) for view in views}


def views_seen(lvlm: LVLM, image: Image.Image) -> list[View]:
    """The views of an image: where its tokens lie, in each rendering (whole, tiles) that the model gets."""
    return lvlm.views_in(lvlm.model_inputs([image], [lvlm.prompt("it")]), 0, image)


def sampled_cells(view: View, *, skip_border: bool) -> list[tuple[int, int]]:
    """The corners and a few random cells; with `skip_border`, of those with the usual size (not `shifted`)."""
    rows, columns = (
        np.flatnonzero(np.isclose(sides, np.median(sides)) | (not skip_border)).tolist()
        for sides in (np.diff(view.y_edges), np.diff(view.x_edges))
    )
    h, w = len(rows), len(columns)
    inner = np.random.default_rng(0).choice(h * w, min(NUM_SAMPLED, h * w), replace=False)
    cells = {(0, 0), (0, w - 1), (h - 1, 0), (h - 1, w - 1), *((int(i) // w, int(i) % w) for i in inner)}
    return sorted((rows[row], columns[column]) for row, column in cells)


def _errors(view: View, cells: Sequence[tuple[int, int]], centres: dict[int, Point]) -> Iterator[Point]:
    for cell in cells:
        if (centre := centres.get(int(view.index[cell]))) is not None:
            yield cell_offset(view, cell, centre)


def cell_offset(view: View, cell: tuple[int, int], point: Point) -> Point:
    """The offset (x, y) of a point in pixels from the centre of a cell (row, column), in cells."""
    row, column = cell
    (x0, x1), (y0, y1) = view.x_edges[column : column + 2], view.y_edges[row : row + 2]
    return (point[0] - (x0 + x1) / 2) / (x1 - x0), (point[1] - (y0 + y1) / 2) / (y1 - y0)


def coordinate_image(width: int, height: int) -> Image.Image:
    """An image whose red encodes x and whose green encodes y. Full blue tells its pixels from padding."""
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    channels = np.broadcast_arrays(x[None] * 255, y[:, None] * 255, 255.0)
    return Image.fromarray(np.rint(np.stack(channels, -1)).astype(np.uint8))


def footprint_centres(
    lvlm: LVLM, image_size: tuple[int, int], keys: Sequence[int], shown: PromptImages | None = None
) -> dict[int, Point]:
    """For each key, the centre of its footprint in pixels of the original image. Keys that see padding are left out.

    Args:
        shown: the images of the prompt: the coordinate image among others without blue, which count as padding.
    """
    shown = shown or coordinate_image(*image_size)
    raw = lvlm.run_processor([shown], [lvlm.with_num_images(len(images_of(shown))).prompt("the dog")])
    blends, centres = lvlm.model.config.model_type in BLENDING, {}
    for key, (colours, influence) in zip(keys, footprint_colours(lvlm, raw, keys), strict=True):
        if (colours[:, 2] > 0.95).all():
            x, y = np.average(colours[:, :2], axis=0, weights=influence if blends else None)
            centres[key] = float(x * image_size[0]), float(y * image_size[1])
    return centres


def footprint_colours(lvlm: LVLM, raw: Mapping[str, Any], keys: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """For each key, the colours (n, 3) of the pixels that feed it, in 0 to 1, and the influence (n,) of each.

    Args:
        raw: the processor's output for one prompt.
    """
    inputs = lvlm.on_device(raw)
    names = [name for name in PIXEL_INPUTS if name in raw]
    pixels = {name: inputs[name].detach().clone().requires_grad_() for name in names}
    inputs |= pixels
    with identity_attention(lvlm):
        features = image_features(lvlm, inputs)  # (K, D)
    weights = torch.randn(features.shape[-1], generator=torch.Generator().manual_seed(0)).to(features)
    colours = torch.cat([original_colours(lvlm, raw[name].float()).reshape(-1, 3) for name in names])
    for key in keys:
        gradients = torch.autograd.grad(
            features[key] @ weights, list(pixels.values()), retain_graph=True, materialize_grads=True
        )
        parts = [colour_last(lvlm, gradient.float().cpu()).reshape(-1, 3) for gradient in gradients]
        influence = torch.cat(parts).abs().sum(-1)
        footprint = influence > 1e-3 * influence.max()
        yield colours[footprint], influence[footprint]


def image_features(lvlm: LVLM, inputs: dict[str, Any]) -> Tensor:
    """(K, D) the language model's input for each key: the prompt's embeddings, or the states for cross-attention."""
    captured: list[Tensor] = []

    def capture(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        states = kwargs.get("cross_attention_states")
        captured.append(kwargs["inputs_embeds"] if states is None else states)
        raise _StopAtLanguageModel

    hook = language_model_of(lvlm.model).register_forward_pre_hook(capture, with_kwargs=True)
    try:
        lvlm.model.base_model(**inputs, use_cache=False)
    except _StopAtLanguageModel:
        pass
    finally:
        hook.remove()
    return captured[0].reshape(-1, captured[0].shape[-1])


class _StopAtLanguageModel(BaseException):
    """Raised to end the forward pass where image features enter the language model."""


def language_model_of(model: Any) -> Any:
    """The module that image features enter: the language model, or the encoder of an encoder-decoder."""
    if model.config.is_encoder_decoder:
        return model.get_encoder()
    layers = decoder_layers(model)
    return next(module for module in model.modules() if getattr(module, "layers", None) is layers)


@contextmanager
def identity_attention(lvlm: LVLM) -> Iterator[None]:
    """Make every attention module outside the language model return each position's own values, in the `with` block."""
    ALL_ATTENTION_FUNCTIONS.register("identity", _identity)
    ALL_MASK_ATTENTION_FUNCTIONS.register("identity", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    language_model = {id(lvlm.model.config), id(lvlm.model.config.get_text_config())}
    configs: dict[int, Any] = {
        id(config): config
        for module in lvlm.model.modules()
        if (config := getattr(module, "config", None)) is not None
        and id(config) not in language_model
        and hasattr(config, "_attn_implementation_internal")
    }
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = "identity"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


def _identity(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    if value.shape[1] != query.shape[1]:
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    if value.shape[2] != query.shape[2]:  # Molmo 2 pools four patches
        value = value.mean(2, keepdim=True).expand(-1, -1, query.shape[2], -1)
    return value.transpose(1, 2).contiguous(), None


def original_colours(lvlm: LVLM, pixels: Tensor) -> Tensor:
    """Processed pixels `[..., colour]` with the normalization undone: 0 to 1."""
    ip, colours = lvlm.processor.image_processor, colour_last(lvlm, pixels)
    if not ip.do_normalize:
        return colours
    return colours * torch.tensor(ip.image_std) + torch.tensor(ip.image_mean)


def colour_last(lvlm: LVLM, pixels: Tensor) -> Tensor:
    """Pixels `[..., colour, height, width]`, or flattened patches, with the colour channel last."""
    kind = type(lvlm.processor.image_processor).__name__
    if kind.startswith(CHANNELS_LAST):
        return pixels.reshape(*pixels.shape[:-1], -1, 3)
    if pixels.dim() >= 4 and pixels.shape[-3] == 3:
        return pixels.movedim(-3, -1)
    if kind.startswith(TIME_FIRST):
        frames = lvlm.processor.image_processor.temporal_patch_size
        return pixels.reshape(*pixels.shape[:-1], frames, 3, -1).movedim(-2, -1).flatten(-3, -2)
    return pixels.reshape(*pixels.shape[:-1], 3, -1).transpose(-1, -2)
