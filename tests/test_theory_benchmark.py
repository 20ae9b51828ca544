"""Every prediction of benchmarks/theory.py holds; the long ones run by `make test-all`."""

import pytest
import theory as benchmark

FAST = [
    benchmark.unbounded_smoothness,
    benchmark.blow_up,
    benchmark.sampling_bias,
    benchmark.sampling_when_adapting,
    benchmark.path_errors,
    benchmark.stepsize_moments,
    benchmark.cost,
]


@pytest.mark.parametrize(
    "prediction",
    [pytest.param(p, id=p.__name__, marks=[] if p in FAST else [pytest.mark.slow]) for p in benchmark.PREDICTIONS],
)
def test_it_holds(prediction) -> None:
    finding = prediction()
    assert finding.holds, finding.measured
    assert all(len(series.x) == len(series.y) > 0 for series in finding.panel.series)


def test_the_table_has_a_row_for_each_and_escapes_bars() -> None:
    finding = benchmark.blow_up()
    rows = benchmark.table([finding, finding]).splitlines()
    assert len(rows) == 4
    assert all(row.replace(r"\|", "").count("|") == 6 for row in rows)
    assert "2.25, 5.06, 57.7, 3.33e+03, 1.11e+07" in rows[2]
    assert [axes.get_title() for axes in benchmark.draw([finding]).axes if axes.lines] == ["P5: alpha must shrink with N"]
