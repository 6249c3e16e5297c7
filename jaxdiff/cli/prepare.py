"""`jaxdiff prepare`: write captioned images, or their latents, to ArrayRecord shards."""

from dataclasses import dataclass
from typing import Annotated

import tyro
from etils import epath

from jaxdiff.cli.parsing import NO_PREFIX, parse_flags, parse_recipe_flags
from jaxdiff.config.checked import checked
from jaxdiff.data.files import files_below
from jaxdiff.data.loader import DataConfig
from jaxdiff.data.sources.array_record import ArrayRecord
from jaxdiff.data.sources.folder import ImageFolder, is_image
from jaxdiff.data.sources.parquet import Parquet
from jaxdiff.data.sources.prior_preservation import AnySource
from jaxdiff.data.sources.tfds import TFDS
from jaxdiff.data.sources.webdataset import WebDataset
from jaxdiff.data.transforms import Transforms
from jaxdiff.errors import UserError
from jaxdiff.training.prepare_shards import Sharing, write_records
from jaxdiff.training.recipe import Config


@checked
@dataclass(frozen=True, kw_only=True)
class PrepareOptions(Sharing):
    """Write records, or their latents, to ArrayRecord shards, which have fast random access.

    Arguments: a recipe, the output folder, and recipe keys to change; or, instead of a recipe, a
    folder of images, Parquet files or tar files. Unusable records are left out and listed in the
    manifest. Repeat the command to continue after an interruption.
    """

    config: Annotated[Config, NO_PREFIX, tyro.conf.FlagConversionOff]
    out: Annotated[str | None, tyro.conf.Positional] = None
    """Output folder, local or gs://."""


@checked
@dataclass(frozen=True, kw_only=True)
class PreparePathOptions(Sharing):
    """Write captioned images to ArrayRecord shards, which have fast random access.

    Arguments: the images, and the output folder. Unusable records are left out and listed in the
    manifest. Repeat the command to continue after an interruption.
    """

    data: Annotated[DataConfig, tyro.conf.FlagConversionOff]
    out: Annotated[str | None, tyro.conf.Positional] = None
    """Output folder, local or gs://."""


def prepare_command(arguments: list[str]) -> None:
    """Run `jaxdiff prepare RECIPE_OR_SOURCE OUT [--shards N] [--latents.views N] ...`."""
    prog = "jaxdiff prepare"
    if arguments and not arguments[0].startswith("-") and not arguments[0].endswith(".py"):
        data = DataConfig(source=source_at(arguments[0]), transforms=Transforms(size=256))
        plain = PreparePathOptions(data=data)
        path = parse_flags(PreparePathOptions, arguments[1:], default=plain, prog=prog)
        if path.latents.views or path.latents.text:
            raise UserError(
                "Latents need a recipe with an autoencoder: give its file first, and the data as "
                f"--data.source.path {arguments[0]}."
            )
        manifest = write_records(None, path.data, _folder(path.out), path)
    else:
        options = parse_recipe_flags(PrepareOptions, arguments, prog=prog)
        config = options.config
        manifest = write_records(config, config.data, _folder(options.out), options)
    if manifest is None:
        print("This host's shards are written; the last host to finish writes the manifest.")
        return
    kind = "records" if manifest.latents is None else "records of latents"
    left = f", left out {manifest.rejected}" if manifest.rejected else ""
    print(f"Wrote {manifest.records} {kind} in {len(manifest.shards)} shards{left}.")


def _folder(out: str | None) -> str:
    if out is None:
        raise UserError("The output folder is missing: give it after the recipe.")
    return out


def source_at(path: str) -> AnySource:
    """Return the source that reads `path`, a file, a folder or a glob.

    Raises:
      UserError: it does not exist, or is of an unknown format.
    """
    root = epath.Path(path)
    if root.is_dir():
        if (root / "dataset_info.json").exists():
            return TFDS(name=path)
        names = list(files_below(root))
    elif root.is_file() or any(sign in path for sign in "*?["):
        names = [path]
    else:
        raise UserError(
            f"{path} does not exist: expected a recipe, with a name ending in .py, or images with "
            "captions."
        )
    if any(name.endswith(".tar") for name in names):
        return WebDataset(path=path)
    if any(name.endswith(".parquet") for name in names):
        return Parquet(path=path)
    if any(".array_record" in name for name in names):
        return ArrayRecord(path=path)
    if root.is_dir() and any(map(is_image, names)):
        return ImageFolder(path=path)
    raise UserError(
        f"{path} contains nothing to prepare: expected a folder of images with captions, or "
        "Parquet, ArrayRecord or tar files."
    )
