"""What the method promises, one property a test, in the order of dgpo.py.

    python -m pytest -q test_dgpo.py   # about six minutes on two CPU cores; README says what it needs besides
"""

import contextlib
import dataclasses
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
import socket
import subprocess
import sys
import time
from pathlib import Path

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
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    SwinConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.models.mask2former import modeling_mask2former

from benchmarks import claims, throughput
from dgpo import (
    SD3,
    Config,
    accumulate_gradients,
    add_noise,
    cache_text_ahead,
    clip_error,
    comparison,
    dgpo_loss,
    draw_timesteps,
    evaluate,
    flag,
    group_advantages,
    load_checkpoint,
    load_pipeline,
    load_prompts,
    main,
    ode_sigmas,
    parse_arguments,
    past_clip,
    rollout,
    rows_of_step,
    sample_ode,
    save_checkpoint,
    shift_time,
    summarize,
    update,
)
from rewards import (
    CATEGORIES,
    COLORS,
    RATING_PROMPT,
    UserError,
    box_relations,
    color_texts,
    cut_lines,
    detect_objects,
    edit_distance,
    expected_rating,
    load_detector,
    load_reward,
    object_crops,
    ocr_score,
    parse_prompt,
    read_ctc,
    read_lines,
    score_detections,
    score_geneval,
    text_boxes,
    wanted_text,
)
from rewards import shapes as verify
from shapes.train_base import build_tokenizer, scenes

torch.set_num_threads(2)

ROOT = Path(__file__).resolve().parent
MODEL = ROOT / "shapes/model"
PROMPTS = ["a red circle", "three squares", "a star left of a ring", "a green cross and a blue triangle"]


def seed(number):
    return torch.Generator().manual_seed(number)


def sd3(**settings):
    """The embedded model, freshly loaded, and the settings it was loaded with."""
    config = Config(**{"model": str(MODEL), "device": "cpu", "lora_rank": 4, **settings})
    return SD3(load_pipeline(config.model, config), config), config


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


@pytest.mark.parametrize("solver, order", [("euler", 1), ("dpm++2m", 2)])
def test_solvers_reach_their_order_of_convergence_on_a_gaussian(solver, order):
    # x0 ~ N(mu, s^2): the marginal at sigma is N((1 - sigma) mu, var), and the flow keeps every point's z-score.
    mu, s = 1.5, 0.9

    def velocity(x, sigma):  # E[noise - x0 | x_sigma = x], by linear regression
        var = ((1 - sigma) * s) ** 2 + sigma ** 2
        return -mu + (sigma - (1 - sigma) * s ** 2) / var * (x - (1 - sigma) * mu)

    def exact(sigma):
        return (1 - sigma) * mu + (((1 - sigma) * s) ** 2 + sigma ** 2).sqrt() * z

    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    # Away from the ends, as lambda = log((1 - sigma) / sigma), in which the steps have to be small, is infinite there.
    errors = []
    for steps in (64, 128, 256):
        sigmas = shift_time(torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64), 3.0)
        errors.append((sample_ode(velocity, exact(sigmas[0]), sigmas, solver) - exact(sigmas[-1])).abs().max())
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)
    # Over the whole way, from noise z to data mu + s z, both still arrive.
    whole = sample_ode(velocity, z, shift_time(torch.linspace(1, 0, 513, dtype=torch.float64), 3.0), solver)
    assert (whole - (mu + s * z)).abs().max() < {1: 1e-2, 2: 1e-3}[order]


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.5])
def test_shift_and_sigmas_are_those_of_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    torch.testing.assert_close(shift_time(torch.arange(1000, 0, -1) / 1000, shift), scheduler.sigmas)
    for steps in (1, 2, 10, 40):
        scheduler.set_timesteps(steps)
        torch.testing.assert_close(ode_sigmas(steps, shift), scheduler.sigmas)


def test_dpm_solver_is_that_of_diffusers():
    sigmas, noise = ode_sigmas(10, 3.0), torch.randn(3, 4, generator=seed(1))

    def velocity(x, sigma):
        return torch.tanh(x) * (0.5 + sigma) - 1

    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    scheduler.set_timesteps(10)
    scheduler.sigmas = sigmas  # theirs start at the shifted 0.999; ours at 1, as the Euler scheduler's do
    x = noise
    for t, sigma in zip(scheduler.timesteps, sigmas):
        x = scheduler.step(velocity(x, sigma), t, x).prev_sample
    torch.testing.assert_close(sample_ode(velocity, noise, sigmas, "dpm++2m"), x)


@pytest.mark.parametrize("solver", ["euler", "dpm++2m"])
def test_a_rollout_never_waits_for_the_device(solver):
    # A tensor on the meta device has a shape and no values: looking at one, which is what makes a GPU wait, raises.
    model, config = sd3(device="meta")
    model.texts = {p: [torch.zeros(11, 128), torch.zeros(128)] for p in ["", *PROMPTS]}
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


@pytest.mark.parametrize("beta", [0.1, 10.0, 300.0])
def test_loss_gradient_agrees_with_finite_differences(beta):
    error, ref_error, advantages = loss_inputs()
    assert torch.autograd.gradcheck(lambda e: dgpo_loss(e, ref_error, advantages, beta), error.requires_grad_())


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
    assert torch.equal(past_clip(error, old_error, advantages, c), stops.bool())
    clipped = clip_error(error, old_error, advantages, c)
    assert torch.equal(clipped, error)
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
    model, _ = sd3(reference_decay=0.9)
    base, x = diffusers_pipeline().transformer, torch.randn(4, *model.latent_shape, generator=seed(9))
    with torch.no_grad():
        plain = base(x, *model.embeddings(PROMPTS), 1000 * torch.tensor([0.5, 0.6, 0.8, 1.0]), return_dict=False)[0]
    for velocity in velocities(model, ["current", "old", "ema", "reference", "base"]):
        assert torch.equal(velocity, plain)


def test_training_moves_the_policies_apart_and_leaves_the_base_weights_bit_for_bit():
    model, config = sd3(kl_weight=0.1, reference_decay=1.0)
    policies = ["reference", "current", "old", "ema"]
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
    model, config = sd3(updates_per_rollout=1, old_decay=0.3, ema_decay=0.98, reference_decay=0.9)
    start = [t.detach().clone() for t in model.lora.weights("current")]
    update(model, adamw(model), *update_inputs(model), config, step=0)
    # theta^- <- decay theta^- + (1 - decay) theta; the average for evaluation opens as (1 + k) / (10 + k)
    for policy, decay in (("old", 0.3), ("ema", 2 / 11), ("reference", 0.9)):
        for t, first, new in zip(model.lora.weights(policy), start, model.lora.weights("current")):
            torch.testing.assert_close(t, decay * first + (1 - decay) * new)


def test_the_old_policy_follows_more_slowly_from_update_to_update():
    # The decay is min(old_decay, ramp * updates done), as in the authors' code.
    model, config = sd3(updates_per_rollout=1, old_decay=0.25, old_decay_ramp=0.1)
    for step, decay in enumerate((0.1, 0.2, 0.25, 0.25)):
        before = [t.clone() for t in model.lora.weights("old")]
        update(model, adamw(model), *update_inputs(model), config, step=step)
        for t, old, new in zip(model.lora.weights("old"), before, model.lora.weights("current")):
            torch.testing.assert_close(t, decay * old + (1 - decay) * new)


def test_a_bfloat16_model_keeps_its_lora_and_its_velocities_in_float32():
    model, config = sd3(dtype="bfloat16")
    update(model, adamw(model), *update_inputs(model), config, step=0)
    assert model.transformer.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in model.lora.weights("current"))
    assert all(v.dtype == torch.float32 for v in velocities(model, ["current", "reference"]))


@needs("peft")
def test_exported_lora_draws_the_same_images_in_plain_diffusers(tmp_path):
    model, config = sd3(solver="euler", guidance_scale=3.0)
    randomize(model, "ema", 0.1, 12)
    model.lora.export(tmp_path)
    noise = torch.randn(4, *model.latent_shape, generator=seed(13))
    base, ours = (pixels(rollout(model, PROMPTS, noise, 6, policy, config)[1]) for policy in ("base", "ema"))
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
    torch.testing.assert_close(velocities(other, ["ema"]), velocities(model, ["ema"]))
    for targets, sentence in (("to_q", "which --lora-targets leaves out"),
                              ("to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out,net.2",
                               "give the --lora-targets it was trained with")):
        with pytest.raises(UserError, match=sentence):
            sd3(lora_targets=targets)[0].lora.load(tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"half a file")
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="cannot be read"):
            other.lora.load(folder)


def test_prompts_are_encoded_ahead_and_no_more_of_them_than_wanted():
    config = dict(steps=5, groups_per_step=2, text_cache_size=6, seed=1)
    model, config = sd3(**config)
    rows = [{"prompt": prompt} for prompt in (ROOT / "shapes/prompts.txt").read_text().splitlines()[::40]]
    held_out, rows = rows[:2], rows[2:]

    def prompts(*steps):
        return {row["prompt"] for step in steps for row in rows_of_step(rows, step, config)}

    for step, window in ((0, (0, 1, 2)), (1, (0, 1, 2)), (3, (3, 4)), (4, (3, 4))):   # three steps, and never past 5
        cache_text_ahead(model, rows, held_out, step, config)
        assert set(model.texts) == prompts(*window) | {row["prompt"] for row in held_out}
    # Whatever way an embedding got there, it is the pipeline's.
    prompt = rows_of_step(rows, 4, config)[0]["prompt"]
    tokens, _, pooled, _ = diffusers_pipeline().encode_prompt(prompt, None, None, do_classifier_free_guidance=False,
                                                              max_sequence_length=1)
    for ours, theirs in zip(model.embeddings([prompt, prompt]), (tokens, pooled)):
        torch.testing.assert_close(ours, theirs.repeat(2, *[1] * (theirs.ndim - 1)))


# ------------------------------------------------------------------------------------------------
# ROLLOUT AND UPDATE
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_an_euler_rollout_is_the_pipeline_of_diffusers(guidance_scale):
    # In two batches, which must not show.
    model, config = sd3(solver="euler", guidance_scale=guidance_scale, rollout_batch_size=3)
    noise = torch.randn(4, *model.latent_shape, generator=seed(14))
    x0, ours = rollout(model, PROMPTS, noise, 8, "current", config)
    theirs = diffusers_pipeline()(PROMPTS, num_inference_steps=8, guidance_scale=guidance_scale, latents=noise,
                                  height=32, width=32, max_sequence_length=1).images
    assert x0.shape == noise.shape
    assert abs(pixels(ours) - pixels(theirs)).max() <= 1


@pytest.mark.parametrize("reference_decay", [1.0, 0.9])
def test_micro_batches_of_any_size_give_the_gradient_of_the_whole_batch(reference_decay):
    # Four rows (two groups at two timesteps), G = 5, one further row's worth counted but left out.
    model, config = sd3(clip_range=0.01, kl_weight=0.5, beta=20.0, reference_guidance_scale=2.0,
                        reference_decay=reference_decay)
    randomize(model, "current", 0.05, 15)
    randomize(model, "old", 0.05, 16)
    if reference_decay < 1:
        randomize(model, "reference", 0.05, 18)
    x0, prompts, advantages = update_inputs(model)
    x0, prompts, advantages = x0.repeat(2, 1, 1, 1, 1), prompts * 2, advantages.repeat(2, 1)
    sigma, noise = torch.tensor([0.6, 0.7, 0.8, 0.95]), torch.randn(4, 1, *model.latent_shape, generator=seed(17))

    # The objective in one piece and from its definition.
    x_t, target = add_noise(x0, noise, sigma.view(-1, 1, 1, 1, 1))
    repeated = [prompt for prompt in prompts for _ in range(5)]
    v, v_old, v_ref, v_base = (
        model.velocity(x_t.flatten(0, 1), sigma.repeat_interleave(5), repeated, policy, scale).view_as(x_t)
        for policy, scale in (("current", 1.0), ("old", 1.0), ("reference", 2.0), ("base", 2.0)))
    assert torch.equal(v_ref, v_base) == (reference_decay == 1)
    error, old_error, ref_error = ((u - target).pow(2).mean((2, 3, 4)) for u in (v, v_old, v_ref))
    clipped = clip_error(error, old_error.detach(), advantages, config.clip_range)
    loss, kl = dgpo_loss(clipped, ref_error.detach(), advantages, config.beta), (v - v_base).pow(2).mean()
    weights = model.lora.weights("current")
    whole = torch.cat([g.flatten() for g in torch.autograd.grad((loss + config.kl_weight * kl) * 4 / 5, weights)])

    for train_batch_size in (100, 10, 5, 3, 2, 1):   # all; two groups; one; and parts of one, dividing G or not
        sums = accumulate_gradients(model, x0, prompts, advantages, sigma, noise,
                                    dataclasses.replace(config, train_batch_size=train_batch_size), total_rows=5)
        gradient = torch.cat([t.grad.flatten() for t in weights])
        assert (gradient - whole).norm() < 1e-4 * whole.norm()
        assert 0.1 < sums["clip_fraction"] / 4 < 0.9   # the clip takes part
        assert sums["loss"] / 4 == pytest.approx(loss.item(), rel=1e-4)
        assert sums["kl"] / 4 == pytest.approx(kl.item(), rel=1e-4)
        for t in weights:
            t.grad = None


def test_gradient_checkpointing_and_compiling_leave_the_update_unchanged():
    preset, weights = throughput.PRESETS["tiny"], []
    preset = {**preset, "transformer": {**preset["transformer"], "num_layers": 1}}   # compiling takes its time
    for how in ({}, {"gradient_checkpointing": True}, {"compile": True}):
        config = Config(device="cpu", lora_rank=4, train_batch_size=5, reference_decay=1.0, **how)
        torch.manual_seed(27)
        model = throughput.random_model(preset, config, PROMPTS)
        randomize(model, "current", 0.05, 26)
        inputs = update_inputs(model)
        rollout(model, PROMPTS, inputs[0][0, :4], 2, "current", config)
        update(model, torch.optim.SGD(model.lora.weights("current"), lr=1.0), *inputs, config, step=0)
        weights.append(torch.cat([t.detach().flatten() for t in model.lora.weights("current")]))
        if config.compile:   # all that a run does is compiled by now, whatever the batch size and the policy
            with torch.compiler.set_stance("fail_on_recompile"):
                rollout(model, PROMPTS[:3], inputs[0][0, :3], 2, "ema", config)
                update(model, torch.optim.SGD(model.lora.weights("current"), lr=1.0), *update_inputs(model, size=4),
                       config, step=1)
    torch.testing.assert_close(weights[1], weights[0])
    torch.testing.assert_close(weights[2], weights[0], rtol=1e-3, atol=1e-5)


def test_groups_without_signal_add_no_gradient_to_the_loss():
    # So leaving their rows out, with `total_rows` still counting them, is exact.
    model, config = sd3(kl_weight=0.0)
    randomize(model, "current", 0.05, 18)
    x0, prompts, advantages = update_inputs(model)
    advantages[1] = 0
    sigma, noise, gradients = torch.tensor([0.6, 0.9]), torch.randn(2, 1, *model.latent_shape, generator=seed(19)), []
    for rows in (2, 1):
        accumulate_gradients(model, x0[:rows], prompts[:rows], advantages[:rows], sigma[:rows], noise[:rows], config,
                             total_rows=2)
        gradients.append(torch.cat([t.grad.flatten() for t in model.lora.weights("current")]))
        for t in model.lora.weights("current"):
            t.grad = None
    assert gradients[0].norm() > 0
    torch.testing.assert_close(*gradients)


def test_groups_without_signal_are_not_trained_on():
    # With the KL term on, their images would matter if they were.
    results = []
    for other in (0.0, 1.0):
        model, config = sd3(kl_weight=1.0)
        randomize(model, "current", 0.05, 20)
        x0, prompts, advantages = update_inputs(model)
        advantages[1], x0[1] = 0, x0[1] + other
        metrics = update(model, adamw(model), x0, prompts, advantages, config, step=0)
        results.append((metrics, model.lora.weights("current")))
    assert results[0][0] == results[1][0] and metrics["gradient_norm"] > 0
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))
    before = [t.detach().clone() for t in model.lora.weights("current")]
    update(model, adamw(model), x0, prompts, torch.zeros_like(advantages), config, step=1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.lora.weights("current")))


def test_an_update_whose_gradient_is_not_finite_is_left_out_and_counted():
    model, config = sd3()
    randomize(model, "current", 0.05, 63)
    before, optimizer = [t.detach().clone() for t in model.lora.weights("current")], adamw(model)
    x0, prompts, advantages = update_inputs(model)
    spoilt = x0.clone()
    spoilt[0, 0, 0, 0, 0] = math.inf
    metrics = update(model, optimizer, spoilt, prompts, advantages, config, step=0)
    assert metrics["skipped_updates"] == config.updates_per_rollout and math.isfinite(metrics["loss"])
    assert all(torch.equal(a, b) for a, b in zip(before, model.lora.weights("current")))
    assert update(model, optimizer, x0, prompts, advantages, config, step=1)["skipped_updates"] == 0
    assert not any(torch.equal(a, b) for a, b in zip(before, model.lora.weights("current")))


def test_updates_favour_the_preferred_images():
    # The sign of it all, on fresh noise: the error of preferred images falls relative to that of rejected ones.
    model, config = sd3(clip_range=0.0, kl_weight=0.0, reference_decay=1.0)
    x0, prompts, advantages = update_inputs(model)
    optimizer = adamw(model)
    for step in range(5):
        update(model, optimizer, x0, prompts, advantages, config, step)
    noise = torch.randn(x0[:, :1].shape, generator=seed(21))
    x_t, target = add_noise(x0, noise, 0.8)
    repeated = [prompt for prompt in prompts for _ in range(5)]
    with torch.no_grad():
        error, ref_error = ((model.velocity(x_t.flatten(0, 1), 0.8, repeated, policy).view_as(x_t) - target)
                            .pow(2).mean((2, 3, 4)) for policy in ("current", "reference"))
    assert ((advantages * (error - ref_error)).mean(1) < -1e-3).all()


def test_the_learning_rate_falls_with_the_square_root_of_the_step():
    model, config = sd3(learning_rate=1e-3, learning_rate_decay=200)
    optimizer = adamw(model)
    for step, rate in ((0, 1e-3), (600, 0.5e-3)):
        update(model, optimizer, *update_inputs(model), config, step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_evaluation_always_starts_from_the_same_noise():
    model, config = sd3(eval_images=2, eval_num_inference_steps=3)
    rewards = {name: load_reward(name) for name in ("shapes", "jpeg_compressibility")}
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    (first, images), (second, again) = (evaluate(model, rewards, rows, config, "ema") for _ in "ab")
    for name in rewards:
        assert first[name].shape == (4, 2) and torch.equal(first[name], second[name])
    assert (pixels(images) == pixels(again)).all()


def test_evaluation_counts_right_pictures_and_takes_its_error_over_prompts():
    rewards = torch.tensor([[1.0, 1.0], [1.0, 0.5], [0.0, 0.5], [0.9, 0.9]])   # [N, K]
    rows = [{"prompt": prompt} for prompt in ("a star", "a ring", "two rings", "a star and a ring")]
    summary = summarize(rewards, rows, strict=True)
    assert summary["reward"] == pytest.approx(5.8 / 8)
    assert summary["score"] == pytest.approx(3 / 8)
    # The shares of right pictures, 1, 1/2, 0 and 0, spread with a variance of 11/48 about their mean.
    assert summary["error"] == pytest.approx((11 / 48 / 4) ** 0.5)
    assert summary["categories"] == pytest.approx({"single_object": 0.75, "counting": 0.0, "two_object": 0.0})
    assert summarize(rewards, rows, strict=False)["score"] == pytest.approx(5.8 / 8)
    # GenEval's files name the category themselves.
    rows = [{"prompt": "a dog", "tag": "colors"}] * 4
    assert summarize(rewards, rows, strict=True)["categories"] == pytest.approx({"colors": 3 / 8})


def test_a_table_compares_the_same_prompts_and_notices_a_fall():
    rows = [{"prompt": prompt} for prompt in ("a star", "a ring", "two rings", "three rings")]
    before = torch.tensor([[5.0, 5.2], [4.0, 4.2], [6.0, 6.2], [1.0, 1.2]])   # prompts differ much, noises little
    for after, fell in ((before - 0.1, True), (before + 0.1, False),
                        (before + torch.tensor([[0.1], [-0.2], [0.1], [-0.2]]), False)):
        table, noticed = comparison("aesthetic", before, after, rows, strict=False)
        assert noticed == fell, table
    assert re.search(r"aesthetic +before +after +change\nsingle_object +4.600 +4.550 +-0.050\n"
                     r"counting +3.600 +3.550 +-0.050\nall +4.100 +4.050 +-0.050\n", table)
    strict, _ = comparison("shapes", torch.tensor([[1.0, 0.5]] * 4), torch.tensor([[1.0, 1.0]] * 4), rows, strict=True)
    assert re.search(r"strict accuracy, shapes .*\n(.*\n)*all +0.500 +1.000 +\+0.500\n.*\nmean reward +0.750", strict)


# ------------------------------------------------------------------------------------------------
# REWARDS AND PROMPTS
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt, category, objects, relation", [
    ("a star", "single_object", [("star", None)], None),
    ("a picture of a circle and a cross", "two_object", [("circle", None), ("cross", None)], None),
    ("three crosses", "counting", [("cross", None)] * 3, None),
    ("one purple ring", "counting", [("ring", "purple")], None),
    ("a view of an orange square", "colors", [("square", "orange")], None),
    ("a star above a ring", "position", [("star", None), ("ring", None)], "above"),
    ("a red star left of a pink ring", "position", [("star", "red"), ("ring", "pink")], "left of"),
    ("a black star and a blue ring", "color_attr", [("star", "black"), ("ring", "blue")], None)])
def test_prompts_are_read_as_the_grammar_says(prompt, category, objects, relation):
    assert parse_prompt(prompt) == {"category": category, "objects": objects, "relation": relation}


@pytest.mark.parametrize("prompt", ["", "a dog", "a red", "five circles", "a star above", "a a star",
                                    "a star and a ring and a cross"])
def test_prompts_outside_the_grammar_are_refused(prompt):
    with pytest.raises(ValueError, match="grammar"):
        parse_prompt(prompt)


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
    assert load_prompts(path) == GENEVAL   # each prompt once, its fields beside it
    path = tmp_path / "ocr.txt"
    path.write_bytes('\ufeffA sign that says "Café 24"\r\n\r\nA poster with "SALE"\r\n'.encode())
    assert load_prompts(path) == [{"prompt": 'A sign that says "Café 24"'}, {"prompt": 'A poster with "SALE"'}]


@pytest.mark.parametrize("line, sentence", [
    ('{"prompt": "a', "line 2: no JSON"), ('["a star"]', 'line 2: not an object with a text as its "prompt"'),
    ('{"text": "a star"}', "line 2: not an object"), ('{"prompt": 3}', "line 2: not an object"),
    ('{"prompt": " "}', "line 2: not an object")])
def test_a_faulty_line_of_a_jsonl_file_is_named(tmp_path, line, sentence):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a star"}\n' + line + "\n")
    with pytest.raises(UserError, match=sentence):
        load_prompts(tmp_path / "p.jsonl")


def test_prompt_files_are_disjoint_and_have_every_category():
    train, heldout = ([row["prompt"] for row in load_prompts(ROOT / "shapes" / name)]
                      for name in ("prompts.txt", "heldout.txt"))
    assert not set(train) & set(heldout)
    for prompts in (train, heldout):
        assert {parse_prompt(prompt)["category"] for prompt in prompts} == set(CATEGORIES)


def test_verifier_accepts_right_pictures_and_refuses_wrong_ones_in_every_category():
    for noise, wanted in ((None, 1.0), (dict.fromkeys(CATEGORIES, 1.0), 0.0)):
        images, prompts = scenes(1200, seed=22, noise=noise)
        right = (verify([Image.fromarray(image) for image in images], prompts, None) == 1).float()
        for category in CATEGORIES:
            rows = [i for i, prompt in enumerate(prompts) if parse_prompt(prompt)["category"] == category]
            assert len(rows) > 50
            assert (right[rows] == wanted).float().mean() >= 0.98, (category, wanted)


def test_verifier_scores_a_batch_as_it_scores_each_picture_alone():
    images, prompts = scenes(60, seed=23, noise=dict.fromkeys(CATEGORIES, 0.5))
    images[::2] = 255 - images[::2]   # dark and light backgrounds side by side: nothing may be shared over the batch
    images = [Image.fromarray(image) for image in images]
    alone = [verify([image], [prompt], None) for image, prompt in zip(images, prompts)]
    assert torch.equal(verify(images, prompts, None), torch.cat(alone))


def test_verifier_grades_a_half_right_picture_by_hand():
    found = [("circle", "red", 8.0, 20.0), ("star", "blue", 24.0, 21.0)]

    def score(prompt):
        return score_detections(parse_prompt(prompt), found)

    assert score("a red circle and a blue star") == 1.0
    assert score("a circle left of a star") == 1.0
    assert score("a red circle and a pink star") == pytest.approx((0.75 + 1) / 2)          # one colour in four marks
    assert score("a circle") == pytest.approx((1 + 0) / 2)                                 # one object too many
    assert score("four circles") == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert score("a circle right of a star") == pytest.approx((1 + 1 + 0) / 3)
    assert score("a ring") == 0.0


IMAGES = [Image.new("RGB", (32, 32), (level, level, level)) for level in (0, 100, 200)]


def test_a_weighted_sum_of_rewards_and_a_reward_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def level(images, prompts, metadata):\n    return [i.getpixel((0, 0))[0] for i in images]\n")
    scores = load_reward(f"{path}:level")(IMAGES, PROMPTS[:3], [{}] * 3)
    assert scores.dtype == torch.float32 and scores.tolist() == [0, 100, 200]
    total = load_reward(f"{path}:level:0.5,jpeg_compressibility:-2,jpeg_incompressibility")
    sizes = load_reward("jpeg_incompressibility")(IMAGES, PROMPTS[:3], [{}] * 3)
    torch.testing.assert_close(total(IMAGES, PROMPTS[:3], [{}] * 3), 0.5 * scores + 3 * sizes)
    # Strict accuracy has a meaning only for a verifier on its own.
    assert load_reward("shapes").strict and not load_reward("shapes:0.5").strict and not total.strict


@pytest.mark.parametrize("body, sentence", [
    ("return [0.0]", r"returned shape \(1,\) for 3 images"),
    ("return 0.0", r"returned shape \(\) for 3 images"),
    ("return [0.0, float('nan'), 0.0]", "not finite for 'three squares'"),
    ("return ['good', 'bad', 'bad']", "raised .*'a red circle'"),
    ("1 / 0", "raised ZeroDivisionError: division by zero .*'a red circle'")])
def test_a_faulty_reward_is_named_with_a_prompt(tmp_path, body, sentence):
    path = tmp_path / "faulty.py"
    path.write_text(f"def score(images, prompts, metadata):\n    {body}\n")
    with pytest.raises(UserError, match=f"faulty.py:score.*{sentence}"):
        load_reward(f"{path}:score")(IMAGES, PROMPTS[:3], [{}] * 3)


def test_a_reward_that_cannot_be_loaded_is_named_at_once(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_module_anywhere\n")
    (tmp_path / "empty.py").write_text("")
    for spec, sentence in (("shape", "unknown reward 'shape'; known: shapes, jpeg_compressibility, jpeg_incompress"),
                           ("shapes:1.0,pickscor:2", "unknown reward 'pickscor'"), ("", "unknown reward ''"),
                           ("jpeg_compressibility=models/jpeg", "has no model, so it takes no '=models/jpeg'"),
                           (f"{tmp_path}/absent.py:f", "absent.py does not exist"),
                           (f"{tmp_path}/broken.py:f", "cannot be imported: ModuleNotFoundError"),
                           (f"{tmp_path}/empty.py:f", "has no function 'f'")):
        with pytest.raises(UserError, match=re.escape(sentence)):
            load_reward(spec)


def test_jpeg_rewards_are_file_sizes_of_opposite_sign(tmp_path):
    noisy = Image.fromarray(np.random.default_rng(24).integers(0, 256, (32, 32, 3), np.uint8))
    noisy.save(tmp_path / "noisy.jpg", quality=95)
    small, large = load_reward("jpeg_incompressibility")([IMAGES[0], noisy], PROMPTS[:2], [{}] * 2).tolist()
    assert large == pytest.approx((tmp_path / "noisy.jpg").stat().st_size / 1000) and small < large
    assert load_reward("jpeg_compressibility")([noisy], PROMPTS[:1], [{}]).item() == -large


def test_every_prompt_is_drawn_once_before_any_is_drawn_again():
    config, rows = Config(groups_per_step=3), [{"prompt": f"prompt {i}"} for i in range(10)]
    drawn = [row["prompt"] for step in range(10) for row in rows_of_step(rows, step, config)]
    epochs = [drawn[i:i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == [row["prompt"] for row in rows] for epoch in epochs) and epochs[0] != epochs[1]


# ------------------------------------------------------------------------------------------------
# REWARDS THAT ARE MODELS: random ones of the real classes, saved in the real format
# ------------------------------------------------------------------------------------------------


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


def save_clip(folder, number):
    """A random CLIP of the real classes with its processor: 32x32 images, 16 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL / "tokenizer")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        projection_dim=12, vision_config={**tower, "image_size": 32, "patch_size": 8},
        text_config={**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 16,
                     "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id})
    torch.manual_seed(number)
    model = CLIPModel(config)
    for parameter in model.parameters():   # as drawn, all images look alike to it
        if parameter.ndim > 1:
            parameter.data *= 10
    model.save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder, 51)
    return folder


def clip_cosines(folder, images, prompts):
    """Written out with transformers alone, one pair at a time."""
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    values = []
    for image, prompt in zip(images, prompts):
        inputs = processor(text=[prompt], images=[image], return_tensors="pt", truncation=True, max_length=16)
        with torch.no_grad():
            output = model(**inputs)
        values.append(F.cosine_similarity(output.image_embeds, output.text_embeds))
    return torch.cat(values)


def test_clip_rewards_are_cosines_of_the_models_own_embeddings(clip_folder):
    images = pictures(20)   # more than one internal batch
    prompts = (PROMPTS * 5)[:19] + ["a red circle and " * 20 + "a star"]   # of several lengths, one cut off
    cosines = clip_cosines(clip_folder, images, prompts)
    scores = {name: check_batching(load_reward(f"{name}={clip_folder}"), images, prompts, [{}] * 20)
              for name in ("clipscore", "pickscore")}
    torch.testing.assert_close(scores["clipscore"], 100 * cosines.clamp(min=0), rtol=1e-4, atol=1e-4)
    scale = CLIPModel.from_pretrained(clip_folder).logit_scale.exp().item()
    torch.testing.assert_close(scores["pickscore"], scale * cosines, rtol=1e-4, atol=1e-4)
    assert cosines.std() > 0.05 and (cosines < 0).any() and (cosines > 0).any()


def test_a_model_reward_has_a_path_and_a_weight_and_joins_a_sum(clip_folder):
    images, prompts = pictures(3), PROMPTS[:3]
    clip, pick = f"clipscore={clip_folder}", f"pickscore={clip_folder}"
    clip, pick, both = (load_reward(spec)(images, prompts, [{}] * 3) for spec in (clip, pick, f"{clip}:-0.5, {pick}"))
    torch.testing.assert_close(both, pick - 0.5 * clip)
    assert not load_reward(f"clipscore={clip_folder}").strict


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_aesthetic_score_is_the_linear_head_on_the_normalised_embedding(clip_folder, tmp_path, form):
    folder = tmp_path / "aesthetic"
    shutil.copytree(clip_folder, folder)
    generator, sizes = seed(52), (12, 10, 4, 1)
    state = {}
    for i, (inputs, outputs) in zip((0, 2, 4), zip(sizes, sizes[1:])):   # dropout stands between them, as published
        state[f"layers.{i}.weight"] = torch.randn(outputs, inputs, generator=generator)
        state[f"layers.{i}.bias"] = torch.randn(outputs, generator=generator)
    if form == "pth":
        torch.save(state, folder / "aesthetic-model.pth")
    else:
        save_file(state, folder / "aesthetic-model.safetensors")
    images = pictures(5)
    scores = check_batching(load_reward(f"aesthetic={folder}"), images, [""] * 5, [{}] * 5)
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    with torch.no_grad():
        hidden = model.get_image_features(processor(images=images, return_tensors="pt").pixel_values).pooler_output
    hidden = hidden / hidden.norm(dim=1, keepdim=True)
    for i in (0, 2, 4):
        hidden = hidden @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    torch.testing.assert_close(scores, hidden[:, 0], rtol=1e-4, atol=1e-4)


def test_a_model_that_cannot_be_loaded_is_named_with_what_to_do(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)   # as without a network, at once
    partial = tmp_path / "partial"
    shutil.copytree(clip_folder, partial)
    weights = load_file(partial / "model.safetensors")
    save_file({key: value for key, value in weights.items() if key != "visual_projection.weight"},
              partial / "model.safetensors", {"format": "pt"})
    small = tmp_path / "small"
    shutil.copytree(clip_folder, small)
    torch.save({"0.weight": torch.ones(1, 768), "0.bias": torch.ones(1)}, small / "aesthetic-model.pth")
    (tmp_path / "hollow").mkdir()
    for spec, sentence in (
            ("pickscore", "cannot be loaded from yuvalkirstain/PickScore_v1 and laion/CLIP-ViT-H"),
            ("pickscore", "(give --reward pickscore=FOLDER with the models' files)"),
            ("clipscore=someone/clip:2", "'clipscore' cannot be loaded from someone/clip: "),
            (f"clipscore={tmp_path}/hollow", "'clipscore' cannot be loaded from"),
            (f"clipscore={partial}", "partial is no CLIPModel: it has no weights for visual_projection.weight"),
            (f"aesthetic={clip_folder}", "holds no head of the aesthetic predictor"),
            (f"aesthetic={small}", "takes embeddings of size 768, the CLIP model")):
        with pytest.raises(UserError, match=re.escape(sentence)) as caught:
            load_reward(spec)
        assert "\n" not in str(caught.value)


def test_naming_the_rewards_imports_no_models():
    code = "import sys, rewards; assert 'transformers' not in sys.modules and 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# Boxes of 20x20 by their place, as (x0, y0, x1, y1).
LEFT, RIGHT, TOP, MIDDLE = (0, 40, 20, 60), (80, 40, 100, 60), (40, 0, 60, 20), (40, 40, 60, 60)


@pytest.mark.parametrize("box, other, relations", [
    (LEFT, RIGHT, {"left of"}), (RIGHT, LEFT, {"right of"}), (TOP, MIDDLE, {"above"}), (MIDDLE, TOP, {"below"}),
    ((0, 0, 20, 20), MIDDLE, {"left of", "above"}),                 # on the diagonal, both hold
    (MIDDLE, MIDDLE, set()), (MIDDLE, (41, 42, 59, 58), set()),     # one over the other: neither
    ((44, 40, 64, 60), MIDDLE, set()),                              # 4 apart, as much as 0.1 (20 + 20) forgives
    ((48.5, 40, 68.5, 60), MIDDLE, {"right of"}),                   # 4.5 of 8.5 are left, more than half
    ((48, 40, 68, 60), MIDDLE, set()),                              # 4 of 8 are left, not more than half
    ((70, 0, 90, 20), MIDDLE, {"right of", "above"}), ((80, 25, 100, 45), MIDDLE, {"right of"})])
def test_relations_of_boxes_follow_the_published_geometry(box, other, relations):
    assert box_relations(box, other) == relations


def one(name, **fields):
    return {"class": name, "count": 1, **fields}


def found(name, confidence=0.95, box=MIDDLE, color=None):
    return name, confidence, box, color


DOG, CAT = found("dog", box=LEFT), found("cat", box=RIGHT)
CUPS = {"tag": "counting", "include": [{"class": "cup", "count": 3}], "exclude": [{"class": "cup", "count": 4}]}
TWO = {"tag": "two_object", "include": [one("dog"), one("cat")]}
RED = {"tag": "colors", "include": [one("dog", color="red")]}
BOTH = {"tag": "color_attr", "include": [one("dog", color="red"), one("cat", color="blue")]}
CAT_RIGHT = {"tag": "position", "include": [one("dog"), one("cat", position=["right of", 0])]}
NO_CAT = {"include": [one("dog")], "exclude": [one("cat")]}


@pytest.mark.parametrize("metadata, detections, partial, accuracy", [
    # single_object: the confidence must be above 0.3; further classes do no harm; a second dog does, to the exact score
    ({"tag": "single_object", "include": [one("dog")]}, [DOG, CAT], 1, 1),
    ({"tag": "single_object", "include": [one("dog")]}, [], 0, 0),
    ({"tag": "single_object", "include": [one("dog")]}, [found("dog", 0.3)], 0, 0),
    ({"tag": "single_object", "include": [one("dog")]}, [found("dog", 0.301)], 1, 1),
    ({"tag": "single_object", "include": [one("dog")]}, [DOG, DOG], 0, 1),
    ({"tag": "single_object", "include": [one("dog")]}, [DOG] * 40, -14, 1),          # 16 of them count
    ({"tag": "two_object", "include": [one("dog"), one("dog")]}, [DOG], 1, 1),        # a repeated clause asks no more
    (TWO, [DOG, CAT], 1, 1), (TWO, [DOG], 1 / 2, 0), (TWO, [DOG, CAT, CAT, CAT], (1 - 1) / 2, 1),
    # counting: the confidence must be above 0.9, and one too many is wrong in both
    (CUPS, [found("cup")] * 3, 1, 1), (CUPS, [found("cup")] * 2, 2 / 3, 0), (CUPS, [found("cup")] * 4, 2 / 3, 0),
    (CUPS, [found("cup")] * 3 + [found("cup", 0.9)], 1, 1), (CUPS, [found("cup", 0.9)] * 3, 0, 0),
    # colors
    (RED, [found("dog", color="red")], 1, 1), (RED, [found("dog", color="pink")], 1 / 2, 0), (RED, [], 0, 0),
    (RED, [found("dog", 0.5, color="pink"), found("dog", 0.6, color="red")], 0, 1),   # the surest dog is red
    (RED, [found("dog", 0.6, color="pink"), found("dog", 0.5, color="red")], 0, 0),
    ({"include": [{"class": "dog", "count": 2, "color": "red"}]},
     [found("dog", color="red"), found("dog", color="blue")], 3 / 4, 0),
    # color_attr
    (BOTH, [found("dog", color="red"), found("cat", color="blue")], 1, 1),
    (BOTH, [found("dog", color="blue"), found("cat", color="red")], 1 / 2, 0),
    (BOTH, [found("dog", color="red")], 1 / 2, 0),
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
        assert score_geneval(metadata, detected) == pytest.approx(partial)
        assert (score_geneval(metadata, detected) == 1.0) == (partial == 1)   # to the last bit: strict accuracy asks
        assert score_geneval(metadata, detected, exact=False) == accuracy


def full_mask2former(source):
    """The class the hub's checkpoint was saved from, of a config or a folder; its loss asks for scipy to be built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_mask2former, "requires_backends", lambda *_: None)
        build = Mask2FormerForUniversalSegmentation
        return build(source) if isinstance(source, Mask2FormerConfig) else build.from_pretrained(source)


@pytest.fixture(scope="module")
def geneval_folder(tmp_path_factory):
    """A random Mask2Former with Swin, sure of what it sees, and a random CLIP: `geneval=FOLDER` as documented."""
    folder = tmp_path_factory.mktemp("geneval")
    save_clip(folder / "clip", 53)
    backbone = SwinConfig(image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
                          out_features=["stage1", "stage2", "stage3", "stage4"])
    labels = dict(enumerate(["dog", "mouse", "tvmonitor", "cup"]))
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=6,
        id2label=labels, label2id={name: i for i, name in labels.items()})
    torch.manual_seed(54)
    model = full_mask2former(config)
    model.class_predictor.weight.data *= 20
    model.save_pretrained(folder / "detector")
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder / "detector")
    return folder


def test_geneval_runs_on_its_detector_and_clip(geneval_folder):
    images = pictures(9) + pictures(8, (56, 40), 55)   # of two sizes
    classes = ("dog", "computer mouse", "tv", "cup")    # two of them under GenEval's own names
    metadata = [{"include": [one(classes[i % 4], color=COLORS[i % 10]), one(classes[(i + 1) % 4])]} for i in range(17)]
    reward = load_reward(f"geneval={geneval_folder}")
    scores = check_batching(reward, images, [""] * 17, metadata)
    assert scores.unique().numel() > 3 and scores.max() <= 1 and reward.strict
    accuracy = load_reward(f"geneval_accuracy={geneval_folder}")(images, [""] * 17, metadata)
    assert set(accuracy.tolist()) <= {0.0, 1.0} and (accuracy >= (scores == 1)).all()


def test_geneval_sees_the_detectors_masks_and_names_colours_with_clip(geneval_folder):
    image = pictures(1, (48, 40))[0]
    detector = load_detector(geneval_folder / "detector", "cpu")
    objects = detect_objects(detector, [image])[0]
    assert len(objects) > 2
    for label, confidence, box, mask in objects:
        ys, xs = np.nonzero(mask)
        assert mask.shape == (40, 48) and box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        assert 0.15 < confidence <= 1 and label in ("dog", "computer mouse", "tv", "cup")
    # The surest query and label of the model as transformers has it, written out.
    inputs = detector[1](images=[image], return_tensors="pt")
    with torch.no_grad():
        output = full_mask2former(geneval_folder / "detector")(**inputs)
    assert inputs.pixel_mask.all()
    best, pairs = 0, 0
    for query, probabilities in enumerate(output.class_queries_logits[0].softmax(-1)[:, :-1]):
        mask = output.masks_queries_logits[:, query:query + 1]
        mask = F.interpolate(F.interpolate(mask, inputs.pixel_values.shape[-2:], mode="bilinear"), (40, 48),
                             mode="bilinear")
        best = max(best, (probabilities.max() * mask[mask > 0].sigmoid().mean()).item())
        pairs += (probabilities > 0.3).sum().item() * bool((mask > 0).any())
    assert max(confidence for _, confidence, _, _ in objects) == pytest.approx(best, rel=1e-5)
    assert len(objects) == pairs
    # A crop is the box, the object as it is and grey around it.
    _, _, (x0, y0, x1, y1), mask = objects[0]
    crop = np.asarray(object_crops(image, objects)[0])
    expected = np.where(mask[..., None], np.asarray(image), 0x99)[y0:y1, x0:x1]
    assert np.array_equal(crop, expected)
    # Its colour is the one whose three captions are nearest to the crop of the surest object of the class.
    label = max(objects, key=lambda d: d[1])[0]
    assert color_texts(label)[3:6] == [f"a photo of a orange {label}", f"a photo of a orange-colored {label}",
                                       "a photo of a orange object"]
    model, processor = (c.from_pretrained(geneval_folder / "clip") for c in (CLIPModel, CLIPProcessor))
    surest = object_crops(image, [max(objects, key=lambda d: d[1])])
    with torch.no_grad():
        texts = processor(text=color_texts(label), return_tensors="pt", padding=True, truncation=True, max_length=16)
        captions = F.normalize(model.get_text_features(**texts).pooler_output, dim=-1).view(10, 3, -1).mean(1)
        crop = model.get_image_features(**processor(images=surest, return_tensors="pt")).pooler_output
    color = COLORS[F.cosine_similarity(captions, crop).argmax()]
    reward = load_reward(f"geneval_accuracy={geneval_folder}")
    for named in COLORS:
        assert reward([image], ["?"], [{"include": [one(label, color=named)]}]).item() == (named == color)


def test_geneval_refuses_prompts_it_cannot_judge(geneval_folder, tmp_path):
    reward = load_reward(f"geneval={geneval_folder}")
    for fields, sentence in (({}, "'a dog' has no field 'include'"),
                             ({"include": [one("dragon")]}, "'a dog' asks for {'class': 'dragon'"),
                             ({"include": [one("dog", color="mauve")]}, "a class or colour that is not known")):
        with pytest.raises(UserError, match=re.escape(sentence)):
            reward(pictures(1), ["a dog"], [fields])
    with pytest.raises(UserError, match=re.escape("with the subfolders detector (the files of facebook/mask2former")):
        load_reward(f"geneval={tmp_path}")


@pytest.mark.parametrize("a, b, distance", [
    ("", "", 0), ("abc", "", 3), ("", "abc", 3), ("abc", "abc", 0), ("kitten", "sitting", 3), ("flaw", "lawn", 2),
    ("ab", "ba", 2), ("a" * 30, "b" * 20, 30)])
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@pytest.mark.parametrize("read, wanted, score", [
    ("Hello", "hello", 1), ("HEL LO", "Hel lo", 1), ("say hello there", "hello", 1),   # contained: perfect
    ("hallo", "hello", 0.8), ("hell", "hello", 0.8), ("", "hello", 0), ("something else", "hello", 0),
    ("helo world", "hello", 0)])                                                       # 6 edits, of 5 letters: capped
def test_ocr_score_is_the_authors(read, wanted, score):
    assert ocr_score(read, wanted) == pytest.approx(score)


@pytest.mark.parametrize("prompt, fields, text", [
    ('A sign that says "Hello World".', {}, "Hello World"), ("A cup with “Good day” on it", {}, "Good day"),
    ('"One" above "Two"', {}, "One"), ('a “sign” with "it\'s"', {}, "sign"), ('"One"', {"text": "Two"}, "Two"),
    ("no quotes", {"text": "Two"}, "Two"), ("don't and won't", {}, None), ('an empty ""', {}, None),
    ('a " "', {}, None), ('5" nail', {}, None)])
def test_the_wanted_text_stands_in_double_quotes_or_in_the_metadata(prompt, fields, text):
    if text is None:
        with pytest.raises(UserError, match=re.escape(f"ocr: the prompt {prompt!r} has no text in double quotes")):
            wanted_text(prompt, fields)
    else:
        assert wanted_text(prompt, fields) == text


def test_text_boxes_are_grown_components_in_reading_order():
    def boxes(*regions, size=(100, 200)):
        probability = torch.full(size, 0.1)
        for (x0, y0, x1, y1), value in regions:
            probability[y0:y1, x0:x1] = value
        return text_boxes(probability)

    # 40x10: grown by 1.5 * 400 / 100 = 6 on every side, and cut at the edge of the map.
    assert boxes(((50, 30, 90, 40), 0.9)) == [(44, 24, 96, 46)]
    assert boxes(((0, 0, 40, 10), 0.9)) == [(0, 0, 46, 16)]
    assert boxes() == []
    assert boxes(((50, 30, 90, 40), 0.59)) == [] and boxes(((50, 30, 90, 32), 0.9)) == []   # unsure; too thin
    # Three words in a line that is not quite level, then one below: from left to right, then down.
    words = [(140, 10, 160, 20), (60, 12, 100, 22), (5, 8, 25, 18), (60, 60, 100, 70)]
    order = boxes(*((word, 0.8) for word in words))
    assert [round(x0) for x0, _, _, _ in order] == [0, 54, 135, 54] and order[3][1] > 50
    # A wide region joined at a corner is one line.
    assert len(boxes(((10, 10, 40, 20), 0.8), ((40, 20, 70, 30), 0.8))) == 1


def test_ctc_drops_blanks_and_repeats_and_what_it_is_not_sure_of():
    def read(indices, confidence=0.9):
        probabilities = torch.full((len(indices), 4), (1 - confidence) / 3)
        probabilities[range(len(indices)), indices] = confidence
        return read_ctc(probabilities, ["blank", "a", "b", " "])

    assert read([1, 1, 0, 1, 2, 2, 3, 0, 2]) == "aab b" and read([0, 0]) == "" and read([2]) == "b"
    assert read([1, 2], 0.51) == "ab" and read([1, 2], 0.49) == ""


CHARACTERS = ["blank", *"abcdef", " "]


@pytest.fixture(scope="module")
def ocr_folder(tmp_path_factory):
    """Random PP-OCRv5 models: `ocr=FOLDER` as documented."""
    folder = tmp_path_factory.mktemp("ocr")
    backbone = {"model_type": "hgnet_v2", "stem_channels": [3, 8, 8], "stage_in_channels": [8, 16, 16, 16],
                "stage_mid_channels": [8] * 4, "stage_out_channels": [16] * 4, "stage_num_blocks": [1] * 4,
                "stage_numb_of_layers": [1] * 4, "embedding_size": 8, "hidden_sizes": [16] * 4, "depths": [1] * 4,
                "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    kernels = {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}
    for length, name in ((7, "long"), (5, "mid"), (3, "short")):
        for part, shape in (("vertical_long_to_small", (length, 1)), ("horizontal_small_to_long", (1, length)),
                            ("symmetric_conv_long", (length, length))):
            key = f"{part}_{name}ratio" if "symmetric" in part else f"{part}_conv_{name}ratio"
            kernels[key] = [list(shape), [1, 1], [side // 2 for side in shape]]
    detector = transformers.PPOCRV5ServerDetConfig(
        backbone_config=backbone, neck_out_channels=16, intraclass_block_config=kernels,
        scale_factor_list=[1, 2, 4, 8], kernel_list=[3, 2, 2])
    backbone = {**backbone, "stage_downsample": [True] * 4, "stem_strides": [2, 1, 1, 1, 1],
                "stage_downsample_strides": [[2, 1], [1, 2], [2, 1], [2, 1]]}
    recognizer = transformers.PPOCRV5ServerRecConfig(
        backbone_config=backbone, hidden_size=16, num_attention_heads=2, depth=1,
        head_out_channels=8)
    torch.manual_seed(56)
    detector = transformers.AutoModelForObjectDetection.from_config(detector).eval().requires_grad_(False)
    recognizer = transformers.AutoModelForTextRecognition.from_config(recognizer).eval().requires_grad_(False)
    for parameter in (*detector.parameters(), *recognizer.parameters()):   # as drawn, all images look alike to them
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
    # Text here and there, and every character somewhere.
    detector.head.binarize_head.conv_final.bias[:] = -5
    detector.head.local_refinement_module.convolution_final.bias[:] = -5
    output = recognizer.head.head
    output.bias -= recognizer(torch.randn(4, 3, 48, 320)).last_hidden_state.log().mean((0, 1))
    output.weight *= 300
    output.bias *= 300
    detector.save_pretrained(folder / "detector")
    recognizer.save_pretrained(folder / "recognizer")
    settings = {"character_list": CHARACTERS, "image_processor_type": "PPOCRV5ServerRecImageProcessor"}
    (folder / "recognizer" / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def ocr_models(folder):
    detector = transformers.AutoModelForObjectDetection.from_pretrained(folder / "detector")
    recognizer = transformers.AutoModelForTextRecognition.from_pretrained(folder / "recognizer")
    return detector.requires_grad_(False).eval(), recognizer.requires_grad_(False).eval()


def test_ocr_runs_on_its_detector_and_recogniser(ocr_folder):
    images = pictures(6, (160, 96), 57) + pictures(2, (96, 96), 58)
    detector, recognizer = ocr_models(ocr_folder)
    texts = []
    for image in images:
        crops = cut_lines(detector, [image])[0]
        texts.append("".join(read_lines(recognizer, CHARACTERS, [crop])[0] for crop in crops))
    assert len(set(texts)) > 4
    # Asked for what is read, for half of it with another letter, and for something else.
    wanted = [(text, text[len(text) // 2:] + "f", "zzz")[i % 3] for i, text in enumerate(texts)]
    prompts = [f'It says "{text}"' for text in wanted]
    scores = check_batching(load_reward(f"ocr={ocr_folder}"), images, prompts, [{}] * 8)
    torch.testing.assert_close(scores, torch.tensor([ocr_score(*pair) for pair in zip(texts, wanted)]))
    assert (scores[::3] == 1).all() and (scores[2::3] == 0).all() and scores.unique().numel() > 2


def test_ocr_models_see_what_they_were_trained_on(ocr_folder):
    detector, recognizer = ocr_models(ocr_folder)
    seen = []
    for model in (detector, recognizer):
        model.register_forward_pre_hook(lambda _, args, inputs: seen.append(inputs["pixel_values"]), with_kwargs=True)
    cut_lines(detector, [Image.new("RGB", (100, 50), (255, 0, 0))])
    cut_lines(detector, [Image.new("RGB", (1920, 480))])
    lines = cut_lines(detector, pictures(8, (150, 90), 61))
    # In steps of 32, and at most 960.
    assert [pixels.shape[2:] for pixels in seen] == [(64, 96), (256, 960), (96, 160)]
    upright = 0
    for of_image, probability in zip(lines, detector(pixel_values=seen[2]).last_hidden_state[:, 0]):
        for line, box in zip(of_image, text_boxes(probability), strict=True):
            x0, y0, x1, y1 = (round(edge * scale) for edge, scale in zip(box, 2 * (150 / 160, 90 / 96)))
            turned = y1 - y0 >= 1.5 * (x1 - x0)   # text that runs up
            assert line.size == ((y1 - y0, x1 - x0) if turned else (x1 - x0, y1 - y0))
            upright += turned
    assert 0 < upright < sum(map(len, lines))
    # Blue, green, red, with ImageNet's numbers for red, green, blue.
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor([-0.485 / 0.229, -0.456 / 0.224, 0.594 / 0.225]))
    seen.clear()
    white = [Image.new("RGB", size, (255, 255, 255)) for size in ((100, 24), (350, 48), (100, 48))]
    read_lines(recognizer, CHARACTERS, white)
    assert [pixels.shape for pixels in seen] == [(2, 3, 48, 320), (1, 3, 48, 640)]
    widths = [(pixels[i] == 1).all(1).all(0).sum().item() for pixels, i in ((seen[0], 0), (seen[1], 0), (seen[0], 1))]
    assert widths == [200, 350, 100] and (seen[0][0, :, :, 200:] == 0).all()


def test_expected_rating_worked_by_hand():
    logits = torch.tensor([[0, 0, 0, 0, 0], [-50, -50, -50, -50, 50], [50, -50, -50, -50, -50], [0, -50, -50, 0, -50],
                           [math.log(8), 0, -50, math.log(1), -50]])
    torch.testing.assert_close(expected_rating(logits), torch.tensor([3, 5, 1, 2.5, (8 + 2 + 4) / 10]))


@pytest.fixture(scope="module")
def vlm_folder(tmp_path_factory):
    """A random Qwen2.5-VL, the architecture of the default judge, with a tokenizer of letters and its chat template."""
    folder = tmp_path_factory.mktemp("vlm")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
               "<|video_pad|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *map(chr, range(32, 127)), "\n"])}
    letters = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    letters.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token=special[0], eos_token=special[2],
                                        additional_special_tokens=special[1:])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{% for part in m.content %}{% if part.type == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}")
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024).save_pretrained(folder)
    config = Qwen2_5_VLConfig(
        text_config={"vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
                     "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": 2,
                     "pad_token_id": 0, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]}},
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
                       "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]},
        image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4)
    torch.manual_seed(59)
    model = Qwen2_5_VLForConditionalGeneration(config)
    for parameter in model.parameters():   # as drawn, all images look alike to it
        if parameter.ndim > 1:
            parameter.data *= 10
    model.save_pretrained(folder)
    return folder


def test_vlm_score_is_the_expected_rating_at_the_first_token_of_the_answer(vlm_folder):
    images = pictures(9) + pictures(9, (32, 56), 60)
    prompts = ["a red circle", "a star " * 9, "x", 'a {brace} and a "quote"'] * 4 + ["a ring"] * 2
    scores = check_batching(load_reward(f"vlm={vlm_folder}"), images, prompts, [{}] * 18)
    assert scores.min() >= 1 and scores.max() <= 5 and scores.std() > 0.05
    # Written out for one image with the model's own forward pass.
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(vlm_folder)
    tokenizer = AutoTokenizer.from_pretrained(vlm_folder)
    pixels = Qwen2VLImageProcessor.from_pretrained(vlm_folder)(images=images[3:4], return_tensors="pt")
    seen = "<|image_pad|>" * (int(pixels.image_grid_thw.prod()) // 4)
    question = RATING_PROMPT.replace("{prompt}", 'a {brace} and a "quote"')
    tokens = tokenizer(f"<|im_start|>user<|vision_start|>{seen}<|vision_end|>{question}<|im_end|><|im_start|>assistant",
                       return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(input_ids=tokens, mm_token_type_ids=(tokens == 5).long(), **pixels).logits[0, -1]
    chances = logits[tokenizer.convert_tokens_to_ids(list("12345"))].softmax(-1)
    assert scores[3].item() == pytest.approx(sum(i * p.item() for i, p in enumerate(chances, 1)), rel=1e-4)


def test_vlm_needs_a_token_for_every_rating(vlm_folder, tmp_path):
    folder = tmp_path / "letters"
    shutil.copytree(vlm_folder, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    del content["model"]["vocab"]["4"], content["model"]["vocab"]["5"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="letters has no tokens of their own for the ratings 1 to 5"):
        load_reward(f"vlm={folder}")


# ------------------------------------------------------------------------------------------------
# RUNS: files, resuming, training
# ------------------------------------------------------------------------------------------------

TINY = ("--reward shapes --lora-rank 4 --groups-per-step 2 --group-size 3 --num-inference-steps 2 "
        "--timesteps-per-rollout 2 --updates-per-rollout 2 --eval-prompts 2 --eval-images 2 "
        "--eval-num-inference-steps 2").split()


def run(folder, *flags):
    """main() on the embedded job made tiny; returns the exit code."""
    return main(["--model", str(MODEL), "--prompt-file", str(ROOT / "shapes/prompts.txt"), "--device", "cpu",
                 "--output-dir", str(folder), *TINY, *map(str, flags)])


def metrics_of(folder):
    """The lines of metrics.jsonl without the times, which alone may differ between two runs."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in lines]


def test_a_run_writes_every_promised_file(tmp_path):
    assert run(tmp_path / "run", "--steps", 2, "--eval-every", 1, "--group-size", 4) == 0
    files = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert files == {"config.json", "metrics.jsonl", "samples/000000.png", "samples/000001.png", "samples/000002.png",
                     "before_after.png", "reward.png", "checkpoints/000002.safetensors",
                     "lora/pytorch_lora_weights.safetensors"}
    for name in files:
        if name.endswith(".png"):
            Image.open(tmp_path / "run" / name).load()
    assert json.loads((tmp_path / "run/config.json").read_text())["group_size"] == 4
    assert [(line["step"], "evaluation" in line) for line in metrics_of(tmp_path / "run")] == [
        (0, True), (1, False), (1, True), (2, False), (2, True)]


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path):
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    # Every policy takes part: rollouts from the old one, and a moving reference.
    flags = ["--eval-every", 2, "--save-every", 2, "--rollout-old-after", 2, "--reference-decay", 0.9,
             "--reward", "jpeg_incompressibility"]   # a reward that never ties, so that every step trains
    assert run(straight, "--steps", 4, *flags) == 0
    assert run(halves, "--steps", 2, *flags) == 0
    with open(halves / "metrics.jsonl", "a") as file:   # a killed run has logged more than it has saved
        file.write('{"step": 3}\n{"st')
    assert run(halves, "--steps", 4, *flags, "--resume") == 0
    assert metrics_of(straight) == metrics_of(halves)
    for name in ("lora/pytorch_lora_weights.safetensors", "checkpoints/000004.safetensors"):
        a, b = load_file(straight / name), load_file(halves / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    # With nothing left to do, resuming compares the same two policies again.
    assert run(halves, "--steps", 4, *flags, "--resume") == 0
    for name in ("before_after.png", "lora/pytorch_lora_weights.safetensors"):
        assert (straight / name).read_bytes() == (halves / name).read_bytes(), name
    assert metrics_of(straight) == metrics_of(halves)


def test_a_run_killed_at_any_moment_goes_on_as_if_nothing_had_happened(tmp_path):
    # SIGKILL, wherever it strikes; benchmarks/ would do this for hours, here it is done a few times.
    command = [sys.executable, ROOT / "dgpo.py", "--model", MODEL, "--prompt-file", ROOT / "shapes/prompts.txt",
               "--device", "cpu", *TINY, "--eval-every", "2", "--save-every", "1", "--steps", "16",
               "--reward", "jpeg_incompressibility"]
    subprocess.run([*command, "--output-dir", tmp_path / "calm"], check=True, capture_output=True)
    metrics, killed, moments = tmp_path / "killed/metrics.jsonl", 0, np.random.default_rng(64)

    def written():
        return metrics.stat().st_size if metrics.exists() else 0

    while True:
        before, resume = written(), ["--resume"] if metrics.exists() else []
        process = subprocess.Popen([*command, "--output-dir", tmp_path / "killed", *resume], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        if killed < 3:
            while process.poll() is None and written() <= before:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.5))
            process.kill()
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
        killed += 1
    assert killed > 0
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "calm")
    for name in ("lora/pytorch_lora_weights.safetensors", "before_after.png"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()


def test_a_full_disk_ends_a_run_in_one_sentence_and_harms_nothing(tmp_path, capsys):
    # The system is told to refuse files over 100 kB, which stops a checkpoint in the middle as a full disk does.
    flags = ["--reward", "jpeg_incompressibility", "--save-every", 1]
    assert run(tmp_path / "run", *flags, "--steps", 1) == 0
    saved = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert run(tmp_path / "run", *flags, "--steps", 2, "--resume") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "writing to" in refusal(capsys.readouterr().err)
    assert saved == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors*")} and len(saved) == 2
    assert run(tmp_path / "run", *flags, "--steps", 2, "--resume") == 0


@pytest.mark.parametrize("damage", ["cut off", "a bit flipped"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, capsys, damage):
    flags = ["--eval-every", 2, "--save-every", 1, "--reward", "jpeg_incompressibility"]
    assert run(tmp_path / "calm", *flags, "--steps", 3) == 0
    assert run(tmp_path / "run", *flags, "--steps", 3, "--keep-checkpoints", 2) == 0
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["000002.safetensors", "000003.safetensors"]
    path = tmp_path / "run/checkpoints/000003.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1   # in a tensor
    path.write_bytes(content[:-100] if damage == "cut off" else content)
    capsys.readouterr()
    assert run(tmp_path / "run", *flags, "--steps", 3, "--resume") == 0
    assert "000003.safetensors cannot be read" in capsys.readouterr().err
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "calm")
    ours, calm = load_file(path), load_file(tmp_path / "calm/checkpoints/000003.safetensors")
    assert ours.keys() == calm.keys() and all(torch.equal(ours[key], calm[key]) for key in ours)


def test_a_run_goes_on_wherever_its_model_and_prompts_lie_but_not_with_others(tmp_path, capsys):
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(MODEL, here / "model")
    (here / "prompts.txt").write_text("a red circle\ntwo squares\n")
    (here / "held_out.txt").write_text("a star\n")

    def go(folder, *flags):
        files = ["--model", folder / "model", "--prompt-file", folder / "prompts.txt", "--eval-prompt-file",
                 folder / "held_out.txt"]
        return run(tmp_path / "run", *files, "--resolution", 32, "--max-sequence-length", 1, *flags)

    assert go(here, "--steps", 1) == 0
    here.rename(there)
    assert go(there, "--steps", 2, "--resume") == 0
    weights_file = there / "model/transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(weights_file)
    weights["transformer_blocks.3.attn.to_q.weight"][0, 7] += 1
    for path, name, change in ((there / "prompts.txt", "--prompt-file", lambda path: path.write_text("a ring\n")),
                               (there / "held_out.txt", "--eval-prompt-file", lambda path: path.write_text("a ring\n")),
                               (weights_file, "--model", lambda path: save_file(weights, path, {"format": "pt"}))):
        whole = path.read_bytes()
        change(path)
        capsys.readouterr()
        assert go(there, "--steps", 3, "--resume") == 2
        assert re.search(f"{name} .* does not hold what the run in .* began with", refusal(capsys.readouterr().err))
        path.write_bytes(whole)
    assert go(there, "--steps", 3, "--resume") == 0


def test_a_run_is_not_overwritten_and_not_resumed_with_other_settings(tmp_path, capsys):
    assert run(tmp_path, "--steps", 1) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for flags, sentence in (([], "holds another run; give --resume"),
                            (["--resume", "--beta", 7], "--beta is 7.0, but the run in"),
                            (["--resume", "--seed", 1], "--seed is 1, but the run in")):
        capsys.readouterr()
        assert run(tmp_path, "--steps", 1, *flags) == 2
        assert sentence in refusal(capsys.readouterr().err)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "checkpoints/000001.safetensors").write_bytes(b"half a file")
    assert run(tmp_path, "--steps", 2, "--resume") == 2
    printed = capsys.readouterr().err
    assert "000001.safetensors cannot be read" in printed and "none of the checkpoints" in refusal(printed)
    assert run(tmp_path / "elsewhere", "--resume") == 2
    assert "there is no run in" in refusal(capsys.readouterr().err)


@pytest.mark.parametrize("stop, code, steps, sentence", [
    ("raise ValueError('no more')", 2, [0, 1], r"the reward '.*stops.py:score' raised ValueError: no more .*: '\w"),
    ("os.kill(os.getpid(), signal.SIGINT)", 130, [0, 1, 2], "stopped after step 2; the run is saved in"),
    ("os.kill(os.getpid(), signal.SIGTERM)", 143, [0, 1, 2], "stopped after step 2; the run is saved in")])
def test_a_run_that_stops_midway_is_saved_and_can_go_on(tmp_path, capsys, stop, code, steps, sentence):
    # The reward is called for the evaluation before training, then once a step: it stops in the second step.
    path, calm = tmp_path / "stops.py", "def score(images, prompts, metadata):\n    return [len(p) for p in prompts]\n"
    path.write_text("import os, signal\ncalls = []\ndef score(images, prompts, metadata):\n    calls.append(1)\n"
                    f"    if len(calls) == 3:\n        {stop}\n"
                    "    return [i.getpixel((9, 9))[0] / 255 for i in images]\n")
    flags = ["--steps", 3, "--reward", f"{path}:score"]
    assert run(tmp_path / "run", *flags) == code
    printed = capsys.readouterr().err
    assert re.search(sentence, printed.splitlines()[-1]) and "Traceback" not in printed
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == steps
    assert (tmp_path / "run/lora/pytorch_lora_weights.safetensors").exists()
    path.write_text(calm)
    assert run(tmp_path / "run", *flags, "--resume") == 0
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2, 3, 3]


def test_a_run_that_blows_up_ends_with_a_sentence_and_its_checkpoint(tmp_path, capsys):
    flags = ["--reward", "jpeg_incompressibility", "--save-every", 1, "--eval-every", 1000]
    assert run(tmp_path, *flags, "--steps", 1) == 0
    whole = (tmp_path / "checkpoints/000001.safetensors").read_bytes()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "learning_rate": 1e9}))
    assert run(tmp_path, *flags, "--steps", 30, "--save-every", 1000, "--learning-rate", 1e9, "--resume") == 2
    assert re.search("not finite.*--resume goes on", refusal(capsys.readouterr().err))
    assert (tmp_path / "checkpoints/000001.safetensors").read_bytes() == whole


@needs("tensorboard")
def test_every_number_of_the_metrics_is_in_tensorboard_too(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert run(tmp_path, "--steps", 2, "--log-with", "tensorboard", "--eval-reward", "jpeg_compressibility") == 0
    events, logged = EventAccumulator(str(tmp_path)).Reload(), set()
    for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
        step, inner = line.pop("step"), [(f"{a}/{b}", v) for a in line if isinstance(line[a], dict)
                                         for b, v in line[a].items()]
        for name, value in [*line.items(), *inner]:
            if type(value) in (int, float):
                logged.add(name)
                assert (step, np.float32(value)) in [(event.step, event.value) for event in events.Scalars(name)]
    assert logged == set(events.Tags()["scalars"])
    assert {"reward_mean", "eval_score", "eval_judges/jpeg_compressibility"} < logged


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_asked_for_before_anything_is_written(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)   # what Python does for a package that is not there
    assert run(tmp_path / "run", "--log-with", name) == 2
    assert f"--log-with {name} is not installed: pip install {name}" in refusal(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_second_signal_ends_a_run_at_once(tmp_path):
    path = tmp_path / "stops.py"
    path.write_text("import os, signal\ncalls = []\ndef score(images, prompts, metadata):\n    calls.append(1)\n"
                    "    for _ in range(2 * (len(calls) == 2)):\n        os.kill(os.getpid(), signal.SIGTERM)\n"
                    "    return [0.0] * len(images)\n")
    done = subprocess.run([sys.executable, ROOT / "dgpo.py", "--model", MODEL, "--prompt-file",
                           ROOT / "shapes/prompts.txt", "--device", "cpu", "--output-dir", tmp_path / "run", *TINY,
                           "--reward", f"{path}:score"], capture_output=True, text=True)
    assert done.returncode == 143 and "stopping when this step is done" in done.stderr
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0]
    assert not any((tmp_path / "run/checkpoints").iterdir())


def test_training_raises_the_reward(tmp_path):
    # The defaults on four prompts that the base model often gets wrong; every step draws all four.
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a star and a triangle\nfour red squares\na purple square left of a pink cross\n"
                       "an orange cross and a black triangle\n")
    steps, window = 24, 6
    defaults = Config()
    assert run(tmp_path / "run", "--prompt-file", prompts, "--eval-prompt-file", prompts, "--steps", steps,
               "--groups-per-step", 4, "--group-size", defaults.group_size, "--num-inference-steps", 6,
               "--timesteps-per-rollout", defaults.timesteps_per_rollout, "--updates-per-rollout",
               defaults.updates_per_rollout, "--lora-rank", defaults.lora_rank) == 0
    rewards = np.array([line["reward_mean"] for line in metrics_of(tmp_path / "run") if "evaluation" not in line])
    first, last = rewards[:window], rewards[-window:]
    standard_error = ((first.var(ddof=1) + last.var(ddof=1)) / window) ** 0.5
    assert last.mean() - first.mean() > 3 * standard_error


# ------------------------------------------------------------------------------------------------
# MANY PROCESSES
# ------------------------------------------------------------------------------------------------


def run_many(count, folder, *flags):
    """The same run as `run`'s by `count` processes, as typed; returns the finished torchrun."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
         ROOT / "dgpo.py", "--model", MODEL, "--prompt-file", ROOT / "shapes/prompts.txt", "--device", "cpu",
         "--output-dir", folder, *TINY, *map(str, flags)], capture_output=True, text=True, timeout=300)


def same_to_round_off(folder, other):
    """Compare all lines of two runs' metrics and the LoRAs they end with."""
    lines, others = metrics_of(folder), metrics_of(other)
    assert len(lines) == len(others)
    for a, b in zip(lines, others):
        assert a.pop("eval_categories", {}) == pytest.approx(b.pop("eval_categories", {}), rel=1e-3, abs=1e-6)
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
             "--eval-every", 2, "--advantage-std", "batch", "--rollout-old-after", 2, "--text-cache-size", 6]
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
    assert {p.name for p in straight.rglob("*")} == {p.name for p in (tmp_path / "run").rglob("*")}
    ours, theirs = (np.asarray(Image.open(path / "before_after.png")) for path in (straight, tmp_path / "run"))
    assert abs(ours.astype(int) - theirs).mean() < 0.1


def test_a_run_resumes_with_another_number_of_processes(alone, tmp_path):
    straight, flags = alone
    assert run_many(2, tmp_path / "run", *flags, "--steps", 2).returncode == 0
    assert run(tmp_path / "run", *flags, "--steps", 4, "--resume") == 0
    same_to_round_off(straight, tmp_path / "run")


@pytest.mark.parametrize("stop, codes, steps, saved, sentence", [
    ("raise ValueError('no more')", {"2"}, [0, 1], 1, r"error: the reward '.*stops.py:score' raised ValueError: no mo"),
    ("os.kill(os.getppid(), signal.SIGTERM)", set(), [0, 1, 2], 2, "stopped after step 2; the run is saved in"),
    ("os.kill(os.getpid(), signal.SIGKILL)", {"-9", "1", "-15"}, [0, 1], 1, "another process of this job has ended")])
def test_what_stops_one_process_stops_all_and_the_run_can_go_on(tmp_path, stop, codes, steps, saved, sentence):
    # The second of two processes stops in its second step, by itself or (its parent) by a signal to torchrun.
    path, calm = tmp_path / "stops.py", "def score(images, prompts, metadata):\n    return [len(p) for p in prompts]\n"
    path.write_text("import os, signal\ncalls = []\ndef score(images, prompts, metadata):\n    calls.append(1)\n"
                    f"    if len(calls) == 3 and os.environ['RANK'] == '1':\n        {stop}\n"
                    "    return [i.getpixel((9, 9))[0] / 255 for i in images]\n")
    flags = ["--steps", 3, "--save-every", 1, "--reward", f"{path}:score"]
    start = time.monotonic()
    done = run_many(2, tmp_path / "run", *flags)
    assert done.returncode != 0 and time.monotonic() - start < 60
    assert set(re.findall(r"exitcode +: (-?\d+)", done.stderr)) <= codes, done.stderr
    assert len(re.findall(sentence, done.stderr)) == 1, done.stderr
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == steps
    assert max(path.stem for path in (tmp_path / "run/checkpoints").iterdir()) == f"{saved:06d}"
    path.write_text(calm)
    assert run(tmp_path / "run", *flags, "--resume") == 0
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2, 3, 3]


def test_processes_that_do_not_fit_together_are_refused_in_one_sentence(tmp_path):
    # Started by hand, as two machines with different commands would be.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    base = [sys.executable, ROOT / "dgpo.py", "--model", MODEL, "--prompt-file", ROOT / "shapes/prompts.txt"]
    environment = {**os.environ, "WORLD_SIZE": "2"}
    lone = subprocess.run(base, capture_output=True, text=True, env=environment)
    assert lone.returncode == 2 and "start them with torchrun" in refusal(lone.stderr)
    pair = [subprocess.Popen([*base, "--device", "cpu", "--output-dir", tmp_path / "run", "--seed", str(rank)],
                             stderr=subprocess.PIPE, text=True, env={
                                 **environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port,
                                 "MASTER_ADDR": "127.0.0.1"}) for rank in range(2)]
    printed = [process.communicate(timeout=120)[1] for process in pair]
    assert [process.returncode for process in pair] == [2, 2]
    assert "--seed is not the same on all processes: 0, 1" in refusal(printed[0]) and printed[1] == ""
    assert not (tmp_path / "run").exists()


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
    common = ["--model", sd35, "--prompt-file", prompts, "--dtype", "bfloat16", "--guidance-scale", 4.5,
              "--max-sequence-length", 30, "--resolution", 24, "--rollout-batch-size", 4]
    assert run(tmp_path / "run", *common, "--steps", 2, "--reward", f"{tmp_path}/mine.py:tagged", "--eval-reward",
               "jpeg_compressibility", "--reference-guidance-scale", 2, "--gradient-checkpointing",
               "--train-batch-size", 2, "--text-cache-size", 2, "--rollout-old-after", 1, "--learning-rate", 0.1) == 0
    printed = capsys.readouterr().out
    assert "mine.py:tagged" in printed and re.search(r"jpeg_compressibility +before", printed)
    last = metrics_of(tmp_path / "run")[-1]
    assert set(last["eval_judges"]) == {"jpeg_compressibility"} and last["eval_judges"]["jpeg_compressibility"] < 0
    assert set(last["eval_categories"]) <= {row["tag"] for row in GENEVAL}
    # With no file of held-out prompts, config.json names those that were put aside.
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert len(config["held_out"]) == 1 and config["held_out"][0] in prompts.read_text()

    # The trained LoRA against the base, judged by two rewards on all prompts of the file.
    capsys.readouterr()
    assert run(tmp_path / "scores", *common, "--evaluate", "--lora", tmp_path / "run/lora", "--eval-prompts", 6,
               "--reward", f"jpeg_incompressibility,{tmp_path}/mine.py:tagged") == 0
    table = json.loads((tmp_path / "scores/evaluation.json").read_text())["rewards"]
    assert list(table) == ["jpeg_incompressibility", f"{tmp_path}/mine.py:tagged"]
    for scores in table.values():
        assert set(scores) == {"base", "lora"} and set(scores["base"]) == {"reward", "score", "error", "categories"}
        assert scores["base"]["score"] != scores["lora"]["score"]
    assert (tmp_path / "scores/before_after.png").exists()
    # Without a LoRA, the base alone; without a T5, zeros in its place, so other images.
    assert run(tmp_path / "no-t5", *common, "--evaluate", "--no-t5", "--eval-prompts", 6, "--reward",
               "jpeg_incompressibility") == 0
    without = json.loads((tmp_path / "no-t5/evaluation.json").read_text())["rewards"]["jpeg_incompressibility"]
    assert set(without) == {"base"} and without["base"] != table["jpeg_incompressibility"]["base"]


@pytest.fixture(scope="module")
def judges(clip_folder, geneval_folder, ocr_folder, vlm_folder, tmp_path_factory):
    """Every reward that is a model, with the folder of a small one."""
    aesthetic = tmp_path_factory.mktemp("judges") / "aesthetic"
    shutil.copytree(clip_folder, aesthetic)
    save_file({"layers.0.weight": torch.randn(1, 12, generator=seed(62)), "layers.0.bias": torch.zeros(1)},
              aesthetic / "aesthetic-model.safetensors")
    return {"geneval": geneval_folder, "geneval_accuracy": geneval_folder, "pickscore": clip_folder,
            "clipscore": clip_folder, "aesthetic": aesthetic, "ocr": ocr_folder, "vlm": vlm_folder}


def test_every_model_reward_runs_inside_the_command(sd35, judges, tmp_path, capsys):
    specs = [f"{name}={folder}" for name, folder in judges.items()]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"tag": "two_object", "include": [one("dog"), one(name)],
                                           "prompt": f'a dog and a {name} that says "{name}"'}) + "\n"
                               for name in ("tv", "cup")))
    common = ["--model", sd35, "--prompt-file", prompts, "--max-sequence-length", 30, "--dtype", "float32",
              "--resolution", 32]
    assert run(tmp_path / "scores", *common, "--evaluate", "--reward", ",".join(specs)) == 0
    table = json.loads((tmp_path / "scores/evaluation.json").read_text())["rewards"]
    assert list(table) == specs
    assert set(table[specs[0]]["base"]["categories"]) == {"two_object"}
    # And as what is trained on and what is watched.
    assert run(tmp_path / "run", *common, "--eval-prompt-file", prompts, "--steps", 1, "--reward",
               f"{specs[5]}:0.5,{specs[2]}", "--eval-reward", ",".join(specs)) == 0
    assert list(metrics_of(tmp_path / "run")[-1]["eval_judges"]) == specs
    # Prompts that a reward cannot judge are named.
    prompts.write_text('{"prompt": "a dog"}\n')
    for spec, sentence in ((specs[0], "'a dog' has no field 'include'"), (specs[5], "'a dog' has no text in double")):
        capsys.readouterr()
        assert run(tmp_path / "refused", *common, "--evaluate", "--reward", spec) == 2
        assert sentence in refusal(capsys.readouterr().err)


# ------------------------------------------------------------------------------------------------
# THE COMMAND LINE
# ------------------------------------------------------------------------------------------------


def refusal(stderr):
    """The one sentence a failed command ends with, after its progress bars if it had begun."""
    assert "Traceback" not in stderr and stderr.count("dgpo.py: error: ") == 1 and stderr.endswith("\n")
    sentence = stderr.splitlines()[-1]
    assert sentence.startswith("dgpo.py: error: ")
    return sentence


def test_running_out_of_memory_is_answered_with_the_flags_that_help(tmp_path, capsys):
    assert run(tmp_path, "--lora-rank", 10 ** 9) == 1   # terabytes
    assert "out of memory: lower --rollout-batch-size (now 256), " in refusal(capsys.readouterr().err)


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
            rows = load_prompts(path, embedded)
            assert rows and all(row["prompt"].strip() for row in rows)
            assert len({row["prompt"] for row in rows}) == len(rows)
        except UserError as error:
            assert str(path) in str(error)

    try_many(check, 400, lines=st.lists(line, max_size=8), end=st.sampled_from([b"\n", b"\r\n", b"\r"]),
             suffix=st.sampled_from([".txt", ".jsonl"]))


@needs("hypothesis")
def test_a_checkpoint_or_a_lora_with_any_damage_is_read_whole_or_refused_in_one_sentence(embedded, tmp_path):
    from hypothesis import strategies as st
    model, optimizer, path = embedded, adamw(embedded), tmp_path / "pytorch_lora_weights.safetensors"

    def check(data):
        for write, read in ((lambda: save_checkpoint(path, model, optimizer, 3, [[0, 0.5]], 7, 1.0),
                             lambda: load_checkpoint(path, model, optimizer)),
                            (lambda: model.lora.export(tmp_path), lambda: model.lora.load(tmp_path))):
            write()
            content = bytearray(path.read_bytes())
            if data.draw(st.booleans()):
                content = content[:data.draw(st.integers(0, len(content) - 1))]
            for place in data.draw(st.lists(st.integers(0, 3000), max_size=4)):   # in the header, mostly
                if place < len(content):
                    content[place] = data.draw(st.integers(0, 255))
            path.write_bytes(content)
            with contextlib.suppress(UserError):
                progress = read()
                assert progress in (None, {"step": 3, "curve": [[0, 0.5]], "metrics_bytes": 7, "seconds": 1.0})

    try_many(check, 150, data=st.data())


@needs("hypothesis")
def test_any_flags_are_taken_or_refused():
    from hypothesis import strategies as st
    name = st.sampled_from([field.name for field in dataclasses.fields(Config)])
    value = st.one_of(st.text(max_size=20), st.integers().map(str), st.floats().map(str), st.sampled_from(
        ["nan", "-inf", "1e400", "-1", "0", "1e9", "", "None", "\u0663", "9" * 5000]))

    def check(pairs):
        arguments = ["--prompt-file", "p.txt", *(f"{flag(name)}={value}" for name, value in pairs)]
        try:
            parse_arguments(arguments).check()
        except UserError as error:
            assert str(error).startswith("--")
        except SystemExit as error:   # argparse's own refusal
            assert error.code == 2

    try_many(check, 400, pairs=st.lists(st.tuples(name, value), max_size=4))


def test_another_model_gets_the_papers_settings_unless_told_otherwise():
    embedded = parse_arguments(["--prompt-file", "p.txt", "--model", str(MODEL)])
    assert embedded == Config(prompt_file="p.txt", model=str(MODEL))
    paper = parse_arguments(["--prompt-file", "p.txt", "--model", "someone/sd3.5", "--group-size", "8"])
    assert (paper.groups_per_step, paper.guidance_scale, paper.reward, paper.group_size) == (24, 4.5, "pickscore", 8)
    paper.check()


def test_mistakes_on_the_command_line_are_answered_in_one_sentence(tmp_path, capsys):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    empty, single = write("empty.txt", b"\n  \n"), write("single.txt", b"a star\n")
    long = write("long.txt", b"a star\n\na red star left of a blue ring and a green cross\na ring\n")
    write("other/model_index.json", b'{"_class_name": "FluxPipeline"}')
    write("folder/config.json", b"{}")
    (tmp_path / "hollow").mkdir()
    write("hollow/model_index.json",
          b'{"_class_name": "StableDiffusion3Pipeline", "vae": ["diffusers", "AutoencoderKL"]}')
    for flags, sentence in (
            (["--prompt-file", tmp_path / "absent.txt"], "absent.txt cannot be read: No such file"),
            (["--prompt-file", tmp_path], "cannot be read: Is a directory"),
            (["--prompt-file", write("bytes.txt", b"a st\xffr\n")], "bytes.txt cannot be read"),
            (["--prompt-file", empty], "empty.txt holds no prompt"),
            (["--prompt-file", long], "long.txt, line 3: the prompt 'a red star left of"),
            (["--prompt-file", single], "with a single prompt, give --eval-prompt-file"),
            (["--eval-prompt-file", empty], "empty.txt holds no prompt"),
            (["--reward", "pickscor"], "unknown reward 'pickscor'; known: shapes, "),
            (["--group-size", 1], "--group-size must"),
            (["--device", "abacus"], "--device abacus"),
            (["--beta", "nan"], "--beta must"),
            (["--updates-per-rollout", 3], "--updates-per-rollout 3 must divide"),
            (["--lora-targets", "nothing"], "--lora-targets nothing"),
            (["--lora", tmp_path], "--lora is for --evaluate"),
            (["--resolution", 36], "--resolution 36: this model wants a multiple of 8, at most 64"),
            (["--resolution", 72], "--resolution 72: this model wants a multiple of 8, at most 64"),
            (["--evaluate", "--lora", tmp_path], "pytorch_lora_weights.safetensors there cannot be read"),
            (["--model", tmp_path / "absent"], "absent cannot be loaded as an SD3 pipeline"),
            (["--model", tmp_path / "folder"], "folder cannot be loaded as an SD3 pipeline: [Errno 2] No such file or "
             f"directory: '{tmp_path / 'folder/model_index.json'}'"),
            (["--model", tmp_path / "other"], "other cannot be loaded as an SD3 pipeline: it holds a FluxPipeline, not "
             "a StableDiffusion3Pipeline"),
            (["--model", tmp_path / "hollow"], "hollow cannot be loaded as an SD3 pipeline")):
        assert run(tmp_path / "run", *flags) == 2, flags
        printed = capsys.readouterr().err
        assert sentence in refusal(printed) and printed.count("\n") == 1
    assert not (tmp_path / "run").exists()   # nothing is written before everything is checked


def test_the_command_itself_prints_that_sentence_alone(tmp_path):
    # In a process of its own, as typed; the second command has loaded the model before it can know.
    long = tmp_path / "long.txt"
    long.write_text("a red star left of a blue ring and a green cross\n")
    for flags, sentence in ((["--device", "cuda"], "torch sees no GPU"),
                            (["--device", "cpu", "--model", "nobody/absent", "--reward", "shapes"],
                             "check the network, or give a folder"),
                            (["--device", "cpu", "--prompt-file", long], "long.txt, line 1: the prompt")):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", ROOT / "dgpo.py", "--model", MODEL,
             "--prompt-file", ROOT / "shapes/prompts.txt", "--output-dir", tmp_path / "run", *flags],
            capture_output=True, text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 2 and done.stdout == ""
        assert sentence in refusal(done.stderr) and done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------
# README
# ------------------------------------------------------------------------------------------------


def readme_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@needs("matplotlib")
@pytest.mark.parametrize("sd35", ["3.5-medium"], indirect=True)
def test_every_command_of_the_readme_runs(sd35, judges, tmp_path, monkeypatch):
    # Each as it stands there and then made short, with small models of the same kind in the place of the hub's.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").symlink_to(ROOT / "shapes")
    (tmp_path / "my_rewards.py").write_text("def brightness(images, prompts, metadata):\n"
                                            "    return [i.convert('L').getpixel((9, 9)) for i in images]\n")
    for path in ("geneval/train_metadata.jsonl", "ocr/train.txt", "pickscore/train.txt"):
        (tmp_path / path).parent.mkdir()
        rows = [{"prompt": f'a {name} that says "{name}"', "include": [one(name)]} for name in ("dog", "tv", "cup")]
        lines = [json.dumps(row) if path.endswith("jsonl") else row["prompt"] for row in rows]
        (tmp_path / path).write_text("\n".join(lines))
    assert run(tmp_path / "runs/my-run", "--steps", 1) == 0   # the LoRA that README goes on with
    text = "".join(readme_blocks("bash")).replace("\\\n", " ")
    commands = [shlex.split(command, comments=True) for command in re.findall(r"python \S+\.py.*", text)]
    assert len(commands) > 5
    for i, (_, script, *arguments) in enumerate(commands):
        if script == "benchmarks/claims.py":
            short = "--budget 0.001 --seeds 1 --methods dgpo --evaluations 1 --eval-prompts 2 --output-dir".split()
            claims.main([*arguments, *short, str(tmp_path / f"results{i}"),
                         *(["--ablation", "noise"] if "all" in arguments else [])])
            continue
        assert script == "dgpo.py"
        hub = "stabilityai/stable-diffusion-3.5-medium"
        small = ["--model", sd35, "--dtype", "float32", "--resolution", 32] if hub in arguments else []
        for name in ("--reward", "--eval-reward"):
            if name in arguments:
                at = arguments.index(name) + 1
                arguments[at] = ",".join(f"{r}={judges[r]}" if r in judges else r for r in arguments[at].split(","))
        short = [*TINY[2:], "--steps", 1, "--output-dir", tmp_path / f"run{i}", *small]
        assert main([*arguments, *map(str, short)]) == 0


def test_the_readmes_loss_for_copying_runs():
    blocks = [block for block in readme_blocks("python") if "dgpo_loss" in block]
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_every_key_of_the_metrics_is_explained_in_the_readme(tmp_path):
    assert run(tmp_path, "--steps", 1) == 0
    readme = (ROOT / "README.md").read_text()
    keys = {key for line in (tmp_path / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert not [key for key in sorted(keys) if not re.search(rf'`"?{key}["`]', readme)]
