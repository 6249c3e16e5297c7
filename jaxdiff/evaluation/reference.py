"""References: the images, or statistics of images, that other images are compared with."""

import dataclasses
from dataclasses import dataclass

from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.evaluation.extraction import image_features
from jaxdiff.evaluation.features import FeatureNetwork
from jaxdiff.evaluation.image_sets import ImageArray, ImageFiles, ImageSet
from jaxdiff.evaluation.statistics import (
    Statistics,
    collect,
    moments_of_npz,
    network_fits,
    read_npz,
    read_statistics,
)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A reference that is opened, before features are computed.

    There are stored statistics, or images, or both.

    Attributes:
      name: of the file or the images, for messages.
      stored: statistics of a file; without features where the file has moments alone.
      images: the images; None where a file has statistics alone.
    """

    name: str
    stored: Statistics | None = None
    images: ImageSet | None = None

    @property
    def count(self) -> int:
        """Number of images, unusable ones included; 0 where a file does not say."""
        return self.stored.count if self.stored else len(self._images)

    @property
    def has_features(self) -> bool:
        """Whether there are features, or images to compute them from."""
        return self.images is not None or (self.stored and self.stored.features) is not None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the statistics, or what identifies the images."""
        return self.stored.fingerprint if self.stored else self._images.fingerprint

    @property
    def _images(self) -> ImageSet:
        assert self.images is not None
        return self.images

    def check(self, network: FeatureNetwork) -> None:
        """Raise `UserError` for statistics of another network."""
        if self.stored is None:
            return
        if difference := network_fits(self.stored, network.provenance, network.width):
            raise UserError(
                f"{self.name} {difference}: expected statistics of the network in use; write them "
                "again with jaxdiff evaluate --reference, or name their network."
            )

    def statistics(self, network: FeatureNetwork, folder: epath.Path | None = None) -> Statistics:
        """Return the statistics, with features where there are any.

        Args:
          network: of the features.
          folder: for features in progress; None keeps none.

        Raises:
          UserError: the statistics are of another network, or an image is unreadable.
        """
        self.check(network)
        if self.images is None:
            assert self.stored is not None
            return self.stored
        own = set_statistics(network, self.images, folder)
        if self.stored is None:
            return own
        return dataclasses.replace(self.stored, features=own.features)


def open_reference(path: str) -> Reference:
    """Open a reference: statistics (.safetensors), .npz of ADM or pytorch-fid, or a folder.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    root = epath.Path(path)
    if not root.exists():
        raise UserError(
            f"The reference {path} does not exist: expected a folder of images, an .npz file, or "
            "statistics that jaxdiff evaluate wrote (.safetensors); give its path."
        )
    suffix = root.suffix.lower()
    if root.is_dir():
        return Reference(name=path, images=ImageFiles(path))
    if suffix == ".safetensors":
        return Reference(name=path, stored=read_statistics(path))
    if suffix == ".npz":
        return _open_npz(path)
    raise UserError(
        f"The reference {path} is another kind of file: expected a folder of images, an .npz file, "
        "or statistics that jaxdiff evaluate wrote (.safetensors); give one of them."
    )


def _open_npz(path: str) -> Reference:
    """Open moments, images or both."""
    arrays = read_npz(path)
    moments, images = moments_of_npz(path, arrays), arrays.get("arr_0")
    stored = moments and Statistics(
        count=0,  # the file does not say
        moments=moments,
        features=None,
        network={},
        data=path,
    )
    own = None if images is None else ImageArray(images, path)
    return Reference(name=path, stored=stored, images=own)


def set_statistics(
    network: FeatureNetwork, images: ImageSet, folder: epath.Path | None = None
) -> Statistics:
    """Return the statistics of a set of images."""
    parts = image_features(network, images, folder)
    return collect(parts, network.provenance, images.name, len(images))
