"""Time and memory of variants of one computation, measured the same way in every benchmark."""

from __future__ import annotations

import ctypes
import datetime
import functools
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
PHASES = ("forward", "both")  # both: forward and backward
COMPILED = ("compiled", "flex")  # variants that torch.compile makes
longest: float | None = None  # seconds of a case in a short run, which leaves out COMPILED


def _processor_seconds() -> tuple[float, float, float]:
    """The time, the seconds that all processors have worked so far, and those of this process and its children."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    busy = sum(fields[:8]) - fields[3] - fields[4]  # all but idle and iowait
    parents, worked = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # the process has ended
            fields = path.read_text().rpartition(")")[2].split()
            parents[int(path.parent.name)] = int(fields[1])
            worked[int(path.parent.name)] = sum(map(int, fields[11:15]))  # its own, and of children it has waited for
    ours, found = {os.getpid()}, 0
    while len(ours) > found:
        found = len(ours)
        ours |= {process for process, parent in parents.items() if parent in ours}
    ticks = os.sysconf("SC_CLK_TCK")
    return time.monotonic(), busy / ticks, sum(worked.get(process, 0) for process in ours) / ticks


_START = _processor_seconds()


def busy_elsewhere() -> float:
    """How many processors other processes kept busy on average since this module was imported (Linux)."""
    elapsed, busy, own = (now - start for now, start in zip(_processor_seconds(), _START, strict=True))
    return max(0.0, (busy - own) / elapsed)


@dataclass
class Variant:
    """One way to compute a result. If a phase cannot run here, `missing` says why (key "all": none can)."""

    forward: Callable[[], object] | None = None
    both: Callable[[], object] | None = None  # forward and backward; returns results and gradients
    ours: bool = False
    checked: bool = True  # False for a lower bound, which does not compute the result
    work: dict[str, float] = field(default_factory=dict)  # phase -> bytes moved or floating-point operations
    missing: dict[str, str] = field(default_factory=dict)

    def phases(self) -> dict[str, Callable[[], object]]:
        if "all" in self.missing:
            return {}
        given = {name: getattr(self, name) for name in PHASES}
        return {name: run for name, run in given.items() if run is not None and name not in self.missing}


def synchronised(function: Callable, device: torch.device) -> Callable:
    """The function, followed by a wait for the GPU."""

    def run():
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return result

    return run


def interleaved(functions: dict, rounds: int = 30, warmup: int = 3) -> dict[object, float]:
    """Median seconds of each function. They take turns, so that other load on the machine affects all of them."""
    return {name: statistics.median(values) for name, values in interleaved_times(functions, rounds, warmup).items()}


def interleaved_times(functions: dict, rounds: int, warmup: int = 0) -> dict[object, list[float]]:
    times = {name: [] for name in functions}
    for turn in range(rounds + warmup):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def extra_memory(function: Callable, device: torch.device, warm: bool = False) -> int:
    """The peak of the bytes that one call holds, without what existed before and what it returns.

    On the CPU it is the resident memory of the process (Linux), on a GPU what PyTorch's allocator handed out. Pass
    `warm` if the function ran before; otherwise it first runs once, as only the first call allocates some things.
    """
    if not warm:
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = _status("VmRSS")
        result = function()
        peak = _status("VmHWM")
    return max(peak - before - _result_bytes(result), 0)


def _result_bytes(result: object) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors_of(result)}
    return sum(storages.values())


def tensors_of(result: object) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors_of(part)] if isinstance(result, Iterable) else []


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def free_memory() -> int:
    """Bytes that a benchmark may still take."""
    if ON_GPU:
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/meminfo has no MemAvailable")


@functools.cache
def ceilings() -> dict[str, float]:
    """What this machine reaches in this run: bytes/s of a copy (read + written), operations/s of a matrix product."""
    elements = 2**28 if ON_GPU else 2**25
    source = torch.ones(elements, device=DEVICE, dtype=DTYPE)
    target = torch.empty_like(source)
    size = 8192 if ON_GPU else 1536
    left, right = (torch.randn(size, size, device=DEVICE).to(DTYPE) for _ in range(2))
    product = torch.empty_like(left)
    functions = {
        "copy": synchronised(lambda: target.copy_(source), DEVICE),
        "matmul": synchronised(lambda: torch.mm(left, right, out=product), DEVICE),
    }
    seconds = interleaved(functions, rounds=10, warmup=2)
    return {
        "copy": 2 * source.numel() * source.element_size() / seconds["copy"],
        "matmul": 2 * size**3 / seconds["matmul"],
    }


def check_close(name: str, actual: object, expected: object, tolerance: float) -> None:
    """Raises AssertionError if a tensor differs by more than `tolerance` times the expected one's largest value."""
    actual, expected = tensors_of(actual), tensors_of(expected)
    assert len(actual) == len(expected), f"{name}: {len(actual)} results, expected {len(expected)}"
    for place, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.shape == other.shape, f"{name}, result {place}: size {one.shape}, expected {other.shape}"
        scale = other.detach().abs().max().float()
        error = (one.detach().float() - other.detach().float()).abs().max()
        assert error <= tolerance * scale, f"{name}, result {place}: off by {error:.2e} of {scale:.2e}"


def compare(
    benchmark: str, case: dict, variants: dict[str, Variant], baseline: str, ceiling: str, tolerance: float,
    seconds: float,
) -> list[dict]:  # fmt: skip
    """Checks every variant against the baseline (or the first that runs if it does not), then times them in turns.

    Timing all variants takes about `seconds`. Returns a row of the results file for each variant.
    """
    rate = ceilings()[ceiling]
    if longest is not None:
        seconds = min(seconds, longest)
        left_out = Variant(missing={"all": "left out of a short run"})
        variants = {name: left_out if name in COMPILED else variant for name, variant in variants.items()}
    names = sorted(variants, key=lambda name: name != baseline)
    expected, runs, memory = {}, {}, {}
    for name in names:
        for phase, function in variants[name].phases().items():
            run = runs[name, phase] = synchronised(function, DEVICE)
            result = run()
            if variants[name].checked:
                if phase in expected:
                    check_close(f"{benchmark} {case}: {name}, {phase}", result, expected[phase], tolerance)
                expected.setdefault(phase, result)
            del result
    expected.clear()
    once = {}
    for key, run in runs.items():
        start = time.perf_counter()
        memory[key] = extra_memory(run, DEVICE, warm=True)
        once[key] = time.perf_counter() - start
    total = sum(once.values())
    rounds = max(1 if total > seconds else 3, min(30, int(seconds / max(total, 1e-9))))
    times = interleaved_times(runs, rounds)

    rows = []
    for name, variant in variants.items():
        phases = [phase for phase in PHASES if (name, phase) in runs]
        medians = {phase: statistics.median(times[name, phase]) for phase in phases}
        work = {phase: variant.work[phase] for phase in phases if phase in variant.work}
        rows.append(
            {
                "benchmark": benchmark,
                "case": case,
                "dtype": str(DTYPE).removeprefix("torch."),
                "variant": name,
                "ours": variant.ours,
                "floor": not variant.checked,
                "baseline": baseline,
                "ceiling": ceiling,
                "rounds": rounds,
                "seconds": medians,
                "fastest": {phase: min(times[name, phase]) for phase in phases},
                "extra_memory": {phase: memory[name, phase] for phase in phases},
                "work": work,
                "share": {phase: work[phase] / medians[phase] / rate for phase in work},
                "missing": variant.missing,
            }
        )
    return rows


def environment() -> dict:
    """The machine and the versions, as a results file names them."""
    from softmask_fast import __version__

    capability = torch.backends.cpu.get_cpu_capability()
    # CPUs of several generations share one name
    name = torch.cuda.get_device_name() if ON_GPU else f"{_cpu_name()}, {capability}"
    return {
        "device": name,
        "slug": slug(name) if ON_GPU else slug(f"cpu {name} {torch.get_num_threads()} threads"),
        "threads": torch.get_num_threads(),
        "cpu_capability": capability,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"),
        "softmask_fast": __version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if ON_GPU else None,
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "busy_elsewhere": round(busy_elsewhere(), 2),
    }


def slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    run = subprocess.run(command, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else None
