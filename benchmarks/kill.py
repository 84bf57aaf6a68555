r"""Kill a run at random moments and resume it until it is done: is it, bit for bit, the run that was never touched?

    python benchmarks/kill.py --kills 50                 # SIGKILL
    python benchmarks/kill.py --kills 50 --damage        # and every other time its checkpoint is cut off as well
    python benchmarks/kill.py --kills 50 --processes 2   # the same through torchrun, whose processes all die at once

A run is the embedded job made small, of `--steps` steps of well under a second.  Half of the kills strike before a
(re)started run has logged its first line, the others after.  A checkpoint that was cut off must be refused in a
sentence, and the whole one is put back; no kill leaves such a file.  As many runs are made as the kills need; each is
compared with the calm one: metrics.jsonl without its times, the exported LoRAs, the last checkpoint's tensors and the
pictures.  Prints a row of a Markdown table.  Linux only.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ("--device cpu --reward jpeg_incompressibility --lora-rank 4 --groups-per-step 2 --group-size 3 "
            "--num-inference-steps 2 --timesteps-per-rollout 2 --updates-per-rollout 2 --eval-prompts 2 "
            "--eval-images 2 --eval-num-inference-steps 2 --save-every 3 --eval-every 5").split()


def start(folder, steps, processes, resume):
    """dgpo.py in a new session, directly or by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    begin = ["--prompt-file", ROOT / "shapes/prompts.txt", "--output-dir", folder, "--steps", str(steps), *SETTINGS]
    return subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), ROOT / "dgpo.py",
         *(["--resume", folder] if resume else begin)],
        stdout=subprocess.DEVNULL, stderr=open(f"{folder}.log", "ab"), start_new_session=True)


def family(pid):
    """A process and all its descendants, which torchrun puts in sessions of their own."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [pid] + [p for child in (children.read_text().split() if children.exists() else ())
                    for p in family(int(child))]


def kill(process):
    """SIGKILL to all of them, before any can see another die."""
    pids = family(process.pid)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
              for pid in pids):
        time.sleep(0.01)


def lines(folder):
    """The lines of metrics.jsonl without the times; a killed run's last one may be half a line."""
    path = folder / "metrics.jsonl"
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    return [{key: value for key, value in json.loads(line).items() if not key.startswith("seconds")}
            for line in whole.splitlines()]


def load(folder):
    """What the checkpoint of a run's folder holds; {} if there is none yet."""
    path = folder / "checkpoint.pt"
    return torch.load(path, weights_only=True) if path.exists() else {}


def refused(folder, steps, processes, rng):
    """Whether a run whose checkpoint is cut off anywhere is refused in a sentence; it is whole again afterwards."""
    path, log = folder / "checkpoint.pt", Path(f"{folder}.log")
    content, before = path.read_bytes(), log.stat().st_size
    path.write_bytes(content[:rng.randrange(len(content))])
    code = start(folder, steps, processes, True).wait()
    path.write_bytes(content)
    said = log.read_bytes()[before:]
    return code != 0 and b"dgpo.py: error: " in said and b"cannot be used; --lora " in said


def tensors(checkpoint):
    """dict name -> tensor of a checkpoint's LoRA and of AdamW's state."""
    moments = {f"{i} {name}": t for i, state in checkpoint["optimizer"]["state"].items() for name, t in state.items()}
    return {**checkpoint["lora"], **moments}


def difference(folder, calm):
    """What of a finished run differs from the calm one: a list of names."""
    found = [] if lines(folder) == lines(calm) else ["metrics.jsonl"]
    # A checkpoint holds the policies' tensors and the optimizer's (and metrics, whose times differ).
    ours, theirs = (tensors(load(f)) for f in (folder, calm))
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
        found.append("checkpoint")
    names = {str(path.relative_to(f)) for f in (folder, calm) for pattern in ("*.png", "*.safetensors")
             for path in f.rglob(pattern)}
    return found + [name for name in sorted(names) if not (folder / name).exists() or not (calm / name).exists()
                    or (folder / name).read_bytes() != (calm / name).read_bytes()]


def main():
    """Print one row of a table in README.  Exit code 1 if any run differed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--damage", action="store_true")
    parser.add_argument("--steps", type=int, default=30, help="of a run")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, count = random.Random(arguments.seed), {"runs": 0, "kills": 0, "cut": 0, "refused": 0, "redone": 0}
    with tempfile.TemporaryDirectory() as place:
        calm = Path(place) / "calm"
        began, first = time.monotonic(), None
        process = start(calm, arguments.steps, arguments.processes, False)
        while process.poll() is None:
            if first is None and lines(calm):
                first = time.monotonic() - began   # how long a run takes to its first line
            time.sleep(0.01)
        if process.returncode:
            sys.exit(Path(f"{calm}.log").read_text())
        differing = []
        while count["kills"] < arguments.kills:
            folder = Path(place) / f"run{count['runs']}"
            while True:
                process = start(folder, arguments.steps, arguments.processes, (folder / "config.json").exists())
                delay = rng.uniform(0, 2 * first) if count["kills"] < arguments.kills else None
                try:
                    process.wait(delay)
                except subprocess.TimeoutExpired:
                    kill(process)
                if process.returncode == 0:
                    break
                if process.returncode != -signal.SIGKILL:
                    sys.exit(Path(f"{folder}.log").read_text())
                count["kills"] += 1
                logged, saved = ([line["step"] for line in found] for found in (
                    lines(folder), load(folder).get("lines", [])))
                if arguments.damage and saved and rng.random() < 0.5:
                    count["cut"] += 1
                    count["refused"] += refused(folder, arguments.steps, arguments.processes, rng)
                count["redone"] += max(logged, default=0) - max(saved, default=0)
            differing += [f"run {count['runs']}: {name}" for name in difference(folder, calm)]
            count["runs"] += 1
    columns = {"processes": arguments.processes, "runs of steps": f"{count['runs']} of {arguments.steps}",
               "SIGKILL": count["kills"], "checkpoints cut off": count["cut"], "of them refused": count["refused"],
               "steps done twice": count["redone"], "what was lost": ", ".join(differing) or "nothing"}
    for row in (columns, ["---"] * len(columns), columns.values()):
        print("| " + " | ".join(map(str, row)) + " |")
    sys.exit(bool(differing) or count["cut"] != count["refused"])


if __name__ == "__main__":
    main()
