"""depthnet reproduce."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

from depthnet._checks import one_of
from depthnet.cli.studies import rich_table, run_study
from depthnet.cli.terminal import console

BOOLEANS = {"true": True, "True": True, "false": False, "False": False}


def add_verbs(verbs) -> None:
    reproduce = verbs.add_parser(
        "reproduce", help="does what the paper claims hold on this machine?"
    )
    reproduce.set_defaults(run=run_reproduce)
    add = reproduce.add_argument
    add("name", nargs="?", metavar="NAME", help="of the study; without one, all are listed")
    add("--list", action="store_true", help="list all studies")
    add("--set", nargs="+", action="append", default=[], metavar=("KEY", "VALUE"),
        help="change a setting, such as: --set steps 1000 --set depths 64 256")  # fmt: skip
    add("--full", action="store_true",
        help="the paper's own settings; --set data_dir DIR says where CIFAR-10 is")  # fmt: skip
    add("--quick", action="store_true",
        help="a run of a minute, to see what a study does; too small to decide much")  # fmt: skip
    add("--out", metavar="DIR",
        help="results go here, by default runs/NAME, with --full runs/NAME-full, with --quick "
        "runs/NAME-quick; a stopped study goes on from here")  # fmt: skip


def run_reproduce(options: argparse.Namespace) -> int:
    from depthnet.reproduce.registry import STUDIES, study
    from depthnet.reproduce.study import state

    if options.list or options.name is None:
        table = rich_table()
        for heading in ("name", "study", "the paper's claim", "in runs/"):
            table.add_column(heading, overflow="fold")
        for name, entry in STUDIES.items():
            try:
                kind = entry.load()
                title, found = kind.title, state(kind, f"runs/{name}")
            except ImportError as error:
                title, found = str(error), ""
            table.add_row(name, title, entry.claim, found)
        console().print(table, highlight=False, markup=False)
        return 0
    if options.full and options.quick:
        raise ValueError("quick: not together with --full")
    kind = study(options.name)
    size = kind.full() if options.full else kind.quick if options.quick else {}
    settings = {**size, **_settings(kind, options.set)}
    out = options.out or f"runs/{options.name}{'-full' * options.full}{'-quick' * options.quick}"
    return run_study(kind(**settings), out)


def _settings(kind: type, changes: list[list[str]]) -> dict:
    """The changed settings of a study, converted to the types of its fields."""
    types = get_type_hints(kind)
    chosen: dict[str, Any] = {}
    for key, *words in changes:
        one_of("set", key, [field.name for field in fields(kind)])
        several = get_origin(types[key]) is tuple
        of, *_ = get_args(types[key]) or [types[key]]  # of tuple[X, ...] and of X | None, X
        if not words or (len(words) > 1 and not several):
            raise ValueError(
                f"set: {key} takes {'values' if several else 'one value'}, got {words}"
            )
        try:
            values = tuple(BOOLEANS[word] if of is bool else of(word) for word in words)
        except (ValueError, KeyError):
            raise ValueError(f"set: {key} takes {of.__name__}, got {' '.join(words)}") from None
        chosen[key] = values if several else values[0]
    return chosen
