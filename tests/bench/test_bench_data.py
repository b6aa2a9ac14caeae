import json

from rwkv_cluster.bench import data


def test_bench_measures_and_formats(tmp_path):
    arguments = ["--tokens", "3000", "--megabytes", "0.01", "--repeats", "1", "--seed-package", str(tmp_path)]
    result = data.run([*arguments, "--directory", str(tmp_path)])
    assert json.loads(json.dumps(result)) == result
    cases = {case["name"]: case for case in result["cases"]}
    assert {"integer array, 3 passes", "integer JSONL, 1 pass"} <= set(cases)
    assert all(case["ours"] > 0 for case in cases.values())
    assert cases["integer JSONL, 1 pass"]["ratio"] is None  # that folder holds no rival
    assert len(data.format(result).splitlines()) == 1 + len(cases)
    assert list(tmp_path.iterdir()) == []
