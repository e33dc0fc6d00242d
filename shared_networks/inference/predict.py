"""Have a folder of scans segmented, or read otherwise, one by one; a scan that fails costs itself alone.

What is wrong with a scan costs that scan alone; it is listed at the end.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor, list_data_collate
from monai.inferers import Inferer
from monai.transforms import Compose, LoadImaged
from monai.utils import CommonKeys, ImageMetaKey, MetaKeys, SpaceKeys
from torch.utils.data import IterableDataset
from tqdm import tqdm

from shared_networks.datasets.memory import free_memory
from shared_networks.datasets.pairs import Image, case_name
from shared_networks.datasets.scans import BadScanError, Scan, Source, file_source, read_grid, read_scan
from shared_networks.datasets.validate import channel_problem
from shared_networks.errors import FailedScansError, InputError, in_one_line, input_error_in, root_cause
from shared_networks.files import files_state, is_unwritable
from shared_networks.inference.ranks import Ranks
from shared_networks.inference.sliding_window import Labels, SlidingWindowLabels, scan_grid

Item = dict[str, Any]
"""A prepared scan, see :class:`Scans`."""

_TORCH_TYPES = ("int8", "uint8", "int16", "int32", "float32")

logger = logging.getLogger(__name__)


def output_names(sources: Sequence[Source]) -> dict[str, str]:
    """Name for the results by case, no two alike, also where small and capital letters are the same.

    A name is the last part of the case's id; all parts where several cases share that, or where the results would be
    named as another scan; and with a digest of the id where these are the same too.
    """
    cases = [source.case for source in sources]
    forms = [
        {case: case.rpartition("/")[2] for case in cases},
        {case: case.replace("/", "_") for case in cases},
        {case: f"{case.replace('/', '_')}_{hashlib.sha256(case.encode()).hexdigest()[:8]}" for case in cases},
    ]
    counts = [Counter(name.casefold() for name in form.values()) for form in forms]
    scans = {case_name(file).casefold() for source in sources for file in source.files}
    names = {}
    for case in cases:
        for form, count in zip(forms, counts, strict=True):
            name = form[case].casefold()
            if count[name] == 1 and not any(f"{name}_{result}" in scans for result in ("seg", "uncertainty")):
                break
        names[case] = form[case]
    return names


def scan_stamp(source: Source) -> str:
    """Return a text that changes with a scan: its files' number, and a digest of their names, sizes and times."""
    return f"{source.files[0]}: {len(source.files)} file(s), state {files_state(source.files)}"


def scan_size(source: Source) -> int:
    """Return the bytes of a scan's files; 0 where they cannot be found, which is said when they are read."""
    try:
        return sum(os.stat(file).st_size for file in source.files)
    except OSError:
        return 0


def memory_estimate(shape: Sequence[int], spacing: Sequence[float], target: Sequence[float], classes: int) -> int:
    """Estimate the bytes that segmenting a scan takes, without the network (see tests/benchmarks/inference.py).

    Args:
        shape: (X, Y, Z) of the scan.
        spacing: its voxel size in mm.
        target: voxel size in mm that it is prepared to.
        classes: background included.
    """
    prepared = [n * old / new for n, old, new in zip(shape, spacing, target, strict=True)]
    slab = math.prod(prepared) / max(*prepared, 1) * min(max(prepared), 96)
    return int(math.prod(shape) * 6 + math.prod(prepared) * 16 + slab * 4 * (classes + 1) + 6e8)


def scan_tensor(scan: Scan, file: str) -> MetaTensor:
    """Make of a scan what `LoadImaged` and `EnsureChannelFirstd` would, [C, X, Y, Z], in its own number type."""
    image = scan.image.astype(scan.image.dtype.newbyteorder("="), copy=False)
    image = image if image.dtype.name in _TORCH_TYPES else image.astype(np.float32)
    affine = torch.as_tensor(scan.affine, dtype=torch.float64)
    meta = {
        MetaKeys.ORIGINAL_AFFINE: scan.affine.astype(float),
        MetaKeys.SPATIAL_SHAPE: np.array(image.shape[1:]),
        MetaKeys.SPACE: SpaceKeys.RAS,
        MetaKeys.ORIGINAL_CHANNEL_DIM: 0,
        ImageMetaKey.FILENAME_OR_OBJ: file,
    }
    return MetaTensor(torch.from_numpy(image), affine=affine, meta=meta)


def one_case(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make a batch of a single case, as `monai.data.list_data_collate` does, but without copying its volumes."""
    (item,) = items
    tensors = {name: value for name, value in item.items() if isinstance(value, MetaTensor)}
    # Only metadata are collated. Their number of axes is the volume's: MONAI notes it and inverts by it.
    stand_ins = {n: MetaTensor(torch.zeros([1] * t.ndim)).copy_meta_from(t) for n, t in tensors.items()}
    batch = list_data_collate([{**item, **stand_ins}])
    for name, tensor in tensors.items():
        batch[name] = MetaTensor(tensor.as_tensor()[None]).copy_meta_from(batch[name])
        batch[name].is_batch = True
    return batch


class Totals(NamedTuple):
    """What was done to the scans of a run: when it began, how many, and why not the others, by file."""

    started: datetime
    done: int
    skipped: int
    failed: dict[str, str]
    passed_over: dict[str, str]


class Scans(IterableDataset):
    """The scans of a folder, prepared one by one; what cannot be segmented is passed over and noted.

    Each item has `image`, prepared; `scan`, [C, X, Y, Z] as on file; `name`, of the results; and `stamp`.

    In :meth:`run` the next scan is read and prepared, and the results of the last one are saved, while the network
    works: each in one thread, and the next scan only where the memory has room for both.

    Args:
        data: of :func:`find_scans`, or NIfTI files.
        transform: the preprocessing. A `LoadImaged` at its start is passed over: scans are read, checked to the last
            voxel and held in their own number type by :func:`shared_networks.datasets.scans.read_scan`.
        spacing: voxel size in mm that it prepares, for estimates of memory.
        classes: number of labels, background included, for the same.
        skip: whether results of a name and stamp are there already.
        check: refuses to write results of a name and source over other files, given the files of all scans.
        modality: `CT`, whose values must be Hounsfield units, or `MR`; `None` accepts either.
        in_channels: files that the network takes of each scan.
        ranks: the processes that share the scans; by default this one has them all.
        verb: what is done to a scan, for the report.
        more: finds what else the preprocessing needs of a source and its scan.
        stamp: a text that changes with all that is read of a source.
    """

    def __init__(
        self,
        data: Sequence[Source | Image],
        transform: Compose,
        spacing: Sequence[float],
        classes: int,
        skip: Callable[[str, str], bool] | None = None,
        check: Callable[[str, Source, Collection[str]], None] | None = None,
        modality: str | None = "CT",
        in_channels: int | None = None,
        ranks: Ranks | None = None,
        verb: str = "segmented",
        more: Callable[[Source, Scan], Mapping[str, Any]] | None = None,
        stamp: Callable[[Source], str] = scan_stamp,
    ) -> None:
        self.passed_over: dict[str, str] = getattr(data, "passed_over", {})
        self.data = [scan if isinstance(scan, Source) else file_source(scan) for scan in data]
        self.names = output_names(self.data)
        self.transform = transform
        self.spacing = spacing
        self.classes = classes
        self.skip = skip
        self.check = check
        self.inputs = {file for source in self.data for file in source.files}
        self.modality = modality
        self.in_channels = in_channels
        self.ranks = ranks or Ranks()
        self.verb = verb
        self.more = more
        self.stamp = stamp
        self.reader: ThreadPoolExecutor | None = None
        self.writer: ThreadPoolExecutor | None = None
        self.start()

    def start(self) -> None:
        """Begin with the first scan again."""
        self.failed: dict[str, str] = {}
        self.skipped: list[str] = []
        self.done: list[str] = []
        self.taken = 0
        self.order: Iterator[int] | None = None
        self.upcoming: Source | None = None
        self.current: Source | None = None
        self.ahead: Future[Item | str | None] | None = None
        self.saving: tuple[Source, Future[Any]] | None = None
        self.gathered: Totals | Literal["not yet"] | None = "not yet"
        self.started = datetime.now(timezone.utc)

    def run(self, evaluator: Any) -> None:
        """Have all scans segmented; one that fails, wherever that is, costs itself alone.

        Args:
            evaluator: MONAI evaluator over a loader of these scans.

        Raises:
            InputError: results cannot be written.
        """
        self.start()
        with ThreadPoolExecutor(1, "reading") as self.reader, ThreadPoolExecutor(1, "saving") as self.writer:
            try:
                while self.has_more():
                    self.run_until_failure(evaluator)
                self.finish_saving()
            finally:
                self.reader = self.writer = None

    def run_until_failure(self, evaluator: Any) -> None:
        """Have the scans that are left segmented, or those up to the next that fails."""
        at = self.taken
        try:
            evaluator.run()
            if self.taken == at:
                evaluator.run()  # ignite's engine first ends the run that failed
        except Exception as error:
            if self.current is None or is_unwritable(error):
                raise
            self.failed[self.current.files[0]] = reason_of(error)
            self.current = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # the next scan may fit
        if self.taken == at:
            raise RuntimeError(f"the evaluator asks for no scan after {at} of {len(self.data)}")

    def has_more(self) -> bool:
        """Return whether a scan is left for this process, which is then the upcoming one."""
        if self.order is None:
            self.order = self.ranks.deal([scan_size(source) if self.ranks.size > 1 else 0 for source in self.data])
            self.advance()
        return self.upcoming is not None

    def advance(self) -> None:
        """Go on to the next scan of this process."""
        index = None if self.order is None else next(self.order, None)
        self.upcoming = None if index is None else self.data[index]

    def __iter__(self) -> Iterator[Item]:
        """Yield what is left to be segmented, in order, with a progress bar over all cases."""
        if not self.has_more():
            self.start()
        bar = tqdm(self.data, "scans", unit="case", disable=None, initial=self.taken)
        while self.has_more():
            source: Any = self.upcoming
            item = self.take(source)
            self.taken += 1
            self.advance()
            bar.update()
            if isinstance(item, str):
                self.failed[source.files[0]] = item
            elif item is None:
                self.skipped.append(source.case)
            else:
                self.current = source
                self.read_ahead()
                yield item
                self.current = None
                if self.saving is None or self.saving[0] is not source:
                    self.done.append(source.case)

    def take(self, source: Source) -> Item | str | None:
        """Return the next scan's item, if possible the one that was read ahead; see :meth:`read`."""
        ahead, self.ahead = self.ahead, None
        if ahead is not None:
            with suppress(MemoryError):  # alone it may fit
                return ahead.result()
        self.finish_saving()
        return self.read(source)

    def read_ahead(self) -> None:
        """Begin to read the next scan, if it fits into the memory beside the current one."""
        source, free = self.upcoming, free_memory()
        if self.reader is None or source is None or self.current is None:
            return
        needed = [self.memory_needed(scan) for scan in (self.current, source)]
        if free is None or (None not in needed and sum(filter(None, needed)) < free):
            self.ahead = self.reader.submit(self.read, source, alone=False)

    def read(self, source: Source, alone: bool = True) -> Item | str | None:
        """Read and prepare a scan.

        Args:
            source: the scan.
            alone: whether no other scan is in memory, so that one that does not fit never will.

        Returns:
            Its item, the reason why it is of no use, or None if its results exist.

        Raises:
            MemoryError: it does not fit beside another one.
        """
        try:
            stamp, name = self.stamp(source), self.names[source.case]
            if self.skip is not None and self.skip(name, stamp):
                return None
            if self.check is not None:
                self.check(name, source, self.inputs)
            if alone:
                self.check_memory(source)
            item = self.prepare(source)
            item["image"].meta["name"] = name
            return {**item, "name": name, "stamp": stamp}
        except (BadScanError, InputError) as error:
            return str(error)
        except FileNotFoundError as error:
            return f"no such file, or a broken link: {error.filename}"
        except Exception as error:  # one odd scan must not end the run
            if isinstance(root_cause(error), MemoryError) and not alone:
                raise root_cause(error) from None
            return reason_of(error)

    def save(self, transform: Callable[[Any], Any], data: Any) -> Any:
        """Have the results of the current scan saved, in a thread of its own while scans are :meth:`run`.

        Args:
            transform: that saves them; it is called in the order of the scans, one call at a time.
            data: of the scan.

        Returns:
            `data`, unchanged.

        Raises:
            InputError: results cannot be written, of this scan or the last.
        """
        if self.writer is None or self.current is None:
            return transform(data)
        self.finish_saving()
        self.saving = self.current, self.writer.submit(transform, data)
        return data

    def finish_saving(self) -> None:
        """Wait until the last results are saved, and note whether they are.

        Raises:
            InputError: no results can be written, so those after it could not be either.
        """
        if self.saving is None:
            return
        (source, saving), self.saving = self.saving, None
        try:
            saving.result()
        except Exception as error:
            if is_unwritable(error):
                raise
            self.failed[source.files[0]] = reason_of(error)
        else:
            self.done.append(source.case)

    def memory_needed(self, source: Source) -> int | None:
        """Estimate the bytes that a scan takes; None if its header does not say."""
        try:
            grid = read_grid(source)
        except Exception:  # what is wrong with it is said when it is read
            return None
        return None if grid is None else memory_estimate(*grid, self.spacing, self.classes)

    def check_memory(self, source: Source) -> None:
        """Refuse a scan that is too large for the memory.

        Raises:
            BadScanError: it is.
        """
        if (grid := read_grid(source)) is None or (free := free_memory()) is None:
            return
        needed = memory_estimate(*grid, self.spacing, self.classes)
        size = " x ".join(map(str, grid[0]))
        if needed > free:
            raise BadScanError(
                f"{size} voxels need about {needed / 1e9:.1f} GB beside the network, {free / 1e9:.1f} GB are free; "
                "close other programs, or crop the scan"
            )
        if needed > 0.5 * free:
            logger.warning("%s: %s voxels, about %.1f GB beside the network", source.case, size, needed / 1e9)

    def prepare(self, source: Source) -> dict[str, Any]:
        """Read, check and prepare a scan.

        Raises:
            BadScanError: it is of no use.
            InputError: its axes are not at right angles.
        """
        if not source.problem and self.in_channels is not None and source.channels != self.in_channels:
            raise BadScanError(channel_problem(source.channels, self.in_channels, source.files))
        read = read_scan(source, self.modality)
        more = self.more(source, read) if self.more is not None else {}
        scan = scan_tensor(read, source.files[0])
        start = 1 if isinstance(self.transform.transforms[0], LoadImaged) else 0
        item: Any = self.transform({**more, "image": MetaTensor(scan), "scan": scan}, start=start)
        if not min(item["image"].shape) or not (item["image"] > 0).any():
            raise BadScanError("no voxel is above the floor of the intensity window; is it a CT in HU, or an MR?")
        scan_grid(item["image"][None])
        return item

    def totals(self) -> Totals | None:
        """Return what all processes have done, in the first; `None` in the others, which must all ask once."""
        if self.gathered == "not yet":
            found = self.ranks.gather("report", [len(self.done), len(self.skipped), self.failed])
            self.gathered = self.sum_up(found) if found else None
        return self.gathered

    def sum_up(self, found: Sequence[tuple[int, int, dict[str, str]]]) -> Totals:
        """Add up numbers of scans done and skipped, and the reasons by file, of each process."""
        done, skipped = (sum(counts) for counts in list(zip(*found, strict=True))[:2])
        reasons = {file: reason for _, _, failed in found for file, reason in failed.items()}
        files = [source.files[0] for source in self.data]
        failed = {file: reasons[file] for file in files if file in reasons}
        return Totals(self.started, done, skipped, failed, self.passed_over)

    def report(self) -> None:
        """Say what was done, of all processes in the first.

        Raises:
            FailedScansError: a line for each scan that could not be segmented.
        """
        if (totals := self.totals()) is None:
            return
        _, done, skipped, failed, passed_over = totals
        for path, reason in passed_over.items():
            logger.warning("%s: passed over: %s", path, reason)
        print(
            f"{done} {self.verb}, {skipped} there already, {len(failed)} failed, {len(passed_over)} passed over",
            flush=True,
        )
        if failed:
            lines = [f"{file}: {reason}" for file, reason in failed.items()]
            summary = f"{len(lines)} of {len(self.data)} scan(s) not {self.verb}:"
            raise FailedScansError("\n".join([summary, *lines]), failed)


def reason_of(error: BaseException) -> str:
    """Return why a scan failed, in one line; what is unforeseen goes into the log with its traceback."""
    found = input_error_in(error)
    if found is not None:
        return str(found)
    cause = root_cause(error)
    if isinstance(cause, MemoryError | torch.OutOfMemoryError):
        return "not enough memory for it; close other programs, or crop the scan"
    if not isinstance(cause, OSError | RuntimeError | ValueError):
        logger.warning("unforeseen error", exc_info=error)
    return f"failed ({in_one_line(cause)}); report this if other programs read the scan, else export it again"


class LabelLater(Inferer):
    """Return from a scan once the network has seen it, while the last labels are made.

    What it returns only stands for the labels; :class:`SaveInBackground` waits for them.

    Args:
        inferer: :class:`shared_networks.inference.sliding_window.SlidingWindowLabels`, or another one, which is called
            as usual.
    """

    def __init__(self, inferer: Inferer) -> None:
        super().__init__()
        self.inferer = inferer
        self.labels: Future[Labels] | None = None

    def __call__(self, inputs: Any, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Begin to label a scan."""
        if not isinstance(self.inferer, SlidingWindowLabels) or getattr(network, "training", False):
            return self.inferer(inputs, network, *args, **kwargs)
        self.labels = self.inferer.begin(inputs, network, *args, **kwargs)
        return inputs[..., :1, :1, :1]


class SaveInBackground:
    """Hand results over to :meth:`Scans.save`, so that the network goes on meanwhile.

    Args:
        transform: that cleans up and saves the results of a scan.
        scans: whose results these are.
        inferer: that the evaluator calls.
    """

    def __init__(self, transform: Callable[[Any], Any], scans: Scans, inferer: LabelLater) -> None:
        self.transform, self.scans, self.inferer = transform, scans, inferer

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Save one decollated case, now or while the next is segmented.

        Raises:
            InputError: results cannot be written, of this scan or the last.
        """
        labels, self.inferer.labels = self.inferer.labels, None
        source = self.scans.current

        def save(case: Mapping[Hashable, Any]) -> Any:
            if labels is None:
                return self.transform({**case, "source": source})
            found = labels.result()
            results = {
                CommonKeys.PRED: found.labels[0],
                "organ_probability": found.organ_probability,
                "label_probability": found.label_probability,
            }
            return self.transform({**case, **results, "source": source})

        return dict(self.scans.save(save, data))
