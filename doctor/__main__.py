"""`python -m doctor` and the `gpu-doctor` command."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line."""
    from doctor.cli import cli

    for end in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(end) is signal.SIG_DFL:  # under nohup it stays ignored
            signal.signal(end, signal.default_int_handler)  # like Ctrl-C, so that feeds are closed on the way out
    cli(prog_name="gpu-doctor")


if __name__ == "__main__":
    main()
