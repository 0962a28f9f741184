"""Golden files: what an exporter writes, kept in `tests/screens/`; `GOLDEN=write pytest …` writes them anew."""

from __future__ import annotations

import os
from pathlib import Path

SCREENS = Path(__file__).parent / "screens"


def check(name: str, text: str) -> None:
    path = SCREENS / name
    if os.environ.get("GOLDEN") == "write":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{path.name} differs; look at it, then GOLDEN=write"
