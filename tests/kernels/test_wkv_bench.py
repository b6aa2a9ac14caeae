from __future__ import annotations

import json
import os
from functools import partial

import pytest
import torch
from naive_wkv import naive, random_inputs, relative_errors, values_and_gradients

from rwkv_cluster.bench import compiled_chunk, wkv
from rwkv_cluster.errors import ConfigError

TINY = ["--batch", "1", "--time", "20", "--width", "8", "--head-size", "4", "--repeats", "2", "--no-compile"]
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
    assert names["wkv7"] == ["native", "chunked", "time loop", "rwkv-trainer loop"]
    assert names["wkv6"] == names["wkv5"] == ["native", "chunked", "time loop"]
    text = wkv.format(result)
    assert all(f"{version} {name}" in text for version in names for name in names[version])
    for case in result["cases"]:
        ours = case["contenders"]["native"]
        assert ours["ratio"] == 1.0
        assert ours["cpu_s_min"] <= ours["cpu_s"] <= ours["cpu_s_max"]
        assert ours["tokens_per_s"] == pytest.approx(20 / ours["cpu_s"])
    assert capsys.readouterr().out == ""
    assert "LEFT_BEHIND" not in os.environ
    assert torch.get_num_threads() == threads


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--width 8 .*--head-size 3"):
        wkv.run([*TINY, "--head-size", "3"])
    with pytest.raises(ConfigError, match="holds rwkv_trainer"):
        wkv.run([*TINY, "--seed-package", str(tmp_path)])


@pytest.mark.parametrize("time", [20, 64])
def test_the_rival_for_the_compiler_is_right(time):
    *inputs, state = (x.float().double() for x in random_inputs("wkv7", 2, time, 2, 16))
    wanted = values_and_gradients(partial(naive, "wkv7"), [*inputs, torch.zeros_like(state)])
    from_zero = values_and_gradients(lambda *x: compiled_chunk.wkv7(*x[:-1]), [*inputs, state], torch.float32)
    assert max(relative_errors(from_zero[:-1], wanted[:-1])) < 2e-5
