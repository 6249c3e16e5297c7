"""The card beside every exported model."""

import copy
import json

import pytest

from jaxdiff.cli import main as cli
from jaxdiff.config.serialization import to_json
from jaxdiff.pretrained.bundle import write_bundle
from jaxdiff.pretrained.load import SHIPPED
from jaxdiff.pretrained.model_card import CARD, EVALUATION, CardInputs, folder_card, model_card

EVALUATED = {
    "samples": 8,
    "figures": {"one/joint": 0.5, "one/joint/ceiling": 1.0, "loss": 0.25, "fid": None},
}


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
    for title in ("Use", "Training", "Figures", "License"):
        assert section(card, title)


def test_an_export_has_a_card_from_its_recipe_and_figures(tiny_bundle, recipe, tmp_path, capsys):
    run, out = tmp_path / "model", tmp_path / "out"
    write_bundle(run, tiny_bundle, dtype="float32", recipe=recipe)
    (run / EVALUATION).write_text(json.dumps(EVALUATED))
    assert cli.main(["export", str(run), str(out)]) == 0, capsys.readouterr().err
    card = (out / CARD).read_text()
    assert "\n# tiny\n" in card
    assert f'jaxdiff.load("{out}")' in section(card, "Use")
    assert "| steps | 6 |" in section(card, "Training")
    assert "| one/joint | 0.5 | 1 |" in section(card, "Figures")
    assert "| loss | 0.25 |  |" in section(card, "Figures")
    assert "| fid |  |  |" in section(card, "Figures")
    assert "| samples | 8 |" in section(card, "Figures")
    assert json.loads((out / EVALUATION).read_text()) == EVALUATED


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
