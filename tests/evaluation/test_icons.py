"""`IconAccuracy`: figures of true scenes, and what it refuses."""

import dataclasses

import numpy as np
import pytest

from jaxdiff.data.loader import DataConfig
from jaxdiff.data.transforms import Transforms
from jaxdiff.datasets.icons.emoji_scenes import EmojiScenes
from jaxdiff.datasets.icons.score import icon_prompts, icon_scenes
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import EvalContext
from jaxdiff.evaluation.icons import IconAccuracy
from tests.datasets.icons.tiny import write_sets

SIZE, COUNT = 64, 8
SETS = {
    "single things, held-out styles": ("held_out", "single"),
    "single things, trained styles": ("train", "single"),
    "two things, held-out pairs": ("held_out", "two"),
    "two things, trained pairs": ("train", "two"),
}


@dataclasses.dataclass(frozen=True)
class Perfect(EvalContext):
    """A context whose model generates the true image of each prompt."""

    images: dict = dataclasses.field(default_factory=dict)

    def generate(self, prompts, first=0):
        return np.stack([self.images[prompt] for prompt in prompts])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = write_sets(tmp_path_factory.mktemp("packages"))
    return EmojiScenes(size=SIZE, folder=str(folder), cache=str(folder / "cache"))


@pytest.fixture
def context(tiny_recipe, source):
    images = {}
    for share, kind in SETS.values():
        scenes = icon_scenes(source, COUNT, share, kind)
        images |= dict(zip(icon_prompts(scenes), map(source.compose, scenes), strict=True))
    spec = dataclasses.replace(tiny_recipe().task.model, image_size=SIZE)
    data = DataConfig(source=source, transforms=Transforms(size=SIZE))
    return Perfect(0, spec, {}, {}, data, images=images)


def test_true_scenes_are_right_in_all_sets(context):
    report = IconAccuracy(samples=COUNT).evaluate(context)
    for name in SETS:
        assert report.scalars[f"{name}/joint"] >= 0.85
        assert report.scalars[f"{name}/joint/ceiling"] >= 0.6
        assert report.scalars[f"{name}/joint/chance"] <= 0.2
    assert len(report.scalars) == 3 * (3 + 3 + 2 + 2)
    assert report.text.splitlines()[0].split()[-3:] == ["score", "ceiling", "chance"]


def test_other_sizes_and_data_are_refused(context):
    spec = dataclasses.replace(context.spec, image_size=32)
    with pytest.raises(UserError, match=r"expected data\.source to be EmojiScenes"):
        IconAccuracy().check(spec, context.data)
    lines = dataclasses.replace(context.data.source, sets=("lines",))
    with pytest.raises(UserError, match=r"scores held-out styles but data\.source\.sets has none"):
        IconAccuracy().check(context.spec, dataclasses.replace(context.data, source=lines))
    with pytest.raises(UserError, match=r"IconAccuracy\.samples is 1"):
        IconAccuracy(samples=1)
