"""DGPO: Direct Group Preference Optimization, reinforcement learning for flow-matching text-to-image models.

    python dgpo.py --prompt-file shapes/prompts.txt           # the embedded model, two CPU cores, about ten minutes
    torchrun --nproc-per-node 8 dgpo.py --prompt-file …       # eight GPUs, the same run
    python dgpo.py --help                                     # every setting

Reference: "Reinforcing Diffusion Models by Direct Group Preference Optimization", Luo, Hu, Tang, ICLR 2026,
arXiv 2510.08425; equation numbers below are the paper's.  The idea in five lines: for a prompt, draw a group of images
with a *deterministic* ODE solver; score them; let the standardised rewards A_i split the group into a preferred and a
rejected set weighted by |A_i|; and train the model so that the flow-matching error of the preferred images falls,
relative to a reference model's, and that of the rejected ones rises.  As the weights of both sets are equal, the
partition function of the preference model cancels, and no stochastic policy is needed anywhere.

Conventions, those of diffusers: x_t = (1 - sigma) x0 + sigma noise, velocity = noise - x0, sigma = 1 is noise and 0 is
data.  Shapes at the right margin: P prompts (groups), G images a group, B = P*G, M timesteps a rollout, R (group,
timestep) rows, and [C, H, W] a latent.

Where to read: the method is FLOW MATCHING, GROUP PREFERENCES, LORA, ROLLOUT, UPDATE and, calling them by name, TRAIN.
SETTINGS, THE MODEL, EVALUATION, MANY PROCESSES, FILES and MAIN make a command of it that can be trusted for days.

Departures from the paper and from its authors' published settings:
 1. Timesteps are drawn from the continuous interval [shift(t_min), 1], one in each of M equal strata, not from the
    rollout's grid: a grid of 10 steps has only 5 or 6 points above t_min, and strata lower the gradient's variance.
 2. `--updates-per-rollout` may split the M timesteps over several optimizer steps (the authors take one).
 3. Groups without signal (all rewards equal) are not trained on at all, so the KL term leaves them out too.
 4. For the embedded job the learning rate falls; the authors' is constant.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import json
import math
import os
import random
import signal
import sys
import textwrap
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from rewards import UserError, load_reward, prompt_category, quiet_libraries

# ------------------------------------------------------------------------------------------------
# SETTINGS: this list is the command line
# ------------------------------------------------------------------------------------------------


MAX_SKIPPED = 10   # steps in a row whose gradient may be infinite before a run gives up
PICTURED = 12      # held-out prompts whose images are shown
EMBEDDED_MODEL = Path(__file__).resolve().parent / "shapes/model"


def setting(default, help, low=1, high=10 ** 9, **argparse_options):
    """A field of Config with its --help text and, for a number, the bounds of its values."""
    options = {"help": help, **argparse_options}
    return dataclasses.field(default=default, metadata={"bounds": (low, high), "argparse": options})


def flag(name):
    """A field's name as it is typed."""
    return "--" + name.replace("_", "-")


# The defaults for any model but the embedded one: the authors' settings for SD3.5-M, as their code runs them.  A batch
# of 24 guided images is 48 in the transformer; gradient checkpointing lets 24 samples be trained on in 24 GB.
PAPER = dict(
    dtype="bfloat16", reward="pickscore", steps=1000, groups_per_step=24, group_size=24, num_inference_steps=10,
    guidance_scale=4.5, resolution=512, max_sequence_length=128, rollout_old_after=200, t_min=0.4,
    updates_per_rollout=1, beta=100.0, clip_range=1e-2, kl_weight=2e-2, old_decay=0.3, old_decay_ramp=1e-3,
    learning_rate=3e-4, learning_rate_decay=0, lora_rank=64, ema_decay=0.987, rollout_batch_size=24,
    train_batch_size=24, gradient_checkpointing=True, eval_num_inference_steps=14)
RECIPES = {
    "geneval": dict(reward="geneval", eval_reward="pickscore,aesthetic", t_min=0.599, rollout_old_after=500,
                    ema_decay=0.974),
    "ocr": dict(reward="ocr", eval_reward="pickscore,aesthetic", advantage_std="batch", ema_decay=0.974),
    # Near step 240 the judges begin to pay for the reward.
    "pickscore": dict(reward="pickscore", eval_reward="aesthetic,clipscore", advantage_std="batch", clip_range=5e-2,
                      ema_decay=0.949, steps=240)}
MODES = {
    "guided": {},
    "guidance-free": dict(guidance_scale=1.0, reference_guidance_scale=4.5, kl_weight=1e-3, clip_range=1e-4),
    "moving-reference": dict(guidance_scale=1.0, reference="old", beta=2000.0, kl_weight=1e-3, clip_range=1e-5)}


@dataclass
class Config:
    """Every setting of a run, with the defaults of the embedded job; PAPER has those for other models."""

    # Task
    prompt_file: str = setting("", "training prompts: one a line, or .jsonl with `prompt` and metadata", required=True)
    eval_prompt_file: str = setting("", "held-out prompts (default: heldout.txt beside the prompt file, else a "
                                        "fixed tenth of it)")
    recipe: str = setting("", "the authors' settings for a task on SD3.5-M; a flag that is given goes before",
                          choices=("", *RECIPES))
    mode: str = setting("guided", "guided rollouts; none; or none and the old policy as the reference", choices=MODES)
    model: str = setting("shapes/model", "SD3-family pipeline: a folder in diffusers' format, or a hub id")
    t5: bool = setting(True, "load the T5 text encoder; without it, zeros take its tokens' place")
    reward: str = setting("shapes", "reward: NAME, NAME=FOLDER, file.py:function, or a sum NAME:weight,NAME:weight")
    eval_reward: str = setting("", "judges that are watched at every evaluation and not trained on: NAME,NAME")
    evaluate: bool = setting(False, "only score all prompts of --prompt-file, one column a reward, and with --lora")
    lora: str = setting("", "with --evaluate: a run's lora/ folder, compared with the model without it")
    output_dir: str = setting("", "where everything is written (default: runs/<date-time>)")
    resume: bool = setting(False, "go on with the run in --output-dir")
    steps: int = setting(150, "training steps (one rollout of all groups each)")
    seed: int = setting(0, "seed of LoRA, prompt order and noises", low=0)
    device: str = setting("", "cpu, cuda, ... (default: cuda if there is one)")
    dtype: str = setting("float32", "dtype of the frozen model", choices=("float32", "bfloat16"))
    # Rollout
    groups_per_step: int = setting(8, "P, prompts a step (paper: 24)")
    group_size: int = setting(12, "G, images a prompt (paper: 24)", low=2)
    num_inference_steps: int = setting(6, "solver steps of a rollout (paper: 10)")
    solver: str = setting("dpm++2m", "ODE solver of rollouts and evaluation", choices=("euler", "dpm++2m"))
    guidance_scale: float = setting(1.0, "guidance of rollouts and evaluation, up to 1: none (paper: 4.5)", low=0)
    shift: float = setting(3.0, "timestep shift of solver and training (paper: 3)", low=1e-3)
    resolution: int = setting(0, "image side in pixels, 0 for the model's own (paper: 512)", low=0)
    max_sequence_length: int = setting(1, "T5 tokens; without a T5, the zero tokens in its place (paper: 128)", low=0)
    rollout_old_after: int = setting(0, "rollouts use the old policy after that many updates, 0: never (paper: 200)", low=0)
    # Objective
    beta: float = setting(10.0, "strength of the preference inside the sigmoid (paper: 10 to 100)", low=1e-6)
    t_min: float = setting(0.3, "lowest timestep trained on, before the shift (paper: 0.599 or 0.4)", low=0, high=0.99)
    timesteps_per_rollout: int = setting(4, "M, timesteps trained on for each group (paper: 4)")
    updates_per_rollout: int = setting(4, "optimizer steps the M timesteps are split over (paper: 1)")
    advantage_std: str = setting("group", "standardise advantages within group or batch", choices=("group", "batch"))
    clip_range: float = setting(0.01, "PPO-style clip of exp(old error - error), 0: none (paper: 1e-2, 5e-2)", low=0)
    kl_weight: float = setting(0.01, "weight of mean (v - v_frozen)^2 (paper: 2e-2)", low=0)
    reference: str = setting("frozen", "whose error S compares with: the frozen model's, or the old policy's (TDM-R1)",
                             choices=("frozen", "old"))
    reference_guidance_scale: float = setting(1.0, "guidance of the frozen model's velocity, as reference and in the "
                                                   "KL term; an old policy's is never guided (paper: 1)", low=0)
    old_decay: float = setting(0.5, "EMA decay of the old policy, an update (paper: 0.3)", low=0, high=1)
    old_decay_ramp: float = setting(1.0, "old_decay is at most this times the updates done before (paper: 0.001)", low=0)
    # Optimisation
    learning_rate: float = setting(7e-4, "AdamW's learning rate (paper: 3e-4, constant)", low=0)
    learning_rate_decay: int = setting(200, "k steps in, the rate is divided by sqrt(1 + k / this), 0: constant", low=0)
    weight_decay: float = setting(1e-4, "AdamW's weight decay (paper: 1e-4)", low=0)
    max_grad_norm: float = setting(1.0, "gradient-norm clipping (paper: 1)", low=0)
    lora_rank: int = setting(32, "LoRA rank; alpha is twice the rank (paper: 32 or 64)")
    lora_targets: str = setting("attn.to_q,attn.to_k,attn.to_v,attn.to_out.0,attn.add_q_proj,attn.add_k_proj,"
                                "attn.add_v_proj,attn.to_add_out", "name endings of the layers that get a LoRA; not "
                                "SD3.5's second attention, attn2 (paper: the same)")
    ema_decay: float = setting(0.98, "EMA decay, an update, of the exported weights (paper: 0.9 in 8)", low=0, high=1)
    # Compute
    rollout_batch_size: int = setting(256, "images sampled at once")
    train_batch_size: int = setting(96, "samples in one backward pass; does not change the gradient")
    text_cache_size: int = setting(2048, "prompts kept encoded ahead, in main memory, besides the held-out ones")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, slower")
    compile: bool = setting(False, "compile the transformer's blocks, once for all batch sizes")
    # Evaluation and saving
    eval_every: int = setting(50, "steps between evaluations on held-out prompts")
    eval_prompts: int = setting(0, "held-out prompts used, the first N of the file, 0 for all", low=0)
    eval_images: int = setting(4, "images a held-out prompt, from noises that stay the same")
    eval_num_inference_steps: int = setting(10, "solver steps of evaluation (paper: 40)")
    save_every: int = setting(50, "steps between checkpoints")
    keep_checkpoints: int = setting(2, "how many of the newest checkpoints stay")
    log_with: str = setting("", "log the numbers of metrics.jsonl there as well", choices=("", "tensorboard", "wandb"))

    def check(self):
        """Refuse values that make no sense, each by name.  Raises UserError."""
        for field in dataclasses.fields(self):
            value, (low, high) = getattr(self, field.name), field.metadata["bounds"]
            if field.type in (int, float) and not low <= value <= high:
                raise UserError(f"{flag(field.name)} must lie between {low:g} and {high:g}, not {value}")
        if self.timesteps_per_rollout % self.updates_per_rollout:
            raise UserError(f"--updates-per-rollout {self.updates_per_rollout} must divide "
                            f"--timesteps-per-rollout {self.timesteps_per_rollout}")
        if self.lora and not self.evaluate:
            raise UserError("--lora is for --evaluate: a run starts from the model, or goes on with --resume")


# ------------------------------------------------------------------------------------------------
# FLOW MATCHING: time, noise and the deterministic solvers (paper, section 2)
# ------------------------------------------------------------------------------------------------


def shift_time(t, shift):
    """Move timesteps t in [0, 1] (number or tensor) towards noise, as SD3 does at higher resolutions."""
    return shift * t / (1 + (shift - 1) * t)


def ode_sigmas(num_steps, shift, solver="euler"):
    """The solver's noise levels, falling to 0: float32 [num_steps + 1].

    "euler": FlowMatchEulerDiscreteScheduler's, from 1 to the shifted 1/1000 and then 0.  "dpm++2m": the flow sigmas of
    DPMSolverMultistepScheduler, from the shifted 0.999 in equal steps (before the shift) to 0.  On Euler's grid the last
    step but one is tiny, and a multistep method would extrapolate from it over a far longer one in lambda.
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
    falling, on the CPU.
    solver: "euler", or "dpm++2m", DPM-Solver++ for flows: second-order multistep on the data prediction
    x0 = x - sigma v in lambda = log((1 - sigma) / sigma) (arXiv 2211.01095).  Both are deterministic.
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


# ------------------------------------------------------------------------------------------------
# GROUP PREFERENCES: advantages (Eq. 12-14), loss (Eq. 17), clip
# ------------------------------------------------------------------------------------------------


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


def past_clip(error, old_error, advantages, clip_range):
    """Which samples moved far enough from the old policy already: bool [P, G] from [P, G] each.

    With ratio = exp(old_error - error): preferred ones (A > 0) at ratio > 1 + clip_range, rejected ones (A < 0) at
    ratio < 1 - clip_range.
    """
    ratio = torch.exp(old_error - error.detach())
    return ((advantages > 0) & (ratio > 1 + clip_range)) | ((advantages < 0) & (ratio < 1 - clip_range))


def clip_error(error, old_error, advantages, clip_range):
    """PPO-style clip, [P, G] each: the same errors, with no gradient for the samples that are `past_clip`.

    The error of a rejected sample can grow without bound, and would; values stay, so S keeps its meaning.
    """
    return torch.where(past_clip(error, old_error, advantages, clip_range), error.detach(), error)


# ------------------------------------------------------------------------------------------------
# LORA AND THE POLICIES: one frozen model, several sets of low-rank weights
# ------------------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """y = W x + (alpha / rank) up down x (arXiv 2106.09685), with `policies` to choose (down, up) from.

    `active` is the pair in force, or None for W alone.
    """

    def __init__(self, base, rank, scale, generator):
        super().__init__()
        self.base, self.scale, self.active, self.policies = base, scale, None, {}
        # As in the LoRA paper, `down` is Gaussian and `up` zero: every policy starts as the base model.  Kept in fp32
        # whatever the base's dtype, because the steps of AdamW are smaller than bf16 can add.
        down = torch.randn(rank, base.in_features, generator=generator) / rank
        up = torch.zeros(base.out_features, rank)
        self.policies["current"] = [t.to(base.weight.device).requires_grad_() for t in (down, up)]

    def forward(self, x):
        """[..., in] -> [..., out] in the base's dtype."""
        y = self.base(x)
        if self.active is None:
            return y
        # Kept in fp32, used in the activations' dtype: on a GPU, matrix products in fp32 are many times slower.
        down, up = (t.to(x.dtype) for t in self.active)
        return y + F.linear(F.linear(x, self.scale * down), up)


class LoRA:
    """The LoRA layers of a transformer and their policies: "current" (trained), "old" and "ema".

    The frozen model, "base", is the one with LoRA off.
    """

    def __init__(self, transformer, rank, alpha, targets, seed=0):
        transformer.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        self.layers = {}
        for name, module in list(transformer.named_modules()):
            if isinstance(module, nn.Linear) and name.endswith(tuple("." + target for target in targets)):
                parent, _, leaf = name.rpartition(".")
                self.layers[name] = LoRALinear(module, rank, alpha / rank, generator)
                setattr(transformer.get_submodule(parent), leaf, self.layers[name])
        if not self.layers:
            raise UserError(f"no linear layer of the model is named like --lora-targets {','.join(targets)}")
        for policy in ("old", "ema"):
            for layer in self.layers.values():
                layer.policies[policy] = [t.detach().clone() for t in layer.policies["current"]]

    def weights(self, policy):
        """The policy's tensors in a fixed order: [down, up, down, up, ...]."""
        return [t for layer in self.layers.values() for t in layer.policies[policy]]

    def select(self, policy):
        """Make `policy` the one whose velocity the transformer computes; one without weights is the frozen model."""
        for layer in self.layers.values():
            layer.active = layer.policies.get(policy)

    @torch.no_grad()
    def follow(self, policy, decay):
        """Move a policy towards the current one: theta^- <- decay theta^- + (1 - decay) theta."""
        torch._foreach_lerp_(self.weights(policy), self.weights("current"), 1 - decay)

    def load(self, folder, policy="ema"):
        """Read what `export` wrote into one policy, of whatever rank it is.  Raises UserError."""
        path = Path(folder) / "pytorch_lora_weights.safetensors"
        try:
            tensors = load_file(path)
            for name, layer in self.layers.items():
                down, up = (tensors.pop(f"transformer.{name}.lora_{key}.weight") for key in "AB")
                device = layer.base.weight.device
                layer.policies[policy] = [down.float().to(device), up.float().to(device) / layer.scale]
        except (OSError, SafetensorError) as error:
            raise UserError(f"--lora {folder}: {path.name} there cannot be read: {error}") from error
        except KeyError as error:
            raise UserError(f"--lora {folder} has no {error}: give the --lora-targets it was trained with") from error
        if tensors:
            raise UserError(f"--lora {folder} has {next(iter(tensors))}, which --lora-targets leaves out")

    def export(self, folder, policy="ema"):
        """Write one policy as diffusers' LoRA file, for `pipe.load_lora_weights(folder)`."""
        tensors = {}
        for name, layer in self.layers.items():
            down, up = layer.policies[policy]
            # alpha / rank is folded into `up`, as the file then means the same to every version of diffusers.
            tensors[f"transformer.{name}.lora_A.weight"] = down.detach().cpu().contiguous()
            tensors[f"transformer.{name}.lora_B.weight"] = (layer.scale * up.detach()).cpu().contiguous()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "pytorch_lora_weights.safetensors",
                         lambda temporary: save_file(tensors, temporary, {"format": "pt"}))


# ------------------------------------------------------------------------------------------------
# THE MODEL: all that the loop knows of the SD3 family; put another class here for another model
# ------------------------------------------------------------------------------------------------


def load_pipeline(path, config):
    """A StableDiffusion3Pipeline in main memory, from a folder (no hub is asked) or a hub id.  Raises UserError."""
    # Imported late, and quietly, so that --help and errors of the command line come at once.
    quiet_libraries()
    from diffusers import StableDiffusion3Pipeline
    from diffusers.utils import logging as diffusers_logging
    diffusers_logging.set_verbosity_error()
    local = os.path.isdir(path)
    if local:
        diffusers_logging.disable_progress_bar()
    dtypes = {"default": getattr(torch, config.dtype), "vae": torch.float32}
    absent = {} if config.t5 else {"text_encoder_3": None, "tokenizer_3": None}
    try:
        if local:
            index = json.loads((Path(path) / "model_index.json").read_text())
            if index["_class_name"] != "StableDiffusion3Pipeline":
                raise ValueError(f"it holds a {index['_class_name']}, not a StableDiffusion3Pipeline")
            # from_pretrained wants to be told which modules a folder leaves out (SD3 without T5).
            absent |= {name: None for name, value in index.items() if value == [None, None]}
        return StableDiffusion3Pipeline.from_pretrained(path, dtype=dtypes, local_files_only=local, **absent)
    except Exception as error:  # a folder can be wrong in many ways, and diffusers has an exception for each
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not local:
            reason += ("; for a hub id, accept the licence on its page and run `hf auth login`, check the network, or "
                       "give a folder with the files")
        raise UserError(f"--model {path} cannot be loaded as an SD3 pipeline: {reason}") from error


class SD3:
    """Stable Diffusion 3 and 3.5 through diffusers' pipeline: encode prompts, velocity, decode."""

    def __init__(self, pipe, config):
        """Take a StableDiffusion3Pipeline: the model goes to the device, the text encoders wait in main memory."""
        self.pipe, self.vae, self.transformer = pipe, pipe.vae, pipe.transformer
        self.device, self.dtype = torch.device(config.device), getattr(torch, config.dtype)
        self.max_sequence_length = config.max_sequence_length
        self.encoders = [e for e in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3) if e is not None]
        for module in (self.vae, self.transformer, *self.encoders):
            module.requires_grad_(False).eval()
        for encoder in self.encoders:
            encoder.to(self.dtype)
        self.transformer.to(self.device, self.dtype)
        self.vae.to(self.device, torch.float32)   # the half types overflow in it or cost it visible precision
        self.lora = LoRA(self.transformer, config.lora_rank, 2 * config.lora_rank, config.lora_targets.split(","),
                         config.seed)
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if config.compile:
            for block in self.transformer.transformer_blocks:   # one by one: they share their code, hence the compiling
                block.compile(dynamic=True)
        shape, factor = self.transformer.config, 2 ** (len(self.vae.config.block_out_channels) - 1)
        step, most = shape.patch_size * factor, shape.patch_size * factor * shape.pos_embed_max_size
        if config.resolution % step or config.resolution > most:
            raise UserError(f"--resolution {config.resolution}: this model wants a multiple of {step}, at most {most}")
        side = config.resolution // factor or shape.sample_size
        self.latent_shape = (shape.in_channels, side, side)
        # An image of 1024 x 1024 takes about 4 GB to decode, so pixels, not images, are what is counted.
        self.decode_batch_size = max(1, 2 ** 21 // (side * factor) ** 2)
        self.texts = {}

    def too_long(self, prompts):
        """Which prompts every tokenizer cuts off, so that no encoder sees their end: a list."""
        # A token is at least a byte: this spares the tokenizers nearly every prompt.
        prompts = [p for p in dict.fromkeys(prompts) if len(p.encode()) + 2 > self.pipe.tokenizer_max_length]
        limits = ((self.pipe.tokenizer, self.pipe.tokenizer_max_length),
                  (self.pipe.tokenizer_2, self.pipe.tokenizer_max_length),
                  (self.pipe.tokenizer_3, self.max_sequence_length))
        for tokenizer, limit in limits:
            if prompts and tokenizer is not None:
                prompts = [p for p, ids in zip(prompts, tokenizer(prompts).input_ids) if len(ids) > limit]
        return prompts

    @torch.no_grad()
    def encode(self, prompts):
        """Encode the prompts that are not remembered yet, in batches, and forget all others.

        The text encoders visit the device for this only, and the embeddings stay in main memory: with a T5, one prompt
        is 2.7 MB.
        """
        self.texts = {p: self.texts.get(p) for p in prompts}
        missing = [p for p, text in self.texts.items() if text is None]
        for encoder in self.encoders if missing else ():
            encoder.to(self.device)
        for i in range(0, len(missing), 16):
            batch = missing[i:i + 16]
            # Always of one size: how a row is rounded depends on it, and a resumed run is to see the same embeddings.
            tokens, _, pooled, _ = self.pipe.encode_prompt(
                batch + [""] * (16 - len(batch)), None, None, do_classifier_free_guidance=False, device=self.device,
                max_sequence_length=self.max_sequence_length)
            for prompt, *text in zip(batch, tokens.cpu(), pooled.cpu()):
                self.texts[prompt] = [part.clone() for part in text]   # a view would keep its whole batch
        for encoder in self.encoders if missing else ():
            encoder.to("cpu")

    def embeddings(self, prompts):
        """List of B strings -> (token embeddings [B, L, D], pooled embeddings [B, D]) on the device."""
        place = {p: i for i, p in enumerate(dict.fromkeys(prompts))}
        if any(p not in self.texts for p in place):
            self.encode([*self.texts, *place])
        index = torch.tensor([place[p] for p in prompts], device=self.device)
        return tuple(torch.stack(parts).to(self.device)[index] for parts in zip(*(self.texts[p] for p in place)))

    def velocity(self, x, sigma, prompts, policy, guidance_scale=1.0):
        """The policy's velocity at x [B, C, H, W] for B prompts, float32 [B, C, H, W]; sigma: a number, 0-d, or [B].

        policy: "current", "old", "ema", or "base" for the frozen model.
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


# ------------------------------------------------------------------------------------------------
# ROLLOUT (Algorithm 1, lines 3-5)
# ------------------------------------------------------------------------------------------------


def seeded(*numbers):
    """A CPU generator that depends on the numbers alone: a step's noise is the same however a run got there."""
    return torch.Generator().manual_seed(random.Random(repr(numbers)).getrandbits(63))


@torch.no_grad()
def rollout(model, prompts, noise, num_steps, policy, config, bar=None):
    """Images for B prompts, perhaps none, from noise [B, C, H, W]: (latents x0 [B, C, H, W], list of B PIL images)."""
    sigmas = ode_sigmas(num_steps, config.shift, config.solver)   # on the CPU: the solver never waits for a GPU
    latents, images = [], []
    for i in range(0, len(prompts), config.rollout_batch_size):
        def velocity(x, sigma, batch=prompts[i:i + config.rollout_batch_size]):
            if bar is not None:
                bar.update()
            return model.velocity(x, sigma, batch, policy, config.guidance_scale)

        start = noise[i:i + config.rollout_batch_size].to(model.device)
        latents.append(sample_ode(velocity, start, sigmas, config.solver))
        if not latents[-1].isfinite().all():
            raise UserError(f"the {policy} model draws images that are not finite: a lower --learning-rate or another "
                            "--dtype may help; --resume goes on from the last checkpoint")
        images += model.decode(latents[-1])
    return torch.cat(latents or [noise]), images


# ------------------------------------------------------------------------------------------------
# UPDATE (Algorithm 1, lines 6-9)
# ------------------------------------------------------------------------------------------------


def accumulate_gradients(model, x0, prompts, advantages, sigma, noise, config, total_rows):
    """Add the gradient of loss + KL over R rows, one row a group at one timestep, to the LoRA's .grad.

    x0: [R, G, C, H, W]; prompts: R strings; advantages: [R, G]; sigma: [R]; noise: [R, 1, C, H, W], shared by the group
    so that its samples differ in x0 alone and the noise cancels between preferred and rejected.  Means are taken over
    `total_rows`, which counts the groups left out for want of signal.  Micro-batches are whole groups or, where a group
    is larger than train_batch_size, parts of one; the gradient is the full batch's either way, since S of Eq. 17 is
    always the whole group's.  Returns sums over rows: dict of floats.
    """
    R, G = advantages.shape
    parts = [slice(i, i + config.train_batch_size) for i in range(0, G, config.train_batch_size)]
    x_t, target = add_noise(x0, noise, sigma.view(-1, *[1] * (x0.ndim - 1)))                       # [R, G, C, H, W]

    def velocity(rows, part, policy, guidance_scale=1.0):                                          # [r, g, C, H, W]
        x = x_t[rows, part]
        repeated = [prompt for prompt in prompts[rows] for _ in range(x.shape[1])]
        each_sigma = sigma[rows].repeat_interleave(x.shape[1])
        return model.velocity(x.flatten(0, 1), each_sigma, repeated, policy, guidance_scale).view(x.shape)

    def whole(rows, policy, guidance_scale=1.0):                                                   # [r, G, C, H, W]
        return torch.cat([velocity(rows, part, policy, guidance_scale) for part in parts], 1)

    def mean_squared(difference):                                                                  # [r, g]
        return difference.pow(2).flatten(2).mean(2)

    sums = dict.fromkeys(("loss", "kl", "clip_fraction"), 0.0)
    rows_at_once = max(1, config.train_batch_size // G)
    for rows in (slice(i, i + rows_at_once) for i in range(0, R, rows_at_once)):
        A = advantages[rows]                                                                       # [r, G]
        # One forward for each policy: all in one batch, they were slower on a CPU but for the smallest batches.
        with torch.no_grad():
            frozen = whole(rows, "base", config.reference_guidance_scale)
            if config.clip_range or config.reference == "old":
                old_error = mean_squared(whole(rows, "old") - target[rows])
            ref_error = old_error if config.reference == "old" else mean_squared(frozen - target[rows])
            if len(parts) > 1:
                group_error = mean_squared(whole(rows, "current") - target[rows])
        for part in parts:
            v = velocity(rows, part, "current")
            error = mean_squared(v - target[rows, part])                                           # [r, g]
            # To the frozen model even where the reference of S moves: without an anchor, all errors drift upwards.
            kl = mean_squared(v - frozen[:, part])                                                 # [r, g]
            if len(parts) > 1:
                error = group_error.slice_scatter(error, 1, part.start, min(part.stop, G))         # [r, G]
            live = clip_error(error, old_error, A, config.clip_range) if config.clip_range else error
            loss = dgpo_loss(live, ref_error, A, config.beta) * len(A)
            (loss / total_rows + config.kl_weight * kl.sum() / (total_rows * G)).backward()
            sums["kl"] += kl.detach().sum() / G
        sums["loss"] += loss.detach()
        if config.clip_range:
            sums["clip_fraction"] += past_clip(error, old_error, A, config.clip_range).float().mean(1).sum()
    return {name: float(value) for name, value in sums.items()}   # read once: every reading waits for the GPU


def optimizer_step(model, optimizer, done, config):
    """Take the `done + 1`-th step of a run on the gradients there are, and let the other policies follow.

    Returns the gradient's norm; where that is not finite nothing moves.
    """
    norm = nn.utils.clip_grad_norm_(model.lora.weights("current"), config.max_grad_norm).item()
    if config.learning_rate_decay:
        # A function of the step alone, not of --steps: a run can be made longer without having been another run.
        step = done // config.updates_per_rollout
        for parameters in optimizer.param_groups:
            parameters["lr"] = config.learning_rate / (1 + step / config.learning_rate_decay) ** 0.5
    if math.isfinite(norm):   # one that is not would spoil every weight and AdamW's moments for good
        optimizer.step()
        model.lora.follow("old", min(config.old_decay, config.old_decay_ramp * done))
        # Early on a long average would be mostly the untrained model: (1 + k) / (10 + k) opens it gradually.
        model.lora.follow("ema", min(config.ema_decay, (2 + done) / (11 + done)))
    optimizer.zero_grad(set_to_none=True)
    return norm


def update(model, optimizer, x0, prompts, advantages, config, step, bar=None, accumulate=accumulate_gradients):
    """All optimizer steps on one rollout: x0 [P, G, C, H, W], P prompts, advantages [P, G].  Returns metrics.

    Of many processes each has only its own groups' x0 (see `own`), and the prompts and advantages of all.
    `accumulate` is the update rule: benchmarks/baselines.py puts those of other methods in its place.
    """
    P, M, steps, mine = len(prompts), config.timesteps_per_rollout, config.updates_per_rollout, own(len(prompts))
    generator = seeded(config.seed, "update", step)
    # Drawn for all P groups, so that a group's draws do not depend on who owns it.
    sigma = draw_timesteps(P, M, config.t_min, config.shift, generator)[mine].to(model.device)     # [P, M]
    noise = torch.randn(P, M, 1, *x0.shape[2:], generator=generator)[mine].to(model.device)        # [P, M, 1, C, H, W]
    with_signal = int((advantages != 0).any(1).sum())
    prompts, advantages = prompts[mine], advantages[mine]
    useful = advantages.abs().sum(1).nonzero()[:, 0].cpu()
    totals = dict.fromkeys(("loss", "kl", "clip_fraction", "gradient_norm", "skipped_updates"), 0.0)
    for k in range(steps if with_signal else 0):
        columns = range(k * M // steps, (k + 1) * M // steps)
        group, column = (t.flatten() for t in torch.meshgrid(useful, torch.tensor(columns), indexing="ij"))
        sums = {}
        if len(group):
            sums = accumulate(model, x0[group], [prompts[g] for g in group], advantages[group],
                              sigma[group, column], noise[group, column], config, P * len(columns))
        sum_gradients(model.lora.weights("current"))
        norm = optimizer_step(model, optimizer, step * steps + k, config)
        if not math.isfinite(norm):
            totals["skipped_updates"] += 1
            continue
        for name, value in sums.items():
            totals[name] += value / (with_signal * len(columns) * steps)
        totals["gradient_norm"] += norm / steps
        if bar is not None:
            bar.update()
    sums = gather(totals)
    return {**totals, **{name: sum(each[name] for each in sums) for name in ("loss", "kl", "clip_fraction")}}


# ------------------------------------------------------------------------------------------------
# EVALUATION: held-out prompts, always from the same noise
# ------------------------------------------------------------------------------------------------


def evaluate(model, rewards, rows, config, policy):
    """Score the policy on N prompts, K images each: (dict name -> [N, K], one of each reward; list of N*K images).

    rewards: dict name -> reward; rows: N dicts with "prompt", handed to the rewards as metadata.  The noises depend on
    nothing but the shape, so every evaluation of every run sees the same ones.  Many processes share the prompts, and
    exchange all scores, but only the images of the PICTURED prompts.
    """
    N, K, mine = len(rows), config.eval_images, own(len(rows))
    repeated = [row for row in rows[mine] for _ in range(K)]
    prompts = [row["prompt"] for row in repeated]
    noise = torch.randn(N * K, *model.latent_shape, generator=seeded("evaluation"))[mine.start * K:mine.stop * K]
    total = -(-len(repeated) // config.rollout_batch_size) * config.eval_num_inference_steps
    with together(), tqdm(total=total, desc="evaluation", leave=False) as bar:
        _, images = rollout(model, prompts, noise, config.eval_num_inference_steps, policy, config, bar)
        scores = {name: reward(images, prompts, repeated).view(-1, K) for name, reward in rewards.items()}
    if processes()[1] > 1:
        images = images[:max(0, PICTURED - mine.start) * K]
    shares = gather((scores, images))
    return ({name: torch.cat([scores[name] for scores, _ in shares]) for name in rewards},
            [image for _, images in shares for image in images])


def summarize(scores, rows, strict):
    """Mean and standard error over prompts of scores [N, K], whole and by category: dict.

    The "score" is the strict accuracy, the share of images with the reward 1, for rewards where that means "all right".
    """
    score = ((scores >= 1).float() if strict else scores).mean(1)                                  # [N]
    categories = [prompt_category(row["prompt"], row) for row in rows]
    return {"reward": scores.mean().item(), "score": score.mean().item(),
            "error": score.std(correction=0).item() / max(1, len(score) - 1) ** 0.5,
            "categories": {c: score[[c == have for have in categories]].mean().item()
                           for c in dict.fromkeys(categories)}}


def comparison(name, before, after, rows, strict):
    """The table of one reward, categories by rows, from scores [N, K] before and after: (text, whether it fell).

    A fall is a change of the mean below minus twice its standard error, which is taken over the same prompts.
    """
    old, new = summarize(before, rows, strict), summarize(after, rows, strict)
    change = summarize(((after >= 1).float() - (before >= 1).float()) if strict else after - before, rows, False)
    lines = [f"{'strict accuracy, ' if strict else ''}{name}"[-30:].ljust(30) + "    before     after    change"]
    for category in [*old["categories"], "all"] if len(old["categories"]) > 1 else ["all"]:
        values = [s["score"] if category == "all" else s["categories"][category] for s in (old, new, change)]
        lines.append(f"{category:30s}{values[0]:10.3f}{values[1]:10.3f}{values[2]:+10.3f}")
    lines.append(f"{'standard error over prompts':30s}{old['error']:10.3f}{new['error']:10.3f}{change['error']:10.3f}")
    if strict:
        lines.append(f"{'mean reward':30s}{old['reward']:10.3f}{new['reward']:10.3f}"
                     f"{new['reward'] - old['reward']:+10.3f}")
    return "\n".join(lines), change["score"] < -2 * change["error"]


def image_grid(images, prompts, rewards, columns=2, tile=96):
    """One row of K pictures a prompt under its prompt and mean reward; N*K images, rewards [N, K] -> PIL image."""
    count, gap, line = rewards.shape[1], 6, 16
    width, height = count * tile + gap, tile + line + gap
    grid = Image.new("RGB", (columns * width + gap, -(-len(prompts) // columns) * height + gap), "white")
    draw = ImageDraw.Draw(grid)
    for i, prompt in enumerate(prompts):
        x, y = gap + i % columns * width, gap + i // columns * height
        score = f"{rewards[i].mean():.2f}"
        draw.text((x, y), prompt[: count * tile // 7] + "  " + score, fill="black")
        for k in range(count):
            picture = images[i * count + k].resize((tile, tile), Image.Resampling.NEAREST)
            grid.paste(picture, (x + k * tile, y + line))
    return grid


def curve_image(points, label, size=(640, 360), margin=48):
    """Draw (step, score) points as a line with axes: a PIL image."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    last, low, high = max(1, points[-1][0]), min(p[1] for p in points), max(p[1] for p in points)
    height = high - low or 1.0

    def place(step, score):
        return (margin + (size[0] - 2 * margin) * step / last,
                size[1] - margin - (size[1] - 2 * margin) * (score - low) / height)

    draw.text((margin, 14), f"{label} against training steps", fill="black")
    for k in range(5):
        score, step = low + height * k / 4, last * k / 4
        draw.line([place(0, score), place(last, score)], fill="#dddddd")
        draw.text((4, place(0, score)[1] - 6), f"{score:.3f}", fill="black")
        draw.text((place(step, low)[0] - 8, size[1] - margin + 6), f"{step:.0f}", fill="black")
    path = [place(*point) for point in points]
    draw.line(path, fill="#1f5fbf", width=2)
    for x, y in path:
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill="#1f5fbf")
    return image


# ------------------------------------------------------------------------------------------------
# MANY PROCESSES: torchrun starts them, each owns some of a step's groups; for one alone, nothing here does anything
# ------------------------------------------------------------------------------------------------


def processes():
    """(this process's number, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def own(count):
    """Which of `count` things in a row are this process's: a slice, empty if there are fewer things than processes."""
    rank, world = processes()
    return slice(count * rank // world, count * (rank + 1) // world)


def exchange(collective, *arguments):
    """Call a collective operation of torch.distributed.  Raises ConnectionError if a process has died."""
    try:
        collective(*arguments)
    except RuntimeError as error:
        raise ConnectionError("another process of this job has ended or cannot be reached; --resume goes on from the "
                              f"last checkpoint ({str(error).splitlines()[0]})") from error


def gather(value):
    """A picklable value of each process -> the list of all of them, on every process."""
    values = [value] * processes()[1]
    if len(values) > 1:
        exchange(dist.all_gather_object, values, value)
    return values


def sum_gradients(weights):
    """Add up the processes' gradients, sent as one flat tensor.  One that has none, for want of groups, adds zeros."""
    if processes()[1] > 1:
        flat = torch.cat([(torch.zeros_like(t) if t.grad is None else t.grad).flatten() for t in weights])
        exchange(dist.all_reduce, flat)
        for t, gradient in zip(weights, flat.split([t.numel() for t in weights])):
            t.grad = gradient.view_as(t)


def leave():
    """Leave the process group, deaf to a SIGTERM of torchrun's because another process has left before."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # gloo's threads want Python's lock to let go of the last exchange's tensors, and the end of the group waits for
    # them while it holds that lock: without this pause for ever, now and then.
    time.sleep(1)
    dist.destroy_process_group()


@contextlib.contextmanager
def joined():
    """Join the processes that torchrun started; only the first can be heard, and none leaves before the others."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    # Whoever imports it later (diffusers does) has its default arguments hold the group: its threads, still there at
    # the interpreter's end, then abort now and then.
    importlib.import_module("torch.distributed.nn.functional")
    try:   # half an hour for one that hangs; torchrun notices one that dies
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                timeout=datetime.timedelta(minutes=30))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the processes cannot be joined: {error}; start them with torchrun") from error
    with contextlib.ExitStack() as stack:
        stack.callback(leave)
        if processes()[0]:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield
        # torchrun ends the rest as soon as one ends with an error: let the first write everything, and then let all end
        # with the same one.
        gather("done")


@contextlib.contextmanager
def together():
    """What goes wrong in here on one process goes wrong on all, instead of leaving them to wait for it."""
    error = None
    try:
        yield
    except UserError as caught:
        error = caught
    for other in gather(error):
        if other is not None:
            raise error or other


def first_alone(function):
    """The same function, which does nothing on any process but the first: what writes files or shows something."""
    @functools.wraps(function)
    def on_the_first(*arguments):
        return None if processes()[0] else function(*arguments)
    return on_the_first


def settle(config):
    """Fill in the device, under torchrun each process's own GPU, and the output folder.  Raises UserError."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = config.output_dir or time.strftime("runs/%Y-%m-%d-%H%M%S")
    started = gather({**dataclasses.asdict(config), "device": device})
    for name in started[0]:
        if len(values := {each[name] for each in started}) > 1:
            raise UserError(f"{flag(name)} is not the same on all processes: {', '.join(sorted(map(str, values)))}")
    if len(started) > 1 and device.startswith("cuda"):
        device = "cuda:" + os.environ.get("LOCAL_RANK", "0")
    return dataclasses.replace(config, device=device, output_dir=gather(folder)[0])


# ------------------------------------------------------------------------------------------------
# FILES: prompts, checkpoints, the run's folder
# ------------------------------------------------------------------------------------------------


def load_prompts(path, check=None):
    """The rows of a file as dicts with the key "prompt", in order and as often as they stand there; no blank lines.

    A .jsonl file has one such dict a line, whose other fields are metadata for the reward, as GenEval's files do; any
    other file has one prompt a line.  check: called with each row, to refuse it by a UserError.  Raises UserError with
    the number of the first line that is refused and how many are.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the prompt file {path} cannot be read: {reason}") from error
    rows, faults = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = {"prompt": line.strip()}
            if str(path).lower().endswith(".jsonl"):
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()   # JSON can hold half a surrogate pair, text cannot
                if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
                    raise UserError('not an object with a text as its "prompt"')
            if check is not None:
                check(row)
            rows.append(row)
        except (ValueError, RecursionError) as error:
            faults.append((number, f"no JSON: {error}"))
        except UserError as error:
            faults.append((number, str(error)))
    if faults:
        number, reason = faults[0]
        also = f" (and {len(faults) - 1} more such lines)" if len(faults) > 1 else ""
        raise UserError(f"{path}, line {number}: {reason}{also}")
    if not rows:
        raise UserError(f"the prompt file {path} holds no prompt")
    return rows


def unique(rows):
    """The first row of every prompt."""
    return list({row["prompt"]: row for row in reversed(rows)}.values())[::-1]


def write_atomically(path, write):
    """Call write(temporary path) so that `path` is either the old file or the whole new one, whatever happens."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)   # what a full disk has left of it would only fill the disk


def checksum(tensors, text):
    """CRC-32 of tensors, their names and a text: safetensors itself does not notice a changed bit."""
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].cpu().reshape(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), crc))
    return str(crc)


def save_checkpoint(path, model, optimizer, step, curve, metrics_bytes, seconds):
    """All that a run needs to go on: every policy's LoRA, AdamW's moments, and how far it is."""
    tensors = {}
    for policy in next(iter(model.lora.layers.values())).policies:
        tensors.update({f"{policy}.{i}": t.detach().contiguous() for i, t in enumerate(model.lora.weights(policy))})
    for i, state in optimizer.state_dict()["state"].items():
        tensors.update({f"adamw.{i}.{key}": value for key, value in state.items()})
    progress = json.dumps({"step": step, "curve": curve, "metrics_bytes": metrics_bytes, "seconds": seconds})
    metadata = {"progress": progress, "checksum": checksum(tensors, progress)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_checkpoint(path, model, optimizer):
    """Put a checkpoint's tensors in place and return its progress.  Raises UserError for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()
        if checksum(tensors, metadata["progress"]) != metadata["checksum"]:
            raise ValueError("its checksum is wrong")
        progress = json.loads(metadata["progress"])
        progress = {name: kind(progress[name]) for name, kind in (
            ("step", int), ("curve", list), ("metrics_bytes", int), ("seconds", float))}
        with torch.no_grad():
            for policy in next(iter(model.lora.layers.values())).policies:
                for i, t in enumerate(model.lora.weights(policy)):
                    t.copy_(tensors[f"{policy}.{i}"])
        state = {}
        for name, tensor in tensors.items():
            kind, i, *key = name.split(".")
            if kind == "adamw":
                state.setdefault(int(i), {})[key[0]] = tensor
    except Exception as error:  # safetensors raises its own type, a wrong shape RuntimeError, a missing key KeyError
        raise UserError(f"the checkpoint {path} cannot be read: {error}") from error
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return progress


def load_newest_checkpoint(folder, model, optimizer):
    """The progress of a run's newest checkpoint that is whole; that of step 0 if it has none.  Raises UserError if all
    are damaged."""
    paths = sorted((folder / "checkpoints").glob("*.safetensors"), reverse=True)
    for path in paths:
        try:
            return load_checkpoint(path, model, optimizer)
        except UserError as error:
            print(error, file=sys.stderr)
    if paths:
        raise UserError(f"none of the checkpoints in {folder / 'checkpoints'} can be read")
    return {"step": 0, "curve": [], "metrics_bytes": 0, "seconds": 0.0}


# What may differ between a run and its continuation; any other setting would make it another run.  Of the paths only
# what lies there counts, see `fingerprint`.
FREE_ON_RESUME = {"resume", "output_dir", "steps", "save_every", "keep_checkpoints", "device", "rollout_batch_size",
                  "text_cache_size", "gradient_checkpointing", "compile", "log_with", "model", "prompt_file",
                  "eval_prompt_file"}


def fingerprint(model, rows, held_out):
    """Checksums of what a run's paths lead to, by flag: dict of str."""
    some_weights = {name: layer.base.weight[0] for name, layer in model.lora.layers.items()}   # all would be gigabytes
    return {"model": checksum(some_weights, ""), "prompt_file": checksum({}, json.dumps(rows)),
            "eval_prompt_file": checksum({}, json.dumps(held_out))}


@together()
@first_alone
def open_run(config, model, rows, held_out):
    """Make the output folder and write config.json, or check that the folder's run is the one to resume."""
    folder, prints = Path(config.output_dir), fingerprint(model, rows, held_out)
    if (folder / "config.json").exists():
        if not config.resume:
            raise UserError(f"--output-dir {folder} holds another run; give --resume to go on with it")
        try:
            before = dict(json.loads((folder / "config.json").read_text()))
            prints_before = dict(before["fingerprint"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / 'config.json'} cannot be read: {error!r}") from error
        for name, value in dataclasses.asdict(config).items():
            if name not in FREE_ON_RESUME and before.get(name, value) != value:
                raise UserError(f"{flag(name)} is {value}, but the run in {folder} has {before[name]}")
            if prints.get(name) != prints_before.get(name):
                raise UserError(f"{flag(name)} {value} does not hold what the run in {folder} began with")
    elif config.resume:
        raise UserError(f"--resume: there is no run in {folder or '.'}")
    for name in ("samples", "checkpoints"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    # Where no file names the held-out prompts, config.json does.
    named = {} if config.eval_prompt_file else {"held_out": [row["prompt"] for row in held_out]}
    text = json.dumps({**dataclasses.asdict(config), **named, "fingerprint": prints}, indent=2) + "\n"
    write_atomically(folder / "config.json", lambda temporary: temporary.write_text(text))


def open_logger(config):
    """What --log-with asks for, as a function (numbers: dict, step).  Raises UserError."""
    try:
        if config.log_with == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(config.output_dir)
            return lambda numbers, step: [*(writer.add_scalar(*pair, step) for pair in numbers.items()), writer.flush()]
        if config.log_with == "wandb":
            import wandb
            return wandb.init(project="dgpo", dir=config.output_dir, config=dataclasses.asdict(config)).log
    except Exception as error:   # no key, no network, another version: wandb has an exception for each
        raise UserError(f"--log-with {config.log_with}: {error}") from error
    return lambda numbers, step: None


class RunFolder:
    """What a run writes, on its first process: metrics.jsonl, samples/, reward.png, checkpoints/, lora/."""

    def __init__(self, folder, progress, config):
        """Continue from `progress` (load_checkpoint's dict): later lines of metrics.jsonl are cut off."""
        self.folder, self.curve, self.past_seconds = folder, progress["curve"], progress["seconds"]
        self.started = time.monotonic()
        if processes()[0]:
            return
        self.log_numbers = open_logger(config)
        self.metrics = open(folder / "metrics.jsonl", "ab")
        self.metrics.truncate(min(progress["metrics_bytes"], self.metrics.tell()))
        self.metrics.seek(0, os.SEEK_END)

    def seconds(self):
        """Seconds this run has taken, those before a resume included."""
        return self.past_seconds + time.monotonic() - self.started

    @first_alone
    def log(self, values):
        """Append one line to metrics.jsonl."""
        values = {**values, "seconds": round(self.seconds(), 3)}
        self.metrics.write((json.dumps(values) + "\n").encode())
        self.metrics.flush()
        inner = {f"{name}/{key}": v for name, value in values.items() if isinstance(value, dict)
                 for key, v in value.items()}
        self.log_numbers({name: value for name, value in {**values, **inner}.items()
                          if isinstance(value, (int, float)) and name not in ("step", "evaluation")}, values["step"])

    @first_alone
    def record_evaluation(self, step, scores, images, rows, rewards):
        """Write an evaluation's metrics line, its picture grid and the curve so far; `scores` as from `evaluate`."""
        (target, *_), strict = rewards, next(iter(rewards.values())).strict
        summary = summarize(scores[target], rows, strict)
        judges = {name: summarize(scores[name], rows, judge.strict)["score"]
                  for name, judge in rewards.items() if name != target}
        self.log({"step": step, "evaluation": True, **{f"eval_{key}": value for key, value in summary.items()},
                  **({"eval_judges": judges} if judges else {})})
        n, k = min(PICTURED, len(rows)), scores[target].shape[1]
        captions = [row["prompt"] for row in rows[:n]]
        image_grid(images[:n * k], captions, scores[target][:n]).save(self.folder / "samples" / f"{step:06d}.png")
        self.curve.append([step, summary["score"]])
        curve_image(self.curve, "held-out score").save(self.folder / "reward.png")

    @first_alone
    def save(self, model, optimizer, step, keep):
        """Write a checkpoint and the exported LoRA; then only the newest `keep` checkpoints stay."""
        os.fsync(self.metrics.fileno())   # a checkpoint counts on the lines before it
        save_checkpoint(self.folder / "checkpoints" / f"{step:06d}.safetensors", model, optimizer, step, self.curve,
                        self.metrics.tell(), self.seconds())
        model.lora.export(self.folder / "lora")
        for path in sorted((self.folder / "checkpoints").glob("*.safetensors"))[:-keep]:
            path.unlink()


class Stop:
    """While it is open, the first Ctrl-C or SIGTERM is kept in `signal`; a second one ends the program at once."""

    def __enter__(self):
        self.signal = None
        self.handlers = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        """The handler: a step takes minutes on a large model, so say that the signal was heard."""
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        print("\nstopping when this step is done; once more to stop at once, unsaved", file=sys.stderr)


# ------------------------------------------------------------------------------------------------
# TRAIN (Algorithm 1)
# ------------------------------------------------------------------------------------------------


def rows_of_step(rows, step, config):
    """The P prompts of a step: one seeded permutation of the file after another, without a state to save."""
    places = range(step * config.groups_per_step, (step + 1) * config.groups_per_step)
    orders = {epoch: torch.randperm(len(rows), generator=seeded(config.seed, "order", epoch))
              for epoch in {place // len(rows) for place in places}}
    return [rows[orders[place // len(rows)][place % len(rows)]] for place in places]


def cache_text_ahead(model, rows, held_out, step, config):
    """If this step's prompts are not encoded yet, encode those of the steps to come that fit in --text-cache-size."""
    last = min(config.steps, step + max(1, config.text_cache_size // config.groups_per_step))
    mine = own(config.groups_per_step)
    if any(row["prompt"] not in model.texts for row in rows_of_step(rows, step, config)[mine]):
        ahead = [row for later in range(step, last) for row in rows_of_step(rows, later, config)[mine]]
        guided = max(config.guidance_scale, config.reference_guidance_scale) > 1
        model.encode([""] * guided + [row["prompt"] for row in held_out[own(len(held_out))] + ahead])


def train_step(model, optimizer, reward, rows, step, config, accumulate=accumulate_gradients):
    """One step of Algorithm 1: rollout, rewards, advantages, update.  Returns the step's metrics."""
    P, G, mine = config.groups_per_step, config.group_size, own(config.groups_per_step)
    updates_done = step * config.updates_per_rollout
    policy = "old" if 0 < config.rollout_old_after < updates_done else "current"
    repeated = [row for row in rows[mine] for _ in range(G)]
    prompts = [row["prompt"] for row in repeated]
    noise = torch.randn(P * G, *model.latent_shape, generator=seeded(config.seed, "rollout", step))  # [B, C, H, W]
    noise = noise[mine.start * G:mine.stop * G]   # drawn for all, so that a group's does not depend on who owns it
    clock = [time.monotonic()]
    evaluations = -(-len(noise) // config.rollout_batch_size) * config.num_inference_steps
    with tqdm(total=evaluations + config.updates_per_rollout, desc="rollout", leave=False) as bar:
        with together():
            x0, images = rollout(model, prompts, noise, config.num_inference_steps, policy, config, bar)
            clock.append(time.monotonic())
            rewards = reward(images, prompts, repeated).view(-1, G)
        rewards = torch.cat(gather(rewards))                                                       # [P, G]
        clock.append(time.monotonic())
        bar.set_description("update")
        advantages = group_advantages(rewards, config.advantage_std).to(model.device)              # [P, G]
        metrics = update(model, optimizer, x0.unflatten(0, (-1, G)), [row["prompt"] for row in rows], advantages,
                         config, step, bar, accumulate)
    clock.append(time.monotonic())
    return {"reward_mean": rewards.mean().item(), "reward_std": rewards.std(1).mean().item(),
            **({"strict": (rewards >= 1).float().mean().item()} if reward.strict else {}),
            "zero_groups": (advantages == 0).all(1).float().mean().item(), **metrics,
            **{f"seconds_{name}": clock[i + 1] - clock[i] for i, name in enumerate(("rollout", "reward", "update"))}}


def train(config):
    """Run Algorithm 1 from config to an exported LoRA.  Returns the signal that ended it early, or None."""
    config, rewards, model, rows, held_out = prepare(settle(config))
    folder, reward = Path(config.output_dir), next(iter(rewards.values()))
    open_run(config, model, rows, held_out)
    optimizer = torch.optim.AdamW(model.lora.weights("current"), lr=config.learning_rate,
                                  weight_decay=config.weight_decay)
    with together():
        progress = load_newest_checkpoint(folder, model, optimizer)
        run, step = RunFolder(folder, progress, config), progress["step"]
    if len(set(gather(step))) > 1:
        raise UserError(f"not all processes see the run in {folder}: it must lie on a disk that all machines share")
    describe(config, model, rows, held_out)
    cache_text_ahead(model, rows, held_out, step, config)
    before = after = evaluate(model, rewards, held_out, config, "base")
    if step == 0:
        run.record_evaluation(0, *before, held_out, rewards)
    else:
        after = evaluate(model, rewards, held_out, config, "ema")
        if step % config.eval_every == 0 and run.curve[-1][0] < step:   # a judge that raised left it out
            run.record_evaluation(step, *after, held_out, rewards)
    skipped = 0   # steps in a row with an update left out
    stopped_by = None
    try:
        with Stop() as stop, tqdm(total=config.steps, initial=step, desc="dgpo") as bar:
            while step < config.steps and stopped_by is None:
                cache_text_ahead(model, rows, held_out, step, config)
                metrics = train_step(model, optimizer, reward, rows_of_step(rows, step, config), step, config)
                step += 1
                run.log({"step": step, **metrics})
                skipped = skipped + 1 if metrics["skipped_updates"] else 0
                if skipped == MAX_SKIPPED:
                    raise UserError(f"the gradient was not finite in {skipped} steps in a row: a lower --learning-rate "
                                    "or another --dtype may help; --resume goes on from the last checkpoint")
                show(bar, metrics, run.curve, config)
                if step % config.eval_every == 0 or step == config.steps:
                    after = evaluate(model, rewards, held_out, config, "ema")
                    run.record_evaluation(step, *after, held_out, rewards)
                stopped_by = max(number or 0 for number in gather(stop.signal)) or None   # all stop after the same step
                if step % config.save_every == 0 or step == config.steps or stopped_by is not None:
                    run.save(model, optimizer, step, config.keep_checkpoints)
    except UserError:   # it comes before the step's update, so that what is saved is the end of the last step
        run.save(model, optimizer, step, config.keep_checkpoints)
        raise
    if stopped_by is None or step >= config.steps:
        report(folder, before, after, held_out, rewards, config)
        print(f"{run.seconds():.0f} s in all; LoRA, pictures and curve in {folder}")
        return None
    print(f"stopped after step {step}; the run is saved in {folder}, --resume goes on with it", file=sys.stderr)
    return stopped_by


@first_alone
def show(bar, metrics, curve, config):
    """Bring the run's progress bar up to date."""
    seconds = sum(metrics[f"seconds_{name}"] for name in ("rollout", "reward", "update"))
    shown = {"reward": "reward_mean", "strict": "strict", "kl": "kl", "loss": "loss"}
    bar.set_postfix({name: f"{metrics[key]:.3g}" for name, key in shown.items() if key in metrics} | {
        "img/s": f"{config.groups_per_step * config.group_size / seconds:.0f}", "held-out": f"{curve[-1][1]:.3f}"})
    bar.update()


def compare(config):
    """--evaluate: score the prompts with the base model and, if there is one, with --lora, from the same noises."""
    config, rewards, model, rows, _ = prepare(settle(config))
    with together():
        if config.lora:
            model.lora.load(config.lora)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    before = after = evaluate(model, rewards, rows, config, "base")
    if config.lora:
        after = evaluate(model, rewards, rows, config, "ema")
    report(folder, before, after, rows, rewards, config)
    results = {"base": before, "lora": after} if config.lora else {"base": before}
    table = {name: {which: summarize(scores[name], rows, reward.strict) for which, (scores, _) in results.items()}
             for name, reward in rewards.items()}
    table = {"config": dataclasses.asdict(config), "rewards": table}
    first_alone((folder / "evaluation.json").write_text)(json.dumps(table, indent=2) + "\n")
    print(f"table and pictures in {folder}")


# ------------------------------------------------------------------------------------------------
# MAIN: from the command line to train() and from errors to sentences
# ------------------------------------------------------------------------------------------------


@together()
def prepare(config):
    """Everything that can go wrong before the first file is written: (config, rewards, model, rows, held_out)."""
    config.check()
    heldout_beside = Path(config.prompt_file).parent / "heldout.txt"
    config = dataclasses.replace(
        config, eval_prompt_file=config.eval_prompt_file or (str(heldout_beside) if heldout_beside.exists() else ""))
    if config.log_with and getattr(importlib.util.find_spec(config.log_with), "origin", None) is None:
        raise UserError(f"--log-with {config.log_with} is not installed: pip install {config.log_with}")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU on this machine")
    try:
        torch.empty(0, device=config.device)
        if config.device.startswith("cuda:"):
            torch.cuda.set_device(config.device)   # what says only "cuda" means this one
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {config.device} cannot be used: {str(error).splitlines()[0]}") from error
    load_prompts(config.prompt_file)   # before anything large is loaded
    watched = config.eval_reward.split(",") if config.eval_reward else []
    names = config.reward.split(",") if config.evaluate else [config.reward, *watched]   # the first is trained on
    rewards = {name: load_reward(name, config.device) for name in names}
    model = SD3(load_pipeline(config.model, config), config)
    reward = next(iter(rewards.values()))
    rows = load_prompts(config.prompt_file, lambda row: reward.check(row["prompt"], row))

    def check_all(row):
        for judge in rewards.values():
            judge.check(row["prompt"], row)

    if config.evaluate:
        rows = unique(load_prompts(config.prompt_file, check_all))
        return config, rewards, model, rows[:config.eval_prompts or None], []
    if config.eval_prompt_file:
        held_out = unique(load_prompts(config.eval_prompt_file, check_all))
    else:  # a tenth of the file, drawn once and for all, so that a resumed run holds out the same prompts
        distinct = unique(load_prompts(config.prompt_file, check_all))
        if len(distinct) < 2:
            raise UserError("with a single prompt, give --eval-prompt-file: there is nothing to hold out")
        order = torch.randperm(len(distinct), generator=seeded("held out")).tolist()
        held_out = [distinct[i] for i in order[:max(1, min(100, len(distinct) // 10))]]
        aside = {row["prompt"] for row in held_out}
        rows = [row for row in rows if row["prompt"] not in aside]
    return config, rewards, model, rows, held_out[:config.eval_prompts or None]


def describe(config, model, rows, held_out):
    """Print the arithmetic of a step, so that a surprising setting is seen before the run and not after it."""
    images = config.groups_per_step * config.group_size
    evaluations = images * config.num_inference_steps * (2 if config.guidance_scale > 1 else 1)
    parameters = sum(t.numel() for t in model.lora.weights("current"))
    prompts = [row["prompt"] for row in [*rows, *held_out]]
    if long := set(model.too_long(prompts)):
        print(f"{sum(p in long for p in prompts)} of {len(prompts)} prompts are longer than the text encoders can read "
              "and are cut off, as diffusers does")
    print(f"{config.model} on {config.device}: {parameters / 1e6:.2f} M LoRA parameters in "
          f"{len(model.lora.layers)} layers; {len(rows)} training and {len(held_out)} held-out prompts\n"
          f"a step: {config.groups_per_step} prompts x {config.group_size} images = {images} images from {evaluations} "
          f"transformer evaluations; {images * config.timesteps_per_rollout} samples to train on in "
          f"{config.updates_per_rollout} updates\nwriting to {config.output_dir}", flush=True)


@first_alone
def report(folder, before, after, rows, rewards, config):
    """Write before_after.png, print a table of each reward from two `evaluate` results, warn of judges that fell."""
    target = next(iter(rewards))
    n, k = min(PICTURED, len(rows)), min(4, config.eval_images)
    pictures = [image for i in range(n) for _, images in (before, after)
                for image in images[i * config.eval_images:][:k]]
    pairs = torch.stack([before[0][target][:n, :k], after[0][target][:n, :k]], 1).flatten(0, 1)
    captions = [f"{row['prompt']} ({when})" for row in rows[:n] for when in ("before", "after")]
    image_grid(pictures, captions, pairs).save(folder / "before_after.png")
    fallen = []
    for name, reward in rewards.items():
        text, fell = comparison(name, before[0][name], after[0][name], rows, reward.strict)
        print("\n" + text)
        fallen += [name] * (fell and name != target)
    if fallen:
        print(f"\n{', '.join(fallen)} fell by more than two standard errors: look at the pictures, {target} may have "
              "been gained at their cost (reward hacking)")


def parse_arguments(arguments=None):
    """The command line as a Config: one flag per field."""
    sets = {"any other --model": PAPER, **{f"--recipe {name}": recipe for name, recipe in RECIPES.items()},
            **{f"--mode {name}": mode for name, mode in MODES.items() if mode}}
    parser = argparse.ArgumentParser(
        usage="%(prog)s --prompt-file FILE [--flag value ...]    (all flags: --help)",
        description=__doc__.split("\n\n")[0] + "\nDefaults, those of the embedded job, stand in brackets.",
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n\n".join(textwrap.fill(f"With {name}: " + ", ".join(f"{k} {v}" for k, v in values.items()), 100)
                           for name, values in sets.items()))
    for field in dataclasses.fields(Config):
        options = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        options |= field.metadata["argparse"]
        if field.default != "" and field.default is not False:
            options["help"] += f" [{field.default}]"
        parser.add_argument(flag(field.name), default=field.default, **options)
    given = parser.parse_args(arguments)
    if given.recipe:
        parser.set_defaults(model="stabilityai/stable-diffusion-3.5-medium", **{**PAPER, **RECIPES[given.recipe]})
    elif Path(given.model).resolve() != EMBEDDED_MODEL:
        parser.set_defaults(**PAPER)
    parser.set_defaults(**MODES[given.mode])
    return Config(**vars(parser.parse_args(arguments)))


def main(arguments=None):
    """The command line.  Exit codes: 0 done, 1 cannot write, 2 a setting or a reward to mend, 128 + signal."""
    config = parse_arguments(arguments)
    try:
        with joined():
            return run(config)
    except UserError as error:
        return fail(error, 2)
    except ConnectionError as error:
        return fail(error, 1)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        place = getattr(error, "filename", None) or config.output_dir or "runs"
        return fail(f"writing to {place} failed: {getattr(error, 'strerror', None) or error}", 1)
    except (RuntimeError, MemoryError) as error:   # without a GPU, torch has no class of its own for it
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise
        flags = ", ".join(f"{flag(name)} (now {getattr(config, name)})" for name in (
            "rollout_batch_size", "train_batch_size", "group_size", "resolution", "lora_rank"))
        return fail(f"out of memory: lower {flags}, or give --gradient-checkpointing; --resume goes on from the last "
                    "checkpoint", 1)
    except KeyboardInterrupt:
        return fail("interrupted before the first step: nothing was trained", 130)


def run(config):
    """What all processes do alike, to the exit code; only the first can be heard."""
    try:
        stopped_by = (compare if config.evaluate else train)(config)
    except UserError as error:
        return fail(error, 2)
    return 0 if stopped_by is None else 128 + stopped_by


def fail(message, code):
    """Print one sentence to stderr and return the exit code."""
    print(f"dgpo.py: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
