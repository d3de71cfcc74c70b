"""How much of its time each part of the crew works."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engine_loop import EngineUsage
from actors.meters import Meter, Reading, Readings
from actors.rates import Counted, WorkerSeconds, processor_rates, rates
from actors.step_cost import StepMoments


class Clock:
    """Shows what the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_meter_adds_up_the_seconds_of_all_workers_those_of_unfinished_calls_included():
    """One works from 1 to 4, another from 2 on: 3 + 3 = 6 seconds at 5; one call of 3 seconds has ended."""
    clock = Clock()
    meter = Meter(clock)
    clock.now = 1.0
    first, second = meter.working(), meter.working()
    with first:
        clock.now = 2.0
        second.__enter__()
        clock.now = 4.0
    clock.now = 5.0

    assert meter.reading == Reading(busy_s=6.0, num_calls=1, calls_s=3.0)
    second.__exit__(None, None, None)
    assert meter.reading == Reading(busy_s=6.0, num_calls=2, calls_s=6.0)


def test_a_call_that_fails_ends_its_work_and_one_that_is_not_counted_is_work_all_the_same():
    clock = Clock()
    meter = Meter(clock)

    with pytest.raises(ValueError), meter.working(counted=False):
        clock.now = 2.0
        raise ValueError
    clock.now = 9.0

    assert meter.reading == Reading(busy_s=2.0)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), max_size=8))
def test_busy_seconds_are_the_sum_of_all_calls_whatever_their_order(spans: list[tuple[float, float]]):
    clock = Clock()
    meter = Meter(clock)
    calls = [(begin, begin + length, meter.working()) for begin, length in spans]

    events = sorted([(begin, 0, n) for n, (begin, _, _) in enumerate(calls)] + [(end, 1, n) for n, (_, end, _) in enumerate(calls)])
    for when, ends, number in events:
        clock.now = when
        if ends:
            calls[number][2].__exit__(None, None, None)
        else:
            calls[number][2].__enter__()

    total = sum(length for _, length in spans)
    assert meter.reading.busy_s == pytest.approx(total) and meter.reading.calls_s == pytest.approx(total)
    assert meter.reading.num_calls == len(spans)


def test_rates_by_hand():
    """Ten seconds, two generators, one scorer.

    Engines: 4 of 20 s busy, 30 completions x seconds running, 5 waiting, .5 of the cache for these 4 s; 12 groups; tickets were waited
    for 5 of 20 s. The scorer worked 2.5 of 10 s, in 5 calls of 2 s together; 6 groups. Nobody rates.
    """
    before = Counted(
        usage={"a": EngineUsage(busy_s=1.0, num_tokens=5, num_completions=1, running_s=3.0, kv_use_s=1.0)},
        readings=Readings(score=Reading(busy_s=1.0, num_calls=2, calls_s=1.0, num_groups=2)),
    )
    after = Counted(
        usage={
            "a": EngineUsage(busy_s=3.0, num_tokens=25, num_completions=2, running_s=13.0, kv_use_s=2.0),
            "b": EngineUsage(busy_s=2.0, num_tokens=80, num_completions=3, running_s=20.0, waiting_s=5.0, kv_use_s=1.0),
        },
        readings=Readings(
            generate=Reading(num_groups=12),
            tickets=Reading(busy_s=5.0, num_calls=9, calls_s=4.0),
            score=Reading(busy_s=3.5, num_calls=7, calls_s=3.0, num_groups=8),
        ),
    )

    assert rates(before, after, 10.0, WorkerSeconds(generators=20.0, scorers=10.0, rewards=0.0)) == pytest.approx(
        {
            "generate/tokens_per_s": 10.0,
            "generate/groups_per_s": 1.2,
            "generate/idle_share": 0.8,
            "generate/wait_ticket_share": 0.25,
            "generate/running_requests": 3.0,
            "generate/waiting_requests": 0.5,
            "generate/kv_use_share": 0.5,
            "score/groups_per_s": 0.6,
            "score/idle_share": 0.75,
            "score/latency_s": 0.4,
        }
    )


def test_reward_actors_have_rates_where_there_are_any_and_a_latency_only_where_a_call_ended():
    there = WorkerSeconds(generators=1.0, scorers=1.0, rewards=2.0)

    row = rates(Counted(), Counted(readings=Readings(reward=Reading(busy_s=0.5))), 1.0, there)

    assert row["reward/idle_share"] == 0.75
    assert not {"reward/latency_s", "score/latency_s"} & set(row)


def test_what_a_step_costs_is_the_mean_over_the_engines_that_took_one():
    """Steps of 1 s and .1 s per completion in one, 3 s and .3 s in the other; the third one took none since."""
    steps = [(number % 5, 0) for number in range(20)]
    usage = dict[str, EngineUsage]()
    for name, factor in (("a", 1.0), ("b", 3.0), ("still", 9.0)):
        moments = StepMoments()
        for completions, joined in steps:
            moments = moments.with_step(completions, joined, factor * (1.0 + 0.1 * completions))
        usage[name] = EngineUsage(busy_s=1.0, num_tokens=1, num_completions=1, work_s=0.5, steps=moments)

    row = rates(
        Counted(usage={"still": usage["still"]}), Counted(usage=usage), 1.0, WorkerSeconds(generators=3.0, scorers=1.0, rewards=0.0)
    )

    assert row["generate/step_fixed_s"] == pytest.approx(2.0) and row["generate/step_completion_s"] == pytest.approx(0.2)
    assert row["generate/step_prompt_s"] == pytest.approx(0.0) and row["generate/work_s"] == pytest.approx(1.0)


def test_processor_seconds_are_those_of_processes_that_were_there_all_the_time():
    """A generator that is new brings the seconds of its start, one that is gone none; of what is on other nodes nothing is known."""
    before = Counted(processor={"generate": {"old": 5.0, "gone": 9.0}, "queue": {"queue": 1.0}, "driver": {"driver": 2.0}})
    after = Counted(processor={"generate": {"old": 6.5, "new": 20.0}, "queue": {"queue": 1.25}, "driver": {"driver": 2.5}})

    assert processor_rates(before, after) == {"generate/cpu_s": 1.5, "queue/cpu_s": 0.25, "time/driver_cpu_s": 0.5}
    assert processor_rates(Counted(), Counted()) == {}
