"""What the method promises, one property a test, in the order of dgpo.py; then the rewards, the command and README.

    python -m pytest -q test_dgpo.py   # README says what it needs besides
"""

import dataclasses
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.models.mask2former import modeling_mask2former

import dgpo
import rewards
from benchmarks import throughput
from dgpo import (
    POLICIES,
    SD3,
    Config,
    LoRA,
    accumulate_gradients,
    add_noise,
    clip_error,
    comparison,
    dgpo_loss,
    draw_timesteps,
    evaluate,
    flag,
    group_advantages,
    load_model,
    load_prompts,
    main,
    ode_sigmas,
    parse_arguments,
    picture_rows,
    prepare,
    rollout,
    rows_of_step,
    sample_ode,
    shift_time,
    summarize,
    update,
)
from rewards import COLORS, UserError, blame, brief, load_reward, prompt_category
from shapes.train_base import build_tokenizer

torch.set_num_threads(1)   # two workers share two cores (README: pytest -n 2)

ROOT = Path(__file__).resolve().parent
MODEL = ROOT / "shapes/model"
PROMPTS = ["a red circle", "three squares", "a star left of a ring", "a green cross and a blue triangle"]
ROWS = [{"prompt": prompt} for prompt in PROMPTS]
UMASK = os.umask(0)
os.umask(UMASK)


def seed(number):
    return torch.Generator().manual_seed(number)


def sd3(**settings):
    """The embedded model, freshly loaded and with PROMPTS encoded, and the settings it was loaded with."""
    config = Config(**{"model": str(MODEL), "device": "cpu", "lora_rank": 4, **settings})
    model = load_model(config)
    model.encode(PROMPTS)
    return model, config


@pytest.fixture(scope="module")
def embedded():
    """The embedded model, loaded once for the thousands of inputs that hypothesis makes up."""
    return sd3()[0]


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
    model.places = {p: i for i, p in enumerate(["", *PROMPTS])}
    model.texts = torch.zeros(5, 11, 128), torch.zeros(5, 128)
    noise = torch.empty(4, *model.latent_shape, device="meta")
    x0 = sample_ode(lambda x, sigma: model.velocity(x, sigma, PROMPTS, "current", 3.0), noise, ode_sigmas(5, 3.0),
                    solver)
    assert x0.device.type == "meta" and x0.shape == noise.shape


def test_timesteps_stay_above_t_min_and_fall_one_in_each_stratum():
    t_min, shift, count = 0.3, 3.0, 4
    t = draw_timesteps(2000, count, t_min, shift, seed(2))
    assert t.shape == (2000, count)
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


def test_every_policy_starts_as_the_base_model():
    model, _ = sd3()
    base, x = diffusers_pipeline().transformer, torch.randn(4, *model.latent_shape, generator=seed(9))
    with torch.no_grad():
        plain = base(x, *model.embeddings(PROMPTS), 1000 * torch.tensor([0.5, 0.6, 0.8, 1.0]), return_dict=False)[0]
    for velocity in velocities(model, ["current", "old", "ema", "frozen"]):
        assert torch.equal(velocity, plain)


def test_training_moves_the_policies_apart_and_leaves_the_base_weights_bit_for_bit():
    model, config = sd3(kl_weight=0.1)
    policies = ["frozen", "current", "old", "ema"]
    before = velocities(model, policies)
    for step in range(2):
        update(model, adamw(model), *update_inputs(model), config, step)
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
        update(model, adamw(model), *update_inputs(model), config, step=step)
        for policy, decay in zip(before, decays):
            for t, old, new in zip(model.lora.weights(policy), before[policy], model.lora.weights("current")):
                torch.testing.assert_close(t, decay * old + (1 - decay) * new)


def test_a_bfloat16_model_keeps_its_lora_and_its_velocities_in_float32():
    model, config = sd3(dtype="bfloat16")
    update(model, adamw(model), *update_inputs(model), config, step=0)
    assert model.transformer.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in model.lora.weights("current"))
    assert all(v.dtype == torch.float32 for v in velocities(model, ["current", "frozen"]))


@needs("peft")
def test_exported_lora_draws_the_same_images_in_plain_diffusers(tmp_path):
    model, config = sd3(solver="euler", guidance_scale=3.0)
    randomize(model, "ema", 0.1, 12)
    model.lora.export(tmp_path, step=7)
    noise = torch.randn(4, *model.latent_shape, generator=seed(13))
    base, ours = (pixels(rollout(model, ROWS, 1, seed(13), 6, policy, config)[1]) for policy in ("frozen", "ema"))
    assert abs(ours - base).max() > 50   # the LoRA shows
    pipe = diffusers_pipeline()
    pipe.load_lora_weights(tmp_path)
    theirs = pipe(PROMPTS, num_inference_steps=6, guidance_scale=3.0, latents=noise, height=32, width=32,
                  max_sequence_length=1).images
    assert abs(ours - pixels(theirs)).max() <= 1


def test_a_lora_read_back_is_the_one_that_was_written(tmp_path):
    model, _ = sd3()
    randomize(model, "ema", 0.1, 25)
    model.lora.export(tmp_path)
    other, _ = sd3(lora_rank=7)   # of another rank: the file's counts
    other.lora.load(tmp_path)
    torch.testing.assert_close(velocities(other, POLICIES), 3 * velocities(model, ["ema"]))   # training begins with it
    for targets, sentence in ((("to_q",), "it has other layers, too"), ((*SD3.lora_targets, "net.2"), "net.2")):
        with mock.patch.object(SD3, "lora_targets", targets), pytest.raises(UserError, match=sentence):
            sd3()[0].lora.load(tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"half a file")
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="does not hold this model's LoRA"):
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
    assert set(model.places) == {"", PROMPTS[0]}   # the empty one is for guidance


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
    noise = torch.randn(4, *model.latent_shape, generator=seed(14))
    x0, ours, *_ = rollout(model, ROWS, 1, seed(14), 8, "current", config)
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
        for t in weights:
            t.grad = None


def test_gradient_checkpointing_leaves_the_update_unchanged():
    weights = []
    for checkpointing in (False, True):
        model, config = sd3(gradient_checkpointing=checkpointing)
        randomize(model, "current", 0.05, 26)
        update(model, torch.optim.SGD(model.lora.weights("current"), lr=1.0), *update_inputs(model), config, step=0)
        assert model.transformer.gradient_checkpointing == checkpointing
        weights.append(torch.cat([t.detach().flatten() for t in model.lora.weights("current")]))
    torch.testing.assert_close(*weights)


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
        metrics = update(model, adamw(model), x0, prompts, advantages, config, step=0, accumulate=accumulate)
        results.append((metrics, model.lora.weights("current")))
    assert set(counted) == {(1, 2)}
    assert results[0][0] == results[1][0] and metrics["gradient_norm"] > 0
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))
    before = [t.detach().clone() for t in model.lora.weights("current")]
    update(model, adamw(model), x0, prompts, torch.zeros_like(advantages), config, step=1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.lora.weights("current")))


def test_a_gradient_that_is_not_finite_ends_the_run_and_moves_nothing():
    model, config = sd3()
    randomize(model, "current", 0.05, 63)
    before = [t.detach().clone() for t in model.lora.weights("current")]
    x0, prompts, advantages = update_inputs(model)
    x0[0, 0, 0, 0, 0] = math.inf
    with pytest.raises(UserError, match="gradient is not finite"):
        update(model, adamw(model), x0, prompts, advantages, config, step=0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.lora.weights("current")))


def test_updates_favour_the_preferred_images():
    # The sign of it all, on fresh noise: the error of preferred images falls relative to that of rejected ones.
    model, config = sd3(clip_range=0.0, kl_weight=0.0)
    x0, prompts, advantages = update_inputs(model)
    optimizer = adamw(model)
    for step in range(5):
        update(model, optimizer, x0, prompts, advantages, config, step)
    noise = torch.randn(x0[:, :1].shape, generator=seed(21))
    x_t, target = add_noise(x0, noise, 0.8)
    repeated = [prompt for prompt in prompts for _ in range(5)]
    with torch.no_grad():
        error, ref_error = ((model.velocity(x_t.flatten(0, 1), 0.8, repeated, policy).view_as(x_t) - target)
                            .pow(2).mean((2, 3, 4)) for policy in ("current", "frozen"))
    assert ((advantages * (error - ref_error)).mean(1) < -1e-3).all()


def test_evaluation_always_starts_from_the_same_noise():
    model, config = sd3(eval_images=2, eval_num_inference_steps=3)
    rewards = {name: load_reward(name) for name in ("shapes", "jpeg_compressibility")}
    (first, images), (second, again) = (evaluate(model, rewards, ROWS, config, "ema") for _ in "ab")
    assert list(first) == ["shapes, strict", "shapes", "jpeg_compressibility"]   # what is trained on comes first
    for name in first:
        assert first[name].shape == (4, 2) and torch.equal(first[name], second[name])
    assert torch.equal(first["shapes, strict"], (first["shapes"] == 1).float())
    assert (pixels(images) == pixels(again)).all()


def test_evaluation_takes_its_error_over_prompts():
    right = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])   # [N, K]
    rows = [{"prompt": prompt} for prompt in ("a star", "a ring", "two rings", "a star and a ring")]
    summary = summarize(right, rows)
    assert summary["score"] == pytest.approx(3 / 8)
    # The shares of right pictures, 1, 1/2, 0 and 0, spread with a variance of 11/64 about their mean.
    assert summary["error"] == pytest.approx((11 / 64 / 3) ** 0.5)
    assert summary["categories"] == pytest.approx({"single_object": 0.75, "counting": 0.0, "two_object": 0.0})
    # GenEval's files name the category themselves.
    assert summarize(right, [{"prompt": "a dog", "tag": "colors"}] * 4)["categories"] == {"colors": 3 / 8}


def test_a_table_compares_the_same_prompts_and_notices_a_fall():
    rows = [{"prompt": prompt} for prompt in ("a star", "a ring", "two rings", "three rings")]
    before = torch.tensor([[5.0, 5.2], [4.0, 4.2], [6.0, 6.2], [1.0, 1.2]])   # prompts differ much, noises little
    for after, fell in ((before - 0.1, True), (before + 0.1, False),
                        (before + torch.tensor([[0.1], [-0.2], [0.1], [-0.2]]), False)):
        table, noticed = comparison("aesthetic", before, after, rows)
        assert noticed == fell, table
    assert re.search(r"aesthetic +before +after +change\nsingle_object +4.600 +4.550 +-0.050\n"
                     r"counting +3.600 +3.550 +-0.050\nall +4.100 +4.050 +-0.050\n", table)
    table, noticed = comparison("aesthetic", before, before, rows)   # nothing was trained: not a table of zeros
    assert not noticed and re.search(r"aesthetic +score\nsingle_object +4.600\ncounting +3.600\nall +4.100\n", table)

# ------------------------------------------------------------------------------------------------
# PROMPTS
# ------------------------------------------------------------------------------------------------


GENEVAL = [  # as published by GenEval and, for training, by Flow-GRPO
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cup", "count": 2}], "exclude": [{"class": "cup", "count": 3}],
     "prompt": "a photo of two cups"},
    {"tag": "position", "include": [{"class": "dog", "count": 1},
                                    {"class": "tv", "count": 1, "position": ["left of", 0]}],
     "prompt": "a photo of a tv left of a dog"}]


def test_prompt_files_of_geneval_and_of_ocr_are_read_as_they_are(tmp_path):
    path = tmp_path / "geneval.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*GENEVAL, GENEVAL[0]]) + "\n\n")
    assert load_prompts(path) == [*GENEVAL, GENEVAL[0]]   # as often as they stand there, their fields beside them
    path.rename(tmp_path / "geneval.JSONL")
    assert load_prompts(tmp_path / "geneval.JSONL") == [*GENEVAL, GENEVAL[0]]
    path = tmp_path / "ocr.txt"
    path.write_bytes('\ufeffA sign that says "Café 24"\r\n\r\nA poster with "SALE"\r\n'.encode())
    assert load_prompts(path) == [{"prompt": 'A sign that says "Café 24"'}, {"prompt": 'A poster with "SALE"'}]


@pytest.mark.parametrize("line, sentence", [
    ('{"prompt": "a', "line 2: Unterminated"), ('["a star"]', 'line 2: not an object with a text as its "prompt"'),
    ('{"text": "a star"}', "line 2: not an object"), ('{"prompt": 3}', "line 2: not an object"),
    ('{"prompt": " "}', "line 2: not an object")])
def test_a_faulty_line_of_a_jsonl_file_is_named(tmp_path, line, sentence):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a star"}\n' + line + "\n")
    with pytest.raises(UserError, match=sentence):
        load_prompts(tmp_path / "p.jsonl")


def test_every_prompt_is_drawn_once_before_any_is_drawn_again():
    config, rows = Config(groups_per_step=3), [{"prompt": f"prompt {i}"} for i in range(10)]
    drawn = [row["prompt"] for step in range(10) for row in rows_of_step(rows, step, config)]
    epochs = [drawn[i:i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == [row["prompt"] for row in rows] for epoch in epochs) and epochs[0] != epochs[1]


IMAGES = [Image.new("RGB", (32, 32), (level, level, level)) for level in (0, 100, 200)]

# ------------------------------------------------------------------------------------------------
# REWARDS: sums, functions of the user's own, what is refused
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error, sentence", [
    (ValueError("too\nmany\nlines"), "it failed: ValueError too"), (KeyError("name"), "it failed: KeyError 'name'"),
    (AssertionError(), "it failed: AssertionError"), (OSError(2, "No such file", "x"), "[Errno 2] No such file: 'x'"),
    (RuntimeError("in \x1b[31mred " + "x" * 1_000_000), "failed: in \\x1b[31mred xxx"), (UserError("do so"), "do so")])
def test_what_goes_wrong_is_blamed_in_one_short_sentence_that_says_why(error, sentence):
    with pytest.raises(UserError) as caught, blame("it failed"):
        raise error
    assert sentence in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 350
    assert error is (caught.value if isinstance(error, UserError) else caught.value.__cause__)


def test_a_prompts_category_is_its_tag_or_that_of_its_grammar():
    assert prompt_category("a star", {}) == "single_object" and prompt_category("a dog", {}) == "all"
    assert prompt_category("a star", {"tag": "counting"}) == "counting" and prompt_category("a dog", {"tag": 3}) == "3"
    hostile = prompt_category("a star", {"tag": "\x1b[2J\u202e\ud800" + "x" * 1000})   # what a terminal would obey
    assert hostile.isprintable() and len(hostile) < 110 and hostile.endswith("xxx...")
    assert brief("a star") == "a star" and brief({"class": "Café"}) == "{'class': 'Café'}"


def own_reward(folder, body):
    """Write a reward of the user's own; returns its name for --reward."""
    (folder / "mine.py").write_text(f"import torch\n\ndef score(images, prompts, metadata):\n    {body}\n")
    return f"{folder}/mine.py:score"


def test_a_weighted_sum_of_rewards_and_a_reward_of_ones_own(tmp_path):
    level = own_reward(tmp_path, "return [image.getpixel((0, 0))[0] for image in images]")
    batch = IMAGES, PROMPTS[:3], [{}] * 3
    scores = load_reward(level)(*batch)
    assert scores.dtype == torch.float32 and scores.tolist() == [0, 100, 200]
    total = load_reward(f"{level}:0.5, jpeg_compressibility:-2,jpeg_incompressibility")
    torch.testing.assert_close(total(*batch), 0.5 * scores + 3 * load_reward("jpeg_incompressibility")(*batch))
    assert total.files == [f"{tmp_path}/mine.py"] and load_reward("shapes").files == []
    assert total([], [], []).shape == (0,)   # of many processes, one may own no group
    # Strict accuracy has a meaning only for a verifier on its own.
    assert load_reward("shapes").strict
    assert not any(load_reward(spec).strict for spec in (level, "shapes:0.5", "shapes,shapes", "jpeg_compressibility"))


@pytest.mark.parametrize("body, sentence", [
    ("return [0.0]", "returned shape (1,) for 3 images"), ("return 0.0", "returned shape () for 3 images"),
    ("return [0.0, float('nan'), 0.0]", "not finite for 'three squares'"), ("return ['good', 'bad', 'bad']", "on: "),
    ("1 / 0", "on: division by zero"), ("raise ValueError(prompts[2])", "on: three long words then xxx")])
def test_a_faulty_reward_is_named_with_a_prompt(tmp_path, body, sentence):
    prompts = [*PROMPTS[:2], "three long words then " + "x" * 1_000_000]
    with pytest.raises(UserError, match="mine.py:score' failed for the prompts from 'a red circle' on: ") as caught:
        load_reward(own_reward(tmp_path, body))(IMAGES, prompts, [{}] * 3)
    assert sentence in str(caught.value) and len(str(caught.value)) < 600


def test_a_reward_cannot_change_the_run_that_calls_it(tmp_path):
    # Neither by a graph of gradients, from outside the call or inside it, nor by what it does to its arguments.
    spec = own_reward(tmp_path, """assert not torch.is_grad_enabled()
    with torch.enable_grad():
        scores = weight * torch.tensor([float(len(fields.pop('words')['deep'])) for fields in metadata])
    [fields['row'].append(9) for fields in metadata], [i.putpixel((0, 0), (9, 9, 9)) for i in images]
    prompts.clear(), images.clear()
    return scores\n\nweight = torch.ones(3, requires_grad=True)""")
    images, prompts = [image.copy() for image in IMAGES], PROMPTS[:3]
    metadata = [{"words": {"deep": "abc"}, "row": [1]}] * 3   # the images of one prompt share their row
    scores = load_reward(f"{spec},{spec}")(images, prompts, metadata)
    assert scores.tolist() == [6, 6, 6] and not scores.requires_grad
    assert images == IMAGES and prompts == PROMPTS[:3] and metadata == [{"words": {"deep": "abc"}, "row": [1]}] * 3


@pytest.mark.parametrize("spec, sentence", [
    ("shape", "unknown reward 'shape'; known: shapes, words, realism, jpeg_compressib"), ("", "unknown reward ''"),
    ("shapes:1.0,pickscor:2", "unknown reward 'pickscor'"), ("shapes,shapes:-inf", "must be a finite number, not -inf"),
    ("shapes:nan", "the weight of the reward 'shapes' must be a finite number, not nan"),
    ("jpeg_compressibility=models/jpeg", "has no model, so it takes no '=models/jpeg'"),
    ("absent.py:f", "'absent.py:f' cannot be loaded: [Errno 2] No such file"), ("empty.py:f", "has no attribute 'f'"),
    ("broken.py:f", "'broken.py:f' cannot be loaded: No module named 'no_such_module_anywhere'"),
    ("empty.py:number", "cannot be loaded: number is not a function")])
def test_a_reward_that_cannot_be_loaded_is_named_at_once(tmp_path, monkeypatch, spec, sentence):
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("import no_such_module_anywhere\n")
    Path("empty.py").write_text("number = 3\n")
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_reward(spec)


def test_jpeg_rewards_are_file_sizes_of_opposite_sign(tmp_path):
    noisy = Image.fromarray(np.random.default_rng(24).integers(0, 256, (32, 32, 3), np.uint8))
    noisy.save(tmp_path / "noisy.jpg", quality=95)
    small, large = load_reward("jpeg_incompressibility")([IMAGES[0], noisy], PROMPTS[:2], [{}] * 2).tolist()
    assert large == pytest.approx((tmp_path / "noisy.jpg").stat().st_size / 1000) and small < large
    assert load_reward("jpeg_compressibility")([noisy.convert("RGBA")], PROMPTS[:1], [{}]).item() == -large


def test_naming_the_rewards_imports_no_models():
    code = "import sys, rewards; assert 'transformers' not in sys.modules and 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ------------------------------------------------------------------------------------------------
# REWARDS THAT ARE MODELS: random ones of the real classes, saved in the real format
# ------------------------------------------------------------------------------------------------


def save_random(model, folder):
    """Save a model with larger weights than it was drawn with, as all images look alike to such a one."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 10
    model.save_pretrained(folder)


def save_clip(folder, number):
    """A random CLIP of the real classes with its processor: 32x32 images, 16 tokens.  Returns the folder."""
    torch.manual_seed(number)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL / "tokenizer")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 16,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    save_random(transformers.CLIPModel(config), folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP: `clipscore=FOLDER` and `pickscore=FOLDER`."""
    return save_clip(tmp_path_factory.mktemp("clip"), 51)


@pytest.fixture(scope="module")
def geneval_folder(tmp_path_factory):
    """A random Mask2Former with Swin, sure of what it sees, and a random CLIP: `geneval=FOLDER` as documented."""
    folder, labels = tmp_path_factory.mktemp("geneval"), dict(enumerate(["dog", "mouse", "tvmonitor", "cup"]))
    save_clip(folder / "clip", 53)
    backbone = transformers.SwinConfig(image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4,
                                       out_features=["stage1", "stage2", "stage3", "stage4"])
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=6,
        id2label=labels, label2id={name: i for i, name in labels.items()})
    torch.manual_seed(54)
    with mock.patch.object(modeling_mask2former, "requires_backends"):   # its loss asks for scipy to be built
        model = transformers.Mask2FormerForUniversalSegmentation(config)
    model.class_predictor.weight.data *= 20
    model.save_pretrained(folder / "detector")
    processor = transformers.Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    processor.save_pretrained(folder / "detector")
    return folder


@pytest.fixture(scope="module")
def ocr_folder(tmp_path_factory):
    """Random PP-OCRv5 models: `ocr=FOLDER` as documented."""
    folder = tmp_path_factory.mktemp("ocr")
    backbone = {"model_type": "hgnet_v2", "stem_channels": [3, 8, 8], "stage_in_channels": [8, 16, 16, 16],
                "stage_mid_channels": [8] * 4, "stage_out_channels": [16] * 4, "stage_num_blocks": [1] * 4,
                "stage_numb_of_layers": [1] * 4, "embedding_size": 8, "hidden_sizes": [16] * 4, "depths": [1] * 4,
                "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    kernels = {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}
    for n, name in ((7, "longratio"), (5, "midratio"), (3, "shortratio")):
        kernels |= {f"{part}_{name}": [[h, w], [1, 1], [h // 2, w // 2]] for part, h, w in (
            ("vertical_long_to_small_conv", n, 1), ("horizontal_small_to_long_conv", 1, n),
            ("symmetric_conv_long", n, n))}
    detector = transformers.PPOCRV5ServerDetConfig(
        backbone_config=backbone, neck_out_channels=16, intraclass_block_config=kernels,
        scale_factor_list=[1, 2, 4, 8], kernel_list=[3, 2, 2])
    backbone |= {"stage_downsample": [True] * 4, "stem_strides": [2, 1, 1, 1, 1],
                 "stage_downsample_strides": [[2, 1], [1, 2], [2, 1], [2, 1]]}
    recognizer = transformers.PPOCRV5ServerRecConfig(
        backbone_config=backbone, hidden_size=16, num_attention_heads=2, depth=1, head_out_channels=8)
    torch.manual_seed(56)
    detector = transformers.AutoModelForObjectDetection.from_config(detector).eval().requires_grad_(False)
    recognizer = transformers.AutoModelForTextRecognition.from_config(recognizer).eval().requires_grad_(False)
    for parameter in (p for model in (detector, recognizer) for p in model.parameters() if p.ndim > 1):
        torch.nn.init.kaiming_normal_(parameter)   # as drawn, all images look alike to them
    # Text here and there, and every character somewhere.
    for layer in (detector.head.binarize_head.conv_final, detector.head.local_refinement_module.convolution_final):
        layer.bias[:] = -5
    output = recognizer.head.head
    output.bias -= recognizer(torch.randn(4, 3, 48, 320)).last_hidden_state.log().mean((0, 1))
    output.weight *= 300
    output.bias *= 300
    detector.save_pretrained(folder / "detector")
    recognizer.save_pretrained(folder / "recognizer")
    settings = {"character_list": ["blank", *"abcdef", " "], "image_processor_type": "PPOCRV5ServerRecImageProcessor"}
    (folder / "recognizer/preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def ocr_models(ocr_folder):
    """Detector, recognizer and its characters, as transformers loads them."""
    detector = transformers.AutoModelForObjectDetection.from_pretrained(ocr_folder / "detector")
    recognizer = transformers.AutoModelForTextRecognition.from_pretrained(ocr_folder / "recognizer")
    characters = json.loads((ocr_folder / "recognizer/preprocessor_config.json").read_text())["character_list"]
    return detector.requires_grad_(False).eval(), recognizer.requires_grad_(False).eval(), characters


@pytest.fixture(scope="module")
def vlm_folder(tmp_path_factory):
    """A random Qwen2.5-VL, the architecture of the default judge, with a tokenizer of letters and its chat template."""
    folder = tmp_path_factory.mktemp("vlm")
    special = [f"<|{name}|>" for name in ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad",
                                          "video_pad")]
    vocabulary = {token: i for i, token in enumerate([*special, *map(chr, range(32, 127)), "\n"])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token=special[0], eos_token=special[2], additional_special_tokens=special[1:])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{% for part in m.content %}{% if part.type == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}")
    tokenizer.save_pretrained(folder)
    images = transformers.Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    images.save_pretrained(folder)
    torch.manual_seed(59)
    save_random(transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        text_config={"vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
                     "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": 2,
                     "pad_token_id": 0, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]}},
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
                       "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]},
        image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4)), folder)
    return folder


@pytest.fixture(scope="module")
def judges(clip_folder, geneval_folder, ocr_folder, vlm_folder, tmp_path_factory):
    """Every reward that is a model, with the folder of a small one."""
    aesthetic = shutil.copytree(clip_folder, tmp_path_factory.mktemp("judges") / "aesthetic")
    save_file({"layers.0.weight": torch.linspace(-1, 1, 12)[None], "layers.0.bias": torch.zeros(1)},
              aesthetic / "aesthetic-model.safetensors")
    return {"geneval": geneval_folder, "geneval_accuracy": geneval_folder, "pickscore": clip_folder,
            "clipscore": clip_folder, "aesthetic": aesthetic, "ocr": ocr_folder, "vlm": vlm_folder}


def pictures(count, size=(40, 40), number=50):
    """Random colourful pictures, [(width, height)] `size`."""
    noise = np.random.default_rng(number).integers(0, 256, (count, 5, 5, 3), np.uint8)
    return [Image.fromarray(array).resize(size, Image.Resampling.BICUBIC) for array in noise]


def check_batching(reward, images, prompts, metadata):
    """A reward judges every image for itself, the same each time; returns its scores."""
    scores = reward(images, prompts, metadata)
    assert scores.dtype == torch.float32 and scores.shape == (len(images),) and scores.device.type == "cpu"
    assert torch.equal(scores, reward(images, prompts, metadata)) and not scores.requires_grad
    alone = [reward([image], [prompt], [fields]) for image, prompt, fields in zip(images, prompts, metadata)]
    torch.testing.assert_close(scores, torch.cat(alone), rtol=1e-4, atol=1e-5)
    return scores


def clip_embeddings(folder, images, texts):
    """Written out with transformers alone, one pair at a time: the images' [B, D] and the texts' [B, D]."""
    model, processor, pairs = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder), []
    for image, text in zip(images, texts):
        inputs = processor(text=[text], images=[image], return_tensors="pt", truncation=True, max_length=16)
        with torch.no_grad():
            output = model(**inputs)
        pairs.append(torch.stack([output.image_embeds, output.text_embeds]))
    return torch.cat(pairs, 1)


def test_clip_rewards_are_cosines_of_the_models_own_embeddings(clip_folder):
    images, nothing = pictures(20), [{}] * 20   # more than one internal batch
    prompts = (PROMPTS * 5)[:19] + ["a red circle and " * 20 + "a star"]   # of several lengths, one cut off
    cosines = F.cosine_similarity(*clip_embeddings(clip_folder, images, prompts))
    clip = check_batching(load_reward(f"clipscore={clip_folder}"), images, prompts, nothing)
    pick = check_batching(load_reward(f"pickscore={clip_folder}"), images, prompts, nothing)
    torch.testing.assert_close(clip, 100 * cosines.clamp(min=0), rtol=1e-4, atol=1e-4)
    scale = CLIPModel.from_pretrained(clip_folder).logit_scale.exp().item()
    torch.testing.assert_close(pick, scale * cosines, rtol=1e-4, atol=1e-4)
    assert cosines.std() > 0.05 and (cosines < 0).any() and (cosines > 0).any()
    both = load_reward(f"clipscore={clip_folder}:-0.5, pickscore={clip_folder}")   # a folder, a weight and a sum
    torch.testing.assert_close(both(images, prompts, nothing), pick - 0.5 * clip)
    assert not both.strict and not both.files


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_aesthetic_score_is_the_linear_head_on_the_normalised_embedding(clip_folder, tmp_path, form):
    shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
    head = torch.nn.Sequential(*(torch.nn.Linear(*sizes) for sizes in ((12, 10), (10, 4), (4, 1))))
    state = {f"layers.{key}": value.detach() for key, value in head.state_dict().items()}
    (torch.save if form == "pth" else save_file)(state, tmp_path / f"aesthetic-model.{form}")
    scores = check_batching(load_reward(f"aesthetic={tmp_path}"), pictures(5), [""] * 5, [{}] * 5)
    embeddings = clip_embeddings(clip_folder, pictures(5), ["a star"] * 5)[0]   # of length 1 already
    torch.testing.assert_close(scores, head(embeddings)[:, 0].detach(), rtol=1e-4, atol=1e-4)


def test_a_model_that_cannot_be_loaded_is_named_with_what_to_do(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)   # as without a network, at once
    partial, small = (shutil.copytree(clip_folder, tmp_path / name) for name in ("partial", "small"))
    weights = load_file(partial / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, partial / "model.safetensors", {"format": "pt"})
    torch.save({"0.weight": torch.ones(1, 768), "0.bias": torch.ones(1)}, small / "aesthetic-model.pth")
    for spec, sentence in (
            ("pickscore", "cannot be loaded from yuvalkirstain/PickScore_v1 and laion/CLIP-ViT-H"),
            ("clipscore=someone/clip:2", "loaded from someone/clip (clipscore=FOLDER takes a folder): "),
            (f"clipscore={tmp_path}", "'clipscore' cannot be loaded from"),
            (f"clipscore={partial}", "partial is no CLIPModel: it has no weights for visual_projection.weight"),
            (f"aesthetic={clip_folder}", "holds no head of the aesthetic predictor"),
            (f"aesthetic={small}", "takes embeddings of size 768, the CLIP model"),
            (f"geneval={tmp_path}", f"there is no folder {tmp_path}/detector with facebook/mask2former")):
        with pytest.raises(UserError, match=re.escape(sentence)) as caught:
            load_reward(spec)
        assert "\n" not in str(caught.value)


# Boxes (x0, y0, x1, y1) by their place.
LEFT, RIGHT, TOP, MIDDLE = (0, 40, 20, 60), (80, 40, 100, 60), (40, 0, 60, 20), (40, 40, 60, 60)


@pytest.mark.parametrize("box, other, relations", [
    (LEFT, RIGHT, "left of"), (RIGHT, LEFT, "right of"), (TOP, MIDDLE, "above"), (MIDDLE, TOP, "below"),
    ((0, 0, 20, 20), MIDDLE, "left of, above"), ((70, 0, 90, 20), MIDDLE, "right of, above"),   # diagonally, both hold
    (MIDDLE, MIDDLE, ""), (MIDDLE, (41, 42, 59, 58), ""),                    # one over the other: neither
    ((44, 40, 64, 60), MIDDLE, ""), ((80, 25, 100, 45), MIDDLE, "right of"),    # 4 apart: 0.1 (20 + 20) is forgiven
    ((48.5, 40, 68.5, 60), MIDDLE, "right of"), ((48, 40, 68, 60), MIDDLE, "")])   # 4.5 of 8.5 left; 4 of 8, not more
def test_relations_of_boxes_follow_the_published_geometry(box, other, relations):
    assert rewards.box_relations(box, other) == set(relations.split(", ")) - {""}


def one(name, **fields):
    return {"class": name, "count": 1, **fields}


def found(name, confidence=0.95, box=MIDDLE, color=None):
    return name, confidence, box, color


DOG, CAT, CUP = found("dog", box=LEFT), found("cat", box=RIGHT), found("cup")
RED_DOG, PINK_DOG, BLUE_CAT = found("dog", color="red"), found("dog", color="pink"), found("cat", color="blue")
ONE, TWO = {"tag": "single_object", "include": [one("dog")]}, {"tag": "two_object", "include": [one("dog"), one("cat")]}
CUPS = {"tag": "counting", "include": [{"class": "cup", "count": 3}], "exclude": [{"class": "cup", "count": 4}]}
RED = {"tag": "colors", "include": [one("dog", color="red")]}
BOTH = {"tag": "color_attr", "include": [one("dog", color="red"), one("cat", color="blue")]}
CAT_RIGHT = {"tag": "position", "include": [one("dog"), one("cat", position=["right of", 0])]}
NO_CAT = {"include": [one("dog")], "exclude": [one("cat")]}


@pytest.mark.parametrize("metadata, detections, partial, accuracy", [
    # single_object: the confidence must be above 0.3; further classes do no harm; a second dog does, to the exact score
    (ONE, [DOG, CAT], 1, 1), (ONE, [], 0, 0), (ONE, [found("dog", 0.3)], 0, 0), (ONE, [found("dog", 0.301)], 1, 1),
    (ONE, [DOG, DOG], 0, 1), (ONE, [DOG] * 40, -14, 1),                          # 16 of them count
    (TWO, [DOG, CAT], 1, 1), (TWO, [DOG], 1 / 2, 0), (TWO, [DOG, CAT, CAT, CAT], (1 - 1) / 2, 1),
    ({"tag": "two_object", "include": [one("dog"), one("dog")]}, [DOG], 1, 1),   # a repeated clause asks no more
    # counting: the confidence must be above 0.9, and one too many is wrong in both
    (CUPS, [CUP] * 3, 1, 1), (CUPS, [CUP] * 2, 2 / 3, 0), (CUPS, [CUP] * 4, 2 / 3, 0),
    (CUPS, [CUP] * 3 + [found("cup", 0.9)], 1, 1), (CUPS, [found("cup", 0.9)] * 3, 0, 0),
    # colors, of the surest dog; then color_attr
    (RED, [RED_DOG], 1, 1), (RED, [PINK_DOG], 1 / 2, 0), (RED, [], 0, 0), (RED, [PINK_DOG, found("dog", 0.5)], 0, 0),
    (RED, [found("dog", 0.5, color="pink"), RED_DOG], 0, 1), (RED, [found("dog", 0.5, color="red"), PINK_DOG], 0, 0),
    ({"include": [one("dog", color="red") | {"count": 2}]}, [RED_DOG, PINK_DOG], 3 / 4, 0), (BOTH, [RED_DOG], 1 / 2, 0),
    (BOTH, [RED_DOG, BLUE_CAT], 1, 1), (BOTH, [found("dog", color="blue"), found("cat", color="red")], 1 / 2, 0),
    # position: of the second class as seen from the first, which has to be there
    (CAT_RIGHT, [DOG, CAT], 1, 1), (CAT_RIGHT, [found("dog", box=RIGHT), found("cat", box=LEFT)], 2 / 3, 0),
    (CAT_RIGHT, [found("dog"), found("cat")], 2 / 3, 0), (CAT_RIGHT, [CAT], 1 / 3, 0), (CAT_RIGHT, [DOG], 1 / 3, 0),
    ({"include": [one("dog", color="red"), one("cat", position=["right of", 0])]}, [DOG, CAT], 1 / 2, 0),
    (CAT_RIGHT, [DOG, CAT, found("cat", 0.5, box=LEFT)], 1 / 3, 1),
    (CAT_RIGHT, [found("dog", 0.5, box=LEFT), found("dog", 0.6, box=RIGHT), found("cat")], (0 + 1 + 0) / 3, 0),
    # exclude
    (NO_CAT, [DOG], 1, 1), (NO_CAT, [DOG, CAT], 1 / 2, 0), (NO_CAT, [DOG, found("cat", 0.3)], 1, 1)])
def test_geneval_rules_worked_by_hand(metadata, detections, partial, accuracy):
    for detected in (detections, detections[::-1]):
        assert rewards.score_geneval(metadata, detected) == pytest.approx(partial)
        assert (rewards.score_geneval(metadata, detected) == 1.0) == (partial == 1)   # to the last bit: `strict` asks
        assert rewards.score_geneval(metadata, detected, exact=False) == accuracy


def test_geneval_judges_each_image_alone_exactly_and_by_its_own_accuracy(geneval_folder):
    images = pictures(9) + pictures(8, (56, 40), 55)   # of two sizes
    classes = ("dog", "computer mouse", "tv", "cup")    # two of them under GenEval's own names
    metadata = [{"include": [one(classes[i % 4], color=COLORS[i % 10]), one(classes[(i + 1) % 4])]} for i in range(17)]
    exact, accuracy = (load_reward(f"{name}={geneval_folder}") for name in ("geneval", "geneval_accuracy"))
    scores, accuracies = (check_batching(reward, images, [""] * 17, metadata) for reward in (exact, accuracy))
    assert scores.unique().numel() > 3 and scores.max() <= 1 and exact.strict and accuracy.strict
    assert set(accuracies.tolist()) <= {0.0, 1.0} and (accuracies >= (scores == 1)).all()


def test_geneval_sees_the_detectors_masks_and_names_colours_with_clip(geneval_folder, monkeypatch):
    image, (model, processor) = pictures(1, (48, 40))[0], rewards.load_detector(geneval_folder / "detector", "cpu")
    objects = rewards.detect_objects((model, processor), [image])[0]
    inputs = processor(images=[image], return_tensors="pt")
    output, expected = model(**inputs), []
    # The confidences written out: of a class, times the mean of its mask at the image's size.
    for chances, mask in zip(output.class_queries_logits[0].softmax(-1)[:, :-1], output.masks_queries_logits[0]):
        for size in (inputs.pixel_values.shape[-2:], (40, 48)):
            mask = F.interpolate(mask.view(1, 1, *mask.shape[-2:]), size, mode="bilinear")
        expected += (chances[chances > 0.3] * mask[mask > 0].sigmoid().mean()).tolist() if (mask > 0).any() else []
    assert len(expected) > 2 and sorted(d[1] for d in objects) == pytest.approx(sorted(expected), rel=1e-5)
    for label, _, box, mask in objects:
        ys, xs = np.nonzero(np.asarray(mask))
        assert mask.size == image.size and label in ("dog", "computer mouse", "tv", "cup")
        assert box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    # An object's colour is that of the three captions nearest to it, as it is in its box and grey around its mask.
    label, _, (x0, y0, x1, y1), mask = max(objects, key=lambda d: d[1])
    crop = np.where(np.asarray(mask)[..., None], np.asarray(image), np.uint8(0x99))[y0:y1, x0:x1]
    captions = [text.format(color, label) for color in COLORS
                for text in ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")]
    crops, texts = clip_embeddings(geneval_folder / "clip", [Image.fromarray(crop)] * 30, captions)
    color = COLORS[F.cosine_similarity(texts.view(10, 3, -1).mean(1), crops[0]).argmax()]
    reward, embed, seen = load_reward(f"geneval_accuracy={geneval_folder}"), rewards.Clip.embed, []
    monkeypatch.setattr(rewards.Clip, "embed", lambda clip, kind, items: seen.append(items) or embed(clip, kind, items))
    for named in COLORS:
        assert reward([image], ["?"], [{"include": [one(label, color=named)]}]).item() == (named == color)
    assert np.array_equal(seen[0][0], crop)   # the surest object comes first


@pytest.mark.parametrize("read, wanted, score", [
    ("Hello", "hello", 1), ("HEL LO", "Hel lo", 1), ("say hello there", "hello", 1),
    ("hallo", "hello", 0.8), ("hell", "hello", 0.8), ("", "hello", 0), ("something else", "hello", 0),
    ("kitten", "sitting", 4 / 7), ("sitting", "kitten", 1 / 2), ("flaw", "lawn", 1 / 2), ("ab", "ba", 0),
    ("helo world", "hello", 0)])   # 6 edits, of 5 letters: capped
def test_ocr_score_is_the_authors(read, wanted, score):
    assert rewards.ocr_score(read, wanted) == pytest.approx(score)


def test_the_wanted_text_stands_in_double_quotes_or_in_the_metadata():
    for prompt, fields, text in (
            ('A sign that says "Hello World".', {}, "Hello World"), ("A cup with “Good day” on it", {}, "Good day"),
            ('"One" above "Two"', {}, "One"), ('a “sign” with "it\'s"', {}, "sign"), ('"One"', {"text": "Two"}, "Two"),
            ("no quotes", {"text": "Two"}, "Two"), ("no quotes", {"text": 24}, "24")):
        assert rewards.wanted_text(prompt, fields) == text


def test_text_boxes_are_grown_components_in_reading_order():
    def boxes(*regions):
        probability = torch.full((100, 200), 0.1)
        for (x0, y0, x1, y1), value in regions:
            probability[y0:y1, x0:x1] = value
        return rewards.text_boxes(probability)

    # 40x10: grown by 1.5 * 400 / 100 = 6 on every side, and cut at the edge of the map.
    assert boxes(((50, 30, 90, 40), 0.9)) == [(44, 24, 96, 46)] and boxes(((0, 0, 40, 10), 0.9)) == [(0, 0, 46, 16)]
    assert boxes(((160, 90, 200, 100), 0.9)) == [(154, 84, 200, 100)] and boxes() == []
    assert boxes(((50, 30, 90, 40), 0.59)) == [] and boxes(((50, 30, 90, 32), 0.9)) == []   # unsure; too thin
    # Three words in a line that is not quite level, then one below: from left to right, then down.
    order = boxes(*((word, 0.8) for word in ((140, 10, 160, 20), (60, 12, 100, 22), (5, 8, 25, 18), (60, 60, 100, 70))))
    assert [round(x0) for x0, _, _, _ in order] == [0, 54, 135, 54] and order[3][1] > 50
    assert len(boxes(((10, 10, 40, 20), 0.8), ((40, 20, 70, 30), 0.8))) == 1   # joined at a corner, they are one line


def test_ctc_drops_blanks_and_repeats_and_what_it_is_not_sure_of():
    def read(indices, confidence=0.9):
        probabilities = torch.full((len(indices), 4), (1 - confidence) / 3)
        probabilities[range(len(indices)), indices] = confidence
        return rewards.read_ctc(probabilities, ["blank", "a", "b", " "])

    assert read([1, 1, 0, 1, 2, 2, 3, 0, 2]) == "aab b" and read([0, 0]) == "" and read([2]) == "b"
    assert read([1, 2], 0.51) == "ab" and read([1, 2], 0.49) == ""


def test_ocr_runs_on_its_detector_and_recogniser(ocr_folder, ocr_models):
    images, (detector, *recognizer) = pictures(6, (160, 96), 57) + pictures(2, (96, 96), 58), ocr_models
    lines = [rewards.cut_lines(detector, [image])[0] for image in images]
    texts = ["".join(rewards.read_lines(*recognizer, [crop])[0] for crop in crops) for crops in lines]
    assert len(set(texts)) > 4
    # Asked for what is read, for half of it with another letter, and for something else.
    wanted = [(text, text[len(text) // 2:] + "f", "zzz")[i % 3] for i, text in enumerate(texts)]
    prompts = [f'It says "{text}"' for text in wanted]
    scores = check_batching(load_reward(f"ocr={ocr_folder}"), images, prompts, [{}] * 8)
    assert scores.tolist() == pytest.approx([rewards.ocr_score(*pair) for pair in zip(texts, wanted)])
    assert (scores[::3] == 1).all() and (scores[2::3] == 0).all() and scores.unique().numel() > 2


def test_ocr_models_see_what_they_were_trained_on(ocr_models):
    (detector, recognizer, characters), seen = ocr_models, []
    for model in ocr_models[:2]:
        model.register_forward_pre_hook(lambda _, args, inputs: seen.append(inputs["pixel_values"]), with_kwargs=True)
    batches = [Image.new("RGB", (100, 50), "#f00")], [Image.new("RGB", (1920, 480))], pictures(8, (150, 90), 61)
    *_, lines = (rewards.cut_lines(detector, batch) for batch in batches)
    # In steps of 32, and at most 960; blue, green, red, with ImageNet's numbers for red, green, blue.
    assert [pixels.shape[2:] for pixels in seen] == [(64, 96), (256, 960), (96, 160)]
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor([-0.485 / 0.229, -0.456 / 0.224, 0.594 / 0.225]))
    upright = 0
    for of_image, probability in zip(lines, detector(pixel_values=seen[2]).last_hidden_state[:, 0]):
        for line, box in zip(of_image, rewards.text_boxes(probability), strict=True):
            x0, y0, x1, y1 = (round(edge * scale) for edge, scale in zip(box, 2 * (150 / 160, 90 / 96)))
            turned = y1 - y0 >= 1.5 * (x1 - x0)   # text that runs up
            assert line.size == ((y1 - y0, x1 - x0) if turned else (x1 - x0, y1 - y0))
            upright += turned
    assert 0 < upright < sum(map(len, lines))
    seen.clear()
    white = [Image.new("RGB", size, "white") for size in ((100, 24), (350, 48), (100, 48))]
    rewards.read_lines(recognizer, characters, white)
    assert [pixels.shape for pixels in seen] == [(2, 3, 48, 320), (1, 3, 48, 640)]
    widths = [(pixels[i] == 1).all(1).all(0).sum().item() for pixels, i in ((seen[0], 0), (seen[1], 0), (seen[0], 1))]
    assert widths == [200, 350, 100] and (seen[0][0, :, :, 200:] == 0).all()


def test_vlm_score_is_the_expected_rating_at_the_first_token_of_the_answer(vlm_folder):
    images = pictures(9) + pictures(9, (32, 56), 60)
    prompts = ["a red circle", "a star " * 9, "x", 'a {brace} and a "quote"'] * 4 + ["a ring"] * 2
    scores = check_batching(load_reward(f"vlm={vlm_folder}"), images, prompts, [{}] * 18)
    assert scores.min() >= 1 and scores.max() <= 5 and scores.std() > 0.05
    # Written out for one image with the model's own forward pass.
    tokenizer = transformers.AutoTokenizer.from_pretrained(vlm_folder)
    pixels = transformers.Qwen2VLImageProcessor.from_pretrained(vlm_folder)(images=images[3:4], return_tensors="pt")
    seen = "<|image_pad|>" * (int(pixels.image_grid_thw.prod()) // 4)
    question = rewards.RATING_PROMPT.replace("{prompt}", prompts[3])
    tokens = tokenizer(f"<|im_start|>user<|vision_start|>{seen}<|vision_end|>{question}<|im_end|><|im_start|>assistant",
                       return_tensors="pt").input_ids
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(vlm_folder).requires_grad_(False)
    logits = model(input_ids=tokens, mm_token_type_ids=(tokens == 5).long(), **pixels).logits[0, -1]
    chances = logits[tokenizer.convert_tokens_to_ids(list("12345"))].softmax(-1)
    assert scores[3].item() == pytest.approx(sum(i * p.item() for i, p in enumerate(chances, 1)), rel=1e-4)


def test_vlm_needs_a_token_for_every_rating(vlm_folder, tmp_path):
    folder = shutil.copytree(vlm_folder, tmp_path / "letters")
    content = json.loads((folder / "tokenizer.json").read_text())
    del content["model"]["vocab"]["4"], content["model"]["vocab"]["5"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="letters has no tokens of their own for the ratings 1 to 5"):
        load_reward(f"vlm={folder}")


def test_what_a_reward_cannot_score_is_known_beforehand(judges, tmp_path):
    own = own_reward(tmp_path, "return [1.0] * len(images)\n\nscore.check = lambda prompt, fields: {'a': 1}[prompt]")
    dog, blank = one("dog"), {"include": [one("dog")]}
    loaded = {name: load_reward(name) for name in ("shapes", "jpeg_compressibility", own)}
    loaded |= {name: load_reward(f"{name}={folder}") for name, folder in judges.items()}
    for name, prompt, fields in (
            ("shapes", "a star", {}), ("ocr", 'A sign: "x"', {}), ("ocr", "a sign", {"text": "x"}), (own, "a", {}),
            ("geneval", "", {"include": [dog, one("tv", color="red", position=["above", 0])], "exclude": [dog]}),
            *((name, "a dog", {}) for name in ("jpeg_compressibility", "pickscore", "clipscore", "aesthetic", "vlm"))):
        loaded[name].check(prompt, fields)
    unknown, nonsense = "a class, count, color or position that is not known", "cannot score the prompt 'a dog': "
    for name, prompt, fields, reason in (
            ("shapes", "a dog " * 200_000, {}, "it is not a sentence of the shapes grammar"),
            ("shapes", "a \x1b[31mdog", {}, r"'a \x1b[31mdog'"), (own, "b", {}, "KeyError 'b'"),
            ("ocr", "a sign", {"text": " "}, "no text"), *(
                ("ocr", prompt, {}, "it has no text in double quotes, nor a field 'text'")
                for prompt in ("don't and won't", 'an empty ""', 'a " "', '5" nail')),
            *((name, "a dog", {}, "it has no field 'include'") for name in ("geneval", "geneval_accuracy")),
            *(("geneval", "a dog", {"include": [dog, dog | wrong]}, unknown) for wrong in (
                {"class": "dragon"}, {"color": "mauve"}, {"count": 0}, {"position": ["beside", 0]},
                {"position": ["above", 1]}, {"position": ["above", -1]})),
            ("geneval", "a dog", blank | {"exclude": [one("dragon")]}, "it asks for {'class': 'dragon', 'count': 1}, "),
            *(("geneval", "a dog", fields, nonsense) for fields in (
                {"include": 3}, {"include": ["dog"]}, {"include": [{}]}, {"include": [dog | {"class": []}]},
                {"include": [dog | {"count": "one"}]}, {"include": [dog | {"position": 3}]}, blank | {"exclude": 1}))):
        for ask in (loaded[name].check, lambda prompt, fields: loaded[name](IMAGES[:1], [prompt], [fields])):
            with pytest.raises(UserError, match=re.escape(reason)) as caught:
                ask(prompt, fields)
            assert f"'{name}' cannot score the prompt" in str(caught.value).replace(f"={judges.get(name)}", "")
            assert len(str(caught.value)) < 600 and str(caught.value).isprintable()
    with pytest.raises(UserError, match="ocr=.*cannot score the prompt 'a star'"):   # a sum asks all of its terms
        load_reward(f"shapes,ocr={judges['ocr']}").check("a star", {})


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
    expected = {"lock", "config.json", "metrics.jsonl", *(f"samples/{step:06d}.png" for step in range(3)),
                "before_after.png", "checkpoints/000002.pt", "lora/about.json", "lora/pytorch_lora_weights.safetensors"}
    best = {"lora_best/about.json", "lora_best/pytorch_lora_weights.safetensors"}
    config, lines = json.loads((tmp_path / "run/config.json").read_text()), metrics_of(tmp_path / "run")
    scores = [line["eval_score"] for line in lines if "evaluation" in line]
    assert files == expected | (best if max(scores) > scores[0] else set())
    for name in files:
        assert (tmp_path / "run" / name).stat().st_mode & 0o777 == 0o666 & ~UMASK
        if name.endswith(".png"):
            Image.open(tmp_path / "run" / name).load()
    assert config["group_size"] == 4 and torch.__version__.startswith(config["versions"]["torch"]) and config["date"]
    assert [(line["step"], "evaluation" in line) for line in lines] == [
        (0, True), (1, False), (1, True), (2, False), (2, True)]
    assert json.loads((tmp_path / "run/lora/about.json").read_text()) == {"policy": "ema", "step": 2}


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path):
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    # Every policy takes part: rollouts from the old one, which is the reference as well.
    flags = ["--eval-every", 2, "--save-every", 2, "--rollout-old-after", 2, "--reference", "old"]
    assert run(straight, "--steps", 4, *flags) == 0 and run(halves, "--steps", 2, *flags) == 0
    with open(halves / "metrics.jsonl", "a") as file:   # a killed run has logged more than it has saved
        file.write('{"step": 3}\n{"st')
    assert resume(halves, "--steps", 4) == 0
    assert contents(straight) == contents(halves)
    ours, theirs = (torch.load(io.BytesIO((path / "checkpoints/000004.pt").read_bytes()[32:]), weights_only=True)
                    for path in (straight, halves))
    assert all(torch.equal(a, b) for p in dgpo.POLICIES for a, b in zip(ours["policies"][p], theirs["policies"][p]))
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
            checkpoints = set(killed.glob("checkpoints/*.pt"))
            while process.poll() is None and set(killed.glob("checkpoints/*.pt")) <= checkpoints:
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
    assert "Traceback" in (tmp_path / "traceback.txt").read_text()
    assert resume(tmp_path, "--steps", 2) == 0 and not list(tmp_path.rglob("*.tmp"))


def test_a_run_that_ends_between_its_lora_and_its_checkpoint_still_exports_its_last_step(tmp_path, monkeypatch):
    export = LoRA.export

    def stopped(lora, folder, **about):
        if (folder.name, about["step"]) == ("lora", 2):
            raise KeyboardInterrupt
        export(lora, folder, **about)

    monkeypatch.setattr(LoRA, "export", stopped)
    assert run(tmp_path, "--save-every", 1, "--steps", 2, "--eval-every", 9) == 130
    monkeypatch.undo()
    assert resume(tmp_path) == 0 and json.loads((tmp_path / "lora/about.json").read_text())["step"] == 2


@pytest.mark.parametrize("damage", ["cut off", "a bit flipped", "empty"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, capsys, damage):
    flags = ["--eval-every", 2, "--save-every", 1, "--steps", 3]
    assert run(tmp_path / "calm", *flags) == 0 and run(tmp_path / "run", *flags) == 0
    paths = sorted((tmp_path / "run/checkpoints").iterdir())
    assert [path.name for path in paths] == ["000002.pt", "000003.pt"]   # the newest two
    content = bytearray(paths[1].read_bytes())
    content[len(content) // 2] ^= 1
    paths[1].write_bytes({"cut off": content[:-100], "a bit flipped": content, "empty": b""}[damage])
    assert resume(tmp_path / "run") == 0
    assert "000003.pt is damaged" in capsys.readouterr().err
    assert contents(tmp_path / "run") == contents(tmp_path / "calm")
    for path in paths:
        path.write_bytes(b"half a file")
    assert resume(tmp_path / "run") == 2
    assert "all checkpoints in" in refusal(capsys.readouterr().err)


def test_a_run_goes_on_wherever_its_files_lie_but_not_with_others(tmp_path, capsys, monkeypatch):
    here, there, folder = tmp_path / "here", tmp_path / "there", tmp_path / "run"
    shutil.copytree(MODEL, here / "model")
    reward = "def score(images, prompts, metadata):\n    return [i.getpixel((9, 9))[0] / 255 for i in images]\n"
    for name, text in (("prompts.txt", "a red circle\ntwo squares\n"), ("held_out.txt", "a star\n"), ("r.py", reward)):
        (here / name).write_text(text)
    (tmp_path / "r.py").write_text(reward)

    def files(place):
        return ["--model", place / "model", "--prompt-file", place / "prompts.txt", "--eval-prompt-file",
                place / "held_out.txt"]

    monkeypatch.chdir(tmp_path)
    assert run(folder, *files(Path("here")), "--reward", f"{tmp_path}/r.py:score", "--resolution", 32,
               "--max-sequence-length", 1, "--dtype", "float32", "--no-gradient-checkpointing", "--steps", 1) == 0
    monkeypatch.chdir("/")
    assert resume(folder, "--steps", 2) == 0   # from another folder
    here.rename(there)
    assert resume(folder) == 2 and "cannot be read" in refusal(capsys.readouterr().err)   # they are not there any more
    assert resume(folder, *files(there), "--steps", 3) == 0 and resume(folder, "--steps", 4) == 0   # nor forgotten
    weights_file = there / "model/transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(weights_file)
    weights["transformer_blocks.3.attn.to_q.weight"][0, 7] += 1
    for path, change in ((there / "prompts.txt", lambda path: path.write_text("a ring\n")),
                         (there / "held_out.txt", lambda path: path.write_text("a ring\n")),
                         (tmp_path / "r.py", lambda path: path.write_text(reward + "\n")),
                         (weights_file, lambda path: save_file(weights, path, {"format": "pt"}))):
        whole = path.read_bytes()
        change(path)
        capsys.readouterr()
        assert resume(folder, "--steps", 5) == 2 and "are not those that" in refusal(capsys.readouterr().err)
        path.write_bytes(whole)
    with mock.patch.object(SD3, "lora_targets", ("attn.to_q",)):   # nor with a model of other layers
        assert resume(folder, "--steps", 5) == 2 and "is not of this model" in refusal(capsys.readouterr().err)


def test_a_folder_has_one_run_and_a_run_one_writer_and_one_set_of_settings(tmp_path, capsys):
    folder = tmp_path / "run"
    # What never finished a step is in nobody's way: a reward that fails at once.
    (tmp_path / "bad.py").write_text("def score(images, prompts, metadata):\n    1 / 0\n")
    assert run(folder, "--reward", f"{tmp_path}/bad.py:score") == 2 and "division by zero" in capsys.readouterr().err
    assert run(folder, "--steps", 1) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for start, sentence in (
            (lambda: run(folder, "--steps", 1), "holds another run; --resume"),
            (lambda: resume(folder, "--beta", 7), "--beta 7.0: the run in"),
            (lambda: resume(folder, "--output-dir", tmp_path / "other"), f"--output-dir {tmp_path}/other: the run in"),
            (lambda: resume(folder, "--eval-prompts", 3), "--eval-prompts 3: the run in"),
            (lambda: resume(tmp_path / "elsewhere"), "elsewhere: there is no run")):
        capsys.readouterr()
        assert start() == 2 and sentence in refusal(capsys.readouterr().err)
    code = "import fcntl; f = open('lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=folder, **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        assert resume(folder, "--steps", 2) == 2 and "another process is writing" in refusal(capsys.readouterr().err)
        other.stdin.close()
    assert run(folder, "--steps", 0, "--lora", folder / "lora") == 2   # a run's pictures are not overwritten
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "config.json").unlink()   # stray checkpoints are not continued
    assert run(folder, "--steps", 2) == 2 and not (folder / "config.json").exists()
    names = {parse_arguments(["--prompt-file", str(ROOT / "shapes/prompts.txt")]).output_dir for _ in range(2)}
    assert all(name.startswith("runs/") and name.endswith(f"-{os.getpid()}") for name in names)   # nobody else's


@pytest.mark.parametrize("stop, code, sentence", [
    ("raise ValueError('no more')", 2, r"the reward '.*stops.py:score' failed.* no more"),
    ("os.kill(os.getpid(), signal.SIGINT)", 130, "interrupted; --resume .*run goes on from its last checkpoint")])
def test_a_run_that_stops_midway_goes_on_from_its_last_checkpoint(tmp_path, capsys, stop, code, sentence):
    # The reward is called for the evaluation before training, then once a step: it stops in the second step.
    (tmp_path / "stops.py").write_text(
        f"import os, pathlib, signal\ncalls = []\ndef score(images, prompts, metadata):\n    calls.append(1)\n"
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
    flags = ["--save-every", 1000, "--eval-every", 1000, "--steps", 30, "--learning-rate", 1e9]
    assert run(tmp_path, *flags) == 2
    assert re.search("not finite: .* wants a new run with a lower --learning-rate$", refusal(capsys.readouterr().err))
    assert not list((tmp_path / "checkpoints").iterdir())   # nothing spoilt is saved


@needs("tensorboard")
def test_every_number_of_the_metrics_and_the_samples_are_in_tensorboard_too(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert run(tmp_path, "--steps", 2, "--tensorboard", "--eval-reward", "jpeg_compressibility") == 0
    events, logged = EventAccumulator(str(tmp_path)).Reload(), set()
    for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
        step, inner = line.pop("step"), [(f"{a}/{b}", v) for a in line if isinstance(line[a], dict)
                                         for b, v in line[a].items()]
        for name, value in [*line.items(), *inner]:
            if type(value) in (int, float):
                logged.add(name)
                assert (step, np.float32(value)) in [(event.step, event.value) for event in events.Scalars(name)]
    assert logged == set(events.Tags()["scalars"]) and events.Tags()["images"] == ["samples"]
    assert {"reward_mean", "eval_score", "eval_judges/jpeg_compressibility"} < logged


@pytest.mark.parametrize("steps, rows, flags", [
    (22, ["a star and a triangle", "a cross and a ring", "a purple square and a pink cross",
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
def test_pictures_are_shown_as_large_as_is_sensible_around_their_captions(size, tile):
    images = [Image.new("RGB", size, (0, 0, 10 * i)) for i in range(4)]
    picture = np.asarray(picture_rows(images, ["a ring", "a star"]))
    assert picture.shape == (2 * tile[1], 3 * tile[0], 3)
    blue = picture[tile[1] // 2::tile[1], 5::tile[0], 2]
    assert blue.tolist() == [[0, 255, 10], [20, 255, 30]]
    assert (picture[:tile[1], tile[0]:2 * tile[0]] < 128).any()   # the caption's letters


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
        for key in ("eval_categories", "eval_judges"):
            assert a.pop(key, {}) == pytest.approx(b.pop(key, {}), rel=1e-3, abs=1e-6)
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
    assert done.stdout.count("standard error over prompts") == 1   # one of them prints
    same_to_round_off(straight, tmp_path / "run")
    ours, theirs = (np.asarray(Image.open(path / "before_after.png")) for path in (straight, tmp_path / "run"))
    assert abs(ours.astype(int) - theirs).mean() < 0.5
    (tmp_path / "run/checkpoints/000004.pt").unlink()   # and one alone goes on from where many were
    assert resume(tmp_path / "run", "--steps", 4) == 0
    same_to_round_off(straight, tmp_path / "run")


@pytest.mark.parametrize("stop, sentence", [
    ("raise ValueError('no more')", r"error: the reward '.*stops.py:score' failed.* no mo"),
    ("os.kill(os.getpid(), signal.SIGKILL)", "Signal 9|SIGKILL")])
def test_what_stops_one_process_stops_all_and_the_run_can_go_on(tmp_path, stop, sentence):
    # The second of two processes stops in its second step.
    (tmp_path / "stops.py").write_text(
        "import os, pathlib, signal\ncalls = []\ndef score(images, prompts, metadata):\n    calls.append(1)\n"
        f"    if len(calls) == 3 and os.environ.get('RANK') == '1':\n        {stop}\n"
        "    return [i.getpixel((9, 9))[0] / 255 for i in images]\n")
    done = run_many(2, tmp_path / "run", "--steps", 3, "--save-every", 1, "--reward", f"{tmp_path}/stops.py:score")
    assert done.returncode != 0 and re.search(sentence, done.stderr), done.stderr
    if "raise" in stop:   # torchrun's own last words say it too, instead of burying it
        assert "no more" in done.stderr.split("Root Cause")[1]
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["000001.pt"]
    assert resume(tmp_path / "run") == 0
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2, 3, 3]


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
    assert "mine.py:tagged" in printed and re.search(r"jpeg_compressibility +before", printed)
    last = metrics_of(tmp_path / "run")[-1]
    assert set(last["eval_judges"]) == {"jpeg_compressibility"} and last["eval_judges"]["jpeg_compressibility"] < 0
    assert set(last["eval_categories"]) <= {row["tag"] for row in GENEVAL}
    # Without training: the base alone, then the trained LoRA compared with it, judged by two rewards.
    def judged(folder, *flags):
        assert run(folder, *common, *held_out, "--steps", 0, "--reward", f"{tmp_path}/mine.py:tagged", "--eval-reward",
                   "jpeg_incompressibility", *flags) == 0
        line, = metrics_of(folder)
        return line["eval_score"], capsys.readouterr().out

    base, alone = judged(tmp_path / "base")
    trained, both = judged(tmp_path / "lora", "--lora", tmp_path / "run/lora")
    assert base != trained and alone.count("score") == both.count("before     after    change") == 2
    assert (tmp_path / "lora/before_after.png").exists()


PUBLISHED = dict(   # what the authors' code runs in its default mode
    dtype="bfloat16", resolution=512, max_sequence_length=128, solver="dpm++2m", num_inference_steps=10,
    guidance_scale=4.5, eval_num_inference_steps=14, group_size=24, groups_per_step=24, timesteps_per_rollout=4,
    updates_per_rollout=1, lora_rank=64, learning_rate=3e-4, beta=100.0, old_decay=0.3, old_decay_ramp=1e-3,
    kl_weight=2e-2, clip_range=1e-2, reference="frozen", reference_guidance_scale=1.0)
RECIPES = [   # what differs in the commands of README's recipes, in their order
    dict(reward="geneval", t_min=0.599, advantage_std="group", rollout_old_after=500, ema_decay=0.974),
    dict(reward="ocr", t_min=0.4, advantage_std="batch", rollout_old_after=200, ema_decay=0.974),
    dict(reward="pickscore", t_min=0.4, advantage_std="batch", rollout_old_after=200, ema_decay=0.949, clip_range=5e-2),
    dict(reward="geneval", guidance_scale=1.0, reference_guidance_scale=4.5, kl_weight=1e-3, clip_range=1e-4),
    dict(reward="geneval", guidance_scale=1.0, reference="old", beta=2000.0, kl_weight=1e-3, clip_range=1e-5)]


def test_the_recipes_of_the_readme_are_the_published_configurations():
    hub = "stabilityai/stable-diffusion-3.5-medium"
    commands = [arguments for _, arguments in readme_commands() if hub in arguments]
    for arguments, differing in zip(commands, RECIPES, strict=True):
        config = dataclasses.asdict(parse_arguments(arguments))
        for name, value in {**PUBLISHED, **differing}.items():
            assert config[name] == value, (arguments, name)
    for model in ([], ["--model", str(MODEL)]):
        embedded = parse_arguments(["--prompt-file", "p.txt", "--eval-prompt-file", "/h.txt", "--device", "cpu",
                                    "--output-dir", "r", *model])
        assert embedded == Config(prompt_file="p.txt", eval_prompt_file="/h.txt", model=str(MODEL),
                                  device="cpu", output_dir="r")


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
    assert held_out == [{"prompt": "a ring"}, {"prompt": "two stars"}] and len(rows) == 1200
    drawn = [row["prompt"] for step in range(len(rows) // config.groups_per_step)
             for row in rows_of_step(rows, step, config)]
    assert drawn.count("a star") == 300 and drawn.count("two red rings") == 100   # an epoch is the file


@pytest.mark.parametrize("reward, good, bad, sentence", [
    ("shapes", "a red circle", "a purple cow", "grammar"), ("ocr", 'it says "fox"', "it says fox", "double quotes"),
    ("geneval", '{"prompt": "a dog", "include": [{"class": "dog", "count": 1}]}', '{"prompt": "a dog"}', "include")])
def test_rows_that_the_reward_cannot_score_are_found_before_anything_is_written(
        reward, good, bad, sentence, judges, tmp_path, capsys):
    suffix = ".jsonl" if good[0] == "{" else ".txt"
    train, held_out = tmp_path / f"train{suffix}", tmp_path / f"held_out{suffix}"
    flags = ["--prompt-file", train, "--eval-prompt-file", held_out, "--eval-reward", "", "--reward",
             f"{reward}={judges[reward]}" if reward in judges else reward]
    for broken, whole in ((train, held_out), (held_out, train)):
        whole.write_text(good + "\n")
        broken.write_text(f"{good}\n\n{bad}\n{good}\n")
        assert run(tmp_path / "run", *flags) == 2
        printed = refusal(capsys.readouterr().err)
        assert f"{broken.name}, line 3: " in printed and sentence in printed
    assert not (tmp_path / "run").exists()


def try_many(check, examples, **strategies):
    """Call check with that many inputs that hypothesis makes up from its strategies."""
    from hypothesis import HealthCheck, given, settings
    how = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    how(given(**strategies)(check))()


@needs("hypothesis")
def test_any_prompt_file_is_read_or_refused_in_one_sentence(embedded, tmp_path):
    from hypothesis import strategies as st
    line = st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode), st.sampled_from(
        [b"a star", b"\xef\xbb\xbfa ring", b"\x00", b"a " * 3000, b'{"prompt": "a star"}', b'{"prompt": ["a"]}',
         b'{"prompt": "\\ud800"}', b"[" * 5000, b"NaN", b"1" * 5000]))

    def check(lines, end, suffix):
        path = tmp_path / f"prompts{suffix}"
        path.write_bytes(end.join(lines))
        try:
            rows = load_prompts(path)
            assert rows and all(row["prompt"].strip() for row in rows)
            embedded.encode([row["prompt"] for row in rows])
        except UserError as error:
            assert str(path) in str(error)

    try_many(check, 200, lines=st.lists(line, max_size=8), end=st.sampled_from([b"\n", b"\r\n", b"\r"]),
             suffix=st.sampled_from([".txt", ".jsonl"]))


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

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)   # as where it is not installed
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
            (["--prompt-file", tmp_path], "cannot be read: "),
            (["--prompt-file", write("bytes.txt", b"a st\xffr\n")], "bytes.txt cannot be read"),
            (["--prompt-file", empty], "empty.txt holds no prompt"),
            (["--prompt-file", single], "--eval-prompt-file is missing"),
            (["--prompt-file", write("long.txt", b"x" * 10 ** 6), "--eval-prompt-file", single, "--reward", "shapes"],
             "long.txt, line 1: "),
            (["--eval-prompt-file", empty], "empty.txt holds no prompt"),
            (["--reward", "pickscor"], "unknown reward 'pickscor'; known: shapes, "),
            (["--reward", "shapes:nan"], "nan"),
            (["--group-size", 1], "--group-size must"),
            (["--device", "abacus"], "--device abacus cannot be used"),
            (["--beta", "nan"], "--beta must"),
            (["--updates-per-rollout", 3], "--updates-per-rollout 3 must divide"),
            (["--resolution", 36], "--resolution 36: this model wants a multiple of 8, at most 64"),
            (["--resolution", 72], "--resolution 72: this model wants a multiple of 8, at most 64"),
            (["--lora", tmp_path], "does not hold this model's LoRA"),
            (["--model", tmp_path / "absent"], "absent cannot be loaded"),
            (["--model", tmp_path / "folder"], "folder cannot be loaded: "),
            (["--model", tmp_path / "other"], "other cannot be loaded: "),
            (["--model", tmp_path / "hollow"], "hollow has no folder vae"),
            (["--model", tmp_path / "no_text_encoder"], "no CLIPTextModelWithProjection: it has no weights for text_m"),
            (["--model", tmp_path / "no_transformer"], "no SD3Transformer2DModel: it has no weights for proj_out"),
            (["--model", tmp_path / "no_tokenizer"], "no_tokenizer has no folder tokenizer")):
        assert run(tmp_path / "run", *flags) == 2, flags
        printed = capsys.readouterr().err
        assert sentence in refusal(printed) and len(refusal(printed)) < 900, (flags, printed)
        assert printed.count("\n") == 1, printed
    assert not (tmp_path / "run").exists()   # nothing is written before everything is checked
    assert run(tmp_path / "board", "--tensorboard") == 2
    assert "--tensorboard does not work" in refusal(capsys.readouterr().err)
    assert main([]) == 2 and "--prompt-file is missing" in refusal(capsys.readouterr().err)
    assert run(tmp_path / "big", "--lora-rank", 10 ** 9) == 1   # terabytes
    printed = refusal(capsys.readouterr().err)
    assert "out of memory: lower --batch-size, " in printed and "big/traceback.txt" in printed
    assert "--resume" not in printed   # as there is no run yet


def test_help_shows_every_flag_with_its_default_and_wrong_ones_end_like_other_mistakes(capsys):
    assert main(["--help"]) == 0 and main(["--no-such-flag"]) == 2
    shown = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        if field.type in (int, float):
            assert re.search(rf"{flag(field.name)} {field.name.upper()} [^[]*\[{field.default}\]", shown), field.name


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
def test_every_command_of_the_readme_runs(sd35, judges, tmp_path, monkeypatch):
    # Each as it stands there and then made short, with small models of the same kind in the place of the hub's.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").symlink_to(ROOT / "shapes")
    for path in itertools.chain(*((f"geneval/{part}_metadata.jsonl", f"ocr/{part}.txt", f"pickscore/{part}.txt")
                                  for part in ("train", "test"))):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        rows = [{"prompt": f'a {name} that says "{name}"', "include": [one(name)]} for name in ("dog", "tv", "cup")]
        lines = [json.dumps(row) if path.endswith("jsonl") else row["prompt"] for row in rows]
        (tmp_path / path).write_text("\n".join(lines))
    assert run(tmp_path / "runs/my-run", "--steps", 1) == 0   # the run that README goes on with
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
    keys = {key for line in (tmp_path / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert not [key for key in sorted(keys) if not re.search(rf'`"?{key}["`]', readme)]
