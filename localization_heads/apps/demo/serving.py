"""Serves the page: on which address, with which bounds, and without fetching anything from elsewhere."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
from gradio import processing_utils
from starlette.middleware import Middleware

from localization_heads.apps.demo.guard import (
    MAX_UPLOAD,
    BoundedRequests,
    check_address,
    direct_connections,
    note_missing_certificates,
    own_folder,
)
from localization_heads.apps.demo.page import build
from localization_heads.apps.demo.visitors import MAX_VISITORS
from localization_heads.errors import UsageError
from localization_heads.stages.run import DemoRun

SYSTEM = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
"""Fonts of the visitor's machine: the page fetches nothing."""
MAX_QUEUE = 200  # requests that wait, of all visitors
CSS = "#grid img, #grid button {cursor: crosshair} footer {display: none !important}"


def serve(run: DemoRun) -> None:
    """Load the model and serve the page until Ctrl-C or SIGTERM. UsageError if the port or the folder is no good."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the page's files go, as with Ctrl-C
    with served(run) as blocks:
        blocks.block_thread()


@contextmanager
def served(run: DemoRun, **options: Any) -> Iterator[gr.Blocks]:
    """The page while it is served, to this machine unless `host` says otherwise. Its address is `local_url`.

    Nothing is fetched from elsewhere, neither for the page nor for a visitor who sends an address instead of an image.
    Afterwards the page's files are gone.
    """
    check_address(run.options.host, run.options.port)
    note_missing_certificates()
    with own_folder() as folder, refused_addresses():
        page, blocks = build(run, folder)
        blocks.queue(api_open=False, max_size=MAX_QUEUE, default_concurrency_limit=None)
        bounds = {"middleware": [Middleware(BoundedRequests, make_room=page.make_room)]}
        try:
            with direct_connections():
                blocks.launch(
                    server_name=run.options.host,
                    server_port=run.options.port,
                    inbrowser=run.options.open_browser,
                    prevent_thread_lock=True,
                    share=False,
                    show_error=True,
                    max_file_size=MAX_UPLOAD,
                    state_session_capacity=MAX_VISITORS,
                    theme=gr.themes.Default(font=SYSTEM, font_mono=("ui-monospace", "monospace")),
                    css=CSS,
                    app_kwargs=bounds,
                    **options,
                )
        except OSError as error:
            raise UsageError(f"host={run.options.host} port={run.options.port}: {error}") from error
        try:
            yield blocks
        finally:
            page.visitors.close()
            blocks.close(verbose=False)


@contextmanager
def refused_addresses() -> Iterator[None]:
    """gradio would fetch any public address that is sent in place of a file, of any size, into its folder."""

    async def refuse(url: str, cache_dir: str) -> str:
        raise gr.Error("addresses are not fetched: choose a file", print_exception=False)

    before = processing_utils.async_ssrf_protected_download
    processing_utils.async_ssrf_protected_download = refuse
    try:
        yield
    finally:
        processing_utils.async_ssrf_protected_download = before
