"""Distributions of strangers, installed for a test."""

from pathlib import Path


def install(
    folder: Path,
    code: str,
    entry_points: str,
    name: str = "stranger",
    module: str = "stranger_code",
    version: str = "0.1",
) -> Path:
    """A module and the metadata of its distribution, as pip would leave them in site-packages."""
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(code)
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (metadata / "entry_points.txt").write_text(entry_points)
    return folder
