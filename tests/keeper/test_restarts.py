"""When the next server starts and what it is given: pure decisions, with times as numbers."""

from basefs.keeper_restarts import BACKOFF_MAX_S, RESEND_WAIT_MAX_S, STEADY_S, Restarts
from basefs.keeper_watchdog import TICKS, Watchdog

HELD_BACK = "servers died soon"
HANDED_OUT = "handed out again"


def died_after(restarts: Restarts, served_s: float, now_s: float, *, was_killed: bool = False) -> tuple[float, float]:
    """A server that serves from `now_s` on for a while: the delay before the next, and when it died."""
    restarts.became_ready(now_s)
    return restarts.died("a reason", now_s + served_s, was_killed=was_killed), now_s + served_s


def test_the_first_restart_is_at_once_and_further_ones_back_off_to_5_s():
    restarts = Restarts()
    delays = [restarts.died("cannot start", 0.0, was_killed=False) for _ in range(9)]
    assert delays == [0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, BACKOFF_MAX_S, BACKOFF_MAX_S]


def test_servers_that_served_a_while_are_replaced_at_once_however_often():
    restarts = Restarts()
    assert [died_after(restarts, 1.5, 10.0 * n, was_killed=True)[0] for n in range(20)] == [0.0] * 20


def test_a_steady_server_ends_the_back_off():
    restarts = Restarts()
    for _ in range(5):
        restarts.died("cannot start", 0.0, was_killed=False)
    assert died_after(restarts, STEADY_S, 0.0)[0] == 0.0
    assert restarts.died("cannot start", 0.0, was_killed=False) == 0.0


def test_three_quick_deaths_hold_back_what_dead_servers_had_taken(expected_warnings):
    expected_warnings(HELD_BACK)
    restarts = Restarts()
    now_s = 0.0
    for _ in range(3):
        assert restarts.may_resend
        _, now_s = died_after(restarts, 0.2, now_s)
    assert not restarts.may_resend
    restarts.became_ready(now_s)
    assert restarts.resend_due_s == now_s + STEADY_S


def test_a_request_that_kills_every_server_is_tried_more_and_more_seldom(expected_warnings):
    expected_warnings(HELD_BACK)
    expected_warnings(HANDED_OUT)
    restarts = Restarts()
    now_s, waits = 0.0, []
    for _ in range(3):
        _, now_s = died_after(restarts, 0.2, now_s)
    for _ in range(9):
        restarts.became_ready(now_s)
        waits.append(round(restarts.resend_due_s - now_s))
        now_s = restarts.resend_due_s
        restarts.resent(now_s)
        restarts.died("crashed", now_s + 0.3, was_killed=False)
        assert not restarts.may_resend
    assert waits == [10, 20, 40, 80, 160, 320, 640, 640, 640]
    assert waits[-1] == RESEND_WAIT_MAX_S


def test_what_was_held_back_and_did_no_harm_ends_the_suspicion(expected_warnings):
    expected_warnings(HELD_BACK)
    expected_warnings(HANDED_OUT)
    restarts = Restarts()
    now_s = 0.0
    for _ in range(3):
        _, now_s = died_after(restarts, 0.2, now_s)
    restarts.became_ready(now_s)
    restarts.resent(restarts.resend_due_s)
    restarts.died("killed", now_s + 10 * STEADY_S, was_killed=True)
    assert restarts.may_resend


def test_kills_from_outside_hold_nothing_back_unless_they_come_at_once():
    restarts = Restarts()
    now_s = 0.0
    for _ in range(10):
        _, now_s = died_after(restarts, 1.0, now_s, was_killed=True)
    assert restarts.may_resend


def test_servers_that_never_served_speak_against_no_request():
    restarts = Restarts()
    for _ in range(10):
        restarts.died("cannot start", 0.0, was_killed=False)
    assert restarts.may_resend


def test_a_server_hangs_after_unanswered_ticks_only():
    watchdog = Watchdog()
    watchdog.begin(0.0, 8.0)
    now_s = 0.0
    for _ in range(10):
        now_s = watchdog.due_s
        number = watchdog.tick(now_s)
        watchdog.pong(number)
    for _ in range(TICKS):
        now_s = watchdog.due_s
        assert watchdog.tick(now_s) is not None
    assert now_s <= 10 * 2 + 8.0
    assert watchdog.tick(watchdog.due_s) is None


def test_a_keeper_that_was_stopped_for_hours_finds_one_tick_late():
    watchdog = Watchdog()
    watchdog.begin(0.0, 8.0)
    assert watchdog.tick(2.0) == 1
    assert watchdog.tick(36_000.0) == 2
    assert watchdog.due_s == 36_002.0
    watchdog.pong(2)
    assert all(watchdog.tick(36_002.0 + n) is not None for n in range(TICKS))
