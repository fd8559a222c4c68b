"""The embedded LLaVA, and a fast forward pass for training over its weights.

The fast forward pass computes the same as `LlavaForConditionalGeneration` (a test compares them), but the conversations
about an image share its prefix: the system sentence's keys and values are computed once per step, the image's once per
image, and each packed conversation attends to that prefix and to itself.
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
    """A LLaVA with newly initialised weights."""
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
        rope_parameters=rope_parameters(recipe),
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


def rope_parameters(recipe: ModelRecipe) -> dict:
    """RoPE parameters with frequencies theta ** (-2 i / d), except that the last two have a period of one grid row.

    Image tokens come row by row. Low frequencies tell rows apart, but with the plain ones no angle encodes the column,
    so no head can tell left from right. The last two frequencies are replaced since they would hardly rotate at all.
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
    """Attention (B, H, T, d) and its weights (B, H, T, N); in bfloat16 on a CPU faster than the fused kernel.

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
    """The fast forward pass over packed conversations, with the modules of `model`.

    Args:
        image_dropout: dropout of attention from text to image tokens.
        image_keep: share of the image tokens that the language model sees, drawn at random.
    """

    def __init__(self, model: LlavaForConditionalGeneration, image_dropout: float = 0.0, image_keep: float = 1.0):
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
        """Projected patches (B, N, D) of pixels (B, 3, h, w); `cells` (B, N) are their indices in the full grid."""
        tower = self.tower.vision_model if hasattr(self.tower, "vision_model") else self.tower
        embed = tower.embeddings
        patches = functional.unfold(pixels.to(self.dtype), self.patch, stride=self.patch).transpose(1, 2)
        position_table = embed.position_embedding.weight.to(self.dtype)
        x = patches @ embed.patch_embedding.weight.flatten(1).t() + position_table[1:][cells]
        class_token = (embed.class_embedding.to(self.dtype) + position_table[0]).expand(x.shape[0], 1, -1)
        x = tower.pre_layrnorm(torch.cat([class_token, x], 1))
        for layer in tower.encoder.layers:
            x = self._vision_layer(layer, x)
        projector = self.projector
        return projector.linear_2(functional.gelu(projector.linear_1(x[:, 1:])))

    def _vision_layer(self, layer, x: Tensor) -> Tensor:
        attention, y = layer.self_attn, layer.layer_norm1(x)
        q, k, v = (
            self._split_heads(p(y), self.vision_heads) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        x = x + attention.out_proj(attend(q, k, v)[0].transpose(1, 2).flatten(2))
        return x + layer.mlp.fc2(functional.gelu(layer.mlp.fc1(layer.layer_norm2(x))))

    @staticmethod
    def _split_heads(x: Tensor, heads: int) -> Tensor:
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
        `offsets` (B, T) each token's position in its conversation; `groups` (B, T) its conversation's number.
        """
        table = self.language.embed_tokens.weight
        system = functional.embedding(torch.tensor([PREFIX], device=self.device), table).to(self.dtype)
        text = functional.embedding(ids, table).to(self.dtype)
        if features is None:
            features, cells = text[:, :0], ids[:, :0]
        grid = self.tower.config.image_size // self.patch if features.shape[1] else 0
        features, cells = self._subsample_image(features, cells)
        streams = [system, features, text]
        system_positions = torch.arange(len(PREFIX), device=self.device)[None]
        positions = [system_positions, cells + len(PREFIX), offsets + len(PREFIX) + grid**2]
        biases = self._biases(features.shape[1], groups)
        attention_sums = []
        for index, layer in enumerate(self.language.layers):
            last = index == len(self.language.layers) - 1
            streams, attention_sum = self._text_layer(layer, streams, positions, biases, only_text=last)
            attention_sums.append(attention_sum)
        return self._norm(self.language.norm, streams[2]), torch.stack(attention_sums)  # (layer, head)

    def _biases(self, num_image: int, groups: Tensor) -> list[Tensor]:
        """Additive attention masks of system, image and text queries: 0 on the keys they may attend to, else -inf."""

        def additive(allowed: Tensor) -> Tensor:
            zeros = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device)
            return zeros.masked_fill(~allowed, float("-inf"))

        def causal_mask(length: int) -> Tensor:
            return torch.ones(length, length, dtype=torch.bool, device=self.device).tril()

        system = len(PREFIX)
        causal = causal_mask(system + num_image)[None]
        same_conversation = (groups[:, :, None] == groups[:, None]) & causal_mask(groups.shape[1])
        text = functional.pad(same_conversation, (system + num_image, 0), value=True)
        biases = [additive(causal[:, :system, :system]), additive(causal[:, system:]), additive(text)]
        # Each image token kept stands for 1 / image_keep of them, so that the image's share of attention stays.
        for bias in biases[1:]:
            bias[..., system : system + num_image] -= math.log(self.image_keep)
        return biases

    def _subsample_image(self, features: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """A random subset, share `image_keep`, of the image tokens (B, N, D) and their cells (B, N), in order."""
        number = round(self.image_keep * features.shape[1])
        if number == features.shape[1]:
            return features, cells
        kept = torch.rand(features.shape[:2], device=self.device).topk(number).indices.sort(1).values
        return features.gather(1, kept[..., None].expand(-1, -1, features.shape[2])), cells.gather(1, kept)

    def _text_layer(self, layer, streams, positions, biases, only_text: bool) -> tuple[list[Tensor], Tensor]:
        """One decoder layer over (system, image, text); each stream attends to those before it and to itself.

        Also returns each head's attention sum over the image, averaged over the text tokens: (H,).
        """
        attention, batch = layer.self_attn, streams[2].shape[0]
        normed = [self._norm(layer.input_layernorm, x) for x in streams]
        keys = [
            self._rotate(self._split_heads(attention.k_proj(x), self.heads), p)
            for x, p in zip(normed, positions, strict=True)
        ]
        values = [self._split_heads(attention.v_proj(x), self.heads) for x in normed]
        output = list(streams)
        for i in (2,) if only_text else range(3):
            if streams[i].shape[1] == 0:
                continue
            rows = 1 if i == 0 else batch
            k, v = (torch.cat([y.expand(rows, -1, -1, -1) for y in part[: i + 1]], 2) for part in (keys, values))
            q = self._rotate(self._split_heads(attention.q_proj(normed[i]), self.heads), positions[i])
            keep = self._image_dropout_factors(q, streams[1].shape[1], k.shape[2]) if i == 2 else None
            mixed, weights = attend(q, k, v, biases[i], keep)
            x = streams[i] + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            y, mlp = self._norm(layer.post_attention_layernorm, x), layer.mlp
            output[i] = x + mlp.down_proj(functional.silu(mlp.gate_proj(y)) * mlp.up_proj(y))
        # The last stream of the loop was the text: these are the weights of its queries.
        image_weights = weights[..., len(PREFIX) : len(PREFIX) + streams[1].shape[1]]
        return output, image_weights.sum(-1).float().mean((0, 2))

    def _image_dropout_factors(self, q: Tensor, num_image: int, num_keys: int) -> Tensor | None:
        """Factors (B, 1, T, keys) that drop attention to image tokens at random, alike in all heads; None if none."""
        if not (self.image_dropout and num_image):
            return None
        kept = torch.rand(q.shape[0], 1, q.shape[2], num_image, device=self.device) >= self.image_dropout
        scale = kept.to(self.dtype) / (1 - self.image_dropout)
        return functional.pad(scale, (len(PREFIX), num_keys - num_image - len(PREFIX)), value=1.0)

    def caption_loss(self, features: Tensor, words: Tensor, keep: float) -> Tensor:
        """Cross-entropy of the caption's words under the language model's head applied to the image features alone.

        `features` (B, N, D) are projected patches, `words` (B, vocabulary) is 1 at the caption's words. The patches'
        logits are pooled by log-sum-exp over a random share `keep` of them. Like CLIP's captions, this supervises what
        is in an image, never where.
        """
        scores = self.logits(self._norm(self.language.norm, features)).float()
        dropped = torch.rand(features.shape[:2], device=self.device) >= keep
        pooled = scores.masked_fill(dropped[..., None], -1e4).logsumexp(1)
        return -(pooled.log_softmax(-1) * words / words.sum(-1, keepdim=True)).sum(-1).mean()

    def logits(self, states: Tensor) -> Tensor:
        """Logits (B, T, vocabulary) of the next token."""
        return states @ self.language.embed_tokens.weight.to(self.dtype).t()
