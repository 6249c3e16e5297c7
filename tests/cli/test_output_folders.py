"""Folders that cannot be written to, disks that fill up, and signals, for each command."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from jaxdiff.cli import main as cli
from jaxdiff.io.lock import LOCK, lock_folder


@pytest.fixture(scope="module")
def model_folder(tiny_bundle, tmp_path_factory):
    from jaxdiff.pretrained.bundle import write_bundle

    folder = tmp_path_factory.mktemp("model")
    write_bundle(folder, tiny_bundle, dtype="float32")
    return folder


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a pea")
    return folder


@pytest.fixture
def command(tmp_path, photos, model_folder, recipe):
    """`command(name, out)`: the words of a command that writes to `out`."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("a pea\na pod\n")
    sample = ["sample", "--model", str(model_folder), "--num-steps", "1"]
    words = {
        "train": ["train", recipe, "--out"],
        "sample": [*sample, "a pea", "--out"],
        "sample --prompts": [*sample, "--prompts", str(prompts), "--out"],
        "prepare": ["prepare", str(photos)],
        "export": ["export", str(model_folder)],
        "explore": ["explore", recipe, "--samples", "10", "--out"],
    }
    return lambda name, out: [*words[name], str(out)]


COMMANDS = ["train", "sample", "sample --prompts", "prepare", "export", "explore"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_in_use_is_refused_in_one_sentence(name, command, tmp_path, refused):
    out = tmp_path / "out"
    out.mkdir()
    with lock_folder(out):
        assert f"{out} is in use by process {os.getpid()}" in refused(*command(name, out))
        assert [path.name for path in out.iterdir()] == [LOCK]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_in_place_of_the_folder_is_refused_in_one_sentence(name, command, tmp_path, refused):
    (tmp_path / "out").touch()
    said = refused(*command(name, tmp_path / "out"))
    assert "cannot be written to as a folder" in said


@pytest.mark.parametrize("name", ["sample", "sample --prompts", "prepare", "export"])
def test_a_disk_that_fills_up_is_one_sentence(name, command, tmp_path, capsys, monkeypatch):
    """The system refuses the first large write; the folder has no partial file afterwards."""
    from etils import epath

    out, path_type = tmp_path / "out", type(epath.Path(tmp_path))
    write = path_type.write_bytes

    def fill(path, data):
        if path.name.startswith(".partial-"):
            write(path, data[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, data)

    monkeypatch.setattr(path_type, "write_bytes", fill)
    assert cli.main(command(name, out)) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("jaxdiff: ")
    assert "No space left on device" in said
    assert not [path for path in out.rglob("*") if path.name.startswith(".partial-")]


def test_what_no_code_foresaw_is_one_sentence_too(monkeypatch, refused):
    def vanish(_):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "a.png")

    monkeypatch.setattr("jaxdiff.cli.recipes.recipes_command", vanish)
    assert "a.png cannot be read or written (No such file or directory)" in refused("recipes")


def test_a_programming_error_keeps_its_traceback(monkeypatch):
    def fail(_):
        raise OSError("not of a file")

    monkeypatch.setattr("jaxdiff.cli.recipes.recipes_command", fail)
    with pytest.raises(OSError, match="not of a file"):
        cli.main(["recipes"])


@pytest.fixture(autouse=True)
def default_signals():
    """The usual handlers, also where the tests run in the background."""
    usual = {n: signal.SIG_DFL for n in (signal.SIGTERM, signal.SIGHUP)}
    usual[signal.SIGINT] = signal.default_int_handler
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_with_one_line(number, monkeypatch, capsys):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    monkeypatch.setattr(
        "jaxdiff.cli.recipes.recipes_command", lambda _: signal.raise_signal(number)
    )
    assert cli.main(["recipes"]) == 128 + number
    said = capsys.readouterr()
    assert said.err == f"jaxdiff: {number.name}: stopped; finished files are kept.\n"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.slow
def test_images_that_are_finished_stay_after_ctrl_c(model_folder, tmp_path):
    prompts, out = tmp_path / "p.txt", tmp_path / "out"
    prompts.write_text("a red pea\n" * 3000)
    words = ["sample", "--model", model_folder, "--num-steps", "1", "--prompts", prompts]
    words = [sys.executable, "-m", "jaxdiff", *map(str, words), "--out", out]
    started = subprocess.Popen(
        words,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"XLA_FLAGS": ""},  # one device
    )
    end = time.monotonic() + 120
    while len(list(out.glob("*.png"))) < 3:
        assert time.monotonic() < end
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 130, said
    assert said.splitlines()[-1] == "jaxdiff: SIGINT: stopped; finished files are kept."
    assert "Traceback" not in said
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    for path in out.glob("*.png"):
        Image.open(path).load()


def test_a_signal_within_a_destructor_is_not_lost(monkeypatch, capsys):
    class Held:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def recipes(_):
        held = Held()
        del held
        time.sleep(10)

    monkeypatch.setattr("jaxdiff.cli.recipes.recipes_command", recipes)
    assert cli.main(["recipes"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "jaxdiff: SIGTERM: stopped; finished files are kept.\n"


def test_images_before_the_disk_is_full_stay_and_the_others_are_named(
    command, tmp_path, capsys, monkeypatch
):
    from etils import epath

    path_type = type(epath.Path(tmp_path))
    replace = path_type.replace

    def fill(path, target):
        if str(target).endswith("0001-a-pea.png"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return replace(path, target)

    monkeypatch.setattr(path_type, "replace", fill)
    assert cli.main([*command("sample", tmp_path / "out"), "--num-images", "3"]) == 2
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'out' / '0000-a-pea.png'}\n"
    assert "images that are missing: 0001-a-pea.png, 0002-a-pea.png." in said.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0000-a-pea.png"]


def test_a_model_is_read_while_its_folder_is_in_use(model_folder, command, tmp_path):
    with lock_folder(model_folder):
        assert cli.main(command("sample", tmp_path / "out")) == 0


def test_an_error_that_a_signal_becomes_in_a_library_is_that_signal(monkeypatch, capsys):
    def recipes(_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ImportError("Encountered an error while initializing the extension.") from error

    monkeypatch.setattr("jaxdiff.cli.recipes.recipes_command", recipes)
    assert cli.main(["recipes"]) == 130
    assert capsys.readouterr().err == "jaxdiff: SIGINT: stopped; finished files are kept.\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_workers_end_quietly_with_a_job(number, tmp_path):
    photos, out = tmp_path / "many", tmp_path / "out"
    photos.mkdir()
    for i in range(60):
        Image.effect_noise((512, 512), 50).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text("a pea")
    words = ["prepare", photos, out, "--workers", "1", "--shards", "60"]
    job = subprocess.Popen(
        [sys.executable, "-m", "jaxdiff", *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 60
    while not list(out.glob("records-*")):
        assert time.monotonic() < end
        time.sleep(0.01)
    os.killpg(job.pid, number)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 128 + number, said
    assert said.splitlines()[-1] == f"jaxdiff: {number.name}: stopped; finished files are kept."
    assert "Traceback" not in said
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == [".shards"]
