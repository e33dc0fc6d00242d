"""Write the report of an evaluation."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite import distributed as idist
from ignite.engine import Engine
from monai.handlers import MetricsSaver
from monai.utils import ImageMetaKey, string_list_all_gather

from shared_networks.datasets.pairs import named_case
from shared_networks.datasets.record import model_facts
from shared_networks.errors import InputError
from shared_networks.evaluation.metrics import MEASURES, tolerances_of
from shared_networks.evaluation.tables import (
    COLUMNS,
    dice_rows,
    extremes,
    format_organ_table,
    format_overall,
    measure_rows,
    summary,
)
from shared_networks.figures.boxplot import dice_boxplot
from shared_networks.figures.reliability import reliability_diagram
from shared_networks.files import atomic_write, check_tables, write_csv, write_json

RECORD = "metrics.json"
FILES = (
    *("dice.csv", "metrics.csv", "dice_boxplot.png", "reliability.png"),
    *(f"evaluation_{rank}.png" for rank in ("best", "median", "worst")),
)
"""What a report has beside its record."""


class EvaluationReport(MetricsSaver):
    """Ignite handler that writes the report of an evaluation when it ends, and prints its table.

    In `output_dir`:

    - `dice.csv`: a row a case, a column an organ, and means;
    - `metrics.csv`: a row for every case and organ, with all of
      :data:`shared_networks.evaluation.tables.COLUMNS` and `presence` (`found`, `missed`, `false positive`,
      `absent`);
    - `metrics.json`: settings, models and what trained them, and by organ and overall mean, median, standard
      deviation and bootstrap interval;
    - `dice_boxplot.png`;
    - `reliability.png`, if calibration is reported;
    - `evaluation_best.png`, `evaluation_median.png`, `evaluation_worst.png`: copies of the `{case}_evaluation.png`
      that :class:`shared_networks.figures.overlay.SaveOverlayd` has left there.

    Calibration is reported where a :class:`shared_networks.evaluation.calibration.CalibrationError` comes before.

    A cell is empty where there is no value, see :func:`shared_networks.evaluation.metrics.organ_measures`. A case
    that a distributed sampler repeats to give all ranks as many is counted once. Rank 0 writes. A report replaces an
    earlier one, but no files of these names without a `metrics.json` of such a report.

    Args:
        label_names: names in order of label value, background first: `["background", "spleen", ...]`.
        output_dir: folder of the report, created if need be.
        nsd_tolerance: of the metric, for the record.
        seed: of the bootstrap.
        checkpoints: files of the weights, for the record: see :func:`shared_networks.datasets.record.model_facts`.
        settings: all else that the scores depend on, by name, for the record.
        metric: name under which a :class:`shared_networks.evaluation.metrics.OrganMetric` is attached to the evaluator.
        image_key: item of the batch whose metadata name the case.

    Raises:
        InputError: for a wrong tolerance; on start, if the folder cannot be made or a file of someone else would be
            replaced; on completion, if a file cannot be written.
        ValueError: on completion, if the evaluator has no such metric or it is not of these organs.

    Example:
        >>> EvaluationReport(["background", "liver"], "eval").attach(evaluator)  # doctest: +SKIP
    """

    def __init__(
        self,
        label_names: Sequence[str],
        output_dir: str | Path,
        nsd_tolerance: float | Mapping[str, float] = 2.0,
        seed: int = 0,
        checkpoints: Sequence[str | Path] = (),
        settings: Mapping[str, Any] | None = None,
        metric: str = "val_mean_dice",
        image_key: str = "image",
    ) -> None:
        super().__init__(
            save_dir=str(output_dir),
            metrics=None,
            metric_details=metric,
            batch_transform=lambda batch: [
                {ImageMetaKey.FILENAME_OR_OBJ: named_case(item, image_key)} for item in batch
            ],
        )
        self.organs = list(label_names)[1:]
        self.folder = Path(output_dir)
        self.tolerances = tolerances_of(self.organs, nsd_tolerance)
        self.seed = seed
        self.checkpoints = list(checkpoints)
        self.settings = dict(settings or {})
        self.made_with: dict[str, Any] = {}
        self.metric = metric

    def _started(self, engine: Engine) -> None:
        super()._started(engine)
        check_tables(self.folder / RECORD, ("organs", "overall"), FILES)
        self.made_with = {"models": [model_facts(file) for file in self.checkpoints], "settings": self.settings}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # now, not after hours of inference
        except OSError as error:
            raise InputError(
                f"{self.folder}: no folder can be made there ({error.strerror}); give another --output_dir"
            ) from error

    def __call__(self, engine: Engine) -> None:
        """Write and print the report.

        Args:
            engine: the evaluator, at the end of its epoch.
        """
        cases = self._filenames
        if idist.get_world_size() > 1:
            cases = string_list_all_gather(cases)
        if idist.get_rank() != self.save_rank:
            return
        details: dict[str, torch.Tensor] = getattr(engine.state, "metric_details", {})
        if self.metric not in details:
            raise ValueError(f"the evaluator has no metric '{self.metric}', it has {sorted(details)}.")
        measures = details[self.metric].cpu()
        ece = details["ece"].cpu() if "ece" in details else torch.full(measures.shape[:2], torch.nan)
        if measures.shape[1:] != (len(self.organs), len(MEASURES)):
            raise ValueError(
                f"metric '{self.metric}' holds {list(measures.shape[1:])} numbers a case, not {len(self.organs)} "
                f"organs by {len(MEASURES)} measures: attach an OrganMetric with the same label_names."
            )
        rows = dict(zip(cases, range(len(measures)), strict=True))
        cases = sorted(rows)
        once = [rows[case] for case in cases]
        bins = details["ece_bins"].cpu()[once] if "ece_bins" in details else None
        self._write(cases, torch.cat([measures, ece[..., None]], dim=-1)[once], bins)

    def _write(self, cases: list[str], measures: torch.Tensor, bins: torch.Tensor | None) -> None:
        dice = measures[..., COLUMNS.index("dice")]
        content = {
            **summary(cases, self.organs, measures, {"nsd_tolerance_mm": self.tolerances}, self.seed),
            "made_with": self.made_with,
        }
        write_json(self.folder / RECORD, content)
        for name in FILES:  # what is not made now would be of an earlier evaluation
            (self.folder / name).unlink(missing_ok=True)
        write_csv(self.folder / "dice.csv", dice_rows(cases, self.organs, dice))
        write_csv(self.folder / "metrics.csv", measure_rows(cases, self.organs, measures))
        with atomic_write(self.folder / "dice_boxplot.png") as path:
            dice_boxplot(self.organs, dice.numpy(), content["overall"]["dice"]).savefig(path)
        if bins is not None:
            with atomic_write(self.folder / "reliability.png") as path:
                reliability_diagram(self.organs, bins.sum(dim=0).numpy()).savefig(path)
        for rank, case in extremes(cases, dice).items():
            if (picture := self.folder / f"{case}_evaluation.png").is_file():
                with atomic_write(self.folder / f"evaluation_{rank}.png") as path:
                    shutil.copyfile(picture, path)
        print(format_organ_table(self.organs, measures), format_overall(content), sep="\n", flush=True)
