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
import importlib.util
import io
import itertools
import json
import os
import re
import stat
import sys
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
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
        except BaseException:   # its own __str__ fails
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


def regular(path):
    """The path of a file.  Raises OSError as opening it would, and ValueError for a pipe or folder, without opening it:
    to open a pipe that nobody writes to never ends, and what it holds can be read only once."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is not a file but a folder, a pipe or the like")
    return path


def depth(value):
    """How deeply lists and dicts are nested in a value of JSON, 0 for any other."""
    levels, level = 0, [value]
    while level := [outer for outer in level if isinstance(outer, (list, dict))]:
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
        levels += 1
    return levels


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
        lines = Path(regular(path)).read_text(encoding="utf-8").replace("\ufeff", "").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with blame(f"{path}, line {number}"):
            row = json.loads(line) if kind in (".jsonl", ".ndjson") else {"prompt": line.strip()}
            if not (isinstance(row, dict) and isinstance(row.get("prompt"), str) and row["prompt"].strip()):
                raise ValueError('not an object with a text as its "prompt"')
            if len(row["prompt"].encode()) > 10_000:   # half a surrogate pair, which JSON can hold, fails here
                raise ValueError("its prompt is longer than 10,000 bytes")
            if depth(row) > 100:   # every copy of it is made by recursion
                raise ValueError("it is nested more than 100 deep")
        try:
            rows.append({**(reward.check(row) if reward else {}), **row})
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
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
    if not kind.__module__.startswith("diffusers"):   # which runs no such code unless it is told to
        where["trust_remote_code"] = False
    load = partial(kind.from_pretrained, path, local_files_only=os.path.isdir(path), **where)
    name = f"{path}{'/' + where['subfolder'] if 'subfolder' in where else ''} is no {kind.__name__}"
    if device is None:
        loaded = load()
        tokenizer = getattr(loaded, "tokenizer", loaded)
        if hasattr(tokenizer, "get_vocab"):
            tokenizer.model_max_length = min(tokenizer.model_max_length, 4096)   # texts may be padded to that
            # Words of one length, as what is made up may encode every letter as the same unknown one.
            if len({str(tokenizer(word).input_ids) for word in ("red", "one", "cat", "sky", "fox")}) == 1:
                raise UserError(f"{name}: it reads all words alike, as without its vocabulary")
        return loaded
    dtype = dtype or (torch.float16 if torch.device(device).type == "cuda" else torch.float32)
    model, info = load(torch_dtype=dtype, output_loading_info=True)
    state, buffers = model.state_dict(), {name for name, _ in model.named_buffers()}
    # A buffer is computed by the model itself, but for the running means of a batch normalisation.
    drawn = {key for key in info["missing_keys"] if key in state and (key not in buffers or ".running_" in key)}
    odd = {key for key, tensor in state.items() if not tensor.is_meta and not tensor.isfinite().all()}
    for wrong, keys in (("it has no weights for", drawn), ("not all numbers are finite in", odd),
                        ("its file has other weights, too, as", {*info["unexpected_keys"]} - buffers)):
        if keys:
            raise UserError(f"{name}: {wrong} {min(keys)}")
    return model.to(device).requires_grad_(False).eval()


def load_pipeline(path, dtype):
    """A pipeline of diffusers, of a folder or a hub, on the CPU; its VAE in float32.  Raises UserError."""
    import diffusers
    local, parts = os.path.isdir(path), {}
    hint = "" if local else " (for a hub id: accept the licence on its page, run `hf auth login`, check the network)"
    with blame(f"--model {path} cannot be loaded{hint}"):
        for name, value in diffusers.DiffusionPipeline.load_config(path, local_files_only=local).items():
            library, kind = value if isinstance(value, (list, tuple)) and len(value) == 2 else ("", "")
            if library is None:
                parts[name] = None   # from_pretrained wants to be told what is left out
                continue
            own = getattr(diffusers.pipelines, str(library), None)   # of parts that belong to one pipeline alone
            module = importlib.import_module(library) if library in ("diffusers", "transformers") else own
            if kind := getattr(module, str(kind), None):   # one by one, as what is missing would be made up
                device, kept = "cpu" if issubclass(kind, torch.nn.Module) else None, torch.float32
                parts[name] = load_pretrained(kind, path, device, kept if name == "vae" else dtype, subfolder=name)
        return diffusers.DiffusionPipeline.from_pretrained(path, local_files_only=local, **parts)


def load_lora(path):
    """A LoRA of diffusers or peft, a file or its folder: dict layer -> (down [rank, in], up [out, rank] alpha / rank).

    Raises ValueError for what is more than low-rank matrices (DoRA, convolutions, ...), or lacks its alpha.
    """
    path = Path(path)
    names = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")   # of diffusers and of peft
    path = next((path / name for name in names if (path / name).exists()), path)
    with safe_open(regular(path), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        about = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    if any(key.startswith("base_model.model.") for key in tensors):   # peft's, which says its alpha beside it
        about = json.loads(path.with_name("adapter_config.json").read_text(encoding="utf-8"))
    tensors = {re.sub(r"^(base_model\.model|transformer)\.", "", key): tensor for key, tensor in tensors.items()}
    about = {key.removeprefix("transformer."): value for key, value in about.items()}
    odd = [key for key, value in about.items() if value and (
        key.startswith("use_") or key in ("rank_pattern", "alpha_pattern", "layer_replication", "kasa_config"))]
    if about.get("init_lora_weights", True) not in (True, False, None, "gaussian", "orthogonal", "eva"):
        odd.append("init_lora_weights")   # PiSSA and others change the model's own weights, too
    pairs = {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        down, up = (tensors.pop(key.replace("lora_A", part), torch.empty(0)).float() for part in ("lora_A", "lora_B"))
        if down.ndim != 2 or up.ndim != 2 or up.shape[1] != len(down) or len(down) != about.get("r", len(down)):
            raise ValueError(f"{key} is not the half of a low-rank matrix")
        up = up * (about["lora_alpha"] / about["r"] if about else 1.0)
        if not (down.isfinite().all() and up.isfinite().all()):
            raise ValueError(f"not all numbers are finite in {key}, or in its other half")
        pairs[key.removesuffix(".lora_A.weight")] = down, up
    if odd or tensors or not pairs:
        raise ValueError(f"it has more than low-rank matrices, or none: {', '.join([*odd, *tensors][:3])}")
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
        layer, offset = state[name + "weight"].float(), state[name + "bias"].float()
        if layer.shape[1] != len(bias):
            raise UserError(f"the aesthetic head {path} takes embeddings of size {layer.shape[1]}, the CLIP model "
                            f"{paths['.']} gives {len(bias)}")
        if offset.shape != layer.shape[:1] or not (layer.isfinite().all() and offset.isfinite().all()):
            raise UserError(f"the aesthetic head {path} has a bias of another size or numbers that are not finite")
        weight, bias = layer @ weight, layer @ bias + offset
    if len(bias) != 1:
        raise UserError(f"the aesthetic head {path} gives {len(bias)} scores for an image, not one")
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
        if not abs(weight) < 1e30:   # so that no sum of rewards, each a float32, leaves float64
            raise UserError(f"the weight of the reward {name!r} must be a finite number below 1e30, not {weight}")
        terms[name] = terms.get(name, 0.0) + weight
    return terms


def absolute_paths(spec):
    """The same rewards with the paths of files and folders absolute: "a.py:f:0.5" -> "/home/me/a.py:f:0.5"."""
    def absolute(match):
        path = match[0].strip()
        return os.path.abspath(path) if os.path.exists(path) or os.path.exists(path + ".py") else path

    return re.sub(r"(?<==)[^,:]+|(?<![^,])[^,=]+(?=\.py:)", absolute, spec)


def working_folder():
    """The folder that relative paths begin at, or "" if it was removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


def set_warnings(filters):
    """Let `warnings.filters` be these, which Python notices only when they are reset."""
    warnings.resetwarnings()
    warnings.filters.extend(filters)


# What a user's code may change for the whole program: (how to ask for it, how to set it).  Random seeds are not here,
# as all that is random in a run has a generator of its own, and a reward may be random.
SHARED = (
    (np.geterr, lambda errors: np.seterr(**errors)),
    (lambda: {name: getattr(sys, name, None) for name in ("stdin", "stdout", "stderr")}, vars(sys).update),
    (lambda: warnings.filters[:], set_warnings),
    (torch.get_default_dtype, torch.set_default_dtype), (torch.get_default_device, torch.set_default_device),
    (torch.is_grad_enabled, torch.set_grad_enabled), (torch.get_num_threads, torch.set_num_threads),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (working_folder, lambda folder: folder and os.chdir(folder)))


@contextmanager
def undisturbed():
    """Undo what a user's code changes for the program that runs it, whatever way it ends: all that is in SHARED."""
    before = [ask() for ask, _ in SHARED]
    try:
        yield
    finally:
        for (ask, put), value in zip(SHARED, before):
            if ask() != value:
                put(value)


def import_function(name):
    """`path/to/file.py:function`: the file is imported once, as a module that finds what lies beside it."""
    file, _, function = name.rpartition(":")
    path = Path(os.path.abspath(regular(file)))
    root = path.parent
    if path.resolve().parent in (HERE / "adapters", HERE / "shapes"):   # others import these by this name
        path, root = path.resolve(), HERE
    if str(root) not in sys.path:
        sys.path.append(str(root))   # last, so that nothing in it takes the place of what the libraries import
    importlib.invalidate_caches()
    module = ".".join(path.relative_to(root).with_suffix("").parts)
    found = importlib.util.find_spec(module) if "." not in path.stem else None
    origin = found and found.origin or ""
    if not (os.path.exists(origin) and os.path.samefile(origin, path)):
        raise ImportError(f"by the name {path.stem!r} Python finds {origin or 'no module'}: rename the file")
    value = getattr(importlib.import_module(module), function)
    if not callable(value):
        raise TypeError(f"{function} is not a function")
    return value


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


class Reward:
    """A weighted sum of named functions as one callable, (images, prompts, metadata) -> float32 [B] on the CPU.

    `name` is its spec without folders; `strict` says whether 1.0 means "all right"; a `judge` that fails is left out.
    """

    def __init__(self, spec, device, judge):
        def short(text):
            return re.sub("[^,=]*/", "", text)   # without folders

        self.name, weights = short(spec), parse_terms(spec)
        loaded = {name: load_function(name, device) for name in weights}
        labels = {name: short(name) if [*map(short, weights)].count(short(name)) == 1 else name for name in weights}
        self.weights = {labels[name]: weight for name, weight in weights.items()}
        self.functions = {labels[name]: function for name, function in loaded.items()}
        self.strict = [*weights.values()] == [1.0] and getattr(*loaded.values(), "strict", False)
        self.judge, self.left_out = judge, False

    def check(self, row):
        """Raise UserError for a row that a term cannot score; returns {"tag": its category} if a term knows it."""
        tag = {}
        for name, function in self.functions.items():
            with blame(f"the reward {name!r} cannot score the prompt '{brief(row['prompt'])}'"), undisturbed():
                getattr(function, "check", lambda *row: None)(row["prompt"], copy.deepcopy(row))
                tag = {"tag": function.category(row["prompt"])} if hasattr(function, "category") else tag
        return tag

    @torch.no_grad()
    def score(self, images, prompts, metadata):
        """Each term by itself, unweighted: dict name -> float32 [B].  Raises UserError."""
        found = {name: torch.zeros(0) for name in self.functions}
        for prompt, fields in zip(prompts, metadata):
            self.check({**fields, "prompt": prompt})
        for name, function in self.functions.items() if images else ():   # one of many processes may own no group
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

    def terms(self, images, prompts, metadata):
        """As `score`, but a judge that fails says so once and gives {} from then on: that is no fault of the run."""
        try:
            return {} if self.left_out else self.score(images, prompts, metadata)
        except UserError as error:
            if not self.judge:
                raise
            self.left_out = True
            print(f"the judge {self.name} is left out: {error}", flush=True)
            return {}

    def total(self, terms):
        """The weighted sum of a dict of terms, of any one shape, in float64."""
        return sum(self.weights[name] * score.double() for name, score in terms.items())

    def scores(self, terms):
        """What the final table shows of the terms: the strict accuracy, the reward, and the terms of a sum: dict."""
        total = self.total(terms)
        strict = {f"{self.name}, strict": (total >= 1).double()} if self.strict else {}
        return {**strict, self.name: total, **(terms if len(terms) > 1 else {})}

    def __call__(self, images, prompts, metadata):
        return self.total(self.score(images, prompts, metadata)).float()


def load_reward(spec, device="cpu", judge=False):
    """Turn a reward's name, or a weighted sum `name:weight,name:weight`, into one Reward; models go to `device`.

    A name is that of a reward, `reward=FOLDER` or `reward=ID` for a reward that is a model, or `file.py:function`.
    Raises UserError at once for what cannot be loaded; when called, for what raises or returns no B finite numbers.
    """
    return Reward(spec, device, judge)


# ------------------------------------------------------------------------------------------------
# The scores' table
# ------------------------------------------------------------------------------------------------


def summarize(scores, rows):
    """Mean and standard error over prompts of scores [N, K], and the mean of each category, the rows' "tag": dict."""
    score, tags = scores.mean(1), [brief(row.get("tag", "all")) for row in rows]                   # [N]
    return {"score": score.mean().item(), "error": score.std(correction=0).item() / max(1, len(score) - 1) ** 0.5,
            "categories": {tag: score[[tag == own for own in tags]].mean().item() for tag in dict.fromkeys(tags)}}


def report(title, before, after, rows):
    """A table of scores before and after training, the first by category, too, and what metrics.jsonl says of it.

    before, after: dicts name -> [N, K], of N rows; alike if nothing was trained yet, which makes one column.  Returns
    (text, dict).  Falls are marked: by more than twice the standard error of the change over the same prompts, and than
    a third of what the prompts differ by.
    """
    titles = ("score", "error") if after is before else ("before", "after", "change", "error")
    lines, numbers = [f"{title:30}" + "".join(f"{title:>10}" for title in titles)], {}
    for name in after:
        now = summarize(after[name], rows)
        parts = [now] if after is before else [
            summarize(before[name], rows), now, summarize(after[name] - before[name], rows)]
        spread = before[name].mean(1).std(correction=0).item()
        fell = len(parts) > 1 and -parts[2]["score"] > max(2 * parts[2]["error"], spread / 3)
        columns = [*(part["score"] for part in parts), parts[-1]["error"]]
        lines.append(f"{name[-30:]:30}" + "".join(f"{number:10.3f}" for number in columns) + "   fell" * fell)
        if numbers:
            numbers[f"judges/{name}"] = now["score"]
            continue
        numbers = {"eval_score": now["score"], "eval_error": now["error"]}
        for tag, score in now["categories"].items() if len(now["categories"]) > 1 else ():
            numbers[f"categories/{tag}"] = score
            lines.append(f"  {tag[:28]:28}" + "".join(f"{part['categories'][tag]:10.3f}" for part in parts))
    return "\n".join(lines), numbers
