"""The card beside every exported model."""

import copy
import json

import jax
import numpy as np
import pytest

from jaxdiff.cli import main as cli
from jaxdiff.config.serialization import to_json
from jaxdiff.pretrained.bundle import exported_fingerprint, write_bundle
from jaxdiff.pretrained.load import SHIPPED, load_bundle
from jaxdiff.pretrained.model_card import (
    CARD,
    EVALUATION,
    HISTORY,
    CardInputs,
    folder_card,
    model_card,
    read_figures,
)

EVALUATED = {
    "samples": 8,
    "figures": {"one/joint": 0.5, "one/joint/ceiling": 1.0, "loss": 0.25, "fid": None},
}
ABOUT = {"date": "2026-12-01", "versions": {"jax": "0.10.2"}, "sampler": {"num_steps": 2}}


@pytest.fixture
def recipe(tiny_recipe):
    return to_json(tiny_recipe())


def section(card: str, title: str) -> str:
    return card.partition(f"## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("folder", sorted(p for p in SHIPPED.iterdir()), ids=lambda p: p.name)
def test_a_shipped_model_has_its_card(folder):
    card = folder_card(folder, name=folder.name, shown_as=f"shipped:{folder.name}")
    assert (folder / CARD).read_text() == card
    assert card.startswith("---\nlicense: apache-2.0\n")
    for title in ("Use", "Training", "License"):
        assert section(card, title)


@pytest.mark.parametrize("name", ["icons", "icons_distilled", "produce"])
def test_the_figures_of_a_shipped_model_are_of_its_weights(name):
    """`jaxdiff evaluate` wrote them: they have its names, and the fingerprint of the weights."""
    figures = read_figures(SHIPPED / name, load_bundle(f"shipped:{name}").params)
    assert figures is not None, "run jaxdiff evaluate, with --out, for the new weights"
    assert figures["provenance"]["model"] == f"shipped:{name}"
    assert {key.partition("/")[0] for key in figures["figures"]} == {name.partition("_")[0]}
    about = figures["provenance"]["figures"]
    assert about.keys() == figures["figures"].keys()
    assert all(one.keys() == {"images", "prompts"} for one in about.values())
    assert figures["images"] == f"{figures['images'].split()[0]} of {name.partition('_')[0]}"


def test_the_card_of_the_default_model_states_its_runs():
    """Its recipe is one run, and the weights come from five."""
    training = section((SHIPPED / "icons" / CARD).read_text(), "Training")
    assert "2.46 million images in five runs" in " ".join(training.split())
    assert "`jaxdiff train icons` is one such run" in training


@pytest.fixture
def evaluated(tiny_bundle, recipe, tmp_path):
    """A model's folder with figures of its weights, which are in float32 and no bfloat16."""
    params = jax.tree.map(lambda x: np.asarray(x) * np.float32(1.001), tiny_bundle.params)
    write_bundle(tmp_path / "model", tiny_bundle._replace(params=params), "float32", recipe)
    about = {**ABOUT, "weights": exported_fingerprint(params)}
    (tmp_path / "model" / EVALUATION).write_text(json.dumps({**EVALUATED, "provenance": about}))
    return tmp_path / "model"


def export(run, out, capsys) -> tuple[str, str]:
    """Export a model; return its card and what the command wrote to stderr."""
    assert cli.main(["export", str(run), str(out)]) == 0, capsys.readouterr().err
    return (out / CARD).read_text(), capsys.readouterr().err


def test_an_export_has_a_card_from_its_recipe_and_figures(evaluated, tmp_path, capsys):
    out = tmp_path / "out"
    card, _ = export(evaluated, out, capsys)
    assert "\n# tiny\n" in card
    assert f'jaxdiff.load("{out}")' in section(card, "Use")
    assert "| steps | 6 |" in section(card, "Training")
    assert "| one/joint | 0.5 | 1 |" in section(card, "Figures")
    assert "| loss | 0.25 |  |" in section(card, "Figures")
    assert "| fid |  |  |" in section(card, "Figures")
    assert "| samples | 8 |" in section(card, "Figures")
    assert "| date | 2026-12-01 |" in section(card, "Figures")
    assert "| jax | 0.10.2 |" in section(card, "Figures")
    assert "num_steps" not in section(card, "Figures")
    stored = json.loads((evaluated / EVALUATION).read_text())
    assert json.loads((out / EVALUATION).read_text()) == stored
    again, _ = export(out, tmp_path / "again", capsys)
    assert section(again, "Figures") == section(card, "Figures")


@pytest.mark.parametrize("stated", ["of other weights", "of unknown weights"])
def test_a_card_states_no_figures_of_other_weights(stated, evaluated, tmp_path, capsys):
    if stated == "of other weights":
        bundle = load_bundle(evaluated)
        params = jax.tree.map(lambda x: x * 2, bundle.params)
        write_bundle(evaluated, bundle._replace(params=params), "float32")
    else:
        (evaluated / EVALUATION).write_text(json.dumps(EVALUATED))
    card, said = export(evaluated, tmp_path / "out", capsys)
    assert not section(card, "Figures")
    assert not (tmp_path / "out" / EVALUATION).exists()
    assert "evaluation.json has figures of other weights" in said
    assert said.count("\n") == 1


def test_a_card_has_the_history_of_the_weights(evaluated, tmp_path, capsys):
    (evaluated / HISTORY).write_text("Two runs of 3 steps each.\n")
    for out in ("out", "again"):
        card, _ = export(evaluated, tmp_path / out, capsys)
        assert section(card, "Training").startswith("\nTwo runs of 3 steps each.\n")
        evaluated = tmp_path / out
    lora = CardInputs(name="x", folder="x", kind="lora", history="Two runs of 3 steps each.")
    assert section(model_card(lora), "Training") == "\nTwo runs of 3 steps each.\n"
    (evaluated / HISTORY).unlink()
    card, _ = export(evaluated, tmp_path / "out", capsys)
    assert "Two runs" not in card


def test_a_model_without_a_recipe_states_no_license(tiny_bundle, tmp_path):
    write_bundle(tmp_path, tiny_bundle)
    card = folder_card(tmp_path)
    assert card.startswith("---\nlibrary_name: jaxdiff\n")
    assert not section(card, "Training")
    assert not section(card, "Figures")


def test_the_license_names_the_data_and_the_models_that_weights_come_from(recipe):
    def license_of(source=None, base=None):
        changed = copy.deepcopy(recipe)
        changed["data"]["source"] = source or changed["data"]["source"]
        changed["task"]["pretrained"]["denoiser"] = base
        return section(
            model_card(CardInputs(name="x", folder="x", kind="lora", recipe=changed)), "License"
        )

    photos = {"type": "ImageFolder", "path": "photos"}
    cached = {"type": "CachedLatents", "path": "latents", "of": {"type": "OpenMoji"}}
    assert "Apache-2.0" in license_of()
    assert "Apache-2.0" in license_of(base="shipped:produce")
    assert "CC-BY-SA-4.0" in license_of(cached)
    icons = license_of({"type": "Iconify", "sets": ["noto", "twemoji"]})
    assert "Apache-2.0" in icons
    assert "Twemoji (Twitter, Inc. and other contributors, CC BY 4.0)" in icons
    others = license_of({"type": "Iconify", "sets": ["noto", "lucide"]})
    for unknown in (license_of(photos), others):
        assert "license of the training data" in unknown
    assert "and that of `owner/name`" in license_of(photos, "owner/name")
    recipe["task"]["pretrained"] = "owner/autoencoder"  # as a task with one part has it
    inputs = CardInputs(name="x", folder="x", kind="autoencoder", recipe=recipe)
    assert "that of `owner/autoencoder`" in section(model_card(inputs), "License")


@pytest.mark.parametrize("kind", ["diffusers", "lora", "embedding"])
def test_each_layout_says_how_it_is_loaded(kind):
    use = section(model_card(CardInputs(name="x", folder="styles/x", kind=kind)), "Use")
    compile(use.partition("```python\n")[2].partition("```")[0], "card", "exec")
    assert '"styles/x"' in use
