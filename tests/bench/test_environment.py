"""What a report says about the machine and the code that it was measured with."""

import subprocess

import torch
from reports import STEP

from kvfold.bench import environment
from kvfold.bench.records import StepReport
from kvfold.codegen import load_table
from kvfold.runtime import dispatch


def test_the_environment_says_what_was_measured_with_what(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(dispatch, "table", load_table)
    found = environment.environment(torch.device("cpu"))
    assert found["device"] == "a GPU"
    assert found["table_fingerprint"] == load_table().fingerprint
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"].keys() == {
        "kvfold", "torch", "triton", "cupy", "nvrtc", "python", "cuda"
    }  # fmt: skip
    assert StepReport(**found, rows=STEP.rows).rows == STEP.rows


def test_commit_is_the_environments_or_the_checkouts(tmp_path, monkeypatch):
    monkeypatch.setenv("KVFOLD_COMMIT", "abc")
    assert environment.commit() == "abc"
    monkeypatch.delenv("KVFOLD_COMMIT")
    monkeypatch.setattr(environment, "ROOT", tmp_path / "inside")
    environment.ROOT.mkdir()
    assert environment.commit() is None  # no checkout

    def git(*words):
        identity = ["-c", "user.name=n", "-c", "user.email=n@example.com"]
        subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True)

    git("init", "-q")
    git("commit", "--allow-empty", "-qm", "first")
    assert environment.commit() is None  # another project's
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    clean = environment.commit()
    assert clean is not None and len(clean) == 40
    (tmp_path / "new").write_text("")
    assert environment.commit() == f"{clean}-dirty"
