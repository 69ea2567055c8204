"""The study ``parallel`` at a tiny size: two fresh processes train and report their peaks."""

from __future__ import annotations

import pytest

from benchmarks.studies.parallel import measure
from xverse.model import XverseConfig


@pytest.mark.thorough
def test_peak_of_each_process() -> None:
    config = XverseConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
    )
    peaks = measure(config, "tensor 2", batch_size=2, length=64, processes=2)
    assert len(peaks) == 2
    least = 16 * config.num_parameters() / 2  # parameters, gradients and two moments, over two
    assert all(least < peak < 5 * least for peak in peaks), (peaks, least)
