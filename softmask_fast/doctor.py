"""The command `softmask-fast doctor`: what runs on this machine, and whether it computes correctly.

Like the operators, it needs only torch.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import softmask_fast
from softmask_fast.installation import build_command
from softmask_fast.ops import extension, focal_itc_loss, registry, soft_masked_attention, word_gradcam, word_soft_mask
from softmask_fast.ops.accuracy import errors
from softmask_fast.utils import installed_versions

SELF_TEST_SECONDS = 10.0  # no check starts after this
TIMED_SECONDS = 0.15  # total of the timed runs of one check
WIDTH = 32  # of a head, and of the features of the contrastive loss


class Inputs:
    """Draws reproducible tensors: float64 numbers, rounded to `dtype`, stored as `held_as`."""

    def __init__(self, device: torch.device, dtype: torch.dtype, held_as: torch.dtype) -> None:
        self.device, self.dtype, self.held_as = device, dtype, held_as
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *size: int, gradient: bool = False, unit: bool = False) -> Tensor:
        """Normally distributed numbers; `unit` vectors on request."""
        drawn = torch.randn(size, generator=self.generator, dtype=torch.float64)
        drawn = F.normalize(drawn, dim=-1) if unit else drawn
        return drawn.to(self.dtype).to(self.device, self.held_as).requires_grad_(gradient)

    def index(self, below: int, size: int) -> Tensor:
        """(size,) int64, from 0 to below - 1."""
        return torch.randint(below, (size,), generator=self.generator).to(self.device)


# Each draws its inputs and returns a function that computes the results of `impl`, including gradients.


def _word_mask(inputs: Inputs) -> Callable[[str], list[Tensor]]:
    query, gradient = inputs.normal(4, 6, 12, WIDTH), inputs.normal(4, 6, 12, WIDTH)
    key, value = inputs.normal(4, 6, 65, WIDTH), inputs.normal(4, 6, 65, WIDTH)
    features, word = inputs.normal(4, 65, 96), inputs.index(12, 4)

    def run(impl: str) -> list[Tensor]:
        masked, keep = word_soft_mask(query, key, value, gradient, word, features, impl=impl)
        return [word_gradcam(query, key, value, gradient, impl=impl), masked, keep]

    return run


def _soft_masked_attention(inputs: Inputs) -> Callable[[str], list[Tensor]]:
    query = inputs.normal(12, 6, 12, WIDTH, gradient=True)
    key, value = (inputs.normal(4, 6, 65, WIDTH, gradient=True) for _ in range(2))
    bias, grad = inputs.normal(6, WIDTH, gradient=True), inputs.normal(12, 6, 12, WIDTH)
    keep, image = inputs.normal(12, 65).sigmoid(), inputs.index(4, 12)

    def run(impl: str) -> list[Tensor]:
        output = soft_masked_attention(query, key, value, keep, image_index=image, value_bias=bias, impl=impl)
        return [output.detach(), *torch.autograd.grad(output, (query, key, value, bias), grad)]

    return run


def _focal_itc(inputs: Inputs) -> Callable[[str], list[Tensor]]:
    image, text = (inputs.normal(48, WIDTH, unit=True, gradient=True) for _ in range(2))
    teachers = [inputs.normal(48, WIDTH, unit=True) for _ in range(2)]
    keys = [inputs.normal(300, WIDTH, unit=True, gradient=True) for _ in range(2)]
    ids, key_ids = torch.arange(48, device=inputs.device), torch.arange(300, device=inputs.device) % 60

    def run(impl: str) -> list[Tensor]:
        loss = focal_itc_loss(
            image, text, *keys, temperature=0.1, gamma=2.0, teacher_image=teachers[0], teacher_text=teachers[1],
            alpha=0.4, ids=ids, key_ids=key_ids, impl=impl,
        )  # fmt: skip
        return [loss.detach(), *torch.autograd.grad(loss, (image, text, *keys))]

    return run


CASES = {"word_mask": _word_mask, "soft_masked_attention": _soft_masked_attention, "focal_itc": _focal_itc}


@dataclass
class Check:
    """One implementation compared with the definition in float64, including gradients."""

    operator: str
    device: str
    dtype: str
    impl: str
    result: str  # "ok", "wrong", "failed" or "not run"
    error: float | None = None  # the largest of all results, as a fraction of what the tolerance policy allows
    seconds: float | None = None  # median of the runs after the first one
    first: float | None = None  # the first one, which compiles Triton's kernels
    reason: str | None = None  # why it failed or did not run


def self_test(limit: float = SELF_TEST_SECONDS) -> list[Check]:
    """Check every implementation that runs here, on every kind of device. No check starts after `limit` seconds."""
    end = time.perf_counter() + limit
    checks = []
    for device in devices():
        dtypes = (torch.float32,) if device.type == "cpu" else (torch.float32, torch.bfloat16)
        for operator, case in CASES.items():
            for dtype in dtypes:
                name = str(dtype).removeprefix("torch.")
                known = {}
                for impl, reason in _runnable(operator, device, dtype).items():
                    check = Check(operator, str(device), name, impl, "ok")
                    if reason is not None:
                        check.result, check.reason = "failed", reason
                    elif time.perf_counter() > end:
                        check.result, check.reason = "not run", f"the limit of {limit:g} s was reached"
                    else:
                        _run(check, case, device, dtype, known)
                    checks.append(check)
    return checks


def _runnable(operator: str, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """implementation -> None if it can be tested, or why it fails at once: its library exists but does not load."""
    found = {}
    for implementation in registry.implementations(operator):
        try:
            if implementation.unavailable_reason(device, dtype, WIDTH) is None:
                found[implementation.name] = None
        except OSError as error:
            found[implementation.name] = str(error)
    return found


def _run(check: Check, case: Callable, device: torch.device, dtype: torch.dtype, known: dict) -> None:
    try:
        if not known:
            known["truth"] = case(Inputs(device, dtype, torch.float64))("reference")
            known["baseline"] = case(Inputs(device, dtype, dtype))("reference")
        run = case(Inputs(device, dtype, dtype))
        check.first, results = _timed(lambda: run(check.impl), device)
        check.error = 0.0
        for actual, baseline, truth in zip(results, known["baseline"], known["truth"], strict=True):
            error, allowed, _ = errors(actual, baseline, truth, dtype)
            if not error <= allowed:
                check.result = "wrong"
            check.error = max(check.error, error / allowed) if error == error else float("inf")
        times = []
        while sum(times) < TIMED_SECONDS:
            times.append(_timed(lambda: run(check.impl), device)[0])
        check.seconds = statistics.median(times)
    except Exception as error:  # of any kind, so that the other implementations are still tested
        check.result, check.reason = "failed", f"{type(error).__name__}: {error}"


def _timed(function: Callable, device: torch.device) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def devices() -> list[torch.device]:
    """The CPU, and the first GPU if there is one."""
    return [torch.device("cpu")] + ([torch.device("cuda", 0)] if torch.cuda.is_available() else [])


def examine(limit: float = SELF_TEST_SECONDS) -> dict[str, Any]:
    """The content of the report, as JSON types."""
    return {
        "versions": installed_versions(),
        "platform": platform.platform(),
        "devices": _describe_devices(),
        "libraries": {name: _library(name) for name in ("_C", "_cuda")},
        "implementations": {
            str(device): {operator: _choices(operator, device) for operator in registry.operators()}
            for device in devices()
        },
        "self_test": [asdict(check) for check in self_test(limit)],
    }


def _choices(operator: str, device: torch.device) -> dict[str, str | None]:
    try:
        return registry.choices(operator, device, width=WIDTH)
    except OSError as error:
        return {"?": f"a library does not load: {error}"}


def _describe_devices() -> dict[str, str]:
    cpu = f"{_cpu_name()}, {torch.get_num_threads()} threads of {os.cpu_count()}"
    found = {"cpu": f"{cpu}, {torch.backends.cpu.get_cpu_capability()}"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = (
            f"{properties.name}, {_generation(properties)}, {properties.total_memory / 2**30:.1f} GiB, "
            f"{properties.multi_processor_count} multiprocessors"
        )
    if not torch.cuda.is_available():
        versions = (("CUDA", torch.version.cuda), ("HIP", torch.version.hip))
        built = " and ".join(f"{name} {version}" for name, version in versions if version) or "the CPU only"
        found["cuda"] = f"none; torch was built for {built}"
    return found


def _generation(properties: Any) -> str:
    return getattr(properties, "gcnArchName", "") if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _library(name: str) -> dict[str, Any]:
    """Whether a compiled library loads or why not, and what it was compiled for."""
    path = Path(softmask_fast.__file__).with_name(f"{name}.abi3.so")
    load = extension.missing if name == "_C" else extension.cuda_missing
    try:
        reason = load()
    except OSError as error:
        reason = f"it does not load: {error}"
    found = {"loads": reason is None, "reason": reason, "architectures": [], "built_with": None, "build": None}
    if path.exists():
        found["architectures"] = _cpu_architectures(path) if name == "_C" else _gpu_architectures(path)
        built_with = re.search(rb"softmask_fast, built with ([ -~]+)", path.read_bytes())  # csrc/built_with.h
        found["built_with"] = built_with and built_with[1].decode()
        if found["architectures"] == ["x86_64"]:  # clang's, see csrc/cpu/simd.h
            found["build"] = f"CXX=g++ {build_command()}   # g++ adds AVX2 and AVX-512, without which it is slow"
    elif name == "_C":
        compiler = "" if shutil.which("g++") else "install g++ 12 or later; "
        found["build"] = f"{compiler}{build_command()}"
    return found


def _cpu_architectures(path: Path) -> list[str]:
    """Read from the names of the functions that exist once per instruction set; see csrc/cpu/simd.h."""
    clones = set(re.findall(rb"arch_x86_64_(v\d)", path.read_bytes()))
    return [f"x86-64-{clone.decode()}" for clone in sorted(clones, reverse=True)] + [platform.machine()]


def _gpu_architectures(path: Path) -> list[str] | None:
    """Read by cuobjdump, which comes with CUDA and with Triton; None without it."""
    triton = importlib.util.find_spec("triton")
    bundled = triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = shutil.which("cuobjdump") or (bundled if bundled and bundled.exists() else None)
    if tool is None:
        return None
    listed = subprocess.run([tool, "--list-elf", "--list-ptx", path], capture_output=True, text=True).stdout
    machine = sorted(set(re.findall(r"\.(sm_\d+\w?)\.cubin", listed)))
    return machine + [f"PTX of {name}" for name in sorted(set(re.findall(r"\.(sm_\d+\w?)\.ptx", listed)))]


def passed(report: dict[str, Any]) -> bool:
    """Whether no check failed."""
    return all(_fine(check["result"]) for check in report["self_test"])


def _fine(result: str) -> bool:
    return result in ("ok", "not run")


def render(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = ["Versions", *_columns([["", name, version] for name, version in report["versions"].items()])]
    lines += [f"  {report['platform']}", "", "Devices"]
    lines += _columns([["", name, what] for name, what in report["devices"].items()])
    lines += ["", "Compiled libraries"]
    for name, library in report["libraries"].items():
        built = library["architectures"]
        kinds = "unknown (cuobjdump was not found)" if built is None else ", ".join(built)
        lines.append(f"  {name}: " + ("loads" if library["loads"] else library["reason"]))
        if kinds:
            lines.append(f"    compiled for {kinds}")
        if library["built_with"]:
            lines.append(f"    built with {library['built_with']}")
        if library["build"]:
            lines.append(f"    build it with: {library['build']}")
    for device, operators in report["implementations"].items():
        lines += ["", f"Implementations on {device}, float32: what impl=None chooses, and why not the others"]
        for operator, choices in operators.items():
            taken = [name for name, reason in choices.items() if reason is None]
            lines.append(f"  {operator}: {taken[0] if taken else 'none'}")
            lines += [f"    not {name}: {reason}" for name, reason in choices.items() if reason is not None]
    lines += ["", "Self-test against float64, including gradients; error relative to what is allowed"]
    table = [["", "operator", "device", "dtype", "impl", "result", "error", "time", "first"]]
    table += [
        ["", *(check[key] for key in ("operator", "device", "dtype", "impl", "result"))]
        + ["-" if check["error"] is None else f"{check['error']:.0%}"]
        + ["-" if check[key] is None else f"{1000 * check[key]:.3g} ms" for key in ("seconds", "first")]
        for check in report["self_test"]
    ]
    lines += _columns(table)
    lines += [f"  {c['operator']}, {c['impl']}: {c['reason']}" for c in report["self_test"] if c["reason"]]
    results = [check["result"] for check in report["self_test"]]
    failed, skipped = sum(not _fine(result) for result in results), results.count("not run")
    lines.append(f"{failed} of {len(results)} checks failed" + (f", {skipped} were not run" if skipped else ""))
    return "\n".join(lines)


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
