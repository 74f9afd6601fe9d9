"""The fixture that compares variants, the tables of a run, and its results file.

A comparison times its variants in turns, which pytest-benchmark cannot. For pytest-benchmark it is one benchmark, which
`--benchmark-only` and `-k` select. Its variants get tables of their own.
"""

from __future__ import annotations

from pathlib import Path

import measure
import pytest
import report
import torch
from measure import ceilings, compare, environment

ROWS = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption(
        "--save-results",
        nargs="?",
        const=str(report.RESULTS),
        metavar="FOLDER",
        help="write FOLDER/<device>/<date>.json (default folder: benchmarks/results)",
    )
    parser.addoption(
        "--short",
        type=float,
        metavar="SECONDS",
        help="time each case for at most this long; leave out torch.compile's variants, which take longer to compile",
    )


def pytest_configure(config):
    config.stash[ROWS] = []
    measure.longest = config.getoption("--short")


@pytest.fixture
def comparison(benchmark, request):
    """`measure.compare`, whose rows are kept for the tables and the results file."""

    def run(*args, **keywords) -> list[dict]:
        torch._dynamo.reset()  # every case is compiled for its own sizes
        rows = benchmark.pedantic(compare, args, keywords, rounds=1, iterations=1)
        benchmark.extra_info["rows"] = rows
        request.config.stash[ROWS].extend(rows)
        return rows

    return run


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_group_stats(config, benchmarks, group_by):
    """Removes the comparisons from pytest-benchmark's own table."""
    benchmarks[:] = [bench for bench in benchmarks if "rows" not in bench["extra_info"]]
    return None if benchmarks else []


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    run = environment() | {"ceilings": ceilings(), "rows": rows}
    terminalreporter.section("comparisons", sep="=")
    for line in report.run_tables(run):
        terminalreporter.write_line(line)
    folder = config.getoption("--save-results")
    if folder:
        terminalreporter.write_line(f"results: {report.save(Path(folder), run)}")
