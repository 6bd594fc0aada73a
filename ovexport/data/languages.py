"""What a text's script and commonest words tell: its language, and whether it is written in words between blanks."""

import re
import unicodedata
from collections.abc import Iterable

UNDETERMINED = "und"
"""The language of a text that is in none of those that are recognized, as ISO 639 writes it."""

_HAN = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_KANA = "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_HANGUL = "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af"
_THAI_LAO_TIBETAN_MYANMAR_KHMER = "\u0e00-\u109f\u1780-\u17ff"
_UNSPACED = f"{_HAN}{_KANA}{_THAI_LAO_TIBETAN_MYANMAR_KHMER}"
_COMMON_ENGLISH = re.compile(
    r"\b(the|and|of|to|is|was|that|with|for|it|he|she|you|they|this|have|are|what|how|from|his|her)\b"
)
_LONGEST_WORD = 20
_EXAMINED_CHARACTERS = 200_000
_MARKS = "".join(chr(code) for code in range(0x0E00, 0x1800) if unicodedata.category(chr(code)).startswith("M"))
_UNIT = re.compile(rf"[{_UNSPACED}][{_MARKS}]*|[^\s{_UNSPACED}]{{1,{_LONGEST_WORD}}}")


def unit_ends(text: str) -> list[int]:
    """Where each word ends, as an index of the text. In scripts without blanks between words each character with its
    marks counts as one, elsewhere each 20 characters of what has no blank in it."""
    return [match.end() for match in _UNIT.finditer(text)]


def language_of(texts: Iterable[str]) -> str:
    """The language of texts as WhoWhatBench writes it: "en", "cn", "ja", "ko", or UNDETERMINED.

    Chinese, Japanese and Korean are known by their script, English by its commonest words: about 3 of 10 words of
    English prose are among them, and fewer than 1 of 10 in other languages.
    """
    text = "\n".join(texts)[:_EXAMINED_CHARACTERS]
    han, kana, hangul = (len(re.findall(f"[{script}]", text)) for script in (_HAN, _KANA, _HANGUL))
    letters = max(1, sum(map(str.isalpha, text)))
    if han + kana > 0.3 * letters:
        return "ja" if kana > 0.1 * (han + kana) else "cn"
    if hangul > 0.3 * letters:
        return "ko"
    words = len(re.findall(r"[^\W\d_]+", text))
    return "en" if len(_COMMON_ENGLISH.findall(text.lower())) > 0.1 * words else UNDETERMINED


def count_words(text: str) -> tuple[int, str | None]:
    """How many words stand between blanks; 0 and the reason where the text is not written so."""
    words = text.split()
    if not words:
        return 0, "the text holds no words"
    letters = max(1, sum(map(str.isalpha, text)))
    if len(re.findall(f"[{_UNSPACED}]", text)) > 0.3 * letters:
        return 0, "the text is in a script that has no blanks between words"
    mean_length = sum(map(len, words)) / len(words)
    if mean_length > _LONGEST_WORD:
        return 0, f"the text is not written in words: {mean_length:.0f} characters stand between two blanks on average"
    return len(words), None
