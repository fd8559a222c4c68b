"""The options of the viewer, the conversation and the demo."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from localization_heads.errors import UsageError
from localization_heads.options.groups import (
    NEWCOMER,
    ConvMode,
    CriteriaOptions,
    GroundingOptions,
)
from localization_heads.options.kinds import (
    PathText,
    Text,
    option,
    options,
)
from localization_heads.options.shared import Count, EntryChoice, ImageAddresses, ModelUse


@options
class VisualizeOptions(EntryChoice):
    """visualize_attention.py"""

    mode: Literal["single", "batch"] = option(
        "single", "single (one attention_file) or batch (every entry of data_file)."
    )
    attention_file: PathText | None = option(
        None, "An attention file (.pkl, .safetensors, or the published code's own)."
    )
    allow_private_addresses: bool = option(
        False,
        "Fetch the image that a file names also from addresses of this machine and of private networks.",
    )
    layer: Count | None = option(None, "Layer to show, counted from 0; null shows the top heads of the file.")
    head: Count | None = option(None, "Head to show, counted from 0.")
    show_components: bool = option(False, "Also draw the connected components behind the spatial entropy.")
    top_k: int = option(3, "Number of top heads to show.", ge=1, le=100)
    k: int = option(
        3, "Number of heads whose sum makes the combined map and the box (the paper's k).", ge=1, le=10_000
    )
    data_file: PathText | None = option(
        "examples/visualization_data.jsonl",
        "batch: JSON lines with attention_file, layer and head, and an id, which names the figures. Without "
        "attention_file it is the one of the id below outputs/localization_heads; without layer and head the "
        "top heads are drawn.",
    )
    output_dir: PathText | None = option(
        None, "Folder for the figures; null puts each beside its attention file."
    )
    save_fig: bool = option(True, "Write the figures to disk.")
    show_plot: bool = option(False, "Open the figures in a window as well (needs a display).")
    debug: bool = option(False, "Show the whole traceback of an error.")
    criteria: CriteriaOptions = option(
        CriteriaOptions(),
        "How the heads of a file are ranked: paper, published or published_august.",
        choice="paper",
    )
    grounding: GroundingOptions = option(
        GroundingOptions(), "How maps become a box: sharp, paper or published.", choice=NEWCOMER
    )

    @model_validator(mode="after")
    def _no_segmenter(self) -> Self:
        if self.grounding.box_from == "mask":
            raise UsageError(
                "grounding.box_from=mask needs a segmenter, which stage=visualize of the finder has"
            )
        return self


@options
class ChatOptions(ModelUse, ImageAddresses):
    """cli_llava.py"""

    cli_mode: bool = option(
        False, "A conversation on the terminal; false answers one query and ends.", section="talk"
    )
    query: Text | None = option(None, "The question; needed unless cli_mode=true.")
    image_file: PathText | None = option(None, "The image it is about (path or http address).")
    max_new_tokens: int = option(128, "Longest answer, in tokens.", ge=1)
    conv_mode: ConvMode | None = option(
        "chat",
        "The prompt of the conversation: chat (the model's own template), referseg or plain. /ground asks with the "
        "paper's prompt, whatever this is.",
    )
    picture_memory: Count = option(
        1024,
        "Memory for the images that /ground was last asked about, in MiB; 0 reads an image anew each time.",
    )


@options
class DemoOptions(ModelUse):
    """python -m localization_heads.apps.demo"""

    host: Text = option(
        "127.0.0.1",
        "Who may open the page: 127.0.0.1 is this machine alone, 0.0.0.0 everybody who can reach it.",
        section="page",
    )
    port: Annotated[int, Field(ge=1, le=65535)] | None = option(
        None, "The page's port; null takes the first free one from 7860."
    )
    open_browser: bool = option(True, "Open the page in a browser.")
