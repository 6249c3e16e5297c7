"""Recipes that may resume in a run's folder, and those that are refused."""

import dataclasses
import json

import pytest
from etils import epath

from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import Evaluator, Report
from jaxdiff.evaluation.samples import SampleGrid
from jaxdiff.training.optimizer import AdamW, ConstantLR, CosineLR, WarmupStableDecay
from jaxdiff.training.recipe import PlannedTopology
from jaxdiff.training.workdir import CACHE, _captions, open_run, read_config


@pytest.fixture
def open_in(tmp_path):
    """`open_in(config)` opens the run in one and the same folder, and returns what it logged."""

    def open_it(config, *, fresh=False) -> list[str]:
        logged: list[str] = []
        open_run(config, epath.Path(tmp_path), fresh=fresh, log=logged.append)
        return logged

    return open_it


def taken(folder, step: int) -> None:
    """As if a checkpoint of that step had been written."""
    (folder / "checkpoints" / str(step)).mkdir(parents=True)


def test_a_new_folder_gets_recipe_and_tokenizer(open_in, tmp_path, tiny_recipe):
    logged = open_in(tiny_recipe())
    assert read_config(tmp_path) == tiny_recipe()
    assert (tmp_path / "tokenizers" / "text" / "tokenizer.json").exists()
    assert logged == ["Training a tokenizer on the captions of 50 records."]


class Captioned:
    """A source of captions; None stands for a record that cannot be read."""

    def __init__(self, *captions):
        self.captions = captions

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, index, /):
        if self.captions[index] is None:
            raise RecordError(f"r{index}: unreadable")
        return {"image": b"", "captions": self.captions[index], "name": f"r{index}"}

    def check(self):
        pass


def test_a_tokenizer_is_trained_on_the_captions_that_can_be_used():
    source = Captioned(["a pea"], None, ["a bad \udcff one", "two peas"], [" "], [], ["a pear"])
    assert list(_captions(source, range(6))) == ["a pea", "two peas", "a pear"]


@pytest.mark.parametrize(
    ("captions", "reason"), [(None, "r1: unreadable"), (["\udcff"], "r1: .*UTF-8"), ([""], "empty")]
)
def test_data_without_a_usable_caption_are_refused_for_a_tokenizer(captions, reason):
    source = Captioned(captions, captions)
    with pytest.raises(UserError, match=f"no caption to train a tokenizer on .*{reason}"):
        Tokenizer.train(_captions(source, range(2)), vocab_size=530, length=8)


def test_a_run_keeps_its_tokenizer(open_in, tmp_path, tiny_recipe):
    open_in(tiny_recipe())
    before = (tmp_path / "tokenizers" / "text" / "tokenizer.json").read_bytes()
    assert open_in(tiny_recipe()) == []
    assert (tmp_path / "tokenizers" / "text" / "tokenizer.json").read_bytes() == before


def test_another_recipe_is_refused_and_the_keys_are_named(open_in, tmp_path, tiny_recipe):
    recipe = tiny_recipe()
    open_in(recipe)
    taken(tmp_path, 4)
    other = dataclasses.replace(
        recipe,
        optimizer=AdamW(learning_rate=0.5),
        train=dataclasses.replace(recipe.train, batch_size=16),
    )
    with pytest.raises(UserError) as error:
        open_in(other)
    message = str(error.value)
    assert "optimizer.learning_rate is 0.5 here and 0.01 there" in message
    assert "train.batch_size is 16 here and 8 there" in message
    assert "train.steps" not in message
    assert "--out" in message
    assert "--fresh" in message
    assert read_config(tmp_path) == recipe


def test_settings_that_do_not_change_the_result_may_change(open_in, tmp_path, tiny_recipe):
    open_in(tiny_recipe())
    taken(tmp_path, 4)
    changed = tiny_recipe(log_every=3, checkpoint_every=5, keep=1)
    reading = {"workers": 2, "threads": 3, "prefetch": 4, "max_bad_fraction": 0.5}
    data = dataclasses.replace(changed.data, **reading)
    model = changed.task.model
    sampler = dataclasses.replace(model.sampler, num_steps=7)
    task = dataclasses.replace(
        changed.task, model=dataclasses.replace(model, name="other", sampler=sampler)
    )
    evaluators = (SampleGrid(prompts=("a pea",)),)
    slices = (PlannedTopology(topology="v5e:2x2", mesh=MeshConfig()),)
    changed = dataclasses.replace(changed, name="other", data=data, task=task, slices=slices)
    open_in(dataclasses.replace(changed, evaluators=evaluators))
    assert read_config(tmp_path).train.log_every == 3


STABLE = WarmupStableDecay(warmup_steps=10, decay_fraction=0.25)  # falls from step 75 of 100
FALLING = CosineLR(warmup_steps=10)


@pytest.mark.parametrize(
    ("schedule", "step", "steps", "accepted"),
    [
        (ConstantLR(warmup_steps=10), 90, 1000, True),
        (ConstantLR(warmup_steps=10), 50, 50, True),
        (STABLE, 70, 1000, True),
        (STABLE, 90, 1000, False),  # its decay has begun
        (STABLE, 40, 80, True),
        (STABLE, 70, 80, False),  # the shorter one would have begun its decay
        (FALLING, 50, 200, False),
        (FALLING, 50, 80, False),
        (FALLING, 8, 200, True),  # still in its warm-up, which is the same
        (FALLING, 50, 100, True),
    ],
)
def test_the_length_may_change_while_past_learning_rates_stay_equal(
    open_in, tmp_path, tiny_recipe, schedule, step, steps, accepted
):
    def recipe(steps):
        return dataclasses.replace(
            tiny_recipe(steps=steps), optimizer=AdamW(learning_rate=1e-3, schedule=schedule)
        )

    open_in(recipe(100))
    taken(tmp_path, step - 10)
    taken(tmp_path, step)
    if accepted:
        open_in(recipe(steps))
        assert read_config(tmp_path) == recipe(steps)
    else:
        with pytest.raises(UserError, match=f"train.steps is {steps} here and 100 there"):
            open_in(recipe(steps))


def test_a_run_whose_evaluator_is_gone_continues(open_in, tmp_path, tiny_recipe):
    """Its type is known to nobody: evaluators may change freely."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Gone(Evaluator):
        def evaluate(self, context):
            return Report()

    open_in(dataclasses.replace(tiny_recipe(), evaluators=(Gone(),)))
    taken(tmp_path, 4)
    with pytest.raises(UserError, match="is of type Gone"):
        read_config(tmp_path)
    assert open_in(tiny_recipe()) == []
    assert read_config(tmp_path) == tiny_recipe()


def test_without_a_checkpoint_any_length_will_do(open_in, tmp_path, tiny_recipe):
    recipe = dataclasses.replace(tiny_recipe(steps=100), optimizer=AdamW(schedule=FALLING))
    open_in(recipe)
    longer = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=200))
    open_in(longer)
    assert read_config(tmp_path) == longer


def test_a_run_without_a_step_may_be_replaced_by_another_recipe(open_in, tmp_path, tiny_recipe):
    open_in(tiny_recipe())
    other = tiny_recipe(batch_size=4)
    open_in(other)
    assert read_config(tmp_path) == other


def test_a_run_keeps_its_latents(open_in, tmp_path, tiny_recipe):
    open_in(tiny_recipe(steps=100))
    latents = tmp_path / CACHE / "manifest.json"
    latents.parent.mkdir()
    latents.touch()
    open_in(tiny_recipe(steps=200, log_every=3, checkpoint_every=7))
    assert latents.exists()
    open_in(tiny_recipe(seed=1))
    open_in(tiny_recipe(seed=2), fresh=True)
    assert latents.exists()


def test_an_unusable_folder_for_a_run_is_refused(open_in, tmp_path, tiny_recipe):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="holds an exported model"):
        open_in(tiny_recipe())
    with pytest.raises(UserError, match="cannot be written to as a folder"):
        open_run(tiny_recipe(), epath.Path(tmp_path / "model.safetensors"), fresh=False, log=print)


def test_a_run_cannot_be_cut_below_the_steps_it_has_taken(open_in, tmp_path, tiny_recipe):
    open_in(tiny_recipe(steps=100))
    taken(tmp_path, 50)
    with pytest.raises(UserError, match=r"taken 50 steps, but train\.steps is 40: give 50 or more"):
        open_in(tiny_recipe(steps=40))


def test_checkpoints_of_no_known_recipe_are_refused(open_in, tmp_path, tiny_recipe):
    taken(tmp_path, 4)
    with pytest.raises(UserError, match=r"no config\.json"):
        open_in(tiny_recipe())


def test_fresh_removes_the_run_and_nothing_else(open_in, tmp_path, tiny_recipe):
    open_in(tiny_recipe())
    taken(tmp_path, 4)
    of_the_run = ["metrics.jsonl", "summary.json", "evaluation.json", "history.txt"]
    of_the_run += ["frozen.safetensors"]
    for name in (*of_the_run, "samples/step_4.png", "tensorboard/events", "notes.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    other = tiny_recipe(seed=1, steps=3)
    open_in(other, fresh=True)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"config.json", "tokenizers", "notes.json"}
    assert read_config(tmp_path) == other


def test_an_edited_recipe_names_the_key_that_is_not_one(open_in, tmp_path, tiny_recipe):
    open_in(tiny_recipe())
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    data["train"]["stepz"] = data["train"].pop("steps")
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"stepz is not a key .* did you mean config\.train\.steps"):
        open_in(tiny_recipe())


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(
    "name", ["samples/mine.png", "config.json", "summary.json", "frozen.safetensors"]
)
def test_files_of_others_with_the_names_of_a_run_are_kept(
    open_in, tmp_path, tiny_recipe, fresh, name
):
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r"no recipe|not the folder of a run"):
        open_in(tiny_recipe(), fresh=fresh)
    assert mine.read_text() == '{"mine": 1}'
