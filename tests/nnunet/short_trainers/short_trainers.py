"""The trainers of the package, cut to one epoch of two iterations: nnU-Net's command line has no option for it."""

from __future__ import annotations

from shared_networks.doors.nnunet.hi_end_mae_trainers import (
    nnUNetTrainerHiEndMAESmall,
    nnUNetTrainerHiEndMAESmallScratch,
)


class Short:
    def initialize(self) -> None:
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1
        super().initialize()  # type: ignore[misc]


class nnUNetTrainerHiEndMAESmallShort(Short, nnUNetTrainerHiEndMAESmall):  # noqa: N801
    pass


class nnUNetTrainerHiEndMAESmallScratchShort(Short, nnUNetTrainerHiEndMAESmallScratch):  # noqa: N801
    pass
