"""The two shapes that nearly every check has, and the types that modes are stored in."""

from typing import Any

from ovexport.reports import Check

ELEMENT_TYPES = {"int4_asym": "u4", "int4_sym": "i4", "int8_asym": "u8", "int8_sym": "i8"}


def zero(name: str, subject: str, value: int, detail: str = "") -> Check:
    """Passes when the count is 0; the detail is for a failure."""
    return Check(name=name, subject=subject, value=value, limit=0, passed=value == 0, detail=detail if value else "")


def equal(name: str, subject: str, value: Any, limit: Any, detail: str = "") -> Check:
    """Passes when the value is the limit; the detail is for a failure."""
    same = value == limit
    return Check(name=name, subject=subject, value=value, limit=limit, passed=same, detail="" if same else detail)
