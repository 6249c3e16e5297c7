"""Fixtures of the pipelines."""

import pytest


@pytest.fixture
def vae_modes(monkeypatch) -> dict[str, set[str]]:
    """The modes of the autoencoder in which images are encoded and decoded, as they are traced."""
    from jaxdiff.models.text_to_image import TextToImage

    modes: dict[str, set[str]] = {"encode": set(), "decode": set()}

    def record(name: str) -> None:
        method = getattr(TextToImage, name)

        def recorded(*args, vae_mode="full", **more):
            modes[name].add(vae_mode)
            return method(*args, vae_mode=vae_mode, **more)

        monkeypatch.setattr(TextToImage, name, recorded)

    for name in modes:
        record(name)
    return modes
