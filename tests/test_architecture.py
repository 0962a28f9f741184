"""The rooms stand on floors, and the laws hold: read from the source, so that no import can hide."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = (
    ("doctor.__main__",),
    ("doctor.cli",),
    ("doctor.daemon",),
    ("doctor.door", "doctor.notify", "doctor.control"),
    ("doctor.diagnose", "exporters"),
    ("doctor.recorder",),
    ("rules", "doctor.report", "doctor.config", "doctor.feeds"),
    ("doctor.silence", "doctor.drop_ins", "doctor.log_patterns"),
    ("doctor.symptoms", "doctor.rule", "doctor.collectors", "doctor.simulation"),
    ("doctor.history", "doctor.machine", "doctor.readers"),
    ("doctor.snapshot",),
)
"""Top to bottom; a room imports only from floors below its own. `doctor` itself holds the version: anyone reads it."""

SOURCES = sorted(p for room in ("doctor", "rules", "exporters") for p in (ROOT / room).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> tuple[int, str] | None:
    for floor, rooms in enumerate(FLOORS):
        for room in rooms:
            if module == room or module.startswith(room + "."):
                return floor, room
    return None


def imports_of(path: Path) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found.append((node.lineno, node.module or ""))
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_run_downwards(path: Path) -> None:
    here = room_of(module_of(path))
    if here is None:
        assert module_of(path) == "doctor", f"{path} stands on no floor"
        return
    for line, imported in imports_of(path):
        there = room_of(imported)
        if there is not None and there[1] != here[1]:
            assert there[0] > here[0], f"{path}:{line}: {here[1]} imports {imported}, which is not below it"


def test_packages_of_the_top_level_are_those_of_the_design() -> None:
    assert {p.parent.name for p in ROOT.glob("*/__init__.py")} == {"doctor", "rules", "exporters"}


PURE = sorted(
    [
        ROOT / "doctor/history.py",
        ROOT / "doctor/diagnose.py",
        *(ROOT / "doctor/symptoms").rglob("*.py"),
        *(ROOT / "doctor/machine").rglob("*.py"),
        *(ROOT / "doctor/readers").rglob("*.py"),
        *(p for p in (ROOT / "rules").rglob("*.py") if "tables" not in p.parts),
    ]
)
"""Law 1: no I/O, no clock, no globals, no logging. (rules/tables loads its data once, when it is imported.)"""

IMPURE_MODULES = {
    "asyncio", "http", "io", "logging", "multiprocessing", "os", "pathlib", "psutil", "pynvml", "random", "requests",
    "select", "shutil", "signal", "socket", "structlog", "subprocess", "sys", "tempfile", "threading", "time", "urllib",
}  # fmt: skip
IMPURE_CALLS = {"open", "print", "input", "exec", "eval", "now", "today", "utcnow"}


@pytest.mark.parametrize("path", PURE, ids=module_of)
def test_rules_symptoms_and_readers_are_pure(path: Path) -> None:
    for line, imported in imports_of(path):
        assert imported.split(".")[0] not in IMPURE_MODULES, f"{path}:{line}: imports {imported}"
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Global | ast.Nonlocal), f"{path}:{node.lineno}: {type(node).__name__}"
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            assert name not in IMPURE_CALLS, f"{path}:{node.lineno}: calls {name}"


def test_only_the_child_imports_nvml() -> None:
    importers = {module_of(p) for p in SOURCES for _, name in imports_of(p) if name.split(".")[0] == "pynvml"}
    allowed = {"doctor.collectors.nvml_child", "doctor.simulation.nvml"}
    assert importers <= allowed, f"law 4: the parent never loads NVML: {sorted(importers - allowed)}"


def test_a_rule_its_module_its_runbook_and_its_cases_share_one_id() -> None:
    from rules import RULES

    for rule in RULES:
        stem = rule.id.replace("-", "_")
        assert rule.module == f"rules.{stem}"
        assert (ROOT / "rules" / f"{stem}.md").is_file()
    ids = [rule.id for rule in RULES]
    assert len(ids) == len(set(ids))
    modules = {p.stem for p in (ROOT / "rules").glob("*.py")} - {"__init__"}
    assert modules == {rule_id.replace("-", "_") for rule_id in ids}, "a rule that RULES does not list is never asked"


@pytest.mark.parametrize("name", ["utils", "helpers", "common", "manager", "base"])
def test_no_module_has_a_name_that_says_nothing(name: str) -> None:
    assert not [p for p in SOURCES if p.stem == name or name in p.relative_to(ROOT).parts[:-1]]
