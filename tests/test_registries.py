"""A dataset, a segmenter, a generator format and a generator of a package outside the kit, named in parameter files."""

import json
import os
import sys

import nursery
import pytest
import torch
from templates import run_cells
from tiny import tiny_generator

from lagm.core.errors import InputError
from lagm.core.registry import Registry, from_package
from lagm.core.tensors import save_tensors
from lagm.data.registry import DATASETS, open_dataset, read_below
from lagm.experiments.notebooks import experiment_folder
from lagm.experiments.stages import name_problems, read_labelled, split_problems, use_entries
from lagm.generators.formats import FORMATS
from lagm.generators.load import load_generator, read_generator
from lagm.models.saved import load_segmenter, read_networks, save_segmenter
from lagm.models.segmenters import SEGMENTERS, build_segmenter, matched_parameter_names

PACKAGE = '''
"""A package of somebody else."""
import io
import json
from pathlib import Path

import torch
from torch import nn

from lagm.data.base import PartDataset
from lagm.data.registry import DatasetEntry
from lagm.generators.contract import Generated
from lagm.generators.formats import Found, GeneratorFormat, given, on_meta
from lagm.data.label_maps import make_labels
from lagm.models.entries import CLASSES, NetworkEntry
from lagm.generators.stylegan2 import StyleGAN2

LABELS = make_labels("flags", ("left", "right", "stripe"))


class Flags(PartDataset):
    """Flags of two halves and a stripe; nothing of them lies on the disk."""

    def __init__(self, root, split="train", size=(16, 16), k=None):
        first = {"train": 0, "val": 20, "test": 40}[split]
        super().__init__(root, [f"{split}{i}" for i in range(6)], LABELS, size, k=k)
        self.first = first

    def decode(self, index):
        width, height = self.size
        mask = (torch.arange(width) >= width // 2).long().expand(height, -1).clone()
        mask[(self.first + index) % height] = 2
        rng = torch.Generator().manual_seed(self.first + index)
        image = (mask.float() - 1).expand(3, -1, -1) * 0.8 + 0.1 * torch.randn(3, height, width, generator=rng)
        return image.clamp(-1, 1), mask


FLAGS = DatasetEntry("Flags, made when they are asked for.",
                     lambda asked: Flags(asked.data, asked.split, asked.size, asked.k), reads=None, policy="stretch")


class Small(nn.Module):
    """Two convolutions."""

    def __init__(self, n_classes, width=4):
        super().__init__()
        self.n_classes, self.width = n_classes, width
        self.body, self.head = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, n_classes, 1)

    def forward(self, x): return self.head(self.body(x).relu())


SMALL = NetworkEntry(Small, {"n_classes": CLASSES, "width": (1, 64)},
                     lambda net: dict(n_classes=net.n_classes, width=net.width),
                     options=lambda width, levels, backbone: dict(width=width),
                     groups={"head": r"head.*"}, default_group="head")


def unpack(data):
    """The content of a file of ours: FLAGGAN and JSON, then numbers."""
    if bytes(data[:7]) != b"FLAGGAN": return None
    return torch.load(io.BytesIO(bytes(data[7:])), weights_only=True)


def read(content):
    network = on_meta(lambda: StyleGAN2.from_init_kwargs(content["arguments"]))
    return Found("StyleGAN2, a flag file", network, {name: given(t) for name, t in content["weights"].items()})


FORMAT = GeneratorFormat("flag files", lambda content: "arguments" in content, read, unpack)


class Blobs(nn.Module):
    """Latents as the colours of four squares."""
    z_dim, img_resolution = 12, 16

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, z, psi, cutoff, noise_mode, *, rng=None, dtype=torch.float32):
        small = (psi * self.scale * z).view(-1, 3, 2, 2)
        large = nn.functional.interpolate(small, scale_factor=8)
        return Generated(large, [small, large])
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package, on the path of this process and of those it starts."""
    (tmp_path / "flagland").mkdir()
    (tmp_path / "flagland" / "__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))))
    yield tmp_path
    sys.modules.pop("flagland", None)


def flag_file(path):
    """A tiny StyleGAN2 in the package's own format."""
    network = tiny_generator().network
    torch.save({"arguments": network.init_kwargs(), "weights": network.state_dict()}, path)
    path.write_bytes(b"FLAGGAN" + path.read_bytes())
    return path


# ---- the table itself


def test_a_registry_says_what_there_is(package):
    table = Registry("shape", lambda name, found: found if isinstance(found, int) else None)
    assert table.register("square", 4) == 4 and table.get("square") == table.known("square") == 4
    for wrong, message in ((lambda: table.get("sqare"), "did you mean 'square'"),
                           (lambda: table.get("circle"), "there are square"),
                           (lambda: table.get("flagland:LABELS"), "cannot be a shape"),
                           (lambda: table.get("flaglnd:LABELS"), "nor is there a package 'flaglnd'"),
                           (lambda: table.get("flagland:LABEL"), "did you mean LABELS"),
                           (lambda: table.get("../x.py:y"), "not of the form"),
                           (lambda: table.register("square", 5), "already"),
                           (lambda: table.register("five", "5"), "cannot be a shape")):
        with pytest.raises(InputError, match=message): wrong()
    assert [*table] == ["square"] and len(table) == 1 and table.items() == [("square", 4)] and "circle" not in table


def test_a_module_that_fails_is_named(package):
    (package / "broken.py").write_text("raise RuntimeError('no luck')")
    (package / "needy.py").write_text("import no_such_module")
    with pytest.raises(InputError, match="broken cannot be imported .RuntimeError: no luck"): from_package("broken:x")
    with pytest.raises(InputError, match="no_such_module"): DATASETS.get("needy:x")


def test_a_name_in_a_file_imports_nothing(package):
    with pytest.raises(InputError): SEGMENTERS.known("flagland:SMALL")
    assert "flagland" not in sys.modules and "flagland:SMALL" not in SEGMENTERS
    SEGMENTERS.get("flagland:SMALL")
    assert SEGMENTERS.known("flagland:SMALL") and "flagland" in sys.modules


# ---- a dataset


@pytest.mark.parametrize("name", ["flagland:FLAGS", "flagland:Flags"])
def test_a_dataset_of_another_package(package, name):
    images, masks, labels, chosen = read_labelled(name, 2, size=(16, 12))
    assert images.shape == (2, 3, 12, 16) and labels.classes == ("left", "right", "stripe")
    assert chosen == ["train0", "train1"]
    assert split_problems("annotate", dict(dataset=name, k=2)) == []
    assert split_problems("annotate", dict(dataset=name, k=9)) == ["Flags has 6 items here; k is 9, give 1 to 6"]
    assert read_below([name]) == ([] if name.endswith("FLAGS") else [""])


def test_no_dataset(package):
    with pytest.raises(InputError, match="cannot be a dataset"): open_dataset("flagland:SMALL")
    with pytest.raises(InputError, match="did you mean 'folder'"): open_dataset("folders")


# ---- a segmenter


def test_a_segmenter_of_another_package(package, tmp_path):
    network = build_segmenter("flagland:SMALL", 3, width=6)
    assert matched_parameter_names(network) == ["head.weight", "head.bias"]
    assert "body.weight" in matched_parameter_names(network, "all")
    save_segmenter(tmp_path / "s.safetensors", network)
    again, header = load_segmenter(tmp_path / "s.safetensors")
    assert header["network"] == {"name": "flagland:SMALL", "n_classes": 3, "width": 6}
    assert all(a.equal(b) for a, b in zip(again.state_dict().values(), network.state_dict().values()))
    SEGMENTERS._outside.clear()
    with pytest.raises(InputError, match="of another package"): read_networks(tmp_path / "s.safetensors")


def test_a_file_may_not_ask_for_more_than_the_entry_allows(package, tmp_path):
    network = build_segmenter("flagland:SMALL", 3)
    for change, message in (({"width": 65}, "impossible size"), ({"depth": 2}, "which no file may")):
        about = {"name": "flagland:SMALL", "n_classes": 3, **change}
        header = {"kind": "segmenter", "format_version": 1, "network": about}
        save_tensors(tmp_path / "s.safetensors", network.state_dict(), header)
        with pytest.raises(InputError, match=message): read_networks(tmp_path / "s.safetensors")


# ---- generators


def test_a_format_of_another_package(package):
    path = flag_file(package / "g.flag")
    with pytest.raises(InputError, match="no checkpoint of a kind that is known"): load_generator(path)
    use_entries(["flagland:FORMAT"])
    network, header = read_generator(path)
    assert header["provenance"]["format"] == "StyleGAN2, a flag file" and "flagland:FORMAT" not in [*FORMATS]
    assert load_generator(path)(torch.randn(2, 8)).image.shape == (2, 3, 16, 16)
    pairs = zip(network.state_dict().values(), tiny_generator().network.state_dict().values())
    assert all(a.equal(b) for a, b in pairs)


def test_a_generator_of_another_package(package):
    generator = load_generator("flagland:Blobs")
    assert generator.feature_channels == [3, 3] and generator(generator.sample_z(2)).image.shape == (2, 3, 16, 16)
    for name, message in (("flagland:Flags", "called without arguments"), ("flagland:LABELS", "was given a LabelSet"),
                          ("flagland:Blob", "did you mean Blobs")):
        with pytest.raises(InputError, match=message): load_generator(name)


def test_names_are_checked_before_a_run_starts(package):
    good = dict(uses=["flagland:FORMAT", "flagland:SMALL", "flagland:Flags"], segmenter="flagland:Small")
    assert name_problems(good) == []
    (line,) = name_problems(dict(uses=["flagland:LABELS"]))
    assert line.startswith("uses: flagland:LABELS is there, but cannot be a generator format")
    assert "did you mean 'unet'" in name_problems(dict(segmenter="unnet"))[0]


# ---- all of it, by name in parameter files


def lagm(*words, cwd):
    main = "from lagm.cli import main; raise SystemExit(main())"
    done = nursery.run([sys.executable, "-c", main, *words], cwd=cwd)
    return done.returncode, done.stdout + done.stderr


def test_annotate_and_evaluate_with_another_package(package):
    flag_file(package / "g.flag")
    common = {"dataset": "flagland:FLAGS", "size": [16, 16]}
    annotate = common | {"k": 2, "generator": "g.flag", "uses": ["flagland:FORMAT"], "segmenter": "flagland:SMALL",
                         "width": 4, "channels": 4, "validation_pictures": 2, "iterations": 2, "warm_up": 1,
                         "finish": False}
    evaluate = common | {"networks": "outputs/annotate/results.safetensors", "uses": ["flagland:SMALL"], "pictures": 3,
                         "draws": 20}
    for name, values in (("annotate", annotate), ("evaluate", evaluate)):
        (package / f"{name}.json").write_text(json.dumps(values))  # JSON is YAML, too
        code, said = lagm("run", name, "-f", f"{name}.json", cwd=package)
        assert code == 0, said
    record = json.loads((package / "outputs" / "evaluate" / "metrics.json").read_text())
    assert record["classes"] == ["left", "right", "stripe"] and 0 <= record["metrics"]["segmenter"]["fg_miou"] <= 1
    made = json.loads((package / "outputs" / "annotate" / "metrics.json").read_text())
    assert made["generator"]["format"] == "StyleGAN2, a flag file"


def test_annotate_with_a_generator_class(package):
    values = dict(dataset="flagland:Flags", k=2, size=[16, 16], generator="flagland:Blobs", segmenter="flagland:Small",
                  channels=4, iterations=1, warm_up=1, finish=False, validation="", out_dir=str(package / "out"))
    run_cells(experiment_folder() / "annotate.ipynb", values)
    assert read_networks(package / "out" / "results.safetensors").networks["segmenter"]["name"] == "flagland:Small"
    SEGMENTERS._outside.clear()
    values = dict(dataset="flagland:Flags", size=[16, 16], networks=str(package / "out" / "results.safetensors"),
                  out_dir=str(package / "evaluate"))
    with pytest.raises(InputError, match="of another package"):
        run_cells(experiment_folder() / "evaluate.ipynb", values)
