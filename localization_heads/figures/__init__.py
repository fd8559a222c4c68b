"""Publication-quality figures: the criteria (Fig. 3, 6a), attention maps, components, groundings and experiments.

Every `plot_*` function draws data into one `matplotlib.figure.Figure` and returns it; with a path, it also writes it
atomically. `show` opens figures in windows. Nothing else touches the state of pyplot.
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
from localization_heads.figures.several import DetectedObject, plot_instances, plot_several, plot_together
from localization_heads.figures.sheet import plot_once, show

__all__ = [
    "DetectedObject",
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
