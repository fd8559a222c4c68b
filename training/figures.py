"""The model card's figures: python -m training.figures RUN_FOLDER MODEL_FOLDER TARGET_FOLDER

Training curves, and a contact sheet of ten test scenes with the combined map of the three localization heads.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from transformers import LlavaForConditionalGeneration

from localization_heads.attention import AttentionMaps
from localization_heads.cells import box_iou
from localization_heads.figures.style import SKY, VERMILLION
from localization_heads.grounding.ground import ground_maps
from localization_heads.heads.head import Head
from localization_heads.lvlm.checkpoints.spec import find_spec
from localization_heads.options.groups import GroundingOptions
from localization_heads.scenes.scene import scene_samples
from training.measure import SceneResult, measure

# Image tokens per image -> label of the curve. In the log, canvases with captions alone have negative keys.
CURVE_LABELS = {
    0: "text alone",
    100: "10 x 10: one object",
    144: "12 x 12: two or three",
    196: "14 x 14: one or two",
    324: "18 x 18: two or three",
    256: "16 x 16: full scenes",
    576: "24 x 24: full scenes",
}


def draw_curves(log: Path, target: Path) -> None:
    """Draw losses and accuracy on training batches, and accuracy and pointing on validation scenes."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [r for r in records if "canvases" in r]
    probes = [r for r in records if "validation" in r]
    figure, axes = plt.subplots(1, 4, figsize=(17, 3.8), layout="constrained")
    for tokens, name in CURVE_LABELS.items():
        captions, conversations = (
            [(r["step"], r["canvases"][key]) for r in steps if key in r["canvases"]]
            for key in (str(-tokens), str(tokens))
        )
        for axis, rows, key in (
            (axes[0], captions if tokens else [], "caption_loss"),
            (axes[1], conversations, "loss"),
            (axes[2], conversations, "answer_right"),
        ):
            if rows:
                axis.plot([step for step, _ in rows], [numbers[key] for _, numbers in rows], label=name)
    for key in ("first_right", "answer_right", "top_pointing", "best_pointing", "mean_pointing"):
        axes[3].plot([r["step"] for r in probes], [r["validation"][key] for r in probes], label=key.replace("_", " "))
    titles = (
        "captions alone: loss",
        "conversations: loss",
        "conversations: answer tokens right",
        "60 validation scenes, from step 13,000 on 120",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="step")
        axis.locator_params(axis="x", nbins=5)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(target, dpi=110)


def draw_sheet(model: LlavaForConditionalGeneration, target: Path, num_scenes: int = 10) -> None:
    """Draw the first test scenes: the image with the true and the predicted box, and the combined map."""
    size = model.config.vision_config.image_size
    top = list(find_spec("tiny").heads)
    results = measure(model, scene_samples(num_scenes, size=size))
    figure, axes = plt.subplots(4, num_scenes // 2, figsize=(13, 11), layout="constrained")
    for index, result in enumerate(results):
        row, column = divmod(index, num_scenes // 2)
        _draw_scene(axes[2 * row, column], axes[2 * row + 1, column], result, top)
    figure.savefig(target, dpi=90)


def _draw_scene(above, below, result: SceneResult, top: list[Head]) -> None:
    size = result.scene.image.shape[0]
    maps = AttentionMaps(result.maps, (0.0, 0.0, float(size), float(size)), (size, size))
    grounding = ground_maps(maps, top, GroundingOptions(upsample=2))
    iou = float(box_iou(grounding.box, result.target.box))
    above.imshow(result.scene.image)
    for (x0, y0, x1, y1), colour in ((result.target.box, SKY), (grounding.box, VERMILLION)):
        above.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=2))
    words = zip([*result.expression.answer.split(), "(end)"], result.answer_correct, strict=True)
    above.set_title(f"{result.expression.text}. IoU {iou:.2f}", fontsize=9)
    wrong = [word for word, correct in words if not correct]
    below.imshow(result.scene.image, alpha=0.5)
    below.imshow(grounding.heatmap, cmap="viridis", alpha=0.6)
    verdict = f"missed: {' '.join(wrong)}" if wrong else "answer right"
    below.set_title(f"{result.expression.answer}\n{verdict}", fontsize=9)
    for axis in (above, below):
        axis.set_axis_off()


def main() -> None:
    """Parse the options and draw both figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("model", type=Path, help="folder of an exported model")
    parser.add_argument("docs", type=Path, help="folder for the images")
    options = parser.parse_args()
    options.docs.mkdir(parents=True, exist_ok=True)
    draw_curves(options.run / "log.jsonl", options.docs / "embedded-curves.png")
    draw_sheet(LlavaForConditionalGeneration.from_pretrained(options.model), options.docs / "embedded-scenes.jpg")


if __name__ == "__main__":
    main()
