"""Several images in one prompt: where each one's tokens lie, which one is grounded, and the stages' files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_models import tiny
from front import (
    EXPRESSIONS,
    Calls,
    Front,
    cached_load_model,
    draw_image,
    read_lines,
    stub_figures,
    write_lines,
)
from PIL import Image
from test_workers import by_one_worker

import localization_heads as lh
from localization_heads.attention import AttentionMaps, join_images
from localization_heads.data import sources
from localization_heads.data.samples import load_samples
from localization_heads.data.sources import LoadedImages, load_prompt_images
from localization_heads.grounder import Grounder
from localization_heads.grounding.maps import image_shares
from localization_heads.heads.head import Head
from localization_heads.lvlm import attention_model
from localization_heads.lvlm.answers.box_formats import FORMATS
from localization_heads.lvlm.checks.doctor import eager_attention
from localization_heads.lvlm.checks.footprints import coordinate_image, image_features, view_errors
from localization_heads.lvlm.extra_prompts import ExtraPrompts
from localization_heads.lvlm.families.geometry import Layout, View, split_views
from localization_heads.lvlm.families.table import SEVERAL_IMAGES
from localization_heads.lvlm.model import LVLM
from localization_heads.lvlm.native_box import generate_box
from localization_heads.options.groups import CriteriaOptions, GroundingOptions
from localization_heads.stages import workers
from localization_heads.stages.entries import MAX_CHUNK_PIXELS, DecodedImageCache, Entries
from localization_heads.store.attention_files import load_attention

SEVERAL = [
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "internvl",
    "llava_onevision",
    "idefics3",
    "smolvlm",
]
SEVERAL += ["gemma3", "mistral3", "llama4"]
SIZES, TRACED = [(96, 150), (170, 64)], [(150, 110), (110, 170)]
FEWER_TILES = {"idefics3": 2 * 364, "smolvlm": 2 * 512}
HEADS = [Head(1, 0), Head(1, 2), Head(1, 3)]


def noise(*sizes: tuple[int, int], seed: int = 0) -> LoadedImages:
    rng = np.random.default_rng(seed)
    return LoadedImages([Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes])


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], LVLM]:
    """The tiny model of a family, with few tiles where its processor enlarges images to many."""

    def of(name: str) -> LVLM:
        lvlm = tiny(name)
        if edge := FEWER_TILES.get(name):
            monkeypatch.setattr(lvlm.processor.image_processor, "size", {"longest_edge": edge})
        return lvlm

    return of


# --- geometry


@pytest.mark.parametrize("name", SEVERAL)
def test_each_token_shows_its_own_image(name: str, few: Callable[[str], LVLM]) -> None:
    """The features of an image's cells are the same as when it is alone in the prompt.

    Its layout when alone is traced through the real processor in `test_families`. LLaVA-OneVision, which shows an image
    among others in another way, is traced below.
    """
    lvlm, images = few(name), noise(*SIZES)
    inputs = lvlm.model_inputs([images], [lvlm.with_num_images(2).prompt("the dog")])
    together = image_features(lvlm, inputs)
    views = lvlm.views_of_images(inputs, 0, images)
    tokens = [int(token) for each in views for view in each for token in view.index.ravel()]
    assert len(set(tokens)) == len(tokens)
    assert {inputs["input_ids"][0, token].item() for token in tokens} == {lvlm.image_token_id}
    if name == "llava_onevision":
        return
    for image, each in zip(images.images, views, strict=True):
        alone = lvlm.model_inputs([image], [lvlm.prompt("the dog")])
        features = image_features(lvlm, alone)
        for view, own in zip(each, lvlm.views_in(alone, 0, image), strict=True):
            assert (view.name, view.box) == (own.name, own.box)
            np.testing.assert_array_equal(view.x_edges, own.x_edges)
            torch.testing.assert_close(together[view.index], features[own.index], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_footprints_of_two_images_lie_in_their_cells(name: str) -> None:
    """Traced from the pixels of each image, whose sizes differ."""
    lvlm = tiny(name)
    for place, size in enumerate(TRACED):
        others = [Image.new("RGB", one) for one in TRACED]
        both = LoadedImages([*others[:place], coordinate_image(*size), *others[place + 1 :]])
        inputs = lvlm.model_inputs([both], [lvlm.with_num_images(len(TRACED)).prompt("it")])
        views = lvlm.views_of_images(inputs, 0, both)[place]
        for view, errors in view_errors(lvlm, size, views, both).items():
            assert len(errors) >= 3, view
            assert np.abs(errors).max() < 0.25, view


@pytest.mark.parametrize("name", SEVERAL)
def test_maps_of_two_images_equal_eager_attention(name: str, few: Callable[[str], LVLM]) -> None:
    lvlm, images = few(name), noise(*SIZES)
    maps = lvlm.attend(images, "the red car")
    inputs = lvlm.model_inputs([images], [lvlm.with_num_images(2).prompt("the red car")])
    with eager_attention(lvlm.model), torch.inference_mode():
        expected = lvlm.model(**inputs, output_attentions=True, use_cache=False).attentions
    layers = sorted(lvlm.attention_modules)[-len(expected) :]
    for views, one in zip(lvlm.views_of_images(inputs, 0, images), maps.images, strict=True):
        for layer, row in zip(layers, expected, strict=True):
            own = [row[0, :, -1].numpy()[:, view.index] for view in views]
            mass = sum(maps.sum((1, 2)) for maps in own)
            np.testing.assert_allclose(one.attention[layer].sum((1, 2)), mass, rtol=0, atol=1e-5)
            if len(views) == 1:
                np.testing.assert_allclose(one.attention[layer], own[0], rtol=0, atol=1e-5)


# --- pure functions: shares, token layout, the choice of an image


def random_maps(*grids: tuple[int, int], peaks: tuple[float, ...] = (), seed: int = 0) -> AttentionMaps:
    rng = np.random.default_rng(seed)
    each = []
    for number, (h, w) in enumerate(grids):
        attention = rng.uniform(0, 0.01, (2, 4, h, w)).astype(np.float32)
        attention[..., h // 2, w // 2] += peaks[number] if peaks else 0
        each.append(AttentionMaps(attention, (0, 0, 10 * w, 10 * h), (10 * w, 10 * h), query="the dog"))
    return join_images(each)


def test_image_shares_leave_out_padding() -> None:
    """The second image is 10 pixels high and its grid covers 20: the lower row is padding."""
    first = AttentionMaps(np.array([[[[1.0, 2.0]]]], np.float32), (0, 0, 20, 10), (20, 10))
    second = AttentionMaps(np.array([[[[1.0], [8.0]]]], np.float32), (0, 0, 10, 20), (10, 10))
    maps = join_images([first, second])
    assert maps.image_index == 1  # 9 against 3, padding included
    assert image_shares(maps, [Head(0, 0)]).tolist() == [0.75, 0.25]
    nothing = join_images([first.named(id="", image_file="")] * 3)
    nothing.images[0].attention[:] = 0
    assert image_shares(nothing, [Head(0, 0)]).tolist() == [1 / 3] * 3


def test_at_selects_the_maps_of_another_image() -> None:
    maps = random_maps((2, 3), (4, 2), peaks=(1, 0))
    assert maps.image_index == 0 and maps.at(0) is maps and maps.at(None) is maps
    other = maps.at(1)
    assert other.grid == (4, 2) and other.image_size == (20, 40) and other.image_index == 1
    np.testing.assert_array_equal(other.attention, maps.images[1].attention)
    np.testing.assert_array_equal(other.at(0).attention, maps.attention)
    kept = maps.only([(1, 2)])
    assert kept.at(1).places([(1, 2)]) == [(0, 0)]
    assert maps.num_bytes == 4 * 8 * (2 * 3 + 4 * 2)


def test_image_tokens_are_assigned_in_order_and_counted() -> None:
    view = View("whole", np.array([[0, 1]]), np.arange(3.0), np.arange(2.0))
    later = View("whole", np.array([[2], [0]]), np.arange(2.0), np.arange(3.0))
    (one,), (two,) = split_views(np.array([4, 5, 9, 10, 11]), [Layout(2, [view]), Layout(3, [later])])
    assert one.index.tolist() == [[4, 5]] and two.index.tolist() == [[11], [9]]
    with pytest.raises(lh.UsageError, match="4 image tokens where the 2 images have 5"):
        split_views(np.arange(4), [Layout(2, [view]), Layout(3, [later])])


def grounder(**options: Any) -> Grounder:
    return Grounder(tuple(HEADS), CriteriaOptions(), GroundingOptions(), **options)


class RecordingSegmenter:
    name = "recording"

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def segment(self, image: Image.Image, grounding: Any) -> Any:
        self.sizes.append(image.size)
        return grounding.mask


@pytest.fixture
def looked_at() -> AttentionMaps:
    """Most heads look at the first image, but the three that ground look at the second."""
    maps = random_maps((8, 8), (6, 10), peaks=(5, 0))
    for layer, head in HEADS:
        maps.images[0].attention[layer, head] = 1e-4
        maps.images[1].attention[layer, head, 1:4, 2:6] = 1
    return maps


def test_the_grounding_heads_choose_the_image(looked_at: AttentionMaps) -> None:
    first, second = (grounder().ground(maps, None) for maps in looked_at.images)
    found = grounder().ground(looked_at, None)
    assert (looked_at.image_index, found.image_index, found.image_size) == (0, 1, (100, 60))
    assert found.box == second.box
    np.testing.assert_array_equal(found.mask, second.mask)
    assert [one.chosen for one in found.each] == [False, True]
    assert sum(one.image_share or 0 for one in found.each) == pytest.approx(1)
    each = grounder(each_image=True).ground(looked_at, None).each
    assert [one.chosen for one in each] == [True, True]
    assert each[0].box == first.box
    with pytest.raises(lh.UsageError, match="no calibration is one of several images"):
        grounder(abstain=0.5).ground(looked_at, None)


def test_all_objects_are_found_in_the_chosen_image(looked_at: AttentionMaps) -> None:
    found, segmenter = grounder().ground(looked_at, None), RecordingSegmenter()
    every = grounder().ground_all(looked_at, None)
    assert {one.image_index for one in every} == {1}
    assert (every[0].box, every[0].each[0].box) == (found.box, found.each[0].box)
    assert [one.each[1].box for one in every] == [one.box for one in every]
    images = LoadedImages([Image.new("RGB", one.image_size) for one in looked_at.images])
    assert len(grounder(segmenter=segmenter).ground_all(looked_at, images)) == len(segmenter.sizes)
    assert set(segmenter.sizes) == {(100, 60)}  # none in the other image


def test_siblings_are_contrasted_within_the_same_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if they draw the attention to another image than the expression does."""

    def in_turn(each: Sequence[AttentionMaps]) -> AttentionMaps:
        index = int(each[0].query != "the dog")
        return replace(each[index], images=tuple(each), image_index=index)

    monkeypatch.setattr(attention_model, "join_images", in_turn)
    lvlm, images = tiny("qwen2_vl"), noise(*SIZES)
    maps = lvlm.attend(images, "the dog", extra_prompts=ExtraPrompts("siblings"), siblings=["the cat"])
    (other,) = maps.others
    assert (maps.image_index, other.query, other.image_index) == (0, "the cat", 0)
    alone = lvlm.attend(images, "the cat").images[0]
    np.testing.assert_allclose(other.attention, alone.attention, atol=1e-6)
    assert maps.at(1).others[0].grid == maps.at(1).grid


# --- data files


def test_an_entry_may_list_images(tmp_path: Path) -> None:
    a, b = (draw_image(tmp_path / f"{number}.png", number) for number in range(2))
    good = {"id": "a", "prompt": "the dog", "image_path": ["0.png", "1.png"]}
    bad: dict[str, dict[str, Any]] = {
        "'bbox' belongs to one: leave it out": {"bbox": [0, 0, 9, 9]},
        "'masks' belongs to one: leave it out": {"masks": [[[0, 0, 9, 0, 9, 9]]]},
        "1 given, but it must be 2 to 32": {"image_path": ["0.png"]},
        "33 given, but it must be 2 to 32": {"image_path": ["0.png"] * 33},
        "gone.png": {"image_path": ["0.png", "gone.png"]},
        "'image_path' must be text": {"image_path": ["0.png", ["1.png"]]},
    }
    wrong = [{**good, "id": f"b{number}", **change} for number, change in enumerate(bad.values())]
    file = load_samples(write_lines(tmp_path / "data.jsonl", [good, *wrong]))
    (sample,) = file.samples
    assert (sample.image_file, sample.at(1).image_file) == (f"{a} + {b}", str(b))
    for found, message in zip(file.bad, bad, strict=True):
        assert message in found.reason


def test_the_pixels_of_a_prompts_images_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_TOTAL_PIXELS", 100)
    images = [Image.new("RGB", (5, 10))] * 3
    assert len(load_prompt_images(lh.Together(images[:2]))) == 2
    with pytest.raises(lh.UsageError, match="with those before it, over the limit of 0"):
        load_prompt_images(lh.Together(images))


def test_prompts_with_addresses_are_a_chunk_of_their_own(tmp_path: Path) -> None:
    """As the size of an image that is not downloaded yet is unknown."""
    file = draw_image(tmp_path / "a.png", 1, (20, 10))
    pixels = DecodedImageCache(0).pixels
    with_address = lh.Together([file, lh.Address("https://a.org/b.png")])
    assert pixels(lh.Sample(lh.Together([file, file]), "the dog")) == 400
    assert pixels(lh.Sample(with_address, "the dog")) == MAX_CHUNK_PIXELS


def test_together_in_python() -> None:
    """`lh.Together` equals what the stages load; what takes a single image refuses it, as it refuses no list."""
    for wrong in ("ab.png", None, 3):
        with pytest.raises(lh.UsageError, match="give a list of two or more"):
            lh.Together(wrong)  # type: ignore[arg-type]
    lvlm, images = tiny("qwen2_vl"), noise(*SIZES)
    pair = lh.Together(images.images)
    np.testing.assert_array_equal(
        lvlm.attend(pair, "the dog").images[1].attention,  # type: ignore[arg-type]
        lvlm.attend(images, "the dog").images[1].attention,
    )
    for ask in (
        lambda: lvlm.trace(pair, "the dog", HEADS),
        lambda: lvlm.trace(images, "the dog"),
        lambda: lvlm.attend_clip([pair], "the dog"),
        lambda: generate_box(lvlm, FORMATS["qwen2"], images, "the dog"),
    ):
        with pytest.raises(lh.UsageError, match="takes a single image, and the prompt has 2") as error:
            ask()
        assert "\n" not in str(error.value)
    for paths in (lh.Together(["a.png", "b.png"]), "a.png"):
        with pytest.raises(lh.UsageError, match="a model takes PIL images"):
            lvlm.attend(paths, "the dog")  # type: ignore[arg-type]


def test_an_error_names_its_entry_once() -> None:
    sample = lh.Sample(lh.Together(["a.png", "b.png"]), "the dog", id="t", line=1)
    entries = Entries([sample])
    with entries.skip_on_error(sample):
        raise AssertionError(sample.single)
    assert str(entries.failures[0]).startswith("line 1 (t): its prompt has several images")


# --- stages


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, lvlm = tmp_path_factory.mktemp("saved") / "qwen", tiny("qwen2_vl")
    lvlm.processor.save_pretrained(folder)
    lvlm.model.save_pretrained(folder)
    return str(folder)


def asked(saved: str, *options: str) -> tuple[str, ...]:
    heads = f"heads=[{','.join(f'{head.layer}-{head.head}' for head in HEADS)}]"
    return (f"model.name={saved}", "conv_mode=plain", heads, "criteria.exclude_layers=0", "top_n=3", *options)


def only(pattern: str) -> Path:
    (found,) = Path("outputs").rglob(pattern)
    return found


def test_ground_takes_a_list_and_equals_python(front: Front, saved: str) -> None:
    a, b = draw_image(Path("a.png"), 1), draw_image(Path("b.png"), 2, (80, 120))
    options = asked(saved, "stage=ground", "image_file=[a.png,b.png]", "query=the red car")
    front.succeed(*options, "image_boxes=each")
    (line,) = read_lines(only("a-b_the-red-car_prediction.jsonl"))
    assert only("a-b_the-red-car_grounding.png").stat().st_size > 0
    found = lh.ground(lh_model(saved), lh.Together([a, b]), "the red car", HEADS, image_boxes="each")
    assert line["image_index"] == found.image_index
    for one, own in zip(line["images"], found.each, strict=True):
        assert one["bbox"] == pytest.approx(own.box)
        assert one["attention"] == pytest.approx(own.image_share)
    assert found.image.size == found.image_size == [(64, 48), (80, 120)][found.image_index]
    assert found.to_dict()["image"] == ["a.png", "b.png"][found.image_index]
    apart = lh.ground(lh_model(saved), [a, b], "the red car", HEADS)
    assert [one.image_size for one in apart] == [(64, 48), (80, 120)] and not apart[0].each
    front.succeed(*options, "together=false")
    ids = [line["id"] for line in read_lines(only("predictions.jsonl"))]
    assert ids == ["a_the-red-car", "b_the-red-car"]
    front.succeed(*options, "image_boxes=one")
    (line,) = read_lines(only("a-b_the-red-car_prediction.jsonl"))
    assert [one["bbox"] is None for one in line["images"]] == [n != line["image_index"] for n in range(2)]


def lh_model(saved: str) -> LVLM:
    return cached_load_model(saved, device="cpu", conv_mode="plain")


def write_entries(folder: Path, count: int = 3) -> None:
    names = [draw_image(folder / f"{n}.png", n, (64 + 16 * n, 48)).name for n in range(count + 1)]
    pairs = [{"id": f"e{n}", "prompt": EXPRESSIONS[n], "image_path": names[n : n + 2]} for n in range(count)]
    write_lines(folder / "data.jsonl", [*pairs, {"id": "one", "prompt": "the dog", "image_path": names[0]}])


def test_an_interrupted_run_resumes_with_the_same_results(
    front: Front, saved: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_figures(monkeypatch)
    write_entries(front.folder)
    options = asked(saved, "stage=ground", "data_file=data.jsonl", "batch_size=2", "segmenter=none")
    front.succeed(*options, "output_dir=whole")
    (whole,) = Path("whole").rglob("predictions.jsonl")
    assert [line.get("image_index") is None for line in read_lines(whole)] == [False, False, False, True]
    calls.restart(fail_at=1)
    assert front.finder(*options).status == 130
    calls.restart()
    front.succeed(*options)
    assert sum(calls.sizes) < 4
    assert only("predictions.jsonl").read_bytes() == whole.read_bytes()
    monkeypatch.setattr(workers, "run_on_workers", by_one_worker)
    front.succeed(*options, "output_dir=spread", "engine=ray")
    (spread,) = Path("spread").rglob("predictions.jsonl")
    assert spread.read_bytes() == whole.read_bytes()


def test_a_batch_finds_heads_and_grounds(front: Front, saved: str) -> None:
    write_entries(front.folder, 2)
    options = asked(saved, "stage=batch", "data_file=data.jsonl", "num_samples=2", "visualize_limit=1")
    front.succeed(*options, "report_samples=2")
    found = read_lines(only("predictions.jsonl"))
    assert [len(line.get("images", [])) for line in found] == [2, 2, 0]
    assert only("e0_grounding.png").stat().st_size and only("e0_visualization.png").stat().st_size
    maps = load_attention(only("e0.pkl"))
    assert maps.image_file in ("0.png", "1.png") and not maps.images


def test_pipeline_takes_a_list(front: Front, saved: str) -> None:
    draw_image(Path("a.png"), 1), draw_image(Path("b.png"), 2)
    options = asked(saved, "stage=pipeline", "image_file=[a.png,b.png]", "query=the dog", "max_new_tokens=1")
    assert "in image" in front.succeed(*options).out
    assert only("a-b_the-dog.pkl").is_file() and only("a-b_the-dog_grounding.png").is_file()


# --- refusals


def test_what_takes_a_single_image_refuses_a_list(front: Front, saved: str) -> None:
    draw_image(Path("a.png"), 1), draw_image(Path("b.png"), 2)
    both = "image_file=[a.png,b.png]"
    for stage, options, said in (
        ("ground", (both,), "takes one image in a prompt; several: gemma3,"),
        ("trace", (both,), "stage=trace takes one image"),
        ("ground", (both, "zoom=true"), "zoom=true crops a single image"),
        ("ground", ("image_file=a.png", "together=true"), "1 given, but it must be 2 to 32"),
        ("ground", ("image_file=[a.png]",), "a list of two or more"),
    ):
        assert said in front.error(f"stage={stage}", "query=the dog", *options), options
    write_entries(front.folder, 1)
    for options, said in (
        (("zoom=true", "segmenter=none"), "its prompt has several images"),
        ((), "takes one image in a prompt"),
    ):
        found = front.finder("stage=ground", "data_file=data.jsonl", *options)
        assert found.status == 1 and said in found.out + found.err
    with pytest.raises(lh.UsageError, match="takes one image in a prompt"):
        lh.ground(lh.load_model(device="cpu"), lh.Together(["a.png", "b.png"]), "the dog")


def test_every_family_of_the_table_is_tested() -> None:
    """The two mixture-of-experts models read images as their dense siblings do."""
    assert set(SEVERAL) | {"qwen3_vl_moe", "qwen3_5_moe"} == SEVERAL_IMAGES
