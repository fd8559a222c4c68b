"""Qwen3-VL models of any size with random weights and the real image processor, for `benchmarks.gpu`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.models import EXPRESSIONS
from localization_heads.lvlm.checkpoints.processors import without_video
from localization_heads.lvlm.model import LVLM
from localization_heads.options.groups import ModelSpec

CELL = 32
"""Side of an image token in pixels: two patches of 16."""


@dataclass(frozen=True)
class QwenShape:
    """Sizes of a Qwen3-VL; the defaults are Qwen3-VL-8B's."""

    layers: int = 36
    hidden: int = 4096
    mlp: int = 12288
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vision_layers: int = 27
    vision_hidden: int = 1152
    vision_mlp: int = 4304
    vision_heads: int = 16
    vocabulary: int = 151_936

    def __str__(self) -> str:
        return f"{self.layers} layers of {self.hidden:,}"


TOY = QwenShape(2, 64, 64, 4, 2, 16, 2, 32, 32, 2, 512)


def random_qwen(shape: QwenShape, device: torch.device, dtype: torch.dtype) -> LVLM:
    """A Qwen3-VL with random weights, as `load_model` would return it."""
    tokenizer = _tokenizer()
    sections = [shape.head_dim // 8, shape.head_dim * 3 // 16, shape.head_dim * 3 // 16]
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": sections, "mrope_interleaved": True}
    config = hf.Qwen3VLConfig(
        text_config={
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "max_position_embeddings": 32768,
            "rope_parameters": rope,
            "pad_token_id": 0,
            "eos_token_id": None,
        },
        vision_config={
            "depth": shape.vision_layers,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_mlp,
            "num_heads": shape.vision_heads,
            "out_hidden_size": shape.hidden,
            "patch_size": 16,
            "deepstack_visual_indexes": [shape.vision_layers * n // 4 for n in (1, 2, 3)],
        },
        **{f"{name}_id": getattr(tokenizer, f"{name}_id") for name in TOKENS},
    )
    torch.manual_seed(0)
    with device:
        model = hf.Qwen3VLForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=dtype)
    images = hf.Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": CELL**2, "longest_edge": 1 << 24})
    spec = ModelSpec(name=f"random Qwen3-VL, {shape}")
    processor = without_video(hf.Qwen3VLProcessor)(images, tokenizer)
    return LVLM(model.eval().to(device), processor, spec, system="", conv_mode="plain")


TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}


def _tokenizer() -> hf.PreTrainedTokenizerFast:
    split = pre_tokenizers.Whitespace()
    words = {word for text in (*EXPRESSIONS, ".") for word, _ in split.pre_tokenize_str(text)}
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *TOKENS.values(), *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", extra_special_tokens=dict(TOKENS)
    )
