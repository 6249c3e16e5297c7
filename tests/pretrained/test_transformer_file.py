"""A transformer in one file with a base that lacks its weights, or that it does not fit."""

import numpy as np
import pytest
from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.pretrained import load
from jaxdiff.pretrained.diffusers_folder import write_diffusers
from jaxdiff.pretrained.flux_original import write_flux_file
from jaxdiff.pretrained.load import load_bundle, read_spec
from tests.pretrained.families import random_bundle


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder of each family, and the file of a FLUX.2 transformer as `klein.safetensors`."""
    root = tmp_path_factory.mktemp("bases")
    for name in ("FLUX.1 dev", "klein", "Z-Image"):
        bundle = random_bundle(name, root / "tokenizers" / name)
        write_diffusers(root / name, bundle)
        if name == "klein":
            write_flux_file(
                root / "klein.safetensors", bundle.params["denoiser"], bundle.spec.denoiser
            )
    return root


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("Z-Image", "holds a FLUX transformer, and .*Z-Image is no FLUX: expected a base of the"),
        ("FLUX.1 dev", r"klein\.safetensors: missing tensors: .*; expected a transformer of the"),
        ("klein/vae", "vae is no base: expected a folder of diffusers, with model_index.json"),
        ("nothing/here/is", "is no base: expected a folder of diffusers"),
    ],
)
def test_a_base_that_does_not_fit_is_one_sentence(bases, base, message):
    placed = []
    with pytest.raises(UserError, match=message) as error:
        load_bundle(bases / "klein.safetensors", base=bases / base, place=placed.append)
    assert "\n" not in str(error.value)
    assert not placed


def test_a_base_goes_with_the_file_of_a_transformer_alone(bases):
    for model in (bases / "klein", "shipped:produce", bases / "klein/vae"):
        with pytest.raises(UserError, match=r"A base goes with a \.safetensors file that holds a"):
            read_spec(model, base=bases / "klein")
    with pytest.raises(UserError, match=r"expected a base too, .*; add --base"):
        load_bundle(bases / "klein.safetensors")


def test_of_a_base_on_the_hub_the_transformer_is_not_fetched(bases, monkeypatch):
    fetched = []

    def download(model, without=None):
        fetched.append((model, without))
        return epath.Path(bases / "klein")

    monkeypatch.setattr(load, "download", download)
    file = bases / "klein.safetensors"
    assert getattr(read_spec(file, base="somebody/klein"), "name", None) == "klein"
    found = load_bundle(file, base="somebody/klein", place=np.asarray).params
    assert fetched == [("somebody/klein", "transformer")] * 2
    whole = load_bundle(bases / "klein", place=np.asarray).params
    np.testing.assert_array_equal(
        found["denoiser"]["patch"]["kernel"], whole["denoiser"]["patch"]["kernel"]
    )
