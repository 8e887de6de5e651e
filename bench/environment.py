"""What a measurement was made with: device, driver, versions, commit and table."""

import importlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import kvfold
from kvfold.runtime import compiler, dispatch

ROOT = Path(__file__).resolve().parents[1]


def environment(device: torch.device) -> dict[str, Any]:
    """The fields of records.Report for this device, this machine and this code, now."""
    drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": torch.cuda.get_device_name(device),
        "driver": drivers.splitlines()[0] if drivers else None,
        "versions": {
            "kvfold": kvfold.__version__,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cupy": _version("cupy"),
            "nvrtc": compiler.nvrtc_version() if compiler.unavailable() is None else None,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "table_fingerprint": dispatch.table().fingerprint,
    }


def commit() -> str | None:
    """KVFOLD_COMMIT, else the checkout's commit, '-dirty' if it is changed; None if no checkout."""
    if given := os.environ.get("KVFOLD_COMMIT"):
        return given
    found = _output("git", "-C", str(ROOT), "rev-parse", "--show-toplevel", "HEAD")
    if found is None:
        return None
    top, head = found.splitlines()
    if Path(top).resolve() != ROOT:
        return None  # another project's checkout, which kvfold is installed inside of
    return f"{head}-dirty" if _output("git", "-C", str(ROOT), "status", "--porcelain") else head


def _version(module: str) -> str | None:
    try:
        return importlib.import_module(module).__version__
    except ImportError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints; None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
