"""The command line: parses, calls the library, prints. `kvfold --help` lists the commands.

It exits with 0, with 1 for a kernel that is wrong, or with 2 for a wrong input.
"""

from kvfold.bench.cli import bench, build, demo, step, table, tune  # noqa: F401  they add commands
from kvfold.bench.cli.common import app

__all__ = ["app"]
