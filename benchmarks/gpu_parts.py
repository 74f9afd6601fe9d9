"""The Python parts of gpu.sh: failures named at once, the real job for some seconds, one results file.

    pytest -p gpu_parts --failures FILE ...      # each failing test on a line of FILE as it fails, and its first error
    python benchmarks/gpu_parts.py job STATE PRESET SECONDS [options of train.py]
    python benchmarks/gpu_parts.py collect STATE RESULTS      # RESULTS/<device>/<date>.json of all parts so far

STATE/part-<name>.json holds a part's results, STATE/times.txt gpu.sh's line about each: name, seconds, outcome.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FIRST_STEP = 200.0  # seconds that a job may take until its first steady steps
SETTLED = 20  # steps before the steady ones
OUTPUT = 4000  # characters of a failed job's output that are kept


def write(path: Path, content: object) -> None:
    """Writes the content as JSON, whole or not at all."""
    path.with_suffix(".partial").write_text(json.dumps(content, indent=1) + "\n")
    os.replace(path.with_suffix(".partial"), path)


class Failures:
    """A plugin: counts outcomes, and names each failure at once on the terminal and in a file."""

    def __init__(self, config: Any) -> None:
        self.path, self.counts, self.failed = config.getoption("--failures"), Counter(), {}
        self.chosen, self.plugins = 0, config.pluginmanager

    def pytest_collection_finish(self, session: Any) -> None:
        self.chosen = max(self.chosen, len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self.chosen = max(self.chosen, len(ids))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            lines = str(report.longrepr).splitlines()
            errors = [line[1:].strip() for line in lines if line.startswith("E ")]
            self.failed[report.nodeid] = (errors or lines[-1:] or ["no message"])[0]
            said = f"\nFAILED {report.nodeid}: {self.failed[report.nodeid]}"
            self.plugins.get_plugin("terminalreporter").write_line(said, flush=True)
        if report.failed or sum(self.counts.values()) % 20 == 0:
            self.save()

    def pytest_sessionfinish(self) -> None:
        self.save()

    def save(self) -> None:
        write(self.path, {"chosen": self.chosen, **self.counts, "failures": self.failed})


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--failures", type=Path, metavar="FILE", help="JSON of the outcomes, written as tests end")


def pytest_configure(config: Any) -> None:
    if config.getoption("--failures") and not hasattr(config, "workerinput"):  # not in a worker of pytest-xdist
        config.pluginmanager.register(Failures(config))


def job(state: Path, preset: str, seconds: float, options: list[str]) -> None:
    """Train for so many seconds of steady steps, end the run, and write what its log says about them."""
    run = state / f"job_{preset}"
    command = [sys.executable, "-m", "deepspeed.launcher.runner", str(ROOT / "softmask_fast/train.py")]
    command += ["--deepspeed", str(ROOT / "ds.json"), "--preset", preset, "--output_dir", str(run), "--log_steps", "5"]
    command += ["--vision_weights", "random", "--text_weights", "random", "--checkpoint_steps", "1000000", *options]
    began, output = time.monotonic(), []
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    reader = threading.Thread(target=lambda: output.extend(process.stdout), daemon=True)
    reader.start()
    first = settled = None
    try:
        while process.poll() is None and (settled is None or time.monotonic() < settled + seconds):
            time.sleep(0.05)
            step = max((line["step"] for line in records(run)), default=0)
            now = time.monotonic()
            first = now if first is None and step else first
            settled = now if settled is None and step > SETTLED else settled
            if settled is None and now > began + FIRST_STEP:
                break
    finally:
        end_tree(process)
    reader.join(timeout=5)
    steady = [line for line in records(run) if line["step"] > SETTLED]
    said = [line for line in "".join(output).replace("\r", "\n").splitlines() if "where a step's time goes" in line]
    names = ("pairs_per_second", "data_wait", "flops_utilisation")
    report = {name: statistics.median(line[name] for line in steady) for name in names if steady}
    report |= {
        "options": options,
        "seconds_to_first_line": first and round(first - began, 1),
        "steps": steady[-1]["step"] if steady else 0,
        "peak_memory_gib": steady[-1]["peak_memory_gib"] if steady else None,
        "loss": steady[-1]["loss"] if steady else None,
        "where_time_goes": said[0][said[0].index("where a step") :] if said else None,
    }
    if not steady:
        report["output"] = "".join(output)[-OUTPUT:]
    write(state / f"part-job_{preset}.json", report)
    print(json.dumps(report, indent=1))
    if not steady:
        raise SystemExit(f"{preset}: no step after step {SETTLED}")


def records(run: Path) -> list[dict]:
    """The complete lines of a run's metrics.jsonl so far."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def end_tree(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    import psutil

    if process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        for one in [process, *family]:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                pass
    process.wait()


def collect(state: Path, results: Path) -> None:
    """One results file of all parts so far. Its rows are those of `report.py`; "parts" has everything else."""
    import report
    from measure import environment

    runs = [json.loads(path.read_text()) for path in sorted(state.glob("benchmarks/*/*/*.json"))]
    parts: dict[str, dict] = {}
    for line in (state / "times.txt").read_text().splitlines():  # if a part was repeated, the last one counts
        name, seconds, outcome = line.split()
        parts[name] = {"seconds": int(seconds), "outcome": outcome}
    for path in state.glob("part-*.json"):
        parts.setdefault(path.stem.removeprefix("part-"), {}).update(json.loads(path.read_text()))
    about = state / "environment.json"
    if not about.exists():  # the date of the first part names the file
        write(about, environment())
    run = json.loads(about.read_text())
    run["busy_elsewhere"] = max((one["busy_elsewhere"] for one in runs), default=run["busy_elsewhere"])
    ceilings = {name: value for one in runs for name, value in one["ceilings"].items()}
    run |= {"ceilings": ceilings, "rows": [row for one in runs for row in one["rows"]], "parts": parts}
    print(f"results: {report.save(results, run)}")


def main() -> None:
    sys.path.insert(0, str(ROOT))
    what, state, *rest = sys.argv[1:]
    if what == "job":
        job(Path(state), rest[0], float(rest[1]), rest[2:])
    elif what == "collect":
        collect(Path(state), Path(rest[0]))
    else:
        raise SystemExit(f"expected job or collect, got {what}")


if __name__ == "__main__":
    main()
