"""Every family saved to a folder: it loads, with torchvision or without, and passes `doctor`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from family_models import FAMILY_NAMES, tiny
from safetensors.torch import load_file, save_file

from localization_heads.lvlm.checkpoints.loading import load_model
from localization_heads.lvlm.checks.doctor import examine
from localization_heads.lvlm.checks.footprints import coordinate_image


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_saved_family_loads_and_passes_doctor(name: str, tmp_path: Path) -> None:
    """Without torchvision, transformers itself would not load a processor with a video part at all."""
    lvlm = tiny(name)
    lvlm.processor.save_pretrained(tmp_path)
    lvlm.model.save_pretrained(tmp_path)
    loaded, image = load_model(str(tmp_path), device="cpu", conv_mode="plain"), coordinate_image(64, 48)
    found = examine(loaded, image, "the red car")
    assert found.is_well, (found.problem, found.check)
    if name in ("fast_vlm", "llava"):  # these pad by default when loaded
        return
    loaded.processor.tokenizer = lvlm.processor.tokenizer  # some families tokenize differently once saved
    expected, actual = lvlm.attend(image, "the dog"), loaded.attend(image, "the dog")
    assert actual.image_box == expected.image_box
    np.testing.assert_allclose(actual.attention, expected.attention, rtol=0, atol=1e-5)


def test_the_thinker_of_a_complete_omni_checkpoint(tmp_path: Path) -> None:
    """Checkpoints of Qwen-Omni have the language model beside other parts, under the prefix `thinker`."""
    lvlm = tiny("qwen2_5_omni_thinker")
    lvlm.processor.save_pretrained(tmp_path)
    lvlm.model.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    renamed = {f"thinker.{name}": value for name, value in load_file(weights).items()}
    save_file(renamed, weights, metadata={"format": "pt"})
    whole = {"model_type": "qwen2_5_omni", "thinker_config": json.loads(config.read_text())}
    config.write_text(json.dumps(whole))
    loaded, image = load_model(str(tmp_path), device="cpu", conv_mode="plain"), coordinate_image(64, 48)
    loaded.processor.tokenizer = lvlm.processor.tokenizer
    expected = lvlm.attend(image, "the dog").attention
    np.testing.assert_allclose(loaded.attend(image, "the dog").attention, expected, rtol=0, atol=1e-5)
