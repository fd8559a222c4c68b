"""The embedded LLaVA and a fast training forward over its weights.

The fast forward computes what `LlavaForConditionalGeneration` computes (a test holds it to that), but many
conversations share one image: keys and values of the system sentence are computed once a step, those of the
image once an image, and each packed conversation attends to that prefix and to itself.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from training.language import IDS, SYSTEM, encode
from training.recipe import ModelRecipe

PREFIX = [IDS["<s>"], *encode(SYSTEM)]


def build_model(recipe: ModelRecipe) -> LlavaForConditionalGeneration:
    """A LLaVA with fresh weights."""
    vision = CLIPVisionConfig(
        hidden_size=recipe.width,
        intermediate_size=recipe.vision_mlp,
        num_hidden_layers=recipe.vision_layers,
        num_attention_heads=recipe.vision_heads,
        image_size=recipe.image_size,
        patch_size=recipe.patch_size,
        projection_dim=recipe.width,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(IDS),
        hidden_size=recipe.width,
        intermediate_size=recipe.text_mlp,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=recipe.text_heads,
        num_key_value_heads=recipe.text_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=IDS["<pad>"],
        bos_token_id=IDS["<s>"],
        eos_token_id=IDS["</s>"],
        rope_parameters=rotary(recipe),
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IDS["<image>"],
        image_seq_length=recipe.grid**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        pad_token_id=IDS["<pad>"],
    )
    return LlavaForConditionalGeneration(config)


def rotary(recipe: ModelRecipe) -> dict:
    """Rotary frequencies theta ** (-2 i / d), but the last two turn once a row of image tokens.

    Image tokens come row by row. Low frequencies tell rows apart, but with the plain ones no angle stands for a column,
    and no head can tell left from right. The last two would hardly turn at all.
    """
    number = recipe.head_dim // 2
    plain = [recipe.rope_theta ** (-i / number) for i in range(number)]
    factors = [1.0] * (number - 2) + [frequency * recipe.grid / (2 * math.pi) for frequency in plain[-2:]]
    return {
        "rope_type": "longrope",  # the type with a factor for every frequency
        "rope_theta": recipe.rope_theta,
        "factor": 1.0,
        "short_factor": factors,
        "long_factor": factors,
    }


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention (B, H, T, d) and its weights (B, H, T, N): in bfloat16 on a CPU faster than the fused one.

    `bias` (B or 1, T, N) is added to the scores; `keep` (B, 1, T, N) scales the probabilities (dropout).
    """
    batch, heads, length, width = q.shape
    scores = torch.bmm((q * width**-0.5).flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
    scores = scores.view(batch, heads, length, -1)
    if bias is not None:
        scores = scores + bias[:, None]
    weights = torch.softmax(scores, -1)
    kept = weights if keep is None else weights * keep
    mixed = torch.bmm(kept.flatten(0, 1), v.flatten(0, 1)).view(batch, heads, length, width)
    return mixed, weights


class FastForward:
    """Hidden states of packed conversations, given the model's own modules."""

    def __init__(
        self, model: LlavaForConditionalGeneration, image_dropout: float = 0.0, image_keep: float = 1.0
    ):
        text = model.config.text_config
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        self.language = model.model.language_model
        self.heads, self.head_dim = text.num_attention_heads, text.head_dim
        self.vision_heads = model.config.vision_config.num_attention_heads
        self.patch = model.config.vision_config.patch_size
        self.eps = text.rms_norm_eps
        self.image_dropout, self.image_keep = image_dropout, image_keep
        self.dtype = self.projector.linear_1.weight.dtype
        frequencies = text.rope_parameters["rope_theta"] ** (
            -torch.arange(0, self.head_dim, 2) / self.head_dim
        ) / torch.tensor(text.rope_parameters["short_factor"])
        angles = torch.arange(text.max_position_embeddings)[:, None] * frequencies
        self.device = self.projector.linear_1.weight.device
        self.cos, self.sin = (
            f(torch.cat([angles, angles], -1)).to(self.device, self.dtype) for f in (torch.cos, torch.sin)
        )

    def image_features(self, pixels: Tensor, cells: Tensor) -> Tensor:
        """Projected patches (B, N, D) of pixels (B, 3, h, w); `cells` (B, N): their places in the full grid."""
        tower = self.tower.vision_model if hasattr(self.tower, "vision_model") else self.tower
        embed = tower.embeddings
        patches = functional.unfold(pixels.to(self.dtype), self.patch, stride=self.patch).transpose(1, 2)
        places = embed.position_embedding.weight.to(self.dtype)
        x = patches @ embed.patch_embedding.weight.flatten(1).t() + places[1:][cells]
        first = (embed.class_embedding.to(self.dtype) + places[0]).expand(x.shape[0], 1, -1)
        x = tower.pre_layrnorm(torch.cat([first, x], 1))
        for layer in tower.encoder.layers:
            x = self._vision_layer(layer, x)
        projector = self.projector
        return projector.linear_2(functional.gelu(projector.linear_1(x[:, 1:])))

    def _vision_layer(self, layer, x: Tensor) -> Tensor:
        attention, y = layer.self_attn, layer.layer_norm1(x)
        q, k, v = (
            self._split(p(y), self.vision_heads)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        x = x + attention.out_proj(attend(q, k, v)[0].transpose(1, 2).flatten(2))
        return x + layer.mlp.fc2(functional.gelu(layer.mlp.fc1(layer.layer_norm2(x))))

    @staticmethod
    def _split(x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2)

    def _norm(self, norm, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), norm.weight, self.eps)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of (B, H, T, d) at positions (B, T)."""
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    def text_states(
        self, features: Tensor | None, cells: Tensor | None, ids: Tensor, offsets: Tensor, groups: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Last hidden states (B, T, D) of packed conversations, and each head's mean attention sum over the image.

        `features` (B, N, D) and `cells` (B, N) give the image, or None for text alone; `ids` (B, T) tokens;
        `offsets` (B, T) each token's place in its conversation; `groups` (B, T) which conversation it is in.
        """
        table = self.language.embed_tokens.weight
        system = functional.embedding(torch.tensor([PREFIX], device=self.device), table).to(self.dtype)
        text = functional.embedding(ids, table).to(self.dtype)
        if features is None:
            features, cells = text[:, :0], ids[:, :0]
        grid = self.tower.config.image_size // self.patch if features.shape[1] else 0
        features, cells = self._thin_out(features, cells)
        streams = [system, features, text]
        system_places = torch.arange(len(PREFIX), device=self.device)[None]
        positions = [system_places, cells + len(PREFIX), offsets + len(PREFIX) + grid**2]
        biases = self._biases(features.shape[1], groups)
        looks = []
        for index, layer in enumerate(self.language.layers):
            last = index == len(self.language.layers) - 1
            streams, looked = self._text_layer(layer, streams, positions, biases, only_text=last)
            looks.append(looked)
        return self._norm(self.language.norm, streams[2]), torch.stack(looks)  # (layer, head)

    def _biases(self, num_image: int, groups: Tensor) -> list[Tensor]:
        """Additive masks of system, image and text queries over the keys they may have."""

        def additive(allowed: Tensor) -> Tensor:
            blank = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device)
            return blank.masked_fill(~allowed, float("-inf"))

        def triangle(length: int) -> Tensor:
            return torch.ones(length, length, dtype=torch.bool, device=self.device).tril()

        system = len(PREFIX)
        causal = triangle(system + num_image)[None]
        own = (groups[:, :, None] == groups[:, None]) & triangle(groups.shape[1])
        text = functional.pad(own, (system + num_image, 0), value=True)
        biases = [additive(causal[:, :system, :system]), additive(causal[:, system:]), additive(text)]
        for bias in biases[1:]:  # the tokens that are left stand for all
            bias[..., system : system + num_image] -= math.log(self.image_keep)
        return biases

    def _thin_out(self, features: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """A random share `image_keep` of the image tokens (B, N, D) and their cells (B, N), in their order."""
        number = round(self.image_keep * features.shape[1])
        if number == features.shape[1]:
            return features, cells
        kept = torch.rand(features.shape[:2], device=self.device).topk(number).indices.sort(1).values
        return features.gather(1, kept[..., None].expand(-1, -1, features.shape[2])), cells.gather(1, kept)

    def _text_layer(self, layer, streams, positions, biases, only_text: bool) -> tuple[list[Tensor], Tensor]:
        """One decoder layer over (system, image, text); each stream sees those before it and itself.

        Also gives the text's mean attention sum over the image in each head: (H,).
        """
        attention, batch = layer.self_attn, streams[2].shape[0]
        normed = [self._norm(layer.input_layernorm, x) for x in streams]
        keys = [
            self._rotate(self._split(attention.k_proj(x), self.heads), p)
            for x, p in zip(normed, positions, strict=True)
        ]
        values = [self._split(attention.v_proj(x), self.heads) for x in normed]
        output = list(streams)
        for i in (2,) if only_text else range(3):
            if streams[i].shape[1] == 0:
                continue
            rows = 1 if i == 0 else batch
            k, v = (
                torch.cat([y.expand(rows, -1, -1, -1) for y in part[: i + 1]], 2) for part in (keys, values)
            )
            q = self._rotate(self._split(attention.q_proj(normed[i]), self.heads), positions[i])
            keep = self._dropout(q, streams[1].shape[1], k.shape[2]) if i == 2 else None
            mixed, weights = attend(q, k, v, biases[i], keep)
            x = streams[i] + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            y, mlp = self._norm(layer.post_attention_layernorm, x), layer.mlp
            output[i] = x + mlp.down_proj(functional.silu(mlp.gate_proj(y)) * mlp.up_proj(y))
        image = weights[
            ..., len(PREFIX) : len(PREFIX) + streams[1].shape[1]
        ]  # of text queries, the last stream
        return output, image.sum(-1).float().mean((0, 2))

    def _dropout(self, q: Tensor, num_image: int, num_keys: int) -> Tensor | None:
        """Scales (B, 1, T, keys) that drop attention to image tokens at random."""
        if not (self.image_dropout and num_image):
            return None
        drawn = torch.rand(q.shape[0], 1, q.shape[2], num_image, device=self.device)
        kept = drawn >= self.image_dropout  # the same in all heads
        scale = kept.to(self.dtype) / (1 - self.image_dropout)
        return functional.pad(scale, (len(PREFIX), num_keys - num_image - len(PREFIX)), value=1.0)

    def caption_loss(self, features: Tensor, words: Tensor, keep: float) -> Tensor:
        """How badly the patches alone, read as the language model reads its states, name the caption's words.

        `features` (B, N, D) projected patches, `words` (B, vocabulary) marks. Patches are pooled by log-sum-exp
        over a random share `keep` of them. Like CLIP's captions, this says what is in an image, never where.
        """
        scores = self.logits(self._norm(self.language.norm, features)).float()
        dropped = torch.rand(features.shape[:2], device=self.device) >= keep
        pooled = scores.masked_fill(dropped[..., None], -1e4).logsumexp(1)
        return -(pooled.log_softmax(-1) * words / words.sum(-1, keepdim=True)).sum(-1).mean()

    def logits(self, states: Tensor) -> Tensor:
        """Scores (B, T, vocabulary) of the next token."""
        return states @ self.language.embed_tokens.weight.to(self.dtype).t()
