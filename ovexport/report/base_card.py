"""What the base model says of itself: licence and language, taken from its card as data that may say anything."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, hf_hub_url

from ovexport.recipe import ModelSpec
from ovexport.storage.bounded import LARGEST_CARD_BYTES, parse_json, parse_yaml

logger = logging.getLogger(__name__)

_METADATA = re.compile(r"\s*---[ \t]*[\r\n]+(.*?)[\r\n]+---[ \t]*(?:[\r\n]|\Z)", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,95}")
_LANGUAGE = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,31}")
_LINK = re.compile(r"https?://[A-Za-z0-9._~:/?#@&=+,;%-]{1,500}")
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_ALLOWED = {"license": _NAME, "license_name": _NAME, "license_link": re.compile(f"{_LINK.pattern}|{_FILE.pattern}")}
_MOST_ENTRIES = 200


@dataclass(frozen=True, slots=True)
class BaseMetadata:
    """What our card takes over.

    Attributes:
        values: by the hub's key, short texts of letters, digits and a few signs, on one line each, or lists of them.
        left_out: keys whose values are something else.
    """

    values: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def base_metadata(model: ModelSpec) -> BaseMetadata:
    """Licence and language as the base model's card names them; its configuration's licence where the card has none."""
    card = _card_of(model)
    if card.get("license") in _NOTHING:
        card = {**card, "license": _configuration_of(model).get("license")}
    given = {key: card[key] for key in (*_ALLOWED, "language") if key in card and card[key] not in _NOTHING}
    values = {key: value for key, value in given.items() if _is_plain(value, _ALLOWED.get(key, _LANGUAGE))}
    left_out = tuple(key for key in given if key not in values)
    for key in left_out:
        logger.warning("  the base model's card has no short plain text as its %s, so ours leaves it out", key)
    link = values.get("license_link")
    if isinstance(link, str) and not _LINK.fullmatch(link):
        del values["license_link"]
        if not Path(model.id).exists():
            values["license_link"] = hf_hub_url(model.id, link, revision=model.revision)
    return BaseMetadata(values, left_out)


_NOTHING: tuple[Any, ...] = (None, "", [], {})


def _is_plain(value: Any, pattern: re.Pattern[str]) -> bool:
    """Whether it is a text of that pattern, or a list of such."""
    entries = value if isinstance(value, list) else [value]
    return len(entries) <= _MOST_ENTRIES and all(
        isinstance(entry, str) and pattern.fullmatch(entry) is not None for entry in entries
    )


def _card_of(model: ModelSpec) -> Mapping[str, Any]:
    """The metadata of the base model's card; nothing where it has no card that can be read."""
    match = _METADATA.match(_text_of(model, "README.md"))
    if match is None:
        return {}
    try:
        values = parse_yaml(match[1])
    except ValueError as error:
        logger.warning(
            "  the metadata of the base model's card can't be read (%s), so ours takes nothing from it", error
        )
        return {}
    return values if isinstance(values, dict) else {}


def _configuration_of(model: ModelSpec) -> Mapping[str, Any]:
    try:
        values = parse_json(_text_of(model, "config.json"))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _text_of(model: ModelSpec, name: str) -> str:
    """The beginning of a file of the base model, from its folder or from the hub; empty where it can't be had."""
    folder = Path(model.id)
    try:
        path = folder / name if folder.is_dir() else Path(hf_hub_download(model.id, name, revision=model.revision))
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return file.read(LARGEST_CARD_BYTES).decode("utf-8-sig", "replace")
    except Exception as error:  # the hub's library raises many kinds, and no card is worth a run
        logger.debug("no %s of the base model (%s)", name, error)
        return ""
