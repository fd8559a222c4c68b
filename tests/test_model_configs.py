"""`config/model/`: every file composes, agrees with its family, and lists only published heads."""

from __future__ import annotations

import re
from importlib.resources import files
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from transformers import AutoConfig

from localization_heads.errors import UsageError
from localization_heads.lvlm.checkpoints.loading import load_model
from localization_heads.lvlm.checkpoints.spec import (
    EMBEDDED,
    KNOWN_SHAPES,
    compose_spec,
    find_known_shape,
    find_spec,
    known_specs,
)
from localization_heads.lvlm.families.table import FAMILIES, family_defaults
from localization_heads.options import compose
from localization_heads.options.groups import ConvMode, ModelSpec
from localization_heads.options.programs import FinderOptions
from localization_heads.stages.run import Run

FOLDER = files("localization_heads") / "config" / "model"
PUBLISHED = {"llava": ["14-24", "14-13", "14-26"], "llava-13b": ["15-39", "16-30", "7-2"]}  # Fig. 6a
STEMS = sorted(known_specs())
MODEL_TYPES = {stem: stem.replace("-", "_") for stem in STEMS} | {
    "cosmos3-nano": "cosmos3_omni",
    "deepseek-vl": "deepseek_vl_hybrid",
    "deepseek-vl-1_3b": "deepseek_vl",
    "ernie4_5-vl": "ernie4_5_vl_moe",
    "gemma4-12b": "gemma4_unified",
    "glm4_5v": "glm4v_moe",
    "glm4_6v": "glm46v",
    "hyperclovax": "hyperclovax_vision_v2",
    "inkling": "inkling_mm_model",
    "internvl-1b": "internvl",
    "internvl3_5": "internvl",
    "janus-1b": "janus",
    "kimi-k2_5": "kimi_k25",
    "llava-13b": "llava",
    "llava-next-mistral": "llava_next",
    "llava-onevision-0_5b": "llava_onevision",
    "minicpm-v4_6": "minicpmv4_6",
    "minicpm-v4_7": "minicpmv4_7",
    "north-micro-vision": "cohere_compass",
    "paligemma2": "paligemma",
    "pixtral": "llava",
    "qwen2-vl-2b": "qwen2_vl",
    "qwen2_5-omni": "qwen2_5_omni_thinker",
    "qwen2_5-vl-3b": "qwen2_5_vl",
    "qwen3-omni": "qwen3_omni_moe_thinker",
    "qwen3-vl-30b": "qwen3_vl_moe",
    "qwen3-vl-4b": "qwen3_vl",
    "qwen3_5-35b": "qwen3_5_moe",
    "smolvlm-256m": "idefics3",
    "tiny": "llava",
    "video-llama3": "video_llama_3",
    "vip-llava": "vipllava",
}
"""The `model_type` of each checkpoint's configuration."""


def composed(*overrides: str) -> FinderOptions:
    found = compose.compose_options("finder", *overrides)
    assert isinstance(found, FinderOptions)
    return found


@pytest.mark.parametrize("stem", STEMS)
def test_a_file_composes_with_and_without_hydra(stem: str) -> None:
    options = composed(f"model={stem}")
    assert compose_spec(options.model, stem) == known_specs()[stem] == find_spec(stem)
    spec = known_specs()[stem]
    assert spec.label == stem
    assert spec.conv_mode in get_args(ConvMode)
    assert spec.name == EMBEDDED or re.fullmatch(r"[\w.-]+/[\w.-]+", spec.name)
    assert find_spec(spec.name) == spec


@pytest.mark.parametrize("stem", STEMS)
def test_a_file_begins_with_a_comment_and_a_name(stem: str) -> None:
    text = (FOLDER / f"{stem}.yaml").read_text(encoding="utf-8")
    assert re.match(r"# \w.*\.\ndefaults:\n  - base\n  - _self_\n\nname: ", text)


def test_only_published_heads_are_listed() -> None:
    found = {
        stem: [f"{h.layer}-{h.head}" for h in spec.heads]
        for stem, spec in known_specs().items()
        if spec.heads and stem != "tiny"  # measured in this project
    }
    assert found == PUBLISHED


def test_names_are_unique() -> None:
    names = [spec.name for spec in known_specs().values()]
    assert len(set(names)) == len(names)


def test_every_family_has_a_file() -> None:
    assert sorted(MODEL_TYPES) == STEMS  # no entry for a file that is gone
    assert set(MODEL_TYPES.values()) == set(FAMILIES) - {"glmga"}  # of which no checkpoint is known


@pytest.mark.parametrize("stem", [s for s in STEMS if not callable(FAMILIES[MODEL_TYPES[s]].defaults)])
def test_files_and_families_agree(stem: str) -> None:
    """So a copy of a checkpoint in a folder is prompted like the checkpoint."""
    spec = known_specs()[stem]
    options = {name: getattr(spec, name) for name in ("conv_mode", "native_box", "pad_to_square")}
    given = {name: value for name, value in options.items() if value is not None}
    assert given == FAMILIES[MODEL_TYPES[stem]].defaults


VICUNA, YI = {"model_type": "llama", "vocab_size": 32064}, {"model_type": "llama", "vocab_size": 64064}
CLIP, SIGLIP = {"model_type": "clip_vision_model"}, {"model_type": "siglip_vision_model"}


@pytest.mark.parametrize(
    ("model_type", "text", "vision", "defaults"),
    [
        ("llava", VICUNA, CLIP, {"conv_mode": "referseg", "pad_to_square": True}),
        ("llava", {"model_type": "qwen2"}, SIGLIP, {"conv_mode": "chat"}),
        ("llava", {"model_type": "mistral"}, {"model_type": "pixtral"}, {"conv_mode": "chat"}),
        ("llava_next", VICUNA, CLIP, {"conv_mode": "referseg"}),
        ("llava_next", YI, CLIP, {"conv_mode": "chat"}),  # LLaVA-1.6-34B
        ("llava_next", {"model_type": "mistral"}, CLIP, {"conv_mode": "chat"}),
        ("paligemma", {"model_type": "gemma"}, SIGLIP, {"conv_mode": "plain", "native_box": "paligemma"}),
        (
            "paligemma",
            {"model_type": "gemma2"},
            SIGLIP,
            {"conv_mode": "plain", "native_box": "paligemma", "attn_implementation": "eager"},
        ),
    ],
)
def test_defaults_that_depend_on_the_configuration(
    model_type: str, text: dict[str, Any], vision: dict[str, Any], defaults: dict[str, Any]
) -> None:
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision)
    assert family_defaults(config) == defaults


def test_defaults_of_shared_rows_and_unknown_families() -> None:
    assert family_defaults(SimpleNamespace(model_type="glm4v_moe")) == FAMILIES["glm4v"].defaults
    assert family_defaults(SimpleNamespace(model_type="novel")) == {}


def test_shapes_of_checkpoints_with_known_heads() -> None:
    assert set(KNOWN_SHAPES) == {stem for stem, spec in known_specs().items() if spec.heads}
    llava = AutoConfig.for_model("llava", text_config=VICUNA)  # the defaults are those of LLaVA-1.5-7B
    assert find_known_shape(llava) == "llava"
    llava.text_config.num_hidden_layers, llava.text_config.num_attention_heads = 40, 40
    assert find_known_shape(llava) is None
    llava.text_config.hidden_size = 5120
    assert find_known_shape(llava) == "llava-13b"


def test_any_option_can_be_overridden() -> None:
    options = composed("model=qwen3-vl", "model.dtype=bfloat16", "model.conv_mode=plain", "model.heads=[3-1]")
    spec = compose_spec(options.model, "qwen3-vl")
    assert (spec.dtype, spec.conv_mode, list(map(str, spec.heads))) == ("bfloat16", "plain", ["L3H1"])


def test_a_checkpoint_without_a_file() -> None:
    spec = compose_spec(
        composed("model.name=someone/some-model", "model.dtype=float16").model,
        "tiny",
        ["model.name=someone/some-model", "model.dtype=float16"],
    )
    assert spec == ModelSpec("someone/some-model", dtype="float16")
    with pytest.raises(UsageError, match=r"model\.name=null"):
        composed("model.name=null")


def test_conv_mode_comes_from_the_model_unless_given() -> None:
    spec = find_spec("tiny")
    chatty = ModelSpec(EMBEDDED, conv_mode="chat")
    assert load_model(ModelSpec(EMBEDDED), device="cpu").conv_mode == "referseg"
    assert load_model(spec, device="cpu").conv_mode == spec.conv_mode == "referseg"
    assert load_model(chatty, device="cpu").conv_mode == "chat"
    assert load_model(chatty, device="cpu", conv_mode="plain").conv_mode == "plain"


def test_conv_mode_option_overrides_the_file() -> None:
    assert Run(composed("device=cpu")).lvlm.conv_mode == "referseg"
    assert Run(composed("device=cpu", "model.conv_mode=plain")).lvlm.conv_mode == "plain"
    assert Run(composed("device=cpu", "model.conv_mode=plain", "conv_mode=chat")).lvlm.conv_mode == "chat"
