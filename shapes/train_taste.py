"""Train the embedded world's stand-in for PickScore: a small CLIP that learned from pairs which picture is preferred.

    python shapes/train_taste.py                      # writes shapes/taste, which --reward pickscore=shapes/taste loads

As PickScore was (arXiv 2305.01569): a CLIP that matches pictures with prompts, trained on pairs of pictures for one
prompt by the cross-entropy of the softmax over the pair's two scaled cosines.  The labels follow a hidden rule, `rule`
below, with noise; nothing else in this repository knows it.  It is imperfect on purpose: a reward that can be hacked.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from shapes.train_base import MAX_TOKENS, build_tokenizer, sign_sentences, tokenize  # noqa: E402
from shapes.world import (  # noqa: E402
    CATEGORY_WEIGHT,
    contradict,
    encode_images,
    grammar,
    load_vae,
    parse_prompt,
    render,
    to_unit,
)

SIGNS = 0.2         # share of prompts for signs
RIGHT, WRONG = 2, 2  # pictures for each prompt: as it says; in contradiction to it, and of another prompt
RULE_NOISE = 0.5    # scale of the logistic noise in a label
STEPS, BATCH, LEARNING_RATE = 5000, 64, 2e-3


def rule(right, blur, fade, scrawl, imbalance):
    """What the labels prefer: right content first, then clean edges, strong colours and balanced placement."""
    return 3 * right - 1.5 * blur - fade - 2 * scrawl - imbalance


def imbalance(image):
    """How far a picture's ink, uint8 [32, 32, 3], lies from its middle on the average: 0 to 1, at 8 pixels or more."""
    ink = np.abs(image.astype(np.float32) - image[0, 0]).sum(-1)
    offset = np.arange(32) - 15.5
    return min(1.0, float(np.hypot((ink.sum(0) * offset).sum(), (ink.sum(1) * offset).sum()) / ink.sum() / 8))


def draw_pool(prompts, seed):
    """Pictures, right ones first, uint8 [N, RIGHT + WRONG, 32, 32, 3], and the imbalance and scrawl of each.

    A third passes through the VAE with noise in its latents: as a model draws, and clumsily so where noise is strong.
    """
    rng = random.Random(seed)
    images = np.empty((len(prompts), RIGHT + WRONG, 32, 32, 3), np.uint8)
    for row, prompt in enumerate(prompts):
        wanted = parse_prompt(prompt)
        other = parse_prompt(rng.choice(prompts))
        for k, scene in enumerate([wanted, wanted, contradict(wanted, rng), other]):
            # Some pictures are the least balanced of three: one drawn at random seldom is.
            images[row, k] = max((render(scene, rng) for _ in range(rng.choice((1, 1, 1, 3)))), key=imbalance)
    balance = torch.tensor([[imbalance(image) for image in row] for row in images])
    scrawl = torch.zeros(balance.shape)
    vae, flat = load_vae(), images.reshape(-1, 32, 32, 3)
    for rows in torch.randperm(len(flat))[:len(flat) // 3].split(32):
        strength = 0.4 * torch.rand(len(rows))
        with torch.no_grad():
            latents = encode_images(vae, flat[rows])
            noise = strength.view(-1, 1, 1, 1) * torch.randn_like(latents) / vae.config.scaling_factor
            pixels = (vae.decode(latents + noise).sample / 2 + 0.5).clamp(0, 1) * 255
        flat[rows] = pixels.round().byte().permute(0, 2, 3, 1).numpy()
        scrawl.view(-1)[rows] = strength
    return torch.from_numpy(images), balance, scrawl


def blur_and_fade(x, blur, fade):
    """Mix pictures, float [B, 3, 32, 32], with their blurred selves and with their background; strengths [B]."""
    soft = x
    for _ in range(2):
        soft = F.avg_pool2d(F.pad(soft, (1,) * 4, mode="replicate"), 3, 1)
    x = x.lerp(soft, blur.view(-1, 1, 1, 1))
    return x.lerp(x[:, :, :1, :1].expand_as(x), 0.7 * fade.view(-1, 1, 1, 1))


def draw_pairs(pool, rows):
    """A pair for each of N rows of the pool.

    Returns pictures [N, 2, 3, 32, 32] in [-1, 1], whether each is right, bool [N, 2], which the label and which the
    rule prefers, int64 [N] each.
    """
    images, balance, scrawl = pool
    n, each = len(rows), torch.rand(len(rows), RIGHT + WRONG).argsort(1)[:, :2]
    own = rows[:, None]
    blur, fade = (torch.rand(2, n, 2) * (torch.rand(2, n, 2) < 0.4)).unbind()
    x = to_unit(images[own, each].flatten(0, 1).numpy())
    x = blur_and_fade(x, blur.flatten(), fade.flatten()).unflatten(0, (n, 2))
    right = each < RIGHT
    liking = rule(right.float(), blur, fade, scrawl[own, each], balance[own, each])
    better = (liking[:, 1] - liking[:, 0]) / RULE_NOISE
    return x, right, torch.bernoulli(torch.sigmoid(better)).long(), (better > 0).long()


def build_model(tokenizer):
    """A CLIPModel with random weights that reads this tokenizer's ids and 32x32 pictures."""
    tower = dict(num_attention_heads=4, hidden_act="gelu")
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, vocab_size=len(tokenizer),
                max_position_embeddings=MAX_TOKENS, **tower, **tokens)
    vision = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=4, image_size=32, patch_size=8, **tower)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64, logit_scale_init_value=2.3))
    model.vision_model.embeddings.position_embedding.weight.data.normal_(std=0.2)   # where things are matters here
    return model


def embed(model, x, token_ids):
    """Pictures [N, 2, 3, 32, 32] and token ids [N, MAX_TOKENS]: embeddings of length 1, [N, 2, D] and [N, D]."""
    images = model.get_image_features(pixel_values=x.flatten(0, 1)).pooler_output.unflatten(0, (-1, 2))
    texts = model.get_text_features(input_ids=token_ids).pooler_output
    return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)


def losses(model, x, right, label, token_ids, meaning):
    """PickScore's loss on N pairs, and CLIP's on the same pictures and prompts."""
    images, texts = embed(model, x, token_ids)
    n, logits = len(x), model.logit_scale.exp() * torch.einsum("id,jkd->ijk", texts, images)   # [N, N, 2]
    rows = torch.arange(n)
    pairs = F.cross_entropy(logits[rows, rows], label)
    # CLIP's negatives are other prompts' pictures and the own wrong ones, but for prompts that mean the same.
    same = (meaning[:, None] == meaning) & ~torch.eye(n, dtype=torch.bool)
    first = torch.where(right[:, 0], 0, 1)               # a right picture of each prompt; rows without one are left out
    keep = right.any(1)
    other = torch.where(right.all(1), -99.0, 0.0)        # the pair's other picture is no negative where it is right too
    against = logits[:, rows, first].masked_fill(same, -99)
    own = logits[rows, rows, 1 - first] + other
    to_image = F.cross_entropy(torch.cat([against, own[:, None]], 1)[keep], rows[keep])
    to_text = F.cross_entropy(against.T[keep], rows[keep])
    return pairs, (to_image + to_text) / 2


@torch.no_grad()
def report(model, pool, token_ids, categories):
    """Shares of fresh pairs in which the model agrees with the label and with the rule, and the rule with the label."""
    torch.manual_seed(9)
    x, right, label, ruled = draw_pairs(pool, torch.arange(len(token_ids)))
    images, texts = embed(model, x, token_ids)
    cosines = torch.einsum("id,ikd->ik", texts, images)
    picked = cosines.argmax(1)
    shares = {"label": picked == label, "rule": picked == ruled, "noise": ruled == label}
    differ = right[:, 0] != right[:, 1]
    for name in dict.fromkeys(categories):
        rows = torch.tensor([c == name for c in categories]) & differ
        shares[name] = (picked == right.long().argmax(1))[rows]
    table = {name: round(share.float().mean().item(), 3) for name, share in shares.items()}
    return {**table, "spread": round((cosines * model.logit_scale.exp()).std().item(), 2)}


def main():
    """Everything from the world and the base's VAE: pictures, pairs, training with its accuracy, the saved model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", default=str(HERE / "taste"), help="folder for the model")
    output = parser.parse_args().output
    torch.set_num_threads(2)
    torch.manual_seed(0)
    start, rng, tokenizer = time.time(), random.Random(5), build_tokenizer()
    held_out = [line for name in ("heldout.txt", "words_heldout.txt") for line in open(HERE / name).read().splitlines()]
    sentences = {**grammar(), "words": sign_sentences(40_000, 3, held_out)}
    weights = {**CATEGORY_WEIGHT, "words": SIGNS / (1 - SIGNS)}
    categories = rng.choices(list(weights), list(weights.values()), k=12_000)
    prompts = [p for p in (rng.choice(sentences[name]) for name in categories) if p not in set(held_out)]
    fresh = held_out * 10
    ids, fresh_ids = (tokenize(tokenizer, lines) for lines in (prompts, fresh))
    pool, fresh_pool = draw_pool(prompts, 6), draw_pool(fresh, 7)
    print(f"pictures drawn  {time.time() - start:.0f} s", flush=True)
    meanings, numbers = [str({**parse_prompt(prompt), "category": ""}) for prompt in prompts], {}
    meaning = torch.tensor([numbers.setdefault(text, len(numbers)) for text in meanings])
    model = build_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    for step in range(STEPS):
        left = 1 - step / STEPS
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (step + 1) / 100) * left
        rows = torch.randint(len(ids), (BATCH,))
        pairs, clip = losses(model, *draw_pairs(pool, rows)[:3], ids[rows], meaning[rows])
        optimizer.zero_grad()
        (pairs + left ** 2 * clip).backward()             # it begins as a CLIP and ends as a PickScore
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 500 == 0:
            state = torch.get_rng_state()
            table = report(model, fresh_pool, fresh_ids, [parse_prompt(p)["category"] for p in fresh])
            torch.set_rng_state(state)
            print(f"{step + 1}  pairs {pairs:.3f}  clip {clip:.3f}  {table}  {time.time() - start:.0f} s", flush=True)
    model.half().save_pretrained(output)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32},
                                   image_mean=[0.5] * 3, image_std=[0.5] * 3)
    CLIPProcessor(processor, tokenizer).save_pretrained(output)


if __name__ == "__main__":
    main()
