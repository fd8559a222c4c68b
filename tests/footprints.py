"""The oracle, which is part of the package: `doctor` asks it too."""

from localization_heads.lvlm.checks.footprints import (
    coordinate_image,
    footprint_centres,
    footprint_errors,
    sampled_cells,
    views_seen,
)

__all__ = ["coordinate_image", "footprint_centres", "footprint_errors", "sampled_cells", "views_seen"]
