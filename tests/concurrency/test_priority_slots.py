"""Slots: demand first, background bounded, and nothing lost by cancellation."""

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from basefs.concurrency.priority_slots import PrioritySlots


class Work:
    """Takes slots and holds them until told."""

    def __init__(self, slots: PrioritySlots, nursery: trio.Nursery) -> None:
        self.slots = slots
        self.nursery = nursery
        self.order: list[str] = []

    async def start(
        self, name: str, *, background: bool = False, ahead: bool = False
    ) -> tuple[trio.Event, trio.CancelScope]:
        finish, scope = trio.Event(), trio.CancelScope()

        async def work() -> None:
            with scope:
                async with self.slots.take_ahead() if ahead else self.slots.take(background=background):
                    self.order.append(name)
                    await finish.wait()

        self.nursery.start_soon(work)
        await trio.testing.wait_all_tasks_blocked()
        return finish, scope


async def test_background_leaves_the_reserve_to_demand() -> None:
    async with trio.open_nursery() as nursery:
        work = Work(PrioritySlots(4, reserved=2), nursery)
        for n in range(4):
            await work.start(f"b{n}", background=True)
        assert work.order == ["b0", "b1"]
        for n in range(3):
            await work.start(f"d{n}", background=False)
        assert work.order == ["b0", "b1", "d0", "d1"]
        assert work.slots.waiting_demand == 1
        nursery.cancel_scope.cancel()


async def test_demand_goes_before_background_that_waited_longer() -> None:
    async with trio.open_nursery() as nursery:
        work = Work(PrioritySlots(1, reserved=0), nursery)
        finish, _ = await work.start("first", background=False)
        await work.start("b", background=True)
        await work.start("d", background=False)
        finish.set()
        await trio.testing.wait_all_tasks_blocked()
        assert work.order == ["first", "d"]
        nursery.cancel_scope.cancel()


async def test_a_replay_leaves_one_slot_and_goes_between_demand_and_background() -> None:
    async with trio.open_nursery() as nursery:
        work = Work(PrioritySlots(4, reserved=2), nursery)
        finish, _ = await work.start("a0", ahead=True)
        await work.start("b0", background=True)
        await work.start("b1", background=True)
        await work.start("a1", ahead=True)
        assert work.order == ["a0", "b0", "a1"], "beyond what background may, but for one"
        await work.start("a2", ahead=True)
        await work.start("d0")
        await work.start("d1")
        assert work.order == ["a0", "b0", "a1", "d0"]
        finish.set()
        await trio.testing.wait_all_tasks_blocked()
        assert work.order == ["a0", "b0", "a1", "d0", "d1"]
        nursery.cancel_scope.cancel()


async def test_background_waits_for_a_replay_that_came_later() -> None:
    async with trio.open_nursery() as nursery:
        work = Work(PrioritySlots(3, reserved=1), nursery)
        finish, _ = await work.start("a0", ahead=True)
        await work.start("a1", ahead=True)
        await work.start("b0", background=True)
        await work.start("a2", ahead=True)
        finish.set()
        await trio.testing.wait_all_tasks_blocked()
        assert work.order == ["a0", "a1", "a2"]
        nursery.cancel_scope.cancel()


def test_a_reserve_of_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="slots"):
        PrioritySlots(2, reserved=2)


kinds = st.sampled_from(["demand", "ahead", "background"])
step = st.tuples(st.sampled_from(["start", "finish", "cancel"]), kinds, st.integers(0, 30))


@settings(deadline=None, max_examples=60)
@given(st.lists(step, max_size=40))
def test_no_order_of_events_loses_or_doubles_a_slot(steps: list[tuple[str, str, int]]) -> None:
    async def scenario() -> None:
        slots = PrioritySlots(4, reserved=2)
        holding = {"demand": 0, "ahead": 0, "background": 0}
        items: list[tuple[trio.Event, trio.CancelScope]] = []
        async with trio.open_nursery() as nursery:

            async def work(finish: trio.Event, scope: trio.CancelScope, kind: str) -> None:
                with scope:
                    async with slots.take_ahead() if kind == "ahead" else slots.take(background=kind == "background"):
                        holding[kind] += 1
                        assert sum(holding.values()) <= 4
                        assert holding["ahead"] + holding["background"] <= 3
                        assert holding["background"] <= 2
                        try:
                            await finish.wait()
                        finally:
                            holding[kind] -= 1

            for what, kind, index in steps:
                if what == "start":
                    items.append((trio.Event(), trio.CancelScope()))
                    nursery.start_soon(work, *items[-1], kind)
                elif items:
                    finish, scope = items[index % len(items)]
                    finish.set() if what == "finish" else scope.cancel()
                if index % 3:
                    await trio.lowlevel.checkpoint()
            for finish, _ in items:
                finish.set()
        async with trio.open_nursery() as nursery:
            for _ in range(4):  # all four are free again

                async def take() -> None:
                    async with slots.take(background=False):
                        await all_in.wait()

                nursery.start_soon(take)
            all_in = trio.Event()
            await trio.testing.wait_all_tasks_blocked()
            assert slots.waiting_demand == 0
            all_in.set()

    trio.run(scenario)


async def test_a_spare_slot_leaves_one_free_and_is_given_back() -> None:
    async with trio.open_nursery() as nursery:
        work = Work(PrioritySlots(3, reserved=2), nursery)
        with work.slots.spare() as has_slot:
            assert has_slot
            with work.slots.spare() as has_slot:
                assert has_slot
                with work.slots.spare() as has_slot:
                    assert not has_slot
        finishes = [await work.start(f"d{n}") for n in range(4)]
        with work.slots.spare() as has_slot:
            assert not has_slot
        finishes[0][0].set()
        await trio.testing.wait_all_tasks_blocked()
        assert work.order == ["d0", "d1", "d2", "d3"], "a place that was not spare is nobody else's"
        nursery.cancel_scope.cancel()
