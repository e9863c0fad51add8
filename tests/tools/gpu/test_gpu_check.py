"""The GPU check without a GPU: its report, its targets, and its stages rehearsed in Triton's interpreter.

Run as a program, with TRITON_INTERPRET=1, this file is the rehearsal.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).parents[3]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks import processes  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.gpu import report as gpu_report  # noqa: E402
from benchmarks.speed import stopwatch as measure  # noqa: E402

LARGE = {"activation": "64x64x112x112", "x_bytes": 64 << 20}


def run_interpreted(*arguments: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def times(*rounds: float) -> dict:
    return measure.summary([measure.Round([time], queued=True) for time in rounds])


def timing_row(share: float, *, eager: float | None = None, **changes) -> dict:
    """Return a row whose Triton time is 1 ms."""
    row = LARGE | {"dtype": "float32", "granularity": "sample", "direction": "forward"} | changes
    triton, copy = times(1.0, 1.0), times(share, share)
    row |= {"times": {"triton": triton, "copy": copy}, "gb_per_s": 3000.0}
    row |= {"share_of_copy": measure.ratio(copy, triton), "speedup": {}}
    if eager is not None:
        row["speedup"]["eager"] = measure.ratio(times(eager, eager), triton)
    return row


def target(rows: list[dict], words: str) -> dict:
    (found,) = (each for each in gpu_report.targets(rows) if words in each["target"])
    return found


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


def test_targets_name_what_missed_them():
    rows = [timing_row(0.95), timing_row(0.85, activation="other"), timing_row(0.5, granularity="element")]
    found = target(rows, "sample noise in float32, forward")
    assert found["met"] is False
    assert found["measured"] == 2
    assert found["missed"] == ["other float32 sample forward"]
    assert found["worst"] == pytest.approx(0.85)
    assert target(rows, "element noise in float32, forward")["met"] is False
    assert target(rows, "sample noise in bfloat16, forward")["met"] is None
    assert target(rows, "compiled")["met"] is None


def test_targets_are_met_at_their_limits():
    rows = [timing_row(0.9), timing_row(0.6, granularity="element"), timing_row(0.9, eager=5.0)]
    for words in ("sample noise in float32, forward", "element noise in float32, forward", "5 times faster"):
        assert target(rows, words)["met"] is True
    assert target([timing_row(0.9, eager=4.9)], "5 times faster")["met"] is False


def test_targets_against_a_copy_leave_out_what_a_cache_holds():
    small = timing_row(0.1, x_bytes=(64 << 20) - 1, eager=1.0)
    assert target([small], "sample noise in float32, forward")["met"] is None
    assert target([small], "5 times faster")["met"] is False


def test_ratios_carry_the_spread_of_the_rounds():
    found = measure.ratio(times(2.0, 3.0, 5.0), times(1.0, 1.0, 2.0))
    assert found == {"value": 3.0, "low": 2.0, "high": 3.0}
    # A slow competitor has one round.
    assert measure.ratio(times(8.0), times(1.0, 2.0, 4.0)) == {"value": 4.0, "low": 8.0, "high": 8.0}


def test_summary_of_all_calls():
    rounds = [measure.Round([1.0, 2.0, 3.0], queued=True), measure.Round([4.0, 5.0, 6.0], queued=False)]
    found = measure.summary(rounds)
    assert found["rounds"] == [2.0, 5.0]
    assert (found["p20"], found["median"], found["p80"]) == pytest.approx((2.0, 3.5, 5.0))
    assert not found["queued"]


def test_a_captured_call_lives_as_long_as_its_replays(monkeypatch):
    """A graph holds no reference: freed memory that it writes to would be another tensor's."""
    graph = mock.Mock()
    stream = SimpleNamespace(wait_stream=lambda other: None, device=None)
    fakes = {
        **{name: lambda *_: stream for name in ("Stream", "current_stream")},
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": lambda: graph,
        "graph": lambda graph, stream: contextlib.nullcontext(),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    class Step:
        calls = 0

        def __call__(self):
            self.calls += 1
            return self.calls

    step = Step()
    alive = weakref.ref(step)
    outputs, replay = measure.capture(step)
    assert outputs == 4  # warmed up before
    del step
    gc.collect()
    assert alive() is not None
    replay()
    graph.replay.assert_called_once_with()
    assert alive().calls == 4
    del replay
    gc.collect()
    assert alive() is None


def test_stages_are_recorded_and_guarded(tmp_path):
    report = gpu_report.Report(tmp_path / "new" / "folder", {"GPU": "a | b"})

    def broken() -> dict:
        raise ArithmeticError("no such number")

    report.stage("good", lambda: {"summary": "all well", "failures": [], "number": 3})
    report.stage("broken", broken)
    report.stage("wrong", lambda: {"summary": "2 of 3", "failures": ["one differs"]})
    report.stage("absent", lambda: {"summary": "skipped: no tool", "failures": [], "skipped": True})
    assert report.failed == ["broken", "wrong"]
    report.data["timing"] = [timing_row(0.95, eager=7.0), timing_row(0.5, direction="both")]
    report.data["timing"][1]["peak_memory"] = {"triton": 2.0, "eager": 3.5}
    report.data["tiny"] = {"triton": 0.1}
    report.data["structures"] = [
        {
            "name": "KL",
            "structures": 26_560,
            "times": {"triton": times(1.0), "torch": times(3.0)},
            "wall_ms": {"triton": 1.0, "torch": 4.0},
            "speedup": measure.ratio(times(3.0), times(1.0)),
        }
    ]
    report.write()
    stored = json.loads((report.folder / "gpu_check.json").read_text("utf-8"))
    assert [stage["status"] for stage in stored["stages"].values()] == [
        "passed",
        "failed",
        "failed",
        "skipped",
    ]
    assert stored["stages"]["good"]["number"] == 3
    assert "no such number" in stored["stages"]["broken"]["failures"][0]
    text = (report.folder / "gpu_check.md").read_text("utf-8")
    for part in (
        "| GPU | a \\| b |",
        "| good | passed |",
        "- broken: ArithmeticError: no such number",
        "95 % (95–95)",
        "7.0 × (7.0–7.0)",
        "2.00 / 3.50 / –",
        "26,560",
        "| triton | 0.1000 |",
        "not measured",
    ):
        assert part in text
    widths = {}
    for line in text.splitlines():
        if line.startswith("|"):
            columns = line.replace("\\|", "").count("|")
            assert widths.setdefault("now", columns) == columns
        else:
            widths.clear()
    assert sorted(path.name for path in report.folder.iterdir()) == ["gpu_check.json", "gpu_check.md"]


def test_programs_are_stopped_at_their_limit(tmp_path):
    program = "import os, time; print(os.environ['A'], os.environ.get('B'), flush=True); time.sleep(60)"
    finished = processes.run(
        [sys.executable, "-c", program], 2.0, cwd=tmp_path, settings={"A": "set", "B": "set"}
    )
    assert finished == processes.Finished(None, "set set\n")
    done = processes.run([sys.executable, "-c", "raise SystemExit(3)"], 60.0, cwd=tmp_path, without=("PATH",))
    assert done == processes.Finished(3, "")
    assert finished.problems() == ["out of time; last line: set set"]
    assert done.problems() == ["exit code 3; last line: none"]
    assert processes.Finished(0, "words\n").problems() == []


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


def test_bytes_are_those_that_have_to_move():
    pytest.importorskip("triton")
    from benchmarks.gpu import noise_times
    from benchmarks.speed.activation_shapes import ActivationShape

    case = noise_times.Case(ActivationShape((3, 5, 7)), "element", "bfloat16")
    assert case.x_bytes == 210
    assert [case.bytes_moved(direction) for direction in noise_times.DIRECTIONS] == [420, 630, 1050]
    copies = noise_times.copies(case, torch.device("cpu"))
    for direction, copy in copies.items():
        assert copy().numel() == case.bytes_moved(direction) // 2


def test_the_timed_cases():
    pytest.importorskip("triton")
    from benchmarks.gpu import noise_times

    cases = noise_times.cases()
    assert len({case.name for case in cases}) == len(cases)
    assert sum(case.compiled for case in cases) == len(noise_times.COMPILED) <= 6
    # Every target against a copy has cases.
    rows = [
        timing_row(1.0)
        | {"x_bytes": case.x_bytes, "dtype": case.dtype, "granularity": case.granularity}
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
    from benchmarks.speed.activation_shapes import ActivationShape

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
        stopwatch = measure.Stopwatch(cpu)
        cases = [noise_times.Case(ActivationShape((2, 4, 4)), "sample", "bfloat16", compiled=True)]

        def identity():
            """Stand in for torch.compile."""
            return lambda function: function

        report.stage(
            "timings",
            lambda: gpu_check.time_cases(report, stopwatch, cases, 1e9, identity, rounds=2),
        )
        report.stage(
            "no time left",
            lambda: gpu_check.time_cases(report, stopwatch, cases, 0.0, identity),
        )
        report.data["structures"] = noise_times.time_structures(stopwatch, count=4, rounds=1, repeats=1)
        report.data["tiny"] = noise_times.time_tiny(stopwatch, ActivationShape((2, 3)), repeats=1)
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
    rehearse()
