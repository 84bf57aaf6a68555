"""Any flow-matching text-to-image pipeline of diffusers in the place of dgpo.SD3: its own __call__ is its velocity."""

import inspect
import itertools

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch.utils._pytree import tree_map_only

from adapters.refusals import look_at, refuse, try_out
from dgpo import LoRA, shift_time


def shift_of(sigmas):
    """The time shift of a scheduler's own noise levels [steps + 1], falling to 0.  Raises ValueError if there is none.

    It divides the odds (1 - t) / t by itself, so three t in equal steps give it, whatever the first and last t are.
    """
    own = sigmas[:-1].double()
    middle = (len(own) - 1) // 2
    a, b, c = (1 / own - 1)[[0, middle, 2 * middle]]
    shift = (a + c - 2 * b) / (b * (a + c) - 2 * a * c)
    grid = shift_time(torch.linspace(*shift_time(own[[0, -1]], 1 / shift), len(own), dtype=torch.float64), shift)
    refuse([(own[0] > 0.99 and sigmas[-1] == 0, f"its noise goes from {own[0]:.3f} to {sigmas[-1]:.3f}, not 1 to 0"),
            (shift > 0 and (grid - own).abs().max() < 1e-3, "its noise levels are not equal steps under a time shift")])
    return shift.item()


class AnyPipeline:
    """Four methods of the pipeline and its scheduler become ours, for good: encode_prompt gives a remembered text,
    prepare_latents our x, set_timesteps our noise level, and step keeps what it is given: the velocity, guided.
    """
    lora_targets = (   # attention in all the families
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj",
        "attn.to_out", "to_query", "to_key", "to_value", "out_layer", "img_qkv_proj", "txt_kv_proj")

    def __init__(self, pipe, config):
        """Take a pipeline: the model goes to the device and is tried once.  Raises whatever does not fit."""
        self.pipe, self.config, self.device = pipe, config, torch.device(config.device)
        self.rest = torch.device("cpu") if config.offload else self.device
        self.texts, self.forms = {}, {False}   # unguided; guided too, once that is asked for
        self.takes = inspect.signature(type(pipe).__call__).parameters
        look_at(pipe, self.takes)
        pipe._guidance_scale = 1.0   # guidance is an input of some models; for the others, 1 or 0 switches it off
        self.no_guidance = 0.0 if getattr(pipe, "do_classifier_free_guidance", False) else 1.0
        modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        parts = torch.nn.ModuleList(modules).requires_grad_(False).eval()
        self.transformer, self.vae = pipe.transformer.to(self.device), pipe.vae.to(self.rest, torch.float32)
        self.encoders = torch.nn.ModuleList(part for part in parts if part not in (self.transformer, self.vae))
        self.lora = LoRA(self.transformer, config.lora_rank, self.lora_targets, config.seed)
        self.own = self.shift = None
        self.take_over(pipe, pipe.scheduler, pipe.scheduler.config.num_train_timesteps)
        self.latent_shape = try_out(self)

    def read_schedule(self):
        """Find the time shift in the pipeline's own schedule, and the one of timesteps.  Raises ValueError."""
        refuse([(self.own, "it does not ask its scheduler for noise levels")])
        sigmas, times = self.own
        self.shift = shift_of(sigmas)
        # CogView4's timesteps are not its sigmas but the times before their shift; a solver's are whole numbers.
        fitting = [undo for undo in (1.0, 1 / self.shift) if times.shape == sigmas[:-1].shape
                   and (shift_time(sigmas[:-1], undo) - times).abs().max() <= 1e-3]
        refuse([(fitting, "its timesteps are not those of its noise levels")])
        self.undo = fitting[0]

    def take_over(self, pipe, scheduler, steps):
        """Put our four methods in the place of the pipeline's and its scheduler's."""
        devices = dict.fromkeys(("_execution_device", "device"), self.device)   # no part's that waits elsewhere
        pipe.__class__ = type(type(pipe).__name__, (type(pipe),), devices)
        pipe.set_progress_bar_config(disable=True)
        encode, prepare, set_timesteps = pipe.encode_prompt, pipe.prepare_latents, scheduler.set_timesteps

        def expand(part):   # one image's [1, L, D], or [layers, 1, L, D]; text_ids [L, 3] serve them all
            return part.repeat_interleave(self.count, part.shape.index(1)) if 1 in part.shape[:2] else part

        def give_text(*args, **kwargs):
            turn = next(self.turns)   # some pipelines ask twice, the second time for the empty prompt's
            if turn == len(self.text):
                self.text.append(encode(*args, **kwargs))
            return tree_map_only(torch.Tensor, expand, self.text[turn])

        def give_x(*args, **kwargs):
            own = prepare(*args, **kwargs)
            self.noise, *others = own if isinstance(own, tuple) else (own,)
            x = self.noise if self.x is None else self.x.to(torch.float32 if self.sigma is None else self.noise.dtype)
            return (x, *others) if others else x

        def give_sigma(*args, **kwargs):
            if self.own is None:   # the pipeline asks for its own schedule of a rollout, once
                set_timesteps(*args, **kwargs)
                self.own, self.form = (scheduler.sigmas.cpu(), scheduler.timesteps.cpu() / steps), scheduler.timesteps
            sigmas = [] if self.sigma is None else [self.sigma]   # without any, the pipeline takes no step
            times = [steps * shift_time(sigma, self.undo) for sigma in sigmas]
            scheduler.sigmas, scheduler.timesteps = torch.tensor([*sigmas, 0.0]), torch.tensor(times).to(self.form)

        def keep_velocity(velocity, timestep, sample, *args, **kwargs):
            self.kept = velocity.float()
            return SchedulerOutput(prev_sample=sample)

        give_sigma.__signature__ = inspect.signature(set_timesteps)   # pipelines look at it
        pipe.encode_prompt, pipe.prepare_latents = give_text, give_x
        scheduler.set_timesteps, scheduler.step = give_sigma, keep_velocity

    def run(self, prompt, guided=False, guidance_scale=1.0, x=None, sigma=None, output_type="latent"):
        """The pipeline's own __call__ without its no_grad: the velocity at x and sigma; without sigma, the pictures."""
        self.text, self.turns = self.texts[prompt].setdefault(guided, []), itertools.count()
        self.x, self.sigma, self.count, side = x, sigma, 1 if x is None else len(x), self.config.resolution or None
        scale = guidance_scale if guidance_scale > 1 else self.no_guidance
        arguments = {
            "prompt": prompt, "negative_prompt": "" if guided else None, "height": side, "width": side, "num_frames": 1,
            "guidance_scale": scale, "true_cfg_scale": scale, "distilled_guidance_scale": scale,
            "num_images_per_prompt": self.count, "num_videos_per_prompt": self.count, "use_resolution_binning": False,
            "num_inference_steps": max(4, self.config.num_inference_steps), "generator": torch.Generator(self.device),
            "max_sequence_length": self.config.max_sequence_length or None, "output_type": output_type,
            "enable_prompt_rewrite": False}
        arguments = {key: value for key, value in arguments.items() if key in self.takes and value is not None}
        drawn = inspect.unwrap(type(self.pipe).__call__)(self.pipe, **arguments)[0]
        return drawn if sigma is None else self.kept

    @torch.no_grad()
    def encode(self, prompts):
        """Encode the prompts that are not remembered yet, and forget all others."""
        self.texts = {prompt: self.texts.get(prompt, {}) for prompt in prompts}
        missing = [(prompt, form) for prompt, have in self.texts.items() for form in self.forms if form not in have]
        if missing:
            self.encoders.to(self.device)
            for prompt, guided in missing:
                self.run(prompt, guided, 1.0 + guided)
            self.encoders.to(self.rest)

    def velocity(self, x, sigma, prompts, policy, guidance_scale=1.0):
        """The policy's velocity at x [B, ...] for B prompts, float32 like x; sigma: a number, 0-d, or [B]."""
        self.lora.select(policy)
        embedded = self.transformer.config.get("guidance_embeds")
        if embedded and guidance_scale <= 1:   # a distilled model's input: the rollouts', in updates too
            guidance_scale = self.config.guidance_scale
        self.forms.add(guided := guidance_scale > 1 and not embedded)
        self.encode([*self.texts, *prompts])
        sigmas = torch.as_tensor(sigma, dtype=torch.float32).expand(len(x)).tolist()
        # One prompt and sigma a call: texts padded to one length would change some families' results.
        runs = [(*key, len(list(run))) for key, run in itertools.groupby(zip(prompts, sigmas, strict=True))]
        return torch.cat([self.run(prompt, guided, guidance_scale, part, level) for (prompt, level, _), part
                          in zip(runs, x.split([count for *_, count in runs]))])

    @torch.no_grad()
    def decode(self, x0):
        """Latents [B, ...] -> list of B PIL images."""
        parts = x0.split(max(1, 2 ** 21 // (self.config.resolution or 1024) ** 2))
        self.vae.to(self.device)
        drawn = [image for part in parts for image in self.run(next(iter(self.texts)), x=part, output_type="pil")]
        self.vae.to(self.rest)
        return [frame for image in drawn for frame in (image if isinstance(image, list) else [image])]
