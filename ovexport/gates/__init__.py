"""Limits that measured figures have to keep."""
