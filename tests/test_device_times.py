"""Device times by events, with events that a test moves by hand: nothing waits, and none is read before it is over."""

import threading

import numpy as np
import pytest
import torch
from test_ledger import Lines, counting

from rollflow.profile import device_times, records
from rollflow.profile.device_times import DeviceTimes, Timed
from rollflow.profile.ledger import Ledger


class Device:
    """A device whose clock stands still until it is set; events beyond `done` are not over."""

    def __init__(self):
        self.now, self.done, self.made, self.waited = 0.0, float("inf"), [], 0

    def event(self):
        self.made.append(Event(self))
        return self.made[-1]


class Event:
    def __init__(self, device):
        self.device, self.at = device, None

    def record(self):
        self.at = self.device.now

    def query(self):
        return self.at <= self.device.done

    def synchronize(self):
        self.device.waited += 1

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)


def span(times, device, of, start, seconds):
    device.now = start
    first = times.mark()
    device.now = start + seconds
    times.between(of, first, times.mark())


def test_times_are_told_when_the_device_is_past_them():
    device = Device()
    times = DeviceTimes(device.event, clock=lambda: 100.0)
    assert [*times.past()] == []
    device.done = 4.0
    span(times, device, "a", 1.0, 2.0)
    span(times, device, "b", 3.5, 1.0)
    span(times, device, "c", 3.5, 0.25)  # on another stream
    assert [*times.past()] == [Timed("a", 100.0, 2.0), Timed("c", 102.5, 0.25)], "the first mark was at 100 s"
    assert [*times.past()] == []
    device.done = 5.0
    assert [*times.past()] == [Timed("b", 102.5, 1.0)]
    assert device.waited == 1, "for the first event alone"


def test_what_is_waited_for_is_told_at_once():
    device = Device()
    times = DeviceTimes(device.event, clock=lambda: 0.0)
    device.done = -1.0
    span(times, device, "a", 1.0, 2.0)
    assert [*times.past()] == [] and [*times.past(wait=True)] == [Timed("a", 0.0, 2.0)] and device.waited == 2


def test_events_are_used_again():
    device = Device()
    times = DeviceTimes(device.event)
    for i in range(50):
        span(times, device, i, float(i), 0.5)
        assert [timed.of for timed in times.past()] == [i]
    assert len(device.made) == 3, "one to count from, and a pair"


def test_the_event_that_is_counted_from_is_renewed(monkeypatch):
    monkeypatch.setattr(device_times, "RENEWED", 10.0)
    device = Device()
    times, elapsed = DeviceTimes(device.event, clock=lambda: 1000.0), []
    device.now = 0.5
    for i in range(40):
        span(times, device, i, 0.5 + i, 0.25)
        elapsed += [round(timed.started - 1000.0, 6) for timed in times.past()]
        base, when = times._base
        assert device.now - base.at <= 12.0 and when == pytest.approx(1000.0 + base.at - 0.5)
    assert elapsed == [float(i) for i in range(40)]
    assert len(device.made) < 10


def test_pairs_that_nobody_reads_are_given_up(monkeypatch):
    monkeypatch.setattr(device_times, "WAITING", 3)
    device = Device()
    times = DeviceTimes(device.event)
    for i in range(5):
        span(times, device, i, float(i), 0.5)
    assert [timed.of for timed in times.past()] == [2, 3, 4]


@pytest.fixture
def devices(monkeypatch):
    """Two devices of the type "cuda" for the ledger, without CUDA."""
    found = {torch.device("cuda", index): Device() for index in range(2)}

    def make(make=None, clock=None):
        return DeviceTimes([*found.values()][len(made) - 1].event, clock)

    made = []
    monkeypatch.setattr("rollflow.profile.ledger.DeviceTimes", lambda clock: made.append(clock) or make(clock=clock))
    return found


def test_batches_have_the_times_of_their_devices(devices):
    ledger = Ledger(counting())
    (first, device), (second, other) = devices.items()
    number, beside = Lines(2).of(ledger), Lines(2, 1).of(ledger)
    with ledger.batch(number):
        for start, seconds in ((5.0, 2.0), (8.0, 1.0)):  # a batch that ran in two parts
            device.now = start
            with ledger.span("forward", first):
                device.now = start + seconds
        with ledger.span("propose", first):  # not timed
            pass
    with ledger.batch(beside), ledger.span("decode", second):
        other.now = 0.25
    with ledger.span("decode", first):  # of no batch
        pass
    one, two = ledger.table("batches")
    assert one["forward_device_seconds"] == 3.0 and two["decode_device_seconds"] == 0.25
    base = ledger._devices[first]._base[1]
    assert one["forward_device_started"] == base and two["decode_device_started"] == ledger._devices[second]._base[1]
    assert np.isnan([one["decode_device_seconds"], two["forward_device_seconds"], one["backward_device_seconds"]]).all()
    assert one["forward_seconds"] > 0, "the host's launches are timed besides"


def test_times_come_late_and_may_come_too_late(devices, monkeypatch):
    monkeypatch.setitem(records.CAPACITY, "batches", 2)
    ledger = Ledger(counting())
    cuda, device = next(iter(devices.items()))
    device.done = -1.0
    for request in range(2):
        with ledger.batch(Lines(1, request).of(ledger)), ledger.span("forward", cuda):
            device.now += 1.0
    assert np.isnan(ledger.table("batches")["forward_device_seconds"]).all(), "the device is not past them"
    last = Lines(1, 2).of(ledger)
    device.done = 10.0
    table = ledger.table("batches")
    assert table["batch"].tolist() == [1, 2] and np.isnan(table["forward_device_seconds"]).tolist() == [False, True]
    assert ledger.cost(2) is None, "it came before the ledger heard of it"
    ledger.freed(last)


def test_after_an_error_the_device_is_not_asked(devices):
    ledger = Ledger(counting())
    cuda, device = next(iter(devices.items()))
    with pytest.raises(RuntimeError), ledger.batch(Lines(1).of(ledger)), ledger.span("forward", cuda):
        marks = len(device.made)
        raise RuntimeError("CUDA error: gone")
    assert len(device.made) == marks == 2 and ledger.table("batches")["forward_seconds"][0] > 0


def test_a_ledger_that_is_off_makes_no_events(devices):
    ledger = Ledger()
    ledger.on = False
    with ledger.batch(None), ledger.span("forward", next(iter(devices))):
        pass
    assert not ledger._devices and ledger.seconds["forward"] > 0


def test_events_are_made_on_the_thread_that_works(devices):
    ledger = Ledger()
    cuda, device = next(iter(devices.items()))
    number = Lines(1).of(ledger)

    def work():
        with ledger.batch(number), ledger.span("reward", cuda):
            device.now += 1.0

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ledger.table("batches")["reward_device_seconds"][0] == 1.0
