"""Volumes of organs in adults, to find label maps that deserve a look."""

from __future__ import annotations

from typing import NamedTuple


class AdultVolume(NamedTuple):
    """Mean and standard deviation in ml of the volume of an organ, and the study they are from.

    Attributes:
        low: of women; of all where the study does not tell them apart.
        high: of men, or of all.
        study: its citation.
    """

    low: tuple[float, float]
    high: tuple[float, float]
    study: str

    @property
    def range_ml(self) -> tuple[float, float]:
        """Return mean - 2 standard deviations of `low`, mean + 2 standard deviations of `high`."""
        return round(self.low[0] - 2 * self.low[1], 1), round(self.high[0] + 2 * self.high[1], 1)


_LIVER = "Kromrey et al., Eur J Radiol 2018, doi:10.1016/j.ejrad.2018.07.005 (2,773 adults, MR)"
_SPLEEN = "Caglar et al., Folia Morphol 2014, doi:10.5603/FM.2014.0038 (212 adults, CT)"
_PANCREAS = "Saisho et al., Clin Anat 2007, doi:10.1002/ca.20543 (1,886 adults, CT)"
_KIDNEY = "Dabers et al., J Clin Med 2024, doi:10.3390/jcm13030769 (1,815 adults, MR; deviations from quartiles)"
_ADRENAL = "Sisli Etfal Hastan Tip Bul 2021;55:333, doi:10.14744/SEMB.2021.96462 (115 adults, CT)"

# Hollow organs are as full as they are, and vessels as long as the scan is: they have no entry.
ADULT_VOLUMES = {
    "liver": AdultVolume((1505.0, 385.0), (1505.0, 385.0), _LIVER),
    "spleen": AdultVolume((198.0, 88.0), (198.0, 88.0), _SPLEEN),
    "pancreas": AdultVolume((72.4, 25.8), (72.4, 25.8), _PANCREAS),
    "right kidney": AdultVolume((138.0, 25.9), (174.0, 31.9), _KIDNEY),
    "left kidney": AdultVolume((144.0, 29.7), (180.0, 31.9), _KIDNEY),
    "right adrenal gland": AdultVolume((3.47, 1.33), (3.47, 1.33), _ADRENAL),
    "left adrenal gland": AdultVolume((4.77, 1.33), (4.77, 1.33), _ADRENAL),
}
