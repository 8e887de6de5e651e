"""The wheel, not only the editable install, holds all that kvfold reads at run time."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="building a wheel offline needs setuptools")


def test_the_wheel_holds_the_table_the_templates_and_the_headers(tmp_path):
    root = Path(__file__).parents[1]
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", tmp_path, root], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    program = (
        "import kvfold, kvfold.step, kvfold.codegen as codegen\n"
        "from kvfold import nvrtc\n"
        "from kvfold.bench import cli, row_by_row\n"
        f"assert kvfold.__file__.startswith({str(installed)!r}), kvfold.__file__\n"
        "table = codegen.load_table()\n"
        "print(len(codegen.render(table).instantiations) > 1000, sorted(nvrtc._headers()))\n"
    )
    # -S and a bare path would lose torch: the wheel only goes before the editable install.
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(installed)!r})\n{program}"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert found.split(maxsplit=1)[0] == "True"
    assert "common.cuh" in found and "paged_kv_compress/kernel.cuh" in found
