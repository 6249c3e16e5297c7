import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxdiff.data.bad_records import NO_REFERENCE, RecordError
from jaxdiff.data.sources.parquet import Parquet
from jaxdiff.errors import UserError


def _write(path, start, stop, *, rows_per_group=3, caption="text"):
    images = [{"bytes": b"image %d" % i, "path": f"{i}.png"} for i in range(start, stop)]
    table = pa.table({"image": images, caption: [f"caption {i}" for i in range(start, stop)]})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_per_group)


def _contents(source):
    return [(source[i]["image"], source[i]["captions"]) for i in range(len(source))]


EXPECTED = [(b"image %d" % i, [f"caption {i}"]) for i in range(10)]


@pytest.mark.parametrize("path", [".", "*.parquet", "train-[0-9].parquet"])
def test_every_row_of_every_file_is_found_by_its_index(tmp_path, path):
    _write(tmp_path / "train-0.parquet", 0, 4)
    _write(tmp_path / "train-1.parquet", 4, 10)
    source = Parquet(path=str(tmp_path / path))
    source.check()
    assert _contents(source) == EXPECTED
    assert source[5]["name"].endswith("train-1.parquet row 1")
    assert source[8]["name"].endswith("train-1.parquet row 4")


def test_path_may_be_a_single_file(tmp_path):
    _write(tmp_path / "x.parquet", 0, 10)
    assert _contents(Parquet(path=str(tmp_path / "x.parquet"))) == EXPECTED


def test_any_order_and_the_smallest_cache_give_the_same_rows(tmp_path):
    _write(tmp_path / "x.parquet", 0, 10)
    source = Parquet(path=str(tmp_path), cache_mb=0)
    for i in (9, 0, 5, 9, 2, 0):
        assert source[i]["image"] == EXPECTED[i][0]


def test_another_process_opens_its_own_files(tmp_path):
    _write(tmp_path / "x.parquet", 0, 10)
    source = Parquet(path=str(tmp_path))
    _ = source[0]
    assert _contents(pickle.loads(pickle.dumps(source))) == EXPECTED


def test_plain_bytes_and_lists_of_captions_are_read(tmp_path):
    table = pa.table({"img": [b"one"], "texts": [["a", "b"]]})
    pq.write_table(table, tmp_path / "x.parquet")
    record = Parquet(path=str(tmp_path), image="img", caption="texts")[0]
    assert (record["image"], record["captions"]) == (b"one", ["a", "b"])


def test_rows_without_image_or_text_are_distinguished(tmp_path):
    broken = pa.array([b"caf\xe9", None]).view(pa.string())
    images = pa.array(
        [{"bytes": b"one", "path": ""}, {"bytes": None, "path": "away.png"}],
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    )
    pq.write_table(pa.table({"image": images, "text": broken}), tmp_path / "x.parquet")
    source = Parquet(path=str(tmp_path))
    with pytest.raises(RecordError, match=r"row 0: .*utf-8"):
        _ = source[0]
    with pytest.raises(RecordError, match="row 1: its image has no bytes"):
        _ = source[1]


def test_missing_path_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Parquet(path=str(tmp_path / "none.parquet")).check()


def test_folder_without_parquet_files_is_refused(tmp_path):
    with pytest.raises(UserError, match="contains no Parquet file"):
        Parquet(path=str(tmp_path)).check()


def test_glob_that_matches_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="no file matches"):
        Parquet(path=str(tmp_path / "*.parquet")).check()


def test_no_rows_are_refused(tmp_path):
    _write(tmp_path / "x.parquet", 0, 1)
    pq.write_table(pq.read_table(tmp_path / "x.parquet").slice(0, 0), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="contain no rows"):
        Parquet(path=str(tmp_path)).check()


def test_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"not a Parquet file")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        Parquet(path=str(tmp_path)).check()


def test_missing_caption_column_suggests_the_nearest(tmp_path):
    _write(tmp_path / "x.parquet", 0, 2, caption="caption")
    with pytest.raises(UserError, match=r"did you mean 'caption'\?.*data\.source\.caption"):
        Parquet(path=str(tmp_path), caption="captions").check()


def test_columns_of_the_wrong_type_are_refused(tmp_path):
    _write(tmp_path / "x.parquet", 0, 2)
    with pytest.raises(UserError, match="column of encoded images"):
        Parquet(path=str(tmp_path), image="text").check()
    with pytest.raises(UserError, match="column of text"):
        Parquet(path=str(tmp_path), caption="image").check()


def test_references_are_an_image_a_list_of_them_or_nothing(tmp_path):
    image = [{"bytes": b"image", "path": None}] * 4
    lists = [[{"bytes": b"a"}, {"bytes": b"b"}], None, [], [{"bytes": None}]]
    table = {"image": image, "text": ["x"] * 4, "many": lists, "one": [b"a", None, b"b", b"c"]}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    source = Parquet(path=str(tmp_path), reference="one")
    assert [source[i]["references"] for i in range(3)] == [[b"a"], [], [b"b"]]
    source = Parquet(path=str(tmp_path), reference="many")
    assert [source[i]["references"] for i in range(3)] == [[b"a", b"b"], [], []]
    with pytest.raises(RecordError, match="its reference image has no bytes") as caught:
        source[3]
    assert caught.value.reject.kind == NO_REFERENCE
    for reference, message in (("text", "encoded images"), ("mny", "did you mean 'many'")):
        with pytest.raises(UserError, match=message):
            Parquet(path=str(tmp_path), reference=reference).check()
