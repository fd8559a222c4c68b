"""The spec of a checkpoint, by name and from options, and the name of its output folder."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localization_heads.errors import UsageError
from localization_heads.heads.head import Head
from localization_heads.lvlm.checkpoints.spec import CONVERTED, compose_spec, find_spec, known_specs
from localization_heads.options.compose import to_plain
from localization_heads.options.groups import ModelSpec
from localization_heads.store.paths import model_folder


def values(stem: str, **changes: Any) -> ModelSpec:
    """The group as Hydra composes it, with what the user has set."""
    return ModelSpec.of({**to_plain(known_specs()[stem]), **changes}, "model.")


def test_known_models() -> None:
    specs = known_specs()
    assert specs["llava"].name == "llava-hf/llava-1.5-7b-hf"
    assert specs["llava-13b"].name == "llava-hf/llava-1.5-13b-hf"
    assert specs["tiny"].name == "embedded"
    assert len({spec.folder for spec in specs.values()}) == len(specs)


def test_specs_are_found_by_stem_or_name() -> None:
    assert find_spec("llava") is find_spec("llava-hf/llava-1.5-7b-hf") is known_specs()["llava"]
    assert find_spec("someone/some-model") == ModelSpec(name="someone/some-model")


@pytest.mark.parametrize("original", sorted(CONVERTED))
def test_original_llava_ids_are_replaced_by_converted_ones(
    original: str, package_log: pytest.LogCaptureFixture
) -> None:
    """From Python and from the command line."""
    for find in (find_spec, lambda name: compose_spec(values("tiny", name=name), "tiny")):
        package_log.clear()
        assert find(original).name == CONVERTED[original]
        assert [r.getMessage() for r in package_log.records if original in r.getMessage()], "no notice"


def test_a_known_name_brings_its_own_settings() -> None:
    """`model.name=` with the embedded model's config must not keep the embedded model's settings."""
    assert compose_spec(values("tiny", name="llava-hf/llava-1.5-7b-hf"), "tiny") == known_specs()["llava"]
    other = compose_spec(values("llava", name="someone/some-model"), "llava")
    assert other == ModelSpec(name="someone/some-model")
    assert other.folder == "someone--some-model"


def test_options_set_by_the_user_are_kept() -> None:
    changes = {"name": "llava-hf/llava-1.5-7b-hf", "dtype": "bfloat16", "heads": ["1-2"]}
    spec = compose_spec(values("tiny", **changes), "tiny")
    assert (spec.dtype, spec.heads, spec.pad_to_square) == ("bfloat16", (Head(1, 2),), True)
    assert compose_spec(values("llava", dtype="float16"), "llava").dtype == "float16"


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"size": 7}, r"model\.size"), ({"heads": ["14"]}, r"model\.heads"), ({"heads": 5}, r"model\.heads")],
)
def test_invalid_model_options_are_named(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        compose_spec(values("tiny", **changes), "tiny")


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("llava-hf/llava-1.5-7b-hf", "llava-hf--llava-1.5-7b-hf"),
        ("/data/models/mine/", "mine-[0-9a-f]{8}"),
        ("./mine", "mine-[0-9a-f]{8}"),
        ("~/models/mine", "mine-[0-9a-f]{8}"),
        ("/data/my model", "my_model-[0-9a-f]{8}"),
        ("/", "-[0-9a-f]{8}"),
        ("..", ".+-[0-9a-f]{8}"),
    ],
)
def test_output_folder_of_a_model(name: str, folder: str) -> None:
    assert re.fullmatch(folder, model_folder(name))


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1))
def test_output_folders_stay_inside_their_parent(name: str) -> None:
    folder = model_folder(name)
    assert folder not in ("", ".", "..")
    assert "/" not in folder
    assert "\\" not in folder


def test_an_option_equal_to_the_chosen_file_is_kept_if_the_user_wrote_it(tmp_path: Path) -> None:
    """`tiny` is float32, but model.dtype=float32 with another checkpoint is a choice."""
    asked = values("tiny", name=str(tmp_path), dtype="float32")
    assert compose_spec(asked, "tiny", ["model.name=x"]).dtype == "auto"
    assert compose_spec(asked, "tiny", ["model.name=x", "model.dtype=float32"]).dtype == "float32"


def test_a_local_copy_of_a_known_checkpoint_keeps_its_settings(tmp_path: Path) -> None:
    spec = compose_spec(values("llava", name=str(tmp_path)), "llava", ["model=llava", f"model.name={tmp_path}"])
    assert (spec.name, spec.heads, spec.pad_to_square) == (str(tmp_path), known_specs()["llava"].heads, True)


def test_an_unknown_id_takes_the_settings_of_the_chosen_model() -> None:
    """A known one has settings of its own."""
    asked = ["model=llava", "model.name=x"]
    spec = compose_spec(values("llava", name="someone/tuned"), "llava", asked)
    assert spec == replace(known_specs()["llava"], name="someone/tuned")
    for name in ("llava-hf/llava-1.5-13b-hf", "liuhaotian/llava-v1.5-13b"):
        assert compose_spec(values("llava", name=name), "llava", asked) == known_specs()["llava-13b"]


def test_folders_of_equal_names_have_separate_outputs() -> None:
    assert ModelSpec("/a/llava").folder != ModelSpec("/b/llava").folder
    assert ModelSpec("/a/tiny").folder != "tiny"
