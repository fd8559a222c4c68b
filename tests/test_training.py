"""The trainer: its fast forward is the model's own, it learns, and a resumed run follows the same trajectory."""

import json
from dataclasses import asdict, replace
from random import Random

import numpy as np
import pytest
import torch

from localization_heads.data.scenes import render_scene
from training.ablation import shrink, spread_cells, start_from
from training.batches import BatchMaker
from training.language import IDS, build_tokenizer, encode, scene_turns
from training.measure import _positions
from training.model import PREFIX, FastForward, attend, build_model
from training.recipe import Canvas, ModelRecipe, Recipe
from training.trainer import Trainer, load_run

SMALL = ModelRecipe(
    image_size=64, width=64, vision_layers=1, vision_mlp=128, text_layers=3, text_heads=4, head_dim=16, text_mlp=128
)  # fmt: skip
RECIPE = Recipe(
    steps=400,
    model=SMALL,
    canvases=(Canvas(6, (1,), 24, 0), Canvas(6, (1,), 16, 40)),
    stage_starts=(0, 100, 200),
    mixes=((1.0, 0.0, 0.0), (0.2, 0.8, 0.0), (0.1, 0.1, 0.8)),
    text_tokens=64,
    warmup_steps=10,
    query_key_cap=0.18,  # weights of a narrower model are larger
    half=False,
    image_keep=0.8,
    augment_share=0.0,  # easy pictures: the test is short
    bars_share=0.0,
    training_styles_share=0.0,
    calm_from=250,
    look_from=200,
    look_steps=100,
)


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
    recipe = replace(RECIPE, canvases=(Canvas(8, None, 4),), stage_starts=(0,), mixes=((0.0, 1.0),))
    batch = BatchMaker(recipe).make(3)
    with torch.no_grad():
        features = fast.image_features(batch.pixels, batch.cells)
        states, _ = fast.text_states(features, batch.cells, batch.ids, batch.offsets, batch.groups)
        for row, group in ((0, 0), (1, 2), (2, 3)):
            own = batch.groups[row] == group
            ids = [*PREFIX, *[IDS["<image>"]] * 64, *batch.ids[row][own].tolist()]
            output = model(input_ids=torch.tensor([ids]), pixel_values=batch.pixels[row : row + 1])
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
    batch = BatchMaker(
        replace(RECIPE, canvases=(Canvas(4, (1,), 1, 48, 4),), stage_starts=(0,), mixes=((0.0, 1.0),))
    ).make(3)
    with torch.no_grad():
        fast, own = FastForward(model), batch.groups[0] == 0
        features = fast.image_features(batch.pixels, cells[None])
        states, _ = fast.text_states(features, cells[None], batch.ids, batch.offsets, batch.groups)
        ids = torch.tensor([[*PREFIX, *[IDS["<image>"]] * 16, *batch.ids[0][own].tolist()]])
        output = shrink(model, 4)(
            input_ids=ids,
            pixel_values=batch.pixels,
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
    mix = tuple(float(kind == i) for i in range(3))
    maker = BatchMaker(replace(RECIPE, stage_starts=(0,), mixes=(mix,)))
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
    mixes = ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    trainer = Trainer(replace(RECIPE, stage_starts=(0, 2, 3), mixes=mixes), tmp_path).follow(until=2)
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


def test_a_run_is_read_back(tmp_path):

    recipe = replace(RECIPE, steps=1)
    (tmp_path / "recipe.json").write_text(json.dumps(asdict(recipe)))
    trained = Trainer(recipe, tmp_path).follow().model
    again, model = load_run(tmp_path)
    assert again == recipe
    for a, b in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_an_arm_of_the_ablation_starts_from_a_runs_weights(tmp_path):
    recipe = replace(RECIPE, steps=1)
    trained = Trainer(recipe, tmp_path / "run").follow().model
    start_from(tmp_path / "run", recipe, tmp_path / "arm")
    arm = Trainer(recipe, tmp_path / "arm")
    assert arm.step == 0
    for a, b in zip(trained.parameters(), arm.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
