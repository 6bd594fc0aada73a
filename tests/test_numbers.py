import math

import pytest

from ovexport.numbers import number, number_with_interval, with_interval, written


@pytest.mark.parametrize(
    ("value", "form", "expected"),
    [
        (0.00582, ".5f", "0.00582"),
        (0.0000123, ".5f", "0.000012"),
        (-0.0000123, ".5f", "−0.000012"),
        (1.234e-12, ".5f", "1.2e-12"),
        (0.0, ".5f", "0.00000"),
        (0.98, ".2f", "0.98"),
        (0.0031, ".2f", "0.0031"),
        (1079.4, ".0f", "1079"),
        (0.97236, ".2%", "97.24%"),
        (0.0997, ".0%", "10%"),
        (0.0000031, ".2%", "0.00031%"),
        (3e-13, ".2%", "3.0e-11%"),
        (math.nan, ".5f", "nan"),
    ],
)
def test_a_figure_keeps_two_significant_digits_however_small_it_is(value: float, form: str, expected: str) -> None:
    assert written(value, form) == expected


def test_an_interval_stands_behind_its_figure_and_no_dash_can_be_taken_for_a_minus() -> None:
    assert with_interval(0.61, (0.594, 0.641), ".2f") == "0.61 (0.59–0.64)"
    assert with_interval(-0.004, (-0.0042, -0.0038), ".5f") == "−0.00400 (−0.00420 to −0.00380)"
    assert with_interval(0.000012, (0.0000004, 0.00003), ".5f") == "0.000012 (0.00000040–0.000030)"
    assert with_interval(0.61, None, ".2f") == "0.61"


def test_a_number_of_any_kind_is_whole_or_has_six_digits() -> None:
    assert [number(value) for value in (3.0, 1e9, 0.123456789, 1e300)] == ["3", "1000000000", "0.123457", "1e+300"]
    assert number_with_interval(0.89, (0.8401, 0.94)) == "0.89 (0.8401–0.94)"
    assert number_with_interval(12.0, None) == "12"
