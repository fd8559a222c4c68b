"""Missing packages and unsupported versions: an error of one line, before anything is imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from front import Front, one_line
from tiny_models import save_llava

import localization_heads as lh
from localization_heads.apps.demo import __main__ as demo
from localization_heads.apps.frontdoor import CommandLine
from localization_heads.errors import WorkError
from localization_heads.lvlm.checkpoints.loading import load_model
from localization_heads.lvlm.checkpoints.sources import (
    check_torchvision,
    matching_torchvision,
    missing_package,
    torchvision_advice,
)
from localization_heads.options.groups import ModelSpec
from localization_heads.packages import GRADIO, REQUIRED, check_versions

QUANTIZED = {
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
        "AWQ, which needs a package that is missing or too old: pip install gptqmodel",
    ),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "pip install 'localization-heads[quantization]'",
    ),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        "GPTQ, which needs a package that is missing or too old: pip install gptqmodel optimum",
    ),
}
"""Quantization method -> its configuration, and the advice for a missing package."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("models"))


def load_error(spec: ModelSpec) -> str:
    with pytest.raises(WorkError) as caught:
        load_model(spec, device="cpu")
    assert "\n" not in str(caught.value)
    assert "families" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_weights_name_the_missing_package(method: str, folder: Path, tmp_path: Path) -> None:
    """The real errors of transformers, with none of the packages installed."""
    if method == "bitsandbytes" and find_spec(method):
        pytest.skip("bitsandbytes is installed")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config, advice = json.loads((folder / "config.json").read_text()), QUANTIZED[method][1]
    config["quantization_config"] = QUANTIZED[method][0]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert advice in load_error(ModelSpec(str(tmp_path)))


def test_flash_attention_names_its_package_and_an_alternative(folder: Path) -> None:
    message = load_error(ModelSpec(str(folder), attn_implementation="flash_attention_2"))
    assert "pip install flash-attn --no-build-isolation" in message
    assert "model.attn_implementation=sdpa" in message


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (ImportError("SmolVLM requires the num2words library"), "pip install num2words"),
        (ImportError("TimmWrapperModel requires the timm library"), "pip install --no-deps timm"),
        (ImportError("X requires the Torchvision library"), "pip install --no-deps torchvision==0."),
        (ValueError("needs torchvision"), "pip install --no-deps torchvision==0."),
        (ImportError("no sentencepiece"), None),
        (ValueError("awq"), None),
    ],
)
def test_import_errors_are_turned_into_advice(error: Exception, advice: str | None) -> None:
    found = missing_package(error)
    assert found is None if advice is None else advice in str(found)


@pytest.mark.parametrize(
    ("torch_version", "torchvision_version"),
    [
        ("2.6.0", "0.21.0"),
        ("2.7.1+cu128", "0.22.1"),
        ("2.13.0+cpu", "0.28.0"),
        ("2.14.0.dev20260101", None),
        ("1.13.1", None),
        ("3.0.0", None),
        ("", None),
    ],
)
def test_each_torch_has_a_matching_torchvision(torch_version: str, torchvision_version: str | None) -> None:
    assert matching_torchvision(torch_version) == torchvision_version


BROKEN = {
    "operators": "raise RuntimeError('operator torchvision::nms does not exist\\nlong tail')",
    "symbols": "raise ImportError('_C.so: undefined symbol: _ZN3c10')",
    "names": "raise AttributeError(\"module 'torch' has no attribute 'x'\")",
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_torchvision_is_named(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with this `__init__` and metadata, first on the path."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(BROKEN[fault])
    (tmp_path / "torchvision-0.20.1.dist-info").mkdir()
    (tmp_path / "torchvision-0.20.1.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.20.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    for work in (check_torchvision, lambda: load_model(device="cpu")):
        with pytest.raises(WorkError) as caught:
            work()
        message = str(caught.value)
        assert f"torchvision 0.20.1 does not fit torch {metadata.version('torch')}" in message
        assert torchvision_advice() in message
        assert "\n" not in message


def test_a_missing_torchvision_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localization_heads.lvlm.checkpoints.sources._version", lambda _: None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    check_torchvision()


ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _clear_cache() -> Iterator[None]:
    check_versions.cache_clear()
    yield
    check_versions.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda package: version if package == name else real(package))


@pytest.mark.parametrize(
    ("name", "installed", "required"),
    [
        ("torch", "2.5.1+cu121", "2.6 or newer: pip install 'torch>=2.6'"),
        ("accelerate", "1.2.0", "1.2.1 or newer: pip install 'accelerate>=1.2.1'"),
        *(
            ("transformers", version, "5.23 or newer and older than 6: pip install 'transformers>=5.23,<6'")
            for version in ("4.57.1", "5.0", "5.22.2", "6.0.0")
        ),
    ],
)
def test_an_unsupported_version_is_named_with_the_required_one(
    name: str, installed: str, required: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, name, installed)
    with pytest.raises(WorkError) as caught:
        lh.load_model  # noqa: B018 -- the attribute alone imports it
    assert str(caught.value) == f"{name} {installed} is installed, and this needs {required}"


@pytest.mark.parametrize("version", ["5.23.0", "5.24.1", "5.23.0.dev0", "5.100", "unknown"])
def test_a_supported_or_unreadable_version_passes(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "transformers", version)
    check_versions()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_not_found(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", raise_not_found)
    with pytest.raises(WorkError, match="torch is missing: pip install 'torch>=2"):
        check_versions()


def test_a_command_prints_one_line(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "transformers", "4.57.1")
    result = front.finder("stage=ground", "image_file=x.png", "query=dog")
    assert result.status == 1
    assert "transformers 4.57.1 is installed" in one_line(result.err)


def test_an_old_gradio_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fail while building the page."""
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    pretend(monkeypatch, "gradio", "5.49.1")
    with pytest.raises(WorkError, match=r"gradio 5\.49\.1 is installed, and this needs 6\.17 or newer"):
        demo._main(CommandLine(None, "tiny", ()))


def test_versions_are_checked_before_anything_is_imported() -> None:
    """An older transformers would raise an import error of its own."""
    code = (
        "import sys; from importlib import metadata; metadata.version = lambda _: '0.1'\n"
        "import localization_heads as lh\n"
        "try: lh.load_model\n"
        "except Exception as error: print(error)\n"
        "print(sorted({'torch', 'transformers', 'accelerate', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    first, second = done.stdout.splitlines()
    assert "torch 0.1 is installed" in first
    assert second == "[]"


def test_the_ranges_equal_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {f"{name}{required.specifier}" for name, required in REQUIRED.items()}
    assert declared <= set(project["dependencies"])
    assert project["optional-dependencies"]["demo"] == [f"gradio{GRADIO.specifier}"]
