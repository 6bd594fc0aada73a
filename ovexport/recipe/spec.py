"""The base of every section, and the types of its numbers."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0, le=1_000_000_000)]
NotNegative = Annotated[int, Field(ge=0, le=1_000_000_000)]
PositiveReal = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegativeReal = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Spec(BaseModel):
    """Base of every section: unknown keys are refused, values keep their type, nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _arrays_are_tuples(cls, values: Any) -> Any:
        """TOML has lists, and a frozen section holds tuples."""
        if not isinstance(values, dict):
            return values
        return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
