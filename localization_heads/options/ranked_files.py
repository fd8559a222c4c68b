"""The options of `stage=rank attention_files=`."""

from __future__ import annotations

from localization_heads.options.kinds import Options, PathText, option, options


@options
class RankedFiles(Options):
    """Heads ranked over attention files on disk, whoever wrote them."""

    attention_files: PathText | None = option(
        None,
        "For rank: a folder of attention files or a pattern such as runs/*.pkl, ranked without the model; files of one "
        "image and different queries are compared for the third criterion. Takes the place of data_file.",
        section="input",
        stages=("rank",),
    )
