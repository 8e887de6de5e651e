"""What all commands share: help, usage, words of the form FIELD=VALUE, and text with brackets."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import kvfold_command, refused

import kvfold
from kvfold.bench.__main__ import main
from kvfold.bench.cli import common, output, words
from kvfold.codegen import TableError
from kvfold.codegen.table import SHIPPED
from kvfold.ops.paged_kv_compress.spec import Problem, Tuning

OP = "paged_kv_compress"


@pytest.mark.parametrize(
    ("command", "mentions"),
    [
        ((), ["table", "build", "demo", "bench", "tune", "step", "--version"]),
        (("table",), ["list", "check", "fields", "explain", "KVFOLD_CONFIG"]),
        (("table", "list"), ["--all"]),
        (("table", "check"), ["FILE", "exit code 2"]),
        (("table", "fields"), [OP]),
        (("table", "explain"), ["FIELD=VALUE", "--batch", "--arch", "--backend"]),
        (("build",), ["--arch", "--out", "sources", "no GPU", "cache"]),
        (("tune",), ["FIELD=VALUE", "--batch", "--prefetch", "--mixture", "--table", "--from",
                     "KVFOLD_CONFIG", "as next_n"]),
        (("step",), ["--batch", "16,256", "--json", "--from"]),
        (("demo",), ["--steps", "--seed", "--device"]),
        (("bench",), ["FIELD=VALUE", "--batch", "--scenario", "--prefetch", "--override", "backend",
                      "--baseline", "--suite", "--json", "--plot", "--from"]),
    ],
)  # fmt: skip
def test_help_says_what_there_is(command, mentions):
    text = " ".join(kvfold_command(*command, "--help", columns=120).stdout.split())
    assert not [word for word in mentions if word.lower() not in text.lower()]


@pytest.mark.parametrize(
    "words",
    [
        ("frobnicate",),
        ("table", "frobnicate"),
        ("bench",),
        ("bench", OP, "--frobnicate"),
        ("table", "check"),
        ("table", "explain"),
        ("demo", "--steps", "0"),
        ("demo", "--steps", "many"),
    ],
)
def test_wrong_usage_exits_with_2(words):
    assert "Usage" in kvfold_command(*words, code=2).stderr


def test_the_version_is_shown():
    assert kvfold_command("--version").stdout.startswith(f"kvfold {kvfold.__version__}, torch ")


@pytest.mark.parametrize("command", ["bench", "tune"])
def test_an_op_that_is_not_there_is_named(command):
    assert "paged_kv_compres is no op, did you mean paged_kv_compress?" in refused(command, OP[:-1])


# ---- words ---------------------------------------------------------------------------------------


def test_words_are_read_by_their_fields_types():
    typed = ["head_dim=128", "overlap=false", "kv_dtype=bf16", "next_n=1,2", "reduce_warps=4"]
    problem, tuning = words.parse_words(typed, Problem, Tuning)
    assert problem == {"head_dim": 128, "overlap": False, "kv_dtype": "bf16", "next_n": [1, 2]}
    assert tuning == {"reduce_warps": 4}
    assert words.parse_words(["next_n=2, 02"], Problem) == [{"next_n": 2}]
    assert words.parse_words(None, Problem) == [{}]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("head_dim", '"head_dim" is not of the form FIELD=VALUE'),
        ("head_dim=", "not of the form"),
        ("=128", "not of the form"),
        ("head_dims=128", "head_dims is no field, did you mean head_dim?"),
        ("head_dim=one", 'head_dim = "one"'),
        ("head_dim=128,100", "head_dim = 100"),
        ("overlap=1", 'overlap = "1" is not accepted; legal: false, true'),
        ("kv_dtype=fp16", "legal: bf16, fp32"),
        ("next_n=" + "9" * 5000, "next_n"),
    ],
)
def test_a_word_that_is_none_is_named(word, says):
    with pytest.raises(ValueError) as caught:
        words.parse_words([word], Problem)
    assert says in str(caught.value) and len(str(caught.value)) < 500


def test_a_field_is_given_once():
    with pytest.raises(ValueError, match="next_n is given twice; accepted: once"):
        words.parse_words(["next_n=1", "next_n=2"], Problem)


def test_lists_of_sizes_are_integers_that_a_case_can_have():
    assert words.integers("--batch", "1, 16,16") == (1, 16)
    assert words.integers("--batch", None) is None
    for text in ("", "x", "1,", "1.5"):
        with pytest.raises(ValueError, match=r"--batch is .*; accepted: integers, as in 1,16,64"):
            words.integers("--batch", text)
    for number in (0, -1, 999_999_999):
        with pytest.raises(TableError, match=rf"--batch = {number} .*legal: 1 to 1048576"):
            words.integers("--batch", str(number))


def test_counts_are_singular_for_one():
    assert [output.count(number, "row") for number in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]


# ---- files ---------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_written_is_refused_before_it_is_needed(tmp_path):
    """By its mode bits, so that root is refused as well."""
    plain = tmp_path / "plain.json"
    common.check_writable(plain)
    plain.write_text("")
    common.check_writable(plain)
    common.check_writable(None)
    assert plain.read_text() == ""
    plain.chmod(0o444)
    with pytest.raises(ValueError, match=rf"^{plain} is read-only"):
        common.check_writable(plain)
    link = tmp_path / "link.json"
    link.symlink_to(plain)
    with pytest.raises(ValueError, match="read-only"):
        common.check_writable(link)
    with pytest.raises(ValueError, match=r"x\.json cannot be written: .*/missing is no directory"):
        common.check_writable(tmp_path / "missing" / "x.json")
    with pytest.raises(ValueError, match="no regular file"):
        common.check_writable(tmp_path)


# ---- brackets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["[prod]", "[/x]", "[bold red]"])
def test_a_path_with_brackets_is_no_markup(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path(folder) / "mine.yaml"
    file.parent.mkdir(parents=True)
    shutil.copyfile(SHIPPED, file)
    table = {"KVFOLD_CONFIG": str(file)}
    assert f"{file}: " in kvfold_command("table", "list", **table).stdout
    assert f"{file}: OK" in kvfold_command("table", "check", file).stdout
    explained = kvfold_command("table", "explain", OP, "--batch", 1, **table).stdout
    assert f" of {file} serves" in explained
    file.write_text("version: 2\n")
    assert str(file) in refused("table", "list", **table)


@pytest.mark.parametrize("name", ["[x].json", "[/x].json"])
@pytest.mark.parametrize("command", [("bench", OP), ("tune", OP), ("step",)])
def test_a_results_file_with_brackets_is_no_markup(command, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"{name}: No such file or directory" in refused(*command, "--from", name)
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("{}")
    assert f"{name} is no " in refused(*command, "--from", name)


@pytest.mark.parametrize("value", ["[x]", "[/x]", "[bold]x"])
def test_a_value_with_brackets_is_no_markup(value):
    assert f'kv_dtype = "{value}"' in refused("bench", OP, f"kv_dtype={value}")
    assert f'"{value}" is not' in refused("bench", OP, value)
    assert f'--batch is "{value}"' in refused("bench", OP, "--batch", value)
    assert value in refused("bench", value)


# ---- the process ---------------------------------------------------------------------------------


@pytest.fixture
def new_process(monkeypatch):
    """`main` imports the command line anew; the signal handler that it sets is put back."""
    for name in [name for name in sys.modules if name.startswith("kvfold.bench.cli")]:
        monkeypatch.delitem(sys.modules, name)
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("module", ["typer", "rich", "rich.table"])
def test_a_missing_package_is_named_with_what_to_install(module, new_process, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(SystemExit) as exit:
        main()
    missing = module.partition(".")[0]
    says = f"kvfold: the command line needs {missing}: pip install 'kvfold[cli]'"
    assert exit.value.code == says  # which Python prints on stderr, and exits with 1


def test_another_missing_package_is_not_blamed_on_the_extra(new_process, monkeypatch):
    monkeypatch.setitem(sys.modules, "kvfold.bench.records", None)
    with pytest.raises(ModuleNotFoundError, match=r"kvfold\.bench\.records"):
        main()


def test_the_module_is_the_command(tmp_path):
    command = [sys.executable, "-m", "kvfold.bench", "table", "check", "none.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "kvfold: none.yaml: cannot be read: No such file or directory\n"


def test_a_closed_pipe_ends_the_command_in_silence():
    command = [sys.executable, "-m", "kvfold.bench", "table", "list", "--all"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode != 0
