import subprocess
import tarfile

import pytest

from jaxdiff.datasets.icons import packages
from jaxdiff.datasets.icons.packages import find_package, read_list, read_member, read_object
from jaxdiff.errors import UserError
from tests.datasets.icons.tiny import pack

NOTO = "@iconify-json/noto"


def test_a_package_is_found_as_folder_short_folder_or_archive(folder, tmp_path):
    assert find_package(folder, NOTO, download=False) == folder / NOTO
    short = folder / "@iconify-json"
    assert find_package(short, NOTO, download=False) == short / "noto"
    archive = pack(folder, NOTO, tmp_path)
    assert find_package(tmp_path, NOTO, download=False) == archive
    for place in (folder / NOTO, archive):
        assert read_object(place, "icons.json")["prefix"] == "noto"
        assert read_member(place, "absent.json") is None
        assert read_object(place, "absent.json", required=False) == {}


def test_a_longer_name_is_another_package(folder, tmp_path):
    pack(folder, "@iconify-json/fluent-emoji-flat", tmp_path)
    with pytest.raises(UserError, match=r"has no npm package @iconify-json/fluent-emoji: "):
        find_package(tmp_path, "@iconify-json/fluent-emoji", download=False)


def test_a_missing_package_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"data\.source\.download to True .* data\.source\.folder"):
        find_package(tmp_path / "none", NOTO, download=False)


def test_paths_in_an_archive_become_no_files(tmp_path):
    path = tmp_path / "a" / "iconify-json-noto-1.0.0.tgz"
    path.parent.mkdir()
    (tmp_path / "evil").write_text("{}")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "evil", "package/../../evil.json")
        link = tarfile.TarInfo("package/icons.json")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "evil")
        archive.addfile(link)
    assert read_member(path, "icons.json") is None
    assert sorted(tmp_path.rglob("*.json")) == []


def test_damaged_packages_are_user_errors(folder, tmp_path):
    path = tmp_path / "iconify-json-noto-1.0.0.tgz"
    path.write_bytes(pack(folder, NOTO, tmp_path).read_bytes()[:40])
    with pytest.raises(UserError, match="cannot be read as an npm package"):
        read_member(path, "icons.json")
    with pytest.raises(UserError, match="no JSON list"):
        read_list(folder / NOTO, "icons.json")
    with pytest.raises(UserError, match=r"has no other\.json"):
        read_object(folder / NOTO, "other.json")


def test_downloads_are_of_a_fixed_version_and_written_whole(folder, tmp_path, monkeypatch):
    calls = []

    def npm(command, cwd, **_):
        calls.append(command)
        pack(folder, NOTO, packages.Path(cwd))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(packages.subprocess, "run", npm)
    found = [find_package(tmp_path / "new", NOTO, download=True) for _ in range(2)]
    assert found[0] == found[1]
    assert list((tmp_path / "new").iterdir()) == found[:1]
    assert len(calls) == 1
    assert calls[0][-1] == f"{NOTO}@{packages.VERSIONS[NOTO]}"


def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch):
    def npm(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "npm error 404 Not Found\nmore")

    monkeypatch.setattr(packages.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(packages.subprocess, "run", npm)
    with pytest.raises(UserError, match=r"npm pack @iconify-json/none failed .*404 Not Found"):
        find_package(tmp_path, "@iconify-json/none", download=True)
    assert list(tmp_path.iterdir()) == []


def test_missing_npm_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setattr(packages.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"npm, which fetches .* install Node\.js"):
        find_package(tmp_path, NOTO, download=True)
