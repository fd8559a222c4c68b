"""`Run`: the options of one run, and the objects that they name: model, heads, segmenter, calibration.

Each object is created on first use and then kept.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from localization_heads.data.address import Address, image_source
from localization_heads.data.sources import Together
from localization_heads.errors import UsageError
from localization_heads.grounder import Grounder, choose_calibration, make_segmenter
from localization_heads.grounding.confidence import Calibration
from localization_heads.grounding.ground import MIN_INSTANCE_MASS, MIN_INSTANCE_MASS_OF_PLACES
from localization_heads.head_choice import choose_heads, heads_found_with, heads_source
from localization_heads.heads.head import Head, check_heads
from localization_heads.heads.ranking import rank_heads
from localization_heads.heads.ready import NATIVE_BOX, FoundWith, ReadyHeads, choose_ready, ready_lists
from localization_heads.heads.record import HeadRanking
from localization_heads.lvlm.answers.box_formats import BOX
from localization_heads.lvlm.checkpoints.spec import compose_spec, find_spec
from localization_heads.lvlm.extra_prompts import (
    ExtraPrompts,
    extra_prompts_for,
    measures_sensitivity,
)
from localization_heads.lvlm.vocabulary import singularize_unknown_words
from localization_heads.options.finder_mixins import PLACE_PARAPHRASES
from localization_heads.options.groups import SAMS, ModelSpec, SegmenterOptions
from localization_heads.options.programs import ChatOptions, DemoOptions, FinderOptions
from localization_heads.options.shared import ImageAddresses, ModelUse
from localization_heads.segmentation.segmenter import Segmenter
from localization_heads.store.paths import attention_path

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from localization_heads.lvlm.model import LVLM
    from localization_heads.store.statistics import StatisticsRows

log = logging.getLogger(__name__)

AUTO_BATCH_SIZE = 16
"""Samples in a chunk with `batch_size=auto`. A chunk that does not fit into memory goes through in parts."""
SMALL_MODEL = 50_000_000
"""Parameters of a model that runs best on one thread."""

Chosen = TypeVar("Chosen", bound=ModelUse)


@dataclass(frozen=True)
class ModelRun(Generic[Chosen]):
    """A run of a program that uses a model.

    Args:
        model_choice: name of the model's file in `config/model/`.
        overrides: the user's command line; None if it is not known.
        before_model: called before the model is loaded, which takes seconds.
    """

    options: Chosen
    model_choice: str = "tiny"
    overrides: Sequence[str] | None = None
    before_model: Callable[[Any], None] | None = None

    @cached_property
    def spec(self) -> ModelSpec:
        return compose_spec(self.options.model, self.model_choice, self.overrides)

    def is_given(self, *names: str) -> bool:
        """Whether the command line sets one of these options; False if it is not known."""
        return any(word.partition("=")[0] in names for word in self.overrides or ())

    @cached_property
    def folder(self) -> Path:
        """The output folder of this model."""
        return Path(self.options.output_dir) / self.spec.folder

    def resolve_image(self, name: object) -> Address | str:
        """The path or address of an image, checked but not loaded."""
        options = self.options
        private = isinstance(options, ImageAddresses) and options.allow_private_addresses
        return image_source(str(name), allow_private=private)

    def resolve_images(self, names: str | Sequence[str]) -> Address | str | Together:
        """The same for one image, or for several that share one prompt."""
        if isinstance(names, str):
            return self.resolve_image(names)
        return Together([self.resolve_image(name) for name in names])

    @property
    def attention_folder(self) -> Path:
        return self.folder / "attention"

    @cached_property
    def segmenter(self) -> Segmenter | None:
        """The segmenter of `segmenter=`; None keeps the pseudo-masks of the maps."""
        return self.load_segmenter(self.options.segmenter)

    def load_segmenter(self, options: SegmenterOptions) -> Segmenter | None:
        """Load a segmenter, by default on the run's device. Raises what `make_segmenter` does."""
        if options.kind in SAMS and options.device is None:
            options = replace(options, device=self.options.device)
        return make_segmenter(options)

    def grounder(self, heads: Sequence[Head] | None, calibration: Calibration | None = None) -> Grounder:
        """What turns maps into boxes and masks, as the options ask.

        Args:
            heads: None lets each sample pick its own `k` heads.
            calibration: from `calibration_for`; without it, no object is reported absent.
        """
        options = self.options
        return Grounder(
            tuple(heads or ()),
            options.criteria,
            options.grounding,
            self.segmenter,
            options.k,
            calibration,
            options.abstain,
            MIN_INSTANCE_MASS_OF_PLACES if self.prompt_templates is PLACE_PARAPHRASES else MIN_INSTANCE_MASS,
            isinstance(options, FinderOptions) and options.instances_by == "segmenter",
        )

    def recipe(self, heads: Sequence[Head] | None, lvlm: LVLM | None = None) -> dict[str, Any]:
        """Everything that the confidence signals of a grounding depend on, by name."""
        lvlm, options = lvlm or self.lvlm, self.options
        zoom = isinstance(options, FinderOptions) and options.zoom
        # A box that comes from the map does not depend on the segmenter, which need not be loaded then.
        segmenter = None if options.grounding.box_from == "map" else self.segmenter
        grounder = Grounder(tuple(heads or ()), options.criteria, options.grounding, segmenter, options.k)
        return grounder.recipe({**lvlm.choices, **lvlm.asked}, signals=options.signals, zoom=zoom)

    def calibration_for(self, heads: Sequence[Head] | None, lvlm: LVLM | None = None) -> Calibration | None:
        """The calibration of `calibration=` for these heads; None if there is none.

        Args:
            lvlm: the model, if it is used with another prompt than the run's.

        Raises:
            UsageError: the named calibration does not fit, or there is none and `abstain` needs one.
        """
        options = self.options
        note = (lvlm or self.lvlm).note
        calibration = choose_calibration(options.calibration, self.folder, self.recipe(heads, lvlm), note)
        if calibration is None and options.abstain is not None:
            raise UsageError(
                f"abstain={options.abstain:g} needs a calibration of these heads and this recipe: run "
                "stage=calibrate with the same options on entries with truth first"
            )
        return calibration

    def extra_prompts(
        self,
        heads: Sequence[Head] | None,
        calibration: Calibration | None = None,
        *,
        every_head: bool = False,
    ) -> ExtraPrompts:
        """The prompts asked in addition to each expression that these heads ground.

        Args:
            calibration: the signals that it weighs are asked for as well.
            every_head: keep the maps of all heads for the extra prompts, not only of `heads`.
        """
        options = self.options
        signals = options.signals or (calibration is not None and calibration.needs_model_signals)
        return extra_prompts_for(
            options.grounding.contrast, heads, options.criteria, signals=signals, every_head=every_head
        )

    def needs_model(self, heads: Sequence[Head] | None, calibration: Calibration | None) -> bool:
        """Whether a box and its confidence need more than the maps in an attention file."""
        return bool(self.extra_prompts(heads, calibration)) or self.options.query_token == "last_and_answer"

    @property
    def uses_workers(self) -> bool:
        """Whether workers run the model over the data set (`engine=ray`) instead of this process."""
        return False

    @property
    def prompt_templates(self) -> Sequence[str] | None:
        """The templates that each expression is put into; None uses the bare expression."""
        return self.options.paraphrases

    @cached_property
    def lvlm(self) -> LVLM:
        """The model. It is loaded on the CPU if workers run it, since the GPUs are theirs."""
        if self.before_model:
            self.before_model(self)
        import torch

        from localization_heads.lvlm.checkpoints.loading import load_model

        torch.manual_seed(self.options.random_seed)
        started = time.monotonic()
        lvlm = load_model(
            replace(self.spec, device_map=None) if self.uses_workers else self.spec,
            device="cpu" if self.uses_workers else self.options.device,
            conv_mode=self.options.conv_mode,
            query_token=self.options.query_token,
            view=self.options.view,
            drop_lone_spaces=self.options.drop_lone_spaces,
            answer_tokens=self.options.answer_tokens,
            paraphrases=self.prompt_templates,
            answer_span=self.options.answer_span,
        )
        if threads := self.options.num_threads or small_model_threads(lvlm.num_parameters):
            torch.set_num_threads(threads)
        log.info("%s loaded on %s in %.1f s", lvlm, lvlm.device, time.monotonic() - started)
        return lvlm

    @property
    def model_settings(self) -> dict[str, Any]:
        """Everything but the sample that its maps depend on, as JSON values."""
        lvlm = self.lvlm
        return {
            "weights": [lvlm.name, lvlm.fingerprint, self.spec.dtype, self.spec.quantization],
            "kernel": lvlm.spec.attn_implementation,
            "pad_to_square": lvlm.spec.pad_to_square,
            "drop_lone_spaces": self.options.drop_lone_spaces,
            "question": [lvlm.conv_mode, lvlm.system, lvlm.query_token, lvlm.view],
            **lvlm.extra_settings,
        }

    @cached_property
    def named_heads(self) -> tuple[Head, ...] | None:
        """The heads of `heads=`, the best first; None if each sample picks its own."""
        return choose_heads(self.options.heads, self.options.k, self.spec.name, self.folder, self.ready_heads)

    @cached_property
    def ready_heads(self) -> ReadyHeads:
        """The known heads that `heads=auto` uses, chosen by the options alone, before the model is loaded."""
        options, spec = self.options, self.spec
        known = spec if spec.heads or spec.lists else find_spec(spec.name)
        asks_for_box = options.query_token == "answer_span" and options.answer_span == BOX
        conv_mode = NATIVE_BOX if asks_for_box else options.conv_mode or spec.conv_mode
        if isinstance(options, ChatOptions):
            conv_mode = None  # /ground uses the prompt that the heads were found with
        return choose_ready(known.heads, known.lists, conv_mode, options.query_token)

    @property
    def heads_from(self) -> str | None:
        """The ready list that the heads of `heads=` are from, with its source; None for other heads."""
        heads = self.options.heads
        if heads == "auto":
            return str(self.ready_heads.of) if self.ready_heads.of else None
        return str(ready_lists()[heads]) if isinstance(heads, str) and heads in ready_lists() else None

    @cached_property
    def heads_source(self) -> Path | str | None:
        """The heads.json of `heads=`, a local file or one on the hub; None for heads from elsewhere."""
        return heads_source(self.options.heads, self.spec.name, self.folder, self.ready_heads)

    @property
    def heads_found_with(self) -> FoundWith | None:
        """The conditions under which the heads of `heads=` were found; None if they are not known."""
        return heads_found_with(self.options.heads, self.spec.name, self.folder, self.ready_heads)

    def note_head_conditions(self) -> None:
        """Log a note if the heads were found with other weights, another prompt or another query token."""
        self.lvlm.warn_of_other_conditions(f"heads={self.heads_source or self.options.heads}", self.heads_found_with)

    def check_named_heads(self) -> None:
        """UsageError if the model lacks one of the heads; a log note if they were found under other conditions."""
        check_heads(self.named_heads or (), self.lvlm.num_layers, self.lvlm.num_heads)
        self.note_head_conditions()


@dataclass(frozen=True)
class Run(ModelRun[FinderOptions]):
    """A run of the finder."""

    @property
    def prompt_templates(self) -> Sequence[str] | None:
        return PLACE_PARAPHRASES if self.options.instances_by == "places" else self.options.paraphrases

    def grounder(self, heads: Sequence[Head] | None, calibration: Calibration | None = None) -> Grounder:
        grounder = super().grounder(heads, calibration)
        return replace(grounder, each_image=self.options.image_boxes == "each")

    def query_for(self, expression: str) -> str:
        """The expression as the model is asked it: with `instances=all`, unknown plurals are put into the singular."""
        if self.options.instances == "one":
            return expression
        return singularize_unknown_words(self.lvlm.processor.tokenizer, expression)

    @property
    def batch_size(self) -> int:
        """Samples in a chunk."""
        return AUTO_BATCH_SIZE if self.options.batch_size == "auto" else self.options.batch_size

    @property
    def frames_per_clip(self) -> int | None:
        """Frames per prompt with `video=native`; None gives every frame a prompt of its own."""
        return self.options.frames_per_prompt if self.options.video == "native" else None

    def check_clips(self) -> None:
        """UsageError if `video=native` does not work with this model, or with picking heads by sensitivity."""
        if self.frames_per_clip:
            from localization_heads.lvlm.clips import check_supports_clips

            check_supports_clips(self.lvlm.model.config)
            if not self.named_heads and measures_sensitivity(self.options.criteria):
                raise UsageError(
                    "video=native: sensitivity cannot pick the heads of clips, which are asked about one "
                    "expression only: name heads=, or write criteria.sensitivity=none"
                )

    @property
    def model_settings(self) -> dict[str, Any]:
        if not self.frames_per_clip:
            return super().model_settings
        videos = self.lvlm.video_settings()
        return {
            **super().model_settings,
            "clip": self.frames_per_clip,
            **({"videos": videos} if videos else {}),
        }

    def recipe(self, heads: Sequence[Head] | None, lvlm: LVLM | None = None) -> dict[str, Any]:
        return {
            **super().recipe(heads, lvlm),
            **({"clip": self.frames_per_clip} if self.frames_per_clip else {}),
        }

    @property
    def top_n(self) -> int:
        """Heads marked in each sample: the option, else the default of the model."""
        return self.options.top_n or self.spec.top_n

    @property
    def uses_workers(self) -> bool:
        return self.options.engine.kind == "ray"

    def rank_heads(self, rows: StatisticsRows, model: str, draws: NDArray[np.int64] | None = None) -> HeadRanking:
        """Rank the heads over the samples of `rows`, as the options ask (`heads.ranking.rank_heads`)."""
        return rank_heads(
            rows.attention_sum,
            rows.spatial_entropy(self.options.criteria.entropy),
            bottom_row=rows.bottom_row_focus,
            draws=draws,
            options=self.options.criteria,
            top_n=self.top_n,
            num_trials=self.options.num_trials,
            num_samples=self.options.num_samples,
            seed=self.options.random_seed,
            model=model,
        )

    def draw(self, plot: Callable[..., Figure], *inputs: object, path: Path, **named: object) -> Path:
        """Draw a figure, unless the file already shows the same inputs -> its path. With `show_plot`, show it too.

        Args:
            path: of the figure; its suffix is replaced by `figure_format`.
        """
        from localization_heads import figures

        show, path = self.options.show_plot, path.with_suffix(f".{self.options.figure_format}")
        figure = figures.plot_once(plot, *inputs, path=path, always=show, **named)
        if figure and show:
            figures.show(figure)
        return path

    def attention_file(self, id: str) -> Path:
        """The attention file of the entry with that id."""
        return attention_path(self.attention_folder, id, self.options.attention_format)

    @property
    def num_figures(self) -> int | None:
        """The largest number of entries that get a figure; None for no limit."""
        return self.options.visualize_limit if self.options.visualize_batch else 0


ChatRun = ModelRun[ChatOptions]
DemoRun = ModelRun[DemoOptions]


def small_model_threads(num_parameters: int) -> int | None:
    """One thread for a small model, None (torch's default) for others or if `OMP_NUM_THREADS` is set.

    The threads of a small layer mostly wait for each other, which made the embedded model twenty times slower on a
    busy machine.
    """
    return 1 if num_parameters < SMALL_MODEL and "OMP_NUM_THREADS" not in os.environ else None
