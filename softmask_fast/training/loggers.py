"""Where a run's metrics go besides metrics.jsonl (`--report_to`): TensorBoard, Weights & Biases, MLflow.

A logger is opened with the run's folder, the number of steps done, the options and, if the run was reported before, its
id there. It has the methods of `Reports`, and `id`, which is None if the folder identifies the run.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from softmask_fast.config import TrainConfig, report_names
from softmask_fast.errors import UsageError, one_line, printable, without_secrets
from softmask_fast.evaluation.curves import SYSTEM
from softmask_fast.installation import install_command
from softmask_fast.utils import read_json, write_json

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger("softmask_fast")

IDS = "loggers.json"  # in the run's folder: logger -> id of the run there
PROJECT = "softmask_fast"  # where the client's own environment variables name no other
SECONDS = 120  # that the end of a run waits for what is still to be sent
# of MLflow's client, for one request: tries with pauses of 0, 4, 8, 16 and 32 seconds between them, so that a server
# that does not answer holds a process for at most two minutes
REQUEST = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
LONGEST = 500  # characters of an option's value in MLflow, whose stores refuse or cut longer ones

Options = dict[str, bool | int | float | str]


def tag(name: str) -> str:
    """A metric's name with its group: "system/...", "train/...", and "itm/other_text" of one kind of pair."""
    if kind := re.fullmatch(r"itm_(?!accuracy)(.+?)(_accuracy)?", name):
        return f"itm{kind[2] or ''}/{kind[1]}"
    return f"{'system' if any(name in panel for panel in SYSTEM.values()) else 'train'}/{name}"


def held_out_tag(name: str) -> str:
    """The same of a figure of held-out data: "mean recall, ITC + ITM" is "eval/mean_recall_ITC_ITM"."""
    return "eval/" + re.sub(r"\W+", "_", name)


class TensorBoard:
    """Event files in the run's folder; torch's writer has a thread of its own."""

    id = None

    def __init__(self, folder: Path, first_step: int, options: Options, known: str | None) -> None:
        self.folder, self.first_step, self.options = folder / "tensorboard", first_step, options

    @cached_property
    def board(self) -> SummaryWriter:
        """Opened for the first line, so that the first step does not wait for the import."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        board = SummaryWriter(str(self.folder), purge_step=self.first_step + 1)
        charts = {"loss": ["Multiline", ["itm/.*"]], "accuracy": ["Multiline", ["itm_accuracy/.*"]]}
        board.add_custom_scalars({"matching, by kind of pair": charts})
        # `add_hparams` would make a second run of them. Without its list of metrics TensorBoard offers all scalars.
        board.file_writer.add_summary(hparams(self.options, {})[1])
        return board

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        with Image.open(path) as picture:
            self.board.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.board.close()


class WeightsAndBiases:
    """A run of wandb, whose own process does the network's work. `WANDB_PROJECT`, `WANDB_MODE` and others hold; what is
    not sent in time stays on the disk, for `wandb sync`."""

    def __init__(self, folder: Path, first_step: int, options: Options, known: str | None) -> None:
        import wandb

        self.wandb = wandb
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(SECONDS))  # by default it waits forever
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self.run = wandb.init(
            project=project, name=folder.name, dir=str(folder), config=options, id=known, resume="allow"
        )
        self.id = self.run.id
        # wandb's own step only rises, and a resumed run repeats what came after its checkpoint
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log({**values, "step": step})

    def image(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.wandb.Image(str(path)), "step": step})

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run of MLflow; a thread sends, in order, as the client tries for minutes to reach a server. Of what it sends in
    its own threads a failure would not come here. `MLFLOW_TRACKING_URI` and others hold."""

    def __init__(self, folder: Path, first_step: int, options: Options, known: str | None) -> None:
        import mlflow

        for name, value in REQUEST.items():
            os.environ.setdefault(name, value)
        self.mlflow = mlflow
        if known is None and not os.environ.keys() & {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"}:
            mlflow.set_experiment(PROJECT)
        self.run = mlflow.start_run(run_id=known, run_name=folder.name)
        self.id = self.run.info.run_id
        if known is None:  # they cannot be changed
            texts = {name: str(value) for name, value in options.items()}
            mlflow.log_params({n: x if len(x) <= LONGEST else x[: LONGEST - 3] + "..." for n, x in texts.items()})
        self.thread, self.sent = ThreadPoolExecutor(1), deque[Future]()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._send(self.mlflow.log_metrics, values, step)

    def image(self, step: int, name: str, path: Path) -> None:
        self._send(self.mlflow.log_artifact, str(path), name)

    def close(self) -> None:
        wait(self.sent, timeout=SECONDS)
        self._check()
        if self.sent:
            self.thread.shutdown(wait=False, cancel_futures=True)
            raise TimeoutError(f"{len(self.sent)} messages were not sent within {SECONDS} seconds")
        self.mlflow.end_run()

    def _send(self, method: Callable[..., None], *values: Any) -> None:
        self._check()
        self.sent.append(self.thread.submit(method, *values, run_id=self.id))

    def _check(self) -> None:
        """Raise what sending has raised so far; nothing more is sent then."""
        try:
            while self.sent and self.sent[0].done():
                self.sent.popleft().result()
        except Exception:
            self.thread.shutdown(wait=False, cancel_futures=True)
            raise


LOGGERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}


def check_loggers(train: TrainConfig) -> None:
    """Raise UsageError for a logger whose client is not installed, with pip's line, and if `IDS` is damaged."""
    known_ids(Path(train.output_dir or ""))
    for name in report_names(train.report_to):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, as wandb makes one, is no client
            line = install_command("train") if name == "tensorboard" else f"pip install {name}"
            raise UsageError(f"report_to: {name} is not installed; install it with: {line}")


class Reports:
    """All loggers of a run. One that fails is dropped after one line, so that no run ends because of its logger."""

    def __init__(self, report_to: str | None, folder: Path, first_step: int, options: Options) -> None:
        """Open them: new ones at step 0; for a resumed run, those that reported its first `first_step` steps."""
        self.loggers: dict[str, Any] = {}
        known = known_ids(folder) if first_step else {}
        for name in report_names(report_to):
            self._try(name, partial(self._open, name, folder, first_step, options, known.get(name)))
        ids = known | {name: opened.id for name, opened in self.loggers.items() if opened.id is not None}
        if ids:
            write_json(folder / IDS, ids)

    def _open(self, name: str, *about: Any) -> None:
        self.loggers[name] = LOGGERS[name](*about)

    def _try(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever a client raises, without a network, a login or space on the disk
            self.loggers.pop(name, None)
            reason = printable(without_secrets(one_line(error)))
            logger.warning("warning: report_to: %s failed, the run continues without it: %s", name, reason)

    def _each(self, method: str, *values: Any) -> None:
        for name, opened in list(self.loggers.items()):
            self._try(name, partial(getattr(opened, method), *values))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Report numbers after a step, by the names that `tag` or `held_out_tag` gives them."""
        self._each("scalars", step, values)

    def image(self, step: int, name: str, path: Path) -> None:
        """Report the picture in a file after a step."""
        self._each("image", step, name, path)

    def close(self) -> None:
        """End the run, once everything is sent or the time for it is up."""
        self._each("close")


def known_ids(folder: Path) -> dict[str, str]:
    """logger -> id of the run that a folder has been reported as. Raises UsageError if they are damaged."""
    path = folder / IDS
    ids = read_json(path, "resume") if path.exists() else {}
    if not isinstance(ids, dict) or not all(isinstance(value, str) for value in ids.values()):
        raise UsageError(f"resume: {path} is damaged: expected a run's id by logger; remove it to report to new runs")
    return ids
