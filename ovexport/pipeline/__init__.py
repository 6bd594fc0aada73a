"""Stages, the engine that runs them, and what the command line asks for."""
