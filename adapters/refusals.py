"""Why a pipeline of diffusers cannot be trained through any_pipeline.py: found out by trying, one sentence each."""

import torch

PARTS = ("transformer", "scheduler", "encode_prompt", "prepare_latents")
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
            for name in PARTS])
    scheduler, settings = type(pipe.scheduler).__name__, pipe.scheduler.config
    flow = "FlowMatch" in scheduler or settings.get("prediction_type") == "flow_prediction"
    noisy = scheduler in ("FlowMatchLCMScheduler", "SASolverScheduler")
    unlike = [key for key in UNLIKE_OURS if settings.get(key)]
    unlike += [value for value in settings.values() if str(value).startswith("sde-")]
    models = [name for name, part in pipe.components.items() if "transformer" in name and part is not None]
    refuse([(getattr(pipe, "vae", None), "it has no VAE: wanted is a model of latents, not of pixels"),
            (len(models) == 1, f"it has more than one model: {', '.join(models)}"),
            (flow and not noisy, f"its scheduler, a {scheduler}, is not one of deterministic flow matching"),
            (not unlike, f"its scheduler has {', '.join(unlike)}, which neither our solvers nor our time shift have"),
            ("use_kv_cache" not in takes, "it keeps keys and values from one step to the next")])


def try_out(model):
    """Let an AnyPipeline take a few steps and draw a picture.  Returns the latents' shape; raises ValueError."""
    takes, calls = {*model.takes}, []
    wanted = [f", without {name}," for name in takes if name.endswith(("image", "video")) and "ip_adapter" not in name]
    guidance_scale = max(model.config.guidance_scale, model.config.reference_guidance_scale)
    refuse([(model.lora.layers, f"none of its linear layers is one of lora_targets: {', '.join(model.lora_targets)}"),
            (guidance_scale <= 1 or takes & {"guidance_scale", "true_cfg_scale"}, "it takes no --guidance-scale")])
    try:
        model.encode([""])
    except Exception as error:
        raise ValueError(f"with a prompt alone{min(wanted, default='')} it fails: {error}") from error
    model.read_schedule()
    std, x = model.noise.float().std().item(), torch.randn(2, *model.noise.shape[1:], device=model.device)
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

    def trains():   # as in an update
        with_gradients = model.velocity(x, 0.5, ["", ""], "current")
        with_gradients.square().mean().backward()
        model.lora.zero_grad()
        return torch.allclose(with_gradients, v, 0.01, 0.01)

    if model.config.gradient_checkpointing:
        try:
            model.transformer.enable_gradient_checkpointing()
            works = trains()   # Chroma's single blocks forget their mask then (diffusers 0.42)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            works = False
        if works:
            return tuple(x.shape[1:])
        model.transformer.disable_gradient_checkpointing()
        print("gradient checkpointing does not work with", type(model.transformer).__name__ + ": going on without it")
    refuse([(trains(), "with gradients its velocity is another")])
    return tuple(x.shape[1:])
