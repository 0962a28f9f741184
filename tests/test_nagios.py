"""The report as a Nagios plugin says it."""

from __future__ import annotations

import re

import pytest
import reports

from exporters import nagios

CODES = {"OK": 0, "WARNING": 1, "CRITICAL": 2, "UNKNOWN": 3}


@pytest.mark.parametrize("name", reports.ALL)
def test_one_line_with_performance_data_that_a_plugin_may_print(name: str) -> None:
    line = nagios.render(reports.ALL[name]())
    assert line.count("\n") == 1
    assert line.endswith("\n")
    assert line.strip().isprintable()
    text, bar, data = line.strip().partition(" | ")
    assert bar
    assert "|" not in text + data
    assert re.fullmatch(r"(\w+=\d+ ?)+", data)


@pytest.mark.parametrize("name", reports.ALL)
def test_the_word_is_the_one_of_the_exit_code(name: str) -> None:
    report = reports.ALL[name]()
    word = nagios.render(report).split()[1]
    assert CODES[word] == report.verdict.exit_code


def test_the_line_names_the_root_cause() -> None:
    line = nagios.render(reports.lost_gpu())
    assert line.startswith("GPU-DOCTOR CRITICAL - gpu-lost: GPU 2 (0000:38:00.0) fell off the bus at 14:12:40")
    assert "2 consequences" in line
    assert line.endswith("| critical=3 warning=0 notice=0 silenced=0 unjudged=1 quiet=3 gpus=4\n")
