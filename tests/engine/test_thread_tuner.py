"""A single thread is chosen where several wait for each other, and all where they don't."""

from itertools import pairwise

from kvchat.engine.compiled.thread_tuner import FIRST, LATEST, SOONEST, ThreadTuner


def run(crew: ThreadTuner, tokens: int, all_s: float, one_s: float) -> list[int]:
    """The threads of each token, where they take so long."""
    used = []
    for _ in range(tokens):
        used.append(crew.threads)
        crew.note(one_s if crew.threads == 1 else all_s)
    return used


def test_all_threads_stay_where_they_are_faster_and_trials_get_rare() -> None:
    used = run(ThreadTuner(4), 4000, all_s=0.007, one_s=0.014)
    trials = [i for i, threads in enumerate(used) if threads == 1]
    gaps = [b - a for a, b in pairwise(trials)]
    assert trials[0] == FIRST
    assert gaps == sorted(gaps)
    assert gaps[-1] + SOONEST > LATEST
    assert len(trials) < 14


def test_a_single_thread_is_chosen_within_a_few_slow_tokens() -> None:
    crew = ThreadTuner(4)
    run(crew, 12, all_s=0.007, one_s=0.014)
    used = run(crew, 20, all_s=0.1, one_s=0.014)
    assert used[:4] == [4, 4, 4, 1]
    assert set(used[4:]) == {1}


def test_all_threads_come_back_once_they_are_faster_again() -> None:
    crew = ThreadTuner(4)
    run(crew, 20, all_s=0.007, one_s=0.014)
    run(crew, 10, all_s=0.1, one_s=0.014)
    assert run(crew, 2 * SOONEST, all_s=0.007, one_s=0.014)[-1] == 4


def test_slow_threads_at_the_start_are_found_by_the_first_trial() -> None:
    assert run(ThreadTuner(2), FIRST + 2, all_s=0.3, one_s=0.014)[-1] == 1


def test_slowly_growing_times_cause_no_early_trial() -> None:
    crew, used = ThreadTuner(4), list[int]()
    for token in range(FIRST):
        used.append(crew.threads)
        crew.note(0.007 + token * 0.0001)
    assert set(used) == {4}


def test_with_one_core_there_are_no_trials() -> None:
    assert set(run(ThreadTuner(1), 100, all_s=0.1, one_s=0.1)) == {1}


def test_reading_a_prompt_is_never_a_trial() -> None:
    crew = ThreadTuner(4)
    run(crew, FIRST, all_s=0.007, one_s=0.014)
    assert (crew.threads, crew.current) == (1, 4)
