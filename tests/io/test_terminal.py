import io
import os
import subprocess
import sys

import pytest

from jaxdiff.cli import main as cli
from jaxdiff.io import terminal
from jaxdiff.io.terminal import console, printable, unfailing_output, write_line, write_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a pea\tgrün 茄子 🫛 \u200d", "a pea\tgrün 茄子 🫛 \u200d"),
        ("\x1b[31m\a", r"\x1b[31m\x07"),
        ("two\nlines\r", r"two\nlines\r"),
        ("\x00\x7f\x9b\x85", r"\x00\x7f\x9b\x85"),
        ("\u2028\u2029\u202e", r"\u2028\u2029\u202e"),
        (os.fsdecode(b"caf\xe9.png"), r"caf\xe9.png"),
        ("\ud83e", r"\ud83e"),
    ],
)
def test_control_characters_are_shown_escaped(capsys, text, shown):
    assert printable(text) == shown
    write_line(text)
    write_line(text, stderr=True)
    assert capsys.readouterr() == (shown + "\n", shown + "\n")


def test_text_keeps_its_lines(capsys):
    write_text("one\ntwo\x1b")
    assert capsys.readouterr().out == "one\ntwo\\x1b\n"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", rb"gr\xfcn \u8304 \U0001fadb"),
        ("latin-1", b"gr\xfcn \\u8304 \\U0001fadb"),
        ("utf-8", "grün 茄 🫛".encode()),
    ],
)
@pytest.mark.parametrize("write", [write_line, print, lambda text: console().print(text)])
def test_characters_that_the_encoding_lacks_are_escaped(monkeypatch, encoding, shown, write):
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data, encoding))
    with unfailing_output() as output:
        write("grün 茄 🫛")
    assert data.getvalue() == shown + b"\n"
    assert not output.lost


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def closed_file():
    file = open(os.devnull, "w")  # noqa: SIM115
    file.close()
    return file


class Interrupted(io.StringIO):
    """A stream in the middle of a write, in which a signal's handler writes."""

    def write(self, text):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")


BROKEN = {
    "closed pipe": closed_pipe,
    "full": lambda: open("/dev/full", "w"),  # noqa: SIM115
    "closed file": closed_file,
    "none": lambda: None,
    "interrupted": Interrupted,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_stream_ends_nothing(monkeypatch, name):
    out, err = BROKEN[name](), BROKEN[name]()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    for _ in range(3):  # as a library
        write_line("a pea")
        write_line("a pea", stderr=True)
        write_text("a pea")
        console().print("a pea")
    with unfailing_output() as output:
        print("a pea")
        print("a pea", file=sys.stderr, flush=True)
        console(stderr=True).print("a pea")
        sys.stdout.writelines(["a", "pea"])
        assert not sys.stdout.isatty()
        write_line("a pea")
    assert (sys.stdout, sys.stderr) == (out, err)
    assert output.lost == ("No space left on device" if name == "full" else "")
    if name in ("closed pipe", "full"):
        for stream in (out, err):
            terminal._discard(stream)
            stream.close()  # flushes, as Python does when it ends


@pytest.mark.parametrize("out", ["full", "closed pipe"])
@pytest.mark.parametrize("name", ["train", "recipes", "sampel"])
def test_the_status_is_that_of_the_work(monkeypatch, capsys, out, name):
    stream = BROKEN[out]()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr("jaxdiff.cli.train.train_command", lambda _: print("step 1"))
    worked = {"train": 0, "recipes": int(out == "full"), "sampel": 2}[name]
    assert cli.main([name]) == worked
    lost = "Lines of standard output were lost: No space left on device."
    assert (lost in capsys.readouterr().err) == (out == "full" and name != "sampel")
    terminal._discard(stream)
    stream.close()


@pytest.mark.parametrize(
    ("shell", "status", "stderr"),
    [
        ("{} recipes | head -1 >/dev/null; exit ${{PIPESTATUS[0]}}", 0, ""),
        ("{} recipes | true; exit ${{PIPESTATUS[0]}}", 0, ""),
        ("{} recipes >&-", 0, ""),
        ("{} recipes >&- 2>&- <&-", 0, ""),
        ("{} sampel 2>&-", 2, ""),
        ("{} sampel 2>/dev/full", 2, ""),
        ("{} --version >/dev/full", 1, "jaxdiff: Lines of standard output were lost: No space"),
    ],
)
def test_python_ends_quietly(shell, status, stderr):
    command = shell.format(f"{sys.executable} -m jaxdiff")
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert run.returncode == status
    assert run.stderr.startswith(stderr)
    assert run.stderr.count("\n") == bool(stderr)


def test_a_closed_descriptor_is_not_taken_by_the_next_file(tmp_path):
    code = (
        "import os, sys; from jaxdiff.io.terminal import unfailing_output\n"
        "with unfailing_output():\n"
        f"    file = open({str(tmp_path / 'checkpoint')!r}, 'wb')\n"
        "    os.write(2, b'a log line of C++')\n"
        "    sys.exit(file.fileno() < 3)"
    )
    words = ["bash", "-c", f'{sys.executable} -c "$0" >&- 2>&- <&-', code]
    assert subprocess.run(words).returncode == 0
    assert (tmp_path / "checkpoint").read_bytes() == b""
