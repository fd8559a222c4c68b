"""`stage=rank`: what `find` would end with, from the statistics on disk and without the model."""

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


def forbid(patch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    patch.setattr(loading, "load_model", load)


def contents(folder: str = "outputs/localization_heads/tiny") -> list[bytes]:
    return [(Path(folder) / name).read_bytes() for name in FILES]


def test_equals_find_with_the_same_options(front: Front) -> None:
    """Byte for byte, for everything that the ranking chooses among; `find` or `batch` makes the statistics, once."""
    variants = [
        [], ["criteria.entropy=mass"], ["criteria.tau=0.05"],
        ["criteria.tau=0", "criteria.exclude_layers=0", "top_n=3"],
        ["criteria.elbow=index", "criteria.exclude_layers=1"], ["criteria.bottom_row_filter=true", "k=2"],
        ["num_trials=3", "num_samples=2", "random_seed=7"],
    ]  # fmt: skip
    expected = []
    for number, options in enumerate(variants):
        assert front.finder(*FIND, *options, f"output_dir=fresh_{number}").status == 0
        expected.append(contents(f"fresh_{number}/tiny"))
    for first in ("find", "batch"):
        folder = f"output_dir={first}"
        assert front.finder(f"stage={first}", DATA, folder).status == 0
        with pytest.MonkeyPatch.context() as patch:
            forbid(patch)
            for options, wanted in zip(variants, expected, strict=True):
                result = front.finder("stage=rank", DATA, folder, *options)
                assert result.status == 0, result.err
                assert contents(f"{first}/tiny") == wanted, options
        assert len(list(Path(f"{first}/tiny/statistics").glob("*.bin"))) == 1
    assert len({files[0] for files in expected}) == len(variants), "an option changed nothing"


def test_needs_neither_torch_nor_transformers(front: Front) -> None:
    """In a process that cannot import them; its figures are drawn."""
    assert front.finder(*FIND).status == 0
    before = contents()
    script = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from localization_heads.apps.finder import finder\n"
        f"sys.argv = ['finder', 'stage=rank', '{DATA}']; sys.exit(finder())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert contents() == before
    assert (front.out / "head_grid.png").read_bytes()[1:4] == b"PNG"


def test_reports_the_entries_that_find_reported(front: Front) -> None:
    """Same status, same table, same heads; also when another data set went through the store between."""
    good = read_lines("data.jsonl")
    bad = [
        "{",
        {"id": "gone", "prompt": "the dog", "image_path": "no.png"},
        {**good[0], "id": "token", "prompt": "the <s> dog"},
        {**good[1], "id": "outside", "bbox": [1000.0, 1000.0, 1010.0, 1010.0]},
    ]
    write_lines(Path("bad.jsonl"), [*good, *bad])
    found = front.finder("stage=find", "data_file=bad.jsonl", "report=false")
    assert front.finder(*FIND, "output_dir=outputs/localization_heads").status == 0
    assert found.status == 1
    expected = contents()
    with pytest.MonkeyPatch.context() as patch:
        forbid(patch)
        ranked = front.finder("stage=rank", "data_file=bad.jsonl")
    assert ranked.status == 1
    assert contents() == expected
    for result in (found, ranked):
        assert "lies outside the image" in result.out
    announced, _, told = found.out.partition("\n")  # before the model is loaded, which rank does without
    assert announced.split() == ["stage=find", "embedded", "bad.jsonl"]
    assert ranked.out == told


def test_entries_without_statistics_are_work_for_find(front: Front) -> None:
    """Another draw needs other samples: nothing is written, and the error says what to do."""
    assert front.finder(*FIND, "num_samples=1", "num_trials=1").status == 0
    before = contents()
    result = front.finder("stage=rank", DATA)
    assert result.status == 1
    assert "4 of the 5 entries drawn have no statistics" in one_line(result.err)
    assert contents() == before
    assert front.finder(*FIND).status == 0
    assert front.finder("stage=rank", DATA).status == 0


def test_other_settings_are_named(front: Front) -> None:
    """What the statistics depend on cannot be changed afterwards; the error says how they were made."""
    result = front.finder("stage=rank", DATA)
    assert (result.status, "none yet" in one_line(result.err)) == (2, True)
    assert front.finder(*FIND, "conv_mode=plain").status == 0
    for option, said in (
        ("criteria.threshold=0.001", "conv_mode=plain, criteria.threshold=mean"),
        ("criteria.means=2", "conv_mode=plain, criteria.means=1.0"),
        ("criteria.bottom_row_above=0.05", "conv_mode=plain, criteria.bottom_row_above=null"),
        ("query_token=expression_end", "conv_mode=plain, query_token=last"),
        ("model.system=Look.", "model.system=null, conv_mode=plain"),
    ):
        result = front.finder("stage=rank", DATA, option)
        assert result.status == 2
        assert f"only with {said})" in one_line(result.err)
    assert front.finder("stage=rank", DATA, "conv_mode=plain").status == 0
    result = front.finder("stage=rank", DATA, "conv_mode=plain", "criteria.exclude_layers=99")
    assert "criteria.exclude_layers=99" in one_line(result.err)


def test_of_other_weights_the_store_used_last_is_taken(front: Front) -> None:
    """The same options, another fingerprint: only the model could tell which is right; a note says so."""
    assert front.finder(*FIND).status == 0
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
    result = front.finder("stage=rank", DATA)
    assert result.status == 0
    assert "taking the one used last" in result.err
    assert contents() != before
    assert front.finder(*FIND).status == 0  # opens its own store
    assert front.finder("stage=rank", DATA).status == 0
    assert contents() == before


def test_what_is_no_header_is_passed_over(front: Front) -> None:
    """Files of others, of an older version, too large, or with sizes that nothing has."""
    assert front.finder(*FIND).status == 0
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
