"""The embedded model's language: vocabulary, tokenizer, and the conversations that it is trained on."""

from collections.abc import Iterator
from random import Random

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from localization_heads.scenes.artwork import NAMES, PALETTE, VOCABULARY
from localization_heads.scenes.expressions import PLACES, RELATIONS, USES, Expression, draw_absent_expression
from localization_heads.scenes.scene import Scene

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<unk>")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
SENTENCES = """
what is in this image ? describe the picture . what do you see here , please ? can you tell me about it ?
what colour is that ? color how big or small plain are there many objects does have yes no nothing
the thing on the left right at top bottom above below of which has with something to and a an
what kind of can you name repeat : i me find where show object only it
"""
COMPARISON = "comparison"
QUESTION_SHARE = 0.2  # of the turns about an image
PROPERTIES = tuple(dict.fromkeys(feature for _, feature in VOCABULARY.values() if feature))


def split(text: str) -> list[str]:
    """Lower-case words and punctuation marks, split as by `build_tokenizer`."""
    spaced = "".join(c if c.isalnum() or c.isspace() else f" {c} " for c in text.lower())
    return spaced.split()


def vocabulary() -> list[str]:
    """All words by token id: special tokens first, then the words in order of first use."""
    kinds = [kind for kind, _ in VOCABULARY.values()]
    words = [
        *split(SYSTEM),
        *split(SENTENCES),
        *NAMES,
        *kinds,
        *PROPERTIES,
        *USES.values(),
        *PALETTE,
        *NUMBERS,
    ]
    return [*SPECIAL, *dict.fromkeys(words)]


IDS = {word: index for index, word in enumerate(vocabulary())}


def encode(text: str) -> list[int]:
    """Token ids of a text without special tokens."""
    return [IDS.get(word, IDS["<unk>"]) for word in split(text)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level fast tokenizer that lower-cases, splits off punctuation and prepends `<s>`."""
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", IDS["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=1024,
        clean_up_tokenization_spaces=True,
    )


def scene_turns(
    scene: Scene,
    rng: Random,
    places: bool = False,
    weights: dict[str, float] | None = None,
    presence: float = 0.0,
) -> Iterator[tuple[str, str]]:
    """An endless stream of (prompt, answer) turns: often a list of the objects first, then expressions and questions.

    Args:
        places: start the answers to expressions with the object's place (the ablation).
        weights: sampling weights of the kinds of expression, 1 for kinds not given; None or empty: uniform. With a
            weight for COMPARISON, places and relations that tell objects of one name apart are a kind of their own.
        presence: share of the turns that ask whether an expression refers to anything.
    """
    if rng.random() < 0.6:
        yield list_turn(scene, rng)
    informative = [e for e in scene.expressions if len(scene.objects) > 1 or scene.objects[0].name not in e.text]
    by_kind: dict[str, list] = {}
    for expression in informative:
        by_kind.setdefault(_kind(expression, scene, weights or {}), []).append(expression)
    while True:
        if presence and rng.random() < presence:
            yield presence_turn(scene, rng)
        elif not informative or rng.random() < QUESTION_SHARE:
            yield question_turn(scene, rng)
        else:
            kinds = list(by_kind)
            kind = rng.choices(kinds, [weights.get(k, 1.0) for k in kinds])[0] if weights else rng.choice(kinds)
            e = rng.choice(by_kind[kind])
            place = f"{_place(scene, e.object_index)} " if places else ""
            yield f"{_with_random_prefix(e.text, rng)} .", place + e.answer


def _kind(expression: Expression, scene: Scene, weights: dict[str, float]) -> str:
    """The kind of an expression, or COMPARISON if it is one and `weights` has that kind."""
    name = scene.objects[expression.object_index].name
    if COMPARISON in weights and expression.kind in ("place", "relation"):
        return COMPARISON if [o.name for o in scene.objects].count(name) > 1 else expression.kind
    return expression.kind


def _with_random_prefix(text: str, rng: Random) -> str:
    """The text, sometimes with a prefix: "please find", or an unknown word, so that the model is trained on one."""
    if rng.random() < 0.03:
        return f"please find {text}"
    return f"<unk> {text}" if rng.random() < 0.02 else text


def _place(scene: Scene, index: int) -> str:
    """The quadrant of the image that holds an object's centre, such as "top left"."""
    x0, y0, x1, y1 = scene.objects[index].box
    size = scene.image.shape[0]
    row = "top" if y0 + y1 < size else "bottom"
    return f"{row} {'left' if x0 + x1 < size else 'right'}"


def list_turn(scene: Scene, rng: Random) -> tuple[str, str]:
    """Ask for a list of the objects; the answer names them from left to right."""
    prompts = (
        "what is in this image ?",
        "describe this image .",
        "what do you see ?",
        "describe the picture .",
    )
    ordered = sorted(scene.objects, key=lambda o: o.box[0] + o.box[2])
    return rng.choice(prompts), " , ".join(o.name for o in ordered)


def question_turn(scene: Scene, rng: Random) -> tuple[str, str]:
    """Ask about an object's colour, size, name or location, the number of objects, or whether a kind is present."""
    kind = rng.choice(("colour", "colour", "size", "name", "count", "exists", "where", "where"))
    if kind == "where":
        return _where_turn(scene, rng)
    if kind == "count":
        return "how many objects are there ?", NUMBERS[len(scene.objects)]
    if kind == "exists" or not scene.expressions:
        present = [o.name for o in scene.objects]
        name = rng.choice(present if rng.random() < 0.5 else NAMES)
        return f"is there a {name} ?", "yes" if name in present else "no"
    e = rng.choice(scene.expressions)
    target = scene.objects[e.object_index]
    phrase = e.text if e.text.startswith(("the ", "something ")) else f"the {e.text}"
    if kind == "name" and target.name not in e.text:
        return f"what is {phrase} ?", target.name
    if kind == "size":
        return f"how big is {phrase} ?", target.size_word
    return f"what {rng.choice(('colour', 'color'))} is {phrase} ?", target.colour


def presence_turn(scene: Scene, rng: Random) -> tuple[str, str]:
    """Ask whether an expression refers to anything in the image; yes and no are equally likely."""
    if scene.expressions and rng.random() < 0.5:
        return f"is there {rng.choice(scene.expressions).text} ?", "yes"
    return f"is there {draw_absent_expression(scene.things, rng).text} ?", "no"


def _where_turn(scene: Scene, rng: Random) -> tuple[str, str]:
    """Ask whether an object is in one half of the image, or on one side of another object (yes or no)."""
    names = [o.name for o in scene.objects]
    unique = [o for o in scene.objects if names.count(o.name) == 1]
    if not unique:
        return "how many objects are there ?", NUMBERS[len(scene.objects)]
    target, *others = rng.sample(unique, min(2, len(unique)))
    side = scene.image.shape[0]
    other = others[0] if others and rng.random() < 0.5 else None
    words = RELATIONS if other else PLACES

    def offset(word: str) -> float:
        axis, sign = words[word]
        centre = other.box[axis] + other.box[axis + 2] if other else side
        return sign * (target.box[axis] + target.box[axis + 2] - centre) / 2 / side

    word = max(rng.sample(list(words), 2), key=lambda word: abs(offset(word)))  # prefer the clearer axis
    answer = "yes" if offset(word) > 0 else "no"
    if other:
        return f"is the {target.name} {word} the {other.name} ?", answer
    return f"is the {target.name} {'at' if word in ('top', 'bottom') else 'on'} the {word} ?", answer


def text_turns(rng: Random) -> Iterator[tuple[str, str]]:
    """An endless stream of (prompt, answer) turns without an image: facts about things, and words to repeat."""
    while True:
        name, other = rng.sample(NAMES, 2)
        kind, feature = VOCABULARY[name]
        task = rng.choice(("kind", "has", "choose", "repeat"))
        if task == "kind":
            yield f"what kind of thing is the {name} ?", kind
        elif task == "has":
            candidate = feature if feature and rng.random() < 0.5 else rng.choice(PROPERTIES)
            yield f"does the {name} have {candidate} ?", "yes" if candidate == feature else "no"
        elif task == "choose" and VOCABULARY[other][0] != kind:
            first, second = rng.sample((name, other), 2)
            yield f"which is the {kind} , {first} or {second} ?", name
        else:
            words = " ".join(rng.sample((*NAMES, *PALETTE), rng.randint(2, 4)))
            yield f"repeat : {words} .", words
