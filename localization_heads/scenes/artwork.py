"""Artwork for the synthetic scenes: emoji sprites in four styles, tints, backgrounds.

Licences are in `sprites/NOTICE.md`. All randomness comes from a `random.Random`, so a seed determines everything.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SPRITES = Path(__file__).parent / "sprites"
STYLES = ("noto", "twemoji", "fluent")
HELD_OUT_STYLE = "openmoji"
CELL, COLUMNS = 160, 10  # layout of an atlas: pixels per sprite, sprites per row
PALETTE = {
    "red": (225, 30, 30), "green": (30, 170, 50), "blue": (40, 80, 230), "yellow": (240, 210, 20),
    "purple": (150, 40, 190), "orange": (245, 130, 10), "pink": (250, 120, 190), "gray": (128, 128, 128),
}  # fmt: skip
# Colours that expressions never name; without them, brown or white objects would count as "orange".
OTHER_COLOURS = ((0, 0, 0), (255, 255, 255), (120, 70, 30), (250, 220, 190), (150, 220, 250))
PHOTOS = ("brick", "grass", "gravel", "coffee", "hubble_deep_field")


def _read_vocabulary() -> dict[str, tuple[str, str | None]]:
    lines = (SPRITES / "vocabulary.txt").read_text().splitlines()
    rows = [line.split() for line in lines if line and not line.startswith("#")]
    return {name: (kind, None if feature == "-" else feature) for name, kind, feature in rows}


VOCABULARY = _read_vocabulary()  # name -> (kind, property or None)
NAMES = tuple(VOCABULARY)


@lru_cache
def _load_sprites(style: str) -> dict[str, Image.Image]:
    """The RGBA sprites of a style by name, cropped to their visible pixels (at most CELL x CELL pixels).

    `style` is one of the package's, or the path of another atlas without its extension (styles that are used for
    training only). Names that the atlas lacks are taken from the first style.
    """
    atlas = Image.open(SPRITES / f"{style}.webp").convert("RGBA")  # an absolute path replaces the folder
    sprites = {}
    for index, name in enumerate(NAMES):
        left, top = index % COLUMNS * CELL, index // COLUMNS * CELL
        cell = atlas.crop((left, top, left + CELL, top + CELL))
        drawn = cell.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox()
        sprites[name] = cell.crop(drawn) if drawn else _load_sprites(STYLES[0])[name]
    return sprites


@lru_cache
def _outlined_sprite(style: str, name: str) -> Image.Image:
    """The sprite with a dark outline and dark inner edges (an augmentation for training)."""
    sprite = _load_sprites(style)[name]
    alpha = sprite.getchannel("A")
    inner = sprite.convert("L").filter(ImageFilter.GaussianBlur(1.5)).filter(ImageFilter.FIND_EDGES)
    inner = inner.point(lambda edge: 255 * (edge > 22)).filter(ImageFilter.MaxFilter(5))
    rim = ImageChops.subtract(alpha, alpha.filter(ImageFilter.MinFilter(9)))
    strokes = ImageChops.multiply(ImageChops.lighter(inner, rim), alpha)
    return Image.composite(Image.new("RGBA", sprite.size, (15, 15, 15, 255)), sprite, strokes)


def sprite_shape(style: str, name: str) -> tuple[float, float]:
    """Width and height of a sprite, scaled so that the longer one is 1."""
    width, height = _load_sprites(style)[name].size
    return width / max(width, height), height / max(width, height)


@lru_cache(maxsize=4096)
def _reduced_sprite(style: str, name: str, outlined: bool, angle: int, halvings: int) -> Image.Image:
    """The sprite at CELL / 2**halvings pixels, from which small objects are scaled faster."""
    if halvings:
        return _reduced_sprite(style, name, outlined, angle, halvings - 1).reduce(2)
    sprite = _outlined_sprite(style, name) if outlined else _load_sprites(style)[name]
    return _rotate_sprite(sprite, angle) if angle else sprite


def _rotate_sprite(sprite: Image.Image, angle: int) -> Image.Image:
    """Rotate a sprite by `angle` degrees and crop it to its visible pixels."""
    rotated = sprite.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    return rotated.crop(rotated.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox())


@lru_cache(maxsize=8192)
def sprite_pixels(style: str, name: str, width: int, height: int, outlined: bool = False, angle: int = 0) -> np.ndarray:
    """The sprite at a given size in pixels, uint8 (height, width, 4), read-only.

    `outlined` and `angle`, in degrees, are for training; a rotated sprite is scaled to the same size.
    """
    halvings = min(3, max(0, int(np.log2(CELL / max(width, height)))))
    sprite = _reduced_sprite(style, name, outlined, angle, halvings)
    return np.asarray(sprite.resize((width, height), Image.Resampling.BICUBIC))


@lru_cache
def perceived_colours(style: str, name: str) -> frozenset[str]:
    """The palette colours that might describe the untinted sprite: those of 15 % or more of its pixels."""
    pixels = np.asarray(_load_sprites(style)[name].resize((24, 24))).reshape(-1, 4)
    rgb = pixels[pixels[:, 3] > 127, :3].astype(float)
    references = np.array([*PALETTE.values(), *OTHER_COLOURS], float)
    nearest = ((rgb[:, None] - references) ** 2).sum(-1).argmin(1)
    shares = np.bincount(nearest, minlength=len(references)) / max(1, len(nearest))
    return frozenset(colour for colour, share in zip(PALETTE, shares, strict=False) if share >= 0.15)


@lru_cache(maxsize=256)
def _tint_table(colour: str, brightness: int) -> np.ndarray:
    """Lookup table from luminance to the RGB of a tint at one of five brightness levels, uint16 (256, 3)."""
    rgb = np.array(PALETTE[colour]) * (0.86 + 0.07 * brightness)
    luminance = np.arange(256)[:, None] / 255
    dark, light = rgb * 2 * luminance, rgb + (255 - rgb) * (2 * luminance - 1) * 0.8
    return np.where(luminance < 0.5, dark, light).clip(0, 255).astype(np.uint16)


def tint(pixels: np.ndarray, colour: str, brightness: int) -> np.ndarray:
    """Recolour RGB(A) pixels (h, w, 3+): luminance determines the shade, and a fifth of the old colour is kept."""
    rgb = pixels[..., :3].astype(np.uint16)
    luminance = (rgb[..., 0] * 77 + rgb[..., 1] * 151 + rgb[..., 2] * 28) >> 8
    return np.asarray((_tint_table(colour, brightness)[luminance] * 205 + rgb * 51) >> 8, dtype=np.uint8)


@lru_cache
def _load_photo(name: str) -> Image.Image:
    return Image.open(SPRITES / f"{name}.jpg").convert("RGB")


def _random_colour(rng: Random) -> tuple[int, int, int]:
    return rng.randrange(20, 240), rng.randrange(20, 240), rng.randrange(20, 240)


def _noise_background(rng: Random, size: int, cells: int) -> Image.Image:
    """Smooth blobs of colour: a tiny random image, enlarged and blended with a random colour."""
    blobs = Image.frombytes("RGB", (cells, cells), rng.randbytes(3 * cells * cells))
    base = Image.new("RGB", (cells, cells), _random_colour(rng))
    return Image.blend(base, blobs, rng.uniform(0.1, 0.7)).resize((size, size), Image.Resampling.BILINEAR)


def _photo_background(rng: Random, size: int) -> Image.Image:
    """A random crop of a photo, blended with a random colour."""
    photo = _load_photo(rng.choice(PHOTOS))
    side = rng.uniform(0.3, 1.0) * photo.width
    left, top = rng.uniform(0, photo.width - side), rng.uniform(0, photo.width - side)
    crop = photo.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return Image.blend(crop, Image.new("RGB", crop.size, _random_colour(rng)), rng.uniform(0.1, 0.7))


def draw_background(rng: Random, size: int) -> Image.Image:
    """A random background of size x size pixels, RGB: plain, gradient, blobs of colour or part of a photo."""
    kind = rng.choices(("plain", "gradient", "noise", "photo"), (0.2, 0.1, 0.4, 0.3))[0]
    if kind == "plain":
        return Image.new("RGB", (size, size), _random_colour(rng))
    if kind == "photo":
        return _photo_background(rng, size)
    return _noise_background(rng, size, 2 if kind == "gradient" else rng.choice((3, 4, 6, 10, 20)))


def draw_clutter(rng: Random, image: Image.Image) -> None:
    """Draw three to ten small shapes, which no expression refers to, on the background, in place."""
    draw, size = ImageDraw.Draw(image), image.width
    for _ in range(rng.randint(3, 10)):
        x, y, width = rng.random() * size, rng.random() * size, rng.uniform(0.02, 0.12) * size
        box, colour = (x, y, x + width, y + width * rng.uniform(0.3, 1)), _random_colour(rng)
        shape = rng.choice(("ellipse", "rectangle", "line"))
        if shape == "line":
            draw.line(box, fill=colour, width=max(1, size // 64))
        else:
            getattr(draw, shape)(box, fill=colour)
