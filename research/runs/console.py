"""Prints a run: its description, a progress bar per epoch, and the metrics after each epoch."""

from __future__ import annotations

import math
import os
import shlex
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import keras
import tqdm

from research.models.wrapper import has_depthwise, summarize_parts
from research.optimization.groups import Group
from research.runs.find_run import length_is_fixed
from research.runs.run_directory import RunDirectory, best_epoch, main_metric
from research.settings.automatic import Choice
from research.settings.train_config import TASKS, TrainConfig
from research.system import devices
from research.system.python_file import is_python_reference

SHORT_NAMES = {"average_precision": "mAP"}  # for columns of 9 characters

if TYPE_CHECKING:
    from research.data.loader import DataLoader
    from research.data.source import Source
    from research.loop.builder import BuiltNetwork
    from research.loop.learning_rate_finder import Sweep
    from research.loop.meter import Interval
    from research.loop.preparation import Run
    from research.tasks.metrics import Metrics


def describe_run(run: Run) -> str:
    """Returns the lines that describe the data, the model and the devices of a run."""
    config, loader, built, team = run.config, run.loader, run.built, run.team
    own_data = config.source or config.image_folder or config.labels
    names = ", ".join(loader.class_names[:8]) + (", ..." if len(loader.class_names) > 8 else "")
    size, blocks = config.image_size, len(built.network.parts.blocks)
    kind = "GPU" if devices.has_gpu() else "CPU"
    lines = [
        f"data         {short_path(own_data) if own_data else config.dataset}",
        f"photos       {loader.num_train_examples:,} to train on, "
        f"{len(loader.examples('validation')):,} to validate"
        f"{'' if run.plan.validates else ': there will be no best checkpoint'}",
        *splits_lines(loader.source),
        *([f"task         {short_path(config.task)}"] if config.task not in TASKS else []),
        f"classes      {len(loader.class_names)}: {names}",
        f"backbone     {short_path(config.backbone)} at {size} x {size} pixels",
        f"weights      {built.origin}",
        f"devices      {team.strategy.num_replicas_in_sync} {kind}, "
        f"{keras.config.dtype_policy().compute_dtype}{', XLA' if run.options.xla else ''}",
        *([f"recomputed   {blocks - 1} of {blocks} blocks of unfrozen layers"] if blocks else []),
        *([f"host         {team.cluster}"] if team.cluster else []),
        *choices_lines(run.choices),
        "",
        *parts_table(built, run.groups),
        "",
    ]
    if report := damage_report(loader):
        lines.append(report)
    lines += notes_lines(loader.source)
    inner_layers = built.network.model.backbone._flatten_layers()
    has_norms = any(isinstance(one, keras.layers.BatchNormalization) for one in inner_layers)
    if config.weights == "none" and config.bn_mode == "frozen" and has_norms:
        lines.append("note: BatchNorm keeps its initial values; --bn_mode=train trains it")
    if config.recompute == "blocks" and not built.network.parts.blocks:
        lines.append("note: --recompute=blocks has no effect: no cut of these layers saves memory")
    lines += precision_lines(config.precision, built.network.model.backbone)
    if run.options.exchange != config.exchange:
        count = team.strategy.num_replicas_in_sync
        quantity = "1 device" if count == 1 else f"{count} devices"
        lines.append(
            f"note: --exchange={config.exchange} has no effect with {quantity}, only with 2 or 3"
        )
    return "\n".join(lines)


def splits_lines(source: Source) -> list[str]:
    """Returns where the splits of photos come from and what is left out, as text of 79 columns."""
    return textwrap.wrap(
        source.summary, 79, initial_indent="splits       ", subsequent_indent=" " * 13
    )


def choices_lines(choices: Mapping[str, Choice]) -> list[str]:
    """Returns the automatic choices with their reasons, as text of 79 columns."""
    lines: list[str] = []
    for name, choice in choices.items():
        first = f"{'' if lines else 'automatic':<13}"
        flag = f"--{name}={choice.value}"
        if isinstance(choice.value, bool):
            flag = f"--{'' if choice.value else 'no'}{name}"
        text = f"{flag}: {choice.reason}"
        lines += textwrap.wrap(
            text, 79, initial_indent=first, subsequent_indent=" " * 15, break_on_hyphens=False
        )
    return lines


def precision_lines(requested: str, backbone: keras.Model) -> list[str]:
    """Returns a line if `--precision=bfloat16` would make the steps faster, otherwise none."""
    dtype = keras.config.dtype_policy().compute_dtype
    if dtype != "float32" or devices.has_gpu():
        return []
    flags = devices.cpu_flags()
    if requested == "auto" and "amx_bf16" in flags:
        return []  # it has chosen what is fastest
    factor = devices.bfloat16_speedup(flags, has_depthwise(backbone))
    line = f"note: steps are {factor} times as fast here with --precision=bfloat16"
    return [line] if factor else []


def notes_lines(source: Source) -> list[str]:
    """Returns the notes of a source, as text of 79 columns."""
    return [line for note in source.notes for line in textwrap.wrap(f"note: {note}", 79)]


def damage_report(loader: DataLoader) -> str | None:
    """Returns a summary of the damaged photos in all loaded splits, or None without any."""
    damaged = [entry for loaded in loader.loaded.values() for entry in loaded.damaged]
    if not damaged:
        return None
    shown = [f"  {name}: {reason}" for name, reason, _ in damaged[:10]]
    if len(damaged) > len(shown):
        shown.append(f"  ... and {len(damaged) - len(shown)} more")
    photos = "photo" if len(damaged) == 1 else "photos"
    return "\n".join([f"skipped {len(damaged)} {photos}:", *shown])


def parts_table(built: BuiltNetwork, groups: Sequence[Group]) -> list[str]:
    """Returns a table of the parts of the model and the optimizer of each, one line per part."""
    optimizers = {
        group.name: f"{type(group.optimizer).__name__} {group.schedule}"
        if group.schedule.first_step < group.schedule.last_step
        else "- (epochs is 0)"
        for group in groups
    }
    stages = [group for group in groups if group.name.startswith("backbone_")]
    rows = [("part", "layers", "parameters", "trained by")]
    for part in summarize_parts(built.network.model, built.first_trainable):
        if part.name == "backbone" and stages:
            for group in stages:
                numbers = sum(variable.value.shape.num_elements() for variable in group.variables)
                rows.append((group.title, "", f"{numbers:,}", optimizers[group.name]))
        else:
            layers, trained_by = str(part.layers or ""), optimizers.get(part.name, "-")
            rows.append((part.name, layers, f"{part.parameters:,}", trained_by))
    return [f"{part:<22}{layers:>7}{numbers:>12}  {by}" for part, layers, numbers, by in rows]


def epoch_header(figures: Iterable[str], validates: bool = True) -> str:
    """Returns the header of the table of epochs.

    Args:
      figures: the names of loss and metrics.
      validates: whether there are validation photos.
    """
    main = main_metric(figures) or ""
    name = SHORT_NAMES.get(main, main)[:9]
    validation_name = f"val. {name}" if name else ""
    validation = f"  val. loss{validation_name:>15}" if validates else ""
    return f"\n  epoch    loss{name:>10}{validation}  photos/s  seconds"


def epoch_line(epoch: int, epochs: int, trained: Interval, validation: Metrics | None) -> str:
    """Returns the metrics of a finished epoch, in the columns of `epoch_header`.

    Metrics without a column follow, one per line. The cross-entropy is left out if it equals the
    loss (of the validation photos, if there are any). Metrics of a class, such as
    `cross_entropy/cat`, are left out too.
    """
    training = trained.metrics.values
    after = validation.values if validation else training
    main = main_metric(after)

    def number(values: Mapping[str, float], width: int) -> str:
        return f"{values[main]:>{width}.4f}" if main else " " * width

    columns = f"{after['loss']:>11.4f}{number(after, 15)}" if validation else ""
    lines = [
        f"{f'{epoch}/{epochs}':>7}{training['loss']:>8.4f}{number(training, 10)}"
        f"{columns}"
        f"{trained.photos_per_second:>10.1f}{trained.seconds:>9.1f}"
    ]
    for name, value in after.items():
        is_loss = name == "cross_entropy" and math.isclose(value, after["loss"], rel_tol=1e-5)
        if name not in ("loss", main) and not is_loss and "/" not in name:
            validated = f", val. {value:.4f}" if validation else ""
            lines.append(f"         {name} {training[name]:.4f}{validated}")
    return "\n".join(lines)


def closing_lines(directory: RunDirectory, ended_early: bool = False) -> str:
    """Returns the result of a finished run, and the commands that evaluate and display it.

    Args:
      directory: the run's folder.
      ended_early: whether early stopping ended the run; the best checkpoint is then evaluated.
    """
    rows = directory.read_metrics()
    if not rows:
        return f"no epochs to train in {short_path(directory.path)}"
    last, best, path = rows[-1], best_epoch(rows), shlex.quote(short_path(directory.path))
    split, shown = ("validation", best) if best else ("train", last)
    names = (name.removeprefix(f"{split}_") for name in shown if name.startswith(f"{split}_"))
    main = main_metric(names)
    value = shown[f"{split}_{main}"] if main else None
    metric = f", {SHORT_NAMES.get(main, main)} {value:.4f}" if main and value is not None else ""
    title = f"best after epoch {best['epoch']}: validation" if best else "training"
    config = directory.read_config()
    files = [(name, getattr(config, name)) for name in ("task", "backbone", "source")]
    own = "".join(
        f" --{name}={shlex.quote(short_path(file))}"
        for name, file in files
        if file and is_python_reference(file)
    )
    return (
        f"\n{counted(last['epoch'], 'epoch')} in {last['seconds']:.0f} s; "
        f"{title} loss {shown[f'{split}_loss']:.4f}{metric}\n\n"
        f"evaluate:     python run_eval.py --ckpt_dir={path}{own}"
        f"{' --checkpoint=best' if ended_early else ''}\n"
        f"TensorBoard:  tensorboard --logdir={path}"
    )


def finished_note(config: TrainConfig, ended_early: bool) -> str:
    """Returns a note for a run that is resumed although nothing is left to train."""
    if ended_early:
        return "note: --early_stopping ended this run; to train longer, start a new run"
    reason = length_is_fixed(config)
    way_out = f"start a new run, because {reason}" if reason else "increase --epochs"
    return f"note: nothing is left to train; to train longer, {way_out}"


def suggestions(sweeps: Sequence[Sweep], picture: Path) -> str:
    """Returns a table of the learning rates found, and the flags that set them."""
    lines = [f"{'group':<24}learning rate"]
    for sweep in sweeps:
        found = f"{sweep.suggestion:.1e}" if sweep.suggestion else f"none, {sweep.why_none}"
        lines.append(f"{sweep.group:<24}{found}")
    # All backbone stages share one flag, which sets the rate of the last stage.
    first = {sweep.group.partition(" ")[0]: sweep.suggestion for sweep in reversed(sweeps)}
    flags = [f"--{name}_learning_rate={rate:.1e}" for name, rate in first.items() if rate]
    return "\n".join([*lines, "", " ".join(reversed(flags)), f"picture: {short_path(picture)}"])


def counted(number: int, noun: str) -> str:
    """Returns a number and its noun, in the plural unless the number is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def short_path(path: str | os.PathLike[str]) -> str:
    """Returns a path relative to the working directory, or the absolute path if it is shorter."""
    try:
        return min(os.path.relpath(path), os.path.abspath(path), key=len)
    except FileNotFoundError:  # the working directory was deleted
        return os.fspath(path)


class EpochProgress(tqdm.tqdm):
    """A progress bar with the remaining time; hidden if standard error is not a terminal."""

    def __init__(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        super().__init__(
            desc=f"epoch {epoch}/{epochs}",
            total=steps,
            initial=done,
            leave=False,
            ncols=79,
            disable=not sys.stderr.isatty(),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {remaining} left{postfix}",
        )

    def show(self, steps_done: int, trained: Interval) -> None:
        """Shows the metrics of the epoch so far."""
        values = trained.metrics.values
        main = main_metric(values)
        metric = f", {main} {values[main]:.4f}" if main else ""
        self.set_postfix_str(
            f"loss {values['loss']:.4f}{metric}, {trained.photos_per_second:.0f} photos/s",
            refresh=False,
        )
        self.update(steps_done - self.n)
