"""Folders with chat templates and image settings as the checkpoints have them: prompt, query token, conv_mode, grid.

The formats of the prompts and the sizes are facts that the checkpoints' cards and configurations publish; the templates
are written here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from family_models import tiny
from family_models_siblings import glm46v  # noqa: F401 -- registers all families

from localization_heads.lvlm.checkpoints.loading import load_model
from localization_heads.lvlm.checks.footprints import coordinate_image
from localization_heads.lvlm.model import LVLM


def turns(user: str, image: str, after: str, assistant: str, first: str = "") -> str:
    """A template that writes each turn as `user`, its parts in their order, `after`; then where the answer begins."""
    parts = f"{{% if c.type == 'image' %}}{image}{{% else %}}{{{{ c.text }}}}{{% endif %}}"
    each = (
        f"{{% for m in messages %}}{user}{{% for c in m.content %}}{parts}{{% endfor %}}{after}{{% endfor %}}"
    )
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
    "mllama": "<s><|start_header_id|>user<|end_header_id|>\n\n<|image|>the dog.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
}


def saved(name: str, folder: Path, **files: Any) -> Path:
    """A tiny model of the family, with files of the real checkpoint beside it."""
    lvlm = tiny(name)
    lvlm.processor.save_pretrained(folder)
    lvlm.model.save_pretrained(folder)
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder


def with_template(name: str, folder: Path) -> LVLM:
    """`chat_template.jinja` is where checkpoints keep it now."""
    saved(name, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    return load_model(str(folder), device="cpu")


@pytest.mark.parametrize("name", PROMPTS)
def test_the_prompt_of_a_chat_model_is_its_own(name: str, tmp_path: Path) -> None:
    """Nothing is asked for: the family takes the chat template, whose end, where the answer begins, is the query."""
    lvlm = with_template(name, tmp_path)
    assert lvlm.conv_mode == "chat"
    assert lvlm.prompt("the dog") == PROMPTS[name]
    assert lvlm.image_comes_first
    inputs = lvlm.encode([coordinate_image(64, 48)], [PROMPTS[name]])
    assert lvlm.query([lvlm.located_prompt("the dog")], inputs).positions is None  # the last token
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(lvlm.image_token_id) == tiny(name).encode(
        [coordinate_image(64, 48)], [tiny(name).prompt("the dog")]
    )["input_ids"][0].tolist().count(lvlm.image_token_id)


def test_llava_on_vicuna_is_asked_as_in_the_paper(tmp_path: Path) -> None:
    """Its chat template is for conversations; the query token is the full stop."""
    lvlm = with_template("llava", tmp_path)
    assert lvlm.conv_mode == "referseg"
    prompt = lvlm.prompt("the dog")
    assert prompt.startswith(SYSTEM) and prompt.endswith("\n<image>\nthe dog.")
    assert lvlm.prompted("chat").prompt("the dog") == "USER: <image>\nthe dog. ASSISTANT:"


def test_a_template_in_the_older_place(tmp_path: Path) -> None:
    """`chat_template.json`, as checkpoints of 2024 have it."""
    saved("qwen2_vl", tmp_path, chat_template={"chat_template": TEMPLATES["qwen2_vl"]})
    assert load_model(str(tmp_path), device="cpu").prompt("the dog") == PROMPTS["qwen2_vl"]


CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
SETTINGS = {
    # LLaVA-1.5: the short side to 336 and a centre crop; padded by us, as the paper's code does
    "llava": (
        {
            "crop_size": {"height": 336, "width": 336},
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
            "crop_size": {"height": 336, "width": 336},
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
            "image_mean": [0.5] * 3,
            "image_processor_type": "DeepseekVLImageProcessor",
            "image_std": [0.5] * 3,
            "min_size": 14,
            "size": {"height": 384, "width": 384},
        },
        {"whole": ((24, 24), (0, -80, 640, 560))},
    ),
    # Idefics 3: the longer side to four tiles of 364
    "idefics3": (
        {
            "do_image_splitting": True,
            "image_mean": [0.5] * 3,
            "image_processor_type": "Idefics3ImageProcessor",
            "image_std": [0.5] * 3,
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
            "image_mean": [0.5] * 3,
            "image_processor_type": "SmolVLMImageProcessor",
            "image_std": [0.5] * 3,
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
            "image_mean": [0.5] * 3,
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "image_std": [0.5] * 3,
            "merge_size": 2,
            "patch_size": 16,
            "size": {"longest_edge": 16777216, "shortest_edge": 65536},
            "temporal_patch_size": 2,
        },
        {"whole": ((15, 20), (0, 0, 640, 480))},
    ),
}


PROCESSORS = {"smolvlm": {"image_seq_len": 64, "processor_class": "SmolVLMProcessor"}}


@pytest.mark.parametrize("name", SETTINGS)
def test_image_settings_as_checkpoints_have_them(name: str, tmp_path: Path) -> None:
    """`preprocessor_config.json` in the words of its time; a COCO image of 640 x 480."""
    settings, expected = SETTINGS[name]
    saved(name, tmp_path, preprocessor_config=settings)
    for newer in ("processor_config.json", "video_preprocessor_config.json"):
        (tmp_path / newer).unlink(missing_ok=True)
    if name in PROCESSORS:
        (tmp_path / "processor_config.json").write_text(json.dumps(PROCESSORS[name]))
    lvlm = load_model(str(tmp_path), device="cpu", conv_mode="plain")
    image = coordinate_image(640, 480)
    views = lvlm.views_in(lvlm.encode([image], [lvlm.prompt("the dog")]), 0, image)
    assert {v.name: (v.index.shape, tuple(round(edge) for edge in v.box)) for v in views} == expected
