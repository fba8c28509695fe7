"""A pool of workers is to the loop what one replica is: it evaluates, applies, and gives and takes the state.

The driver holds no replica. Messages are a few numbers: ranges out, scores back, records out. A state moves only when a
worker joins, from where it lies to that worker, and for a checkpoint, from the lead to the driver.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np

from eggroll.core.records import UpdateRecord
from eggroll.distributed.crew import POLL_S, Crew, DigestWarning, Seat
from eggroll.distributed.host import to_message
from eggroll.distributed.partition import Ledger, ranges
from eggroll.distributed.state import pack, torch_tensors, unpack
from eggroll.distributed.transport import Transport
from eggroll.errors import ConfigError, RewardError, RunError
from eggroll.loop import Evaluation, Heldout


class Pool:
    """Workers and what they have to do. Made as :class:`RayPool` or :class:`LocalPool`, which say what arguments mean.

    A pool is a :class:`eggroll.loop.Worker` itself, so that a loop runs on it as on any other.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        workers: int,
        population_size: int,
        range_size: int | None,
        check_every: int,
        straggler_s: float,
        start_timeout_s: float,
        notify: Callable[[str], None] | None,
    ) -> None:
        self._ranges = ranges(population_size, range_size)
        self._check_every, self._straggler_s = check_every, straggler_s
        self._ledger: Ledger | None = None
        self._counted = (0, 0)
        self._transport = transport
        self._crew = Crew(transport, start_timeout_s=start_timeout_s, notify=notify, on_lost=self._lost)
        self.closed = False
        self.update_cosine: float | None = None
        try:
            for _ in range(workers):
                self._crew.add()
            self._crew.wait_for_lead()
            if workers > len(self._ranges):
                self._crew.say(
                    f"{workers} workers share {len(self._ranges)} ranges of {len(self._ranges[0])} members, so some "
                    "are idle; a smaller range_size or a larger population_size gives all of them work"
                )
        except BaseException:
            self.close()
            raise

    # -- what the loop calls

    def evaluate(self, generation: int, sigma: float, members: range | None = None) -> Evaluation:
        """Score members of a generation; all by default.

        They are cut into ranges whose size does not depend on the number of workers. The metrics say what it took:
        ``workers`` (that scored anything), ``ranges_repeated``, and ``sent_bytes`` and ``received_bytes`` since the
        last generation.

        Raises:
            EggrollError: what a worker's evaluation raised, as it was.
            RunError: workers die again and again.
        """
        cut = self._ranges if members is None else ranges(members, len(self._ranges[0]))
        ledger = self._ledger = Ledger(cut, patience_s=self._straggler_s)
        try:
            while not ledger.done:
                self._crew.wait_for_lead()
                ready = self._crew.ready()
                # The next range lies at hand while one is scored, or workers would wait for the driver after each;
                # not towards the end, where it would lie with a slow worker while another has nothing to do.
                for ahead in (0, 1):
                    for seat in ready:
                        wanted = len(seat.busy) == ahead and (not ahead or ledger.waiting > len(ready))
                        if wanted and not self._give(seat, ledger, generation, sigma):
                            break  # then there is nothing for the others either
                due = ledger.next_repeat()
                self._crew.pump(POLL_S if due is None else min(POLL_S, max(0.01, due - time.monotonic())))
        except KeyboardInterrupt:
            self._crew.take_back()
            raise
        finally:
            self._ledger = None
        return self._merged(ledger)

    def heldout(self, generation: int) -> Heldout:
        """The lead's center on held-out data."""
        reward, samples, metrics = self._crew.ask_lead("heldout", generation)[0]
        return Heldout(reward, samples, metrics)

    def apply(self, record: UpdateRecord) -> float:
        """Send an update to all workers; returns the norm as soon as the first of them has taken it."""
        crew, message = self._crew, to_message(record)
        position = crew.history.position
        crew.changes = {}
        crew.history.messages.append(message)
        crew.apply(position, message)
        while position not in crew.changes:
            crew.wait_for_lead()
            if position not in crew.changes:
                crew.pump(POLL_S)
        norm, self.update_cosine = crew.changes[position]
        if self._check_every and crew.history.position % self._check_every == 0:
            self._compare()
        return norm

    def state_tensors(self) -> dict[str, Any]:
        """The lead's state as PyTorch tensors on the CPU, read-only. Workers that join later start from it."""
        state, ticket = self._crew.ask_lead("state")
        self._crew.history.snapshot(ticket)
        return torch_tensors(unpack(state))

    def load_state_tensors(self, tensors: Mapping[str, Any]) -> None:
        """Put a state into all workers.

        Raises:
            CheckpointError: it does not fit the workers' model.
        """
        crew = self._crew
        crew.history.begin(self._transport.keep(pack(tensors)))
        for seat in crew.joined():
            crew.rejoin(seat)
        crew.wait_for_lead()

    # -- workers

    def add_worker(self) -> None:
        """Ask for one more worker. It takes part as soon as it has a place and has caught up."""
        self._crew.add()

    def workers(self) -> list[dict[str, Any]]:
        """Who is there: ``number``, ``phase`` (waiting, building, joining, ready), ``node`` and ``pid`` when known."""
        return [{"number": seat.number, "phase": seat.phase, **seat.info} for seat in self._crew.seats()]

    def kill(self, number: int) -> None:
        """End a worker's process, as if it had died; another one takes its place. For tests and for drills."""
        for seat in self._crew.seats():
            if seat.number == number:
                self._transport.stop(seat.handle)

    def wait_until_ready(self, workers: int, timeout_s: float = 600.0) -> None:
        """Wait until this many workers are ready. A run does not need it; a measurement may.

        Raises:
            RunError: they are not ready in time.
        """
        end = time.monotonic() + timeout_s
        while len(self._crew.ready()) < workers:
            if time.monotonic() > end:
                raise RunError(f"{len(self._crew.ready())} of {workers} workers are ready after {timeout_s:g} s")
            self._crew.pump(POLL_S)

    def close(self) -> None:
        """End all workers, and the cluster if it was started for them."""
        if not self.closed:
            self.closed = True
            self._crew.clear()
            self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- inside

    def _give(self, seat: Seat, ledger: Ledger, generation: int, sigma: float) -> bool:
        index = ledger.take(seat.number, time.monotonic())
        if index is None:
            return False
        members = ledger.ranges[index]

        def scored(answer: Any) -> None:
            seat.deaths = 0
            # Of a generation that is over, nobody looks at it any more.
            ledger.finish(seat.number, index, (seat.number, *answer), time.monotonic())

        args = (generation, sigma, members.start, members.stop)
        seat.busy.add(self._crew.send(seat, "evaluate", *args, then=scored))
        return True

    def _lost(self, seat: Seat) -> None:
        if self._ledger is not None:
            self._ledger.lost(seat.number)

    def _merged(self, ledger: Ledger) -> Evaluation:
        """One evaluation of those of all ranges, in the order of members."""
        results = ledger.assemble()
        tables = [fitness for _, fitness, *_ in results]
        totals: dict[str, Any] = {}
        for *_, found in results:
            for name, value in found.items():
                totals[name] = totals[name] + value if name in totals else value
        shapes = {table.shape[1:] for table in tables}
        if len(shapes) > 1:
            raise RewardError(
                f"workers returned different numbers of scores for each member: {sorted(shapes)}; every member of a "
                "generation must be scored on the same prompts"
            )
        sent, received = self._transport.sent_bytes, self._transport.received_bytes
        metrics = _merged_metrics(results, ledger.ranges) | {
            "workers": len({worker for worker, *_ in results}),
            "ranges_repeated": ledger.repeated,
            "sent_bytes": sent - self._counted[0],
            "received_bytes": received - self._counted[1],
        }
        self._counted = (sent, received)
        samples = [row for *_, rows, _ in results for row in rows]
        tokens = sum(tokens for *_, tokens, _, _ in results)
        return Evaluation(np.concatenate(tables), metrics, tokens, samples, totals)

    def _compare(self) -> None:
        """Compare the workers' weights; whoever differs from the lead gets the lead's."""
        crew, found = self._crew, dict[Seat, str]()
        # Who still scores a range that others have done by now may never answer, and can be compared next time.
        asked = [seat for seat in crew.ready() if not seat.busy]
        for seat in asked:
            crew.send(seat, "digest", then=partial(found.__setitem__, seat))
        while any(seat not in found and crew.has(seat) for seat in asked):
            crew.pump(POLL_S)
        present = [seat for seat in asked if seat in found and crew.has(seat)]
        odd = [seat for seat in present if found[seat] != found[present[0]]]
        if odd:
            lead = present[0]
            crew.copy_lead(lead)
            names = ", ".join(seat.name for seat in odd)
            crew.say(
                f"after {crew.history.position} updates the weights of {names} were not those of {lead.name}, the "
                "lead; they are replaced by the lead's. Machines of different kinds round differently: runs on them "
                "need a smaller check_every, and cannot be repeated bit for bit",
                DigestWarning,
            )
            for seat in odd:
                crew.rejoin(seat)


def _merged_metrics(results: list[Any], members: Sequence[range]) -> dict[str, float]:
    """Seconds (names that end in ``_s``) of the worker that spent most; of anything else, the mean over members."""
    spent: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    sums: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for (worker, _, metrics, *_), chosen in zip(results, members, strict=True):
        for name, value in metrics.items():
            if name.endswith("_s") and not name.endswith("_per_s"):
                spent[name][worker] += value
            else:
                sums[name].append((value, len(chosen)))
    merged = {name: max(by_worker.values()) for name, by_worker in spent.items()}
    return merged | {
        name: sum(value * count for value, count in pairs) / sum(count for _, count in pairs)
        for name, pairs in sums.items()
    }


def check_counts(**counts: tuple[Any, float, bool]) -> None:
    """Refuse numbers that are too small or of the wrong kind: ``name=(value, least, whole)``.

    Raises:
        ConfigError: the message lists all of them.
    """
    problems = []
    for name, (value, least, whole) in counts.items():
        kind = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kind) or value < least:
            problems.append(f"{name} (={value!r}) must be a {'whole ' if whole else ''}number of at least {least:g}")
    if problems:
        raise ConfigError.from_problems("the pool", problems)
