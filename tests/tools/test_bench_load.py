"""The benchmark of loading reads what it says."""

from __future__ import annotations

import pytest

from tools.bench.load import main, table


def test_it_prints_a_line_for_each_number_of_threads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--threads", "1", "3", "--gigabytes", "0.01", "--rounds", "2"]) == 0
    heads, *lines = capsys.readouterr().out.splitlines()
    assert heads.split()[:2] == ["threads", "GB/s"]
    assert [line.split()[0] for line in lines] == ["1", "3"]
    assert all(float(line.split()[1]) > 0 for line in lines)


def test_speed_and_ratio_follow_from_seconds() -> None:
    first, second = table({1: [1.0, 2.0, 4.0], 2: [1.0, 1.0, 1.0]}, 2 * 10**9).splitlines()[1:]
    assert first.split()[1:4] == ["1.00", "0.50-2.00", "1.00"]
    assert second.split() == ["2", "2.00", "2.00-2.00", "2.00", "1.00-4.00", "10.7", "s"]
