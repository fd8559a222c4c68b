"""`localization_heads_finder.py` and `locheads`: one stage a run."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

from localization_heads.apps.frontdoor import plain_options
from localization_heads.apps.frontdoor import run as run_front_door
from localization_heads.errors import printable

if TYPE_CHECKING:
    from localization_heads.stages.run import Run

_RARELY = (50_000, 20, 100)
"""Allocations between two collections of garbage: the libraries' million objects are looked through less often."""


def main() -> int:
    """The exit status: 0 all went well, 1 some entry or work failed, 2 wrong use."""
    return run_front_door(_main, "finder", "python localization_heads_finder.py")


def _main(cfg: Any) -> int:
    from hydra.core.hydra_config import HydraConfig

    gc.set_threshold(*_RARELY)
    from localization_heads.apps.finder_stages import run_stage
    from localization_heads.options.programs import FinderOptions
    from localization_heads.stages.run import Run

    hydra = HydraConfig.get()
    options = FinderOptions.of(plain_options(cfg))  # first: the overrides may hold what cannot be resolved
    model, overrides = hydra.runtime.choices["model"], tuple(hydra.overrides.task)
    run = Run(options, model, overrides, before_model=_announce)
    return run_stage(run)


def _announce(run: Run) -> None:
    """One line within a second of the command: what may be wrong with it is found by then, what takes time begins."""
    from localization_heads.apps.tables import show

    # An image's address may hold a secret, which its own text leaves out.
    name = run.image(run.options.image_file) if run.options.image_file else run.options.data_file
    show(
        printable(f"stage={run.options.stage}  {run.spec.name}  {name or ''}".rstrip()),
        markup=False,
        highlight=False,
    )
