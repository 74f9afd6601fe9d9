"""The benchmarks' own tools: what they measure, the results file, the report, and the script for a GPU machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_host  # noqa: E402
import bench_soft_masked_attention  # noqa: E402
import bench_step  # noqa: E402
import bench_word_maps  # noqa: E402
import gpu_parts  # noqa: E402
import measure  # noqa: E402
import report  # noqa: E402
import traffic  # noqa: E402

from softmask_fast.training.meters import OperationCounter  # noqa: E402


@pytest.fixture
def rates(monkeypatch):
    """Ceilings of no particular machine: measuring them takes longer than these tests should."""
    monkeypatch.setattr(measure, "ceilings", lambda: {"copy": 1e13, "matmul": 1e12})


@pytest.fixture
def run(rates):
    """A run of one comparison at two sizes."""
    rows = []
    for size in (1000, 2000):
        values = torch.arange(float(size), device=measure.DEVICE)
        variants = {
            "usual": measure.Variant(lambda v=values: v * 2, work={"forward": 8 * size}),
            "fast": measure.Variant(lambda v=values: v + v, ours=True, work={"forward": 8 * size}),
            "elsewhere": measure.Variant(missing={"all": "its kernels need another machine"}),
        }
        rows += measure.compare("word_soft_mask", {"B": 1, "N": size}, variants, "usual", "copy", 1e-6, seconds=0.05)
    return measure.environment() | {"busy_elsewhere": 0.0, "ceilings": measure.ceilings(), "rows": rows}


def test_sizes_have_three_digits():
    sizes = {
        512: "0.5 KiB",
        999 * 2**10: "999 KiB",
        1000 * 2**10: "0.977 MiB",
        round(999.7 * 2**20): "0.976 GiB",
        2**31: "2 GiB",
    }
    assert {size: report.memory_text(size) for size in sizes} == sizes


def test_comparison_refuses_a_wrong_result(rates):
    variants = {
        "usual": measure.Variant(lambda: torch.ones(3)),
        "wrong": measure.Variant(lambda: torch.tensor([1.0, 1.0, 1.1])),
    }
    with pytest.raises(AssertionError, match="wrong, forward, result 0: off by 1.00e-01"):
        measure.compare("sums", {}, variants, "usual", "copy", 0.05, seconds=0.05)
    variants["wrong"].checked = False
    assert len(measure.compare("sums", {}, variants, "usual", "copy", 0.05, seconds=0.05)) == 2


def test_rows(run):
    usual, fast, elsewhere, *_ = run["rows"]
    assert fast["ours"] and not usual["ours"]
    assert fast["share"]["forward"] == pytest.approx(8000 / fast["seconds"]["forward"] / 1e13)
    assert elsewhere["seconds"] == {} and elsewhere["missing"] == {"all": "its kernels need another machine"}


@pytest.mark.parametrize("bf16, limit", [(False, 4_400), (True, 4_950)])
def test_a_step_dispatches_no_more_operators_than_it_did(bf16, limit):
    """Base's depth at toy width: host time must not come back unseen. A lower count lowers its limit."""
    assert 0.95 * limit < bench_host.bare_step(bf16=bf16, steps=1)["all"][1] <= limit


def test_traffic_counts_less_where_operators_are_fused():
    small, large = (traffic.count("tiny", pairs, copy=1e12, matmul=1e15) for pairs in (4, 8))
    for one in (small, large):
        assert 0 < one.fused_bytes() < one.bytes[traffic.FUSABLE]
        assert set(one.bytes) == {*traffic.KERNELS, traffic.FUSABLE}
    ratio = large.operations["matrix products"] / small.operations["matrix products"]
    assert 1.5 < ratio < 2.1  # what grows with the batch
    step = {name: one.work["both"] for name, one in bench_step.Problem("tiny", 4).variants().items()}
    # without padding; traffic.py counts captions as if all were as long as the longest
    assert 0.95 < step["fast"] / sum(small.operations.values()) <= 1 and step["reference"] > 1.5 * step["fast"]


def test_operations_that_a_benchmark_states_are_those_that_run():
    attention = bench_soft_masked_attention.Problem(2, 9, passes=3, heads=2, length=5, width=8)
    maps = bench_word_maps.Problem(tokens=32, image=16, words=4)
    variants = attention.variants() | attention.variants_with_projection()
    variants |= {f"maps: {name}": one for name, one in maps.variants().items()}
    for name, variant in variants.items():
        for phase, function in variant.phases().items() if name not in measure.COMPILED else ():
            with OperationCounter() as counter:
                function()
            # the counter does not know word_gradcam, whose two products are with the image's tokens
            unseen = 2 * 2 * 128 * 28 * 4 * 16 if name == "maps: ours" else 0
            assert variant.work[phase] == counter.operations + unseen, (name, phase)


@pytest.mark.skipif(measure.ON_GPU, reason="the resident memory of the process")
def test_extra_memory_counts_what_is_neither_input_nor_result():
    size = 32 * 2**20

    def function(temporaries):
        held = [torch.ones(size, dtype=torch.uint8) for _ in range(temporaries)]
        return torch.ones(size, dtype=torch.uint8), len(held)

    assert measure.extra_memory(lambda: function(0), measure.DEVICE) < size / 4
    assert size / 2 < measure.extra_memory(lambda: function(1), measure.DEVICE) < 2 * size


def test_results_file(run, tmp_path):
    path = report.save(tmp_path, run)
    assert path.parent == tmp_path / run["slug"] and [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert json.loads(path.read_text()) == run
    assert report.newest(tmp_path) == ([run], [])
    del run["rows"][0]["seconds"]
    with pytest.raises(ValueError, match=r"has no rows\[0\].seconds"):
        report.save(tmp_path, run)


def test_newest_run_of_each_benchmark_counts(run, tmp_path):
    run["date"] = "2026-01-01T00:00:00Z"
    report.save(tmp_path, run)
    other = [row | {"benchmark": "focal_itc"} for row in run["rows"][:3]]
    report.save(tmp_path, run | {"date": "2026-01-02T00:00:00Z", "rows": other})
    slower = [row | {"rounds": 99} for row in run["rows"]]
    report.save(tmp_path, run | {"date": "2026-01-03T00:00:00Z", "rows": slower})
    (newest, older), _ = report.newest(tmp_path)
    assert (newest["date"], newest["rows"]) == ("2026-01-03T00:00:00Z", slower)
    assert (older["date"], older["rows"]) == ("2026-01-02T00:00:00Z", other)


def test_report_is_idempotent_and_tells_what_did_not_run(run, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n\n" + "\n".join(report.MARKERS) + "\n\nafter\n")
    report.save(tmp_path / "results", run)
    report.write(report.newest(tmp_path / "results")[0], readme, tmp_path / "images")
    once = readme.read_text()
    report.write(report.newest(tmp_path / "results")[0], readme, tmp_path / "images")
    assert readme.read_text() == once
    assert once.startswith("before\n\n<!--") and once.endswith("-->\n\nafter\n")
    for row in run["rows"]:
        assert not row["ours"] or report.time_text(row["seconds"]["forward"]) in once
    assert "- elsewhere: its kernels need another machine" in once
    assert "| x the usual way | x the best alternative |" in once
    (picture,) = (tmp_path / "images").iterdir()
    assert f"images/{picture.name}" in once and picture.read_bytes()[:4] == b"\x89PNG"


def test_a_page_shows_its_own_benchmarks(run, tmp_path):
    report.save(tmp_path / "results", run)
    page = tmp_path / "operator.md"
    for only, expected in ((("word_soft_mask",), "| `word_soft_mask`"), (("focal_itc",), "No file in")):
        page.write_text("\n".join(report.MARKERS))
        report.write(report.newest(tmp_path / "results")[0], page, tmp_path / "images", only)
        assert expected in page.read_text()


def test_the_front_page_shows_one_size_of_each_on_the_latest_machine(run, tmp_path):
    rows = [row | {"case": row["case"] | {"N": size}} for size in (257, 577) for row in run["rows"]]
    report.save(tmp_path / "results", run | {"rows": rows})
    report.save(tmp_path / "results", run | {"date": "2026-01-01T00:00:00Z", "slug": "another", "rows": rows})
    page = tmp_path / "README.md"
    page.write_text("\n".join(report.MARKERS))
    report.write_front(report.newest(tmp_path / "results")[0], page, tmp_path / "images")
    assert page.read_text().count("| `word_soft_mask`") == 1 and "N 257" in page.read_text()
    assert "docs/benchmarks.md" in page.read_text()


def test_no_page_shows_a_loaded_machine_or_more_than_the_ceiling(run, tmp_path):
    fast = next(row for row in run["rows"] if row["ours"])
    loaded = {"busy_elsewhere": 0.5 * run["processors"]}
    old = {"load": run["threads"] + 0.5 * run["processors"]}
    beyond = {"rows": [*run["rows"], fast | {"share": {"forward": 1.2}}]}
    floor = {"rows": [*run["rows"], fast | {"floor": True, "share": {"forward": 1.11}}]}
    for change, reason in (
        (loaded, "processors busy; measure again on an idle machine"),
        (old, "processors busy; measure again"),
        (beyond, "B 1, N 1,000: fast reaches 120 % of the copy ceiling, so one of them is wrong"),
        (floor, "B 1, N 1,000: fast reaches 111 % of the copy ceiling, so one of them is wrong"),
    ):
        changed = run | change
        if "load" in change:
            del changed["busy_elsewhere"]
        report.save(tmp_path / "results", changed)
        runs, (said,) = report.newest(tmp_path / "results")
        assert runs == [] and ": left out word_soft_mask: " in said and reason in said
    noisy = run["rows"][0] | {"floor": True, "share": {"forward": 1.05}}
    report.save(tmp_path / "results", run | {"rows": [*run["rows"], noisy]})
    assert len(report.newest(tmp_path / "results")[0]) == 1


def test_an_older_run_takes_the_place_of_one_that_must_not_be_shown(run, tmp_path):
    run["date"] = "2026-01-01T00:00:00Z"
    report.save(tmp_path, run)
    other = [row | {"benchmark": "focal_itc"} for row in run["rows"][:3]]
    beyond = run["rows"][:2] + [run["rows"][1] | {"share": {"forward": 1.2}}]
    report.save(tmp_path, run | {"date": "2026-01-02T00:00:00Z", "rows": other + beyond})
    report.save(tmp_path, run | {"date": "2026-01-03T00:00:00Z", "busy_elsewhere": float(run["processors"])})
    (newer, older), left_out = report.newest(tmp_path)
    assert (newer["date"], newer["rows"]) == ("2026-01-02T00:00:00Z", other)
    assert (older["date"], older["rows"]) == ("2026-01-01T00:00:00Z", run["rows"])
    assert len(left_out) == 2 and all("left out word_soft_mask: " in reason for reason in left_out)


def test_the_front_page_knows_every_benchmark():
    files = {path.stem: path.read_text() for path in ROOT.glob("benchmarks/bench_*.py")}
    files = {name: text for name, text in files.items() if "comparison(" in text}
    for name, text in files.items():
        assert any(f'"{benchmark}"' in text for benchmark in report.FRONT_SIZES), name
        assert set(re.findall(r'comparison\(\s*"(\w+)"', text)) <= set(report.FRONT_SIZES)


def test_every_variant_has_a_name_and_a_color():
    for file in report.RESULTS.glob("*/*.json"):
        for row in json.loads(file.read_text())["rows"]:
            assert row["variant"] in report.VARIANTS


def test_a_variant_that_ran_at_another_size_is_named_with_its_own(run):
    missing = {"forward": {}, "missing": {"all": "would take about 9 s"}}
    run["rows"].append(run["rows"][0] | {"case": {"B": 1, "N": 4000}, "seconds": {}} | missing)
    assert "- usual at N 4,000: would take about 9 s" in report.summary(run)


def test_every_page_of_the_report_has_its_markers():
    for page in (report.FRONT, *report.PAGES):
        text = (ROOT / page).read_text()
        assert report.insert(text, [], page) and text.count(report.MARKERS[0]) == 1


def test_report_needs_its_markers(run, tmp_path):
    report.save(tmp_path / "results", run)
    readme = tmp_path / "README.md"
    readme.write_text("no markers\n")
    with pytest.raises(ValueError, match="README.md: expected the lines"):
        report.write(report.newest(tmp_path / "results")[0], readme, tmp_path / "images")
    assert readme.read_text() == "no markers\n"


def test_terminal_tables(run):
    lines = report.run_tables(run)
    assert any(line.startswith("word_soft_mask: B 1, N 1,000") for line in lines)
    assert any("elsewhere" in line and "not run: its kernels need another machine" in line for line in lines)


def gpu_script(state, **environment):
    environment = os.environ | {"PYTHON": sys.executable, "GPU_STATE": str(state)} | environment
    environment = {"SOFTMASK_FAST_ALLOW_CPU": "1", "RESULTS": str(state / "results"), "PHOTOS": ""} | environment
    return subprocess.run([ROOT / "benchmarks" / "gpu.sh"], env=environment, capture_output=True, text=True)


def gpu_results(state) -> dict:
    """The one results file."""
    (path,) = state.glob("results/*/*.json")
    run = json.loads(path.read_text())
    assert path.parent.name == run["slug"] == measure.environment()["slug"] and run["torch"] == torch.__version__
    return run


def test_gpu_script_skips_parts_that_are_done(tmp_path):
    done = ["install", "build", "tests", "report", "job_tiny", "job_small", "job_base"]
    for part in (*done, *(path.stem for path in ROOT.glob("benchmarks/bench_*.py"))):
        (tmp_path / f"{part}.done").touch()
    run = gpu_script(tmp_path)
    assert run.returncode == 0, run.stderr
    assert "== tests: done before" in run.stdout and "== bench_focal_itc: done before" in run.stdout
    assert "no ablation" in run.stdout and (tmp_path / "ablation.done").exists()
    assert gpu_results(tmp_path)["parts"] == {"ablation": {"seconds": 0, "outcome": "done"}}


def test_gpu_script_repeats_a_named_part_and_reports_failure(tmp_path):
    (tmp_path / "tests.done").touch()
    run = gpu_script(tmp_path, PART="tests ablation", TESTS="tests/no_such_file.py")
    assert run.returncode == 2 and "these parts failed: tests" in run.stderr
    assert not (tmp_path / "tests.done").exists() and "no_such_file" in (tmp_path / "tests.log").read_text()
    assert {name: part["outcome"] for name, part in gpu_results(tmp_path)["parts"].items()} == {
        "tests": "failed",
        "ablation": "done",
    }


def test_the_results_of_a_gpu_run_are_one_file_that_the_report_reads(run, tmp_path):
    (tmp_path / "times.txt").write_text("tests 170 failed\nbench_word_mask 9 done\ntests 20 done\n")
    (tmp_path / "part-tests.json").write_text('{"passed": 3, "failures": {}}')
    report.save(tmp_path / "benchmarks" / "bench_word_mask", run | {"busy_elsewhere": 0.05})
    gpu_parts.collect(tmp_path, tmp_path / "results")
    found = gpu_results(tmp_path)
    assert found["rows"] == run["rows"] and found["ceilings"] == run["ceilings"] and found["busy_elsewhere"] == 0.05
    assert found["parts"] == {
        "tests": {"seconds": 20, "outcome": "done", "passed": 3, "failures": {}},
        "bench_word_mask": {"seconds": 9, "outcome": "done"},
    }
    (newest,), _ = report.newest(tmp_path / "results")
    assert newest["rows"] == run["rows"]


def test_gpu_script_names_each_failing_test_with_its_error(tmp_path):
    text = "import pytest\npytestmark = pytest.mark.gpu\n\ndef test_right(): pass\n\n"
    text += "def test_wrong():\n    total = 1 + 1\n    assert total == 3, 'expected three'\n"
    (tmp_path / "test_things.py").write_text(text)
    run = gpu_script(tmp_path, PART="tests", TESTS=f"-c /dev/null --rootdir {tmp_path} {tmp_path}")
    assert run.returncode == 2, run.stdout
    assert "FAILED test_things.py::test_wrong: AssertionError: expected three" in run.stdout
    tests = gpu_results(tmp_path)["parts"]["tests"]
    assert tests["chosen"] == 2 and tests["passed"] == tests["failed"] == 1 and tests["outcome"] == "failed"
    assert tests["failures"] == {"test_things.py::test_wrong": "AssertionError: expected three"}


def test_gpu_script_runs_the_job_and_says_what_it_found(tmp_path):
    sizes = "--data shapes:num=64 --image_size 32 --vision_depth 2 --vision_contrast_blocks 1 --batch_size 4"
    run = gpu_script(tmp_path, PART="job_tiny", JOB_OPTIONS=sizes)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    found = gpu_results(tmp_path)["parts"]["job_tiny"]
    assert found["steps"] > 20 and found["pairs_per_second"] > 1 and 0 <= found["data_wait"] < 1
    assert found["peak_memory_gib"] > 0 and "forward and backward" in found["where_time_goes"]
    assert found["outcome"] == "done" and found["seconds"] > found["seconds_to_first_line"]


def test_gpu_script_installs_from_a_packed_folder(tmp_path):
    """As on a machine whose DALI comes in parts."""
    packed, files = tmp_path / "packed", tmp_path / "files" / "nvidia" / "dali"
    files.mkdir(parents=True)
    (files / "__init__.py").write_text("packed = True\n")
    (packed / "dali").mkdir(parents=True)
    subprocess.run(f"tar cf - nvidia | xz > {tmp_path}/all.xz", shell=True, check=True, cwd=tmp_path / "files")
    whole = (tmp_path / "all.xz").read_bytes()
    for name, part in (("part-a", whole[:100]), ("part-b", whole[100:])):
        (packed / "dali" / name).write_bytes(part)
    run = gpu_script(tmp_path, PART="install", PACKED=str(packed))
    assert run.returncode == 0, run.stderr
    site = tmp_path / "site"
    code = "import nvidia.dali, nvidia; print(nvidia.dali.packed, len(nvidia.__path__) > 1)"
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert found.stdout == "True True\n", found.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_script_refuses_a_machine_without_a_gpu(tmp_path):
    run = gpu_script(tmp_path, SOFTMASK_FAST_ALLOW_CPU="0", PART="report")
    assert run.returncode == 2 and "torch sees no GPU" in run.stderr
    assert not (tmp_path / "report.done").exists()


def test_a_short_run_leaves_out_what_has_to_be_compiled(rates, monkeypatch):
    monkeypatch.setattr(measure, "longest", 0.01)
    variants = {name: measure.Variant(lambda: torch.ones(3)) for name in ("usual", "compiled")}
    usual, compiled = measure.compare("sums", {}, variants, "usual", "copy", 0.05, seconds=100)
    assert usual["rounds"] <= 30 and compiled["missing"] == {"all": "left out of a short run"}
