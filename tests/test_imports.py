"""What an import loads, and what the package's attributes are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kvfold
from kvfold.codegen import op_specs
from kvfold.runtime.torch_op import TorchOp, torch_op

HEAVY = ("torch", "triton", "cupy", "cupy_backends", "typer", "rich", "matplotlib")


def loaded_by(program: str) -> set[str]:
    """The heavy packages that a new process has loaded after a program."""
    program += f"\nimport sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "program",
    [
        "import kvfold; assert kvfold.__version__",
        "import kvfold.codegen",
        "from kvfold.codegen import op_specs; assert op_specs()",
        "from kvfold.codegen import load_table, render; render(load_table())",
        "import kvfold.runtime.cubin_cache",
        "import kvfold; assert not hasattr(kvfold, 'no_such_op')",
    ],
)
def test_these_load_no_torch(program):
    assert loaded_by(program) == set()


def test_an_op_loads_torch_at_first_use_and_no_command_line():
    loaded = loaded_by("import kvfold; kvfold.paged_kv_compress")
    assert "torch" in loaded
    assert loaded.isdisjoint({"typer", "rich", "matplotlib", "triton"})


# ---- attributes of the package -------------------------------------------------------------------


@pytest.mark.parametrize("op", op_specs())
def test_every_op_is_an_attribute(op):
    function = getattr(kvfold, op)
    assert callable(function)
    assert function is getattr(kvfold, op)
    assert function.__doc__
    if isinstance(function, TorchOp):  # the op has no op.py
        assert function is torch_op(op)
    else:
        assert function.__module__ == f"kvfold.ops.{op}.op"


def test_check_is_an_attribute():
    assert kvfold.check.__module__ == "kvfold.ops.paged_kv_compress.check"


@pytest.mark.parametrize("name", ["no_such_op", "paged_kv", "load_table", "_private", "reference"])
def test_any_other_name_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=f"module 'kvfold' has no attribute '{name}'"):
        getattr(kvfold, name)


def test_all_names_what_is_there():
    assert all(getattr(kvfold, name) is not None for name in kvfold.__all__)
    assert {"__version__", "check"} <= set(kvfold.__all__)


# ---- which package may import which --------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]


def modules_of(folder: str) -> list[Path]:
    """The Python files of a folder, without those of the folders that it links to."""
    files = (ROOT / folder).rglob("*.py")
    return [file for file in files if file.resolve() == file]


def imported_by(file: Path) -> set[str]:
    """The modules of kvfold that a file imports by statements."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "kvfold"}


def test_codegen_imports_nothing_of_the_other_packages():
    files = modules_of("codegen")
    assert len(files) > 5
    for file in files:
        assert imported_by(file) == set(), file


def test_kernels_import_nothing_of_bench():
    files = modules_of("kernels")
    assert len(files) > 15
    for file in files:
        assert not [name for name in imported_by(file) if name.startswith("kvfold.bench")], file


OPS = set(op_specs())


def test_an_op_imports_no_other_op():
    for file in modules_of("kernels/ops"):
        own = file.relative_to(ROOT / "kernels/ops").parts[0]
        modules = (name.split(".") for name in imported_by(file))
        imported = {name[2] for name in modules if name[:2] == ["kvfold", "ops"] and name[2:]}
        assert imported & (OPS - {own}) == set(), file
