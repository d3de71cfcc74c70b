"""The errors that users and callers may meet.

    AsyncRLHFError
    |-- ConfigError            what the user asked for cannot be (exit code 2)
    |-- RewardError            the reward function broke its contract (exit code 2)
    |-- ShapeError             tensors or arrays that do not fit together
    |-- StalenessError         a request that the staleness contract forbids
    |-- WeightsError           weights that do not fit the engine, or fail the canary
    |-- EngineError            the sampling engine failed
    `-- RunError               a run that cannot go on (exit code 1)
        |-- DeadlineError      a blocking edge outlived its deadline
        |-- ActorLostError     an actor died while somebody waited for it
        |-- ActorFailedError   a method of an actor raised what nobody expected
        |-- ObjectLostError    what one process handed to another is gone with its owner or its node
        |-- LearnerLostError   the learner group lost a rank, and with it what it had not saved
        |-- RestartLimitError  an actor keeps failing
        |-- NoRoomError        the cluster has no room for an actor that was lost, or is to join
        |-- RewardLostError    the service that scores cannot be reached
        |-- HeadLostError      Ray itself is gone
        |-- StageStopped       a stage before reinforcement learning was asked to stop, and wrote a checkpoint
        `-- JournalError       the journal is damaged, cannot be written, or is not the one that was expected
            `-- JournalLockedError    another process writes it

Every message says what, got, expected and remedy. No class has its own `__init__`, so that each one crosses process borders.
"""


class AsyncRLHFError(Exception):
    """Root of all errors raised on purpose by this project."""


class ConfigError(AsyncRLHFError, ValueError):
    """The configuration, or an input that it names, cannot work. Raised before any work starts."""


class RewardError(AsyncRLHFError, ValueError):
    """The reward function cannot be imported, or answered with the wrong count or a number that is not finite, or keeps failing."""


class ShapeError(AsyncRLHFError, ValueError):
    """Tensors or arrays whose shapes do not fit together."""


class StalenessError(AsyncRLHFError, ValueError):
    """A request that contradicts the staleness contract, for instance a version that does not exist yet."""


class WeightsError(AsyncRLHFError, RuntimeError):
    """Weights that do not match the engine's manifest, were damaged on the way, or fail the canary."""


class EngineError(AsyncRLHFError, RuntimeError):
    """The sampling engine failed; the actor that holds it is lost."""


class RunError(AsyncRLHFError, RuntimeError):
    """The run cannot go on."""


class DeadlineError(RunError, TimeoutError):
    """A blocking edge outlived the deadline that the config gives it."""


class ActorLostError(RunError):
    """An actor died while somebody waited for it."""


class ActorFailedError(RunError):
    """A method of an actor raised an error that is none of ours."""


class ObjectLostError(RunError):
    """A message between two processes is gone: its owner died, or the node that held it."""


class LearnerLostError(RunError):
    """A rank died or froze: the group has to start again from a checkpoint."""


class RestartLimitError(RunError):
    """An actor failed more often than `supervision.max_restarts` allows."""


class NoRoomError(RunError):
    """The cluster has no room for an actor: its node was lost and no other one has any, or it is to join the others."""


class RewardLostError(RunError):
    """A service that scores completions cannot be reached, or serves nobody: it is at fault, and no completion."""


class HeadLostError(RunError):
    """Ray's head does not answer: nothing can be started, found or ended through it any more."""


class StageStopped(RunError):
    """A stage was asked to stop; what it had done is kept, and it goes on from there."""


class JournalError(RunError):
    """The journal is damaged, cannot be written, or is not the one that a checkpoint was made with."""


class JournalLockedError(JournalError):
    """Another living process writes this journal."""
