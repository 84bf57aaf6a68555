"""GenEval (arXiv 2310.11513) as a reward: detected objects, the geometry of their boxes, CLIP for their colours."""

import math
from functools import lru_cache, partial
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image

from rewards import Clip, batches, brief, load_pretrained

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


load_geneval_accuracy = partial(load_geneval, exact=False)
