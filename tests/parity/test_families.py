"""Whole pipelines of FLUX.1, FLUX.2 klein and Z-Image sample as diffusers does, there and back."""

import copy

import numpy as np
import pytest
from PIL import Image

import jaxdiff
from jaxdiff.errors import UserError
from jaxdiff.pipelines.input_images import References
from jaxdiff.pretrained.diffusers_folder import read_diffusers, write_diffusers
from jaxdiff.pretrained.load import read_spec

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from tests.parity.families import (
    KINDS,
    STEPS,
    family,
    guidance,
    make_pipeline,
    noise,
    open_pipeline,
    sample_there,
    stored,
)

pytestmark = pytest.mark.parity

SIZES = [(32, 48), (64, 16)]


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    """The kind, diffusers' pipeline, its folder, and ours."""
    root = tmp_path_factory.mktemp("family")
    theirs = make_pipeline(request.param, root)
    theirs.save_pretrained(root / "theirs")
    return request.param, theirs, root / "theirs", jaxdiff.load(root / "theirs")


def assert_same_tensors(folder, back):
    """Compare the tensors of two folders bit for bit."""
    before, after = stored(folder), stored(back)
    assert set(before) == set(after)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=str(name))
        assert after[name].dtype == value.dtype


def assert_same_images(kind, theirs, again):
    """Compare the images of two pipelines of diffusers."""
    latents, (there, _) = noise(kind, *SIZES[0]), guidance(kind)
    images = [sample_there(pipeline, kind, latents, **there) for pipeline in (theirs, again)]
    np.testing.assert_allclose(*images, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_images(height, width, model):
    kind, theirs, _, ours = model
    latents, (there, here) = noise(kind, height, width, 2), guidance(kind)
    prompts = ["a red pea", "two green bananas, ripe and the quick brown fox"]
    expected = sample_there(theirs, kind, latents, prompt=prompts, **there)
    found = ours(
        prompts, latents=latents, num_steps=STEPS, size=(width, height), output="float", **here
    )
    assert expected.std() > 0.05  # images with structure
    assert np.abs(expected[0] - expected[1]).max() > 0.05
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_import_then_export(model, tmp_path):
    """Tensors and tokenizers come back bit for bit; diffusers samples the same from the folder."""
    kind, theirs, folder, _ = model
    write_diffusers(tmp_path, read_diffusers(folder, place=np.asarray), original=folder)
    assert_same_tensors(folder, tmp_path)
    kept = "tokenizer_2" if family(kind) == "FLUX.1" else "tokenizer"  # CLIP's is rewritten
    for file in (folder / kept).iterdir():
        assert (tmp_path / file.parent.name / file.name).read_bytes() == file.read_bytes()
    assert read_spec(tmp_path).sampler == read_spec(folder).sampler
    again = open_pipeline(tmp_path)
    assert type(again) is type(theirs)
    assert_same_images(kind, theirs, again)


def test_without_the_original_the_image_is_the_same(model, tmp_path):
    """Layers that no hidden state depends on are left out."""
    kind, theirs, folder, _ = model
    write_diffusers(tmp_path, read_diffusers(folder, place=np.asarray))
    again = open_pipeline(tmp_path)
    if family(kind) == "klein":
        assert again.text_encoder.config.num_hidden_layers < 30
    assert_same_images(kind, theirs, again)


def test_bfloat16_in_shards(model, tmp_path):
    """As the published folders are: every bit comes back."""
    _, theirs, *_ = model
    folder, back = tmp_path / "theirs", tmp_path / "ours"
    half = copy.deepcopy(theirs).to(torch.bfloat16)
    half.save_pretrained(folder, max_shard_size="20KB", variant="bf16")
    assert len(list((folder / "transformer").glob("*.bf16*.safetensors"))) > 1
    write_diffusers(back, read_diffusers(folder, place=np.asarray), original=folder)
    assert_same_tensors(folder, back)


def test_reference_images(model):
    """Two images of several sizes, which neither is a multiple of the latents' side."""
    kind, theirs, _, ours = model
    rng = np.random.default_rng(1)
    pictures = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((66, 70), (72, 96))]
    latents, (there, here) = noise(kind, *SIZES[0]), guidance(kind)
    options = {"num_steps": STEPS, "size": SIZES[0][::-1], "output": "float", **here}
    if family(kind) != "klein":
        with pytest.raises(UserError, match="reads no reference images"):
            ours("a red pea", init=References(images=pictures), latents=latents, **options)
        return
    images = [Image.fromarray(picture) for picture in pictures]
    expected = sample_there(theirs, kind, latents, image=images, **there)
    plain = sample_there(theirs, kind, latents, **there)
    assert np.abs(expected - plain).max() > 0.02  # the references count
    found = ours("a red pea", init=References(images=pictures), latents=latents, **options)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
