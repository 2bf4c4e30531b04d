"""Modules of anybody as generators: what is found, what is refused, and what a file may say."""

import copy
import json
import pickle
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import nursery
import pytest
import torch
from torch import nn

from lagm.core.errors import InputError
from lagm.data.demo import Avatars, stack
from lagm.experiments.catalogue import missing_inputs
from lagm.experiments.project import Settings, named_generator, project_generator, settings_text
from lagm.generators.adapt import LayerMap, adapt, proposed, value_range
from lagm.generators.contract import FrozenGenerator, Sampling
from lagm.generators.load import is_outside, load_generator
from lagm.generators.modules import described_generator, module_generator, read_weights, save_adapted
from lagm.generators.protocol import Generator, check_generator
from lagm.models.annotator import FPNAnnotator
from lagm.models.convert import inspect
from lagm.models.segmenters import UNet
from lagm.training.checkpoints import generator_digest
from lagm.training.datasetgan import draw_to_label
from lagm.training.lagm import train_finish, train_lagm
from lagm.training.recipe import get_recipe
from lagm.training.shards import generate
from lagm.training.synthetic import Plan
from lagm.training.teachers import train_self_training

SEVERAL = """
import torch


class Generator(torch.nn.Module):
    z_dim, n_classes = 4, 3

    def __init__(self):
        super().__init__()
        self.names, self.wide = torch.nn.Embedding(3, 4), torch.nn.Linear(4, 128)
        self.rest = torch.nn.Sequential(torch.nn.ConvTranspose2d(8, 8, 4, 2, 1), torch.nn.ReLU(),
                                        torch.nn.ConvTranspose2d(8, 3, 4, 2, 1), torch.nn.Tanh())

    def forward(self, z, labels): return self.rest(self.wide(z + self.names(labels)).reshape(-1, 8, 4, 4))
"""
FAST = get_recipe("fast", steps=1, warm_segmenter=1, warm_annotator=1, batch_labelled=2, batch_synthetic=2)


class DCGAN(nn.Module):
    """Latents (B, z, 1, 1) to pictures of 16 pixels; `last` is the last layer."""

    def __init__(self, z=6, width=8, colours=3, last="tanh"):
        super().__init__()
        self.last = {"tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(), "none": nn.Identity()}[last]
        self.main = nn.Sequential(
            nn.ConvTranspose2d(z, 2 * width, 4), nn.BatchNorm2d(2 * width), nn.ReLU(True),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ReLU(True),
            nn.ConvTranspose2d(width, colours, 4, 2, 1))

    def forward(self, z): return self.last(self.main(z))


class Own:
    """A generator by hand; `after` is done to what it draws."""
    feature_channels, feature_sizes = [4, 4], [8, 16]

    def __init__(self, after=lambda image, maps, rng: (image, maps), network=None):
        self.after, self.network = after, network

    def sample_z(self, n, rng=None): return torch.randn(n, 4, generator=rng)

    def __call__(self, z, rng=None):
        maps = [z[:, :, None, None].expand(-1, 4, size, size) * 0.3 for size in (8, 16)]
        if self.network is not None: maps[1] = self.network(maps[1])
        return self.after(maps[1][:, :3].tanh(), maps, rng)


def module(**options):
    torch.manual_seed(0)
    return DCGAN(**options)


def labelled(n=2, size=16):
    images, masks = stack(Avatars("big-ears", "train"), range(n))
    step = 64 // size
    return images[:, :, ::step, ::step].contiguous(), masks[:, ::step, ::step].contiguous()


def train(generator, images=None, recipe=FAST):
    own, masks = labelled()
    networks = FPNAnnotator([4, 4], 8, channels=4), UNet(8, width=4, levels=2)
    return train_lagm(generator, *networks, own if images is None else images, masks, recipe, progress=False)


class Autoencoder(nn.Module):
    """Pictures to pictures; `decode` draws."""

    def __init__(self):
        super().__init__()
        self.read, self.draw = nn.Conv2d(3, 5, 16), DCGAN()

    def forward(self, pictures): return self.decode(self.read(pictures))
    def decode(self, z): return self.draw(z)


class TestAdapt:
    def test_what_is_found(self):
        generator = adapt(module(last="sigmoid"))
        assert isinstance(generator, FrozenGenerator) and isinstance(generator, Generator)
        assert generator.network.taps == ["main.2", "main.5"] and generator.z_dim == 6
        assert generator.feature_channels == [16, 8, 11] and generator.feature_sizes == [4, 8, 16]
        image = generator(generator.sample_z(8, torch.Generator().manual_seed(0))).image
        assert image.min() < 0 < image.max() and image.abs().max() <= 1
        check_generator(generator)

    def test_pictures_and_maps_are_those_of_the_module(self):
        own = module().eval()
        generator, z = adapt(own), torch.randn(3, 6)
        made, maps = generator(z), {}
        with torch.no_grad():
            own.main[2].register_forward_hook(lambda layer, given, value: maps.update(coarse=value.clone()))
            expected = own(z[:, :, None, None])
        assert torch.equal(made.image, expected) and torch.equal(made.features[0], maps["coarse"])

    def test_the_module_stays_as_it_is(self):
        own = module()
        before = {name: value.clone() for name, value in own.state_dict().items()}
        generator = adapt(own)
        generator(torch.randn(4, 6))
        assert own.training and all(p.requires_grad for p in own.parameters())
        assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
        assert not generator.network.module.training and not own.main[0]._forward_hooks
        with torch.no_grad(): own.main[0].weight.zero_()
        assert generator.network.module.main[0].weight.any()

    def test_an_inplace_layer_behind_a_tapped_one(self):
        generator = adapt(module(), layers=["main.1"])
        assert generator(torch.randn(4, 6)).features[0].min() < 0, "the ReLU worked on what was kept"

    @pytest.mark.parametrize("last, values", [("tanh", (-1, 1)), ("sigmoid", (0, 1))])
    def test_ranges(self, last, values):
        assert adapt(module(last=last)).network.values == values

    def test_range_of_bytes_grey_and_unclear(self):
        assert value_range(torch.randint(0, 256, (2, 3, 4, 4)).byte()) == (0, 255)
        generator = adapt(module(colours=1))
        assert generator(torch.randn(2, 6)).image.shape == (2, 3, 16, 16)
        with pytest.raises(InputError, match=r"values=\(low, high\)"): value_range(torch.tensor([-2.5, 2.6]))
        with pytest.raises(InputError, match="two numbers"): adapt(module(), values=[1, 0])

    def test_whole_numbers_are_told(self):
        class Bytes(DCGAN):
            def forward(self, z): return ((super().forward(z) + 1) * 127.5).byte()

        with pytest.raises(InputError, match="gives pictures of torch.uint8: wrap it"): adapt(Bytes())

    def test_own_noise_comes_from_rng(self):
        class Noisy(DCGAN):
            def forward(self, z): return super().forward(z) + 0.3 * torch.randn(3, 16, 16)

        generator, z = adapt(Noisy()), torch.randn(2, 6)
        draw = lambda seed: generator(z, torch.Generator().manual_seed(seed)).image
        state = torch.get_rng_state()
        assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
        assert torch.equal(torch.get_rng_state(), state)
        check_generator(generator)

    def test_noise_that_is_not_torchs(self):
        class Loud(DCGAN):
            def __init__(self, picture):
                super().__init__()
                self.picture = picture

            def forward(self, z): return self.picture(super().forward(z)) * random.random()

        random.seed(0)
        torch.manual_seed(0)
        for picture in (nn.Identity(), lambda image: 0.01 * image, lambda image: 0.01 * image.abs()):  # pale ones, too
            with pytest.raises(InputError, match="its noise is not torch's"): adapt(Loud(picture))

    def test_batch_norm_without_statistics_is_said(self):
        own = module()
        for layer in own.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean = layer.running_var = None
                layer.track_running_stats = False
        with pytest.warns(UserWarning, match="depends on the others of its batch"): adapt(own)

    def test_classes(self):
        class Named(DCGAN):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(3, 6)
            def forward(self, z, c): return super().forward(z + self.table(c)[:, :, None, None])

        class OneHot(Named):
            def forward(self, z, c): return DCGAN.forward(self, z + (c @ self.table.weight)[:, :, None, None])

        class Rows(DCGAN):
            def __init__(self):
                super().__init__()
                self.table = nn.Parameter(torch.randn(3, 6))
            def forward(self, z, c): return super().forward(z + (c @ self.table)[:, :, None, None])

        torch.manual_seed(0)
        named, one_hot = Named(), OneHot()
        one_hot.load_state_dict(named.state_dict())
        z = torch.randn(2, 6)
        pictures = [adapt(named, label=label)(z).image for label in (0, 2)]
        assert not torch.equal(*pictures)
        assert torch.allclose(adapt(one_hot, label=2, classes=3)(z).image, pictures[1], atol=1e-6)
        assert torch.allclose(adapt(one_hot, label=[0.0, 0.0, 1.0])(z).image, pictures[1], atol=1e-6)
        with pytest.raises(InputError, match="asks for more than latents.*give label="): adapt(named)
        with pytest.raises(InputError, match="from 0 to 2"): adapt(one_hot, label=3, classes=3)
        for number in (np.int64(2), torch.tensor(2)): assert adapt(named, label=number)(z).image.equal(pictures[1])
        for wrong in ("cat", 1.5, True, "3", {}, [], [True, False, False], torch.tensor(1.5), torch.tensor(True)):
            with pytest.raises(InputError, match=r"label is .*; give the number of a class"): adapt(named, label=wrong)
        with pytest.raises(InputError, match="if it wants a class as zeros and a one: classes=, how many there are"):
            adapt(Rows(), label=2)

    def test_truncation(self):
        class Styled(DCGAN):
            def __init__(self):
                super().__init__()
                self.mapping = nn.Linear(6, 6)
            def forward(self, z): return super().forward(self.mapping(z)[:, :, None, None])

        torch.manual_seed(0)
        styled, z = Styled(), torch.randn(2, 6)
        mean = adapt(styled, mapping="mapping", sampling=Sampling(0.0, None))(z).image
        assert torch.allclose(mean[0], mean[1], atol=1e-6)
        assert torch.allclose(adapt(styled, mapping="mapping", mean_style="mapping.bias").network.mean,
                              styled.mapping.bias)
        assert torch.equal(adapt(styled, sampling=Sampling(0.0, None))(z).image, adapt(styled)(z).image)
        with pytest.raises(InputError, match="there is no layer 'maping'"): adapt(styled, mapping="maping")

    def test_a_layer_that_is_called_again(self):
        class Shared(DCGAN):
            def __init__(self):
                super().__init__()
                self.relu = nn.ReLU()
            def forward(self, z):
                first = self.relu(self.main[0](z))
                return self.main[6](self.relu(self.main[3](first))).tanh()

        assert adapt(Shared()).network.taps == ["relu:0", "relu:1"]

    def test_layers_by_name_and_pattern(self):
        assert adapt(module(), layers="*.[14]").network.taps == ["main.1", "main.4"]
        assert adapt(module(), layers=["main.4", "main.1"]).network.taps == ["main.1", "main.4"]
        for layers in ("conv*", ["main.44"], "main"):
            if layers != "main":
                with pytest.raises(InputError, match="layers: no layer"): adapt(module(), layers=layers)
        maps = [LayerMap("a", "Conv2d", 8, 4, 4), LayerMap("b", "Conv2d", 3, 8, 8), LayerMap("c", "Conv2d", 8, 4, 4)]
        assert proposed(maps, (8, 8)) == ["c"]

    @pytest.mark.parametrize("wrong, match", [
        (DCGAN, "call it first"), (torch.zeros(1), "takes a torch.nn.Module"), (nn.ReLU(), "z_dim="),
        (nn.Sequential(nn.Linear(4, 12), nn.Unflatten(1, (3, 2, 2))), "no|none of the module"),
        (nn.Sequential(nn.ConvTranspose2d(4, 8, 4), nn.ConvTranspose2d(8, 5, 4, 2, 1)), "1 or 3 channels")])
    def test_what_cannot_be_adapted(self, wrong, match):
        with pytest.raises(InputError, match=match): adapt(wrong)

    def test_modules_that_take_or_give_something_else(self):
        """An autoencoder, a network from picture to picture, and flat pictures are told what to do."""
        wide = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
        with pytest.raises(InputError, match="a pixel, no picture.*reads pictures.*the method that draws"): adapt(wide)
        for layers in ([nn.Conv2d(3, 8, 4, 4)], [nn.Conv2d(1, 8, 4, 4)]):
            with pytest.raises(InputError, match=r"or a module whose forward\(z\) calls it .*of an autoencoder"):
                adapt(nn.Sequential(*layers))
        with pytest.raises(InputError, match=r"gives \(2, 768\) and no pictures .*wrap it"):
            adapt(nn.Sequential(module(), nn.Flatten()), z_dim=(6, 1, 1))

    def test_a_method_that_draws(self):
        """`decode` of an autoencoder is found by its name, with the layers of the whole module."""
        torch.manual_seed(0)
        whole, z = Autoencoder(), torch.randn(2, 6)
        with pytest.raises(InputError, match=r"adapt\(module.decode\) or method: decode"): adapt(whole, z_dim=9)
        generator = adapt(whole.decode)
        assert generator.z_dim == 6 and generator.network.taps[0].startswith("draw.main")
        assert generator(z).image.equal(whole.eval().decode(z[:, :, None, None]))
        assert "Autoencoder.decode with pictures from -1 to 1" in repr(generator)
        assert pickle.loads(pickle.dumps(generator))(z).image.equal(generator(z).image)
        assert adapt(whole.decode, layers=["draw.main.1"]).network.taps == ["draw.main.1"]

    def test_a_block_goes_before_what_is_inside_the_next(self):
        class Block(nn.Module):
            """Enlarges; its side branch works at the size before."""

            def __init__(self):
                super().__init__()
                self.grow, self.side = nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.Conv2d(8, 8, 1)

            def forward(self, x): return self.grow(x) + nn.functional.interpolate(self.side(x), scale_factor=2)

        blocks = nn.Sequential(nn.ConvTranspose2d(6, 8, 4), Block(), Block(), nn.Conv2d(8, 3, 1), nn.Tanh())
        assert adapt(blocks, z_dim=(6, 1, 1)).network.taps == ["0", "1", "2"]
        maps = [LayerMap("body.1.side", "Conv2d", 8, 4, 4), LayerMap("body.1", "Block", 8, 8, 8),
                LayerMap("body.2.side", "Conv2d", 8, 8, 8), LayerMap("body.2", "Block", 8, 16, 16),
                LayerMap("body", "Sequential", 3, 16, 16)]
        assert proposed(maps, (16, 16)) == ["body.1.side", "body.1", "body.2"]

    def test_layers_once_each_and_some(self):
        assert adapt(module(), layers=["main.1", "main.1"]).network.taps == ["main.1"]
        with pytest.raises(InputError, match="layers is empty"): adapt(module(), layers=[])

    def test_a_class_that_there_is_not_is_told_by_the_table_of_classes(self):
        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                self.names, self.draw = nn.Embedding(3, 6), module()

            def forward(self, z, y): return self.draw(z[:, :, None, None] + self.names(y)[:, :, None, None])

        with pytest.raises(InputError, match="label is 3, and Named knows 3 classes; give 0 to 2"):
            adapt(Named(), z_dim=6, label=3)
        with pytest.raises(InputError, match="give a class from 0 on"): adapt(Named(), z_dim=6, label=-1)

    def test_a_mistake_in_its_code_is_told_with_its_line(self):
        class Broken(DCGAN):
            def forward(self, z): return undefined_name  # noqa: F821

        with pytest.raises(InputError, match=r"undefined_name.*test_adapt.py, line \d+\); mend that first") as told:
            adapt(Broken())
        assert "z_dim" not in str(told.value)

    def test_the_line_is_told_in_whatever_folder_it_lies(self, tmp_path, monkeypatch):
        """Also in a checkout that is called as the kit or as PyTorch are."""
        place = tmp_path / "lagm" / "torch"
        place.mkdir(parents=True)
        (place / "sketch.py").write_text("from torch import nn\n\n\nclass Sketch(nn.ConvTranspose2d):\n"
                                         "    def forward(self, z): return no_such_name\n")
        monkeypatch.syspath_prepend(str(place))
        import sketch
        with pytest.raises(InputError, match="sketch.py, line 5"): adapt(sketch.Sketch(6, 8, 4))

    def test_the_hint_of_an_autoencoder_names_a_method_and_no_part_of_it(self):
        """A part, such as its decoder, may lack the layers before it."""
        parts = nn.ModuleDict({"decoder": nn.ConvTranspose2d(5, 3, 16)})
        whole = nn.Sequential(nn.Conv2d(3, 5, 16))
        whole.decoder = parts["decoder"]
        with pytest.raises(InputError, match=r"adapt\(module.decode\)"): adapt(whole, z_dim=9)

    def test_pictures_that_hardly_differ_are_told(self):
        torch.manual_seed(0)
        pale = nn.Sequential(nn.ConvTranspose2d(6, 8, 4), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 3, 4, 2, 1),
                             nn.Tanh())
        with torch.no_grad(): pale[2].weight.mul_(0.01)
        with pytest.warns(UserWarning, match="hardly differ, by .* is it trained, and has its batch norm seen"):
            adapt(pale, z_dim=(6, 1, 1))
        with torch.no_grad(): pale[2].weight.mul_(1000)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapt(pale, z_dim=(6, 1, 1))

    @pytest.mark.parametrize("order", [1, -1])
    def test_of_several_pictures_the_largest_counts(self, order):
        class Pyramid(nn.Module):
            """A picture of each size, and the features of the last before them."""

            def __init__(self):
                super().__init__()
                self.first, self.up = nn.ConvTranspose2d(6, 8, 4), nn.ConvTranspose2d(8, 8, 4, 2, 1)
                self.rgb = nn.ModuleList([nn.Conv2d(8, 3, 1), nn.Conv2d(8, 3, 1), nn.Conv2d(8, 1, 1)])

            def forward(self, z):
                maps = [self.first(z), self.up(self.first(z))]
                pictures = [rgb(found).tanh() for rgb, found in zip(self.rgb, maps)]
                return {"maps": maps[1], "pictures": (*pictures, self.rgb[2](maps[1]).tanh())[::order]}

        torch.manual_seed(0)
        pyramid = Pyramid()
        generator, z = adapt(pyramid), torch.randn(2, 6)
        assert generator.resolution == 8 and generator.network.values == (-1, 1)
        assert generator(z).image.equal(pyramid(z[:, :, None, None])["pictures"][1])

    def test_digest_and_pickle(self):
        one, other = adapt(module()), adapt(module(), layers=["main.5"])
        assert generator_digest(one) == generator_digest(adapt(module())) != generator_digest(other)
        again, z = pickle.loads(pickle.dumps(one)), torch.randn(2, 6)
        assert torch.equal(again(z).image, one(z).image)


MISTAKES = {
    "training mode": (lambda: Own(network=nn.BatchNorm2d(4)), "is in training mode"),
    "0..1": (lambda: Own(lambda image, maps, rng: ((image + 1) / 2, maps)), "never below 0"),
    "0..255": (lambda: Own(lambda image, maps, rng: (127.5 * (image + 1), maps)), "pictures / 127.5"),
    "picture alone": (lambda: Own(lambda image, maps, rng: image), "returns a Tensor"),
    "bytes": (lambda: Own(lambda image, maps, rng: ((100 * image).int(), maps)), "floating-point"),
    "grey": (lambda: Own(lambda image, maps, rng: (image[:, :1], maps)), "floating-point"),
    "NaN feature": (lambda: Own(lambda image, maps, rng: (image, [maps[0] / 0 * 0, maps[1]])), "features hold NaN"),
    "other maps": (lambda: Own(lambda image, maps, rng: (image, maps[:1])), "make them say what it gives"),
    "own noise": (lambda: Own(lambda image, maps, rng: (image + torch.randn(1), maps)), "same latents and rng"),
    "bare module": (lambda: module(), "bare module"),
    "fails": (lambda: Own(lambda image, maps: None), "fails when it is used"),
}


class TestDoor:
    @pytest.mark.parametrize("mistake", MISTAKES)
    def test_every_mistake_is_answered_where_training_begins(self, mistake):
        make, match = MISTAKES[mistake]
        with pytest.raises(InputError, match=match): train(make())

    @pytest.mark.parametrize("name", ["sample_z", "feature_sizes", "feature_channels"])
    def test_a_name_is_missing(self, name):
        near = type("Near", (), {key: value for key, value in vars(Own).items()
                                if key not in (name, "__dict__", "__weakref__")})
        with pytest.raises(InputError, match=f"has no {name}"): train(near())

    def test_all_doors(self, tmp_path):
        wrong, (images, masks) = MISTAKES["0..1"][0](), labelled()
        segmenter = UNet(8, width=4, levels=2)
        annotator = FPNAnnotator([4, 4], 8, channels=4)
        for door in (lambda: train_self_training(segmenter, wrong, images, masks, recipe=FAST, progress=False),
                     lambda: train_finish(segmenter, wrong, images, masks, get_recipe("fast", steps=1, finish=16.0),
                                          progress=False),
                     lambda: draw_to_label(wrong, 1),
                     lambda: generate(wrong, annotator, tmp_path / "pairs", Plan(2, size=(16, 16)), progress=False)):
            with pytest.raises(InputError, match="never below 0"): door()

    def test_labelled_pictures_in_another_range(self):
        with warnings.catch_warnings(action="ignore"), pytest.raises(InputError, match="both must be in"):
            train(Own(), (labelled()[0] + 1) / 2)

    def test_larger_labels_are_said(self):
        images, masks = labelled(size=32)
        with pytest.warns(UserWarning, match="the generator draws 16 × 16"):
            train_lagm(Own(), FPNAnnotator([4, 4], 8, channels=4), UNet(8, width=4, levels=2), images, masks, FAST,
                       progress=False)

    def test_nothing_is_changed(self):
        class Counting(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("calls", torch.zeros(()))
            def forward(self, maps):
                self.calls += 1
                return maps

        state, counting = torch.get_rng_state(), Counting()
        with pytest.raises(InputError, match="changes when it is used"): check_generator(Own(network=counting))
        check_generator(load_generator())
        assert counting.calls == 0 and torch.equal(torch.get_rng_state(), state)

    def test_a_run_with_the_check_is_the_run_without_it(self):
        def weights(checked):
            torch.manual_seed(0)
            source = adapt(module(), layers=["main.5"], full=False)
            source.checked = checked
            annotator, segmenter = FPNAnnotator(source.feature_channels, 8, channels=4), UNet(8, width=4, levels=2)
            images, masks = labelled()
            trained = train_lagm(source, annotator, segmenter, images, masks, FAST, progress=False)
            return torch.cat([p.flatten() for p in trained.annotator.parameters()])

        assert torch.equal(weights(False), weights(True))


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A package of somebody else's, with weights beside it."""
    (tmp_path / "theirs.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Generator(nn.Module):\n"
        "    def __init__(self, nz=6, width=8):\n"
        "        super().__init__()\n"
        "        self.main = nn.Sequential(nn.ConvTranspose2d(nz, width, 4), nn.BatchNorm2d(width), nn.ReLU(True),\n"
        "                                  nn.ConvTranspose2d(width, 3, 4, 4), nn.Sigmoid())\n"
        "    def forward(self, z): return self.main(z)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("theirs", None)
    import theirs
    torch.manual_seed(1)
    state = theirs.Generator().state_dict()
    torch.save({"netD": {"a.weight": torch.zeros(2)}, "netG": {f"module.{k}": v for k, v in state.items()}},
               "gan.pth")
    yield state
    sys.modules.pop("theirs", None)


class TestFiles:
    def test_a_description_in_every_form(self, program):
        mapping = {"module": "theirs:Generator", "weights": "gan.pth"}
        for given in (mapping, json.dumps(mapping), "{module: theirs:Generator, weights: gan.pth}"):
            generator = load_generator(given)
            assert torch.equal(generator.network.module.main[0].weight, program["main.0.weight"])
            assert generator.header["provenance"]["key"] == "netG" and is_outside(given)
        assert load_generator("theirs:Generator").resolution == 16
        assert load_generator("big-ears").resolution == 64 and described_generator(Path("x")) is None

    def test_weights_that_do_not_fit(self, program):
        with pytest.raises(InputError, match="of shape .* the module of"):
            load_generator({"module": "theirs:Generator", "arguments": {"width": 4}, "weights": "gan.pth"})
        torch.save({"other": {"x": torch.zeros(2)}}, "other.pth")
        with pytest.raises(InputError, match="does not fit Generator: it lacks main.0.bias"):
            load_generator({"module": "theirs:Generator", "weights": "other.pth"})
        with pytest.raises(InputError, match="under the name netX"):
            load_generator({"module": "theirs:Generator", "weights": "gan.pth", "key": "netX"})
        with pytest.raises(InputError, match="no such file"):
            load_generator({"module": "theirs:Generator", "weights": "gone.pth"})
        broken = {name: value * float("nan") if name == "main.0.weight" else value for name, value in program.items()}
        torch.save(broken, "broken.pth")
        with pytest.raises(InputError, match="NaN or infinite numbers in main.0.weight"):
            load_generator({"module": "theirs:Generator", "weights": "broken.pth"})

    def test_a_file_names_no_code(self, program, tmp_path):
        class Evil:
            def __reduce__(self): return (Path.touch, (tmp_path / "was run",))

        torch.save({"netG": dict(program), "more": Evil()}, "evil.pth")
        with pytest.raises(InputError): module_generator({"module": "theirs:Generator", "weights": "evil.pth"})
        generator = load_generator({"module": "theirs:Generator", "weights": "gan.pth"})
        save_adapted("mine.safetensors", generator)
        sys.modules.pop("theirs")
        with pytest.raises(InputError, match="a file cannot bring along.*module: theirs:Generator"):
            load_generator("mine.safetensors")
        facts = inspect("mine.safetensors")
        assert facts["kind"] == "adapted generator" and facts["class"] == "theirs:Generator"
        assert facts["feature_maps"] == ["8 × 4²", "11 × 16²"] and "to open it" in facts
        assert "theirs" not in sys.modules and not (tmp_path / "was run").exists()
        again = load_generator({"module": "theirs:Generator", "weights": "mine.safetensors"})
        z = torch.randn(2, 6)
        assert torch.equal(again(z).image, generator(z).image)

    def test_a_whole_object_is_refused(self, program):
        import theirs
        torch.save(theirs.Generator(), "whole.pth")
        with pytest.raises(InputError, match="whole object|no weights|state_dict"):
            read_weights("whole.pth", theirs.Generator())

    def test_mistakes_in_a_description(self, program):
        for given, match in (({"modul": "a:b"}, "did you mean module"), ({"weights": "a"}, "needs module"),
                             ("{module: [", "cannot be read"), ({"module": "theirs:Generatr"}, "did you mean"),
                             ({"module": "theirs:Generator", "arguments": {"n": 2}}, "cannot be made"),
                             ({"module": "theirs:Generator", "layers": ["main.9"]}, "theirs:Generator: layers")):
            with pytest.raises(InputError, match=match): load_generator(given)

    def test_a_module_beside_that_python_does_not_see(self, tmp_path, monkeypatch):
        (tmp_path / "lonely.py").write_text("")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
        with pytest.raises(InputError, match="PYTHONPATH=."): load_generator("lonely:Generator")

    def test_a_missing_library_of_a_module_is_no_missing_path(self, tmp_path, monkeypatch):
        """The file is here and is found; what it imports is not, or it has a mistake of its own."""
        (tmp_path / "needy.py").write_text("import no_such_library_at_all\n")
        (tmp_path / "unfinished.py").write_text("class Generator(\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(InputError, match="it is there, and imports no_such_library_at_all, which is not") as told:
            load_generator("needy:Generator")
        assert "PYTHONPATH" not in str(told.value)
        with pytest.raises(InputError, match="SyntaxError.*mend that first"): load_generator("unfinished:Generator")
        for given in ("needy.py:Generator", "./needy.py:Generator", "needy.Generator"):
            with pytest.raises(InputError, match="did you mean needy:Generator?"): module_generator({"module": given})

    def test_weights_that_nobody_named_are_told(self, program):
        with pytest.warns(UserWarning, match="theirs:Generator: no weights are named.*give weights: FILE"):
            load_generator("theirs:Generator")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*no weights are named")
            load_generator({"module": "theirs:Generator", "weights": "gan.pth"})

    def test_a_method_in_a_description(self, tmp_path, monkeypatch):
        """Weights are those of the whole module; a file of it says which method draws."""
        monkeypatch.chdir(tmp_path)
        torch.manual_seed(0)
        whole = Autoencoder()
        torch.save(whole.state_dict(), "ae.pth")
        given = {"module": "test_adapt:Autoencoder", "weights": "ae.pth", "method": "decode"}
        generator, z = load_generator(given), torch.randn(2, 6)
        assert generator(z).image.equal(adapt(whole.decode)(z).image)
        save_adapted("mine.safetensors", generator)
        assert "weights: mine.safetensors, method: decode}" in inspect("mine.safetensors")["to open it"]
        assert load_generator(given | {"weights": "mine.safetensors"})(z).image.equal(generator(z).image)
        with pytest.raises(InputError, match="has no method decod$"): load_generator(given | {"method": "decod"})

    def test_inspect_tells_of_a_module(self, program):
        facts = inspect("{module: theirs:Generator, weights: gan.pth}")
        assert facts["kind"] == "generator of another package" and facts["generator"]["z_dim"] == 6
        values = load_generator({"module": "theirs:Generator", "weights": "gan.pth"}).network.values
        assert facts["generator"]["black and white"] == list(values) and facts["generator"]["class"] == "Generator"
        assert sum(line.startswith("used") for line in facts["generator"]["layers"]) == 1

    def test_inspect_tells_of_a_generator_that_is_written_to_the_contract(self):
        """One that has the names of the contract and no other."""
        facts = inspect("test_adapt:Own")["generator"]
        assert facts["class"] == "Own" and facts["resolution"] == 16 and facts["z_dim"] == 4
        assert len(facts["feature_maps"]) == len(Own().feature_channels)

    def test_inspect_tells_of_wide_pictures_as_they_are(self, monkeypatch, tmp_path):
        (tmp_path / "broad.py").write_text("""
from torch import nn
class Generator(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(5, 96), nn.Unflatten(1, (8, 3, 4)), nn.Upsample(scale_factor=4),
                         nn.Conv2d(8, 3, 3, padding=1), nn.Tanh())
""")
        monkeypatch.syspath_prepend(tmp_path)
        facts = inspect("broad:Generator")["generator"]
        assert facts["resolution"] == "12 × 16" and "8 × 3 × 4" in facts["feature_maps"]

    def test_a_dry_run_looks_at_the_generator(self, program, tmp_path, capsys):
        from lagm.cli import main
        asked = ["run", "annotate", "-o", "out", "--dry-run", "-p", "generator"]
        assert not main([*asked, "{module: theirs:Generator, weights: gan.pth}"])
        for wrong, match in (("{module: theirs:Generatr}", "did you mean Generator"),
                             ("{module: theirs:Generator, weights: gone.pth}", "weights: no such file"),
                             ("{module: theirs:Generator, labl: 1}", "did you mean label")):
            assert main([*asked, wrong]) == 2 and match in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_a_new_project_takes_the_size_of_a_small_generator(self, program, tmp_path, capsys):
        from lagm.cli import main
        asked = ["new", "mine", "--classes", "background,face", "--generator",
                 "{module: theirs:Generator, weights: gan.pth}", "--generated", "2"]
        assert not main(asked) and "size: 16" in (tmp_path / "mine" / "project.yaml").read_text()
        assert not main([*asked[:1], "larger", *asked[2:], "--size", "32"])
        assert "training is at 32 pixels, the generator draws 16" in capsys.readouterr().out
        assert "size: 32" in (tmp_path / "larger" / "project.yaml").read_text()
        assert main(["run", "mine", "--dry-run"]) == 2 and "no picture is labelled yet" in capsys.readouterr().err
        settings = (tmp_path / "mine" / "project.yaml").read_text()
        (tmp_path / "mine" / "project.yaml").write_text(settings.replace("gan.pth", "gone.pth"))
        assert main(["run", "mine", "--dry-run"]) == 2 and "gone.pth" in capsys.readouterr().err

    def test_in_a_project(self, program, tmp_path):
        given = "{module: theirs:Generator, weights: gan.pth}"
        settings = Settings(generator=named_generator(given))
        assert settings.generator["weights"] == str(tmp_path / "gan.pth")
        text = settings_text(settings)
        import yaml
        assert Settings(**yaml.safe_load(text)) == settings
        generator = project_generator(tmp_path, settings, torch.device("cpu"))
        assert torch.equal(generator.network.module.main[0].weight, program["main.0.weight"])
        assert named_generator("") == "" and named_generator("theirs:Generator") == "theirs:Generator"

    def test_problems_before_a_run(self, program):
        from lagm.experiments.catalogue import Run
        run = lambda **given: Run("x", "annotate", Path("annotate.ipynb"), dict(dataset="avatars:big-ears", **given),
                                  Path("x.ipynb"))
        assert not missing_inputs(run(generator={"module": "theirs:Generator", "weights": "gan.pth"}))
        assert any("gone.pth" in line for line in
                   missing_inputs(run(generator={"module": "theirs:Generator", "weights": "gone.pth"})))

    def test_its_weights_are_an_input_of_a_run(self, program, tmp_path):
        from lagm.experiments.catalogue import Run, change_runs
        from lagm.experiments.notebooks import describe_inputs, find_experiment, inputs_unchanged, named_paths
        given = {"generator": {"module": "theirs:Generator", "weights": "gan.pth"}}
        record = describe_inputs(given, tmp_path)
        assert named_paths(given) == {"generator.weights": "gan.pth"} and list(record) == ["generator.weights"]
        assert inputs_unchanged(record, given, tmp_path)
        (tmp_path / "gan.pth").write_bytes(b"others")
        assert not inputs_unchanged(record, given, tmp_path)
        made = {"module": "theirs:Generator", "weights": "outputs/x/g/gan.pth"}
        run = Run("x", "annotate", find_experiment("annotate"), {"generator": made, "out_dir": "outputs/x/annotate"},
                  Path("outputs/x/annotate/annotate.ipynb"))
        moved = change_runs({"x/annotate": run}, {}, {"x": "outputs/y"})
        assert [r.parameters["generator"]["weights"] for r in moved.values()] == ["outputs/y/g/gan.pth"]

    def test_a_class_that_a_parameter_names(self, tmp_path, monkeypatch):
        from lagm.experiments.catalogue import Run
        (tmp_path / "several.py").write_text(SEVERAL)
        monkeypatch.syspath_prepend(str(tmp_path))
        run = lambda **given: Run("x", "annotate", Path("annotate.ipynb"), dict(dataset="avatars:big-ears", **given),
                                  Path("x.ipynb"))
        for given in ("several:Generator", {"module": "several:Generator"}):
            assert not missing_inputs(run(generator=given, generator_class=1))
            assert "label=" in missing_inputs(run(generator=given, generator_class=-1))[0]
            for useless in ({"diffusion": {"steps": 2}}, {"avg_latent": "mean.npy"}):
                with pytest.raises(InputError, match="leave avg_latent and diffusion out"):
                    load_generator(given, label=1, **useless)


@pytest.mark.slow
def test_from_the_command_line(program, tmp_path):
    """One parameter file through annotate, and the result through evaluate."""
    (tmp_path / "mine.yaml").write_text(
        "generator: {module: theirs:Generator, weights: gan.pth}\nsize: [16, 16]\niterations: 1\nwarm_up: 1\n"
        "width: 4\nlevels: 2\nchannels: 8\nvalidation_pictures: 2\n")
    import os
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    for command in (["annotate", "-f", "mine.yaml", "-o", "out"],
                    ["evaluate", "-p", "networks", "out/results.safetensors", "-p", "size", "[16, 16]", "-p",
                     "pictures", "2", "-o", "out2"]):
        done = nursery.run([sys.executable, "-c", "import lagm.cli; lagm.cli.main()", "run", *command], cwd=tmp_path,
                           env=env)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "segmenter.safetensors").is_file()
    assert np.isfinite(json.loads((tmp_path / "out2" / "metrics.json").read_text())["metrics"]["segmenter"]["fg_miou"])
    assert copy.copy(program)
