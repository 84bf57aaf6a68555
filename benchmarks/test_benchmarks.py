"""Tests of the benchmarks: Flow-GRPO, the other peers, the comparison, the tables.

    pytest benchmarks                 # from the repository's root; under a minute on one core
"""

import dataclasses
import importlib.util
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import baselines, claims, flow_grpo, throughput  # noqa: E402
from dgpo import (  # noqa: E402
    EMBEDDED_MODEL,
    SD3,
    Config,
    accumulate_gradients,
    group_advantages,
    load_pipeline,
    ode_sigmas,
    sample_ode,
)

torch.set_num_threads(1)
PROMPTS = ["a red circle", "three squares", "a star left of a ring", "a green cross and a blue triangle"]


def seed(number):
    return torch.Generator().manual_seed(number)


def sd3(**settings):
    """The embedded model, freshly loaded, and the settings it was loaded with."""
    config = Config(**{"model": str(EMBEDDED_MODEL), "device": "cpu", "lora_rank": 4, **settings})
    return SD3(load_pipeline(config.model, config), config), config


def randomize(model, policy, scale, number):
    """Give a policy LoRA weights that matter; fresh ones are the identity, which would hide almost any mistake."""
    generator = seed(number)
    with torch.no_grad():
        for t in model.lora.weights(policy):
            t.copy_(scale * torch.randn(t.shape, generator=generator))


def adamw(model):
    return torch.optim.AdamW(model.lora.weights("current"), lr=1e-3)


def needs(package):
    """Skip a test, and say so, where a test-only package is missing."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"pip install {package}")


def update_inputs(model, groups=2, size=5):
    """Latents [P, G, C, H, W], prompts and advantages [P, G] to train on; any latents will do."""
    x0 = torch.randn(groups, size, *model.latent_shape, generator=seed(10))
    return x0, PROMPTS[:groups], group_advantages(torch.rand(groups, size, generator=seed(11)))


def test_the_throughput_benchmark_prints_its_table(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", "throughput.py --preset tiny --device cpu --group-size 3 --repeats 1".split())
    throughput.main()
    header, _, row = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.strip().splitlines())
    values = dict(zip(header, row, strict=True))
    assert all(float(values[name]) > 0 for name in ("rollout, images/s", "update, samples/s", "step / bare"))


@pytest.mark.parametrize("noise_level", [0.3, 0.7])
def test_flow_grpos_sde_keeps_the_marginals_of_the_flow(noise_level):
    # x0 ~ N(mu, s^2), whose exact velocity is known: whatever the noise, the samples are to end as N(mu, s^2).
    mu, s, generator = 1.5, 0.5, seed(70)
    sigmas = ode_sigmas(300, 3.0).double().tolist()
    x = torch.randn(20000, 1, dtype=torch.float64, generator=generator)
    for sigma, next_sigma in itertools.pairwise(sigmas):
        var = ((1 - sigma) * s) ** 2 + sigma ** 2
        v = -mu + (sigma - (1 - sigma) * s ** 2) / var * (x - (1 - sigma) * mu)
        mean, std = flow_grpo.sde_step(x, v, sigma, next_sigma, noise_level, sigmas[1])
        x = mean + std * torch.randn(x.shape, dtype=torch.float64, generator=generator)
    assert x.mean().item() == pytest.approx(mu, abs=0.02)
    assert x.std().item() == pytest.approx(s, rel=0.02)


def test_without_noise_flow_grpos_step_is_eulers():
    x, v = torch.randn(2, 3, 4, generator=seed(71)), torch.randn(2, 3, 4, generator=seed(72))
    mean, std = flow_grpo.sde_step(x, v, 0.8, 0.7, 1e-6, 0.9)
    torch.testing.assert_close(mean, sample_ode(lambda x, sigma: v, x, torch.tensor([0.8, 0.7])))
    assert std < 1e-5


def test_flow_grpos_log_probability_is_a_gaussians():
    x, mean, std = torch.randn(3, 4, 2, 2, generator=seed(73)), torch.randn(3, 4, 2, 2, generator=seed(74)), 0.3
    torch.testing.assert_close(flow_grpo.gaussian_log_prob(x, mean, std),
                               torch.distributions.Normal(mean, std).log_prob(x).mean((1, 2, 3)))


def test_flow_grpos_loss_stops_exactly_the_samples_that_moved_too_far():
    ratio = torch.tensor([1.3, 1.3, 0.7, 0.7, 1.0])   # A > 0 stops above the range, A < 0 below it
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0])
    log_prob = ratio.log().requires_grad_()
    loss, clipped = flow_grpo.grpo_loss(log_prob, torch.zeros(5), advantages, 0.2)
    loss.backward()
    torch.testing.assert_close(log_prob.grad, -advantages * ratio / 5 * torch.tensor([0, 1, 1, 0, 1]))
    assert clipped == pytest.approx(2 / 5)


@pytest.mark.parametrize("sde_window", [0, 2])
def test_flow_grpos_update_sees_the_policy_that_drew_the_images(sde_window):
    # So the first ratio is 1: nothing is clipped, and the loss is the mean of -A, whatever the weights.
    config = flow_grpo.Settings(num_inference_steps=6, sde_window=sde_window, clip_range=1e-4, updates_per_rollout=1)
    model, _ = sd3()
    randomize(model, "current", 0.05, 75)
    noise, advantages = torch.randn(4, *model.latent_shape, generator=seed(76)), torch.tensor([1.0, -0.5, 0.25, 0.75])
    steps = flow_grpo.random_steps(config, seed(77))
    assert len(steps) == (sde_window or 5) and 5 not in steps   # never the last of the six
    states, log_probs, images = flow_grpo.sde_rollout(model, PROMPTS, noise, steps, "current", config, seed(78))
    assert len(states) == 7 and list(log_probs) == steps and len(images) == 4
    metrics = flow_grpo.grpo_update(model, adamw(model), states, log_probs, PROMPTS, advantages, config, step=0)
    assert metrics["clip_fraction"] == 0 and metrics["gradient_norm"] > 0
    assert metrics["loss"] == pytest.approx(-advantages.mean().item(), abs=1e-4)


def gradient_of(rule, model, config, advantages=None, spoil=None):
    """The LoRA gradient, flat, of an update rule on two rows; `spoil` changes x0 [2, 5, C, H, W] first."""
    x0, prompts, drawn = update_inputs(model)
    if spoil is not None:
        x0 = spoil(x0, drawn)
    sigma, noise = torch.tensor([0.7, 0.9]), torch.randn(2, 1, *model.latent_shape, generator=seed(79))
    rule(model, x0, prompts, drawn if advantages is None else advantages, sigma, noise, config, 2)
    gradient = torch.cat([t.grad.flatten() for t in model.lora.weights("current")])
    for t in model.lora.weights("current"):
        t.grad = None
    return gradient


def test_at_the_start_advantage_weighted_matching_pushes_where_dgpo_does():
    # There ratio = 1 and sigmoid(S) = 1/2: the gradients are A grad d and A grad d / 2.
    model, config = sd3(kl_weight=0.0)
    dgpo, awm = (gradient_of(rule, model, config) for rule in (accumulate_gradients, baselines.awm))
    torch.testing.assert_close(awm, 2 * dgpo, rtol=1e-3, atol=1e-3 * awm.abs().max().item())


def test_at_the_start_nfts_gradient_is_linear_in_the_advantages_and_needs_no_mixing_weight():
    # At v = v_old it is 2 b (2 r - 1) (v_old - target), up to the normalisation, with 2 r - 1 = A / 5.
    model, config = sd3(kl_weight=0.0, beta=1.0)
    A = update_inputs(model)[2]
    one = gradient_of(baselines.nft, model, config, A)
    torch.testing.assert_close(gradient_of(baselines.nft, model, config, 2 * A), 2 * one, rtol=1e-3, atol=1e-6)
    half = dataclasses.replace(config, beta=0.5)
    torch.testing.assert_close(gradient_of(baselines.nft, model, half, A), one / 2, rtol=1e-3, atol=1e-6)
    assert gradient_of(baselines.nft, model, config, torch.zeros_like(A)).abs().max() < 1e-6 < one.abs().max()


def test_diffusion_dpo_sees_the_best_and_the_worst_of_a_group_alone():
    def others(x0, advantages):
        middle = (advantages < advantages.amax(1, True)) & (advantages > advantages.amin(1, True))
        return torch.where(middle[..., None, None, None], 7.0, x0)

    model, config = sd3()
    randomize(model, "current", 0.05, 80)
    plain, spoilt = (gradient_of(baselines.diffusion_dpo, model, config, spoil=how) for how in (None, others))
    assert torch.equal(plain, spoilt) and plain.norm() > 0
    assert not torch.equal(*(gradient_of(accumulate_gradients, model, config, spoil=how) for how in (None, others)))


def test_the_kernel_distance_is_zero_between_samples_of_one_distribution_alone():
    x, y, z = (torch.randn(2000, 8, generator=seed(81 + i)) for i in range(3))
    assert abs(claims.kernel_distance(x, y)) < 0.02 < 0.2 < claims.kernel_distance(x, z + 0.5)
    assert claims.spread(torch.randn(4000, 8, generator=seed(84)), 4) == pytest.approx(2 * 8, rel=0.05)


def test_the_price_of_a_score_lies_between_evaluations():
    curve = [{"strict": score, "images": images} for score, images in ((0.5, 0), (0.7, 100), (0.6, 200), (0.9, 300))]
    assert [claims.price(curve, level, "images") for level in (0.6, 0.7, 0.8)] == pytest.approx([50, 100, 800 / 3])
    assert claims.price(curve, 0.95, "images") == math.inf


@needs("matplotlib")
def test_the_comparison_measures_every_method_and_draws_and_prints_it(tmp_path, capsys):
    few = ["--eval-prompts", "6", "--eval-images", "2", "--evaluations", "2", "--output-dir", str(tmp_path)]
    claims.main(["--budget", "0.05", *few])
    curves = claims.load_results(tmp_path, "claims")
    assert list(curves) == claims.PEERS
    for (curve,) in curves.values():
        assert curve[0]["step"] == 0 and curve[0]["strict"] == curves["dgpo"][0][0]["strict"]
        for before, after in itertools.pairwise(curve):
            assert all(after[name] > before[name] for name in ("step", "seconds", "images", "evaluations"))
        assert curve[-1]["images"] == 96 * curve[-1]["step"] and curve[-1]["seconds"] >= 3
        assert set(curve[-1]) >= {"strict", "error", "graded", "distance", "diversity", "categories"}
    # DGPO: 8 forwards an image in rollouts; then 4 timesteps of reference, old, current and its backward pass.
    steps = curves["dgpo"][0][-1]["step"]
    assert 96 * 8 * steps < curves["dgpo"][0][-1]["evaluations"] <= (96 * 8 + 96 * 4 * 4) * steps
    assert Image.open(tmp_path / "claims.png").width > 1000
    claims.main(["--budget", "0.01", "--ablation", "noise", *few])
    printed = capsys.readouterr().out
    assert all(f"| `{name}` | 1 |" in printed for name in [*claims.PEERS, "dgpo_own_noise"])
    with pytest.raises(SystemExit, match="unknown method 'ppo'; known: dgpo, "):
        claims.main(["--methods", "ppo", *few])


@pytest.mark.parametrize("spec", [spec for variants in claims.ABLATIONS.values() for spec in variants])
def test_every_ablation_differs_from_the_default_in_a_known_setting(spec):
    _, config = claims.parse_method(spec, 0, {})
    default = claims.parse_method("dgpo", 0, {})[1]
    assert (config != default) == (":" in spec)
    assert config.groups_per_step * config.group_size == 96
