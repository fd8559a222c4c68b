"""`cli_llava.py`: one question about an image, or a conversation on the terminal."""

from __future__ import annotations

from typing import Any

from localization_heads.apps.frontdoor import plain_options
from localization_heads.apps.frontdoor import run as run_front_door


def main() -> int:
    """The exit status: 0 all went well, 1 the model failed, 2 wrong use."""
    return run_front_door(_main, "chat", "python cli_llava.py")


def _main(cfg: Any) -> int:
    from hydra.core.hydra_config import HydraConfig

    from localization_heads.apps.terminal import converse, print_answer, start
    from localization_heads.errors import UsageError
    from localization_heads.options.programs import ChatOptions
    from localization_heads.stages.run import ChatRun

    hydra = HydraConfig.get()
    options = ChatOptions.of(plain_options(cfg))
    run = ChatRun(options, hydra.runtime.choices["model"], tuple(hydra.overrides.task))
    if options.cli_mode:
        return converse(run)
    if not options.query:
        raise UsageError("query= is missing: ask something, or start a conversation with cli_mode=true")
    print_answer(start(run), options.query)
    return 0
