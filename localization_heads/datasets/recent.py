"""Recognise the newer benchmarks at a path: Ref-L4, gRefCOCO, ScreenSpot, GroundingME, FineCops-Ref, Flickr30k."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from localization_heads.datasets.files import image_folders
from localization_heads.datasets.finecops import FineCopsRef
from localization_heads.datasets.flickr30k import SPLITS, Flickr30kEntities
from localization_heads.datasets.grefcoco import GRefCoco
from localization_heads.datasets.groundingme import GroundingMeParquet
from localization_heads.datasets.parquet import ParquetSource, column_names
from localization_heads.datasets.reference import Source
from localization_heads.datasets.refl4 import RefL4Parquet
from localization_heads.datasets.screenspot import ScreenSpotJson, ScreenSpotParquet
from localization_heads.errors import UsageError, shown

Opener = Callable[[Path, Path | None], Source]


def _files(path: Path, *patterns: str) -> list[Path]:
    """The file itself, or those of a folder that fit the first pattern that any fits."""
    if path.is_file():
        return [path]
    return next((found for pattern in patterns if (found := sorted(path.glob(pattern)))), [])


def _parquets(path: Path, kind: type[ParquetSource]) -> list[Path]:
    """Parquet files with the columns of a source. UsageError where there is none."""
    files = [
        file
        for file in _files(path, "*.parquet", "*/*.parquet", "*/*/*.parquet")
        if file.suffix == ".parquet"
    ]
    wanted = ", ".join(sorted(kind.columns()))
    if not files:
        raise UsageError(f"dataset_path={path}: no parquet file with columns {wanted}")
    for file in files:
        if missing := sorted(kind.columns() - set(column_names(file))):
            raise UsageError(
                f"dataset_path={path}: {file.name} has no column {shown(missing[0])}; it needs {wanted}"
            )
    return files


def _missing(path: Path, what: str) -> UsageError:
    return UsageError(f"dataset_path={path}: {what} is not there")


def _ref_l4(path: Path, images: Path | None) -> Source:
    return RefL4Parquet(_parquets(path, RefL4Parquet), images)


def _groundingme(path: Path, images: Path | None) -> Source:
    return GroundingMeParquet(_parquets(path, GroundingMeParquet))


def _grefcoco(path: Path, images: Path | None) -> Source:
    files = _files(path, "grefs(unc).json", "*/grefs(unc).json")
    if len(files) != 1 or files[0].suffix != ".json":
        raise _missing(path, "grefs(unc).json")
    usual = ("images/mscoco/images/train2014", "train2014")
    folders = image_folders(images, files[0].parent if images else files[0].parent.parent, *usual)
    return GRefCoco(files[0], folders[0])


def _screenspot(stem: str) -> Opener:
    def opened(path: Path, images: Path | None) -> Source:
        files = _files(path, stem, f"*/{stem}")
        if files and all(file.suffix == ".json" for file in files):
            return ScreenSpotJson(files, images, pro=False)
        return ScreenSpotParquet(_parquets(path, ScreenSpotParquet))

    return opened


def _screenspot_pro(path: Path, images: Path | None) -> Source:
    files: Sequence[Path] = _files(path, "annotations/*.json", "*.json")
    if not files or any(file.suffix != ".json" for file in files):
        raise _missing(path, "annotations/*.json")
    return ScreenSpotJson(files, images, pro=True)


def _finecops(path: Path, images: Path | None) -> Source:
    files = _files(path, "*all_coco_format.json", "*/*all_coco_format.json", "*coco_format.json")
    if not files or any(file.suffix != ".json" for file in files):
        raise _missing(path, "test_expression_all_coco_format.json")
    return FineCopsRef(files, images)


def _flickr30k(path: Path, images: Path | None) -> Source:
    lists = {split: file for split in SPLITS if (file := path / f"{split}.txt").is_file()}
    if not lists or not (path / "Sentences").is_dir() or not (path / "Annotations").is_dir():
        raise _missing(path, "a folder with Sentences, Annotations, and train.txt, val.txt or test.txt")
    return Flickr30kEntities(path, lists, images)


OPENERS: dict[str, Opener] = {
    "ref-l4": _ref_l4,
    "grefcoco": _grefcoco,
    "screenspot": _screenspot("screenspot_*[bpe].json"),
    "screenspot-v2": _screenspot("screenspot_*_v2.json"),
    "screenspot-pro": _screenspot_pro,
    "groundingme": _groundingme,
    "finecops-ref": _finecops,
    "flickr30k": _flickr30k,
}
"""By the name of the data set; each takes its path and `images=`."""
