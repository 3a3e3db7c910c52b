"""The command tree, and how errors are reported.

Command modules import only the standard library, Typer and quark's ground floor at the top; torch,
transformers and polars wait until a command runs, so that ``quark --help`` is immediate.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from quark import __version__
from quark.cli import (
    compare,
    config,
    doctor,
    evaluate,
    fit,
    frontier,
    generate,
    init,
    model,
    overopt,
    pool,
    push,
    report,
    reward,
    runs,
    selftest,
    train,
    view,
)
from quark.cli.exit_codes import MEANINGS, ExitCode, exit_code_of, way_out_of

TRACEBACK_FLAG = "--traceback"
TRACEBACK_VARIABLE = "QUARK_TRACEBACK"

_EPILOG = "\n\n".join(
    (
        "**Exit codes:** "
        + ";  ".join(f"**{code.value}** {meaning}" for code, meaning in MEANINGS.items())
        + ".",
        "**First steps:**  `quark train`  trains the embedded model offline on a CPU;  "
        "`quark init`  writes a commented configuration;  `quark doctor`  shows what is missing.",
    )
)

app = typer.Typer(
    name="quark",
    help="Teach or unteach a language model with any black-box reward.",
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train", rich_help_panel="Train and use")(train.train)
app.command("generate", rich_help_panel="Train and use")(generate.generate)
app.command("evaluate", rich_help_panel="Train and use")(evaluate.evaluate)
app.command("compare", rich_help_panel="Train and use")(compare.compare)
app.command("frontier", rich_help_panel="Train and use")(frontier.frontier)
app.command("fit", rich_help_panel="Train and use")(fit.fit)
app.command("push", rich_help_panel="Train and use")(push.push)
app.command("runs", rich_help_panel="Look inside")(runs.runs)
app.command("view", rich_help_panel="Look inside")(view.view)
app.command("overopt", rich_help_panel="Look inside")(overopt.overopt)
app.command("report", rich_help_panel="Look inside")(report.report)
app.add_typer(pool.app, name="pool", rich_help_panel="Look inside")
app.add_typer(model.app, name="model", rich_help_panel="Train and use")
app.command("init", rich_help_panel="Set up")(init.init)
app.add_typer(config.app, name="config", rich_help_panel="Set up")
app.add_typer(reward.app, name="reward", rich_help_panel="Set up")
app.command("doctor", rich_help_panel="Set up")(doctor.doctor)
app.command("selftest", rich_help_panel="Set up")(selftest.selftest)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"quark {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    show_traceback: Annotated[
        bool,
        typer.Option(
            TRACEBACK_FLAG,
            envvar=TRACEBACK_VARIABLE,
            help="Also show the traceback of an expected error.",
        ),
    ] = False,
) -> None:
    """Teach or unteach a language model with any black-box reward."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit status; every error ends here."""
    _prepare_process()
    try:
        app(args=list(arguments), prog_name="quark")
    except SystemExit as leave:
        if isinstance(leave.__context__, BrokenPipeError):  # Typer's way to leave
            return ExitCode.UNREAD
        return leave.code if isinstance(leave.code, int) else ExitCode.OK
    except BaseException as error:  # the outermost frame: nothing may pass it unseen
        return _report_error(error, with_traceback=_wants_traceback(arguments))
    return ExitCode.OK


def main() -> None:
    """The console script."""
    _quiet_libraries()
    code = run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            # The interpreter flushes once more on its way out, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            code = code or ExitCode.UNREAD
    sys.exit(code)


def _quiet_libraries() -> None:
    """Keep the warnings and progress bars of libraries off the terminal, unless the user asks for them.

    Python's ``-W`` and ``PYTHONWARNINGS`` and each library's own variable bring them back. The warnings of a
    reward's own file are shown.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.filterwarnings(
            "default", module="_quark_reward_"
        )  # rewards/callable.py names them so
    if logging.lastResort is not None:
        logging.lastResort.setLevel(logging.ERROR)
    for variable, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TQDM_DISABLE", "1"),
        ("TORCH_CPP_LOG_LEVEL", "ERROR"),
    ):
        os.environ.setdefault(variable, value)


def _prepare_process() -> None:
    if sys.stdout is None or sys.stderr is None:  # closed by whoever started this: speak to nobody
        nobody = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - as long as the process
        sys.stdout, sys.stderr = sys.stdout or nobody, sys.stderr or nobody
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(
                errors="backslashreplace"
            )  # a terminal that lacks a character gets its escape
    from quark.api.process import prepare_process
    from quark.cli.console import columns_asked_for

    if columns_asked_for() is None:
        os.environ.pop("COLUMNS", None)  # libraries would take "0" for a width, too
    prepare_process()
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Ask the C library to reuse the memory of large tensors, if it can.

    Else every step on a CPU gets its temporaries from the system anew, page by page: a fifth of the time.
    """
    import ctypes

    mmap_max, trim_threshold, top_pad = -4, -1, -2  # M_... of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # not every C library has it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 64 << 20)


def _wants_traceback(arguments: Sequence[str]) -> bool:
    return TRACEBACK_FLAG in arguments or os.environ.get(TRACEBACK_VARIABLE, "") not in ("", "0")


def _report_error(error: BaseException, *, with_traceback: bool) -> int:
    from quark.cli.console import error_line
    from quark.printable import printable_lines

    code = exit_code_of(error)
    if code is ExitCode.UNREAD:
        return code
    if code is ExitCode.KILLED:
        error_line("quit")
        return code
    if with_traceback or code is ExitCode.UNEXPECTED:
        sys.stderr.write(printable_lines("".join(traceback.format_exception(error))))
    if code is ExitCode.UNEXPECTED:
        error_line(f"{type(error).__name__}: {error}", "report it with the lines above")
    else:
        error_line(_message_of(error), way_out_of(error))
    return code


def _message_of(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    return str(error) or type(error).__name__
