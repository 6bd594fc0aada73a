"""What is measured and proven, as JSON, a module per file."""

from ovexport.reports.benchmark import (
    BenchmarkReport,
    Generation,
    LatencyRatios,
    MachineLimits,
    ModelBenchmark,
    PeakMemory,
    PhysicalLimit,
    PointBenchmark,
    Ratio,
)
from ovexport.reports.evaluation import (
    Comparison,
    Divergence,
    EvaluationReport,
    IsolationStep,
    ModelEvaluation,
    Similarity,
    WorstAnswer,
)
from ovexport.reports.figures import Estimate, Figures, Interval, Meaning, Samples
from ovexport.reports.gates import GateReport, GateResult
from ovexport.reports.search import RankScore, SearchReport
from ovexport.reports.sensitivity import (
    BlockCorrection,
    FormatCost,
    FrontierPoint,
    HeldOut,
    LayerSensitivity,
    SensitivityReport,
)
from ovexport.reports.settings import RuntimeTrial, SettingsReport, WrittenSettings
from ovexport.reports.verification import PROOF_VERDICTS, Check, LayerRow, VerificationReport, VerificationSummary

__all__ = [
    "PROOF_VERDICTS",
    "BenchmarkReport",
    "BlockCorrection",
    "Check",
    "Comparison",
    "Divergence",
    "Estimate",
    "EvaluationReport",
    "Figures",
    "FormatCost",
    "FrontierPoint",
    "GateReport",
    "GateResult",
    "Generation",
    "HeldOut",
    "Interval",
    "IsolationStep",
    "LatencyRatios",
    "LayerRow",
    "LayerSensitivity",
    "MachineLimits",
    "Meaning",
    "ModelBenchmark",
    "ModelEvaluation",
    "PeakMemory",
    "PhysicalLimit",
    "PointBenchmark",
    "RankScore",
    "Ratio",
    "RuntimeTrial",
    "Samples",
    "SearchReport",
    "SensitivityReport",
    "SettingsReport",
    "Similarity",
    "VerificationReport",
    "VerificationSummary",
    "WorstAnswer",
    "WrittenSettings",
]
