"""`stage=rank`: the ranking of `find` from stored statistics, without the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from front import Front, one_line, read_lines, stub_figures, write_data, write_lines

from localization_heads.lvlm.checkpoints import loading
from localization_heads.store.statistics import StatisticsStore, _digest, find_stores

ROOT = Path(__file__).parents[1]
DATA = "data_file=data.jsonl"
FIND = ("stage=find", DATA, "report=false")
FILES = ("heads.json", "heads.csv")


@pytest.fixture
def front(front: Front, monkeypatch: pytest.MonkeyPatch) -> Front:
    write_data(front.folder)
    stub_figures(monkeypatch)
    return front


def forbid_loading(patch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    patch.setattr(loading, "load_model", load)


def contents(folder: str = "outputs/localization_heads/tiny") -> list[bytes]:
    return [(Path(folder) / name).read_bytes() for name in FILES]


def test_rank_equals_find_byte_for_byte(front: Front) -> None:
    """For every option of the ranking, on statistics that `find` or `batch` stored once."""
    variants = [
        [], ["criteria.entropy=mass"], ["criteria.tau=0.05"],
        ["criteria.tau=0", "criteria.exclude_layers=0", "top_n=3"],
        ["criteria.elbow=index", "criteria.exclude_layers=1"], ["criteria.bottom_row_filter=true", "k=2"],
        ["num_trials=3", "num_samples=2", "random_seed=7"],
    ]  # fmt: skip
    expected = []
    for number, options in enumerate(variants):
        front.succeed(*FIND, *options, f"output_dir=fresh_{number}")
        expected.append(contents(f"fresh_{number}/tiny"))
    for first in ("find", "batch"):
        folder = f"output_dir={first}"
        front.succeed(f"stage={first}", DATA, folder)
        with pytest.MonkeyPatch.context() as patch:
            forbid_loading(patch)
            for options, files in zip(variants, expected, strict=True):
                front.succeed("stage=rank", DATA, folder, *options)
                assert contents(f"{first}/tiny") == files, options
        assert len(list(Path(f"{first}/tiny/statistics").glob("*.bin"))) == 1
    assert len({files[0] for files in expected}) == len(variants), "some option had no effect"


def test_needs_neither_torch_nor_transformers(front: Front) -> None:
    """In a process that cannot import them."""
    front.succeed(*FIND)
    before = contents()
    script = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from localization_heads.apps.finder import finder\n"
        f"sys.argv = ['finder', 'stage=rank', '{DATA}']; sys.exit(finder())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    assert contents() == before
    assert (front.out / "head_grid.png").read_bytes()[1:4] == b"PNG"


def test_reports_the_entries_that_find_reported(front: Front) -> None:
    """Same status, table and heads, even after `find` on another data set with the same store."""
    good = read_lines("data.jsonl")
    bad = [
        "{",
        {"id": "gone", "prompt": "the dog", "image_path": "no.png"},
        {**good[0], "id": "token", "prompt": "the <s> dog"},
        {**good[1], "id": "outside", "bbox": [1000.0, 1000.0, 1010.0, 1010.0]},
    ]
    write_lines(Path("bad.jsonl"), [*good, *bad])
    found = front.finder("stage=find", "data_file=bad.jsonl", "report=false")
    front.succeed(*FIND, "output_dir=outputs/localization_heads")
    assert found.status == 1
    expected = contents()
    with pytest.MonkeyPatch.context() as patch:
        forbid_loading(patch)
        ranked = front.finder("stage=rank", "data_file=bad.jsonl")
    assert ranked.status == 1
    assert contents() == expected
    for result in (found, ranked):
        assert "lies outside the image" in result.out
    headline, _, rest = found.out.partition("\n")  # printed before the model is loaded
    assert headline.split() == ["stage=find", "embedded", "bad.jsonl"]
    assert ranked.out == rest


def test_rank_refuses_entries_without_statistics(front: Front) -> None:
    """Another draw needs other samples: nothing is written until `find` has run."""
    front.succeed(*FIND, "num_samples=1", "num_trials=1")
    before = contents()
    assert "4 of the 5 entries drawn have no statistics" in front.error("stage=rank", DATA, status=1)
    assert contents() == before
    front.succeed(*FIND)
    front.succeed("stage=rank", DATA)


def test_options_that_the_statistics_depend_on_cannot_change(front: Front) -> None:
    """The error names the options under which they were made."""
    result = front.finder("stage=rank", DATA)
    assert (result.status, "none yet" in one_line(result.err)) == (2, True)
    front.succeed(*FIND, "conv_mode=plain")
    for option, stored in (
        ("criteria.threshold=0.001", "conv_mode=plain, criteria.threshold=mean"),
        ("criteria.means=2", "conv_mode=plain, criteria.means=1.0"),
        ("criteria.bottom_row_above=0.05", "conv_mode=plain, criteria.bottom_row_above=null"),
        ("query_token=expression_end", "conv_mode=plain, query_token=last"),
        ("model.system=Look.", "model.system=null, conv_mode=plain"),
    ):
        assert f"only with {stored})" in front.error("stage=rank", DATA, option)
    front.succeed("stage=rank", DATA, "conv_mode=plain")
    result = front.finder("stage=rank", DATA, "conv_mode=plain", "criteria.exclude_layers=99")
    assert "criteria.exclude_layers=99" in one_line(result.err)


def test_of_two_stores_with_other_weights_the_last_used_is_taken(front: Front) -> None:
    """With the same options and another fingerprint, only the model could tell which store is right."""
    front.succeed(*FIND)
    before = contents()
    (mine,) = find_stores(front.out / "statistics")
    store = mine.open()
    other = StatisticsStore(
        mine.folder,
        settings={**mine.settings, "weights": ["embedded", "others"]},
        num_layers=mine.num_layers,
        num_heads=mine.num_heads,
    )
    rows = store.rows(store.keys())
    other.append(
        store.keys(),
        rows.attention_sum[:][:, ::-1],
        rows.area_entropy[:][:, ::-1],
        rows.mass_entropy[:],
        rows.bottom_row_focus[:],
    )
    for path, age in ((store.path, 100), (other.path, 50)):
        header = path.with_suffix(".json")
        then = header.stat().st_mtime - age
        os.utime(header, (then, then))
    result = front.succeed("stage=rank", DATA)
    assert "taking the one used last" in result.err
    assert contents() != before
    assert front.finder(*FIND).status == 0  # opens its own store
    front.succeed("stage=rank", DATA)
    assert contents() == before


def test_invalid_store_headers_are_ignored(front: Front) -> None:
    """Other files, headers of an older version, too large ones, and impossible sizes."""
    front.succeed(*FIND)
    folder = front.out / "statistics"
    (sound,) = find_stores(folder)
    header = json.loads(next(folder.glob("*.json")).read_text())
    for number, content in enumerate(
        [
            "{", "[]", "[" * 100_000, json.dumps(header), json.dumps({**header, "layers": 10**12}), "{}",
            '{"settings": 1e999}', '{"settings": {"a": [Infinity]}}', '{"a": ' + "[" * 900 + "]" * 900 + "}",
        ]
    ):  # fmt: skip
        (folder / f"statistics-{number:016x}.json").write_text(content)
    (folder / "statistics-folder.json").mkdir()
    assert find_stores(folder) == [sound]
    for spoilt in ({"version": 1}, {"layers": 1 << 30}, {"heads": 0}, {"layers": True}, {"settings": []}):
        content = {**header, **spoilt}
        name = f"statistics-{_digest(content).hex()[:16]}.json"
        (folder / name).write_text(json.dumps(content))
    assert find_stores(folder) == [sound]
