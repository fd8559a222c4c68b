"""Training: the fast forward pass equals the model's, the model learns, and runs resume exactly."""

import json
from dataclasses import asdict, replace
from random import Random

import numpy as np
import pytest
import torch

from localization_heads.heads.record import HeadRanking, RankedHead
from localization_heads.options.groups import CriteriaOptions
from localization_heads.scenes import artwork
from localization_heads.scenes.artwork import NAMES
from localization_heads.scenes.scene import render_scene
from training import card
from training.ablation import shrink, spread_cells
from training.batches import BatchMaker, concatenate_batches, normalise
from training.evaluate import comparison_samples, correlation
from training.export import EMBEDDED, export
from training.export import main as export_main
from training.language import (
    IDS,
    NUMBERS,
    _where_turn,
    build_tokenizer,
    encode,
    presence_turn,
    question_turn,
    scene_turns,
    vocabulary,
)
from training.loaders import prefetch_batches
from training.measure import _positions
from training.model import PREFIX, FastForward, attend, build_model
from training.recipe import SPRITES, Canvas, ModelRecipe, Recipe, Stage
from training.talk import KINDS, list_scores
from training.trainer import LOOK_EPS, Trainer, load_run, mean_weights, start_from

SMALL = ModelRecipe(
    image_size=64, width=64, vision_layers=1, vision_mlp=128, text_layers=3, text_heads=4, head_dim=16, text_mlp=128
)  # fmt: skip
RECIPE = Recipe(
    steps=400,
    model=SMALL,
    canvases=(Canvas(6, (1,), 24, 0), Canvas(6, (1,), 16, 40)),
    stages=(  # easy images, to keep the test short
        Stage(0, (1.0, 0.0, 0.0), (), 0.0, 0.0),
        Stage(100, (0.2, 0.8, 0.0), (), 0.0, 0.0),
        Stage(200, (0.1, 0.1, 0.8), (), 0.0, 0.0),
    ),
    text_tokens=64,
    query_key_cap=0.18,  # a narrower model has larger weights
    half=False,
    image_keep=0.8,
    bars_share=0.0,
    rates=((0, 0.1), (9, 1.0), (132, 1.0), (249, 0.57), (250, 0.34)),
    look_from=200,
    look_steps=100,
    few_look_costs=((360, 0.3), (380, 0.5)),
)


def one_stage_recipe(*mix, **options):
    """The small recipe with a single stage."""
    return replace(RECIPE, stages=(Stage(0, mix),), **options)


def assert_same_weights(model, other):
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.fixture(scope="module")
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_fast_forward_equals_the_models_forward():
    torch.manual_seed(0)
    model = build_model(SMALL).eval()
    fast = FastForward(model)
    batch = BatchMaker(one_stage_recipe(0.0, 1.0, canvases=(Canvas(8, None, 4),))).make(3)
    with torch.no_grad():
        features = fast.image_features(normalise(batch.pixels), batch.cells)
        states, _ = fast.text_states(features, batch.cells, batch.ids, batch.offsets, batch.groups)
        for row, group in ((0, 0), (1, 2), (2, 3)):
            own = batch.groups[row] == group
            ids = [*PREFIX, *[IDS["<image>"]] * 64, *batch.ids[row][own].tolist()]
            output = model(input_ids=torch.tensor([ids]), pixel_values=normalise(batch.pixels[row : row + 1]))
            expected = output.logits[0, -int(own.sum()) :]
            torch.testing.assert_close(fast.logits(states[row][own]), expected, atol=2e-5, rtol=1e-4)


def test_attention_dropout_affects_image_tokens_only():
    q = torch.randn(2, 3, 4, 8)
    full, halved = attend(q, q, q)[0], attend(q, q, q, keep=torch.full((2, 1, 4, 4), 0.5))[0]
    torch.testing.assert_close(halved, full / 2)
    keep = FastForward(build_model(SMALL), image_dropout=0.3)._image_dropout_factors(q, 5, len(PREFIX) + 5 + 4)
    assert set(keep[..., : len(PREFIX)].unique().tolist()) == {1.0}
    assert set(keep[..., -4:].unique().tolist()) == {1.0}


def test_cells_of_smaller_scenes_are_spread_over_the_grid():
    maker, rng = BatchMaker(Recipe()), Random(0)
    covered = set()
    for _ in range(200):
        cells = maker._cells(Canvas(10, (1,), 1, scene_cells=16), rng).reshape(10, 10)
        rows, columns = cells[:, 0] // 24, cells[0] % 24
        assert (cells == rows[:, None] * 24 + columns).all()
        for line in (rows, columns):
            assert set(np.diff(line).tolist()) == {1, 2}
            assert 13 <= line[-1] - line[0] <= 14
        covered |= {*rows.tolist(), *columns.tolist()}
    assert covered == set(range(24))
    full = maker._cells(Canvas(24, None, 1), rng)
    assert (full == np.arange(24 * 24)).all()


def test_subsampled_image_tokens_keep_their_share_of_attention():
    """With identical keys, the image gets the same attention however many of its tokens are kept."""
    model, groups, shares = build_model(SMALL), torch.zeros(1, 5, dtype=torch.int64), []
    for keep in (1.0, 0.5):
        fast = FastForward(model, image_keep=keep)
        features, cells = fast._subsample_image(torch.randn(1, 64, 8), torch.arange(64)[None])
        number = cells.shape[1]
        assert (number, features.shape[1]) == (64 * keep, 64 * keep)
        assert (cells.diff() > 0).all()
        keys = torch.zeros(1, 1, len(PREFIX) + number + 5, 8)
        weights = attend(keys[:, :, -5:], keys, keys, fast._biases(number, groups)[2])[1]
        shares.append(weights[..., len(PREFIX) : len(PREFIX) + number].sum(-1))
    torch.testing.assert_close(*shares)


def test_shrunk_model_equals_fast_forward_on_spread_cells():
    torch.manual_seed(0)
    model = build_model(SMALL).eval()
    cells = spread_cells(8, 4)
    assert cells[:5].tolist() == [9, 11, 13, 15, 25]
    batch = BatchMaker(one_stage_recipe(0.0, 1.0, canvases=(Canvas(4, (1,), 1, 48, 4),))).make(3)
    with torch.no_grad():
        fast, own = FastForward(model), batch.groups[0] == 0
        features = fast.image_features(normalise(batch.pixels), cells[None])
        states, _ = fast.text_states(features, cells[None], batch.ids, batch.offsets, batch.groups)
        ids = torch.tensor([[*PREFIX, *[IDS["<image>"]] * 16, *batch.ids[0][own].tolist()]])
        output = shrink(model, 4)(
            input_ids=ids,
            pixel_values=normalise(batch.pixels),
            attention_mask=torch.ones_like(ids),
            position_ids=_positions((8, cells), ids.shape[1]),
        )
    expected = output.logits[0, -int(own.sum()) :]
    torch.testing.assert_close(fast.logits(states[0][own]), expected, atol=2e-5, rtol=1e-4)


def test_tokenizer_agrees_with_encode():
    tokenizer, rng = build_tokenizer(), Random(0)
    for seed in range(20):
        turns = scene_turns(render_scene(seed), rng)
        for prompt, answer in (next(turns) for _ in range(10)):
            if "<unk>" not in prompt:
                assert tokenizer(f"{prompt} {answer}")["input_ids"] == [
                    IDS["<s>"],
                    *encode(f"{prompt} {answer}"),
                ]
                assert IDS["<unk>"] not in encode(f"{prompt} {answer}")
    assert tokenizer.tokenize("The dog on the LEFT.") == ["the", "dog", "on", "the", "left", "."]


def blind_baseline(batch_kind):
    """The loss (nats) of predicting token frequencies, and the accuracy of the most common first word."""
    stage = replace(RECIPE.stages[-1], start=0, mix=tuple(float(batch_kind == i) for i in range(3)))
    maker = BatchMaker(replace(RECIPE, stages=(stage,)))
    batches = [maker.make(step) for step in range(20)]
    targets, weights = (torch.cat([getattr(b, name).flatten() for b in batches]) for name in ("targets", "weights"))
    shares = torch.bincount(targets, weights) / weights.sum()
    firsts = torch.bincount(torch.cat([b.targets[b.firsts] for b in batches]))
    return float(-torch.xlogy(shares, shares).sum()), float(firsts.max() / firsts.sum())


def test_small_model_learns(tmp_path, two_threads):
    """It learns facts about words, and answers about images better than a blind baseline."""
    history = []
    trainer = Trainer(RECIPE, tmp_path).train(history.append)
    last = history[-80:]
    text, image = ([p for p in last if p.canvas == cells] for cells in (0, 36))

    def mean(name, steps):
        return sum(getattr(p, name) for p in steps) / len(steps)

    text_baseline, _ = blind_baseline(0)
    image_baseline, best_guess = blind_baseline(2)
    assert mean("loss", text) < 0.6 * text_baseline
    assert mean("loss", image) < 0.65 * image_baseline
    assert mean("first_right", image) > best_guess + 0.03
    assert all(p.square().mean().sqrt() <= 0.1801 for p in trainer.optimiser.capped)


def test_weights_without_gradient_are_not_updated(tmp_path):
    """Muon would orthogonalise their old momentum into a full step."""
    stages = (Stage(0, (0.0, 0.0, 1.0)), Stage(2, (1.0, 0.0, 0.0)), Stage(3, (0.0, 1.0, 0.0)))
    trainer = Trainer(replace(RECIPE, stages=stages), tmp_path).train(until=2)
    layers = [trainer.model.model.vision_tower, trainer.model.model.language_model.layers]
    for unused, step in zip(layers, (3, 4), strict=True):
        before = [p.clone() for p in unused.parameters() if p.ndim == 2]
        trainer.train(until=step)
        after = [p for p in unused.parameters() if p.ndim == 2]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_resumed_run_equals_an_uninterrupted_one(tmp_path, two_threads):
    recipe = replace(RECIPE, steps=6, half=True)
    uninterrupted = Trainer(recipe, tmp_path / "uninterrupted").train()
    Trainer(recipe, tmp_path / "resumed").train(until=3)
    resumed = Trainer(recipe, tmp_path / "resumed")
    assert resumed.step == 3
    resumed.train()
    assert_same_weights(uninterrupted.model, resumed.model)


def test_prefetched_batches_hold_those_of_all_workers(tmp_path, two_threads):
    """As on a GPU, where one process trains on the batches of two workers."""
    recipe = replace(RECIPE, workers=2, steps=3, stages=(Stage(0, (0.0, 0.0, 1.0)),))
    for step, batch in enumerate(prefetch_batches(recipe, range(3), loaders=2)):
        for worker in range(2):
            part = BatchMaker(recipe, worker).make(step)
            rows = slice(16 * worker, 16 * worker + 16)
            for name, value in vars(part).items():
                assert torch.equal(getattr(batch, name)[rows], value), name
    history = []
    Trainer(recipe, tmp_path, loaders=2).train(history.append)
    assert [progress.step for progress in history] == [1, 2, 3]


def test_text_batches_are_concatenated_without_images():
    parts = [BatchMaker(one_stage_recipe(1.0, 0.0, 0.0), worker).make(0) for worker in range(2)]
    batch = concatenate_batches(parts)
    assert batch.pixels is None
    assert batch.ids.shape == (2 * RECIPE.text_rows, RECIPE.text_tokens)


def test_presence_questions_are_answered_correctly():
    counts = {"yes": 0, "no": 0}
    for seed in range(100):
        scene = render_scene(seed)
        prompt, answer = presence_turn(scene, Random(seed))
        expression = prompt.removeprefix("is there ").removesuffix(" ?")
        assert (expression in {e.text for e in scene.expressions}) == (answer == "yes")
        assert IDS["<unk>"] not in encode(prompt)
        counts[answer] += 1
    assert min(counts.values()) > 35


def test_presence_is_the_share_of_presence_questions():
    """With 0, turns are as in earlier runs."""
    scene = render_scene(4)
    default, without = scene_turns(scene, Random(1)), scene_turns(scene, Random(1), presence=0.0)
    assert [next(default) for _ in range(50)] == [next(without) for _ in range(50)]
    turns = scene_turns(scene, Random(1), presence=0.4)
    share = np.mean([next(turns)[0].startswith("is there ") for _ in range(400)])
    assert share == pytest.approx(0.4 + 0.6 * 0.2 / 8, abs=0.07)


def test_rates_are_interpolated(tmp_path):
    """The first 12,700 steps: warm-up, constant for a third, decay, and 0.6 of it from step 6,327 on."""
    trainer = Trainer(replace(RECIPE, steps=13_850, rates=Recipe().rates[:8], last_rate=0.02), tmp_path)

    def rate(step):
        trainer.step = step
        return trainer.rate_factor()

    for step in (0, 50, 99, 100, 3_000, 4_191, 5_000, 6_326, 6_327, 9_000, 12_000, 12_500, 12_699):
        decay = (1 - step / 12_700) / 0.67
        expected = min(1.0, (step + 1) / 100, max(0.02, decay * (0.6 if step >= 6_327 else 1.0)))
        assert rate(step) == pytest.approx(expected, abs=2e-4)
    assert rate(12_850) == 0.3
    assert rate(13_350) == pytest.approx(0.16)
    assert rate(13_850) == rate(20_000) == 0.02


def test_final_look_cost_favours_few_heads(tmp_path):
    trainer, all_heads = Trainer(RECIPE, tmp_path), torch.full((3, 4), 0.1)
    few_heads = torch.zeros(3, 4)
    few_heads[2] = 0.3  # the same mean
    for step, share in ((0, 0.0), (200, 0.0), (250, 0.5), (300, 1.0), (359, 1.0)):
        trainer.step = step
        expected = torch.tensor(0.1 * share * RECIPE.look_cost)
        torch.testing.assert_close(trainer._look_cost(all_heads), expected)
        torch.testing.assert_close(trainer._look_cost(few_heads), expected)
    roots = (0.101**0.5 - LOOK_EPS**0.5, (0.301**0.5 - LOOK_EPS**0.5) / 3)
    for trainer.step, weight in ((360, 0.3), (370, 0.4), (380, 0.5), (399, 0.5)):
        for looked, root in zip((all_heads, few_heads), roots, strict=True):
            torch.testing.assert_close(trainer._look_cost(looked), torch.tensor(weight * root))
    zero = torch.zeros(3, 4, requires_grad=True)
    trainer._look_cost(zero).backward()
    assert zero.grad.isfinite().all()


def test_attention_sums_are_returned_per_head():
    torch.manual_seed(0)
    fast, batch = FastForward(build_model(SMALL)), BatchMaker(one_stage_recipe(0.0, 0.0, 1.0)).make(0)
    with torch.no_grad():
        features = fast.image_features(normalise(batch.pixels), batch.cells)
        for values in (features, None):
            _, looked = fast.text_states(values, batch.cells, batch.ids, batch.offsets, batch.groups)
            assert looked.shape == (3, 4)
            assert ((looked > 0) == (values is not None)).all()


def test_weights_set_the_shares_of_the_kinds():
    scene = next(s for s in map(render_scene, range(100)) if len({e.kind for e in s.expressions}) == 7)
    kind_of = {e.text: e.kind for e in scene.expressions}

    def kinds(weights, number=600):
        turns, drawn = scene_turns(scene, Random(0), weights=weights), []
        for _ in range(number):
            text = next(turns)[0].removesuffix(" .").removeprefix("please find ").removeprefix("<unk> ")
            drawn += [kind_of[text]] if text in kind_of else []
        return {kind: drawn.count(kind) / len(drawn) for kind in kind_of.values()}

    uniform = kinds({})
    assert len(uniform) == 7
    assert all(share == pytest.approx(1 / 7, abs=0.06) for share in uniform.values())
    weighted = kinds({"place": 4.0, "name": 0.0})
    assert weighted["name"] == 0
    assert weighted["place"] == pytest.approx(4 / 9, abs=0.08)
    assert weighted["size"] == pytest.approx(1 / 9, abs=0.06)


def test_comparisons_have_a_weight_of_their_own():
    """They are the places and relations of objects whose name occurs more than once."""
    drawn = set()
    for seed in range(200):
        scene = render_scene(seed, repeats=1.0)
        names = [o.name for o in scene.objects]
        kinds = {
            f"{e.text} .": e.kind if names.count(names[e.object_index]) > 1 else "other" for e in scene.expressions
        }
        if {"place", "relation"} & set(kinds.values()):
            turns = scene_turns(scene, Random(0), weights={"comparison": 1e9})
            drawn |= {kinds[prompt] for prompt, _ in (next(turns) for _ in range(12)) if prompt in kinds}
    assert drawn == {"place", "relation"}


def test_where_questions_are_answered_correctly():
    counts = {"yes": 0, "no": 0}
    for seed in range(300):
        scene = render_scene(seed)
        prompt, answer = _where_turn(scene, Random(seed))
        if prompt.startswith("how many"):
            assert answer == NUMBERS[len(scene.objects)]
            continue
        words = prompt.removesuffix(" ?").split()
        word = next(w for w in words if w in ("left", "right", "top", "bottom", "above", "below"))
        named = [o for o in scene.objects if o.name in words]
        assert len(named) == sum(w in NAMES for w in words)
        named.sort(key=lambda o: words.index(o.name))
        axis, sign = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "above": (1, -1)}.get(word, (1, 1))
        middles = [(o.box[axis] + o.box[axis + 2]) / 2 for o in named] + [scene.image.shape[0] / 2]
        assert answer == ("yes" if sign * (middles[0] - middles[1]) > 0 else "no")
        assert IDS["<unk>"] not in encode(prompt)
        counts[answer] += 1
    assert min(counts.values()) > 80


def test_rotary_angles_encode_columns_and_rows():
    """The last two angles are the same in every row of the grid; others tell rows apart."""
    rotary = build_model(SMALL).model.language_model.rotary_emb
    angles = torch.arange(64.0).reshape(8, 8)[..., None] * rotary.inv_freq
    rotations = torch.stack([angles.cos(), angles.sin()])
    columns, rows = rotations[..., -2:], rotations[:, :, 0, 2:-2]
    torch.testing.assert_close(columns, columns[:, :1].expand_as(columns), atol=1e-5, rtol=0)
    assert (columns[0, 0, 0] > columns[0, 0, 1:]).all()
    assert (rows.diff(dim=1).abs().amax((0, 1, 2)) > 0.01).all()
    assert rotary.attention_scaling == 1.0


def test_run_is_loaded_from_its_folder(tmp_path):
    stage = Stage(0, (1.0, 0.0, 0.0), (("place", 2.0),), styles=("noto_v1",))
    recipe = replace(RECIPE, steps=1, stages=(stage,))
    (tmp_path / "recipe.json").write_text(json.dumps(asdict(recipe)))
    trained = Trainer(recipe, tmp_path).train().model
    loaded_recipe, model = load_run(tmp_path)
    assert loaded_recipe == recipe
    assert_same_weights(trained, model)


def test_embedded_models_vocabulary_is_that_of_training():
    """Otherwise its weights could not be trained further."""
    shipped = json.loads((EMBEDDED / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(shipped, key=shipped.get) == vocabulary()


def test_training_styles_have_every_sprite():
    for style in {style for stage in Recipe().stages for style in stage.styles}:
        for name in NAMES:
            assert artwork.sprite_pixels(str(SPRITES / style), name, 40, 40, angle=12).shape == (40, 40, 4)


def test_run_starts_from_weights_of_a_run_or_a_model(tmp_path):
    recipe = replace(RECIPE, steps=1)
    trained = Trainer(recipe, tmp_path / "run").train().model
    export(trained, recipe.model, tmp_path / "model")
    for weights in ("run", "model"):
        start_from(tmp_path / weights, recipe, tmp_path / f"from {weights}", step=7)
        started = Trainer(recipe, tmp_path / f"from {weights}")
        assert started.step == 7
        assert_same_weights(trained, started.model)


def test_export_averages_the_weights_of_runs(tmp_path, monkeypatch):
    recipe = replace(RECIPE, steps=1)
    runs = [Trainer(replace(recipe, seed=seed), tmp_path / f"run {seed}").train().model for seed in range(3)]
    for seed in range(3):
        (tmp_path / f"run {seed}" / "recipe.json").write_text(json.dumps(asdict(recipe)))
    folders = [str(tmp_path / f"run {seed}") for seed in range(3)]
    monkeypatch.setattr("sys.argv", ["export", folders[0], str(tmp_path / "model"), "--mean-with", *folders[1:]])
    export_main()
    written = mean_weights([tmp_path / "model"])
    parts = [dict(run.named_parameters()) for run in runs]
    for name in parts[0]:
        torch.testing.assert_close(written[name], sum(part[name] for part in parts) / 3)


def ranking_of(frequencies):
    """A ranking with these selection frequencies by (layer, head); criterion 1 drops heads with 0."""
    heads = [
        RankedHead(layer, head, share, 0.0, attention_sum=share, spatial_entropy=1.0, kept=share > 0)
        for (layer, head), share in frequencies.items()
    ]
    return HeadRanking(tuple(heads), 0.1, 10, 100, 1, CriteriaOptions())


def test_frequency_and_iou_correlation():
    frequencies = {
        (2, 0): 0.9, (2, 1): 0.5, (3, 0): 0.1, (3, 1): 0.001, (2, 2): 0.0, (3, 2): 0.0, (0, 0): 0.0,
    }  # fmt: skip
    iou = np.zeros((4, 3))
    iou[[2, 2, 3, 3, 2, 3, 0], [0, 1, 0, 1, 2, 2, 0]] = 0.5, 0.3, 0.4, 0.2, 0.1, 0.1, 0.9
    found = correlation(ranking_of(frequencies), iou)
    assert (found["heads"], found["all"]["heads"]) == (3, 6)
    assert found["rho"] == pytest.approx(0.5)  # ranks 3 2 1 and 3 1 2
    assert found["all"]["rho"] == pytest.approx(1 - 2 / 34)  # two neighbours swapped
    tied = correlation(ranking_of({(2, head): 1.0 for head in range(3)} | {(3, 0): 0.0}), iou)
    assert tied["rho"] is None and tied["all"]["heads"] == 4
    assert tied["all"]["rho"] is not None


def test_model_card_tables_agree_with_the_reports():
    now, before = (json.loads((card.REPORTS / f"{name}.json").read_text()) for name in ("now", "before"))
    page = card.PAGE.read_text()
    assert card.fill(page, now, before) == page
    assert all(f"<!-- table: {name} -->\n| " in page for name in card.TABLES)
    best = now["in style"]["top 3"]["pointing"]
    assert f"| {best[0]:.3f} [{best[1]:.2f}, {best[2]:.2f}] |" in page
    now["in style"]["top 3"]["pointing"] = [0.5, 0.4, 0.6]
    assert "| pointing >= 0.93 | 0.500 [0.40, 0.60] | missed |" in card.fill(page, now, before)


def test_comparison_samples_have_several_objects_of_one_name():
    for scene, expression in comparison_samples(20, 64):
        name = scene.objects[expression.object_index].name
        assert [o.name for o in scene.objects].count(name) > 1
        assert name in expression.text and expression.kind == "place"


def test_upper_bound_of_rho_with_tied_heads():
    """Two of five candidates are selected, in the order of their IoU, so the bound is reached."""
    iou = np.zeros((3, 5))
    iou[2] = [0.1, 0.5, 0.2, 0.4, 0.3]
    frequencies = {(2, head): value for head, value in enumerate((0.0, 0.9, 0.0, 0.5, 0.0))}
    report = {
        "heads": {"below tau": 3, "candidates": 5},
        "frequency and IoU": correlation(ranking_of(frequencies), iou),
    }
    found = report["frequency and IoU"]["all"]["rho"]
    assert found == pytest.approx((1 - 24 / 120) ** 0.5)
    assert f"at most {found:.2f} with 3 of them at 0" in card._bounded_correlation(report)


def test_list_scores_compare_multisets():
    scores = list_scores(["dog", "cat", "dog", "bus"], ["bus", "dog", "owl"])
    assert list(scores.values()) == pytest.approx([2 / 4, 2 / 3, 0])
    assert list_scores(["dog", "cat"], ["cat", "dog"])["list: all of it right"] == 1
    assert list_scores(["dog", "cat"], [""])["list: names that are right"] == 0


def test_every_question_has_a_kind():
    rng = Random(0)
    questions = {question_turn(render_scene(seed, size=48), rng)[0] for seed in range(20) for _ in range(20)}
    assert {" ".join(question.split()[:2]) for question in questions} == KINDS.keys()
