"""`python -m kvfold.bench` is the command line `kvfold`."""

import signal
import sys


def main() -> None:
    """Runs the command line; without the packages that it needs, says what to install."""
    # An import that Ctrl-C interrupts can fail in any way. Until the imports are done, Ctrl-C ends
    # the process at once.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from kvfold.bench.cli import app
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.exit(f"kvfold: the command line needs {package}: pip install 'kvfold[cli]'")
    signal.signal(signal.SIGINT, before)
    app(prog_name="kvfold")


if __name__ == "__main__":
    main()
