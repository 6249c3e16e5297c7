import os

from etils import epath

from jaxdiff.io.user_cache import package_digest, user_cache


def test_the_folder_is_that_of_the_variables_or_below_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/pea")
    assert user_cache("plans", {}) == epath.Path("/home/pea/.cache/jaxdiff/plans")
    assert user_cache("plans", {"XDG_CACHE_HOME": "/here"}) == epath.Path("/here/jaxdiff/plans")
    assert user_cache("plans", {"XDG_CACHE_HOME": "here"}) == user_cache("plans", {})
    assert user_cache("plans", {"JAXDIFF_CACHE": "~/c"}) == epath.Path("/home/pea/c/plans")
    assert user_cache("plans", {"JAXDIFF_CACHE": "gs://b/c"}) == epath.Path("gs://b/c/plans")
    assert user_cache("plans", {"JAXDIFF_CACHE": "off"}) is None


def test_without_a_home_there_is_no_cache(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert user_cache("plans", {}) is None


def test_the_digest_is_that_of_the_source():
    assert len(package_digest()) == 64
