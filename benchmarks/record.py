r"""The speed record: how much training the default job needs to a held-out strict accuracy at which it stays.

    python benchmarks/record.py                                          # three seeds; adds to the results
    python benchmarks/record.py --method dgpo:group_size=24              # a change to try, as in claims.py
    python benchmarks/record.py --seeds 0                                # only print what was measured before

Time is that of one CPU core, as in claims.py, and stands still during evaluations.  It is also given in bare
forwards: divided by the time of 1,000 passes of the transformer alone over 96 images, measured in the same process
before and after, which is what compares between machines.  A level is reached at the first evaluation at which the EMA
weights have it and still have it at the next.  Results: record.jsonl, a line a run; what is there is not repeated.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.claims import Run, markdown, mean, read_lines, task_prompts  # noqa: E402
from rewards import load_reward  # noqa: E402

LEVELS = (0.85, 0.9, 0.95)


@torch.no_grad()
def bare_forwards(model, prompts, count=20):
    """Seconds of 1,000 forward passes of the transformer alone over 96 latents, from `count` of them."""
    x = torch.randn(96, *model.latent_shape, device=model.device)
    sigma = torch.full((96,), 500.0, device=model.device)
    model.encode(prompts)
    embeddings = model.embeddings((prompts * 96)[:96])
    model.lora.select("frozen")
    start = time.process_time()
    for _ in range(count):
        model.transformer(x, *embeddings, sigma, return_dict=False)
    return (time.process_time() - start) * 1000 / count


def reached(curve, level):
    """The seconds at the first of two evaluations in a row at or above the level, or None; curve: (seconds, score)s."""
    return next((a[0] for a, b in zip(curve, curve[1:]) if min(a[1], b[1]) >= level), None)


def measure(spec, seed, steps, every, limit=None, kind=Run):
    """Train one run, a `kind`, and evaluate it every so many steps: what record.jsonl says of it."""
    reward = load_reward("shapes")
    rows, held_out = task_prompts("composition", limit, reward)
    run = kind(spec, seed, rows, held_out, {"shapes": reward}, {})
    texts = [row["prompt"] for row in held_out]
    bare, lines = [bare_forwards(run.model, texts)], [run.evaluate("frozen")]
    while run.step < steps:
        run.advance()
        if run.step % every == 0:
            lines.append(run.evaluate())
            print(f"{spec}  seed {seed}  step {run.step}  {run.seconds:.0f} s  {lines[-1]['score']:.3f}  distance "
                  f"{lines[-1]['distance']:.3f}  diversity {lines[-1]['diversity']:.2f}", flush=True)
    bare.append(bare_forwards(run.model, texts))
    return {"method": spec, "seed": seed, "date": time.strftime("%Y-%m-%d"),
            "bare": round(mean(bare), 1),
            "curve": [[line[name] for name in ("seconds", "score", "distance", "diversity")] for line in lines],
            "step": run.step, "categories": lines[-1]["categories"]}


def table(runs):
    """A row a method: what it took to each level, in seconds and in 1,000s of bare forwards, and where it ended."""
    rows = []
    for method in dict.fromkeys(run["method"] for run in runs):
        mine = [run for run in runs if run["method"] == method]
        cells = []
        for level in LEVELS:
            taken = [reached(run["curve"], level) for run in mine]
            counts = [seconds / run["bare"] for seconds, run in zip(taken, mine) if seconds is not None]
            cells.append(f"{mean(s for s in taken if s is not None):.0f} s, {mean(counts):.2f}" + (
                f" ({len(counts)} of {len(mine)})" if len(counts) < len(mine) else "") if counts else "-")
        scores = [run["curve"][-1][1] for run in mine]
        rows.append([mine[-1]["date"], f"`{method}`", len(mine), *cells,
                     f"{mean(scores):.3f} ({min(scores):.3f} to {max(scores):.3f})", mine[0]["step"],
                     *(f"{mean(run['curve'][-1][i] * sign for run in mine):.2f}" for i, sign in ((2, -1), (3, 1)))])
    return markdown(["date", "method", "seeds", *(f"to {level}" for level in LEVELS), "at the end", "steps", "realism",
                     "diversity"], rows)


def main(arguments=None):
    """Measure what is not there yet, then print all there is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--method", default="dgpo", help="name:setting=value:..., as in claims.py")
    parser.add_argument("--seeds", type=int, default=3, help="how many; 0: only print")
    parser.add_argument("--steps", type=int, default=125)
    parser.add_argument("--every", type=int, default=25, help="steps between evaluations")
    parser.add_argument("--eval-prompts", type=int, help="only the first N held-out prompts")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/record.jsonl")
    args = parser.parse_args(arguments)
    runs = read_lines(args.results)
    for seed in range(args.seeds):
        if any((run["method"], run["seed"]) == (args.method, seed) for run in runs):
            continue
        runs.append(measure(args.method, seed, args.steps, args.every, args.eval_prompts))
        with open(args.results, "a") as file:
            file.write(json.dumps(runs[-1]) + "\n")
    print(table(runs))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
