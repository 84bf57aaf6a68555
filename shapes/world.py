"""The embedded world: its sentences, the drawing of a sentence, and its judges, the rewards below.

`shapes` and `words` play the parts of GenEval's detector and of an OCR model, and look at image and prompt alone:
`shapes` gives 1.0 if everything that the prompt asks for is there and nothing else; `words` is `ocr`'s rule.
`realism` compares a whole batch with rendered pictures of the same prompts; no run trains on it.
"""

import itertools
import math
import random
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from adapters.geneval import RELATIONS
from adapters.ocr import connected_components, ocr_score, wanted_text
from rewards import load_pretrained

VAE = Path(__file__).resolve().parent / "model/vae"

# ------------------------------------------------------------------------------------------------
# The grammar: GenEval's six categories over six shapes and eight colours, and signs with words
# ------------------------------------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PALETTE = {
    "red": (220, 40, 40), "orange": (245, 140, 20), "yellow": (240, 215, 30), "green": (40, 160, 60),
    "blue": (40, 80, 220), "purple": (130, 50, 170), "pink": (245, 130, 190), "black": (25, 25, 25),
}
COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
PREFIXES = ("", "a picture of ", "a drawing of ", "an image of ", "a sketch of ", "a painting of ", "a view of ")
MOST_OBJECTS = 6   # that a sentence may ask for and a picture is searched for
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # GenEval's tags
# How often a scene of the category is drawn in pretraining: the hard ones more often.
CATEGORY_WEIGHT = {"single_object": 0.06, "two_object": 0.18, "counting": 0.22, "colors": 0.08, "position": 0.26,
                   "color_attr": 0.20}
PHRASES = ('a sign that says "{}"', 'a sign with the word "{}"', 'a board that reads "{}"', 'the word "{}" on a sign')
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MOST_LETTERS = 4   # that fit on a sign

_NOUN = (rf"(?P<count>{'|'.join(COUNTS)}) (?:(?P<color>{'|'.join(PALETTE)}) )?"
         rf"(?P<shape>{'|'.join(SHAPES)})(?P<plural>e?s)?")
_PREFIX = re.compile("^(?:" + "|".join(p for p in PREFIXES if p) + ")")
_JOINT = re.compile(r" (and|left of|right of|above|below) ")
_WORD = re.compile("|".join(re.escape(phrase).replace(r"\{\}", f"([a-z]{{2,{MOST_LETTERS}}})") for phrase in PHRASES))


def parse_prompt(prompt):
    """Read a prompt of the grammar.

    Returns a dict: `category` (one of CATEGORIES, or "words"), `objects` (a list of (shape, color or None), one entry
    for every object wanted), `relation` (a key of RELATIONS, or None) and, with "words", `text`, the word wanted.
    Raises ValueError for a prompt outside the grammar.
    """
    prompt = prompt.strip().lower()
    if word := _WORD.fullmatch(prompt):
        return {"category": "words", "objects": [], "relation": None, "text": word[word.lastindex]}
    parts = _JOINT.split(_PREFIX.sub("", prompt))
    nouns = [re.fullmatch(_NOUN, part) for part in parts[::2]]
    # "two circle" and "a circles" are no sentences: number and ending have to agree.
    sentence = len(nouns) <= 2 and all(n and (COUNTS[n["count"]] > 1) == bool(n["plural"]) for n in nouns)
    objects = [(n["shape"], n["color"]) for n in nouns for _ in range(COUNTS[n["count"]])] if sentence else []
    relation = parts[1] if len(parts) == 3 and parts[1] != "and" else None
    # No picture would be right for a relation of more than two objects, nor for more than the verifier tells apart.
    if not 1 <= len(objects) <= (2 if relation else MOST_OBJECTS):
        raise ValueError("it is not a sentence of the shapes grammar (see shapes/README.md)")
    if len(nouns) == 1:
        counted = nouns[0]["count"] not in ("a", "an")
        category = "counting" if counted else "colors" if nouns[0]["color"] else "single_object"
    elif relation:
        category = "position"
    else:
        category = "color_attr" if any(color for _, color in objects) else "two_object"
    return {"category": category, "objects": objects, "relation": relation}


def article(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


def plural(word):
    return word + ("es" if word.endswith("s") else "s")


def grammar():
    """Every sentence about shapes, by category: dict of lists of strings."""
    nouns = [f"{color} {shape}" for color in PALETTE for shape in SHAPES]
    pairs = [(a, b) for a in SHAPES for b in SHAPES if a != b]
    colored = [(a, b) for a in nouns for b in nouns if a.split()[0] != b.split()[0] and a.split()[1] != b.split()[1]]
    number = [word for word in COUNTS if word not in ("a", "an")]
    counted = [f"one {noun}" for noun in [*SHAPES, *nouns]]
    counted += [f"{n} {plural(noun)}" for n in number if n != "one" for noun in [*SHAPES, *nouns]]
    return {
        "single_object": [p + article(shape) for p in PREFIXES for shape in SHAPES],
        "two_object": [f"{p}{article(a)} and {article(b)}" for p in PREFIXES for a, b in pairs],
        "counting": counted,
        "colors": [p + article(noun) for p in PREFIXES for noun in nouns],
        "position": [f"{article(a)} {r} {article(b)}" for r in RELATIONS for a, b in [*pairs, *colored]],
        "color_attr": [f"{article(a)} and {article(b)}" for a, b in colored],
    }


# ------------------------------------------------------------------------------------------------
# Drawing
# ------------------------------------------------------------------------------------------------


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


# The glyphs of a to m and of n to z, capitals as on signs.  A cell is 1 pixel wide and LINE high, so that strokes are
# as bold one way as the other and a small VAE keeps them; a letter and the gap after it take ADVANCE pixels.
FONT = """
.###. ####. .#### ###.. ##### ##### .#### #...# ##### ..### #...# #.... #...#
#...# #...# #.... #..#. #.... #.... #.... #...# ..#.. ...#. #..#. #.... ##.##
#...# #...# #.... #...# #.... #.... #.... #...# ..#.. ...#. #.#.. #.... #.#.#
#...# ####. #.... #...# ####. ####. #..## ##### ..#.. ...#. ##... #.... #.#.#
##### #...# #.... #...# #.... #.... #...# #...# ..#.. ...#. #.#.. #.... #...#
#...# #...# #.... #..#. #.... #.... #...# #...# ..#.. #..#. #..#. #.... #...#
#...# ####. .#### ###.. ##### #.... .#### #...# ##### .##.. #...# ##### #...#

#...# .###. ####. .###. ####. .#### ##### #...# #...# #...# #...# #...# #####
##..# #...# #...# #...# #...# #.... ..#.. #...# #...# #...# #...# #...# ....#
##..# #...# #...# #...# #...# #.... ..#.. #...# #...# #...# .#.#. .#.#. ...#.
#.#.# #...# ####. #...# ####. .###. ..#.. #...# .#.#. #.#.# ..#.. ..#.. ..#..
#..## #...# #.... #.#.# #.#.. ....# ..#.. #...# .#.#. #.#.# .#.#. ..#.. .#...
#..## #...# #.... .###. #..#. ....# ..#.. #...# .#.#. ##.## #...# ..#.. #....
#...# .###. #.... ...## #...# ####. ..#.. .###. ..#.. #...# #...# ..#.. #####
"""
LINE, ADVANCE = 1.5, 6


def glyphs(text):
    """The bitmap of a word, float [7, ADVANCE * letters], each letter with a blank column after it."""
    blocks = [[line.split() for line in block.split("\n")] for block in FONT.strip().split("\n\n")]
    places = [divmod(LETTERS.index(letter), 13) for letter in text]
    lines = ["".join(blocks[block][line][column] + "." for block, column in places) for line in range(7)]
    return np.array([[cell == "#" for cell in line] for line in lines], np.float32)


def grid_mask(cells, x, y, width, height, size=32):
    """Draw a grid of cells [rows, columns] from its corner (x, y): exact coverage, [size, size]."""
    def shares(start, count, length):   # of each pixel in each row or column: [size, count]
        pixel, edge = np.arange(size)[:, None], start + length * np.arange(count)
        return np.clip(np.minimum(pixel + 1, edge + length) - np.maximum(pixel, edge), 0, 1)

    return shares(y, len(cells), height) @ cells @ shares(x, cells.shape[1], width).T


def draw_sign(word, rng):
    """Draw a sign with a word, a wooden frame around it and a post below it: uint8 RGB [32, 32, 3].

    Letters lie on whole pixels: what is a pixel wide stays as sharp as it can be.
    """
    image = np.full((32, 32, 3), rng.uniform(228, 250), np.float32) + np.array([rng.uniform(-5, 5) for _ in "rgb"])
    wood, ink = (np.array(color) + [rng.uniform(-10, 10) for _ in "rgb"]
                 for color in ((125, 85, 50), PALETTE[rng.choice(("black", "blue", "red", "green", "purple"))]))
    # Four places: the letters lie alike on the VAE's grid of 4 pixels, and a small model can learn to spell.
    left, top, right = rng.uniform(0.2, 0.7), rng.choice((1, 5, 9, 13)), 32 - rng.uniform(0.2, 0.7)
    board = np.ones((1, 1))
    frame = grid_mask(board, left, top, right - left, 17.5)
    frame -= grid_mask(board, left + 1.3, top + 1.3, right - left - 2.6, 14.9)
    frame += grid_mask(board, 14.5, top + 17.5, 3, 32)
    letters = grid_mask(glyphs(word), 16 - ADVANCE * len(word) // 2, top + 3, 1, LINE)
    for mask, color in ((frame, wood), (letters, ink.clip(0))):
        image += mask[..., None] * (color - image)
    return image.round().clip(0, 255).astype(np.uint8)


def place(wanted, rng, size=32):
    """Choose positions and radii for a parsed prompt's objects, apart from one another: list of (x, y, radius)."""
    n = len(wanted["objects"])
    low, high = {1: (5.0, 8.5), 2: (4.6, 6.5), 3: (4.3, 5.6), 4: (4.3, 5.2)}[n]
    while True:
        spots = []
        for _ in range(n):
            r = rng.uniform(low, high)
            spots.append((rng.uniform(r + 2, size - r - 2), rng.uniform(r + 2, size - r - 2), r))
        apart = all(max(abs(a[0] - b[0]), abs(a[1] - b[1])) > a[2] + b[2] + 2.5
                    for i, a in enumerate(spots) for b in spots[:i])
        if apart and wanted["relation"]:
            (ax, ay, _), (bx, by, _) = spots
            sx, sy = RELATIONS[wanted["relation"]]
            apart = (ax - bx) * sx + (ay - by) * sy > abs((ax - bx) * sy) + abs((ay - by) * sx) + 4
        if apart:
            return spots


def render(wanted, rng, size=32):
    """Draw a parsed prompt: uint8 RGB [size, size, 3].  Colours that the prompt leaves open are random."""
    if wanted["category"] == "words":
        return draw_sign(wanted["text"], rng)
    image = np.full((size, size, 3), rng.uniform(228, 250), np.float32) + np.array([rng.uniform(-5, 5) for _ in "rgb"])
    free = rng.choice(list(PALETTE))   # several objects of one kind share a colour, as in "three squares"
    for (shape, color), (x, y, radius) in zip(wanted["objects"], place(wanted, rng, size)):
        if color is None:
            color = free if wanted["category"] == "counting" else rng.choice(list(PALETTE))
        tint = np.clip(np.array(PALETTE[color]) + [rng.uniform(-10, 10) for _ in "rgb"], 0, 255)
        coverage = shape_mask(shape, x, y, radius, size)[..., None]
        image = image * (1 - coverage) + tint * coverage
    return image.round().clip(0, 255).astype(np.uint8)


def contradict(wanted, rng):
    """Change a parsed prompt in the one respect that its category is about: the picture of a wrong caption."""
    if wanted["category"] == "words":   # another letter somewhere
        i = rng.randrange(len(wanted["text"]))
        other = rng.choice(LETTERS.replace(wanted["text"][i], ""))
        return {**wanted, "text": wanted["text"][:i] + other + wanted["text"][i + 1:]}
    objects, relation = list(wanted["objects"]), wanted["relation"]
    category, (shape, color) = wanted["category"], objects[0]
    other_color = rng.choice([c for c in PALETTE if all(c != have for _, have in objects)])
    other_shape = rng.choice([s for s in SHAPES if all(s != have for have, _ in objects)])
    if category == "single_object":
        objects = [(other_shape, color)]
    elif category == "colors":
        objects = [(shape, other_color)]
    elif category == "counting":
        objects = [objects[0]] * rng.choice([n for n in (1, 2, 3, 4) if n != len(objects)])
    elif category == "two_object":
        objects = [objects[rng.randrange(2)]] if rng.random() < 0.5 else [objects[0], (other_shape, None)]
    elif category == "color_attr":
        (a, ca), (b, cb) = objects
        objects = [(a, cb), (b, ca)] if rng.random() < 0.5 else [(a, ca), (b, other_color)]
    else:
        relation = rng.choice([r for r in RELATIONS if r != relation])
    return {"category": category, "objects": objects, "relation": relation}


def scenes(count, seed, noise=None, exclude=(), sentences=None, weights=CATEGORY_WEIGHT):
    """Draw `count` scenes with their captions: (uint8 [count, 32, 32, 3], list of prompts).

    noise: None, or the probability, by category, that the picture contradicts its caption.
    exclude: prompts never drawn (the held-out ones).  sentences: what is drawn, by category, in place of the grammar's
    sentences about shapes; weights: how often, by category.
    """
    rng, sentences = random.Random(seed), sentences or grammar()
    images, prompts = np.empty((count, 32, 32, 3), np.uint8), []
    while len(prompts) < count:
        category = rng.choices(list(weights), list(weights.values()))[0]
        prompt = rng.choice(sentences[category])
        if prompt in exclude:
            continue
        wanted = parse_prompt(prompt)
        if noise and rng.random() < noise[category]:
            wanted = contradict(wanted, rng)
        images[len(prompts)] = render(wanted, rng)
        prompts.append(prompt)
    return images, prompts


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


def find_components(images):
    """Find what differs from the background in pictures, uint8 RGB [B, 32, 32, 3], as B sets of connected pixels.

    Returns rgb [B, 32, 32, 3] and the background's [B, 1, 1, 3] in [0, 1], the distance from it [B, 32, 32], and for
    the N components in all, in the order of their images, the image's number [N] and the mask [N, 32, 32].
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
    owner = keys // 2048
    return rgb, background, distance, owner, labels[owner] == (keys % 2048).view(-1, 1, 1)


def detect_shapes(images):
    """Find the objects in a batch of 32x32 pictures, uint8 RGB [B, 32, 32, 3].

    Returns, for each image, a list of (shape or None, color or None, x, y) in pixels.  None stands for a blob that
    looks like none of the six shapes or has none of the eight colours: it counts as an object, a wrong one.
    """
    rgb, background, distance, owner, mask = find_components(images)
    found = [[] for _ in range(len(rgb))]
    if len(owner) == 0:
        return found
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
    for order in itertools.permutations(range(min(n, MOST_OBJECTS)), min(len(objects), n)):
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


def _pixels(images):
    """PIL images of any size as uint8 RGB [B, 32, 32, 3]."""
    return np.stack([np.asarray(image.convert("RGB").resize((32, 32))) for image in images])


def shapes(images, prompts, metadata):
    """The embedded verifier: 1.0 where an image obeys its prompt, a graded score in [0, 0.9] where it does in part.

    Images of any size are looked at in 32x32 RGB.  Raises ValueError for a prompt outside the grammar.
    """
    wanted = [parse_prompt(prompt) for prompt in prompts]
    return torch.tensor([score_detections(w, f) for w, f in zip(wanted, detect_shapes(_pixels(images)))])


def _check_shapes(prompt, fields):
    if parse_prompt(prompt)["category"] == "words":
        raise ValueError("it asks for a word, which is for the reward 'words'")


shapes.check, shapes.strict = _check_shapes, True
shapes.category = lambda prompt: parse_prompt(prompt)["category"]

# ------------------------------------------------------------------------------------------------
# The reader of signs
# ------------------------------------------------------------------------------------------------

_FRAME_WIDTH = 29   # pixels; a component as wide is the sign, not what is written on it
_MIN_WORTH = 0.3    # of a glyph, 1 if it is there as drawn and -1 on blank paper, under which it is no letter


@lru_cache
def _letter_masks():
    """Every letter as it is drawn, [26, 11, ADVANCE]."""
    masks = [grid_mask(glyphs(letter), 0, 0, 1, LINE, 12)[:11, :ADVANCE] for letter in LETTERS]
    return torch.tensor(np.array(masks), dtype=torch.float32)


def read_words(images):
    """Read the signs in a batch of 32x32 pictures, uint8 RGB [B, 32, 32, 3]: B strings of up to MOST_LETTERS letters.

    The likeliest row of glyphs at any place: in squared error, a glyph T explains the ink w by 2 <w, T> - |T|^2 better
    than blank paper does.  "?" stands for a letter that fits badly; what nothing fits reads "".
    """
    _, _, distance, owner, mask = find_components(images)
    wide = mask.any(1).sum(-1) >= _FRAME_WIDTH
    frames, written = (torch.zeros_like(distance).index_add_(0, owner[which], mask[which].float())
                       for which in (wide, ~wide))
    # Ink is 1 where a stroke covers a pixel, whatever its colour: nearly the strongest that is written.
    strength = distance.masked_fill(written == 0, math.nan).flatten(1).nanquantile(0.9, dim=1).nan_to_num(1.0)
    ink = (distance / strength.view(-1, 1, 1)).clamp(max=1) * (1 - frames)
    masks = _letter_masks()
    norms = masks.pow(2).sum((1, 2))
    worth, letter = (2 * F.conv2d(ink[:, None], masks[:, None]) - norms.view(-1, 1, 1)).max(1)   # [B, Y, X]
    words, most = [""] * len(ink), torch.zeros(len(ink))
    for count in range(1, MOST_LETTERS + 1):
        starts = worth.shape[2] - ADVANCE * (count - 1)
        total = sum(worth[:, :, ADVANCE * k:ADVANCE * k + starts] for k in range(count))
        value, place = total.flatten(1).max(1)
        for i in (value > most).nonzero().flatten().tolist():
            y, x = divmod(int(place[i]), starts)
            row = slice(x, x + ADVANCE * count, ADVANCE)
            fits = worth[i, y, row] / norms[letter[i, y, row]] >= _MIN_WORTH
            words[i] = "".join(LETTERS[n] if fit else "?" for n, fit in zip(letter[i, y, row].tolist(), fits))
        most = torch.maximum(most, value)
    return words


def words(images, prompts, metadata):
    """How much of the wanted word can be read on the sign, in [0, 1]: the rule of the reward `ocr`, with read_words."""
    read = read_words(_pixels(images))
    wanted = [wanted_text(prompt, fields) for prompt, fields in zip(prompts, metadata)]
    return torch.tensor([ocr_score(*pair) for pair in zip(read, wanted)])


def _check_words(prompt, fields):
    if parse_prompt(prompt)["category"] != "words":
        raise ValueError("it asks for no word; it is for the reward 'shapes'")


words.check, words.category = _check_words, shapes.category

# ------------------------------------------------------------------------------------------------
# Realism: pictures against rendered ones of the same prompts
# ------------------------------------------------------------------------------------------------

MOST_DRAWN = 4   # objects that `place` finds room for


@lru_cache
def load_vae():
    """The embedded model's VAE, whatever model is trained: one ruler for all."""
    import diffusers  # late, as the other rewards do without it
    diffusers.utils.logging.set_verbosity_error()
    return load_pretrained(diffusers.AutoencoderKL, str(VAE), "cpu")


def to_unit(images):
    """uint8 [B, 32, 32, 3] -> float [B, 3, 32, 32] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode_images(vae, images):
    """uint8 [N, 32, 32, 3] -> raw latents [N, 4, 8, 8], before scaling."""
    return torch.cat([vae.encode(to_unit(images[i:i + 16])).latent_dist.mean for i in range(0, len(images), 16)])


def vae_features(images):
    """The VAE's latents of N pictures, uint8 RGB [N, 32, 32, 3], flat: float32 [N, D]."""
    return encode_images(load_vae(), images).flatten(1)


@lru_cache(maxsize=4)   # evaluations ask for the same prompts again and again
def rendered_features(prompts):
    """`vae_features` of rendered pictures, one for each of a tuple of N prompts: float32 [N, D].

    A prompt's pictures follow from its text alone, not from its place, nor from any other random numbers.
    """
    rngs = {prompt: random.Random(prompt) for prompt in prompts}
    return vae_features(np.stack([render(parse_prompt(prompt), rngs[prompt]) for prompt in prompts]))


def kernel_closeness(x, y):
    """Each x's share of minus the distance of two samples, x [N, D] from y [M, D]: float32 [N], N and M at least 2.

    Their mean is minus the squared distance in the kernel (x.y / D + 1)^3, unbiased (KID's, arXiv 1801.01401).
    """
    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_of_others(a):   # of each to the rest of its own sample
        own = kernel(a, a)
        return (own.sum(1) - own.diagonal()) / (len(a) - 1)

    return 2 * kernel(x, y).mean(1) - mean_of_others(x) - mean_of_others(y).mean()


def realism(images, prompts, metadata):
    """How much a batch looks like rendered pictures of its prompts, on which nothing is trained: about 0 if it does.

    The mean is minus the kernel distance of both in the VAE's latents, an image's score its share of that: below 0 for
    what rendered pictures do not look like, above for what there is too little of.  Of many processes each
    judges its own share of the images, which does not come to the same.  Raises ValueError for one image.
    """
    if len(images) < 2:
        raise ValueError("it compares samples, so that it wants two images or more")
    return kernel_closeness(vae_features(_pixels(images)), rendered_features(tuple(prompts)))


def _check_realism(prompt, fields):
    if len(parse_prompt(prompt)["objects"]) > MOST_DRAWN:
        raise ValueError(f"it asks for more than {MOST_DRAWN} objects, for which a picture has no room")


realism.check = _check_realism
