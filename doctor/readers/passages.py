"""Passages: where a document of some kind stands in a longer text, told line by line."""

from __future__ import annotations

from collections.abc import Callable, Iterator


def passages(
    text: str,
    begins: Callable[[str], object],
    belongs: Callable[[str], object],
    *,
    divides: Callable[[str], object] | None = None,
) -> Iterator[tuple[int, int]]:
    """Yield start and end of each run of lines that *begins* opens and that lasts while each line *belongs*.

    A line that *divides* opens a new run even inside one. Blank lines at a run's end are no part of it.
    """
    start: int | None = None
    position = end = 0
    for line in text.splitlines(keepends=True):
        plain = line.rstrip("\r\n")
        if (divides is not None and divides(plain)) or (start is None and begins(plain)):
            if start is not None:
                yield start, end
            start = position
        elif start is not None and not belongs(plain):
            yield start, end
            start = None
        position += len(line)
        if plain.strip():
            end = position
    if start is not None:
        yield start, end
