"""`python -m localization_heads.apps.demo`: a web page on this machine."""

from __future__ import annotations

import sys
from typing import Any

from localization_heads.apps.frontdoor import plain_options
from localization_heads.apps.frontdoor import run as run_front_door


def main() -> int:
    """The exit status: 0 the page was closed, 1 the model failed, 2 wrong use."""
    return run_front_door(_main, "demo", "python -m localization_heads.apps.demo")


def _main(cfg: Any) -> int:
    from hydra.core.hydra_config import HydraConfig

    from localization_heads.apps.demo.guard import direct_connections
    from localization_heads.errors import UsageError
    from localization_heads.options.programs import DemoOptions
    from localization_heads.stages.run import DemoRun

    hydra = HydraConfig.get()
    run = DemoRun(
        DemoOptions.of(plain_options(cfg)), hydra.runtime.choices["model"], tuple(hydra.overrides.task)
    )
    try:
        with direct_connections():
            import gradio  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError("the demo needs an extra: pip install 'localization-heads[demo]'") from None
    from localization_heads.apps.demo.page import serve

    serve(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
