"""`python -m kvfold.bench`: the `kvfold bench` command; any other command may be named instead."""

import sys

from kvfold.bench.cli import main

if __name__ == "__main__":  # `kvfold build` starts processes that import this file again
    arguments = sys.argv[1:]
    named = bool(arguments) and not arguments[0].startswith("-")
    main(arguments if named else ["bench", *arguments])
