"""Recognise the benchmark at a path by its content, and compare its counts with the published ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from localization_heads.datasets.base import Entry, Source, image_folders
from localization_heads.datasets.flickr30k import SPLITS, Flickr30kEntities
from localization_heads.datasets.parquet import ParquetSource, column_names
from localization_heads.datasets.reasonseg import SPLITS as REASONSEG_SPLITS
from localization_heads.datasets.reasonseg import LisaFolders, ReasonSegParquet
from localization_heads.datasets.rec_benchmarks import FineCopsRef, GroundingMeParquet, RefL4Parquet
from localization_heads.datasets.refcoco import GRefCoco, JxuParquet, LmmsParquet, ReferPickles
from localization_heads.datasets.screenspot import ScreenSpotJson, ScreenSpotParquet
from localization_heads.errors import UsageError, shown

_DEPTHS = ("*.parquet", "*/*.parquet", "*/*/*.parquet")
"""Where repositories of Hugging Face have them: `data/val-00000-of-00001.parquet`, `default/val/0000.parquet`."""
_ANNOTATIONS = "annotations/*.json"


def _files(path: Path, *patterns: str) -> list[Path]:
    """The file itself, or those of a folder that fit the first pattern that any fits."""
    if path.is_file():
        return [path]
    return next((found for pattern in patterns if (found := sorted(path.glob(pattern)))), [])


def _parquets(path: Path, kind: type[ParquetSource]) -> list[Path]:
    """Parquet files with the columns of a source. UsageError where there is none."""
    files = [file for file in _files(path, *_DEPTHS) if file.suffix == ".parquet"]
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


def _jsons(path: Path, what: str, *patterns: str) -> list[Path]:
    """The same of JSON files; UsageError, which names `what` should be there, where there is none."""
    files = _files(path, *patterns)
    if not files or any(file.suffix != ".json" for file in files):
        raise _missing(path, what)
    return files


def _grefcoco(path: Path, images: Path | None) -> Source:
    refs, *others = _jsons(path, "grefs(unc).json", "grefs(unc).json", "*/grefs(unc).json")
    if others:
        raise _missing(path, "grefs(unc).json")
    usual = ("images/mscoco/images/train2014", "train2014")
    return GRefCoco(refs, image_folders(images, refs.parent if images else refs.parent.parent, *usual)[0])


def _screenspot(stem: str, path: Path, images: Path | None) -> Source:
    files = _files(path, stem, f"*/{stem}")
    if files and all(file.suffix == ".json" for file in files):
        return ScreenSpotJson(files, images, pro=False)
    return ScreenSpotParquet(_parquets(path, ScreenSpotParquet))


def _screenspot_pro(path: Path, images: Path | None) -> Source:
    return ScreenSpotJson(_jsons(path, _ANNOTATIONS, _ANNOTATIONS, "*.json"), images, pro=True)


def _finecops(path: Path, images: Path | None) -> Source:
    patterns = ("*all_coco_format.json", "*/*all_coco_format.json", "*coco_format.json")
    return FineCopsRef(_jsons(path, "test_expression_all_coco_format.json", *patterns), images)


def _flickr30k(path: Path, images: Path | None) -> Source:
    lists = {split: file for split in SPLITS if (file := path / f"{split}.txt").is_file()}
    if not lists or not (path / "Sentences").is_dir() or not (path / "Annotations").is_dir():
        raise _missing(path, "a folder with Sentences, Annotations, and train.txt, val.txt or test.txt")
    return Flickr30kEntities(path, lists, images)


OPENERS: dict[str, Callable[[Path, Path | None], Source]] = {
    "ref-l4": lambda path, images: RefL4Parquet(_parquets(path, RefL4Parquet), images),
    "grefcoco": _grefcoco,
    "screenspot": partial(_screenspot, "screenspot_*[bpe].json"),
    "screenspot-v2": partial(_screenspot, "screenspot_*_v2.json"),
    "screenspot-pro": _screenspot_pro,
    "groundingme": lambda path, _: GroundingMeParquet(_parquets(path, GroundingMeParquet)),
    "finecops-ref": _finecops,
    "flickr30k": _flickr30k,
}
"""By the name of the data set; each takes its path and `images=`."""

PARTITIONS = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}
"""The partitions that papers report: UNC for RefCOCO and RefCOCO+, UMD for RefCOCOg (lichengunc/MAttNet, issue 20)."""

_FOLDERS = {
    "refcoco": ("refcoco",),
    "refcoco+": ("refcoco+", "refcocoplus"),
    "refcocog": ("refcocog",),
    "reasonseg": ("reasonseg", "reason_seg"),
}


class Counts(NamedTuple):
    references: int
    expressions: int


OFFICIAL: dict[tuple[str, str], Counts] = {
    ("refcoco", "train"): Counts(42_404, 120_624),
    ("refcoco", "val"): Counts(3_811, 10_834),
    ("refcoco", "testA"): Counts(1_975, 5_657),
    ("refcoco", "testB"): Counts(1_810, 5_095),
    ("refcoco+", "train"): Counts(42_278, 120_191),
    ("refcoco+", "val"): Counts(3_805, 10_758),
    ("refcoco+", "testA"): Counts(1_975, 5_726),
    ("refcoco+", "testB"): Counts(1_798, 4_889),
    ("refcocog", "train"): Counts(42_226, 80_512),
    ("refcocog", "val"): Counts(2_573, 4_896),
    ("refcocog", "test"): Counts(5_023, 9_602),
    ("reasonseg", "val"): Counts(200, 200),
    ("reasonseg", "test"): Counts(779, 779),
}
"""Of the partitions that papers report. References: https://www.tensorflow.org/datasets/catalog/ref_coco and the
cards of jxu124/refcoco*; expressions: those of refs(unc).p and refs(umd).p (sums: 142,210, 141,564 and 95,010).
ReasonSeg: LISA's README; its 239 training images have up to five expressions each."""


def count(entries: Sequence[Entry]) -> Counts:
    """References (rows) and expressions of some entries."""
    return Counts(len({entry.row for entry in entries}), len(entries))


def open_source(dataset: str, path: Path, images: Path | None) -> Source:
    """The benchmark at `path`, a file or a folder. UsageError, saying what is there, if it is not one.

    Args:
        images: the folder of COCO's images, for sources that have none inside.
    """
    if not path.exists():
        raise UsageError(f"dataset_path={path}: no such file or folder")
    if dataset in OPENERS:
        return OPENERS[dataset](path, images)
    root = _chosen_folder(dataset, path)
    files = [path] if path.is_file() else [file for depth in _DEPTHS for file in sorted(root.glob(depth))]
    if parquets := [file for file in files if file.suffix == ".parquet"]:
        return _open_parquets(dataset, parquets, path, images)
    if dataset == "reasonseg":
        return LisaFolders(_split_folders(root, path))
    refs = root if root.is_file() else _refs_file(dataset, root, path)
    if not re.fullmatch(r"refs\(\w+\)\.p", refs.name):
        raise UsageError(f"dataset_path={path}: a file must be a .parquet or a refs(...).p")
    return ReferPickles(refs, _coco_folder(images, refs.parent), standard=PARTITIONS[dataset])


def _chosen_folder(dataset: str, path: Path) -> Path:
    """The data set's own folder where `path` holds several."""
    if path.is_dir():
        for name in _FOLDERS[dataset]:
            for child in sorted(path.iterdir()):
                if child.name.lower() == name and child.is_dir():
                    return _chosen_folder(dataset, child)
    return path


def _open_parquets(dataset: str, files: Sequence[Path], path: Path, images: Path | None) -> Source:
    columns = [set(column_names(file)) for file in files]
    kinds: dict[type[ParquetSource], Callable[[], Source]] = {
        JxuParquet: lambda: JxuParquet(files, _coco_folder(images, files[0].parent), dataset),
        LmmsParquet: lambda: LmmsParquet(files, dataset),
    }
    if dataset == "reasonseg":
        kinds = {ReasonSegParquet: lambda: ReasonSegParquet(files)}
    for kind, opened in kinds.items():
        if set.intersection(*columns) >= kind.columns():
            return opened()
    wanted = " or ".join(", ".join(sorted(kind.columns())) for kind in kinds)
    found = ", ".join(shown(name)[1:-1] for name in sorted(columns[0])[:20]) or "none"
    raise UsageError(f"dataset_path={path}: columns {found}; {dataset} as parquet has {wanted}")


def _split_folders(root: Path, path: Path) -> dict[str, Path]:
    """LISA's folders by split: those below `root`, or `root` itself if it has a split's name."""
    folders = {split: root / split for split in REASONSEG_SPLITS if any((root / split).glob("*.json"))}
    if not folders and root.name in REASONSEG_SPLITS and any(root.glob("*.json")):
        folders = {root.name: root}
    if not folders:
        raise UsageError(
            f"dataset_path={path}: neither parquet nor LISA's folders (train, val or test with .json files); "
            f"{_found(root)}"
        )
    return folders


def _refs_file(dataset: str, root: Path, path: Path) -> Path:
    """The refs file of the partition that papers report, or the only one there is."""
    found = sorted(root.glob("refs(*).p"))
    standard = root / f"refs({PARTITIONS[dataset]}).p"
    if standard in found:
        return standard
    if len(found) == 1:
        return found[0]
    raise UsageError(
        f"dataset_path={path}: neither {standard.name} nor parquet for {dataset}; {_found(root)}; name the file itself"
    )


def _found(folder: Path) -> str:
    names = sorted(child.name for child in folder.iterdir()) if folder.is_dir() else [folder.name]
    listed = ", ".join(shown(name)[1:-1] for name in names[:8]) or "nothing"
    return f"found {listed}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _coco_folder(images: Path | None, beside: Path) -> Path:
    """`images=`, or the folder that https://github.com/lichengunc/refer has them in."""
    usual = beside.parent / "images" / "mscoco" / "images" / "train2014"
    folder = images or (usual if usual.is_dir() else None)
    if folder is None:
        raise UsageError("images= is missing: name the folder of COCO's train2014 images")
    if not folder.is_dir():
        raise UsageError(f"images={folder}: no such folder")
    return folder
