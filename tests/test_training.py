"""The trainer: its fast forward is the model's own, it learns, and a resumed run follows the same trajectory."""

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
from training.batches import BatchMaker, joined, normalise
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
from training.loaders import made_ahead
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
    stages=(  # easy images: the test is short
        Stage(0, (1.0, 0.0, 0.0), (), 0.0, 0.0),
        Stage(100, (0.2, 0.8, 0.0), (), 0.0, 0.0),
        Stage(200, (0.1, 0.1, 0.8), (), 0.0, 0.0),
    ),
    text_tokens=64,
    query_key_cap=0.18,  # weights of a narrower model are larger
    half=False,
    image_keep=0.8,
    bars_share=0.0,
    rates=((0, 0.1), (9, 1.0), (132, 1.0), (249, 0.57), (250, 0.34)),
    look_from=200,
    look_steps=100,
    few_look_costs=((360, 0.3), (380, 0.5)),
)


def showing(*mix, **options):
    """The small recipe with one stage."""
    return replace(RECIPE, stages=(Stage(0, mix),), **options)


@pytest.fixture(scope="module")
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_fast_forward_is_the_models_own():
    torch.manual_seed(0)
    model = build_model(SMALL).eval()
    fast = FastForward(model)
    batch = BatchMaker(showing(0.0, 1.0, canvases=(Canvas(8, None, 4),))).make(3)
    with torch.no_grad():
        features = fast.image_features(normalise(batch.pixels), batch.cells)
        states, _ = fast.text_states(features, batch.cells, batch.ids, batch.offsets, batch.groups)
        for row, group in ((0, 0), (1, 2), (2, 3)):
            own = batch.groups[row] == group
            ids = [*PREFIX, *[IDS["<image>"]] * 64, *batch.ids[row][own].tolist()]
            output = model(input_ids=torch.tensor([ids]), pixel_values=normalise(batch.pixels[row : row + 1]))
            expected = output.logits[0, -int(own.sum()) :]
            torch.testing.assert_close(fast.logits(states[row][own]), expected, atol=2e-5, rtol=1e-4)


def test_attention_dropout_spares_the_text():
    q = torch.randn(2, 3, 4, 8)
    whole, halved = attend(q, q, q)[0], attend(q, q, q, keep=torch.full((2, 1, 4, 4), 0.5))[0]
    torch.testing.assert_close(halved, whole / 2)
    keep = FastForward(build_model(SMALL), image_dropout=0.3)._dropout(q, 5, len(PREFIX) + 5 + 4)
    assert set(keep[..., : len(PREFIX)].unique().tolist()) == {1.0}
    assert set(keep[..., -4:].unique().tolist()) == {1.0}


def test_cells_of_smaller_scenes_are_spread_over_the_grid():
    maker, rng = BatchMaker(Recipe()), Random(0)
    seen = set()
    for _ in range(200):
        cells = maker._cells(Canvas(10, (1,), 1, scene_cells=16), rng).reshape(10, 10)
        rows, columns = cells[:, 0] // 24, cells[0] % 24
        assert (cells == rows[:, None] * 24 + columns).all()
        for line in (rows, columns):
            assert set(np.diff(line).tolist()) == {1, 2}
            assert 13 <= line[-1] - line[0] <= 14
        seen |= {*rows.tolist(), *columns.tolist()}
    assert seen == set(range(24))
    full = maker._cells(Canvas(24, None, 1), rng)
    assert (full == np.arange(24 * 24)).all()


def test_thinned_out_tokens_stand_for_all():
    """Where all tokens are alike, the image takes the same share of attention however many of its tokens are left."""
    model, groups, shares = build_model(SMALL), torch.zeros(1, 5, dtype=torch.int64), []
    for keep in (1.0, 0.5):
        fast = FastForward(model, image_keep=keep)
        features, cells = fast._thin_out(torch.randn(1, 64, 8), torch.arange(64)[None])
        number = cells.shape[1]
        assert (number, features.shape[1]) == (64 * keep, 64 * keep)
        assert (cells.diff() > 0).all()
        keys = torch.zeros(1, 1, len(PREFIX) + number + 5, 8)
        weights = attend(keys[:, :, -5:], keys, keys, fast._biases(number, groups)[2])[1]
        shares.append(weights[..., len(PREFIX) : len(PREFIX) + number].sum(-1))
    torch.testing.assert_close(*shares)


def test_a_shrunk_model_reads_spread_cells_as_in_training():
    torch.manual_seed(0)
    model = build_model(SMALL).eval()
    cells = spread_cells(8, 4)
    assert cells[:5].tolist() == [9, 11, 13, 15, 25]
    batch = BatchMaker(showing(0.0, 1.0, canvases=(Canvas(4, (1,), 1, 48, 4),))).make(3)
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


def test_tokenizer_and_trainer_agree():
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


def guessing(kind):
    """Loss in nats of the best guess that looks at nothing, and how often the commonest first word is right."""
    stage = replace(RECIPE.stages[-1], start=0, mix=tuple(float(kind == i) for i in range(3)))
    maker = BatchMaker(replace(RECIPE, stages=(stage,)))
    batches = [maker.make(step) for step in range(20)]
    targets, weights = (
        torch.cat([getattr(b, name).flatten() for b in batches]) for name in ("targets", "weights")
    )
    shares = torch.bincount(targets, weights) / weights.sum()
    firsts = torch.bincount(torch.cat([b.targets[b.firsts] for b in batches]))
    return float(-torch.xlogy(shares, shares).sum()), float(firsts.max() / firsts.sum())


def test_the_code_still_trains(tmp_path, threads):
    """A tiny model learns facts about words, and says colours and sizes better than a guess."""
    seen = []
    trainer = Trainer(RECIPE, tmp_path).follow(seen.append)
    last = seen[-80:]
    text, image = ([p for p in last if p.canvas == cells] for cells in (0, 36))

    def mean(name, steps):
        return sum(getattr(p, name) for p in steps) / len(steps)

    text_level, _ = guessing(0)
    image_level, best_guess = guessing(2)
    assert mean("loss", text) < 0.6 * text_level
    assert mean("loss", image) < 0.65 * image_level
    assert mean("first_right", image) > best_guess + 0.03
    assert all(p.square().mean().sqrt() <= 0.1801 for p in trainer.optimiser.capped)


def test_weights_that_a_batch_does_not_use_stay(tmp_path):
    """Momentum of old gradients must not move them: it would be made as large as a real step."""
    stages = (Stage(0, (0.0, 0.0, 1.0)), Stage(2, (1.0, 0.0, 0.0)), Stage(3, (0.0, 1.0, 0.0)))
    trainer = Trainer(replace(RECIPE, stages=stages), tmp_path).follow(until=2)
    layers = [trainer.model.model.vision_tower, trainer.model.model.language_model.layers]
    for unused, step in zip(layers, (3, 4), strict=True):
        before = [p.clone() for p in unused.parameters() if p.ndim == 2]
        trainer.follow(until=step)
        after = [p for p in unused.parameters() if p.ndim == 2]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_resumed_run_follows_the_same_trajectory(tmp_path, threads):
    recipe = replace(RECIPE, steps=6, half=True)
    whole = Trainer(recipe, tmp_path / "whole").follow()
    Trainer(recipe, tmp_path / "parts").follow(until=3)
    parts = Trainer(recipe, tmp_path / "parts")
    assert parts.step == 3
    parts.follow()
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_batches_made_ahead_are_those_of_all_workers(tmp_path, threads):
    """As on a GPU: one process trains what two would see, drawn by others ahead of time."""
    recipe = replace(RECIPE, workers=2, steps=3, stages=(Stage(0, (0.0, 0.0, 1.0)),))
    for step, batch in enumerate(made_ahead(recipe, range(3), loaders=2)):
        for worker in range(2):
            part = BatchMaker(recipe, worker).make(step)
            rows = slice(16 * worker, 16 * worker + 16)
            for name, value in vars(part).items():
                assert torch.equal(getattr(batch, name)[rows], value), name
    seen = []
    Trainer(recipe, tmp_path, loaders=2).follow(seen.append)
    assert [progress.step for progress in seen] == [1, 2, 3]


def test_text_alone_is_joined_without_an_image():
    parts = [BatchMaker(showing(1.0, 0.0, 0.0), worker).make(0) for worker in range(2)]
    assert joined(parts).pixels is None
    assert joined(parts).ids.shape == (2 * RECIPE.text_rows, RECIPE.text_tokens)


def test_questions_of_presence_are_answered_by_the_scene():
    said = {"yes": 0, "no": 0}
    for seed in range(100):
        scene = render_scene(seed)
        prompt, answer = presence_turn(scene, Random(seed))
        expression = prompt.removeprefix("is there ").removesuffix(" ?")
        assert (expression in {e.text for e in scene.expressions}) == (answer == "yes")
        assert IDS["<unk>"] not in encode(prompt)
        said[answer] += 1
    assert min(said.values()) > 35


def test_a_stage_without_questions_of_presence_says_what_it_said():
    """Runs of before are drawn as they were; with a share, so many turns ask."""
    scene = render_scene(4)
    before, same = scene_turns(scene, Random(1)), scene_turns(scene, Random(1), presence=0.0)
    assert [next(before) for _ in range(50)] == [next(same) for _ in range(50)]
    asking = scene_turns(scene, Random(1), presence=0.4)
    share = np.mean([next(asking)[0].startswith("is there ") for _ in range(400)])
    assert share == pytest.approx(0.4 + 0.6 * 0.2 / 8, abs=0.07)


def test_rates_are_lines_from_point_to_point(tmp_path):
    """The first 12,700 steps: warm-up, constant for a third, down to nothing, 0.6 of that from step 6,327 on."""
    trainer = Trainer(replace(RECIPE, steps=13_850, rates=Recipe().rates[:8], last_rate=0.02), tmp_path)

    def rate(step):
        trainer.step = step
        return trainer.rate_factor()

    for step in (0, 50, 99, 100, 3_000, 4_191, 5_000, 6_326, 6_327, 9_000, 12_000, 12_500, 12_699):
        left = (1 - step / 12_700) / 0.67
        before = min(1.0, (step + 1) / 100, max(0.02, left * (0.6 if step >= 6_327 else 1.0)))
        assert rate(step) == pytest.approx(before, abs=2e-4)
    assert rate(12_850) == 0.3
    assert rate(13_350) == pytest.approx(0.16)
    assert rate(13_850) == rate(20_000) == 0.02


def test_in_the_end_much_looking_in_few_heads_is_cheaper(tmp_path):
    trainer, alike = Trainer(RECIPE, tmp_path), torch.full((3, 4), 0.1)
    few = torch.zeros(3, 4)
    few[2] = 0.3  # the same on average
    for step, share in ((0, 0.0), (200, 0.0), (250, 0.5), (300, 1.0), (359, 1.0)):
        trainer.step = step
        expected = torch.tensor(0.1 * share * RECIPE.look_cost)
        torch.testing.assert_close(trainer._look_cost(alike), expected)
        torch.testing.assert_close(trainer._look_cost(few), expected)
    roots = (0.101**0.5 - LOOK_EPS**0.5, (0.301**0.5 - LOOK_EPS**0.5) / 3)
    for trainer.step, weight in ((360, 0.3), (370, 0.4), (380, 0.5), (399, 0.5)):
        for looked, root in zip((alike, few), roots, strict=True):
            torch.testing.assert_close(trainer._look_cost(looked), torch.tensor(weight * root))
    asleep = torch.zeros(3, 4, requires_grad=True)
    trainer._look_cost(asleep).backward()
    assert asleep.grad.isfinite().all()


def test_what_each_head_looks_is_told_apart():
    torch.manual_seed(0)
    fast, batch = FastForward(build_model(SMALL)), BatchMaker(showing(0.0, 0.0, 1.0)).make(0)
    with torch.no_grad():
        features = fast.image_features(normalise(batch.pixels), batch.cells)
        for values in (features, None):
            _, looked = fast.text_states(values, batch.cells, batch.ids, batch.offsets, batch.groups)
            assert looked.shape == (3, 4)
            assert ((looked > 0) == (values is not None)).all()


def test_a_stage_says_which_expressions_are_asked():
    scene = next(s for s in map(render_scene, range(100)) if len({e.kind for e in s.expressions}) == 7)
    kind_of = {e.text: e.kind for e in scene.expressions}

    def kinds(weights, number=600):
        turns, found = scene_turns(scene, Random(0), weights=weights), []
        for _ in range(number):
            text = next(turns)[0].removesuffix(" .").removeprefix("please find ").removeprefix("<unk> ")
            found += [kind_of[text]] if text in kind_of else []
        return {kind: found.count(kind) / len(found) for kind in kind_of.values()}

    uniform = kinds({})
    assert len(uniform) == 7
    assert all(share == pytest.approx(1 / 7, abs=0.06) for share in uniform.values())
    weighted = kinds({"place": 4.0, "name": 0.0})
    assert weighted["name"] == 0
    assert weighted["place"] == pytest.approx(4 / 9, abs=0.08)
    assert weighted["size"] == pytest.approx(1 / 9, abs=0.06)


def test_comparisons_are_asked_apart():
    """Places and relations of things whose name comes more than once: nothing else, where they weigh most."""
    seen = set()
    for seed in range(200):
        scene = render_scene(seed, repeats=1.0)
        names = [o.name for o in scene.objects]
        kinds = {
            f"{e.text} .": e.kind if names.count(names[e.object_index]) > 1 else "other"
            for e in scene.expressions
        }
        if {"place", "relation"} & set(kinds.values()):
            turns = scene_turns(scene, Random(0), weights={"comparison": 1e9})
            seen |= {kinds[prompt] for prompt, _ in (next(turns) for _ in range(12)) if prompt in kinds}
    assert seen == {"place", "relation"}


def test_questions_about_places_are_answered_by_the_masks():
    said = {"yes": 0, "no": 0}
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
        said[answer] += 1
    assert min(said.values()) > 80


def test_some_angles_stand_for_the_column_of_an_image_token():
    """The last two rotary angles are the same in every row of the grid; others tell rows apart."""
    rotary = build_model(SMALL).model.language_model.rotary_emb
    angles = torch.arange(64.0).reshape(8, 8)[..., None] * rotary.inv_freq
    turns = torch.stack([angles.cos(), angles.sin()])
    columns, rows = turns[..., -2:], turns[:, :, 0, 2:-2]
    torch.testing.assert_close(columns, columns[:, :1].expand_as(columns), atol=1e-5, rtol=0)
    assert (columns[0, 0, 0] > columns[0, 0, 1:]).all()
    assert (rows.diff(dim=1).abs().amax((0, 1, 2)) > 0.01).all()
    assert rotary.attention_scaling == 1.0


def test_a_run_is_read_back(tmp_path):
    stage = Stage(0, (1.0, 0.0, 0.0), (("place", 2.0),), styles=("noto_v1",))
    recipe = replace(RECIPE, steps=1, stages=(stage,))
    (tmp_path / "recipe.json").write_text(json.dumps(asdict(recipe)))
    trained = Trainer(recipe, tmp_path).follow().model
    again, model = load_run(tmp_path)
    assert again == recipe
    for a, b in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_words_of_the_shipped_model_are_those_that_training_knows():
    """Otherwise its weights cannot be trained further: each word's row is its place in the list."""
    shipped = json.loads((EMBEDDED / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(shipped, key=shipped.get) == vocabulary()


def test_the_styles_to_learn_from_draw_every_name():
    for style in {style for stage in Recipe().stages for style in stage.styles}:
        for name in NAMES:
            assert artwork.sprite_pixels(str(SPRITES / style), name, 40, 40, angle=12).shape == (40, 40, 4)


def test_a_run_starts_from_the_weights_of_another_or_of_a_model(tmp_path):
    recipe = replace(RECIPE, steps=1)
    trained = Trainer(recipe, tmp_path / "run").follow().model
    export(trained, recipe.model, tmp_path / "model")
    for weights in ("run", "model"):  # of a checkpoint, or as they are shipped
        start_from(tmp_path / weights, recipe, tmp_path / f"from {weights}", step=7)
        arm = Trainer(recipe, tmp_path / f"from {weights}")
        assert arm.step == 7
        for a, b in zip(trained.parameters(), arm.model.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_several_runs_are_exported_as_the_mean_of_their_weights(tmp_path, monkeypatch):
    recipe = replace(RECIPE, steps=1)
    runs = [Trainer(replace(recipe, seed=seed), tmp_path / f"run {seed}").follow().model for seed in range(3)]
    for seed in range(3):
        (tmp_path / f"run {seed}" / "recipe.json").write_text(json.dumps(asdict(recipe)))
    folders = [str(tmp_path / f"run {seed}") for seed in range(3)]
    monkeypatch.setattr(
        "sys.argv", ["export", folders[0], str(tmp_path / "model"), "--mean-with", *folders[1:]]
    )
    export_main()
    written = mean_weights([tmp_path / "model"])
    parts = [dict(run.named_parameters()) for run in runs]
    for name in parts[0]:
        torch.testing.assert_close(written[name], sum(part[name] for part in parts) / 3)


def ranked(frequencies):
    """A ranking of (layer, head) -> selection frequency; heads that are never marked were dropped."""
    heads = [
        RankedHead(layer, head, share, 0.0, attention_sum=share, spatial_entropy=1.0, kept=share > 0)
        for (layer, head), share in frequencies.items()
    ]
    return HeadRanking(tuple(heads), 0.1, 10, 100, 1, CriteriaOptions())


def test_frequency_and_iou_are_compared_as_in_the_paper_and_over_all_candidates():
    frequencies = {
        (2, 0): 0.9, (2, 1): 0.5, (3, 0): 0.1, (3, 1): 0.001, (2, 2): 0.0, (3, 2): 0.0, (0, 0): 0.0,
    }  # fmt: skip
    iou = np.zeros((4, 3))
    iou[[2, 2, 3, 3, 2, 3, 0], [0, 1, 0, 1, 2, 2, 0]] = 0.5, 0.3, 0.4, 0.2, 0.1, 0.1, 0.9
    found = correlation(ranked(frequencies), iou)
    assert (found["heads"], found["all"]["heads"]) == (3, 6)
    assert found["rho"] == pytest.approx(0.5)  # ranks 3 2 1 and 3 1 2
    assert found["all"]["rho"] == pytest.approx(1 - 2 / 34)  # two neighbours change places
    same = correlation(ranked({(2, head): 1.0 for head in range(3)} | {(3, 0): 0.0}), iou)
    assert same["rho"] is None and same["all"]["heads"] == 4
    assert same["all"]["rho"] is not None


def test_the_cards_tables_are_those_of_the_reports():
    now, before = (json.loads((card.REPORTS / f"{name}.json").read_text()) for name in ("now", "before"))
    page = card.PAGE.read_text()
    assert card.fill(page, now, before) == page
    assert all(f"<!-- table: {name} -->\n| " in page for name in card.TABLES)
    best = now["in style"]["top 3"]["pointing"]
    assert f"| {best[0]:.3f} [{best[1]:.2f}, {best[2]:.2f}] |" in page
    now["in style"]["top 3"]["pointing"] = [0.5, 0.4, 0.6]
    assert "| pointing >= 0.93 | 0.500 [0.40, 0.60] | missed |" in card.fill(page, now, before)


def test_comparisons_are_between_things_of_one_name():
    for scene, expression in comparison_samples(20, 64):
        name = scene.objects[expression.object_index].name
        assert [o.name for o in scene.objects].count(name) > 1
        assert name in expression.text and expression.kind == "place"


def test_the_most_that_rho_can_be_with_heads_at_zero():
    """Two of five candidates are marked, in the order of their IoU: nothing could agree better."""
    iou = np.zeros((3, 5))
    iou[2] = [0.1, 0.5, 0.2, 0.4, 0.3]
    frequencies = {(2, head): value for head, value in enumerate((0.0, 0.9, 0.0, 0.5, 0.0))}
    report = {
        "heads": {"below tau": 3, "candidates": 5},
        "frequency and IoU": correlation(ranked(frequencies), iou),
    }
    found = report["frequency and IoU"]["all"]["rho"]
    assert found == pytest.approx((1 - 24 / 120) ** 0.5)
    assert f"at most {found:.2f} with 3 of them at 0" in card._bounded_correlation(report)


def test_lists_are_compared_as_bags_of_names():
    scores = list_scores(["dog", "cat", "dog", "bus"], ["bus", "dog", "owl"])
    assert list(scores.values()) == pytest.approx([2 / 4, 2 / 3, 0])
    assert list_scores(["dog", "cat"], ["cat", "dog"])["list: all of it right"] == 1
    assert list_scores(["dog", "cat"], [""])["list: names that are right"] == 0


def test_every_question_is_counted_under_its_kind():
    rng = Random(0)
    asked = {question_turn(render_scene(seed, size=48), rng)[0] for seed in range(20) for _ in range(20)}
    assert {" ".join(question.split()[:2]) for question in asked} == KINDS.keys()
