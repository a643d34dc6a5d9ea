"""`noisepolicy-bench kernels` at small sizes: what it prints and writes, and that a wrong kernel is found out."""

import json

import pytest
import torch

from noisepolicy.benchmarks.kernels import bench, extras
from noisepolicy.benchmarks.kernels.cases import OPS, make_case
from noisepolicy.benchmarks.timing import MAX_CALLS, MIN_CALLS, measure
from noisepolicy.cli.bench import main
from noisepolicy.ops import native

CPU = torch.device("cpu")


@pytest.mark.slow
def test_the_table_the_json_and_the_report(tmp_path, capsys):
    threads = torch.get_num_threads()
    report = tmp_path / "report.html"
    files = ["--json", str(tmp_path / "result.json")], ["--output", str(report)]
    assert main([*files[0], "kernels", "--dim", "4096", "--batch", "8", "--no-compile", *files[1]]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert torch.get_num_threads() == threads
    assert [(row["op"], row["backend"]) for row in result["results"]] == [
        (op, backend) for op in OPS for backend in ("cpp", "torch")
    ]
    for row in result["results"]:
        assert {
            "op",
            "backend",
            "dtype",
            "batch",
            "dim",
            "threads",
            "median_us",
            "p20_us",
            "p80_us",
            "gb_per_s",
            "limit_fraction",
            "speedup",
        } <= set(row)
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["threads"] == 1 and row["gb_per_s"] > 0 and row["limit_fraction"] > 0
        assert set(row["speedup"]) == {"eager", "compile"} | ({"randn"} if "sample" in row["op"] else set())
        assert row["speedup"]["compile"] is None, "not measured"
        assert row["speedup"]["eager"] == pytest.approx(row["baselines_us"]["eager"] / row["median_us"])
        assert any(line.startswith(row["op"]) and f" {row['backend']} " in line for line in lines)
    assert set(result["call_overhead_us"]) == {"gaussian_sample", "gaussian_log_prob"}
    assert result["ppo_extra_memory"]["tensors_of_size"] == pytest.approx(2, abs=0.01)
    assert result["ppo_extra_memory"]["eager_tensors_of_size"] > 4
    html = report.read_text("utf-8")
    assert html.count("<tr") >= 9 and "<svg" in html and "gaussian_sample on cpp" in html
    assert not any(tag in html for tag in ("<script", "<link", "<img", "@import")), "the report is one file"


@pytest.mark.slow
def test_compiled_baseline(capsys):
    assert main(["kernels", "--op", "gaussian_sample", "--dim", "4096", "--batch", "8", "--backend", "cpp"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,) = result["results"]
    assert row["speedup"]["compile"] > 0 and result["compile_failures"] == []


def test_a_compiler_that_fails_is_named(monkeypatch, capsys):
    def fail(case):
        raise RuntimeError("no working C++ compiler\nand a long explanation")

    monkeypatch.setattr(bench, "compile_baseline", fail)
    monkeypatch.setattr(extras, "call_overhead", dict)
    assert main(["kernels", "--op", "gaussian_log_prob", "--dim", "64", "--batch", "2", "--backend", "cpp"]) == 0
    out = capsys.readouterr().out
    assert "no torch.compile baseline where the table says '-': RuntimeError: no working C++ compiler" in out
    result = json.loads(out.splitlines()[-1])
    assert result["results"][0]["speedup"]["compile"] is None
    assert result["compile_failures"][0]["reason"] == "RuntimeError: no working C++ compiler"


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_kernel_is_an_error(op, monkeypatch, capsys):
    name = "ppo_clip_loss_and_gradients" if op == "ppo_clip_loss" else op
    right = getattr(native, name)

    def wrong(*arguments):
        results = right(*arguments)
        if op == "gaussian_log_prob":
            return results + 0.1
        if op == "ppo_clip_loss":
            return results[0], (results[1][0], -results[1][1])
        return results[0] + 1e-4, *results[1:]

    monkeypatch.setattr(native, name, wrong)
    assert main(["kernels", "--op", op, "--dim", "4096", "--batch", "2", "--no-compile"]) == 1
    captured = capsys.readouterr()
    assert f"noisepolicy-bench: error: backend 'cpp' computes a wrong {op} at batch 2, dim 4096" in captured.err
    assert "differs from the reference by" in captured.err and "results" not in captured.out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_half_precision_passes_the_check(op, dtype):
    case = make_case(op, 3, 1024, dtype, CPU)
    expected = case.call("torch")
    case.check("cpp", case.call("cpp"), expected)
    if "sample" not in op:
        case.check("eager", case.run(case.eager), expected, slack=10)


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--op", "sort"], "unknown --op 'sort'; choose from gaussian_sample", 2),
        (["--dtype", "int8"], "unknown --dtype 'int8'", 2),
        (["--batch", "0"], "--batch must be positive, got 0", 2),
        (["--op", "spectral_sample", "--dim", "100"], "--dim 100 is not 4 x height x width", 2),
        (["--backend", "numpy"], "unknown backend 'numpy'", 2),
        (["--device", "tpu"], "unknown --device 'tpu'", 2),
    ],
)
def test_bad_input_is_one_line(arguments, message, code, capsys):
    assert main(["kernels", *arguments]) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_backend_that_is_not_there_is_an_error(capsys):
    assert main(["kernels", "--backend", "triton"]) == 1
    assert "backend 'triton' is not available" in capsys.readouterr().err
    assert main(["kernels", "--device", "cuda"]) == 1
    assert "sees no CUDA device" in capsys.readouterr().err


def test_list_backends_names_the_instruction_set(capsys):
    from noisepolicy import _C

    assert main(["--list-backends"]) == 0
    assert f"cpp      available ({_C.instruction_set()})" in capsys.readouterr().out


def test_callables_take_turns():
    order = []
    timings = measure({name: lambda name=name: order.append(name) for name in "ab"}, CPU, seconds=1e-6)
    assert MIN_CALLS <= order.count("a") - 3 <= MAX_CALLS
    assert order[6:12] == ["a", "b"] * 3, "after the warm-up, one call each"
    assert timings["a"].p20_us <= timings["a"].median_us <= timings["a"].p80_us


def test_two_threads_against_one():
    rows = extras.thread_scaling(["gaussian_log_prob"], [65_536])
    assert [row["dim"] for row in rows] == [65_536] and rows[0]["speedup"] == pytest.approx(
        rows[0]["one_thread_us"] / rows[0]["two_threads_us"]
    )
