"""`Study`: the statistics of one model on one data set, the input of every experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from localization_heads.errors import UsageError
from localization_heads.heads.criteria import HeadStatistics
from localization_heads.heads.head import Head
from localization_heads.heads.one_sample import NO_HEAD_HINT, greedy_heads
from localization_heads.heads.ranking import NONE_KEPT, add_sensitivity, rank_heads
from localization_heads.heads.record import HeadRanking
from localization_heads.heads.sensitivity import SensitivityStatistics
from localization_heads.options.experiments import ExperimentOptions
from localization_heads.options.groups import CriteriaOptions, GroundingOptions


@dataclass(frozen=True)
class StudyOptions:
    """The recipe of which each experiment varies one part, and the values that it sweeps over.

    Args:
        k: number of localization heads.
        top_n: heads marked in each sample (N).
        num_trials: random draws of the ranking.
        num_samples: samples per draw.
        seed: of the draws and of the random heads.
        grounding: the read-out, from maps to boxes.
    """

    k: int = 3
    top_n: int = 10
    num_trials: int = 5
    num_samples: int = 1000
    seed: int = 42
    criteria: CriteriaOptions = field(default_factory=CriteriaOptions)
    grounding: GroundingOptions = field(default_factory=GroundingOptions)
    sweeps: ExperimentOptions = field(default_factory=ExperimentOptions)


@dataclass(frozen=True, eq=False)
class Study:
    """One model on one set of entries. Arrays are `[sample, layer, head]`.

    Args:
        model: the model's name.
        data: the name of the data set, for table headings.
        sums: attention sums (`head_statistics`).
        entropies: spatial entropies.
        bottom_row: bottom-row flags.
        ious: `map_ious` of every sample; None without ground truth.
        hits: `head_hits` of every sample; None without ground truth.
        masses: `mass_in_truth` of every sample; None without ground truth.
        answers: for `experiment=causal`: `[ranking, draw]`, the share of right answers to each entry of the second
            half while those heads are switched off.
        num_masks: how many samples have a ground-truth mask; the IoUs of the others are with their box.
        given_heads: localization heads named by the user; None uses those found here.
        segmenter: the segmenter that makes the masks of Tab. 1 to 3.
        sensitivity: means over the samples; with `criteria=robust` the heads are ranked by them.
    """

    model: str
    data: str
    sums: NDArray[np.float32]
    entropies: NDArray[np.float32]
    bottom_row: NDArray[np.bool_]
    ious: NDArray[np.float32] | None = None
    hits: NDArray[np.bool_] | None = None
    num_masks: int = 0
    masses: NDArray[np.float32] | None = None
    answers: Mapping[tuple[str, int], NDArray[np.float64]] | None = None
    given_heads: tuple[Head, ...] | None = None
    segmenter: str = "none"
    options: StudyOptions = field(default_factory=StudyOptions)
    sensitivity: SensitivityStatistics | None = None

    def __len__(self) -> int:
        return len(self.sums)

    @property
    def shape(self) -> tuple[int, int]:
        """`(layers, heads per layer)`."""
        return self.sums.shape[1], self.sums.shape[2]

    @cached_property
    def ranking(self) -> HeadRanking:
        """The ranking of `stage=find` on these samples."""
        return self.rank()

    @property
    def heads(self) -> tuple[Head, ...]:
        """The localization heads, best first: those named, else the first `k` found here; empty if none is kept."""
        return self.given_heads or self.top()

    @property
    def all_heads(self) -> tuple[Head, ...]:
        """All heads of the layers that are not excluded: the control without selection."""
        layers, heads = self.shape
        exclude = self.options.criteria.exclude_layers
        return tuple(Head(layer, head) for layer in range(exclude, layers) for head in range(heads))

    def require_heads(self) -> tuple[Head, ...]:
        """`heads`, for an experiment that grounds with them; raises UsageError if there are none."""
        if not self.heads:
            raise UsageError(f"{NONE_KEPT}, so there is none to ground with: {NO_HEAD_HINT}")
        return self.heads

    def rank(self, *, tau: float | None = None, top_n: int | None = None) -> HeadRanking:
        """The ranking, with another tau or another N if one is given."""
        options = self.options
        ranking = rank_heads(
            self.sums,
            self.entropies,
            bottom_row=self.bottom_row,
            options=self._criteria_with(tau),
            top_n=options.top_n if top_n is None else top_n,
            num_trials=options.num_trials,
            num_samples=options.num_samples,
            seed=options.seed,
            model=self.model,
        )
        return ranking if self.sensitivity is None else add_sensitivity(ranking, self.sensitivity)

    def _criteria_with(self, tau: float | None) -> CriteriaOptions:
        criteria = self.options.criteria
        return criteria if tau is None else replace(criteria, tau=tau, elbow="value")

    def top(self, k: int | None = None) -> tuple[Head, ...]:
        """The first `k` heads of the ranking; fewer if fewer are kept."""
        return first_heads(self.ranking, k or self.options.k)

    def greedy(self, *, tau: float | None = None) -> tuple[tuple[Head, ...], ...]:
        """The `k` heads that each sample selects by itself (the paper's "greedy"), one tuple per sample.

        The tuple is empty if no head passes in a sample; `heads=greedy` skips such a sample.
        """
        no_counts = np.zeros(self.shape, dtype=np.int64)  # of components, which the selection does not use
        return tuple(
            tuple(
                greedy_heads(
                    HeadStatistics(sums, entropies, entropies, no_counts, bottom),
                    self._criteria_with(tau),
                    self.options.k,
                )
            )
            for sums, entropies, bottom in zip(self.sums, self.entropies, self.bottom_row, strict=True)
        )


def first_heads(ranking: HeadRanking, k: int) -> tuple[Head, ...]:
    """The first `k` heads that criterion 1 keeps; fewer if fewer are kept."""
    return tuple(head.address for head in ranking.kept[:k])


def highest(values: NDArray[np.floating], k: int, exclude_layers: int) -> tuple[Head, ...]:
    """The `k` heads of the highest `values [layer, head]`; ties go to the lower layer, then the lower head."""
    allowed = np.array(values, dtype=np.float64)
    allowed[:exclude_layers] = -np.inf
    order = np.argsort(-allowed, axis=None, kind="stable")[:k]
    return tuple(Head(*divmod(int(index), values.shape[1])) for index in order if allowed.flat[index] > -np.inf)


def join_names(heads: Sequence[Head]) -> str:
    """`L2H0 L2H2`, or `none`."""
    return " ".join(map(str, heads)) or "none"
