from __future__ import annotations

from benchmarks.studies import attention
from xverse.bench.report import show
from xverse.hardware import using_threads


def test_every_figure_is_measured_beside_its_bound() -> None:
    with using_threads(1):
        figures = attention.measure(
            1,
            1,
            heads=2,
            head_dim=64,
            contexts=(33,),
            positions=100,
            prefill_tokens=20,
            prefill_starts=(0, 7),
        )
    assert [(each["kv"], each["context"]) for each in figures["decode"]] == [("bf16", 33), ("int8", 33)]
    for each in figures["decode"]:
        assert each["share"] > 0
        assert each["positions_per_s"] > 0
    assert [each["start"] for each in figures["prefill"]] == [0, 7]
    assert all(each[key] > 0 for each in figures["prefill"] for key in each if key.endswith("_gflops"))
    lines = list(attention.rows(figures))
    assert len(lines) == 6
    show("attention", lines)
