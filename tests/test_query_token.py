"""`query_token`: the expression's tokens are found, and the rows of every kind equal eager attention."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from family_models import tiny
from test_model_configs import composed
from tiny_models import llava_config, llava_model, llava_processor, tokenizer
from tiny_tokenizers import KINDS, llama_tokenizer, tiny_tokenizer
from transformers import LlavaForConditionalGeneration
from transformers.modeling_utils import AttentionInterface

from localization_heads.errors import UsageError
from localization_heads.lvlm.checks.doctor import compare_with_eager
from localization_heads.lvlm.model import LVLM
from localization_heads.lvlm.sharing import prepare_unshared
from localization_heads.lvlm.text.prompts import Prompt, locate_expression, referseg_prompt
from localization_heads.lvlm.text.query_tokens import (
    expression_tokens,
    find_query,
    lone_space_id,
    remove_token,
)
from localization_heads.options.groups import ModelSpec, QueryToken
from localization_heads.stages.find import batch
from localization_heads.stages.run import Run
from localization_heads.store.attention_files import load_attention

TOLERANCE = {"rtol": 0, "atol": 1e-5}
ANSWER_KINDS = ("answer_mean", "answer_span", "last_and_answer")
SINGLE_CALL = [kind for kind in get_args(QueryToken) if kind not in ANSWER_KINDS]
"""Kinds whose rows come from one call of the layers; tests/test_answer_*.py have the others."""
SPANLESS = [kind for kind in get_args(QueryToken) if kind != "answer_span"]
"""Kinds that work with any answer."""
CHAT = (
    "{% for m in messages %}this {% for c in m['content'] %}"
    "{% if c['type']=='image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    " , {% endfor %}{% if add_generation_prompt %}the image ?{% endif %}"
)
CHAT_TEMPLATES = {
    "chatml": "<start>user\n<start><image><end>{}<end>\n<start>assistant\n",
    "llama": "<s>user: <image>\n{} assistant:",
}
RENDERERS = {
    "referseg": lambda text: referseg_prompt(text, "<image>"),
    "plain": lambda text: referseg_prompt(text, "<image>", ""),
    **{name: template.format for name, template in CHAT_TEMPLATES.items()},
}


class Slow:
    """A tokenizer without offsets."""

    is_fast = False

    def __init__(self, fast: Any) -> None:
        self.decode = fast.decode


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", RENDERERS)
@pytest.mark.parametrize(
    "expression", ["the red car", "a", "user", "assistant", "the dog.", "café", "左边的狗", "second giraffe?"]
)
@pytest.mark.parametrize("slow", [False, True])
def test_expression_tokens_are_found(kind: str, mode: str, expression: str, slow: bool) -> None:
    """In any template, after image tokens, with padding, and if the template contains the same words."""
    coder = tiny_tokenizer(kind)
    prompt = locate_expression(RENDERERS[mode], expression)
    assert prompt.expression == expression.rstrip(".?")
    ids = coder("<pad><pad>" + prompt.text.replace("<image>", "<image>" * 9))["input_ids"]
    rest = prompt.text[prompt.start :]
    if slow and spelled(rest, unknown="?") not in spelled(coder.decode(ids), unknown="?"):
        with pytest.raises(UsageError, match="query_token"):  # the tokens do not spell the text
            expression_tokens(Slow(coder), prompt, ids)
        return
    span = expression_tokens(Slow(coder) if slow else coder, prompt, ids)
    found = coder.decode(ids[span[0] : span[-1] + 1])
    before, after = coder.decode(ids[: span[0]]), coder.decode(ids[span[-1] + 1 :])
    if "<unk>" not in found:
        assert spelled(found) == spelled(prompt.expression)
    assert before.count("<image>") == 9
    assert spelled(after) in spelled(prompt.text[prompt.end :])


def spelled(text: str, unknown: str = "") -> str:
    text = "".join(text.replace("<unk>", unknown).split())
    return text if unknown else text.lower().replace("é", "e")


def test_a_missing_expression_is_refused() -> None:
    coder = tiny_tokenizer("byte-level")
    with pytest.raises(UsageError, match="query_token"):
        expression_tokens(coder, Prompt("<image> the dog.", 8, 15), coder("<image> a car.")["input_ids"])


def test_templates_that_rewrite_or_drop_the_expression() -> None:
    assert locate_expression(lambda text: f"say: {text.strip().lower()}!", "a dog").start == 5
    with pytest.raises(UsageError, match="conv_mode"):
        locate_expression(lambda text: "something else", "a dog")


def test_last_token_of_right_padded_prompts() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    query = find_query("last", [], {"attention_mask": mask}, None)
    assert query.positions is not None
    assert query.positions.tolist() == [[2], [3], [0]]
    assert find_query("last", [], {"attention_mask": mask.flip(1)}, None).positions is None


def tiny_lvlm(query_token: str, conv_mode: str = "referseg", *, attention: str = "sdpa", **options: Any) -> LVLM:
    processor = llava_processor()
    processor.chat_template = CHAT
    model = llava_model(attention=attention, **options)
    return LVLM(
        model,
        processor,
        ModelSpec("tiny"),
        system="the car in this image",
        conv_mode=conv_mode,
        query_token=query_token,
    )


def reference(lvlm: LVLM, inputs: dict[str, torch.Tensor], span: list[list[int]]) -> torch.Tensor:
    """[layer, B, H, T] from eager attention: the query token's row, or the mean of the expression's."""
    lvlm.model.set_attn_implementation("eager")
    T = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        if lvlm.query_token == "answer_first":
            steps = lvlm.model.generate(
                **inputs,
                max_new_tokens=2,
                min_new_tokens=2,
                do_sample=False,
                output_attentions=True,
                return_dict_in_generate=True,
            ).attentions
            return torch.stack([keys_of_prompt(layer[:, :, -1], T) for layer in steps[1]])
        rows = torch.stack(lvlm.model(**inputs, output_attentions=True).attentions)  # [layer, B, H, Q, K]
    if lvlm.query_token == "last":
        return rows[:, :, :, -1]
    chosen = span if lvlm.query_token == "expression_mean" else [positions[-1:] for positions in span]
    return torch.stack([rows[:, b, :, chosen[b]].mean(2) for b in range(len(span))], 1)


def keys_of_prompt(row: torch.Tensor, T: int) -> torch.Tensor:
    """Pad with zeros for the first keys, which a sliding window has dropped."""
    missing = T + 1 - row.shape[-1]
    return torch.cat([row.new_zeros(*row.shape[:-1], missing), row], -1)[..., :T]


@pytest.mark.parametrize("query_token", SINGLE_CALL)
@pytest.mark.parametrize("conv_mode", ["referseg", "plain", "chat"])
@pytest.mark.parametrize("expressions", [["red car"], ["the dog", "the left red dog , this car", "car."]])
def test_rows_equal_those_of_eager_attention(
    image: Any, query_token: str, conv_mode: str, expressions: list[str]
) -> None:
    """Also in left-padded batches, in which every sample has its own positions."""
    check_against_eager(tiny_lvlm(query_token, conv_mode), image, expressions)


@pytest.mark.parametrize("query_token", SINGLE_CALL)
@pytest.mark.parametrize("text", ["mistral", "gemma2"])
def test_rows_equal_those_of_eager_attention_with_a_window(image: Any, query_token: str, text: str) -> None:
    """The window is shorter than the prompt: at the decoding step the cache holds only the last keys."""
    options: dict[str, Any] = {"text": text, "sliding_window": 24}
    if text == "gemma2":
        options |= {"head_dim": 8, "query_pre_attn_scalar": 4, "attn_logit_softcapping": 2.0}
    kernel = "eager" if text == "gemma2" else "sdpa"
    lvlm = tiny_lvlm(query_token, attention=kernel, **options)
    check_against_eager(lvlm, image, ["the dog", "the left red dog in this image"])


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl", "idefics3", "paligemma", "gemma3", "mllama", "llava_next"])
@pytest.mark.parametrize("query_token", SINGLE_CALL)
def test_rows_equal_those_of_eager_attention_in_families(image: Any, name: str, query_token: str) -> None:
    """In a batch of different sizes: special tokens, tiles, bidirectional prefixes, cross-attention."""
    lvlm = copy.copy(tiny(name))
    lvlm.query_token = query_token
    images = [image, image.resize((200, 300))]
    prompts = [lvlm.located_prompt(expression) for expression in ("the dog", "the left red car in this image")]
    inputs = lvlm.model_inputs(images, [prompt.text for prompt in prompts])
    query = lvlm.query(prompts, inputs)
    assert compare_with_eager(lvlm, inputs, query).difference < 1e-5
    if query.positions is not None:
        for ids, places, prompt in zip(inputs["input_ids"], query.positions.tolist(), prompts, strict=True):
            words = lvlm.processor.tokenizer.decode(ids[places[0] : max(places) + 1]).split()
            expected = prompt.expression.split()
            assert words == (expected if query_token == "expression_mean" else expected[-1:])


def check_against_eager(lvlm: LVLM, image: Any, expressions: list[str]) -> None:
    images = [image] * len(expressions)
    maps = lvlm.attend_batch(images, expressions)
    inputs = lvlm.model_inputs(images, [lvlm.prompt(expression) for expression in expressions])
    spans = [words_of(ids, text) for ids, text in zip(inputs["input_ids"].tolist(), expressions, strict=True)]
    expected = reference(lvlm, inputs, spans)
    for b, one in enumerate(maps):
        on_image = expected[:, b][..., inputs["input_ids"][b] == lvlm.image_token_id]
        torch.testing.assert_close(torch.from_numpy(one.attention).flatten(2), on_image, **TOLERANCE)


def words_of(ids: list[int], expression: str) -> list[int]:
    """Positions of the expression's words: a word is a token here, and the last match is the expression."""
    words = tokenizer()(expression.rstrip("."), add_special_tokens=False)["input_ids"]
    start = max(i for i in range(len(ids)) if ids[i : i + len(words)] == words)
    return list(range(start, start + len(words)))


def test_query_tokens_give_different_maps(image: Any) -> None:
    kinds = [kind for kind in SPANLESS if kind != "last_and_answer"]  # it reads two
    maps = {kind: tiny_lvlm(kind).attend(image, "the left red dog").attention for kind in kinds}
    for one in kinds:
        for other in kinds:
            assert (one == other) == bool((abs(maps[one] - maps[other]) < 1e-4).all())


@pytest.mark.parametrize("query_token", SPANLESS)
def test_early_exit_gives_the_same_rows(image: Any, query_token: str) -> None:
    before = dict(AttentionInterface._global_mapping)
    lvlm = tiny_lvlm(query_token)
    early = lvlm.attend(image, "the dog", last_layer=1).attention
    torch.testing.assert_close(early[:2], lvlm.attend(image, "the dog").attention[:2], rtol=0, atol=0)
    assert not early[2:].any()
    assert before == AttentionInterface._global_mapping


def test_stored_maps_of_query_tokens_are_kept_apart(image: Any, tmp_path: Path) -> None:
    """Another query token, and back: the files are those of the last one asked for."""
    image.save(tmp_path / "noise.png")
    lines = [{"id": f"e{n}", "prompt": p, "image_path": "noise.png"} for n, p in enumerate(["the dog", "the red cat"])]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))

    def maps_of(query_token: str) -> np.ndarray:
        run = Run(
            composed(
                "device=cpu",
                "visualize_batch=false",
                f"data_file={data}",
                f"output_dir={tmp_path}/out",
                f"query_token={query_token}",
            )
        )
        batch(run)
        return np.stack([load_attention(run.attention_folder / f"{line['id']}.pkl").attention for line in lines])

    last, mean = maps_of("last"), maps_of("expression_mean")
    assert abs(last - mean).max() > 1e-3
    assert len(list((tmp_path / "out/tiny/statistics").glob("*.bin"))) == 2
    np.testing.assert_array_equal(maps_of("last"), last)


LONE = ["the dog", "the dog in 3", "3", "the dog in 3 and 3"]
"""Expressions with none, one and two lone spaces of their own; each prompt has one after the image as well."""


def lone_space_lvlm(query_token: str = "last", conv_mode: str = "referseg", **options: Any) -> LVLM:
    """A LLaVA whose tokens have LLaMA's own ids."""
    config = llava_config()
    config.text_config.vocab_size, config.image_token_id = 32064, 32000
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    processor = llava_processor()
    processor.tokenizer, processor.image_token, processor.image_token_id = llama_tokenizer(), "<image>", 32000
    processor.chat_template = CHAT
    asked = {"conv_mode": conv_mode, "query_token": query_token, **options}
    return LVLM(model, processor, ModelSpec("tiny"), system="the car in 3", **asked)


@pytest.mark.parametrize(
    ("expression", "kept", "dropped"),
    [  # the rows of docs/method.md
        ("the dog", [29871, 13, 1552, 11203, 29889], [13, 1552, 11203, 29889]),
        (
            "the dog in 3",
            [29871, 13, 1552, 11203, 297, 29871, 29941, 29889],
            [13, 1552, 11203, 297, 29941, 29889],
        ),
    ],
)
def test_lone_spaces_are_dropped_as_in_the_published_code(
    image: Any, expression: str, kept: list[int], dropped: list[int]
) -> None:
    for expected, drop in ((kept, False), (dropped, True)):
        lvlm = lone_space_lvlm(drop_lone_spaces=drop)
        ids = lvlm.model_inputs([image], [lvlm.prompt(expression)])["input_ids"][0].tolist()
        assert ids[len(ids) - ids[::-1].index(32000) :] == expected
        assert (29871 in ids[: ids.index(32000)]) is not drop  # in the system sentence too
        assert lvlm.choices["drop_lone_spaces"] is drop
    assert lone_space_id(tokenizer()) is None  # a tokenizer without lone spaces


def test_removing_a_token_from_a_batch_padded_on_either_side() -> None:
    ids = torch.tensor([[5, 7, 6, 7], [8, 9, 0, 0]])
    given = {"input_ids": ids, "attention_mask": (ids != 0).long(), "token_type_ids": ids % 2, "other": 3}
    right = remove_token(given, 7, side="right", pad=1)
    assert right["input_ids"].tolist() == [[5, 6], [8, 9]]
    assert right["attention_mask"].tolist() == [[1, 1], [1, 1]]
    assert right["token_type_ids"].tolist() == [[1, 0], [0, 1]]
    assert right["other"] == 3
    ids = torch.tensor([[0, 5, 7, 6], [7, 8, 7, 7]])
    left = remove_token({"input_ids": ids, "attention_mask": (ids != 0).long()}, 7, side="left", pad=1)
    assert left["input_ids"].tolist() == [[5, 6], [1, 8]]
    assert left["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert remove_token({"input_ids": ids}, 7, side="left", pad=1)["input_ids"].tolist() == [
        [0, 5, 6],
        [1, 1, 8],
    ]


@pytest.mark.parametrize("query_token", SPANLESS)
@pytest.mark.parametrize("conv_mode", ["referseg", "chat"])
def test_without_lone_spaces_single_batched_and_shared_maps_agree(image: Any, query_token: str, conv_mode: str) -> None:
    """And they equal eager attention on ids filtered by hand."""
    lvlm = lone_space_lvlm(query_token, conv_mode, drop_lone_spaces=True)
    alone = [lvlm.attend(image, expression).attention for expression in LONE]
    batch_of = prepare_unshared(lvlm, [image] * len(LONE), LONE)(None)
    shared = lvlm.encode_image(image)
    assert shared.shares == (query_token != "answer_first")
    for one, other, third in zip(alone, batch_of, shared.attend(LONE), strict=True):
        np.testing.assert_allclose(other.attention, one, **TOLERANCE)
        np.testing.assert_allclose(third.attention, one, **TOLERANCE)
    if "answer" in query_token:
        return
    plain = lone_space_lvlm(query_token, conv_mode)
    for expression, found in zip(LONE, alone, strict=True):
        inputs = plain.model_inputs([image], [plain.prompt(expression)])
        keep = inputs["input_ids"][0] != 29871
        filtered = {**inputs, **{name: inputs[name][:, keep] for name in ("input_ids", "attention_mask")}}
        ids = filtered["input_ids"][0].tolist()
        words = [token for token in llama_tokenizer()(f"\n{expression}")["input_ids"] if token not in (1, 13, 29871)]
        start = max(i for i in range(len(ids)) if ids[i : i + len(words)] == words)
        row = reference(lvlm, filtered, [list(range(start, start + len(words)))])[:, 0]
        on_image = row[..., filtered["input_ids"][0] == 32000]
        torch.testing.assert_close(torch.from_numpy(found).flatten(2), on_image, **TOLERANCE)
        assert abs(plain.attend(image, expression).attention - found).max() > 1e-5
