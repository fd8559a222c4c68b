"""How heads were found: which weights were asked, and how. Found in another way, others might be the best."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files

from localization_heads.heads.criteria import CriteriaOptions

FoundWith = Mapping[str, str | None]
"""`found_with` of `heads.json`: its keys are `KEYS`, those of other tools and older files may be fewer."""

KEYS = ("conv_mode", "system", "query_token", "weights", "criteria", "heads_by", "library")


def asked(conv_mode: str, system: str, query_token: str, weights: str) -> dict[str, str | None]:
    """How a model is asked. The system sentence is a part of the paper's prompt only."""
    return {
        "conv_mode": conv_mode,
        "system": system if conv_mode == "referseg" else None,
        "query_token": query_token,
        "weights": weights,
    }


def found_with(asked: FoundWith, options: CriteriaOptions) -> FoundWith:
    """What `heads.json` says of the model, of how it was asked (`LVLM.asked`), and of the recipe."""
    from localization_heads import __version__

    library = f"localization-heads {__version__}"
    known = {**asked, "criteria": preset_of(options), "library": library}
    return {name: value for name, value in known.items() if value is not None}


def preset_of(options: CriteriaOptions) -> str | None:
    """The file of `config/criteria/` that holds these options; None for others.

    >>> preset_of(CriteriaOptions()), preset_of(CriteriaOptions(tau=0.5))
    ('paper', None)
    """
    return next((name for name, preset in _presets().items() if preset == options), None)


@cache
def _presets() -> dict[str, CriteriaOptions]:
    from omegaconf import OmegaConf

    folder = files("localization_heads") / "config" / "criteria"
    found = sorted(f.name for f in folder.iterdir() if f.name.endswith(".yaml"))
    read = {
        name: OmegaConf.to_container(OmegaConf.create((folder / name).read_text("utf-8"))) for name in found
    }
    return {
        name.removesuffix(".yaml"): CriteriaOptions(**{str(key): value for key, value in options.items()})
        for name, options in read.items()
        if isinstance(options, dict)
    }


def difference(found: FoundWith, asked: FoundWith) -> str | None:
    """In words, what is not now as it was when heads were found; None if all that is known of it is the same.

    >>> difference({"conv_mode": "chat", "weights": "1a"}, {"conv_mode": "plain", "weights": "1a"})
    'found with conv_mode=chat (here: plain)'
    """
    others = [name for name in ("conv_mode", "query_token", "weights") if _differs(name, found, asked)]
    parts = [f"{name}={_short(found[name])} (here: {_short(asked[name])})" for name in others]
    if "conv_mode" not in others and _differs("system", found, asked):
        parts.append("another system sentence")
    return f"found with {', '.join(parts)}" if parts else None


def _differs(name: str, found: FoundWith, asked: FoundWith) -> bool:
    return found.get(name) is not None and asked.get(name) is not None and found[name] != asked[name]


def _short(value: str | None) -> str:
    """Of a file from anywhere: one line, not too long."""
    return " ".join(str(value).split())[:40]
