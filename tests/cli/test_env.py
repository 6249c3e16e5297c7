"""`jaxdiff env` and `jaxdiff completion`."""

import subprocess

import jax
import pytest

import jaxdiff
from jaxdiff.cli import main as cli
from jaxdiff.cli.completion import SHELLS, completion_script


def test_env_prints_versions_devices_and_settings(monkeypatch, capsys):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_flag=1")
    monkeypatch.setenv("HF_HUB_TOKEN", "hidden")
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    for text in (
        f"version: {jaxdiff.__version__}",
        f"jax: {jax.__version__}",
        f"0: {jax.devices()[0].device_kind}",
        "LIBTPU_INIT_ARGS=--xla_tpu_flag=1",
        "compilation cache: ",
    ):
        assert text in out
    assert "hidden" not in out


def test_env_reports_a_platform_that_is_missing(monkeypatch, capsys):
    def fail():
        raise RuntimeError("Unable to initialize backend 'tpu'\nmore")

    monkeypatch.setattr(jax, "devices", fail)
    assert cli.main(["env"]) == 0
    assert "none: Unable to initialize backend 'tpu'\n" in capsys.readouterr().out


def test_arguments_that_do_not_exist_are_refused(refused):
    assert "takes no arguments, got --all" in refused("env", "--all")
    assert "got csh: expected one of bash, zsh, fish" in refused("completion", "csh")
    assert "got no shell: expected one of" in refused("completion")


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_commands_and_flags(shell):
    script = completion_script(shell)
    for word in (*cli.COMMANDS, "train.steps", "guidance-scale", "topology"):
        assert word in script


def test_bash_completes_a_flag(tmp_path):
    (tmp_path / "completion").write_text(completion_script("bash"))
    lines = "\n".join(
        [
            f"source {tmp_path / 'completion'}",
            "COMP_WORDS=(jaxdiff train produce --train.st); COMP_CWORD=3",
            "_tyro_jaxdiff; echo ${COMPREPLY[@]}",
        ]
    )
    run = subprocess.run(["bash", "-c", lines], capture_output=True, text=True, check=True)
    assert "--train.steps" in run.stdout.split()
