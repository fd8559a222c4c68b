"""The three commands run in this process, in a folder of their own, with models that are loaded once."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hydra._internal.hydra import Hydra
from PIL import Image

from localization_heads.apps import commands, finder
from localization_heads.lvlm.checkpoints import loading

cached_load_model = cache(loading.load_model)


class Result(NamedTuple):
    """What a command ended with."""

    status: int
    out: str
    err: str


class Front:
    """The commands as a user of `folder` runs them."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.folder, self._patch, self._capture = folder, patch, capture
        patch.chdir(folder)
        patch.setenv("COLUMNS", "200")  # tables are not folded
        patch.setattr(loading, "load_model", cached_load_model)
        # Hydra composes the options once more only to learn whether they ask for a sweep; None says no.
        patch.setattr(Hydra, "get_mode", lambda *_, **__: None)

    @property
    def out(self) -> Path:
        """The embedded model's folder."""
        return Path("outputs/localization_heads/tiny")

    def json(self, name: str) -> Any:
        """A file that the last command wrote."""
        return json.loads((self.out / name).read_text(encoding="utf-8"))

    def lines(self, name: str = "predictions.jsonl") -> list[dict[str, Any]]:
        return read_lines(self.out / name)

    def finder(self, *options: str) -> Result:
        return self._run(finder.finder, ["device=cpu", *options])

    def succeed(self, *options: str) -> Result:
        """Run the finder, which must succeed."""
        result = self.finder(*options)
        assert result.status == 0, result.err
        return result

    def error(self, *options: str, status: int = 2) -> str:
        """Run the finder, which must fail with this exit status -> its error line."""
        result = self.finder(*options)
        assert result.status == status, result.err
        return one_line(result.err)

    def visualize(self, *options: str) -> Result:
        return self._run(commands.visualize, options)

    def chat(self, *options: str) -> Result:
        return self._run(commands.chat, ["device=cpu", *options])

    def _run(self, main: Callable[[], int], options: Sequence[str]) -> Result:
        self._patch.setattr(sys, "argv", ["program", *options])
        self._capture.readouterr()
        status = main()
        return Result(status, *self._capture.readouterr())


class Calls(list[list[str]]):
    """The expressions of every forward pass; Ctrl-C before the one numbered `fail_at`."""

    fail_at: int | None = None

    @property
    def sizes(self) -> list[int]:
        return [len(chunk) for chunk in self]

    def restart(self, fail_at: int | None = None) -> None:
        self.clear()
        self.fail_at = fail_at


def fronts(folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> Iterator[Front]:
    """A `Front`; afterwards the package's log goes where other tests expect it."""
    package = logging.getLogger("localization_heads")
    handlers, propagate, level = list(package.handlers), package.propagate, package.level
    yield Front(folder, patch, capture)
    package.handlers[:], package.propagate = handlers, propagate
    package.setLevel(level)


def draw_image(path: Path, seed: int = 0, size: tuple[int, int] = (64, 48)) -> Path:
    """An image of smooth noise: every seed another one."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def write_lines(path: Path, entries: Sequence[Mapping[str, Any] | str]) -> Path:
    """A data file; a text stands for a line as it is."""
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries))
    return path


def read_lines(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


EXPRESSIONS = ["the dog", "the red car on the left", "the cat", "What is in this image?", "the boat"]


def write_data(folder: Path, count: int = 5, **extra: Any) -> Path:
    """`data.jsonl` with images beside it."""
    entries = []
    for number in range(count):
        image = draw_image(folder / f"image_{number}.png", number)
        prompt = EXPRESSIONS[number % len(EXPRESSIONS)]
        entries.append({"id": f"entry_{number}", "prompt": prompt, "image_path": image.name, **extra})
    return write_lines(folder / "data.jsonl", entries)


def one_line(err: str) -> str:
    """The one line of an error without notes; fails if there is more, such as a traceback."""
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: "), err
    return lines[0]


def stub_figures(patch: pytest.MonkeyPatch) -> None:
    """Empty files in place of figures, for tests that are not about them and draw many."""
    from localization_heads import figures

    def target_of(*arguments: Any, **_: Any) -> None:
        for path in arguments:
            if isinstance(path, Path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"stub")

    def once(plot: Any, *arguments: Any, path: Path, **_: Any) -> None:
        target_of(path)

    for name in figures.__all__:
        patch.setattr(figures, name, once if name == "plot_once" else target_of)
