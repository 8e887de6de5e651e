"""Files that are replaced in one step: a reader sees the old contents or the new, never a part."""

import os
import stat
import uuid
from pathlib import Path


def replace_file(file: Path, data: bytes) -> None:
    """Writes a file in one step. A link is followed.

    A file that exists keeps its mode; a new one gets the mode that the umask gives.

    Raises:
        OSError: the directory cannot be written, or the file is read-only. The old file stays.
    """
    file = file.resolve()
    mode = stat.S_IMODE(file.stat().st_mode) if file.exists() else None
    if mode is not None and not mode & 0o222:
        raise PermissionError(13, "read-only file", str(file))
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as out:
            out.write(data)
        if mode is not None:
            os.chmod(temporary, mode)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)  # still there only after an error
