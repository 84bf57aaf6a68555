"""What the embedded world promises, one property a test: python -m pytest -q shapes/test_world.py"""

import itertools
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from adapters.ocr import connected_components  # noqa: E402
from rewards import load_reward  # noqa: E402
from shapes import train_taste, world  # noqa: E402


@pytest.mark.parametrize("prompt, category, objects, relation", [
    ("a star", "single_object", [("star", None)], None),
    ("a picture of a circle and a cross", "two_object", [("circle", None), ("cross", None)], None),
    ("three crosses", "counting", [("cross", None)] * 3, None),
    ("one purple ring", "counting", [("ring", "purple")], None),
    ("a view of an orange square", "colors", [("square", "orange")], None),
    ("a star above a ring", "position", [("star", None), ("ring", None)], "above"),
    ("a red star left of a pink ring", "position", [("star", "red"), ("ring", "pink")], "left of"),
    ("A black star and a blue ring ", "color_attr", [("star", "black"), ("ring", "blue")], None),
    ("two stars and four rings", "two_object", [("star", None)] * 2 + [("ring", None)] * 4, None)])
def test_prompts_are_read_as_the_grammar_says(prompt, category, objects, relation):
    assert world.parse_prompt(prompt) == {"category": category, "objects": objects, "relation": relation}


@pytest.mark.parametrize("prompt", [
    "", "a dog", "a red", "five circles", "a star above", "a a star", "a star and a ring and a cross", "two circle",
    "a circles", "two stars left of a ring", "four stars and three rings", "a star " * 100_000,
    'a sign that says "a1"', 'a sign that says "horse"', 'a star that says "fox"'])
def test_prompts_outside_the_grammar_are_refused(prompt):
    with pytest.raises(ValueError, match="grammar"):
        world.parse_prompt(prompt)


def test_every_sentence_is_read_in_its_category_and_can_be_drawn_and_contradicted():
    rng = random.Random(20)
    assert list(world.grammar()) == list(world.CATEGORIES) == list(world.CATEGORY_WEIGHT)
    for category, sentences in world.grammar().items():
        assert len(set(sentences)) == len(sentences)
        assert {world.parse_prompt(sentence)["category"] for sentence in sentences} == {category}
        for sentence in rng.sample(sentences, 20):
            wanted = world.parse_prompt(sentence)
            other = world.contradict(wanted, rng)
            assert other != wanted and other["category"] == category and 1 <= len(other["objects"]) <= 4
            for scene in (wanted, other):
                picture = world.render(scene, rng)
                assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8


@pytest.mark.parametrize("files, categories", [
    (("prompts.txt", "heldout.txt"), set(world.CATEGORIES)), (("words.txt", "words_heldout.txt"), {"words"})])
def test_prompt_files_are_disjoint_and_have_every_category(files, categories):
    contents = []
    for name in files:
        prompts = (HERE / name).read_text().splitlines()
        assert {world.parse_prompt(prompt)["category"] for prompt in prompts} == categories
        # By the word, as the same word in another phrase is not held out.
        contents.append({world.parse_prompt(prompt).get("text", prompt) for prompt in prompts})
        assert len(contents[-1]) == len(prompts)
    assert not set.intersection(*contents)


def test_scenes_are_the_same_for_a_seed_and_leave_out_what_they_should():
    exclude = set(world.grammar()["position"][::2])
    images, prompts = world.scenes(100, seed=21, exclude=exclude)
    again, _ = world.scenes(100, seed=21, exclude=exclude)
    assert np.array_equal(images, again) and len(prompts) == 100 and not set(prompts) & exclude
    assert not np.array_equal(images, world.scenes(100, seed=22, exclude=exclude)[0])


def test_connected_components_are_the_regions_that_touch_even_at_corners():
    masks = np.random.default_rng(26).random((20, 24, 31)) < 0.45
    for mask, labels in zip(masks, connected_components(torch.from_numpy(masks))):
        expected, count = np.zeros(mask.shape, int), 0   # by flooding from each pixel not yet reached
        for start in zip(*np.nonzero(mask)):
            stack, count = [start], count + (expected[start] == 0)
            while stack:
                y, x = stack.pop()
                if 0 <= y < 24 and 0 <= x < 31 and mask[y, x] and not expected[y, x]:
                    expected[y, x] = count
                    stack += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        pairs = set(zip(expected.flatten().tolist(), labels.flatten().tolist()))
        assert (0, 0) in pairs and len(pairs) == count + 1 == len(labels.unique())


def test_verifier_accepts_right_pictures_and_refuses_wrong_ones_in_every_category():
    for noise, wanted in ((None, 1.0), (dict.fromkeys(world.CATEGORIES, 1.0), 0.0)):
        images, prompts = world.scenes(1000, seed=22, noise=noise)
        right = (world.shapes([Image.fromarray(image) for image in images], prompts, None) == 1).float()
        for category in world.CATEGORIES:
            rows = [i for i, prompt in enumerate(prompts) if world.parse_prompt(prompt)["category"] == category]
            assert len(rows) > 40
            assert (right[rows] == wanted).float().mean() >= 0.98, (category, wanted)


def test_verifier_scores_a_batch_as_it_scores_each_picture_alone():
    images, prompts = world.scenes(60, seed=23, noise=dict.fromkeys(world.CATEGORIES, 0.5))
    images[::2] = 255 - images[::2]   # dark and light backgrounds side by side: nothing may be shared over the batch
    images = [Image.fromarray(image) for image in images]
    alone = [world.shapes([image], [prompt], None) for image, prompt in zip(images, prompts)]
    assert torch.equal(world.shapes(images, prompts, None), torch.cat(alone))


def test_verifier_finds_every_shape_in_every_colour_where_it_is_and_no_name_for_anything_else():
    places = [(shape, color) for shape in world.SHAPES for color in world.PALETTE]
    images = np.full((len(places) + 3, 32, 32, 3), 240.0)
    for image, (shape, color) in zip(images, places):
        coverage = world.shape_mask(shape, 12.0, 19.0, 6.5)[..., None]
        image[:] = image * (1 - coverage) + np.array(world.PALETTE[color]) * coverage
    images[-1, 14:17, 4:28] = world.PALETTE["red"]   # a bar; a grey square; and one picture of nothing
    images[-2, 10:20, 10:20] = 128
    *found, nothing, (square,), (bar,) = world.detect_shapes(images.astype(np.uint8))
    assert square[:2] == ("square", None) and bar[:2] == (None, "red")
    assert [(each[0][:2], len(each)) for each in found] == [(pair, 1) for pair in places] and nothing == []
    assert all(abs(x - 12) < 1.5 and abs(y - 19) < 1.5 for ((_, _, x, y),) in found)


def test_verifier_grades_a_half_right_picture_by_hand():
    found = [("circle", "red", 8.0, 20.0), ("star", "blue", 24.0, 21.0)]
    for prompt, score in (("a red circle and a blue star", 1), ("a circle left of a star", 1), ("a ring", 0),
                          ("a red circle and a pink star", (0.75 + 1) / 2),            # one colour in four marks
                          ("a circle", (1 + 0) / 2),                                   # one object too many
                          ("four circles", (1 / 4 + 1 / 2) / 2), ("a circle right of a star", (1 + 1 + 0) / 3)):
        assert world.score_detections(world.parse_prompt(prompt), found) == pytest.approx(score)


def signs(count, seed, noise=None):
    """Pictures of signs with random words of two to four letters, their prompts and the words that these ask for."""
    rng = np.random.default_rng(seed)
    wanted = ["".join(rng.choice(list(world.LETTERS), rng.integers(2, 5))) for _ in range(count)]
    sentences = {"words": [world.PHRASES[i % len(world.PHRASES)].format(word) for i, word in enumerate(wanted)]}
    images, prompts = world.scenes(count, seed, noise, sentences=sentences, weights={"words": 1.0})
    return images, prompts, [world.parse_prompt(prompt)["text"] for prompt in prompts]


def test_words_are_read_as_they_are_drawn_and_wrong_ones_are_refused():
    images, prompts, wanted = signs(1000, 27)
    assert {letter for word in wanted for letter in word} == set(world.LETTERS) and set(map(len, wanted)) == {2, 3, 4}
    soft = images.astype(float)   # as a VAE may leave it
    for axis in (1, 2):
        soft = 0.8 * soft + 0.1 * (np.roll(soft, 1, axis) + np.roll(soft, -1, axis))
    for seen in (images, soft.round().astype(np.uint8)):
        assert np.mean([read == word for read, word in zip(world.read_words(seen), wanted)]) >= 0.98
    for noise, right in ((None, 1.0), ({"words": 1.0}, 0.0)):   # all letters right; one of them wrong
        images, prompts, _ = signs(500, 28, noise)
        scores = world.words([Image.fromarray(image) for image in images], prompts, [{}] * 500)
        assert ((scores == 1) == right).float().mean() >= 0.98 and scores.min() >= 0 and scores.max() <= 1


def test_words_are_read_in_each_picture_alone_and_what_is_no_letter_is_not_read():
    images, _, wanted = signs(30, 29)
    images[::2] = 255 - images[::2]   # pale letters on dark signs are read as well
    assert world.read_words(images) == [world.read_words(image[None])[0] for image in images] == wanted
    nothing = [*(np.full((32, 32, 3), level, np.uint8) for level in (0, 128, 255)),
               np.random.default_rng(30).integers(0, 256, (32, 32, 3), np.uint8)]
    assert world.read_words(nothing) == [""] * 4
    image = world.draw_sign("fox", random.Random(3))   # with its o, 5x11 pixels, blank, striped, chequered, full
    y, x = np.mgrid[:11, :5]
    for cell, read in ((y < 0, "f?x"), (y % 2 == 0, "f?x"), ((x + y) % 2 == 0, "f?x"), (y >= 0, "fbx")):
        image[16:27, 13:18] = np.where(cell[..., None], image[18, 7], image[18, 27])
        assert world.read_words(image[None]) == [read]


def test_words_are_wanted_as_the_phrases_say_and_each_reward_refuses_the_others_prompts():
    for phrase in world.PHRASES:
        wanted = world.parse_prompt(phrase.format("fox").upper())
        assert wanted == {"category": "words", "objects": [], "relation": None, "text": "fox"}
    world.words.check('the word "fox" on a sign', {})
    world.shapes.check("a star", {})
    for name, prompt in (("words", "a star"), ("shapes", 'a sign that says "fox"'), ("words", 'a sign with "foxes"')):
        with pytest.raises(ValueError, match="it (asks for|is not)"):
            getattr(world, name).check(prompt, {})


def test_realism_is_minus_the_kernel_distance_to_rendered_pictures_shared_out():
    x, y = (torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) + 0.3 * (n == 5) for n in (5, 7))

    def mean_kernel(pairs):
        return torch.stack([(a @ b / 6 + 1) ** 3 for a, b in pairs]).mean()

    distance = (mean_kernel(itertools.permutations(x, 2)) + mean_kernel(itertools.permutations(y, 2))
                - 2 * mean_kernel(itertools.product(x, y)))
    assert world.kernel_closeness(x, y).mean().item() == pytest.approx(-distance.item(), rel=1e-5)


def test_realism_falls_as_pictures_leave_the_rendered_ones_and_does_not_blame_others():
    sentences = {**world.grammar(), "words": [world.PHRASES[0].format(word) for word in ("fox", "owl", "bed", "jam")]}
    images, prompts = world.scenes(192, 31, sentences=sentences, weights=dict.fromkeys(sentences, 1.0))

    def realism(changed):
        return world.realism([Image.fromarray(image) for image in changed], prompts, None)

    soft = sum(np.roll(images.astype(float), (i, j), (1, 2)) for i in range(-2, 3) for j in range(-2, 3)) / 25
    grey = np.broadcast_to(images.mean(-1, keepdims=True), images.shape)
    clean = realism(images).mean()
    assert abs(clean) < 0.03
    for spoilt in (soft, grey):
        assert realism(spoilt.astype(np.uint8)).mean() < clean - 0.03
    some = images.copy()
    some[:20] = 255 - some[:20]   # dark backgrounds, which no rendered picture has
    assert (realism(some)[:20] < realism(some)[20:].min()).all()
    with pytest.raises(ValueError, match="not a sentence"):
        world.realism.check("a purple cow", {})


# ------------------------------------------------------------------------------------------------
# The taste
# ------------------------------------------------------------------------------------------------


def test_the_taste_is_a_pickscore_that_agrees_with_its_labels_far_beyond_chance():
    # The aim is 0.75 to 0.9 of fresh pairs, of which 192 have a standard error of 0.03; and right content counts.
    torch.manual_seed(5)
    prompts = [line for name in ("heldout.txt", "words_heldout.txt") for line in (HERE / name).read_text().splitlines()]
    x, right, label, _ = train_taste.draw_pairs(train_taste.draw_pool(prompts, 5), torch.arange(len(prompts)))
    images = [*map(Image.fromarray, ((x.flatten(0, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())]
    prompts = [prompt for prompt in prompts for _ in range(2)]
    scores = load_reward(f"pickscore={HERE / 'taste'}")(images, prompts, [{}] * len(prompts))
    picked = scores.view(-1, 2).argmax(1)
    assert 0.65 < (picked == label).float().mean() < 0.9
    differ = right[:, 0] != right[:, 1]
    assert (picked == right.long().argmax(1))[differ].float().mean() > 0.75
