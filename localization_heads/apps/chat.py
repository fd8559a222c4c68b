"""`cli_llava.py`: one question about a picture, or a conversation on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from localization_heads.apps.frontdoor import plain_options
from localization_heads.apps.frontdoor import run as run_front_door

if TYPE_CHECKING:
    from localization_heads.stages.run import Run


def main() -> int:
    """The exit status: 0 all went well, 1 the model failed, 2 wrong use."""
    return run_front_door(_main, "chat", "python cli_llava.py")


def _main(cfg: Any) -> int:
    from hydra.core.hydra_config import HydraConfig

    from localization_heads.errors import UsageError
    from localization_heads.stages.run import Run

    run = Run(plain_options(cfg), model_choice=HydraConfig.get().runtime.choices["model"])
    if run["max_new_tokens"] < 1:
        raise UsageError("max_new_tokens=0: give a whole number of at least 1")
    if run["cli_mode"]:
        from localization_heads.apps.terminal import converse

        return converse(run)
    if not run["query"]:
        raise UsageError("query= is missing: ask something, or start a conversation with cli_mode=true")
    return _answer_once(run)


def _answer_once(run: Run) -> int:
    from localization_heads.apps.terminal import print_answer, start

    conversation = start(run)
    print_answer(conversation, str(run["query"]))
    return 0
