"""Where a segmenter is unsure, and of which cases: for annotators, who ask where to look and what to correct first.

Sources: Gal and Ghahramani, "Dropout as a Bayesian approximation", ICML 2016 (dropout); Wang et al., "Aleatoric
uncertainty estimation with test-time augmentation for medical image segmentation with convolutional neural networks",
Neurocomputing 2019 (tta); Lakshminarayanan et al., "Simple and scalable predictive uncertainty estimation using deep
ensembles", NIPS 2017 (several checkpoints).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.inferers import SimpleInferer, SlidingWindowInferer
from monai.utils import convert_to_numpy, convert_to_tensor
from nibabel.affines import voxel_sizes
from torch import Tensor, nn

from shared_networks.datasets.pairs import source_file
from shared_networks.errors import InputError
from shared_networks.files import atomic_write, check_beginning, write_csv, write_json
from shared_networks.inference.done import read_note
from shared_networks.inference.predict import Scans
from shared_networks.inference.ranks import Ranks
from shared_networks.inference.save import SaveImageLabelsd, label_image
from shared_networks.inference.sliding_window import CheckpointEnsemble, finite, scan_grid
from shared_networks.networks.cpu import fast_cpu
from shared_networks.networks.precision import AutocastInferer
from shared_networks.transforms.spacing import resample_linear

logger = logging.getLogger(__name__)

METHODS = ("tta", "ensemble", "dropout")
UNCERTAINTY_MEASURES = ("entropy", "variance")
INTENSITY_CHANGE = 0.1  # as the published recipe augments: scale by 0.9 to 1.1, shift by -0.1 to 0.1


class View(NamedTuple):
    """A way to look at an image: its spatial axes mirrored, its intensities scaled, then shifted."""

    flips: tuple[int, ...] = ()
    scale: float = 1.0
    shift: float = 0.0

    def of(self, image: Tensor) -> Tensor:
        """Change an image [B, C, H, W, D]."""
        return self.mirror(image) * self.scale + self.shift

    def mirror(self, volume: Tensor) -> Tensor:
        """Mirror [B, C, H, W, D]; done twice, it is undone."""
        return volume.flip([2 + axis for axis in self.flips])


def draw_views(samples: int, flip_axes: Sequence[int], seed: int) -> list[View]:
    """Draw views; the first is the unchanged image.

    Args:
        samples: how many.
        flip_axes: spatial axes that may be mirrored, each in every second view.
        seed: of the draw.
    """
    random = np.random.default_rng(seed)
    views = [View()]
    while len(views) < samples:
        flips = tuple(axis for axis in flip_axes if random.random() < 0.5)
        scale, shift = random.uniform(-INTENSITY_CHANGE, INTENSITY_CHANGE, size=2)
        views.append(View(flips, 1 + scale, shift))
    return views


@contextmanager
def dropout_on(network: nn.Module) -> Iterator[None]:
    """Have a network's dropout drop, also in evaluation mode; all other layers stay as they are.

    Raises:
        InputError: the network has no dropout, or it never drops anything.
    """
    dropouts = [module for module in network.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    if not any(module.p > 0 for module in dropouts):
        raise InputError(
            "dropout is 0, so all samples would be the same; give --dropout 0.1, or --uncertainty tta, which needs none"
        )
    before = [module.training for module in dropouts]
    for module in dropouts:
        module.train()
    try:
        yield
    finally:
        for module, training in zip(dropouts, before, strict=True):
            module.train(training)


def uncertainty_of_samples(samples: Iterator[Tensor], measure: str) -> tuple[Tensor, Tensor]:
    """Average predictions while they come, none but the first kept, and say how unsure they are.

    Args:
        samples: S probabilities [B, K, H, W, D], of which there are at least two.
        measure: `entropy` of the mean probabilities over its greatest value, `log K`: high where one sample wavers
            and where samples differ; or `variance` over samples, summed over classes, over its greatest value,
            `1 - 1 / min(K, S)`: high only where samples differ.

    Returns:
        Mean probabilities [B, K, H, W, D], and uncertainty [B, 1, H, W, D] from 0 to 1.
    """
    # Differences from the first sample: of equal samples the variance is then exactly 0.
    first = next(samples)
    total, squares, count = torch.zeros_like(first), torch.zeros_like(first[:, :1]), 1
    for sample in samples:
        difference = sample - first
        total += difference
        squares += difference.square().sum(dim=1, keepdim=True)
        count += 1
    offset = total / count
    mean = (first + offset).clamp(min=0)  # rounding can leave a probability just below
    classes = first.shape[1]
    if measure == "entropy":
        unsure = torch.special.entr(mean).sum(dim=1, keepdim=True) / math.log(classes)
    else:
        unsure = squares / count - offset.square().sum(dim=1, keepdim=True)
        unsure /= 1 - 1 / min(classes, count)
    return mean, unsure.clamp(0, 1)


class UncertaintyInferer(SlidingWindowInferer):
    """Sliding window that returns, instead of logits, how unsure the network is and where it sees organs.

    Samples are averaged window by window and only two channels are blended over windows, so memory does not grow with
    classes, samples or members of an ensemble. The uncertainty where windows overlap is the mean of theirs; that they
    may disagree does not count. The draws are a function of `seed`, the same for every case in whatever order, and
    leave torch's generators as they were.

    Args:
        roi_size: window in voxels, a multiple of the patch size.
        method: `tta` mirrors the image and changes its intensities; `ensemble` takes one prediction of each of
            several checkpoints; `dropout` leaves the network's dropout on (Monte-Carlo dropout), which says something
            of networks trained with dropout only.
        measure: `entropy` or `variance`, see :func:`uncertainty_of_samples`.
        samples: predictions a window and network, at least 2 in all; an ensemble has one a network.
        flip_axes: axes that `tta` may mirror. Mirroring left-right would swap sided organs.
        seed: of the draws.
        checkpoints: files of the weights of an ensemble, whose networks all contribute their samples; one is in memory
            at a time. None takes the network's own weights.
        dtype: of mixed precision, see :func:`shared_networks.networks.precision.autocast_type`.
        window: further arguments of :class:`monai.inferers.SlidingWindowInferer`.

    Raises:
        InputError: for another method or measure, or too few samples; on call, if there is no dropout to leave on.
    """

    def __init__(
        self,
        roi_size: Sequence[int] | int,
        method: str = "tta",
        measure: str = "entropy",
        samples: int = 8,
        flip_axes: Sequence[int] = (1, 2),
        seed: int = 0,
        checkpoints: Sequence[str | Path] = (),
        dtype: torch.dtype | None = None,
        **window: Any,
    ) -> None:
        super().__init__(roi_size, **window)
        if method not in METHODS:
            raise InputError(f"uncertainty is {method!r}: give --uncertainty {' or '.join(METHODS)}")
        if measure not in UNCERTAINTY_MEASURES:
            raise InputError(f"measure is {measure!r}: give --measure {' or '.join(UNCERTAINTY_MEASURES)}")
        if method == "ensemble" and len(checkpoints) < 2:
            raise InputError(
                f"uncertainty is 'ensemble' of {len(checkpoints)} checkpoint(s): give several, --checkpoints "
                "\"['fold_0/model.pt','fold_1/model.pt']\", or --uncertainty tta"
            )
        if method == "dropout":
            logger.warning(
                "dropout tells how sure a network is that was trained with dropout (--network_def#dropout); of another "
                "it tells how sensitive it is"
            )
        fewest = 1 if len(checkpoints) > 1 else 2
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < fewest:
            raise InputError(f"samples is {samples!r}: give --samples {fewest} or more; one has nothing to differ from")
        self.method = method
        self.measure = measure
        drawn = {"tta": draw_views(samples, flip_axes, seed), "ensemble": [View()]}
        self.views = drawn.get(method, [View()] * samples)
        self.seed = seed
        self.ensemble = CheckpointEnsemble(checkpoints)
        self.predict = AutocastInferer(SimpleInferer(), dtype)

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Look at a volume.

        Args:
            inputs: [B, C, H, W, D].
            network: module that returns logits [B, K, H, W, D].
            args: more for the network.
            kwargs: more for the network.

        Returns:
            [B, 2, H, W, D], both from 0 to 1: the uncertainty, and the share of windows that see an organ there.
        """
        self.ensemble.start()
        with fast_cpu(network, inputs.device):
            if self.method != "dropout":
                return super().__call__(inputs, partial(self.look, network), *args, **kwargs)
            devices = [inputs.device] if inputs.device.type == "cuda" else []
            with torch.random.fork_rng(devices), dropout_on(network):
                torch.manual_seed(self.seed)
                return super().__call__(inputs, partial(self.look, network), *args, **kwargs)

    def look(self, network: Callable[..., Tensor], window: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Look at windows [B, C, H, W, D]; see :meth:`__call__`."""
        samples = (
            view.mirror(finite(self.predict(view.of(window), network, *args, **kwargs)).softmax(dim=1))
            for _ in self.ensemble.in_turn(network)
            for view in self.views
        )
        mean, unsure = uncertainty_of_samples(samples, self.measure)
        organs = mean.argmax(dim=1, keepdim=True) > 0
        return torch.cat([unsure, organs], dim=1)


def on_scan_grid(volume: Tensor, image: MetaTensor) -> Tensor:
    """Resample linearly from the grid that a scan was prepared on to its own; 0 where it was cropped away.

    Args:
        volume: [C, h, w, d] on the prepared grid.
        image: [1, h, w, d], the prepared scan, which knows both grids.

    Returns:
        [C, X, Y, Z] float32.

    Raises:
        InputError: the scan's axes are not at right angles.
    """
    grid = scan_grid(image[None])
    out = resample_linear(F.pad(volume, (1,) * 6), [position + 1 for position in grid.positions])
    return out.permute(0, *(axis + 1 for axis in grid.axes))


RANKING = ["rank", "case", "mean_uncertainty", "predicted_ml"]


class SaveUncertaintyd(SaveImageLabelsd):
    """Write `NAME_uncertainty.nii.gz`, float32 from 0 to 1 on the scan's own grid, and ranks the cases.

    `uncertainty.csv` has all cases so far, most unsure first: `rank`, `case`, `mean_uncertainty` over the
    voxels where most windows see an organ, and their volume `predicted_ml`. A case without any comes first, its mean
    empty: either it has no organs or they were missed. A case's numbers lie in `NAME_uncertainty.json`, with what
    they were made with, so that a case that is there already is ranked without being done again.

    Args:
        keys: key of the prediction [2, h, w, d] of :class:`UncertaintyInferer`.
        output_dir: folder of the results, created if need be.
        checkpoints: files of the weights.
        settings: all else that results depend on, by name.
        ranks: as of :class:`shared_networks.inference.save.SaveImageLabelsd`.
        labels_alone: settings by name that shape labels or ask for results of them, which are not written here.

    Raises:
        InputError: such a setting is on; or on call, if a file cannot be written or the scan's axes are not at right
            angles.
    """

    kind = "uncertainty"

    def __init__(
        self,
        keys: str = "pred",
        *,
        output_dir: str | Path,
        checkpoints: Sequence[str | Path] = (),
        settings: Mapping[str, Any] | None = None,
        ranks: Ranks | None = None,
        labels_alone: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (labels_alone or {}).items():
            if value is not None and value is not False and value != []:
                fix = "give --flip_axes" if name == "tta_flip_axes" else "leave the setting out"
                raise InputError(f"--{name} {value}: uncertainty.json writes no labels; {fix}")
        check_beginning(Path(output_dir) / "uncertainty.csv", ",".join(RANKING))
        super().__init__(
            keys, label_names=(), output_dir=output_dir, checkpoints=checkpoints, settings=settings, ranks=ranks
        )
        self.scores: dict[str, tuple[float, float]] = {}

    def targets(self, name: str) -> list[str]:
        """Return the name of the map of a scan."""
        return [f"{name}_uncertainty.nii.gz"]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Save and rank one decollated case of :class:`shared_networks.inference.predict.Scans`."""
        name, scan, image = data["name"], data["scan"], data["image"]
        prediction = convert_to_tensor(data[self.keys[0]], device="cpu", track_meta=False)
        organs = prediction[1] > 0.5
        count = int(organs.sum())
        mean = float(prediction[0][organs].mean()) if count else None
        ml = count * float(voxel_sizes(convert_to_numpy(image.affine)).prod()) / 1000

        # In steps of 1/256, which compress several times better and show no less.
        values = (on_scan_grid(prediction[:1], image)[0] * 256).round_().div_(256).numpy()
        like_scan = label_image(values, convert_to_numpy(scan.affine), source_file(scan), "uncertainty, 0 to 1")
        self.claim(name, source_file(scan))
        with atomic_write(self.output_dir / self.targets(name)[0]) as part:
            nib.save(like_scan, part)
        score = {"mean_uncertainty": mean, "predicted_ml": ml}
        whose = {"scan": source_file(scan), "files": self.targets(name), "made_with": self.made_with(data["stamp"])}
        write_json(self.file(name), {**score, **whose})
        self.rank(name, score)
        return dict(data)

    def rank(self, name: str, score: Mapping[str, Any]) -> None:
        """Add a case to the table."""
        mean = score["mean_uncertainty"]
        with self.table:
            self.scores[name] = (math.inf if mean is None else mean), score["predicted_ml"]
            if self.ranks.size == 1:
                write_csv(self.output_dir / "uncertainty.csv", ranking_rows(self.scores))

    def finish(self, scans: Scans) -> None:
        """Rank the cases of all processes, in the first; without any case, no earlier ranking is left."""
        if found := self.ranks.gather("scores", self.scores):
            scores = {name: (mean, ml) for part in found for name, (mean, ml) in part.items()}
            write_csv(self.output_dir / "uncertainty.csv", ranking_rows(scores))

    def is_done(self, name: str, stamp: str) -> bool:
        """Return whether a map exists of this scan, these weights and settings; if so, rank the case."""
        content = read_note(self.file(name))
        done = content.get("made_with") == self.made_with(stamp)
        if done := done and (self.output_dir / self.targets(name)[0]).is_file():
            self.rank(name, content)
        return done


def ranking_rows(scores: Mapping[str, tuple[float, float]]) -> list[list[Any]]:
    """Lay out the rows of `uncertainty.csv`.

    Args:
        scores: by case, the mean uncertainty, infinite where no organ was predicted, and the predicted volume in ml.
    """
    ranked = sorted(scores.items(), key=lambda item: (-item[1][0], item[0]))
    rows: list[list[Any]] = [RANKING]
    for rank, (case, (mean, ml)) in enumerate(ranked, start=1):
        rows.append([rank, case, "" if math.isinf(mean) else f"{mean:.4f}", f"{ml:.1f}"])
    return rows
