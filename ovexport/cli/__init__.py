"""The command line: one file per command, the only code that prints. Nothing heavy is imported before it is used."""

from ovexport.cli.main import app, main

__all__ = ["app", "main"]
