"""Sections of a page, several implementations of `MakeSections`.

Sections follow from the operations in the manifest and are computed by the graphs of the artifact. They do
not depend on the family, so custom models have sections too.
"""

from export.report.sections.base import MakeSections, Section
from export.report.sections.interpolations import interpolation_sections
from export.report.sections.rows import (
    edit_sections,
    inpainting_sections,
    reconstruction_sections,
    sample_sections,
)
from export.report.sections.scores import calibration_sections, density_sections, score_sections

# In the order of the page.
SECTIONS: tuple[MakeSections, ...] = (
    sample_sections,
    inpainting_sections,
    edit_sections,
    reconstruction_sections,
    interpolation_sections,
    density_sections,
    score_sections,
    calibration_sections,
)

__all__ = ["SECTIONS", "Section"]
