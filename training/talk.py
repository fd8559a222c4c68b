"""Accuracy of the model's greedy answers to questions about images, asked through `Conversation`."""

from collections import Counter
from pathlib import Path
from random import Random

from PIL import Image

import localization_heads as lh
from localization_heads.lvlm.conversation import Conversation
from localization_heads.lvlm.model import LVLM
from localization_heads.scenes.scene import scene_samples
from training.language import question_turn

QUESTIONS_PER_IMAGE = 4  # besides the list of objects
KINDS = {
    "what colour": "what colour",
    "what color": "what colour",
    "what is": "what is the ...",
    "how big": "how big",
    "how many": "how many objects",
    "is there": "is there a ...",
    "is the": "is the ... on the left, above ...",
}
"""First two words of a question -> its kind in the report."""


def talk(folder: Path, num_scenes: int) -> dict[str, list[float]]:
    """Kind of question -> accuracy on `num_scenes` test scenes, and number of answers."""
    lvlm = lh.load_model(str(folder))
    side = lvlm.model.config.vision_config.image_size
    values: dict[str, list[float]] = {}
    for number, (scene, _) in enumerate(scene_samples(num_scenes, size=side)):
        image, rng = Image.fromarray(scene.image), Random(number)
        answer = _ask(lvlm, image, "What is in this image?")
        scores = list_scores([scene_object.name for scene_object in scene.objects], answer.split(", "))
        for question, expected in (question_turn(scene, rng) for _ in range(QUESTIONS_PER_IMAGE)):
            kind = KINDS[" ".join(question.split()[:2])]
            values.setdefault(kind, []).append(_ask(lvlm, image, question) == expected)
        for kind, score in scores.items():
            values.setdefault(kind, []).append(score)
    return {kind: [sum(v) / len(v), len(v)] for kind, v in sorted(values.items())}


def list_scores(present: list[str], named: list[str]) -> dict[str, float]:
    """Recall, precision and exact match of the named objects, compared as multisets."""
    correct = (Counter(present) & Counter(named)).total()
    return {
        "list: things that are named": correct / len(present),
        "list: names that are right": correct / len(named),
        "list: all of it right": float(Counter(present) == Counter(named)),
    }


def _ask(lvlm: LVLM, image: Image.Image, question: str) -> str:
    return "".join(Conversation(lvlm, image).ask(question)).strip()
