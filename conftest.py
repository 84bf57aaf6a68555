"""Small random models for every reward that is a model, of the real classes and saved in the real format."""

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers.models.mask2former import modeling_mask2former


def save_random(model, folder):
    """Save a model with larger weights than it was drawn with, as all images look alike to such a one."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 10
    model.save_pretrained(folder)


def save_clip(folder, number):
    """A random CLIP of the real classes with its processor: 32x32 images, 16 tokens.  Returns the folder."""
    torch.manual_seed(number)
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(__file__).parent / "shapes/model/tokenizer")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 16,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    save_random(transformers.CLIPModel(config), folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A random CLIP: `clipscore=FOLDER` and `pickscore=FOLDER`."""
    return save_clip(tmp_path_factory.mktemp("clip"), 51)


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def judges(clip_folder, geneval_folder, ocr_folder, vlm_folder, tmp_path_factory):
    """Every reward that is a model, with the folder of a small one."""
    aesthetic = shutil.copytree(clip_folder, tmp_path_factory.mktemp("judges") / "aesthetic")
    save_file({"layers.0.weight": torch.linspace(-1, 1, 12)[None], "layers.0.bias": torch.zeros(1)},
              aesthetic / "aesthetic-model.safetensors")
    return {"geneval": geneval_folder, "geneval_accuracy": geneval_folder, "pickscore": clip_folder,
            "clipscore": clip_folder, "aesthetic": aesthetic, "ocr": ocr_folder, "vlm": vlm_folder}
