"""Rewards for DGPO: every reward is a callable (images, prompts, metadata) -> one float per image.

    reward = load_reward("shapes")                                   # a reward of this file
    reward = load_reward("shapes:1.0,jpeg_compressibility:-0.01")    # a weighted sum
    reward = load_reward("my_rewards.py:brightness")                 # a function of your own
    reward = load_reward("pickscore,aesthetic=models/aesthetic:0.1", "cuda")   # rewards that are models, see MODELS
    scores = reward(images, prompts, metadata)                       # [B] float32, higher is better

`images` is a list of PIL images, `prompts` a list of strings and `metadata` a list of dicts, all of length B.
The embedded verifier `shapes` plays the part of GenEval's detector for the toy world of shapes/: it looks at the
image and the prompt alone.  1.0 means that everything the prompt asks for is there and nothing else.
"""

import importlib.util
import io
import itertools
import math
import os
import re
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


class UserError(Exception):
    """Something the user can put right: dgpo.py's main() prints it as one sentence and exits with code 2."""


# ------------------------------------------------------------------------------------------------
# The grammar of the embedded world: GenEval's six categories over six shapes and eight colours
# ------------------------------------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PALETTE = {
    "red": (220, 40, 40), "orange": (245, 140, 20), "yellow": (240, 215, 30), "green": (40, 160, 60),
    "blue": (40, 80, 220), "purple": (130, 50, 170), "pink": (245, 130, 190), "black": (25, 25, 25),
}
COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
PREFIXES = ("", "a picture of ", "a drawing of ", "an image of ", "a sketch of ", "a painting of ", "a view of ")
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # GenEval's tags
# A relation is where the first object lies as seen from the second, as a unit step (x to the right, y down).
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}

_NOUN = (rf"(?P<count>{'|'.join(COUNTS)}) (?:(?P<color>{'|'.join(PALETTE)}) )?"
         rf"(?P<shape>{'|'.join(SHAPES)})(?P<plural>e?s)?")
_PREFIX = re.compile("^(?:" + "|".join(p for p in PREFIXES if p) + ")")
_JOINT = re.compile(r" (and|left of|right of|above|below) ")


def parse_prompt(prompt):
    """Read a prompt of the shapes grammar.

    Returns a dict: `category` (one of CATEGORIES), `objects` (a list of (shape, color or None), one entry for every
    object wanted) and `relation` (a key of RELATIONS, or None).  Raises ValueError for a prompt outside the grammar.
    """
    parts = _JOINT.split(_PREFIX.sub("", prompt.strip().lower()))
    nouns = [re.fullmatch(_NOUN, part) for part in parts[::2]]
    # "two circle" and "a circles" are no sentences: number and ending have to agree.
    if len(nouns) > 2 or not all(n and (COUNTS[n["count"]] > 1) == bool(n["plural"]) for n in nouns):
        raise ValueError(f"{prompt!r} is not a sentence of the shapes grammar (see shapes/README.md)")
    objects = [(n["shape"], n["color"]) for n in nouns for _ in range(COUNTS[n["count"]])]
    relation = parts[1] if len(parts) == 3 and parts[1] != "and" else None
    if len(nouns) == 1:
        counted = nouns[0]["count"] not in ("a", "an")
        category = "counting" if counted else "colors" if nouns[0]["color"] else "single_object"
    elif relation:
        category = "position"
    else:
        category = "color_attr" if any(color for _, color in objects) else "two_object"
    return {"category": category, "objects": objects, "relation": relation}


def prompt_category(prompt, metadata):
    """The row of the final table a prompt belongs to: its `tag` (GenEval's files), its shapes category, or "all"."""
    if "tag" in metadata:
        return str(metadata["tag"])
    try:
        return parse_prompt(prompt)["category"]
    except ValueError:
        return "all"


def shape_mask(shape, x, y, radius, size=32, supersample=4):
    """Draw one anti-aliased shape: float32 coverage in [0, 1], [size, size].

    `x`, `y` and `radius` are in pixels.  The radii of the six shapes are balanced to look equally large.
    """
    grid = (np.arange(size * supersample, dtype=np.float32) + 0.5) / supersample
    u, v = (grid[None, :] - x) / radius, (grid[:, None] - y) / radius
    rho = np.hypot(u, v)
    if shape == "circle":
        inside = rho < 0.95
    elif shape == "ring":
        inside = (rho < 1.0) & (rho > 0.52)
    elif shape == "square":
        inside = np.maximum(abs(u), abs(v)) < 0.82
    elif shape == "triangle":
        inside = (v < 0.75) & (v > -1.0 + 1.75 * abs(u))
    elif shape == "cross":
        inside = (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 0.98)
    elif shape == "star":
        # A star is five wedges; the edge runs from a tip (radius 1.15) to a notch (0.45), straight in the plane.
        turn = 2 * math.pi / 5
        angle = np.abs((np.arctan2(u, -v) + turn / 2) % turn - turn / 2)
        tip, notch = 1.15, 0.45
        px, py = rho * np.cos(angle), rho * np.sin(angle)
        nx, ny = notch * math.cos(turn / 2), notch * math.sin(turn / 2)
        inside = (px - tip) * ny - py * (nx - tip) < 0
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    coverage = np.broadcast_to(inside, (size * supersample,) * 2).astype(np.float32)
    return coverage.reshape(size, supersample, size, supersample).mean((1, 3))


# ------------------------------------------------------------------------------------------------
# The verifier: background, components, colour vote, shape templates
# ------------------------------------------------------------------------------------------------

_FOREGROUND = 0.30      # a pixel this far (RGB in [0, 1], Euclidean) from the background belongs to an object
_MIN_AREA = 8.0         # pixels; smaller components are specks of the decoder
_MIN_MATCH = 0.72       # soft overlap with the best template under which a blob is no shape
_MAX_COLOR_ERROR = 0.28  # distance to the nearest palette colour over which a blob has no colour


def _normalized_crops(alpha):
    """Resample soft masks [N, H, W] to [N, 20, 20], centred on their centroid and scaled by their rms radius."""
    n, h, w = alpha.shape
    ys, xs = torch.arange(h) + 0.5, torch.arange(w) + 0.5
    mass = alpha.sum((1, 2))
    x, y = (alpha.sum(1) * xs).sum(1) / mass, (alpha.sum(2) * ys).sum(1) / mass
    spread = (alpha.sum(1) * (xs - x[:, None]) ** 2).sum(1) + (alpha.sum(2) * (ys - y[:, None]) ** 2).sum(1)
    radius = (spread / mass).sqrt()
    step = torch.linspace(-2.0, 2.0, 20)
    gx = (x[:, None] + radius[:, None] * step)[:, None, :].expand(n, 20, 20) * 2 / w - 1
    gy = (y[:, None] + radius[:, None] * step)[:, :, None].expand(n, 20, 20) * 2 / h - 1
    crops = F.grid_sample(alpha[:, None], torch.stack([gx, gy], -1), align_corners=False)[:, 0]
    return crops, x, y, mass


@lru_cache
def _templates():
    """One soft template per shape, averaged over sizes and sub-pixel offsets as in the pictures: [6, 20, 20]."""
    placements = [(16 + dx, 16 + dy, r) for dx in (0.0, 0.5) for dy in (0.0, 0.5) for r in (4.2, 5.0, 6.0)]
    masks = [[shape_mask(shape, *place) for place in placements] for shape in SHAPES]
    crops = _normalized_crops(torch.from_numpy(np.array(masks)).flatten(0, 1))[0]
    return crops.view(len(SHAPES), -1, 20, 20).mean(1)


def connected_components(foreground):
    """Number the 8-connected regions of bool masks [B, H, W]: float32 [B, H, W], 0 outside, one number a region."""
    # Every foreground pixel takes the largest pixel number it can reach; float32 is exact up to 2**24 pixels.
    numbers = torch.arange(1, foreground[0].numel() + 1, dtype=torch.float32, device=foreground.device)
    labels = numbers.view(1, *foreground.shape[1:]) * foreground
    while True:
        spread = (F.max_pool2d(labels[:, None], 3, 1, 1)[:, 0] * foreground).flatten(1)
        # Go on to what the pixel found has found itself, so that the reach doubles instead of growing by one.
        spread = F.pad(spread, (1, 0)).gather(1, spread.long()).view_as(labels)
        if torch.equal(spread, labels):
            return labels
        labels = spread


def detect_shapes(images):
    """Find the objects in a batch of 32x32 pictures, uint8 RGB [B, 32, 32, 3].

    Returns, for each image, a list of (shape or None, color or None, x, y) in pixels.  None stands for a blob that
    looks like none of the six shapes or has none of the eight colours: it counts as an object, a wrong one.
    """
    rgb = torch.as_tensor(np.asarray(images), dtype=torch.float32) / 255                        # [B, 32, 32, 3]
    border = torch.cat([rgb[:, 0], rgb[:, -1], rgb[:, :, 0], rgb[:, :, -1]], 1)
    background = border.median(1).values[:, None, None]                                         # [B, 1, 1, 3]
    distance = (rgb - background).norm(dim=-1)                                                  # [B, 32, 32]
    foreground = distance > _FOREGROUND
    labels = connected_components(foreground)
    # One row per component: (image, label); sorted by image because the key is image * 2048 + label.
    keys = (torch.arange(len(rgb)).view(-1, 1, 1) * 2048 + labels.long())[foreground]
    keys, areas = torch.unique(keys, return_counts=True)
    keys = keys[areas >= _MIN_AREA]
    found = [[] for _ in range(len(rgb))]
    if len(keys) == 0:
        return found
    owner = keys // 2048
    mask = labels[owner] == (keys % 2048).view(-1, 1, 1)                                        # [N, 32, 32]
    # An object's colour is the mean of its pixels that differ most from the background: edges are mixtures.
    strength = distance[owner] * mask
    core = strength > 0.75 * strength.flatten(1).quantile(0.97, dim=1).view(-1, 1, 1).clamp(max=9.0)
    core |= strength >= strength.amax((1, 2), keepdim=True)
    color = (rgb[owner] * core[..., None]).sum((1, 2)) / core.sum((1, 2))[:, None]              # [N, 3]
    palette = torch.tensor(list(PALETTE.values()), dtype=torch.float32) / 255
    color_error, color_index = torch.cdist(color, palette).min(1)
    # Coverage of a pixel: how far it has gone from the background to the object's colour.
    toward = color[:, None, None] - background[owner]
    alpha = ((rgb[owner] - background[owner]) * toward).sum(-1) / toward.pow(2).sum(-1)
    near = F.max_pool2d(mask[:, None].float(), 3, 1, 1)[:, 0]
    crops, x, y, _ = _normalized_crops(alpha.clamp(0, 1) * near + 1e-6 * mask)
    low, high = (f(crops[:, None], _templates()[None]).sum((2, 3)) for f in (torch.minimum, torch.maximum))
    match, shape_index = (low / high).max(1)
    for i, image in enumerate(owner.tolist()):
        shape = SHAPES[shape_index[i]] if match[i] >= _MIN_MATCH else None
        name = list(PALETTE)[color_index[i]] if color_error[i] <= _MAX_COLOR_ERROR else None
        found[image].append((shape, name, float(x[i]), float(y[i])))
    return found


def score_detections(wanted, found):
    """Grade what was found in one image against `parse_prompt`'s answer: 1.0 if all is right, else in [0, 0.9].

    The partial score is the mean of three shares: objects matched (shape and, if asked for, colour, half each, best
    assignment), count, and relation (if asked for).
    """
    objects, n = wanted["objects"], len(found)

    def agreement(want, have):
        shape_ok = float(want[0] == have[0])
        return shape_ok if want[1] is None else 0.5 * shape_ok + 0.5 * (want[1] == have[1])

    best, best_order = 0.0, ()
    # Surplus blobs cannot help; the largest scene has four objects, so trying every assignment is cheap.
    for order in itertools.permutations(range(min(n, 6)), min(len(objects), n, 6)):
        total = sum(agreement(objects[i], found[j]) for i, j in enumerate(order))
        if total > best:
            best, best_order = total, order
    parts = [best / len(objects), 1.0 - min(1.0, abs(n - len(objects)) / len(objects))]
    if wanted["relation"]:
        right = 0.0
        if len(best_order) == 2 and best == 2.0:
            (_, _, ax, ay), (_, _, bx, by) = (found[j] for j in best_order)
            sx, sy = RELATIONS[wanted["relation"]]
            along, across = (ax - bx) * sx + (ay - by) * sy, abs((ax - bx) * sy) + abs((ay - by) * sx)
            right = float(along > 2.0 and along > across)
        parts.append(right)
    score = sum(parts) / len(parts)
    return 1.0 if score == 1.0 else min(0.9, score)


def shapes(images, prompts, metadata):
    """The embedded verifier: 1.0 where an image obeys its prompt, a graded score in [0, 0.9] where it does in part.

    Images of any size are looked at in 32x32 RGB.  Raises ValueError for a prompt outside the grammar.
    """
    wanted = [parse_prompt(prompt) for prompt in prompts]
    pixels = [np.asarray(image.convert("RGB").resize((32, 32)) if image.size != (32, 32) else image.convert("RGB"))
              for image in images]
    return torch.tensor([score_detections(w, f) for w, f in zip(wanted, detect_shapes(np.stack(pixels)))])


# ------------------------------------------------------------------------------------------------
# Rewards that need no model
# ------------------------------------------------------------------------------------------------


def jpeg_compressibility(images, prompts, metadata):
    """Minus the size of each image as a JPEG of quality 95, in kilobytes (DDPO, arXiv 2305.13301)."""
    return -jpeg_incompressibility(images, prompts, metadata)


def jpeg_incompressibility(images, prompts, metadata):
    """The size of each image as a JPEG of quality 95, in kilobytes (1000 bytes)."""
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes)


# ------------------------------------------------------------------------------------------------
# Rewards that are models: loaded once, from a local folder or the hub, in half precision on a GPU
# ------------------------------------------------------------------------------------------------

# What each reward loads: part -> hub id, "." being the model itself.  `reward=PATH` takes "." from the folder or hub id
# PATH; a reward whose parts are all named takes them from the subfolders PATH/part.
MODELS = {
    "pickscore": {".": "yuvalkirstain/PickScore_v1", "processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"},
    "clipscore": {".": "openai/clip-vit-large-patch14"},
    "aesthetic": {".": "openai/clip-vit-large-patch14", "head": "trl-lib/ddpo-aesthetic-predictor"},
    "geneval": {"detector": "facebook/mask2former-swin-small-coco-instance", "clip": "openai/clip-vit-large-patch14"},
    "ocr": {"detector": "PaddlePaddle/PP-OCRv5_server_det_safetensors",
            "recognizer": "PaddlePaddle/PP-OCRv5_server_rec_safetensors"},
    "vlm": {".": "Qwen/Qwen2.5-VL-7B-Instruct"},
}
MODELS["geneval_accuracy"] = MODELS["geneval"]
BATCH_SIZE = 16  # images a forward pass: bounds memory, and the scores do not depend on it


def model_paths(name, source):
    """Where the parts of a reward are, {part: folder or hub id}: the default ids, or as `name=source` says."""
    paths = MODELS[name]
    if source is None:
        return paths
    if "." in paths:
        return {**paths, ".": source}
    folders = {part: os.path.join(source, part) for part in paths}
    if not all(os.path.isdir(folder) for folder in folders.values()):
        raise UserError(f"--reward {name}={source}: there must be a folder {source} with the subfolders "
                          + " and ".join(f"{part} (the files of {paths[part]})" for part in paths))
    return folders


def load_pretrained(auto_class, path, device=None, dtype=None):
    """`from_pretrained` that asks no hub for a folder; with a device, a frozen model in evaluation mode on it."""
    options = {"local_files_only": os.path.isdir(path)}
    if device is None:
        return auto_class.from_pretrained(path, **options)
    dtype = dtype or (torch.float16 if torch.device(device).type == "cuda" else torch.float32)
    model, info = auto_class.from_pretrained(path, dtype=dtype, output_loading_info=True, **options)
    # transformers draws weights that are missing at random and only warns: such a judge would score noise.
    missing = sorted(set(info["missing_keys"]) & {key for key, _ in model.named_parameters()})
    if missing:
        raise UserError(f"{path} is no {type(model).__name__}: it has no weights for {missing[0]}")
    return model.to(device).requires_grad_(False).eval()


def batches(items, size=BATCH_SIZE):
    """Cut a list into lists of at most `size`."""
    return [items[i:i + size] for i in range(0, len(items), size)]


def same_size_batches(images):
    """Batches of neighbours of one size, as padding an image for the sake of another would change its score."""
    for _, group in itertools.groupby(images, key=lambda image: image.size):
        yield from batches(list(group))


def load_clip(path, processor_path, device):
    """A CLIP model and its processor, to be handed to embed_images and embed_texts as one."""
    from transformers import CLIPModel, CLIPProcessor
    return load_pretrained(CLIPModel, path, device), load_pretrained(CLIPProcessor, processor_path)


def unit_embeddings(features):
    """What get_image_features or get_text_features returns (transformers 5: an output object) -> float32, length 1."""
    return F.normalize(getattr(features, "pooler_output", features).float(), dim=-1)


def embed_images(clip, images):
    """CLIP embeddings of B PIL images, float32 [B, D], each of length 1."""
    model, processor = clip
    parts = []
    for batch in batches(images):
        pixels = processor(images=[image.convert("RGB") for image in batch], return_tensors="pt").pixel_values
        parts.append(unit_embeddings(model.get_image_features(pixel_values=pixels.to(model.device, model.dtype))))
    return torch.cat(parts)


def embed_texts(clip, texts):
    """CLIP embeddings of B strings, float32 [B, D], each of length 1; what lies beyond CLIP's 77 tokens is cut off."""
    model, processor = clip
    unique, parts = list(dict.fromkeys(texts)), []  # a group's images share their prompt
    for batch in batches(unique):
        tokens = processor(text=batch, padding=True, truncation=True, return_tensors="pt",
                           max_length=model.config.text_config.max_position_embeddings).to(model.device)
        parts.append(unit_embeddings(model.get_text_features(input_ids=tokens.input_ids,
                                                             attention_mask=tokens.attention_mask)))
    return torch.cat(parts)[[unique.index(text) for text in texts]]


def cosines(clip, images, texts):
    """Cosine of each image with its own text: float32 [B]."""
    return (embed_images(clip, images) * embed_texts(clip, texts)).sum(-1)


def load_pickscore(paths, device):
    """PickScore (arXiv 2305.01569): exp(logit_scale) cos(image, text), about 22 for SD3.5-M as in published tables."""
    # The authors' processor is the laion one; a local folder may hold it beside the weights.
    own = os.path.isfile(os.path.join(paths["."], "tokenizer_config.json"))
    clip = load_clip(paths["."], paths["."] if own else paths["processor"], device)
    scale = clip[0].logit_scale.float().exp()
    return lambda images, prompts, metadata: scale * cosines(clip, images, prompts)


def load_clipscore(paths, device):
    """CLIPScore (Hessel et al. 2021, arXiv 2104.08718) without its factor 2.5, in per cent: 100 max(cos, 0)."""
    clip = load_clip(paths["."], paths["."], device)
    return lambda images, prompts, metadata: 100 * cosines(clip, images, prompts).clamp(min=0)


def load_aesthetic(paths, device):
    """The LAION aesthetic predictor, about 1 to 10: a linear map of the CLIP ViT-L/14 image embedding (of length 1).

    Its head "sac+logos+ava1-l14-linearMSE" comes from github.com/christophschuhmann/improved-aesthetic-predictor; the
    hub repository holds the same weights as aesthetic-model.pth.  A local folder holds CLIP and the head side by side.
    """
    from huggingface_hub import hf_hub_download
    from safetensors.torch import load_file
    clip = load_clip(paths["."], paths["."], device)
    names = ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.safetensors")
    local = [path for path in (os.path.join(paths["."], name) for name in names) if os.path.isfile(path)]
    if os.path.isdir(paths["."]) and not local:
        raise UserError(f"{paths['.']} holds no head of the aesthetic predictor ({' or '.join(names)})")
    path = local[0] if local else hf_hub_download(paths["head"], names[0])
    state = load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    # Linear layers with nothing but dropout between them, 768-1024-128-64-16-1: the state dict says it all.
    layers = [(weight.float().to(device), state[key.replace("weight", "bias")].float().to(device))
              for key, weight in state.items() if key.endswith("weight")]
    if layers[0][0].shape[1] != clip[0].config.projection_dim:
        raise UserError(f"the aesthetic head {path} takes embeddings of size {layers[0][0].shape[1]}, "
                          f"the CLIP model {paths['.']} gives {clip[0].config.projection_dim}")

    def aesthetic(images, prompts, metadata):
        hidden = embed_images(clip, images)
        for weight, bias in layers:
            hidden = F.linear(hidden, weight, bias)
        return hidden[:, 0]

    return aesthetic


# ------------------------------------------------------------------------------------------------
# GenEval (arXiv 2310.11513): detected objects, the geometry of their boxes, CLIP for their colours
# ------------------------------------------------------------------------------------------------

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# GenEval's own names of some COCO classes, by the label of the detector (both spellings of COCO in use).
GENEVAL_NAMES = {
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard", "hair dryer": "hair drier",
    "tvmonitor": "tv", "sofa": "couch", "pottedplant": "potted plant", "diningtable": "dining table",
    "motorbike": "motorcycle", "aeroplane": "airplane",
}


def geneval_objects(metadata, detections, name):
    """The detections of a class that count as objects under the published thresholds, the most confident first."""
    threshold = 0.9 if metadata.get("tag") == "counting" else 0.3
    return sorted((d for d in detections if d[0] == name and d[1] > threshold), key=lambda d: -d[1])[:16]


def box_relations(box, other):
    """The RELATIONS in which a box (x0, y0, x1, y1) stands to another one, a set: none, one or two.

    The centres must lie further apart than 0.1 of both sizes together, and the rest make up half of their distance.
    """
    offset = [(box[i] + box[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1)]
    slack = [0.1 * (box[i + 2] - box[i] + other[i + 2] - other[i]) for i in (0, 1)]
    clear = [math.copysign(max(abs(o) - s, 0), o) for o, s in zip(offset, slack)]
    if max(map(abs, clear)) < 1e-3:
        return set()
    return {name for name, (x, y) in RELATIONS.items() if (x * clear[0] + y * clear[1]) / math.hypot(*offset) > 0.5}


def score_geneval(metadata, detections, exact=True):
    """Grade detections, a list of (class, confidence, box (x0, y0, x1, y1), color or None), against a GenEval prompt.

    exact: the partial score of Flow-GRPO's reward server, a mean over 1 - |found - count| / count for every class
    included, the share of right colours, and 1 or 0 for a relation (0 if the count is wrong).  1.0 if and only if all
    is right; below 0 where far too many are found.  A failed relation counts once, as 0; there, as a 0 and a 1.
    Not exact: GenEval's own accuracy, 1.0 or 0.0, for which only the `count` most confident objects of a class matter
    and more of them do no harm but for `exclude`.
    """
    parts, matched = [], []
    for wanted in metadata["include"]:
        count, found = wanted["count"], geneval_objects(metadata, detections, wanted["class"])
        found = found if exact else found[:count]
        parts.append(1 - abs(len(found) - count) / count)
        right = len(found) == count
        if "color" in wanted:
            parts.append(right * sum(d[3] == wanted["color"] for d in found) / count)
            right = parts[-1] == 1
        if "position" in wanted:
            relation, target = wanted["position"]
            right = right and matched[target] is not None and all(
                relation in box_relations(d[2], other[2]) for d in found for other in matched[target])
            parts.append(float(right))
        matched.append(found if right else None)
    for unwanted in metadata.get("exclude", []):
        # The exact count of a class that is included has already said what its exclusion says.
        counted = exact and unwanted["class"] in [wanted["class"] for wanted in metadata["include"]]
        if not counted and len(geneval_objects(metadata, detections, unwanted["class"])) >= unwanted["count"]:
            parts.append(0.0)
    return sum(parts) / len(parts) if exact else float(all(part == 1 for part in parts))


def load_detector(path, device):
    """Mask2Former and its image processor, as detect_objects takes them."""
    from transformers import Mask2FormerImageProcessor, Mask2FormerModel, Mask2FormerPreTrainedModel

    class Detector(Mask2FormerPreTrainedModel):
        """Mask2FormerForUniversalSegmentation without its loss, which would want scipy."""

        def __init__(self, config):
            super().__init__(config)
            self.model = Mask2FormerModel(config)
            self.class_predictor = torch.nn.Linear(config.hidden_dim, config.num_labels + 1)
            self.post_init()

        def forward(self, pixel_values):  # -> class logits [B, Q, labels + 1], mask logits [B, Q, h, w]
            output = self.model(pixel_values, output_hidden_states=True)
            last = output.transformer_decoder_intermediate_states[-1].transpose(0, 1)
            return self.class_predictor(last), output.masks_queries_logits[-1]

    # In float32 even on a GPU: it is a small model, and its confidences are held against published thresholds.
    model = load_pretrained(Detector, path, device, torch.float32)
    model.config.id2label = {i: GENEVAL_NAMES.get(name, name) for i, name in model.config.id2label.items()}
    return model, load_pretrained(Mask2FormerImageProcessor, path)


def detect_objects(detector, images):
    """Instances in B RGB images of one size: for each image a list of (label, confidence, box, mask).

    The confidence is the class probability times the mean probability inside the mask, as in the public protocol; the
    box is (x0, y0, x1, y1) in pixels, the mask bool [H, W].
    """
    model, processor = detector
    pixels = processor(images=images, return_tensors="pt").pixel_values.to(model.device)
    class_logits, mask_logits = model(pixels)
    found = []
    for logits, masks in zip(class_logits, mask_logits):
        probabilities = logits.softmax(-1)[:, :-1].flatten()  # [queries * labels], the last label being "no object"
        confidences, indices = probabilities.topk(min(100, len(probabilities)))
        found.append([])
        for index in indices[confidences > 0.3].tolist():  # the mask can only lower it
            query, label = divmod(index, logits.shape[1] - 1)
            mask = F.interpolate(masks[None, None, query], pixels.shape[-2:], mode="bilinear")
            mask = F.interpolate(mask, images[0].size[::-1], mode="bilinear")[0, 0]
            y, x = (mask > 0).nonzero().T
            if len(x):
                confidence = float(probabilities[index] * mask[mask > 0].sigmoid().mean())
                box = (int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1)
                found[-1].append((model.config.id2label[label], confidence, box, (mask > 0).cpu().numpy()))
    return found


def color_texts(name):
    """The public protocol's three templates for each of COLORS: 30 strings, colour by colour."""
    return [text for color in COLORS for text in (
        f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}", f"a photo of a {color} object")]


def object_crops(image, objects):
    """Each object (label, confidence, box, mask) cut out of an RGB image, grey where its mask is not."""
    grey = Image.new("RGB", image.size, "#999")
    return [Image.composite(image, grey, Image.fromarray(mask)).crop(box) for _, _, box, mask in objects]


def check_geneval_metadata(prompt, metadata, names):
    """Raise UserError for a prompt without the fields of GenEval's files, or with a class nobody would ever find."""
    if not metadata.get("include"):
        raise UserError(f"geneval: the prompt {prompt!r} has no field 'include'; give a .jsonl of GenEval's form")
    for wanted in metadata["include"] + metadata.get("exclude", []):
        if wanted["class"] not in names or wanted.get("color", COLORS[0]) not in COLORS:
            raise UserError(f"geneval: the prompt {prompt!r} asks for {wanted}, a class or colour that is not known")


def load_geneval(paths, device, exact=True):
    """GenEval by Mask2Former and CLIP: the reward is score_geneval's partial score, 1.0 if and only if all is right."""
    detector = load_detector(paths["detector"], device)
    clip = load_clip(paths["clip"], paths["clip"], device)

    @lru_cache(None)
    def color_embeddings(name):  # [10, D]
        return F.normalize(embed_texts(clip, color_texts(name)).view(len(COLORS), 3, -1).mean(1), dim=-1)

    def object_colors(image, objects):
        embeddings = embed_images(clip, object_crops(image, objects)) if objects else []
        return [COLORS[int((color_embeddings(d[0]) @ e).argmax())] for d, e in zip(objects, embeddings)]

    def geneval(images, prompts, metadata):
        for prompt, fields in zip(prompts, metadata):
            check_geneval_metadata(prompt, fields, detector[0].config.id2label.values())
        images, scores = [image.convert("RGB") for image in images], []
        found = (objects for batch in same_size_batches(images) for objects in detect_objects(detector, batch))
        for image, fields, objects in zip(images, metadata, found):
            colored = {id(d): d for wanted in fields["include"] if "color" in wanted
                       for d in geneval_objects(fields, objects, wanted["class"])}
            colors = dict(zip(colored, object_colors(image, list(colored.values()))))
            scores.append(score_geneval(fields, [(*d[:3], colors.get(id(d))) for d in objects], exact))
        return torch.tensor(scores)

    return geneval


# ------------------------------------------------------------------------------------------------
# OCR: how much of the quoted text can be read, by PP-OCRv5
# ------------------------------------------------------------------------------------------------
# PP-OCRv5 and not GOT-OCR2, the other reader in transformers: it is a tenth of the size, reads all lines of a batch at
# once instead of token by token, and is the successor of what the authors used.  transformers' image processors for it
# want torchvision and opencv, so what they do stands here.  Boxes are upright: slanted lines are read less well.


def wanted_text(prompt, metadata):
    """What an image should say: the field `text` of its metadata, or the first part of the prompt in double quotes,
    straight or curly (the first as in the authors' code).  Raises UserError if there is neither."""
    quoted = re.search(r'"([^"]+)"|“([^”]+)”', prompt)
    text = metadata.get("text") or (quoted and (quoted[1] or quoted[2])) or ""
    if not text.strip():
        raise UserError(f"ocr: the prompt {prompt!r} has no text in double quotes, nor a field 'text'")
    return text


def edit_distance(a, b):
    """Levenshtein distance of two strings: insertions, deletions and substitutions cost 1."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def ocr_score(read, wanted):
    """1 - edit distance / length of the wanted text, in [0, 1], whatever the case and without spaces.

    As in Flow-GRPO's code, text that contains all that is wanted is perfect, whatever else there is to read.
    """
    read, wanted = (text.replace(" ", "").lower() for text in (read, wanted))
    return 1.0 if wanted in read else 1 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


def text_boxes(probability):
    """Lines of text in a detector's map [H, W]: boxes (x0, y0, x1, y1) in its pixels, in reading order.

    DB (arXiv 1911.08947) with PP-OCR's numbers: regions above 0.3 with a mean of 0.6 or more and sides of 3 or more,
    grown by 1.5 area / perimeter as the map shows text shrunken by that much.
    """
    height, width = probability.shape
    foreground = probability > 0.3
    _, region, area = connected_components(foreground[None])[0][foreground].unique(
        return_inverse=True, return_counts=True)
    means = torch.zeros_like(area, dtype=torch.float32).index_add_(0, region, probability[foreground]) / area
    y, x = foreground.nonzero().T
    corners = torch.stack([x, y, -x - 1, -y - 1])  # the least of each is an edge of the box
    edges = corners.new_zeros(4, len(area)).scatter_reduce(1, region.expand(4, -1), corners, "amin", include_self=False)
    boxes, lines = [], []
    for (x0, y0, x1, y1), mean in zip(edges.T.tolist(), means.tolist()):
        w, h = -x1 - x0, -y1 - y0
        if min(w, h) >= 3 and mean >= 0.6:
            grow = 1.5 * w * h / (2 * (w + h))
            boxes.append((max(x0 - grow, 0), max(y0 - grow, 0), min(-x1 + grow, width), min(-y1 + grow, height)))
    for box in sorted(boxes, key=lambda box: box[1]):
        if lines and (box[1] + box[3]) / 2 < lines[-1][0][3]:  # its middle is above the foot of the line's first box
            lines[-1].append(box)
        else:
            lines.append([box])
    return [box for line in lines for box in sorted(line)]


def read_ctc(probabilities, characters):
    """Greedy CTC, class 0 being the blank: [T, C] -> text, "" if its mean confidence is under PP-OCR's 0.5."""
    confidence, index = probabilities.max(-1)
    kept = (index != 0) & (index != F.pad(index[:-1], (1, 0)))
    sure = bool(kept.any()) and confidence[kept].mean() >= 0.5
    return "".join(characters[i] for i in index[kept].tolist()) if sure else ""


def rgb_tensor(images):
    """RGB images of one size -> float32 [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255


def cut_lines(detector, images):
    """RGB images of one size -> for each a list of its lines of text, as images, in reading order."""
    width, height = images[0].size
    scale = min(1, 960 / max(width, height))
    w, h = (max(32, 32 * round(int(side * scale) / 32)) for side in (width, height))
    pixels = rgb_tensor([image.resize((w, h), Image.Resampling.BILINEAR) for image in images]).flip(1)
    # It was trained on BGR images, but with ImageNet's mean and deviation of R, G and B in that order.
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    pixels = (pixels - mean) / deviation
    maps = detector(pixel_values=pixels.to(detector.device, detector.dtype)).last_hidden_state[:, 0].float()
    lines = []
    for image, probability in zip(images, maps):
        crops = [image.crop([round(edge * of / to) for edge, of, to in zip(box, 2 * (width, height), 2 * (w, h))])
                 for box in text_boxes(probability)]
        lines.append([c.transpose(Image.Transpose.ROTATE_90) if c.height >= 1.5 * c.width else c for c in crops])
    return lines


def read_lines(recognizer, characters, crops):
    """The text of each crop, seen 48 high and padded to the next multiple of 320 in width, whatever else is read."""
    widths = [min(3200, math.ceil(48 * crop.width / crop.height)) for crop in crops]
    texts = [""] * len(crops)
    for padded in range(320, 3201, 320):
        for rows in batches([i for i, width in enumerate(widths) if padded - 320 < width <= padded]):
            pixels = torch.cat([F.pad(2 * rgb_tensor([crops[i].resize((widths[i], 48), Image.Resampling.BILINEAR)]) - 1,
                                      (0, padded - widths[i])) for i in rows])
            output = recognizer(pixel_values=pixels.to(recognizer.device, recognizer.dtype)).last_hidden_state
            for i, probabilities in zip(rows, output.float().cpu()):
                texts[i] = read_ctc(probabilities, characters)
    return texts


def load_ocr(paths, device):
    """How much of the quoted text is read in the image, in [0, 1]: ocr_score of all lines in reading order."""
    import transformers
    detector = load_pretrained(transformers.AutoModelForObjectDetection, paths["detector"], device)
    recognizer = load_pretrained(transformers.AutoModelForTextRecognition, paths["recognizer"], device)
    settings, _ = transformers.BaseImageProcessor.get_image_processor_dict(paths["recognizer"])

    def ocr(images, prompts, metadata):
        wanted = [wanted_text(prompt, fields) for prompt, fields in zip(prompts, metadata)]
        images = [image.convert("RGB") for image in images]
        lines = [lines for batch in same_size_batches(images) for lines in cut_lines(detector, batch)]
        texts = iter(read_lines(recognizer, settings["character_list"], list(itertools.chain(*lines))))
        read = ["".join(itertools.islice(texts, len(of_image))) for of_image in lines]
        return torch.tensor([ocr_score(*pair) for pair in zip(read, wanted)])

    return ocr


# ------------------------------------------------------------------------------------------------
# A vision-language model as a judge
# ------------------------------------------------------------------------------------------------
# Of the judges in the papers two cannot run here: transformers has neither ImageReward's head on BLIP, in a checkpoint
# format of its own, nor DeQA's mPLUG-Owl2.  UnifiedReward is a fine-tuned vision-language model: its versions on an
# architecture of transformers (Qwen2.5-VL) run as `vlm=ID`, though asked RATING_PROMPT and not their authors' question.

RATING_PROMPT = (
    'This image was made for the caption "{prompt}". How well does it show what the caption asks for, and how good '
    "does it look? Rate both together from 1 (bad) to 5 (excellent). Answer with a single digit."
)


def expected_rating(logits):
    """Logits of the answers "1" to "5", [B, 5] -> the mean of their distribution, float32 [B] in [1, 5]."""
    return logits.float().softmax(-1) @ torch.arange(1.0, 6.0, device=logits.device)


def load_vlm_processor(path):
    """The processor of an image-text model without its part for videos, which would want torchvision."""
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    whole = PROCESSOR_MAPPING[type(load_pretrained(AutoConfig, path))]
    parts = [part for part in whole.get_attributes() if part != "video_processor"]
    still = type(whole.__name__, (whole,), {"get_attributes": classmethod(lambda cls: parts)})
    processor = load_pretrained(still, path)
    processor.tokenizer.padding_side = "left"  # then every row of a batch ends where its answer begins
    return processor


def load_vlm(paths, device):
    """The rating from 1 to 5 that a vision-language model is expected to give, asked RATING_PROMPT."""
    from transformers import AutoModelForImageTextToText
    # bfloat16, in which these models are trained: their activations overflow float16.
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    model = load_pretrained(AutoModelForImageTextToText, paths["."], device, dtype)
    processor = load_vlm_processor(paths["."])
    digits = [processor.tokenizer.encode(str(rating), add_special_tokens=False)[-1] for rating in range(1, 6)]
    if len(set(digits)) < 5:
        raise UserError(f"the tokenizer of {paths['.']} has no tokens of their own for the ratings 1 to 5")

    def vlm(images, prompts, metadata):
        scores = []
        for batch in batches(list(zip(images, prompts))):
            questions = [{"type": "text", "text": RATING_PROMPT.format(prompt=prompt)} for _, prompt in batch]
            chats = [[{"role": "user", "content": [{"type": "image"}, question]}] for question in questions]
            inputs = processor(text=processor.apply_chat_template(chats, add_generation_prompt=True), padding=True,
                               images=[[image.convert("RGB")] for image, _ in batch], return_tensors="pt")
            answer = model.generate(**inputs.to(model.device, dtype), max_new_tokens=1, do_sample=False,
                                    output_logits=True, return_dict_in_generate=True)
            scores.append(expected_rating(answer.logits[0][:, digits]))
        return torch.cat(scores)

    return vlm


# ------------------------------------------------------------------------------------------------
# The way a reward is named on the command line
# ------------------------------------------------------------------------------------------------

REWARDS = {f.__name__: f for f in (shapes, jpeg_compressibility, jpeg_incompressibility)}
LOADERS = {"pickscore": load_pickscore, "clipscore": load_clipscore, "aesthetic": load_aesthetic,
           "geneval": load_geneval, "geneval_accuracy": partial(load_geneval, exact=False), "ocr": load_ocr,
           "vlm": load_vlm}
# Rewards under which a picture can be plainly right: for these the share of 1.0s is reported as strict accuracy.
STRICT_REWARDS = {"shapes", "geneval", "geneval_accuracy"}


def quiet_libraries():
    """Keep transformers and the hub's client from talking: what goes wrong is said once, in a sentence of our own."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging
    hub_logging.set_verbosity_error()   # it would report each of five tries to find the network
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def load_models(name, source, device):
    """The reward `name` with its models loaded, from `source` if it is not None.  Raises UserError."""
    quiet_libraries()
    paths = model_paths(name, source)
    try:
        return LOADERS[name](paths, device)
    except UserError:
        raise
    except Exception as error:  # no network, no licence accepted, a wrong folder: each library has its own exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the reward {name!r} cannot be loaded from {' and '.join(paths.values())}: {reason} "
                          f"(give --reward {name}=FOLDER with the models' files)") from error


def load_function(name, device="cpu"):
    """A reward by its name: `reward`, `reward=folder or hub id`, or `path/to/file.py:function`.  Raises UserError."""
    base, equals, source = name.partition("=")
    if base in LOADERS:
        return load_models(base, source if equals else None, device)
    if base in REWARDS:
        if equals:
            raise UserError(f"the reward {base!r} has no model, so it takes no '={source}'")
        return REWARDS[base]
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        known = ", ".join([*REWARDS, *LOADERS])
        raise UserError(f"unknown reward {name!r}; known: {known}, or path/to/file.py:function")
    if not Path(path).is_file():
        raise UserError(f"the reward file {path} does not exist")
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file does wrong is the user's to read, in one sentence
        raise UserError(f"the reward file {path} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, function, None)):
        raise UserError(f"the reward file {path} has no function {function!r}")
    return getattr(module, function)


def parse_reward(spec):
    """`name:weight,name` -> [(name, weight)]; a name may itself contain a colon, as `file.py:function` does."""
    terms = []
    for item in map(str.strip, spec.split(",")):
        name, _, weight = item.rpartition(":")
        try:
            terms.append((name, float(weight)) if name else (item, 1.0))
        except ValueError:  # what follows the colon is no number, so it belongs to the name
            terms.append((item, 1.0))
    return terms


def load_reward(spec, device="cpu"):
    """Turn a reward's name, or a weighted sum `name:weight,name:weight`, into one callable; models go to `device`.

    A name is that of a reward, `reward=FOLDER` or `reward=ID` for a reward that is a model, or `file.py:function`.  The
    callable takes (images: list of PIL images, prompts: list of str, metadata: list of dict), all of length B, and
    returns float32 [B] on the CPU.  Its attribute `strict` says whether 1.0 means "all right".  Raises UserError at
    once for what cannot be loaded, and when called for a reward that raises, or returns a wrong length or a NaN.
    """
    terms = [(name, weight, load_function(name, device)) for name, weight in parse_reward(spec)]

    def reward(images, prompts, metadata):
        total = torch.zeros(len(images))
        for name, weight, function in terms if images else ():   # one of many processes may own no group
            try:
                scores = torch.as_tensor(function(images, prompts, metadata), dtype=torch.float32).cpu()
            except UserError:
                raise
            except Exception as error:  # a reward is foreign code: name it, and let the caller save and stop
                raise UserError(f"the reward {name!r} raised {type(error).__name__}: {error} (first prompt of the "
                                  f"batch: {prompts[0]!r})") from error
            if scores.shape != (len(images),):
                raise UserError(f"the reward {name!r} returned shape {tuple(scores.shape)} for {len(images)} images "
                                  f"(first prompt: {prompts[0]!r})")
            if not scores.isfinite().all():
                culprit = prompts[int((~scores.isfinite()).nonzero()[0])]
                raise UserError(f"the reward {name!r} returned a value that is not finite for {culprit!r}")
            total += weight * scores
        return total

    reward.strict = len(terms) == 1 and terms[0][1] == 1.0 and terms[0][0].split("=")[0] in STRICT_REWARDS
    return reward
