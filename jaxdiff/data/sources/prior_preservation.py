"""Own images beside those of a prior, so that learning a few does not unlearn the rest."""

import math
from dataclasses import dataclass

from jaxdiff.data.sources.array_record import ArrayRecord
from jaxdiff.data.sources.base import Record
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.sources.parquet import Parquet
from jaxdiff.data.sources.tfds import TFDS
from jaxdiff.data.sources.webdataset import WebDataset
from jaxdiff.datasets.openmoji.source import OpenMoji
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.errors import UserError

Source = Produce | OpenMoji | ImageFolder | Parquet | WebDataset | ArrayRecord | TFDS


@dataclass(frozen=True, kw_only=True)
class WithPrior:
    """DreamBooth's prior preservation (Ruiz et al. 2023, eq. 2), as a matter of the data.

    The prior's images, drawn by the very model that is to be trained, keep what it knows of their
    kind. A `share` s of all records, evenly spread before they are shuffled, is theirs, which
    weighs their loss by the paper's lambda = s / (1 - s). An epoch is as long as it takes to see
    all images of both; those of the smaller set come again.

    Attributes:
      own: what is to be learnt, such as five photographs of one dog.
      prior: what is not to be forgotten, such as two hundred drawn pictures of dogs.
      share: of the records, between 0 and 1.
    """

    own: Source
    prior: Source
    share: float = 0.5

    def __len__(self) -> int:
        own, prior = len(self.own) / (1 - self.share), len(self.prior) / self.share
        return math.ceil(max(own, prior) - 1e-9)

    def __getitem__(self, index: int, /) -> Record:
        before, after = math.floor(index * self.share), math.floor((index + 1) * self.share)
        if after > before:
            return self.prior[before % len(self.prior)]
        return self.own[(index - before) % len(self.own)]

    def check(self) -> None:
        """Raises `UserError` for data that are missing, or a share that leaves one of them out."""
        if not 0 < self.share < 1:
            raise UserError(f"data.source.share is {self.share}: expected a share between 0 and 1.")
        self.own.check()
        self.prior.check()
