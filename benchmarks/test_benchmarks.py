"""Tests of the benchmarks: Flow-GRPO, the other peers, the comparison, the tables.

    pytest benchmarks                 # from the repository's root; under a minute on one core
"""

import dataclasses
import itertools
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import baselines, claims, flow_grpo, gpu, record, throughput, trials  # noqa: E402
from dgpo import (  # noqa: E402
    accumulate_gradients,
    ode_sigmas,
    parse_arguments,
    sample_ode,
    seeded,
)
from rewards import load_prompts, load_reward  # noqa: E402
from test_dgpo import PROMPTS, adamw, needs, randomize, sd3, seed, update_inputs  # noqa: E402

torch.set_num_threads(1)


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


@pytest.mark.parametrize("sde_window, guidance_scale", [(0, 1.0), (2, 1.0), (2, 3.0)])
def test_flow_grpos_update_sees_the_policy_that_drew_the_images(sde_window, guidance_scale):
    # So the first ratio is 1: nothing is clipped, and the loss is the mean of -A, whatever the weights.
    config = flow_grpo.Settings(num_inference_steps=6, sde_window=sde_window, guidance_scale=guidance_scale,
                                clip_range=1e-4, updates_per_rollout=1)
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


def take_gradient(model):
    """The LoRA's gradient, flat, which is gone afterwards."""
    gradient = torch.cat([t.grad.flatten() for t in model.lora.weights("current")])
    for t in model.lora.weights("current"):
        t.grad = None
    return gradient


def assert_same_gradient(gradient, expected):
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("settings", [dict(updates_per_rollout=2),
                                      dict(updates_per_rollout=1, kl_weight=0.5, guidance_scale=3.0)])
def test_flow_grpos_updates_are_a_slow_loop_over_their_samples_and_all_random_steps(settings, monkeypatch):
    config = flow_grpo.Settings(**{"num_inference_steps": 5, "clip_range": 0.05, "kl_weight": 0.0, **settings})
    model, _ = sd3()
    randomize(model, "current", 0.05, 85)
    states = [torch.randn(4, *model.latent_shape, generator=seed(86 + i)) for i in range(6)]
    sigmas, steps, A = ode_sigmas(5, 3.0).tolist(), [1, 2], torch.tensor([1.0, -0.5, 0.0, 0.75])

    def moments(b, i, policy):
        x, t, dt = states[i][b:b + 1], sigmas[i], sigmas[i + 1] - sigmas[i]
        v, empty = (model.velocity(x, t, [prompt], policy) for prompt in (PROMPTS[b], ""))
        v, s = empty + config.guidance_scale * (v - empty), 0.7 * (t / (1 - t)) ** 0.5
        return x + (v + s ** 2 / (2 * t) * (x + (1 - t) * v)) * dt, s * (-dt) ** 0.5, s

    def log_prob(b, i, mean, std):
        return torch.distributions.Normal(mean, std).log_prob(states[i + 1][b:b + 1]).mean()

    # The ratios are 0.9, 1, 1 and 1.1: the last one's gradient is stopped, as its advantage is positive.
    with torch.no_grad():
        log_probs = {i: torch.stack([log_prob(b, i, *moments(b, i, "current")[:2]) for b in range(4)])
                     - torch.tensor([0.9, 1, 1, 1.1]).log() for i in steps}
    found = []
    monkeypatch.setattr(flow_grpo, "optimizer_step", lambda model, *_: found.append(take_gradient(model)) or 1.0)
    metrics = flow_grpo.grpo_update(model, None, states, log_probs, PROMPTS, A, config, step=3)
    # The third sample, without signal, is left out; an update's samples are drawn by the seed and the step.
    order = torch.tensor([0, 1, 3])[torch.randperm(3, generator=seeded(config.seed, "update", 3))].tolist()
    parts = [order] if config.updates_per_rollout == 1 else [order[:2], order[2:]]
    assert len(found) == len(parts)
    losses, kls = [], []
    for part, gradient in zip(parts, found):
        for b in part:
            for i in steps:
                mean, std, s = moments(b, i, "current")
                ratio = (log_prob(b, i, mean, std) - log_probs[i][b]).exp()
                loss = -min(A[b] * ratio, A[b] * ratio.clamp(0.95, 1.05))
                with torch.no_grad():
                    base = moments(b, i, "frozen")[0]
                kl = (mean - base).square().mean() / (2 * s ** 2)   # not s^2 |dt|, the step's own variance
                ((loss + config.kl_weight * kl) / (len(part) * len(steps))).backward()
                losses.append(loss.item() / (len(part) * len(steps) * len(parts)))
                kls.append(kl.item() / (len(part) * len(steps) * len(parts)))
        assert_same_gradient(gradient, take_gradient(model))
    assert metrics["loss"] == pytest.approx(sum(losses), rel=1e-4)
    assert metrics["kl"] == pytest.approx(sum(kls) if config.kl_weight else 0, rel=1e-3)


def rule_inputs(model):
    """What an update rule wants, on two rows of five samples: x0, prompts, advantages, sigma, noise."""
    sigma, noise = torch.tensor([0.7, 0.9]), torch.randn(2, 1, *model.latent_shape, generator=seed(79))
    return *update_inputs(model), sigma, noise


def gradient_of(rule, model, config, advantages=None, spoil=None):
    """The LoRA gradient, flat, of an update rule on two rows; `spoil` changes x0 [2, 5, C, H, W] first."""
    x0, prompts, drawn, sigma, noise = rule_inputs(model)
    if spoil is not None:
        x0 = spoil(x0, drawn)
    rule(model, x0, prompts, drawn if advantages is None else advantages, sigma, noise, config, 2)
    return take_gradient(model)


def nft_sample(v, v_old, target, t, A, config):
    """DiffusionNFT's loss of one sample, from x0 predictions x_t - t v as its paper has them; x_t cancels."""
    b, r = config.beta, (A / 5 + 1) / 2
    plus, minus = (1 - b) * v_old + b * v, (1 + b) * v_old - b * v
    wrong = [t * (u - target) for u in (plus, minus)]
    fit = [e.square().mean() / e.abs().mean().detach() for e in wrong]
    return (r * fit[0] + (1 - r) * fit[1]) * 5 / b


def awm_sample(v, v_old, target, t, A, config):
    ratio = ((v_old - target).square().mean() - (v - target).square().mean()).exp()
    return -min(A * ratio, A * ratio.clamp(1 - config.clip_range, 1 + config.clip_range))


def awm_released_sample(v, v_old, target, t, A, config):
    p, d, d_old = 0.25, (v - target).square().mean(), (v_old - target).square().mean()
    ratio = (t / p * (d_old ** p - d ** p)).exp()
    policy = -min(A / 5 * ratio, A / 5 * ratio.clamp(1 - config.clip_range, 1 + config.clip_range))
    return policy + (v - v_old).square().mean()


@pytest.mark.parametrize("rule, sample_loss, settings", [
    (baselines.nft, nft_sample, dict(beta=0.5)), (baselines.awm, awm_sample, dict(clip_range=0.02)),
    (baselines.awm_released, awm_released_sample, dict(clip_range=0.005))])
def test_a_peers_rule_is_a_slow_loop_over_samples_without_guidance(rule, sample_loss, settings):
    model, config = sd3(kl_weight=0.3, guidance_scale=4.5, **settings)
    randomize(model, "current", 0.05, 90)
    randomize(model, "old", 0.05, 91)
    x0, prompts, A, sigma, noise = rule_inputs(model)
    sums = rule(model, x0, prompts, A, sigma, noise, config, 3)   # a third row has no signal and is not there
    gradient, losses, kls = take_gradient(model), [], []
    for row, group in enumerate(x0):
        for i, image in enumerate(group):
            t, target = sigma[row], noise[row, 0] - image
            x_t = (image + t * target)[None]
            v, v_old, v_base = (model.velocity(x_t, t, [prompts[row]], policy)[0]
                                for policy in ("current", "old", "frozen"))
            losses.append(sample_loss(v, v_old.detach(), target, t, A[row, i], config))
            kls.append((v - v_base.detach()).square().mean())
    ((sum(losses) + 0.3 * sum(kls)) / (3 * 5)).backward()
    assert_same_gradient(gradient, take_gradient(model))
    assert sums["loss"] == pytest.approx(sum(losses).item() / 5, rel=1e-3)
    assert sums["kl"] == pytest.approx(sum(kls).item() / 5, rel=1e-3)


def test_at_the_start_advantage_weighted_matching_pushes_where_dgpo_does():
    # There ratio = 1 and sigmoid(S) = 1/2: the gradients are A grad d and A grad d / 2.
    model, config = sd3(kl_weight=0.0)
    dgpo, awm = (gradient_of(rule, model, config) for rule in (accumulate_gradients, baselines.awm))
    assert_same_gradient(awm, 2 * dgpo)


def test_at_the_start_nfts_gradient_is_linear_in_the_advantages_and_the_same_for_every_mixing_weight():
    # At v = v_old it is 5/b 2 b (2 r - 1) (v_old - target), up to the normalisation, with 2 r - 1 = A / 5.
    model, config = sd3(kl_weight=0.0, beta=1.0)
    A = update_inputs(model)[2]
    one = gradient_of(baselines.nft, model, config, A)
    assert_same_gradient(gradient_of(baselines.nft, model, config, 2 * A), 2 * one)
    assert_same_gradient(gradient_of(baselines.nft, model, dataclasses.replace(config, beta=0.5), A), one)
    assert gradient_of(baselines.nft, model, config, torch.zeros_like(A)).abs().max() < 1e-5 < one.abs().max()


def test_awms_generalised_huber_norm_worked_by_hand():
    error = torch.tensor([[0.0, 1 / 16, 1.0, 16.0]])
    by_hand = torch.tensor([[0.0, 1.0, 2.0, 4.0]]) - 2 * 1e-10 ** 0.25 * (error > 0)
    torch.testing.assert_close(baselines.generalised_huber(error, torch.tensor([0.5])), by_hand, rtol=1e-5, atol=1e-6)


def test_the_old_policy_of_the_released_awm_stands_still_within_a_rollout_and_then_follows_once():
    model, config = sd3(**claims.METHODS["awm_released"][1], groups_per_step=1, group_size=3, num_inference_steps=2)
    randomize(model, "current", 0.05, 92)
    randomize(model, "old", 0.05, 93)
    before = [t.clone() for t in model.lora.weights("old")]
    rows, seen = [{"prompt": PROMPTS[0]}], []

    def terms(images, prompts, rows):
        seen.append([t.detach().clone() for t in model.lora.weights("current")])
        return {"": torch.tensor([0.0, 0.5, 1.0])}

    reward = SimpleNamespace(terms=terms, total=lambda terms: terms[""])
    baselines.awm_released_step(model, adamw(model), reward, rows, 99, config)
    current = model.lora.weights("current")
    assert any((now != then).any() for now, then in zip(current, seen[0]))
    for old, was, now in zip(model.lora.weights("old"), before, current, strict=True):
        torch.testing.assert_close(old, 0.2 * was + 0.8 * now)   # 0.001 an update, of which 200 have been taken


def test_diffusion_dpo_sees_the_best_and_the_worst_of_a_group_alone():
    def others(x0, advantages):
        middle = (advantages < advantages.amax(1, True)) & (advantages > advantages.amin(1, True))
        return torch.where(middle[..., None, None, None], 7.0, x0)

    model, config = sd3()
    randomize(model, "current", 0.05, 80)
    plain, spoilt = (gradient_of(baselines.diffusion_dpo, model, config, spoil=how) for how in (None, others))
    assert torch.equal(plain, spoilt) and plain.norm() > 0
    assert not torch.equal(*(gradient_of(accumulate_gradients, model, config, spoil=how) for how in (None, others)))


def test_diversity_is_the_mean_squared_distance_of_two_pictures_of_a_prompt():
    assert claims.spread(torch.randn(4000, 8, generator=seed(84)), 4) == pytest.approx(2 * 8, rel=0.05)


def test_the_price_of_a_score_lies_between_evaluations():
    curve = [{"score": score, "images": images} for score, images in ((0.5, 0), (0.7, 100), (0.6, 200), (0.9, 300))]
    assert [claims.price(curve, level, "images") for level in (0.6, 0.7, 0.8)] == pytest.approx([50, 100, 800 / 3])
    assert claims.price(curve, 0.95, "images") == math.inf


@pytest.mark.parametrize("method", claims.METHODS)
def test_every_method_takes_a_step_from_the_base_model(method):
    tiny = ":groups_per_step=2:group_size=3:num_inference_steps=3:lora_rank=2"
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    run = claims.Run(method + tiny, 0, rows, rows[:1], {"shapes": load_reward("shapes")}, {})
    before = [t.detach().clone() for t in run.model.lora.weights("current")]
    run.advance()
    assert all(math.isfinite(value) for value in run.metrics[0].values()) and run.evaluations > 0
    assert any((now != then).any() for now, then in zip(run.model.lora.weights("current"), before))


def test_what_is_a_methods_own_is_its_authors_value():
    settings = {name: claims.parse_method(name, 0, {})[1] for name in claims.METHODS}
    assert settings["nft"].kl_weight == 1e-4
    released = settings["awm_released"]
    assert (released.clip_range, released.timesteps_per_rollout, released.kl_weight) == (1, 6, 0.003)
    for name in ("flow_grpo", "flow_grpo_fast", "awm_released"):
        assert settings[name].updates_per_rollout == 2
    assert (settings["flow_grpo"].kl_weight, settings["flow_grpo"].noise_level) == (0.04, 0.7)


@needs("matplotlib")
def test_the_comparison_measures_methods_and_draws_and_prints_them(tmp_path, capsys, monkeypatch):
    few = ["--eval-prompts", "3", "--eval-images", "2", "--evaluations", "2", "--output-dir", str(tmp_path)]
    small = dict(groups_per_step=2, group_size=3, num_inference_steps=3, timesteps_per_rollout=1, updates_per_rollout=1,
                 eval_num_inference_steps=2)
    monkeypatch.setitem(claims.METHODS, "dgpo", (claims.METHODS["dgpo"][0], small))
    monkeypatch.setattr(claims, "load_prompts", lambda *which: load_prompts(*which)[:8])
    flags = "".join(f":{name}={value}" for name, value in small.items())
    methods = ["dgpo", "flow_grpo" + flags]
    claims.main(["--budget", "0.01", "--methods", ",".join(methods), *few])
    curves = claims.load_results(tmp_path, "claims")
    assert list(curves) == methods
    for (curve,) in curves.values():
        assert curve[0]["step"] == 0 and curve[0]["score"] == curves["dgpo"][0][0]["score"]
        for before, after in itertools.pairwise(curve):
            assert all(after[name] > before[name] for name in ("step", "seconds", "images", "evaluations"))
        assert curve[-1]["images"] == 6 * curve[-1]["step"] and curve[-1]["seconds"] >= 0.6
        assert set(curve[-1]) >= {"score", "error", "rewards", "distance", "diversity", "categories"}
    # DGPO: 3 forwards an image in rollouts; then reference, old, current and its backward pass at one timestep.
    steps = curves["dgpo"][0][-1]["step"]
    assert 6 * 3 * steps < curves["dgpo"][0][-1]["evaluations"] <= 6 * (3 + 4) * steps
    assert Image.open(tmp_path / "claims.png").width > 1000
    variants = ["dgpo:beta=2", "dgpo_own_noise" + flags]
    monkeypatch.setitem(claims.ABLATIONS, "noise", variants)
    claims.main(["--budget", "0.001", "--ablation", "noise", *few])
    words = ["--budget", "0.001", "--tasks", "words", "--methods", "dgpo", *few]
    claims.main(words)
    with monkeypatch.context() as patch:   # the second time there is nothing left to do
        patch.setattr(claims, "measure", None)
        claims.main(words)
    printed = capsys.readouterr().out
    assert all(f"| `{name}` | 1 |" in printed for name in [*methods, *variants])
    assert all(f"| words | `{name}` | 1 |" in printed for name in ("base", "dgpo"))
    curve, = claims.load_results(tmp_path, "tasks-words")["dgpo"]
    assert set(curve[-1]["rewards"]) == {"words", "pickscore"}   # trained on and watching
    for task in ("composition", "taste"):
        shutil.copy(tmp_path / "tasks-words-0.png", tmp_path / f"tasks-{task}-0.png")
    assert Image.open(tmp_path / "tasks-words-0.png").size == (2 * 96, 3 * 96)   # base and DGPO, three prompts
    whole = claims.join_pictures(tmp_path, 2)   # each with prompts, its heading, and the names over the columns
    assert whole.size == (150 + 2 * 96, 3 * (76 + 2 * 96 + 20))
    assert claims.title("flow_grpo_fast") == "Flow-GRPO Fast"
    assert claims.title("dgpo:t_min=0:beta=3") == "DGPO, no timestep clip, beta 3"
    with pytest.raises(SystemExit, match="unknown method 'ppo'; known: dgpo, "):
        claims.main(["--methods", "ppo", *few])


@pytest.mark.parametrize("spec", [spec for variants in claims.ABLATIONS.values() for spec in variants])
def test_every_ablation_differs_from_the_default_in_a_known_setting(spec):
    _, config = claims.parse_method(spec, 0, {})
    default = claims.parse_method("dgpo", 0, {})[1]
    assert (config != default) == (":" in spec)
    assert config.groups_per_step * config.group_size == 96


@pytest.mark.parametrize("task, pattern", [("composition", r"(.*prompts.txt)\n"), ("words", "(.*--reward words.*)"),
                                           ("taste", "(.*--reward pickscore=shapes/taste.*)")])
def test_a_task_is_trained_as_by_the_readmes_command(task, pattern):
    command = re.search("python dgpo.py " + pattern, (claims.ROOT / "README.md").read_text())[1]
    method = next(method for method in claims.TASKS[task][3] if method.startswith("dgpo"))
    readme, (_, ours) = parse_arguments(shlex.split(command, comments=True)), claims.parse_method(method, 0, {})
    for name in ("t_min", "num_inference_steps", "reference_guidance_scale", "kl_weight", "learning_rate", "beta",
                 "clip_range", "group_size", "groups_per_step", "timesteps_per_rollout", "updates_per_rollout"):
        assert getattr(ours, name) == getattr(readme, name), name


def test_the_throughput_benchmark_prints_its_table(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", "throughput.py --preset tiny --device cpu --group-size 3 --repeats 1".split())
    throughput.main()
    header, _, row = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.strip().splitlines())
    values = dict(zip(header, row, strict=True))
    assert all(float(values[name]) > 0 for name in ("rollout, images/s", "update, samples/s", "step / bare"))


def test_every_command_of_the_readme_is_one_that_its_file_takes(tmp_path, monkeypatch):
    folder = Path(claims.__file__).parent
    monkeypatch.setattr(claims, "draw", lambda curves, path: None)   # slow, and drawn above
    shutil.copytree(folder / "results", tmp_path / "results")
    commands = re.findall(r"python benchmarks/(\w+)\.py([^`\n#]*)", (folder / "README.md").read_text())
    assert {name for name, _ in commands} == {
        "claims", "record", "ocr", "kill", "scaling", "throughput", "trials", "gpu"}
    for name, flags in dict.fromkeys(commands):
        if name == "claims":   # made to print what was measured before and to measure nothing
            claims.main([*shlex.split(flags), "--budget", "0", "--output-dir", str(tmp_path / "results")])
        for flag in re.findall(r"--[\w-]+", flags):
            assert f'"{flag}"' in (folder / f"{name}.py").read_text()


def test_the_record_is_the_time_to_a_score_that_is_kept_and_is_not_measured_twice(tmp_path, capsys):
    curve = [(0, 0.5), (10, 0.91), (20, 0.84), (30, 0.9), (40, 0.92)]
    assert [record.reached(curve, level) for level in (0.5, 0.8, 0.85, 0.9, 0.95)] == [0, 10, 30, 30, None]
    method = "dgpo:groups_per_step=2:group_size=3:num_inference_steps=2:eval_num_inference_steps=2:eval_images=2"
    flags = ["--method", method, "--seeds", "1", "--steps", "2", "--every", "1", "--eval-prompts", "2",
             "--results", str(tmp_path / "record.jsonl")]
    for _ in range(2):
        record.main(flags)
    lines = (tmp_path / "record.jsonl").read_text().splitlines()
    assert len(lines) == 1 and len(json.loads(lines[0])["curve"]) == 3 and json.loads(lines[0])["bare"] > 0
    assert capsys.readouterr().out.count(f"| `{method}` | 1 |") == 2


SMALL = ":groups_per_step=2:group_size=3:num_inference_steps=2:eval_num_inference_steps=2:eval_images=2:lora_rank=2"


def trial(name):
    """A trial's run, made small, on the first held-out prompts."""
    (spec, kind), reward = trials.TRIALS[name], load_reward("shapes")
    rows = load_prompts(claims.ROOT / "shapes/heldout.txt", reward)[:40]
    return kind(spec + SMALL, 0, rows, rows[:2], {"shapes": reward}, {})


@pytest.mark.parametrize("name", trials.TRIALS)
def test_every_trial_takes_steps(name):
    run = trial(name)
    before = [t.detach().clone() for t in run.model.lora.weights("current")]
    for _ in range(2):
        run.advance()
    assert all(math.isfinite(value) for value in run.metrics[-1].values())
    assert any((now != then).any() for now, then in zip(run.model.lora.weights("current"), before))


def test_a_merged_lora_gives_the_same_velocities_and_steps_as_one_beside_the_weights():
    merged, beside = trial("merged"), trial("default")
    for run in (merged, beside):
        randomize(run.model, "current", 0.05, 95)
        randomize(run.model, "old", 0.05, 96)
        run.model.encode(PROMPTS)
    x = torch.randn(4, *merged.model.latent_shape, generator=seed(97))
    for policy in ("current", "old", "ema", "frozen", "current"):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                found = [run.model.velocity(x, 0.7, PROMPTS, policy) for run in (merged, beside)]
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    for _ in range(2):
        for run in (merged, beside):
            run.advance()
    for a, b in zip(merged.model.lora.weights("ema"), beside.model.lora.weights("ema")):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def test_the_extremes_of_a_group_are_trained_on_alone():
    model, config = sd3()
    randomize(model, "current", 0.05, 80)
    # Two of a group, standardised among themselves, have the advantages 1 and -1: that is Diffusion-DPO's pair.
    assert_same_gradient(*(gradient_of(rule, model, config) for rule in (trials.extremes, baselines.diffusion_dpo)))


def test_prompts_are_drawn_by_their_spread_and_by_their_categorys_failures():
    spread, failing = trial("prompts by spread"), trial("failing categories")
    assert len(set(spread.chances())) == len(set(failing.chances())) == 1   # nothing seen
    tags, G = spread.tags, 3
    first, other = 0, next(i for i, tag in enumerate(tags) if tag != tags[0])
    rewards = {first: torch.tensor([0.0, 0.5, 1.0]), other: torch.ones(3)}
    for run in (spread, failing):
        reward = SimpleNamespace(terms=lambda *_: {"": torch.cat([*rewards.values()])}, total=lambda terms: terms[""])
        prompts = [run.rows[i]["prompt"] for i in rewards for _ in range(G)]
        run.watch(reward, [], prompts, [])
        chances = run.chances()
        assert chances[first] > chances[other] > 0
        assert all(chance == chances[first] for chance, tag in zip(chances, tags) if tag == tags[0])
    assert failing.chances()[first] == pytest.approx(2 / 3) and failing.chances()[other] == 0.05


@needs("peft")
def test_the_gpu_benchmark_fills_its_table_on_a_cpu_too(capsys):
    sections = "batches,authors,share,two_policies,vae"
    gpu.main(["--preset", "tiny", "--device", "cpu", "--repeats", "1", "--only", sections])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    names = [cells[0] for cells in rows]
    assert names.count("dgpo.py") == 3 and "decoding, channels_last" in names and len(rows) == 17
    assert not any("failed" in cell or "out of memory" in cell for cells in rows for cell in cells)


def test_the_command_line_runs_on_a_pipeline_made_as_the_full_size_one():
    command = [sys.executable, "benchmarks/throughput.py", "--full-size", "--preset", "tiny", "--device", "cpu"]
    done = subprocess.run(command, cwd=claims.ROOT, capture_output=True, text=True)   # of its own: it patches dgpo
    header, _, row = (line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|"))
    values = dict(zip(header, row, strict=True))
    assert values["LoRA layers"] == "15" and float(values["update, s"]) > 0
