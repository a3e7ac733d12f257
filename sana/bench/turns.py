"""Two pieces of work in one process that take turns, so that both meet the same moments of a machine.

On a shared machine the same drawing takes up to a fifth more or less a few minutes later, which is more than what is
to be told apart. Handing over after every call of a network, each some seconds long, lets both sides have the good and
the bad moments; only one works at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any


class Turns:
    """Runs functions in threads of which one at a time goes on; each hands over where it calls `hand_over`.

    The order is that of the mapping; whoever is done leaves the round.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._round: list[str] = []
        self._names: dict[int, str] = {}
        self._spent: dict[str, float] = {}
        self._since = 0.0
        self._failed: BaseException | None = None

    def wrap(self, owner: Any, name: str) -> None:
        """From now on a call of `owner.name` that is made in turns ends with handing over."""
        function = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self.hand_over()
            return result

        setattr(owner, name, run)

    def run(self, works: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Seconds that each of the named functions took, without the others' turns.

        Raises:
            BaseException: what the first of them raised.
        """
        self._round, self._spent, self._failed = list(works), dict.fromkeys(works, 0.0), None
        threads = [threading.Thread(target=self._go, args=item, daemon=True) for item in works.items()]
        self._since = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failed is not None:
            raise self._failed
        return dict(self._spent)

    def hand_over(self) -> None:
        """Let the next one go on, and wait for one's turn; nothing outside of `run`."""
        name = self._names.get(threading.get_ident())
        if name is not None:
            self._pass_on(name, stays=True)
            self._await(name)

    def _go(self, name: str, work: Callable[[], object]) -> None:
        self._names[threading.get_ident()] = name
        try:
            self._await(name)
            work()
        except BaseException as error:  # raised again in the thread that waits for all
            self._failed = self._failed or error
        finally:
            self._pass_on(name, stays=False)
            del self._names[threading.get_ident()]

    def _await(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failed is not None or self._round[0] == name)
            if self._failed is not None:
                raise RuntimeError("another of the works failed")
            self._since = time.perf_counter()

    def _pass_on(self, name: str, stays: bool) -> None:
        with self._changed:
            if self._round[:1] == [name]:
                self._spent[name] += time.perf_counter() - self._since
            self._round = [n for n in self._round if n != name] + [name] * stays
            self._changed.notify_all()
