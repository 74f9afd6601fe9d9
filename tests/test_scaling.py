"""The page of benchmarks/scaling.py: what it says of its sources, with everything that takes long replaced."""

import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The page that some arguments give."""
    for name, value in {
        "operations_per_pair": 250e9, "core_seconds_per_image": 0.01, "image_bytes": 6e3, "standing": 2**30,
        "index_of_a_local_source": (700.0, 5e-5), "seconds_of_an_order": 1e-7, "seconds_of_a_windowed_order": 0.1,
    }.items():  # fmt: skip
        monkeypatch.setattr(scaling, name, lambda *_, value=value: value)

    def made(*arguments):
        scaling.main(["--data", "photos.tar", "--output", str(tmp_path / "page.md"), *arguments])
        return (tmp_path / "page.md").read_text()

    return made


def options_of(page):
    """Of the command that the page names."""
    command = re.search(r"`python benchmarks/scaling\.py (.*)`", page)[1]
    return scaling.make_parser().parse_args(shlex.split(command))


def test_the_page_says_where_its_rate_is_from(page):
    text = page()
    assert "905 (195 T operations/s, as its step had 216 G a pair)" in text  # not today's 250 G
    first = text.split("## What breaks first")[1].split("2. **")[0]
    assert "The host's launches" in first and "370 pairs/s" in first and "41% of the bare step's 905" in first
    assert "4 M pairs x 30 epochs take 90.1 h at that rate, 36.8 h at the step's" in " ".join(first.split())
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in text.splitlines() if row.startswith("| ")}
    assert rows["1"][10] == "36.9 h" and rows["1,000"][10].endswith(" min")
    assert "1000 (250 T operations/s, as its step had 250 G a pair)" in page("--pairs_per_second", "1000")


def test_the_command_of_the_page_makes_it(page):
    made = options_of(page("--pairs", "64", "--latency", "1e-5"))
    assert (made.pairs, made.latency, made.output) == (64, 1e-5, Path("docs/scaling.md"))
    stored = options_of((ROOT / "docs/scaling.md").read_text())
    assert stored.pairs == scaling.make_parser().get_default("pairs")


def test_short_times_are_minutes():
    assert [scaling.duration(seconds) for seconds in (154, 3600, 4e6)] == ["2.6 min", "1.0 h", "1,111.1 h"]
