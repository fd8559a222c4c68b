"""`doctor`: shows how a model is read, so that a user with a new one sees at once whether it is right."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from localization_heads.data.images import load_image
from localization_heads.errors import UsageError
from localization_heads.stages.run import Run
from localization_heads.stages.single import default_id
from localization_heads.store.files import writable_folder
from localization_heads.store.paths import entry_path

if TYPE_CHECKING:
    from localization_heads.lvlm.doctor import Examination

EXAMPLE = "examples/images/cat.jpg"
EXPRESSION = "the cat"


@dataclass(frozen=True)
class Examined:
    """What was found, and the figure of its cells (none where their places could not be told)."""

    examination: Examination
    paths: list[Path]


def doctor(run: Run) -> Examined:
    """Examine the model on `image_file` and `query`, or on an example -> `<id>_doctor.png`."""
    name = run.image(_image_name(run))
    image = load_image(name)
    expression = str(run.options.query or EXPRESSION)
    id = str(run.options.save_id or default_id(str(name), expression))
    path = entry_path(run.attention_folder, id, "_doctor.png")
    writable_folder(run.attention_folder)
    run.note_heads()  # a model that cannot be loaded is an error of its own
    from localization_heads import figures
    from localization_heads.lvlm.doctor import examine

    found = examine(run.lvlm, image, expression, run.options.doctor.check)
    if not found.views:
        return Examined(found, [])
    figure = figures.plot_cells(
        image, found.views, path, title=f"{run.lvlm.name}: the cells of its image tokens"
    )
    if run.options.show_plot:
        figures.show(figure)
    return Examined(found, [path])


def _image_name(run: Run) -> str:
    if run.options.image_file:
        return str(run.options.image_file)
    if not Path(EXAMPLE).is_file():
        raise UsageError("image_file= is missing: stage=doctor shows how the model reads an image")
    return EXAMPLE
