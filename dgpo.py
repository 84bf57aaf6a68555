"""DGPO: Direct Group Preference Optimization, reinforcement learning for flow-matching text-to-image models.

    python dgpo.py --prompt-file shapes/prompts.txt                       # the embedded model, two CPU cores, minutes
    python dgpo.py --prompt-file my.txt --reward my_rewards.py:redness    # your prompts and your reward
    torchrun --nproc-per-node 8 dgpo.py --prompt-file …                   # eight GPUs, the same steps

Reference: "Reinforcing Diffusion Models by Direct Group Preference Optimization", Luo, Hu, Tang, ICLR 2026, arXiv
2510.08425; equation numbers are the paper's.  Its Algorithm 1, in the names of this file:

    for step in range(steps):                                                             # train, train_step
        x0, images = rollout(policy, rows_of_step(step))      # G images a prompt, by a deterministic ODE: sample_ode
        A = group_advantages(reward(images))                  # Eq. 12: A > 0 is preferred, A < 0 rejected, |A| weighs
        for t in draw_timesteps(t_min):                       # update; one t and one noise for a whole group
            x_t, target = add_noise(x0, noise, t)
            error, old_error, ref_error = (mean_squared(velocity(x_t, t) - target) of each of three policies)
            loss = dgpo_loss(clip_error(error, old_error, A), ref_error, A, beta) + kl_weight * KL          # Eq. 17
        optimizer_step()                                      # AdamW on a LoRA; the old policy and the average follow

Conventions, those of diffusers: x_t = (1 - sigma) x0 + sigma noise, velocity = noise - x0, sigma = 1 is noise and 0 is
data.  Shapes at the right margin: P prompts (groups), G images a group, B = P*G, M timesteps a rollout, R (group,
timestep) rows, [C, H, W] a latent.  Departures from the paper and its authors' code:
 1. Timesteps are drawn from the interval [shift(t_min), 1], one in each of M equal strata, anew for each group; theirs
    are M of the first points of the rollout's own grid, as integers, the same for all groups of a step.
 2. `--updates-per-rollout` may split the M timesteps over several optimizer steps (the authors take one).
 3. Groups without signal (all rewards equal) are not trained on, so the KL term leaves them out too.
 4. The last evaluation has as many solver steps as the others; theirs has 40 instead of 14.
 5. `--advantage-std terms` standardises each term of a summed reward before weighing it.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)   # Ctrl-C while the libraries load ends without their tracebacks

import argparse
import atexit
import contextlib
import dataclasses
import importlib
import io
import json
import math
import os
import random
import sys
import textwrap
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

try:
    from rewards import UserError, absolute_paths, blame, load_lora, load_pipeline, load_prompts, load_reward, report
except ModuleNotFoundError as error:
    if error.name != "rewards":   # where this file was copied alone, its functions are what is wanted of it
        raise


# ---- FLOW MATCHING: noise, time and the deterministic solvers (paper, section 2) -----------------------------------
def add_noise(x0, noise, sigma):
    """The flow's straight path.  Tensors that broadcast -> (x_t, target velocity)."""
    return (1 - sigma) * x0 + sigma * noise, noise - x0

def shift_time(t, shift):
    """Move timesteps t in [0, 1] (number or tensor) towards noise, as SD3 does at higher resolutions."""
    return shift * t / (1 + (shift - 1) * t)

def ode_sigmas(num_steps, shift, solver="euler"):
    """The solver's noise levels, float32 [num_steps + 1], falling to 0: FlowMatchEulerDiscreteScheduler's, or the flow
    sigmas of DPMSolverMultistepScheduler, from the shifted 0.999 in equal steps (before the shift): after Euler's tiny
    last step but one, a multistep method would extrapolate over a far longer one in lambda."""
    if solver == "euler":
        grid = torch.linspace(1.0, shift_time(1 / 1000, shift), num_steps, dtype=torch.float64)
    else:
        grid = torch.linspace(1 - 1 / 1000, 0.0, num_steps + 1, dtype=torch.float64)[:-1]
    return F.pad(shift_time(grid, shift), (0, 1)).float()

def sample_ode(velocity, noise, sigmas, solver="euler"):
    """Integrate dx/dsigma = velocity(x, sigma) from noise to data.
    velocity: callable (x [B, ...], sigma a 0-d tensor) -> [B, ...]; noise: [B, ...] on any device; sigmas: [steps + 1],
    falling, on the CPU.  solver: "euler", or "dpm++2m", DPM-Solver++ for flows: second-order multistep on the data
    prediction x0 = x - sigma v in lambda = log((1 - sigma) / sigma) (arXiv 2211.01095).  Both are deterministic."""
    x, last_x0, last_h = noise, None, None
    for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:], strict=True):
        v = velocity(x, sigma)
        if solver == "euler":
            x = x + (next_sigma - sigma) * v
            continue
        x0 = estimate = x - sigma * v
        h = torch.logit(1 - next_sigma) - torch.logit(1 - sigma)
        # lambda is infinite at both ends, sigma = 1 and 0: there, extrapolation has no meaning and order one serves.
        if last_x0 is not None and h.isfinite() and last_h.isfinite():
            estimate = x0 + h / (2 * last_h) * (x0 - last_x0)
        x = next_sigma / sigma * x + (1 - next_sigma / sigma) * estimate
        last_x0, last_h = x0, h
    return x

def draw_timesteps(count, t_min, shift, generator=None):
    """Timesteps to train on, float32 [count] in [shift(t_min), 1]: one in each of `count` strata, in random order.

    Below t_min an x_t shows the fine detail of a few-step sample, which is not to be imitated (paper, section 3.3)."""
    strata = torch.randperm(count, generator=generator)
    u = (strata + torch.rand(count, generator=generator, dtype=torch.float32)) / count
    return shift_time(t_min + (1 - t_min) * u, shift)


# ---- GROUP PREFERENCES: advantages (Eq. 12-14), loss (Eq. 17), clip ------------------------------------------------
def group_advantages(rewards, std="group", max_advantage=5.0):
    """A = (r - mean) / std (Eq. 12): rewards [P, G] -> advantages [P, G], clamped to +-max_advantage.
    The mean is the group's; the (population) std the group's or, with std="batch", that of all rewards.  A group whose
    rewards are all equal says nothing and gets exactly zero.  In float64, as PickScores differ by little."""
    r = rewards.double()
    scale = r.std(correction=0) if std == "batch" else r.std(1, keepdim=True, correction=0)
    # The epsilon keeps rounding noise in nearly equal rewards from becoming advantages of order one.
    advantages = ((r - r.mean(1, keepdim=True)) / (scale + 1e-4)).clamp(-max_advantage, max_advantage)
    differ = r.amax(1, keepdim=True) > r.amin(1, keepdim=True)
    return (advantages * differ).to(torch.promote_types(rewards.dtype, torch.float32))

def dgpo_loss(error, ref_error, advantages, beta):
    """The DGPO objective -log sigmoid(-S) (Eq. 17), divided by beta: all [P, G] -> a scalar, the mean over groups.
    error, ref_error: *mean* squared velocity errors of the current and the reference model.  The gradient flows through
    `error` alone; for error_i of a group it is sigmoid(S) A_i / (G P): beta acts inside the sigmoid only.  For G = 2
    and advantages +1, -1 this is Diffusion-DPO with beta/2."""
    S = beta * (advantages.detach() * (error - ref_error.detach())).mean(1)                        # [P]
    return -F.logsigmoid(-S).mean() / beta

def clip_error(error, old_error, advantages, clip_range):
    """PPO-style clip, all [P, G]: (the same errors, without gradient where a sample moved far enough; where: bool).
    With ratio = exp(old_error - error): A > 0 at ratio > 1 + clip_range, A < 0 at ratio < 1 - clip_range.  The error of
    a rejected sample can grow without bound, and would; values stay, so S keeps its meaning."""
    ratio = torch.exp(old_error.detach() - error.detach())
    past = ((advantages > 0) & (ratio > 1 + clip_range)) | ((advantages < 0) & (ratio < 1 - clip_range))
    return torch.where(past, error.detach(), error), past

def mean_squared(difference):
    """The mean square of each sample: [P, G, ...] -> [P, G]."""
    return difference.square().flatten(2).mean(2)


# ---- SETTINGS: this list is the command line -----------------------------------------------------------------------
EMBEDDED_MODEL = Path(__file__).resolve().parent / "shapes/model"

def setting(default, help, low=1, high=10 ** 6, **more):
    """A field of Config with its --help text.  low, high: of a number; more: its choices; the group it begins; `paper`,
    the default for any model but the embedded one: that of the authors' code for SD3.5-M."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, **more))

def flag(name):
    """A setting's name as it is typed."""
    return "--" + name.replace("_", "-")

@dataclasses.dataclass
class Config:
    """Every setting of a run, with the defaults of the embedded job."""
    prompt_file: str = setting("", "training prompts: .txt, one a line, or .jsonl with metadata", group="task")
    eval_prompt_file: str = setting("", "held-out prompts (default: NAME_heldout or heldout beside NAME, if there)")
    model: str = setting("", "folder in diffusers' format, or hub id (default: the embedded model)")
    reward: str = setting("shapes", "NAME, NAME=FOLDER, file.py:function or NAME:weight,NAME:weight", paper="pickscore")
    eval_reward: str = setting("", "judges, which only watch: NAME,NAME (default: realism beside shapes and words)")
    lora: str = setting("", "LoRA to begin with, the reference too; with --steps 0 it is only drawn and scored")
    output_dir: str = setting("", "where everything is written (default: a new folder in runs/)")
    resume: str = setting("", "a run's folder: go on with it, with its own settings but those that are typed")
    steps: int = setting(125, "training steps (one rollout of all groups each); 0: only evaluate", paper=1000, low=0)
    seed: int = setting(0, "seed of LoRA, prompt order and noises", low=0, high=2 ** 63)
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, ...")
    dtype: str = setting("float32", "dtype of the frozen model", paper="bfloat16", choices=("float32", "bfloat16"))
    groups_per_step: int = setting(8, "P, prompts a step", paper=24, high=4096, group="rollout")
    group_size: int = setting(12, "G, images a prompt", paper=24, low=2, high=4096)
    num_inference_steps: int = setting(6, "solver steps of a rollout", paper=10, high=1000)
    solver: str = setting("dpm++2m", "ODE solver of rollouts and evaluation", choices=("euler", "dpm++2m"))
    guidance_scale: float = setting(1.0, "guidance of rollouts and evaluation, up to 1: none", paper=4.5, low=0)
    resolution: int = setting(0, "image side in pixels, 0: the model's own", paper=512, low=0, high=8192)
    max_sequence_length: int = setting(1, "T5 tokens, or zeros for them; 0: the pipeline's own", paper=128, low=0)
    rollout_old_after: int = setting(0, "updates until the old policy draws, 0: it never does", paper=200, low=0)
    beta: float = setting(10.0, "how soon the sigmoid lets go of a group", paper=100.0, low=1e-6, group="objective")
    t_min: float = setting(0.3, "lowest timestep trained on, unshifted", paper=0.4, low=0, high=0.99)
    timesteps_per_rollout: int = setting(4, "M, timesteps trained on for each group (paper: 4)", high=1000)
    updates_per_rollout: int = setting(4, "optimizer steps the M timesteps are split over", paper=1, high=1000)
    advantage_std: str = setting("group", "whose std, or of each term first", choices=("group", "batch", "terms"))
    clip_range: float = setting(0.01, "PPO-style clip of exp(old error - error), 0: none (paper: 1e-2)", low=0)
    kl_weight: float = setting(0.02, "weight of mean (v - v_frozen)^2 (paper: 2e-2)", low=0)
    reference: str = setting("frozen", "model whose error S compares with (paper: frozen)", choices=("frozen", "old"))
    reference_guidance_scale: float = setting(1.0, "guidance of the frozen model in S and KL (paper: 1)", low=0)
    old_decay: float = setting(0.5, "EMA decay, an update, of the old policy", paper=0.3, low=0, high=1)
    old_decay_ramp: float = setting(1.0, "... but at most this times the updates so far", paper=1e-3, low=0)
    learning_rate: float = setting(7e-4, "AdamW's learning rate", paper=3e-4, low=1e-12, group="optimisation")
    lora_rank: int = setting(32, "LoRA rank; alpha is twice the rank", paper=64, high=4096)
    ema_decay: float = setting(0.98, "EMA decay, an update, of the exported weights", paper=0.987, low=0, high=1)
    batch_size: int = setting(96, "images drawn, and samples trained on, at once; changes memory alone", paper=24)
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory", paper=True)
    compile: bool = setting(False, "torch.compile the transformer's blocks: 1.7 times as fast on an H200")
    offload: bool = setting(False, "keep text encoders and VAE in main memory while they are not used")
    eval_every: int = setting(50, "steps between evaluations on held-out prompts", group="evaluation and saving")
    eval_prompts: int = setting(144, "how many of the held-out prompts are used at most, 0: all", paper=100, low=0)
    eval_images: int = setting(4, "images a held-out prompt, from noises that stay the same", high=4096)
    eval_num_inference_steps: int = setting(10, "solver steps of evaluation", paper=14, high=1000)
    save_every: int = setting(10, "steps between checkpoints: what any end of the program costs at most")
    track: str = setting("", "log to this package, too: wandb, trackio or swanlab")

    def check(self):
        """Refuse values with which a run would waste its time.  Raises UserError."""
        for field in dataclasses.fields(self):
            value, low, high = getattr(self, field.name), field.metadata["low"], field.metadata["high"]
            if field.type in (int, float) and not low <= value <= high:
                raise UserError(f"{flag(field.name)} must lie between {low:g} and {high:g}, not {value}")
        if self.timesteps_per_rollout % self.updates_per_rollout:
            raise UserError("--updates-per-rollout must divide --timesteps-per-rollout")

PAPER = {field.name: field.metadata["paper"] for field in dataclasses.fields(Config) if "paper" in field.metadata}


# ---- ROLLOUT (Algorithm 1, lines 3-5) ------------------------------------------------------------------------------
def seeded(*numbers):
    """A CPU generator that depends on the numbers alone: a group's own, whatever came before and whoever owns it."""
    return torch.Generator().manual_seed(random.Random(repr(numbers)).getrandbits(63))

def draw_noise(generators, *shape):
    """Standard normal float32 [number of generators, *shape], a row each."""
    rows = [torch.randn(shape, generator=generator, dtype=torch.float32) for generator in generators]
    return torch.stack(rows) if rows else torch.empty(0, *shape, dtype=torch.float32)

@torch.no_grad()
def rollout(model, rows, size, generators, num_steps, policy, config):
    """`size` images for each of P rows, dicts with "prompt", whose noises come from a generator each:
    (x0 [P, size, C, H, W], and, as a reward wants them, images, prompts and rows)."""
    repeated = [row for row in rows for _ in range(size)]                                          # B of them
    prompts, images = [row["prompt"] for row in repeated], []
    x = draw_noise(generators, size, *model.latent_shape).flatten(0, 1).to(model.device)           # [B, C, H, W]
    model.encode(prompts)
    sigmas = ode_sigmas(num_steps, model.shift, config.solver)   # on the CPU, so that the solver never waits for a GPU
    for i in tqdm(range(0, len(prompts), config.batch_size), desc="rollout", leave=False):
        part = slice(i, i + config.batch_size)
        x[part] = sample_ode(lambda x, sigma: model.velocity(x, sigma, prompts[part], policy, config.guidance_scale),
                             x[part], sigmas, config.solver)
        images += model.decode(x[part])
    return x.unflatten(0, (len(rows), size)), images, prompts, repeated


# ---- UPDATE (Algorithm 1, lines 6-9) -------------------------------------------------------------------------------
def accumulate_gradients(model, x0, prompts, advantages, sigma, noise, config, total_rows):
    """Add the gradient of loss + KL over R rows, one row a group at one timestep, to the LoRA's .grad.
    x0: [R, G, C, H, W]; prompts: R strings; advantages: [R, G]; sigma: [R]; noise: [R, 1, C, H, W], shared by the group
    so that its samples differ in x0 alone and the noise cancels between preferred and rejected.  Means are taken over
    `total_rows`, which counts the groups left out for want of signal.  Returns sums over rows: dict of floats."""
    R, G = advantages.shape
    x_t, target = add_noise(x0, noise, sigma.view(-1, *[1] * (x0.ndim - 1)))                       # [R, G, C, H, W]
    sums = dict.fromkeys(("loss", "kl", "clip_fraction", "group_weight"), 0.0)
    rows_at_once = max(1, config.batch_size // G)   # whole groups, as S of Eq. 17 is the whole group's
    for i in tqdm(range(0, R, rows_at_once), desc="update", leave=False):
        part = slice(i, i + rows_at_once)
        x, v_target, A = x_t[part], target[part], advantages[part]                                 # ..., ..., [r, G]
        each_sigma = sigma[part].repeat_interleave(G)                                              # [r * G]
        each_prompt = [prompt for prompt in prompts[part] for _ in range(G)]

        def velocity(policy, guidance_scale=1.0):                                                  # [r, G, C, H, W]
            return model.velocity(x.flatten(0, 1), each_sigma, each_prompt, policy, guidance_scale).view(x.shape)

        with torch.no_grad():
            v_frozen = velocity("frozen", config.reference_guidance_scale)
            old_error = mean_squared(velocity("old") - v_target)                                   # [r, G]
            ref_error = old_error if config.reference == "old" else mean_squared(v_frozen - v_target)
        with torch.enable_grad():
            v = velocity("current")
            error, past = clip_error(mean_squared(v - v_target), old_error, A, config.clip_range or math.inf)
            loss = dgpo_loss(error, ref_error, A, config.beta)
            # To the frozen model even where the reference of S moves: without an anchor, all errors drift upwards.
            kl = mean_squared(v - v_frozen).mean()
            ((loss + config.kl_weight * kl) * len(A) / total_rows).backward()
        weight = torch.sigmoid(config.beta * (A * (error - ref_error)).mean(1))   # of the group's gradient, sigmoid(S)
        for name, value in zip(sums, (loss, kl, past.float().mean(), weight.mean())):
            sums[name] += value.detach() * len(A)
    return {name: float(value) for name, value in sums.items()}   # read once: every reading waits for the GPU

def optimizer_step(model, optimizer, done, config):
    """Take the `done + 1`-th step of a run, let the other policies follow, and return the gradient's norm."""
    sum_over_processes(model.lora.weights("current"))
    norm = nn.utils.clip_grad_norm_(model.lora.weights("current"), 1.0).item()
    if not math.isfinite(norm):   # it would spoil every weight and AdamW's moments for good
        raise UserError("the gradient is not finite: that wants a new run with a lower --learning-rate")
    optimizer.step()
    model.lora.follow("old", min(config.old_decay, config.old_decay_ramp * done))
    # Early on a long average would be mostly the untrained model: (1 + k) / (10 + k) opens it gradually.
    model.lora.follow("ema", min(config.ema_decay, (2 + done) / (11 + done)))
    optimizer.zero_grad(set_to_none=True)
    return norm

def update(model, optimizer, x0, prompts, advantages, generators, done, config, accumulate=accumulate_gradients):
    """All optimizer steps on one rollout, the run's `done + 1`-th and on.  Returns sums over rows: dict of floats.
    x0: [P, G, C, H, W]; P prompts; advantages: [P, G]; P generators; accumulate: the rule, DGPO's or another's."""
    M, steps, sums, norm = config.timesteps_per_rollout, config.updates_per_rollout, {}, 0.0
    useful, m = (advantages != 0).any(1).nonzero()[:, 0].tolist(), M // steps   # groups with signal, m timesteps a step
    sigma = [draw_timesteps(M, config.t_min, model.shift, generators[g]) for g in useful]          # [M] each
    noise = draw_noise([generators[g] for g in useful], M, 1, *x0.shape[2:])                       # [., M, 1, C, H, W]
    x0, advantages = (t[useful].repeat_interleave(m, 0) for t in (x0, advantages))                 # [R, G, ...]
    prompts = [prompts[g] for g in useful for _ in range(m)]
    for k in range(steps):
        if useful:
            part = slice(k * m, (k + 1) * m)
            found = accumulate(model, x0, prompts, advantages, torch.cat([s[part] for s in sigma]).to(x0.device),
                               noise[:, part].flatten(0, 1).to(x0.device), config, config.groups_per_step * m)
            sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
        norm += optimizer_step(model, optimizer, done + k, config) / steps
    return {**sums, "gradient_norm": norm}


# ---- TRAIN (Algorithm 1) -------------------------------------------------------------------------------------------
def rows_of_step(rows, step, config):
    """The P prompts of a step: one seeded permutation of the file after another, without a state to save."""
    places = [divmod(step * config.groups_per_step + i, len(rows)) for i in range(config.groups_per_step)]
    orders = {epoch: torch.randperm(len(rows), generator=seeded(config.seed, "order", epoch)) for epoch in dict(places)}
    return [rows[orders[epoch][place]] for epoch, place in places]

def draw_and_score(model, judges, rows, size, seeds, num_steps, policy, config):
    """Draw `size` images for each of P rows and score them: (x0, images, dict name -> dict term -> scores [P, size]).
    judges: dict name -> reward.  Of many processes each draws for its own rows, and all get all scores."""
    mine = own(len(rows))
    generators = [seeded(*seeds, i) for i in range(len(rows))][mine]
    x0, *drawn = rollout(model, rows[mine], size, generators, num_steps, policy, config)

    def score():
        if not x0.isfinite().all():
            raise UserError("images are not finite: after training, that wants a new run with a lower --learning-rate")
        return {name: {term: values.view(-1, size) for term, values in reward.terms(*drawn).items()}
                for name, reward in judges.items()}

    shares = gather(score)
    return x0, drawn[0], {name: {term: torch.cat([share[name][term] for share in shares]) for term in terms}
                          for name, terms in shares[0].items() if all(share[name] for share in shares)}

def train_step(model, optimizer, reward, rows, step, config, accumulate=accumulate_gradients):
    """One step of Algorithm 1 on P rows: rollout, rewards, advantages, update.  Returns the step's metrics."""
    start, mine, done = time.monotonic(), own(len(rows)), step * config.updates_per_rollout
    policy = "old" if 0 < config.rollout_old_after < done else "current"
    x0, _, scores = draw_and_score(model, {"": reward}, rows, config.group_size, (config.seed, "rollout", step),
                                   config.num_inference_steps, policy, config)                     # [P, G, C, H, W]
    terms, drawn, sums = scores[""], time.monotonic(), {}                                          # [P, G] each
    rewards = scaled = reward.total(terms)                                                         # [P, G]
    if config.advantage_std == "terms":
        scaled = reward.total({name: group_advantages(score, max_advantage=math.inf) for name, score in terms.items()})
    advantages = group_advantages(scaled, config.advantage_std).float()                            # [P, G]
    if advantages.any():
        generators = [seeded(config.seed, "update", step, i) for i in range(len(rows))][mine]
        sums = update(model, optimizer, x0, [row["prompt"] for row in rows[mine]], advantages[mine].to(model.device),
                      generators, done, config, accumulate)
    shares, signal = gather(lambda: sums), (advantages != 0).any(1).double()                       # [P]
    rows_trained_on = max(1.0, signal.sum().item() * config.timesteps_per_rollout)
    return {"reward_mean": rewards.mean().item(), "reward_std": rewards.std(1).mean().item(),
            **{f"terms/{name}": score.double().mean().item() for name, score in terms.items() if len(terms) > 1},
            "zero_groups": 1 - signal.mean().item(), "gradient_norm": sums.get("gradient_norm", 0.0),
            **{name: sum(share.get(name, 0.0) for share in shares) / rows_trained_on
               for name in ("loss", "kl", "clip_fraction", "group_weight")},
            "seconds_rollout": drawn - start, "seconds_update": time.monotonic() - drawn}

def train(config):
    """Algorithm 1, with evaluations, checkpoints and a log.  A checkpoint means: step done, not yet evaluated."""
    parts = []
    gather(lambda: parts.extend(prepare(config)))
    model, judges, rows, held_out = parts
    reward = next(iter(judges.values()))   # the one trained on; the others only watch
    optimizer = torch.optim.AdamW(model.lora.weights("current"), lr=config.learning_rate, weight_decay=1e-4)
    run = Run(config, model.lora, optimizer)
    before = after = evaluate(model, judges, held_out, config, "frozen" if config.steps else "base")
    for step in (bar := tqdm(range(run.done, config.steps), "dgpo", config.steps, initial=run.done, ncols=80)):
        if step % config.eval_every == 0:
            run.record(before, evaluate(model, judges, held_out, config, "ema") if step else before, held_out)
        metrics = train_step(model, optimizer, reward, rows_of_step(rows, step, config), step, config)
        run.done = step + 1
        run.log(metrics)
        bar.set_postfix_str(f"reward={metrics['reward_mean']:.3g}, kl={metrics['kl']:.2g}", refresh=False)
        if run.done % config.save_every == 0 or run.done == config.steps:
            run.save()
    if run.done or config.lora:
        after = evaluate(model, judges, held_out, config, "ema")
    run.record(before, after, held_out)


# ---- POLICIES: one frozen model, and several sets of low-rank weights beside it ------------------------------------
def add_lora(layer, inputs, output):
    """A forward hook: y = W x + (alpha / rank) up down x (arXiv 2106.09685), or W x where `layer.pair` is empty."""
    if not layer.pair:
        return output
    # Kept in fp32, used in the activations' dtype: on a GPU, matrix products in fp32 are many times slower.
    down, up = (t.to(output.dtype) for t in layer.pair)
    return output + F.linear(F.linear(inputs[0], LoRA.scale * down), up)

class LoRA(nn.Module):
    """LoRA on a transformer's linear layers whose name ends with one of `targets`, a set of weights for each policy:
    "current" is trained; "old" follows it, for clip and rollouts; "ema" is its average, evaluated and exported.
    "frozen" is the reference: the model alone ("base"), or with the LoRA that the run began with."""
    scale = 2.0   # alpha / rank

    def __init__(self, transformer, rank, targets, seed=0):
        super().__init__()
        self.layers = {name: layer for name, layer in transformer.requires_grad_(False).named_modules()
                       if isinstance(layer, nn.Linear) and name.endswith(tuple("." + target for target in targets))}
        if not self.layers:
            raise ValueError(f"none of its linear layers is one of {', '.join(targets)}")
        self.policies = nn.ModuleDict({"base": nn.ParameterList(), "frozen": nn.ParameterList()})
        generator, self.device, weights = torch.Generator().manual_seed(seed), transformer.device, []
        for layer in self.layers.values():
            layer.register_forward_hook(add_lora)
            # As in the LoRA paper, `down` is Gaussian and `up` zero: every policy starts as the base model.
            weights += [draw_noise([generator] * rank, layer.in_features) / rank, torch.zeros(layer.out_features, rank)]
        self.start(weights, "current", "old", "ema")
        self.select("current")

    def start(self, weights, *policies):
        """Let policies begin with [down [rank, in], up [out, rank], ...], in fp32: AdamW's steps are below bf16's."""
        for policy in policies:
            self.policies[policy] = nn.ParameterList(t.to(self.device, torch.float32, copy=True) for t in weights)
            self.policies[policy].requires_grad_(policy == "current")

    def weights(self, policy):
        """The policy's tensors in a fixed order: [down, up, down, up, ...].  Raises KeyError for any other name."""
        return list(self.policies[policy])

    def select(self, policy):
        """Make `policy` the one whose velocity the transformer computes."""
        weights = self.weights(policy)
        for i, layer in enumerate(self.layers.values()):
            layer.pair = weights[2 * i:2 * i + 2]

    @torch.no_grad()
    def follow(self, policy, decay):
        """Move a policy towards the current one: theta^- <- decay theta^- + (1 - decay) theta."""
        torch._foreach_lerp_(self.weights(policy), self.weights("current"), 1 - decay)

    def load(self, path):
        """Let all policies begin with the LoRA in a file of diffusers or peft, or its folder.  Raises UserError."""
        with blame(f"--lora {path} cannot be used"):
            pairs = load_lora(path)
            if {name: (down.shape[1], len(up)) for name, (down, up) in pairs.items()} != {
                    name: (layer.in_features, layer.out_features) for name, layer in self.layers.items()}:
                raise ValueError("its layers are not this model's, or not all that are trained here")
        weights = [t for name in self.layers for t in (pairs[name][0], pairs[name][1] / self.scale)]
        self.start(weights, "frozen", "current", "old", "ema")

    def export(self, folder, step):
        """Write the average as diffusers' LoRA file, for `pipe.load_lora_weights(folder)`."""
        keys = [f"transformer.{name}.lora_{part}.weight" for name in self.layers for part in "AB"]
        # alpha / rank is folded into `up`, as the file then means the same to every version of diffusers.
        weights = [t.detach().cpu() * (self.scale if "_B." in key else 1) for key, t in zip(keys, self.weights("ema"))]
        write(folder / "pytorch_lora_weights.safetensors", save(dict(zip(keys, weights)), {"step": str(step)}))


# ---- THE MODEL.  The loop knows four things of it, so that another class can stand in SD3's place (adapters/ has one):
#   encode(prompts)    get ready for these prompts and forget all others
#   velocity(x, sigma, prompts, policy, guidance_scale)   x [B, ...], one sigma or [B], B prompts -> float32 like x
#   decode(x0)         latents [B, ...] -> list of B PIL images
# and `latent_shape` (an image's); it hands on `lora`, with velocity's policies, `device` and its schedule's `shift`.

def load_model(config):
    """The model of --model, a folder (no hub is asked) or a hub id, ready for the loop.  Raises UserError."""
    pipe = load_pipeline(config.model, getattr(torch, config.dtype))
    with blame(f"--model {config.model}, a {type(pipe).__name__}, does not fit"):
        special = [name for name, value in pipe.scheduler.config.items() if value and name.startswith(
            ("use_", "shift_terminal", "invert_", "stochastic_"))]
        kinds = type(pipe).__name__, type(pipe.scheduler).__name__
        if kinds == ("StableDiffusion3Pipeline", "FlowMatchEulerDiscreteScheduler") and not special:
            return SD3(pipe, config)
        from adapters.any_pipeline import AnyPipeline
        return AnyPipeline(pipe, config)

class SD3:
    """Stable Diffusion 3 and 3.5 through diffusers' pipeline."""
    lora_targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",   # none on SD3.5's second attention, attn2
                    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")

    def __init__(self, pipe, config):
        """Take a StableDiffusion3Pipeline and put it on the device.  Raises ValueError for a resolution."""
        self.pipe, self.vae, self.transformer = pipe, pipe.vae, pipe.transformer.to(config.device)
        self.device, self.rest = torch.device(config.device), "cpu" if config.offload else config.device
        self.max_sequence_length = config.max_sequence_length or 256   # the pipeline's own
        self.encoders = nn.ModuleList(filter(None, (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)))
        self.lora = LoRA(self.transformer, config.lora_rank, self.lora_targets, config.seed)
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        for block in self.transformer.transformer_blocks if config.compile else ():
            block.compile(dynamic=False)   # one graph for each policy, batch size and kind of block
            torch._dynamo.config.recompile_limit = 64
        shape, factor = self.transformer.config, 2 ** (len(self.vae.config.block_out_channels) - 1)
        step = shape.patch_size * factor
        if config.resolution % step or config.resolution > step * shape.pos_embed_max_size:
            raise ValueError(f"--resolution has to be a multiple of {step}, at most {step * shape.pos_embed_max_size}")
        side = config.resolution // factor or shape.sample_size
        self.latent_shape, self.shift = (shape.in_channels, side, side), pipe.scheduler.config.shift
        # An image of 1024 x 1024 takes about 4 GB to decode, so pixels, not images, are what is counted.
        self.decode_batch_size = max(1, 2 ** 21 // (side * factor) ** 2)

    @torch.no_grad()
    def encode(self, prompts):
        """Encode the prompts, and "" for guidance, and forget all others; what is too long is cut off."""
        prompts, self.texts = list(dict.fromkeys(["", *prompts])), {}
        self.encoders.to(self.device)
        for i in range(0, len(prompts), 16):
            tokens, _, pooled, _ = self.pipe.encode_prompt(
                prompts[i:i + 16], None, None, do_classifier_free_guidance=False, device=self.device,
                max_sequence_length=self.max_sequence_length)
            self.texts |= zip(prompts[i:i + 16], zip(tokens, pooled))
        self.encoders.to(self.rest)

    def embeddings(self, prompts):
        """List of B strings -> (token embeddings [B, L, D], pooled embeddings [B, D]) on the device."""
        return tuple(map(torch.stack, zip(*(self.texts[prompt] for prompt in prompts))))

    def velocity(self, x, sigma, prompts, policy, guidance_scale=1.0):
        """The policy's velocity at x [B, C, H, W] for B prompts, float32 [B, C, H, W]; sigma: a number, 0-d, or [B];
        guidance_scale > 1: v("") + scale (v(prompt) - v(""))."""
        self.lora.select(policy)
        inputs, guided = x.to(self.transformer.dtype), guidance_scale > 1
        if not isinstance(sigma, torch.Tensor) or sigma.ndim == 0:
            sigma = torch.full((len(x),), float(sigma), device=x.device)   # a copy to the GPU would wait for it
        if guided:
            prompts, inputs, sigma = [*prompts, *[""] * len(x)], torch.cat([inputs, inputs]), torch.cat([sigma, sigma])
        v = self.transformer(inputs, *self.embeddings(prompts), sigma * 1000, return_dict=False)[0].float()
        if guided:
            v, v_empty = v.chunk(2)
            v = v_empty + guidance_scale * (v - v_empty)
        return v

    @torch.no_grad()
    def decode(self, x0):
        """Latents [B, C, H, W] -> list of B PIL images, in float32: the half types overflow in the VAE, or show."""
        images, latents = [], x0 / self.vae.config.scaling_factor + self.vae.config.shift_factor
        self.vae.to(self.device)
        for part in latents.split(self.decode_batch_size):
            images += self.pipe.image_processor.postprocess(self.vae.decode(part, return_dict=False)[0], "pil")
        self.vae.to(self.rest)
        return images


# ---- EVALUATION: held-out prompts, always from the same noise ------------------------------------------------------
def evaluate(model, judges, rows, config, policy, pictured=12):
    """Score the policy on N prompts, K images each: (dict name -> scores [N, K], images of the first `pictured`)."""
    _, images, scores = draw_and_score(model, judges, rows, config.eval_images, ("evaluation",),
                                       config.eval_num_inference_steps, policy, config)
    shown = images[:max(0, pictured - own(len(rows)).start) * config.eval_images]
    return ({label: score for name, terms in scores.items() for label, score in judges[name].scores(terms).items()},
            [image for share in gather(lambda: shown) for image in share])

def picture_rows(columns, captions):
    """A row for each of N captions, which stand at the left; columns: heading -> N * K images.  A PIL image."""
    from diffusers.utils import make_image_grid
    (width, height), N = next(iter(columns.values()))[0].size, len(captions)
    side = max(96, min(width, 512))   # small pictures are shown larger, pixel by pixel, and large ones smaller
    size, how = (side, round(height * side / width)), Image.Resampling.NEAREST if width < side else None
    folders = ("/usr/share/fonts", "~/.fonts", "~/.local/share/fonts", "/System/Library/Fonts", "C:/Windows/Fonts")
    files = [str(file) for folder in folders for file in sorted(Path(folder).expanduser().rglob("*.[ot]t[fc]"))]

    def words(text, top=6):
        tile = Image.new("RGB", size, "white")
        for file in ["", *files] if text else ():
            with contextlib.suppress(OSError):   # of a file that is no typeface after all
                font = ImageFont.truetype(file, 12) if file else ImageFont.load_default(12)
                # A typeface draws a box for what it lacks; what none of them has is left to metrics.jsonl.
                if all(bytes(font.getmask(c)) != bytes(font.getmask("\uffff")) for c in set(text) - {" "}):
                    wrapped = textwrap.fill(text, max(1, int(len(text) * (side - 12) / font.getlength(text))))
                    ImageDraw.Draw(tile).text((6, top), wrapped, "black", font)
                    break
        return tile

    tiles = [[words("")], *([words(caption)] for caption in captions)]
    for heading, images in columns.items():
        K = len(images) // N
        tiles[0] += [words(heading, size[1] - 18), *[words("")] * (K - 1)]
        for i in range(N):
            tiles[i + 1] += [image.resize(size, how) for image in images[i * K:(i + 1) * K]]
    whole = make_image_grid(sum(tiles, []), N + 1, len(tiles[0]))
    return whole.crop((0, size[1] - 24, *whole.size))


# ---- THE RUN'S FOLDER ----------------------------------------------------------------------------------------------
def write(path, content):
    """Write bytes so that `path` is the old file or the whole new one, whatever happens; the first process alone."""
    if processes()[0]:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")   # two writers by mistake do not tear it
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

class Run:
    """A run's folder: config.json, metrics.jsonl, checkpoint.pt, samples/, lora/.  The first process alone writes."""

    def __init__(self, config, lora, optimizer):
        """Make the folder, or go on from its checkpoint: `done` steps, `lines` of metrics.jsonl.  Raises UserError."""
        self.folder, self.lora, self.optimizer = Path(config.output_dir), lora, optimizer
        self.lines, self.done, self.tracked, self.tracker = [], 0, 0, None
        if config.resume and (self.folder / "checkpoint.pt").exists():
            with blame(f"the checkpoint cannot be used; --lora {self.folder}/lora begins a new run with its last LoRA"):
                state = torch.load(self.folder / "checkpoint.pt", "cpu", weights_only=True)
                lora.load_state_dict(state["lora"])
                optimizer.load_state_dict(state["optimizer"])
                self.lines, self.done = state["lines"], state["lines"][-1]["step"]
            optimizer.param_groups[0]["lr"] = config.learning_rate   # which may be another one now
        if len(set(gather(lambda: self.done))) > 1:
            raise UserError(f"not all processes see the run in {self.folder}: it must lie on a disk that all share")
        self.started = time.monotonic() - (self.lines[-1]["seconds"] if self.lines else 0)
        if processes()[0]:
            return
        with blame(f"--output-dir {self.folder} cannot be used"):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not config.resume and any(self.folder.iterdir()):
                raise UserError(f"{self.folder} holds another run; --resume {self.folder} goes on with it")
        if config.track:
            with blame(f"--track {config.track} does not work (is it installed?)"):
                self.tracker = importlib.import_module(config.track)
                os.environ.setdefault("WANDB_RUN_ID", self.folder.name)   # the others find a run by its name
                self.tracker.init(project="dgpo", name=self.folder.name, config=vars(config),
                                  resume="allow" if config.resume else "never")
        if (metrics := self.folder / "metrics.jsonl").exists():   # a killed run has logged and tracked more than saved
            self.tracked = metrics.read_bytes().count(b"\n")
        commit = os.popen(f"git -C '{Path(__file__).resolve().parent}' describe --always --dirty 2>/dev/null").read()
        write(self.folder / "config.json", json.dumps({**vars(config), "commit": commit.strip()}, indent=2).encode())
        write(metrics, b"".join(json.dumps(line).encode() + b"\n" for line in self.lines))

    def log(self, values, **pictures):
        """Append a line to metrics.jsonl, and hand it and pictures to the tracker."""
        self.lines.append({"step": self.done, **values, "seconds": round(time.monotonic() - self.started, 3)})
        if processes()[0] == 0:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(self.lines[-1]) + "\n")
        if self.tracker and len(self.lines) > self.tracked:
            pictures = {name: self.tracker.Image(picture) for name, picture in pictures.items()}
            self.tracker.log({**self.lines[-1], **pictures}, step=self.done)

    def save(self):
        """Write the exported LoRA and the checkpoint: all that a run needs to go on."""
        self.lora.export(self.folder / "lora", self.done)   # first: what ends between the two is done again
        state = {"lora": self.lora.state_dict(), "optimizer": self.optimizer.state_dict(), "lines": self.lines}
        torch.save(state, buffer := io.BytesIO())
        write(self.folder / "checkpoint.pt", buffer.getvalue())

    def record(self, before, after, rows):
        """Log, print and draw `evaluate`'s results, beside those before training, and export the LoRA they are of."""
        table, numbers = report(f"after {self.done} steps", before[0], after[0], rows)
        was, now = (next(iter(scores.values())) for scores, _ in (before, after))                  # [N, K]
        captions = [f"{row['prompt']}  {a:.2f} -> {b:.2f}" for row, a, b in zip(rows, was.mean(1), now.mean(1))]
        captions = captions[:len(after[1]) // now.shape[1]]
        picture = picture_rows({f"before: {was.mean():.3f}": before[1], f"after: {now.mean():.3f}": after[1]}, captions)
        self.log({"evaluation": True, **numbers, "captions": captions}, samples=picture)
        tqdm.write("\n" + table)
        picture.save(buffer := io.BytesIO(), "PNG")
        for name in (f"samples/{self.done:06d}.png", "before_after.png"):
            write(self.folder / name, buffer.getvalue())
        if self.done:
            self.lora.export(self.folder / f"lora/{self.done:06d}", self.done)


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
    for error in (share for share in shares if isinstance(share, UserError)):
        raise error
    return shares

def sum_over_processes(weights):
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


# ---- MAIN: from the command line to train() and from errors to sentences -------------------------------------------
def parse_arguments(arguments=None):
    """The command line, one flag a field, as a Config with nothing left open.  Raises UserError."""
    parser = argparse.ArgumentParser(
        usage="python dgpo.py --prompt-file my.txt --reward my_rewards.py:redness [--flag value ...]", description=
        "Defaults in brackets: the embedded job's; with another --model.", argument_default=argparse.SUPPRESS,
        allow_abbrev=False)
    group, before, arguments = parser, {}, list(sys.argv[1:] if arguments is None else arguments)
    for field in dataclasses.fields(Config):
        group = parser.add_argument_group(field.metadata["group"]) if "group" in field.metadata else group
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {
            "type": field.type, "choices": field.metadata.get("choices")}
        shown = "; ".join(str(value) for value in (field.default, field.metadata.get("paper", "")) if value != "")
        group.add_argument(flag(field.name), help=field.metadata["help"] + f" [{shown}]" * bool(shown), **kind)
    typed = vars(parser.parse_args(arguments))
    if "resume" in typed:   # a run's settings, or PAPER's, are flags before those that are typed
        with blame(f"--resume {typed['resume']}: there is no run that this version can go on with"):
            stored = json.loads((Path(typed["resume"]) / "config.json").read_text())
            before = {field.name: stored[field.name] for field in dataclasses.fields(Config)}
    elif Path(typed.get("model", EMBEDDED_MODEL)).resolve() != EMBEDDED_MODEL:
        before = PAPER
    flags = [flag(name if value else f"no-{name}") if isinstance(value, bool) else f"{flag(name)}={value}"
             for name, value in before.items()]
    config = Config(**{"model": str(EMBEDDED_MODEL), **vars(parser.parse_args([*flags, *arguments]))})
    if "output_dir" in typed and config.resume:
        raise UserError("--resume goes on in the run's own folder: leave --output-dir out")
    for name in [name for name in typed if config.resume and name != "resume" and typed[name] != before[name]]:
        print(f"{flag(name)} is {typed[name]} from now on; it was {before[name]}")
    path = Path(config.prompt_file)
    if not path.name:
        raise UserError("--prompt-file is missing")
    for file in (path.with_stem("heldout"), path.with_stem(f"{path.stem}_heldout")):
        if "eval_prompt_file" not in {**before, **typed} and os.path.exists(file) and file != path:
            config.eval_prompt_file = str(file)
    if "eval_reward" not in {**before, **typed} and config.reward in ("shapes", "words"):
        config.eval_reward = "realism"
    config.output_dir = config.resume or config.output_dir or time.strftime(f"runs/%Y-%m-%d-%H%M%S-{os.getpid()}")
    for name in ("prompt_file", "eval_prompt_file", "lora", "output_dir", "resume", "model"):
        if getattr(config, name) and (name != "model" or os.path.exists(config.model)):
            setattr(config, name, os.path.abspath(getattr(config, name)))   # a run may be resumed from another folder
    config.reward, config.eval_reward = absolute_paths(config.reward), absolute_paths(config.eval_reward)
    return config

def prepare(config):
    """What can go wrong before a file is written: (model, judges, the first of which is trained on, rows, held_out)."""
    config.check()
    with blame(f"--device {config.device} cannot be used"):
        torch.zeros(1, device=config.device).item()
    load_prompts(config.prompt_file)   # before anything large is loaded
    reward = load_reward(config.reward, config.device)
    judges = [load_reward(spec, config.device, judge=True) for spec in filter(None, config.eval_reward.split(","))]
    rows = load_prompts(config.prompt_file, reward)
    held_out = load_prompts(config.eval_prompt_file, reward) if config.eval_prompt_file else rows
    held_out = list({row["prompt"]: row for row in held_out}.values())   # drawn, as published files are sorted
    held_out = random.Random(0).sample(held_out, min(config.eval_prompts or len(held_out), len(held_out)))
    model = load_model(config)
    if config.lora:
        model.lora.load(config.lora)
    calls = config.num_inference_steps * (1 + (config.guidance_scale > 1)) + config.timesteps_per_rollout * (
        4 + (config.reference_guidance_scale > 1))   # an image's; trained on: reference, old, current there and back
    print(f"{len(model.lora.layers)} LoRA layers on {config.device} in {config.dtype}; writing to {config.output_dir}\n"
          f"a step: {config.groups_per_step} of {len(rows)} prompts x {config.group_size} images x {calls} transformer "
          f"evaluations, {config.updates_per_rollout} optimizer steps; evaluated on {len(held_out)} "
          f"{'held-out prompts' if config.eval_prompt_file else 'prompts that are TRAINED ON'}", flush=True)
    return model, {reward.name: reward, **{j.name: j for j in judges if j.name != reward.name}}, rows, held_out

def main(arguments=None):
    """The command line.  Exit codes: 0 done, 1 something failed, 2 a setting or a reward to mend, 130 Ctrl-C."""
    folder = None
    try:
        sys.stdout.reconfigure(errors="backslashreplace")   # of what the terminal cannot show, as on stderr
        join_processes()
        config = gather(lambda: parse_arguments(arguments))[0]
        folder = Path(config.output_dir)
        train(config)
        return 0
    except BaseException as error:
        if isinstance(error, SystemExit) and folder is None:   # argparse's, after --help or its own sentence
            return error.code
        code = {UserError: 2, KeyboardInterrupt: 130}.get(type(error), 1)
        message = {2: str(error), 130: "interrupted"}.get(code, f"{type(error).__name__}: {error}")
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in message:
            message = "out of memory: lower --batch-size, --group-size, --resolution, or give --gradient-checkpointing"
        elif code == 1 and not isinstance(error, OSError):   # what nobody foresaw, on any of the processes
            traceback.print_exc(file=sys.__stderr__)
    if code != 2 and folder and (folder / "checkpoint.pt").exists():
        message += f"; --resume {folder} goes on from its last checkpoint"
    print("dgpo.py: error:", " ".join(message.split()), file=sys.stderr)
    return code

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    exit_code = main()
    atexit._run_exitfuncs()   # by which trackers end
    print(end="", flush=True)
    os._exit(exit_code)   # one of many processes would first end its group, which can wait for ever for gloo's threads
