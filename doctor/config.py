"""The site's configuration: TOML laid over the rules' limits, and findings to be silent about. Unknown names are errors."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from doctor import drop_ins, log_patterns
from doctor.collectors.collector import DEADLINE_MIN_SECONDS, INTERVAL_SECONDS, Pace
from doctor.readers.patterns import LogPattern
from doctor.rule import AnyRule, Severity
from doctor.silence import Moment, Silence
from doctor.snapshot import OF_A_NODE, Source

FILE = Path("/etc/gpu-doctor/config.toml")
"""Read where no other file is named, and skipped where it does not exist."""

DAY_SECONDS = 86400.0


class ConfigError(Exception):
    """The configuration can't be used; the message names the file and the place."""


class EngineSite(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[engine]`: what the search for engines can't find out by itself."""

    logs: tuple[str, ...] = ()
    """Paths of engine logs, `journal:UNIT`, or `journal:FIELD=value` with a field of systemd.journal-fields(7)."""
    metrics: tuple[str, ...] = ()
    """URLs of engines' metrics pages."""


class RecorderSite(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[recorder]`: how much of the past the daemon's flight recorder keeps."""

    max_bytes: Annotated[int, msgspec.Meta(ge=1 << 20)] = 512 << 20
    """guess: ten days of an 8-GPU node at 10 s (benchmarks/recorder.py)."""
    max_age_days: Annotated[float, msgspec.Meta(gt=0)] = 14.0
    """guess: an incident is looked into within two weeks."""


class Sections(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a configuration file may hold."""

    optional: tuple[Source, ...] = ()
    """Essential sources that this site can do without: unseen, they don't make a report incomplete."""
    engine: EngineSite = EngineSite()
    collectors: dict[Source, Pace] = {}
    """`[collectors.<source>]`: how often a source is read, and how long a visit waits for it."""
    recorder: RecorderSite = RecorderSite()
    rules: dict[str, dict[str, Any]] = {}
    """`[rules.<id>]`: `enabled`, `severity`, and the names of the rule's limits."""
    silence: tuple[Silence, ...] = ()
    """`[[silence]]`: findings that the site knows of."""
    rules_folder: str = drop_ins.FOLDER
    """Where the site's own rules lie; empty: nowhere."""
    log_patterns: tuple[LogPattern, ...] = ()
    """`[[log_patterns]]`: failure modes that a line of a log tells."""


class Site(Sections, frozen=True, forbid_unknown_fields=True):
    """A site's own choices."""

    file: str = ""
    """The file that they stand in; empty: there is none."""


def read(path: Path) -> Site:
    """Read a configuration file. Raises ConfigError with the file and the place."""
    try:
        text = path.read_bytes()
    except OSError as e:
        msg = f"{path}: can't be read: {e.strerror}"
        raise ConfigError(msg) from e
    try:
        sections = msgspec.toml.decode(text, type=Sections, dec_hook=_of_toml)
    except (msgspec.DecodeError, ValueError, RecursionError) as e:
        words = str(e).replace("Object contains unknown field", "there is no setting")
        msg = f"{path}: {words}"
        raise ConfigError(msg) from e
    for source, pace in sections.collectors.items():
        if source not in OF_A_NODE:
            msg = f"{path}: [collectors.{source.value}]: no collector reads it"
            raise ConfigError(msg)
        if pace.interval_seconds is not None and source not in INTERVAL_SECONDS:
            others = " and ".join(other.value for other in INTERVAL_SECONDS)
            msg = (
                f"{path}: [collectors.{source.value}] interval_seconds: it is read at every visit, or its counters would "
                f"seem to stand still; an interval of its own have {others}"
            )
            raise ConfigError(msg)
        least = DEADLINE_MIN_SECONDS.get(source, 0.0)
        if pace.deadline_seconds is not None and pace.deadline_seconds < least:
            msg = (
                f"{path}: [collectors.{source.value}] deadline_seconds: at least {least:g}; what is only slow would be "
                "taken for dead"
            )
            raise ConfigError(msg)
    return Site(**{name: getattr(sections, name) for name in Sections.__struct_fields__}, file=str(path))


def _of_toml(wanted: type, value: object) -> object:
    """Return a value of TOML as the type that it stands for. Raises ValueError."""
    if wanted is not Moment:
        raise NotImplementedError(wanted)
    if isinstance(value, str):
        value = _written_moment(value)
    if isinstance(value, datetime.datetime):
        if value.tzinfo is None:
            msg = f"{value.isoformat()} does not tell its zone; write {value.isoformat()}Z or +01:00"
            raise ValueError(msg)
        return Moment(value.timestamp())
    if isinstance(value, datetime.date):  # "until the first" means that day, too
        midnight = datetime.datetime.combine(value, datetime.time(), datetime.timezone.utc)
        return Moment(midnight.timestamp() + DAY_SECONDS)
    msg = f"{value!r} is no date; 2026-12-31 is one, or 2026-12-31T18:00:00+01:00"
    raise ValueError(msg)


def _written_moment(text: str) -> object:
    """Return the date, or date and time, that a string holds, else the string."""
    try:
        return msgspec.convert(text, datetime.datetime if ":" in text else datetime.date)
    except msgspec.ValidationError:
        return text


def rules_of(shipped: Sequence[AnyRule], site: Site) -> tuple[AnyRule, ...]:
    """Return the rules that come with the program and the site's own, as the site wants them. Raises ConfigError."""
    taken = {rule.id for rule in shipped}
    for number, pattern in enumerate(site.log_patterns, 1):
        if pattern.id in taken:
            raise _refusal(site, f"[[log_patterns]] {number}: there is a rule {pattern.id} already")
        taken.add(pattern.id)
    named = {*site.rules, *(silence.rule for silence in site.silence)} - taken
    own = (*map(log_patterns.rule_of, site.log_patterns), *drop_ins.rules_of(site.rules_folder, taken, named))
    rules = lay_over((*shipped, *own), site)
    known = {rule.id for rule in rules}
    for number, pattern in enumerate(site.log_patterns, 1):
        for name in pattern.explains:
            if name not in known:
                raise _refusal(site, f"[[log_patterns]] {number}, explains {name}: there is no such rule")
    return rules


def lay_over(rules: Sequence[AnyRule], site: Site) -> tuple[AnyRule, ...]:
    """Return the rules as the site wants them. Raises ConfigError for an unknown rule or limit."""
    known = {rule.id for rule in rules}
    named = [(f"[rules.{name}]", name) for name in site.rules]
    named += [
        (f"[[silence]] {number}, rule {silence.rule}", silence.rule) for number, silence in enumerate(site.silence, 1)
    ]
    for place, name in named:
        if name not in known:
            raise _refusal(site, f"{place}: there is no such rule; `gpu-doctor rules` lists them")
    chosen: list[AnyRule] = []
    for rule in rules:
        wanted = dict(site.rules.get(rule.id, {}))
        enabled = wanted.pop("enabled", True)
        if not isinstance(enabled, bool):
            raise _refusal(site, f"[rules.{rule.id}] enabled: {enabled!r} is neither true nor false")
        severity = rule.severity
        if "severity" in wanted:
            word = str(wanted.pop("severity"))
            try:
                severity = Severity[word.upper()]
            except KeyError:
                words = ", ".join(s.word for s in Severity)
                raise _refusal(site, f"[rules.{rule.id}] severity: {word!r} is none of {words}") from None
        chosen.append(
            rule.but(enabled=enabled, severity=severity, limits=_limits(rule, wanted, site))
            if rule.id in site.rules
            else rule
        )
    return tuple(chosen)


def _refusal(site: Site, sentence: str) -> ConfigError:
    return ConfigError(f"{site.file}: {sentence}" if site.file else sentence)


def _limits(rule: AnyRule, wanted: dict[str, Any], site: Site) -> Any:
    limits: msgspec.Struct = rule.limits
    if drop_ins.is_refused(rule):
        return limits
    names = limits.__struct_fields__
    for name in wanted:
        if name not in names:
            there = f"it has {', '.join(names)}" if names else "it has none"
            raise _refusal(site, f"[rules.{rule.id}] {name}: there is no such limit; {there}")
    try:
        return msgspec.convert(msgspec.structs.asdict(limits) | wanted, type(limits))
    except msgspec.ValidationError as e:
        raise _refusal(site, f"[rules.{rule.id}]: {e}") from e
