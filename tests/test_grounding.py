"""Grounding of small maps by hand, and against smoothing and hulls in plain loops."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from scipy.spatial import ConvexHull
from small_maps import block, drawn, flood, grounded

from localization_heads.attention import AttentionMaps
from localization_heads.cells import normalised_heatmap
from localization_heads.grounding.ground import ground_maps
from localization_heads.grounding.maps import combine, gaussian_kernel, smooth
from localization_heads.grounding.shapes import convex_hull, fill_polygon, hull_area, largest_hull
from localization_heads.heads.head import Head
from localization_heads.options.compose import load_preset
from localization_heads.options.groups import GroundingOptions

SHARP = GroundingOptions(sigma=0.0)


def mirrored(index, length):
    """Index of the cell that a position beyond the border mirrors: `c b | a b c | b a`."""
    while not 0 <= index < length:
        index = -index if index < 0 else 2 * (length - 1) - index
        if length == 1:
            return 0
    return index


def obvious_smooth(grid, kernel_size, sigma):
    height, width = grid.shape
    reach = kernel_size // 2
    taps = {
        (dy, dx): math.exp(-(dy * dy + dx * dx) / (2 * sigma * sigma))
        for dy in range(-reach, reach + 1)
        for dx in range(-reach, reach + 1)
    }
    total = sum(taps.values())
    result = np.zeros_like(grid)
    for y, x in itertools.product(range(height), range(width)):
        result[y, x] = sum(
            tap * grid[mirrored(y + dy, height), mirrored(x + dx, width)] for (dy, dx), tap in taps.items()
        )
    return result / total


def obvious_hull_area(mask):
    """Area of the hull of every corner of every cell, by a library."""
    cells = np.argwhere(mask)
    corners = np.concatenate([cells + corner for corner in ((0, 0), (0, 1), (1, 0), (1, 1))])
    return ConvexHull(corners).volume  # `volume` is the area in two dimensions


def blobs(mask):
    """The components, each a mask, in row-major order of their first cells."""
    found = []
    for cells in sorted(map(sorted, flood(mask))):
        found.append(np.zeros_like(mask))
        found[-1][tuple(np.array(cells).T)] = True
    return found


masks = hnp.array_shapes(min_dims=2, max_dims=2, max_side=8).flatmap(lambda s: hnp.arrays(bool, s))


class TestSmooth:
    def test_kernel_by_hand(self):
        side = math.exp(-0.5)
        assert gaussian_kernel(3, 1.0) == pytest.approx(np.array([side, 1, side]) / (1 + 2 * side))
        assert gaussian_kernel(7, 1.0)[0] == pytest.approx(0.004433048175243745)  # as OpenCV prints it
        assert gaussian_kernel(7, 1.0).size == 7
        assert gaussian_kernel(7, 0.0).tolist() == gaussian_kernel(1, 1.0).tolist() == [1.0]

    def test_mirrored_border_by_hand(self):
        row = np.array([[4.0, 2.0, 1.0]])
        side, centre = gaussian_kernel(3, 1.0)[:2]
        expected = [4 * centre + 4 * side, 2 * centre + 5 * side, centre + 4 * side]
        assert smooth(row, 3, 1.0)[0] == pytest.approx(expected)  # repeated: 8 side at the left

    @pytest.mark.parametrize("shape", [(24, 24), (5, 9), (3, 2), (1, 4), (6, 1), (1, 1)])
    @pytest.mark.parametrize(("kernel_size", "sigma"), [(7, 1.0), (3, 0.8), (9, 1.8), (5, 30.0)])
    def test_agrees_with_plain_loops_on_any_grid(self, shape, kernel_size, sigma):
        grid = np.random.default_rng(0).random(shape)
        assert smooth(grid, kernel_size, sigma) == pytest.approx(obvious_smooth(grid, kernel_size, sigma))

    def test_repeated_border_by_hand(self):
        # The 1 is repeated to its left, so it loses only the tap of the 0 to its right: 1 - 0.274.
        smoothed = smooth(np.array([[1.0, 0.0, 0.0]]), 3, 1.0, "repeat")
        np.testing.assert_allclose(smoothed, [[0.7259, 0.2741, 0.0]], atol=1e-4)

    def test_nine_taps_and_a_repeated_border_agree_with_scipy(self):
        for shape in ((24, 24), (5, 3), (1, 7)):
            grid = np.random.default_rng(5).random(shape)
            np.testing.assert_allclose(smooth(grid, 9, 1.0, "repeat"), ndimage.gaussian_filter(grid, 1.0))

    def test_maps_of_a_stack_are_independent(self):
        stack = np.random.default_rng(1).random((3, 6, 5)).astype(np.float32)
        smoothed = smooth(stack)
        for grid, own in zip(stack, smoothed, strict=True):
            assert (smooth(grid) == own).all()
        assert combine(stack) == pytest.approx(smoothed[0] + smoothed[1] + smoothed[2])

    @pytest.mark.parametrize(("kernel_size", "sigma"), [(1, 1.0), (7, 0.0)])
    def test_can_be_switched_off(self, kernel_size, sigma):
        grid = np.random.default_rng(2).random((6, 5))
        assert (smooth(grid, kernel_size, sigma) == grid).all()


class TestHull:
    @pytest.mark.parametrize(
        ("mask", "area"),
        [
            (drawn("#"), 1),
            (drawn("##", "##"), 4),
            (drawn("#.", ".#"), 3),  # the square less two corner triangles of 1/2
            (drawn("#..", "#..", "###"), 7),  # an L: the square less a triangle of 2
            (drawn("#####"), 5),
            (drawn("....", "...."), 0),
        ],
    )
    def test_area_by_hand(self, mask, area):
        assert hull_area(mask) == area

    @given(masks)
    def test_area_agrees_with_a_library(self, mask):
        assume(mask.any())
        assert hull_area(mask) == pytest.approx(obvious_hull_area(mask))

    @given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20))
    def test_hull_contains_every_point_and_no_collinear_vertex(self, points):
        hull = convex_hull(points)
        assert set(hull) <= set(points)
        assume(len(hull) > 2)
        for a, b in zip(hull, hull[1:] + hull[:1], strict=True):
            sides = [(b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0]) for x, y in points]
            assert min(sides) >= 0
            assert {point for point, side in zip(points, sides, strict=True) if side == 0} & set(hull) == {
                a,
                b,
            }

    def test_largest_hull_is_not_largest_area(self):
        # The block has 6 cells; the arc only 5, but its hull has 3.5 + 5 of them.
        mask = drawn("###...#", "###..#.", "....#..", "...#...", "..#....")
        chosen = largest_hull(mask)
        assert chosen.sum() == 5
        assert not chosen[:2, :3].any()

    @pytest.mark.parametrize(
        ("mask", "mass", "cells"),
        [
            (
                ("##.", "##.", "..#"),
                None,
                [[0, 0], [0, 1], [1, 0], [1, 1], [2, 2]],
            ),  # diagonals are connected
            (("#.#", "...", "#.."), None, [[0, 0]]),  # a tie: the first cell
            (("#.#", "...", "#.."), [[1, 0, 2], [0, 0, 0], [3, 0, 0]], [[2, 0]]),  # a tie: the most mass
            (
                ("#.#", "...", "#.."),
                [[1, 0, 1 + 1e-14], [0, 0, 0], [1, 0, 0]],
                [[0, 0]],
            ),  # equal but for rounding
            (("##.", "...", "..#"), [[1, 1, 0], [0, 0, 0], [0, 0, 99]], [[0, 0], [0, 1]]),  # no tie
        ],
    )
    def test_component_and_ties_by_hand(self, mask, mass, cells):
        chosen = largest_hull(drawn(*mask), None if mass is None else np.array(mass, float))
        assert np.argwhere(chosen).tolist() == cells

    @given(masks)
    def test_agrees_with_all_components_one_by_one(self, mask):
        found = largest_hull(mask)
        expected = max(blobs(mask), key=lambda blob: round(obvious_hull_area(blob), 6), default=mask)
        assert (found == expected).all()


class TestBox:
    def test_x_and_y_are_not_swapped(self):
        grid = np.zeros((2, 5))
        grid[0, 1:4] = 1
        found = grounded(grid, image_size=(100, 60))
        assert found.box == (20, 0, 80, 30)
        assert found.mask.shape == found.heatmap.shape == (60, 100)
        assert found.mask[:30, 20:80].all()
        assert found.mask.sum() == 30 * 60

    def test_all_components_as_in_the_published_code(self):
        grid = drawn("##...", "##...", "....#")
        assert grounded(grid).box == (0, 0, 20, 20)
        both = grounded(grid, component="all")
        assert both.box == (0, 0, 50, 30)
        assert both.cells.sum() == 5

    @pytest.mark.parametrize(("width", "height"), [(640, 480), (300, 400), (90, 90)])
    def test_the_box_of_august_from_its_description(self, width, height):
        """scipy's filter on each map, their sum, all cells above its mean, scaled as if nothing padded the image."""
        rng, side = np.random.default_rng(width), max(width, height)
        padded = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
        for _ in range(5):
            attention = np.zeros((1, 5, 12, 12), np.float32)
            attention[..., 2:7, 4:9] = rng.random((5, 5, 5)) ** 9
            combined = sum(ndimage.gaussian_filter(one.astype(float), 1.0) for one in attention[0])
            rows, columns = np.nonzero(combined - combined.mean() > 0)
            expected = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert expected[2] - expected[0] < 12 and expected[3] - expected[1] < 12
            scales = np.array([width, height, width, height]) / 12
            maps = AttentionMaps(attention, padded, (width, height))
            found = ground_maps(
                maps,
                [Head(0, head) for head in range(5)],
                GroundingOptions.of(load_preset("grounding", "published")),
            )
            assert found.box == pytest.approx(tuple(expected * scales))

    @pytest.mark.parametrize(
        ("means", "margin", "box"),
        [
            (1, 0.0, (0, 0, 40, 40)),  # 1.5 is above the mean
            (2, 0.0, (0, 10, 40, 40)),  # but not above twice the mean, nor is 2.0
            (2, 0.5, (10, 10, 40, 40)),  # 2.5 - 2 is not above 0.5
            (2, 0.499, (0, 10, 40, 40)),
            (3, 0.0, (30, 30, 40, 40)),  # the comparison is strict
        ],
    )
    def test_means_and_margin_by_hand(self, means, margin, box):
        grid = [[1.5, 0, 0, 0], [2.5, 3, 0, 0], [0, 0, 0, 2], [0, 3, 0, 4]]  # mean 1
        assert grounded(grid, component="all", means=means, margin=margin).box == box

    def test_no_cell_above_the_threshold_is_the_whole_image(self):
        found = grounded([[1.0, 2.0, 3.0]], means=2)
        assert (found.box, found.score, found.threshold) == ((0, 0, 30, 10), 0.0, math.inf)

    @pytest.mark.parametrize(
        ("grid", "image_box", "image_size", "box", "num_cells", "score"),
        [
            # Of a 640 x 480 image padded to a square, rows 0 to 2 and 21 to 23 of 24 show nothing.
            (block((24, 24), slice(0, 6), slice(3, 9)), (0, -80, 640, 560), (640, 480), (80, 0, 240, 80), 18, 1),
            # Attention in the padding is dropped, from the cells and from the score.
            (
                block((24, 24), slice(0, 3), slice(0, 24)) + block((24, 24), slice(12, 13), slice(12, 13), 0.9),
                (0, -80, 640, 560), (640, 480), (320, 240, 320 + 80 / 3, 240 + 80 / 3), 1, 1,
            ),
            # It counts for the mean, which is 3.25 with the first row; without it, 1.5.
            ([[5.0, 5.0], [1.0, 2.0]], (0, -10, 20, 10), (20, 10), (0, 0, 20, 10), 0, 0),
            ([[1.0, 2.0]], (0, 0, 20, 10), (20, 10), (10, 0, 20, 10), 1, 2 / 3),
            # A comb whose back lies in the padding is several components.
            (
                drawn(".....", "#####", "#.#.#", "#.#.#"), (0, -20, 50, 20), (50, 20),
                (0, 0, 10, 20), 2, 1 / 3,
            ),
            # Cells that are half padding are clipped.
            (drawn("##..", "##..", "...."), (0, -5, 40, 25), (40, 20), (0, 0, 20, 15), 4, 1),
        ],
    )  # fmt: skip
    def test_padding_by_hand(self, grid, image_box, image_size, box, num_cells, score):
        found = grounded(grid, image_box, image_size)
        assert found.box == pytest.approx(box)
        assert (found.cells.sum(), found.score) == (num_cells, pytest.approx(score))

    @pytest.mark.parametrize(
        ("width", "height", "cells", "padded"), [(640, 480, 24, 3), (147, 98, 18, 3), (1158, 772, 18, 3)]
    )
    def test_a_cell_that_touches_the_image_by_rounding_is_outside(self, width, height, cells, padded):
        grid = np.zeros((cells, cells))
        grid[:padded, ::3] = grid[-padded:, ::3] = 1
        margin = (width - height) / 2
        found = grounded(grid, (0, -margin, width, height + margin), (width, height))
        assert found.box == (0, 0, width, height)
        assert found.score == 0

    def test_centre_crop_stays_inside(self):
        grid = np.zeros((4, 4))
        grid[0, 0] = 1
        found = grounded(grid, (80, 0, 560, 480), (640, 480))
        assert found.box == (80, 0, 200, 120)
        assert (found.heatmap[:, :80] == 0).all()
        assert (found.heatmap[:, 560:] == 0).all()
        assert found.heatmap[0, 80] == 1
        tall = grounded(grid.T, (0, 80, 480, 560), (480, 640))
        assert (tall.heatmap[:80] == 0).all()
        assert (tall.heatmap[560:] == 0).all()

    def test_upsampling_repeats_cells_and_keeps_pixels(self):
        grid = np.zeros((4, 4))
        grid[1, 2] = 1
        found = grounded(grid, upsample=4)
        assert found.box == (20, 10, 30, 20)
        assert found.combined.shape == (16, 16)
        assert found.cells[4:8, 8:12].all()
        # The kernel counts fine cells: the blur of one coarse cell stays closer to it.
        finer = grounded(grid, whole=GroundingOptions(upsample=4))
        coarse = grounded(grid, whole=GroundingOptions())
        assert finer.box[2] - finer.box[0] < coarse.box[2] - coarse.box[0]

    def test_smoothing_comes_before_the_threshold(self):
        grid = np.zeros((9, 9))
        grid[4, 4] = 1
        found = grounded(grid, whole=GroundingOptions(kernel_size=3, sigma=1.0))
        assert found.box == (30, 30, 60, 60)  # the 3x3 footprint, all of it above the mean of 1/81
        assert found.combined.sum() == pytest.approx(1)

    @pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e-12])
    @pytest.mark.parametrize("options", [SHARP, GroundingOptions(), GroundingOptions(5, 1.3, 3)])
    def test_a_constant_map_is_the_whole_image_with_score_0(self, value, options):
        found = grounded(np.full((7, 9), value), whole=options)
        assert found.box == (0, 0, 90, 70)
        assert found.score == 0
        assert not found.cells.any()
        assert found.mask.all()
        assert np.isfinite(found.heatmap).all()

    def test_rounding_on_a_constant_map_points_at_nothing(self):
        noise = np.random.default_rng(0).random((7, 9))
        assert grounded(0.1 + 1e-8 * noise).score == 0
        assert grounded(0.1 + 1e-4 * noise).score > 0

    def test_score_is_the_share_of_the_mass_in_the_box(self):
        grid = [[8.0, 0.0, 0.0], [0.5, 7.0, 0.0], [0.0, 0.0, 0.5]]  # the diagonal pair; the box is 2 x 2
        assert grounded(grid).score == pytest.approx(15.5 / 16)

    def test_maps_of_heads_are_summed(self):
        attention = np.zeros((2, 2, 1, 5), dtype=np.float32)
        attention[0, 0, 0, 0] = 1.0
        attention[1, 1, 0, 4] = 3.0
        attention[0, 1] = 9.0
        maps = AttentionMaps(attention, (0, 0, 50, 10), (50, 10))
        found = ground_maps(maps, [(0, 0), (1, 1)], SHARP)
        assert found.combined.tolist() == [[1, 0, 0, 0, 3]]
        assert found.heads == (Head(0, 0), Head(1, 1))
        assert found.box == (40, 0, 50, 10)  # mean 0.8: two hulls of one cell, the heavier wins

    @pytest.mark.parametrize("heads", [[], [Head(0, 1)], [Head(1, 0)], [Head(-1, 0)]])
    def test_unknown_heads_are_refused(self, heads):
        maps = AttentionMaps(np.zeros((1, 1, 2, 2), dtype=np.float32), (0, 0, 2, 2), (2, 2))
        with pytest.raises(ValueError, match="head"):
            ground_maps(maps, heads)

    def test_nan_is_refused(self):
        with pytest.raises(ValueError, match="NaN"):
            grounded([[0.0, np.nan]])


class TestImages:
    @settings(max_examples=60)
    @given(masks, st.integers(5, 90), st.integers(5, 90), st.booleans(), st.integers(-40, 10))
    def test_the_mask_fills_the_box(self, mask, width, height, smoothed, x0):
        box = (float(x0), -3.0, x0 + 80.0, 85.5)
        found = grounded(mask, box, (width, height), GroundingOptions() if smoothed else SHARP)
        assert found.mask.shape == (height, width)
        # A thinner one may hold no pixel's centre; what its mask is then, `fill_polygon` says.
        assume(found.box[2] - found.box[0] >= 1 and found.box[3] - found.box[1] >= 1)
        rows, columns = np.flatnonzero(found.mask.any(axis=1)), np.flatnonzero(found.mask.any(axis=0))
        tight = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert np.abs(np.array(tight) - found.box).max() <= 1

    def test_the_hull_is_clipped_to_the_image(self):
        found = grounded(drawn(".....", "...#.", "###..", "....."), (-5, -15, 45, 25), (40, 20))
        assert found.box == (0, 0, 35, 15)
        vertices = sorted(tuple(vertex) for vertex in found.polygon.tolist())
        assert vertices == [(0, 5), (0, 15), (25, 0), (25, 15), (35, 0), (35, 5)]

    def test_filling_counts_pixel_centres(self):
        triangle = np.array([(0.0, 0.0), (4.0, 0.0), (0.0, 4.0)])
        expected = drawn("###.", "##..", "#...", "....")  # centres on the slanted side are outside
        assert (fill_polygon(triangle, (4, 4)) == expected).all()
        assert (fill_polygon(triangle[::-1], (4, 4)) == expected).all()

    def test_squares_that_meet_share_no_pixel(self):
        left = fill_polygon(np.array([(0.0, 0.0), (2.5, 0.0), (2.5, 3.0), (0.0, 3.0)]), (5, 3))
        right = fill_polygon(np.array([(2.5, 0.0), (5.0, 0.0), (5.0, 3.0), (2.5, 3.0)]), (5, 3))
        assert (left ^ right).all()

    def test_a_hull_smaller_than_a_pixel_still_marks_one(self):
        found = grounded(np.eye(24), image_size=(3, 3), whole=GroundingOptions(1, 0.0))
        assert found.mask.any()
        speck = fill_polygon(np.array([(2.6, 1.6), (2.9, 1.6), (2.9, 1.9)]), (3, 3))
        assert np.argwhere(speck).tolist() == [[1, 2]]

    def test_mask_is_the_hull_and_not_the_cells(self):
        found = grounded(drawn("#..", "#..", "###"))
        assert found.cells.sum() == 5
        assert found.mask.sum() == pytest.approx(700, abs=20)  # the hull has 7 cells of 100 pixels
        assert found.mask[15, 12]
        assert not found.mask[5, 25]

    def test_heatmap_is_exact_at_cell_centres_and_linear_between(self):
        heat = normalised_heatmap(np.array([[1.0, 3.0], [2.0, 4.0]]), (0, 0, 6, 6), (6, 6))
        # cell centres at 1.5 and 4.5: the centres of pixels 1 and 4
        assert heat[1, 1] == pytest.approx(0.25)
        assert heat[1, 4] == pytest.approx(0.75)
        assert heat[4, 1] == pytest.approx(0.5)
        assert heat[1, 2] == pytest.approx((1 + 2 / 3) / 4)
        assert heat[0, 0] == heat[1, 1]  # constant beyond the outer centres
        assert heat.max() == 1.0
        assert heat.dtype == np.float32

    def test_heatmap_is_scaled_by_its_maximum_on_the_image(self):
        grid = np.array([[9.0, 9.0], [1.0, 2.0], [9.0, 9.0]])
        heat = grounded(grid, (0, -100, 200, 200), (200, 100)).heatmap
        assert heat.max() == 1.0
        assert heat[50, 50] < heat[50, 150]

    @given(hnp.arrays(np.float64, (3, 4), elements=st.integers(0, 9).map(float)), st.integers(-9, 9))
    def test_heatmap_agrees_with_a_loop_over_pixels(self, grid, shift):
        box = (shift - 2.5, -4.0, shift + 15.0, 11.0)
        heat = normalised_heatmap(grid, box, (12, 9))
        expected = np.zeros((9, 12))
        for row, column in np.ndindex(9, 12):
            x, y = column + 0.5, row + 0.5
            if not (box[0] <= x <= box[2] and box[1] <= y <= box[3]):
                continue
            u = min(max((x - box[0]) / (box[2] - box[0]) * 4 - 0.5, 0), 3)
            v = min(max((y - box[1]) / (box[3] - box[1]) * 3 - 0.5, 0), 2)
            expected[row, column] = sum(
                max(0.0, 1 - abs(u - j)) * max(0.0, 1 - abs(v - i)) * grid[i, j] for i, j in np.ndindex(3, 4)
            )
        scale = expected.max() or 1.0
        assert heat == pytest.approx(expected / scale, abs=1e-5)

    def test_point_is_the_strongest_cell_on_the_image(self):
        grid = np.array([[9.0, 0.0, 0.0], [0.0, 1.0, 3.0]])
        assert grounded(grid).point == (5, 5)
        assert grounded(grid, (0, -10, 30, 10), (30, 10)).point == (25, 5)  # the first row is padding
        assert grounded(grid, (0, -15, 30, 5), (30, 5)).point == (25, 2.5)  # of the part that shows

    def test_images_are_computed_once_on_first_access(self):
        found = grounded(np.eye(4))
        assert not {"mask", "heatmap", "polygon"} & set(vars(found))
        assert found.mask is found.mask
        with pytest.raises(AttributeError):
            found.box = (0, 0, 1, 1)
