"""What the verbs share: the console, progress bars, requests to stop."""

from __future__ import annotations

import re
import signal
from dataclasses import fields

from depthnet._checks import optional_import

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def exponents_as_values(parser) -> None:
    """Let a parser take -0.5,1.5 and -9:-4:1 and -1e1 for values, which argparse takes for options."""
    parser._negative_number_matcher = re.compile(r"-[\d.][\d.,:eE+-]*$")


def add_data(
    parser, default: str, kinds: str = "text, digits, cifar10, mnist, PATH.npz or PATH.txt"
):
    """The options that say what a study's data are."""
    parser.add_argument("--data", default=default, metavar="NAME", help=kinds)
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the files of cifar10 or mnist")


def add_out(parser, default: str) -> None:
    """The option that says where a study is kept."""
    parser.add_argument(
        "--out",
        default=default,
        metavar="DIR",
        help="results go here; a study that was stopped goes on from here",
    )


def settings(kind: type, options):
    """A dataclass of settings, each from the option of its name."""
    chosen = {field.name: getattr(options, field.name) for field in fields(kind)}
    return kind(**{key: tuple(x) if isinstance(x, list) else x for key, x in chosen.items()})


def console():
    return optional_import("rich.console", "cli", "the command line").Console()


def progress_bar(on):
    """A rich progress bar on a console."""
    module = optional_import("rich.progress", "cli", "the progress bar")
    columns = (
        module.TextColumn("{task.description}"),
        module.BarColumn(),
        module.TaskProgressColumn(),
        module.TimeRemainingColumn(),
        module.TextColumn("left"),
    )
    return module.Progress(*columns, console=on)


class StopRequests:
    """Turns the first Ctrl-C or SIGTERM into a request that is asked for between steps."""

    def __enter__(self):
        self.asked = False
        self.previous = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __call__(self) -> bool:
        return self.asked

    def _ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
