"""Every benchmark runs with --quick and prints one JSON line with the documented fields. Figures are not checked."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FIELDS = {
    "advantages": {"leaves", "depth", "seconds"},
    "scheduler": {
        *("trees", "segments", "us_per_segment", "us_per_token", "us_per_response"),
        *("decode_us_per_segment", "engine_us_per_segment"),
    },
    "sampling": {"shape", "trajectory_tokens_per_s", "ratio_to_iid", "ratio_to_hf_generate"},
    "packing": {
        "shape",
        "flat_over_unique",
        "speedup",
        "efficiency",
        "memory_ratio",
        "max_logprob_error",
        "max_grad_error",
    },
    "servers": {"shape", "trajectory_tokens_per_s", "ratio_to_n16", "recomputed", "client_cpu"},
    "training": {"shape", "speedup", "sampling_speedup", "update_speedup", "sample_share", "update_share", "threads"},
}


def check(found: dict, name: str) -> None:
    assert found["name"] == name
    assert {"results", "versions", "device", "commit"} <= found.keys()
    assert found["results"] and all(FIELDS[name] <= row.keys() for row in found["results"])


QUICKEST = "advantages"  # ends within seconds


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == QUICKEST else pytest.mark.slow) for name in FIELDS]
)
def test_a_benchmark_ends_with_one_json_line(name: str, tmp_path: Path) -> None:
    if name == "servers" and find_spec("vllm") is None:
        pytest.skip("no vLLM: `make test-vllm`")
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--out", out]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    check(found, name)
    assert json.loads(out.read_text()) == found
    if name == "packing":
        for row in found["results"]:
            assert row["max_logprob_error"] < 1e-5 and row["max_grad_error"] < 1e-5
            assert row["efficiency"] == pytest.approx(row["speedup"] / row["flat_over_unique"])


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_have_the_promised_fields(path: Path) -> None:
    check(json.loads(path.read_text()), path.stem.removesuffix("-2-threads"))
