"""What the rewards promise, one property a test, in the order of rewards.py: python -m pytest -q test_rewards.py"""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor

import rewards
from rewards import COLORS, UserError, blame, brief, load_reward, prompt_category

ROOT = Path(__file__).resolve().parent
PROMPTS = ["a red circle", "three squares", "a star left of a ring", "a green cross and a blue triangle"]
IMAGES = [Image.new("RGB", (32, 32), (level, level, level)) for level in (0, 100, 200)]

# ------------------------------------------------------------------------------------------------
# REWARDS: sums, functions of the user's own, what is refused
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error, sentence", [
    (ValueError("too\nmany\nlines"), "it failed: ValueError too"), (KeyError("name"), "it failed: KeyError 'name'"),
    (AssertionError(), "it failed: AssertionError"), (OSError(2, "No such file", "x"), "[Errno 2] No such file: 'x'"),
    (RuntimeError("in \x1b[31mred " + "x" * 1_000_000), "failed: in \\x1b[31mred xxx"), (UserError("do so"), "do so")])
def test_what_goes_wrong_is_blamed_in_one_short_sentence_that_says_why(error, sentence):
    with pytest.raises(UserError) as caught, blame("it failed"):
        raise error
    assert sentence in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 350
    assert error is (caught.value if isinstance(error, UserError) else caught.value.__cause__)


def test_a_prompts_category_is_its_tag_or_that_of_its_grammar():
    assert prompt_category("a star", {}) == "single_object" and prompt_category("a dog", {}) == "all"
    assert prompt_category("a star", {"tag": "counting"}) == "counting" and prompt_category("a dog", {"tag": 3}) == "3"
    hostile = prompt_category("a star", {"tag": "\x1b[2J\u202e\ud800" + "x" * 1000})   # what a terminal would obey
    assert hostile.isprintable() and len(hostile) < 110 and hostile.endswith("xxx...")
    assert brief("a star") == "a star" and brief({"class": "Café"}) == "{'class': 'Café'}"


def own_reward(folder, body):
    """Write a reward of the user's own; returns its name for --reward."""
    (folder / "mine.py").write_text(f"import torch\n\ndef score(images, prompts, metadata):\n    {body}\n")
    return f"{folder}/mine.py:score"


def test_a_weighted_sum_of_rewards_and_a_reward_of_ones_own(tmp_path):
    level = own_reward(tmp_path, "return [image.getpixel((0, 0))[0] for image in images]")
    batch = IMAGES, PROMPTS[:3], [{}] * 3
    scores = load_reward(level)(*batch)
    assert scores.dtype == torch.float32 and scores.tolist() == [0, 100, 200]
    total = load_reward(f"{level}:0.5, jpeg_compressibility:-2,jpeg_incompressibility")
    torch.testing.assert_close(total(*batch), 0.5 * scores + 3 * load_reward("jpeg_incompressibility")(*batch))
    assert total.files == [f"{tmp_path}/mine.py"] and load_reward("shapes").files == []
    assert total([], [], []).shape == (0,)   # of many processes, one may own no group
    # Strict accuracy has a meaning only for a verifier on its own.
    assert load_reward("shapes").strict
    assert not any(load_reward(spec).strict for spec in (level, "shapes:0.5", "shapes,shapes", "jpeg_compressibility"))


@pytest.mark.parametrize("body, sentence", [
    ("return [0.0]", "returned shape (1,) for 3 images"), ("return 0.0", "returned shape () for 3 images"),
    ("return [0.0, float('nan'), 0.0]", "not finite for 'three squares'"), ("return ['good', 'bad', 'bad']", "on: "),
    ("1 / 0", "on: division by zero"), ("raise ValueError(prompts[2])", "on: three long words then xxx")])
def test_a_faulty_reward_is_named_with_a_prompt(tmp_path, body, sentence):
    prompts = [*PROMPTS[:2], "three long words then " + "x" * 1_000_000]
    with pytest.raises(UserError, match="mine.py:score' failed for the prompts from 'a red circle' on: ") as caught:
        load_reward(own_reward(tmp_path, body))(IMAGES, prompts, [{}] * 3)
    assert sentence in str(caught.value) and len(str(caught.value)) < 600


def test_a_reward_cannot_change_the_run_that_calls_it(tmp_path):
    # Neither by a graph of gradients, from outside the call or inside it, nor by what it does to its arguments.
    spec = own_reward(tmp_path, """assert not torch.is_grad_enabled()
    with torch.enable_grad():
        scores = weight * torch.tensor([float(len(fields.pop('words')['deep'])) for fields in metadata])
    [fields['row'].append(9) for fields in metadata], [i.putpixel((0, 0), (9, 9, 9)) for i in images]
    prompts.clear(), images.clear()
    return scores\n\nweight = torch.ones(3, requires_grad=True)""")
    images, prompts = [image.copy() for image in IMAGES], PROMPTS[:3]
    metadata = [{"words": {"deep": "abc"}, "row": [1]}] * 3   # the images of one prompt share their row
    scores = load_reward(f"{spec},{spec}")(images, prompts, metadata)
    assert scores.tolist() == [6, 6, 6] and not scores.requires_grad
    assert images == IMAGES and prompts == PROMPTS[:3] and metadata == [{"words": {"deep": "abc"}, "row": [1]}] * 3


@pytest.mark.parametrize("spec, sentence", [
    ("shape", "unknown reward 'shape'; known: shapes, jpeg_compressibility, jpeg_incompres"), ("", "unknown reward ''"),
    ("shapes:1.0,pickscor:2", "unknown reward 'pickscor'"), ("shapes,shapes:-inf", "must be a finite number, not -inf"),
    ("shapes:nan", "the weight of the reward 'shapes' must be a finite number, not nan"),
    ("jpeg_compressibility=models/jpeg", "has no model, so it takes no '=models/jpeg'"),
    ("absent.py:f", "'absent.py:f' cannot be loaded: [Errno 2] No such file"), ("empty.py:f", "has no attribute 'f'"),
    ("broken.py:f", "'broken.py:f' cannot be loaded: No module named 'no_such_module_anywhere'"),
    ("empty.py:number", "cannot be loaded: number is not a function")])
def test_a_reward_that_cannot_be_loaded_is_named_at_once(tmp_path, monkeypatch, spec, sentence):
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("import no_such_module_anywhere\n")
    Path("empty.py").write_text("number = 3\n")
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_reward(spec)


def test_jpeg_rewards_are_file_sizes_of_opposite_sign(tmp_path):
    noisy = Image.fromarray(np.random.default_rng(24).integers(0, 256, (32, 32, 3), np.uint8))
    noisy.save(tmp_path / "noisy.jpg", quality=95)
    small, large = load_reward("jpeg_incompressibility")([IMAGES[0], noisy], PROMPTS[:2], [{}] * 2).tolist()
    assert large == pytest.approx((tmp_path / "noisy.jpg").stat().st_size / 1000) and small < large
    assert load_reward("jpeg_compressibility")([noisy.convert("RGBA")], PROMPTS[:1], [{}]).item() == -large


def test_naming_the_rewards_imports_no_models():
    code = "import sys, rewards; assert 'transformers' not in sys.modules and 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ------------------------------------------------------------------------------------------------
# REWARDS THAT ARE MODELS: random ones of the real classes, saved in the real format
# ------------------------------------------------------------------------------------------------


def pictures(count, size=(40, 40), number=50):
    """Random colourful pictures, [(width, height)] `size`."""
    noise = np.random.default_rng(number).integers(0, 256, (count, 5, 5, 3), np.uint8)
    return [Image.fromarray(array).resize(size, Image.Resampling.BICUBIC) for array in noise]


def check_batching(reward, images, prompts, metadata):
    """A reward judges every image for itself, the same each time; returns its scores."""
    scores = reward(images, prompts, metadata)
    assert scores.dtype == torch.float32 and scores.shape == (len(images),) and scores.device.type == "cpu"
    assert torch.equal(scores, reward(images, prompts, metadata)) and not scores.requires_grad
    alone = [reward([image], [prompt], [fields]) for image, prompt, fields in zip(images, prompts, metadata)]
    torch.testing.assert_close(scores, torch.cat(alone), rtol=1e-4, atol=1e-5)
    return scores


def clip_embeddings(folder, images, texts):
    """Written out with transformers alone, one pair at a time: the images' [B, D] and the texts' [B, D]."""
    model, processor, pairs = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder), []
    for image, text in zip(images, texts):
        inputs = processor(text=[text], images=[image], return_tensors="pt", truncation=True, max_length=16)
        with torch.no_grad():
            output = model(**inputs)
        pairs.append(torch.stack([output.image_embeds, output.text_embeds]))
    return torch.cat(pairs, 1)


def test_clip_rewards_are_cosines_of_the_models_own_embeddings(clip_folder):
    images, nothing = pictures(20), [{}] * 20   # more than one internal batch
    prompts = (PROMPTS * 5)[:19] + ["a red circle and " * 20 + "a star"]   # of several lengths, one cut off
    cosines = F.cosine_similarity(*clip_embeddings(clip_folder, images, prompts))
    clip = check_batching(load_reward(f"clipscore={clip_folder}"), images, prompts, nothing)
    pick = check_batching(load_reward(f"pickscore={clip_folder}"), images, prompts, nothing)
    torch.testing.assert_close(clip, 100 * cosines.clamp(min=0), rtol=1e-4, atol=1e-4)
    scale = CLIPModel.from_pretrained(clip_folder).logit_scale.exp().item()
    torch.testing.assert_close(pick, scale * cosines, rtol=1e-4, atol=1e-4)
    assert cosines.std() > 0.05 and (cosines < 0).any() and (cosines > 0).any()
    both = load_reward(f"clipscore={clip_folder}:-0.5, pickscore={clip_folder}")   # a folder, a weight and a sum
    torch.testing.assert_close(both(images, prompts, nothing), pick - 0.5 * clip)
    assert not both.strict and not both.files


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_aesthetic_score_is_the_linear_head_on_the_normalised_embedding(clip_folder, tmp_path, form):
    shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
    head = torch.nn.Sequential(*(torch.nn.Linear(*sizes) for sizes in ((12, 10), (10, 4), (4, 1))))
    state = {f"layers.{key}": value.detach() for key, value in head.state_dict().items()}
    (torch.save if form == "pth" else save_file)(state, tmp_path / f"aesthetic-model.{form}")
    scores = check_batching(load_reward(f"aesthetic={tmp_path}"), pictures(5), [""] * 5, [{}] * 5)
    embeddings = clip_embeddings(clip_folder, pictures(5), ["a star"] * 5)[0]   # of length 1 already
    torch.testing.assert_close(scores, head(embeddings)[:, 0].detach(), rtol=1e-4, atol=1e-4)


def test_a_model_that_cannot_be_loaded_is_named_with_what_to_do(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)   # as without a network, at once
    partial, small = (shutil.copytree(clip_folder, tmp_path / name) for name in ("partial", "small"))
    weights = load_file(partial / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, partial / "model.safetensors", {"format": "pt"})
    torch.save({"0.weight": torch.ones(1, 768), "0.bias": torch.ones(1)}, small / "aesthetic-model.pth")
    for spec, sentence in (
            ("pickscore", "cannot be loaded from yuvalkirstain/PickScore_v1 and laion/CLIP-ViT-H"),
            ("clipscore=someone/clip:2", "loaded from someone/clip (--reward clipscore=FOLDER takes a folder): "),
            (f"clipscore={tmp_path}", "'clipscore' cannot be loaded from"),
            (f"clipscore={partial}", "partial is no CLIPModel: it has no weights for visual_projection.weight"),
            (f"aesthetic={clip_folder}", "holds no head of the aesthetic predictor"),
            (f"aesthetic={small}", "takes embeddings of size 768, the CLIP model"),
            (f"geneval={tmp_path}", f"there is no folder {tmp_path}/detector with facebook/mask2former")):
        with pytest.raises(UserError, match=re.escape(sentence)) as caught:
            load_reward(spec)
        assert "\n" not in str(caught.value)


# Boxes (x0, y0, x1, y1) by their place.
LEFT, RIGHT, TOP, MIDDLE = (0, 40, 20, 60), (80, 40, 100, 60), (40, 0, 60, 20), (40, 40, 60, 60)


@pytest.mark.parametrize("box, other, relations", [
    (LEFT, RIGHT, "left of"), (RIGHT, LEFT, "right of"), (TOP, MIDDLE, "above"), (MIDDLE, TOP, "below"),
    ((0, 0, 20, 20), MIDDLE, "left of, above"), ((70, 0, 90, 20), MIDDLE, "right of, above"),   # diagonally, both hold
    (MIDDLE, MIDDLE, ""), (MIDDLE, (41, 42, 59, 58), ""),                    # one over the other: neither
    ((44, 40, 64, 60), MIDDLE, ""), ((80, 25, 100, 45), MIDDLE, "right of"),    # 4 apart: 0.1 (20 + 20) is forgiven
    ((48.5, 40, 68.5, 60), MIDDLE, "right of"), ((48, 40, 68, 60), MIDDLE, "")])   # 4.5 of 8.5 left; 4 of 8, not more
def test_relations_of_boxes_follow_the_published_geometry(box, other, relations):
    assert rewards.box_relations(box, other) == set(relations.split(", ")) - {""}


def one(name, **fields):
    return {"class": name, "count": 1, **fields}


def found(name, confidence=0.95, box=MIDDLE, color=None):
    return name, confidence, box, color


DOG, CAT, CUP = found("dog", box=LEFT), found("cat", box=RIGHT), found("cup")
RED_DOG, PINK_DOG, BLUE_CAT = found("dog", color="red"), found("dog", color="pink"), found("cat", color="blue")
ONE, TWO = {"tag": "single_object", "include": [one("dog")]}, {"tag": "two_object", "include": [one("dog"), one("cat")]}
CUPS = {"tag": "counting", "include": [{"class": "cup", "count": 3}], "exclude": [{"class": "cup", "count": 4}]}
RED = {"tag": "colors", "include": [one("dog", color="red")]}
BOTH = {"tag": "color_attr", "include": [one("dog", color="red"), one("cat", color="blue")]}
CAT_RIGHT = {"tag": "position", "include": [one("dog"), one("cat", position=["right of", 0])]}
NO_CAT = {"include": [one("dog")], "exclude": [one("cat")]}


@pytest.mark.parametrize("metadata, detections, partial, accuracy", [
    # single_object: the confidence must be above 0.3; further classes do no harm; a second dog does, to the exact score
    (ONE, [DOG, CAT], 1, 1), (ONE, [], 0, 0), (ONE, [found("dog", 0.3)], 0, 0), (ONE, [found("dog", 0.301)], 1, 1),
    (ONE, [DOG, DOG], 0, 1), (ONE, [DOG] * 40, -14, 1),                          # 16 of them count
    (TWO, [DOG, CAT], 1, 1), (TWO, [DOG], 1 / 2, 0), (TWO, [DOG, CAT, CAT, CAT], (1 - 1) / 2, 1),
    ({"tag": "two_object", "include": [one("dog"), one("dog")]}, [DOG], 1, 1),   # a repeated clause asks no more
    # counting: the confidence must be above 0.9, and one too many is wrong in both
    (CUPS, [CUP] * 3, 1, 1), (CUPS, [CUP] * 2, 2 / 3, 0), (CUPS, [CUP] * 4, 2 / 3, 0),
    (CUPS, [CUP] * 3 + [found("cup", 0.9)], 1, 1), (CUPS, [found("cup", 0.9)] * 3, 0, 0),
    # colors, of the surest dog; then color_attr
    (RED, [RED_DOG], 1, 1), (RED, [PINK_DOG], 1 / 2, 0), (RED, [], 0, 0), (RED, [PINK_DOG, found("dog", 0.5)], 0, 0),
    (RED, [found("dog", 0.5, color="pink"), RED_DOG], 0, 1), (RED, [found("dog", 0.5, color="red"), PINK_DOG], 0, 0),
    ({"include": [one("dog", color="red") | {"count": 2}]}, [RED_DOG, PINK_DOG], 3 / 4, 0), (BOTH, [RED_DOG], 1 / 2, 0),
    (BOTH, [RED_DOG, BLUE_CAT], 1, 1), (BOTH, [found("dog", color="blue"), found("cat", color="red")], 1 / 2, 0),
    # position: of the second class as seen from the first, which has to be there
    (CAT_RIGHT, [DOG, CAT], 1, 1), (CAT_RIGHT, [found("dog", box=RIGHT), found("cat", box=LEFT)], 2 / 3, 0),
    (CAT_RIGHT, [found("dog"), found("cat")], 2 / 3, 0), (CAT_RIGHT, [CAT], 1 / 3, 0), (CAT_RIGHT, [DOG], 1 / 3, 0),
    ({"include": [one("dog", color="red"), one("cat", position=["right of", 0])]}, [DOG, CAT], 1 / 2, 0),
    (CAT_RIGHT, [DOG, CAT, found("cat", 0.5, box=LEFT)], 1 / 3, 1),
    (CAT_RIGHT, [found("dog", 0.5, box=LEFT), found("dog", 0.6, box=RIGHT), found("cat")], (0 + 1 + 0) / 3, 0),
    # exclude
    (NO_CAT, [DOG], 1, 1), (NO_CAT, [DOG, CAT], 1 / 2, 0), (NO_CAT, [DOG, found("cat", 0.3)], 1, 1)])
def test_geneval_rules_worked_by_hand(metadata, detections, partial, accuracy):
    for detected in (detections, detections[::-1]):
        assert rewards.score_geneval(metadata, detected) == pytest.approx(partial)
        assert (rewards.score_geneval(metadata, detected) == 1.0) == (partial == 1)   # to the last bit: `strict` asks
        assert rewards.score_geneval(metadata, detected, exact=False) == accuracy


def test_geneval_judges_each_image_alone_exactly_and_by_its_own_accuracy(geneval_folder):
    images = pictures(9) + pictures(8, (56, 40), 55)   # of two sizes
    classes = ("dog", "computer mouse", "tv", "cup")    # two of them under GenEval's own names
    metadata = [{"include": [one(classes[i % 4], color=COLORS[i % 10]), one(classes[(i + 1) % 4])]} for i in range(17)]
    exact, accuracy = (load_reward(f"{name}={geneval_folder}") for name in ("geneval", "geneval_accuracy"))
    scores, accuracies = (check_batching(reward, images, [""] * 17, metadata) for reward in (exact, accuracy))
    assert scores.unique().numel() > 3 and scores.max() <= 1 and exact.strict and accuracy.strict
    assert set(accuracies.tolist()) <= {0.0, 1.0} and (accuracies >= (scores == 1)).all()


def test_geneval_sees_the_detectors_masks_and_names_colours_with_clip(geneval_folder, monkeypatch):
    image, (model, processor) = pictures(1, (48, 40))[0], rewards.load_detector(geneval_folder / "detector", "cpu")
    objects = rewards.detect_objects((model, processor), [image])[0]
    inputs = processor(images=[image], return_tensors="pt")
    output, expected = model(**inputs), []
    # The confidences written out: of a class, times the mean of its mask at the image's size.
    for chances, mask in zip(output.class_queries_logits[0].softmax(-1)[:, :-1], output.masks_queries_logits[0]):
        for size in (inputs.pixel_values.shape[-2:], (40, 48)):
            mask = F.interpolate(mask.view(1, 1, *mask.shape[-2:]), size, mode="bilinear")
        expected += (chances[chances > 0.3] * mask[mask > 0].sigmoid().mean()).tolist() if (mask > 0).any() else []
    assert len(expected) > 2 and sorted(d[1] for d in objects) == pytest.approx(sorted(expected), rel=1e-5)
    for label, _, box, mask in objects:
        ys, xs = np.nonzero(np.asarray(mask))
        assert mask.size == image.size and label in ("dog", "computer mouse", "tv", "cup")
        assert box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    # An object's colour is that of the three captions nearest to it, as it is in its box and grey around its mask.
    label, _, (x0, y0, x1, y1), mask = max(objects, key=lambda d: d[1])
    crop = np.where(np.asarray(mask)[..., None], np.asarray(image), np.uint8(0x99))[y0:y1, x0:x1]
    captions = [text.format(color, label) for color in COLORS
                for text in ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")]
    crops, texts = clip_embeddings(geneval_folder / "clip", [Image.fromarray(crop)] * 30, captions)
    color = COLORS[F.cosine_similarity(texts.view(10, 3, -1).mean(1), crops[0]).argmax()]
    reward, embed, seen = load_reward(f"geneval_accuracy={geneval_folder}"), rewards.Clip.embed, []
    monkeypatch.setattr(rewards.Clip, "embed", lambda clip, kind, items: seen.append(items) or embed(clip, kind, items))
    for named in COLORS:
        assert reward([image], ["?"], [{"include": [one(label, color=named)]}]).item() == (named == color)
    assert np.array_equal(seen[0][0], crop)   # the surest object comes first


@pytest.mark.parametrize("read, wanted, score", [
    ("Hello", "hello", 1), ("HEL LO", "Hel lo", 1), ("say hello there", "hello", 1),
    ("hallo", "hello", 0.8), ("hell", "hello", 0.8), ("", "hello", 0), ("something else", "hello", 0),
    ("kitten", "sitting", 4 / 7), ("sitting", "kitten", 1 / 2), ("flaw", "lawn", 1 / 2), ("ab", "ba", 0),
    ("helo world", "hello", 0)])   # 6 edits, of 5 letters: capped
def test_ocr_score_is_the_authors(read, wanted, score):
    assert rewards.ocr_score(read, wanted) == pytest.approx(score)


def test_the_wanted_text_stands_in_double_quotes_or_in_the_metadata():
    for prompt, fields, text in (
            ('A sign that says "Hello World".', {}, "Hello World"), ("A cup with “Good day” on it", {}, "Good day"),
            ('"One" above "Two"', {}, "One"), ('a “sign” with "it\'s"', {}, "sign"), ('"One"', {"text": "Two"}, "Two"),
            ("no quotes", {"text": "Two"}, "Two"), ("no quotes", {"text": 24}, "24")):
        assert rewards.wanted_text(prompt, fields) == text


def test_text_boxes_are_grown_components_in_reading_order():
    def boxes(*regions):
        probability = torch.full((100, 200), 0.1)
        for (x0, y0, x1, y1), value in regions:
            probability[y0:y1, x0:x1] = value
        return rewards.text_boxes(probability)

    # 40x10: grown by 1.5 * 400 / 100 = 6 on every side, and cut at the edge of the map.
    assert boxes(((50, 30, 90, 40), 0.9)) == [(44, 24, 96, 46)] and boxes(((0, 0, 40, 10), 0.9)) == [(0, 0, 46, 16)]
    assert boxes(((160, 90, 200, 100), 0.9)) == [(154, 84, 200, 100)] and boxes() == []
    assert boxes(((50, 30, 90, 40), 0.59)) == [] and boxes(((50, 30, 90, 32), 0.9)) == []   # unsure; too thin
    # Three words in a line that is not quite level, then one below: from left to right, then down.
    order = boxes(*((word, 0.8) for word in ((140, 10, 160, 20), (60, 12, 100, 22), (5, 8, 25, 18), (60, 60, 100, 70))))
    assert [round(x0) for x0, _, _, _ in order] == [0, 54, 135, 54] and order[3][1] > 50
    assert len(boxes(((10, 10, 40, 20), 0.8), ((40, 20, 70, 30), 0.8))) == 1   # joined at a corner, they are one line


def test_ctc_drops_blanks_and_repeats_and_what_it_is_not_sure_of():
    def read(indices, confidence=0.9):
        probabilities = torch.full((len(indices), 4), (1 - confidence) / 3)
        probabilities[range(len(indices)), indices] = confidence
        return rewards.read_ctc(probabilities, ["blank", "a", "b", " "])

    assert read([1, 1, 0, 1, 2, 2, 3, 0, 2]) == "aab b" and read([0, 0]) == "" and read([2]) == "b"
    assert read([1, 2], 0.51) == "ab" and read([1, 2], 0.49) == ""


def test_ocr_runs_on_its_detector_and_recogniser(ocr_folder, ocr_models):
    images, (detector, *recognizer) = pictures(6, (160, 96), 57) + pictures(2, (96, 96), 58), ocr_models
    lines = [rewards.cut_lines(detector, [image])[0] for image in images]
    texts = ["".join(rewards.read_lines(*recognizer, [crop])[0] for crop in crops) for crops in lines]
    assert len(set(texts)) > 4
    # Asked for what is read, for half of it with another letter, and for something else.
    wanted = [(text, text[len(text) // 2:] + "f", "zzz")[i % 3] for i, text in enumerate(texts)]
    prompts = [f'It says "{text}"' for text in wanted]
    scores = check_batching(load_reward(f"ocr={ocr_folder}"), images, prompts, [{}] * 8)
    assert scores.tolist() == pytest.approx([rewards.ocr_score(*pair) for pair in zip(texts, wanted)])
    assert (scores[::3] == 1).all() and (scores[2::3] == 0).all() and scores.unique().numel() > 2


def test_ocr_models_see_what_they_were_trained_on(ocr_models):
    (detector, recognizer, characters), seen = ocr_models, []
    for model in ocr_models[:2]:
        model.register_forward_pre_hook(lambda _, args, inputs: seen.append(inputs["pixel_values"]), with_kwargs=True)
    batches = [Image.new("RGB", (100, 50), "#f00")], [Image.new("RGB", (1920, 480))], pictures(8, (150, 90), 61)
    *_, lines = (rewards.cut_lines(detector, batch) for batch in batches)
    # In steps of 32, and at most 960; blue, green, red, with ImageNet's numbers for red, green, blue.
    assert [pixels.shape[2:] for pixels in seen] == [(64, 96), (256, 960), (96, 160)]
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor([-0.485 / 0.229, -0.456 / 0.224, 0.594 / 0.225]))
    upright = 0
    for of_image, probability in zip(lines, detector(pixel_values=seen[2]).last_hidden_state[:, 0]):
        for line, box in zip(of_image, rewards.text_boxes(probability), strict=True):
            x0, y0, x1, y1 = (round(edge * scale) for edge, scale in zip(box, 2 * (150 / 160, 90 / 96)))
            turned = y1 - y0 >= 1.5 * (x1 - x0)   # text that runs up
            assert line.size == ((y1 - y0, x1 - x0) if turned else (x1 - x0, y1 - y0))
            upright += turned
    assert 0 < upright < sum(map(len, lines))
    seen.clear()
    white = [Image.new("RGB", size, "white") for size in ((100, 24), (350, 48), (100, 48))]
    rewards.read_lines(recognizer, characters, white)
    assert [pixels.shape for pixels in seen] == [(2, 3, 48, 320), (1, 3, 48, 640)]
    widths = [(pixels[i] == 1).all(1).all(0).sum().item() for pixels, i in ((seen[0], 0), (seen[1], 0), (seen[0], 1))]
    assert widths == [200, 350, 100] and (seen[0][0, :, :, 200:] == 0).all()


def test_vlm_score_is_the_expected_rating_at_the_first_token_of_the_answer(vlm_folder):
    images = pictures(9) + pictures(9, (32, 56), 60)
    prompts = ["a red circle", "a star " * 9, "x", 'a {brace} and a "quote"'] * 4 + ["a ring"] * 2
    scores = check_batching(load_reward(f"vlm={vlm_folder}"), images, prompts, [{}] * 18)
    assert scores.min() >= 1 and scores.max() <= 5 and scores.std() > 0.05
    # Written out for one image with the model's own forward pass.
    tokenizer = transformers.AutoTokenizer.from_pretrained(vlm_folder)
    pixels = transformers.Qwen2VLImageProcessor.from_pretrained(vlm_folder)(images=images[3:4], return_tensors="pt")
    seen = "<|image_pad|>" * (int(pixels.image_grid_thw.prod()) // 4)
    question = rewards.RATING_PROMPT.replace("{prompt}", prompts[3])
    tokens = tokenizer(f"<|im_start|>user<|vision_start|>{seen}<|vision_end|>{question}<|im_end|><|im_start|>assistant",
                       return_tensors="pt").input_ids
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(vlm_folder).requires_grad_(False)
    logits = model(input_ids=tokens, mm_token_type_ids=(tokens == 5).long(), **pixels).logits[0, -1]
    chances = logits[tokenizer.convert_tokens_to_ids(list("12345"))].softmax(-1)
    assert scores[3].item() == pytest.approx(sum(i * p.item() for i, p in enumerate(chances, 1)), rel=1e-4)


def test_vlm_needs_a_token_for_every_rating(vlm_folder, tmp_path):
    folder = shutil.copytree(vlm_folder, tmp_path / "letters")
    content = json.loads((folder / "tokenizer.json").read_text())
    del content["model"]["vocab"]["4"], content["model"]["vocab"]["5"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="letters has no tokens of their own for the ratings 1 to 5"):
        load_reward(f"vlm={folder}")


def test_what_a_reward_cannot_score_is_known_beforehand(judges, tmp_path):
    own = own_reward(tmp_path, "return [1.0] * len(images)\n\nscore.check = lambda prompt, fields: {'a': 1}[prompt]")
    dog, blank = one("dog"), {"include": [one("dog")]}
    loaded = {name: load_reward(name) for name in ("shapes", "jpeg_compressibility", own)}
    loaded |= {name: load_reward(f"{name}={folder}") for name, folder in judges.items()}
    for name, prompt, fields in (
            ("shapes", "a star", {}), ("ocr", 'A sign: "x"', {}), ("ocr", "a sign", {"text": "x"}), (own, "a", {}),
            ("geneval", "", {"include": [dog, one("tv", color="red", position=["above", 0])], "exclude": [dog]}),
            *((name, "a dog", {}) for name in ("jpeg_compressibility", "pickscore", "clipscore", "aesthetic", "vlm"))):
        loaded[name].check(prompt, fields)
    unknown, nonsense = "a class, count, color or position that is not known", "cannot score the prompt 'a dog': "
    for name, prompt, fields, reason in (
            ("shapes", "a dog " * 200_000, {}, "it is not a sentence of the shapes grammar"),
            ("shapes", "a \x1b[31mdog", {}, r"'a \x1b[31mdog'"), (own, "b", {}, "KeyError 'b'"),
            ("ocr", "a sign", {"text": " "}, "no text"), *(
                ("ocr", prompt, {}, "it has no text in double quotes, nor a field 'text'")
                for prompt in ("don't and won't", 'an empty ""', 'a " "', '5" nail')),
            *((name, "a dog", {}, "it has no field 'include'") for name in ("geneval", "geneval_accuracy")),
            *(("geneval", "a dog", {"include": [dog, dog | wrong]}, unknown) for wrong in (
                {"class": "dragon"}, {"color": "mauve"}, {"count": 0}, {"position": ["beside", 0]},
                {"position": ["above", 1]}, {"position": ["above", -1]})),
            ("geneval", "a dog", blank | {"exclude": [one("dragon")]}, "it asks for {'class': 'dragon', 'count': 1}, "),
            *(("geneval", "a dog", fields, nonsense) for fields in (
                {"include": 3}, {"include": ["dog"]}, {"include": [{}]}, {"include": [dog | {"class": []}]},
                {"include": [dog | {"count": "one"}]}, {"include": [dog | {"position": 3}]}, blank | {"exclude": 1}))):
        for ask in (loaded[name].check, lambda prompt, fields: loaded[name](IMAGES[:1], [prompt], [fields])):
            with pytest.raises(UserError, match=re.escape(reason)) as caught:
                ask(prompt, fields)
            assert f"'{name}' cannot score the prompt" in str(caught.value).replace(f"={judges.get(name)}", "")
            assert len(str(caught.value)) < 600 and str(caught.value).isprintable()
    # A sum asks all of its terms; and a hundred thousand prompts are no matter of minutes.
    both, start = load_reward(f"shapes,ocr={judges['ocr']}"), time.process_time()
    with pytest.raises(UserError, match="ocr=.*cannot score the prompt 'a star'"):
        both.check("a star", {})
    for _ in range(10_000):
        both.check("a red star left of a blue ring", {"text": "x"}), loaded["geneval"].check("a dog", blank)
    assert time.process_time() - start < 2
