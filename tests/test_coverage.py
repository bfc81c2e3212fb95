"""The benchmark over every type of transformers tells apart what agrees, what is refused and what is wrong."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import every
import tinyconfigs

LARGE = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "intermediate_size": 11008,
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "num_local_experts": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 16,
    "rms_norm_eps": 1e-6,
}


@pytest.mark.parametrize("plan", tinyconfigs.PLANS[:2], ids=lambda plan: plan.kind)
def test_a_configuration_made_small_fits_together(plan):
    made = tinyconfigs.shrunk(LARGE, plan)
    assert made["hidden_size"] == 64
    assert made["hidden_size"] % made["num_attention_heads"] == 0
    assert made["num_attention_heads"] % made["num_key_value_heads"] == 0
    assert len(made["layer_types"]) == made["num_hidden_layers"] == 2
    assert set(made["layer_types"]) == set(LARGE["layer_types"])
    assert made["bos_token_id"] < made["vocab_size"]
    assert made["rms_norm_eps"] == 1e-6


def test_a_gap_is_seen_in_values_in_shapes_and_in_what_is_finite():
    a = np.array([1.0, 2.0, -np.inf])
    assert every.gap(a, a.copy()) == 0
    assert every.gap(a, np.array([1.0, 2.2, -np.inf])) == pytest.approx(0.2 / 5**0.5)
    assert every.gap(a, np.array([1.0, np.nan, -np.inf])) == np.inf
    assert every.gap(a, a[:2]) == np.inf
    assert every.gap(np.array([1, 2]), np.array([1, 3])) == 0.5


def test_a_row_for_the_page_names_no_place_of_this_machine():
    row = {"type": "x", "state": "refused", "reason": "no", "cpu_s": 3.0}
    row["where"] = "forward, /home/me/.venv/lib/python3/site-packages/transformers/a.py line 3"
    found = every.small(row)
    assert found == {
        "type": "x", "state": "refused", "reason": "no", "where": "forward, transformers/a.py line 3",
    }  # fmt: skip
