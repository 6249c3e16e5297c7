"""Names and synonyms of emoji from emojibase, the things among them, and what is held out.

A thing is an emoji of an everyday subject (`_SUBJECTS`) with a name of one or two plain words:
"cat", "hot dog". Its further names are emojibase's shortcodes ("automobile": "car") and the tags
that are nouns for it ("cat": "kitten").

Held-out rules: from a hash of the names, so that they depend on no order and no other name. One
style of every second thing is held out, so that training has each thing in the other styles, and
one pair of things in eight.
"""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from jaxdiff.datasets.emoji_names import plain_words
from jaxdiff.datasets.icons.packages import read_list, read_object

STYLES = {
    "fluent-emoji-flat": "flat",
    "fluent-emoji": "shaded",
    "noto": "cartoon",
    "twemoji": "simple",
}
"""The adjective in captions for the drawings of an icon set."""

_SUBJECTS = re.compile(
    "animal-.*|plant-.*|food-.*|drink|dishware|place-(geographic|building|religious|other)"
    "|transport-(ground|water|air)|time|hotel|sky-weather|event|award-medal|sport|game|arts-crafts"
    "|clothing|musical-instrument|phone|computer|light-video|book-paper|mail|writing|office|lock"
    "|tool|science|medical|household|other-object|cat-face|monkey-face"
    "|face-(?!hand).*|heart"
)
_NOUN = re.compile(r"[a-z]+(?: [a-z]+)?")
_FACES = re.compile("face-|cat-face|heart")
# Scenes that fill a square, activities, signs and drawings of several things.
_NO_THINGS = re.compile(
    r"""
    airplane\ arrival | airplane\ departure | badminton | beers | briefs | broken\ chain
    | building\ construction | bullettrain\ side | bus\ stop | calling | camping | card\ index
    | chains | chart\ decreasing | chart\ increasing | cityscape | clinking\ glasses | cloudy
    | club\ suit | construction | cooking | derelict\ house | desert | desert\ island
    | diamond\ suit | diya\ lamp | fireworks | fish\ cake | flags | fog | foggy | funeral\ urn
    | hamsa | heart\ decoration | heart\ suit | high\ voltage | hook | hot\ springs | icecream
    | identification\ card | inbox\ tray | incoming\ envelope | izakaya\ lantern | kaaba | label
    | leaves | light\ rail | lightning | links | locked | love\ hotel | love\ letter | mag
    | mag\ right | mailbox\ closed | mans\ shoe | mate | milky\ way | moon\ ceremony | motorway
    | mount\ fuji | mountain\ railway | mountain\ snow | national\ park | nazar\ amulet | new\ moon
    | night\ sky | outbox\ tray | partly\ sunny | performing\ arts | pick | pine\ decoration
    | placard | pouring\ liquid | railway\ track | rainy | reminder\ ribbon | rotating\ light
    | round\ pushpin | running\ shirt | seat | shooting\ star | snowy | spade\ suit | sparkler
    | spiral\ calendar | spiral\ notepad | station | stormy | sunny | sunrise | sunset
    | suspension\ railway | tanabata\ tree | tennis | timer\ clock | unlocked | water\ wave
    | wedding | wind\ face | womans\ clothes | womans\ hat | wood | xray
    """,
    re.VERBOSE,
)
# Tags of emojibase that name the thing; others describe it ("pet", "furry").
_NOUN_TAGS = re.compile(
    r"""
    alpaca | ape | aubergine | ax | bike | blueberry | boulder | bumblebee | bunny | burger
    | burro | camcorder | cantaloupe | capsicum | coffee | cog | comb | controller | copter | crow
    | denim | dice | earthworm | elk | eyeglasses | grape | grasshopper | gravestone | hare
    | hatchet | hippo | hotdog | hound | hurricane | jet | jewel | jigsaw | jug | kitten | kitty
    | ladder | ladybug | lamb | lavender | loaf | log | lorry | martini | motorbike | necklace
    | noodle | pancake | pasta | peanut | piano | piglet | pint | pistol | plane | prawn | pudding
    | puppy | ramen | raven | roach | rucksack | sandal | sapling | satchel | sausage | semi | sled
    | slipper | slug | sneaker | spectacles | squirrel | tempura | timber | tire | toadstool
    | toast | toboggan | tombstone | torch | tortoise | trousers | tv | typhoon | ufo | van | yacht
    | yurt
    """,
    re.VERBOSE,
)
_NO_NAMES = re.compile(r"(?!ring).*ing|tada|party|date|android|iphone|.* (side|front|squared)")
_MOST_CARRIERS = 2  # emoji that may share a tag that names them, such as a cat and its face
_STYLE_PERIOD = 2  # one thing in so many has a held-out style
_PAIR_PERIOD = 8


class NamedEmoji(NamedTuple):
    """An emoji: its characters in hexadecimal, Unicode name, and all names if it is a thing."""

    code: str
    label: str
    flag: bool
    names: tuple[str, ...]

    @property
    def thing(self) -> str | None:
        """The name of the thing; None for other emoji."""
        return self.names[0] if self.names else None


def held_out_style(thing: str) -> str | None:
    """Return the icon set whose drawing of a thing is held out of training; None for none."""
    number = _hash(thing)
    styles = tuple(STYLES)
    return styles[number // _STYLE_PERIOD % len(styles)] if number % _STYLE_PERIOD == 0 else None


def held_out_pair(thing: str, other: str) -> bool:
    """Whether no training scene has both things, in any order, relation and style."""
    return _hash(" + ".join(sorted((thing, other)))) % _PAIR_PERIOD == 0


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def normal_code(code: str) -> str:
    """Return characters in hexadecimal without variation selectors, which sets use differently."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def icon_spelling(label: str) -> str:
    """Return a Unicode name as icon sets spell it: "woman-firefighter"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"['’.]", "", label.lower())).strip("-")  # noqa: RUF001


def read_emoji(place: Path) -> list[NamedEmoji]:
    """Return the emoji of the package `emojibase-data`, skin tones included.

    Raises:
      UserError: it is no such package.
    """
    entries = [entry for entry in read_list(place, "en/data.json") if "group" in entry]
    shortcodes = read_object(place, "en/shortcodes/emojibase.json")
    groups = read_object(place, "meta/groups.json")
    subgroups, flags = groups["subgroups"], {"country-flag", "subdivision-flag"}
    labels = {_plain(entry["label"]) for entry in entries}
    carriers: dict[str, int] = {}
    for entry in entries:
        for tag in entry.get("tags", ()):
            carriers[tag] = carriers.get(tag, 0) + 1
    nouns = {tag for tag in carriers if _NOUN_TAGS.fullmatch(tag)}
    nouns = {tag for tag in nouns if carriers[tag] <= _MOST_CARRIERS}
    found, taken = [], set(labels)
    for entry in entries:
        subgroup = subgroups[str(entry["subgroup"])]
        names: tuple[str, ...] = ()
        if _SUBJECTS.fullmatch(subgroup):
            codes = shortcodes.get(entry["hexcode"], ())
            codes = [codes] if isinstance(codes, str) else list(codes)
            codes = _codes_of_faces(entry, codes) if _FACES.match(subgroup) else codes
            names = _names(entry, codes, nouns, taken)
            taken.update(name for name in names if name not in nouns)
        for one in (entry, *entry.get("skins", ())):
            names = names if one is entry else ()
            code = normal_code(one["hexcode"])
            found.append(NamedEmoji(code, _plain(one["label"]), subgroup in flags, names))
    return found


def _codes_of_faces(entry: dict, shortcodes: list[str]) -> list[str]:
    """Return the shortcodes that are nouns: those of other faces are adjectives and verbs."""
    named = {"clown face": "clown", "nerd face": "nerd", "red heart": "heart"}
    return [code for code in shortcodes if code == named.get(_plain(entry["label"]))]


def _names(entry: dict, shortcodes: list[str], nouns: set[str], taken: set[str]) -> tuple[str, ...]:
    """Return the names of a thing that no other emoji has, its own label first; () for others."""
    own = _plain(entry["label"])
    codes = [code.replace("_", " ") for code in shortcodes]
    names = [own, *(name for name in codes if name not in taken and name != f"{own} face")]
    names = [own, *(name for name in names[1:] if not _NO_NAMES.fullmatch(name))]
    names += [tag for tag in entry.get("tags", ()) if tag in nouns and tag not in taken]
    names = [name for name in dict.fromkeys(names) if _NOUN.fullmatch(name)]
    return () if any(map(_NO_THINGS.fullmatch, (own, *names))) else tuple(names)


def _plain(label: str) -> str:
    """Return a label of emojibase in the words of `emoji_names.captions`."""
    return re.sub("[:,]", "", plain_words(label.removeprefix("flag: ")))
