"""A recipe: all its sections, checked against each other."""

from collections.abc import Iterable
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from ovexport.recipe.bench import BenchSpec
from ovexport.recipe.compress import CompressSpec
from ovexport.recipe.convert import ConvertSpec
from ovexport.recipe.data import DataSpec
from ovexport.recipe.evaluate import EvaluateSpec
from ovexport.recipe.gates import Condition, Metric, dotted_names, parse_gates
from ovexport.recipe.model import ModelSpec
from ovexport.recipe.spec import Spec
from ovexport.recipe.task import TaskSpec
from ovexport.recipe.tune import SearchSpec, TuneSpec
from ovexport.recipe.verify import VerifySpec


class Recipe(Spec):
    """All a run needs, one section per stage.

    Attributes:
        gates: conditions by the name of the figure they are on, such as `similarity = ">=0.9"`; several conditions on
            one figure are separated by commas.
    """

    model: ModelSpec
    data: DataSpec
    task: TaskSpec | None = None
    compress: CompressSpec = CompressSpec()
    tune: TuneSpec
    search: SearchSpec = SearchSpec()
    convert: ConvertSpec = ConvertSpec()
    verify: VerifySpec = VerifySpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    bench: BenchSpec = BenchSpec()
    gates: Annotated[dict[Metric, Condition], BeforeValidator(dotted_names)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.compress.format == "fq_lora_nls" and self.tune.objective == "distillation":
            raise ValueError('compress.format = "fq_lora_nls" needs tune.objective = "task"; use "fq_lora" to distil')
        if self.tune.zero_point_learning_rate and self.compress.engine == "nncf":
            raise ValueError('tune.zero_point_learning_rate goes with compress.engine = "ovexport"; leave it out')
        if self.tune.adapter_dropout and self.compress.method == "fq_lora":
            raise ValueError('tune.adapter_dropout goes with compress.method = "qalora" or "lora"; leave it out')
        if self.tune.objective == "task" and self.task is None:
            raise ValueError('tune.objective = "task" needs a section [task] with a name')
        if self.data.train is None and self.task is None:
            raise ValueError("data.train: missing; add it, or a section [task] whose examples take its place")
        if self.data.train is None and (self.data.validation or self.data.test):
            raise ValueError("data.validation and data.test go with data.train; add it, or leave them out")
        if self.search.ranks is not None and self.compress.rank_space is None:
            raise ValueError('search.ranks goes with compress.format = "fq_lora_nls"; leave it out')
        if self.search.ranks is not None and len(self.search.ranks) > 1 and self.compress.budget is not None:
            raise ValueError(
                f"search.ranks={list(self.search.ranks)}: compress.{self.compress.budget} may leave a block or a layer "
                "without an adapter, and the ranks would not fit; give one rank for all"
            )
        return self


def with_gates(recipe: Recipe, texts: Iterable[str]) -> Recipe:
    """The recipe with the conditions of `--gate` options, which take the place of its own on the same figures.

    Raises:
        RecipeError: with every problem at once.
    """
    return recipe.model_copy(update={"gates": recipe.gates | parse_gates(texts)})
