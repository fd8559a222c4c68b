"""`ModelWithProcessor`: a model, its processor and its prompt settings; from images and expressions to model inputs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property, lru_cache, partial
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from localization_heads.data.images import downscale_for_model
from localization_heads.data.sources import PromptImages, images_of
from localization_heads.errors import UsageError
from localization_heads.heads.head import Head
from localization_heads.heads.ready import (
    NATIVE_BOX,
    FoundWith,
    ReadyHeads,
    asked_conditions,
    choose_ready,
    mismatch_warning,
)
from localization_heads.lvlm.answers.box_formats import BOX, FORMATS, BoxFormat
from localization_heads.lvlm.families.geometry import check_shape, image_token_id
from localization_heads.lvlm.families.table import check_several, family_of
from localization_heads.lvlm.fingerprint import fingerprint
from localization_heads.lvlm.forward.capture import attention_modules, decoder_layers, uses_cross_attention
from localization_heads.lvlm.forward.changes import Change
from localization_heads.lvlm.forward.failures import memory_errors, processor_errors
from localization_heads.lvlm.text.chat_template import TemplateError, chat_template_of, render_chat
from localization_heads.lvlm.text.prompts import (
    Prompt,
    clean_expression,
    expression_prompt,
    image_comes_first,
    image_placeholder,
    locate_expression,
    template_renderer,
)
from localization_heads.lvlm.text.query_tokens import lone_space_id, remove_token
from localization_heads.options.groups import ConvMode, ModelSpec, QueryToken, ViewChoice

log = logging.getLogger(__name__)

BOX_TOKENS = 128
"""Least number of answer tokens that are read where the model answers with a box."""
PROMPT_CACHE_SIZE = 10_000
"""Expressions whose prompts are cached: more than are in the pipeline (checked, prepared, run) at any time."""


class ModelWithProcessor:
    """A vision-language model of transformers with its processor, its specification and how it is prompted.

    Made by `load_model`, which collects warnings for the user in `notes`. `lvlm.model` is the unmodified transformers
    model; only `switch_off` and `steer` register hooks on it, and remove them when their block ends.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        spec: ModelSpec,
        *,
        system: str,
        conv_mode: ConvMode,
        query_token: QueryToken = "last",
        view: ViewChoice = "combined",
        drop_lone_spaces: bool = False,
        answer_tokens: int = 8,
        paraphrases: Sequence[str] | None = None,
        answer_span: str | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.spec = spec
        self.system = system
        self.conv_mode = conv_mode
        self.query_token = query_token
        self.view = view
        self.answer_tokens, self.answer_span = answer_tokens, answer_span
        self.paraphrases = None if paraphrases is None else tuple(paraphrases)
        self.dropped_token = lone_space_id(processor.tokenizer) if drop_lone_spaces else None
        self.notes: list[str] = []
        self.num_images = 1  # in a prompt
        self.attention_modules: dict[int, nn.Module] = attention_modules(model)
        # What follows is shared by the copies that `prompted` and `with_...` make.
        self.changes: list[Change] = []  # in force: heads switched off or steered
        self._locate_cached = lru_cache(PROMPT_CACHE_SIZE)(self._locate)
        # Small, as it only saves rendering the stand-in's prompt again for each expression.
        self._render_cached = lru_cache(16)(self._render)
        self._tokenizing = threading.Lock()  # tokenizers keep state between calls: one thread at a time

    def prompted(self, conv_mode: ConvMode) -> Self:
        """The same loaded model with another prompt template."""
        twin = self._copy_with(conv_mode=conv_mode)
        vars(twin).pop("image_comes_first", None)  # a cached property of the old template
        return twin

    def with_paraphrases(self, paraphrases: Sequence[str]) -> Self:
        """The same loaded model, which asks every expression in these wordings."""
        return self._copy_with(paraphrases=tuple(paraphrases))

    def with_num_images(self, num_images: int) -> Self:
        """The same loaded model with that many images in a prompt.

        Raises:
            UsageError: several images for a model that takes only one, or that is asked for a box.
        """
        if num_images == self.num_images:
            return self
        if num_images > 1:
            check_several(self.model.config, self.name)
            if self.box_format is not None:
                raise UsageError("answer_span=box: the model is asked for a box of one image, not of several")
        return self._copy_with(num_images=num_images)

    def _copy_with(self, **attributes: Any) -> Self:
        """A shallow copy with other settings, which shares the loaded model and the caches."""
        twin = copy(self)
        vars(twin).update(attributes)
        return twin

    def __repr__(self) -> str:
        return f"LVLM({self.name}, {self.num_layers} layers x {self.num_heads} heads)"

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def num_layers(self) -> int:
        """Layers of the language model, including those without attention heads."""
        return len(decoder_layers(self.model))

    @property
    def num_heads(self) -> int:
        """Query heads per layer of the language model."""
        text = self.model.config.get_text_config()
        return int(getattr(text, "decoder_attention_heads", None) or text.num_attention_heads)

    @property
    def uses_cross_attention(self) -> bool:
        """Whether the image is seen only through cross-attention, whose keys are not the prompt's tokens."""
        return uses_cross_attention(self.model)

    @property
    def choices(self) -> dict[str, Any]:
        """The options of the model and its prompt, as JSON values for `metrics.json`."""
        return {
            "model": self.name,
            **{name: getattr(self.spec, name) for name in ("dtype", "quantization", "pad_to_square")},
            **{name: getattr(self, name) for name in ("conv_mode", "query_token", "view")},
            "drop_lone_spaces": self.dropped_token is not None,
            **self.extra_settings,
        }

    @property
    def reads_answer(self) -> bool:
        """Whether the model answers, and the attention of its answer's tokens is read."""
        return self.query_token in ("answer_mean", "answer_span", "last_and_answer")

    @property
    def reads_only_answer(self) -> bool:
        """Whether the maps are those of the answer's tokens instead of the prompt's."""
        return self.query_token in ("answer_mean", "answer_span")

    @property
    def box_format(self) -> BoxFormat | None:
        """The format of the model's own box if its numbers are the span (`answer_span=box`), else None."""
        name = self.spec.native_box if self.query_token == "answer_span" and self.answer_span == BOX else None
        return FORMATS[name] if name else None

    @property
    def max_answer_tokens(self) -> int:
        """Largest number of answer tokens that are read."""
        return max(self.answer_tokens, BOX_TOKENS if self.box_format else 0)

    @property
    def extra_settings(self) -> dict[str, Any]:
        """Further options that the maps depend on, as JSON values; empty with the default options."""
        settings: dict[str, Any] = {}
        if self.reads_answer:
            settings["answer_tokens"] = self.answer_tokens
        if self.query_token == "answer_span":
            settings["answer_span"] = self.answer_span
        if self.spec.fix_mistral_regex:
            settings["fix_mistral_regex"] = True
        if self.paraphrases:
            settings["paraphrases"] = list(self.paraphrases)
        return settings

    @property
    def asked(self) -> dict[str, str | None]:
        """The weights and how they are prompted, for `found_with` in `heads.json`."""
        return asked_conditions(
            self._heads_mode, self.system, self.query_token, self.fingerprint, paraphrases=self.paraphrases
        )

    def note(self, text: str) -> None:
        """Warn the user once, and keep the text in `notes`."""
        if text not in self.notes:
            self.notes.append(text)
            log.warning("%s", text)

    def warn_of_other_conditions(self, heads: str, found: FoundWith | None) -> None:
        """Warn if heads are known to have been found with other weights, another prompt or another query token."""
        if text := mismatch_warning(heads, found, self.asked):
            self.note(text)

    @property
    def known_heads(self) -> tuple[Head, ...]:
        """The published localization heads of this checkpoint, best first; empty if there are none."""
        return self.spec.heads

    @property
    def ready(self) -> ReadyHeads:
        """The known heads and ready lists that fit this prompt and query token."""
        return choose_ready(self.spec.heads, self.spec.lists, self._heads_mode, self.query_token)

    @property
    def _heads_mode(self) -> str:
        """The prompt under which heads are recorded: `conv_mode`, or that of the model's own box."""
        return NATIVE_BOX if self.box_format else self.conv_mode

    def heads_auto(self) -> tuple[Head, ...]:
        """The heads of `heads="auto"`: the known heads that fit, best first. Warns if there are none."""
        if self.ready.advice:
            self.note(self.ready.advice)
        return self.ready.heads

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the weights, independently of where they are stored (`lvlm.fingerprint`)."""
        return fingerprint(self.model, self.processor)

    @property
    def image_token_id(self) -> int:
        return image_token_id(self.model.config)

    @property
    def image_token(self) -> str:
        """The placeholder in a prompt that the processor expands to an image's tokens."""
        processor = self.processor
        token = getattr(processor, "image_placeholder_token", None) or getattr(processor, "image_token", None)
        return str(token or processor.tokenizer.convert_ids_to_tokens(self.image_token_id))

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """Tokens that no expression may contain: special tokens, and the placeholders of images, videos and audio."""
        media = (getattr(self.processor, f"{kind}_token", None) for kind in ("image", "video", "audio"))
        placeholders = [token for token in media if isinstance(token, str) and token]
        return (*self.processor.tokenizer.all_special_tokens, *placeholders)

    @cached_property
    def image_text(self) -> str:
        """What stands for an image in a prompt: its placeholder with the family's start and end tokens around it."""
        if family_of(self.model.config).adds_image_itself:
            return ""
        return image_placeholder(self.processor, self.image_token)

    @cached_property
    def image_comes_first(self) -> bool:
        """Whether the image precedes the expression; otherwise the expression's tokens cannot attend to it."""
        render = template_renderer(self.processor)
        return self.conv_mode != "chat" or render is None or image_comes_first(render, self.image_text)

    def prompt(self, expression: str) -> str:
        """The whole prompt of an expression; its last token is the paper's query token (Sec. 4.1)."""
        return self.located_prompt(expression).text

    def located_prompt(self, expression: str) -> Prompt:
        """The prompt, and where in it the expression lies; cached."""
        return self._locate_cached(expression, self.conv_mode, self.system, self.box_format, self.num_images)

    def _locate(
        self,
        expression: str,
        conv_mode: ConvMode,
        system: str,
        box_format: BoxFormat | None,
        num_images: int,
    ) -> Prompt:
        text = clean_expression(expression, self.control_tokens)
        if box_format is not None:
            return locate_expression(lambda words: self.box_prompt(box_format, words), text)
        return locate_expression(lambda words: self._render_cached(words, conv_mode, system, num_images), text)

    def box_prompt(self, box_format: BoxFormat, expression: str) -> str:
        """The whole prompt that asks for a box. UsageError if it needs a chat template and the model has none."""
        text = box_format.question(clean_expression(expression, self.control_tokens))
        return self.chat_prompt(text) if box_format.chat else self.image_text + text

    def _render(self, text: str, conv_mode: ConvMode, system: str, num_images: int) -> str:
        return expression_prompt(
            text,
            conv_mode,
            image_text="\n".join([self.image_text] * num_images),
            system=system,
            chat=partial(self.chat_prompt, num_images=num_images),
        )

    def chat_prompt(self, text: str, num_images: int = 1) -> str:
        """A user turn with its images in the model's chat template, up to where the answer begins."""
        content = [*[{"type": "image"}] * num_images, {"type": "text", "text": text}]
        return self.apply_chat_template([{"role": "user", "content": content}])

    def apply_chat_template(self, messages: list[dict[str, Any]]) -> str:
        """The rendered messages. UsageError if the checkpoint has no chat template, or it rejects the messages."""
        if chat_template_of(self.processor) is None:
            raise UsageError(f"conv_mode=chat: {self.name} has no chat template; use conv_mode=referseg or plain")
        try:
            return render_chat(self.processor, messages)
        except TemplateError as error:
            raise UsageError(
                f"conv_mode=chat: the chat template of {self.name} rejects an image with a text ({error}); "
                "use conv_mode=referseg or plain"
            ) from error

    def image_for_processor(self, image: Image.Image) -> Image.Image:
        """The image that the processor is given (`downscale_for_model`). UsageError if its shape is too extreme.

        If it was downscaled, its `original_size` says in which pixels boxes are to be returned.
        """
        check_shape(self.model.config, self.processor.image_processor, image.size)
        given = downscale_for_model(image)
        if given is not image:
            given.original_size = image.size  # type: ignore[attr-defined]
        return given

    def model_inputs(self, images: Sequence[PromptImages], prompts: Sequence[str]) -> dict[str, Any]:
        """The processor's output on the model's device and in its precision, padded to one length.

        Padding is on the left, so that all samples end together; for encoder-decoders, which number their tokens from
        the left, it is on the right.
        """
        return self.on_device(self.run_processor(images, prompts))

    @property
    def device(self) -> torch.device:
        """The device of the model's inputs. With offloaded weights, it is where accelerate's hook runs them."""
        hook = getattr(self.model.get_input_embeddings(), "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        return torch.device(self.model.device if device is None else device)

    def on_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs with all tensors on the model's device, pixels in its precision."""
        device, dtype = self.device, self.model.dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }

    def writes_bos(self, prompt: str) -> bool:
        """Whether a prompt starts with the BOS token, or the processor adds it, so that the tokenizer must not."""
        bos = self.processor.tokenizer.bos_token
        return bool(bos) and (prompt.startswith(bos) or family_of(self.model.config).writes_bos)

    def run_processor(
        self, images: Sequence[PromptImages], prompts: Sequence[str], processor: Any = None
    ) -> Mapping[str, Any]:
        """The output of the model's processor, or of another one, on the CPU; padded as in `model_inputs`."""
        nested = [list(images_of(shown)) for shown in images]
        flat = [image for prompt_images in nested for image in prompt_images]
        for image in flat:
            check_shape(self.model.config, self.processor.image_processor, image.size)
        # GOT-OCR takes a nested list of images for the pages of one document.
        takes_pages = hasattr(self.processor, "multi_page")
        side = "right" if self.model.config.is_encoder_decoder else "left"
        sizes = ", ".join(f"{image.width} x {image.height}" for image in flat[:3])
        problem = f"the processor of {self.name} does not take the image ({sizes} pixels) with its text"
        with self._tokenizing, memory_errors(), processor_errors(problem):
            inputs: Mapping[str, Any] = (processor or self.processor)(
                images=flat if takes_pages else nested,
                text=list(prompts),
                return_tensors="pt",
                padding=True,
                padding_side=side,
                **self._bos_options(prompts),
            )
        if self.dropped_token is not None:
            pad = self.processor.tokenizer.pad_token_id or 0
            inputs = remove_token(inputs, self.dropped_token, side=side, pad=pad)
        self.check_length(inputs["input_ids"].shape[1])
        for change in self.changes:
            change.on_inputs(self, images, inputs)
        return inputs

    def _bos_options(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Keeps the tokenizer from adding a second BOS token."""
        return {"add_special_tokens": False} if all(map(self.writes_bos, prompts)) else {}

    def tokenize(self, prompt: str) -> dict[str, Any]:
        """The model inputs of one prompt whose image or video placeholders are expanded already."""
        with self._tokenizing:
            inputs = dict(self.processor.tokenizer([prompt], return_tensors="pt", **self._bos_options([prompt])))
        inputs.pop("token_type_ids", None)
        if getattr(self.processor, "return_mm_token_type_ids", False):
            types = self.processor.create_mm_token_type_ids(inputs["input_ids"].tolist())
            inputs["mm_token_type_ids"] = torch.tensor(types)
        return inputs

    def check_length(self, num_tokens: int) -> None:
        """Raises UsageError if a prompt is longer than the model's context, beyond which its output is meaningless."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(limit, int) and num_tokens > limit:
            raise UsageError(
                f"the prompt has {num_tokens} tokens with the image, and {self.name} reads {limit} at most"
            )
