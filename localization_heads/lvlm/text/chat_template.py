"""Chat templates are programs in a checkpoint: they are rendered in a separate process, which can be killed.

Jinja's sandbox keeps a template away from files and from Python, but does not bound its time and memory: three nested
ranges loop for ever, `9 ** (9 ** 9)` never returns from C, one filter builds a text of gigabytes. Counting steps
inside the interpreter cannot bound a single operation, so the operating system does: a child process with limits on
seconds, memory and output. It is started once, while the weights are read (half a second, without torch), and then
renders a prompt in a fraction of a millisecond. This file holds both sides, parent and child. The embedded model's own
template needs no child.
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

SECONDS = 10.0
"""For one rendering."""
MAX_MEMORY = 512 << 20
"""Bytes that a rendering may take beyond the process itself (Linux; elsewhere the seconds alone bound it)."""
MAX_LENGTH = 1_000_000
"""Characters of a prompt."""
_START_SECONDS = 120.0
_CHILD = "import sys; sys.path[:] = sys.argv[1:]; from localization_heads.lvlm.text.chat_template import serve; serve()"
_NO_CHILD = "the process that renders chat templates cannot be started"

Messages = Sequence[Mapping[str, Any]]


class TemplateError(Exception):
    """A template that fails, or passes a limit. The message is one line."""


class TemplateProcess:
    """The child process, seen from the parent: started when first needed, and again after it had to be ended.

    Safe for several threads. A template whose rendering was ended once is refused from then on.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin without a child: after a fork, the existing one belongs to the other process."""
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        self._ended: set[str] = set()

    def start(self) -> None:
        """Start the child without waiting for it."""
        with self._lock:
            self._started()

    def render(self, template: str, messages: Messages, variables: Mapping[str, Any]) -> str:
        """The prompt up to where the answer begins.

        Raises:
            TemplateError: the template fails, or passes a limit.
            WorkError: the child cannot be started.
        """
        request = {"template": template, "messages": messages, "variables": variables, "seconds": SECONDS}
        with self._lock:
            if template in self._ended:
                raise TemplateError("it was ended before")
            try:
                answer = self._asked(json.dumps(request, default=str).encode())
            except BaseException:
                self._end()  # what it answers late would be taken for the answer to the next question
                raise
            if answer is None:
                self._end()
                self._ended.add(template)
                reason = f"it broke off, or ran for more than {SECONDS:g} s"
                log.warning("the chat template had to be ended: %s", reason)
                raise TemplateError(reason)
        if "error" in answer:
            raise TemplateError(answer["error"])
        return str(answer["text"])

    def close(self) -> None:
        with self._lock:
            self._end()

    def _asked(self, request: bytes) -> dict[str, Any] | None:
        """The child's answer; None if it came to an end first."""
        child = self._started()
        assert child.stdin is not None
        if not self._is_ready:
            if _answer(child, _START_SECONDS) is None:
                raise WorkError(f"{_NO_CHILD}: {sys.executable} ends without an answer")
            self._is_ready = True
        with suppress(OSError):  # it has ended, and will not answer
            child.stdin.write(request + b"\n")
            child.stdin.flush()
        return _answer(child, SECONDS + 1)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            command = [sys.executable, "-c", _CHILD, *sys.path]
            pipe = subprocess.PIPE
            try:
                self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
            except (OSError, TypeError) as error:  # no executable, where Python is part of another program
                raise WorkError(f"{_NO_CHILD}: {error}") from None
            self._is_ready = False
        return self._child

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()


def _answer(child: subprocess.Popen[bytes], seconds: float) -> dict[str, Any] | None:
    """One line from the child, which is ended where it does not come in time."""
    assert child.stdout is not None
    timer = threading.Timer(seconds, child.kill)
    timer.daemon = True
    timer.start()
    try:
        line = child.stdout.readline(12 * MAX_LENGTH)
    finally:
        timer.cancel()
        timer.join()
    answer: dict[str, Any] | None = json.loads(line) if line.endswith(b"\n") else None
    return answer


PROCESS = TemplateProcess()
atexit.register(PROCESS.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=PROCESS.forget)


def chat_template_of(processor: Any) -> str | None:
    """A processor's chat template: of several, the default."""
    template = getattr(processor, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) and template else None


@cache
def _own_template() -> str:
    """That of the embedded model, which comes with this package."""
    path = files("localization_heads") / "lvlm" / "embedded" / "chat_template.jinja"
    return path.read_text(encoding="utf-8")


def make_renderer_ready(processor: Any) -> None:
    """Start the child, where the processor's template will need it."""
    if chat_template_of(processor) not in (None, _own_template()):
        PROCESS.start()


def render_chat(processor: Any, messages: Messages) -> str:
    """`processor.apply_chat_template(messages, add_generation_prompt=True)`, within limits.

    Raises:
        TemplateError: there is no template, it refuses the messages, or it passes a limit.
        WorkError: the process that renders it cannot be started.
    """
    template = chat_template_of(processor)
    if template is None:
        raise TemplateError("there is no chat template")
    variables = processor.tokenizer.special_tokens_map
    if template != _own_template():
        return PROCESS.render(template, messages, variables)
    answer = _rendered({"template": template, "messages": messages, "variables": variables})
    if "error" in answer:
        raise TemplateError(answer["error"])
    return answer["text"]


def serve() -> None:
    """The child: a line of JSON in, a line of JSON out, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    import transformers.utils.chat_template_utils  # noqa: F401  before the limits

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _limit_memory()
    _send(answers, {})  # ready
    for line in sys.stdin.buffer:
        request = json.loads(line)
        _alarm(request["seconds"])
        _send(answers, _rendered(request))
        _alarm(0)


def _send(answers: Any, answer: dict[str, str]) -> None:
    answers.write(json.dumps(answer).encode() + b"\n")
    answers.flush()


def _rendered(request: Mapping[str, Any]) -> dict[str, str]:
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
    except Exception as error:  # a program of other people: it fails in its own ways
        return {"error": first_line(error)}
    if len(text) > MAX_LENGTH:
        return {"error": f"it makes a prompt of more than {MAX_LENGTH:,} characters"}
    return {"text": text}


def _alarm(seconds: float) -> None:
    """Let the system end this process when the time is over, whatever it is doing then, parent or not."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _limit_memory() -> None:
    """No more memory than now and `MAX_MEMORY`, and no files at all."""
    if sys.platform != "linux":
        return
    import resource

    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MAX_MEMORY, now + MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
