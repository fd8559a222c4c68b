"""The figures of the viewer, `visualize_attention.py`, drawn from attention files without a model."""

from __future__ import annotations

import logging
from pathlib import Path

from localization_heads.attention import AttentionMaps
from localization_heads.cells import label_components
from localization_heads.data.samples import VisualizationEntry, load_visualization_entries
from localization_heads.errors import BadEntry, UsageError, WorkError
from localization_heads.grounder import Grounder
from localization_heads.grounding.ground import Grounding
from localization_heads.heads.criteria import HeadStatistics, binarise, check_criteria, head_statistics
from localization_heads.heads.head import Head, check_heads
from localization_heads.options.programs import VisualizeOptions
from localization_heads.stages.entries import select_range
from localization_heads.stages.single import (
    attention_file_of,
    find_attention_file,
    heads_for_file,
    image_of,
    top_heads,
)
from localization_heads.store.attention_files import load_attention
from localization_heads.store.paths import side_path

log = logging.getLogger(__name__)


def show_file(options: VisualizeOptions, name: str, layer: int | None, head: int | None) -> list[Path]:
    """Draw one attention file: the named head, or its top heads -> the figures written ([] with `save_fig=false`)."""
    path = find_attention_file(name)
    if path != Path(name) and layer is not None and head is not None:
        layer, head = _nearest_head(path, layer, head)
    return _draw_file(options, path, _figure_stem(options, path), layer, head)


def _nearest_head(path: Path, layer: int, head: int) -> tuple[int, int]:
    """The head, with layer and number limited to what the file has, for a file that stands in for another model's.

    The documentation of the published code names L20H5 of LLaVA-1.5-7B, which smaller models lack.
    """
    maps = load_attention(path)
    nearest = Head(min(layer, maps.num_layers - 1), min(head, maps.num_heads - 1))
    if nearest != Head(layer, head):
        log.warning("the model of %s has no %s: showing %s", path, Head(layer, head), nearest)
    return nearest


def show_entries(options: VisualizeOptions) -> tuple[list[Path], list[BadEntry]]:
    """Draw every entry of `data_file` -> the figures, named after the entries' ids, and the entries that failed."""
    if not options.data_file:
        raise UsageError("data_file= is missing: mode=batch needs it")
    file = load_visualization_entries(options.data_file)
    entries, bad = select_range(options, file.entries, file.bad)
    paths: list[Path] = []
    claimed = _ClaimedFigures()
    for entry in entries:
        try:
            named = entry.attention_file
            path = attention_file_of(entry.id) if named is None else find_attention_file(str(named))
            stem = _figure_stem(options, path).with_name(entry.id)
            claimed.claim(entry, path, _figure_path(stem, entry.layer, entry.head))
            paths += _draw_file(options, path, stem, entry.layer, entry.head)
        except (UsageError, WorkError) as error:
            bad.append(BadEntry(entry.line, entry.id, str(error)))
    return paths, sorted(bad, key=lambda failure: failure.line)


def _figure_stem(options: VisualizeOptions, path: Path) -> Path:
    """Path and beginning of the figures' names: in `output_dir`, or next to the attention file."""
    stem = side_path(path, "")
    return Path(options.output_dir) / stem.name if options.output_dir else stem


def _figure_path(stem: Path, layer: int | None, head: int | None) -> Path:
    """`<stem>_visualization.png`, or `<stem>_visualization_L14H24.png` for a named head."""
    suffix = "" if layer is None or head is None else f"_{Head(layer, head)}"
    return stem.with_name(f"{stem.name}_visualization{suffix}.png")


class _ClaimedFigures:
    """The figures of the entries so far, so that none is written twice."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[Path, int]] = {}
        self._figures: dict[str, int] = {}

    def claim(self, entry: VisualizationEntry, path: Path, figure: Path) -> None:
        """UsageError if an earlier entry has the same figure, or the same id for another attention file."""
        stem = str(figure.with_name(entry.id)).casefold()
        other, line = self._files.setdefault(stem, (path, entry.line))
        if other != path:
            raise UsageError(f"its figures would write over those of line {line}: give it an id of its own")
        line = self._figures.setdefault(str(figure).casefold(), entry.line)
        if line != entry.line:
            raise UsageError(f"its figure is that of line {line} already")


def _draw_file(options: VisualizeOptions, path: Path, stem: Path, layer: int | None, head: int | None) -> list[Path]:
    """Draw one attention file -> the figures written. A named head is drawn without a box."""
    from localization_heads import figures

    if (layer is None) != (head is None):
        raise UsageError("layer= and head= go together: name both, or neither for the top heads")
    maps = load_attention(path)
    check_criteria(options.criteria, maps.num_layers)
    statistics = head_statistics(maps.attention, options.criteria)
    if layer is not None and head is not None:
        shown, grounding = [Head(layer, head)], None
        check_heads(shown, maps.num_layers, maps.num_heads, f"layer={layer} head={head}")
    else:
        shown, grounding = _top_heads_and_box(options, path, maps, statistics)
    image = image_of(maps, options.allow_private_addresses)
    paths = [_figure_path(stem, layer, head)]
    target = paths[0] if options.save_fig else None
    drawn = [figures.plot_top_maps(image, maps, shown, target, grounding=grounding, statistics=statistics)]
    if options.show_components:
        for one in shown:
            paths.append(stem.with_name(f"{stem.name}_components_{one}.png"))
            target = paths[-1] if options.save_fig else None
            labels = label_components(binarise(maps.attention[one], options.criteria))
            entropy = float(statistics.spatial_entropy[one])
            drawn.append(figures.plot_components(image, maps, one, labels, entropy, target))
    if options.show_plot:
        for figure in drawn:
            figures.show(figure)
    return paths if options.save_fig else []


def _top_heads_and_box(
    options: VisualizeOptions, path: Path, maps: AttentionMaps, statistics: HeadStatistics
) -> tuple[list[Head], Grounding]:
    """The heads to show, and the box of the first `k`: heads known for the model, else the sample's own."""
    chosen = heads_for_file("auto", options.k, maps, path)
    grounder = Grounder(chosen or (), options.criteria, options.grounding, k=options.k)
    check_heads(grounder.heads, maps.num_layers, maps.num_heads)
    grounding = grounder.ground(maps, None, statistics)
    return top_heads(grounding.heads, statistics, options.criteria, options.top_k), grounding
