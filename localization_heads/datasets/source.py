"""Open the benchmark at a path, recognising its format by its content; the published counts to compare with."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from localization_heads.datasets.base import IndexEntry, Source, find_image_folders
from localization_heads.datasets.flickr30k import SPLITS, Flickr30kEntities
from localization_heads.datasets.parquet import ParquetSource, column_names
from localization_heads.datasets.reasonseg import SPLITS as REASONSEG_SPLITS
from localization_heads.datasets.reasonseg import LisaFolders, ReasonSegParquet
from localization_heads.datasets.rec_benchmarks import FineCopsRef, GroundingMeParquet, RefL4Parquet
from localization_heads.datasets.refcoco import GRefCoco, JxuParquet, LmmsParquet, ReferPickles
from localization_heads.datasets.screenspot import ScreenSpotJson, ScreenSpotParquet
from localization_heads.errors import UsageError, shown

_PARQUET_PATTERNS = ("*.parquet", "*/*.parquet", "*/*/*.parquet")
"""As in Hugging Face repositories: `data/val-00000-of-00001.parquet`, `default/val/0000.parquet`."""
_ANNOTATIONS = "annotations/*.json"


def _find_files(path: Path, *patterns: str) -> list[Path]:
    """The file itself, or the files in a folder that match the first pattern with any match."""
    if path.is_file():
        return [path]
    return next((files for pattern in patterns if (files := sorted(path.glob(pattern)))), [])


def _find_parquets(path: Path, kind: type[ParquetSource]) -> list[Path]:
    """The Parquet files, checked to have the columns of a source. UsageError if there are none."""
    files = [file for file in _find_files(path, *_PARQUET_PATTERNS) if file.suffix == ".parquet"]
    required = ", ".join(sorted(kind.columns()))
    if not files:
        raise UsageError(f"dataset_path={path}: no parquet file with columns {required}")
    for file in files:
        if missing := sorted(kind.columns() - set(column_names(file))):
            raise UsageError(f"dataset_path={path}: {file.name} has no column {shown(missing[0])}; it needs {required}")
    return files


def _missing_error(path: Path, expected: str) -> UsageError:
    return UsageError(f"dataset_path={path}: {expected} is not there")


def _find_json_files(path: Path, expected: str, *patterns: str) -> list[Path]:
    """The matching JSON files. UsageError, naming what is `expected`, if there are none."""
    files = _find_files(path, *patterns)
    if not files or any(file.suffix != ".json" for file in files):
        raise _missing_error(path, expected)
    return files


def _grefcoco(path: Path, images: Path | None) -> Source:
    refs, *others = _find_json_files(path, "grefs(unc).json", "grefs(unc).json", "*/grefs(unc).json")
    if others:
        raise _missing_error(path, "grefs(unc).json")
    default = ("images/mscoco/images/train2014", "train2014")
    return GRefCoco(refs, find_image_folders(images, refs.parent if images else refs.parent.parent, *default)[0])


def _screenspot(stem: str, path: Path, images: Path | None) -> Source:
    files = _find_files(path, stem, f"*/{stem}")
    if files and all(file.suffix == ".json" for file in files):
        return ScreenSpotJson(files, images, pro=False)
    return ScreenSpotParquet(_find_parquets(path, ScreenSpotParquet))


def _screenspot_pro(path: Path, images: Path | None) -> Source:
    return ScreenSpotJson(_find_json_files(path, _ANNOTATIONS, _ANNOTATIONS, "*.json"), images, pro=True)


def _finecops(path: Path, images: Path | None) -> Source:
    patterns = ("*all_coco_format.json", "*/*all_coco_format.json", "*coco_format.json")
    return FineCopsRef(_find_json_files(path, "test_expression_all_coco_format.json", *patterns), images)


def _flickr30k(path: Path, images: Path | None) -> Source:
    lists = {split: file for split in SPLITS if (file := path / f"{split}.txt").is_file()}
    if not lists or not (path / "Sentences").is_dir() or not (path / "Annotations").is_dir():
        raise _missing_error(path, "a folder with Sentences, Annotations, and train.txt, val.txt or test.txt")
    return Flickr30kEntities(path, lists, images)


OPENERS: dict[str, Callable[[Path, Path | None], Source]] = {
    "ref-l4": lambda path, images: RefL4Parquet(_find_parquets(path, RefL4Parquet), images),
    "grefcoco": _grefcoco,
    "screenspot": partial(_screenspot, "screenspot_*[bpe].json"),
    "screenspot-v2": partial(_screenspot, "screenspot_*_v2.json"),
    "screenspot-pro": _screenspot_pro,
    "groundingme": lambda path, _: GroundingMeParquet(_find_parquets(path, GroundingMeParquet)),
    "finecops-ref": _finecops,
    "flickr30k": _flickr30k,
}
"""By name of the data set; each takes its path and `images=`."""

PARTITIONS = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}
"""The partitions that papers report: UNC for RefCOCO and RefCOCO+, UMD for RefCOCOg (lichengunc/MAttNet, issue 20)."""

_FOLDER_NAMES = {
    "refcoco": ("refcoco",),
    "refcoco+": ("refcoco+", "refcocoplus"),
    "refcocog": ("refcocog",),
    "reasonseg": ("reasonseg", "reason_seg"),
}


class Counts(NamedTuple):
    """Numbers of references (one object each) and of the expressions for them."""

    references: int
    expressions: int


OFFICIAL_COUNTS: dict[tuple[str, str], Counts] = {
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
"""For the partitions that papers report. References: https://www.tensorflow.org/datasets/catalog/ref_coco and the
cards of jxu124/refcoco*; expressions: those of refs(unc).p and refs(umd).p (sums: 142,210, 141,564 and 95,010).
ReasonSeg: LISA's README; its 239 training images have up to five expressions each."""


def count_entries(entries: Sequence[IndexEntry]) -> Counts:
    """Count the references (rows) and expressions in index entries."""
    return Counts(len({entry.row for entry in entries}), len(entries))


def open_source(dataset: str, path: Path, images: Path | None) -> Source:
    """Open the benchmark at `path`, a file or a folder. UsageError, listing what is there, if it is not recognised.

    Args:
        images: folder of the images, for formats that do not contain them (COCO's, for the RefCOCO family).
    """
    if not path.exists():
        raise UsageError(f"dataset_path={path}: no such file or folder")
    if dataset in OPENERS:
        return OPENERS[dataset](path, images)
    root = _dataset_folder(dataset, path)
    files = [path]
    if not path.is_file():
        files = [file for pattern in _PARQUET_PATTERNS for file in sorted(root.glob(pattern))]
    if parquets := [file for file in files if file.suffix == ".parquet"]:
        return _open_parquets(dataset, parquets, path, images)
    if dataset == "reasonseg":
        return LisaFolders(_find_split_folders(root, path))
    refs = root if root.is_file() else _find_refs_file(dataset, root, path)
    if not re.fullmatch(r"refs\(\w+\)\.p", refs.name):
        raise UsageError(f"dataset_path={path}: a file must be a .parquet or a refs(...).p")
    return ReferPickles(refs, _find_coco_folder(images, refs.parent), standard=PARTITIONS[dataset])


def _dataset_folder(dataset: str, path: Path) -> Path:
    """The subfolder of the data set if `path` contains several data sets, else `path`."""
    if path.is_dir():
        for name in _FOLDER_NAMES[dataset]:
            for child in sorted(path.iterdir()):
                if child.name.lower() == name and child.is_dir():
                    return _dataset_folder(dataset, child)
    return path


def _open_parquets(dataset: str, files: Sequence[Path], path: Path, images: Path | None) -> Source:
    columns = [set(column_names(file)) for file in files]
    kinds: dict[type[ParquetSource], Callable[[], Source]] = {
        JxuParquet: lambda: JxuParquet(files, _find_coco_folder(images, files[0].parent), dataset),
        LmmsParquet: lambda: LmmsParquet(files, dataset),
    }
    if dataset == "reasonseg":
        kinds = {ReasonSegParquet: lambda: ReasonSegParquet(files)}
    for kind, make in kinds.items():
        if set.intersection(*columns) >= kind.columns():
            return make()
    required = " or ".join(", ".join(sorted(kind.columns())) for kind in kinds)
    found = ", ".join(shown(name)[1:-1] for name in sorted(columns[0])[:20]) or "none"
    raise UsageError(f"dataset_path={path}: columns {found}; {dataset} as parquet has {required}")


def _find_split_folders(root: Path, path: Path) -> dict[str, Path]:
    """LISA's folders by split: subfolders of `root`, or `root` itself if it is named after a split."""
    folders = {split: root / split for split in REASONSEG_SPLITS if any((root / split).glob("*.json"))}
    if not folders and root.name in REASONSEG_SPLITS and any(root.glob("*.json")):
        folders = {root.name: root}
    if not folders:
        raise UsageError(
            f"dataset_path={path}: neither parquet nor LISA's folders (train, val or test with .json files); "
            f"{_list_contents(root)}"
        )
    return folders


def _find_refs_file(dataset: str, root: Path, path: Path) -> Path:
    """The refs file of the partition that papers report, or else the only refs file."""
    refs_files = sorted(root.glob("refs(*).p"))
    standard = root / f"refs({PARTITIONS[dataset]}).p"
    if standard in refs_files:
        return standard
    if len(refs_files) == 1:
        return refs_files[0]
    raise UsageError(
        f"dataset_path={path}: neither {standard.name} nor parquet for {dataset}; "
        f"{_list_contents(root)}; name the file itself"
    )


def _list_contents(folder: Path) -> str:
    names = sorted(child.name for child in folder.iterdir()) if folder.is_dir() else [folder.name]
    listed = ", ".join(shown(name)[1:-1] for name in names[:8]) or "nothing"
    return f"found {listed}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _find_coco_folder(images: Path | None, beside: Path) -> Path:
    """`images=`, or the default location in https://github.com/lichengunc/refer."""
    default = beside.parent / "images" / "mscoco" / "images" / "train2014"
    folder = images or (default if default.is_dir() else None)
    if folder is None:
        raise UsageError("images= is missing: name the folder of COCO's train2014 images")
    if not folder.is_dir():
        raise UsageError(f"images={folder}: no such folder")
    return folder
