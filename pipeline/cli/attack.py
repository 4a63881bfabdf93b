"""The command that attacks one picture."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

import click
from click.core import ParameterSource

from pipeline import picture, terminal
from pipeline.cli.group import main
from pipeline.cli.options import Number, data_option, json_option, store_option
from pipeline.cli.output import context_of, print_json, refuse_no_place, write
from pipeline.report import tables
from pipeline.report.scores import percent
from pipeline.terminal import echo
from stages.errors import BadInput
from stages.images import encode_png
from stages.recipes import Norm


@main.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.option(
    "--model",
    required=True,
    help="A model in the store, such as standard, or a torchvision classifier, such as resnet50 (downloads weights).",
)
@click.option("--to", "target", required=True, metavar="CLASS", help="The target class, by name or index.")
@click.option("--arch", metavar="MODULE:NAME", help="The model's network, if it is code of your own.")
@click.option("--out", type=click.Path(path_type=Path), help="The picture to write [default: IMAGE-as-CLASS.png].")
@click.option(
    "--norm", type=click.Choice(get_args(Norm)), default="l2", show_default=True, help="Norm of the perturbation."
)
@click.option("--eps", type=Number(0, min_open=True), metavar="LENGTH", help="Largest norm of the "
              "perturbation, in pixel units of [0, 1], as 0.5 or 8/255 [default: L2 0.5 × side / 32, at least 0.5; L∞ "
              "8/255].")  # fmt: skip
@click.option("--steps", type=click.IntRange(1), default=100, show_default=True, help="Steps of PGD.")
@click.option("--rotate", is_flag=True, help="Search rotations and shifts instead of a ball.")
@store_option
@data_option
@json_option
def attack(
    image: Path,
    model: str,
    target: str,
    arch: str | None,
    out: Path | None,
    norm: str,
    eps: float | None,
    steps: int,
    rotate: bool,
    store: str,
    data: Path,
    as_json: bool,
) -> None:
    """Perturb an IMAGE so that a model classifies it as CLASS.

    Writes two PNG files: one with the original, the magnified perturbation and the adversarial image side by side, with
    the model's predictions; and the adversarial image alone.
    """
    if rotate:
        _refuse_idle("norm", "eps", "steps")
    refuse_no_place(out)
    context = context_of(store, data)
    attacked, classes = picture.find_model(context, model, arch)
    pixels, shape = picture.read(image, attacked.design.shape), attacked.design.shape
    ball = {"norm": norm, "eps": eps or RADIUS[norm](shape), "steps": steps}
    number = picture.class_number(target, classes)
    made = picture.move(pixels, attacked, classes, number, {"method": "spatial"} if rotate else ball)
    drawn = out or image.with_name(f"{image.stem}-as-{re.sub(r'[^A-Za-z0-9]+', '-', classes[number])}.png")
    moved = drawn.with_name(f"{drawn.stem}-image.png")
    write(drawn, picture.draw(made))
    write(moved, encode_png(made.after))
    if as_json:
        print_json({**made.as_json(), "picture": str(drawn), "image": str(moved)})
    else:
        _print_answers(made, number, classes)
        echo(f"\n{made.how}: perturbed by L2 {made.l2:.3f}, L∞ {made.linf:.3f}\n{drawn}\n{moved}")


RADIUS: Mapping[str, Callable[[tuple[int, int, int]], float]] = {
    "l2": picture.radius,
    "linf": lambda shape: 8 / 255,
}
"""Norm → the usual radius for images of some channels, height and width."""


def _refuse_idle(*names: str) -> None:
    """Refuse options of an attack that rotations do not use."""
    source = click.get_current_context().get_parameter_source
    if idle := [f"--{name}" for name in names if source(name) is not ParameterSource.DEFAULT]:
        raise BadInput(f"--rotate: does not use {' and '.join(idle)}; leave out one or the other")


def _print_answers(made: picture.Picture, number: int, classes: list[str]) -> None:
    """The model's answers to an image before and after."""
    lines = [
        [when, percent(made.confidence[i, number]), *(f"{name} {percent(share)}" for name, share in made.top(i))]
        for i, when in enumerate(("before", "after"))
    ]
    head = ["", classes[number], "first", "second", "third"][: len(lines[0])]
    echo(tables.fitted(head, lines, terminal.width(), head))
