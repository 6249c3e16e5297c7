import json

import numpy as np
import pytest
from PIL import Image

from jaxdiff.data.bad_records import (
    NO_CAPTION,
    NO_IMAGE,
    NO_REFERENCE,
    UNLISTED,
    RecordError,
    account_of,
)
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.errors import UserError


def _image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 5, 3), value, np.uint8)).save(path)


def _metadata(folder, *rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_metadata_gives_each_image_its_captions(tmp_path):
    _image(tmp_path / "b.png")
    _image(tmp_path / "sub" / "a.png")
    _metadata(
        tmp_path,
        {"file_name": "sub/a.png", "text": "one"},
        {"file_name": "b.png", "text": ["two", "three"]},
    )
    source = ImageFolder(path=str(tmp_path))
    source.check()
    assert [source[i]["captions"] for i in range(len(source))] == [["one"], ["two", "three"]]
    assert source[0]["image"] == (tmp_path / "sub" / "a.png").read_bytes()
    assert source[0]["name"].endswith("sub/a.png")


def test_text_files_give_a_caption_per_line(tmp_path):
    _image(tmp_path / "deep" / "a.jpg")
    (tmp_path / "deep" / "a.txt").write_text("a pea\n\na green pea\n", encoding="utf-8")
    source = ImageFolder(path=str(tmp_path))
    source.check()
    assert len(source) == 1
    assert [c for c in source[0]["captions"] if c] == ["a pea", "a green pea"]


def test_a_prompt_is_the_caption_of_every_image(tmp_path):
    _image(tmp_path / "a.png")
    _image(tmp_path / "deep" / "b.jpg")
    (tmp_path / "a.txt").write_text("not read")
    source = ImageFolder(path=str(tmp_path), prompt="a photo of sks dog")
    source.check()
    assert [source[i]["captions"] for i in range(len(source))] == [["a photo of sks dog"]] * 2


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        ImageFolder(path=str(tmp_path / "none")).check()


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="contains no images"):
        ImageFolder(path=str(tmp_path)).check()


def test_images_without_captions_are_refused(tmp_path):
    _image(tmp_path / "a.png")
    with pytest.raises(UserError, match="no captions"):
        ImageFolder(path=str(tmp_path)).check()


@pytest.mark.parametrize(("there", "hint"), [("b.png", ""), ("GONE.png", "GONE.png does")])
def test_lines_of_missing_files_are_left_out(tmp_path, there, hint):
    _image(tmp_path / "a.png")
    _image(tmp_path / there)
    _metadata(
        tmp_path,
        {"file_name": "a.png", "text": "x"},
        {"file_name": "gone.png", "text": "y"},
    )
    source = ImageFolder(path=str(tmp_path))
    assert len(source) == 1
    (reject, unlisted) = source.left_out.rejects
    assert reject.name.endswith("gone.png")
    assert f"Line 2 of {tmp_path}/metadata.jsonl names it" in reject.reason
    assert reject.reason.endswith(hint)
    assert (unlisted.name, unlisted.kind) == (f"{tmp_path}/{there}", UNLISTED)


def test_missing_caption_column_suggests_the_nearest(tmp_path):
    _image(tmp_path / "a.png")
    _metadata(tmp_path, {"file_name": "a.png", "txt": "x"})
    with pytest.raises(UserError, match="did you mean 'txt'"):
        ImageFolder(path=str(tmp_path)).check()


@pytest.mark.parametrize("caption", [None, "", "  ", [], [None, ""]])
def test_metadata_without_captions_is_refused(tmp_path, caption):
    for name in "ab":
        _image(tmp_path / f"{name}.png")
    _metadata(tmp_path, *({"file_name": f"{name}.png", "text": caption} for name in "ab"))
    with pytest.raises(UserError, match="'text' are missing or empty"):
        ImageFolder(path=str(tmp_path)).check()


def test_one_caption_in_the_metadata_is_enough(tmp_path):
    for name in "ab":
        _image(tmp_path / f"{name}.png")
    _metadata(tmp_path, {"file_name": "a.png", "text": None}, {"file_name": "b.png", "text": "x"})
    ImageFolder(path=str(tmp_path)).check()


@pytest.mark.parametrize(
    "name",
    ["../a.png", "sub/../../a.png", "/etc/passwd", "C:\\a.png", "..\\a.png", "gs://bucket/a.png"],
)
def test_file_names_that_leave_the_folder_are_refused(tmp_path, name):
    _metadata(tmp_path, {"file_name": name, "text": "x"})
    with pytest.raises(UserError, match="outside the folder"):
        ImageFolder(path=str(tmp_path)).check()


@pytest.mark.parametrize("line", ["{not json", '{"text": "x"}', "[1]"])
def test_error_names_the_malformed_line(tmp_path, line):
    (tmp_path / "metadata.jsonl").write_text("\n" + line + "\n")
    with pytest.raises(UserError, match="Line 2 of"):
        ImageFolder(path=str(tmp_path)).check()


def test_unreadable_caption_invalidates_only_its_record(tmp_path):
    for name in "ab":
        _image(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    source = ImageFolder(path=str(tmp_path))
    source.check()
    assert source[0]["captions"] == ["fine"]
    with pytest.raises(RecordError, match=r"b\.png.*b\.txt is not UTF-8"):
        _ = source[1]


def test_images_without_text_and_texts_without_image_are_left_out(tmp_path):
    for name in "ab":
        _image(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "c.txt").write_text("lost")
    source = ImageFolder(path=str(tmp_path))
    assert len(source) == 1
    assert [(r.name, r.kind) for r in source.left_out.rejects] == [
        (f"{tmp_path}/b.png", NO_CAPTION),
        (f"{tmp_path}/c.txt", NO_IMAGE),
    ]


def test_a_mark_before_a_caption_and_upper_case_metadata_are_read(tmp_path):
    _image(tmp_path / "a.png")
    (tmp_path / "Metadata.JSONL").write_text('{"file_name": "a.png", "text": ["\\ufeffa pea"]}\n')
    assert ImageFolder(path=str(tmp_path))[0]["captions"] == ["a pea"]


def test_references_are_read_and_missing_ones_reject_their_record(tmp_path):
    for i, name in enumerate(("a.png", "b.png", "c.png", "d.png", "from/a.png", "from/b.png")):
        _image(tmp_path / name, i)
    _metadata(
        tmp_path,
        {"file_name": "a.png", "text": "x", "control": "from/a.png"},
        {"file_name": "b.png", "text": "y", "control": ["from/b.png", "a.png"]},
        {"file_name": "c.png", "text": "z", "control": ["from/a.png", "from/gone.png"]},
        {"file_name": "d.png", "text": "alone"},
    )
    source = ImageFolder(path=str(tmp_path), reference="control")
    source.check()
    found = [list(source[i]["references"]) for i in range(len(source))]
    expected = [["from/a.png"], ["from/b.png", "a.png"], []]
    assert found == [[(tmp_path / name).read_bytes() for name in names] for names in expected]
    (reject,) = source.left_out.rejects
    assert (reject.name, reject.kind) == (f"{tmp_path}/c.png", NO_REFERENCE)
    assert reject.reason == "its reference image from/gone.png does not exist"
    account = account_of(source)
    assert (account.found, account.used) == (4, 3)
    (tmp_path / "from" / "a.png").unlink()
    with pytest.raises(RecordError, match=r"a.png cannot be read"):
        source[0]


def test_a_csv_file_names_references(tmp_path):
    _image(tmp_path / "a.png")
    _image(tmp_path / "b.png", 1)
    _image(tmp_path / "c.png", 2)
    rows = "file_name,text,reference\na.png,x,b.png\nb.png,y,a.png|c.png\nc.png,z,\n"
    (tmp_path / "metadata.csv").write_text(rows)
    source = ImageFolder(path=str(tmp_path), reference="reference")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert [source[i]["references"] for i in range(3)] == [[b], [a, c], []]


@pytest.mark.parametrize("name", ["../b.png", "/etc/b.png", ["a.png", "https://x/b.png"], 3])
def test_references_outside_the_folder_or_without_a_path_are_refused(tmp_path, name):
    _image(tmp_path / "a.png")
    _metadata(tmp_path, {"file_name": "a.png", "text": "x", "reference": name})
    with pytest.raises(UserError, match=r"reference must be relative|path of a reference image"):
        ImageFolder(path=str(tmp_path), reference="reference").check()
    with pytest.raises(UserError, match=r"no column 'refrence': did you mean 'reference'"):
        ImageFolder(path=str(tmp_path), reference="refrence").check()
