"""What benchmarks that time variants share: their options, the machine, the table as JSON."""

import argparse
import json
import os
from importlib import metadata
from typing import Any

import jax


def command_line(description: str, seconds: float) -> argparse.ArgumentParser:
    """Options of all benchmarks that time variants.

    Args:
      description: the docstring of the benchmark, of which the first line is shown.
      seconds: for each variant, unless said otherwise.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--only", default="", help="part of the names of the variants to run")
    parser.add_argument("--seconds", type=float, default=seconds, help="measuring time of each variant")
    parser.add_argument("--json", help="write the table to this file too")
    return parser


def say_where(*distributions: str) -> None:
    """Prints the machine, its load, and the versions of what is installed."""
    versions = {}
    for name in distributions:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    print(f"{jax.default_backend()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {versions}")


def write_table(path: str | None, rows: Any) -> None:
    """As JSON, where a path is given."""
    if path:
        with open(path, "w") as file:
            json.dump(rows, file, indent=1)
