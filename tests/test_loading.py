"""`load_model`: the embedded model, local folders, and every way that it cannot be."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import llava_model, llava_processor

from localization_heads.errors import UsageError, WorkError
from localization_heads.lvlm import loading
from localization_heads.lvlm.loading import load_model, pick_device
from localization_heads.lvlm.model import LVLM
from localization_heads.lvlm.spec import ModelSpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA saved as anyone would save one."""
    folder = tmp_path_factory.mktemp("models") / "my-llava"
    llava_model().save_pretrained(folder)
    llava_processor().save_pretrained(folder)
    return folder


def test_a_local_folder_gives_the_maps_of_the_model_in_it(folder: Path, picture: Image.Image) -> None:
    loaded = load_model(str(folder), device="cpu").attend(picture, "the red car")
    in_memory = LVLM(
        llava_model(), llava_processor(), ModelSpec("x"), system=loading.LLAVA_SYSTEM, conv_mode="referseg"
    )
    expected = in_memory.attend(picture, "the red car")
    np.testing.assert_allclose(loaded.attention, expected.attention, rtol=0, atol=1e-6)
    assert loaded.image_box == expected.image_box
    assert loaded.model == str(folder)


def test_pad_to_square_reaches_the_geometry(folder: Path, picture: Image.Image) -> None:
    """160 x 90 pixels: cropped to the middle square, or padded to a square of 160."""
    cropped = load_model(str(folder), device="cpu")
    padded = load_model(ModelSpec(str(folder), pad_to_square=True), device="cpu")
    assert cropped.attend(picture, "the dog").image_box[1::2] == (0.0, 90.0)
    assert cropped.attend(picture, "the dog").image_box[0] > 0
    assert padded.attend(picture, "the dog").image_box == (0.0, -35.0, 160.0, 125.0)


def test_facts_beside_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    """Its system sentence; the option comes before it; without any it is LLaVA's."""
    assert load_model(str(folder), device="cpu").system == loading.LLAVA_SYSTEM
    facts = folder / "localization_heads.json"
    facts.write_text(json.dumps({"system": "Look."}))
    try:
        assert load_model(str(folder), device="cpu").system == "Look."
        assert load_model(ModelSpec(str(folder), system=""), device="cpu").system == ""
    finally:
        facts.unlink()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype(folder: Path, dtype: str) -> None:
    assert load_model(str(folder), device="cpu", dtype=dtype).model.dtype == getattr(torch, dtype)


def test_the_embedded_model_is_the_default(lvlm: LVLM) -> None:
    assert lvlm.name == "embedded"
    assert not lvlm.model.training
    assert lvlm.num_layers == len(lvlm.attention_modules) > 2
    assert lvlm.num_heads >= 2
    assert lvlm.fingerprint


def test_the_fingerprint_changes_with_the_weights(folder: Path) -> None:
    before = load_model(str(folder), device="cpu").fingerprint
    llava_model(seed=1).save_pretrained(folder)
    assert load_model(str(folder), device="cpu").fingerprint != before
    llava_model().save_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpt2", "no Hugging Face id"),
        ("/no/such/folder", "no such folder"),
        ("./nothing", "no such folder"),
        ("~nobody-here/model", "no such folder"),
        ("a/b/c", "no such folder"),
    ],
)
def test_names_that_are_nothing(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        load_model(name)
    assert "model=tiny" in str(caught.value)


def test_an_id_that_is_not_here_names_the_ways_out() -> None:
    """Offline: the embedded model and a local folder."""
    with pytest.raises(WorkError) as caught:
        load_model("llava-hf/llava-1.5-7b-hf")
    message = str(caught.value)
    assert "\n" not in message
    for word in ("llava-hf/llava-1.5-7b-hf", "model=tiny", "model.name=/path/to/folder"):
        assert word in message


def test_broken_folders(tmp_path: Path, folder: Path) -> None:
    """No config, a config that is no JSON, another family, no weights: one line each."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no config\.json"):
        load_model(str(tmp_path / "empty"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    with pytest.raises(WorkError, match="broken"):
        load_model(str(broken))
    (broken / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UsageError, match="model type 'bert' has no image token"):
        load_model(str(broken))
    (broken / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(WorkError, match="broken") as caught:
        load_model(str(broken))
    assert "\n" not in str(caught.value)


def test_missing_weights_are_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers fills them with random numbers."""
    monkeypatch.setattr(logging.getLogger("localization_heads"), "propagate", True)
    target = shutil.copytree(folder, tmp_path / "holes")
    weights = load_file(target / "model.safetensors")
    gone = next(name for name in sorted(weights) if name.endswith("layers.1.self_attn.q_proj.weight"))
    save_file(
        {name: tensor for name, tensor in weights.items() if name != gone}, target / "model.safetensors"
    )
    load_model(str(target), device="cpu")
    assert "lacks 1 tensors" in caplog.text
    assert "q_proj.weight" in caplog.text


def test_truncated_weights(folder: Path, tmp_path: Path) -> None:
    """A download that was cut off is a failure of the work, in one line."""
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in folder.iterdir():
        content = file.read_bytes()
        (cut / file.name).write_bytes(content[:1000] if file.suffix == ".safetensors" else content)
    with pytest.raises(WorkError, match="cannot be") as caught:
        load_model(str(cut), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int8"}, r"model\.dtype=int8"),
        ({"quantization": "2bit"}, r"model\.quantization=2bit"),
        ({"conv_mode": "loud"}, "conv_mode=loud"),
        ({"device": "cuda:77"}, "device=cuda:77"),
        ({"device": "toaster"}, "device=toaster"),
    ],
)
def test_wrong_options(options: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_model(**options)  # type: ignore[arg-type]


def test_quantization_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    with pytest.raises(UsageError, match=r"pip install 'localization-heads\[quantization\]'"):
        load_model(quantization="4bit")


@pytest.mark.parametrize("device", ["-1", "1.5", "meta", "cpu:3", "", "99", 99])
def test_devices_that_this_machine_lacks(device: str | int) -> None:
    with pytest.raises(UsageError, match="device="):
        pick_device(device)


def test_devices_that_it_has() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device(None) == pick_device("auto")
