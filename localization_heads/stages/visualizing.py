"""Figures from attention files alone: no model, no options of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localization_heads import figures
from localization_heads.attention import AttentionMaps
from localization_heads.data.jsonl import BadEntry
from localization_heads.data.samples import VisualizationEntry, load_visualization_entries
from localization_heads.errors import UsageError, WorkError
from localization_heads.grounding.maps import Grounding, GroundingOptions, ground_maps
from localization_heads.heads.analysis import greedy_heads
from localization_heads.heads.criteria import (
    CriteriaOptions,
    HeadStatistics,
    binarise,
    head_statistics,
    label_components,
)
from localization_heads.heads.head import Head
from localization_heads.stages.entries import choose_range, find_data_file
from localization_heads.stages.run import check_heads, known_heads
from localization_heads.stages.single import find_attention_file, picture_of, top_heads
from localization_heads.store.attention_files import load_attention
from localization_heads.store.paths import side_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image


@dataclass(frozen=True)
class Opened:
    """An attention file with what both criteria say of it."""

    path: Path
    maps: AttentionMaps
    statistics: HeadStatistics


def show_file(options: Mapping[str, Any], name: str, layer: int | None, head: int | None) -> list[Path]:
    """Draw one attention file: one head if layer and head are named, else its top heads.

    Returns:
        The figures written; none with `save_fig=false`.
    """
    if (layer is None) != (head is None):
        raise UsageError("layer= and head= go together: name both, or neither for the top heads")
    opened = _open(find_attention_file(name), CriteriaOptions(**options["criteria"]))
    if layer is not None and head is not None:
        shown, grounding = [Head(layer, head)], None
        check_heads(shown, opened.maps.num_layers, opened.maps.num_heads, f"layer={layer} head={head}")
    else:
        shown, grounding = _top(options, opened)
    return _draw(options, opened, shown, grounding)


def show_entries(options: Mapping[str, Any]) -> tuple[list[Path], list[BadEntry]]:
    """Draw every entry of `data_file`; a bad one is reported and the rest goes on."""
    if not options["data_file"]:
        raise UsageError("data_file= is missing: mode=batch needs it")
    file = load_visualization_entries(find_data_file(options["data_file"]))
    entries, bad = choose_range(options, file.entries, file.bad)
    paths: list[Path] = []
    for entry in entries:
        try:
            paths += show_file(options, _file_of(entry), entry.layer, entry.head)
        except (UsageError, WorkError) as error:
            bad.append(BadEntry(entry.line, entry.id, str(error)))
    return paths, bad


def _file_of(entry: VisualizationEntry) -> str:
    if entry.attention_file is None:
        raise UsageError("names no attention_file")
    return str(entry.attention_file)


def _open(path: Path, criteria: CriteriaOptions) -> Opened:
    maps = load_attention(path)
    return Opened(path, maps, head_statistics(maps.attention, criteria))


def _top(options: Mapping[str, Any], opened: Opened) -> tuple[list[Head], Grounding]:
    """The heads to show and the box of the first `k`: the model's known heads, else the file's own."""
    criteria, maps = CriteriaOptions(**options["criteria"]), opened.maps
    chosen = known_heads(maps.model, opened.path.parent.parent, options["k"])
    chosen = chosen or tuple(greedy_heads(opened.statistics, criteria, options["k"]))
    check_heads(chosen, maps.num_layers, maps.num_heads)
    grounding = ground_maps(maps, chosen, GroundingOptions(**options["grounding"]))
    return top_heads(chosen, opened.statistics, criteria, options["top_k"]), grounding


def _draw(
    options: Mapping[str, Any], opened: Opened, shown: Sequence[Head], grounding: Grounding | None
) -> list[Path]:
    image, statistics = picture_of(opened.maps), opened.statistics
    paths = [_target(options, opened, "_visualization.png")]
    drawn = [
        figures.plot_top_maps(image, opened.maps, shown, paths[0], grounding=grounding, statistics=statistics)
    ]
    for head in shown if options["show_components"] else ():
        paths.append(_target(options, opened, f"_components_{head}.png"))
        drawn.append(_draw_components(opened, image, head, CriteriaOptions(**options["criteria"]), paths[-1]))
    if options["show_plot"]:
        for figure in drawn:
            figures.show(figure)
    return [path for path in paths if path is not None]


def _draw_components(
    opened: Opened, image: Image.Image | None, head: Head, criteria: CriteriaOptions, path: Path | None
) -> Figure:
    labels = label_components(binarise(opened.maps.attention[head], threshold=criteria.threshold))
    return figures.plot_components(
        image, opened.maps, head, labels, float(opened.statistics.spatial_entropy[head]), path
    )


def _target(options: Mapping[str, Any], opened: Opened, suffix: str) -> Path | None:
    """Where a figure goes: beside its attention file, or under the same name in `output_dir`."""
    if not options["save_fig"]:
        return None
    beside = side_path(opened.path, suffix)
    return Path(options["output_dir"]) / beside.name if options["output_dir"] else beside
