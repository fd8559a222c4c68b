"""Peculiarities of real tokenizers: merged punctuation, the BOS token, and repaired regular expressions."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from family_models import tiny
from test_query_token import RENDERERS, Slow
from tiny_models import save_llava
from tiny_tokenizers import merging_tokenizer
from tokenizers import processors

from localization_heads.lvlm.checkpoints.loading import load_model
from localization_heads.lvlm.checks.footprints import coordinate_image
from localization_heads.lvlm.text.prompts import locate_expression
from localization_heads.lvlm.text.query_tokens import expression_tokens
from localization_heads.options.groups import ModelSpec


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("mode", ["referseg", "plain"])
@pytest.mark.parametrize(
    ("expression", "last"),
    [
        ('the sign "EXIT"', "EXIT"),  # `".` is one token, before which the expression ends
        ('the sign "EXIT".', "EXIT"),
        ("the dog", " dog"),
        ('the "sign" left', " left"),
        ('"', '".'),  # the expression is only punctuation
        ("the dog (left)", ")"),  # `)` and the full stop are separate tokens
        ("no. 3", "3"),
    ],
)
def test_a_closing_quote_merged_with_the_full_stop(expression: str, last: str, mode: str, slow: bool) -> None:
    """As in the tokenizers of Llama 3 and Qwen: `expression_end` is never the full stop, the paper's query token."""
    coder = merging_tokenizer()
    prompt = locate_expression(RENDERERS[mode], expression)
    ids = coder(prompt.text)["input_ids"]
    assert coder.tokenize('"EXIT".') == ['"', "EXIT", '".']
    span = expression_tokens(Slow(coder) if slow else coder, prompt, ids)
    assert coder.decode(ids[span[-1]]) == last
    assert expression.startswith(coder.decode([ids[span[0]]]).strip().rstrip("."))


def with_bos(lvlm: Any) -> Any:
    """The same model with a tokenizer that adds BOS to every text, as Llama 3's does."""
    twin = copy.copy(lvlm)
    twin.processor = copy.deepcopy(lvlm.processor)
    template = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    twin.processor.tokenizer._tokenizer.post_processor = template
    return twin


@pytest.mark.parametrize("conv_mode", ["referseg", "plain"])
@pytest.mark.parametrize("name", ["mllama", "llava"])
def test_bos_is_added_once(name: str, conv_mode: str) -> None:
    """Llama 3.2 Vision: its processor writes BOS, and its tokenizer would add another."""
    lvlm = with_bos(tiny(name)).prompted(conv_mode)
    inputs = lvlm.model_inputs([coordinate_image(64, 48)], [lvlm.prompt("the dog")])
    assert inputs["input_ids"][0].tolist().count(1) == 1


@pytest.mark.parametrize("setting", [True, False, None, "yes"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_tokenizer_that_ignores_add_bos_token_is_noted(setting: Any, adds_bos: bool, tmp_path: Path) -> None:
    save_llava(tmp_path)
    path = tmp_path / "tokenizer.json"
    if adds_bos:
        template = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        }
        path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": template}))
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "add_bos_token": setting}))
    notes = [note for note in load_model(str(tmp_path), device="cpu").notes if "add_bos_token" in note]
    assert len(notes) == (isinstance(setting, bool) and setting != adds_bos)
    if notes:
        assert ("leaves out <s>" in notes[0]) == (setting is True)


def test_fix_mistral_regex_reaches_the_tokenizer(tmp_path: Path) -> None:
    save_llava(tmp_path)
    loaded = load_model(ModelSpec(str(tmp_path), fix_mistral_regex=True), device="cpu")
    assert loaded.processor.tokenizer.init_kwargs["fix_mistral_regex"] is True
    assert loaded.extra_settings == {"fix_mistral_regex": True}  # a key of stored results
