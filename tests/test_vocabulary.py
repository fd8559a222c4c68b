"""Words that the embedded model does not know, and the warning that lists them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from PIL import Image

import localization_heads as lh
from localization_heads.lvlm.model import LVLM
from localization_heads.lvlm.vocabulary import unknown_words, warn_of_unknown_words
from localization_heads.scenes.scene import VALIDATION_SEEDS, scene_samples


@pytest.fixture
def lvlm() -> LVLM:
    return lh.load_model(device="cpu")


def test_unknown_words_are_found(lvlm: LVLM) -> None:
    tokenizer = lvlm.processor.tokenizer
    asked = ["the dog, a zebra!", "zebra on the left", "unicorn ."]
    assert unknown_words(tokenizer, asked) == ["zebra", "unicorn"]
    assert unknown_words(SimpleNamespace(unk_token_id=None), ["zebra"]) == []
    assert tokenizer("zebra", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]


def test_one_warning_for_all_expressions(lvlm: LVLM) -> None:
    warn_of_unknown_words(lvlm, ["the dog", "the cat on the left."])
    assert lvlm.notes == []
    warn_of_unknown_words(lvlm, ["the zebra"])
    assert lvlm.notes.pop() == "zebra: not among the 200 words of the embedded model"
    many = [f"the word{letter}" for letter in "abcdefghij"]
    warn_of_unknown_words(lvlm, [*many, "worda wordb", "the dog"])
    (note,) = lvlm.notes
    assert note.startswith("worda, wordb, wordc") and "wordh and 2 more: not among the 200 words" in note
    assert note.endswith(", in 11 of 12 expressions")


def test_grounding_warns_of_unknown_words(lvlm: LVLM) -> None:
    ((scene, _),) = scene_samples(1, size=96, seeds=VALIDATION_SEEDS)
    image = Image.fromarray(scene.image)
    lh.ground(lvlm, image, "the zebra", segmenter=None)
    lh.ground_all(lvlm, image, "the unicorn", segmenter=None)
    lh.ground(lvlm, image, "the dog", segmenter=None)
    assert [note.split(":")[0] for note in lvlm.notes] == ["zebra", "unicorn"]
