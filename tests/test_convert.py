"""Every format turns into our file with the same arithmetic, and tells what it is."""

import json

import official_files as official
import pytest
import torch
from test_checkpoints import same_pictures, tiny, tiny1

import lagm.models.convert as module
from lagm.cli import main
from lagm.core.errors import InputError
from lagm.core.tensors import load_tensors
from lagm.generators.weights import save_generator
from lagm.models.annotator import FPNAnnotator
from lagm.models.convert import convert, inspect
from lagm.models.results import load_results
from lagm.models.segmenters import UNet


@pytest.mark.parametrize("kind", ["nvidia", "rosinality", "datasetgan", "ours"])
def test_a_converted_generator_draws_the_same_pictures(kind, tmp_path):
    network, source = tiny1() if kind == "datasetgan" else tiny(conv_clamp=None), tmp_path / "source"
    if kind == "nvidia": official.nvidia_pytorch(source, network, executed=str(tmp_path / "executed"))
    elif kind == "ours":
        save_generator(tmp_path / "s.safetensors", network)
        source = tmp_path / "s.safetensors"
    elif kind == "datasetgan": torch.save(network.state_dict(), source)
    else: official.rosinality(source, network)
    header = convert(source, tmp_path / "g.safetensors")
    if kind != "rosinality": same_pictures(tmp_path / "g.safetensors", network)  # its kernels are scaled twice
    assert (header["provenance"]["converted_from"]["sha256"] == module.checksum(source)
            and not (tmp_path / "executed").exists())
    assert load_tensors(tmp_path / "g.safetensors")[1] == json.loads(json.dumps(header))
    before, after = inspect(source), inspect(tmp_path / "g.safetensors")
    assert (before["generator"] == after["generator"]
            and before["format"].split(",")[0] in (after["format"].split(",")[0], "lagm safetensors"))
    assert (after["generator"]["parameters"] == sum(p.numel() for p in network.parameters())
            and len(after["generator"]["feature_maps"]) == len(network.feature_shapes))


def test_half_precision_halves_the_file(tmp_path):
    save_generator(tmp_path / "s.safetensors", tiny(w_dim=64, z_dim=64))
    convert(tmp_path / "s.safetensors", tmp_path / "h.safetensors", half=True)
    sizes = [sum(t.nbytes for t in load_tensors(tmp_path / f"{name}.safetensors")[0].values()) for name in "sh"]
    assert sizes[1] * 2 == sizes[0]


def test_results_convert_too(tmp_path):
    annotator, segmenter = (FPNAnnotator([8, 4], 5, channels=6, use_factor=True).eval(),
                            UNet(5, width=4, levels=2).eval())
    source = official.snapshot(tmp_path / "network-snapshot.pkl", annotator, segmenter, use_factor=True)
    convert(source, tmp_path / "r.safetensors")
    found, picture, features = (load_results(tmp_path / "r.safetensors", n_classes=5), torch.randn(1, 3, 16, 16),
                                [torch.randn(1, 8, 4, 4), torch.randn(1, 4, 8, 8)])
    with torch.no_grad():
        assert (torch.equal(found.segmenter(picture), segmenter(picture))
                and torch.equal(found.annotator(features), annotator(features)))
    assert inspect(tmp_path / "r.safetensors")["annotator"]["use_factor"] is True
    with pytest.raises(InputError, match="for 5 classes"): load_results(tmp_path / "r.safetensors", n_classes=3)


def test_what_does_not_come_back_is_not_kept(tmp_path, monkeypatch):
    save_generator(tmp_path / "s.safetensors", tiny())
    (tmp_path / "t.safetensors").write_text("older")
    real = module.save_tensors
    monkeypatch.setattr(module, "save_tensors",
                        lambda path, tensors, header: real(path, {k: t + 1 if k == "mapping.w_avg" else t
                                                                  for k, t in tensors.items()}, header))
    with pytest.raises(InputError, match="did not come back"):
        convert(tmp_path / "s.safetensors", tmp_path / "t.safetensors")
    assert (tmp_path / "t.safetensors").read_text() == "older" and len(list(tmp_path.iterdir())) == 2


def test_the_command_line(tmp_path, capsys):
    torch.save(tiny1().state_dict(), tmp_path / "g.pt")
    assert main(["inspect", str(tmp_path / "g.pt")]) == 0
    told = capsys.readouterr().out
    for word in ("StyleGAN1", "resolution     16", "8 × 16 × 16", "licence", "sha256"): assert word in told
    assert main(["inspect", str(tmp_path / "g.pt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["generator"]["z_dim"] == 8
    target = str(tmp_path / "g.safetensors")
    assert main(["convert", str(tmp_path / "g.pt"), target]) == 0 and "checked bit by bit" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "g.pt"), target]) == 2 and "--force" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "g.pt"), target, "--half", "--force"]) == 0
    assert main(["convert", str(tmp_path / "g.pt"), str(tmp_path / "x.pt")]) == 2
    (tmp_path / "page.pkl").write_text("<html>")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "page.pkl")]) == 2
    error = capsys.readouterr().err
    assert "page.pkl is a web page" in error and error.count("\n") == 1
