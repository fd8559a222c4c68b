"""Selection frequency by hand and against a plain second implementation; the record and its JSON."""

import json
import math
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localization_heads.errors import UsageError
from localization_heads.heads import ranking as ranking_module
from localization_heads.heads.criteria import elbow, elbow_index
from localization_heads.heads.head import Head
from localization_heads.heads.one_sample import select_by_entropy, select_in_sample
from localization_heads.heads.ranking import random_draws, rank_heads
from localization_heads.heads.ready import describe_difference, preset_of
from localization_heads.heads.record import HeadRanking, RankedHead
from localization_heads.options.compose import load_preset
from localization_heads.options.groups import CriteriaOptions

INF = math.inf
PUBLISHED = CriteriaOptions.of(load_preset("criteria", "published"))
ALL = CriteriaOptions(exclude_layers=0, tau=0.0)


def obvious_selection(sums, entropy, kept, top_n):
    """Criterion 2 in one sample with a sorted list of tuples."""
    layers, heads = entropy.shape
    candidates = sorted(
        (float(entropy[layer, head]), -float(sums[layer, head]), layer, head)
        for layer in range(layers)
        for head in range(heads)
        if kept[layer][head] and math.isfinite(entropy[layer, head])
    )
    return [(layer, head) for _, _, layer, head in candidates[:top_n]]


def obvious_frequency(sums, entropies, samples, options, top_n):
    """tau and the selection frequencies of one draw, sample by sample."""
    layers, heads = sums.shape[1:]
    mean = np.mean([sums[sample].astype(float) for sample in samples], axis=0)
    flat = [mean[layer, head] for layer in range(options.exclude_layers, layers) for head in range(heads)]
    tau = elbow(flat) if options.tau is None else options.tau
    kept = [
        [
            layer >= options.exclude_layers
            and (
                layer * heads + head >= np.argsort(mean.ravel(), kind="stable")[elbow_index(mean)]
                if options.elbow == "index"
                else mean[layer, head] >= tau
            )
            for head in range(heads)
        ]
        for layer in range(layers)
    ]
    counts = np.zeros((layers, heads))
    for sample in samples:
        for address in obvious_selection(sums[sample], entropies[sample], kept, top_n):
            counts[address] += 1
    return tau, counts / len(samples), kept


def random_pool(samples=40, layers=5, heads=4, seed=0):
    """Sums with clear high and low heads, and entropies with many ties and some infinite ones."""
    rng = np.random.default_rng(seed)
    loud = rng.random((layers, heads)) ** 3
    sums = (loud * rng.uniform(0.8, 1.2, (samples, layers, heads))).astype(np.float32)
    entropies = rng.integers(0, 5, (samples, layers, heads)).astype(np.float32) / 2
    entropies[rng.random(entropies.shape) < 0.2] = INF
    return sums, entropies


def frequencies(ranking, shape):
    grid = np.full(shape, np.nan)
    for head in ranking.heads:
        grid[head.layer, head.head] = head.selection_frequency
    return grid


ONES, ALL_OF_FOUR = np.ones((2, 2)), np.ones((2, 2), bool)


@pytest.mark.parametrize(
    ("entropy", "sums", "kept", "more", "expected"),
    [
        ([[3.0, 1.0], [0.5, 2.0]], ONES, ALL_OF_FOUR, {"top_n": 3}, [(1, 0), (0, 1), (1, 1)]),  # the lowest
        ([[0.2, 0.1]], [[0.9, 0.1]], [[True] * 2], {"top_n": 1}, [(0, 1)]),  # whatever the sums
        # of equal ones the higher sum, then the layer, then the head; or the layer at once
        (
            np.zeros((2, 3)), [[0.1, 0.3, 0.2], [0.3, 0.9, 0.1]], [[True] * 3] * 2, {"top_n": 6},
            [(1, 1), (0, 1), (1, 0), (0, 2), (0, 0), (1, 2)],
        ),
        (ONES, [[0.1, 0.3], [0.9, 0.2]], ALL_OF_FOUR, {"top_n": 3, "ties": "order"}, [(0, 0), (0, 1), (1, 0)]),
        # never what criterion 1 dropped, nor a map without a component
        ([[0.0, 1.0, INF, np.nan]], [[1.0] * 4], [[False, True, True, True]], {}, [(0, 1)]),
    ],
)  # fmt: skip
def test_heads_selected_in_one_sample(entropy, sums, kept, more, expected):
    assert select_by_entropy(np.array(sums), np.array(entropy), np.array(kept), **more) == expected


class TestFrequency:
    def test_by_hand(self):
        # Three samples, one layer of four heads, of which each sample selects two; tau 0.3 drops head 3.
        sums = np.tile(np.array([[0.6, 0.5, 0.4, 0.1]]), (3, 1, 1))
        entropies = np.array([[[0.0, 1.0, 2.0, 0.0]], [[2.0, 1.0, 0.0, 0.0]], [[1.0, 1.0, 1.0, 0.0]]])
        options = CriteriaOptions(exclude_layers=0, tau=0.3)
        ranking = rank_heads(sums, entropies, options=options, top_n=2)
        # selected: {0, 1}, {2, 1}, {0, 1} (a tie: the higher sums)
        assert frequencies(ranking, (1, 4)).tolist() == [[2 / 3, 1.0, 1 / 3, 0.0]]
        assert ranking.top(3) == [Head(0, 1), Head(0, 0), Head(0, 2)]
        assert [head.kept for head in ranking.heads] == [True, True, True, False]
        assert [head.spatial_entropy for head in ranking.heads] == [1.0, 1.0, 1.0, 0.0]
        assert (ranking.tau, ranking.num_samples, ranking.top_n) == (0.3, 3, 2)

    def test_criterion_1_applies_to_the_mean_over_samples(self):
        # Head 1 is silent in half of the samples, but its mean passes, and it is selected in all of them.
        sums = np.array([[[0.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 0.8]]])
        entropies = np.array([[[0.0, 0.0, 0.0, 1.0]], [[0.0, 0.0, 0.0, 1.0]]])
        ranking = rank_heads(sums, entropies, options=CriteriaOptions(exclude_layers=0, tau=0.3), top_n=1)
        assert frequencies(ranking, (1, 4)).tolist() == [[0.0, 1.0, 0.0, 0.0]]

    def test_each_sample_may_have_its_own_elbow(self):
        """As in the published code."""
        # Elbows: 0.2, 0.3 and 0.2. Heads 2 and 3, 0 and 3, 1 and 3 pass; in the last sample 3 has no component.
        sums = np.array([[[0.0, 0.1, 0.2, 1.0]], [[0.3, 0.0, 0.1, 1.0]], [[0.1, 0.7, 0.0, 0.2]]])
        entropies = np.array([[[0.0, 0.0, 1.0, 0.0]], [[0.5, 0.0, 0.0, 0.6]], [[0.0, 2.0, 0.0, INF]]])
        options = CriteriaOptions(exclude_layers=0, per_sample=True)
        ranking = rank_heads(sums, entropies, options=options, top_n=1)
        assert frequencies(ranking, (1, 4)).tolist() == [[1 / 3, 1 / 3, 0.0, 1 / 3]]
        assert ranking.tau == pytest.approx(0.7 / 3)
        assert ranking.top(4) == [(0, 3), (0, 1), (0, 0), (0, 2)]  # head 2 passes once and is kept
        both = rank_heads(sums, entropies, options=options, top_n=2)
        assert frequencies(both, (1, 4)).tolist() == [[1 / 3, 1 / 3, 1 / 3, 2 / 3]]
        # The elbow of the averages (0.4, 0.8, 0.3 and 2.2, by 3) is 0.8 / 3: heads 1 and 3, in all samples.
        shared = rank_heads(sums, entropies, options=CriteriaOptions(exclude_layers=0), top_n=1)
        assert frequencies(shared, (1, 4)).tolist() == [[0.0, 2 / 3, 0.0, 1 / 3]]

    @pytest.mark.parametrize(
        "options",
        [
            CriteriaOptions(tau=0.2, ties="order", fallback="order", bottom_row_filter=True),
            CriteriaOptions("mass", elbow="index", exclude_layers=0, ties="order", fallback="order"),
            CriteriaOptions("mass", elbow_heads="all", bottom_row_filter=True, ties="order", fallback="sum"),
        ],
    )
    def test_per_sample_elbows_agree_with_a_loop(self, options, monkeypatch):
        monkeypatch.setattr(ranking_module, "CHUNK_VALUES", 64)
        sums, entropies = random_pool()
        flags = np.random.default_rng(9).random(sums.shape) < 0.3
        options = replace(options, per_sample=True)
        draws = random_draws(40, 3, 15, seed=1)
        ranking = rank_heads(sums, entropies, options=options, top_n=4, num_samples=15, bottom_row=flags, draws=draws)
        counts = np.zeros(sums.shape[1:])
        for sample, times in enumerate(draws.sum(axis=0)):
            for head in select_in_sample(sums[sample], entropies[sample], flags[sample], options, 4):
                counts[head] += times
        assert np.allclose(frequencies(ranking, counts.shape), counts / 45, rtol=0, atol=1e-12)

    @pytest.mark.parametrize(
        "options",
        [
            CriteriaOptions(),
            CriteriaOptions(exclude_layers=0),
            CriteriaOptions(exclude_layers=1, elbow="index"),
            CriteriaOptions(tau=0.2),
        ],
    )
    @pytest.mark.parametrize("top_n", [1, 3, 10])
    def test_whole_pool_agrees_with_plain_loops(self, options, top_n):
        sums, entropies = random_pool()
        ranking = rank_heads(sums, entropies, options=options, top_n=top_n)
        tau, expected, kept = obvious_frequency(sums, entropies, range(40), options, top_n)
        assert np.allclose(frequencies(ranking, expected.shape), expected, rtol=0, atol=1e-12)
        assert ranking.tau is None if options.elbow == "index" else ranking.tau == pytest.approx(tau)
        assert {head.address for head in ranking.kept} == {tuple(at) for at in np.argwhere(kept)}

    def test_trials_agree_with_plain_loops(self):
        sums, entropies = random_pool(samples=60)
        ranking = rank_heads(sums, entropies, top_n=2, num_trials=4, num_samples=25, seed=7)
        rng = np.random.default_rng(7)
        draws = [rng.choice(60, 25, replace=False) for _ in range(4)]
        trials = [obvious_frequency(sums, entropies, draw, CriteriaOptions(), 2) for draw in draws]
        assert ranking.tau == pytest.approx(np.mean([tau for tau, _, _ in trials]))
        found = np.array([frequency for _, frequency, _ in trials])
        for head in ranking.heads:
            own = found[:, head.layer, head.head]
            assert head.selection_frequency == pytest.approx(own.mean())
            assert head.selection_frequency_std == pytest.approx(own.std())
            means = [sums[draw, head.layer, head.head].mean(dtype=float) for draw in draws]
            assert head.attention_sum == pytest.approx(np.mean(means))
        assert ranking.num_samples == 25
        assert ranking.num_trials == 4
        assert any(head.selection_frequency_std > 0 for head in ranking.heads)

    def test_a_small_pool_has_a_bootstrap_spread(self):
        sums, entropies = random_pool(samples=30)
        at_limit = rank_heads(sums, entropies, num_samples=30, num_trials=3, seed=5)
        below = rank_heads(sums, entropies, num_samples=1000, num_trials=3, seed=5)
        assert at_limit == below
        assert at_limit.num_samples == 30
        rng = np.random.default_rng(5)
        resamples = [rng.integers(30, size=30) for _ in range(3)]
        trials = np.array([obvious_frequency(sums, entropies, rows, CriteriaOptions(), 10)[1] for rows in resamples])
        for head in at_limit.heads:
            expected = trials[:, head.layer, head.head].std()
            assert head.selection_frequency_std == pytest.approx(expected, abs=1e-12)
        assert any(head.selection_frequency_std > 0 for head in at_limit.heads)

    def test_draws_of_a_larger_pool_can_be_given(self):
        sums, entropies = random_pool(samples=60)
        draws = random_draws(60, num_trials=4, num_samples=25, seed=7)
        drawn = draws.any(axis=0)
        expected = rank_heads(sums, entropies, num_trials=4, num_samples=25, seed=7)
        found = rank_heads(sums[drawn], entropies[drawn], draws=draws[:, drawn], num_trials=4, num_samples=25, seed=7)
        assert found == expected

    def test_unusable_samples_leave_trials_of_different_sizes(self):
        sums, entropies = random_pool(samples=6)
        draws = np.array([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
        options = CriteriaOptions(tau=0.1)
        ranking = rank_heads(sums, entropies, draws=draws, options=options, top_n=2)
        # With a fixed tau every drawn sample selects on its own: four samples, three of them in one trial.
        kept = {head.address for head in ranking.kept}
        assert len(kept) > 2
        counts = dict.fromkeys(kept, 0)
        for sample in range(4):
            ordered = obvious_selection(sums[sample], entropies[sample], np.ones((5, 4)), 99)
            for address in [address for address in ordered if address in counts][:2]:
                counts[address] += 1
        for head in ranking.kept:
            assert head.selection_frequency == counts[head.address] / 4
        assert ranking.num_samples == 3

    def test_a_single_trial_has_the_bootstrap_spread_of_its_own_draw(self):
        sums, entropies = random_pool(samples=50)
        draws = random_draws(50, num_trials=1, num_samples=20, seed=3)
        held = draws[0] > 0
        one = rank_heads(sums, entropies, draws=draws, num_trials=5, seed=3)
        assert one == rank_heads(sums[held], entropies[held], num_trials=5, seed=3)
        assert any(head.selection_frequency_std > 0 for head in one.heads)

    @pytest.mark.parametrize("draws", [np.ones((2, 3), int), np.ones(4, int), np.zeros((2, 4), int)])
    def test_draws_of_another_shape_or_without_samples_are_refused(self, draws):
        with pytest.raises(ValueError, match="draws must"):
            rank_heads(*random_pool(samples=4), draws=draws)

    def test_one_sample_is_enough(self):
        sums, entropies = random_pool(samples=1)
        ranking = rank_heads(sums, entropies, top_n=1)
        assert sum(head.selection_frequency for head in ranking.heads) == 1.0
        assert all(head.selection_frequency_std == 0 for head in ranking.heads)

    def test_infinite_entropies_are_neither_selected_nor_averaged(self):
        sums = np.full((2, 1, 3), 0.5)
        entropies = np.array([[[INF, INF, 2.0]], [[INF, 1.0, INF]]])
        ranking = rank_heads(sums, entropies, options=ALL, top_n=2)
        assert frequencies(ranking, (1, 3)).tolist() == [[0.0, 0.5, 0.5]]
        means = {head.address: head.spatial_entropy for head in ranking.heads}
        assert means == {(0, 0): None, (0, 1): 1.0, (0, 2): 2.0}

    def test_bottom_row_filter(self):
        sums = np.full((2, 1, 2), 0.5)
        entropies = np.array([[[0.0, 1.0]], [[0.0, 1.0]]])
        flags = np.array([[[True, False]], [[False, False]]])
        options = CriteriaOptions(exclude_layers=0, tau=0.0, bottom_row_filter=True)
        for held in (flags, flags.astype(np.uint8)):
            ranking = rank_heads(sums, entropies, options=options, top_n=1, bottom_row=held)
            assert frequencies(ranking, (1, 2)).tolist() == [[0.5, 0.5]]
        unfiltered = rank_heads(sums, entropies, options=ALL, top_n=1, bottom_row=flags)
        assert frequencies(unfiltered, (1, 2)).tolist() == [[1.0, 0.0]]
        with pytest.raises(ValueError, match="bottom_row_filter needs"):
            rank_heads(sums, entropies, options=options)


class TestOrder:
    def test_kept_then_frequency_then_sum_then_layer_then_head(self):
        sums = np.array([[[0.5, 0.5, 0.9], [0.5, 0.6, 0.1]]])
        entropies = np.array([[[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]])
        ranking = rank_heads(
            sums, entropies, options=CriteriaOptions(exclude_layers=0, tau=0.2), top_n=1, num_samples=1
        )
        order = [(head.layer, head.head) for head in ranking.heads]
        # L0H2 is selected; the rest by sum; L1H2 has the lowest entropy but is not kept.
        assert order == [(0, 2), (1, 1), (0, 0), (0, 1), (1, 0), (1, 2)]

    def test_equal_counts_over_trials_are_a_tie(self):
        # In floats 0.2 + 0.2 + 0.7 is more than 0.2 + 0.7 + 0.2; in counts it is not.
        trials = ranking_module._Trials(
            sizes=np.full(3, 10),
            counts=np.array([[[2, 2]], [[2, 7]], [[7, 2]]], dtype=float),
            sums=np.array([[[0.3, 0.6]]] * 3),
            tau=np.zeros(3),
            entropy=np.zeros((3, 1, 2)),
            finite=np.zeros((3, 1, 2)),
            kept=np.ones((3, 1, 2), bool),
        )
        _, heads = ranking_module._ranked_heads(trials, trials, ALL)
        assert [head.head for head in heads] == [1, 0]
        assert heads[0].selection_frequency == heads[1].selection_frequency

    def test_kept_heads_come_first_whatever_their_sum(self):
        sums = np.array([[[0.9, 0.0], [0.1, 0.2]]])  # the last head is at the elbow: only it is kept
        options = CriteriaOptions(elbow="index", exclude_layers=0)
        ranking = rank_heads(sums, np.full((1, 2, 2), INF), options=options)
        assert [head.address for head in ranking.heads] == [(1, 1), (0, 0), (1, 0), (0, 1)]
        assert [head.kept for head in ranking.heads] == [True, False, False, False]

    def test_the_head_that_sets_tau_is_kept(self):
        rng = np.random.default_rng(2)
        sums = np.zeros((300, 3, 4))
        sums[:, 2] = np.array([0.0, 0.1, 0.2, 1.0]) * rng.uniform(0.9, 1.1, (300, 1))
        entropies = np.zeros((300, 3, 4))
        for trials in (1, 3, 7, 11, 30):
            ranking = rank_heads(sums, entropies, num_samples=50, num_trials=trials)
            assert {head.address for head in ranking.kept} == {(2, 2), (2, 3)}
            assert min(head.attention_sum for head in ranking.kept) == ranking.tau


class TestArguments:
    def test_equal_seeds_give_equal_rankings(self):
        sums, entropies = random_pool(samples=50)
        first, again, other = (rank_heads(sums, entropies, num_samples=20, seed=seed) for seed in (1, 1, 2))
        assert first == again
        assert first != other

    @pytest.mark.parametrize("num_samples", [17, 1000])
    def test_chunks_and_memory_maps_change_nothing(self, tmp_path, monkeypatch, num_samples):
        sums, entropies = random_pool(samples=50)
        whole = rank_heads(sums, entropies, num_samples=num_samples)
        for name, values in (("sums", sums), ("entropies", entropies)):
            np.save(tmp_path / f"{name}.npy", values)
        mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("sums", "entropies")]
        monkeypatch.setattr(ranking_module, "CHUNK_VALUES", 3 * 20 + 1)
        chunked = rank_heads(*mapped, num_samples=num_samples)
        assert frequencies(chunked, (5, 4)).tolist() == frequencies(whole, (5, 4)).tolist()
        assert chunked.to_json() == whole.to_json()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"top_n": 0}, "top_n"),
            ({"num_trials": 0}, "num_trials"),
            ({"num_samples": 0}, "num_samples"),
            ({"entropies": np.zeros((2, 3, 3))}, "sample, layer, head"),
            ({"sums": np.zeros((0, 3, 2)), "entropies": np.zeros((0, 3, 2))}, "sample, layer, head"),
            ({"sums": np.full((2, 3, 2), np.nan)}, "finite"),
            ({"options": CriteriaOptions(exclude_layers=3)}, "exclude_layers=3"),
        ],
    )
    def test_unusable_arguments_are_refused(self, change, message):
        arguments = {"sums": np.ones((2, 3, 2)), "entropies": np.zeros((2, 3, 2)), **change}
        with pytest.raises(ValueError, match=message):
            rank_heads(arguments.pop("sums"), arguments.pop("entropies"), **arguments)


class TestRecord:
    @pytest.fixture
    def ranking(self):
        sums, entropies = random_pool()
        entropies[:, 2, 0] = INF
        return rank_heads(sums, entropies, model="llava-hf/llava-1.5-7b-hf", num_samples=20)

    def test_json_has_the_fields_that_scripts_rely_on(self, ranking):
        data = ranking.to_json()
        assert {"version", "model", "num_samples", "num_trials", "tau", "top_n", "exclude_layers"} < set(data)
        assert (data["version"], data["num_samples"], data["num_trials"], data["top_n"]) == (1, 20, 5, 10)
        assert data["exclude_layers"] == 2
        assert set(data["heads"][0]) == {
            "layer", "head", "selection_frequency", "selection_frequency_std", "attention_sum",
            "spatial_entropy",
        }  # fmt: skip
        assert len(data["heads"]) == len(ranking.kept) < len(ranking.heads)
        assert data["criteria"]["entropy"] == "area"
        assert data["tau"] == round(ranking.tau, 6)

    def test_round_trip_through_text(self, ranking):
        text = json.dumps(ranking.to_json(), allow_nan=False)
        again = HeadRanking.from_json(json.loads(text))
        assert json.dumps(again.to_json()) == text
        assert again.top(2) == ranking.top(2)
        assert again.options == ranking.options
        assert again.model == ranking.model

    def test_options_survive(self):
        options = replace(PUBLISHED, bottom_row_filter=True)
        ranking = rank_heads(*random_pool(), options=options, bottom_row=np.zeros((40, 5, 4), bool))
        again = HeadRanking.from_json(json.loads(json.dumps(ranking.to_json())))
        assert again.options == options
        assert again.tau is None

    @pytest.mark.parametrize(("num_samples", "spread"), [(39, "draws"), (40, "bootstrap"), (1000, "bootstrap")])
    def test_the_spread_is_recorded(self, num_samples, spread):
        ranking = rank_heads(*random_pool(samples=40), num_samples=num_samples)
        data = ranking.to_json()
        assert (ranking.spread, data["spread"]) == (spread, spread)
        assert list(data)[3:5] == ["num_trials", "spread"]
        assert HeadRanking.from_json(data).spread == spread
        del data["spread"]  # files written before it was recorded
        assert HeadRanking.from_json(data).spread == "draws"

    def test_a_file_without_criteria_is_the_papers(self, ranking):
        data = ranking.to_json()
        del data["criteria"]
        assert HeadRanking.from_json(data).options == CriteriaOptions()

    def test_csv_has_every_head(self, ranking):
        rows = list(ranking.csv_rows())
        assert len(rows) == 20
        assert all(len(row) == len(HeadRanking.CSV_HEADER) for row in rows)
        assert [row[0] for row in rows] == list(range(1, 21))
        silent = next(row for row in rows if row[1:3] == (2, 0))
        assert silent[6] == ""
        assert sum(row[7] for row in rows) == len(ranking.kept)

    def test_top_takes_kept_heads_only(self):
        heads = tuple(RankedHead(0, index, 0.5, 0.0, 0.3, None, kept=index < 2) for index in range(4))
        ranking = HeadRanking(heads, 0.2, 10, 5, 5)
        assert ranking.top(2) == [Head(0, 0), Head(0, 1)]
        with pytest.raises(ValueError, match="only 2 heads"):
            ranking.top(3)
        with pytest.raises(ValueError, match="at least 1"):
            ranking.top(0)


GOOD = HeadRanking(
    heads=(RankedHead(14, 24, 0.571, 0.01, 0.4, 0.2), RankedHead(14, 26, 0.406, 0.02, 0.3, None)),
    tau=0.24,
    top_n=10,
    num_samples=1000,
    num_trials=5,
).to_json()

KEYS = sorted(set(GOOD) - {"criteria", "spread", "pictures"})
HEAD_KEYS = sorted(GOOD["heads"][0])
WRONG = {
    "version": [2, True],
    "model": [7, None],
    "num_samples": [0, 1.0],
    "num_trials": [True],
    "top_n": ["10", -1],
    "exclude_layers": [-1, False],
    "tau": [math.nan, INF, "0.2", 10**400],
    "heads": [{}, [3], [GOOD["heads"][0]] * 2],
    "spread": ["guess", None, ["draws"]],
    "criteria": [[], {"entropy": "volume"}, {"threshold": math.nan}, {"__class__": 1}, {"exclude_layers": 3}],
    "found_with": [[], {"weights": 7}],
}
WRONG_IN_HEAD = {
    "layer": [-1, True, 3.0],
    "head": [None],
    "selection_frequency": [1.5, -0.1, math.nan, None],
    "selection_frequency_std": [INF],
    "attention_sum": ["much", True],
    "spatial_entropy": [math.nan, -1.0],
}


class TestHostileJson:
    def test_a_valid_file_is_read(self):
        assert HeadRanking.from_json(GOOD).top(2) == [Head(14, 24), Head(14, 26)]

    @pytest.mark.parametrize("data", [None, [], "heads", 3, {}, {"version": 1}])
    def test_other_json_is_refused(self, data):
        with pytest.raises(UsageError, match=r"heads\.json"):
            HeadRanking.from_json(data)

    @pytest.mark.parametrize("key", KEYS)
    def test_a_missing_key_is_named(self, key):
        with pytest.raises(UsageError, match=f"'{key}' is missing"):
            HeadRanking.from_json({name: value for name, value in GOOD.items() if name != key})

    @pytest.mark.parametrize("key", HEAD_KEYS)
    def test_a_missing_key_of_a_head_is_named_with_its_index(self, key):
        broken = {name: value for name, value in GOOD["heads"][1].items() if name != key}
        with pytest.raises(UsageError, match=rf"heads\[1\]: '{key}' is missing"):
            HeadRanking.from_json({**GOOD, "heads": [GOOD["heads"][0], broken]})

    @pytest.mark.parametrize(("key", "value"), [(key, value) for key in WRONG for value in WRONG[key]])
    def test_wrong_values_are_refused(self, key, value):
        with pytest.raises(UsageError, match=r"heads\.json"):
            HeadRanking.from_json({**GOOD, key: value})

    @pytest.mark.parametrize(("key", "value"), [(key, value) for key in WRONG_IN_HEAD for value in WRONG_IN_HEAD[key]])
    def test_wrong_values_of_a_head_are_refused_by_name(self, key, value):
        with pytest.raises(UsageError, match=rf"heads\[0\]: '{key}' must be"):
            HeadRanking.from_json({**GOOD, "heads": [{**GOOD["heads"][0], key: value}]})

    json_values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
        max_leaves=8,
    )

    @given(st.sampled_from([*KEYS, "criteria", "spread", "pictures"]), st.sampled_from(HEAD_KEYS), json_values)
    def test_anything_is_read_or_refused(self, key, head_key, value):
        """In a field of the file, and in one of a head."""
        for change in ({key: value}, {"heads": [{**GOOD["heads"][0], head_key: value}]}):
            with suppress(UsageError):
                json.dumps(HeadRanking.from_json({**GOOD, **change}).to_json(), allow_nan=False)


def test_pictures_survive_json():
    ranking = HeadRanking.from_json({**GOOD, "pictures": ["coco:7", "file:0a"]})
    assert ranking.pictures == ("coco:7", "file:0a")
    assert HeadRanking.from_json(ranking.to_json()) == ranking
    assert HeadRanking.from_json({k: v for k, v in GOOD.items() if k != "pictures"}).pictures == ()


FOUND = {
    "conv_mode": "referseg", "system": "Look.", "query_token": "last", "weights": "1a", "criteria": "paper",
}  # fmt: skip


def test_found_with_survives_json():
    """Unknown keys are ignored; files of earlier versions have none."""
    ranking = HeadRanking.from_json({**GOOD, "found_with": {**FOUND, "heads_by": None, "colour": [1]}})
    assert ranking.found_with == FOUND
    assert HeadRanking.from_json(ranking.to_json()) == ranking
    assert HeadRanking.from_json(GOOD).found_with is None
    assert "found_with" not in HeadRanking.from_json(GOOD).to_json()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"criteria": "published", "library": "another"}, None),
        ({"conv_mode": "chat", "system": None}, "found with conv_mode=referseg (here: chat)"),
        ({"system": "Search."}, "found with another system sentence"),
        (
            {"query_token": "expression_end", "weights": "2b"},
            "found with query_token=last (here: expression_end), weights=1a (here: 2b)",
        ),
    ],
)
def test_different_conditions_are_described(changes, said):
    assert describe_difference(FOUND, {**FOUND, **changes}) == said
    assert describe_difference({}, FOUND) is None
    hostile = {"conv_mode": "a\nb" * 1000}
    assert describe_difference(hostile, FOUND) == f"found with conv_mode={('a b' * 20)[:40]} (here: referseg)"


def test_criteria_are_named_by_their_preset():
    options = [CriteriaOptions(), PUBLISHED, CriteriaOptions(tau=0.5)]
    assert [preset_of(one) for one in options] == ["paper", "published", None]
