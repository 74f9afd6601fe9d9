"""Tables and plots of benchmark results: of a run, on the terminal; of results files, in README.md and docs.

python benchmarks/report.py          # reads the newest file of each device in benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path

from softmask_fast.utils import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKERS = ("<!-- benchmarks: begin, written by `make report` -->", "<!-- benchmarks: end -->")
COMMAND = "pytest benchmarks --benchmark-only --save-results"
# The keys that a results file must have; see measure.environment and measure.compare.
RUN_KEYS = (
    "device", "slug", "threads", "date", "commit", "softmask_fast", "torch", "triton", "driver", "ceilings",
    "rows",
)  # fmt: skip
ROW_KEYS = (
    "benchmark", "case", "dtype", "variant", "ours", "floor", "baseline", "ceiling", "seconds", "extra_memory", "share",
    "missing",
)  # fmt: skip
# Names and colors of variants in tables and plots, the same on every page.
VARIANTS = {
    "cpp": ("ours, C++", "#d62728"),
    "triton": ("ours, Triton", "#d62728"),
    "cuda": ("ours, CUDA", "#ff7f0e"),
    "cpp + projection": ("ours with its projection, C++", "#d62728"),
    "triton + projection": ("ours with its projection, Triton", "#d62728"),
    "fast": ("ours", "#d62728"),
    "streamed": ("ours, plain PyTorch in blocks", "#e377c2"),
    "reference": ("the definition, plain PyTorch", "#1f77b4"),
    "eager": ("PyTorch, eager", "#bcbd22"),
    "compiled": ("PyTorch, compiled", "#17becf"),
    "ALBEF hooks": ("ALBEF's hooks", "#2ca02c"),
    "hooks": ("attention maps by autograd", "#9467bd"),
    "maps": ("attention maps by autograd", "#9467bd"),
    "bytes": ("reading and writing alone", "#7f7f7f"),
    "sdpa_gathered": ("SDPA on gathered keys", "#2ca02c"),
    "sdpa_unmasked": ("SDPA without masks", "#7f7f7f"),
    "flex": ("FlexAttention", "#9467bd"),
    "projected": ("ALBEF: every sequence projected", "#2ca02c"),
    "open_clip": ("open_clip", "#2ca02c"),
    "eager forward": ("eager attention's forward pass", "#7f7f7f"),
    "ours": ("ours", "#d62728"),
    "inf_cl": ("Inf-CL", "#9467bd"),
    "liger": ("Liger-Kernel", "#8c564b"),
    "torch_fused": ("PyTorch, fused linear cross-entropy", "#9edae5"),
}
BUSY_ELSEWHERE = 0.15  # of the processors: if others keep more busy, the machine is too loaded to be shown
FLOOR_NOISE = 1.1  # of the ceiling: a floor can be as fast as it, and both are medians of a few runs
# Names of sizes, for benchmarks in which only one changes from case to case.
AXES = dict.fromkeys(("word_soft_mask", "word_soft_mask_keep", "soft_masked_attention"), "N")
AXES |= dict.fromkeys(("focal_itc", "focal_itc_queue", "focal_itc_sigmoid"), "B")
AXIS_LABELS = {"N": "image tokens (N)", "B": "pairs in a batch (B)"}
# The page that shows one size of each benchmark (the paper's, if it has one), and these sizes.
FRONT = "README.md"
FRONT_SIZES: dict[str, dict[str, tuple]] = {
    "word_soft_mask": {"N": (257,)},
    "word_soft_mask_keep": {"N": ()},
    "soft_masked_attention": {"N": (257,)},
    "soft_masked_attention_projected": {"N": (257,)},
    "focal_itc": {"B": (4096,), "d": (256,)},
    "focal_itc_queue": {},
    "focal_itc_sigmoid": {"B": (4096,)},
    "step": {"preset": ("small", "base")},
    "word_maps": {},
}
# The pages that show all sizes -> their benchmarks (None: all).
PAGES: dict[str, tuple[str, ...] | None] = {
    "docs/benchmarks.md": None,
    "docs/operators/word_soft_mask.md": ("word_soft_mask", "word_soft_mask_keep"),
    "docs/operators/soft_masked_attention.md": ("soft_masked_attention",),
    "docs/operators/focal_itc_loss.md": ("focal_itc", "focal_itc_queue", "focal_itc_sigmoid"),
}


def save(folder: Path, run: dict) -> Path:
    """Writes <folder>/<device>/<date>.json, atomically, and returns its path."""
    check(run, "this run")
    path = folder / run["slug"] / f"{run['date'].replace(':', '')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(run, indent=1) + "\n")
    return path


def check(run: dict, name: object) -> None:
    """Raises ValueError for a run that lacks what the report needs."""
    missing = [key for key in RUN_KEYS if key not in run]
    for place, row in enumerate(run.get("rows", ())):
        missing += [f"rows[{place}].{key}" for key in ROW_KEYS if key not in row]
    if missing:
        raise ValueError(f"{name}: expected a results file, it has no {', '.join(missing[:5])}")


def newest(folder: Path) -> tuple[list[dict], list[str]]:
    """The runs to report, GPUs first, newest first, and what was left out of newer ones, with the reason.

    Each keeps only the benchmarks that no newer run of its device shows.
    """
    runs, left_out = [], []
    for device in sorted(path for path in folder.iterdir() if path.is_dir()) if folder.exists() else ():
        seen = set()
        for file in sorted(device.glob("*.json"), reverse=True):
            run = json.loads(file.read_text())
            check(run, file)
            new = dict.fromkeys(row["benchmark"] for row in run["rows"] if row["benchmark"] not in seen)
            reasons = {name: unfit(run, name) for name in new}
            for reason in dict.fromkeys(filter(None, reasons.values())):
                names = ", ".join(name for name in new if reasons[name] == reason)
                left_out.append(f"{file}: left out {names}: {reason}; measure again on an idle machine")
            fit = {name for name in new if reasons[name] is None}
            seen |= fit
            if fit:
                runs.append(run | {"rows": [row for row in run["rows"] if row["benchmark"] in fit]})
    return sorted(runs, key=lambda run: (run["driver"] is None, run["slug"])), left_out


def groups(rows: Iterable[dict]) -> list[list[dict]]:
    """The rows of each case."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(json.dumps([row["benchmark"], row["case"], row["dtype"]]), []).append(row)
    return list(found.values())


def seconds(row: dict) -> float | None:
    """The time that variants are compared by: forward and backward if it was measured, else the forward alone."""
    return row["seconds"].get("both", row["seconds"].get("forward"))


def same_variant(row: dict, other: dict) -> bool:
    return all(row[key] == other[key] for key in ("benchmark", "variant"))


def label(row: dict) -> str:
    """The readable name of a row's variant. For the step, "reference" is ALBEF's way."""
    if row["benchmark"] == "step" and row["variant"] == "reference":
        return "ALBEF's way"
    return VARIANTS.get(row["variant"], (row["variant"], None))[0]


def busy_elsewhere(run: dict) -> float:
    """Processors that other processes kept busy. Older files give the machine's load instead, with their own
    threads."""
    return run["busy_elsewhere"] if "busy_elsewhere" in run else max(0.0, run["load"] - run["threads"])


def unfit(run: dict, benchmark: str) -> str | None:
    """Why no page may show a run's figures of a benchmark; None if they may."""
    busy, processors = busy_elsewhere(run), run.get("processors", run["threads"])
    if busy > BUSY_ELSEWHERE * processors:
        return f"other processes kept {busy:.2g} of the {processors} processors busy"
    for row in (row for row in run["rows"] if row["benchmark"] == benchmark):
        for share in row["share"].values():
            if share > (FLOOR_NOISE if row["floor"] else 1):
                where = f"{case_text(row['case'])}: {row['variant']}"
                return f"{where} reaches {100 * share:.0f} % of the {row['ceiling']} ceiling, so one of them is wrong"
    return None


def main_phase(row: dict) -> str:
    return "both" if "both" in row["seconds"] else "forward"


def time_text(value: float | None) -> str:
    if value is None:
        return "-"
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def memory_text(value: int | None) -> str:
    if value is None:
        return "-"
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if value >= 999.5 * 2 ** (power - 10):  # three digits never become "1e+03"
            return f"{value / 2**power:.3g} {unit}"
    return f"{value / 2**10:.3g} KiB"


def table(columns: Iterable[str], rows: Iterable[Iterable[str]], aligned: str = "---:") -> str:
    """A table in Markdown whose columns are all aligned in the same way."""
    columns = list(columns)
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, [aligned] * len(columns), *rows))


def case_text(case: dict) -> str:
    values = {name: f"{value:,}" if isinstance(value, int) else value for name, value in case.items()}
    return ", ".join(f"{name} {value}" for name, value in values.items())


def machine_text(run: dict, separator: str = "; ") -> str:
    rates = run["ceilings"]
    driver = f", driver {run['driver']}" if run["driver"] else f", {run['threads']} threads"
    commit = (run["commit"] or "unknown")[:12]
    return (
        f"{run['device']}{driver}, torch {run['torch']}, commit {commit}, {run['date'][:10]}, "
        f"{busy_elsewhere(run):.2g} processors busy with other work{separator}"
        f"measured: copy {rates['copy'] / 1e9:,.0f} GB/s, matrix product {rates['matmul'] / 1e12:.3g} TFLOP/s"
    )


def run_tables(run: dict) -> list[str]:
    """Every row of a run, a table for each case, for the terminal."""
    lines = [machine_text(run)]
    for rows in groups(run["rows"]):
        first = rows[0]
        base = next((seconds(row) for row in rows if row["variant"] == first["baseline"]), None)
        ceiling = "" if first["ceiling"] is None else f"% of {first['ceiling']}"
        header = ("", "forward", "+ backward", f"x {first['baseline']}" if base else "", "extra memory", ceiling)
        cells = [header]
        for row in rows:
            time = seconds(row)
            if time is None:
                cells.append((row["variant"], f"not run: {'; '.join(row['missing'].values())}"))
                continue
            phase = main_phase(row)
            comparable = base and (phase == "both") == any("both" in other["seconds"] for other in rows)
            share = row["share"].get(phase)
            cells.append(
                (
                    row["variant"],
                    time_text(row["seconds"].get("forward")),
                    time_text(row["seconds"].get("both")) if "both" not in row["missing"] else "not run",
                    f"{base / time:.2f}" if comparable else "",
                    memory_text(row["extra_memory"].get(phase)),
                    f"{100 * share:.0f}" if share is not None else "",
                )
            )
        width = max(len(row[0]) for row in cells)
        lines += ["", f"{first['benchmark']}: {case_text(first['case'])}, {first['dtype']}"]
        for row in cells:
            rest = row[1:] if len(row) == 2 else [f"{cell:>13}" for cell in row[1:]]
            lines.append(f"  {row[0]:{width}} " + " ".join(rest).rstrip())
        notes = [(row["variant"], row["missing"]["both"]) for row in rows if seconds(row) and "both" in row["missing"]]
        lines += [f"  {variant}: no backward, {reason}" for variant, reason in notes]
    return lines


def summary(run: dict) -> list[str]:
    """A Markdown table of a run: for each case the usual way, the best alternative, ours, and a variant that does less
    work."""
    lines = [
        f"**{machine_text(run)}**",
        "",
        "| | the usual way | best alternative | ours | x the usual way | x the best alternative | less work "
        "| extra memory | of the ceiling |",
        "| --- |" + " --- |" * 3 + " ---: |" * 2 + " --- |" * 3,
    ]
    for rows in groups(run["rows"]):
        timed = [row for row in rows if seconds(row) is not None]
        phase = "both" if any("both" in row["seconds"] for row in timed) else "forward"
        timed = [row for row in timed if phase in row["seconds"]]
        floor = next((row for row in timed if row["floor"]), None)
        timed = [row for row in timed if not row["floor"]]
        ours = min((row for row in timed if row["ours"]), key=seconds, default=None)
        base = next((row for row in timed if row["variant"] == row["baseline"]), None)
        if ours is None:
            continue
        best = min((row for row in timed if not row["ours"] and row is not base), key=seconds, default=None)
        title = f"`{ours['benchmark']}`{' and backward' if phase == 'both' else ''}"
        cells = [f"{title}<br>{case_text(ours['case'])}, {ours['dtype']}"]
        cells += [f"{time_text(seconds(row))} ({label(row)})" if row else "-" for row in (base, best, ours)]
        cells += [f"{seconds(row) / seconds(ours):.1f}" if row else "-" for row in (base, best)]
        cells += [f"{time_text(seconds(floor))} ({label(floor)})" if floor else "-"]
        cells += [" -> ".join(memory_text(row["extra_memory"].get(phase)) for row in (base, ours) if row)]
        cells += [f"{100 * ours['share'][phase]:.0f} % ({ours['ceiling']})" if phase in ours["share"] else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    absent: dict[str, list[str]] = {}
    for row in run["rows"]:
        for phase, reason in row["missing"].items():
            name = label(row) if phase == "all" else f"{label(row)}, {phase}"
            axis = AXES.get(row["benchmark"])
            wanted = "both" if phase == "both" else main_phase(row)
            if axis and any(wanted in other["seconds"] for other in run["rows"] if same_variant(row, other)):
                name += f" at {axis} {row['case'][axis]:,}"
            absent.setdefault(reason, [])
            if name not in absent[reason]:
                absent[reason].append(name)
    if absent:
        lines += ["", "Not run there:", ""]
        lines += [f"- {', '.join(names)}: {reason}" for reason, names in absent.items()]
    return lines


def plot(run: dict, benchmark: str, path: Path) -> bool:
    """Plots time and extra memory of every variant against the size that changes; False if fewer than two sizes ran."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    axis = AXES[benchmark]
    rows = [row for row in run["rows"] if row["benchmark"] == benchmark and seconds(row) is not None]
    if not rows:
        return False
    rest = json.dumps({name: size for name, size in rows[0]["case"].items() if name not in (axis, "M")})
    rows = [row for row in rows if json.dumps({k: v for k, v in row["case"].items() if k not in (axis, "M")}) == rest]
    phase = "both" if any("both" in row["seconds"] for row in rows) else "forward"
    rows = [row for row in rows if phase in row["seconds"]]
    if len({row["case"][axis] for row in rows}) < 2:
        return False
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name]
        style = {"linewidth": 2.6, "zorder": 3} if mine[0]["ours"] and name != "reference" else {"linewidth": 1.2}
        style |= {"color": VARIANTS.get(name, (name, None))[1]}
        style |= {"linestyle": ":"} if mine[0]["floor"] else {}
        sizes = [row["case"][axis] for row in mine]
        panels[0].plot(sizes, [1e3 * row["seconds"][phase] for row in mine], marker="o", label=label(mine[0]), **style)
        # resident memory is counted in pages, so less than one means nothing
        panels[1].plot(sizes, [max(row["extra_memory"][phase], 4096) / 2**20 for row in mine], marker="o", **style)
    for panel, quantity in zip(panels, ("time, ms", "memory beyond inputs and results, MiB"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel=AXIS_LABELS[axis], ylabel=quantity)
        ticks = sorted({row["case"][axis] for row in rows})
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
        panel.minorticks_off()
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.grid(alpha=0.3)
    fixed = ", ".join(f"{name} {size}" for name, size in json.loads(rest).items())
    what = "forward and backward" if phase == "both" else "forward"
    title = f"{benchmark}, {what}: {fixed}, {rows[0]['dtype']}"
    figure.suptitle("\n".join((title, machine_text(run, ";\n"))), fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    figure.supxlabel(COMMAND, fontsize=7, family="monospace")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial.png")
    figure.savefig(temporary, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    os.replace(temporary, path)
    return True


def insert(text: str, block: list[str], name: str) -> str:
    """`text` with the lines between the two markers replaced. Raises ValueError if a marker is missing."""
    begin, end = (text.find(marker) for marker in MARKERS)
    if begin < 0 or end < begin:
        raise ValueError(f"{name}: expected the lines {MARKERS[0]!r} and then {MARKERS[1]!r}")
    return text[: begin + len(MARKERS[0])] + "\n" + "\n".join(block) + "\n" + text[end:]


def write_front(runs: list[dict], page: Path, images: Path) -> None:
    """Writes the section of the front page: for the latest GPU and CPU, a row per benchmark and one plot."""
    block = []
    latest = {run["driver"] is None: run["slug"] for run in sorted(runs, key=lambda run: run["date"])}
    for run in (run for run in runs if run["slug"] in latest.values()):
        shown = [
            row | {"missing": {}}
            for row in run["rows"]
            if all(row["case"][name] in sizes for name, sizes in FRONT_SIZES[row["benchmark"]].items())
        ]
        block += ["", *summary(run | {"rows": shown}), ""]
        picture = images / f"benchmarks-soft_masked_attention-{run['slug']}.png"
        if plot(run, "soft_masked_attention", picture):
            block += [f"![soft_masked_attention on {run['device']}]({os.path.relpath(picture, page.parent)})", ""]
    block += [
        "All sizes, what did not run, and the other plots: [benchmarks](docs/benchmarks.md). Made by `make report` "
        f"from the results of `{COMMAND}`."
    ]
    _replace(page, block)


def write(runs: list[dict], page: Path, images: Path, only: tuple[str, ...] | None = None) -> None:
    """Writes the plots, then the section of `page` between its markers. `only` names the benchmarks it shows."""
    block = []
    for run in runs:
        rows = [row for row in run["rows"] if only is None or row["benchmark"] in only]
        if not rows:
            continue
        block += ["", *summary(run | {"rows": rows}), ""]
        for benchmark in AXES if only is None else only:
            picture = images / f"benchmarks-{benchmark}-{run['slug']}.png"
            if plot(run, benchmark, picture):
                block += [f"![{benchmark} on {run['device']}]({os.path.relpath(picture, page.parent)})", ""]
    if block:
        block += [f"Made by `make report` from the files in `benchmarks/results`, which `{COMMAND}` wrote."]
    else:
        block = [
            "",
            "No file in `benchmarks/results` has it from an idle machine yet: `make bench` measures it here.",
            "",
        ]
    _replace(page, block)


def _replace(page: Path, block: list[str]) -> None:
    write_text(page, insert(page.read_text(), block, page.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    results = parser.parse_args().results
    runs, left_out = newest(results)
    for reason in left_out:
        print(reason)
    if not runs:
        raise SystemExit(f"{results}: expected results files, <device>/<date>.json, found none that may be shown")
    write_front(runs, ROOT / FRONT, ROOT / "docs" / "images")
    for page, only in PAGES.items():
        write(runs, ROOT / page, ROOT / "docs" / "images", only)


if __name__ == "__main__":
    main()
