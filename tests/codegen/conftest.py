import pytest


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file to write tables to."""
    return tmp_path_factory.mktemp("table") / "own.yaml"
