"""The words of the embedded model: vocabulary, tokenizer, and the conversations it learns from."""

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
QUESTIONS = 0.2  # share of the turns about an image
PROPERTIES = tuple(dict.fromkeys(feature for _, feature in VOCABULARY.values() if feature))


def split(text: str) -> list[str]:
    """Words and punctuation marks, lower case; the tokenizer does the same."""
    spaced = "".join(c if c.isalnum() or c.isspace() else f" {c} " for c in text.lower())
    return spaced.split()


def vocabulary() -> list[str]:
    """Special tokens first, then every word in order of first use."""
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
    """Word-level fast tokenizer: lower case, punctuation split off, `<s>` in front."""
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
    """(prompt, answer) turns about a scene, endless: a description, then expressions and questions.

    `places` puts the object's place in front of every description (the ablation). `weights` says how often which
    kind of expression is drawn (1 for kinds not named); all alike if empty. A weight for COMPARISON sets apart the
    places and relations that tell things of one name from each other. `presence` is the share of the turns that ask
    whether an expression refers to something.
    """
    if rng.random() < 0.6:
        yield list_turn(scene, rng)
    telling = [e for e in scene.expressions if len(scene.objects) > 1 or scene.objects[0].name not in e.text]
    by_kind: dict[str, list] = {}
    for expression in telling:
        by_kind.setdefault(_kind(expression, scene, weights or {}), []).append(expression)
    while True:
        if presence and rng.random() < presence:
            yield presence_turn(scene, rng)
        elif not telling or rng.random() < QUESTIONS:
            yield question_turn(scene, rng)
        else:
            kinds = list(by_kind)
            kind = (
                rng.choices(kinds, [weights.get(k, 1.0) for k in kinds])[0] if weights else rng.choice(kinds)
            )
            e = rng.choice(by_kind[kind])
            place = f"{_place(scene, e.object_index)} " if places else ""
            yield f"{_with_unknown_word(e.text, rng)} .", place + e.answer


def _kind(expression: Expression, scene: Scene, weights: dict[str, float]) -> str:
    """The kind of an expression, or COMPARISON where that has a weight of its own."""
    name = scene.objects[expression.object_index].name
    if COMPARISON in weights and expression.kind in ("place", "relation"):
        return COMPARISON if [o.name for o in scene.objects].count(name) > 1 else expression.kind
    return expression.kind


def _with_unknown_word(text: str, rng: Random) -> str:
    """Now and then a word the model does not know in front, so that it has met one."""
    return (
        f"please find {text}"
        if rng.random() < 0.03
        else f"{SPECIAL[-1]} {text}"
        if rng.random() < 0.02
        else text
    )


def _place(scene: Scene, index: int) -> str:
    x0, y0, x1, y1 = scene.objects[index].box
    size = scene.image.shape[0]
    row = "top" if y0 + y1 < size else "bottom"
    return f"{row} {'left' if x0 + x1 < size else 'right'}"


def list_turn(scene: Scene, rng: Random) -> tuple[str, str]:
    """Ask for everything; the names come from left to right."""
    prompts = (
        "what is in this image ?",
        "describe this image .",
        "what do you see ?",
        "describe the picture .",
    )
    ordered = sorted(scene.objects, key=lambda o: o.box[0] + o.box[2])
    return rng.choice(prompts), " , ".join(o.name for o in ordered)


def question_turn(scene: Scene, rng: Random) -> tuple[str, str]:
    """A question about one object, the number of objects, or whether something is there, or where one says."""
    kind = rng.choice(("colour", "colour", "size", "name", "count", "exists", "where", "where"))
    if kind == "where":
        return _where_turn(scene, rng)
    if kind == "count":
        return "how many objects are there ?", NUMBERS[len(scene.objects)]
    if kind == "exists" or not scene.expressions:
        there = [o.name for o in scene.objects]
        name = rng.choice(there if rng.random() < 0.5 else NAMES)
        return f"is there a {name} ?", "yes" if name in there else "no"
    e = rng.choice(scene.expressions)
    target = scene.objects[e.object_index]
    phrase = e.text if e.text.startswith(("the ", "something ")) else f"the {e.text}"
    if kind == "name" and target.name not in e.text:
        return f"what is {phrase} ?", target.name
    if kind == "size":
        return f"how big is {phrase} ?", target.size_word
    return f"what {rng.choice(('colour', 'color'))} is {phrase} ?", target.colour


def presence_turn(scene: Scene, rng: Random) -> tuple[str, str]:
    """Ask whether an expression refers to something in the image: as often yes as no."""
    if scene.expressions and rng.random() < 0.5:
        return f"is there {rng.choice(scene.expressions).text} ?", "yes"
    return f"is there {draw_absent_expression(scene.things, rng).text} ?", "no"


def _where_turn(scene: Scene, rng: Random) -> tuple[str, str]:
    """Ask whether an object is in one half of the image, or on one side of another; the answer is yes or no."""
    names = [o.name for o in scene.objects]
    single = [o for o in scene.objects if names.count(o.name) == 1]
    if not single:
        return "how many objects are there ?", NUMBERS[len(scene.objects)]
    target, *others = rng.sample(single, min(2, len(single)))
    side = scene.image.shape[0]
    other = others[0] if others and rng.random() < 0.5 else None
    words = RELATIONS if other else PLACES

    def offset(word: str) -> float:
        axis, sign = words[word]
        centre = other.box[axis] + other.box[axis + 2] if other else side
        return sign * (target.box[axis] + target.box[axis + 2] - centre) / 2 / side

    word = max(rng.sample(list(words), 2), key=lambda word: abs(offset(word)))  # rather the telling axis
    answer = "yes" if offset(word) > 0 else "no"
    if other:
        return f"is the {target.name} {word} the {other.name} ?", answer
    return f"is the {target.name} {'at' if word in ('top', 'bottom') else 'on'} the {word} ?", answer


def text_turns(rng: Random) -> Iterator[tuple[str, str]]:
    """(prompt, answer) turns that need no image, endless: what things are, have, are for; repeating words."""
    while True:
        name, other = rng.sample(NAMES, 2)
        kind, feature = VOCABULARY[name]
        task = rng.choice(("kind", "has", "choose", "repeat"))
        if task == "kind":
            yield f"what kind of thing is the {name} ?", kind
        elif task == "has":
            asked = feature if feature and rng.random() < 0.5 else rng.choice(PROPERTIES)
            yield f"does the {name} have {asked} ?", "yes" if asked == feature else "no"
        elif task == "choose" and VOCABULARY[other][0] != kind:
            first, second = rng.sample((name, other), 2)
            yield f"which is the {kind} , {first} or {second} ?", name
        else:
            words = " ".join(rng.sample((*NAMES, *PALETTE), rng.randint(2, 4)))
            yield f"repeat : {words} .", words
