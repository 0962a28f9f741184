"""The front door: wires rooms together and holds no logic."""

from __future__ import annotations

import click


@click.group()
@click.version_option(package_name="gpu-node-doctor", prog_name="gpu-doctor")
def cli() -> None:
    """Tell what is wrong with this LLM-serving GPU node, why, and what to do."""
