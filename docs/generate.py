"""Write what the documentation says about the code from the code: `make docs`.

Tables of failure modes, metrics and the samples' scoring, the schema of the report, alerts, the dashboard, and the picture of a terminal in the README,
which is a real run on a simulated node.
"""

from __future__ import annotations

import re
import runpy
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from xml.sax.saxutils import escape

from doctor.diagnose import watch
from exporters import catalogue, codes, console
from exporters import json as json_report
from exporters.prometheus import Own, Tally, families
from exporters.terminal import Terminal
from rules import RULES

ROOT = Path(__file__).parent.parent
PICTURE = "docs/terminal.svg"
PROFILE, FAULT = "dgx-h100-4of8", "gpu-lost:gpu=2"
"""The incident of `make demo`."""


def generated() -> Iterator[tuple[str, str]]:
    """Yield each generated file and what it should hold; the picture, which tells the time, is not among them."""
    table = catalogue.rules_markdown(RULES, "../rules/")
    yield "docs/failure-modes.md", f"# Failure modes\n\nGenerated from the rules by `make docs`.\n\n{table}"
    yield "docs/xids.md", codes.codes_markdown("../rules/")
    yield "docs/metrics.md", metrics()
    yield "docs/report.schema.json", json_report.schema().decode()
    confusion = runpy.run_path(str(ROOT / "docs" / "confusion.py"))["page"]()
    if confusion is not None:
        yield "docs/confusion.md", confusion
    alerts = runpy.run_path(str(ROOT / "docs" / "alerts.py"))
    rules = alerts["page"]()
    yield "packaging/prometheus/gpu-doctor.rules.yml", rules
    yield "packaging/kubernetes/monitoring/prometheus-rule.yaml", prometheus_rule(rules)
    yield "packaging/prometheus/alertmanager-example.yml", alerts["alertmanager_page"]()
    if find_spec("grafana_foundation_sdk"):  # which needs Python 3.11: elsewhere the file stays as it is
        dashboard = runpy.run_path(str(ROOT / "docs" / "dashboard.py"))
        yield "packaging/grafana/gpu-doctor.json", dashboard["page"]()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    yield "README.md", between_marks(readme, "failure modes", catalogue.rules_markdown(RULES, "rules/"))


def between_marks(text: str, name: str, content: str) -> str:
    """Return *text* with the part between `<!-- name -->` and `<!-- end of name -->` replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    head, _, rest = text.partition(begin)
    _, found, tail = rest.partition(end)
    assert found, f"the marks of {name} are missing"
    return f"{head}{begin}\n{content}{end}{tail}"


def prometheus_rule(alerts: str) -> str:
    """Return the rules of a Prometheus as the Prometheus operator takes them."""
    comments, groups, rest = alerts.partition("groups:\n")
    head = "apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata:\n  name: gpu-doctor\nspec:\n"
    return comments + head + textwrap.indent(groups + rest, "  ")


def metrics() -> str:
    """Return every metric as a Markdown table."""
    rows = [
        f"| `{family.name}` | {family.kind} | {', '.join(f'`{label}`' for label in family.labels)} | {family.help} |"
        for family in families(None, Tally(), Own(version=""))
    ]
    head = (
        "# Metrics\n\nGenerated from the exporter by `make docs`. A value that was not seen has no sample; when the last\n"
        "report is older than three intervals, only the daemon's own metrics are left.\n\n"
    )
    return head + "\n".join(["| metric | type | labels | what it tells |", "|---|---|---|---|", *rows]) + "\n"


COLUMN, LINE, SIZE = 8.43, 18, 14
"""Pixels of a character of a 14-pixel monospaced font, and of a line."""
STYLES = {"1": "b", "2": "d", "1;31": "r", "1;33": "y", "32": "g", "36": "c"}
SHEET = (
    f"text{{font:{SIZE}px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:#d8dee9;white-space:pre}}"
    ".b{font-weight:bold}.d{fill:#8b95a5}.r{fill:#ff6b6b;font-weight:bold}.y{fill:#ffd166;font-weight:bold}"
    ".g{fill:#8fd694}.c{fill:#7fd1e8}"
)


def picture(screen: str, width: int) -> str:
    """Return a coloured screen as SVG."""
    lines = screen.splitlines()
    size = f'width="{width * COLUMN + 32:.0f}" height="{len(lines) * LINE + 32}"'
    body = "\n".join(
        f'<text x="{16 + (len(line) - len(line.lstrip())) * COLUMN:.1f}" y="{16 + SIZE + number * LINE}">'
        f"{''.join(spans(line.lstrip()))}</text>"
        for number, line in enumerate(lines)
        if line
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="gpu-doctor check on a terminal">\n'
        f'<style>{SHEET}</style>\n<rect width="100%" height="100%" rx="8" fill="#1b1f27"/>\n{body}\n</svg>\n'
    )


def spans(line: str) -> Iterator[str]:
    """Yield the parts of a coloured line as SVG."""
    for code, text in re.findall(r"(?:^|\x1b\[([\d;]*)m)([^\x1b]*)", line):
        style = STYLES.get(code)
        kept = escape(text).replace(" ", "\u00a0")  # not every renderer honours `white-space: pre`
        yield f'<tspan class="{style}">{kept}</tspan>' if style else kept


def screen() -> str:
    """Return the screen of a real run: the command, and what it says."""
    from doctor.feeds import simulated

    *_, report = watch(simulated.node(PROFILE, (FAULT,), every=1.0, times=2), RULES, 3600.0)
    command = f"$ gpu-doctor check --simulate {PROFILE} --fault {FAULT}"
    return f"{command}\n\n{console.render(report, Terminal(width=96, colour=True))}"


if __name__ == "__main__":
    for name, text in generated():
        (ROOT / name).write_text(text, encoding="utf-8")
    (ROOT / PICTURE).write_text(picture(screen(), 96), encoding="utf-8")
