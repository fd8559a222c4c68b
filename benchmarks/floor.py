"""Lower bounds, by formula, on the arithmetic and the memory traffic of a forward pass.

A multiply-add counts as two operations. Norms, activation functions, rotary embeddings and softmax are left out (under
1 %). Traffic counts each weight that is used once, and no activations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

VOCABULARY = 32064


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaVA; the defaults are LLaVA-1.5-7B's (CLIP ViT-L/14 at 336 pixels, Vicuna-7B)."""

    layers: int = 32
    hidden: int = 4096
    mlp: int = 11008
    heads: int = 32
    vision_layers: int = 24
    vision_hidden: int = 1024
    vision_mlp: int = 4096
    vision_heads: int = 16
    side: int = 336
    patch: int = 14

    def __str__(self) -> str:
        """The number of layers and, if it is not LLaVA-1.5-7B's, the hidden size."""
        narrow = "" if self.hidden == Shape.hidden else f" of {self.hidden:,}, LLaVA-1.5-7B's have {Shape.hidden:,}"
        return f"{self.layers} layers{narrow}"

    @property
    def image_tokens(self) -> int:
        return (self.side // self.patch) ** 2

    def weights(self, distinct: int, width: int = 2) -> float:
        """Bytes of a model's weights if only `distinct` decoder layers have their own; `width`: bytes of a weight."""
        embeddings = 2 * linear(1, VOCABULARY, self.hidden, width)
        return (distinct * decoder_layer(self, 1, width=width) + embeddings + vision(self, width)).bytes

    def fitting(self, memory: float, distinct: int, width: int = 2) -> Shape:
        """This shape, halved in width until 1.5 times its weights fit into `memory` bytes."""
        shape = self
        while 1.5 * shape.weights(distinct, width) > memory and shape.heads % 2 == 0:
            shape = replace(shape, hidden=shape.hidden // 2, mlp=shape.mlp // 2, heads=shape.heads // 2)
        return shape


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes of memory traffic."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __rmul__(self, times: int) -> Work:
        return Work(times * self.flops, times * self.bytes)

    def __str__(self) -> str:
        return f"{_with_prefix(self.flops)}FLOP, {_with_prefix(self.bytes)}B"

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The longer of computing and loading: a perfect machine overlaps them."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def linear(tokens: int, inputs: int, outputs: int, width: int = 2) -> Work:
    """A linear layer over `tokens` tokens; `width`: bytes of a weight."""
    return Work(2 * tokens * inputs * outputs, width * inputs * outputs)


def attention(pairs: int, hidden: int) -> Work:
    """Attention scores and weighted values of `pairs` query-key pairs, over all heads."""
    return Work(4 * pairs * hidden, 0)


def causal_pairs(tokens: int, before: int = 0) -> int:
    """Query-key pairs of `tokens` tokens in causal attention, after `before` cached ones."""
    return tokens * before + tokens * (tokens + 1) // 2


def decoder_layer(shape: Shape, tokens: int, before: int = 0, width: int = 2) -> Work:
    """One decoder layer over `tokens` tokens after `before` cached ones: 4 projections, the MLP's 3, attention."""
    projections, mlp = (
        linear(tokens, shape.hidden, shape.hidden, width),
        linear(tokens, shape.hidden, shape.mlp, width),
    )
    return 4 * projections + 3 * mlp + attention(causal_pairs(tokens, before), shape.hidden)


def last_row(shape: Shape, tokens: int, before: int = 0, width: int = 2) -> Work:
    """The last token's attention row in one layer: all keys, one query, its scores; no values, output or MLP."""
    keys = linear(tokens, shape.hidden, shape.hidden, width)
    query = linear(1, shape.hidden, shape.hidden, width)
    return keys + query + Work(2 * (before + tokens) * shape.hidden, 0)


def vision(shape: Shape, width: int = 2) -> Work:
    """Patch embedding, all vision layers but the last (LLaVA uses the penultimate one's output), and the projector."""
    tokens, hidden = shape.image_tokens + 1, shape.vision_hidden
    patches = linear(shape.image_tokens, 3 * shape.patch**2, hidden, width)
    layer = 4 * linear(tokens, hidden, hidden, width) + 2 * linear(tokens, hidden, shape.vision_mlp, width)
    layers = (shape.vision_layers - 1) * (layer + attention(tokens * tokens, hidden))
    first = linear(shape.image_tokens, hidden, shape.hidden, width)
    second = linear(shape.image_tokens, shape.hidden, shape.hidden, width)
    return patches + layers + first + second


def capture_work(shape: Shape, tokens: int, last_layer: int | None = None, width: int = 2) -> Work:
    """The last token's attention rows of one expression, in every layer up to `last_layer` (from 0; None: all)."""
    deepest = shape.layers - 1 if last_layer is None else last_layer
    below = deepest * decoder_layer(shape, tokens, width=width)
    return vision(shape, width) + below + last_row(shape, tokens, width=width)


def shared_capture_work(shape: Shape, prefix: int, suffixes: list[int], width: int = 2) -> Work:
    """The same for several expressions of one image: the shared prefix once, the suffixes as one batch."""
    suffix_work = [
        (shape.layers - 1) * decoder_layer(shape, tokens, prefix) + last_row(shape, tokens, prefix)
        for tokens in suffixes
    ]
    # The weights are read once, for the prefix and all suffixes together.
    return capture_work(shape, prefix, width=width) + Work(sum(work.flops for work in suffix_work), 0)


def _with_prefix(number: float) -> str:
    """The number with an SI prefix.

    >>> _with_prefix(2_500_000), _with_prefix(1.5e13)
    ('2.5 M', '15.0 T')
    """
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size / 10:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} "
