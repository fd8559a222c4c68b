"""Serve the page on an address, with limits, and without fetching anything from the network."""

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
    temporary_folder,
    warn_of_missing_certificates,
    without_proxies,
)
from localization_heads.apps.demo.page import build
from localization_heads.apps.demo.visitors import MAX_VISITORS
from localization_heads.errors import UsageError
from localization_heads.stages.run import DemoRun

SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
"""Fonts of the visitor's machine, so that the page downloads none."""
MAX_QUEUE = 200  # pending requests of all visitors
CSS = "#grid img, #grid button {cursor: crosshair} footer {display: none !important}"


def serve(run: DemoRun) -> None:
    """Load the model and serve the page until Ctrl-C or SIGTERM. UsageError if address or folder cannot be used."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # removes the page's files, as Ctrl-C does
    with background_server(run) as blocks:
        blocks.block_thread()


@contextmanager
def background_server(run: DemoRun, **options: Any) -> Iterator[gr.Blocks]:
    """Serve the page while the block runs, at the address `local_url` of the yielded blocks.

    Nothing is fetched from the network, neither for the page nor for a visitor who sends an address instead of an
    image. The page's files are removed afterwards.
    """
    check_address(run.options.host, run.options.port)
    warn_of_missing_certificates()
    with temporary_folder() as folder, refuse_addresses():
        page, blocks = build(run, folder)
        blocks.queue(api_open=False, max_size=MAX_QUEUE, default_concurrency_limit=None)
        app_kwargs = {"middleware": [Middleware(BoundedRequests, make_room=page.make_room)]}
        try:
            with without_proxies():
                blocks.launch(
                    server_name=run.options.host,
                    server_port=run.options.port,
                    inbrowser=run.options.open_browser,
                    prevent_thread_lock=True,
                    share=False,
                    show_error=True,
                    max_file_size=MAX_UPLOAD,
                    state_session_capacity=MAX_VISITORS,
                    theme=gr.themes.Default(font=SYSTEM_FONTS, font_mono=("ui-monospace", "monospace")),
                    css=CSS,
                    app_kwargs=app_kwargs,
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
def refuse_addresses() -> Iterator[None]:
    """Refuse addresses sent in place of a file: gradio would download them, whatever their size."""

    async def refuse(url: str, cache_dir: str) -> str:
        raise gr.Error("addresses are not fetched: choose a file", print_exception=False)

    download = processing_utils.async_ssrf_protected_download
    processing_utils.async_ssrf_protected_download = refuse
    try:
        yield
    finally:
        processing_utils.async_ssrf_protected_download = download
