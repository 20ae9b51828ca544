"""Every prediction that benchmarks/theory.py shows holds; the long ones run by `make test-all`."""

import pytest

import bounds
import predictions
import theory as benchmark

FAST = [
    predictions.unbounded_smoothness,
    predictions.blow_up,
    predictions.sampling_bias,
    predictions.sampling_when_adapting,
    predictions.path_errors,
    predictions.stepsize_moments,
    predictions.cost,
    bounds.moments_of_the_estimate,
]


@pytest.mark.parametrize(
    "prediction",
    [
        pytest.param(p, id=p.__name__, marks=[] if p in FAST else [pytest.mark.slow])
        for p in benchmark.ALL
    ],
)
def test_it_comes_out_as_before(prediction) -> None:
    finding = prediction()
    assert finding.holds is finding.expected, finding.measured
    assert all(len(series.x) == len(series.y) > 0 for series in finding.panel.series)


def test_the_table_has_a_row_for_each_and_escapes_bars() -> None:
    finding = predictions.blow_up()
    rows = benchmark.table([finding, finding]).splitlines()
    assert len(rows) == 4
    assert all(row.replace(r"\|", "").count("|") == 6 for row in rows)
    assert "2.25, 5.06, 57.7, 3.33e+03, 1.11e+07" in rows[2]
    assert [axes.get_title() for axes in benchmark.draw([finding]).axes if axes.lines] == [
        "P5: alpha must shrink with N"
    ]
