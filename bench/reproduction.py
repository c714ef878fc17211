"""Run studies of `depthnet reproduce`, keep what they found, and write docs/reproduction.md.

Studies run in runs/NAME, where a stopped one goes on; results.csv, summary.json and the picture are
copied to bench/results/reproduce/NAME.  The page has every study that is there, run now or before, and
the README a table of what they found.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

from common import RESULTS, argument_parser

from depthnet.cli.studies import run_study
from depthnet.reproduce.registry import STUDIES, study

ROOT = RESULTS.parent.parent
MARKS = {True: "yes", False: "**no**", None: "undecided"}
HEAD = """# Reproduction

The claims of *Tensor Programs VI* (arXiv 2310.02244) as studies: `depthnet reproduce NAME` runs one,
`depthnet reproduce --list` lists them, `--set KEY VALUE` changes a setting. What follows is what
`make reproduce` found: every verdict is computed from the run's data, by rules in the code of each study
(`depthnet/reproduce`), and stands here as it came out. Times are wall-clock times, waiting
for other work on the machine included. Studies of learning rates are judged by the rules of
[transfer.md](transfer.md): without enough contrast there is no verdict.
"""
TABLE = re.compile(r"(<!-- findings -->\n).*?(<!-- end of findings -->)", re.DOTALL)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="studies to run, by default all")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where studies run")
    args = parser.parse_args()
    for name in args.names or STUDIES:
        if run_study(study(name)(), str(args.runs / name)):
            return
        kept = RESULTS / "reproduce" / name
        kept.mkdir(parents=True, exist_ok=True)
        for file in ("results.csv", "summary.json", f"{name}.png"):
            shutil.copy(args.runs / name / file, kept / file)
    page = ROOT / "docs" / "reproduction.md"
    there = [name for name in STUDIES if (RESULTS / "reproduce" / name / "summary.json").exists()]
    page.write_text("\n".join([HEAD, table(there, ""), *map(section, there)]), encoding="utf-8")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    found = table(there, "docs/reproduction.md").replace("\\", "\\\\")
    readme.write_text(TABLE.sub(rf"\1{found}\2", text), encoding="utf-8")
    print(f"wrote {page} and the table in {readme}")


def table(names: list[str], page: str) -> str:
    """What the paper claims, and whether it was seen, a line a study."""
    lines = [
        f"| {_cell(STUDIES[name].claim)} | [{_holds(name)}]({page}#{name}) |" for name in names
    ]
    return "\n".join(["| claim of the paper | measured |", "|---|---|", *lines, ""])


def _holds(name: str) -> str:
    found = json.loads((RESULTS / "reproduce" / name / "summary.json").read_text())
    counts = Counter(verdict["holds"] for verdict in found["verdicts"])
    words = {True: "holds", False: "does not hold", None: "open"}
    if len(counts) == 1:
        return words[next(iter(counts))]
    return ", ".join(f"{words[holds]} in {counts[holds]}" for holds in words if counts[holds])


def section(name: str) -> str:
    found = json.loads((RESULTS / "reproduce" / name / "summary.json").read_text())
    machine, at = found["machine"], f"../bench/results/reproduce/{name}"
    verdicts = [
        f"| {MARKS[verdict['holds']]} | {_cell(verdict['claim'])} | {_cell(verdict['words'])} |"
        for verdict in found["verdicts"]
    ]
    notes = [f"\n{note}" for note in found["notes"]]
    return "\n".join(
        [
            f'<a id="{name}"></a>\n',
            f"## {name}: {found['title']}\n",
            f"{STUDIES[name].claim}\n",
            "| holds | claim | found |",
            "|---|---|---|",
            *verdicts,
            *notes,
            f"\n![{found['title']}]({at}/{name}.png)\n",
            f"{_minutes(found['seconds'])} on {_chip(machine)}, torch "
            f"{machine['torch']}, {machine['date']}. [Rows]({at}/results.csv), "
            f"[settings]({at}/summary.json).\n",
        ]
    )


def _cell(text: str) -> str:
    if text[:1].isascii():  # not κ
        text = text[:1].upper() + text[1:]
    return text.replace("|", "\\|")


def _chip(machine: dict) -> str:
    return machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} minutes"


if __name__ == "__main__":
    main()
