"""`Run`: the options of one run, with the objects that they stand for, each made once."""

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
from localization_heads.grounder import (
    Grounder,
    check_heads,
    choose_calibration,
    choose_heads,
    found_with_of,
    heads_source,
    make_segmenter,
)
from localization_heads.grounding.confidence import Calibration
from localization_heads.grounding.ground import LEAST_MASS, LEAST_OF_PLACES
from localization_heads.heads.head import Head
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
from localization_heads.options.groups import SAMS, ModelSpec, SegmenterOptions
from localization_heads.options.parts import PLACES
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
    """A run of any program but the viewer.

    Args:
        model_choice: which file of `config/model/` was chosen.
        overrides: the user's command line, None if that is not known.
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
        """Whether the user's command line gives one of these options; False where it is not known."""
        return any(word.partition("=")[0] in names for word in self.overrides or ())

    @cached_property
    def folder(self) -> Path:
        """Where everything of this model is written."""
        return Path(self.options.output_dir) / self.spec.folder

    def resolve_image(self, name: object) -> Address | str:
        """The image of that name, a path or an address, to be loaded."""
        options = self.options
        private = isinstance(options, ImageAddresses) and options.allow_private_addresses
        return image_source(str(name), allow_private=private)

    def resolve_images(self, names: str | Sequence[str]) -> Address | str | Together:
        """The image of that name, or those of several that one prompt shows together."""
        return (
            self.resolve_image(names)
            if isinstance(names, str)
            else Together([self.resolve_image(one) for one in names])
        )

    @property
    def attention_folder(self) -> Path:
        return self.folder / "attention"

    @cached_property
    def segmenter(self) -> Segmenter | None:
        """Loaded on first use; None leaves the pseudo-masks of the maps."""
        return self.load_segmenter(self.options.segmenter)

    def load_segmenter(self, chosen: SegmenterOptions) -> Segmenter | None:
        """Another one, on the run's device. Raises as `make_segmenter`."""
        if chosen.kind in SAMS and chosen.device is None:
            chosen = replace(chosen, device=self.options.device)
        return make_segmenter(chosen)

    def grounder(self, heads: Sequence[Head] | None, calibration: Calibration | None = None) -> Grounder:
        """The run's way from maps to boxes, with these heads or, without any, each sample's own `k`.

        Args:
            calibration: that of `calibration_of`; without one nothing is absent.
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
            LEAST_OF_PLACES if self.prompt_templates is PLACES else LEAST_MASS,
            isinstance(options, FinderOptions) and options.instances_by == "segmenter",
        )

    def recipe(self, heads: Sequence[Head] | None, lvlm: LVLM | None = None) -> dict[str, Any]:
        """All that the signals of a grounding depend on, by name."""
        lvlm, options = lvlm or self.lvlm, self.options
        zoom = isinstance(options, FinderOptions) and options.zoom
        from_map = options.grounding.box_from == "map"  # then no segmenter need be loaded for this
        masked = None if from_map else self.segmenter
        grounder = Grounder(tuple(heads or ()), options.criteria, options.grounding, masked, options.k)
        return grounder.recipe({**lvlm.choices, **lvlm.asked}, signals=options.signals, zoom=zoom)

    def calibration_of(self, heads: Sequence[Head] | None, lvlm: LVLM | None = None) -> Calibration | None:
        """What `calibration=` asks for with these heads; None where there is none.

        Args:
            lvlm: the model under another prompt than that of the run.

        Raises:
            UsageError: a named one does not fit, or there is none and `abstain` needs one.
        """
        options = self.options
        note = (lvlm or self.lvlm).note
        found = choose_calibration(options.calibration, self.folder, self.recipe(heads, lvlm), note)
        if found is None and options.abstain is not None:
            raise UsageError(
                f"abstain={options.abstain:g} needs a calibration of these heads and this recipe: run "
                "stage=calibrate with the same options on entries with truth first"
            )
        return found

    def extra_prompts(
        self,
        heads: Sequence[Head] | None,
        calibration: Calibration | None = None,
        *,
        every_head: bool = False,
    ) -> ExtraPrompts:
        """What is asked beside each expression that these heads ground; of no other, unless `every_head`.

        Args:
            calibration: where it weighs what the model says of itself, that is asked as well.
        """
        signals = self.options.signals or (calibration is not None and calibration.asks)
        options = self.options
        return extra_prompts_for(
            options.grounding.contrast, heads, options.criteria, signals=signals, every_head=every_head
        )

    def needs_model(self, heads: Sequence[Head] | None, calibration: Calibration | None) -> bool:
        """Whether a box and its confidence need more than the maps that an attention file holds."""
        return bool(self.extra_prompts(heads, calibration)) or self.options.query_token == "last_and_answer"

    @property
    def uses_workers(self) -> bool:
        """Whether workers run the model over the data set (`engine=ray`) instead of this process."""
        return False

    @property
    def prompt_templates(self) -> Sequence[str] | None:
        """Templates that each expression is asked in; None asks with it alone."""
        return self.options.paraphrases

    @cached_property
    def lvlm(self) -> LVLM:
        """The model, loaded on first use; on the CPU where workers run it, for the GPUs are theirs."""
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
        """All that the maps of a sample depend on besides the sample, as JSON values."""
        lvlm = self.lvlm
        return {
            "weights": [lvlm.name, lvlm.fingerprint, self.spec.dtype, self.spec.quantization],
            "kernel": lvlm.spec.attn_implementation,
            "pad_to_square": lvlm.spec.pad_to_square,
            "drop_lone_spaces": self.options.drop_lone_spaces,
            "question": [lvlm.conv_mode, lvlm.system, lvlm.query_token, lvlm.view],
            **lvlm.wording,
        }

    @cached_property
    def named_heads(self) -> tuple[Head, ...] | None:
        """The heads that `heads=` asks for, best first, or None where each sample has to pick its own."""
        return choose_heads(self.options.heads, self.options.k, self.spec.name, self.folder, self.ready_heads)

    @cached_property
    def ready_heads(self) -> ReadyHeads:
        """What `heads=auto` takes of the model's known heads, as far as that can be told before it is loaded."""
        options, spec = self.options, self.spec
        known = spec if spec.heads or spec.lists else find_spec(spec.name)
        box = options.query_token == "answer_span" and options.answer_span == BOX
        asked = NATIVE_BOX if box else options.conv_mode or spec.conv_mode
        # A conversation asks /ground with the prompt of the heads.
        follows = isinstance(options, ChatOptions)
        return choose_ready(known.heads, known.lists, None if follows else asked, options.query_token)

    @property
    def heads_from(self) -> str | None:
        """Whose heads `heads=` takes, where they are on a ready list."""
        if self.options.heads == "auto":
            return str(self.ready_heads.of) if self.ready_heads.of else None
        wanted = self.options.heads
        return str(ready_lists()[wanted]) if isinstance(wanted, str) and wanted in ready_lists() else None

    @cached_property
    def heads_source(self) -> Path | str | None:
        """The heads.json that `heads=` names, here or on the hub, or that `heads=auto` takes; None for other heads."""
        return heads_source(self.options.heads, self.spec.name, self.folder, self.ready_heads)

    @property
    def heads_found_with(self) -> FoundWith | None:
        """How the heads of `heads=` were found, None where that is not known."""
        return found_with_of(self.options.heads, self.spec.name, self.folder, self.ready_heads)

    def note_head_conditions(self) -> None:
        """Notes it if the heads were found with other weights, another prompt or another query token."""
        self.lvlm.note_other_conditions(
            f"heads={self.heads_source or self.options.heads}", self.heads_found_with
        )

    def check_named_heads(self) -> None:
        """UsageError if the model lacks one of the heads; a note if they were found under other conditions."""
        check_heads(self.named_heads or (), self.lvlm.num_layers, self.lvlm.num_heads)
        self.note_head_conditions()


@dataclass(frozen=True)
class Run(ModelRun[FinderOptions]):
    """A run of the finder."""

    @property
    def prompt_templates(self) -> Sequence[str] | None:
        return PLACES if self.options.instances_by == "places" else self.options.paraphrases

    def grounder(self, heads: Sequence[Head] | None, calibration: Calibration | None = None) -> Grounder:
        found = super().grounder(heads, calibration)
        return replace(found, each_image=self.options.image_boxes == "each")

    def query_for(self, expression: str) -> str:
        """What the model is asked: where all objects are wanted, in the singular if it knows no other word."""
        if self.options.instances == "one":
            return expression
        return singularize_unknown_words(self.lvlm.processor.tokenizer, expression)

    @property
    def batch_size(self) -> int:
        """Samples in a chunk."""
        return AUTO_BATCH_SIZE if self.options.batch_size == "auto" else self.options.batch_size

    @property
    def frames_per_clip(self) -> int | None:
        """Frames that the model is shown in one prompt; None shows each by itself."""
        return self.options.frames_per_prompt if self.options.video == "native" else None

    def check_clips(self) -> None:
        """UsageError where `video=native` is asked of a model that reads no videos, or to pick heads as no clip can."""
        if self.frames_per_clip:
            from localization_heads.lvlm.clips import check_supports_clips

            check_supports_clips(self.lvlm.model.config)
            if not self.named_heads and measures_sensitivity(self.options.criteria):
                raise UsageError(
                    "video=native: without heads= the third criterion picks them by other expressions of an image, "
                    "which no clip is asked about: name heads=, or write criteria.sensitivity=none"
                )

    @property
    def model_settings(self) -> dict[str, Any]:
        if not self.frames_per_clip:
            return super().model_settings
        own = self.lvlm.video_settings()
        return {**super().model_settings, "clip": self.frames_per_clip, **({"videos": own} if own else {})}

    def recipe(self, heads: Sequence[Head] | None, lvlm: LVLM | None = None) -> dict[str, Any]:
        return {
            **super().recipe(heads, lvlm),
            **({"clip": self.frames_per_clip} if self.frames_per_clip else {}),
        }

    @property
    def top_n(self) -> int:
        """Heads marked in each sample: the option, or what suits the model."""
        return self.options.top_n or self.spec.top_n

    @property
    def uses_workers(self) -> bool:
        return self.options.engine.kind == "ray"

    def ranking_of(
        self, rows: StatisticsRows, model: str, draws: NDArray[np.int64] | None = None
    ) -> HeadRanking:
        """The heads ranked by the samples of `rows`, as the options want it (`rank_heads`, which `draws` goes to)."""
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
        """Draw a figure, unless the file at `path` shows the same inputs; with `show_plot`, open it -> its path.

        Args:
            path: of a PNG; its ending is that of `figure_format`.
        """
        from localization_heads import figures

        show, path = self.options.show_plot, path.with_suffix(f".{self.options.figure_format}")
        figure = figures.plot_once(plot, *inputs, path=path, always=show, **named)
        if figure and show:
            figures.show(figure)
        return path

    def attention_file(self, id: str) -> Path:
        """Where the attention of the entry of that id is kept."""
        return attention_path(self.attention_folder, id, self.options.attention_format)

    @property
    def num_figures(self) -> int | None:
        """At most this many entries of a data set are drawn; None draws all."""
        return self.options.visualize_limit if self.options.visualize_batch else 0


ChatRun = ModelRun[ChatOptions]
DemoRun = ModelRun[DemoOptions]


def small_model_threads(num_parameters: int) -> int | None:
    """One thread for a small model, None (torch's choice) for the others.

    The threads of a small layer spend their time waiting for each other; on a busy machine that made the embedded
    model twenty times slower. `OMP_NUM_THREADS` is respected.
    """
    return 1 if num_parameters < SMALL_MODEL and "OMP_NUM_THREADS" not in os.environ else None
