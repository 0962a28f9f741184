"""The site's own rules: `<stem>.py` with its runbook `<stem>.md` in a folder that only root can change.

Their code runs with the rights of this program, so nothing is run that anybody but root could have written. Nothing is
believed of a path: each directory on the way is opened from the one above it, never through a link, and asked about by
its descriptor; what is compiled is the bytes that were read from the descriptor that was asked.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
import types
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import msgspec

from doctor.history import History
from doctor.readers import runbook
from doctor.rule import AnyRule, Finding, NoLimits, Rule, Severity
from doctor.snapshot import Absent, Source, Why

FOLDER = "/etc/gpu-doctor/rules.d"
"""Looked into where the configuration names no other folder, and skipped where it does not exist."""

FILE_MAX_BYTES = 1 << 20
"""guess: the longest rule of ours has 15 KiB."""

RULES_MAX = 200
"""guess: four times what this program comes with."""

ID = re.compile(r"[a-z][a-z0-9]{0,40}(?:-[a-z0-9]{1,40}){0,10}")
"""As the shipped ids are formed: it becomes a label, a file's name and a key of TOML."""

_ROOT = 0
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


class RefusedError(Exception):
    """A file or a folder is not used; the message says which, and why."""


def rules_of(folder: str, taken: Collection[str], named: Collection[str] = ()) -> tuple[AnyRule, ...]:
    """Return the rules in a folder, by name. *taken* ids are refused.

    What is refused comes back as a rule, too: one that can only say why it could not be judged. Where that is the whole
    folder, the ids that the configuration has *named* are taken for rules in it.
    """
    path = Path(folder)
    if not folder or (folder == FOLDER and not path.exists() and not path.is_symlink()):
        return ()
    try:
        with _opened_folder(path) as descriptor:
            stems = sorted(
                name.removesuffix(".py")
                for name in os.listdir(descriptor)  # noqa: PTH208 - a path has no descriptor
                if name.endswith(".py") and not name.startswith(".")
            )
            rules: list[AnyRule] = [_rule_or_refusal(descriptor, path, stem, taken) for stem in stems[:RULES_MAX]]
    except (RefusedError, OSError) as error:
        return tuple(_refused(name, _why(error, path)) for name in (path.name or "rules.d", *sorted(named)))
    if len(stems) > RULES_MAX:
        rules.append(_refused(path.name, f"{path}: only the first {RULES_MAX} of {len(stems)} rules are read"))
    return tuple(rules)


def is_refused(rule: AnyRule) -> bool:
    """Whether a rule stands for one that was refused: it has no limits of its own."""
    return isinstance(rule, _Refused)


class _Refused(Rule[NoLimits]):
    """In the place of a rule that is not used."""


def _refused(name: str, why: str) -> AnyRule:
    def judgement(history: History, limits: NoLimits) -> Iterator[Absent]:  # noqa: ARG001 - as every judgement
        yield Absent(Why.BROKEN, f"the rule is refused: {why}")

    rule = _Refused(
        judgement,
        id=name,
        title="A rule of the site's own, which is refused",
        severity=Severity.NOTICE,
        needs=(),
        explains=(),
        limits=NoLimits(),
    )
    rule.page = f"# A rule of the site's own, which is refused\n\n## Meaning\n\n{why}\n"
    return rule


def _why(error: Exception, path: Path) -> str:
    return (
        str(error) if isinstance(error, RefusedError) else f"{path}: {os.strerror(cast('OSError', error).errno or 0)}"
    )


def _rule_or_refusal(folder: int, path: Path, stem: str, taken: Collection[str]) -> AnyRule:
    name = stem.replace("_", "-")
    file = path / f"{stem}.py"
    try:
        if not ID.fullmatch(name) or "-" in stem:
            raise RefusedError(f"{file}: no name for a rule; fan_stopped.py is one, of the rule fan-stopped")
        if name in taken:
            raise RefusedError(f"{file}: there is a rule {name} already")
        code = _content(folder, f"{stem}.py", file)
        page = _content(folder, f"{stem}.md", path / f"{stem}.md").decode("utf-8", "replace")
        missing = [heading for heading in ("Meaning", "Fix") if not runbook.read(page).sections.get(heading)]
        if missing:
            raise RefusedError(f"{path / f'{stem}.md'}: the runbook has no section `## {missing[0]}`")
        return _declared(code, page, stem, name, file)
    except (RefusedError, OSError) as error:
        # Under the id of the rule that is there it would say that this one could not be judged.
        return _refused(f"{stem}.py" if name in taken or not ID.fullmatch(name) else name, _why(error, file))


def _declared(code: bytes, page: str, stem: str, name: str, file: Path) -> AnyRule:
    """Run a module, and return the rule that it declares."""
    module = types.ModuleType(f"site_rule_{stem}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # its limits' annotations are looked up there
    try:
        exec(compile(code, str(file), "exec", dont_inherit=True), module.__dict__)  # noqa: S102 - what a drop-in is
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        raise RefusedError(f"{file}: {type(error).__name__}: {error}"[:300]) from error
    rule: object = getattr(module, "RULE", None)
    if not isinstance(rule, Rule):
        raise RefusedError(f"{file}: declares no RULE")
    rule = cast("AnyRule", rule)
    told: dict[str, object] = vars(rule)
    for expected, right in (
        (f"the id {name}, as its file", rule.id == name),
        ("a title", isinstance(told["title"], str) and bool(rule.title.strip())),
        ("a Severity", isinstance(told["severity"], Severity)),
        ("a tuple of Sources as needs", _are(told["needs"], Source)),
        ("a tuple of ids as explains", _are(told["explains"], str)),
        ("a struct as limits", isinstance(told["limits"], msgspec.Struct)),
    ):
        if not right:
            raise RefusedError(f"{file}: RULE must have {expected}")
    rule.page = page
    rule.judgement = _with_checked_answers(rule.judgement)
    return rule


def _are(values: object, kind: type) -> bool:
    return isinstance(values, tuple) and all(isinstance(v, kind) for v in cast("tuple[object, ...]", values))


def _with_checked_answers(
    judgement: Callable[[History, Any], Iterator[Any]],
) -> Callable[[History, Any], Iterator[Any]]:
    """Return the judgement, held to answers whose fields have their types: exporters rely on them."""

    def judge(history: History, limits: Any) -> Iterator[Finding | Absent]:
        try:
            for answer in judgement(history, limits):
                if not isinstance(answer, Finding | Absent):
                    raise TypeError(f"it yields a {type(answer).__name__}, not a Finding")
                yield msgspec.convert(msgspec.to_builtins(answer), type(answer))
        except SystemExit as error:
            raise RuntimeError("it would have ended the program") from error

    return judge


# What is opened, and asked.


@contextmanager
def _opened_folder(path: Path) -> Generator[int, None, None]:
    """Open a folder, from the root down. Raises RefusedError or OSError."""
    if not path.is_absolute() or ".." in path.parts:
        raise RefusedError(f"{path}: is no absolute path")
    descriptor = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        here = Path("/")
        for name in path.parts[1:]:
            _demand_of_root(os.fstat(descriptor), here, sticky_is_enough=True)
            here /= name
            below = _opened(name, descriptor, os.O_DIRECTORY, here)
            os.close(descriptor)
            descriptor = below
        _demand_of_root(os.fstat(descriptor), here)
        yield descriptor
    finally:
        os.close(descriptor)


def _content(folder: int, name: str, path: Path) -> bytes:
    """Return what a file of the folder holds. Raises RefusedError or OSError."""
    with closing(os.fdopen(_opened(name, folder, os.O_NONBLOCK, path), "rb")) as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise RefusedError(f"{path}: is no regular file")
        _demand_of_root(state, path)
        content = file.read(FILE_MAX_BYTES + 1)
    if len(content) > FILE_MAX_BYTES:
        raise RefusedError(f"{path}: is larger than {FILE_MAX_BYTES >> 20} MiB")
    return content


def _opened(name: str, folder: int, flags: int, path: Path) -> int:
    try:
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise RefusedError(f"{path}: is a symbolic link, or not what it should be") from error
        raise RefusedError(f"{path}: can't be opened: {error.strerror}") from error


def _demand_of_root(state: os.stat_result, path: Path, *, sticky_is_enough: bool = False) -> None:
    """Raise RefusedError where somebody but root could change it.

    *sticky_is_enough*: of a directory on the way; in one like /tmp nobody can replace what is root's.
    """
    if state.st_uid != _ROOT:
        raise RefusedError(f"{path}: belongs to user {state.st_uid}, not to root")
    if state.st_mode & _OTHERS_MAY_WRITE and not (sticky_is_enough and state.st_mode & stat.S_ISVTX):
        who = "others than root" if state.st_mode & stat.S_IWOTH else "its group"
        raise RefusedError(f"{path}: may be written by {who}; `chmod go-w {path}`")
