"""What turns maps into a box and a mask: heads, criteria, read-out and segmenter; and which heads those are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from localization_heads.attention import AttentionMaps, Box
from localization_heads.data.sources import PromptImages, image_at
from localization_heads.errors import UsageError, shown
from localization_heads.grounding.boxes import (
    apply_second_look,
    box_of_cells,
    non_maximum_suppression,
    select_proposals,
)
from localization_heads.grounding.confidence import (
    Calibration,
    add_confidence,
    apply_abstention,
    signals,
    single_head_boxes,
)
from localization_heads.grounding.ground import MIN_INSTANCE_MASS, Grounding, ground_instances, ground_maps
from localization_heads.grounding.maps import image_shares
from localization_heads.heads.criteria import HeadStatistics, head_statistics
from localization_heads.heads.head import Head, find_duplicate
from localization_heads.heads.one_sample import pick_own_heads
from localization_heads.heads.ready import NONE_READY, FoundWith, ReadyHeads, ready_lists
from localization_heads.heads.record import HeadRanking
from localization_heads.hub import is_repository, load_heads
from localization_heads.lvlm.extra_prompts import (
    ExtraPrompts,
    extra_prompts_for,
    measure_sensitivity,
    measures_sensitivity,
)
from localization_heads.options.groups import (
    CriteriaOptions,
    GroundingOptions,
    SegmenterOptions,
    SensitivityOptions,
)
from localization_heads.segmentation.segmenter import Proposer, Segmenter, checked_proposals, refine
from localization_heads.store.files import read_json
from localization_heads.store.results import is_ranking, load_head_list, load_ranking

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

CALIBRATION = "calibration.json"
"""Name of the file in the model's folder."""
_LARGEST = 1 << 20  # bytes of a calibration.json


@dataclass(frozen=True)
class Grounder:
    """How maps become a box and a mask (Sec. 5).

    Args:
        heads: whose maps are added; without any, each sample picks its own (the paper's "greedy" ablation).
        criteria: what heads must pass where a sample picks its own.
        options: the read-out.
        segmenter: what makes the mask; None leaves the pseudo-mask of the maps.
        k: how many heads a sample picks.
        calibration: what makes a probability of the confidence; None leaves the raw signal.
        abstain: the least presence (or confidence) of what is there; None takes everything for present.
        least_mass: of all objects, the least attention of one, as a share of the strongest's.
        proposes: whether the segmenter proposes all objects, which must be a `Proposer` then.
        each_image: of several images in one prompt, each gets a box, not only the one that draws most attention.
    """

    heads: tuple[Head, ...]
    criteria: CriteriaOptions
    options: GroundingOptions
    segmenter: Segmenter | None = None
    k: int = 3
    calibration: Calibration | None = None
    abstain: float | None = None
    least_mass: float = MIN_INSTANCE_MASS
    proposes: bool = False
    each_image: bool = False

    @property
    def last_layer(self) -> int | None:
        """The deepest layer that is looked at; None for all."""
        return max((layer for layer, _ in self.heads), default=None)

    def extra_prompts(self, *, every_head: bool = False) -> ExtraPrompts:
        """The prompts that its boxes, and the confidence that they are calibrated for, need besides the expression.

        Args:
            every_head: other heads than these will be read too.
        """
        asks = self.calibration is not None and self.calibration.needs_model_signals
        return extra_prompts_for(
            self.options.contrast, self.heads, self.criteria, signals=asks, every_head=every_head
        )

    def heads_of(self, maps: AttentionMaps, statistics: HeadStatistics | None = None) -> list[Head]:
        """The heads that ground one sample. NoHeadError where it has to pick its own and none passes.

        By sensitivity it can pick them only if `maps.others` holds other expressions' maps.

        Args:
            statistics: of the maps, where they are known already.
        """
        if self.heads:
            return list(self.heads)
        statistics = statistics or head_statistics(maps.attention, self.criteria)
        sensitivity = measure_sensitivity(maps, None) if measures_sensitivity(self.criteria) else None
        return pick_own_heads(statistics, self.criteria, self.k, sensitivity)

    def ground(
        self,
        maps: AttentionMaps,
        image: PromptImages | None,
        statistics: HeadStatistics | None = None,
        second: Box | None = None,
    ) -> Grounding:
        """The box, mask, heat map and confidence of one sample. NoHeadError as of `heads_of`.

        Args:
            image: what the maps are of; without it the mask is that of the maps.
            statistics: of the maps, where they are known already.
            second: the box of a second look, in pixels of the image (`grounding.boxes`).
        """
        if maps.images:
            return self._ground_together(maps, image, statistics)[0]
        image = None if image is None else image_at(image, None)
        found = apply_second_look(ground_maps(maps, self.heads_of(maps, statistics), self.options), second)
        return self.with_confidence(maps, self.refine(found, image, _entry(maps)), found.box)

    def ground_all(
        self, maps: AttentionMaps, image: PromptImages | None, statistics: HeadStatistics | None = None
    ) -> list[Grounding]:
        """A grounding for each object that the expression fits, that of the highest score first; at least one.

        Each component of the map, its mask made by the segmenter, and scored by the map's mass in its box. Of two that
        overlap by more than half only the better one is kept (`non_maximum_suppression`). Where the segmenter proposes
        objects, those of its proposals that the map attends to, and the components that these leave out.
        Arguments and errors as of `ground`.
        """
        if maps.images:
            return self._ground_together(maps, image, statistics, every=True)
        image = None if image is None else image_at(image, None)
        components = ground_instances(maps, self.heads_of(maps, statistics), self.options, self.least_mass)
        found = []
        if self.proposes and isinstance(self.segmenter, Proposer) and image is not None:
            masks = checked_proposals(self.segmenter, image)
            found = select_proposals(components[0], masks, self.segmenter.name, self.least_mass)
        seen = np.any([one.cells for one in found], axis=0) if found else False
        rest = [one for one in components if not (one.cells & seen).any()]
        found = [self.with_confidence(maps, one, box_of_cells(one)) for one in found]
        found += [self.with_confidence(maps, self.refine(one, image, _entry(maps)), one.box) for one in rest]
        found.sort(key=lambda one: -one.score)
        return [found[place] for place in non_maximum_suppression([one.box for one in found])]

    def _ground_together(
        self,
        maps: AttentionMaps,
        shown: PromptImages | None,
        statistics: HeadStatistics | None,
        *,
        every: bool = False,
    ) -> list[Grounding]:
        """`ground` of several images in one prompt, or with `every` `ground_all`: of the one that draws most of the
        heads' attention."""
        heads = self.heads_of(maps, statistics)
        alone, shares, each = self._of_one_image(maps, heads), image_shares(maps, heads), []
        best = int(np.argmax(shares))
        for index, share in enumerate(shares):
            one, chosen = replace(maps.at(index), images=()), self.each_image or index == best
            image = None if shown is None else image_at(shown, index)
            if every and index == best:
                found = alone.ground_all(one, image)
            else:
                found = [alone.ground(one, image) if chosen else ground_maps(one, heads, self.options)]
            named: dict[str, Any] = {"image_index": index, "image_share": float(share), "chosen": chosen}
            each.append([replace(one, **named) for one in found])
        others = [found[0] for found in each]
        return [replace(one, each=(*others[:best], one, *others[best + 1 :])) for one in each[best]]

    def _of_one_image(self, maps: AttentionMaps, heads: Sequence[Head]) -> Grounder:
        """With these heads, and without a calibration, which is of prompts with one image."""
        if self.abstain is not None:
            raise UsageError(f"abstain={self.abstain:g}: no calibration is one of several images in a prompt")
        return replace(self, heads=tuple(heads), calibration=None)

    def with_confidence(self, maps: AttentionMaps, grounding: Grounding, map_box: Box) -> Grounding:
        """The grounding with the own boxes of its heads, signals, confidence and presence; `absent` if it abstains.

        Args:
            map_box: the box before the segmenter was at work.
        """
        grounding = replace(grounding, own_boxes=single_head_boxes(maps, grounding, self.options))
        if self.options.box_from != "map" and self.segmenter and grounding.mask_overlap is None:
            grounding = replace(grounding, mask_overlap=0.0)  # there was nothing to start a mask from
        found = signals(maps, grounding, self.options, map_box)
        return apply_abstention(add_confidence(grounding, found, self.calibration), self.abstain)

    def recipe(
        self, asked: Mapping[str, Any], *, signals: bool = False, zoom: bool = False
    ) -> dict[str, Any]:
        """All that the signals of a grounding depend on besides image and expression, as JSON values by name.

        Args:
            asked: the model and how it is asked, by name (`LVLM.choices` and `LVLM.asked`).
            signals: the model is asked how sure it is.
            zoom: there is a second look at each box.
        """
        masked = self.segmenter if self.options.box_from != "map" else None
        own = {"k": self.k, **_named("criteria", self.criteria)}
        return {
            **asked,
            "heads": [list(head) for head in sorted(self.heads)] or "each image's own",
            **({} if self.heads else own),
            **_named("grounding", self.options),
            "segmenter": masked and masked.name,
            "signals": signals,
            "zoom": zoom,
        }

    def refine(self, grounding: Grounding, image: Image.Image | None, name: str = "") -> Grounding:
        """The grounding with the segmenter's mask, and with that mask's box if `box_from` asks for it.

        Args:
            name: of the entry, for what is said in the log.
        """
        return refine(grounding, image, self.segmenter, box_from=self.options.box_from, name=name)


def _entry(maps: AttentionMaps) -> str:
    """What notes call an entry: its id, or what was asked."""
    return maps.id or (shown(maps.query) if maps.query else "")


def _named(group: str, options: CriteriaOptions | GroundingOptions) -> dict[str, Any]:
    """The third criterion is named only where samples pick their own heads by it; none of them reads `mirrored`."""
    wanted = getattr(options, "sensitivity", "none") != "none"
    third = {"mirrored"} if wanted else SensitivityOptions.__pydantic_fields__
    return {f"{group}.{name}": value for name, value in asdict(options).items() if name not in third}


def load_calibration(path: str | Path, option: str = "calibration") -> Calibration:
    """Read a `calibration.json`. UsageError, naming the option and the file, for anything else."""
    if not Path(path).is_file():
        raise UsageError(
            f"{option}={path}: there is no such file; stage=calibrate writes a calibration.json into the model's folder"
        )
    try:
        return Calibration.from_json(read_json(Path(path), _LARGEST))
    except UsageError as error:
        said = str(error).removeprefix(f"{path}: ")
        raise UsageError(f"{option}={path}: {said}") from error


def choose_calibration(
    wanted: str, folder: Path, recipe: Mapping[str, Any], note: Callable[[str], None]
) -> Calibration | None:
    """What `calibration=` asks for; None where there is none.

    Args:
        wanted: `auto`, `none` or the path of a calibration.json.
        folder: of the model's results; `auto` takes the calibration.json in it if it fits.
        recipe: `Grounder.recipe` of this run.
        note: is told why the one in the folder is not used.

    Raises:
        UsageError: a named one cannot be read, or does not fit.
    """
    if wanted == "none":
        return None
    path = folder / CALIBRATION if wanted == "auto" else Path(wanted)
    if wanted == "auto" and not path.is_file():
        return None
    try:
        found = load_calibration(path)
        found.check(recipe, path)
    except UsageError as error:
        if wanted != "auto":
            raise
        note(f"the confidence is not calibrated: {error}")
        return None
    return found


def choose_heads(
    wanted: Any, k: int, model: str, folder: Path, ready: ReadyHeads | None = None
) -> tuple[Head, ...] | None:
    """The heads that `heads=` asks for, best first, or None where each sample has to pick its own.

    Args:
        wanted: `auto`, `greedy`, a list of names, a heads.json or a hub repository.
        model: whose heads they are.
        folder: of that model's results, with its heads.json.
        ready: what fits of the model's known heads.

    Raises:
        UsageError: a file or a name that cannot be used.
    """
    if wanted == "greedy":
        return None
    if wanted != "auto":
        return resolve_heads(wanted, k)
    known = known_heads(model, folder, k, ready)
    if not known:
        log.warning("no heads are known for %s: each sample picks its own", model)
    elif len(known) < k:
        log.warning("k=%d: only %d heads are known for %s, and these are taken", k, len(known), model)
    return known


def known_heads(model: str, folder: Path, k: int, ready: ReadyHeads | None) -> tuple[Head, ...] | None:
    """What `heads=auto` means: what fits of the model's known heads, else the best of the heads.json in its folder.

    None where neither is there: a heads.json of another model says nothing about this one. A note says why published
    heads are not taken.
    """
    if ready and ready.advice:
        log.warning("heads=auto: %s", ready.advice)
    if ready and ready.heads:
        return ready.heads[:k]
    latest = _latest(model, folder)
    return tuple(head.address for head in latest.kept[:k]) or None if latest else None


def _latest(model: str, folder: Path) -> HeadRanking | None:
    """The heads.json in a model's folder, if it is of this model."""
    path = folder / "heads.json"
    ranking = load_ranking(path) if path.is_file() else None
    return ranking if ranking and ranking.model == model else None


def heads_source(
    wanted: Any, model: str = "", folder: Path | None = None, ready: ReadyHeads = NONE_READY
) -> Path | str | None:
    """The heads.json that `heads=` names, here or on the hub, or that `heads=auto` takes; None for other heads.

    Arguments as of `choose_heads`; only `auto` reads those after the first.
    """
    if isinstance(wanted, str) and wanted.endswith(".json"):
        return Path(wanted) if is_ranking(wanted) else None
    if isinstance(wanted, str) and is_repository(wanted):
        return wanted
    if wanted != "auto" or folder is None or ready.heads:
        return None
    return folder / "heads.json" if _latest(model, folder) else None


def heads_found_with(
    wanted: Any, model: str = "", folder: Path | None = None, ready: ReadyHeads = NONE_READY
) -> FoundWith | None:
    """How the heads of `heads=` were found, None where that is not known. Arguments as of `heads_source`."""
    if (source := heads_source(wanted, model, folder, ready)) is not None:
        return load_heads(source).found_with
    if isinstance(wanted, str) and wanted in ready_lists():
        return ready_lists()[wanted].found_with
    return ready.of.found_with if wanted == "auto" and ready.of else None


def resolve_heads(value: Any, k: int) -> tuple[Head, ...]:
    """Heads from a list such as `[14-24, 14-13]`, from one such name, from a heads.json, or from a ready list."""
    heads = resolve_all_heads(value)
    listed = isinstance(value, str) and (
        value.endswith(".json") or value in ready_lists() or is_repository(value)
    )
    if listed and len(heads) < k:
        raise UsageError(f"k={k}: {value} lists only {len(heads)} heads")
    return heads[:k] if listed else heads


def resolve_all_heads(value: Any) -> tuple[Head, ...]:
    """All heads of a list such as `[14-24, 14-13]`, of one such name, or of a heads.json or repository, best first."""
    if isinstance(value, str) and value.endswith(".json"):
        return tuple(load_head_list(value))
    if isinstance(value, str) and value in ready_lists():
        return ready_lists()[value].heads
    if isinstance(value, str) and is_repository(value):
        return tuple(head.address for head in load_heads(value).kept)
    names = value if isinstance(value, (list, tuple)) else [value]
    try:
        heads = tuple(Head.parse(str(name)) for name in names)
    except ValueError as error:
        raise UsageError(
            f"heads={value}: {error}; or write auto, greedy, the path of a heads.json, a hub repository user/repo, or "
            f"a ready list ({', '.join(ready_lists())})"
        ) from error
    if not heads:
        raise UsageError("heads=[] names no head; write auto, or a list such as [14-24,14-13,14-26]")
    if twice := find_duplicate(heads):
        raise UsageError(f"heads names {twice} twice: name each head once")
    return heads


def check_heads(heads: Sequence[Head], num_layers: int, num_heads: int, option: str = "heads") -> None:
    """Raises UsageError, naming the option, for a head that a model of that shape does not have."""
    for head in heads:
        if not (0 <= head.layer < num_layers and 0 <= head.head < num_heads):
            raise UsageError(
                f"{option}: there is no {head}; the layers are 0 to {num_layers - 1} "
                f"and the heads 0 to {num_heads - 1}"
            )


def make_segmenter(options: SegmenterOptions) -> Segmenter | None:
    """The segmenter, its weights loaded; None for `kind="none"`.

    Raises:
        UsageError: an extra is missing, or there is no such model.
        WorkError: the weights cannot be had or read.
    """
    if options.kind == "none":
        return None
    if options.kind == "grabcut":
        from localization_heads.segmentation.grabcut import GrabCut

        return GrabCut(options.iterations)
    from localization_heads.segmentation.sam import load_sam

    return load_sam(options)
