"""The schedule of many sessions, with the times that a GPU's steps take: by arithmetic where one
session says it, and against the aims for sixteen."""

from __future__ import annotations

import pytest

from inference.bench.measure import percentile_ms
from inference.session.inputs import StepRequest
from tools.bench.schedule import (
    DECODE,
    PICTURE,
    PROMPT_TOKEN,
    TOWER,
    Traffic,
    between,
    simulate,
    step_seconds,
)

TOKEN = DECODE[1]


def test_a_session_alone_speaks_a_token_a_step() -> None:
    found = simulate(Traffic(1, 10.0, fps=0.1, question_every=0))
    first = found.decisions[0]
    assert TOWER[1] + TOKEN < first < TOWER[1] + TOKEN + 64 * PROMPT_TOKEN  # the opening's tokens
    assert found.tokens[0] == pytest.approx(1 + (10 - first) / TOKEN, abs=1)


def test_frames_take_their_time_and_no_more() -> None:
    found = simulate(Traffic(1, 10.0, fps=2.0, question_every=0), host_s=0.001)
    opening, frame = found.decisions[0], TOWER[1] + TOKEN + 0.001
    words = (10 - opening - 19 * frame) / (TOKEN + 0.001)
    assert found.tokens[0] == pytest.approx(20 + words, abs=1)
    # A frame waits for at most the step that is running.
    assert frame <= min(found.decisions[1:])
    assert max(found.decisions[1:]) <= frame + TOKEN + 0.001


def test_a_long_question_delays_others_by_one_piece() -> None:
    traffic = Traffic(4, 60.0, question_every=5.0)
    quiet = simulate(Traffic(4, 60.0, question_every=0))
    asked = simulate(traffic)
    piece = TOKEN + 128 * PROMPT_TOKEN
    # Four sessions may each have a piece in one step.
    worst = max(quiet.decisions) + 2 * 4 * piece
    assert max(asked.decisions) <= worst
    assert len(asked.answers) == sum(1 for *_, text in traffic.events() if text)


def test_a_tower_runs_beside_the_passes_that_need_no_frame() -> None:
    """A frame alone waits for its tower; beside another's token the longer of both counts."""
    frame = StepRequest([7], images=[PICTURE])
    token = StepRequest([])
    both = [frame, token]
    alone = TOWER[1] + TOKEN
    assert step_seconds([frame], [True], overlap=True) == pytest.approx(alone)
    assert step_seconds(both, [True, True]) == pytest.approx(TOWER[1] + 2 * TOKEN)
    assert step_seconds(both, [True, True], overlap=True) == pytest.approx(TOWER[1] + TOKEN)
    asked = StepRequest([7] * 100)  # a prompt, which needs no frame either
    prompt = TOKEN + 100 * PROMPT_TOKEN
    seconds = step_seconds([frame, asked], [True, False], overlap=True)
    assert seconds == pytest.approx(max(TOWER[1], prompt) + TOKEN)


def test_sixteen_sessions_reach_what_users_want() -> None:
    found = simulate(Traffic(16, 60.0), host_s=0.001)
    assert found.slowest >= 40
    assert percentile_ms(found.decisions, 95) <= 80
    assert len(found.decisions) >= 16 * 60 - 16


def test_between() -> None:
    assert between({1: 1.0, 4: 4.0, 16: 10.0}, 10) == pytest.approx(7)
    assert between({1: 1.0, 4: 4.0}, 1) == 1.0
    assert between({1: 1.0, 16: 16.0}, 20) == pytest.approx(20)
