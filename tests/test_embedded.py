"""The embedded model: plain transformers load it offline, it answers, and its heads localize."""

import json
from importlib.resources import files

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from localization_heads.attention import AttentionMaps
from localization_heads.grounding.ground import ground_maps
from localization_heads.heads.criteria import attention_sum, spatial_entropy
from localization_heads.heads.ranking import rank_heads
from localization_heads.scenes.scene import TEST_SEEDS, render_scene, scene_samples

FOLDER = files("localization_heads") / "lvlm" / "embedded"
NUM_SCENES = 48


@pytest.fixture(scope="module")
def model():
    return LlavaForConditionalGeneration.from_pretrained(FOLDER, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def system():
    return json.loads((FOLDER / "localization_heads.json").read_text())["system"]


@pytest.fixture(scope="module")
def samples(model):
    return list(scene_samples(NUM_SCENES, seed=9, size=model.config.vision_config.image_size))


def encode(processor, system, scene, text):
    prompt = f"{system}\n<image>\n{text}"
    return processor(images=Image.fromarray(scene.image), text=prompt, return_tensors="pt")


@pytest.fixture(scope="module")
def maps(model, processor, system, samples):
    """float32 (sample, layer, head, h, w): attention of the final full stop over the image."""
    stacks = []
    for scene, expression in samples:
        inputs = encode(processor, system, scene, f"{expression.text}.")
        with torch.no_grad():
            attention = model(**inputs, output_attentions=True).attentions
        is_image = inputs["input_ids"][0] == model.config.image_token_id
        side = round(int(is_image.sum()) ** 0.5)
        rows = torch.stack([layer[0, :, -1, is_image] for layer in attention])
        stacks.append(rows.unflatten(-1, (side, side)))
    return torch.stack(stacks).numpy()


def test_it_is_small():
    assert (FOLDER / "model.safetensors").stat().st_size < 20e6


def test_prompts_are_tokenized_as_in_training(processor, system, samples):
    ids = encode(processor, system, samples[0][0], "The dog on the LEFT.")["input_ids"][0].tolist()
    words = processor.tokenizer.convert_ids_to_tokens(ids)
    assert words[:2] == ["<s>", "a"]
    assert words[-6:] == ["the", "dog", "on", "the", "left", "."]
    assert words.count("<s>") == 1
    assert "<unk>" not in words


@pytest.mark.parametrize(("width", "height"), [(128, 128), (300, 100), (33, 200)])
def test_every_image_is_padded_to_the_whole_grid(model, processor, width, height):
    inputs = processor(images=Image.new("RGB", (width, height)), text="<image>\nthe dog.", return_tensors="pt")
    cells = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == cells


def generate(model, processor, inputs):
    output = model.generate(**inputs, do_sample=False, max_new_tokens=20)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_most_answers_are_right(model, processor, system, samples):
    answers = [
        generate(model, processor, encode(processor, system, scene, f"{expression.text}."))
        for scene, expression in samples
    ]
    right = np.mean([answer == e.answer for answer, (_, e) in zip(answers, samples, strict=True)])
    assert right > 0.7


@pytest.mark.parametrize("question", ["What is in this image?", "Describe this image."])
def test_it_names_most_objects(model, processor, question):
    named = []
    for seed in range(TEST_SEEDS.start, TEST_SEEDS.start + 12):
        scene = render_scene(seed, size=model.config.vision_config.image_size)
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
        inputs = processor(images=Image.fromarray(scene.image), text=prompt, return_tensors="pt")
        answer = generate(model, processor, inputs).replace(",", "").split()
        named += [o.name in answer for o in scene.objects]
    assert np.mean(named) > 0.5


def test_the_label_free_ranking_finds_heads_that_point(maps, samples):
    """With a loose bound; the model card has the numbers on a thousand scenes."""
    ranking = rank_heads(attention_sum(maps), spatial_entropy(maps), num_trials=2)
    top = [head.address for head in ranking.heads[:3]]
    hits = []
    for stack, (scene, expression) in zip(maps, samples, strict=True):
        size = scene.image.shape[0]
        x, y = ground_maps(AttentionMaps(stack, (0, 0, size, size), (size, size)), top).point
        x0, y0, x1, y1 = scene.objects[expression.object_index].box
        hits.append(x0 <= x < x1 and y0 <= y < y1)
    assert np.mean(hits) > 0.7
