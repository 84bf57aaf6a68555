"""Flow-GRPO (arXiv 2505.05470) on dgpo.py's model, LoRA, prompts, rewards and evaluation: only what differs is here.

What differs: images are drawn with an SDE in place of the ODE, which makes every solver step a Gaussian policy; the
update raises the probability of the very steps that led to good images, with the guidance that drew them.  Its "Fast"
form (`sde_window`) lets only a few consecutive steps of a trajectory be random, and trains on those.

    python benchmarks/claims.py --methods dgpo,flow_grpo --budget 10

Shapes as in dgpo.py: B = P*G images, T solver steps.  Log-probabilities and KL are *means* over a latent's dimensions,
as in the authors' code (the paper writes sums): the clip range only has a meaning together with that.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dgpo import Config, group_advantages, ode_sigmas, optimizer_step, seeded, setting  # noqa: E402


@dataclass
class Settings(Config):
    """dgpo.py's settings and those of the SDE."""

    noise_level: float = setting(0.7, "a, how much noise the SDE adds (paper: 0.7)", low=1e-3)
    sde_window: int = setting(0, "random steps a trajectory, all trained on; 0: all but the last", low=0)


def sde_noise(sigma, noise_level, max_sigma):
    """s = a sqrt(t / (1-t)), the SDE's noise at t = sigma: a number.

    max_sigma: the grid's second value, which takes the place of t = 1 under the fraction, as s is infinite there.
    """
    return noise_level * math.sqrt(sigma / (1 - min(sigma, max_sigma)))


def sde_step(x, v, sigma, next_sigma, noise_level, max_sigma):
    """Mean [B, ...] and std (number) of one step of the reverse SDE with the ODE's marginals (Flow-GRPO, Eq. 9).

    x_{t+dt} = x + [v + s^2 / (2t) (x + (1-t) v)] dt + s sqrt(|dt|) noise,  dt = next_sigma - t,  s of `sde_noise`.
    """
    dt, s = next_sigma - sigma, sde_noise(sigma, noise_level, max_sigma)
    return x + (v + s ** 2 / (2 * sigma) * (x + (1 - sigma) * v)) * dt, s * math.sqrt(-dt)


def gaussian_log_prob(x, mean, std):
    """Log-density of x [B, ...] under N(mean, std^2), its mean over dimensions: [B]."""
    return (-((x - mean) / std).square() / 2).flatten(1).mean(1) - math.log(std) - math.log(2 * math.pi) / 2


def random_steps(config, generator):
    """The solver steps that are random and trained on: a list of indices.

    The last step adds next to no noise and is never one of them.  A window lies in the first half of the trajectory,
    where the picture's content is decided.
    """
    steps = config.num_inference_steps - 1
    if not config.sde_window:
        return list(range(steps))
    start = torch.randint(max(1, (steps + 1) // 2 - config.sde_window + 1), (), generator=generator).item()
    return list(range(start, min(steps, start + config.sde_window)))


@torch.no_grad()
def sde_rollout(model, prompts, noise, steps, policy, config, generator):
    """Images for B prompts from noise [B, C, H, W], random in the solver steps `steps` and Euler's ODE in the others.

    Returns (states, list of T+1 [B, C, H, W]; log_probs, dict step -> [B]; list of B PIL images).
    """
    model.encode(prompts)
    sigmas = ode_sigmas(config.num_inference_steps, model.shift).tolist()
    states, log_probs = [noise.to(model.device)], {}
    for i, (sigma, next_sigma) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        x = states[-1]
        v = model.velocity(x, sigma, prompts, policy, config.guidance_scale)
        if i in steps:
            mean, std = sde_step(x, v, sigma, next_sigma, config.noise_level, sigmas[1])
            states.append(mean + std * torch.randn(x.shape, generator=generator).to(x.device))
            log_probs[i] = gaussian_log_prob(states[-1], mean, std)
        else:
            states.append(x + (next_sigma - sigma) * v)
    return states, log_probs, model.decode(states[-1])


def grpo_loss(log_prob, old_log_prob, advantages, clip_range):
    """PPO's clipped objective for one step of B trajectories, [B] each: (scalar loss, share of clipped samples)."""
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    return loss.mean(), ((loss > -advantages * ratio).float()).mean().item()


def accumulate_step(model, x, next_x, sigmas, i, log_prob, prompts, A, config, share):
    """Add `share` times the gradient of loss + KL of B samples' i-th solver step to the LoRA's .grad.

    x, next_x: [B, C, H, W], the states before and after; log_prob: [B], of the policy that drew them; A: [B].  The KL
    is that of the authors' code: between Gaussians of std s, though the step's is s sqrt(|dt|).  Returns `share` times
    the means over samples: dict of floats.
    """
    def moments(policy):
        v = model.velocity(x, sigmas[i], prompts, policy, config.guidance_scale)
        return sde_step(x, v, sigmas[i], sigmas[i + 1], config.noise_level, sigmas[1])

    mean, std = moments("current")
    loss, clipped = grpo_loss(gaussian_log_prob(next_x, mean, std), log_prob, A, config.clip_range)
    kl = loss.new_zeros(())
    if config.kl_weight:
        with torch.no_grad():
            base_mean, _ = moments("frozen")
        kl = (mean - base_mean).square().mean() / (2 * sde_noise(sigmas[i], config.noise_level, sigmas[1]) ** 2)
    (share * (loss + config.kl_weight * kl)).backward()
    return {"loss": share * loss.item(), "kl": share * kl.item(), "clip_fraction": share * clipped}


def grpo_update(model, optimizer, states, log_probs, prompts, advantages, config, step):
    """All optimizer steps on one rollout; `advantages`: [B].  Returns metrics.

    Each takes its share of the samples, drawn at random, over all random steps of their trajectories.
    """
    sigmas = ode_sigmas(config.num_inference_steps, model.shift).tolist()
    useful = advantages.nonzero()[:, 0].cpu()   # a sample without signal costs nothing, as in dgpo.py
    shuffled = useful[torch.randperm(len(useful), generator=seeded(config.seed, "update", step))]
    sums = dict.fromkeys(("loss", "kl", "clip_fraction", "gradient_norm"), 0.0)
    updates = min(config.updates_per_rollout, len(useful))
    for k, part in enumerate(shuffled.tensor_split(updates) if updates else ()):
        for i, log_prob in log_probs.items():
            terms = accumulate_step(model, states[i][part], states[i + 1][part], sigmas, i, log_prob[part],
                                    [prompts[b] for b in part], advantages[part], config, 1 / len(log_probs))
            for name, value in terms.items():
                sums[name] += value / updates
        sums["gradient_norm"] += optimizer_step(model, optimizer, step * config.updates_per_rollout + k,
                                                config) / updates
    return sums


def train_step(model, optimizer, reward, rows, step, config):
    """One step of Flow-GRPO: SDE rollout, rewards, advantages, update.  Returns the step's metrics."""
    repeated = [row for row in rows for _ in range(config.group_size)]
    prompts, generator = [row["prompt"] for row in repeated], seeded(config.seed, "rollout", step)
    noise = torch.randn(len(prompts), *model.latent_shape, generator=generator)                    # [B, C, H, W]
    states, log_probs, images = sde_rollout(model, prompts, noise, random_steps(config, generator), "current", config,
                                            generator)
    rewards = reward(images, prompts, repeated).view(len(rows), -1)                                # [P, G]
    advantages = group_advantages(rewards, config.advantage_std).to(model.device).flatten()        # [B]
    return {"reward_mean": rewards.mean().item(),
            **grpo_update(model, optimizer, states, log_probs, prompts, advantages, config, step)}
