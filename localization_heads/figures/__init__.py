"""Figures worth putting in a paper: the two criteria (Fig. 3, 6a), attention maps, components, grounding.

Every `plot_*` function takes data, draws one `matplotlib.figure.Figure`, writes it whole or not at all if
given a path, and returns it; `show` opens it in a window. No pyplot state is touched on the way.
"""

from localization_heads.figures.charts import (
    plot_attention_sums,
    plot_head_grid,
    plot_selection_frequency,
    plot_sensitivity,
)
from localization_heads.figures.curves import plot_ablation, plot_confidence, plot_label_curve
from localization_heads.figures.experiments import plot_experiment, plot_frequency_iou
from localization_heads.figures.overlay import plot_boxes, plot_cells
from localization_heads.figures.rendering import svg
from localization_heads.figures.sample import plot_components, plot_grounding, plot_top_maps
from localization_heads.figures.sequences import plot_timeline, plot_trace
from localization_heads.figures.several import Found, plot_instances, plot_several, plot_together
from localization_heads.figures.sheet import plot_once, show

__all__ = [
    "Found",
    "plot_ablation",
    "plot_attention_sums",
    "plot_boxes",
    "plot_cells",
    "plot_components",
    "plot_confidence",
    "plot_experiment",
    "plot_frequency_iou",
    "plot_grounding",
    "plot_head_grid",
    "plot_instances",
    "plot_label_curve",
    "plot_once",
    "plot_selection_frequency",
    "plot_sensitivity",
    "plot_several",
    "plot_timeline",
    "plot_together",
    "plot_top_maps",
    "plot_trace",
    "show",
    "svg",
]
