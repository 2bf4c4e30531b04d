"""Files built like the released checkpoints: the same instructions and imports, with weights of our choosing.

The classes that real files import do not exist here; stand-ins with their names take their place while a file is
written.
"""

import argparse
import contextlib
import copy
import json
import math
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import nn

BUFFERS = ("w_avg", "noise_const", "resample_filter", "transform", "freqs", "phases", "magnitude_ema", "up_filter",
           "down_filter")
SOURCE = "import pathlib\npathlib.Path({path!r}).write_text('executed')\nclass Generator: pass\n"


class EasyDict(dict):
    """A dict, as NVIDIA's programs use it."""

    def __getattr__(self, name):
        try: return self[name]
        except KeyError: raise AttributeError(name) from None


class Network:
    """A TensorFlow network: its state is a dict."""

    def __init__(self, **state): self._state = state
    def __getstate__(self): return self._state
    def __setstate__(self, state): self._state = state


def _reconstruct_persistent_obj(meta): raise AssertionError("a stand-in is never called")
def _reconstruct(*claims): raise AssertionError("a stand-in is never called")


def _scalar(*claims): raise AssertionError("a stand-in is never called")


@contextlib.contextmanager
def stand_ins(classes: dict):
    """Modules of these names, holding these objects, for as long as a file is written."""
    saved = {}
    for dotted, thing in classes.items():
        module, _, name = dotted.rpartition(".")
        for i in range(module.count(".") + 1):
            part = ".".join(module.split(".")[: i + 1])
            if part not in saved and (part not in sys.modules or part == module):
                saved[part] = sys.modules.get(part)
                sys.modules[part] = types.ModuleType(part)
        setattr(sys.modules[module], name, thing)
        thing.__module__, thing.__qualname__ = module, name
    try: yield
    finally:
        for part, module in saved.items():
            if module is None: del sys.modules[part]
            else: sys.modules[part] = module


class Persistent(nn.Module):
    """A module that pickles as NVIDIA's persistence does: source text, class name, attributes."""

    def __init__(self, class_name: str, source: str):
        super().__init__()
        self.__dict__["_meta"] = (class_name, source)

    def __reduce__(self):
        state = {k: v for k, v in self.__dict__.items() if k != "_meta"}
        meta = dict(type="class", version=6, module_src=self._meta[1], class_name=self._meta[0], state=state)
        return _reconstruct_persistent_obj, (meta,), None, None, None


def persistent_module(state: dict, class_name: str, source: str, **attributes) -> Persistent:
    """A tree of modules with the tensors of a state dict."""
    root = Persistent(class_name, source)
    for name, tensor in state.items():
        node = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in node._modules:
                node.add_module(part, Persistent("SynthesisBlock" if part.startswith("b") else "Layer", source))
            node = node._modules[part]
        if leaf in BUFFERS or not tensor.is_floating_point(): node.register_buffer(leaf, tensor.clone())
        else: node.register_parameter(leaf, nn.Parameter(tensor.clone(), requires_grad=False))
    root.__dict__.update(attributes)
    return root


class OldNumpyPickler(pickle.Pickler):
    """Writes arrays and scalars as numpy 1 did."""

    def reducer_override(self, thing):
        if isinstance(thing, np.ndarray): return _reconstruct, (np.ndarray, (0,), b"b"), thing.__reduce__()[2]
        if isinstance(thing, np.generic): return _scalar, (thing.dtype, thing.tobytes())
        return NotImplemented


def dump(value, path: Path, protocol: int, old_numpy: bool = True) -> Path:
    """Pickle `value`, with the stand-ins in place."""
    names = {"dnnlib.util.EasyDict": EasyDict,
             "torch_utils.persistence._reconstruct_persistent_obj": _reconstruct_persistent_obj,
             "dnnlib.tflib.network.Network": Network}
    if old_numpy: names |= {"numpy.core.multiarray._reconstruct": _reconstruct, "numpy.core.multiarray.scalar": _scalar}
    _scalar.__name__ = "scalar"
    with stand_ins(names), open(path, "wb") as file:
        (OldNumpyPickler if old_numpy else pickle.Pickler)(file, protocol).dump(value)
    return path


def nvidia_pytorch(path: Path, network: nn.Module, protocol: int = 4, executed: str = "executed.txt",
                   positional: bool = False, kwargs: dict | None = None, class_name: str = "Generator") -> Path:
    """A StyleGAN2-ADA pickle: G, D, G_ema, training_set_kwargs, augment_pipe."""
    kwargs, source, state = kwargs or network.init_kwargs(), SOURCE.format(path=executed), network.state_dict()
    names = ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels")
    arguments = (tuple(kwargs[n] for n in names) if positional else (),
                 EasyDict({k: EasyDict(v) if isinstance(v, dict) else v for k, v in kwargs.items()
                           if not (positional and k in names)}))
    G, G_ema = (persistent_module({k: v * factor for k, v in state.items()}, class_name, source,
                                  _init_args=arguments[0], _init_kwargs=arguments[1], z_dim=kwargs["z_dim"])
                for factor in (0, 1))
    D = persistent_module({"b4.conv.weight": torch.randn(4, 4, 3, 3)}, "Discriminator", source, _init_args=(),
                          _init_kwargs={})
    pipe = persistent_module({"p": torch.tensor(np.float32(0.3))}, "AugmentPipe", source, _init_args=(),
                             _init_kwargs={"xflip": np.float64(1.0)})
    return dump(dict(G=G, D=D, G_ema=G_ema,
                     training_set_kwargs=EasyDict(class_name="training.dataset.ImageFolderDataset", resolution=16),
                     augment_pipe=pipe), path, protocol)


def nvidia_later(path: Path, network: nn.Module, protocol: int = 4, said: dict | None = None, **options) -> Path:
    """A StyleGAN2 that StyleGAN3's program wrote: the arguments of the synthesis network stand beside the others.

    `said` replaces the network's; None leaves the usual clamp unsaid.
    """
    kwargs = network.init_kwargs()
    synthesis = kwargs.pop("synthesis_kwargs") | {"num_fp16_res": 4, "fused_modconv_default": "inference_only"}
    if synthesis["conv_clamp"] == 256: del synthesis["conv_clamp"]
    return nvidia_pytorch(path, network, protocol, kwargs=kwargs | synthesis if said is None else kwargs | said,
                          **options)


def nvidia_tensorflow(path: Path, variables: dict[str, np.ndarray], static: dict, protocol: int = 4, version: int = 4,
                      old_numpy: bool = True, executed: str = "executed.txt") -> Path:
    """A StyleGAN2 pickle: (G, D, Gs), each with its components."""
    def network(name: str, own: list, components: dict, arguments: dict) -> Network:
        return Network(version=version, name=name, static_kwargs=EasyDict(arguments), components=EasyDict(components),
                       build_module_src=SOURCE.format(path=executed),
                       build_func_name="G_main", variables=own)

    parts = {part: network(part, [(name.partition("/")[2], value) for name, value in variables.items()
                                  if name.startswith(part + "/")], {}, {}) for part in ("mapping", "synthesis")}
    Gs = network("Gs", [(name, value) for name, value in variables.items() if "/" not in name], parts, static)
    G = network("G", [("lod", np.float32(0) * np.ones(()))], {}, static)
    return dump((G, network("D", [], {}, {}), Gs), path, protocol, old_numpy)


def rosinality_state(network) -> dict:
    """A StyleGAN2 of ours under rosinality's names and with its scales."""
    ours, theirs = network.state_dict(), OrderedDict()
    for i in range(network.mapping.layers):
        theirs |= {f"style.{i + 1}.{leaf}": ours[f"mapping.fc{i}.{leaf}"] for leaf in ("weight", "bias")}
    theirs["input.input"] = ours["synthesis.b4.const"][None]
    layers = [("conv1", "synthesis.b4.conv1"), ("to_rgb1", "synthesis.b4.torgb")]
    for i, r in enumerate(network.synthesis.resolutions[1:]):
        layers += [(f"convs.{2 * i + j}", f"synthesis.b{r}.conv{j}")
                   for j in (0, 1)] + [(f"to_rgbs.{i}", f"synthesis.b{r}.torgb")]
    noises = 0
    for name, own in layers:
        weight, rgb = ours[f"{own}.weight"], "rgb" in name
        theirs[f"{name}.conv.weight"] = (weight if rgb else weight * math.sqrt(weight[0].numel()))[None]
        for leaf in ("weight", "bias"): theirs[f"{name}.conv.modulation.{leaf}"] = ours[f"{own}.affine.{leaf}"]
        theirs[f"{name}.bias" if rgb else f"{name}.activate.bias"] = (ours[f"{own}.bias"][None, :, None, None] if rgb
                                                                      else ours[f"{own}.bias"])
        if own.endswith("conv0"): theirs[f"{name}.conv.blur.kernel"] = ours[f"{own}.resample_filter"] * 4
        if rgb and name != "to_rgb1": theirs[f"{name}.upsample.kernel"] = ours[f"{own[:-6]}.resample_filter"] * 4
        if not rgb:
            theirs |= {f"{name}.noise.weight": ours[f"{own}.noise_strength"][None],
                       f"noises.noise_{noises}": ours[f"{own}.noise_const"][None, None]}
            noises += 1
    return theirs


def rosinality(path: Path, network, mean: bool = True, zipped: bool = True, optimizer: bool = True) -> Path:
    """A checkpoint of rosinality's training."""
    state = rosinality_state(network)
    content = {"g": state, "d": {"convs.0.0.weight": torch.zeros(2, 3, 1, 1)}, "g_ema": state}
    if optimizer:
        content |= {"g_optim": {"state": {0: {"step": 3, "exp_avg": torch.zeros(3)}},
                                "param_groups": [{"lr": 0.002, "betas": (0.0, 0.99), "params": [0]}]},
                    "args": argparse.Namespace(size=16, n_mlp=2, path="data")}
    if mean: content["latent_avg"] = network.mapping.w_avg
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def nvidia_stylegan3(path: Path, network: nn.Module, protocol: int = 4, **options) -> Path:
    """A StyleGAN3 pickle: arguments of the synthesis network stand beside the others, and what is usual is unsaid."""
    kwargs, usual = network.init_kwargs(), type(network)(network.img_resolution).init_kwargs()
    kept = ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels", "mapping_kwargs")
    kwargs = {name: value for name, value in kwargs.items() if name in kept or value != usual[name]}
    return nvidia_pytorch(path, network, protocol, kwargs=kwargs | {"num_fp16_res": 4, "magnitude_ema_beta": 0.9995},
                          **options)


def lucidrains(folder: Path, state: dict, lr_mlp: float = 0.1, number: int = 7) -> Path:
    """What lucidrains' trainer leaves in the folder of a run; `state` has the running averages, SE and GE."""
    plain = {{"SE": "S", "GE": "G"}[name.partition(".")[0]] + name[2:]: tensor * 2 for name, tensor in state.items()}
    others = {"D.blocks.0.conv_res.weight": torch.zeros(4, 3, 1, 1), "D.to_logit.bias": torch.zeros(1)}
    torch.save({"GAN": plain | others | state, "version": "1.9.0"}, folder / f"model_{number}.pt")
    if lr_mlp != 0.1: (folder / ".config.json").write_text(json.dumps({"image_size": 16, "lr_mlp": lr_mlp}))
    return folder / f"model_{number}.pt"


def snapshot(path: Path, annotator: nn.Module, segmenter: nn.Module, protocol: int = 4, **annotator_kwargs) -> Path:
    """The authors' network-snapshot: the outer objects persistent, PyTorch's layers inside as themselves."""
    def wrapped(module: nn.Module, class_name: str, **kwargs) -> Persistent:
        outer = Persistent(class_name, "raise SystemExit('executed')")
        for key in ("_parameters", "_buffers", "_modules", "training"):
            outer.__dict__[key] = copy.copy(module.__dict__[key])
        for name, child in list(outer._modules.items()):
            if type(child).__module__.startswith("lagm"): outer._modules[name] = wrapped(child, type(child).__name__)
        outer.__dict__.update(_init_args=(), _init_kwargs=EasyDict(kwargs))
        return outer

    names = {"UNet": "UNet", "DeepLabV3": "DeepLabv3"}
    return dump(dict(training_set_kwargs=EasyDict(path="data", resolution=64),
                     A=wrapped(annotator, "FPNLabelBranch", **annotator_kwargs),
                     S=wrapped(segmenter, names[type(segmenter).__name__])), path, protocol)
