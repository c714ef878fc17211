import csv
import importlib.util
import json
import math
import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from report.browser import CHROMIUM, Page
from trials import bowls, rise

from depthnet.report import figures
from depthnet.report import sweep as report
from depthnet.sweep import analysis
from depthnet.sweep.study import Range, SweepSettings

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
ENVIRONMENT = {"cpu": "a <b>bold</b> & cheap one", "torch": "2.9"}


def settings(**given) -> SweepSettings:
    return SweepSettings(
        **{"parametrization": ("depth_mup", "standard"), "depth": (8, 16, 32), "steps": 40, **given}
    )


def optimum(network):
    drift = -0.5 if network.parametrization == "standard" else 0.0
    return -8.3 + drift * math.log2(network.depth / 8)


def write(out, study, **options):
    trials = bowls(study, optimum, noise=0.01, **options)
    return report.write(trials, study, ENVIRONMENT, out)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_files_of_a_grid(tmp_path):
    study = settings(log2_block_multiplier=(-2.0, -1.5, -1.0), depth=(8, 32))
    write(tmp_path, study, diverges=lambda n, m: m.log2_lr == -4)
    parquet = ["results.parquet"] if importlib.util.find_spec("pyarrow") else []
    assert names(tmp_path) == sorted(
        [
            *("heatmap.png", "heatmap.svg", "transfer.png", "transfer.svg"),
            *("report.html", "results.csv", "summary.json", *parquet),
        ]
    )
    for name in ("heatmap", "transfer"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        root = ElementTree.parse(tmp_path / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    with open(tmp_path / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == study.planned * 3
    assert {row["loss"] for row in rows if row["log2_lr"] == "-4.0" and row["step_to"] == "40"} == {
        "inf"
    }


def test_parquet_holds_the_rows_of_the_csv(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    write(tmp_path, settings(), diverges=lambda n, m: m.log2_lr == -4)
    with open(tmp_path / "results.csv") as file:
        rows = list(csv.DictReader(file))
    found = parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert [{key: str(value) for key, value in row.items()} for row in found] == rows
    assert isinstance(found[0]["loss"], float)
    assert isinstance(found[0]["depth"], int)


def test_without_pyarrow_the_summary_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    summary = write(tmp_path, settings())
    assert "results.parquet" not in names(tmp_path)
    assert "pyarrow is not installed" in summary["parquet"]
    assert "pyarrow is not installed" in (tmp_path / "report.html").read_text()


def test_the_summary_is_strict_json(tmp_path):
    study = settings()
    summary = write(tmp_path, study, diverges=lambda n, m: n.depth == 32)

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert read["trials"] == summary["trials"]
    assert read["trials"]["planned"] == study.planned
    assert read["settings"]["depth"] == [8, 16, 32]
    deep = read["panels"][0]["slices"]["last fifth"]["scales"]["32"]
    assert deep["best_loss"] == "inf"
    assert deep["optimum_log2_lr"] is None


def test_writing_twice_gives_the_same_files(tmp_path):
    for folder in ("a", "b"):
        write(tmp_path / folder, settings())
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_no_trials_and_missing_packages_are_refused_before_anything_is_written(
    tmp_path, monkeypatch
):
    with pytest.raises(ValueError, match="trials must have at least one"):
        report.write([], settings(), {}, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"depthnet\[report\]"):
        write(tmp_path / "out", settings())
    assert not (tmp_path / "out").exists()


def test_the_page_escapes_and_has_each_id_once(tmp_path):
    study = settings(data="/data/<script>alert(1)</script>&'odd\" $x$ name.txt")
    write(tmp_path, study)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<b>bold</b>" not in page
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', page))
    assert {a or b for a, b in used} <= set(ids)


def test_the_page_says_the_headline_first_then_shows_the_whole_picture(tmp_path):
    summary = write(tmp_path, settings())
    page = (tmp_path / "report.html").read_text()
    places = [page.index(text) for text in (summary["headline"], "<svg", 'class="verdicts"')]
    assert places == sorted(places)


# ---- the sentence that comes first ----


def said(study, least=lambda network: 2.0, optima=optimum, **options):
    """The headline of a study whose seeds are alike: every interval is a point."""
    trials = bowls(study, optima, least=least, **options)
    return report.headline(analysis.summarize(trials, study))


def still(network):
    return -8.0


def one(**given):
    return settings(**{"parametrization": ("depth_mup",), **given})


def test_headline_of_a_learning_rate_that_transfers():
    better = said(one(), lambda n: 2.0 * 0.97 ** math.log2(n.depth), still)
    assert better == (
        "Tuned at depth 8, the same learning rate at depth 32 costs 0.0 % (0.0 to 0.0) with depth_mup, "
        "where depth 32 is 5.9 % better than depth 8."
    )


def test_headline_of_depth_that_hurts():
    worse = said(one(), lambda n: 2.0 * 1.03 ** math.log2(n.depth), still)
    assert worse.endswith("where depth 32 is 6.1 % worse than depth 8.")


def test_headline_where_no_depth_rule_costs_most():
    """Without one the optimum falls by an octave, whose cost is the bowl's."""
    cost = 100 * math.expm1(0.14 * rise(1.0))
    sentence = said(settings(parametrization=("depth_mup", "half_zero", "standard")))
    assert sentence.endswith(
        f"; without a depth rule (standard) it costs {cost:.1f} % ({cost:.1f} to {cost:.1f})."
    )


@pytest.mark.parametrize("all_of_them", [True, False])
def test_headline_of_a_learning_rate_that_diverges(all_of_them):
    """At depth 32, every one of the grid or those that are good at depth 8."""
    sentence = said(
        settings(),
        diverges=lambda n, m: (
            n.parametrization == "standard" and n.depth == 32 and (all_of_them or m.log2_lr > -10)
        ),
    )
    assert sentence.endswith("; without a depth rule (standard) it diverges.")
    first = said(one(), diverges=lambda n, m: n.depth == 32 and (all_of_them or m.log2_lr > -10))
    assert first == (
        "Tuned at depth 8, the same learning rate at depth 32 diverges with depth_mup."
    )


def test_headline_of_an_unknown_cost():
    sentence = said(one(), finished=lambda n, m: n.depth < 32 or m.log2_lr < -10)
    assert "at depth 32 has a cost that is not known with depth_mup" in sentence
    nothing = said(one(), finished=lambda n, m: n.depth > 8)
    assert nothing == (
        "Tuned at depth 8, the same learning rate at depth 32 has a cost that is not known with "
        "depth_mup."
    )


def test_headline_where_every_learning_rate_is_a_good_one():
    assert said(one(), bend=0.001) == (
        "The learning rate hardly matters here: the least learning rate of the grid is only 0.4 % worse "
        "than the best at depth 8, where 5 % are needed."
    )


@pytest.mark.parametrize(
    ("study", "finished"), [(one(depth=(8,)), 8), (one(), 8), (one(base_depth=32), 32)]
)
def test_headline_of_one_depth(study, finished):
    sentence = said(study, finished=lambda n, m: n.depth == finished)
    assert sentence == "Nothing is known yet of networks of more than one depth."


def test_headline_of_a_learning_rate_tuned_at_the_greatest_depth():
    sentence = said(one(base_depth=32), optima=still)
    assert sentence == (
        "Tuned at depth 32, the same learning rate at depth 8 costs 0.0 % (0.0 to 0.0) with depth_mup."
    )


def test_a_map_has_the_losses_of_its_plane():
    study = settings(
        log2_lr=(-9.0, -8.0), log2_block_multiplier=(-2.0, -1.0), weight_decay=(0.0, 1.0)
    )
    trials = bowls(
        study,
        optimum,
        diverges=lambda n, m: m.log2_lr == -8 and m.log2_block_multiplier == -1,
        finished=lambda n, m: m.log2_lr != -9 or m.log2_block_multiplier != -2,
    )
    maps = figures.heat_maps(trials, study)
    assert [len(line) for line in maps] == [3, 3]
    np.testing.assert_allclose(
        maps[0][0].losses,
        [[np.nan, 2 * math.exp(0.14 * rise(0.3))], [2 * math.exp(0.14 * rise(-0.7)), np.inf]],
        rtol=1e-6,
    )
    assert figures.heat_maps(trials, settings()) == []


def test_table_fits_a_terminal(tmp_path):
    console = pytest.importorskip("rich.console", reason="rich is not installed")
    summary = write(tmp_path, settings(), diverges=lambda n, m: n.depth == 32)
    terminal = console.Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    terminal.print(report.table(summary))
    text = terminal.export_text()
    assert re.search(r"^ *16 .*-8\.[0-9]{2}±0\.\d\d", text, re.MULTILINE)
    assert re.search(r"^ *32 +diverged +diverged +diverged", text, re.MULTILINE)
    assert "…" not in text


STUDIES = {
    "grid": (settings(log2_block_multiplier=(-2.0, -1.5, -1.0), depth=(8, 32)), {}),
    "unfinished": (
        settings(name="half", data="/data/<b>&'odd\" $x$ name.txt", seeds=1),
        {"finished": lambda n, m: n.depth < 32 and m.log2_lr > -11},
    ),
    "diverged": (settings(), {"diverges": lambda n, m: True}),
    "one depth": (settings(depth=(8,)), {}),
    "flat": (settings(), {"bend": 0.001}),
    "search": (
        settings(log2_lr=Range(-13, -4), sampler="tpe", trials=12),
        {"candidates": lambda s: [(-12.5 + 0.7 * i, -1.5, 0.0) for i in range(12)]},
    ),
    "panels": (
        settings(
            width=(32, 64), activation=("abs", "1,-0.2"), parametrization=("0.75,0.25", "ode")
        ),
        {},
    ),
}

VISIBLE = """(() => {
  const shown = element => {
    const box = element.getBoundingClientRect();
    return box.width > 0 && box.height > 0;
  };
  const text = selector => [...document.querySelectorAll(selector)]
    .filter(shown).map(e => e.innerText.trim());
  return {headings: text("h1, h2"), chips: text(".chip"), headline: text(".headline"),
    body: document.body.innerText,
    figures: [...document.querySelectorAll("svg")].filter(shown).length,
    outside: [...document.querySelectorAll("svg, p, li, h1, h2, h3, .scroll")]
      .filter(e => e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 80)),
    width: document.documentElement.scrollWidth, viewport: innerWidth};
})()"""


@needs_chromium
@pytest.mark.parametrize("width", [375, 1200])
@pytest.mark.parametrize("name", STUDIES)
def test_what_a_reader_sees(name, width, tmp_path):
    study, options = STUDIES[name]
    summary = write(tmp_path / "out", study, **options)
    with Page((tmp_path / "out" / "report.html").as_uri(), width, tmp_path / "profile") as page:
        shown = page.evaluate(VISIBLE)
        requests = [each["request"]["url"] for each in page.seen("Network.requestWillBeSent")]
        complaints = page.seen("Log.entryAdded") + page.seen("Runtime.exceptionThrown")
        complaints += page.seen("Runtime.consoleAPICalled")
    assert shown["headings"][0] == figures.question(study)
    assert shown["headings"][-4:] == ["Optima", "Cost and divergences", "Settings", "Environment"]
    signs = {"transfers": "✓", "does not transfer": "✗", "undecided": "?", "no verdict": "–"}
    expected = [panel["slices"]["last fifth"]["answer"] for panel in summary["panels"]]
    assert shown["chips"] == [f"{signs[answer]} {answer}" for answer in expected]
    assert shown["headline"] == [summary["headline"]]
    panels = len(summary["panels"])
    # All panels in one picture first, then each alone.
    assert shown["figures"] == 1 + panels + (panels * len(study.depth) if name == "grid" else 0)
    assert shown["width"] <= shown["viewport"] == width
    assert shown["outside"] == []
    count = summary["trials"]
    assert f"{count['finished']} of {count['planned']} trials are finished" in shown["body"]
    assert not re.search(r"\b(nan|None|inf)\b", shown["body"])
    assert study.data in shown["body"]
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert [url for url in requests if url.startswith("file:")] == [
        (tmp_path / "out" / "report.html").as_uri()
    ]
    assert complaints == []


@needs_chromium
def test_the_browser_test_sees_what_is_wrong(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width"><img src="http://localhost:9/x.png">'
        '<p style="width: 600px">wide</p><script>console.error("no")</script>'
    )
    with Page(page.as_uri(), 375, tmp_path / "profile") as bad:
        assert bad.evaluate("document.documentElement.scrollWidth") > 375
        urls = [each["request"]["url"] for each in bad.seen("Network.requestWillBeSent")]
        assert "http://localhost:9/x.png" in urls
        assert bad.seen("Runtime.consoleAPICalled")
        assert bad.seen("Log.entryAdded")
