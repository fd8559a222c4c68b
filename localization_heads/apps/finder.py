"""`localization_heads_finder.py` and `locheads`: one stage a run."""

from __future__ import annotations

from typing import Any

from localization_heads.apps.frontdoor import plain_options
from localization_heads.apps.frontdoor import run as run_front_door


def main() -> int:
    """The exit status: 0 all went well, 1 some entry or work failed, 2 wrong use."""
    return run_front_door(_main, "finder", "python localization_heads_finder.py")


def _main(cfg: Any) -> int:
    from hydra.core.hydra_config import HydraConfig

    from localization_heads.apps.finder_stages import run_stage
    from localization_heads.options.programs import FinderOptions
    from localization_heads.stages.run import Run

    hydra = HydraConfig.get()
    run = Run(
        FinderOptions.of(plain_options(cfg)), hydra.runtime.choices["model"], tuple(hydra.overrides.task)
    )
    return run_stage(run)
