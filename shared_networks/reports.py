"""The table of an evaluation: Dice for every case and every organ, written as CSV and printed."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from ignite import distributed as idist
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.handlers import MetricsSaver
from monai.utils import ImageMetaKey, string_list_all_gather

from shared_networks.data.datalist import case_name


def source_file(image: MetaTensor) -> str:
    """Return the file that an image was loaded from.

    Raises:
        ValueError: if the image does not know.
    """
    meta = getattr(image, "meta", {})
    if not meta.get(ImageMetaKey.FILENAME_OR_OBJ):
        raise ValueError(
            f"the image's metadata (keys {sorted(meta)}) have no '{ImageMetaKey.FILENAME_OR_OBJ}' to name its case "
            "after: load it with LoadImaged and keep it a MetaTensor."
        )
    return str(meta[ImageMetaKey.FILENAME_OR_OBJ])


def dice_table(dice: torch.Tensor) -> torch.Tensor:
    """Border a Dice matrix with its means, leaving out absent organs.

    The last column is each case's mean over its organs, the last row the mean of every column over the cases that have
    a value there; so the corner equals the mean Dice of ``monai.handlers.MeanDice``.

    Args:
        dice: ``[cases, organs]``, NaN where a case's truth has no such organ.

    Returns:
        ``[cases + 1, organs + 1]``, NaN where there is nothing to average.
    """
    with_mean_column = torch.cat([dice, dice.nanmean(dim=1, keepdim=True)], dim=1)
    return torch.cat([with_mean_column, with_mean_column.nanmean(dim=0, keepdim=True)], dim=0)


def format_organ_table(organs: Sequence[str], dice: torch.Tensor) -> str:
    """Lay out one line per organ: its name, its mean Dice over cases and the number of cases that have it.

    Args:
        organs: one name for every column of ``dice``.
        dice: ``[cases, organs]``, NaN where a case's truth has no such organ.
    """
    width = max(map(len, ("organ", "mean", *organs)))
    means = dice_table(dice)[-1].tolist()
    counts = [*(~dice.isnan()).sum(dim=0).tolist(), len(dice)]
    rule = "-" * (width + 16)
    lines = [
        f"{name:<{width}}  {'-' if mean != mean else format(mean, '.4f'):>6}  {count:>6}"
        for name, mean, count in zip((*organs, "mean"), means, counts, strict=True)
    ]
    return "\n".join([f"{'organ':<{width}}  {'Dice':>6}  {'cases':>6}", rule, *lines[:-1], rule, lines[-1]])


class DiceReport(MetricsSaver):
    """Ignite handler that writes ``dice.csv`` and prints a table per organ when an evaluation ends.

    The rows of ``dice.csv`` are the cases by name, then ``mean``; its columns are ``case``, the organs and ``mean``. A
    cell is empty where the organ is absent from the case's truth. A case that a distributed sampler repeats to give
    all ranks as many is counted once. Rank 0 writes.

    Args:
        label_names: names in order of label value, background first: ``["background", "spleen", ...]``.
        output_dir: folder of ``dice.csv``, created if need be.
        metric: name under which ``monai.handlers.MeanDice(include_background=False)`` is attached to the evaluator.
        image_key: item of the batch whose metadata name the case.

    Raises:
        ValueError: on completion, if the evaluator has no such metric or the metric's columns are not one per organ.

    Example:
        >>> DiceReport(["background", "liver"], "eval").attach(evaluator)  # doctest: +SKIP
    """

    def __init__(
        self,
        label_names: Sequence[str],
        output_dir: str | Path,
        metric: str = "val_mean_dice",
        image_key: str = "image",
    ) -> None:
        super().__init__(
            save_dir=str(output_dir),
            metrics=None,
            metric_details=metric,
            batch_transform=lambda batch: [
                {ImageMetaKey.FILENAME_OR_OBJ: source_file(item[image_key])} for item in batch
            ],
        )
        self.organs = list(label_names)[1:]
        self.metric = metric

    def __call__(self, engine: Engine) -> None:
        """Write and print the report.

        Args:
            engine: the evaluator, at the end of its epoch.
        """
        files = self._filenames
        if idist.get_world_size() > 1:
            files = string_list_all_gather(files)
        if idist.get_rank() != self.save_rank:
            return
        details: dict[str, torch.Tensor] = getattr(engine.state, "metric_details", {})
        if self.metric not in details:
            raise ValueError(f"the evaluator has no metric '{self.metric}', it has {sorted(details)}.")
        dice = details[self.metric].cpu()
        if dice.shape[1] != len(self.organs):
            raise ValueError(
                f"metric '{self.metric}' has {dice.shape[1]} columns but label_names has {len(self.organs)} organs "
                "after the background: list one name per label value and attach MeanDice with include_background=False."
            )
        rows = dict(zip(files, dice, strict=True))
        files = sorted(rows, key=case_name)
        dice = torch.stack([rows[file] for file in files])
        self._write([*map(case_name, files), "mean"], dice_table(dice))
        print(format_organ_table(self.organs, dice), flush=True)

    def _write(self, names: Sequence[str], table: torch.Tensor) -> None:
        folder = Path(self.save_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "dice.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["case", *self.organs, "mean"])
            for name, row in zip(names, table.tolist(), strict=True):
                writer.writerow([name, *("" if value != value else f"{value:.4f}" for value in row)])
