"""The wheel, not only the editable install, holds all that kvfold reads at run time."""

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="building a wheel offline needs setuptools")

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"kernels": "kvfold", "codegen": "kvfold/codegen", "bench": "kvfold/bench"}
SUFFIXES = (".py", ".cuh", ".cu", ".j2", ".yaml", ".typed")

USE = """
import kvfold, kvfold.step, kvfold.codegen as codegen, kvfold.torch_ops
from kvfold.bench import cli
from kvfold.codegen import op_specs
from kvfold.runtime import compiler
from kvfold.workload import workload
assert kvfold.__file__.startswith({installed!r}), kvfold.__file__
table = codegen.load_table()
assert str(table.path).startswith({installed!r}), table.path
rendered = codegen.render(table)
headers = compiler.headers_of(rendered.instantiations)
assert rendered.headers.items() <= headers.items()
assert "device/types.cuh" in headers and "ops/paged_kv_compress/kernel.cuh" in headers
assert all(workload(op).spec is spec for op, spec in op_specs().items())
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what a wheel is built from: a build writes into its source."""
    copy = tmp_path_factory.mktemp("source")
    for part in ("src", *PACKAGES):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / part, copy / part, symlinks=True, ignore=ignored)
    for name in ("configs.yaml", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def test_the_wheel_holds_the_package_and_works(source, tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"{package}/{file.relative_to(source / folder)}"
        for folder, package in PACKAGES.items()
        for file in (source / folder).rglob("*")
        if file.suffix in SUFFIXES
    }
    assert names == expected
    assert {"kvfold/codegen/configs.yaml", "kvfold/py.typed"} < names
    table = (installed / "kvfold/codegen/configs.yaml").read_bytes()
    assert table == (source / "configs.yaml").read_bytes()

    entry_points = configparser.ConfigParser()
    entry_points.read(next(installed.glob("*.dist-info")) / "entry_points.txt")
    assert dict(entry_points["console_scripts"]) == {"kvfold": "kvfold.bench.__main__:main"}

    # The wheel goes before the editable install; other packages come from where they are.
    program = f"import sys; sys.path.insert(0, {str(installed)!r})\n"
    program += USE.format(installed=str(installed))
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


# ---- without the packages of the command line ----------------------------------------------------


def run_without(package: str, program: str) -> subprocess.CompletedProcess:
    """A new process in which a package is not installed."""
    program = f"import sys; sys.modules[{package!r}] = None\n{program}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_the_command_line_says_what_to_install(package):
    done = run_without(package, "from kvfold.bench.__main__ import main; main()")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (f"kvfold: the command line needs {package}: pip install 'kvfold[cli]'\n")


def test_another_missing_package_is_not_taken_for_the_command_lines():
    done = run_without("yaml", "from kvfold.bench.__main__ import main; main()")
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr and "kvfold[cli]" not in done.stderr


def test_the_package_works_without_the_command_lines_packages():
    program = "sys.modules['rich'] = None; import kvfold, kvfold.step; kvfold.paged_kv_compress"
    done = run_without("typer", program)
    assert done.returncode == 0, done.stderr
