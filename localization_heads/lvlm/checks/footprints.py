"""Which pixels of the original image feed an image token, found without any knowledge of the geometry.

An image whose colours say where they are goes through the real processor. The gradient of a token's features says
which processed pixels it is made of, and their colours say where in the original those came from. Attention in the
vision tower is replaced by the identity, so that a token sees its own patches only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

SAMPLED = 8
"""Cells of a view whose footprints are looked at, beside its corners."""
LIMIT = 0.25
"""Largest distance of a footprint from the centre of its cell, in cells, that is taken for right."""
UNTRACEABLE = {
    **dict.fromkeys(
        ("fast_vlm", "gemma3n", "perception_lm"), "its vision tower is timm's, and mixes the whole image"
    ),
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
"""Model types whose tokens reach over their cells, with less weight: convolutions and resampling."""
CUT_AT_THE_BORDER = ("fast_vlm", "florence2", "got_ocr2", "pp_chart2table", "unlimited_ocr")
"""Model types whose convolutions reach so far that footprints at the border of the image or of a tile are one-sided."""

Point = tuple[float, float]
PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_local", "image_patches")
"""Outputs of processors with pixels of images."""
CHANNELS_LAST = ("Cosmos3Edge", "Fuyu", "Gemma4", "Inkling", "Lfm2Vl", "Molmo2")
"""Image processors whose flattened patches end with the colour."""
TIME_FIRST = ("Muse",)
"""Image processors whose flattened patches begin with the frame, not with the colour."""


class Reached(BaseException):
    """The forward pass has come to where image features meet the language model."""


def coordinate_image(width: int, height: int) -> Image.Image:
    """Red rises from left to right, green from top to bottom, blue is full: it marks pixels of the image."""
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    channels = np.broadcast_arrays(x[None] * 255, y[:, None] * 255, 255.0)
    return Image.fromarray(np.rint(np.stack(channels, -1)).astype(np.uint8))


def views_seen(lvlm: LVLM, image: Image.Image) -> list[View]:
    """Where the tokens of an image lie, in every rendering of it that the model gets."""
    return lvlm.views_in(lvlm.model_inputs([image], [lvlm.prompt("it")]), 0, image)


def footprint_centres(
    lvlm: LVLM, image_size: tuple[int, int], keys: Sequence[int], shown: PromptImages | None = None
) -> dict[int, Point]:
    """Centre, in pixels of the original image, of what feeds each key. Keys that see padding are left out.

    Args:
        shown: the coordinate image of that size among others without blue, which count as padding.
    """
    shown = shown or coordinate_image(*image_size)
    raw = lvlm.run_processor([shown], [lvlm.with_num_images(len(images_of(shown))).prompt("the dog")])
    inputs = lvlm.on_device(raw)
    names = [name for name in PIXELS if name in raw]
    pixels = {name: inputs[name].detach().clone().requires_grad_() for name in names}
    inputs |= pixels
    with identity_attention(lvlm):
        features = image_features(lvlm, inputs)  # (K, D)
    weights = torch.randn(features.shape[-1], generator=torch.Generator().manual_seed(0)).to(features)
    colours = torch.cat([original_colours(lvlm, raw[name].float()).reshape(-1, 3) for name in names])
    found = {}
    for key in keys:
        gradients = torch.autograd.grad(
            features[key] @ weights, list(pixels.values()), retain_graph=True, materialize_grads=True
        )
        parts = [colour_last(lvlm, gradient.float().cpu()).reshape(-1, 3) for gradient in gradients]
        feeds = torch.cat(parts).abs().sum(-1)
        fed = feeds > 1e-3 * feeds.max()
        if (colours[fed][:, 2] > 0.95).all():
            shares = feeds[fed] if lvlm.model.config.model_type in BLENDING else None
            centre = np.average(colours[fed][:, :2], axis=0, weights=shares)
            found[key] = float(centre[0] * image_size[0]), float(centre[1] * image_size[1])
    return found


def footprint_errors(lvlm: LVLM, image_size: tuple[int, int]) -> dict[str, NDArray[np.float64]]:
    """Per view `[n, 2]`: how far sampled tokens' footprints lie from their cells' centres, in cells (x, y)."""
    return view_errors(lvlm, image_size, views_seen(lvlm, coordinate_image(*image_size)))


def view_errors(
    lvlm: LVLM, image_size: tuple[int, int], every: Sequence[View], shown: PromptImages | None = None
) -> dict[str, NDArray[np.float64]]:
    """The same of some views.

    Args:
        shown: as of `footprint_centres`.
    """
    cut = lvlm.model.config.model_type in CUT_AT_THE_BORDER
    views = {view.name: view for view in every}
    cells = {name: sampled_cells(view, cut) for name, view in views.items()}
    keys = [int(views[name].index[cell]) for name in views for cell in cells[name]]
    centres = footprint_centres(lvlm, image_size, keys, shown)
    return {name: np.array(list(_errors(views[name], cells[name], centres))).reshape(-1, 2) for name in views}


def sampled_cells(view: View, cut: bool) -> list[tuple[int, int]]:
    """The corners and a few others. With `cut`, of cells of the usual size: those at a border differ (`shifted`)."""
    rows, columns = (
        np.flatnonzero(np.isclose(sides, np.median(sides)) | (not cut)).tolist()
        for sides in (np.diff(view.y_edges), np.diff(view.x_edges))
    )
    h, w = len(rows), len(columns)
    inner = np.random.default_rng(0).choice(h * w, min(SAMPLED, h * w), replace=False)
    cells = {(0, 0), (0, w - 1), (h - 1, 0), (h - 1, w - 1), *((int(i) // w, int(i) % w) for i in inner)}
    return sorted((rows[row], columns[column]) for row, column in cells)


def _errors(view: View, cells: Sequence[tuple[int, int]], centres: dict[int, Point]) -> Iterator[Point]:
    for r, c in cells:
        if (centre := centres.get(int(view.index[r, c]))) is not None:
            (x0, x1), (y0, y1) = view.x_edges[c : c + 2], view.y_edges[r : r + 2]
            yield (centre[0] - (x0 + x1) / 2) / (x1 - x0), (centre[1] - (y0 + y1) / 2) / (y1 - y0)


def image_features(lvlm: LVLM, inputs: dict[str, Any]) -> Tensor:
    """(K, D) what the language model gets for each key: the prompt's embeddings, or the cross-attention's states."""
    got: list[Tensor] = []

    def keep(module: Any, args: Any, options: dict[str, Any]) -> None:
        states = options.get("cross_attention_states")
        got.append(options["inputs_embeds"] if states is None else states)
        raise Reached

    hook = entrance(lvlm.model).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        lvlm.model.base_model(**inputs, use_cache=False)
    except Reached:
        pass
    finally:
        hook.remove()
    return got[0].reshape(-1, got[0].shape[-1])


def entrance(model: Any) -> Any:
    """The module that image features enter: the LM, or the encoder of an encoder-decoder."""
    if model.config.is_encoder_decoder:
        return model.get_encoder()
    layers = decoder_layers(model)
    return next(module for module in model.modules() if getattr(module, "layers", None) is layers)


@contextmanager
def identity_attention(lvlm: LVLM) -> Iterator[None]:
    """Every attention module outside the language model hands on the values of its own position."""
    ALL_ATTENTION_FUNCTIONS.register("identity", _values)
    ALL_MASK_ATTENTION_FUNCTIONS.register("identity", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    spared = {id(lvlm.model.config), id(lvlm.model.config.get_text_config())}
    configs = {
        id(c): c for module in lvlm.model.modules() if (c := getattr(module, "config", None)) is not None
    }
    changed = [
        c for key, c in configs.items() if key not in spared and hasattr(c, "_attn_implementation_internal")
    ]
    before = [c._attn_implementation_internal for c in changed]
    try:
        for config in changed:
            config._attn_implementation_internal = "identity"
        yield
    finally:
        for config, name in zip(changed, before, strict=True):
            config._attn_implementation_internal = name


def _values(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    if value.shape[1] != query.shape[1]:
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    if value.shape[2] != query.shape[2]:  # Molmo 2 pools four patches
        value = value.mean(2, keepdim=True).expand(-1, -1, query.shape[2], -1)
    return value.transpose(1, 2).contiguous(), None


def original_colours(lvlm: LVLM, pixels: Tensor) -> Tensor:
    """[..., colour] of the processed pixels with the normalisation undone: 0 to 1."""
    ip, last = lvlm.processor.image_processor, colour_last(lvlm, pixels)
    if not ip.do_normalize:
        return last
    return last * torch.tensor(ip.image_std) + torch.tensor(ip.image_mean)


def colour_last(lvlm: LVLM, pixels: Tensor) -> Tensor:
    """Pixels [..., colour, height, width], or flattened patches, with their colours last."""
    kind = type(lvlm.processor.image_processor).__name__
    if kind.startswith(CHANNELS_LAST):
        return pixels.reshape(*pixels.shape[:-1], -1, 3)
    if pixels.dim() >= 4 and pixels.shape[-3] == 3:
        return pixels.movedim(-3, -1)
    if kind.startswith(TIME_FIRST):
        frames = lvlm.processor.image_processor.temporal_patch_size
        return pixels.reshape(*pixels.shape[:-1], frames, 3, -1).movedim(-2, -1).flatten(-3, -2)
    return pixels.reshape(*pixels.shape[:-1], 3, -1).transpose(-1, -2)
