"""Flags of diffusers, A1111, Stable Diffusion, ComfyUI and MaxDiffusion, for hints."""

_SAMPLE = {
    "--num-steps": ("num-inference-steps", "steps", "ddim-steps", "sampling-steps", "n-steps"),
    "--guidance-scale": ("cfg-scale", "cfg", "guidance", "scale", "text-guidance-scale"),
    "--size WIDTHxHEIGHT": ("height", "width", "h", "w", "resolution", "image-size"),
    "--num-images": (
        "batch-count",
        "batch-size",
        "n-iter",
        "n-samples",
        "num-images-per-prompt",
        "num-samples",
    ),
    "--negative-prompt": ("negative", "neg-prompt", "uncond"),
    "--solver": ("sampler", "sampler-name", "scheduler", "sampling-method"),
    "--prompts": ("from-file", "prompt-file", "prompts-file"),
    "the prompt itself, without a flag": ("prompt",),
    "--model": (
        "ckpt",
        "checkpoint",
        "model-id",
        "model-path",
        "pretrained-model-name-or-path",
        "unet",
    ),
    "--autoencoder": ("vae", "vae-path"),
    "--out": ("outdir", "output-dir", "output", "save-dir"),
    "--init-image": ("init-img", "input-image"),
    "--mask": ("mask-image", "mask-img"),
    "--strength": ("denoising-strength", "denoise", "image-strength"),
    "--guidance-rescale": ("cfg-rescale", "rescale-cfg"),
    "--lora": ("lora-path", "lora-weights"),
    "--embedding": ("textual-inversion", "embeddings"),
    "--dtype": ("precision", "torch-dtype", "mixed-precision", "half"),
    "--quantize int8": ("load-in-8bit", "int8", "quantization"),
    "--seamless": ("tiling", "tile"),
}
_TRAIN = {
    "--train.steps": (
        "steps",
        "max-train-steps",
        "num-train-steps",
        "num-train-epochs",
        "max-steps",
        "epochs",
    ),
    "--train.batch-size": ("train-batch-size", "per-device-batch-size", "batch-size", "batch"),
    "--train.accumulate": ("gradient-accumulation-steps", "accumulate-grad-batches"),
    "--train.checkpoint-every": (
        "checkpointing-steps",
        "checkpoint-every",
        "save-every",
        "checkpoint-period",
    ),
    "--train.keep": ("checkpoints-total-limit",),
    "--train.compute": ("mixed-precision", "precision", "weights-dtype", "activations-dtype"),
    "--train.profile-at": ("enable-profiler", "skip-first-n-steps-for-profiler"),
    "--train.profile-steps": ("profiler-steps",),
    "--train.seed": ("seed",),
    "--train.wandb True": ("report-to", "use-wandb"),
    "--optimizer.learning-rate": ("lr", "learning-rate"),
    "--optimizer.weight-decay": ("adam-weight-decay",),
    "--optimizer.clip-norm": ("max-grad-norm", "gradient-clip-val"),
    "--optimizer.schedule.warmup-steps": ("lr-warmup-steps", "warmup-steps"),
    "--ema.decay": ("ema-decay", "use-ema"),
    "--task.pretrained.denoiser": ("pretrained-model-name-or-path", "model", "ckpt"),
    "--task.trainable.lora.rank": ("rank", "lora-rank"),
    "--task.model.denoiser.remat": ("remat-policy",),
    "--task.model.denoiser.remat full": ("gradient-checkpointing",),
    "--data.transforms.size": ("resolution", "image-size", "height", "width"),
    "--data.transforms.crop": ("center-crop", "random-crop"),
    "--data.transforms.flip": ("random-flip",),
    "--data.transforms.caption-dropout": ("proportion-empty-prompts", "uncond-prob"),
    "--data.workers": ("dataloader-num-workers", "num-workers"),
    "--data.source.path": ("train-data-dir", "instance-data-dir", "dataset-name", "data-dir"),
    "--mesh.slices": ("dcn-data-parallelism", "dcn-fsdp-parallelism"),
    "--mesh.data": ("ici-data-parallelism",),
    "--mesh.fsdp": ("ici-fsdp-parallelism",),
    "--mesh.tensor": ("ici-tensor-parallelism",),
    "--mesh.context": ("ici-context-parallelism",),
    "--out": ("output-dir", "outdir", "logging-dir", "base-output-directory"),
    "--resume": ("resume-from-checkpoint",),
}
PEER_FLAGS = {
    f"jaxdiff {command}": {f"--{flag}": ours for ours, flags in table.items() for flag in flags}
    for command, table in (("sample", _SAMPLE), ("train", _TRAIN))
}
"""For each command, other projects' flags -> the flag here, with a value if needed."""


def peer_flag(prog: str, flag: str) -> str | None:
    """Return the flag of the command `prog` that corresponds to another project's, if known."""
    return PEER_FLAGS.get(prog, {}).get(flag.lower().replace("_", "-"))
