"""What is asked in addition to an expression: paraphrases, contrast, and confidence signals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoding import variant
from family_models import tiny
from front import Calls, read_lines, write_lines
from PIL import Image
from test_model_configs import composed

from localization_heads.apps.frontdoor import quote_free_text
from localization_heads.data.samples import Sample
from localization_heads.errors import UsageError
from localization_heads.grounding.ground import ground_maps
from localization_heads.grounding.maps import sum_maps
from localization_heads.heads.head import Head
from localization_heads.heads.ready import describe_difference
from localization_heads.lvlm.answers.answering import word_token_ids
from localization_heads.lvlm.asking import BACKGROUND, LISTING, listed_expressions, yes_no_tokens
from localization_heads.lvlm.checkpoints.loading import load_model
from localization_heads.lvlm.checks.footprints import coordinate_image
from localization_heads.lvlm.extra_prompts import (
    MAX_SIBLINGS,
    NO_EXTRA_PROMPTS,
    ExtraPrompts,
    other_expressions,
)
from localization_heads.lvlm.model import LVLM
from localization_heads.lvlm.text.prompts import fill_template, mean_of_normalised, paraphrase
from localization_heads.options.groups import GroundingOptions
from localization_heads.scenes.scene import VALIDATION_SEEDS, scene_samples
from localization_heads.stages.entries import Entries
from localization_heads.stages.find import batch
from localization_heads.stages.ground import ground
from localization_heads.stages.run import Run

SAME = {"rtol": 0, "atol": 1e-6}
HEADS = ((4, 4), (5, 6), (5, 3))
Scenes = list[tuple[Image.Image, str]]


@pytest.fixture(scope="module")
def lvlm() -> LVLM:
    return load_model("tiny")


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    pairs = scene_samples(6, size=192, seeds=VALIDATION_SEEDS)
    return [(Image.fromarray(scene.image), expression.text) for scene, expression in pairs]


# ------------------------------------------------------------------------------------------------- paraphrases


def test_an_article_in_the_template_replaces_that_of_the_expression() -> None:
    assert paraphrase("the dog", None) == ["the dog"]
    assert paraphrase("The dog", ["the {}", "a {}", "{}"]) == ["the dog", "a dog", "The dog"]
    assert fill_template("the left dog.", "please find {}") == "please find the left dog."
    assert fill_template("a {} of {0}", "{}") == "a {} of {0}"  # what people write is never a template
    assert fill_template("theatre", "the {}") == "the theatre"


def test_mean_of_normalised_by_hand() -> None:
    """Shapes [.5 .5] and [1 0] have the mean [.75 .25]; sums 1 and .2 the mean .6."""
    even = np.array([[0.5, 0.5]], np.float32)
    for other, mean in (([[0.2, 0.0]], [[0.45, 0.15]]), ([[0.0, 0.0]], [[0.125, 0.125]])):
        np.testing.assert_allclose(mean_of_normalised([np.array(other, np.float32), even]), mean, **SAME)


def test_paraphrases_are_averaged(lvlm: LVLM, scenes: Scenes) -> None:
    """In a batch, one by one, and on a shared encoding; a second loop over heads computes the mean."""
    plain = variant(lvlm, query_token="last_and_answer")
    both = variant(plain, paraphrases=("the {}", "a {}"))
    image, texts = scenes[0][0], ["frog", "the owl"]
    for text, found in zip(texts, both.attend_batch([image] * 2, texts), strict=True):
        parts = [plain.attend(image, f"{article} {text.split()[-1]}") for article in ("the", "a")]
        assert (found.query, found.answer_text) == (text, parts[0].answer_text)
        for maps in ("attention", "answer"):
            for head in HEADS:
                one, other = (getattr(part, maps)[head].astype(float) for part in parts)
                expected = (one / one.sum() + other / other.sum()) / 2 * (one.sum() + other.sum()) / 2
                np.testing.assert_allclose(getattr(found, maps)[head], expected, **SAME)
        for (alone,) in (both.encode_image(image).attend([text]), both.ask(image, [text])):
            np.testing.assert_allclose(alone.attention, found.attention, **SAME)


@pytest.mark.parametrize("templates", [["the dog"], [], "the {}", ["{} and {}"], [3], ["a {}", "cat"]])
def test_templates_without_one_placeholder_are_refused(templates: Any) -> None:
    with pytest.raises(UsageError, match="paraphrases="):
        load_model("tiny", paraphrases=templates)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("[the dog]", "the dog"),
        ("[]", r"\(\)|\[\]"),
        ("[a {},cat]", "cat"),
        (f"[{','.join(['a {}'] * 9)}]", "a {}"),
    ],
)
def test_wrong_paraphrases_on_the_command_line(given: str, named: str) -> None:
    with pytest.raises(UsageError, match=f"paraphrases=.*({named}).*one {{}}"):
        composed(quote_free_text(f"paraphrases={given}"))


def test_paraphrases_on_the_command_line() -> None:
    """Also where Hydra's grammar would read the braces otherwise."""
    assert composed(quote_free_text("paraphrases=[the {},a {}]")).paraphrases == ("the {}", "a {}")
    assert composed(quote_free_text("paraphrases=please find {}")).paraphrases == ("please find {}",)
    assert composed().paraphrases is None


# ---------------------------------------------------------------------------------------------------- contrast


@pytest.mark.parametrize(
    ("answer", "own", "expected"),
    [
        ("owl, frog, frog", "the owl plain big owl", ("the frog",)),
        ("There are two dogs and a cat.", "the dog", ("the cat",)),
        ("", "the dog", ()),
        ("The image is one of many things that nobody can name", "x", ()),
        (
            ", ".join(f"thing{n}" for n in range(50)),
            "dog",
            tuple(f"the thing{n}" for n in range(MAX_SIBLINGS)),
        ),
    ],
)
def test_listed_names_become_expressions(answer: str, own: str, expected: tuple[str, ...]) -> None:
    assert listed_expressions(answer, own) == expected


def test_other_expressions_are_bounded_and_differ() -> None:
    assert other_expressions("The dog", ["the dog.", "a cat", "A cat"]) == ("a cat",)
    assert other_expressions("it", (str(n) for n in range(99))) == tuple("01234567")


def test_background_asks_one_generic_prompt(lvlm: LVLM, scenes: Scenes) -> None:
    image, text = scenes[1]
    found = lvlm.attend(image, text, extra_prompts=ExtraPrompts("background"))
    np.testing.assert_allclose(found.attention, lvlm.attend(image, text).attention, **SAME)
    (other,) = found.others
    assert other.query == BACKGROUND
    np.testing.assert_allclose(other.attention, lvlm.attend(image, BACKGROUND).attention, **SAME)


def test_siblings_come_from_the_data(lvlm: LVLM, scenes: Scenes) -> None:
    """They are not paraphrased, and unusable ones are left out."""
    image, text = scenes[0]
    twice = variant(lvlm, paraphrases=("{}", "a {}"))
    given = ["the owl", text, "bad </s> words", " ", "cat " * 5000, "the owl"]
    found = twice.attend(image, text, extra_prompts=ExtraPrompts("siblings", heads=HEADS), siblings=given)
    (other,) = found.others
    assert (other.query, other.heads) == ("the owl", HEADS)
    assert other.attention.shape[:2] == (1, len(HEADS))
    whole = lvlm.attend(image, "the owl")
    for place, head in enumerate(HEADS):
        np.testing.assert_allclose(other.attention[0, place], whole.attention[head], **SAME)


def test_without_siblings_the_model_lists_what_it_sees(lvlm: LVLM, scenes: Scenes) -> None:
    for image, text in scenes:
        found = lvlm.attend(image, text, extra_prompts=ExtraPrompts("siblings"))
        (listed,) = lvlm.encode_image(image).generate([LISTING], 24)
        answer = lvlm.encode_image(image).generate([text], 8)[0].text
        own = set(f"{text} {answer}".split())
        names = [name for name in dict.fromkeys(listed.text.replace(",", " ").split()) if name not in own]
        assert [other.query for other in found.others] == [f"the {name}" for name in names]


def test_maps_of_the_kept_heads_suffice(lvlm: LVLM, scenes: Scenes) -> None:
    """The box is the same as from all maps. To read another head is an error."""
    image, text = scenes[2]
    options = GroundingOptions(contrast="siblings", combine="consensus")
    few, all_of_them = (
        lvlm.attend(image, text, extra_prompts=ExtraPrompts("siblings", heads=kept)) for kept in (HEADS, None)
    )
    assert few.others
    heads = [Head(*head) for head in HEADS]
    one, other = (ground_maps(maps, heads, options) for maps in (few, all_of_them))
    assert one.box == other.box
    np.testing.assert_array_equal(one.combined, other.combined)
    plain = ground_maps(replace(few, others=()), heads, options)
    assert abs(plain.combined - one.combined).max() > 1e-5
    with pytest.raises(ValueError, match="not kept"):
        sum_maps(few.others[0], [Head(3, 0)], options)
    assert few.num_bytes < all_of_them.num_bytes


# ----------------------------------------------------------------------------------------------------- signals


def test_signals_equal_those_of_whole_forward_passes(lvlm: LVLM, scenes: Scenes) -> None:
    """In a batch, and alone."""
    (image, text), signals = scenes[2], ExtraPrompts(signals=True)
    found, absent = lvlm.attend_batch([image] * 2, [text, "the bicycle"], extra_prompts=signals)
    alone = lvlm.attend(image, text, extra_prompts=signals)
    tokenizer = lvlm.processor.tokenizer
    yes, no = tokenizer("yes no", add_special_tokens=False)["input_ids"]

    def forward(expression: str) -> tuple[list[int], torch.Tensor]:
        inputs = lvlm.model_inputs([lvlm.image_for_processor(image)], [lvlm.prompt(expression)])
        with torch.inference_mode():
            return inputs["input_ids"][0].tolist(), lvlm.model(**inputs).logits[0]

    ids, logits = forward(text)
    logprobs = torch.log_softmax(logits, -1)
    own = tokenizer(f"{text}.", add_special_tokens=False)["input_ids"]
    assert ids[-len(own) :] == own and len(own) > 2
    expression_logprob = sum(float(logprobs[-1 - n, ids[-n]]) for n in range(1, len(own)))  # without the first
    presence, statement = (forward(question)[1][-1] for question in (f"is there {text}?", f"is {text}?"))
    for maps in (found, alone):
        assert maps.answer_logprob == pytest.approx(float(logprobs[-1].max()), abs=1e-5)
        assert maps.expression_logprob == pytest.approx(expression_logprob, abs=1e-3)
        assert maps.presence_logit == pytest.approx(float(presence[yes] - presence[no]), abs=1e-4)
        assert maps.statement_logit == pytest.approx(float(statement[yes] - statement[no]), abs=1e-4)
    assert absent.presence_logit < 0 < found.presence_logit
    assert found.others and {other.query for other in found.others}.isdisjoint({text})


def test_no_presence_signal_without_tokens_for_yes_and_no() -> None:
    other, image = tiny("llava"), coordinate_image(190, 110)
    assert yes_no_tokens(other.processor.tokenizer) is None
    found = other.attend(image, "the dog", extra_prompts=ExtraPrompts(signals=True))
    assert found.presence_logit is None
    assert found.answer_logprob is not None


def test_only_known_single_tokens_spell_yes_and_no() -> None:
    ids = {"yes": [5], "Yes": [6], " yes": [7], " Yes": [6], "no": [0], "No": [1, 2], " no": [0], " No": [0]}

    def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": ids[text]}

    tokenizer.unk_token_id = 0  # type: ignore[attr-defined]
    assert word_token_ids(tokenizer, "yes") == (5, 6, 7)
    assert word_token_ids(tokenizer, "no") == ()


@pytest.mark.parametrize("name", ["florence2", "paligemma", "mllama", "qwen3_5", "gemma3"])
def test_extra_prompts_with_and_without_a_shared_prefix(name: str) -> None:
    lvlm, image, extra_prompts = (
        tiny(name),
        coordinate_image(190, 110),
        ExtraPrompts("background", signals=True),
    )
    expected = {text: lvlm.attend(image, text).attention for text in ("the red car", "the dog", BACKGROUND)}
    for maps in lvlm.attend_batch([image] * 2, ["the red car", "the dog"], extra_prompts=extra_prompts):
        (other,) = maps.others
        for one in (maps, other):
            np.testing.assert_allclose(one.attention, expected[one.query], rtol=0, atol=1e-5)
        alone = lvlm.attend(image, maps.query, extra_prompts=extra_prompts)
        assert alone.answer_logprob == pytest.approx(maps.answer_logprob, abs=1e-4)


def test_no_extra_prompts_cost_nothing(lvlm: LVLM, scenes: Scenes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit-identical maps, with no other forward pass and no generation."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("this must not be called")

    images, texts = zip(*scenes, strict=True)
    prepared = lvlm.prepare(images, texts).run(None)
    monkeypatch.setattr("localization_heads.lvlm.model.attend_with_extras", refuse)
    monkeypatch.setattr(type(lvlm.model), "generate", refuse)
    found = lvlm.attend_batch(images, texts, extra_prompts=NO_EXTRA_PROMPTS)
    for one, other in zip(prepared, found, strict=True):
        np.testing.assert_array_equal(one.attention, other.attention)
        assert (other.others, other.answer, other.answer_logprob, other.presence_logit) == ((), *[None] * 3)


# ------------------------------------------------------------------------------------------------------ stages


MORE = (
    "grounding.contrast=siblings",
    "query_token=last_and_answer",
    "paraphrases=[the {},a {}]",
    "signals=true",
)


@pytest.fixture
def run_of(tmp_path: Path, scenes: Scenes) -> Callable[..., Run]:
    """A run with the given options on six expressions of three scenes."""
    entries = []
    for number, (image, text) in enumerate(scenes[:3]):
        image.save(tmp_path / f"s{number}.png")
        for part, expression in enumerate((text, "the owl", "the frog")[: 3 - number]):
            entries.append({"id": f"e{number}{part}", "prompt": expression, "image_path": f"s{number}.png"})
    fixed = ["device=cpu", "visualize_batch=false", "segmenter=none", "report=false", "batch_size=2"]
    fixed += ["heads=[4-4,5-6,5-3]", f"data_file={write_lines(tmp_path / 'data.jsonl', entries)}"]

    def make(*options: str, out: str = "out") -> Run:
        return Run(composed(*map(quote_free_text, [*fixed, f"output_dir={tmp_path / out}", *options])))

    return make


def predictions(run: Run, stage: Callable[[Run], Any] = ground) -> list[dict[str, Any]]:
    stage(run)
    return read_lines(run.folder / "predictions.jsonl")


def test_an_interrupted_run_resumes_with_the_same_boxes(run_of: Callable[..., Run], calls: Calls) -> None:
    whole = predictions(run_of(*MORE, out="whole"))
    calls.restart(fail_at=2)
    with pytest.raises(KeyboardInterrupt):
        ground(run_of(*MORE, out="killed"))
    calls.restart()
    assert predictions(run_of(*MORE, out="killed")) == whole
    assert predictions(run_of(out="plain")) != whole


def test_a_batch_grounds_with_the_extra_prompts(run_of: Callable[..., Run]) -> None:
    """Its attention files hold only the expression's maps: the rest is asked once the heads are known."""
    options = ("grounding.contrast=siblings", "query_token=last_and_answer", "num_samples=6")
    one, two = (predictions(run_of(*options, out=stage.__name__), stage) for stage in (ground, batch))
    np.testing.assert_allclose([line["bbox"] for line in one], [line["bbox"] for line in two], atol=1e-3)


def test_result_keys_depend_on_siblings_only_if_they_are_asked() -> None:
    one, two = Sample("a.png", "the dog", id="1"), Sample("a.png", "the cat", id="2")
    few, more = Entries([one]), Entries([one, two])
    assert few.result_key(one, "none") == more.result_key(one, "none") == few.key(one)
    assert few.result_key(one, "siblings") != more.result_key(one, "siblings")
    assert more.siblings(one) == ("the cat",)
    assert len(more.result_key(one, "siblings")) == len(few.key(one))


def test_settings_record_what_is_asked(run_of: Callable[..., Run]) -> None:
    plain, more = run_of(), run_of("answer_tokens=3", *MORE)
    assert "paraphrases" not in plain.model_settings
    assert "answer_tokens" not in plain.model_settings
    assert more.model_settings["paraphrases"] == ["the {}", "a {}"]
    assert more.model_settings["answer_tokens"] == 3
    assert more.lvlm.asked["query_token"] == "last"  # heads are found in the same maps
    assert more.lvlm.asked["paraphrases"] == "the {}; a {}"
    found = {"paraphrases": "the {}", "query_token": "answer_mean"}
    assert describe_difference(found, more.lvlm.asked) == (
        "found with query_token=answer_mean (here: last), paraphrases=the {} (here: the {}; a {})"
    )
