"""What the adapter promises for every family of diffusers' flow-matching pipelines, on tiny random ones.

    python -m pytest -q adapters/test_any_pipeline.py   # about three minutes on one CPU core; needs peft as well

Seen to train through the command line (diffusers 0.42): the families of FAMILIES, below.  SD3 PAG, Sana PAG, Chroma,
HunyuanImage (unguided) and Lumina-Next do so without gradient checkpointing; HiDream draws one area alone, whatever
--resolution is.  Kandinsky5 (1024 pixels alone) was seen to, in the same four tests, and takes too long for this file.
No LoRA loader in diffusers: NO_LORA_LOADER, HunyuanImage, Sana PAG.  Refused: Mochi (its own noise levels), Cosmos 2,
Ideogram 4 (two models), PRXPixel (no latents), Ernie, OmniGen, Qwen-Image 2.1, Sana Sprint, image-to-image.
"""

import dataclasses
import functools
import inspect
import json
import math
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from adapters.any_pipeline import AnyPipeline, shift_of  # noqa: E402
from dgpo import SD3, Config, load_model, main, ode_sigmas, sample_ode, shift_time  # noqa: E402
from rewards import UserError, blame  # noqa: E402

torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()
transformers.logging.set_verbosity_error()

MODEL = Path(__file__).resolve().parent.parent / "shapes/model"
PROMPTS = ["a red circle", "three squares and a star", "Ring?"]


def seed(number):
    return torch.Generator().manual_seed(number)


# ------------------------------------------------------------------------------------------------
# TINY PIPELINES: every part of the real ones, text encoders and tokenizers too, with random weights
# ------------------------------------------------------------------------------------------------


def letters():
    """A tokenizer of single characters with a chat template."""
    special = ["<pad>", "<eos>", "<user>", "<assistant>"]
    vocabulary = {token: i for i, token in enumerate([*special, *map(chr, range(32, 127)), "\n"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
                                                additional_special_tokens=special[2:], model_max_length=40)
    fast.chat_template = "{% for m in messages %}<user>{{ m.content }}{% endfor %}<assistant>"
    return fast


def clip(name="CLIPTextModelWithProjection"):
    return getattr(transformers, name)(transformers.CLIPTextConfig(
        vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, projection_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=0))


def t5(name="T5", width=16):
    config = getattr(transformers, name + "Config")(vocab_size=100, d_model=width, d_kv=8, d_ff=16, num_layers=1,
                                                    num_heads=2)
    return getattr(transformers, name + "EncoderModel")(config)


def language_model(name, layers=2, vocab_size=100, **settings):
    config = getattr(transformers, name.removesuffix("ForCausalLM").removesuffix("Model") + "Config")
    return getattr(transformers, name)(config(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=None, eos_token_id=1, **settings))


def qwen_vl():
    text = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": 1,
            "pad_token_id": 0, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
              "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [0]}
    return transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=5, video_token_id=6, vision_start_token_id=3,
        vision_end_token_id=4))


def qwen3_vl(name, layers=2):
    text = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": layers, "head_dim": 8,
            "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": 1,
            "pad_token_id": 0, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
              "patch_size": 4, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return getattr(transformers, name)(transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=5, video_token_id=6, vision_start_token_id=3,
        vision_end_token_id=4))


def vae(name="AutoencoderKL", **settings):
    if name in ("AutoencoderKLQwenImage", "AutoencoderKLWan"):
        settings = dict(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_std=[1.0, 2.0, 0.5, 1.5],
                        temperal_downsample=[False, True, True], latents_mean=[0.1, -0.1, 0.2, 0.0], **settings)
    elif name == "AutoencoderDC":
        settings = dict(latent_channels=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), attention_head_dim=4,
                        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()), scaling_factor=0.5)
    else:
        levels = settings.pop("levels", 2)
        settings = dict(block_out_channels=(8,) * levels, down_block_types=("DownEncoderBlock2D",) * levels,
                        up_block_types=("UpDecoderBlock2D",) * levels, layers_per_block=1, norm_num_groups=4,
                        latent_channels=4) | settings
        if name == "AutoencoderKL":
            settings = dict(scaling_factor=1.5, shift_factor=0.1) | settings
    return getattr(diffusers, name)(**settings)


def model(name, **settings):
    """A transformer; most families name its size alike, and what one lacks is left out."""
    known = dict(num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
                 axes_dims_rope=(2, 2, 4))
    transformer = getattr(diffusers, name)
    takes = inspect.signature(transformer.__init__).parameters
    return transformer(**{key: value for key, value in known.items() if key in takes} | settings)


def pipeline(name, transformer, scheduler, encoders, **settings):
    """A pipeline with one tokenizer for each text encoder, numbered as diffusers does."""
    parts = {"transformer": transformer, "scheduler": scheduler, "vae": settings.pop("vae", None) or vae(), **settings}
    for number, encoder in enumerate(encoders, 1):
        ending = f"_{number}" if number > 1 else ""
        parts |= {"text_encoder" + ending: encoder, "tokenizer" + ending: letters()}
    return getattr(diffusers, name)(**parts)


def euler(shift=3.0, **settings):
    return FlowMatchEulerDiscreteScheduler(shift=shift, **settings)


def dynamic(**settings):
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, **settings)


def flow_solver(name):
    """Of order one, these solvers are Euler's; their timesteps are whole numbers."""
    corrector = {"disable_corrector": list(range(20))} if name == "UniPCMultistepScheduler" else {}
    return getattr(diffusers, name)(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0,
                                    solver_order=1, **corrector)


def flux(guidance_embeds=True):
    return pipeline("FluxPipeline", model("FluxTransformer2DModel", in_channels=16, pooled_projection_dim=16,
                                          guidance_embeds=guidance_embeds), dynamic(), [clip("CLIPTextModel"), t5()])


def sana(scheduler):
    return pipeline("SanaPipeline", model(
        "SanaTransformer2DModel", in_channels=4, out_channels=4, num_cross_attention_heads=2, sample_size=8,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16), scheduler,
        [language_model("Gemma2Model", query_pre_attn_scalar=8)], vae=vae("AutoencoderDC"))


def wan(scheduler, **settings):
    return pipeline("WanPipeline", model(
        "WanTransformer3DModel", attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=16, rope_max_seq_len=32), scheduler, [t5("UMT5")], vae=vae("AutoencoderKLWan"), **settings)


def sd3():
    return pipeline("StableDiffusion3Pipeline", model(
        "SD3Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, num_layers=2, joint_attention_dim=32,
        caption_projection_dim=16, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=32, qk_norm="rms_norm",
        dual_attention_layers=(0,)), euler(), [clip(), clip(), t5(width=32)])


# The four steps of a schedule before its time shift; None: this one is not of that form.
GRIDS = {"1/n": [1, 3 / 4, 2 / 4, 1 / 4], "CogView4": [1, 0.667, 0.334, 0.001], "stretched": None, "SD3": None,
         "DPM": [0.999 * k / 4 for k in (4, 3, 2, 1)], "UniPC": [1 - 0.999 * k / 4 for k in range(4)]}


@dataclasses.dataclass
class Family:
    """How to build a tiny pipeline, and what is known of the family: its resolution here, its names and its grid."""

    build: callable
    scale: str = "guidance_scale"   # what its __call__ takes guidance as
    off: float = 1.0                # the value that switches guidance off
    grid: str = "1/n"               # one of GRIDS
    resolution: int = 16


FAMILIES = {
    "SD3": Family(sd3, grid="SD3"),
    "FLUX.1": Family(flux),
    "FLUX.1, true guidance": Family(functools.partial(flux, False), scale="true_cfg_scale"),
    "Flux2 Klein": Family(lambda: pipeline("Flux2KleinPipeline", model(
        "Flux2Transformer2DModel", in_channels=16, joint_attention_dim=48, timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False), dynamic(), [language_model("Qwen3ForCausalLM", layers=28)],
        vae=vae("AutoencoderKLFlux2", sample_size=16))),
    "Qwen-Image": Family(lambda: pipeline("QwenImagePipeline", model(
        "QwenImageTransformer2DModel", in_channels=16, out_channels=4), dynamic(shift_terminal=0.02), [qwen_vl()],
        vae=vae("AutoencoderKLQwenImage")), scale="true_cfg_scale", grid="stretched", resolution=32),
    "Z-Image": Family(lambda: pipeline("ZImagePipeline", model(
        "ZImageTransformer2DModel", in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, axes_dims=[2, 2, 4], axes_lens=[256, 32, 32]), euler(), [language_model("Qwen3Model")]),
        off=0.0),
    "Sana": Family(lambda: sana(euler()), grid="SD3", resolution=32),
    "Sana, DPM-Solver++": Family(lambda: sana(flow_solver("DPMSolverMultistepScheduler")), grid="DPM", resolution=32),
    "Lumina2": Family(lambda: pipeline("Lumina2Pipeline", model(
        "Lumina2Transformer2DModel", sample_size=8, in_channels=4, hidden_size=16, num_refiner_layers=1, num_kv_heads=1,
        multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(300, 32, 32), cap_feat_dim=16), euler(6.0),
        [language_model("Gemma2Model", query_pre_attn_scalar=8)], vae=vae(levels=4)), resolution=32),
    "AuraFlow": Family(lambda: pipeline("AuraFlowPipeline", model(
        "AuraFlowTransformer2DModel", sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        caption_projection_dim=16, pos_embed_max_size=64), euler(1.73), [t5("UMT5")], vae=vae(shift_factor=None)),
        grid="SD3"),
    "Chroma": Family(lambda: pipeline("ChromaPipeline", model(
        "ChromaTransformer2DModel", in_channels=16, approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1), dynamic(), [t5()])),
    "CogView4": Family(lambda: pipeline("CogView4Pipeline", model(
        "CogView4Transformer2DModel", in_channels=4, out_channels=4, text_embed_dim=16, time_embed_dim=16,
        condition_dim=8, pos_embed_max_size=16, sample_size=8, rope_axes_dim=(16, 16)),
        dynamic(time_shift_type="linear"), [language_model("GlmModel")]), grid="CogView4"),
    "Wan": Family(lambda: wan(euler()), grid="SD3", resolution=32),
    "Wan, UniPC": Family(lambda: wan(flow_solver("UniPCMultistepScheduler")), grid="UniPC", resolution=32),
    # Not thought of when the adapter was written:
    "Flux2": Family(lambda: pipeline("Flux2Pipeline", model(
        "Flux2Transformer2DModel", in_channels=16, joint_attention_dim=48, timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2)), dynamic(), [language_model("MistralModel", layers=30)],
        vae=vae("AutoencoderKLFlux2", sample_size=16))),
    "HiDream": Family(lambda: pipeline("HiDreamImagePipeline", model(
        "HiDreamImageTransformer2DModel", patch_size=16, in_channels=4, out_channels=4, caption_channels=[16, 16],
        text_emb_dim=32, num_routed_experts=2, num_activated_experts=1, max_resolution=(128, 128), llama_layers=[0, 1]),
        euler(), [clip(), clip(), t5(), language_model("LlamaForCausalLM")], vae=vae(
            levels=1, mid_block_add_attention=False)), grid="SD3", resolution=128),   # the only one that it draws
    "Bria": Family(lambda: pipeline("BriaPipeline", model("BriaTransformer2DModel", in_channels=16), dynamic(), [t5()],
                                    image_encoder=None, feature_extractor=None)),
    "FIBO": Family(lambda: pipeline("BriaFiboPipeline", model(
        "BriaFiboTransformer2DModel", in_channels=4, joint_attention_dim=32, text_encoder_dim=16), dynamic(),
        [language_model("SmolLM3ForCausalLM", vocab_size=128001)],
        vae=vae("AutoencoderKLWan", in_channels=12, out_channels=12, patch_size=2)), resolution=32),
    "Krea2": Family(lambda: pipeline("Krea2Pipeline", model(
        "Krea2Transformer2DModel", in_channels=16, num_key_value_heads=1, intermediate_size=16, timestep_embed_dim=16,
        text_hidden_dim=16, num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=1,
        text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2)),
        dynamic(), [qwen3_vl("Qwen3VLModel")], vae=vae("AutoencoderKLQwenImage"), text_encoder_select_layers=(1, 2)),
        off=0.0, resolution=32),
    "LongCat": Family(lambda: pipeline("LongCatImagePipeline", model(
        "LongCatImageTransformer2DModel", in_channels=64, pooled_projection_dim=16), dynamic(), [qwen_vl()],
        vae=vae(latent_channels=16), text_processor=letters())),
    "HunyuanVideo, one frame": Family(lambda: pipeline("HunyuanVideoPipeline", model(
        "HunyuanVideoTransformer3DModel", in_channels=4, out_channels=4, num_refiner_layers=1, mlp_ratio=1.0,
        text_embed_dim=16, pooled_projection_dim=16, rope_axes_dim=(2, 2, 4)), euler(7.0),
        [language_model("LlamaModel", layers=3), clip("CLIPTextModel")], vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4,
            mid_block_add_attention=False)), resolution=32),
    "Z-Image Omni": Family(lambda: pipeline("ZImageOmniPipeline", model(
        "ZImageTransformer2DModel", in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, siglip_feat_dim=16, axes_dims=[2, 2, 4], axes_lens=[256, 32, 32]), euler(),
        [language_model("Qwen3Model")], siglip_processor=transformers.Siglip2ImageProcessorPil(),
        siglip=transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_patches=16,
            patch_size=4))), off=0.0),
    "Nucleus": Family(lambda: pipeline("NucleusMoEImagePipeline", model(
        "NucleusMoEImageTransformer2DModel", in_channels=16, out_channels=4, num_experts=2, moe_intermediate_dim=16,
        axes_dims_rope=(4, 2, 2), mlp_ratio=1.0, num_layers=2), dynamic(), [], vae=vae("AutoencoderKLQwenImage"),
        text_encoder=qwen3_vl("Qwen3VLForConditionalGeneration", 8), processor=letters()), resolution=32),
    "Ovis-Image": Family(lambda: pipeline("OvisImagePipeline", model(
        "OvisImageTransformer2DModel", in_channels=16, out_channels=16), dynamic(), [language_model("Qwen3Model")])),
    "Lumina-Next": Family(lambda: pipeline("LuminaPipeline", model(
        "LuminaNextDiT2DModel", sample_size=8, in_channels=4, hidden_size=16, num_kv_heads=1, multiple_of=16,
        cross_attention_dim=16), euler(1.0), [language_model("Gemma2Model", query_pre_attn_scalar=8)],
        vae=vae(levels=4, shift_factor=None)), grid="SD3", resolution=32),
    "LTX, one frame": Family(lambda: pipeline("LTXPipeline", model(
        "LTXVideoTransformer3DModel", in_channels=8, out_channels=8, cross_attention_dim=16, caption_channels=16),
        dynamic(), [t5()], vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
            layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5)), resolution=64)}
NO_LORA_LOADER = {"Bria", "LongCat", "Nucleus", "Ovis-Image", "Lumina-Next"}


def randomized(pipe, number=0):
    """Weights that matter everywhere: as drawn, many models are close to the identity, or zero at their ends."""
    generator = seed(number)
    for part in pipe.components.values():
        for weight in part.eval().parameters() if isinstance(part, nn.Module) else ():
            if weight.ndim > 1 or not weight.any():
                weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    return pipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name of a family -> its pipeline's folder, written when it is first asked for."""
    @functools.cache
    def folder(name):
        path = tmp_path_factory.mktemp("pipeline")
        torch.manual_seed(0)   # for what `randomized` leaves as drawn: no test is to depend on those before it
        randomized(FAMILIES[name].build()).save_pretrained(path)
        return path
    return folder


def load(folder, dtype=torch.float32):
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype={"default": dtype, "vae": torch.float32})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def adapt(folder, family="SD3", dtype=torch.float32, **settings):
    """The adapter on a freshly loaded pipeline."""
    settings = dict(prompt_file="", device="cpu", lora_rank=4, max_sequence_length=0,
                    resolution=FAMILIES[family].resolution, num_inference_steps=4,
                    dtype=str(dtype).removeprefix("torch.")) | settings
    return AnyPipeline(load(folder, dtype), Config(**settings))


def randomize(model, policy="ema"):
    """Give a policy LoRA weights that matter; fresh ones are the identity."""
    generator = seed(5)
    with torch.no_grad():
        for weight in model.lora.weights(policy):
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))


def own_call(pipe, family, prompt, guidance_scale, steps=4):
    """The family's own way to a picture: (starting noise, latents after each step, picture, sigmas)."""
    noise, ends, prepare, step = [], [], pipe.prepare_latents, pipe.scheduler.step

    def see_noise(*args, **kwargs):
        prepared = prepare(*args, **kwargs)
        noise.append(prepared[0] if isinstance(prepared, tuple) else prepared)
        return prepared

    def see_end(*args, **kwargs):
        ends.append(step(*args, **kwargs))
        return ends[-1]

    pipe.prepare_latents, pipe.scheduler.step = see_noise, see_end
    guided = guidance_scale > 1 and not pipe.transformer.config.get("guidance_embeds")
    wanted = {"prompt": prompt, "height": family.resolution, "width": family.resolution, "num_frames": 1,
              family.scale: guidance_scale if guidance_scale > 1 else family.off, "output_type": "pil",
              "num_inference_steps": steps, "use_resolution_binning": False, "generator": seed(7),
              "enable_prompt_rewrite": False,
              **({"negative_prompt": ""} if guided else {})}
    takes = inspect.signature(type(pipe).__call__).parameters
    picture = pipe(**{name: value for name, value in wanted.items() if name in takes})[0][0]
    picture = picture[0] if isinstance(picture, list) else picture   # a list: a video of one frame
    del pipe.prepare_latents, pipe.scheduler.step
    return noise[0], [end[0] for end in ends], picture, pipe.scheduler.sigmas


def assert_same_picture(ours, theirs):
    ours, theirs = np.asarray(ours).astype(int), np.asarray(theirs).astype(int)
    assert theirs.std() > 2 and abs(ours - theirs).max() <= 1


# ------------------------------------------------------------------------------------------------
# EVERY FAMILY
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_eulers_steps_on_our_velocities_are_the_pipelines_own_call(name, folders):
    family, model = FAMILIES[name], adapt(folders(name), name, guidance_scale=3.0)
    ends = []
    for guidance_scale in (1.0, 3.0):
        model.config.guidance_scale = guidance_scale   # which a distilled model is given in updates, too
        noise, steps, picture, sigmas = own_call(load(folders(name)), family, PROMPTS[0], guidance_scale)
        assert noise.shape[1:] == model.latent_shape
        with torch.no_grad():
            ours = sample_ode(lambda x, sigma, scale=guidance_scale: model.velocity(
                x, sigma, PROMPTS[:1], "frozen", scale), noise.float(), sigmas)
        torch.testing.assert_close(ours, steps[-1].float(), rtol=1e-5, atol=1e-5)
        assert_same_picture(model.decode(ours)[0], picture)
        ends.append(ours)
        times = GRIDS[family.grid]
        if family.grid == "SD3":   # it goes through the shift twice
            torch.testing.assert_close(sigmas, ode_sigmas(4, model.shift), rtol=1e-5, atol=1e-5)
        elif times is not None:
            shifted = shift_time(torch.tensor(times), model.shift)
            torch.testing.assert_close(sigmas[:-1].float(), shifted, rtol=1e-5, atol=1e-5)
    assert (ends[0] - ends[1]).abs().max() > 1e-3   # guidance does something


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_is_its_samples_one_by_one_and_gradients_reach_the_lora(name, folders):
    model = adapt(folders(name), name)
    prompts, sigmas = [PROMPTS[i] for i in (0, 1, 1, 1, 0, 2)], torch.tensor([0.5, 0.5, 0.5, 0.9, 0.9, 0.3])
    x = torch.randn(6, *model.latent_shape, generator=seed(1))
    randomize(model, "current")
    before = [t.clone() for t in model.transformer.parameters()]
    for guidance_scale in (1.0, 3.0):
        together = model.velocity(x, sigmas, prompts, "current", guidance_scale)
        alone = torch.cat([model.velocity(x[i:i + 1], sigmas[i], prompts[i:i + 1], "current", guidance_scale)
                           for i in range(6)])
        assert together.dtype == torch.float32 and together.shape == x.shape
        assert (together - alone).norm() < 1e-4 * alone.norm()
        together.square().mean().backward()
    reached = [t.grad is not None and bool(t.grad.any()) for t in model.lora.weights("current")]
    # The last block's text branch ends nowhere: a few layers have no use.
    assert len(reached) >= 8 and sum(reached) > 0.7 * len(reached)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.transformer.parameters()))
    base = model.velocity(x, sigmas, prompts, "frozen")
    assert (model.velocity(x, sigmas, prompts, "current") - base).norm() > 0.01 * base.norm()
    torch.testing.assert_close(model.velocity(x, 0.5, prompts, "frozen")[:3], base[:3])   # sigma may be one number


@pytest.mark.parametrize("name", FAMILIES)
def test_the_exported_lora_draws_the_same_with_diffusers_alone(name, folders, tmp_path):
    plain, model = load(folders(name)), adapt(folders(name), name)
    assert hasattr(plain, "load_lora_weights") == (name not in NO_LORA_LOADER)
    if name in NO_LORA_LOADER:
        pytest.skip("diffusers has no load_lora_weights for this family")
    randomize(model)
    model.lora.export(tmp_path, 1)
    plain.load_lora_weights(tmp_path)
    noise, steps, picture, sigmas = own_call(plain, FAMILIES[name], PROMPTS[1], 1.0)
    with torch.no_grad():
        ours = sample_ode(lambda x, sigma: model.velocity(x, sigma, PROMPTS[1:2], "ema"), noise.float(), sigmas)
        base = sample_ode(lambda x, sigma: model.velocity(x, sigma, PROMPTS[1:2], "frozen"), noise.float(), sigmas)
    assert (ours - steps[-1]).norm() < 1e-3 * base.norm() < 1e-1 * (ours - base).norm()
    assert_same_picture(model.decode(ours)[0], picture)


# ------------------------------------------------------------------------------------------------
# WHAT THE LOOP EXPECTS
# ------------------------------------------------------------------------------------------------


def test_sd3_through_the_adapter_is_dgpos_own_sd3():
    config = Config(prompt_file="", device="cpu", max_sequence_length=1)
    parts = {"text_encoder_3": None, "tokenizer_3": None}
    ours, theirs = (kind(diffusers.StableDiffusion3Pipeline.from_pretrained(MODEL, **parts), config)
                    for kind in (AnyPipeline, SD3))
    assert (ours.latent_shape, ours.device) == (theirs.latent_shape, theirs.device)
    assert ours.shift == pytest.approx(theirs.shift, rel=1e-5)
    assert list(ours.lora.layers) == list(theirs.lora.layers)
    for each in (ours, theirs):
        randomize(each, "current")
    prompts = ["a red circle", "a red circle", "three squares", "a red circle"]
    theirs.encode(prompts)
    x, sigmas = torch.randn(4, *ours.latent_shape, generator=seed(2)), torch.tensor([1.0, 0.7, 0.7, 0.2])
    for sigma in (sigmas, 0.4, torch.tensor(0.4)):
        for policy, scale in (("frozen", 1.0), ("current", 1.0), ("current", 0.0), ("current", 4.5)):
            torch.testing.assert_close(ours.velocity(x, sigma, prompts, policy, scale),
                                       theirs.velocity(x, sigma, prompts, policy, scale), rtol=1e-4, atol=1e-4)
    for a, b in zip(ours.decode(x), theirs.decode(x), strict=True):
        assert_same_picture(a, b)


@pytest.mark.parametrize("name", ["SD3", "FLUX.1, true guidance", "Qwen-Image"])
def test_a_prompt_is_encoded_once_and_the_encoders_are_not_needed_afterwards(name, folders):
    model, seen = adapt(folders(name), name), []
    model.encoders[0].register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(2, *model.latent_shape)
    model.encode(PROMPTS)
    assert len(seen) == 3 and set(model.texts) == set(PROMPTS)
    model.velocity(x, 0.5, PROMPTS[:2], "frozen", 3.0)   # asked for guidance, it encodes all for it
    assert len(seen) == 9 and set(model.texts) == set(PROMPTS)
    model.encoders.to("meta")
    for scale in (1.0, 3.0):
        model.velocity(x, 0.5, PROMPTS[1:], "frozen", scale)
    model.decode(x)
    assert model.pipe._execution_device == model.device and len(seen) == 9
    model.encode(PROMPTS[:1])
    assert set(model.texts) == set(PROMPTS[:1])


@pytest.mark.parametrize("offload", [False, True])
def test_encoders_and_vae_leave_the_device_only_when_told_to(folders, offload):
    model = adapt(folders("LongCat"), "LongCat", offload=offload)
    assert model.rest == (torch.device("cpu") if offload else model.device)
    model.rest = torch.device("meta")   # where one sees that they are sent there after use
    text = model.texts[""][False][0][0]
    model.encode(["", "a star"])
    model.decode(torch.randn(1, *model.latent_shape))
    assert all(t.is_meta for part in (model.encoders, model.vae) for t in part.parameters())
    assert model.texts[""][False][0][0] is text and text.device == model.device   # remembered as it was
    assert model.pipe.device == model.device
    assert model.velocity(torch.randn(1, *model.latent_shape), 0.5, ["a star"], "frozen").isfinite().all()


@pytest.mark.parametrize("name", ["SD3", "FLUX.1", "Qwen-Image", "Z-Image", "Wan"])
def test_a_bfloat16_model_takes_the_steps_of_its_own_call_and_its_pictures_are_float32s(name, folders):
    plain = load(folders(name), torch.bfloat16)
    plain.vae.to(torch.bfloat16)   # many pipelines cannot do with one in float32; the adapter's can
    noise, steps, _, sigmas = own_call(plain, FAMILIES[name], PROMPTS[0], 1.0)
    model = adapt(folders(name), name, torch.bfloat16)
    assert model.transformer.dtype == torch.bfloat16 and model.vae.dtype == torch.float32
    velocity = model.velocity(noise.float(), sigmas[0], PROMPTS[:1], "frozen")
    assert velocity.dtype == torch.float32
    assert (noise + (sigmas[1] - sigmas[0]) * velocity - steps[0]).norm() < 0.01 * velocity.norm()
    assert_same_picture(model.decode(noise.float())[0], adapt(folders(name), name).decode(noise.float())[0])
    assert AnyPipeline(plain, model.config).vae.dtype == torch.float32


@pytest.mark.parametrize("name", ["SD3", "Flux2 Klein", "Sana", "Z-Image"])
def test_gradient_checkpointing_leaves_the_gradients_as_they_are(name, folders):
    gradients = []
    for checkpointing in (False, True):
        model = adapt(folders(name), name, gradient_checkpointing=checkpointing)
        randomize(model, "current")
        x = torch.randn(2, *model.latent_shape, generator=seed(4))
        model.velocity(x, 0.5, PROMPTS[:2], "current").square().mean().backward()
        gradients.append([t.grad for t in model.lora.weights("current") if t.grad is not None])
        assert model.transformer.gradient_checkpointing == checkpointing
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, build", [
    ("SD3 PAG", lambda: other("StableDiffusion3PAGPipeline", sd3())),
    ("Sana PAG", lambda: other("SanaPAGPipeline", FAMILIES["Sana"].build())),
    ("HunyuanImage", lambda: hunyuan_image()), ("Chroma", FAMILIES["Chroma"].build),   # whose velocity is another one
    ("Lumina-Next", FAMILIES["Lumina-Next"].build)])
def test_gradient_checkpointing_that_does_not_work_is_left_off_in_a_sentence(name, build, capsys):
    torch.manual_seed(0)
    config = Config(prompt_file="", device="cpu", lora_rank=4, max_sequence_length=0, resolution=32,
                    num_inference_steps=4, gradient_checkpointing=True)
    model = AnyPipeline(randomized(build()), config)
    assert capsys.readouterr().out.count("\n") == 1 and not getattr(model.transformer, "gradient_checkpointing", False)
    randomize(model, "current")
    x = torch.randn(2, *model.latent_shape, generator=seed(4))
    with torch.no_grad():
        without = model.velocity(x, 0.5, ["a", "b"], "current")
    velocity = model.velocity(x, 0.5, ["a", "b"], "current")
    torch.testing.assert_close(velocity, without, rtol=1e-5, atol=1e-5)
    velocity.square().mean().backward()
    assert any(t.grad is not None and t.grad.any() for t in model.lora.weights("current"))


def test_hidreams_experts_pass_gradients_on(folders):
    model = adapt(folders("HiDream"), "HiDream")
    randomize(model, "current")
    x, lora = torch.randn(1, *model.latent_shape, generator=seed(4)), model.lora.weights("current")
    step = [torch.randn(t.shape, generator=seed(i)) for i, t in enumerate(lora)]

    def loss(length):
        torch._foreach_add_(lora, step, alpha=length)
        value = model.velocity(x, 0.5, PROMPTS[:1], "current").square().sum().item()
        torch._foreach_sub_(lora, step, alpha=length)
        return value

    model.velocity(x, 0.5, PROMPTS[:1], "current").square().sum().backward()
    slope = sum((t.grad * d).sum().item() for t, d in zip(lora, step) if t.grad is not None)
    with torch.no_grad():
        assert slope == pytest.approx((loss(1e-3) - loss(-1e-3)) / 2e-3, rel=0.01)


def test_a_distilled_models_guidance_is_an_input_and_the_rollouts_in_updates_too(folders):
    model, x = adapt(folders("FLUX.1"), "FLUX.1", guidance_scale=3.5), torch.randn(1, 16, 16, generator=seed(4))
    with torch.no_grad():   # updates ask for the scale 1, which is not what the images were drawn with
        updates, rollouts, other = (model.velocity(x, 0.5, PROMPTS[:1], "frozen", scale) for scale in (1.0, 3.5, 5.0))
    assert torch.equal(updates, rollouts) and not torch.equal(updates, other)


def test_the_length_of_texts_may_be_chosen(folders):
    for tokens in (0, 24):
        model = adapt(folders("FLUX.1"), "FLUX.1", max_sequence_length=tokens)
        assert model.texts[""][False][0][0].shape == (1, tokens or 512, 16)


# ------------------------------------------------------------------------------------------------
# WHAT DOES NOT FIT, AND WHY
# ------------------------------------------------------------------------------------------------


def other(name, pipe, **settings):
    """The parts of one pipeline in another class."""
    takes = inspect.signature(getattr(diffusers, name).__init__).parameters
    return getattr(diffusers, name)(**{key: part for key, part in pipe.components.items() if key in takes}, **settings)


def without_attention():
    pipe = flux()
    for block in [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]:
        block.attn = nn.Identity()
    return pipe


def with_unet():
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), norm_num_groups=4, cross_attention_dim=16)
    return diffusers.StableDiffusionPipeline(vae(), clip("CLIPTextModel"), letters(), unet, euler(), None, None)


def without_text():
    transformer = diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1,
                                                  sample_size=8, norm_num_groups=4)
    return diffusers.DiTPipeline(transformer, vae(), euler())


def ernie():
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=16, num_attention_heads=2, num_layers=1, ffn_hidden_size=16, in_channels=16, out_channels=16,
        text_in_dim=16, rope_axes_dim=(4, 2, 2))
    return diffusers.ErnieImagePipeline(transformer, vae("AutoencoderKLFlux2"), language_model("Qwen3Model"), letters(),
                                        euler())


def hunyuan_image(**settings):
    return pipeline("HunyuanImagePipeline", model(
        "HunyuanImageTransformer2DModel", in_channels=4, out_channels=4, num_refiner_layers=1, mlp_ratio=1.0,
        text_embed_dim=16, text_embed_2_dim=16, rope_axes_dim=(4, 4)), euler(5.0), [qwen_vl(), t5()],
        vae=diffusers.AutoencoderKLHunyuanImage(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1,
            spatial_compression_ratio=2, sample_size=16, scaling_factor=0.7, downsample_match_channel=False,
            upsample_match_channel=False), **settings)


def rescheduled(scheduler):
    pipe = sd3()
    pipe.register_modules(scheduler=scheduler)
    return pipe


class LoudNoise(diffusers.StableDiffusion3Pipeline):
    def prepare_latents(self, *args, **kwargs):
        return 3 * super().prepare_latents(*args, **kwargs)


class Film(diffusers.WanPipeline):
    def __call__(self, prompt, height, width, num_inference_steps, num_videos_per_prompt, generator, output_type,
                 guidance_scale=1.0):
        return inspect.unwrap(diffusers.WanPipeline.__call__)(
            self, prompt, None, height, width, 5, num_inference_steps, guidance_scale, None, num_videos_per_prompt,
            generator, output_type=output_type)


class Cached(diffusers.StableDiffusion3Pipeline):
    def __call__(self, prompt, use_kv_cache=True):
        raise NotImplementedError


class Draws(diffusers.StableDiffusion3Pipeline):
    """One that draws what it likes: 32 pixels."""
    def __call__(self, prompt, height, width, *args, **kwargs):
        return inspect.unwrap(diffusers.StableDiffusion3Pipeline.__call__)(self, prompt, None, None, 32, 32, *args,
                                                                           **kwargs)


def cosmos2():
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, mlp_ratio=2,
        text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2))
    return diffusers.Cosmos2TextToImagePipeline(t5(), letters(), transformer, vae("AutoencoderKLWan"), euler(), object)


def mochi(**settings):
    return pipeline("MochiPipeline", model(
        "MochiTransformer3DModel", in_channels=12, pooled_projection_dim=16, text_embed_dim=16, time_embed_dim=16),
        FlowMatchEulerDiscreteScheduler(**settings), [t5()], vae=diffusers.AutoencoderKLMochi(
            encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, latent_channels=12,
            layers_per_block=(1,) * 5))


REFUSALS = {
    "no transformer": (with_unet, {}, "it has no transformer: wanted is a text-to-image pipeline that has one"),
    "no encode_prompt": (without_text, {}, "it has no encode_prompt: wanted is a text-to-image pipeline"),
    "no prepare_latents": (ernie, {}, "it has no prepare_latents: wanted is a text-to-image pipeline"),
    "no VAE": (lambda: other("PRXPixelPipeline", diffusers.PRXPixelPipeline(
        diffusers.PRXTransformer2DModel(in_channels=3, context_in_dim=16, hidden_size=16, num_heads=2, depth=1,
                                        axes_dim=[4, 4]), euler(), t5(), letters())), {},
        "it has no VAE: wanted is a model of latents, not of pixels"),
    "another kind of diffusion": (lambda: rescheduled(diffusers.DDPMScheduler()), {},
                                  "its scheduler, a DDPMScheduler, is not one of deterministic flow matching"),
    "two models": (lambda: wan(euler(), transformer_2=wan(euler()).transformer, boundary_ratio=0.9), {},
                   "it has more than one model: transformer, transformer_2"),
    "a model for no prompt": (lambda: diffusers.Ideogram4Pipeline(
        euler(), vae("AutoencoderKLFlux2"), t5(), letters(), sd3().transformer, sd3().transformer), {},
        "it has more than one model: transformer, unconditional_transformer"),
    "noise without an end": (cosmos2, {}, "its scheduler has final_sigmas_type=sigma_min, which solvers"),
    "a schedule the wrong way": (lambda: mochi(invert_sigmas=True), {}, "its scheduler has invert_sigmas=True"),
    "a schedule of its own": (mochi, {}, "its noise levels are not equal steps under a time shift"),
    "several calls": (lambda: hunyuan_image(guider=diffusers.guiders.AdaptiveProjectedMixGuidance()), {},
                      "it calls its transformer 2 times a step"),
    "no guidance to set": (hunyuan_image, {"guidance_scale": 3.0}, "it takes no --guidance-scale"),
    "to be compiled": (FAMILIES["FLUX.1"].build, {"compile": True}, "--compile is for Stable Diffusion 3 alone"),
    "keys and values kept": (lambda: Cached(**sd3().components), {}, "it keeps keys and values from one step"),
    "noise of another size": (lambda: LoudNoise(**sd3().components), {}, "noise has a standard deviation of [23]"),
    "a film": (lambda: Film(**wan(euler()).components), {}, "it does not draw one picture of a prompt"),
    "a size of its own": (lambda: Draws(**sd3().components), {"resolution": 16},
                          "--resolution 16: it draws 32 x 32 pixels instead"),
    "layers of other names": (without_attention, {}, "none of its linear layers is one of to_q, to_k"),
    "a resolution it cannot draw": (FAMILIES["Sana"].build, {"resolution": 20}, "divisible by 32"),
    **{kind: (lambda kind=kind, name=name: other(kind, FAMILIES[name].build()), {},
              r"with a prompt alone it fails \(it takes (control_)?image, too: wanted is one that starts from text")
       for kind, name in (
           ("StableDiffusion3Img2ImgPipeline", "SD3"), ("StableDiffusion3InpaintPipeline", "SD3"),
           ("FluxImg2ImgPipeline", "FLUX.1"), ("FluxFillPipeline", "FLUX.1"), ("FluxControlPipeline", "FLUX.1"),
           ("QwenImageImg2ImgPipeline", "Qwen-Image"), ("ChromaImg2ImgPipeline", "Chroma"),
           ("ZImageInpaintPipeline", "Z-Image"), ("LTXImageToVideoPipeline", "LTX, one frame"))}}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused_in_one_sentence(case):
    build, settings, sentence = REFUSALS[case]
    settings = dict(prompt_file="", device="cpu", lora_rank=4, max_sequence_length=0, resolution=32,
                    num_inference_steps=4) | settings
    pipe = randomized(build())
    with pytest.raises(UserError, match=sentence) as caught, blame("--model"):   # as in dgpo.load_model
        AnyPipeline(pipe, Config(**settings))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------
# SCHEDULES
# ------------------------------------------------------------------------------------------------


def solver(name, **settings):
    return getattr(diffusers, name)(**dict(prediction_type="flow_prediction", use_flow_sigmas=True,
                                           flow_shift=3.0) | settings)


# Of a tiny SD3 at 128 pixels, which has the 1024 places in its sequence that SD3 has at 512: the shift, or why not.
# With shift_terminal, 1 - sigma is multiplied by k, and that is another time shift: (shift - 1 + k) / k.
MU = 0.5 + (1024 - 256) * 0.65 / (4096 - 256)
SCHEDULES = {
    "static": (lambda: euler(3.0), 3.0),
    "no shift": (lambda: euler(1.0), 1.0),
    "dynamic": (lambda: dynamic(), 1.878),
    "dynamic, linear": (lambda: dynamic(time_shift_type="linear"), MU),
    "stretched": (lambda: euler(3.0, shift_terminal=0.02), "stretched"),
    "dynamic and stretched": (lambda: dynamic(shift_terminal=0.02), "stretched"),
    "DPM-Solver++": (lambda: solver("DPMSolverMultistepScheduler"), 3.0),
    "UniPC": (lambda: solver("UniPCMultistepScheduler"), 3.0),
    "DEIS, no end": (lambda: solver("DEISMultistepScheduler"), "its noise goes from 1.000 to 0.250, not 1 to 0"),
    "karras": (lambda: euler(use_karras_sigmas=True), "its scheduler has use_karras_sigmas=True"),
    "exponential": (lambda: euler(use_exponential_sigmas=True), "its scheduler has use_exponential_sigmas=True"),
    "beta": (lambda: euler(use_beta_sigmas=True), "its scheduler has use_beta_sigmas=True"),
    "inverted": (lambda: euler(invert_sigmas=True), "its scheduler has invert_sigmas=True"),
    "stochastic": (lambda: euler(stochastic_sampling=True), "its scheduler has stochastic_sampling=True"),
    "DPM-Solver++, karras": (lambda: solver("DPMSolverMultistepScheduler", use_karras_sigmas=True), "use_karras_sig"),
    "DPM-Solver++, stochastic": (lambda: solver("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
                                 "its scheduler has algorithm_type=sde-dpmsolver"),
    "UniPC, no end": (lambda: solver("UniPCMultistepScheduler", final_sigmas_type="sigma_min"), "final_sigmas_type"),
    "DPM-Solver++, not of flows": (lambda: solver("DPMSolverMultistepScheduler", use_flow_sigmas=False), "its noise"),
    "Heun": (lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0), "not equal steps"),
    "LCM": (lambda: diffusers.FlowMatchLCMScheduler(shift=3.0), "a FlowMatchLCMScheduler, is not one of determ"),
    "SA-Solver": (lambda: solver("SASolverScheduler"), "a SASolverScheduler, is not one of deterministic flow")}


@pytest.mark.parametrize("case", SCHEDULES)
def test_a_schedule_is_the_schedulers_own_or_refused_by_name(case):
    build, expected = SCHEDULES[case]
    if case == "beta":
        pytest.importorskip("scipy")
    config, told = Config(prompt_file="", device="cpu", lora_rank=4, max_sequence_length=16, resolution=128,
                          num_inference_steps=10), []
    pipe = randomized(rescheduled(build()))
    if isinstance(expected, str) and expected != "stretched":
        with pytest.raises(ValueError, match=expected):
            AnyPipeline(pipe, config)
        return
    plain = rescheduled(build())   # asked as diffusers' pipeline asks it
    plain.set_progress_bar_config(disable=True)
    plain("", height=128, width=128, num_inference_steps=10, guidance_scale=1.0, max_sequence_length=16)
    own, times = plain.scheduler.sigmas.double(), plain.scheduler.timesteps
    model = AnyPipeline(pipe, config)
    model.transformer.register_forward_pre_hook(lambda _, args, given: told.append(given["timestep"]), with_kwargs=True)
    with torch.no_grad():
        for sigma in own[:-1]:
            model.velocity(torch.zeros(1, *model.latent_shape), sigma, [""], "frozen")
    atol = 1e-3 if times.is_floating_point() else 1   # whole numbers, cut off
    torch.testing.assert_close(torch.cat(told).float(), times.float(), rtol=0, atol=atol)
    if expected == "stretched":
        base = build()
        base.register_to_config(shift_terminal=None)
        base.set_timesteps(10, mu=MU)
        k = ((1 - own[-2]) / (1 - base.sigmas[-2])).item()
        shift = math.exp(MU) if base.config.use_dynamic_shifting else 3.0
        expected = (shift - 1 + k) / k
    assert model.shift == pytest.approx(expected, rel=1e-3)
    t = shift_time(own[:-1], 1 / model.shift)   # in equal steps
    torch.testing.assert_close(t.diff(), t.diff().mean().expand(9), rtol=0, atol=1e-4)
    if case == "dynamic":   # where --t-min 0.4 begins
        assert shift_time(0.4, model.shift) == pytest.approx(0.556, abs=1e-3)


def test_flux2s_shift_is_that_of_the_rollouts_steps():
    empirical_mu = inspect.getmodule(diffusers.Flux2KleinPipeline).compute_empirical_mu
    for steps in (1, 4, 20, 50):
        config = Config(prompt_file="", device="cpu", lora_rank=4, max_sequence_length=16, resolution=16,
                        num_inference_steps=steps)
        mu = empirical_mu(16, max(4, steps))
        assert AnyPipeline(FAMILIES["Flux2 Klein"].build(), config).shift == pytest.approx(math.exp(mu), rel=1e-3)


@pytest.mark.parametrize("sigmas", [
    [1, 0.7, 0.5, 0.4, 0], [1, 1, 1, 1, 0], [0, 0.25, 0.5, 0.75, 1], [1, 0.75, 0.5, 0.25], [0.9, 0.6, 0.4, 0.2, 0],
    [1, float("nan"), 0.5, 0.25, 0], [1, 0.5, 0, 0, 0]])
def test_noise_levels_of_another_form_have_no_shift(sigmas):
    with pytest.raises(ValueError, match="its noise"):
        shift_of(torch.tensor(sigmas))


@pytest.mark.parametrize("case, kind", [
    ("static", "SD3"), ("no shift", "SD3"), ("dynamic", "AnyPipeline"), ("dynamic, linear", "AnyPipeline"),
    ("stretched", "AnyPipeline"), ("DPM-Solver++", "AnyPipeline"), ("UniPC", "AnyPipeline"), ("karras", "refused"),
    ("exponential", "refused"), ("inverted", "refused"), ("stochastic", "refused"), ("Heun", "refused"),
    ("LCM", "refused"), ("DPM-Solver++, stochastic", "refused")])
def test_a_folder_of_sd3_with_another_schedule_goes_through_the_adapter(case, kind, tmp_path):
    randomized(rescheduled(SCHEDULES[case][0]())).save_pretrained(tmp_path)
    config = Config(prompt_file="", model=str(tmp_path), device="cpu", lora_rank=4, max_sequence_length=16,
                    resolution=128, num_inference_steps=10)
    if kind == "refused":
        with pytest.raises(UserError, match="does not fit: its"):
            load_model(config)
    else:
        model = load_model(config)
        assert type(model).__name__ == kind
        if isinstance(SCHEDULES[case][1], float):
            assert model.shift == pytest.approx(SCHEDULES[case][1], rel=1e-3)


# ------------------------------------------------------------------------------------------------
# A RUN THROUGH dgpo.py
# ------------------------------------------------------------------------------------------------


def weights_of(run):
    """The exported LoRAs of a run, by name."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*.safetensors")}


@pytest.mark.parametrize("name", FAMILIES)
def test_dgpo_trains_the_pipeline_of_a_folder_and_a_resumed_run_is_the_one_that_never_stopped(name, folders, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(f"{color} {shape}" for color in ("a red", "a blue", "one green")
                                                    for shape in ("circle", "star", "ring")))
    (tmp_path / "heldout.txt").write_text("two blue stars")
    mine = tmp_path / f"{tmp_path.name}.py"   # a name of its own: Python loads a module of one name once
    mine.write_text("import numpy as np\ndef left(images, prompts, metadata):\n"
                    "    return [float(np.asarray(i)[:, :8].mean()) for i in images]\n")
    flags = {"model": folders(name), "prompt-file": tmp_path / "prompts.txt", "reward": f"{mine}:left",
             "resolution": FAMILIES[name].resolution, "device": "cpu", "dtype": "float32", "groups-per-step": 2,
             "group-size": 3, "num-inference-steps": 3, "eval-num-inference-steps": 3, "eval-images": 1, "lora-rank": 4,
             "guidance-scale": {"FLUX.1": 3.5, "Qwen-Image": 4.0}.get(name, 1.0), "learning-rate": 0.01,
             "max-sequence-length": 16 if name == "SD3" else 0, "batch-size": 2,   # SD3 has no own
             "rollout-old-after": 1, "save-every": 1, "eval-every": 1}
    command = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    before = {path: path.read_bytes() for path in Path(folders(name)).rglob("*.safetensors")}
    runs = tmp_path / "straight", tmp_path / "halves"
    assert main([*command, "--steps", "2", "--output-dir", str(runs[0])]) == 0
    assert main([*command, "--steps", "1", "--output-dir", str(runs[1])]) == 0
    one, two = (load_file(runs[i] / "lora/pytorch_lora_weights.safetensors") for i in (1, 0))
    moved = [key for key in one if "lora_B" in key and one[key].any()]
    assert moved and any(not torch.equal(one[key], two[key]) for key in moved)
    assert main(["--resume", str(runs[1]), "--steps", "2"]) == 0
    assert weights_of(runs[0]) == weights_of(runs[1]) and len(weights_of(runs[0])) >= 1
    metrics = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("loss") for line in metrics) and any(line.get("kl", 0) > 0 for line in metrics)
    assert before == {path: path.read_bytes() for path in before}   # nothing but the LoRA is trained
    if name in NO_LORA_LOADER:
        return
    plain = load(folders(name))
    plain.load_lora_weights(runs[0] / "lora")
    _, changed, *_ = own_call(plain, FAMILIES[name], PROMPTS[0], 1.0)
    _, base, *_ = own_call(load(folders(name)), FAMILIES[name], PROMPTS[0], 1.0)
    assert (changed[-1] - base[-1]).norm() > 1e-3 * base[-1].norm()
