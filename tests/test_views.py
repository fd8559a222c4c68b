"""Views on a common grid, by hand: attention is spread over pixels, added up, and never lost inside the image."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localization_heads.lvlm.geometry import View, even_view, read_maps

WHOLE = even_view("whole", np.array([[0]]), (0, 0, 4, 2))
TILES = even_view("tiles", np.array([[2, 1]]), (0, 0, 4, 2))
ROW = np.array([[0.5, 0.3, 0.1]], np.float32)  # one head, three keys


def test_a_single_even_view_is_taken_as_it_is() -> None:
    """Bit-identical, in the order of its index, with the padding around the image."""
    view = even_view("whole", np.array([[2, 0], [1, 3]]), (0, -1, 4, 3))
    row = np.random.default_rng(0).random((2, 3, 4), np.float32)
    maps, box = read_maps(row, [view], (4, 2))
    assert box == (0, -1, 4, 3)
    assert np.array_equal(maps, row[..., [2, 0, 1, 3]].reshape(2, 3, 2, 2))


def test_two_views_add_up() -> None:
    """The whole's 0.5 falls half on either side of the tiles' 0.1 and 0.3."""
    maps, box = read_maps(ROW, [WHOLE, TILES], (4, 2))
    assert box == (0, 0, 4, 2)
    np.testing.assert_allclose(maps, [[[0.35, 0.55]]])


@pytest.mark.parametrize(("choice", "expected"), [("whole", [[[0.5]]]), ("tiles", [[[0.1, 0.3]]])])
def test_a_view_alone(choice: str, expected: list) -> None:
    np.testing.assert_allclose(read_maps(ROW, [WHOLE, TILES], (4, 2), choice)[0], expected)


def test_an_image_without_tiles_has_only_the_whole() -> None:
    np.testing.assert_allclose(read_maps(ROW, [WHOLE], (4, 2), "tiles")[0], [[[0.5]]])


def test_uneven_cells_are_spread_over_even_ones() -> None:
    """Columns of 1 and 3 pixels, on the image's two of 2: a third of the wide one's 0.3 goes left."""
    view = View("tiles", np.array([[0, 1]]), np.array([0.0, 1, 4]), np.array([0.0, 2]))
    np.testing.assert_allclose(read_maps(ROW, [view], (4, 2))[0], [[[0.6, 0.2]]], rtol=1e-6)


def test_what_lies_outside_the_image_is_left_out() -> None:
    """Two columns of four pixels, the right one all padding: combined with the whole, its 0.1 is gone."""
    padded = even_view("tiles", np.array([[1, 2]]), (0, 0, 8, 2))
    maps, _ = read_maps(ROW, [WHOLE, padded], (4, 2))
    np.testing.assert_allclose(maps.sum(), 0.5 + 0.3, rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=2, max_size=3),
    st.integers(5, 50),
    st.integers(5, 50),
)
def test_mass_is_kept(grids: list[tuple[int, int]], width: int, height: int) -> None:
    """Where all views lie inside the image, whatever their grids."""
    views, start = [], 0
    for h, w in grids:
        index = np.arange(start, start + h * w).reshape(h, w)
        views.append(even_view("tiles", index, (0, 0, width, height)))
        start += h * w
    row = np.random.default_rng(0).random(start).astype(np.float32)
    maps, _ = read_maps(row, views, (width, height))
    assert maps.sum() == pytest.approx(row.sum(), rel=1e-5)
