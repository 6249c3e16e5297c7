import json
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.datasets.icons import source as icons
from jaxdiff.datasets.icons.names import STYLES, held_out_style
from jaxdiff.datasets.icons.packages import package_of
from jaxdiff.datasets.icons.sets import IconData, IconSet
from jaxdiff.datasets.icons.source import Iconify, over, rasterise
from jaxdiff.errors import UserError
from tests.datasets.icons.tiny import THINGS, write_package, write_sets

SIZE = 32


@pytest.fixture(scope="module")
def everything(places):
    source = Iconify(split="all", size=SIZE, **places)
    source.check()
    return source


def find(source, icon_set, name):
    found = {(icon.set, icon.name): index for index, icon in enumerate(source.icons)}
    return found[icon_set, name]


def test_a_record_is_a_drawing_over_white_with_captions(everything):
    record = everything[find(everything, "noto", "cat")]
    image = record["image"]
    assert (image.shape, image.dtype) == ((SIZE, SIZE, 3), np.uint8)
    assert (image[0, 0] == 255).all()
    assert tuple(image[8, 16]) == (0xDD, 0x33, 0x33)
    assert record["name"] == "noto/cat"
    assert record["captions"] == [
        *("cat", "a cat", "a drawing of a cat", "a kitten"),
        *("a cartoon drawing of a cat", "a cartoon drawing of a kitten"),
    ]


def test_alpha_is_that_of_the_drawing(everything):
    index = find(everything, "fluent-emoji", "dog")
    rgba = everything.rgba(index)
    assert rgba.shape == (SIZE, SIZE, 4)
    assert (rgba[0, 0, 3], rgba[16, 16, 3]) == (0, 255)
    blue = over(rgba, (0, 0, 255))
    assert tuple(blue[0, 0]) == (0, 0, 255)
    np.testing.assert_array_equal(blue[16, 16], rgba[16, 16, :3])


def test_skin_tones_are_named_as_in_speech(everything):
    record = everything[find(everything, "twemoji", "woman-judge-dark")]
    assert "a woman judge with dark skin" in record["captions"]
    assert "a simple drawing of a woman judge with dark skin" in record["captions"]


def test_the_splits_partition_the_icons(everything, places):
    train, held_out = (Iconify(split=s, size=SIZE, **places) for s in ("train", "held_out"))
    names = [{(icon.set, icon.name) for icon in one.icons} for one in (train, held_out)]
    assert names[0].isdisjoint(names[1])
    assert len(names[0]) + len(names[1]) == len(everything) == 4 * (len(THINGS) + 1)
    expected = {(held_out_style(name), name) for name in THINGS if held_out_style(name)}
    assert names[1] == expected
    assert expected


def test_things_have_three_sets_and_no_people(places, tmp_path):
    things = Iconify(subset="things", split="all", size=SIZE, **places)
    assert {icon.emoji.thing for icon in things.icons} == set(THINGS)
    folder = write_sets(tmp_path)
    for icon_set in ("noto", "twemoji"):
        path = folder / "@iconify-json" / icon_set / "icons.json"
        data = json.loads(path.read_text())
        del data["icons"]["owl"]
        path.write_text(json.dumps(data))
    fewer = Iconify(
        subset="things", split="all", size=SIZE, folder=str(folder), cache=str(tmp_path / "cache")
    )
    assert {icon.emoji.thing for icon in fewer.icons} == set(THINGS) - {"owl"}
    assert len(fewer.icons) == 4 * (len(THINGS) - 1)


def test_other_sets_need_no_emojibase_and_are_named_by_their_icons(tmp_path):
    icons = {
        "cat": {"body": "<path/>"},
        "arrow-up": {"body": '<path fill="currentColor" d="M0 0h12v6H0z"/>', "height": 6},
        "flag": {"body": "<path/>"},
    }
    aliases = {
        "arrow-right": {"parent": "arrow-up", "rotate": 1},
        "up": {"parent": "arrow-up"},
        "north": {"parent": "up"},
        "banner": {"parent": "flag", "hidden": True},
        "east": {"parent": "arrow-right"},
    }
    files = {
        "icons.json": {"icons": icons, "aliases": aliases, "width": 12, "height": 12},
        "chars.json": {"f0001": "cat"},
        "metadata.json": {"categories": {"Account / User": ["flag"], "Signs": ["flag", "cat"]}},
    }
    write_package(tmp_path, package_of("lines"), files)
    source = Iconify(
        sets=("lines",), split="all", size=12, folder=str(tmp_path), cache=str(tmp_path)
    )
    found = {icon.name: source[row]["captions"] for row, icon in enumerate(source.icons)}
    assert found == {
        "cat": ["cat", "a cat", "a drawing of a cat", "a cat, signs"],
        "arrow-up": [
            *("arrow up", "an arrow up", "a drawing of an arrow up"),
            *("an up", "a north"),
        ],
        "flag": [
            *("flag", "a flag", "a drawing of a flag"),
            *("a banner", "a flag, account, user, signs"),
        ],
        "arrow-right": [
            *("arrow right", "an arrow right", "a drawing of an arrow right", "an east"),
        ],
    }
    assert {"cat", "banner", "signs", "north"} <= source.vocabulary
    assert source.related_words == {}
    up, right = (source.rgba(index)[..., 3] == 255 for index in (1, 3))
    assert up[3:9].all()
    assert up.sum() == 72
    np.testing.assert_array_equal(right, up.T)


def test_emoji_have_the_aliases_of_their_set_too(tmp_path):
    write_sets(tmp_path)
    path = tmp_path / package_of("noto") / "icons.json"
    data = json.loads(path.read_text())
    aliases = {"tom-cat": {"parent": "cat"}, "judge-tone1": {"parent": "woman-judge-dark"}}
    path.write_text(json.dumps(data | {"aliases": aliases}))
    source = Iconify(
        sets=("noto",), split="all", size=8, folder=str(tmp_path), cache=str(tmp_path / "cache")
    )
    captions = source[find(source, "noto", "cat")]["captions"]
    assert {"a kitten", "a tom cat", "a cartoon drawing of a tom cat"} <= set(captions)
    captions = source[find(source, "noto", "woman-judge-dark")]["captions"]
    assert not any("tone" in text for text in captions)


def test_words_of_drawings_reach_a_tokenizer(everything):
    """As a run with pretrained text encoders passes them."""
    tokenizer = Tokenizer.train(["a cat"], vocab_size=530, length=16)
    tokenizer = tokenizer.with_words(everything.vocabulary, everything.related_words)
    assert {"kitten", "rocket", "judge"} <= tokenizer.words
    assert tokenizer.related["pet"] == ("cat", "dog")


def test_aliases_flip():
    icons = {"a": {"body": "<path/>", "left": 2}}
    one = IconSet("x", {"icons": icons, "aliases": {"b": {"parent": "a", "hFlip": True}}}, {})
    assert 'transform="translate(10.0 8.0) scale(-1 1)' in one.icon("b").svg()
    assert list(one.names()) == ["a", "b"]
    with pytest.raises(UserError, match="no drawing for 'c'"):
        one.icon("c")


def test_pickling_keeps_only_the_fields(everything):
    everything[0]
    data = pickle.dumps(everything)
    assert len(data) < 1000
    np.testing.assert_array_equal(pickle.loads(data)[5]["image"], everything[5]["image"])


def test_icons_are_rendered_once_and_again_for_other_packages(everything, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    folder = write_sets(tmp_path / "sets")
    fields = {"split": "all", "size": SIZE, "folder": str(folder), "cache": str(cache)}
    first = Iconify(**fields)[0]["image"]
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(icons, "_render_all", lambda *_: pytest.fail("rendered again"))
    np.testing.assert_array_equal(Iconify(**fields)[0]["image"], first)
    monkeypatch.undo()
    path = folder / "@iconify-json" / "noto" / "icons.json"
    path.write_text(path.read_text().replace("#d33", "#00f"))
    Iconify(**fields).check()
    assert len(list(cache.iterdir())) == 2


def test_failed_renderings_leave_no_files_and_are_user_errors(places, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(icons, "rasterise", fail)
    source = Iconify(size=8, folder=places["folder"], cache=str(tmp_path))
    with pytest.raises(UserError, match=r"no space left.*data\.source\.cache"):
        source.check()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_renderer_is_a_user_error(places, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[icons\]'"):
        Iconify(**places).check()


def test_impossible_names_of_sets_are_refused():
    for sets in ((), ("../noto",), ("a b",)):
        with pytest.raises(UserError, match="names of Iconify's icon sets"):
            Iconify(sets=sets)


def test_missing_sets_are_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"no npm package .* data\.source\.download"):
        Iconify(folder=str(tmp_path), cache=str(tmp_path)).check()


def test_every_set_has_a_word_for_its_style():
    assert len(set(STYLES.values())) == len(STYLES) == 4


@pytest.mark.parametrize(
    "reference",
    ["{}", "./{}", "file://{}", "&#47;{}", "data:image/png;base64,AAAA"],
)
@pytest.mark.parametrize("name", ["href", "xlink:href", "href\n "])
def test_a_drawing_cannot_show_a_file(tmp_path, name, reference):
    renderer = pytest.importorskip("resvg_py")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    value = reference.format(tmp_path / "red.png")
    body = f'<image {name}="{value}" width="8" height="8"/>'
    with pytest.raises(UserError, match="refers to a file"):
        rasterise(IconData(body, (0, 0, 8, 8)).svg(), 8, renderer)


def test_a_drawing_may_refer_to_its_own_parts():
    renderer = pytest.importorskip("resvg_py")
    body = '<defs><rect id="a" width="8" height="8"/></defs><use href="#a"/><use xlink:href="#a"/>'
    assert rasterise(IconData(body, (0, 0, 8, 8)).svg(), 8, renderer)[..., 3].min() == 255
