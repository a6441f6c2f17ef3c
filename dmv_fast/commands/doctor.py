"""`dmv-fast doctor`."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`doctor` takes none."""


def run(args: argparse.Namespace) -> int:
    """Print versions, devices, backends and weights."""
    from dmv_fast.doctor import report

    print(report())
    return 0
