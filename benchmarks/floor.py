"""The least arithmetic and the least traffic that a task needs, by formula: what no implementation can go below.

A multiply and an add are two operations. Norms, activations, rotations and softmax are left out (under 1 %), and so
is the traffic of activations: every weight that is used is read once.
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
        """What is not LLaVA-1.5-7B's, and the layers."""
        narrow = (
            ""
            if self.hidden == Shape.hidden
            else f" of {self.hidden:,}, LLaVA-1.5-7B's have {Shape.hidden:,}"
        )
        return f"{self.layers} layers{narrow}"

    @property
    def image_tokens(self) -> int:
        return (self.side // self.patch) ** 2

    def weights(self, distinct: int, width: int = 2) -> float:
        """Bytes of a model in which only so many layers have weights of their own."""
        embeddings = 2 * linear(1, VOCABULARY, self.hidden, width)
        return (distinct * decoder_layer(self, 1, width=width) + embeddings + vision(self, width)).bytes

    def fitting(self, room: float, distinct: int, width: int = 2) -> Shape:
        """Half as wide, and again, until the weights and half as much again have room."""
        shape = self
        while 1.5 * shape.weights(distinct, width) > room and shape.heads % 2 == 0:
            shape = replace(shape, hidden=shape.hidden // 2, mlp=shape.mlp // 2, heads=shape.heads // 2)
        return shape


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes to and from memory."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __rmul__(self, times: int) -> Work:
        return Work(times * self.flops, times * self.bytes)

    def __str__(self) -> str:
        return f"{_counted(self.flops)}FLOP, {_counted(self.bytes)}B"

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The longer of the two: a perfect machine does both at once."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def linear(tokens: int, inputs: int, outputs: int, width: int = 2) -> Work:
    """A matrix product; `width`: bytes of a weight."""
    return Work(2 * tokens * inputs * outputs, width * inputs * outputs)


def attention(pairs: int, hidden: int) -> Work:
    """Scores and weighted values of so many pairs of a query and a key, over all heads."""
    return Work(4 * pairs * hidden, 0)


def causal_pairs(tokens: int, before: int = 0) -> int:
    """Each of `tokens` looks at itself and at all before it, `before` of them known already."""
    return tokens * before + tokens * (tokens + 1) // 2


def decoder_layer(shape: Shape, tokens: int, before: int = 0, width: int = 2) -> Work:
    """Queries, keys, values, output; gate, up, down; causal attention."""
    projections, mlp = (
        linear(tokens, shape.hidden, shape.hidden, width),
        linear(tokens, shape.hidden, shape.mlp, width),
    )
    return 4 * projections + 3 * mlp + attention(causal_pairs(tokens, before), shape.hidden)


def last_row(shape: Shape, tokens: int, before: int = 0, width: int = 2) -> Work:
    """What the deepest layer needs: keys of all tokens, one query, its scores. No values, no output, no MLP."""
    keys = linear(tokens, shape.hidden, shape.hidden, width)
    query = linear(1, shape.hidden, shape.hidden, width)
    return keys + query + Work(2 * (before + tokens) * shape.hidden, 0)


def vision(shape: Shape, width: int = 2) -> Work:
    """Patches, all layers but the last (LLaVA takes the one before it), and the projector."""
    tokens, hidden = shape.image_tokens + 1, shape.vision_hidden
    patches = linear(shape.image_tokens, 3 * shape.patch**2, hidden, width)
    layer = 4 * linear(tokens, hidden, hidden, width) + 2 * linear(tokens, hidden, shape.vision_mlp, width)
    layers = (shape.vision_layers - 1) * (layer + attention(tokens * tokens, hidden))
    first = linear(shape.image_tokens, hidden, shape.hidden, width)
    second = linear(shape.image_tokens, shape.hidden, shape.hidden, width)
    return patches + layers + first + second


def capture(shape: Shape, tokens: int, last_layer: int | None = None, width: int = 2) -> Work:
    """The rows of the last token in every layer up to `last_layer` (from 0; None: all), one expression."""
    deepest = shape.layers - 1 if last_layer is None else last_layer
    below = deepest * decoder_layer(shape, tokens, width=width)
    return vision(shape, width) + below + last_row(shape, tokens, width=width)


def shared_capture(shape: Shape, prefix: int, suffixes: list[int], width: int = 2) -> Work:
    """The same for several expressions of one image: the prefix once, the ends as one batch."""
    ends = [
        (shape.layers - 1) * decoder_layer(shape, tokens, prefix) + last_row(shape, tokens, prefix)
        for tokens in suffixes
    ]
    # The weights are read once, for the prefix and all ends together.
    return capture(shape, prefix, width=width) + Work(sum(end.flops for end in ends), 0)


def _counted(number: float) -> str:
    """
    >>> _counted(2_500_000), _counted(1.5e13)
    ('2.5 M', '15.0 T')
    """
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size / 10:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} "
