import pytest

from tests.datasets.icons.tiny import write_sets


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    """A folder with the packages, as node_modules has them."""
    return write_sets(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="package")
def places(folder, tmp_path_factory):
    """The fields of a source that names its folders."""
    return {"folder": str(folder), "cache": str(tmp_path_factory.mktemp("cache"))}
