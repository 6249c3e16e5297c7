import codecs
import json
import math
import time

import pytest

from jaxdiff.errors import UserError
from jaxdiff.io.text import (
    DEEPEST_JSON,
    decode_text,
    format_json,
    lines_of,
    parse_json,
    read_json,
    read_text,
)

TEXT = "a grün pea 🫛"


@pytest.mark.parametrize(
    ("mark", "codec"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_the_encodings_that_a_mark_names_give_the_same_text(mark, codec):
    assert decode_text(mark + TEXT.encode(codec), "it") == TEXT


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode("utf-16-le"),
        b"a pea\0",
        TEXT.encode("latin-1", "replace") + b"\xe9",
        codecs.BOM_UTF16_LE + b"a",
        b"\xed\xa0\x80",
        codecs.BOM_UTF16_LE + b"\x00\xd8",
    ],
)
def test_other_bytes_are_refused(data):
    with pytest.raises(UserError, match=r"it .*UTF-8"):
        decode_text(data, "it")


def test_only_newlines_end_a_line():
    inside = "a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2028h\u2029i"
    assert lines_of(f"{inside}\n{inside}\r\nx\ry") == [inside, inside, "x", "y"]
    assert lines_of("") == []
    assert lines_of("a\n\n") == ["a", ""]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        "[" * 100_000,
        "9" * 5000,
        "-" + "9" * 5000,
        "1e999",
        "1." + "0" * 5000,
        "NaN",
        "Infinity",
        "",
        "{",
        "[1,]",
        '"' + "\\" * 100_001,
        r'"\ud83d"',
        r'{"\udce9": 1}',
        '"\udce9"',
        '{"a": 1, "a": 2}',
        '[{"a": {"b": 1, "b": null}}]',
    ],
)
def test_json_beyond_the_limits_is_one_sentence(text):
    with pytest.raises(UserError, match=r"^it "):
        parse_json(text, "it")


def test_brackets_in_strings_are_not_nested():
    value = {"a": "[" * 1000 + '"{\\', "b": [{}] * 1000}
    assert parse_json(json.dumps(value), "it") == value
    assert parse_json(r'"\ud83e\uded1"', "it") == "\U0001fad1"
    deepest = "[" * DEEPEST_JSON + "]" * DEEPEST_JSON
    assert parse_json(deepest, "it")


def test_a_string_that_does_not_end_is_refused_at_once():
    start = time.process_time()
    with pytest.raises(UserError, match="is not valid JSON"):
        parse_json("[" + "[]," * DEEPEST_JSON + '"' + '\\"' * 200_000, "it")
    assert time.process_time() - start < 3


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (tmp_path, loop, tmp_path / "missing", tmp_path / ("x" * 300), "a\0b"):
        for read in (read_text, read_json):
            with pytest.raises(UserError, match="cannot be read"):
                read(path)


def test_json_with_a_mark_is_read(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(codecs.BOM_UTF8 + b'{"a": 1}')
    assert read_json(file) == {"a": 1}


def test_a_key_with_one_value_twice_is_read():
    assert parse_json('{"a": [1], "b": 2, "a": [1]}', "it") == {"a": [1], "b": 2}


@pytest.mark.parametrize("text", ["[1]", "3", "null", '"a"'])
def test_a_file_of_json_is_an_object(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="no JSON object: give the whole folder"):
        read_json(tmp_path / "a.json", "the whole folder")


def test_bytes_that_are_no_text_are_left_for_the_lines_that_have_them():
    text = decode_text(b"\xef\xbb\xbfa pea\n\xe9clair\n", "it", by_line=True)
    assert text == "a pea\n\udce9clair\n"
    with pytest.raises(UserError, match="NUL"):
        decode_text(b"a pea\n\0", "it", by_line=True)


@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_what_is_written_is_read(ascii, indent):
    value = {"a": [math.nan, math.inf, 1.5, True, None], "caf\udce9": ("🫛", "caf\udce9")}
    text = format_json(value, indent=indent, ascii=ascii)
    assert parse_json(text.encode(), "it") == {
        "a": [None, None, 1.5, True, None],
        r"caf\xe9": ["🫛", r"caf\xe9"],
    }
    assert ("🫛" in text) != ascii
