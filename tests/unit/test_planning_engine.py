"""The model's engine, generator and cores, by hand and against a transcription that goes token by token."""

import math
from collections.abc import Sequence

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rlhf.config import Config
from async_rlhf.config.schema import GeneratorConfig
from async_rlhf.planning import cores as sharing
from async_rlhf.planning.cores import Cores
from async_rlhf.planning.engine import Finished, ModelEngine
from async_rlhf.planning.generator import ModelGenerator
from async_rlhf.planning.rates import Rates
from tests.support.samples import make_ticket


@pytest.fixture
def free_switching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cores lose no time when processes take turns."""
    monkeypatch.setattr(sharing, "SWITCHING", 0.0)


# The engine


MANY_SEATS = 1000
"""More than anybody takes."""
LATE_S = 10_000.0
"""By then everything is over."""


def finish_times(
    adds: dict[float, list[tuple[int, list[float]]]],
    installs: dict[float, float] | None = None,
    num_cores: float = math.inf,
    prompt_s: float = 0.0,
    beside_s: float = 0.0,
    num_seats: int = MANY_SEATS,
    reread: bool = True,
) -> tuple[dict[int, float], float]:
    """When each ticket's group is finished, and for how long the engine was busy; steps of n completions take 1 + n seconds."""
    env, ends = simpy.Environment(), dict[int, float]()

    def on_left(finished: Sequence[Finished]) -> None:
        ends.update({group.ticket.ticket_id: env.now for group in finished})

    rates = Rates(engine_step_s=1.0, engine_completion_s=1.0, engine_prompt_s=prompt_s, engine_beside_s=beside_s)
    engine = ModelEngine(env, rates, Cores(env, num_cores), num_seats, on_left)

    def give():
        for at, groups in sorted(adds.items()):
            yield env.timeout(at - env.now)
            for number, lengths in groups:
                engine.add(make_ticket(number), lengths)
            engine.wake()

    def hold():
        for at, seconds in sorted((installs or {}).items()):
            yield env.timeout(at - env.now)
            yield engine.install(seconds, 1, reread=reread)

    env.process(give())
    env.process(hold())
    env.run(until=LATE_S)
    return ends, engine.busy_s


def test_a_group_is_finished_with_its_last_completion():
    """Lengths 3 and 5: three steps of two completions at 3 s, then two steps of one at 2 s."""
    assert finish_times({0.0: [(0, [3.0, 5.0])]}) == ({0: pytest.approx(13.0)}, pytest.approx(13.0))


def test_a_group_that_joins_slows_the_others_down():
    """One completion alone makes 2 steps in 4 s; then both advance by a step in 3 s: the first one has 2 left, 6 s; the other 1, 2 s."""
    ends, busy_s = finish_times({0.0: [(0, [4.0])], 4.0: [(1, [3.0])]})

    assert ends == {0: pytest.approx(10.0), 1: pytest.approx(12.0)} and busy_s == pytest.approx(12.0)


def test_completions_join_between_two_steps_and_their_prompts_are_read():
    """One of 3 tokens alone: steps of 2 s, the first 10 s longer for its prompt. Who comes at 13 s waits for the step's end at
    14 s; then both in 3 s and 10 s for the prompt; the newcomer's second token takes 2 s."""
    ends, busy_s = finish_times({0.0: [(0, [3.0])], 13.0: [(1, [2.0])]}, prompt_s=10.0)

    assert ends == {0: pytest.approx(27.0), 1: pytest.approx(29.0)} and busy_s == pytest.approx(29.0)


def test_an_install_delays_everything_and_is_no_work():
    """A step until 2 s, 5 s of loading, 3 s of a step with the canary, in which the completion gets its second token; 2 s for the third."""
    ends, busy_s = finish_times({0.0: [(0, [3.0])]}, installs={2.0: 5.0})

    assert ends == {0: pytest.approx(12.0)} and busy_s == pytest.approx(4.0)


def test_running_completions_are_read_anew_after_an_install():
    """As above with 10 s for a prompt: in the first step one is read, in the canary's step two."""
    ends, busy_s = finish_times({0.0: [(0, [3.0])]}, installs={2.0: 5.0}, prompt_s=10.0)

    assert ends == {0: pytest.approx(12.0 + 30.0)} and busy_s == pytest.approx(14.0)


def test_what_keeps_its_cache_is_not_read_anew_after_an_install():
    """As above, but in the canary's step the canary alone is read."""
    ends, busy_s = finish_times({0.0: [(0, [3.0])]}, installs={2.0: 5.0}, prompt_s=10.0, reread=False)

    assert ends == {0: pytest.approx(12.0 + 20.0)} and busy_s == pytest.approx(14.0)


def test_what_the_process_does_beside_the_steps_delays_them_and_is_no_work_of_the_engine():
    """3 s of a step; 10 s for each of the two that joined; 5 s of loading and 4 s of the canary's step, which costs none of it; then a
    step of 3 s and two of 2 s."""
    ends, busy_s = finish_times({0.0: [(0, [3.0, 5.0])]}, installs={1.0: 5.0}, beside_s=10.0)

    assert ends == {0: pytest.approx(3.0 + 20.0 + 9.0 + 3.0 + 4.0)} and busy_s == pytest.approx(10.0)


def test_work_that_comes_during_an_install_begins_after_it():
    """5 s of loading, 2 s of the canary's step, then both in one step of 3 s."""
    ends, busy_s = finish_times({1.0: [(0, [1.0])], 2.0: [(1, [1.0])]}, installs={0.0: 5.0})

    assert ends == {0: pytest.approx(10.0), 1: pytest.approx(10.0)} and busy_s == pytest.approx(3.0)


def test_processes_that_share_a_core_take_turns(free_switching: None):
    """Two of 1 s and 3 s on one core: both at half speed until 2 s, then one alone for its last 2 s. On two cores nobody waits."""
    for num_cores, ends in ((1, [2.0, 4.0]), (2, [1.0, 3.0])):
        env, done = simpy.Environment(), list[float]()
        cores = Cores(env, num_cores)

        def work(seconds: float, env: simpy.Environment = env, cores: Cores = cores, done: list[float] = done):
            yield from cores.work(seconds)
            done.append(env.now)

        for seconds in (1.0, 3.0):
            env.process(work(seconds))
        env.run()
        assert done == [pytest.approx(end) for end in ends] and cores.speed == 1.0


def test_taking_turns_costs_core_time():
    """Two of 1 s on one core: 2.4 s. On two cores nobody takes turns."""
    for num_cores, end, stretch in ((1, 2.0 * (1 + sharing.SWITCHING), 1 + sharing.SWITCHING), (2, 1.0, 1.0)):
        env = simpy.Environment()
        cores = Cores(env, num_cores)
        for _ in range(2):
            env.process(cores.work(1.0))
        env.run()
        assert (env.now, cores.stretch) == (pytest.approx(end), pytest.approx(stretch))


def test_work_ends_however_late_it_is():
    """A million seconds in, the clock moves in steps of 1e-10 s: a rest below that must not be worked for ever."""
    env = simpy.Environment(initial_time=1e6)
    cores = Cores(env, 1)
    for seconds in (0.1, 1 / 3, 0.7):
        env.process(cores.work(seconds))

    env.run(until=1e6 + 10)

    assert cores.speed == 1.0 and cores.stretch > 1.0


def test_work_that_is_ended_early_says_what_is_left():
    env, left = simpy.Environment(), list[float]()
    cores = Cores(env, 1)

    def work():
        left.append((yield from cores.work(3.0, until=env.timeout(1.0))))
        left.append((yield from cores.work(left[0])))

    env.process(work())
    env.run()

    assert left == [pytest.approx(2.0), 0.0] and env.now == pytest.approx(3.0)


def test_an_engine_on_half_a_core_takes_twice_as_long(free_switching: None):
    ends, busy_s = finish_times({0.0: [(0, [3.0, 5.0])]}, num_cores=0.5)

    assert ends == {0: pytest.approx(26.0)} and busy_s == pytest.approx(26.0)


# Seats


def test_who_finds_no_seat_waits_for_the_first_that_is_free():
    """Two seats, lengths 2, 4, 3, 1: two steps of two at 3 s; then the second and third, two steps; then the third and fourth, one."""
    ends, busy_s = finish_times({0.0: [(0, [2.0]), (1, [4.0]), (2, [3.0]), (3, [1.0])]}, num_seats=2)

    assert ends == {0: pytest.approx(6.0), 1: pytest.approx(12.0), 2: pytest.approx(15.0), 3: pytest.approx(15.0)}
    assert busy_s == pytest.approx(15.0)


def test_a_seat_is_taken_by_part_of_a_group_while_a_sibling_of_the_one_before_goes_on():
    """Two seats, groups of lengths 1, 5 and 2, 1: a step; then the second group's first beside the long one, two steps; then its second,
    one; the long one ends alone after a step of 2 s. Were seats a group's, the second would end at 18 s, after the first."""
    ends, _ = finish_times({0.0: [(0, [1.0, 5.0]), (1, [2.0, 1.0])]}, num_seats=2)

    assert ends == {0: pytest.approx(14.0), 1: pytest.approx(12.0)}


def token_by_token(adds: dict[float, list[tuple[int, list[float]]]], num_seats: int) -> dict[int, float]:
    """finish_times() as a loop over steps. Slow on purpose: who is in the batch is written down anew each time."""
    now, batch, waiting, ends = 0.0, list[list[int]](), list[list[int]](), dict[int, float]()
    left, coming = {number: len(lengths) for groups in adds.values() for number, lengths in groups}, sorted(adds.items())
    while coming or batch or waiting:
        if not (batch or waiting):
            now = max(now, coming[0][0])
        while coming and coming[0][0] <= now + 1e-9:
            waiting += [[number, int(tokens)] for number, lengths in coming.pop(0)[1] for tokens in lengths]
        while waiting and len(batch) < num_seats:
            batch.append(waiting.pop(0))
        now += 1 + len(batch)
        for one in batch:
            one[1] -= 1
            left[one[0]] -= one[1] == 0
        ends.update({number: now for number, num in left.items() if num == 0 and number not in ends})
        batch = [one for one in batch if one[1]]
    return ends


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(1, 9), min_size=1, max_size=4)), min_size=1, max_size=12),
    num_seats=st.integers(1, 7),
)
def test_no_more_than_there_are_seats_are_in_the_batch_and_none_is_empty_while_somebody_waits(
    groups: list[tuple[int, list[int]]], num_seats: int
):
    adds: dict[float, list[tuple[int, list[float]]]] = {}
    for number, (at, lengths) in enumerate(groups):
        # Never at the very end of a step: these end as long after the second as the one who found the engine idle came.
        adds.setdefault(1.01 * at, []).append((number, [float(tokens) for tokens in lengths]))

    expected = token_by_token(adds, num_seats)

    assert finish_times(adds, num_seats=num_seats)[0] == {number: pytest.approx(at) for number, at in expected.items()}


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=8),
    num_seats=st.integers(1, 7),
    installs=st.lists(st.integers(0, 40), max_size=3),
)
def test_every_token_is_sampled_once(lengths: list[list[int]], num_seats: int, installs: list[int]):
    """However many seats there are, and however often weights are installed in between."""
    env, left = simpy.Environment(), list[Finished]()
    engine = ModelEngine(env, Rates(engine_step_s=1.0, engine_completion_s=1.0), Cores(env, math.inf), num_seats, left.extend)
    for number, each in enumerate(lengths):
        engine.add(make_ticket(number), [float(tokens) for tokens in each])
    engine.wake()
    for at in installs:
        env.timeout(at).callbacks.append(lambda _: engine.install(2.0, 1))
    env.run(until=LATE_S)

    assert engine.num_tokens == sum(map(sum, lengths)) and engine.num_completions == 0
    assert sorted(group.ticket.ticket_id for group in left) == list(range(len(lengths)))


def test_what_waits_for_a_seat_begins_under_the_weights_that_are_there_by_then():
    """One seat: the second group has none before version 7 is installed. The first one keeps the version that it began with, though
    its second completion begins later, too."""
    env, versions = simpy.Environment(), dict[int, int]()

    def on_left(finished: Sequence[Finished]) -> None:
        versions.update({group.ticket.ticket_id: group.version for group in finished})

    engine = ModelEngine(env, Rates(engine_step_s=1.0, engine_completion_s=1.0), Cores(env, math.inf), 1, on_left)
    for number, lengths in enumerate([[3.0, 3.0], [3.0]]):
        engine.add(make_ticket(number), lengths)
    engine.wake()
    env.timeout(1.0).callbacks.append(lambda _: engine.install(1.0, 7))
    env.run(until=LATE_S)

    assert versions == {0: 0, 1: 7}


# The generator


def generator_of(env: simpy.Environment, max_inflight: int) -> ModelGenerator:
    """Groups of two; a step takes a second, however many there are."""
    config = Config(completions_per_prompt=2, generator=GeneratorConfig(max_inflight=max_inflight))
    return ModelGenerator(env, config, Rates(engine_step_s=1.0, engine_completion_s=1e-9), Cores(env, math.inf))


def collected(lengths: dict[int, list[float]], gather_s: float, away_s: float = 0.0) -> list[tuple[float, list[int]]]:
    """When which groups are handed out, to one who asks again `away_s` after each time; all of them are sampled at once from the start."""
    env, found = simpy.Environment(), list[tuple[float, list[int]]]()
    generator = generator_of(env, MANY_SEATS)

    def drain():
        while True:
            groups = yield from generator.collect(gather_s)
            found.append((round(env.now, 3), [group.ticket.ticket_id for group in groups]))
            yield env.timeout(away_s)

    generator.submit([(make_ticket(number), each) for number, each in lengths.items()])
    env.process(drain())
    env.run(until=LATE_S)
    return found


def test_a_finished_group_waits_for_others_and_no_longer_than_it_is_told():
    """Groups end at 2, 4, 6 and 30 s. For 3 s the first waits, the third, and the last not at all: nobody is left to wait for."""
    lengths = {0: [2.0, 1.0], 1: [1.0, 4.0], 2: [6.0, 6.0], 3: [30.0, 1.0]}

    assert collected(lengths, 3.0) == [(5.0, [0, 1]), (9.0, [2]), (30.0, [3])]
    assert collected(lengths, 0.0) == [(2.0, [0]), (4.0, [1]), (6.0, [2]), (30.0, [3])]
    assert collected(lengths, math.inf) == [(30.0, [0, 1, 2, 3])]


def test_how_long_a_finished_group_has_waited_counts_from_its_end_and_not_from_the_question():
    """Groups end at 2, 4, 5 and 30 s; for the first the answer is given at 3 s, and the next question comes at 5.5 s, when the second
    has waited long enough."""
    lengths = {0: [2.0, 1.0], 1: [1.0, 4.0], 2: [5.0, 5.0], 3: [30.0, 1.0]}

    assert collected(lengths, 1.0, away_s=2.5) == [(3.0, [0]), (5.5, [1, 2]), (30.0, [3])]


def test_there_is_room_again_when_half_of_the_reserve_has_gone():
    """Eight seats and four in reserve: six groups. Two completions of different groups end at 1 s: half of the reserve has seats then."""
    env, found = simpy.Environment(), list[tuple[float, int]]()
    generator = generator_of(env, 8)

    def feed():
        for _ in range(2):
            num = yield from generator.room()
            found.append((round(env.now, 3), num))
            generator.submit([(make_ticket(10 * len(found) + index), [1.0 if index < 2 else 9.0, 9.0]) for index in range(num)])

    env.process(feed())
    env.run(until=5.0)

    assert found == [(0.0, 6), (1.0, 1)]
