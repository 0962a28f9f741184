"""The log of an engine whose container writes to the journal, as Podman's do, and Docker's with its journald driver."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from roots import BOOT, CONTAINER, Root

from doctor.collectors.collector import CannotSeeError, Visit
from doctor.collectors.engine_log import EngineLogs
from doctor.collectors.processes import Processes
from doctor.snapshot import Engine, Why

READY = "May 29 10:00:00 node vllm[100]: INFO:     Application startup complete."
SERVED = 'May 29 10:00:07 node vllm[100]: INFO:     10.0.0.1:5 - "POST /v1/completions HTTP/1.1" 200 OK'
AT = Visit(at=BOOT + 5000.0)

Journal = Callable[..., Path]


@pytest.fixture
def journal(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Journal:
    """Make a `journalctl` that shows lines of one match, first these, then those after its cursor."""
    programs = tmp_path_factory.mktemp("bin")

    def make(match: str, first: str = READY, then: str = SERVED) -> Path:
        script = programs / "journalctl"
        script.write_text(
            '#!/bin/sh\necho "$@" >> "$0.calls"\n'
            f'case " $* " in *" {match} "*) ;; *) exit 0;; esac\n'
            f"case \"$*\" in *after-cursor*) echo '{then}';; *) echo '{first}';; esac\n"
            "echo '-- cursor: s=abc;i=1'\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        return Path(f"{script}.calls")

    return make


@pytest.fixture
def engine_root(tmp_path: Path) -> Root:
    root = Root(tmp_path)
    root.engine(output="pipe:[4711]", cgroup=f"/machine.slice/libpod-{CONTAINER}.scope/container")
    return root


def engine_of(root: Root) -> Engine:
    (engine,) = Processes(root.folder).collect(AT).fields["engines"]
    return engine


def told(collector: EngineLogs, *engines: Engine) -> tuple[list[object], list[str]]:
    reading = collector.collect(Visit(at=AT.at, engines=engines))
    logs = [reading.engine_fields[engine.id]["log"] for engine in engines]
    return logs, [event.signal for event in reading.fields["engine_events"]]


def test_a_containers_lines_in_the_journal_are_found_by_its_id(engine_root: Root, journal: Journal) -> None:
    calls = journal(f"CONTAINER_ID_FULL={CONTAINER}")
    collector, engine = EngineLogs(engine_root.folder), engine_of(engine_root)
    assert told(collector, engine) == ([f"journal:CONTAINER_ID_FULL={CONTAINER}"], ["startup-complete"])
    assert told(collector, engine)[1] == ["request-served"]
    assert "--after-cursor=s=abc;i=1" in calls.read_text().splitlines()[1]


def test_a_container_whose_lines_are_nowhere_is_told_with_the_remedy(engine_root: Root, journal: Journal) -> None:
    journal("CONTAINER_ID_FULL=another")
    with pytest.raises(CannotSeeError, match="shows no line") as caught:
        told(EngineLogs(engine_root.folder), engine_of(engine_root))
    if os.geteuid() == 0:
        assert caught.value.why.why is Why.NOT_PRESENT
        assert "[engine] logs" in caught.value.why.detail


def test_a_site_may_name_a_field_of_the_journal(engine_root: Root, journal: Journal) -> None:
    journal("CONTAINER_NAME=vllm")
    collector = EngineLogs(engine_root.folder, logs=("journal:CONTAINER_NAME=vllm",))
    assert told(collector, engine_of(engine_root)) == (["journal:CONTAINER_NAME=vllm"], ["startup-complete"])


def test_a_unit_is_no_field_and_no_option(engine_root: Root, journal: Journal) -> None:
    journal("--unit=--file=/etc/shadow")
    collector = EngineLogs(engine_root.folder, logs=("journal:--file=/etc/shadow",))
    assert told(collector)[1] == ["startup-complete"]
