"""Fixtures of the pipelines."""

import pytest


@pytest.fixture
def encodings(monkeypatch) -> list[str]:
    """The `vae_mode` of each call that encodes images, as programs are traced."""
    from jaxdiff.models.text_to_image import TextToImage

    modes, encode = [], TextToImage.encode

    def recorded(*args, vae_mode="full", **more):
        modes.append(vae_mode)
        return encode(*args, vae_mode=vae_mode, **more)

    monkeypatch.setattr(TextToImage, "encode", recorded)
    return modes
