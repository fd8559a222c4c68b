"""Chat templates and image settings as in the real checkpoints: prompt, query token, conv_mode, grid.

Prompt formats and sizes are those that the checkpoints' cards and configurations publish; the templates are written
here.
"""

from __future__ import annotations

import json
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import pytest
from family_models import tiny
from family_recipes import square

from localization_heads.lvlm.checkpoints import loading
from localization_heads.lvlm.checkpoints.loading import load_model
from localization_heads.lvlm.checkpoints.spec import with_family_defaults
from localization_heads.lvlm.checks.footprints import coordinate_image
from localization_heads.lvlm.families.geometry import ProcessedImage
from localization_heads.lvlm.families.table import family_defaults, views_of
from localization_heads.lvlm.model import LVLM
from localization_heads.options.groups import ModelSpec


def turns(user: str, image: str, after: str, assistant: str, first: str = "") -> str:
    """A template that writes each turn as `user`, its parts in order, `after`; then the beginning of the answer."""
    parts = f"{{% if c.type == 'image' %}}{image}{{% else %}}{{{{ c.text }}}}{{% endif %}}"
    each = f"{{% for m in messages %}}{user}{{% for c in m.content %}}{parts}{{% endfor %}}{after}{{% endfor %}}"
    return f"{first}{each}{{% if add_generation_prompt %}}{assistant}{{% endif %}}"


VISION = "<|vision_start|><|image_pad|><|vision_end|>"
CHATML = {"user": "<|im_start|>user\n", "after": "<|im_end|>\n", "assistant": "<|im_start|>assistant\n"}
HELPFUL = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
VIRTUAL = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and "
    "visual inputs, as well as generating text and speech."
)
OMNI = "<vision_bos_token><image_token><vision_eos_token>"  # <|vision_bos|><|IMAGE|><|vision_eos|> in checkpoints
TEMPLATES = {
    "qwen2_vl": turns(image=VISION, first=HELPFUL, **CHATML),
    "qwen2_5_vl": turns(image=VISION, first=HELPFUL, **CHATML),
    "qwen3_vl": turns(image=VISION, **CHATML),
    "qwen3_vl_moe": turns(image=VISION, **CHATML),
    "internvl": turns(image="<IMG_CONTEXT>\n", **CHATML),
    "llava": turns("USER: ", "<image>\n", " ", "ASSISTANT:"),
    "llava_next": turns("[INST] ", "<image>\n", " [/INST]", ""),
    "llava_onevision": turns("<|im_start|>user ", "<image>\n", "<|im_end|>", "<|im_start|>assistant\n"),
    "gemma3": turns(
        "<start_of_turn>user\n",
        "<start_of_image>",
        "<end_of_turn>\n",
        "<start_of_turn>model\n",
        "{{ bos_token }}",
    ),
    "idefics3": turns("User:", "<image>", "<end_of_utterance>\n", "Assistant:", "<|im_start|>"),
    "smolvlm": turns("User:", "<image>", "<end_of_utterance>\n", "Assistant:", "<|im_start|>"),
    "glm4v": turns(
        "<|user|>\n",
        "<|begin_of_image|><|image|><|end_of_image|>",
        "",
        "<|assistant|>\n<think>",
        "[gMASK]<sop>",
    ),
    "mllama": turns(
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|image|>",
        "<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "{{ bos_token }}",
    ),
    "aya_vision": turns(
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
        "<image>",
        "<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "{{ bos_token }}",
    ),
    "llava_next_video": turns("USER: ", "<image>\n", " ", "ASSISTANT:"),
    "glm4v_moe": turns(
        "<|user|>\n", "<|begin_of_image|><|image|><|end_of_image|>", "", "<|assistant|>\n", "[gMASK]<sop>"
    ),
    "mistral3": turns("[INST]", "[IMG]", "[/INST]", "", "{{ bos_token }}"),
    "pixtral": turns("[INST]", "[IMG]", "[/INST]", "", "{{ bos_token }}"),
    "molmo2": turns("<|im_start|>user\n", "<|image|>", "<|im_end|>\n", "<|im_start|>assistant\n"),
    "qwen2_5_omni_thinker": turns(image=OMNI, first=f"<|im_start|>system\n{VIRTUAL}<|im_end|>\n", **CHATML),
}
SYSTEM = "You are a helpful language and vision assistant."
PROMPTS = {
    "aya_vision": "<s><|START_OF_TURN_TOKEN|><|USER_TOKEN|><image>the dog.<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "qwen2_5_omni_thinker": f"<|im_start|>system\n{VIRTUAL}<|im_end|>\n<|im_start|>user\n{OMNI}the dog.<|im_end|>\n"
    "<|im_start|>assistant\n",
    "qwen2_vl": f"{HELPFUL}<|im_start|>user\n{VISION}the dog.<|im_end|>\n<|im_start|>assistant\n",
    "qwen2_5_vl": f"{HELPFUL}<|im_start|>user\n{VISION}the dog.<|im_end|>\n<|im_start|>assistant\n",
    "qwen3_vl": f"<|im_start|>user\n{VISION}the dog.<|im_end|>\n<|im_start|>assistant\n",
    "qwen3_vl_moe": f"<|im_start|>user\n{VISION}the dog.<|im_end|>\n<|im_start|>assistant\n",
    "internvl": "<|im_start|>user\n<IMG_CONTEXT>\nthe dog.<|im_end|>\n<|im_start|>assistant\n",
    "llava_next": "[INST] <image>\nthe dog. [/INST]",
    "llava_onevision": "<|im_start|>user <image>\nthe dog.<|im_end|><|im_start|>assistant\n",
    "gemma3": "<s><start_of_turn>user\n<start_of_image>the dog.<end_of_turn>\n<start_of_turn>model\n",
    "idefics3": "<|im_start|>User:<image>the dog.<end_of_utterance>\nAssistant:",
    "smolvlm": "<|im_start|>User:<image>the dog.<end_of_utterance>\nAssistant:",
    "glm4v": "[gMASK]<sop><|user|>\n<|begin_of_image|><|image|><|end_of_image|>the dog.<|assistant|>\n<think>",
    "glm4v_moe": "[gMASK]<sop><|user|>\n<|begin_of_image|><|image|><|end_of_image|>the dog.<|assistant|>\n",
    "mistral3": "<s>[INST][IMG]the dog.[/INST]",
    "pixtral": "<s>[INST][IMG]the dog.[/INST]",
    "molmo2": "<|im_start|>user\n<|image|>the dog.<|im_end|>\n<|im_start|>assistant\n",
    "mllama": "<s><|start_header_id|>user<|end_header_id|>\n\n<|image|>the dog.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
}


def saved(name: str, folder: Path, **files: Any) -> Path:
    """Save a tiny model of the family, with JSON files as in the real checkpoint."""
    lvlm = tiny(name)
    lvlm.processor.save_pretrained(folder)
    lvlm.model.save_pretrained(folder)
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder


def with_template(name: str, folder: Path) -> LVLM:
    """Load a tiny model whose folder has a `chat_template.jinja`, as checkpoints have it now."""
    saved(name, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    return load_model(str(folder), device="cpu")


@pytest.mark.parametrize("name", PROMPTS)
def test_chat_models_default_to_their_chat_template(name: str, tmp_path: Path) -> None:
    """Without options; the query is the last token, where the answer begins."""
    lvlm = with_template(name, tmp_path)
    assert lvlm.conv_mode == "chat"
    assert lvlm.prompt("the dog") == PROMPTS[name]
    assert lvlm.image_comes_first
    inputs = lvlm.model_inputs([coordinate_image(64, 48)], [PROMPTS[name]])
    assert lvlm.query([lvlm.located_prompt("the dog")], inputs).positions is None  # the last token
    ids = inputs["input_ids"][0].tolist()
    plain = tiny(name).model_inputs([coordinate_image(64, 48)], [tiny(name).prompt("the dog")])
    assert ids.count(lvlm.image_token_id) == plain["input_ids"][0].tolist().count(lvlm.image_token_id)


def test_llava_on_vicuna_defaults_to_the_papers_prompt(tmp_path: Path) -> None:
    """Its chat template is used only on request."""
    lvlm = with_template("llava", tmp_path)
    assert lvlm.conv_mode == "referseg"
    prompt = lvlm.prompt("the dog")
    assert prompt.startswith(SYSTEM) and prompt.endswith("\n<image>\nthe dog.")
    assert lvlm.prompted("chat").prompt("the dog") == "USER: <image>\nthe dog. ASSISTANT:"


def test_a_template_in_the_old_file(tmp_path: Path) -> None:
    """`chat_template.json`, as checkpoints of 2024 have it."""
    saved("qwen2_vl", tmp_path, chat_template={"chat_template": TEMPLATES["qwen2_vl"]})
    assert load_model(str(tmp_path), device="cpu").prompt("the dog") == PROMPTS["qwen2_vl"]


HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
SETTINGS = {
    # LLaVA-1.5: the short side to 336 and a centre crop; padded by us, as the paper's code does
    "llava": (
        {
            "crop_size": square(336),
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_processor_type": "CLIPImageProcessor",
            "resample": 3,
            "size": {"shortest_edge": 336},
            **CLIP,
        },
        {"whole": ((24, 24), (0, -80, 640, 560))},
    ),
    # LLaVA-1.6: tiles of 336 on a canvas of 672 x 672, of which the image fills 672 x 504
    "llava_next": (
        {
            "crop_size": square(336),
            "do_center_crop": True,
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
            "image_processor_type": "LlavaNextImageProcessor",
            "resample": 3,
            "size": {"shortest_edge": 336},
            **CLIP,
        },
        {"whole": ((24, 24), (0, 0, 640, 480)), "tiles": ((36, 48), (0, 0, 640, 480))},
    ),
    # DeepSeek-VL: padded to a square with grey
    "deepseek_vl": (
        {
            "background_color": [127, 127, 127],
            **HALF,
            "image_processor_type": "DeepseekVLImageProcessor",
            "min_size": 14,
            "size": square(384),
        },
        {"whole": ((24, 24), (0, -80, 640, 560))},
    ),
    # Idefics 3: the longer side to four tiles of 364
    "idefics3": (
        {
            "do_image_splitting": True,
            **HALF,
            "image_processor_type": "Idefics3ImageProcessor",
            "max_image_size": {"longest_edge": 364},
            "resample": 1,
            "size": {"longest_edge": 1456},
        },
        {"whole": ((13, 13), (0, 0, 640, 480)), "tiles": ((39, 52), (0, 0, 640, 480))},
    ),
    # SmolVLM2 500M: the longer side to four tiles of 512
    "smolvlm": (
        {
            "do_image_splitting": True,
            **HALF,
            "image_processor_type": "SmolVLMImageProcessor",
            "max_image_size": {"longest_edge": 512},
            "resample": 1,
            "size": {"longest_edge": 2048},
        },
        {"whole": ((8, 8), (0, 0, 640, 480)), "tiles": ((24, 32), (0, 0, 640, 480))},
    ),
    # Qwen2-VL and Qwen2.5-VL: areas under the names of 2024; sides are rounded to 28 pixels
    "qwen2_vl": (
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "max_pixels": 12845056,
            "merge_size": 2,
            "min_pixels": 3136,
            "patch_size": 14,
            "temporal_patch_size": 2,
            **CLIP,
        },
        {"whole": ((17, 23), (0, 0, 640, 480))},
    ),
    # Qwen3-VL: areas under the names of sides, patches of 16
    "qwen3_vl": (
        {
            **HALF,
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "merge_size": 2,
            "patch_size": 16,
            "size": {"longest_edge": 16777216, "shortest_edge": 65536},
            "temporal_patch_size": 2,
        },
        {"whole": ((15, 20), (0, 0, 640, 480))},
    ),
    # GLM-4.1V and 4.5V: as Qwen2-VL, with larger limits
    "glm4v": (
        {
            "image_processor_type": "Glm4vImageProcessor",
            "merge_size": 2,
            "patch_size": 14,
            "size": {"longest_edge": 9633792, "shortest_edge": 12544},
            "temporal_patch_size": 2,
            **CLIP,
        },
        {"whole": ((17, 23), (0, 0, 640, 480))},
    ),
    # InternVL3: up to twelve tiles of 448, here four by three, then the whole image
    "internvl": (
        {
            "crop_to_patches": True,
            "image_mean": [0.485, 0.456, 0.406],
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "image_std": [0.229, 0.224, 0.225],
            "max_patches": 12,
            "min_patches": 1,
            "size": square(448),
        },
        {"whole": ((16, 16), (0, 0, 640, 480)), "tiles": ((48, 64), (0, 0, 640, 480))},
    ),
    # LLaVA-OneVision: tiles of 384, of which 27 patches cover 378 pixels; here two by two on 768 x 768, of which the
    # image fills 768 x 576 from row 96 on. The first row of patches that is kept begins at 98, the last ends at 664
    "llava_onevision": (
        {
            "image_grid_pinpoints": [[384 * h, 384 * w] for h in range(1, 7) for w in range(1, 7)],
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": square(384),
            **CLIP,
        },
        {"whole": ((27, 27), (0, 0, 630, 472)), "tiles": ((40, 54), (0, 2, 635, 473))},
    ),
    # Gemma 3: squashed to 896 x 896, whose 64 x 64 patches become 256 tokens
    "gemma3": (
        {
            "do_pan_and_scan": None,
            **HALF,
            "image_processor_type": "Gemma3ImageProcessor",
            "image_seq_length": 256,
            "size": square(896),
        },
        {"whole": ((16, 16), (0, 0, 640, 480))},
    ),
    # PaliGemma at 448 pixels
    "paligemma": (
        {
            **HALF,
            "image_processor_type": "SiglipImageProcessor",
            "image_seq_length": 1024,
            "size": square(448),
        },
        {"whole": ((32, 32), (0, 0, 640, 480))},
    ),
    # Llama 3.2 Vision: up to four tiles of 560, here two side by side, the image at their upper left
    "mllama": (
        {
            "do_pad": True,
            "image_processor_type": "MllamaImageProcessor",
            "max_image_tiles": 4,
            "size": square(560),
            **CLIP,
        },
        {"whole": ((40, 80), (0, 0, 1120, 560))},
    ),
    # Mistral Small 3.1: cells of 28 pixels, of which the last in a row or column may be cut
    "mistral3": (
        {
            "image_processor_type": "PixtralImageProcessorFast",
            "patch_size": 14,
            "size": {"longest_edge": 1540},
            **CLIP,
        },
        {"whole": ((18, 23), (0, 0, 640, 480))},
    ),
    # Pixtral 12B: patches of 16
    "pixtral": (
        {
            "image_processor_type": "PixtralImageProcessor",
            "patch_size": square(16),
            "size": {"longest_edge": 1024},
            **CLIP,
        },
        {"whole": ((30, 40), (0, 0, 640, 480))},
    ),
}
SETTINGS["qwen2_5_vl"] = SETTINGS["qwen2_vl"]
PROCESSORS = {
    "smolvlm": {"image_seq_len": 64, "processor_class": "SmolVLMProcessor"},
    "internvl": {"image_seq_length": 256, "processor_class": "InternVLProcessor"},
    "llava_onevision": {"num_image_tokens": 729, "processor_class": "LlavaOnevisionProcessor"},
    "gemma3": {"image_seq_length": 256, "processor_class": "Gemma3Processor"},
    "mistral3": {"patch_size": 14, "processor_class": "PixtralProcessor", "spatial_merge_size": 2},
    "pixtral": {"patch_size": 16, "processor_class": "PixtralProcessor"},
}
"""`processor_config.json`, if checkpoints of the family have one."""
CONFIGS = {
    "internvl": {"vision_config.image_size": [448, 448], "image_seq_length": 256},
    "gemma3": {"vision_config.image_size": 896, "mm_tokens_per_image": 256},
    "paligemma": {"vision_config.image_size": 448},
    "mllama": {"vision_config.image_size": 560},
    "pixtral": {"vision_config.image_size": 1024, "vision_config.patch_size": 16},
}
"""Settings in which the checkpoint's `config.json` differs from the tiny model's."""


@pytest.mark.parametrize("name", SETTINGS)
def test_grids_with_the_image_settings_of_checkpoints(name: str, tmp_path: Path) -> None:
    """Each `preprocessor_config.json` in the format of its time, for an image of 640 x 480."""
    settings, expected = SETTINGS[name]
    lvlm, config = copy(tiny(name)), deepcopy(tiny(name).model.config)
    for place, value in CONFIGS.get(name, {}).items():
        *part, last = place.split(".")
        setattr(config.vision_config if part else config, last, value)
    lvlm.processor.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    for newer in ("processor_config.json", "video_preprocessor_config.json"):
        (tmp_path / newer).unlink(missing_ok=True)
    if name in PROCESSORS:
        (tmp_path / "processor_config.json").write_text(json.dumps(PROCESSORS[name]))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    spec = with_family_defaults(ModelSpec(str(tmp_path)), family_defaults(config))
    lvlm.processor = loading._load_processor(str(tmp_path), spec, config)
    image = coordinate_image(640, 480)
    inputs = lvlm.run_processor([image], [lvlm.prompt("the dog")])
    views = views_of(ProcessedImage(config, lvlm.processor, inputs, 0, image.size))
    assert {v.name: (v.index.shape, tuple(round(edge) for edge in v.box)) for v in views} == expected
