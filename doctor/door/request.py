"""Requests taken apart: the head of an HTTP/1 request, bytes in, a value or a refusal out."""

from __future__ import annotations

import re
from http import HTTPStatus

import msgspec

HEAD_BYTES_MAX = 16 << 10
"""The longest request line and headers together. guess: Prometheus sends 500 bytes, a browser with cookies some thousand."""

HEADERS_MAX = 100
"""guess: a browser behind two proxies sends thirty."""

_LINE = re.compile(rb"([A-Z]{1,16}) (/[\x21-\x7e]*|\*|[a-z]+://[\x21-\x7e]+) HTTP/1\.([01])")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00\r\n]*?)[ \t]*")
"""RFC 9110 5.5 and 5.6.2: no blank before the colon, no line that goes on on the next, which two readers may see differently."""


class Request(msgspec.Struct, frozen=True):
    """What a client asks for."""

    method: str
    path: str
    """Without its query."""
    headers: dict[str, str]
    """By name in lower case; what stands there several times is joined by commas."""
    keep_alive: bool
    """Whether the client wants to ask again over this connection."""


class RefusedError(Exception):
    """A request that gets no answer but this status and sentence."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def read(head: bytes) -> Request:
    """Return the request whose head this is, up to the empty line. Raises RefusedError."""
    line, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    asked = _LINE.fullmatch(line)
    if asked is None:
        raise RefusedError(HTTPStatus.BAD_REQUEST, "this is no HTTP/1 request")
    if len(lines) > HEADERS_MAX:
        raise RefusedError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"more than {HEADERS_MAX} headers")
    headers: dict[str, str] = {}
    for each in lines:
        header = _HEADER.fullmatch(each)
        if header is None:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "a header is malformed")
        name, value = header[1].decode("ascii").lower(), header[2].decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    said = headers.get("connection", "").lower()
    keep_alive = "close" not in said if asked[3] == b"1" else "keep-alive" in said
    # Nobody sends a body with a question; where one does, it is not read, and nothing after it is taken for a request.
    bodiless = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"
    path = asked[2].decode("ascii").partition("?")[0]
    return Request(asked[1].decode("ascii"), path, headers, keep_alive and bodiless)


def accepted(header: str, offered: tuple[str, ...]) -> str | None:
    """Return which of *offered* (media types, or codings; the first is preferred) an Accept header wants most.

    None: none of them. An empty header wants the first.
    """
    if not header.strip():
        return offered[0]
    best: tuple[float, str] | None = None
    wants = [_want(part) for part in header.split(",")]
    for offer in offered:
        kind = offer.partition(";")[0]
        ranges = (kind, f"{kind.partition('/')[0]}/*", "*/*", "*")
        matching = [(ranges.index(word), -quality) for word, quality in wants if word in ranges]
        if matching:
            quality = -min(matching)[1]  # the most exact range decides; of several versions the most wanted
            if quality > 0 and (best is None or quality > best[0]):
                best = (quality, offer)
    return best[1] if best else None


def _want(part: str) -> tuple[str, float]:
    word, *parameters = (piece.strip().lower() for piece in part.split(";"))
    quality = next((value for name, _, value in (p.partition("=") for p in parameters) if name.strip() == "q"), "1")
    try:
        return word, min(1.0, max(0.0, float(quality)))
    except ValueError:
        return word, 0.0
