"""Words that are in no caption: by names in captions, of the data and of the model that ships."""

import pytest

from jaxdiff.data.nearest_words import nearest_words
from jaxdiff.data.text_tokenizer import words_of
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.datasets.icons.everyday import everyday_words
from jaxdiff.datasets.icons.packages import NAMES
from jaxdiff.datasets.icons.related import related_words
from jaxdiff.pretrained.load import SHIPPED
from tests.datasets.icons.tiny import write_package

SUBGROUPS = ("animal-mammal", "transport-ground", "food-sweet", "household")
# Label, subgroup, tags, British label, shortcodes.
EMOJI = (
    ("cat", 0, ["pet", "animal"], "cat", "cat2"),
    ("cat face", 0, ["kitty", "pet"], "cat face", "cat_face"),
    ("otter", 0, ["animal", "playful"], "otter", "otter"),
    ("skunk", 0, ["stink"], "skunk", ["skunk", "polecat"]),
    ("kangaroo", 0, ["joey"], "kangaroo", "kangaroo"),
    ("bus", 1, ["vehicle"], "bus", "bus"),
    ("minibus", 1, ["bus", "drive"], "minibus", "minibus"),
    ("car", 1, ["vehicle"], "motor car", "red_car"),
    ("candy", 2, ["treat"], "sweet", "candy"),
    ("teddy bear", 3, ["toy"], "teddy bear", "teddy_bear"),
    ("plunger", 3, ["pet", "suction"], "plunger", "plunger"),
)
THINGS = ("cat", "otter", "kangaroo", "bus", "car", "candy", "teddy bear")
EVERYDAY = """
armchair bag baby beach boat boots boy brush cup desk doctor fridge girl goldfish gold hare home
jumper kitty king knight lady lamp lorry mat meat motorbike music newspaper pan person pigeon pirate
plane pony princess pullover puppy puppies radio rubbish sandals saucer ship shoe shop sofa soldier
squirrel street sword tap telly toy trainers tram trousers truck van vegetable water zombie
"""


@pytest.fixture
def related(tmp_path):
    """`related(known)`: the related words of a few emoji."""
    codes = [f"1F{i:03X}" for i in range(len(EMOJI))]
    american = [
        {"label": label, "hexcode": code, "group": 3, "subgroup": subgroup, "tags": tags}
        for code, (label, subgroup, tags, _, _) in zip(codes, EMOJI, strict=True)
    ]
    british = [
        {"label": one[3], "hexcode": code, "group": 3, "subgroup": one[1]}
        for code, one in zip(codes, EMOJI, strict=True)
    ]
    files = {
        "en/data.json": [*american, {"label": "regional indicator A", "hexcode": "1F1E6"}],
        "en-gb/data.json": british,
        "en/shortcodes/github.json": {c: one[4] for c, one in zip(codes, EMOJI, strict=True)},
        "meta/groups.json": {"subgroups": dict(enumerate(SUBGROUPS))},
    }
    write_package(tmp_path, NAMES, files)
    things = {c: one[0] for c, one in zip(codes, EMOJI, strict=True) if one[0] in THINGS}

    def make(known):
        return related_words(tmp_path / NAMES, things, frozenset(words_of(known)))

    return make


def test_words_of_a_thing_come_from_its_emoji(related):
    found = related("a cat and a teddy bear")
    assert found["joey"] == ("kangaroo",)
    assert found["pet"] == ("cat",)
    assert found["toy"] == found["teddybear"] == ("teddy bear",)
    assert found["sweet"] == ("candy",)  # in British English
    assert found["motor"] == found["red"] == ("car",)
    assert "cat2" not in found
    assert "teddy" not in found  # it is known


def test_words_of_a_face_are_those_of_the_thing(related):
    assert related("")["kitty"] == ("cat",)


def test_another_kind_has_the_things_of_its_tags_or_its_neighbours(related):
    found = related("")
    assert found["minibus"] == ("bus",)
    assert found["skunk"] == found["polecat"] == ("otter", "kangaroo")
    assert "stink" not in found
    assert "suction" not in found


def test_everyday_words_need_their_names_in_captions(related):
    assert related("")["lorry"] == ("car",)
    assert "beneath" not in related("")
    assert related("under")["beneath"] == ("under",)
    assert related("below under")["beneath"] == ("below", "under")


def test_everyday_words_name_what_the_shipped_model_knows():
    shipped = Tokenizer.load(str(SHIPPED / "icons" / "tokenizers" / "text"))
    assert shipped.words
    for word, names in everyday_words().items():
        assert word not in shipped.words
        assert shipped.words.issuperset(words_of(" ".join(names))), word
        assert (shipped.related or {})[word] == names


def test_the_shipped_model_has_a_nearest_word_for_everyday_words():
    shipped = Tokenizer.load(str(SHIPPED / "icons" / "tokenizers" / "text"))
    known, related = shipped.words, shipped.related
    assert known
    assert related
    nearest = {w: nearest_words(w, known, related) for w in EVERYDAY.split() if w not in known}
    missing = [word for word, names in nearest.items() if not names]
    assert missing == ["mat"]
    assert nearest["kitty"] == ("cat",)
    assert nearest["puppy"] == nearest["puppies"] == ("dog",)
    assert "car" in nearest["lorry"]
    assert nearest["person"] == ("smiling face", "snowman", "robot")
    assert len(nearest) > 50
