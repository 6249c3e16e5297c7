"""No record is lost: found = used + rejected, for every source and for many spoilt inputs.

Each case writes a data set with one good record, `good`, and something that is spoilt. It states
how many records are used, and the kinds of those rejected.
"""

import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jaxdiff.data import bad_records as kinds
from jaxdiff.data.bad_records import Account, LeftOut, RecordError, account_of
from jaxdiff.data.loader import DataConfig
from jaxdiff.data.sources.array_record import ArrayRecord, write_array_record, write_encoded
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.sources.parquet import Parquet
from jaxdiff.data.sources.prior_preservation import PriorPreservation
from jaxdiff.data.sources.webdataset import WebDataset
from jaxdiff.data.transforms import Transforms
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.errors import UserError
from jaxdiff.training.prepare_shards import Sharing, write_records


def encoded(format="PNG", side=8):
    data = io.BytesIO()
    Image.new("RGB", (side, side)).save(data, format)
    return data.getvalue()


PNG, AVIF = encoded(), encoded("AVIF")


def write_folder(path, files):
    """Write files from a dictionary: bytes, text, or a function that makes the file."""
    for name, data in files.items():
        file = path / os.fsdecode(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        if callable(data):
            data(file)
        else:
            file.write_bytes(data if isinstance(data, bytes) else data.encode())


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def row(name, text="x"):
    return {"file_name": name, "text": text}


def link_to(target):
    return lambda file: file.symlink_to(target)


GOOD = {"good.png": PNG, "good.txt": "good"}
LISTED = {"a.png": PNG, "b.png": PNG, "sub/c.png": PNG}

# More files, records used in all, kinds rejected.
FOLDERS = {
    "nothing more": ({}, 1, []),
    "avif, jfif, jpe": (
        {
            n: d
            for i, x in enumerate(("avif", "jfif", "jpe"))
            for n, d in ((f"{i}.{x}", AVIF if x == "avif" else encoded("JPEG")), (f"{i}.txt", "x"))
        },
        4,
        [],
    ),
    "formats that are not read": (
        {"a.heic": b"x", "a.txt": "x", "b.JXL": b"x"},
        1,
        [kinds.UNSUPPORTED] * 2,
    ),
    "upper case": ({"A.PNG": PNG, "A.TXT": "x", "B.Jpg": encoded("JPEG"), "B.Txt": "x"}, 3, []),
    "other case of a name": ({"A.png": PNG, "a.txt": "x"}, 1, [kinds.NO_CAPTION, kinds.NO_IMAGE]),
    "linked folder": (
        {"../else/b.png": PNG, "../else/b.txt": "x", "sub": link_to("../else")},
        2,
        [],
    ),
    "loop of folders": ({"sub/loop": link_to("..")}, 1, []),
    "loop of links": (
        {"b.png": link_to("b.png"), "b.txt": "x"},
        1,
        [kinds.UNREADABLE, kinds.NO_IMAGE],
    ),
    "link to nothing": ({"b.png": link_to("gone")}, 1, [kinds.NO_FILE]),
    "pipe": ({"b.png": os.mkfifo, "c": os.mkfifo}, 1, [kinds.NO_FILE] * 2),
    "image without caption": ({"b.png": PNG}, 1, [kinds.NO_CAPTION]),
    "caption without image": ({"b.txt": "x"}, 1, [kinds.NO_IMAGE]),
    "empty caption": ({"b.png": PNG, "b.txt": " \n\u2028"}, 1, [kinds.NO_CAPTION]),
    "two images of one stem": ({"good.jpg": encoded("JPEG")}, 2, []),
    "two captions of one stem": ({"good.TXT": "other"}, 1, []),
    "dots": ({"a.v2.png": PNG, "a.v2.txt": "x", "a.v3.png": PNG}, 2, [kinds.NO_CAPTION]),
    "hidden": ({".DS_Store": b"x", "._good.png": b"x", ".git/a.png": PNG}, 1, []),
    "other files": ({"README.md": "x", "Makefile": "x", "a.json": "{}"}, 1, []),
    "other data": (
        {"a.tar": b"x", "b.tar.gz": b"x", "c.parquet": b"x", "d.zip": b"x"},
        1,
        [kinds.ELSEWHERE, kinds.UNSUPPORTED, kinds.ELSEWHERE, kinds.ELSEWHERE],
    ),
    "Latin-1 caption": ({"b.png": PNG, "b.txt": b"caf\xe9"}, 1, [kinds.NOT_TEXT]),
    "NUL in a caption": ({"b.png": PNG, "b.txt": b"a\0b"}, 1, [kinds.NOT_TEXT]),
    "UTF-16 caption": ({"b.png": PNG, "b.txt": "x".encode("utf-16")}, 2, []),
    "cut UTF-16 caption": ({"b.png": PNG, "b.txt": b"\xff\xfeabc"}, 1, [kinds.NOT_TEXT]),
    "huge caption": ({"b.png": PNG, "b.txt": b"x" * (2**20 + 1)}, 1, [kinds.TOO_LARGE]),
    "name that is not UTF-8": ({b"caf\xe9.png": PNG, b"caf\xe9.txt": "x"}, 2, []),
    "spoilt one that is not UTF-8": (
        {b"caf\xe9.png": b"no", b"caf\xe9.txt": "x"},
        1,
        [kinds.UNREADABLE],
    ),
    "newline in a name": ({"a\nb.png": b"no", "a\nb.txt": "x"}, 1, [kinds.UNREADABLE]),
    "not an image": ({"b.png": b"no", "b.txt": "x"}, 1, [kinds.UNREADABLE]),
    "empty image": ({"b.png": b"", "b.txt": "x"}, 1, [kinds.UNREADABLE]),
    "cut image": ({"b.png": PNG[:40], "b.txt": "x"}, 1, [kinds.UNREADABLE]),
    "too large an image": ({"b.png": encoded(side=70), "b.txt": "x"}, 1, [kinds.TOO_LARGE]),
    "folder with the name of an image": ({"b.png/c.png": PNG, "b.png/c.txt": "x"}, 2, []),
    "metadata of a part": (
        {"m/metadata.jsonl": lines(row("a.png")), "m/a.png": PNG, "m/b.png": PNG},
        2,
        [kinds.UNLISTED],
    ),
    "metadata below metadata": (
        {
            **LISTED,
            "metadata.jsonl": lines(row("a.png"), row("b.png")),
            "sub/metadata.jsonl": lines(row("c.png")),
        },
        3,
        [kinds.UNLISTED],
    ),
    "metadata as CSV": (
        {**LISTED, "metadata.csv": 'file_name,text\na.png,x\nb.png,"y, z"\n'},
        2,
        [kinds.UNLISTED] * 2,
    ),
    "metadata as Parquet": (
        {
            **LISTED,
            "metadata.parquet": lambda file: pq.write_table(
                pa.table({"file_name": ["a.png", "gone.png"], "text": ["x", "y"]}), file
            ),
        },
        1,
        [kinds.NO_IMAGE] + [kinds.UNLISTED] * 3,
    ),
    "lines listed twice": (
        {**LISTED, "metadata.jsonl": lines(row("a.png"), row("a.png", "y"))},
        2,
        [kinds.UNLISTED] * 3,
    ),
    "listed but missing": (
        {"metadata.jsonl": lines(row("good.png"), row("Good.PNG"))},
        1,
        [kinds.NO_IMAGE],
    ),
    "listed but of no format": (
        {"a.heic": b"", "metadata.jsonl": lines(row("good.png"), row("a.heic"))},
        1,
        [kinds.UNSUPPORTED],
    ),
    "listed without a suffix": (
        {"a": PNG, "metadata.jsonl": lines(row("good.png"), row("a"))},
        2,
        [],
    ),
    "listed but a pipe": (
        {"a.png": os.mkfifo, "metadata.jsonl": lines(row("good.png"), row("a.png"))},
        1,
        [kinds.NO_IMAGE],
    ),
    "metadata with a mark and CRLF": (
        {"metadata.jsonl": b"\xef\xbb\xbf" + lines(row("good.png")).encode() + b"\r\n"},
        1,
        [],
    ),
    "Latin-1 in a line": (
        {
            "a.png": PNG,
            "metadata.jsonl": lines(row("good.png")).encode()
            + b'{"file_name": "a.png", "text": "caf\xe9"}',
        },
        1,
        [kinds.NOT_TEXT],
    ),
    "null in the metadata": (
        {"a.png": PNG, "metadata.jsonl": lines(row("good.png"), row("a.png", None))},
        1,
        [kinds.NO_CAPTION],
    ),
    "separators in the metadata": (
        {"metadata.jsonl": '{"file_name": "good.png", "text": "a\u2028b\x85c"}'},
        1,
        [],
    ),
}


def check(source, used, rejected, tmp_path):
    """Prepare a source, and compare what it found, wrote and rejected."""
    indexed = account_of(source)
    data = DataConfig(source=source, transforms=Transforms(size=8, max_pixels=4096))
    out = tmp_path / "out"
    manifest = write_records(None, data, str(out), Sharing(workers=0, shards=2))
    account = manifest.account
    stated = json.loads((out / "manifest.json").read_text())
    assert account.used == used
    assert sorted(reject.kind for reject in account.left_out.rejects) == sorted(rejected)
    assert stated["found"] == indexed.found == used + len(rejected)
    assert stated["found"] - stated["records"] - stated["rejected"] == 0
    assert sum(stated["reasons"].values()) == stated["rejected"]
    prepared = ArrayRecord(path=str(out))
    prepared.check()
    assert len(prepared) == used
    assert account_of(prepared).text() == f"Found {used} record{'s' * (used != 1)}."
    return account


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_loses_no_record(tmp_path, case):
    more, used, rejected = FOLDERS[case]
    folder = tmp_path / "data"
    write_folder(folder, {**GOOD, **more})
    account = check(ImageFolder(path=str(folder)), used, rejected, tmp_path)
    # Every file is in a record, rejected, among the others, or hidden.
    other = sum(account.left_out.others.values())
    if case == "other files":
        assert account.left_out.others == {".md": 1, ".json": 1, "without a suffix": 1}
    elif case == "loop of folders":
        assert account.left_out.others == {"links to folders that are read already": 1}
    elif not any("metadata" in name for name in map(os.fsdecode, more)):
        assert other == (case == "two captions of one stem")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path, {**GOOD, "locked/a.png": PNG})
    scandir = os.scandir

    def locked(path):
        if "locked" in str(path):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    (reject,) = ImageFolder(path=str(tmp_path)).left_out.rejects
    assert str(reject) == f"{tmp_path}/locked: the folder cannot be read (Permission denied)"


def test_a_prompt_needs_no_captions(tmp_path):
    write_folder(tmp_path, {"a.png": PNG, "a.txt": "x", "b.heic": b"x", "metadata.jsonl": "{"})
    account = account_of(ImageFolder(path=str(tmp_path), prompt="a photo"))
    assert account.text() == (
        "Found 2 records, left out 1: 1 of an unsupported format; "
        "ignored 2 other files: 1 .txt, 1 .jsonl."
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"metadata.jsonl": lines(row("good.png")), "metadata.csv": "file_name,text\n"}, "both"),
        ({"metadata.csv": "file_name,text\ngood.png\n"}, "Line 2 of .* has 1 values: expected 2"),
        ({"metadata.csv": 'file_name,text\ngood.png,"x\n'}, "is not CSV"),
        ({"metadata.csv": "file_name,text,text\ngood.png,x,y\n"}, "several columns 'text'"),
        ({"metadata.parquet": b"no"}, "cannot be read as Parquet"),
        ({"metadata.jsonl": "[" * 1000}, "Line 1 of .* is nested more than"),
    ],
)
def test_metadata_are_read_whole_or_refused(tmp_path, files, message):
    write_folder(tmp_path, {**GOOD, **files})
    with pytest.raises(UserError, match=message):
        ImageFolder(path=str(tmp_path)).check()


# Members of an archive: bytes, or a type of member and the name to which it links.
SPARSE = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "1", "GNU.sparse.major": "0"}
TARS = {
    "nothing more": ([], 1, []),
    "names with dots": (
        [
            ("photo.v2.png", PNG),
            ("photo.v2.txt", b"x"),
            ("photo.v3.png", PNG),
            ("photo.v3.txt", b"x"),
            ("1.5.png", PNG),
            ("1.5.json", b'{"caption": "x"}'),
        ],
        4,
        [],
    ),
    "an image with dots without its caption": (
        [("photo.v2.png", PNG), ("photo.txt", b"x")],
        1,
        [kinds.NO_CAPTION, kinds.NO_IMAGE],
    ),
    "further files of a sample": (
        [("good.seg.png", PNG), ("good.cls", b"1"), ("good.json", b"{}"), ("good.seg.json", b"{}")],
        1,
        [],
    ),
    "a further pair of a sample": ([("good.v2.png", PNG), ("good.v2.txt", b"x")], 2, []),
    "hard link": ([("b.png", (tarfile.LNKTYPE, "good.png")), ("b.txt", b"x")], 2, []),
    "symbolic link": (
        [
            ("d/b.png", (tarfile.SYMTYPE, "../good.png")),
            ("d/b.txt", (tarfile.SYMTYPE, "../good.txt")),
        ],
        2,
        [],
    ),
    "link to a link": (
        [
            ("b.png", (tarfile.SYMTYPE, "c.png")),
            ("b.txt", b"x"),
            ("c.png", (tarfile.LNKTYPE, "good.png")),
            ("c.txt", b"x"),
        ],
        3,
        [],
    ),
    "loop of links": (
        [("b.png", (tarfile.SYMTYPE, "c.png")), ("c.png", (tarfile.SYMTYPE, "b.png"))],
        1,
        [kinds.NO_FILE] * 2,
    ),
    "links outside": (
        [("b.png", (tarfile.SYMTYPE, "/etc/hostname")), ("c.png", (tarfile.LNKTYPE, "../x.png"))],
        1,
        [kinds.NO_FILE] * 2,
    ),
    "a pipe": ([("b.png", (tarfile.FIFOTYPE, ""))], 1, [kinds.NO_FILE]),
    "avif": ([("b.avif", AVIF), ("b.txt", b"x")], 2, []),
    "a format that is not read": ([("b.heic", b"x"), ("b.txt", b"x")], 1, [kinds.UNSUPPORTED]),
    "upper case": (
        [("A.PNG", PNG), ("A.TXT", b"x"), ("B.PNG", PNG), ("B.Json", b'{"caption": "x"}')],
        3,
        [],
    ),
    "two images of a sample": ([("good.jpg", encoded("JPEG"))], 1, [kinds.REPEATED]),
    "a file twice": ([("good.png", PNG), ("good.txt", b"x")], 1, [kinds.REPEATED]),
    "a file in two cases": ([("good.PNG", PNG)], 1, [kinds.REPEATED]),
    "a key in two folders": ([("d/good.png", PNG), ("d/good.txt", b"x")], 2, []),
    "captions apart from their images": (
        [("b.png", PNG), ("c.png", PNG), ("b.txt", b"x"), ("c.txt", b"x")],
        3,
        [],
    ),
    "no caption": ([("b.png", PNG)], 1, [kinds.NO_CAPTION]),
    "no image": ([("b.txt", b"x"), ("c.json", b"{}")], 1, [kinds.NO_IMAGE] * 2),
    "no caption in JSON": ([("b.png", PNG), ("b.json", b'{"text": "x"}')], 1, [kinds.NO_CAPTION]),
    "not JSON": ([("b.png", PNG), ("b.json", b"{")], 1, [kinds.NOT_TEXT]),
    "deep JSON": ([("b.png", PNG), ("b.json", b"[" * 9999)], 1, [kinds.NOT_TEXT]),
    "Latin-1": ([("b.png", PNG), ("b.txt", b"caf\xe9")], 1, [kinds.NOT_TEXT]),
    "long names": (
        [(f"{'n' * 200}/{'b' * 150}.png", PNG), (f"{'n' * 200}/{'b' * 150}.txt", b"x")],
        2,
        [],
    ),
    "hidden": (
        [("._good.png", b"x"), (".cache/a.png", PNG), ("./c.png", PNG), ("c.txt", b"x")],
        2,
        [],
    ),
    "not an image": ([("b.png", b"no"), ("b.txt", b"x")], 1, [kinds.UNREADABLE]),
    "other data inside": ([("b.parquet", b"x"), ("README", b"x")], 1, [kinds.ELSEWHERE]),
}


def tar_of(files, mode="w", format=tarfile.PAX_FORMAT):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode, format=format) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                member.type, member.linkname = content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


GOOD_TAR = [("good.png", PNG), ("good.txt", b"good")]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("case", TARS)
def test_an_archive_loses_no_record(tmp_path, case, format):
    more, used, rejected = TARS[case]
    (tmp_path / "t.tar").write_bytes(tar_of([*GOOD_TAR, *more], format=format))
    check(WebDataset(path=str(tmp_path / "t.tar")), used, rejected, tmp_path)


MORE_TAR = [("b.png", PNG), ("b.txt", b"x")]
# Other files in a folder of archives.
TAR_FOLDERS = {
    "compressed": (
        {"b.tar.gz": b"x", "c.tgz": b"x", "d.TAR.ZST": b"x"},
        1,
        [kinds.UNSUPPORTED] * 3,
    ),
    "upper case": ({"b.TAR": tar_of(MORE_TAR)}, 2, []),
    "an empty one": ({"b.tar": tar_of([])}, 1, [kinds.NO_FILE]),
    "two in one file": (
        {"b.tar": tar_of(MORE_TAR) + tar_of([("c.png", PNG), ("c.txt", b"x")])},
        3,
        [],
    ),
    "without its end": (
        {"b.tar": tar_of(MORE_TAR).rstrip(b"\0") + b"\0" * 511},
        2,
        [kinds.UNREADABLE],
    ),
    "images and Parquet beside": (
        {"a.png": PNG, "b.parquet": b"x", "c.md": b"x"},
        1,
        [kinds.ELSEWHERE] * 2,
    ),
}


@pytest.mark.parametrize("case", TAR_FOLDERS)
def test_a_folder_of_archives_loses_no_record(tmp_path, case):
    more, used, rejected = TAR_FOLDERS[case]
    folder = tmp_path / "data"
    write_folder(folder, {"a.tar": tar_of(GOOD_TAR), **more})
    check(WebDataset(path=str(folder)), used, rejected, tmp_path)


def damaged(data, at):
    return data[:at] + b"x" * 200 + data[at + 200 :]


WHOLE = tar_of([*GOOD_TAR, *MORE_TAR])


@pytest.mark.parametrize(
    "data",
    [
        WHOLE[:700],
        WHOLE[:1300],
        damaged(WHOLE, 1024 + 100),
        damaged(WHOLE, 2048 + 200),
        WHOLE + b"x" * 512,
        WHOLE + b"x",
        tar_of(GOOD_TAR, "w:gz"),
        b"",
    ],
)
def test_a_damaged_archive_is_refused(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(tar_of(GOOD_TAR))
    (tmp_path / "b.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"b\.tar cannot be read as a tar file"):
        WebDataset(path=str(tmp_path)).check()


IMAGE = {"bytes": PNG, "path": None}
PARQUETS = {
    "plain": (pa.array([PNG, PNG]), pa.array(["x", "y"]), 2, []),
    "dictionary": (
        pa.array([PNG, PNG]).dictionary_encode(),
        pa.array(["x", "y"]).dictionary_encode(),
        2,
        [],
    ),
    "views": (
        pa.array([PNG, PNG], pa.binary_view()),
        pa.array(["x", "y"], pa.string_view()),
        2,
        [],
    ),
    "large": (
        pa.array([PNG, PNG], pa.large_binary()),
        pa.array(["x", "y"], pa.large_string()),
        2,
        [],
    ),
    "fixed sizes": (
        pa.array([PNG, PNG], pa.binary(len(PNG))),
        pa.array([["x"], ["y"]], pa.list_(pa.string(), 1)),
        2,
        [],
    ),
    "list of dictionary": (
        pa.array([IMAGE, IMAGE]),
        pa.array([["x"], ["y"]], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
        2,
        [],
    ),
    "list views": (
        pa.array([PNG, PNG]),
        pa.array([["x"], ["y"]], pa.list_view(pa.string())),
        2,
        [],
    ),
    "large lists": (
        pa.array([PNG, PNG]),
        pa.array([["x"], []], pa.large_list(pa.string())),
        1,
        [kinds.NO_CAPTION],
    ),
    "views in a struct": (
        pa.array([IMAGE, None], pa.struct({"bytes": pa.binary_view()})),
        pa.array(["x", "y"]),
        1,
        [kinds.NO_IMAGE],
    ),
    "only a path": (
        pa.array([IMAGE, {"bytes": None, "path": "a.png"}]),
        pa.array(["x", "y"]),
        1,
        [kinds.NO_IMAGE],
    ),
    "null image": (pa.array([PNG, None]), pa.array(["x", "y"]), 1, [kinds.NO_IMAGE]),
    "null caption": (pa.array([PNG, PNG]), pa.array(["x", None]), 1, [kinds.NO_CAPTION]),
    "null in a list": (pa.array([PNG, PNG]), pa.array([["x"], [None]]), 1, [kinds.NO_CAPTION]),
    "null row": (pa.array([IMAGE, None]), pa.array(["x", None]), 1, [kinds.NO_IMAGE]),
    "empty bytes": (pa.array([PNG, b""]), pa.array(["x", "y"]), 1, [kinds.UNREADABLE]),
    "not UTF-8": (
        pa.array([PNG, PNG]),
        pa.array([b"x", b"caf\xe9"]).view(pa.string()),
        1,
        [kinds.NOT_TEXT],
    ),
    "not an image": (pa.array([PNG, b"no"]), pa.array(["x", "y"]), 1, [kinds.UNREADABLE]),
}


@pytest.mark.parametrize("case", PARQUETS)
def test_a_table_loses_no_record(tmp_path, case):
    image, text, used, rejected = PARQUETS[case]
    pq.write_table(pa.table({"an.image": image, "a.text": text}), tmp_path / "t.parquet")
    source = Parquet(path=str(tmp_path / "t.parquet"), image="an.image", caption="a.text")
    check(source, used, rejected, tmp_path)


def test_tables_of_several_types_and_other_files_lose_no_record(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number, (image, text, *_) in enumerate(PARQUETS.values()):
        pq.write_table(pa.table({"image": image, "text": text}), folder / f"{number}.PARQUET")
    pq.write_table(pa.table({"image": [PNG], "text": ["x"]}).slice(0, 0), folder / "none.parquet")
    write_folder(folder, {"a.tar": b"x", "b.md": b"x", "c.csv": b"x"})
    used = sum(used for _, _, used, _ in PARQUETS.values())
    rejected = [kind for *_, some in PARQUETS.values() for kind in some]
    account = check(Parquet(path=str(folder)), used, [*rejected, kinds.ELSEWHERE], tmp_path)
    assert account.left_out.others == {".md": 1, ".csv": 1}


@pytest.mark.parametrize("name", ["image", "text"])
def test_two_columns_of_a_name_are_refused(tmp_path, name):
    columns = [pa.array([PNG]), pa.array(["x"]), pa.array(["y"])]
    pq.write_table(pa.table(columns, names=["image", "text", name]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=f"a.parquet has 2 columns {name!r}: expected one"):
        Parquet(path=str(tmp_path)).check()


@pytest.mark.parametrize(
    "image", [pa.array(["a.png"]), pa.array([[1, 2]], pa.list_(pa.uint8())), pa.array([1])]
)
def test_images_that_are_no_bytes_are_refused(tmp_path, image):
    pq.write_table(pa.table({"image": image, "text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="must name a column of encoded images"):
        Parquet(path=str(tmp_path)).check()


def test_a_glob_that_matches_a_folder_says_so(tmp_path):
    for name in ("a.parquet", "b.parquet/part.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": [PNG], "text": ["x"]}), tmp_path / name)
    source = Parquet(path=str(tmp_path / "*.parquet"))
    check(source, 1, [kinds.NO_FILE], tmp_path)


@pytest.mark.parametrize(
    "spoilt",
    [b"", b"JDR1", b"JDR1\xff\xff\xff\xff{}", b"JDR1\x02\0\0\0{}", b"JDR1\x01\0\0\0[", b"x" * 9]
    + [b"JDR1" + bytes([len(text), 0, 0, 0]) + text for text in (
        b'{"name": 1, "captions": []}', b'{"name": "a", "captions": "b"}',
        b'{"name": "a", "captions": [1]}', b'["name", "captions"]')],
)  # fmt: skip
def test_shards_of_foreign_records_lose_none(tmp_path, spoilt):
    good = {"image": PNG, "captions": ["x"], "name": "good"}
    folder = tmp_path / "data"
    folder.mkdir()
    write_array_record(str(folder / "a.array_record"), [good])
    write_encoded(str(folder / "b.array_record"), [spoilt, spoilt])
    check(ArrayRecord(path=str(folder)), 1, [kinds.UNREADABLE] * 2, tmp_path)


def test_a_mixture_states_what_both_sources_left_out(tmp_path):
    for name in ("own", "prior"):
        write_folder(tmp_path / name, {**GOOD, "b.heic": b"x", "c.md": b"x"})
    own, prior = (ImageFolder(path=str(tmp_path / name)) for name in ("own", "prior"))
    source = PriorPreservation(own=own, prior=prior)
    account = check(source, 2, [kinds.UNSUPPORTED] * 2, tmp_path)
    assert account.left_out.others == {".md": 2}


def test_a_source_without_an_account_left_out_nothing():
    assert account_of(Produce(length=3)).text() == "Found 3 records."


def test_an_account_that_does_not_sum_is_refused():
    with pytest.raises(UserError, match="Of 3 records found, 2 are used and 0 rejected"):
        Account(found=3, used=2, left_out=LeftOut())


@pytest.mark.parametrize(("limit", "stops"), [(0.0, True), (0.01, False)])
def test_few_records_are_limited_at_0_only(tmp_path, limit, stops):
    write_folder(tmp_path, {**GOOD, "b.png": PNG})
    account = account_of(ImageFolder(path=str(tmp_path)))
    if stops:
        with pytest.raises(UserError, match=r"50\.0% of the 2 records found .*b\.png"):
            account.check(limit)
    else:
        account.check(limit)


def test_errors_of_records_are_pickled():
    import pickle

    error = pickle.loads(pickle.dumps(RecordError("it is broken", kinds.TOO_LARGE, "a.png")))
    assert (str(error), error.reject.kind) == ("a.png: it is broken", kinds.TOO_LARGE)


def test_records_have_printable_names(tmp_path):
    write_folder(tmp_path, {b"caf\xe9\n.png": PNG, b"caf\xe9\n.txt": "x"})
    name = ImageFolder(path=str(tmp_path))[0]["name"]
    assert name == f"{tmp_path}/caf\\xe9\\n.png"
    assert np.array(name).astype("S")  # ASCII
