"""A whole pipeline of diffusers, read by jaxdiff, makes the same image from the same latents."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxdiff
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.pipelines import lora, textual_inversion
from jaxdiff.pipelines.input_images import InitImage
from jaxdiff.pretrained.diffusers_folder import read_diffusers, write_diffusers

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UP = {CROSS: "CrossAttnUpBlock2D", PLAIN: "UpBlock2D"}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STEPS = 10

SCHEDULERS = {
    "DDIM": diffusers.DDIMScheduler(
        **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    ),
    "PNDM": diffusers.PNDMScheduler(
        **BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
    ),
    "Euler": diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
    "Euler linspace": diffusers.EulerDiscreteScheduler(**BETAS),
    "DPM++ 2M": diffusers.DPMSolverMultistepScheduler(**BETAS),
    "v, zero SNR": diffusers.DDIMScheduler(
        **BETAS,
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ),
}


def text_encoder(tokenizer, width, *, projected):
    vocab = json.loads((tokenizer / "vocab.json").read_text())
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="gelu" if projected else "quick_gelu",
        projection_dim=20,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"] if projected else 2,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config)


def unet(**changes):
    down = changes.pop("down")
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=down,
        up_block_types=tuple(UP[kind] for kind in reversed(down)),
        layers_per_block=1,
        norm_num_groups=8,
        **changes,
    )


def vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )


def stable_diffusion(tokenizer, scheduler):
    torch.manual_seed(0)
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(tokenizer, 32, projected=False),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tokenizer, model_max_length=77),
        unet=unet(
            block_out_channels=(16, 32),
            down=(CROSS, PLAIN),
            attention_head_dim=4,
            cross_attention_dim=32,
        ),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def unet_xl(width, numbers):
    """A U-Net of XL's kind that reads tokens of a width, and so many numbers as conditions."""
    return unet(
        block_out_channels=(16, 32),
        down=(PLAIN, CROSS),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        cross_attention_dim=width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + numbers * 8,
    )


def padded_tokenizer(tokenizer):
    """The tokenizer of XL's second text encoder."""
    return transformers.CLIPTokenizer.from_pretrained(tokenizer, model_max_length=77, pad_token="!")


def stable_diffusion_xl(tokenizer, scheduler):
    torch.manual_seed(0)
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(tokenizer, 32, projected=False),
        text_encoder_2=text_encoder(tokenizer, 24, projected=True),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tokenizer, model_max_length=77),
        tokenizer_2=padded_tokenizer(tokenizer),
        unet=unet_xl(56, 6),
        scheduler=scheduler,
        add_watermarker=False,
    )


def assert_same_image(theirs, folder, *, negative, guidance_scale):
    theirs.save_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    nchw = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
    expected = theirs(
        ["a red pea"],
        negative_prompt=negative and [negative],
        latents=nchw,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        output_type="np",
    ).images
    pipeline = jaxdiff.load(folder)
    found = pipeline(
        ["a red pea"],
        negative_prompt=negative and [negative],
        latents=latents,
        num_steps=STEPS,
        guidance_scale=guidance_scale,
        output="float",
    )
    assert expected.std() > 0.05  # an image with structure
    np.testing.assert_allclose(found, expected, atol=1e-3)


def all_tensors(folder):
    """Return those of all parts; transformers 5 omits a prefix that the published files have."""
    return {
        (path.parent.name, name.removeprefix("text_model.")): value
        for path in folder.glob("*/*.safetensors")
        for name, value in load_file(path).items()
    }


@pytest.mark.parametrize("kind", [stable_diffusion, stable_diffusion_xl])
def test_import_then_export(kind, tokenizer, tmp_path):
    """Every tensor comes back bit for bit, and diffusers samples the same from the folder."""
    theirs = kind(tokenizer, SCHEDULERS["DDIM"])
    theirs.save_pretrained(tmp_path / "theirs")
    read = read_diffusers(tmp_path / "theirs", place=np.asarray)
    write_diffusers(tmp_path / "ours", read)
    before, after = (all_tensors(tmp_path / name) for name in ("theirs", "ours"))
    assert set(before) == set(after)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=str(name))
    again = type(theirs).from_pretrained(tmp_path / "ours", safety_checker=None)
    images = []
    for pipeline in (theirs, again):
        pipeline.set_progress_bar_config(disable=True)
        images.append(
            pipeline(
                "a green pea, a banana",
                num_inference_steps=3,
                generator=torch.Generator().manual_seed(0),
                output_type="np",
            ).images
        )
    np.testing.assert_allclose(*images, atol=1e-5)  # memory layouts differ
    assert read_diffusers(tmp_path / "ours").spec.denoiser == read.spec.denoiser


@pytest.mark.parametrize("name", SCHEDULERS)
def test_stable_diffusion(name, tokenizer, tmp_path):
    theirs = stable_diffusion(tokenizer, SCHEDULERS[name])
    assert_same_image(theirs, tmp_path, negative="a banana", guidance_scale=7.5)


@pytest.mark.parametrize("negative", [None, "a banana"])
def test_stable_diffusion_xl(negative, tokenizer, tmp_path):
    theirs = stable_diffusion_xl(tokenizer, SCHEDULERS["Euler"])
    assert_same_image(theirs, tmp_path, negative=negative, guidance_scale=5.0)


ADAPTED = {
    "diffusers": ("to_q", "to_v", "to_out.0", "ff.net.2", "proj_in", "conv1"),
    "kohya": ("to_k", "to_out.0", "ff.net.0.proj", "proj_out"),
}


def write_random_lora(unet, naming, path):
    """Adapters of several ranks, named as diffusers or as kohya does, the latter with alphas."""
    rng, tensors = np.random.default_rng(len(naming)), {}
    for name, module in unet.named_modules():
        if not name.endswith(ADAPTED[naming]):
            continue
        outputs, inputs, *window = module.weight.shape
        rank = int(rng.integers(2, 5)) if naming == "kohya" else 3
        down = rng.normal(size=(rank, inputs, *window)).astype(np.float32) / inputs
        up = rng.normal(size=(outputs, rank, *[1] * len(window))).astype(np.float32)
        if naming == "kohya":
            name = f"lora_unet_{name.replace('.', '_')}"
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = np.array(1.5, np.float32)
        else:
            tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    assert len(tensors) > 30
    save_file(tensors, path)


def test_lora(tokenizer, tmp_path):
    """Two files at once, each with a scale, change diffusers' U-Net and ours equally."""
    pytest.importorskip("peft")
    theirs = stable_diffusion(tokenizer, SCHEDULERS["DDIM"])
    theirs.save_pretrained(tmp_path / "model")
    scales = {"diffusers": 0.7, "kohya": -0.4}
    for naming in scales:
        write_random_lora(theirs.unet, naming, tmp_path / f"{naming}.safetensors")
    for naming in scales:
        theirs.load_lora_weights(tmp_path, weight_name=f"{naming}.safetensors", adapter_name=naming)
    theirs.set_adapters(list(scales), list(scales.values()))
    ids = Tokenizer.load(str(tokenizer))(["a red pea"])
    x = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    with torch.no_grad():
        tokens = theirs.text_encoder(torch.from_numpy(ids).long())[0]
        expected = theirs.unet(
            torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.tensor(500), tokens
        ).sample.numpy()
    base = jaxdiff.load(tmp_path / "model")

    def predict(pipeline):
        spec = pipeline.spec
        inputs = spec.conditioner.tokenize(pipeline.tokenizers, ["a red pea"])

        @jax.jit
        def run(params, inputs):
            cond = spec.encode_text(params, inputs)
            return spec.predict(params, jnp.asarray(x), jnp.array([0.501]), cond)

        return np.asarray(run(pipeline.params, inputs)).transpose(0, 3, 1, 2)

    def distance(prediction):
        return np.linalg.norm(prediction - expected) / np.linalg.norm(expected)

    assert distance(predict(base)) > 0.1
    for merge in (False, True):
        pipeline = base
        for naming, scale in scales.items():
            file = tmp_path / f"{naming}.safetensors"
            pipeline = lora.apply_lora(pipeline, file, scale=scale, merge=merge)
        assert distance(predict(pipeline)) <= 1e-5


def test_textual_inversion(tokenizer, tmp_path):
    """A word of three tokens, loaded by both, gives the same ids and the same image."""
    theirs = stable_diffusion(tokenizer, SCHEDULERS["DDIM"])
    theirs.save_pretrained(tmp_path / "model")
    theirs.set_progress_bar_config(disable=True)
    width = theirs.text_encoder.config.hidden_size
    rows = np.random.default_rng(0).normal(size=(3, width)).astype(np.float32)
    save_file({"<pea>": rows}, tmp_path / "pea.safetensors")
    theirs.load_textual_inversion(tmp_path, weight_name="pea.safetensors")
    ours = textual_inversion.apply_embedding(
        jaxdiff.load(tmp_path / "model"), tmp_path / "pea.safetensors"
    )
    latents = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    settings = {"num_inference_steps": STEPS, "guidance_scale": 7.5, "output_type": "np"}

    def sample(prompt):
        nchw = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
        return theirs([prompt], latents=nchw, **settings).images

    expected = sample("a red <pea>")
    assert np.abs(expected - sample("a red pea")).max() > 0.01
    found = ours(["a red <pea>"], latents=latents, num_steps=STEPS, output="float")
    np.testing.assert_allclose(found, expected, atol=1e-3)
    write_diffusers(tmp_path / "whole", ours.bundle)
    again = type(theirs).from_pretrained(tmp_path / "whole", safety_checker=None)
    ids = again.tokenizer("a red <pea> <pea>_1 <pea>_2", padding="max_length")["input_ids"]
    np.testing.assert_array_equal(ours.tokenizers["text"](["a red <pea>"])[0], ids)


@pytest.fixture
def from_the_mean(monkeypatch):
    """Remove the posterior's noise from diffusers' autoencoder; return the sampler's noise."""
    gaussian = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution"
    monkeypatch.setattr(f"{gaussian}.sample", lambda self, generator=None: self.mean)
    noise = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    nchw = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    for name in ("img2img", "inpaint"):
        module = f"diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_{name}"
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: nchw)
    return noise


def photograph():
    return np.random.default_rng(1).integers(0, 256, (1, 16, 16, 3), np.uint8)


@pytest.mark.parametrize(("name", "strength"), [("DDIM", 0.6), ("Euler", 0.3), ("DPM++ 2M", 1.0)])
def test_image_to_image(name, strength, tokenizer, from_the_mean, tmp_path):
    plain = stable_diffusion(tokenizer, SCHEDULERS[name])
    plain.save_pretrained(tmp_path)
    theirs = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(plain)
    theirs.set_progress_bar_config(disable=True)
    image = photograph()
    expected = theirs(
        ["a red pea"],
        image=torch.from_numpy(image.transpose(0, 3, 1, 2) / 255).float(),
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=7.5,
        output_type="np",
    ).images
    found = jaxdiff.load(tmp_path)(
        ["a red pea"],
        init=InitImage(image=image, strength=strength),
        latents=from_the_mean,
        num_steps=STEPS,
        guidance_scale=7.5,
        output="float",
    )
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting(channels, tokenizer, from_the_mean, tmp_path):
    """With a plain U-Net, by blending, and with one that reads the mask.

    diffusers returns the kept pixels as the autoencoder decodes them, and jaxdiff as given: the two
    are compared inside the mask alone.
    """
    plain = stable_diffusion(tokenizer, SCHEDULERS["DDIM"])
    if channels == 9:
        config = dict(plain.unet.config) | {"in_channels": 9}
        plain.unet = type(plain.unet).from_config(config)
    theirs = diffusers.StableDiffusionInpaintPipeline(
        **{n: c for n, c in plain.components.items() if n != "image_encoder"},
        requires_safety_checker=False,
    )
    theirs.save_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    image, mask = photograph(), np.zeros((1, 16, 16), np.float32)
    mask[:, 4:12, 6:] = 1
    expected = theirs(
        ["a red pea"],
        image=torch.from_numpy(image.transpose(0, 3, 1, 2) / 255).float(),
        mask_image=torch.from_numpy(mask)[:, None],
        height=16,
        width=16,
        strength=1.0,
        num_inference_steps=STEPS,
        guidance_scale=7.5,
        output_type="np",
    ).images
    found = jaxdiff.load(tmp_path)(
        ["a red pea"],
        init=InitImage(image=image, mask=mask),
        latents=from_the_mean,
        num_steps=STEPS,
        guidance_scale=7.5,
        output="float",
    )
    inside = mask > 0
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-3)
    np.testing.assert_array_equal(np.rint(found[~inside] * 255), image[~inside])


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [("a red pea", None), ("a red pea", ""), ("", None), ("", "a banana"), (" ", "a banana")],
)
def test_only_an_absent_negative_prompt_is_zeros(prompt, negative, tokenizer, tmp_path):
    theirs = stable_diffusion_xl(tokenizer, SCHEDULERS["Euler"])
    theirs.save_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    expected = theirs(
        [prompt],
        negative_prompt=None if negative is None else [negative],
        latents=torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()),
        num_inference_steps=2,
        guidance_scale=5.0,
        output_type="np",
    ).images
    found = jaxdiff.load(tmp_path)(
        [prompt],
        negative_prompt=None if negative is None else [negative],
        latents=latents,
        num_steps=2,
        guidance_scale=5.0,
        output="float",
    )
    np.testing.assert_allclose(found, expected, atol=1e-3)


NEW_WORDS = [
    ([("Pix", 1)], ["a pix pea", "PIX, Pix", "(pix)", "pix's"]),
    ([("pix", 2)], ["a <pix> pea", "pix,pix", "a pix pea, pix"]),
    ([("<cat-toy>", 3)], ["a <cat-toy> pea", "<cat-toy><cat-toy>", "a<cat-toy>b"]),
    ([("<b>", 1), ("<a>", 2)], ["<a> <b>", "<b><a>"]),
    ([("EasyNegative", 1), ("EasyNegativeV2", 1)], ["a EasyNegativeV2, EasyNegative"]),
    ([("ng_deepnegative_v1_75t", 2)], ["ng_deepnegative_v1_75t, a pea"]),
    ([("bad-hands-5", 2)], ["a pea, bad-hands-5"]),
    ([("1234", 1)], ["1234", "1 1234"]),
    ([("\u8c46", 1)], ["a \u8c46 pea"]),
    ([("pea", 1)], ["a pea", "pea pea"]),
]


@pytest.mark.parametrize(("words", "prompts"), NEW_WORDS, ids=lambda x: str(x[0])[:20])
def test_added_tokens_are_matched_as_diffusers_does(words, prompts, tokenizer, tmp_path):
    theirs = stable_diffusion(tokenizer, SCHEDULERS["DDIM"])
    theirs.save_pretrained(tmp_path)
    ours = jaxdiff.load(tmp_path)
    for i, (word, count) in enumerate(words):
        rows = np.random.default_rng(i).normal(size=(count, 32)).astype(np.float32)
        save_file({"emb_params": rows}, tmp_path / f"{i}.safetensors")
        theirs.load_textual_inversion(tmp_path, weight_name=f"{i}.safetensors", token=word)
        ours = textual_inversion.apply_embedding(ours, tmp_path / f"{i}.safetensors", word=word)
    for prompt in prompts:
        spelt = theirs.maybe_convert_prompt(prompt, theirs.tokenizer)
        expected = theirs.tokenizer(spelt, padding="max_length", max_length=77, truncation=True)
        found = ours.bundle.tokenizers["text"]([prompt])[0]
        np.testing.assert_array_equal(found, expected.input_ids, err_msg=prompt)
