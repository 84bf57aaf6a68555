r"""How fast a training step is, and how much of it is not the transformer's own time.

    python benchmarks/throughput.py                       # Stable Diffusion 3.5 Medium, 512x512, on the device there is
    python benchmarks/throughput.py --preset tiny         # a few seconds on a CPU
    python benchmarks/throughput.py --preset embedded --groups-per-step 8 --group-size 12 --batch-size 96 \
        --repeats 15                                      # the default job's step, random weights
    python benchmarks/throughput.py --full-size           # dgpo.py itself on a pipeline of SD3.5-M's size, about 8 GB
    python benchmarks/throughput.py --count-memory        # what a step keeps on the device, counted on any machine
    python benchmarks/throughput.py --count-memory --transformer FluxTransformer2DModel   # weights, LoRA of any model

Transformer and VAE are built at full size with random weights from the configurations below, so nothing is downloaded;
prompt embeddings are random too, as the text encoders take no part in a step.  Every repetition times, in turn and in
one process, dgpo.py's own `rollout` and `update` and the bare transformer calls that they cannot do without: the same
forwards and backwards, with the same LoRA and batch sizes, called directly and with nothing around them.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dgpo  # noqa: E402
from adapters.any_pipeline import AnyPipeline  # noqa: E402
from dgpo import EMBEDDED_MODEL, PAPER, SD3, Config, LoRA, group_advantages, rollout, seeded, update  # noqa: E402

# `tokens`: text tokens a prompt, 77 of CLIP and those of T5; `settings`: those of dgpo.py.
PRESETS = {
    "sd3.5-medium": {
        "transformer": dict(
            sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
            num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
            pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
        "vae": dict(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16, layers_per_block=2, norm_num_groups=32,
            scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        "tokens": 77 + PAPER["max_sequence_length"],
        "settings": PAPER},
    "tiny": {
        "transformer": dict(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
            pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm"),
        "vae": dict(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, layers_per_block=1, scaling_factor=1.0,
            shift_factor=0.0, use_quant_conv=False, use_post_quant_conv=False),
        "tokens": 10,
        "settings": dict(num_inference_steps=4, lora_rank=4, updates_per_rollout=1)},
    "embedded": {
        "transformer": SD3Transformer2DModel.load_config(EMBEDDED_MODEL / "transformer"),
        "vae": AutoencoderKL.load_config(EMBEDDED_MODEL / "vae"), "tokens": 11, "settings": {}},
}


def random_model(preset, config, prompts):
    """The SD3 class of dgpo.py around random weights, with random embeddings for the prompts."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, config.dtype))
    with torch.device(config.device):
        transformer = SD3Transformer2DModel.from_config(preset["transformer"])
    torch.set_default_dtype(default)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, vae=AutoencoderKL.from_config(preset["vae"]),
        scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, text_encoder_3=None, tokenizer_3=None)
    model = SD3(pipe, config)
    width, pooled = (preset["transformer"][f"{name}_dim"] for name in ("joint_attention", "pooled_projection"))
    model.texts = {prompt: tuple(torch.randn(*shape, device=model.device, dtype=transformer.dtype) for shape in (
        (preset["tokens"], width), (pooled,))) for prompt in ("", *prompts)}
    model.encode = lambda prompts: None   # there is nothing to encode with
    return model


def seconds(function, device):
    """Wall-clock seconds of a call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def bare_rollout(model, prompts, config):
    """The transformer calls of a rollout and nothing else: [B] images in batches, one forward a step."""
    for i in range(0, len(prompts), config.batch_size):
        batch = prompts[i:i + config.batch_size]
        x = torch.randn(len(batch), *model.latent_shape, device=model.device)
        for _ in range(config.num_inference_steps):
            with torch.no_grad():
                model.velocity(x, 0.5, batch, "current", config.guidance_scale)


def bare_update(model, prompts, config):
    """The transformer calls of an update: reference, old policy, and the current one forward and backward."""
    for i in range(0, len(prompts), config.batch_size):
        batch = prompts[i:i + config.batch_size]
        x = torch.randn(len(batch), *model.latent_shape, device=model.device)
        with torch.no_grad():
            for policy in ("frozen", "old"):
                model.velocity(x, 0.5, batch, policy)
        model.velocity(x, 0.5, batch, "current").sum().backward()
    for tensor in model.lora.weights("current"):
        tensor.grad = None


def measure(preset, config, repeats):
    """Median seconds over the repetitions: dict with rollout, update and their bare counterparts, and peak memory."""
    prompts = [f"prompt {i}" for i in range(config.groups_per_step)]
    model = random_model(preset, config, prompts)
    P, G = config.groups_per_step, config.group_size
    repeated = [prompt for prompt in prompts for _ in range(G)]
    optimizer = torch.optim.AdamW(model.lora.weights("current"), lr=1e-6)
    advantages = group_advantages(torch.rand(P, G)).to(model.device)
    rows, x0 = [{"prompt": prompt} for prompt in prompts], torch.randn(P, G, *model.latent_shape).to(model.device)

    def generators():
        return [seeded("throughput", i) for i in range(P)]

    parts = {
        "rollout": lambda: rollout(model, rows, G, generators(), config.num_inference_steps, "current", config),
        "bare_rollout": lambda: bare_rollout(model, repeated, config),
        "update": lambda: update(model, optimizer, x0, prompts, advantages, generators(), 0, config),
        "bare_update": lambda: bare_update(model, repeated * config.timesteps_per_rollout, config)}
    times = {name: [] for name in parts}
    for repeat in range(repeats + 1):   # the first warms up: compiling, choosing kernels
        for name, function in parts.items():
            times[name].append(seconds(function, model.device))
        if repeat == 0 and model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    memory = (torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda"
              else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return medians | {"first_step": times["rollout"][0] + times["update"][0], "peak_memory": memory}


def count_memory(preset, config):
    """Gigabytes that training keeps, counted tensor by tensor in one forward pass of one sample: dict of floats.

    What autograd saves is caught with hooks, so a CPU will do (its fused attention saves what a GPU's does).  With
    gradient checkpointing, the inputs of all blocks are kept and, while its gradient is taken, one block's activations.
    """
    model = random_model(preset, config, ["prompt"])
    lora = model.lora.weights("current")
    weights = {t.untyped_storage().data_ptr() for t in [*model.transformer.parameters(), *lora]}
    saved, inputs, saved_before = {}, {}, []

    def keep(found, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    def enter_block(module, args, kwargs):
        saved_before.append(sum(saved.values()))
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                keep(inputs, value)

    for block in model.transformer.transformer_blocks:
        block.register_forward_pre_hook(enter_block, with_kwargs=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: keep(saved, t), lambda t: t):
        v = model.velocity(torch.randn(1, *model.latent_shape), 0.5, ["prompt"], "current")
    whole = sum(saved.values())
    blocks = [after - before for before, after in zip(saved_before, [*saved_before[1:], whole])]
    sizes = {"transformer": sum(p.numel() * p.element_size() for p in model.transformer.parameters()),
             "VAE": sum(p.numel() * p.element_size() for p in model.vae.parameters()),
             # current, old and EMA weights, a gradient, and AdamW's two moments
             "LoRA, policies and optimizer": 6 * sum(t.numel() * t.element_size() for t in lora),
             "activations of a sample": whole,
             "with gradient checkpointing": sum(inputs.values()) + max(blocks)}
    assert v.requires_grad   # what was saved is alive up to here, so no address was counted for two tensors
    return {name: size / 1e9 for name, size in sizes.items()}


def count_transformer(name, path):
    """Gigabytes of any diffusers transformer of that class in bfloat16, of a config.json or the class's own sizes, and
    of its LoRA of rank 64, policies, gradient and AdamW: dict of floats.  Counted on tensors that hold no values."""
    kind = getattr(diffusers, name)
    with torch.device("meta"):
        transformer = kind.from_config(kind.load_config(path) if path else {})
    parameters = sum(p.numel() for p in transformer.parameters())
    lora = LoRA(transformer, 64, AnyPipeline.lora_targets).weights("current")
    return {"parameters, billions": parameters / 1e9, "transformer, GB": 2 * parameters / 1e9,
            "LoRA, policies and optimizer, GB": 6 * 4 * sum(t.numel() for t in lora) / 1e9}


def save_pipeline(folder, preset):
    """Write a whole pipeline with random weights in bfloat16, as diffusers would: SD3.5-M with all that it has, but for
    22 of T5-XXL's 24 layers and the tokenizers' vocabularies; of another preset with encoders as small as that."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

    from shapes.train_base import build_tokenizer
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    width, pooled = (preset["transformer"][f"{name}_dim"] for name in ("joint_attention", "pooled_projection"))
    full, clip_tokenizer = width == 4096, build_tokenizer()
    clip_tokenizer.model_max_length = 77
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    letters += [(chr(c), -3.0) for c in range(97, 123)]

    def clip(width, layers, activation):
        return CLIPTextModelWithProjection(CLIPTextConfig(
            vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=max(1, width // 64), projection_dim=width, hidden_act=activation,
            bos_token_id=clip_tokenizer.bos_token_id, eos_token_id=clip_tokenizer.eos_token_id))

    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel.from_config(preset["transformer"]),
        vae=AutoencoderKL.from_config(preset["vae"]), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip(768 if full else pooled // 2, 12 if full else 1, "quick_gelu"), tokenizer=clip_tokenizer,
        text_encoder_2=clip(1280 if full else pooled // 2, 32 if full else 1, "gelu"), tokenizer_2=clip_tokenizer,
        text_encoder_3=T5EncoderModel(T5Config(
            d_model=width, d_kv=64, d_ff=10240 if full else 64, num_heads=width // 64 or 1, num_layers=2,
            feed_forward_proj="gated-gelu", vocab_size=32128)),
        tokenizer_3=T5Tokenizer(vocab=letters, extra_ids=0)).save_pretrained(folder)


def full_size(preset, device, groups_per_step, group_size, batch_size, flags, **_):
    """dgpo.py's own command line on a pipeline of the preset's size; prints what it says and its last step took."""
    if device == "cpu":   # the smallest step that has everything in it
        few = ("--groups-per-step 1 --group-size 2 --num-inference-steps 2 --timesteps-per-rollout 1 --batch-size 2 "
               "--eval-num-inference-steps 1").split()
    else:
        few = ["--groups-per-step", str(groups_per_step), "--group-size", str(group_size), "--batch-size",
               str(batch_size)]
    found, spent, step = {}, {}, dgpo.train_step

    def timed(function, part):
        def call(*rest, **more):
            result = []
            spent[part] = spent.get(part, 0) + seconds(
                lambda: result.append(function(*rest, **more)), torch.device(device))
            return result[0]
        return call

    def train_step(model, *rest):
        spent.clear()   # of what the evaluation before it took
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        metrics = step(model, *rest)
        memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if device == "cuda" else "-"
        found.update({
            "LoRA layers": len(model.lora.layers),
            "parameters": f"{sum(t.numel() for t in model.lora.weights('current')) / 1e6:.2f} M",
            **{f"{part}, s": f"{metrics[f'seconds_{part}']:.1f}" for part in ("rollout", "update")},
            **{f"of it {part}, s": f"{spent[part]:.1f}" for part in ("encoding", "decoding")},
            "peak memory of the device, GB": memory})
        return metrics

    SD3.encode, SD3.decode, dgpo.train_step = timed(SD3.encode, "encoding"), timed(SD3.decode, "decoding"), train_step
    with tempfile.TemporaryDirectory() as place:
        maker = multiprocessing.get_context("spawn").Process(
            target=save_pipeline, args=(f"{place}/model", PRESETS[preset]))
        maker.start()   # in a process of its own, whose memory is not counted
        maker.join()
        size = sum(path.stat().st_size for path in Path(place).rglob("*") if path.is_file())
        print(f"a pipeline of {size / 1e9:.2f} GB", flush=True)
        (Path(place) / "prompts.txt").write_text("a red circle\na star left of a ring\n")
        resolution = "512" if preset == "sd3.5-medium" else "0"
        code = dgpo.main([
            "--model", f"{place}/model", "--prompt-file", f"{place}/prompts.txt", "--output-dir", f"{place}/run",
            "--reward", "jpeg_compressibility", "--steps", "1", "--eval-prompts", "1", "--eval-images", "1",
            "--device", device, "--resolution", resolution, *few, *flags.split()])
        if code:
            sys.exit(code)
    print_table({**found, "of the program, GB":
                 f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.1f}"})


def print_table(columns):
    """Print a dict as a Markdown table of one row."""
    for line in (columns, ["---"] * len(columns), columns.values()):
        print("| " + " | ".join(map(str, line)) + " |")


def main():
    """Print one row of a table in README."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="sd3.5-medium")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--groups-per-step", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--count-memory", action="store_true")
    parser.add_argument("--transformer", help="with --count-memory: a class of diffusers to count instead")
    parser.add_argument("--config", help="its config.json (default: the sizes the class itself names)")
    parser.add_argument("--flags", default="", help="more of dgpo.py's, with --full-size: '--compile --steps 3'")
    parser.add_argument("--full-size", action="store_true", help="a step of the command line (on a CPU, the least one)")
    arguments = vars(parser.parse_args())
    if arguments.pop("full_size"):
        return full_size(**arguments)
    preset, repeats = PRESETS[arguments.pop("preset")], arguments.pop("repeats")
    arguments.pop("flags")
    transformer, path = arguments.pop("transformer"), arguments.pop("config")
    if transformer:
        print_table({name: f"{size:.3g}" for name, size in count_transformer(transformer, path).items()})
        return
    if arguments.pop("count_memory"):
        config = Config(**{**preset["settings"], "device": "cpu", "gradient_checkpointing": False})
        print_table({name: f"{size:.3g} GB" for name, size in count_memory(preset, config).items()})
        return
    config = Config(**{**preset["settings"], **arguments})
    row = measure(preset, config, repeats)
    images = config.groups_per_step * config.group_size
    samples = images * config.timesteps_per_rollout
    step, bare = row["rollout"] + row["update"], row["bare_rollout"] + row["bare_update"]
    print_table({
        "checkpointing": config.gradient_checkpointing,
        "batch": config.batch_size,
        "rollout, images/s": f"{images / row['rollout']:.2f}", "update, samples/s": f"{samples / row['update']:.2f}",
        "rollout / bare": f"{row['rollout'] / row['bare_rollout']:.3f}",
        "update / bare": f"{row['update'] / row['bare_update']:.3f}", "step / bare": f"{step / bare:.3f}",
        "peak memory, GB": f"{row['peak_memory'] / 1e9:.1f}", "first step, s": f"{row['first_step']:.0f}"})


if __name__ == "__main__":
    main()
