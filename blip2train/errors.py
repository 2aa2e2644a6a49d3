"""The errors a user can cause. Each says what was found, where, and what to do about it.

`assert` is kept for our own invariants; everything a config, a file or a checkpoint can get wrong is one of these.
"""


class Blip2TrainError(Exception):
    """Base of every error that is the input's fault, not the code's.

    Args:
        found: what was found, with the offending value.
        where: the config key, file, shard or tensor it was found in.
        fix: what the user can do now; names the known choices where there are any.
    """

    def __init__(self, found: str, *, where: str, fix: str) -> None:
        super().__init__(f"{found}\n  where: {where}\n  fix:   {fix}")
        self.found, self.where, self.fix = found, where, fix

    def __reduce__(self) -> tuple[object, ...]:
        # DataLoader workers send exceptions between processes; keyword-only arguments need help to survive that.
        return (_rebuild, (type(self), self.found, self.where, self.fix))


class ConfigError(Blip2TrainError):
    """A setting is missing, unknown or contradicts another one; raised before any long work starts."""


class DataError(Blip2TrainError):
    """A shard, record or image cannot be used; names the shard and the key."""


class CheckpointError(Blip2TrainError):
    """Weights do not fit the model they are loaded into; carries the key report."""


def _rebuild(kind: type[Blip2TrainError], found: str, where: str, fix: str) -> Blip2TrainError:
    return kind(found, where=where, fix=fix)
