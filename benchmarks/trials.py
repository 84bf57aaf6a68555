r"""What might make the default job faster: one change a row, each with the same seeds, measured as by record.py.

    python benchmarks/trials.py --only default --seed 0     # measure one; adds to results/trials.jsonl
    python benchmarks/trials.py --seed 0                    # ... or what is still missing of a seed
    python benchmarks/trials.py --seed 0 --device cuda --results FILE   # whose seconds are the host's alone
    python benchmarks/trials.py                             # only print what was measured before

A trial is a method of claims.py, or one of the classes below: a run with one thing of its own.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import claims, record  # noqa: E402
from benchmarks.claims import Run, mean, read_lines  # noqa: E402
from dgpo import accumulate_gradients, group_advantages, seeded, train_step  # noqa: E402


def extremes(model, x0, prompts, advantages, sigma, noise, config, total_rows):
    """DGPO on a group's best and worst quarter (Sol-RL, arXiv 2604.06916), standardised among themselves."""
    order, quarter = advantages.argsort(1), max(1, advantages.shape[1] // 4)
    kept = torch.cat([order[:, :quarter], order[:, -quarter:]], 1)                                 # [R, G / 2]
    A = group_advantages(advantages.gather(1, kept), config.advantage_std)
    return accumulate_gradients(model, x0[torch.arange(len(x0))[:, None], kept], prompts, A, sigma, noise, config,
                                total_rows)


class Muon(Run):
    """Muon, orthogonalised momentum, in the place of AdamW; its steps are as large as AdamW's usually are."""

    def __init__(self, *rest):
        super().__init__(*rest)
        self.optimizer = torch.optim.Muon(self.model.lora.weights("current"), self.config.learning_rate, 1e-4,
                                          adjust_lr_fn="match_rms_adamw")


class Merged(Run):
    """The LoRA is added to the frozen weights for every forward pass without gradient, once for each new policy."""

    def __init__(self, *rest):
        super().__init__(*rest)
        lora, select = self.model.lora, self.model.lora.select
        base = [layer.weight.data for layer in lora.layers.values()]
        merged = {}   # policy -> (the versions of its tensors, weights)

        def merge(policy):
            tensors = lora.weights(policy)
            versions = [t._version for t in tensors]   # which every change in place counts up
            if tensors and merged.get(policy, [None])[0] != versions:
                pairs = zip(base, tensors[::2], tensors[1::2])
                merged[policy] = versions, [W + lora.scale * up @ down for W, down, up in pairs]
            return merged[policy][1] if tensors else base

        def select_merged(policy):
            with_gradient = torch.is_grad_enabled()
            select(policy if with_gradient else "base")
            for layer, weight in zip(lora.layers.values(), base if with_gradient else merge(policy)):
                layer.weight.data = weight

        lora.select = select_merged


class Watching(Run):
    """The prompts of a step depend on the rewards that were seen: subclasses say how likely a row is."""

    def __init__(self, *rest):
        super().__init__(*rest)
        self.index, self.chosen = {row["prompt"]: i for i, row in enumerate(self.rows)}, []
        self.tags = [row["tag"] for row in self.rows]
        self.seen = {}   # row -> its last group's rewards [G]
        step, self.train_step = self.train_step, lambda model, optimizer, reward, *rest: step(
            model, optimizer, SimpleNamespace(terms=partial(self.watch, reward), total=reward.total), *rest)

    def watch(self, reward, images, prompts, rows):
        """reward.terms, and remember the rewards."""
        terms, G = reward.terms(images, prompts, rows), self.config.group_size
        for prompt, rewards in zip(prompts[::G], reward.total(terms).view(-1, G)):
            self.seen.pop(self.index[prompt], None)   # so that the newest stand last
            self.seen[self.index[prompt]] = rewards
        return terms

    def rows_of_step(self):
        """P different rows by their chances, drawn from the seed and the step."""
        chances = torch.tensor(self.chances(), dtype=torch.float64)
        chosen = torch.multinomial(chances, self.config.groups_per_step,
                                   generator=seeded(self.config.seed, "chances", self.step))
        return [self.rows[i] for i in chosen.tolist()]

    def by_category(self, value):
        """What a number of a group's rewards is on average, by category, of all that were seen; 1 where none was."""
        found = {}
        for i, rewards in self.seen.items():
            found.setdefault(self.tags[i], []).append(value(rewards))
        return {tag: mean(found.get(tag, [1.0])) for tag in set(self.tags)}


class Spread(Watching):
    """Prompts by the spread of their last rewards (CGPO's idea), unseen ones by that of their category; a floor of a
    fifth of the average keeps all of them in."""

    def chances(self):
        spread = self.by_category(lambda rewards: rewards.std(correction=0).item())
        values = [self.seen[i].std(correction=0).item() if i in self.seen else spread[tag]
                  for i, tag in enumerate(self.tags)]
        return [max(value, 0.2 * mean(values)) for value in values]


class Failing(Watching):
    """Images move from easy to failing categories as the run goes: a row's chance is how often the last groups of its
    category failed, at least a twentieth."""

    def chances(self):
        self.seen = dict([*self.seen.items()][-8 * self.config.groups_per_step:])   # of the last eight steps
        failing = self.by_category(lambda rewards: (rewards < 1).double().mean().item())
        return [max(failing[tag], 0.05) for tag in self.tags]


claims.METHODS["extremes"] = (partial(train_step, accumulate=extremes), {})
# Trial -> (method, kind of run)
TRIALS = {
    "default": ("dgpo", Run),
    "Muon": ("dgpo", Muon),
    "Muon, rate 1.4e-3": ("dgpo:learning_rate=0.0014", Muon),
    "rank 8": ("dgpo:lora_rank=8", Run),
    "M = U = 6": ("dgpo:timesteps_per_rollout=6:updates_per_rollout=6", Run),
    "M = U = 8": ("dgpo:timesteps_per_rollout=8:updates_per_rollout=8", Run),
    "12 extremes of 24": ("extremes:group_size=24", Run),
    "6 extremes of 12, M = U = 8": ("extremes:timesteps_per_rollout=8:updates_per_rollout=8", Run),
    "5 groups, M = U = 8": ("dgpo:groups_per_step=5:timesteps_per_rollout=8:updates_per_rollout=8", Run),
    "beta 3": ("dgpo:beta=3", Run),
    "prompts by spread": ("dgpo", Spread),
    "merged": ("dgpo", Merged),
    "failing categories": ("dgpo", Failing),
}


def main(arguments=None):
    """Measure what is asked for and not there yet, then print all there is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seed", type=int, help="measure this one")
    parser.add_argument("--only", choices=TRIALS, help="... of this trial alone")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=125)
    parser.add_argument("--every", type=int, default=25, help="steps between evaluations")
    parser.add_argument("--eval-prompts", type=int, help="only the first N held-out prompts")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/trials.jsonl")
    args = parser.parse_args(arguments)
    for name in () if args.seed is None else [args.only] if args.only else TRIALS:
        if any((run["method"], run["seed"]) == (name, args.seed) for run in read_lines(args.results)):
            continue
        spec, kind = TRIALS[name]
        run = record.measure(spec, args.seed, args.steps, args.every, args.eval_prompts,
                             lambda *rest: kind(*rest[:-1], {"device": args.device}))
        with open(args.results, "a") as file:
            file.write(json.dumps({**run, "method": name, "settings": spec}) + "\n")
    if runs := read_lines(args.results):
        print(record.table(runs))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
