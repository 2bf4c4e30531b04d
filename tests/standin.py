"""A project folder with everything the paper's experiments read, small: the official layouts and file formats, random
content.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from official_files import nvidia_pytorch, nvidia_tensorflow
from torch import nn
from torchvision.models import resnet101
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from lagm.data.cgpart import CGPART_MODELS
from lagm.data.prepare_pascal import prepare_pascal
from lagm.download.sources import CHECKPOINTS
from lagm.generators.stylegan1 import StyleGAN1
from lagm.generators.stylegan2 import StyleGAN2

GOLDEN = Path(__file__).parent / "golden"


def make_data(data: Path) -> None:
    """The stand-ins of the datasets, with as many pictures as the protocols need at least."""
    shutil.copytree(GOLDEN / "datasets" / "data", data)
    tests = data / "DatasetGAN" / "annotation" / "testing_data"
    for folder in tests.iterdir():  # five folds need five pictures
        for old, new in ((0, 20), (3, 21), (11, 22)):
            shutil.copyfile(folder / f"image_{old}.png", folder / f"image_{new}.png")
            shutil.copyfile(folder / f"image_mask{old}.npy", folder / f"image_mask{new}.npy")
    for kind in ("suv", "wagon"):  # golden: minivan and sedan
        for below in ("image", "seg"):
            cars = data / "CGPart_render" / "car" / below
            shutil.copytree(cars / CGPART_MODELS["car"]["minivan"], cars / CGPART_MODELS["car"][kind])
    prepare_pascal(data / "VOC2010", ("horse", "aeroplane"), data / "PascalPart", minpx=5, workers=1, progress=False)
    for name in ("horse", "aeroplane"):
        train = data / "PascalPart" / name / "train"
        names = sorted(path.stem for path in (train / "CroppedSegmentation").glob("*.png"))
        for split in ("train", "val"):
            (train / f"{split}_set.txt").write_text("".join(f"{crop}\n" for crop in names * 2))


def make_checkpoints(root: Path) -> None:
    """Generators as NVIDIA's and DatasetGAN's programs write them, of 32 and 64 pixels, in the places where they
    belong.
    """
    torch.manual_seed(0)
    second = StyleGAN2(64, z_dim=16, w_dim=16, mapping_layers=2, channel_base=256, channel_max=16)
    first = StyleGAN1(64, 16, 16, 2, 256, 16).state_dict()
    mean = first.pop("truncation.avg_latent")
    stored = np.load(GOLDEN / "stylegan2_tf_variables.npz", allow_pickle=False)
    variables, static = ({name.removeprefix("var:"): stored[name] for name in stored if name.startswith("var:")},
                         json.loads(str(stored["static_kwargs"])))
    for source in CHECKPOINTS:
        path = root / source.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if source.name in ("stylegan2-horse", "stylegan2-car", "stylegan2-aeroplane"):
            nvidia_tensorflow(path, variables, static)
        elif source.name.startswith("stylegan2"): nvidia_pytorch(path, second)
        elif source.name.startswith("stylegan-"): torch.save(first, path)
        elif source.kind == "npy": np.save(path, mean.numpy())
        else: torch.save(resnet101().state_dict(), path)


class ThinDeepLab(nn.Module):
    """DeepLabV3 with its real head on a thin backbone: the names that matter, a hundredth of the weights."""

    def __init__(self, n_classes: int):
        super().__init__()
        self.backbone = nn.Sequential()
        self.backbone.add_module("layer4", nn.Sequential(nn.Conv2d(3, 32, 7, 8, 3), nn.BatchNorm2d(32), nn.ReLU()))
        self.classifier = DeepLabHead(32, n_classes)

    def forward(self, x):
        return {"out": nn.functional.interpolate(self.classifier(self.backbone(x)), x.shape[-2:], mode="bilinear",
                                                 align_corners=False)}
