"""`noisepolicy-bench` at small sizes: numbers, report and comparison, and that a wrong engine is found out."""

import copy
import json
import subprocess
import time

import pytest
import torch

from noisepolicy.benchmarks.kernels import bench as kernels
from noisepolicy.benchmarks.kernels import extras
from noisepolicy.benchmarks.latency import bench, cases, training
from noisepolicy.benchmarks.latency.bench import next_gain
from noisepolicy.benchmarks.latency.cases import IMAGE_TOLERANCE, check_output
from noisepolicy.benchmarks.latency.compare import compare_reports, read_report
from noisepolicy.benchmarks.latency.engines import SPLIT
from noisepolicy.benchmarks.latency.overhead import time_overhead
from noisepolicy.benchmarks.machine import MemoryMeter
from noisepolicy.benchmarks.report import write_report
from noisepolicy.benchmarks.timing import Timer, measure
from noisepolicy.cli.bench import main
from noisepolicy.engines import available_engines

CPU = torch.device("cpu")
SHORT = ["--device", "cpu", "--steps", "1", "--seconds", "0.02"]
ENGINES = ["eager", *(["onnx"] if available_engines(CPU)["onnx"] is None else [])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a real report of denoisers and rollouts."""
    path = tmp_path_factory.mktemp("latency")
    arguments = ["--engine", *ENGINES, "--batch-sizes", "1", "2", "--skip", "kernels", "training"]
    assert main([*SHORT, *arguments, "--output", str(path)]) == 0
    return path


@pytest.fixture
def result(folder):
    return read_report(folder / "latency.json")


@pytest.fixture
def measured(result, monkeypatch):
    """The command without its minutes: it measures what was measured before."""
    monkeypatch.setattr(bench, "run", lambda **settings: copy.deepcopy(result))
    return result


@pytest.mark.slow
def test_the_numbers(result):
    assert [(row["backend"], row["batch"]) for row in result["denoiser"]] == [(e, n) for n in (1, 2) for e in ENGINES]
    for row in result["denoiser"]:
        assert set(row) == {
            "backend",
            "dtype",
            "batch",
            "median_ms",
            "p20_ms",
            "p95_ms",
            "images_per_s",
            "peak_memory_mb",
            "difference",
            "eager_ms",
            "speedup_over_eager",
        }
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p95_ms"] and row["dtype"] == "float32"
        assert row["difference"] < 1e-3
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["median_ms"])
        assert row["speedup_over_eager"] == pytest.approx(row["eager_ms"] / row["median_ms"])
    assert [(row["backend"], row["batch"]) for row in result["rollout"]] == [(e, n) for n in (1, 2) for e in ENGINES]
    for row in result["rollout"]:
        split = row["split_ms"]
        assert tuple(split) == SPLIT and min(split.values()) >= 0
        # The parts between embeddings and images are the whole of what is timed, whatever the machine does.
        assert split["denoiser"] + split["scheduler"] + split["vae"] == pytest.approx(row["median_ms"])
        assert row["loop_overhead_fraction"] == pytest.approx(split["scheduler"] / row["median_ms"])
        assert 0 <= row["loop_overhead_fraction"] < 0.6 and row["num_inference_steps"] == 1
        assert row["speedup_over_diffusers"] == pytest.approx(row["diffusers_ms"] / row["median_ms"])
    assert result["backends"]["denoisers"] == available_engines(CPU)
    assert result["machine"]["threads"] == 1 and result["machine"]["versions"]["torch"] == torch.__version__
    assert result["next_gain"].startswith("a rollout of 2 images at 1 step on ")
    assert result["general"]["difference"] == 0


def test_the_general_way_makes_the_images_of_the_own_call():
    row = time_overhead(cases.ModelSpec("shapes", "float32", CPU), 2, 1.5, 0.01)
    assert row["difference"] == 0 and row["batch"] == row["num_inference_steps"] == 2
    # The bar is 2%. A few pairs on a busy machine tell no more than this.
    assert row["own_ms"] > 0 and row["overhead_fraction"] < 0.25
    assert time_overhead(cases.ModelSpec("other", "float32", CPU), 2, 1.5, 0.01) is None


@pytest.mark.slow
def test_the_report_is_one_file(folder):
    html = (folder / "latency.html").read_text("utf-8")
    assert html.count("<svg") == 2 and html.count("</svg>") == 2
    assert not any(tag in html for tag in ("<script", "<link", "<img", "@import", "src="))
    for engine in ENGINES:
        assert html.count(f"<td>{engine}</td><td>float32</td>") == 4
    assert "it needs an NVIDIA GPU" in html and "The next gain:" in html and "embeddings to images" in html


@pytest.mark.slow
def test_the_report_is_made_from_the_numbers(folder, tmp_path, capsys):
    (tmp_path / "latency.json").write_bytes((folder / "latency.json").read_bytes())
    assert main(["report", str(tmp_path / "latency.json")]) == 0
    assert f"report   {tmp_path / 'latency.html'}" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "latency.json"), "--output", str(tmp_path / "again.html")]) == 0
    tables = [path.read_text("utf-8").count("<td>") for path in tmp_path.glob("*.html")]
    assert tables == [(folder / "latency.html").read_text("utf-8").count("<td>")] * 2


@pytest.mark.parametrize("content", ["", "[]", '{"scale": []}', '{"rollout": []}', '{"results": [{"batch": 1}]}'])
def test_there_is_no_report_of_something_else(tmp_path, capsys, content):
    (tmp_path / "other.json").write_text(content)
    assert main(["report", str(tmp_path / "other.json")]) == 2
    error = capsys.readouterr().err
    assert f"cannot make a report of {tmp_path / 'other.json'}" in error and error.count("\n") == 1
    assert not (tmp_path / "other.html").exists()


@pytest.mark.slow
def test_two_at_once_have_folders_of_their_own(measured, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "bench-now")
    assert main([]) == main([]) == 0
    assert [path.parent.name for path in sorted(tmp_path.glob("runs/*/latency.json"))] == ["bench-now", "bench-now-2"]


@pytest.mark.slow
def test_what_is_read_from_outside_is_escaped(result, tmp_path):
    result["model"] = result["machine"]["processor"] = "<script>alert(1)</script>"
    result["backends"]["denoisers"]["onnx"] = "<b>reason</b>"
    write_report(tmp_path / "latency.html", result)
    html = (tmp_path / "latency.html").read_text("utf-8")
    assert "<script" not in html and "<b>reason" not in html and html.count("&lt;script&gt;") >= 2


@pytest.mark.slow
@pytest.mark.browser
def test_the_report_opens(folder, tmp_path, browser):
    picture = tmp_path / "latency.png"
    subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--window-size=1100,2400",
            f"--screenshot={picture}",
            f"file://{folder / 'latency.html'}",
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert picture.stat().st_size > 50_000


@pytest.mark.slow
def test_every_part_is_measured(tmp_path, monkeypatch, capsys):
    # Less of each than a user gets.
    run_kernels = kernels.run
    monkeypatch.setattr(kernels, "run", lambda **settings: run_kernels(op_names=["gaussian_log_prob"], **settings))
    monkeypatch.setattr(extras, "run", lambda *arguments: {})
    monkeypatch.setattr(training, "NUM_ITERATIONS", 1)
    output = tmp_path / "report"
    arguments = ["--engine", "eager", "--batch-sizes", "1", "--output", str(output), "--json", str(tmp_path / "copy")]
    assert main([*SHORT, *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result == json.loads((tmp_path / "copy").read_text()) == json.loads((output / "latency.json").read_text())
    (row,) = result["training"]
    assert set(row["split_ms"]) == {"frozen_model", "reward", "policy", "other"} and row["speedup_over_eager"] == 1
    assert row["iteration_ms"] == pytest.approx(sum(row["split_ms"].values()))
    assert {(row["op"], row["backend"]) for row in result["kernels"]} >= {("gaussian_log_prob", "torch")}
    assert "an iteration of training on eager" in result["next_gain"]
    html = (output / "latency.html").read_text("utf-8")
    assert "One iteration of training" in html and "gaussian_log_prob" in html
    assert any("compile" in line and "available" in line for line in lines)


@pytest.mark.slow
def test_compare_with_itself_and_with_a_faster_past(folder, measured, tmp_path, capsys):
    command = ["--output", str(tmp_path / "new"), "--compare"]
    assert main([*command, str(folder / "latency.json")]) == 0
    captured = capsys.readouterr()
    num_rows = 4 * len(ENGINES)
    assert f"0 of {num_rows} figures are slower" in captured.out and captured.err == ""

    past = copy.deepcopy(measured)
    past["machine"]["processor"] = "an older one"
    for name in ("median_ms", "p20_ms", "p95_ms"):
        past["rollout"][0][name] /= 10
    (tmp_path / "old.json").write_text(json.dumps(past))
    assert main([*command, str(tmp_path / "old.json")]) == 1
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    slower = [line for line in lines if line.startswith("slower: ")]
    assert len(slower) == 1 and slower[0].startswith("slower: rollout eager float32, batch 1, 1 step: ")
    assert f"1 of {num_rows} figures are slower" in captured.out
    assert json.loads(lines[-1])["regressions"] == slower
    assert "warning: the machine's processor was an older one and is" in captured.err


@pytest.mark.slow
def test_nothing_in_common_is_said(folder, measured, tmp_path, capsys):
    past = {**measured, "denoiser": [], "rollout": []}
    (tmp_path / "old.json").write_text(json.dumps(past))
    assert main(["--output", str(tmp_path / "new"), "--compare", str(tmp_path / "old.json")]) == 2
    assert "has no row that was measured here" in capsys.readouterr().err
    assert (tmp_path / "new/latency.json").exists(), "what was measured is kept"


def _report(median: float, p20: float, p95: float) -> dict:
    row = {"backend": "onnx", "dtype": "float32", "batch": 1, "median_ms": median, "p20_ms": p20, "p95_ms": p95}
    return {"denoiser": [row], "rollout": [], "machine": {}}


@pytest.mark.parametrize(
    ("old", "new", "is_slower"),
    [
        ((10, 10, 10), (10.4, 10.4, 10.4), False),  # less than 5%
        ((10, 10, 10), (10.6, 10.6, 10.6), True),
        ((10, 9, 12), (11.4, 10.4, 12.4), False),  # 14%, and noise of 15% and 9%
        ((10, 9, 12), (13, 12, 14), True),
        ((10, 10, 10), (5, 5, 5), False),
    ],
)
def test_a_regression_is_more_than_noise(old, new, is_slower):
    comparison = compare_reports(_report(*old), _report(*new))
    assert bool(comparison.regressions) == is_slower and comparison.num_compared == 1


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"denoiser": [{}], "rollout": [], "machine": {}}'])
def test_a_file_that_is_no_report(content, tmp_path, capsys):
    (tmp_path / "old.json").write_text(content)
    assert main(["--compare", str(tmp_path / "old.json"), "--output", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert "is not a latency.json of noisepolicy-bench" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "tensorrt"], "engine 'tensorrt' does not run on cpu here: it needs an NVIDIA GPU"),
        (["--engine", "eager", "tpu"], "unknown --engine 'tpu'; choose from eager, compile, onnx"),
        (["--batch-sizes", "0"], "--batch-sizes must be positive, got [0]"),
        (["--steps", "-1"], "--steps must be positive, got [-1]"),
        (["--threads", "-2"], "--threads must be positive, got [-2]"),
        (["--seconds", "0"], "--seconds must be positive, got 0"),
        (["--skip", "lunch"], "unknown --skip 'lunch'; choose from kernels"),
        (["--device", "tpu"], "unknown --device 'tpu'"),
        (["--model", "./nowhere"], "cannot load --model ./nowhere: there is no model folder ./nowhere"),
        (["--compare", "nowhere.json"], "--compare nowhere.json is not a latency.json"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    assert main([*SHORT[:2], *arguments, "--output", str(tmp_path / "report")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "arguments", [["--dtype", "int8"], ["--steps", "many"], ["--batch-size-of", "1"], ["lunch"], ["--json"]]
)
def test_a_command_line_that_cannot_be_read(arguments, capsys):
    with pytest.raises(SystemExit) as exit_request:
        main(arguments)
    error = capsys.readouterr().err
    assert exit_request.value.code == 2 and error.startswith("noisepolicy-bench: error: ") and error.count("\n") == 1


def test_an_output_that_is_a_file(tmp_path, capsys):
    (tmp_path / "report").write_text("mine")
    assert main(["--output", str(tmp_path / "report")]) == 2
    assert "is a file; give a folder" in capsys.readouterr().err and (tmp_path / "report").read_text() == "mine"


def test_list_backends_names_the_engines(capsys):
    assert main(["--list-backends"]) == 0
    out = capsys.readouterr().out
    assert "engines on cpu" in out and "tensorrt     it needs an NVIDIA GPU" in out


def _plant(monkeypatch, spoil):
    """An engine that `spoil` makes of the frozen model, and a clock that must not start."""

    def never(*arguments, **settings):
        raise AssertionError("a wrong engine was timed")

    monkeypatch.setattr(cases, "use_engine", lambda frozen, name, dtype=None: spoil(frozen))
    monkeypatch.setattr(Timer, "measure", never)


def test_a_wrong_denoiser_is_not_timed(monkeypatch, tmp_path, capsys):
    def spoil(frozen):
        frozen.denoiser.register_forward_hook(lambda module, inputs, output: (output[0] + 1e-2,))

    _plant(monkeypatch, spoil)
    arguments = ["--engine", "compile", "--batch-sizes", "1", "--skip", "kernels", "--output", str(tmp_path / "new")]
    assert main([*SHORT, *arguments]) == 1
    error = capsys.readouterr().err
    assert "the denoiser of compile float32 at batch 1 is wrong: it differs from eager PyTorch by 0.01" in error
    assert not (tmp_path / "new").exists()


def test_a_wrong_image_is_not_timed(monkeypatch, capsys):
    def spoil(frozen):
        decode = frozen.vae.decode
        monkeypatch.setattr(frozen.vae, "decode", lambda *a, **k: (decode(*a, **k)[0] + 1e-2,), raising=False)

    _plant(monkeypatch, spoil)
    arguments = ["--engine", "compile", "--batch-sizes", "1", "--skip", "kernels", "denoiser"]
    assert main([*SHORT, *arguments]) == 1
    assert "an image of compile float32 (batch 1, steps 1) is wrong" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", IMAGE_TOLERANCE)
def test_tolerances(dtype):
    right = torch.full((2, 3, 8, 8), 0.5)
    for is_image in (False, True):
        check_output("it", right, right, dtype, is_image=is_image)
        with pytest.raises(RuntimeError, match=r"differs from eager PyTorch by 0\.2"):
            check_output("it", right + 0.2, right, dtype, is_image=is_image)
        with pytest.raises(RuntimeError, match="differs"):
            check_output("it", right * float("nan"), right, dtype, is_image=is_image)
        with pytest.raises(RuntimeError, match=r"its shape is \(1, 3, 8, 8\), expected \(2, 3, 8, 8\)"):
            check_output("it", right[:1], right, dtype, is_image=is_image)


def test_the_next_gain_is_the_largest_part_of_the_fastest():
    rows = [
        {
            "backend": backend,
            "dtype": dtype,
            "batch": 64,
            "num_inference_steps": 2,
            "median_ms": sum(parts),
            "split_ms": {**dict(zip(("denoiser", "vae"), parts, strict=True)), "reward": None},
        }
        for backend, dtype, parts in (("eager", "float32", (80.0, 10.0)), ("openvino", "bfloat16", (10.0, 40.0)))
    ]
    assert next_gain(rows, []) == (
        "a rollout of 64 images at 2 steps on openvino bfloat16: vae has 80%, and halving it would make the whole "
        "1.67x faster"
    )
    assert next_gain([], []) == "nothing was measured that tells"


@pytest.mark.skipif(MemoryMeter(CPU).peak_mb(lambda: None) is None, reason="this system does not tell")
def test_peak_memory_is_of_the_call():
    meter = MemoryMeter(CPU)
    peak = meter.peak_mb(lambda: torch.ones(64 * 2**20 // 4).sum())
    assert 60 < peak < 80
    assert meter.peak_mb(lambda: None) < 10, "what was freed does not count"


def test_a_slow_call_needs_no_warm_up():
    calls = []
    measure({"slow": lambda: calls.append(0)}, CPU, seconds=1e-6, known_costs={"slow": 10.0})
    assert len(calls) == 3
