"""Scores against the authors' numbers, an independent count, and the treatment of odd cases."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lagm.core.errors import InputError
from lagm.core.files import read_json, write_json
from lagm.evaluation.boundary import BoundaryScore
from lagm.evaluation.intervals import SCORES, bootstrap, picture_counts, scores, worst_pictures
from lagm.evaluation.metrics import ConfusionMatrix, Metrics, evaluate, metrics_from_counts, predict
from lagm.evaluation.record import evaluation_report
from lagm.models.modes import eval_mode

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "evaluation.npz") as arrays:
        return json.loads((GOLDEN / "evaluation.json").read_text()), dict(arrays)


def matrix_of(predictions, labels, n_classes):
    matrix = ConfusionMatrix(n_classes)
    matrix.update(predictions, labels)
    return matrix


def test_agrees_with_the_authors(golden):
    facts, arrays = golden
    metrics = matrix_of(arrays["pred"], arrays["gt"], facts["n_classes"]).compute()
    assert metrics.pixel_accuracy == pytest.approx(facts["metrics"]["pACC"], abs=1e-9)
    assert metrics.miou == pytest.approx(facts["metrics"]["mIoU"], abs=1e-9)
    assert metrics.fg_miou == pytest.approx(facts["metrics"]["fg_mIoU"], abs=1e-9)


def test_golden_has_an_absent_class_and_ignored_pixels(golden):
    facts, arrays = golden
    assert (arrays["gt"] == 255).any()
    matrix = matrix_of(arrays["pred"], arrays["gt"], facts["n_classes"])
    absent = (matrix.counts.sum(0) + matrix.counts.sum(1)) == 0
    metrics = matrix.compute()
    assert absent.sum() == 1 and metrics.iou[absent.nonzero().item()] == 0
    assert metrics.fg_miou_present == pytest.approx(metrics.fg_miou * 5 / 4)


def test_each_count_by_sets(golden):
    facts, arrays = golden
    metrics = matrix_of(arrays["pred"], arrays["gt"], facts["n_classes"]).compute()
    known = arrays["gt"] < facts["n_classes"]
    for c, iou in enumerate(metrics.iou):
        a, b = (arrays["gt"] == c) & known, (arrays["pred"] == c) & known
        assert iou == pytest.approx((a & b).sum() / max((a | b).sum(), 1))


def test_batches_do_not_matter(golden):
    facts, arrays = golden
    matrix = ConfusionMatrix(facts["n_classes"])
    for pred, gt in zip(arrays["pred"], arrays["gt"], strict=True):
        matrix.update(torch.as_tensor(pred), gt)
    assert matrix.counts.equal(matrix_of(arrays["pred"], arrays["gt"], facts["n_classes"]).counts)


def test_present_classes_are_those_of_the_truth():
    # class 2 is predicted but never true, class 3 is neither
    metrics = matrix_of(np.array([0, 1, 2, 0]), np.array([0, 1, 1, 0]), 4).compute()
    assert metrics.iou == [1, 0.5, 0, 0]
    assert metrics.fg_miou == pytest.approx(1 / 6) and metrics.fg_miou_present == 0.5


def test_false_positives_on_background_count():
    metrics = matrix_of(np.array([1, 1, 1, 1]), np.array([0, 0, 1, 1]), 2).compute()
    assert metrics.fg_miou == 0.5


def test_only_the_truth_is_ignored():
    matrix = matrix_of(np.array([0, 255, 9, 1]), np.array([0, 255, 7, 1]), 2)
    assert matrix.counts.tolist() == [[1, 0], [0, 1]]
    signed = matrix_of(np.array([0, 1]), np.array([-1, 1], dtype=np.int8), 2)
    assert signed.counts.tolist() == [[0, 0], [0, 1]]


def test_one_class_has_no_foreground():
    metrics = matrix_of(np.zeros(3, int), np.zeros(3, int), 1).compute()
    assert (metrics.miou, metrics.fg_miou, metrics.fg_miou_present) == (1, 0, 0)


@pytest.mark.parametrize(
    "predictions, labels, told",
    [
        (np.zeros((2, 3)), np.zeros((2, 3), int), "argmax"),
        (np.zeros((2, 3), int), np.zeros((3, 2), int), "shape"),
        (np.array([0, 4]), np.array([0, 1]), "0..3"),
        (np.array([0, -1]), np.array([0, 1]), "0..3"),
    ],
)
def test_mistakes_are_told_and_not_counted(predictions, labels, told):
    matrix = ConfusionMatrix(4)
    with pytest.raises(InputError, match=told):
        matrix.update(predictions, labels)
    assert matrix.counts.sum() == 0


def test_nothing_to_evaluate():
    with pytest.raises(InputError, match="no labelled pixels"):
        matrix_of(np.zeros(3, int), np.full(3, 255), 4).compute()
    with pytest.raises(InputError):
        ConfusionMatrix(0)


def test_metrics_are_plain_numbers():
    metrics = metrics_from_counts(torch.tensor([[3, 1], [0, 4]]))
    json.dumps(vars(metrics))
    assert isinstance(metrics, Metrics) and "FG-mIoU 80.00%" in str(metrics)


class Student(nn.Module):
    """Reads the class off the red channel; sums of its modes are checked."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bn = nn.BatchNorm2d(3)
        self.modes = []

    def forward(self, x):
        self.modes.append((self.training, self.bn.training, torch.is_grad_enabled(), len(x)))
        classes = torch.arange(4.0).view(1, 4, 1, 1)
        return -(self.bn(x)[:, :1] - classes / 2 + 1).square() * self.scale


@pytest.fixture
def labelled():
    masks = torch.randint(0, 4, (10, 6, 5), generator=torch.Generator().manual_seed(0))
    return (masks / 2 - 1)[:, None].expand(-1, 3, -1, -1), masks


def test_evaluate_a_network(labelled):
    images, masks = labelled
    student = Student()
    wrong = masks.clone()
    wrong[0] = 255
    wrong[1] = (wrong[1] + 1) % 4
    metrics = evaluate(student, images, wrong, 4, batch_size=4)
    assert metrics.pixel_accuracy == pytest.approx(8 / 9)
    assert [m[3] for m in student.modes] == [4, 4, 2]
    assert all(m[:3] == (False, False, False) for m in student.modes)
    assert metrics == evaluate(student, images, wrong, 4, batch_size=64)


def test_modes_are_restored_even_after_an_error(labelled):
    images, masks = labelled
    student = Student().train()
    student.bn.eval()
    evaluate(student, images, masks, 4)
    assert student.training and not student.bn.training
    with pytest.raises(RuntimeError), eval_mode(student):
        raise RuntimeError
    assert student.training and not student.bn.training
    assert student.bn.num_batches_tracked == 0


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [
    lambda net, x: torch.jit.freeze(torch.jit.trace(net, x)),
    lambda net, x: torch.export.export(net, (x,)).module()], ids=["TorchScript", "export"])
def test_what_has_one_mode_for_good_predicts_too(make):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).eval(), torch.rand(2, 3, 8, 8) * 2 - 1
    frozen = make(net, x)
    assert predict(frozen, x, batch_size=2).equal(net(x).argmax(1))
    with eval_mode(frozen, net.train()):
        assert not net.training
    assert net.training


def test_predict_gives_classes(labelled):
    images, masks = labelled
    predictions = predict(Student(), images, batch_size=3)
    assert predictions.equal(masks) and predictions.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_pictures_in_other_numbers_are_those_of_the_network(labelled, dtype):
    """What numpy gives is float64; a network in float32 is given what it computes in, and one in float64 as well."""
    images, masks = labelled
    assert predict(Student(), images.to(dtype)).equal(masks)
    assert predict(Student().double(), images.to(dtype)).equal(masks)
    assert evaluate(Student(), images.to(dtype), masks, 4).pixel_accuracy == 1


@pytest.mark.parametrize("shape", [(2, 1, 6, 5), (3, 6, 5), (2, 4, 6, 5)])
def test_what_has_another_shape_is_no_picture(shape):
    with pytest.raises(InputError, match=r"have shape .*; give \(n, 3, H, W\)"): predict(Student(), torch.zeros(shape))


@pytest.mark.parametrize("strange", [4, -5])
def test_numbers_that_are_no_class_are_told(labelled, strange):
    images, masks = labelled
    wrong = masks.clone()
    wrong[1] = strange
    with pytest.warns(UserWarning, match=f"the masks hold {strange}, which is none of the 4 classes"):
        scores = evaluate(Student(), images, wrong, 4)
    wrong[1] = 255
    assert scores == evaluate(Student(), images, wrong, 4), "they do not count"


def test_evaluate_needs_as_many_masks_as_pictures(labelled):
    images, masks = labelled
    with pytest.raises(InputError, match="10 pictures and 9 masks"):
        evaluate(Student(), images, masks[:9], 4)
    with pytest.raises(InputError):
        evaluate(Student(), images[:0], masks[:0], 4)


# ---- picture by picture


@pytest.fixture(scope="module")
def counts(golden):
    facts, arrays = golden
    return picture_counts(torch.as_tensor(arrays["pred"]), torch.as_tensor(arrays["gt"]), facts["n_classes"])


def test_scores_of_many_matrices_are_those_of_each(counts):
    for score in SCORES:
        assert scores(counts, score).tolist() == pytest.approx([getattr(metrics_from_counts(c), score) for c in counts])
    with pytest.raises(InputError, match="fg_miou"): scores(counts, "iou")


def test_pictures_may_differ_in_size(golden, counts):
    facts, arrays = golden
    cut = ([torch.as_tensor(a[:10 + i]) for i, a in enumerate(arrays["pred"])],
           [torch.as_tensor(a[:10 + i]) for i, a in enumerate(arrays["gt"])])
    assert picture_counts(*cut, facts["n_classes"]).shape == counts.shape
    with pytest.raises(InputError, match="9 predictions and 8 masks"):
        picture_counts(*[part[:n] for part, n in zip(cut, (9, 8))], 6)


def test_the_worst_pictures_come_first():
    right, half, wrong = (torch.tensor(c) for c in ([[9, 0], [0, 9]], [[9, 0], [5, 4]], [[9, 0], [9, 0]]))
    empty = torch.tensor([[18, 0], [0, 0]])  # shows no foreground: nothing to be wrong about
    assert worst_pictures(torch.stack([right, wrong, empty, half, wrong])) == [1, 4, 3, 0]


def test_the_bootstrap_against_a_plain_loop(counts):
    interval = bootstrap(counts, draws=4000)
    rng = np.random.RandomState(1)
    values = [metrics_from_counts(counts[rng.randint(0, len(counts), len(counts))].sum(0)).fg_miou for _ in range(1500)]
    low, high = np.percentile(values, [2.5, 97.5])
    assert interval.value == pytest.approx(metrics_from_counts(counts.sum(0)).fg_miou)
    assert (interval.low, interval.high) == (pytest.approx(low, abs=0.006), pytest.approx(high, abs=0.006))
    assert bootstrap(counts, draws=50) == bootstrap(counts, draws=50) != bootstrap(counts, draws=50, seed=1)


def test_a_paired_difference_is_narrower(counts):
    worse = counts.clone()
    worse[:, 0, 0] -= 5
    worse[:, 0, 1] += 5
    alone, paired = bootstrap(counts, "pixel_accuracy"), bootstrap(counts, "pixel_accuracy", versus=worse)
    assert paired.high - paired.low < (alone.high - alone.low) / 5 and paired.low > 0
    with pytest.raises(InputError, match="paired"): bootstrap(counts, versus=counts[:3])
    with pytest.raises(InputError, match="level"): bootstrap(counts, level=1)


def reference_boundary(predictions, labels, n_classes, radius):
    """By loops over pixels and all pairs of border pixels."""
    totals = np.zeros((4, n_classes), int)
    for guess, truth in zip(predictions, labels):
        known, found = truth < n_classes, []
        for mask in (guess, truth):
            points = [[] for _ in range(n_classes)]
            for y, x in np.ndindex(mask.shape):
                if not known[y, x]: continue
                near = [(y + dy, x + dx) for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))
                        if 0 <= y + dy < mask.shape[0] and 0 <= x + dx < mask.shape[1]]
                if any(known[p] and mask[p] != mask[y, x] for p in near): points[mask[y, x]].append((y, x))
            found.append([np.array(p).reshape(-1, 2) for p in points])
        for c in range(n_classes):
            a, b = found[0][c], found[1][c]
            close = (((a[:, None] - b[None]) ** 2).sum(-1) <= radius**2)
            totals[:, c] += [len(a), close.any(1).sum(), len(b), close.any(0).sum()]
    return totals


@pytest.mark.parametrize("tolerance, radius", [(0.0075, 1), (0.08, 2)])
def test_border_counts_against_loops(golden, tolerance, radius):
    facts, arrays = golden
    score = BoundaryScore(facts["n_classes"], tolerance)
    for pred, gt in zip(arrays["pred"], arrays["gt"]): score.update(pred[None], gt[None])
    assert np.array_equal(score.counts.numpy(),
                          reference_boundary(arrays["pred"], arrays["gt"], facts["n_classes"], radius))
    f, mean = score.compute()
    predicted, near_truth, true, near_prediction = score.counts.double().numpy()
    p, r = near_truth[1] / predicted[1], near_prediction[1] / true[1]
    assert (f[1] == pytest.approx(2 * p * r / (p + r))
            and mean == pytest.approx(np.mean([v for v, t in zip(f[1:], true[1:]) if t])))


def test_border_mistakes():
    with pytest.raises(InputError, match="B, H, W"):
        BoundaryScore(3).update(torch.zeros(4, 4, dtype=int), torch.zeros(4, 4, dtype=int))
    assert BoundaryScore(3).compute() == ([0.0] * 3, 0.0)
    score = BoundaryScore(2)
    # no borders: the frame of the picture is none
    score.update(torch.zeros(1, 4, 4, dtype=int), torch.ones(1, 4, 4, dtype=int))
    assert score.counts.sum() == 0


def test_the_report_is_whole_and_can_be_written(golden, tmp_path):
    facts, arrays = golden
    names = [f"class {c}" for c in range(facts["n_classes"])]
    report = evaluation_report(torch.as_tensor(arrays["pred"]), torch.as_tensor(arrays["gt"]), names, draws=50,
                               checkpoint="x")
    write_json(tmp_path / "metrics.json", report)
    back = read_json(tmp_path / "metrics.json")
    assert (back["metrics"]["miou"] == pytest.approx(facts["metrics"]["mIoU"]) and list(back["iou"]) == names
            and back["checkpoint"] == "x")
    assert back["intervals"]["miou"]["low"] <= back["metrics"]["miou"] <= back["intervals"]["miou"]["high"]
