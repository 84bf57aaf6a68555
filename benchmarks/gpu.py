r"""SD3.5-M's training step on one GPU, at full size with random weights: what is fast, what is not, in one table.

    python benchmarks/gpu.py                                   # all of it, 8 minutes or so on an H100; wants peft
    python benchmarks/gpu.py --only authors,compiled           # some of its sections
    python benchmarks/gpu.py --preset tiny --repeats 1         # the same code on a CPU, 3 minutes

512x512, 10 solver steps, guidance 4.5, 4 timesteps and one optimizer step an update, groups of 6; medians after a
warm-up, the device waited for.  "samples" of an update are an image at a timestep.  `authors` is the structure of the
authors' published code: their pipeline's sampling loop with diffusers' scheduler, peft, one backward pass a timestep.
A section makes its model anew, so that one that fails costs only its own rows; what matters most comes first.
"""

import argparse
import collections
import gc
import resource
import statistics
import sys
import time
import traceback
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, SD3Transformer2DModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.throughput import PRESETS, bare_rollout, bare_update, random_model, seconds  # noqa: E402
from dgpo import SD3, Config, dgpo_loss, draw_noise, group_advantages, rollout, seeded, update  # noqa: E402

G = 6   # images a group: no batch of an update is smaller


class Bench:
    """One model with random weights, and what its rollouts and updates take."""

    def __init__(self, args, batch_size=24):
        self.args, self.preset, self.images = args, PRESETS[args.preset], batch_size
        self.config = Config(**{
            **self.preset["settings"], "guidance_scale": 4.5, "device": args.device, "batch_size": batch_size,
            "group_size": G, "groups_per_step": self.images // G, "gradient_checkpointing": False})
        self.prompts = [f"prompt {i}" for i in range(self.images // G)]
        self.repeated = [prompt for prompt in self.prompts for _ in range(G)]
        self.model = random_model(self.preset, self.config, self.prompts)
        self.optimizer = torch.optim.AdamW(self.model.lora.weights("current"), lr=1e-6)
        self.x0 = torch.randn(len(self.prompts), G, *self.model.latent_shape).to(args.device)
        self.advantages = group_advantages(torch.rand(len(self.prompts), G)).to(args.device)
        self.samples = self.images * self.config.timesteps_per_rollout

    def generators(self):
        return [seeded("gpu", i) for i in range(len(self.prompts))]

    def rollout(self, steps=None):
        rollout(self.model, [{"prompt": prompt} for prompt in self.prompts], G, self.generators(),
                steps or self.config.num_inference_steps, "current", self.config)

    def update(self):
        update(self.model, self.optimizer, self.x0, self.prompts, self.advantages, self.generators(), 0, self.config)

    def latents(self, count):
        return torch.randn(count, *self.model.latent_shape, device=self.args.device)


def median(function, args, repeats=None):
    """Median seconds of a call; the caller has warmed it up."""
    return statistics.median(seconds(function, torch.device(args.device)) for _ in range(repeats or args.repeats))


def peak(args, function):
    """Gigabytes that were taken at most while a function ran, with what was there before."""
    if args.device == "cpu":
        function()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() / 1e9


COLUMNS = ("what", "batch", "rollout, images/s", "update, samples/s", "peak of update, GB", "seconds", "note")


def row(what, batch="", rollout="", update="", peak="", seconds="", note=""):
    """One line of the table, at once: a run that is cut off has the others'."""
    cells = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in (
        what, batch, rollout, update, peak, seconds, note)]
    print("| " + " | ".join(cells) + " |", flush=True)


def batches(args, sizes):
    """Rollouts and updates at several --batch-size, with and without gradient checkpointing."""
    for size in sizes:
        bench, rollouts = Bench(args, size), None
        for checkpointing in (False, True):
            try:
                if rollouts is None:
                    bench.rollout(2)
                    rollouts = bench.images / median(bench.rollout, args)
                if checkpointing:
                    bench.model.transformer.enable_gradient_checkpointing()
                memory = peak(args, bench.update)   # the warm-up
                updates = bench.samples / median(bench.update, args)
                row("dgpo.py" + ", checkpointing" * checkpointing, size, rollouts, updates, memory)
            except torch.OutOfMemoryError:
                row("dgpo.py" + ", checkpointing" * checkpointing, size, rollouts or "", "out of memory")
            free()


def share(args):
    """The step against the transformer calls in it, in turn."""
    bench = Bench(args)
    parts = {"rollout": bench.rollout, "bare rollout": lambda: bare_rollout(bench.model, bench.repeated, bench.config),
             "update": bench.update, "bare update": lambda: bare_update(
                 bench.model, bench.repeated * bench.config.timesteps_per_rollout, bench.config)}
    times = collections.defaultdict(list)
    for repeat in range(args.repeats + 1):
        for name, function in parts.items():
            times[name].append(median(function, args, 1))
    ours, bare = (sum(statistics.median(times[kind + name][1:]) for name in ("rollout", "update"))
                  for kind in ("", "bare "))
    row("share that is not the transformer's", 24, seconds=ours, note=f"bare {bare:.3g} s, so {1 - bare / ours:.1%}; "
        + ", ".join(f"{name} {statistics.median(found[1:]):.3g} s" for name, found in times.items()))


def vae(args):
    """Decoding, as dgpo.py does and channels last."""
    bench = Bench(args)
    x0 = bench.latents(24)
    for layout in (torch.contiguous_format, torch.channels_last):
        bench.model.vae.to(memory_format=layout)
        bench.model.decode(x0)
        taken = median(lambda: bench.model.decode(x0), args)
        row(f"decoding, {str(layout).split('.')[1]}", 24, seconds=taken, note=f"{24 / taken:.3g} images/s")


def two_policies(args):
    """The velocities of frozen and old policy, one by one and in one batch of twice the size."""
    bench = Bench(args)
    model, layers = bench.model, bench.model.lora.layers.values()

    def half(layer, inputs, output):   # the LoRA for the second half of a batch, in place of dgpo.py's
        if getattr(layer, "half_pair", None):
            down, up = (t.to(output.dtype) for t in layer.half_pair)
            middle = len(output) // 2
            output[middle:] += F.linear(F.linear(inputs[0][middle:], model.lora.scale * down), up)
        return output

    for layer in layers:
        layer.register_forward_hook(half)
    for size in (6, 24):
        x, prompts = bench.latents(size), (bench.repeated * size)[:size]

        @torch.no_grad()
        def apart():
            for policy in ("frozen", "old"):
                model.velocity(x, 0.7, prompts, policy)

        @torch.no_grad()
        def together():
            old = model.lora.weights("old")
            for i, layer in enumerate(layers):
                layer.half_pair = old[2 * i:2 * i + 2]
            model.velocity(torch.cat([x, x]), 0.7, prompts * 2, "frozen")
            for layer in layers:
                layer.half_pair = None

        for name, function in (("one by one", apart), ("in one batch", together)):
            function()
            row(f"frozen and old, {name}", size, seconds=median(function, args, 3 * args.repeats))


def synchronisation(args):
    """Where the host waits for the device in a rollout and an update."""
    if args.device == "cpu":
        return row("host synchronisation", note="only on a GPU")
    bench = Bench(args, 6)
    bench.rollout(), bench.update()
    for name, function in (("rollout of 6", bench.rollout), ("update of 6", bench.update)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            function()
            torch.cuda.set_sync_debug_mode("default")
        places = collections.Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(
            w.message))
        row(f"host waits, {name}", 6, note=f"{sum(places.values())}: " + ", ".join(
            f"{count} at {place}" for place, count in places.most_common(8)))


def offload(args):
    """Text encoders of the real size, empty, to the device and back."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel
    tiny = args.preset == "tiny"
    with torch.device("meta"):
        encoders = torch.nn.ModuleList([T5EncoderModel(T5Config(
            d_model=4096, d_kv=64, d_ff=10240, num_heads=64, num_layers=2 if tiny else 24,
            feed_forward_proj="gated-gelu"))])
        encoders += [CLIPTextModelWithProjection(CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
            projection_dim=width)) for width, layers in ((768, 12), (1280, 32))][:0 if tiny else 2]
    encoders = encoders.to(torch.bfloat16).to_empty(device="cpu")
    encoders.to(args.device), encoders.to("cpu")
    there, back = zip(*((seconds(lambda: encoders.to(args.device), torch.device(args.device)),
                         seconds(lambda: encoders.to("cpu"), torch.device(args.device))) for _ in range(2)))
    size = sum(t.numel() * t.element_size() for t in encoders.parameters()) / 1e9
    row(f"text encoders, {size:.1f} GB, offloaded", seconds=min(there) + min(back),
        note=f"to the device {min(there):.3g} s, back {min(back):.3g} s, each step")


def compiled(args, sizes):
    """The transformer's repeated blocks compiled."""
    import torch._dynamo
    for limit in ("recompile_limit", "cache_size_limit", "accumulated_recompile_limit"):
        if hasattr(torch._dynamo.config, limit):   # a graph for each kind of block, policy, batch and gradient or not
            setattr(torch._dynamo.config, limit, 256)
    for size in sizes:
        bench = Bench(args, size)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for block in bench.model.transformer.transformer_blocks:   # compile_repeated_blocks() knows none of SD3's
            block.compile(dynamic=False)
        first = seconds(lambda: bench.rollout(1), torch.device(args.device)), seconds(
            bench.update, torch.device(args.device))
        rollouts, updates = bench.images / median(bench.rollout, args), bench.samples / median(bench.update, args)
        counts = torch._dynamo.utils.counters
        row("compiled blocks", size, rollouts, updates, peak(args, bench.update), note=(
            f"first rollout {first[0]:.3g} s, first update {first[1]:.3g} s; {counts['stats']['unique_graphs']} "
            f"graphs, {sum(counts['graph_break'].values())} graph breaks"))
        free()


def authors(args):
    """The same step in the structure of the authors' code, with the frozen weights in bfloat16 and, as they load them,
    in float32; both under autocast to bfloat16."""
    from peft import LoraConfig, get_peft_model
    device = torch.device(args.device)
    for dtype, size in ((torch.bfloat16, 12), (torch.bfloat16, 24), (torch.float32, 24), (torch.float32, 12)):
        name = f"authors' structure, {str(dtype).split('.')[1]} weights"
        try:
            Authors(args, dtype, size, LoraConfig, get_peft_model).measure(name, device)
        except torch.OutOfMemoryError:
            row(name, size, note="out of memory")
        free()


class Authors:
    """One batch of rollouts and the update on it, as scripts/train_sd3_dgpo.py of the authors' repository has them."""

    def __init__(self, args, dtype, batch_size, LoraConfig, get_peft_model):
        self.args, self.B, preset = args, batch_size, PRESETS[args.preset]
        self.config = Config(**{**preset["settings"], "guidance_scale": 4.5})
        with torch.device(args.device):
            torch.set_default_dtype(dtype)
            transformer = SD3Transformer2DModel.from_config(preset["transformer"]).requires_grad_(False)
            torch.set_default_dtype(torch.float32)
            self.vae = AutoencoderKL.from_config(preset["vae"]).requires_grad_(False)
            embeds = [torch.randn(batch_size, *shape, dtype=torch.bfloat16) for shape in (
                (preset["tokens"], preset["transformer"]["joint_attention_dim"]),
                (preset["transformer"]["pooled_projection_dim"],))]
        self.transformer = get_peft_model(transformer, LoraConfig(
            r=self.config.lora_rank, lora_alpha=2 * self.config.lora_rank, init_lora_weights="gaussian",
            target_modules=list(SD3.lora_targets)))
        self.parameters = [p for p in self.transformer.parameters() if p.requires_grad]
        assert all(p.dtype == torch.float32 for p in self.parameters)
        self.ema = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, weight_decay=1e-4)
        self.embeds, self.empty = embeds, [torch.randn_like(t[:1]).expand_as(t) for t in embeds]
        side = self.config.resolution // 8 if args.preset != "tiny" else preset["transformer"]["sample_size"]
        self.shape = (preset["transformer"]["in_channels"], side, side)
        self.scheduler = DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", algorithm_type="dpmsolver++")
        self.x0 = torch.randn(batch_size, *self.shape, device=args.device)

    def velocity(self, x, t, embeds, pooled):
        with torch.autocast(torch.device(self.args.device).type, torch.bfloat16):
            return self.transformer(hidden_states=x, timestep=t, encoder_hidden_states=embeds,
                                    pooled_projections=pooled, return_dict=False)[0].float()

    @torch.no_grad()
    def rollout(self, steps=None):
        both = [torch.cat(pair) for pair in zip(self.empty, self.embeds)]
        latents = torch.randn(self.B, *self.shape, device=self.args.device, dtype=torch.bfloat16)
        self.scheduler.set_timesteps(steps or self.config.num_inference_steps, device=self.args.device)
        every_latents, log_probs = [latents], []
        for t in self.scheduler.timesteps:
            inputs = torch.cat([latents] * 2)
            v = self.velocity(inputs, t.expand(len(inputs)), *both).to(both[0].dtype)
            v_empty, v_text = v.chunk(2)
            v = v_empty + self.config.guidance_scale * (v_text - v_empty)
            latents = self.scheduler.step(v, t, latents, return_dict=False)[0]
            log_probs.append(latents.clone().reshape(self.B, -1).mean(1))
            every_latents.append(latents)
        x0 = latents.float() / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return (self.vae.decode(x0, return_dict=False)[0] / 2 + 0.5).clamp(0, 1), every_latents

    def update(self):
        M = self.config.timesteps_per_rollout
        for t in self.scheduler.timesteps[:M]:   # whose order makes no difference to the time
            t, sigma = t.expand(self.B), (t / 1000).expand(self.B).reshape(-1, 1, 1, 1)
            noise = draw_noise([seeded(i) for i in range(self.B // G)], *self.shape).to(self.x0.device)
            noise = noise.repeat_interleave(G, 0)
            x_t, target = (1 - sigma) * self.x0 + sigma * noise, noise - self.x0
            with torch.no_grad():
                with self.transformer.disable_adapter():
                    v_ref = self.velocity(x_t, t, *self.embeds)
                current = [p.detach().clone() for p in self.parameters]
                for p, old in zip(self.parameters, self.ema):
                    p.data.copy_(old)
                v_old = self.velocity(x_t, t, *self.embeds)
                for p, kept in zip(self.parameters, current):
                    p.data.copy_(kept)
            v = self.velocity(x_t, t, *self.embeds)
            error, old_error, ref_error = ((target - u).square().flatten(1).mean(1) for u in (v, v_old, v_ref))
            A = torch.linspace(-1, 1, self.B, device=error.device)
            ratio = torch.exp(old_error - error)
            past = torch.where(A > 0, ratio > 1.01, ratio < 0.99)
            error = torch.where(past, error.detach(), error)
            loss = dgpo_loss(error.view(-1, G), ref_error.view(-1, G), A.view(-1, G), self.config.beta)
            ((loss + self.config.kl_weight * (v - v_ref).square().flatten(1).mean(1).mean()) / M).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for old, p in zip(self.ema, self.parameters):
            old.lerp_(p.detach(), 0.7)

    def measure(self, name, device):
        self.rollout(2)
        rollouts = self.B / median(self.rollout, self.args)
        memory = peak(self.args, self.update)
        updates = self.B * self.config.timesteps_per_rollout / median(self.update, self.args)
        row(name, self.B, rollouts, updates, memory)


def free():
    """Give memory back that no section holds any longer."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


SECTIONS = {
    "batches": partial(batches, sizes=(24, 6, 12)), "authors": authors, "synchronisation": synchronisation,
    "compiled": partial(compiled, sizes=(24,)), "share": share, "two_policies": two_policies, "vae": vae,
    "offload": offload, "batch_48": partial(batches, sizes=(48,)), "compiled_6": partial(compiled, sizes=(6,))}


def main(arguments=None):
    """Print a Markdown table, a row at a time."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="sd3.5-medium")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=7.0, help="no section is begun after that")
    args, start = parser.parse_args(arguments), time.monotonic()
    print(f"{torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU'}, torch {torch.__version__}\n")
    row(*COLUMNS)
    row(*["---"] * len(COLUMNS))
    for name in args.only.split(","):
        if time.monotonic() - start > 60 * args.minutes:
            row(name, note="no time left")
            continue
        try:
            SECTIONS[name](args)
        except Exception as error:
            traceback.print_exc()
            row(name, note=f"failed: {type(error).__name__}")
        free()
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
