"""Update rules of DGPO's neighbours, each in the place of `accumulate_gradients` in dgpo.py's own training step.

    python benchmarks/claims.py --methods dgpo,diffusion_dpo,nft,awm --budget 10

Every rule has dgpo.accumulate_gradients' arguments: x0 [R, G, C, H, W], R prompts, advantages [R, G], sigma [R], noise
[R, 1, C, H, W], and adds the gradient of its loss, a mean over R' = total_rows rows, to the LoRA's .grad.  What they
share with DGPO (ODE rollouts, advantages, timesteps, noise shared by a group, KL to the frozen model, AdamW, EMA) is
dgpo.py's, so that only the rule differs.  Weights and constants of a rule are those of its authors' code; all rules
here train without guidance, as there.  The last three are DGPO with one thing changed, for the ablations.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.flow_grpo import random_steps, sde_rollout  # noqa: E402
from dgpo import accumulate_gradients, add_noise, group_advantages, mean_squared, seeded, train_step, update  # noqa: E402


def velocities(model, x0, prompts, sigma, noise):
    """A function policy -> velocity [R, G, C, H, W] at the noised x0, and the target that it is compared with."""
    x_t, target = add_noise(x0, noise, sigma.view(-1, 1, 1, 1, 1))
    G = x0.shape[1]
    prompts, sigma = [prompt for prompt in prompts for _ in range(G)], sigma.repeat_interleave(G)
    return lambda policy: model.velocity(x_t.flatten(0, 1), sigma, prompts, policy).view(x0.shape), target


def diffusion_dpo(model, x0, prompts, advantages, sigma, noise, config, total_rows):
    """Online Diffusion-DPO (arXiv 2311.12908): the best against the worst image of each group, which is DGPO's loss for
    a group of two, with the error and the clip taken as there."""
    pair = torch.stack([advantages.argmax(1), advantages.argmin(1)], 1)                            # [R, 2]
    signs = advantages.new_tensor([1.0, -1.0]).expand(len(x0), 2)
    return accumulate_gradients(model, x0[torch.arange(len(x0))[:, None], pair], prompts, signs, sigma, noise, config,
                                total_rows)


def nft(model, x0, prompts, advantages, sigma, noise, config, total_rows):
    """DiffusionNFT (arXiv 2509.16117), its b as `beta`: an implicit positive and negative policy around the old one,
    v+- = v_old +- b (v - v_old), each fitted to the image with the weight r and 1 - r, r in [0, 1] the reward.

    Its errors are those of x0 predictions, divided by the prediction's own mean absolute error (its Eq. 15).
    """
    velocity, target = velocities(model, x0, prompts, sigma, noise)
    with torch.no_grad():
        v_old, v_base = velocity("old"), velocity("frozen")
    v, r = velocity("current"), 0.5 + advantages / 10                                              # [R, G], A in +-5

    def error(implicit):
        size = (implicit - target).detach().abs().mean((2, 3, 4)).clamp_min(1e-5)
        return sigma[:, None] * mean_squared(implicit - target) / size

    loss = r * error(v_old + config.beta * (v - v_old)) + (1 - r) * error(v_old - config.beta * (v - v_old))
    # The authors' code has this factor, the paper not.  5 is what advantages are clamped to, so r's 1/10 is undone; and
    # 1/b undoes the b by which v+- move less than v: near v_old the gradient is A's, whatever b.
    return backward(5 / config.beta * loss, mean_squared(v - v_base), config, total_rows)


def clipped_objective(error, old_error, advantages, clip_range):
    """PPO's clipped objective with -error as log p, so ratio = exp(old_error - error): [R, G] each -> losses [R, G]."""
    ratio = torch.exp(old_error - error)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def awm(model, x0, prompts, advantages, sigma, noise, config, total_rows):
    """Advantage Weighted Matching (arXiv 2509.25050): the flow-matching loss as a stand-in for -log p, in PPO's clipped
    objective.  The paper's plain form, every sigma weighing the same."""
    velocity, target = velocities(model, x0, prompts, sigma, noise)
    with torch.no_grad():
        old_error, v_base = mean_squared(velocity("old") - target), velocity("frozen")
    v = velocity("current")
    loss = clipped_objective(mean_squared(v - target), old_error, advantages, config.clip_range)
    return backward(loss, mean_squared(v - v_base), config, total_rows)


def generalised_huber(error, sigma, power=0.25):
    """AWM's weighting "ghuber" of mean squared errors: [R, G], sigma [R] -> [R, G], 0 where the error is 0.

    Its slope, sigma error^(power - 1), makes samples with a small error count for more; the constant keeps it finite.
    """
    return sigma[:, None] * ((error + 1e-10) ** power - 1e-10 ** power) / power


def awm_released(model, x0, prompts, advantages, sigma, noise, config, total_rows):
    """AWM as its authors released it (github.com/scxue/advantage_weighted_matching, config/dgx_awm.py): errors in a
    generalised Huber norm, advantages in +-1, and besides the KL to the frozen model one of weight 1 to a policy that
    follows the current one closely, here "old" (see `awm_released_step`)."""
    velocity, target = velocities(model, x0, prompts, sigma, noise)
    with torch.no_grad():
        v_old, v_base = velocity("old"), velocity("frozen")
    v = velocity("current")
    error, old_error = (generalised_huber(mean_squared(u - target), sigma) for u in (v, v_old))
    loss = clipped_objective(error, old_error, advantages / 5, config.clip_range) + mean_squared(v - v_old)
    return backward(loss, mean_squared(v - v_base), config, total_rows)


def awm_released_step(model, optimizer, reward, rows, step, config):
    """One training step of `awm_released`.  With `old_decay=1` the old policy stands still within a rollout (but for a
    run's first update, where dgpo.py's ramp starts); then it follows once, with the authors' decay.

    So early on it is the policy that drew the rollout, to which the rollout's second update is held; later 0.3 of what
    it was before stays in it.  (The authors keep two for this: their ratio is to the policy that drew the rollout.)
    """
    metrics = train_step(model, optimizer, reward, rows, step, config, accumulate=awm_released)
    model.lora.follow("old", min(0.3, 0.001 * (step + 1) * config.updates_per_rollout))
    return metrics


def backward(loss, kl, config, total_rows):
    """Backward pass of [R, G] losses and KL terms; returns the sums over rows that dgpo.update wants."""
    ((loss + config.kl_weight * kl).mean(1).sum() / total_rows).backward()
    return {"loss": loss.mean(1).sum().item(), "kl": kl.mean(1).sum().item(), "clip_fraction": 0.0}


def own_noise(model, x0, prompts, advantages, sigma, noise, config, total_rows):
    """DGPO with a noise for every sample instead of one for its group."""
    noise = torch.cat([noise, torch.randn_like(x0[:, 1:])], 1)
    return accumulate_gradients(model, x0, prompts, advantages, sigma, noise, config, total_rows)


def plain_signs(model, x0, prompts, advantages, sigma, noise, config, total_rows):
    """DGPO with the weight 1 for every sample, +1 above its group's mean and -1 below."""
    return accumulate_gradients(model, x0, prompts, advantages.sign(), sigma, noise, config, total_rows)


def sde_rollouts_step(model, optimizer, reward, rows, step, config):
    """One step of DGPO on images drawn by Flow-GRPO's SDE instead of the ODE."""
    P, G = config.groups_per_step, config.group_size
    repeated = [row for row in rows for _ in range(G)]
    prompts, generator = [row["prompt"] for row in repeated], seeded(config.seed, "rollout", step)
    noise = torch.randn(P * G, *model.latent_shape, generator=generator)                           # [B, C, H, W]
    states, _, images = sde_rollout(model, prompts, noise, random_steps(config, generator), "current", config,
                                    generator)
    rewards = reward(images, prompts, repeated).view(P, G)                                         # [P, G]
    advantages = group_advantages(rewards, config.advantage_std).to(model.device)
    sums = update(model, optimizer, states[-1].unflatten(0, (P, G)), prompts[::G], advantages,
                  [seeded(config.seed, "update", step, i) for i in range(P)], step * config.updates_per_rollout, config)
    rows_trained_on = max(1, (advantages != 0).any(1).sum().item() * config.timesteps_per_rollout)
    return {"reward_mean": rewards.mean().item(), "gradient_norm": sums.pop("gradient_norm"),
            **{name: value / rows_trained_on for name, value in sums.items()}}
