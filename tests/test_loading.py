"""`load_model`: the embedded model, local folders, defaults of families, fingerprints, and one-line errors."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from family_models import tiny
from front import Front
from PIL import Image
from safetensors.torch import load_file, save_file
from test_model_configs import composed
from tiny_models import llava_model, llava_processor, save_llava

from localization_heads.errors import UsageError, WorkError
from localization_heads.heads.head import Head
from localization_heads.lvlm import fingerprint
from localization_heads.lvlm.checkpoints import loading
from localization_heads.lvlm.checkpoints.loading import load_model, pick_device
from localization_heads.lvlm.checkpoints.spec import find_spec, known_specs
from localization_heads.lvlm.model import LVLM
from localization_heads.options.groups import ModelSpec
from localization_heads.stages.run import Run
from localization_heads.stages.statistics import open_statistics


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("models") / "my-llava")


def test_a_local_folder_gives_the_maps_of_the_model_in_it(folder: Path, image: Image.Image) -> None:
    loaded = load_model(str(folder), device="cpu").attend(image, "the red car")
    padded = llava_processor(mode="pad")
    in_memory = LVLM(llava_model(), padded, ModelSpec("x"), system=loading.LLAVA_SYSTEM, conv_mode="referseg")
    expected = in_memory.attend(image, "the red car")
    np.testing.assert_allclose(loaded.attention, expected.attention, rtol=0, atol=1e-6)
    assert loaded.image_box == expected.image_box
    assert loaded.model == str(folder)


def test_pad_to_square_reaches_the_geometry(folder: Path, image: Image.Image) -> None:
    """160 x 90 pixels: cropped to the middle square, or padded to a square of 160, as LLaVA-1.5 needs it."""
    cropped = load_model(ModelSpec(str(folder), pad_to_square=False), device="cpu")
    assert cropped.attend(image, "the dog").image_box[1::2] == (0.0, 90.0)
    assert cropped.attend(image, "the dog").image_box[0] > 0
    for padding in (True, None):
        padded = load_model(ModelSpec(str(folder), pad_to_square=padding), device="cpu")
        assert padded.attend(image, "the dog").image_box == (0.0, -35.0, 160.0, 125.0)
        assert padded.spec.pad_to_square


def saved_family(name: str, folder: Path) -> str:
    lvlm = tiny(name)
    lvlm.processor.save_pretrained(folder)
    lvlm.model.save_pretrained(folder)
    return str(folder)


TEMPLATE = "{% for m in messages %}{% for c in m['content'] %}{{ c.get('text', IMAGE) }} {% endfor %}{% endfor %}"


def test_conv_mode_follows_the_family(tmp_path: Path) -> None:
    """A Qwen in a folder uses its chat template if it has one, else the paper's prompt; the user's choice wins."""
    source = saved_family("qwen2_vl", tmp_path)
    assert load_model(source, device="cpu").conv_mode == "referseg"
    image = tiny("qwen2_vl").image_text
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE.replace("IMAGE", repr(image)))
    lvlm = load_model(source, device="cpu")
    assert (lvlm.conv_mode, lvlm.spec.native_box) == ("chat", "qwen2")
    assert lvlm.prompt("the dog").startswith(f"{image} the dog")
    assert load_model(source, device="cpu", conv_mode="plain").conv_mode == "plain"
    assert load_model(ModelSpec(source, conv_mode="referseg"), device="cpu").conv_mode == "referseg"


def test_like_applies_the_settings_of_a_known_model(folder: Path, package_log: pytest.LogCaptureFixture) -> None:
    """Its heads, prompt and padding; with a note if the shapes show that it is another model."""
    known = known_specs()["llava"]
    for like in ("llava", "llava-hf/llava-1.5-7b-hf", "liuhaotian/llava-v1.5-7b"):
        lvlm = load_model(str(folder), like=like, device="cpu")
        assert lvlm.spec == replace(known, name=str(folder))
    assert "has 4 layers of 4 heads and no L14H24" in package_log.text
    assert [note for note in lvlm.notes if "no L14H24" in note]
    assert load_model(str(folder), device="cpu").notes == []
    with pytest.raises(UsageError, match=r"like=lava: .*did you mean llava\?"):
        load_model(str(folder), like="lava")
    with pytest.raises(UsageError, match=r"like=gpt: .*choose one of aya-vision"):
        load_model(str(folder), like="gpt")


def test_a_folder_with_the_shape_of_a_known_checkpoint_is_noted(
    tmp_path: Path, package_log: pytest.LogCaptureFixture
) -> None:
    """A copy of the embedded model: a note says how to use its heads, unless the user has named heads."""
    copy = shutil.copytree(files("localization_heads") / "lvlm" / "embedded", tmp_path / "copy")
    lvlm = load_model(str(copy), device="cpu")
    assert (lvlm.known_heads, lvlm.system) == ((), load_model(device="cpu").system)
    (note,) = lvlm.notes
    assert "has the shape of embedded" in note
    assert f"model=tiny model.name={copy}" in note
    assert f'load_model("{copy}", like="tiny")' in note
    assert note in package_log.text
    informed = load_model(str(copy), like="tiny", device="cpu")
    assert (informed.notes, informed.known_heads) == ([], find_spec("tiny").heads)
    assert load_model(ModelSpec(str(copy), heads=(Head(1, 1),)), device="cpu").notes == []


def test_system_sentence_of_a_checkpoint_folder(folder: Path, tmp_path: Path) -> None:
    """The option takes precedence over the folder's; without either, it is LLaVA's."""
    assert load_model(str(folder), device="cpu").system == loading.LLAVA_SYSTEM
    facts = folder / "localization_heads.json"
    facts.write_text(json.dumps({"system": "Look."}))
    try:
        assert load_model(str(folder), device="cpu").system == "Look."
        assert load_model(ModelSpec(str(folder), system=""), device="cpu").system == ""
    finally:
        facts.unlink()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_of_loaded_weights(folder: Path, dtype: str) -> None:
    assert load_model(str(folder), device="cpu", dtype=dtype).model.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_large_weights_show_progress(
    folder: Path,
    limit: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A progress bar, and a warning about the copy that a conversion makes; neither for small weights."""
    monkeypatch.setattr(loading, "LARGE_BYTES", limit)
    load_model(str(folder), dtype="bfloat16", device="cpu")
    err = capsys.readouterr().err
    assert ("Loading weights" in err) == (limit == 0)
    assert "torchvision" not in err
    assert ("saved as float32, and converting them makes a copy" in caplog.text) == (limit == 0)
    caplog.clear()
    load_model(str(folder), dtype="float32", device="cpu")
    assert "converting" not in caplog.text


def test_a_command_prints_its_inputs_before_loading(front: Front) -> None:
    """Stage, folder and image are printed even if the folder turns out to be broken."""
    Path("model").mkdir()
    Path("model/config.json").write_text("{")
    Image.new("RGB", (8, 8)).save("a.png")
    result = front.finder("stage=ground", "model.name=model", "image_file=a.png", "query=the dog")
    assert (result.status, result.out.split()) == (1, ["stage=ground", "model", "a.png"])
    assert "model.name=model" in result.err


def test_the_embedded_model_is_the_default(lvlm: LVLM) -> None:
    assert lvlm.name == "embedded"
    assert not lvlm.model.training
    assert lvlm.num_layers == len(lvlm.attention_modules) > 2
    assert lvlm.num_heads >= 2
    assert lvlm.fingerprint


def flip_last_bit(path: Path) -> None:
    """Of a weight."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def fingerprint_of(name: str | Path) -> str:
    return load_model(str(name), device="cpu").fingerprint


def test_fingerprint_depends_on_weights_not_on_files(folder: Path, tmp_path: Path) -> None:
    """It survives a new modification time, a copy and sharding; one changed bit changes it."""
    before = fingerprint_of(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    os.utime(copy / "model.safetensors", (1, 1))
    assert fingerprint_of(copy) == before
    shutil.copytree(folder, tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors").unlink()
    llava_model().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    parts = sorted((tmp_path / "shards").glob("*-of-*.safetensors"))
    assert len(parts) > 1
    assert fingerprint_of(tmp_path / "shards") == before
    flip_last_bit(parts[-1])
    flip_last_bit(copy / "model.safetensors")
    changed = {fingerprint_of(copy), fingerprint_of(tmp_path / "shards")}
    assert before not in changed


def test_fingerprint_depends_on_settings(folder: Path, tmp_path: Path) -> None:
    """Configuration, processor and chat template affect the maps as well."""
    found = {fingerprint_of(folder)}
    for file, path, value in (
        ("config.json", ("text_config", "rms_norm_eps"), 0.5),
        ("processor_config.json", ("image_processor", "image_mean"), [0, 0, 0]),
    ):
        copy = shutil.copytree(folder, tmp_path / file)
        settings = json.loads((copy / file).read_text())
        settings[path[0]][path[1]] = value
        (copy / file).write_text(json.dumps(settings))
        found.add(fingerprint_of(copy))
    copy = shutil.copytree(folder, tmp_path / "template")
    (copy / "chat_template.jinja").write_text(TEMPLATE.replace("IMAGE", "'<image>'"))
    assert len(found | {fingerprint_of(copy)}) == 4


def test_fingerprint_of_large_models_samples_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every value, since training changes nearly all values of a tensor."""
    monkeypatch.setattr(fingerprint, "READ_WHOLE_BELOW", 0)
    model, processor = llava_model(), llava_processor()
    found = {fingerprint.fingerprint(model, processor)}
    assert fingerprint.fingerprint(llava_model(), processor) in found
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += 1e-3
            found.add(fingerprint.fingerprint(model, processor))
    assert len(found) == 1 + len(list(model.parameters()))
    large = torch.zeros(100, 1000)
    first = fingerprint._bytes(large, whole=False)
    assert len(first) == 4 * 4096
    for place in (0, -1):  # the sample includes both ends
        changed = large.clone()
        changed.view(-1)[place] = 1
        assert fingerprint._bytes(changed, whole=False) != first


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_give_the_same_fingerprint_and_maps(
    where: str, lvlm: LVLM, image: Image.Image, tmp_path: Path
) -> None:
    """As with a `device_map` that leaves weights in main memory or on disk."""
    offloaded = load_model(device="cpu")
    accelerate = pytest.importorskip("accelerate")
    if where == "disk":
        accelerate.disk_offload(offloaded.model, tmp_path, execution_device="cpu")
    else:
        accelerate.cpu_offload(offloaded.model, execution_device="cpu")
    assert any(parameter.is_meta for parameter in offloaded.model.parameters())
    assert offloaded.fingerprint == lvlm.fingerprint
    # Each layer's weights move to the device when it runs.
    assert offloaded.device == torch.device("cpu")
    maps, expected = offloaded.attend(image, "the dog"), lvlm.attend(image, "the dog")
    np.testing.assert_array_equal(maps.attention, expected.attention)
    (shared,) = offloaded.encode_image(image).attend(["the dog"])
    np.testing.assert_allclose(shared.attention, expected.attention, rtol=0, atol=1e-5)


def test_an_updated_hub_checkpoint_gets_new_statistics(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two commits in the hub's cache have different fingerprints, equal to those of folders with the same weights."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--me--my-llava"
    update = cache / "snapshots" / ("b" * 40)
    shutil.copytree(folder, cache / "snapshots" / ("a" * 40))
    shutil.copytree(folder, update)
    flip_last_bit(update / "model.safetensors")
    (cache / "refs").mkdir()
    stores, prints = [], []
    for commit in ("a", "b"):
        (cache / "refs" / "main").write_text(commit * 40)
        run = Run(composed("stage=find", "device=cpu", "model.name=me/my-llava", f"output_dir={tmp_path}/out"))
        stores.append(open_statistics(run).path)
        prints.append(run.lvlm.fingerprint)
    assert prints == [fingerprint_of(folder), fingerprint_of(update)]
    assert stores[0] != stores[1]


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
def test_names_of_no_checkpoint_are_refused(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        load_model(name)
    assert "model=tiny" in str(caught.value)


def test_an_uncached_hub_id_offline_names_alternatives() -> None:
    with pytest.raises(WorkError) as caught:
        load_model("llava-hf/llava-1.5-7b-hf")
    message = str(caught.value)
    assert "\n" not in message
    for word in ("llava-hf/llava-1.5-7b-hf", "model=tiny", "model.name=/path/to/folder"):
        assert word in message


def test_broken_folders_are_one_line_errors(tmp_path: Path, folder: Path) -> None:
    """No config, malformed JSON, a text model, no weights, truncated weights."""
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
    truncated = shutil.copytree(folder, tmp_path / "truncated")
    weights = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(weights[:1000])
    for path in (broken, truncated):
        with pytest.raises(WorkError, match=f"{path.name} cannot be") as caught:
            load_model(str(path), device="cpu")
        assert "\n" not in str(caught.value)


def test_missing_weights_are_a_warning(folder: Path, tmp_path: Path, package_log: pytest.LogCaptureFixture) -> None:
    """transformers initialises them at random."""
    target = shutil.copytree(folder, tmp_path / "holes")
    weights = load_file(target / "model.safetensors")
    gone = next(name for name in sorted(weights) if name.endswith("layers.1.self_attn.q_proj.weight"))
    save_file({name: tensor for name, tensor in weights.items() if name != gone}, target / "model.safetensors")
    load_model(str(target), device="cpu")
    assert "lacks 1 tensors" in package_log.text
    assert "q_proj.weight" in package_log.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int8"}, r"model\.dtype=int8"),
        ({"quantization": "2bit"}, r"model\.quantization=2bit"),
        ({"conv_mode": "loud"}, "conv_mode=loud: choose one of referseg, chat, plain"),
        ({"query_token": "first"}, "query_token=first: choose one of last"),
        ({"view": "thumbnail"}, "view=thumbnail: choose one of combined"),
        ({"device": "cuda:77"}, "device=cuda:77"),
        ({"device": "toaster"}, "device=toaster"),
    ],
)
def test_invalid_options_are_named(options: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_model(**options)  # type: ignore[arg-type]


def test_quantization_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_bitsandbytes_available", lambda: False)
    with pytest.raises(UsageError, match=r"pip install 'localization-heads\[quantization\]'"):
        load_model(quantization="4bit")


@pytest.mark.parametrize("device", ["-1", "1.5", "meta", "cpu:3", "", "99", 99])
def test_unavailable_devices_are_refused(device: str | int) -> None:
    with pytest.raises(UsageError, match="device="):
        pick_device(device)


def test_available_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device(None) == pick_device("auto")
