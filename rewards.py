"""Rewards for DGPO: every reward is a callable (images, prompts, metadata) -> one float per image.

    reward = load_reward("shapes")                                   # a reward of this file: REWARDS, at its end
    reward = load_reward("shapes:1.0,jpeg_compressibility:-0.01")    # a weighted sum
    reward = load_reward("my_rewards.py:brightness")                 # a function of your own
    reward = load_reward("pickscore,aesthetic=models/aesthetic:0.1", "cuda")   # rewards that are models
    scores = reward(images, prompts, metadata)                       # [B] float32 on the CPU, higher is better

`images` is a list of PIL images, `prompts` of strings and `metadata` of dicts, the rows of the prompt file, all of
length B.  A function that scores is called without gradients, with copies of these, the images in RGB and every row
checked.  It may have three attributes: `check(prompt, fields)`, which raises an exception of any class for a row that
it cannot score; `strict`, true if a score of 1.0 means that all the prompt asks for is there; and `category(prompt)`,
the row of the final table that a prompt belongs to.
"""

import copy
import importlib
import io
import itertools
import json
import math
import os
import re
import sys
import unicodedata
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """Something the user can put right: dgpo.py's main() prints it as one sentence and exits with code 2."""


@contextmanager
def blame(what):
    """Whatever is raised inside but Ctrl-C becomes UserError(f"{what}: its first line"); a UserError passes as it is."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:   # SystemExit, too: what sys.exit(0) ends inside a reward is no success
        try:
            reason = brief((str(error).strip() or " ").splitlines()[0].strip(), 300)
        except Exception:   # its own __str__ fails
            reason = ""
        if " " not in reason:   # a KeyError says no more than its key, some say nothing
            reason = f"{type(error).__name__} {reason}".strip()
        raise UserError(f"{what}: {reason}") from error


def brief(value, length=80):
    """What comes from a file as it may be printed: cut, and with whatever a terminal would obey escaped as by repr."""
    text = str(value)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:length]) + "..." * (len(text) > length)


# ------------------------------------------------------------------------------------------------
# What comes from files: prompts, models, LoRAs
# ------------------------------------------------------------------------------------------------


def load_prompts(path, reward=None):
    """The rows of a file as dicts with the key "prompt", in order and as often as they stand there; no blank lines.

    A .jsonl or .ndjson file has one such dict a line, whose other fields are metadata for the reward, as GenEval's
    files do; a .txt file has one prompt a line.  The reward refuses rows that it cannot score and gives the others
    their category as "tag".  Raises UserError with the number of a line that is refused.
    """
    kind, rows = Path(path).suffix.lower(), []
    with blame(f"the prompt file {path} cannot be read"):
        if kind not in ("", ".txt", ".jsonl", ".ndjson"):
            raise ValueError("a prompt file is a .txt file, one prompt a line, or a .jsonl file")
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is no file (a pipe could be read only once, and not by --resume)")
        lines = Path(path).read_text(encoding="utf-8").replace("\ufeff", "").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with blame(f"{path}, line {number}"):
            row = json.loads(line) if kind in (".jsonl", ".ndjson") else {"prompt": line.strip()}
            if not (isinstance(row, dict) and isinstance(row.get("prompt"), str) and row["prompt"].strip()):
                raise ValueError('not an object with a text as its "prompt"')
            if len(row["prompt"].encode()) > 10_000:   # half a surrogate pair, which JSON can hold, fails here
                raise ValueError("its prompt is longer than 10,000 bytes")
            rows.append({**(reward.check(row) if reward else {}), **row})
    if not rows:
        raise UserError(f"the prompt file {path} holds no prompt")
    return rows


def quiet_libraries():
    """Keep the libraries from talking: what goes wrong is said once, in a sentence of our own."""
    from huggingface_hub.utils import logging as hub_logging
    hub_logging.set_verbosity_error()   # it would report each of five tries to find the network
    for name in ("diffusers", "transformers"):
        if name in sys.modules:
            logging = importlib.import_module(f"{name}.utils.logging")
            logging.set_verbosity_error()
            logging.disable_progress_bar()


def load_pretrained(kind, path, device=None, dtype=None, **where):
    """`from_pretrained` that asks no hub for a folder and runs no code of it; with a device, a frozen model on it.

    Everything pretrained comes through here, and what the libraries would make up or drop in silence is refused:
    weights that are missing, left over or not finite, a tokenizer without a vocabulary.  Raises UserError.
    """
    quiet_libraries()
    if kind.__module__.startswith("transformers"):
        where["trust_remote_code"] = False
    load = partial(kind.from_pretrained, path, local_files_only=os.path.isdir(path), **where)
    name = f"{path}{'/' + where['subfolder'] if 'subfolder' in where else ''} is no {kind.__name__}"
    if device is None:
        loaded = load()
        tokenizer = getattr(loaded, "tokenizer", loaded)
        if hasattr(tokenizer, "model_max_length"):
            tokenizer.model_max_length = min(tokenizer.model_max_length, 4096)   # texts may be padded to that
            if tokenizer("red").input_ids == tokenizer("blue").input_ids:
                raise UserError(f"{name}: it reads all words alike, as without its vocabulary")
        return loaded
    dtype = dtype or (torch.float16 if torch.device(device).type == "cuda" else torch.float32)
    model, info = load(torch_dtype=dtype, output_loading_info=True)
    parameters = dict(model.named_parameters())
    for wrong, keys in (("it has no weights for", set(info["missing_keys"]) & set(parameters)),
                        ("its file has other weights, too, as", set(info["unexpected_keys"])),
                        ("not all numbers are finite in", {k for k, p in parameters.items() if not p.isfinite().all()})):
        if keys:
            raise UserError(f"{name}: {wrong} {min(keys)}")
    return model.to(device).requires_grad_(False).eval()


def load_pipeline(path, dtype):
    """A pipeline of diffusers, a folder (no hub is asked) or a hub id, on the CPU; its VAE in float32."""
    import diffusers
    local, parts = os.path.isdir(path), {}
    for name, value in diffusers.DiffusionPipeline.load_config(path, local_files_only=local).items():
        library, kind = value if isinstance(value, (list, tuple)) and len(value) == 2 else ("", "")
        if library is None:
            parts[name] = None   # from_pretrained wants to be told what is left out
        elif library in ("diffusers", "transformers"):   # one by one, as what is missing would be made up
            kind = getattr(importlib.import_module(library), kind)
            device = "cpu" if issubclass(kind, torch.nn.Module) else None
            parts[name] = load_pretrained(kind, path, device, torch.float32 if name == "vae" else dtype, subfolder=name)
    return diffusers.DiffusionPipeline.from_pretrained(path, local_files_only=local, **parts)


def load_lora(path):
    """A LoRA of diffusers or peft, a file or its folder: dict layer -> (down [rank, in], up [out, rank] alpha / rank).

    Raises ValueError for what is more than low-rank matrices (DoRA, convolutions, ...).
    """
    path, names = Path(path), ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
    path = next((path / name for name in names if (path / name).exists()), path)
    with safe_open(path, "pt") as file:
        tensors = {re.sub(r"^(base_model\.model|transformer)\.", "", key): file.get_tensor(key) for key in file.keys()}
        about = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    if path.name == names[1]:   # peft's, which says its alpha beside it
        about = json.loads(path.with_name("adapter_config.json").read_text())
    about, pairs = {key.removeprefix("transformer."): value for key, value in about.items()}, {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        down, up = (tensors.pop(key.replace("lora_A", part), None) for part in ("lora_A", "lora_B"))
        if up is None or (down.ndim, up.shape[1:]) != (2, down.shape[:1]) or not (up.sum() + down.sum()).isfinite():
            raise ValueError(f"{key} is not the half of a low-rank matrix")
        scale = about["lora_alpha"] / about["r"] if about else 1.0
        pairs[key.removesuffix(".lora_A.weight")] = down.float(), up.float() * scale
    odd = [key for key in ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern") if about.get(key)]
    if odd or tensors or not pairs:
        raise ValueError(f"it has more than low-rank matrices: {[*odd, *tensors, 'or none'][0]}")
    return pairs


# ------------------------------------------------------------------------------------------------
# JPEG files and CLIP
# ------------------------------------------------------------------------------------------------


def jpeg_size(images, prompts, metadata, sign):
    """Plus or minus the size of each image as a JPEG of quality 95, in kilobytes of 1000 bytes (arXiv 2305.13301)."""
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        sizes.append(sign * buffer.tell() / 1000)
    return torch.tensor(sizes)


def batches(items, size=16):
    """Cut a list into lists of at most `size` neighbours, images by their size: padding them would change a score."""
    for _, group in itertools.groupby(items, lambda item: getattr(item, "size", None)):
        group = list(group)
        yield from (group[i:i + size] for i in range(0, len(group), size))


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


class Clip:
    """A CLIP model and its processor.  Embeddings are float32 [B, D], each of length 1."""

    def __init__(self, path, device, processor_path=None):
        from transformers import CLIPModel, CLIPProcessor
        self.model = load_pretrained(CLIPModel, path, device)
        self.processor = load_pretrained(CLIPProcessor, processor_path or path)

    def embed(self, kind, items):
        """Embed B items, PIL images or strings as kind says, "images" or "text"; texts are cut off at 77 tokens."""
        features_of = self.model.get_image_features if kind == "images" else self.model.get_text_features
        limits = dict(padding=True, truncation=True, max_length=self.model.config.text_config.max_position_embeddings)
        embeddings = []
        for batch in batches(items):
            inputs = self.processor(**{kind: batch}, return_tensors="pt", **(limits if kind == "text" else {}))
            features = features_of(**inputs.to(self.model.device, self.model.dtype)).pooler_output
            embeddings.append(F.normalize(features.float(), dim=-1))
        return torch.cat(embeddings)

    def cosines(self, images, prompts):
        """Cosine of each image with its own prompt: float32 [B]."""
        unique = list(dict.fromkeys(prompts))  # a group's images share their prompt
        texts = self.embed("text", unique)[[unique.index(prompt) for prompt in prompts]]
        return (self.embed("images", images) * texts).sum(-1)


def load_pickscore(paths, device):
    """PickScore (arXiv 2305.01569): exp(logit_scale) cos(image, text), about 22 for SD3.5-M as in published tables."""
    # The authors' processor is the laion one; a local folder may hold it beside the weights.
    own = os.path.isfile(os.path.join(paths["."], "tokenizer_config.json"))
    clip = Clip(paths["."], device, paths["."] if own else paths["processor"])
    scale = clip.model.logit_scale.float().exp()
    return lambda images, prompts, metadata: scale * clip.cosines(images, prompts)


def load_clipscore(paths, device):
    """CLIPScore (Hessel et al. 2021, arXiv 2104.08718) without its factor 2.5, in per cent: 100 max(cos, 0)."""
    clip = Clip(paths["."], device)
    return lambda images, prompts, metadata: 100 * clip.cosines(images, prompts).clamp(min=0)


def load_aesthetic(paths, device):
    """The LAION aesthetic predictor, about 1 to 10: a linear map of the CLIP ViT-L/14 image embedding (of length 1).

    Its head "sac+logos+ava1-l14-linearMSE" comes from github.com/christophschuhmann/improved-aesthetic-predictor; the
    hub repository holds the same weights as aesthetic-model.pth.  A local folder holds CLIP and the head side by side.
    """
    from huggingface_hub import hf_hub_download
    from safetensors.torch import load_file
    clip = Clip(paths["."], device)
    names = ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.safetensors")
    local = [path for name in names if os.path.isfile(path := os.path.join(paths["."], name))]
    if os.path.isdir(paths["."]) and not local:
        raise UserError(f"{paths['.']} holds no head of the aesthetic predictor ({' or '.join(names)})")
    path = local[0] if local else hf_hub_download(paths["head"], names[0])
    state = load_file(path, device) if path.endswith(".safetensors") else torch.load(path, device, weights_only=True)
    # Linear layers with nothing but dropout between them, 768-1024-128-64-16-1 as published, are one linear map.
    weight = torch.eye(clip.model.config.projection_dim, device=device)
    bias = torch.zeros_like(weight[0])
    names = [key.removesuffix("weight") for key in state if key.endswith("weight")]
    if not names or {name + part for name in names for part in ("weight", "bias")} != state.keys():
        raise UserError(f"{path} is no head of the aesthetic predictor: its keys are {brief(list(state))}")
    for name in names:
        layer = state[name + "weight"].float()
        if layer.shape[1] != len(bias):
            raise UserError(f"the aesthetic head {path} takes embeddings of size {layer.shape[1]}, the CLIP model "
                            f"{paths['.']} gives {len(bias)}")
        weight, bias = layer @ weight, layer @ bias + state[name + "bias"].float()
    return lambda images, prompts, metadata: F.linear(clip.embed("images", images), weight, bias)[:, 0]


# ------------------------------------------------------------------------------------------------
# GenEval (arXiv 2310.11513): detected objects, the geometry of their boxes, CLIP for their colours
# ------------------------------------------------------------------------------------------------

# A relation is where the first object lies as seen from the second, as a unit step (x to the right, y down).
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# GenEval's own names of some COCO classes, by the label of the detector (both spellings of COCO in use).
GENEVAL_NAMES = {
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard", "hair dryer": "hair drier",
    "tvmonitor": "tv", "sofa": "couch", "pottedplant": "potted plant", "diningtable": "dining table",
    "motorbike": "motorcycle", "aeroplane": "airplane"}


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
    Not exact: GenEval's own accuracy, 1.0 or 0.0, by the `count` surest objects of a class, more only for `exclude`.
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
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor
    from transformers.models.mask2former import modeling_mask2former
    # In float32 even on a GPU: it is a small model, and its confidences are held against published thresholds.
    with mock.patch.object(modeling_mask2former, "requires_backends"):  # its loss would want scipy; it is never called
        model = load_pretrained(Mask2FormerForUniversalSegmentation, path, device, torch.float32)
    model.config.id2label = {i: GENEVAL_NAMES.get(name, name) for i, name in model.config.id2label.items()}
    return model, load_pretrained(Mask2FormerImageProcessor, path)


def detect_objects(detector, images):
    """Instances in B RGB images of one size: for each a list of (label, confidence, box (x0, y0, x1, y1), mask image).

    The confidence is the class probability times the mean probability inside the mask, as in the public protocol.
    """
    model, processor = detector
    pixels = processor(images=images, return_tensors="pt").pixel_values.to(model.device)
    output = model(pixels)
    found = []
    for logits, masks in zip(output.class_queries_logits, output.masks_queries_logits):
        probabilities = logits.softmax(-1)[:, :-1].flatten()  # [queries * labels], the last label being "no object"
        confidences, indices = probabilities.topk(min(100, len(probabilities)))
        found.append([])
        for index in indices[confidences > 0.3].tolist():  # the mask can only lower it
            query, label = divmod(index, logits.shape[1] - 1)
            mask = F.interpolate(masks[None, None, query], pixels.shape[-2:], mode="bilinear")
            mask = F.interpolate(mask, images[0].size[::-1], mode="bilinear")[0, 0]
            inside = Image.fromarray((mask > 0).cpu().numpy())
            if inside.getbbox():
                confidence = float(probabilities[index] * mask[mask > 0].sigmoid().mean())
                found[-1].append((model.config.id2label[label], confidence, inside.getbbox(), inside))
    return found


def load_geneval(paths, device, exact=True):
    """GenEval by Mask2Former and CLIP: the reward is score_geneval's partial score, 1.0 if and only if all is right."""
    detector, clip = load_detector(paths["detector"], device), Clip(paths["clip"], device)

    @lru_cache(None)
    def color_embeddings(name):  # the public protocol's three captions a color: [10, D]
        captions = [caption for color in COLORS for caption in (
            f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}", f"a photo of a {color} object")]
        return F.normalize(clip.embed("text", captions).view(len(COLORS), 3, -1).mean(1), dim=-1)

    def colors_of(image, objects):  # cut out by their boxes, grey where their masks are not
        grey = Image.new("RGB", image.size, "#999")
        crops = [Image.composite(image, grey, mask).crop(box) for _, _, box, mask in objects]
        embeddings = clip.embed("images", crops) if crops else []
        return [COLORS[int((color_embeddings(d[0]) @ e).argmax())] for d, e in zip(objects, embeddings)]

    def check(prompt, fields):
        if not fields.get("include"):
            raise ValueError("it has no field 'include'; give a .jsonl of GenEval's form")
        for i, wanted in enumerate([*fields["include"], *fields.get("exclude", [])]):
            relation, target = wanted.get("position", ("above", 0))
            if not (wanted["class"] in detector[0].config.id2label.values() and wanted["count"] >= 1
                    and wanted.get("color", "red") in COLORS and relation in RELATIONS
                    and ("position" not in wanted or target in range(i))):
                raise ValueError(f"it asks for {brief(wanted)}, a class, count, color or position that is not known")

    def geneval(images, prompts, metadata):
        found = (objects for batch in batches(images) for objects in detect_objects(detector, batch))
        scores = []
        for image, fields, objects in zip(images, metadata, found):
            classes = {wanted["class"] for wanted in fields["include"] if "color" in wanted}
            colored = [d for name in classes for d in geneval_objects(fields, objects, name)]
            colors = dict(zip(map(id, colored), colors_of(image, colored)))
            scores.append(score_geneval(fields, [(*d[:3], colors.get(id(d))) for d in objects], exact))
        return torch.tensor(scores)

    geneval.check, geneval.strict = check, True
    return geneval


# ------------------------------------------------------------------------------------------------
# OCR: how much of the quoted text can be read, by PP-OCRv5
# ------------------------------------------------------------------------------------------------
# PP-OCRv5 and not GOT-OCR2, the other reader in transformers: it is a tenth of the size, reads all lines of a batch at
# once instead of token by token, and is the successor of what the authors used.  transformers' image processors for it
# want torchvision and opencv, so what they do stands here.  Boxes are upright: slanted lines are read less well.


def wanted_text(prompt, fields):
    """What an image should say: the field `text` of its metadata, or the first part of the prompt in double quotes,
    straight or curly (the first as in the authors' code).  Raises ValueError if there is neither."""
    quoted = re.search(r'"([^"]+)"|“([^”]+)”', prompt)
    text = str(fields.get("text") or (quoted and (quoted[1] or quoted[2])) or "")
    if not text.strip():
        raise ValueError("it has no text in double quotes, nor a field 'text'")
    return text


def ocr_score(read, wanted):
    """1 - edit distance / length of the wanted text, in [0, 1], whatever the case, spaces and Unicode form.

    As in Flow-GRPO's code, text that contains all that is wanted is perfect, whatever else there is to read.
    """
    read, wanted = ("".join(unicodedata.normalize("NFC", text.lower()).split()) for text in (read, wanted))
    if wanted in read:
        return 1.0
    distances = list(range(len(wanted) + 1))   # of what has been read so far to each beginning of what is wanted
    for i, letter in enumerate(read, 1):
        before, distances = distances, [i]
        for j, other in enumerate(wanted, 1):
            distances.append(min(before[j] + 1, distances[-1] + 1, before[j - 1] + (letter != other)))
    return 1 - min(distances[-1], len(wanted)) / len(wanted)


def text_boxes(probability):
    """Lines of text in a detector's map [H, W]: boxes (x0, y0, x1, y1) in its pixels, in reading order.

    DB (arXiv 1911.08947) with PP-OCR's numbers: regions above 0.3 with a mean of 0.6 or more and sides of 3 or more,
    grown by 1.5 area / perimeter as the map shows text shrunken by that much.
    """
    foreground = probability > 0.3
    regions, order = connected_components(foreground[None])[0][foreground].cpu().sort()
    areas = regions.unique_consecutive(return_counts=True)[1].tolist()
    pixels = (*foreground.nonzero().T.cpu(), probability[foreground].cpu())
    boxes, lines = [], []
    for y, x, certainty in zip(*(values[order].split(areas) for values in pixels)):
        (x0, x1), (y0, y1) = ((int(side.min()), int(side.max()) + 1) for side in (x, y))
        w, h = x1 - x0, y1 - y0
        if min(w, h) >= 3 and certainty.mean() >= 0.6:
            grow = 1.5 * w * h / (2 * (w + h))
            right, foot = min(x1 + grow, probability.shape[1]), min(y1 + grow, probability.shape[0])
            boxes.append((max(x0 - grow, 0), max(y0 - grow, 0), right, foot))
    for box in sorted(boxes, key=lambda box: box[1]):
        if not lines or (box[1] + box[3]) / 2 >= lines[-1][0][3]:  # its middle lies below the line's first box
            lines.append([])
        lines[-1].append(box)
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
            lines = [crops[i].resize((widths[i], 48), Image.Resampling.BILINEAR) for i in rows]
            pixels = torch.cat([F.pad(2 * rgb_tensor([line]) - 1, (0, padded - line.width)) for line in lines])
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
        lines = [lines for batch in batches(images) for lines in cut_lines(detector, batch)]
        texts = iter(read_lines(recognizer, settings["character_list"], list(itertools.chain(*lines))))
        read = ["".join(itertools.islice(texts, len(of_image))) for of_image in lines]
        return torch.tensor([ocr_score(text, wanted_text(*row)) for text, *row in zip(read, prompts, metadata)])

    ocr.check = wanted_text
    return ocr


# ------------------------------------------------------------------------------------------------
# A vision-language model as a judge
# ------------------------------------------------------------------------------------------------
# Of the judges in the papers two cannot run here: transformers has neither ImageReward's head on BLIP, in a checkpoint
# format of its own, nor DeQA's mPLUG-Owl2.  UnifiedReward is a fine-tuned vision-language model: its versions on an
# architecture of transformers (Qwen2.5-VL) run as `vlm=ID`, though asked RATING_PROMPT and not their authors' question.

RATING_PROMPT = (
    'This image was made for the caption "{prompt}". How well does it show what the caption asks for, and how good '
    "does it look? Rate both together from 1 (bad) to 5 (excellent). Answer with a single digit.")


def load_vlm(paths, device):
    """The rating a vision-language model is expected to give, asked RATING_PROMPT: sum of i p("i"), in [1, 5]."""
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    # bfloat16, in which these models are trained: their activations overflow float16.
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    model = load_pretrained(AutoModelForImageTextToText, paths["."], device, dtype)
    # The processor without its part for videos, which would want torchvision.
    whole = PROCESSOR_MAPPING[type(load_pretrained(AutoConfig, paths["."]))]
    parts = [part for part in whole.get_attributes() if part != "video_processor"]
    whole = type(whole.__name__, (whole,), {"get_attributes": classmethod(lambda cls: parts)})
    processor = load_pretrained(whole, paths["."])
    processor.tokenizer.padding_side = "left"  # then every row of a batch ends where its answer begins
    digits = [processor.tokenizer.encode(str(rating), add_special_tokens=False)[-1] for rating in range(1, 6)]
    if len(set(digits)) < 5:
        raise UserError(f"the tokenizer of {paths['.']} has no tokens of their own for the ratings 1 to 5")

    def vlm(images, prompts, metadata):
        scores = []
        for batch in batches(list(zip(images, prompts))):
            chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
                     for question in (RATING_PROMPT.format(prompt=prompt) for _, prompt in batch)]
            inputs = processor(text=processor.apply_chat_template(chats, add_generation_prompt=True), padding=True,
                               images=[[image] for image, _ in batch], return_tensors="pt")
            answer = model.generate(**inputs.to(model.device, dtype), max_new_tokens=1, do_sample=False,
                                    output_logits=True, return_dict_in_generate=True)
            chances = answer.logits[0][:, digits].float().softmax(-1)                               # [B, 5]
            scores.append(chances @ torch.arange(1.0, 6.0, device=chances.device))
        return torch.cat(scores)

    return vlm


# ------------------------------------------------------------------------------------------------
# The way a reward is named on the command line
# ------------------------------------------------------------------------------------------------

CLIP_L = "openai/clip-vit-large-patch14"
GENEVAL = {"detector": "facebook/mask2former-swin-small-coco-instance", "clip": CLIP_L}

# Reward -> (its loader, a function of {part: folder or hub id} and the device; {part: default hub id}).  `reward=PATH`
# is where the part "." is, the model itself; the parts of a reward without it are then in the subfolders PATH/part.
REWARDS = {
    "jpeg_compressibility": (lambda paths, device: partial(jpeg_size, sign=-1), {}),
    "jpeg_incompressibility": (lambda paths, device: partial(jpeg_size, sign=1), {}),
    "pickscore": (load_pickscore,
                  {".": "yuvalkirstain/PickScore_v1", "processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}),
    "clipscore": (load_clipscore, {".": CLIP_L}),
    "aesthetic": (load_aesthetic, {".": CLIP_L, "head": "trl-lib/ddpo-aesthetic-predictor"}),
    "geneval": (load_geneval, GENEVAL),
    "geneval_accuracy": (partial(load_geneval, exact=False), GENEVAL),
    "ocr": (load_ocr, {"detector": "PaddlePaddle/PP-OCRv5_server_det_safetensors",
                       "recognizer": "PaddlePaddle/PP-OCRv5_server_rec_safetensors"}),
    "vlm": (load_vlm, {".": "Qwen/Qwen2.5-VL-7B-Instruct"}),
}
# The embedded world's come in by the door of a user's own.
FILES = {name: f"{HERE}/shapes/world.py:{name}" for name in ("shapes", "words", "realism")}


def parse_terms(spec):
    """`name:weight,name:weight` -> dict name -> weight (1 if not given; of a name given twice the sum)."""
    terms = {}
    for item in map(str.strip, spec.split(",")):
        name, weight = [*item.rsplit(":", 1), "1"][:2]
        try:
            weight = float(weight)
        except ValueError:   # what follows the colon is no number but belongs to the name, as in `file.py:function`
            name, weight = item, 1.0
        if not math.isfinite(weight):
            raise UserError(f"the weight of the reward {name!r} must be a finite number, not {weight}")
        terms[name] = terms.get(name, 0.0) + weight
    return terms


def absolute_paths(spec):
    """The same rewards with the paths of files and folders absolute: "a.py:f:0.5" -> "/home/me/a.py:f:0.5"."""
    def absolute(match):
        path = match[0].strip()
        return os.path.abspath(path) if os.path.exists(path) or os.path.exists(path + ".py") else path

    return re.sub(r"(?<==)[^,:]+|(?<![^,])[^,=]+(?=\.py:)", absolute, spec)


@contextmanager
def undisturbed():
    """Undo what a user's code may do to the program that runs it: its folder, streams, gradients, default dtype."""
    before = os.getcwd(), sys.stdout, sys.stderr, torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    finally:
        os.chdir(before[0])
        sys.stdout, sys.stderr = before[1:3]
        torch.set_default_dtype(before[3])
        torch.set_grad_enabled(before[4])


def import_function(name):
    """`path/to/file.py:function`, the file imported as a module that finds what lies beside it."""
    file, _, function = name.rpartition(":")
    open(file).close()
    path = Path(file).resolve()
    root = HERE if path.is_relative_to(HERE) else path.parent   # ours keep the names by which others import them
    if str(root) not in sys.path:
        sys.path.append(str(root))
    module = importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
    if not os.path.samefile(module.__file__, path):
        raise ImportError(f"there is another module {path.stem}, {module.__file__}: rename the file")
    if not callable(getattr(module, function)):
        raise TypeError(f"{function} is not a function")
    return getattr(module, function)


def load_function(name, device):
    """A reward by its name: `reward`, `reward=folder or hub id`, or `path/to/file.py:function`.  Raises UserError."""
    base, equals, source = name.partition("=")
    if base in REWARDS:
        load, parts = REWARDS[base]
        paths = parts
        if equals and not parts:
            raise UserError(f"the reward {base!r} has no model, so it takes no '={source}'")
        if equals:
            paths = {**parts, ".": source} if "." in parts else {part: os.path.join(source, part) for part in parts}
            for part, path in paths.items():
                if "." not in parts and not os.path.isdir(path):
                    raise UserError(f"the reward {name!r}: there is no folder {path} with {parts[part]}'s files")
        where = f" from {' and '.join(paths.values())} ({base}=FOLDER takes a folder)" if parts else ""
        with blame(f"the reward {base!r} cannot be loaded{where}"):
            return load(paths, device)
    if not (name in FILES or name.rpartition(":")[0].endswith(".py")):
        raise UserError(f"unknown reward {name!r}; known: {', '.join([*FILES, *REWARDS])}, or path/to/file.py:function")
    with blame(f"the reward {name!r} cannot be loaded"), undisturbed():
        return import_function(FILES.get(name, name))


def load_reward(spec, device="cpu"):
    """Turn a reward's name, or a weighted sum `name:weight,name:weight`, into one callable; models go to `device`.

    A name is that of a reward, `reward=FOLDER` or `reward=ID` for a reward that is a model, or `file.py:function`.  The
    callable takes (images: list of PIL images, prompts: list of str, metadata: list of dict), all of length B, and
    returns float32 [B] on the CPU.  Its attributes: `terms`, the same for each term by itself (a dict, unweighted), and
    `total`, which weighs and adds such a dict of any shape in float64; `check(row)` raises UserError for a row that a
    term cannot score and returns {"tag": its category} if one knows it; `strict` says whether 1.0 means "all right".
    Raises UserError at once for what cannot be loaded; when called, for a term that raises or returns no B finite numbers.
    """
    def short(text):
        return re.sub("[^,=]*/", "", text)   # without folders

    functions = {name: load_function(name, device) for name in parse_terms(spec)}
    labels = {name: short(name) if [*map(short, functions)].count(short(name)) == 1 else name for name in functions}
    weights = {labels[name]: weight for name, weight in parse_terms(spec).items()}
    functions = {labels[name]: function for name, function in functions.items()}

    def check(row):
        tag = {}
        for name, function in functions.items():
            with blame(f"the reward {name!r} cannot score the prompt '{brief(row['prompt'])}'"), undisturbed():
                getattr(function, "check", lambda *row: None)(row["prompt"], copy.deepcopy(row))
                tag = {"tag": function.category(row["prompt"])} if hasattr(function, "category") else tag
        return tag

    @torch.no_grad()
    def terms(images, prompts, metadata):
        found = {name: torch.zeros(0) for name in functions}
        for prompt, fields in zip(prompts, metadata):
            check({**fields, "prompt": prompt})
        for name, function in functions.items() if images else ():   # one of many processes may own no group
            # Copies, one for each row: a reward that changes what it is given must not change the run.
            copies = [image.convert("RGB") for image in images], list(prompts), [*map(copy.deepcopy, metadata)]
            with blame(f"the reward {name!r} failed for the prompts from '{brief(prompts[0])}' on"), undisturbed():
                scores = torch.as_tensor(function(*copies), dtype=torch.float32).detach().cpu()
                if scores.shape != (len(images),):
                    raise ValueError(f"it returned shape {tuple(scores.shape)} for {len(images)} images")
                for prompt, finite in zip(prompts, scores.isfinite().tolist()):
                    if not finite:
                        raise ValueError(f"it returned a value that is not finite for '{brief(prompt)}'")
            found[name] = scores
        return found

    def reward(images, prompts, metadata):
        return reward.total(terms(images, prompts, metadata)).float()

    reward.check, reward.terms, reward.name = check, terms, short(spec)
    reward.total = lambda terms: sum(weights[name] * score.double() for name, score in terms.items())
    reward.strict = list(weights.values()) == [1.0] and getattr(*functions.values(), "strict", False)
    return reward
