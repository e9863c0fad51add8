"""The GPU check without a GPU: its stages, rehearsed in Triton's interpreter, and what it makes of programs' outputs.

Run as a program, with TRITON_INTERPRET=1, this file is the rehearsal.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "tools")]

from gpu_rows import timing_row  # noqa: E402
from interpreted import run_interpreted  # noqa: E402
from triton_interpreter import patch_language_once  # noqa: E402

from benchmarks import processes  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.gpu import report as gpu_report  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_and_exit_code_2(tmp_path, capsys):
    assert main(["gpu-check", "--output", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "GPU" in printed.err
    assert not (tmp_path / "out").exists()


def test_the_options_are_listed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["gpu-check", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--output", "--minutes", "--commit"):
        assert option in printed


def test_outputs_of_other_programs_are_understood():
    pytest.importorskip("triton")
    from benchmarks.gpu import correctness as gpu_correctness

    output = "....\n1 failed, 41 passed, 3 skipped, 2 errors in 12.34s\n"
    expected = {"failed": 1, "passed": 41, "skipped": 3, "errors": 2}
    assert gpu_correctness.pytest_counts(output) == expected
    assert gpu_correctness.pytest_counts("== 7 passed in 71.20s (0:01:11) ==") == {"passed": 7}
    assert gpu_correctness.pytest_counts("no tests ran") == {}
    assert gpu_correctness.sanitizer_errors("========= ERROR SUMMARY: 0 errors\n") == 0
    assert gpu_correctness.sanitizer_errors("ERROR SUMMARY: 1 error\nERROR SUMMARY: 12 errors") == 13
    assert gpu_correctness.sanitizer_errors("Killed") is None


UNINITIALISED = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at sum_partials_kernel+0x160 in kernels.py:312
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7fb2fc000000
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::reduce_kernel<512, 4>(T3)+0x4d0
=========     by thread (1,0,0) in block (0,0,0)
========= ERROR SUMMARY: 2 errors
"""
RACES = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at draw_kernel+0xa0 in shared_kernels.py:60
=========     and Read access at draw_kernel+0x130 in shared_kernels.py:61 [508 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.mark.parametrize(
    ("tool", "output", "expected"),
    [
        ("memcheck", "========= ERROR SUMMARY: 0 errors\n", None),
        ("racecheck", "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", None),
        (
            "initcheck",
            UNINITIALISED,
            "2 errors of reads of memory that nothing was written to, in at::native::reduce_kernel, "
            "sum_partials_kernel",
        ),
        ("racecheck", RACES, "1 errors of races for shared memory, in draw_kernel"),
        ("memcheck", "Killed\n", "no summary of errors in the output"),
    ],
)
def test_each_sanitizer_runs_the_cases_and_its_reports_are_understood(tool, output, expected, monkeypatch):
    pytest.importorskip("triton")
    from benchmarks.gpu import correctness as gpu_correctness

    started = []

    def run(command, limit_s, **options):
        started.append((command, options["settings"]))
        return processes.Finished(0, output + "kernel draw_kernel: launched\n")

    monkeypatch.setattr(gpu_correctness.shutil, "which", lambda name, path: f"/bin/{name}")
    monkeypatch.setattr(processes, "run", run)
    found = gpu_correctness.sanitize(tool, 10.0)
    assert found["failures"] == ([] if expected is None else [expected])
    assert found["summary"].startswith("1 kernels, ")
    ((command, settings),) = started
    assert command[:3] == ["/bin/compute-sanitizer", "--tool", tool]
    assert command[-3:] == [sys.executable, "-m", "benchmarks.gpu.sanitized_cases"]
    assert ("--report-api-errors" in command) == (tool == "memcheck")
    assert settings == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def test_the_check_has_all_its_stages_and_sanitizes_compiled_kernels(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from benchmarks.gpu import check as gpu_check
    from benchmarks.gpu import correctness as gpu_correctness
    from benchmarks.gpu import noise_times

    order = []

    def found(name):
        def stage(*arguments):
            order.append(name if name != "sanitize" else arguments[0])
            return {"summary": "", "failures": []}

        return stage

    in_process = ("uniforms", "values", "cuda_graph", "determinism", "wide_index")
    for name in ("kernel_tests", "kernels_run", "sanitize", *in_process):
        monkeypatch.setattr(gpu_correctness, name, found(name))
    monkeypatch.setattr(noise_times, "compile_cases", found("compile_cases"))
    monkeypatch.setattr(gpu_check, "time_everything", lambda *_: order.append("timing"))
    report = gpu_report.Report(tmp_path, {"GPU": "none"})
    gpu_check.check(report, torch.device("cpu"), 60.0)
    assert report.failed == []
    tools = {"memcheck", "racecheck", "initcheck"}
    assert tools | {"kernel tests", "every kernel runs", "compilation", "determinism", "CUDA graph"} <= set(
        report.data["stages"]
    )
    assert len(report.data["stages"]) == 11
    assert order[-1] == "timing"
    assert all(order.index("kernels_run") < order.index(tool) for tool in tools)


def test_without_the_sanitizer_its_stages_are_skipped(monkeypatch):
    pytest.importorskip("triton")
    from benchmarks.gpu import correctness as gpu_correctness

    monkeypatch.setattr(gpu_correctness.shutil, "which", lambda name, path: None)
    for tool in gpu_correctness.SANITIZERS:
        assert gpu_correctness.sanitize(tool, 10.0)["skipped"]


@pytest.mark.slow
def test_the_kernels_tests_need_no_package_that_a_gpus_machine_may_lack(monkeypatch):
    pytest.importorskip("triton")
    from benchmarks.gpu import correctness as gpu_correctness

    started = []

    def run(command, limit_s, **options):
        started.append([*command[1:], "--collect-only"])
        return processes.Finished(0, "1 passed in 1.0s")

    monkeypatch.setattr(processes, "run", run)
    assert gpu_correctness.kernel_tests(10.0)["failures"] == []
    (command,) = started
    hidden = (
        "import sys; sys.modules['jsonargparse'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    )
    # -n would start workers, in which the package is not hidden.
    options = [part for part in command[2:] if part not in ("-n", "5", "4", "3", "2", "6")]
    finished = run_interpreted("-c", hidden, *options)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "test_triton_noise.py" in finished.stdout


def test_the_timed_cases():
    pytest.importorskip("triton")
    from benchmarks.gpu import noise_times

    cases = noise_times.cases()
    assert len({case.name for case in cases}) == len(cases)
    assert sum(case.compiled for case in cases) == len(noise_times.COMPILED) <= 6
    # Every target against a copy has cases.
    rows = [
        timing_row(1.0)
        | {"x_bytes": case.tensor_bytes, "dtype": case.dtype, "granularity": case.granularity}
        | {"direction": direction}
        for case in cases
        for direction in noise_times.DIRECTIONS
    ]
    assert all(found["met"] for found in gpu_report.targets(rows) if "copy" in found["target"])


@pytest.mark.slow
def test_every_kernel_has_a_case_for_the_sanitizer():
    finished = run_interpreted("-m", "benchmarks.gpu.sanitized_cases", "--device", "cpu")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "NOT LAUNCHED" not in finished.stdout
    defined = {
        line.removeprefix("def ").partition("(")[0]
        for path in (ROOT / "bmrs_kernels").rglob("*.py")
        for line in path.read_text("utf-8").splitlines()
        if line.startswith("def ") and line.partition("(")[0].endswith("_kernel")
    }
    launched = {
        line.split()[1].rstrip(":") for line in finished.stdout.splitlines() if line.startswith("kernel ")
    }
    assert launched == defined


def test_kernels_that_no_case_runs_are_named(no_kernel_starts, monkeypatch, capsys):
    from benchmarks.gpu import sanitized_cases

    monkeypatch.setattr(sanitized_cases, "check", lambda *_: None)
    monkeypatch.setattr(sanitized_cases, "NOISE", {})
    assert sanitized_cases.main(["--device", "cpu"]) == 1
    assert "kernel draw_kernel: NOT LAUNCHED" in capsys.readouterr().out


@pytest.mark.slow
def test_rehearsal():
    finished = run_interpreted(str(Path(__file__)))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "rehearsed" in finished.stdout


def rehearse() -> None:
    """Run the stages on the CPU, on shapes of a few elements."""
    from benchmarks.gpu import check as gpu_check
    from benchmarks.gpu import correctness as gpu_correctness
    from benchmarks.gpu import noise_times
    from benchmarks.speed import competitors
    from benchmarks.speed.activation_shapes import ActivationShape
    from benchmarks.speed.function_cases import FunctionCase
    from benchmarks.speed.stopwatch import Stopwatch

    def copying_capture(call):
        """Stand in for a CUDA graph."""
        outputs = call()

        def replay():
            for old, new in zip(outputs, call(), strict=True):
                old.data.copy_(new)

        return outputs, replay

    gpu_correctness.capture = copying_capture
    cpu = torch.device("cpu")
    image = ActivationShape((2, 4, 2, 2))
    channels_last = image._replace(channels_last=True)
    with tempfile.TemporaryDirectory() as folder:
        report = gpu_report.Report(Path(folder), {"GPU": "none"})
        for name, stage in {
            "uniforms": lambda: gpu_correctness.uniforms(cpu, shapes=((13,), (2, 3)), seeds=(0, 2**64 - 1)),
            "values": lambda: gpu_correctness.values(
                cpu,
                [
                    (image, torch.float32),
                    (channels_last, torch.bfloat16),
                    (ActivationShape((3, 5)), torch.float64),
                ],
            ),
            "CUDA graph": lambda: gpu_correctness.cuda_graph(cpu, image, replays=2, granularities=["batch"]),
            "determinism": lambda: gpu_correctness.determinism(
                cpu, [channels_last], runs=2, dtypes=[torch.bfloat16]
            ),
            "beyond 32-bit indices": lambda: gpu_correctness.wide_index(cpu, (2, 3, 4, 4)),
        }.items():
            report.stage(name, stage)
        stopwatch = Stopwatch(cpu)
        shape = ActivationShape((2, 4, 4))
        cases = [FunctionCase("multiply_noise", shape, "sample", "bfloat16", compiled=True)]
        # In place of torch.compile.
        competitors.compiler = lambda: lambda function: function
        report.stage(
            "timings",
            lambda: gpu_check.time_cases(report, stopwatch, cases, 1e9, rounds=2),
        )
        report.stage(
            "no time left",
            lambda: gpu_check.time_cases(report, stopwatch, cases, 0.0),
        )
        report.data["structures"] = noise_times.time_structures(stopwatch, count=4, rounds=1, repeats=1)
        report.data["tiny"] = noise_times.time_tiny(stopwatch, ActivationShape((2, 3)), repeats=1)
        contest = competitors.Contest(
            FunctionCase("multiply_noise", ActivationShape((2, 3)), "element"), stopwatch.device
        )
        # What a GPU records in a graph.
        gradients = noise_times.step_on_new_leaves(contest)()
        assert [each.shape for each in gradients] == [each.shape for each in contest.inputs]
        report.write()
        text = (report.folder / "gpu_check.md").read_text("utf-8")
    print(text)
    assert not report.failed, report.failed
    assert len(report.data["timing"]) == 3
    assert set(report.data["timing"][0]["speedup"]) == {"eager", "compiled"}
    assert report.data["stages"]["no time left"]["left_out"] == [case.name for case in cases]
    for part in ("2x4x4", "pruning decision", "plain formula, eager"):
        assert part in text
    print("rehearsed")


if __name__ == "__main__":
    patch_language_once()
    rehearse()
