"""What the files around the code say of it: versions, the workflow's commands, the issue forms; the layout of csrc."""

import re
from pathlib import Path

import yaml

import softmask_fast

ROOT = Path(__file__).parents[1]


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation["version"] == newest[1] == softmask_fast.__version__


def test_the_workflow_runs_what_exists():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"][0] == oldest
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    made = {command.split()[1] for command in commands if command.startswith("make ")}
    assert {"test", "lint"} == made <= targets
    assert any("cibuildwheel" in command for command in commands)


def test_issue_forms():
    for name in ("bug_report", "feature_request"):
        form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
        assert form["name"] and form["description"]
        ids = [field["id"] for field in form["body"]]
        assert len(set(ids)) == len(ids) > 1
        for field in form["body"]:
            assert field["type"] in ("textarea", "input", "dropdown", "checkboxes") and field["attributes"]["label"]
    assert "softmask-fast doctor" in (ROOT / ".github/ISSUE_TEMPLATE/bug_report.yml").read_text()


def test_lines_of_csrc_have_at_most_120_columns():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    lines = [(path.name, *line) for path in sources for line in enumerate(path.read_text().splitlines(), 1)]
    assert lines and [f"{name}:{place}" for name, place, line in lines if len(line) > 120] == []
