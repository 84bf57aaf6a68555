"""DGPO: Direct Group Preference Optimization, reinforcement learning for flow-matching text-to-image models.

    python dgpo.py --prompt-file shapes/prompts.txt           # the embedded model, two CPU cores, a few minutes
    torchrun --nproc-per-node 8 dgpo.py --prompt-file …       # eight GPUs, the same run
    python dgpo.py --help                                     # every setting

Reference: "Reinforcing Diffusion Models by Direct Group Preference Optimization", Luo, Hu, Tang, ICLR 2026,
arXiv 2510.08425; equation numbers below are the paper's.  The idea: for a prompt, draw a group of images with a
*deterministic* ODE solver; score them; let the standardised rewards A_i split the group into a preferred and a rejected
set weighted by |A_i|; train the model so that the flow-matching error of the preferred images falls, relative to a
reference model's, and that of the rejected ones rises.  As the weights of both sets are equal, the partition function
of the preference model cancels, and no stochastic policy is needed anywhere.

Conventions, those of diffusers: x_t = (1 - sigma) x0 + sigma noise, velocity = noise - x0, sigma = 1 is noise and 0 is
data.  Shapes at the right margin: P prompts (groups), G images a group, B = P*G, M timesteps a rollout, R (group,
timestep) rows, and [C, H, W] a latent.  FLOW MATCHING to TRAIN is the method, in the paper's order; what comes after
makes a command of it that can be trusted for days.

Departures from the paper and from its authors' published code:
 1. Timesteps are drawn from the continuous interval [shift(t_min), 1], one in each of M equal strata, for every group
    anew; theirs are M of the first points of the rollout's own grid, as integers, the same for all groups of a step.
 2. `--updates-per-rollout` may split the M timesteps over several optimizer steps (the authors take one).
 3. Groups without signal (all rewards equal) are not trained on at all, so the KL term leaves them out too.
 4. The last evaluation has as many solver steps as the others; theirs has 40 instead of 14
    (`--lora RUN/lora --steps 0 --eval-num-inference-steps 40` makes one).
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib
import io
import json
import math
import os
import random
import subprocess
import sys
import textwrap
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save
from torch import nn
from tqdm import tqdm

from rewards import UserError, blame, load_pretrained, load_reward, prompt_category, quiet_libraries

# ---- SETTINGS: this list is the command line -----------------------------------------------------------------------

EMBEDDED_MODEL = Path(__file__).resolve().parent / "shapes/model"
PICTURED = 12         # held-out prompts whose images are shown and saved
POLICIES = ("current", "old", "ema")   # trained; behind it, for clip and rollouts; its average, evaluated and exported
BAR = "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"   # fits 80 columns

# The defaults for any model but the embedded one: the authors' settings for SD3.5-M, as their code runs them.  A batch
# of 24 guided images is 48 in the transformer; gradient checkpointing lets 24 samples be trained on in 24 GB.
PAPER = dict(
    dtype="bfloat16", reward="pickscore", eval_reward="", steps=1000, groups_per_step=24, group_size=24,
    num_inference_steps=10, guidance_scale=4.5, resolution=512, max_sequence_length=128, rollout_old_after=200,
    t_min=0.4, updates_per_rollout=1, beta=100.0, old_decay=0.3, old_decay_ramp=1e-3, learning_rate=3e-4, lora_rank=64,
    ema_decay=0.987, batch_size=24, gradient_checkpointing=True, eval_prompts=100, eval_num_inference_steps=14)


def setting(default, help, low=1, high=10 ** 9, choices=None, free=False):
    """A field of Config with its --help text.  low, high: of a number; free: may change when a run is resumed."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices, free=free))


def flag(name):
    """A setting's name as it is typed."""
    return "--" + name.replace("_", "-")


@dataclass
class Config:
    """Every setting of a run, with the defaults of the embedded job."""

    # Task
    prompt_file: str = setting("", "training prompts: one a line, or .jsonl with `prompt` and metadata", free=True)
    eval_prompt_file: str = setting("", "held-out prompts (default: NAME_heldout.txt or heldout.txt beside NAME.txt)",
                                    free=True)
    model: str = setting("", "folder in diffusers' format, or hub id (default: the embedded model)", free=True)
    reward: str = setting("shapes", "reward: NAME, NAME=FOLDER, file.py:function, or a sum NAME:weight,NAME:weight")
    eval_reward: str = setting("realism", "judges, watched at every evaluation and not trained on: NAME,NAME")
    lora: str = setting("", "a run's lora/ folder to begin with; with --steps 0, it is only compared with the model",
                        free=True)
    output_dir: str = setting("", "where everything is written (default: a new folder in runs/)")
    resume: str = setting("", "a run's folder: go on with it, with its own settings", free=True)
    steps: int = setting(125, "training steps (one rollout of all groups each); 0: only evaluate", low=0, free=True)
    seed: int = setting(0, "seed of LoRA, prompt order and noises", low=0)
    device: str = setting("", "cpu, cuda, ... (default: cuda if there is one)", free=True)
    dtype: str = setting("float32", "dtype of the frozen model", choices=("float32", "bfloat16"))
    # Rollout
    groups_per_step: int = setting(8, "P, prompts a step (paper: 24)")
    group_size: int = setting(12, "G, images a prompt (paper: 24)", low=2)
    num_inference_steps: int = setting(6, "solver steps of a rollout (paper: 10)")
    solver: str = setting("dpm++2m", "ODE solver of rollouts and evaluation", choices=("euler", "dpm++2m"))
    guidance_scale: float = setting(1.0, "guidance of rollouts and evaluation, up to 1: none (paper: 4.5)", low=0)
    resolution: int = setting(0, "image side in pixels, 0: the model's own (paper: 512)", low=0)
    max_sequence_length: int = setting(1, "T5 tokens, or zeros for them; 0: the pipeline's own (paper: 128)", low=0)
    rollout_old_after: int = setting(0, "updates after which rollouts use the old policy, 0: never (paper: 200)", low=0)
    # Objective
    beta: float = setting(10.0, "strength of the preference inside the sigmoid (paper: 10 to 100)", low=1e-6)
    t_min: float = setting(0.3, "lowest timestep trained on, unshifted (paper, guided: 0.599 or 0.4)", low=0, high=0.99)
    timesteps_per_rollout: int = setting(4, "M, timesteps trained on for each group (paper: 4)")
    updates_per_rollout: int = setting(4, "optimizer steps the M timesteps are split over (paper: 1)")
    advantage_std: str = setting("group", "standardise advantages within group or batch", choices=("group", "batch"))
    clip_range: float = setting(0.01, "PPO-style clip of exp(old error - error), 0: none (paper: 1e-2)", low=0)
    kl_weight: float = setting(0.02, "weight of mean (v - v_frozen)^2 (paper: 2e-2)", low=0)
    reference: str = setting("frozen", "model whose error S compares with (paper: frozen)", choices=("frozen", "old"))
    reference_guidance_scale: float = setting(1.0, "guidance of the frozen model's velocity in S and the KL term; an "
                                                   "old policy's is never guided (paper: 1)", low=0)
    old_decay: float = setting(0.5, "EMA decay of the old policy, an update (paper: 0.3)", low=0, high=1)
    old_decay_ramp: float = setting(1.0, "old_decay is at most this times the updates before (paper: 0.001)", low=0)
    # Optimisation and compute
    learning_rate: float = setting(7e-4, "AdamW's learning rate (paper: 3e-4)", low=1e-12)
    lora_rank: int = setting(32, "LoRA rank; alpha is twice the rank (paper: 64)")
    ema_decay: float = setting(0.98, "EMA decay, an update, of the exported weights (paper: .95-.99)", low=0, high=1)
    batch_size: int = setting(96, "images drawn, and samples trained on, at once; changes memory alone", free=True)
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory", free=True)
    # Evaluation and saving
    eval_every: int = setting(50, "steps between evaluations on held-out prompts")
    eval_prompts: int = setting(0, "how many of the held-out prompts are used, 0: all", low=0)
    eval_images: int = setting(4, "images a held-out prompt, from noises that stay the same")
    eval_num_inference_steps: int = setting(10, "solver steps of evaluation (paper: 14)")
    save_every: int = setting(10, "steps between checkpoints: what any end of the program costs at most", free=True)
    tensorboard: bool = setting(False, "write numbers and samples for TensorBoard, too", free=True)

    def check(self):
        """Refuse values with which a run would waste its time.  Raises UserError."""
        for field in dataclasses.fields(self):
            value, low, high = getattr(self, field.name), field.metadata["low"], field.metadata["high"]
            if field.type in (int, float) and not low <= value <= high:
                raise UserError(f"{flag(field.name)} must lie between {low:g} and {high:g}, not {value}")
        if self.timesteps_per_rollout % self.updates_per_rollout:
            raise UserError(f"--updates-per-rollout {self.updates_per_rollout} must divide --timesteps-per-rollout "
                            f"{self.timesteps_per_rollout}")


# ---- FLOW MATCHING: time, noise and the deterministic solvers (paper, section 2) -----------------------------------


def shift_time(t, shift):
    """Move timesteps t in [0, 1] (number or tensor) towards noise, as SD3 does at higher resolutions."""
    return shift * t / (1 + (shift - 1) * t)


def ode_sigmas(num_steps, shift, solver="euler"):
    """The solver's noise levels, falling to 0: float32 [num_steps + 1].

    "euler": FlowMatchEulerDiscreteScheduler's, from 1 to the shifted 1/1000 and then 0.  "dpm++2m": the flow sigmas of
    DPMSolverMultistepScheduler, from the shifted 0.999 in equal steps (before the shift) to 0: after Euler's tiny last
    step but one, a multistep method would extrapolate over a far longer one in lambda.
    """
    if solver == "euler":
        grid = torch.linspace(1.0, shift_time(1 / 1000, shift), num_steps, dtype=torch.float64)
    else:
        grid = torch.linspace(1 - 1 / 1000, 0.0, num_steps + 1, dtype=torch.float64)[:-1]
    return torch.cat([shift_time(grid, shift), torch.zeros(1, dtype=torch.float64)]).float()


def add_noise(x0, noise, sigma):
    """The flow's straight path.  Tensors that broadcast -> (x_t, target velocity)."""
    return (1 - sigma) * x0 + sigma * noise, noise - x0


def sample_ode(velocity, noise, sigmas, solver="euler"):
    """Integrate dx/dsigma = velocity(x, sigma) from noise to data.

    velocity: callable (x [B, ...], sigma a 0-d tensor) -> [B, ...]; noise: [B, ...] on any device; sigmas: [steps + 1],
    falling, on the CPU.  solver: "euler", or "dpm++2m", DPM-Solver++ for flows: second-order multistep on the data
    prediction x0 = x - sigma v in lambda = log((1 - sigma) / sigma) (arXiv 2211.01095).  Both are deterministic.
    """
    x, last_x0, last_h = noise, None, None
    for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:], strict=True):
        v = velocity(x, sigma)
        if solver == "euler":
            x = x + (next_sigma - sigma) * v
            continue
        x0 = x - sigma * v
        h = torch.logit(1 - next_sigma) - torch.logit(1 - sigma)
        estimate = x0
        # lambda is infinite at both ends, sigma = 1 and 0: there, extrapolation has no meaning and order one serves.
        if last_x0 is not None and h.isfinite() and last_h.isfinite():
            estimate = x0 + h / (2 * last_h) * (x0 - last_x0)
        x = next_sigma / sigma * x + (1 - next_sigma / sigma) * estimate
        last_x0, last_h = x0, h
    return x


def draw_timesteps(groups, count, t_min, shift, generator):
    """Timesteps to train on, [groups, count] in [shift(t_min), 1]: one in each of `count` strata, in random order.

    Below t_min an x_t shows the fine detail of a few-step sample, which is not to be imitated (paper, section 3.3).
    """
    strata = torch.rand(groups, count, generator=generator).argsort(1)
    u = (strata + torch.rand(groups, count, generator=generator)) / count
    return shift_time(t_min + (1 - t_min) * u, shift)


# ---- GROUP PREFERENCES: advantages (Eq. 12-14), loss (Eq. 17), clip ------------------------------------------------


def group_advantages(rewards, std="group", max_advantage=5.0):
    """A = (r - mean) / std (Eq. 12): rewards [P, G] -> advantages [P, G], clamped to +-max_advantage.

    The mean is the group's; the (population) std the group's or, with std="batch", that of all rewards.  A group whose
    rewards are all equal says nothing and gets exactly zero.
    """
    centered = rewards - rewards.mean(1, keepdim=True)
    scale = rewards.std(1, keepdim=True, correction=0) if std == "group" else rewards.std(correction=0)
    # The epsilon keeps rounding noise in nearly equal rewards from becoming advantages of order one.
    advantages = (centered / (scale + 1e-4)).clamp(-max_advantage, max_advantage)
    return advantages * (rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True))


def dgpo_loss(error, ref_error, advantages, beta):
    """The DGPO objective (Eq. 17), divided by beta: a scalar, the mean over groups.

    error, ref_error, advantages: [P, G], the *mean* squared velocity errors of the current and the reference model.
    Its gradient for error_i of a group is sigmoid(S) A_i / (G P): beta acts inside the sigmoid only.
    For G = 2 and advantages +1, -1 this is Diffusion-DPO with beta/2.
    """
    S = beta * (advantages * (error - ref_error)).mean(1)                                          # [P]
    return -F.logsigmoid(-S).mean() / beta


def clip_error(error, old_error, advantages, clip_range):
    """PPO-style clip, all [P, G]: (the same errors, without gradient where a sample moved far enough; where: bool).

    With ratio = exp(old_error - error): A > 0 at ratio > 1 + clip_range, A < 0 at ratio < 1 - clip_range.  The error of
    a rejected sample can grow without bound, and would; values stay, so S keeps its meaning.
    """
    ratio = torch.exp(old_error - error.detach())
    past = ((advantages > 0) & (ratio > 1 + clip_range)) | ((advantages < 0) & (ratio < 1 - clip_range))
    return torch.where(past, error.detach(), error), past


# ---- LORA AND THE POLICIES: one frozen model, several sets of low-rank weights -------------------------------------


class LoRALinear(nn.Module):
    """y = W x + (alpha / rank) up down x (arXiv 2106.09685), with `policies` to choose (down, up) from.

    `active` is the pair in force, or None for W alone.
    """
    scale = 2.0   # alpha / rank

    def __init__(self, base, rank, generator):
        super().__init__()
        self.base, self.active = base, None
        # As in the LoRA paper, `down` is Gaussian and `up` zero: every policy starts as the base model.
        down = torch.randn(rank, base.in_features, generator=generator) / rank
        self.start(down, torch.zeros(base.out_features, rank))

    def start(self, *pair):
        """Let all policies begin with one pair: down [rank, in], up [out, rank]."""
        # In fp32 whatever the base's dtype, because the steps of AdamW are smaller than bf16 can add.
        self.policies = {p: [t.to(self.base.weight.device, torch.float32, copy=True) for t in pair] for p in POLICIES}
        for t in self.policies["current"]:
            t.requires_grad_()

    def forward(self, x):
        """[..., in] -> [..., out] in the base's dtype."""
        y = self.base(x)
        if self.active is None:
            return y
        # Kept in fp32, used in the activations' dtype: on a GPU, matrix products in fp32 are many times slower.
        down, up = (t.to(x.dtype) for t in self.active)
        return y + F.linear(F.linear(x, self.scale * down), up)


class LoRA:
    """The LoRA layers of a transformer, where a linear layer's name ends with one of `targets`, and their policies."""

    def __init__(self, transformer, rank, targets, seed=0):
        transformer.requires_grad_(False)
        generator, self.layers = torch.Generator().manual_seed(seed), {}
        for name, module in list(transformer.named_modules()):
            if isinstance(module, nn.Linear) and name.endswith(tuple("." + target for target in targets)):
                parent, _, leaf = name.rpartition(".")
                self.layers[name] = LoRALinear(module, rank, generator)
                setattr(transformer.get_submodule(parent), leaf, self.layers[name])

    def weights(self, policy):
        """The policy's tensors in a fixed order: [down, up, down, up, ...]."""
        return [t for layer in self.layers.values() for t in layer.policies[policy]]

    def select(self, policy):
        """Make `policy` the one whose velocity the transformer computes; "frozen" is the model with its LoRA off."""
        for layer in self.layers.values():
            layer.active = layer.policies.get(policy)

    @torch.no_grad()
    def follow(self, policy, decay):
        """Move a policy towards the current one: theta^- <- decay theta^- + (1 - decay) theta."""
        torch._foreach_lerp_(self.weights(policy), self.weights("current"), 1 - decay)

    def load(self, folder):
        """Let all policies begin with what `export` wrote, of whatever rank it is.  Raises UserError."""
        with blame(f"--lora {folder} does not hold this model's LoRA"):
            tensors = load_file(Path(folder) / "pytorch_lora_weights.safetensors")
            for name, layer in self.layers.items():
                down, up = (tensors.pop(f"transformer.{name}.lora_{key}.weight") for key in "AB")
                layer.start(down, up / layer.scale)
            if tensors:
                raise ValueError(f"it has other layers, too, as {next(iter(tensors))}")

    def export(self, folder, policy="ema", **about):
        """Write one policy as diffusers' LoRA file, for `pipe.load_lora_weights(folder)`, and `about` beside it."""
        tensors = {}
        for name, layer in self.layers.items():
            down, up = (t.detach().cpu() for t in layer.policies[policy])
            # alpha / rank is folded into `up`, as the file then means the same to every version of diffusers.
            tensors[f"transformer.{name}.lora_A.weight"] = down.contiguous()
            tensors[f"transformer.{name}.lora_B.weight"] = (layer.scale * up).contiguous()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "pytorch_lora_weights.safetensors", save(tensors, {"format": "pt"}))
        write_atomically(folder / "about.json", json.dumps({"policy": policy, **about}).encode() + b"\n")


# ---- THE MODEL.  The loop knows four things of it, so that another class can stand in SD3's place (adapters/ has one):
#   encode(prompts)    get ready for these prompts and forget all others: text encoders need not stay on the device
#   velocity(x, sigma, prompts, policy, guidance_scale)   x [B, ...], one sigma or [B], B prompts -> float32 like x
#   decode(x0)         latents [B, ...] -> list of B PIL images
#   latent_shape       of one image, without B
# and it hands on `lora`, whose policies velocity chooses from, its `device` and the `shift` of its own schedule.


def load_model(config):
    """The model of --model, a folder (no hub is asked) or a hub id, ready for the loop.  Raises UserError."""
    quiet_libraries()
    import diffusers  # late, so that --help and errors of the command line come at once
    path, local, parts = config.model, os.path.isdir(config.model), {}
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    hint = "" if local else " (for a hub id: accept the licence on its page, run `hf auth login`, check the network)"
    with blame(f"--model {path} cannot be loaded{hint}"):
        index = diffusers.DiffusionPipeline.load_config(path, local_files_only=local)
        for name, (library, kind) in ((n, value) for n, value in index.items() if isinstance(value, (list, tuple))):
            if library is None:
                parts[name] = None   # from_pretrained wants to be told what is left out
            elif local and not os.path.isdir(os.path.join(path, name)):
                raise UserError(f"--model {path} has no folder {name}")   # an empty tokenizer would be made up
            elif library in ("diffusers", "transformers"):
                kind = getattr(importlib.import_module(library), kind)
                if issubclass(kind, nn.Module):   # one by one, as what is missing would be drawn at random
                    dtype = torch.float32 if name == "vae" else getattr(torch, config.dtype)
                    parts[name] = load_pretrained(kind, path, "cpu", dtype, subfolder=name)
        pipe = diffusers.DiffusionPipeline.from_pretrained(path, local_files_only=local, **parts)
    if type(pipe).__name__ == "StableDiffusion3Pipeline":
        return SD3(pipe, config)
    from adapters.any_pipeline import AnyPipeline
    return AnyPipeline(pipe, config)


class SD3:
    """Stable Diffusion 3 and 3.5 through diffusers' pipeline."""

    lora_targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",   # none on SD3.5's second attention, attn2
                    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")

    def __init__(self, pipe, config):
        """Take a StableDiffusion3Pipeline: the model goes to the device, the text encoders wait in main memory."""
        self.pipe, self.vae, self.transformer = pipe, pipe.vae, pipe.transformer
        self.device, self.dtype = torch.device(config.device), getattr(torch, config.dtype)
        self.max_sequence_length = config.max_sequence_length or 256   # the pipeline's own
        self.encoders = [e for e in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3) if e is not None]
        self.transformer.to(self.device)
        self.vae.to(self.device)   # in float32: the half types overflow in it or cost it visible precision
        self.lora = LoRA(self.transformer, config.lora_rank, self.lora_targets, config.seed)
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        shape, factor = self.transformer.config, 2 ** (len(self.vae.config.block_out_channels) - 1)
        step, most = shape.patch_size * factor, shape.patch_size * factor * shape.pos_embed_max_size
        if config.resolution % step or config.resolution > most:
            raise UserError(f"--resolution {config.resolution}: this model wants a multiple of {step}, at most {most}")
        side = config.resolution // factor or shape.sample_size
        self.latent_shape, self.shift = (shape.in_channels, side, side), pipe.scheduler.config.shift
        # An image of 1024 x 1024 takes about 4 GB to decode, so pixels, not images, are what is counted.
        self.decode_batch_size = max(1, 2 ** 21 // (side * factor) ** 2)

    @torch.no_grad()
    def encode(self, prompts):
        """Encode the prompts, and "" for guidance, and forget all others; what is too long is cut off.

        The text encoders visit the device for this only, and the embeddings (T5: 1.7 MB) stay in main memory.
        """
        prompts, parts = list(dict.fromkeys(["", *prompts])), []
        # In batches of one size: how a row is rounded depends on it, and a resumed run is to see the same embeddings.
        prompts += [""] * (-len(prompts) % 16)
        for encoder in self.encoders:
            encoder.to(self.device)
        for i in range(0, len(prompts), 16):
            tokens, _, pooled, _ = self.pipe.encode_prompt(
                prompts[i:i + 16], None, None, do_classifier_free_guidance=False, device=self.device,
                max_sequence_length=self.max_sequence_length)
            parts.append((tokens.cpu(), pooled.cpu()))
        for encoder in self.encoders:
            encoder.to("cpu")
        self.places, self.texts = {p: i for i, p in enumerate(prompts)}, [torch.cat(part) for part in zip(*parts)]

    def embeddings(self, prompts):
        """List of B strings -> (token embeddings [B, L, D], pooled embeddings [B, D]) on the device."""
        places, index = torch.tensor([self.places[p] for p in prompts]).unique(return_inverse=True)
        return tuple(part[places].to(self.device)[index.to(self.device)] for part in self.texts)

    def velocity(self, x, sigma, prompts, policy, guidance_scale=1.0):
        """The policy's velocity at x [B, C, H, W] for B prompts, float32 [B, C, H, W]; sigma: a number, 0-d, or [B].

        policy: one of POLICIES, or "frozen" for the frozen model.
        guidance_scale > 1: v("") + scale (v(prompt) - v("")).
        """
        self.lora.select(policy)
        if not isinstance(sigma, torch.Tensor) or sigma.ndim == 0:
            sigma = torch.full((len(x),), float(sigma), device=x.device)   # a copy to the GPU would wait for it
        inputs, guided = x, guidance_scale > 1
        if guided:
            prompts, inputs, sigma = [*prompts, *[""] * len(x)], torch.cat([x, x]), torch.cat([sigma, sigma])
        tokens, pooled = self.embeddings(prompts)
        v = self.transformer(inputs.to(self.dtype), tokens, pooled, sigma * 1000, return_dict=False)[0].float()
        if guided:
            v, v_empty = v.chunk(2)
            v = v_empty + guidance_scale * (v - v_empty)
        return v

    @torch.no_grad()
    def decode(self, x0):
        """Latents [B, C, H, W] -> list of B PIL images."""
        images, latents = [], x0 / self.vae.config.scaling_factor + self.vae.config.shift_factor
        for part in latents.split(self.decode_batch_size):
            pixels = self.vae.decode(part, return_dict=False)[0]
            images += self.pipe.image_processor.postprocess(pixels, output_type="pil")
        return images


# ---- ROLLOUT (Algorithm 1, lines 3-5) ------------------------------------------------------------------------------


def seeded(*numbers):
    """A CPU generator that depends on the numbers alone: a step's noise is the same however a run got there."""
    return torch.Generator().manual_seed(random.Random(repr(numbers)).getrandbits(63))


@torch.no_grad()
def rollout(model, rows, size, generator, num_steps, policy, config):
    """`size` images for each row: (x0 [rows, size, C, H, W], and, as a reward wants them, images, prompts and rows).

    rows: dicts with "prompt"; generator: of the noise to start from.  Of many processes each draws for its own rows
    alone (see `own`), perhaps none.
    """
    mine = own(len(rows))
    repeated = [row for row in rows[mine] for _ in range(size)]                                    # B of them
    prompts = [row["prompt"] for row in repeated]
    # Drawn for all, so that a row's noise does not depend on who owns it.
    noise = torch.randn(len(rows), size, *model.latent_shape, generator=generator)[mine].flatten(0, 1)  # [B, C, H, W]
    model.encode(prompts)
    # The sigmas are left on the CPU, so that the solver never waits for a GPU.
    sigmas, latents, images = ode_sigmas(num_steps, model.shift, config.solver), [], []
    for i in tqdm(range(0, len(prompts), config.batch_size), desc="rollout", leave=False):
        def velocity(x, sigma, batch=prompts[i:i + config.batch_size]):
            return model.velocity(x, sigma, batch, policy, config.guidance_scale)

        start = noise[i:i + config.batch_size].to(model.device)
        latents.append(sample_ode(velocity, start, sigmas, config.solver))
        if not latents[-1].isfinite().all():
            raise UserError(f"the {policy} policy's images are not finite: after training, that wants a new run with a "
                            "lower --learning-rate")
        images += model.decode(latents[-1])
    return torch.cat(latents or [noise]).unflatten(0, (-1, size)), images, prompts, repeated


# ---- UPDATE (Algorithm 1, lines 6-9) -------------------------------------------------------------------------------


def accumulate_gradients(model, x0, prompts, advantages, sigma, noise, config, total_rows):
    """Add the gradient of loss + KL over R rows, one row a group at one timestep, to the LoRA's .grad.

    x0: [R, G, C, H, W]; prompts: R strings; advantages: [R, G]; sigma: [R]; noise: [R, 1, C, H, W], shared by the group
    so that its samples differ in x0 alone and the noise cancels between preferred and rejected.  Means are taken over
    `total_rows`, which counts the groups left out for want of signal.  Returns sums over rows: dict of floats.
    """
    R, G = advantages.shape
    x_t, target = add_noise(x0, noise, sigma.view(-1, *[1] * (x0.ndim - 1)))                       # [R, G, C, H, W]
    sums = dict.fromkeys(("loss", "kl", "clip_fraction"), 0.0)
    rows_at_once = max(1, config.batch_size // G)   # whole groups, as S of Eq. 17 is the whole group's
    for i in tqdm(range(0, R, rows_at_once), desc="update", leave=False):
        part = slice(i, i + rows_at_once)
        x, A, each_sigma = x_t[part], advantages[part], sigma[part].repeat_interleave(G)           # …, [r, G], [r * G]
        each_prompt = [prompt for prompt in prompts[part] for _ in range(G)]

        def velocity(policy, guidance_scale=1.0):                                                  # [r, G, C, H, W]
            return model.velocity(x.flatten(0, 1), each_sigma, each_prompt, policy, guidance_scale).view(x.shape)

        def mean_squared(difference):                                                              # [r, G]
            return difference.pow(2).flatten(2).mean(2)

        # One forward for each policy: all in one batch, they were slower on a CPU but for the smallest batches.
        with torch.no_grad():
            frozen = velocity("frozen", config.reference_guidance_scale)
            if config.clip_range or config.reference == "old":
                old_error = mean_squared(velocity("old") - target[part])
            ref_error = old_error if config.reference == "old" else mean_squared(frozen - target[part])
        v = velocity("current")
        error = live = mean_squared(v - target[part])                                              # [r, G]
        # To the frozen model even where the reference of S moves: without an anchor, all errors drift upwards.
        kl = mean_squared(v - frozen)                                                              # [r, G]
        if config.clip_range:
            live, past = clip_error(error, old_error, A, config.clip_range)
            sums["clip_fraction"] += past.float().mean(1).sum()
        loss = dgpo_loss(live, ref_error, A, config.beta) * len(A)
        (loss / total_rows + config.kl_weight * kl.sum() / (total_rows * G)).backward()
        sums["loss"] += loss.detach()
        sums["kl"] += kl.detach().sum() / G
    return {name: float(value) for name, value in sums.items()}   # read once: every reading waits for the GPU


def adamw(model, config):
    """The optimizer of the policy that is trained, with the authors' weight decay."""
    return torch.optim.AdamW(model.lora.weights("current"), lr=config.learning_rate, weight_decay=1e-4)


def optimizer_step(model, optimizer, done, config):
    """Take the `done + 1`-th step of a run, let the other policies follow, and return the gradient's norm."""
    norm = nn.utils.clip_grad_norm_(model.lora.weights("current"), 1.0).item()
    if not math.isfinite(norm):   # it would spoil every weight and AdamW's moments for good
        raise UserError("the gradient is not finite: that wants a new run with a lower --learning-rate")
    optimizer.step()
    model.lora.follow("old", min(config.old_decay, config.old_decay_ramp * done))
    # Early on a long average would be mostly the untrained model: (1 + k) / (10 + k) opens it gradually.
    model.lora.follow("ema", min(config.ema_decay, (2 + done) / (11 + done)))
    optimizer.zero_grad(set_to_none=True)
    return norm


def update(model, optimizer, x0, prompts, advantages, config, step, accumulate=accumulate_gradients):
    """All optimizer steps on one rollout: x0 [P, G, C, H, W], P prompts, advantages [P, G].  Returns metrics.

    Of many processes each has only its own groups' x0 (see `own`), and the prompts and advantages of all.
    `accumulate` is the update rule: benchmarks/baselines.py puts those of other methods in its place.
    """
    P, M, steps, mine = len(prompts), config.timesteps_per_rollout, config.updates_per_rollout, own(len(prompts))
    generator = seeded(config.seed, "update", step)
    # Drawn for all P groups, so that a group's draws do not depend on who owns it.
    sigma = draw_timesteps(P, M, config.t_min, model.shift, generator)[mine].to(model.device)
    noise = torch.randn(P, M, 1, *x0.shape[2:], generator=generator)[mine].to(model.device)        # [P, M, 1, C, H, W]
    signal = (advantages != 0).any(1).cpu()
    with_signal, useful = int(signal.sum()), signal[mine].nonzero()[:, 0]
    prompts, advantages = prompts[mine], advantages[mine]
    totals = dict.fromkeys(("loss", "kl", "clip_fraction", "gradient_norm"), 0.0)
    for k in range(steps if with_signal else 0):
        columns = range(k * M // steps, (k + 1) * M // steps)
        group, column = (t.flatten() for t in torch.meshgrid(useful, torch.tensor(columns), indexing="ij"))
        sums = {}
        if len(group):
            sums = accumulate(model, x0[group], [prompts[g] for g in group], advantages[group],
                              sigma[group, column], noise[group, column], config, P * len(columns))
        sum_gradients(model.lora.weights("current"))
        totals["gradient_norm"] += optimizer_step(model, optimizer, step * steps + k, config) / steps
        for name, value in sums.items():
            totals[name] += value / (with_signal * M)
    shares = gather(lambda: totals)
    return {**totals, **{name: sum(share[name] for share in shares) for name in ("loss", "kl", "clip_fraction")}}


# ---- TRAIN (Algorithm 1) -------------------------------------------------------------------------------------------


def rows_of_step(rows, step, config):
    """The P prompts of a step: one seeded permutation of the file after another, without a state to save."""
    places = range(step * config.groups_per_step, (step + 1) * config.groups_per_step)
    orders = {epoch: torch.randperm(len(rows), generator=seeded(config.seed, "order", epoch))
              for epoch in {place // len(rows) for place in places}}
    return [rows[orders[place // len(rows)][place % len(rows)]] for place in places]


def train_step(model, optimizer, reward, rows, step, config, accumulate=accumulate_gradients):
    """One step of Algorithm 1: rollout, rewards, advantages, update.  Returns the step's metrics."""
    G, start = config.group_size, time.monotonic()
    policy = "old" if 0 < config.rollout_old_after < step * config.updates_per_rollout else "current"
    x0, *drawn = rollout(model, rows, G, seeded(config.seed, "rollout", step), config.num_inference_steps, policy,
                         config)                                                                   # [P, G, C, H, W]
    rewards = torch.cat(gather(lambda: reward(*drawn).view(-1, G)))                                # [P, G]
    rolled_out = time.monotonic()
    advantages = group_advantages(rewards, config.advantage_std).to(model.device)                  # [P, G]
    metrics = update(model, optimizer, x0, [row["prompt"] for row in rows], advantages, config, step, accumulate)
    return {"reward_mean": rewards.mean().item(), "reward_std": rewards.std(1).mean().item(),
            "zero_groups": (advantages == 0).all(1).float().mean().item(), **metrics,
            "seconds_rollout": rolled_out - start, "seconds_update": time.monotonic() - rolled_out}


def train(config):
    """Algorithm 1, with evaluations, checkpoints and a log."""
    model, judges, rows, held_out = prepare(config)
    optimizer = adamw(model, config)
    lines = load_checkpoint(Path(config.output_dir), model, optimizer) if config.resume else []
    done = lines[-1]["step"] if lines else 0
    if len(set(gather(lambda: done))) > 1:
        raise UserError(f"not all processes see the run in {config.output_dir}: it must lie on a disk that all share")
    first = processes()[0] == 0
    run = Run(config, provenance(model, judges, rows, held_out), lines) if first else None
    before = after = evaluate(model, judges, held_out, config, "frozen")
    # The policy is not the frozen model if it began with a LoRA, or if a resumed run has no step left to take, which
    # may have been let end between two evaluations.
    begins, ends = done == 0, done > 0 and done >= config.steps
    if ends or (begins and config.lora):
        after = evaluate(model, judges, held_out, config, "ema")
    if first and (begins or (ends and "evaluation" not in lines[-1])):
        run.record(done, before, after, held_out, model.lora)
    for step in (bar := tqdm(range(done, config.steps), "dgpo", config.steps, initial=done, bar_format=BAR)):
        metrics = train_step(model, optimizer, judges[config.reward], rows_of_step(rows, step, config), step, config)
        done = step + 1
        if first:
            run.log({"step": done, **metrics})
            shown = {name: f"{metrics[name]:.3g}" for name in ("reward_mean", "loss", "kl")}
            bar.set_postfix({"held-out": f"{run.scores()[-1][1]:.3f}", **shown}, refresh=False)
        if done % config.eval_every == 0 or done == config.steps:
            after = evaluate(model, judges, held_out, config, "ema")
            if first:
                run.record(done, before, after, held_out, model.lora)
        if first and (done % config.save_every == 0 or done == config.steps):
            run.save(model, optimizer, done)
    if first:
        run.report(before[0], after[0], held_out)


# ---- EVALUATION: held-out prompts, always from the same noise ------------------------------------------------------


def evaluate(model, judges, rows, config, policy):
    """Score the policy on N prompts, K images each: (dict name -> scores [N, K], list of images).

    judges: dict name -> reward; rows: N dicts with "prompt", handed to the rewards as metadata.  Where a reward of 1
    means "all right", the strict accuracy "NAME, strict" stands before the reward itself.  The noises depend on nothing
    but the shape.  Many processes share the prompts; all get all scores, and the images of the PICTURED prompts.
    """
    K, shown = config.eval_images, max(0, PICTURED - own(len(rows)).start) if processes()[1] > 1 else len(rows)
    _, *drawn = rollout(model, rows, K, seeded("evaluation"), config.eval_num_inference_steps, policy, config)

    def share():
        scores = {}
        for name, reward in judges.items():
            score = reward(*drawn).view(-1, K)
            scores |= {f"{name}, strict": (score >= 1).float(), name: score} if reward.strict else {name: score}
        return scores, drawn[0][:shown * K]

    shares = gather(share)
    return ({name: torch.cat([scores[name] for scores, _ in shares]) for name in shares[0][0]},
            [image for _, images in shares for image in images])


def summarize(scores, rows):
    """Mean and standard error over prompts of scores [N, K], and the mean of each category: dict."""
    score, categories = scores.mean(1), [prompt_category(row["prompt"], row) for row in rows]      # [N]
    return {"score": score.mean().item(), "error": score.std(correction=0).item() / max(1, len(score) - 1) ** 0.5,
            "categories": {c: score[[c == have for have in categories]].mean().item()
                           for c in dict.fromkeys(categories)}}


def comparison(name, before, after, rows):
    """The table of scores [N, K] before and after, categories by rows: (text, whether they fell).

    A fall is a change of the mean below minus twice its standard error, which is taken over the same prompts.  Where
    `after` is `before` itself, nothing was trained and there is one column.
    """
    scores = {"score": before} if after is before else {"before": before, "after": after, "change": after - before}
    columns = {label: summarize(score, rows) for label, score in scores.items()}
    *_, last = columns.values()
    lines = [f"{name[-30:]:30s}" + "".join(f"{label:>10s}" for label in columns)]
    for category in last["categories"] if len(last["categories"]) > 1 else ():
        lines.append(f"{category:30s}" + "".join(f"{c['categories'][category]:10.3f}" for c in columns.values()))
    for label, key in (("all", "score"), ("standard error over prompts", "error")):
        lines.append(f"{label:30s}" + "".join(f"{c[key]:10.3f}" for c in columns.values()))
    return "\n".join(lines), "change" in columns and last["score"] < -2 * last["error"]


def picture_rows(images, captions):
    """A row for each of N captions, in the middle of its K of the N * K images of one size: a PIL image."""
    from diffusers.utils import make_image_grid
    (width, height), K, tiles = images[0].size, len(images) // len(captions), []
    side = max(96, min(width, 512))   # small pictures are shown larger, pixel by pixel, and large ones smaller
    size, how = (side, round(height * side / width)), Image.Resampling.NEAREST if width < side else None
    for i, caption in enumerate(captions):
        words = Image.new("RGB", size, "white")
        ImageDraw.Draw(words).text((6, 6), textwrap.fill(caption, side // 7), "black")
        row = [image.resize(size, how) for image in images[i * K:(i + 1) * K]]
        tiles += [*row[:K // 2], words, *row[K // 2:]]
    return make_image_grid(tiles, len(captions), K + 1)


# ---- MANY PROCESSES: torchrun starts them, each owns some of a step's groups ---------------------------------------


def processes():
    """(this process's number, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def own(count):
    """Which of `count` things in a row are this process's: a slice, empty if there are fewer things than processes."""
    rank, world = processes()
    return slice(count * rank // world, count * (rank + 1) // world)


def gather(function):
    """Call a function on every process: the list of what each returned.  A UserError on one is raised on all."""
    try:
        share = function()
    except UserError as error:
        share = error
    shares = [share] * processes()[1]
    if len(shares) > 1:
        dist.all_gather_object(shares, share)
    for share in shares:
        if isinstance(share, UserError):
            raise share
    return shares


def sum_gradients(weights):
    """Add up the processes' gradients, sent as one flat tensor.  One that has none, for want of groups, adds zeros."""
    if processes()[1] > 1:
        flat = torch.cat([(torch.zeros_like(t) if t.grad is None else t.grad).flatten() for t in weights])
        dist.all_reduce(flat)
        for t, gradient in zip(weights, flat.split([t.numel() for t in weights])):
            t.grad = gradient.view_as(t)


def join_processes():
    """Join the processes that torchrun started, if it did; only the first is heard.  Raises UserError."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        with blame("the processes cannot be joined (torchrun starts them)"):
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            if torch.cuda.is_available():   # what says only "cuda" means this one from now on
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if dist.get_rank():
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")


# ---- FILES: prompts, checkpoints, the run's folder -----------------------------------------------------------------


def load_prompts(path, *checks):
    """The rows of a file as dicts with the key "prompt", in order and as often as they stand there; no blank lines.

    A .jsonl file has one such dict a line, whose other fields are metadata for the reward, as GenEval's files do; any
    other file has one prompt a line.  checks: of rewards.  Raises UserError with the number of a line that is refused.
    """
    with blame(f"the prompt file {path} cannot be read"):
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line) if str(path).lower().endswith(".jsonl") else {"prompt": line.strip()}
            if not (isinstance(row, dict) and isinstance(row.get("prompt"), str) and row["prompt"].strip()):
                raise ValueError('not an object with a text as its "prompt"')
            row["prompt"].encode()   # JSON can hold half a surrogate pair, text cannot
            for check in checks:
                check(row["prompt"], row)
            rows.append(row)
        except (UserError, ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    if not rows:
        raise UserError(f"the prompt file {path} holds no prompt")
    return rows


def write_atomically(path, *parts):
    """Write bytes so that `path` is either the old file or the whole new one, whatever happens."""
    temporary = path.with_name("unfinished.tmp")   # one name: what a full disk leaves of it, the next write replaces
    with open(temporary, "wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(path, model, optimizer, metrics):
    """All that a run needs to go on, behind its checksum: the policies, AdamW's moments, the lines of metrics.jsonl."""
    policies, buffer = {p: [t.detach() for t in model.lora.weights(p)] for p in POLICIES}, io.BytesIO()
    torch.save({"policies": policies, "optimizer": optimizer.state_dict(), "metrics": metrics}, buffer)
    write_atomically(path, hashlib.sha256(buffer.getbuffer()).digest(), buffer.getbuffer())


def load_checkpoint(folder, model, optimizer):
    """Put a run's newest whole checkpoint in place; returns its metrics, [] if there is none.  Raises UserError."""
    paths = sorted((folder / "checkpoints").glob("*.pt"), reverse=True)
    for path in paths:
        data = memoryview(path.read_bytes())
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            print(f"the checkpoint {path} is damaged", file=sys.stderr)
            continue
        state = torch.load(io.BytesIO(data[32:]), "cpu", weights_only=True)
        with torch.no_grad(), blame(f"the checkpoint {path} is not of this model"):
            for policy in POLICIES:
                for t, saved in zip(model.lora.weights(policy), state["policies"][policy], strict=True):
                    t.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        return state["metrics"]
    if paths:
        raise UserError(f"all checkpoints in {folder / 'checkpoints'} are damaged")
    return []


class Run:
    """What a run's first process writes: config.json, metrics.jsonl, pictures, checkpoints/, lora/ and lora_best/."""

    def __init__(self, config, about, lines):
        """Make or reopen the folder, locked against other processes; about, lines: config.json's, metrics.jsonl's.

        Raises UserError for a folder that is in use, holds another run or, to resume, other files than it began with.
        """
        self.folder, self.config, self.lines, self.board = Path(config.output_dir), config, lines, None
        self.started = time.monotonic() - (lines[-1]["seconds"] if lines else 0)
        for name in ("checkpoints", "samples"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "lock", "w")   # until it is closed, at the latest with the process
        with blame(f"another process is writing to {self.folder}"):
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        began = self.folder / "config.json"
        if config.resume and json.loads(began.read_text())["checksum"] != about["checksum"]:
            raise UserError(f"the model, the prompts or the reward's file are not those that {self.folder} began with")
        if not config.resume and (any((self.folder / "checkpoints").iterdir()) or list(self.folder.glob("*.png"))):
            raise UserError(f"{self.folder} holds another run; --resume {self.folder} goes on with it")
        if config.tensorboard:
            with blame("--tensorboard does not work (is it installed?)"):
                self.board = importlib.import_module("torch.utils.tensorboard").SummaryWriter(self.folder)
        write_atomically(self.folder / "config.json", json.dumps({**vars(config), **about}, indent=2).encode())
        # A killed run has logged more than it has saved.
        write_atomically(self.folder / "metrics.jsonl", *(json.dumps(line).encode() + b"\n" for line in lines))

    def scores(self):
        """(step, held-out score) of every evaluation so far."""
        return [(line["step"], line["eval_score"]) for line in self.lines if "evaluation" in line]

    def log(self, line):
        """Append a line to metrics.jsonl, and hand its numbers to TensorBoard."""
        self.lines.append({**line, "seconds": round(time.monotonic() - self.started, 3)})
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(self.lines[-1]) + "\n")
        for name, value in self.lines[-1].items() if self.board else ():
            for inner, number in value.items() if isinstance(value, dict) else [("", value)]:
                if type(number) in (int, float) and name != "step":
                    self.board.add_scalar(f"{name}/{inner}".strip("/"), number, line["step"])

    def record(self, step, before, after, rows, lora):
        """Log and draw an evaluation beside the base model's, `evaluate`'s results; the best LoRA so far is kept."""
        (scores, images), (target, *judges), K = after, after[0], self.config.eval_images
        summary = {name: summarize(score, rows) for name, score in scores.items()}
        if summary[target]["score"] > max((score for _, score in self.scores()), default=math.inf):
            lora.export(self.folder / "lora_best", step=step, held_out_score=summary[target]["score"])
        self.log({"step": step, "evaluation": True, **{f"eval_{key}": v for key, v in summary[target].items()},
                  "eval_judges": {name: summary[name]["score"] for name in judges}})
        captions = [f"{row['prompt']}  {was.mean():.2f} -> {now.mean():.2f}"
                    for row, was, now in zip(rows[:PICTURED], before[0][target], scores[target])]
        picture = picture_rows([image for i in range(len(captions)) for part in (before[1], images)
                                for image in part[i * K:(i + 1) * K]], captions)
        picture.save(self.folder / f"samples/{step:06d}.png")
        if self.board:
            self.board.add_image("samples", np.asarray(picture), step, dataformats="HWC")
            self.board.flush()

    def save(self, model, optimizer, step):
        """Write the exported LoRA and a checkpoint; then only the newest two checkpoints stay."""
        model.lora.export(self.folder / "lora", step=step)   # first: what ends between the two is done again
        save_checkpoint(self.folder / f"checkpoints/{step:06d}.pt", model, optimizer, self.lines)
        for path in sorted((self.folder / "checkpoints").glob("*.pt"))[:-2]:
            path.unlink()

    def report(self, before, after, rows):
        """before_after.png, the last picture; a table of each of `evaluate`'s scores, a warning of judges that fell."""
        (self.folder / "before_after.png").write_bytes(max(self.folder.glob("samples/*.png")).read_bytes())
        target = next(iter(before))
        for name in before:
            text, fell = comparison(name, before[name], after[name], rows)
            print("\n" + text)
            if fell and name != target:
                print(f"{name} fell by more than two standard errors: look at the pictures, {target} may have been "
                      "gained at its cost (reward hacking)")
        print(f"\n{time.monotonic() - self.started:.0f} s in all; everything is in {self.folder}")


# ---- MAIN: from the command line to train() and from errors to sentences -------------------------------------------


def parse_arguments(arguments=None):
    """The command line, one flag a field, as a Config with nothing left open, alike on all processes."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --prompt-file FILE [--flag value ...]    (all flags: --help)", allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description=__doc__.split("\n\n")[0] + "  Defaults, those of the embedded job, stand in brackets.",
        epilog="Defaults with any other --model: " + ", ".join(f"{name} {value}" for name, value in PAPER.items()))
    for field in dataclasses.fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {
            "type": field.type, "choices": field.metadata["choices"]}
        shown = f" [{field.default}]" if field.default != "" and field.type is not bool else ""
        parser.add_argument(flag(field.name), help=field.metadata["help"] + shown, **kind)
    given, others = vars(parser.parse_args(arguments)), {}
    if given.get("resume"):
        with blame(f"--resume {given['resume']}: there is no run that this version can go on with"):
            stored = json.loads((Path(given["resume"]) / "config.json").read_text())
            others = {field.name: stored[field.name] for field in dataclasses.fields(Config)}
        for name, value in given.items():
            if not Config.__dataclass_fields__[name].metadata["free"] and value != others[name]:
                raise UserError(f"{flag(name)} {value}: the run in {given['resume']} has {others[name]}")
    elif given.get("model") and Path(given["model"]).resolve() != EMBEDDED_MODEL:
        others = PAPER
    config = Config(**{**others, **given})
    if not config.prompt_file:
        raise UserError("--prompt-file is missing")
    path = Path(config.prompt_file)
    beside = [path.parent / f"{path.stem}_heldout.txt", path.parent / "heldout.txt"]
    config.eval_prompt_file = config.eval_prompt_file or str(next(filter(Path.exists, beside), ""))
    config.model = config.model or str(EMBEDDED_MODEL)
    for name in ("prompt_file", "eval_prompt_file", "model", "lora"):   # a run may be resumed from another folder
        if os.path.exists(getattr(config, name)):
            setattr(config, name, os.path.abspath(getattr(config, name)))
    config.device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    config.output_dir = config.resume or config.output_dir or time.strftime(f"runs/%Y-%m-%d-%H%M%S-{os.getpid()}")
    return gather(lambda: config)[0]


def prepare(config):
    """Everything that can go wrong before the first file is written: (model, judges, rows, held_out).

    judges: dict name -> reward, the one trained on and then those that only watch.
    """
    config.check()
    with blame(f"--device {config.device} cannot be used"):
        torch.empty(0, device=config.device)
    load_prompts(config.prompt_file)   # before anything large is loaded
    if not config.eval_prompt_file:
        raise UserError("--eval-prompt-file is missing, and there is no heldout.txt beside the prompt file")
    names = [config.reward, *filter(None, config.eval_reward.split(","))]
    judges = {name: load_reward(name, config.device) for name in names}
    rows = load_prompts(config.prompt_file, judges[config.reward].check)
    held_out = load_prompts(config.eval_prompt_file, *(reward.check for reward in judges.values()))
    held_out = list({row["prompt"]: row for row in held_out}.values())
    # Drawn once and for all: published files are sorted by category.
    order = torch.randperm(len(held_out), generator=seeded("held out")).tolist()
    held_out = [held_out[i] for i in sorted(order[:config.eval_prompts or None])]
    model = load_model(config)
    if config.lora:
        model.lora.load(config.lora)
    print(f"{sum(t.numel() for t in model.lora.weights('current')) / 1e6:.2f} M LoRA parameters in "
          f"{len(model.lora.layers)} layers; {len(rows)} training and {len(held_out)} held-out prompts; "
          f"writing to {config.output_dir}", flush=True)
    return model, judges, rows, held_out


def provenance(model, judges, rows, held_out):
    """What config.json says besides the settings: what the run depends on besides them, and when it was made."""
    weights = [layer.base.weight[0].tolist() for layer in model.lora.layers.values()]   # all would be gigabytes
    files = [Path(file).read_bytes() for reward in judges.values() for file in reward.files]
    commit = subprocess.run("git describe --always --dirty", shell=True, cwd=EMBEDDED_MODEL.parent.parent,
                            capture_output=True, text=True).stdout.strip()
    content = repr([weights, files, rows, held_out]).encode()
    return {"checksum": hashlib.sha256(content).hexdigest(), "commit": commit,
            "date": time.strftime("%Y-%m-%d %H:%M"), "held_out": [row["prompt"] for row in held_out],
            "versions": {name: sys.modules[name].__version__ for name in ("torch", "diffusers", "transformers")}}


def main(arguments=None):
    """The command line.  Exit codes: 0 done, 1 something failed, 2 a setting or a reward to mend, 130 Ctrl-C."""
    folder = Path("runs")
    try:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")   # of what the terminal cannot show
        join_processes()
        config = parse_arguments(arguments)
        folder = Path(config.output_dir)
        train(config)
        return 0
    except UserError as error:
        code, message = 2, str(error)
    except SystemExit as error:   # argparse's, after --help or its own sentence
        return error.code
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except Exception as error:   # what nobody foresaw, too, ends in a sentence
        code, message = 1, f"{type(error).__name__}: {str(error).strip()}"
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
            message = ("out of memory: lower --batch-size, --group-size, --resolution or --lora-rank, or give "
                       "--gradient-checkpointing")
        trace = folder / f"traceback{processes()[0] or ''}.txt"   # one a process: the others fail for want of the first
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            trace.write_text(traceback.format_exc())
            message += f"; {trace} says where it failed"
    if code != 2 and (folder / "config.json").exists():
        message += f"; --resume {folder} goes on from its last checkpoint"
    print("dgpo.py: error:", " ".join(message.split()), file=sys.stderr)
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):   # torchrun's last words are what this file says
        said = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(said))
    return code


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)   # one of many processes would first end its group, which can wait for ever for gloo's threads
