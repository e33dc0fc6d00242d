"""Score unlabelled cases for MONAI Label by their uncertainty."""

from __future__ import annotations

from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch import Tensor

from shared_networks.inference.sliding_window import Network, SlidingWindowLabels, with_scan_meta
from shared_networks.inference.uncertainty import on_scan_grid


class ScorableLabels(SlidingWindowLabels):
    """:class:`SlidingWindowLabels` that gives chances in place of labels for a network in train mode.

    MONAI Label's `epistemic` scoring runs the network in train mode, with dropout, several times, and takes what comes
    for probabilities: of their mean p it computes the entropy -p log p. Label values would make nonsense of that, and
    the probabilities of all classes of a whole scan fill the memory, so it is given the probability of any organ.
    """

    @torch.no_grad()
    def __call__(self, inputs: Tensor, network: Network, *args: Any, **kwargs: Any) -> MetaTensor:
        """Label a scan, or say where organs are.

        Args:
            inputs: [1, C, h, w, d], as for :class:`SlidingWindowLabels`.
            network: from [B, C, *roi_size] to logits [B, classes, *roi_size].
            args: further ones of the network.
            kwargs: further ones of the network.

        Returns:
            [1, 1, X, Y, Z] with the scan's affine: uint8 labels, or, of a network in train mode, 1 less the probability
            of the background, float32.

        Raises:
            InputError: the scan's axes are not at right angles.
        """
        if not getattr(network, "training", False):
            return super().__call__(inputs, network, *args, **kwargs)

        def organs(window: Tensor) -> Tensor:
            return 1 - self.predict(window, network, *args, **kwargs).float().softmax(dim=1)[:, :1]

        slide = SlidingWindowInferer(self.roi_size, self.sw_batch_size, self.overlap, self.blending)
        chances: Any = slide(inputs, organs)
        image: Any = inputs[0]
        return with_scan_meta(on_scan_grid(chances[0], image)[None], inputs)
