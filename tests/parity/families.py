"""Small pipelines of diffusers with random weights: FLUX.1, FLUX.2 klein and Z-Image."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from safetensors.torch import load_file

from jaxdiff.data.tokenizer import Tokenizer
from tests.data.language_tokenizers import write_qwen_tokenizer, write_t5_tokenizer
from tests.parity.torch_models import randomized

KINDS = ("FLUX.1 dev", "FLUX.1 schnell", "klein", "klein base", "Z-Image Turbo", "Z-Image")
GUIDANCE = {"FLUX.1 dev": 2.5, "klein base": 4.0, "Z-Image": 3.0}  # the others are distilled
CHANNELS = {"FLUX.1": 4, "klein": 16, "Z-Image": 4}  # of the latents
DOWNSAMPLING = {"FLUX.1": 2, "klein": 4, "Z-Image": 2}
STEPS = 3


def family(kind: str) -> str:
    return next(name for name in CHANNELS if kind.startswith(name))


def qwen3(vocab: int, width: int, depth: int) -> Any:
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=24,
            num_hidden_layers=depth,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            rope_theta=1e6,
        )
    )


def clip_text(tokenizer: Any) -> Any:
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=20,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def t5_encoder(vocab: int) -> Any:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=vocab,
            d_model=24,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


_VAE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
}


def _vae() -> Any:
    return diffusers.AutoencoderKL(
        **_VAE,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _flux2_vae() -> Any:
    model = diffusers.AutoencoderKLFlux2(**_VAE)
    torch.manual_seed(2)
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.1, 4)
    return model


def _flux1(folder: Path, kind: str) -> Any:
    plain = Tokenizer.train(["a red pea", "a green banana"] * 9, vocab_size=540)
    plain.export(str(folder / "clip"))
    clip = transformers.CLIPTokenizer.from_pretrained(folder / "clip")
    t5 = transformers.AutoTokenizer.from_pretrained(write_t5_tokenizer(folder / "t5"))
    dev = kind == "FLUX.1 dev"
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=20,
            axes_dims_rope=(4, 6, 6),
            guidance_embeds=dev,
        ),
        vae=_vae(),
        text_encoder=clip_text(clip),
        tokenizer=clip,
        text_encoder_2=t5_encoder(len(t5)),
        tokenizer_2=t5,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=dev, shift=3.0 if dev else 1.0
        ),
    )


def _klein(folder: Path, kind: str) -> Any:
    qwen = transformers.AutoTokenizer.from_pretrained(write_qwen_tokenizer(folder / "qwen"))
    return diffusers.Flux2KleinPipeline(
        transformer=diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        vae=_flux2_vae(),
        text_encoder=qwen3(len(qwen), 16, 30),
        tokenizer=qwen,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        is_distilled=kind == "klein",
    )


def _z_image(folder: Path, kind: str) -> Any:
    qwen = transformers.AutoTokenizer.from_pretrained(write_qwen_tokenizer(folder / "qwen"))
    return diffusers.ZImagePipeline(
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=48,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=3,
            n_kv_heads=3,
            cap_feat_dim=16,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 64, 64],
        ),
        vae=_vae(),
        text_encoder=qwen3(len(qwen), 16, 3),
        tokenizer=qwen,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0 if kind == "Z-Image Turbo" else 6.0
        ),
    )


_BUILD = {"FLUX.1": _flux1, "klein": _klein, "Z-Image": _z_image}


def make_pipeline(kind: str, folder: Path) -> Any:
    """Return diffusers' pipeline of one of `KINDS`; its tokenizers are in `folder`."""
    torch.manual_seed(0)
    pipeline = _BUILD[family(kind)](folder, kind)
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        if getattr(pipeline, part, None) is not None:
            torch.manual_seed(1)
            randomized(getattr(pipeline, part), 0.05)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def open_pipeline(folder: Path) -> Any:
    """Return diffusers' pipeline of a folder."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def guidance(kind: str) -> tuple[dict[str, float], dict[str, float]]:
    """Return guidance of diffusers and of ours: Z-Image adds the difference to the conditional."""
    scale = GUIDANCE.get(kind)
    if scale is None:
        return {"guidance_scale": 0.0 if family(kind) == "Z-Image" else 1.0}, {}
    return {"guidance_scale": scale}, {"guidance_scale": scale + (kind == "Z-Image")}


def noise(kind: str, height: int, width: int, count: int = 1) -> np.ndarray:
    """Return latents [count, h, w, c] for images of a size in pixels."""
    name = family(kind)
    side = DOWNSAMPLING[name]
    shape = count, height // side, width // side, CHANNELS[name]
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def sample_there(pipeline: Any, kind: str, latents: np.ndarray, **changes: Any) -> np.ndarray:
    """Return diffusers' images [b, h, w, 3], in [0, 1], for latents [b, h, w, c]."""
    name, (count, h, w, channels) = family(kind), latents.shape
    given = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
    if name == "FLUX.1":
        given = pipeline._pack_latents(given, count, channels, h, w)
        changes = {"max_sequence_length": 512 if kind.endswith("dev") else 256} | changes
    settings = {
        "prompt": ["a red pea"] * count,
        "latents": given,
        "height": h * DOWNSAMPLING[name],
        "width": w * DOWNSAMPLING[name],
        "num_inference_steps": STEPS,
        "output_type": "np",
    }
    settings |= changes
    settings["prompt"] = list(settings["prompt"])  # ZImagePipeline changes the list itself
    return np.asarray(pipeline(**settings).images)


def stored(folder: Path) -> dict[tuple[str, str], np.ndarray]:
    """Return the bits of all tensors of a folder, by part and name."""
    found = {}
    for file in sorted(folder.glob("*/*.safetensors")):
        for name, value in load_file(file).items():
            bits = value.view(torch.int16) if value.dtype == torch.bfloat16 else value
            found[file.parent.name, name.removeprefix("text_model.")] = bits.numpy()
    return found
