import io
import json
import tarfile

import pytest

from jaxdiff.data.bad_records import NO_IMAGE, NO_REFERENCE, RecordError
from jaxdiff.data.sources.webdataset import WebDataset
from jaxdiff.errors import UserError


def _tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_samples_are_read_in_place_across_tars(tmp_path):
    metadata = json.dumps({"caption": ["one", "two"], "url": "x"}).encode()
    _tar(tmp_path / "1.tar", [("b/02.jpg", b"second"), ("b/02.json", metadata)])
    _tar(tmp_path / "0.tar", [("01.txt", "größe\n\nx".encode()), ("01.PNG", b"first")])
    source = WebDataset(path=str(tmp_path))
    source.check()
    assert len(source) == 2
    assert source[1]["image"] == b"second"
    assert source[0] == {
        "image": b"first",
        "captions": ["größe", "", "x"],
        "name": f"{tmp_path}/0.tar/01.PNG",
        "references": [],
    }
    assert source[1]["captions"] == ["one", "two"]


def test_only_a_single_suffix_makes_an_image(tmp_path):
    files = [("a.mask.png", b"mask"), ("a.png", b"image"), ("a.txt", b"x"), ("a.cls", b"3")]
    _tar(tmp_path / "0.tar", files)
    source = WebDataset(path=str(tmp_path / "0.tar"))
    assert [source[i]["image"] for i in range(len(source))] == [b"image"]


def test_captions_may_have_another_key(tmp_path):
    metadata = json.dumps({"text": "a pea", "caption": "no"}).encode()
    _tar(tmp_path / "0.tar", [("a.jpg", b"x"), ("a.json", metadata), ("b.jpg", b"y")])
    source = WebDataset(path=str(tmp_path), caption="text")
    assert source[0]["captions"] == ["a pea"]
    assert len(source) == 1
    (reject,) = source.left_out.rejects
    assert "b.jpg: it has no .txt or .json" in str(reject)


@pytest.mark.parametrize("data", [b"{", b"\xff"])
def test_unreadable_captions_make_bad_records(tmp_path, data):
    _tar(tmp_path / "0.tar", [("a.jpg", b"x"), ("a.json", data)])
    with pytest.raises(RecordError, match=r"a\.jpg"):
        _ = WebDataset(path=str(tmp_path))[0]


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "x/../../a.jpg"])
def test_paths_that_leave_the_archive_are_refused(tmp_path, name):
    _tar(tmp_path / "0.tar", [(name, b"x")])
    with pytest.raises(UserError, match="a path outside the archive"):
        WebDataset(path=str(tmp_path)).check()


def test_links_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "a.jpg"), (tarfile.LNKTYPE, "b.jpg")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            archive.addfile(member)
    with pytest.raises(UserError, match="contain no captioned images"):
        WebDataset(path=str(tmp_path)).check()


def test_damaged_and_compressed_tars_are_refused(tmp_path):
    _tar(tmp_path / "0.tar", [("a.jpg", b"x" * 2000)], mode="w:gz")
    with pytest.raises(UserError, match=r"cannot be read as a tar file .* uncompressed"):
        WebDataset(path=str(tmp_path)).check()
    with pytest.raises(UserError, match="does not exist"):
        WebDataset(path=str(tmp_path / "none")).check()


def test_further_images_are_references_if_they_are_named(tmp_path):
    names = ("a.control.10.png", "a.control.2.png", "a.png", "a.txt", "a.mask.png")
    names += ("b.png", "b.txt", "c.control.png")
    files = [(name, name.encode()) for name in names]
    _tar(tmp_path / "0.tar", files)
    with tarfile.open(tmp_path / "0.tar", "a") as archive:
        link = tarfile.TarInfo("d.control.png")
        link.type, link.linkname = tarfile.SYMTYPE, "gone.png"
        archive.addfile(link)
        for name in ("d.png", "d.txt"):
            archive.addfile(tarfile.TarInfo(name))
    source = WebDataset(path=str(tmp_path), reference="control")
    assert [source[i]["references"] for i in range(len(source))] == [
        [b"a.control.2.png", b"a.control.10.png"],
        [],
    ]
    rejects = {reject.name.split("/")[-1]: reject.kind for reject in source.left_out.rejects}
    assert rejects == {"c.control.png": NO_IMAGE, "d.png": NO_REFERENCE}
    assert source.left_out.others == {".png": 1}
