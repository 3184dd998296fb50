"""Counters, gauges and histograms for code that runs in the event loop's thread only.

prometheus_client's own take a lock and some microseconds for each observation, since any thread may use them; a request
makes a dozen. These keep plain numbers, and prometheus_client still renders them: each is one of its collectors.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry


class Counter:
    """Only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        self.value += amount

    def add_to(self, family: Metric, labels: Sequence[str]) -> None:
        assert isinstance(family, CounterMetricFamily)
        family.add_metric(labels, self.value)


class Gauge:
    """Goes up and down."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def set(self, value: float) -> None:
        self.value = value

    def add_to(self, family: Metric, labels: Sequence[str]) -> None:
        assert isinstance(family, GaugeMetricFamily)
        family.add_metric(labels, self.value)


class Histogram:
    """Counts of observations per bucket; `bounds` are the buckets' inclusive upper ends, growing, without +Inf."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: Metric, labels: Sequence[str]) -> None:
        assert isinstance(family, HistogramMetricFamily)
        total, buckets = 0, []
        for bound, count in zip((*map(float, self._bounds), float("inf")), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
        family.add_metric(labels, buckets, self._sum)


class _Instrument(Protocol):
    def add_to(self, family: Metric, labels: Sequence[str]) -> None: ...


InstrumentT = TypeVar("InstrumentT", bound=_Instrument)


class Family(Collector, Generic[InstrumentT]):
    """A metric of the registry: an instrument for each combination of label values, made when first asked for."""

    def __init__(
        self,
        registry: CollectorRegistry,
        family: type[Metric],
        name: str,
        meaning: str,
        make: Callable[[], InstrumentT],
        labels: Sequence[str] = (),
    ) -> None:
        self._family, self._name, self._meaning, self._label_names = family, name, meaning, tuple(labels)
        self._make = make
        self._instruments: dict[tuple[str, ...], InstrumentT] = {}
        registry.register(self)

    def labels(self, *values: str) -> InstrumentT:
        """The instrument for these values, one for each label in order. Keep it where it is used often."""
        instrument = self._instruments.get(values)
        if instrument is None:
            if len(values) != len(self._label_names):
                raise ValueError(f"{self._name} has the labels {self._label_names}, got {values}")
            instrument = self._instruments[values] = self._make()
        return instrument

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        family = self._family(self._name, self._meaning, labels=self._label_names)  # type: ignore[call-arg]
        for values, instrument in self._instruments.items():
            instrument.add_to(family, values)
        yield family
