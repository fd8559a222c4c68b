"""`python -m localization_heads.apps.demo`: serve the demo on this machine."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from localization_heads.apps.frontdoor import CommandLine, called_as, run


def main() -> int:
    """Serve the demo. Returns the exit status: 0 the page was closed, 1 the model failed, 2 wrong use."""
    return run(_main, "demo", called_as())


def _main(command_line: CommandLine) -> int:
    from localization_heads.apps.demo.guard import without_proxies
    from localization_heads.errors import UsageError
    from localization_heads.packages import GRADIO, check_version
    from localization_heads.stages.run import DemoRun

    if find_spec("gradio") is None:
        raise UsageError("the demo needs an extra: pip install 'localization-heads[demo]'")
    check_version("gradio", GRADIO)
    with without_proxies():
        import gradio  # noqa: F401
    from localization_heads.apps.demo.serving import serve

    serve(DemoRun(*command_line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
