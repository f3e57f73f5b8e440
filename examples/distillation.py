"""Distillation from an exported larger model (Hinton et al. 2015, arXiv 1503.02531).

Flags: --source=examples/distillation.py:Taught --task=examples/distillation.py:Distillation
"""

from collections.abc import Iterator

import tensorflow as tf

from research.data.decode import decode_image
from research.data.open_source import open_source
from research.data.source import Example, Source
from research.tasks.losses import class_logits
from research.tasks.task import Task

TEACHER, PHOTOS = "runs/teacher/export/saved_model", "sketches"
TEMPERATURE, SHARE = 2.0, 0.7


class Taught(Source):
    """Photos with the teacher's log-probabilities, which the batch contains as `teacher`."""

    def __init__(self) -> None:
        self.photos = open_source(PHOTOS, None, None)
        self.class_names, self.count = self.photos.class_names, self.photos.count

    def examples(self, split: str) -> Iterator[Example]:
        teacher = tf.saved_model.load(TEACHER).signatures["pixels"]
        for one in self.photos.examples(split):
            answer = teacher(pixels=decode_image(one.image)[None])["probabilities"][0]
            yield one._replace(arrays={"teacher": tf.math.log(answer + 1e-7).numpy()})


class Distillation(Task):
    """Weighted sum of the loss with the labels and the loss with the teacher's soft targets."""

    def losses(self, logits: tf.Tensor, batch: dict[str, tf.Tensor]) -> tf.Tensor:
        targets = tf.nn.softmax(batch["teacher"] / TEMPERATURE)
        soft = tf.nn.softmax_cross_entropy_with_logits(targets, class_logits(logits) / TEMPERATURE)
        return (1 - SHARE) * super().losses(logits, batch) + SHARE * TEMPERATURE**2 * soft
