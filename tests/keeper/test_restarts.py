"""When the next server starts and what it is given: pure decisions, with times as numbers."""

from itertools import pairwise
from types import SimpleNamespace

from basefs.keeper_restarts import BACKOFF_MAX_S, RESEND_WAIT_MAX_S, STEADY_S, Restarts, StartFailures
from basefs.keeper_upgrade import Stage, Upgrade
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


def test_what_was_held_back_is_handed_out_when_a_server_dies_without_it(expected_warnings):
    expected_warnings(HELD_BACK)
    restarts = Restarts()
    now_s = 0.0
    for _ in range(3):
        _, now_s = died_after(restarts, 0.2, now_s)
    assert not restarts.may_resend
    restarts.died("cannot start", now_s, was_killed=False)
    assert not restarts.may_resend, "one that took no request says nothing"
    _, now_s = died_after(restarts, STEADY_S - 1, now_s, was_killed=True)
    assert restarts.may_resend
    _, now_s = died_after(restarts, 0.2, now_s)
    assert not restarts.may_resend, "they are still the first to be suspected"


def test_servers_that_die_for_another_reason_keep_no_request_waiting_for_ever(expected_warnings):
    """A soak found it: guests waited as long as some server was killed every 5 to 15 s, after four unlucky kills."""
    expected_warnings(HELD_BACK)
    restarts = Restarts()
    now_s, handed_out = 0.0, []
    for _ in range(40):
        handed_out.append(restarts.may_resend)
        _, now_s = died_after(restarts, 7.0, now_s)
    assert all(any(pair) for pair in pairwise(handed_out)), "every other server gets them"


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


# -- servers that do not come to serve


def test_files_are_suspected_after_three_servers_that_read_them_and_never_served(expected_warnings):
    expected_warnings("exit code 1; trying again")
    expected_warnings("no memory; trying again")
    failures = StartFailures()
    for _ in range(2):
        failures.not_served("exit code 1")
    failures.not_started("no memory")
    assert failures.suspicion == ""
    failures.not_served("exit code 1")
    assert failures.suspicion == "exit code 1"
    failures.served()
    assert failures.suspicion == ""


def test_the_same_trouble_is_told_once_until_a_server_serves(expected_warnings, caplog):
    expected_warnings("trying again")
    expected_warnings("is not usable")
    failures = StartFailures()
    for _ in range(3):
        failures.not_served("exit code 1")
        failures.loaded_with("no such option")
    assert len(caplog.records) == 2
    failures.served()
    failures.not_served("exit code 1")
    failures.loaded_with("")
    failures.loaded_with("no such option")
    assert len(caplog.records) == 4


# -- whose turn it is in an upgrade


def an_upgrade(stage: Stage = "stopping") -> Upgrade:
    server = SimpleNamespace(pid=1, version="1", loaded={})
    upgrade = Upgrade(server, server, lambda _: None)
    upgrade.stage = stage
    return upgrade


def test_an_upgrade_goes_to_the_candidate_then_to_the_old_version_then_to_nobody(expected_warnings):
    expected_warnings(r"the new server failed \(exit code 3\); the old version takes over")
    upgrade = an_upgrade()
    assert upgrade.next_holder("", has_standby=True) == "candidate"
    assert upgrade.next_holder("exit code 3", has_standby=True) == "standby"
    assert upgrade.next_holder("signal SIGKILL", has_standby=True) is None
    assert upgrade.failure == "exit code 3"


def test_a_candidate_that_failed_meanwhile_is_passed_over(expected_warnings):
    expected_warnings("the old version takes over")
    upgrade = an_upgrade()
    upgrade.failure = "exit code 3"
    assert upgrade.next_holder("", has_standby=True) == "standby"


def test_without_a_standby_there_is_no_way_back():
    upgrade = an_upgrade("taking over")
    assert upgrade.next_holder("exit code 3", has_standby=False) is None
    assert upgrade.failure == "exit code 3"
