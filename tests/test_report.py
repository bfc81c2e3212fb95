"""The report as a page: its numbers are those of report.json, it loads and runs nothing, and it can be made anew."""

import copy
import hashlib
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from effc import charts, package, report, report_html, report_numbers, report_shape
from effc.charts import Scale
from effc.errors import PackageError
from effc.report_numbers import FORMATS, At, find
from kit import WORDS, assert_letter, cli, content, leftovers, made

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = (ROOT / "effc" / "templates" / "report.html").read_text(encoding="utf-8")
VOID = {"meta", "br", "link", "img", "input", "hr", "base", "source", "embed"}


class Page(HTMLParser):
    """Elements of a page with their text; `problems` is what is not well-formed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.problems: list[str] = []
        self._open: list[tuple[str, int]] = []
        self._text: list[str] = []
        self.declared = ""
        self.feed(text)
        self.close()
        self.problems += [f"{name} is not closed" for name, _ in self._open]

    def handle_decl(self, decl):
        self.declared = decl

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        if len(set(names)) < len(names):
            self.problems.append(f"{tag} has an attribute twice: {names}")
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        self._text.append("")
        if tag not in VOID:
            self._open.append((tag, len(self.elements) - 1))

    def handle_endtag(self, tag):
        if not self._open or self._open[-1][0] != tag:
            self.problems.append(f"</{tag}> closes {self._open[-1:]}")
        else:
            self._open.pop()

    def handle_data(self, data):
        for _, number in self._open:
            self._text[number] += data

    def all(self, *tags):
        """Attributes and text of every element, or of those with such a tag."""
        return [
            (tag, attrs, text)
            for (tag, attrs), text in zip(self.elements, self._text, strict=True)
            if not tags or tag in tags
        ]

    @property
    def numbers(self):
        return [(a, text) for _, a, text in self.all() if "data-key" in a]

    @property
    def ids(self):
        return [a["id"] for _, a, _ in self.all() if "id" in a]


@cache
def benched() -> Path:
    """A package of two targets with everything measured, in a second or two. To be read, not changed."""
    place = made().out.parent
    draw = random.Random(0)
    rows = [[" ".join(draw.sample(WORDS, 5)) for _ in range(2)] for _ in range(24)]
    pairs = place / "pairs.csv"
    text = "".join(f"{a},{b},{draw.random():.3f}\n" for a, b in rows)
    pairs.write_text(text, encoding="utf-8")
    ran = cli(
        "compile", made().model, "-o", place / "benched", "--quantize", "int8",
        "--calib", made().sentences, "--samples", 8, "--metric", f"sts:{pairs}",
        "--target", "ort", "--target", "onnx", "--set", "bench.budget_s=0.1",
        "--set", "bench.shapes=[[1, 8], [2, 16]]", "--set", "gate=false",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return place / "benched"


def read(out: Path):
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


@cache
def _full() -> str:
    """A report that has all that a report can have, with numbers that tests may rely on."""
    found = read(made().out)
    draw = random.Random(1)

    def times(ms):
        return sorted(round(ms * math.exp(draw.gauss(0, 0.1)), 4) for _ in range(41))

    def shape(batch, length, mine, low, high):
        others = {"float": 2 * mine, "torch": 4 * mine}
        return {
            "batch": batch, "length": length, "engine_ms": mine, "p95_ms": 1.2 * mine, "n": 40,
            "reference": "float", "reference_ms": 2 * mine, "ratio": 2.0, "low": low, "high": high,
            "against": {n: {"ms": ms, "p95_ms": 1.1 * ms, "n": 40, "ratio": ms / mine,
                            "low": low, "high": high} for n, ms in others.items()},
            "quantiles_ms": {n: times(ms) for n, ms in {"engine": mine, **others}.items()},
        }  # fmt: skip

    found["bench"] = {
        "shapes": [shape(1, 16, 3.5, 1.8, 2.2), shape(8, 128, 120.25, 0.9, 1.1)],
        "load_ms": {"engine": 40.0, "float": 120.0, "torch": 1.5},
        "first_run_ms": {"engine": 5.0, "float": 7.0, "torch": 20.0},
        "peak_rss_mb": {"engine": 140.0, "float": 241.0},
        "threads": 2, "streams": 1, "cpu": "A processor",
    }  # fmt: skip
    found["metric"] = {
        "name": "accuracy", "reference": 0.9117, "engine": 0.9083, "n": 872, "low": -0.0092,
        "high": 0.0023, "higher_is_better": True, "level": 0.95, "verdict": "not distinguishable",
        "wilson": {"reference": [0.8911, 0.9287], "engine": [0.8873, 0.9257]},
        "mcnemar": {"only_reference": 11, "only_engine": 8, "p": 0.6476},
        "data": {"name": "dev.tsv", "bytes": 104410, "sha256": "b" * 64},
    }  # fmt: skip
    found["layers"] = {
        "ort": [
            {"site": s["name"], "op": s["op"], "sqnr_db": 40.0 - i, "local_db": math.inf if not i else 45.0 - i % 5,
             "share": (i + 1) / 105}
            for i, s in enumerate(found["sites"])
        ]
    }  # fmt: skip
    checks = [
        ("latency 1x16", 0.5, 0.45, 0.56, 1.02, "pass"),
        ("latency 8x128", 1.0, 0.91, 1.11, 1.02, "undecided"),
        ("metric accuracy", None, None, None, 0.005, "fail"),
    ]
    names = ("name", "value", "low", "high", "bound", "verdict")
    found["gate"] = {
        "verdict": "passed with warnings", "tried": 3, "seconds": 12.5,
        "checks": [dict(zip(names, c, strict=True), text=f"{c[0]} in words") for c in checks],
        "rolled_back": [{"pass": "0:quantize", "sites": ["encoder.layer.1.output.dense"],
                         "why": "it lost too much"}],
    }  # fmt: skip
    found["stages"] = [
        {"name": "load", "seconds": 1.5, "peak_mb": 812.0, "cached": False},
        {"name": "trace", "seconds": 0.0, "peak_mb": None, "cached": 1},
    ]
    found["machine"] = {"cpu": "A processor", "features": ["avx2", "avx512_vnni"]}
    found["sites"][3] |= {"int8": False, "kernel": "MatMul", "reason": "rolled back"}
    return json.dumps(found)


def full():
    return json.loads(_full())


def page_of(found, *, recipe="effc: 1\n", beside=True) -> str:
    report_shape.check(found, "report.json")
    return report_html.page(found, files={"model.onnx": "a" * 64}, recipe=recipe, beside=beside)


def written(out: Path):
    """The page that a compile wrote, and the report beside it."""
    return (out / "report.html").read_text(encoding="utf-8"), read(out)


PAGES = {
    "a compile without a bench": lambda: written(made().out),
    "a compile with all": lambda: written(benched()),
    "all there can be": lambda: (page_of(full()), full()),
}


SLOW = "a compile with all"


@pytest.fixture(params=[pytest.param(n, marks=[pytest.mark.slow] * (n == SLOW)) for n in PAGES])
def page(request):
    return PAGES[request.param]()


# What every page is


def test_it_is_well_formed(page):
    found = Page(page[0])
    assert found.problems == []
    assert found.declared == "doctype html"
    assert len(set(found.ids)) == len(found.ids)


def test_it_loads_nothing_and_runs_nothing(page):
    text, _ = page
    found = Page(text)
    tags = {tag for tag, _, _ in found.all()}
    assert not tags & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "form",
        "input",
        "base",
    }
    for tag, attrs, _ in found.all():
        assert not [name for name in attrs if name.startswith("on") or name in ("src", "srcset")], (
            tag
        )
    links = [a["href"] for _, a, _ in found.all() if "href" in a]
    inside = {f"#{name}" for name in found.ids} | {"decisions.json", "origins.json"}
    assert set(links) <= inside
    assert not re.search(r"url\(|@import|image-set|://", text)
    (policy,) = [a["content"] for _, a, _ in found.all("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert text.index("Content-Security-Policy") < text.index("<style>")


def test_it_speaks_to_those_who_do_not_see_it(page):
    found = Page(page[0])
    (html,) = found.all("html")
    assert html[1]["lang"] == "en"
    levels = [int(tag[1]) for tag, _, _ in found.all("h1", "h2", "h3")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for _, attrs, text in found.all("th"):
        assert attrs["scope"] in ("col", "row") and text.strip()
    assert len(found.all("caption")) == len(found.all("table"))
    drawings = [(a, t) for _, a, t in found.all("svg") if a.get("class") == "chart"]
    assert drawings
    for attrs, _ in drawings:
        assert attrs["role"] == "img"
        assert set(attrs["aria-labelledby"].split()) <= set(found.ids)
    assert all(text.strip() for _, _, text in found.all("title", "desc"))
    assert all(
        a.get("tabindex") == "0" for _, a, _ in found.all("div") if a.get("class") == "scroll"
    )


def test_letters_stand_out_from_what_is_behind_them():
    """WCAG AA: 4.5 to 1 for text, in both colour schemes."""
    by_day, by_night = (
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{([^}]*--link[^}]*)\}", TEMPLATE)
    )
    for colours in (by_day, by_night):
        assert len(colours) > 12
        for ink in set(colours) - {"page", "card", "line", "track"}:
            for behind in ("page", "card"):
                assert contrast(colours[ink], colours[behind]) >= 4.5, (ink, behind)


def contrast(a: str, b: str) -> float:
    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        line = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * line[0] + 0.7152 * line[1] + 0.0722 * line[2]

    dark, bright = sorted((light(a), light(b)))
    return (bright + 0.05) / (dark + 0.05)


# Its numbers


UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "B": 1.0, "%": 0.01, "×": 1.0, "": 1.0}


def shown(text: str) -> tuple[float, float]:
    """What a printed number says, and half a step of its last digit."""
    plain = text.replace("\u202f", "").replace("−", "-")
    if "∞" in plain:
        return math.inf * (-1 if "-" in plain else 1), 0.0
    number, unit = re.fullmatch(r"([-+]?[\d.]+(?:e[-+]\d+)?)\s*(\S*)", plain).groups()
    digits, _, power = number.partition("e")
    step = 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))
    return float(number) * UNITS[unit], 0.501 * step * UNITS[unit]


def test_every_number_is_one_of_the_report(page):
    text, source = page
    numbers = Page(text).numbers
    assert len(numbers) > 60
    for attrs, printed in numbers:
        value, over, less = (find(source, attrs[k]) if k in attrs else None
                             for k in ("data-key", "data-over", "data-less"))  # fmt: skip
        if printed == "—":
            assert value is None, attrs
            continue
        expected = value / over if over is not None else value - less if less is not None else value
        said, half = shown(printed)
        assert math.isclose(said, expected, rel_tol=1e-12, abs_tol=half), (attrs, printed, expected)


def test_the_numbers_that_count_are_there():
    keys = [a["data-key"] for a, _ in Page(page_of(full())).numbers]
    assert set(keys) >= {
        "source_bytes", "model_bytes", "bench.shapes.0.ratio", "bench.shapes.1.low", "metric.low",
        "bench.shapes.0.against.torch.p95_ms", "metric.reference", "metric.mcnemar.p", "passes.0.sites",
        "gate.checks.1.high", "layers.ort.2.share", "stages.0.peak_mb", "bench.load_ms.float",
        "metric.wilson.engine.0", "verify.ort.held out.last_hidden_state.cosine", "bench.peak_rss_mb.engine",
    }  # fmt: skip
    assert any("data-over" in a for a, _ in Page(page_of(full())).numbers)
    assert any("data-less" in a for a, _ in Page(page_of(full())).numbers)


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        ("bytes", 90_852_864, "90.9 MB"),
        ("bytes", 743, "743 B"),
        ("bytes", 2_500_000_000, "2.50 GB"),
        ("count", 1204, "1\u202f204"),
        ("count", 2**62, "4.612e+18"),
        ("ratio", 1.7364, "1.74×"),
        ("signed", -0.0034, "−0.0034"),
        ("signed", 0.0023, "+0.0023"),
        ("drift", 0.12, "0.120"),
        ("drift", 555.0, "555"),
        ("drift", 0, "0"),
        ("drift", 1.2e-7, "1.20e−07"),
        ("seconds", 22.18, "22.2"),
        ("seconds", 0.0038, "0.004"),
        ("db", math.inf, "∞"),
        ("db", math.nan, "not a number"),
        ("share", 0.1234, "12.3 %"),
        ("level", 0.95, "95 %"),
    ],
)
def test_how_a_number_is_written(kind, value, said):
    assert FORMATS[kind](value) == said


def test_a_place_knows_the_way_to_it_and_the_way_leads_back():
    found = {"a": [{"b.c\\d": 3}], "held out": {"": 1}}
    place = At(found)["a"][0]["b.c\\d"]
    assert place.key == r"a.0.b\.c\\d"
    assert find(found, place.key) == 3
    assert find(found, "a.7.b") is None and find(found, "a.0.x.y") is None
    nowhere = At(found)["a"][5]["x"][2]["y"]
    assert (nowhere.raw, str(nowhere), bool(nowhere), list(nowhere)) == (None, "—", False, [])


# Verdicts


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(1.01, 1.2, "better"), (0.8, 0.99, "worse"), (0.9, 1.1, "not distinguishable"),
     (1.0, 1.2, "not distinguishable"), (None, None, "not measured")],
)  # fmt: skip
def test_a_ratio_is_called_what_its_interval_says(low, high, said):
    assert report_html.ratio_verdict(At({"low": low, "high": high})) == said


@pytest.mark.parametrize(
    ("low", "high", "higher", "said"),
    [(0.1, 0.2, True, "better"), (0.1, 0.2, False, "worse"), (-0.2, -0.1, False, "better"),
     (-0.1, 0.0, True, "not distinguishable")],
)  # fmt: skip
def test_a_metric_is_called_what_its_interval_says(low, high, higher, said):
    metric = {"low": low, "high": high, "higher_is_better": higher}
    assert report_html.metric_verdict(At(metric)) == said


def test_a_printed_verdict_goes_before():
    assert "not distinguishable" in page_of(full())
    found = full()
    found["metric"] |= {"low": 0.1, "high": 0.2, "verdict": "not distinguishable"}
    assert report_html.metric_verdict(At(found["metric"])) == "not distinguishable"


# What others write is text


EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;{{ 7*7 }}"


def everywhere(value):
    """The same report with something evil at the end of every text in it."""
    if isinstance(value, dict):
        return {k: everywhere(v) for k, v in value.items()}
    if isinstance(value, list):
        return [everywhere(v) for v in value]
    return value + EVIL if isinstance(value, str) else value


def test_text_from_outside_stays_text():
    found = everywhere(full())
    target = found["manifest"]["engines"][0]["target"]
    for key in ("verify", "lowering", "layers"):
        found[key] = {target: found[key]["ort"]} if found.get(key) else {}
    found["verify"][target][EVIL] = {EVIL: {"rel_l2": 0.5}}
    found["bench"]["load_ms"][EVIL] = 3.0
    found["bench"]["shapes"][0]["against"][EVIL] = {"ms": 3.0}
    found["passes"][-1]["options"][EVIL] = [EVIL]
    found["manifest"]["versions"][EVIL] = EVIL
    text = report_html.page(found, files={EVIL: EVIL}, recipe=EVIL, beside=True)
    page = Page(text)
    assert page.problems == []
    assert not {"script", "img"} & {tag for tag, _, _ in page.all()}
    assert not [a for _, a, _ in page.all() if "onerror" in a or "src" in a]
    assert text.count("{{ 7*7 }}") > 100
    ((_, _, title),) = page.all("h1")
    assert title.endswith(EVIL)


# What is not there is left out


OPTIONAL = {
    "bench": "speed",
    "gate": "gate",
    "layers": "layers",
    "metric": None,
    "stages": None,
    "machine": None,
    "data": None,
    "lowering": None,
    "timings": None,
}


@pytest.mark.parametrize("key", OPTIONAL)
@pytest.mark.parametrize("absent", ["missing", "null"])
def test_a_part_that_is_absent_is_left_out(key, absent):
    found = full()
    assert OPTIONAL[key] is None or OPTIONAL[key] in Page(page_of(found)).ids
    found.pop(key)
    if absent == "null" and key not in ("lowering", "timings"):
        found[key] = None
    page = Page(page_of(found))
    assert page.problems == []
    assert OPTIONAL[key] not in page.ids
    wrong = [a["href"] for _, a, _ in page.all("a") if a["href"].startswith("#")
             and a["href"][1:] not in page.ids]  # fmt: skip
    assert wrong == []


def test_a_report_of_the_least_is_a_page():
    found = full()
    for key in OPTIONAL:
        found.pop(key)
    found |= {"passes": [], "sites": [], "verify": {}}
    assert Page(page_of(found, recipe="")).problems == []


@pytest.mark.parametrize(
    "inner", ["wilson", "mcnemar", "level", "verdict", "data", "higher_is_better"]
)
def test_a_metric_of_an_older_effc_is_drawn(inner):
    found = full()
    del found["metric"][inner]
    assert Page(page_of(found)).problems == []


def test_times_without_quantiles_are_drawn_as_median_and_p95():
    found = full()
    for shape in found["bench"]["shapes"]:
        del shape["quantiles_ms"]
    text = page_of(found)
    assert 'class="violin"' not in text
    assert "the end of the line the 95th percentile" in text
    assert 'class="violin"' in page_of(full())


def test_what_a_newer_effc_adds_is_no_trouble():
    found = full()
    found["later"] = {"x": 1}
    found["bench"]["shapes"][0]["later"] = [1]
    found["gate"]["checks"][0]["later"] = None
    assert page_of(found) == page_of(full())


def test_a_gate_that_is_off_has_no_section():
    found = full()
    found["gate"] = {"verdict": "off", "checks": [], "rolled_back": [], "tried": 1, "seconds": 0.0}
    assert "gate" not in Page(page_of(found)).ids


# Malformed reports


def places(value, way=()):
    """Every place in a report."""
    yield way
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, part in inner:
        yield from places(part, (*way, key))


STRANGE = [
    None, True, False, 0, -1, 3, 10**30, 10**400, 1.5, -2.5, 1e308, -1e308, 5e-324, math.nan, math.inf,
    -math.inf, "", "x", "held out", [], [None], [1, 2], [[]], {}, {"x": None}, {"x": {"y": {"rel_l2": 1}}},
]  # fmt: skip


@pytest.mark.slow
@settings(max_examples=120)
@given(
    st.randoms(use_true_random=False), st.lists(st.sampled_from(STRANGE), min_size=1, max_size=3)
)
def test_a_strange_value_anywhere_is_a_page_or_one_clear_error(draw, values):
    found = full()
    for value in values:
        way = draw.choice(list(places(found))[1:])
        inner = found
        for step in way[:-1]:
            inner = inner[step]
        inner[way[-1]] = copy.deepcopy(value)
    made_ = page_or_error(found)
    if isinstance(made_, PackageError):
        assert made_.hint and made_.what.startswith("report.json: ")
        return
    assert Page(made_).problems == []
    assert "nan%" not in made_ and "inf%" not in made_


def page_or_error(found) -> str | PackageError:
    try:
        return page_of(found)
    except PackageError as error:
        return error


@pytest.fixture
def out(tmp_path):
    return Path(shutil.copytree(made().out, tmp_path / "out"))


def plant(out: Path, name: str, text: str) -> None:
    """Another text in a file of a package, with its hash right again."""
    (out / name).write_text(text, encoding="utf-8")
    kept = package.VOLATILE if name in package.UNHASHED else package.MANIFEST
    forge(out, kept, lambda c: c["files"].update({name: hashlib.sha256(text.encode()).hexdigest()}))


def forge(out: Path, name: str, change) -> None:
    found = json.loads((out / name).read_text(encoding="utf-8"))
    change(found)
    (out / name).write_text(package.sealed(found), encoding="utf-8")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '{"a": 1}', '{"verify": "\\ud800"}', "[" * 100_000]
)
def test_a_report_that_is_none_is_one_clear_error(out, text):
    plant(out, "report.json", text)
    before = content(out)
    assert_letter(cli("report", out), "PackageError", 12, "report.json")
    assert content(out) == before


DAMAGE = {
    "sizes as text": (lambda c: c.update(model_bytes="12"), "model_bytes"),
    "a size below nothing": (lambda c: c.update(source_bytes=-1), "source_bytes"),
    "a size without end": (lambda c: c.update(source_bytes=10**300), "source_bytes"),
    "no passes": (lambda c: c.pop("passes"), "passes"),
    "a pass without nodes": (lambda c: c["passes"][0].pop("nodes"), "passes.0.nodes"),
    "three sizes of a pass": (lambda c: c["passes"][0].update(bytes=[1, 2, 3]), "passes.0.bytes"),
    "a site in between": (lambda c: c["sites"][0].update(int8="yes"), "sites.0.int8"),
    "no engine": (lambda c: c["manifest"].update(engines=[]), "manifest.engines"),
    "drift in words": (lambda c: c["verify"]["ort"].update(x={"y": "far"}), "verify.ort.x.y"),
    "a bench of nothing": (lambda c: c.update(bench={}), "bench.shapes"),
    "a gate as a word": (lambda c: c.update(gate="passed"), "gate"),
    "layers in a row": (lambda c: c.update(layers=[1]), "layers"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_report_is_one_clear_error(out, case):
    change, where = DAMAGE[case]
    found = read(out)
    change(found)
    plant(out, "report.json", json.dumps(found))
    said = (f"report.json: {where}", "compile again")
    assert_letter(cli("report", out), "PackageError", 12, *said)


def test_the_report_of_another_package_is_refused(out):
    found = read(out)
    found["manifest"]["engines"][0]["sha256"] = "0" * 64
    plant(out, "report.json", json.dumps(found))
    assert_letter(cli("report", out), "PackageError", 12, "that of another package")


def test_a_recipe_that_is_no_text_is_refused(out):
    (out / "recipe.yaml").write_bytes(b"\xff")
    digest = hashlib.sha256(b"\xff").hexdigest()
    forge(out, package.MANIFEST, lambda m: m["files"].update({"recipe.yaml": digest}))
    assert_letter(cli("report", out), "PackageError", 12, "recipe.yaml is not UTF-8")


# The command


def test_the_page_can_be_made_anew_and_is_the_same(out):
    before = content(out)
    assert "report.html" in before
    ran = cli("report", out)
    assert (ran.code, ran.out) == (0, f"{out}/report.html is ready\n")
    assert content(out) == before
    assert leftovers(out.parent) == []


@pytest.mark.parametrize("harm", [lambda f: f.unlink(), lambda f: f.write_text("scribbled over")])
def test_a_page_that_is_lost_or_harmed_is_made_anew(out, harm):
    harm(out / "report.html")
    assert cli("verify", out).code == 10
    assert cli("report", out).code == 0
    assert cli("verify", out).code == 0
    assert content(out) == content(made().out)


def test_a_killed_run_between_the_two_renames_is_put_right_by_the_next(out):
    forge(out, package.VOLATILE, lambda v: v["files"].update({"report.html": "0" * 64}))
    assert cli("report", out).code == 0
    assert package.check(out) == []


@pytest.mark.parametrize("name", ["model.onnx", "recipe.yaml", "report.json"])
def test_a_package_that_is_not_whole_gets_no_page(out, name):
    (out / name).write_bytes(b"x")
    before = content(out)
    assert_letter(cli("report", out), "PackageError", 12, f"{name} differs", "compile it again")
    assert_letter(cli("report", out, "-o", "-"), "PackageError", 12, f"{name} differs")
    assert content(out) == before


@pytest.mark.parametrize("name", ["report.html", "extra"])
def test_what_is_no_plain_file_is_not_written_to(out, tmp_path, name):
    (tmp_path / "elsewhere").write_text("mine", encoding="utf-8")
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(tmp_path / "elsewhere")
    assert_letter(cli("report", out), "PackageError", 12, name)
    assert (tmp_path / "elsewhere").read_text(encoding="utf-8") == "mine"


def test_the_page_elsewhere_has_no_links_to_files(out, tmp_path):
    before = content(out)
    ran = cli("report", out, "-o", tmp_path / "page.html")
    assert (ran.code, ran.out) == (0, f"{tmp_path}/page.html is ready\n")
    assert content(out) == before
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert Page(page).problems == []
    assert all(a["href"].startswith("#") for _, a, _ in Page(page).all("a"))
    assert cli("report", out, "-o", "-").out == page


def test_the_page_is_not_written_over_other_files_of_the_package(out):
    before = content(out)
    for name in ("config.json", "page.html"):
        ran = cli("report", out, "-o", out / name)
        assert_letter(
            ran, "UsageError", 2, "which holds only what its manifest lists", "-o out.html"
        )
    assert cli("report", out, "-o", out / "report.html").code == 0
    assert content(out) == before


def test_a_place_that_cannot_be_written_is_told_before_the_work(out, tmp_path):
    assert_letter(cli("report", out, "-o", tmp_path), "UsageError", 2, "cannot be written")
    ran = cli("report", out, "-o", tmp_path / "no" / "page.html")
    assert_letter(ran, "UsageError", 2, "cannot be written")


def forget(out: Path, name: str) -> None:
    """The package as an effc would have made it that does not write `name`."""
    (out / name).unlink()
    forge(out, package.VOLATILE, lambda v: v["files"].pop(name))
    forge(out, package.MANIFEST, lambda m: m["unhashed"].remove(name))


def test_an_older_package_gets_its_page_elsewhere(out, tmp_path):
    forget(out, "report.html")
    before = content(out)
    said = ("wrote no report.html", "its manifest does not list it", "-o report.html")
    assert_letter(cli("report", out), "PackageError", 12, *said)
    assert cli("report", out, "-o", tmp_path / "page.html").code == 0
    assert content(out) == before


def test_a_package_without_a_report_has_no_page(out):
    forget(out, "report.json")
    assert_letter(cli("report", out), "PackageError", 12, "has no report.json", "compile it again")


def test_a_folder_that_is_no_package(tmp_path):
    assert_letter(cli("report", tmp_path), "PackageError", 12, "is not a package")


def test_the_commands_on_the_page_are_commands():
    from effc.cli import app

    known = {c.name or c.callback.__name__ for c in app.registered_commands}
    blocks = [text for tag, _, text in Page(page_of(full())).all("pre") if "effc compile" in text]
    named = re.findall(r"effc (\w+)", blocks[-1])
    assert {"compile", "verify", "bench"} <= set(named) <= known


def test_help_does_not_load_the_template_engine(tmp_path):
    script = "import sys, effc.cli as c\nsys.argv = ['effc', '--help']\n"
    script += "try: c.main()\nexcept SystemExit: print('jinja2' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_the_template_travels_with_the_package():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = told["tool"]["setuptools"]["package-data"]["effc"]
    taken = {file for pattern in patterns for file in (ROOT / "effc").glob(pattern)}
    others = {
        f for f in (ROOT / "effc").rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc")
    }
    assert others <= taken


# The text


def test_the_text_says_what_the_gate_asked_and_what_was_taken_back():
    lines = report.text(full()).splitlines()
    start = lines.index("gate      passed with warnings, 3 tried")
    assert lines[start + 1 :] == [
        "          latency 1x16 in words",
        "          latency 8x128 in words",
        "          metric accuracy in words",
        "          rolled back 0:quantize: encoder.layer.1.output.dense; because it lost too much",
    ]
    assert not [
        line for line in report.text(read(made().out)).splitlines() if line.startswith("gate")
    ]


def test_what_a_multiple_left_whole_is_told_in_text_and_page():
    found = full()
    sizes = {"fc1": 32, "fc2": 48, "fc3": 8, "fc4": 8}
    pass_ = found["passes"][-1]
    pass_["notes"] = {"main/whole": {"groups": sizes, "align": 16}}
    words = "in multiples of 16 too little of them would go: fc1 (32 units), fc2 (48), fc3 (8), and 1 more"
    assert words in report.text(found) and words in page_of(found)
    pass_["notes"]["main/whole"]["groups"] = {"fc1": 32}
    assert "would go: fc1 (32 units)\n" in report.text(found)


# Charts


NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(NUMBERS | st.none(), max_size=8), st.booleans())
@example([5e-324, 1e308], True)
@example([1.0, 1.0 + 2e-16], False)
@example([-1e29, 1e29], False)
@example([0.0], True)
def test_a_scale_keeps_order_and_its_ticks_have_room(values, log):
    scale = Scale.over(values, log=log)
    drawn = sorted(v for v in charts.drawable(values) if v > 0 or not log)
    at = [scale.at(v) for v in drawn]
    assert at == sorted(at) and all(0 <= x <= 100 for x in at)
    ticks = [scale.at(v) for v in scale.ticks()]
    assert len(ticks) <= 8
    gaps = [b - a for a, b in itertools.pairwise(ticks)]
    assert all(gap >= charts.ROOM - 1e-6 for gap in gaps)


@pytest.mark.parametrize("low", [0.003, 0.94, 1.0, 3.7, 117.0])
@pytest.mark.parametrize("wide", [1.05, 1.3, 2.5, 10.0, 300.0])
def test_an_axis_has_two_round_numbers_at_least(low, wide):
    assert len(Scale.over([low, low * wide], log=True).ticks()) >= 2


@given(st.lists(st.floats(0.01, 1e6), min_size=5, max_size=41))
def test_an_outline_is_drawn_of_any_times(times):
    rows = [charts.Spread(label="x", quantiles=times, median=times[0], p95=None, words="")]
    text = charts.spreads("n", "t", "d", rows)
    assert Page(text).problems == []
    assert "nan" not in text and "inf" not in text


def test_times_that_are_all_alike_are_drawn():
    rows = [charts.Spread(label="x", quantiles=[2.0] * 41, median=2.0, p95=2.0, words="")]
    assert "violin" in charts.spreads("n", "t", "d", rows)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.95, 1.0])
def test_quantiles_are_read_as_numpy_reads_them(share):
    import numpy as np

    found = sorted(random.Random(3).random() for _ in range(41))
    assert math.isclose(charts.quantile(found, share), float(np.quantile(found, share)))


def test_labels_of_a_scatter_do_not_lie_on_each_other_and_what_costs_nothing_has_no_place():
    marks = [charts.Mark(label=n, across=1.0, up=0.5) for n in ("a", "b<", "c")]
    text = charts.scatter("n", "t", "d", [*marks, charts.Mark(label="free", across=0.0, up=1.0)])
    heights = sorted(float(y) for y in re.findall(r'<text x="[\d.]+%" y="([\d.]+)" dx=', text))
    assert len(heights) == 3
    assert all(b - a >= charts.LINE for a, b in itertools.pairwise(heights))
    assert "free" not in text and "b&lt;" in text


def test_markup_is_escaped_where_it_is_made():
    made_ = charts.tag("text", "<b>", charts.tag("i", '"'), x='"><script>', class_="a&b", none=None)
    assert made_ == (
        '<text x="&quot;&gt;&lt;script&gt;" class="a&amp;b">&lt;b&gt;<i>&quot;</i></text>'
    )


def test_every_way_to_write_a_number_is_known_to_the_template():
    used = set(re.findall(r"\|(\w+)", TEMPLATE)) - {"join", "length"}
    known = set(report_numbers.FORMATS) | {"tone", "option", "shape", "said", "in_order"}
    assert used <= known
