"""Names and synonyms of emoji from emojibase, the things among them, and what is held out.

A thing is an emoji of an everyday subject (`_THINGS`) with a name of one or two plain words: "cat",
"hot dog". Its further names are emojibase's shortcodes ("automobile": "car") and the tags
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

_NOUN = re.compile(r"[a-z]+(?: [a-z]+)?")
_FACES = re.compile("face-|cat-face|heart")
# Labels of everyday things that are drawn alone, fill no square and resemble no other thing.
_THINGS = re.compile(
    r"""
    accordion | airplane | alarm\ clock | alien | ambulance | american\ football | anchor
    | angry\ face | ant | artist\ palette | automobile | avocado | axe | baby\ bottle | baby\ chick
    | backpack | bacon | bagel | baguette\ bread | balloon | banana | banjo | baseball | basket
    | basketball | bat | bathtub | battery | bear | beaver | bed | beer\ mug | beetle | bell\ pepper
    | bicycle | bird | birthday\ cake | blue\ heart | blueberries | bomb | bookmark | books
    | bouquet | boxing\ glove | bread | briefcase | broccoli | broken\ heart | broom
    | brown\ mushroom | bubble\ tea | bucket | bullseye | burrito | bus | butter | butterfly
    | cactus | calendar | camel | camera | candle | candy | canoe | carpentry\ saw | carrot | castle
    | cat | chair | cheese\ wedge | cherries | cherry\ blossom | chicken | chocolate\ bar
    | chopsticks | christmas\ tree | church | circus\ tent | closed\ mailbox\ with\ raised\ flag
    | cloud | clown\ face | coat | cocktail\ glass | coconut | cold\ face | comet | computer\ mouse
    | cookie | cow | crab | crayon | crescent\ moon | crocodile | croissant | crown | crying\ face
    | crystal\ ball | cucumber | cupcake | deciduous\ tree | deer | desktop\ computer
    | distorted\ face | dog | dolphin | donkey | door | doughnut | dove | dragon | dress | drum
    | duck | dumpling | eagle | ear\ of\ corn | egg | eggplant | elephant | envelope
    | evergreen\ tree | ewe | ferris\ wheel | fire | fire\ engine | fish | flamingo | flashlight
    | flute | fly | flying\ saucer | fox | french\ fries | frog | full\ moon | game\ die | garlic
    | gear | gem\ stone | ghost | giraffe | glass\ of\ milk | glasses | gloves | glowing\ star
    | goat | goggles | goose | gorilla | graduation\ cap | grapes | green\ apple | green\ heart
    | grinning\ face | guitar | hamburger | hammer | hamster | handbag | harp | hatching\ chick
    | hedgehog | helicopter | hibiscus | high-heeled\ shoe | hippopotamus | honey\ pot | honeybee
    | horizontal\ traffic\ light | horse | hospital | hot\ beverage | hot\ dog | hot\ face
    | hot\ pepper | hourglass\ done | house | ice\ cream | ice\ skate | jeans | jellyfish | kangaroo
    | key | keyboard | kitchen\ knife | kite | kiwi\ fruit | koala | ladder | lady\ beetle
    | landslide | laptop | leafless\ tree | lemon | leopard | light\ bulb | lime | lion | lizard
    | llama | lobster | lollipop | luggage | magic\ wand | magnet | mango | maple\ leaf | microscope
    | mirror | mobile\ phone | monkey | motorcycle | mountain | mouse | mushroom | musical\ keyboard
    | necktie | nerd\ face | octopus | onion | open\ book | orca | otter | owl | paintbrush
    | palm\ tree | pancakes | panda | paperclip | parrot | party\ popper | partying\ face | peach
    | peacock | peanuts | pear | pen | pencil | penguin | pie | pig | pill | pineapple | pizza
    | polar\ bear | police\ car | popcorn | potato | potted\ plant | pretzel | puzzle\ piece
    | rabbit | raccoon | racing\ car | rainbow | rat | red\ apple | red\ heart | rhinoceros | ribbon
    | ringed\ planet | robot | rock | rocket | roller\ skate | rooster | root\ vegetable | rose
    | sailboat | sandwich | sauropod | saxophone | scarf | school | scissors | scorpion
    | screwdriver | seal | shark | shield | ship | shopping\ cart | shortcake | shovel | shower
    | shrimp | skateboard | skull | sleeping\ face | sloth | smiling\ face | snail | snake
    | snowflake | snowman | soccer\ ball | socks | spaghetti | sparkles | spider | spider\ web
    | spoon | star | steaming\ bowl | strawberry | sun | sunflower | sunglasses | sushi | swan
    | t-rex | t-shirt | taco | tangerine | taxi | teacup\ without\ handle | teapot | teddy\ bear
    | telephone | telescope | television | tent | tiger | toilet | tomato | toothbrush | top\ hat
    | tornado | tractor | train | trombone | trophy | tropical\ fish | trumpet | tulip | turkey
    | turtle | umbrella | unicorn | video\ camera | video\ game | violin | volcano | volleyball
    | waffle | watch | watermelon | whale | window | wine\ glass | winking\ face | wolf
    | wrapped\ gift | wrench | yarn | zebra
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
        if _THINGS.fullmatch(_plain(entry["label"])):
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
    """Return the names of a thing that no other emoji has, what people call it first."""
    own = _SPOKEN.get(label := _plain(entry["label"]), label)
    codes = [code.replace("_", " ") for code in shortcodes]
    names = [own, *(name for name in codes if name not in taken and name != f"{own} face")]
    names = [own, *(name for name in names[1:] if name != label and not _NO_NAMES.fullmatch(name))]
    names += [
        tag
        for tag in entry.get("tags", ())
        if tag in nouns and tag not in taken and not _NO_NAMES.fullmatch(tag)
    ]
    return tuple(name for name in dict.fromkeys(names) if _NOUN.fullmatch(name))


def _plain(label: str) -> str:
    """Return a label of emojibase in the words of `emoji_names.captions`."""
    return re.sub("[:,]", "", plain_words(label.removeprefix("flag: ")))
