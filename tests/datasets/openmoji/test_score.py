import numpy as np
import pytest

from jaxdiff.datasets.openmoji.names import Worker
from jaxdiff.datasets.openmoji.score import held_out_prompts, score_workers
from jaxdiff.datasets.openmoji.source import OpenMoji

SIZE = 32


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "openmoji"  # rendered once for all test files
    return OpenMoji(split="all", size=SIZE, cache=str(folder))


@pytest.fixture(scope="module")
def by_worker(source):
    return {d.worker: i for i, d in enumerate(source.emojis) if d.worker}


@pytest.mark.parametrize("count", [50, 100])  # 100 cycle through the emoji twice
def test_real_emoji_are_correct_and_rolled_prompts_are_not(count, source):
    names = [prompt.target for prompt in held_out_prompts(count)]
    places = {d.name: i for i, d in enumerate(source.emojis)}
    images = np.stack([source.image(places[name]) for name in names])
    result = score_workers(images, names, source)
    assert result.score == {"gender": 1.0, "tone": 1.0, "joint": 1.0}
    assert min(result.ceiling.values()) >= 0.9
    assert result.chance["joint"] <= 0.3
    assert result.chance.keys() == result.ceiling.keys() == result.score.keys()


def test_a_wrong_tone_only_fails_the_tone(source, by_worker):
    other = by_worker[Worker("judge", "woman", "dark")]
    wanted = by_worker[Worker("judge", "woman", "light")]
    result = score_workers(source.image(other)[None], [source.emojis[wanted].name], source)
    assert result.score == {"gender": 1.0, "tone": 0.0, "joint": 0.0}


def test_equal_emoji_count_as_the_same(source, by_worker):
    man, person = (by_worker[Worker("astronaut", g, "dark")] for g in ("man", "person"))
    np.testing.assert_array_equal(source.image(man), source.image(person))
    for wanted in (man, person):
        result = score_workers(source.image(man)[None], [source.emojis[wanted].name], source)
        assert result.score["joint"] == 1.0


def test_prompts_are_held_out_and_cycle_through_the_captions():
    prompts = held_out_prompts(110)
    texts = {d.name: d.captions for d in OpenMoji(split="held_out").emojis}
    assert all(prompt.text in texts[prompt.target] for prompt in prompts)
    assert {prompt.target for prompt in prompts} == set(texts)
    assert len(set(prompts)) == 110


def test_a_wrong_number_or_size_of_images_is_refused(source):
    name = held_out_prompts(1)[0].target
    with pytest.raises(ValueError, match="1 targets"):
        score_workers(np.zeros((2, SIZE, SIZE, 3), np.uint8), [name], source)
    with pytest.raises(ValueError, match="8 pixels"):
        score_workers(np.zeros((1, 8, 8, 3), np.uint8), [name], source)
