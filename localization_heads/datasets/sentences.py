"""Which expressions of an object are asked, and how: each alone, one of them, or all of them in one prompt.

lmms-eval has both kinds of tasks for RefCOCO: `refcoco_bbox_rec` asks each expression by itself;
`refcoco_grounding` (pull request 1373 of EvolvingLMMs-Lab/lmms-eval) puts all of an object into one prompt, each in
quotes, with commas between. Numbers of one kind do not compare with those of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from localization_heads.datasets.reference import Entry
from localization_heads.options.parts import Protocol, Sentence


def chosen_sentences(entries: Sequence[Entry], sentence: Sentence) -> list[Entry]:
    """All entries, or of each row the first or the longest one. Of equally long ones the first.

    Args:
        entries: in the order of the source, those of a row side by side.

    >>> rows = [Entry("a", "val", "p", "cat", 0), Entry("b", "val", "p", "black cat", 0)]
    >>> [entry.id for entry in chosen_sentences(rows, "longest")]
    ['b']
    """
    if sentence == "all":
        return list(entries)
    rows = [list(row) for _, row in groupby(entries, key=lambda entry: entry.row)]
    if sentence == "first":
        return [row[0] for row in rows]
    return [max(row, key=lambda entry: len(entry.text)) for row in rows]


def joined_sentences(entries: Sequence[Entry]) -> list[Entry]:
    """One entry for each row, which asks all its expressions at once.

    >>> rows = [Entry("ref1_sent1", "val", "p", "cat", 0), Entry("ref1_sent2", "val", "p", "black cat", 0)]
    >>> joined_sentences(rows)[0]
    Entry(id='ref1_joined', split='val', picture='p', text='"cat", "black cat"', row=0)
    """
    joined = []
    for _, row in groupby(entries, key=lambda entry: entry.row):
        first, *others = row
        text = ", ".join(f'"{entry.text}"' for entry in (first, *others))
        joined.append(first._replace(id=f"{first.id.rpartition('_')[0]}_joined", text=text))
    return joined


def asked(entries: Sequence[Entry], protocol: Protocol, sentence: Sentence) -> list[Entry]:
    """The entries as the options have them asked."""
    chosen = chosen_sentences(entries, sentence)
    return joined_sentences(chosen) if protocol == "lmms" else chosen


def part_of_name(protocol: Protocol, sentence: Sentence) -> str:
    """What the name of the prepared file says of it: nothing where each expression is asked by itself."""
    return "joined" if protocol == "lmms" else "" if sentence == "all" else sentence
