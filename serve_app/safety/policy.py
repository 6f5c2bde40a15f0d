"""The content policy. Its first rule: sexual content with minors is refused.

A word rule that errs on the safe side: a prompt that names both a minor and something sexual is refused, whatever else
it says. It reads English only and looks at no pictures; it is one layer, and more will come around it.
"""

import re
import unicodedata

from serve_app.errors import ContentRefused

# Stems match anywhere in a text, also inside a longer word; words match whole. Short and clinical on purpose.
MINOR_STEMS = (
    "child",
    "underage",
    "preteen",
    "toddler",
    "schoolgirl",
    "schoolboy",
    "jailbait",
    "lolita",
    "girl",
    "pubescent",
)
MINOR_WORDS = (
    "kids?", "kiddies?", "minors?", "teens?", "teenage\\w*", "infants?", "bab(?:y|ies)", "boys?", "boyish", "lolis?",
    "lolicon", "shotas?", "shotacon", "juveniles?", "adolescents?", "youngsters?", "tweens?", "daughters?", "pupils?",
    "kindergarten\\w*", "(?:elementary|primary|middle|high) school\\w*", "barely legal",
)  # fmt: skip
SEXUAL_STEMS = (
    "nude", "nudity", "naked", "porn", "hentai", "nsfw", "erotic", "masturbat", "genital", "orgasm", "vagina", "topless",
    "bottomless", "undress", "unclothed", "lingerie", "fetish",
)  # fmt: skip
SEXUAL_WORDS = (
    "sex", "sexy", "sexier", "sexiest", "sexual\\w*", "sexuali[sz]\\w*", "penis\\w*", "breasts?", "nipples?", "xxx", "seductive\\w*",
    "sensual\\w*", "lewd\\w*", "aroused", "intercourse", "without clothes", "no clothes", "strip(?:s|ping|tease)",
)  # fmt: skip
CLOTHING_STEMS = ("cloth", "dressed", "garment", "underwear", "swimsuit")
"""Named by a negative prompt, which says what to avoid, these ask for their absence."""

ADULT_AGE = 18
NUMBERS = (
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen",
)  # fmt: skip
AGES = re.compile(
    rf"\b(\d{{1,2}}|{'|'.join(NUMBERS)}) ?(?:years?|yrs?|yo|y o|(?:months?|weeks?) old)\b"
    rf"|\b(?:aged?(?: of)?|age is) (\d{{1,2}}|{'|'.join(NUMBERS)})\b"
)
LOOKALIKES = str.maketrans("авеикмнорстухіјѕԁӏαεικνορτυχ", "abeukmhopctyxijsdlaeiknoptux")
"""Cyrillic and Greek letters that look like Latin ones (Unicode TR39, the common part)."""
LEET = (str.maketrans("013457@$!|", "oieastasii"), str.maketrans("013457@$!|", "oleastasll"))
"""Digits and signs for letters, with 1, ! and | as i and as l."""


def check_prompt(prompt: str, negative_prompt: str = "") -> None:
    """Raise `ContentRefused` where the prompt breaks the policy.

    The negative prompt says what to avoid, so terms of the rule are welcome there; only a wish to avoid clothing counts.
    """
    readings = _readings(prompt)
    if not (_names(readings, MINOR_STEMS, MINOR_WORDS) or any(_names_a_minors_age(text) for text in readings)):
        return
    if _names(readings, SEXUAL_STEMS, SEXUAL_WORDS) or _names(_readings(negative_prompt), CLOTHING_STEMS, ()):
        raise ContentRefused("the prompt was refused by the content policy: sexual content with minors", param="prompt")


def _readings(text: str) -> list[str]:
    """The ways in which a text may be meant to be read: plain, digits as letters, spelled-out words joined."""
    decomposed = unicodedata.normalize("NFKD", text).casefold().translate(LOOKALIKES)
    plain = "".join(c for c in decomposed if unicodedata.category(c) not in ("Mn", "Cf"))
    spelled = [plain, *(plain.translate(table) for table in LEET)]
    worded = [re.sub(r"[\W_]+", " ", reading) for reading in spelled]
    joined = [re.sub(r"\b(?:\w )+\w\b", lambda run: run[0].replace(" ", ""), reading) for reading in worded]
    squeezed = [re.sub(r"(\w)\1{2,}", r"\1", reading) for reading in joined]
    return list(dict.fromkeys([*worded, *joined, *squeezed]))  # most texts read the same in most ways


def _names(readings: list[str], stems: tuple[str, ...], words: tuple[str, ...]) -> bool:
    pattern = "|".join((*stems, *(rf"\b(?:{word})\b" for word in words)))
    return any(re.search(pattern, reading) for reading in readings)


def _names_a_minors_age(reading: str) -> bool:
    for match in AGES.finditer(reading):
        number = match[1] or match[2]
        if number in NUMBERS or int(number) < ADULT_AGE:
            return True
    return False
