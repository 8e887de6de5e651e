"""The command line, run in the test's own process."""

import inspect

from typer.testing import CliRunner

from kvfold.bench.cli import app


def kvfold_command(*words: object, code: int | None = 0, columns: int = 200, **environment: str):
    """Runs a command, checks its exit code and returns the result, with stdout and stderr apart.

    Args:
        code: the exit code; None for any.

    An exception that the command does not turn into an exit code is raised.
    """
    mixes = "mix_stderr" in inspect.signature(CliRunner).parameters  # of an older click
    runner = CliRunner(mix_stderr=False) if mixes else CliRunner()  # pyright: ignore
    environment = {"COLUMNS": str(columns), "TERM": "dumb", **environment}
    result = runner.invoke(app, list(map(str, words)), env=environment)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert code is None or result.exit_code == code, result.output
    return result


def refused(*words: object, code: int = 2, **environment: str) -> str:
    """The one line on stderr that a wrong input gets."""
    line = kvfold_command(*words, code=code, **environment).stderr
    assert line.startswith("kvfold: ") and line.count("\n") == 1, line
    return line.rstrip("\n")
