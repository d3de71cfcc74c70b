"""What simulated processes wait for: that something has changed."""

import simpy


class Signal:
    """Wakes all who wait for it."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self._event = env.event()

    def notify(self) -> None:
        """Now."""
        if self._event.callbacks:  # somebody waits
            event, self._event = self._event, self._env.event()
            event.succeed()

    def wait(self) -> simpy.Event:
        """The next notify()."""
        return self._event
