"""Tables of text."""

from __future__ import annotations

from data_pipeline.tables import format_table

ROWS = [("source", "samples", "unit"), ("a", "7", "GB"), ("longer name", "1234", "")]


def test_columns_are_lined_up_by_the_longest_cell():
    assert format_table(ROWS, "lrl").splitlines() == [
        "source       samples  unit",
        "a                  7  GB",
        "longer name     1234",
    ]


def test_the_last_side_holds_for_the_columns_that_follow():
    assert format_table(ROWS, "lr") == format_table(ROWS, "lrr")


def test_a_rule_stands_under_the_header_and_long_cells_are_cut():
    assert format_table(ROWS, "l", rule=True, max_width=6).splitlines() == [
        "source  samples  unit",
        "---------------------",
        "a       7        GB",
        "longe…  1234",
    ]
