"""`python -m doctor` and the `gpu-doctor` command."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    from doctor.cli import cli

    cli(prog_name="gpu-doctor")


if __name__ == "__main__":
    main()
