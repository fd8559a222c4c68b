"""How heads were found: which weights were asked, and how. Found in another way, others might be the best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from statistics import fmean
from typing import Any, Literal, cast, get_args

from localization_heads.errors import UsageError, shown
from localization_heads.heads.fields import Fields
from localization_heads.heads.head import Head, repeated
from localization_heads.heads.sensitivity import RESTING, movement_of
from localization_heads.heads.table import as_html, as_text
from localization_heads.options.compose import choices_of, preset
from localization_heads.options.groups import CriteriaOptions, SensitivityOptions

FoundWith = Mapping[str, str | None]
"""`found_with` of `heads.json`: its keys are `KEYS`, those of other tools and older files may be fewer."""

NATIVE_BOX = "native_box"
"""The `conv_mode` of heads that were found while the model wrote a box of its own: the prompt that asks it for one."""

KEYS = (
    "conv_mode", "system", "query_token", "paraphrases", "weights", "criteria", "heads_by", "num_labels", "shrink",
    "library",
)  # fmt: skip


def asked(
    conv_mode: str, system: str, query_token: str, weights: str, paraphrases: Sequence[str] | None = None
) -> dict[str, str | None]:
    """How a model is asked. The system sentence is a part of the paper's prompt only.

    Heads are found in the maps of the last prompt token whether the answer's tokens are read beside it or not.
    """
    return {
        "conv_mode": conv_mode,
        "system": system if conv_mode == "referseg" else None,
        "query_token": "last" if query_token == "last_and_answer" else query_token,
        "paraphrases": "; ".join(paraphrases) if paraphrases else None,
        "weights": weights,
    }


def found_with(asked: FoundWith, options: CriteriaOptions, labels: FoundWith | None = None) -> FoundWith:
    """What `heads.json` says of the model, of how it was asked (`LVLM.asked`), and of the recipe.

    Args:
        labels: `heads_by` and what else is known of a ranking by labels, which then take the place of the criteria.
    """
    from localization_heads.version import __version__

    library = f"localization-heads {__version__}"
    recipe = {"criteria": preset_of(options)} if labels is None else labels
    known = {**asked, **recipe, "library": library}
    return {name: value for name, value in known.items() if value is not None}


def preset_of(options: CriteriaOptions) -> str | None:
    """The file of `config/criteria/` that holds these options; None for others.

    >>> preset_of(CriteriaOptions()), preset_of(CriteriaOptions(tau=0.5))
    ('paper', None)
    """
    return next((name for name, preset in _presets().items() if preset == options), None)


@cache
def _presets() -> dict[str, CriteriaOptions]:
    return {name: CriteriaOptions.of(preset("criteria", name)) for name in choices_of("criteria")}


def difference(found: FoundWith, asked: FoundWith) -> str | None:
    """In words, what is not now as it was when heads were found; None if all that is known of it is the same.

    >>> difference({"conv_mode": "chat", "weights": "1a"}, {"conv_mode": "plain", "weights": "1a"})
    'found with conv_mode=chat (here: plain)'
    """
    others = [
        name
        for name in ("conv_mode", "query_token", "paraphrases", "weights")
        if _differs(name, found, asked)
    ]
    parts = [f"{name}={_short(found[name])} (here: {_short(asked[name])})" for name in others]
    if "conv_mode" not in others and _differs("system", found, asked):
        parts.append("another system sentence")
    return f"found with {', '.join(parts)}" if parts else None


def _differs(name: str, found: FoundWith, asked: FoundWith) -> bool:
    return found.get(name) is not None and asked.get(name) is not None and found[name] != asked[name]


def _short(value: str | None) -> str:
    """Of a file from anywhere: one line, not too long."""
    return " ".join(str(value).split())[:40]


_CRITERIA = tuple(option.name for option in fields(CriteriaOptions) if option.name != "exclude_layers")
"""The options that `heads.json` keeps under `criteria`; the excluded layers stand beside them."""
_THIRD = tuple(option.name for option in fields(SensitivityOptions))
"""Those of them that it keeps only where the third criterion was asked for."""

_BY_LABELS = ("score", "score_std")
Spread = Literal["draws", "bootstrap"]
"""Where a standard deviation comes from: random draws of a pool, or resamples of a pool too small to draw from."""


@dataclass(frozen=True)
class RankedHead:
    """One head with its evidence; averages are over the samples drawn.

    Args:
        selection_frequency: share of the samples that marked it, averaged over the trials, 0 to 1.
        selection_frequency_std: its (population) standard deviation over the trials, or over as many
            bootstrap resamples: `HeadRanking.spread` says which.
        attention_sum: mean attention sum.
        spatial_entropy: mean over the samples where it is finite, in nats; none if there is no such sample.
        kept: whether criterion 1 keeps it; of a ranking by labels, whether its layer is not left out.
        score: mean score by labels (`heads.labels`), and `score_std` its deviation over draws; None without labels.
        sensitivity: how far its map moves with the expression, 0 to 1, and `consistency`: the overlap with that of
            the mirrored image (`heads.sensitivity`); None where that was not measured.
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
    def movement(self) -> float | None:
        """What the third criterion ranks by; None where it was not measured."""
        return movement_of(self.sensitivity, self.consistency)


@dataclass(frozen=True)
class HeadRanking:
    """The heads of a model, best first, and the recipe that ranked them.

    `heads` holds every head of the model, the kept ones first; read back from JSON, the kept ones only.
    `tau` is the threshold of criterion 1 averaged over the trials (and over their samples, where each has its own);
    none for `elbow="index"`, which has none.
    `pictures` names the images that the heads were found on, so that they are not scored on them.
    `found_with` says how the model was asked (`heads.found_with`); None where that is not known.
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

    CSV_HEADER = (
        "rank",
        "layer",
        "head",
        "selection_frequency",
        "selection_frequency_std",
        "attention_sum",
        "spatial_entropy",
        "kept",
    )

    @property
    def exclude_layers(self) -> int:
        return self.options.exclude_layers

    @property
    def kept(self) -> tuple[RankedHead, ...]:
        """The heads that pass criterion 1, best first."""
        return tuple(head for head in self.heads if head.kept)

    @property
    def is_moved(self) -> bool:
        """Whether the third criterion was measured."""
        return any(head.sensitivity is not None for head in self.heads)

    def __str__(self) -> str:
        return as_text(self._title, self.kept)

    def _repr_html_(self) -> str:
        return as_html(self._title, self.kept)

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
        """A row a head, ranked from 1, in the order of `csv_header`; what is not known is empty."""
        for rank, head in enumerate(self.heads, start=1):
            entropy = "" if head.spatial_entropy is None else _rounded(head.spatial_entropy)
            frequency = _rounded(head.selection_frequency), _rounded(head.selection_frequency_std)
            yield (
                rank,
                head.layer,
                head.head,
                *frequency,
                _rounded(head.attention_sum),
                entropy,
                int(head.kept),
                *(_moved_cells(head) if self.is_moved else ()),
            )

    @property
    def csv_header(self) -> tuple[str, ...]:
        return (*self.CSV_HEADER, "sensitivity", "consistency") if self.is_moved else self.CSV_HEADER

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
            **({"resting": [list(head.address) for head in resting(self)]} if self.is_moved else {}),
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
        if twice := repeated(head.address for head in heads):
            raise UsageError(f"heads.json: {twice} is listed twice")
        return cls(
            heads=heads,
            tau=fields.number("tau"),
            top_n=fields.integer("top_n", 1),
            num_samples=fields.integer("num_samples", 1),
            num_trials=fields.integer("num_trials", 1),
            options=_options_from_json(fields),
            model=fields.text("model"),
            spread=_spread_from_json(fields),
            pictures=_images_from_json(fields),
            found_with=_found_with_from_json(fields),
        )


def _found_with_from_json(fields: Fields) -> FoundWith | None:
    """None in files of earlier versions and hand-made ones; what nobody here knows is passed over."""
    given = fields.values.get("found_with")
    if given is None:
        return None
    inner = Fields(given, "heads.json: found_with")
    return {name: inner.text(name) for name in KEYS if inner.values.get(name) is not None}


def _images_from_json(fields: Fields) -> tuple[str, ...]:
    """None in files of earlier versions and hand-made ones."""
    names = fields.sequence("pictures") if "pictures" in fields.values else []
    if not all(isinstance(name, str) for name in names):
        raise UsageError("heads.json: 'pictures' must be a list of texts")
    return tuple(str(name) for name in names)


def _rounded(value: float) -> float:
    return round(float(value), 6)


def _moved_cells(head: RankedHead) -> tuple[float | str, ...]:
    known = (head.sensitivity, head.consistency)
    return tuple("" if value is None else _rounded(value) for value in known)


def resting(ranking: HeadRanking) -> tuple[RankedHead, ...]:
    """The heads that both of the paper's criteria may take for localization heads, and that do not follow the
    expression: kept, of at least the average attention sum of those kept, and of less than `RESTING` of the movement
    of the one that moves most. None where that was not measured.
    """
    known = [(head, head.movement) for head in ranking.kept]
    most = max((movement for _, movement in known if movement is not None), default=0.0)
    average = fmean(head.attention_sum for head, _ in known) if known else 0.0
    return tuple(
        head
        for head, movement in known
        if movement is not None and movement < RESTING * most and head.attention_sum >= average
    )


def _options_to_json(options: CriteriaOptions) -> dict[str, Any]:
    third = options.sensitivity != "none"
    values = {name: getattr(options, name) for name in _CRITERIA if third or name not in _THIRD}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _head_to_json(head: RankedHead) -> dict[str, Any]:
    moved = {"sensitivity": head.sensitivity, "consistency": head.consistency}
    return {
        "layer": head.layer,
        "head": head.head,
        "selection_frequency": _rounded(head.selection_frequency),
        "selection_frequency_std": _rounded(head.selection_frequency_std),
        "attention_sum": _rounded(head.attention_sum),
        "spatial_entropy": None if head.spatial_entropy is None else _rounded(head.spatial_entropy),
        **{name: _rounded(value) for name in _BY_LABELS if (value := getattr(head, name)) is not None},
        **{name: _rounded(value) for name, value in moved.items() if value is not None},
    }


def _head_from_json(entry: object, number: int) -> RankedHead:
    fields = Fields(entry, f"heads.json: heads[{number}]")
    return RankedHead(
        layer=fields.integer("layer"),
        head=fields.integer("head"),
        selection_frequency=fields.required_number("selection_frequency", 0.0, 1.0),
        selection_frequency_std=fields.required_number("selection_frequency_std", 0.0),
        attention_sum=fields.required_number("attention_sum"),
        spatial_entropy=fields.number("spatial_entropy", 0.0),
        score=fields.number("score") if "score" in fields.values else None,
        score_std=fields.number("score_std", 0.0) if "score_std" in fields.values else None,
        sensitivity=fields.number_if_given("sensitivity", 0.0, 1.0),
        consistency=fields.number_if_given("consistency", 0.0, 1.0),
    )


def _spread_from_json(fields: Fields) -> Spread:
    """What the deviations are over; older files do not say, and draws are what the paper has."""
    given = fields.values.get("spread", "draws")
    for known in get_args(Spread):
        if given == known:
            return cast(Spread, known)
    raise UsageError(f"heads.json: spread must be {' or '.join(get_args(Spread))}, not {shown(given)}")


def _options_from_json(fields: Fields) -> CriteriaOptions:
    """The recipe's reading; a file without `criteria` is taken as the paper's."""
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
    """A short text, a number, none or a few texts: what an option of the criteria can be."""
    if isinstance(value, list):
        return len(value) <= 8 and all(isinstance(item, str) and len(item) <= 40 for item in value)
    if isinstance(value, str):
        return len(value) <= 40
    return value is None or (isinstance(value, int | float) and abs(value) < 1e300)
