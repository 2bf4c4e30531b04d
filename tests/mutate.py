"""Small mistakes, put into a copy of the package one at a time: each must make a test fail.

python tests/mutate.py             all rows; about half an hour on one core
python tests/mutate.py 12 40 folds the rows with these numbers, or of these modules
python tests/mutate.py --list      the rows

A row is a module, a text that occurs once in it, what the text becomes, and the tests that should notice. The checkout
is never changed. The end says that no mistake survives, or names those that do; then write a test with the right value.
A text that is no longer there is a mistake, too: give the row a new one.
"""

import argparse
import importlib
import multiprocessing
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 900  # seconds for the tests of one row
NO_TESTS = 5  # pytest's exit status
FORK = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"


class Row(NamedTuple):
    module: str  # such as training.loop: lagm/training/loop.py
    old: str
    new: str
    tests: str  # what pytest is given, below tests/


ROWS = [Row(*row) for row in (
    # files and inputs
    ("core.files", "    try: os.fsync(handle)\n", "    try: pass\n", "test_pinned.py -k on_the_disk"),
    ("core.files", "        if flush: _flush_to_disk(temporary)\n        os.replace(temporary, path)\n",
     "        os.replace(temporary, path)\n", "test_pinned.py -k on_the_disk"),
    ("core.seeds", "json.dumps([_checked_seed(seed), *stream])", "json.dumps([_checked_seed(seed)])", "test_core.py"),
    ("core.values", "(kind is bool or not isinstance(number, bool))", "True", "test_doors.py -k true_is_no_number"),
    ("core.tensors", "torch.stack(ends).all()", "torch.stack(ends).any()", "test_doors.py -k finite_whatever"),
    ("core.values", "if near else \"it has\"", "if not near else \"it has\"", "test_doors.py -k nearest_field"),
    # changes of pictures
    ("data.augment", "signed = 2 * u - 1", "signed = 2 * u", "test_pinned.py -k both_ways"),
    ("data.augment", "torch.where(mirror, -1.0, 1.0)", "torch.where(mirror, 1.0, 1.0)", "test_pinned.py -k both_ways"),
    ("data.augment", "torch.where(warped == 0, IGNORE, warped - 1)", "torch.where(warped == 0, 0, warped - 1)",
     "test_augment.py"),
    ("data.augment", "torch.baddbmm(brightness - 1,", "torch.baddbmm(brightness,", "test_augment.py"),
    ("data.augment", "top = (height - kept) // 2", "top = 0", "test_augment.py"),
    # the matching distance and its gradient
    ("matching.distances", "COSINE_EPS = 1e-6", "COSINE_EPS = 1e-8", "test_pinned.py -k millionth"),
    ("matching.distances", "scale * cosine / clamped / norm", "scale * cosine / clamped / clamped",
     "test_pinned.py -k millionth"),
    ("matching.distances", "return total / len(gradients_s) if", "return total if", "test_matching.py"),
    ("matching.distances", "scale = 1 / (len(g_s) * len(gradients_s))", "scale = 1 / len(g_s)", "test_matching.py"),
    ("matching.distances", "torch.where(norm > 0, scale / norm, 0)", "scale / norm", "test_pinned.py -k pull_nowhere"),
    ("matching.gradients", "(labels.numel() // labels.shape[1])", "labels.numel()", "test_matching.py"),
    ("matching.forward", "change.mul_(-labels.shape[1] / labels.numel())",
     "change.mul_(labels.shape[1] / labels.numel())",
     "test_matching.py"),
    ("matching.gradients", "    for p in others: p.requires_grad_(False)\n", "", "test_pinned.py -k gives_the_others"),
    ("matching.gradients", "        for p in others: p.requires_grad_(True)\n", "        pass\n",
     "test_pinned.py -k gives_the_others"),
    ("core.seeds", "if start is not None: tools.set_rng_state(start, *where)", "pass",
     "test_pinned.py -k second_pass"),
    ("core.seeds", "finally: tools.set_rng_state(before, *where)", "finally: pass", "test_pinned.py -k second_pass"),
    ("matching.gradients", "posinf=1e5", "posinf=0.0", "test_matching.py -k clean"),
    ("matching.tangents", "dx - (result.exp() * dx)", "dx + (result.exp() * dx)", "test_tangents.py"),
    ("matching.tangents", "1 / (1 - arguments[1]) if", "1.0 if", "test_pinned.py -k tangent_of_dropout"),
    ("matching.tangents", "(-1 if operation.overloadpacket in (aten.sub, aten.sub_) else 1)", "1", "test_tangents.py"),
    ("matching.tangents", "None, None, mean, inverse, True, eps", "None, None, mean, inverse, False, eps",
     "test_tangents.py"),
    ("matching.tangents", "-quotient * db / b", "quotient * db / b", "test_tangents.py"),
    # quick convolutions
    ("ops.winograd", "    (4, 0, -5, 0, 1, 0), (0, -4", "    (4, 0, -4, 0, 1, 0), (0, -4",
     "test_winograd.py -k it_is_the_convolution"),
    ("ops.winograd", "taps.flip(0) if swapped else taps", "taps", "test_winograd.py -k it_is_the_convolution"),
    ("ops.winograd", "2 * 36 * batch * dilation**2", "36 * batch * dilation**2",
     "test_pinned.py -k products_of_tiles"),
    ("ops.convolutions", "(1 + 2 * max(0, n - rate) / n) / 3", "(1 + max(0, n - rate) / n) / 2",
     "test_convolutions.py -k 'trimmed or live'"),
    ("ops.convolutions", "(2, rate, (0, rate))", "(2, 0, (0, rate))", "test_convolutions.py -k 'trimmed or live'"),
    ("ops.convolutions", "weight.shape[2:] == (3, 3) and groups == 1", "weight.shape[2:] == (3, 3)",
     "test_pinned.py -k groups"),
    # steps
    ("training.state", "1 - decay)", "decay)", "test_pinned.py -k average"),
    ("training.state", "if not a.is_floating_point(): a.copy_(b)", "pass", "test_pinned.py -k average"),
    ("training.recipe", "math.cos(math.pi * step / steps)", "math.cos(math.pi * (step + 1) / steps)",
     "test_pinned.py -k cosine"),
    ("training.loop", "    state.set_rates(stage, within)\n", "", "test_pinned.py -k learning_rate"),
    ("training.steps", "segmenter, annotator = len(synthetic), state.segmenter.eval(),",
     "segmenter, annotator = len(synthetic), state.segmenter.train(),", "test_pinned.py -k imitation"),
    ("training.steps", "alpha=state.recipe.label_weight", "alpha=1", "test_pinned.py -k labelled_gradient"),
    ("training.batches", ".item()) ** -balance", ".item()) ** balance", "test_training.py -k class_weights"),
    ("training.state", "self.class_weights if weigh_labels else None", "self.class_weights",
     "test_training.py -k class_weights"),
    ("training.batches", "rounds[i // n][i % n]", "rounds[i // n][0]", "test_training.py -k go_round"),
    ("training.lagm", "step % recipe.interval_annotator == 0", "step % recipe.interval_annotator == 1",
     "test_run_state.py -k intervals"),
    ("training.loop", "(self.step % every == 0 or self.step == self.total)", "self.step % every == 0",
     "test_run_state.py -k supervised_runs test_training.py -k supervised"),
    ("training.loop", "and explode_at < value < math.inf", "and value < -1", "test_run_state.py -k explosion"),
    ("training.loop", "key=lambda record: record[\"fg_miou\"], default=None",
     "key=lambda record: (record[\"fg_miou\"], record[\"step\"]), default=None", "test_pinned.py -k best"),
    ("training.state", "train_mode(self.networks[role], self.resting[role])", "self.networks[role].train()",
     "test_doors.py -k frozen"),
    ("training.batches", "if self.clip else images.detach()", "if True else images.detach()", "test_clip.py"),
    ("data.augment", "(changed.clamp_(-1, 1) if clip else changed)", "changed.clamp_(-1, 1)", "test_clip.py"),
    ("training.batches", "== 0: check_generated(images, features)", "== 0: pass", "test_doors.py -k no_numbers"),
    ("training.lagm", "    names = [name for name in matched if name in everything]\n", "    names = matched\n",
     "test_doors.py -k frozen"),
    ("training.lagm", "    arm += frozen_note(state) + ", "    arm += ", "test_doors.py -k another_set"),
    ("training.processes", "torch.manual_seed((seed + 7919 * part) % 2**63)", "torch.manual_seed(seed)",
     "test_pinned.py -k own_dropout"),
    ("training.processes", "buffer.copy_(total / parts)", "buffer.copy_(total)", "test_pinned.py -k own_dropout"),
    ("training.processes", "return [total / weight for total in totals]", "return totals", "test_pinned.py -k no_vote"),
    ("training.processes", "if weight > 0 else", "if weight >= 0 else", "test_pinned.py -k no_vote"),
    ("training.steps", "-labels.shape[1] / labels.numel() / parts", "-labels.shape[1] / labels.numel()",
     "test_parts.py -k without_batch_norm"),
    # runs
    ("training.checkpoints", "total.update(f\"{tensor.dtype} {tuple(tensor.shape)}\".encode())", "pass",
     "test_pinned.py -k digest"),
    ("training.checkpoints", "hashlib.sha256(text + ", "hashlib.sha256(b\"\" + ",
     "test_run_state.py -k generator_digest"),
    ("training.checkpoints", "self.numbered()[self.keep:]", "self.numbered()[self.keep + 1:]",
     "test_run_state.py -k kept"),
    ("training.checkpoints", "    torch.set_rng_state(tensors[\"random.torch\"])\n", "",
     "test_run_state.py -k random_states"),
    ("training.checkpoints", "return [p for _, p in sorted(found, reverse=True)]",
     "return [p for _, p in sorted(found)]",
     "test_run_state.py -k 'kept or damage'"),
    ("training.watching", "record[\"step\"] <= step", "record[\"step\"] < step", "test_run_state.py -k watched"),
    # scores
    ("evaluation.boundary", "round(self.tolerance", "int(self.tolerance", "test_pinned.py -k radius"),
    ("evaluation.boundary", "(side[:, None]**2 + side**2 <= radius**2)", "(side[:, None]**2 + side**2 < radius**2)",
     "test_pinned.py -k radius"),
    ("evaluation.metrics", "foreground, present = iou[1:],", "foreground, present = iou[:-1],",
     "test_evaluation.py -k authors"),
    ("models.modes", "            m.training = training\n", "            pass\n",
     "test_evaluation.py -k modes"),
    ("evaluation.intervals", "[(1 - level) / 2, (1 + level) / 2]", "[1 - level, level]", "test_pinned.py -k interval"),
    ("data.checks", "LARGEST_VALUE = 4.0", "LARGEST_VALUE = 400.0", "test_doors.py -k cannot_be_pictures"),
    ("evaluation.folds", "int(found[-1])", "int(found[0])", "test_pinned.py -k last_number"),
    ("evaluation.folds", "FoldResult(first + best,", "FoldResult(best,", "test_folds.py -k 'twenty or authors'"),
    # generated pairs, and what learns from them
    ("training.synthetic", "decide(probabilities, plan.vote)", "decide(probabilities)", "test_pinned.py -k majority"),
    ("training.synthetic", "(votes + 0.5 * mean)", "(votes + 3.0 * mean)", "test_pinned.py -k majority"),
    ("training.synthetic",
     "    with eval_mode(*(annotator for annotator in annotators if isinstance(annotator, nn.Module))):\n",
     "    if True:\n", "test_pinned.py -k at_rest"),
    ("training.synthetic", "self.epoch * self.plan.n + i", "i", "test_pinned.py -k another_epoch"),
    ("training.downstream", "maps=drawn.maps[rank::processes]", "maps=drawn.maps[:len(images)]",
     "test_pinned.py -k own_pictures"),
    ("training.downstream", "weight = (counted > 0.5).float()", "weight = torch.ones_like(counted)",
     "test_downstream.py -k soft_labels"),
    ("training.downstream", "epoch - self.recipe.keep)", "epoch - self.recipe.keep - 1)",
     "test_downstream.py -k last_networks"),
    ("training.teachers", "math.exp(-5 * (1 - t)**2)", "math.exp(-5 * (1 - t))", "test_baselines.py -k weight_grows"),
    ("training.teachers", "labels: Tensor = q * sure", "labels: Tensor = q", "test_baselines.py -k labels_of"),
    ("training.teachers", "if step == 0 and teaching.teacher == \"fixed\"", "if teaching.teacher == \"fixed\"",
     "test_baselines.py -k fixed_teacher"),
    ("training.teachers", "view_gradient(segmenter, names, view, weight)",
     "view_gradient(segmenter, names, view, 1.0)", "test_doors.py -k taught_step"),
    # networks
    ("models.annotator", "1 / math.sqrt(len(feature_channels)) if", "1 / len(feature_channels) if",
     "test_annotator.py"),
    ("models.annotator", "align_corners=False", "align_corners=True", "test_annotator.py"),
    ("models.segmenters", "mode=\"bilinear\", align_corners=True", "mode=\"bilinear\", align_corners=False",
     "test_segmenters.py -k unet_agrees"),
    ("models.segmenters", "width * 2**min(i, levels - 1)", "width * 2**i", "test_segmenters.py -k 'unet or widths'"),
    ("generators.stylegan2", "x.clamp(-self.conv_clamp * gain, self.conv_clamp * gain)",
     "x.clamp(-self.conv_clamp, self.conv_clamp)", "test_pinned.py -k clamp"),
    ("generators.stylegan2", "w_avg.lerp(ws[:, :cutoff], psi)", "w_avg.lerp(ws[:, :cutoff], 1 - psi)",
     "test_stylegan2.py -k original"),
    ("generators.stylegan2", "(self.noise_strength * total)", "self.noise_strength", "test_stylegan2.py -k original"),
    ("generators.stylegan1", "average + psi * (ws - average)", "average + psi * ws",
     "test_stylegan1.py -k 'original or layer'"),
    ("generators.stylegan1", ".manual_seed(self.number)", ".manual_seed(0)", "test_pinned.py -k constant_noise"),
    ("generators.train", "weight = 1 - 0.5 ** (", "weight = 0.5 ** (", "test_pinned.py -k generators_average"),
    # files of others
    ("core.pickle_records", "zlib.crc32(self.data) != self.crc", "False", "test_pinned.py -k check_sum"),
    ("core.pickle_records", "self.left = 3 * size + 2**25", "self.left = 300 * size + 2**25",
     "test_pinned.py -k three_times"),
    ("download.transfer", "while failed < attempts:", "while failed <= attempts:", "test_pinned.py -k five_tries"),
    ("download.transfer", "ATTEMPTS = 5", "ATTEMPTS = 6", "test_pinned.py -k five_tries"),
    # pictures and labels
    ("data.labels", "    table[IGNORE] = IGNORE_COLOUR\n", "", "test_labels.py"),
    ("data.demo", "RandomState([seed, 0x1A6])", "RandomState([0, 0x1A6])", "test_data.py -k choice"),
    ("data.demo", ".float() / 127.5 - 1", ".float() / 128 - 1", "test_data.py -k items"),
    ("experiments.sweep", "return (errors or raised or lines or [\"\"])[-1]",
     "return (errors or raised or lines or [\"\"])[0]", "test_pinned.py -k last_error"),
)]


def source(row: Row, root: Path = ROOT) -> Path:
    """The module of a row."""
    return root / "lagm" / f"{row.module.replace('.', '/')}.py"


def stale(rows: Sequence[Row]) -> list[str]:
    """Rows whose text does not occur exactly once, a line each."""
    found = []
    for number, row in enumerate(ROWS):
        count = source(row).read_text(encoding="utf-8").count(row.old) if row in rows else 1
        if count == 1: continue
        found.append(f"row {number}: {row.old!r} occurs {count} times in lagm.{row.module}; it must occur once")
    return found


def arguments(tests: str) -> list[list[str]]:
    """The runs of pytest that a row asks for, each a file and perhaps -k and a choice."""
    runs: list[list[str]] = []
    for word in shlex.split(tests):
        if word.startswith("test_"): runs.append([f"tests/{word}"])
        else: runs[-1].append(word)
    return runs


def checks(rows: Sequence[Row]) -> list[list[str]]:
    """All tests of these rows in few runs: files asked for as a whole, and each other file with its choices."""
    runs = [run for row in rows for run in arguments(row.tests)]
    whole = list(dict.fromkeys(file for file, *choice in runs if not choice))
    parts: dict[str, list[str]] = {}
    for file, *choice in runs:
        if file not in whole: parts.setdefault(file, []).append(choice[1])
    chosen = [[file, "-k", " or ".join(f"({k})" for k in dict.fromkeys(ks))] for file, ks in parts.items()]
    return [whole] * bool(whole) + chosen


def prepare() -> None:
    """Import what every run of pytest needs, once, for all forks."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in ("numpy", "torch", "torchvision", "pytest"): importlib.import_module(name)


def _run(run: Sequence[str], copy: Path) -> None:
    """Run pytest in the copy, silently; the exit status is pytest's."""
    os.environ.update(PYTHONPATH=str(copy), OMP_NUM_THREADS="1")
    os.chdir(copy)
    sys.dont_write_bytecode, sys.path[0] = True, str(copy)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2): os.dup2(nowhere, stream)
    import pytest
    sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *run])))


def passes(run: Sequence[str], copy: Path) -> bool:
    """Whether these tests pass in the copy, in a process of their own."""
    process = multiprocessing.get_context(FORK).Process(target=_run, args=(run, copy))
    process.start()
    process.join(LIMIT)
    if process.is_alive(): process.kill()
    process.join()
    if process.exitcode == NO_TESTS: sys.exit(f"these choose no test: {' '.join(run)}")
    return process.exitcode == 0


def caught(row: Row, copy: Path) -> bool:
    """Whether the tests notice the mistake; the copy is as before afterwards."""
    path = source(row, copy)
    right = path.read_text(encoding="utf-8")
    path.write_text(right.replace(row.old, row.new), encoding="utf-8")
    try: return not all(passes(run, copy) for run in arguments(row.tests))
    finally: path.write_text(right, encoding="utf-8")


def chosen(words: Sequence[str]) -> list[Row]:
    """The rows that numbers and names of modules select; all without any."""
    if not words: return ROWS
    unknown = [word for word in words if not (word.isdigit() and int(word) < len(ROWS))
            and word not in {row.module for row in ROWS}]
    if unknown: sys.exit(f"no row {unknown[0]}: give numbers 0 to {len(ROWS) - 1}, or modules, such as matching")
    return [row for number, row in enumerate(ROWS) if str(number) in words or row.module in words]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="numbers of rows, or names of modules; none: all")
    parser.add_argument("--list", action="store_true", help="show the rows, and do nothing")
    asked = parser.parse_args()
    rows = chosen(asked.rows)
    if asked.list:
        for row in rows:
            print(f"{ROWS.index(row):3} {row.module:24} {row.old.strip()[:60]!r} -> {row.new.strip()[:40]!r}")
        return 0
    if wrong := stale(rows): return print(*wrong, sep="\n") or 1
    prepare()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("lagm", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        broken = [run for run in checks(rows) if not passes(run, copy)]
        for run in broken: print(f"without any mistake these tests fail already: {' '.join(run)}")
        if broken: return 1
        survivors = []
        for row in rows:
            began, killed = time.monotonic(), caught(row, copy)
            if not killed: survivors.append(row)
            result, seconds, text = "caught" if killed else "SURVIVES", time.monotonic() - began, row.old.strip()
            print(f"{ROWS.index(row):3} {row.module:24} {result:8} {seconds:5.0f} s  {text.splitlines()[0][:60]}",
                  flush=True)
    for row in survivors:
        print(f"survivor {ROWS.index(row)}: lagm.{row.module}: {row.old!r} -> {row.new!r} passes {row.tests}")
    print(f"{len(rows)} mistakes: " + (f"{len(survivors)} survive" if survivors else "none survives"))
    return 1 if survivors else 0


if __name__ == "__main__": sys.exit(main())
