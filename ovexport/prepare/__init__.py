"""Stage prepare: text to packed token sequences, and a task's rows to examples, for tuning, validation and test.
Nothing stands in two of them."""

from ovexport.prepare.check import Survey, check, survey
from ovexport.prepare.documents import Documents, read_documents, split_documents
from ovexport.prepare.reading import missing_files
from ovexport.prepare.sequences import pack
from ovexport.prepare.stage import prepare, prepare_test

__all__ = [
    "Documents",
    "Survey",
    "check",
    "missing_files",
    "pack",
    "prepare",
    "prepare_test",
    "read_documents",
    "split_documents",
    "survey",
]
