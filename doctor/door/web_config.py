"""The web configuration: TLS, users and headers, in the file format of the Prometheus exporter-toolkit.

Read again when the file, or a certificate that it names, changes. A bad one never replaces a good one.
"""

from __future__ import annotations

import importlib.util
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from doctor.door.address import DoorError
from exporters.wording import listed, plain

if TYPE_CHECKING:
    import yaml

FILE_BYTES_MAX = 1 << 20
"""A web configuration is a page of text."""

COST_MAX = 14
"""The highest bcrypt cost: one check takes about a second of a core. guess: htpasswd's own highest is 17."""

_HASH = re.compile(r"\$2[aby]\$(\d\d)\$[./A-Za-z0-9]{53}")
_HEADER_TEXT = re.compile(r"[\x20-\x7e]*")

SECTIONS = ("tls_server_config", "http_server_config", "basic_auth_users", "rate_limit")
TLS_KEYS = (
    "cert_file", "key_file", "client_auth_type", "client_ca_file", "client_allowed_sans", "min_version", "max_version",
    "prefer_server_cipher_suites",
)  # fmt: skip
HEADERS = (
    "Content-Security-Policy", "X-Frame-Options", "X-Content-Type-Options", "X-XSS-Protection",
    "Strict-Transport-Security",
)  # fmt: skip
"""Those that the toolkit allows."""

UNSUPPORTED = {
    "rate_limit": "the door bounds its clients itself",
    "cert": "name a file with cert_file",
    "key": "name a file with key_file",
    "client_ca": "name a file with client_ca_file",
    "cipher_suites": "OpenSSL's own choice stands; the system's openssl.cnf can narrow it",
    "curve_preferences": "OpenSSL's own choice stands; the system's openssl.cnf can narrow it",
    "TLS10": "it is insecure; TLS12 and TLS13 are there",
    "TLS11": "it is insecure; TLS12 and TLS13 are there",
    "RequestClientCert": "a certificate that nobody verifies proves nothing; VerifyClientCertIfGiven is there",
    "RequireClientCert": "a certificate that nobody verifies proves nothing; RequireAndVerifyClientCert is there",
    "RequireAnyClientCert": "a certificate that nobody verifies proves nothing; RequireAndVerifyClientCert is there",
}
"""What the toolkit knows and this program refuses, with the reason: nobody shall think himself protected who is not."""

VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
CLIENT_AUTH = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}


class WebConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Who may come in, and how."""

    tls: ssl.SSLContext | None = None
    client_names: frozenset[str] = frozenset()
    """A client's certificate must bear one of these as a subject alternative name; empty: any name will do."""
    users: Mapping[str, bytes] = {}
    """bcrypt hashes by user; empty: no password is asked for."""
    headers: Mapping[str, str] = {}
    files: tuple[Path, ...] = ()
    """Everything that it was read from."""


class WebConfigFile:
    """The web configuration in force. *path* None: there is none, and anybody who reaches the door may come in."""

    def __init__(self, path: Path | None) -> None:
        """Read it. Raises DoorError."""
        self._path = path
        self._stamp: tuple[tuple[int, ...], ...] = ()
        self.current = WebConfig()
        self.loaded: bool | None = None
        """Whether the last reading succeeded; None: there is no file."""
        self.loaded_at: float | None = None
        if path is not None:
            self._stamp = _stamp((path,))
            self._take(read(path))

    def reread(self) -> bool:
        """Read it again if it has changed, and return whether it had. Raises DoorError; then what was in force stays."""
        if self._path is None or (stamp := _stamp(self.current.files)) == self._stamp:
            return False
        self._stamp = stamp
        try:
            self._take(read(self._path))
        except DoorError:
            self.loaded = False
            raise
        return True

    def _take(self, config: WebConfig) -> None:
        if config.files != self.current.files:
            self._stamp = _stamp(config.files)
        self.current, self.loaded, self.loaded_at = config, True, time.time()


def _stamp(files: tuple[Path, ...]) -> tuple[tuple[int, ...], ...]:
    """Return what changes when one of the files does."""
    return tuple(map(_stamp_of, files))


def _stamp_of(file: Path) -> tuple[int, ...]:
    try:
        status = file.stat()
    except OSError:
        return ()  # a file that is gone has a stamp of its own
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def read(path: Path) -> WebConfig:
    """Return what the file says. Raises DoorError, its message naming file and line."""
    for name in ("yaml", "bcrypt"):  # told here, not at the first login
        if importlib.util.find_spec(name) is None:
            raise DoorError(f"--web-config needs {name}, which is not installed: pip install 'gpu-node-doctor[web]'")
    import yaml

    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES_MAX + 1)
        if len(raw) > FILE_BYTES_MAX:
            raise DoorError(f"{path}: a web configuration of more than {FILE_BYTES_MAX >> 20} MiB is none")
        root = _composed(raw.decode("utf-8"))
    except OSError as e:
        raise DoorError(f"{path}: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise DoorError(f"{path}: not UTF-8 text at byte {e.start}") from None
    except yaml.MarkedYAMLError as e:
        line = f":{e.problem_mark.line + 1}" if e.problem_mark else ""
        raise DoorError(f"{path}{line}: not YAML: {plain(e.problem or 'malformed')}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as e:
        raise DoorError(f"{path}: not YAML: {plain(str(e)) or 'nested too deep'}") from None
    whole = _Section(path, "the web configuration", root)
    whole.allow(SECTIONS)
    tls = whole.section("tls_server_config")
    http = whole.section("http_server_config")
    context, names, files = _tls(tls)
    http.allow(("http2", "headers"))
    http.boolean("http2")  # HTTP/1.1 is spoken whatever it says: every client of HTTP/2 speaks that too
    return WebConfig(
        tls=context,
        client_names=names,
        users=dict(_users(whole.section("basic_auth_users"))),
        headers=dict(_headers(http.section("headers"))),
        files=(path, *files),
    )


def _composed(text: str) -> yaml.Node | None:
    """Return the text as YAML nodes, which know the lines that they stand in. Raises yaml.YAMLError."""
    import yaml

    compose: Callable[..., yaml.Node | None] = yaml.compose  # type: ignore[reportUnknownMemberType] - PyYAML's stub leaves the stream untyped
    return compose(text, Loader=yaml.SafeLoader)


class _Section:
    """A mapping of the file, with the lines that its keys stand in."""

    def __init__(self, path: Path, name: str, node: yaml.Node | None, line: int = 1) -> None:
        import yaml

        self.path = path
        self.name = name
        self.line = line
        self.nodes: dict[str, yaml.Node] = {}
        self._lines: dict[str, int] = {}
        if node is None or (isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null")):
            return
        if not isinstance(node, yaml.MappingNode):
            raise DoorError(f"{path}:{line}: {name} must hold settings, `name: value`")
        pairs: list[tuple[Any, Any]] = node.value
        for key, value in pairs:
            text, at = str(key.value), int(key.start_mark.line) + 1
            if not isinstance(key, yaml.ScalarNode) or text == "<<":
                raise DoorError(f"{path}:{at}: a setting of {name} must have a plain name")
            if text in self.nodes:
                raise DoorError(f"{path}:{at}: {plain(text)} stands twice in {name}")
            self.nodes[text], self._lines[text] = value, at

    def refuse(self, key: str, why: str) -> DoorError:
        """Return the error that says where the key stands and what is wrong with it."""
        return DoorError(f"{self.path}:{self._lines.get(key, self.line)}: {plain(key)}{why}")

    def allow(self, keys: tuple[str, ...]) -> None:
        """Raise DoorError for a key that is not among these, or that the toolkit knows and this program does not."""
        for key in self.nodes:
            if key in UNSUPPORTED:
                raise self.refuse(key, f" is not supported: {UNSUPPORTED[key]}")
            if key not in keys:
                raise self.refuse(key, f" is no setting of {self.name}; there are {listed(keys)}")

    def section(self, key: str) -> _Section:
        """Return what the key holds; empty where it is not there."""
        return _Section(self.path, key, self.nodes.get(key), self._lines.get(key, self.line))

    def text(self, key: str) -> str | None:
        """Return the text of a key, or None where it is not there."""
        return self._scalar(key, "str", "text")

    def boolean(self, key: str) -> bool | None:
        """Return the yes or no of a key, or None where it is not there."""
        word = self._scalar(key, "bool", "true or false")
        return None if word is None else word.lower() in ("true", "yes", "on")

    def _scalar(self, key: str, tag: Literal["str", "bool"], what: str) -> str | None:
        import yaml

        node = self.nodes.get(key)
        if node is None:
            return None
        if not isinstance(node, yaml.ScalarNode) or not node.tag.endswith(f":{tag}"):
            raise self.refuse(key, f" must be {what}")
        return str(node.value)

    def texts(self, key: str) -> tuple[str, ...]:
        """Return the list of texts of a key; empty where it is not there."""
        import yaml

        node = self.nodes.get(key)
        if node is None:
            return ()
        if not isinstance(node, yaml.SequenceNode) or not all(isinstance(n, yaml.ScalarNode) for n in node.value):
            raise self.refuse(key, " must be a list of texts")
        return tuple(str(each.value) for each in node.value)

    def file(self, key: str) -> Path | None:
        """Return the path that a key names; a relative one begins at the configuration's folder."""
        text = self.text(key)
        return self.path.parent / text if text else None

    def choice(self, key: str, choices: tuple[str, ...]) -> str | None:
        """Return the word of a key, one of these, or None where it is not there."""
        word = self.text(key)
        if word in UNSUPPORTED:
            raise self.refuse(key, f": {word} is not supported: {UNSUPPORTED[word]}")
        if word is not None and word not in choices:
            raise self.refuse(key, f": there is no {plain(word)!r}; there are {listed(choices)}")
        return word


def _tls(section: _Section) -> tuple[ssl.SSLContext | None, frozenset[str], tuple[Path, ...]]:
    section.allow(TLS_KEYS)
    if not section.nodes:
        return None, frozenset(), ()
    certificate, key, client_ca = (section.file(name) for name in ("cert_file", "key_file", "client_ca_file"))
    for name, file in (("cert_file", certificate), ("key_file", key)):
        if file is None:
            raise section.refuse("tls_server_config", f" needs {name}")
    assert certificate is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = VERSIONS[section.choice("min_version", tuple(VERSIONS)) or "TLS12"]
    context.maximum_version = VERSIONS[section.choice("max_version", tuple(VERSIONS)) or "TLS13"]
    if context.minimum_version > context.maximum_version:
        raise section.refuse("min_version", " is above max_version")
    if section.boolean("prefer_server_cipher_suites") is not False:
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    else:
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        context.load_cert_chain(certificate, key, password=lambda: b"")  # never ask on the terminal
    except (OSError, ValueError) as e:
        raise section.refuse("cert_file", f" and key_file can't be used: {_tls_error(e, certificate, key)}") from None
    auth = section.choice("client_auth_type", tuple(CLIENT_AUTH)) or "NoClientCert"
    if client_ca is None and auth != "NoClientCert":
        raise section.refuse("client_auth_type", f": {auth} needs client_ca_file")
    if client_ca is not None:
        if auth == "NoClientCert":
            raise section.refuse("client_ca_file", " does nothing without client_auth_type: RequireAndVerifyClientCert")
        try:
            context.load_verify_locations(client_ca)
        except (OSError, ValueError) as e:
            raise section.refuse("client_ca_file", f" can't be used: {_tls_error(e, client_ca)}") from None
    context.verify_mode = CLIENT_AUTH[auth]
    names = frozenset(section.texts("client_allowed_sans"))
    if names and auth != "RequireAndVerifyClientCert":
        raise section.refuse("client_allowed_sans", " needs client_auth_type: RequireAndVerifyClientCert")
    return context, names, tuple(file for file in (certificate, key, client_ca) if file is not None)


def _tls_error(error: Exception, *files: Path | None) -> str:
    """Return what is wrong, in words: of a missing file its name, of a bad one OpenSSL's reason."""
    unreadable = next((why for file in files if file is not None and (why := _why_unreadable(file))), None)
    if unreadable is not None:
        return unreadable
    reason = error.reason if isinstance(error, ssl.SSLError) else str(error)
    return {
        "KEY_VALUES_MISMATCH": "the key is not that of the certificate",
        "NO_CERTIFICATE_OR_CRL_FOUND": "there is no PEM certificate in the file",
        "BAD_DECRYPT": "the key is encrypted with a passphrase; use one without",
    }.get(reason or "", plain(reason or "it is no PEM certificate or key").replace("_", " ").lower())


def _why_unreadable(file: Path) -> str | None:
    try:
        file.open("rb").close()
    except OSError as e:
        return f"{file}: {e.strerror}"
    return None


def _users(section: _Section) -> Iterator[tuple[str, bytes]]:
    for name in section.nodes:
        text = section.text(name) or ""
        cost = _HASH.fullmatch(text)
        if cost is None:
            raise section.refuse(name, " has no bcrypt hash; `htpasswd -nBC 10 NAME` makes one")
        if not 4 <= int(cost[1]) <= COST_MAX:
            raise section.refuse(name, f" has a hash of cost {int(cost[1])}; 4 to {COST_MAX} can be checked in time")
        yield name, text.encode("ascii")


def _headers(section: _Section) -> Iterator[tuple[str, str]]:
    section.allow(HEADERS)
    for name in section.nodes:
        value = section.text(name) or ""
        if _HEADER_TEXT.fullmatch(value) is None:
            raise section.refuse(name, " must be printable ASCII in one line")
        yield name, value
