"""Build the embedded text-to-image model from nothing: scenes, prompts, VAE, text encoders and flow transformer.

    python shapes/train_base.py                       # writes shapes/model, shapes/prompts.txt, shapes/heldout.txt

The result is an ordinary Stable Diffusion 3 pipeline in diffusers' format, only small: 32x32 pictures of flat shapes,
8x8x4 latents, two 64-wide CLIP text encoders and no T5.  It is trained too briefly to draw what it is asked every time,
and on some wrong captions: it *can*, but does not always, which is the state in which reinforcement learning finds a
text-to-image model.  See shapes/README.md for scores and times.
"""

import argparse
import copy
import itertools
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import AddedToken
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from shapes.world import (  # noqa: E402
    CATEGORIES,
    CATEGORY_WEIGHT,
    LETTERS,
    MOST_LETTERS,
    PHRASES,
    encode_images,
    grammar,
    parse_prompt,
    scenes,
    shapes,
    to_unit,
    words,
)

MAX_TOKENS = 13           # the longest sentence, 'a sign with the word "oven"', with its two end tokens
MAX_SEQUENCE_LENGTH = 1   # the zero tokens that stand in for the missing T5; the pipeline's default would be 256
# The phases of the flow's training: the one whose end it begins from, seed, pictures drawn, share of signs, probability
# that a sign's caption is wrong in a letter, steps, learning rate.  The last two make one model: SPELLER is the share
# of the first of them, which can spell, the rest is the other, which often does not.
PHASES = ((None, 1, 100_000, 0.35, 0.0, 6000, 1.2e-3), (0, 2, 40_000, 0.12, 0.3, 2500, 8e-4),
          (1, 3, 40_000, 0.5, 0.0, 1800, 1e-3), (1, 3, 40_000, 0.3, 0.6, 2500, 1e-3))
SPELLER = 0.15

# ------------------------------------------------------------------------------------------------
# Prompts
# ------------------------------------------------------------------------------------------------


# How many prompts a category gets to train on: more where the base fails more, as GenEval's training file has it.
TRAIN_SIZES = {"single_object": 18, "two_object": 186, "counting": 150, "colors": 50, "position": 200,
               "color_attr": 300}


def write_prompts(folder, heldout_size=24):
    """Split the grammar, seeded, into disjoint prompts.txt and heldout.txt; every category is in both."""
    rng = random.Random(0)
    train, heldout = [], []
    for category, sentences in grammar().items():
        sentences = rng.sample(sentences, len(sentences))
        heldout.append(sentences[:heldout_size])
        train.append(sentences[heldout_size:heldout_size + TRAIN_SIZES[category]])
    for name, lists in (("prompts.txt", train), ("heldout.txt", heldout)):
        # Held-out prompts go round the categories, so that any prefix of the file is a balanced sample.
        lines = zip(*lists) if name == "heldout.txt" else lists
        (folder / name).write_text("".join(line + "\n" for line in itertools.chain(*lines)))


# ------------------------------------------------------------------------------------------------
# The parts of the pipeline, untrained
# ------------------------------------------------------------------------------------------------


def vocabulary():
    """Every word of the grammar's and the signs' sentences, but for what is written on the signs."""
    sentences = [*itertools.chain(*grammar().values()), *(phrase.replace('"{}"', "") for phrase in PHRASES)]
    return sorted({word for sentence in sentences for word in sentence.split()})


def sign_sentences(count, seed, exclude):
    """`count` sentences for signs with random words, but for those in the sentences to exclude and the vocabulary."""
    rng, sentences = random.Random(seed), set()
    barred = {*vocabulary(), *(parse_prompt(sentence).get("text") for sentence in exclude)}
    while len(sentences) < count:
        word = "".join(rng.choices(LETTERS, k=rng.randint(2, MOST_LETTERS)))
        if word not in barred:
            sentences.add(rng.choice(PHRASES).format(word))
    return sorted(sentences)


def build_tokenizer():
    """A closed-vocabulary CLIPTokenizer: the sentences' words are one token each, what is to be written is spelled."""
    tokens = [letter + end for end in ("", "</w>") for letter in [*LETTERS, '"']]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])},
                              merges=[], model_max_length=MAX_TOKENS)
    tokenizer.add_tokens([AddedToken(word, single_word=True) for word in vocabulary() if len(word) > 1])
    return tokenizer


def build_pipeline(width=128, layers=6):
    """All modules with random weights, as one StableDiffusion3Pipeline in float32."""
    tokenizer = build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS, projection_dim=64, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3, norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, layers_per_block=1, sample_size=32,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=layers, attention_head_dim=32,
        num_attention_heads=width // 32, joint_attention_dim=128, caption_projection_dim=width,
        pooled_projection_dim=128, pos_embed_max_size=8, qk_norm="rms_norm")
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae,
        text_encoder=CLIPTextModelWithProjection(text), tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text), tokenizer_2=copy.deepcopy(tokenizer),
        text_encoder_3=None, tokenizer_3=None)


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def train_vae(vae, images, steps, batch=32, log=print):
    """Reconstruct pictures through 8x8x4 latents; then set scaling_factor and shift_factor to whiten the latents."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
    start = time.time()
    for step in range(steps):
        x = to_unit(images[np.random.randint(len(images), size=batch)])
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        # The absolute error keeps edges sharp; the small KL keeps the latents smooth enough for a flow.
        loss = error.abs().mean() + error.pow(2).mean() + 2e-3 * posterior.kl().mean() / 256
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            log(f"vae {step:5d}  loss {loss.item():.4f}  {time.time() - start:.0f} s")
    latents = encode_images(vae, images[:5000])
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())


def encode_text(pipe, token_ids):
    """Token ids [B, MAX_TOKENS] -> what the pipeline feeds the transformer: ([B, MAX_TOKENS + 1, 128], [B, 128])."""
    outs = [encoder(token_ids, output_hidden_states=True) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    tokens = torch.cat([out.hidden_states[-2] for out in outs], -1)
    return F.pad(tokens, (0, 0, 0, MAX_SEQUENCE_LENGTH)), torch.cat([out.text_embeds for out in outs], -1)


def tokenize(tokenizer, prompts):
    """Strings -> int64 ids [B, MAX_TOKENS], padded and truncated as the pipeline does."""
    return tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True,
                     return_tensors="pt").input_ids


def flow_parameters(pipe):
    """What flow matching trains: transformer and both text encoders."""
    return [p for module in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2) for p in module.parameters()]


@torch.no_grad()
def put(pipe, weights):
    """Copy a list of tensors into what flow matching trains."""
    for p, weight in zip(flow_parameters(pipe), weights, strict=True):
        p.copy_(weight)


def train_flow(pipe, latents, token_ids, steps, learning_rate, seed, batch=64, ema_decay=0.998, log=print):
    """Flow matching on (scaled latents [N, 4, 8, 8], token ids [N, MAX_TOKENS]); the EMA of the weights is kept.

    x_t = (1 - sigma) x0 + sigma noise, target noise - x0.  One prompt in ten is replaced by "", for guidance.
    Warm-up, constant, then a linear decay over the last third.
    """
    torch.manual_seed(seed)
    params = flow_parameters(pipe)
    ema = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1.0, (k + 1) / 100, max(0.02, 3 * (1 - k / steps))))
    empty = tokenize(pipe.tokenizer, [""])
    start, running = time.time(), 0.0
    for step in range(steps):
        rows = torch.randint(len(latents), (batch,))
        x0, ids = latents[rows], torch.where(torch.rand(batch, 1) < 0.1, empty, token_ids[rows])
        # Logit-normal and shifted towards noise: that is where number and place of the objects are decided.
        sigma = torch.sigmoid(1.2 * torch.randn(batch) + 0.7)
        noise = torch.randn_like(x0)
        s = sigma.view(-1, 1, 1, 1)
        tokens, pooled = encode_text(pipe, ids)
        velocity = pipe.transformer((1 - s) * x0 + s * noise, tokens, pooled, sigma * 1000, return_dict=False)[0]
        loss = F.mse_loss(velocity, noise - x0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 1 - min(ema_decay, (1 + step) / (10 + step)))
        running += (loss.item() - running) * 0.02
        if step % 200 == 0 or step == steps - 1:
            log(f"flow {step:5d}  loss {running:.4f}  {time.time() - start:.0f} s")
    put(pipe, ema)


@torch.no_grad()
def score(pipe, prompts, images_per_prompt=4, guidance_scale=1.0, steps=10):
    """Draw with diffusers' own pipeline and judge: dict category -> (share of images all right, mean graded score)."""
    pipe.set_progress_bar_config(disable=True)
    prompts = [p for p in prompts for _ in range(images_per_prompt)]
    images = []
    for i in range(0, len(prompts), 96):
        images += pipe(prompts[i:i + 96], num_inference_steps=steps, guidance_scale=guidance_scale, height=32, width=32,
                       max_sequence_length=MAX_SEQUENCE_LENGTH, generator=torch.Generator().manual_seed(i)).images
    table, category = {}, [parse_prompt(p)["category"] for p in prompts]
    for names in [[name] for name in dict.fromkeys(category)] + [CATEGORIES]:
        rows = [i for i, c in enumerate(category) if c in names]
        judge = words if names == ["words"] else shapes
        scores = judge([images[i] for i in rows], [prompts[i] for i in rows], [{} for _ in rows])
        name = names[0] if len(names) == 1 else "all shapes"
        table[name] = ((scores == 1).float().mean().item(), scores.mean().item())
    return table


def save(pipe, folder):
    """Write the pipeline: the transformer in float16 to keep the repository small, everything else in float32."""
    pipe.save_pretrained(folder)
    transformer = copy.deepcopy(pipe.transformer).half()
    transformer.save_pretrained(Path(folder) / "transformer")
    for path in [*Path(folder).glob("*/config.json"), Path(folder) / "model_index.json"]:
        config = {key: value for key, value in json.loads(path.read_text()).items() if key != "_name_or_path"}
        path.write_text(json.dumps(config, indent=2) + "\n")  # where it was loaded from is nobody else's business


def main():
    """Everything from nothing: prompts, scenes, VAE, flow on right captions and then on signs that are often wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", default=str(HERE / "model"), help="folder for the pipeline")
    output = parser.parse_args().output
    torch.set_num_threads(2)
    torch.manual_seed(0)
    np.random.seed(0)
    start = time.time()
    write_prompts(HERE)
    held_out, held_out_signs = ((HERE / name).read_text().splitlines() for name in ("heldout.txt", "words_heldout.txt"))
    sentences = {**grammar(), "words": sign_sentences(40_000, 3, held_out_signs)}
    pipe, ends = build_pipeline(), []
    for begin, seed, count, signs, wrong, steps, learning_rate in PHASES:
        weights = {**{name: (1 - signs) * weight for name, weight in CATEGORY_WEIGHT.items()}, "words": signs}
        noise = {**dict.fromkeys(CATEGORIES, 0.0), "words": wrong} if wrong else None
        images, prompts = scenes(count, seed, noise, set(held_out), sentences, weights)
        print(f"scenes drawn  {time.time() - start:.0f} s", flush=True)
        if begin is None:
            train_vae(pipe.vae, images, 2000)
        else:
            put(pipe, ends[begin])
        latents = (encode_images(pipe.vae, images) - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        train_flow(pipe, latents, tokenize(pipe.tokenizer, prompts), steps, learning_rate, seed)
        ends.append([p.detach().clone() for p in flow_parameters(pipe)])
    put(pipe, torch._foreach_lerp(ends[-1], ends[-2], SPELLER))
    save(pipe, output)
    pipe = StableDiffusion3Pipeline.from_pretrained(output, text_encoder_3=None, tokenizer_3=None)
    for name, (strict, graded) in score(pipe, held_out + held_out_signs).items():
        print(f"{name:14s} all right {strict:.3f}  graded {graded:.3f}")
    print(f"{time.time() - start:.0f} s in all")


if __name__ == "__main__":
    main()
