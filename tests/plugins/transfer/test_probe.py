from trtserve.plugins.transfer.probe import PROBE_BYTES, Span, bandwidth, probe_span
from trtserve.plugins.transfer_api import Region


def test_the_longest_stretch_without_a_gap_is_probed():
    gapped, dense = Region("gapped", 1 << 30, 100, 4096, 8192), Region("dense", 4096, 100, 1000, 1000)
    assert probe_span([gapped]) == Span(1 << 30, 4096)
    assert probe_span([gapped, dense]) == Span(4096, 100_000)
    assert probe_span([Region("large", 4096, 1, 1 << 30, 1 << 30)]) == Span(4096, PROBE_BYTES)
    assert probe_span([]) is None


def test_bandwidth_is_finite():
    assert bandwidth(1000, 0.5) == 2000
    assert bandwidth(1000, 0.0) < float("inf")
