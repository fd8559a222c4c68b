"""Segmenters: prompts by hand, geometry against the families' own processors, GrabCut on drawn images, tiny SAMs."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageDraw
from small_maps import grounded
from tiny_sams import SIDE, TINY, noise

from localization_heads.cells import tight_box
from localization_heads.errors import UsageError, WorkError
from localization_heads.figures import plot_grounding
from localization_heads.grounder import make_segmenter
from localization_heads.grounding.ground import Grounding
from localization_heads.options.groups import SegmenterOptions
from localization_heads.segmentation import grabcut
from localization_heads.segmentation import sam as sams
from localization_heads.segmentation.grabcut import GrabCut
from localization_heads.segmentation.sam import FAMILIES, Sam, load_sam, on_image
from localization_heads.segmentation.segmenter import (
    GRABCUT,
    LOGIT,
    Frame,
    Proposer,
    background_points,
    interior_points,
    map_logits,
    proposal_size,
    refine,
)


def square(side: int = 9, start: int = 2, stop: int = 7) -> np.ndarray:
    grid = np.zeros((side, side))
    grid[start:stop, start:stop] = 1
    return grid


class TestInteriorPoints:
    def test_by_hand(self):
        # depths in the 5 x 5 block: 3 cells at the centre, 2 around it; the inner 3 x 3 are at least half as deep
        points = interior_points(grounded(square()), 9)
        assert points[0] == (45, 45)  # the deepest, then the corners, which are the farthest
        assert set(points[1:5]) == {(35, 35), (55, 35), (35, 55), (55, 55)}
        assert len(points) == len(set(points)) == 9

    def test_ties_go_to_the_stronger_cell(self):
        grid = square()
        grid[5, 5] = 2
        assert interior_points(grounded(grid, component="all"), 2)[1] == (55, 55)

    def test_points_are_centres_of_the_visible_part_of_cells(self):
        # half of the first column of cells is padding: its visible part is 5 pixels wide
        found = grounded([[9.0, 0, 0]], (-5, 0, 25, 10), (25, 10))
        assert interior_points(found, 3) == [(2.5, 5)]

    @settings(max_examples=50)
    @given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=8)), st.integers(1, 6))
    def test_points_are_deep_and_far_apart(self, mask, count):
        found = grounded(mask)
        points = interior_points(found, count)
        if not found.cells.any():
            assert points == []
            return
        cells = [(int(y // 10), int(x // 10)) for x, y in points]
        outside = list(np.ndindex(mask.shape[0] + 2, mask.shape[1] + 2))
        padded = np.pad(found.cells, 1)
        depth = {
            (r - 1, c - 1): min(np.hypot(r - r2, c - c2) for r2, c2 in outside if not padded[r2, c2])
            for r, c in np.argwhere(padded).tolist()
        }
        core = [cell for cell, d in depth.items() if d >= max(depth.values()) / 2 - 1e-9]
        assert len(cells) == len(set(cells)) == min(count, len(core))
        assert set(cells) <= set(core)
        assert depth[cells[0]] == pytest.approx(max(depth.values()))
        for n in range(1, len(cells)):  # no other cell is farther from the points before

            def gap(cell, before=tuple(cells[:n])):
                return min(np.hypot(cell[0] - r, cell[1] - c) for r, c in before)

            assert gap(cells[n]) == pytest.approx(max(gap(cell) for cell in core))


class TestMapLogits:
    def test_by_hand(self):
        found = grounded([[0.0, 1, 5]])  # mean 2; a frame of one pixel a cell
        frame = Frame((30, 10), side=6, inner=(6, 2))
        logits = map_logits(found, frame, 6)
        # two pixels per cell, a quarter of a cell from its centre; logits of the cells: -10, -5, 10
        assert logits[0] == pytest.approx([-10, -8.75, -6.25, -1.25, 6.25, 10])
        assert (logits[2:] == -LOGIT).all()  # the padding below the image

    def test_cells_outside_the_image_have_the_lowest_logit(self):
        # padded to a square of 4 x 4 cells: rows 0 and 3 show no image
        found = grounded(np.arange(16.0).reshape(4, 4), (0, -10, 40, 30), (40, 20))
        logits = map_logits(found, Frame.squashed((40, 20), 8), 8)
        # the first cell of row 1 and the last of row 2 are the minimum and the maximum on the image; the mean is 7.5
        assert (logits[0, 0], logits[-1, -1]) == (-LOGIT, LOGIT)
        assert logits[2, 4] == pytest.approx(10 * (6.25 - 7.5) / (7.5 - 4), abs=1)
        assert (np.diff(logits, axis=1) >= -1e-5).all()

    @pytest.mark.parametrize("size", [(160, 90), (90, 160), (64, 64), (640, 200)])
    @pytest.mark.parametrize("make", [Frame.padded, Frame.squashed])
    def test_the_peak_lies_where_resizing_puts_its_pixels(self, size, make):
        """An image with one bright cell is resized, and compared with the logits of a map with that cell as peak."""
        grid = np.zeros((8, 8))
        grid[5, 2] = 1
        found = grounded(grid, (0, 0, *size), size)
        frame = make(size, 64)
        logits = map_logits(found, frame, 64)
        image = np.zeros((size[1], size[0], 3), dtype=np.uint8)
        x0, y0, x1, y1 = (round(x) for x in found.box)
        image[y0 : max(y1, y0 + 1), x0:x1] = 255
        pixels = np.asarray(Image.fromarray(image).resize(frame.inner, Image.Resampling.BILINEAR))[..., 0]
        rows, columns = np.nonzero(logits > 0)
        bright = np.argwhere(pixels > pixels.max() / 2)
        assert abs(rows.mean() - bright[:, 0].mean()) <= 1
        assert abs(columns.mean() - bright[:, 1].mean()) <= 1

    def test_cropped_regions_have_the_lowest_logit(self):
        found = grounded(square(8, 2, 6), (40, 0, 120, 80), (160, 80))
        logits = map_logits(found, Frame.squashed((160, 80), 16), 16)
        assert (logits[:, :4] == -LOGIT).all() and (logits[:, 12:] == -LOGIT).all()
        assert (logits[8, 6:10] > 0).all()


def sam_processor(side: int):
    from transformers import SamProcessor
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    sizes = {
        "size": {"longest_edge": side},
        "pad_size": {"height": side, "width": side},
        "mask_size": {"longest_edge": side // 4},
    }
    return SamImageProcessorPil(**sizes), SamProcessor


@pytest.fixture(scope="module", params=list(TINY))
def sam(request) -> Sam:
    family = FAMILIES[request.param]
    return Sam(TINY[request.param](), family, family.mean, family.std)


def with_prompts(sam: Sam, *prompt: str, **options) -> Sam:
    return Sam(sam.model, sam.family, sam.mean, sam.std, prompt=prompt, **options)


SIZES = [(160, 90), (90, 160), (64, 64), (33, 50), (501, 499)]


class TestGeometry:
    @pytest.mark.parametrize("size", SIZES)
    def test_pixels_agree_with_sams_processor(self, size):
        family = FAMILIES["sam"]
        sam = Sam(TINY["sam"](), family, family.mean, family.std)
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        processor, _ = sam_processor(SIDE)
        theirs = processor(image, return_tensors="np")
        assert sam.frame(size).inner == tuple(theirs["reshaped_input_sizes"][0][::-1])
        assert sam.pixel_values(image) == pytest.approx(theirs["pixel_values"], abs=1e-4)

    @pytest.mark.parametrize("size", SIZES)
    def test_masks_are_resized_as_by_sams_processor(self, size):
        frame = Frame.padded(size, SIDE)
        logits = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
        processor, _ = sam_processor(SIDE)
        theirs = processor.post_process_masks(
            logits[None, None, None],
            original_sizes=[size[::-1]],
            reshaped_input_sizes=[frame.inner[::-1]],
            pad_size={"height": SIDE, "width": SIDE},
        )
        assert (on_image(logits, frame) == theirs[0][0, 0]).all()

    @pytest.mark.parametrize("size", SIZES)
    def test_coordinates_agree_with_the_processors(self, size):
        from transformers import SamProcessor
        from transformers.models.sam2.processing_sam2 import Sam2Processor

        box = torch.tensor([[3.0, 5.0, 31.0, 29.5]])
        for make, kind in ((Frame.padded, SamProcessor), (Frame.squashed, Sam2Processor)):
            (across, down), arguments = make(size, 1024).scale, (1024, box.numpy(), size[::-1])
            if kind is Sam2Processor:
                arguments = (1024, box, size[::-1])
            processor = object.__new__(kind)
            if kind is SamProcessor:
                processor.image_processor = sam_processor(1024)[0]
            theirs = processor._normalize_coordinates(*arguments, is_bounding_box=True)
            ours = box.numpy() * (across, down, across, down)
            assert np.asarray(theirs).reshape(1, 4) == pytest.approx(ours, rel=1e-5)

    def test_a_mask_lies_where_its_prompt_does(self, sam):
        """The map's logits, resized to the image as if they were the model's answer."""
        for size in (160, 90), (90, 160), (501, 499):
            found = grounded(square(8, 2, 5), (0, 0, *size), size)
            frame = sam.frame(size)
            logits = map_logits(found, replace(frame, side=SIDE), 64)
            back = on_image(torch.from_numpy(logits), frame).numpy()
            x0, y0, x1, y1 = found.box
            # bilinear values cross the threshold (mean 9/64, peak 1) a little outside the positive cells
            margin = 0.5 * max(size) / 8 + max(size) / 64
            assert np.abs(np.array(tight_box(back)) - (x0, y0, x1, y1)).max() <= margin
            assert back[int((y0 + y1) / 2), int((x0 + x1) / 2)]


def test_grabcut_proposes_objects_of_other_colours_than_the_rim():
    image = Image.new("RGB", (200, 100), (90, 90, 90))
    draw = ImageDraw.Draw(image)
    for box, colour in (((20, 20, 59, 69), "red"), ((110, 30, 169, 79), "blue")):
        draw.rectangle(box, fill=colour)
    assert isinstance(GrabCut(), Proposer)
    boxes = {tight_box(mask) for mask in GrabCut().propose(image)}
    assert {(20, 20, 60, 70), (110, 30, 170, 80)} <= boxes
    assert GrabCut().propose(image.resize((2000, 1000))).shape[1:] == (128, 256)


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (300, 1), (5, 5)])
def test_grabcut_proposes_nothing_in_tiny_or_uniform_images(size):
    found = GrabCut().propose(Image.new("L", size))
    assert found.shape == (0, *proposal_size(size)[::-1])


class TestSam:
    def test_every_combination_of_prompts(self, sam):
        image = noise(160, 90)
        found = grounded(square(), (0, 0, 160, 90), (160, 90))
        masks = []
        for count in (1, 2, 3):
            for prompt in itertools.combinations(("box", "points", "map"), count):
                masks.append(with_prompts(sam, *prompt).segment(image, found))
                assert masks[-1].shape == (90, 160) and masks[-1].dtype == bool
        assert len({mask.tobytes() for mask in masks}) == len(masks)  # each prompt has an effect

    def test_prompts_are_in_pixels_of_the_square(self, sam):
        found = grounded(square(), (0, 0, 160, 90), (160, 90))
        frame = sam.frame((160, 90))
        prompts = with_prompts(sam, "box", "points", "map", num_points=2).prompts(found, frame)
        down = SIDE / 90 if sam.family.squashes else SIDE / 160
        x0, y0, x1, y1 = found.box
        expected = [x0 * SIDE / 160, y0 * down, x1 * SIDE / 160, y1 * down]
        assert prompts["input_boxes"].flatten().tolist() == pytest.approx(expected)
        assert prompts["input_points"].shape == (1, 1, 2, 2)
        points = [[x * SIDE / 160, y * down] for x, y in interior_points(found, 2)]
        assert prompts["input_points"][0, 0].numpy() == pytest.approx(np.array(points))
        assert prompts["input_labels"].tolist() == [[[1, 1]]]
        side = 4 * sam.model.prompt_encoder.image_embedding_size[0]
        assert prompts["input_masks"].shape == (1, 1, side, side)

    def test_signed_points_are_labelled(self, sam):
        """The box of an L contains cells that are not the object's; the lowest of them are background."""
        cells = np.zeros((8, 8))
        cells[1:6, 1:3] = cells[4:6, 1:6] = 1.0
        cells[1:4, 3:6] = 0.1
        cells[2, 4], cells[1, 5] = 0.0, 0.05
        found = grounded(cells, (0, 0, 160, 80), (160, 80))
        assert found.box == (20.0, 10.0, 120.0, 60.0)
        assert background_points(found, 2) == [(90.0, 25.0), (110.0, 15.0)]
        frame = sam.frame((160, 80))
        down = SIDE / 80 if sam.family.squashes else SIDE / 160
        prompts = with_prompts(sam, "points", num_points=2, points="signed").prompts(found, frame)
        places = [*interior_points(found, 2), (90.0, 25.0), (110.0, 15.0)]
        expected = np.array([[x * SIDE / 160, y * down] for x, y in places])
        assert prompts["input_points"][0, 0].numpy() == pytest.approx(expected)
        assert prompts["input_labels"].tolist() == [[[1, 1, 0, 0]]]
        image = noise(160, 80)
        masks = [with_prompts(sam, "points", points=kind).segment(image, found) for kind in ("positive", "signed")]
        assert (masks[0] != masks[1]).any()  # the labels have an effect

    def test_a_box_full_of_the_object_has_no_background_points(self, sam):
        found = grounded(square(8, 2, 5))
        assert background_points(found, 3) == []
        prompts = with_prompts(sam, "points", points="signed").prompts(found, sam.frame(found.image_size))
        assert prompts["input_labels"].tolist() == [[[1, 1, 1]]]

    def test_the_best_of_three_masks_is_taken(self, sam):
        image = noise(80, 80)
        found = grounded(square(8))
        many = with_prompts(sam, "box", multimask=True)
        with torch.inference_mode():
            output = sam.model(
                image_embeddings=many.encode(image),
                multimask_output=True,
                **many.prompts(found, many.frame(image.size)),
            )
        assert output.pred_masks.shape[2] == 3
        best = output.pred_masks[0, 0, output.iou_scores[0, 0].argmax()]
        assert (many.segment(image, found) == on_image(best, many.frame(image.size)).numpy()).all()

    def test_proposals_are_the_masks_of_a_grid_of_points(self, sam, monkeypatch):
        """Against each point by itself; masks with a low predicted IoU and duplicates are left out."""
        monkeypatch.setattr(sams, "GRID_SIZE", 3)
        monkeypatch.setattr(sams, "MIN_PREDICTED_IOU", -np.inf)
        image = noise(400, 300)
        frame = sam.frame(image.size)
        expected, scores = [], []
        for y in (0.5, 1.5, 2.5):
            for x in (0.5, 1.5, 2.5):
                point = torch.tensor([[[[x * frame.inner[0] / 3, y * frame.inner[1] / 3]]]])
                with torch.inference_mode():
                    output = sam.model(
                        image_embeddings=sam.encode(image), input_points=point.float(), multimask_output=True,
                        input_labels=torch.ones((1, 1, 1), dtype=torch.int32),
                    )  # fmt: skip
                small = replace(frame, image_size=(256, 192))
                expected += [on_image(logits, small).numpy() for logits in output.pred_masks[0, 0]]
                scores += output.iou_scores[0, 0].tolist()
        found = sam.propose(image)
        assert found.shape[1:] == (192, 256) and found.dtype == bool
        different = {mask.tobytes() for mask in expected if mask.any()}
        close = [max((one == mask).mean() for mask in expected) for one in found]
        assert len(found) == pytest.approx(len(different), abs=1)  # batches round differently
        assert min(close) > 0.999
        monkeypatch.setattr(sams, "MIN_PREDICTED_IOU", np.median(scores))
        assert 0 < len(sam.propose(image)) < len(found)
        monkeypatch.setattr(sams, "MIN_PREDICTED_IOU", np.inf)
        assert sam.propose(image).shape == (0, 192, 256)

    def test_an_image_is_encoded_once(self, sam, monkeypatch):
        fresh, calls = with_prompts(sam, "box"), []
        encode = type(sam.model).get_image_embeddings
        monkeypatch.setattr(
            type(sam.model),
            "get_image_embeddings",
            lambda self, pixels: calls.append(1) or encode(self, pixels),
        )
        images = [Image.effect_noise((40, 30), 80).convert("RGB") for _ in range(6)]
        found = grounded(square(), (0, 0, 40, 30), (40, 30))
        first = fresh.segment(images[0], found)
        assert (fresh.segment(images[0].copy(), found) == first).all()
        assert len(calls) == 1
        for image in images:
            fresh.segment(image, found)
        assert len(calls) == 6
        assert (fresh.segment(images[0], found) == first).all()
        assert len(calls) == 7  # only the last few are cached
        turned = Image.frombytes("RGB", (30, 40), images[0].tobytes())
        fresh.encode(turned)
        assert len(calls) == 8  # the same bytes in another shape

    def test_cached_embeddings_give_the_mask_of_a_full_forward_pass(self, sam):
        image = noise(80, 80)
        found = grounded(square(8))
        one = with_prompts(sam, "box")
        pixels = torch.from_numpy(one.pixel_values(image))
        with torch.inference_mode():
            prompts = one.prompts(found, one.frame(image.size))
            output = sam.model(pixel_values=pixels, multimask_output=False, **prompts)
        expected = on_image(output.pred_masks[0, 0, 0], one.frame(image.size)).numpy()
        assert (one.segment(image, found) == expected).all()

    @pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
    def test_odd_images(self, sam, size):
        found = grounded(square(8), (0, 0, *size), size)
        mask = with_prompts(sam, "box", "points", "map").segment(Image.new("RGB", size), found)
        assert mask.shape == size[::-1]


class TestCheckpoints:
    @pytest.fixture
    def saved(self, sam, tmp_path):
        sam.model.save_pretrained(tmp_path / "weights")
        return tmp_path / "weights"

    def test_a_local_folder(self, sam, saved):
        (saved / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
        loaded = load_sam(SegmenterOptions(sam.family.kind, str(saved), ("box",), device="cpu"))
        assert (loaded.mean, loaded.std, loaded.name) == ((0.1, 0.2, 0.3), sam.family.std, sam.family.kind)
        image, found = noise(80, 80), grounded(square(8))
        plain = Sam(sam.model, sam.family, loaded.mean, loaded.std, prompt=("box",))
        assert (loaded.segment(image, found) == plain.segment(image, found)).all()

    def test_a_checkpoint_of_another_family_is_refused(self, sam, saved):
        other = next(kind for kind in FAMILIES if kind != sam.family.kind)
        with pytest.raises(UsageError, match=f"write segmenter={sam.family.kind}"):
            load_sam(SegmenterOptions(other, str(saved)))

    def test_missing_weights_are_refused(self, sam, saved):
        from safetensors.torch import load_file, save_file

        weights = load_file(saved / "model.safetensors")
        name = next(name for name in weights if "mask_decoder" in name)
        del weights[name]
        save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(WorkError, match="lacks 1 tensor"):
            load_sam(SegmenterOptions(sam.family.kind, str(saved)))

    def test_broken_weights_are_a_one_line_error(self, sam, saved):
        (saved / "model.safetensors").write_bytes(b"nothing")
        with pytest.raises(WorkError, match=r"segmenter\.name=") as caught:
            load_sam(SegmenterOptions(sam.family.kind, str(saved)))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "error"),
        [
            ("/nowhere/sam", "no such folder"),
            ("sam", "no such folder"),
            ("facebook/sam-vit-huge", "Without a network"),
        ],
    )
    def test_a_missing_checkpoint_says_what_to_do(self, name, error):
        with pytest.raises((UsageError, WorkError), match=error) as caught:
            load_sam(SegmenterOptions("sam", name))
        assert "segmenter=grabcut" in str(caught.value)

    def test_a_folder_without_a_model(self, tmp_path):
        with pytest.raises(UsageError, match=r"no config\.json"):
            load_sam(SegmenterOptions("sam", str(tmp_path)))


def disc(size=(160, 120), box=(50, 30, 110, 90)) -> tuple[Image.Image, np.ndarray]:
    """A red disc on a green field with some noise, and its true mask."""
    noise = np.random.default_rng(0).normal(0, 8, (*size[::-1], 3))
    field = Image.new("RGB", size, (40, 140, 60))
    ImageDraw.Draw(field).ellipse(box, fill=(200, 40, 40))
    truth = np.asarray(field)[..., 0] > 100
    return Image.fromarray(np.clip(np.asarray(field) + noise, 0, 255).astype(np.uint8)), truth


def iou(a, b) -> float:
    return (a & b).sum() / (a | b).sum()


def disc_grounding(size=(160, 120)) -> Grounding:
    """A coarse map of the disc: its hull is a block much larger than the disc."""
    grid = np.zeros((6, 8))
    grid[1:5, 2:6] = 0.6
    grid[2:4, 3:5] = 1
    return grounded(grid, (0, 0, *size), size)


class TestGrabCut:
    def test_finds_the_disc(self):
        image, truth = disc()
        found = disc_grounding()
        mask = GrabCut().segment(image, found)
        assert iou(mask, truth) > 0.95 > 0.8 > iou(found.pseudo_mask, truth)

    def test_is_deterministic(self):
        image, _ = disc()
        first = GrabCut().segment(image, disc_grounding())
        np.random.default_rng(0).random(100)
        assert (GrabCut().segment(image, disc_grounding()) == first).all()

    def test_a_large_image_is_segmented_at_a_small_size(self, monkeypatch):
        seen = []
        original = grabcut.cut
        monkeypatch.setattr(grabcut, "cut", lambda pixels, *rest: seen.append(pixels.shape) or original(pixels, *rest))
        size = (4000, 3000)
        image, truth = disc()
        image, truth = image.resize(size), np.asarray(Image.fromarray(truth).resize(size))
        mask = GrabCut().segment(image, disc_grounding(size))
        assert max(seen[0]) <= grabcut.WORKING_SIDE
        assert mask.shape == (3000, 4000)
        assert iou(mask, truth) > 0.93

    def test_initial_labels_by_hand(self):
        """The level is 1, halfway between 0 and 2."""
        heat = np.array([[9.0, 9, 9, 9], [9, 0, 2, 9], [9, 1, 0, 9]])
        labels = grabcut.initial_labels(heat, (1, 1, 3, 3))
        assert labels.tolist() == [[0, 0, 0, 0], [0, 2, 3, 0], [0, 2, 2, 0]]

    def test_only_the_component_with_most_of_the_map_is_kept(self):
        image, truth = disc()
        twin = np.asarray(image).copy()
        twin[95:105, 60:70] = (200, 40, 40)  # of the object's colour, inside the box
        mask = GrabCut().segment(Image.fromarray(twin), disc_grounding())
        assert not mask[95:105, 60:70].any()
        assert iou(mask, truth) > 0.9

    @pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 50), (3, 3), (5000, 2)])
    def test_odd_images_give_a_mask_of_their_size(self, size):
        found = grounded(square(8), (0, 0, *size), size)
        refined = refine(found, Image.new("RGB", size), GrabCut(), box_from="mask")
        assert refined.mask.shape == size[::-1]
        assert refined.mask.any()
        x0, y0, x1, y1 = refined.box
        assert 0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]

    def test_a_uniform_image_gives_some_mask(self):
        assert refine(disc_grounding(), Image.new("RGB", (160, 120), "grey"), GrabCut()).mask.any()

    def test_without_background_the_mask_is_empty(self):
        assert not grabcut.cut(np.zeros((5, 5, 3), np.uint8), np.ones((5, 5)), (0, 0, 5, 5)).any()

    def test_a_box_at_the_border(self):
        image, truth = disc(box=(100, 60, 219, 179))
        grid = np.zeros((6, 8))
        grid[3:, 5:] = 1
        mask = GrabCut().segment(image, grounded(grid, (0, 0, 160, 120), (160, 120)))
        assert iou(mask, truth) > 0.9

    def test_the_map_of_a_cropped_model(self):
        image, truth = disc()
        grid = np.zeros((6, 6))
        grid[1:5, 1:5] = 0.6
        grid[2:4, 2:4] = 1
        found = grounded(grid, (20, 0, 140, 120), (160, 120))
        assert iou(GrabCut().segment(image, found), truth) > 0.9


class FakeSegmenter:
    """Always returns the same mask."""

    name = "fake"

    def __init__(self, mask) -> None:
        self.mask = mask

    def segment(self, image, grounding):
        return self.mask


class TestRefine:
    image = Image.new("RGB", (90, 90))

    def test_the_mask_replaces_the_pseudo_mask(self):
        found, mask = grounded(square()), np.zeros((90, 90), dtype=bool)
        mask[30:41, 20:65] = True
        refined = refine(found, self.image, FakeSegmenter(mask))
        assert (refined.mask == mask).all() and refined.mask_from == "fake"
        assert (refined.box, refined.score) == (found.box, found.score)
        assert (refined.pseudo_mask == found.pseudo_mask).all()
        assert found.mask_from == "map"

    def test_the_box_of_the_mask(self):
        found, mask = grounded(square()), np.zeros((90, 90), dtype=bool)
        mask[30:40, 15:45] = True
        refined = refine(found, self.image, FakeSegmenter(mask), box_from="mask")
        assert refined.box == (15, 30, 45, 40)
        assert refined.score == pytest.approx(2.5 / 25)  # 2.5 of the 25 cells

    def test_the_grounding_is_unchanged_without_a_mask(self, caplog):
        found = grounded(square())
        flat = grounded(np.ones((9, 9)))
        full = FakeSegmenter(np.ones((90, 90), dtype=bool))
        assert refine(found, self.image, None, box_from="mask") is found
        assert refine(found, None, full) is found
        assert refine(flat, self.image, full) is flat
        assert not caplog.records
        nothing = FakeSegmenter(np.zeros((90, 90), dtype=bool))
        assert refine(found, self.image, nothing) is found
        assert "finds nothing" in caplog.text
        refine(found, self.image, nothing, name="scene_7")
        assert caplog.messages[-1].startswith("scene_7: segmenter=fake finds nothing in the box")
        missed = refine(found, self.image, nothing, box_from="mask")
        assert (missed.box, missed.refined, missed.mask_overlap) == (found.box, None, 0.0)
        assert refine(found, Image.new("RGB", (80, 90)), full) is found

    @given(hnp.arrays(bool, (5, 7)))
    def test_tight_box_agrees_with_every_pixel(self, mask):
        if mask.any():
            rows, columns = zip(*np.argwhere(mask).tolist(), strict=True)
            assert tight_box(mask) == (min(columns), min(rows), max(columns) + 1, max(rows) + 1)

    def test_the_figure_names_the_segmenter(self, tmp_path):
        image, _ = disc()
        refined = refine(disc_grounding(), image, GrabCut())
        figure = plot_grounding(image, refined, tmp_path / "figure.png", expression="the disc")
        assert "mask (grabcut)" in [text.get_text() for text in figure.legends[0].get_texts()]
        assert (tmp_path / "figure.png").stat().st_size > 1000


class TestOptions:
    def test_the_default_needs_no_weights(self):
        assert isinstance(make_segmenter(GRABCUT), GrabCut)
        assert make_segmenter(SegmenterOptions("none")) is None
