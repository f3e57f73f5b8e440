"""What the code in a user's file returns is checked before it is trained with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from research.data.augmentation import Augmentation, AugmentationPipeline
from research.data.batches import make_batches
from research.data.source import Example, checked
from research.data.split_arrays import SplitArrays
from research.loop.builder import make_task, shape_of
from research.optimization.groups import make_group
from research.optimization.schedules import Schedule
from research.runs.tracker import Tracker, open_tracker
from research.system.errors import UserError
from research.system.program import ended_by_a_line
from research.system.python_file import load_from_file
from research.tasks.checks import check_gradients, sum_shapes
from research.tasks.task import Gradients, Task
from research.train import train
from tests.helpers import SMALL_CONFIG, SMALL_RUN, run_script
from tests.launcher import ROOT
from tests.learners import CONFIG, feed, make_learner, some_photos

TASK = "from research.tasks.task import Task\nclass Mine(Task):\n"
SOURCE = """
from research.data.source import Example, Source
class Mine(Source):
    class_names = ("a", "b")
    given, title = b"", "one"
    def count(self, split): return 2
    def examples(self, split): yield Example(self.given, 0, self.title)
"""
AUGMENTATION = (
    "from research.data.augmentation import Augmentation\n"
    "class Mine(Augmentation):\n    numbers = 1\n"
)


@pytest.mark.parametrize(
    ("flag", "content", "message"),
    [
        ("--task=FILE:Mine", None, "there is no file"),
        ("--task=FILE:Mine", "other = 1", "the file defines no Mine"),
        ("--task=FILE:Mine", "class Mine: pass", "is not a subclass of research.tasks.task.Task"),
        ("--task=FILE:Mine", "def broken(:", "cannot be imported (SyntaxError"),
        ("--task=FILE:Mine", "import no_such_thing", "(ModuleNotFoundError"),
        ("--task=unknown", "", "expected one of: classification, multi_label, FILE.py:NAME"),
        ("--source=FILE:Mine", "class Mine: pass", "an object of Mine; expected a subclass of"),
        (
            "--source=FILE:Mine",
            "from research.data.source import Source\nclass Mine(Source): pass",
            "which does not define class_names, count, examples",
        ),
        *(
            ("--source=FILE:Mine", f"{SOURCE}{line}\n", message)
            for line, message in {
                "    class_names = 'ab'": "whose class_names is 'ab'; expected a tuple of texts",
                "    class_names = ('a', 1)": "whose class_names is ('a', 1); expected",
                "    summary = 3": "whose summary is 3; expected a text",
                "    def count(self, split): pass": "whose count('train') is None; expected",
                "    def count(self, split): return 2.0": "whose count('train') is 2.0; expected",
                "    random_access = True": "which does not define listed, read",
                "    def examples(self, split): yield None": "the source gives None; expected",
                "    given = [1]": "the source gives the photo 'one' as list; expected",
                "    title = 1": "the source gives an example whose name is 1; expected a",
            }.items()
        ),
        ("--augmentation=FILE:Mine", "Mine = 3", "is not a subclass of"),
        ("--backbone_optimizer=FILE:Mine", "Mine = 3", "is not a class or function"),
        (
            "--task=FILE:Mine",
            "from research.tasks.task import Task\n"
            "class Mine(Task):\n"
            "    def losses(self, logits, batch):\n"
            "        return 0.0 * logits\n",
            "Mine.losses returns a tensor of float32 and shape (3, 1) for 3 examples; expected",
        ),
        (
            "--task=FILE:Mine",
            "import tensorflow as tf\n"
            "from research.tasks.task import Task\n"
            "class Mine(Task):\n"
            "    def metrics(self, logits, batch):\n"
            "        return {'histogram': tf.ones((3, 5))}\n",
            "remove means that are not single numbers before you call super().figures",
        ),
        (
            "--task=FILE:Mine",
            "import keras\n"
            "from research.tasks.task import Task\n"
            "class Mine(Task):\n"
            "    def make_head(self, shape, names, seed):\n"
            "        return super().make_head(shape, names, seed)[0], keras.layers.Dense(7)\n",
            "expected float32 (batch, 1 or 2)",
        ),
        (
            "--task=FILE:Mine",
            TASK + "    def make_head(self, shape, names, seed):\n"
            "        return super().make_head(shape, names, seed)[1]\n",
            "from make_head; expected two Keras layers, the pooling and the head",
        ),
        (
            "--task=FILE:Mine",
            TASK + "    def losses(self, logits, batch): pass\n",
            "Mine.losses returns None for 3 examples; expected one loss for each",
        ),
        (
            "--task=FILE:Mine",
            TASK + "    def metrics(self, logits, batch): return [1.0]\n",
            "Mine.metrics returns [1.0]; expected a dictionary",
        ),
        (
            "--task=FILE:Mine",
            TASK + "    def metrics(self, logits, batch): return {'mine': None}\n",
            "Mine.metrics returns 'mine' as None for 3 examples; expected float32 of shape (3, ",
        ),
        (
            "--task=FILE:Mine",
            TASK + "    def metrics(self, logits, batch): return {1: logits[:, 0]}\n",
            "Mine.metrics returns the name 1; expected a string",
        ),
        (
            "--task=FILE:Mine",
            TASK + "    def metrics(self, logits, batch): return {'loss': logits[:, 0]}\n",
            "Mine.metrics returns the reserved name 'loss'; rename it",
        ),
        (
            "--task=FILE:Mine",
            "import numpy as np\n" + TASK + "    def losses(self, logits, batch):\n"
            "        return np.zeros(logits.shape[0], np.float32)\n",
            "Mine.losses returns array([0., 0., 0.], dtype=float32) for 3 examples",
        ),
        (
            "--task=FILE:Mine",
            "import tensorflow as tf\n" + TASK + "    def losses(self, logits, batch):\n"
            "        return tf.cast(logits[:, 0], tf.float64)\n",
            "Mine.losses returns a tensor of float64 and shape (3,) for 3 examples",
        ),
        (
            "--task=FILE:Mine",
            TASK + "    def __init__(self, label_smoothing=0.0, class_weights=None): pass\n",
            "the task Mine has None; call super().__init__(label_smoothing, class_weights)",
        ),
        (
            "--task=FILE:Mine",
            "import keras\n" + TASK + "    def __init__(self, **settings):\n"
            "        super().__init__(**settings)\n"
            "        self.parts = [keras.layers.Dense(1)]\n"
            "    def losses(self, logits, batch):\n"
            "        return self.parts[0](logits)[:, 0]\n",
            "the task Mine has variables in 'parts' that are neither trained nor saved",
        ),
        (
            "--augmentation=FILE:Mine",
            AUGMENTATION + "    def apply(self, photos, numbers): return photos[:, ::2]\n",
            "augmentation Mine returns float32 (None, 16, 32, 3) for float32 (None, 32, 32, 3)",
        ),
        (
            "--augmentation=FILE:Mine",
            AUGMENTATION + "    def apply(self, photos, numbers): pass\n",
            "augmentation Mine returns None; expected a tensor of shape (None, 32, 32, 3)",
        ),
        (
            "--augmentation=FILE:Mine",
            AUGMENTATION + "    def change_pixels(self, photos, numbers): return photos / 2\n",
            "augmentation Mine returns float64 (2, 32, 32, 3) for uint8 (2, 32, 32, 3)",
        ),
        (
            "--augmentation=FILE:Mine",
            AUGMENTATION + "    def change_pixels(self, photos, numbers): return list(photos)\n",
            "expected a NumPy array of shape (2, 32, 32, 3)",
        ),
        (
            "--augmentation=FILE:Mine",
            AUGMENTATION
            + "    def draw(self, generator, photos): return generator.random((photos, 2))\n",
            "draw of augmentation Mine returns the shape (2, 2); expected numbers of the shape",
        ),
        (
            "--augmentation=FILE:Mine",
            AUGMENTATION + "    numbers = -1\n",
            "augmentation Mine has numbers = -1; expected an integer of at least 0",
        ),
        (
            "--augmentation=FILE:Mine",
            AUGMENTATION + "    def __init__(self, strength): pass\n",
            "whose call without arguments failed (TypeError: Mine.__init__() missing 1 required",
        ),
        (
            "--head_optimizer=FILE:Mine",
            "def Mine(): pass\n",
            "whose call with a learning rate failed (TypeError: Mine() takes 0 positional",
        ),
        (
            "--head_optimizer=FILE:Mine",
            "def Mine(rate): return 3\n",
            "the optimizer of the group 'head' is 3; expected an object of a subclass of keras.",
        ),
        (
            "--head_schedule=FILE:Mine",
            "def Mine(share):\n    return 1.0 if share < 0.5 else 0.1\n",
            "whose call with a share of the steps failed (OperatorNotAllowedInGraphError",
        ),
        (
            "--head_schedule=FILE:Mine",
            "import tensorflow as tf\ndef Mine(share): return tf.stack([share, share])\n",
            "which returns float32 (2,); expected one number",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_anything_is_written(
    flag, content, message, tmp_path, photo_folder, one_device
):
    if content is not None:
        (tmp_path / "mine.py").write_text(content)
    name, _, value = flag.removeprefix("--").partition("=")
    value = value.replace("FILE", f"{tmp_path}/mine.py")
    photos = {} if name == "source" else {"image_folder": str(photo_folder)}
    settings = {name: (value,) if name == "augmentation" else value, **photos}
    with pytest.raises(UserError) as refused:
        train(dataclasses.replace(SMALL_CONFIG, ckpt_dir=str(tmp_path / "run"), **settings))
    assert message in str(refused.value)
    assert not Path(tmp_path, "run").exists()


def test_a_failing_method_is_one_line_and_nothing_is_written(tmp_path, photo_folder):
    (tmp_path / "mine.py").write_text(
        TASK + "    def losses(self, logits, batch):\n"
        "        losses = logits[:, 0]\n"
        "        if losses[0] > 0: losses *= 2\n"
        "        return losses\n"
    )
    flags = [*SMALL_RUN, "--ckpt_dir=run", f"--image_folder={photo_folder}", "--task=mine.py:Mine"]
    process = run_script(tmp_path, "run_train.py", *flags)
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert "mine.py', line 5, in losses: OperatorNotAllowedInGraphError: Using a symbolic" in line
    assert not Path(tmp_path, "run").exists()


def test_a_method_that_fails_in_the_input_pipeline_is_one_line(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        AUGMENTATION + "    def change_pixels(self, photos, numbers):\n"
        "        if photos.max() > 2:\n"
        "            raise ValueError('too bright')\n"
        "        return photos\n"
    )
    augmentation = load_from_file("augmentation", f"{tmp_path / 'mine.py'}:Mine")()
    pipeline = AugmentationPipeline([augmentation])
    photos = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((2, 2, 3), np.uint8)
    examples = SplitArrays((photos,), np.zeros(4, np.int32), ("",) * 4)
    batches = make_batches(
        examples, np.arange(4), 1, None, augmentation=pipeline, numbers=pipeline.draw(4, 0, 0)
    )
    with pytest.raises(SystemExit) as ended, ended_by_a_line():
        for _ in batches:
            pass
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("mine.py', line 6, in change_pixels: ValueError: too bright")


def test_values_whose_shape_is_known_only_in_the_step_are_allowed():
    class Partly(Task):
        def losses(self, logits, batch):
            return tf.boolean_mask(super().losses(logits, batch), tf.ones(len(logits), tf.bool))

        def metrics(self, logits, batch):
            return {"one": np.ones(3, np.float32), **super().metrics(logits, batch)}

    class Shorter(Task):
        def losses(self, logits, batch):
            return tf.boolean_mask(super().losses(logits, batch), tf.range(len(logits)) > 0)

    batch = {"label": tf.TensorSpec((None,), tf.int32)}
    shapes = sum_shapes(Partly(), 2, batch)
    assert shapes["one"] == shapes["loss"] == ()
    with pytest.raises(UserError, match=r"Shorter\.losses returns a tensor of float32 and .* \(2,"):
        sum_shapes(Shorter(), 2, batch)


def test_other_types_that_can_be_used_are_accepted():
    class Flip(Augmentation):
        numbers = np.int64(1)

        def change_pixels(self, photos, numbers):
            return tf.image.flip_left_right(photos)

    photos = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
    flipped = AugmentationPipeline([Flip()]).change_pixels(photos, np.zeros((1, 1), np.float32))
    np.testing.assert_array_equal(flipped, photos[:, :, ::-1])
    assert checked(Example(bytearray(b"photo"), 0, "name")).image == b"photo"


def test_smoothing_is_refused_where_the_task_s_losses_leave_it_out():
    task = f"{ROOT / 'examples' / 'focal_loss.py'}:FocalLoss"
    with pytest.raises(UserError, match="but the losses of FocalLoss do not take it"):
        make_task(dataclasses.replace(SMALL_CONFIG, task=task, label_smoothing=0.1))


class Unreachable(Tracker):
    def __init__(self):
        raise OSError("no route to host")


def test_a_tracker_that_cannot_be_constructed_is_told(capsys):
    open_tracker(f"{__file__}:Unreachable").send("end", {})
    assert capsys.readouterr().err == (
        "note: the tracker Unreachable cannot be constructed (OSError: no route to host); training "
        "continues without it\n"
    )


def test_a_task_that_takes_no_smoothing_is_refused(tmp_path):
    class Bare(Task):
        def __init__(self):
            super().__init__()

    with pytest.raises(UserError, match="the task Bare cannot be constructed with label_smoothing"):
        make_task(SMALL_CONFIG, Bare)


def test_a_task_that_does_not_pass_smoothing_on_is_refused():
    class Forgetful(Task):
        def __init__(self, label_smoothing=0.0, class_weights=None):
            super().__init__()

    assert make_task(SMALL_CONFIG, Forgetful).label_smoothing == 0
    with pytest.raises(UserError, match=r"is 0\.1, but the task Forgetful has 0\.0; call super"):
        make_task(dataclasses.replace(SMALL_CONFIG, label_smoothing=0.1), Forgetful)


def test_a_schedule_of_steps_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import keras\nmine = keras.optimizers.schedules.CosineDecay(1e-3, 100)\n"
    )
    with pytest.raises(UserError, match="maps steps to learning rates; expected a function that"):
        shape_of("head_schedule", f"{tmp_path / 'mine.py'}:mine")


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda rate: keras.optimizers.SGD(0.1), "does not use the learning rate"),
        (lambda rate: keras.optimizers.SGD(float(rate())), "does not use the learning rate"),
        (
            lambda rate: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(rate)),
            "is a LossScaleOptimizer, but the training step scales the loss itself",
        ),
        (
            lambda rate: keras.optimizers.SGD(rate, loss_scale_factor=8.0),
            "has loss_scale_factor=8.0, which the training step does not take into account",
        ),
        (
            lambda rate: keras.optimizers.SGD(rate, use_ema=True),
            "has use_ema=True, which .*; leave it out, and give --weight_averaging",
        ),
    ],
)
def test_an_optimizer_that_would_not_train_as_asked_is_refused(build, reason):
    variables = [keras.Variable(np.ones((2, 2)))]
    schedule, step = Schedule("constant", 0.1, 0, 10), tf.Variable(0, dtype=tf.int64)
    assert make_group("head", variables, keras.optimizers.SGD, schedule, step).name == "head"
    with pytest.raises(UserError, match=f"the optimizer of the group 'head' {reason}"):
        make_group("head", variables, build, schedule, step)


def test_losses_of_a_mixin_support_no_setting_either():
    class Mixin:
        def losses(self, logits, batch):
            return tf.zeros(len(logits))

    class Mixed(Mixin, Task):
        pass

    class Further(Mixed):
        pass

    assert Mixed.supports == Further.supports == frozenset()


def test_a_method_that_the_base_class_does_not_have_is_told(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from research.runs.tracker import Tracker\n"
        "class Mine(Tracker):\n"
        "    def start(self): pass\n"
        "    def epoch(self, row): pass\n"
        "    def _helper(self): pass\n"
    )
    load_from_file("tracker", f"{tmp_path / 'mine.py'}:Mine", Tracker)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: Mine defines start, which Tracker does not have; ")


def test_a_schedule_may_return_an_integer(tmp_path):
    (tmp_path / "mine.py").write_text("def mine(share):\n    return 1\n")
    shape = shape_of("head_schedule", f"{tmp_path / 'mine.py'}:mine")
    assert float(Schedule(shape, 0.1, 0, 10)(tf.constant(3))) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (list, r"(?s)Task\.gradients returns \[.*; expected an object of Gradients"),
        (
            lambda found: found._replace(values=found.values[1:]),
            "returns 1 gradients for 2 variables; expected a list with",
        ),
        (lambda found: found._replace(values=None), "returns None as gradients for 2 variables"),
        (
            lambda found: found._replace(values=[None, *found.values[1:]]),
            "returns None for the variable .*; expected a dense tensor of shape",
        ),
        (
            lambda found: found._replace(values=[*found.values[:-1], tf.zeros([])]),
            r"returns a tensor of float32 and shape \(\) for the variable .*; expected a dense",
        ),
        (
            lambda found: found._replace(sums={"loss": found.sums["loss"]}),
            "returns the sums loss; expected weight, loss, as self.sums returns",
        ),
    ],
)
def test_gradients_that_do_not_fit_are_refused(change, message):
    variables = [keras.Variable(np.ones((2, 3)), name="kernel"), keras.Variable(np.ones(3))]
    values = [tf.zeros(variable.shape) for variable in variables]
    found = Gradients(values, {"loss": tf.zeros([]), "weight": tf.zeros([])})
    check_gradients(Task(), found, variables, ["weight", "loss"])
    with pytest.raises(UserError, match=message):
        check_gradients(Task(), change(found), variables, ["weight", "loss"])


def test_the_first_step_checks_the_gradients_of_a_task():
    class Plain(Task):
        def gradients(self, network, batch, variables, scale, values=None):
            return list(super().gradients(network, batch, variables, scale, values))

    learner = make_learner(CONFIG, task=Plain())
    with pytest.raises(UserError, match=r"Plain\.gradients returns \[.*; expected an object of G"):
        learner.train_step(next(iter(feed(learner, some_photos(8), 8, None))))


def test_variables_that_an_optimizer_excludes_from_weight_decay_stay_excluded():
    kept = keras.Variable(np.ones((2, 2)), name="kept")
    decayed = keras.Variable(np.ones((2, 2)), name="decayed")

    def build(rate):
        optimizer = keras.optimizers.AdamW(rate, weight_decay=0.5)
        optimizer.exclude_from_weight_decay(var_names=["kept"])
        return optimizer

    bias = keras.Variable(np.ones(2), name="bias")
    schedule, step = Schedule("constant", 0.1, 0, 10), tf.Variable(0, dtype=tf.int64)
    group = make_group("head", [kept, decayed, bias], build, schedule, step)
    group.apply([tf.zeros((2, 2)), tf.zeros((2, 2)), tf.zeros(2)])
    np.testing.assert_array_equal(kept, np.ones((2, 2)))
    np.testing.assert_array_equal(bias, np.ones(2))
    np.testing.assert_allclose(decayed, np.full((2, 2), 1 - 0.1 * 0.5), rtol=1e-6)
