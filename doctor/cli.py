"""The front door: wires rooms together and holds no logic.

Rooms are imported inside the commands that need them, so that `--help` answers at once.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from doctor import __version__

if TYPE_CHECKING:
    from doctor.collectors.gpu_access import GpuAccess
    from doctor.config import Site
    from doctor.recorder.flight import FlightRecorder
    from doctor.report import Report
    from doctor.rule import AnyRule
    from doctor.snapshot import Position, Snapshot, Source

KEEP_SECONDS = 3600.0
"""What the rules remember; every feed is judged with the same memory, or a replay would not be the run."""

CHECK_SECONDS = 1.0
"""How long `check` looks: two visits, so that counters can be seen to move."""

STATE_FOLDER = Path("/var/lib/gpu-doctor")
"""Where the packaged service records."""

COULD_NOT_RUN = 3
INTERRUPTED = 130
"""As a shell says of a program that SIGINT ended."""
BROKEN_PIPE = 141
"""As a shell says of a program that SIGPIPE ended."""


class Seconds(click.FloatRange):
    """A span of time: a finite number of seconds."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return it as a number."""
        seconds = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value!r} is no span of time.", param, ctx)
        return seconds


class FrontDoor(click.Group):
    """The commands. What a room refuses becomes one sentence and exit code 3; a reader that leaves is no error."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            super().invoke(ctx)
            sys.stdout.flush()
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            raise click.exceptions.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
            raise click.exceptions.Exit(BROKEN_PIPE) from None
        except OSError as e:
            refuse(f"{e.filename}: {e.strerror}" if e.filename else str(e))
        except Exception as e:
            if not isinstance(e, _refusals()):
                import traceback

                traceback.print_exc()
                refuse("this is a bug of gpu-doctor; please report it with the lines above")
            refuse(str(e))


def refuse(sentence: str) -> NoReturn:
    """End the program: it could not do what was asked, and *sentence* says why."""
    click.echo(f"gpu-doctor: {sentence}", err=True)
    raise click.exceptions.Exit(COULD_NOT_RUN)


def _refusals() -> tuple[type[Exception], ...]:
    """Return the exception of each room's seam."""
    from doctor.config import ConfigError
    from doctor.control import ControlError
    from doctor.door.address import DoorError
    from doctor.feeds.evidence import EvidenceError
    from doctor.feeds.recording import RecordingError
    from doctor.recorder.folder import RecorderError
    from doctor.simulation.faults import FaultError

    return (ConfigError, ControlError, DoorError, EvidenceError, FaultError, RecorderError, RecordingError)


F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)

with_simulation = [
    click.option("--simulate", metavar="PROFILE", help="A node that does not exist; `simulate --list` names them."),
    click.option(
        "--fault", "faults", metavar="FAULT", multiple=True, help="A fault of the simulated node; repeatable."
    ),
]
with_node = [
    *with_simulation,
    click.option(
        "--root",
        type=FILE,
        default=Path("/"),
        metavar="DIR",
        help="Where the node's file system is mounted; default /.",
    ),
]
with_state = [
    click.option(
        "--state-dir",
        type=FILE,
        metavar="DIR",
        help="The flight recorder's folder; default: $STATE_DIRECTORY, which systemd sets for the service, "
        "and /var/lib/gpu-doctor for reading.",
    )
]
with_site = [
    click.option(
        "--config",
        type=FILE,
        metavar="FILE",
        help="The site's configuration, TOML; default: /etc/gpu-doctor/config.toml, where it exists.",
    )
]
with_verdict = [
    *with_site,
    click.option(
        "--optional",
        multiple=True,
        metavar="SOURCE",
        help="A source that this node can do without (nvml, kernel-log, engine-log, engine-metrics): "
        "unseen, it does not make the verdict incomplete; repeatable.",
    ),
]
with_format = [
    click.option(
        "--format",
        "form",
        type=click.Choice(["console", "json", "markdown", "nagios", "node-health"]),
        default="console",
        show_default=True,
        help="How the report is told. node-health: for Slurm and node-problem-detector, in one line whether the node "
        "is fit for work; exit code 0 fit, 1 not fit, 2 could not be told.",
    )
]


def options(*groups: list[Callable[[F], F]]) -> Callable[[F], F]:
    """Decorate a command with groups of options."""

    def decorate(command: F) -> F:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return decorate


@click.group(cls=FrontDoor, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="gpu-doctor")
def cli() -> None:
    """Tell what is wrong with this LLM-serving GPU node, why, and what to do.

    Exit code: 0 clear or notice, 1 warning, 2 critical, 3 incomplete or could not run.
    """


@cli.command()
@options(with_node, with_verdict, with_format)
@click.option(
    "--replay",
    type=FILE,
    metavar="FILE",
    help="Judge a recording, or a flight recorder's folder, instead of this node.",
)
@click.option(
    "--for",
    "seconds",
    type=Seconds(min=0),
    default=CHECK_SECONDS,
    metavar="SECONDS",
    show_default=True,
    help="How long to look, one visit a second.",
)
@click.pass_context
def check(
    ctx: click.Context,
    *,
    simulate: str | None,
    faults: tuple[str, ...],
    root: Path,
    config: Path | None,
    optional: tuple[str, ...],
    form: str,
    replay: Path | None,
    seconds: float,
) -> None:
    """Judge this node now."""
    site = _site(config)
    if replay is not None and (simulate is not None or faults):
        raise click.UsageError("--replay judges a recording, --simulate a node: choose one")
    if replay is not None:
        visits = _closable(_replayed(replay))
    else:
        visits = _visits(site, simulate, faults, root, times=1 + round(seconds))
    unneeded = _optional(site, optional)
    ctx.exit(_told(_last_report(visits, site, unneeded), form, unneeded))


@cli.command()
@options(with_node, with_site)
@click.option(
    "--for",
    "seconds",
    type=Seconds(min=0),
    default=60.0,
    metavar="SECONDS",
    show_default=True,
    help="How long to record, one visit a second. Ctrl-C ends it earlier; what was written is whole.",
)
@click.option("-o", "--output", type=FILE, required=True, metavar="FILE", help="The recording.")
def record(
    *,
    simulate: str | None,
    faults: tuple[str, ...],
    root: Path,
    config: Path | None,
    seconds: float,
    output: Path,
) -> None:
    """Write what the visits saw, for `check --replay`."""
    from doctor.feeds import recording

    visits = _visits(_site(config), simulate, faults, root, times=1 + round(seconds))
    number = 0
    try:
        with closing(visits):
            for _ in recording.write(visits, output, f"gpu-doctor {__version__}"):
                number += 1
    except KeyboardInterrupt:
        pass
    click.echo(f"{output}: {number} visits", err=True)


@cli.command()
@click.argument("files", nargs=-1, type=FILE, metavar="FILE…")
@click.option(
    "--at",
    metavar="TIME",
    help="Judge what the flight recorder saw then, instead of files: 02:10 (the last such), or 2026-11-21T02:10.",
)
@click.option(
    "--window", default="30m", metavar="SPAN", show_default=True, help="With --at: how much time around it to look at."
)
@options(with_state, with_site, with_format)
@click.pass_context
def triage(
    ctx: click.Context,
    *,
    files: tuple[Path, ...],
    at: str | None,
    window: str,
    state_dir: Path | None,
    config: Path | None,
    form: str,
) -> None:
    """Judge pasted evidence: an engine's log, dmesg, collect_env, nvidia-smi -q, topo -m, a metrics page.

    Any mix of them; the kind of a file is told by its content. With --at: judge the worst visit of that time.
    """
    import time

    if bool(files) == (at is not None):
        raise click.UsageError("triage judges FILE…, or with --at TIME the flight recorder: give one of them")
    site = _site(config)
    if at is not None:
        report = _report_of(at, window, _recorder_folder(state_dir), site)
    else:
        from doctor.feeds import evidence

        visits = _closable(evidence.read(files, now=time.time(), patterns=site.log_patterns))
        report = _last_report(visits, site, frozenset(site.optional))
    ctx.exit(_told(report, form, frozenset(site.optional)))


@cli.command()
@options(with_node, with_verdict, with_state)
@click.option(
    "--listen", default="127.0.0.1:9481", metavar="HOST:PORT", show_default=True, help="Where to serve /metrics."
)
@click.option(
    "--interval",
    type=Seconds(min=0.1),
    default=15.0,
    metavar="SECONDS",
    show_default=True,
    help="Time between visits.",
)
@click.option(
    "--web-config",
    "--web.config.file",
    "web_config",
    type=FILE,
    metavar="FILE",
    help="TLS, client certificates and passwords, as in the Prometheus exporter-toolkit; read again when it changes.",
)
def daemon(
    *,
    simulate: str | None,
    faults: tuple[str, ...],
    root: Path,
    config: Path | None,
    optional: tuple[str, ...],
    state_dir: Path | None,
    listen: str,
    interval: float,
    web_config: Path | None,
) -> None:
    """Judge this node for ever, and serve /metrics, /healthz, /report and a page at /."""
    from doctor import daemon
    from doctor.collectors.gpu_access import GpuAccess
    from doctor.door.address import address

    site, at = _site(config), address(listen)
    recorder = _flight_recorder(state_dir or _service_folder(), site, simulated=simulate is not None)
    positions = recorder.positions if recorder else ()
    access = GpuAccess()
    daemon.run(
        _visits(site, simulate, faults, root, interval=interval, positions=positions, access=access),
        _rules(site),
        listen=at,
        interval_seconds=interval,
        keep_seconds=KEEP_SECONDS,
        version=__version__,
        optional=_optional(site, optional),
        silences=site.silence,
        web_config=web_config,
        recorder=recorder,
        access=access,
        control_folder=state_dir or _folder_of("RUNTIME_DIRECTORY") or _service_folder(),
    )


with_daemon = [
    click.option(
        "--state-dir",
        type=FILE,
        metavar="DIR",
        help="The daemon's --state-dir; default: the folders of the packaged service, /run/gpu-doctor and "
        "/var/lib/gpu-doctor.",
    )
]


@cli.command("release-gpu")
@click.option(
    "--for", "hold", default="10m", metavar="SPAN", show_default=True, help="How long at most: 90s, 30m; 4h at most."
)
@options(with_daemon)
def release_gpu(*, hold: str, state_dir: Path | None) -> None:
    """Have the running daemon let go of the GPUs, so that one can be reset or the driver unloaded.

    Meanwhile it says nothing of them, neither good nor bad. It takes them up again when the time is over, or with
    `gpu-doctor retake-gpu`. For its own user and root.
    """
    from doctor.collectors.gpu_access import HOLD_MAX_SECONDS, holders, words_of
    from doctor.control import Request, answer_of_daemon
    from doctor.recorder.moment import span

    seconds = span(hold)
    if not 0 < seconds <= HOLD_MAX_SECONDS:
        raise click.UsageError(f"--for {hold}: GPUs can be let go for {words_of(HOLD_MAX_SECONDS)} at most")
    answer_of_daemon(_daemon_folders(state_dir), Request(release_seconds=seconds))
    _say(
        f"GPU access let go for {words_of(seconds)}: gpu-doctor has no GPU open. Now run `nvidia-smi --gpu-reset -i N` or "
        "unload the driver, then `gpu-doctor retake-gpu`.\n"
    )
    if others := holders():
        _say(f"Others have one open still, and a reset needs them ended: {', '.join(others)}.\n")


@cli.command("retake-gpu")
@options(with_daemon)
def retake_gpu(*, state_dir: Path | None) -> None:
    """Have the running daemon take up the GPUs again that `release-gpu` made it let go of."""
    from doctor.control import Request, answer_of_daemon

    if answer_of_daemon(_daemon_folders(state_dir), Request()).was_released:
        _say("GPU access taken up again: the next visit reads the GPUs.\n")
    else:
        _say("GPU access had not been let go: nothing to do.\n")


def _daemon_folders(state_dir: Path | None) -> list[Path]:
    """Return where a daemon's socket may lie."""
    from doctor.control import SERVICE_FOLDER

    return [state_dir] if state_dir else [SERVICE_FOLDER, _service_folder() or STATE_FOLDER]


@cli.command()
@click.option("--since", default="1d", metavar="TIME", show_default=True, help="2h, 7d, 02:10, 2026-11-21T02:10.")
@click.option("--format", "form", type=click.Choice(["console", "json"]), default="console", show_default=True)
@options(with_state)
def history(*, since: str, form: str, state_dir: Path | None) -> None:
    """Tell which findings came and went, and when nobody looked, from the flight recorder."""
    import time

    from doctor.recorder.folder import Folder
    from doctor.recorder.moment import moment_or_span
    from doctor.recorder.timeline import timeline
    from exporters import history

    folder = Folder(_recorder_folder(state_dir))
    told = timeline(folder, moment_or_span(since, time.time()))
    _say(history.render_json(told).decode() if form == "json" else history.render(told, _terminal()))


@cli.command()
@click.argument("failure_mode", metavar="ID")
@options(with_site)
def explain(failure_mode: str, config: Path | None) -> None:
    """Show the runbook of a failure mode, or what is known of a code of the kernel log: `xid-79`, `sxid-20034`."""
    from exporters import codes, runbook

    rules = _rules(_site(config))
    rule = next((rule for rule in rules if rule.id == failure_mode), None)
    if rule is None:
        code = codes.code_screen(failure_mode, _terminal())
        if code is not None:
            _say(code)
            return
        import difflib

        near = difflib.get_close_matches(failure_mode, [rule.id for rule in rules], n=1)
        hint = f"; did you mean {near[0]}?" if near else "; `gpu-doctor rules` lists them"
        refuse(f"{failure_mode!r} is no failure mode{hint}")
    _say(runbook.render(rule.id, rule.runbook, _terminal()))


@cli.command()
@click.option("--list", "listing", is_flag=True, required=True, help="Name every profile and every fault.")
def simulate(listing: bool) -> None:  # noqa: ARG001 - the flag says what there is to do
    """Name the nodes and faults that `check`, `record` and `daemon` can simulate."""
    from exporters import catalogue

    _say(catalogue.drills_screen(_terminal()))


@cli.command()
@options(with_node, with_site)
@click.option("--format", "form", type=click.Choice(["console", "markdown"]), default="console", show_default=True)
def rules(*, simulate: str | None, faults: tuple[str, ...], root: Path, config: Path | None, form: str) -> None:
    """List every failure mode, its severity, what it needs, and whether this node can judge it."""
    from exporters import catalogue

    site = _site(config)
    if form == "markdown":
        _say(catalogue.rules_markdown(_rules(site), "rules/"))
        return
    report = _last_report(_visits(site, simulate, faults, root, times=1), site, frozenset(site.optional))
    _say(catalogue.rules_screen(_rules(site), report, _terminal()))


@cli.command("config")
@click.argument("file", required=False, type=FILE, metavar="[FILE]")
@click.pass_context
def configuration(ctx: click.Context, file: Path | None) -> None:
    """Check a configuration and the site's own rules, and say what they come to.

    Without FILE: the one that every command reads by itself, /etc/gpu-doctor/config.toml.
    """
    import time

    from doctor.drop_ins import is_refused
    from exporters import catalogue

    site = _site(file)
    rules = _rules(site)
    _say(catalogue.site_screen(site, rules, time.time(), _terminal()))
    ctx.exit(COULD_NOT_RUN if any(is_refused(rule) and rule.enabled for rule in rules) else 0)


@cli.command()
def schema() -> None:
    """Print the JSON Schema of `--format json`."""
    from exporters import json

    _say(json.schema().decode())


def _site(path: Path | None) -> Site:
    from doctor import config

    if path is not None:
        return config.read(path)
    if os.access(config.FILE, os.R_OK):
        if sys.stderr.isatty():
            click.echo(f"gpu-doctor: configured by {config.FILE}", err=True)
        return config.read(config.FILE)
    if os.path.lexists(config.FILE):
        click.echo(f"gpu-doctor: {config.FILE} may not be read by this user: judged without it", err=True)
    return config.Site()


def _rules(site: Site) -> tuple[AnyRule, ...]:
    from doctor import config
    from rules import RULES

    return config.rules_of(RULES, site)


def _optional(site: Site, names: tuple[str, ...]) -> frozenset[Source]:
    from doctor.snapshot import Source

    known = {source.value: source for source in Source}
    for name in names:
        if name not in known:
            refuse(f"--optional {name}: there is no such source; there are {', '.join(known)}")
    return frozenset(site.optional) | {known[name] for name in names}


def _visits(
    site: Site,
    simulate: str | None,
    faults: tuple[str, ...],
    root: Path,
    *,
    interval: float = 1.0,
    times: int | None = None,
    positions: tuple[Position, ...] = (),
    access: GpuAccess | None = None,
) -> Generator[Snapshot, None, None]:
    """Return the visits of this node, or of a simulated one; closing them lets go of the node."""
    if simulate is not None:
        from doctor.feeds import simulated

        visits = simulated.node(
            simulate,
            faults,
            every=interval,
            times=times,
            patterns=site.log_patterns,
            access=access,
            paces=site.collectors,
        )
        return _closable(visits)
    if faults:
        raise click.UsageError("--fault is of a simulated node: it needs --simulate PROFILE")
    from doctor.feeds import live

    collectors = live.collectors(
        root,
        logs=site.engine.logs,
        metrics=site.engine.metrics,
        patterns=site.log_patterns,
        positions=positions,
        access=access,
    )
    return _closable(live.every(interval, collectors, times, node=live.node_of(root), paces=site.collectors))


def _replayed(path: Path) -> Iterator[Snapshot]:
    if path.is_dir():
        from doctor.recorder.folder import Folder

        folder = Folder(path)
        if not folder.segments():
            refuse(f"{path}: a folder without a flight recorder's segments")
        return (entry.snapshot for entry in folder.entries())
    from doctor.feeds import recording

    return recording.read(path)


def _flight_recorder(directory: Path | None, site: Site, *, simulated: bool) -> FlightRecorder | None:
    if directory is None:
        return None
    from doctor.recorder.flight import FlightRecorder
    from doctor.recorder.folder import Bounds

    bounds = Bounds(max_bytes=site.recorder.max_bytes, max_age_seconds=site.recorder.max_age_days * 86400.0)
    return FlightRecorder(directory, bounds, keep_seconds=KEEP_SECONDS, simulated=simulated)


def _report_of(at: str, window: str, directory: Path, site: Site) -> Report:
    """Return what the flight recorder saw then."""
    import time

    from doctor.diagnose import watch
    from doctor.recorder.folder import Folder
    from doctor.recorder.incident import worst_report
    from doctor.recorder.moment import moment, span

    def watched(visits: Iterable[Snapshot], past: Sequence[Snapshot]) -> Iterator[Report]:
        return watch(visits, _rules(site), KEEP_SECONDS, frozenset(site.optional), site.silence, past=past)

    return worst_report(Folder(directory), moment(at, time.time()), span(window), KEEP_SECONDS, watched)


def _recorder_folder(state_dir: Path | None) -> Path:
    """Return where a daemon of this machine records."""
    return state_dir or _service_folder() or STATE_FOLDER


def _service_folder() -> Path | None:
    """Return the state folder that systemd gives the service."""
    return _folder_of("STATE_DIRECTORY")


def _folder_of(variable: str) -> Path | None:
    """Return a folder that systemd names to the service, the first where there are several."""
    told = os.environ.get(variable, "").partition(":")[0]
    return Path(told) if told else None


def _closable(visits: Iterator[Snapshot]) -> Generator[Snapshot, None, None]:
    yield from visits


def _last_report(visits: Generator[Snapshot, None, None], site: Site, optional: frozenset[Source]) -> Report:
    from doctor.diagnose import watch

    rules = _rules(site)

    last: Report | None = None
    with closing(visits):
        for report in watch(visits, rules, KEEP_SECONDS, optional, site.silence):
            last = report
    if last is None:
        refuse("there is no visit to judge: the recording ends behind its first line")
    return last


def _told(report: Report, form: str, optional: frozenset[Source]) -> int:
    """Print the report, and return the exit code that goes with its form."""
    if form == "json":
        from exporters import json

        _say(json.render(report).decode())
    elif form == "markdown":
        from exporters import markdown

        _say(markdown.render(report))
    elif form == "nagios":
        from exporters import nagios

        _say(nagios.render(report))
    elif form == "node-health":
        from exporters import node_health

        _say(node_health.render(report, optional))
        return node_health.fitness(report, optional)
    else:
        from exporters import console

        _say(console.render(report, _terminal()))
    return report.verdict.exit_code


def _terminal() -> Any:
    from exporters.terminal import terminal_of

    return terminal_of(sys.stdout, os.environ)


def _say(text: str) -> None:
    """Print; a character that the locale can't show becomes a question mark instead of an error."""
    encoding = sys.stdout.encoding or "utf-8"
    click.echo(text.encode(encoding, "replace").decode(encoding), nl=False)
