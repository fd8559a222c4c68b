"""The three thresholds by hand, and against trying every split or every set; upsampling; the score of a box."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from small_maps import grounded

from localization_heads.cells import upsample
from localization_heads.evaluation.scores import Truth, score_grounding
from localization_heads.grounding.binarise import otsu, threshold, top_mass
from localization_heads.options.groups import GroundingOptions


class TestOtsu:
    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            # {1,1,2} | {8,9}: 3*2*(8.5-4/3)^2 = 308.2; {1,1} | {2,8,9}: 2*3*(19/3-1)^2 = 170.7
            ([9.0, 1, 8, 2, 1], 2.0),
            ([0.0, 1, 2], 0.0),  # a tie, 1*2*(1.5)^2 = 2*1*(1.5)^2: the lowest
            ([0.1] * 12, np.inf),
            ([], np.inf),
        ],
    )
    def test_by_hand(self, values, expected):
        assert otsu(np.array(values)) == expected

    @given(hnp.arrays(np.float64, st.integers(2, 30), elements=st.floats(0, 1, width=16)))
    def test_no_split_is_better(self, values):
        if values.min() == values.max():
            return
        best = max(variance(values, values > cut) for cut in values)
        assert variance(values, values > otsu(values)) == pytest.approx(best)


def variance(values, above):
    """Between-class variance times n^2; 0 if a class is empty."""
    high, low = values[above].astype(float), values[~above].astype(float)
    return len(high) * len(low) * (high.mean() - low.mean()) ** 2 if len(high) and len(low) else 0.0


class TestTopMass:
    @pytest.mark.parametrize(
        ("values", "share", "cells"),
        [
            *(([4.0, 1, 2, 3], share, cells) for share, cells in (
                (1e-9, 1), (0.4, 1), (0.41, 2), (0.7, 2), (0.71, 3), (0.9, 3), (1.0, 4),
            )),
            ([1.0, 1, 1, 0], 0.3, 3),  # equal cells go together
        ],
    )  # fmt: skip
    def test_by_hand(self, values, share, cells):
        assert (np.array(values) > top_mass(np.array(values), share)).sum() == cells

    @pytest.mark.parametrize("values", [[0.0] * 4, [-1.0, -2], []])
    def test_without_mass_there_is_no_threshold(self, values):
        assert top_mass(np.array(values)) == np.inf

    def test_rounding_adds_no_cell(self):
        values = np.full(10, 0.1)
        values[:7] += 1e-3
        assert (values > top_mass(values, values[:7].sum() / values.sum())).sum() == 7

    @given(hnp.arrays(np.int64, st.integers(1, 8), elements=st.integers(0, 20), unique=True), st.integers(1, 10))
    def test_no_smaller_set_holds_as_much(self, values, tenths):
        if values.sum() == 0:
            return
        active = values > top_mass(values, tenths / 10)
        enough = [
            size
            for size in range(1, len(values) + 1)
            for chosen in itertools.combinations(values.tolist(), size)
            if 10 * sum(chosen) >= tenths * values.sum()
        ]
        assert active.sum() == min(enough)
        assert 10 * values[active].sum() >= tenths * values.sum()


class TestThreshold:
    @pytest.mark.parametrize("method", ["mean", "otsu", "top_mass"])
    @pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3])
    def test_a_flat_map_has_no_positive_cell(self, method, value):
        noise = 1e-9 * np.random.default_rng(0).random((7, 9))
        assert threshold(value + noise * value, GroundingOptions(binarise=method)) == np.inf
        found = grounded(np.full((7, 9), value), binarise=method)
        assert (found.score, found.box, found.threshold) == (0.0, (0, 0, 90, 70), np.inf)
        assert not found.cells.any()

    @pytest.mark.parametrize("method", ["mean", "otsu", "top_mass"])
    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_non_finite_maps_are_refused(self, method, bad):
        with pytest.raises(ValueError, match="NaN"):
            threshold(np.array([[1.0, bad]]), GroundingOptions(binarise=method))

    @pytest.mark.parametrize(
        ("options", "box"),
        [
            ({}, None),  # the mean, with the padding, is 22.2
            ({"binarise": "otsu"}, (20, 0, 30, 10)),  # {1, 3} | {9}
            ({"binarise": "top_mass", "top_mass": 0.9}, (10, 0, 30, 10)),  # 12 of 13
        ],
    )
    def test_padding_only_counts_for_the_mean(self, options, box):
        grid = np.array([[40.0, 40, 40], [1, 3, 9]])  # the first row is padding
        found = grounded(grid, (0, -10, 30, 10), (30, 10), **options)
        assert (found.box if found.cells.any() else None) == box

    @pytest.mark.parametrize("method", ["mean", "otsu", "top_mass"])
    def test_cells_in_the_padding_are_not_positive(self, method):
        grid = np.array([[9.0, 9, 9], [1, 1, 1]])
        assert grounded(grid, (0, -10, 30, 10), (30, 10), binarise=method).box == (0, 0, 30, 10)

    def test_the_mean_of_the_image_leaves_the_padding_out(self):
        grid, visible = np.array([[40.0, 40, 40], [1, 3, 9]]), np.array([[False] * 3, [True] * 3])
        assert threshold(grid, GroundingOptions(), visible) == pytest.approx(133 / 6)
        assert threshold(grid, GroundingOptions(mean_of="image"), visible) == pytest.approx(13 / 3)

    @pytest.mark.parametrize(("means", "large", "expected"), [(1.3, None, 3.9), (1.3, 0.7, 2.8), (1.0, 1.0, 3.0)])
    def test_large_lowers_the_threshold_of_large_objects(self, means, large, expected):
        """Mean 3, sum of squares over sum: 48 / 12 = 4."""
        options = GroundingOptions(means=means, large=large)
        assert threshold(np.array([[4.0, 4.0], [4.0, 0.0]]), options) == pytest.approx(expected)


class TestUpsample:
    def test_by_hand(self):
        row = np.array([[0.0, 4.0]])
        assert upsample(row, 2).tolist() == [[0, 0, 4, 4], [0, 0, 4, 4]]
        # fine centres at -1/4, 1/4, 3/4, 5/4 cells from the first centre
        assert upsample(row, 2, "bilinear").tolist() == [[0, 1, 3, 4], [0, 1, 3, 4]]
        assert upsample(row, 1, "bilinear") is row

    @pytest.mark.parametrize("times", [2, 3, 5])
    def test_agrees_with_torch(self, times):
        torch = pytest.importorskip("torch")
        maps = np.random.default_rng(0).random((2, 3, 5))
        theirs = torch.nn.functional.interpolate(torch.from_numpy(maps)[None], scale_factor=times, mode="bilinear")
        assert upsample(maps, times, "bilinear") == pytest.approx(theirs[0].numpy(), abs=1e-6)

    def test_a_box_may_end_inside_a_cell(self):
        grid = np.array([[0.0, 0, 8, 0, 0]])  # the mean is 1.6: active up to 0.8 cells from the centre
        found = grounded(grid, upsample=10, interpolation="bilinear")
        assert found.box == (17, 0, 33, 10)

    @given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.sampled_from(["nearest", "bilinear"]))
    def test_any_grid(self, height, width, times, interpolation):
        maps = np.random.default_rng(0).random((2, height, width)).astype(np.float32)
        fine = upsample(maps, times, interpolation)
        assert fine.shape == (2, height * times, width * times)
        assert fine.min() >= maps.min() - 1e-6 and fine.max() <= maps.max() + 1e-6


class TestScore:
    """The score of a box is the metric energy of that box (tests/test_metrics.py has more of `mass_inside`)."""

    def test_a_cell_that_is_half_padding_counts_half(self):
        """Cells of 10 x 10 pixels; the image is 15 wide: one cell is padding, one whole, one shows its half."""
        found = grounded([[3.0, 1.0, 5.0]], (-10, 0, 20, 10), (15, 10))
        assert found.box == (10, 0, 15, 10)  # 5 alone is above the mean, 3
        assert found.score == pytest.approx(2.5 / (1 + 2.5))

    @given(
        hnp.arrays(np.float32, (4, 5), elements=st.integers(0, 9).map(float)),
        st.tuples(st.integers(-9, 0), st.integers(-9, 0), st.integers(12, 30), st.integers(12, 24)),
    )
    def test_agrees_with_counting_pixels(self, mass, place):
        """Padding of any width on any side, and cells of 6 x 6 pixels that it cuts: the map, painted, then cropped."""
        x0, y0, right, bottom = place
        size = (min(right, x0 + 30), min(bottom, y0 + 24))
        found = grounded(mass, (x0, y0, x0 + 30, y0 + 24), size)
        pixels = np.kron(mass, np.ones((6, 6)))[-y0:, -x0:][: size[1], : size[0]]
        left, top, right, bottom = map(round, found.box)
        inside = pixels[top:bottom, left:right].sum() if found.cells.any() else 0.0
        assert found.score == pytest.approx(inside / pixels.sum() if pixels.sum() else 0.0)
        energy = score_grounding(found, Truth(found.box)).energy
        assert found.score == (energy if found.cells.any() else 0.0)
