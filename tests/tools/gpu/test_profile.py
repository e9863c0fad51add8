"""Nsight Compute's report without a GPU: its CSV is understood, and every kernel has a case."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from interpreted import run_interpreted

pytest.importorskip("triton")

from benchmarks import processes
from benchmarks.__main__ import main
from benchmarks.gpu import profile as kernel_profile

# As ncu --csv --page raw prints it: messages, names, units, a line for each launch.
REPORT = """\
==PROF== Connected to process 4711 (/usr/bin/python3.12)
==PROF== Profiling "draw_kernel": 0%....50%....100% - 12 passes
==PROF== Disconnected from process 4711
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"dram__bytes.sum.per_second","gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum",\
"launch__registers_per_thread","sm__inst_issued.avg.pct_of_peak_sustained_active",\
"sm__warps_active.avg.pct_of_peak_sustained_active",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_long_scoreboard_not_issued_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_selected_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio"
"","","","","","","","","","","","Gbyte/second","%","usecond","register/thread","%","%","inst","inst","inst","inst",\
"inst","inst"
"0","4711","python3.12","127.0.0.1","draw_kernel","1","7","(128, 1, 1)","(8, 1, 1)","0","9.0","2.50","0.10","9.25",\
"58","4.00","12.00","11.5","10.0","0.25","1","2","3"
"1","4711","python3.12","127.0.0.1","scale_rows_forward_kernel","1","7","(128, 1, 1)","(25,088, 1, 1)","0","9.0",\
"2,712.50","91.30","151.48","32","9.00","88.00","44","43","0.1","1","2.5","0"
==WARNING== Something at the end
"""
OUTPUT = (
    "noise: done\n"
    "multiply_noise 64x64x112x112 float32 sample\tdraw_kernel\n"
    "multiply_noise 64x64x112x112 float32 sample\tscale_rows_forward_kernel\n"
)


def row_of(markdown: str, kernel: str) -> list[str]:
    (line,) = (line for line in markdown.splitlines() if f"| {kernel} |" in line)
    return line.strip("| ").split(" | ")


def test_the_table_says_what_bounds_each_kernel():
    markdown = kernel_profile.as_markdown(kernel_profile.parsed(REPORT), kernel_profile.launches(OUTPUT))
    case = "multiply_noise 64x64x112x112 float32 sample"
    assert row_of(markdown, "scale_rows_forward_kernel") == [
        *(case, "scale_rows_forward_kernel", "0.1515", "2712", "91 %", "9 %", "88 %", "32"),
        "long scoreboard 44.0, wait 2.5, math pipe throttle 0.1",
    ]
    assert row_of(markdown, "draw_kernel")[:4] == [case, "draw_kernel", "0.0092", "2"]
    assert row_of(markdown, "draw_kernel")[-1] == "long scoreboard 11.5, barrier 3.0, wait 2.0"


def test_launches_that_do_not_fit_the_report_name_no_case():
    for output in ("", OUTPUT + "one more\tdraw_kernel\n"):
        markdown = kernel_profile.as_markdown(kernel_profile.parsed(REPORT), kernel_profile.launches(output))
        assert row_of(markdown, "draw_kernel")[0] == "unknown"


def test_metrics_under_other_names_and_units():
    changed = (
        REPORT.replace("gpu__dram_throughput", "dram__throughput")
        .replace('"Gbyte/second","%","usecond"', '"Tbyte/s","%","ms"')
        .replace("launch__registers_per_thread", "launch__something_else")
    )
    markdown = kernel_profile.as_markdown(kernel_profile.parsed(changed), kernel_profile.launches(OUTPUT))
    row = row_of(markdown, "draw_kernel")
    assert row[2:5] == ["9.2500", "2500", "0 %"]
    assert row[7] == ""


@pytest.mark.parametrize("text", ["", "==ERROR== No kernels were profiled.\n", '"ID","Kernel Name"\n'])
def test_a_report_without_launches(text):
    assert kernel_profile.parsed(text) == []


@pytest.fixture
def gpu(monkeypatch):
    """A machine that seems to have a GPU and ncu."""
    monkeypatch.setattr(kernel_profile, "why_not", lambda: None)
    monkeypatch.setattr(kernel_profile.shutil, "which", lambda name, path: f"/opt/{name}")
    monkeypatch.setattr(kernel_profile, "environment", lambda commit, device: {"commit": commit})


def test_the_command_writes_its_table_and_all_numbers(gpu, tmp_path, monkeypatch, capsys):
    started = []

    def run(command, limit_s, **options):
        started.append(command)
        Path(command[command.index("--log-file") + 1]).write_text(REPORT, "utf-8")
        return processes.Finished(0, OUTPUT)

    monkeypatch.setattr(processes, "run", run)
    assert main(["profile", "--output", str(tmp_path / "new"), "--commit", "abc1234"]) == 0
    printed = capsys.readouterr().out
    assert "commit abc1234" in printed
    assert (tmp_path / "new" / "kernel_profile.md").read_text("utf-8") == printed
    assert (tmp_path / "new" / "kernel_profile.csv").read_text("utf-8") == REPORT
    (command,) = started
    assert command[0] == "/opt/ncu"
    assert command[command.index("--clock-control") + 1] == "none"
    assert command[-3:] == [sys.executable, "-m", "benchmarks.gpu.profiled_cases"]
    names = command[command.index("--kernel-name") + 1]
    assert names.startswith("regex:^(")
    assert "|draw_kernel|" in names


def test_a_failure_of_ncu_is_reported(gpu, monkeypatch, capsys):
    finished = processes.Finished(1, "==ERROR== no permission for counters\n")
    monkeypatch.setattr(processes, "run", lambda *arguments, **options: finished)
    assert main(["profile"]) == 1
    message = capsys.readouterr().err
    assert "exit code 1; last line: ==ERROR== no permission for counters" in message
    assert "ncu measured nothing" in message


def test_without_ncu_one_line_and_exit_code_2(gpu, monkeypatch, capsys):
    monkeypatch.setattr(kernel_profile.shutil, "which", lambda name, path: None)
    assert main(["profile"]) == 2
    assert capsys.readouterr().err == "profile: ncu (Nsight Compute) is not on the PATH\n"


@pytest.mark.slow
def test_every_kernel_is_profiled():
    small = """
from benchmarks.gpu import profiled_cases
from benchmarks.gpu import sanitized_cases
from dataclasses import replace
from benchmarks.speed.activation_shapes import ActivationShape
image, linear = ActivationShape((2, 4, 4, 4)), ActivationShape((6, 4))
shapes = {True: image._replace(channels_last=True), False: image}
profiled_cases.NOISE = tuple(
    replace(case, activation=linear if len(case.activation.shape) == 2 else shapes[case.activation.channels_last])
    for case in profiled_cases.NOISE
)
profiled_cases.NUM_STRUCTURES = profiled_cases.NUM_UNIFORMS = 6
assert profiled_cases.main(["--device", "cpu"]) == 0
print("all:", *sorted(sanitized_cases.package_kernels()))
"""
    finished = run_interpreted("-c", small)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    *_, last = finished.stdout.splitlines()
    launched = kernel_profile.launches(finished.stdout)
    assert sorted({kernel for _, kernel in launched}) == last.split()[1:]
    assert len({case for case, _ in launched}) == 7 + 5 + 2
