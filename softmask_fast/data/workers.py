"""Pools that prepare samples: threads of this process, or worker processes that leave its interpreter free.

Both take jobs and return the results in the same order, so the batches do not depend on the pool. A worker process
imports neither torch nor DALI. It ignores Ctrl-C and SIGTERM, and ends with this process, however that ends. Image
bytes come back through shared memory: each worker owns slots, which are written and read in turn.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import pickle
import queue
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, pairwise
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING, Any

import numpy as np

from softmask_fast.data.preparing import Job, Prepared, Preparer
from softmask_fast.data.sampler import local_ranks
from softmask_fast.errors import UsageError

if TYPE_CHECKING:
    import torch

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from softmask_fast.data.workers import serve; serve(*map(int, sys.argv[2:]))"
)
# one thread each; by default the libraries start one per core
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
_PROTOCOL = pickle.HIGHEST_PROTOCOL
_MOST_WORKERS = 8
_LOOK = 0.2  # seconds between two checks whether a process is alive
_SIGNALS = {signal.SIGINT, signal.SIGTERM}


class WorkerError(RuntimeError):
    """A worker process ended, or failed at something other than a sample."""


class WorkerEnded(WorkerError):
    """A worker process was killed or ended, which is not a bug of this code."""


class ThreadPool:
    """Prepares samples in threads of this process."""

    def __init__(self, preparer: Preparer, threads: int) -> None:
        self._preparer, self._futures = preparer, deque[Future[Prepared]]()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="softmask-data")

    def submit(self, job: Job) -> None:
        """Queues a job."""
        self._futures.append(self._pool.submit(self._preparer.prepare, job))

    def receive(self) -> Prepared:
        """The result of the earliest job that was not received yet."""
        result = self._futures[0].result()
        self._futures.popleft()
        return result

    def drop(self) -> None:
        """Forgets all jobs and results."""
        for future in self._futures:
            future.cancel()
        self._futures.clear()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class WorkerPool:
    """Prepares samples in worker processes, which get the jobs in turn. It is used like `ThreadPool`.

    The images of a result are views of shared memory. They are valid until `capacity` more jobs were submitted.
    `submit` and `receive` raise WorkerError, which names the process, when one has ended.
    """

    def __init__(self, preparer: Preparer, workers: int, capacity: int) -> None:
        """Starts the processes. Raises UsageError if the preparer or its source cannot be pickled."""
        self._slots = -(-capacity // workers)
        self._submitted = self._received = 0
        self._workers: list[_Worker] = []
        try:
            content = pickle.dumps(preparer, _PROTOCOL)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UsageError(
                f"data_workers: expected 0, as this data source cannot be sent to workers: {error}"
            ) from error
        with open(os.memfd_create("softmask-preparer"), "wb") as file:
            file.write(content)
            file.flush()
            masked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # the processes inherit this
            try:
                for number in range(workers):
                    self._workers.append(_Worker(number, file.fileno(), self._slots))
            except OSError:
                self.close()
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, masked)

    def submit(self, job: Job) -> None:
        worker, slot = self._place(self._submitted)
        self._submitted += 1
        worker.send((slot, job))

    def receive(self) -> Prepared:
        worker, slot = self._place(self._received)
        message = worker.receive(self._check)
        self._received += 1
        if isinstance(message, str):
            raise WorkerError(f"{worker.name} failed:\n{message}")
        prepared, shapes = message
        prepared.images = worker.slots[slot].read(shapes)
        return prepared

    def drop(self) -> None:
        while self._received < self._submitted:
            self.receive()

    def close(self) -> None:
        for worker in self._workers:
            worker.process.kill()  # it has nothing to save
        for worker in self._workers:
            worker.process.wait()
            worker.close()
        self._workers.clear()

    def _place(self, number: int) -> tuple[_Worker, int]:
        """The worker and the slot of the `number`-th job."""
        turn, worker = divmod(number, len(self._workers))
        return self._workers[worker], turn % self._slots

    def _check(self) -> None:
        for worker in self._workers:
            worker.check()


def default_threads() -> int:
    """The cores of this process divided by the ranks on this machine, from 1 to 16."""
    return max(1, min(16, cores_per_rank()))


def default_workers(device: torch.device) -> int:
    """Half of a rank's cores, at most 8, when it trains on a GPU and has 4 or more cores; else 0. On a CPU training
    itself uses all cores."""
    cores = cores_per_rank()
    return min(_MOST_WORKERS, cores // 2) if device.type == "cuda" and cores >= 4 else 0


def cores_per_rank() -> int:
    """The cores of this process divided by the ranks on this machine."""
    return len(os.sched_getaffinity(0)) // local_ranks()


class _Slot:
    """Shared memory for the images of one job at a time. It grows as needed."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = np.empty(0, np.uint8)

    def write(self, images: Sequence[bytes | np.ndarray]) -> list[tuple[int, ...]]:
        """Writes the images and returns the shape of each; that of a file is (size,)."""
        offset = 0
        for image in images:
            content = memoryview(np.ascontiguousarray(image) if isinstance(image, np.ndarray) else image).cast("B")
            while content:
                written = os.pwrite(self.descriptor, content, offset)
                offset, content = offset + written, content[written:]
        return [image.shape if isinstance(image, np.ndarray) else (len(image),) for image in images]

    def read(self, shapes: Sequence[tuple[int, ...]]) -> Sequence[np.ndarray]:
        """Views of the images, uint8, valid until the next `write`; a single array if they have equal shapes."""
        ends = list(accumulate(map(math.prod, shapes), initial=0))
        if ends[-1] > len(self._memory):
            self._memory = np.frombuffer(mmap.mmap(self.descriptor, ends[-1]), np.uint8)
        if len(set(shapes)) == 1:
            return self._memory[: ends[-1]].reshape(len(shapes), *shapes[0])
        views = [self._memory[start:end] for start, end in pairwise(ends)]
        return [view if len(shape) == 1 else view.reshape(shape) for view, shape in zip(views, shapes, strict=True)]


class _Worker:
    """A worker process, seen from the process that started it."""

    def __init__(self, number: int, preparer: int, slots: int) -> None:
        """Starts the process. `preparer` is the descriptor of the file that holds the pickled preparer."""
        self.slots = [_Slot(os.memfd_create(f"softmask-images-{number}")) for _ in range(slots)]
        self._connection, theirs = Pipe()
        descriptors = [theirs.fileno(), preparer, *(slot.descriptor for slot in self.slots)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path), *map(str, [os.getpid(), *descriptors])],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            env=os.environ | _ENVIRONMENT,
        )
        theirs.close()
        self._readable = select.poll()
        self._readable.register(self._connection.fileno(), select.POLLIN)
        self.name = f"data worker {number} (process {self.process.pid})"

    def send(self, message: Any) -> None:
        try:
            self._connection.send_bytes(pickle.dumps(message, _PROTOCOL))  # faster than `send`
        except OSError:
            self._report()

    def receive(self, check: Any) -> Any:
        """The next message; calls `check` before and while waiting for it."""
        check()
        try:
            while not self._readable.poll(1e3 * _LOOK):
                check()
            return pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            self._report()

    def check(self) -> None:
        if self.process.poll() is not None:
            self._report()

    def close(self) -> None:
        self._connection.close()
        for slot in self.slots:
            os.close(slot.descriptor)

    def _report(self) -> None:
        status = self.process.wait()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        raise WorkerEnded(f"{self.name} {how}") from None


def serve(parent: int, connection: int, preparer: int, *slots: int) -> None:
    """Runs a worker process until the process `parent` ends. The other arguments are file descriptors."""
    pipe, jobs = Connection(connection), queue.SimpleQueue()
    threading.Thread(target=_receive_jobs, args=(pipe, parent, jobs), daemon=True).start()
    memory = [_Slot(slot) for slot in slots]
    try:
        with mmap.mmap(preparer, 0, prot=mmap.PROT_READ) as content:
            own = pickle.loads(content)
        while True:
            slot, job = jobs.get()
            prepared = own.prepare(job)
            shapes = memory[slot].write(prepared.images)
            prepared.images = []
            pipe.send_bytes(pickle.dumps((prepared, shapes), _PROTOCOL))
    except BaseException:
        pipe.send(traceback.format_exc())
        threading.Event().wait()  # until the parent has read the message and ends this process


def _receive_jobs(pipe: Connection, parent: int, jobs: queue.SimpleQueue) -> None:
    """Passes jobs on, and ends the process when its parent is gone, even in the middle of a job.

    The pipe ends only when all copies of its other end are closed, so the parent is checked as well.
    """
    try:
        while os.getppid() == parent:
            if pipe.poll(1.0):
                jobs.put(pipe.recv())
    finally:
        os._exit(0)
