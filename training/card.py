"""The tables of the model card: python -m training.card [--now REPORT] [--before REPORT]

REPORT is what `python -m training.evaluate MODEL --json REPORT` wrote; those of the last releases are in
training/reports. Replaces what stands in docs/embedded-model.md between `<!-- table: NAME -->` and `<!-- end -->`.
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
# Releases and trials that cannot be measured anew: from their own reports.
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
# Issue 3's targets: what is asked, the part of the report, the metric, the least value.
TARGETS = (
    ("pointing", "in style", "pointing", 0.93),
    ("Acc@0.5", "in style", "acc@0.5", 0.60),
    ("mean IoU", "in style", "mean_iou", 0.52),
    ("Acc@0.5 x2", "in style", "acc@0.5 x2", 0.70),
    ("held-out style: pointing", "held-out style", "pointing", 0.80),
    ("held-out style: Acc@0.5", "held-out style", "acc@0.5", 0.40),
)


def numbers(now: dict, before: dict) -> Iterator[str]:
    """Every set of heads, this release and the one before."""
    yield "| heads | pointing | Acc@0.5 | mean IoU | Acc@0.5 x2 | mean IoU x2 |"
    yield "|---|---|---|---|---|---|"
    yield _row(f"**top 3 of the ranking** ({_names(_top(now))})", now["in style"]["top 3"])
    for key, name in ROWS.items():
        heads = now["heads of each"].get(key, ())
        yield _row(f"{name} ({_names(heads)})" if 1 <= len(heads) <= 3 else name, now["contrasts"][key])
    yield _row("**top 3, held-out style**", now["held-out style"]["top 3"])
    yield _row("top 3, images of 4:3, padded", now["padded"]["top 3"])
    yield _row("a perfect map (the target's mask)", now["contrasts"][PERFECT])
    yield _row("the release before (mean of weights up to step 50,500): top 3", before["in style"]["top 3"])
    yield _row("the release before: layer-matched random 3", before["contrasts"]["layer-matched random 3"])
    yield _row("the release before: top 3, held-out style", before["held-out style"]["top 3"])
    yield from OLD_ROWS.splitlines()


def targets(now: dict, before: dict) -> Iterator[str]:
    """What was asked, what came out, and whether it is enough."""
    yield "| target | measured | | the release before |"
    yield "|---|---|---|---|"
    for name, part, metric, least in TARGETS:
        found, then = now[part]["top 3"][metric], before[part]["top 3"][metric]
        yield f"| {name} >= {least:.2f} | {_interval(found)} | {_verdict(found[0] >= least)} | {then[0]:.3f} |"
    found, then = (r["in style"]["answers"]["whole answer"] for r in (now, before))
    yield f"| answers right >= 0.80 | {_interval(found)} | {_verdict(found[0] >= 0.8)} | {then[0]:.3f} |"
    gains = {metric: _gain(now, metric) for metric in METRICS}
    enough = all(gain >= 0.1 and apart for gain, apart in gains.values())
    said, then = (
        ", ".join(f"{metric} {_gain(r, metric)[0]:+.2f}" for metric in METRICS[:4]) for r in (now, before)
    )
    yield f"| 10 points above layer-matched random heads, intervals apart | {said} | {_verdict(enough)} | {then} |"
    rho, then = (_correlation(r["frequency and IoU"]) for r in (now, before))
    yield f"| rho >= 0.7, p < 0.001 (marked as in the paper) | {rho} | {_strong(now['frequency and IoU'])} | {then} |"
    rho, then = (_bounded_correlation(r) for r in (now, before))
    yield f"| the same over all candidate heads | {rho} | {_strong(now['frequency and IoU']['all'])} | {then} |"
    below, candidates = now["heads"]["below tau"], now["heads"]["candidates"]
    verdict = _verdict(0 < below < candidates)
    yield f"| heads below tau | {below} of {candidates} | {verdict} | {before['heads']['below tau']} |"
    yield _ranking_row(now, before)
    yield _criterion_row(now, before, "3", "top 3", "criterion 2 only")
    yield _criterion_row(now, before, "10, the paper's", "both, N = 10", "criterion 2 only, N = 10")


def _ranking_row(now: dict, before: dict) -> str:
    """How well the whole ranking goes with the IoU, with criterion 1 and without it."""
    keys = ("frequency and IoU", "frequency by criterion 2 only, and IoU")
    (one, other), then = ([r[key]["all"]["rho"] for key in keys] for r in (now, before))
    asked = "criterion 1 helps: rho over all candidates with it and without it"
    return (
        f"| {asked} | {one:.2f} and {other:.2f} | {_verdict(one > other)} | {then[0]:.2f} and {then[1]:.2f} |"
    )


def _criterion_row(now: dict, before: dict, number: str, both: str, alone: str) -> str:
    """What the ranking is worth with criterion 1 and without it, marking `number` heads a sample."""
    metrics = (("pointing", "pointing"), ("acc@0.5", "Acc@0.5"), ("acc@0.5 x2", "x2"))

    def values(report: dict, name: str) -> list[float]:
        rows = report["contrasts"] | {"top 3": report["in style"]["top 3"]}
        return [rows[name][metric][0] for metric, _ in metrics]

    def said(report: dict) -> str:
        pairs = zip(metrics, values(report, both), values(report, alone), strict=True)
        return ", ".join(f"{name} {one:.2f} and {other:.2f}" for (_, name), one, other in pairs)

    worse = all(one > other for one, other in zip(values(now, both), values(now, alone), strict=True))
    asked = f"the same: scores of the three heads (N = {number})"
    return f"| {asked} | {said(now)} | {_verdict(worse)} | {said(before)} |"


def correlations(now: dict, before: dict) -> Iterator[str]:
    """Selection frequency against mask IoU, for both N, with and without criterion 1."""
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
    """Each kind of expression; in brackets, the release before on the same scenes."""
    yield "| expression | scenes | pointing | Acc@0.5 | Acc@0.5 x2 | whole answer right |"
    yield "|---|---|---|---|---|---|"
    for kind, row in now["by kind"].items():
        cells = (
            f"{row[metric]:.2f} ({before['by kind'][kind][metric]:.2f})"
            for metric in ("pointing", "acc@0.5", "acc@0.5 x2", "whole answer")
        )
        yield f"| {kind} | {row['scenes']} | {' | '.join(cells)} |"


def comparisons(now: dict, before: dict) -> Iterator[str]:
    """Places that tell things of one name apart; in brackets, the release before."""
    yield "| place | scenes | pointing | Acc@0.5 x2 | whole answer right |"
    yield "|---|---|---|---|---|"
    for word, row in now["comparisons"].items():
        cells = (
            f"{row[metric]:.2f} ({before['comparisons'][word][metric]:.2f})"
            for metric in ("pointing", "acc@0.5 x2", "whole answer")
        )
        yield f"| {word} | {row['scenes']} | {' | '.join(cells)} |"


def talk(now: dict, before: dict) -> Iterator[str]:
    """Answers to questions about an image; the last column is the release before."""
    yield "| asked | answers | right | the release before |"
    yield "|---|---|---|---|"
    for kind, (share, number) in now["talk"].items():
        yield f"| {kind} | {number} | {share:.2f} | {before['talk'][kind][0]:.2f} |"


def answers(now: dict, before: dict) -> Iterator[str]:
    """Shares of answers right, in the three sets of scenes."""
    yield "| scenes | first word | every word | whole answer | whole answer, the release before |"
    yield "|---|---|---|---|---|"
    for part in ("in style", "held-out style", "padded"):
        cells = (_interval(now[part]["answers"][key]) for key in ("first word", "words", "whole answer"))
        yield f"| {part} | {' | '.join(cells)} | {_interval(before[part]['answers']['whole answer'])} |"


TABLES = {f.__name__: f for f in (numbers, targets, correlations, kinds, comparisons, answers, talk)}


def fill(page: str, now: dict, before: dict) -> str:
    """The page with every marked table written anew."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{chr(10).join(TABLES[match[2]](now, before))}\n<!-- end -->"

    return re.sub(r"(<!-- table: (\w+) -->).*?<!-- end -->", table, page, flags=re.DOTALL)


def _row(name: str, values: dict) -> str:
    return f"| {name} | {' | '.join(_interval(values[metric]) for metric in METRICS)} |"


def _interval(value: list[float]) -> str:
    mean, low, high = value
    return f"{mean:.3f} [{low:.2f}, {high:.2f}]"


def _top(report: dict) -> list[list]:
    return [head[:2] for head in report["heads"]["top 3"]]


def _names(heads: list[list]) -> str:
    return " ".join(f"L{layer}H{head}" for layer, head in heads)


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def _gain(report: dict, metric: str) -> tuple[float, bool]:
    """How far the top 3 lie above random heads, and whether the intervals are apart."""
    top, random = report["in style"]["top 3"][metric], report["contrasts"]["layer-matched random 3"][metric]
    return top[0] - random[0], top[1] > random[2]


def _correlation(found: dict) -> str:
    if found["rho"] is None:
        return f"not defined, {found['heads']} heads"
    return f"{found['rho']:.2f}, p = {found['p']:.1g}, {found['heads']} heads"


def _bounded_correlation(report: dict) -> str:
    """Over all candidates, beside the most that rho can be when heads below tau share the frequency 0.

    Spearman's rho with t of n values tied on one side is at most sqrt(1 - (t^3 - t) / (n^3 - n)).
    """
    tied, number = report["heads"]["below tau"], report["heads"]["candidates"]
    most = (1 - (tied**3 - tied) / (number**3 - number)) ** 0.5
    found = _correlation(report["frequency and IoU"]["all"])
    return f"{found}; at most {most:.2f} with {tied} of them at 0"


def _strong(found: dict) -> str:
    return _verdict(found["rho"] is not None and found["rho"] >= 0.7 and found["p"] < 0.001)


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
