"""A ranking of heads with its evidence: the record, its JSON form (heads.json), and its table for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from html import escape
from statistics import fmean
from typing import Any, Literal, cast, get_args

from localization_heads.errors import UsageError, shown
from localization_heads.heads.head import Head, find_duplicate
from localization_heads.heads.ready import KEYS, FoundWith
from localization_heads.heads.sensitivity import RESTING_SHARE, sensitivity_score
from localization_heads.options.groups import CriteriaOptions, SensitivityOptions


class Fields:
    """Typed access to an untrusted JSON object: anything unexpected is a `UsageError`."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, dict):
            raise UsageError(f"{where} must be an object with named fields, not {type(data).__name__}")
        self.values: dict[str, Any] = data
        self.where = where

    def get(self, name: str) -> object:
        if name not in self.values:
            raise UsageError(f"{self.where}: '{name}' is missing")
        return self.values[name]

    def integer(self, name: str, least: int = 0) -> int:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._wrong(name, f"a whole number of at least {least}")
        return value

    def number(self, name: str, least: float = -math.inf, most: float = math.inf) -> float | None:
        """A finite number within the limits, or None."""
        return None if self.get(name) is None else self.required_number(name, least, most)

    def number_if_given(self, name: str, least: float = -math.inf, most: float = math.inf) -> float | None:
        return None if self.values.get(name) is None else self.required_number(name, least, most)

    def required_number(self, name: str, least: float = -math.inf, most: float = math.inf) -> float:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, "a number")
        if not (abs(value) < 1e300 and least <= value <= most):  # also refuses NaN and integers too large
            raise self._wrong(name, "finite" if most == math.inf else f"between {least:g} and {most:g}")
        return float(value)

    def sequence(self, name: str) -> list[object]:
        value = self.get(name)
        if not isinstance(value, list):
            raise self._wrong(name, "a list")
        return value

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise self._wrong(name, "a text")
        return value

    def _wrong(self, name: str, wanted: str) -> UsageError:
        return UsageError(f"{self.where}: '{name}' must be {wanted}, not {shown(self.values[name])}")


_CRITERIA = tuple(option.name for option in fields(CriteriaOptions) if option.name != "exclude_layers")
"""The options under `criteria` in `heads.json`; `exclude_layers` has a key of its own."""
_SENSITIVITY_OPTIONS = tuple(option.name for option in fields(SensitivityOptions))
"""Those of them that are only written if sensitivity is used."""

MAX_ROWS = 15
"""Of the table for people."""
COLUMN_NAMES = ("rank", "head", "selection frequency", "attention sum", "spatial entropy")
EVIDENCE = ("selection_frequency", "selection_frequency_std", "attention_sum", "spatial_entropy")
"""Values of a head in every file."""
OPTIONAL_EVIDENCE = ("score", "score_std", "sensitivity", "consistency")
"""Values of a head in `heads.json` if they were measured."""
Spread = Literal["draws", "bootstrap"]
"""What a standard deviation is over: random draws from a pool, or resamples of a pool too small to draw from."""


@dataclass(frozen=True)
class RankedHead:
    """One head with its evidence; means are over the samples drawn.

    Args:
        selection_frequency: share of the samples that selected it, averaged over the trials, 0 to 1.
        selection_frequency_std: its (population) standard deviation over the trials, or over as many
            bootstrap resamples: `HeadRanking.spread` says which.
        attention_sum: mean attention sum.
        spatial_entropy: mean over the samples where it is finite, in nats; None if there is none.
        kept: whether criterion 1 keeps it; in a ranking by labels, whether its layer is not excluded.
        score: mean score by labels (`heads.labels`), and `score_std` its standard deviation over draws; None without
            labels.
        sensitivity: how much its map changes with the expression, 0 to 1, and `consistency`: its overlap with the map
            of the mirrored image (`heads.sensitivity`); None if they were not measured.
    """

    layer: int
    head: int
    selection_frequency: float
    selection_frequency_std: float
    attention_sum: float
    spatial_entropy: float | None
    kept: bool = True
    score: float | None = None
    score_std: float | None = None
    sensitivity: float | None = None
    consistency: float | None = None

    @property
    def address(self) -> Head:
        return Head(self.layer, self.head)

    @property
    def sensitivity_score(self) -> float | None:
        """What heads are ranked by under `criteria=robust`; None where it was not measured."""
        return sensitivity_score(self.sensitivity, self.consistency)


@dataclass(frozen=True)
class HeadRanking:
    """The heads of a model, best first, and the recipe that ranked them.

    Args:
        heads: every head of the model, the kept ones first; after reading from JSON only the kept ones.
        tau: threshold of criterion 1, averaged over the trials (and, with `per_sample`, over their samples); None for
            `elbow="index"`, which has none.
        spread: what the standard deviations are over.
        pictures: keys of the images that the heads were found on, so that they are not evaluated on these.
        found_with: how the model was prompted (`heads.ready`); None if unknown.
    """

    heads: tuple[RankedHead, ...]
    tau: float | None
    top_n: int
    num_samples: int
    num_trials: int
    options: CriteriaOptions = field(default_factory=CriteriaOptions)
    model: str = ""
    spread: Spread = "draws"
    pictures: tuple[str, ...] = ()
    found_with: FoundWith | None = None

    CSV_HEADER = ("rank", "layer", "head", *EVIDENCE, "kept")

    @property
    def exclude_layers(self) -> int:
        return self.options.exclude_layers

    @property
    def kept(self) -> tuple[RankedHead, ...]:
        """The heads that pass criterion 1, best first."""
        return tuple(head for head in self.heads if head.kept)

    @property
    def has_sensitivity(self) -> bool:
        """Whether the sensitivity was measured."""
        return any(head.sensitivity is not None for head in self.heads)

    def __str__(self) -> str:
        return _as_text(self._title, self.kept)

    def _repr_html_(self) -> str:
        return _as_html(self._title, self.kept)

    @property
    def _title(self) -> str:
        samples = f"{self.num_samples} sample{'s' if self.num_samples != 1 else ''}"
        return f"{len(self.kept)} heads of {self.model or 'a model'} over {samples}"

    def top(self, k: int = 3) -> list[Head]:
        """The `k` localization heads (Sec. 4.3; the paper takes three).

        Raises:
            ValueError: if fewer than `k` heads passed criterion 1, or `k` is below 1.
        """
        if k < 1:
            raise ValueError(f"the number of heads must be at least 1, not {k}")
        if len(self.kept) < k:
            raise ValueError(f"only {len(self.kept)} heads passed criterion 1: {k} cannot be taken")
        return [head.address for head in self.kept[:k]]

    def csv_rows(self) -> Iterator[tuple[object, ...]]:
        """One row per head, ranked from 1, in the order of `csv_header`; unknown values are empty."""
        for rank, head in enumerate(self.heads, start=1):
            yield rank, *(_cell(getattr(head, name)) for name in self.csv_header[1:])

    @property
    def csv_header(self) -> tuple[str, ...]:
        return (*self.CSV_HEADER, "sensitivity", "consistency") if self.has_sensitivity else self.CSV_HEADER

    def to_json(self) -> dict[str, Any]:
        """The content of `heads.json`: plain values, numbers rounded to six decimals, kept heads only."""
        return {
            "version": 1,
            "model": self.model,
            "num_samples": self.num_samples,
            "num_trials": self.num_trials,
            "spread": self.spread,
            "tau": None if self.tau is None else _rounded(self.tau),
            "top_n": self.top_n,
            "exclude_layers": self.options.exclude_layers,
            "criteria": _options_to_json(self.options),
            **({} if self.found_with is None else {"found_with": dict(self.found_with)}),
            "heads": [_head_to_json(head) for head in self.kept],
            **({"resting": [list(head.address) for head in resting_heads(self)]} if self.has_sensitivity else {}),
            "pictures": list(self.pictures),
        }

    @classmethod
    def from_json(cls, data: object) -> HeadRanking:
        """Read what `to_json` wrote, or a hand-made file with the same keys; the order of heads is kept.

        Raises:
            UsageError: naming what is wrong, for anything that is not such a ranking.
        """
        fields = Fields(data, "heads.json")
        if fields.integer("version", 1) != 1:
            raise UsageError(f"heads.json: version must be 1, not {shown(fields.values['version'])}")
        heads = tuple(_head_from_json(entry, number) for number, entry in enumerate(fields.sequence("heads")))
        if duplicate := find_duplicate(head.address for head in heads):
            raise UsageError(f"heads.json: {duplicate} is listed twice")
        return cls(
            heads=heads,
            tau=fields.number("tau"),
            top_n=fields.integer("top_n", 1),
            num_samples=fields.integer("num_samples", 1),
            num_trials=fields.integer("num_trials", 1),
            options=_options_from_json(fields),
            model=fields.text("model"),
            spread=_spread_from_json(fields),
            pictures=_pictures_from_json(fields),
            found_with=_found_with_from_json(fields),
        )


def _found_with_from_json(fields: Fields) -> FoundWith | None:
    """None in files of older versions and hand-made ones; unknown keys are ignored."""
    given = fields.values.get("found_with")
    if given is None:
        return None
    inner = Fields(given, "heads.json: found_with")
    return {name: inner.text(name) for name in KEYS if inner.values.get(name) is not None}


def _pictures_from_json(fields: Fields) -> tuple[str, ...]:
    """Empty for files of older versions and hand-made ones."""
    names = fields.sequence("pictures") if "pictures" in fields.values else []
    if not all(isinstance(name, str) for name in names):
        raise UsageError("heads.json: 'pictures' must be a list of texts")
    return tuple(str(name) for name in names)


def _rounded(value: float) -> float:
    return round(float(value), 6)


def _cell(value: float | None) -> float | str:
    return "" if value is None else int(value) if isinstance(value, int) else _rounded(value)


def resting_heads(ranking: HeadRanking) -> tuple[RankedHead, ...]:
    """The heads that the paper's criteria may mistake for localization heads: their maps do not follow the expression.

    These are the kept heads with at least the average attention sum of the kept heads, and a sensitivity score below
    `RESTING_SHARE` of the highest. Empty if sensitivity was not measured.
    """
    known = [(head, head.sensitivity_score) for head in ranking.kept]
    highest = max((score for _, score in known if score is not None), default=0.0)
    average = fmean(head.attention_sum for head, _ in known) if known else 0.0
    return tuple(
        head
        for head, score in known
        if score is not None and score < RESTING_SHARE * highest and head.attention_sum >= average
    )


def _options_to_json(options: CriteriaOptions) -> dict[str, Any]:
    with_sensitivity = options.sensitivity != "none"
    values = {
        name: getattr(options, name) for name in _CRITERIA if with_sensitivity or name not in _SENSITIVITY_OPTIONS
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _head_to_json(head: RankedHead) -> dict[str, Any]:
    values = {name: getattr(head, name) for name in (*EVIDENCE, *OPTIONAL_EVIDENCE)}
    numbers = {name: None if value is None else _rounded(value) for name, value in values.items()}
    known = {name: value for name, value in numbers.items() if value is not None or name in EVIDENCE}
    return {"layer": head.layer, "head": head.head, **known}


def _head_from_json(entry: object, number: int) -> RankedHead:
    fields = Fields(entry, f"heads.json: heads[{number}]")
    return RankedHead(
        layer=fields.integer("layer"),
        head=fields.integer("head"),
        selection_frequency=fields.required_number("selection_frequency", 0.0, 1.0),
        selection_frequency_std=fields.required_number("selection_frequency_std", 0.0),
        attention_sum=fields.required_number("attention_sum"),
        spatial_entropy=fields.number("spatial_entropy", 0.0),
        score=fields.number_if_given("score"),
        score_std=fields.number_if_given("score_std", 0.0),
        sensitivity=fields.number_if_given("sensitivity", 0.0, 1.0),
        consistency=fields.number_if_given("consistency", 0.0, 1.0),
    )


def _spread_from_json(fields: Fields) -> Spread:
    """What the standard deviations are over; older files do not say, and default to the paper's draws."""
    given = fields.values.get("spread", "draws")
    for known in get_args(Spread):
        if given == known:
            return cast(Spread, known)
    raise UsageError(f"heads.json: spread must be {' or '.join(get_args(Spread))}, not {shown(given)}")


def _options_from_json(fields: Fields) -> CriteriaOptions:
    """The criteria that the heads were found with; the paper's if the file has none."""
    given = fields.values.get("criteria", {})
    if not isinstance(given, dict) or not set(given) <= set(_CRITERIA):
        raise UsageError(f"heads.json: criteria must hold only {', '.join(sorted(_CRITERIA))}")
    for name, value in given.items():
        if not _is_plain(value):
            raise UsageError(f"heads.json: criteria: {name} cannot be {shown(value)}")
    try:
        return CriteriaOptions(exclude_layers=fields.integer("exclude_layers"), **given)
    except ValueError as error:
        raise UsageError(f"heads.json: criteria: {error}") from None


def _is_plain(value: object) -> bool:
    """Whether a value is a short text, a number, None or a few short texts, as the criteria's options are."""
    if isinstance(value, list):
        return len(value) <= 8 and all(isinstance(item, str) and len(item) <= 40 for item in value)
    if isinstance(value, str):
        return len(value) <= 40
    return value is None or (isinstance(value, int | float) and abs(value) < 1e300)


def _as_text(title: str, heads: Sequence[RankedHead]) -> str:
    """A plain-text table of the first heads."""
    rows = [COLUMN_NAMES, *_rows(heads)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMN_NAMES))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([title, *lines, *_remainder(heads)])


def _as_html(title: str, heads: Sequence[RankedHead]) -> str:
    """An HTML table of the first heads."""
    head = "".join(f"<th>{name}</th>" for name in COLUMN_NAMES)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in _rows(heads))
    remainder = "".join(f"<p>{escape(line)}</p>" for line in _remainder(heads))
    return f"<table><caption>{escape(title)}</caption><tr>{head}</tr>{body}</table>{remainder}"


def _rows(heads: Sequence[RankedHead]) -> Iterator[tuple[str, ...]]:
    for rank, one in enumerate(heads[:MAX_ROWS], start=1):
        frequency = f"{one.selection_frequency:.3f} ± {one.selection_frequency_std:.3f}"
        entropy = "-" if one.spatial_entropy is None else f"{one.spatial_entropy:.3f}"
        yield str(rank), str(one.address), frequency, f"{one.attention_sum:.3f}", entropy


def _remainder(heads: Sequence[RankedHead]) -> list[str]:
    return [f"and {len(heads) - MAX_ROWS} more"] if len(heads) > MAX_ROWS else []
