import numpy as np
import pytest

from jaxdiff.datasets.openmoji.names import Worker
from jaxdiff.datasets.openmoji.score import held_out_prompts, score
from jaxdiff.datasets.openmoji.source import OpenMoji

SIZE = 32


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "openmoji"  # rendered once for all test files
    return OpenMoji(split="all", size=SIZE, cache=str(folder))


@pytest.fixture(scope="module")
def by_worker(drawings):
    return {d.worker: i for i, d in enumerate(drawings.drawings) if d.worker}


@pytest.mark.parametrize("count", [50, 100])  # 100 go round the drawings twice
def test_the_real_drawings_are_right_and_shifted_prompts_are_not(count, drawings):
    names = [prompt.target for prompt in held_out_prompts(count)]
    places = {d.name: i for i, d in enumerate(drawings.drawings)}
    images = np.stack([drawings.image(places[name]) for name in names])
    result = score(images, names, drawings)
    assert result.score == {"gender": 1.0, "tone": 1.0, "joint": 1.0}
    assert min(result.ceiling.values()) >= 0.9
    assert result.chance["joint"] <= 0.3
    assert result.chance.keys() == result.ceiling.keys() == result.score.keys()


def test_the_wrong_tone_of_the_right_gender_is_wrong_by_its_tone(drawings, by_worker):
    shown = by_worker[Worker("judge", "woman", "dark")]
    wanted = by_worker[Worker("judge", "woman", "light")]
    result = score(drawings.image(shown)[None], [drawings.drawings[wanted].name], drawings)
    assert result.score == {"gender": 1.0, "tone": 0.0, "joint": 0.0}


def test_equal_drawings_count_as_the_same(drawings, by_worker):
    man, person = (by_worker[Worker("astronaut", g, "dark")] for g in ("man", "person"))
    np.testing.assert_array_equal(drawings.image(man), drawings.image(person))
    for wanted in (man, person):
        result = score(drawings.image(man)[None], [drawings.drawings[wanted].name], drawings)
        assert result.score["joint"] == 1.0


def test_prompts_are_held_out_and_go_round_the_captions():
    prompts = held_out_prompts(110)
    texts = {d.name: d.captions for d in OpenMoji(split="held_out").drawings}
    assert all(prompt.text in texts[prompt.target] for prompt in prompts)
    assert {prompt.target for prompt in prompts} == set(texts)
    assert len(set(prompts)) == 110


def test_a_wrong_number_or_size_of_images_is_refused(drawings):
    name = held_out_prompts(1)[0].target
    with pytest.raises(ValueError, match="1 targets"):
        score(np.zeros((2, SIZE, SIZE, 3), np.uint8), [name], drawings)
    with pytest.raises(ValueError, match="8 pixels"):
        score(np.zeros((1, 8, 8, 3), np.uint8), [name], drawings)
