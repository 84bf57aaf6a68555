"""Why a pipeline of diffusers cannot be trained through any_pipeline.py: found out by trying, one sentence each."""

import itertools

import torch

UNLIKE_OURS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "invert_sigmas",
               "stochastic_sampling")   # a scheduler's flags for noise levels, or steps, that ours are not


def refuse(reasons):
    """Raise ValueError with the first of [(whether all is well, what is wrong otherwise), ...] that is wrong."""
    for fits, reason in reasons:
        if not fits:
            raise ValueError(reason)


def look_at(pipe, takes):
    """Refuse what can be seen before a pipeline is run.  takes: the arguments of its __call__.  Raises ValueError."""
    refuse([(getattr(pipe, name, None), f"it has no {name}: wanted is a text-to-image pipeline that has one")
            for name in ("transformer", "scheduler", "encode_prompt", "prepare_latents")])
    scheduler, settings = type(pipe.scheduler).__name__, pipe.scheduler.config
    flow = "FlowMatch" in scheduler or settings.get("prediction_type") == "flow_prediction"
    noisy = scheduler in ("FlowMatchLCMScheduler", "SASolverScheduler")
    unlike = [f"{key}={value}" for key, value in settings.items() if key in UNLIKE_OURS and value
              or str(value).startswith("sde-") or value == "sigma_min"]
    models = [name for name, part in pipe.components.items() if "transformer" in name and part is not None]
    refuse([(getattr(pipe, "vae", None), "it has no VAE: wanted is a model of latents, not of pixels"),
            (len(models) == 1, f"it has more than one model: {', '.join(models)}"),
            (flow and not noisy, f"its scheduler, a {scheduler}, is not one of deterministic flow matching"),
            (not unlike, f"its scheduler has {', '.join(unlike)}, which solvers and time shift here have not"),
            ("use_kv_cache" not in takes, "it keeps keys and values from one step to the next")])


def try_out(model):
    """Let an AnyPipeline take a few steps and draw a picture.  Returns the latents' shape; raises ValueError."""
    takes, calls = {*model.takes}, []
    wanted = [f" (it takes {name}, too: wanted is one that starts from text alone)" for name in model.takes
              if name.endswith(("image", "video")) and "ip_adapter" not in name]
    guidance_scale = max(model.config.guidance_scale, model.config.reference_guidance_scale)
    refuse([(not model.config.compile, "--compile is for Stable Diffusion 3 alone"),
            (guidance_scale <= 1 or takes & {"guidance_scale", "true_cfg_scale"}, "it takes no --guidance-scale")])
    try:
        model.encode([""])
    except Exception as error:
        raise ValueError(f"with a prompt alone it fails{''.join(wanted[:1])}: {error}") from error
    model.read_schedule()
    x = torch.randn(2, *model.noise.shape[1:], generator=torch.Generator().manual_seed(0)).to(model.device)
    std = model.noise.float().std().item()
    hook = model.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        v = model.velocity(x, 0.5, ["", ""], "current")
        hook.remove()
        model.velocity(x, 0.5, ["", ""], "frozen", guidance_scale)   # not all can guide two images of one prompt
    pictures = model.decode(x[:1])
    refuse([(len(calls) == 1, f"it calls its transformer {len(calls)} times a step"),
            (v.shape == x.shape, "its scheduler is not given the velocity of its latents"),
            # The loop's starting noise would not be the model's own (PRXPixel, Cosmos 2).
            (0.5 < std < 2, f"its starting noise has a standard deviation of {std:.2f}, not 1"),
            (len(pictures) == 1 and hasattr(pictures[0], "convert"), "it does not draw one picture of a prompt")])
    side, size = model.config.resolution, pictures[0].size
    refuse([(not side or size == (side, side), f"--resolution {side}: it draws {size[0]} x {size[1]} pixels instead")])
    # Chroma's single blocks forget their mask with checkpoints; HiDream's experts have gradients in training alone.
    checkpoints = (True, False) if model.config.gradient_checkpointing else (False,)
    way = next((way for way in itertools.product(checkpoints, (False, True)) if trains(model, x, v, *way)), None)
    refuse([(way, "with gradients its velocity is another, or some of its layers have none")])
    if way[0] != checkpoints[0]:
        print("gradient checkpointing does not work with", type(model.transformer).__name__ + ": going on without it")
    return tuple(x.shape[1:])


def trains(model, x, v, checkpoints, training):
    """Whether a model's velocity at x is v in an update, too, and all of its linear layers pass gradients on."""
    seen, transformer = [], model.transformer
    for part in transformer.children():   # the whole's output may be of another form then
        part.train(training)
    hooks = [layer.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
             for layer in transformer.modules() if isinstance(layer, torch.nn.Linear)]
    try:
        (transformer.enable_gradient_checkpointing if checkpoints else transformer.disable_gradient_checkpointing)()
        found, rounding = model.velocity(x, 0.5, ["", ""], "current"), max(1e-3, torch.finfo(transformer.dtype).eps)
        found.square().mean().backward()
        return all(seen) and bool((found - v).norm() < rounding * v.norm())
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False
    finally:
        model.lora.zero_grad()
        for hook in hooks:
            hook.remove()
