"""The criteria against hand-computed values and a plain second implementation, one map at a time."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from small_maps import drawn, flood

from localization_heads.cells import label_components
from localization_heads.errors import UsageError
from localization_heads.heads.criteria import (
    BLOCK_CELLS,
    _block_statistics,
    attention_sum,
    attention_sum_threshold,
    binarise,
    elbow,
    elbow_index,
    head_at_elbow,
    head_statistics,
    keep_heads,
    spatial_entropy,
)
from localization_heads.heads.one_sample import analysis_rows, greedy_heads
from localization_heads.options.compose import load_preset
from localization_heads.options.groups import CriteriaOptions

LN2 = math.log(2)
SHARE = 7.6 / 11.2


JUNE, AUGUST = (CriteriaOptions.of(load_preset("criteria", name)) for name in ("published", "published_august"))


def obvious_entropy(grid, weight="area", threshold=None, means=1):
    """Spatial entropy of one map in plain Python."""
    cells = [float(value) for value in np.ravel(grid)]
    level = means * math.fsum(cells) / len(cells)
    excess = [[max(float(value) - level, 0.0) for value in row] for row in grid]
    components = flood([[value > (threshold or 0.0) for value in row] for row in excess])
    if weight == "area":
        shares = [len(component) for component in components]
        total = sum(shares)
    else:
        shares = [math.fsum(excess[y][x] for y, x in component) for component in components]
        total = math.fsum(value for row in excess for value in row)
    if total <= 0:
        return math.inf
    return -sum(share / total * math.log(share / total) for share in shares)


grids = hnp.array_shapes(min_dims=2, max_dims=2, max_side=7).flatmap(
    # Eighths, so that sums and means are exact in both implementations.
    lambda shape: hnp.arrays(np.float32, shape, elements=st.integers(0, 8).map(lambda n: n / 8))
)


class TestAttentionSum:
    def test_adds_the_cells_of_each_head(self):
        maps = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
        assert attention_sum(maps).tolist() == [[6, 22, 38], [54, 70, 86]]
        assert attention_sum(maps).dtype == np.float32

    def test_is_accurate_on_many_small_weights(self):
        maps = np.full((1, 1000, 1000), 1e-7, dtype=np.float32)
        assert attention_sum(maps)[0] == np.float32(1e6 * float(np.float32(1e-7)))

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("function", [attention_sum, spatial_entropy, binarise, head_statistics])
    def test_non_finite_maps_are_refused(self, function, bad):
        maps = np.ones((2, 3, 3), dtype=np.float32)
        maps[1, 2, 0] = bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            function(maps)

    @pytest.mark.parametrize("shape", [(3,), (2, 0, 4), (2, 4, 0)])
    def test_arrays_without_cells_are_refused(self, shape):
        with pytest.raises(ValueError, match="at least one cell"):
            attention_sum(np.zeros(shape))


class TestElbow:
    @pytest.mark.parametrize(
        ("values", "expected", "index"),
        [
            ([0.0, 0.1, 0.2, 1.0], 0.2, 2),  # distances to the chord: 0.23, 0.47
            ([1.0, 0.2, 0.0, 0.1], 0.2, 2),  # the order given does not matter
            ([0, 8, 9, 10], 8, 1),  # a bend above the chord counts too
            ([0, 0, 1, 1], 0, 1),  # a tie: distances 1/3 below and 1/3 above
            ([0, 1, 1, 4, 4, 5], 1, 2),  # a tie of index 2 (below) and 3 (above): the first
            ([3, 3, 3, 3], 3, 0),
            ([5, 2], 2, 0),
            ([7], 7, 0),
            ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], 0.1, 0),  # a line, but for rounding
        ],
    )
    def test_by_hand(self, values, expected, index):
        assert (elbow(values), elbow_index(values)) == (expected, index)

    @given(st.lists(st.integers(0, 1000), min_size=3, max_size=40, unique=True))
    def test_agrees_with_the_perpendicular_distance(self, values):
        ordered = sorted(values)
        chord = np.array([len(ordered) - 1, ordered[-1] - ordered[0]], dtype=float)
        points = np.stack([np.arange(len(ordered)), np.array(ordered) - ordered[0]], axis=1)
        along = np.outer(points @ chord / (chord @ chord), chord)
        distance = np.linalg.norm(points - along, axis=1)
        # Rounding decides between equal distances there, so only the distance itself is compared.
        assert distance[elbow_index(values)] == pytest.approx(distance.max(), abs=1e-6)

    @given(st.lists(st.integers(0, 99), min_size=1, max_size=30), st.sampled_from([0.25, 8.0]))
    def test_scales_with_the_values(self, values, factor):
        assert elbow([value * factor for value in values]) == elbow(values) * factor

    @pytest.mark.parametrize("values", [[], [0.1, np.nan, 0.2], [0.0, np.inf]])
    def test_no_or_non_finite_values_are_refused(self, values):
        with pytest.raises(ValueError, match=r"elbow|finite"):
            elbow(values)


class TestKeepHeads:
    SUMS = np.array([[0.9, 0.9], [0.8, 0.8], [0.0, 0.1], [0.2, 1.0], [0.05, 0.15]])
    SUMS.flags.writeable = False  # the functions must not change their argument

    def test_keeps_the_elbow_and_above_outside_the_excluded_layers(self):
        # Layers 2 to 4 sorted: 0, 0.05, 0.1, 0.15, 0.2, 1; the elbow is 0.2.
        assert attention_sum_threshold(self.SUMS) == 0.2
        assert np.argwhere(keep_heads(self.SUMS)).tolist() == [[3, 0], [3, 1]]

    def test_excluded_layers_do_not_move_the_threshold(self):
        louder = self.SUMS.copy()
        louder[:2] = 100.0
        assert (keep_heads(louder) == keep_heads(self.SUMS)).all()
        assert attention_sum_threshold(louder) == 0.2
        assert attention_sum_threshold(louder, CriteriaOptions(exclude_layers=0)) == 1.0

    def test_a_given_tau_is_reached_by_an_equal_sum(self):
        kept = keep_heads(self.SUMS, CriteriaOptions(tau=0.15))
        assert np.argwhere(kept).tolist() == [[3, 0], [3, 1], [4, 1]]
        assert keep_heads(self.SUMS, CriteriaOptions(tau=0.0))[2:].all()

    @pytest.mark.parametrize(
        ("sums", "exclude_layers", "elbow_at", "kept"),
        [
            # sorted: heads 1, 3, 2, 0; head 2 is at the elbow: it and those after it are kept, whatever their sums
            ([[0.9, 0.0], [0.2, 0.1]], 0, 2, [[False, False], [True, True]]),
            # sorted: heads 1, 2, 0, 3; head 0 is at the elbow
            ([[0.2, 0.0], [0.1, 0.9]], 0, 0, [[True, True], [True, True]]),
            # sorted: heads 2, 3, 4, 0, 1, 5; head 0 is at the elbow. Without layer 0 it would be head 4
            ([[0.9, 0.9], [0.0, 0.1], [0.2, 1.0]], 1, 0, [[False, False], [True, True], [True, True]]),
            ([[0.9, 0.9], [0.0, 0.1], [0.2, 1.0]], 2, 0, [[False, False], [False, False], [True, True]]),
        ],
    )
    def test_index_variant_keeps_heads_from_the_elbow_of_all_heads_on(self, sums, exclude_layers, elbow_at, kept):
        options = CriteriaOptions(elbow="index", exclude_layers=exclude_layers)
        assert head_at_elbow(np.array(sums)) == elbow_at
        assert keep_heads(np.array(sums), options).tolist() == kept

    def test_the_elbow_of_all_heads_depends_on_excluded_layers(self):
        # Sorted: 0, 0.05, 0.1, 0.15, 0.2, 0.8, 0.8, 0.9, 0.9, 1: the elbow is 0.2; louder first layers move it to 1.
        assert attention_sum_threshold(self.SUMS, CriteriaOptions(elbow_heads="all")) == 0.2
        louder = np.concatenate([100 * self.SUMS[:2], self.SUMS[2:]])
        assert attention_sum_threshold(louder, CriteriaOptions(elbow_heads="all")) == 1.0
        kept = keep_heads(louder, CriteriaOptions(elbow_heads="all"))
        assert np.argwhere(kept).tolist() == [[3, 1]]

    def test_contradicting_options_are_refused(self):
        with pytest.raises(UsageError, match=r"criteria.exclude_layers=5: there are only \d layers"):
            keep_heads(self.SUMS, CriteriaOptions(exclude_layers=5))
        with pytest.raises(ValueError, match="elbow=index"):
            CriteriaOptions(tau=0.2, elbow="index")


class TestBinarise:
    def test_is_strictly_above_the_maps_own_mean(self):
        maps = np.array([[[0, 1], [2, 1]], [[10, 0], [0, 0]]], dtype=np.float32)  # means 1 and 2.5
        assert binarise(maps).tolist() == [[[False, False], [True, False]], [[True, False], [False, False]]]

    @pytest.mark.parametrize(
        ("grid", "options", "positive"),
        [
            ([0.0, 0.5, 1.0, 2.5], {"threshold": 0.0}, True),  # mean 1: the excess of the last cell is 1.5
            ([0.0, 0.5, 1.0, 2.5], {"threshold": 1.499}, True),
            ([0.0, 0.5, 1.0, 2.5], {"threshold": 1.5}, False),
            ([0.0, 0.5, 0.5, 3.0], {"means": 2}, True),  # mean 1: 3 - 2 is 1
            ([0.0, 0.5, 0.5, 3.0], {"means": 2, "threshold": 0.999}, True),
            ([0.0, 0.5, 0.5, 3.0], {"means": 2, "threshold": 1.0}, False),
            ([0.1, 0.1, 0.1, 0.1], {"means": 2}, False),
        ],
    )
    def test_threshold_is_on_the_excess_over_the_means(self, grid, options, positive):
        """At most the last cell is positive."""
        assert binarise(np.array([grid]), CriteriaOptions(**options)).tolist() == [[False] * 3 + [positive]]

    @given(
        st.floats(1e-30, 1e30),
        st.sampled_from([np.float16, np.float32, np.float64]),
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=40),
    )
    def test_a_constant_map_has_no_positive_cell(self, value, dtype, shape):
        constant = np.full(shape, np.clip(value, 0, np.finfo(dtype).max).astype(dtype))
        assert not binarise(constant).any()
        assert spatial_entropy(constant) == np.inf


class TestComponents:
    @pytest.mark.parametrize(
        ("grid", "count"),
        [
            (np.eye(5), 1),  # diagonal neighbours are connected
            (drawn("...#", "#...", "...."), 2),  # rows do not wrap around
        ],
    )
    def test_count_by_hand(self, grid, count):
        assert head_statistics(grid.astype(float)).num_components == count

    def test_labels_agree_with_scipy(self):
        neighbours = np.zeros((3, 3, 3), dtype=bool)
        neighbours[1] = True
        for seed, shape in enumerate([(50, 24, 24), (30, 7, 1), (30, 1, 9), (9, 33, 40)]):
            masks = np.random.default_rng(seed).random(shape) < np.linspace(0.05, 0.95, shape[0])[:, None, None]
            assert (label_components(masks) == ndimage.label(masks, neighbours)[0]).all()

    def test_an_empty_stack(self):
        assert spatial_entropy(np.zeros((0, 4, 4))).shape == (0,)


class TestSpatialEntropy:
    @pytest.mark.parametrize(
        ("grid", "expected"),
        [
            (drawn("##..", "#...", "...."), 0.0),
            (drawn("#...", "....", "...#"), LN2),
            (drawn("#.#.", "....", "#.#."), 2 * LN2),
            # areas 3 and 1: ln 4 - 3/4 ln 3
            (drawn("###.", "....", "...#"), math.log(4) - 0.75 * math.log(3)),
            # areas 1, 2, 3
            (drawn("#.##", "....", "###."), LN2 / 2 + math.log(3) / 3 + math.log(6) / 6),
            (np.zeros((3, 3)), math.inf),
        ],
    )
    def test_by_hand(self, grid, expected):
        assert spatial_entropy(grid.astype(float)) == np.float32(expected)

    def test_one_component_is_exactly_positive_zero(self):
        maps = np.zeros((500, 9, 9))
        maps[:, 2:7, 3:6] = 1 + np.random.default_rng(1).random((500, 5, 3))
        for weight in ("area", "mass"):
            entropy = spatial_entropy(maps, weight=weight)
            assert (entropy == 0).all()
            assert not np.signbit(entropy).any()

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"weight": "area"}, LN2),
            ({"weight": "mass"}, -(SHARE * math.log(SHARE) + (1 - SHARE) * math.log(1 - SHARE))),
            # Above a threshold of 4 only the first component is left; its share is still of the whole excess.
            ({"weight": "area", "threshold": 4.0}, 0),
            ({"weight": "mass", "threshold": 4.0}, -SHARE * math.log(SHARE)),
        ],
    )
    def test_weight_by_hand(self, options, expected):
        """The mean is 1.4, the excess 7.6 and 3.6."""
        grid = np.array([[9.0, 0, 0, 0, 0, 5, 0, 0, 0, 0]])
        assert spatial_entropy(grid, **options) == pytest.approx(expected, rel=1e-6)

    def test_excess_below_the_threshold_by_hand(self):
        faint = np.array([[0.1001, 0.1, 0.1, 0.0999]])  # 0.0001 above the mean
        assert spatial_entropy(faint, weight="mass", threshold=0.001) == 0
        assert head_statistics(faint, CriteriaOptions(threshold=0.001)).num_components == 0
        assert spatial_entropy(faint, threshold=0.001) == np.inf  # areas: there is none
        for means in (1, 2):  # nothing above the mean, nothing above twice the mean
            grid = np.full((2, 2), 0.1) if means == 1 else faint
            assert spatial_entropy(grid, weight="mass", threshold=0.001, means=means) == np.inf

    def test_ties_are_exact_in_any_order_of_components(self):
        rng = np.random.default_rng(3)
        areas = [1, 2, 3, 5, 7, 11]
        entropies = set()
        for _ in range(200):
            row = []
            for area in rng.permutation(areas):
                row += [1.0] * int(area) + [0.0] * int(rng.integers(1, 4))
            row += [0.0] * (60 - len(row))
            # In float64: rounding to float32 would hide most differences, not all.
            _, entropy, *_ = _block_statistics(np.array([[row]]), CriteriaOptions())
            entropies.add(entropy.tobytes())
        assert len(entropies) == 1

    def test_does_not_change_with_scale_or_transposition(self):
        maps = np.random.default_rng(4).random((30, 8, 5)).astype(np.float32)
        assert (spatial_entropy(maps) == spatial_entropy(maps * np.float32(0.25))).all()
        assert (spatial_entropy(maps) == spatial_entropy(maps.transpose(0, 2, 1))).all()

    @settings(max_examples=200)
    @example(np.array([[0] * 4] * 2 + [[7, 8, 7, 8], [8, 8, 7, 7], [8] * 4], np.float32) / 8, "area", 0.3)
    @given(grids, st.sampled_from(["area", "mass"]), st.sampled_from([None, 0.0, 0.1, 0.3]))
    def test_agrees_with_flood_fill(self, grid, weight, threshold):
        fast = spatial_entropy(grid, weight=weight, threshold="mean" if threshold is None else threshold)
        assert fast == pytest.approx(obvious_entropy(grid, weight, threshold), rel=1e-6, abs=1e-9)

    def test_a_whole_stack_agrees_with_one_map_at_a_time(self):
        stack = np.random.default_rng(5).random((4, 6, 7, 9)).astype(np.float32) ** 3
        stack[1, 2] = 0.5
        whole = spatial_entropy(stack)
        assert whole.shape == (4, 6)
        assert whole.dtype == np.float32
        for index in np.ndindex(4, 6):
            assert whole[index] == spatial_entropy(stack[index])
            assert whole[index] == pytest.approx(obvious_entropy(stack[index]), rel=1e-6)

    def test_a_map_does_not_depend_on_the_rest_of_the_stack(self):
        """Faint maps between strong ones, in more than one block."""
        rng = np.random.default_rng(7)
        stack = ndimage.gaussian_filter(rng.random((600, 24, 24)), (0, 1, 1)).astype(np.float32)
        stack *= np.float32(10.0) ** rng.integers(-9, 1, (600, 1, 1)).astype(np.float32)
        assert stack.size > BLOCK_CELLS
        for options in (CriteriaOptions(), CriteriaOptions("mass", 1e-4), CriteriaOptions("mass", means=1.5)):
            whole = head_statistics(stack, options)
            for index in range(0, 600, 7):
                alone = head_statistics(stack[index], options)
                assert whole.num_components[index] == alone.num_components
                assert whole.area_entropy[index] == alone.area_entropy
                assert whole.mass_entropy[index] == alone.mass_entropy
                expected = obvious_entropy(
                    stack[index].tolist(),
                    options.entropy,
                    None if options.threshold == "mean" else options.threshold,
                    options.means,
                )
                assert whole.spatial_entropy[index] == pytest.approx(expected, rel=1e-6)


class TestHeadStatistics:
    def test_bottom_row_focus_needs_every_cell_of_the_last_row(self):
        masks = [("....", "####"), ("....", "###."), ("####", "...."), ("...#", "...#")]
        stack = np.stack([drawn(*rows) for rows in masks]).astype(float)
        assert head_statistics(stack).bottom_row_focus.tolist() == [True, False, False, False]

    def test_agrees_with_the_single_functions(self):
        attention = np.random.default_rng(6).random((3, 4, 6, 5)).astype(np.float32) ** 4
        attention[2, 3] = 0.25
        attention[0, 1, :-1] = 0.0
        attention[0, 1, -1] = 0.1
        for options in (CriteriaOptions(), CriteriaOptions(entropy="mass", threshold=0.05)):
            found = head_statistics(attention, options)
            assert (found.attention_sum == attention_sum(attention)).all()
            for place in np.ndindex(3, 4):
                active = binarise(attention[place], options)
                assert found.num_components[place] == len(flood(active))
                assert found.bottom_row_focus[place] == active[-1].all()
        assert found.bottom_row_focus[0, 1]
        assert found.num_components[2, 3] == 0

    def test_the_code_of_august_by_hand(self):
        """`relu(A - 2 mean) > 0.001`, components by that mass, heads out whose bottom row has a cell above 0.05."""
        grid = np.zeros((4, 4))  # mean 0.1: of 0.5, 0.8, 0.25 and 0.05 there are 0.3, 0.6 and 0.05 left
        grid[0, 0], grid[0, 3], grid[2, 2], grid[3, 0] = 0.5, 0.8, 0.25, 0.05
        low = grid.copy()
        low[3, 0] = 0.0501
        options = CriteriaOptions("mass", 0.001, means=2, bottom_row_filter=True, bottom_row_above=0.05)
        found = head_statistics(np.stack([grid, low])[None], options)
        assert found.num_components.tolist() == [[3, 3]]
        shares = np.array([0.3, 0.6, 0.05]) / 0.95
        assert found.mass_entropy[0, 0] == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-6)
        assert found.bottom_row_focus.tolist() == [[False, True]]
        once = head_statistics(grid[None, None], CriteriaOptions("mass", 0.001))
        assert once.mass_entropy[0, 0] != pytest.approx(found.mass_entropy[0, 0], rel=1e-3)
        assert not once.bottom_row_focus.any()


def by_chord(values):
    """Indices in ascending order, and the position in it that is farthest from the chord, by plane geometry."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    width, height = len(values) - 1, values[order[-1]] - values[order[0]]
    distances = [
        abs(height * place - width * (values[index] - values[order[0]])) / math.hypot(width, height)
        for place, index in enumerate(order)
    ]
    return order, distances.index(max(distances))


def obvious_june(attention):
    """The code of June 2025, from its description: threshold, entropies and the first five heads."""
    layers, heads = attention.shape[:2]
    maps = attention.reshape(layers * heads, *attention.shape[2:])
    order, place = by_chord([float(np.float32(math.fsum(grid.ravel().tolist()))) for grid in maps])
    threshold = order[place]
    entropies = [obvious_entropy(grid, "mass", 0.001) for grid in maps]
    ranked = [value if index >= threshold else math.inf for index, value in enumerate(entropies)]
    best = sorted(range(len(maps)), key=lambda index: ranked[index])[:5]  # stable: of equal ones the first
    return threshold, entropies, [divmod(index, heads) for index in best]


def obvious_august(attention):
    """The code of August 2025, likewise."""
    layers, heads = attention.shape[:2]
    maps = attention.reshape(layers * heads, *attention.shape[2:])
    sums = [float(np.float32(math.fsum(grid.ravel().tolist()))) for grid in maps]
    order, place = by_chord(sums)
    tau = sums[order[place]]
    entropies = [obvious_entropy(grid, "mass", 0.001, means=2) for grid in maps]
    above = [index for index in range(len(maps)) if sums[index] >= tau]
    low = [index for index in above if any(value > 0.05 for value in maps[index][-1])]
    kept = [i for i in above if i not in low and i >= 2 * heads and math.isfinite(entropies[i])]
    if not kept:
        kept = sorted((i for i in range(len(maps)) if i not in low), key=lambda i: -sums[i])[:1]
    return tau, entropies, [divmod(index, heads) for index in sorted(kept, key=lambda i: entropies[i])[:5]]


def cells(weight, **at):
    """A 4 x 4 map: a share of the weight at each cell, named by row and column."""
    grid = np.zeros((4, 4))
    for place, share in at.items():
        grid[int(place[1]), int(place[2])] = share * weight
    return grid


def faint(weight):
    """Nearly flat: 0.0005 above the mean at one cell, as much below it at another."""
    grid = np.full((4, 4), weight / 16)
    grid[0, 0] += 0.0005
    grid[3, 3] -= 0.0005
    return grid


SHAPES = {
    "one": lambda w: cells(w, c11=1),
    "two": lambda w: cells(w, c00=0.5, c22=0.5),
    "three": lambda w: cells(w, c00=0.5, c02=0.25, c20=0.25),
    "low": lambda w: cells(w, c30=0.75, c00=0.25),
    "faint": faint,
    "flat": lambda w: np.full((4, 4), w / 16),
    "upper": lambda w: np.repeat([w / 12, 0], [12, 4]).reshape(4, 4),
}


def built(layers, heads, shift, special, otherwise="two"):
    """Maps whose sums have their elbow at the fifth place from the end, where head `5 (n - 5) + shift (mod n)` stands.

    In ascending order the sums are 0.1, 0.10001, 0.10002, ... and at the end 0.3, 0.5, 0.7, 0.9. The chord rises by
    0.8 over n - 1 places, far more than 0.00001 a place, so that the last before 0.3 lies farthest below it.
    """
    n = layers * heads
    sums = [0.1 + place / 100_000 for place in range(n - 4)] + [0.3, 0.5, 0.7, 0.9]
    maps = np.zeros((n, 4, 4))
    for place, weight in enumerate(sums):
        index = (5 * place + shift) % n
        maps[index] = SHAPES[special.get(divmod(index, heads), otherwise)](weight)
    return maps.reshape(layers, heads, 4, 4)


class TestPublishedCode:
    """Both generations, by hand and against an obvious second implementation."""

    @pytest.mark.parametrize(
        ("layers", "heads", "first", "best"),
        [
            # 5 * 43 + 3 = 218 = 26 (mod 48): L3H2 stands at the elbow, and it and all after it are kept
            (6, 8, (3, 2), [(3, 4), (3, 6), (3, 2), (3, 5), (4, 0)]),
            # 5 * 59 + 3 = 298 = 42 (mod 64)
            (8, 8, (5, 2), [(5, 4), (5, 6), (5, 2), (5, 5), (6, 0)]),
            # 5 * 1019 + 3 = 5098 = 1002 (mod 1024)
            (32, 32, (31, 10), [(31, 12), (31, 14), (31, 10), (31, 13), (31, 16)]),
        ],
    )
    def test_june_by_hand(self, layers, heads, first, best):
        """Of the heads kept, the faint one and that of one component have entropy 0, then come those of two."""
        at = first[0] * heads + first[1]
        special = dict(
            zip([divmod(at + n, heads) for n in (1, 2, 4, 5)], ["flat", "faint", "one", "three"], strict=True)
        )
        attention = built(layers, heads, 3, {**special, (0, 0): "one", (1, 1): "one"})
        found = head_statistics(attention, JUNE)
        assert head_at_elbow(found.attention_sum) == at
        assert np.flatnonzero(keep_heads(found.attention_sum, JUNE)).tolist() == list(range(at, layers * heads))
        assert greedy_heads(found, JUNE, 5) == best
        # Shares of the whole excess: 7/16, 3/16 and 3/16 of 13/16.
        three = -(7 / 13 * math.log(7 / 13) + 6 / 13 * math.log(3 / 13))
        entropies = found.spatial_entropy.ravel()[at : at + 6].tolist()
        assert entropies == pytest.approx([LN2, math.inf, 0, LN2, 0, three], rel=1e-6)
        rows = analysis_rows(found, JUNE)
        assert [(row["layer"], row["head"]) for row in rows[:5]] == best
        assert [row["above_threshold"] for row in rows] == sorted(
            (row["above_threshold"] for row in rows), reverse=True
        )
        assert sum(row["above_threshold"] for row in rows) == layers * heads - at

    @pytest.mark.parametrize(
        ("layers", "heads", "loud"),
        [
            # 5 * 43 + 21 = 236 = 44 (mod 48), then 1, 6, 11 and 16: two of layer 0, one of layer 1, one of layer 2
            (6, 8, [(5, 4), (0, 1), (0, 6), (1, 3), (2, 0)]),
            # 5 * 59 + 21 = 316 = 60 (mod 64), then the same
            (8, 8, [(7, 4), (0, 1), (0, 6), (1, 3), (2, 0)]),
            # 5 * 1019 + 21 = 5116 = 1020 (mod 1024), then 1, 6, 11 and 16, all of layer 0
            (32, 32, [(31, 28), (0, 1), (0, 6), (0, 11), (0, 16)]),
        ],
    )
    def test_august_by_hand(self, layers, heads, loud):
        tau = np.float32(0.1 + (layers * heads - 5) / 100_000)
        deep = [head for head in loud if head[0] > 1]

        def found(shapes):
            statistics = head_statistics(built(layers, heads, 21, shapes), AUGUST)
            assert np.float32(attention_sum_threshold(statistics.attention_sum, AUGUST)) == tau
            kept = keep_heads(statistics.attention_sum, AUGUST)
            assert sorted(map(tuple, np.argwhere(kept).tolist())) == sorted(deep)
            return statistics, greedy_heads(statistics, AUGUST, 5)

        # Three components above twice the mean: 3/8, 1/8 and 1/8 of 5/8. So the other of the two comes first.
        statistics, best = found({deep[0]: "three"})
        assert best == [*deep[1:], deep[0]]
        three = -(0.6 * math.log(0.6) + 0.4 * math.log(0.2))
        assert statistics.spatial_entropy[deep[0]] == pytest.approx(three, rel=1e-6)
        # Three quarters of 0.1 in a cell of the bottom row are more than 0.05.
        assert found({deep[0]: "low"})[1] == (deep[1:] or [loud[4]])
        # 4/3 of the mean are not twice the mean: no entropy, and none is kept; the loudest is taken in any layer.
        upper = dict.fromkeys(loud, "upper")
        assert found(upper)[1] == [loud[4]]
        # ... unless its bottom row is in focus: then the next.
        assert found({**upper, loud[4]: "low"})[1] == [loud[3]]

    def test_too_few_heads_above_the_elbow(self):
        """June fills up with heads that do not pass, in the model's order; the paper takes what there is."""
        attention = built(6, 8, 24, {})  # 5 * 43 + 24 = 239 = 47 (mod 48): only the last head is kept
        found = head_statistics(attention, JUNE)
        assert greedy_heads(found, JUNE, 5) == [(5, 7), (0, 0), (0, 1), (0, 2), (0, 3)]
        assert greedy_heads(found, replace(JUNE, fallback="none"), 5) == [(5, 7)]

    @pytest.mark.parametrize(("layers", "heads", "side"), [(6, 8, 7), (8, 8, 5), (32, 32, 4)])
    @pytest.mark.parametrize("sharp", [1, 12])
    def test_agrees_with_the_obvious_way(self, layers, heads, side, sharp):
        """Softmax-like maps, dull and sharp: in dull ones many have no component, some nothing above two means."""
        rng = np.random.default_rng(layers + sharp)
        logits = rng.standard_normal((layers, heads, side, side)) * sharp / 3
        maps = np.exp(logits) / np.exp(logits).sum(axis=(2, 3), keepdims=True)
        attention = (maps * rng.random((layers, heads, 1, 1)) ** 4).astype(np.float32)

        threshold, entropies, best = obvious_june(attention)
        june = head_statistics(attention, JUNE)
        assert head_at_elbow(june.attention_sum) == threshold
        np.testing.assert_allclose(june.spatial_entropy.ravel(), entropies, rtol=1e-5, atol=1e-7)
        assert greedy_heads(june, JUNE, 5) == best

        tau, entropies, best = obvious_august(attention)
        august = head_statistics(attention, AUGUST)
        assert attention_sum_threshold(august.attention_sum, CriteriaOptions(elbow_heads="all")) == pytest.approx(
            tau, rel=1e-6
        )
        np.testing.assert_allclose(august.spatial_entropy.ravel(), entropies, rtol=1e-5, atol=1e-7)
        assert greedy_heads(august, AUGUST, 5) == best

    def test_a_dropped_bottom_row_comes_after_the_heads_that_are_taken(self):
        attention = built(6, 8, 21, {(2, 0): "low"})
        found = head_statistics(attention, AUGUST)
        rows = analysis_rows(found, AUGUST)
        taken = [(row["layer"], row["head"]) for row in rows if row["above_threshold"]]
        assert taken == [(row["layer"], row["head"]) for row in rows[:2]] == [(5, 4), (2, 0)]
