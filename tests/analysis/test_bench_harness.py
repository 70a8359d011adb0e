"""The harness of benchmarks: what is timed is computed, what fails is recorded, what cannot be is refused."""

import json
import os
import re
import stat
import time
from dataclasses import asdict, dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec.analysis.bench import catalog, tuning
from lowprec.analysis.bench.adam_cases import by_xla
from lowprec.analysis.bench.case import Conditions, Work, by_name, product_work, select
from lowprec.analysis.bench.checks import close, same_codes
from lowprec.analysis.bench.device_time import device_time, looped
from lowprec.analysis.bench.kernel_case import KernelCase, Program, called, judged
from lowprec.analysis.bench.machine import DEVICES, clocks, describe
from lowprec.analysis.bench.quantizer_cases import Variant
from lowprec.analysis.bench.runner import Results, run_cases
from lowprec.analysis.bench.tables import results_tables
from lowprec.analysis.bench.xla_products import BFLOAT16, COPY
from lowprec.errors import UsageError
from lowprec.pallas.config import BlockMatmulConfig, choices

H200 = DEVICES["NVIDIA H200"]
MACHINE = {"device": "NVIDIA H200", "versions": {"jax": "9"}, "host": "a host"}


@dataclass
class Stub:
    """A case that says what it is told, and counts."""

    name: str
    record: dict = field(default_factory=lambda: {"status": "measured", "us": 1.0})
    error: Exception | None = None
    runs: int = 0

    def run(self, conditions):
        self.runs += 1
        if self.error:
            raise self.error
        return dict(self.record)


def body_of_loop(text):
    """The text of the computation that a compiled program repeats."""
    name = re.search(r"while\(.*body=%?([\w.\-]+)", text)[1]
    return re.search(rf"^%?{re.escape(name)} [^\n]*{{\n(.*?)^}}", text, flags=re.S | re.M)[1]


def test_a_timed_product_stays_in_the_loop():
    """Its inputs are the same in every turn and only the last output is used: XLA could hoist it, or drop it."""
    x = jnp.ones((192, 192))
    timed = jax.jit(looped(lambda a, b: a @ b, 7)).lower(x, x).compile()
    assert re.search(r"dot\(|custom-call|fusion", body_of_loop(timed.as_text()))
    np.testing.assert_array_equal(timed(x, x), x @ x)
    # The same loop without its barrier: what the test above would miss must be seen here.
    careless = lambda a, b: jax.lax.fori_loop(0, 6, lambda _, out: a @ b, a @ b)
    hoisted = jax.jit(careless).lower(x, x).compile().as_text()
    assert "while(" not in hoisted or not re.search(r"dot\(|custom-call", body_of_loop(hoisted))


def test_calls_that_advance_see_what_the_call_before_gave():
    step = looped(lambda w, g: w + g, 5, advance=lambda given, found: (found, given[1]))
    assert jax.jit(step)(jnp.float32(1), jnp.float32(10)) == 51


def test_a_time_has_its_quartiles_and_counts():
    timing = device_time(lambda x: x * 2, (jnp.ones(8),), seconds=0.0)
    assert 0 < timing.low_us <= timing.us <= timing.high_us
    assert timing.repeats == 3 and 4 <= timing.inner <= 400


def test_what_is_faster_than_the_device_is_not_believed():
    """8192³ in float8 takes 2·8192³ / 1979e12 s = 555.6 µs at best; 5 % less is given for clocks."""
    work = product_work((8192,) * 3, "float8")
    assert judged(555.6, work, H200)["of_ceiling"] == pytest.approx(1, rel=1e-3)
    assert "status" not in judged(530, work, H200)
    refused = judged(528, work, H200)
    assert refused["status"] == "impossible" and "not computed" in refused["error"]
    # A copy of 128 MiB: 2²⁸ bytes at 4.8 TB/s are 55.9 µs.
    assert judged(52, Work(bytes=2**28), H200)["status"] == "impossible"
    assert judged(60, Work(bytes=2**28), H200)["gbps"] == pytest.approx(2**28 / 60e-6 / 1e9)
    assert judged(1e-3, work, None) == {"tflops": pytest.approx(2 * 8192**3 / 1e-9 / 1e12), **judged(1e-3, work, None)}


def test_work_is_that_of_the_literature():
    """Bytes an element: 2 of bfloat16, 1 of float8 and 4 for 128; two copies with columns; 4-bit blocks."""
    each = lambda variant: variant.bytes((256, 256)) / 256**2
    assert each(Variant("e4m3fn@1x128")) == 2 + 1 + 4 / 128
    assert each(Variant("e4m3fn@1x128", columns=True)) == 2 + 2 * (1 + 4 / 128)
    assert each(Variant("mxfp4")) == 2 + 0.5 + 1 / 32
    assert each(Variant("nvfp4")) == 2 + 2 + 0.5 + 1 / 16  # x is read twice: its largest value first
    adam = lambda name: by_xla(name, None, (256, 256), "xla").work.bytes / 256**2
    assert adam("adamw") == pytest.approx(26, abs=0.01)
    # cmp8 with a bfloat16 scale for 128, log8 with a float32 scale for 256; de4 and log4 with float32 scales for 128
    assert adam("adam8") == pytest.approx(10 + 2 * (1 + 2 / 128 + 1 + 4 / 256), abs=0.01)
    assert adam("adam4") == pytest.approx(10 + 2 * (0.5 + 4 / 128) * 2, abs=0.01)


def test_errors_are_relative_to_the_whole():
    rng = np.random.default_rng(0)
    wanted, off = rng.normal(size=(64, 64)), 1e-3 * rng.normal(size=(64, 64))
    found = close(2e-3)(jnp.float32(wanted + off), jnp.float32(wanted))
    assert found["relative_error"] == pytest.approx(np.linalg.norm(off) / np.linalg.norm(wanted), rel=1e-3)
    assert found["ok"] and not close(5e-4)(jnp.float32(wanted + off), jnp.float32(wanted))["ok"]
    assert not close(1e9)(jnp.float32([np.nan, 1]), jnp.float32([0, 1]))["ok"]
    with pytest.raises(AssertionError, match="where the reference has"):
        close(1)(jnp.zeros(3), jnp.zeros(4))


def test_codes_are_compared_as_bytes():
    codes, scales = jnp.arange(1000, dtype=jnp.uint8), jnp.ones(8)
    one_off = codes.at[3].set(7), scales
    assert same_codes(1.5e-3)(one_off, (codes, scales)) == {
        "codes_differing": pytest.approx(1e-3), "scales_error": 0.0, "allowed": 1.5e-3, "ok": True,
    }  # fmt: skip
    assert not same_codes(1.5e-3)((one_off[0].at[4].set(7), scales), (codes, scales))["ok"]
    assert not same_codes(1e-3)((codes, scales.at[0].set(2)), (codes, scales))["ok"]
    # −0 is another code than 0; NaN is the same as itself.
    signed = jnp.array([0.0, -0.0, jnp.nan], jnp.float8_e4m3fn)
    assert same_codes(0.0)(signed, signed)["ok"] and not same_codes(0.0)(signed[:2], signed[::-1][1:])["ok"]


def test_a_kernel_that_is_wrong_is_no_measurement():
    def build(shape, impl):
        program = lambda x: x * (2 if impl == "xla" else 3)
        return Program(program, lambda: (jnp.ones(shape),), Work(bytes=8.0), lambda x: x * 2, close(1e-6))

    right = KernelCase("op/right", build, (4,), (2,)).run(Conditions(seconds=0.0))
    assert right["status"] == "measured" and right["us"] > 0 and right["check"]["ok"]
    wrong = KernelCase("correct/op/wrong", build, (4,), (2,), kernel=True, timed=False).run(Conditions(tiny=True))
    assert wrong["status"] == "wrong" and wrong["check"]["relative_error"] == pytest.approx(0.5)
    with pytest.raises(UsageError, match="no kernel for cpu"):
        KernelCase("op/kernel", build, (4,), (2,), kernel=True).run(Conditions())


def test_a_program_that_calls_something_else_says_what():
    text = '%a = custom-call(%x), custom_call_target="__triton_gemm"\n%b = custom-call(%y), custom_call_target="copy"'
    assert called("__triton", text) == {"calls": "__triton"}
    found = called("__cublas$lt$matmul$f8", text)
    assert found["status"] == "wrong" and "it calls __triton_gemm, copy" in found["error"]


def test_a_case_that_fails_stops_no_other(tmp_path):
    path = tmp_path / "deep" / "results.json"
    cases = [Stub("a/1"), Stub("a/2", error=RuntimeError("no such\nkernel")), Stub("a/3")]
    told = []
    left = run_cases(cases, Results(path, MACHINE), Conditions(), report=lambda name, record: told.append(name))
    found = json.loads(path.read_text())["cases"]
    assert left == [] and told == ["a/1", "a/2", "a/3"] == list(found)
    assert found["a/2"]["status"] == "failed" and found["a/2"]["error"] == "RuntimeError: no such\nkernel"


def test_no_case_is_started_when_the_time_is_over(tmp_path):
    results = Results(tmp_path / "results.json", MACHINE)
    late = Stub("late/1")
    assert run_cases([late], results, Conditions(), deadline=time.monotonic() - 1) == ["late/1"]
    assert late.runs == 0 and results.records == {}
    assert "For lack of time: 1 of late." in results_tables(results, ["late/1"])


def test_a_partial_file_is_gone_on_with(tmp_path):
    path = tmp_path / "results.json"
    first, second, third = Stub("a/1"), Stub("a/2", error=ValueError("x")), Stub("a/3")
    run_cases([first, second], Results(path, MACHINE), Conditions())
    run_cases([first, second, third], Results(path, MACHINE), Conditions())
    assert (first.runs, second.runs, third.runs) == (1, 1, 1)
    again = Results(path, MACHINE)
    again.forget(["failed"])
    run_cases([first, second, third], again, Conditions())
    assert (first.runs, second.runs, third.runs) == (1, 2, 1)
    with pytest.raises(UsageError, match="holds results of NVIDIA H200, not of cpu"):
        Results(path, {"device": "cpu"})


def test_a_case_is_on_the_disk_before_it_runs(tmp_path):
    """A process that dies in it leaves its name."""
    path = tmp_path / "results.json"

    class Dying(Stub):
        def run(self, conditions):
            assert json.loads(path.read_text())["running"] == "a/dies"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cases([Dying("a/dies")], Results(path, MACHINE), Conditions())
    found = Results(path)
    found.lose("ended with status -11")
    assert Results(path).records["a/dies"] == {"status": "failed", "error": "ended with status -11"}


def test_a_device_that_computes_no_more_is_given_up():
    after = Stub("a/2")
    results = Results(None, MACHINE)
    broken = Stub("a/1", error=RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS"))
    assert run_cases([broken, after], results, Conditions(), healthy=lambda: False) == ["a/2"]
    assert after.runs == 0


def test_cases_are_chosen_by_how_their_names_begin():
    cases = by_name([Stub("calibration/copy"), Stub("adam/adam8/kernel"), Stub("adam/adam4/kernel"), Stub("ada/x")])
    names = lambda only, **options: [case.name for case in select(cases, only, **options)]
    assert names("adam") == ["adam/adam8/kernel", "adam/adam4/kernel"]
    assert names("adam/adam4,ada", always=catalog.is_calibration) == ["calibration/copy", "adam/adam4/kernel", "ada/x"]
    assert names("") == list(cases)
    with pytest.raises(UsageError, match=r"unknown benchmark 'adam/adam5'; did you mean adam/adam8, adam/adam4"):
        names("adam/adam5")
    with pytest.raises(UsageError, match="names no benchmark"):
        names(",")
    with pytest.raises(UsageError, match="two benchmarks are called"):
        by_name([Stub("a/1"), Stub("a/1")])


def test_every_kernel_has_work_a_small_check_and_peers_that_are_measured():
    cases = catalog.accelerator_cases() | by_name(list(tuning.tuning_cases()))
    names = list(cases)
    assert names[:2] == [COPY, BFLOAT16]
    kernels = {name.split("/")[0] for name, case in cases.items() if getattr(case, "kernel", False)}
    assert {f"correct/{op}" for op in kernels - {"correct", "tune"}} <= {"/".join(n.split("/")[:2]) for n in names}
    for name, case in cases.items():
        if isinstance(case, KernelCase):
            assert all(names.index(peer) < names.index(name) for peer in case.peers), name
            if case.timed:
                assert case.build(case.small, "xla").work.least_seconds(H200) > 0, name


def test_tables_compare_what_was_measured():
    results = Results(None, MACHINE)
    results.add(COPY, {"status": "measured", "us": 62.5, "gbps": 4294.0, "work": Work(bytes=1)._asdict()})
    results.add(BFLOAT16, {"status": "measured", "us": 1400.0, "tflops": 785.0, "work": Work(flops=1)._asdict()})
    work = product_work((8192,) * 3, "float8")
    kernel = {"status": "measured", "peers": [BFLOAT16, COPY, "xla/absent"]} | judged(700.0, work, H200)
    results.add("block_matmul/tiles", kernel | {"us": 700.0, "check": {"relative_error": 0.0016}})
    results.add("block_matmul/lines", judged(100.0, work, H200) | {"us": 100.0})
    text = results_tables(results)
    row = next(line for line in text.splitlines() if line.startswith("| tiles"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [
        "700.0", "1,571", "383", "79 %", "2.00 bf16", "2.00 × XLA bf16", "1.6e-03",
    ]  # fmt: skip
    assert "- block_matmul/lines: IMPOSSIBLE: 100.0 us for what takes" in text and "| lines" not in text


def test_a_slow_device_is_noted():
    results, said = Results(None, MACHINE), []
    results.add(COPY, {"status": "measured", "gbps": 3500.0})
    catalog.warn_if_slow(results, said.append)
    assert said == [] and results.notes == []  # 3500 of 4300 are 81 %
    results.add(BFLOAT16, {"status": "measured", "tflops": 600.0})
    for _ in range(2):
        catalog.warn_if_slow(results, said.append)
    assert len(said) == 1 and "600 of the usual 790" in said[0] and results.notes == [said[0].removeprefix("warning: ")]


def test_the_fastest_config_goes_into_the_table_of_its_device(tmp_path):
    first, second, *_ = choices("block_matmul", 128)
    results, shape = Results(None, MACHINE), "4096x4096x4096"
    # The first is faster for tiles, the second for both together; a third was measured for one of them alone.
    times = {first: (90.0, 200.0), second: (100.0, 100.0)}
    for case in tuning.tuning_cases():
        for config, (tiles, lines) in times.items():
            if case.build.keywords["config"] == config and f"/{shape}/" in case.name:
                results.add(case.name, {"status": "measured", "us": tiles if "/tiles/" in case.name else lines})
    path = tmp_path / "nvidia-h200.json"
    path.write_text(json.dumps({"block_matmul": {"other": {"rows": 64}}, "adam_update": {}}))
    assert tuning.write_tuning(results, path) == 1
    table = json.loads(path.read_text())
    assert table["block_matmul"]["4096x4096x4096 group=128"] == asdict(second)
    assert BlockMatmulConfig(**table["block_matmul"]["4096x4096x4096 group=128"]) == second
    assert table["block_matmul"]["other"] == {"rows": 64} and "adam_update" in table
    assert tuning.write_tuning(Results(None, MACHINE), tmp_path / "none.json") == 0
    assert not (tmp_path / "none.json").exists()


def test_the_machine_is_described(tmp_path, monkeypatch):
    found = describe()
    assert found["device"] == "cpu" and found["versions"]["jax"] == jax.__version__
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '570.1, 1980, 3201, 1980, 41, 120.5'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert clocks()["driver_version"] == "570.1" and clocks()["clocks.sm"] == "1980"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert clocks() == {}
