"""`load_model`: load an `LVLM` by name, or fail with a one-line error that says what to do."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from localization_heads.errors import UsageError, shown
from localization_heads.lvlm.answers.box_formats import BOX, FORMATS
from localization_heads.lvlm.checkpoints import files as checkpoint
from localization_heads.lvlm.checkpoints.processors import (
    bos_mismatch,
    check_image_sizes,
    fill_in_missing,
    processor_class,
    use_pillow,
)
from localization_heads.lvlm.checkpoints.sources import (
    check_torchvision,
    checkpoint_errors,
    checkpoint_folder,
    reads_local_files_only,
    resolve_source,
    video_settings,
)
from localization_heads.lvlm.checkpoints.spec import (
    EMBEDDED,
    find_known_shape,
    find_spec,
    known_specs,
    resolve_converted,
    with_family_defaults,
)
from localization_heads.lvlm.families.table import check_family, family_defaults
from localization_heads.lvlm.model import LVLM
from localization_heads.lvlm.text.chat_template import start_renderer_if_needed
from localization_heads.lvlm.text.prompts import LLAVA_SYSTEM, template_renderer
from localization_heads.options.declaration import OptionError
from localization_heads.options.groups import ConvMode, ModelSpec, QueryToken, ViewChoice
from localization_heads.options.stage_groups import check_answer_span

log = logging.getLogger(__name__)

LARGE_BYTES = 1 << 30
"""Size of weights from which loading shows a progress bar."""


def load_model(
    name: str | ModelSpec = "tiny",
    *,
    dtype: str | torch.dtype | None = None,
    device: str | int | None = "auto",
    device_map: str | None = None,
    quantization: str | None = None,
    conv_mode: ConvMode | None = None,
    query_token: QueryToken = "last",
    view: ViewChoice = "combined",
    drop_lone_spaces: bool = False,
    answer_tokens: int = 8,
    answer_span: str | None = None,
    paraphrases: Sequence[str] | None = None,
    like: str | None = None,
) -> LVLM:
    """Load a vision-language model whose attention can be captured.

    Args:
        name: `tiny` (the embedded model), another file of `config/model/`, a Hugging Face id or a local folder.
        dtype: `auto`, `float32`, `bfloat16` or `float16`, or a torch dtype; None for the one in the model's config.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps` or a GPU's number. Ignored with a `device_map`.
        device_map: spread the model over devices, as in transformers (`auto`, `balanced`, ...).
        quantization: None, `8bit` or `4bit` (needs the extra `quantization`).
        conv_mode: the prompt: `referseg` (the paper's), `chat` or `plain`; None for the one that the model's config
            or its family recommends, and `referseg` if there is none.
        query_token: the token whose attention is captured: `last` (the paper's), `expression_end`, `expression_mean`,
            `answer_first`, `answer_mean`, `answer_span`, or `last_and_answer`, which captures two.
        view: for a model that gets an image as a whole and again as tiles: `combined` (both in one map), `whole` or
            `tiles`. Where an image has only one view, it is used.
        drop_lone_spaces: delete SentencePiece's lone spaces from the prompt's tokens, as the paper's published code
            does; nothing changes for tokenizers without one.
        answer_tokens: for `answer_mean`, `answer_span` and `last_and_answer`, the maximum number of answer tokens
            whose attention is averaged.
        answer_span: for `answer_span`, a part of the answer, in which `{}` stands for the expression; or `box`, the
            numbers of the box that the model is asked to write.
        paraphrases: templates such as `"a {}"`, over which the maps are averaged; None uses the expression alone.
        like: the file in `config/model/` of a checkpoint that this one is a copy of or was tuned from: all its
            settings are applied, including its heads (`load_model("/data/my-llava", like="llava")`).

    Warnings about the loaded model are logged, and kept in `LVLM.notes`.

    Raises:
        UsageError: an invalid option or name.
        WorkError: the weights cannot be downloaded or read.
    """
    spec = find_spec(name, like) if isinstance(name, str) else name
    choices = (
        ("conv_mode", conv_mode, ConvMode),
        ("query_token", query_token, QueryToken),
        ("view", view, ViewChoice),
    )
    for option, value, kind in choices:
        if value is not None and value not in get_args(kind):
            raise UsageError(f"{option}={value}: choose one of {', '.join(get_args(kind))}")
    _check_prompt_options(answer_tokens, paraphrases)
    check_answer_span(query_token, answer_span)
    dtype = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    overrides: dict[str, Any] = {"dtype": dtype, "device_map": device_map, "quantization": quantization}
    try:
        spec = replace(spec, **{key: value for key, value in overrides.items() if value is not None})
    except OptionError as error:
        raise UsageError(f"model.{error}") from None
    spec = replace(spec, name=resolve_converted(spec.name))
    source = _resolve_source(spec)
    target = None if spec.device_map else pick_device(device)
    check_torchvision()
    config = _load_config(source, spec)
    chosen_mode = spec.conv_mode
    spec = with_family_defaults(spec, family_defaults(config))
    processor, model = _load_processor(source, spec, config), _load_weights(source, spec, config)
    if target is not None and not spec.quantization:
        model.to(target)
    if chosen_mode is None and spec.conv_mode == "chat" and template_renderer(processor) is None:
        spec = replace(spec, conv_mode=None)  # the family's default, but this checkpoint has no chat template
    lvlm = LVLM(
        model.eval(),
        processor,
        spec,
        system=_system_sentence(source, spec),
        conv_mode=conv_mode or spec.conv_mode or "referseg",
        query_token=query_token,
        view=view,
        drop_lone_spaces=drop_lone_spaces,
        answer_tokens=answer_tokens,
        paraphrases=paraphrases,
        answer_span=answer_span,
    )
    lvlm.video_settings = cache(partial(video_settings, source))
    if answer_span == BOX:
        _check_box_span(lvlm)
    _check_image_position(lvlm)
    for note in _find_notes(lvlm, checkpoint_folder(source)):
        lvlm.note(note)
    return lvlm


def _check_prompt_options(answer_tokens: int, paraphrases: Sequence[str] | None) -> None:
    """Raise UsageError unless there is at least one answer token, and each paraphrase has exactly one `{}`."""
    if isinstance(answer_tokens, bool) or not isinstance(answer_tokens, int) or answer_tokens < 1:
        raise UsageError(f"answer_tokens={shown(answer_tokens)}: a whole number of at least 1")
    if paraphrases is None:
        return
    templates = [paraphrases] if isinstance(paraphrases, str) else list(paraphrases)
    wrong = [template for template in templates if not isinstance(template, str) or template.count("{}") != 1]
    if wrong or not templates or isinstance(paraphrases, str):
        raise UsageError(
            f"paraphrases={shown(wrong[0] if wrong else paraphrases)}: write templates, each with one {{}}, such as "
            '["the {}", "a {}"], or None'
        )


def _check_box_span(lvlm: LVLM) -> None:
    """Raise UsageError if the model is not known to write boxes, or its format needs a chat template it lacks."""
    if lvlm.box_format is None:
        raise UsageError(
            f"answer_span=box: {lvlm.name} is not known to write boxes; if it does, say how with model.native_box= "
            f"one of {', '.join(FORMATS)}"
        )
    lvlm.prompt("it")


def _find_notes(lvlm: LVLM, folder: Path | None) -> Iterator[str]:
    """Yield what the user may want to know about this checkpoint."""
    tokenizer = lvlm.processor.tokenizer
    if not lvlm.writes_bos(lvlm.prompt("it")) and (mismatch := bos_mismatch(tokenizer, folder)):
        yield f"{lvlm.name}: {mismatch}"
    missing = [head for head in lvlm.known_heads if head.layer >= lvlm.num_layers or head.head >= lvlm.num_heads]
    if missing:
        yield (
            f"{lvlm.name} has {lvlm.num_layers} layers of {lvlm.num_heads} heads and no {missing[0]}: it is not the "
            "model for which these heads are known; find its own with stage=find"
        )
    stem = find_known_shape(lvlm.model.config)
    if stem and not lvlm.known_heads:
        yield (
            f"{lvlm.name} has the shape of {known_specs()[stem].name}: if it is a copy of it, or was tuned from it, "
            f"model={stem} model.name={lvlm.name} takes what is known about that one, heads included (from Python: "
            f'load_model("{lvlm.name}", like="{stem}"))'
        )


def _check_image_position(lvlm: LVLM) -> None:
    """Check that the prompt has the image before the text, which under causal attention cannot see it otherwise.

    Raises:
        UsageError: the chat template drops the image, or the query is a token before it.
    """
    if lvlm.image_text not in lvlm.prompt("it"):
        raise UsageError(
            f"conv_mode=chat: the chat template of {lvlm.name} leaves the image out; use conv_mode=referseg or plain"
        )
    if lvlm.image_comes_first:
        return
    if lvlm.query_token.startswith("expression"):
        raise UsageError(
            f"query_token={lvlm.query_token}: the chat template of {lvlm.name} puts the image after the text, which "
            "cannot see it; use query_token=last, or conv_mode=referseg"
        )
    log.warning(
        "the chat template of %s puts the image after the text, whose tokens therefore cannot attend to it; "
        "conv_mode=referseg puts the image first",
        lvlm.name,
    )


def pick_device(device: str | int | None) -> torch.device:
    """Return the torch device; `auto` and None prefer a GPU. UsageError for a device that this machine lacks."""
    text = "auto" if device is None else str(device)
    if text == "auto":
        has_mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    text = f"cuda:{text}" if text.isdecimal() else text
    try:
        chosen = torch.device(text)
    except RuntimeError:
        raise UsageError(f"device={device}: write auto, cpu, cuda, cuda:1, mps or a GPU's number") from None
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if (chosen.index or 0) >= count.get(chosen.type, 0):
        raise UsageError(f"device={device}: this machine has no such device; device=auto takes what there is")
    return chosen


def _resolve_source(spec: ModelSpec) -> str:
    """Return what `from_pretrained` takes: the embedded model's folder, a local folder, or a hub id."""
    if spec.name == EMBEDDED:
        return str(files("localization_heads") / "lvlm" / "embedded")
    return resolve_source(spec.name, f"model.name={spec.name}", "model=tiny is the embedded model")


def _load_config(source: str, spec: ModelSpec) -> Any:
    """Load the configuration, and check it before any weights are downloaded."""
    from transformers import AutoConfig

    option = f"model.name={spec.name}"
    raw = _load(checkpoint.raw_config, source, spec)
    checkpoint.check_not_original_llava(raw, option)
    checkpoint.check_counts(raw, option)
    config = _load(AutoConfig.from_pretrained, source, spec)
    config = getattr(config, "thinker_config", config)  # Qwen-Omni's language model, without its speech part
    try:
        check_family(config)
    except UsageError as error:
        raise UsageError(f"{option}: {error}") from None
    checkpoint.check_size(config.to_dict(), checkpoint.weights_in(checkpoint_folder(source)), option)
    return config


def _load_processor(source: str, spec: ModelSpec, config: Any) -> Any:
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(_no_torchvision_warning)
    options = {"fix_mistral_regex": True} if spec.fix_mistral_regex else {}
    processor = _load(processor_class(str(config.model_type)).from_pretrained, source, spec, **options)
    fill_in_missing(processor, config)
    check_image_sizes(processor.image_processor, f"model.name={spec.name}")
    processor.image_processor = use_pillow(processor.image_processor)
    pad = spec.pad_to_square
    if pad is not None and getattr(processor.image_processor, "do_pad", False) != pad:
        # Unlike CLIP's, LLaVA's image processor can pad to a square.
        processor.image_processor = use_pillow(processor.image_processor, "LlavaImageProcessor", do_pad=pad)
    start_renderer_if_needed(processor)  # starts up while the weights are loaded
    return processor


def _load_weights(source: str, spec: ModelSpec, config: Any) -> nn.Module:
    from transformers import AutoModelForImageTextToText

    is_large = checkpoint.num_weight_bytes(checkpoint_folder(source)) > LARGE_BYTES
    saved = str(getattr(config, "dtype", None)).removeprefix("torch.")
    if is_large and spec.dtype not in ("auto", saved):
        log.warning(
            "model.dtype=%s: the weights of %s are saved as %s, and converting them makes a copy in memory; "
            "model.dtype=auto maps them from disk as they are",
            spec.dtype,
            spec.name,
            saved,
        )
    options: dict[str, Any] = {"dtype": spec.dtype}
    if str(config.model_type).endswith("_thinker"):  # Qwen-Omni: only this part of the checkpoint
        options |= {"config": config, "key_mapping": {r"^thinker\.": ""}}
    if spec.device_map:
        options["device_map"] = spec.device_map
    if spec.attn_implementation:
        options["attn_implementation"] = spec.attn_implementation
    if spec.quantization:
        options["quantization_config"] = _quantization(spec.quantization)
        options.setdefault("device_map", "auto")
    model: nn.Module
    model, info = _load(
        AutoModelForImageTextToText.from_pretrained,
        source,
        spec,
        show_progress=is_large,
        output_loading_info=True,
        **options,
    )
    if missing := sorted(info["missing_keys"]):
        log.warning(
            "the checkpoint of %s lacks %d tensors, such as %s: they are initialised at random",
            spec.name,
            len(missing),
            missing[0],
        )
    return model


def _quantization(bits: str) -> Any:
    from transformers import BitsAndBytesConfig
    from transformers.utils.import_utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise UsageError("model.quantization needs an extra: pip install 'localization-heads[quantization]'")
    return BitsAndBytesConfig(load_in_4bit=bits == "4bit", load_in_8bit=bits == "8bit")


def _load(
    from_pretrained: Callable[..., Any],
    source: str,
    spec: ModelSpec,
    *,
    show_progress: bool = False,
    **options: Any,
) -> Any:
    """Call a `from_pretrained` of transformers, with its failures turned into one-line errors.

    Args:
        show_progress: show a progress bar for local files too; a download always has one.
    """
    offline_advice = "model=tiny runs the embedded model, model.name=/path/to/folder a model saved on this machine"
    _set_progress_bars(enabled=show_progress or not Path(source).is_dir())
    with checkpoint_errors(source, f"model.name={spec.name}", offline_advice), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        options |= {"local_files_only": reads_local_files_only(source), "trust_remote_code": False}
        return from_pretrained(source, **options)


def _system_sentence(source: str, spec: ModelSpec) -> str:
    """Return the spec's system sentence, or else that of the checkpoint's folder, or else LLaVA's."""
    if spec.system is not None:
        return spec.system
    system = checkpoint.system_sentence(Path(source))
    return LLAVA_SYSTEM if system is None else system


def _no_torchvision_warning(record: logging.LogRecord) -> bool:
    """Logging filter: without torchvision, transformers falls back to Pillow, which gives the same geometry."""
    return "torchvision" not in record.getMessage()


def _set_progress_bars(*, enabled: bool) -> None:
    from transformers.utils import logging as transformers_logging

    if enabled:
        transformers_logging.enable_progress_bar()
    else:
        transformers_logging.disable_progress_bar()
