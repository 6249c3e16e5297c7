import json

import numpy as np
import pytest
from etils import epath

from jaxdiff.data.bad_records import LeftOut, Reject
from jaxdiff.data.shards import LatentSpace, Shard, ShardManifest, read_manifest
from jaxdiff.data.sources.array_record import ArrayRecord, write_array_record
from jaxdiff.data.sources.cached_latents import CachedLatents, decode_latents, encode_latents
from jaxdiff.errors import UserError

SPACE = LatentSpace(
    autoencoder="ab", text=None, dtype="float16", views=2, shapes=[[8, 8]], crop="center", flip=True
)


def _folder(path, latents=None):
    """Two shards of one and of two records, and their manifest."""
    shards = []
    for number, count in enumerate((1, 2)):
        file = path / f"records-{number}.array_record"
        records = [
            {"image": b"x", "captions": ["a"], "name": f"{number}-{i}"} for i in range(count)
        ]
        write_array_record(str(file), records)
        size = file.stat().st_size
        shards.append(Shard(file=file.name, records=count, bytes=size, sha256="0"))
    manifest = ShardManifest(provenance={"source": 1}, latents=latents, shards=shards, found=3)
    manifest.write(epath.Path(path))
    return ArrayRecord(path=str(path))


@pytest.mark.parametrize("latents", [None, SPACE])
def test_a_manifest_round_trips(tmp_path, latents):
    _folder(tmp_path, latents)
    manifest = read_manifest(epath.Path(tmp_path))
    assert manifest.latents == latents
    assert manifest.provenance == {"source": 1}
    assert [shard.records for shard in manifest.shards] == [1, 2]
    assert read_manifest(epath.Path(tmp_path / "none")) is None


def test_records_are_those_of_the_manifest(tmp_path):
    source = _folder(tmp_path)
    write_array_record(str(tmp_path / "another.array_record"), [])
    source.check()
    assert [source[i]["name"] for i in range(len(source))] == ["0-0", "1-0", "1-1"]


@pytest.mark.parametrize("damage", ["lost", "cut"])
def test_missing_and_truncated_shards_are_refused(tmp_path, damage):
    source, file = _folder(tmp_path), tmp_path / "records-1.array_record"
    if damage == "lost":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"1 of the 2 shards .* missing .* records-1\.array_record"):
        source.check()


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("{}", "not a manifest")])
def test_an_unreadable_manifest_is_refused(tmp_path, text, message):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=message):
        ArrayRecord(path=str(tmp_path)).check()


def test_images_and_latents_are_distinguished(tmp_path):
    images = _folder(tmp_path)
    with pytest.raises(UserError, match="holds no cached latents: images are read with"):
        CachedLatents(path=str(tmp_path)).check()
    _folder(tmp_path, SPACE)
    with pytest.raises(UserError, match="contains cached latents, not images"):
        images.check()
    with pytest.raises(UserError, match="There are no cached latents in"):
        CachedLatents(path=str(tmp_path / "none")).check()


def test_rejected_records_are_counted(tmp_path):
    broken, empty, other = (
        Reject(name=name, reason="it is so", kind=kind)
        for name, kind in (("a\udce9", "unreadable"), ("b", "empty"), ("c", "empty"))
    )
    shard = Shard(file="x", records=1, bytes=1, sha256="", rejects=[broken, empty])
    left_out = LeftOut(rejects=[other], others={".md": 2})
    manifest = ShardManifest(
        provenance={}, latents=None, shards=[shard], found=4, left_out=left_out
    )
    manifest.write(epath.Path(tmp_path))
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert [written[key] for key in ("found", "records", "rejected")] == [4, 1, 3]
    assert written["reasons"] == {"empty": 2, "unreadable": 1}
    assert manifest.account.text("wrote 1") == (
        "Found 4 records, wrote 1, left out 3: 2 empty, 1 unreadable; ignored 2 other files: 2 .md."
    )


@pytest.mark.parametrize(
    ("key", "value"), [("found", 4), ("found", "3"), ("records", True), ("file", "../x")]
)
def test_a_manifest_that_disagrees_is_refused(tmp_path, key, value):
    source = _folder(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    (manifest if key == "found" else manifest["shards"][0])[key] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(
        UserError, match=r"manifest\.json (disagrees with itself|is not a manifest)"
    ):
        source.check()


def test_files_that_the_manifest_does_not_list_are_left_out(tmp_path):
    source = _folder(tmp_path)
    write_array_record(str(tmp_path / "another.array_record"), [])
    (tmp_path / "notes.md").write_text("x")
    (reject,) = source.left_out.rejects
    assert reject.name.endswith("another.array_record")
    assert source.left_out.others == {".md": 1}


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_latents_round_trip_exactly(dtype, text):
    record = {
        "moments": np.random.default_rng(0).normal(size=(2, 3, 4, 8)).astype(dtype),
        "text": np.arange(10, dtype=dtype).reshape(2, 5) if text else None,
        "size_crop": np.arange(12, dtype=np.int32).reshape(2, 6),
        "captions": ["größe", "b"],
        "name": "n",
        "digest": "0123456789ab",
    }
    record["moments"][0, 0, 0, 0] = -np.inf  # an autoencoder without any variance
    back = decode_latents(encode_latents(record))
    assert back["moments"].dtype == dtype
    for key in ("moments", "text", "size_crop"):
        np.testing.assert_array_equal(back[key], record[key])
    for key in ("captions", "name", "digest"):
        assert back[key] == record[key]


@pytest.mark.parametrize(
    ("dtype", "digest", "message"),
    [(np.float64, None, "latents of type float64"), (np.float32, "x", "the digest 'x' is not six")],
)
def test_latents_of_an_unknown_type_or_digest_are_refused(dtype, digest, message):
    record = {
        "moments": np.zeros((1, 1, 1, 2), dtype),
        "text": None,
        "size_crop": np.zeros((1, 6), np.int32),
        "captions": [],
        "name": "n",
        "digest": digest,
    }
    with pytest.raises(ValueError, match=message):
        decode_latents(encode_latents(record))
