from __future__ import annotations

import json
import os

import pytest
import torch

from rwkv_cluster.bench import wkv
from rwkv_cluster.errors import ConfigError

TINY = ["--batch", "1", "--time", "20", "--width", "8", "--head-size", "4", "--repeats", "2"]
RIVAL = """
import os
print("noise")
HEAD_SIZE = int(os.environ["RWKV_HEAD_SIZE_A"])
os.environ["LEFT_BEHIND"] = "1"
def _run_torch_rwkv7g(q, w, k, v, a, b):
    assert q.shape == (1, 20, 8) and HEAD_SIZE == 4 and w.max() <= -0.5
    return q * w * k * v * a * b
"""


def test_every_contender_is_measured_and_shown(tmp_path, capsys):
    module = tmp_path / "rwkv_trainer" / "model" / "model.py"
    module.parent.mkdir(parents=True)
    module.write_text(RIVAL)
    threads = torch.get_num_threads()
    result = wkv.run([*TINY, "--seed-package", str(tmp_path)])
    assert json.loads(json.dumps(result)) == result
    names = {case["version"]: list(case["contenders"]) for case in result["cases"]}
    assert names["wkv7"] == ["chunked", "time loop", "rwkv-trainer loop"]
    assert names["wkv6"] == names["wkv5"] == ["chunked", "time loop"]
    text = wkv.format(result)
    assert all(f"{version} {name}" in text for version in names for name in names[version])
    for case in result["cases"]:
        ours = case["contenders"]["chunked"]
        assert ours["ratio"] == 1.0
        assert ours["cpu_s_min"] <= ours["cpu_s"] <= ours["cpu_s_max"]
        assert ours["tokens_per_s"] == pytest.approx(20 / ours["cpu_s"])
    assert capsys.readouterr().out == ""
    assert "LEFT_BEHIND" not in os.environ
    assert torch.get_num_threads() == threads


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--width 8 is not a multiple of --head-size 3"):
        wkv.run([*TINY, "--head-size", "3"])
    with pytest.raises(ConfigError, match="holds rwkv_trainer"):
        wkv.run([*TINY, "--seed-package", str(tmp_path)])
