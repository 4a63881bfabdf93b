"""The `notbugs` command itself: where each command is; every error as one sentence and an exit code."""

import ast
import errno
import os
import re
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from pipeline import terminal
from pipeline.terminal import Unheard, echo, visible
from stages.errors import BadInput

MODULES = {
    "attack": "attack",
    "card": "publish",
    "diff": "catalog",
    "doctor": "begin",
    "export": "publish",
    "gc": "catalog",
    "index": "publish",
    "init": "begin",
    "jobs": "jobs",
    "log": "catalog",
    "logs": "jobs",
    "ls": "catalog",
    "pack": "begin",
    "plan": "experiments",
    "push": "publish",
    "report": "experiments",
    "resume": "experiments",
    "run": "experiments",
    "schema": "begin",
    "show": "stored",
    "status": "experiments",
    "stop": "jobs",
    "submit": "jobs",
    "tag": "catalog",
    "verify": "stored",
}
"""Command → its file in this folder, which is imported when the command is called: together they take a second."""

INTERRUPTED = 130


class _Command(click.Command):
    """A command that refuses empty and unprintable values, such as those of unset shell variables."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given, _, parameters = self.make_parser(ctx).parse_args(list(args))
        for parameter in parameters if not ctx.resilient_parsing else []:
            value = given.get(str(parameter.name))
            for one in value if isinstance(value, list | tuple) else [value]:
                if isinstance(one, str) and (why := _mistake_in(one, str(parameter.name))):
                    raise click.UsageError(f"{parameter.get_error_hint(ctx)} {why}", ctx)
        return super().parse_args(ctx, args)


LOCAL = ("file", "image", "out")
"""Parameters that are local paths: the operating system allows any bytes in them."""


def _mistake_in(value: str, name: str) -> str | None:
    """Why a value of an option or argument must be a mistake; None if it need not be."""
    if not value.strip():
        return "is empty; if a variable stands there, is it set?"
    if "\0" in value:
        return "has a NUL character"
    if name not in LOCAL and any("\ud800" <= sign <= "\udfff" for sign in value):
        return f"is not UTF-8 text, got {value!r}"
    if name in ("store", "data", "dest") and value.startswith("~") and os.path.expanduser(value) == value:  # noqa: PTH111
        return f"must name a known home folder, got {value!r}"
    if name in ("store", "dest") and re.match(
        r"[A-Za-z][\w+.-]+:(?!//)", value
    ):  # s3:/bucket would be a folder beside us
        return f"must be a URL (with ://) or a folder (such as ./{value})"
    return None


class _Commands(MutableMapping[str, click.Command]):
    """The commands by name. To look one up imports its module, which enters it."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        self.modules, self.entered = modules, dict[str, click.Command]()

    def __getitem__(self, name: str) -> click.Command:
        if name in self.modules and name not in self.entered:
            import_module(f"pipeline.cli.{self.modules[name]}")
        return self.entered[name]

    def __setitem__(self, name: str, command: click.Command) -> None:
        self.entered[name] = command

    def __delitem__(self, name: str) -> None:
        del self.entered[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self.modules, **self.entered})

    def __len__(self) -> int:
        return len(list(iter(self)))


class _Group(click.Group):
    """The outermost layer: every error becomes one sentence and an exit code."""

    command_class = _Command

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.commands = _Commands(MODULES)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with the first sentence of each, without importing them."""
        texts = {name: text for module in sorted(set(MODULES.values())) for name, text in _described(module)}
        limit = formatter.width - 6 - max(map(len, texts))
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, click.Command(name, help=texts[name]).get_short_help_str(limit)) for name in sorted(texts)]
            )

    def main(self, *args: Any, **options: Any) -> Any:
        with terminal.session():
            try:
                code = super().main(*args, **{**options, "standalone_mode": False})
            except click.ClickException as error:
                sys.exit(_misused(error))
            except click.Abort as abort:  # click's word for Ctrl-C before the command has begun
                sys.exit(_interrupted(abort.__cause__))
            except (OSError, Unheard) as error:
                sys.exit(_unheard(error if isinstance(error, Unheard) else Unheard(error)))
        sys.exit(code)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            _refuse_lost_folder()
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupted:
            sys.exit(_interrupted(interrupted))
        except (click.ClickException, click.exceptions.Exit, Unheard):
            raise
        except Exception as error:
            if ctx.params["debug"]:
                raise
            if isinstance(error, BadInput):
                sentence = str(error)
            else:
                from pipeline.run.engines import expected, reason_of  # here: they take a second to load

                sentence = f"{reason_of(error)}{'' if expected(error) else '; notbugs --debug shows where'}"
            _say_error(sentence)
            asked = isinstance(error, BadInput) or getattr(error, "errno", None) == errno.ENAMETOOLONG
            sys.exit(2 if asked else 1)


def _say_error(sentence: str) -> None:
    echo(f"Error: {visible(sentence)}", err=True)


def _interrupted(error: BaseException | None) -> int:
    terminal.say_interrupted()
    return getattr(error, "code", INTERRUPTED)


def _misused(error: click.ClickException) -> int:
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        echo(error.message, err=True)
    else:
        context = getattr(error, "ctx", None)
        help_ = f" ({context.command_path} --help)" if context is not None else ""
        _say_error(f"{error.format_message()}{help_}")
    return error.exit_code


def _unheard(error: Unheard) -> int:
    if not error.reader_left:  # a reader that closes the pipe, as `head` does, has read enough
        _say_error(str(error))
    return 1


def _refuse_lost_folder() -> None:
    try:
        str(Path.cwd()).encode()
    except OSError as error:
        raise BadInput(
            f"the current folder no longer exists ({error.strerror}): change to another, for example with cd ~"
        ) from error
    except UnicodeEncodeError as error:
        raise BadInput(f"the name of the current folder is not UTF-8: {Path.cwd()}; change to another") from error


def _described(module: str) -> Iterator[tuple[str, str]]:
    """The commands of a file, each with its docstring: read, not run."""
    source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        for call in function.decorator_list:
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "main.command":
                name = ast.literal_eval(call.args[0]) if call.args else function.name.replace("_", "-")
                yield name, ast.get_docstring(function) or ""


def _print_version(ctx: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        from importlib import metadata

        try:
            found = metadata.version("notbugs")
        except metadata.PackageNotFoundError:  # a source tree run in place
            found = "not installed"
        echo(f"notbugs, version {found}")
        ctx.exit()


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version,
              help="Show the version and exit.")  # fmt: skip
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def main(debug: bool) -> None:
    """Datasets that separate robust from non-robust features.

    An experiment file defines datasets, models and evaluations, and how each is made from the others.
    `notbugs run FILE` makes what is missing; run it again to continue after a stop.

    Exit codes: 0 done, 1 something failed, 2 bad request, 130 Ctrl-C (143 SIGTERM, 129 a closed terminal).
    """
    terminal.show_tracebacks(debug)
