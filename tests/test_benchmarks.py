"""Benchmarks: their formulas agree with hand calculation and torch's FLOP counter, and every benchmark runs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as command
from benchmarks import aggregation, boxes, few_labels, floor, gpu, loading, machine, second_look, timing
from benchmarks.discovery import LIMIT
from benchmarks.floor import Shape, Work
from benchmarks.gpu import Fact, markdown_table
from benchmarks.memory import peak_bytes
from benchmarks.models import EXPRESSIONS, QUICK, eager, random_llava, sample_image
from benchmarks.result import BEGIN, END, cells, replace_table, timed_row
from benchmarks.setting import Setting
from benchmarks.sharing import assert_maps_agree, token_counts
from benchmarks.timing import MIN_ROUNDS, Timings, time_interleaved
from localization_heads.heads.head import Head

CPU = torch.device("cpu")
SMALL = Shape(3, 2, 3, 1, 2, 2, 5, 1, side=4, patch=2)


@pytest.fixture(scope="module")
def small() -> Any:
    return random_llava(QUICK, CPU, torch.float32)


# ------------------------------------------------------------------------------------------------------ the floor


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        # 3 tokens, 4 in, 5 out: 60 multiplications and 60 additions; 20 weights
        (floor.linear(3, 4, 5), Work(120, 2 * 20)),
        (floor.linear(3, 4, 5, width=4), Work(120, 4 * 20)),
        # 2 tokens, hidden size 2, MLP 3, and 3 query-key pairs; or 13 of them after 5 cached tokens
        (floor.decoder_layer(SMALL, 2), Work(4 * 16 + 3 * 24 + 4 * 3 * 2, 2 * (4 * 4 + 3 * 6))),
        (floor.decoder_layer(SMALL, 2, before=5), Work(4 * 16 + 3 * 24 + 4 * 13 * 2, 2 * 34)),
        # keys of 2 tokens, one query, its scores with 2 keys; two matrices of 4 weights
        (floor.last_row(SMALL, 2), Work(16 + 8 + 8, 2 * 8)),
        # 4 patches of 12 numbers; one of the two vision layers, over 5 tokens; the projector's two matrices
        (
            floor.vision(SMALL),
            Work(2 * 4 * 12 * 2, 2 * 24)
            + Work(4 * 2 * 5 * 2 * 2 + 2 * 2 * 5 * 2 * 5 + 4 * 25 * 2, 2 * (4 * 4 + 2 * 10))
            + 2 * Work(2 * 4 * 2 * 2, 2 * 4),
        ),
    ],
)
def test_work_by_hand(work: Work, expected: Work) -> None:
    assert work == expected


def test_causal_pairs_by_hand() -> None:
    """1 + 2 + 3 for three tokens; 11 + 12 + 13 after ten cached ones."""
    assert [floor.causal_pairs(3), floor.causal_pairs(3, 10), floor.causal_pairs(0, 9)] == [6, 36, 0]


def test_capture_stops_at_the_deepest_layer() -> None:
    """Two whole layers and the row of the third; with `last_layer=0`, only the row of the first."""
    below, row = floor.decoder_layer(SMALL, 7), floor.last_row(SMALL, 7)
    assert floor.capture_work(SMALL, 7) == floor.vision(SMALL) + 2 * below + row
    assert floor.capture_work(SMALL, 7, last_layer=0) == floor.vision(SMALL) + row


def test_shared_capture_adds_only_the_suffixes() -> None:
    shape = Shape()
    alone = floor.capture_work(shape, 610)
    one, seven = (floor.shared_capture_work(shape, 600, [10] * n) for n in (1, 7))
    assert one.flops == pytest.approx(alone.flops, rel=1e-3)
    assert seven.bytes == one.bytes
    assert alone.flops < seven.flops < 1.2 * alone.flops


def test_default_shape_has_llava_7bs_number_of_weights() -> None:
    """6.48e9 in the decoder layers (Vicuna-7B has 6.74e9 with its embeddings), 0.3e9 in the vision tower."""
    layers = 32 * floor.decoder_layer(Shape(), 1)
    assert layers.bytes / 2 == pytest.approx(6.48e9, rel=0.001)
    assert floor.vision(Shape()).bytes / 2 == pytest.approx(0.303e9 * 23 / 24 + 0.021e9, rel=0.02)


def test_formulas_agree_with_torchs_flop_counter(small: Any) -> None:
    """An eager forward pass computes whole attention matrices, and every layer of the vision tower."""
    inputs = small.model_inputs([sample_image()], [small.prompt("the red car")])
    tokens = inputs["input_ids"].shape[1]
    small.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        small.model.base_model(**inputs, use_cache=False)
    small.model.set_attn_implementation("sdpa")
    whole = floor.attention(tokens * tokens, QUICK.hidden).flops
    causal = floor.attention(floor.causal_pairs(tokens), QUICK.hidden).flops
    layer = floor.decoder_layer(QUICK, tokens).flops - causal + whole
    tower = floor.vision(replace(QUICK, vision_layers=QUICK.vision_layers + 1)).flops
    assert counter.get_total_flops() == tower + QUICK.layers * layer


def test_seconds_are_the_longer_of_arithmetic_and_traffic() -> None:
    assert Work(100, 10).seconds(10, 10) == 10
    assert Work(100, 1000).seconds(10, 10) == 100
    assert str(Work(1.5e12, 2.4e9)) == "1.5 TFLOP, 2.4 GB"


# ------------------------------------------------------------------------------------------------ time and memory


def test_variants_take_turns() -> None:
    """A warm-up round, then each variant once per round."""
    calls: list[str] = []
    timings = time_interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 4)
    assert [sorted(calls[i : i + 2]) for i in range(0, 10, 2)] == [["a", "b"]] * 5
    assert {name: len(times) for name, times in timings.seconds.items()} == {"a": 4, "b": 4}
    assert time_interleaved({"a": lambda: None}, 9, max_seconds=0).rounds == MIN_ROUNDS


def test_timings_by_hand() -> None:
    by_hand = Timings({"a": [2.0, 3.0, 8.0], "b": [1.0, 2.0, 2.0]})
    assert (by_hand.median("a"), by_hand.ratios("a", "b")) == (3.0, [2.0, 1.5, 4.0])
    assert by_hand.fastest("a", "b") == 2.0
    assert by_hand.scatter == 1.0  # of b: 2 over 1; of a: 3 over 2


@pytest.mark.parametrize(("seconds", "rounds"), [([1.0] * 4, 3), ([1.0, 1.0, 1.3, 1.3, 1.0, 1.0, 1.0], 6)])
def test_rounds_that_scatter_are_repeated(seconds: list[float], rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, without a second warm-up; the first value is the warm-up's."""
    clock, waits = [0.0], iter(seconds)
    monkeypatch.setattr(timing, "perf_counter", lambda: clock[0])

    def variant() -> None:
        clock[0] += next(waits)

    found = timing.time_settled({"a": variant}, 3)
    assert found.seconds["a"] == pytest.approx(seconds[1 : rounds + 1])
    assert found.repeated == (rounds == 6)


def test_row_by_hand() -> None:
    """The probe is 10 operations, so the work's 30 take at least three times as long as the probe in each round."""
    timings = Timings({"a": [2.0, 3.0, 8.0], "b": [1.0, 2.0, 2.0], "machine": [0.5, 0.5, 2.0]})
    quiet = machine.Machine(CPU, torch.float32, 20.0, 1000.0, lambda: None, 10.0)
    row = timed_row("x", "this", timings, "a", "b", goal=2, work=Work(30, 1), machine=quiet)
    shares = [0.75, 0.5, 0.75]
    assert (row.ratio, row.low, row.high, row.floor, row.share) == (2.0, 1.5, 4.0, 1.5, sorted(shares)[1])
    assert cells(row)[2:] == [
        "3.00 s", "2.00 s", "2.00 (1.50 to 4.00; fastest 2.00)", "2.00 met", "30 FLOP, 1 B", "1.50 s", "75 %",
    ]  # fmt: skip
    assert "MISSED" in cells(replace(row, goal=1.9))[5]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_counts_what_is_freed_before_the_end() -> None:
    peak = peak_bytes(lambda: np.ones(200_000_000, np.uint8).sum())
    assert peak is not None
    assert 195e6 <= peak < 230e6
    assert (peak_bytes(lambda: None) or 0) < 5e6


# ----------------------------------------------------------------------------------------------------- the models


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_command_is_profiled(tmp_path: Path) -> None:
    """A script that prints, shows a bar and allocates 64 MB; then one that fails."""
    script = "import time; print(1, flush=True); time.sleep(.3); print('BAR', flush=True); x = b'1' * 64000000"
    script += "; time.sleep(.3)"
    seen = loading.profile_command([sys.executable, "-S", "-c", script], tmp_path, bar="BAR")
    assert seen.first_line and seen.bar
    assert seen.first_line[0] + 0.15 < seen.bar[0]
    assert 64e6 < seen.anonymous < 90e6 and seen.anonymous < seen.resident
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        loading.profile_command([sys.executable, "-S", "-c", "1 / 0"], tmp_path)


def test_repeated_layers_share_weights_but_not_cache_slots(small: Any) -> None:
    deep = random_llava(replace(QUICK, layers=6), CPU, torch.float32, distinct=2)
    assert deep.num_parameters == small.num_parameters
    assert (deep.num_layers, len(deep.attention_modules)) == (6, 6)
    assert [module.layer_idx for module in deep.attention_modules.values()] == list(range(6))
    found, first = (lvlm.attend(sample_image(), EXPRESSIONS[0]).attention for lvlm in (deep, small))
    np.testing.assert_allclose(found[:2], first, atol=1e-6)
    assert np.abs(found[2] - found[0]).max() > 1e-9


def test_both_variants_of_each_comparison_agree(small: Any) -> None:
    """Captured rows equal those of eager attention and of the published procedure; sharing changes nothing."""
    from benchmarks import capture, published

    inputs = small.model_inputs([sample_image()], [small.prompt(EXPRESSIONS[0])])
    (rows,) = capture.capture_rows(small, inputs)
    np.testing.assert_allclose(published.output_attentions(small, inputs)[:, 0], rows, atol=1e-6)
    steps = published.published_method(small, inputs)
    assert len(steps) == published.ANSWER_TOKENS
    np.testing.assert_allclose(torch.stack([layer[0, :, -1] for layer in steps[0]]), rows, atol=1e-6)
    with eager(small):
        pass
    assert small.model.model.language_model.config._attn_implementation == "sdpa"
    prefix, ends = token_counts(small, sample_image())
    assert prefix > QUICK.image_tokens
    assert len(set(ends)) > 1
    assert min(ends) >= 3
    shared = small.encode_image(sample_image()).attend(EXPRESSIONS)
    apart = [small.attend(sample_image(), expression) for expression in EXPRESSIONS]
    assert_maps_agree(shared, apart, tolerance=1e-5)
    with pytest.raises(AssertionError):
        assert_maps_agree(shared, apart[::-1], tolerance=1e-5)


# ---------------------------------------------------------------------------------------------------- the command


def test_every_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At toy size, with consistent table, JSON and Markdown."""
    files = ["--json", str(tmp_path / "rows.json"), "--markdown", str(tmp_path / "rows.md")]
    assert command.main(["--quick", "--rounds", "1", *files]) == 0
    written = json.loads((tmp_path / "rows.json").read_text())
    rows = [SimpleNamespace(**row) for row in written["rows"]]
    assert sorted({row.key for row in rows}) == list("abcdefgh")
    for row in rows:
        assert (row.ratio is not None and row.ratio > 0) or row.note.startswith(("skipped", "not measured", "measured"))
        assert (row.floor is None) == (row.share is None)
    (memory,) = (row for row in rows if row.key == "g")
    if memory.ratio is not None:
        assert memory.ratio < 1
        assert LIMIT == 300_000_000
    out = capsys.readouterr().out
    markdown = (tmp_path / "rows.md").read_text()
    assert torch.__version__ in written["machine"]
    for text in (out, markdown):
        assert "met" in text
        assert "encoded once" in text
    assert len(markdown.splitlines()) == len(rows) + 4


def test_only_selects_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--quick", "--rounds", "1", "--only", "e"]) == 0
    out = capsys.readouterr().out
    assert "spatial entropy" in out and "sdpa prefill" not in out
    assert command.main(["--only", "a,z"]) == 2
    assert "'z'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--rounds", "0"])


def test_failed_benchmark_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its row gives the error, the status is 1, and the page's table is replaced."""

    def fail(_: Any) -> Any:
        raise subprocess.CalledProcessError(1, ["finder"], stderr=b"Traceback\nerror: no a | b\n")

    monkeypatch.setattr(command.sharing, "rows", fail)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert command.main(["--quick", "--rounds", "1", "--only", "c,e", "--page", str(page)]) == 1
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n\n| ") and text.endswith(f"\n\n{END}\nafter\n")
    assert "old" not in text and "spatial entropy" in text and torch.__version__ in text
    assert "[failed: CalledProcessError: error: no a \\| b]" in text
    page.write_text("no marks")
    capsys.readouterr()
    assert command.main(["--only", "e", "--page", str(page)]) == 2
    assert "the page needs the lines" in capsys.readouterr().err
    assert page.read_text() == "no marks"


def test_performance_page_has_the_tables_marks() -> None:
    replace_table(Path(__file__).parents[1] / "docs" / "performance.md", None)


def test_shape_is_narrowed_to_fit_memory() -> None:
    """LLaVA-1.5-7B with four distinct layers has 2.8 GB of weights of 2 bytes each."""
    full = Shape()
    assert full.weights(4) == pytest.approx(2 * (4 * 202.4e6 + 2 * 131.3e6 + 311e6), rel=0.01)
    assert full.fitting(5e9, 4) == full
    half = full.fitting(4e9, 4)
    assert (half.hidden, half.mlp, half.heads, half.layers) == (2048, 5504, 16, 32)
    assert 1.5 * half.weights(4) <= 4e9
    assert (str(full), str(half)) == ("32 layers", "32 layers of 2,048, LLaVA-1.5-7B's have 4,096")
    low_memory = machine.Machine(CPU, torch.float32, 1.0, 1.0, lambda: None, 1.0, memory=6 * 10**9)
    assert Setting(low_memory, 1).shape(32).hidden == 2048
    assert Setting(replace(low_memory, memory=None), 1).shape(32) == full


def test_machine_is_measured() -> None:
    found = machine.measure(quick=True)
    if sys.platform.startswith("linux"):
        assert 1e8 < (found.memory or 0) < 1e14
    assert found.flops > 1e6
    assert found.bandwidth > 1e6
    quiet = found.probe_flops / found.flops
    assert found.floor(Work(found.flops, 0), quiet) == pytest.approx(1)
    assert found.floor(Work(0, found.bandwidth), 3 * quiet) == pytest.approx(3)


# ------------------------------------------------------------------------------------------------------- on a GPU


def test_gpu_script_runs_at_toy_size_without_optional_packages(tmp_path: Path) -> None:
    """Without Hydra, rich and others that a GPU machine may lack; every part yields facts."""
    code = (
        "import sys\n"
        "for name in ('hydra', 'omegaconf', 'rich', 'pycocotools', 'sklearn', 'jinja2'): sys.modules[name] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        "from benchmarks import gpu\n"
        f"sys.exit(gpu.main(['--toy', '--rounds', '1', '--json', {str(tmp_path / 'gpu.json')!r}]))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "gpu.json").read_text())
    parts = {fact["part"] for fact in written["facts"]}
    assert parts == {"parity", "llava", "published", "early", "find", "batch", "qwen", "tests"}
    checked = [fact for fact in written["facts"] if fact["part"] == "parity" and fact["value"] is not None]
    assert len(checked) >= 4 and all(fact["met"] for fact in checked)
    assert not any("failed" in fact["note"] for fact in written["facts"])
    assert (written["device"] == "no GPU") == (not torch.cuda.is_available())
    assert "toy" in written["sizes"]


def test_goal_is_an_upper_or_a_lower_limit() -> None:
    assert Fact("a", "b", 1.02, goal=1.02).met and not Fact("a", "b", 1.03, goal=1.02).met
    assert Fact("a", "b", 20.0, goal=20, at_least=True).met and not Fact("a", "b", 19, goal=20, at_least=True).met
    assert Fact("a", "b", 1.0).met is None and Fact("a", "b", None, goal=1).met is None
    assert "| a | b | 19 1/s | >= 20 MISSED |" in markdown_table(
        [Fact("a", "b", 19, "1/s", 20, at_least=True)], {"device": "none"}
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_full_sizes_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "--toy" in capsys.readouterr().err


def test_few_labels_prints_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    few_labels.main(["--scenes", "4", "--draws", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("without labels: ") and lines[2].startswith("| heads_by | labels | shrink=none |")
    assert [line.split("|")[1:3] for line in lines[4:]] == [
        [f" `{by}` ", f" {count} "] for by in ("mass", "iou", "pointing") for count in (1, 2)
    ]


def rows_by_name(printed: str) -> dict[str, list[str]]:
    """The cells of each row of a Markdown table, by the row's name."""
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    return {name: cells for name, *cells in lines[2:]}


def test_tables_of_read_outs_agree_where_they_overlap(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same read-out on the same scenes has the same mean IoU in every table."""
    more_heads = (Head(5, 7), Head(5, 0), Head(5, 1), Head(2, 6))
    monkeypatch.setattr(aggregation, "rank_heads_without_labels", lambda lvlm: (*lvlm.known_heads, *more_heads))
    for module in (boxes, aggregation, second_look):
        monkeypatch.setattr(module, "SETS", dict(list(module.SETS.items())[:1]))
    tables = []
    for module in (boxes, aggregation, second_look):
        module.main(3)
        tables.append(rows_by_name(capsys.readouterr().out))
    read_outs, promptings, looks = tables
    assert (list(read_outs), list(promptings), list(looks)) == (
        list(boxes.ROWS), list(aggregation.ROWS), list(second_look.ROWS),
    )  # fmt: skip
    for name in second_look.ROWS:
        one_look = looks[name][0].split(",")[0]
        assert read_outs[name][0].split()[2] == one_look
    first, *others = promptings.values()
    assert first[0].split()[1] == looks["`grounding=sharp box_from=map`"][0].split(",")[0]
    assert all(len(row) == 1 and "[" in row[0] for row in others)
