"""Types of third parties come in by name only where a user names them."""

import dataclasses

import pytest

from jaxdiff.cli import main as cli
from jaxdiff.config.plugins import import_plugins
from jaxdiff.config.serialization import accept_types, from_json, to_json
from jaxdiff.errors import UserError
from jaxdiff.sampling.solvers import AnySolver
from jaxdiff.sampling.solvers_ode import DDIM

MODULE = """
import dataclasses
from jaxdiff.sampling.solvers_ode import DDIM, Euler


@dataclasses.dataclass(frozen=True, kw_only=True)
class {name}(DDIM):
    gain: float = 1.5


class Plain:
    pass
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """`module("Mine")` writes a module with a solver of this name, and gives the module's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str) -> str:
        (tmp_path / f"plugin_{name.lower()}.py").write_text(MODULE.format(name=name))
        return f"plugin_{name.lower()}"

    return write


def test_a_plugin_gives_its_own_dataclasses(module):
    (own,) = import_plugins([module("One")])
    assert own.__name__ == "One"
    assert issubclass(own, DDIM)


def test_a_module_that_cannot_be_imported_is_a_user_error(module):
    with pytest.raises(UserError, match="--plugin no_such_module cannot be imported"):
        import_plugins([module("Two"), "no_such_module"])


def test_a_module_that_fails_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "plugin_failing.py").write_text("x = 1\nx / 0")
    with pytest.raises(UserError, match=r"line 2 of .*ZeroDivisionError"):
        import_plugins(["plugin_failing"])


def test_types_are_accepted_where_their_base_is_expected_and_within_the_context_alone(module):
    (own,) = import_plugins([module("Three")])
    data = to_json(own(gain=2.0))
    assert data["type"] == "Three"
    for _ in range(2):
        with pytest.raises(UserError, match=r"is of type Three: expected DDIM or .*--plugin"):
            from_json(AnySolver, data)
        with accept_types([own]):
            assert from_json(AnySolver, data) == own(gain=2.0)
            with pytest.raises(UserError, match="is of type Three: expected a value"):
                from_json(int, data)
    assert from_json(AnySolver, data, types=[own]) == own(gain=2.0)


def test_every_command_takes_plugins_before_and_after_its_arguments(module, monkeypatch):
    ran = []

    def command(arguments):
        ran.append((arguments, from_json(AnySolver, {"type": "Four"})))

    monkeypatch.setattr("jaxdiff.cli.env.env_command", command)
    name = module("Four")
    assert cli.main(["env", "--plugin", name, "a"]) == 0
    assert cli.main([f"--plugin={name}", "env", "a"]) == 0
    assert cli.main(["env", "a", "--plugin", name, "--", "--plugin"]) == 0
    assert [words for words, _ in ran] == [["a"], ["a"], ["a", "--", "--plugin"]]
    assert all(dataclasses.asdict(value)["gain"] == 1.5 for _, value in ran)


@pytest.mark.parametrize("words", [("env", "--plugin"), ("env", "--plugin", "--out")])
def test_a_plugin_without_a_name_is_refused(words, refused):
    assert "--plugin has no value: expected the name of a Python module" in refused(*words)


def test_a_misspelt_plugin_is_hinted_at(refused):
    assert "did you mean --plugin?" in refused("export", "runs/x", "out", "--plugins", "mine")
