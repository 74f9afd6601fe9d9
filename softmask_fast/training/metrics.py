"""The metrics of a run: metrics.jsonl, the loggers and the progress bar."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from softmask_fast.training.loggers import Reports, held_out_tag, tag
from softmask_fast.utils import append_line, write_text

logger = logging.getLogger(__name__)


def drop_lines_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the records of later steps from a log of JSON objects with "step", and return the others.

    A resumed run repeats the steps after its checkpoint; this way each step appears once. An incomplete last line is
    dropped silently; damaged lines, which a power failure may leave, with a warning.
    """
    text = path.read_text("utf-8", errors="replace") if path.exists() else ""
    lines = text.split("\n")  # splitlines would also split at Unicode's other line breaks
    records = [_record(line) for line in lines[:-1]]
    if damaged := [number for number, record in enumerate(records, 1) if record is None]:
        logger.warning("%s: dropped %d damaged lines, the first is line %d", path, len(damaged), damaged[0])
    kept = [place for place, record in enumerate(records) if record is not None and record["step"] <= step]
    if len(kept) < len(records) or lines[-1]:
        write_text(path, "".join(lines[place] + "\n" for place in kept))
    return [records[place] for place in kept]


def _record(line: str) -> dict[str, Any] | None:
    """The object in a line, or None for anything else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


class MetricsLog:
    """Writes metrics on rank 0: as JSON lines to metrics.jsonl, to the loggers, and to the progress bar.

    Keys of a line (means over all ranks, of the last micro step of the last step, unless stated otherwise):

    - `step`: optimizer steps done; `epoch`: passes over the data so far
    - `loss`: the weighted sum of `itc`, `itm` and `mlm` (pretraining), in nats
    - `itc_image_accuracy`, `itc_text_accuracy`, `itm_accuracy`, `mlm_accuracy`, `accuracy`: fractions in [0, 1]
    - `itm_true_pair`, `itm_other_image`, `itm_other_text` or `itm_soft_masked_other_text`, `itm_soft_masked`: the
      matching loss of one kind of pair, and `..._accuracy` for each; absent if a rank's batch had no such pair
    - `soft_mask_mean`: mean strength of the soft mask, 0 (keeps all) to 1; `temperature`: of the contrast
    - `learning_rate`; `alpha`: weight of the teacher's soft targets
    - `data_wait`: fraction of the time since the last line that was spent waiting for data
    - `peak_memory_gib`: peak so far in 2^30 bytes, of the allocator on a GPU, else of the process
    - `bad_samples`: samples skipped so far on all ranks; `truncated_captions`: captions cut so far on rank 0
    - `pairs_per_second`: of all ranks, since the last line
    - `flops_utilisation`: operations per second since the last line, as a fraction of those of a large matrix product
    """

    def __init__(
        self, directory: Path, first_step: int, steps: int, pairs_per_step: int, matmul_rate: float, reports: Reports
    ) -> None:
        """Open the run's log.

        Args:
            directory: the run's folder.
            first_step: steps done so far; lines of later ones are dropped.
            steps: of the whole run.
            pairs_per_step: of all ranks.
            matmul_rate: operations per second at 100 % utilization.
            reports: where the metrics go as well.
        """
        self.path, self.reports = directory / "metrics.jsonl", reports
        drop_lines_after(self.path, first_step)
        interval = 0.2 if sys.stderr.isatty() else 20.0  # seconds
        self.bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True, mininterval=interval)
        self.redirected = ExitStack()  # prints log messages above the bar
        self.redirected.enter_context(logging_redirect_tqdm())
        self.pairs_per_step, self.matmul_rate = pairs_per_step, matmul_rate
        self.since, self.since_step = time.monotonic(), first_step

    def write(self, step: int, metrics: dict[str, float], operations: int) -> None:
        """Log the metrics of a step. `operations` is its number of operations on one device."""
        now = time.monotonic()
        per_second = (step - self.since_step) / (now - self.since)
        metrics = {name: value for name, value in metrics.items() if not math.isnan(value)} | {
            "pairs_per_second": self.pairs_per_step * per_second,
            "flops_utilisation": operations * per_second / self.matmul_rate,
        }
        self.since, self.since_step = now, step
        append_line(self.path, json.dumps({"step": step, **{k: float(f"{v:.8g}") for k, v in metrics.items()}}))
        self.reports.scalars(step, {tag(name): value for name, value in metrics.items()})
        shown = {name: f"{metrics[name]:.3f}" for name in ("loss", "itc", "itm", "mlm") if name in metrics}
        meters = {
            "pairs/s": f"{metrics['pairs_per_second']:.0f}",
            "flops": f"{metrics['flops_utilisation']:.0%}",
            "GiB": f"{metrics['peak_memory_gib']:.1f}",
            "wait": f"{metrics['data_wait']:.0%}",
        }
        self.bar.set_postfix(shown | meters, refresh=False)

    def write_held_out(self, step: int, metrics: dict[str, float], page: Path | None, seconds: float) -> None:
        """Report metrics of held-out data and a page of heat maps.

        Args:
            step: optimizer steps done.
            metrics: by their names.
            page: the picture; None if none was drawn.
            seconds: how long the evaluation took, which does not count as training.
        """
        self.since += seconds
        self.reports.scalars(step, {held_out_tag(name): value for name, value in metrics.items()})
        if page is not None:
            self.reports.image(step, "eval/heatmaps", page)

    def close(self) -> None:
        """Close the progress bar and the loggers."""
        self.bar.close()
        self.redirected.close()
        self.reports.close()
