import json
import pickle

from kvfold.codegen import TableError
from kvfold.codegen.errors import MAX_VALUE_LENGTH, in_words, shortened
from kvfold.codegen.fields import Interval


def test_error_says_all_it_knows_and_pickles():
    error = TableError("is bad", file="t.yaml", row="r", field="next_n", value=[1, "x"], legal="1")
    assert str(error) == 't.yaml: r: next_n = [1, "x"] is bad; legal: 1'
    assert str(TableError("is bad")) == "is bad"
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), vars(again)) == (str(error), vars(error))


def test_a_long_value_is_shortened_in_the_message():
    value = "x" * 10_000_000
    error = TableError("is not accepted", field="kv_dtype", value=value, legal="bf16, fp32")
    assert error.value is value
    assert str(error) == (
        f'kv_dtype = "{"x" * (MAX_VALUE_LENGTH - 1)}... (10000002 characters) is not accepted;'
        " legal: bf16, fp32"
    )
    exact = "y" * (MAX_VALUE_LENGTH - 2)
    assert shortened(exact) == json.dumps(exact)


def test_legal_values_in_words():
    assert in_words(("bf16", "fp32")) == "bf16, fp32"
    assert in_words((False, True)) == "false, true"
    assert in_words(range(1, 17)) == ", ".join(map(str, range(1, 17))) + " (integer)"
    assert in_words(range(8, 2**30, 8)) == "8 or more in steps of 8 (integer)"
    assert in_words(range(1, 2**20 + 1)) == "1 to 1048576 (integer)"
    assert in_words([]) == "none"
    assert in_words(Interval(0.0, 2.5)) == "0.0 to 2.5 (number, as 1.0e-4)"
