"""A rival as a package of somebody else may hold it: `test_registry_baseline` copies it there."""

from dataclasses import dataclass

from lagm.training.baselines import Baseline
from lagm.training.recipe import FAST, SUPERVISED_FIELDS
from lagm.training.rivals import Batches, run_stages, set_up
from lagm.training.state import Stage
from lagm.training.steps import supervised_step


@dataclass(frozen=True)
class Mirror:
    weight: float = 1.0
    members: int = 1  # a number that the comparison sets for all who have it


def train_mirror(segmenter, generator, images, masks, *, setting=Mirror(), recipe=FAST, seed=0, device="cpu",
                 folder=None, **options):
    """Learn from labelled pictures in a mirror."""
    state = set_up(train_mirror, SUPERVISED_FIELDS, segmenter, images, masks, recipe, device, options)
    batches = Batches(state, generator, images, masks, seed, 2)
    assert batches.generated(0, "mirror").shape[1] == 3 and setting.members == 3

    def step(number):
        flipped = [tuple(tensor.flip(-1) for tensor in part) for part in batches.labelled(number, "mirror")]
        return supervised_step(state, flipped)

    stage = Stage("mirror", recipe.steps, step, {"segmenter": recipe.lr_segmenter * setting.weight}, averaged=True)
    (folder / "mirror.txt").parent.mkdir(exist_ok=True)
    (folder / "mirror.txt").write_text(repr(setting))
    return run_stages(state, [stage], repr(setting), images, masks, seed, **options)


mirror = Baseline("mirror", "labelled pictures in a mirror", train_mirror, Mirror(), warm_up="none", steps=7)
no_finish = Baseline("mirror, alone", "the same", train_mirror, Mirror(), warm_up="none", finish="none")
nothing = 7
