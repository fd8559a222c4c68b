"""Build the sprite atlases and background photos of the synthetic scenes.

Usage: python -m training.build_sprites FOLDER

FOLDER holds the unpacked npm packages `@iconify-json/<set>`, each at `FOLDER/<set>/icons.json`; styles whose package is
missing keep their present atlas. Needs `resvg_py` (rasterises SVG), SciPy (line art) and scikit-image (CC0 photos).
Writes a WebP atlas per style (lossless for the benchmark), in the order of vocabulary.txt, and a JPEG per background.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from localization_heads.scenes.artwork import SPRITES
from training.line_art import CELL, COLUMNS, build_line_art, draw_icon, fit_cell
from training.recipe import SPRITES as TRAINING_SPRITES

BENCHMARK_SETS = {
    "noto": "noto", "twemoji": "twemoji", "fluent": "fluent-emoji-flat", "openmoji": "openmoji",
}  # fmt: skip
TRAINING_SETS = {
    "noto_v1": "noto-v1", "emojione": "emojione", "fxemoji": "fxemoji", "emojione_v1": "emojione-v1",
    "fluent_3d": "fluent-emoji", "streamline": "streamline-emojis",
}  # fmt: skip
PHOTOS = ("brick.png", "grass.png", "gravel.png", "coffee.png", "hubble_deep_field.jpg")
# Names of emojis that differ from the vocabulary's.
ICONS = {
    "dog": "dog-face", "cat": "cat-face", "pig": "pig-face", "rabbit": "rabbit-face", "fish": "tropical-fish",
    "whale": "spouting-whale", "bee": "honeybee", "ladybug": "lady-beetle", "car": "automobile",
    "truck": "delivery-truck", "boat": "sailboat", "scooter": "kick-scooter", "apple": "red-apple",
    "burger": "hamburger", "donut": "doughnut", "cheese": "cheese-wedge", "ball": "soccer-ball",
    "teddy": "teddy-bear", "clock": "alarm-clock", "lamp": "light-bulb", "phone": "mobile-phone",
    "hat": "top-hat", "shoe": "running-shoe", "shirt": "t-shirt", "tree": "deciduous-tree",
}  # fmt: skip

FX_ICONS = {
    "panda": "pandaface", "pizza": "sliceofpizza", "scissors": "blackscissors", "laptop": "personalcomputer",
    "shoe": "mensshoe", "shirt": "mansshirt", "drum": "drumwithdrumsticks", "teddy": "teddybear",
}  # fmt: skip


def find_icon(icons: dict, name: str) -> dict | None:
    """The record (SVG body, frame) of the emoji that shows `name`, resolving aliases; None if the set has none."""
    plain = ICONS.get(name, name)
    variants = (f"{plain}-1", f"{plain}-face")  # Streamline has several drawings of some things
    for candidate in (plain, name, plain.replace("-", ""), FX_ICONS.get(name), *variants):
        alias = icons.get("aliases", {}).get(candidate, {}).get("parent")
        record = icons["icons"].get(candidate) or icons["icons"].get(alias)
        if record:
            return record
    return None


def rasterise(icon: dict, icon_set: dict) -> Image.Image:
    """RGBA image of an icon, cropped to its opaque pixels and scaled to a longer side of CELL pixels."""
    image = draw_icon(icon, icon_set)
    return fit_cell(image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox()))


def build_atlas(icon_set: dict, names: list[str]) -> Image.Image:
    """An atlas with the sprite of each name at the top left of its cell, row by row."""
    rows = -(-len(names) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for index, name in enumerate(names):
        icon = find_icon(icon_set, name)
        if icon is None and icon_set["prefix"] in BENCHMARK_SETS.values():
            raise KeyError(f"no icon for {name!r}")
        if icon is None:
            continue  # the cell stays empty: the scenes borrow another style's sprite
        atlas.paste(rasterise(icon, icon_set), (index % COLUMNS * CELL, index // COLUMNS * CELL))
    return atlas


def build_photos(folder: Path) -> None:
    """Write scikit-image's CC0 and public-domain photos, cropped to squares of 384 pixels."""
    from skimage import data

    for name in PHOTOS:
        photo = Image.open(Path(data.__file__).parent / name).convert("RGB")
        side = min(photo.size)
        photo = photo.crop((0, 0, side, side)).resize((384, 384), Image.Resampling.LANCZOS)
        photo.save(folder / f"{Path(name).stem}.jpg", quality=80)


def build_style(package: Path, names: list[str], target: Path, lossless: bool) -> None:
    """Write one style's atlas as WebP."""
    save_atlas(build_atlas(json.loads((package / "icons.json").read_text()), names), target, lossless)


def save_atlas(atlas: Image.Image, target: Path, lossless: bool) -> None:
    """Write an atlas as WebP."""
    pixels = np.array(atlas)
    pixels[pixels[..., 3] == 0] = 0  # colours of fully transparent pixels only cost bytes
    Image.fromarray(pixels).save(target, lossless=lossless, quality=100 if lossless else 90, method=6)


def main(packages: Path) -> None:
    """Write the atlases and photos into the package's sprites folder and that of the training."""
    lines = (SPRITES / "vocabulary.txt").read_text().splitlines()
    names = [line.split()[0] for line in lines if line and not line.startswith("#")]
    for folder, sets in ((SPRITES, BENCHMARK_SETS), (TRAINING_SPRITES, TRAINING_SETS)):
        for style, package in sets.items():
            if (packages / package).exists():
                build_style(packages / package, names, folder / f"{style}.webp", lossless=folder == SPRITES)
    noto = Image.open(SPRITES / "noto.webp").convert("RGBA")
    for style, atlas in build_line_art(packages, names, noto).items():
        save_atlas(atlas, TRAINING_SPRITES / f"{style}.webp", lossless=False)
    build_photos(SPRITES)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the unpacked packages")
    main(parser.parse_args().folder)
