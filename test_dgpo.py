"""What the method promises, one property a test, in the order of dgpo.py; then runs, the command and README.

    python -m pytest -q test_dgpo.py   # README says what it needs besides
"""

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image, ImageFont
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

import dgpo
from adapters.test_rewards import GENEVAL, clip_folder, geneval_folder, judges, ocr_folder, vlm_folder  # noqa: F401
from benchmarks import throughput
from dgpo import (
    SD3,
    Config,
    LoRA,
    accumulate_gradients,
    add_noise,
    clip_error,
    dgpo_loss,
    draw_timesteps,
    evaluate,
    flag,
    group_advantages,
    load_model,
    main,
    ode_sigmas,
    parse_arguments,
    picture_rows,
    prepare,
    rollout,
    rows_of_step,
    sample_ode,
    seeded,
    shift_time,
    train_step,
    update,
)
from rewards import UserError, load_reward, report
from shapes.train_base import build_tokenizer

torch.set_num_threads(1)   # two workers share two cores (README: pytest -n 2)

ROOT = Path(__file__).resolve().parent
MODEL = ROOT / "shapes/model"
PROMPTS = ["a red circle", "three squares", "a star left of a ring", "a green cross and a blue triangle"]
ROWS = [{"prompt": prompt} for prompt in PROMPTS]
UMASK = os.umask(0)
os.umask(UMASK)


POLICIES = ("current", "old", "ema")


def seed(number):
    return torch.Generator().manual_seed(number)


def seeds(number, count):
    """A generator for each of `count` groups."""
    return [seed(1000 * number + i) for i in range(count)]


@pytest.fixture(autouse=True)
def forget_files():
    """Rewards of the user's own are modules: those of one test are not another's."""
    modules, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - modules:
        if "pytest-of" in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    sys.path[:] = path


def sd3(**settings):
    """The embedded model, freshly loaded and with PROMPTS encoded, and the settings it was loaded with."""
    config = Config(**{"model": str(MODEL), "device": "cpu", "lora_rank": 4, **settings})
    model = load_model(config)
    model.encode(PROMPTS)
    return model, config


def needs(package):
    """Skip a test, and say so, where a test-only package is missing; README's command installs them all."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"pip install {package}")


def diffusers_pipeline():
    """The same model as plain diffusers sees it."""
    pipe = StableDiffusion3Pipeline.from_pretrained(MODEL, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def randomize(model, policy, scale, number):
    """Give a policy LoRA weights that matter; fresh ones are the identity, which would hide almost any mistake."""
    generator = seed(number)
    with torch.no_grad():
        for t in model.lora.weights(policy):
            t.copy_(scale * torch.randn(t.shape, generator=generator))


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


# ------------------------------------------------------------------------------------------------
# FLOW MATCHING
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "dpm++2m"])
def test_one_step_with_the_true_velocity_lands_on_the_data_from_any_noise_level(solver):
    # Trainer (add_noise) and sampler must agree on the direction of time and on the sign of the velocity.
    x0, noise = torch.randn(2, 5, 4, 8, 8, dtype=torch.float64, generator=seed(0))
    for sigma in (0.01, 0.3, 0.7, 1.0):
        x_t, velocity = add_noise(x0, noise, sigma)
        landed = sample_ode(lambda x, s: velocity, x_t, torch.tensor([sigma, 0.0], dtype=torch.float64), solver)
        torch.testing.assert_close(landed, x0)


def gaussian_flow(mu=1.5, s=0.9):
    """The exact velocity for x0 ~ N(mu, s^2), whose marginal at sigma is N((1 - sigma) mu, var), and the way of a point
    with z-score z, which the flow keeps."""
    def velocity(x, sigma):  # E[noise - x0 | x_sigma = x], by linear regression
        var = ((1 - sigma) * s) ** 2 + sigma ** 2
        return -mu + (sigma - (1 - sigma) * s ** 2) / var * (x - (1 - sigma) * mu)

    def exact(sigma, z):
        return (1 - sigma) * mu + (((1 - sigma) * s) ** 2 + sigma ** 2).sqrt() * z

    return velocity, exact


@pytest.mark.parametrize("solver, order", [("euler", 1), ("dpm++2m", 2)])
def test_solvers_reach_their_order_of_convergence_on_a_gaussian(solver, order):
    (velocity, exact), z = gaussian_flow(), torch.linspace(-2, 2, 9, dtype=torch.float64)
    # Away from the ends, as lambda = log((1 - sigma) / sigma), in which the steps have to be small, is infinite there;
    # then on each solver's own grid, from its first noise level to data, where it is what a rollout comes to.
    def part(steps):
        return shift_time(torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64), 3.0)

    def whole(steps):
        return ode_sigmas(steps, 3.0, solver).double()

    for grid, counts, slack in ((part, (64, 128, 256), 0.1), (whole, (512, 1024, 2048), 0.25)):   # there, but for a log
        errors = [(sample_ode(velocity, exact(sigmas[0], z), sigmas, solver) - exact(sigmas[-1], z)).abs().max()
                  for sigmas in map(grid, counts)]
        for coarse, fine in itertools.pairwise(errors):
            assert math.log2(coarse / fine) == pytest.approx(order, abs=slack)
    assert errors[-1] < {1: 2e-3, 2: 5e-5}[order]


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.5])
@pytest.mark.parametrize("solver", ["euler", "dpm++2m"])
def test_a_rollout_is_its_schedulers_step_by_step(solver, shift):
    torch.testing.assert_close(shift_time(torch.arange(1000, 0, -1) / 1000, shift),
                               FlowMatchEulerDiscreteScheduler(shift=shift).sigmas)

    def velocity(x, sigma):
        return torch.tanh(x) * (0.5 + sigma) - 1

    for steps in (2, 6, 10, 14, 40):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift) if solver == "euler" else DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2)
        scheduler.set_timesteps(steps)
        sigmas = ode_sigmas(steps, shift, solver)
        torch.testing.assert_close(sigmas, scheduler.sigmas, rtol=0, atol=1e-6)
        x = noise = torch.randn(3, 4, generator=seed(1))
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(velocity(x, scheduler.sigmas[i]), t, x).prev_sample
            if i < steps - 1:   # our own way as far as that; the last step goes to sigma = 0
                ours = sample_ode(velocity, noise, sigmas[:i + 2], solver)
                torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)
        torch.testing.assert_close(sample_ode(velocity, noise, sigmas, solver), x, rtol=0, atol=1e-5)


def test_the_default_solver_is_nearer_to_the_fine_ode_than_euler():
    model, _ = sd3()
    prompts, noise = PROMPTS * 2, torch.randn(8, *model.latent_shape, generator=seed(5))

    def draw(steps, solver):
        with torch.no_grad():
            return sample_ode(lambda x, sigma: model.velocity(x, sigma, prompts, "frozen"), noise,
                              ode_sigmas(steps, 3.0, solver), solver)

    fine = draw(60, "dpm++2m")
    for steps in (6, 8, 10):
        ours, euler = ((draw(steps, solver) - fine).pow(2).mean().sqrt() for solver in (Config().solver, "euler"))
        assert ours < 0.75 * euler


@pytest.mark.parametrize("solver", ["euler", "dpm++2m"])
def test_a_rollout_never_waits_for_the_device(solver):
    # A tensor on the meta device has a shape and no values: looking at one, which is what makes a GPU wait, raises.
    model = load_model(Config(model=str(MODEL), device="meta"))
    model.texts = {p: (torch.zeros(11, 128, device="meta"), torch.zeros(128, device="meta")) for p in ["", *PROMPTS]}
    noise = torch.empty(4, *model.latent_shape, device="meta")
    x0 = sample_ode(lambda x, sigma: model.velocity(x, sigma, PROMPTS, "current", 3.0), noise, ode_sigmas(5, 3.0),
                    solver)
    assert x0.device.type == "meta" and x0.shape == noise.shape


def test_timesteps_stay_above_t_min_and_fall_one_in_each_stratum():
    t_min, shift, count, generator = 0.3, 3.0, 4, seed(2)
    t = torch.stack([draw_timesteps(count, t_min, shift, generator) for _ in range(2000)])
    assert t.shape == (2000, count) and t.dtype == torch.float32
    assert shift_time(t_min, shift) <= t.min() and t.max() <= 1
    u = (shift_time(t, 1 / shift) - t_min) / (1 - t_min)  # the shift undone: uniform in [0, 1]
    strata = (u * count).long().clamp(max=count - 1)
    assert torch.equal(strata.sort(1).values, torch.arange(count).expand(2000, count))
    # In random order, so that an update on one column sees all noise levels; and uniform within the strata.
    assert torch.bincount(strata[:, 0], minlength=count).min() > 400
    assert u.mean().item() == pytest.approx(0.5, abs=0.01) and u.std().item() == pytest.approx(12 ** -0.5, abs=0.01)


# ------------------------------------------------------------------------------------------------
# GROUP PREFERENCES
# ------------------------------------------------------------------------------------------------


def test_advantages_worked_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 4]])
    by_hand = torch.tensor([[1.0, -1, -1, 1], [-3 ** -0.5, -3 ** -0.5, -3 ** -0.5, 3 ** 0.5]])
    torch.testing.assert_close(group_advantages(rewards), by_hand, atol=1e-3, rtol=0)


def test_batch_advantages_share_one_scale_and_keep_each_groups_mean():
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 4]])
    std = (18 / 8 - (6 / 8) ** 2) ** 0.5
    by_hand = torch.tensor([[0.5, -0.5, -0.5, 0.5], [-1, -1, -1, 3]]) / std
    torch.testing.assert_close(group_advantages(rewards, "batch"), by_hand, atol=1e-3, rtol=0)


@pytest.mark.parametrize("std", ["group", "batch"])
def test_advantages_of_a_group_sum_to_zero(std):
    # Hence both sides of the preference weigh the same: sum of |A| over G+ equals that over G-.
    advantages = group_advantages(torch.rand(50, 12, generator=seed(3)), std)
    torch.testing.assert_close(advantages.sum(1), torch.zeros(50), atol=1e-5, rtol=0)
    torch.testing.assert_close(advantages.clamp(min=0).sum(1), advantages.clamp(max=0).sum(1).abs())


@pytest.mark.parametrize("std", ["group", "batch"])
def test_advantages_ignore_an_affine_change_of_rewards(std):
    rewards = torch.randn(50, 12, generator=seed(4))
    torch.testing.assert_close(group_advantages(7 * rewards - 30, std), group_advantages(rewards, std),
                               atol=1e-3, rtol=0)


@pytest.mark.parametrize("std", ["group", "batch"])
def test_equal_rewards_give_exactly_zero_advantage(std):
    # The mean of n times 0.1 is not always 0.1, and a rounding error must not become a preference.
    for size in range(2, 40):
        rewards = torch.stack([torch.full((size,), 0.1), torch.rand(size, generator=seed(5))])
        assert torch.equal(group_advantages(rewards, std)[0], torch.zeros(size))


def test_advantages_of_rewards_that_differ_by_little_are_those_of_exact_arithmetic():
    # A float32 mean of three PickScores near 22 is off by as much as they differ.
    rewards, tiny = torch.tensor([[22, 22, 22 + 2 ** -19]]), 2 ** -19
    std = tiny * 2 ** 0.5 / 3
    by_hand = torch.tensor([[-tiny / 3, -tiny / 3, 2 * tiny / 3]]) / (std + 1e-4)
    assert group_advantages(rewards).dtype == torch.float32
    torch.testing.assert_close(group_advantages(rewards), by_hand, rtol=1e-5, atol=0)
    assert group_advantages(torch.tensor([[0, 1]]))[0].tolist() == pytest.approx([-1, 1], abs=1e-3)   # whole numbers
    spread = 22 + 1e-3 * torch.randn(50, 24, generator=seed(5))
    exact = spread.double()
    exact = (exact - exact.mean(1, True)) / (exact.std(1, keepdim=True, correction=0) + 1e-4)
    torch.testing.assert_close(group_advantages(spread), exact.float(), rtol=1e-6, atol=1e-6)


def test_advantages_are_clamped():
    rewards = torch.zeros(2, 50)
    rewards[0, 0], rewards[1, 0] = 1, -1   # one of fifty: sqrt(49) = 7 standard deviations out
    advantages = group_advantages(rewards)
    assert advantages[0, 0] == 5 and advantages[1, 0] == -5
    assert group_advantages(rewards, max_advantage=10.0)[0, 0].item() == pytest.approx(7, abs=0.01)


def loss_inputs(groups=3, size=6, dtype=torch.float64):
    """Errors of the current and the reference model and advantages, [P, G] each."""
    error, ref_error, rewards = torch.rand(3, groups, size, dtype=dtype, generator=seed(6))
    return error, ref_error, group_advantages(rewards)


@pytest.mark.parametrize("beta", [0.5, 10.0, 100.0])
def test_loss_is_equation_17_written_out(beta):
    error, ref_error, advantages = loss_inputs()
    total = 0.0
    for l_theta, l_ref, A in zip(error.tolist(), ref_error.tolist(), advantages.tolist()):
        preferred = sum(abs(A[i]) * (l_theta[i] - l_ref[i]) for i in range(len(A)) if A[i] > 0)
        rejected = sum(abs(A[i]) * (l_theta[i] - l_ref[i]) for i in range(len(A)) if A[i] <= 0)
        S = beta * (preferred - rejected) / len(A)
        total += -math.log(1 / (1 + math.exp(S)))   # -log sigmoid(-S)
    # beta divides the loss, so that the size of the gradient does not depend on it
    assert dgpo_loss(error, ref_error, advantages, beta).item() == pytest.approx(total / len(error) / beta)


def test_loss_gradient_is_sigmoid_of_S_times_the_advantage():
    beta, (error, ref_error, advantages) = 20.0, loss_inputs()
    target = torch.randn(3, 6, 5, dtype=torch.float64, generator=seed(7))
    velocity = (target + error.sqrt()[..., None]).requires_grad_()       # its mean squared error is `error`
    dgpo_loss((velocity - target).pow(2).mean(-1), ref_error, advantages, beta).backward()
    S = beta * (advantages * (error - ref_error)).sum(1, keepdim=True) / 6
    weight = torch.sigmoid(S) * advantages / (3 * 6)                     # sigmoid(S) A_i / (P G)
    torch.testing.assert_close(velocity.grad, weight[..., None] * 2 * (velocity - target).detach() / 5)


def test_only_the_current_models_error_carries_a_gradient():
    # With shared weights and no no_grad around the reference, the two gradients would cancel to exactly nothing.
    error, reference, advantages = loss_inputs()
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    dgpo_loss(weight * error, weight * error, advantages, 10.0).backward()
    alone, = torch.autograd.grad(dgpo_loss(weight * error, (weight * error).detach(), advantages, 10.0), weight)
    assert weight.grad == alone != 0
    each = [t.clone().requires_grad_() for t in (error, reference, advantages, reference)]
    clipped, _ = clip_error(each[0], each[3], each[2], 0.01)
    dgpo_loss(clipped, each[1], each[2], 10.0).backward()
    assert each[0].grad.any() and all(t.grad is None for t in each[1:])


def test_loss_is_finite_at_any_beta_and_becomes_a_hinge_at_a_large_one():
    error, ref_error, advantages = loss_inputs(groups=20, dtype=torch.float32)
    for beta in (1e-3, 1.0, 1e3, 1e6):
        e = error.clone().requires_grad_()
        loss = dgpo_loss(e, ref_error, advantages, beta)
        loss.backward()
        assert loss.isfinite() and e.grad.isfinite().all()
    hinge = (advantages * (error - ref_error)).mean(1).clamp(min=0).mean()
    assert loss.item() == pytest.approx(hinge.item(), rel=1e-4)


def test_loss_of_a_pair_is_diffusion_dpo():
    beta, (error, ref_error, _) = 30.0, loss_inputs(size=2)
    advantages = torch.tensor([[1.0, -1.0]] * 3, dtype=torch.float64)
    (winner, loser), (ref_winner, ref_loser) = error.T, ref_error.T
    dpo = -F.logsigmoid(-beta / 2 * ((winner - ref_winner) - (loser - ref_loser))).mean()
    torch.testing.assert_close(dgpo_loss(error, ref_error, advantages, beta), dpo / beta)


def test_a_constant_added_to_a_groups_errors_changes_nothing():
    # The log-partition function of a prompt would be such a constant: it cancels because the A of a group sum to zero.
    error, ref_error, advantages = loss_inputs()
    constant = torch.tensor([[5.0], [-3.0], [100.0]], dtype=torch.float64)
    moved = [e.requires_grad_() for e in (error.clone(), error + constant)]
    losses = [dgpo_loss(e, ref_error, advantages, 10.0) for e in moved]
    sum(losses).backward()
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(moved[0].grad, moved[1].grad)


def test_clip_stops_the_samples_that_moved_too_far_their_own_way_and_keeps_all_values():
    c, far, near = 0.1, 0.2, 0.05
    # change of the error since the old policy, advantage, and whether the gradient stops
    cases = [(-far, +2.0, True),    # preferred and already much better explained
             (-near, +2.0, False),  # preferred, still within the range
             (+far, +2.0, False),   # preferred but gone the wrong way: must come back
             (+far, -1.0, True),    # rejected and already pushed far
             (+near, -1.0, False),
             (-far, -1.0, False),
             (-math.log(1 + c) + 1e-6, +1.0, False), (-math.log(1 + c) - 1e-6, +1.0, True),   # at the very edge
             (-math.log(1 - c) - 1e-6, -1.0, False), (-math.log(1 - c) + 1e-6, -1.0, True)]
    change, advantages, stops = (torch.tensor([column], dtype=torch.float64) for column in zip(*cases))
    old_error = torch.rand(1, len(cases), dtype=torch.float64, generator=seed(8)) + 0.5
    error = (old_error + change).requires_grad_()
    clipped, past = clip_error(error, old_error, advantages, c)
    assert torch.equal(past, stops.bool()) and torch.equal(clipped, error)
    clipped.sum().backward()
    assert torch.equal(error.grad, 1 - stops)


# ------------------------------------------------------------------------------------------------
# LORA, POLICIES AND THE MODEL
# ------------------------------------------------------------------------------------------------


def velocities(model, policies):
    """The policies' velocities at one fixed point: a list of [4, C, H, W]."""
    x, sigma = torch.randn(4, *model.latent_shape, generator=seed(9)), torch.tensor([0.5, 0.6, 0.8, 1.0])
    with torch.no_grad():
        return [model.velocity(x, sigma, PROMPTS, policy) for policy in policies]


def update_inputs(model, groups=2, size=5):
    """Latents [P, G, C, H, W], prompts and advantages [P, G] to train on; any latents will do."""
    x0 = torch.randn(groups, size, *model.latent_shape, generator=seed(10))
    return x0, PROMPTS[:groups], group_advantages(torch.rand(groups, size, generator=seed(11)))


def adamw(model):
    return torch.optim.AdamW(model.lora.weights("current"), lr=1e-3)


def take_update(model, optimizer, inputs, config, step=0, **more):
    """`update` of update_inputs at a step, as train_step calls it."""
    generators = [seeded(config.seed, "update", step, i) for i in range(len(inputs[0]))]
    config = dataclasses.replace(config, groups_per_step=len(inputs[0]))
    return update(model, optimizer, *inputs, generators, step * config.updates_per_rollout, config, **more)


def test_every_policy_starts_as_the_base_model():
    model, _ = sd3()
    base, x = diffusers_pipeline().transformer, torch.randn(4, *model.latent_shape, generator=seed(9))
    with torch.no_grad():
        plain = base(x, *model.embeddings(PROMPTS), 1000 * torch.tensor([0.5, 0.6, 0.8, 1.0]), return_dict=False)[0]
    for velocity in velocities(model, ["current", "old", "ema", "frozen", "base"]):
        assert torch.equal(velocity, plain)


def test_a_policy_of_another_name_is_an_error():
    with pytest.raises(KeyError):   # and not the frozen model
        velocities(sd3()[0], ["curent"])


def test_training_moves_the_policies_apart_and_leaves_the_base_weights_bit_for_bit():
    model, config = sd3(kl_weight=0.1)
    policies = ["frozen", "current", "old", "ema"]
    before = velocities(model, policies)
    for step in range(2):
        take_update(model, adamw(model), update_inputs(model), config, step)
    after = velocities(model, policies)
    assert torch.equal(after[0], before[0])   # the frozen reference
    for a, b in itertools.combinations(after, 2):
        assert (a - b).abs().max() > 1e-5
    fresh, _ = sd3()
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        for now, then in zip(getattr(model.pipe, part).parameters(), getattr(fresh.pipe, part).parameters(),
                             strict=True):
            assert torch.equal(now, then)


def test_policies_follow_the_current_one_by_exponential_averages():
    # theta^- <- decay theta^- + (1 - decay) theta, with decays that grow: min(old_decay, ramp * updates before) for the
    # old policy, and (1 + k) / (10 + k) at update k up to ema_decay for the average.
    model, config = sd3(updates_per_rollout=1, old_decay=0.25, old_decay_ramp=0.1, ema_decay=0.3)
    for step, decays in enumerate(((0.0, 2 / 11), (0.1, 3 / 12), (0.2, 0.3), (0.25, 0.3), (0.25, 0.3))):
        before = {policy: [t.clone() for t in model.lora.weights(policy)] for policy in ("old", "ema")}
        take_update(model, adamw(model), update_inputs(model), config, step)
        for policy, decay in zip(before, decays):
            for t, old, new in zip(model.lora.weights(policy), before[policy], model.lora.weights("current")):
                torch.testing.assert_close(t, decay * old + (1 - decay) * new)


def test_a_bfloat16_model_keeps_its_lora_and_its_velocities_in_float32():
    model, config = sd3(dtype="bfloat16")
    take_update(model, adamw(model), update_inputs(model), config)
    assert model.transformer.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in model.lora.weights("current"))
    assert all(v.dtype == torch.float32 for v in velocities(model, ["current", "frozen"]))


@needs("peft")
def test_exported_lora_draws_the_same_images_in_plain_diffusers(tmp_path):
    model, config = sd3(solver="euler", guidance_scale=3.0)
    randomize(model, "ema", 0.1, 12)
    model.lora.export(tmp_path, step=7)
    noise = dgpo.draw_noise(seeds(13, 4), *model.latent_shape)
    base, ours = (pixels(rollout(model, ROWS, 1, seeds(13, 4), 6, policy, config)[1]) for policy in ("frozen", "ema"))
    assert abs(ours - base).max() > 50   # the LoRA shows
    pipe = diffusers_pipeline()
    pipe.load_lora_weights(tmp_path)
    theirs = pipe(PROMPTS, num_inference_steps=6, guidance_scale=3.0, latents=noise, height=32, width=32,
                  max_sequence_length=1).images
    assert abs(ours - pixels(theirs)).max() <= 1


def test_a_lora_read_back_is_the_one_that_was_written_and_the_reference_from_then_on(tmp_path):
    model, _ = sd3()
    randomize(model, "ema", 0.1, 25)
    model.lora.export(tmp_path, step=3)
    other, config = sd3(lora_rank=7, kl_weight=0.1)   # of another rank: the file's counts
    base, = velocities(other, ["base"])
    other.lora.load(tmp_path)
    with_lora, = velocities(model, ["ema"])
    policies = ["frozen", *POLICIES]
    torch.testing.assert_close(velocities(other, policies), 4 * [with_lora])   # training begins with it, from it
    torch.testing.assert_close(velocities(other, ["base"]), [base])
    take_update(other, adamw(other), update_inputs(other), config)
    after = dict(zip(policies, velocities(other, policies)))
    assert torch.equal(after["frozen"], velocities(other, ["frozen"])[0])
    torch.testing.assert_close(after["frozen"], with_lora)
    assert (after["current"] - with_lora).abs().max() > 1e-5
    for targets in (("to_q",), (*SD3.lora_targets, "net.2")):   # it has layers too many, or too few
        with mock.patch.object(SD3, "lora_targets", targets), pytest.raises(UserError, match="not this model's"):
            sd3()[0].lora.load(tmp_path)
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    name = next(iter(key for key in tensors if "lora_B" in key))
    save_file({**tensors, name: tensors[name][:1].contiguous()}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(UserError, match="cannot be used"):   # one row, which would be taken for all
        other.lora.load(tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"half a file")
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="--lora .* cannot be used"):
            other.lora.load(folder)


def test_the_default_lora_is_on_attn_alone_as_published():
    # Stable Diffusion 3.5 Medium has a second attention, attn2, in half of its blocks; meta tensors hold no values.
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(throughput.PRESETS["sd3.5-medium"]["transformer"])
    lora = LoRA(transformer, 64, SD3.lora_targets)
    assert len(lora.layers) == 191 and not any(".attn2." in name for name in lora.layers)
    assert sum(t.numel() for t in lora.weights("current")) / 1e6 == pytest.approx(37.6, abs=0.05)
    down, up = sd3(lora_rank=32)[0].lora.weights("current")[:2]
    assert down.std().item() == pytest.approx(1 / 32, rel=0.1) and not up.any()   # "gaussian", as published


def test_no_more_prompts_are_kept_encoded_than_one_rollouts(tmp_path, monkeypatch):
    asked, encode = [], SD3.encode
    monkeypatch.setattr(SD3, "encode", lambda model, prompts: asked.append(prompts) or encode(model, prompts))
    assert run(tmp_path, "--steps", 2, "--groups-per-step", 2, "--eval-prompts", 2) == 0
    config = Config(**{name: value for name, value in json.loads((tmp_path / "config.json").read_text()).items()
                       if name in Config.__dataclass_fields__})
    _, _, rows, held_out = prepare(config)
    rollouts = [held_out, rows_of_step(rows, 0, config), rows_of_step(rows, 1, config), held_out]
    assert [set(prompts) for prompts in asked] == [{row["prompt"] for row in each} for each in rollouts]
    model, _ = sd3()
    model.encode(PROMPTS[:1])
    assert set(model.texts) == {"", PROMPTS[0]}   # the empty one is for guidance


@pytest.mark.parametrize("offload", [False, True])
def test_encoders_and_vae_stay_on_the_device_unless_offloaded(offload, monkeypatch):
    # What a move to a device does is counted, as a CPU knows no other.
    moves, to = [], torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *args: moves.append(str(args[0])) or to(module, *args))
    model, config = sd3(offload=offload)
    moves.clear()
    model.rest = "elsewhere" if offload else model.rest
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: moves.append(str(device)))
    model.encode(PROMPTS)
    model.decode(torch.zeros(1, *model.latent_shape))
    assert moves == (["cpu", "elsewhere"] * 2 if offload else ["cpu"] * 4)
    assert all(t.device == model.device for text in model.texts.values() for t in text)


def test_embeddings_are_the_pipelines_cut_off_as_they_are_there():
    model, _ = sd3()
    for prompt in ("two squares", "a red star left of a blue ring and a green cross above a black circle"):
        tokens, _, pooled, _ = diffusers_pipeline().encode_prompt(
            prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=1)
        model.encode([prompt])
        for ours, theirs in zip(model.embeddings([prompt, prompt]), (tokens, pooled)):
            torch.testing.assert_close(ours, theirs.repeat(2, *[1] * (theirs.ndim - 1)))


# ------------------------------------------------------------------------------------------------
# ROLLOUT AND UPDATE
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_an_euler_rollout_is_the_pipeline_of_diffusers(guidance_scale):
    # In two batches, which must not show.
    model, config = sd3(solver="euler", guidance_scale=guidance_scale, batch_size=3)
    noise = dgpo.draw_noise(seeds(14, 4), *model.latent_shape)
    x0, ours, *_ = rollout(model, ROWS, 1, seeds(14, 4), 8, "current", config)
    theirs = diffusers_pipeline()(PROMPTS, num_inference_steps=8, guidance_scale=guidance_scale, latents=noise,
                                  height=32, width=32, max_sequence_length=1).images
    assert x0.shape == (4, 1, *model.latent_shape)
    assert abs(pixels(ours) - pixels(theirs)).max() <= 1


@pytest.mark.parametrize("reference", ["frozen", "old"])
def test_micro_batches_of_any_size_give_the_gradient_of_the_whole_batch(reference):
    # Four rows (two groups at two timesteps), G = 5, one further row's worth counted but left out.
    model, config = sd3(clip_range=0.01, kl_weight=0.5, beta=20.0, reference_guidance_scale=2.0, reference=reference)
    randomize(model, "current", 0.05, 15)
    randomize(model, "old", 0.05, 16)
    x0, prompts, advantages = update_inputs(model)
    x0, prompts, advantages = x0.repeat(2, 1, 1, 1, 1), prompts * 2, advantages.repeat(2, 1)
    sigma, noise = torch.tensor([0.6, 0.7, 0.8, 0.95]), torch.randn(4, 1, *model.latent_shape, generator=seed(17))

    # The objective in one piece and from its definition.
    x_t, target = add_noise(x0, noise, sigma.view(-1, 1, 1, 1, 1))
    repeated = [prompt for prompt in prompts for _ in range(5)]
    v, v_old, v_frozen = (
        model.velocity(x_t.flatten(0, 1), sigma.repeat_interleave(5), repeated, policy, scale).view_as(x_t)
        for policy, scale in (("current", 1.0), ("old", 1.0), ("frozen", 2.0)))
    v_ref = {"frozen": v_frozen, "old": v_old}[reference]   # an old policy as reference is never guided
    error, old_error, ref_error = ((u - target).pow(2).mean((2, 3, 4)) for u in (v, v_old, v_ref))
    clipped, _ = clip_error(error, old_error.detach(), advantages, config.clip_range)
    loss, kl = dgpo_loss(clipped, ref_error.detach(), advantages, config.beta), (v - v_frozen).pow(2).mean()
    weights = model.lora.weights("current")
    whole = torch.cat([g.flatten() for g in torch.autograd.grad((loss + config.kl_weight * kl) * 4 / 5, weights)])

    for batch_size in (100, 10, 1):   # all; two groups; one, which is never divided
        sums = accumulate_gradients(model, x0, prompts, advantages, sigma, noise,
                                    dataclasses.replace(config, batch_size=batch_size), total_rows=5)
        gradient = torch.cat([t.grad.flatten() for t in weights])
        assert (gradient - whole).norm() < 1e-4 * whole.norm()
        assert 0.1 < sums["clip_fraction"] / 4 < 0.9   # the clip takes part
        assert sums["loss"] / 4 == pytest.approx(loss.item(), rel=1e-4)
        assert sums["kl"] / 4 == pytest.approx(kl.item(), rel=1e-4)
        S = config.beta * (advantages * (error - ref_error)).mean(1)
        assert sums["group_weight"] / 4 == pytest.approx(torch.sigmoid(S).mean().item(), rel=1e-4)
        for t in weights:
            t.grad = None


def test_gradient_checkpointing_leaves_the_update_unchanged():
    weights = []
    for checkpointing in (False, True):
        model, config = sd3(gradient_checkpointing=checkpointing)
        randomize(model, "current", 0.05, 26)
        take_update(model, torch.optim.SGD(model.lora.weights("current"), lr=1.0), update_inputs(model), config)
        assert model.transformer.gradient_checkpointing == checkpointing
        weights.append(torch.cat([t.detach().flatten() for t in model.lora.weights("current")]))
    torch.testing.assert_close(*weights)


def scores_of(function):
    """A reward of one's own without its file."""
    reward = load_reward("jpeg_incompressibility")
    reward.terms = lambda images, prompts, rows: {"mine": torch.tensor(function(images, prompts), dtype=torch.float32)}
    reward.total = lambda terms: terms["mine"].double()
    return reward


def constant_reward():
    return scores_of(lambda images, prompts: [0.1] * len(images))


def test_groups_without_signal_are_not_trained_on():
    # With the KL term on, their images would matter if they were.
    results, counted = [], []

    def accumulate(*args):
        counted.append((len(args[1]), args[-1]))   # of two groups one is trained on, and the mean is that of both
        return accumulate_gradients(*args)

    for other in (0.0, 1.0):
        model, config = sd3(kl_weight=1.0)
        randomize(model, "current", 0.05, 20)
        x0, prompts, advantages = update_inputs(model)
        advantages[1], x0[1] = 0, x0[1] + other
        sums = take_update(model, adamw(model), (x0, prompts, advantages), config, accumulate=accumulate)
        results.append((sums, model.lora.weights("current")))
    assert set(counted) == {(1, 2)}
    assert results[0][0] == results[1][0] and sums["gradient_norm"] > 0
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))


def test_a_step_whose_rewards_are_all_equal_changes_nothing():
    model, config = sd3(groups_per_step=2, group_size=3, num_inference_steps=2)
    before = {policy: [t.detach().clone() for t in model.lora.weights(policy)] for policy in POLICIES}
    reward = constant_reward()
    metrics = train_step(model, adamw(model), reward, ROWS[:2], 0, config)
    assert metrics["zero_groups"] == 1 and metrics["loss"] == metrics["gradient_norm"] == 0
    for policy, weights in before.items():
        assert all(torch.equal(a, b) for a, b in zip(weights, model.lora.weights(policy)))


def test_a_gradient_that_is_not_finite_ends_the_run_and_moves_nothing():
    model, config = sd3()
    randomize(model, "current", 0.05, 63)
    before = [t.detach().clone() for t in model.lora.weights("current")]
    x0, prompts, advantages = update_inputs(model)
    x0[0, 0, 0, 0, 0] = math.inf
    with pytest.raises(UserError, match="gradient is not finite"):
        take_update(model, adamw(model), (x0, prompts, advantages), config)
    assert all(torch.equal(a, b) for a, b in zip(before, model.lora.weights("current")))


def test_updates_favour_the_preferred_images():
    # The sign of it all, on fresh noise: the error of preferred images falls relative to that of rejected ones.
    model, config = sd3(clip_range=0.0, kl_weight=0.0)
    x0, prompts, advantages = update_inputs(model)
    optimizer = adamw(model)
    for step in range(5):
        take_update(model, optimizer, (x0, prompts, advantages), config, step)
    noise = torch.randn(x0[:, :1].shape, generator=seed(21))
    x_t, target = add_noise(x0, noise, 0.8)
    repeated = [prompt for prompt in prompts for _ in range(5)]
    with torch.no_grad():
        error, ref_error = ((model.velocity(x_t.flatten(0, 1), 0.8, repeated, policy).view_as(x_t) - target)
                            .pow(2).mean((2, 3, 4)) for policy in ("current", "frozen"))
    assert ((advantages * (error - ref_error)).mean(1) < -1e-3).all()


def test_evaluation_always_starts_from_the_same_noise_and_leaves_out_a_judge_that_fails(capsys):
    model, config = sd3(eval_images=2, eval_num_inference_steps=3)
    watching = {name: load_reward(name, judge=True) for name in ("jpeg_compressibility", "words")}
    rewards = {"shapes": load_reward("shapes"), **watching}
    (first, images), (second, again) = (evaluate(model, rewards, ROWS, config, "ema") for _ in "ab")
    assert capsys.readouterr().out.count("the judge words is left out: ") == 1   # of what it cannot score, and once
    assert list(first) == ["shapes, strict", "shapes", "jpeg_compressibility"]   # what is trained on comes first
    for name in first:
        assert first[name].shape == (4, 2) and torch.equal(first[name], second[name])
    assert torch.equal(first["shapes, strict"], (first["shapes"] == 1).float())
    assert (pixels(images) == pixels(again)).all()


def test_terms_of_a_sum_are_standardised_before_they_are_weighed_where_that_is_asked_for():
    # One term in hundreds and one in thousandths: a plain sum is the first alone, standardised terms weigh alike.
    model, config = sd3(groups_per_step=2, group_size=4, num_inference_steps=2, advantage_std="terms")
    terms = {"large": torch.tensor([[100.0, 300, 200, 400], [7, 7, 7, 7]]),
             "small": torch.tensor([[4e-3, 1e-3, 3e-3, 2e-3], [5, 6, 5, 6]])}
    weights, seen = {"large": 1.0, "small": -2.0}, []
    reward = load_reward("jpeg_incompressibility")
    reward.terms = lambda images, prompts, rows: {name: score.flatten() for name, score in terms.items()}
    reward.total = lambda terms: sum(weights[name] * score.double() for name, score in terms.items())

    def accumulate(model, x0, prompts, advantages, *rest):
        seen.append(advantages)
        return accumulate_gradients(model, x0, prompts, advantages, *rest)

    metrics = train_step(model, adamw(model), reward, ROWS[:2], 0, config, accumulate)

    def standardised(score):
        return (score - score.mean(1, True)) / (score.std(1, keepdim=True, correction=0) + 1e-4)

    together = standardised(terms["large"]) - 2 * standardised(terms["small"])
    torch.testing.assert_close(seen[0], standardised(together), rtol=1e-4, atol=1e-4)
    assert metrics["terms/large"] == pytest.approx(128.5) and metrics["terms/small"] == pytest.approx(2.75125)
    assert metrics["reward_mean"] == pytest.approx(128.5 - 2 * 2.75125)



def test_a_report_takes_its_errors_over_prompts_and_notices_a_fall():
    rows = [{"prompt": "", "tag": tag} for tag in ("one", "one", "two", "two")]
    right = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])   # [N, K]
    text, numbers = report("after 0 steps", scores := {"shapes, strict": right, "shapes": right / 2}, scores, rows)
    # The shares of right pictures, 1, 1/2, 0 and 0, spread with a variance of 11/64 about their mean.
    assert numbers == pytest.approx({"eval_score": 3 / 8, "eval_error": (11 / 64 / 3) ** 0.5, "categories/one": 0.75,
                                     "categories/two": 0.0, "judges/shapes": 3 / 16})
    assert re.search(r"after 0 steps +score +error\nshapes, strict +0.375 +0.239\n  one +0.750\n  two +0.000\n", text)
    before = torch.tensor([[5.0, 5.2], [4.0, 4.2], [6.0, 6.2], [1.0, 1.2]])   # prompts differ much, noises little
    for after, fell in ((before - 1.0, True), (before + 1.0, False), (before - 0.1, False),   # too small to speak of
                        (before + torch.tensor([[3], [-4.2], [3], [-4.2]]), False)):          # one up, one down
        text, numbers = report("after 9 steps", {"aesthetic": before}, {"aesthetic": after}, rows)
        assert text.splitlines()[1].endswith("   fell") == fell, text
        assert numbers["eval_score"] == pytest.approx(after.mean().item())
    assert re.search(r"9 steps +before +after +change +error\naesthetic +4.100 +3.500 +-0.600 +\d.\d+\n"
                     r"  one +4.600 +4.000 +-0.600\n  two +3.600 +3.000 +-0.600", text)


def test_every_prompt_is_drawn_once_before_any_is_drawn_again():
    config, rows = Config(groups_per_step=3), [{"prompt": f"prompt {i}"} for i in range(10)]
    drawn = [row["prompt"] for step in range(10) for row in rows_of_step(rows, step, config)]
    epochs = [drawn[i:i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == [row["prompt"] for row in rows] for epoch in epochs) and epochs[0] != epochs[1]


# ------------------------------------------------------------------------------------------------
# RUNS: files, resuming, stopping, training
# ------------------------------------------------------------------------------------------------

TINY = ("--reward jpeg_incompressibility --lora-rank 4 --groups-per-step 2 --group-size 3 --num-inference-steps 2 "
        "--timesteps-per-rollout 2 --updates-per-rollout 2 --eval-prompts 2 --eval-images 2 "
        "--eval-num-inference-steps 2").split()   # a reward that never ties, so that every step trains


def command(folder, *flags):
    """The embedded job made tiny, as arguments."""
    return ["--prompt-file", str(ROOT / "shapes/prompts.txt"), "--device", "cpu", "--output-dir", str(folder), *TINY,
            *map(str, flags)]


def run(folder, *flags):
    """main() on the embedded job made tiny; returns the exit code."""
    return main(command(folder, *flags))


def resume(folder, *flags):
    return main(["--resume", str(folder), *map(str, flags)])


def metrics_of(folder):
    """The lines of metrics.jsonl without the times, which alone may differ between two runs."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in lines]


def contents(folder):
    """Everything of a finished run that may not depend on what happened to it."""
    return metrics_of(folder), {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
                                for path in folder.rglob("*.*") if path.suffix in (".png", ".safetensors")}


def refusal(stderr):
    """The one sentence a failed command ends with, after its progress bars if it had begun."""
    assert "Traceback" not in stderr and stderr.count("dgpo.py: error: ") == 1 and stderr.endswith("\n")
    sentence = stderr.splitlines()[-1]
    assert sentence.startswith("dgpo.py: error: ")
    return sentence


def test_a_run_writes_every_promised_file(tmp_path):
    assert run(tmp_path / "run", "--steps", 2, "--eval-every", 1, "--group-size", 4, "--learning-rate", 0.01) == 0
    files = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    name = "pytorch_lora_weights.safetensors"
    assert files == {"config.json", "metrics.jsonl", "checkpoint.pt", "before_after.png", f"lora/{name}",
                     *(f"samples/{step:06d}.png" for step in range(3)), *(f"lora/{step:06d}/{name}" for step in (1, 2))}
    for file in files:
        assert (tmp_path / "run" / file).stat().st_mode & 0o777 == 0o666 & ~UMASK
        if file.endswith(".png"):
            Image.open(tmp_path / "run" / file).load()
    config, lines = json.loads((tmp_path / "run/config.json").read_text()), metrics_of(tmp_path / "run")
    assert config["group_size"] == 4 and config["commit"]
    assert [(line["step"], "evaluation" in line) for line in lines] == [
        (0, True), (1, False), (1, True), (2, False), (2, True)]
    last, final = (load_file(tmp_path / f"run/lora/{folder}{name}") for folder in ("", "000002/"))
    first = load_file(tmp_path / f"run/lora/000001/{name}")
    assert all(torch.equal(last[key], final[key]) for key in last)   # lora/ is the last, not the best
    assert any(not torch.equal(last[key], first[key]) for key in last)


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path):
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    # Every policy takes part: rollouts from the old one, which is the reference as well.
    flags = ["--eval-every", 2, "--save-every", 2, "--rollout-old-after", 2, "--reference", "old"]
    assert run(straight, "--steps", 4, *flags) == 0 and run(halves, "--steps", 2, *flags) == 0
    with open(halves / "metrics.jsonl", "a") as file:   # a killed run has logged more than it has saved
        file.write('{"step": 3}\n{"st')
    assert resume(halves, "--steps", 4) == 0
    assert contents(straight) == contents(halves)
    ours, theirs = (torch.load(path / "checkpoint.pt", weights_only=True)["lora"] for path in (straight, halves))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    # With nothing left to do, resuming compares the same two policies again.
    assert resume(halves) == 0 and contents(straight) == contents(halves)


def test_a_run_killed_at_any_moment_goes_on_as_if_nothing_had_happened(tmp_path):
    # SIGKILL, wherever it strikes; benchmarks/ would do this for hours, here it is done a few times.
    calm, killed, moments = tmp_path / "calm", tmp_path / "killed", np.random.default_rng(64)
    flags = ["--eval-every", 2, "--save-every", 1, "--steps", 12]
    assert run(calm, *flags) == 0
    arguments, kills = command(killed, *flags), 0
    same = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}   # sums of other threads round differently
    while True:
        process = subprocess.Popen([sys.executable, ROOT / "dgpo.py", *arguments], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, env=same)
        if kills < 2:
            def saved():
                path = killed / "checkpoint.pt"
                return path.stat().st_mtime_ns if path.exists() else 0

            before = saved()
            while process.poll() is None and saved() == before:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.3))
            process.kill()
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
        arguments, kills = ["--resume", str(killed)], kills + 1
    assert kills > 0 and contents(killed) == contents(calm)


def test_a_full_disk_ends_a_run_in_one_sentence_and_harms_nothing(tmp_path, capsys):
    # The system is told to refuse files over 100 kB, which stops a file in the middle as a full disk does.
    assert run(tmp_path, "--save-every", 1, "--steps", 1) == 0
    saved = {path: path.read_bytes() for path in [*tmp_path.rglob("*.pt"), *tmp_path.rglob("*.safetensors")]}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert resume(tmp_path, "--steps", 2) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in refusal(capsys.readouterr().err)
    assert saved == {path: path.read_bytes() for path in saved}
    assert resume(tmp_path, "--steps", 2) == 0 and not list(tmp_path.rglob("*.tmp"))


def test_a_run_that_ends_between_its_lora_and_its_checkpoint_still_exports_its_last_step(tmp_path, monkeypatch):
    export = LoRA.export

    def stopped(lora, folder, step):
        if (folder.name, step) == ("lora", 2):
            raise KeyboardInterrupt
        export(lora, folder, step)

    monkeypatch.setattr(LoRA, "export", stopped)
    assert run(tmp_path, "--save-every", 1, "--steps", 2, "--eval-every", 9) == 130
    monkeypatch.undo()
    assert resume(tmp_path) == 0
    with safe_open(tmp_path / "lora/pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["step"] == "2"


def test_a_checkpoint_that_cannot_be_read_is_a_sentence_that_names_the_last_lora(tmp_path, capsys):
    assert run(tmp_path, "--steps", 1) == 0
    content = (tmp_path / "checkpoint.pt").read_bytes()
    for damaged in (content[:-100], b"", b"half a file"):
        (tmp_path / "checkpoint.pt").write_bytes(damaged)
        assert resume(tmp_path, "--steps", 2) == 2
        assert f"--lora {tmp_path}/lora begins a new run" in refusal(capsys.readouterr().err)
    assert run(tmp_path / "again", "--steps", 1, "--lora", tmp_path / "lora") == 0   # as it says
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with mock.patch.object(SD3, "lora_targets", ("attn.to_q",)):   # nor with a model of other layers
        assert resume(tmp_path, "--steps", 2) == 2 and "cannot be used" in refusal(capsys.readouterr().err)


def test_a_run_goes_on_wherever_its_files_lie(tmp_path, capsys, monkeypatch):
    here, there, folder = tmp_path / "here", tmp_path / "there", tmp_path / "run"
    shutil.copytree(MODEL, here / "model")
    for name, text in (("prompts.txt", "a red circle\ntwo squares\n"), ("held_out.txt", "a star\n"),
                       ("r.py", "def score(images, prompts, metadata):\n"
                                "    return [i.getpixel((9, 9))[0] / 255 for i in images]\n")):
        (here / name).write_text(text)

    def files(place):
        return ["--model", place / "model", "--prompt-file", place / "prompts.txt", "--eval-prompt-file",
                place / "held_out.txt", "--reward", f"{place}/r.py:score"]

    monkeypatch.chdir(tmp_path)
    assert run(Path("run"), *files(Path("here")), "--resolution", 32, "--max-sequence-length", 1, "--dtype", "float32",
               "--no-gradient-checkpointing", "--steps", 1) == 0
    monkeypatch.chdir("/")
    assert resume(folder, "--steps", 2) == 0   # from another folder
    here.rename(there)
    sys.modules.pop("r")
    assert resume(folder) == 2 and "cannot be read" in refusal(capsys.readouterr().err)   # they are not there any more
    assert resume(folder, *files(there), "--steps", 3) == 0 and resume(folder, "--steps", 4) == 0   # nor forgotten
    assert len([line for line in metrics_of(folder) if "evaluation" not in line]) == 4


def test_a_setting_that_is_typed_on_resume_is_taken_said_and_recorded(tmp_path, capsys):
    assert run(tmp_path, "--steps", 1) == 0
    assert resume(tmp_path, "--steps", 2, "--learning-rate", 1e-9, "--save-every", 10) == 0
    printed = capsys.readouterr().out
    assert "--learning-rate is 1e-09 from now on; it was 0.0007" in printed
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["learning_rate"] == 1e-9 and config["steps"] == 2
    optimizer = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizer"]
    assert optimizer["param_groups"][0]["lr"] == 1e-9   # and not the checkpoint's


@pytest.mark.parametrize("spoil, sentence", [
    (lambda config: config.pop("beta"), "there is no run that this version can go on with: KeyError 'beta'"),
    (lambda config: config.update(beta="strong"), "--beta"), (lambda config: config.update(beta=[1]), "--beta"),
    (lambda config: config.update(solver="rk4"), "--solver"),
    (lambda config: config.update(group_size=1), "--group-size"),
    (lambda config: config.update(prompt_file=3), "cannot be read"), (lambda config: config.clear(), "KeyError")])
def test_a_config_that_was_meddled_with_is_refused(tmp_path, capsys, spoil, sentence):
    assert run(tmp_path, "--steps", 0) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    spoil(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert resume(tmp_path) == 2 and sentence in capsys.readouterr().err


def test_a_folder_has_one_run(tmp_path, capsys):
    folder = tmp_path / "run"
    assert run(folder, "--steps", 1) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for start, sentence in (
            (lambda: run(folder, "--steps", 1), "holds another run; --resume"),
            (lambda: run(folder, "--steps", 0, "--lora", folder / "lora"), "holds another run"),
            (lambda: resume(folder, "--output-dir", tmp_path / "other"), "leave --output-dir out"),
            (lambda: resume(tmp_path / "elsewhere"), "elsewhere: there is no run")):
        capsys.readouterr()
        assert start() == 2 and sentence in refusal(capsys.readouterr().err)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (tmp_path / "file").write_text("")
    for place, sentence in ((tmp_path / "file/run", "cannot be used"), (tmp_path / ("x" * 300), "cannot be used")):
        assert run(place, "--steps", 1) == 2 and sentence in refusal(capsys.readouterr().err)
    names = {parse_arguments(["--prompt-file", str(ROOT / "shapes/prompts.txt")]).output_dir for _ in range(2)}
    assert all(f"{os.getcwd()}/runs/" in name and name.endswith(f"-{os.getpid()}") for name in names)   # nobody else's


@pytest.mark.parametrize("stop, code, sentence", [
    ("raise ValueError('no more')", 2, r"the reward 'stops.py:score' failed.* no more"),
    ("sys.exit(0)", 2, "the reward 'stops.py:score' failed.* SystemExit 0"),   # which is no success
    ("sys.exit('set KEY')", 2, "the reward 'stops.py:score' failed.* set KEY"),
    ("os.kill(os.getpid(), signal.SIGINT)", 130, "interrupted; --resume .*run goes on from its last checkpoint"),
    ])
def test_a_run_that_stops_midway_goes_on_from_its_last_checkpoint(tmp_path, capsys, stop, code, sentence):
    # The reward is called for the evaluation before training, then once a step: it stops in the second step.
    (tmp_path / "stops.py").write_text(
        "import os, pathlib, signal, sys, torch\ncalls = []\n"
        "def score(images, prompts, metadata):\n    calls.append(1)\n"
        f"    if len(calls) == 3 and not pathlib.Path(r'{tmp_path}/calm').exists():\n        {stop}\n"
        "    return [i.getpixel((9, 9))[0] / 255 for i in images]\n")
    flags = ["--steps", 3, "--save-every", 1, "--reward", f"{tmp_path}/stops.py:score"]
    assert run(tmp_path / "run", *flags) == code
    assert re.search(sentence, refusal(capsys.readouterr().err))
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1]
    (tmp_path / "calm").touch()
    assert resume(tmp_path / "run", "--steps", 1) == 0   # it may be let end there
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1, 1]
    assert resume(tmp_path / "run", "--steps", 3) == 0
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2, 3, 3]


def test_a_run_that_blows_up_ends_with_a_sentence_and_saves_nothing(tmp_path, capsys):
    flags = ["--save-every", 1000, "--eval-every", 1000, "--steps", 30, "--learning-rate", 1e6]
    assert run(tmp_path, *flags) == 2
    assert re.search("not finite: .* wants a new run with a lower --learning-rate$", refusal(capsys.readouterr().err))
    assert not (tmp_path / "checkpoint.pt").exists()   # nothing spoilt is saved


@needs("trackio")
def test_every_line_of_the_metrics_and_the_samples_are_tracked_once(tmp_path, monkeypatch):
    # In trackio, which keeps them in a file; a run that was killed after it had logged more than it had saved goes on.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    flags = ["--track", "trackio", "--steps", 3, "--save-every", 2, "--eval-every", 2]
    (tmp_path / "stops.py").write_text(
        "import pathlib\ncalls = []\ndef score(images, prompts, metadata):\n    calls.append(1)\n"
        f"    if len(calls) == 5 and not pathlib.Path(r'{tmp_path}/calm').exists():\n        raise KeyboardInterrupt\n"
        "    return [i.getpixel((9, 9))[0] / 255 for i in images]\n")
    done = [subprocess.run([sys.executable, ROOT / "dgpo.py", *arguments], capture_output=True, text=True)
            for arguments in (command(tmp_path / "my-run", *flags, "--reward", f"{tmp_path}/stops.py:score"),
                              (tmp_path / "calm").touch() or ["--resume", str(tmp_path / "my-run")])]
    assert done[1].returncode == 0, done[1].stderr
    database, = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        logged = [json.loads(line) for line, in connection.execute("select metrics from metrics order by id")]
    lines = [json.loads(line) for line in (tmp_path / "my-run/metrics.jsonl").read_text().splitlines()]
    assert len(logged) == len(lines)
    for ours, theirs in zip(lines, logged):
        kept = {key: value for key, value in ours.items() if not key.startswith("seconds")}
        assert {key: theirs[key] for key in kept if key != "step"} == {key: kept[key] for key in kept if key != "step"}
        assert ("samples" in theirs) == ("evaluation" in ours)


def test_a_tracker_that_is_not_there_is_said_before_anything_is_drawn(tmp_path, capsys):
    assert run(tmp_path, "--track", "no_such_tracker") == 2
    assert "--track no_such_tracker does not work (is it installed?): " in refusal(capsys.readouterr().err)


@pytest.mark.parametrize("steps, rows, flags", [
    (36, ["a star and a triangle", "a cross and a ring", "a purple square and a pink cross",
          "an orange cross and a black triangle"], []),
    (22, ['a sign that says "sea"', 'a board that reads "hug"', 'a sign with the word "corn"',
          'a board that reads "oak"'],
     ["--reward", "words", "--t-min", "0.05", "--learning-rate", "1e-3"]),
    (12, ["a circle", "two pink rings", "a green star right of a red cross", "a yellow ring and a blue star"],
     ["--reward", f"pickscore={ROOT / 'shapes/taste'}", "--learning-rate", "2e-3"])],
    ids=["composition", "words", "taste"])
def test_each_of_the_three_jobs_raises_its_reward(tmp_path, steps, rows, flags):
    # On four prompts that the base model often gets wrong; every step draws all four.
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(rows))
    assert main(["--prompt-file", str(prompts), "--eval-prompt-file", str(prompts), "--steps", str(steps), *flags,
                 "--device", "cpu", "--groups-per-step", "4", "--eval-images", "1", "--output-dir",
                 str(tmp_path / "run")]) == 0
    rewards = np.array([line["reward_mean"] for line in metrics_of(tmp_path / "run") if "evaluation" not in line])
    (slope, _), covariance = np.polyfit(range(steps), rewards, 1, cov=True)
    assert slope > 3 * covariance[0, 0] ** 0.5, rewards


@pytest.mark.parametrize("size, tile", [((32, 32), (96, 96)), ((600, 1200), (512, 1024)), ((200, 100), (200, 100))])
def test_pictures_are_shown_as_large_as_is_sensible_beside_their_captions_and_under_their_headings(size, tile):
    images = [Image.new("RGB", size, (0, 0, 10 * i)) for i in range(4)]
    picture = np.asarray(picture_rows({"before": images[:2], "after": images[2:]}, ["a ring", "a star"]))
    top = 24
    assert picture.shape == (top + 2 * tile[1], 3 * tile[0], 3)
    blue = picture[top + tile[1] // 2::tile[1], tile[0] // 2::tile[0], 2]
    assert blue[:, 1:].tolist() == [[0, 20], [10, 30]]
    for x, y, wide, high in ((0, top, tile[0], tile[1]), (tile[0], 0, tile[0], top), (2 * tile[0], 0, tile[0], top)):
        assert (picture[y:y + high, x:x + wide] < 128).any()   # words
    assert not (picture[:top, :tile[0]] < 128).any()


def test_captions_are_shown_in_any_script_that_there_is_a_typeface_for_and_else_left_out(tmp_path, monkeypatch):
    picture = [Image.new("RGB", (96, 96))]

    def shown(caption):
        return bool((np.asarray(picture_rows({"": picture}, [caption]))[24:, :96] < 128).any())

    nobody = "\U00012000\U00012001"   # cuneiform
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: iter(()))   # a machine without any typeface
    assert shown("Cafe 24") and not shown(nobody) and not shown(f"a {nobody}")
    (tmp_path / "spare.ttf").write_bytes(ImageFont.load_default().font_bytes)
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: iter([tmp_path / "spare.ttf"]))
    assert not shown(nobody)   # one that has none of it either


# ------------------------------------------------------------------------------------------------
# MANY PROCESSES
# ------------------------------------------------------------------------------------------------


def run_many(count, folder, *flags):
    """The same run as `run`'s by `count` processes, as typed; returns the finished torchrun."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
         ROOT / "dgpo.py", *command(folder, *flags)], capture_output=True, text=True, timeout=300)


def same_to_round_off(folder, other):
    """Compare all lines of two runs' metrics and the LoRAs they end with."""
    lines, others = metrics_of(folder), metrics_of(other)
    assert len(lines) == len(others)
    for a, b in zip(lines, others):
        assert a.pop("captions", 0) == b.pop("captions", 0)
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
    a, b = (load_file(path / "lora/pytorch_lora_weights.safetensors") for path in (folder, other))
    for key in a:
        assert (a[key] - b[key]).norm() <= 1e-3 * a[key].norm()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process that those of many are compared with, and its flags."""
    path = tmp_path_factory.mktemp("alone")
    # Smooth in the images, so that round-off stays round-off, and without signal for some prompts; the images of three
    # prompts are one more than two processes can share evenly and one fewer than four processes.
    (path / "reward.py").write_text("import numpy as np\ndef score(images, prompts, metadata):\n    return ["
                                    "len(p) % 2 and float(np.asarray(i).mean()) for i, p in zip(images, prompts)]\n")
    flags = ["--reward", f"{path / 'reward.py'}:score", "--groups-per-step", 3, "--eval-prompts", 3, "--save-every", 2,
             "--eval-every", 2, "--advantage-std", "batch", "--rollout-old-after", 2, "--eval-reward", ""]
    assert run(path / "run", *flags, "--steps", 4) == 0
    assert any(0 < line.get("zero_groups", 0) < 1 for line in metrics_of(path / "run"))
    return path / "run", flags


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_takes_the_same_steps(alone, tmp_path, count):
    straight, flags = alone
    done = run_many(count, tmp_path / "run", *flags, "--steps", 4)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("after 4 steps") == 1   # one of them prints
    same_to_round_off(straight, tmp_path / "run")
    ours, theirs = (np.asarray(Image.open(path / "before_after.png")) for path in (straight, tmp_path / "run"))
    assert abs(ours.astype(int) - theirs).mean() < 0.5
    # And one alone goes on from where many were.
    half = tmp_path / "half"
    assert run_many(count, half, *flags, "--steps", 2).returncode == 0 and resume(half, "--steps", 4) == 0
    same_to_round_off(straight, half)


@pytest.mark.parametrize("stop, sentence", [
    ("raise ValueError('no more')", r"dgpo.py: error: the reward 'stops.py:score' failed.* no more"),
    ("sys.exit(0)", r"dgpo.py: error: the reward 'stops.py:score' failed.* SystemExit 0"),
    ("torch.zeros(2).sum_over()", r"dgpo.py: error: the reward 'stops.py:score' failed.*sum_over"),
    ("os.kill(os.getpid(), signal.SIGKILL)", "Signal 9|SIGKILL")])
def test_what_stops_one_process_stops_all_and_the_run_can_go_on(tmp_path, stop, sentence):
    # The second of two processes stops in its second step.
    (tmp_path / "stops.py").write_text(
        "import os, pathlib, signal, sys, torch\ncalls = []\n"
        "def score(images, prompts, metadata):\n    calls.append(1)\n"
        f"    if len(calls) == 3 and os.environ.get('RANK') == '1':\n        {stop}\n"
        "    return [i.getpixel((9, 9))[0] / 255 for i in images]\n")
    done = run_many(2, tmp_path / "run", "--steps", 3, "--save-every", 1, "--reward", f"{tmp_path}/stops.py:score")
    assert done.returncode != 0 and re.search(sentence, done.stderr), done.stderr
    if "kill" not in stop:
        assert done.stderr.count("dgpo.py: error: ") == 1   # by one of them
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1]
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["lines"][-1]["step"] == 1
    assert resume(tmp_path / "run") == 0
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2, 3, 3]


def test_what_nobody_foresaw_shows_its_traceback_from_any_process(tmp_path):
    # A bug of ours on the second of two processes, whose own words are muted otherwise.
    (tmp_path / "broken.py").write_text(
        f"import os, sys\nsys.path.insert(0, r'{ROOT}')\nimport dgpo\n"
        "def broken(*args, **more):\n    raise LookupError('a bug')\n"
        "if os.environ['RANK'] == '1':\n    dgpo.accumulate_gradients = dgpo.update.__defaults__[0]\n"
        "    dgpo.update.__defaults__ = (broken,)\n    dgpo.train_step.__defaults__ = (broken,)\n"
        "os._exit(dgpo.main(sys.argv[1:]))\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           tmp_path / "broken.py", *command(tmp_path / "run", "--steps", 1)],
                          capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "LookupError: a bug" in done.stderr


def test_processes_started_by_hand_need_each_other(tmp_path):
    lone = subprocess.run([sys.executable, ROOT / "dgpo.py", *command(tmp_path)], capture_output=True, text=True,
                          env={**os.environ, "WORLD_SIZE": "2"})
    assert lone.returncode == 2 and "torchrun starts them" in refusal(lone.stderr)


# ------------------------------------------------------------------------------------------------
# THE COMMAND LINE
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["3", "3.5-medium"])
def sd35(request, tmp_path_factory):
    """A random pipeline with all that Stable Diffusion 3 or 3.5 Medium has, a T5 too, saved to a folder."""
    torch.manual_seed(28)
    clip_tokenizer = build_tokenizer()
    clip_tokenizer.model_max_length = 40
    clip = CLIPTextConfig(vocab_size=len(clip_tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                          num_attention_heads=2, max_position_embeddings=40, projection_dim=16,
                          bos_token_id=clip_tokenizer.bos_token_id, eos_token_id=clip_tokenizer.eos_token_id)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    t5_tokenizer = T5Tokenizer(vocab=pieces + [(chr(c), -3.0) for c in range(97, 123)], extra_ids=0)
    t5 = T5Config(vocab_size=len(t5_tokenizer), d_model=40, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    preset = throughput.PRESETS["tiny"]
    old = {"qk_norm": None, "dual_attention_layers": ()} if request.param == "3" else {}
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**{**preset["transformer"], "joint_attention_dim": 40, **old}),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=AutoencoderKL(**preset["vae"]),
        text_encoder=CLIPTextModelWithProjection(clip), tokenizer=clip_tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip), tokenizer_2=clip_tokenizer,
        text_encoder_3=T5EncoderModel(t5), tokenizer_3=t5_tokenizer)
    folder = tmp_path_factory.mktemp("sd35")
    pipe.save_pretrained(folder)
    return folder


def test_a_pipeline_with_t5_goes_through_the_whole_command_line(sd35, tmp_path, capsys):
    prompts = tmp_path / "geneval.jsonl"
    prompts.write_text("".join(json.dumps({**row, "prompt": f"{row['prompt']} {word}"}) + "\n"
                               for row in GENEVAL for word in ("", "at night", "by day", "in rain")))
    (tmp_path / "mine.py").write_text("def tagged(images, prompts, metadata):\n"
                                      "    return [len(m['tag']) + i.getpixel((3, 3))[0] / 255 for i, m in "
                                      "zip(images, metadata)]\n")
    held_out = ["--eval-prompt-file", prompts]
    common = ["--model", sd35, "--prompt-file", prompts, "--dtype", "bfloat16", "--guidance-scale", 4.5,
              "--max-sequence-length", 30, "--resolution", 24, "--batch-size", 4]
    assert run(tmp_path / "run", *common, *held_out, "--steps", 2, "--reward", f"{tmp_path}/mine.py:tagged",
               "--eval-reward", "jpeg_compressibility", "--reference-guidance-scale", 2, "--gradient-checkpointing",
               "--rollout-old-after", 1, "--learning-rate", 0.1) == 0
    printed = capsys.readouterr().out
    assert re.search(r"after 2 steps +before +after +change +error\nmine.py:tagged ", printed)
    assert re.search(r"\njpeg_compressibility +-", printed)
    last = metrics_of(tmp_path / "run")[-1]
    assert last["judges/jpeg_compressibility"] < 0
    assert {key for key in last if "/" in key} <= {
        "judges/jpeg_compressibility", *(f"categories/{row['tag']}" for row in GENEVAL)}

    # Without training: the base alone, then the trained LoRA compared with it, judged by two rewards.
    def judged(folder, *flags):
        assert run(folder, *common, *held_out, "--steps", 0, "--reward", f"{tmp_path}/mine.py:tagged", "--eval-reward",
                   "jpeg_incompressibility", *flags) == 0
        line, = metrics_of(folder)
        return line["eval_score"], capsys.readouterr().out

    base, alone = judged(tmp_path / "base")
    trained, both = judged(tmp_path / "lora", "--lora", tmp_path / "run/lora")
    assert base != trained and "before" not in alone and both.count("before") == 1
    assert (tmp_path / "lora/before_after.png").exists()
    # A new run from that LoRA: what it is compared with, and held to, is the model with it.
    assert run(tmp_path / "more", *common, *held_out, "--steps", 1, "--reward", f"{tmp_path}/mine.py:tagged",
               "--lora", tmp_path / "run/lora") == 0
    first, *_ = metrics_of(tmp_path / "more")
    assert first["eval_score"] == trained
    assert resume(tmp_path / "more", "--steps", 2) == 0


PUBLISHED = dict(   # what the authors' code runs in its default mode
    dtype="bfloat16", resolution=512, max_sequence_length=128, solver="dpm++2m", num_inference_steps=10,
    guidance_scale=4.5, eval_num_inference_steps=14, group_size=24, groups_per_step=24, timesteps_per_rollout=4,
    updates_per_rollout=1, lora_rank=64, learning_rate=3e-4, beta=100.0, old_decay=0.3, old_decay_ramp=1e-3,
    kl_weight=2e-2, clip_range=1e-2, reference="frozen", reference_guidance_scale=1.0)
RECIPES = [   # what differs in the commands of README's recipes, in their order: the authors' presets
    dict(reward="geneval", t_min=0.599, advantage_std="group", rollout_old_after=500, ema_decay=0.974),
    dict(reward="ocr", t_min=0.4, advantage_std="batch", rollout_old_after=200, ema_decay=0.974),
    dict(reward="pickscore", t_min=0.4, advantage_std="batch", rollout_old_after=200, ema_decay=0.949, clip_range=5e-2,
         beta=10.0, kl_weight=1e-3),
    dict(reward="geneval", guidance_scale=1.0, reference_guidance_scale=4.5, clip_range=1e-3,
         eval_num_inference_steps=10),
    dict(reward="geneval", guidance_scale=1.0, reference="old", beta=2000.0, kl_weight=1e-3, clip_range=1e-5,
         eval_num_inference_steps=10)]


def test_the_recipes_of_the_readme_are_the_published_configurations():
    hub = "stabilityai/stable-diffusion-3.5-medium"
    commands = [arguments for _, arguments in readme_commands()
                if hub in arguments and "my.txt" not in arguments]
    for arguments, differing in zip(commands, RECIPES, strict=True):
        config = dataclasses.asdict(parse_arguments(arguments))
        for name, value in {**PUBLISHED, **differing}.items():
            assert config[name] == value, (arguments, name)
    for model in ([], ["--model", str(MODEL)]):
        embedded = parse_arguments(["--prompt-file", "/p.txt", "--eval-prompt-file", "/h.txt", "--device", "cpu",
                                    "--output-dir", "/r", *model])
        assert embedded == Config(prompt_file="/p.txt", eval_prompt_file="/h.txt", model=str(MODEL),
                                  eval_reward="realism", device="cpu", output_dir="/r")


def test_rollouts_turn_to_the_old_policy_after_that_many_updates_and_not_at_them(tmp_path, monkeypatch):
    policies = []
    monkeypatch.setattr(dgpo, "rollout", lambda *args: policies.append(args[5]) or rollout(*args))
    assert run(tmp_path, "--steps", 5, "--rollout-old-after", 2, "--updates-per-rollout", 1, "--eval-every", 9) == 0
    # Evaluations are of the base model and the EMA; in between, steps with 0, 1, 2, 3 and 4 updates before them.
    assert policies == ["frozen", "current", "current", "current", "old", "old", "ema"]


def test_rows_are_drawn_as_often_as_they_stand_there_and_held_out_prompts_are_unique(tmp_path):
    path = tmp_path / "weighted.txt"
    path.write_text("a star\n" * 300 + "".join(f"{count} red {shape}s\n" for count in ("two", "three", "four")
                                              for shape in ("circle", "ring", "star")) * 100)
    (tmp_path / "weighted_heldout.txt").write_text("a ring\na ring\ntwo stars\n")   # the nearer name is taken
    (tmp_path / "heldout.txt").write_text("a cross\n")
    config = parse_arguments(["--prompt-file", str(path), "--device", "cpu"])
    _, _, rows, held_out = prepare(config)
    assert {row["prompt"] for row in held_out} == {"a ring", "two stars"} and len(held_out) == 2 and len(rows) == 1200
    drawn = [row["prompt"] for step in range(len(rows) // config.groups_per_step)
             for row in rows_of_step(rows, step, config)]
    assert drawn.count("a star") == 300 and drawn.count("two red rings") == 100   # an epoch is the file


def test_a_prompt_file_is_held_to_its_own_prompts_where_there_are_no_others(tmp_path, capsys):
    # One prompt is enough; a .jsonl never takes a .txt without its metadata for its held-out prompts.
    (tmp_path / "heldout.txt").write_text("a cross\n")
    prompts = tmp_path / "my.jsonl"
    prompts.write_text('{"prompt": "a red circle", "n": 1}\n' * 5)
    config = parse_arguments(["--prompt-file", str(prompts), "--device", "cpu"])
    _, _, rows, held_out = prepare(config)
    assert config.eval_prompt_file == "" and len(rows) == 5
    assert [row["prompt"] for row in held_out] == ["a red circle"] and held_out[0]["n"] == 1
    assert "evaluated on 1 prompts that are TRAINED ON" in capsys.readouterr().out
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "a ring"}\n')
    for file, found in (("my.jsonl", "heldout.jsonl"), ("heldout.txt", "")):   # never itself
        config = parse_arguments(["--prompt-file", str(tmp_path / file)])
        assert config.eval_prompt_file == (str(tmp_path / found) if found else "")


def test_ones_own_prompts_and_reward_are_a_whole_command_and_its_lora_draws_them(tmp_path, capsys, monkeypatch):
    # Prompts outside the embedded world's grammar, one of them twice, in a folder of their own.
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("sunset over hills\nsunset over hills\nan old door\n")
    Path("mine.py").write_text("import numpy as np\n\ndef redness(images, prompts, metadata):\n"
                               "    rgb = [np.asarray(i).reshape(-1, 3).mean(0) for i in images]\n"
                               "    return [float(r - (g + b) / 2) for r, g, b in rgb]\n")
    typed = ["--prompt-file", "my.txt", "--reward", "mine.py:redness", *TINY[2:], "--device", "cpu", "--output-dir"]
    assert main([*typed, "run", "--steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert "evaluated on 2 prompts that are TRAINED ON" in printed and "realism" not in printed
    assert main([*typed, "judged", "--steps", "1", "--eval-reward", "realism,jpeg_compressibility"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("the judge realism is left out: ") == 1 and "\njpeg_compressibility " in printed
    assert "judges/realism" not in metrics_of(Path("judged"))[0]
    assert main([*typed, "drawn", "--steps", "0", "--lora", "run/lora"]) == 0
    assert len(metrics_of(Path("drawn"))) == 1 and Path("drawn/before_after.png").exists()
    capsys.readouterr()
    assert main([*typed, "sum", "--steps", "1", "--reward", "mine.py:redness:0.5,jpeg_compressibility"]) == 0
    printed, lines = capsys.readouterr().out, metrics_of(Path("sum"))
    assert printed.count("\nmine.py:redness ") == 2 and printed.count("\njpeg_compressibility ") == 2   # a row each
    assert {"judges/mine.py:redness", "judges/jpeg_compressibility"} < set(lines[0])
    assert lines[1]["reward_mean"] == pytest.approx(
        0.5 * lines[1]["terms/mine.py:redness"] + lines[1]["terms/jpeg_compressibility"])


def test_realism_is_the_default_judge_of_the_embedded_worlds_rewards_alone():
    def judge(*flags):
        return parse_arguments(["--prompt-file", "p.txt", *flags]).eval_reward

    assert judge() == judge("--reward", "words") == "realism" and judge("--eval-reward", "") == ""
    assert judge("--reward", "jpeg_compressibility") == judge("--reward", "shapes:2") == judge("--model", "x/y") == ""


def test_rows_that_the_reward_cannot_score_are_found_before_anything_is_written(tmp_path, capsys):
    train, held_out = tmp_path / "train.txt", tmp_path / "held_out.txt"
    for broken, whole in ((train, held_out), (held_out, train)):
        whole.write_text("a red circle\n")
        broken.write_text("a red circle\n\na purple cow\na red circle\n")
        assert run(tmp_path / "run", "--prompt-file", train, "--eval-prompt-file", held_out, "--reward", "shapes") == 2
        printed = refusal(capsys.readouterr().err)
        assert f"{broken.name}, line 3: " in printed and "grammar" in printed
    assert not (tmp_path / "run").exists()


def try_many(check, examples, **strategies):
    """Call check with that many inputs that hypothesis makes up from its strategies."""
    from hypothesis import HealthCheck, given, settings
    how = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    how(given(**strategies)(check))()


@needs("hypothesis")
def test_any_flags_are_taken_or_refused():
    from hypothesis import strategies as st
    name = st.sampled_from([field.name for field in dataclasses.fields(Config)])
    value = st.one_of(st.text(max_size=20), st.integers().map(str), st.floats().map(str), st.sampled_from(
        ["nan", "-inf", "1e400", "-1", "0", "1e9", "", "None", "\u0663", "9" * 5000]))

    def check(pairs):
        arguments = [f"{flag(name)}={value}" for name, value in pairs]
        try:
            parse_arguments(["--prompt-file", "p.txt", "--eval-prompt-file", "h.txt", *arguments]).check()
        except UserError as error:
            assert str(error).startswith("--")
        except SystemExit as error:   # argparse's own refusal
            assert error.code == 2

    try_many(check, 300, pairs=st.lists(st.tuples(name, value), max_size=4))


def test_mistakes_on_the_command_line_are_answered_in_one_sentence(tmp_path, capsys, monkeypatch):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    empty, single = write("empty.txt", b"\n  \n"), write("single.txt", b"a star\n")
    write("other/model_index.json", b'{"_class_name": "DiTPipeline"}')
    write("folder/config.json", b"{}")
    write("hollow/model_index.json",
          b'{"_class_name": "StableDiffusion3Pipeline", "vae": ["diffusers", "AutoencoderKL"]}')
    for part, weight in (("text_encoder", "text_model.encoder.layers.1.mlp.fc1.weight"),
                         ("transformer", "proj_out.weight"), ("tokenizer", None)):
        folder = tmp_path / f"no_{part}"
        shutil.copytree(MODEL, folder)
        if weight is None:
            shutil.rmtree(folder / part)
            continue
        path, = (folder / part).glob("*.safetensors")
        tensors = load_file(path)
        assert any(name.endswith(weight.removeprefix("text_model.")) for name in tensors)
        kept = {name: t for name, t in tensors.items() if not name.endswith(weight.removeprefix("text_model."))}
        save_file(kept, path, {"format": "pt"})
    for flags, sentence in (
            (["--prompt-file", tmp_path / "absent.txt"], "absent.txt cannot be read: "),
            (["--prompt-file", "."], "--prompt-file is missing"),
            (["--prompt-file", "x" * 300 + ".txt"], "cannot be read: "),
            (["--prompt-file", tmp_path], "cannot be read: "),
            (["--prompt-file", write("bytes.txt", b"a st\xffr\n")], "bytes.txt cannot be read"),
            (["--prompt-file", empty], "empty.txt holds no prompt"),
            (["--prompt-file", write("long.txt", b"x" * 10 ** 6), "--eval-prompt-file", single, "--reward", "shapes"],
             "long.txt, line 1: "),
            (["--eval-prompt-file", empty], "empty.txt holds no prompt"),
            (["--reward", "pickscor"], "unknown reward 'pickscor'; known: shapes, "),
            (["--reward", "shapes:nan"], "nan"),
            (["--group-size", 1], "--group-size must"),
            (["--device", "abacus"], "--device abacus cannot be used"),
            (["--beta", "nan"], "--beta must"),
            (["--updates-per-rollout", 3], "--updates-per-rollout must divide"),
            (["--resolution", 36], "--resolution has to be a multiple of 8, at most 64"),
            (["--resolution", 72], "--resolution has to be a multiple of 8, at most 64"),
            (["--lora", tmp_path], "cannot be used: "),
            (["--device", "meta"], "--device meta cannot be used"),
            (["--groups-per-step", 10 ** 9], "--groups-per-step must lie between 1 and 4096"),
            (["--prompt-file", write("table.csv", b"a star\n")], "table.csv cannot be read: "),
            (["--model", tmp_path / "absent"], "absent cannot be loaded"),
            (["--model", tmp_path / "folder"], "folder cannot be loaded: "),
            (["--model", tmp_path / "other"], "other cannot be loaded: "),
            (["--model", tmp_path / "hollow"], "hollow cannot be loaded: "),
            (["--model", tmp_path / "no_text_encoder"], "no CLIPTextModelWithProjection: it has no weights for "),
            (["--model", tmp_path / "no_transformer"], "no SD3Transformer2DModel: it has no weights for proj_out"),
            (["--model", tmp_path / "no_tokenizer"], "no CLIPTokenizer: it reads all words alike")):
        assert run(tmp_path / "run", *flags) == 2, flags
        printed = capsys.readouterr().err
        assert sentence in refusal(printed) and len(refusal(printed)) < 900, (flags, printed)
        assert printed.count("\n") == 1, printed
    assert not (tmp_path / "run").exists()   # nothing is written before everything is checked
    assert main([]) == 2 and "--prompt-file is missing" in refusal(capsys.readouterr().err)


def test_out_of_memory_is_a_sentence_that_says_what_to_lower(tmp_path):
    # A process that may have 6 GB is asked for more.
    arguments = command(tmp_path / "run", "--group-size", 4096, "--groups-per-step", 64, "--batch-size", 10 ** 6)
    done = subprocess.run([sys.executable, ROOT / "dgpo.py", *arguments], capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (6 * 2 ** 30,) * 2))
    assert done.returncode == 1 and "out of memory: lower --batch-size, " in refusal(done.stderr)


def test_help_shows_every_flag_with_its_defaults_and_wrong_ones_end_like_other_mistakes(capsys):
    assert main(["--help"]) == 0 and main(["--no-such-flag"]) == 2
    shown = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        defaults = [str(value) for value in (field.default, field.metadata.get("paper")) if value not in ("", None)]
        assert flag(field.name) in shown
        if defaults and field.type is not bool:
            assert re.search(rf"{flag(field.name)} .*?\[{re.escape('; '.join(defaults))}\]", shown), field.name
    for group in ("task:", "rollout:", "objective:", "optimisation:", "evaluation and saving:"):
        assert group in shown


def test_dgpo_py_alone_in_a_folder_can_be_imported_for_its_functions(tmp_path):
    shutil.copy(ROOT / "dgpo.py", tmp_path)
    code = ("import dgpo, torch; error, advantages = torch.ones(1, 2), torch.tensor([[1., -1]])\n"
            "print(dgpo.dgpo_loss(error, error, advantages, beta=9).item())")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"})
    assert float(done.stdout) == pytest.approx(math.log(2) / 9), done.stderr


def test_ctrl_c_shows_no_traceback_whenever_it_comes(tmp_path):
    arguments = [sys.executable, ROOT / "dgpo.py", *command(tmp_path / "run", "--steps", 100)]
    for seconds in (0.3, 1.0, 6.0):   # while libraries load, and later
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
        assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in said
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_the_command_itself_prints_that_sentence_alone_wherever_one_stands(tmp_path):
    # In a process of its own, as typed, from another folder and on a terminal that knows ASCII alone.
    prompts = tmp_path / "pr\u00f6mpts.txt"
    prompts.write_text("a star\ntwo rings\n")
    (tmp_path / "heldout.txt").write_text("a ring\n")
    for flags, code, sentence in ((["--device", "cuda"], 2, "--device cuda cannot be used"),
                                  (["--model", "nobody/absent", "--reward", "shapes"], 2, "check the network"),
                                  (["--prompt-file", tmp_path / "\u00fc.txt"], 2, r"\xfc.txt cannot be read"),
                                  ([*TINY, "--device", "cpu", "--steps", 1], 0, "")):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", ROOT / "dgpo.py", "--prompt-file", prompts, "--output-dir",
             tmp_path / "run", *map(str, flags)], capture_output=True, text=True, cwd=tmp_path,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "ascii"})
        assert done.returncode == code, done.stderr
        if code:
            assert done.stdout == "" and sentence in refusal(done.stderr) and done.stderr.count("\n") == 1
    assert json.loads((tmp_path / "run/config.json").read_text())["model"] == str(MODEL)


# ------------------------------------------------------------------------------------------------
# README
# ------------------------------------------------------------------------------------------------


def readme_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def readme_commands():
    """(script, arguments) of every command of README."""
    text = "".join(readme_blocks("bash")).replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in re.findall(r"python \S+\.py.*", text)]
    return [(script, arguments) for _, script, *arguments in commands]


@pytest.mark.parametrize("sd35", ["3.5-medium"], indirect=True)
def test_every_command_of_the_readme_runs(sd35, judges, tmp_path, monkeypatch):  # noqa: F811
    # Each as it stands there and then made short, with small models of the same kind in the place of the hub's.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").symlink_to(ROOT / "shapes")
    for path in itertools.chain(*((f"geneval/{part}_metadata.jsonl", f"ocr/{part}.txt", f"pickscore/{part}.txt")
                                  for part in ("train", "test"))):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        rows = [{"prompt": f'a {name} that says "{name}"', "include": [{"class": name, "count": 1}]}
                for name in ("dog", "tv", "cup")]
        lines = [json.dumps(row) if path.endswith("jsonl") else row["prompt"] for row in rows]
        (tmp_path / path).write_text("\n".join(lines))
    assert run(tmp_path / "runs/my-run", "--steps", 1) == 0   # the run that README goes on with
    (tmp_path / "my.txt").write_text("a lighthouse\nan old door\n")
    reward, = (block for block in readme_blocks("python") if "def redness" in block)
    (tmp_path / "my_rewards.py").write_text(reward)
    commands = [(script, arguments) for script, arguments in readme_commands() if script == "dgpo.py"]
    assert len(commands) > 7
    for i, (_, arguments) in enumerate(commands):
        small = ["--model", sd35, "--dtype", "float32", "--resolution", 32] if "--model" in arguments else []
        for name in ("--reward", "--eval-reward"):
            if name in arguments:
                at = arguments.index(name) + 1
                arguments[at] = ",".join(f"{r}={judges[r]}" if r in judges else r for r in arguments[at].split(","))
        short = [] if "--resume" in arguments else [*TINY[2:], "--output-dir", tmp_path / f"run{i}", *small]
        steps = [] if arguments[-2:] == ["--steps", "0"] else ["--steps", "1"]
        assert main([*arguments, *map(str, short), *steps]) == 0


def test_the_readmes_loss_for_copying_runs():
    blocks = [block for block in readme_blocks("python") if "dgpo_loss" in block]
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_every_key_of_the_metrics_is_explained_in_the_readme(tmp_path):
    assert run(tmp_path, "--steps", 1, "--reward", "shapes") == 0
    readme = (ROOT / "README.md").read_text()
    keys = {key.partition("/")[0] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
            for key in json.loads(line)} | {"terms"}
    assert not [key for key in sorted(keys) if not re.search(rf'`"?{key}["`/]', readme)]
