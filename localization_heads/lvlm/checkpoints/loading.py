"""`load_model`: from a name to a ready `LVLM`, or to an error of one line that says what to do."""

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
    bos_trouble,
    check_image_sizes,
    complete,
    processor_kind,
    with_pillow,
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
    converted,
    find_spec,
    known_specs,
    looks_like,
    with_family,
)
from localization_heads.lvlm.families.table import check_family, family_facts
from localization_heads.lvlm.model import LVLM
from localization_heads.lvlm.text.chat_template import make_renderer_ready
from localization_heads.lvlm.text.prompts import LLAVA_SYSTEM, template_renderer
from localization_heads.options.groups import ConvMode, ModelSpec, QueryToken, ViewChoice
from localization_heads.options.kinds import OptionError
from localization_heads.options.surroundings import check_span

log = logging.getLogger(__name__)

LARGE = 1 << 30
"""Bytes of weights that are read in sight of the user."""


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
        dtype: `auto`, `float32`, `bfloat16` or `float16`, or as torch has it; None for what the model's config says.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps` or a GPU's number. Ignored with a `device_map`.
        device_map: spread the model over devices, as in transformers (`auto`, `balanced`, ...).
        quantization: None, `8bit` or `4bit` (needs the extra `quantization`).
        conv_mode: the prompt: `referseg` (the paper's), `chat` or `plain`; None for what the model's config
            recommends, or what its family needs, and if nothing is known, `referseg`.
        query_token: the token whose attention is captured: `last` (the paper's), `expression_end`, `expression_mean`,
            `answer_first`, `answer_mean`, `answer_span`, or `last_and_answer`, which captures two.
        view: for a model that gets an image as a whole and again as tiles: `combined` (both in one map), `whole` or
            `tiles`. Where an image has only one view, it is used.
        drop_lone_spaces: delete SentencePiece's lone spaces from the prompt's tokens, as the paper's published code
            does; nothing changes for tokenizers without one.
        answer_tokens: for `answer_mean`, `answer_span` and `last_and_answer`, how many tokens of the answer are read at
            most.
        answer_span: for `answer_span`, a text of the answer, in which `{}` stands for the expression; or `box`, the
            numbers of the box that the model is asked to write.
        paraphrases: templates such as `"a {}"`, of whose maps the mean is taken; None asks with the expression alone.
        like: the file in `config/model/` of a checkpoint that this one is a copy or a relative of: everything known
            about that one is applied, heads included (`load_model("/data/my-llava", like="llava")`).

    Remarks on how the model was loaded are logged, and kept in `LVLM.notes`.

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
    check_wording(answer_tokens, paraphrases)
    check_span(query_token, answer_span)
    dtype = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    given: dict[str, Any] = {"dtype": dtype, "device_map": device_map, "quantization": quantization}
    try:
        spec = replace(spec, **{key: value for key, value in given.items() if value is not None})
    except OptionError as error:
        raise UsageError(f"model.{error}") from None
    spec = replace(spec, name=converted(spec.name))
    source = _source(spec)
    target = None if spec.device_map else pick_device(device)
    check_torchvision()
    config = _checked_config(source, spec)
    spec, asked = with_family(spec, family_facts(config)), spec
    processor, model = _load_processor(source, spec, config), _load_weights(source, spec, config)
    if target is not None and not spec.quantization:
        model.to(target)
    if asked.conv_mode is None and spec.conv_mode == "chat" and template_renderer(processor) is None:
        # The family has a chat template, but this checkpoint does not bring it.
        spec = replace(spec, conv_mode=None)
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
        check_box_span(lvlm)
    _check_order(lvlm)
    for note in _notes(lvlm, checkpoint_folder(source)):
        lvlm.note(note)
    return lvlm


def check_wording(answer_tokens: int, paraphrases: Sequence[str] | None) -> None:
    """UsageError for an answer of no tokens, no template, or one that has no single place for the expression."""
    if isinstance(answer_tokens, bool) or not isinstance(answer_tokens, int) or answer_tokens < 1:
        raise UsageError(f"answer_tokens={shown(answer_tokens)}: a whole number of at least 1")
    if paraphrases is None:
        return
    given = [paraphrases] if isinstance(paraphrases, str) else list(paraphrases)
    wrong = [one for one in given if not isinstance(one, str) or one.count("{}") != 1]
    if wrong or not given or isinstance(paraphrases, str):
        raise UsageError(
            f"paraphrases={shown(wrong[0] if wrong else paraphrases)}: write templates, each with one {{}}, such as "
            '["the {}", "a {}"], or None'
        )


def check_box_span(lvlm: LVLM) -> None:
    """UsageError if the model is not known to write boxes, or brings no chat template for it."""
    if lvlm.box_format is None:
        raise UsageError(
            f"answer_span=box: {lvlm.name} is not known to write boxes; if it does, say how with model.native_box= "
            f"one of {', '.join(FORMATS)}"
        )
    lvlm.prompt("it")


def _notes(lvlm: LVLM, folder: Path | None) -> Iterator[str]:
    """What a user may not know about this checkpoint: that it looks like a known one, or is not the one named."""
    tokenizer = lvlm.processor.tokenizer
    if not lvlm.writes_bos(lvlm.prompt("it")) and (trouble := bos_trouble(tokenizer, folder)):
        yield f"{lvlm.name}: {trouble}"
    strangers = [
        head for head in lvlm.known_heads if head.layer >= lvlm.num_layers or head.head >= lvlm.num_heads
    ]
    if strangers:
        yield (
            f"{lvlm.name} has {lvlm.num_layers} layers of {lvlm.num_heads} heads and no {strangers[0]}: it is another "
            "model than the one whose known heads were taken; find its own with stage=find"
        )
    stem = looks_like(lvlm.model.config)
    if stem and not lvlm.known_heads:
        yield (
            f"{lvlm.name} has the shape of {known_specs()[stem].name}: if it is a copy of it, or was tuned from it, "
            f"model={stem} model.name={lvlm.name} takes what is known about that one, heads included (from Python: "
            f'load_model("{lvlm.name}", like="{stem}"))'
        )


def _check_order(lvlm: LVLM) -> None:
    """Warn if the chat template puts the image after the text, which then cannot attend to it."""
    if lvlm.image_text not in lvlm.prompt("it"):
        raise UsageError(
            f"conv_mode=chat: the chat template of {lvlm.name} leaves the image out; "
            "use conv_mode=referseg or plain"
        )
    if lvlm.image_comes_first:
        return
    if lvlm.query_token.startswith("expression"):
        raise UsageError(
            f"query_token={lvlm.query_token}: the chat template of {lvlm.name} puts the image after the text, which "
            "cannot see it; use query_token=last, or conv_mode=referseg"
        )
    log.warning(
        "the chat template of %s puts the image after the text: its tokens were read before the image was seen, "
        "and only those after it can look; conv_mode=referseg puts the image first",
        lvlm.name,
    )


def pick_device(device: str | int | None) -> torch.device:
    """`auto` takes a GPU if there is one. Raises UsageError for a device that this machine lacks."""
    text = "auto" if device is None else str(device)
    if text == "auto":
        has_mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    text = f"cuda:{text}" if text.isdecimal() else text
    try:
        wanted = torch.device(text)
    except RuntimeError:
        raise UsageError(f"device={device}: write auto, cpu, cuda, cuda:1, mps or a GPU's number") from None
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if (wanted.index or 0) >= count.get(wanted.type, 0):
        raise UsageError(f"device={device}: this machine has no such device; device=auto takes what there is")
    return wanted


def _source(spec: ModelSpec) -> str:
    """What `from_pretrained` is given: the embedded folder, a local folder, or a hub id."""
    if spec.name == EMBEDDED:
        return str(files("localization_heads") / "lvlm" / "embedded")
    return resolve_source(spec.name, f"model.name={spec.name}", "model=tiny is the embedded model")


def _checked_config(source: str, spec: ModelSpec) -> Any:
    """The configuration. Refuses one that cannot be meant, or has no image tokens, before the weights are fetched."""
    from transformers import AutoConfig

    shown = f"model.name={spec.name}"
    written = _read(checkpoint.raw_config, source, spec)
    checkpoint.check_original(written, shown)
    checkpoint.check_counts(written, shown)
    config = _read(AutoConfig.from_pretrained, source, spec)
    config = getattr(config, "thinker_config", config)  # the part of Qwen-Omni that reads and writes
    try:
        check_family(config)
    except UsageError as error:
        raise UsageError(f"{shown}: {error}") from None
    checkpoint.check_size(config.to_dict(), checkpoint.weights_in(checkpoint_folder(source)), shown)
    return config


def _load_processor(source: str, spec: ModelSpec, config: Any) -> Any:
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(_no_torchvision_warning)
    options = {"fix_mistral_regex": True} if spec.fix_mistral_regex else {}
    processor = _read(processor_kind(str(config.model_type)).from_pretrained, source, spec, **options)
    complete(processor, config)
    check_image_sizes(processor.image_processor, f"model.name={spec.name}")
    processor.image_processor = with_pillow(processor.image_processor)
    pad = spec.pad_to_square
    if pad is not None and getattr(processor.image_processor, "do_pad", False) != pad:
        # LLaVA's, which unlike CLIP's can pad to a square
        processor.image_processor = with_pillow(processor.image_processor, "LlavaImageProcessor", do_pad=pad)
    make_renderer_ready(processor)  # while the weights are read
    return processor


def _load_weights(source: str, spec: ModelSpec, config: Any) -> nn.Module:
    from transformers import AutoModelForImageTextToText

    is_large = checkpoint.num_bytes(checkpoint_folder(source)) > LARGE
    saved = str(getattr(config, "dtype", None)).removeprefix("torch.")
    if is_large and spec.dtype not in ("auto", saved):
        log.warning(
            "model.dtype=%s: the weights of %s are saved as %s, and converted ones are a copy in memory; "
            "model.dtype=auto maps them from the disk as they are",
            spec.dtype,
            spec.name,
            saved,
        )
    options: dict[str, Any] = {"dtype": spec.dtype}
    if str(config.model_type).endswith("_thinker"):
        options |= {"config": config, "key_mapping": {r"^thinker\.": ""}}
    if spec.device_map:
        options["device_map"] = spec.device_map
    if spec.attn_implementation:
        options["attn_implementation"] = spec.attn_implementation
    if spec.quantization:
        options["quantization_config"] = _quantization(spec.quantization)
        options.setdefault("device_map", "auto")
    model: nn.Module
    model, info = _read(
        AutoModelForImageTextToText.from_pretrained,
        source,
        spec,
        bar=is_large,
        output_loading_info=True,
        **options,
    )
    if missing := sorted(info["missing_keys"]):
        log.warning(
            "the checkpoint of %s lacks %d tensors, such as %s: they are random, and so may be its answers",
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


def _read(
    from_pretrained: Callable[..., Any], source: str, spec: ModelSpec, *, bar: bool = False, **options: Any
) -> Any:
    """A checkpoint's part, by the function of transformers whose many ways to fail become one line each.

    Args:
        bar: show how far it is, also where the files are here and most are read at once.
    """
    offline = "model=tiny runs the embedded model, model.name=/path/to/folder a model saved on this machine"
    _progress_bars(enabled=bar or not Path(source).is_dir())  # a download shows its own
    with checkpoint_errors(source, f"model.name={spec.name}", offline), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        options |= {"local_files_only": reads_local_files_only(source), "trust_remote_code": False}
        return from_pretrained(source, **options)


def _system_sentence(source: str, spec: ModelSpec) -> str:
    """The config's sentence, else the one the checkpoint's folder brings, else LLaVA's."""
    if spec.system is not None:
        return spec.system
    system = checkpoint.system_sentence(Path(source))
    return LLAVA_SYSTEM if system is None else system


def _no_torchvision_warning(record: logging.LogRecord) -> bool:
    """Silence the warning that torchvision is missing: the PIL image processors give the same geometry."""
    return "torchvision" not in record.getMessage()


def _progress_bars(*, enabled: bool) -> None:
    from transformers.utils import logging as transformers_logging

    if enabled:
        transformers_logging.enable_progress_bar()
    else:
        transformers_logging.disable_progress_bar()
