"""Boxes that models write: literal answers of each family, and their generation with tiny models."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from family_models import tiny
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from localization_heads.errors import UsageError
from localization_heads.lvlm.answers.box_formats import FORMATS, read_box
from localization_heads.lvlm.checkpoints.loading import load_model
from localization_heads.lvlm.checkpoints.spec import known_specs
from localization_heads.lvlm.families.table import FAMILIES, REFUSED
from localization_heads.lvlm.model import LVLM
from localization_heads.lvlm.native_box import generate_box, native_box_format

WIDE = (640, 480)


BOX = (64, 120, 320, 480)
ANSWERS: list[tuple[str, str, tuple[float, ...] | None]] = [
    # pixels of an image resized to 1288 x 966
    (
        "qwen2_5",
        '```json\n[\n\t{"bbox_2d": [644, 0, 1288, 483], "label": "a"}\n]\n```<|im_end|>',
        (320, 0, 640, 240),
    ),
    ("qwen2_5", '{"bbox_2d": [0.0, 96.6, 128.8, 966.0]}', (0, 48, 64, 480)),
    ("qwen3", '{"bbox_2d": [100, 250, 500, 1000]}', BOX),
    ("qwen3", '[{"bbox_2d": [100, 250, 500, 1000], "label": "a"}, {"bbox_2d": [0, 0, 9, 9]}]', BOX),
    ("qwen3", '{"bbox_2d": [100, 250, 500, 1000', None),  # truncated
    ("qwen2", "<|object_ref_start|>a<|object_ref_end|><|box_start|>(100,250),(500,1000)<|box_end|>", BOX),
    ("qwen2", "(100, 250), (500, 1000)", BOX),
    ("internvl", "<ref>the dog</ref><box>[[100, 250, 500, 1000]]</box>", BOX),
    ("glm", "<think>At [1, 2, 3, 4].</think>So: <|begin_of_box|>[[100,250,500,1000]]<|end_of_box|>", BOX),
    ("glm", "<|begin_of_box|>[100, 250, 500, 1000]<|end_of_box|>", BOX),
    ("glm", "It may be at [1, 2, 3, 4].", None),
    # over the padded square of 640: 80 pixels of padding above the image
    ("llava", "[0.25, 0.5, 0.75, 0.875]", (160, 240, 480, 480)),
    ("llava", "[0.1, 0.0, 0.5, 0.25]", (64, 0, 320, 80)),  # starts in the padding
    ("llava", "[0.1, 0.0, 0.5, 0.1]", None),  # inside the padding
    ("llava", "The dog is on the left.", None),
    # centres of bins of 0.64 x 0.48 pixels
    ("florence2", "</s><s>the dog<loc_0><loc_499><loc_499><loc_999></s>", (0.32, 239.76, 319.68, 479.76)),
    # 1024 steps, rows first
    ("paligemma", "<loc0256><loc0512><loc0768><loc1024> the dog<eos>", (320, 120, 640, 360)),
    ("paligemma", "the dog<eos>", None),
    # beyond the image, empty, inverted
    ("qwen3", "[-50, -50, 1200, 1500]", (0, 0, 640, 480)),
    ("qwen3", "[100, 250, 100, 1000]", None),
    ("qwen3", "[500, 250, 100, 1000]", None),
    ("qwen3", "", None),
]


@pytest.mark.parametrize(("form", "answer", "box"), ANSWERS)
def test_literal_answers(form: str, answer: str, box: tuple[float, ...] | None) -> None:
    resized = (1288, 966) if form == "qwen2_5" else None
    found = read_box(answer, FORMATS[form], WIDE, resized)
    assert found == (None if box is None else pytest.approx(box))


def test_a_tall_image_is_padded_at_its_sides() -> None:
    assert read_box("[0.5, 0.5, 1.0, 1.0]", FORMATS["llava"], (480, 640)) == (240, 320, 480, 640)


@given(st.text(), st.sampled_from(sorted(FORMATS)))
def test_any_text_gives_a_valid_box_or_none(text: str, form: str) -> None:
    assert_valid(read_box(text, FORMATS[form], WIDE, (100, 100)))


def assert_valid(box: tuple[float, ...] | None) -> None:
    assert box is None or (0 <= box[0] < box[2] <= 640 and 0 <= box[1] < box[3] <= 480)


@given(
    st.lists(st.one_of(st.integers(-2000, 2000), st.floats(-2000, 2000)), min_size=4, max_size=4),
    st.sampled_from(["llava", "qwen2_5", "qwen3", "internvl"]),
)
def test_any_numbers_give_a_valid_box_or_none(numbers: list[float], form: str) -> None:
    assert_valid(read_box(f"[{', '.join(map(str, numbers))}]", FORMATS[form], WIDE, (100, 100)))


def test_no_pattern_backtracks_over_a_long_answer() -> None:
    repeated = (
        "[" * 50_000,
        "1, " * 50_000,
        "<|begin_of_box|>" * 5_000,
        "[" + "9" * 100_000,
        "(1,1),(" * 20_000,
    )
    for text in repeated:
        for form in FORMATS.values():
            assert read_box(text, form, WIDE) is None


def test_equals_florences_own_parser() -> None:
    """That of transformers, which rounds down to whole pixels."""
    from transformers.models.florence2.processing_florence2 import Florence2PostProcessor

    nothing = SimpleNamespace(all_special_tokens=[], added_tokens_encoder={})
    steps = Florence2PostProcessor(config=None, tokenizer=nothing)
    answer = "the dog<loc_12><loc_345><loc_678><loc_901>"
    theirs = steps.parse_phrase_grounding_from_text_and_spans(answer, image_size=WIDE)
    ours = read_box(answer, FORMATS["florence2"], WIDE)
    assert ours is not None and list(map(int, ours)) == theirs[0]["bbox"][0]


def test_which_families_have_a_format() -> None:
    """The embedded model has none, and Kosmos-2 is not supported."""
    found = {stem: spec.native_box for stem, spec in known_specs().items() if spec.native_box}
    assert set(found.values()) == set(FORMATS)
    assert "tiny" not in found
    assert "kosmos-2" in REFUSED and "kosmos-2" not in FAMILIES
    assert found["llava"] == "llava" and found["qwen2_5-vl-3b"] == "qwen2_5" and found["qwen3-vl"] == "qwen3"


def test_a_model_without_a_format_says_how_to_name_one() -> None:
    lvlm = load_model(device="cpu")
    assert native_box_format(lvlm, None, by_default=True) is None
    with pytest.raises(UsageError, match=r"native=true: embedded .*model\.native_box="):
        native_box_format(lvlm, True, by_default=False)


def test_each_format_has_its_own_prompt() -> None:
    lvlm = load_model(device="cpu")
    prompt = lvlm.box_prompt(FORMATS["llava"], "the {dog} on\nthe left")
    assert "region this sentence describes: the {dog} on the left" in prompt
    assert prompt == lvlm.chat_prompt(FORMATS["llava"].question("the {dog} on the left"))
    plain = lvlm.box_prompt(FORMATS["paligemma"], "the dog")
    assert plain == f"{lvlm.image_text}detect the dog"
    with pytest.raises(UsageError, match="control token"):
        lvlm.box_prompt(FORMATS["llava"], "the </s> dog")
    with pytest.raises(UsageError, match="no chat template"):
        tiny("qwen2_5_vl").box_prompt(FORMATS["qwen2_5"], "the dog")


def answers(monkeypatch: pytest.MonkeyPatch, lvlm: LVLM, text: str) -> list[list[int]]:
    """Makes the tokenizer decode any answer as `text`; returns the token ids that it was given."""
    seen: list[list[int]] = []

    def decode(ids: Any, **_: Any) -> str:
        seen.append(ids.tolist())
        return text

    monkeypatch.setattr(lvlm.processor.tokenizer, "decode", decode, raising=False)
    return seen


def test_pixel_coordinates_are_those_of_the_resized_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2.5-VL resizes to whole patches: the right half of that image is the original's right half."""
    lvlm, image = tiny("qwen2_5_vl"), Image.new("RGB", (333, 222), "red")
    inputs = lvlm.model_inputs([image], [lvlm.image_text])
    patches, patch = inputs["image_grid_thw"][0].tolist(), lvlm.processor.image_processor.patch_size
    high, wide = patches[1] * patch, patches[2] * patch
    assert (wide, high) != image.size
    assert inputs["pixel_values"].shape[0] == patches[1] * patches[2]
    form = replace(FORMATS["qwen2_5"], chat=False, max_new_tokens=3)
    answers(monkeypatch, lvlm, f"[{wide / 2}, 0, {wide}, {high}]")
    box, _ = generate_box(lvlm, form, image, "the dog")
    assert box == pytest.approx((166.5, 0, 333, 222))


@pytest.mark.parametrize("name", ["paligemma", "florence2"])
def test_only_the_answer_is_decoded(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Without the prompt's tokens, which an encoder-decoder does not repeat."""
    lvlm, image = tiny(name), Image.new("RGB", (64, 48), "red")
    form = replace(FORMATS[name], max_new_tokens=4)
    seen = answers(monkeypatch, lvlm, "<loc0000><loc0512><loc1024><loc1024><loc_0><loc_0><loc_499><loc_999>")
    box, text = generate_box(lvlm, form, image, "the dog")
    assert text.startswith("<loc0000>")
    assert box == pytest.approx((32, 0, 64, 48) if name == "paligemma" else (0.032, 0.024, 31.968, 47.976))
    assert 0 < len(seen[0]) <= 5  # with the decoder's first token
