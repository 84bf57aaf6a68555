"""What prompt files and rewards promise, one property a test: python -m pytest -q adapters/test_rewards.py"""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path
from unittest import mock

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import CLIPModel, CLIPProcessor
from transformers.models.mask2former import modeling_mask2former

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rewards  # noqa: E402
from adapters import geneval, ocr  # noqa: E402
from adapters.geneval import COLORS  # noqa: E402
from rewards import (  # noqa: E402
    UserError,
    absolute_paths,
    blame,
    brief,
    load_lora,
    load_pipeline,
    load_pretrained,
    load_prompts,
    load_reward,
)

torch.set_num_threads(1)   # two workers share two cores (README: pytest -n 2)

MODEL = ROOT / "shapes/model"
PROMPTS = ["a red circle", "three squares", "a star left of a ring", "a green cross and a blue triangle"]

# ------------------------------------------------------------------------------------------------
# PROMPTS
# ------------------------------------------------------------------------------------------------


GENEVAL = [  # as published by GenEval and, for training, by Flow-GRPO
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cup", "count": 2}], "exclude": [{"class": "cup", "count": 3}],
     "prompt": "a photo of two cups"},
    {"tag": "position", "include": [{"class": "dog", "count": 1},
                                    {"class": "tv", "count": 1, "position": ["left of", 0]}],
     "prompt": "a photo of a tv left of a dog"}]


def test_prompt_files_of_geneval_and_of_ocr_are_read_as_they_are(tmp_path):
    path = tmp_path / "geneval.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*GENEVAL, GENEVAL[0]]) + "\n\n")
    assert load_prompts(path) == [*GENEVAL, GENEVAL[0]]   # as often as they stand there, their fields beside them
    path.rename(tmp_path / "geneval.JSONL")
    assert load_prompts(tmp_path / "geneval.JSONL") == [*GENEVAL, GENEVAL[0]]
    path.with_suffix(".JSONL").rename(tmp_path / "geneval.ndjson")
    assert load_prompts(tmp_path / "geneval.ndjson") == [*GENEVAL, GENEVAL[0]]
    path = tmp_path / "ocr.txt"
    path.write_bytes('\ufeffA sign that says "Café 24"\r\n\r\nA poster with "SALE"\r\n'.encode())
    two = [{"prompt": 'A sign that says "Café 24"'}, {"prompt": 'A poster with "SALE"'}]
    assert load_prompts(path) == two
    path.write_bytes(path.read_bytes() * 2)   # as by `cat`: a byte-order mark in the middle
    assert load_prompts(path) == two * 2
    path.write_text("\ufeff" + json.dumps(GENEVAL[0]) + "\n\ufeff" + json.dumps(GENEVAL[1]))
    assert load_prompts(path.rename(tmp_path / "marked.jsonl")) == GENEVAL[:2]


@pytest.mark.parametrize("line, sentence", [
    ('{"prompt": "a', "line 2: Unterminated"), ('["a star"]', 'line 2: not an object with a text as its "prompt"'),
    ('{"text": "a star"}', "line 2: not an object"), ('{"prompt": 3}', "line 2: not an object"),
    ('{"prompt": " "}', "line 2: not an object"), ('{"prompt": "\\ud800"}', "line 2: 'utf-8' codec can't encode"),
    ('{"prompt": "' + "é" * 5001 + '"}', "line 2: its prompt is longer than 10,000 bytes"),
    *(('{"prompt": "a", "deep": ' + "[" * n + "]" * n + "}", "line 2: it is nested more than 100 deep")
      for n in (100, 900)),
    ('{"prompt": "a", "deep": ' + '{"a":' * 100_000, "line 2: maximum recursion depth exceeded")])
def test_a_faulty_line_of_a_jsonl_file_is_named(tmp_path, line, sentence):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a star"}\n' + line + "\n")
    with pytest.raises(UserError, match=sentence):
        load_prompts(tmp_path / "p.jsonl")


def test_a_faulty_line_of_a_text_file_is_named_and_the_longest_prompts_are_read(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a star\n\n" + "é" * 5000 + "\n")
    assert len(load_prompts(path)) == 2
    path.write_text("a star\n\n" + "é" * 5000 + ".\n")
    with pytest.raises(UserError, match="p.txt, line 3: its prompt is longer than 10,000 bytes"):
        load_prompts(path)
    path.write_text("a star\na dog\n")
    with pytest.raises(UserError, match="p.txt, line 2: the reward 'shapes' cannot score the prompt 'a dog': it is "):
        load_prompts(path, load_reward("shapes"))


@contextlib.contextmanager
def soon():
    """Fail where the test would wait for ever, as for a pipe that nobody writes to."""
    def too_late(*_):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(20)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_what_is_no_prompt_file_is_refused_in_a_sentence_that_names_it(tmp_path):
    for name in ("p.json", "p.csv", "p.tsv", "p.parquet", "p.yaml", "p.txt.gz"):
        (tmp_path / name).write_text("a star\n")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "utf16.txt").write_text("a star", encoding="utf-16")
    (tmp_path / "blank.txt").write_text(" \n\t\n\ufeff\n")
    reader, writer = os.pipe()   # what <(...) is
    os.write(writer, b"a star\n")
    os.close(writer)
    for path, sentence in (
            *((name, "cannot be read: a prompt file is a .txt file, one prompt a line, or a .jsonl file")
              for name in ("p.json", "p.csv", "p.tsv", "p.parquet", "p.yaml", "p.txt.gz")),
            ("folder", "is not a file but a folder, a pipe or the like"), ("fifo", "is not a file but"),
            (f"/dev/fd/{reader}", "is not a file but"), ("absent.txt", "[Errno 2] No such file"),
            ("x" * 300, "File name too long"), ("utf16.txt", "'utf-8' codec can't decode"),
            ("blank.txt", "holds no prompt")):
        path = tmp_path / path
        with soon(), pytest.raises(UserError, match=re.escape(sentence)) as caught:
            load_prompts(path)
        assert f"the prompt file {path} " in str(caught.value) and "\n" not in str(caught.value)
    os.close(reader)
    for name in ("fifo.py", "adapter_model.safetensors"):
        os.mkfifo(tmp_path / name)
    with soon(), pytest.raises(UserError, match="is not a file but"):
        load_reward(f"{tmp_path}/fifo.py:f")
    with soon(), pytest.raises(ValueError, match="is not a file but"):
        load_lora(tmp_path)


IMAGES = [Image.new("RGB", (32, 32), (level, level, level)) for level in (0, 100, 200)]

# ------------------------------------------------------------------------------------------------
# REWARDS: sums, functions of the user's own, what is refused
# ------------------------------------------------------------------------------------------------


class Unprintable(Exception):
    def __str__(self):
        raise SystemExit("no words")


@pytest.mark.parametrize("error, sentence", [
    (SystemExit("set KEY"), "it failed: set KEY"), (SystemExit(0), "it failed: SystemExit 0"),
    (SystemExit(None), "it failed: SystemExit"), (SystemExit(["a", "b"]), "it failed: ['a', 'b']"),
    (GeneratorExit(), "it failed: GeneratorExit"), (Unprintable(), "it failed: Unprintable"),
    (ValueError("too\nmany\nlines"), "it failed: ValueError too"), (KeyError("name"), "it failed: KeyError 'name'"),
    (AssertionError(), "it failed: AssertionError"), (OSError(2, "No such file", "x"), "[Errno 2] No such file: 'x'"),
    (RuntimeError("in \x1b[31mred " + "x" * 1_000_000), "failed: in \\x1b[31mred xxx"), (UserError("do so"), "do so")])
def test_what_goes_wrong_is_blamed_in_one_short_sentence_that_says_why(error, sentence):
    with pytest.raises(UserError) as caught, blame("it failed"):
        raise error
    assert sentence in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 350
    assert error is (caught.value if isinstance(error, UserError) else caught.value.__cause__)


@pytest.mark.parametrize("statement, words", [
    ("import sys; sys.exit(0)", "SystemExit 0"), ("import sys; sys.exit()", "SystemExit"),
    ("import sys; sys.exit('set KEY')", "set KEY"), ("raise SystemExit", "SystemExit"), ("exit(3)", "SystemExit 3"),
    ("import argparse; argparse.ArgumentParser().parse_args(['--no'])", "SystemExit 2"),
    ("import asyncio; raise asyncio.CancelledError", "CancelledError"),
    ("raise type('E', (Exception,), {'__str__': lambda self: 1 / 0})", ": E"), ("raise KeyboardInterrupt", None)])
@pytest.mark.parametrize("place", ["import", "call", "check"])
def test_whatever_ends_a_reward_but_ctrl_c_is_its_fault_and_no_end_of_the_run(tmp_path, place, statement, words):
    at = {"import": "0", "call": "0", "check": "0", place: statement}
    spec = own_reward(tmp_path, f"{at['call']}\n    return [0.0] * 3", check=at["check"], rest=at["import"])
    with pytest.raises(UserError if words else KeyboardInterrupt) as caught:
        load_reward(spec)(IMAGES, PROMPTS[:3], [{}] * 3)
    said = {"import": "cannot be loaded", "call": "failed for the prompts from 'a red circle' on",
            "check": "cannot score the prompt 'a red circle'"}[place]
    assert not words or (said in str(caught.value) and str(caught.value).endswith(words))


def test_a_prompts_category_is_its_tag_or_what_a_reward_says_of_it(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a star"}\n{"prompt": "a star", "tag": 3}\n{"prompt": "two stars"}\n')
    for spec, tags in (("shapes", ["single_object", 3, "counting"]), ("jpeg_compressibility", [None, 3, None]),
                       ("shapes,jpeg_compressibility:0.1", ["single_object", 3, "counting"])):
        assert [row.get("tag") for row in load_prompts(tmp_path / "p.jsonl", load_reward(spec))] == tags
    assert load_reward("shapes").check({"prompt": "a star"}) == {"tag": "single_object"}
    assert load_reward("jpeg_compressibility").check({"prompt": "a star", "tag": "x"}) == {}


def test_what_comes_from_a_file_is_printed_short_and_never_obeyed_by_a_terminal():
    hostile = brief("\x1b[2J\u202e\ud800" + "x" * 1000)
    assert hostile.isprintable() and len(hostile) < 110 and hostile.endswith("xxx...")
    assert brief("a star") == "a star" and brief({"class": "Café"}) == "{'class': 'Café'}"


def own_file(folder, text, name="mine"):
    """Write a file of the user's own; its name is this test's alone, as one process can hold one module of a name."""
    path = folder / f"{name}_{folder.name}.py"
    path.write_text(text)
    return path


def own_reward(folder, body, name="mine", check="", rest=""):
    """Write a reward of the user's own, with a check and more lines if there are any; returns its name for --reward."""
    text = f"import torch\n\n\ndef score(images, prompts, metadata):\n    {body}\n\n\n"
    text += f"def check(prompt, fields):\n    {check}\n\n\nscore.check = check\n" if check else ""
    return f"{own_file(folder, text + rest, name)}:score"


def test_a_weighted_sum_of_rewards_and_a_reward_of_ones_own(tmp_path):
    level = own_reward(tmp_path, "return [image.getpixel((0, 0))[0] for image in images]")
    batch = IMAGES, PROMPTS[:3], [{}] * 3
    scores = load_reward(level)(*batch)
    assert scores.dtype == torch.float32 and scores.tolist() == [0, 100, 200]
    total = load_reward(f"{level}:0.5, jpeg_compressibility:-2,jpeg_incompressibility")
    torch.testing.assert_close(total(*batch), 0.5 * scores + 3 * load_reward("jpeg_incompressibility")(*batch))
    assert total([], [], []).shape == (0,)   # of many processes, one may own no group
    # Strict accuracy has a meaning only for a verifier on its own.
    assert load_reward("shapes").strict
    assert not any(load_reward(spec).strict for spec in (level, "shapes:0.5", "shapes,shapes", "jpeg_compressibility"))


def test_a_sum_gives_its_terms_unweighted_by_short_names_and_adds_up_what_is_named_twice(tmp_path):
    level = own_reward(tmp_path, "return [image.getpixel((0, 0))[0] for image in images]")
    other = own_reward(tmp_path, "return [1.0] * len(images)", "other")
    short, batch = Path(level).name, (IMAGES, PROMPTS[:3], [{}] * 3)
    reward = load_reward(f"{level}:0.5,{other}, {level}:2 ,jpeg_compressibility:0")
    terms = reward.terms(*batch)
    assert list(terms) == [short, Path(other).name, "jpeg_compressibility"] and terms[short].tolist() == [0, 100, 200]
    assert reward.total(terms).tolist() == [1, 251, 501] == reward(*batch).tolist()
    # Of any shape, in float64: the groups of a step, and what is made of them.
    assert reward.total({name: score.view(3, 1) for name, score in terms.items()}).shape == (3, 1)
    huge = load_reward(f"{own_reward(tmp_path, 'return [3e38, -3e38, 0.0]', 'huge')}:1e29,jpeg_compressibility")
    assert huge.total(huge.terms(*batch)).tolist() == pytest.approx([3e67, -3e67, 0], abs=1, rel=1e-6)
    assert huge.total(huge.terms(*batch)).std().isfinite()
    assert reward.name == f"{short}:0.5,{Path(other).name},{short}:2 ,jpeg_compressibility:0"


@pytest.mark.parametrize("body, sentence", [
    ("return [0.0]", "returned shape (1,) for 3 images"), ("return 0.0", "returned shape () for 3 images"),
    ("return [0.0, float('nan'), 0.0]", "not finite for 'three squares'"), ("return ['good', 'bad', 'bad']", "on: "),
    ("1 / 0", "on: division by zero"), ("raise ValueError(prompts[2])", "on: three long words then xxx")])
def test_a_faulty_reward_is_named_with_a_prompt(tmp_path, body, sentence):
    prompts = [*PROMPTS[:2], "three long words then " + "x" * 1_000_000]
    with pytest.raises(UserError, match=r"'mine_\w+.py:score' failed for the prompts from 'a red circle'") as caught:
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


def test_a_check_is_given_a_copy_of_the_row_of_its_own(tmp_path):
    row = {"prompt": "a star", "list": [1, {"deep": 2}]}
    check = f"assert fields == {row}; fields['list'].clear(); fields.update(prompt='spoilt')"
    specs = [own_reward(tmp_path, "return [1.0] * len(images)", name, check) for name in ("one", "two")]
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    reward = load_reward(",".join(specs))
    assert load_prompts(tmp_path / "p.jsonl", reward) == [row]
    assert reward(IMAGES[:1], ["a star"], [row]).tolist() == [2] and row["list"] == [1, {"deep": 2}]


def state():
    """What a reward could change for the whole program."""
    return (os.getcwd(), sys.stdin, sys.stdout, sys.stderr, warnings.filters[:], np.geterr(), torch.get_default_dtype(),
            torch.get_default_device(), torch.is_grad_enabled(), torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled())


@pytest.mark.parametrize("statement", [
    "import os; os.chdir('/')", "import sys; sys.stdout = None",
    "import sys; sys.stderr = sys.stdin = open('/dev/null')",
    "import warnings; warnings.simplefilter('error')", "import numpy; numpy.seterr(all='raise')",
    "torch.set_default_dtype(torch.float64)", "torch.set_default_device('meta')", "torch.set_grad_enabled(True)",
    "torch.set_grad_enabled(False)", "torch.set_num_threads(torch.get_num_threads() + 1)",
    "torch.use_deterministic_algorithms(True)",
    "import os, tempfile; folder = tempfile.mkdtemp(); os.chdir(folder); os.rmdir(folder)"])
@pytest.mark.parametrize("place", ["import", "call", "check", "a call that fails"])
def test_what_a_reward_changes_for_the_whole_program_is_undone(tmp_path, place, statement):
    statement = f"torch.arange(3); {statement}; DONE.append(1)"
    at = {"import": "0", "call": "0", "check": "0", place.split(" that")[0].split()[-1]: statement}
    at["call"] += "; 1 / 0" if place == "a call that fails" else ""
    spec = own_reward(tmp_path, f"{at['call']}\n    return torch.ones(3, device='cpu')", check=at["check"],
                      rest=f"DONE = []\n{at['import']}\n")
    before = state()
    reward = load_reward(spec)
    fails = place == "a call that fails" or (place == "call" and "meta" in statement)   # a device without numbers
    with pytest.raises(UserError) if fails else contextlib.nullcontext():
        assert reward(IMAGES, PROMPTS[:3], [{}] * 3).tolist() == [1, 1, 1]
    assert sys.modules[Path(spec[:-6]).stem].DONE   # it was done
    assert state() == before


def test_a_reward_may_be_random(tmp_path):
    # Its seed is not set back at each call; a run draws from generators of its own.
    reward = load_reward(own_reward(tmp_path, "return torch.rand(3)", rest="torch.manual_seed(0)\n"))
    assert not torch.equal(reward(IMAGES, PROMPTS[:3], [{}] * 3), reward(IMAGES, PROMPTS[:3], [{}] * 3))


@pytest.mark.parametrize("spec, sentence", [
    ("shape", "unknown reward 'shape'; known: shapes, words, realism, jpeg_compressib"), ("", "unknown reward ''"),
    ("shapes:1.0,pickscor:2", "unknown reward 'pickscor'"),
    ("shapes,shapes:-inf", "must be a finite number below 1e30, not -inf"),
    ("shapes:nan", "the weight of the reward 'shapes' must be a finite number below 1e30, not nan"),
    ("shapes:1e30", "below 1e30, not 1e+30"), ("shapes:1e400", "not inf"),
    ("jpeg_compressibility=models/jpeg", "has no model, so it takes no '=models/jpeg'"),
    ("absent.py:f", "'absent.py:f' cannot be loaded: [Errno 2] No such file"), ("EMPTY.py:f", "has no attribute 'f'"),
    ("BROKEN.py:f", ".py:f' cannot be loaded: No module named 'no_such_module_anywhere'"),
    ("EMPTY.py:number", "cannot be loaded: number is not a function")])
def test_a_reward_that_cannot_be_loaded_is_named_at_once(tmp_path, monkeypatch, spec, sentence):
    monkeypatch.chdir(tmp_path)
    spec = spec.replace("EMPTY.py", own_file(tmp_path, "number = 3\n", "empty").name)
    spec = spec.replace("BROKEN.py", own_file(tmp_path, "import no_such_module_anywhere\n", "broken").name)
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_reward(spec)


OWN = """from __future__ import annotations

import dataclasses
import multiprocessing

import HELPER

LOADED = HELPER.count()


@dataclasses.dataclass
class Judge:
    scale: float

    def score(self, image: object) -> float:
        return self.scale * image.getpixel((0, 0))[0]


def red(images, prompts, metadata):
    return [*map(Judge(2.0).score, images)]


def square(x):
    return x * x


def pool(images, prompts, metadata):
    with multiprocessing.get_context(metadata[0]["start"]).Pool(1) as workers:
        return workers.map(square, range(len(images)))
"""


def test_a_file_of_ones_own_is_a_real_module(tmp_path, monkeypatch):
    # With a helper beside it, dataclasses, a pool of processes; run once for all the functions that are taken from it.
    helper = own_file(tmp_path, "TIMES = []\n\n\ndef count():\n    TIMES.append(1)\n    return len(TIMES)\n", "helper")
    path = own_file(tmp_path, OWN.replace("HELPER", helper.stem))
    monkeypatch.chdir(tmp_path)
    red = load_reward(f"{path.name}:red")
    assert red(IMAGES, PROMPTS[:3], [{}] * 3).tolist() == [0, 200, 400]
    monkeypatch.chdir(tmp_path.parent)   # from anywhere, under any name of its folder
    (tmp_path / "link").symlink_to(tmp_path)
    for start in ("fork", "spawn"):
        pool = load_reward(f"{tmp_path}/link/{path.name}:pool" if start == "fork" else f"{path}:pool")
        assert pool(IMAGES, PROMPTS[:3], [{"start": start}] * 3).tolist() == [0, 1, 4]
    assert sys.modules[path.stem].LOADED == 1 and len(sys.modules[helper.stem].TIMES) == 1
    # A link, as the hub's cache is made of: what lies beside the link counts.
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/blob").write_text(f"import beside_{helper.stem}\n\n\ndef red(*_):\n    return [1.0] * 3\n")
    (tmp_path / "cache" / f"beside_{helper.stem}.py").write_text("")
    (tmp_path / "cache" / f"link_{path.stem}.py").symlink_to("blob")
    assert load_reward(f"{tmp_path.name}/cache/link_{path.stem}.py:red")(IMAGES, PROMPTS[:3], [{}] * 3).sum() == 3


@pytest.mark.parametrize("name", ["json.py", "time.py", "rewards.py", "torch.py", "antigravity.py", "a.b.py"])
def test_a_file_that_bears_another_modules_name_is_refused_and_neither_is_run(tmp_path, name):
    (tmp_path / name).write_text("raise ValueError('it was run')\n")
    already = "antigravity" in sys.modules
    with pytest.raises(UserError, match=f"by the name '{name[:-3]}' Python finds .*: rename the file$"):
        load_reward(f"{tmp_path / name}:f")
    assert already or "antigravity" not in sys.modules   # which would open a browser


def test_a_second_file_of_one_name_is_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{tmp_path.name}.py").write_text("def f(i, p, m):\n    return [1.0] * len(i)\n")
    with pytest.raises(UserError, match=f"/b/.*: by the name '{tmp_path.name}' Python finds .*/a/.*: rename the file"):
        load_reward(f"{tmp_path}/a/{tmp_path.name}.py:f,{tmp_path}/b/{tmp_path.name}.py:f")


def test_paths_of_rewards_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own_file(tmp_path, "", "a")
    name, here = f"a_{tmp_path.name}.py", str(tmp_path)
    Path("m/pick score").mkdir(parents=True)
    for spec, absolute in (
            (f"{name}:f", f"{here}/{name}:f"), (f"./{name}:f:0.5", f"{here}/{name}:f:0.5"),
            (f"shapes, m/../{name}:f:-1,{name}:g", f"shapes,{here}/{name}:f:-1,{here}/{name}:g"),
            ("pickscore=m:2,shapes", f"pickscore={here}/m:2,shapes"), ("vlm=m/pick score", f"vlm={here}/m/pick score"),
            ("pickscore=org/model:2", "pickscore=org/model:2"), ("absent.py:f", "absent.py:f"),
            ("shapes:2", "shapes:2")):
        assert absolute_paths(spec).replace(" /", "/") == absolute and absolute_paths(absolute) == absolute


def test_the_rewards_of_this_repository_keep_their_module_names_from_any_folder(tmp_path):
    for name in ("adapters", "shapes"):   # packages of these names that are installed, as there are some
        (tmp_path / "installed" / name).mkdir(parents=True)
        (tmp_path / "installed" / name / "__init__.py").write_text("")
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT)!r})   # as `python {ROOT}/dgpo.py` does
        import rewards
        assert not {{'transformers', 'diffusers'}} & {{*sys.modules}}, 'naming rewards imports models'
        for name in rewards.FILES:
            assert rewards.load_function(name, 'cpu') is getattr(sys.modules['shapes.world'], name)
        for load, _ in rewards.REWARDS.values():
            isinstance(load, str) and rewards.import_function(f'{ROOT}/{{load}}')
        assert 'world' not in sys.modules and rewards.load_function({str(ROOT / "shapes/world.py:words")!r}, 'cpu')
        assert 'world' not in sys.modules and {{'adapters.geneval', 'adapters.ocr'}} <= {{*sys.modules}}
        assert not {{'transformers', 'diffusers'}} & {{*sys.modules}}, 'finding rewards imports models'"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def test_jpeg_rewards_are_file_sizes_of_opposite_sign(tmp_path):
    noisy = Image.fromarray(np.random.default_rng(24).integers(0, 256, (32, 32, 3), np.uint8))
    noisy.save(tmp_path / "noisy.jpg", quality=95)
    small, large = load_reward("jpeg_incompressibility")([IMAGES[0], noisy], PROMPTS[:2], [{}] * 2).tolist()
    assert large == pytest.approx((tmp_path / "noisy.jpg").stat().st_size / 1000) and small < large
    assert load_reward("jpeg_compressibility")([noisy.convert("RGBA")], PROMPTS[:1], [{}]).item() == -large


# ------------------------------------------------------------------------------------------------
# REWARDS THAT ARE MODELS: random ones of the real classes, saved in the real format
# ------------------------------------------------------------------------------------------------


def save_random(model, folder):
    """Save a model with larger weights than it was drawn with, as all images look alike to such a one."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 10
    model.save_pretrained(folder)


def save_clip(folder, number):
    """A random CLIP of the real classes with its processor: 32x32 images, 16 tokens.  Returns the folder."""
    torch.manual_seed(number)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL / "tokenizer")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 16,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    save_random(transformers.CLIPModel(config), folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP: `clipscore=FOLDER` and `pickscore=FOLDER`."""
    return save_clip(tmp_path_factory.mktemp("clip"), 51)


@pytest.fixture(scope="module")
def geneval_folder(tmp_path_factory):
    """A random Mask2Former with Swin, sure of what it sees, and a random CLIP: `geneval=FOLDER` as documented."""
    folder, labels = tmp_path_factory.mktemp("geneval"), dict(enumerate(["dog", "mouse", "tvmonitor", "cup"]))
    save_clip(folder / "clip", 53)
    backbone = transformers.SwinConfig(image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4,
                                       out_features=["stage1", "stage2", "stage3", "stage4"])
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=6,
        id2label=labels, label2id={name: i for i, name in labels.items()})
    torch.manual_seed(54)
    with mock.patch.object(modeling_mask2former, "requires_backends"):   # its loss asks for scipy to be built
        model = transformers.Mask2FormerForUniversalSegmentation(config)
    model.class_predictor.weight.data *= 20
    model.save_pretrained(folder / "detector")
    processor = transformers.Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    processor.save_pretrained(folder / "detector")
    return folder


@pytest.fixture(scope="module")
def ocr_folder(tmp_path_factory):
    """Random PP-OCRv5 models: `ocr=FOLDER` as documented."""
    folder = tmp_path_factory.mktemp("ocr")
    backbone = {"model_type": "hgnet_v2", "stem_channels": [3, 8, 8], "stage_in_channels": [8, 16, 16, 16],
                "stage_mid_channels": [8] * 4, "stage_out_channels": [16] * 4, "stage_num_blocks": [1] * 4,
                "stage_numb_of_layers": [1] * 4, "embedding_size": 8, "hidden_sizes": [16] * 4, "depths": [1] * 4,
                "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    kernels = {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}
    for n, name in ((7, "longratio"), (5, "midratio"), (3, "shortratio")):
        kernels |= {f"{part}_{name}": [[h, w], [1, 1], [h // 2, w // 2]] for part, h, w in (
            ("vertical_long_to_small_conv", n, 1), ("horizontal_small_to_long_conv", 1, n),
            ("symmetric_conv_long", n, n))}
    detector = transformers.PPOCRV5ServerDetConfig(
        backbone_config=backbone, neck_out_channels=16, intraclass_block_config=kernels,
        scale_factor_list=[1, 2, 4, 8], kernel_list=[3, 2, 2])
    backbone |= {"stage_downsample": [True] * 4, "stem_strides": [2, 1, 1, 1, 1],
                 "stage_downsample_strides": [[2, 1], [1, 2], [2, 1], [2, 1]]}
    recognizer = transformers.PPOCRV5ServerRecConfig(
        backbone_config=backbone, hidden_size=16, num_attention_heads=2, depth=1, head_out_channels=8)
    torch.manual_seed(56)
    detector = transformers.AutoModelForObjectDetection.from_config(detector).eval().requires_grad_(False)
    recognizer = transformers.AutoModelForTextRecognition.from_config(recognizer).eval().requires_grad_(False)
    for parameter in (p for model in (detector, recognizer) for p in model.parameters() if p.ndim > 1):
        torch.nn.init.kaiming_normal_(parameter)   # as drawn, all images look alike to them
    # Text here and there, and every character somewhere.
    for layer in (detector.head.binarize_head.conv_final, detector.head.local_refinement_module.convolution_final):
        layer.bias[:] = -5
    output = recognizer.head.head
    output.bias -= recognizer(torch.randn(4, 3, 48, 320)).last_hidden_state.log().mean((0, 1))
    output.weight *= 300
    output.bias *= 300
    detector.save_pretrained(folder / "detector")
    recognizer.save_pretrained(folder / "recognizer")
    settings = {"character_list": ["blank", *"abcdef", " "], "image_processor_type": "PPOCRV5ServerRecImageProcessor"}
    (folder / "recognizer/preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def ocr_models(ocr_folder):
    """Detector, recognizer and its characters, as transformers loads them."""
    detector = transformers.AutoModelForObjectDetection.from_pretrained(ocr_folder / "detector")
    recognizer = transformers.AutoModelForTextRecognition.from_pretrained(ocr_folder / "recognizer")
    characters = json.loads((ocr_folder / "recognizer/preprocessor_config.json").read_text())["character_list"]
    return detector.requires_grad_(False).eval(), recognizer.requires_grad_(False).eval(), characters


@pytest.fixture(scope="module")
def vlm_folder(tmp_path_factory):
    """A random Qwen2.5-VL, the architecture of the default judge, with a tokenizer of letters and its chat template."""
    folder = tmp_path_factory.mktemp("vlm")
    special = [f"<|{name}|>" for name in ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad",
                                          "video_pad")]
    vocabulary = {token: i for i, token in enumerate([*special, *map(chr, range(32, 127)), "\n"])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token=special[0], eos_token=special[2], additional_special_tokens=special[1:])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{% for part in m.content %}{% if part.type == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}")
    tokenizer.save_pretrained(folder)
    images = transformers.Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    images.save_pretrained(folder)
    torch.manual_seed(59)
    save_random(transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        text_config={"vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
                     "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": 2,
                     "pad_token_id": 0, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]}},
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
                       "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]},
        image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4)), folder)
    return folder


@pytest.fixture(scope="module")
def judges(clip_folder, geneval_folder, ocr_folder, vlm_folder, tmp_path_factory):
    """Every reward that is a model, with the folder of a small one."""
    aesthetic = shutil.copytree(clip_folder, tmp_path_factory.mktemp("judges") / "aesthetic")
    save_file({"layers.0.weight": torch.linspace(-1, 1, 12)[None], "layers.0.bias": torch.zeros(1)},
              aesthetic / "aesthetic-model.safetensors")
    return {"geneval": geneval_folder, "geneval_accuracy": geneval_folder, "pickscore": clip_folder,
            "clipscore": clip_folder, "aesthetic": aesthetic, "ocr": ocr_folder, "vlm": vlm_folder}


def change_weights(folder, change):
    """Apply a function to the dict of weights in a folder's safetensors file."""
    path = next(folder.glob("*model.safetensors"))
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def pipeline_folder(tmp_path):
    """The embedded pipeline in a folder of the test's own."""
    return shutil.copytree(MODEL, tmp_path / "pipeline")


@pytest.mark.parametrize("name", [
    "CLIPTokenizer", "T5Tokenizer", "Qwen2Tokenizer", "GemmaTokenizer", "LlamaTokenizer", "GPT2Tokenizer",
    "BertTokenizer", "RobertaTokenizer", "XLMRobertaTokenizer", "CohereTokenizer", "CodeGenTokenizer", "AutoTokenizer"])
def test_a_tokenizer_without_its_vocabulary_is_refused(tmp_path, name):
    config = {"tokenizer_class": name.replace("Auto", "Qwen2"), "model_max_length": 77}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(UserError, match=f"is no {name}: it reads all words alike, as without its vocabulary"):
        load_pretrained(getattr(transformers, name), tmp_path)


@pytest.mark.parametrize("name, tokenizer", [
    ("pickscore", "."), ("clipscore", "."), ("aesthetic", "."), ("geneval", "clip"), ("vlm", "."),
    ("pipeline", "tokenizer"), ("pipeline", "tokenizer_2")])
def test_a_tokenizer_without_its_vocabulary_is_refused_wherever_one_is_loaded(judges, tmp_path, name, tokenizer):
    folder = shutil.copytree(judges.get(name, MODEL), tmp_path / "model")
    (folder / tokenizer / "tokenizer.json").unlink()
    with pytest.raises((UserError, ValueError)) as caught:
        load_pipeline(folder, torch.float32) if name == "pipeline" else load_reward(f"{name}={folder}")
    # A tokenizer of no class of its own is not made up by the library.
    assert ("reads all words alike" if name != "vlm" else "instantiate the backend tokenizer") in str(caught.value)


def test_a_tokenizers_length_is_bounded_as_texts_may_be_padded_to_it(judges, tmp_path):
    for source, of in ((judges["clipscore"], "."), (MODEL, "tokenizer")):
        folder = shutil.copytree(source, tmp_path / of / "model")
        config = json.loads((folder / of / "tokenizer_config.json").read_text())
        (folder / of / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 10 ** 9}))
        assert load_pretrained(transformers.CLIPTokenizer, folder / of).model_max_length == 4096
    assert load_pipeline(folder, torch.float32).tokenizer.model_max_length == 4096
    own, bounded = (load_reward(f"clipscore={path}")(pictures(2), PROMPTS[:2], [{}] * 2)
                    for path in (judges["clipscore"], tmp_path / "model"))
    assert torch.equal(own, bounded)


MODELS = [("clipscore", ".", "visual_projection.weight"), ("geneval", "clip", "logit_scale"),
          ("geneval", "detector", "class_predictor.bias"), ("ocr", "detector", "conv_down"),
          ("ocr", "recognizer", "head"), ("vlm", ".", "self_attn.o_proj.weight"),
          ("pipeline", "transformer", "proj_out.weight"), ("pipeline", "vae", "decoder.conv_in.weight"),
          ("pipeline", "text_encoder", "text_projection.weight")]


@pytest.mark.parametrize("fault, sentence", [
    ("missing", "it has no weights for"), ("surplus", "its file has other weights, too, as "),
    ("nan", "not all numbers are finite in "), ("infinite", "not all numbers are finite in ")])
@pytest.mark.parametrize("name, of, part", MODELS)
def test_weights_that_are_missing_left_over_or_not_finite_are_refused(
        judges, tmp_path, name, of, part, fault, sentence):
    folder = shutil.copytree(judges.get(name, MODEL), tmp_path / "model")

    def spoil(weights):
        key = next(key for key in weights if part in key and weights[key].is_floating_point())
        if fault == "missing":
            del weights[key]
        elif fault == "surplus":
            weights["layer_of_another_model.weight"] = torch.zeros(2)
        else:
            weights[key].view(-1)[-1:] = float(fault.replace("infinite", "-inf"))

    change_weights(folder / of, spoil)
    with pytest.raises(UserError, match=f"model(/{of})? is no [A-Za-z0-9]+: {sentence}"):
        load_pipeline(folder, torch.float32) if name == "pipeline" else load_reward(f"{name}={folder}")


def test_a_batch_normalisations_running_means_are_weights_too(ocr_folder, tmp_path):
    for kind, sentence in (("missing", "has no weights for .*running_"), ("nan", "numbers are finite in .*running_")):
        folder = shutil.copytree(ocr_folder, tmp_path / kind)

        def spoil(weights):
            key = next(key for key in weights if "running_var" in key)
            weights.pop(key) if kind == "missing" else weights[key].fill_(float("nan"))

        change_weights(folder / "detector", spoil)
        with pytest.raises(UserError, match=sentence):
            load_reward(f"ocr={folder}")


def test_layers_that_the_configuration_does_not_know_are_refused_and_what_the_library_ignores_is_not(judges, tmp_path):
    clip, pipeline = shutil.copytree(judges["clipscore"], tmp_path / "clip"), pipeline_folder(tmp_path)
    for path in (clip / "config.json", pipeline / "text_encoder/config.json"):
        config = json.loads(path.read_text())
        config.get("text_config", config)["num_hidden_layers"] = 1
        path.write_text(json.dumps(config))
    for load in (lambda: load_reward(f"clipscore={clip}"), lambda: load_pipeline(pipeline, torch.float32)):
        with pytest.raises(UserError, match="its file has other weights, too, as text_model.encoder.layers.1."):
            load()
    # Published CLIPs hold the numbers of their positions, which the model makes itself.
    whole = shutil.copytree(judges["clipscore"], tmp_path / "whole")
    positions = {f"{tower}_model.embeddings.position_ids": torch.arange(16)[None] for tower in ("text", "vision")}
    change_weights(whole, lambda weights: weights.update(positions))
    load_reward(f"clipscore={whole}")


@pytest.mark.parametrize("change, sentence", [
    (lambda state: state.clear(), "is no head of the aesthetic predictor: its keys are []"),
    (lambda state: state.update(scale=torch.ones(1)), "is no head of the aesthetic predictor: its keys are ["),
    (lambda state: state.pop("layers.0.bias"), "is no head of the aesthetic predictor"),
    (lambda state: state.update({"layers.0.bias": torch.zeros(4)}), "has a bias of another size"),
    (lambda state: state.update({"layers.0.bias": torch.tensor([torch.nan])}), "or numbers that are not finite"),
    (lambda state: state["layers.0.weight"].fill_(torch.inf), "or numbers that are not finite"),
    (lambda state: state.update({"layers.0.weight": torch.ones(2, 12), "layers.0.bias": torch.ones(2)}),
     "gives 2 scores for an image, not one"),
    (lambda state: state.update({"layers.0.weight": torch.ones(1, 768)}), "takes embeddings of size 768")])
def test_an_aesthetic_head_of_another_form_is_refused(judges, tmp_path, change, sentence):
    folder = shutil.copytree(judges["aesthetic"], tmp_path / "aesthetic")
    state = load_file(folder / "aesthetic-model.safetensors")
    change(state)
    (folder / "aesthetic-model.safetensors").unlink()
    torch.save(state, folder / "aesthetic-model.pth")
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_reward(f"aesthetic={folder}")


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "aesthetic", "geneval", "ocr", "vlm", "pipeline"])
def test_no_code_of_a_models_folder_is_run_and_nobody_is_asked(judges, tmp_path, monkeypatch, name):
    folder, mark = shutil.copytree(judges.get(name, MODEL), tmp_path / "model"), tmp_path / "it-was-run"
    classes = ("AutoConfig", "AutoModel", "AutoModelForObjectDetection", "AutoModelForTextRecognition", "AutoProcessor",
               "AutoModelForImageTextToText", "AutoImageProcessor", "AutoVideoProcessor")
    auto_map = {**dict.fromkeys(classes, "evil.Evil"), "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    for path in [*folder.rglob("*config.json")]:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
        (path.parent / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n\n\nclass Evil:\n    pass\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    load_pipeline(folder, torch.float32) if name == "pipeline" else load_reward(f"{name}={folder}")
    assert not mark.exists() and sys.stdin.tell() == 0
    # A type that the library does not know could only come from there.
    for path in folder.rglob("*config.json"):
        text = path.read_text()
        kinds = ("model_type", "tokenizer_class", "processor_class", "image_processor_type", "architectures")
        path.write_text(json.dumps(json.loads(text) | dict.fromkeys(kinds, "Evil")))
        with contextlib.suppress(UserError):
            load_pipeline(folder, torch.float32) if name == "pipeline" else load_reward(f"{name}={folder}")
        path.write_text(text)
    if name == "pipeline":
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["evil", "Evil"]}))
        with pytest.raises(UserError, match="custom code"):
            load_pipeline(folder, torch.float32)
    assert not mark.exists() and sys.stdin.tell() == 0


# ------------------------------------------------------------------------------------------------
# LORAS of diffusers and of peft, against what these compute with them
# ------------------------------------------------------------------------------------------------

TARGETS = ["attn.to_q", "attn.to_out.0", "attn.add_k_proj"]


def adapted(tmp_path, form, **settings):
    """A transformer with a random LoRA, saved as diffusers or peft does: (the transformer, the LoRA's folder)."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(70)
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(MODEL, subfolder="transformer")
    defaults = {"r": 4, "lora_alpha": 16, "target_modules": TARGETS, "init_lora_weights": "gaussian"}
    config = peft.LoraConfig(**defaults | settings)
    model = transformer
    if form == "peft":
        model = peft.get_peft_model(transformer, config)
    else:
        transformer.add_adapter(config)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape)
    if form == "peft":
        model.save_pretrained(tmp_path)
    else:
        about = {"transformer_lora_adapter_metadata": transformer.peft_config["default"].to_dict()}
        about = about if form == "diffusers" else {}
        diffusers.StableDiffusion3Pipeline.save_lora_weights(
            tmp_path, peft.get_peft_model_state_dict(transformer), **about)
    return transformer.eval(), tmp_path


@torch.no_grad()
def velocity(transformer):
    """What a transformer computes for one fixed input."""
    shape, generator = transformer.config, torch.Generator().manual_seed(71)
    x, text, pooled = (torch.randn(*size, generator=generator) for size in (
        (2, shape.in_channels, shape.sample_size, shape.sample_size), (2, 5, shape.joint_attention_dim),
        (2, shape.pooled_projection_dim)))
    return transformer(x, text, pooled, torch.tensor([500.0, 900.0]), return_dict=False)[0]


def plain_with(pairs):
    """What the plain transformer computes with load_lora's matrices added to its weights."""
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(MODEL, subfolder="transformer").eval()
    for name, (down, up) in pairs.items():
        transformer.get_submodule(name).weight.data += up @ down
    return velocity(transformer)


@pytest.mark.parametrize("form, settings", [
    ("diffusers", {}), ("diffusers", {"lora_alpha": 2}), ("peft", {}), ("peft", {"lora_alpha": 2, "r": 8}),
    ("peft", {"init_lora_weights": "orthogonal", "lora_dropout": 0.5}), ("diffusers, no alpha", {"lora_alpha": 4}),
    ("diffusers, no alpha", {"lora_alpha": 4, "rank_pattern": {"attn.to_q": 8}, "alpha_pattern": {"attn.to_q": 8}})])
def test_a_lora_means_to_us_what_it_means_to_the_library_that_wrote_it(tmp_path, form, settings):
    transformer, folder = adapted(tmp_path, form, **settings)
    wanted, pairs = velocity(transformer), load_lora(folder)
    torch.testing.assert_close(plain_with(pairs), wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - plain_with({})).abs().max() > 0.1   # it matters
    assert load_lora(next(folder.glob("*.safetensors"))).keys() == pairs.keys()   # its file does as well as its folder
    if form != "peft":   # as the pipeline of diffusers reads it
        pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(MODEL, text_encoder_3=None, tokenizer_3=None)
        pipe.load_lora_weights(folder)
        torch.testing.assert_close(velocity(pipe.transformer), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["diffusers", "peft"])
@pytest.mark.parametrize("settings", [
    {"use_dora": True}, {"use_rslora": True}, {"alpha_pattern": {"attn.to_q": 2}}, {"rank_pattern": {"attn.to_q": 2}},
    {"lora_bias": True, "init_lora_weights": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"},
    {"target_modules": ["pos_embed.proj", "attn.to_q"]}], ids=str)
def test_what_is_more_than_low_rank_matrices_is_refused(tmp_path, form, settings):
    _, folder = adapted(tmp_path, form, **settings)
    with pytest.raises(ValueError, match="it has more than low-rank matrices, or none: |is not the half of a low-rank"):
        load_lora(folder)


@pytest.mark.parametrize("change, sentence", [
    (lambda weights: weights[min(weights)].view(-1)[:1].fill_(torch.nan), "not all numbers are finite in"),
    (lambda weights: weights[min(weights)].view(-1)[:1].fill_(-torch.inf), "not all numbers are finite in"),
    (lambda weights: weights.pop(next(key for key in weights if "lora_B" in key)), "is not the half of"),
    (lambda weights: weights.pop(next(key for key in weights if "lora_A" in key)), "it has more than"),
    (lambda weights: weights.update({min(weights): torch.ones(3, 64)}), "is not the half of"),
    (lambda weights: weights.update({"transformer.x.alpha": torch.ones(())}), "or none: x.alpha"),
    (lambda weights: weights.clear(), "or none: ")])
def test_a_lora_of_other_tensors_is_refused(tmp_path, change, sentence):
    _, folder = adapted(tmp_path, "diffusers, no alpha")
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    change(weights)
    save_file(weights, folder / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=sentence):
        load_lora(folder)


def test_a_lora_of_peft_without_its_settings_is_refused_as_its_alpha_is_not_known(tmp_path):
    _, folder = adapted(tmp_path, "peft")
    (folder / "adapter_model.safetensors").rename(folder / "renamed.safetensors")
    assert load_lora(folder / "renamed.safetensors")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(OSError, match="adapter_config.json"):
        load_lora(folder / "renamed.safetensors")


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
    assert not both.strict and list(both.terms(images, prompts, nothing)) == [
        f"clipscore={clip_folder.name}", f"pickscore={clip_folder.name}"]


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
            ("clipscore=someone/clip:2", "loaded from someone/clip (clipscore=FOLDER takes a folder): "),
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
    assert geneval.box_relations(box, other) == set(relations.split(", ")) - {""}


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
        assert geneval.score_geneval(metadata, detected) == pytest.approx(partial)
        assert (geneval.score_geneval(metadata, detected) == 1.0) == (partial == 1)   # to the last bit: `strict` asks
        assert geneval.score_geneval(metadata, detected, exact=False) == accuracy


def test_geneval_judges_each_image_alone_exactly_and_by_its_own_accuracy(geneval_folder):
    images = pictures(9) + pictures(8, (56, 40), 55)   # of two sizes
    classes = ("dog", "computer mouse", "tv", "cup")    # two of them under GenEval's own names
    metadata = [{"include": [one(classes[i % 4], color=COLORS[i % 10]), one(classes[(i + 1) % 4])]} for i in range(17)]
    exact, accuracy = (load_reward(f"{name}={geneval_folder}") for name in ("geneval", "geneval_accuracy"))
    scores, accuracies = (check_batching(reward, images, [""] * 17, metadata) for reward in (exact, accuracy))
    assert scores.unique().numel() > 3 and scores.max() <= 1 and exact.strict and accuracy.strict
    assert set(accuracies.tolist()) <= {0.0, 1.0} and (accuracies >= (scores == 1)).all()


def test_geneval_sees_the_detectors_masks_and_names_colours_with_clip(geneval_folder, monkeypatch):
    image, (model, processor) = pictures(1, (48, 40))[0], geneval.load_detector(geneval_folder / "detector", "cpu")
    objects = geneval.detect_objects((model, processor), [image])[0]
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
    ("helo world", "hello", 0),   # 6 edits, of 5 letters: capped
    ("Cafe\u0301", "Café", 1), ("Café", "Cafe\u0301", 1), ("Cafe", "Café", 0.75), ("Angstro\u0308m", "ÅNGSTRÖM", 7 / 8),
    (unicodedata.normalize("NFD", "Phở Hà Nội"), "Phở Hà Nội", 1), ("Phở Hà Nội", "phở\u00a0hà\u3000nội", 1),
    ("New\u00a0York\n", "new york", 1), ("new\tyork", "New\u2009\r\nYork", 1)])
def test_ocr_score_is_the_authors_in_any_case_with_any_white_space_and_in_either_unicode_form(read, wanted, score):
    assert ocr.ocr_score(read, wanted) == pytest.approx(score)


def test_the_wanted_text_stands_in_double_quotes_or_in_the_metadata():
    for prompt, fields, text in (
            ('A sign that says "Hello World".', {}, "Hello World"), ("A cup with “Good day” on it", {}, "Good day"),
            ('"One" above "Two"', {}, "One"), ('a “sign” with "it\'s"', {}, "sign"), ('"One"', {"text": "Two"}, "Two"),
            ("no quotes", {"text": "Two"}, "Two"), ("no quotes", {"text": 24}, "24")):
        assert ocr.wanted_text(prompt, fields) == text


def test_text_boxes_are_grown_components_in_reading_order():
    def boxes(*regions):
        probability = torch.full((100, 200), 0.1)
        for (x0, y0, x1, y1), value in regions:
            probability[y0:y1, x0:x1] = value
        return ocr.text_boxes(probability)

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
        return ocr.read_ctc(probabilities, ["blank", "a", "b", " "])

    assert read([1, 1, 0, 1, 2, 2, 3, 0, 2]) == "aab b" and read([0, 0]) == "" and read([2]) == "b"
    assert read([1, 2], 0.51) == "ab" and read([1, 2], 0.49) == ""


def test_ocr_runs_on_its_detector_and_recogniser(ocr_folder, ocr_models):
    images, (detector, *recognizer) = pictures(6, (160, 96), 57) + pictures(2, (96, 96), 58), ocr_models
    lines = [ocr.cut_lines(detector, [image])[0] for image in images]
    texts = ["".join(ocr.read_lines(*recognizer, [crop])[0] for crop in crops) for crops in lines]
    assert len(set(texts)) > 4
    # Asked for what is read, for half of it with another letter, and for something else.
    wanted = [(text, text[len(text) // 2:] + "f", "zzz")[i % 3] for i, text in enumerate(texts)]
    prompts = [f'It says "{text}"' for text in wanted]
    scores = check_batching(load_reward(f"ocr={ocr_folder}"), images, prompts, [{}] * 8)
    assert scores.tolist() == pytest.approx([ocr.ocr_score(*pair) for pair in zip(texts, wanted)])
    assert (scores[::3] == 1).all() and (scores[2::3] == 0).all() and scores.unique().numel() > 2


def test_ocr_models_see_what_they_were_trained_on(ocr_models):
    (detector, recognizer, characters), seen = ocr_models, []
    for model in ocr_models[:2]:
        model.register_forward_pre_hook(lambda _, args, inputs: seen.append(inputs["pixel_values"]), with_kwargs=True)
    batches = [Image.new("RGB", (100, 50), "#f00")], [Image.new("RGB", (1920, 480))], pictures(8, (150, 90), 61)
    *_, lines = (ocr.cut_lines(detector, batch) for batch in batches)
    # In steps of 32, and at most 960; blue, green, red, with ImageNet's numbers for red, green, blue.
    assert [pixels.shape[2:] for pixels in seen] == [(64, 96), (256, 960), (96, 160)]
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor([-0.485 / 0.229, -0.456 / 0.224, 0.594 / 0.225]))
    upright = 0
    for of_image, probability in zip(lines, detector(pixel_values=seen[2]).last_hidden_state[:, 0]):
        for line, box in zip(of_image, ocr.text_boxes(probability), strict=True):
            x0, y0, x1, y1 = (round(edge * scale) for edge, scale in zip(box, 2 * (150 / 160, 90 / 96)))
            turned = y1 - y0 >= 1.5 * (x1 - x0)   # text that runs up
            assert line.size == ((y1 - y0, x1 - x0) if turned else (x1 - x0, y1 - y0))
            upright += turned
    assert 0 < upright < sum(map(len, lines))
    seen.clear()
    white = [Image.new("RGB", size, "white") for size in ((100, 24), (350, 48), (100, 48))]
    ocr.read_lines(recognizer, characters, white)
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
        loaded[name].check({"prompt": prompt, **fields})

    def short(name):   # a folder is named by its last part
        return f"{name}={judges[name].name}" if name in judges else Path(name).name

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
        for ask in (lambda: loaded[name].check({"prompt": prompt, **fields}),
                    lambda: loaded[name](IMAGES[:1], [prompt], [fields])):
            with pytest.raises(UserError, match=re.escape(reason)) as caught:
                ask()
            assert f"'{short(name)}' cannot score the prompt" in str(caught.value)
            assert len(str(caught.value)) < 600 and str(caught.value).isprintable()
    with pytest.raises(UserError, match="ocr=.*cannot score the prompt 'a star'"):   # a sum asks all of its terms
        load_reward(f"shapes,ocr={judges['ocr']}").check({"prompt": "a star"})
