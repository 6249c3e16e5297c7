import pytest

from jaxdiff.data.nearest_words import nearest_words, with_nearest
from jaxdiff.data.text_tokenizer import words_of

KNOWN = frozenset(
    words_of(
        "apple balloon banana car cat center dog elephant face fish hat heart horse house lemon "
        "limousine mouse puppy pizza red socks spoon strawberry strawberries sun tree wolf"
    )
)
RELATED = {"pet": ("cat", "dog"), "plane": ("toy airplane",), "hal": ("robot",)}


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("strawbery", "strawberry"),
        ("bananna", "banana"),
        ("appel", "apple"),
        ("elefant", "elephant"),
        ("centre", "center"),
        ("piza", "pizza"),
        ("lemin", "lemon"),
        ("ballon", "balloon"),
    ],
)
def test_typing_errors_are_corrected(word, nearest):
    assert nearest_words(word, KNOWN, {}) == (nearest,)


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("cats", "cat"),
        ("sock", "socks"),
        ("puppies", "puppy"),
        ("fishes", "fish"),
        ("doggy", "dog"),
        ("sunny", "sun"),
        ("spoons", "spoon"),
    ],
)
def test_inflections_are_resolved(word, nearest):
    assert nearest_words(word, KNOWN, {}) == (nearest,)


def test_related_names_come_before_spelling():
    assert nearest_words("pet", KNOWN, RELATED) == ("cat", "dog")
    assert nearest_words("pets", KNOWN, RELATED) == ("cat", "dog")
    assert nearest_words("plane", KNOWN | {"planet"}, RELATED) == ("toy airplane",)
    assert nearest_words("hally", KNOWN, RELATED) == ()  # a stem is not what the data relates


@pytest.mark.parametrize(
    "word",
    ["hap", "bat", "dusk", "couch", "plate", "snow", "katze", "with", "苹果", "सेब", "_", "é"],
)
def test_other_words_have_no_nearest_one(word):
    known = KNOWN | {"pouch", "plant", "desk", "battle"}
    assert nearest_words(word, known, RELATED) == ()


@pytest.mark.parametrize(
    ("emoji", "nearest"),
    [
        ("\N{DOG FACE}", ("dog face",)),
        ("\N{AUTOMOBILE}", ()),
        ("\N{BLACK SUN WITH RAYS}", ("sun",)),
        ("\N{HEAVY BLACK HEART}", ("heart",)),
        ("\N{FACE WITH TEARS OF JOY}", ("face",)),
        ("\N{RED APPLE}", ("red apple",)),
    ],
)
def test_emoji_have_the_names_of_unicode(emoji, nearest):
    assert words_of(f"a {emoji}!") == ["a", emoji]
    assert nearest_words(emoji, KNOWN, {}) == nearest


def test_words_of_other_scripts_are_whole():
    assert words_of("एक लाल सेब, 红苹果; cafe\N{COMBINING ACUTE ACCENT}") == [
        "एक",
        "लाल",
        "सेब",
        "红苹果",
        "cafe\N{COMBINING ACUTE ACCENT}",
    ]
    assert words_of("\N{THUMBS UP SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-3}") == [
        "\N{THUMBS UP SIGN}"
    ]


def test_a_list_names_each_word_with_the_nearest():
    assert with_nearest({"appel": ("apple",), "snow": (), "pet": ("cat", "dog")}) == (
        "'appel' (nearest: apple), 'snow', 'pet' (nearest: cat, dog)"
    )
