"""Mistakes that a newcomer makes between a folder of pictures and a folder of masks: one sentence, and nothing lost."""

import os
import resource
import signal
import sys
import warnings

import numpy as np
import pytest
import shell
from PIL import Image

from lagm.core.errors import InputError
from lagm.core.tensors import load_tensors
from lagm.data.demo import Avatars, stack
from lagm.data.folder import read_classes, save_folder
from lagm.data.images import read_image, read_mask
from lagm.experiments import project as own
from lagm.experiments.project import Settings, new_project, run_project
from lagm.labelling.album import Album, save_painted
from lagm.training.checkpoints import digest
from lagm.training.drawn import draw_for_labelling, read_latents

CLASSES = list(Avatars().classes)


def lagm(folder, *words, code=2):
    """What a command says; one line where it fails."""
    done = shell.lagm(*words, cwd=folder)
    assert done.returncode == code, done.stdout + done.stderr
    assert code == 0 or done.stderr.count("lagm: error: ") == 1 and len(done.stderr.strip().splitlines()[-1]) < 400
    return done.stdout + done.stderr


@pytest.fixture
def desk(tmp_path):
    """A folder with pics/, four pictures."""
    images, _ = stack(Avatars(), range(4))
    save_folder(tmp_path / "made", [f"f{i}" for i in range(4)], images, None, Avatars().labels)
    (tmp_path / "made" / "images").rename(tmp_path / "pics")
    return tmp_path


def project(desk, painted=(0, 1), **settings):
    new_project(desk / "p", desk / "pics", CLASSES, Settings(**{"size": 16, "steps": 1, "width": 4} | settings))
    album, masks = Album(desk / "p"), stack(Avatars(), range(4))[1].numpy().astype(np.uint8)
    for i in painted: save_painted(album, i, masks[i])
    return desk / "p"


# ---- lagm new


@pytest.mark.parametrize("classes, said", [
    ("", "class without a name"), (",,", "class without a name"), ("background,skin,", "a comma too many"),
    ("background skin", "one class only"), ("a,a", "repeats"), (",".join(map(str, range(300))), "300")])
def test_classes_that_cannot_be(desk, classes, said):
    assert said in lagm(desk, "new", "p", "--images", "pics", "--classes", classes)
    assert not (desk / "p").exists()


@pytest.mark.parametrize("words, said", [
    (["--images", "nowhere"], "there is no folder"), (["--images", "pics/f0.png"], "there is no folder"),
    ([], "--images FOLDER"), (["--images", "pics", "--size", "100"], "multiple of 8"),
    (["--images", "pics", "--size", "99999992"], "2048 at most"),
    (["--images", "pics", "--generator", "g.pt"], "no checkpoint"),
    (["--images", "pics", "--generator", "nowhere.pkl"], "there is no generator")])
def test_beginnings_that_cannot_be(desk, words, said):
    (desk / "g.pt").write_bytes(b"hello")
    before = sorted(path.name for path in desk.iterdir())
    assert said in lagm(desk, "new", "p", "--classes", "background,skin", *words)
    assert sorted(path.name for path in desk.iterdir()) == before


def test_what_is_left_out_is_said(desk):
    for name in ("IMG_1.HEIC", "IMG_2.heic", "moving.gif"): (desk / "pics" / name).write_bytes(b"....ftypheic")
    Image.new("RGB", (8, 8)).save(desk / "pics" / "f9.jpg"), Image.new("L", (8, 8)).save(desk / "pics" / "f9.png")
    Image.fromarray(np.random.default_rng(0).random((9, 9), np.float32)).save(desk / "pics" / "depth.tif")
    said = lagm(desk, "new", "my 'p' é/", "--images", "pics", "--classes", "background,große Nase", code=0)
    assert "IMG_1.HEIC (and 2 more) is of a format that is not read here" in said and "f9.png looks like a mask" in said
    assert "depth.tif has 32-bit pixels" in said and "my 'p' é: 5 pictures" in said
    assert "lagm label 'my '\"'\"'p'\"'\"' é'" in said and "é/road.ipynb" in said
    (desk / "raw").mkdir(), (desk / "pics" / "IMG_1.HEIC").rename(desk / "raw" / "IMG_1.HEIC")
    assert ".png, .jpg" in lagm(desk, "new", "q", "--images", "raw", "--classes", "background,skin")


def test_a_dark_picture_of_16_bits_is_said(tmp_path):
    """A camera of 12 bits fills a sixteenth of the range: what is learnt from is black."""
    values = np.random.default_rng(0).integers(0, 4096, (8, 8), np.uint16)
    Image.fromarray(values).save(tmp_path / "dark.png"), Image.fromarray(values * 16).save(tmp_path / "full.png")
    with pytest.warns(UserWarning, match="dark.png has 16-bit pixels of 3976 at most"):
        read_image(tmp_path / "dark.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(tmp_path / "full.png")


# ---- lagm label, lagm run, lagm predict


def test_ports_and_folders(desk):
    assert "--classes background" in lagm(desk, "label", "pics", "--no-browser")
    assert "port 80000 cannot be" in lagm(desk, "label", "pics", "--classes", "a,b", "--no-browser", "--port", 80000)
    assert "pics is a folder, but no project" in lagm(desk, "run", "pics")
    assert "there is no experiment 'pisc'" in lagm(desk, "run", "pisc")


def test_too_early(desk):
    project(desk, painted=())
    assert "no picture is labelled yet. Next: lagm label p" in lagm(desk, "run", "p")
    for command in (("predict", "p", "pics", "-o", "out"), ("serve", "p", "--no-browser")):
        assert "p is not trained yet: lagm run p" in lagm(desk, *command)
    assert not (desk / "out").exists()


def test_a_generator_that_is_gone_asks_for_it_not_for_paint(desk):
    project(desk, generator="gone.pth")
    for words in (("run", "p"), ("run", "p", "--dry-run")):
        said = lagm(desk, *words)
        assert "the generator gone.pth is not there: put it there, or change generator in p/project.yaml" in said
        assert "lagm label" not in said
    (desk / "p" / "masks" / "f1.png").unlink()
    save_painted(Album(desk / "p"), 0, np.tri(64, dtype=np.uint8))
    said = lagm(desk, "run", "p")
    assert "nothing can be learnt about" in said and "put it there" in said and "lagm label" not in said


@pytest.mark.parametrize("value", [0, 1])
def test_one_class_is_nothing_to_learn(desk, value):
    folder = project(desk, painted=())
    save_painted(Album(folder), 0, np.full((64, 64), value, np.uint8))
    assert f"one class only, {CLASSES[value]}: paint another one" in lagm(desk, "run", "p")


def test_black_and_white_masks_are_told_what_white_means(desk):
    """White is 255, and 255 means 'no label': the commonest mask of two classes shows background alone."""
    new_project(desk / "p", desk / "pics", ["background", "face"], Settings(size=16, steps=1, width=4))
    (desk / "p" / "masks").mkdir(exist_ok=True)
    for i in range(2): Image.fromarray(np.tri(64, dtype=np.uint8) * 255).save(desk / "p" / "masks" / f"f{i}.png")
    said = lagm(desk, "run", "p")
    assert "whose 255 (white) stands for face, save them with 1 in its place" in said


def test_black_and_white_masks_come_in_as_the_one_part(desk):
    (desk / "bw" / "masks").mkdir(parents=True)
    (desk / "pics").rename(desk / "bw" / "images")
    for i in range(2): Image.fromarray(np.tri(64, dtype=np.uint8) * 255).save(desk / "bw" / "masks" / f"f{i}.png")
    said = lagm(desk, "prepare", "masks", "bw", "--classes", "background,face", "--out", "own", code=0)
    assert "255 was taken for face" in said and "--classes background,face\n" in said
    assert (read_mask(desk / "own" / "masks" / "f0.png") == np.tri(64)).all()
    lagm(desk, "new", "p", "--images", "own", "--classes", "background,face", "--size", 16, code=0)
    assert (read_mask(desk / "p" / "masks" / "f1.png") == np.tri(64)).all()
    Image.fromarray(np.tri(64, dtype=np.uint8)).save(desk / "bw" / "masks" / "f2.png")  # one that knows better
    assert "255 was taken" not in lagm(desk, "prepare", "masks", "bw", "--classes", "face", "--out", "two", code=0)
    assert (read_mask(desk / "two" / "masks" / "f0.png") == np.tri(64) * 255).all()


def test_what_nobody_labelled_does_not_become_the_one_part(desk):
    """The kit's own masks, files with a palette, say 255 for what is not painted yet."""
    (desk / "own" / "images").parent.mkdir()
    (desk / "pics").rename(desk / "own" / "images")
    mask = np.full((64, 64), 255, np.uint8)
    mask[:5] = 0
    save_painted(Album(desk / "own", ["background", "face"]), 0, mask)
    for words in ((), ("--classes", "face")):
        said = lagm(desk, "prepare", "masks", "own", *words, "--out", f"out{len(words)}", code=0)
        assert "255 was taken" not in said
        assert (read_mask(desk / f"out{len(words)}" / "masks" / "f0.png") == mask).all()


def test_masks_of_one_class_are_no_mistake_in_the_kit(desk):
    (desk / "m" / "masks").mkdir(parents=True)
    (desk / "pics").rename(desk / "m" / "images")
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(desk / "m" / "masks" / "f0.png")
    assert "1 labelled" in lagm(desk, "prepare", "masks", "m", "--classes", "background", "--out", "own", code=0)


def test_yolo_numbers_stay_where_a_background_is_named(desk):
    """In YOLO the background, if named, has the number 0: the classes after it keep theirs."""
    (desk / "y" / "labels").mkdir(parents=True)
    (desk / "pics").rename(desk / "y" / "images")
    (desk / "y" / "labels" / "f0.txt").write_text("1 0.1 0.1 0.9 0.1 0.9 0.9 0.1 0.9\n")
    lagm(desk, "prepare", "yolo", "y", "--classes", "background,disc,core", "--out", "own", code=0)
    assert read_classes(desk / "own" / "classes.txt").classes == ("background", "disc", "core")
    assert read_mask(desk / "own" / "masks" / "f0.png")[32, 32] == 1


@pytest.mark.parametrize("words", ["disc,core", "disc core", "background,disc,core", "background disc, core"])
def test_classes_to_prepare_in_every_form(desk, words):
    (desk / "m" / "masks").mkdir(parents=True)
    (desk / "pics").rename(desk / "m" / "images")
    Image.fromarray(np.tri(64, dtype=np.uint8) * 2).save(desk / "m" / "masks" / "f0.png")
    said = lagm(desk, "prepare", "masks", "m", "--classes", *words.split(" "), "--out", "own", code=0)
    assert read_classes(desk / "own" / "classes.txt").classes == ("background", "disc", "core")
    assert "--classes background,disc,core\n" in said


def test_masks_without_a_list_of_classes_are_not_left_behind_in_silence(desk):
    (desk / "pics" / "masks").mkdir()
    Image.fromarray(np.tri(64, dtype=np.uint8)).save(desk / "pics" / "masks" / "f0.png")
    said = lagm(desk, "new", "p", "--images", "pics", "--classes", "background,face", code=0)
    assert "left out: pics/masks: no classes.txt beside it says what its numbers mean" in said


# ---- lagm run, again


def weights(folder): return digest([*load_tensors(folder / "results" / "segmenter.safetensors")[0].values()])


def test_what_is_finished_is_kept_until_something_changes(desk):
    folder = project(desk)
    first, made = run_project(folder, progress=False), weights(folder)
    assert not first["kept"] and run_project(folder, progress=False)["kept"] and weights(folder) == made
    said = lagm(desk, "run", "p", code=0)
    assert "kept, since labels, settings and generator are the same (--force trains anew)" in said
    assert not run_project(folder, progress=False, again=True)["kept"] and weights(folder) == made, "the same digits"
    assert "kept" not in lagm(desk, "run", "p", "--force", code=0)
    text = (folder / "project.yaml").read_text()
    (folder / "project.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    assert not run_project(folder, progress=False)["kept"] and weights(folder) != made
    mask = np.full((64, 64), 1, np.uint8)
    save_painted(Album(folder), 0, mask)
    assert not run_project(folder, progress=False)["kept"]
    classes = folder / "classes.txt"
    classes.write_text(classes.read_text().replace("nose", "snout"))
    facts = run_project(folder, progress=False)
    header = load_tensors(folder / "results" / "segmenter.safetensors")[1]
    assert not facts["kept"] and "snout" in header["labels"]["classes"], "another name is another segmenter"
    (folder / "results" / "segmenter.safetensors").unlink()
    assert not run_project(folder, progress=False)["kept"]


def test_a_score_alone_does_not_train_again_and_stays(desk, monkeypatch):
    folder = project(desk)
    run_project(folder, progress=False)
    trained = []
    whole = own.train_project
    monkeypatch.setattr(own, "train_project", lambda *a, **k: trained.append(len(a[1])) or whole(*a, **k))
    scored = run_project(folder, folds=2, progress=False)
    assert trained == [1, 1] and scored["kept"] and scored["cross_validation"]["folds"] == 2
    assert run_project(folder, progress=False)["cross_validation"] == scored["cross_validation"]
    assert run_project(folder, folds=2, progress=False)["kept"] and trained == [1, 1]


def test_folds_that_were_ended_in_the_middle_go_on(desk, monkeypatch):
    whole, folder, trained = own.train_project, project(desk, painted=(0, 1, 2)), []
    expected = run_project(folder, folds=3, progress=False, again=True)["cross_validation"]

    def ended(*arguments, **options):
        trained.append(options["checkpoint"].name)
        if len(trained) == 2: raise KeyboardInterrupt
        return whole(*arguments, **options)

    monkeypatch.setattr(own, "train_project", ended)
    for name in ("metrics.json", "segmenter.safetensors"): (folder / "results" / name).unlink()
    with pytest.raises(KeyboardInterrupt): run_project(folder, folds=3, progress=False)
    left = folder / "results" / trained[0]
    assert left.is_file() and "-fold1of3" in left.name
    assert run_project(folder, folds=3, progress=False)["cross_validation"] == expected
    assert trained[2] == trained[0] and len(trained) == 6
    assert not [*(folder / "results").glob("run-*")], "a finished run leaves nothing to go on from"


def test_a_run_without_folds_leaves_those_that_are_done(desk, monkeypatch):
    whole, folder, trained = own.train_project, project(desk, painted=(0, 1, 2)), []
    run_project(folder, progress=False)

    def ended(*arguments, **options):
        trained.append(options["checkpoint"].name)
        if len(trained) == 3: raise KeyboardInterrupt
        return whole(*arguments, **options)

    monkeypatch.setattr(own, "train_project", ended)
    with pytest.raises(KeyboardInterrupt): run_project(folder, folds=3, progress=False)
    left = {path.name for path in (folder / "results").glob("run-*")}
    assert len({name for name in left if "-fold" in name and ".step-" not in name}) == 2
    assert run_project(folder, progress=False)["kept"]
    assert {path.name for path in (folder / "results").glob("run-*")} == left
    assert run_project(folder, folds=3, progress=False)["cross_validation"]["folds"] == 3
    assert not [*(folder / "results").glob("run-*")]


def test_force_sets_aside_what_a_stopped_run_left(desk):
    folder = project(desk)
    run_project(folder, progress=False)
    name = load_tensors(folder / "results" / "segmenter.safetensors")[1]["made_of"]
    state = folder / "results" / f"{name}.safetensors"
    state.write_bytes(b"of a run that was stopped")
    assert not run_project(folder, progress=False, again=True)["kept"]
    assert [path.read_bytes() for path in (folder / "results").rglob(state.name)] == [b"of a run that was stopped"]
    assert not state.exists()


def test_a_generator_that_nobody_can_tell_apart_is_trained_with_again(desk, monkeypatch):
    """One with no weights to look at: whether it is the same, only a run can say."""
    monkeypatch.setattr(own, "generator_digest", lambda generator: None)
    folder = project(desk)
    run_project(folder, progress=False)
    assert run_project(folder, progress=False)["kept"], "there is no generator"
    text = (folder / "project.yaml").read_text()
    (folder / "project.yaml").write_text(text.replace("generator: ''", "generator: big-ears"))
    for _ in range(2): assert not run_project(folder, progress=False)["kept"]
    name = load_tensors(folder / "results" / "segmenter.safetensors")[1]["made_of"]
    whole = own.train_project
    monkeypatch.setattr(own, "train_project", lambda *a, **k: seen.append(k["checkpoint"].exists()) or whole(*a, **k))
    seen, state = [], folder / "results" / f"{name}.safetensors"
    state.write_bytes(b"of a run that was stopped")
    with pytest.raises(InputError, match=state.name): run_project(folder, progress=False)
    assert seen == [True] and state.exists(), "a stopped run is gone on from, not set aside"


def test_a_short_run_leaves_a_stopped_long_one(desk):
    folder = project(desk, steps=3)
    images, masks, data = own.labelled_pictures(folder, 16)
    about = own._made_of(folder, own.read_settings(folder), data.labels, None)
    long = own.run_file(folder / "results", own.read_settings(folder), images, masks, about)
    (folder / "results").mkdir()
    long.write_bytes(b"state")
    other = long.with_name("run-00000000-00000000.safetensors")  # of other labels
    other.write_bytes(b"state")
    text = (folder / "project.yaml").read_text()
    (folder / "project.yaml").write_text(text.replace("steps: 3", "steps: 1"))
    run_project(folder, progress=False)
    assert [path.name for path in (folder / "results").glob("run-*")] == [long.name]


def test_one_labelled_picture(desk):
    project(desk, painted=(0,))
    said = lagm(desk, "run", "p", code=0)
    assert "learnt from 1 picture, " in said and "label a second picture" in said and "--folds" not in said
    assert "2 folds of 1 labelled picture cannot be; label a second picture" in lagm(desk, "run", "p", "--folds", 2)


def test_a_picture_that_is_none_does_not_cost_the_training(desk):
    folder = project(desk)
    (folder / "images" / "f3.png").write_bytes(b"not a picture")
    with pytest.warns(UserWarning, match="f3.png is not a picture"): facts = run_project(folder, progress=False)
    assert facts["label_next"] == ["f2"] and (folder / "results" / "segmenter.safetensors").is_file()


@pytest.mark.parametrize("name, content, said", [
    ("f2.png", np.full((30, 30), 1, np.uint8), "is 30 x 30 pixels, but its picture"),
    ("f2.png", np.full((64, 64), 99, np.uint8), "holds the value 99"),
    ("zz.png", np.full((64, 64), 1, np.uint8), "no image of the same name"),
    ("f2.png", np.eye(64, dtype=np.uint8)[..., None] * np.array([9, 0, 0], np.uint8), "is a coloured picture")])
def test_masks_from_elsewhere(desk, name, content, said):
    folder = project(desk)
    Image.fromarray(content).save(folder / "masks" / name)
    assert said in lagm(desk, "run", "p")


def test_a_generator_of_other_pictures_is_said(desk, tmp_path):
    from tiny import tiny_generator

    from lagm.generators.weights import save_generator

    folder = project(desk, generator="g.safetensors")
    save_generator(folder / "g.safetensors", tiny_generator().network)
    with pytest.warns(UserWarning, match="draws other pictures than those"): run_project(folder, progress=False)
    assert (folder / "results" / "generator.png").is_file()


# ---- no right to write, no room, ended in the middle


def with_little_room(limit, work):
    """Do `work` in a process that cannot write a file of more than `limit` bytes; what it raised, in words."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try: work()
        except BaseException as error: os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally: os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as file: said = file.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of the file size is of POSIX")
def test_a_full_disk_leaves_no_half_project(desk):
    said = with_little_room(1000, lambda: new_project(desk / "p", desk / "pics", CLASSES))
    assert said.startswith("InputError: cannot make the project") and "make room" in said
    assert sorted(path.name for path in desk.iterdir()) == ["made", "pics"]
    project(desk)


def test_a_place_that_cannot_be_written(desk):
    (desk / "file").write_text("")
    assert "cannot make the project file/p" in lagm(desk, "new", "file/p", "--images", "pics", "--classes", "a,b")
    folder = project(desk)
    (folder / "results").write_text("in the way")
    with pytest.raises(InputError, match="cannot write to"): run_project(folder, progress=False)


def test_drawing_that_was_ended_in_the_middle_begins_again(tmp_path):
    from tiny import tiny_generator

    class Ended(type(tiny_generator())):
        def __call__(self, *latents):
            if (tmp_path / "d" / ".drawing" / "0001.png").exists(): raise KeyboardInterrupt
            return super().__call__(*latents)

    generator = tiny_generator()
    generator.__class__ = Ended
    with pytest.raises(KeyboardInterrupt): draw_for_labelling(generator, tmp_path / "d", 3)
    assert not (tmp_path / "d" / "images").exists()
    draw_for_labelling(tiny_generator(), tmp_path / "d", 3)
    assert [path.name for path in sorted((tmp_path / "d").iterdir())] == ["images", "latents.safetensors"]
    assert read_latents(tmp_path / "d")[1]["names"] == [path.stem for path in sorted((tmp_path / "d/images").iterdir())]


# ---- what comes after


def test_the_next_step_knows_what_the_segmenter_was_made_of(desk):
    run_project(project(desk), progress=False)
    assert "next: lagm predict p/" in own.next_step(desk / "p").replace(f"{desk}/", "")
    said = lagm(desk, "run", "p", "--dry-run", code=0)
    assert "made of what it is now" in said and "next: lagm predict p/results" in said
    assert "p would be trained" in lagm(desk, "run", "p", "--dry-run", "--force", code=0)
    assert "50 folds of 2 labelled pictures cannot be" in lagm(desk, "run", "p", "--dry-run", "--folds", "50")
    save_painted(Album(desk / "p"), 2, stack(Avatars(), [2])[1][0].numpy().astype(np.uint8))
    assert own.next_step(desk / "p").startswith(f"next: lagm run {desk / 'p'}: labels, settings, generator or the kit")
    assert "p would be trained" in lagm(desk, "run", "p", "--dry-run", code=0)


def test_a_project_is_not_called_none(desk):
    project(desk)
    assert "p is a project: lagm run p, alone" in lagm(desk, "show", "p")
    assert "p is a project: lagm run p, alone" in lagm(desk, "run", "p", "p")


def test_a_project_without_its_pictures_or_classes(desk):
    (project(desk) / "results").mkdir()
    (desk / "p" / "images" / "f0.png").rename(desk / "p" / "results" / "look.png")
    (desk / "p" / "images").rename(desk / "p" / "away")
    for words in (("run", "p"), ("label", "p", "--no-browser")):
        assert "there is no p/images, where the pictures of a project are" in lagm(desk, *words)
    (desk / "p" / "away").rename(desk / "p" / "images")
    (desk / "p" / "classes.txt").unlink()
    assert "e.g. lagm label p --classes background,skin" in lagm(desk, "run", "p")


def test_predict_that_labels_nothing_fails(desk):
    run_project(project(desk), progress=False)
    (desk / "bad").mkdir()
    (desk / "bad" / "c.png").write_bytes((desk / "pics" / "f0.png").read_bytes()[:300])
    said = lagm(desk, "predict", "p", "bad", "-o", "out", "--format", "labelme")
    assert "no picture of bad could be labelled: " in said and "c.png" in said and "lagm prepare" not in said
    said = lagm(desk, "predict", "p", "pics", "-o", "out", "--tolerance", "1")
    assert "--tolerance is for polygons" in said and "pictures:" not in said
    assert "--psi is 1.5; give 0 to 1" in lagm(desk, "generate", "-o", "drawn", "--n", "1", "--psi", "1.5")
