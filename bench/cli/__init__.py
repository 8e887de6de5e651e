"""The command line: parses, calls the library, prints. `kvfold --help` lists the commands."""

from collections.abc import Sequence

from kvfold.bench.cli import bench, build, demo, step, table, tune  # noqa: F401  they add commands
from kvfold.bench.cli.common import app

__all__ = ["app", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0, 1 for a kernel that is wrong, 2 for a wrong input."""
    app(args=arguments, prog_name="kvfold")
