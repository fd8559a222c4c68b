"""`PromptedModel`: a model with its processor, what is known about it, and its prompts as inputs."""

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
    asked,
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
"""Enough of an answer to write one, where `answer_tokens` are fewer."""
PROMPTS = 10_000
"""Expressions whose prompts are cached: more than are checked, prepared and run at a time."""


class PromptedModel:
    """A vision-language model of transformers, its processor, and what is known about it.

    Made by `load_model`, which collects its remarks in `notes`. The model itself is never changed: `lvlm.model` is
    plain transformers. Only `switch_off` and `steer` put hooks on it, which are gone when their block ends.
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
        self.num_images = 1  # that a prompt shows
        self.changes: list[Change] = []  # in force; shared by the copies that `prompted` makes
        self.attention_modules: dict[int, nn.Module] = attention_modules(model)
        # Both are shared by the copies that `prompted` makes. Every expression renders the stand-in's prompt as well.
        self._located = lru_cache(PROMPTS)(self._locate)
        self._rendered = lru_cache(16)(self._render)
        self._tokenizing = threading.Lock()  # tokenizers keep settings of the last call: one thread at a time

    def prompted(self, conv_mode: ConvMode) -> Self:
        """The same loaded model with another prompt."""
        twin = self._but(conv_mode=conv_mode)
        twin.__dict__.pop("image_comes_first", None)  # cached for the other prompt
        return twin

    def with_paraphrases(self, paraphrases: Sequence[str]) -> Self:
        """The same loaded model asked in these wordings."""
        return self._but(paraphrases=tuple(paraphrases))

    def with_num_images(self, num_images: int) -> Self:
        """The same loaded model with so many images in a prompt. UsageError if it takes one, or is asked for a box."""
        if num_images == self.num_images:
            return self
        if num_images > 1:
            check_several(self.model.config, self.name)
            if self.box_format is not None:
                raise UsageError("answer_span=box: the model is asked for a box of one image, not of several")
        return self._but(num_images=num_images)

    def _but(self, **changed: Any) -> Self:
        """A copy that shares the loaded model and the caches."""
        twin = copy(self)
        vars(twin).update(changed)
        return twin

    def __repr__(self) -> str:
        return f"LVLM({self.name}, {self.num_layers} layers x {self.num_heads} heads)"

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def num_layers(self) -> int:
        """Layers of the language model, those without attention heads included."""
        return len(decoder_layers(self.model))

    @property
    def num_heads(self) -> int:
        """Query heads in a layer of the language model."""
        text = self.model.config.get_text_config()
        return int(getattr(text, "decoder_attention_heads", None) or text.num_attention_heads)

    @property
    def uses_cross_attention(self) -> bool:
        """Whether the image is seen through cross-attention only, whose keys are not the prompt's tokens."""
        return uses_cross_attention(self.model)

    @property
    def choices(self) -> dict[str, Any]:
        """The model and how it is prompted, by name, as JSON values for `metrics.json`."""
        loaded = {name: getattr(self.spec, name) for name in ("dtype", "quantization", "pad_to_square")}
        asked = {name: getattr(self, name) for name in ("conv_mode", "query_token", "view")}
        dropped = {"drop_lone_spaces": self.dropped_token is not None}
        return {"model": self.name, **loaded, **asked, **dropped, **self.wording}

    @property
    def reads_answer(self) -> bool:
        """Whether the model answers, and the attention of all its answer's tokens is read."""
        return self.query_token in ("answer_mean", "answer_span", "last_and_answer")

    @property
    def reads_answer_alone(self) -> bool:
        """Whether the answer's attention stands in place of the prompt's."""
        return self.query_token in ("answer_mean", "answer_span")

    @property
    def box_format(self) -> BoxFormat | None:
        """How the model is asked for the box whose numbers are the span; None for another one, or none."""
        name = self.spec.native_box if self.query_token == "answer_span" and self.answer_span == BOX else None
        return FORMATS[name] if name else None

    @property
    def most_tokens(self) -> int:
        """Tokens of the answer that are read, at most: of a box, enough to write one."""
        return max(self.answer_tokens, BOX_TOKENS if self.box_format else 0)

    @property
    def wording(self) -> dict[str, Any]:
        """What else the maps depend on, as JSON values: nothing unless the model answers or paraphrases are asked."""
        tokens: dict[str, Any] = {"answer_tokens": self.answer_tokens} if self.reads_answer else {}
        tokens |= {"answer_span": self.answer_span} if self.query_token == "answer_span" else {}
        mended = {"fix_mistral_regex": True} if self.spec.fix_mistral_regex else {}
        return tokens | mended | ({"paraphrases": list(self.paraphrases)} if self.paraphrases else {})

    @property
    def asked(self) -> dict[str, str | None]:
        """The weights and how they are prompted, for `found_with` in `heads.json`."""
        mode = NATIVE_BOX if self.box_format else self.conv_mode
        return asked(mode, self.system, self.query_token, self.fingerprint, paraphrases=self.paraphrases)

    def note(self, text: str) -> None:
        """Log what a user should know, once, and keep it in `notes`."""
        if text not in self.notes:
            self.notes.append(text)
            log.warning("%s", text)

    def note_other_conditions(self, heads: str, found: FoundWith | None) -> None:
        """A note if heads were found with other weights, another prompt or query token, as far as that is known."""
        if said := mismatch_warning(heads, found, self.asked):
            self.note(said)

    @property
    def changed(self) -> tuple[Change, ...]:
        """The changes that are in force; none while the model is as it was loaded."""
        return tuple(self.changes)

    @property
    def known_heads(self) -> tuple[Head, ...]:
        """Published localization heads of this checkpoint, best first; empty if nobody published any."""
        return self.spec.heads

    @property
    def ready(self) -> ReadyHeads:
        """What fits of the known heads and the ready lists, as the model is asked."""
        mode = NATIVE_BOX if self.box_format else self.conv_mode
        return choose_ready(self.spec.heads, self.spec.lists, mode, self.query_token)

    def heads_auto(self) -> tuple[Head, ...]:
        """`heads="auto"`: what fits of the known heads, best first; none with a note where none do."""
        if self.ready.advice:
            self.note(self.ready.advice)
        return self.ready.heads

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the weights do, independent of where they are stored (`lvlm.fingerprint`)."""
        return fingerprint(self.model, self.processor)

    @property
    def image_token_id(self) -> int:
        return image_token_id(self.model.config)

    @property
    def image_token(self) -> str:
        """The text in a prompt that the processor replaces by an image's tokens."""
        processor = self.processor
        own = getattr(processor, "image_placeholder_token", None) or getattr(processor, "image_token", None)
        return str(own or processor.tokenizer.convert_ids_to_tokens(self.image_token_id))

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """Tokens that no expression may contain: special tokens, and those that the processor replaces."""
        media = (getattr(self.processor, f"{kind}_token", None) for kind in ("image", "video", "audio"))
        own = [token for token in media if isinstance(token, str) and token]
        return (*self.processor.tokenizer.all_special_tokens, *own)

    @cached_property
    def image_text(self) -> str:
        """The placeholder of an image in a prompt: its token, with the marks that the family puts around it."""
        if family_of(self.model.config).adds_image_itself:
            return ""
        return image_placeholder(self.processor, self.image_token)

    @cached_property
    def image_comes_first(self) -> bool:
        """Whether the image comes before the expression, whose tokens cannot attend to it otherwise."""
        render = template_renderer(self.processor)
        return self.conv_mode != "chat" or render is None or image_comes_first(render, self.image_text)

    def prompt(self, expression: str) -> str:
        """The text around an expression; its last token is the paper's query token (Sec. 4.1)."""
        return self.located_prompt(expression).text

    def located_prompt(self, expression: str) -> Prompt:
        """The prompt, and where in it the expression lies. Made once of each of the last `PROMPTS` expressions."""
        return self._located(expression, self.conv_mode, self.system, self.box_format, self.num_images)

    def _locate(
        self, expression: str, conv_mode: ConvMode, system: str, form: BoxFormat | None, num_images: int
    ) -> Prompt:
        text = clean_expression(expression, self.control_tokens)
        if form is not None:
            return locate_expression(lambda words: self.box_prompt(form, words), text)
        return locate_expression(lambda words: self._rendered(words, conv_mode, system, num_images), text)

    def box_prompt(self, form: BoxFormat, expression: str) -> str:
        """The whole prompt that asks for a box. UsageError for a chat format where there is no chat template."""
        text = form.question(clean_expression(expression, self.control_tokens))
        return self.chat_prompt(text) if form.chat else self.image_text + text

    def _render(self, text: str, conv_mode: ConvMode, system: str, num_images: int) -> str:
        return expression_prompt(
            text,
            conv_mode,
            image_text="\n".join([self.image_text] * num_images),
            system=system,
            chat=partial(self.chat_prompt, num_images=num_images),
        )

    def chat_prompt(self, text: str, num_images: int = 1) -> str:
        """One user turn with its images in the model's own template, up to where its answer begins."""
        content = [*[{"type": "image"}] * num_images, {"type": "text", "text": text}]
        return self.apply_chat_template([{"role": "user", "content": content}])

    def apply_chat_template(self, messages: list[dict[str, Any]]) -> str:
        """Raises UsageError if the checkpoint brings no chat template, or one that refuses the messages."""
        if chat_template_of(self.processor) is None:
            raise UsageError(
                f"conv_mode=chat: {self.name} brings no chat template; use conv_mode=referseg or plain"
            )
        try:
            return render_chat(self.processor, messages)
        except TemplateError as error:
            raise UsageError(
                f"conv_mode=chat: the chat template of {self.name} refuses an image with a text ({error}); "
                "use conv_mode=referseg or plain"
            ) from error

    def image_for_processor(self, image: Image.Image) -> Image.Image:
        """The image that the processor is given (`downscale_for_model`). UsageError if its shape is too extreme."""
        check_shape(self.model.config, self.processor.image_processor, image.size)
        found = downscale_for_model(image)
        if found is not image:
            found.original_size = image.size  # type: ignore[attr-defined]  # boxes are in pixels of that
        return found

    def model_inputs(self, images: Sequence[PromptImages], prompts: Sequence[str]) -> dict[str, Any]:
        """Processor output on the model's device and in its precision, padded to one length.

        On the left, so that all samples end together; encoders, which number their tokens from the left, on the right.
        """
        return self.on_device(self.run_processor(images, prompts))

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs: of weights that a `device_map` keeps elsewhere, where they come to run."""
        hook = getattr(self.model.get_input_embeddings(), "_hf_hook", None)
        where = getattr(hook, "execution_device", None)
        return torch.device(self.model.device if where is None else where)

    def on_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors on the model's device, pixels in its precision."""
        device, dtype = self.device, self.model.dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else None)
            if isinstance(value, Tensor)
            else value
            for name, value in inputs.items()
        }

    def writes_bos(self, prompt: str) -> bool:
        """Whether a prompt has the token that begins a text, or its processor writes it: the tokenizer adds none."""
        bos = self.processor.tokenizer.bos_token
        return bool(bos) and (prompt.startswith(bos) or family_of(self.model.config).writes_bos)

    def run_processor(
        self, images: Sequence[PromptImages], prompts: Sequence[str], processor: Any = None
    ) -> Mapping[str, Any]:
        """Processor output as it comes, of the model's processor or of another."""
        nested = [list(images_of(shown)) for shown in images]
        every = [image for one in nested for image in one]
        for image in every:
            check_shape(self.model.config, self.processor.image_processor, image.size)
        paged = hasattr(self.processor, "multi_page")  # GOT-OCR: lists of images are pages
        side = "right" if self.model.config.is_encoder_decoder else "left"
        sizes = ", ".join(f"{image.width} x {image.height}" for image in every[:3])
        what = f"the processor of {self.name} does not take the image ({sizes} pixels) with its text"
        with self._tokenizing, memory_errors(), processor_errors(what):
            inputs: Mapping[str, Any] = (processor or self.processor)(
                images=every if paged else nested,
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
        return {"add_special_tokens": False} if all(map(self.writes_bos, prompts)) else {}

    def tokenize(self, prompt: str) -> dict[str, Any]:
        """One prompt whose placeholders are filled in already, as the model's inputs."""
        with self._tokenizing:
            found = dict(
                self.processor.tokenizer([prompt], return_tensors="pt", **self._bos_options([prompt]))
            )
        found.pop("token_type_ids", None)
        if getattr(self.processor, "return_mm_token_type_ids", False):
            kinds = self.processor.create_mm_token_type_ids(found["input_ids"].tolist())
            found["mm_token_type_ids"] = torch.tensor(kinds)
        return found

    def check_length(self, num_tokens: int) -> None:
        """Raises UsageError if a prompt is longer than the model's positions: it would answer nonsense."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(limit, int) and num_tokens > limit:
            raise UsageError(
                f"the prompt has {num_tokens} tokens with the image, and {self.name} reads {limit} at most"
            )
