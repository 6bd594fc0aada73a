"""The versions that travel with every artifact and figure."""

from importlib.metadata import PackageNotFoundError, version

STACK = (
    "ovexport",
    "torch",
    "transformers",
    "nncf",
    "openvino",
    "openvino-genai",
    "openvino-tokenizers",
    "optimum-intel",
    "numpy",
)


def installed_version(distribution: str) -> str | None:
    """The version of a distribution as its metadata says, without importing it; None when it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def stack_versions() -> dict[str, str]:
    """The versions of what is installed of the stack."""
    versions = {name: installed_version(name) for name in STACK}
    return {name: number for name, number in versions.items() if number is not None}
