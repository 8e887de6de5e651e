"""Files written in one step: the old one or the new one, never half."""

import os
import stat
import tempfile
from pathlib import Path


def write_text(text: str, file: Path) -> None:
    """Writes a file in one step, through a link if it is one, with the mode that it has.

    Raises:
        OSError: the directory or the file cannot be written; the old file stays.
    """
    file = file.resolve()
    mode = stat.S_IMODE(file.stat().st_mode) if file.exists() else 0o644
    handle, temporary = tempfile.mkstemp(dir=file.parent)
    try:
        with open(handle, "wb") as out:
            out.write(text.encode())
        os.chmod(temporary, mode)
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)  # still there only if something failed
