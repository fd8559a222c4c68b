"""`zoom=true`: each chunk is asked again, in one batch, about crops around its first boxes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from localization_heads.errors import NoHeadError
from localization_heads.grounding.ground import Grounding, ground_maps
from localization_heads.grounding.zoom import crop_around, mapped_back
from localization_heads.heads.head import Head
from localization_heads.stages.chunks import Attended, LookAgain, attend
from localization_heads.stages.entries import Entries
from localization_heads.stages.run import Run


def second_look(run: Run, heads: Sequence[Head] | None) -> LookAgain | None:
    """What `go_through` asks a second time; None without `zoom=true`."""
    return partial(look_again, heads=heads) if run.options.zoom else None


def look_again(
    run: Run, entries: Entries, attended: Sequence[Attended], *, heads: Sequence[Head] | None
) -> list[Attended]:
    """The chunk with the boxes that the same heads find in crops; an entry whose crop cannot be used fails.

    The whole chunk is asked, whatever is missing of it: another batch would round differently.
    """
    first = {one.sample.id: found for one in attended if (found := _first(run, one, heads))}
    crops = {id: crop for id, found in first.items() if (crop := crop_around(found))}
    opened = [
        (one.sample, one.single.crop(crops[one.sample.id])) for one in attended if one.sample.id in crops
    ]
    last_layer = max((head.layer for found in first.values() for head in found.heads), default=None)
    seconds = {one.sample.id: one for one in attend(run, entries, opened, last_layer)}
    looked = []
    for one in attended:
        id = one.sample.id
        if id in seconds:
            found = ground_maps(seconds[id].maps, first[id].heads, run.options.grounding)
            box = mapped_back(found.box, crops[id]) if found.cells.any() else None
            looked.append(one._replace(second=box))
        elif id not in crops:
            looked.append(one)
    return looked


def _first(run: Run, one: Attended, heads: Sequence[Head] | None) -> Grounding | None:
    """What the maps of the whole image say; None where a sample finds no heads of its own, which `work` reports."""
    try:
        return ground_maps(one.maps, run.grounder(heads).heads_of(one.maps), run.options.grounding)
    except NoHeadError:
        return None
