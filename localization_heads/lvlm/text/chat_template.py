"""Rendering of chat templates, which are untrusted programs, in a child process that can be killed.

Jinja's sandbox keeps a template away from files and from Python, but does not bound its time and memory: three nested
ranges loop forever, `9 ** (9 ** 9)` never returns from C, one filter builds a text of gigabytes. So the operating
system enforces limits on the child's time, memory and output. The child starts once, while the weights are loaded
(half a second, without torch), and then renders a prompt in a fraction of a millisecond. This file holds both the
parent's side and the child's. The embedded model's own template is trusted and rendered in-process.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from localization_heads.errors import WorkError, first_line

log = logging.getLogger(__name__)

TIMEOUT = 10.0
"""Seconds for one rendering."""
MAX_MEMORY = 512 << 20
"""Bytes that a rendering may allocate on top of the child's own (Linux only; elsewhere only the timeout applies)."""
MAX_LENGTH = 1_000_000
"""Characters in a prompt."""
_STARTUP_TIMEOUT = 120.0
_CHILD = "import sys; sys.path[:] = sys.argv[1:]; from localization_heads.lvlm.text.chat_template import serve; serve()"
_CANNOT_START = "the process that renders chat templates cannot be started"

Messages = Sequence[Mapping[str, Any]]


class TemplateError(Exception):
    """The template failed or exceeded a limit. The message is one line."""


class TemplateProcess:
    """The parent's side of the child process, which starts when first needed and restarts after it was killed.

    Thread-safe. A template whose rendering was killed once is refused from then on.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start over without a child: after a fork, the existing one belongs to the parent process."""
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        self._killed_templates: set[str] = set()

    def start(self) -> None:
        """Start the child without waiting for it."""
        with self._lock:
            self._get_child()

    def render(self, template: str, messages: Messages, variables: Mapping[str, Any]) -> str:
        """Return the prompt, up to where the answer begins.

        Raises:
            TemplateError: the template failed or exceeded a limit.
            WorkError: the child cannot be started.
        """
        request = {"template": template, "messages": messages, "variables": variables, "timeout": TIMEOUT}
        with self._lock:
            if template in self._killed_templates:
                raise TemplateError("its rendering was killed before")
            try:
                response = self._request(json.dumps(request, default=str).encode())
            except BaseException:
                self._kill()  # a late response would be taken for that to the next request
                raise
            if response is None:
                self._kill()
                self._killed_templates.add(template)
                reason = f"it crashed, or ran for more than {TIMEOUT:g} s"
                log.warning("the rendering of the chat template was killed: %s", reason)
                raise TemplateError(reason)
        return _rendered_text(response)

    def close(self) -> None:
        with self._lock:
            self._kill()

    def _request(self, request: bytes) -> dict[str, str] | None:
        """Return the child's response; None if it died first."""
        child = self._get_child()
        assert child.stdin is not None
        if not self._is_ready:
            if _read_response(child, _STARTUP_TIMEOUT) is None:
                raise WorkError(f"{_CANNOT_START}: {sys.executable} ends without an answer")
            self._is_ready = True
        with suppress(OSError):  # a dead child, which will not respond
            child.stdin.write(request + b"\n")
            child.stdin.flush()
        return _read_response(child, TIMEOUT + 1)

    def _get_child(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            command = [sys.executable, "-c", _CHILD, *sys.path]
            pipe = subprocess.PIPE
            try:
                self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
            except (OSError, TypeError) as error:  # an embedded Python may have no executable
                raise WorkError(f"{_CANNOT_START}: {error}") from None
            self._is_ready = False
        return self._child

    def _kill(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()


def _read_response(child: subprocess.Popen[bytes], timeout: float) -> dict[str, str] | None:
    """Read one line from the child; kill it after the timeout, and return None."""
    assert child.stdout is not None
    timer = threading.Timer(timeout, child.kill)
    timer.daemon = True
    timer.start()
    try:
        line = child.stdout.readline(12 * MAX_LENGTH)
    finally:
        timer.cancel()
        timer.join()
    response: dict[str, str] | None = json.loads(line) if line.endswith(b"\n") else None
    return response


def _rendered_text(response: Mapping[str, str]) -> str:
    if "error" in response:
        raise TemplateError(response["error"])
    return response["text"]


PROCESS = TemplateProcess()
atexit.register(PROCESS.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=PROCESS.reset)


def chat_template_of(processor: Any) -> str | None:
    """Return a processor's chat template, the default one if it has several; None if it has none."""
    template = getattr(processor, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) and template else None


@cache
def _embedded_template() -> str:
    """The embedded model's template, which is part of this package and thus trusted."""
    path = files("localization_heads") / "lvlm" / "embedded" / "chat_template.jinja"
    return path.read_text(encoding="utf-8")


def start_renderer_if_needed(processor: Any) -> None:
    """Start the child process if the processor's template is to be rendered in it."""
    if chat_template_of(processor) not in (None, _embedded_template()):
        PROCESS.start()


def render_chat(processor: Any, messages: Messages) -> str:
    """Like `processor.apply_chat_template(messages, add_generation_prompt=True)`, within limits.

    Raises:
        TemplateError: there is no template, it refuses the messages, or it exceeds a limit.
        WorkError: the child process cannot be started.
    """
    template = chat_template_of(processor)
    if template is None:
        raise TemplateError("there is no chat template")
    variables = processor.tokenizer.special_tokens_map
    if template != _embedded_template():
        return PROCESS.render(template, messages, variables)
    return _rendered_text(_render({"template": template, "messages": messages, "variables": variables}))


def serve() -> None:
    """Main loop of the child: one line of JSON in, one line of JSON out, until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which kills this process
    import transformers.utils.chat_template_utils  # noqa: F401  before memory is limited

    responses = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _limit_memory()
    _send(responses, {})  # ready
    for line in sys.stdin.buffer:
        request = json.loads(line)
        _set_alarm(request["timeout"])
        _send(responses, _render(request))
        _set_alarm(0)


def _send(responses: Any, response: dict[str, str]) -> None:
    responses.write(json.dumps(response).encode() + b"\n")
    responses.flush()


def _render(request: Mapping[str, Any]) -> dict[str, str]:
    from transformers.utils import chat_template_utils

    render: Any = chat_template_utils.render_jinja_template
    try:
        texts, _ = render(
            conversations=[request["messages"]],
            chat_template=request["template"],
            add_generation_prompt=True,
            **request["variables"],
        )
        text = str(texts[0])
    except MemoryError:
        return {"error": f"it needs more than {MAX_MEMORY >> 20} MB of memory"}
    except Exception as error:  # the template is somebody else's program, and may raise anything
        return {"error": first_line(error)}
    if len(text) > MAX_LENGTH:
        return {"error": f"it makes a prompt of more than {MAX_LENGTH:,} characters"}
    return {"text": text}


def _set_alarm(seconds: float) -> None:
    """Have the system kill this process after that time, even if the parent is gone; 0 cancels."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _limit_memory() -> None:
    """Limit memory to the current size plus `MAX_MEMORY`, and forbid writing files."""
    if sys.platform != "linux":
        return
    import resource

    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MAX_MEMORY, now + MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
