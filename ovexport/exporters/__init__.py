"""Formats of the product beside the OpenVINO IR, a module each."""

from ovexport.exporters.exporter import Exporter, exporters
from ovexport.exporters.onnx import OnnxExporter

__all__ = ["Exporter", "OnnxExporter", "exporters"]
