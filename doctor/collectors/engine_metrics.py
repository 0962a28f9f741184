"""Each engine's own Prometheus page, asked for on this node's addresses only."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from doctor.collectors import files
from doctor.collectors.collector import CannotSeeError, Reading, Visit
from doctor.readers import vllm_metrics
from doctor.snapshot import Absent, Engine, EngineMetrics, Source, Unseen, Why, or_none

DEFAULT_PORT = 8000
"""vLLM's."""

PATIENCE_SECONDS = 2.0
"""guess: a page of 600 lines takes milliseconds; an API server under full load may take a second."""

LEAST_SECONDS = 0.2
"""For an engine whose turn comes after slow ones."""
MARGIN_SECONDS = 0.5

MOST_BYTES = 16 << 20
"""A page of vLLM 0.32 with one engine has 90 KB."""

ANYWHERE = frozenset(("", "0.0.0.0", "::", "[::]", "*"))  # noqa: S104 - what an engine listens on, not what we do

_FOREIGN = "{} is not an address of this node, and no other node is asked"

_LEAF = re.compile(r"\|-- (\d+(?:\.\d+){3})\s*\n\s*/32 host LOCAL")


class MetricsPages:
    """The metrics pages of the engines that run here, and of those that the site names.

    *urls*: pages that the search can't find; only addresses of this node are asked.
    """

    source = Source.ENGINE_METRICS
    deadline_seconds = 5.0
    after_engines = True

    def __init__(self, root: Path = Path("/"), *, urls: tuple[str, ...] = ()) -> None:
        self.root = root
        self.urls = urls

    def collect(self, visit: Visit) -> Reading:
        """Ask each engine. Raises CannotSeeError when there is no page to read."""
        until = time.monotonic() + self.deadline_seconds - MARGIN_SECONDS
        pages: list[EngineMetrics] = []
        unseen: list[Unseen] = []
        for name, urls in self._wanted(visit.engines):
            own = [url for url in urls if self._of_this_node(url, visit.engines)]
            page = (
                _first_page(name, own, visit.at, until)
                if own or not urls
                else Absent(Why.NOT_ASKED, _FOREIGN.format(urls[0]))
            )
            if isinstance(page, Absent):
                unseen.append(Unseen(self.source, page, f"metrics of engine {name}"))
            else:
                pages.append(page)
        if not pages:
            raise CannotSeeError(unseen[0].why if unseen else _none_expected(visit.engines))
        return Reading(fields={"metrics": tuple(pages)}, unseen=tuple(unseen))

    def _wanted(self, engines: tuple[Engine, ...]) -> Iterator[tuple[str, list[str]]]:
        """Yield each engine's name with the URLs at which its page may be, the likeliest first."""
        named = list(self.urls)
        vllms = [engine for engine in engines if engine.kind == "vllm"]
        for engine in vllms:
            port = or_none(engine.flags.port) or DEFAULT_PORT
            own = [url for url in named if urlsplit(url).port == port or len(vllms) == 1]
            named = [url for url in named if url not in own]
            yield engine.id, own or list(self._urls_of(engine, port))
        for url in named:
            yield url, [url]

    def _of_this_node(self, url: str, engines: tuple[Engine, ...]) -> bool:
        host = urlsplit(url).hostname or ""
        return _is_own(host) or any(host in _addresses(self.root, engine.pid) for engine in engines)

    def _urls_of(self, engine: Engine, port: int) -> Iterator[str]:
        host = or_none(engine.flags.host) or ""
        secure = any(word.startswith(("--ssl-certfile", "--ssl-keyfile")) for word in engine.command_line)
        scheme = "https" if secure else "http"
        if self._shares_network(engine.pid):
            here = "127.0.0.1" if host in ANYWHERE else host
            yield f"{scheme}://[{here}]:{port}/metrics" if ":" in here else f"{scheme}://{here}:{port}/metrics"
        else:  # a container with its own network: reach it at the container's address
            for address in _addresses(self.root, engine.pid):
                yield f"{scheme}://{address}:{port}/metrics"

    def _shares_network(self, pid: int) -> bool:
        try:
            theirs = (self.root / f"proc/{pid}/ns/net").readlink()
            ours = (self.root / "proc/self/ns/net").readlink()
        except OSError:  # not ours to see: then try the host's own addresses
            return True
        return theirs == ours

    def close(self) -> None:
        """Nothing is held between visits."""


def _none_expected(engines: tuple[Engine, ...]) -> Absent:
    if engines:
        kinds = ", ".join(sorted({engine.kind for engine in engines}))
        return Absent(Why.NOT_SUPPORTED, f"the metrics page of {kinds} is not read")
    return Absent(Why.NOT_PRESENT, "no serving engine runs here")


def _addresses(root: Path, pid: int) -> list[str]:
    """Return the addresses of a process's network namespace."""
    try:
        text = files.text_of(root / f"proc/{pid}/net/fib_trie")
    except OSError:
        return []
    return sorted({address for address in _LEAF.findall(text) if not address.startswith("127.")})


def _is_own(host: str) -> bool:
    """Whether a server of this node can listen at *host*: then this process could too."""
    try:
        candidates = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, protocol, _, address in candidates:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            return True
    return False


def _first_page(name: str, urls: list[str], at: float, until: float) -> EngineMetrics | Absent:
    why = Absent(Why.NOT_PRESENT, "no address of the engine is known")
    for url in urls:
        page = _page(url, name, at, min(PATIENCE_SECONDS, max(LEAST_SECONDS, until - time.monotonic())))
        if not isinstance(page, Absent):
            return page
        why = page
    return why


def _page(url: str, name: str, at: float, patience_seconds: float) -> EngineMetrics | Absent:
    try:
        text = page_at(url, patience_seconds)
    except (OSError, http.client.HTTPException, ValueError) as e:
        if isinstance(e, ConnectionRefusedError):
            return Absent(Why.FAILED, f"nothing listens at {url}: the engine is starting, stopped, or on another port")
        if isinstance(e, TimeoutError):
            return Absent(Why.TIMED_OUT, f"{url} did not answer within {patience_seconds:.1f} s")
        return Absent(Why.FAILED, f"{url}: {e or type(e).__name__}")
    page = vllm_metrics.read(text, engine=name, at=at, url=url)
    return page or Absent(Why.FAILED, f"{url} is not the metrics page of a vLLM")


def page_at(url: str, patience_seconds: float = PATIENCE_SECONDS) -> str:
    """Return the page, at most MOST_BYTES of it. No proxy, no redirect, no credentials.

    Raises OSError, http.client.HTTPException, or ValueError for what is no URL and for any answer but 200.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port
    if parts.scheme not in {"http", "https"} or not host:
        msg = "not a URL of http or https"
        raise ValueError(msg)
    if parts.scheme == "https":
        # The page is read from this node itself and nothing is sent: a certificate for its outer name is no reason to
        # stay blind.
        unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        unverified.check_hostname = False
        unverified.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, port, timeout=patience_seconds, context=unverified)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=patience_seconds)
    try:
        connection.request("GET", parts.path or "/metrics", headers={"Accept": "text/plain", "Connection": "close"})
        answer = connection.getresponse()
        body = answer.read(MOST_BYTES)
    finally:
        connection.close()
    if answer.status != http.client.OK:
        msg = f"HTTP {answer.status} {answer.reason}"
        raise ValueError(msg)
    return body.decode("utf-8", "replace")
