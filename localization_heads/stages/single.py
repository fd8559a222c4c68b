"""The stages for one image and one expression: `collect`, `analyze`, `visualize`, and all three as `pipeline`."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from localization_heads.attention import AttentionMaps, Box
from localization_heads.data.address import image_source
from localization_heads.data.images import load_image
from localization_heads.data.samples import Sample
from localization_heads.data.sources import PromptImages, Together, image_at, images_of, load_prompt_images
from localization_heads.errors import UsageError, WorkError
from localization_heads.grounder import Grounder
from localization_heads.grounding.ground import Grounding
from localization_heads.head_choice import choose_heads, heads_found_with
from localization_heads.heads.criteria import HeadStatistics, check_criteria, head_statistics
from localization_heads.heads.head import Head, check_heads
from localization_heads.heads.one_sample import analysis_rows, greedy_heads
from localization_heads.heads.ready import NONE_READY, choose_ready, mismatch_warning
from localization_heads.lvlm.checkpoints.spec import find_spec
from localization_heads.lvlm.extra_prompts import NO_EXTRA_PROMPTS, ExtraPrompts, measures_sensitivity
from localization_heads.lvlm.vocabulary import warn_of_unknown_words
from localization_heads.options.groups import CriteriaOptions
from localization_heads.stages.entries import Entries
from localization_heads.stages.run import Run
from localization_heads.store.attention_files import (
    load_analysis,
    load_attention,
    save_analysis,
    save_attention,
)
from localization_heads.store.files import writable_folder
from localization_heads.store.paths import ATTENTION_FORMATS, analysis_path, side_path

if TYPE_CHECKING:
    from PIL import Image


log = logging.getLogger(__name__)

SomeImage = TypeVar("SomeImage")
DEFAULT_OUTPUT_DIR = Path("outputs/localization_heads")
"""Holds a folder for each model."""


@dataclass(frozen=True)
class CollectResult:
    image: PromptImages
    maps: AttentionMaps
    path: Path
    answer: str | None


@dataclass(frozen=True)
class AnalyzeResult:
    maps: AttentionMaps
    statistics: HeadStatistics
    rows: list[dict[str, Any]]
    path: Path


@dataclass(frozen=True)
class VisualizeResult:
    grounding: Grounding
    paths: list[Path]


def collect(run: Run, extra_prompts: ExtraPrompts = NO_EXTRA_PROMPTS) -> CollectResult:
    """Write the attention of every head for one image and one expression to `attention/<id>.pkl`.

    Args:
        extra_prompts: asked in addition; their maps are returned but not written.
    """
    run.options.require("image_file", "query")
    source, query = run.resolve_images(run.options.image_file or ""), str(run.options.query)
    id = image_id(run, source, query)
    path = run.attention_file(id)
    image = load_prompt_images(source)
    writable_folder(run.attention_folder)  # fail before the model runs
    warn_of_unknown_words(run.lvlm, [query])
    maps = run.lvlm.attend(image, query, extra_prompts=extra_prompts)
    maps = maps.named(id=id, image_file=Sample(source, query).at(maps.image_index).image_file)
    save_attention(maps, path, run.options.attention_format)
    analysis_path(path).unlink(missing_ok=True)  # it may belong to an earlier file of this name
    return CollectResult(image, maps, path, _generate_answer(run, image))


def analyze(run: Run) -> AnalyzeResult:
    """Write attention sum, spatial entropy and components of every head of a file to `<id>_analysis.pkl`."""
    run.options.require("attention_file")
    path = find_attention_file(str(run.options.attention_file))
    return analyse_file(run, load_attention(path), path)


def analyse_file(run: Run, maps: AttentionMaps, path: Path, *, replace: bool = True) -> AnalyzeResult:
    """Analyse the maps and write the analysis; without `replace`, a valid one on disk is left as it is."""
    check_criteria(run.options.criteria, maps.num_layers)
    statistics = head_statistics(maps.attention, run.options.criteria)
    rows = analysis_rows(statistics, run.options.criteria)
    if replace or not _is_analysis(analysis_path(path)):
        save_analysis(rows, analysis_path(path))
    return AnalyzeResult(maps, statistics, rows, analysis_path(path))


def _is_analysis(path: Path) -> bool:
    try:
        load_analysis(path)
    except (UsageError, WorkError):
        return False
    return True


def visualize(run: Run) -> VisualizeResult:
    """Draw the image of a file, the maps of its top heads, and the combined map with its box."""
    run.options.require("attention_file")
    path = find_attention_file(str(run.options.attention_file))
    analysed = analyse_file(run, load_attention(path), path, replace=False)
    if run.options.grounding.contrast != "none":
        log.warning("grounding.contrast: the file has no maps of other expressions, and is read without")
    if run.options.heads == "greedy" and measures_sensitivity(run.options.criteria):
        log.warning("heads=greedy: the file has no maps of other expressions: picked by the paper's two criteria")
    heads = heads_for_file(run.options.heads, run.options.k, analysed.maps, path)
    image = image_of(analysed.maps, run.options.allow_private_addresses)
    return draw_sample(run, run.grounder(heads), analysed.maps, analysed.statistics, path, image)


def heads_for_file(heads_option: Any, k: int, maps: AttentionMaps, path: Path) -> tuple[Head, ...] | None:
    """The heads of `heads=` for an attention file; None if the sample picks its own.

    The file may come from another model than `model=`, so `heads=auto` uses the heads known for the file's model, if
    they were found under the conditions that the file records. Other heads found under other conditions are noted.
    """
    ready, conditions, folder = NONE_READY, maps.asked or {}, path.parent.parent
    if maps.model:
        spec = find_spec(maps.model)
        ready = choose_ready(spec.heads, spec.lists, conditions.get("conv_mode"), conditions.get("query_token"))
    heads = choose_heads(heads_option, k, maps.model, folder, ready)
    found_with = heads_found_with(heads_option, maps.model, folder, ready)
    if note := mismatch_warning(f"heads={heads_option}", found_with, maps.asked):
        log.warning("%s", note)
    return heads


def pipeline(run: Run) -> tuple[CollectResult, AnalyzeResult, VisualizeResult]:
    """Run `collect`, `analyze` and `visualize` in turn, down to the grounded box."""
    run.options.require("image_file", "query")
    run.check_named_heads()
    calibration = run.calibration_for(run.named_heads)  # fail before the model runs if it does not fit
    collected = collect(run, run.extra_prompts(run.named_heads, calibration, every_head=True))
    analysed = analyse_file(run, collected.maps, collected.path)
    maps, path, image = collected.maps, collected.path, collected.image
    grounder = run.grounder(run.named_heads, calibration)
    drawn = draw_sample(run, grounder, maps, analysed.statistics, path, image)
    return collected, analysed, drawn


def attend_again(run: Run, entries: Entries, grounder: Grounder, sample: Sample, maps: AttentionMaps) -> AttentionMaps:
    """Run the model again for what an attention file lacks, such as extra prompts, now that the heads are known.

    The maps of the file are kept, unless the prompt shows several images: a file holds the maps of only one.
    """
    # The report also reads heads other than the grounder's.
    extra_prompts = run.extra_prompts(grounder.heads, grounder.calibration, every_head=True)
    attended = run.lvlm.attend(
        entries.images.load(sample, keep=True),
        sample.expression,
        last_layer=grounder.last_layer,
        extra_prompts=extra_prompts,
        siblings=entries.siblings(sample),
    )
    attention = attended.attention if attended.images else maps.attention
    return replace(attended, attention=attention, id=maps.id, image_file=maps.image_file)


def draw_sample(
    run: Run,
    grounder: Grounder,
    maps: AttentionMaps,
    statistics: HeadStatistics,
    path: Path,
    image: PromptImages | None,
    *,
    truth: Box | None = None,
) -> VisualizeResult:
    """Ground one sample and draw it: `<id>_visualization.png` and `<id>_grounding.png`."""
    from localization_heads import figures

    check_heads(grounder.heads, maps.num_layers, maps.num_heads)
    grounding = grounder.ground(maps, image, statistics)
    if grounding.image_index != maps.image_index:
        # The maps are of the image that most heads attend to, but the grounding heads attend to another one.
        maps = maps.at(grounding.image_index)
        statistics = head_statistics(maps.attention, run.options.criteria)
    prompt_images, image = image, None if image is None else image_at(image, grounding.image_index)
    top = top_heads(grounding.heads, statistics, run.options.criteria, run.options.top_k)
    maps_path, box_path = side_path(path, "_visualization.png"), side_path(path, "_grounding.png")
    options: dict[str, Any] = {"grounding": grounding, "statistics": statistics, "truth": truth}
    drawn = [run.draw(figures.plot_top_maps, image, maps, top, path=maps_path, **options)]
    if grounding.each:
        images, each = images_of(prompt_images) if prompt_images else None, grounding.each
        figure = run.draw(figures.plot_together, images, each, path=box_path, expression=maps.query)
        return VisualizeResult(grounding, [*drawn, figure])
    options = {"truth": truth, "expression": maps.query}
    drawn.append(run.draw(figures.plot_grounding, image, grounding, path=box_path, **options))
    return VisualizeResult(grounding, drawn)


def top_heads(chosen: Sequence[Head], statistics: HeadStatistics, criteria: CriteriaOptions, top_k: int) -> list[Head]:
    """The heads that make the box, filled up to `top_k` with the best other heads of the sample."""
    spare = greedy_heads(statistics, criteria, top_k + len(chosen))
    return [*chosen, *(head for head in spare if head not in chosen)][:top_k]


def image_of(maps: AttentionMaps, allow_private_addresses: bool) -> Image.Image | None:
    """The image that the maps were made from, or None with a warning if it cannot be loaded any more.

    An attention file may come from a stranger, so by default an address in it may not point into a private network.
    """
    if not maps.image_file:
        return None
    source = image_source(maps.image_file, allow_private=allow_private_addresses)
    return image_or_none(partial(load_image, source))


def image_or_none(load: Callable[[], SomeImage]) -> SomeImage | None:
    """The image, or None with a warning if it cannot be loaded any more."""
    try:
        return load()
    except (UsageError, WorkError) as error:
        log.warning("drawing without the image: %s", error)
        return None


def find_attention_file(name: str) -> Path:
    """The file with that name, or else the only one with that name in another model's folder.

    A path from the published code, such as `outputs/.../llava/attention/x.pkl`, works with any model.

    Raises:
        UsageError: there is no such file, or there are several.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.parent.name == "attention":
        candidates = sorted(path.parent.parent.parent.glob(f"*/attention/{escape(path.name)}"))
        if len(candidates) == 1:
            log.warning("there is no %s: taking %s", path, candidates[0])
            return candidates[0]
        if candidates:
            raise UsageError(f"attention_file={name}: there is no such file; {_name_one_of(candidates)}")
    raise UsageError(f"attention_file={name}: there is no such file; stage=collect or stage=batch writes them")


def attention_file_of(id: str) -> Path:
    """The attention file with that id, of any model. UsageError if there is none, or there are several."""
    suffixes = set(ATTENTION_FORMATS.values())  # some formats share one
    paths = [path for suffix in suffixes for path in DEFAULT_OUTPUT_DIR.glob(f"*/attention/{escape(id)}{suffix}")]
    if len(paths) == 1:
        return paths[0]
    if paths:
        raise UsageError(f"names no attention_file; {_name_one_of(sorted(paths))}")
    raise UsageError(f"names no attention_file, and there is no {DEFAULT_OUTPUT_DIR}/*/attention/{id}.pkl")


def _name_one_of(paths: Sequence[Path]) -> str:
    return f"name one of {', '.join(map(str, paths[:5]))}"


def image_id(run: Run, image: object, query: str) -> str:
    """The id that the files of one prompt are named after: `save_id`, else the `default_id` of its image or images."""
    if isinstance(image, Together):
        image = "-".join(Path(str(one).split("?")[0]).stem for one in image) + ".png"
    return str(run.options.save_id or default_id(str(image), query))


def default_id(image_file: str, query: str) -> str:
    """An id made of the image's name and the words of the query, such as `cat_the-dog-on-the-left`."""
    stem = Path(image_file.split("?")[0]).stem
    words = "-".join(re.findall(r"\w+", query.lower()))
    name = re.sub(r"[^\w.-]+", "-", f"{stem}_{words}").strip("-._")
    return name.encode()[:100].decode(errors="ignore") or "sample"


def _generate_answer(run: Run, images: PromptImages) -> str | None:
    """The model's answer to the query; None without `max_new_tokens`."""
    if not run.options.max_new_tokens:
        return None
    from localization_heads.lvlm.conversation import stream

    prompt = run.lvlm.with_num_images(len(images_of(images))).prompt(str(run.options.query))
    pieces = stream(run.lvlm, images, prompt, run.options.max_new_tokens)
    return "".join(pieces).strip()
