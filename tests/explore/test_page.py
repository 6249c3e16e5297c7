import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from jaxdiff.explore.axes import Axis
from jaxdiff.explore.page import Space, nearest_neighbours, render_page

CAPTIONS = [
    "a pea",
    "</script><script>alert('x')</script>",
    'a "blue" pear & <b>more</b>',
    "ünï 🍅",
]


class Elements(html.parser.HTMLParser):
    """All elements with their attributes, and the text of the scripts."""

    def __init__(self):
        super().__init__()
        self.found, self.scripts = [], []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.scripts and self.found[-1][0] == "script":
            self.scripts[-1] += data


def image(level: int) -> np.ndarray:
    return np.full((16, 16, 3), level, np.uint8)


@pytest.fixture(scope="module")
def text() -> str:
    values = np.arange(4.0)
    axes = [
        Axis(key=k, name="n<ame", low="l", high="h", values=values, group="learned") for k in "ab"
    ]
    space = Space("CLIP", axes, {"chosen axes": ("a", "b")}, nearest_neighbours(values[:, None], 2))
    images = np.stack([image(level) for level in (0, 80, 160, 240)])
    return render_page("4 images <of> a & b", images, CAPTIONS, [space])


@pytest.fixture(scope="module")
def elements(text) -> Elements:
    parser = Elements()
    parser.feed(text)
    return parser


def test_the_page_loads_nothing_from_elsewhere(text, elements):
    for tag, attributes in elements.found:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        assert not {"src", "href", "srcset", "action"} & set(attributes)
    assert not re.search(r"https?:|//[a-z]+\.|@import|fetch\(|XMLHttpRequest|import\(", text)
    policy = next(a["content"] for t, a in elements.found if "http-equiv" in a)
    assert "default-src 'none'" in policy


def test_every_placeholder_of_the_template_is_filled(text):
    assert "{{" not in text
    assert "<title>4 images &lt;of&gt; a &amp; b</title>" in text


def test_captions_are_escaped(elements):
    assert len(elements.scripts) == 2
    data = json.loads(elements.scripts[0])
    assert data["captions"] == CAPTIONS
    (space,) = data["spaces"]
    assert space["near"] == [[1, 2], [0, 2], [1, 3], [2, 1]]
    assert space["axes"][0]["values"] == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=0.02)
    assert {axis["key"] for axis in space["axes"]} >= set(space["views"]["chosen axes"])


def test_the_thumbnails_are_in_the_page(text, elements):
    data = json.loads(elements.scripts[0])
    (encoded,) = re.findall(r'"data:image/jpeg;base64,([^"]+)"', text)
    with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    assert data["thumb"] == 16
    for i, level in enumerate((0, 80, 160, 240)):
        row, column = divmod(i, data["columns"])
        tile = pixels[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
        assert abs(tile - level).max() <= 8


def test_neighbours_are_sorted_and_exclude_the_point_itself():
    points = np.array([[0.0], [1.0], [3.0], [7.0]])
    np.testing.assert_array_equal(nearest_neighbours(points, 2), [[1, 2], [0, 2], [1, 0], [2, 1]])
    assert nearest_neighbours(points, 9).shape == (4, 3)
