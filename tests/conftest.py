"""What holds for every test."""

from __future__ import annotations

import signal
from typing import NoReturn

import pytest
from hypothesis import settings

from doctor import diagnose

settings.register_profile("busy", deadline=None)  # no test may depend on the speed of the machine
settings.load_profile("busy")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background: the programs under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "rules_may_fail: this test is about rules that fail while they judge")


@pytest.fixture(autouse=True)
def a_rule_that_fails_fails_its_test(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In service it is told and stops no other; here it would hide behind *could not be judged*."""

    def fail(error: Exception) -> NoReturn:
        raise error

    if "rules_may_fail" not in request.keywords:
        monkeypatch.setattr(diagnose, "broken", fail)
