"""Metadata in the files of generated images, from which images are reproduced.

A file has these texts (`io/image_files.py`):

    prompt, seed, model, model_fingerprint
    settings     JSON: `GenerationSettings`, without the prompt and the seed
    details      JSON: the resolved sampler and everything else that determines the pixels
    parameters   the same in the format of web UIs
"""

import dataclasses
import functools
import json
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from etils import epath

from jaxdiff.config.fields import fields_of, flag
from jaxdiff.config.serialization import from_json, to_json
from jaxdiff.errors import UserError
from jaxdiff.io.text import format_json, parse_json
from jaxdiff.models.layers import ComputeType
from jaxdiff.models.quantized import QuantizedType
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pipelines.resolve import (
    FILES,
    CommandDefaults,
    ResolvedSettings,
    input_paths,
    open_input,
    recorded,
    resolve_settings,
)
from jaxdiff.pipelines.settings import GenerationSettings
from jaxdiff.pretrained.bundle import weights_fingerprint
from jaxdiff.pretrained.load import load_bundle
from jaxdiff.sampling.sampler import ResolvedSampler

# Names of solvers in web UIs, where they differ from ours.
SAMPLERS = {
    "DPMSolverPP2M": "DPM++ 2M",
    "DPMSolverPP2MSDE": "DPM++ 2M SDE",
    "DPMSolverPPSDE": "DPM++ SDE",
    "EulerAncestral": "Euler a",
}


@functools.lru_cache(maxsize=4)
def fingerprint_of(model: str) -> str:
    """Return SHA-256, in hex, of the weights of an auxiliary model.

    Raises:
      UserError: there is no such model.
    """
    return weights_fingerprint(load_bundle(model).params)


def record(resolved: ResolvedSettings, pipe: Pipeline) -> dict[str, Any]:
    """Return everything that determines the pixels of an image, for JSON."""
    return {
        "prompt": resolved.prompt,
        "seed": resolved.seed,
        "settings": recorded(resolved),
        "details": details(resolved, pipe),
        "model": pipe.spec.name,
        "model_fingerprint": pipe.fingerprint,
    }


def details(resolved: ResolvedSettings, pipe: Pipeline) -> dict[str, Any]:
    """Return the resolved sampler, the arithmetic and the auxiliary models, for JSON."""
    sampler, asked = resolved.sampler.inherit(pipe.spec.sampler).resolve(), resolved.settings
    clip, guide = sampler.guidance.clip, sampler.guidance.guide
    models = {
        "clip": clip.model if clip else resolved.clip_model if asked.best_of else None,
        "guide": guide and guide.model,
        "refiner": resolved.refiner_model,
    }
    guidance = dataclasses.replace(
        sampler.guidance,
        clip=clip and dataclasses.replace(clip, model=""),
        guide=guide and dataclasses.replace(guide, model=""),
    )
    assert asked.num_steps is not None
    assert asked.guidance_scale is not None
    sampler = dataclasses.replace(
        sampler,
        num_steps=asked.num_steps,
        guidance_scale=asked.guidance_scale,
        guidance=guidance,
    )
    fingerprints = {name: fingerprint_of(model) for name, model in models.items() if model}
    return {
        "sampler": to_json(sampler),
        "dtype": pipe.dtype,
        "quantize": pipe.quantize,
        **fingerprints,
    }


def file_text(resolved: ResolvedSettings, pipe: Pipeline) -> dict[str, str]:
    """Return the texts of an image's file, by name."""
    made = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    found = record(resolved, pipe)
    return {
        **found,
        "seed": str(resolved.seed),
        "settings": format_json(found["settings"]),
        "details": format_json(found["details"] | made),
        "parameters": parameters(
            resolved,
            found["details"]["sampler"]["solver"]["type"],
            found["model"],
            found["model_fingerprint"],
        ),
    }


def parameters(resolved: ResolvedSettings, solver: str, model: str, fingerprint: str) -> str:
    """Return the text "parameters" of web UIs.

    Args:
      resolved: of the image.
      solver: the class of its solver.
      model: name of the model.
      fingerprint: of its weights.
    """
    asked = resolved.settings
    pairs = {
        "Steps": str(asked.num_steps),
        "Sampler": SAMPLERS.get(solver, solver),
        "CFG scale": f"{asked.guidance_scale:g}",
        "Seed": str(asked.seed),
        "Size": "{}x{}".format(*resolved.final_size),
        "Model": model,
        "Model hash": fingerprint[:10],
    }
    if asked.strength is not None:
        pairs["Denoising strength"] = f"{asked.strength:g}"
    if asked.clip_scale is not None:
        pairs["CLIP guidance"] = f"{asked.clip_scale:g}"
    shown = ", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items())
    return f"{asked.prompt}\nNegative prompt: {asked.negative_prompt or ''}\n{shown}"


def _quoted(value: str) -> str:
    """Quote a value that contains a separator."""
    return json.dumps(value) if re.search("[,:\n]", value) else value


@dataclass(frozen=True, kw_only=True)
class ImageMetadata:
    """The metadata in an image's file.

    Attributes:
      path: of the file, for messages.
      text: by name.
      settings: of `GenerationSettings`, as JSON.
      details: the rest.
    """

    path: epath.PathLike
    text: Mapping[str, str]
    settings: Mapping[str, Any]
    details: Mapping[str, Any]

    @classmethod
    def parse(cls, path: epath.PathLike, text: Mapping[str, str]) -> "ImageMetadata":
        """Parse what `file_text` wrote into a file.

        Raises:
          UserError: there is no metadata, or it was changed.
        """
        needed = ("prompt", "seed", "settings", "details", "model", "model_fingerprint")
        missing = [name for name in needed if name not in text]
        if missing:
            raise UserError(
                f"{path} has no metadata {', '.join(missing)}: expected a file as jaxdiff wrote "
                "it; other programs may remove its text."
            )
        try:
            settings, found = (parse_json(text[name], path) for name in ("settings", "details"))
        except UserError as error:
            raise _changed(path) from error
        types, kinds = typing.get_args(ComputeType), typing.get_args(QuantizedType)
        if (
            not isinstance(settings, dict)
            or not isinstance(found, dict)
            or not isinstance(found.get("sampler"), dict)
            or found.get("dtype") not in (None, *types)
            or found.get("quantize") not in (None, *kinds)
        ):
            raise _changed(path)
        return cls(path=path, text=text, settings=settings, details=found)

    def resolve(
        self, pipe: Pipeline, files: GenerationSettings, command: CommandDefaults
    ) -> ResolvedSettings:
        """Return the settings that reproduce the image.

        Args:
          pipe: the model that generated it.
          files: those that fields of `FILES` name, whose digests the file has.
          command: its auxiliary models, if any.

        Raises:
          UserError: a model or an input differs, or the metadata was changed.
        """
        if self.text["model_fingerprint"] != pipe.fingerprint:
            raise UserError(
                f"{self.path} was made by the model {self.text['model']} with the fingerprint "
                f"{self.text['model_fingerprint'][:10]}, not by {pipe.spec.name} with "
                f"{pipe.fingerprint[:10]}: give that model as --model, with the same --lora, "
                "--embedding, --dtype and --quantize."
            )
        for name in FILES:
            self._check_input(name, input_paths(files, name))
        try:
            named = {name: value for name, value in self.settings.items() if name not in FILES}
            named |= {"prompt": self.text["prompt"], "seed": int(self.text["seed"])}
            fields = fields_of(GenerationSettings)
            asked = GenerationSettings(**{k: fields[k].check(v) for k, v in named.items()})
        except (ValueError, KeyError, TypeError, UserError) as error:
            raise _changed(self.path) from error
        resolved = resolve_settings(asked.inherit(files), pipe, command, called=flag)
        found = details(resolved, pipe)
        models = (("clip", "CLIP"), ("guide", "guide model"), ("refiner", "refiner"))
        for name, what in models:
            if found.get(name) != self.details.get(name):
                raise UserError(
                    f"{self.path} was made with another {what}: give that as --{name}-model."
                )
        # The inputs were compared by their digests: the files may have other names by now.
        inputs = {name: self.settings[name] for name in FILES if name in self.settings}
        if parse_json(format_json(recorded(resolved)), self.path) | inputs != self.settings:
            raise _changed(self.path)
        if not self._has_sampler(found["sampler"], pipe.types):
            raise UserError(
                f"{self.path} was made with another sampler than {pipe.spec.name} has now: restore "
                "the key sampler in the config.json of the model."
            )
        return resolved

    def _has_sampler(self, sampler: Any, types: Sequence[type]) -> bool:
        """Whether the file states this sampler; keys that it lacks have their defaults.

        Later versions have more keys.
        """
        try:
            stated = from_json(ResolvedSampler, self.details["sampler"], types=types)
        except (UserError, KeyError):
            return False
        return format_json(to_json(stated)) == format_json(sampler)

    def _check_input(self, name: str, given: Sequence[epath.Path]) -> None:
        """Raise `UserError` unless the inputs are those of the file, or neither has any."""
        value = self.settings.get(name, [])
        stated = value if isinstance(value, list) else [value]
        digests = [open_input(path, name == "mask").sha256 for path in given]
        try:
            if digests == [one["sha256"] for one in stated]:
                return
            if not stated:
                raise UserError(f"{self.path} was made without {flag(name)}: leave that out.")
            names = ", ".join(one["file"] for one in stated)
            what = "that file" if len(stated) == 1 else "those files in this order"
            raise UserError(
                f"{self.path} was made from {names}: give {what}, unchanged, as {flag(name)}."
            )
        except (KeyError, TypeError) as error:
            raise _changed(self.path) from error


def _changed(path: epath.PathLike) -> UserError:
    return UserError(f"The text in {path} is not as jaxdiff wrote it: take the original file.")
