"""Random SAMs of every family, a few thousand weights each, built from configs alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

SIDE = 64
"""Pixels of the square that they see; embeddings of 4 x 4, mask prompts of 16 x 16 cells (SAM 3: 8 x 8, 32 x 32)."""


def tiny_sam() -> Any:
    from transformers import SamConfig, SamModel

    config = SamConfig(
        vision_config={
            "hidden_size": 16,
            "output_channels": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 16,
            "window_size": 2,
            "global_attn_indexes": [0],
            "mlp_dim": 16,
            "num_pos_feats": 8,
        },
        prompt_encoder_config={
            "hidden_size": 16,
            "image_size": SIDE,
            "patch_size": 16,
            "image_embedding_size": SIDE // 16,
            "mask_input_channels": 8,
        },
        mask_decoder_config={
            "hidden_size": 16,
            "mlp_dim": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    )
    return _seeded(SamModel, config)


def tiny_sam2() -> Any:
    from transformers import Sam2Config, Sam2Model

    config = Sam2Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 8,
                "num_attention_heads": 1,
                "image_size": [SIDE, SIDE],
                "blocks_per_stage": [1, 1, 2, 1],
                "embed_dim_per_stage": [8, 16, 32, 64],
                "num_attention_heads_per_stage": [1, 1, 1, 1],
                "window_size_per_stage": [8, 4, 4, 4],
                "global_attention_blocks": [3],
            },
            "backbone_channel_list": [64, 32, 16, 8],
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "fpn_hidden_size": 16,
        },
        prompt_encoder_config=_prompts(16),
        mask_decoder_config=_decoder(),
    )
    return _seeded(Sam2Model, config)


def tiny_sam3() -> Any:
    from transformers import Sam3TrackerConfig, Sam3TrackerModel

    config = Sam3TrackerConfig(
        vision_config={
            "model_type": "sam3_vision_model",
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": SIDE,
                "pretrain_image_size": SIDE,
                "patch_size": 8,
                "window_size": 2,
                "global_attn_indexes": [0],
            },
            "fpn_hidden_size": 16,
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        },
        prompt_encoder_config=_prompts(8),
        mask_decoder_config=_decoder(),
    )
    return _seeded(Sam3TrackerModel, config)


TINY = {"sam": tiny_sam, "sam2": tiny_sam2, "sam3": tiny_sam3}


def _prompts(patch_size: int) -> dict[str, Any]:
    return {"hidden_size": 16, "image_size": SIDE, "patch_size": patch_size, "mask_input_channels": 8}


def _decoder() -> dict[str, Any]:
    return {
        "hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    }  # fmt: skip


def noise(width: int, height: int) -> Image.Image:
    """The same in every run, which Pillow's own noise is not."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def _seeded(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return kind(config).eval()
