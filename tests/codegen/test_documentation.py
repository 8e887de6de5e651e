"""The tables of fields and arguments that the command line and the README show."""

from strategies import OP

from kvfold.codegen import op_spec
from kvfold.codegen.documentation import argument_rows, field_rows, markdown

SPEC = op_spec(OP)


def test_every_field_that_a_row_may_have_is_explained():
    rows = {name: rest for name, *rest in field_rows(SPEC)}
    declared = [field.name for field in (*SPEC.problem.fields(), *SPEC.tuning.fields())]
    assert list(rows) == [*declared, "backend", "min_batch", "max_batch", "arch"]
    for kind, legal, _, meaning in rows.values():
        assert kind in ("problem", "tuning", "applicability")
        assert legal and meaning
    assert rows["next_n"][1] == ", ".join(map(str, range(1, 17))) + " (integer)"
    assert [rows[name][2] for name in ("head_dim", "min_ctas", "min_batch", "arch")] == [
        "", "1", "1", "any",
    ]  # fmt: skip
    assert rows["overlap"][2] == "see meaning"
    assert "default: true for compress_ratio 4" in rows["overlap"][3]


def test_every_argument_is_explained():
    rows = list(argument_rows(SPEC))
    assert [name.split("`")[1] for name, *_ in rows] == [
        one.name for one in SPEC.arguments.declared()
    ]
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["`kv_score`"][:2] == ("[num_tokens, 2*state_dim]", "bf16, fp32")
    assert by_name["`paged_score`, mutated"][1] == "as `paged_kv`"
    assert by_name["`ape_in_state` = True"][:2] == ("", "bool")
    assert by_name['`work` = "all"'][:2] == ("", '"all", "store", "reduce"')
    assert all(meaning for *_, meaning in rows)


def test_markdown_has_a_line_per_row():
    text = markdown(["a", "b"], iter([("1", "2"), ("3", "4")]))
    assert text == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |"
