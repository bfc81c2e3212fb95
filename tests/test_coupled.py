"""The groups of a model as the command line shows them: a table, JSON and a drawing."""

import json
from xml.etree import ElementTree

import pytest
import torch

import effc
from effc import coupled
from kit import Perceptron, assert_letter, cli, made

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def found():
    return coupled.describe(effc.trace(Perceptron().eval(), {"x": torch.zeros(2, 8)}).only())


def test_groups_are_plain_data(found):
    group = next(g for g in found["groups"] if g["prunable"])
    assert json.loads(json.dumps(found)) == found
    assert (group["name"], group["size"]) == ("up", 16)
    assert (group["parameters_per_unit"], group["macs_per_unit"]) == (13, 12)
    assert group["members"][0] == {"tensor": "up.weight", "dim": 0, "indices_per_unit": 1}
    assert found["parameters"] == 16 * 9 + 4 * 17
    assert found["prunable_share"] == (16 * 9 + 4 * 16) / found["parameters"]


def test_the_table_says_what_can_be_pruned_and_why_the_rest_cannot(found):
    head, _, *rows = coupled.lines("main", found)
    assert head.startswith("coupling main: 3 groups, 1 prunable")
    assert rows[0].split() == ["up", "16", "13", "12", "yes"]
    assert rows[1].endswith("no: the input 'x' has it")


def test_the_drawing_has_a_mark_for_every_writer_and_reader(found):
    root = ElementTree.fromstring(coupled.drawing({"main": found, "other": found}))
    groups = found["groups"]
    assert len(root.findall(f".//{SVG}rect")) == 2 * sum(len(g["writers"]) for g in groups)
    assert len(root.findall(f".//{SVG}circle")) == 2 * sum(len(g["readers"]) for g in groups)
    assert len(root.findall(f".//{SVG}g[@class='refused']")) == 2 * 2


def test_names_in_a_drawing_are_escaped(found):
    odd = {**found["groups"][0], "name": "<b>&"}
    root = ElementTree.fromstring(coupled.drawing({"<main>": {**found, "groups": [odd]}}))
    assert any(t.text.startswith("<b>&") for t in root.iter(f"{SVG}text"))


def test_a_graph_without_layers_has_no_groups():
    graph = effc.trace(torch.nn.ReLU().eval(), torch.zeros(2, 8)).only()
    described = coupled.describe(graph)
    assert described["groups"] == [] and described["prunable_share"] == 0
    ElementTree.fromstring(coupled.drawing({"main": described}))


def test_inspect_prints_writes_and_draws(tmp_path):
    model = f"{made().factories}:perceptron"
    words = ("--coupling", "--svg", tmp_path / "groups.svg", "--json", tmp_path / "groups.json")
    ran = cli("inspect", model, *words)
    assert ran.code == 0, ran.err
    assert "coupling main: 3 groups, 1 prunable" in ran.out
    ElementTree.parse(tmp_path / "groups.svg")
    shown = json.loads((tmp_path / "groups.json").read_text())["roles"]["main"]["coupling"]
    assert [g["name"] for g in shown["groups"] if g["prunable"]] == ["up"]


def test_a_drawing_goes_to_stdout_alone():
    ran = cli("inspect", f"{made().factories}:perceptron", "--coupling", "--svg", "-")
    assert ran.code == 0
    ElementTree.fromstring(ran.out)
    assert "coupling main" in ran.err


def test_a_drawing_without_coupling_is_refused(tmp_path):
    ran = cli("inspect", f"{made().factories}:perceptron", "--svg", tmp_path / "a.svg")
    assert_letter(ran, "UsageError", 2, "add --coupling")


@pytest.mark.slow
def test_a_package_has_no_coupling():
    assert_letter(cli("inspect", made().out, "--coupling"), "UsageError", 2, "is a package")
