"""`LVLM`: a loaded model that can be asked where every one of its heads looks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from localization_heads.attention import AttentionMaps
from localization_heads.errors import UsageError, WorkError
from localization_heads.heads.head import Head
from localization_heads.lvlm.capture import attention_modules, capture
from localization_heads.lvlm.geometry import Grid, grid_of
from localization_heads.lvlm.prompts import clean_expression, expression_prompt
from localization_heads.lvlm.spec import ModelSpec


class LVLM:
    """A vision-language model of transformers, its processor, and what is known about it.

    Made by `load_model`. The model itself is never changed: `lvlm.model` is plain transformers.
    """

    def __init__(self, model: Any, processor: Any, spec: ModelSpec, *, system: str, conv_mode: str) -> None:
        self.model = model
        self.processor = processor
        self.spec = spec
        self.system = system
        self.conv_mode = conv_mode
        self.attention_modules: dict[int, nn.Module] = attention_modules(model)

    def __repr__(self) -> str:
        return f"LVLM({self.name}, {self.num_layers} layers x {self.num_heads} heads)"

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def num_layers(self) -> int:
        """Layers of the language model, those without attention heads included."""
        return len(self.model.get_decoder().layers)

    @property
    def num_heads(self) -> int:
        """Query heads in a layer of the language model."""
        return self.model.config.get_text_config().num_attention_heads

    @property
    def known_heads(self) -> tuple[Head, ...]:
        """Published localization heads of this checkpoint, best first; empty if nobody published any."""
        return self.spec.heads

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the weights do: the hub's commit, or the names, sizes and times of a folder's files."""
        commit = getattr(self.model.config, "_commit_hash", None)
        folder = Path(self.model.config._name_or_path)
        files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
        return commit or " ".join(f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files)

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    @property
    def image_token(self) -> str:
        """The placeholder that stands for an image in a prompt."""
        return getattr(self.processor, "image_token", None) or self.processor.tokenizer.convert_ids_to_tokens(
            self.image_token_id
        )

    def prompt(self, expression: str) -> str:
        """The text around an expression; its last token is the query token (Sec. 4.1)."""
        text = clean_expression(expression, tuple(self.processor.tokenizer.all_special_tokens))
        return expression_prompt(
            text, self.conv_mode, image_token=self.image_token, system=self.system, chat=self.chat_prompt
        )

    def chat_prompt(self, text: str) -> str:
        """One user turn with an image in the model's own template, up to where its answer begins."""
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return self.apply_chat_template([{"role": "user", "content": content}])

    def apply_chat_template(self, messages: list[dict[str, Any]]) -> str:
        """Raises UsageError if the checkpoint brings no chat template."""
        if not getattr(self.processor, "chat_template", None):
            raise UsageError(
                f"conv_mode=chat: {self.name} brings no chat template; use conv_mode=referseg or plain"
            )
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def encode(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Any]:
        """Processor output on the model's device and in its precision, left-padded to one length."""
        inputs = self.processor(
            images=list(images), text=list(prompts), return_tensors="pt", padding=True, padding_side="left"
        )
        return dict(inputs.to(self.model.device, self.model.dtype))

    def attend(self, image: Image.Image, expression: str, *, last_layer: int | None = None) -> AttentionMaps:
        """Where every head looks while the model reads the last token of the expression.

        Args:
            image: RGB picture of any size.
            last_layer: stop the forward pass after this layer; the maps of later layers stay zero.
        """
        return self.attend_batch([image], [expression], last_layer=last_layer)[0]

    def attend_batch(
        self, images: Sequence[Image.Image], expressions: Sequence[str], *, last_layer: int | None = None
    ) -> list[AttentionMaps]:
        """`attend` for several pairs in one forward pass, in their order."""
        prompts = [self.prompt(expression) for expression in expressions]
        inputs = self.encode(images, prompts)
        rows = self._query_rows(inputs, last_layer)
        is_image = inputs["input_ids"] == self.image_token_id  # (B, T)
        return [
            self._maps(row[..., here.to(row.device)], image, expression, prompt)
            for row, here, image, expression, prompt in zip(
                rows, is_image, images, expressions, prompts, strict=True
            )
        ]

    def _query_rows(self, inputs: dict[str, Any], last_layer: int | None) -> list[Tensor]:
        """Per sample `[layer, head, token]` fp32 on the CPU. One prefill; no LM head, no cache, no generation."""
        try:
            with torch.inference_mode(), capture(self.attention_modules, stop_after=last_layer) as recorder:
                self.model.base_model(**inputs, use_cache=False)
        except torch.OutOfMemoryError as error:
            raise WorkError("out of memory: lower batch_size, or load the model in fewer bits") from error
        layers = [recorder.rows[index].cpu() for index in sorted(recorder.rows)]  # each (B, H, T)
        if not layers:
            raise WorkError(
                f"{self.name}: no attention was seen; its attention implementation cannot be captured"
            )
        batch, heads, tokens = layers[0].shape
        full = torch.zeros(batch, self.num_layers, heads, tokens)
        full[:, sorted(recorder.rows)] = torch.stack(layers, 1)
        return list(full)

    def _maps(self, row: Tensor, image: Image.Image, expression: str, prompt: str) -> AttentionMaps:
        """`row`: [layer, head, image token] of one sample."""
        grid = self.grid(row.shape[-1], image.size)
        maps = row.reshape(*row.shape[:2], grid.height, grid.width).numpy()
        return AttentionMaps(
            attention=np.ascontiguousarray(maps, np.float32),
            image_box=grid.image_box,
            image_size=image.size,
            query=expression,
            prompt=prompt,
            model=self.name,
        )

    def grid(self, num_tokens: int, image_size: tuple[int, int]) -> Grid:
        """Where an image's tokens lie; `image_size` is `(W, H)` in pixels."""
        return grid_of(self.model.config, self.processor.image_processor, num_tokens, image_size)
