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
    abacus | adhesive\ bandage | admission\ tickets | aerial\ tramway | airplane\ arrival
    | airplane\ departure | alembic | alien\ monster | amphora | anguished\ face
    | articulated\ lorry | astonished\ face | auto\ rickshaw | badger | badminton | balance\ scale
    | ballet\ shoes | ballot\ box | bank | bar\ chart | barber\ pole | beach | beach\ umbrella
    | beans | beating\ heart | beers | bellhop\ bell | bento\ box | beverage\ box | bikini
    | billed\ cap | billiards | bison | black\ bird | black\ cat | black\ heart | black\ nib
    | blossom | blowfish | blue\ book | blue\ car | boar | bookmark\ tabs | boomerang | boot
    | bowling | brick | briefs | broken\ chain | brown\ heart | bubbles | bug
    | building\ construction | bullet\ train | bullettrain\ side | bus\ stop | calling | camping
    | canned\ food | card\ index | carousel\ horse | cat\ face | chains | champagne
    | chart\ decreasing | chart\ increasing | chess\ pawn | chestnut | chipmunk | cigarette
    | city\ dusk | cityscape | clamp | clapper\ board | classical\ building | clinking\ glasses
    | clipboard | closed\ book | closed\ umbrella | cloudy | club\ suit | clutch\ bag | cockroach
    | coffin | computer\ disk | confetti\ ball | confounded\ face | confused\ face | construction
    | convenience\ store | cooked\ rice | cooking | coral | cow\ face | cricket | cricket\ game
    | crossed\ swords | crutch | crying\ cat | curling\ stone | curry\ rice | custard | cyclone
    | dagger | dango | delivery\ truck | department\ store | derelict\ house | desert
    | desert\ island | diamond\ suit | disappointed\ face | disguised\ face | diving\ mask
    | diya\ lamp | dna | dodo | dog\ face | dragon\ face | drooling\ face | droplet | dvd
    | electric\ plug | elevator | email | empty\ nest | enraged\ face | exploding\ head
    | expressionless\ face | face\ exhaling | face\ vomiting | factory | falafel | fallen\ leaf
    | fax\ machine | fearful\ face | feather | ferry | field\ hockey | file\ cabinet | file\ folder
    | film\ frames | film\ projector | fire\ extinguisher | firecracker | fireworks | fish\ cake
    | fishing\ pole | flags | flat\ shoe | flatbread | floppy\ disk | flushed\ face | flying\ disc
    | fog | foggy | folding\ fan | fondue | fortune\ cookie | fountain | fountain\ pen
    | framed\ picture | fried\ shrimp | frowning\ face | fuel\ pump | funeral\ urn | ginger\ root
    | goal\ net | goblin | golf | green\ book | green\ salad | grey\ heart | grimacing\ face
    | grinning\ cat | growing\ heart | guide\ dog | hair\ pick | hamsa | hatched\ chick | headstone
    | heart\ decoration | heart\ exclamation | heart\ suit | herb | high\ voltage | hiking\ boot
    | hindu\ temple | hook | horse\ face | hot\ springs | hotel | houses | hushed\ face | hut
    | hyacinth | ice | ice\ hockey | icecream | identification\ card | inbox\ tray
    | incoming\ envelope | izakaya\ lantern | japanese\ castle | japanese\ dolls | jar | joker
    | joystick | kaaba | kick\ scooter | kimono | kissing\ cat | kissing\ face | knot | lab\ coat
    | label | lacrosse | leafy\ green | leaves | ledger | light\ rail | lightning | link
    | linked\ paperclips | links | lipstick | locked | locomotive | long\ drum | lotion\ bottle
    | lotus | love\ hotel | love\ letter | low\ battery | lying\ face | mag | mag\ right | mahjong
    | mailbox\ closed | mammoth | mans\ shoe | mantelpiece\ clock | manual\ wheelchair | maracas
    | mate | melon | melting\ face | memo | mending\ heart | metro | microbe | military\ helmet
    | military\ medal | milky\ way | minibus | mirror\ ball | moai | monkey\ face | monorail
    | moon\ cake | moon\ ceremony | moose | mosque | mosquito | motor\ boat | motor\ scooter
    | motorized\ wheelchair | motorway | mount\ fuji | mountain\ cableway | mountain\ railway
    | mountain\ snow | mouse\ face | mouse\ trap | movie\ camera | national\ park | nauseated\ face
    | nazar\ amulet | nesting\ dolls | neutral\ face | new\ moon | newspaper | night\ sky | notebook
    | oden | office\ building | ogre | oil\ drum | old\ key | olive | oncoming\ automobile
    | oncoming\ bus | oncoming\ taxi | optical\ disk | orange\ book | orange\ heart | orangutan
    | outbox\ tray | ox | oyster | package | pager | parachute | partly\ sunny | passenger\ ship
    | paw\ prints | pea\ pod | pensive\ face | performing\ arts | persevering\ face | petri\ dish
    | phoenix | pick | pickup\ truck | pig\ face | pig\ nose | pinata | pine\ decoration
    | ping\ pong | pink\ heart | placard | playground\ slide | pleading\ face | plunger | poodle
    | post\ office | postbox | poultry\ leg | pouring\ liquid | pouting\ cat | prayer\ beads
    | printer | purple\ heart | purse | pushpin | rabbit\ face | railway\ car | railway\ track
    | rainy | ram | razor | red\ envelope | relieved\ face | reminder\ ribbon | revolving\ hearts
    | rice\ ball | rice\ cracker | ring | ring\ buoy | roller\ coaster | rosette | rotating\ light
    | round\ pushpin | rugby\ football | running\ shirt | running\ shoe | safety\ pin | safety\ vest
    | sake | salt | sandal | sari | satellite | satellite\ antenna | scroll | seat | seedling
    | service\ dog | sewing\ needle | shaking\ face | shamrock | shaved\ ice | shinto\ shrine
    | shooting\ star | shopping\ bags | shorts | skis | skunk | sled | sleepy\ face | slot\ machine
    | small\ airplane | smirking\ face | sneezing\ face | snowy | soap | softball | spade\ suit
    | sparkler | sparkling\ heart | speedboat | spiral\ calendar | spiral\ notepad | spiral\ shell
    | sponge | sports\ medal | spouting\ whale | squid | stadium | station | stethoscope | stew
    | stop\ sign | stopwatch | stormy | straight\ ruler | stuffed\ flatbread | sunny | sunrise
    | sunset | suspension\ railway | sweet\ potato | synagogue | syringe | takeout\ box | tamale
    | tanabata\ tree | telephone\ receiver | tennis | test\ tube | thermometer | thong\ sandal
    | thread | ticket | tiger\ face | timer\ clock | tired\ face | toilet\ paper | tokyo\ tower
    | toolbox | trackball | tram | tram\ car | triangular\ ruler | trolleybus | tropical\ drink
    | tumbler\ glass | two\ hearts | unamused\ face | unlocked | videocassette | wastebasket
    | water\ buffalo | water\ pistol | water\ wave | weary\ cat | weary\ face | wedding | wheel
    | white\ cane | white\ flower | white\ heart | wilted\ flower | wind\ chime | wind\ face | wing
    | womans\ clothes | womans\ hat | wood | woozy\ face | worm | worried\ face | xray
    | yawning\ face | yellow\ heart | yo\ yo | zany\ face
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
# What people call a thing, where Unicode's label or the shortcode is odd.
_SPOKEN = {
    "automobile": "car",
    "baby chick": "chick",
    "baguette bread": "baguette",
    "carpentry saw": "saw",
    "cheese wedge": "cheese",
    "deciduous tree": "tree",
    "desktop computer": "computer",
    "ewe": "sheep",
    "game die": "die",
    "hot beverage": "coffee",
    "hourglass done": "hourglass",
    "lady beetle": "ladybug",
    "mobile phone": "phone",
    "sauropod": "dinosaur",
    "steaming bowl": "ramen",
    "video game": "game controller",
    "wrapped gift": "gift",
}
_NO_NAMES = re.compile(
    r"(?!ring).*ing|tada|party|date|android|iphone|.* (side|front|squared)|red car|art|birthday"
    r"|denim|european castle|noodle|direct hit|dart|school satchel|boba drink|tophat|mortar board"
)
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
    own = _SPOKEN.get(label := _plain(entry["label"]), label)
    codes = [code.replace("_", " ") for code in shortcodes]
    names = [own, *(name for name in codes if name not in taken and name != f"{own} face")]
    names = [own, *(name for name in names[1:] if name != label and not _NO_NAMES.fullmatch(name))]
    names += [
        tag
        for tag in entry.get("tags", ())
        if tag in nouns and tag not in taken and not _NO_NAMES.fullmatch(tag)
    ]
    names = [name for name in dict.fromkeys(names) if _NOUN.fullmatch(name)]
    return () if any(map(_NO_THINGS.fullmatch, (label, own, *names))) else tuple(names)


def _plain(label: str) -> str:
    """Return a label of emojibase in the words of `emoji_names.captions`."""
    return re.sub("[:,]", "", plain_words(label.removeprefix("flag: ")))
