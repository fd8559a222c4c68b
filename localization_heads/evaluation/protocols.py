"""The numbers that each benchmark's own evaluation reports, under the names that they have here.

They stand beside the metrics that all data sets share, in the block `protocol` of `metrics.json`. A prepared file names
its protocol on every line. All are pure functions of answers and truths; docs/datasets.md tells where each comes from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from localization_heads.attention import Box
from localization_heads.cells import box_iou
from localization_heads.evaluation.confidence import auroc, with_bootstrap_interval
from localization_heads.evaluation.metrics import (
    MEAN_THRESHOLDS,
    bootstrap_ratios,
    divided,
    percentile_interval,
)
from localization_heads.evaluation.scores import f1, number

SMALL, LARGE = 128.0, 256.0
"""Pixels: Ref-L4 calls an object small below the first and large above the second; its size is sqrt(w * h)."""
TOP = (1, 5, 10)
"""k of FineCops-Ref's Recall@k."""
MOST_GROUPS = 40
"""Kinds of entries that are told apart, at most."""

PROTOCOLS: Mapping[str, str] = {
    "unc": "each expression by itself; right from an IoU of 0.5 on",
    "lmms": "all expressions of an object in one prompt, as lmms-eval's refcoco_grounding; right from an IoU of 0.5 on",
    "reasonseg": "LISA: gIoU is the mean of the mask IoUs, cIoU the sum of the intersections by that of the unions; "
    "an empty target counts 1 where nothing is predicted, else 0",
    "ref-l4": "right above an IoU, not at it; small, medium and large by sqrt(w * h) at 128 and 256 pixels; [class "
    "mean] is the mean over the categories, COCO's counted as those of Objects365 that the benchmark takes them for",
    "screenspot": "right if a point lies in the true box, edges included: the centre of the predicted box, or the peak "
    "of the map",
    "grefcoco": "GREC: Pr@(F1=1) at an IoU of 0.5 over all expressions; N-acc and T-acc are the shares of expressions "
    "without and with a target to which that many boxes were answered, none or some. GRES: gIoU and cIoU of the union "
    "of all answered masks with that of all targets; without a target 1 where nothing is answered, else 0",
    "flickr30k": "any-box: an IoU of 0.5 with one of the phrase's boxes; merged-box: with the box around them all",
    "groundingme": "right from an IoU on; an expression that fits nothing is right if the answer says so, not if there "
    "is none",
    "finecops-ref": "Precision@1 at an IoU of 0.5 on positives; AUROC of the confidence, and Recall@k among a positive "
    "and its negatives ranked by it",
}
"""What each counts as right, in words, by name."""


class Answer(NamedTuple):
    """What was answered to one expression, and what is true.

    Attributes:
        boxes: the answered boxes, the best first; none if nothing was answered.
        truths: the true boxes; none of what is absent.
        rejected: the answer says that there is nothing.
        confidence: of the answer; None where it has none.
        peak: whether the map's strongest cell lies in the true box; None where there is not one true box.
        overlap: intersection and union of the masks in pixels; None without a true mask. That of an empty target has
            intersection 0 and as many pixels as were predicted.
        image: its identity, for intervals over images.
        facts: the other fields of the entry's line.
    """

    boxes: tuple[Box, ...] = ()
    truths: tuple[Box, ...] = ()
    rejected: bool = False
    confidence: float | None = None
    peak: bool | None = None
    overlap: tuple[int, int] | None = None
    image: str = ""
    facts: Mapping[str, Any] = {}

    @property
    def iou(self) -> float:
        """Of the first box with the true one it fits best; 0 without either."""
        return (
            max((float(box_iou(self.boxes[0], true)) for true in self.truths), default=0.0)
            if self.boxes
            else 0.0
        )


class Share(NamedTuple):
    """A number that is a ratio of two sums over expressions: `tops` by `bottoms`, `[expression]` each."""

    tops: NDArray[np.float64]
    bottoms: NDArray[np.float64]


Shares = dict[str, Share]


def protocol_of(facts: Sequence[Mapping[str, Any]]) -> str | None:
    """The protocol that all entries name, if it is one of PROTOCOLS; None if they name none, or several.

    >>> protocol_of([{"protocol": "unc"}, {"protocol": "unc"}]), protocol_of([{"protocol": "unc"}, {}])
    ('unc', None)
    """
    names = {name if isinstance(name := one.get("protocol"), str) else None for one in facts}
    name = names.pop() if len(names) == 1 else None
    return name if name in PROTOCOLS else None


def protocol_block(
    answers: Sequence[Answer], note: Callable[[str], object], *, by_image: bool = False, seed: int = 42
) -> dict[str, Any]:
    """`{"protocol": ...}`, as of `protocol_metrics`, where all entries name one; else nothing, and a note if some do.

    >>> protocol_block([Answer(facts={"protocol": "unc"}), Answer()], print)
    2 entries are of several protocols (unc: 1, none: 1): evaluate each in a file of its own for the protocol's numbers
    {}
    """
    facts = [answer.facts for answer in answers]
    if (name := protocol_of(facts)) is not None:
        return {"protocol": protocol_metrics(name, answers, by_image=by_image, seed=seed)}
    names = Counter(str(one.get("protocol") or "none")[:40] for one in facts)
    if len(names) > 1 and set(names) & set(PROTOCOLS):
        counts = ", ".join(f"{name}: {count}" for name, count in names.most_common(5))
        note(
            f"{len(facts)} entries are of several protocols ({counts}): "
            "evaluate each in a file of its own for the protocol's numbers"
        )
    return {}


def named_protocol(block: Mapping[str, Any]) -> dict[str, Any]:
    """The protocol of a `protocol_block`, as it stands among the choices of `metrics.json`."""
    return {"protocol": block["protocol"]["name"] if block else None}


def protocol_metrics(
    name: str, answers: Sequence[Answer], *, by_image: bool = False, seed: int = 42
) -> dict[str, Any]:
    """The block `protocol` of `metrics.json`: `name`, `right` (what counts), and each number with its 95 % interval.

    Numbers without an expression are left out. `[kind]` behind a name is the number over the expressions of a kind.

    Args:
        name: one of PROTOCOLS.
        by_image: the intervals resample images with all their expressions.

    >>> answers = [Answer(((0, 0, 2, 2),), ((0, 0, 2, 1),)), Answer((), ((0, 0, 2, 2),))]
    >>> found = protocol_metrics("ref-l4", answers)
    >>> found["acc>0.5"], found["acc>0.5[small]"]
    (0.0, 0.0)
    """
    groups = [answer.image for answer in answers] if by_image else None
    block: dict[str, Any] = {"name": name, "right": PROTOCOLS[name], "num_answers": len(answers)}
    if (shares_of := _SHARES.get(name)) is None or not answers:
        return block
    shares = shares_of(answers)
    tops, bottoms = (np.stack([share[i] for share in shares.values()], axis=1) for i in (0, 1))
    values = divided(tops.sum(axis=0), bottoms.sum(axis=0))
    drawn = bootstrap_ratios(tops, bottoms, groups=groups, seed=seed)
    for i, key in enumerate(shares):
        if bottoms[:, i].any():
            block |= number(key, values[i], percentile_interval(drawn[:, i]))
    if name == "finecops-ref":
        block |= negative_aurocs(answers, groups=groups, seed=seed)
    return block


def _share(values: ArrayLike, among: ArrayLike | None = None) -> Share:
    """The mean of some values among some of the expressions."""
    tops = np.asarray(values, dtype=np.float64)
    bottoms = np.ones_like(tops) if among is None else np.asarray(among, dtype=np.float64)
    return Share(tops * bottoms, bottoms)


def _by_kind(
    key: str, values: ArrayLike, kinds: Sequence[str | None], among: ArrayLike | None = None
) -> Shares:
    """A share over all expressions and over those of each kind; None is of no kind."""
    chosen = np.ones(len(kinds), bool) if among is None else np.asarray(among, bool)
    names = sorted({kind for kind, known in zip(kinds, chosen, strict=True) if kind and known})[:MOST_GROUPS]
    of = np.array([kind or "" for kind in kinds])
    return {key: _share(values, chosen)} | {
        f"{key}[{kind}]": _share(values, chosen & (of == kind)) for kind in names
    }


def _kinds(answers: Sequence[Answer], *fields: str) -> list[str | None]:
    """The first of some fields that an entry has, as short text."""
    found = []
    for answer in answers:
        value = next((answer.facts[field] for field in fields if answer.facts.get(field) is not None), None)
        found.append(None if value is None else str(value)[:60])
    return found


def _single(answers: Sequence[Answer]) -> NDArray[np.bool_]:
    return np.array([len(answer.truths) == 1 for answer in answers])


def _ious(answers: Sequence[Answer]) -> NDArray[np.float64]:
    return np.array([answer.iou for answer in answers])


def size_class(box: Box) -> str:
    """Ref-L4's: small, medium or large. Both bounds belong to medium.

    >>> size_class((0, 0, 128, 128)), size_class((0, 0, 127, 128)), size_class((0, 0, 256, 257))
    ('medium', 'small', 'large')
    """
    x0, y0, x1, y1 = box
    size = ((x1 - x0) * (y1 - y0)) ** 0.5
    return "small" if size < SMALL else "medium" if size <= LARGE else "large"


def ref_l4(answers: Sequence[Answer]) -> Shares:
    """Accuracies strictly above 0.5, 0.75 and 0.9, the mean of those above 0.5 to 0.95, and both by size."""
    ious, single = _ious(answers), _single(answers)
    sizes = [size_class(answer.truths[0]) if len(answer.truths) == 1 else None for answer in answers]
    mean = np.mean([ious > threshold for threshold in MEAN_THRESHOLDS], axis=0)
    high = {f"acc>{threshold}": _share(ious > threshold, single) for threshold in (0.75, 0.9)}
    found = _by_kind("acc>0.5", ious > 0.5, sizes, single) | high | _by_kind("macc>", mean, sizes, single)
    classes = [name if one else None for name, one in zip(_kinds(answers, "category"), single, strict=True)]
    numbers = Counter(classes)
    weights = np.array([1 / numbers[name] if name else 0.0 for name in classes])  # in sum 1 for each class
    averaged = {"acc>0.5[class mean]": ious > 0.5, "macc>[class mean]": mean}
    return found | {key: Share(weights * right, weights) for key, right in averaged.items()}


def centre_inside(box: Box, true: Box) -> bool:
    """Whether the centre of a box lies in the true one, edges included.

    >>> centre_inside((0, 0, 4, 4), (2, 2, 9, 9)), centre_inside((0, 0, 3.9, 4), (2, 2, 9, 9))
    (True, False)
    """
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return true[0] <= x <= true[2] and true[1] <= y <= true[3]


def screenspot(answers: Sequence[Answer]) -> Shares:
    """Point in box: of the centre of the box and of the peak, by the kind of target and by platform or group."""
    single = _single(answers)
    hit = np.array(
        [
            bool(one.boxes and len(one.truths) == 1 and centre_inside(one.boxes[0], one.truths[0]))
            for one in answers
        ]
    )
    peak = np.array([bool(answer.peak) and not answer.rejected for answer in answers])
    of_kind = _by_kind("point_in_box", hit, _kinds(answers, "ui_type", "data_type"), single)
    of_group = _by_kind("point_in_box", hit, _kinds(answers, "group", "platform"), single)
    return of_kind | of_group | {"peak_in_box": _share(peak, single)}


def grefcoco(answers: Sequence[Answer]) -> Shares:
    """Pr@(F1=1), N-acc and T-acc (He et al., arXiv 2308.16182); gIoU and cIoU where there are masks (2306.00968)."""
    perfect = [f1(answer.boxes, answer.truths) == 1 for answer in answers]
    some = np.array([bool(answer.boxes) for answer in answers])
    target = np.array([bool(answer.truths) for answer in answers])
    shares = {"pr@f1=1": _share(perfect), "n_acc": _share(~some, ~target), "t_acc": _share(some, target)}
    masked = any(answer.truths and answer.overlap is not None for answer in answers)
    return shares | (reasonseg(answers) if masked else {})


def merged_box(boxes: Sequence[Box]) -> Box:
    """The box around some boxes.

    >>> merged_box([(0, 1, 2, 3), (1, 0, 5, 2)])
    (0.0, 0.0, 5.0, 3.0)
    """
    table = np.array(boxes, dtype=np.float64)
    x0, y0 = table[:, :2].min(axis=0)
    x1, y1 = table[:, 2:].max(axis=0)
    return float(x0), float(y0), float(x1), float(y1)


def flickr30k(answers: Sequence[Answer]) -> Shares:
    """Recall@1 by any box of the phrase and by the box around them, by the phrase's first type."""
    some = np.array([bool(answer.truths) for answer in answers])
    merged = [
        answer._replace(truths=(merged_box(answer.truths),)) if answer.truths else answer
        for answer in answers
    ]
    kinds = _kinds(answers, "phrase_type")
    any_box = _by_kind("any_box", _ious(answers) >= 0.5, kinds, some)
    return any_box | _by_kind("merged_box", _ious(merged) >= 0.5, kinds, some)


def groundingme(answers: Sequence[Answer]) -> Shares:
    """Accuracies at 0.5, 0.75 and 0.9; what fits nothing is right if it was rejected. By both levels of subtasks."""
    ious = _ious(answers)
    absent = np.array([not answer.truths for answer in answers])
    rejected = np.array([answer.rejected for answer in answers])
    right = {t: np.where(absent, rejected, (ious >= t) & ~rejected) for t in (0.5, 0.75, 0.9)}
    first, second = _kinds(answers, "subtask_l1"), _kinds(answers, "subtask_l2")
    both = [f"{one}/{two}" if one and two else None for one, two in zip(first, second, strict=True)]
    found = _by_kind("acc@0.5", right[0.5], first) | _by_kind("acc@0.5", right[0.5], both)
    return found | {f"acc@{t}": _share(right[t]) for t in (0.75, 0.9)}


def reasonseg(answers: Sequence[Answer]) -> Shares:
    """gIoU and cIoU over the masks, those of empty targets among them, as LISA sums them up."""
    masked = np.array([answer.overlap is not None for answer in answers], dtype=np.float64)
    shared, union = (
        np.array([answer.overlap or (0, 0) for answer in answers], dtype=np.float64).reshape(-1, 2).T
    )
    single = np.where(union > 0, divided(shared, union), 1.0)
    empty = np.array([not answer.truths for answer in answers]) & (masked > 0)
    shares = {"giou": Share(single * masked, masked), "ciou": Share(shared, union)}
    return shares | ({"giou[empty]": _share(single, empty)} if empty.any() else {})


def _negative_kind(answer: Answer) -> str | None:
    """Text or image, what was changed, and how hard it is to see: `text attribute 1`; None of a positive."""
    if answer.truths:
        return None
    parts = [answer.facts.get(field) for field in ("negative_cate", "negative_type", "negative_level")]
    return " ".join(str(part)[:30] for part in parts if part is not None) or "negative"


def finecops(answers: Sequence[Answer]) -> Shares:
    """Precision@1 by level; Recall@k of each positive among itself and its negatives of a kind."""
    right = _ious(answers) >= 0.5
    positive = np.array([bool(answer.truths) for answer in answers])
    levels = [f"level {level}" if level else None for level in _kinds(answers, "level")]
    return _by_kind("precision@1", right, levels, positive) | _recalls(answers, right)


def _recalls(answers: Sequence[Answer], right: NDArray[np.bool_]) -> Shares:
    """`recall@k[kind]`: among the positives that have negatives of a kind, those whose box is right and whose
    confidence is one of the k highest; equal ones count for the positive, as in the set's own evaluation.
    """
    negatives: dict[str, dict[str, list[float]]] = {}
    for answer in answers:
        if (kind := _negative_kind(answer)) and answer.confidence is not None:
            of_kind = negatives.setdefault(kind, {})
            of_kind.setdefault(str(answer.facts.get("positive_id")), []).append(answer.confidence)
    shares: Shares = {}
    for kind in sorted(negatives)[:MOST_GROUPS]:
        above = np.full(len(answers), np.inf)  # negatives that outrank the positive
        for place, answer in enumerate(answers):
            others = negatives[kind].get(str(answer.facts.get("source_id")), [])
            if answer.truths and others and answer.confidence is not None:
                above[place] = sum(other > answer.confidence for other in others)
        among = np.isfinite(above)
        for k in TOP:
            shares[f"recall@{k}[{kind}]"] = _share(right & (above < k), among)
    return shares


def negative_aurocs(
    answers: Sequence[Answer], *, groups: Sequence[str] | None = None, seed: int = 42
) -> dict[str, Any]:
    """`auroc`, and `auroc[kind]` of each kind of negatives: positives against negatives by their confidence.

    Of a kind, the positives are those that its negatives were made of.
    """
    known = [number for number, answer in enumerate(answers) if answer.confidence is not None]
    kinds = {number: _negative_kind(answers[number]) for number in known}
    found: dict[str, Any] = {}
    names = sorted({kind for kind in kinds.values() if kind})[:MOST_GROUPS]
    for name in [None, *names]:
        origins = {str(answers[n].facts.get("positive_id")) for n in known if kinds[n] == name}
        chosen = [
            n
            for n in known
            if name is None or kinds[n] == name
            or (kinds[n] is None and str(answers[n].facts.get("source_id")) in origins)
        ]  # fmt: skip
        value, interval = with_bootstrap_interval(
            auroc,
            [answers[n].confidence or 0.0 for n in chosen],
            [kinds[n] is None for n in chosen],
            groups=None if groups is None else [groups[n] for n in chosen],
            seed=seed,
        )
        if not np.isnan(value):
            found |= number("auroc" if name is None else f"auroc[{name}]", value, interval)
    return found


_SHARES: Mapping[str, Callable[[Sequence[Answer]], Shares]] = {
    "reasonseg": reasonseg,
    "ref-l4": ref_l4,
    "screenspot": screenspot,
    "grefcoco": grefcoco,
    "flickr30k": flickr30k,
    "groundingme": groundingme,
    "finecops-ref": finecops,
}
"""The ratios of each protocol; `unc` and `lmms` have none besides the metrics that all data sets share."""
