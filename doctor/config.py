"""The site's configuration: TOML laid over the rules' limits. Unknown names are errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from doctor.rule import AnyRule, Severity
from doctor.snapshot import Source


class ConfigError(Exception):
    """The configuration can't be used; the message names the file and the place."""


class EngineSite(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[engine]`: what the search for engines can't find out by itself."""

    logs: tuple[str, ...] = ()
    """Paths of engine logs, or `journal:UNIT`."""
    metrics: tuple[str, ...] = ()
    """URLs of engines' metrics pages."""


class Site(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A site's own choices."""

    optional: tuple[Source, ...] = ()
    """Essential sources that this site can do without: unseen, they don't make a report incomplete."""
    engine: EngineSite = EngineSite()
    rules: dict[str, dict[str, Any]] = {}
    """`[rules.<id>]`: `enabled`, `severity`, and the names of the rule's limits."""


def read(path: Path) -> Site:
    """Read a configuration file. Raises ConfigError with the file and the place."""
    try:
        text = path.read_bytes()
    except OSError as e:
        msg = f"{path}: can't be read: {e.strerror}"
        raise ConfigError(msg) from e
    try:
        return msgspec.toml.decode(text, type=Site)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        words = str(e).replace("Object contains unknown field", "there is no setting")
        msg = f"{path}: {words}"
        raise ConfigError(msg) from e


def lay_over(rules: Sequence[AnyRule], site: Site) -> tuple[AnyRule, ...]:
    """Return the rules as the site wants them. Raises ConfigError for an unknown rule or limit."""
    known = {rule.id for rule in rules}
    for name in site.rules:
        if name not in known:
            msg = f"[rules.{name}]: there is no such rule; `gpu-doctor rules` lists them"
            raise ConfigError(msg)
    chosen: list[AnyRule] = []
    for rule in rules:
        wanted = dict(site.rules.get(rule.id, {}))
        if not wanted.pop("enabled", True):
            continue
        severity = rule.severity
        if "severity" in wanted:
            word = str(wanted.pop("severity"))
            try:
                severity = Severity[word.upper()]
            except KeyError:
                words = ", ".join(s.word for s in Severity)
                msg = f"[rules.{rule.id}] severity: {word!r} is none of {words}"
                raise ConfigError(msg) from None
        chosen.append(rule.but(severity=severity, limits=_limits(rule, wanted)) if rule.id in site.rules else rule)
    return tuple(chosen)


def _limits(rule: AnyRule, wanted: dict[str, Any]) -> Any:
    limits: msgspec.Struct = rule.limits
    names = limits.__struct_fields__
    for name in wanted:
        if name not in names:
            there = f"it has {', '.join(names)}" if names else "it has none"
            msg = f"[rules.{rule.id}] {name}: there is no such limit; {there}"
            raise ConfigError(msg)
    try:
        return msgspec.convert(msgspec.structs.asdict(limits) | wanted, type(limits))
    except msgspec.ValidationError as e:
        msg = f"[rules.{rule.id}]: {e}"
        raise ConfigError(msg) from e
