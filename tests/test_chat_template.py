"""Chat templates in a child process: the same text as transformers renders, and no template that hangs."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_placeholder import TEMPLATES, processor_with
from tiny_models import llava_processor, save_llava

from localization_heads.errors import UsageError, WorkError
from localization_heads.lvlm.checkpoints.loading import load_model
from localization_heads.lvlm.text import chat_template
from localization_heads.lvlm.text.chat_template import (
    PROCESS,
    TemplateError,
    TemplateProcess,
    render_chat,
    start_renderer_if_needed,
)

EMBEDDED = Path(chat_template.__file__).parents[1] / "embedded" / "chat_template.jinja"
TURN: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": 'the "Größe" 狗\n'}]}
]
ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("family", TEMPLATES)
def test_renders_as_transformers_does(family: str) -> None:
    processor = processor_with(TEMPLATES[family][0] + "{{ bos_token }}{{ messages | tojson }}")
    expected = processor.apply_chat_template(TURN, add_generation_prompt=True, tokenize=False)
    assert render_chat(processor, TURN) == expected


def test_the_embedded_template_is_rendered_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PROCESS, "_get_child", None)
    processor = processor_with(EMBEDDED.read_text())
    start_renderer_if_needed(processor)
    expected = processor.apply_chat_template(TURN, add_generation_prompt=True, tokenize=False)
    assert render_chat(processor, TURN) == expected


def test_the_default_of_several_templates_is_used() -> None:
    processor = llava_processor()
    processor.chat_template = {"default": "{{ eos_token }}", "tools": "no"}
    assert render_chat(processor, TURN) == "</s>"
    processor.chat_template = {"tools": "no"}
    with pytest.raises(TemplateError, match="no chat template"):
        render_chat(processor, TURN)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (ENDLESS, "ran for more than 0.3 s"),
        ("{{ 9 ** (9 ** 9) }}", "ran for more than 0.3 s"),  # a single operation in C
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "recursion|0.3 s"),
        ("{{ 'a' * 10 ** 11 }}", "more than 512 MB"),
        ("{% for a in range(99999) %}twelve chars{% endfor %}", "more than 1,000,000 characters"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception('roles must\nalternate') }}", "^roles must$"),
        ("{{" + "(" * 5000, "recursion"),
    ],
)
def test_bad_templates_are_one_line_errors(template: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In time, and without effect on the next template."""
    PROCESS.render("ready", TURN, {})
    monkeypatch.setattr(chat_template, "TIMEOUT", 0.3)
    with pytest.raises(TemplateError, match=message) as caught:
        PROCESS.render(template, TURN, {})
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert PROCESS.render("{{ messages[0].role }}", TURN, {}) == "user"


def test_a_killed_template_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    process = TemplateProcess()
    monkeypatch.setattr(chat_template, "TIMEOUT", 0.2)
    for _ in range(2):
        with pytest.raises(TemplateError, match=r"0\.2 s|killed before"):
            process.render(ENDLESS, TURN, {})
    assert process._child is None


def test_a_late_response_is_not_taken_for_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a template is rendered."""
    process = TemplateProcess()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    process.render("first", TURN, {})
    with monkeypatch.context() as patch:
        patch.setattr(chat_template, "_read_response", interrupted)
        with pytest.raises(KeyboardInterrupt):
            process.render("second", TURN, {})
    assert process.render("third", TURN, {}) == "third"
    process.close()


def test_concurrent_renderings_are_not_mixed_up() -> None:
    found: dict[int, str] = {}
    threads = [
        threading.Thread(
            target=lambda n=n: found.update({n: PROCESS.render(f"{n}{{{{ messages|length }}}}", TURN, {})})
        )
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: f"{n}1" for n in range(8)}


@pytest.mark.parametrize("executable", ["/no/such/python", None, "/bin/true"])
def test_a_child_that_cannot_start(executable: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A TemplateError would silently drop the tokens that the template puts around the image."""
    monkeypatch.setattr("sys.executable", executable)
    with pytest.raises(WorkError, match="cannot be started"):
        TemplateProcess().render("a", TURN, {})


def test_a_checkpoint_with_an_endless_template(
    tmp_path: Path, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's prompt works without it; `conv_mode=chat` is refused."""
    PROCESS.render("ready", TURN, {})
    monkeypatch.setattr(chat_template, "TIMEOUT", 0.3)
    save_llava(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": ENDLESS + "1"}))
    start = time.monotonic()
    assert load_model(str(tmp_path), device="cpu", conv_mode="referseg").attend(image, "the dog")
    with pytest.raises(UsageError, match=r"conv_mode=chat: the chat template of .* rejects") as caught:
        load_model(str(tmp_path), device="cpu", conv_mode="chat")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 20
