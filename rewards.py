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
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """Something the user can put right: dgpo.py's main() prints it as one sentence and exits with code 2."""


@contextmanager
def blame(what):
    """What is raised inside, but Ctrl-C, becomes UserError(f"{what}: its first line"); a UserError passes as it is."""
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
                        ("not all are finite in", {k for k, p in parameters.items() if not p.isfinite().all()})):
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

# Reward -> (its loader, or FILE:ITS LOADER, a function of {part: folder or hub id} and the device; {part: default hub
# id}).  `reward=PATH` is where the part "." is, the model itself; without that part, PATH/part is where each part is.
REWARDS = {
    "jpeg_compressibility": (lambda paths, device: partial(jpeg_size, sign=-1), {}),
    "jpeg_incompressibility": (lambda paths, device: partial(jpeg_size, sign=1), {}),
    "pickscore": (load_pickscore,
                  {".": "yuvalkirstain/PickScore_v1", "processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}),
    "clipscore": (load_clipscore, {".": CLIP_L}),
    "aesthetic": (load_aesthetic, {".": CLIP_L, "head": "trl-lib/ddpo-aesthetic-predictor"}),
    "geneval": ("adapters/geneval.py:load_geneval", GENEVAL),
    "geneval_accuracy": ("adapters/geneval.py:load_geneval_accuracy", GENEVAL),
    "ocr": ("adapters/ocr.py:load_ocr", {"detector": "PaddlePaddle/PP-OCRv5_server_det_safetensors",
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
            return (import_function(f"{HERE}/{load}") if isinstance(load, str) else load)(paths, device)
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
    Raises UserError at once for what cannot be loaded; when called, for what raises or returns no B finite numbers.
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
