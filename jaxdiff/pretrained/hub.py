"""Download models of the Hugging Face hub."""

import re

import huggingface_hub
from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.pretrained.safetensors_io import VARIANTS

CLIP = "openai/clip-vit-large-patch14"

_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2")
_SMALL = re.compile(r"model_index\.json|(scheduler|tokenizer|tokenizer_2)/[\w.-]+")
_TOKENIZER = re.compile(
    r"(tokenizer|vocab|tokenizer_config|special_tokens_map|added_tokens)\.json|merges\.txt"
)
_VARIANT = f"({'|'.join(map(re.escape, VARIANTS))})"
_WEIGHTS = re.compile(
    rf"(diffusion_pytorch_)?model{_VARIANT}(-\d+-of-\d+)?{_VARIANT}\.safetensors"
    rf"(\.index{_VARIANT}\.json)?"
)


def is_hub_id(model: str) -> bool:
    """Whether a name has the form OWNER/NAME and is no local folder."""
    is_file = model.endswith(".safetensors")
    return _ID.fullmatch(model) is not None and not is_file and not epath.Path(model).exists()


def download(model: str, without: str | None = None) -> epath.Path:
    """Download a model into the user's cache, unless it is there, and return its folder.

    Downloads safetensors in one precision, configs and tokenizers. Without a connection it returns
    the cached copy.

    Args:
      model: its id.
      without: the folder of a part whose weights are not needed.

    Raises:
      UserError: there is no such model, it has no safetensors, or it cannot be downloaded.
    """
    from huggingface_hub import errors  # with an HTTP client

    client, cached = huggingface_hub.HfApi(), False
    try:
        names = [file.rfilename for file in client.model_info(model).siblings or []]
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise _download_error(model, error) from error
    except Exception as error:  # no connection: its class depends on the hub's HTTP client
        try:
            names = [file.path for file in huggingface_hub.get_cached_repo_tree(model)]
            cached = True
        except (errors.CachedRepoTreeNotFoundError, OSError):
            raise _download_error(model, error) from error
    files = wanted(names, without)
    if not any(map(_is_weights, files)):
        raise UserError(
            f"{model} has no weights that jaxdiff reads: expected safetensors, since pickle files "
            "can run code; use a variant of the model that has them."
        )
    return _fetch(model, files, cached)


def download_tokenizer() -> epath.Path:
    """Download CLIP's tokenizer into the user's cache, and return its folder.

    Raises:
      UserError: the download fails.
    """
    return _fetch(CLIP, ["vocab.json", "merges.txt", "tokenizer_config.json"], cached=False)


def _fetch(model: str, files: list[str], cached: bool) -> epath.Path:
    """Download files and return their folder; `cached` uses only earlier downloads."""
    try:
        folder = huggingface_hub.snapshot_download(
            model, allow_patterns=files, local_files_only=cached
        )
    except Exception as error:
        raise _download_error(model, error) from error
    return epath.Path(folder)


def _download_error(model: str, error: Exception) -> UserError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{model} is open only to those who accept its licence: accept it on the model's page "
            "of the hub, then run `hf auth login` with a token of that account."
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        f"{model} is no local folder and cannot be downloaded from the hub ({reason}): check the "
        "name and the connection."
    )


def wanted(files: list[str], without: str | None = None) -> list[str]:
    """Return the files to download: of each network's weights the first of `VARIANTS`.

    A repository without `model_index.json` is a single network: an autoencoder or a CLIP. Of the
    part `without` it is the config alone.
    """
    is_pipeline = "model_index.json" in files
    small, folders = (_SMALL, _PARTS) if is_pipeline else (_TOKENIZER, ("",))
    split = {file: file.rpartition("/")[::2] for file in files}
    weights = {
        file: folder
        for file, (folder, name) in split.items()
        if folder in folders and folder != without and _is_weights(name)
    }
    first: dict[str, int] = {}
    for file, folder in weights.items():
        first[folder] = min(_rank(file), first.get(folder, len(VARIANTS)))
    configs = {f"{folder}/config.json".lstrip("/") for folder in folders}

    def reads(file: str) -> bool:
        if file in weights:
            return _rank(file) == first[weights[file]]
        return file in configs or small.fullmatch(file) is not None

    return [file for file in files if reads(file)]


def _rank(file: str) -> int:
    """Return the index of the variant of a file of weights."""
    return next((i for i, variant in enumerate(VARIANTS) if i and variant in file), 0)


def _is_weights(file: str) -> bool:
    return _WEIGHTS.fullmatch(file.rpartition("/")[2]) is not None
