"""Why a pipeline of diffusers cannot be trained through any_pipeline.py: found out by trying, one sentence each."""

import torch


def refuse(reasons):
    """Raise ValueError with the first of [(whether all is well, what is wrong otherwise), ...] that is wrong."""
    for fits, reason in reasons:
        if not fits:
            raise ValueError(reason)


def try_out(model):
    """Let an AnyPipeline take a few steps and draw a picture.  Returns the latents' shape; raises ValueError."""
    scheduler, takes, calls = model.pipe.scheduler, {*model.takes}, []
    guidance_scale = max(model.config.guidance_scale, model.config.reference_guidance_scale)
    refuse([("FlowMatch" in type(scheduler).__name__ or scheduler.config.get("prediction_type") == "flow_prediction",
             f"its scheduler, a {type(scheduler).__name__}, is not one of flow matching"),
            ("use_kv_cache" not in takes, "it keeps keys and values from one step to the next"),
            (model.lora.layers, f"none of its linear layers is one of lora_targets: {', '.join(model.lora_targets)}"),
            (guidance_scale <= 1 or takes & {"guidance_scale", "true_cfg_scale"}, "it takes no --guidance-scale")])
    model.encode([""])
    std, x = model.noise.float().std().item(), torch.randn(2, *model.noise.shape[1:], device=model.device)
    hook = model.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    v = model.velocity(x, 0.5, ["", ""], "frozen")   # as in an update: with gradients, of which it has none
    hook.remove()
    with torch.no_grad():
        without = model.velocity(x, 0.5, ["", ""], "frozen")
        model.velocity(x, 0.5, ["", ""], "frozen", guidance_scale)   # not all can guide two images of one prompt
    pictures = model.decode(x[:1])
    refuse([(len(calls) == 1, f"it calls its transformer {len(calls)} times a step"),
            (v.shape == x.shape, "its scheduler is not given the velocity of its latents"),
            # The loop's starting noise would not be the model's own (PRXPixel, Cosmos 2).
            (0.5 < std < 2, f"its starting noise has a standard deviation of {std:.2f}, not 1"),
            # Chroma's single blocks forget their mask then (diffusers 0.42).
            (torch.allclose(v, without, 0.01, 0.01), "with --gradient-checkpointing its velocity is another"),
            (len(pictures) == 1 and hasattr(pictures[0], "convert"), "it does not draw one picture of a prompt")])
    return tuple(x.shape[1:])
