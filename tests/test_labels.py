"""Heads from labels: scores, means, ranking, shrinkage and curve by hand and in plain loops; the stage."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_models import tiny
from front import Calls, Front, one_line
from numpy.typing import NDArray
from PIL import Image

import localization_heads as lh
from localization_heads.attention import AttentionMaps
from localization_heads.errors import UsageError
from localization_heads.evaluation.head_iou import label_scores
from localization_heads.evaluation.scores import Truth
from localization_heads.heads.head import Head
from localization_heads.heads.labels import (
    LabelRecipe,
    mass_in_truth,
    mass_on_patches,
    mean_scores,
    quality_curve,
    rank_by_labels,
    rank_by_score,
    shrink_scores,
)
from localization_heads.heads.record import HeadRanking, RankedHead
from localization_heads.lvlm import attention_model
from localization_heads.lvlm.answers.box_formats import FORMATS
from localization_heads.lvlm.checkpoints import loading
from localization_heads.lvlm.native_box import with_box_span
from localization_heads.options.groups import CriteriaOptions
from localization_heads.stages import labels as stage

SIZE = (60, 40)


def some_maps(seed: int = 0, image_box: Any = (-10.0, 0.0, 70.0, 40.0)) -> AttentionMaps:
    """Three layers of two heads over 4 x 8 cells of 10 pixels; the outer columns are padding."""
    attention = np.random.default_rng(seed).random((3, 2, 4, 8)).astype(np.float32)
    return AttentionMaps(attention / 32, image_box, SIZE)


def ranking(frequencies: dict[tuple[int, int], float], exclude: int = 1) -> HeadRanking:
    """A label-free ranking by these frequencies."""
    heads = [RankedHead(*head, frequency, 0.0, 0.5, None) for head, frequency in frequencies.items()]
    heads.sort(key=lambda head: -head.selection_frequency)
    return HeadRanking(tuple(heads), 0.1, 3, 9, 5, CriteriaOptions(exclude_layers=exclude), "m")


LABEL_FREE = ranking({(0, 0): 0.9, (0, 1): 0.9, (1, 0): 0.8, (1, 1): 0.4, (2, 0): 0.2, (2, 1): 0.0})


def pixel_by_pixel(maps: AttentionMaps, inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Each cell's attention is spread evenly over its pixels; those inside are summed."""
    x0, y0, x1, y1 = maps.image_box
    h, w = maps.grid
    found = np.zeros(maps.attention.shape[:2])
    across, down = (x1 - x0) / w, (y1 - y0) / h
    for y, x in np.argwhere(inside):
        row, column = int((y + 0.5 - y0) // down), int((x + 0.5 - x0) // across)
        found += maps.attention[:, :, row, column] / (across * down)
    return found


@pytest.mark.parametrize("box", [(3, 7, 24, 31), (-20, -5, 11, 90), (59, 39, 60, 40), (0, 0, 60, 40)])
def test_mass_agrees_with_a_sum_over_pixels(box: tuple[int, int, int, int]) -> None:
    maps = some_maps()
    inside = np.zeros((SIZE[1], SIZE[0]), bool)
    inside[max(box[1], 0) : box[3], max(box[0], 0) : box[2]] = True
    expected = pixel_by_pixel(maps, inside)
    assert mass_in_truth(maps, box) == pytest.approx(expected, rel=1e-5)
    ragged = inside & (np.indices(inside.shape).sum(axis=0) % 3 > 0)
    assert mass_in_truth(maps, box, ragged) == pytest.approx(pixel_by_pixel(maps, ragged), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("box", [(3, 7, 24, 31), (-20, -5, 11, 90), (10, 10, 20, 20), (59.5, 39.5, 60, 40)])
def test_mass_on_patches_counts_touched_patches_as_a_whole(box: tuple[float, ...]) -> None:
    """Cells of 10 pixels whose corner is (10 j - 10, 10 i): touched if the overlap has an area."""
    maps = some_maps()
    expected = np.zeros((3, 2))
    for i in range(4):
        for j in range(8):
            wide = min(box[2], 60, 10 * j) - max(box[0], 0, 10 * j - 10)
            high = min(box[3], 40, 10 * i + 10) - max(box[1], 0, 10 * i)
            if wide > 0 and high > 0:
                expected += maps.attention[:, :, i, j]
    assert mass_on_patches(maps, box) == pytest.approx(expected, rel=1e-5)  # type: ignore[arg-type]


def test_scores_by_hand() -> None:
    """One row of four cells of one pixel; the object is the middle two."""
    attention = np.zeros((1, 3, 1, 4), np.float32)
    attention[0, :, 0] = [[0.0, 0.5, 0.25, 0.0], [0.5, 0.0, 0.25, 0.0], [0.1, 0.1, 0.1, 0.1]]
    maps = AttentionMaps(attention, (0, 0, 4, 1), (4, 1))
    scores = label_scores(maps, Truth((1, 0, 3, 1)))
    assert scores["mass"][0] == pytest.approx([0.75, 0.25, 0.2])
    assert scores["pointing"][0].tolist() == [1.0, 0.0, 0.0]  # of equal cells, the first is the strongest
    # Above their means (.19, .19; the even map nowhere): cells 1, 2; cells 0, 2; none.
    assert scores["iou"][0] == pytest.approx([1.0, 1 / 3, 0.0])
    masked = label_scores(maps, Truth((1, 0, 3, 1), np.array([[False, True, False, False]])))
    assert masked["mass"][0] == pytest.approx([0.5, 0.0, 0.1]) and masked["iou"][0, 0] == pytest.approx(0.5)


def test_means_in_chunks_are_plain_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localization_heads.heads.labels.CHUNK_VALUES", 12)  # two samples
    rng = np.random.default_rng(1)
    scores, weights = rng.random((7, 3, 2)).astype(np.float32), rng.integers(1, 4, (4, 7))
    for row, found in zip(weights, mean_scores(scores, weights), strict=True):
        drawn = [sample for sample, times in zip(scores, row, strict=True) for _ in range(times)]
        assert found == pytest.approx(np.mean(drawn, axis=0), rel=1e-5)


def test_ties_keep_the_label_free_order_and_excluded_layers_are_left_out() -> None:
    scores = np.array([[9.0, 9.0], [0.5, 0.5], [0.7, 0.5]])
    assert rank_by_score(scores, LABEL_FREE) == [(2, 0), (1, 0), (1, 1), (2, 1)]


def test_shrinkage_by_hand() -> None:
    """n = 5, n0 = 15: a quarter of the labels, three quarters of the label-free ranking."""
    scores = np.array([[9.0, 9.0], [0.0, 0.2], [0.1, 0.4]])
    assert shrink_scores(scores, LABEL_FREE, 5, "none", 15) is scores
    places = shrink_scores(scores, LABEL_FREE, 5, "ranks", 15)
    # by label: 2-1, 1-1, 2-0, 1-0; label-free: 1-0, 1-1, 2-0, 2-1; places 1, 2/3, 1/3, 0
    assert places == pytest.approx(np.array([[0, 0], [0.75, 2 / 3], [1 / 3, 0.25]]))
    blended = shrink_scores(scores, LABEL_FREE, 5, "scores", 15)
    # the highest frequency, .9, is that of an excluded layer
    frequencies = np.array([[0.8, 0.4], [0.2, 0.0]]) / 0.9
    assert blended[1:] == pytest.approx(0.25 * scores[1:] / 9 + 0.75 * frequencies)


def test_many_labels_outweigh_the_label_free_ranking() -> None:
    scores = np.array([[0.0, 0.0], [0.0, 0.2], [0.1, 0.4]])
    few, many = (rank_by_score(shrink_scores(scores, LABEL_FREE, n, "ranks", 10), LABEL_FREE)[0] for n in (1, 1000))
    assert (few, many) == ((1, 0), (2, 1))


def sampled(num: int = 40) -> NDArray[np.float64]:
    """Scores in which 2-1 is best on average, with noise."""
    noise = np.random.default_rng(3).normal(0, 0.1, (num, 3, 2))
    return np.array([[9, 9], [0.1, 0.2], [0.3, 0.5]]) + noise


def test_ranking_of_the_first_draw_and_its_spread() -> None:
    scores = sampled()
    recipe = LabelRecipe("mass", num_labels=5, num_trials=4, seed=7)
    found = rank_by_labels(scores, LABEL_FREE, recipe)
    rng = np.random.default_rng(7)
    means = [scores[np.sort(rng.choice(40, 5, replace=False))].mean(axis=0) for _ in range(4)]
    assert [head.address for head in found.kept] == rank_by_score(means[0], LABEL_FREE)
    for head in found.kept:
        assert head.score == pytest.approx(means[0][head.address])
        assert head.score_std == pytest.approx(np.std([mean[head.address] for mean in means]))
    assert (found.num_samples, found.spread, found.num_trials) == (5, "draws", 4)
    assert [head.address for head in found.heads if not head.kept] == [(0, 0), (0, 1)]


def test_the_spread_of_all_labels_is_from_a_bootstrap() -> None:
    scores = sampled()
    found = rank_by_labels(scores, LABEL_FREE, LabelRecipe("mass", num_trials=3))
    assert found.top(1) == [(2, 1)] and found.spread == "bootstrap" and found.num_samples == 40
    assert found.kept[0].score == pytest.approx(scores[:, 2, 1].mean())
    assert all((head.score_std or 0) > 0 for head in found.kept)


def test_ranking_survives_json() -> None:
    found = rank_by_labels(sampled(), LABEL_FREE, LabelRecipe("mass"))
    again = HeadRanking.from_json(json.loads(json.dumps(found.to_json())))
    assert again.kept[0].score == pytest.approx(found.kept[0].score, abs=1e-6)
    assert HeadRanking.from_json(LABEL_FREE.to_json()).kept[0].score is None


@pytest.mark.parametrize(("pool", "wanted"), [(0, None), (4, 5)])
def test_too_few_labels(pool: int, wanted: int | None) -> None:
    with pytest.raises(ValueError, match=r"labelled sample|num_labels=5: only 4"):
        rank_by_labels(np.zeros((pool, 3, 2)), LABEL_FREE, LabelRecipe("mass", num_labels=wanted))


def test_curve_is_evaluated_on_images_not_drawn() -> None:
    scores, quality = sampled(), sampled()[::-1].copy()
    images = [f"image {i // 2}" for i in range(40)]
    recipe = LabelRecipe("mass", num_trials=3, seed=5, k=2)
    curve = quality_curve(scores, quality, LABEL_FREE, recipe, images)
    assert curve.counts == [1, 2, 5, 10, 20]
    for count, found in zip(curve.counts, curve.quality, strict=True):
        rng = np.random.default_rng(5 + count)
        expected = []
        for _ in range(3):
            drawn = rng.choice(40, count, replace=False)
            seen = {images[i] for i in drawn}
            left = [i for i in range(40) if images[i] not in seen]
            first = rank_by_score(scores[np.sort(drawn)].mean(axis=0), LABEL_FREE)[:2]
            expected.append(np.mean([quality[left, layer, head].mean() for layer, head in first]))
        assert found == pytest.approx(expected)
    means = quality.mean(axis=0)
    assert curve.label_free == pytest.approx(means[1].mean())  # 1-0 and 1-1
    assert curve.all_heads == pytest.approx(means[1:].mean())
    assert curve.all_labels == pytest.approx(means[2].mean())
    assert all(0 <= share <= 1 for share in curve.shared)


# --------------------------------------------------------------------------------------------- the generated box


@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", "glm4v", "internvl", "gemma3", "llava_next", "idefics3", "mllama", "qwen3_vl"]
)
def test_the_reader_asks_for_a_box_and_reads_its_numbers(
    family: str, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random models write none: their second and fourth token are taken for the numbers, whose maps are averaged."""
    lvlm = tiny(family)
    monkeypatch.setattr(lvlm, "spec", replace(lvlm.spec, native_box="paligemma"))
    monkeypatch.setattr(lvlm.model.generation_config, "eos_token_id", None)
    reader = with_box_span(lvlm)
    assert (lvlm.query_token, lvlm.answer_span) == ("last", None)
    assert reader.prompt("the car") == lvlm.box_prompt(FORMATS["paligemma"], "the car")
    assert (reader.asked["conv_mode"], reader.asked["query_token"]) == ("native_box", "answer_span")

    def read(*places: int) -> NDArray[np.float32]:
        monkeypatch.setattr(attention_model, "tokens_of_match", lambda *_: list(places))
        return reader.attend(image, "the car").attention

    np.testing.assert_allclose(read(1, 3), (read(1) + read(3)) / 2, rtol=0, atol=1e-6)


def test_models_without_a_box_are_refused(lvlm: Any, image: Image.Image) -> None:
    with pytest.raises(UsageError, match=r"heads_by=vrh: .* is not known to write boxes itself; rank by mass"):
        lh.find_heads(lvlm, [lh.Sample(image, "the car", bbox=(0, 0, 9, 9))], by="vrh")


# ------------------------------------------------------------------------------------------------------ in Python


def test_find_heads_by_labels_in_python(lvlm: Any, image: Image.Image) -> None:
    boxes = [(0, 0, 60, 90), (80, 10, 160, 80), (30, 30, 90, 60), (5, 5, 50, 50)]
    samples = [lh.Sample(image, f"the {word}", bbox=box) for word, box in zip("abcd", boxes, strict=True)]
    found = lh.find_heads(lvlm, samples, by="mass", num_labels=3, top_n=3)
    scores = [mass_in_truth(lvlm.attend(image, s.expression), s.bbox) for s in samples]
    drawn = np.sort(np.random.default_rng(42).choice(4, 3, replace=False))
    expected = np.mean([scores[i] for i in drawn], axis=0)
    for head in found.kept:
        assert head.score == pytest.approx(expected[head.address], abs=1e-6)
    assert found.kept[0].address == max(
        (Head(*place) for place in np.ndindex(expected.shape) if place[0] > 1), key=lambda h: expected[h]
    )
    assert all(one.score >= other.score for one, other in pairwise(found.kept))  # type: ignore[operator]
    assert found.found_with is not None
    assert (found.found_with["heads_by"], found.found_with["num_labels"]) == ("mass", "3")
    assert "criteria" not in found.found_with and found.found_with["weights"] == lvlm.fingerprint
    with pytest.raises(UsageError, match="neither bbox nor mask"):
        lh.find_heads(lvlm, [lh.Sample(image, "the car")], by="iou")
    for name, allowed in (("by", "criteria, "), ("shrink", "none, ")):
        with pytest.raises(UsageError, match=f"^{name}='label': choose one of {allowed}"):
            lh.find_heads(lvlm, samples, **{name: "label"})


# ------------------------------------------------------------------------------------------------------ the stage

SCENES = ("stage=find", "data=scenes", "scenes.count=8", "scenes.size=96", "report=false", "num_trials=2")


def test_the_stage_resumes_and_writes(front: Front, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the ranking by other labels needs no model any more."""
    first = front.finder(*SCENES, "heads_by=mass", "num_labels=4", "shrink=ranks")
    assert first.status == 0 and "by mass, 4 labels" in first.out and "without shrinkage" in first.out
    folder = Path("outputs/localization_heads/tiny")
    heads, labels = (json.loads((folder / f"{name}.json").read_text()) for name in ("heads", "labels"))
    assert (heads["found_with"]["heads_by"], heads["found_with"]["num_labels"]) == ("mass", "4")
    assert heads["found_with"]["shrink"] == "ranks, n0=10" and heads["heads"][0]["score"] > 0
    assert labels["heads"] == [[head["layer"], head["head"]] for head in heads["heads"][:3]]
    assert labels["curve"]["counts"] == [1, 2] and labels["num_entries"] == 8
    assert (folder / "labels.png").stat().st_size > 1000
    seen = len(calls)
    iou = front.finder(*SCENES, "heads_by=iou")  # other labels of the same maps: nothing is asked again
    assert iou.status == 0 and len(calls) == seen
    assert json.loads((folder / "heads.json").read_text())["found_with"]["heads_by"] == "iou"
    written = [(folder / name).read_bytes() for name in ("heads.json", "labels.json")]
    assert front.finder(*SCENES, "heads_by=pointing").status == 0
    rank = ("stage=rank", *SCENES[1:])
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_model", None)
        again = front.finder(*rank, "heads_by=iou")
        assert again.status == 0 and "by iou, 8 labels" in again.out
        assert [(folder / name).read_bytes() for name in ("heads.json", "labels.json")] == written
        for words, status, said in (
            (("heads_by=vrh", "model.native_box=paligemma"), 2, "no such scores of these options in"),
            (("heads_by=iou", "scenes.count=9"), 1, "of the 9 entries have no scores on disk"),
            (("heads_by=iou", "attention_files=x"), 2, "heads_by=iou: attention files hold no truth"),
        ):
            refused = front.finder(*rank, *words)
            assert refused.status == status and said in one_line(refused.err)


def test_shrinkage_towards_sensitive_heads(front: Front) -> None:
    """The label-free ranking is that of criteria=robust; `rank` reads its statistics."""
    robust = (*SCENES, "criteria=robust", "criteria.mirrored=2")
    assert front.finder(*robust).status == 0
    free = json.loads((front.out / "heads.json").read_text())["heads"]
    words = ("heads_by=mass", "num_labels=2", "shrink=scores", "shrink_n0=6")
    result = front.finder(*robust, *words)
    assert result.status == 0, result.err
    heads, labels = (json.loads((front.out / f"{name}.json").read_text()) for name in ("heads", "labels"))
    assert labels["label_free_heads"] == [[head["layer"], head["head"]] for head in free[:3]]
    scores = {(head["layer"], head["head"]): max(0.0, head["consistency"] - 1 + head["sensitivity"]) for head in free}
    best = max(head["score"] for head in heads["heads"])
    blended = [
        0.25 * head["score"] / best + 0.75 * scores.get((head["layer"], head["head"]), 0.0) / max(scores.values())
        for head in heads["heads"]
        if (head["layer"], head["head"]) in scores
    ]
    assert blended == sorted(blended, reverse=True) and len(blended) == len(free)
    written = (front.out / "heads.json").read_bytes()
    assert front.finder("stage=rank", *robust[1:], *words).status == 0
    assert (front.out / "heads.json").read_bytes() == written


def test_a_killed_stage_resumes(front: Front, calls: Calls) -> None:
    whole = front.finder(*SCENES, "heads_by=pointing", "batch_size=2", "output_dir=whole")
    asked = len(calls)
    calls.fail_at = asked + 2
    front.finder(*SCENES, "heads_by=pointing", "batch_size=2", "output_dir=parts")
    calls.fail_at = None
    resumed = front.finder(*SCENES, "heads_by=pointing", "batch_size=2", "output_dir=parts")
    assert resumed.status == whole.status == 0
    assert len(calls) == 2 * asked
    for name in ("labels.json", "heads.csv"):
        assert Path(f"whole/tiny/{name}").read_bytes() == Path(f"parts/tiny/{name}").read_bytes()


def test_another_truth_is_scored_again(front: Front, image: Image.Image) -> None:
    image.save("one.png")
    scores = []
    for box in ([0, 0, 160, 90], [0, 0, 80, 90]):
        line = {"id": "one", "prompt": "the car", "image_path": "one.png", "bbox": box}
        Path("data.jsonl").write_text(json.dumps(line) + "\n")
        assert front.finder("stage=find", "data_file=data.jsonl", "heads_by=mass", "report=false").status == 0
        scores.append(front.json("heads.json")["heads"][0]["score"])
    assert scores[1] < scores[0]


def test_wrong_use_is_one_line(front: Front, image: Image.Image) -> None:
    image.save("one.png")
    line = {"id": "one", "prompt": "the car", "image_path": "one.png"}
    Path("data.jsonl").write_text(json.dumps(line) + "\n")
    found = front.finder("stage=find", "data_file=data.jsonl", "heads_by=mass")
    assert found.status == 2
    assert "heads_by=mass (heads_by=criteria needs no truth) needs entries with bbox or mask" in found.err
    many = front.finder(*SCENES, "heads_by=mass", "num_labels=9")
    assert many.status == 2 and "num_labels=9: there are only 8 entries with a true box or mask" in many.err
    for words, said in (
        (("heads_by=criteria", "num_labels=3"), "num_labels=: heads_by=criteria takes no labels"),
        (("heads_by=vrh",), "is not known to write boxes itself; rank by mass, iou or pointing"),
        (("heads_by=size",), "heads_by=size"),
        (
            ("stage=ground", "heads_by=mass"),
            "heads_by=: stage=ground does not read it; write stage=find or rank",
        ),
    ):
        refused = front.finder(*SCENES, *words)
        assert refused.status == 2 and said in refused.err, refused.err


def test_the_stage_by_the_generated_box(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model writes no box; patched to write one, its tokens' maps are scored."""
    words = (*SCENES, "heads_by=vrh", "model.native_box=paligemma")
    silent = front.finder(*words)
    assert silent.status == 1 and "which holds no box" in silent.out + silent.err

    def pretending(lvlm: Any) -> Any:
        reader = with_box_span(lvlm)
        reader.attend = lvlm.attend
        return reader

    monkeypatch.setattr(stage, "with_box_span", pretending)
    assert front.finder(*words).status == 0
    heads = front.json("heads.json")
    found = heads["found_with"]
    assert [found[name] for name in ("heads_by", "conv_mode", "query_token")] == [
        "vrh",
        "native_box",
        "answer_span",
    ]
    assert front.json("labels.json")["quality"].startswith("mean attention of the generated")
    noted = front.finder(*SCENES[1:], "stage=ground", f"heads={front.out}/heads.json", "segmenter=none")
    assert "found with conv_mode=native_box (here: referseg), query_token=answer_span (here: last)" in noted.err


def test_heads_are_not_evaluated_on_their_labels(front: Front) -> None:
    front.finder(*SCENES, "heads_by=mass")
    heads = "heads=outputs/localization_heads/tiny/heads.json"
    refused = front.finder(*SCENES, "stage=evaluate", heads, "controls=false")
    assert refused.status == 2 and "show images that" in refused.err and "allow_leakage=true" in refused.err
