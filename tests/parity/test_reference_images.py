"""Reference images are resized and cropped as diffusers' Flux2KleinPipeline does."""

import numpy as np
import pytest
from PIL import Image

from jaxdiff.pipelines.input_images import fit_reference

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

pytestmark = pytest.mark.parity

MULTIPLE = 16


@pytest.mark.parametrize("size", [(64, 64), (200, 67), (1024, 1024), (1031, 1020), (3000, 1111)])
def test_fit_reference(size):
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    processor = Flux2ImageProcessor(vae_scale_factor=MULTIPLE)
    image = processor.check_image_input(Image.fromarray(pixels))
    if width * height > 1024 * 1024:
        image = processor._resize_to_target_area(image, 1024 * 1024)
    width, height = (side // MULTIPLE * MULTIPLE for side in image.size)
    expected = processor.preprocess(image, height=height, width=width, resize_mode="crop")
    found = fit_reference(pixels[None], MULTIPLE)
    levels = np.rint((expected.numpy().transpose(0, 2, 3, 1) + 1) * 127.5)
    np.testing.assert_array_equal(found, levels)


@pytest.mark.parametrize("size", [(63, 64), (1000, 100)])
def test_sizes_that_diffusers_refuses_are_refused(size):
    width, height = size
    with pytest.raises(ValueError, match="too"):
        Flux2ImageProcessor.check_image_input(Image.new("RGB", size))
    with pytest.raises(Exception, match="A reference image is"):
        fit_reference(np.zeros((1, height, width, 3), np.uint8), MULTIPLE)
