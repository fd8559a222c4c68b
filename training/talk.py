"""What the model says when it is asked about an image, as a user asks: greedy answers through `Conversation`."""

from collections import Counter
from pathlib import Path
from random import Random

from PIL import Image

import localization_heads as lh
from localization_heads.lvlm.conversation import Conversation
from localization_heads.lvlm.model import LVLM
from localization_heads.scenes.scene import scene_samples
from training.language import question_turn

QUESTIONS = 4  # asked of each image, beside its description
KINDS = {
    "what colour": "what colour",
    "what color": "what colour",
    "what is": "what is the ...",
    "how big": "how big",
    "how many": "how many objects",
    "is there": "is there a ...",
    "is the": "is the ... on the left, above ...",
}
"""Kind of a question by its first two words."""


def talk(folder: Path, num_scenes: int) -> dict[str, list[float]]:
    """Answers about test scenes: of each kind the share that is right, and how many there were."""
    lvlm = lh.load_model(str(folder))
    side = lvlm.model.config.vision_config.image_size
    values: dict[str, list[float]] = {}
    for number, (scene, _) in enumerate(scene_samples(num_scenes, size=side)):
        image, rng = Image.fromarray(scene.image), Random(number)
        said = _ask(lvlm, image, "What is in this image?")
        scores = list_scores([thing.name for thing in scene.objects], said.split(", "))
        for question, answer in (question_turn(scene, rng) for _ in range(QUESTIONS)):
            kind = KINDS[" ".join(question.split()[:2])]
            values.setdefault(kind, []).append(_ask(lvlm, image, question) == answer)
        for kind, score in scores.items():
            values.setdefault(kind, []).append(score)
    return {kind: [sum(v) / len(v), len(v)] for kind, v in sorted(values.items())}


def list_scores(there: list[str], named: list[str]) -> dict[str, float]:
    """How far a list of names is that of the things in the image; the order does not count, doubles do."""
    right = (Counter(there) & Counter(named)).total()
    return {
        "list: things that are named": right / len(there),
        "list: names that are right": right / len(named),
        "list: all of it right": float(Counter(there) == Counter(named)),
    }


def _ask(lvlm: LVLM, image: Image.Image, question: str) -> str:
    return "".join(Conversation(lvlm, image).ask(question)).strip()
