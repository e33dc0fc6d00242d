"""What MONAI Label 0.8.5 asks of pydicom-seg, which does not import with pydicom 3: DICOM SEG, read by highdicom."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import highdicom
import numpy as np
import SimpleITK


class MultiClassReader:
    """Read the segments of a DICOM SEG as one image."""

    def read(self, dataset: Any) -> SimpleNamespace:
        """Return an object whose `image` holds the number of each voxel's segment.

        Args:
            dataset: a DICOM SEG whose segments do not overlap.

        Raises:
            RuntimeError: segments overlap.
        """
        volume = highdicom.seg.Segmentation.from_dataset(dataset).get_volume(combine_segments=True)
        image = SimpleITK.GetImageFromArray(volume.array)  # slices, rows, columns
        image.SetSpacing(volume.spacing[::-1])
        image.SetDirection(np.array(volume.direction)[:, ::-1].ravel())
        image.SetOrigin(volume.position)
        return SimpleNamespace(image=image)
