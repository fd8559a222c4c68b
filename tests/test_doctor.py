"""`stage=doctor`: what it reports, and that it finds wrong captures and geometries."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from PIL import Image
from test_model_configs import composed
from test_query_token import tiny_lvlm
from tiny_models import llava_config, llava_processor
from transformers import LlavaForConditionalGeneration

from localization_heads.apps.finder_stages import STAGES
from localization_heads.errors import UsageError
from localization_heads.figures import plot_cells
from localization_heads.figures.style import ORANGE, SKY
from localization_heads.lvlm.checks import doctor
from localization_heads.lvlm.checks.doctor import eager_attention, examine
from localization_heads.lvlm.checks.footprints import views_seen
from localization_heads.lvlm.checks.verdict import EXPRESSIONS, geometry
from localization_heads.lvlm.families.geometry import View, even_view
from localization_heads.lvlm.forward import capture
from localization_heads.lvlm.model import LVLM
from localization_heads.options.groups import ModelSpec, QueryToken
from localization_heads.stages.run import Run


@pytest.fixture
def image_file(image: Image.Image, tmp_path: Path) -> Path:
    path = tmp_path / "noise.png"
    image.save(path)
    return path


def run_of(tmp_path: Path, *overrides: str) -> Run:
    return Run(composed("stage=doctor", "device=cpu", f"output_dir={tmp_path}/out", *overrides))


def test_the_embedded_model_passes_and_is_reported(
    image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run = run_of(tmp_path, f"image_file={image_file}", "query='the dog'")
    assert STAGES["doctor"](run) == 0
    shown = capsys.readouterr().out
    grid = int(run.lvlm.attend(Image.open(image_file), "the dog").grid[0])
    for words in (
        "LlamaDecoderLayer",
        "float32 on cpu",
        f"<image> (id {run.lvlm.image_token_id})",
        f"{grid} x {grid} equal cells over the pixels x 0.0 to 160.0, y -35.0 to 125.0",
        "as eager attention",
        f"[<image> x {grid * grid}]",
        "the dog>>.<<",
    ):
        assert words in shown
    assert (tmp_path / "out/tiny/attention/noise_the-dog_doctor.png").is_file()


MARKED = {
    "last": ".",
    "expression_end": "dog",
    "expression_mean": "the dog",
    "answer_first": "(first token of the answer)",
    "answer_mean": "(tokens of the answer)",
    "answer_span": "(tokens of the answer)",
    "last_and_answer": ".(tokens of the answer)",
}


@pytest.mark.parametrize("query_token", get_args(QueryToken))
def test_query_tokens_are_marked_and_checked(image: Image.Image, query_token: str) -> None:
    lvlm = tiny_lvlm(query_token)
    lvlm.answer_span = "any"
    found = examine(lvlm, image, "the dog")
    marked = "".join(piece.text for piece in found.pieces if piece.kind == "query")
    assert marked == MARKED[query_token]
    assert [piece.text for piece in found.pieces if piece.kind == "image"] == ["<image> x 36"]
    assert found.is_well
    assert found.check.difference is not None
    assert found.check.difference < 1e-5


def test_a_wrong_scaling_of_the_logits_is_found(image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    right = capture.query_row

    def wrong(*args: Any, **extras: Any) -> torch.Tensor:
        return right(*args, **{**extras, "scaling": 1.0})

    monkeypatch.setattr(capture, "query_row", wrong)
    found = examine(tiny_lvlm("last"), image, "the dog")
    assert not found.check.passed
    assert not found.is_well


def deep_lvlm(num_layers: int = 36) -> LVLM:
    """Its random weights are so large that rounding in the first layer becomes a difference of 9e-4 in the last."""
    config = llava_config()
    config.text_config.num_hidden_layers = num_layers
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")):
                parameter.normal_(0, 1)
    return LVLM(model, llava_processor(), ModelSpec("deep"), system="", conv_mode="referseg")


@pytest.mark.parametrize("query_token", ["last", "expression_mean", "answer_first"])
def test_rounding_does_not_accumulate_over_layers(image: Image.Image, query_token: str) -> None:
    """Each layer is compared on the inputs that it had, so that one limit holds for all."""
    lvlm = deep_lvlm()
    lvlm.query_token = query_token
    check = examine(lvlm, image, "the dog").check
    assert check.passed
    assert check.difference is not None
    assert check.difference < 1e-5


def test_one_wrong_layer_of_many_is_found(image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the limit, in layer 30 of 36."""
    right = capture.query_row

    def wrong(module: Any, *args: Any, **extras: Any) -> torch.Tensor:
        return right(module, *args, **extras) + (2e-4 if module.layer_idx == 30 else 0)

    monkeypatch.setattr(capture, "query_row", wrong)
    check = examine(deep_lvlm(), image, "the dog").check
    assert not check.passed
    assert check.note == "limit 0.0001 in float32; exceeded in layers 30"
    assert check.difference == pytest.approx(2e-4, rel=0.05)


def test_large_models_are_compared_only_on_request(image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm = tiny_lvlm("last")
    assert examine(lvlm, image, "the dog", check=False).check.difference is None
    monkeypatch.setattr(doctor, "MAX_COMPARED_PARAMETERS", 10)
    unasked = examine(lvlm, image, "the dog")
    assert unasked.check.difference is None
    assert "doctor.check=true" in unasked.check.note
    assert unasked.is_well
    assert examine(lvlm, image, "the dog", check=True).check.difference is not None


def test_a_layer_that_bypasses_the_attention_interface_is_found(image: Image.Image) -> None:
    lvlm = tiny_lvlm("last")
    lvlm.model.get_decoder().layers[2].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    found = examine(lvlm, image, "the dog", check=False)
    assert not found.is_well
    assert found.check.note == "no attention was seen in layers 2"


def test_notes_and_fingerprint_are_reported(image: Image.Image) -> None:
    lvlm = tiny_lvlm("last")
    lvlm.note("it looks like another")
    facts = examine(lvlm, image, "the dog", check=False).facts
    assert ("note", "it looks like another") in facts
    assert dict(facts)["fingerprint"].startswith(lvlm.fingerprint)


def test_eager_attention_restores_each_parts_own() -> None:
    model = tiny_lvlm("last").model
    model.get_decoder().config._attn_implementation_internal = "flash_attention_2"  # parts may differ

    def kernels() -> list[str]:
        return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]

    before = kernels()
    with eager_attention(model):
        assert set(kernels()) == {"eager"}
    assert kernels() == before
    assert {"sdpa", "flash_attention_2"} <= set(before)


def test_unknown_views_are_a_problem_but_the_rest_is_reported(
    image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> list[View]:
        raise UsageError("no single square grid")

    lvlm = tiny_lvlm("last")
    monkeypatch.setattr(lvlm, "views_in", refuse)
    found = examine(lvlm, image, "the dog", check=False)
    assert (found.views, found.problem, found.is_well) == ([], "no single square grid", False)
    assert dict(found.facts)["layers"].startswith("4 (0 to 3)")


def test_tokens_in_no_view_are_counted(image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm: LVLM = tiny_lvlm("last")
    whole = views_seen(lvlm, image)[0]
    part = even_view("whole", whole.index[:, :-1], whole.box)
    monkeypatch.setattr(lvlm, "views_in", lambda *_: [part])
    assert examine(lvlm, image, "the dog").unplaced == 6


def test_cells_are_drawn_where_they_lie(image: Image.Image) -> None:
    """A padded view and one with uneven cells: first and last cell filled, all lines in pixels."""
    padded = even_view("whole", np.arange(16).reshape(4, 4), (0.0, -35.0, 160.0, 125.0))
    edges = np.array([10.0, 20.0, 50.0, 70.0]), np.array([5.0, 45.0, 85.0])
    uneven = View("tiles", np.arange(6).reshape(2, 3), *edges)
    figure = plot_cells(image, [padded, uneven], title="a model")
    first, second = figure.axes
    assert first.get_title() == "whole: 4 x 4 cells of 40.0 x 40.0 pixels"
    assert second.get_title() == "tiles: 3 x 2 cells, of several sizes"
    for axes, view in ((first, padded), (second, uneven)):
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert left < 0 < 160 < right
        assert top < -35 < 125 < bottom
        filled = {patch.get_facecolor(): patch.get_bbox().bounds for patch in axes.patches if patch.get_fill()}
        corner = view.x_edges[0], view.y_edges[0], *(np.diff(view.x_edges)[:1]), *(np.diff(view.y_edges)[:1])
        assert filled[to_rgba(ORANGE)] == pytest.approx(corner)
        end = view.x_edges[-2], view.y_edges[-2], np.diff(view.x_edges)[-1], np.diff(view.y_edges)[-1]
        assert filled[to_rgba(SKY)] == pytest.approx(end)
        drawn = [tuple(map(tuple, line.tolist())) for line in axes.collections[-1].get_segments()]
        x0, y0, x1, y1 = view.box
        assert drawn[: len(view.x_edges)] == [((x, y0), (x, y1)) for x in view.x_edges]
        assert drawn[len(view.x_edges) :] == [((x0, y), (x1, y)) for y in view.y_edges]


def test_the_verdict_holds_nothing_of_the_users(
    image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a maintainer needs to know, and nothing of the user's folders, words or image."""
    monkeypatch.setattr("localization_heads.stages.doctor.EXAMPLE_DATA", tmp_path / "data.jsonl")
    lines = [{"id": f"{n}", "prompt": text, "image_path": "noise.png"} for n, text in enumerate(["the dog", "a cat"])]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = run_of(tmp_path, f"image_file={image_file}", "query='my secret'", "verdict=true")
    assert STAGES["doctor"](run) == 0
    path = tmp_path / "out/tiny/verdict.json"
    assert path.name in capsys.readouterr().out
    text = path.read_text()
    found = json.loads(text)
    assert found["well"] and found["model"]["family_verified"]
    assert found["model"]["layers"] == run.lvlm.num_layers
    assert found["capture"]["passed"] and found["capture"]["difference"] < 1e-4
    assert found["geometry"]["passed"] and 0 < found["geometry"]["views"]["whole"]["largest_error"] < 0.25
    assert found["versions"]["torch"] == metadata.version("torch")
    assert [one["expression"] for one in found["tokens"]] == list(EXPRESSIONS)
    assert all("".join(one["own"]) for one in found["tokens"])
    assert found["heads"]["samples"] == 2 and len(found["heads"]["known"]) == len(run.lvlm.known_heads)
    assert "secret" not in text and str(tmp_path) not in text and "noise" not in text


def test_the_verdict_finds_a_wrong_geometry(monkeypatch: pytest.MonkeyPatch) -> None:
    """With rows and columns swapped, which the footprints contradict."""
    lvlm = tiny_lvlm("last")
    assert geometry(lvlm)["passed"]
    right = LVLM.views_in

    def swapped(self: LVLM, *given: Any) -> list[View]:
        return [View(v.name, v.index.T, v.x_edges, v.y_edges) for v in right(self, *given)]

    monkeypatch.setattr(LVLM, "views_in", swapped)
    assert geometry(lvlm)["passed"] is False
    monkeypatch.setattr(LVLM, "views_in", lambda *_: 1 / 0)
    assert geometry(lvlm) == {"passed": None, "note": "not traced: division by zero"}
