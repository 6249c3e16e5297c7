"""Captions of emoji in plain English.

Rules turn Unicode names ("woman_firefighter_dark_skin_tone") into captions.
"""

import re

PROFESSIONS = (
    "farmer",
    "cook",
    "student",
    "singer",
    "artist",
    "teacher",
    "factory worker",
    "technologist",
    "office worker",
    "mechanic",
    "scientist",
    "astronaut",
    "firefighter",
    "health worker",
    "judge",
    "pilot",
    "police officer",
    "construction worker",
    "guard",
    "detective",
)
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")

_TONE = re.compile(rf" ?\b({'|'.join(sorted(TONES, key=len, reverse=True))}) skin tone")
WORKER = re.compile(rf"(?:(woman|man) )?({'|'.join(PROFESSIONS)})")
_PERSON = "man|woman|person"
_FEATURE = re.compile(rf"({_PERSON}) ((?:red|curly|white|blond) hair|beard|bald)")
_COUPLE = re.compile(rf"(couple with heart|kiss) ({_PERSON}) ({_PERSON})")
_FAMILY = re.compile(r"family((?: (?:man|woman|boy|girl|adult|child))+)")

# Names with these beginnings are singular even if they end in s ("man lifting weights") ...
_ONE = ("man ", "woman ", "person ", "face ")
# ... or plural; the latter, and couples, take no article.
_NOT_ONE = ("men ", "women ", "people ", "hands ", "palms ")
_COUPLED = re.compile(rf"a ({_PERSON}) and a ")
# Names that begin with the sound of a vowel.
_AN = re.compile(r"(?!one|uni|u\.|ewe|euro)[aeiou]|hourglass|x-ray|sos|ng ")
_AFTER_HEAD = re.compile(r" (?:with|of|in|on|at|and|over|under|behind|facing|showing|without) ")
_NO_ARTICLE = re.compile(
    r"""
    santa\ claus | mrs[.]\ claus | mx\ claus | oden | sake | sushi | spaghetti | bread
    | cooked\ rice | curry\ rice | popcorn | shaved\ ice | ice | fondue | ginger\ root | garlic
    | butter | salt | bacon | broccoli | mate | pouring\ liquid | cooking | tennis | basketball
    | volleyball | badminton | lacrosse | ice\ hockey | field\ hockey | ping\ pong | bowling
    | camping | skis | horse\ racing | building\ construction | construction | soap | yarn
    | thread | wood | dna | luggage | coral | nail\ polish | fog | foggy | om | zzz | biohazard
    | radioactive | infinity | aries | taurus | gemini | cancer | leo | virgo | libra
    | scorpio | sagittarius | capricorn | aquarius | pisces | ophiuchus | plus | minus
    | multiply | divide | copyright | registered | trade\ mark | information | breast-feeding
    | wireless | locked | unlocked | milk | corn | champagne | tea | coffee | golf | poop
    | toilet\ paper | rice | curry | ginger | lavender | pasta | ramen | tempura | soccer | hockey
    | toast | pudding | billiards | stew | canned\ food | cheese | sweet\ corn
    """,
    re.VERBOSE,
)
_THE_COUNTRY = re.compile(r"u\.s\. |u(nited|\.k\.)|.*(islands|territor(y|ies)|lands|republic)$")


def captions(name: str, *, flag: bool) -> list[str]:
    """Return captions of the emoji `name` in lower case, without and with an article.

    With `flag`, the emoji is the flag of the country `name`.
    """
    plain = plain_words(name)
    if flag:
        country = f"the {plain}" if _THE_COUNTRY.match(plain) else plain
        return [f"flag of {country}", f"the flag of {country}", f"a drawing of a flag, {country}"]
    rest, tones = without_tones(plain)
    if not rest:  # a swatch of the skin tone
        return [plain, f"a {plain}"]
    phrase = _phrase(rest)
    skin = _skin(tones, phrase)
    full = with_article(phrase) + skin
    texts = [phrase + skin, full, f"a drawing of {full}"]
    match = WORKER.fullmatch(rest)
    if match and match[1]:
        sex = {"woman": "female", "man": "male"}[match[1]]
        texts.append(f"a {sex} {match[2]}{skin}")
    return list(dict.fromkeys(texts))


def plain_words(name: str) -> str:
    """Return the words of a Unicode name, in lower case."""
    return (
        name.replace("_", " ")
        .replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
        .replace("&", "and")
        .lower()
    )


def without_tones(plain: str) -> tuple[str, list[str]]:
    """Return a name without its skin tones, and these."""
    return _TONE.sub("", plain).strip(), _TONE.findall(plain)


def _skin(tones: list[str], phrase: str) -> str:
    if not tones:
        return ""
    comma = "," if " with " in phrase else ""
    return f"{comma} with {' and '.join(dict.fromkeys(tones))} skin"


def _phrase(rest: str) -> str:
    """Return the name's words in the order of spoken English."""
    if match := _FEATURE.fullmatch(rest):
        who, what = match.groups()
        if what == "bald":
            return f"bald {who}"
        return f"{who} with {'a beard' if what == 'beard' else what}"
    if match := _COUPLE.fullmatch(rest):
        doing = "kissing" if match[1] == "kiss" else "with a heart"
        return f"a {match[2]} and a {match[3]} {doing}"
    if match := _FAMILY.fullmatch(rest):
        *others, last = [with_article(who) for who in match[1].split()]
        return f"family of {', '.join(others)} and {last}" if others else f"family of {last}"
    return rest


def with_article(phrase: str) -> str:
    """Return a noun phrase with "a" or "an" where English has one."""
    if _NO_ARTICLE.fullmatch(phrase) or phrase.startswith(_NOT_ONE) or _COUPLED.match(phrase):
        return phrase
    head = _AFTER_HEAD.split(phrase, maxsplit=1)[0]
    plural = head.endswith("s") and not head.endswith(("ss", "us", "is", "os"))
    if plural and not phrase.startswith(_ONE):
        return phrase
    return f"{'an' if _AN.match(phrase) else 'a'} {phrase}"
