"""Every family: geometry against traced pixels, and capture against eager attention, with the real processors."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from family_models import FAMILY_NAMES, tiny

from localization_heads.errors import UsageError
from localization_heads.lvlm.checks.doctor import eager_attention
from localization_heads.lvlm.checks.footprints import coordinate_image, footprint_errors
from localization_heads.lvlm.families.geometry import ProcessedImage, even_view
from localization_heads.lvlm.families.table import FAMILIES, REFUSED, check_family, views_of
from localization_heads.lvlm.families.views import shifted
from localization_heads.lvlm.forward.capture import capture
from localization_heads.lvlm.model import LVLM

CHECKS = json.loads(Path(__file__).with_name("family_checks.json").read_text(encoding="utf-8"))
SIZES = {"wide": (1000, 560), "tall": (420, 760), "small": (150, 110)}
EAGER = {"rtol": 0, "atol": 1e-5}

SIBLINGS = {
    *("cohere_compass", "cosmos3_edge", "cosmos3_omni", "ernie4_5_vl_moe", "exaone4_5"),
    *("gemma4_unified", "glm46v", "glm4v_moe", "glm_ocr", "glmga", "granite_docling"),
    *("hyperclovax_vision_v2", "lfm3_vl", "llava_next_video", "minicpm_ocr", "minicpmv4_7"),
    *("muse_glimmer", "muse_spark", "paddleocr_vl", "pp_chart2table", "qianfan_ocr"),
    *("qwen2_5_omni_thinker", "qwen3_5_moe", "qwen3_omni_moe_thinker", "qwen3_vl_moe"),
    *("video_llama_3", "video_llava"),
}
"""Families that are built like another: their footprints are measured at one size only."""
NO_FOOTPRINTS = {"fast_vlm", "gemma3n"}
"""Families with a vision tower of timm, whose receptive fields are too large for images this small."""


def traced_cases() -> list[tuple[str, str]]:
    """Families and sizes. Families built like another were traced at every size once, and at one size here."""
    return [
        (name, size)
        for name in FAMILY_NAMES
        for size in SIZES
        if name not in NO_FOOTPRINTS and (name not in SIBLINGS or size == "small")
    ]


@pytest.mark.parametrize(("name", "size"), traced_cases())
def test_footprints_match_the_geometry(name: str, size: str) -> None:
    """Within a quarter of a cell, in every view; padding has no footprint."""
    for view, errors in footprint_errors(tiny(name), SIZES[size]).items():
        assert len(errors) >= 3, f"{view}: too few tokens show the image alone"
        assert np.abs(errors).max() < 0.25, view


def test_fast_vlm_tokens_are_centred_at_a_corner_of_their_cells() -> None:
    """With positive weights, the gradient of an inner token is centred at the first of its 64 pixels."""
    tower = copy.deepcopy(tiny("fast_vlm").model.model.vision_tower.timm_model)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.abs_()
    tower.final_conv.se = torch.nn.Identity()  # it scales channels by the mean of the whole image
    pixels = torch.full((1, 3, 1024, 1024), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(tower.forward_features(pixels)[0, :, 8, 7].sum(), pixels)
    weights, middles = gradient[0].abs().sum(0), torch.arange(1024) + 0.5
    centre = float(weights.sum(0) @ middles / weights.sum()), float(weights.sum(1) @ middles / weights.sum())
    box = 0, 0, 1024, 1024
    view = shifted(even_view("whole", np.zeros((16, 16), int), box), 31.5 / 64)
    expected = view.x_edges[7:9].mean(), view.y_edges[8:10].mean()
    np.testing.assert_allclose(centre, expected, atol=64 / 16)


def captured_and_eager(lvlm: LVLM, image_size: tuple[int, int]) -> tuple[list[torch.Tensor], ...]:
    """The rows of the last token as captured, and as eager `output_attentions` has them, layer by layer."""
    inputs = lvlm.model_inputs([coordinate_image(*image_size)], [lvlm.prompt("the red car")])
    with torch.inference_mode(), capture(lvlm.attention_modules) as recorder:
        lvlm.model(**inputs, use_cache=False)
    with eager_attention(lvlm.model), torch.inference_mode():
        output = lvlm.model(**inputs, output_attentions=True, use_cache=False)
    expected = [a for a in getattr(output, "cross_attentions", None) or output.attentions if a is not None]
    if len(expected) == lvlm.num_layers:
        expected = [expected[layer] for layer in sorted(recorder.rows)]
    assert len(expected) == len(recorder.rows) > 0
    return [recorder.rows[layer] for layer in sorted(recorder.rows)], [a[:, :, -1] for a in expected]


def largest_difference(rows: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """At every key."""
    return max(float((a.float() - b.float()).abs().max()) for a, b in zip(rows, others, strict=True))


def capture_difference(lvlm: LVLM, image_size: tuple[int, int]) -> float:
    return largest_difference(*captured_and_eager(lvlm, image_size))


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_capture_equals_eager(name: str) -> None:
    assert capture_difference(tiny(name), SIZES["small"]) < 1e-5


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_batch_gives_the_maps_of_its_samples(name: str) -> None:
    """Images of different sizes and expressions of different lengths, padded to one length."""
    lvlm = tiny(name)
    images = [coordinate_image(150, 110), coordinate_image(110, 190), coordinate_image(64, 64)]
    expressions = ["the red car", "the dog left in this image", "car"]
    for image, expression, batched in zip(images, expressions, lvlm.attend_batch(images, expressions), strict=True):
        alone = lvlm.attend(image, expression)
        assert alone.image_box == batched.image_box
        np.testing.assert_allclose(alone.attention, batched.attention, **EAGER)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_image_token_belongs_to_one_cell(name: str) -> None:
    """No token twice and no others, and every view in the table of checks occurs at some size."""
    lvlm, names = tiny(name), set()
    for size in SIZES.values():
        encoded = coordinate_image(*size)
        inputs = lvlm.model_inputs([encoded], [lvlm.prompt("the dog")])
        image = ProcessedImage(lvlm.model.config, lvlm.processor, inputs, 0, size)
        views = views_of(image)
        names |= {view.name for view in views}
        cells = np.concatenate([view.index.ravel() for view in views])
        assert len(np.unique(cells)) == len(cells)
        if not lvlm.uses_cross_attention:
            assert set(cells) <= set(image.tokens)
    assert names == set(CHECKS["families"][name]["views"])


def test_the_table_of_checks_is_complete() -> None:
    """`family_checks.json`, from which the documentation is written."""
    assert CHECKS["families"].keys() == set(FAMILY_NAMES)
    assert CHECKS["refused"] == REFUSED
    assert {entry["model_type"] for entry in CHECKS["families"].values()} == FAMILIES.keys()


def test_patches_beyond_the_last_whole_cell_are_outside_the_view() -> None:
    """LightOnOCR, 140 x 98 pixels in cells of 28: five columns, and three rows of 84 of the 98."""
    config = SimpleNamespace(
        model_type="lighton_ocr",
        image_token_id=7,
        spatial_merge_size=2,
        vision_config=SimpleNamespace(patch_size=14),
    )
    inputs = {"input_ids": np.array([[1, *[7] * 15, 2]]), "image_sizes": np.array([[98, 140]])}
    (view,) = views_of(ProcessedImage(config, None, inputs, 0, (280, 196)))
    assert view.index.shape == (3, 5)
    assert view.box == (0, 0, 280, 168)


def test_padding_to_whole_patches_lies_outside_the_image() -> None:
    """Fuyu: 1000 x 560 becomes 480 x 268 of 480 x 270 pixels; Inkling: 80 x 50 in two rows, a third column empty."""
    fuyu = {"size": {"height": 270, "width": 480}, "patch_size": {"height": 30, "width": 30}}
    inkling = {"size": {"height": 40, "width": 40}}
    for name, settings, size, shape, box in (
        ("fuyu", fuyu, (1000, 560), (9, 16), (0, 0, 1000, 270 * 560 / 268)),
        ("inkling_mm_model", inkling, (80, 50), (2, 3), (0, 0, 120, 80)),
    ):
        config = SimpleNamespace(model_type=name, image_token_id=7)
        processor = SimpleNamespace(image_processor=SimpleNamespace(**settings))
        inputs = {"input_ids": np.array([[1, *[7] * (shape[0] * shape[1]), 2]])}
        (view,) = views_of(ProcessedImage(config, processor, inputs, 0, size))
        assert view.index.shape == shape
        np.testing.assert_allclose(view.box, box)


def test_every_image_text_type_of_transformers_is_accounted_for() -> None:
    """Fails with new model types of transformers: support them, refuse them with a reason, or list them as unknown.

    For unknown ones, one grid is tried with a warning, or the image is refused.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    kinds = [set(FAMILIES), set(REFUSED), set(CHECKS["unknown"])]
    assert sum(map(len, kinds)) == len(set.union(*kinds)), "a type is on two lists"
    assert set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set.union(*kinds) == set()


def test_resamplers_are_refused() -> None:
    for name in ("aria", "idefics2"):
        with pytest.raises(UsageError, match="resampler"):
            check_family(SimpleNamespace(model_type=name))


def encoded(
    ids: list[int] | int, size: tuple[int, int] = (30, 20), *, merge: int | None = None, **outputs: Any
) -> ProcessedImage:
    """The first of two samples of an unknown family whose image token is 7; a number of `ids` means a run of them."""
    config = SimpleNamespace(model_type="novel", image_token_id=7)
    own = SimpleNamespace(image_processor=SimpleNamespace(**({} if merge is None else {"merge_size": merge})))
    row = [1, *[7] * ids, 2] if isinstance(ids, int) else ids
    return ProcessedImage(config, own, {"input_ids": np.array([row, row]), **outputs}, 0, size)


def test_an_unknown_family_is_read_as_one_grid_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    check_family(SimpleNamespace(model_type="novel", image_token_id=7))
    assert "nobody has checked" in caplog.text
    (view,) = views_of(encoded([1, 7, 7, 7, 7, 2]))
    assert view.box == (0, 0, 30, 20)
    assert view.index.tolist() == [[1, 2], [3, 4]]


def pixels(*shape: int, empty: int = 0) -> torch.Tensor:
    """The last `empty` tiles are padding."""
    values = torch.ones(shape)
    if empty:
        values[:, -empty:] = 0
    return values


@pytest.mark.parametrize(
    ("image", "grid"),
    [
        pytest.param(encoded(144, (512, 288), image_grid_thw=[[1, 18, 32], [1, 2, 2]]), (9, 16), id="merged"),
        pytest.param(encoded(144, (512, 288), image_grid_thw=[[1, 9, 16]] * 2, merge=1), (9, 16), id="plain"),
        pytest.param(encoded(6, image_grid_thw=torch.tensor([[1, 4, 6]] * 2), merge=2), (2, 3), id="no square"),
        pytest.param(encoded(144, (512, 288), pixel_values=pixels(2, 3, 96, 96)), (12, 12), id="squeezed"),
        pytest.param(encoded(144, image_sizes=[[96, 96], [96, 48]]), (12, 12), id="square size"),
        pytest.param(encoded(4, pixel_values=pixels(2, 2, 3, 8, 8, empty=1)), (2, 2), id="one tile of two"),
        pytest.param(encoded(144, (640, 480)), (12, 12), id="no other grid of that aspect"),
    ],
)
def test_an_unknown_family_reads_a_grid_that_nothing_contradicts(image: ProcessedImage, grid: tuple[int, int]) -> None:
    (view,) = views_of(image)
    assert view.index.shape == grid
    assert view.index.ravel().tolist() == list(range(1, 1 + grid[0] * grid[1]))
    assert view.box == (0, 0, *image.image_size)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (encoded([1, 7, 7, 7, 2]), "3 image tokens are no square number"),
        (encoded([7, 7, 1, 7, 7]), "do not follow each other"),
        (encoded([1, 2]), "0 image tokens do not follow"),
        (encoded(144, (512, 288)), "512 x 288 pixels kept at its aspect has as many, 9 rows of 16"),
        (encoded(144, image_grid_thw=[[1, 18, 31]] * 2), "image_grid_thw, which says 1 x 18 x 31"),
        (encoded(144, image_grid_thw=[[2, 18, 32]] * 2), "2 x 18 x 32"),
        (encoded(144, image_grid_thw=[[1, 36, 64]] * 2, merge=2), "1 x 36 x 64"),
        (encoded(144, image_grid_thw=[[1, 0, 0]] * 2), "1 x 0 x 0"),
        (encoded(144, image_grid_thw=[[1, 18, 32]] * 3), "does not give this image three numbers"),
        (encoded(144, image_sizes=[[288, 512], [96, 96]]), "image_sizes says 288 x 512"),
        (encoded(144, spatial_shapes=torch.tensor([[9, 16]] * 2)), "spatial_shapes says 9 x 16"),
        (encoded(144, image_grid_hws=np.array([[9, 16]] * 2)), "image_grid_hws says 9 x 16"),
        (encoded(144, spatial_shapes=[[12, 12]] * 5), "spatial_shapes does not give this image one"),
        (encoded(144, image_sizes=[[[12, 12], [12]], []]), "image_sizes does not give this image one"),
        (encoded(144, pixel_values=pixels(2, 3, 96, 160)), "shown as 160 x 96 pixels"),
        (encoded(1024, pixel_values=pixels(2, 4, 3, 8, 8)), "shown in 4 parts"),
        (encoded(1024, pixel_values=pixels(8, 3, 8, 8)), "shown in 8 parts"),
    ],
)
def test_an_unknown_family_with_an_ambiguous_grid_is_refused(image: ProcessedImage, message: str) -> None:
    """Any output of the processor may contradict a square; the message names it."""
    with pytest.raises(UsageError, match="positions in the image are unknown") as caught:
        views_of(image)
    assert message in str(caught.value)


def test_an_unknown_relative_of_a_known_family_gets_the_same_grid() -> None:
    """By its processor's `image_grid_thw`: 512 x 288 pixels are 9 x 16 tokens, not 12 x 12."""
    lvlm, image = tiny("qwen3_vl"), coordinate_image(512, 288)
    inputs = lvlm.model_inputs([image], [lvlm.prompt("the dog")])
    config = SimpleNamespace(model_type="qwen9_vl", image_token_id=lvlm.image_token_id)
    (found,) = views_of(ProcessedImage(config, lvlm.processor, inputs, 0, image.size))
    (expected,) = lvlm.views_in(inputs, 0, image)
    assert found.index.shape == expected.index.shape == (9, 16)
    np.testing.assert_array_equal(found.index, expected.index)
    assert found.box == expected.box


def test_a_family_without_image_tokens_is_refused() -> None:
    with pytest.raises(UsageError, match="no image token"):
        check_family(SimpleNamespace(model_type="novel"))
