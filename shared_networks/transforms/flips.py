"""Mirror volumes along chosen axes at random."""

from __future__ import annotations

from collections.abc import Sequence

from monai.config import KeysCollection
from monai.transforms import Compose, RandFlipd


class RandFlipAxesd(Compose):
    """Mirror along each of several axes with one probability, each by itself, by MONAI's `RandFlipd`.

    Args:
        keys: of volumes [C, H, W, D].
        axes: spatial axes, 0 (left-right), 1 (back-front) or 2 (foot-head); none mirrors nothing. A flip along axis 0
            turns a right kidney into a left one, so label maps of sided organs must not be mirrored there.
        prob: of each axis.
    """

    def __init__(self, keys: KeysCollection, axes: Sequence[int], prob: float = 0.1) -> None:
        super().__init__([RandFlipd(keys, prob, spatial_axis=axis) for axis in sorted(axes)])
