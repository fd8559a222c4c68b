"""Fill the tables of the model card: python -m training.card [--now REPORT] [--before REPORT]

A REPORT is written by `python -m training.evaluate MODEL --json REPORT`; those of the last two releases are in
training/reports. Replaces the text of docs/embedded-model.md between `<!-- table: NAME -->` and `<!-- end -->`.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "embedded-model.md"
REPORTS = ROOT / "training" / "reports"
METRICS = ("pointing", "acc@0.5", "mean_iou", "acc@0.5 x2", "mean_iou x2")
ROWS = {
    "three best by IoU (oracle)": "three best by IoU (oracle)",
    "best head by IoU (oracle)": "best head by IoU (oracle)",
    "all heads": "all heads",
    "both, N = 10": "the paper's N = 10",
    "criterion 1 only": "criterion 1 only",
    "criterion 2 only": "criterion 2 only",
    "criterion 2 only, N = 10": "criterion 2 only, N = 10",
    "layer-matched random 3": "layer-matched random 3",
}
PERFECT = "a perfect map (the target's mask)"
# Earlier releases and trials, which cannot be evaluated again: from their own reports.
OLD_ROWS = """\
| the third release (step 21,700): top 3 | 0.90 [0.88, 0.93] | 0.59 [0.55, 0.63] | 0.51 [0.49, 0.52] | 0.76 [0.72, 0.79] | 0.59 [0.57, 0.61] |
| the third release: layer-matched random 3 | 0.54 [0.51, 0.57] | 0.32 [0.29, 0.35] | 0.32 [0.30, 0.34] | 0.41 [0.38, 0.44] | 0.36 [0.33, 0.38] |
| the third release: top 3, held-out style | 0.71 [0.67, 0.75] | 0.40 [0.36, 0.44] | 0.40 [0.37, 0.42] | 0.53 [0.48, 0.57] | 0.45 [0.43, 0.48] |
| the second release (step 12,700): top 3 | 0.84 [0.80, 0.87] | 0.51 [0.47, 0.56] | 0.47 [0.45, 0.49] | 0.67 [0.63, 0.71] | 0.55 [0.52, 0.57] |
| the second release: layer-matched random 3 | 0.70 [0.67, 0.73] | 0.41 [0.38, 0.44] | 0.39 [0.37, 0.41] | 0.53 [0.50, 0.56] | 0.45 [0.43, 0.47] |
| the second release: top 3, held-out style | 0.66 [0.62, 0.70] | 0.36 [0.32, 0.40] | 0.36 [0.34, 0.39] | 0.51 [0.47, 0.55] | 0.43 [0.40, 0.46] |
| the first release (16 x 16): top 3 | 0.81 [0.77, 0.84] | 0.33 [0.29, 0.37] | 0.40 [0.38, 0.42] | 0.55 [0.51, 0.59] | 0.47 [0.45, 0.49] |
| the first release: top 3, held-out style | 0.62 [0.57, 0.66] | 0.24 [0.20, 0.28] | 0.32 [0.30, 0.34] | 0.42 [0.38, 0.46] | 0.38 [0.36, 0.41] |
| the spike: top 3 | .89-.90 | .31 | .40 | .44 | .45 |
| the spike: random 3 | .78 | .25 | .34 | .37 | .38 |
| the spike: top 3, held-out style | .66 | .21 | | .33 | |
"""  # noqa: E501
# Targets of issue 3: name, part of the report, metric, minimum.
TARGETS = (
    ("pointing", "in style", "pointing", 0.93),
    ("Acc@0.5", "in style", "acc@0.5", 0.60),
    ("mean IoU", "in style", "mean_iou", 0.52),
    ("Acc@0.5 x2", "in style", "acc@0.5 x2", 0.70),
    ("held-out style: pointing", "held-out style", "pointing", 0.80),
    ("held-out style: Acc@0.5", "held-out style", "acc@0.5", 0.40),
)


def numbers(now: dict, before: dict) -> Iterator[str]:
    """Scores of each set of heads, in this release and earlier ones."""
    yield "| heads | pointing | Acc@0.5 | mean IoU | Acc@0.5 x2 | mean IoU x2 |"
    yield "|---|---|---|---|---|---|"
    yield _scores_row(f"**top 3 of the ranking** ({_head_names(_top(now))})", now["in style"]["top 3"])
    for key, name in ROWS.items():
        heads = now["heads of each"].get(key, ())
        yield _scores_row(f"{name} ({_head_names(heads)})" if 1 <= len(heads) <= 3 else name, now["contrasts"][key])
    yield _scores_row("**top 3, held-out style**", now["held-out style"]["top 3"])
    yield _scores_row("top 3, images of 4:3, padded", now["padded"]["top 3"])
    yield _scores_row("a perfect map (the target's mask)", now["contrasts"][PERFECT])
    yield _scores_row("the release before (mean of weights up to step 50,500): top 3", before["in style"]["top 3"])
    yield _scores_row("the release before: layer-matched random 3", before["contrasts"]["layer-matched random 3"])
    yield _scores_row("the release before: top 3, held-out style", before["held-out style"]["top 3"])
    yield from OLD_ROWS.splitlines()


def targets(now: dict, before: dict) -> Iterator[str]:
    """Each target, the measured value, and whether it is met."""
    yield "| target | measured | | the release before |"
    yield "|---|---|---|---|"
    for name, part, metric, minimum in TARGETS:
        value, previous = now[part]["top 3"][metric], before[part]["top 3"][metric]
        verdict = _verdict(value[0] >= minimum)
        yield f"| {name} >= {minimum:.2f} | {_interval(value)} | {verdict} | {previous[0]:.3f} |"
    value, previous = (r["in style"]["answers"]["whole answer"] for r in (now, before))
    yield f"| answers right >= 0.80 | {_interval(value)} | {_verdict(value[0] >= 0.8)} | {previous[0]:.3f} |"
    gains = {metric: _gain(now, metric) for metric in METRICS}
    met = all(gain >= 0.1 and apart for gain, apart in gains.values())
    cell, previous = (
        ", ".join(f"{metric} {_gain(r, metric)[0]:+.2f}" for metric in METRICS[:4]) for r in (now, before)
    )
    yield f"| 10 points above layer-matched random heads, intervals apart | {cell} | {_verdict(met)} | {previous} |"
    rho, previous = (_correlation(r["frequency and IoU"]) for r in (now, before))
    verdict = _rho_verdict(now["frequency and IoU"])
    yield f"| rho >= 0.7, p < 0.001 (marked as in the paper) | {rho} | {verdict} | {previous} |"
    rho, previous = (_bounded_correlation(r) for r in (now, before))
    verdict = _rho_verdict(now["frequency and IoU"]["all"])
    yield f"| the same over all candidate heads | {rho} | {verdict} | {previous} |"
    below, candidates = now["heads"]["below tau"], now["heads"]["candidates"]
    verdict = _verdict(0 < below < candidates)
    yield f"| heads below tau | {below} of {candidates} | {verdict} | {before['heads']['below tau']} |"
    yield _ranking_row(now, before)
    yield _criterion_row(now, before, "3", "top 3", "criterion 2 only")
    yield _criterion_row(now, before, "10, the paper's", "both, N = 10", "criterion 2 only, N = 10")


def _ranking_row(now: dict, before: dict) -> str:
    """The correlation of the whole ranking with the IoU, with and without criterion 1."""
    keys = ("frequency and IoU", "frequency by criterion 2 only, and IoU")
    (rho, rho_alone), previous = ([r[key]["all"]["rho"] for key in keys] for r in (now, before))
    target = "criterion 1 helps: rho over all candidates with it and without it"
    return (
        f"| {target} | {rho:.2f} and {rho_alone:.2f} | {_verdict(rho > rho_alone)} "
        f"| {previous[0]:.2f} and {previous[1]:.2f} |"
    )


def _criterion_row(now: dict, before: dict, number: str, both: str, alone: str) -> str:
    """The scores of the top 3 heads with and without criterion 1; `number` heads are selected per sample."""
    metrics = (("pointing", "pointing"), ("acc@0.5", "Acc@0.5"), ("acc@0.5 x2", "x2"))

    def values(report: dict, name: str) -> list[float]:
        rows = report["contrasts"] | {"top 3": report["in style"]["top 3"]}
        return [rows[name][metric][0] for metric, _ in metrics]

    def cell(report: dict) -> str:
        rows = zip(metrics, values(report, both), values(report, alone), strict=True)
        return ", ".join(f"{name} {value:.2f} and {value_alone:.2f}" for (_, name), value, value_alone in rows)

    met = all(value > other for value, other in zip(values(now, both), values(now, alone), strict=True))
    target = f"the same: scores of the three heads (N = {number})"
    return f"| {target} | {cell(now)} | {_verdict(met)} | {cell(before)} |"


def correlations(now: dict, before: dict) -> Iterator[str]:
    """Correlation of selection frequency and mask IoU, for both N, with and without criterion 1."""
    yield "| heads | N | now | the release before |"
    yield "|---|---|---|---|"
    both, alone = "frequency and IoU", "frequency by criterion 2 only, and IoU"
    for name, key, part in (
        ("marked in 1 % of the scenes or more, as in the paper", both, None),
        ("all candidates, 0 for those that criterion 1 drops", both, "all"),
        ("all candidates, without criterion 1", alone, "all"),
    ):
        for number, suffix in ((3, ""), (10, ", N = 10")):
            cells = ((r[key + suffix]["all"] if part else r[key + suffix]) for r in (now, before))
            yield f"| {name} | {number} | {' | '.join(map(_correlation, cells))} |"
    cells = (_correlation(r["attention sum and IoU"]) for r in (now, before))
    yield f"| attention sum instead of frequency, all candidates | | {' | '.join(cells)} |"


def kinds(now: dict, before: dict) -> Iterator[str]:
    """Scores by kind of expression; in brackets, those of the release before on the same scenes."""
    yield "| expression | scenes | pointing | Acc@0.5 | Acc@0.5 x2 | whole answer right |"
    yield "|---|---|---|---|---|---|"
    for kind, row in now["by kind"].items():
        cells = (
            f"{row[metric]:.2f} ({before['by kind'][kind][metric]:.2f})"
            for metric in ("pointing", "acc@0.5", "acc@0.5 x2", "whole answer")
        )
        yield f"| {kind} | {row['scenes']} | {' | '.join(cells)} |"


def comparisons(now: dict, before: dict) -> Iterator[str]:
    """Scores by the place that tells objects of one name apart; in brackets, those of the release before."""
    yield "| place | scenes | pointing | Acc@0.5 x2 | whole answer right |"
    yield "|---|---|---|---|---|"
    for word, row in now["comparisons"].items():
        cells = (
            f"{row[metric]:.2f} ({before['comparisons'][word][metric]:.2f})"
            for metric in ("pointing", "acc@0.5 x2", "whole answer")
        )
        yield f"| {word} | {row['scenes']} | {' | '.join(cells)} |"


def talk(now: dict, before: dict) -> Iterator[str]:
    """Accuracy of answers to questions about an image."""
    yield "| asked | answers | right | the release before |"
    yield "|---|---|---|---|"
    for kind, (share, number) in now["talk"].items():
        yield f"| {kind} | {number} | {share:.2f} | {before['talk'][kind][0]:.2f} |"


def answers(now: dict, before: dict) -> Iterator[str]:
    """Accuracy of the answers in the three sets of scenes."""
    yield "| scenes | first word | every word | whole answer | whole answer, the release before |"
    yield "|---|---|---|---|---|"
    for part in ("in style", "held-out style", "padded"):
        cells = (_interval(now[part]["answers"][key]) for key in ("first word", "words", "whole answer"))
        yield f"| {part} | {' | '.join(cells)} | {_interval(before[part]['answers']['whole answer'])} |"


TABLES = {f.__name__: f for f in (numbers, targets, correlations, kinds, comparisons, answers, talk)}


def fill(page: str, now: dict, before: dict) -> str:
    """The page with every marked table replaced."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{chr(10).join(TABLES[match[2]](now, before))}\n<!-- end -->"

    return re.sub(r"(<!-- table: (\w+) -->).*?<!-- end -->", table, page, flags=re.DOTALL)


def _scores_row(name: str, values: dict) -> str:
    return f"| {name} | {' | '.join(_interval(values[metric]) for metric in METRICS)} |"


def _interval(value: list[float]) -> str:
    mean, low, high = value
    return f"{mean:.3f} [{low:.2f}, {high:.2f}]"


def _top(report: dict) -> list[list]:
    """[layer, head] of each of the top 3."""
    return [head[:2] for head in report["heads"]["top 3"]]


def _head_names(heads: list[list]) -> str:
    return " ".join(f"L{layer}H{head}" for layer, head in heads)


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def _gain(report: dict, metric: str) -> tuple[float, bool]:
    """The top 3's gain over random heads of the same layers, and whether the intervals are disjoint."""
    top, random = report["in style"]["top 3"][metric], report["contrasts"]["layer-matched random 3"][metric]
    return top[0] - random[0], top[1] > random[2]


def _correlation(values: dict) -> str:
    if values["rho"] is None:
        return f"not defined, {values['heads']} heads"
    return f"{values['rho']:.2f}, p = {values['p']:.1g}, {values['heads']} heads"


def _bounded_correlation(report: dict) -> str:
    """The correlation over all candidates, with its upper bound given that the heads below tau tie at frequency 0.

    Spearman's rho with t of n values tied on one side is at most sqrt(1 - (t^3 - t) / (n^3 - n)).
    """
    tied, number = report["heads"]["below tau"], report["heads"]["candidates"]
    bound = (1 - (tied**3 - tied) / (number**3 - number)) ** 0.5
    rho = _correlation(report["frequency and IoU"]["all"])
    return f"{rho}; at most {bound:.2f} with {tied} of them at 0"


def _rho_verdict(values: dict) -> str:
    return _verdict(values["rho"] is not None and values["rho"] >= 0.7 and values["p"] < 0.001)


def main() -> None:
    """Parse the options, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--now", type=Path, default=REPORTS / "now.json")
    parser.add_argument("--before", type=Path, default=REPORTS / "before.json")
    options = parser.parse_args()
    now, before = (json.loads(path.read_text()) for path in (options.now, options.before))
    PAGE.write_text(fill(PAGE.read_text(), now, before))


if __name__ == "__main__":
    main()
