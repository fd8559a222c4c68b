"""Training styles made from monochrome icons: outlines and silhouettes, filled with the colours of Noto's emojis.

Icons are black, drawn with lines or with holes. The area enclosed by the ink is filled with the most common colour of
Noto's emoji of the same thing, so that the vision tower sees more drawing styles and stroke widths in plausible
colours. `training.build_sprites` writes the atlases.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from resvg_py import svg_to_bytes
from scipy import ndimage

CELL, COLUMNS = 160, 10  # pixels per side of a sprite; sprites per row
SIDE, MARGIN = 480, 40  # pixels per side of an icon, and of the margin around it
DARK = (20, 20, 20)
# IconPark's two blues, and how far the fill colour that replaces each is blended with white.
ICONPARK_FILLS = (((47, 136, 255), 0.0), ((67, 204, 248), 0.5))


class Source(NamedTuple):
    """An icon set, how its ink is drawn (a key of `_INKS`), and the pixels by which strokes are widened."""

    package: str
    ink: str
    growth: int = 0


# The first source with an icon wins; without one the cell stays empty, and the scenes borrow Noto's sprite.
STYLES: Mapping[str, tuple[Source, ...]] = {
    "lines_a": (
        Source("icon-park", "colours"),
        Source("hugeicons", "lines", 5),
        Source("lucide", "lines", 5),
        Source("tabler", "lines", 4),
    ),
    "lines_b": (
        Source("ph", "lines", 5),
        Source("lucide", "lines", 7),
        Source("lucide-lab", "lines", 7),
        Source("tabler", "lines", 6),
        Source("hugeicons", "lines", 8),
    ),
    "contrast": (Source("fluent-emoji-high-contrast", "lines", 1),),
    "solid": (Source("game-icons", "holes"), Source("mdi", "holes"), Source("emojione-monotone", "holes")),
    "glyphs": (Source("mdi", "holes"), Source("emojione-monotone", "holes")),
}
# Icon names to try for a thing, best first, before its own name.
ICONS: Mapping[str, str] = {
    "dog": "dog-face dog-side sitting-dog", "cat": "cat-face", "pig": "pig-face", "rabbit": "rabbit-face",
    "bird": "bird hummingbird dove", "rooster": "rooster chicken hen", "fish": "tropical-fish fish fish-food",
    "whale": "spouting-whale whale sperm-whale", "bee": "honeybee", "ladybug": "lady-beetle ladybug bug",
    "car": "automobile car city-car car-side", "truck": "delivery-truck", "airplane": "airplane plane",
    "boat": "sailboat sail-boat boat ship", "scooter": "kick-scooter scooter moped",
    "apple": "red-apple apple-one apple food-apple shiny-apple", "grapes": "grapes grape fruit-grapes",
    "watermelon": "watermelon fruit-watermelon", "pineapple": "pineapple fruit-pineapple",
    "burger": "hamburger burger food-burger", "donut": "doughnut", "cheese": "cheese-wedge",
    "bread": "bread bread-slice baguette sliced-bread",
    "ball": "soccer-ball soccer football ball-football volleyball basketball", "teddy": "teddy-bear bear",
    "clock": "alarm-clock alarm clock-circle", "lamp": "light-bulb lightbulb bulb light",
    "phone": "mobile-phone cellphone smartphone device-mobile iphone mobile",
    "laptop": "laptop laptop-computer", "hat": "top-hat hat hat-fedora bowler-hat cap",
    "shoe": "running-shoe sneaker shoe shoe-sneaker shoes", "shirt": "t-shirt tshirt shirt tshirt-crew",
    "dress": "dress skirt", "glasses": "eyeglasses glasses spectacles sunglasses",
    "tree": "deciduous-tree tree tree-deciduous oak plant", "rose": "rose flower flower-rose",
}  # fmt: skip
FALSE_MATCHES = {  # icons with the right name that show something else
    ("game-icons", "pig"), ("icon-park", "trumpet"), ("icon-park", "scissors"), ("icon-park", "lamp"),
    *((package, "rose") for package in ("hugeicons", "lucide", "lucide-lab", "tabler", "ph")),
}  # fmt: skip


def build_line_art(packages: Path, names: list[str], noto: Image.Image) -> Mapping[str, Image.Image]:
    """An RGBA atlas per style, for the styles whose packages are all at `packages/<set>/icons.json`."""
    return {
        style: _atlas(sources, packages, names, noto)
        for style, sources in STYLES.items()
        if all((packages / source.package).exists() for source in sources)
    }


def _atlas(sources: tuple[Source, ...], packages: Path, names: list[str], noto: Image.Image) -> Image.Image:
    sets = [json.loads((packages / source.package / "icons.json").read_text()) for source in sources]
    atlas = Image.new("RGBA", (COLUMNS * CELL, -(-len(names) // COLUMNS) * CELL))
    for index, name in enumerate(names):
        corner = (index % COLUMNS * CELL, index // COLUMNS * CELL)
        fill = _most_common_colour(noto.crop((*corner, corner[0] + CELL, corner[1] + CELL)))
        for source, icon_set in zip(sources, sets, strict=True):
            icon = _find_icon(icon_set, name)
            if icon is not None:
                atlas.paste(_filled_sprite(draw_icon(icon, icon_set), source, fill), corner)
                break
    return atlas


def _find_icon(icon_set: dict, name: str) -> dict | None:
    """The record of the icon that shows `name`, resolving aliases; None if the set has none."""
    if (icon_set["prefix"], name) in FALSE_MATCHES:
        return None
    for plain in (*ICONS.get(name, "").split(), name):
        for candidate in (plain, f"{plain}-01", f"{plain}-one", plain.replace("-", "")):
            alias = icon_set.get("aliases", {}).get(candidate, {}).get("parent")
            record = icon_set["icons"].get(candidate) or icon_set["icons"].get(alias)
            if record:
                return record
    return None


def draw_icon(icon: dict, icon_set: dict) -> Image.Image:
    """RGBA image of an icon, SIDE x SIDE pixels; parts without a colour of their own are black."""
    width, height = (icon.get(side, icon_set.get(side, 16)) for side in ("width", "height"))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" '
        f'width="{SIDE}" height="{SIDE}" color="#000">{icon["body"]}</svg>'
    )
    return Image.open(io.BytesIO(bytes(svg_to_bytes(svg_string=svg)))).convert("RGBA")


def fit_cell(sprite: Image.Image) -> Image.Image:
    """The sprite scaled to a longer side of CELL pixels."""
    scale = CELL / max(sprite.size)
    size = (max(1, round(sprite.width * scale)), max(1, round(sprite.height * scale)))
    return sprite.resize(size, Image.Resampling.LANCZOS)


def _most_common_colour(emoji: Image.Image) -> NDArray[np.float64]:
    """The mean colour of the largest of 4 x 4 x 4 colour bins, lightened if dark, to contrast with the dark lines."""
    pixels = np.array(emoji.resize((CELL // 4, CELL // 4))).reshape(-1, 4)
    rgb = pixels[pixels[:, 3] > 127, :3].astype(float)
    bins = (rgb // 64) @ (16, 4, 1)
    colour = rgb[bins == np.bincount(bins.astype(int)).argmax()].mean(0)
    return colour + 50 if colour.mean() < 70 else colour


def _filled_sprite(icon: Image.Image, source: Source, fill: NDArray[np.float64]) -> Image.Image:
    """The sprite of an icon: filled, cropped, and scaled to a longer side of CELL pixels."""
    pixels = np.pad(np.array(icon), ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)))
    ink = pixels[..., 3] > 100
    body = _body(ink)
    sprite = np.zeros(pixels.shape, np.uint8)
    sprite[body] = (*fill, 255)
    _INKS[source.ink](sprite, pixels, ink, body, source.growth, fill)
    drawn = Image.fromarray(sprite)
    return fit_cell(drawn.crop(drawn.getchannel("A").getbbox()))


def _body(ink: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The ink and the area it encloses, after closing gaps in the outline up to 28 pixels wide."""
    closed = ndimage.binary_closing(ndimage.binary_dilation(ink, iterations=2), iterations=14)
    regions, _ = ndimage.label(~closed)
    return ~(ndimage.binary_dilation(regions == regions[0, 0], iterations=2) & ~ink)


def _lines(sprite, pixels, ink, body, growth, fill) -> None:
    """Draw the ink as dark lines."""
    sprite[ndimage.binary_dilation(ink, iterations=growth)] = (*DARK, 255)


def _holes(sprite, pixels, ink, body, growth, fill) -> None:
    """Draw the holes in a silhouette as dark lines."""
    sprite[body & ~ink] = (*DARK, 255)


def _colours(sprite, pixels, ink, body, growth, fill) -> None:
    """Draw the icon in its own colours, with its two blues replaced."""
    rgb = pixels[..., :3].astype(int)
    for blue, pale in ICONPARK_FILLS:
        rgb[np.abs(rgb - blue).sum(-1) < 60] = fill + (255 - fill) * pale
    sprite[ink, :3], sprite[ink, 3] = rgb[ink], 255


_INKS: Mapping[str, Callable[..., None]] = {"lines": _lines, "holes": _holes, "colours": _colours}
