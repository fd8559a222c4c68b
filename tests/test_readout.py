"""Read-outs beyond the paper's: limited peaks, components, sub-cell edges, instances, refined boxes, combined maps."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from small_maps import block, grounded, heads_of, small_maps

from localization_heads.errors import NotFiniteError
from localization_heads.grounding.ground import ground_instances, ground_maps
from localization_heads.grounding.maps import limit_peaks
from localization_heads.grounding.shapes import containing_peak, largest_mass, level_crossings
from localization_heads.heads.head import Head
from localization_heads.options.groups import GroundingOptions
from localization_heads.segmentation.segmenter import refine


class TestPeaks:
    def test_a_sink_is_capped_and_an_object_is_not(self):
        sink = np.full((7, 7), 1.0)
        sink[3, 3] = 50.0
        assert limit_peaks(sink, 10.0)[3, 3] == 10.0 and limit_peaks(sink, 60.0)[3, 3] == 50.0
        solid = block((7, 7), slice(2, 5), slice(2, 5), 50.0)  # 9 cells: the seventh highest is one of them
        assert np.array_equal(limit_peaks(solid, 1.0), solid)

    @given(hnp.arrays(np.float64, st.tuples(st.integers(3, 7), st.integers(3, 7)), elements=st.floats(0, 9)))
    def test_agrees_with_a_plain_loop(self, grid):
        for row, column in np.ndindex(grid.shape):
            around = grid[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3]
            seventh = sorted(around.ravel(), reverse=True)[6]
            assert limit_peaks(grid, 2.0)[row, column] == min(grid[row, column], 2.0 * seventh)

    def test_windows_of_fewer_than_seven_cells_are_not_capped(self):
        row = np.array([[1.0, 1, 40, 1, 1, 1]])
        assert np.array_equal(limit_peaks(row, 2.0), row)


MASS = np.array([[9.0, 0, 4, 4, 4], [0, 0, 0, 0, 0], [5, 5, 0, 0, 1]])


class TestComponents:
    @pytest.mark.parametrize(
        ("component", "cells"),
        [
            ("largest_mass", {(0, 2), (0, 3), (0, 4)}),
            ("containing_peak", {(0, 0)}),
            ("largest_hull", {(0, 2), (0, 3), (0, 4)}),
            ("all", {(0, 0), (0, 2), (0, 3), (0, 4), (2, 0), (2, 1)}),
        ],
    )
    def test_by_hand(self, component, cells):
        found = grounded(MASS, component=component)  # the mean is 32 / 15
        assert {tuple(cell) for cell in np.argwhere(found.cells).tolist()} == cells

    def test_the_first_of_equal_ones_is_taken(self):
        mass = np.array([[0.1, 0.2, 0, 0.3], [0, 0, 0, 0]])  # 0.1 + 0.2 > 0.3 by rounding
        for values in (mass, mass[:, ::-1]):
            assert largest_mass(values > 0, values)[0, 0]
        peaks = np.array([[3.0, 0, 3.0]])
        assert containing_peak(peaks > 0, peaks).tolist() == [[True, False, False]]

    @pytest.mark.parametrize("choose", [largest_mass, containing_peak])
    def test_no_cell(self, choose):
        assert not choose(np.zeros((2, 2), bool), np.ones((2, 2))).any()


class TestEdges:
    def test_by_hand(self):
        # Level: the mean, 2. Left: between centres 5 (0) and 15 (6), 2 is crossed at 5 + 10 / 3; right: 25 to 35 (2).
        found = grounded([[0, 6, 2, 0]], edges="interpolated")
        assert found.box == pytest.approx((5 + 10 / 3, 0, 25, 10))
        assert grounded([[0, 6, 2, 0]]).box == (10, 0, 20, 10)

    def test_a_side_at_the_border_or_the_padding_stays(self):
        grid = [[9, 9, 9], [6, 0, 0], [0, 0, 0]]  # the first row is padding
        seen = {"image_box": (0, -10, 30, 20), "image_size": (30, 20), "mean_of": "image"}
        found = grounded(grid, **seen, edges="interpolated")
        assert found.box == pytest.approx((0, 0, 5 + 10 * 5 / 6, 5 + 10 * 5 / 6))

    @settings(max_examples=60)
    @given(hnp.arrays(np.float64, (4, 5), elements=st.integers(0, 9)), st.integers(1, 8))
    def test_agrees_with_walking_outwards_from_every_cell(self, values, level):
        cells = values > level
        if not cells.any():
            return
        found = level_crossings(values, level, cells, np.ones_like(cells))
        assert found == pytest.approx(walked(values, level, cells))


def walked(values, level, cells):
    """Each side by walking outwards from every outermost cell until the line between two centres meets the level."""

    def out(row, column, step):
        dy, dx = step
        y, x = row + dy, column + dx
        if not (0 <= y < values.shape[0] and 0 <= x < values.shape[1]):
            return 0.5
        there, here = values[y, x], values[row, column]
        return (here - level) / (here - there) if there <= level else 0.5

    places = np.argwhere(cells).tolist()
    outermost = {
        step: [
            (row, column)
            for row, column in places
            if not any((row + n * step[0], column + n * step[1]) in map(tuple, places) for n in range(1, 6))
        ]
        for step in ((0, -1), (-1, 0), (0, 1), (1, 0))
    }
    return (
        min(c + 0.5 - out(r, c, (0, -1)) for r, c in outermost[0, -1]),
        min(r + 0.5 - out(r, c, (-1, 0)) for r, c in outermost[-1, 0]),
        max(c + 0.5 + out(r, c, (0, 1)) for r, c in outermost[0, 1]),
        max(r + 0.5 + out(r, c, (1, 0)) for r, c in outermost[1, 0]),
    )


class TestInstances:
    def test_by_hand(self):
        maps, options = small_maps(MASS), GroundingOptions(sigma=0.0)
        found = ground_instances(maps, heads_of(maps), options)
        assert [one.box for one in found] == [(20, 0, 50, 10), (0, 20, 20, 30), (0, 0, 10, 10)]  # 12, 10, 9
        assert [one.score for one in found] == pytest.approx([12 / 32, 10 / 32, 9 / 32])
        assert len(ground_instances(maps, heads_of(maps), options, least=0.8)) == 2

    def test_the_first_is_the_single_box(self):
        rng, options = np.random.default_rng(1), GroundingOptions(component="largest_mass")
        for _ in range(20):
            maps = small_maps(*rng.random((2, 9, 9)) ** 6)
            one, first = (
                ground_maps(maps, heads_of(maps), options),
                ground_instances(maps, heads_of(maps), options)[0],
            )
            assert (one.box, one.score) == (first.box, first.score)

    def test_a_flat_map_is_one_instance_without_cells(self):
        (found,) = ground_instances(small_maps(np.ones((3, 3))), [Head(0, 0)])
        assert found.box == (0, 0, 30, 30) and found.score == 0


SHARP = {
    "sigma": 0.5, "kernel_size": 5, "peak_limit": 10.0, "means": 1.5, "mean_of": "image", "large": 0.7,
    "component": "largest_mass", "trim": True, "point_sigma": 1.0,
}  # fmt: skip


class TestSharp:
    def test_a_sink_with_half_of_the_mass_does_not_take_the_box(self):
        grid = 0.01 + block((24, 24), slice(10, 15), slice(4, 8), 1.0)
        grid[22, 22] = grid.sum()
        assert grounded(grid, **SHARP).box == (40, 100, 80, 150)
        assert grounded(grid, means=1.5, component="largest_mass").box == (220, 220, 230, 230)

    def test_a_large_object_stays_whole(self):
        grid = block((24, 24), slice(2, 22), slice(2, 22), 1.0)
        assert grounded(grid, **SHARP).box == (20, 20, 220, 220)
        without = {**SHARP, "large": None}
        assert not grounded(grid, **without).cells.any()  # 1.5 means are more than the map's maximum

    def test_trim_leaves_cells_above_the_threshold_before_smoothing(self):
        grid = block((9, 9), slice(3, 6), slice(3, 6), 1.0)
        assert grounded(grid, sigma=1.0).box == (20, 20, 70, 70)
        assert grounded(grid, sigma=1.0, trim=True).box == (30, 30, 60, 60)

    def test_the_point_is_taken_from_a_smoother_map(self):
        grid = block((9, 9), slice(5, 8), slice(5, 8), 1.0)
        grid[1, 1] = 1.2
        assert grounded(grid).point == (15, 15)
        assert grounded(grid, point_sigma=1.0).point == grounded(grid, sigma=1.0).point == (65, 65)


class FakeSegmenter:
    """Records the box it is prompted with and returns a filled box."""

    name = "fake"

    def __init__(self, box):
        self.box, self.prompt = box, None

    def segment(self, image, grounding):
        self.prompt = grounding.box
        mask = np.zeros(image.size[::-1], bool)
        x0, y0, x1, y1 = self.box
        mask[y0:y1, x0:x1] = True
        return mask


class TestRefined:
    image = Image.new("RGB", (90, 90))

    @pytest.mark.parametrize(
        ("mask", "box"),
        [
            ((28, 28, 64, 64), (28, 28, 64, 64)),  # IoU 900 / 1296
            ((28, 28, 68, 68), (30, 30, 60, 60)),  # 900 / 1600: the map's
        ],
    )
    def test_the_mask_is_taken_if_its_box_agrees(self, mask, box):
        found = grounded(block((9, 9), slice(3, 6), slice(3, 6)))
        segmenter = FakeSegmenter(mask)
        refined = refine(found, self.image, segmenter, box_from="refined")
        assert segmenter.prompt == (10, 10, 80, 80)
        assert refined.box == box
        kept = box == mask
        assert refined.mask_from == ("fake" if kept else "map")
        rows, columns = np.nonzero(refined.mask)
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == box

    def test_the_prompt_stays_inside_the_image(self):
        found = grounded(block((9, 9), slice(0, 2), slice(8, 9)))
        segmenter = FakeSegmenter((80, 0, 90, 20))
        refine(found, self.image, segmenter, box_from="refined")
        assert segmenter.prompt == (60, 0, 90, 40)


def test_every_combination_gives_a_box_inside_the_image():
    rng = np.random.default_rng(0)
    for edges, component, trim, large, limit in itertools.product(
        ("cells", "interpolated"),
        ("largest_mass", "containing_peak", "largest_hull", "all"),
        (False, True),
        (None, 0.7),
        (None, 3.0),
    ):
        grid = rng.random((6, 8)) ** 4
        options = {"edges": edges, "component": component, "trim": trim, "large": large, "peak_limit": limit}
        found = grounded(grid, image_box=(0, -10, 80, 50), image_size=(80, 45), **options)
        x0, y0, x1, y1 = found.box
        assert 0 <= x0 < x1 <= 80 and 0 <= y0 < y1 <= 45 and 0 < found.score <= 1


class TestAggregation:
    """Maps of several heads, of the answer's tokens and of other expressions, put together."""

    def maps(self, *rows, **more):
        """Each row is a head's map of 1 x 3 cells."""
        return small_maps(*([row] for row in rows), **more)

    def combined(self, maps, **options):
        return ground_maps(maps, heads_of(maps), GroundingOptions(sigma=0.0, **options)).combined[0]

    def test_consensus_by_hand(self):
        """The first two overlap by 1, the third with each of them by sqrt(.5)."""
        maps = self.maps([2, 0, 0], [4, 0, 0], [1, 1, 0])
        first, last = (1 + 0.5**0.5) ** 4, (2 * 0.5**0.5) ** 4
        total = 2 * first + last
        expected = [(2 * first + 4 * first + last) / total, last / total, 0]
        assert self.combined(maps, combine="consensus") == pytest.approx(expected)

    def test_maps_without_overlap_have_equal_weights(self):
        assert self.combined(self.maps([1, 0, 0], [0, 0, 1]), combine="consensus").tolist() == [0.5, 0, 0.5]
        assert self.combined(self.maps([1, 0, 3]), combine="consensus").tolist() == [1, 0, 3]

    def test_geometric_mean_with_the_answer(self):
        maps = self.maps([1, 3, 0], answer=np.array([2, 2, 4], np.float32)[None, None, None])
        assert self.combined(maps) == pytest.approx(np.sqrt([0.25 * 0.25, 0.75 * 0.25, 0]))

    def test_contrast_by_hand(self):
        maps = self.maps([4, 4, 2], others=(self.maps([0, 1, 0]), self.maps([0, 1, 3])))  # mean (0, 5/8, 3/8)
        assert self.combined(maps).tolist() == [4, 4, 2]
        found = self.combined(maps, contrast="siblings")
        assert found == pytest.approx([4, 4 - 10 * 0.5 * 5 / 8, 2 - 10 * 0.5 * 3 / 8])
        assert self.combined(maps, contrast="background", contrast_weight=1.0)[1] == 0

    def test_an_answer_of_another_grid_is_refused(self):
        with pytest.raises(ValueError, match="shape of attention"):
            self.maps([1, 2, 3], answer=np.zeros((1, 1, 2, 3), np.float32))

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_non_finite_values_are_found_in_all_maps(self, value):
        bad, good = self.maps([1, value, 3]), self.maps([1, 2, 3])
        good.check_finite()
        for maps in (
            bad,
            replace(bad, answer=good.attention),
            replace(good, others=(bad,)),
            replace(good, answer=bad.attention),
        ):
            with pytest.raises(NotFiniteError, match="NaN"):
                maps.check_finite()
