"""What a run is asked to do: a TOML file, read into one strict, frozen Spec per stage."""

from ovexport.recipe.bench import Backend, Backends, BenchSpec, GridPoint, Lengths, OutputLengths
from ovexport.recipe.compress import CompressSpec, LayerMode, LayerRule, TunedMode
from ovexport.recipe.convert import ConvertSpec
from ovexport.recipe.data import ROW_SUFFIXES, TEXT_SUFFIXES, DataSpec, SourceSpec
from ovexport.recipe.evaluate import OFFLINE_ENCODER_PACKAGE, EvaluateSpec
from ovexport.recipe.gates import Condition, Gate, Metric, Operator, list_gates, parse_gates
from ovexport.recipe.load import AnySpec, dump, load, load_task, parse, section
from ovexport.recipe.model import ModelSpec
from ovexport.recipe.recipe import Recipe, with_gates
from ovexport.recipe.spec import Fraction, NotNegative, NotNegativeReal, Positive, PositiveReal, Share, Spec
from ovexport.recipe.task import HARNESS_TASKS, TaskSpec
from ovexport.recipe.tune import OBJECTIVES, SearchSpec, TuneSpec
from ovexport.recipe.verify import VerifySpec

__all__ = [
    "HARNESS_TASKS",
    "OBJECTIVES",
    "OFFLINE_ENCODER_PACKAGE",
    "ROW_SUFFIXES",
    "TEXT_SUFFIXES",
    "AnySpec",
    "Backend",
    "Backends",
    "BenchSpec",
    "CompressSpec",
    "Condition",
    "ConvertSpec",
    "DataSpec",
    "EvaluateSpec",
    "Fraction",
    "Gate",
    "GridPoint",
    "LayerMode",
    "LayerRule",
    "Lengths",
    "Metric",
    "ModelSpec",
    "NotNegative",
    "NotNegativeReal",
    "Operator",
    "OutputLengths",
    "Positive",
    "PositiveReal",
    "Recipe",
    "SearchSpec",
    "Share",
    "SourceSpec",
    "Spec",
    "TaskSpec",
    "TuneSpec",
    "TunedMode",
    "VerifySpec",
    "dump",
    "list_gates",
    "load",
    "load_task",
    "parse",
    "parse_gates",
    "section",
    "with_gates",
]
