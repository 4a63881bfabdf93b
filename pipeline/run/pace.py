"""The pace of a node: its images per second, from when its shards ended."""

from dataclasses import dataclass


@dataclass
class Pace:
    """When shards or epochs of a node ended in this run.

    The first shards come late, since workers prepare their network and kernels, and since a shard ends when it is
    committed, while the next is at work. So the first round, the shards that end within half as long again as the first
    one took, is left out once the later ones have lasted as long as that half, if this makes the rate higher: several
    workers end a round at about the same time, and later rounds may not be complete.

    Attributes:
        began: start of the node's first shard (seconds since 1970, as all).
        first: end of its first shard.
        round: end of the first round, and images by then.
        last: end of the last shard so far, and images by then.
    """

    began: float
    first: float = 0.0
    round: tuple[float, int] = (0.0, 0)
    last: tuple[float, int] = (0.0, 0)

    def ended(self, at: float, images: int) -> None:
        """Note that a shard ended, with which there are so many images."""
        self.first, self.last = self.first or at, (at, images)
        if at <= self.first + self._half:
            self.round = self.last

    @property
    def rate(self) -> float:
        """Images per second; 0 before a shard ended."""
        (at, images), (since, before) = self.last, self.round
        whole = images / max(1e-9, at - self.began)
        return max(whole, (images - before) / (at - since)) if at - since >= max(1e-9, self._half) else whole

    @property
    def _half(self) -> float:
        return (self.first - self.began) / 2
