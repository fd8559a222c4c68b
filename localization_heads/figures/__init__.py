"""Figures worth putting in a paper: the two criteria (Fig. 3, 6a), attention maps, components, grounding.

Every `plot_*` function takes data, draws one `matplotlib.figure.Figure`, writes it whole or not at all if
given a path, and returns it; `show` opens it in a window. No pyplot state is touched on the way.
"""

from localization_heads.figures.boxes import plot_boxes
from localization_heads.figures.canvas import show
from localization_heads.figures.cells import plot_cells
from localization_heads.figures.components import plot_components
from localization_heads.figures.experiments import plot_experiment
from localization_heads.figures.maps import plot_grounding, plot_top_maps
from localization_heads.figures.ranking import plot_attention_sums, plot_head_grid, plot_selection_frequency
from localization_heads.figures.several import Found, plot_several

__all__ = [
    "Found",
    "plot_attention_sums",
    "plot_boxes",
    "plot_cells",
    "plot_components",
    "plot_experiment",
    "plot_grounding",
    "plot_head_grid",
    "plot_selection_frequency",
    "plot_several",
    "plot_top_maps",
    "show",
]
