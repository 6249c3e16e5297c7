import pytest
from etils import epath

from jaxdiff.io.files import write_whole


def test_write_creates_the_folder_and_replaces_the_file(tmp_path):
    path = epath.Path(tmp_path / "new" / "a")
    for data in (b"old", b"newer"):
        write_whole(path, data)
        assert path.read_bytes() == data
    assert [p.name for p in path.parent.iterdir()] == ["a"]


def test_an_interrupted_writer_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / "a")
    write_whole(path, b"old")

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "replace", die)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["a"]


def test_a_remote_object_is_written_directly(monkeypatch):
    path, written = epath.Path("gs://bucket/a"), []
    monkeypatch.setattr(type(path), "write_bytes", lambda self, data: written.append((self, data)))
    write_whole(path, b"whole")
    assert written == [(path, b"whole")]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127])
def test_a_name_may_be_as_long_as_the_system_allows(name, tmp_path):
    write_whole(epath.Path(tmp_path) / name, b"x")
    assert [path.name for path in tmp_path.iterdir()] == [name]
