"""Progress of a training run: a live table, and a log of JSON lines."""

import copy
import json
import logging
import time
from collections import defaultdict
from dataclasses import asdict

from training.probe import probe
from training.trainer import Progress, Trainer

log = logging.getLogger(__name__)


class LiveTable:
    """A callback after each step: averages the numbers per canvas, prints a line every `every` steps, and probes."""

    def __init__(self, trainer: Trainer, every: int = 50):
        self.trainer, self.every, self.started = trainer, every, time.monotonic()
        self.averages: dict[int, dict[str, float]] = defaultdict(dict)
        log.info("%7s %7s %6s | tokens: loss caption looked first answer", "step", "minutes", "rate")

    def __call__(self, progress: Progress) -> None:
        numbers = self.averages[progress.canvas]
        for name in ("loss", "caption_loss", "looked", "first_right", "answer_right"):
            new = getattr(progress, name)
            numbers[name] = 0.95 * numbers.get(name, new) + 0.05 * new
        if progress.step % self.every == 0:
            self._print_line(progress.step)
        if progress.step % self.trainer.recipe.probe_every == 0:
            self._probe(progress.step)

    def _print_line(self, step: int) -> None:
        minutes = (time.monotonic() - self.started) / 60
        cells = [f"{tokens}: {' '.join(f'{v:.2f}' for v in n.values())}" for tokens, n in sorted(self.averages.items())]
        log.info("%7d %7.1f %6.3f | %s", step, minutes, self.trainer.rate_factor(), " | ".join(cells))
        self._write({"step": step, "minutes": minutes, "canvases": {str(k): v for k, v in self.averages.items()}})

    def _probe(self, step: int) -> None:
        model = copy.deepcopy(self.trainer.model).cpu()
        results = probe(model, self.trainer.recipe.probe_scenes)
        log.info("        validation: %s", "  ".join(f"{k} {v:.3f}" for k, v in asdict(results).items()))
        self._write({"step": step, "validation": asdict(results)})

    def _write(self, record: dict) -> None:
        with (self.trainer.folder / "log.jsonl").open("a") as lines:
            lines.write(json.dumps(record) + "\n")
