r"""What many processes bring and what they cost: images a second, bytes exchanged, time spent in the exchange.

    python benchmarks/scaling.py --processes 1,2         # the embedded job on this machine's CPU, one thread a process
    python benchmarks/scaling.py --processes 1,2,4,8 --device cuda --flags "--model … --prompt-file … --reward …"

Each line is a run of dgpo.py's own `main` under torchrun, with torch.distributed's operations timed and counted on the
first process; its waiting for the others is part of the exchange.  The first step warms up and is left out.  All
processes of a line share one step's groups, so this is the speed-up of the same training.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def measured_run(arguments):
    """dgpo.py's main with every exchange timed; the first process writes exchange.jsonl, a line a step."""
    import torch
    import torch.distributed as dist

    import dgpo
    spent = {"seconds": 0.0, "bytes": 0, "reductions": 0}

    def now():
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()   # what is launched has not been done yet
        return time.monotonic()

    def timed(function, reduces):
        def call(tensor, *rest):
            start = now()
            function(tensor, *rest)
            spent["seconds"] += now() - start
            if reduces:
                spent["bytes"] += tensor.numel() * tensor.element_size()
                spent["reductions"] += 1
        return call

    def train_step(*rest):
        spent.update(seconds=0.0, bytes=0, reductions=0)
        start, metrics = time.monotonic(), step(*rest)
        if dgpo.processes()[0] == 0:
            with open(os.environ["EXCHANGE"], "a") as file:
                file.write(json.dumps({**spent, "step": time.monotonic() - start}) + "\n")
        return metrics

    step, dgpo.train_step = dgpo.train_step, train_step
    dist.all_reduce, dist.all_gather_object = timed(dist.all_reduce, True), timed(dist.all_gather_object, False)
    os._exit(dgpo.main(arguments))   # as dgpo.py itself ends


def main():
    """Print a Markdown table, a line a number of processes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--flags", default=f"--prompt-file {ROOT / 'shapes/prompts.txt'} --model "
                        f"{ROOT / 'shapes/model'} --eval-prompts 2 --eval-reward=", help="dgpo.py's")
    arguments = parser.parse_args()
    print("| processes | step, s | images/s | speed-up | bytes all-reduced a step | exchange, share of a step |\n"
          "|---|---|---|---|---|---|")
    alone = None
    for count in map(int, arguments.processes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            exchange = Path(folder) / "exchange.jsonl"
            subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
                 __file__, "--child", *shlex.split(arguments.flags), "--device", arguments.device, "--output-dir",
                 Path(folder) / "run", "--steps", str(arguments.steps), "--eval-every", "1000"], check=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env={"OMP_NUM_THREADS": "1", **os.environ, "EXCHANGE": str(exchange)})
            lines = [json.loads(line) for line in exchange.read_text().splitlines()][1:]
            settings = json.loads((Path(folder) / "run/config.json").read_text())
        seconds = statistics.median(line["step"] for line in lines)
        speed = settings["groups_per_step"] * settings["group_size"] / seconds
        alone = alone or speed
        share = statistics.median(line["seconds"] / line["step"] for line in lines)
        print(f"| {count} | {seconds:.2f} | {speed:.1f} | {speed / alone:.2f} | {lines[-1]['bytes']:,} in "
              f"{lines[-1]['reductions']} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    measured_run(sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
