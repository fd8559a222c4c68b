"""Untrusted checkpoints: Git LFS pointers, other formats, absurd sizes and malformed files are one-line errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_models import edit, save_llava
from tiny_sams import tiny_sam

from localization_heads.errors import UsageError, WorkError
from localization_heads.lvlm.checkpoints import files as checkpoint
from localization_heads.lvlm.checkpoints.files import (
    Weights,
    check_not_original_llava,
    check_size,
    weights_in,
)
from localization_heads.lvlm.checkpoints.loading import load_model
from localization_heads.segmentation.sam import FAMILIES, load_checkpoint

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 13476839424\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def error_of(folder: Path, kind: type[Exception] = UsageError) -> str:
    """The one-line error with which a folder is refused."""
    with pytest.raises(kind) as caught:
        load_model(str(folder), device="cpu")
    message = str(caught.value)
    assert message.startswith(f"model.name={folder}")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json", "extra.model"]
)
def test_git_lfs_pointers_are_refused(name: str, folder: Path) -> None:
    (folder / name).write_text(POINTER)
    message = error_of(folder, WorkError)
    assert f"{name} is a Git LFS pointer" in message
    assert "13,476.8 MB" in message
    assert "git lfs pull" in message


ORIGINAL = [
    # architecture, further settings, name of the folder, converted checkpoint
    ("LlavaLlamaForCausalLM", {}, "/data/llava-v1.5-13b", "llava-hf/llava-1.5-13b-hf"),
    ("LlavaLlamaForCausalLM", {"hidden_size": 4096}, "/data/mine", "llava-hf/llava-1.5-7b-hf"),
    ("LlavaLlamaForCausalLM", {"_name_or_path": "x/llava-v1.5-7b"}, "m", "llava-hf/llava-1.5-7b-hf"),
    (
        "LlavaMistralForCausalLM",
        {"hidden_size": 4096, "image_aspect_ratio": "anyres"},
        "m",
        "llava-hf/llava-v1.6-mistral-7b-hf",
    ),
    (
        "LlavaLlamaForCausalLM",
        {"hidden_size": 5120, "image_aspect_ratio": "anyres"},
        "m",
        "llava-hf/llava-v1.6-vicuna-13b-hf",
    ),
    (
        "LlavaLlamaForCausalLM",
        {"hidden_size": 7168, "image_aspect_ratio": "anyres"},
        "m",
        "llava-hf/llava-v1.6-34b-hf",
    ),
    ("LlavaQwenForCausalLM", {"hidden_size": 896}, "m", "llava-hf"),
]


@pytest.mark.parametrize(("architecture", "settings", "name", "converted"), ORIGINAL)
def test_original_llava_format_names_the_converted_checkpoint(
    architecture: str, settings: dict[str, Any], name: str, converted: str
) -> None:
    with pytest.raises(UsageError, match="original LLaVA format") as caught:
        check_not_original_llava({"architectures": [architecture], **settings}, f"model.name={name}")
    assert converted in str(caught.value)


def test_folders_in_the_original_llava_format_are_refused(folder: Path) -> None:
    """`model_type` is llava or llava_llama, and the sizes are at the top."""
    for model_type in ("llava", "llava_llama"):
        settings = {
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": model_type,
            "hidden_size": 4096,
            "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        }
        (folder / "config.json").write_text(json.dumps(settings))
        assert "model.name=llava-hf/llava-1.5-7b-hf" in error_of(folder)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("text_config", {"num_hidden_layers": 1_000_000}, "text_config.num_hidden_layers=1,000,000"),
        ("text_config", {"num_hidden_layers": 10**15}, "no model has that many"),
        ("vision_config", {"num_hidden_layers": 1_000_000}, "vision_config.num_hidden_layers=1,000,000"),
        ("text_config", {"num_hidden_layers": 60}, "num_hidden_layers=60, and its weights are those of 4"),
        ("vision_config", {"num_hidden_layers": 60}, "its weights are those of 4 layers"),
        ("text_config", {"hidden_size": 10**6}, "under text_config"),
        ("text_config", {"vocab_size": 10**9}, "3.2e+10 weights"),
        ("text_config", {"intermediate_size": 10**9}, "1.3e+11 weights"),
        ("text_config", {"head_dim": 10**9}, "weights"),
        ("vision_config", {"hidden_size": 10**8}, "under vision_config"),
        ("text_config", {"hidden_size": 10**4000}, "under text_config"),
        ("text_config", {"num_hidden_layers": 10**4000}, "no model has that many"),
    ],
)
def test_absurd_sizes_are_refused_before_the_model_is_built(
    part: str, changes: dict[str, int], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localization_heads.lvlm.checkpoints.loading._load_weights", lambda *_: pytest.fail("built"))
    edit(folder / "config.json", lambda config: config[part].update(changes))
    assert message in error_of(folder)


def test_sizes_that_differ_slightly_from_the_weights(folder: Path) -> None:
    """transformers' own error about mismatched shapes becomes one line, too."""
    edit(folder / "config.json", lambda config: config["text_config"].update(intermediate_size=64))
    assert "the sizes in config.json are not those of its weights" in error_of(folder, WorkError)


def test_a_configuration_without_language_model(folder: Path) -> None:
    """The defaults would be a random model of 7 billion weights."""
    edit(folder / "config.json", lambda config: config.pop("text_config"))
    assert "num_hidden_layers=32, and its weights are those of 4 layers" in error_of(folder)


def test_sizes_of_real_models_pass() -> None:
    """Quantized to 2 bits, and without downloaded weights."""
    text = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "vocab_size": 32064}
    config = {"text_config": {**text, "num_attention_heads": 32, "head_dim": 128}}
    check_size(config, Weights(num_bytes=7_000_000_000 // 4, max_index=31), "x")
    check_size(config, None, "x")
    with pytest.raises(UsageError, match=r"1\.4e\+09 weights .*8 MB"):  # 32 x 4096 x 11008
        check_size(config, Weights(num_bytes=8_000_000, max_index=None), "x")


def test_description_of_weights(folder: Path) -> None:
    size = (folder / "model.safetensors").stat().st_size
    assert weights_in(folder) == Weights(size, 3)
    (folder / "model.safetensors").write_bytes(b"cut off")
    assert weights_in(folder) == Weights(7, None)
    (folder / "model.safetensors").unlink()
    assert weights_in(folder) is None


def test_an_index_that_points_outside_the_folder(folder: Path) -> None:
    for name in ("../other/model.safetensors", "/etc/passwd", "a\\..\\..\\b"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        assert "names weights outside the folder" in error_of(folder)
    for text in ("[]", "{", '{"weight_map": [1]}', "[" * 100_000):
        (folder / "model.safetensors.index.json").write_text(text)
        load_model(str(folder), device="cpu")  # unused: the weights are in one file


def test_a_huge_tokenizer_file_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_JSON_BYTES", 2 << 20)
    (folder / "tokenizer.json").write_bytes(b" " * (3 << 20))
    assert "tokenizer.json has 3 MB" in error_of(folder)


@pytest.mark.parametrize(
    "text", ['{"model_type": "llava"', "[]", "3", "[" * 200_000, '{"a_config": ' * 900 + "{}" + "}" * 900]
)
def test_malformed_configurations(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    error_of(folder, WorkError)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "Expecting property name"),
        (b"[1]", "it should read"),
        (b'{"system": 3}', "it should read"),
        (b"\xff\xfe\xfa", "utf"),
        (b"[" * 200_000, "recursion"),
        (b'{"system": "' + b"a" * (1 << 20) + b'"}', "more than 1 MB"),
    ],
)
def test_malformed_facts_files(content: bytes, message: str, folder: Path) -> None:
    (folder / "localization_heads.json").write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        load_model(str(folder), device="cpu")
    assert str(caught.value).startswith(f"{folder}/localization_heads.json: ")
    assert "\n" not in str(caught.value)


def test_segmenter_checkpoints_follow_the_same_rules(tmp_path: Path) -> None:
    tiny_sam().save_pretrained(tmp_path)
    load_checkpoint(FAMILIES["sam"], str(tmp_path))
    settings = (tmp_path / "config.json").read_text()
    for layers in (1_000_000, 60):
        edit(tmp_path / "config.json", lambda d, n=layers: d["vision_config"].update(num_hidden_layers=n))
        with pytest.raises(UsageError, match=r"segmenter\.name=.*vision_config\.num_hidden_layers"):
            load_checkpoint(FAMILIES["sam"], str(tmp_path))
    (tmp_path / "config.json").write_text(settings)
    (tmp_path / "model.safetensors").write_text(POINTER)
    with pytest.raises(WorkError, match=r"segmenter\.name=.*model\.safetensors is a Git LFS pointer"):
        load_checkpoint(FAMILIES["sam"], str(tmp_path))
