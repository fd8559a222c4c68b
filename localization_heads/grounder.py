"""`Grounder`: heads, criteria, read-out and segmenter put together, from attention maps to box and mask (Sec. 5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from localization_heads.attention import AttentionMaps, Box
from localization_heads.data.sources import PromptImages, image_at
from localization_heads.errors import UsageError, shown
from localization_heads.grounding.boxes import apply_second_look, box_of_cells, non_maximum_suppression
from localization_heads.grounding.confidence import (
    Calibration,
    add_confidence,
    apply_abstention,
    signals,
    single_head_boxes,
)
from localization_heads.grounding.ground import MIN_INSTANCE_MASS, Grounding, ground_instances, ground_maps
from localization_heads.grounding.maps import image_shares
from localization_heads.grounding.proposals import select_proposals
from localization_heads.heads.criteria import HeadStatistics, head_statistics
from localization_heads.heads.head import Head
from localization_heads.heads.one_sample import pick_own_heads
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

if TYPE_CHECKING:
    from PIL import Image

CALIBRATION = "calibration.json"
"""Name of the file in the model's folder."""
MAX_CALIBRATION_BYTES = 1 << 20


@dataclass(frozen=True)
class Grounder:
    """Turns attention maps into boxes and masks (Sec. 5).

    Args:
        heads: whose maps are summed; if empty, each sample picks its own (the paper's "greedy" ablation).
        criteria: what heads must pass if each sample picks its own.
        options: the read-out.
        segmenter: makes the mask; None keeps the pseudo-mask of the maps.
        k: how many heads a sample picks.
        calibration: turns signals into a probability; None keeps the raw signal as confidence.
        abstain: lowest presence (or confidence) that is not reported as absent; None reports nothing as absent.
        least_mass: for all objects: lowest attention of one, as a share of the strongest one's.
        proposes: whether objects come from the segmenter's proposals; it must be a `Proposer` then.
        each_image: of several images in one prompt, each gets a box, not only the one with most of the attention.
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
        """The deepest layer that is needed; None for all layers."""
        return max((layer for layer, _ in self.heads), default=None)

    def extra_prompts(self, *, every_head: bool = False) -> ExtraPrompts:
        """The prompts besides the expression that its read-out and its calibration need.

        Args:
            every_head: the maps of other heads than `heads` are needed, too.
        """
        asks = self.calibration is not None and self.calibration.needs_model_signals
        return extra_prompts_for(self.options.contrast, self.heads, self.criteria, signals=asks, every_head=every_head)

    def ground(
        self,
        maps: AttentionMaps,
        image: PromptImages | None,
        statistics: HeadStatistics | None = None,
        second: Box | None = None,
    ) -> Grounding:
        """The box, mask, heat map and confidence of one sample.

        Args:
            image: that the maps are of; without it there is only the pseudo-mask.
            statistics: of the maps, if they are known already.
            second: the box of a second look, in pixels of the image (`grounding.boxes`).

        Raises:
            NoHeadError: the sample has to pick its own heads, and none passes the criteria.
        """
        if maps.images:
            return self._ground_several_images(maps, image, statistics)[0]
        image = None if image is None else image_at(image, None)
        grounding = ground_maps(maps, self.heads_of(maps, statistics), self.options)
        grounding = apply_second_look(grounding, second)
        refined = self.refine(grounding, image, _entry_name(maps))
        return self.with_confidence(maps, refined, grounding.box)

    def ground_all(
        self, maps: AttentionMaps, image: PromptImages | None, statistics: HeadStatistics | None = None
    ) -> list[Grounding]:
        """A grounding for each object that the expression refers to, by descending score; at least one.

        Each component of the map is an object. If the segmenter proposes objects, these are the proposals that the map
        attends to, and the components that no proposal covers. Duplicates are removed (`non_maximum_suppression`).
        Arguments and errors as of `ground`.
        """
        if maps.images:
            return self._ground_several_images(maps, image, statistics, all_objects=True)
        image = None if image is None else image_at(image, None)
        components = ground_instances(maps, self.heads_of(maps, statistics), self.options, self.least_mass)
        proposed = []
        if self.proposes and isinstance(self.segmenter, Proposer) and image is not None:
            masks = checked_proposals(self.segmenter, image)
            proposed = select_proposals(components[0], masks, self.segmenter.name, self.least_mass)
        covered = np.any([grounding.cells for grounding in proposed], axis=0) if proposed else False
        rest = [component for component in components if not (component.cells & covered).any()]
        groundings = [self.with_confidence(maps, grounding, box_of_cells(grounding)) for grounding in proposed]
        for component in rest:
            refined = self.refine(component, image, _entry_name(maps))
            groundings.append(self.with_confidence(maps, refined, component.box))
        groundings.sort(key=lambda grounding: -grounding.score)
        kept = non_maximum_suppression([grounding.box for grounding in groundings])
        return [groundings[index] for index in kept]

    def _ground_several_images(
        self,
        maps: AttentionMaps,
        images: PromptImages | None,
        statistics: HeadStatistics | None,
        *,
        all_objects: bool = False,
    ) -> list[Grounding]:
        """`ground`, or `ground_all`, in the image of a prompt with several that gets most of the heads' attention.

        Each of the groundings returned has one grounding of every image as `each`.
        """
        heads = self.heads_of(maps, statistics)
        if self.abstain is not None:
            raise UsageError(f"abstain={self.abstain:g}: no calibration is one of several images in a prompt")
        of_one_image = replace(self, heads=tuple(heads), calibration=None)  # calibrations are of single images
        shares = image_shares(maps, heads)
        best = int(np.argmax(shares))
        per_image: list[list[Grounding]] = []
        for index, share in enumerate(shares):
            own_maps = replace(maps.at(index), images=())
            image = None if images is None else image_at(images, index)
            chosen = self.each_image or index == best
            if all_objects and index == best:
                groundings = of_one_image.ground_all(own_maps, image)
            elif chosen:
                groundings = [of_one_image.ground(own_maps, image)]
            else:
                groundings = [ground_maps(own_maps, heads, self.options)]
            facts: dict[str, Any] = {"image_index": index, "image_share": float(share), "chosen": chosen}
            per_image.append([replace(grounding, **facts) for grounding in groundings])
        firsts = [groundings[0] for groundings in per_image]
        before, after = firsts[:best], firsts[best + 1 :]
        return [replace(grounding, each=(*before, grounding, *after)) for grounding in per_image[best]]

    def heads_of(self, maps: AttentionMaps, statistics: HeadStatistics | None = None) -> list[Head]:
        """The heads that ground one sample. Arguments and errors as of `ground`.

        With `criteria=robust` a sample can pick its own only if `maps.others` holds other expressions' maps.
        """
        if self.heads:
            return list(self.heads)
        statistics = statistics or head_statistics(maps.attention, self.criteria)
        sensitivity = measure_sensitivity(maps, None) if measures_sensitivity(self.criteria) else None
        return pick_own_heads(statistics, self.criteria, self.k, sensitivity)

    def refine(self, grounding: Grounding, image: Image.Image | None, name: str = "") -> Grounding:
        """The grounding with the segmenter's mask, and with that mask's box if `box_from` asks for it.

        Args:
            name: of the entry, for log messages.
        """
        return refine(grounding, image, self.segmenter, box_from=self.options.box_from, name=name)

    def with_confidence(self, maps: AttentionMaps, grounding: Grounding, map_box: Box) -> Grounding:
        """The grounding with the heads' own boxes, signals, confidence and presence; `absent` if it abstains.

        Args:
            map_box: the box before segmentation.
        """
        grounding = replace(grounding, own_boxes=single_head_boxes(maps, grounding, self.options))
        if self.options.box_from != "map" and self.segmenter and grounding.mask_overlap is None:
            grounding = replace(grounding, mask_overlap=0.0)  # no positive cell to prompt the segmenter with
        values = signals(maps, grounding, self.options, map_box)
        return apply_abstention(add_confidence(grounding, values, self.calibration), self.abstain)

    def recipe(self, asked: Mapping[str, Any], *, signals: bool = False, zoom: bool = False) -> dict[str, Any]:
        """Everything besides image and expression that the signals of a grounding depend on, as JSON values by name.

        Args:
            asked: the model and its prompt, by name (`LVLM.choices` and `LVLM.asked`).
            signals: there are signals from extra prompts to the model.
            zoom: there is a second look at each box.
        """
        segmenter = self.segmenter if self.options.box_from != "map" else None
        criteria = {} if self.heads else {"k": self.k, **_option_values("criteria", self.criteria)}
        return {
            **asked,
            "heads": [list(head) for head in sorted(self.heads)] or "each image's own",
            **criteria,
            **_option_values("grounding", self.options),
            "segmenter": segmenter.name if segmenter else None,
            "signals": signals,
            "zoom": zoom,
        }


def _entry_name(maps: AttentionMaps) -> str:
    """How log messages name an entry: by its id, or else by its expression."""
    return maps.id or (shown(maps.query) if maps.query else "")


def _option_values(group: str, options: CriteriaOptions | GroundingOptions) -> dict[str, Any]:
    """The options by their full names, without those of sensitivity if it is not used; never `mirrored`.

    Samples that pick their own heads have no mirrored image.
    """
    uses_sensitivity = getattr(options, "sensitivity", "none") != "none"
    unused = {"mirrored"} if uses_sensitivity else SensitivityOptions.__pydantic_fields__
    return {f"{group}.{name}": value for name, value in asdict(options).items() if name not in unused}


def make_segmenter(options: SegmenterOptions) -> Segmenter | None:
    """The segmenter, with its weights loaded; None for `kind="none"`.

    Raises:
        UsageError: an extra is missing, or there is no such model.
        WorkError: the weights cannot be downloaded or read.
    """
    if options.kind == "none":
        return None
    if options.kind == "grabcut":
        from localization_heads.segmentation.grabcut import GrabCut

        return GrabCut(options.iterations)
    from localization_heads.segmentation.sam import load_sam

    return load_sam(options)


def choose_calibration(
    choice: str, folder: Path, recipe: Mapping[str, Any], note: Callable[[str], None]
) -> Calibration | None:
    """The calibration that `calibration=` asks for; None if there is none.

    Args:
        choice: `auto`, `none` or the path of a calibration.json.
        folder: of the model's results; `auto` takes the calibration.json in it if it fits.
        recipe: `Grounder.recipe` of this run.
        note: called with the reason if `auto` rejects the one in the folder.

    Raises:
        UsageError: a path was given, and the file cannot be read or does not fit.
    """
    if choice == "none":
        return None
    path = folder / CALIBRATION if choice == "auto" else Path(choice)
    if choice == "auto" and not path.is_file():
        return None
    try:
        calibration = load_calibration(path)
        calibration.check(recipe, path)
    except UsageError as error:
        if choice != "auto":
            raise
        note(f"the confidence is not calibrated: {error}")
        return None
    return calibration


def load_calibration(path: str | Path, option: str = "calibration") -> Calibration:
    """Read a `calibration.json`. UsageError, naming the option and the file, for anything else."""
    if not Path(path).is_file():
        raise UsageError(
            f"{option}={path}: there is no such file; stage=calibrate writes a calibration.json into the model's folder"
        )
    try:
        return Calibration.from_json(read_json(Path(path), MAX_CALIBRATION_BYTES))
    except UsageError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise UsageError(f"{option}={path}: {reason}") from error
