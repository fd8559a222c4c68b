"""Export a trained model as a folder that transformers loads: weights, tokenizer, processor, chat template.

python -m training.export RUN_FOLDER [TARGET_FOLDER] [--mean-with FOLDER ...]
"""

import argparse
import json
from pathlib import Path

from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from training.language import IDS, SYSTEM, build_tokenizer
from training.recipe import ModelRecipe
from training.trainer import load_run, mean_weights

EMBEDDED = Path(__file__).parents[1] / "localization_heads" / "lvlm" / "embedded"
# System sentence, image, the user's text; earlier answers in a conversation end with </s>.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}{{- '" + SYSTEM.replace("'", "\\'") + "\n' -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\n' -}}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}"
    "{{- '</s>' if message['role'] == 'assistant' else '\n' -}}"
    "{%- endfor -%}"
)


def build_processor(recipe: ModelRecipe) -> LlavaProcessor:
    """A processor that pads images to a square, as LLaVA does, and scales them to the model's size."""
    side = recipe.image_size
    images = LlavaImageProcessorPil(
        do_pad=True, size={"height": side, "width": side}, crop_size={"height": side, "width": side}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=recipe.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def export(model: LlavaForConditionalGeneration, recipe: ModelRecipe, folder: Path = EMBEDDED) -> None:
    """Write a model folder for `from_pretrained` and `load_model`."""
    model.generation_config = GenerationConfig(
        bos_token_id=IDS["<s>"], eos_token_id=IDS["</s>"], pad_token_id=IDS["<pad>"], max_new_tokens=24
    )
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    build_processor(recipe).save_pretrained(folder)
    (folder / "localization_heads.json").write_text(json.dumps({"system": SYSTEM}, indent=2) + "\n")


def main() -> None:
    """Parse the options and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("target", type=Path, nargs="?", default=EMBEDDED)
    parser.add_argument(
        "--mean-with",
        type=Path,
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="average the run's weights with those of these runs or models; repeat a folder to weight it",
    )
    options = parser.parse_args()
    recipe, trained = load_run(options.run)
    if options.mean_with:
        trained.load_state_dict(mean_weights([options.run, *options.mean_with]))
    export(trained, recipe.model, options.target)


if __name__ == "__main__":
    main()
