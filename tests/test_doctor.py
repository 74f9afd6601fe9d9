"""softmask-fast doctor: its report is true, and a wrong or failing implementation makes its exit status 1."""

import contextlib
import dataclasses
import json
import platform
import re
import time
from pathlib import Path

import pytest
import torch

import softmask_fast
from softmask_fast import doctor
from softmask_fast.cli import main
from softmask_fast.ops import extension, registry

CPU = torch.device("cpu")
PATIENT = 300.0  # seconds, so that a busy machine runs every check


@pytest.fixture
def add():
    """Registers one more implementation of the word mask, made of the reference's functions."""
    with contextlib.ExitStack() as stack:

        def add(name, change):
            reference = next(i for i in registry.implementations("word_mask") if i.name == "reference")
            functions = {part: change(function) for part, function in reference.functions.items()}
            made = dataclasses.replace(reference, name=name, functions=functions)
            stack.enter_context(registry.registered("word_mask", made))

        yield add


def checks_of(impl, checks):
    return [check for check in checks if check.impl == impl]


def test_the_report_is_that_of_this_machine(tmp_path, capsys):
    start = time.perf_counter()
    assert main(["doctor", "--json", str(tmp_path / "new" / "report.json")]) == 0
    seconds = time.perf_counter() - start
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["versions"]["torch"] in printed and report["devices"]["cpu"] in printed
    for operator in registry.operators():
        choices = report["implementations"]["cpu"][operator]
        taken = [name for name, reason in choices.items() if reason is None]
        assert taken == [registry.resolve(operator, None, CPU).name] and f"  {operator}: {taken[0]}\n" in printed
        assert all(f"not {name}: {reason}" in printed for name, reason in choices.items() if reason)
        tested = {c["impl"] for c in report["self_test"] if c["operator"] == operator and c["device"] == "cpu"}
        assert tested == set(registry.runnable(operator, CPU))
    for check in report["self_test"]:
        assert check["result"] in ("ok", "not run"), check
        if check["result"] == "ok":
            assert 0 <= check["error"] <= 1 and 0 < check["seconds"] and 0 < check["first"]
    assert "\n0 of " in printed and seconds < doctor.SELF_TEST_SECONDS + 60  # a started check is finished


def test_libraries_name_what_they_were_compiled_for():
    """Those that are there; of the others, why they are not."""
    folder = Path(softmask_fast.__file__).parent
    for name, library in doctor.examine(0.0)["libraries"].items():
        if not (folder / f"{name}.abi3.so").exists():
            assert not library["loads"] and library["reason"] and library["built_with"] is None
            continue
        assert library["loads"] and library["reason"] is None and ", torch 2." in library["built_with"]
        names = library["architectures"]
        if name == "_C":
            assert names[-1] == platform.machine()
        else:  # None without the tool that reads them
            assert names is None or (names and all(re.fullmatch(r"(PTX of )?sm_\d+\w?", found) for found in names))


def test_a_library_without_avx_is_told_to_be_slow(tmp_path, monkeypatch):
    """As clang makes it."""
    for name, text in (("clang", b""), ("gcc", b"arch_x86_64_v3 arch_x86_64_v4 ")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "_C.abi3.so").write_bytes(text + b"softmask_fast, built with Clang 14.0.6, torch 2.11.0\0")
        monkeypatch.setattr(softmask_fast, "__file__", str(folder / "__init__.py"))
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")
        library = doctor._library("_C")
        assert (library["build"] or "").startswith("CXX=g++ ") == (name == "clang")
        assert ("without which it is slow" in str(library["build"])) == (name == "clang")


@pytest.mark.parametrize(
    "change",
    [
        lambda function: lambda *args: _scaled(function(*args), 1 + 1e-4),
        lambda function: lambda *args: _scaled(function(*args), float("nan")),
    ],
    ids=["a little off", "not a number"],
)
def test_a_wrong_implementation_is_found(add, monkeypatch, capsys, change):
    monkeypatch.setattr(doctor, "CASES", {"word_mask": doctor.CASES["word_mask"]})
    add("wrong", change)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "\n1 of " in printed and "checks failed" in printed
    [row] = [line for line in printed.splitlines() if line.split()[3:4] == ["wrong"]]
    assert row.split()[4] == "wrong"


def _scaled(result, factor):
    return tuple(part * factor for part in result) if isinstance(result, tuple) else result * factor


def test_an_implementation_that_raises_is_found_and_the_others_tested(add):
    def raises(*args):
        raise RuntimeError("no such instruction")

    add("raises", lambda function: raises)
    checks = doctor.self_test(PATIENT)
    [bad] = checks_of("raises", checks)
    assert (bad.result, bad.reason) == ("failed", "RuntimeError: no such instruction")
    assert all(check.result == "ok" for check in checks if check is not bad)
    assert not doctor.passed({"self_test": [dataclasses.asdict(check) for check in checks]})


def test_a_library_that_does_not_load_is_a_failure(monkeypatch):
    def missing():
        raise OSError("_C.abi3.so: undefined symbol")

    monkeypatch.setattr(extension, "missing", missing)
    report = doctor.examine(PATIENT)
    assert not doctor.passed(report)
    assert report["libraries"]["_C"]["reason"] == "it does not load: _C.abi3.so: undefined symbol"
    assert all(c["result"] == ("failed" if c["impl"] == "cpp" else "ok") for c in report["self_test"])
    assert "a library does not load: _C.abi3.so: undefined symbol" in doctor.render(report)


def test_no_check_starts_after_the_limit():
    checks = doctor.self_test(limit=0.0)
    assert {(check.result, check.reason) for check in checks} == {("not run", "the limit of 0 s was reached")}
