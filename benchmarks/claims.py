r"""The paper's claims on the embedded model: DGPO against its neighbours, and what each of its parts is worth.

    pip install -r requirements.txt matplotlib
    python benchmarks/claims.py --budget 10 --seeds 3                    # every method, 10 minutes of training each
    python benchmarks/claims.py --budget 3 --ablation t_min              # one ablation, or all of them with `all`
    python benchmarks/claims.py --budget 4 --seeds 3 --tasks all         # the paper's three tasks under every judge
    python benchmarks/claims.py --budget 3 --name tuning --methods flow_grpo:learning_rate=0.001:clip_range=0.01
    python benchmarks/claims.py --budget 0                               # only draw and print what was measured before

All runs of a seed stand side by side in one process and take their steps in turn, always the one that has used the
least time, so that whatever else the machine does falls on all of them alike.  They share model, prompts, reward, LoRA
and evaluation, all of them dgpo.py's.  Time is that of one CPU core: torch gets one thread, and the clock is the
process's own, which other programs cannot slow down.  It stands still during evaluations, which lie ever further apart,
as curves rise fast at first.  Results: NAME-SEED.jsonl, a line an evaluation; what is there already is not measured
again, so that the same command goes on where it was interrupted, and what is there in part is replaced.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import baselines, flow_grpo  # noqa: E402
from dgpo import EMBEDDED_MODEL, PAPER, evaluate, load_model, rows_of_step, train_step  # noqa: E402
from rewards import UserError, load_prompts, load_reward, summarize  # noqa: E402
from shapes.world import kernel_closeness, rendered_features, vae_features  # noqa: E402

LEVELS = (0.6, 0.7, 0.8, 0.85, 0.9)   # scores whose price the table gives

# Method -> (one training step, the settings in which it differs from dgpo.py's defaults).  What is a method's own has
# its authors' value; README.md beside this file says what was tried besides.
METHODS = {
    "dgpo": (train_step, {}),
    "dgpo_published": (train_step, {name: PAPER[name] for name in (
        "beta", "t_min", "updates_per_rollout", "rollout_old_after", "old_decay", "old_decay_ramp", "learning_rate",
        "ema_decay")}),
    "flow_grpo": (flow_grpo.train_step, dict(updates_per_rollout=2, kl_weight=0.04)),
    "flow_grpo_fast": (flow_grpo.train_step, dict(updates_per_rollout=2, kl_weight=0.0, sde_window=2,
                                                  learning_rate=1e-3)),
    "diffusion_dpo": (functools.partial(train_step, accumulate=baselines.diffusion_dpo), {}),
    "nft": (functools.partial(train_step, accumulate=baselines.nft),
            dict(beta=1.0, kl_weight=1e-4, rollout_old_after=1, learning_rate=1e-3)),
    "awm": (functools.partial(train_step, accumulate=baselines.awm), dict(kl_weight=0.05)),
    "awm_released": (baselines.awm_released_step, dict(clip_range=1.0, kl_weight=0.003, timesteps_per_rollout=6,
                                                       updates_per_rollout=2, old_decay=1.0)),
    "dgpo_sde_rollouts": (baselines.sde_rollouts_step, {}),
    "dgpo_own_noise": (functools.partial(train_step, accumulate=baselines.own_noise), {}),
    "dgpo_plain_signs": (functools.partial(train_step, accumulate=baselines.plain_signs), {}),
}
# What figures call them, and a change of a setting.
NAMES = {
    "dgpo": "DGPO", "dgpo_published": "DGPO, the authors' settings", "flow_grpo": "Flow-GRPO",
    "flow_grpo_fast": "Flow-GRPO Fast", "diffusion_dpo": "Diffusion-DPO", "nft": "DiffusionNFT", "awm": "AWM",
    "awm_released": "AWM as released", "dgpo_sde_rollouts": "DGPO, SDE rollouts",
    "dgpo_own_noise": "DGPO, a noise for each image", "dgpo_plain_signs": "DGPO, plain signs",
    "t_min=0": "no timestep clip", "clip_range=0": "no clip", "kl_weight=0": "no KL term",
    "reference=old": "old policy as reference"}
PEERS = ["dgpo", "dgpo_published", "flow_grpo", "flow_grpo_fast", "diffusion_dpo", "nft", "awm", "awm_released"]
ABLATIONS = {
    "rollouts": ["dgpo", "dgpo:solver=euler", "dgpo_sde_rollouts"],
    "rollout_steps": ["dgpo:num_inference_steps=4", "dgpo", "dgpo:num_inference_steps=8",
                      "dgpo:num_inference_steps=12"],
    "t_min": ["dgpo:t_min=0", "dgpo:t_min=0.1", "dgpo", "dgpo:t_min=0.4", "dgpo:t_min=0.6"],
    "noise": ["dgpo", "dgpo_own_noise"],
    "weights": ["dgpo", "dgpo_plain_signs"],
    # 96 images a step whatever the group size
    "group_size": ["dgpo:group_size=2:groups_per_step=48", "dgpo:group_size=4:groups_per_step=24",
                   "dgpo:group_size=8:groups_per_step=12", "dgpo", "dgpo:group_size=16:groups_per_step=6",
                   "dgpo:group_size=24:groups_per_step=4", "dgpo:group_size=32:groups_per_step=3"],
    "beta": ["dgpo:beta=1", "dgpo", "dgpo:beta=100", "dgpo:beta=1000"],
    "clip": ["dgpo", "dgpo:clip_range=0"],
    "kl": ["dgpo", "dgpo:kl_weight=0"],
    "reference": ["dgpo", "dgpo:reference=old"],
    "timesteps": ["dgpo:timesteps_per_rollout=1:updates_per_rollout=1",
                  "dgpo:timesteps_per_rollout=2:updates_per_rollout=2", "dgpo", "dgpo:updates_per_rollout=1",
                  "dgpo:timesteps_per_rollout=8:updates_per_rollout=8"],
}

TASTE = f"pickscore={ROOT / 'shapes/taste'}"
# The first DGPO of a task is README's command; where that has a guided reference, the same with a plain one follows.
SPELLING, GUIDED = "dgpo:t_min=0.05:num_inference_steps=10", ":reference_guidance_scale=3:kl_weight=0.1"
# Task -> (training prompts, held-out prompts, the reward trained on and then the judges that only watch, methods with
# what the figure calls them).  Besides, all are judged by `quality`.  Flow-GRPO's last or only form is the one that
# came out strongest there.
TASKS = {
    "composition": ("prompts.txt", "heldout.txt", ("shapes", TASTE), {
        "flow_grpo_fast": "Flow-GRPO Fast", "dgpo": "DGPO", "dgpo:t_min=0": "DGPO, no timestep clip"}),
    "words": ("words.txt", "words_heldout.txt", ("words", TASTE), {
        "flow_grpo:num_inference_steps=10": "Flow-GRPO",
        "flow_grpo:sde_window=4:noise_level=1:num_inference_steps=10": "Flow-GRPO, 4 random steps",
        SPELLING + GUIDED + ":learning_rate=0.0014": "DGPO, guided reference", SPELLING: "DGPO",
        "dgpo:t_min=0:num_inference_steps=10": "DGPO, no timestep clip"}),
    "taste": ("prompts.txt", "heldout.txt", (TASTE, "shapes"), {
        "flow_grpo_fast": "Flow-GRPO Fast", "dgpo" + GUIDED: "DGPO, guided reference", "dgpo": "DGPO",
        "dgpo:t_min=0": "DGPO, no timestep clip"}),
}
PICTURED, TILE = 6, 96   # prompts of each task in the figure, and a picture's side there

# ------------------------------------------------------------------------------------------------
# Picture quality, which no reward here sees
# ------------------------------------------------------------------------------------------------


def spread(x, images_a_prompt):
    """How different the pictures of one prompt are: the mean squared distance of two of them, [N, D] -> number."""
    return (2 * x.view(-1, images_a_prompt, x.shape[1]).var(1).sum(1).mean()).item()


def quality(images, rows, images_a_prompt):
    """Generated against rendered pictures of the same prompts, in the VAE's latents.

    `distance`: minus the reward `realism`, 0 for pictures like the rendered ones; `diversity`: 1 for as much of it
    within a prompt.
    """
    prompts = tuple(row["prompt"] for row in rows for _ in range(images_a_prompt))
    generated = vae_features(np.stack([np.asarray(image) for image in images]))
    rendered = rendered_features(prompts)
    return {"distance": -kernel_closeness(generated, rendered).mean().item(),
            "diversity": spread(generated, images_a_prompt) / spread(rendered, images_a_prompt)}


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------


def parse_method(spec, seed, common):
    """`name:setting=value:...` -> (training step, Settings).  Raises UserError for an unknown name."""
    name, *changes = spec.split(":")
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    step, settings = METHODS[name]
    kinds, values = {field.name: field.type for field in dataclasses.fields(flow_grpo.Settings)}, {}
    for key, value in (change.split("=") for change in changes):
        if key not in kinds:
            raise UserError(f"{spec}: no setting is called {key!r}")
        values[key] = kinds[key](value)
    config = flow_grpo.Settings(**{"model": str(EMBEDDED_MODEL), "device": "cpu", "seed": seed, **common, **settings,
                                   **values})
    config.check()
    return step, config


def adamw(model, config):
    """dgpo.train's optimizer."""
    return torch.optim.AdamW(model.lora.weights("current"), lr=config.learning_rate, weight_decay=1e-4)


class Run:
    """One method with one seed, from the base model on."""

    def __init__(self, spec, seed, rows, held_out, rewards, common):
        self.spec, self.rows, self.held_out, self.rewards = spec, rows, held_out, rewards
        self.train_step, self.config = parse_method(spec, seed, common)
        self.model, self.images = load_model(self.config), []
        self.optimizer = adamw(self.model, self.config)
        self.step, self.seconds, self.evaluations, self.counting, self.metrics = 0, 0.0, 0, False, []
        self.model.transformer.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        """A sample's forward pass is one evaluation, its backward pass another (the frozen weights want none)."""
        self.evaluations += self.counting * len(args[0]) * (1 + torch.is_grad_enabled())

    def advance(self):
        """Take one training step."""
        self.counting, start = True, time.process_time()
        torch.manual_seed(self.config.seed * 10 ** 6 + self.step)   # for rules that draw noise of their own
        self.metrics.append(self.train_step(
            self.model, self.optimizer, next(iter(self.rewards.values())), self.rows_of_step(), self.step, self.config))
        self.seconds += time.process_time() - start
        self.step, self.counting = self.step + 1, False

    def rows_of_step(self):
        """The prompts of the next step."""
        return rows_of_step(self.rows, self.step, self.config)

    def evaluate(self, policy="ema"):
        """One line of the results."""
        scores, images = evaluate(self.model, self.rewards, self.held_out, self.config, policy, len(self.held_out))
        summary = summarize(next(iter(scores.values())), self.held_out)
        self.images = images[:PICTURED * self.config.eval_images:self.config.eval_images]
        # Of training: means since the line before, to see what a setting does.
        training = {name: round(mean(metrics[name] for metrics in self.metrics), 5) for name in
                    ("reward_mean", "clip_fraction", "kl", "gradient_norm") if self.metrics}
        self.metrics = []
        images_made = self.step * self.config.groups_per_step * self.config.group_size
        return {"method": self.spec, "seed": self.config.seed, "step": self.step, "seconds": round(self.seconds, 2),
                "images": images_made, "evaluations": self.evaluations, "score": round(summary["score"], 4),
                "error": round(summary["error"], 4),
                "rewards": {name.split("=")[0]: round(score.mean().item(), 4) for name, score in scores.items()},
                **{name: round(value, 5) for name, value in quality(
                    images, self.held_out, self.config.eval_images).items()},
                "training": training,
                "categories": {name: round(value, 4) for name, value in summary["categories"].items()}}


def read_lines(path):
    """The results in a file of them, [] if there is none: list of dicts."""
    return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


def task_prompts(task, limit, reward):
    """The training rows of a task and its first `limit` held-out ones, None for all."""
    prompts, held_out, *_ = TASKS[task]
    return load_prompts(ROOT / "shapes" / prompts, reward), load_prompts(ROOT / "shapes" / held_out, reward)[:limit]


def measure(specs, task, path, seed, budget, evaluations, limit, common):
    """Give every method `budget` seconds of training, in turn, and write an evaluation a line.

    limit: how many held-out prompts, None for all.  Returns the pictures of the first six, a row each, under the base
    model and under every method, from the same noise: a PIL image.
    """
    rewards = {name: load_reward(name) for name in TASKS[task][2]}
    rows, held_out = task_prompts(task, limit, next(iter(rewards.values())))
    runs = [Run(spec, seed, rows, held_out, rewards, common) for spec in specs]
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [line for line in read_lines(path) if line["method"] not in specs]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    base = runs[0].evaluate("frozen")   # the same for all of them
    pictures = [runs[0].images]
    marks = {run: [budget * (k / evaluations) ** 2 for k in range(1, evaluations + 1)] for run in runs}
    with open(path, "a") as file:
        for run in runs:
            file.write(json.dumps({**base, "method": run.spec}) + "\n")
        while any(marks.values()):
            run = min((run for run in runs if marks[run]), key=lambda run: run.seconds)
            run.advance()
            if run.seconds >= marks[run][0]:
                line = run.evaluate()
                marks[run] = [mark for mark in marks[run] if mark > run.seconds]
                file.write(json.dumps(line) + "\n")
                file.flush()
                print(f"{line['method']:50s} seed {seed}  {line['seconds']:6.0f} s  step {line['step']:4d}  "
                      f"score {line['score']:.3f}  distance {line['distance']:.4f}  "
                      f"diversity {line['diversity']:.2f}", flush=True)
    pictures += [run.images for run in runs]
    tiles = [image.resize((TILE, TILE), Image.Resampling.NEAREST) for row in zip(*pictures) for image in row]
    return make_image_grid(tiles, len(tiles) // len(pictures), len(pictures))


def measured(path, specs, budget):
    """Whether a file of results holds all methods to the end of their `budget` seconds: a queue goes on behind it."""
    return set(specs) <= {line["method"] for line in read_lines(path) if line["seconds"] >= budget}


# ------------------------------------------------------------------------------------------------
# Tables and figure
# ------------------------------------------------------------------------------------------------


def load_results(folder, name):
    """dict method -> list, one item a seed, of its lines in order."""
    curves = {}
    for path in sorted(folder.glob(f"{name}-[0-9]*.jsonl")):
        for line in read_lines(path):
            curves.setdefault(line["method"], {}).setdefault(line["seed"], []).append(line)
    return {method: list(seeds.values()) for method, seeds in curves.items()}


def price(curve, level, unit):
    """How much of `unit` a run takes to reach a score, between evaluations by straight lines; infinite if never."""
    for before, after in zip(curve, curve[1:]):
        if after["score"] >= level:
            share = (level - before["score"]) / (after["score"] - before["score"]) if before["score"] < level else 0
            return before[unit] + share * (after[unit] - before[unit])
    return math.inf


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def markdown(header, rows):
    """A Markdown table as text."""
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (header, ["---"] * len(header), *rows))


def speed_table(curves):
    """What each method takes to the levels, in multiples of DGPO's need, and its pictures there: mean over seeds."""
    rows = []
    for unit, scale, digits in ("seconds", 1, 0), ("evaluations", 1000, 0), ("distance", 1, 2), ("diversity", 1, 2):
        prices = {method: [mean(price(curve, level, unit) for curve in seeds) for level in LEVELS]
                  for method, seeds in curves.items()}
        for method, row in prices.items():
            cells = []
            for p, best in zip(row, prices.get("dgpo", row)):
                times = f" ({p / best:.1f}x)" if 0 < best < math.inf and unit in ("seconds", "evaluations") else ""
                cells.append(f"{p / scale:.{digits}f}{times}" if p < math.inf else "-")   # not by every seed
            rows.append([unit if scale == 1 else f"{unit}, thousands", method, *cells])
    return markdown(["to reach", "method", *LEVELS], rows)


def best_of(curves, peer):
    """How much less DGPO needs for the best score that `peer` has anywhere, mean over seeds: a sentence."""
    tops = [max(line["score"] for line in curve) for curve in curves[peer]]
    parts = []
    for unit in ("seconds", "evaluations"):
        ours, theirs = ([price(curve, top, unit) for curve, top in zip(curves[name], tops)] for name in ("dgpo", peer))
        if max(ours) == math.inf:
            return f"{peer}'s best score, {mean(tops):.3f}, is more than DGPO reached with every seed."
        parts.append(f"{mean(b / max(a, 1e-9) for a, b in zip(ours, theirs)):.1f} times fewer {unit}")
    return f"{peer}'s best score, {mean(tops):.3f}, takes DGPO {' and '.join(parts)}."


def quality_table(curves):
    """Where each run ended: mean over seeds, and what it had over DGPO with the same seeds."""
    rows, ours = [], {curve[-1]["seed"]: curve[-1]["score"] for curve in curves.get("dgpo", [])}
    for method, seeds in curves.items():
        last = [curve[-1] for curve in seeds]
        over = [line["score"] - ours[line["seed"]] for line in last if line["seed"] in ours]
        top = mean(max(line["score"] for line in curve) for curve in seeds)
        scores = [line["score"] for line in last]
        around = f" ({min(scores):.3f} to {max(scores):.3f})" if len(scores) > 1 else ""
        rows.append([f"`{method}`", len(seeds), f"{mean(line['step'] for line in last):.0f}",
                     f"{mean(scores):.3f}{around}", f"{mean(over):+.3f}" if over else "", f"{top:.3f}",
                     f"{mean(line['distance'] for line in last):.3f}",
                     f"{mean(line['diversity'] for line in last):.2f}"])
    first = next(iter(curves.values()))[0][0]
    rows.append(["base model", "", 0, f"{first['score']:.3f}", "", "", f"{first['distance']:.3f}",
                 f"{first['diversity']:.2f}"])
    return markdown(["method", "seeds", "steps", "score at the end", "over DGPO's", "best on the way",
                     "distance from rendered pictures", "diversity within a prompt"], rows)


def task_table(folder):
    """Base and methods at the end of each task, under the reward it was trained on and every judge: mean over seeds."""
    columns, rows = ["shapes, strict", "words", "pickscore"], []
    for task in TASKS:
        curves = load_results(folder, f"tasks-{task}")
        base = [curve[0] for curve in next(iter(curves.values()), [])]
        for name, lines in {"base": base, **{name: [curve[-1] for curve in c] for name, c in curves.items()}}.items():
            values = [[line["rewards"].get(column) for line in lines] for column in columns]
            values += [[-line["distance"] for line in lines], [line["diversity"] for line in lines]]
            cells = ["" if None in v or not v else f"{mean(v):.3f}" + (
                f" ({min(v):.3f} to {max(v):.3f})" if min(v) < max(v) else "") for v in values]
            rows.append([task, f"`{name}`", len(lines), *cells])
    return markdown(["task", "model", "seeds", *columns, "realism", "diversity"], rows)


def title(method):
    """What a figure calls a method with the settings that are changed."""
    name, *changes = method.split(":")
    words = [NAMES.get(change, change.replace("_", " ").replace("=", " ")) for change in changes]
    return ", ".join([NAMES.get(name, name), *words])


def panel(heading, prompts, names, grid):
    """A heading, then prompts at the left and a column of pictures under each name: a PIL image.

    grid: the pictures as `measure` returns them, a row a prompt.
    """
    left, top, font = 150, 76, ImageFont.load_default(13)
    whole = Image.new("RGB", (left + TILE * len(names), top + TILE * len(prompts)), "white")
    draw = ImageDraw.Draw(whole)
    draw.text((0, 4), heading, "black", ImageFont.load_default(17))
    for i, name in enumerate(names):
        draw.text((left + TILE * i + 4, top - 4), textwrap.fill(name, 13), "black", font, "ld")
    for i, prompt in enumerate(prompts):
        draw.text((0, top + TILE * i + 6), textwrap.fill(prompt, 20), "black", font)
    whole.paste(grid, (left, top))
    return whole


def join_pictures(folder, count=4):
    """The first seed's pictures of each task's last `count` prompts, a panel a task: a PIL image."""
    panels = []
    for task, (_, held_out, (reward, *_), methods) in TASKS.items():
        grid = Image.open(folder / f"tasks-{task}-0.png")
        prompts = [row["prompt"] for row in load_prompts(ROOT / "shapes" / held_out)[:grid.height // TILE]][-count:]
        names = ["before", *(methods.get(name, title(name)) for name in load_results(folder, f"tasks-{task}"))]
        panels.append(panel(f"{task.capitalize()}: trained on the reward {reward.split('=')[0]}", prompts, names,
                            grid.crop((0, grid.height - TILE * len(prompts), *grid.size))))
    gap = 20
    whole = Image.new("RGB", (max(each.width for each in panels), sum(each.height + gap for each in panels)), "white")
    for i, each in enumerate(panels):
        whole.paste(each, (0, sum(above.height + gap for above in panels[:i])))
    return whole


def draw(curves, path):
    """Score against time, evaluations and the pictures' distance: mean over seeds and, as a band, their range."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 5), sharey=True, layout="constrained")
    for axis, (unit, scale, label) in zip(axes, (("seconds", 60, "minutes of training"),
                                                 ("evaluations", 1000, "transformer evaluations, thousands"),
                                                 ("distance", 1, "distance from rendered pictures (0: like them)"))):
        for method, seeds in curves.items():
            n = min(len(curve) for curve in seeds)
            x = [mean(curve[i][unit] for curve in seeds) / scale for i in range(n)]
            scores = [[curve[i]["score"] for curve in seeds] for i in range(n)]
            line, = axis.plot(x, [mean(s) for s in scores], marker=".", label=title(method),
                              linewidth=2.5 if method == "dgpo" else 1.2)
            if unit != "distance":   # which goes to and fro
                axis.fill_between(x, [min(s) for s in scores], [max(s) for s in scores], color=line.get_color(),
                                  alpha=0.15)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("score on held-out prompts")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=90)


def main(arguments=None):
    """Measure what was asked for, then draw and print all there is of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--budget", type=float, default=10.0, help="minutes of training a run; 0: only report")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--ablation", choices=[*ABLATIONS, "all"])
    parser.add_argument("--tasks", choices=[*TASKS, "all"], help="train on this task, all judges watching")
    parser.add_argument("--methods", help="name:setting=value:...,name,... (default: the peers, or those of --tasks)")
    parser.add_argument("--name", default="claims", help="of the result files, without --ablation")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--evaluations", type=int, default=12, help="how many a run")
    parser.add_argument("--eval-prompts", type=int, help="only the first N held-out prompts")
    parser.add_argument("--eval-images", type=int, default=4)
    args = parser.parse_args(arguments)
    name, specs, tasks = args.name, PEERS, ["composition"]
    if args.ablation:
        name = "ablations"
        names = list(ABLATIONS) if args.ablation == "all" else [args.ablation]
        specs = list(dict.fromkeys(spec for each in names for spec in ABLATIONS[each]))
    if args.tasks:
        tasks = list(TASKS) if args.tasks == "all" else [args.tasks]
    chosen = args.methods.split(",") if args.methods else None
    try:
        for seed in range(args.first_seed, args.first_seed + args.seeds if args.budget else 0):
            for task in tasks:
                path = args.output_dir / f"{f'tasks-{task}' if args.tasks else name}-{seed}.jsonl"
                methods = chosen or ([*TASKS[task][3]] if args.tasks else specs)
                if measured(path, methods, 60 * args.budget):
                    continue
                picture = measure(methods, task, path, seed, 60 * args.budget, args.evaluations, args.eval_prompts,
                                  dict(eval_images=args.eval_images))
                if args.tasks:
                    picture.save(path.with_suffix(".png"))
    except UserError as error:
        sys.exit(f"claims.py: error: {error}")
    if args.tasks:
        if all((args.output_dir / f"tasks-{task}-0.png").exists() for task in TASKS):
            join_pictures(args.output_dir).save(args.output_dir / "tasks.png")
        return print("\n" + task_table(args.output_dir))
    curves = load_results(args.output_dir, name)
    if args.ablation:
        print("\n" + quality_table({spec: curves[spec] for spec in specs if spec in curves}))
    else:
        print("\n" + speed_table(curves) + "\n\n" + quality_table(curves))
        for peer in [method for method in curves if "dgpo" in curves and method != "dgpo"]:
            print(best_of(curves, peer))
        draw(curves, args.output_dir / f"{name}.png")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
