"""Random heads of the same layers: as many, elsewhere, evenly."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localization_heads.evaluation.controls import layer_matched
from localization_heads.heads.head import Head


def test_by_hand() -> None:
    """Where only one head of a layer is left there is nothing to draw."""
    heads = [Head(1, 0), Head(0, 1), Head(1, 2)]
    drawn = layer_matched(heads, (2, 3), np.random.default_rng(0))
    assert [head.layer for head in drawn] == [1, 0, 1]
    assert drawn[1] in {Head(0, 0), Head(0, 2)}
    # Layer 1 has one head besides the given two; the second one has to be one of them.
    assert Head(1, 1) in {drawn[0], drawn[2]}
    assert {drawn[0], drawn[2]} - {Head(1, 1)} <= {Head(1, 0), Head(1, 2)}


def test_every_other_head_comes_up_as_often() -> None:
    rng = np.random.default_rng(1)
    counts = Counter(layer_matched([Head(0, 3)], (1, 5), rng)[0].head for _ in range(4000))
    assert set(counts) == {0, 1, 2, 4}
    assert all(abs(count - 1000) < 150 for count in counts.values())


@given(st.integers(1, 4), st.integers(1, 6), st.data())
def test_layers_and_numbers_are_kept(layers: int, width: int, data: st.DataObject) -> None:
    every = [Head(layer, head) for layer in range(layers) for head in range(width)]
    heads = data.draw(st.lists(st.sampled_from(every), unique=True, min_size=1))
    drawn = layer_matched(heads, (layers, width), np.random.default_rng(data.draw(st.integers(0, 99))))
    assert [head.layer for head in drawn] == [head.layer for head in heads]
    assert len(set(drawn)) == len(heads)
    for layer in range(layers):
        given_here = {head for head in heads if head.layer == layer}
        others = width - len(given_here)
        assert len(given_here & set(drawn)) == max(0, len(given_here) - others)


@pytest.mark.parametrize("heads", [[Head(2, 0)], [Head(0, 3)], [Head(0, 0), Head(0, 0)], [Head(-1, 0)]])
def test_impossible_heads_are_refused(heads: list[Head]) -> None:
    with pytest.raises(ValueError, match="head"):
        layer_matched(heads, (2, 3), np.random.default_rng(0))
