"""The image placeholder of a prompt, derived from the chat templates of many families."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
from tiny_models import llava_model, llava_processor, tokenizer
from tokenizers.processors import TemplateProcessing

from localization_heads.errors import UsageError
from localization_heads.lvlm.checkpoints.loading import _check_image_position
from localization_heads.lvlm.model import LVLM
from localization_heads.lvlm.text.prompts import (
    image_comes_first,
    image_placeholder,
    template_placeholder,
    template_renderer,
)
from localization_heads.options.groups import ModelSpec

EACH = "{% for m in messages %}{% for c in m.content %}"
DONE = "{% endfor %}{% endfor %}"
PART = "{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}"
ALL_IMAGES_FIRST = (
    "{% for m in messages %}HEAD{% for c in m.content if c.type == 'image' %}IMAGE{% endfor %}"
    "{% for c in m.content if c.type == 'text' %}TEXT{% endfor %}{% endfor %}TAIL"
)


def filled(template: str, **parts: str) -> str:
    for name, text in parts.items():
        template = template.replace(name, text)
    return template


QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
KIMI = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"
TEMPLATES = {
    "qwen": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        + filled(EACH + PART + DONE, IMAGE=QWEN)
        + "<|im_end|>\n<|im_start|>assistant\n",
        QWEN,
    ),
    "llava-1.5": (
        filled(ALL_IMAGES_FIRST, HEAD="USER: ", IMAGE="<image>\n", TEXT="{{ c.text }} ", TAIL="ASSISTANT:"),
        "<image>",
    ),
    "llava-onevision": (
        filled(
            ALL_IMAGES_FIRST,
            HEAD="<|im_start|>user ",
            IMAGE="<image>",
            TEXT="\n{{ c.text }}",
            TAIL="<|im_end|><|im_start|>assistant\n",
        ),
        "<image>",
    ),
    "gemma3": (
        "<bos><start_of_turn>user\n"
        + EACH
        + "{% if c.type == 'image' %}<start_of_image>{% else %}{{ c.text | trim }}{% endif %}"
        + DONE
        + "<end_of_turn>\n<start_of_turn>model\n",
        "<start_of_image>",
    ),
    "idefics3": (
        "<|begin_of_text|>{% for m in messages %}User{% if m.content[0].type == 'image' %}:{% else %}: {% endif %}"
        + filled("{% for c in m.content %}" + PART, IMAGE="<image>")
        + "{% endfor %}<end_of_utterance>\n{% endfor %}Assistant:",
        "<image>",
    ),
    "mllama": (
        "<|begin_of_text|>{% if messages[0].content | selectattr('type', 'equalto', 'image') | list %}"
        "{% else %}<|start_header_id|>system<|end_header_id|>\n\nToday<|eot_id|>{% endif %}"
        "<|start_header_id|>user<|end_header_id|>\n\n" + filled(EACH + PART + DONE, IMAGE="<|image|>") + "<|eot_id|>",
        "<|image|>",
    ),
    "kimi": (
        "<|im_user|>user<|im_middle|>" + filled(EACH + PART + DONE, IMAGE=KIMI + "\n") + "<|im_end|>",
        KIMI,
    ),
    "image last": (
        "{% for m in messages %}<user>{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}"
        "{% for c in m.content if c.type == 'image' %}<image>{% endfor %}<end>{% endfor %}<model>",
        "<image>",
    ),
}


def processor_with(template: str | None) -> Any:
    processor = llava_processor()
    processor.chat_template = template
    return processor


@pytest.mark.parametrize("family", TEMPLATES)
def test_placeholder_from_a_template(family: str) -> None:
    template, expected = TEMPLATES[family]
    render = template_renderer(processor_with(template))
    assert render is not None
    assert template_placeholder(render) == expected
    assert image_comes_first(render, expected) == (family != "image last")


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",  # not made for images
        "{{ raise_exception('roles must alternate') }}",
        EACH + "{% if c.type == 'text' %}{{ c.text }}{% endif %}" + DONE,  # drops images
    ],
)
def test_without_a_usable_template_the_processor_decides(template: str | None) -> None:
    processor = processor_with(template)
    assert image_placeholder(processor, "<image>") == "<image>"
    processor.vision_start_token, processor.vision_end_token = "<|vision_start|>", "<|vision_end|>"
    assert image_placeholder(processor, "<image>") == "<|vision_start|><image><|vision_end|>"


def lvlm_with(template: str | None, query_token: str = "last", conv_mode: str = "chat") -> LVLM:
    options = {"conv_mode": conv_mode, "query_token": query_token}
    return LVLM(llava_model(), processor_with(template), ModelSpec("mine"), system="Be brief.", **options)


def test_prompts_include_the_image_tokens_of_the_template() -> None:
    template = filled(EACH + PART + DONE, IMAGE="<begin><image><end>\n")
    assert lvlm_with(template, conv_mode="referseg").prompt("the dog") == "Be brief.\n<begin><image><end>\nthe dog."
    assert lvlm_with(template, conv_mode="plain").prompt("the dog") == "<begin><image><end>\nthe dog."


def test_an_image_after_the_text_is_reported(package_log: pytest.LogCaptureFixture) -> None:
    """A warning for the last token, which still sees the image; an error for the expression's tokens, which do not."""
    last, first = TEMPLATES["image last"][0], TEMPLATES["llava-1.5"][0]
    with package_log.at_level(logging.WARNING):
        _check_image_position(lvlm_with(first))
        _check_image_position(lvlm_with(last, conv_mode="referseg"))
        assert not package_log.records
        _check_image_position(lvlm_with(last))
    assert "puts the image after the text" in package_log.text
    with pytest.raises(UsageError, match="query_token=expression_end"):
        _check_image_position(lvlm_with(last, "expression_end"))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (EACH + "{% if c.type == 'text' %}{{ c.text }}{% endif %}" + DONE, "leaves the image out"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        (
            filled(EACH + "{% if c.type == 'image' %}IMAGE{% endif %}" + DONE, IMAGE="<image>"),
            "the expression",
        ),
        (None, "no chat template"),
    ],
)
def test_unusable_templates_are_refused(template: str | None, words: str) -> None:
    with pytest.raises(UsageError, match=f"conv_mode.*{words}"):
        _check_image_position(lvlm_with(template))
    _check_image_position(lvlm_with(template, conv_mode="plain"))


@pytest.mark.parametrize("conv_mode", ["chat", "plain"])
def test_bos_occurs_once(image: Any, conv_mode: str) -> None:
    """Chat templates write BOS, and the tokenizer would add it again."""
    lvlm = lvlm_with("<s>" + filled(EACH + PART + DONE, IMAGE="<image>"), conv_mode=conv_mode)
    lvlm.processor.tokenizer = copy.deepcopy(tokenizer())
    lvlm.processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer().bos_token_id)]
    )
    ids = lvlm.model_inputs([image], [lvlm.prompt("the dog")])["input_ids"][0].tolist()
    assert ids.count(tokenizer().bos_token_id) == 1
    assert ids[0] == tokenizer().bos_token_id
