"""OCR as a reward: how much of the quoted text can be read in an image, by PP-OCRv5.

PP-OCRv5 and not GOT-OCR2, the other reader in transformers: it is a tenth of the size, reads all lines of a batch at
once instead of token by token, and is the successor of what the authors used.  transformers' image processors for it
want torchvision and opencv, so what they do stands here.  Boxes are upright: slanted lines are read less well.
"""

import itertools
import math
import re
import unicodedata

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from rewards import batches, load_pretrained


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
