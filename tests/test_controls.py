"""The controls: hand-computed values, and coverage against painting every pixel."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localization_heads.attention import AttentionMaps
from localization_heads.cells import box_coverage, mask_coverage
from localization_heads.evaluation.controls import (
    DRAWS,
    centre_box,
    control_groundings,
    layer_matched,
    mean_map,
    oracle_map,
    random_heads,
)
from localization_heads.evaluation.scores import Truth
from localization_heads.grounding.ground import ground_maps
from localization_heads.heads.head import Head
from localization_heads.options.groups import GroundingOptions

PLAIN = GroundingOptions(kernel_size=1)


def random_maps(seed: int = 0, shape: tuple[int, int, int, int] = (4, 6, 5, 7)) -> AttentionMaps:
    attention = np.random.default_rng(seed).random(shape, dtype=np.float32)
    return AttentionMaps(attention, (0.0, -10.0, 70.0, 40.0), (70, 30))


class TestRandomHeads:
    @given(st.integers(1, 4), st.integers(1, 6), st.data())
    def test_each_drawn_head_replaces_one_of_its_layer(self, layers: int, width: int, data: st.DataObject) -> None:
        """A given head is drawn only if its layer has too few others."""
        every = [Head(layer, head) for layer in range(layers) for head in range(width)]
        heads = data.draw(st.lists(st.sampled_from(every), unique=True, min_size=1))
        seed = data.draw(st.integers(0, 99))
        single = layer_matched(heads, (layers, width), np.random.default_rng(seed))
        for drawn in (single, *random_heads(heads, width, seed=seed)):
            assert [head.layer for head in drawn] == [head.layer for head in heads]
            assert set(drawn) <= set(every)
            assert len(set(drawn)) == len(heads)
            for layer in range(layers):
                in_layer = {head for head in heads if head.layer == layer}
                others = width - len(in_layer)
                assert len(in_layer & set(drawn)) == max(0, len(in_layer) - others)

    def test_by_hand(self) -> None:
        drawn = layer_matched([Head(1, 0), Head(0, 1), Head(1, 2)], (2, 3), np.random.default_rng(0))
        assert [head.layer for head in drawn] == [1, 0, 1]
        assert drawn[1] in {Head(0, 0), Head(0, 2)}
        # Layer 1 has one other head, so the second drawn one is a given head.
        assert Head(1, 1) in {drawn[0], drawn[2]}
        assert {drawn[0], drawn[2]} - {Head(1, 1)} <= {Head(1, 0), Head(1, 2)}
        assert random_heads([Head(2, 0)], 1) == [(Head(2, 0),)] * DRAWS

    def test_all_other_heads_are_equally_likely(self) -> None:
        drawn = random_heads([Head(2, 0), Head(2, 3)], 8, draws=6000)
        counts = Counter(head.head for draw in drawn for head in draw)
        assert set(counts) == {1, 2, 4, 5, 6, 7}
        assert all(count == pytest.approx(2000, rel=0.1) for count in counts.values())
        first = Counter(draw[0].head for draw in drawn)
        assert all(count == pytest.approx(1000, rel=0.15) for count in first.values())

    def test_draws_are_deterministic_for_a_seed(self) -> None:
        heads = [Head(2, 0), Head(3, 1), Head(3, 4)]
        assert random_heads(heads, 8, seed=1) == random_heads(heads, 8, seed=1)
        assert random_heads(heads, 8, seed=1) != random_heads(heads, 8, seed=2)
        assert len(random_heads(heads, 8)) == DRAWS

    @pytest.mark.parametrize("heads", [[Head(2, 0)], [Head(0, 3)], [Head(0, 0), Head(0, 0)], [Head(-1, 0)]])
    def test_duplicate_or_nonexistent_heads_are_refused(self, heads: list[Head]) -> None:
        with pytest.raises(ValueError, match="head"):
            layer_matched(heads, (2, 3), np.random.default_rng(0))


class TestAllHeads:
    def test_by_hand(self) -> None:
        attention = np.arange(12, dtype=np.float32).reshape(3, 2, 1, 2)
        maps = AttentionMaps(attention, (0, 0, 2, 1), (2, 1))
        assert mean_map(maps, 1).attention.tolist() == [[[[7.0, 8.0]]]]  # 4 6 8 10 and 5 7 9 11
        assert mean_map(maps, 2).attention.tolist() == [[[[9.0, 10.0]]]]

    def test_grounds_as_the_sum_of_all_heads_does(self) -> None:
        maps = random_maps()
        every_head = [Head(layer, head) for layer in (2, 3) for head in range(6)]
        grounding, expected = ground_maps(mean_map(maps, 2), [Head(0, 0)]), ground_maps(maps, every_head)
        assert grounding.box == expected.box
        assert grounding.score == pytest.approx(expected.score)


class TestOracle:
    def test_mask_by_hand(self) -> None:
        mask = np.zeros((4, 4), bool)
        mask[0, 0] = mask[1, 2:] = mask[2:, 2:] = True
        assert mask_coverage(mask, (0, 0, 4, 4), (2, 2)).tolist() == [[0.25, 0.5], [0, 1]]
        # cells 4/3 pixels wide; the one true pixel lies in the first
        assert mask_coverage(mask[:1], (0, 0, 4, 1), (1, 3)).tolist() == [[pytest.approx(0.75), 0, 0]]
        # the upper half of the grid is padding
        assert mask_coverage(mask, (0, -4, 4, 4), (2, 1)).ravel().tolist() == [0, 7 / 16]

    @given(
        st.integers(0, 2**32 - 1),
        st.tuples(st.integers(1, 4), st.integers(1, 5)),
        st.tuples(st.integers(-5, 5), st.integers(-5, 5)),
        st.tuples(st.integers(1, 5), st.integers(1, 5)),
    )
    def test_mask_coverage_agrees_with_painting(
        self, seed: int, grid: tuple[int, int], corner: tuple[int, int], cell: tuple[int, int]
    ) -> None:
        """Cell edges in thirds of a pixel: each pixel is painted as 3 x 3."""
        mask = np.random.default_rng(seed).random((6, 8)) < 0.5
        fine = mask.repeat(3, 0).repeat(3, 1)
        (h, w), (x0, y0), (cw, ch) = grid, corner, cell
        expected = np.zeros(grid)
        for row, column in np.ndindex(grid):
            for y in range(y0 + row * ch, y0 + (row + 1) * ch):
                for x in range(x0 + column * cw, x0 + (column + 1) * cw):
                    if 0 <= y < fine.shape[0] and 0 <= x < fine.shape[1]:
                        expected[row, column] += fine[y, x] / (cw * ch)
        box = (x0 / 3, y0 / 3, (x0 + w * cw) / 3, (y0 + h * ch) / 3)
        assert mask_coverage(mask, box, grid) == pytest.approx(expected)

    @given(st.tuples(st.integers(0, 7), st.integers(0, 5), st.integers(1, 8), st.integers(1, 6)))
    def test_a_box_covers_what_its_filled_mask_covers(self, edges: tuple[int, int, int, int]) -> None:
        x0, y0, x1, y1 = edges
        if x0 >= x1 or y0 >= y1:
            return
        mask = np.zeros((6, 8), bool)
        mask[y0:y1, x0:x1] = True
        frame = (-1.0, -0.5, 8.3, 7.0)
        assert box_coverage((x0, y0, x1, y1), frame, (4, 3)) == pytest.approx(mask_coverage(mask, frame, (4, 3)))

    def test_uses_the_mask_or_else_the_box(self) -> None:
        maps = random_maps()
        mask = np.zeros((30, 70), bool)
        mask[5:9, 20:60] = True
        by_mask = oracle_map(maps, Truth((0.0, 0.0, 70.0, 30.0), mask))
        assert by_mask.attention[0, 0] == pytest.approx(mask_coverage(mask, maps.image_box, maps.grid))
        assert by_mask.image_box == maps.image_box and by_mask.image_size == maps.image_size
        by_box = oracle_map(maps, Truth((20.0, 5.0, 60.0, 9.0)))
        assert by_box.attention == pytest.approx(by_mask.attention)

    def test_a_box_on_cell_borders_is_recovered_exactly(self) -> None:
        """Without smoothing."""
        maps = random_maps()
        truth = Truth((10.0, 10.0, 40.0, 20.0))
        assert ground_maps(oracle_map(maps, truth), [Head(0, 0)], PLAIN).box == truth.box


class TestGroundings:
    def test_every_control_uses_the_same_options(self) -> None:
        maps, truth, heads = random_maps(), Truth((10.0, 10.0, 40.0, 20.0)), [Head(2, 0), Head(3, 5)]
        options = GroundingOptions(kernel_size=3, sigma=0.7, upsample=2, component="all")
        found = control_groundings(maps, heads, truth, options, exclude_layers=2, seed=9)
        drawn = random_heads(heads, 6, seed=9)
        assert [grounding.heads for grounding in found["random_heads"]] == drawn
        for grounding, other in zip(found["random_heads"], drawn, strict=True):
            assert grounding.box == ground_maps(maps, other, options).box
        assert [len(answers) for answers in found.values()] == [DRAWS, 1, 1]
        assert found["all_heads"][0].box == ground_maps(mean_map(maps, 2), [Head(0, 0)], options).box
        assert found["oracle"][0].box == ground_maps(oracle_map(maps, truth), [Head(0, 0)], options).box

    def test_the_centre_box_is_a_centred_quarter(self) -> None:
        x0, y0, x1, y1 = centre_box((101, 60))
        assert ((x0 + x1) / 2, (y0 + y1) / 2) == (50.5, 30)
        assert math.isclose((x1 - x0) * (y1 - y0), 101 * 60 / 4)
        assert (x1 - x0) / (y1 - y0) == pytest.approx(101 / 60)
