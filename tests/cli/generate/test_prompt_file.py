import json

import pytest

from jaxdiff.cli.generate.prompt_file import COLUMNS, BadRow, PromptRow, read_prompts, slug
from jaxdiff.errors import UserError
from jaxdiff.pipelines.resolve import FILES
from jaxdiff.pipelines.settings import GenerationSettings


def write(folder, name, *lines):
    path = folder / name
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return path


ROW = {
    "prompt": "a pea",
    "negative_prompt": "red, or green",
    "seed": 7,
    "num_steps": 5,
    "guidance_scale": 2.5,
    "size": "64x32",
    "solver": "heun",
    "strength": 0.5,
    "name": "first",
    "clip_scale": 3.0,
    "clip_interval": "0.25-1",
    "clip_cutouts": 4,
    "resample_steps": 2,
    "mix_prompt": "a tomato",
    "mix_seed": 9,
    "mix": 0.25,
    "guidance_interval": "0.1-0.9",
    "guidance_rescale": 0.5,
    "apg": 0.0,
    "cfg_zero_star": 1,
    "guide_scale": 2.0,
    "true_cfg_scale": 2.0,
    "refiner_start": 0.8,
    "variation": 0.5,
    "upscale": 2,
    "upscale_strength": 0.25,
    "best_of": 3,
    "vae_mode": "slicing",
    "seamless": True,
    "cache_interval": 2,
    "cache_threshold": 0.1,
}


def test_a_row_is_the_same_in_json_and_csv(tmp_path):
    cells = [f'"{value}"' if "," in str(value) else str(value) for value in ROW.values()]
    lines = write(tmp_path, "a.jsonl", ROW)
    table = write(tmp_path, "a.csv", ",".join(ROW), ",".join(cells))
    assert set(ROW) == set(COLUMNS) - set(FILES)
    intervals = {"clip_interval": (0.25, 1.0), "guidance_interval": (0.1, 0.9)}
    expected = GenerationSettings(**ROW | intervals | {"size": (64, 32)})
    assert read_prompts(lines) == ([PromptRow(number=0, line=1, settings=expected)], [])
    assert read_prompts(table) == ([PromptRow(number=0, line=2, settings=expected)], [])


def test_lines_are_prompts_and_blank_ones_are_no_rows(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeff# a pea\r\n\r\n  a line\u2028separator\n".encode())
    rows, bad = read_prompts(file)
    assert [(r.number, r.line, r.settings.prompt) for r in rows] == [
        (0, 1, "# a pea"),
        (1, 3, "a line\u2028separator"),
    ]
    assert not bad


def test_null_and_empty_cells_are_left_out(tmp_path):
    (row,), _ = read_prompts(write(tmp_path, "a.jsonl", {"prompt": "x", "seed": None}))
    assert row.settings.seed is None
    (row,), _ = read_prompts(write(tmp_path, "a.csv", "seed,prompt,size", ",x,"))
    assert (row.settings.prompt, row.settings.seed, row.settings.size) == ("x", None, None)


def test_a_cell_with_line_breaks_does_not_shift_the_reported_lines(tmp_path):
    file = write(tmp_path, "a.csv", "prompt,seed", '"two\nlines",1', "", "pea,no", "x,1,2")
    rows, bad = read_prompts(file)
    assert [(r.number, r.line, r.settings.prompt) for r in rows] == [(0, 2, "two\nlines")]
    assert [line for line, _ in bad] == [5, 6]
    assert "expected a whole number" in bad[0].reason
    assert "3 cells for 2 columns" in bad[1].reason


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{'prompt': 1}", "not valid JSON"),
        ('{"prompt": "cut', "not valid JSON"),
        ("[" * 20_000, "nested more than 64 levels"),
        ("[1]", "expected an object"),
        ({}, "prompt is missing"),
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": " \t"}, "prompt is empty"),
        ({"prompt": 3}, "prompt is 3: expected a text"),
        ('{"prompt": "\\ud800"}', "it is not UTF-8"),
        ({"prompt": "x", "promt": "y"}, "did you mean prompt?"),
        ({"prompt": "x", "image": "y"}, "did you mean init_image?"),
        ({"prompt": "x", "clip_interval": "0.7-0.2"}, "expected LOW-HIGH"),
        ({"prompt": "x", "clip_interval": [0, 1]}, "expected LOW-HIGH"),
        ({"prompt": "x", "clip_scale": -1}, "expected a number"),
        ({"prompt": "x", "resample_steps": 0}, "from 1 to 1000"),
        ({"prompt": "x", "mix": 1.5}, "from 0 to 1"),
        ({"prompt": "x", "guidance_interval": "0.5"}, "expected LOW-HIGH"),
        ({"prompt": "x", "apg": True}, "apg is True: expected a number from 0 to 1"),
        ({"prompt": "x", "cfg_zero_star": 0.5}, "expected a whole number"),
        ({"prompt": "x", "upscale": 100}, "from 1 to 16"),
        ({"prompt": "x", "best_of": 0}, "from 1 to 1000"),
        ({"prompt": "x", "\ud800": 1}, "it is not UTF-8"),
        ({"prompt": "x", "seed": "1"}, "seed is '1': expected a whole number"),
        ({"prompt": "x", "seed": True}, "seed is True"),
        ({"prompt": "x", "seed": 1.5}, "seed is 1.5"),
        ({"prompt": "x", "seed": -1}, "from 0 to 4294967295"),
        ({"prompt": "x", "seed": 2**32}, "from 0 to 4294967295"),
        ({"prompt": "x", "size": "64"}, "size is '64': expected WIDTHxHEIGHT"),
        ({"prompt": "x", "size": [64, 64]}, "expected WIDTHxHEIGHT"),
        ({"prompt": "x", "size": "100000x64"}, "at most 8192 pixels"),
        ({"prompt": "x", "num_steps": 0}, "num_steps is 0: expected a whole number from 1 to 1000"),
        ({"prompt": "x", "num_steps": 10**12}, "num_steps is 1000000000000"),
        ({"prompt": "x", "guidance_scale": "high"}, "expected a number"),
        ('{"prompt": "x", "guidance_scale": NaN}', "NaN is no number of JSON"),
        ('{"prompt": "x", "guidance_scale": 1e999}', "1e999 is out of range"),
        ({"prompt": "x", "guidance_scale": 10**399}, "expected a number"),
        ({"prompt": "x", "guidance_scale": 10**400}, "a number of 401 digits"),
        ('{"prompt": "x", "prompt": "y"}', "it has the key 'prompt' twice"),
        ({"prompt": "a\0b"}, "prompt holds a NUL"),
        ({"prompt": "x" * 131_073}, "prompt has 131073 characters"),
        ('{"prompt": "x", "m": ' + "[" * 64 + "]" * 64 + "}", "nested more than 64 levels"),
        ({"prompt": "x", "solver": "ddmi"}, "solver is 'ddmi': expected one of ddim"),
        ({"prompt": "x", "solver": ["ddim"]}, "solver is ['ddim']"),
        ({"prompt": "x", "strength": 1.1}, "from 0 to 1"),
        ({"prompt": "x", "seamless": 1}, "seamless is 1: expected true or false"),
        ({"prompt": "x", "vae_mode": "tiles"}, "expected one of full, slicing, tiling"),
        ({"prompt": "x", "name": ""}, "name is empty"),
        ({"prompt": "x", "negative_prompt": ["y"]}, "negative_prompt is ['y']"),
    ],
)
def test_a_bad_row_is_reported_with_its_line_and_the_others_are_read(tmp_path, row, message):
    rows, bad = read_prompts(write(tmp_path, "a.jsonl", "", {"prompt": "a"}, row, {"prompt": "b"}))
    assert [(r.number, r.line, r.settings.prompt) for r in rows] == [(0, 2, "a"), (2, 4, "b")]
    assert [line for line, _ in bad] == [3]
    assert message in bad[0].reason
    assert bad[0].reason.endswith((".", "?"))
    assert "\n" not in bad[0].reason


def test_a_byte_that_is_no_utf_8_invalidates_one_row(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a pea\n\xe9clair\na lemon\n")
    rows, bad = read_prompts(tmp_path / "a.txt")
    assert [row.settings.prompt for row in rows] == ["a pea", "a lemon"]
    assert bad == [BadRow(2, "prompt is not UTF-8: save or type it as UTF-8.")]


PROMPTS = ["a red pea", "茄子", "🫛"]


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl"])
def test_encodings_and_newlines_give_the_same_prompts(tmp_path, codec, newline, suffix):
    lines = PROMPTS if suffix != ".jsonl" else [json.dumps({"prompt": p}) for p in PROMPTS]
    text = newline.join([*(["prompt"] if suffix == ".csv" else []), *lines, ""])
    (tmp_path / f"a{suffix}").write_bytes(text.encode(codec))
    rows, bad = read_prompts(tmp_path / f"a{suffix}")
    assert [row.settings.prompt for row in rows] == PROMPTS
    assert not bad


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("prompts", [PROMPTS, ["茄子", "蘑菇"]])
def test_wide_encodings_without_a_mark_are_refused(tmp_path, codec, prompts):
    (tmp_path / "a.txt").write_bytes("\n".join([*prompts, ""]).encode(codec))
    with pytest.raises(UserError, match="save or type it as UTF-8"):
        read_prompts(tmp_path / "a.txt")


@pytest.mark.parametrize("sign", [chr(i) for i in (*range(1, 9), 11, 12, *range(14, 32), 0x85)])
def test_only_newlines_separate_prompts(tmp_path, sign):
    (tmp_path / "a.txt").write_text(f"a red{sign}pea\n", newline="")
    (row,), _ = read_prompts(tmp_path / "a.txt")
    assert row.settings.prompt == f"a red{sign}pea"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('"a" pea,1', "it is not CSV"),
        ("x", "1 cells for 2 columns"),
        ("x,1,", "3 cells for 2 columns"),
        ("a red, round pea,1", "3 cells for 2 columns"),
        ('"two\nlines" x,1', "through line 4"),
        ('"' + "line\n" * 40_000 + '",1', "prompt has 200000 characters"),
        ("\udce9,1", "prompt is not UTF-8"),
    ],
)
def test_a_bad_row_of_csv_is_one_bad_row(tmp_path, row, message):
    text = f'prompt,seed\nfirst,1\n{row}\n"with ""quotes"", commas",2\n'
    (tmp_path / "a.csv").write_bytes(text.encode(errors="surrogateescape"))
    rows, bad = read_prompts(tmp_path / "a.csv")
    assert [row.settings.prompt for row in rows] == ["first", 'with "quotes", commas']
    assert [line for line, _ in bad] == [3]
    assert message in bad[0].reason


def test_a_quote_that_is_not_closed_is_named_with_the_rows_it_takes(tmp_path):
    file = write(tmp_path, "a.csv", "prompt,seed", "first,1", '"a pea,2', "a lemon,3")
    rows, ((line, reason),) = read_prompts(file)
    assert [row.settings.prompt for row in rows] == ["first"]
    assert line == 3
    assert "unexpected end of data, through line 4" in reason


def test_paths_are_relative_to_the_folder_of_the_file(tmp_path):
    row = {"prompt": "x", "init_image": "in/../a.png", "mask": "b.png"}
    (read,), _ = read_prompts(write(tmp_path, "a.jsonl", row))
    assert (read.settings.init_image, read.settings.mask) == (
        tmp_path / "in/../a.png",
        tmp_path / "b.png",
    )


@pytest.mark.parametrize("name", ["init_image", "mask"])
@pytest.mark.parametrize(
    "path", ["/etc/hostname", "../a.png", "in/../../a.png", "gs://b/a.png", "out/a.png"]
)
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, name, path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    (tmp_path / "a.png").write_bytes(b"")
    (folder / "out").symlink_to(tmp_path)
    rows, ((line, reason),) = read_prompts(
        write(folder, "a.jsonl", {"prompt": "x", name: path}, {"prompt": "y"})
    )
    assert [row.settings.prompt for row in rows] == ["y"]
    assert line == 1
    assert f"{name} is" in reason
    assert "leaves the folder" in reason


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "x", "has an unknown format"),
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.csv", "prompt,sed\nx,1\n", "did you mean seed?"),
        ("a.csv", "seed,seed,prompt\n", "'seed' twice"),
        ("a.csv", "seed\n1\n", "no column prompt"),
        ("a.csv", "prompt;seed\nx;1\n", "has ';' between its columns"),
        ("a.csv", "prompt\tseed\nx\t1\n", r"has '\\t' between its columns"),
        ("a.csv", "prompt,,seed\nx,,1\n", "Column 2 of the prompt file has no name"),
        ("a.csv", 'prompt,"see"d"\nx,1\n', "header of the prompt file: it is not CSV"),
        ("a.csv", '"prompt\nx\n', "header of the prompt file: it is not CSV"),
        ("a.txt", "a pea\na\0lemon\n", "holds a NUL"),
    ],
)
def test_a_file_without_rows_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        read_prompts(tmp_path / name)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "missing.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "folder.txt")


@pytest.mark.parametrize("text", ["../x", "/a/b", "..", "A\\B", "茄子", "x" * 500, "-a-", "a\nb"])
def test_a_slug_is_part_of_one_file_name(text):
    assert set(slug(text)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert 0 < len(slug(text)) <= 60
    assert slug("茄子", otherwise="0003") == "0003"
