"""The metrics of each benchmark's own evaluation, the block `protocol` of `metrics.json`.

They complement the metrics that all data sets share. A prepared file names its protocol on every line. All functions
are pure; docs/datasets.md lists where each metric is defined.
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
"""Ref-L4's bounds on the size sqrt(w * h) in pixels: small is below the first, large above the second."""
TOP = (1, 5, 10)
"""The k of FineCops-Ref's Recall@k."""
MOST_GROUPS = 40
"""At most this many kinds of entries get metrics of their own."""

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
"""Protocol -> what it counts as right, in words."""


class Answer(NamedTuple):
    """The prediction for one expression, and the ground truth.

    Attributes:
        boxes: the predicted boxes, best first; empty if nothing was predicted.
        truths: the true boxes; empty for an absent object.
        rejected: the prediction is that the object is absent.
        confidence: of the prediction, if it has one.
        peak: whether the map's strongest cell lies in the true box; None unless there is exactly one true box.
        overlap: intersection and union of the masks in pixels; None without a true mask. For an empty target the
            intersection is 0 and the union is the number of predicted pixels.
        image: identity of the image, for intervals over images.
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
        """IoU of the first box with the true box that it overlaps most; 0 if either is missing."""
        if not self.boxes:
            return 0.0
        return max((float(box_iou(self.boxes[0], true)) for true in self.truths), default=0.0)


class Share(NamedTuple):
    """A metric that is a ratio of two sums over expressions: numerators and denominators, `[expression]` each."""

    tops: NDArray[np.float64]
    bottoms: NDArray[np.float64]


Shares = dict[str, Share]


def protocol_of(facts: Sequence[Mapping[str, Any]]) -> str | None:
    """The protocol that all entries name, if it is one of PROTOCOLS; None if they name none or different ones.

    >>> protocol_of([{"protocol": "unc"}, {"protocol": "unc"}]), protocol_of([{"protocol": "unc"}, {}])
    ('unc', None)
    """
    names = {name if isinstance(name := fields.get("protocol"), str) else None for fields in facts}
    name = names.pop() if len(names) == 1 else None
    return name if name in PROTOCOLS else None


def protocol_block(
    answers: Sequence[Answer], note: Callable[[str], object], *, by_image: bool = False, seed: int = 42
) -> dict[str, Any]:
    """`{"protocol": protocol_metrics(...)}` if all entries name one protocol; else `{}`, with a note if only some do.

    >>> protocol_block([Answer(facts={"protocol": "unc"}), Answer()], print)
    2 entries are of several protocols (unc: 1, none: 1): evaluate each in a file of its own for the protocol's numbers
    {}
    """
    facts = [answer.facts for answer in answers]
    if (name := protocol_of(facts)) is not None:
        return {"protocol": protocol_metrics(name, answers, by_image=by_image, seed=seed)}
    names = Counter(str(fields.get("protocol") or "none")[:40] for fields in facts)
    if len(names) > 1 and set(names) & set(PROTOCOLS):
        counts = ", ".join(f"{name}: {count}" for name, count in names.most_common(5))
        note(
            f"{len(facts)} entries are of several protocols ({counts}): "
            "evaluate each in a file of its own for the protocol's numbers"
        )
    return {}


def named_protocol(block: Mapping[str, Any]) -> dict[str, Any]:
    """The protocol's name for `choices` of `metrics.json`."""
    return {"protocol": block["protocol"]["name"] if block else None}


def protocol_metrics(name: str, answers: Sequence[Answer], *, by_image: bool = False, seed: int = 42) -> dict[str, Any]:
    """The block `protocol` of `metrics.json`: `name`, `right` (what counts), and each metric with its 95 % interval.

    A metric named `metric[kind]` is over the expressions of that kind. Metrics over no expression are omitted.

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
    resampled = bootstrap_ratios(tops, bottoms, groups=groups, seed=seed)
    for i, key in enumerate(shares):
        if bottoms[:, i].any():
            block |= number(key, values[i], percentile_interval(resampled[:, i]))
    if name == "finecops-ref":
        block |= negative_aurocs(answers, groups=groups, seed=seed)
    return block


def _share(values: ArrayLike, among: ArrayLike | None = None) -> Share:
    """The mean of values over the selected expressions; None selects all."""
    tops = np.asarray(values, dtype=np.float64)
    bottoms = np.ones_like(tops) if among is None else np.asarray(among, dtype=np.float64)
    return Share(tops * bottoms, bottoms)


def _by_kind(key: str, values: ArrayLike, kinds: Sequence[str | None], among: ArrayLike | None = None) -> Shares:
    """The mean over the selected expressions, and over those of each kind as `key[kind]`; kind None is skipped."""
    selected = np.ones(len(kinds), bool) if among is None else np.asarray(among, bool)
    names = sorted({kind for kind, known in zip(kinds, selected, strict=True) if kind and known})[:MOST_GROUPS]
    labels = np.array([kind or "" for kind in kinds])
    return {key: _share(values, selected)} | {
        f"{key}[{kind}]": _share(values, selected & (labels == kind)) for kind in names
    }


def _kinds(answers: Sequence[Answer], *fields: str) -> list[str | None]:
    """The value of the first of `fields` that each entry has, as short text."""
    kinds = []
    for answer in answers:
        value = next((answer.facts[field] for field in fields if answer.facts.get(field) is not None), None)
        kinds.append(None if value is None else str(value)[:60])
    return kinds


def _has_one_truth(answers: Sequence[Answer]) -> NDArray[np.bool_]:
    return np.array([len(answer.truths) == 1 for answer in answers])


def _ious(answers: Sequence[Answer]) -> NDArray[np.float64]:
    return np.array([answer.iou for answer in answers])


def size_class(box: Box) -> str:
    """Ref-L4's size class: small, medium or large. Both bounds belong to medium.

    >>> size_class((0, 0, 128, 128)), size_class((0, 0, 127, 128)), size_class((0, 0, 256, 257))
    ('medium', 'small', 'large')
    """
    x0, y0, x1, y1 = box
    size = ((x1 - x0) * (y1 - y0)) ** 0.5
    return "small" if size < SMALL else "medium" if size <= LARGE else "large"


def ref_l4(answers: Sequence[Answer]) -> Shares:
    """Accuracies at IoUs strictly above 0.5, 0.75 and 0.9, and their mean over 0.5 to 0.95; by size and by class."""
    ious, single = _ious(answers), _has_one_truth(answers)
    sizes = [size_class(answer.truths[0]) if len(answer.truths) == 1 else None for answer in answers]
    mean = np.mean([ious > threshold for threshold in MEAN_THRESHOLDS], axis=0)
    high = {f"acc>{threshold}": _share(ious > threshold, single) for threshold in (0.75, 0.9)}
    shares = _by_kind("acc>0.5", ious > 0.5, sizes, single) | high | _by_kind("macc>", mean, sizes, single)
    categories = _kinds(answers, "category")
    classes = [name if is_single else None for name, is_single in zip(categories, single, strict=True)]
    counts = Counter(classes)
    weights = np.array([1 / counts[name] if name else 0.0 for name in classes])  # sum to 1 within each class
    class_means = {"acc>0.5[class mean]": ious > 0.5, "macc>[class mean]": mean}
    return shares | {key: Share(weights * right, weights) for key, right in class_means.items()}


def centre_inside(box: Box, true: Box) -> bool:
    """Whether the centre of a box lies in the true box, edges included.

    >>> centre_inside((0, 0, 4, 4), (2, 2, 9, 9)), centre_inside((0, 0, 3.9, 4), (2, 2, 9, 9))
    (True, False)
    """
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return true[0] <= x <= true[2] and true[1] <= y <= true[3]


def screenspot(answers: Sequence[Answer]) -> Shares:
    """Whether the box's centre, or the map's peak, lies in the true box; by type of target and by group or platform."""
    single = _has_one_truth(answers)
    hit = np.array(
        [
            bool(answer.boxes and len(answer.truths) == 1 and centre_inside(answer.boxes[0], answer.truths[0]))
            for answer in answers
        ]
    )
    peak = np.array([bool(answer.peak) and not answer.rejected for answer in answers])
    by_type = _by_kind("point_in_box", hit, _kinds(answers, "ui_type", "data_type"), single)
    by_group = _by_kind("point_in_box", hit, _kinds(answers, "group", "platform"), single)
    return by_type | by_group | {"peak_in_box": _share(peak, single)}


def grefcoco(answers: Sequence[Answer]) -> Shares:
    """Pr@(F1=1), N-acc and T-acc (He et al., arXiv 2308.16182); gIoU and cIoU if there are masks (2306.00968)."""
    perfect = [f1(answer.boxes, answer.truths) == 1 for answer in answers]
    predicted = np.array([bool(answer.boxes) for answer in answers])
    present = np.array([bool(answer.truths) for answer in answers])
    shares = {
        "pr@f1=1": _share(perfect),
        "n_acc": _share(~predicted, ~present),
        "t_acc": _share(predicted, present),
    }
    has_masks = any(answer.truths and answer.overlap is not None for answer in answers)
    return shares | (reasonseg(answers) if has_masks else {})


def merged_box(boxes: Sequence[Box]) -> Box:
    """The tight box around all boxes.

    >>> merged_box([(0, 1, 2, 3), (1, 0, 5, 2)])
    (0.0, 0.0, 5.0, 3.0)
    """
    table = np.array(boxes, dtype=np.float64)
    x0, y0 = table[:, :2].min(axis=0)
    x1, y1 = table[:, 2:].max(axis=0)
    return float(x0), float(y0), float(x1), float(y1)


def flickr30k(answers: Sequence[Answer]) -> Shares:
    """Recall@1 with any box of the phrase and with their merged box, by the phrase's first type."""
    present = np.array([bool(answer.truths) for answer in answers])
    merged = [answer._replace(truths=(merged_box(answer.truths),)) if answer.truths else answer for answer in answers]
    kinds = _kinds(answers, "phrase_type")
    any_box = _by_kind("any_box", _ious(answers) >= 0.5, kinds, present)
    return any_box | _by_kind("merged_box", _ious(merged) >= 0.5, kinds, present)


def groundingme(answers: Sequence[Answer]) -> Shares:
    """Accuracies at 0.5, 0.75 and 0.9, by subtask of both levels. An absent object is right if it was rejected."""
    ious = _ious(answers)
    absent = np.array([not answer.truths for answer in answers])
    rejected = np.array([answer.rejected for answer in answers])
    right = {t: np.where(absent, rejected, (ious >= t) & ~rejected) for t in (0.5, 0.75, 0.9)}
    first, second = _kinds(answers, "subtask_l1"), _kinds(answers, "subtask_l2")
    both = [f"{l1}/{l2}" if l1 and l2 else None for l1, l2 in zip(first, second, strict=True)]
    shares = _by_kind("acc@0.5", right[0.5], first) | _by_kind("acc@0.5", right[0.5], both)
    return shares | {f"acc@{t}": _share(right[t]) for t in (0.75, 0.9)}


def reasonseg(answers: Sequence[Answer]) -> Shares:
    """gIoU and cIoU over all masks, those of empty targets included, as LISA computes them."""
    has_mask = np.array([answer.overlap is not None for answer in answers], dtype=np.float64)
    shared, union = np.array([answer.overlap or (0, 0) for answer in answers], dtype=np.float64).reshape(-1, 2).T
    iou = np.where(union > 0, divided(shared, union), 1.0)
    empty = np.array([not answer.truths for answer in answers]) & (has_mask > 0)
    shares = {"giou": Share(iou * has_mask, has_mask), "ciou": Share(shared, union)}
    return shares | ({"giou[empty]": _share(iou, empty)} if empty.any() else {})


def _negative_kind(answer: Answer) -> str | None:
    """Category, changed element and difficulty of a negative, such as `text attribute 1`; None for a positive."""
    if answer.truths:
        return None
    parts = [answer.facts.get(field) for field in ("negative_cate", "negative_type", "negative_level")]
    return " ".join(str(part)[:30] for part in parts if part is not None) or "negative"


def finecops(answers: Sequence[Answer]) -> Shares:
    """Precision@1 by level, and Recall@k of each positive among its negatives of a kind."""
    right = _ious(answers) >= 0.5
    positive = np.array([bool(answer.truths) for answer in answers])
    levels = [f"level {level}" if level else None for level in _kinds(answers, "level")]
    return _by_kind("precision@1", right, levels, positive) | _recalls(answers, right)


def _recalls(answers: Sequence[Answer], right: NDArray[np.bool_]) -> Shares:
    """`recall@k[kind]`: the share of positives with a right box and one of the k highest confidences.

    Each positive is ranked among its own negatives of that kind; ties count in its favour, as in the benchmark's code.
    """
    negatives: dict[str, dict[str, list[float]]] = {}
    for answer in answers:
        if (kind := _negative_kind(answer)) and answer.confidence is not None:
            by_positive = negatives.setdefault(kind, {})
            by_positive.setdefault(str(answer.facts.get("positive_id")), []).append(answer.confidence)
    shares: Shares = {}
    for kind in sorted(negatives)[:MOST_GROUPS]:
        rank = np.full(len(answers), np.inf)  # of the positive among its negatives, from 0
        for i, answer in enumerate(answers):
            others = negatives[kind].get(str(answer.facts.get("source_id")), [])
            if answer.truths and others and answer.confidence is not None:
                rank[i] = sum(other > answer.confidence for other in others)
        for k in TOP:
            shares[f"recall@{k}[{kind}]"] = _share(right & (rank < k), np.isfinite(rank))
    return shares


def negative_aurocs(
    answers: Sequence[Answer], *, groups: Sequence[str] | None = None, seed: int = 42
) -> dict[str, Any]:
    """AUROC of the confidence on positives against negatives: `auroc` of all, `auroc[kind]` of each kind of negatives.

    For a kind, the positives are those that its negatives were derived from.
    """
    known = [i for i, answer in enumerate(answers) if answer.confidence is not None]
    kinds = {i: _negative_kind(answers[i]) for i in known}
    metrics: dict[str, Any] = {}
    names = sorted({kind for kind in kinds.values() if kind})[:MOST_GROUPS]
    for name in [None, *names]:
        positives = {str(answers[i].facts.get("positive_id")) for i in known if kinds[i] == name}
        selected = [
            i
            for i in known
            if name is None or kinds[i] == name
            or (kinds[i] is None and str(answers[i].facts.get("source_id")) in positives)
        ]  # fmt: skip
        value, interval = with_bootstrap_interval(
            auroc,
            [answers[i].confidence or 0.0 for i in selected],
            [kinds[i] is None for i in selected],
            groups=None if groups is None else [groups[i] for i in selected],
            seed=seed,
        )
        if not np.isnan(value):
            metrics |= number("auroc" if name is None else f"auroc[{name}]", value, interval)
    return metrics


_SHARES: Mapping[str, Callable[[Sequence[Answer]], Shares]] = {
    "reasonseg": reasonseg,
    "ref-l4": ref_l4,
    "screenspot": screenspot,
    "grefcoco": grefcoco,
    "flickr30k": flickr30k,
    "groundingme": groundingme,
    "finecops-ref": finecops,
}
"""The metrics of each protocol; `unc` and `lmms` have only those that all data sets share."""
